"""train.py: the step against the equations written out, and one result whatever happens on the way."""

import argparse
import ast
import copy
import functools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import types

import launch
import numpy as np
import pytest
import torch
import tqdm
from conftest import read_folder
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import build_pairs
import train
from lib import models, plots, runs
from lib.files import UserError, checksum
from lib.pairs import PairStore
from lib.settings import EXPERIMENTS, find_row

FLAGS = ["--batch-size", "4", "--warmup", "2", "--lr", "1e-4", "--beta", "500", "--save-every", "2"]


def run(sd, pairs, out, *flags, objective="ddspo"):
    flags = ["--warmup", 0, *flags] if "--updates" in flags and str(flags[flags.index("--updates") + 1]) == "1" else flags
    train.main(["--model", sd, "--pairs", pairs, "--out", str(out), "--objective", objective, *FLAGS, *map(str, flags)])
    adapter = os.path.join(out, "lora", "pytorch_lora_weights.safetensors")
    return load_file(adapter if os.path.exists(adapter) else
                     os.path.join(out, "pipeline", "unet", "diffusion_pytorch_model.safetensors"))


def same(a, b, atol=0.0, outliers=0):
    """Whether all weights but `outliers` agree to atol. Adam divides a gradient by its own size, so a weight whose
    gradient is but rounding noise may move by up to the learning rate when micro-batches are cut differently."""
    return sum(((a[name] - b[name]).abs() > atol).sum().item() for name in a) <= outliers


def read_log(out):
    """The log's rows without what differs from run to run, and without the row of the noise floor."""
    rows = [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]
    return [{k: v for k, v in row.items() if k not in ("pairs_per_second", "memory_gb")} for row in rows if row["update"]]


