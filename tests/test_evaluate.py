"""evaluate.py: the benchmarks' rules against their own code's answers, every judge for real on small random weights, and
the way from a model to a table."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import tiny_judges
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import evaluate
import models
import plots

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")


def golden(name):
    with open(os.path.join(GOLDEN, name)) as file:
        return [json.loads(line) for line in file] if name.endswith(".jsonl") else json.load(file)


# ---- rules, against the answers of the benchmarks' own code


def test_geneval_verdicts_and_reasons_are_the_official_ones():
    for case in golden("geneval_cases.jsonl"):
        answer = evaluate.geneval_verdict(case["detections"], case["colors"], case["metadata"], **case["options"])
        assert answer == (case["correct"], case["reason"]), case["id"]


def test_geneval_keeps_the_official_detections_and_their_verdict_does_not_change():
    for case in golden("geneval_cases.jsonl"):
        least = 0.9 if case["metadata"]["tag"] == "counting" else 0.3
        options = {key: value for key, value in case["options"].items() if key in ("max_objects", "max_overlap")}
        kept = {name: evaluate.geneval_keep(boxes, least, **options) for name, boxes in case["detections"].items()}
        boxes = {name: [case["detections"][name][i] for i in places] for name, places in kept.items() if places}
        assert boxes == case["kept"], case["id"]
        colors = {name: [values[i] for i in kept[name]] for name, values in case["colors"].items()}
        assert evaluate.geneval_verdict(boxes, colors, case["metadata"], **case["options"])[0] == case["correct"]


def test_geneval_relations_are_the_official_ones_and_the_authors_rule_only_adds():
    added = 0
    for case in golden("geneval_relative_position.json"):
        assert evaluate.geneval_relations(case["a"], case["b"]) == case["relations"]
        lenient = evaluate.geneval_relations(case["a"], case["b"], lenient_position=True)
        assert set(lenient) >= set(case["relations"])
        added += len(lenient) > len(case["relations"])
    assert added == 35  # of 100
    detections = dict(a=[[0, 0, 100, 100, 0.9]], b=[[40, 0, 140, 100, 0.8]])
    metadata = dict(tag="position", include=[dict(count=1, **{"class": "b"}),
                                             dict(count=1, position=["left of", 0], **{"class": "a"})])
    assert not evaluate.geneval_verdict(detections, {}, metadata)[0]
    assert evaluate.geneval_verdict(detections, {}, metadata, lenient_position=True)[0]


def test_crops_are_grey_outside_the_mask():
    for case in golden("geneval_crops.json"):
        image = Image.fromarray(np.array(case["image"], np.uint8))
        mask = np.ones(image.size[::-1], bool) if case["mask"] is None else np.array(case["mask"], bool)
        crop = evaluate.crop(image, case["box"], Image.fromarray(mask))
        assert list(crop.size) == case["crop_size"] and np.array(crop).tolist() == case["crop"]


def test_geneval_table_entries_are_those_of_summary_scores(tmp_path, monkeypatch):
    for case in golden("geneval_summary_cases.jsonl"):
        rows, index, image = [], {}, {}
        for row in case["results"]:
            prompt = index.setdefault((row["tag"], row["metadata"]), len(index))
            k = image[prompt] = image.get(prompt, -1) + 1
            rows.append(row | dict(path=f"{prompt}/{k}", group=row["tag"], index=prompt, lenient=False, details="{}" if k % 2 else "x"))
        monkeypatch.setitem(evaluate.COUNTS, "geneval", len(rows))
        shutil.rmtree(tmp_path / "scores", ignore_errors=True)
        evaluate.write_text(str(tmp_path / "scores" / "geneval.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
        found = evaluate.collect(str(tmp_path))
        assert f"{evaluate.interval(found['GenEval'])['mean']:.5f}" == case["official"]["overall"]
        for tag, share in case["official"]["tasks"].items():
            assert f"{evaluate.interval(found['GenEval: ' + tag])['mean']:.2%}" == share
        assert evaluate.interval(found["GenEval: nothing detected"])["mean"] == 1 / 2


def test_compbench_spatial_scores_are_the_official_ones():
    for case in golden("compbench_spatial_cases.jsonl"):
        if case["kind"] == "scene":
            assert evaluate.compbench_spatial_score(case["prompt"], case["nouns"], case["objects"]) == case["official_score"]
        else:
            assert evaluate.compbench_position(case["locality"], case["a"], case["b"]) == case["official_score"]
    assert evaluate.compbench_spatial_score("running", [], []) == 0.0
    assert evaluate.overlap([1, 1, 1, 1], [1, 1, 1, 1]) == 0.0


def test_blip_products_and_phrases_are_the_official_ones():
    case, scores = golden("compbench_blipvqa_case.json"), []
    for image in case["images"]:
        phrases = evaluate.compbench_phrases(case["prompts"][image["file"].split("_")[0]])
        asked = [(question, float(answer)) for question, answer in image["asked"] if question]
        assert [f"{phrase}?" for phrase in phrases] == [question for question, _ in asked]
        scores.append(evaluate.compbench_product([answer for _, answer in asked]))
        assert f"{scores[-1]:.4f}" == image["official"]
    assert np.mean(scores) == pytest.approx(case["official_average"], abs=1e-12)
    assert evaluate.compbench_question("The (red) Cat; 10% #off.") == "the red cat 10% off?"
    assert evaluate.compbench_question("A") == "a?" and evaluate.compbench_question("w " * 60).count("w") == 50


def test_three_in_one_is_the_official_one():
    case = golden("compbench_3in1_case.json")
    spatial, action = ({evaluate.plainly(prompt) for prompt in case[key]} for key in ("spatial_list", "action_list"))
    for i, official in enumerate(case["official"]):
        prompt = evaluate.plainly(case["prompts"][i // 10])
        kind = "spatial" if prompt in spatial else "action" if prompt in action else "all"
        assert evaluate.three_in_one(kind, case["attribute"][i], case["spatial"][i], case["action"][i]) == official


def test_the_distance_and_the_inception_score_are_the_official_ones():
    cases = golden("fid_is_cases.json")
    for case in cases["frechet"]:
        parts = [torch.tensor(case[key], dtype=torch.float64) for key in ("mu1", "sigma1", "mu2", "sigma2")]
        assert evaluate.frechet(*parts) == pytest.approx(case["fid"], rel=1e-9)
    case = cases["inception"]
    mean, spread = evaluate.inception_score(torch.tensor(case["features"], dtype=torch.float64))
    assert mean == pytest.approx(case["shuffled"]["inception_score_mean"], rel=1e-12)
    assert spread == pytest.approx(case["shuffled"]["inception_score_std"], rel=1e-12)


# ---- the judges' traps


def test_clip_sees_torchvisions_pixels():
    for case in golden("clip_preprocess_cases.json")["cases"]:
        w, h = case["size"]
        y, x, c = np.mgrid[:h, :w, :3]
        image = Image.fromarray(((7 * x + 13 * y + 50 * c + x * y) % 256).astype(np.uint8))
        assert hashlib.sha256(np.array(evaluate.square(image)).tobytes()).hexdigest() == case["sha256"]
    pixels = evaluate.clip_pixels(image)
    assert pixels[2, 5, 7] == pytest.approx((np.array(evaluate.square(image))[5, 7, 2] / 255 - 0.40821073) / 0.27577711, rel=1e-5)


def test_hpsv2_resizes_a_tensor_without_antialias_and_pads():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (448, 448, 3), dtype=np.uint8)
    image[:] = image[:1]  # equal rows, so that only x matters
    mean, std = (np.array(v)[:, None] for v in (evaluate.CLIP_MEAN, evaluate.CLIP_STD))
    seen = evaluate.hps_pixels(Image.fromarray(image))[:, 100].numpy() * std + mean
    taps = np.stack([image[0, k:k + 440:2] for k in range(1, 5)]).astype(float) / 255  # around x = 2, 4, ...
    by_hand = np.tensordot([-0.09375, 0.59375, 0.59375, -0.09375], taps, 1)  # Keys' cubic with a = -0.75, at 1.5 and 0.5
    np.testing.assert_allclose(seen[:, 1:221], by_hand.T, atol=1e-5)
    wide = evaluate.hps_pixels(Image.fromarray(np.full((100, 200, 3), 255, np.uint8))).numpy() * std[..., None] + mean[..., None]
    assert wide.shape == (3, 224, 224) and abs(wide[:, 56:168] - 1).max() < 1e-5 and abs(wide[:, :56]).max() < 1e-6
    assert abs(wide[:, 168:]).max() < 1e-6


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("judges") / "clip")
    tiny_judges.clip(folder)
    return folder


def test_clip_vectors_are_unit_projections_whatever_the_batch(clip):
    net, tokenizer = evaluate.from_hub("CLIPModel", clip, "cpu"), evaluate.from_hub("AutoTokenizer", clip)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(3)]
    seen, said = evaluate.clip_embed(net, tokenizer, images, ["a dog", "a much longer prompt with a cat"])
    alone = net.get_text_features(**tokenizer(["a dog"], return_tensors="pt")).pooler_output
    torch.testing.assert_close(said[:1], F.normalize(alone), rtol=1e-4, atol=1e-5)
    pixels = torch.stack([evaluate.clip_pixels(image, 28) for image in images])
    torch.testing.assert_close(seen, F.normalize(net.get_image_features(pixels).pooler_output), rtol=1e-4, atol=1e-5)
    long, = evaluate.cosine(net, tokenizer, 1.0)([dict(prompt="word " * 200)], images[:1])  # cut at 77 tokens
    judged = evaluate.cosine(net, tokenizer, 3.0)([dict(prompt="a dog")] * 2, images[:2])
    assert [x["value"] for x in judged] == pytest.approx((3 * seen[:2] @ said[0]).tolist(), abs=1e-5)
    assert abs(long["value"]) <= 1


def test_open_clips_weights_give_the_same_clip(clip):
    net = evaluate.from_hub("CLIPModel", clip, "cpu")
    theirs = tiny_judges.open_clip(net)
    other = transformers.CLIPModel(net.config).eval()
    other.load_state_dict(evaluate.clip_from_open_clip(theirs))  # strict: nothing missing, nothing left
    for name, x in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], x), name


def test_blips_own_weights_give_the_same_blip():
    net, theirs = tiny_judges.blip()
    assert "visual_encoder.blocks.1.attn.proj.weight" in theirs
    mine = evaluate.blip_from_salesforce(theirs)
    assert mine.keys() == net.state_dict().keys()
    assert all(torch.equal(x, mine[name]) for name, x in net.state_dict().items())
    assert evaluate.BLIP_CONFIG["text_config"]["num_attention_heads"] == 12  # BERT's; transformers' default is 8
    assert evaluate.BLIP_CONFIG["vision_config"] == dict(image_size=480, layer_norm_eps=1e-6)  # not 384, not 1e-5


def test_blip_is_asked_with_enc_and_without_padding():
    net, _ = tiny_judges.blip()
    states = net.vision_model(torch.randn(3, 3, 32, 32, generator=torch.manual_seed(5))).last_hidden_state
    ids = torch.tensor([[101, 1000, 1003, 102]])
    together = evaluate.blip_yes(net, states, ids)
    assert together == pytest.approx([evaluate.blip_yes(net, states[k:k + 1], ids)[0] for k in range(3)], abs=1e-6)
    assert len({round(p, 5) for p in together}) == 3 and all(0 < p < 1 for p in together)
    assert evaluate.blip_yes(net, states, torch.tensor([[7, 1000, 1003, 102]])) == together  # the first becomes [ENC]
    assert evaluate.blip_yes(net, states, torch.tensor([[101, 1001, 1003, 102]])) != together
    question = net.text_encoder(input_ids=torch.tensor([[30523, 1000, 1003, 102]]), encoder_hidden_states=states[:1]).last_hidden_state
    logits = net.text_decoder(input_ids=torch.tensor([[30522]]), encoder_hidden_states=question).logits[0, 0]
    assert together[0] == pytest.approx(torch.sigmoid(logits[2748] - logits[2053]).item(), abs=1e-6)  # bert's yes and no


def test_instances_are_those_of_mmdets_arithmetic():
    generator = torch.manual_seed(6)
    logits, masks = torch.randn(4, 6, generator=generator) * 3, torch.randn(4, 6, 8, generator=generator) * 4
    masks[2] = -1  # this query has no mask
    padded, resized, size = (24, 32), (20, 30), (10, 15)
    labels, boxes, found = evaluate.instances(logits, masks, padded, resized, size, most=7)
    p = logits.softmax(1)[:, :5].numpy()
    best = np.argsort(-p.flatten())[:7]
    assert labels.tolist() == (best % 5).tolist()
    for k, query in enumerate(best // 5):
        large = F.interpolate(masks[None, query:query + 1], padded, mode="bilinear")[..., :20, :30]
        small = F.interpolate(large, size, mode="bilinear")[0, 0].numpy()
        y, x = np.nonzero(small > 0)
        box, quality = [0, 0, 0, 0], 0.0
        if len(x):
            box, quality = [x.min(), y.min(), x.max() + 1, y.max() + 1], (1 / (1 + np.exp(-small[small > 0]))).mean()
        assert boxes[k, :4].tolist() == box and (found[k].numpy() == (small > 0)).all()
        assert boxes[k, 4].item() == pytest.approx(p.flatten()[best[k]] * quality, abs=1e-5)
    assert evaluate.instances(logits, masks, padded, resized, size)[0].shape == (20,)


def test_the_detector_sees_800_pixels_and_its_boxes_are_the_images(tmp_path, monkeypatch):
    tiny_judges.mask2former(str(tmp_path / "m"))
    net, sizes = evaluate.from_hub("Mask2FormerForUniversalSegmentation", str(tmp_path / "m"), "cpu"), []
    inner = net.forward
    monkeypatch.setattr(net, "forward", lambda pixel_values: sizes.append(pixel_values) or inner(pixel_values=pixel_values))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    found = evaluate.detect(net, image, tiny_judges.NAMES, threshold=0.05)
    assert sizes[0].shape == (1, 3, 800, 800)  # not the hub's 384
    corner = (np.array(image)[0, 0] - [123.675, 116.28, 103.53]) / np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(sizes[0][0, :, 0, 0], corner, atol=1e-5)
    assert found and set(found) <= set(tiny_judges.NAMES)
    for pairs in found.values():
        assert [box[4] for box, _ in pairs] == sorted((box[4] for box, _ in pairs), reverse=True)
        for box, mask in pairs:
            assert mask.size == (64, 64) and list(mask.getbbox()) == box[:4] and box[4] > 0.05
    evaluate.detect(net, image.resize((64, 32)), tiny_judges.NAMES)
    assert sizes[1].shape == (1, 3, 672, 1344) and not sizes[1][..., 667:, :].any()  # (1333, 667), padded with 0


def test_detections_come_best_first(tmp_path, monkeypatch):
    tiny_judges.mask2former(str(tmp_path / "m"))
    net = evaluate.from_hub("Mask2FormerForUniversalSegmentation", str(tmp_path / "m"), "cpu")
    boxes = torch.tensor([[0, 0, 9, 9, 0.5], [1, 1, 8, 8, 0.9], [2, 2, 7, 7, 0.3], [3, 3, 6, 6, 0.7]])
    monkeypatch.setattr(evaluate, "instances", lambda *_: (torch.tensor([78, 78, 78, 47]), boxes, torch.ones(4, 64, 64, dtype=torch.bool)))
    found = evaluate.detect(net, Image.new("RGB", (64, 64)), tiny_judges.NAMES)
    scores = {name: [round(box[4], 3) for box, _ in pairs] for name, pairs in found.items()}
    assert scores in ({"dog": [0.9, 0.5], "red cup": [0.7]}, {"dog": [0.9, 0.5, 0.3], "red cup": [0.7]})  # 0.3 is float32's


def test_geneval_is_judged_by_both_position_rules_on_masked_crops(clip, tmp_path, monkeypatch):
    (tmp_path / "geneval").mkdir()
    (tmp_path / "geneval" / "object_names.txt").write_text("\n".join(tiny_judges.NAMES))
    mask = Image.new("1", (140, 100), 1)
    mask.paste(0, (40, 0, 140, 50))
    things = dict(dog=[([0, 0, 100, 100, 0.9], mask)], cup=[([40, 0, 140, 100, 0.8], mask)])
    seen = []
    monkeypatch.setattr(evaluate, "detect", lambda net, image, names: things)
    monkeypatch.setattr(evaluate, "from_hub", lambda *arguments: None)
    monkeypatch.setattr(evaluate, "name_colors", lambda net, tokenizer, crops, name: seen.extend(crops) or ["red"] * len(crops))
    clauses = [{"class": "cup", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    row, = evaluate.load_geneval("cpu", str(tmp_path))([dict(path="p", group="position", metadata=dict(tag="position", include=clauses))], [Image.new("RGB", (140, 100), "blue")])
    assert row["correct"] is False and row["lenient"] is True
    crop, = seen
    assert crop.size == (100, 100) and crop.getpixel((50, 20)) == (153, 153, 153) and crop.getpixel((50, 80)) == (0, 0, 255)


def test_colours_are_the_nearest_of_mean_templates(clip):
    net, tokenizer = evaluate.from_hub("CLIPModel", clip, "cpu"), evaluate.from_hub("AutoTokenizer", clip)
    crops = [Image.new("RGB", (30, 20), color) for color in ("red", "blue", "white")]
    named = evaluate.name_colors(net, tokenizer, crops, "dog")
    for crop, name in zip(crops, named):
        scores = []
        for color in evaluate.COLORS:
            texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
            seen, said = evaluate.clip_embed(net, tokenizer, [crop], texts)
            scores.append((seen[0] @ F.normalize(said.mean(0), dim=0)).item())
        assert name == evaluate.COLORS[int(np.argmax(scores))]


# ---- lists and layouts


def test_the_official_lists_give_the_official_layouts_and_counts(tmp_path):
    tiny_judges.lists(str(tmp_path), small=False)
    data = str(tmp_path)
    assert evaluate.COUNTS == dict(geneval=2212, compbench=18000, coco=30000, hps=3200, pick=1632, shapes=400)
    found = {bench: evaluate.items(bench, data) for bench in evaluate.COUNTS}
    assert [row["path"] for row in found["geneval"]][3:5] == ["geneval/00000/samples/00003.png", "geneval/00001/samples/00000.png"]
    assert found["geneval"][-1]["path"] == "geneval/00552/samples/00003.png"
    assert found["compbench"][3011]["path"] == "compbench/shape/samples/a dog and a dog next to the cup 1._000011.png"
    kinds = [row["kind"] for row in found["compbench"] if row["group"] == "complex"]
    assert [kinds.count(kind) for kind in ("spatial", "action", "all")] == [20, 10, 2970]  # the last prompt is the first again
    assert found["hps"][801]["path"] == "hps/concept-art/00001.jpg" and found["hps"][801]["prompt"] == "concept-art &amp; a dog 1"
    assert found["pick"][1631] == dict(path="pick/images/01631.jpg", prompt='"G 1631" by a dog', group="pick", index=1631)
    assert found["coco"][7]["path"] == "coco/im256/COCO_val2014_000000029992.jpg" and found["coco"][7]["prompt"] == "A dog, number 29992"
    assert len(found["shapes"]) == 400 and found["shapes"][0]["prompt"] == found["shapes"][0]["metadata"]["caption"]
    (tmp_path / "pick" / "PartiPrompts.tsv").write_text("Prompt\na\nb\n")
    with pytest.raises(SystemExit, match=r"pick give 2 images, not 1632: delete that folder"):
        evaluate.items("pick", data)


def test_lists_are_fetched_once_from_pinned_places(tmp_path, monkeypatch):
    asked = []

    def download(url, path, progress):
        asked.append(url)
        with open(path, "w") as file:
            file.write("x")
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert evaluate.fetch("geneval/object_names.txt", str(tmp_path)) == str(tmp_path / "geneval" / "object_names.txt")
    assert asked == [evaluate.SOURCES["geneval/object_names.txt"]]
    github = [url for url in evaluate.SOURCES.values() if "github" in url]
    assert len(github) == 11 and all(len(url.split("/")[5]) == 40 for url in github)

    def offline(url, path, progress):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(SystemExit, match=r"cannot fetch https://.*metadata.csv \(no network\).* put it at .*coco/metadata.csv"):
        evaluate.fetch("coco/metadata.csv", str(tmp_path))


# ---- from a model to a table


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Short lists of prompts, and the number of images that they ask for."""
    for bench, count in tiny_judges.lists(str(tmp_path / "data")).items():
        monkeypatch.setitem(evaluate.COUNTS, bench, count)
    return tmp_path


