"""CLIP, HPSv2 and PickScore on small random networks, and their pixels against torchvision's."""

import hashlib

import numpy as np
import pytest
import tiny_judges
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import evaluate
from judges import preference, shared


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("judges") / "clip")
    tiny_judges.clip(folder)
    return folder


def test_clip_sees_torchvisions_pixels():
    for case in tiny_judges.golden("clip_preprocess_cases.json")["cases"]:
        w, h = case["size"]
        y, x, c = np.mgrid[:h, :w, :3]
        image = Image.fromarray(((7 * x + 13 * y + 50 * c + x * y) % 256).astype(np.uint8))
        assert hashlib.sha256(np.array(shared.square(image)).tobytes()).hexdigest() == case["sha256"]
    pixels = shared.clip_pixels(image)
    assert pixels[2, 5, 7] == pytest.approx((np.array(shared.square(image))[5, 7, 2] / 255 - 0.40821073) / 0.27577711, rel=1e-5)


def test_hpsv2_resizes_a_tensor_without_antialias_and_pads():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (448, 448, 3), dtype=np.uint8)
    image[:] = image[:1]  # equal rows, so that only x matters
    mean, std = (np.array(v)[:, None] for v in (shared.CLIP_MEAN, shared.CLIP_STD))
    seen = preference.hps_pixels(Image.fromarray(image))[:, 100].numpy() * std + mean
    taps = np.stack([image[0, k:k + 440:2] for k in range(1, 5)]).astype(float) / 255  # around x = 2, 4, ...
    by_hand = np.tensordot([-0.09375, 0.59375, 0.59375, -0.09375], taps, 1)  # Keys' cubic with a = -0.75, at 1.5 and 0.5
    np.testing.assert_allclose(seen[:, 1:221], by_hand.T, atol=1e-5)
    wide = preference.hps_pixels(Image.fromarray(np.full((100, 200, 3), 255, np.uint8))).numpy() * std[..., None] + mean[..., None]
    assert wide.shape == (3, 224, 224) and abs(wide[:, 56:168] - 1).max() < 1e-5 and abs(wide[:, :56]).max() < 1e-6
    assert abs(wide[:, 168:]).max() < 1e-6
    tall = preference.hps_pixels(Image.fromarray(np.full((200, 100, 3), 255, np.uint8))).numpy() * std[..., None] + mean[..., None]
    np.testing.assert_allclose(tall, wide.transpose(0, 2, 1), atol=1e-6)


def test_clip_vectors_are_unit_projections_whatever_the_batch(clip):
    net, tokenizer = shared.from_hub("CLIPModel", clip, "cpu"), shared.from_hub("AutoTokenizer", clip)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(3)]
    seen, said = shared.clip_embed(net, tokenizer, images, ["a dog", "a much longer prompt with a cat"])
    alone = net.get_text_features(**tokenizer(["a dog"], return_tensors="pt")).pooler_output
    torch.testing.assert_close(said[:1], F.normalize(alone), rtol=1e-4, atol=1e-5)
    pixels = torch.stack([shared.clip_pixels(image, 28) for image in images])
    torch.testing.assert_close(seen, F.normalize(net.get_image_features(pixels).pooler_output), rtol=1e-4, atol=1e-5)
    long, = shared.cosine(net, tokenizer, 1.0)([dict(prompt="word " * 200)], images[:1])  # cut at 77 tokens
    judged = shared.cosine(net, tokenizer, 3.0)([dict(prompt="a dog")] * 2, images[:2])
    assert [x["value"] for x in judged] == pytest.approx((3 * seen[:2] @ said[0]).tolist(), abs=1e-5)
    assert abs(long["value"]) <= 1


def test_open_clips_weights_give_the_same_clip(clip):
    net = shared.from_hub("CLIPModel", clip, "cpu")
    theirs = tiny_judges.open_clip(net)
    other = transformers.CLIPModel(net.config).eval()
    other.load_state_dict(preference.clip_from_open_clip(theirs))  # strict: nothing missing, nothing left
    for name, x in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], x), name


def test_pickscore_reads_prompts_by_the_tokenizer_of_clip_h(clip, monkeypatch):
    asked = []
    monkeypatch.setattr(preference, "from_hub", lambda kind, name, device=None, real=shared.from_hub: asked.append((kind, name)) or real(kind, clip, device))
    image, rows = Image.new("RGB", (30, 20), "red"), [dict(prompt="a dog")]
    (pick,), (clipscore,) = (load("cpu", "")(rows, [image]) for load in (preference.load_pick, preference.load_clipscore))
    assert asked == [("CLIPModel", "yuvalkirstain/PickScore_v1"), ("AutoTokenizer", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
                     ("CLIPModel", "openai/clip-vit-base-patch32"), ("AutoTokenizer", "openai/clip-vit-base-patch32")]
    net = shared.from_hub("CLIPModel", clip, "cpu")
    seen, said = shared.clip_embed(net, shared.from_hub("AutoTokenizer", clip), [image], ["a dog"])
    assert clipscore["value"] == pytest.approx((seen @ said.T).item(), abs=1e-6)  # a cosine as it is
    assert pick["value"] == pytest.approx(net.logit_scale.exp().item() * clipscore["value"], rel=1e-4)


def test_hpsv2_reads_prompts_as_open_clip_cleans_them(clip, monkeypatch):
    """By ftfy, of which only straight quotation marks matter to HPSv2's prompts, and unescaped twice."""
    assert preference.open_clip_text("“a” ‘b’ `c´ d’s ‟e‛ &amp;amp; f&quot; ü") == "\"a\" 'b' `c´ d's \"e' & f\" ü"
    asked = []
    monkeypatch.setattr(preference, "from_hub", lambda *arguments: None)
    monkeypatch.setattr(preference, "from_url", lambda *arguments: None)
    monkeypatch.setattr(shared, "clip_embed", lambda net, tokenizer, images, texts, pixels: asked.append((texts, pixels)) or (torch.ones(1, 1), torch.ones(1, 1)))
    assert preference.load_hps("cpu", "")([dict(prompt="a dog’s &amp; a cat’s", index=3)], [None]) == [dict(value=100)]
    assert asked == [(["a dog's & a cat's"], preference.hps_pixels)]


def test_hpsv2_has_the_weights_of_two_versions(monkeypatch):
    urls = []
    monkeypatch.setattr(preference, "from_hub", lambda *arguments: None)
    monkeypatch.setattr(preference, "from_url", lambda build, config, url, convert, device: urls.append(url))
    preference.load_hps("cpu", "")
    evaluate.BENCHMARKS["hps"][2]["hps21"][1]("cpu", "")
    assert urls == ["https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2_compressed.pt",
                    "https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt"]


def test_weights_are_float32_whatever_their_file(clip, tmp_path):
    transformers.CLIPModel.from_pretrained(clip).half().save_pretrained(tmp_path / "half")
    assert shared.from_hub("CLIPModel", str(tmp_path / "half"), "cpu").dtype == torch.float32
