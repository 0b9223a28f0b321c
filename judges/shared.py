"""What the benchmarks of Sec. 4.2 to 4.4 share: what a run's folder keeps; lists from their official places; networks
from the hub or from their authors' own checkpoints; CLIP, the overlap of boxes, and means with their interval.

Each benchmark's file (preference.py holds two, and compbench.py has three judges) offers evaluate.py functions of two
kinds, which BENCHMARKS names there:

    items(data)           a row for each image in the order of their seeds: its `path` in a run's folder, its `prompt`,
                          the `group` in which scores are averaged first, the prompt's `index` in it, and what else the
                          judge needs. `data` is the folder of the fetched lists.
    load(device, data)    a judge: judge(rows, images) gives a dict for each PIL image, with its `correct` or `value`
                          (fid.py: with what its `summary` needs of all images).

A run's folder has, beside the images,

    settings.json               what the images were made with, and the checksums of the lists of prompts
    scores/NAME.jsonl           what a judge found, a line an image; scores/coco.json, FID and IS
    scores/NAME/settings.json   of which images that is, and which weights the judge has
"""

import json
import os
import pickle

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError

from lib import models
from lib.files import UserError, checksum, read_json, same_settings, text_checksum, write_file
from lib.images import open_rgb

# ---- a run's folder

FIXED = ("checksum", "steps", "guidance", "seed", "sampler", "precision", "pixels")  # the same for all in a folder
OF_THE_LIST = ("path", "prompt", "group", "index", "kind", "atom_count", "skills")  # what scores repeat of a list
VALUES = dict(  # in a judge's row for an image; the first is averaged. A cosine may round to more than 1
    geneval=dict(correct=bool, lenient=bool, details=str), shapes=dict(correct=bool), blip=dict(value=(0, 1), kind=str),
    owl=dict(value=(0, 1)), clipscore=dict(value=(-1.01, 1.01)), hps=dict(value=(-101, 101)),
    hps21=dict(value=(-101, 101)), pick=dict(value=(-101, 101)),
    geneval2=dict(value=(0, 6.01), probabilities=[(0, 6.01)]))


def fits(x, what):
    """Whether x is of the type `what`, a number between its two ends, or a list of such numbers."""
    if isinstance(what, list):
        return type(x) is list and all(fits(y, what[0]) for y in x)
    return type(x) is what if isinstance(what, type) else type(x) in (int, float) and what[0] <= x <= what[1]


def list_checksum(rows):
    """A checksum of a list of images, or of the scores of these images, in any order."""
    return text_checksum(json.dumps([[row.get(key) for key in OF_THE_LIST]
                                     for row in sorted(rows, key=lambda row: row["path"])]))


def read_settings(run):
    path = os.path.join(run, "settings.json")
    found = read_json(path) if os.path.isfile(path) else {}
    if not isinstance(found, dict) or not {*FIXED, "base"} <= found.keys() or not isinstance(found.get("lists"), dict):
        raise UserError(f"cannot read {path}: it does not exist, or evaluate.py generate did not write it. Give a "
                        "folder that generate made, or --foreign to score images that were made elsewhere.")
    return found


def settings_of(model, args):
    """(what images depend on, what else is worth knowing). The model is known by its checksum, because a path may hold
    another run's tomorrow."""
    fixed = dict(checksum=models.model_checksum(model), steps=model.steps, guidance=model.guidance, seed=args.seed,
                 sampler=type(model.pipe.scheduler).__name__, precision=str(model.dtype),
                 pixels=model.latent_shape[1] * model.pipe.vae_scale_factor)
    base = models.training_of(args.model, "model") or args.model  # what the model was tuned from
    base = {path: preset for preset, path in models.PRESETS.items()}.get(models.read_name(base)[0], base)
    return fixed, dict(model=args.model, unet=args.unet, base=base, lists={},
                       versions=f"torch {torch.__version__}, diffusers {diffusers.__version__}")


def add_lists(run, lists):
    """Notes in settings.json from which prompts the images of these benchmarks are made: {benchmark: its rows}."""
    found = read_settings(run)
    for bench, rows in lists.items():
        if found["lists"].setdefault(bench, list_checksum(rows)) != list_checksum(rows):
            raise UserError(f"{run} has images from other prompts of {bench}: give another folder.")
    write_file(os.path.join(run, "settings.json"), json.dumps(found, indent=1) + "\n")


def adopt(run, lists):
    """Writes or completes the settings.json of images that were made elsewhere."""
    path = os.path.join(run, "settings.json")
    if not os.path.exists(path):
        write_file(path, json.dumps(dict.fromkeys((*FIXED, "model", "base", "versions"), "unknown") | dict(lists={})))
    if read_settings(run)["checksum"] != "unknown":
        raise UserError(f"--foreign: the images in {run} were made by evaluate.py generate. Score them without it.")
    add_lists(run, lists)


