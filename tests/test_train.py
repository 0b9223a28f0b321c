"""train.py: the step against the equations written out, and one result whatever happens on the way."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import read_folder
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import build_pairs
import models
import train
from build_pairs import PairStore

FLAGS = ["--batch-size", "4", "--warmup", "2", "--lr", "1e-4", "--beta", "500", "--save-every", "2"]


def run(sd, pairs, out, *flags, objective="ddspo"):
    train.main(["--model", sd, "--pairs", pairs, "--out", str(out), "--objective", objective, *FLAGS, *map(str, flags)])
    return load_file(os.path.join(out, "pipeline", "unet", "diffusion_pytorch_model.safetensors"))


def same(a, b, atol=0.0, outliers=0):
    """Whether all weights but `outliers` agree to atol. Adam divides a gradient by its own size, so a weight whose
    gradient is but rounding noise may move by up to the learning rate when micro-batches are cut differently."""
    return sum(((a[name] - b[name]).abs() > atol).sum().item() for name in a) <= outliers


def read_log(out):
    return [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]


@pytest.fixture(scope="module")
def straight(sd, pairs, tmp_path_factory):
    """Six updates in one go: the run's folder and its weights."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    return out, run(sd, pairs, out, "--updates", 6)


# ---- the step


@pytest.fixture(scope="module")
def batch(sd):
    """A model, a slightly different student, and two pairs with all that the step needs."""
    model = models.load(sd)
    torch.manual_seed(0)
    net = copy.deepcopy(model.net)
    for p in net.parameters():
        p.data += 0.05 * p.data.std() * torch.randn_like(p) if p.numel() > 1 else 0
    x_0_w, x_0_l, eps = torch.randn(3, 2, 4, 8, 8)
    c, c_minus = model.encode(["a red fox", "a blue cup"]), model.encode(["a fox", "a cup"])
    return model, net, model.net, x_0_w, x_0_l, c, c_minus, torch.tensor([100, 800]), eps


@pytest.mark.parametrize("objective", ["ddspo", "diffusion-dpo"])
def test_the_step_is_the_equation_written_out(batch, objective):
    model, net, ref, x_0_w, x_0_l, c, c_minus, t, eps = batch
    loss, info = train.step_loss(*batch, objective, 300.0)
    for i in range(2):
        abar = model.pipe.scheduler.alphas_cumprod[t[i]]
        x_t_w, x_t_l = (abar.sqrt() * x[i:i + 1] + (1 - abar).sqrt() * eps[i:i + 1] for x in (x_0_w, x_0_l))

        def prediction(network, x_t, prompt, i=i):
            with torch.no_grad():
                return network(x_t, t[i], prompt[i:i + 1]).sample

        def d(a, b):
            return ((a - b) ** 2).mean().item()

        theta_w, theta_l = prediction(net, x_t_w, c), prediction(net, x_t_l, c)
        ref_w, ref_l = prediction(ref, x_t_w, c), prediction(ref, x_t_l, c)
        target_w, target_l = eps[i:i + 1], eps[i:i + 1]
        if objective == "ddspo":
            target_w, target_l = ref_w, prediction(ref, x_t_l, c_minus)
        winner = d(target_w, theta_w) - d(target_w, ref_w)
        loser = d(target_l, theta_l) - d(target_l, ref_l)
        logit = -150 * (winner - loser)
        assert loss[i].item() == pytest.approx(math.log1p(math.exp(-logit)), rel=1e-4)
        assert info["winner"][i].item() == pytest.approx(winner, rel=1e-3, abs=1e-7)
        assert info["loser"][i].item() == pytest.approx(loser, rel=1e-3, abs=1e-7)
        assert info["accuracy"][i].item() == (logit > 0)
        assert info["drift"][i].item() == pytest.approx((d(theta_w, ref_w) + d(theta_l, ref_l)) / 2, rel=1e-4)
    assert set(info) == {"loss", "logit", "winner", "loser", "accuracy", "drift"}
    assert loss.requires_grad and not any(x.requires_grad for x in info.values())