@pytest.fixture(scope="module")
def straight(sd, pairs, tmp_path_factory):
    """Six updates in one go: the run's folder and its weights."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    return out, run(sd, pairs, out, "--updates", 6)


# ---- the step


def other_network(net, seed):
    """A slightly different one."""
    torch.manual_seed(seed)
    net = copy.deepcopy(net)
    for p in net.parameters():
        p.data += 0.05 * p.data.std() * torch.randn_like(p) if p.numel() > 1 else 0
    return net


@pytest.fixture(scope="module")
def batch(sd):
    """A model, a slightly different student, and two pairs with all that the step needs."""
    model = models.load(sd)
    net = other_network(model.net, 0)
    x_0_w, x_0_l, eps = torch.randn(3, 2, 4, 8, 8)
    c, c_minus = model.encode(["a red fox", "a blue cup"]), model.encode(["a fox", "a cup"])
    return model, dict(theta=net, ref=model.net), c, c_minus, x_0_w, x_0_l, torch.tensor([100, 800]), eps


@pytest.mark.parametrize("objective", ["ddspo", "diffusion-dpo", "policies", "dspo", "dspo policies"])
def test_the_step_is_the_equation_written_out(batch, objective):
    model, policies, c, c_minus, x_0_w, x_0_l, t, eps = batch
    if "policies" in objective:
        policies = policies | {name: other_network(policies["ref"], seed) for seed, name in enumerate(("winner", "loser"), 1)}
    kind = objective.split()[0].replace("policies", "ddspo")
    beta = 300.0 if kind != "dspo" else 30.0
    loss, info = train.step_loss(model, policies, *batch[2:], kind, beta)
    for i in range(2):
        abar = model.pipe.scheduler.alphas_cumprod[t[i]]
        x_t_w, x_t_l = (abar.sqrt() * x[i:i + 1] + (1 - abar).sqrt() * eps[i:i + 1] for x in (x_0_w, x_0_l))

        def prediction(policy, x_t, prompt, i=i):
            with torch.no_grad():
                return policies[policy](x_t, t[i], prompt["prompt_embeds"][i:i + 1]).sample

        def d(a, b):
            return ((a - b) ** 2).mean().item()

        theta_w, theta_l = prediction("theta", x_t_w, c), prediction("theta", x_t_l, c)
        ref_w, ref_l = prediction("ref", x_t_w, c), prediction("ref", x_t_l, c)
        target_w, target_l = eps[i:i + 1], eps[i:i + 1]
        if objective == "ddspo":
            target_w, target_l = ref_w, prediction("ref", x_t_l, c_minus)
        elif "policies" in objective:
            target_w, target_l = prediction("winner", x_t_w, c), prediction("loser", x_t_l, c)
        winner = d(target_w, theta_w) - d(target_w, ref_w)
        loser = d(target_l, theta_l) - d(target_l, ref_l)
        logit = -beta / 2 * (winner - loser)
        expected = math.log1p(math.exp(-logit))
        if kind == "dspo":
            weight = beta * (1 - 1 / (1 + math.exp(-logit)))
            expected = ((theta_w - target_w - weight * (theta_w - ref_w)) ** 2).mean().item()
        assert loss[i].item() == pytest.approx(expected, rel=1e-4)
        assert info["winner"][i].item() == pytest.approx(winner, rel=1e-3, abs=1e-7)
        assert info["loser"][i].item() == pytest.approx(loser, rel=1e-3, abs=1e-7)
        assert info["accuracy"][i].item() == (logit > 0)
        assert info["drift"][i].item() == pytest.approx((d(theta_w, ref_w) + d(theta_l, ref_l)) / 2, rel=1e-4)
    assert set(info) == {"loss", "logit", "winner", "loser", "accuracy", "drift"}
    assert loss.requires_grad and not any(x.requires_grad for x in info.values())


@pytest.mark.parametrize("side", ["w", "l"])
def test_sft_is_the_diffusion_loss_on_one_side(batch, side):
    model, policies, c, _, x_0_w, x_0_l, t, eps = batch
    loss, info = train.step_loss(*batch, "sft", None, side)
    scheduler = DDPMScheduler.from_config(model.pipe.scheduler.config)
    x_t = scheduler.add_noise(x_0_w if side == "w" else x_0_l, eps, t)
    expected = (policies["theta"](x_t, t, c["prompt_embeds"]).sample - eps).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert loss.requires_grad and set(info) == {"loss"}


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_distill_is_the_distance_to_the_guided_reference_on_both_sides(batch, scale):
    model, policies, c, c_minus, x_0_w, x_0_l, t, eps = batch
    loss, info = train.step_loss(*batch, "distill", None, scale=scale)
    scheduler, sides = DDPMScheduler.from_config(model.pipe.scheduler.config), []
    for x_0 in (x_0_w, x_0_l):
        x_t = scheduler.add_noise(x_0, eps, t)
        with torch.no_grad():
            ref, ref_minus = (policies["ref"](x_t, t, prompt["prompt_embeds"]).sample for prompt in (c, c_minus))
        guided = ref + (scale - 1) * (ref - ref_minus)
        sides.append((policies["theta"](x_t, t, c["prompt_embeds"]).sample - guided).square().mean((1, 2, 3)))
    torch.testing.assert_close(loss, (sides[0] + sides[1]) / 2, rtol=1e-4, atol=1e-6)
    assert loss.requires_grad and set(info) == {"loss"}


def test_distill_begins_where_scale_1_has_nothing_to_learn(sd, pairs, tmp_path):
    first = {}
    for scale in (1, 3):
        out = tmp_path / str(scale)
        train.main(["--model", sd, "--pairs", pairs, "--out", str(out), "--objective", "distill", "--scale", str(scale), "--lr", "1e-4",
                    "--updates", "4", "--batch-size", "4"])
        log = read_log(out)
        first[scale] = log[0]["loss"]
        assert "logit" not in log[0] and (scale == 1 or log[-1]["loss"] < 0.9 * max(row["loss"] for row in log[:2]))
    assert first[1] < 1e-15 and first[3] > 1e-3  # rounding, and what is to be learned


def test_the_weight_of_a_time_step_multiplies_beta(batch, monkeypatch):
    plain, four_times = (train.step_loss(*batch, "ddspo", beta)[1]["logit"] for beta in (300.0, 1200.0))
    monkeypatch.setattr(batch[0], "weight", lambda t: torch.tensor([4.0, 1.0]))
    logit = train.step_loss(*batch, "ddspo", 300.0)[1]["logit"]
    torch.testing.assert_close(logit, torch.stack([four_times[0], plain[1]]))


@pytest.mark.parametrize("objective, passes", [("ddspo", 3), ("diffusion-dpo", 2)])
def test_the_reference_runs_three_times_a_pair_and_without_gradients(batch, objective, passes):
    seen = []

    def count(module, inputs):
        seen.append((len(inputs[0]), torch.is_grad_enabled()))

    model, policies, *rest = batch
    ref = copy.deepcopy(policies["ref"])
    ref.register_forward_pre_hook(count)
    train.step_loss(model, policies | dict(ref=ref), *rest, objective, 300.0)
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


def test_variants_without_made_losers_need_winners_only(sd, prompts, pairs, tmp_path):
    build_pairs.main(["--model", sd, "--prompts", prompts, "--out", str(tmp_path / "winners"), "--steps", "2", "--negatives", "none"])
    for name in ("rand-positive", "not-paired"):
        expected = run(sd, pairs, tmp_path / name, "--updates", 2, "--negatives", name)
        weights = run(sd, str(tmp_path / "winners"), tmp_path / f"{name}-2", "--updates", 2, "--negatives", name)
        assert same(weights, expected, atol=2e-5, outliers=1000)  # latents were made in batches of another size
    with pytest.raises(SystemExit, match="holds winners only: take Eq. 7 with --negatives rand-positive or not-paired"):
        run(sd, str(tmp_path / "winners"), tmp_path / "generated", "--updates", 2)


def test_the_variants_of_the_negatives_differ(sd, pairs, straight, tmp_path):
    results = [run(sd, pairs, tmp_path / name, "--updates", 6, "--negatives", name) for name in ("rand-positive", "not-paired")]
    assert not same(*results, atol=1e-5) and not any(same(r, straight[1], atol=1e-5) for r in results)


def test_one_update_is_adamw_on_the_mean_loss_of_its_pairs(sd, pairs, tmp_path):
    run(sd, pairs, tmp_path, "--updates", 2, "--micro-batch", 3, "--save-every", 1)
    weights = torch.load(tmp_path / "checkpoint-000001.pt", weights_only=True)["net"]
    model, store = models.load(sd), PairStore(pairs)
    net = copy.deepcopy(model.net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.5e-4, weight_decay=1e-2)  # half of --lr: the first of two of warm-up
    losses = []
    for epoch, pair in train.slots(10, 0, 0, 4):
        c, c_minus, x_0_w, x_0_l, t, eps = train.example(store, model, 0, epoch, pair)
        row = store.rows[pair]
        assert (c, c_minus) == (row["c"], row["c_minus"]) and (x_0_l == store[pair][2]).all()
        losses.append(train.step_loss(model, dict(theta=net, ref=model.net), model.encode([c]), model.encode([c_minus]),
                                      x_0_w[None], x_0_l[None], torch.tensor([t]), eps[None], "ddspo", 500.0)[0])
    torch.cat(losses).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    expected = net.state_dict()
    assert same(weights, expected, atol=1e-6, outliers=20)  # of 203,204
    assert not same(weights, model.net.state_dict(), atol=2e-5, outliers=100_000)
    row, _ = read_log(tmp_path)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and row["lr"] == 0.5e-4 and row["update"] == 1


# ---- precision


def test_bfloat16_biases_every_logit_and_float16_does_not(batch, sd, monkeypatch):
    model, cpu, beta = models.load(sd), torch.device("cpu"), 16000.0  # the paper's
    torch.manual_seed(0)
    (x_0_w, x_0_l, eps), t = torch.randn(3, 16, 4, 8, 8), torch.randint(0, 1000, (16,))
    c, c_minus = (model.encode([f"a {x} fox {i}" for i in range(16)]) for x in ("red", "dry"))
    net = copy.deepcopy(model.net)  # as after a first update
    for p in net.parameters():
        p.data += 2e-4 * p.data.std() * torch.randn_like(p) if p.numel() > 1 else 0
    winner, floor = {}, {}
    for name in ("fp32", "fp16", "bf16"):
        with train.precision(cpu, name), torch.no_grad():
            _, info = train.step_loss(model, dict(theta=net, ref=model.net), c, c_minus, x_0_w, x_0_l, t, eps, "ddspo", beta)
        winner[name] = -beta / 2 * info["winner"].mean().item()  # the winner's part of the logit
        args = argparse.Namespace(beta=beta, seed=0, micro_batch=16)
        monkeypatch.setattr(train, "micro_batches", lambda *_: iter([(c, None, x_0_w, None, t, eps)]))
        floor[name], size = train.noise_floor(types.SimpleNamespace(
            args=args, precision=name, model=model, policies=dict(ref=model.net), store=range(16), device=cpu))
    bias = {name: winner[name] - winner["fp32"] for name in ("fp16", "bf16")}
    assert bias["bf16"] < -0.1 and abs(bias["fp16"]) < 0.01  # measured: -0.18 and -0.004
    assert floor["fp32"] == 0 and floor["fp16"] < 0.05 < floor["bf16"]  # what a run says at its start
    assert 0.5 < floor["bf16"] / -bias["bf16"] < 3
    with torch.no_grad():
        assert size == pytest.approx(model.net(model.noise(x_0_w, t, eps), t, c["prompt_embeds"]).sample.square().mean().item())


@pytest.mark.parametrize("rank", ["0", "2"])
def test_frozen_weights_kept_in_half_precision_change_nothing_under_autocast(rank, sd):
    model, cpu = models.load(sd), torch.device("cpu")
    args = train.parse(["--model", sd, "--lora-rank", rank])
    policies, networks = train.make_policies(args, model)
    parameters = [p for network in networks for p in network.parameters()]
    frozen, trained = ([p for p in parameters if p.requires_grad == kind] for kind in (False, True))
    c, x, t = model.encode(["a red fox"]), torch.randn(1, 4, 8, 8), torch.tensor([500])
    outputs = []
    for _ in range(2):
        with train.precision(cpu, "fp16"), torch.no_grad():
            outputs += [model.predict(policies[name], x, t, c) for name in ("theta", "ref")]
        train.prepare(types.SimpleNamespace(args=args, precision="fp16", networks=networks))
        for p in frozen:  # as before, for the second time
            p.requires_grad_(False)
    assert outputs[0].dtype == torch.float16 and all((y == outputs[0]).all() for y in outputs)
    assert {p.dtype for p in frozen} == {torch.float16, torch.float32}  # norms stay
    assert {p.dtype for p in trained} == {torch.float32}


def test_an_overflow_is_done_again_with_a_smaller_scale_and_is_no_update(sd, pairs, tmp_path, monkeypatch, capsys):
    expected = run(sd, pairs, tmp_path / "a", "--updates", 3, "--precision", "fp16")
    log = read_log(tmp_path / "a")
    monkeypatch.setattr(train, "FIRST_SCALE", 2.0**30)
    weights = run(sd, pairs, tmp_path / "b", "--updates", 3, "--precision", "fp16")
    skipped = read_log(tmp_path / "b")
    times = capsys.readouterr().err.count("update 1 overflowed and is done again with loss scale ")
    assert log[0]["loss_scale"] == 2.0**5
    assert times >= 5 and skipped[0]["loss_scale"] == 2.0**30 / 2 ** times
    assert [row["update"] for row in skipped] == [1, 2, 3]
    assert all(a[k] == b[k] for a, b in zip(log[:1], skipped) for k in ("pairs_by_t", "lr", "loss", "accuracy"))
    assert [row["pairs_by_t"] for row in skipped] == [row["pairs_by_t"] for row in log]
    assert same(weights, expected, atol=5e-5, outliers=20_000)  # rounding is another at another scale
    monkeypatch.setattr(train, "FIRST_SCALE", 2.0**5)  # a stop keeps the scale
    run(sd, pairs, tmp_path / "b", "--updates", 4, "--precision", "fp16")
    assert read_log(tmp_path / "b")[3]["loss_scale"] == skipped[2]["loss_scale"]


def test_an_overflow_does_not_depend_on_the_micro_batch(sd, pairs, tmp_path, monkeypatch):
    scaled, scale = [], torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda self, loss: scaled.append(loss.item()) or scale(self, loss))
    run(sd, pairs, tmp_path / "a", "--updates", 1, "--precision", "fp16", "--micro-batch", 3)
    assert scaled == pytest.approx([math.log(2), math.log(2) / 3], rel=1e-6)  # three pairs, and one


def test_both_prompts_are_encoded_in_one_pass(family_folders, pairs):
    store, args = PairStore(pairs), argparse.Namespace(seed=0, negatives="generated", objective="ddspo", winner=None, micro_batch=3)
    for family in ("sd", "sdxl", "sana", "sd3"):
        model, passes = models.load(family_folders[family]), []
        encode, rows = model.encode, [store.rows[pair] for pair in (3, 1, 4)]
        model.encode = lambda prompts, encode=encode, passes=passes: passes.append(len(prompts)) or encode(prompts)
        both = next(train.micro_batches(store, model, args, [(0, 3), (0, 1), (0, 4)], torch.device("cpu")))[:2]
        assert passes == [6]
        for ours, key in zip(both, ("c", "c_minus")):
            torch.testing.assert_close(ours, encode([row[key] for row in rows]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sana", "sd3"])
def test_prompts_of_several_micro_batches_are_encoded_in_one_pass(family, family_folders, pairs, monkeypatch):
    monkeypatch.setattr(train, "TEXT_BATCH", 5)
    args = argparse.Namespace(seed=0, negatives="generated", objective="ddspo", winner=None, micro_batch=2)
    store, model, passes = PairStore(pairs), models.load(family_folders[family]), []
    mine, cpu, encode = [(0, k) for k in range(7)], torch.device("cpu"), model.encode
    model.encode = lambda prompts: passes.append(len(prompts)) or encode(prompts)
    found = list(train.micro_batches(store, model, args, mine, cpu))
    assert passes == [8, 6] and [len(x_0_w) for _, _, x_0_w, *_ in found] == [2, 2, 2, 1]
    for k, part in enumerate(found):
        alone = next(train.micro_batches(store, model, args, mine[2 * k:2 * k + 2], cpu))
        torch.testing.assert_close(part, alone, atol=1e-5, rtol=0)
    args.objective = "diffusion-dpo"
    assert all(c_minus is None for _, c_minus, *_ in train.micro_batches(store, model, args, mine, cpu))


def test_the_scale_grows_again(sd, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "GROW_AFTER", 2)
    run(sd, pairs, tmp_path, "--updates", 4, "--precision", "fp16")
    assert [row["loss_scale"] for row in read_log(tmp_path)] == [2.0**5, 2.0**6, 2.0**6, 2.0**7]


@pytest.mark.parametrize("rank", [0, 2])
def test_checkpointing_changes_no_weight(rank, sd, pairs, straight, tmp_path):
    expected = run(sd, pairs, tmp_path / "a", "--updates", 3, "--lora-rank", rank)
    assert same(run(sd, pairs, tmp_path / "b", "--updates", 3, "--lora-rank", rank, "--checkpointing"), expected)


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


DAMAGE = {  # what became of the newest checkpoint
    "truncated": lambda whole, path: path.write_bytes(whole[:100_000]), "its beginning": lambda whole, path: path.write_bytes(whole[:100]),
    "empty": lambda whole, path: path.write_bytes(b""), "junk": lambda whole, path: path.write_bytes(b"junk"),
    "a flipped bit": lambda whole, path: path.write_bytes(whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1:]),
    "a tensor": lambda whole, path: torch.save(torch.zeros(3), path), "a list": lambda whole, path: torch.save([1], path),
    "other weights": lambda whole, path: change_state(path, lambda state: state["net"]),
    "a weight less": lambda whole, path: change_state(path, lambda state: state | dict(net=without(state["net"], "conv_in.bias"))),
    "an optimizer's state less": lambda whole, path: change_state(path, lambda state: state | dict(optimizer=without(state["optimizer"], "conv_in.bias"))),
    "an identity that is no dict": lambda whole, path: change_state(path, lambda state: state | dict(identity="x")),
    "another number": lambda whole, path: change_state(path, lambda state: state | dict(update=5)),
    "a number that is none": lambda whole, path: change_state(path, lambda state: state | dict(update="6")),
}


def without(tensors, name):
    return {key: x for key, x in tensors.items() if key != name}


def change_state(path, change):
    torch.save(change(torch.load(path, weights_only=True)), path)


@pytest.mark.parametrize("what", DAMAGE)
def test_a_checkpoint_that_cannot_be_read_is_named_and_without_it_the_one_before_is_taken(what, sd, pairs, straight, tmp_path, capsys):
    out = shutil.copytree(straight[0], tmp_path / "run")
    assert sorted(f for f in os.listdir(out) if f.endswith("pt")) == ["checkpoint-000004.pt", "checkpoint-000006.pt"]
    path = out / "checkpoint-000006.pt"
    DAMAGE[what](path.read_bytes(), path)
    before = read_folder(out)
    with pytest.raises(SystemExit, match=f"^{path} cannot be read as a checkpoint: delete it to go on from the one before.$"):
        run(sd, pairs, out, "--updates", 6)
    assert read_folder(out) == before
    if what in ("truncated", "a tensor"):
        os.remove(path)
        assert same(run(sd, pairs, out, "--updates", 6), straight[1])
        assert "from update 4" in capsys.readouterr().out and read_log(out) == read_log(straight[0])


@pytest.mark.parametrize("first, second, said", [(0, 2, "begun with lora_rank 0, not 2"), (2, 0, "begun with lora_rank 2, not 0")])
def test_another_run_is_told_from_a_damaged_one(first, second, said, sd, pairs, tmp_path):
    run(sd, pairs, tmp_path, "--updates", 4, "--lora-rank", first)
    before = read_folder(tmp_path)
    with pytest.raises(SystemExit, match=said):
        run(sd, pairs, tmp_path, "--updates", 6, "--lora-rank", second)
    assert read_folder(tmp_path) == before


def test_only_a_runs_own_earlier_checkpoints_are_removed(sd, pairs, straight, tmp_path):
    out = shutil.copytree(straight[0], tmp_path / "run")
    run(sd, pairs, tmp_path / "other", "--updates", 2, "--seed", 1)
    (out / "checkpoint-000001.pt").write_text("mine")
    shutil.copy(tmp_path / "other" / "checkpoint-000002.pt", out / "checkpoint-000002.pt")  # another run's
    foreign = {name: (out / name).read_bytes() for name in ("checkpoint-000001.pt", "checkpoint-000002.pt")}
    run(sd, pairs, out, "--updates", 8)
    left = {name for name in os.listdir(out) if name.endswith(".pt")}
    assert left == {*foreign, "checkpoint-000006.pt", "checkpoint-000008.pt"}
    assert all((out / name).read_bytes() == content for name, content in foreign.items())


def test_a_model_is_its_weights_also_for_a_run(sd, pairs, straight, tmp_path, monkeypatch):
    shutil.copytree(sd, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    trained = run("./model", pairs, "run", "--updates", 2)
    for name in ("model/", sd):
        assert same(run(name, pairs, "run", "--updates", 2), trained)
    weights = load_file("model/vae/diffusion_pytorch_model.safetensors")
    weights[max(weights)] += 1
    save_file(weights, "model/vae/diffusion_pytorch_model.safetensors", metadata=dict(format="pt"))
    before = read_folder("run")
    with pytest.raises(SystemExit, match="the run in run was begun with other weights of --model than now: continue it with the same"):
        run("./model", pairs, "run", "--updates", 3)
    assert read_folder("run") == before


def test_a_result_without_its_checkpoint_is_not_replaced(sd, pairs, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    for name in ("checkpoint-000004.pt", "checkpoint-000006.pt", "curves.png"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    before = read_folder(tmp_path / "run")
    with pytest.raises(SystemExit, match="run/pipeline is a file, or lies beside no checkpoint: move it away, or change --out"):
        run(sd, pairs, tmp_path / "run", "--updates", 7)
    assert read_folder(tmp_path / "run") == before
    for name in ("curves.png", "notes.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(SystemExit, match=f"{name} holds other files and no log.jsonl: move it away, or give another name"):
            run(sd, pairs, tmp_path / name, "--updates", 1)
        assert (tmp_path / name / name).read_text() == "mine" and os.listdir(tmp_path / name) == [name]


def test_files_that_a_user_put_into_the_result_stay(sd, pairs, straight, tmp_path):
    out = shutil.copytree(straight[0], tmp_path / "run")
    (out / "pipeline" / "README.md").write_text("my model card")
    (out / "pipeline" / "unet" / "notes.txt").write_text("mine")
    weights = run(sd, pairs, out, "--updates", 8)
    assert not same(weights, straight[1], atol=1e-5)
    assert (out / "pipeline" / "README.md").read_text() == "my model card" and (out / "pipeline" / "unet" / "notes.txt").read_text() == "mine"
    assert not (out / "pipeline.partial").exists()


def open_log(folder, update):
    runs.open_log(types.SimpleNamespace(args=argparse.Namespace(out=str(folder), tensorboard=False), precision="fp32", floor=0.0), update)


FIRST = '{"update": 0, "noise_floor": 0.0, "precision": "fp32"}\n'


def test_the_log_is_cut_to_the_checkpoint_whatever_became_of_it(tmp_path):
    rows = [json.dumps(dict(update=u)) + "\n" for u in (3, 4, 5, 6)]
    (tmp_path / "log.jsonl").write_text("".join(rows) + '{"upda')
    open_log(tmp_path, 5)
    assert (tmp_path / "log.jsonl").read_text() == "".join(rows[:3])
    (tmp_path / "log.jsonl").write_text(FIRST.replace("fp32", "fp16") + "".join(rows))
    open_log(tmp_path, 0)
    assert (tmp_path / "log.jsonl").read_text() == FIRST
    (tmp_path / "log.jsonl").unlink()
    open_log(tmp_path, 5)
    assert (tmp_path / "log.jsonl").read_text() == FIRST


@pytest.mark.parametrize("text", ['{"update": 3}\n{"upd\n{"update": 5}\n', '{"update": 3, "loss": "0.5"}\n', "mine\n", "[1]\n", '{"update": "x"}\n', '{"update": null}\n', "3\n", b"\xff\xfe\n"])
def test_a_log_that_cannot_be_read_is_named_and_kept(text, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    for update in (0, 5):
        with pytest.raises(UserError, match=f"^{path} cannot be read .*: delete it, and a new one is begun.$"):
            open_log(tmp_path, update)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["log.jsonl"]


@pytest.mark.curves
@pytest.mark.parametrize("fault", ["no disk", "no log"])
def test_a_picture_that_could_not_be_drawn_does_not_cost_the_result_and_is_drawn_by_the_next_call(fault, sd, pairs, straight, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("No space left on device")

    out = shutil.copytree(straight[0], tmp_path / "a run")
    for name in ("curves.png", "pipeline/unet/diffusion_pytorch_model.safetensors"):
        os.remove(out / name)
    with monkeypatch.context() as patch:
        if fault == "no disk":
            patch.setattr(plots, "save_figure", fail)
        else:  # deleted during the run
            patch.setattr(runs, "finish", lambda *rest, real=runs.finish: os.remove(out / "log.jsonl") or real(*rest))
        with pytest.raises(SystemExit, match="cannot read or write: No space left on device|log.jsonl cannot be read"):
            run(sd, pairs, out, "--updates", 6)
    assert same(load_file(out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"), straight[1])
    assert not (out / "curves.png").exists()
    assert f"next:  python evaluate.py grid --models {sd} '{out / 'pipeline'}' --prompts" in capsys.readouterr().out
    run(sd, pairs, out, "--updates", 7)
    assert (out / "curves.png").exists() and read_log(out)[-1]["update"] == 7


def start(sd, pairs, out, *flags, processes=1):
    """A run in processes of its own."""
    return launch.Started("train", ["--model", sd, "--pairs", pairs, "--out", out, *FLAGS, *flags], processes)


def test_killed_at_any_moment_it_goes_on_to_the_same_result(sd, pairs, straight, tmp_path):
    for file in ("checkpoint-000002.pt.partial", "pipeline.partial"):  # test_faults.py has every moment, for an adapter
        process = start(sd, pairs, tmp_path, "--updates", 6)
        while not os.path.exists(tmp_path / file) and process.running():
            time.sleep(0.001)
        process.signal(signal.SIGKILL)
        process.wait()
    assert start(sd, pairs, tmp_path, "--updates", 6).wait()[0] == [0]
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
    files = [os.path.join(where, name) for where, _, names in os.walk(straight[0] / "pipeline") for name in names]
    assert len({os.stat(path).st_mode for path in files}) == 1  # who may read one may read all


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
        run(sd, pairs, tmp_path, "--updates", 6, "--micro-batch", 1)
    assert [row["update"] for row in read_log(tmp_path)] == [1, 2, 3]
    assert [f for f in os.listdir(tmp_path) if f.endswith("pt")] == ["checkpoint-000002.pt"]


@pytest.mark.parametrize("logit", [0.12, -0.12, math.nan])
def test_a_student_that_is_not_the_reference_is_noticed_at_the_start(logit):
    def check(second, floor=0.0):
        columns = dict(loss=np.zeros(2), logit=np.array([0.0, second]))
        runs.check_update(types.SimpleNamespace(floor=floor, size=None, note=print), 0, [], columns, 1.0)

    check(0.08)  # the mean over the pairs counts, for a pair alone may differ by its kernels
    check(0.4, floor=0.05)  # and it is judged against what rounding explains
    with pytest.raises(UserError, match="before the first update"):
        check(logit)


@pytest.mark.parametrize("wrong", ["weights", "dropout"])
def test_the_start_is_checked_in_a_run(wrong, sd, pairs, tmp_path, monkeypatch):
    real = train.make_policies

    def make_policies(*arguments):
        policies, networks = real(*arguments)
        if wrong == "weights":
            policies["ref"].conv_out.bias.data += 1
        for module in policies["theta"].modules() if wrong == "dropout" else ():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        policies["theta"].train()
        return policies, networks

    monkeypatch.setattr(train, "make_policies", make_policies)
    with pytest.raises(SystemExit, match="before the first update"):
        run(sd, pairs, tmp_path, "--updates", 1, "--beta", 16000)


@pytest.mark.parametrize("family", ["sd", "sd2", "sdxl", "sana", "sd3"])
def test_the_reference_takes_the_students_kernels_so_that_each_first_logit_is_0(family, family_folders):
    model = models.load(family_folders[family])
    args = train.parse(["--model", family_folders[family], "--lora-rank", "0"])
    policies, networks = train.make_policies(args, model)
    parameters = {p for p in model.net.parameters() if p.requires_grad}
    train.prepare(types.SimpleNamespace(args=args, precision="fp16", networks=networks))
    torch.manual_seed(0)
    x_0_w, x_0_l, eps = torch.randn(3, 4, *model.latent_shape)
    c, c_minus = model.encode(["a red fox", "a blue cup", "x", "yy"]), model.encode(["fox", "cup", "z", "y"])
    with train.precision(torch.device("cpu"), "fp16"):
        loss, info = train.step_loss(model, policies, c, c_minus, x_0_w, x_0_l, torch.tensor([10, 300, 600, 900]), eps, "ddspo", 12000.0)
    assert (info["logit"] == 0).all() and (info["drift"] == 0).all()
    loss.sum().backward()
    assert parameters == set(model.net.parameters()) and not any(p.grad is not None for p in policies["ref"].parameters())


def test_compiled_sana_has_a_finite_gradient_in_float16(family_folders, monkeypatch):
    monkeypatch.setattr(torch._functorch.config, "backward_pass_autocast", "same_as_forward")  # and back again afterwards
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, real=torch.nn.Module.compile: real(net, backend="aot_eager"))
    model = models.load(family_folders["sana"])
    args = argparse.Namespace(compile=True, checkpointing=False, lora_rank=0)
    train.prepare(types.SimpleNamespace(args=args, precision="fp16", networks=[model.net]))
    torch.manual_seed(0)
    x_0, eps = torch.randn(2, 2, *model.latent_shape)
    batch = model.encode(["a red fox", "b"]), None, x_0, x_0, torch.tensor([10, 900]), eps
    with train.precision(torch.device("cpu"), "fp16"):
        loss, _ = train.step_loss(model, dict(theta=model.net), *batch, "sft", None, "w")
    loss.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.net.parameters())


def test_processes_that_see_other_files_are_refused_before_the_first_update(monkeypatch, tmp_path):
    change, digits = {}, "0123456789abcdef"
    monkeypatch.setattr(runs, "from_all", lambda mine: [mine, mine | change])
    mine = types.SimpleNamespace(args=argparse.Namespace(out=str(tmp_path)), identity={"beta": 5, "weights of --model": digits})
    assert runs.load_checkpoint(mine) == 0
    for name, value, said in (("out", "runs/a with checkpoint-000004.pt", f"out runs/a with checkpoint-000004.pt, not {tmp_path} with no checkpoint"),
                              ("weights of --model", digits[::-1], "other weights of --model than now")):
        change.clear()
        change[name] = value
        with pytest.raises(UserError, match=f"processes 1 and 0 do not see the same: {said}. Give all of them the same files"):
            runs.load_checkpoint(mine)


def each_in_its_own_folder(home):
    os.makedirs(os.path.join(home, os.environ["RANK"]), exist_ok=True)
    os.chdir(os.path.join(home, os.environ["RANK"]))


def test_machines_without_a_shared_folder_are_refused(sd, pairs, tmp_path):
    run(sd, pairs, tmp_path / "0" / "run", "--updates", 2)
    argv = ["--model", sd, "--pairs", pairs, "--out", "run", *FLAGS, "--updates", 4]
    codes, said = launch.run("train", argv, 2, functools.partial(each_in_its_own_folder, str(tmp_path)))
    assert re.search("processes 1 and 0 do not see the same: out run with no checkpoint, not run with checkpoint-000002.pt", said)
    assert 0 not in codes and read_log(tmp_path / "0" / "run")[-1]["update"] == 2


def test_a_missing_store_is_answered_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="torchrun build_pairs.py --model sd14 --prompts perturbed.jsonl --out pairs/sd14"):
        train.main(["--model", "sd14"])


@pytest.mark.parametrize("flags, message", [
    (["--beta", "7"], "begun with beta 500.0, not 7.0"), (["--lr", "0.1"], "begun with lr 0.0001, not 0.1"),
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
            change = dict(checksums=["other"] * 4)
        else:
            table.write_text(table.read_text().replace("fox", "wolf"))
            change = dict(table=checksum(table))
        (tmp_path / "store" / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(SystemExit, match="begun with other pairs than now: continue it with the same"):
            run(sd, str(tmp_path / "store"), straight[0], "--updates", 6)


def test_latents_of_another_size_are_refused(sd, pairs, tmp_path):
    shutil.copytree(pairs, tmp_path / "store")
    meta = json.loads((tmp_path / "store" / "meta.json").read_text())
    (tmp_path / "store" / "meta.json").write_text(json.dumps(meta | dict(latents=[4, 64, 64])))
    with pytest.raises(SystemExit, match=r"holds latents \[4, 64, 64\] of scale .*, but .* needs \[4, 8, 8\]"):
        run(sd, str(tmp_path / "store"), tmp_path / "run", "--updates", 1)


def test_negatives_need_ddspo_and_a_second_prompt(sd, prompts, tmp_path):
    with pytest.raises(UserError, match="--negatives not-paired is a variant of Eq. 7"):
        train.parse(["--model", "sd14", "--objective", "diffusion-dpo", "--negatives", "not-paired"])
    (tmp_path / "one.jsonl").write_text(open(prompts).readline())
    build_pairs.main(["--model", sd, "--prompts", str(tmp_path / "one.jsonl"), "--out", str(tmp_path / "store"), "--steps", "1"])
    with pytest.raises(SystemExit, match="has only one prompt"):
        run(sd, str(tmp_path / "store"), tmp_path / "run", "--negatives", "rand-positive")


@pytest.mark.parametrize("flags, message", [
    (["--beta", "0"], "--beta: must be 1e-06 or more, not 0"), (["--lr", "nan"], "--lr: must be 1e-12 or more, not nan"),
    (["--batch-size", "0"], "--batch-size: must be 1 or more"), (["--warmup", "-1"], "--warmup: must be 0 or more"),
    (["--beta", "inf"], "--beta: must be 1e+06 or less, not inf"), (["--beta", "1e-30"], "--beta: must be 1e-06 or more, not 1e-30"),
    (["--beta", "1e9"], "--beta: must be 1e+06 or less, not 1e9"), (["--lr", "1"], "--lr: must be 0.1 or less, not 1"),
])
def test_flags_out_of_range_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        train.parse(["--model", "sd14", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    ("--updates 20", "--warmup 100 is longer than the run of 20 updates: give at most those"),
    ("--warmup 101", "--warmup 101 is longer than the run of 100 updates: give at most those")])
def test_numbers_with_which_a_run_comes_to_nothing_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        train.parse(["--model", "sd14", *flags.split()])
    assert train.parse(["--model", "sd14"]).warmup == 100  # the paper's own row: as long as the run


def test_the_command_of_the_model_card_has_the_flags_without_a_value():
    args = train.parse(["--model", "sd14", "--checkpointing", "--out", "my run"])
    command = re.search(r"train\.py (.*)", runs.model_card(args, "owner/name"))[1]
    assert "--checkpointing" in command and not re.search("--(compile|tensorboard|preview)|True|False", command)
    assert vars(train.parse(shlex.split(command))) == vars(args)


def test_what_is_strange_about_an_update_is_said_once(sd, pairs, tmp_path, capsys):
    log2, columns = np.full(3, 0.69), dict(loss=np.full(3, 0.69), drift=np.full(3, 0.1))
    for change, said in ((dict(loss=log2 * 0), "every loss of an update is 0, or every one is above 10"), (dict(loss=log2 + 10), "every loss of an update is 0, or every one is above 10"),
                         (dict(drift=log2 * 2), "further from the reference than"), ({}, None),
                         (dict(loss=np.array([0, 11, 11.0])), None)):
        found = []
        runs.check_update(types.SimpleNamespace(size=1.0, note=found.append), 5, [], columns | change, 1.0)
        assert len(found) == (said is not None) and all(said in text for text in found)
    run(sd, pairs, tmp_path, "--updates", 5, "--lr", 0.1, "--beta", 1e6)
    assert capsys.readouterr().err.count("note: the student is further from the reference than") == 1


def test_the_short_command_is_the_papers_experiment(sd):
    args = train.parse(["--model", "sd14"])
    assert (args.objective, args.beta, args.batch_size, args.lr, args.updates) == ("ddspo", 16000, 2048, 5.12e-6, 100)
    assert (args.pairs, args.out, args.micro_batch, args.lora_rank) == ("pairs/sd14", "runs/sd14-ddspo", 2, 0)
    args = train.parse(["--model", "shapes"])
    assert (args.batch_size, args.pairs, args.out) == (64, "pairs/shapes", "runs/shapes-ddspo")
    assert train.parse(["--model", "sd14", "--negatives", "not-paired"]).out == "runs/sd14-not-paired"
    args = train.parse(["--model", sd + "/", "--objective", "diffusion-dpo", "--lr", "3e-6", "--warmup", "0"])
    assert (args.beta, args.lr, args.warmup, args.out) == (8000, 3e-6, 0, "runs/tiny-sd-diffusion-dpo")


def test_a_folder_or_a_hub_id_takes_the_settings_of_its_family(tmp_path):
    import tiny_models

    for family, preset in (("sd", "sd14"), ("sd2", "sd14"), ("sdxl", "sdxl"), ("sana", "sana"), ("sd3", "sd3")):
        tiny_models.make(str(tmp_path / family), family)
        args = train.parse(["--model", str(tmp_path / family)])
        assert find_row(args) == (preset, "alignment", "ddspo") and args.lora_rank == (128 if family in ("sana", "sd3") else 0)
    args = train.parse(["--model", "Efficient-Large-Model/Sana_600M_1024px_diffusers"])
    assert (args.beta, args.lora_rank, args.out) == (2000, 128, "runs/Sana_600M_1024px_diffusers-ddspo")


@pytest.mark.parametrize("flags, expected", [
    ("sd15 --task aesthetic", dict(beta=16000, lr=5.12e-6, updates=100, warmup=100, pairs="pairs/sd15-aesthetic", out="runs/sd15-aesthetic-ddspo")),
    ("sdxl", dict(beta=16000, updates=500, warmup=100, micro_batch=1, lora_rank=0)),
    ("sdxl --task aesthetic --objective diffusion-dpo", dict(beta=5000, lr=2.048e-5, updates=2000, warmup=200)),
    ("sana", dict(beta=2000, lr=8.192e-5, updates=500, warmup=0, lora_rank=128, micro_batch=2)),
    ("sd3 --lora-rank 0", dict(beta=2000, updates=100, lora_rank=0, row="sd3 alignment ddspo")),
    ("sana-1.6b", dict(beta=2000, lora_rank=128, row="sana alignment ddspo")),  # no row: its family's
    ("sana --objective diffusion-dpo --beta 7 --lr 1e-5", dict(beta=7, lora_rank=128, updates=100, warmup=0, row=None)),
    ("sd15", dict(row="sd15 aesthetic ddspo")),  # no row for the task: the model's other
    ("sd14 --objective dspo", dict(beta=0.001, row="sd15 aesthetic dspo")),
    ("sd14 --objective sft --side l --lora-rank 4", dict(beta=None, lr=1e-4, updates=300, out="runs/sd14-sft-l", lora_rank=4)),
    ("sd14 --winner a --loser b", dict(beta=8000, row="sd14 alignment policies", out="runs/sd14-ddspo-policies")),
    ("sd15 --objective dspo", dict(beta=0.001, lr=2.048e-5)),
    ("shapes --objective distill", dict(beta=None, scale=2, lr=3e-5, updates=80, batch_size=64, out="runs/shapes-distill")),
])
def test_each_experiment_has_its_row(flags, expected):
    args = train.parse(["--model", *flags.split()])
    row = expected.pop("row", "not asked")
    assert {name: getattr(args, name) for name in expected} == expected
    assert row == "not asked" or find_row(args) == (row and tuple(row.split()))


@pytest.mark.parametrize("flags, asked", [
    ("sana --objective diffusion-dpo", "--beta and --lr"), ("sana --objective diffusion-dpo --lr 1e-5", "--beta"),
    ("sd3 --objective dspo --beta 1", "--lr"), ("sana --objective sft --side w", "--lr"),
    ("sd14 --objective distill", "--scale and --lr")])
def test_where_no_experiment_fits_beta_and_lr_are_asked_for(flags, asked):
    with pytest.raises(UserError, match=rf"give {asked}, which no experiment of {flags.split()[0]} with these flags has\."):
        train.parse(["--model", *flags.split()])
    with pytest.raises(UserError, match="give --beta and --lr, which no experiment of shapes with these flags has."):
        train.parse("--model shapes --winner a --loser b".split())


def test_the_law_of_the_learning_rate_holds_where_it_is_said_to():
    rows = {key: row for key, row in EXPERIMENTS.items() if key[0] in ("sd14", "sd15", "sdxl") and key[2] == "ddspo"}
    assert len(rows) == 5 and all(row["lr"] * row["beta"] == pytest.approx(0.08192) for row in rows.values())


# ---- what the user sees


@pytest.mark.parametrize("rank, objective", [(0, "ddspo"), (2, "ddspo"), (0, "sft"), (0, "distill")])
def test_previews_show_the_reference_beside_the_student(rank, objective, sd, pairs, tmp_path, monkeypatch):
    flags = ["--model", sd, "--pairs", pairs, "--objective", objective, "--batch-size", 4, "--warmup", 0, "--lr", 1e-3, "--updates", 4, "--lora-rank", rank]
    flags += dict(ddspo=["--beta", 500], sft=["--side", "w"], distill=["--scale", 2])[objective]
    result = f"{'lora/pytorch_lora_weights' if rank else 'pipeline/unet/diffusion_pytorch_model'}.safetensors"
    drawn = {}
    monkeypatch.setattr(plots, "draw_grid", lambda prompts, columns, path: drawn.update({path: (prompts, columns)}))
    for out, more in (("without", []), ("run", ["--preview", 2])):
        train.main([*map(str, flags), "--out", str(tmp_path / out), *map(str, more)])
    assert same(*[load_file(tmp_path / out / result) for out in ("without", "run")])  # it changes nothing
    (prompts, two), (_, four) = (drawn[str(tmp_path / "run" / f"preview-{n:06d}.png")] for n in (2, 4))
    assert len(drawn) == 2 and prompts == [f"a {x} on a hill" for x in ("red fox", "blue cup", "old boat", "green hat")]
    (ref, before), (theta, after) = two
    assert (ref, theta) == ("reference", "student") and len(before) == len(after) == 4
    model = models.load(sd)
    x_T = torch.stack([models.initial_noise(i, model.latent_shape) for i in range(4)])
    expected = models.sample(model, prompts, x_T, 25, 7.5, "pil")
    later = models.sample(models.load(str(tmp_path / "run" / ("lora" if rank else "pipeline"))), prompts, x_T, 25, 7.5, "pil")
    pixels = [[np.asarray(image) for image in images] for images in (before, four[0][1], expected, four[1][1], later, after)]
    assert all((a == b).all() and (a == c).all() for a, b, c in zip(*pixels[:3]))  # the reference stays
    assert all(abs(a.astype(int) - b).max() <= 1 for a, b in zip(pixels[3], pixels[4]))  # theta is the result
    assert any((a != b).any() for a, b in zip(pixels[3], pixels[0]))


def test_a_preview_that_fails_loses_no_update(sd, pairs, tmp_path, monkeypatch):
    def decode(*_):
        raise torch.OutOfMemoryError("the GPU is full")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="out of memory"):
        patch.setattr(models, "decode", decode)
        run(sd, pairs, tmp_path, "--updates", 4, "--preview", 2)
    assert os.path.exists(tmp_path / "checkpoint-000002.pt")
    run(sd, pairs, tmp_path, "--updates", 4)


class EveryStep(tqdm.tqdm):
    """A bar that shows every step, however short."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, mininterval=0, miniters=1, **more)


