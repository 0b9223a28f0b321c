"""train.py when something goes wrong: bad pairs, bad flags, a full disk, a signal, a kill, a lost process. Each ends in one
clear sentence or in the same result as an undisturbed run, and nothing that was written is lost."""

import copy
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import launch
import pytest
import tiny_models
import torch
from conftest import read_folder
from safetensors.torch import load_file, save_file
from test_train import FLAGS, read_log, run, same, start, straight  # noqa: F401  (straight is a fixture)

import build_pairs
import train
from lib import adapters, models, runs
from lib.files import UserError, checksum
from lib.pairs import shard_path
from lib.processes import holding, program


def error_of(function):
    """The sentence that a call ends with."""
    with pytest.raises(SystemExit) as caught:
        function()
    return str(caught.value)


# ---- bad pairs


def rewrite(store, change_rows=None, change_shard=None):
    """Changes a store as someone would who makes one himself: with checksums that fit."""
    meta = json.loads((store / "meta.json").read_text())
    if change_rows:
        rows = [json.loads(line) for line in (store / "pairs.jsonl").read_text().splitlines()]
        (store / "pairs.jsonl").write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in change_rows(rows)))
        meta["table"] = checksum(store / "pairs.jsonl")
    if change_shard:
        path = shard_path(store, 1)
        save_file(change_shard(load_file(path)), path)
        meta["checksums"][1] = checksum(path)
    (store / "meta.json").write_text(json.dumps(meta))


def flip_a_bit(store):
    path = store / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def set_row(number, **values):
    return lambda store: rewrite(store, lambda rows: [row | values if i == number else row for i, row in enumerate(rows)])


def set_meta(**values):
    def change(store):
        (store / "meta.json").write_text(json.dumps(json.loads((store / "meta.json").read_text()) | values))
    return change


def one_number(x_0, value):
    x_0["x_0_w"][0, 0, 0, 0] = value
    return x_0


BAD_PAIRS = {  # what was done to the store: the damage, what a run says, what --inspect says
    "a missing shard": (lambda s: os.remove(s / "shard-00001.safetensors"), "shard-00001.safetensors is missing or damaged", None),
    "a truncated shard": (lambda s: os.truncate(s / "shard-00001.safetensors", 300), "shard-00001.safetensors is missing or damaged", None),
    "a flipped bit": (flip_a_bit, "shard-00001.safetensors is missing or damaged", None),
    "a NaN": (lambda s: rewrite(s, change_shard=lambda x: one_number(x, float("nan"))), "x_0_w of the pair p3 has a deviation of nan, which no scaled latents have", None),
    "an infinity": (lambda s: rewrite(s, change_shard=lambda x: one_number(x, float("inf"))), "x_0_w of the pair p3 has a deviation of nan, which no scaled latents have", None),
    "a changed table": (lambda s: (s / "pairs.jsonl").write_text("x"), "pairs.jsonl is missing or was changed", None),
    "the same c and c_minus": (set_row(4, c_minus="a tall tree on a hill"), None, "pair p4: c and c_minus are the same to the model"),
    "another shape": (set_meta(latents=[4, 16, 16]), "holds latents \\[4, 16, 16\\]", None),
    "another scale": (set_meta(scale=[0.13025, 0.0]), "of scale \\[0.13025, 0.0\\], but .* needs .* of \\[0.18215, 0.0\\]", None),
    "an unfinished store": (lambda s: (s / "meta.json").write_text(json.dumps({k: v for k, v in json.loads((s / "meta.json").read_text()).items() if k != "checksums"})), "is not finished", None),
    "a broken meta.json": (lambda s: (s / "meta.json").write_text("{"), "meta.json cannot be read .*: give a pair store", None),
    "an empty meta.json": (lambda s: (s / "meta.json").write_text("{}"), "meta.json cannot be read .*: give a pair store", None),
}


