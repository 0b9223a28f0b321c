"""tests/bench.py: what it prints was measured on the same work, and nothing is timed where the two ways disagree."""

import argparse
import math
import os
import re
import runpy
import sys
import time

import bench
import pytest
import tiny_models
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib import adapters, models


def numbers(text):
    return [float(x) for x in re.findall(r"(?<![\w.])\d+\.?\d*(?:e-?\d+)?", text)]


def rows_of(said):
    """{model and way: [the numbers of each cell]} of a printed table."""
    cells = [line.strip("| ").split(" | ") for line in said.splitlines()[2:] if line.startswith("| ")]
    return {way: [numbers(cell) for cell in rest] for way, *rest in cells if len(rest) == 3 and rest[0].strip("| ")}


def test_making_pairs_is_timed_in_turns_on_equal_results(sd, capsys, monkeypatch):
    real, slept = bench.our_pairs, []

    def our_pairs(*arguments):  # as fast as what is slept tells
        slept.append(time.perf_counter())
        time.sleep(0.4)
        return real(*arguments)

    monkeypatch.setattr(bench, "our_pairs", our_pairs)
    monkeypatch.setattr(bench, "clock", lambda device: time.perf_counter())  # which time slept counts for
    bench.main(["pairs", "--model", sd, "--pairs", "8", "--turns", "2", "--steps", "1"])
    said = capsys.readouterr().out
    rows = rows_of(said)
    assert list(rows) == [f"{sd}, plain", f"{sd}, ours"] and len(slept) == 4  # to compare, to warm up, two turns
    (plain, ones, _), ([ours], ratio, _) = rows.values()
    assert 1 < ours < 8 / 0.4 and ones == [1, 1, 1] and "2 turns, 1 steps" in said and "latents agree to" in said
    assert ratio[0] == pytest.approx(ours / plain[0], rel=0.5) and ratio[1] <= ratio[0] <= ratio[2]


