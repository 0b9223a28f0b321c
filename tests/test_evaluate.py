"""evaluate.py: lists and layouts, and the way from a model to a table with every judge for real on small random weights."""

import contextlib
import json
import os
import shutil
import sys
import threading
import types
from pathlib import Path

import launch
import numpy as np
import pytest
import tiny_judges
import tiny_models
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import evaluate
from judges import compbench, fid, geneval, geneval2, preference, shapes, shared, table
from lib import models, plots, shapes_world
from lib.files import UserError, checksum, write_file
from lib.processes import holding


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("judges") / "clip")
    tiny_judges.clip(folder)
    return folder


def set_count(monkeypatch, bench, count):
    """Gives a benchmark another number of images."""
    _, items, judges = evaluate.BENCHMARKS[bench]
    if bench == "shapes":
        items = lambda data: shapes.items(data)[:count]  # noqa: E731
    monkeypatch.setitem(evaluate.BENCHMARKS, bench, (count, items, judges))


def collect(run):
    return table.collect(str(run), shared.read_settings(str(run)), evaluate.BENCHMARKS)


def test_geneval_table_entries_are_those_of_summary_scores(tmp_path, monkeypatch):
    for case in tiny_judges.golden("geneval_summary_cases.jsonl"):
        rows, index, image = [], {}, {}
        for row in case["results"]:
            prompt = index.setdefault((row["tag"], row["metadata"]), len(index))
            k = image[prompt] = image.get(prompt, -1) + 1
            rows.append(row | dict(path=f"{prompt}/{k}", group=row["tag"], index=prompt, lenient=False, details="{}" if k % 2 else "x"))
        set_count(monkeypatch, "geneval", len(rows))
        shutil.rmtree(tmp_path / "scores", ignore_errors=True)
        write_file(str(tmp_path / "scores" / "geneval.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
        note = dict(lists=None, judge=evaluate.BENCHMARKS["geneval"][2]["geneval"][2])
        write_file(str(tmp_path / "scores" / "geneval" / "settings.json"), json.dumps(note))
        found = table.collect(str(tmp_path), dict(lists={}), evaluate.BENCHMARKS)
        assert f"{shared.interval(found['GenEval'])['mean']:.5f}" == case["official"]["overall"]
        for tag, share in case["official"]["tasks"].items():
            assert f"{shared.interval(found['GenEval: ' + tag])['mean']:.2%}" == share


# ---- lists and layouts


def test_the_official_lists_give_the_official_layouts_and_counts(tmp_path):
    tiny_judges.lists(str(tmp_path), small=False)
    data = str(tmp_path)
    counts = {bench: count for bench, (count, _, _) in evaluate.BENCHMARKS.items()}
    assert counts == dict(geneval=2212, compbench=18000, coco=30000, hps=3200, pick=1632, geneval2=800, shapes=400)
    found = {bench: evaluate.list_images(bench, data) for bench in counts}
    assert [row["path"] for row in found["geneval"]][3:5] == ["geneval/00000/samples/00003.png", "geneval/00001/samples/00000.png"]
    assert found["geneval"][-1]["path"] == "geneval/00552/samples/00003.png"
    assert found["compbench"][3011]["path"] == "compbench/shape/samples/a dog and a dog next to the cup 1._000011.png"
    kinds = [row["kind"] for row in found["compbench"] if row["group"] == "complex"]
    assert [kinds.count(kind) for kind in ("spatial", "action", "all")] == [20, 10, 2970]  # the last prompt is the first again
    assert found["hps"][801]["path"] == "hps/concept-art/00001.jpg" and found["hps"][801]["prompt"] == "concept-art &amp; a dog 1"
    assert found["pick"][1631] == dict(path="pick/images/01631.jpg", prompt='"G 1631" by a dog', group="pick", index=1631)
    assert found["coco"][7]["path"] == "coco/im256/COCO_val2014_000000029992.jpg" and found["coco"][7]["prompt"] == "A dog, number 29992"
    assert found["geneval2"][799]["path"] == "geneval2/00799.png" and found["geneval2"][4]["skills"] == ["count", "object", "verb"]
    assert len(found["shapes"]) == 400 and found["shapes"][0]["prompt"] == found["shapes"][0]["metadata"]["caption"]
    (tmp_path / "pick" / "PartiPrompts.tsv").write_text("Prompt\na\nb\n")
    with pytest.raises(UserError, match=r"the list of prompts in .*pick cannot be read \(2 images, not 1632\): delete that folder"):
        evaluate.list_images("pick", data)


def test_lists_are_fetched_once_from_pinned_places(tmp_path, monkeypatch):
    tiny_judges.lists(str(tmp_path / "whole"), small=False)
    asked = []

    def download(url, path, progress):
        asked.append(url)
        shutil.copy(str(tmp_path / "whole") + path.removeprefix(str(tmp_path / "data")), path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        for bench in evaluate.BENCHMARKS:
            evaluate.list_images(bench, str(tmp_path / "data"))
    assert len(asked) == len(set(asked)) == 1 + 8 + 1 + 4 + 1 + 1
    assert asked[-3] == "https://huggingface.co/datasets/zhwang/HPDv2/resolve/main/benchmark/photo.json"
    fid.real_statistics(str(tmp_path / "data"))
    for name in ("from_hub", "from_url"):
        monkeypatch.setattr(geneval, name, lambda *arguments: None)
    geneval.load("cpu", str(tmp_path / "data"))
    github = [url for url in asked if "github" in url]
    assert len(github) == 12 and all(len(url.split("/")[5]) == 40 for url in github)
    assert len({url.split("/")[5] for url in github if "CompBench" in url}) == 2  # non_spatial's list is of another commit
    assert asked[0] == "https://raw.githubusercontent.com/djghosh13/geneval/16f1681160a110fd077309eb04c1e004f951e06d/prompts/evaluation_metadata.jsonl"
    assert asked[-1] == "https://raw.githubusercontent.com/djghosh13/geneval/16f1681160a110fd077309eb04c1e004f951e06d/evaluation/object_names.txt"
    assert [url.split("/")[-1] for url in asked if "netspresso" in url] == ["metadata.csv", "real_im256.npz"]

    def offline(url, path, progress):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"https://.*metadata.csv cannot be read \(no network\): fetch it on another machine and put it at .*coco/metadata.csv"):
        evaluate.list_images("coco", str(tmp_path / "elsewhere"))


# ---- from a model to a table


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Short lists of prompts, and the number of images that they ask for."""
    for bench, count in tiny_judges.lists(str(tmp_path / "data")).items():
        set_count(monkeypatch, bench, count)
    return tmp_path


def generate(world, sd, name, *flags):
    evaluate.main(["generate", "--model", sd, "--out", str(world / name), "--data", str(world / "data"), "--steps", "1", *flags])


def images(folder):
    return {os.path.relpath(os.path.join(where, name), folder): open(os.path.join(where, name), "rb").read()
            for where, _, names in os.walk(folder) for name in names if not where.endswith("scores") and name != ".lock"}


def test_images_depend_on_seed_and_place_only(world, sd, monkeypatch):
    generate(world, sd, "one", "--bench", "pick", "coco", "--batch-size", "3", "--seed", "5")
    os.makedirs(world / "three")
    for rank, share in ((0, 3), (2, 3), (1, 4)):
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "processes", lambda folder, rank=rank: contextlib.nullcontext((rank, 3, torch.device("cpu"))))
            generate(world, sd, "three", "--bench", "pick", "coco", "--batch-size", "3", "--seed", "5")
        assert len(os.listdir(world / "three" / "pick" / "images")) == share  # batch 0, no batch, batch 1
    one = images(world / "one")
    assert one == images(world / "three") and len(one) == 4 + 2 * 12 + 1
    for name in ("pick/images/00001.jpg", "coco/im256/COCO_val2014_000000000004.jpg"):
        os.remove(world / "one" / name)
    generate(world, sd, "one", "--bench", "pick", "coco", "--batch-size", "3", "--seed", "5")
    assert images(world / "one") == one
    model = models.load(sd)
    x_T = models.initial_noise(5 + 2, model.latent_shape)[None]
    direct, = models.sample(model, ['"G 2" by a dog'], x_T, 1, 7.5, output_type="pil")
    direct.save(world / "direct.jpg")
    stored = np.array(Image.open(world / "one" / "pick" / "images" / "00002.jpg"), float)
    assert abs(np.array(Image.open(world / "direct.jpg"), float) - stored).mean() < 2  # another batch rounds differently
    assert len(set(one.values())) > 10
    for name in sorted(os.listdir(world / "one" / "coco" / "im512")):  # BK-SDM's two JPEGs
        small = Image.open(world / "one" / "coco" / "im512" / name).resize((256, 256), Image.BICUBIC)
        small.save(world / "small.jpg", quality=75)
        assert (world / "small.jpg").read_bytes() == one[f"coco/im256/{name}"]


def few_prompts():
    for bench, count in dict(pick=4, hps=12).items():
        evaluate.BENCHMARKS[bench] = (count, *evaluate.BENCHMARKS[bench][1:])


def test_two_processes_write_what_one_does_and_none_writes_into_a_folder_of_others(world, sd):
    """Judged by what was written, because such processes sometimes abort when they end."""
    def run(*flags):
        return launch.run("evaluate", ["generate", "--model", sd, "--out", world / "two", "--data", world / "data", "--steps", 1,
                                       "--batch-size", 1, *flags], processes=2, prepare=few_prompts)[1]
    generate(world, sd, "one", "--bench", "pick", "hps", "--batch-size", "1")
    run("--bench", "pick", "hps")
    assert images(world / "one") == images(world / "two") and len(images(world / "two")) == 4 + 12 + 1
    missing = [world / "two" / "pick" / "images" / f"{i:05d}.jpg" for i in (1, 3)]  # the second process's share
    for path in missing:
        os.remove(path)
    assert "two was begun with seed 42, not 43: use the same again" in run("--bench", "pick", "--seed", "43")
    assert not any(path.exists() for path in missing)
    generate(world, sd, "two", "--bench", "pick", "hps", "--batch-size", "1")  # one process goes on where two were
    assert images(world / "one") == images(world / "two")


def test_other_settings_are_not_mixed_into_a_folder(world, sd):
    generate(world, sd, "run", "--bench", "pick")
    generate(world, sd, "run", "--bench", "hps")  # another benchmark is welcome
    settings = json.loads((world / "run" / "settings.json").read_text())
    assert settings["lists"].keys() == {"pick", "hps"} and settings["seed"] == 42 and settings["guidance"] == 7.5
    assert settings["sampler"] == "PNDMScheduler" and settings["base"] == sd and settings["pixels"] == 64
    assert settings["checksum"] == models.model_checksum(models.load(sd))
    assert set(shared.FIXED) == {"checksum", "steps", "guidance", "seed", "sampler", "precision", "pixels"} <= settings.keys()
    for flags in (["--seed", "43"], ["--guidance", "43"]):
        with pytest.raises(SystemExit, match=rf"run was begun with {flags[0][2:]} .*, not 43"):
            generate(world, sd, "run", "--bench", "pick", *flags)
    generate(world, sd + "/", "run", "--bench", "pick", "--batch-size", "1")  # as after running out of memory
    (world / "data" / "pick" / "PartiPrompts.tsv").write_text("Prompt\na\nb\nc\nd\n")
    with pytest.raises(SystemExit, match="other prompts of pick"):
        generate(world, sd, "run", "--bench", "pick")
    other = models.load(sd)
    other.pipe.vae.decoder.conv_out.bias.data += 0.1
    other.pipe.save_pretrained(world / "vae")
    (world / "data" / "pick" / "PartiPrompts.tsv").write_text("".join(["Prompt\n", *[f'"G {i}" by a dog\n' for i in range(4)]]))
    with pytest.raises(SystemExit, match="run was begun with other checksum"):
        generate(world, str(world / "vae"), "run", "--bench", "hps")
    shutil.copytree(sd, world / "trailing")
    scheduler = json.loads((world / "trailing" / "scheduler" / "scheduler_config.json").read_text())
    (world / "trailing" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler | dict(timestep_spacing="trailing")))
    shutil.copytree(sd, world / "small")
    unet = json.loads((world / "small" / "unet" / "config.json").read_text())
    (world / "small" / "unet" / "config.json").write_text(json.dumps(unet | dict(sample_size=4)))
    for name in ("trailing", "small"):  # the same weights, but another scheduler or smaller images
        with pytest.raises(SystemExit, match="run was begun with other checksum"):
            generate(world, str(world / name), "run", "--bench", "hps")
    other = models.load(sd)
    other.net.conv_in.weight.data[0, 0, 0, 0] += 1
    other.pipe.save_pretrained(world / "model")
    (world / "model" / "training.json").write_text(json.dumps(dict(model="sdxl")))
    generate(world, str(world / "model"), "tuned", "--bench", "hps")
    tuned = json.loads((world / "tuned" / "settings.json").read_text())
    assert tuned["checksum"] != settings["checksum"] and tuned["base"] == "sdxl"
    other.net.half().save_pretrained(world / "model" / "unet", variant="fp16")
    generate(world, f"{world / 'model'}@fp16", "variant", "--bench", "hps")
    assert json.loads((world / "variant" / "settings.json").read_text())["base"] == "sdxl"
    os.remove(world / "run" / "settings.json")
    with pytest.raises(SystemExit, match="run holds other files and no settings.json"):
        generate(world, sd, "run", "--bench", "pick", "--guidance", "9")
    (world / "run" / "settings.json").write_text("{}")
    with pytest.raises(SystemExit, match="run was begun with other checksum"):
        generate(world, sd, "run", "--bench", "pick")


def test_settings_and_notes_that_are_no_objects_end_in_a_sentence(world, sd):
    generate(world, "shapes", "run", "--bench", "shapes")
    score(world, "run")
    note, settings = world / "run" / "scores" / "shapes" / "settings.json", world / "run" / "settings.json"
    whole = note.read_text()
    for text in ("[]", "5", '"x"', "null"):
        note.write_text(text)
        for command in (["score", str(world / "run"), "--data", str(world / "data")], ["table", str(world / "run"), "--out", str(world / "t.md")]):
            with pytest.raises(SystemExit, match=r"scores/shapes/settings.json cannot be read .*: delete .*scores/shapes\*, so that all is judged again"):
                evaluate.main(command)
    note.write_text(whole)
    for text in ("[]", "5", "{}", '{"lists": []}', json.dumps(json.loads(settings.read_text()) | dict(lists=[]))):
        settings.write_text(text)
        with pytest.raises(SystemExit, match="run/settings.json cannot be read .* or --foreign"):
            score(world, "run")
    settings.write_text("[]")
    with pytest.raises(SystemExit, match="run/settings.json cannot be read .*object has no attribute .*: move .*run away"):
        generate(world, "shapes", "run", "--bench", "shapes")


def test_a_pair_store_and_a_run_of_train_py_are_no_place_for_images(world, sd, pairs):
    (world / "run" / "checkpoint").mkdir(parents=True)
    (world / "run" / "log.jsonl").write_text("{}\n")
    shutil.copytree(pairs, world / "store")
    for name in ("run", "store"):
        before = images(world / name)
        with pytest.raises(SystemExit, match=f"{name} holds other files and no settings.json"):
            generate(world, sd, name, "--bench", "pick")
        assert images(world / name) == before


def test_a_unet_that_is_published_alone_takes_the_place_of_the_models(world, sd, family_folders):
    other = models.load(sd)
    other.net.conv_out.weight.data *= 0.5
    other.pipe.save_pretrained(world / "whole")
    shutil.copytree(world / "whole" / "unet", world / "alone" / "unet")
    generate(world, str(world / "whole"), "whole.out", "--bench", "pick")
    for name, unet in (("a", world / "alone"), ("b", world / "alone" / "unet"), ("c", world / "whole")):
        generate(world, sd, name, "--bench", "pick", "--unet", str(unet))
    found = {name: json.loads((world / name / "settings.json").read_text()) for name in ("a", "b", "c", "whole.out")}
    for name in "abc":
        assert os.path.exists(world / name / "pick" / "images" / "00003.jpg")
        for path in os.listdir(world / name / "pick" / "images"):
            assert (world / name / "pick" / "images" / path).read_bytes() == (world / "whole.out" / "pick" / "images" / path).read_bytes()
        assert found[name]["checksum"] == found["a"]["checksum"] and found[name]["base"] == sd
    assert found["a"]["checksum"] == found["whole.out"]["checksum"] != models.model_checksum(models.load(sd))
    for flags in ([], ["--unet", sd]):
        with pytest.raises(SystemExit, match="a was begun with other checksum"):
            generate(world, sd, "a", "--bench", "pick", *flags)
    for unet, message in ((world / "nothing", "--unet .*nothing cannot be read"),
                          (family_folders["sdxl"], "its cross_attention_dim is 80, not 32.: it must be a U-Net of the model's kind")):
        with pytest.raises(SystemExit, match=message):
            generate(world, sd, "d", "--bench", "pick", "--unet", str(unet))


@pytest.mark.parametrize("change, message", [
    (dict(out_channels=8), "its out_channels is 8, not 4"), (dict(prediction_type="v_prediction"), "its prediction_type is v_prediction, not epsilon")])
def test_a_unet_of_another_kind_is_refused_before_anything_is_written(change, message, world, sd):
    net = dict(change) if "out_channels" in change else {}
    other = tiny_models.sd(net=net)
    if not net:
        other.scheduler.register_to_config(**change)
    other.save_pretrained(world / "other")
    with pytest.raises(SystemExit, match=rf"--unet .*other cannot be read \({message}\): it must be a U-Net of the model's kind"):
        generate(world, sd, "run", "--bench", "pick", "--unet", str(world / "other"))
    assert not (world / "run").exists()


def test_an_image_of_no_bytes_is_made_again(world, sd):
    generate(world, sd, "run", "--bench", "pick", "coco")
    before = images(world / "run")
    for name in ("pick/images/00001.jpg", "coco/im256/COCO_val2014_000000000004.jpg", "coco/im512/COCO_val2014_000000000005.jpg"):
        (world / "run" / name).write_bytes(b"")
    os.remove(world / "run" / "coco" / "im256" / "COCO_val2014_000000000005.jpg")
    with pytest.raises(SystemExit, match="1 of 4 images of pick are missing in .*, first pick/images/00001.jpg: give the command of generate again"):
        score(world, "run", flags=["--bench", "pick"])
    generate(world, sd, "run", "--bench", "pick", "coco")
    assert images(world / "run") == before


def test_images_with_transparency_or_16_bits_are_judged_as_they_are_seen(tmp_path):
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4] = 255, 0, 0, 255
    Image.fromarray(clear).save(tmp_path / "alpha.png")
    Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tiff")
    seen = np.array(shared.open_image(str(tmp_path / "alpha.png"), 8))
    assert (seen[:4] == [255, 0, 0]).all() and (seen[4:] == 255).all()
    assert (np.array(shared.open_image(str(tmp_path / "deep.png"))) == 100).all()
    with pytest.raises(UserError, match="float.tiff cannot be read .*without a known white"):
        shared.open_image(str(tmp_path / "float.tiff"))


def test_images_that_are_not_numbers_are_an_error(world, sd):
    other = models.load(sd)
    other.pipe.vae.decoder.conv_out.bias.data[0] = float("nan")
    other.pipe.save_pretrained(world / "model")
    with pytest.raises(SystemExit, match="model makes images of NaN"):
        generate(world, str(world / "model"), "run", "--bench", "pick")
    assert not (world / "run" / "pick").exists()


def test_png_files_hold_the_samplers_pixels_whatever_their_compression(world, sd):
    generate(world, sd, "run", "--bench", "shapes")
    model, rows = models.load(sd), evaluate.list_images("shapes", str(world / "data"))
    model.pipe.vae.enable_slicing()
    x_T = torch.stack([models.initial_noise(42 + i, model.latent_shape) for i in range(4)])
    direct = models.sample(model, [row["prompt"] for row in rows], x_T, 1, 7.5, output_type="pil")
    for row, image in zip(rows, direct, strict=True):
        assert (np.array(Image.open(world / "run" / row["path"])) == np.array(image)).all()


def test_the_shapes_benchmark_is_sampled_with_the_shapes_models_own_guidance(world):
    generate(world, "shapes", "run", "--bench", "shapes")
    assert json.loads((world / "run" / "settings.json").read_text())["guidance"] == 3.0


class Trunk(torch.nn.Module):
    """In the Inception network's place: (N, 3, H, W) -> (N, 4)."""
    def forward(self, x):
        assert x.shape[2:] == (299, 299) and x.min() >= -1 and x.max() <= 1
        return torch.stack([x.mean((1, 2, 3)), x[:, 0].mean((1, 2)), x.std((1, 2, 3)), x[:, 2, 0, 0]], 1)


@pytest.fixture
def judges(world, clip, monkeypatch):
    """Small random judges in the place of the hub's. Returns the files that were asked for."""
    for module, name in ((geneval, "CLIP"), (preference, "CLIP_B"), (preference, "CLIP_H"), (preference, "PICK")):
        monkeypatch.setattr(module, name, clip)
    for module, name, make in ((compbench, "OWL", tiny_judges.owl), (compbench, "BERT", tiny_judges.bert_tokenizer),
                               (geneval2, "JUDGE", tiny_judges.qwen)):
        make(str(world / name))
        monkeypatch.setattr(module, name, str(world / name))
    monkeypatch.setattr(compbench, "BLIP_CONFIG", tiny_judges.BLIP_CONFIG)
    monkeypatch.setattr(geneval, "DETECTOR_CONFIG", tiny_judges.DETECTOR_CONFIG)
    monkeypatch.setattr(geneval, "SHORTEST", 256)  # pixels that the detector sees, not 800: that saves twenty seconds
    monkeypatch.setattr(compbench, "load_spacy", lambda: tiny_judges.Parse)
    monkeypatch.setattr(fid, "load_inception", lambda device: (Trunk(), lambda x: (x.float().mean((2, 3)) / 20,)))
    asked = []

    def load_state(url, map_location, weights_only, check_hash):
        asked.append(url)
        assert weights_only and check_hash
        if "BLIP" in url:
            return dict(model=tiny_judges.blip()[1])
        if "mask2former" in url:
            return dict(state_dict=tiny_judges.mask2former()[1])
        return dict(state_dict=tiny_judges.open_clip(shared.from_hub("CLIPModel", clip, "cpu")))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load_state)
    return asked


def score(world, *names, flags=()):
    evaluate.main(["score", *[str(world / name) for name in names], "--data", str(world / "data"), *flags])


@pytest.mark.slow
def test_from_a_model_to_a_table(world, sd, judges, monkeypatch, capsys):
    other = models.load(sd)
    other.net.conv_out.weight.data *= 0.8
    other.pipe.save_pretrained(world / "model")
    (world / "model" / "training.json").write_text(json.dumps(dict(model="CompVis/stable-diffusion-v1-4")))
    generate(world, sd, "ref")
    generate(world, str(world / "model"), "tuned", "--bench", "hps", "pick")
    score(world, "ref", "tuned", flags=["--batch-size", "7"])
    assert [url.split("/")[-1].split("_")[0] for url in judges[:7]] == ["model", "HPS", "HPS", "mask2former", "model", "HPS", "HPS"]  # tried first
    folder = world / "ref" / "scores"
    rows = {name: [json.loads(line) for line in open(folder / f"{name}.jsonl")] for name in ("geneval", "blip", "clipscore", "owl", "hps", "hps21", "pick")}
    assert {name: len(x) for name, x in rows.items()} == dict(geneval=48, blip=80, clipscore=40, owl=40, hps=12, hps21=12, pick=4)
    assert (world / "ref" / "geneval" / "00003" / "metadata.jsonl").exists()
    # what summary_scores.py needs; and the verdict of what was found
    assert set(rows["geneval"][0]) >= {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    reasons = {tag: {row["reason"] for row in rows["geneval"] if row["tag"] == tag} for tag in ("single_object", "counting", "position", "colors", "color_attr")}
    assert reasons["single_object"] == {""} and reasons["counting"] == {"expected dog>=2, found 0"}  # 0.44 is not 0.9
    assert all("target" in reason for reason in reasons["position"]) and all("expected blue red cup" in reason for reason in reasons["color_attr"])
    detector = tiny_judges.mask2former()[0]
    namer, words = shared.from_hub("CLIPModel", geneval.CLIP, "cpu"), shared.from_hub("AutoTokenizer", geneval.CLIP)
    for row in [row for row in rows["geneval"] if row["tag"] == "colors"]:
        image = Image.open(world / "ref" / row["path"]).convert("RGB")
        dogs = geneval.detect(detector, image, tiny_judges.NAMES)["dog"]
        np.testing.assert_allclose([box for box, _ in dogs], json.loads(row["details"])["dog"], atol=1e-4)
        name, = geneval.name_colors(namer, words, [geneval.crop(image, *dogs[0])], "dog")
        assert row["correct"] == (name == "red") and row["reason"] == ("" if name == "red" else f"expected red dog>=1, found 0 red; and 1 {name}")
    clip, tokenizer = shared.from_hub("CLIPModel", preference.CLIP_H, "cpu"), shared.from_hub("AutoTokenizer", preference.CLIP_H)
    for name, row, pixels, scale in (("pick", rows["pick"][2], shared.clip_pixels, clip.logit_scale.exp().item()),
                                     ("hps", rows["hps"][4], preference.hps_pixels, 100)):
        image = Image.open(world / "ref" / row["path"]).convert("RGB")
        seen, said = shared.clip_embed(clip, tokenizer, [image], [row["prompt"].replace("&amp;", "&")], pixels)
        assert row["value"] == pytest.approx(scale * (seen @ said.T).item(), abs=1e-3), name
    blip = rows["blip"][0]
    assert [phrase for phrase, _ in blip["yes"]] == ["the dog", "the dog", "the cup"]  # as often as the prompt names it
    assert blip["value"] == pytest.approx(np.prod([p for _, p in blip["yes"]]), abs=1e-4) and blip["yes"][0] == blip["yes"][1]
    assert len({row["value"] for row in rows["blip"]}) > 10
    vqa, bert = tiny_judges.blip()[0], shared.from_hub("AutoTokenizer", compbench.BERT)
    pixels = shared.normalised(shared.unit(Image.open(world / "ref" / blip["path"]).convert("RGB").resize((32, 32), Image.BICUBIC)))[None]
    p, = compbench.blip_yes(vqa, vqa.vision_model(pixels).last_hidden_state, bert("the cup?", return_tensors="pt").input_ids)
    assert blip["yes"][2] == ["the cup", pytest.approx(p, abs=1e-5)]
    assert any(row["objects"] for row in rows["owl"]) and all({x["name"] for x in row["objects"]} <= {"dog", "cup"} for row in rows["owl"])

    row = next(row for row in rows["owl"] if len(row["objects"]) == 2)
    owl, words = shared.from_hub("Owlv2ForObjectDetection", compbench.OWL, "cpu"), shared.from_hub("AutoTokenizer", compbench.OWL)
    image = Image.open(world / "ref" / row["path"]).convert("RGB").resize((64, 64), Image.BILINEAR)
    tokens = words(["a photo of a dog", "a photo of a cup"], padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    out = owl(**tokens, pixel_values=shared.normalised(shared.unit(image))[None])
    for k, thing in enumerate(sorted(row["objects"], key=lambda thing: thing["name"] == "cup")):
        best = out.logits[0, :, k].argmax()
        x, y, w, h = (479 * out.pred_boxes[0, best]).tolist()
        assert thing["score"] == pytest.approx(out.logits[0, best, k].sigmoid().item(), abs=1e-4)
        assert thing["box"] == pytest.approx([x - w / 2, y - h / 2, x + w / 2, y + h / 2], abs=0.1)

    # FID against a plain computation
    features = torch.cat([Trunk()(F.interpolate(torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255, (299, 299), mode="bilinear") * 2 - 1)
                          for path in sorted((world / "ref" / "coco" / "im256").iterdir())]).double().numpy()
    with np.load(world / "data" / "coco" / "real_im256.npz") as real:
        parts = [torch.from_numpy(x) for x in (features.mean(0), np.cov(features.T), real["mu"], real["sigma"])]
    coco = json.loads((folder / "coco.json").read_text())
    assert coco["FID"] == pytest.approx(fid.frechet(*parts), rel=1e-4) and not (folder / "coco.json.partial").exists()
    logits = torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float().mean((0, 1)) / 20
                          for path in sorted((world / "ref" / "coco" / "im256").iterdir())])  # as torch-fidelity reads a folder
    assert coco["IS"] == pytest.approx(fid.inception_score(logits)[0], rel=1e-6) and coco["IS"] > 1

    # a stop in the middle of a line: the rest is judged again, to the same
    whole = (folder / "owl.jsonl").read_text()
    (folder / "owl.jsonl").write_text(whole[:len(whole) // 2])
    evaluate.main(["table", str(world / "ref"), "--out", str(world / "t.md")])
    assert f"{world / 'ref'}: not scored, or only in part: compbench" in (world / "t.md").read_text()
    score(world, "ref", flags=["--bench", "compbench", "--batch-size", "7"])
    again = [json.loads(line) for line in open(folder / "owl.jsonl")]
    assert again == rows["owl"]

    capsys.readouterr()
    evaluate.main(["table", str(world / "ref"), str(world / "tuned"), "--out", str(world / "t.md")])
    text = (world / "t.md").read_text()
    assert text in capsys.readouterr().out
    whole = json.loads((world / "t.json").read_text())
    ref, difference = whole["runs"][str(world / "ref")], whole["runs"][f"{world / 'tuned'} − {world / 'ref'}"]
    assert ref["HPSv2"]["mean"] == pytest.approx(np.mean([row["value"] for row in rows["hps"]]))
    assert ref["HPSv2: photo"]["mean"] == pytest.approx(np.mean([row["value"] for row in rows["hps"] if row["group"] == "photo"]))
    assert ref["CB: color"]["mean"] == pytest.approx(np.mean([row["value"] for row in rows["blip"] if row["group"] == "color"]))
    assert ref["CB: non_spatial"]["mean"] == pytest.approx(np.mean([row["value"] for row in rows["clipscore"] if row["group"] == "non_spatial"]))
    complex_ = {name: [row["value"] for row in rows[name] if row["group"] == "complex"] for name in ("blip", "clipscore", "owl")}
    assert ref["CB: complex~"]["mean"] == pytest.approx((np.mean(complex_["blip"]) + np.mean(complex_["owl"])) / 2)  # both prompts: spatial
    six = [x["mean"] for name, x in ref.items() if name.startswith("CB: ")]
    assert len(six) == 6 and ref["CB~"]["mean"] == pytest.approx(np.mean(six)) and "CB" not in ref
    assert difference["PickScore"]["mean"] == pytest.approx(whole["runs"][str(world / "tuned")]["PickScore"]["mean"] - ref["PickScore"]["mean"])
    assert difference["PickScore"]["mean"] != 0 and difference["PickScore"]["low"] <= difference["PickScore"]["mean"]
    assert "| paper, Table 1a: SD-1.4 + DDSPO |  | 0.5045 | 0.3823 |  | 16.39 | 38.10 |  |  |  |" in text and "Table 2b" not in text
    assert "\n| CB: complex~ | " in text and "\n| HPSv2: photo | " in text and "\n| HPSv2 |" not in text  # parts have rows, not columns
    assert "- CB~: with OWLv2 in place of UniDet" in text and "|  | GenEval | GenEval, lenient | CB | CB~ |" in text

    # the official UniDet results take the proxy's place
    for category in ("spatial", "complex"):
        path = world / "ref" / "compbench" / category / "labels" / "annotation_obj_detection_2d" / "vqa_result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([dict(question_id=k, answer=k / 20) for k in range(20)][::-1]))
    os.remove(folder / "owl.jsonl")
    score(world, "ref", flags=["--bench", "compbench"])
    assert not (folder / "owl.jsonl").exists()
    found = collect(world / "ref")
    assert "CB~" not in found and found["CB: spatial"]["spatial"] == pytest.approx([0.225, 0.725])
    by_path = {row["path"]: row["value"] for row in rows["blip"]}
    expected = [np.mean([(by_path[path] + k / 20) / 2 for path in by_path for k in [int(path[-6:-4])] if "/complex/" in path and k // 10 == i]) for i in (0, 1)]
    assert found["CB: complex"]["complex"] == pytest.approx(expected)
    (path.parent.parent.parent / "samples" / ".DS_Store").write_text("")  # a Mac's
    assert collect(world / "ref").keys() == found.keys()
    evaluate.main(["table", *[str(world / name) for name in ("ref", "tuned", "ref/")], "--out", str(world / "t.md")])
    assert (world / "t.md").read_text().count(f"| {world / 'ref'} |") == 2  # once in each table
    os.remove(folder / "blip.jsonl")
    assert not {"CB", "CB: color", "CB: complex"} & collect(world / "ref").keys()
    assert "CB: non_spatial" in collect(world / "ref")
    path.write_text("[]")
    with pytest.raises(UserError, match="0 answers to 20 images"):
        collect(world / "ref")


def test_geneval_2_from_a_model_to_the_table_is_exact_after_a_stop(world, sd, judges):
    generate(world, sd, "run", "--bench", "geneval2")
    scores = world / "run" / "scores" / "geneval2.jsonl"
    score(world, "run", flags=["--batch-size", "8"])
    whole = scores.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert len(rows) == 20 and [len(row["probabilities"]) for row in rows[:3]] == [3, 4, 3] and len(set(whole.splitlines())) == 20
    for end in (0, 700, len(whole) // 2, len(whole) - 5):
        scores.write_text(whole[:end])
        score(world, "run", flags=["--batch-size", "8"])
        assert scores.read_text() == whole, end
    evaluate.main(["table", str(world / "run"), "--out", str(world / "t.md")])
    found = json.loads((world / "t.json").read_text())["runs"][str(world / "run")]
    p = [100 * np.array(row["probabilities"]) for row in rows]
    assert found["GenEval 2 AM"]["mean"] == pytest.approx(np.mean([x.mean() for x in p]))
    assert found["GenEval 2 GM"]["mean"] == pytest.approx(np.mean([np.prod(x) ** (1 / len(x)) for x in p]))
    assert found["GenEval 2 AM: attribute"]["mean"] == pytest.approx(np.mean([x[3] for x in p if len(x) == 4]))
    assert found["GenEval 2 AM: count"]["mean"] == pytest.approx(np.mean([x[0] for x in p]))
    assert found["GenEval 2 GM: 4 atoms"]["mean"] == pytest.approx(np.mean([np.prod(x) ** 0.25 for x in p if len(x) == 4]))
    assert found["GenEval 2 AM"]["low"] < found["GenEval 2 AM"]["mean"] < found["GenEval 2 AM"]["high"]
    text = (world / "t.md").read_text()
    assert "factor of two with guidance and steps" in text and "steps 1, guidance 7.5, seed 42, sampler PNDMScheduler" in text
    assert "pixels 64" in text and "geneval2" not in evaluate.PAPERS  # --bench geneval2 asks for it


def test_a_batch_is_judged_whole_after_a_stop(world, sd, monkeypatch):
    """So that a score that depends on its batch, by padding or rounding, does not depend on a stop."""
    generate(world, sd, "run", "--bench", "pick")
    count, items, _ = evaluate.BENCHMARKS["pick"]
    load = lambda device, data: lambda rows, images: [dict(value=len(rows) + i / 8) for i in range(len(rows))]  # noqa: E731
    monkeypatch.setitem(evaluate.BENCHMARKS, "pick", (count, items, {"pick": (None, load, "counts")}))
    score(world, "run", flags=["--batch-size", "3"])
    path = world / "run" / "scores" / "pick.jsonl"
    whole = path.read_text()
    assert [json.loads(line)["value"] for line in whole.splitlines()] == [3, 3.125, 3.25, 1]
    for lines in range(4):
        path.write_text("".join(whole.splitlines(True)[:lines]) + '{"path"')
        score(world, "run", flags=["--batch-size", "3"])
        assert path.read_text() == whole


def test_a_stop_costs_a_line_of_scores_wherever_it_came(tmp_path):
    write_file(str(tmp_path / "scores" / "pick" / "settings.json"), "{}")
    path, line = tmp_path / "scores" / "pick.jsonl", '{"path": "é", "group": "a", "index": 0, "value": 1}\n'.encode()
    for end in range(len(line)):
        path.write_bytes(line.replace("é".encode(), b"e") + line[:end])
        assert shared.read_scores(str(tmp_path), "pick", {}) == dict(e=dict(path="e", group="a", index=0, value=1)), end
    assert shared.read_scores(str(tmp_path), "none", {}) == {}


@pytest.mark.parametrize("name, bad", [
    ("pick", "[]"), ("pick", "5"), ("pick", '{"value": 1}'), ("pick", '{"path": "\xff"}'), ("pick", '{"path": "b"}'), ("pick", '{"path": [], "value": 1}'),
    ("shapes", '{"path": "b", "value": 1}'), *[("shapes", f'{{"path": "b", "correct": {bad}}}') for bad in ("7", '"no"', "null", "-3", "NaN", "[]")],
    *[("pick", f'{{"path": "b", "value": {bad}}}') for bad in ("null", "[1]", '"no"', "NaN", "Infinity", "-1e9")],
    *[(judge, f'{{"path": "b", "value": {bad}}}') for judge in ("blip", "owl", "clipscore", "geneval2") for bad in ("7", "-3")],
    *[("coco", bad) for bad in ("[]", "{", '{"IS": 3}', '{"FID": NaN, "IS": 2}', '{"FID": "x", "IS": 2}')]])
def test_a_score_that_no_judge_gives_is_named(name, bad, tmp_path):
    first = "" if name == "coco" else json.dumps(dict(path="a", value=0.5, correct=True)) + "\n"
    file = "coco.json" if name == "coco" else f"{name}.jsonl"
    write_file(str(tmp_path / "scores" / file), f"{first}{bad}\n".encode("latin-1"))
    with pytest.raises(UserError, match=rf"{file}:{1 if name == 'coco' else 2} cannot be read .*: delete that line"):
        shared.read_scores(str(tmp_path), name, {})


def test_scores_without_their_note_and_lists_of_no_benchmark_are_refused(world, sd, judges):
    generate(world, sd, "run", "--bench", "hps")
    score(world, "run")
    path, note = world / "run" / "scores" / "hps.jsonl", world / "run" / "scores" / "hps" / "settings.json"
    said, commands = note.read_text(), [["table", str(world / "run"), "--out", str(world / "t.md")], ["score", str(world / "run"), "--data", str(world / "data")]]
    first, *rest = path.read_text().splitlines()
    evaluate.main(commands[0])
    path.write_text("\n".join([*rest, first, ""]))  # another order is no harm
    evaluate.main(commands[0])
    note.unlink()
    for command in commands:
        with pytest.raises(SystemExit, match=r"hps/settings.json cannot be read .*: delete .*scores/hps\*, so that all is judged again"):
            evaluate.main(command)
    note.write_text(said)
    settings = json.loads((world / "run" / "settings.json").read_text())
    (world / "run" / "settings.json").write_text(json.dumps(settings | dict(lists=settings["lists"] | dict(mine="x"))))
    with pytest.raises(SystemExit, match="run/settings.json names mine, which is no benchmark: take it out of the lists"):
        evaluate.main(commands[1])
    evaluate.main(commands[0])
    assert f"{world / 'run'}: not scored, or only in part: mine" in (world / "t.md").read_text()


def test_a_table_replaces_tables_only(world, sd):
    generate(world, "shapes", "run", "--bench", "shapes")
    score(world, "run")
    for name in ("my.json", "my.md"):
        (world / name).write_text('{"mine": 1}')
        with pytest.raises(SystemExit, match=f"{name} exists, and this program did not write it: give another name"):
            evaluate.main(["table", str(world / "run"), "--out", str(world / "my.md")])
        assert (world / name).read_text() == '{"mine": 1}' and len([file for file in os.listdir(world) if file.startswith("my.")]) == 1
        os.remove(world / name)
    for _ in range(2):  # the program's own table is made anew
        evaluate.main(["table", str(world / "run"), "--out", str(world / "my.md")])
    assert (world / "my.md").read_text().startswith("|") and json.loads((world / "my.json").read_text())["runs"]


def test_fid_and_is_appear_when_all_images_have_been_seen(world, sd, judges, monkeypatch):
    generate(world, sd, "run", "--bench", "coco")
    seen = []

    def trunk(x):
        seen.append(len(x))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return Trunk()(x)
    monkeypatch.setattr(fid, "load_inception", lambda device: (trunk, lambda x: (x.float().mean((2, 3)) / 20,)))
    with pytest.raises(SystemExit, match="stopped. The same command goes on"):
        score(world, "run", flags=["--batch-size", "5"])
    assert os.listdir(world / "run" / "scores") == ["coco"] and seen == [5, 5, 2]
    score(world, "run", flags=["--batch-size", "5"])
    found = json.loads((world / "run" / "scores" / "coco.json").read_text())
    assert list(found) == ["FID", "IS", "IS, spread over its 10 parts"] and len(seen) == 6
    score(world, "run")  # nothing is left to do
    assert len(seen) == 6 and json.loads((world / "run" / "scores" / "coco.json").read_text()) == found


def test_a_damaged_image_is_named(tmp_path):
    rng, path = np.random.default_rng(0), str(tmp_path / "x.png")
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    whole = open(path, "rb").read()
    for start in (8, 40, 60, 200):  # a zeroed block in the head, at the length and in the pixels
        with open(path, "wb") as file:
            file.write(whole[:start] + bytes(64) + whole[start + 64:])
        with pytest.raises(UserError, match="x.png cannot be read .*: delete it"):
            shared.open_image(path)


def test_scores_are_of_whole_benchmarks_and_of_the_images_that_are_there(world, sd, judges):
    generate(world, sd, "run", "--bench", "pick")
    run = world / "run"
    os.rename(run / "pick" / "images" / "00002.jpg", world / "away.jpg")
    with pytest.raises(SystemExit, match=r"1 of 4 images of pick are missing in .*, first pick/images/00002.jpg"):
        score(world, "run")
    (run / "pick" / "images" / "00002.jpg").write_text("no image")
    with pytest.raises(SystemExit, match="00002.jpg cannot be read .*: delete it"):
        score(world, "run")
    os.replace(world / "away.jpg", run / "pick" / "images" / "00002.jpg")
    score(world, "run")
    first = (run / "scores" / "pick.jsonl").read_text()
    score(world, "run")  # nothing is left to do
    assert (run / "scores" / "pick.jsonl").read_text() == first
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | dict(seed=1)))
    for command in (["score", str(run), "--data", str(world / "data")], ["table", str(run), "--out", str(world / "t.md")]):
        with pytest.raises(SystemExit, match=r"scores/pick was begun with seed 42, not 1: delete .*scores/pick\*, so that all is judged again"):
            evaluate.main(command)
    with pytest.raises(SystemExit, match="run has no images of the prompts in .*data/hps: generate makes them"):
        score(world, "run", flags=["--bench", "hps"])
    with pytest.raises(SystemExit, match="none/settings.json cannot be read"):
        score(world, "none")
    (run / "settings.json").write_text(json.dumps(settings))
    (run / "scores" / "pick.jsonl").write_text(first[:-5] + "\n")
    for command in (["score", str(run), "--data", str(world / "data")], ["table", str(run), "--out", str(world / "t.md")]):
        with pytest.raises(SystemExit, match=r"pick.jsonl:4 cannot be read .*delete that line"):
            evaluate.main(command)


def test_a_benchmark_is_compared_where_both_runs_have_it(world, sd, judges):
    generate(world, sd, "a", "--bench", "pick", "hps")
    generate(world, sd, "b", "--bench", "pick", "--guidance", "3", "--steps", "2")
    score(world, "a", "b", flags=["--bench", "pick", "pick"])
    assert len((world / "a" / "scores" / "pick.jsonl").read_text().splitlines()) == 4
    evaluate.main(["table", str(world / "a"), str(world / "b"), "--out", str(world / "t.md")])
    text = (world / "t.md").read_text()
    assert f"| {world / 'b'} − {world / 'a'} |" in text and f"{world / 'a'}: not scored, or only in part: hps" in text
    shutil.copytree(world / "a", world / "half")
    score(world, "half", flags=["--bench", "hps"])
    os.remove(world / "half" / "scores" / "hps21.jsonl")
    evaluate.main(["table", str(world / "half"), "--out", str(world / "t.md")])
    assert f"{world / 'half'}: not scored, or only in part: hps" in (world / "t.md").read_text()
    assert "b: " in text and "steps 2, guidance 3.0" in text and "steps 1, guidance 7.5" in text and "paper" not in text
    for name, change in (("c", 3.0), ("d", 0.0)):  # a constant difference has no spread: prompts are paired with themselves
        shutil.copytree(world / "a", world / name)
        lines = [json.loads(line) for line in open(world / "a" / "scores" / "pick.jsonl")]
        assert len({row["value"] for row in lines}) > 2
        (world / name / "scores" / "pick.jsonl").write_text("".join(json.dumps(row | dict(value=row["value"] + change)) + "\n" for row in lines))
    found = json.loads((world / "d" / "settings.json").read_text())
    (world / "d" / "settings.json").write_text(json.dumps(found | dict(lists=found["lists"] | dict(pick="other prompts"))))
    with pytest.raises(SystemExit, match="scores/pick was begun with other lists|scores/pick was begun with lists"):
        evaluate.main(["table", str(world / "d"), "--out", str(world / "t.md")])
    note = world / "d" / "scores" / "pick" / "settings.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | dict(lists="other prompts")))
    evaluate.main(["table", *[str(world / name) for name in "acd"], "--out", str(world / "t.md")])
    runs = json.loads((world / "t.json").read_text())["runs"]
    assert runs[f"{world / 'c'} − {world / 'a'}"]["PickScore"] == pytest.approx(dict(mean=3, low=3, high=3))
    assert f"{world / 'd'} − {world / 'a'}" not in runs and "d and " in (world / "t.md").read_text()


def test_broken_lists_and_weights_are_named(world, clip, monkeypatch):
    (world / "data" / "hps" / "photo.json").write_text('["a')
    with pytest.raises(UserError, match="the list of prompts in .*data/hps cannot be read .*: delete that folder"):
        evaluate.list_images("hps", str(world / "data"))
    (world / "data" / "coco" / "metadata.csv").write_text('file_name,text\n' + "".join(f'{i}.jpg,"a\ndog"\n' for i in range(12)))
    assert evaluate.list_images("coco", str(world / "data"))[4]["prompt"] == "a\ndog"
    (world / "data" / "coco" / "real_im256.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match="real_im256.npz cannot be read .*delete it"):
        fid.load("cpu", str(world / "data"))
    monkeypatch.setattr(preference, "CLIP_H", clip)
    for error in (RuntimeError("PytorchStreamReader failed"), OSError("no network"), "'state_dict'"):
        def load_state(*arguments, error=error, **kinds):
            if error == "'state_dict'":  # another program's file
                return {}
            raise error
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load_state)
        with pytest.raises(UserError, match=rf"HPS_v2_compressed.pt cannot be read \({error}\): delete .*checkpoints/HPS_v2_compressed.pt"):
            preference.load_hps("cpu", str(world / "data"))
    monkeypatch.setattr(preference, "CLIP_B", str(world / "nothing"))
    with pytest.raises(UserError, match="nothing cannot be read"):
        preference.load_clipscore("cpu", "")
    shutil.copytree(clip, world / "damaged")
    (world / "damaged" / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(preference, "CLIP_B", str(world / "damaged"))
    with pytest.raises(UserError, match="damaged cannot be read"):
        preference.load_clipscore("cpu", "")

    def other_build(*arguments, **kinds):
        raise RuntimeError("operator torchvision::nms does not exist")
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", other_build)
    with pytest.raises(UserError, match=r"damaged cannot be read \(operator torchvision::nms does not exist\)"):
        preference.load_clipscore("cpu", "")


def test_the_papers_numbers_are_as_they_were_read():
    for version_2, rows, total in ((False, 25, 717.7134), (True, 9, 365.6768)):
        found = [numbers for source, _, _, numbers in table.PAPER if (source == "version 2") == version_2]
        assert len(found) == rows and sum(sum(numbers.values()) for numbers in found) == pytest.approx(total)
    inconsistent, = [row for source, _, row, numbers in table.PAPER if source == "Table 1b" and numbers == dict(GenEval=.5045, CB=.3723)]
    assert inconsistent == "SD-1.4 + DDSPO (its CB is that of D-DPO in Table 1a)"


def test_paired_differences_need_the_same_seeds_and_prompts(world, sd, judges, capsys):
    for name, seed in (("a", "1"), ("b", "2")):
        generate(world, sd, name, "--bench", "pick", "--seed", seed)
    with pytest.raises(SystemExit, match="no benchmark in .* has been scored yet"):
        evaluate.main(["table", str(world / "a"), "--out", str(world / "t.md")])
    score(world, "a", "b")
    evaluate.main(["table", str(world / "a"), str(world / "b"), "--out", str(world / "t.md")])
    text = (world / "t.md").read_text()
    assert "seed 2" in text and "b and " in text and "no differences" in text and "−" not in text


def test_images_that_were_made_elsewhere_are_scored_too(world, sd, capsys):
    """In the official layout: half of these images show what they should."""
    rows, run = evaluate.list_images("shapes", str(world / "data")), world / "foreign images"
    with pytest.raises(SystemExit, match="settings.json cannot be read .* or --foreign"):
        score(world, "foreign images")
    with pytest.raises(SystemExit, match="settings.json cannot be read .* or --foreign and one with images in its layout"):
        evaluate.main(["score", str(run), "--foreign"])
    assert not run.exists()
    for k, row in enumerate(rows):
        os.makedirs(os.path.dirname(run / row["path"]), exist_ok=True)
        image = shapes_world.render(shapes_world.make_scene(np.random.default_rng(k), row["metadata"])) if k % 2 else np.zeros((32, 32, 3), np.uint8)
        Image.fromarray(image).save(run / row["path"])
    score(world, "foreign images", flags=["--foreign"])
    found = [json.loads(line)["correct"] for line in open(run / "scores" / "shapes.jsonl")]
    assert found == [bool(k % 2) for k in range(4)]
    assert capsys.readouterr().out.endswith(f"wrote the scores of {run}. Next:\npython evaluate.py table '{run}'\n")
    settings = json.loads((run / "settings.json").read_text())
    assert {settings[key] for key in (*shared.FIXED, "base")} == {"unknown"} and settings["lists"].keys() == {"shapes"}
    (run / rows[0]["path"]).rename(run / "away.png")
    with pytest.raises(SystemExit, match=r"1 of 4 images of shapes are missing in .*, first shapes/00000.png: .* or put them there\.$"):
        score(world, "foreign images")
    (run / "away.png").rename(run / rows[0]["path"])
    score(world, "foreign images")  # from now on the folder is known
    with pytest.raises(SystemExit, match="foreign images was begun with .*checksum"):
        generate(world, sd, "foreign images", "--bench", "shapes")
    Image.new("RGB", (64, 32)).save(run / rows[0]["path"])
    os.remove(run / "scores" / "shapes.jsonl")
    with pytest.raises(SystemExit, match=r"shapes benchmark needs images of 32 x 32 pixels, not \(64, 32\)"):
        score(world, "foreign images")
    generate(world, sd, "own", "--bench", "shapes")
    with pytest.raises(SystemExit, match="own was begun with model .*, not made elsewhere"):
        score(world, "own", flags=["--foreign"])


def test_an_image_of_another_size_is_refused_and_one_with_a_score_is_not_judged_again(world, sd, judges, capsys):
    generate(world, sd, "a run", "--bench", "pick")
    assert capsys.readouterr().out.endswith(f"a run has images of pick. Next:\npython evaluate.py score '{world / 'a run'}'\n")
    score(world, "a run")
    path, scores = world / "a run" / "pick" / "images" / "00002.jpg", world / "a run" / "scores" / "pick.jsonl"
    first = scores.read_text()
    Image.new("RGB", (64, 64), "red").save(path)
    score(world, "a run")
    assert scores.read_text() == first
    Image.new("RGB", (64, 32), "red").save(path)
    scores.unlink()
    with pytest.raises(SystemExit, match=r"00002.jpg cannot be read \(it has 64 x 32 pixels, not 64 x 64\): delete it"):
        score(world, "a run")
    scores.write_text(first)
    with open(scores, "a") as file:  # of an image that the benchmark does not have
        file.write(json.dumps(json.loads(first.split("\n")[0]) | dict(path="pick/images/00009.jpg")) + "\n")
    score(world, "a run")


def test_scores_of_two_judges_are_not_mixed(world, sd, judges, monkeypatch):
    generate(world, sd, "run", "--bench", "pick")
    score(world, "run")
    note = json.loads((world / "run" / "scores" / "pick" / "settings.json").read_text())
    assert note["judge"] == "yuvalkirstain/PickScore_v1"
    shutil.copytree(world / "run", world / "other")
    count, items, judge_of_pick = evaluate.BENCHMARKS["pick"]
    (world / "other" / "scores" / "pick" / "settings.json").write_text(json.dumps(note | dict(judge="other/weights")))
    for run, judge, now in (("run", note["judge"], "other/weights"), ("other", "other/weights", note["judge"])):
        monkeypatch.setitem(evaluate.BENCHMARKS, "pick", (count, items, {"pick": (*judge_of_pick["pick"][:2], now)}))
        for command in (["score", str(world / run), "--data", str(world / "data")], ["table", str(world / run), "--out", str(world / "t.md")]):
            with pytest.raises(SystemExit, match=rf"scores/pick was begun with judge {judge}, not {now}: delete .*scores/pick\*, so that all is judged again"):
                evaluate.main(command)


def test_what_a_judge_lacks_is_noticed_before_the_first_image(world, sd, judges, monkeypatch):
    generate(world, sd, "run", "--bench", "pick", "hps")

    def lacking(device, data):
        raise UserError("this judge needs spaCy")
    monkeypatch.setitem(evaluate.BENCHMARKS, "hps", (12, preference.items_hps, {"hps": (None, lacking, "none")}))
    with pytest.raises(SystemExit, match="this judge needs spaCy"):
        score(world, "run", flags=["--bench", "pick", "hps"])
    assert not (world / "run" / "scores").exists()


def test_several_processes_share_out_the_judges_and_lock_one_each(world, sd, judges, monkeypatch):
    generate(world, sd, "run", "--bench", "pick", "hps", "shapes")
    with holding(str(world / "run" / "scores" / "hps")):
        with pytest.raises(SystemExit, match="another process is writing into .*scores/hps"):
            score(world, "run", flags=["--bench", "hps"])
        score(world, "run", flags=["--bench", "pick"])
    shutil.copytree(world / "run", world / "two")
    shutil.rmtree(world / "two" / "scores")
    score(world, "run", flags=["--bench", "hps"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("1", ["hps.jsonl"]), ("0", ["hps.jsonl", "hps21.jsonl", "pick.jsonl"])):
        monkeypatch.setenv("RANK", rank)
        score(world, "two", flags=["--bench", "pick", "hps"])  # three judges
        assert sorted(name for name in os.listdir(world / "two" / "scores") if name.endswith("l")) == expected
    for name in ("hps.jsonl", "hps21.jsonl", "pick.jsonl"):
        assert (world / "two" / "scores" / name).read_text() == (world / "run" / "scores" / name).read_text()
    with pytest.raises(SystemExit, match="score runs in one process here"):
        score(world, "two", flags=["--foreign"])


def test_the_shapes_benchmark_needs_images_of_its_size(world, sd):
    generate(world, sd, "run", "--bench", "shapes")
    first, *_ = evaluate.list_images("shapes", str(world / "data"))
    Image.new("RGB", (32, 32)).save(world / "run" / first["path"])
    settings = json.loads((world / "run" / "settings.json").read_text()) | dict(pixels="unknown")
    (world / "run" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match=r"shapes benchmark needs images of 32 x 32 pixels, not \(64, 64\)"):
        score(world, "run")


def test_intervals_resample_prompts_within_their_groups():
    rng = np.random.default_rng(1)
    values = rng.random(400)
    found = shared.interval(dict(a=values))
    assert found["mean"] == pytest.approx(values.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    two = shared.interval(dict(a=np.zeros(10), b=np.ones(1000)))  # groups count alike, and constants do not vary
    assert two == dict(mean=0.5, low=0.5, high=0.5)


# ---- Fig. 3


def test_the_grid_has_a_row_a_prompt_and_a_column_a_model(sd, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red fox for $5 and $x^2 _{ 6\n\na blue cup\nan old boat\n")
    shown = []
    monkeypatch.setattr(plots.plt.Axes, "imshow", lambda axis, image: shown.append((axis, image)))
    evaluate.main(["grid", "--models", sd, sd, "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "g.png"),
                   "--rows", "2", "--steps", "2", "--seed", "3", "--batch-size", "1"])
    assert os.path.getsize(tmp_path / "g.png") > 1000
    assert len(shown) == 4 and len({id(axis) for axis, _ in shown}) == 4
    places = {(axis.get_subplotspec().rowspan.start, axis.get_subplotspec().colspan.start): np.array(image, float)
              for axis, image in shown}
    assert (places[0, 0] == places[0, 1]).all()  # the same model twice
    model = models.load(sd)
    for row, prompt in enumerate(("a red fox for $5 and $x^2 _{ 6", "a blue cup")):
        x_T = models.initial_noise(3 + row, model.latent_shape)[None]
        direct, = models.sample(model, [prompt], x_T, 2, 7.5, output_type="pil")
        assert abs(places[row, 0] - np.array(direct, float)).max() <= 2
    assert abs(places[0, 0] - places[1, 0]).mean() > 2
    assert torch.get_num_threads() == 1


PROMPTS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "examples", "prompts.txt")


@pytest.mark.parametrize("flags, message", [
    (["grid", "--prompts", "none.txt"], "there is no file none.txt"),
    (["grid", "--prompts", __file__, "--out", "."], "'.' must be the name of a picture to write, a file that ends in .png"),
    (["grid", "--prompts", __file__, "--out", "x.jpg"], "'x.jpg' must be the name of a picture to write, a file that ends in .png"),
    (["grid", "--prompts", PROMPTS, "--out", os.devnull + "/x.png"], "/dev/null is a file where a folder is needed"),
    (["grid", "--prompts", __file__], "test_evaluate.py: the prompts must be a .txt, .jsonl, .csv or .parquet file"),
    (["grid", "--prompts", PROMPTS, "--steps", "501"], "argument --steps: must be 500 or less, not 501"),
    (["grid", "--prompts", __file__, "--rows", "0"], "argument --rows: must be 1 or more, not 0"),
])
def test_mistakes_in_a_grid_end_in_one_sentence(flags, message, sd, capsys):
    ends(capsys, message, [*flags, "--models", sd])


@pytest.mark.parametrize("rows", ["{}", '{"c": "a"}\n[]', '{"c": "a"}\n{"prompt": 1'])
def test_rows_without_prompts_are_refused(rows, tmp_path, sd):
    (tmp_path / "p.jsonl").write_text(rows)
    with pytest.raises(SystemExit, match=r"p.jsonl:\d: not a row with texts prompt"):
        evaluate.main(["grid", "--models", sd, "--prompts", str(tmp_path / "p.jsonl")])


def test_a_grid_needs_a_prompt(sd, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(SystemExit, match="empty.txt has no prompts in it"):
        evaluate.main(["grid", "--models", sd, "--prompts", str(tmp_path / "empty.txt")])


def test_the_grid_shows_the_prompts_of_text_and_of_rows_of_pairs(sd, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "draw_grid", lambda prompts, columns, path: shown.append(prompts))
    (tmp_path / "p.txt").write_bytes("\ufeffa red fox \n\n  \na “blue” cup".encode())
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "c": "y"}\n\n{"id": 1, "c": "z", "c_minus": "w"}\n')
    for name in ("p.txt", "p.jsonl"):
        evaluate.main(["grid", "--models", sd, "--prompts", str(tmp_path / name), "--out", str(tmp_path / "g.png"), "--steps", "1"])
    assert shown == [["a red fox", "a “blue” cup"], ["x", "z"]]
    (tmp_path / "p.txt").write_bytes("prompt".encode("utf-16"))
    with pytest.raises(SystemExit, match="p.txt:1: .*save the file as UTF-8"):
        evaluate.main(["grid", "--models", sd, "--prompts", str(tmp_path / "p.txt")])


def ends(capsys, message, command):
    """The program ends with this sentence, its own or argparse's."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main(command)
    assert message in str(stop.value) + capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["generate", "--model", "none", "--out", "x", "--steps", "0"], "argument --steps: must be 1 or more, not 0"),
    (["generate", "--model", "none", "--out", "x", "--steps", "501"], "argument --steps: must be 500 or less, not 501"),
    (["generate", "--model", "none", "--out", "x", "--guidance", "-1"], "argument --guidance: must be 0 or more, not -1"),
    (["generate", "--model", "none", "--out", "x", "--guidance", "1e9"], "argument --guidance: must be 100 or less, not 1e9"),
    (["score", "x", "--batch-size", "0"], "argument --batch-size: must be 1 or more, not 0"), (["score", "x"], "x/settings.json cannot be read"),
    (["table", "x"], "x/settings.json cannot be read"), (["table", "x", "--out", "."], "--out . must be the name of a file to write that ends in .md"),
    (["table", "x", "--out", "t.json"], "--out t.json must be the name of a file to write that ends in .md"),
])
def test_mistakes_end_in_one_sentence(flags, message, capsys):
    ends(capsys, message, flags)


def test_a_table_and_a_grid_are_made_by_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (["table", "x"], ["grid", "--models", "x", "--prompts", "x"]):
        with pytest.raises(SystemExit, match=f"{command[0]} runs in one process"):
            evaluate.main(command)


def test_two_writers_and_a_lack_of_memory_end_in_one_sentence(world, sd, monkeypatch):
    with holding(str(world / "run")), pytest.raises(SystemExit, match="another process is writing into"):
        generate(world, sd, "run", "--bench", "pick")

    def sample(*arguments):
        raise torch.OutOfMemoryError("20 GiB")
    monkeypatch.setattr(evaluate, "sample_images", sample)
    with pytest.raises(SystemExit, match="out of memory: .*--batch-size.*20 GiB"):
        generate(world, sd, "run", "--bench", "pick")

    def write(image, file, *arguments, **kinds):
        Path(file).write_bytes(b"half an image")
        raise OSError(28, "No space left on device", "x.jpg")
    monkeypatch.undo()
    set_count(monkeypatch, "pick", 4)
    monkeypatch.setattr(Image.Image, "save", write)
    with pytest.raises(SystemExit, match="No space left on device: .*pick/images/0000.*jpg"):
        generate(world, sd, "run", "--bench", "pick")
    done = threading.Barrier(8, timeout=60)  # the pool's other threads may still clean up, as they do before the program ends
    list(evaluate.POOL.map(lambda _: done.wait(), range(8)))
    assert not [name for *_, names in os.walk(world / "run" / "pick") for name in names]  # no half of an image


def test_weights_put_in_place_by_hand_must_have_the_sha256_of_their_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / os.path.basename(geneval.DETECTOR)
    path.parent.mkdir()
    torch.save(dict(state_dict=tiny_judges.mask2former()[1]), path)
    monkeypatch.setattr(geneval, "DETECTOR_CONFIG", tiny_judges.DETECTOR_CONFIG)
    config = transformers.Mask2FormerConfig(**tiny_judges.DETECTOR_CONFIG)

    def load(url):
        return shared.from_url(geneval.mask2former, config, url, lambda found: geneval.mask2former_from_mmdet(found["state_dict"]), "cpu")
    with pytest.raises(UserError, match=r"https://.*c9d0c4f2.pth cannot be read \(the sha256 of .* does not begin with c9d0c4f2\): delete .*c9d0c4f2.pth"):
        load(geneval.DETECTOR)
    right = f"https://x/detector-{checksum(str(path))[:8]}.pth"
    os.rename(path, path.parent / os.path.basename(right))
    assert load(right).num_parameters() > 0


def test_a_grid_names_a_model_that_cannot_be_loaded_before_it_samples_and_keeps_foreign_pictures(sd, tmp_path, monkeypatch):
    sampled = []
    monkeypatch.setattr(evaluate, "sample_images", lambda *arguments: sampled.append(1) or [Image.new("RGB", (8, 8))] * len(arguments[1]))
    out, command = tmp_path / "g.png", ["grid", "--prompts", PROMPTS, "--out", str(tmp_path / "g.png"), "--models", sd]
    with pytest.raises(SystemExit, match="none is no preset .* and no diffusers folder"):
        evaluate.main([*command, str(tmp_path / "none")])
    assert not sampled and not out.exists()
    for _ in range(2):  # its own picture is made anew
        evaluate.main(command)
    Image.new("RGB", (8, 8), "red").save(out)
    for content in (out.read_bytes(), b"no picture"):
        out.write_bytes(content)
        with pytest.raises(SystemExit, match="g.png exists, and this program did not write it: give another name"):
            evaluate.main(command)
        assert out.read_bytes() == content


def test_what_is_only_in_requirements_eval_is_asked_for(monkeypatch):
    for missing in ({"spacy": None}, {"spacy": types.SimpleNamespace(load=lambda name: open("/none/" + name))}):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "spacy", missing["spacy"])
            with pytest.raises(UserError, match=r"(spacy|en_core_web_sm).*: pip install -r requirements-eval.txt"):
                compbench.load_spacy()
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match="pip install -r requirements-eval.txt"):
        fid.load_inception("cpu")
