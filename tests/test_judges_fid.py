"""FID and IS against the answers of pytorch-fid and torch-fidelity, and what Inception sees."""

import pickle
import sys
import types

import numpy as np
import pytest
import tiny_judges
import torch
from PIL import Image

from judges import fid
from lib.files import UserError


def test_the_distance_and_the_inception_score_are_the_official_ones():
    cases = tiny_judges.golden("fid_is_cases.json")
    for case in cases["frechet"]:
        parts = [torch.tensor(case[key], dtype=torch.float64) for key in ("mu1", "sigma1", "mu2", "sigma2")]
        assert fid.frechet(*parts) == pytest.approx(case["fid"], rel=1e-9)
    case = cases["inception"]
    mean, spread = fid.inception_score(torch.tensor(case["features"], dtype=torch.float64))
    assert mean == pytest.approx(case["shuffled"]["inception_score_mean"], rel=1e-12)
    assert spread == pytest.approx(case["shuffled"]["inception_score_std"], rel=1e-12)


def test_the_order_of_judging_does_not_change_fid_and_is(tmp_path):
    tiny_judges.lists(str(tmp_path))
    found = [dict(path=f"{i:02d}.jpg", features=torch.randn(4, generator=torch.manual_seed(i)),
                  logits=torch.randn(5, generator=torch.manual_seed(100 + i)) * 3) for i in range(30)]
    summary = fid.summary(found, str(tmp_path))
    assert summary == fid.summary(found[::-1], str(tmp_path)) and summary["IS"] > 1
    features = torch.stack([one["features"] for one in found]).double()
    mu, sigma = fid.real_statistics(str(tmp_path))
    assert summary["FID"] == pytest.approx(fid.frechet(features.mean(0), torch.cov(features.T), mu, sigma))
    assert (summary["IS"], summary["IS, spread over its 10 parts"]) == fid.inception_score(torch.stack([one["logits"] for one in found]))


@pytest.mark.parametrize("error", [RuntimeError("operator torchvision::nms does not exist"), pickle.UnpicklingError("it is damaged, or holds more than weights")])
def test_a_torchvision_of_another_build_and_a_damaged_inception_end_in_a_sentence(error, monkeypatch):
    def extractor(*arguments):
        raise error
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(UserError, match=rf"Inception cannot be read \({error}\): delete .*, and pip install -r requirements-eval.txt"):
        fid.load_inception("cpu")


def test_both_networks_see_the_images_as_their_authors_code_gives_them(tmp_path, monkeypatch):
    tiny_judges.lists(str(tmp_path))
    seen = []
    monkeypatch.setattr(fid, "load_inception", lambda device: (lambda x: seen.append(x) or x.mean((2, 3)), lambda x: (seen.append(x) or x[:, :, 0, 0],)))
    images = [Image.new("RGB", (256, 256), (255, 0, 51)), Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))]
    found = fid.load("cpu", str(tmp_path))([dict(path="a"), dict(path="b")], images)
    features, logits = seen
    assert features.shape == (2, 3, 299, 299) and logits.shape == (2, 3, 256, 256) and logits.dtype == torch.uint8
    assert features[0].mean((1, 2)).tolist() == pytest.approx([1, -1, -0.6], abs=1e-6)
    assert (logits[1].permute(1, 2, 0).numpy() == np.array(images[1])).all()
    x = (100.5 * 256 / 299) - 0.5  # the place of pixel 100 in the image, by half-pixel centres; no antialias
    row = np.array(images[1], float)[0, :, 1] / 127.5 - 1
    at_top = row[int(x)] + (x - int(x)) * (row[int(x) + 1] - row[int(x)])
    assert features[1, 1, 0, 100].item() == pytest.approx(at_top, abs=1e-4)
    assert [one["path"] for one in found] == ["a", "b"] and torch.equal(found[1]["features"], features[1].mean((1, 2)))
    assert torch.equal(found[0]["logits"], logits[0, :, 0, 0])