def generate(world, sd, name, *flags):
    evaluate.main(["generate", "--model", sd, "--out", str(world / name), "--data", str(world / "data"), "--steps", "1", *flags])


def images(folder):
    return {os.path.relpath(os.path.join(where, name), folder): open(os.path.join(where, name), "rb").read()
            for where, _, names in os.walk(folder) for name in names if not where.endswith("scores")}


def test_images_depend_on_seed_and_place_only(world, sd, monkeypatch):
    generate(world, sd, "one", "--bench", "pick", "coco", "--batch-size", "3", "--seed", "5")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        generate(world, sd, "three", "--bench", "pick", "coco", "--batch-size", "3", "--seed", "5")
    one = images(world / "one")
    assert one == images(world / "three") and len(one) == 4 + 2 * 12 + 1
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    for name in ("pick/images/00001.jpg", "coco/im256/COCO_val2014_000000000004.jpg"):
        os.remove(world / "one" / name)
    generate(world, sd, "one", "--bench", "pick", "coco", "--batch-size", "3", "--seed", "5")
    assert images(world / "one") == one
    model = models.load(sd)
    x_T = models.initial_noise(5 + 2, model.latent_shape)[None]
    direct, = models.sample(model, model.encode(['"G 2" by a dog']), x_T, 1, 7.5, output_type="pil")
    direct.save(world / "direct.jpg")
    stored = np.array(Image.open(world / "one" / "pick" / "images" / "00002.jpg"), float)
    assert abs(np.array(Image.open(world / "direct.jpg"), float) - stored).mean() < 2  # another batch rounds differently
    assert len(set(one.values())) > 10
    for name in sorted(os.listdir(world / "one" / "coco" / "im512")):  # BK-SDM's two JPEGs
        small = Image.open(world / "one" / "coco" / "im512" / name).resize((256, 256), Image.BICUBIC)
        small.save(world / "small.jpg", quality=75)
        assert (world / "small.jpg").read_bytes() == one[f"coco/im256/{name}"]


