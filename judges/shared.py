"""What the benchmarks of Sec. 4.2 to 4.4 share: what a run's folder keeps; lists from their official places; networks
from the hub or from their authors' own checkpoints; CLIP, the overlap of boxes, and means with their interval.

    items(data)           of a benchmark: a row for each image in the order of their seeds, with its `path` in a run's
                          folder, its `prompt`, the `group` in which scores are averaged first, the prompt's `index` in
                          it, and what else the judge needs. `data` is the folder of the fetched lists.
    load(device, data)    a judge: judge(rows, images) gives a dict for each PIL image, with its `correct` or `value`

A run's folder has, beside the images,

    settings.json               what the images were made with, and the checksums of the lists of prompts
    scores/NAME.jsonl           what a judge found, a line an image; scores/coco.json: FID and IS, of all images
    scores/NAME/settings.json   of which images that is, and which weights the judge has
"""

import json
import os

import numpy as np
import torch
import transformers
from PIL import Image

from lib import models
from lib.files import UserError, checksum, difference, read_text, reading, same_settings, text_checksum, write_file
from lib.images import open_rgb

# ---- a run's folder

FIXED = ("checksum", "steps", "guidance", "seed", "sampler", "precision", "pixels")  # the same for all in a folder
MADE_ELSEWHERE = dict(model="made elsewhere")  # what is known of images for --foreign
VALUES = {  # of a judge: the key that is averaged and its bounds (a cosine may pass 1 a bit); else "value", -101 to 101
    "geneval": ("correct", 0, 1), "shapes": ("correct", 0, 1), "coco": ("FID", 0, 1e9), "blip": ("value", 0, 1),
    "owl": ("value", 0, 1), "clipscore": ("value", -1.01, 1.01), "geneval2": ("value", 0, 6.01)}


def settings_of(model, args):
    """(what images depend on, what else is worth knowing). The checksum is the model's, whose path may change."""
    fixed = dict(checksum=models.model_checksum(model), steps=model.steps, guidance=model.guidance, seed=args.seed,
                 sampler=type(model.pipe.scheduler).__name__, precision=str(model.dtype),
                 pixels=model.latent_shape[1] * model.pipe.vae_scale_factor)
    base = models.training_of(models.read_name(args.model)[0], "model") or args.model  # what the model was tuned from
    base = {path: preset for preset, path in models.PRESETS.items()}.get(models.read_name(base)[0], base)
    return fixed, dict(model=args.model, unet=args.unet, base=base, lists={})


def begin(run, lists, fixed, notes=()):
    """Begins a run's folder with {benchmark: rows}, or goes on in it. Raises UserError if it was begun otherwise."""
    path = os.path.join(run, "settings.json")
    if fixed == MADE_ELSEWHERE and not os.path.exists(path):
        write_file(path, json.dumps(dict.fromkeys((*FIXED, "base"), "unknown") | fixed | dict(lists={})))
    same_settings(path, fixed, notes)
    found = read_settings(run)
    for bench, rows in lists.items():
        if found["lists"].setdefault(bench, list_checksum(rows)) != list_checksum(rows):
            raise UserError(f"{run} has images from other prompts of {bench}: give another folder.")
    write_file(path, json.dumps(found, indent=1) + "\n")


def list_checksum(rows):
    return text_checksum(json.dumps(rows))


def read_settings(run):
    path = os.path.join(run, "settings.json")
    with reading(path, "give a folder that evaluate.py generate made, or --foreign and one with images in its layout."):
        found = json.loads(read_text(path)) if os.path.isfile(path) else {}
        if not {*FIXED, "base"} <= found.keys() or not isinstance(found["lists"], dict):
            raise ValueError("generate did not write it")
    return found


def read_scores(run, name, origin):
    """{path of an image: its row} of what a judge has found, without a last line that a stop left unfinished. FID and
    IS are the row of "all". Raises UserError if it is of another `origin`: settings, prompts and judge."""
    folder, rows, (key, low, high) = os.path.join(run, "scores", name), {}, VALUES.get(name, ("value", -101, 101))
    path = folder + (".json" if name == "coco" else ".jsonl")
    if not os.path.exists(path):
        return rows
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        with reading(f"{path}:{number}", "delete that line and give the command of score again."):
            row = json.loads(line)
            rows["all" if name == "coco" else row["path"]] = row
            if not low <= row[key] <= high:
                raise ValueError(f"{key} cannot be {row[key]}")
    note, again = os.path.join(folder, "settings.json"), f"delete {folder}*, so that all is judged again."
    with reading(note, again), open(note, encoding="utf-8") as file:
        if what := difference(json.load(file), origin):
            raise UserError(f"{folder} was begun with {what}: {again}")
    return rows


def is_there(path):
    """Whether there is an image; a file of 0 bytes, as a power cut leaves it, is none."""
    return os.path.isfile(path) and os.path.getsize(path) > 0


def open_image(path, size="unknown"):
    """The image of a file in RGB. Raises UserError if it is damaged, or not of size x size pixels."""
    with reading(path, "delete it and give the command of generate again."):
        image = open_rgb(path)
        if size != "unknown" and image.size != (size, size):
            raise ValueError(f"it has {image.width} x {image.height} pixels, not {size} x {size}")
    return image


# ---- lists and networks


def fetch(data, name, url):
    """The path of a benchmark's file in the folder `data`. It is fetched from its official place if it is not there."""
    path = os.path.join(data, name)
    if not os.path.exists(path):
        with reading(url, f"fetch it on another machine and put it at {path}."):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path, progress=False)
    return path


def fetch_text(data, name, url):
    with open(fetch(data, name, url), encoding="utf-8", newline="") as file:
        return file.read()


def fetch_lines(data, name, url):
    """The lines of a text file that are not blank."""
    return [line.strip("\r") for line in fetch_text(data, name, url).split("\n") if line.strip()]


def from_hub(kind, name, device=None, dtype=torch.float32):
    """A pretrained model of transformers on `device`; without a device, a tokenizer or a configuration."""
    with reading(name, "fetch it anew, with a network, or install the packages of requirements-eval.txt."):
        found = getattr(transformers, kind).from_pretrained(name, **dict(dtype=dtype) if device else {})
    return found.to(device).eval().requires_grad_(False) if device else found


def from_url(build, config, url, convert, device):
    """The model build(config) of transformers with the weights convert(checkpoint) of its authors' own checkpoint."""
    net, path = build(config), os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    digits = torch.hub.HASH_REGEX.search(os.path.basename(url))  # in some names: the first ones of the file's sha256
    with reading(url, f"delete {path} if it is there, or fetch the file on another machine and put it there."):
        if digits and os.path.exists(path) and not checksum(path).startswith(digits[1]):  # torch checks downloads only
            raise ValueError(f"the sha256 of {path} does not begin with {digits[1]}")
        checkpoint = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
        net.load_state_dict(convert(checkpoint))
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
    """The mean over groups of their means, with its 95 % interval from resampling each group's prompts. `groups`
    {group: (prompts,)}; seeds are groups too. For a paired difference give the differences of prompts."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=(1000, len(values)))].mean(1) for values in groups.values()]
    low, high = np.percentile(np.mean(means, 0), [2.5, 97.5])
    return dict(mean=float(np.mean([values.mean() for values in groups.values()])), low=float(low), high=float(high))
