"""Every family of models.py through the whole pipeline: prompts, pairs, training, a stop, the result, an image."""

import json
import os

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import DiffusionPipeline
from test_train import read_log

import build_pairs
import evaluate
import train
from lib import adapters, models, plots, runs

FAMILIES = ["sd", "sd2", "sdxl", "sana", "sd3"]
FLAGS = ["--batch-size", "4", "--micro-batch", "2", "--warmup", "0", "--lr", "1e-4", "--beta", "500", "--save-every", "2"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, prompts, tmp_path_factory):
    """A model's folder and its pair store."""
    home = tmp_path_factory.mktemp(request.param)
    tiny_models.make(str(home / "model"), request.param)
    build_pairs.main(["--model", str(home / "model"), "--prompts", prompts, "--out", str(home / "pairs"), "--steps", "2"])
    return str(home / "model"), str(home / "pairs")


def run(model, pairs, out, *flags):
    train.main(["--model", model, "--pairs", pairs, "--out", str(out), *FLAGS, *map(str, flags)])


def newest(out):
    return torch.load(runs.checkpoints(str(out))[0], weights_only=True)["net"]


@pytest.mark.parametrize("rank", [0, 4])
def test_prompts_to_pairs_to_training_to_a_stop_to_a_result_to_an_image(family, rank, tmp_path):
    model, pairs = family
    run(model, pairs, tmp_path / "straight", "--updates", 4, "--lora-rank", rank)
    run(model, pairs, tmp_path / "stopped", "--updates", 2, "--lora-rank", rank)
    run(model, pairs, tmp_path / "stopped", "--updates", 4, "--lora-rank", rank)
    trained, again = newest(tmp_path / "straight"), newest(tmp_path / "stopped")
    assert trained.keys() == again.keys() and all((trained[name] == again[name]).all() for name in trained)
    log = read_log(tmp_path / "straight")
    assert log == read_log(tmp_path / "stopped") and log[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert log[0]["logit"] == log[0]["drift"] == 0 and log[3]["loss"] < np.log(2) and log[3]["loser"] > 0

    original, result = models.load(model), tmp_path / "straight" / ("lora" if rank else "pipeline")
    if rank:  # the adapter alone was trained, and load_lora_weights gives the model of the last checkpoint
        assert all(".lora_" in name for name in trained)
        pipe = DiffusionPipeline.from_pretrained(model)
        pipe.load_lora_weights(result)
        adapters.add_lora(original.net, rank)
    else:
        pipe = DiffusionPipeline.from_pretrained(result)
        assert {p.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module) for p in part.parameters()} == {torch.float32}
    tuned = getattr(pipe, original.net_name)
    c, t = original.encode(["a red fox", "a blue cup"]), torch.tensor([100, 800])
    x_t = torch.randn(2, *original.latent_shape)
    with torch.no_grad():
        before = original.predict(original.net, x_t, t, c)
        original.net.load_state_dict(trained, strict=not rank)
        expected, exported = (original.predict(net, x_t, t, c) for net in (original.net, tuned))
    torch.testing.assert_close(exported, expected, rtol=1e-5, atol=1e-6)
    assert (exported - before).abs().max() > (1e-6 if rank else 1e-4)

    (tmp_path / "prompts.txt").write_text("a red fox\n")
    evaluate.main(["grid", "--models", model, str(result), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "2",
                   "--out", str(tmp_path / "grid.png")])
    assert plots.plt.imread(tmp_path / "grid.png").std() > 0.05


def test_trained_adapters_as_winning_and_losing_policies(family, tmp_path):
    model, pairs = family
    for side in "wl":
        run_flags = ["--objective", "sft", "--side", side, "--lora-rank", "2", "--batch-size", "4", "--updates", "3", "--warmup",
                     "0", "--lr", "1e-2"]
        train.main(["--model", model, "--pairs", pairs, "--out", str(tmp_path / side), *run_flags])
        assert "logit" not in read_log(tmp_path / side)[0]
    run(model, pairs, tmp_path / "run", "--winner", tmp_path / "w" / "lora", "--loser", tmp_path / "l" / "lora", "--lora-rank", 4,
        "--updates", 4)
    log = read_log(tmp_path / "run")
    assert log[0]["loss"] == pytest.approx(np.log(2), rel=1e-6) and log[0]["drift"] == 0 and log[3]["loss"] < np.log(2)
    trained = newest(tmp_path / "run")
    assert trained and all(".theta." in name for name in trained)  # the policies stay as they were
    assert json.loads((tmp_path / "run" / "lora" / "training.json").read_text())["winner"] == os.path.join(tmp_path, "w", "lora")
