"""The published models' layout in small: file names, tensor names, variants, adapters, the hub, and the result elsewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import hub
import pytest
import tiny_models
import torch
import yaml
from conftest import read_folder
from safetensors.torch import load_file, save_file
from test_models import PROMPTS, edited, inputs, random_adapter

import loss
import train
from lib import adapters, models, parts, processes
from lib.files import UserError

ROOT = Path(__file__).resolve().parent.parent
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 3438167534\n"  # of git-lfs
RUN = ["--batch-size", "2", "--micro-batch", "2", "--warmup", "0", "--lr", "1e-3", "--beta", "500"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{family: folder} of sd and sdxl in the published layout."""
    folders = {family: str(tmp_path_factory.mktemp("published") / family) for family in ("sd", "sdxl")}
    for family, folder in folders.items():
        tiny_models.make(folder, family)
        tiny_models.as_published(folder)
    return folders


@pytest.fixture
def only_half(published, tmp_path):
    """A folder of sd with weights of the variant fp16 alone."""
    folder = Path(shutil.copytree(published["sd"], tmp_path / "half"))
    for path in folder.glob("*/*.safetensors"):
        if not path.name.endswith(".fp16.safetensors"):
            path.unlink()
    return str(folder)


def tune(model, pairs, out, *flags):
    train.main(["--model", str(model), "--pairs", pairs, "--out", str(out), "--updates", "1", *RUN, *map(str, flags)])


def equal(one, other):
    """Whether two pipelines have the same weights, to the bit."""
    nets = [(part, other.components[name]) for name, part in one.components.items() if isinstance(part, torch.nn.Module)]
    return all(torch.equal(x.float(), y.float()) for a, b in nets for x, y in zip(a.parameters(), b.parameters(), strict=True))


def refused(name, said, **more):
    with pytest.raises(UserError, match=said) as stop:
        models.load(str(name), **more)
    assert "\n" not in str(stop.value) and "could not be reached" not in str(stop.value)


# ---- folders


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_folder_in_the_published_layout_is_the_same_model(published, family_folders, family):
    ours, plain = models.load(published[family]), models.load(family_folders[family])
    assert equal(ours.pipe, plain.pipe) and ours.stored == "F32"
    c, expected = (model.encode(["a Red fox, at 3"]) for model in (ours, plain))
    assert all(torch.equal(c[name], expected[name]) for name in expected)


def test_the_files_of_another_variant_change_neither_the_model_nor_its_checksum_nor_its_precision(published, pairs, tmp_path):
    folder = Path(shutil.copytree(published["sd"], tmp_path / "sd"))
    tune(folder, pairs, tmp_path / "run", "--winner", folder, "--loser", tiny_of(tmp_path / "other"))
    before = models.model_checksum(models.load(str(folder)))
    for part in ("unet", "vae", "text_encoder"):
        file = next((folder / part).glob("*.fp16.safetensors"))
        weights = {name: x.bfloat16() for name, x in load_file(file).items()}
        save_file(weights, file.with_name(file.name.replace("fp16", "a_bf16")), metadata=dict(format="pt"))
    model = models.load(str(folder), dtype=torch.float16)
    assert models.model_checksum(model) == before and model.stored == "F32" and model.dtype == torch.float16
    done = read_folder(tmp_path / "run")
    tune(folder, pairs, tmp_path / "run", "--winner", folder, "--loser", tmp_path / "other")  # it is the same run
    assert read_folder(tmp_path / "run").keys() == done.keys()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: x + 1e-3 for name, x in load_file(file).items()}, file, metadata=dict(format="pt"))
    assert models.model_checksum(models.load(str(folder))) != before


def tiny_of(folder):
    tiny_models.make(str(folder), seed=1)
    return folder


def shards(folder, part, dtype):
    """Divides a part's plain weights into two shards in a precision, with their index."""
    path = next(path for path in (folder / part).glob("*.safetensors") if path.stem in ("model", "diffusion_pytorch_model"))
    weights, index = {name: x.to(dtype) for name, x in load_file(path).items()}, {}
    for k in (0, 1):
        half = dict(sorted(weights.items())[k::2])
        name = f"{path.stem}-0000{k + 1}-of-00002.safetensors"
        save_file(half, path.with_name(name), metadata=dict(format="pt"))
        index |= dict.fromkeys(half, name)
    path.with_name(path.name + ".index.json").write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=index)))
    path.unlink()