@pytest.mark.parametrize("what", BAD_PAIRS)
def test_bad_pairs_are_named_in_a_sentence_by_a_run_and_by_inspect(what, sd, pairs, tmp_path):
    damage, said, checked = BAD_PAIRS[what]
    store = tmp_path / "store"
    shutil.copytree(pairs, store)
    damage(store)
    before = read_folder(store)
    if said:
        error = error_of(lambda: run(sd, str(store), tmp_path / "run", "--updates", "3"))
        assert re.search(said, error) and "Traceback" not in error
    error = error_of(lambda: build_pairs.main(["--inspect", str(store)]))
    assert re.search(checked or said, error) and "Traceback" not in error
    assert read_folder(store) == before and not (tmp_path / "run" / "pipeline").exists()


def test_inspect_says_all_that_is_wrong_at_once_and_passes_a_good_store(sd, pairs, tmp_path, capsys):
    store = tmp_path / "store"
    shutil.copytree(pairs, store)
    rewrite(store, change_shard=lambda x: one_number(x, float("nan")))
    os.remove(store / "shard-00000.safetensors")
    os.truncate(store / "shard-00002.safetensors", 300)
    error = error_of(lambda: build_pairs.main(["--inspect", str(store)]))
    assert all(word in error for word in ("shard-00000", "shard-00001", "shard-00002", "3 problems")) and "00003" not in error
    build_pairs.main(["--inspect", pairs])
    assert "is whole" in capsys.readouterr().out


def test_fewer_pairs_than_a_batch_are_seen_again_with_other_noise(sd, pairs, tmp_path, capsys):
    for size, times in ((25, "2.5"), (65, "6.5")):
        run(sd, pairs, tmp_path / times, "--updates", 1, "--batch-size", size)
        said = capsys.readouterr().err
        assert f"10 pairs are fewer than a batch: an update sees each {times} times" in said
        assert sum(read_log(tmp_path / times)[0]["pairs_by_t"]) == size


def test_pairs_of_images_without_c_minus_are_not_for_equation_7(sd, pairs, tmp_path):
    shutil.copytree(pairs, tmp_path / "store")
    rewrite(tmp_path / "store", lambda rows: [row | dict(c_minus=None) for row in rows])
    assert "has no c_minus, which Eq. 7 needs" in error_of(lambda: run(sd, str(tmp_path / "store"), tmp_path / "run", "--updates", 1))
    run(sd, str(tmp_path / "store"), tmp_path / "run", "--updates", 1, objective="diffusion-dpo")


# ---- bad flags


@pytest.mark.parametrize("flags, message", [
    ("--objective sft", "give --side, which no experiment of"), ("--side w", "--side goes with --objective sft"),
    ("--objective distill --scale 3 --lr 1e-4 --beta 5", "--beta goes with --objective ddspo or diffusion-dpo or dspo, not with distill"),
    ("--scale 3", "--scale goes with --objective distill, not with ddspo"),
    ("--winner a --loser b --objective distill --scale 3", "--winner goes with --objective ddspo or dspo, not with distill"), ("--objective distill --scale 0.5", "--scale: must be 1 or more"),
    ("--objective sft --side w --beta 3", "--beta goes with"), ("--out ", "an argument is '': give a name in its place"), ("--winner a", "--winner and --loser go together"),
    ("--loser a", "--winner and --loser go together"), ("--winner a --loser b --objective diffusion-dpo", "--winner goes with --objective ddspo or dspo, not with diffusion-dpo"),
    ("--winner a --loser b --negatives not-paired", "a variant of Eq. 7"), ("--objective dspo --negatives rand-positive", "a variant of Eq. 7"),
    ("--fsdp", "unrecognized arguments: --fsdp"), ("--precision tf32", "--precision tf32 and --compile are for GPUs"),
    ("--preview 0", "--preview: must be 1 or more"), ("--updates 0", "--updates: must be 1 or more"), ("--save-every 0", "--save-every: must be 1"),
    ("--micro-batch 0", "--micro-batch: must be 1 or more"), ("--lora-rank -1", "--lora-rank: must be 0 or more"),
    ("--lr 0", "--lr: must be 1e-12 or more"), ("--lr -1", "--lr: must be 1e-12 or more"), ("--beta nan", "--beta: must be 1e-06 or more"),
    ("--winner /no/where --loser /no/where", "/no/where is no preset"), ("--plot a.jsonl", "unrecognized arguments: --plot a.jsonl"), ("--check", "unrecognized arguments: --check"),
    ("--objective dpo", "argument --objective: invalid choice: 'dpo'"), ("--compile", "--precision tf32 and --compile are for GPUs"),
])
def test_flags_that_cannot_apply_are_refused(flags, message, sd, pairs, tmp_path, capsys):
    error = error_of(lambda: train.main(["--model", sd, "--pairs", pairs, "--out", str(tmp_path / "run"), *flags.split(" ")]))
    error += capsys.readouterr().err  # where argparse says it
    assert message in error and not (tmp_path / "run" / "pipeline").exists()


