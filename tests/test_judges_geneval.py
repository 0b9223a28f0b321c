"""GenEval's rules against its own code's answers, and its judge on small random networks."""

import numpy as np
import pytest
import tiny_judges
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from judges import geneval, shared


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("judges") / "clip")
    tiny_judges.clip(folder)
    return folder


def test_geneval_verdicts_and_reasons_are_the_official_ones():
    for case in tiny_judges.golden("geneval_cases.jsonl"):
        answer = geneval.geneval_verdict(case["detections"], case["colors"], case["metadata"], **case["options"])
        assert answer == (case["correct"], case["reason"]), case["id"]


def test_geneval_keeps_the_official_detections_and_their_verdict_does_not_change():
    for case in tiny_judges.golden("geneval_cases.jsonl"):
        least = 0.9 if case["metadata"]["tag"] == "counting" else 0.3
        options = {key: value for key, value in case["options"].items() if key in ("max_objects", "max_overlap")}
        kept = {name: geneval.geneval_keep(boxes, least, **options) for name, boxes in case["detections"].items()}
        boxes = {name: [case["detections"][name][i] for i in places] for name, places in kept.items() if places}
        assert boxes == case["kept"], case["id"]
        colors = {name: [values[i] for i in kept[name]] for name, values in case["colors"].items()}
        assert geneval.geneval_verdict(boxes, colors, case["metadata"], **case["options"])[0] == case["correct"]


def test_geneval_relations_are_the_official_ones_and_the_authors_rule_only_adds():
    added = 0
    for case in tiny_judges.golden("geneval_relative_position.json"):
        assert geneval.geneval_relations(case["a"], case["b"]) == case["relations"]
        lenient = geneval.geneval_relations(case["a"], case["b"], lenient_position=True)
        assert set(lenient) >= set(case["relations"])
        added += len(lenient) > len(case["relations"])
    assert added == 35  # of 100
    detections = dict(a=[[0, 0, 100, 100, 0.9]], b=[[40, 0, 140, 100, 0.8]])
    metadata = dict(tag="position", include=[dict(count=1, **{"class": "b"}),
                                             dict(count=1, position=["left of", 0], **{"class": "a"})])
    assert not geneval.geneval_verdict(detections, {}, metadata)[0]
    assert geneval.geneval_verdict(detections, {}, metadata, lenient_position=True)[0]


def test_crops_are_grey_outside_the_mask():
    for case in tiny_judges.golden("geneval_crops.json"):
        image = Image.fromarray(np.array(case["image"], np.uint8))
        mask = np.ones(image.size[::-1], bool) if case["mask"] is None else np.array(case["mask"], bool)
        crop = geneval.crop(image, case["box"], Image.fromarray(mask))
        assert list(crop.size) == case["crop_size"] and np.array(crop).tolist() == case["crop"]


def test_instances_are_those_of_mmdets_arithmetic():
    generator = torch.manual_seed(6)
    logits, masks = torch.randn(4, 6, generator=generator) * 3, torch.randn(4, 6, 8, generator=generator) * 4
    masks[2] = -1  # this query has no mask
    padded, resized, size = (24, 32), (20, 30), (10, 15)
    labels, boxes, found = geneval.instances(logits, masks, padded, resized, size, most=7)
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
    assert geneval.instances(logits, masks, padded, resized, size)[0].shape == (20,)


def test_mmdets_weights_give_the_same_detector(monkeypatch):
    net, theirs = tiny_judges.mask2former()
    mine = geneval.mask2former_from_mmdet(theirs)
    other = geneval.mask2former(transformers.Mask2FormerConfig(**tiny_judges.DETECTOR_CONFIG)).eval()
    other.load_state_dict(mine)  # strict: nothing missing, nothing left
    state = net.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in mine.items()) and len(state) == len(mine) + 3
    x = torch.randn(1, 3, 64, 96, generator=torch.manual_seed(8))
    with torch.no_grad():
        a, b = net(pixel_values=x), other(pixel_values=x)
    assert torch.equal(a.class_queries_logits, b.class_queries_logits) and torch.equal(a.masks_queries_logits, b.masks_queries_logits)


def test_mmdets_patches_are_merged_in_swins_order():
    """mmdet unfolds 2 x 2 neighbours by nn.Unfold, normalises and reduces them."""
    net, theirs = tiny_judges.mask2former()
    x = torch.randn(1, 4, 6, 8, generator=torch.manual_seed(9))  # (B, h, w, channels)
    name = "backbone.stages.0.downsample."
    four = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).mT
    normal = F.layer_norm(four, four.shape[-1:], theirs[name + "norm.weight"], theirs[name + "norm.bias"])
    merge = net.model.pixel_level_module.encoder.swin.encoder.layers[0].downsample
    torch.testing.assert_close(merge(x.flatten(1, 2), (4, 6)), normal @ theirs[name + "reduction.weight"].T)


def test_the_detector_is_the_official_one(tmp_path, monkeypatch):
    (tmp_path / "geneval").mkdir()
    (tmp_path / "geneval" / "object_names.txt").write_text("\n".join(tiny_judges.NAMES))
    asked = []
    monkeypatch.setattr(geneval, "from_url", lambda build, config, url, convert, device: asked.append((config, url)))
    monkeypatch.setattr(geneval, "from_hub", lambda *arguments: None)
    geneval.load("cpu", str(tmp_path))
    (config, url), = asked
    assert torch.hub.HASH_REGEX.search(url.split("/")[-1])[1] == "c9d0c4f2"  # what a fetched file's sha256 must begin with
    swin = config.backbone_config
    assert (swin.embed_dim, list(swin.depths), list(swin.num_heads), swin.window_size) == (96, [2, 2, 18, 2], [3, 6, 12, 24], 7)
    assert (config.num_queries, config.encoder_layers, config.decoder_layers, config.num_labels) == (100, 6, 10, 80)


