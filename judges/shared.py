"""What the benchmarks of Sec. 4.2 to 4.4 share: lists from their official places, networks from the hub or from their
authors' own checkpoints, CLIP, the overlap of boxes, and the mean of scores with its interval.

Each benchmark's file (preference.py holds two, and compbench.py has three judges) offers evaluate.py functions of two
kinds, which BENCHMARKS names there:

    items(data)           a row for each image in the order of their seeds: its `path` in a run's folder, its `prompt`,
                          the `group` in which scores are averaged first, the prompt's `index` in it, and what else the
                          judge needs. `data` is the folder of the fetched lists.
    load(device, data)    a judge: judge(rows, images) gives a dict for each PIL image, with its `correct` or `value`
                          (fid.py: with what its `summary` needs of all images).
"""

import os
import pickle

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError

from lib.files import UserError

# ---- lists and networks

# what is raised by damaged weights, and by a torchvision of another build
BROKEN = (OSError, RuntimeError, EOFError, KeyError, TypeError, ImportError, pickle.UnpicklingError, SafetensorError)


def fetch(data, name, url):
    """The path of a benchmark's file in the folder `data`. It is fetched from its official place if it is not there."""
    path = os.path.join(data, name)
    if not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path, progress=False)
        except OSError as error:
            raise UserError(f"cannot fetch {url} ({error}): fetch it on another machine and put it at {path}."
                            ) from None
    return path


def fetch_text(data, name, url):
    with open(fetch(data, name, url), encoding="utf-8", newline="") as file:
        return file.read()


def fetch_lines(data, name, url):
    """The lines of a text file that are not blank."""
    return [line.strip("\r") for line in fetch_text(data, name, url).split("\n") if line.strip()]


def from_hub(kind, name, device=None):
    """A pretrained model of transformers, in float32 on `device`; without a device, a tokenizer or a configuration."""
    try:
        found = getattr(transformers, kind).from_pretrained(name, **dict(dtype=torch.float32) if device else {})
    except (*BROKEN, ValueError) as error:
        raise UserError(f"cannot load {name}: {str(error).strip().splitlines()[0]}") from None
    return found.to(device).eval().requires_grad_(False) if device else found


def from_url(build, config, url, convert, device):
    """The model build(config) of transformers with the weights convert(checkpoint) of its authors' own checkpoint."""
    net, path = build(config), os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    try:  # check_hash: where the file's name ends in the first digits of its sha256, they must be right
        checkpoint = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
        net.load_state_dict(convert(checkpoint))
    except BROKEN as error:
        raise UserError(f"cannot fetch or read {url} ({error}): delete {path} if it is there, or fetch the file on "
                        "another machine and put it there.") from None
    return net.to(device).eval().requires_grad_(False)


def rename(state, renames):
    """A state dict with all replacements (old, new) made in its names, in their order. "{}" in a new name stands for q,
    k and v, which are the thirds of the weight."""
    found = {}
    for name, x in state.items():
        for old, new in renames:
            name = name.replace(old, new)
        parts = zip("qkv", x.chunk(3)) if "{}" in name else [("", x)]
        found |= {name.format(letter): part for letter, part in parts}
    return found


# ---- pixels and CLIP

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def unit(image):
    """A PIL image -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def normalised(x, mean=CLIP_MEAN, std=CLIP_STD):
    """(3, H, W) in [0, 1] -> (3, H, W)."""
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def square(image, size=224):
    """torchvision's Resize(size, BICUBIC) and CenterCrop(size) of a PIL image; transformers' own differ by a pixel."""
    w, h = image.size
    w, h = (size, int(size * h / w)) if w < h else (int(size * w / h), size)
    image = image.resize((w, h), Image.BICUBIC)
    x, y = round((w - size) / 2), round((h - size) / 2)
    return image.crop((x, y, x + size, y + size))


def clip_pixels(image, size=224):
    """What CLIP sees of a PIL image: (3, size, size)."""
    return normalised(unit(square(image, size)))


@torch.no_grad()
def clip_embed(net, tokenizer, images, texts, pixels=clip_pixels):
    """Unit vectors of N images and M texts by a CLIPModel: (N, D), (M, D)."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(net.device)
    size = net.config.vision_config.image_size
    out = net(**tokens, pixel_values=torch.stack([pixels(image, size) for image in images]).to(net.device))
    return out.image_embeds, out.text_embeds  # get_image_features gives another type since transformers 5


def cosine(net, tokenizer, scale, pixels=clip_pixels, clean=str):
    """A judge by a CLIPModel: `scale` times the cosine of image and prompt, which goes through `clean` first."""
    def judge(rows, images):
        seen, said = clip_embed(net, tokenizer, images, [clean(row["prompt"]) for row in rows], pixels)
        return [dict(value=value) for value in (scale * (seen * said).sum(1)).tolist()]
    return judge


# ---- boxes and means


def overlap(a, b, pixel=0):
    """Intersection over union of two boxes (x0, y0, x1, y1). GenEval counts a box's last pixel too: pixel 1."""
    def area(x0, y0, x1, y1):
        return max(x1 - x0 + pixel, 0) * max(y1 - y0 + pixel, 0)

    both = area(*np.maximum(a[:2], b[:2]), *np.minimum(a[2:4], b[2:4]))
    union = area(*a[:4]) + area(*b[:4]) - both
    return both / union if union else 0.0


def per_prompt(rows, key="value"):
    """{group: (prompts,) means of row[key] over a prompt's images}."""
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], {}).setdefault(row["index"], []).append(float(row[key]))
    return {group: np.array([np.mean(values[k]) for k in sorted(values)]) for group, values in groups.items()}


def interval(groups):
    """The mean over groups of their means, with its 95 % interval from resampling each group's prompts.

    `groups` {group: (prompts,)}. Seeds are groups too. For a paired difference give the differences of prompts."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=(1000, len(values)))].mean(1) for values in groups.values()]
    low, high = np.percentile(np.mean(means, 0), [2.5, 97.5])
    return dict(mean=float(np.mean([values.mean() for values in groups.values()])), low=float(low), high=float(high))
