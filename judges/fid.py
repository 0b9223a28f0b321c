"""FID and IS (Table 1a) by BK-SDM's protocol: 30,000 captions of COCO, an image each, of 256 x 256 pixels.

FID is mseitzer/pytorch-fid's and IS toshas/torch-fidelity's, with torch-fidelity's Inception: the official weights and
arithmetic. The statistics of the 41,000 real images are BK-SDM's.
"""

import csv
import io

import numpy as np
import torch
import torch.nn.functional as F

from judges.shared import fetch, fetch_text
from lib.files import reading

NOTA = "https://netspresso-research-code-release.s3.us-east-2.amazonaws.com/data"


def items(data):
    """An image a caption, in BK-SDM's order."""
    text = fetch_text(data, "coco/metadata.csv", f"{NOTA}/mscoco_val2014_30k/metadata.csv")
    rows = list(csv.reader(io.StringIO(text)))[1:]  # without the head
    return [dict(path=f"coco/im256/{name}", prompt=prompt, group="coco", index=i)
            for i, (name, prompt, *_) in enumerate(rows)]


def frechet(mu_1, sigma_1, mu_2, sigma_2):
    """The Fréchet distance of two normal distributions, float64 tensors of shapes (D,), (D, D)."""
    root = torch.linalg.eigvals(sigma_1 @ sigma_2).sqrt().real.sum()
    return ((mu_1 - mu_2).square().sum() + sigma_1.trace() + sigma_2.trace() - 2 * root).item()


def inception_score(logits, splits=10, seed=2020):
    """Mean and standard deviation over the splits of exp KL(p(y|x) || p(y)), images (N, classes) shuffled first."""
    logits = logits[np.random.RandomState(seed).permutation(len(logits))].double()
    scores = []
    for k in range(splits):
        log_p = logits[k * len(logits) // splits:(k + 1) * len(logits) // splits].log_softmax(1)
        scores.append((log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp().item())
    return np.mean(scores), np.std(scores)


def real_statistics(data):
    """Mean (2048,) and covariance (2048, 2048) of the real images' features."""
    path = fetch(data, "coco/real_im256.npz", f"{NOTA}/mscoco_val2014_41k_full/real_im256.npz")
    with reading(path, "delete it, so that it is fetched again."), np.load(path) as real:
        return [torch.from_numpy(real[key]).double() for key in ("mu", "sigma")]


def load_inception(device):
    """(the trunk as pytorch-fid runs it: (N, 3, 299, 299) in [-1, 1] -> (N, 2048), the network as torch-fidelity runs
    it for IS: uint8 images -> (logits (N, 1008),))."""
    advice = f"delete {torch.hub.get_dir()}/checkpoints/weights-inception*, and pip install -r requirements-eval.txt"
    with reading("torch-fidelity's Inception", advice):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # imports torchvision
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["logits_unbiased"]).to(device).eval()
    return torch.nn.Sequential(*list(net.children())[:-1], torch.nn.Flatten()), net


def load(device, data):
    real_statistics(data)  # a damaged file fails now and not after 30,000 images
    trunk, net = load_inception(device)

    @torch.no_grad()
    def judge(rows, images):
        x = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2).to(device)
        small = F.interpolate(x.float() / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
        parts = zip(rows, trunk(small).cpu(), net(x)[0].cpu())
        return [dict(path=row["path"], features=features, logits=logits) for row, features, logits in parts]
    return judge


def summary(found, data):
    """FID and IS of all that the judge found."""
    found = sorted(found, key=lambda one: one["path"])  # as torch-fidelity does, before it shuffles and splits for IS
    features = torch.stack([one["features"] for one in found]).double()  # (N, 2048)
    mean, spread = inception_score(torch.stack([one["logits"] for one in found]))
    distance = frechet(features.mean(0), torch.cov(features.T), *real_statistics(data))
    return {"FID": distance, "IS": mean, "IS, spread over its 10 parts": spread}