@pytest.mark.parametrize("objective, passes", [("ddspo", 3), ("diffusion-dpo", 2)])
def test_the_reference_runs_three_times_a_pair_and_without_gradients(batch, objective, passes):
    seen = []

    def count(module, inputs):
        seen.append((len(inputs[0]), torch.is_grad_enabled()))

    ref = copy.deepcopy(batch[2])
    ref.register_forward_pre_hook(count)
    train.step_loss(*batch[:2], ref, *batch[3:], objective, 300.0)
    assert sum(n for n, _ in seen) == 2 * passes and not any(grad for _, grad in seen)


def test_the_order_shows_every_pair_once_an_epoch_and_differs_between_epochs_and_seeds():
    run_of_5 = [slot for update in range(6) for slot in train.slots(10, 0, update, 5)]
    epochs = [[pair for epoch, pair in run_of_5 if epoch == e] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    assert run_of_5 == [slot for update in range(3) for slot in train.slots(10, 0, update, 10)]  # nor of the batch size
    assert run_of_5[:5] != train.slots(10, 1, 0, 5)


class Uniform(models.StableDiffusion):
    """As much of a model as `example` needs."""

    num_train_timesteps = 1000
    latent_shape = (4, 8, 8)

    def __init__(self):
        pass


def test_t_and_noise_are_a_function_of_seed_epoch_and_pair(pairs):
    store, model = PairStore(pairs), Uniform()
    _, _, _, _, t, eps = train.example(store, model, 0, 1, 2)
    again = train.example(store, model, 0, 1, 2)[4:]
    assert t == again[0] and (eps == again[1]).all() and eps.dtype == torch.float32
    others = [train.example(store, model, *key)[4:] for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3))]
    assert all(abs((eps * other).mean()) < 0.25 for _, other in others)
    assert len({t, *[other for other, _ in others]}) > 2
    all_eps = torch.stack([train.example(store, model, 0, epoch, pair)[5] for epoch in range(30) for pair in range(10)])
    assert abs(all_eps.mean()) < 0.03 and abs(all_eps.std() - 1) < 0.03


@pytest.mark.parametrize("negatives", ["rand-positive", "not-paired"])
def test_other_negatives_are_another_prompts_winner(negatives, pairs):
    store, model, others = PairStore(pairs), Uniform(), []
    for epoch in range(40):
        row, winner, _ = store[3]
        c, c_minus, x_0_w, x_0_l, t, eps = train.example(store, model, 0, epoch, 3, negatives)
        assert c == row["c"] and (x_0_w == winner).all()
        other, = [i for i in range(10) if (store[i][1] == x_0_l).all()]
        assert c_minus == (store.rows[other]["c"] if negatives == "rand-positive" else row["c_minus"])
        generated = train.example(store, model, 0, epoch, 3)
        assert t == generated[4] and (eps == generated[5]).all() and (generated[3] == store[3][2]).all()
        others.append(other)
    assert set(others) == set(range(10)) - {3}


def test_the_variants_of_the_negatives_differ(sd, pairs, straight, tmp_path):
    results = [run(sd, pairs, tmp_path / name, "--updates", 6, "--negatives", name) for name in ("rand-positive", "not-paired")]
    assert not same(*results, atol=1e-5) and not any(same(r, straight[1], atol=1e-5) for r in results)


def test_one_update_is_adamw_on_the_mean_loss_of_its_pairs(sd, pairs, tmp_path):
    weights = run(sd, pairs, tmp_path, "--updates", 1, "--micro-batch", 3)
    model, store = models.load(sd), PairStore(pairs)
    net = copy.deepcopy(model.net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.5e-4, weight_decay=1e-2)  # half of --lr: the first of two of warm-up
    losses = []
    for epoch, pair in train.slots(10, 0, 0, 4):
        c, c_minus, x_0_w, x_0_l, t, eps = train.example(store, model, 0, epoch, pair)
        row = store.rows[pair]
        assert (c, c_minus) == (row["c"], row["c_minus"]) and (x_0_l == store[pair][2]).all()
        losses.append(train.step_loss(model, net, model.net, x_0_w[None], x_0_l[None], model.encode([c]),
                                      model.encode([c_minus]), torch.tensor([t]), eps[None], "ddspo", 500.0)[0])
    torch.cat(losses).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    expected = net.state_dict()
    assert same(weights, expected, atol=1e-6, outliers=20)  # of 203,204
    assert not same(weights, model.net.state_dict(), atol=2e-5, outliers=100_000)
    row, = read_log(tmp_path)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and row["lr"] == 0.5e-4 and row["update"] == 1


# ---- the log