def test_a_run_says_what_a_small_store_costs_and_which_prompts_are_cut(sd, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "tqdm", EveryStep)
    shutil.copytree(pairs, tmp_path / "store")
    table, meta = tmp_path / "store" / "pairs.jsonl", tmp_path / "store" / "meta.json"
    table.write_text(table.read_text().replace("a red fox", "a red fox" + " very" * 20))
    meta.write_text(json.dumps(json.loads(meta.read_text()) | dict(table=checksum(table))))
    run(sd, str(tmp_path / "store"), tmp_path / "run", "--updates", 2, "--batch-size", 25, "--micro-batch", 10)
    said = capsys.readouterr()
    assert "1 x 3 micro-batches of up to 10; defaults from sd14 alignment ddspo" in said.out
    assert "from update 0 of 2 on 10 pairs: objective ddspo, negatives generated, lora_rank 0, beta 500.0, lr 0.0001, warmup 2" in said.out
    assert said.err.count("note: 1 of 20 prompts exceed the text encoders' limit and are truncated") == 1 and "was truncated" not in said.err
    for done in (10, 20, 25, 35, 45, 50):  # progress within an update, with the time to the end and pairs a second
        assert re.search(rf" {done}/50 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(s/ pairs| pairs/s)", said.err)


def test_tensorboard_holds_the_numbers_of_the_log(sd, pairs, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for updates in (2, 4, 4):  # updates 3 and 4 are done twice, and shown once
        (tmp_path / "checkpoint-000004.pt").unlink(missing_ok=True)
        run(sd, pairs, tmp_path, "--updates", updates, "--tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    log = read_log(tmp_path)
    for name in ("loss", "winner", "loser", "accuracy", "grad_norm", "lr", "drift"):
        values = [(event.step, event.value) for event in events.Scalars(name)]
        assert values == [(row["update"], pytest.approx(row[name], rel=1e-6)) for row in log]
    assert [event.value for event in events.Scalars("logit_quantiles/2")] == pytest.approx([row["logit_quantiles"][2] for row in log])
    winner = [(row["update"], pytest.approx(row["winner_by_t"][3])) for row in log if row["winner_by_t"][3] is not None]
    assert winner and [(event.step, event.value) for event in events.Scalars("winner_by_t/3")] == winner


def test_quantiles_of_the_logit_are_over_all_pairs_of_the_update(sd, pairs, tmp_path, monkeypatch):
    seen, real = [], train.step_loss

    def step_loss(*arguments):
        loss, info = real(*arguments)
        seen.append(info["logit"])
        return loss, info

    monkeypatch.setattr(train, "step_loss", step_loss)
    run(sd, pairs, tmp_path, "--updates", 2, "--batch-size", 7, "--micro-batch", 3)
    row = read_log(tmp_path)[1]
    logits = torch.cat(seen)[7:]
    assert row["logit_quantiles"] == pytest.approx(logits.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])).tolist(), rel=1e-4)
    assert row["logit"] == pytest.approx(logits.mean().item(), rel=1e-5)


