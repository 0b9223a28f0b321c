"""models.py on small random-weight models of every family, against diffusers' own pipelines and schedulers."""

import copy
import inspect
import json
import os
import shutil
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_models
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from lib import adapters, models, parts
from lib.files import UserError

PROMPTS = ["a red fox", "a blue cup on a hill"]
T = torch.arange(1000)
close = torch.testing.assert_close


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def model(request, family_folders):
    model = models.load(family_folders[request.param])
    model.family, model.folder = request.param, family_folders[request.param]
    return model


@pytest.fixture(scope="module")
def theirs(model):
    return diffusers.DiffusionPipeline.from_pretrained(model.folder)


def as_a_user(pipe, x_T, guidance=4.0, **more):
    more |= dict(use_resolution_binning=False) if isinstance(pipe, diffusers.SanaPipeline) else {}
    return pipe(PROMPTS, latents=x_T, num_inference_steps=3, guidance_scale=guidance, height=64, width=64, **more).images


def first_call(net, run):
    """What `run` gives net in its first call, by the names of the arguments."""
    calls, bind = [], inspect.signature(net.forward).bind
    hook = net.register_forward_pre_hook(lambda _, args, kwargs: calls.append(bind(*args, **kwargs).arguments), with_kwargs=True)
    run()
    hook.remove()
    return calls[0]


def inputs(model):
    """x_t, t and c of two prompts."""
    x_t = torch.stack([models.initial_noise(seed, model.latent_shape) for seed in (4, 5)])
    return x_t, torch.tensor([30, 900]), model.encode(PROMPTS)


def edited(folder, path, file, **changes):
    """A copy of the folder with some entries of one of its json files changed, or with None removed."""
    shutil.copytree(folder, path)
    config = json.loads((path / file).read_text()) | changes
    (path / file).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return str(path)


