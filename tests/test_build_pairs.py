"""build_pairs.py: the right latents for c and c_minus, and one store whatever happens on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import read_folder

import build_pairs
import models
from build_pairs import PairStore

STEPS = ["--steps", "2", "--shard-size", "3"]


def test_each_pair_is_sampled_from_c_and_c_minus_and_the_same_noise(sd, prompts, pairs):
    store, model = PairStore(pairs), models.load(sd)
    assert len(store) == 10
    for i in (0, 4, 9):
        row, x_0_w, x_0_l = store[i]
        given = json.loads(open(prompts).readlines()[i])
        assert (row["id"], row["c"], row["c_minus"], row["seed"]) == (given["id"], given["c"], given["c_minus"], i)
        x_T = models.initial_noise(i, model.latent_shape)[None]
        torch.testing.assert_close(x_0_w[None], model.sample(model.encode([row["c"]]), x_T, 2, 7.5), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(x_0_l[None], model.sample(model.encode([row["c_minus"]]), x_T, 2, 7.5), rtol=1e-3, atol=1e-3)
        assert (x_0_w - x_0_l).abs().max() > 0.01


def test_the_store_says_how_it_was_made(sd, pairs):
    meta = json.load(open(os.path.join(pairs, "meta.json")))
    expected = dict(model=sd, sampler="PNDMScheduler", steps=2, guidance=7.5, seed=0, latents=[4, 8, 8], dtype="float32",
                    pairs=10, shard_size=3)
    assert {key: meta[key] for key in expected} == expected
    assert [build_pairs.checksum(build_pairs.shard_path(pairs, s)) for s in range(4)] == meta["checksums"]
    assert sorted(os.listdir(pairs)) == ["meta.json", "pairs.jsonl", *[f"shard-0000{s}.safetensors" for s in range(4)]]


def test_a_stopped_run_goes_on_to_the_same_store(sd, prompts, pairs, tmp_path, monkeypatch):
    out, made = str(tmp_path / "store"), []
    real = build_pairs.make_shard

    def stop_at_the_third(model, rows, first, args, bar):
        made.append(first)
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(model, rows, first, args, bar)

    monkeypatch.setattr(build_pairs, "make_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build_pairs.main(["--model", sd, "--prompts", prompts, "--out", out, *STEPS])
    with pytest.raises(SystemExit, match="not finished"):
        PairStore(out)
    build_pairs.main(["--model", sd, "--prompts", prompts, "--out", out, *STEPS])
    assert made == [0, 3, 6, 6, 9]  # nothing is made twice but what was in the making
    assert read_folder(out) == read_folder(pairs)


def test_a_finished_store_is_left_alone(sd, prompts, pairs, capsys):
    before = {name: os.stat(os.path.join(pairs, name)).st_mtime_ns for name in os.listdir(pairs)}
    build_pairs.main(["--model", sd, "--prompts", prompts, "--out", pairs, *STEPS])
    assert "complete: 10 pairs; nothing was done" in capsys.readouterr().out
    assert before == {name: os.stat(os.path.join(pairs, name)).st_mtime_ns for name in os.listdir(pairs)}


def command(sd, prompts, out, processes=1):
    script = os.path.abspath(build_pairs.__file__)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*(start if processes > 1 else [sys.executable]), script, "--model", sd, "--prompts", prompts, "--out", out, *STEPS]


@pytest.mark.slow
def test_two_processes_make_the_same_store(sd, prompts, pairs, tmp_path):
    out = str(tmp_path / "store")  # judged by what it wrote: gloo processes sometimes abort after all is done
    subprocess.run(command(sd, prompts, out, processes=2), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert read_folder(out) == read_folder(pairs)


@pytest.mark.slow
def test_killed_after_each_file_appears_it_goes_on_to_the_same_store(sd, prompts, pairs, tmp_path):
    out, environment = str(tmp_path / "store"), os.environ | {"OMP_NUM_THREADS": "1"}
    for file in ("meta.json", "shard-00001.safetensors"):
        process = subprocess.Popen(command(sd, prompts, out), env=environment, stderr=subprocess.DEVNULL)
        while not os.path.exists(os.path.join(out, file)) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(sd, prompts, out), env=environment, check=True, capture_output=True)
    assert read_folder(out) == read_folder(pairs)


def copy_of(pairs, tmp_path):
    return shutil.copytree(pairs, tmp_path / "copy")


def test_a_damaged_or_missing_shard_is_noticed_and_made_again_when_deleted(sd, prompts, pairs, tmp_path):
    folder = copy_of(pairs, tmp_path)
    shard = folder / "shard-00001.safetensors"
    again = ["--model", sd, "--prompts", prompts, "--out", str(folder), *STEPS]
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    for damage in (bytes(data), data[:500], b""):
        shard.write_bytes(damage)
        assert PairStore(folder)[0][0]["id"] == "p0"
        with pytest.raises(SystemExit, match="shard-00001.safetensors is missing or damaged: delete it"):
            PairStore(folder)[3]
        with pytest.raises(SystemExit, match="shard-00001.safetensors is missing or damaged"):
            build_pairs.main(again)
    shard.unlink()
    with pytest.raises(SystemExit, match="missing or damaged"):
        PairStore(folder)[3]
    build_pairs.main(again)
    assert read_folder(folder) == read_folder(pairs)


def test_a_changed_table_or_meta_is_noticed(sd, prompts, pairs, tmp_path):
    folder = copy_of(pairs, tmp_path)
    table = (folder / "pairs.jsonl").read_text()
    for change in (table.replace("fox", "wolf"), table[:300], ""):
        (folder / "pairs.jsonl").write_text(change)
        with pytest.raises(SystemExit, match="pairs.jsonl is missing or was changed"):
            PairStore(folder)
    (folder / "pairs.jsonl").unlink()
    with pytest.raises(SystemExit, match="pairs.jsonl is missing or was changed"):
        PairStore(folder)
    for change in ("", "{", "[1]"):
        (folder / "meta.json").write_text(change)
        with pytest.raises(SystemExit, match="meta.json cannot be read"):
            build_pairs.main(["--model", sd, "--prompts", prompts, "--out", str(folder), *STEPS])


def test_a_folder_with_other_files_is_not_made_a_store(sd, prompts, pairs, tmp_path):
    folder = copy_of(pairs, tmp_path)
    (folder / "meta.json").unlink()  # its shards could be of any settings
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text(open(prompts).read())  # a user's own file of that name
    for out, given in ((folder, prompts), (tmp_path / "data", tmp_path / "data" / "pairs.jsonl")):
        before = read_folder(out)
        with pytest.raises(SystemExit, match="holds other files and no meta.json"):
            build_pairs.main(["--model", sd, "--prompts", str(given), "--out", str(out), *STEPS])
        assert read_folder(out) == before


def test_a_second_writer_is_refused(sd, prompts, tmp_path):
    holder = "import perturb, sys, time\nwith perturb.locked(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "store")], stdout=subprocess.PIPE,
                               cwd=os.path.dirname(os.path.abspath(build_pairs.__file__)))
    assert process.stdout.readline() == b"held\n"
    try:
        with pytest.raises(SystemExit, match="another process is writing into .*store"):
            build_pairs.main(["--model", sd, "--prompts", prompts, "--out", str(tmp_path / "store"), *STEPS])
    finally:
        process.kill()
        process.wait()
    build_pairs.main(["--model", sd, "--prompts", prompts, "--out", str(tmp_path / "store"), *STEPS])  # the lock is gone with it
    assert len(PairStore(tmp_path / "store")) == 10


@pytest.mark.parametrize("flags, message", [
    (["--guidance", "3"], "guidance 7.5, not 3.0"), (["--steps", "4"], "steps 2, not 4"), (["--seed", "1"], "seed 0, not 1"),
    (["--shard-size", "5"], "shard_size 3, not 5"),
])
def test_a_store_is_not_continued_with_other_settings(flags, message, sd, prompts, pairs):
    with pytest.raises(SystemExit, match=message):
        build_pairs.main(["--model", sd, "--prompts", prompts, "--out", pairs, *STEPS, *flags])


def test_a_store_is_not_continued_with_other_prompts(sd, prompts, pairs, tmp_path):
    (tmp_path / "other.jsonl").write_text(open(prompts).read().replace("fox", "wolf"))
    with pytest.raises(SystemExit, match="other prompts than .*other.jsonl has"):
        build_pairs.main(["--model", sd, "--prompts", str(tmp_path / "other.jsonl"), "--out", pairs, *STEPS])


def test_latents_that_are_not_finite_are_not_stored(sd, prompts, tmp_path, monkeypatch):
    real = models.StableDiffusion.sample

    def sample(self, c, *rest):
        x_0 = real(self, c, *rest)
        x_0[len(c) // 2 + 1, 0, 0, 0] = float("nan")  # the second loser
        return x_0

    monkeypatch.setattr(models.StableDiffusion, "sample", sample)
    with pytest.raises(SystemExit, match=r"the pairs \['p1'\] are not finite"):
        build_pairs.main(["--model", sd, "--prompts", prompts, "--out", str(tmp_path / "store"), *STEPS])
    assert not os.path.exists(tmp_path / "store" / "shard-00000.safetensors")


@pytest.mark.parametrize("line, message", [
    ('{"id": "x", "c": "same", "c_minus": "same"}', "bad.jsonl:1: c is empty, or c_minus is the same"),
    ('{"id": "x", "c": "", "c_minus": "b"}', "bad.jsonl:1: c is empty"),
    ('{"c": "no c_minus"}', "bad.jsonl:1: not a JSON object with texts c, c_minus"), ("", "has no prompts"),
])
def test_bad_prompts_are_named(line, message, sd, tmp_path):
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit, match=message):
        build_pairs.main(["--model", sd, "--prompts", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "store")])
    assert not os.path.exists(tmp_path / "store")


@pytest.mark.parametrize("flags, message", [
    (["--prompts", "none.jsonl"], "no file none.jsonl: make it with  python perturb.py"),
    (["--prompts", __file__], "must be the .jsonl file"), (["--batch-size", "0"], "--batch-size must be 1 or more, not 0"),
    (["--seed", "-1"], "--seed must be 0 or more"), (["--out", __file__], "cannot write into .*File exists"), (["--guidance", "nan"], "--guidance must be 0 or more, not nan"),
])
def test_mistakes_end_in_one_sentence(flags, message, sd, prompts):
    with pytest.raises(SystemExit, match=message):
        build_pairs.main(["--model", sd, *(["--prompts", prompts] if "--out" in flags else []), *flags])