@pytest.mark.parametrize("side, added, off", [(0, 0.01, "0.01"), (1, float("nan"), "nan")])
@pytest.mark.parametrize("way", ["plain_pairs", "our_pairs"])
def test_no_time_is_printed_where_the_two_ways_disagree(sd, way, side, added, off, capsys, monkeypatch):
    real = getattr(bench, way)

    def spoiled(*arguments):
        latents = real(*arguments)
        latents[side, 2] += added
        return latents
    monkeypatch.setattr(bench, way, spoiled)
    with pytest.raises(SystemExit, match=f"the two ways differ by {off}"):
        bench.main(["pairs", "--model", sd, "--pairs", "4", "--turns", "1", "--steps", "1"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flags", [["pairs", "--model", "x", "--turns", "0"], ["step", "--micro-batch", "0"]])
def test_numbers_out_of_range_are_named(flags, capsys):
    with pytest.raises(SystemExit):
        bench.main(flags)
    assert re.search(rf"argument {flags[-2]}: must be 1 or more, not 0", capsys.readouterr().err)


# ---- the training step

TINY = {"tiny": ("sd", {}, 0, 2), "tiny-sana": ("sana", {}, 4, 2)}


@pytest.fixture
def tiny(monkeypatch):
    for name, row in TINY.items():
        monkeypatch.setitem(bench.ARCHITECTURES, name, row)
    monkeypatch.setattr(bench, "matmul_peak", lambda device, precision: 1e9)


@pytest.mark.parametrize("name, arms", [("tiny", 3), ("tiny-sana", 4)])
def test_the_step_is_timed_in_turns_on_equal_work(tiny, name, arms, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network: network)  # test_train.py compiles SANA
    if arms == 4:
        monkeypatch.setattr(bench, "choose_device", lambda args: torch.device("cpu"))  # which would refuse --compile
    slow, order = [0.3], []
    for arm in ("plain_loss", "our_loss"):  # our step is made slow, and the table must say so
        real = getattr(bench, arm)

        def loss(*arguments, real=real, arm=arm, **kinds):
            order.append(arm)
            if arm == "our_loss":
                end = time.process_time() + slow[0]
                while time.process_time() < end:
                    pass
            return real(*arguments, **kinds)
        monkeypatch.setattr(bench, arm, loss)
    bench.main(["step", "--model", name, "--seconds", "0", *["--compile"] * (arms == 4)])
    said = capsys.readouterr().out
    rows = rows_of(said)
    assert list(rows) == [f"{name}, {arm}" for arm in ("plain", "plain, again", "ours", "ours, compiled")[:arms]]
    (rate, ours, share), again = rows[f"{name}, ours"], rows[f"{name}, plain, again"][1]
    assert ours[1] <= ours[0] <= ours[2] and ours[0] < 0.8 * again[0]
    assert rows[f"{name}, plain"][1] == [1, 1, 1]
    assert 2 / 1 < rate[0] < 2 / 0.3  # two pairs in an update, each made 0.3 s slower
    flops = float(re.search(r"([\d.e-]+) TFLOP a pair", said).group(1)) * 1e12
    assert share[0] / 100 == pytest.approx(rate[0] * flops / 1e9, rel=0.2, abs=0.005)
    timed = order[-3 * arms:]  # three turns, each begun by another arm
    assert timed[:3] != timed[arms:arms + 3] and timed.count("plain_loss") == 6


@pytest.mark.parametrize("what, change", [("loss", lambda loss: loss * 1.01), ("gradient", lambda loss: loss.detach() + 1.01 * (loss - loss.detach()))])
def test_nothing_is_timed_unless_loss_and_gradient_agree(tiny, what, change, capsys, monkeypatch):
    real = bench.our_loss
    monkeypatch.setattr(bench, "our_loss", lambda *arguments, **kinds: change(real(*arguments, **kinds)))
    with pytest.raises(SystemExit, match="not timed, because their arms disagree: tiny"):
        bench.main(["step", "--model", "tiny", "--seconds", "0"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert len(lines) == 1 and lines[0].startswith(f"| tiny: the {what} of 'ours' is off by 0.01 of plain's: not timed |")


def spoil(monkeypatch, fault):
    """`fault(work, arm)` changes the gradients of a micro-batch after its backward."""
    real = bench.micro_batch

    def micro_batch(work, arm):
        loss = real(work, arm)
        fault(work, arm)
        return loss
    monkeypatch.setattr(bench, "micro_batch", micro_batch)


def test_a_nan_in_one_gradient_is_reported_and_the_next_model_is_timed(tiny, capsys, monkeypatch):
    def fault(work, arm):
        if arm == "ours" and type(work.model) is models.StableDiffusion:
            work.parameters[-1].grad.view(-1)[0] = float("nan")
    spoil(monkeypatch, fault)
    with pytest.raises(SystemExit, match="not timed, because their arms disagree: tiny\\.$") as ended:
        bench.main(["step", "--model", "tiny", "tiny-sana", "--seconds", "0"])
    assert ended.value.code  # a sentence, with which Python exits as 1
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert rows[0] == "| tiny: the gradient of 'ours' is off by nan of plain's: not timed"
    assert rows[1:4] == ["| tiny-sana, plain", "| tiny-sana, plain, again", "| tiny-sana, ours"] and len(rows) == 5


ALL = ["plain", "plain, again", "ours"]


@pytest.mark.parametrize("value, arms", [(math.nan, ALL), (math.inf, ALL), (math.nan, ["ours"]), (math.inf, ["ours"]), (None, ["ours"])])
def test_no_gradient_that_is_not_finite_or_is_not_there_passes_the_gate(tiny, value, arms, monkeypatch):
    def fault(work, arm):
        p = work.parameters[3]
        if arm in arms and value is None:
            p.grad = None
        elif arm in arms:
            p.grad.view(-1)[0] = value
    work = bench.prepare("tiny", argparse.Namespace(micro_batch=None, precision="fp32", compile=False), torch.device("cpu"))
    assert bench.disagreement(work) == ""
    spoil(monkeypatch, fault)
    assert "gradient" in bench.disagreement(work)


def test_in_half_precision_a_small_parameter_without_a_gradient_is_noticed(tiny, monkeypatch):
    work = bench.prepare("tiny", argparse.Namespace(micro_batch=None, precision="fp16", compile=False), torch.device("cpu"))
    bench.micro_batch(work, "plain")
    sizes = bench.norms([p.grad for p in work.parameters])
    small = int(((sizes / sizes.max() - 0.03).abs()).argmin())
    assert 0.02 < sizes[small] / sizes.max() and sizes[small] / sizes.norm() < 0.05  # less than rounding's 0.1
    work.arms["plain"][2].zero_grad()
    assert bench.disagreement(work) == ""
    spoil(monkeypatch, lambda work, arm: work.parameters[small].grad.zero_() if arm == "ours" else None)
    assert bench.disagreement(work) == f"'ours' has another gradient for 1 of {len(sizes)} parameters than plain"


@pytest.mark.parametrize("name, passes", [("tiny", 9), ("tiny-sana", 7)])
def test_floors_count_the_passes_that_a_pair_needs(tiny, capsys, name, passes):
    _, _, rank, _ = bench.ARCHITECTURES[name]
    model = bench.build(name, "cpu")
    adapters.add_lora(model.net, rank) if rank else None
    c = model.encode(["a"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net = adapters.with_adapter(model.net) if rank else model.net
        model.predict(net, torch.zeros(1, *model.latent_shape), torch.tensor([3]), c)
    bench.main(["step", "--model", name, "--seconds", "0"])
    assert f"{passes * counter.get_total_flops() / 1e12:.4g} TFLOP a pair" in capsys.readouterr().out


def test_the_plain_step_is_plain_and_the_student_is_not_the_reference(tiny, monkeypatch):
    samples, losses = {}, {}

    def spy(arm, real):
        def loss(model, policies, *rest, **kinds):
            def predict(net, x_t, *more):
                samples[arm].append(("ref" if net is policies["ref"] else "theta", len(x_t)))
                return type(model).predict(model, net, x_t, *more)
            samples[arm], model.predict = [], predict
            losses[arm] = real(model, policies, *rest, **kinds)
            del model.predict
            return losses[arm]
        monkeypatch.setattr(bench, arm, loss)
    for arm in ("plain_loss", "our_loss"):
        spy(arm, getattr(bench, arm))
    bench.main(["step", "--model", "tiny", "--seconds", "0"])
    assert sorted(samples["plain_loss"]) == [("ref", 4), ("ref", 4), ("theta", 4)]
    assert sorted(samples["our_loss"]) == [("ref", 2), ("ref", 4), ("theta", 4)]
    assert all((loss.detach() - math.log(2)).abs().max() > 1e-4 for loss in losses.values())


def test_the_peak_counts_two_operations_a_multiplication(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(bench, "clock", lambda device: next(ticks))
    assert bench.matmul_peak(torch.device("cpu"), "fp32") == 10 * 2 * 1024**3  # ten products a second


@pytest.mark.parametrize("name, millions", [("mid", 12.8), ("sd14", 859.5), ("sdxl", 2567.5), ("sana", 591.8)])
def test_the_networks_are_of_the_published_sizes(name, millions):
    family, sizes, _, _ = bench.ARCHITECTURES[name]
    with torch.device("meta"):
        parts = tiny_models.FAMILIES[family](**sizes).components
    net = parts["transformer" if family == "sana" else "unet"]
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU refuses")
def test_what_needs_a_gpu_is_refused_on_a_cpu():
    with pytest.raises(SystemExit, match="need a GPU: on a CPU take mid"):
        bench.main(["step", "--model", "sd14"])
    for flags in (["step"], ["pairs", "--model", "mid", "--random-weights"]):
        with pytest.raises(SystemExit, match="--compile is for GPUs: .* loses the gradient"):
            bench.main([*flags, "--compile"])


def test_random_weights_are_for_models_that_can_be_sampled():
    with pytest.raises(SystemExit, match="--random-weights goes with"):
        bench.main(["pairs", "--model", "sana", "--random-weights"])


def test_the_command_runs_from_the_root_and_ends_with_a_status(tmp_path, monkeypatch):
    tests = os.path.dirname(os.path.abspath(bench.__file__))
    root = os.path.dirname(tests)
    monkeypatch.setattr(sys, "path", [tests, *[path for path in sys.path if path not in (tests, root, "")]])
    monkeypatch.setattr(sys, "argv", ["bench.py", "pairs", "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^{tmp_path} "):
        runpy.run_path(bench.__file__, run_name="__main__")
    assert sys.path[0] == root


def test_pairs_are_timed_on_random_weights_beside_the_peak(tiny, capsys, monkeypatch):
    monkeypatch.setitem(bench.ARCHITECTURES, "mid", TINY["tiny"])
    model = bench.build("mid", "cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.predict(model.net, torch.zeros(1, *model.latent_shape), torch.tensor([0]), dict(prompt_embeds=torch.zeros(1, 77, 32)))
    bench.main(["pairs", "--model", "mid", "--random-weights", "--pairs", "4", "--turns", "1", "--steps", "2"])
    (rate,), _, (share,) = rows_of(capsys.readouterr().out)["mid, ours"]
    assert share / 100 == pytest.approx(rate * 4 * 2 * counter.get_total_flops() / 1e9, rel=0.05)