def test_a_model_is_its_weights_its_schedule_and_its_shape_and_not_its_path(sd, tmp_path, monkeypatch):
    def of(path):
        return models.model_checksum(models.load(str(path)))

    def with_file(name, file, **changes):
        return edited(sd, tmp_path / name, file, **changes)

    original = of(sd)
    shutil.copytree(sd, tmp_path / "copy")
    (tmp_path / "copy" / "training.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert of("./copy") == of("copy/") == of(tmp_path / "copy") == original
    others = [with_file("trailing", "scheduler/scheduler_config.json", timestep_spacing="trailing"),
              with_file("small", "unet/config.json", sample_size=4)]
    for part in ("unet", "vae", "text_encoder"):
        path = tmp_path / f"other-{part}"
        shutil.copytree(sd, path)
        file = next((path / part).glob("*.safetensors"))
        weights = load_file(file)
        weights[max(weights)] = weights[max(weights)] + 1e-3
        save_file(weights, file, metadata=dict(format="pt"))
        others.append(path)
    assert len({original, *map(of, others)}) == 1 + len(others)


def test_a_model_of_the_hub_has_the_checksum_of_its_files_in_the_cache(sd, tmp_path, monkeypatch):
    cache = tmp_path / "models--owner--name"
    shutil.copytree(sd, cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert models.model_checksum(models.load("owner/name")) == models.model_checksum(models.load(sd))


def test_noise_and_target_are_those_of_diffusers_in_float32_also_for_half_latents(model):
    torch.manual_seed(0)
    x_0, eps = (torch.randn(1000, *model.latent_shape).bfloat16() for _ in range(2))
    half = models.load(model.folder, dtype=torch.bfloat16)
    flow, x, e = model.net_name == "transformer", x_0.float(), eps.float()
    if flow:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        x_t, target = scheduler.scale_noise(x, scheduler.timesteps.flip(0), e), e - x
    else:
        scheduler = diffusers.DDPMScheduler.from_config(model.pipe.scheduler.config, clip_sample=False)
        x_t, target = scheduler.add_noise(x, e, T), scheduler.get_velocity(x, e, T) if model.family == "sd2" else e
    assert model.num_train_timesteps == 1000
    for one in (model, half):  # in bfloat16 itself, the noise would be 0 at t = 0 and 1 (sd)
        ours, our_target = one.noise(x_0, T, eps), one.target(x_0, T, eps)
        assert ours.dtype == our_target.dtype == torch.float32
        close(ours, x_t, rtol=1e-5, atol=2e-6)
        close(our_target, target, rtol=1e-5, atol=2e-6)
    for t in (0, 1, 500, 999):  # a network that said the target would give x_0 back
        if flow:
            scheduler.set_timesteps(sigmas=[(t + 1) / 1000])  # one step to 0
            found = scheduler.step(our_target[t], scheduler.timesteps[0], ours[t]).prev_sample
        else:
            found = scheduler.step(our_target[t], t, ours[t]).pred_original_sample
        close(found, x[t], rtol=1e-3, atol=2e-4)


def test_only_sd3_weights_beta_by_sigma_squared_and_draws_t_from_the_logit_normal_law(model):
    sigma = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.flip(0)[-1000:]
    close(model.weight(T), sigma**2 if model.family == "sd3" else torch.ones(1000))
    rng, n = np.random.default_rng(0), 40000
    t = torch.tensor([model.sample_t(rng) for _ in range(n)])
    edges = torch.arange(0, 1.01, 0.05, dtype=torch.float64)
    cdf = torch.special.ndtr(torch.logit(edges)) if model.family == "sd3" else edges
    counts, expected = torch.bincount(t // 50, minlength=20), n * cdf.diff()
    chi_squared = ((counts - expected) ** 2 / expected)[expected > 5].sum()
    assert len(counts) == 20 and chi_squared < 43.8  # 0.1 % of chi-squared with 19 degrees of freedom
    assert t.min() >= 0 and t.max() <= 999 and (model.family == "sd3" or t.min() == 0 and t.max() == 999)


def test_encode_gives_what_the_pipeline_gives_its_network(model, theirs):
    x_T, _, c = inputs(model)
    call = first_call(getattr(theirs, model.net_name), lambda: as_a_user(theirs, x_T))
    call |= call.get("added_cond_kwargs") or {}
    expected = dict(prompt_embeds=call["encoder_hidden_states"], prompt_attention_mask=call.get("encoder_attention_mask"),
                    pooled_prompt_embeds=call.get("text_embeds", call.get("pooled_projections")))
    assert c.keys() == {name for name, x in expected.items() if x is not None}
    for name in c:
        assert c[name].dtype == torch.float32 and not c[name].requires_grad
        close(c[name], expected[name].float()[2:])  # the first two are the empty prompt's
        assert (c[name][0] - c[name][1]).abs().max() > 1e-3


def test_predict_is_the_network_called_as_the_pipeline_calls_it(model, theirs, tmp_path):
    family = model.family
    if family == "sana":  # as SANA-Sprint has it; else 1
        folder = edited(model.folder, tmp_path / "scaled", "transformer/config.json", timestep_scale=0.5)
        model, theirs = models.load(folder), diffusers.DiffusionPipeline.from_pretrained(folder)
    x_t, t, c = inputs(model)
    x_t, t = torch.cat([x_t, x_t + 1]), torch.tensor([0, 30, 500, 900])
    net = getattr(theirs, model.net_name)
    call = first_call(net, lambda: as_a_user(theirs, x_t[:2]))
    empty = dict(call, **call.get("added_cond_kwargs") or {})  # the first two rows of what the pipeline gives
    empty = dict(prompt_embeds=empty["encoder_hidden_states"], prompt_attention_mask=empty.get("encoder_attention_mask"),
                 pooled_prompt_embeds=empty.get("text_embeds", empty.get("pooled_projections")))
    c = {name: torch.cat([empty[name][:2].float(), c[name]]) for name in c}
    time = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps.flip(0)[t] if family in ("sana", "sd3") else t
    call |= {"timestep": time / 2 if family == "sana" else time, "sample" if "sample" in call else "hidden_states": x_t}
    close(first_call(model.net, lambda: model.predict(model.net, x_t, t, c))["timestep"], call["timestep"])
    with torch.no_grad():
        prediction = model.predict(model.net, x_t, t, c)
        close(prediction, net(**call)[0], rtol=1e-3, atol=1e-4)
        for other in [(x_t.roll(1, 0), t, c), (x_t, t.roll(1), c), *[(x_t, t, c | {name: c[name].roll(1, 0)}) for name in c]]:
            assert (model.predict(model.net, *other) - prediction).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_is_the_pipeline_called_with_the_prompts(model, theirs, guidance):
    x_T, _, _ = inputs(model)
    ours = models.sample(model, PROMPTS, x_T, 3, guidance)
    close(ours, as_a_user(theirs, x_T, guidance, output_type="latent"), rtol=1e-3, atol=1e-4)
    assert (ours - models.sample(model, PROMPTS, x_T, 3, guidance + 1)).abs().max() > 1e-3
    for a, b in zip(models.sample(model, PROMPTS, x_T, 3, guidance, "pil"), as_a_user(theirs, x_T, guidance)):
        assert a.size == (64, 64) and np.abs(np.int16(a) - np.int16(b)).max() <= 1


def test_x_0_is_the_pipelines_latents_and_encode_images_their_mean(model, theirs):
    factor, shift = model.latent_scale
    x_0, images = (as_a_user(theirs, inputs(model)[0], output_type=kind) for kind in ("latent", "pt"))
    torch.manual_seed(0)
    pixels, half = torch.rand(2, 3, 64, 64) * 2 - 1, models.load(model.folder, dtype=torch.float16)
    with torch.no_grad():
        close((theirs.vae.decode(x_0 / factor + shift).sample / 2 + 0.5).clamp(0, 1), images)
        for image, expected in zip(models.decode(model, x_0), images.permute(0, 2, 3, 1)):
            assert np.abs(np.asarray(image) - 255 * expected.numpy()).max() <= 1
        for one in (model, half):  # of half precision are then only the weights
            code = copy.deepcopy(one.pipe.vae).float().encode(pixels)
            mean = code.latent if model.family == "sana" else code.latent_dist.mean
            ours = models.encode_images(one, pixels)
            assert ours.dtype == torch.float32 and (models.encode_images(one, pixels) == ours).all()
            close(ours, (mean - shift) * factor)


def test_initial_noise_is_a_function_of_the_seed():
    a, b = models.initial_noise(7, (4, 64, 64)), models.initial_noise(8, (4, 64, 64))
    assert (a == models.initial_noise(7, (4, 64, 64))).all() and a.dtype == torch.float32
    assert abs(a.mean()) < 0.03 and abs(a.std() - 1) < 0.03 and abs((a * b).mean()) < 0.03


def test_an_image_depends_on_its_x_T_alone_also_where_the_sampler_adds_noise(model):
    if model.family not in ("sana", "sd3"):
        model.pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(model.pipe.scheduler.config)
    x_T = torch.stack([models.initial_noise(seed, model.latent_shape) for seed in (3, 4, 5)])
    together = models.sample(model, ["a", "b", "c"], x_T, 3, 3.0)
    torch.manual_seed(9)
    for k, prompt in enumerate("abc"):
        torch.testing.assert_close(models.sample(model, [prompt], x_T[k:k + 1], 3, 3.0)[0], together[k], rtol=1e-3, atol=1e-3)


def test_prompts_are_the_same_to_the_model_where_it_encodes_them_the_same(model):
    """CLIP reads 77 tokens, two of them its own; T5 256; Gemma 300. A token of the tiny tokenizers is a letter."""
    pairs = [("a" * k + "y", "a" * k + "z") for k in (10, 74, 75, 100, 253, 254, 280, 299)]
    rows = [dict(id=c, c=c, c_minus=c_minus) for c, c_minus in pairs] + [dict(id="none", c="a", c_minus=None)]
    encoded = [model.encode(pair) for pair in pairs]
    expected = [c for (c, _), e in zip(pairs, encoded) if all((x[0] == x[1]).all() for x in e.values())]
    assert models.same_tokens(model, rows) == expected
    assert models.count_too_long(model, [c for c, _ in pairs]) == len(expected)  # whose last letter is not read
    assert [len(c) for c in expected] == dict(sana=[300], sd3=[255, 281, 300]).get(model.family, [76, 101, 254, 255, 281, 300])


@pytest.mark.parametrize("scheduler, own, other", [(FlowMatchEulerDiscreteScheduler, "shift", "flow_shift"),
                                                   (DPMSolverMultistepScheduler, "flow_shift", "shift")])
def test_the_shift_in_the_schedulers_file_is_used_by_the_noise_and_the_sampler_or_refused(family_folders, tmp_path, scheduler, own, other):
    file = "scheduler/scheduler_config.json"
    folder = edited(family_folders["sana"], tmp_path / "class", "model_index.json", scheduler=["diffusers", scheduler.__name__])
    folder = edited(folder, tmp_path / own, file, _class_name=scheduler.__name__, **{own: 2.0, other: None})
    model, one, s = models.load(folder), torch.ones(1000, 1, 1, 1), (T + 1) / 1000
    close(model.noise(one * 0, T, one).flatten(), 2 * s / (1 + s))
    expected = scheduler(shift=2.0) if scheduler == FlowMatchEulerDiscreteScheduler else scheduler(
        flow_shift=2.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    for x in (expected, model.pipe.scheduler):
        x.set_timesteps(10)
    close(model.pipe.scheduler.sigmas, expected.sigmas)
    for i, change in enumerate([{own: None}, {own: None, other: 2.0}, dict(use_dynamic_shifting=True)]):
        with pytest.raises(UserError, match="no fixed shift or flow_shift.*: it must be .* of a fixed shift"):
            models.load(edited(folder, tmp_path / f"refused-{i}", file, **change))


@pytest.mark.parametrize("factor", [1.0, 0.0, 300.0])
def test_sanas_attention_is_diffusers_own_and_finite_in_float16_where_that_is_not(family_folders, factor):
    """Keys of 0 divide 0 by 0 in float16, whose 1e-15 is 0; large ones overflow in the sum over tokens."""
    net = diffusers.SanaTransformer2DModel.from_pretrained(family_folders["sana"], subfolder="transformer")
    ours, theirs = (x.transformer_blocks[1].attn1 for x in (models.load(family_folders["sana"]).net, net))
    for attention in (ours, theirs):
        if factor == 1:  # SANA-1.5 has some
            attention.norm_q, attention.norm_k = torch.nn.Softplus(), torch.nn.Tanhshrink()
        attention.to_k.weight.data *= factor
    torch.manual_seed(0)
    x, dtypes = torch.randn(2, 4096, 16), []
    with torch.no_grad():
        exact = ours(x)
        close(exact, theirs(x))
        for layer in (ours.to_q, ours.to_k, ours.to_v, ours.to_out[0]):
            layer.register_forward_hook(lambda _, x, y: dtypes.append(y.dtype))
        with torch.autocast("cpu", torch.float16):
            half, half_theirs = ours(x), theirs(x)
    assert dtypes == [torch.float16] * 4 and (factor == 1 or not half_theirs.isfinite().all())
    close(half.float(), exact, rtol=0.02, atol=1e-2)


def random_adapter(model, folder, seed):
    """Gives model's network an adapter "theta" with random weights, and writes it as runs.finish does."""
    adapters.add_lora(model.net, 2 + seed % 2)
    torch.manual_seed(seed)
    weights = {name: torch.randn_like(p) / 2 for name, p in model.net.named_parameters() if p.requires_grad}
    model.net.load_state_dict(weights, strict=False)
    weights = {name.replace(".theta.", "."): x for name, x in weights.items()}
    type(model.pipe).save_lora_weights(str(folder), **{model.net_name + "_lora_layers": weights})
    return str(folder)


def with_lora(model, adapter, x):
    """The prediction of a separately loaded pipeline that has the adapter as its users load it."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(model.pipe.name_or_path)
    if adapter:
        pipe.load_lora_weights(adapter)
    return model.predict(getattr(pipe, model.net_name), *x)


def test_lora_trains_adapters_of_all_attention_projections_and_starts_at_the_reference(model):
    model = models.load(model.folder)
    x, net = inputs(model), model.net
    before = model.predict(net, *x)
    attention = [(name, module) for name, module in net.named_modules() if type(module).__name__ == "Attention"]
    projections = {f"{name}.{part}" for name, module in attention for part, layer in module.named_modules()
                   if isinstance(layer, torch.nn.Linear)}
    adapters.add_lora(net, 3)
    assert (model.predict(net, *x) == before).all()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert trained.keys() == {f"{name}.lora_{ab}.theta.weight" for name in projections for ab in "AB"}
    assert {min(p.shape) for p in trained.values()} == {3}
    model.predict(net, *x).square().mean().backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == trained.keys()


@torch.no_grad()
def test_one_network_serves_theta_the_reference_the_winner_and_the_loser(model, tmp_path):
    saved = {name: random_adapter(models.load(model.folder), tmp_path / name, i) for i, name in enumerate(["winner", "loser"])}
    model, folder = models.load(model.folder), model.folder
    x, net = inputs(model), model.net
    saved |= dict(theta=random_adapter(model, tmp_path / "theta", 7), ref=None)
    policies = dict(theta=net, ref=adapters.with_adapter(net))
    policies |= {name: adapters.load_policy(saved[name], name, net, model) for name in ("winner", "loser")}
    predictions = {}
    for name in ("winner", "theta", "ref", "loser", "theta", "winner"):  # whatever ran before
        predictions[name] = model.predict(policies[name], *x)
        close(predictions[name], with_lora(model, saved[name], x), rtol=1e-3, atol=1e-4)
        assert net.active_adapters() == ["theta"]
        assert all(p.requires_grad == (".theta." in n) for n, p in net.named_parameters())
    assert min((predictions[a] - predictions[b]).abs().max() for a in policies for b in policies if a != b) > 1e-3
    with pytest.raises(TypeError):
        policies["winner"]()
    assert net.active_adapters() == ["theta"]
    (tmp_path / "loser" / "training.json").write_text(json.dumps(dict(model=folder)))
    close(model.predict(models.load(saved["loser"]).net, *x), predictions["loser"], rtol=1e-3, atol=1e-4)  # as a model of its own


@torch.no_grad()
def test_the_frozen_copy_of_full_training_serves_adapters_and_does_not_follow_the_student(model, tmp_path):
    adapter, folder = random_adapter(models.load(model.folder), tmp_path, 0), model.folder
    model = models.load(folder)
    x, base = inputs(model), copy.deepcopy(model.net).requires_grad_(False)
    winner, whole = adapters.load_policy(adapter, "winner", base, model), adapters.load_policy(folder, "loser", base, model)
    for p in model.net.parameters():
        p.mul_(1.5)
    for policy, expected in ((winner, adapter), (base, None), (whole, None)):
        close(model.predict(policy, *x), with_lora(model, expected, x), rtol=1e-3, atol=1e-4)
    assert (model.predict(model.net, *x) - model.predict(base, *x)).abs().max() > 1e-3
    assert not any(p.requires_grad for net in (base, whole) for p in net.parameters())
    assert all(p.requires_grad for p in model.net.parameters())


@pytest.mark.parametrize("adapter, of, message", [
    ("sd", "sana", "64 of its 64 tensors are for no layer: unet.down"), ("sana", "sd", "32 of its 32 .*: transformer."),
    ("sana", "sd3", "32 of its 32 .*: transformer.transformer_blocks.0.attn1.to_k"), ("sd", "sdxl", "48 of its 64 .*: unet.down_blocks.0")])
def test_an_adapter_of_another_model_is_refused_in_a_sentence(family_folders, tmp_path, adapter, of, message):
    random_adapter(models.load(family_folders[adapter]), tmp_path, 0)
    model = models.load(family_folders[of])
    with pytest.raises(UserError, match=f"--winner .* cannot be read .{message}.*it is no adapter for this model") as stop:
        adapters.load_policy(str(tmp_path), "winner", model.net, model)
    assert "\n" not in str(stop.value)


def test_loaded_in_the_given_precision_but_for_what_float16_breaks_and_on_the_given_device(model, tmp_path):
    wide = dict(sana=["text_encoder", "vae"], sd3=["text_encoder_3"]).get(model.family, [])
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    for dtype, net_dtype in ((float32, None), (bfloat16, None), (float16, None), (float16, float32), (bfloat16, float32)):
        one = models.load(model.folder, dtype=dtype, net_dtype=net_dtype)
        for name, part in one.pipe.components.items():
            expected = bfloat16 if name in wide and dtype == float16 else dtype
            expected = net_dtype or dtype if name == one.net_name else expected
            assert not isinstance(part, torch.nn.Module) or {p.dtype for p in part.parameters()} == {expected}, name
        assert one.dtype == one.net.dtype == (net_dtype or dtype)
    assert {x.dtype for x in one.encode(PROMPTS).values()} == {float32}  # what the network takes
    x_T, images = torch.randn(2, *model.latent_shape), []  # and the pipeline, on a GPU
    for dtype in (float32, float16):
        images += [models.sample(models.load(model.folder, dtype=dtype), PROMPTS[:2], x_T, 2, 3.0, "np")]
    assert np.abs(images[0] - images[1]).mean() < 0.02
    parts = models.load(model.folder, "meta").pipe.components.values()
    assert {p.device.type for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters()} == {"meta"}
    for stored, name in ((bfloat16, "BF16"), (float16, "F16")):  # a model made in bfloat16 stays in it, whatever its path
        models.load(model.folder, dtype=stored).pipe.save_pretrained(tmp_path / name)
        one = models.load(str(tmp_path / name), dtype=float16)
        assert one.stored == name and one.net.dtype == one.dtype == stored
        if stored == bfloat16:
            assert {p.dtype for part in (one.net, one.pipe.text_encoder, one.pipe.vae) for p in part.parameters()} == {bfloat16}
        assert models.load(str(tmp_path / name)).net.dtype == float32


def test_the_preset_and_the_safety_checker_of_a_model(model, tmp_path):
    family = dict(sd="sd14", sd2="sd14").get(model.family, model.family)
    assert models.preset_of(model.folder) == models.preset_of(family) == models.preset_of(models.PRESETS[family]) == family
    if family == "sd14":  # one that is named, as the published models have it, is not even loaded
        parts = dict(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], feature_extractor=["transformers", "CLIPImageProcessor"])
        pipe = models.load(edited(model.folder, tmp_path / "checked", "model_index.json", requires_safety_checker=True, **parts)).pipe
        assert pipe.safety_checker is None and not pipe.config.requires_safety_checker


def test_a_gpu_without_enough_memory_is_no_damaged_model(sd, monkeypatch):
    def to(pipe, device):
        raise torch.OutOfMemoryError("20 GiB")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", to)
    with pytest.raises(torch.OutOfMemoryError, match="20 GiB"):
        models.load(sd)


def damaged(folder, path, part, damage):
    """A copy of the folder with a part damaged."""
    shutil.copytree(folder, path)
    weights = next((path / part).glob("*.safetensors"), None)
    if damage == "gone":
        shutil.rmtree(path / part)
    elif damage == "cut":
        os.truncate(weights, 1000)
    elif damage == "a weight less":
        save_file({name: x for name, x in load_file(weights).items() if not name.endswith("norm_out.weight") and "layer_norm1.weight" not in name},
                  weights, metadata=dict(format="pt"))
    elif damage == "other width":
        save_file({name: x[:1] for name, x in load_file(weights).items()}, weights, metadata=dict(format="pt"))
    else:
        for file in (path / part).glob("*.json"):
            file.write_text(damage)
    return str(path)


@pytest.mark.parametrize("part, damage, said", [
    *[(part, "gone", "cannot be read .*No such file or directory") for part in ("vae", "text_encoder", "tokenizer", "scheduler", "unet")],
    *[(part, "{", "cannot be read") for part in ("vae", "text_encoder", "tokenizer", "scheduler", "unet")],
    *[(part, "[]", "cannot be read .*: copy or download") for part in ("vae", "unet", "scheduler")],
    *[(part, "[]", "cannot be read") for part in ("text_encoder", "tokenizer")],
    *[(part, "other width", "is not whole, or of another model: its config.json does not fit") for part in ("vae", "text_encoder", "unet")],
    *[(part, "cut", "cannot be read") for part in ("vae", "text_encoder")],
    ("vae", "a weight less", r"is not whole, or of another model: its config.json does not fit \['decoder.conv_norm_out.weight', 'encoder.conv_norm_out.weight'\]"),
    ("unet", "a weight less", r"is not whole, or of another model: its config.json does not fit \['conv_norm_out.weight'\]"),
    ("text_encoder", "a weight less", r"is not whole, or of another model: its config.json does not fit \['.*layer_norm1.weight'")])
def test_a_damaged_part_of_a_model_is_named(part, damage, said, family_folders, tmp_path):
    with pytest.raises(UserError, match=f"its {part} {said}") as stop:
        models.load(damaged(family_folders["sd"], tmp_path / "model", part, damage))
    assert "\n" not in str(stop.value)


def test_a_tokenizer_without_its_vocabulary_and_a_damaged_index_are_named(family_folders, tmp_path):
    path = Path(shutil.copytree(family_folders["sd"], tmp_path / "model"))
    for file in (path / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="its tokenizer"):
        models.load(str(path))
    index = json.loads((path / "model_index.json").read_text())
    shutil.copytree(Path(family_folders["sd"]) / "tokenizer", path / "tokenizer", dirs_exist_ok=True)
    for content in ([], {k: v for k, v in index.items() if k != "vae"}, index | dict(vae=["diffusers", "Nope"]), index | dict(vae="x")):
        (path / "model_index.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="(model_index.json|its vae) cannot be read"):
            models.load(str(path))


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_that_is_said_within_ten_seconds(offline, monkeypatch):
    monkeypatch.setattr(parts.huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(parts.huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing answers
    parts.download.cache_clear()
    since = time.monotonic()
    for name, path in (("sd14", "CompVis/stable-diffusion-v1-4"), ("owner/none", "owner/none")):
        with pytest.raises(UserError, match=f"the hub could not be reached, and the cache has no whole {path}") as stop:
            models.load(name)
        assert ("is no preset" in str(stop.value)) == (name != "sd14")
    assert time.monotonic() - since < 10
    parts.download.cache_clear()


def test_shapes_and_what_was_tuned_from_it_sample_with_their_own_guidance(family_folders, tmp_path):
    tuned = shutil.copytree(family_folders["sd"], tmp_path / "tuned")
    (tuned / "training.json").write_text(json.dumps(dict(model="shapes", preset="shapes")))
    for name, guidance in (("shapes", 3), (str(tuned), 3), (family_folders["sd"], 7.5), (family_folders["sdxl"], 5)):
        model = models.load(name, text=False)
        assert (model.guidance, model.steps) == (guidance, 25) and model.pipe.text_encoder is model.pipe.tokenizer is None
    assert models.preset_of(str(tuned)) == "shapes"


def test_what_cannot_be_loaded_is_said_in_a_sentence_and_code_of_a_model_never_runs(family_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sd = family_folders["sd"]
    flux = edited(sd, tmp_path / "flux", "model_index.json", _class_name="FluxPipeline")
    says_x_0 = edited(sd, tmp_path / "x_0", "scheduler/scheduler_config.json", prediction_type="sample")
    for name, message in ((str(tmp_path / "nothing"), "nothing is no preset"),
                          (flux, "is a FluxPipeline, but only StableDiffusionPipeline, .* are supported"),
                          (says_x_0, "its scheduler cannot be read .it predicts sample.: it must be DDPM's for epsilon or v")):
        with pytest.raises(UserError, match=message):
            models.load(name)
    for part, name, pickle in (("unet", "diffusion_pytorch_model", "diffusion_pytorch_model"), ("text_encoder", "model", "pytorch_model")):
        weights = Path(edited(sd, tmp_path / part, "model_index.json")) / part / f"{name}.safetensors"
        torch.save(load_file(weights), weights.with_name(pickle + ".bin"))  # which may run code
        weights.unlink()
        with pytest.raises(UserError, match=f"Error no file named {weights.name}.*with weights as .safetensors"):
            models.load(str(tmp_path / part))
    custom = edited(sd, tmp_path / "custom", "model_index.json", unet=["mine", "MyUNet"])
    Path(custom, "unet", "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="custom code in mine.py"):
        models.load(custom)
    assert not (tmp_path / "ran").exists()