def read_scores(run, name):
    """{path of an image: its row} of a judge's scores, without a last line that a stopped run left unfinished."""
    path = os.path.join(run, "scores", f"{name}.jsonl")
    if not os.path.exists(path):
        return {}
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            for key, what in (dict(path=str, group=str, index=int) | VALUES[name]).items():
                if not fits(row[key], what):
                    raise ValueError(f"{key} cannot be {row[key]!r}")
            rows[row["path"]] = row
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}:{number} cannot be read ({error!r}): delete that line and give the command of "
                            "score again.") from None
    return rows


def read_coco(run):
    """What is in scores/coco.json, or {} if there is none."""
    path = os.path.join(run, "scores", "coco.json")
    found = read_json(path) if os.path.exists(path) else {}
    if not isinstance(found, dict) or found and not ({"FID", "IS"} <= found.keys()
                                                     and all(fits(x, (0, 1e9)) for x in found.values())):
        raise UserError(f"{path} cannot be read: delete it and give the command of score again.")
    return found


def without_score(run, name, rows):
    """The paths of the images that a judge has not judged. FID and IS are of all images, or of none."""
    if name == "coco":
        return set() if read_coco(run) else {row["path"] for row in rows}
    return {row["path"] for row in rows} - read_scores(run, name).keys()


def note_scores(run, name, bench, rows, judge=None):
    """Notes to which images a judge's scores belong, those of the `rows` of a list, and which weights the `judge` has.
    Without `judge` the note must be there. Raises UserError if it says otherwise, or if a row of the scores has another
    prompt, group or index than the list. Returns the note."""
    folder, settings = os.path.join(run, "scores", name), read_settings(run)
    path = os.path.join(folder, "settings.json")
    try:
        if not judge and not os.path.exists(path):
            raise UserError(f"{path} is missing: it says to which images these scores belong.")
        images = {key: settings[key] for key in FIXED} | dict(prompts=settings["lists"][bench])
        same_settings(path, images | (dict(list=list_checksum(rows), judge=judge) if judge else {}))
        found, note = read_scores(run, name) if name in VALUES else {}, read_json(path)
        if name in VALUES and list_checksum([found.get(row["path"], row) for row in rows]) != note.get("list"):
            raise UserError(f"{folder}.jsonl was changed: the prompt, group or index of an image is not the list's.")
    except UserError as error:
        raise UserError(f"{error} Or delete {folder}*, so that all is judged again.") from None
    return note


def is_there(path):
    """Whether there is an image; a file of 0 bytes, as a power cut leaves it, is none."""
    return os.path.isfile(path) and os.path.getsize(path) > 0


def open_image(path, size="unknown"):
    """The image of a file in RGB. Raises UserError if it is damaged, or not of size x size pixels."""
    try:
        image = open_rgb(path)
        if size != "unknown" and image.size != (size, size):
            raise ValueError(f"it has {image.width} x {image.height} pixels, not {size} x {size}")
    except ValueError as error:
        raise UserError(f"cannot judge {path} ({error}): delete it and give the command of generate again.") from None
    return image


# ---- lists and networks

# errors of damaged weights, and of a torchvision of another build
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


def from_hub(kind, name, device=None, dtype=torch.float32):
    """A pretrained model of transformers on `device`; without a device, a tokenizer or a configuration."""
    try:
        found = getattr(transformers, kind).from_pretrained(name, **dict(dtype=dtype) if device else {})
    except (*BROKEN, ValueError) as error:
        raise UserError(f"cannot load {name}: {str(error).strip().splitlines()[0]}") from None
    return found.to(device).eval().requires_grad_(False) if device else found


def from_url(build, config, url, convert, device):
    """The model build(config) of transformers with the weights convert(checkpoint) of its authors' own checkpoint."""
    net, path = build(config), os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    digits = torch.hub.HASH_REGEX.search(os.path.basename(url))  # in some names: the first ones of the file's sha256
    if digits and os.path.exists(path) and not checksum(path).startswith(digits[1]):  # torch checks downloads only
        raise UserError(f"{path} is not the file of {url}: its sha256 does not begin with {digits[1]}. Delete it, so "
                        "that it is fetched again.")
    try:
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

    `groups` {group: (prompts,)}. Seeds are groups too. For a paired difference give the differences of prompts. A
    number in their place has no interval."""
    if not isinstance(groups, dict):
        return dict(mean=groups)
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=(1000, len(values)))].mean(1) for values in groups.values()]
    low, high = np.percentile(np.mean(means, 0), [2.5, 97.5])
    return dict(mean=float(np.mean([values.mean() for values in groups.values()])), low=float(low), high=float(high))