def seen_by(net, monkeypatch):
    """What the network is given from now on, a list."""
    seen, inner = [], net.forward
    monkeypatch.setattr(net, "forward", lambda pixel_values: seen.append(pixel_values) or inner(pixel_values=pixel_values))
    return seen


def test_the_detector_sees_800_pixels_and_its_boxes_are_the_images(monkeypatch):
    net, _ = tiny_judges.mask2former()
    seen = seen_by(net, monkeypatch)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    found = geneval.detect(net, image, tiny_judges.NAMES, threshold=0.05)
    assert seen[0].shape == (1, 3, 800, 800)  # not the hub's 384
    corner = (np.array(image)[0, 0] - [123.675, 116.28, 103.53]) / np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(seen[0][0, :, 0, 0], corner, atol=1e-5)
    assert found and set(found) <= set(tiny_judges.NAMES)
    for pairs in found.values():
        assert [box[4] for box, _ in pairs] == sorted((box[4] for box, _ in pairs), reverse=True)
        for box, mask in pairs:
            assert mask.size == (64, 64) and list(mask.getbbox()) == box[:4] and box[4] > 0.05


def test_an_image_that_is_not_square_keeps_its_shape_and_is_padded(monkeypatch):
    """As mmdet: the longest side at most 1333, the shortest at most 800, zeros at the right and below."""
    net, _ = tiny_judges.mask2former()
    seen, inputs = seen_by(net, monkeypatch), []
    inner = geneval.instances
    monkeypatch.setattr(geneval, "instances", lambda *given: inputs.append(given[2:]) or inner(*given))
    monkeypatch.setattr(geneval, "LONGEST", 133)
    monkeypatch.setattr(geneval, "SHORTEST", 80)
    for size, (w, h), padded in (((50, 40), (100, 80), (96, 128)), ((30, 90), (44, 133), (160, 64)), ((90, 30), (133, 44), (64, 160))):
        found = geneval.detect(net, Image.new("RGB", size, "white"), tiny_judges.NAMES, threshold=0.0)
        x = seen.pop()[0]
        assert x.shape == (3, *padded) and x[:, :h, :w].min() > 2 and not x[:, h:].any() and not x[:, :, w:].any()
        assert [tuple(sides) for sides in inputs.pop()] == [padded, (h, w), size[::-1]]
        assert all(mask.size == size for pairs in found.values() for _, mask in pairs)


def test_detections_come_best_first(monkeypatch):
    net, _ = tiny_judges.mask2former()
    monkeypatch.setattr(geneval, "SHORTEST", 64)
    boxes = torch.tensor([[0, 0, 9, 9, 0.5], [1, 1, 8, 8, 0.9], [2, 2, 7, 7, 0.3], [3, 3, 6, 6, 0.7]])
    monkeypatch.setattr(geneval, "instances", lambda *_: (torch.tensor([78, 78, 78, 47]), boxes, torch.ones(4, 64, 64, dtype=torch.bool)))
    found = geneval.detect(net, Image.new("RGB", (64, 64)), tiny_judges.NAMES)
    scores = {name: [round(box[4], 3) for box, _ in pairs] for name, pairs in found.items()}
    assert scores in ({"dog": [0.9, 0.5], "red cup": [0.7]}, {"dog": [0.9, 0.5, 0.3], "red cup": [0.7]})  # 0.3 is float32's


def test_geneval_is_judged_by_both_position_rules_on_masked_crops(clip, tmp_path, monkeypatch):
    (tmp_path / "geneval").mkdir()
    (tmp_path / "geneval" / "object_names.txt").write_text("\n".join(tiny_judges.NAMES))
    mask = Image.new("1", (140, 100), 1)
    mask.paste(0, (40, 0, 140, 50))
    things = dict(dog=[([0, 0, 100, 100, 0.9], mask)], cup=[([40, 0, 140, 100, 0.8], mask)])
    seen = []
    monkeypatch.setattr(geneval, "detect", lambda net, image, names: things)
    monkeypatch.setattr(geneval, "from_hub", lambda *arguments: None)
    monkeypatch.setattr(geneval, "from_url", lambda *arguments: None)
    monkeypatch.setattr(geneval, "name_colors", lambda net, tokenizer, crops, name: seen.extend(crops) or ["red"] * len(crops))
    clauses = [{"class": "cup", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    row, = geneval.load("cpu", str(tmp_path))([dict(path="p", group="position", metadata=dict(tag="position", include=clauses))], [Image.new("RGB", (140, 100), "blue")])
    assert row["correct"] is False and row["lenient"] is True
    crop, = seen
    assert crop.size == (100, 100) and crop.getpixel((50, 20)) == (153, 153, 153) and crop.getpixel((50, 80)) == (0, 0, 255)


def test_colours_are_the_nearest_of_mean_templates(clip):
    net, tokenizer = shared.from_hub("CLIPModel", clip, "cpu"), shared.from_hub("AutoTokenizer", clip)
    crops = [Image.new("RGB", (30, 20), color) for color in ("red", "blue", "white")]
    named = geneval.name_colors(net, tokenizer, crops, "dog")
    for crop, name in zip(crops, named):
        scores = []
        for color in geneval.COLORS:
            texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
            seen, said = shared.clip_embed(net, tokenizer, [crop], texts)
            scores.append((seen[0] @ F.normalize(said.mean(0), dim=0)).item())
        assert name == geneval.COLORS[int(np.argmax(scores))]