def test_precision_is_that_of_the_shards_in_the_index_and_sana_1_6b_is_a_bf16_model(family_folders, tmp_path, monkeypatch):
    """Its plain files are float32, and *.bf16.safetensors, which comes first in the alphabet, lies beside them."""
    folder = Path(shutil.copytree(family_folders["sana"], tmp_path / "sana"))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: x.bfloat16() for name, x in load_file(file).items()}, file.with_suffix(".bf16.safetensors"), metadata=dict(format="pt"))
    shards(folder, "transformer", torch.float32)
    shards(folder, "text_encoder", torch.float32)
    model = models.load(str(folder), dtype=torch.float16)
    assert (model.stored, model.dtype) == ("F32", torch.float16) and equal(model.pipe, models.load(family_folders["sana"], dtype=torch.float16).pipe)
    checksum = models.model_checksum(model)
    (folder / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors").touch()
    file.with_suffix(".bf16.safetensors").unlink()
    assert models.model_checksum(models.load(str(folder))) == checksum
    monkeypatch.setitem(models.PRESETS, "sana-1.6b", str(folder))
    for name in ("sana-1.6b", str(folder)):
        model = models.load(name, dtype=torch.float16, net_dtype=torch.float32)
        assert model.stored == "BF16" and model.pipe.text_encoder.dtype == torch.bfloat16 and model.net.dtype == torch.float32
    os.remove(folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors")
    refused(folder, "its transformer|00002-of-00002")


def test_the_weights_of_a_unet_are_the_shards_of_its_index_whatever_else_lies_beside_them(sd, tmp_path):
    folder = Path(shutil.copytree(sd, tmp_path / "sd"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    others = {name: (x + 1).bfloat16() for name, x in load_file(file).items()}
    shards(folder, "unet", torch.float32)
    before = models.model_checksum(models.load(str(folder)))
    for name in (file.name, f"{file.stem}-00003-of-00003.safetensors", f"{file.stem}.bf16.safetensors"):
        save_file(others, file.with_name(name), metadata=dict(format="pt"))
    model = models.load(str(folder))
    assert models.model_checksum(model) == before and model.stored == parts.stored_dtype(str(folder), "unet") == "F32"
    assert equal(model.pipe, models.load(sd).pipe)


def test_a_variant_that_no_file_has_is_refused(published, only_half):
    refused(published["sd"] + "@fp61", "@fp61: its unet has no weights of the variant fp61")
    refused(only_half + "@fp61", "has only weights of the variant fp16: give NAME@fp16")


def test_a_folder_with_one_variant_alone_is_taken_by_its_name(only_half, published, pairs, tmp_path):
    refused(only_half, "its (vae|text_encoder|unet) has only weights of the variant fp16: give NAME@fp16")
    half, whole = models.load(only_half + "@fp16"), models.load(published["sd"])
    assert equal(half.pipe, models.load(published["sd"], dtype=torch.float16).pipe) and half.stored == "F16"
    assert models.model_checksum(half) == models.model_checksum(models.load(published["sd"] + "@fp16")) != models.model_checksum(whole)
    tune(only_half + "@fp16", pairs, tmp_path / "run")
    assert all(".fp16" not in name for name in read_folder(tmp_path / "run" / "pipeline"))  # the result has plain names
    tuned = models.load(str(tmp_path / "run" / "pipeline"))
    assert torch.equal(tuned.pipe.vae.decoder.conv_in.weight, half.pipe.vae.decoder.conv_in.weight)
    assert models.preset_of(only_half + "@fp16") == models.preset_of("sd14@fp16") == "sd14"


def test_a_variant_in_shards_becomes_plain_shards_in_the_result(only_half, tmp_path):
    folder = Path(only_half)
    file = folder / "text_encoder" / "model.fp16.safetensors"
    weights, index = load_file(file), {}
    for k in (0, 1):
        name = f"model.fp16-0000{k + 1}-of-00002.safetensors"
        save_file(dict(sorted(weights.items())[k::2]), file.with_name(name), metadata=dict(format="pt"))
        index |= dict.fromkeys(sorted(weights)[k::2], name)
    file.with_name("model.safetensors.index.fp16.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
    file.unlink()
    parts.copy_parts(*models.find(only_half + "@fp16"), "unet", str(tmp_path / "copy"))
    shutil.copytree(folder / "unet", tmp_path / "copy" / "unet")
    (tmp_path / "copy" / "unet" / "diffusion_pytorch_model.fp16.safetensors").rename(tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors")
    assert equal(models.load(str(tmp_path / "copy")).pipe, models.load(only_half + "@fp16").pipe)


@pytest.mark.parametrize("part, change, said", [
    ("unet", "pointer", "unet/diffusion_pytorch_model.safetensors cannot be read .*git lfs pull, where they are pointers"),
    ("text_encoder", "pointer", "its text_encoder cannot be read .*git lfs pull, where they are pointers"),
    ("unet", "int8", "its unet is stored in I8: only models in floating point are read"),
    ("unet", "zeros", "its unet has weights of 0 only"), ("vae", "zeros", "its vae has weights of 0 only"),
    ("unet", "one more", r"its unet is not whole, or of another model: its config.json does not fit \['other.weight'\]")])
def test_weights_that_are_not_what_they_should_be(family_folders, tmp_path, part, change, said):
    folder = shutil.copytree(family_folders["sd"], tmp_path / "sd")
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    if change == "pointer":
        file.write_text(POINTER)
    else:
        changed = dict(int8=lambda x: x.to(torch.int8), zeros=torch.zeros_like).get(change, lambda x: x)
        weights = {name: changed(x) for name, x in weights.items()} | ({"other.weight": torch.ones(3)} if change == "one more" else {})
        save_file(weights, file, metadata=dict(format="pt"))
    refused(folder, said)


def test_the_model_of_this_repository_is_known_by_its_checksum(tmp_path, monkeypatch):
    folder = shutil.copytree(models.PRESETS["shapes"], tmp_path / "shapes")
    monkeypatch.setitem(models.PRESETS, "shapes", str(folder))
    monkeypatch.setattr(models, "CHECKSUMS", {str(folder): checksum for checksum in models.CHECKSUMS.values()})
    assert models.load("shapes").guidance == 3
    for file in ("unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        content = bytearray((folder / file).read_bytes())
        content[-2] ^= 1
        (folder / file).write_bytes(content)
        refused("shapes", "is not as it is in this repository: git checkout brings it back|its (tokenizer|scheduler) cannot be read")
        content[-2] ^= 1
        (folder / file).write_bytes(content)
    models.load("shapes")
    shutil.rmtree(folder)
    refused("shapes", f"shapes: there is no {folder}/model_index.json")


@pytest.mark.parametrize("file, change", [
    ("vae/config.json", lambda text: text.replace('"layers_per_block": ', '"layers_per_block":\t')),
    ("tokenizer/tokenizer.json", lambda text: text.replace('"red</w>": 351', '"red</w>": 347').replace('"blue</w>": 347', '"blue</w>": 351'))])
def test_a_changed_setting_and_swapped_words_of_the_model_of_this_repository_are_noticed(file, change, tmp_path, monkeypatch):
    folder = shutil.copytree(models.PRESETS["shapes"], tmp_path / "shapes")
    monkeypatch.setitem(models.PRESETS, "shapes", str(folder))
    monkeypatch.setattr(models, "CHECKSUMS", {str(folder): checksum for checksum in models.CHECKSUMS.values()})
    models.load("shapes")
    before = (folder / file).read_text()
    (folder / file).write_text(change(before))
    assert json.loads(change(before)) and change(before) != before
    for text in (True, False):  # with or without the text encoder
        refused("shapes", f"{folder} is not as it is in this repository: git checkout brings it back", text=text)


@pytest.mark.parametrize("family, scheduler, said", [
    ("sd", "EDMDPMSolverMultistepScheduler", "its scheduler cannot be read .*EDMDPMSolverMultistepScheduler.*alphas_cumprod.*: it must be DDPM's"),
    ("sdxl", "EDMEulerScheduler", "its scheduler cannot be read .*EDMEulerScheduler.*alphas_cumprod.*: it must be DDPM's"),
    ("sdxl", "FlowMatchEulerDiscreteScheduler", "its scheduler cannot be read .it predicts None.: it must be DDPM's for epsilon or v"),
    ("sana", "DDIMScheduler", "DDIMScheduler has no use_flow_sigmas, or no fixed shift"),
    ("sana", "DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler has no use_flow_sigmas, or no fixed shift"),
    ("sd3", "EDMEulerScheduler", "EDMEulerScheduler has no use_flow_sigmas, or no fixed shift")])
def test_a_scheduler_of_another_kind_is_named(family_folders, tmp_path, family, scheduler, said):
    folder = edited(family_folders[family], tmp_path / "model", "model_index.json", scheduler=["diffusers", scheduler])
    shutil.rmtree(os.path.join(folder, "scheduler"))
    getattr(diffusers, scheduler)().save_pretrained(os.path.join(folder, "scheduler"))
    refused(folder, said)


@pytest.mark.parametrize("change, said", [
    (lambda w: {name: x.to(torch.int8) for name, x in w.items()}, "is stored in I8: only models in floating point are read"),
    (lambda w: w | {"other.weight": torch.ones(3)}, r"is not whole, or of another model: its config.json does not fit \['other.weight'\]")])
def test_a_unet_alone_is_checked_as_that_of_a_model_is_in_a_folder_of_any_name(change, said, sd, tmp_path):
    folder = shutil.copytree(Path(sd) / "unet", tmp_path / "alone")
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(file)), file, metadata=dict(format="pt"))
    model = models.load(sd)
    before = model.net
    with pytest.raises(UserError, match=f"^{tmp_path}: its alone {said}"):
        parts.replace_unet(model, str(folder))
    assert model.net is before


@pytest.mark.parametrize("family, part", [("sd", "unet"), ("sdxl", "unet"), ("sana", "transformer"), ("sd3", "transformer")])
def test_images_that_are_not_square_are_refused(family_folders, tmp_path, family, part):
    folder = edited(family_folders[family], tmp_path / "model", f"{part}/config.json", sample_size=[8, 12])
    refused(folder, rf"its {part} has the sample_size \[8, 12\]: only square images are supported")


def test_sd3_goes_without_t5(family_folders, tmp_path):
    folder = edited(family_folders["sd3"], tmp_path / "model", "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(os.path.join(folder, part))
    model, theirs = models.load(folder), diffusers.DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    embeds, _, pooled, _ = theirs.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    c = model.encode(PROMPTS)
    assert torch.equal(c["prompt_embeds"], embeds) and torch.equal(c["pooled_prompt_embeds"], pooled) and len(model.tokenizers) == 2
    x_t, t, _ = inputs(model)
    assert model.predict(model.net, x_t, t, c).isfinite().all()
    assert models.sample(model, PROMPTS, x_t, 2, 4.0).shape == x_t.shape


def test_sdxl_marks_no_image_where_invisible_watermark_is_installed(family_folders, monkeypatch):
    pipeline = sys.modules[diffusers.StableDiffusionXLPipeline.__module__]
    monkeypatch.setattr(pipeline, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(pipeline, "StableDiffusionXLWatermarker", lambda: "marks", raising=False)
    assert diffusers.DiffusionPipeline.from_pretrained(family_folders["sdxl"]).watermark == "marks"
    assert models.load(family_folders["sdxl"]).pipe.watermark is None


def test_prompts_that_sana_reads_in_lower_case_are_the_same_pair(family_folders):
    rows = [dict(id=i, c=c, c_minus="a red cube") for i, c in enumerate(["a Red cube", " a red CUBE ", "a red Cup"])]
    assert models.same_tokens(models.load(family_folders["sana"]), rows) == [0, 1]
    for family in ("sd", "sd3"):
        model = models.load(family_folders[family])
        c, c_minus = model.encode(["a Red cube"]), model.encode(["a red cube"])
        assert models.same_tokens(model, rows[:1]) == ([0] if all(torch.equal(c[name], c_minus[name]) for name in c) else [])


# ---- names


def test_a_name_that_is_none_is_answered_by_what_to_give_instead(sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, tuned = tmp_path / "runs" / "x", tmp_path / "runs" / "y"
    shutil.copytree(sd, tuned / "pipeline")
    (run / "lora").mkdir(parents=True)
    Path("checkpoint-000040.pt").touch()
    Path("mine.safetensors").touch()
    refused("runs/x", "runs/x is no preset .* and no diffusers folder: give .*runs/x/lora")
    refused("runs/y/", "runs/y/ is no preset .* and no diffusers folder: give .*runs/y/pipeline")
    refused("checkpoint-000040.pt", "the command that began this run, with --updates 40, makes a model of this checkpoint, if it is the newest.")
    refused("mine.safetensors", "no diffusers folder: README.md has a command that makes a folder of a single file")
    for name in ("nothing", "./no/where", "/no/where", "runs/x/typo", "typo.safetensors"):
        refused(name, f"{re.escape(name)} is no preset .* and no diffusers folder: there is no {re.escape(name)}/model_index.json")
    with pytest.raises(UserError, match="runs/typo is no preset .* and no diffusers folder: "):
        models.load("runs/typo")
    model = models.load("runs/y/pipeline")
    with pytest.raises(UserError, match="give .*runs/x/lora"):
        adapters.load_policy("runs/x", "winner", model.net, model)
    for content in ("", '{"_class_name": "Stable'):
        (tuned / "pipeline" / "model_index.json").write_text(content)
        refused("runs/y/pipeline", "model_index.json cannot be read .*: copy or download it again")


def test_a_folder_goes_before_a_preset_of_its_name_and_says_so(family_folders, tmp_path, monkeypatch, capsys):
    shutil.copytree(family_folders["sana"], tmp_path / "sd14")
    monkeypatch.chdir(tmp_path)
    assert models.preset_of("sd14") == "sana" and models.load("sd14").net_name == "transformer"
    assert capsys.readouterr().err == f"note: sd14 is the folder {tmp_path}/sd14, not the preset\n"
    (tmp_path / "sd15").mkdir()  # not a model
    assert models.preset_of("sd15") == "sd15" and capsys.readouterr().err == ""


def test_names_of_models_hold_in_any_folder(sd, pairs, tmp_path, monkeypatch):
    shutil.copytree(sd, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    tune("model", pairs, "run", "--lora-rank", "2")
    monkeypatch.chdir(tmp_path / "run")
    assert json.loads(Path("lora/training.json").read_text())["model"] == str(tmp_path / "model")
    models.load("lora")
    shutil.rmtree(tmp_path / "model")
    refused("lora", f"lora is an adapter of another model: {tmp_path}/model is no preset")
    named = {name: models.full_name(name) for name in ("sd14", "sdxl@fp16", "owner/name", "shapes", models.PRESETS["shapes"])}
    assert list(named.values()) == ["CompVis/stable-diffusion-v1-4", "stabilityai/stable-diffusion-xl-base-1.0@fp16", "owner/name",
                                    "shapes", "shapes"]


# ---- adapters


def adapter_file(folder, change=lambda weights: weights):
    path = os.path.join(folder, models.LORA)
    save_file({name: x.contiguous() for name, x in change(load_file(path)).items()}, path, metadata=dict(format="pt"))


def kohya(weights):
    """The names that kohya's scripts give, with an alpha of half the rank for each layer."""
    found = {}
    for name, x in weights.items():
        layer, ab = re.fullmatch(r"unet\.(.*)\.lora_([AB])\.weight", name).groups()
        layer = "lora_unet_" + layer.replace(".", "_")
        found[f"{layer}.lora_{dict(A='down', B='up')[ab]}.weight"] = x
        found[f"{layer}.alpha"] = torch.tensor(1.0)
    return found


@pytest.fixture
def adapter(sd, tmp_path):
    folder = random_adapter(models.load(sd), tmp_path / "lora", 0)
    (tmp_path / "lora" / "training.json").write_text(json.dumps(dict(model=sd)))
    return folder


@pytest.mark.parametrize("change, said", [
    (lambda w: {name.removeprefix("unet."): x for name, x in w.items()}, "64 of its 64 tensors are for no layer: down_blocks.0"),
    (lambda w: {name.replace("attn1", "attn9"): x for name, x in w.items()}, r"32 of its 64 tensors .*: (unet.*attn9[^,]*(, |$)){3}$"),
    (lambda w: {f"unet.x.{name}": x for name, x in w.items()}, "64 of its 64 tensors are for no layer: unet.x.unet"),
    (lambda w: {}, "0 of its 0 tensors are for no layer|cannot be read"),
    *[(lambda w, half=half: {name: x for name, x in w.items() if not name.endswith(f"0.attn1.to_q.lora_{half}.weight")},
       "some of its layers have not both a lora_A and a lora_B") for half in "AB"],
    (lambda w: {name: 0 * x if "lora_B" in name else x for name, x in w.items()}, "its lora_B are all 0, so that it changes nothing"),
    (lambda w: {name: x * float("nan") if name.endswith("0.attn1.to_q.lora_B.weight") else x for name, x in w.items()}, "or not finite"),
    (lambda w: {name.replace("lora_A.weight", "dora_scale"): torch.ones(1, 1) for name in w if "lora_A" in name} | w, "it is a DoRA"),
    (lambda w: {name: x[:, 1:] if name.endswith("0.attn1.to_q.lora_A.weight") else x for name, x in w.items()},
     r"size mismatch for .*attn1.to_q.lora_A.* torch.Size\(\[2, 15\]\).* torch.Size\(\[2, 16\]\)"),
    (lambda w: w | {"text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32),
                    "text_encoder.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(32, 2)},
     "2 of its 66 tensors are for no layer: text_encoder.*q_proj.lora_A.weight, .*q_proj.lora_B"),
    (lambda w: w | {f"unet.mid_block.attentions.9.attn1.processor.to_q_lora.{name}.weight": torch.ones(2, 2) for name in ("down", "up")},
     "2 of its 66 tensors are for no layer: unet.mid_block.attentions.9")])
def test_every_tensor_of_an_adapter_is_used_or_it_is_refused(sd, adapter, change, said):
    adapter_file(adapter, change)
    model = models.load(sd)
    with pytest.raises(UserError, match=f"--winner {adapter} .*{said}") as stop:
        adapters.load_policy(adapter, "winner", model.net, model)
    assert "is no adapter for this model" in str(stop.value)
    refused(adapter, f"^{adapter} .*{said}")


def test_a_pointer_of_git_lfs_is_no_adapter(sd, adapter):
    Path(adapter, models.LORA).write_text(POINTER)
    model = models.load(sd)
    with pytest.raises(UserError, match=f"^--winner {adapter} cannot be read .*git lfs pull") as stop:
        adapters.load_policy(adapter, "winner", model.net, model)
    assert "\n" not in str(stop.value)
    refused(adapter, f"^{adapter} cannot be read .*git lfs pull")


@torch.no_grad()
def test_an_adapter_in_kohyas_format_is_the_same_as_a_policy_and_as_a_model(sd, adapter):
    plain, x = models.load(adapter), inputs(models.load(sd))
    adapter_file(adapter, kohya)
    model = models.load(sd)
    policy = adapters.load_policy(adapter, "winner", model.net, model)
    theirs = diffusers.DiffusionPipeline.from_pretrained(sd)
    theirs.load_lora_weights(adapter)
    expected = model.predict(theirs.unet, *x)
    for found in (model.predict(policy, *x), model.predict(models.load(adapter).net, *x)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - model.predict(plain.net, *x)).abs().max() > 1e-3  # alpha is half the rank


# ---- the hub


def test_what_the_hub_says_becomes_a_sentence_and_a_variant_alone_is_fetched(published, only_half, tmp_path):
    folders = {"owner/sd": published["sd"], "owner/half": only_half, "owner/gated": published["sd"]}
    with hub.Hub(folders, gated=["owner/gated"]) as server:
        code = ("import sys; from lib import models, parts\nfor name in sys.argv[1:]:\n    try:\n        print(name, (model := models.load(name)).stored)\n"
                "    except models.UserError as error:\n        print(error)\n"
                "try:\n    parts.replace_unet(model, 'owner/gated')\nexcept models.UserError as error:\n    print(error)")
        names = ["owner/sd", "owner/half", "owner/half@fp16", "owner/gated", "owner/typo"]
        done = subprocess.run([sys.executable, "-c", code, *names], env=server.environment(tmp_path / "cache"), text=True, capture_output=True)
    said = done.stdout.splitlines()
    assert len(said) == 6, done.stderr
    assert said[0] == "owner/sd F32" and said[2] == "owner/half@fp16 F16"
    assert said[1].endswith("it has only weights of the variant fp16: give owner/half@fp16.")
    assert "the hub says: Cannot access gated repo for url" in said[3] and "restricted model needs hf auth login" in said[3]
    assert "and no diffusers folder: the hub says: Repository Not Found for url" in said[4] and "needs hf auth login" in said[4]
    assert said[5].startswith("--unet owner/gated cannot be read (Cannot access gated repo for url")
    assert "unet/diffusion_pytorch_model.non_ema.safetensors" not in server.sent
    assert server.sent.count("unet/diffusion_pytorch_model.fp16.safetensors") == 1


# ---- processes


def test_a_process_without_a_gpu_or_without_torchrun_says_so_and_a_macs_mps_is_used(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    assert processes.place() == (0, 1, torch.device("mps", 0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is set, but not by torchrun"):
        processes.place()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="more processes than the 1 GPUs here: give torchrun --nproc_per_node 1"):
        processes.place()


# ---- the result elsewhere


def test_the_result_has_the_sources_own_files_and_nothing_is_loaded_for_it(published, pairs, tmp_path, monkeypatch):
    real, loaded = models.load, []
    monkeypatch.setattr(models, "load", lambda *args, **more: loaded.append(args[0]) or real(*args, **more))
    source = published["sd"]
    tune(source, pairs, tmp_path)
    files, theirs = read_folder(tmp_path / "pipeline"), read_folder(source)
    assert loaded == [source]
    kept = {name for name in theirs if name.split("/")[0] in ("tokenizer", "scheduler", "vae", "text_encoder") and ".fp16" not in name}
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/special_tokens_map.json"} < kept
    assert {name: files[name] for name in kept} == {name: theirs[name] for name in kept}
    assert files.keys() - kept == {"model_index.json", "training.json", "README.md", "unet/config.json",
                                   "unet/diffusion_pytorch_model.safetensors"}
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.safety_checker is None and not pipe.config.requires_safety_checker
    trained = torch.load(next(tmp_path.glob("checkpoint-*.pt")), weights_only=True)["net"]
    assert all(torch.equal(x, trained[name]) for name, x in pipe.unet.state_dict().items())
    assert not torch.equal(pipe.unet.conv_in.weight, real(source).net.conv_in.weight)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_result_has_a_page_for_the_hub(sd, pairs, tmp_path, monkeypatch, rank):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    in_cache(sd, tmp_path / "cache", "CompVis/stable-diffusion-v1-4")
    tune("sd14", pairs, tmp_path / "run", "--lora-rank", rank, "--seed", 3)
    page = tmp_path / "run" / ("lora" if rank else "pipeline") / "README.md"
    _, head, text = page.read_text().split("---\n")
    head = yaml.safe_load(head)
    assert head["base_model"] == "CompVis/stable-diffusion-v1-4" and head["library_name"] == "diffusers"
    assert head["tags"] == ["text-to-image", "diffusers", "ddspo"] + ["lora"] * bool(rank)
    command = re.search(r"train\.py (.*)", text)[1].split()
    again, first = (train.parse([*flags, "--out", "x"]) for flags in (command, ["--model", "sd14", "--pairs", pairs, "--updates", "1", *RUN,
                                                                                 "--lora-rank", str(rank), "--seed", "3"]))
    assert vars(again) == vars(first)
    page.write_text("mine")
    tune("sd14", pairs, tmp_path / "run", "--lora-rank", rank, "--seed", 3)
    assert page.read_text() == "mine"


def in_cache(folder, cache, name):
    """Puts a folder into the hub's cache under an id, without what this project does not fetch."""
    where = Path(cache) / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, where / "snapshots" / ("a" * 40), ignore=shutil.ignore_patterns("safety_checker", "*.fp16.*", "*.non_ema.*"))
    (where / "refs").mkdir()
    (where / "refs" / "main").write_text("a" * 40)


def test_a_checkpoint_becomes_a_model_by_the_runs_command_with_fewer_updates(sd, pairs, tmp_path):
    out = tmp_path / "run"
    flags = ["--model", sd, "--pairs", pairs, "--out", str(out), *RUN, "--warmup", "2", "--updates"]
    train.main([*flags, "2", "--save-every", "1"])
    (out / "checkpoint-000002.pt").unlink()
    shutil.rmtree(out / "pipeline")
    train.main([*flags, "1"])
    tuned = diffusers.UNet2DConditionModel.from_pretrained(out / "pipeline" / "unet").state_dict()
    trained = torch.load(out / "checkpoint-000001.pt", weights_only=True)["net"]
    assert all(torch.equal(x, trained[name]) for name, x in tuned.items())


def single_file(model, path):
    """Writes a Stable Diffusion 1.x of four levels as one file with the names of its authors' code."""
    resnet = [("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("out_layers.0", "norm2"), ("out_layers.3", "conv2"),
              ("emb_layers.1", "time_emb_proj"), ("skip_connection", "conv_shortcut")]
    names = [("time_embed.0.", "time_embedding.linear_1."), ("time_embed.2.", "time_embedding.linear_2."), ("input_blocks.0.0.", "conv_in."),
             ("out.0.", "conv_norm_out."), ("out.2.", "conv_out."), ("middle_block.1.", "mid_block.attentions.0."),
             ("middle_block.0.", "mid_block.resnets.0."), ("middle_block.2.", "mid_block.resnets.1.")]
    for i in range(4):
        names += [(f"input_blocks.{3 * i + j + 1}.0.", f"down_blocks.{i}.resnets.{j}.") for j in range(2)]
        names += [(f"input_blocks.{3 * i + j + 1}.1.", f"down_blocks.{i}.attentions.{j}.") for j in range(2)]
        names += [(f"output_blocks.{3 * i + j}.0.", f"up_blocks.{i}.resnets.{j}.") for j in range(3)]
        names += [(f"output_blocks.{3 * i + j}.1.", f"up_blocks.{i}.attentions.{j}.") for j in range(3)]
        names += [(f"input_blocks.{3 * i + 3}.0.op.", f"down_blocks.{i}.downsamplers.0.conv."),
                  (f"output_blocks.{3 * i + 2}.{2 if i else 1}.", f"up_blocks.{i}.upsamplers.0.")]
    of_vae = [("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."), ("norm_out.", "conv_norm_out."), ("nin_shortcut.", "conv_shortcut.")]
    of_vae += [(f"mid.attn_1.{new}.", f"mid_block.attentions.0.{old}.") for new, old in
               [("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")]]
    of_vae += [(f"mid.block_{i + 1}.", f"mid_block.resnets.{i}.") for i in range(2)]
    for i in range(4):
        of_vae += [(f"encoder.down.{i}.block.{j}.", f"encoder.down_blocks.{i}.resnets.{j}.") for j in range(2)]
        of_vae += [(f"decoder.up.{3 - i}.block.{j}.", f"decoder.up_blocks.{i}.resnets.{j}.") for j in range(3)]
        of_vae += [(f"down.{i}.downsample.", f"down_blocks.{i}.downsamplers.0."), (f"up.{3 - i}.upsample.", f"up_blocks.{i}.upsamplers.0.")]
    weights = {}
    for name, x in model.net.state_dict().items():
        for new, old in resnet if "resnets" in name else ():
            name = name.replace(f".{old}.", f".{new}.")
        for new, old in names:
            name = re.sub(rf"^{re.escape(old)}", new, name)
        weights[f"model.diffusion_model.{name}"] = x
    for name, x in model.pipe.vae.state_dict().items():
        for new, old in of_vae:
            name = name.replace(old, new)
        weights[f"first_stage_model.{name}"] = x[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else x
    for name, x in model.pipe.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = x
    save_file({name: x.contiguous() for name, x in weights.items()}, path)


def test_the_snippets_of_the_readme(published, pairs, tmp_path, monkeypatch):
    """All of its Python, as it stands there, in a folder with what it speaks of; the hub is a cache without safety checker."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    in_cache(published["sd"], "cache", "CompVis/stable-diffusion-v1-4")
    wide = dict(block_out_channels=(16, 16, 16, 16), layers_per_block=2,
                down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    torch.manual_seed(3)
    whole = tiny_models.sd(net=wide)
    whole.save_pretrained("original")
    single_file(models.load("original"), "model.safetensors")
    in_cache("original", "cache", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    tune("sd14", pairs, "runs/sd14-ddspo")
    tune("sd14", pairs, "runs/lora", "--lora-rank", 2)
    shutil.move("runs/lora/lora", "runs/sd14-ddspo/lora")
    model = models.load("sd14")
    c, c_minus = (model.encode([text] * 2)["prompt_embeds"] for text in ("a red fox", "fox"))
    given = dict(torch=torch, diffusers=diffusers, ddspo_loss=loss.ddspo_loss, unet=model.net, reference=models.load("sd14").net,
                 scheduler=diffusers.DDPMScheduler.from_config(model.pipe.scheduler.config), x_0_w=torch.randn(2, 4, 8, 8),
                 x_0_l=torch.randn(2, 4, 8, 8), c=c, c_minus=c_minus)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for snippet, of in zip(snippets, ("ddspo_loss", "fp16", "load_lora_weights", "from_single_file"), strict=True):
        assert of in snippet
        names, done = dict(given), read_folder("runs/sd14-ddspo/pipeline")
        exec(snippet, names)
        if of == "ddspo_loss":
            assert names["loss"].tolist() == pytest.approx([0.6931] * 2, abs=1e-4) and model.net.conv_in.weight.grad.abs().max() > 0
        elif of == "fp16":
            kept = {name for name in done if name != "unet/config.json"}
            now = read_folder("runs/sd14-ddspo/pipeline")
            assert {name: now[name] for name in kept} == {name: done[name] for name in kept} and now.keys() > done.keys()
            half = models.load("runs/sd14-ddspo/pipeline@fp16")
            assert half.stored == "F16" and equal(half.pipe, models.load("runs/sd14-ddspo/pipeline", net_dtype=torch.float16).pipe)
        elif of == "load_lora_weights":
            x = inputs(model)
            with torch.no_grad():
                lora, base = (model.predict(net, *x) for net in (names["pipe"].unet, models.load("sd14").net))
            assert (lora - base).abs().max() > 1e-6
            assert names["pipe"](PROMPTS, num_inference_steps=1, height=64, width=64, output_type="np").images.std() > 0
        else:
            assert equal(models.load("models/mine").pipe, models.load("original").pipe)
