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

import train
from lib.files import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A tiny U-Net in place of mid, and a tiny SANA."""
    for name, row in {"mid": ("sd", {}), "tiny-sana": ("sana", {})}.items():
        monkeypatch.setitem(tiny_models.SIZES, name, row)


def make_run(**changes):
    flags = dict(model="mid", micro_batch=2, precision="fp32", compile=False, lora_rank=0, seed=0, objective="ddspo", winner=None,
                 loser=None, checkpointing=False)
    run = bench.make_run(argparse.Namespace(**flags | changes), CPU)
    _, right = bench.micro_batch(run, bench.plain_loss)
    train.prepare(run)
    return run, right


def test_the_step_is_timed_in_turns_on_equal_work(capsys, monkeypatch):
    order, real = [], dict(plain=bench.plain_loss, ours=train.step_loss)

    def slow(arm, seconds):  # our step is made slow, and the lines must say so
        def loss(*batch):
            order.append(arm)
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass
            return real[arm](*batch)
        return loss

    monkeypatch.setattr(bench, "plain_loss", slow("plain", 0))
    monkeypatch.setattr(train, "step_loss", slow("ours", 0.3))
    bench.main(["--seconds", "0"])
    lines = [re.fullmatch(r"(.*): (\S+) pairs per second, (\S+) \(from (\S+) to (\S+)\) times plain's, 3 turns", line).groups()
             for line in capsys.readouterr().out.splitlines()]
    rows = {arm: [float(x) for x in numbers] for arm, *numbers in lines}
    assert list(rows) == ["plain", "plain, again", "ours"] and rows["plain"][1:] == [1, 1, 1]
    rate, median, least, most = rows["ours"]
    assert least <= median <= most and median < 0.8 * rows["plain, again"][1]
    assert 2 / 1 < rate < 2 / 0.3  # two pairs, made 0.3 s slower
    assert order == ["plain", *["plain", "plain", "ours"] * 4]  # the right numbers, a comparison, three turns


@pytest.mark.parametrize("changes", [dict(model="tiny-sana", lora_rank=4), dict(precision="fp16"), dict(precision="bf16", lora_rank=2)])
def test_lora_and_half_precision_are_compared_too(changes):
    run, right = make_run(**changes)
    for loss in (bench.plain_loss, train.step_loss):
        seconds, found = bench.micro_batch(run, loss)
        bench.compare("ours", found, right, 1e-4 if "precision" not in changes else 0.1)
        assert 0 < seconds < 60 and found.keys() == right.keys()
    assert all(".lora_" in what for what in right if what != "loss") == ("lora_rank" in changes)


@pytest.mark.parametrize("change, what", [(lambda loss: loss * 1.01, "loss"), (lambda loss: loss.detach() + 1.01 * (loss - loss.detach()), "gradient of")])
def test_nothing_is_timed_unless_loss_and_gradient_agree(change, what, capsys, monkeypatch):
    real = train.step_loss
    monkeypatch.setattr(train, "step_loss", lambda *batch: (change(real(*batch)[0]), None))
    with pytest.raises(SystemExit, match=f"ours: another {what}.* than that of the plain step, so that nothing is timed"):
        bench.main(["--seconds", "0"])
    assert capsys.readouterr().out == ""


def test_what_the_preparation_of_the_networks_breaks_is_noticed(capsys, monkeypatch):
    real = train.prepare

    def prepare(run):  # as torch.compile does on a CPU
        real(run)
        run.model.net.down_blocks[0].downsamplers[0].conv.requires_grad_(False)

    monkeypatch.setattr(train, "prepare", prepare)
    with pytest.raises(SystemExit, match="plain: another gradient of down_blocks.0.downsamplers.0.conv.weight than"):
        bench.main(["--seconds", "0"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value, both", [(math.nan, True), (math.inf, True), (math.nan, False), (math.inf, False), (None, False)])
def test_no_gradient_that_is_not_finite_or_is_not_there_passes(value, both):
    run, right = make_run()
    _, found = bench.micro_batch(run, train.step_loss)
    bench.compare("ours", found, right, 1e-4)
    what = list(found)[3]
    if value is None:
        del found[what]
    for gradients in (found, right) if both else (found,) if value is not None else ():
        gradients[what].view(-1)[0] = value
    with pytest.raises(UserError, match="ours: another gradient of "):
        bench.compare("ours", found, right, 1e-4)


def test_in_half_precision_a_small_parameter_without_a_gradient_is_noticed():
    run, right = make_run(precision="fp16")
    _, found = bench.micro_batch(run, train.step_loss)
    bench.compare("ours", found, right, 0.1)
    sizes = {what: x.norm() for what, x in right.items() if what != "loss"}
    largest = max(sizes.values())
    small = min(sizes, key=lambda what: abs(sizes[what] / largest - 0.03))
    assert 0.02 < sizes[small] / largest < 0.04
    found[small].zero_()
    with pytest.raises(UserError, match=f"another {small} than"):
        bench.compare("ours", found, right, 0.1)


def test_the_plain_step_is_plain_and_the_student_is_not_the_reference():
    run, right = make_run()
    samples, losses = [], []

    def predict(net, x_t, *more):
        samples.append(("ref" if net is run.policies["ref"] else "theta", len(x_t)))
        return type(run.model).predict(run.model, net, x_t, *more)

    run.model.predict = predict
    for loss, expected in ((bench.plain_loss, [("ref", 4), ("ref", 4), ("theta", 4)]), (train.step_loss, [("ref", 2), ("ref", 4), ("theta", 4)])):
        samples.clear()
        losses.append(bench.micro_batch(run, loss)[1]["loss"])
        assert sorted(samples) == expected
    assert all((loss - math.log(2)).abs().min() > 1e-3 for loss in losses)


@pytest.mark.parametrize("name, millions", [("sd14", 859.5), ("sdxl", 2567.5), ("sana", 591.8)])
def test_the_networks_are_of_the_published_sizes(name, millions):
    family, sizes = tiny_models.SIZES[name]
    with torch.device("meta"):
        parts = tiny_models.FAMILIES[family](**sizes).components
    net = parts["transformer" if family == "sana" else "unet"]
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    if family == "sana":
        assert parts["text_encoder"].config.hidden_size == net.config.caption_channels


def test_numbers_out_of_range_are_named(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--micro-batch", "0"])
    assert "argument --micro-batch: must be 1 or more, not 0" in capsys.readouterr().err


def test_the_command_runs_from_the_root_and_ends_with_a_status(monkeypatch, capsys):
    tests = os.path.dirname(os.path.abspath(bench.__file__))
    root = os.path.dirname(tests)
    monkeypatch.setattr(sys, "path", [tests, *[path for path in sys.path if path not in (tests, root, "")]])
    monkeypatch.setattr(sys, "argv", ["bench.py", "--micro-batch", "0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(bench.__file__, run_name="__main__")
    assert sys.path[0] == root and "must be 1 or more" in capsys.readouterr().err
