"""models.py on a small random-weight Stable Diffusion of the real classes."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

import models


@pytest.fixture(scope="module")
def model(sd):
    return models.load(sd)


def test_noise_is_diffusers_forward_process_in_float32(model):
    x_0, eps = torch.randn(1000, 4, 8, 8), torch.randn(1000, 4, 8, 8)
    t = torch.arange(1000)
    expected = DDPMScheduler.from_config(model.pipe.scheduler.config).add_noise(x_0, eps, t)
    torch.testing.assert_close(model.noise(x_0, t, eps), expected, rtol=1e-5, atol=1e-6)
    half = model.noise(x_0.bfloat16(), t, eps.bfloat16())  # in bfloat16 itself, sigma would be 0 at t = 0 and 1
    assert half.dtype == torch.float32
    assert (half - model.noise(x_0.bfloat16() * 0, t, eps.bfloat16() * 0)).flatten(1).std(1).min() > 0.5
    alone = model.noise(torch.zeros(1000, 4, 8, 8).bfloat16(), t, eps.bfloat16())
    torch.testing.assert_close(alone[:2].std(), eps[:2].std() * (1 - model.alpha_bar[:2]).sqrt().mean(), rtol=0.1, atol=0)


def test_different_prompts_are_encoded_differently_and_as_the_pipeline_does(model):
    c = model.encode(["a red fox", "a red", ""])
    assert c.shape == (3, 77, 32) and not c.requires_grad
    assert min((c[i] - c[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3
    ids = model.pipe.tokenizer(["a red"], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    torch.testing.assert_close(c[1:2], model.pipe.text_encoder(ids)[0])


def test_predict_is_the_networks_own_output_and_depends_on_everything(model):
    x_t, t, c = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), model.encode(["a red fox", "a red"])
    eps = model.predict(model.net, x_t, t, c)
    torch.testing.assert_close(eps, model.net(x_t, t, c).sample)
    for other in ((x_t.roll(1, 0), t, c), (x_t, t.roll(1), c), (x_t, t, c.roll(1, 0))):
        assert (model.predict(model.net, *other) - eps).abs().max() > 1e-4


def test_time_steps_are_uniform_over_all_of_them(model):
    rng = np.random.default_rng(0)
    t = torch.tensor([model.sample_t(rng) for _ in range(20000)])
    assert t.min() == 0 and t.max() == 999 and abs(t.float().mean() - 499.5) < 8
    counts = torch.bincount(t // 100)
    assert counts.min() > 1800 and counts.max() < 2200


def test_sampling_is_the_pipelines_own_with_guidance(sd, model):
    x_T = torch.stack([models.initial_noise(s, model.latent_shape) for s in (4, 5)])
    ours = model.sample(model.encode(["a red fox", "a blue cup"]), x_T, 3, 7.5)
    pipe = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(["a red fox", "a blue cup"], latents=x_T, num_inference_steps=3, guidance_scale=7.5, output_type="latent")
    torch.testing.assert_close(ours, theirs.images)
    without = model.sample(model.encode(["a red fox", "a blue cup"]), x_T, 3, 1.0)
    assert (ours - without).abs().max() > 1e-3


def test_initial_noise_is_a_function_of_the_seed():
    a, b = models.initial_noise(7, (4, 64, 64)), models.initial_noise(8, (4, 64, 64))
    assert (a == models.initial_noise(7, (4, 64, 64))).all() and a.dtype == torch.float32
    assert abs(a.mean()) < 0.03 and abs(a.std() - 1) < 0.03 and abs((a * b).mean()) < 0.03


def test_loaded_in_one_precision_without_safety_checker(sd):
    model = models.load(sd, dtype=torch.bfloat16)
    parts = [model.net, model.pipe.text_encoder, model.pipe.vae]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
    assert model.pipe.safety_checker is None
    assert model.alpha_bar.dtype == torch.float32


def test_what_cannot_be_loaded_is_said_in_a_sentence(sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="there is no runs/shapes-0/reference yet: make it with  python shapes.py"):
        models.load("shapes")
    with pytest.raises(SystemExit, match="nothing is no preset"):
        models.load(str(tmp_path / "nothing"))
    for file, key, value, message in (("model_index.json", "_class_name", "FluxPipeline", "FluxPipeline; supported are"),
                                      ("scheduler/scheduler_config.json", "prediction_type", "v_prediction", "only epsilon")):
        folder = tmp_path / key
        shutil.copytree(sd, folder)
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | {key: value}))
        with pytest.raises(SystemExit, match=message):
            models.load(str(folder))


def test_alone_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with models.processes() as (rank, world, device):
        assert (rank, world) == (0, 1) and device.type in ("cpu", "cuda")
    assert "RANK" not in os.environ
