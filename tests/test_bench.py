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


@pytest.fixture
def tiny(monkeypatch):
    """A tiny U-Net in place of mid, and a tiny SANA with LoRA."""
    for name, row in {"mid": ("sd", {}), "tiny-sana": ("sana", {})}.items():
        monkeypatch.setitem(tiny_models.SIZES, name, row)
    monkeypatch.setitem(bench.RANK, "tiny-sana", 4)
    monkeypatch.setitem(bench.SIZE, "tiny-sana", 2)


def arguments(**changes):
    return argparse.Namespace(**dict(model="mid", micro_batch=None, precision="fp32", compile=False) | changes)


CPU = torch.device("cpu")


def test_the_step_is_timed_in_turns_on_equal_work(tiny, capsys, monkeypatch):
    order = []
    for arm in ("plain_loss", "our_loss"):  # our step is made slow, and the table must say so
        real = getattr(bench, arm)

        def loss(*batch, real=real, arm=arm, **kinds):
            order.append(arm)
            end = time.process_time() + 0.3 * (arm == "our_loss")
            while time.process_time() < end:
                pass
            return real(*batch, **kinds)
        monkeypatch.setattr(bench, arm, loss)
    bench.main(["--seconds", "0"])
    lines = capsys.readouterr().out.splitlines()
    rows = {way: [float(x) for x in re.findall(r"[\d.]+", " ".join(cells))] for way, *cells in (line.strip("| ").split(" | ") for line in lines[2:5])}
    assert list(rows) == ["plain", "plain, again", "ours"] and lines[0].startswith("| mid, fp32 |") and lines[5] == "3 turns of 1 x 2 pairs"
    assert rows["plain"][1:] == [1, 1, 1]
    rate, median, least, most = rows["ours"]
    assert least <= median <= most and median < 0.8 * rows["plain, again"][1]
    assert 2 / 1 < rate < 2 / 0.3  # two pairs in an update, each made 0.3 s slower
    timed = order[-9:]  # three turns, each begun by another arm
    assert timed[:3] != timed[3:6] and timed.count("plain_loss") == 6


def test_the_compiled_arm_and_lora_are_compared_and_timed_too(tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network: network)  # test_train.py compiles SANA
    work = bench.make_arms(arguments(model="tiny-sana", compile=True), CPU)
    assert list(work.arms) == ["plain", "plain, again", "ours", "ours, compiled"] and bench.disagreement(work) == ""
    assert all(".lora_" in name for name, p in work.model.net.named_parameters() if p.requires_grad)
    assert 0 < bench.seconds(work, "ours, compiled", 2) < 60


@pytest.mark.parametrize("what, change", [("loss", lambda loss: loss * 1.01), ("gradient", lambda loss: loss.detach() + 1.01 * (loss - loss.detach()))])
def test_nothing_is_timed_unless_loss_and_gradient_agree(tiny, what, change, capsys, monkeypatch):
    real = bench.our_loss
    monkeypatch.setattr(bench, "our_loss", lambda *batch, **kinds: change(real(*batch, **kinds)))
    with pytest.raises(SystemExit, match=f"mid: the {what} of 'ours' is off by 0.01 of plain's: not timed"):
        bench.main(["--seconds", "0"])
    assert capsys.readouterr().out == ""


def spoil(monkeypatch, fault):
    """`fault(work, arm)` changes the gradients of a micro-batch after its backward."""
    real = bench.micro_batch

    def micro_batch(work, arm):
        loss = real(work, arm)
        fault(work, arm)
        return loss
    monkeypatch.setattr(bench, "micro_batch", micro_batch)


ALL = ["plain", "plain, again", "ours"]


@pytest.mark.parametrize("value, arms", [(math.nan, ALL), (math.inf, ALL), (math.nan, ["ours"]), (math.inf, ["ours"]), (None, ["ours"])])
def test_no_gradient_that_is_not_finite_or_is_not_there_passes_the_gate(tiny, value, arms, monkeypatch):
    def fault(work, arm):
        p = work.parameters[3]
        if arm in arms and value is None:
            p.grad = None
        elif arm in arms:
            p.grad.view(-1)[0] = value
    work = bench.make_arms(arguments(), CPU)
    assert bench.disagreement(work) == ""
    spoil(monkeypatch, fault)
    assert "gradient" in bench.disagreement(work)


def test_in_half_precision_a_small_parameter_without_a_gradient_is_noticed(tiny, monkeypatch):
    work = bench.make_arms(arguments(precision="fp16"), CPU)
    bench.micro_batch(work, "plain")
    sizes = bench.norms([p.grad for p in work.parameters])
    small = int(((sizes / sizes.max() - 0.03).abs()).argmin())
    assert 0.02 < sizes[small] / sizes.max() and sizes[small] / sizes.norm() < 0.05  # less than rounding's 0.1
    work.arms["plain"][2].zero_grad()
    assert bench.disagreement(work) == ""
    spoil(monkeypatch, lambda work, arm: work.parameters[small].grad.zero_() if arm == "ours" else None)
    assert bench.disagreement(work) == f"'ours' has another gradient for 1 of {len(sizes)} parameters than plain"


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
    bench.main(["--seconds", "0"])
    assert sorted(samples["plain_loss"]) == [("ref", 4), ("ref", 4), ("theta", 4)]
    assert sorted(samples["our_loss"]) == [("ref", 2), ("ref", 4), ("theta", 4)]
    assert all((loss.detach() - math.log(2)).abs().max() > 1e-4 for loss in losses.values())


@pytest.mark.parametrize("name, millions", [("mid", 12.8), ("sd14", 859.5), ("sdxl", 2567.5), ("sana", 591.8)])
def test_the_networks_are_of_the_published_sizes(name, millions):
    family, sizes = tiny_models.SIZES[name]
    with torch.device("meta"):
        parts = tiny_models.FAMILIES[family](**sizes).components
    net = parts["transformer" if family == "sana" else "unet"]
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU refuses")
def test_what_needs_a_gpu_is_refused_on_a_cpu():
    for flags in (["--model", "sd14"], ["--compile"]):
        with pytest.raises(SystemExit, match="on a CPU there is --model mid alone, and no --compile"):
            bench.main(flags)


def test_numbers_out_of_range_are_named(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--micro-batch", "0"])
    assert "argument --micro-batch: must be 1 or more, not 0" in capsys.readouterr().err


def test_the_command_runs_from_the_root_and_ends_with_a_status(monkeypatch):
    tests = os.path.dirname(os.path.abspath(bench.__file__))
    root = os.path.dirname(tests)
    monkeypatch.setattr(sys, "path", [tests, *[path for path in sys.path if path not in (tests, root, "")]])
    monkeypatch.setattr(sys, "argv", ["bench.py", "--model", "sdxl"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^on a CPU there is --model mid alone"):
        runpy.run_path(bench.__file__, run_name="__main__")
    assert sys.path[0] == root