def test_unknown_models_are_named(sd, pairs, tmp_path):
    for name in ("no-such-model", "some-user/some-model"):  # a hub id, without network
        assert f"{name} is no preset" in error_of(lambda name=name: run(name, pairs, tmp_path, "--updates", 1))


def test_an_adapter_is_no_model_to_be_tuned(sd, pairs, tmp_path):
    run(sd, pairs, tmp_path, "--updates", 1, "--lora-rank", 2)
    assert "is an adapter: give a whole model" in error_of(lambda: run(str(tmp_path / "lora"), pairs, tmp_path / "b", "--updates", 1))


def test_policies_that_were_replaced_are_noticed(sd, pairs, tmp_path):
    flags = ["--lora-rank", "2", "--updates", "2"]
    for side in "wl":
        train.main(["--model", sd, "--pairs", pairs, "--out", str(tmp_path / side), "--objective", "sft", "--side", side, "--batch-size", "2", "--warmup", "0", *flags])
    policies = ["--winner", str(tmp_path / "w" / "lora"), "--loser", str(tmp_path / "l" / "lora")]
    run(sd, pairs, tmp_path / "run", *flags, *policies)
    moved = shutil.move(tmp_path / "l" / "lora", tmp_path / "moved")
    before = policies[:-1] + [str(moved)]
    run(sd, pairs, tmp_path / "run", *flags, *before)  # it is the same wherever it is
    shutil.move(tmp_path / "w" / "lora", tmp_path / "l" / "lora")
    shutil.move(moved, tmp_path / "w" / "lora")
    assert "was begun with other weights of --winner than now: continue" in error_of(lambda: run(sd, pairs, tmp_path / "run", *flags, *policies))
    same_policy = ["--winner", str(tmp_path / "w" / "lora"), "--loser", str(tmp_path / "w") + "/../w/lora"]
    assert "are the same policy: there is no preference" in error_of(lambda: run(sd, pairs, tmp_path / "other", *flags, *same_policy))


def test_adapters_that_do_not_fit_are_refused(sd, pairs, family_folders, tmp_path):
    flags = ["--updates", "1", "--lora-rank", "2"]
    run(sd, pairs, tmp_path / "w", *flags, objective="diffusion-dpo")
    adapter, note = str(tmp_path / "w" / "lora"), tmp_path / "w" / "lora" / "training.json"
    model = models.load(family_folders["sd2"])
    with pytest.raises(UserError, match="--winner .* is an adapter that predicts epsilon, not v_prediction"):
        adapters.load_policy(adapter, "winner", model.net, model)
    for text, said in (("{", "training.json cannot be read"), ("[]", "training.json cannot be read"), ("{}", "without a training.json that names")):
        note.write_text(text)
        with pytest.raises(UserError, match=said):
            models.load(adapter)


@pytest.mark.parametrize("family", ["sd", "sd2", "sdxl", "sd3"])
def test_a_policy_of_another_kind_is_refused(family, sd, pairs, tmp_path):
    other = tiny_models.FAMILIES[family](**dict(net=dict(cross_attention_dim=48)) if family == "sd" else {})  # SD-2.x for SD-1.x
    other.save_pretrained(tmp_path / family)
    error = error_of(lambda: run(sd, pairs, tmp_path / "run", "--updates", 1, "--winner", tmp_path / family, "--loser", tmp_path / family))
    assert f"--winner {tmp_path / family} is a model of another kind" in error