def test_the_log_says_how_fast_how_large_and_how_exact(straight):
    rows = [json.loads(line) for line in open(straight[0] / "log.jsonl")]
    assert rows[0] == dict(update=0, noise_floor=0.0, precision="fp32")
    assert all(1 < row["pairs_per_second"] < 10000 and 0.1 < row["memory_gb"] < 10 for row in rows[1:])


@pytest.mark.curves
def test_curves_show_the_numbers_of_the_log(straight, tmp_path, monkeypatch):
    assert (straight[0] / "curves.png").stat().st_size > 20_000
    shutil.copy(straight[0] / "log.jsonl", tmp_path)
    axes, lines = [], []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (axes.extend(figure.axes), lines.extend(ax.lines for ax in figure.axes)))
    plots.draw_curves(str(tmp_path / "log.jsonl"))
    log = read_log(straight[0])
    drawn = {panel[0]: [list(line.get_ydata()) for line in ls] for (panel, *_), ls in zip(plots.CURVES, lines)}
    assert len(lines) == len(plots.CURVES)
    assert drawn["loss"] == [[row["loss"] for row in log]]
    assert axes[0].get_ylim()[0] == 0 and axes[2].get_ylim() == (0, 1)  # so that a run that learns nothing looks like it
    assert axes[0].get_ylim()[1] > max(row["loss"] for row in log)
    assert drawn["winner"] == [[row[name] for row in log] for name in ("winner", "loser")]
    assert np.allclose(np.array(drawn["logit_quantiles"]).T, [row["logit_quantiles"] for row in log])
    last = [value is not None for value in log[-1]["winner_by_t"]]
    assert list(np.isfinite(np.ma.filled(np.ma.array(drawn["winner_by_t"][0]).astype(float), np.nan))) == last
    for name in ("accuracy", "drift", "grad_norm", "lr"):
        assert drawn[name] == [[row[name] for row in log]]


# ---- a busy machine


PROGRAMS = ["train.py", "build_pairs.py", "evaluate.py", "shapes.py", "studies/shapes_full.py"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_threads_that_wait_sleep_because_torch_is_told_before_it_is_imported(program):
    for statement in ast.parse(open(os.path.join(launch.ROOT, program)).read()).body:
        if "OMP_WAIT_POLICY" in ast.unparse(statement) and isinstance(statement, ast.Expr):
            return
        names = [name.name for name in getattr(statement, "names", [])] if isinstance(statement, ast.Import) else []
        names += [statement.module] if isinstance(statement, ast.ImportFrom) else []
        assert all(name.split(".")[0] in sys.stdlib_module_names for name in names)
    raise AssertionError("it does not tell torch")