def test_other_processes_wait_for_the_first_to_say_what_the_folder_holds(world, sd, monkeypatch):
    waited = []

    def sleep(seconds):  # meanwhile the first process starts
        waited.append(seconds)
        monkeypatch.setenv("RANK", "0")
        generate(world, sd, "run", "--bench", "pick", "--batch-size", "2")
    monkeypatch.setattr(evaluate.time, "sleep", sleep)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    generate(world, sd, "run", "--bench", "pick", "--batch-size", "2")
    assert len(waited) == 1 and len(os.listdir(world / "run" / "pick" / "images")) == 4


def test_other_settings_are_not_mixed_into_a_folder(world, sd):
    generate(world, sd, "run", "--bench", "pick")
    generate(world, sd, "run", "--bench", "hps")  # another benchmark is welcome
    settings = json.loads((world / "run" / "settings.json").read_text())
    assert settings["lists"].keys() == {"pick", "hps"} and settings["seed"] == 42 and settings["guidance"] == 7.5
    assert settings["sampler"] == "PNDMScheduler" and settings["base"] == sd
    for key in evaluate.FIXED:
        with pytest.raises(SystemExit, match=f"images made with {key} .*, not 99: advice"):
            evaluate.check_settings(str(world / "run" / "settings.json"), settings | {key: 99}, {}, "advice")
    assert set(evaluate.FIXED) == {"weights", "steps", "guidance", "seed", "sampler", "precision"}
    with pytest.raises(SystemExit, match=r"images made with seed 42, not 43: give another --out"):
        generate(world, sd, "run", "--bench", "pick", "--seed", "43")
    generate(world, sd + "/", "run", "--bench", "pick", "--batch-size", "1")  # as after running out of memory
    (world / "data" / "pick" / "PartiPrompts.tsv").write_text("Prompt\na\nb\nc\nd\n")
    with pytest.raises(SystemExit, match="other prompts of pick"):
        generate(world, sd, "run", "--bench", "pick")
    other = models.load(sd)
    other.pipe.vae.decoder.conv_out.bias.data += 0.1
    other.pipe.save_pretrained(world / "vae")
    (world / "data" / "pick" / "PartiPrompts.tsv").write_text("".join(["Prompt\n", *[f'"G {i}" by a dog\n' for i in range(4)]]))
    with pytest.raises(SystemExit, match="images made with weights"):
        generate(world, str(world / "vae"), "run", "--bench", "hps")
    other = models.load(sd)
    other.net.conv_in.weight.data[0, 0, 0, 0] += 1
    other.pipe.save_pretrained(world / "model")
    (world / "model" / "training.json").write_text(json.dumps(dict(model="sdxl")))
    generate(world, str(world / "model"), "tuned", "--bench", "hps")
    tuned = json.loads((world / "tuned" / "settings.json").read_text())
    assert tuned["weights"] != settings["weights"] and tuned["base"] == "sdxl"
    assert len({len(tuned["weights"]), len(settings["weights"]), 16}) == 1
    os.remove(world / "run" / "settings.json")
    with pytest.raises(SystemExit, match="holds images but no settings.json"):
        generate(world, sd, "run", "--bench", "pick", "--guidance", "9")
    (world / "run" / "settings.json").write_text("{}")
    with pytest.raises(SystemExit, match="settings.json was not written by evaluate.py generate"):
        generate(world, sd, "run", "--bench", "pick")