def test_a_run_does_not_write_into_a_model_a_pair_store_or_something_elses_folder(sd, pairs, tmp_path):
    for folder in (sd, pairs):
        before = read_folder(folder)
        for place in (folder, os.path.join(folder, "unet"), os.path.join(folder, "new", "run")):
            said = error_of(lambda place=place: run(sd, pairs, place, "--updates", 1))
            assert said == f"--out {place}: {folder} is a model or a pair store: give a folder outside it."
        assert read_folder(folder) == before and not os.path.exists(os.path.join(folder, "new"))
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "because a file is in its place: give another --out" in error_of(lambda place=place: run(sd, pairs, place, "--updates", 1))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("rank, name", [(0, "pipeline"), (2, "lora")])
def test_a_file_in_place_of_the_result_is_refused_before_training(rank, name, sd, pairs, tmp_path, monkeypatch):
    run(sd, pairs, tmp_path, "--updates", 2, "--lora-rank", rank)
    shutil.rmtree(tmp_path / name)
    (tmp_path / name).write_text("mine")
    before = read_folder(tmp_path)
    monkeypatch.setattr(train, "step_loss", None)
    said = error_of(lambda: run(sd, pairs, tmp_path, "--updates", 4, "--lora-rank", rank))
    assert said == f"{tmp_path}/{name} is a file, or lies beside no checkpoint: move it away, or change --out."
    assert read_folder(tmp_path) == before


def test_a_folder_of_results_in_place_of_a_policy_or_a_model_is_answered_with_the_result(sd, pairs, tmp_path):
    run(sd, pairs, tmp_path / "w", "--updates", 1, "--lora-rank", 2)
    for flags in (["--winner", tmp_path / "w", "--loser", tmp_path / "w" / "lora"], ["--loser", tmp_path / "w", "--winner", tmp_path / "w" / "lora"]):
        assert f"give {tmp_path / 'w' / 'lora'}" in error_of(lambda flags=flags: run(sd, pairs, tmp_path / "run", "--updates", 1, *flags))
    assert f"give {tmp_path / 'w' / 'lora'}" in error_of(lambda: run(str(tmp_path / "w"), pairs, tmp_path / "run", "--updates", 1))


def test_a_first_gradient_of_0_stops_the_run(sd, pairs, tmp_path, monkeypatch):
    real = train.step_loss

    def step_loss(*batch):
        loss, info = real(*batch)
        return loss * 0, info

    monkeypatch.setattr(train, "step_loss", step_loss)
    assert "the first gradient is 0, so that nothing would be learned" in error_of(lambda: run(sd, pairs, tmp_path, "--updates", 1))
    assert not (tmp_path / "pipeline").exists() and not runs.checkpoints(str(tmp_path))


def test_a_shard_that_is_cut_under_a_running_trainer_ends_it_with_a_sentence(sd, pairs, tmp_path, monkeypatch):
    store, real, calls = shutil.copytree(pairs, tmp_path / "store"), train.step_loss, []

    def step_loss(*batch):
        calls.append(1)
        for path in store.glob("*.safetensors") if len(calls) == 3 else ():
            os.truncate(path, 300)
        return real(*batch)

    monkeypatch.setattr(train, "step_loss", step_loss)
    assert re.search("shard-0000..safetensors cannot be read .*: it was changed during the run. Make the pairs anew",
                     error_of(lambda: run(sd, str(store), tmp_path / "run", "--updates", 20)))


# ---- the folder of the run


def test_one_process_at_a_time_writes_into_a_folder(sd, pairs, tmp_path):
    with holding(str(tmp_path)):
        assert "another process is writing" in error_of(lambda: run(sd, pairs, tmp_path, "--updates", 1))
    run(sd, pairs, tmp_path, "--updates", 1)


def test_strange_files_beside_the_checkpoints_are_left_alone(sd, pairs, straight, tmp_path, capsys):  # noqa: F811
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    out = shutil.copytree(straight[0], tmp_path / "run")
    mine = ("checkpoint-final.pt", "checkpoint-000099.pt.partial", "notes.txt", "checkpoint-1.pt", "checkpoint-000001.pt")
    for name in mine:
        (out / name).write_text("mine")
    (out / "checkpoint-000050.pt").mkdir()
    torch.save(Evil(), out / "checkpoint-000060.pt")  # a pickle that would run code
    with open(out / "checkpoint-000070.pt", "wb") as file:
        pickle.dump(Evil(), file)
    for name in ("checkpoint-000070.pt", "checkpoint-000060.pt"):
        error = error_of(lambda: run(sd, pairs, out, "--updates", 7))
        assert error == f"{out / name} cannot be read as a checkpoint: delete it to go on from the one before."
        os.remove(out / name)
    expected = run(sd, pairs, tmp_path / "other", "--updates", 7)
    assert same(run(sd, pairs, out, "--updates", 7), expected)
    assert "from update 6 of 7" in capsys.readouterr().out and not (tmp_path / "executed").exists()
    assert all((out / name).read_text() == "mine" for name in mine)