def test_training_starts_at_log_2_exactly_and_then_lowers_the_loss(straight):
    log = read_log(straight[0])
    assert [row["update"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert [row["lr"] for row in log] == [0.5e-4, *[1e-4] * 5]  # two updates of warm-up
    first = log[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and first["logit"] == 0 and first["accuracy"] == 0.5
    assert first["winner"] == first["loser"] == first["drift"] == 0
    assert log[-1]["loss"] < 0.69 and log[-1]["accuracy"] == 1 and log[-1]["loser"] > 0 and log[-1]["drift"] > 0


def test_bands_of_time_steps_average_to_the_whole(straight, pairs):
    store = PairStore(pairs)
    for update, row in enumerate(read_log(straight[0])):
        ts = [train.example(store, Uniform(), 0, *slot)[4] for slot in train.slots(10, 0, update, 4)]
        assert row["pairs_by_t"] == np.bincount(np.array(ts) // 100, minlength=10).tolist()
        for name in ("loss", "logit", "winner", "drift"):
            total = sum(v * n for v, n in zip(row[name + "_by_t"], row["pairs_by_t"]) if n)
            assert total / 4 == pytest.approx(row[name], rel=1e-5, abs=1e-12)
            assert all((v is None) == (n == 0) for v, n in zip(row[name + "_by_t"], row["pairs_by_t"]))


# ---- one result whatever happens on the way


@pytest.mark.parametrize("objective", ["ddspo", "diffusion-dpo"])
def test_three_updates_a_stop_and_three_more_are_six_bit_for_bit(objective, sd, pairs, straight, tmp_path):
    expected = straight[1] if objective == "ddspo" else run(sd, pairs, tmp_path / "a", "--updates", 6, objective=objective)
    half = run(sd, pairs, tmp_path / "b", "--updates", 3, objective=objective)
    assert not same(half, expected, atol=1e-5)
    assert same(run(sd, pairs, tmp_path / "b", "--updates", 6, objective=objective), expected)
    assert read_log(tmp_path / "b") == read_log(straight[0] if objective == "ddspo" else tmp_path / "a")


def test_the_two_objectives_differ(sd, pairs, straight, tmp_path):
    assert not same(run(sd, pairs, tmp_path, "--updates", 6, objective="diffusion-dpo"), straight[1], atol=1e-5)


def test_a_finished_run_is_left_alone(sd, pairs, straight, capsys):
    before = read_folder(straight[0])
    times = {name: os.stat(os.path.join(straight[0], name)).st_mtime_ns for name in before}
    run(sd, pairs, straight[0], "--updates", 6)
    assert "finished after 6 updates; nothing was done" in capsys.readouterr().out
    assert {name: os.stat(os.path.join(straight[0], name)).st_mtime_ns for name in before} == times


def test_the_newest_readable_checkpoint_is_taken(sd, pairs, straight, tmp_path, capsys):
    shutil.copytree(straight[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pipeline")
    assert sorted(f for f in os.listdir(tmp_path / "run") if f.endswith("pt")) == ["checkpoint-000004.pt", "checkpoint-000006.pt"]
    whole = (tmp_path / "run" / "checkpoint-000006.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damage in (whole[:100_000], whole[:100], b"", b"junk", bytes(flipped)):
        (tmp_path / "run" / "checkpoint-000006.pt").write_bytes(damage)
        assert same(run(sd, pairs, tmp_path / "run", "--updates", 6), straight[1])
        captured = capsys.readouterr()
        assert "checkpoint-000006.pt is damaged" in captured.err and "from update 4" in captured.out
        assert read_log(tmp_path / "run") == read_log(straight[0])
        shutil.rmtree(tmp_path / "run" / "pipeline")


def test_a_result_without_its_checkpoint_is_not_replaced(sd, pairs, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    for name in ("checkpoint-000004.pt", "checkpoint-000006.pt"):
        os.remove(tmp_path / "run" / name)
    before = read_folder(tmp_path / "run")
    with pytest.raises(SystemExit, match="would be replaced. Give another --out"):
        run(sd, pairs, tmp_path / "run", "--updates", 7)
    assert read_folder(tmp_path / "run") == before


def test_the_log_is_cut_to_the_checkpoint_whatever_became_of_it(tmp_path):
    args = type("args", (), dict(out=str(tmp_path)))
    rows = [json.dumps(dict(update=u)) + "\n" for u in (3, 4, 5, 6)]
    (tmp_path / "log.jsonl").write_text("".join(rows) + '{"upda')
    train.open_log(args, 5).close()
    assert (tmp_path / "log.jsonl").read_text() == "".join(rows[:3])
    train.open_log(args, 0).close()
    assert (tmp_path / "log.jsonl").read_text() == ""


def command(sd, pairs, out, *flags, processes=1):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*(start if processes > 1 else [sys.executable]), os.path.abspath(train.__file__), "--model", sd, "--pairs", pairs,
            "--out", str(out), *FLAGS, *flags]


@pytest.mark.slow
def test_two_processes_are_one_with_accumulation(sd, pairs, straight, tmp_path):
    subprocess.run(command(sd, pairs, tmp_path, "--updates", "6", processes=2), capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    weights = load_file(tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert same(weights, straight[1], atol=1e-6)  # the sums are taken in another order
    for one, two in zip(read_log(straight[0]), read_log(tmp_path)):
        assert one["pairs_by_t"] == two["pairs_by_t"] and one["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_result(sd, pairs, straight, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for file in ("log.jsonl", "checkpoint-000002.pt.partial", "checkpoint-000004.pt", "pipeline.partial"):
        process = subprocess.Popen(command(sd, pairs, tmp_path, "--updates", "6"), env=environment, stderr=subprocess.DEVNULL)
        while not os.path.exists(tmp_path / file) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(sd, pairs, tmp_path, "--updates", "6"), env=environment, check=True, capture_output=True)
    assert same(load_file(tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"), straight[1])
    assert read_log(tmp_path) == read_log(straight[0])


# ---- the result


def test_the_result_is_a_pipeline_in_one_precision_that_generates(sd, straight):
    pipe = StableDiffusionPipeline.from_pretrained(straight[0] / "pipeline")
    assert pipe.safety_checker is None
    parts = [pipe.unet, pipe.vae, pipe.text_encoder]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    ref = StableDiffusionPipeline.from_pretrained(sd)
    assert same(pipe.vae.state_dict(), ref.vae.state_dict())
    assert same(pipe.text_encoder.state_dict(), ref.text_encoder.state_dict())
    images = []
    for p in (pipe, ref):
        p.set_progress_bar_config(disable=True)
        images.append(p("a red fox", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images)
    assert images[0].shape == (1, 64, 64, 3) and (images[0] != images[1]).any()


# ---- mistakes


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_pairs(sd, pairs, tmp_path, monkeypatch):
    real, calls = train.step_loss, []

    def step_loss(*arguments):
        loss, info = real(*arguments)
        calls.append(1)
        if len(calls) == 14:  # the second pair of the fourth update
            loss, info["loss"] = loss * math.nan, info["loss"] * math.nan
        return loss, info

    monkeypatch.setattr(train, "step_loss", step_loss)
    _, pair = train.slots(10, 0, 3, 4)[1]
    with pytest.raises(SystemExit, match=rf"update 4: the loss of the pairs \['p{pair}'\] is not finite"):
        run(sd, pairs, tmp_path, "--updates", 6)
    assert [row["update"] for row in read_log(tmp_path)] == [1, 2, 3]
    assert [f for f in os.listdir(tmp_path) if f.endswith("pt")] == ["checkpoint-000002.pt"]


@pytest.mark.parametrize("logit", [0.1, -0.1, math.nan])
def test_a_student_that_is_not_the_reference_is_noticed_at_the_start(logit):
    train.check_start(torch.tensor([0.0, 0.04]))
    with pytest.raises(SystemExit, match="before the first update"):
        train.check_start(torch.tensor([0.0, logit]))


def test_the_start_is_checked_in_a_run(sd, pairs, tmp_path, monkeypatch):
    real = copy.deepcopy

    def other(thing):
        thing = real(thing)
        if isinstance(thing, torch.nn.Module):
            thing.conv_out.bias.data += 1
        return thing

    monkeypatch.setattr(train.copy, "deepcopy", other)
    with pytest.raises(SystemExit, match="before the first update"):
        run(sd, pairs, tmp_path, "--updates", 1)


def test_a_missing_store_is_answered_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="torchrun build_pairs.py --model sd14 --prompts perturbed.jsonl --out pairs/sd14"):
        train.main(["--model", "sd14"])


@pytest.mark.parametrize("flags, message", [
    (["--beta", "7"], "begun with beta 500.0, not 7.0"), (["--lr", "1"], "begun with lr 0.0001, not 1.0"),
    (["--seed", "1"], "begun with seed 0, not 1"), (["--batch-size", "8"], "batch_size 4, not 8"),
    (["--objective", "diffusion-dpo"], "objective ddspo, not diffusion-dpo"), (["--updates", "5"], "6 updates, more than"),
])
def test_a_run_is_not_continued_with_other_flags(flags, message, sd, pairs, straight):
    before = read_folder(straight[0])
    with pytest.raises(SystemExit, match=message):
        train.main(["--model", sd, "--pairs", pairs, "--out", str(straight[0]), *FLAGS, "--updates", "6", *flags])
    assert read_folder(straight[0]) == before


def test_a_run_is_not_continued_with_other_pairs(sd, pairs, straight, tmp_path):
    shutil.copytree(pairs, tmp_path / "store")
    meta = json.loads((tmp_path / "store" / "meta.json").read_text())
    table = tmp_path / "store" / "pairs.jsonl"
    for changed in ("checksums", "table"):
        if changed == "checksums":
            change = dict(checksums=["other"])
        else:
            table.write_text(table.read_text().replace("fox", "wolf"))
            change = dict(table=build_pairs.checksum(table))
        (tmp_path / "store" / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(SystemExit, match="begun with store"):
            run(sd, str(tmp_path / "store"), straight[0], "--updates", 6)


def test_latents_of_another_size_are_refused(sd, pairs, tmp_path):
    shutil.copytree(pairs, tmp_path / "store")
    meta = json.loads((tmp_path / "store" / "meta.json").read_text())
    (tmp_path / "store" / "meta.json").write_text(json.dumps(meta | dict(latents=[4, 64, 64])))
    with pytest.raises(SystemExit, match=r"holds latents \[4, 64, 64\], but .* needs \[4, 8, 8\]"):
        run(sd, str(tmp_path / "store"), tmp_path / "run", "--updates", 1)


def test_negatives_need_ddspo_and_a_second_prompt(sd, prompts, tmp_path):
    with pytest.raises(SystemExit, match="--negatives not-paired is a variant of DDSPO"):
        train.parse(["--model", "sd14", "--objective", "diffusion-dpo", "--negatives", "not-paired"])
    (tmp_path / "one.jsonl").write_text(open(prompts).readline())
    build_pairs.main(["--model", sd, "--prompts", str(tmp_path / "one.jsonl"), "--out", str(tmp_path / "store"), "--steps", "1"])
    with pytest.raises(SystemExit, match="has only one prompt"):
        run(sd, str(tmp_path / "store"), tmp_path / "run", "--negatives", "rand-positive")


@pytest.mark.parametrize("flags, message", [
    (["--beta", "0"], "--beta must be more than 0, not 0.0"), (["--lr", "nan"], "--lr must be more than 0, not nan"),
    (["--batch-size", "0"], "--batch-size must be 1 or more"), (["--warmup", "-1"], "--warmup must be 0 or more"),
    (["--beta", "inf"], "--beta must be more than 0, not inf"),
])
def test_flags_out_of_range_are_named(flags, message):
    with pytest.raises(SystemExit, match=message):
        train.parse(["--model", "sd14", *flags])


def test_the_short_command_is_the_papers_experiment():
    args = train.parse(["--model", "sd14"])
    assert (args.objective, args.beta, args.batch_size, args.lr, args.updates) == ("ddspo", 16000, 2048, 5.12e-6, 100)
    assert (args.pairs, args.out) == ("pairs/sd14", "runs/sd14-ddspo")
    args = train.parse(["--model", "shapes"])
    assert (args.beta, args.lr, args.pairs, args.out) == (1000, 3e-5, "runs/shapes-0/pairs", "runs/shapes-ddspo")
    assert train.parse(["--model", "sd14", "--negatives", "not-paired"]).out == "runs/sd14-not-paired"
    args = train.parse(["--model", "some/folder/", "--objective", "diffusion-dpo", "--lr", "3e-6", "--warmup", "0"])
    assert (args.beta, args.lr, args.warmup, args.out) == (8000, 3e-6, 0, "runs/folder-diffusion-dpo")