class Trunk(torch.nn.Module):
    """In the Inception network's place: (N, 3, H, W) -> (N, 4)."""
    def forward(self, x):
        assert x.shape[2:] == (299, 299) and x.min() >= -1 and x.max() <= 1
        return torch.stack([x.mean((1, 2, 3)), x[:, 0].mean((1, 2)), x.std((1, 2, 3)), x[:, 2, 0, 0]], 1)


@pytest.fixture
def judges(world, clip, monkeypatch):
    """Small random judges in the place of the hub's. Returns the files that were asked for."""
    for name in ("clip_l", "clip_b", "clip_h", "pick"):
        monkeypatch.setitem(evaluate.HUB, name, clip)
    for name, make in (("detector", tiny_judges.mask2former), ("owl", tiny_judges.owl), ("bert", tiny_judges.bert_tokenizer)):
        make(str(world / name))
        monkeypatch.setitem(evaluate.HUB, name, str(world / name))
    monkeypatch.setattr(evaluate, "BLIP_CONFIG", tiny_judges.BLIP_CONFIG)
    monkeypatch.setattr(evaluate, "load_spacy", lambda: tiny_judges.Parse)
    monkeypatch.setattr(evaluate, "load_inception", lambda device: (Trunk(), lambda x: (x.float().mean((2, 3)) / 20,)))
    asked = []

    def load_state(url, map_location, weights_only):
        asked.append(url)
        assert weights_only
        if "BLIP" in url:
            return dict(model=tiny_judges.blip()[1])
        return dict(state_dict=tiny_judges.open_clip(evaluate.from_hub("CLIPModel", clip, "cpu")))
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
    for name, model in (("ref", sd), ("tuned", str(world / "model"))):
        generate(world, model, name)
        score(world, name, flags=["--batch-size", "7"])
    assert "HPS_v2_compressed.pt" in judges[1] and "model_base_vqa_capfilt_large.pth" in judges[0]
    folder = world / "ref" / "scores"
    rows = {name: [json.loads(line) for line in open(folder / f"{name}.jsonl")] for name in ("geneval", "blip", "clipscore", "owl", "hps", "pick")}
    assert {name: len(x) for name, x in rows.items()} == dict(geneval=48, blip=80, clipscore=40, owl=40, hps=12, pick=4)
    assert (world / "ref" / "geneval" / "00003" / "metadata.jsonl").exists()
    # what summary_scores.py needs; and the verdict of what was found
    assert set(rows["geneval"][0]) >= {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    reasons = {tag: {row["reason"] for row in rows["geneval"] if row["tag"] == tag} for tag in ("single_object", "counting", "position", "colors", "color_attr")}
    assert reasons["single_object"] == {""} and reasons["counting"] == {"expected dog>=2, found 0"}  # 0.44 is not 0.9
    assert all("target" in reason for reason in reasons["position"]) and all("expected blue red cup" in reason for reason in reasons["color_attr"])
    detector = evaluate.from_hub("Mask2FormerForUniversalSegmentation", evaluate.HUB["detector"], "cpu")
    namer, words = evaluate.from_hub("CLIPModel", evaluate.HUB["clip_l"], "cpu"), evaluate.from_hub("AutoTokenizer", evaluate.HUB["clip_l"])
    for row in [row for row in rows["geneval"] if row["tag"] == "colors"]:
        image = Image.open(world / "ref" / row["path"]).convert("RGB")
        dogs = evaluate.detect(detector, image, tiny_judges.NAMES)["dog"]
        np.testing.assert_allclose([box for box, _ in dogs], json.loads(row["details"])["dog"], atol=1e-4)
        name, = evaluate.name_colors(namer, words, [evaluate.crop(image, *dogs[0])], "dog")
        assert row["correct"] == (name == "red") and row["reason"] == ("" if name == "red" else f"expected red dog>=1, found 0 red; and 1 {name}")
    clip, tokenizer = evaluate.from_hub("CLIPModel", evaluate.HUB["clip_h"], "cpu"), evaluate.from_hub("AutoTokenizer", evaluate.HUB["clip_h"])
    for name, row, pixels, scale in (("pick", rows["pick"][2], evaluate.clip_pixels, clip.logit_scale.exp().item()),
                                     ("hps", rows["hps"][4], evaluate.hps_pixels, 100)):
        image = Image.open(world / "ref" / row["path"]).convert("RGB")
        seen, said = evaluate.clip_embed(clip, tokenizer, [image], [row["prompt"].replace("&amp;", "&")], pixels)
        assert row["value"] == pytest.approx(scale * (seen @ said.T).item(), abs=1e-3), name
    blip = rows["blip"][0]
    assert [phrase for phrase, _ in blip["yes"]] == ["the dog", "the dog", "the cup"]  # as often as the prompt names it
    assert blip["value"] == pytest.approx(np.prod([p for _, p in blip["yes"]]), abs=1e-4) and blip["yes"][0] == blip["yes"][1]
    assert len({row["value"] for row in rows["blip"]}) > 10
    vqa, bert = tiny_judges.blip()[0], evaluate.from_hub("AutoTokenizer", evaluate.HUB["bert"])
    pixels = evaluate.to_tensor(Image.open(world / "ref" / blip["path"]).convert("RGB").resize((32, 32), Image.BICUBIC))[None]
    p, = evaluate.blip_yes(vqa, vqa.vision_model(pixels).last_hidden_state, bert("the cup?", return_tensors="pt").input_ids)
    assert blip["yes"][2] == ["the cup", pytest.approx(p, abs=1e-5)]
    assert any(row["objects"] for row in rows["owl"]) and all({x["name"] for x in row["objects"]} <= {"dog", "cup"} for row in rows["owl"])

    row = next(row for row in rows["owl"] if len(row["objects"]) == 2)
    owl, words = evaluate.from_hub("Owlv2ForObjectDetection", evaluate.HUB["owl"], "cpu"), evaluate.from_hub("AutoTokenizer", evaluate.HUB["owl"])
    image = Image.open(world / "ref" / row["path"]).convert("RGB").resize((64, 64), Image.BILINEAR)
    tokens = words(["a photo of a dog", "a photo of a cup"], padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    out = owl(**tokens, pixel_values=evaluate.to_tensor(image)[None])
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
    assert coco["FID"] == pytest.approx(evaluate.frechet(*parts), rel=1e-4) and not (folder / "coco-parts").exists()
    logits = torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float().mean((0, 1)) / 20
                          for path in sorted((world / "ref" / "coco" / "im256").iterdir())])  # as torch-fidelity reads a folder
    assert coco["IS"] == pytest.approx(evaluate.inception_score(logits)[0], rel=1e-6) and coco["IS"] > 1

    # a stop in the middle of a line: the rest is judged again, to the same
    whole = (folder / "owl.jsonl").read_text()
    (folder / "owl.jsonl").write_text(whole[:len(whole) // 2])
    with pytest.raises(SystemExit, match=r"owl.jsonl has \d+ of 40 images: give the command of score again"):
        evaluate.main(["table", str(world / "ref"), "--out", str(world / "t.md")])
    score(world, "ref", flags=["--bench", "compbench", "--batch-size", "7"])
    again = [json.loads(line) for line in open(folder / "owl.jsonl")]
    assert [row["path"] for row in again] == [row["path"] for row in rows["owl"]]
    assert [row["value"] for row in again] == pytest.approx([row["value"] for row in rows["owl"]], abs=1e-4)

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
    assert "| paper, Table 1a: SD-1.4 + DDSPO |  | 0.5045 | 0.3823 |  | 16.39 | 38.10 |  |  |" in text and "Table 2b" not in text
    assert "(4) CB~: with OWLv2 in place of UniDet" in text and "| | GenEval (1) | GenEval, lenient (2) | CB (3) | CB~ (4) |" in text

    # the official UniDet results take the proxy's place
    for category in ("spatial", "complex"):
        path = world / "ref" / "compbench" / category / "labels" / "annotation_obj_detection_2d" / "vqa_result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([dict(question_id=k, answer=k / 20) for k in range(20)][::-1]))
    os.remove(folder / "owl.jsonl")
    score(world, "ref", flags=["--bench", "compbench"])
    assert not (folder / "owl.jsonl").exists()
    found = evaluate.collect(str(world / "ref"))
    assert "CB~" not in found and found["CB: spatial"]["spatial"] == pytest.approx([0.225, 0.725])
    by_path = {row["path"]: row["value"] for row in rows["blip"]}
    expected = [np.mean([(by_path[path] + k / 20) / 2 for path in by_path for k in [int(path[-6:-4])] if "/complex/" in path and k // 10 == i]) for i in (0, 1)]
    assert found["CB: complex"]["complex"] == pytest.approx(expected)
    (path.parent.parent.parent / "samples" / ".DS_Store").write_text("")  # a Mac's
    assert evaluate.collect(str(world / "ref")).keys() == found.keys()
    evaluate.main(["table", *[str(world / name) for name in ("ref", "tuned", "ref/")], "--out", str(world / "t.md")])
    assert (world / "t.md").read_text().count(f"| {world / 'ref'} |") == 2  # once in each table
    os.remove(folder / "blip.jsonl")
    assert not {"CB", "CB: color", "CB: complex"} & evaluate.collect(str(world / "ref")).keys()
    assert "CB: non_spatial" in evaluate.collect(str(world / "ref"))
    path.write_text("[]")
    with pytest.raises(SystemExit, match="0 answers to 20 images"):
        evaluate.collect(str(world / "ref"))


def test_scores_are_of_whole_benchmarks_and_of_the_images_that_are_there(world, sd, judges):
    generate(world, sd, "run", "--bench", "pick")
    run = world / "run"
    os.rename(run / "pick" / "images" / "00002.jpg", world / "away.jpg")
    with pytest.raises(SystemExit, match=r"1 of 4 images of pick are missing in .*, first pick/images/00002.jpg"):
        score(world, "run")
    (run / "pick" / "images" / "00002.jpg").write_text("no image")
    with pytest.raises(SystemExit, match="cannot read .*00002.jpg .*delete it"):
        score(world, "run")
    os.replace(world / "away.jpg", run / "pick" / "images" / "00002.jpg")
    score(world, "run")
    first = (run / "scores" / "pick.jsonl").read_text()
    score(world, "run")  # nothing is left to do
    assert (run / "scores" / "pick.jsonl").read_text() == first
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | dict(seed=1)))
    with pytest.raises(SystemExit, match="scores/settings.json is of images made with seed 42, not 1: delete that folder of scores"):
        score(world, "run")
    with pytest.raises(SystemExit, match="images of hps in .* were not made"):
        score(world, "run", flags=["--bench", "hps"])
    with pytest.raises(SystemExit, match="cannot read .*none/settings.json"):
        score(world, "none")
    (run / "settings.json").write_text(json.dumps(settings))
    (run / "scores" / "pick.jsonl").write_text(first[:-5] + "\n")
    for command in (["score", str(run), "--data", str(world / "data")], ["table", str(run), "--out", str(world / "t.md")]):
        with pytest.raises(SystemExit, match=r"pick.jsonl:4 cannot be read .*delete that line"):
            evaluate.main(command)


def test_a_benchmark_is_compared_where_both_runs_have_it(world, sd, judges):
    generate(world, sd, "a", "--bench", "pick", "hps")
    generate(world, sd, "b", "--bench", "pick", "--guidance", "3")
    score(world, "a", "b", flags=["--bench", "pick"])
    evaluate.main(["table", str(world / "a"), str(world / "b"), "--out", str(world / "t.md")])
    text = (world / "t.md").read_text()
    assert f"| {world / 'b'} − {world / 'a'} |" in text and f"{world / 'a'}: not scored, or only in part: hps" in text
    assert "b differs from " in text and "in guidance (3.0, not 7.5)" in text and "paper" not in text
    for name, change in (("c", 3.0), ("d", 0.0)):  # a constant difference has no spread: prompts are paired with themselves
        shutil.copytree(world / "a", world / name)
        lines = [json.loads(line) for line in open(world / "a" / "scores" / "pick.jsonl")]
        assert len({row["value"] for row in lines}) > 2
        (world / name / "scores" / "pick.jsonl").write_text("".join(json.dumps(row | dict(value=row["value"] + change)) + "\n" for row in lines))
    for path in (world / "d" / "settings.json", world / "d" / "scores" / "settings.json"):
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | dict(lists=found["lists"] | dict(pick="other prompts"))))
    evaluate.main(["table", *[str(world / name) for name in "acd"], "--out", str(world / "t.md")])
    runs = json.loads((world / "t.json").read_text())["runs"]
    assert runs[f"{world / 'c'} − {world / 'a'}"]["PickScore"] == pytest.approx(dict(mean=3, low=3, high=3))
    assert f"{world / 'd'} − {world / 'a'}" not in runs and "d and " in (world / "t.md").read_text()


def test_broken_lists_and_weights_are_named(world, clip, monkeypatch):
    (world / "data" / "hps" / "photo.json").write_text('["a')
    with pytest.raises(SystemExit, match="cannot read the lists of prompts in .*data/hps .*delete that folder"):
        evaluate.items("hps", str(world / "data"))
    (world / "data" / "coco" / "metadata.csv").write_text('file_name,text\n' + "".join(f'{i}.jpg,"a\ndog"\n' for i in range(12)))
    assert evaluate.items("coco", str(world / "data"))[4]["prompt"] == "a\ndog"
    (world / "data" / "coco" / "real_im256.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(SystemExit, match="cannot read .*real_im256.npz .*delete it"):
        evaluate.score_coco(str(world), [], "cpu", type("args", (), dict(data=str(world / "data"))))
    monkeypatch.setitem(evaluate.HUB, "clip_h", clip)
    for error in (RuntimeError("PytorchStreamReader failed"), OSError("no network")):
        def load_state(*arguments, error=error, **kinds):
            raise error
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load_state)
        with pytest.raises(SystemExit, match=rf"cannot fetch or read .*HPS_v2_compressed.pt \({error}\): delete .*checkpoints/HPS_v2_compressed.pt"):
            evaluate.load_hps("cpu", str(world / "data"))
    monkeypatch.setitem(evaluate.HUB, "clip_b", str(world / "nothing"))
    with pytest.raises(SystemExit, match="cannot load .*nothing"):
        evaluate.JUDGES["clipscore"][2]("cpu", "")


def test_the_papers_numbers_are_as_they_were_read():
    assert len(evaluate.PAPER) == 25
    assert sum(sum(numbers.values()) for *_, numbers in evaluate.PAPER) == pytest.approx(717.7134)


def test_pickscore_reads_prompts_by_the_tokenizer_of_clip_h(clip, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "from_hub", lambda kind, name, device=None, real=evaluate.from_hub: asked.append((kind, name)) or real(kind, clip, device))
    for judge in ("pick", "clipscore"):
        evaluate.JUDGES[judge][2]("cpu", "")
    assert asked == [("CLIPModel", "yuvalkirstain/PickScore_v1"), ("AutoTokenizer", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
                     ("CLIPModel", "openai/clip-vit-base-patch32"), ("AutoTokenizer", "openai/clip-vit-base-patch32")]


def test_weights_are_float32_whatever_their_file(clip, tmp_path):
    transformers.CLIPModel.from_pretrained(clip).half().save_pretrained(tmp_path / "half")
    assert evaluate.from_hub("CLIPModel", str(tmp_path / "half"), "cpu").dtype == torch.float32


def test_paired_differences_need_the_same_seeds_and_prompts(world, sd, judges, capsys):
    for name, seed in (("a", "1"), ("b", "2")):
        generate(world, sd, name, "--bench", "pick", "--seed", seed)
    with pytest.raises(SystemExit, match="nothing in .* has been scored yet"):
        evaluate.main(["table", str(world / "a"), "--out", str(world / "t.md")])
    score(world, "a", "b")
    evaluate.main(["table", str(world / "a"), str(world / "b"), "--out", str(world / "t.md")])
    text = (world / "t.md").read_text()
    assert "b differs from " in text and "in seed (2, not 1)" in text and "no differences" in text and "−" not in text


def test_the_shapes_benchmark_is_scored_by_its_rules(world, sd):
    import shapes

    generate(world, sd, "run", "--bench", "shapes")
    with pytest.raises(SystemExit, match=r"shapes benchmark needs images of 32 x 32 pixels, not \(64, 64\)"):
        score(world, "run")
    for path in (world / "run" / "shapes").iterdir():
        Image.open(path).resize((32, 32)).save(path)
    rows = evaluate.items("shapes", str(world / "data"))
    for k, row in enumerate(rows):
        if k % 2:  # half of the images show what they should
            Image.fromarray(shapes.render(shapes.fill(np.random.default_rng(k), row["metadata"]))).save(world / "run" / row["path"])
    score(world, "run")
    found = [json.loads(line)["correct"] for line in open(world / "run" / "scores" / "shapes.jsonl")]
    assert found == [bool(k % 2) for k in range(4)]


def test_intervals_resample_prompts_within_their_groups():
    rng = np.random.default_rng(1)
    values = rng.random(400)
    found = evaluate.interval(dict(a=values))
    assert found["mean"] == pytest.approx(values.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    two = evaluate.interval(dict(a=np.zeros(10), b=np.ones(1000)))  # groups count alike, and constants do not vary
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
        direct, = models.sample(model, model.encode([prompt]), x_T, 2, 7.5, output_type="pil")
        assert abs(places[row, 0] - np.array(direct, float)).max() <= 2
    assert abs(places[0, 0] - places[1, 0]).mean() > 2
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("flags, message", [
    (["grid", "--prompts", "none.txt"], "no file none.txt"), (["grid", "--prompts", os.devnull], "no file"),
    (["grid", "--prompts", __file__, "--out", "."], "--out . must be the name of a PNG file"),
    (["grid", "--prompts", __file__, "--rows", "0"], "--rows must be 1 or more"),
])
def test_mistakes_in_a_grid_end_in_one_sentence(flags, message, sd):
    with pytest.raises(SystemExit, match=message):
        evaluate.main([*flags, "--models", sd])


@pytest.mark.parametrize("flags, message", [
    (["generate", "--model", "none", "--out", "x", "--steps", "0"], "--steps must be 1 or more"),
    (["generate", "--model", "none", "--out", "x", "--guidance", "-1"], "--guidance must be 0 or more"),
    (["score", "x", "--batch-size", "0"], "--batch-size must be 1 or more"), (["score", "x"], "cannot read x/settings.json"),
    (["table", "x"], "cannot read x/settings.json"), (["table", "x", "--out", "."], "--out . must be the name of a Markdown file"),
    (["table", "x", "--out", "t.json"], "--out t.json must be the name of a Markdown file"),
])
def test_mistakes_end_in_one_sentence(flags, message):
    with pytest.raises(SystemExit, match=message):
        evaluate.main(flags)


def test_scoring_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (["score", "x"], ["table", "x"], ["grid", "--models", "x", "--prompts", "x"]):
        with pytest.raises(SystemExit, match=f"{command[0]} runs in one process"):
            evaluate.main(command)


def test_two_writers_and_a_lack_of_memory_end_in_one_sentence(world, sd, monkeypatch):
    with evaluate.locked(str(world / "run")), pytest.raises(SystemExit, match="another process is writing into"):
        generate(world, sd, "run", "--bench", "pick")

    def sample(*arguments):
        raise torch.OutOfMemoryError("20 GiB")
    monkeypatch.setattr(evaluate, "sample_images", sample)
    with pytest.raises(SystemExit, match="out of memory: give a smaller --batch-size, .*20 GiB"):
        generate(world, sd, "run", "--bench", "pick")

    def write(image, path, **kinds):
        with open(path, "w") as file:
            file.write("half an image")
        raise OSError(28, "No space left on device", "x.jpg")
    monkeypatch.undo()
    monkeypatch.setitem(evaluate.COUNTS, "pick", 4)
    monkeypatch.setattr(Image.Image, "save", write)
    with pytest.raises(SystemExit, match="cannot read or write: .*No space left on device: 'x.jpg'. What is written stays"):
        generate(world, sd, "run", "--bench", "pick")
    assert os.listdir(world / "run" / "pick" / "images") == []


def test_what_is_only_in_requirements_eval_is_asked_for(monkeypatch):
    import sys
    for name, loader in (("spacy", evaluate.load_spacy), ("torch_fidelity.feature_extractor_inceptionv3", lambda: evaluate.load_inception("cpu"))):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(SystemExit, match="pip install -r requirements-eval.txt"):
            loader()