def in_a_child(function, output):
    """Runs a function in a forked process; its exit code, its stderr going into a file."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(output, "w") as file:
                os.dup2(file.fileno(), 2)
                os.dup2(file.fileno(), 1)
            function()
            code = 0
        except SystemExit as error:
            os.write(2, str(error).encode())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_full_disk_keeps_the_last_checkpoint(sd, pairs, straight, tmp_path):  # noqa: F811
    def limited():
        size = os.path.getsize(straight[0] / "checkpoint-000004.pt")
        real = runs.save_checkpoint

        def save(*state):
            if state[-1] == 4:  # the update
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
            real(*state)

        runs.save_checkpoint = save
        run(sd, pairs, tmp_path / "run", "--updates", 6)

    assert in_a_child(limited, tmp_path / "out") == 1
    said = (tmp_path / "out").read_text()
    assert f"cannot read or write: [Errno 28] the disk may be full: '{tmp_path / 'run'}/checkpoint-000004.pt'" in said
    assert "run the same command again" in said and "Traceback" not in said
    assert not list((tmp_path / "run").glob("*.partial"))  # the disk is not left full
    assert [os.path.basename(path) for path in runs.checkpoints(str(tmp_path / "run"))] == ["checkpoint-000002.pt"]
    assert same(run(sd, pairs, tmp_path / "run", "--updates", 6), straight[1])
    assert read_log(tmp_path / "run") == read_log(straight[0])


def test_a_full_disk_at_the_export_keeps_all_that_is_needed_for_it(sd, pairs, straight, tmp_path):  # noqa: F811
    def limited():
        real = runs.finish

        def finish(*rest):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            real(*rest)

        runs.finish = finish
        run(sd, pairs, tmp_path / "run", "--updates", 6)

    assert in_a_child(limited, tmp_path / "out") == 1
    said = (tmp_path / "out").read_text()
    assert "cannot read or write: " in said and "run the same command again" in said and "Traceback" not in said
    assert same(run(sd, pairs, tmp_path / "run", "--updates", 6), straight[1])


@pytest.mark.slow
def test_killed_at_every_single_file_operation_it_goes_on_to_the_same_result(sd, pairs, tmp_path, monkeypatch):
    model, out = models.load(sd), tmp_path / "run"
    monkeypatch.setattr(models, "load", lambda *_: copy.deepcopy(model))  # to save time
    flags = ["--updates", "3", "--save-every", "1", "--lora-rank", "1"]
    expected = run(sd, pairs, tmp_path / "expected", *flags)

    def killed_at(n):
        count = 0

        def tick(path):
            nonlocal count
            count += str(path).startswith(str(out))
            if count == n:
                os._exit(9)

        def hook(event, arguments):
            if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") or (
                    event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                tick(arguments[0])

        def save(content, file, real=torch.save):  # C++ writes: no audit event
            real(content, file)
            os.truncate(file, os.path.getsize(file) // 2)
            tick(file)
            real(content, file)

        torch.save = save
        sys.addaudithook(hook)
        run(sd, pairs, out, *flags)

    n = 1
    while (code := in_a_child(lambda n=n: killed_at(n), tmp_path / "output")) == 9:
        assert same(run(sd, pairs, out, *flags), expected), n
        assert read_log(out) == read_log(tmp_path / "expected"), n
        more = set(read_folder(out)) - set(read_folder(tmp_path / "expected"))  # killed before an old one was removed
        assert more <= {"checkpoint-000001.pt"} and set(read_folder(tmp_path / "expected")) <= set(read_folder(out)), n
        shutil.rmtree(out)
        n += 1
    assert code == 0, (tmp_path / "output").read_text()
    assert n > 15


# ---- signals, lost processes, memory


def wait_for_updates(out, count, running):
    """Until the log has so many lines of updates."""
    while running():
        if os.path.exists(out / "log.jsonl") and len((out / "log.jsonl").read_text().splitlines()) > count:
            return
        time.sleep(0.01)
    raise AssertionError("the run ended early")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_which_goes_on_from_its_last_checkpoint_bit_for_bit(number, sd, pairs, straight, tmp_path):  # noqa: F811
    process = start(sd, pairs, tmp_path, "--updates", 5000, "--save-every", 1)
    wait_for_updates(tmp_path, 3, process.running)
    process.signal(number)
    codes, said = process.wait()
    assert codes == [-signal.SIGTERM if number == signal.SIGTERM else 1] and not (tmp_path / "pipeline").exists()
    assert ("stopped. The same command goes on" in said) == (number == signal.SIGINT)
    update = int(runs.checkpoints(str(tmp_path))[0][-9:-3])
    weights = run(sd, pairs, tmp_path, "--updates", update + 2, "--save-every", 1)
    assert same(weights, run(sd, pairs, tmp_path / "straight", "--updates", update + 2))
    assert read_log(tmp_path) == read_log(tmp_path / "straight")


def test_torchrun_hands_a_signal_to_its_processes_and_the_run_goes_on(sd, pairs, tmp_path):
    flags = ["--model", sd, "--pairs", pairs, "--out", str(tmp_path), *FLAGS, "--updates", "400"]
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train.__file__,
                                *map(str, flags)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for_updates(tmp_path, 5, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=50) != 0
    update = int(runs.checkpoints(str(tmp_path))[0][-9:-3])
    run(sd, pairs, tmp_path, "--updates", update + 1)  # which the lock would refuse if a process were still there
    assert update >= 4 and read_log(tmp_path)[-1]["update"] == update + 1


def test_a_lost_process_ends_the_others_within_a_minute_with_a_sentence(sd, pairs, straight, tmp_path):  # noqa: F811
    process = start(sd, pairs, tmp_path, "--updates", 5000, processes=2)
    wait_for_updates(tmp_path, 5, process.running)
    since = time.time()
    process.signal(signal.SIGKILL, rank=1)
    codes, said = process.wait()
    assert time.time() - since < 60 and codes == [1, -signal.SIGKILL]
    assert "another process was lost" in said and "start all again" in said
    update = int(runs.checkpoints(str(tmp_path))[0][-9:-3])
    run(sd, pairs, tmp_path, "--updates", update + 1)
    assert read_log(tmp_path)[-1]["update"] == update + 1


def test_out_of_memory_says_which_flags_help(sd, pairs, tmp_path, monkeypatch):
    def step_loss(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "step_loss", step_loss)
    error = error_of(lambda: run(sd, pairs, tmp_path, "--updates", 1))
    assert all(flag in error for flag in ("--micro-batch", "--checkpointing", "--lora-rank"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])  # in fp16 not for ever
def test_a_gradient_that_is_not_finite_stops_the_run(precision, sd, pairs, tmp_path, monkeypatch):
    real = train.make_policies

    def make_policies(*arguments):
        policies, networks = real(*arguments)
        policies["theta"].conv_in.bias.register_hook(lambda gradient: gradient * float("inf"))
        return policies, networks

    monkeypatch.setattr(train, "make_policies", make_policies)
    error = error_of(lambda: run(sd, pairs, tmp_path, "--updates", 1, "--precision", precision))
    assert "update 1: the gradient, though no loss, is not finite. Take --precision fp32, or lower --lr." in error
    assert not (tmp_path / "pipeline").exists()


# ---- how it is started


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_is_closed_is_no_fault(name, monkeypatch):
    monkeypatch.setattr(sys, name, None)  # what Python makes of >&- and 2>&-
    assert program(lambda argv: print("x", file=getattr(sys, name)) or argv)([1]) == [1]


@pytest.mark.parametrize("name", ["perturb", "evaluate"])
def test_help_without_docstrings(name):
    run = subprocess.run([sys.executable, "-OO", f"{name}.py", "--help"], cwd=launch.ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"usage: {name}.py") and not run.stderr
