"""Sec. 4.2 to 4.4 of DDSPO (arXiv 2512.23426): the benchmarks of Tables 1 to 3, and the pictures of Fig. 3.

    torchrun --nproc_per_node 8 evaluate.py generate --model sd14 --out eval/sd14
    python evaluate.py score eval/sd14
    python evaluate.py table eval/sd14
    python evaluate.py grid --models sd14 runs/sd14-ddspo/pipeline --prompts prompts.txt --out grid.png

    benchmark   images                              judged by (licences that forbid or ask something)
    geneval     553 prompts, 4 each                 Mask2Former (CC BY-NC) and CLIP L/14, GenEval's rules
    compbench   6 categories of 300 prompts, 10     BLIP-VQA (BSD-3), CLIP B/32, UniDet (non-commercial) or OWLv2
    coco        30,000 captions, 1 each             FID and IS by BK-SDM's protocol
    hps         4 styles of 800 prompts, 1          HPSv2, version 2.0 (Apache-2.0)
    pick        1,632 PartiPrompts, 1               PickScore
    shapes      400 prompts of shapes.py, 1         its rules

`generate` writes a benchmark's images into the folders that its official scorer reads; image i of a benchmark comes
from the noise of seed + i, and batch k is the same images on any number of GPUs. `score` judges each image and keeps
what it found, a line an image, in scores/. `table` makes means, 95 % intervals and paired differences of that. Both
`generate` and `score` go on where they were stopped. Where a scorer is not the official one, the table says so.
"""

import argparse
import contextlib
import csv
import hashlib
import html
import io
import itertools
import json
import os
import pickle
import shutil
import sys
import time
import zipfile

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tqdm import tqdm

import models
import plots
from perturb import check_flags, locked, read_rows, to_lines, write_text

# ---- what to generate

CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
STYLES = ("anime", "concept-art", "paintings", "photo")
COUNTS = dict(geneval=2212, compbench=18000, coco=30000, hps=3200, pick=1632, shapes=400)
GENEVAL = "https://raw.githubusercontent.com/djghosh13/geneval/16f1681160a110fd077309eb04c1e004f951e06d"
COMPBENCH = "https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench/%s/examples/dataset"
COMMIT = "7710d059c3391fe97fbf9e2ad3813ed0e7d87979"  # before September 2025, when 5 prompts of color_val changed
NOTA = "https://netspresso-research-code-release.s3.us-east-2.amazonaws.com/data"
SOURCES = {
    "geneval/evaluation_metadata.jsonl": f"{GENEVAL}/prompts/evaluation_metadata.jsonl",
    "geneval/object_names.txt": f"{GENEVAL}/evaluation/object_names.txt",
    **{f"compbench/{name}.txt": f"{COMPBENCH % COMMIT}/{name}.txt" for name in (
        *[f"{category}_val" for category in CATEGORIES], "complex_val_spatial", "complex_val_action")},
    "compbench/non_spatial_val.txt":
        COMPBENCH % "41388b8b6ae716108ebb507133930c1f030990c3" + "/non_spatial_val.txt",
    **{f"hps/{style}.json": f"https://huggingface.co/datasets/zhwang/HPDv2/resolve/main/benchmark/{style}.json"
       for style in STYLES},  # its commits could not be looked up: settings.json has a checksum of every list
    "pick/PartiPrompts.tsv":
        "https://raw.githubusercontent.com/google-research/parti/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071/PartiPrompts.tsv",
    "coco/metadata.csv": f"{NOTA}/mscoco_val2014_30k/metadata.csv",
    "coco/real_im256.npz": f"{NOTA}/mscoco_val2014_41k_full/real_im256.npz"}


def fetch(name, data):
    """The path of a benchmark's file in the folder `data`, fetched from its official source if it is not there."""
    path = os.path.join(data, name)
    if not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(SOURCES[name], path, progress=False)
        except OSError as error:
            sys.exit(f"cannot fetch {SOURCES[name]} ({error}): fetch it on another machine and put it at {path}.")
    return path


def items(bench, data):
    """All images of a benchmark in their order: dicts of path (in a run's folder), prompt, group (the tag, category or
    style), index (of the prompt in its group) and what the scorer needs besides."""
    try:
        found = read_lists(bench, data)
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"cannot read the lists of prompts in {data}/{bench} ({error}): delete that folder, so that they are "
                 "fetched again.")
    if len({row["path"] for row in found}) != COUNTS[bench]:
        sys.exit(f"the lists of prompts in {data}/{bench} give {len(found)} images, not {COUNTS[bench]}: delete that "
                 "folder, so that they are fetched again.")
    return found


def read_lists(bench, data):
    def text(name):
        with open(fetch(name, data), encoding="utf-8", newline="") as file:
            return file.read()

    def lines(name):
        return [line.strip("\r") for line in text(name).split("\n") if line.strip()]

    found = []
    if bench == "geneval":
        rows, seen = [json.loads(line) for line in lines("geneval/evaluation_metadata.jsonl")], {}
        for i, row in enumerate(rows):
            index = seen[row["tag"]] = seen.get(row["tag"], -1) + 1
            found += [dict(path=f"geneval/{i:05d}/samples/{k:05d}.png", prompt=row["prompt"], group=row["tag"],
                           index=index, metadata=row) for k in range(4)]
    elif bench == "compbench":
        plain = {kind: set(map(plainly, lines(f"compbench/complex_val_{kind}.txt"))) for kind in ("spatial", "action")}
        for category in CATEGORIES:
            for i, prompt in enumerate(map(str.strip, lines(f"compbench/{category}_val.txt"))):
                kind = next((kind for kind in plain if plainly(prompt) in plain[kind]), "all")
                found += [dict(path=f"compbench/{category}/samples/{prompt}_{10 * i + k:06d}.png", prompt=prompt,
                               group=category, index=i, kind=kind) for k in range(10)]
    elif bench == "coco":
        rows = itertools.islice(csv.reader(io.StringIO(text("coco/metadata.csv"))), 1, None)
        found = [dict(path=f"coco/im256/{name}", prompt=prompt, group="coco", index=i)
                 for i, (name, prompt, *_) in enumerate(rows)]
    elif bench == "hps":
        for style in STYLES:
            found += [dict(path=f"hps/{style}/{i:05d}.jpg", prompt=prompt, group=style, index=i)
                      for i, prompt in enumerate(json.loads(text(f"hps/{style}.json")))]
    elif bench == "pick":  # not by csv: its quotation marks are a prompt's own
        found = [dict(path=f"pick/images/{i:05d}.jpg", prompt=line.split("\t")[0], group="pick", index=i)
                 for i, line in enumerate(lines("pick/PartiPrompts.tsv")[1:])]
    else:
        import shapes  # which runs this file: so not above

        found = [dict(path=f"shapes/{i:05d}.png", prompt=p["caption"], group="shapes", index=i, metadata=p)
                 for i, p in enumerate(shapes.make_prompts([0, 2], COUNTS["shapes"], held_out_share=0.25))]
    return found


def plainly(prompt):
    """A prompt as 3_in_1.py compares it."""
    return prompt.strip().split(".")[0].lower()


def digest(every):
    return hashlib.sha256(json.dumps([[row["path"], row["prompt"]] for row in every]).encode()).hexdigest()


def sample_images(model, prompts, seeds, steps, guidance):
    """A PIL image for each prompt, from the noise of its seed."""
    x_T = torch.stack([models.initial_noise(seed, model.latent_shape) for seed in seeds])
    return models.sample(model, model.encode(prompts), x_T, steps, guidance, output_type="pil")


def load_model(name, args, device):
    """The model, its sampling steps and its guidance scale."""
    model = models.load(name, device, torch.float16 if device.type == "cuda" else torch.float32)
    model.pipe.vae.enable_slicing()  # a decoder at 1024 pixels needs gigabytes an image
    return (model, model.steps if args.steps is None else args.steps,
            model.guidance if args.guidance is None else args.guidance)


def settings_of(model, steps, guidance, args):
    """What images depend on, with a checksum of all weights: the same path may hold another run's."""
    weights = hashlib.sha256()
    for part, module in sorted(model.pipe.components.items()):
        for name, x in sorted(module.state_dict().items() if isinstance(module, torch.nn.Module) else ()):
            weights.update(f"{part} {name}".encode())
            weights.update(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    base, note = args.model, os.path.join(args.model, "training.json")
    if os.path.exists(note):
        base = read_json(note).get("model", base)
    base = {path: preset for preset, path in models.PRESETS.items()}.get(base, base)
    return dict(model=args.model, base=base, weights=weights.hexdigest()[:16], steps=steps, guidance=guidance,
                seed=args.seed, sampler=type(model.pipe.scheduler).__name__, precision=str(model.dtype),
                versions=f"torch {torch.__version__}, diffusers {diffusers.__version__}")


FIXED = ("weights", "steps", "guidance", "seed", "sampler", "precision")  # of a run's images; the rest is a note


def check_settings(path, settings, lists, advice):
    """Stops if `path` is of images with other settings or prompts; else its settings, with these lists of prompts."""
    old = read_settings(path) if os.path.exists(path) else settings | dict(lists={})
    differ = [f"{key} {old[key]}, not {settings[key]}" for key in FIXED if old[key] != settings[key]]
    differ += [f"other prompts of {bench}" for bench in lists if old["lists"].get(bench, lists[bench]) != lists[bench]]
    if differ:
        sys.exit(f"{path} is of images made with {'; '.join(differ)}: {advice}.")
    return old | dict(lists=old["lists"] | lists)


def generate(args):
    """Writes all images of the benchmarks --bench that are not there yet. Each process makes every n-th batch, whole,
    so that an image does not depend on what was there, on their number or on a stop."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    every = {bench: items(bench, args.data) for bench in args.bench}
    model, steps, guidance = load_model(args.model, args, device)
    path = os.path.join(args.out, "settings.json")
    while rank > 0 and not os.path.exists(path):
        time.sleep(0.1)  # until the first process has said what this folder holds
    with locked(args.out) if rank == 0 else contextlib.nullcontext():
        if not os.path.exists(path) and set(os.listdir(args.out) if os.path.isdir(args.out) else ()) & set(COUNTS):
            sys.exit(f"{args.out} holds images but no settings.json that says how they were made: give another --out.")
        lists = {bench: digest(rows) for bench, rows in every.items()}
        settings = check_settings(path, settings_of(model, steps, guidance, args), lists, "give another --out")
        if rank == 0:
            write_text(path, json.dumps(settings, indent=1) + "\n")
        for bench, rows in every.items():
            for row in rows[::4] if bench == "geneval" and rank == 0 else ():
                folder = os.path.dirname(os.path.dirname(os.path.join(args.out, row["path"])))
                write_text(os.path.join(folder, "metadata.jsonl"), json.dumps(row["metadata"]) + "\n")
            for start in tqdm(range(0, len(rows), args.batch_size)[rank::world], f"generate {bench}", disable=rank > 0):
                batch = rows[start:start + args.batch_size]
                missing = [not os.path.exists(os.path.join(args.out, row["path"])) for row in batch]
                if any(missing):
                    seeds = range(args.seed + start, args.seed + start + len(batch))
                    images = sample_images(model, [row["prompt"] for row in batch], seeds, steps, guidance)
                    for row, image in itertools.compress(zip(batch, images), missing):
                        save_image(image, os.path.join(args.out, row["path"]),
                                   os.path.join(args.out, f"{rank}-{os.getpid()}.partial"))


def save_image(image, path, partial):
    """Writes a PNG or JPEG file (Pillow's quality 75) whole or not at all. BK-SDM's protocol: a COCO image is written
    as JPEG into im512, read again, resized to 256 x 256 (bicubic) and written as JPEG into im256."""
    if os.path.basename(os.path.dirname(path)) == "im256":
        large = os.path.join(os.path.dirname(path), "..", "im512", os.path.basename(path))
        save_image(image, os.path.normpath(large), partial)
        image = Image.open(os.path.normpath(large)).resize((256, 256))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    image.save(partial, format="PNG" if path.endswith(".png") else "JPEG")  # not beside: a scorer reads those folders
    os.replace(partial, path)


# ---- GenEval's rules (djghosh13/geneval, evaluate_images.py)

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


def geneval_keep(boxes, least, max_objects=16, max_overlap=1.0):
    """The places of the detections (x0, y0, x1, y1, score) that count, best first."""
    boxes = np.array(boxes, np.float32).reshape(-1, 5)  # as the detector gives them: float32
    order = [i for i in np.argsort(boxes[:, 4])[::-1] if boxes[i, 4] > np.float32(least)][:max_objects]
    kept = []
    while order:
        kept.append(order.pop(0))
        order = [i for i in order if max_overlap == 1 or overlap(boxes[kept[-1]], boxes[i], 1) < max_overlap]
    return kept


def overlap(a, b, pixel=0):
    """Intersection over union; GenEval counts a box's last pixel too."""
    def area(x0, y0, x1, y1):
        return max(x1 - x0 + pixel, 0) * max(y1 - y0 + pixel, 0)

    common = area(*np.maximum(a[:2], b[:2]), *np.minimum(a[2:4], b[2:4]))
    union = area(*a[:4]) + area(*b[:4]) - common
    return common / union if union else 0.0


def geneval_relations(a, b, position_threshold=0.1, lenient_position=False):
    """Where box a is from b. DDSPO's authors divide by the length of the shortened offset, which is more lenient."""
    (a0, a1), (b0, b1) = (np.array(box[:4], np.float32).reshape(2, 2) for box in (a, b))
    offset = (a0 + a1) / 2 - (b0 + b1) / 2
    short = np.maximum(abs(offset) - position_threshold * (abs(a1 - a0) + abs(b1 - b0)), 0) * np.sign(offset)
    if (abs(short) < 1e-3).all():
        return []
    dx, dy = short / np.linalg.norm(short if lenient_position else offset)
    return [name for name, yes in (("above", dy < -0.5), ("below", dy > 0.5), ("left of", dx < -0.5),
                                   ("right of", dx > 0.5)) if yes]


def geneval_verdict(detections, colors, metadata, *, threshold=0.3, counting_threshold=0.9, max_objects=16,
                    max_overlap=1.0, position_threshold=0.1, lenient_position=False):
    """Whether an image shows what its prompt says, and why not: (bool, str).

    `detections` {class: [[x0, y0, x1, y1, score]]} in any order, `colors` {class: [the colour of each, same order]},
    `metadata` a line of evaluation_metadata.jsonl. The most confident `count` of a class are looked at.
    """
    least = counting_threshold if metadata["tag"] == "counting" else threshold
    kept = {name: geneval_keep(boxes, least, max_objects, max_overlap) for name, boxes in detections.items()}
    reasons, groups = [], []
    for clause in metadata.get("include", []):
        name, count, problem = clause["class"], clause["count"], None
        found = kept.get(name, [])[:count]
        boxes = [detections[name][i] for i in found]
        if len(found) < count:
            problem = f"expected {name}>={count}, found {len(found)}"
        if not problem and "color" in clause:
            answers = [colors[name][i] for i in found]
            right = answers.count(clause["color"])
            if right < count:
                seen = ", ".join(f"{answers.count(color)} {color}" for color in COLORS if color in answers)
                problem = f"expected {clause['color']} {name}>={count}, found {right} {clause['color']}; and {seen}"
        if not problem and "position" in clause:
            relation, target = clause["position"]
            if groups[target] is None:
                problem = f"no target for {name} to be {relation}"
            for a, b in itertools.product(boxes, groups[target] or ()):
                relations = geneval_relations(a, b, position_threshold, lenient_position)
                if relation not in relations:
                    problem = f"expected {name} {relation} target, found {' and '.join(relations)} target"
                    break
        groups.append(None if problem else boxes)
        reasons += [problem] if problem else []
    for clause in metadata.get("exclude", []):
        found = len(kept.get(clause["class"], []))
        if found >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {found}")
    return not reasons, "\n".join(reasons)


# ---- T2I-CompBench's rules (Karine-Huang/T2I-CompBench: 2D_spatial_eval.py, BLIP_vqa.py, 3_in_1.py)

LOCALITIES = ("on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of",
              "on top of")  # the last has no rule, so it scores 0
PERSONS = ("girl", "boy", "man", "woman")


def compbench_position(locality, a, b):
    """How well boxes a and b in the 479 x 479 frame are in this relation, in [0, 1]."""
    dx, dy = ((b[k] + b[k + 2] - a[k] - a[k + 2]) / 2 for k in (0, 1))
    if locality in LOCALITIES[:3]:
        return 1.0 if min(abs(dx), abs(dy)) < 150 else 150 / max(abs(dx), abs(dy))
    along, across = {"on the left of": (dx, dy), "on the right of": (-dx, dy), "on the top of": (dy, dx),
                     "on the bottom of": (-dy, dx)}.get(locality, (0, 0))
    iou = overlap(a, b)
    return 0.0 if along <= abs(across) else 1.0 if iou < 0.1 else 0.1 / iou


def compbench_objects(nouns):
    """The two objects that a prompt's nouns name: the first and the last, people as "person"."""
    return ["person" if noun in PERSONS else noun for noun in (nouns[:1] + nouns[-1:])]


def compbench_spatial_score(prompt, nouns, objects):
    """The score of "spatial" in [0, 1]; `objects` [{name, box, score}], best first, in the 479 x 479 frame."""
    locality = next((words for words in LOCALITIES if words in prompt), None)
    first = {}
    for thing in objects:
        first.setdefault(thing["name"], thing)
    found = [first.get(name) for name in compbench_objects(nouns)]
    score = sum(0.25 * thing["score"] for thing in found if thing)
    if found and all(found):
        score += compbench_position(locality, found[0]["box"], found[1]["box"]) / 2
    return float(score) if score >= 0.5 else 0.0


def compbench_phrases(chunks):
    """The noun phrases of a prompt that BLIP is asked about."""
    return [chunk for chunk in chunks if chunk not in ("top", "the side", "the left", "the right")][:8]


def compbench_question(phrase):
    """A phrase as BLIP's pre_question leaves it."""
    text = "".join(letter for letter in f"{phrase}?".lower() if letter not in ".!\"()*#:;~").rstrip(" ")
    return " ".join(text.split(" ")[:50])


def compbench_product(answers):
    """The score of an image: the product of P(yes) over its phrases, each with four decimals."""
    rounded = [f"{p:.4f}" for p in answers]
    return float(f"{np.prod(np.array(rounded, np.float32), dtype=np.float32):.4f}")


def three_in_one(kind, attribute, spatial, action):
    """The score of "complex": `kind` says in which of CompBench's lists the prompt is."""
    return {"spatial": (spatial + attribute) / 2, "action": (action + attribute) / 2}.get(
        kind, (attribute + spatial + action) / 3)


# ---- FID (mseitzer/pytorch-fid) and IS (toshas/torch-fidelity)


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


# ---- the judges. Each loader(device, data) gives a function of rows and their images -> a dict for each image

HUB = dict(detector="facebook/mask2former-swin-small-coco-instance", clip_l="openai/clip-vit-large-patch14",
           clip_b="openai/clip-vit-base-patch32", clip_h="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
           pick="yuvalkirstain/PickScore_v1", hps="xswu/HPSv2", bert="bert-base-uncased",
           owl="google/owlv2-base-patch16-ensemble")
BLIP = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_base_vqa_capfilt_large.pth"
BLIP_CONFIG = dict(vision_config=dict(image_size=480, layer_norm_eps=1e-6), text_config=dict(num_attention_heads=12))
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
COCO_MEAN, COCO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def from_hub(kind, name, device=None):
    """A pretrained model of transformers, in float32 on `device`; without device a tokenizer or a configuration."""
    try:
        found = getattr(transformers, kind).from_pretrained(name, **dict(dtype=torch.float32) if device else {})
    except OSError as error:
        sys.exit(f"cannot load {name}: {str(error).strip().splitlines()[0]}")
    return found.to(device).eval().requires_grad_(False) if device else found


def unit(image):
    """A PIL image -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def to_tensor(image, mean=CLIP_MEAN, std=CLIP_STD):
    """A PIL image or (3, H, W) in [0, 1] -> (3, H, W), normalised."""
    image = unit(image) if isinstance(image, Image.Image) else image
    return (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def square(image, size=224):
    """torchvision's Resize(size, BICUBIC) and CenterCrop(size) of a PIL image: transformers' own differ by a pixel."""
    w, h = image.size
    w, h = (size, int(size * h / w)) if w < h else (int(size * w / h), size)
    image = image.resize((w, h), Image.BICUBIC)
    x, y = round((w - size) / 2), round((h - size) / 2)
    return image.crop((x, y, x + size, y + size))


def clip_pixels(image, size=224):
    return to_tensor(square(image, size))


def hps_pixels(image, size=224):
    """HPSv2 resizes the longest side of a tensor, as torchvision before 0.17 did: without antialias; then it pads."""
    x = unit(image)[None]
    h, w = (round(side * size / max(image.size)) for side in x.shape[2:])
    x = F.interpolate(x, (h, w), mode="bicubic", align_corners=False, antialias=False)
    left, top = (size - w) // 2, (size - h) // 2
    return to_tensor(F.pad(x, (left, size - w - left, top, size - h - top))[0])


@torch.no_grad()
def clip_embed(net, tokenizer, images, texts, pixels=clip_pixels):
    """Unit vectors of N images and M texts by a CLIPModel: (N, D), (M, D)."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(net.device)
    size = net.config.vision_config.image_size
    out = net(**tokens, pixel_values=torch.stack([pixels(image, size) for image in images]).to(net.device))
    return out.image_embeds, out.text_embeds  # of get_image_features transformers 5 changed the type


def instances(class_logits, mask_logits, padded, resized, size, most=100):
    """mmdet's instances from Mask2Former's logits (Q, classes + 1), (Q, h, w): labels (N,), boxes with scores (N, 5),
    masks (N, H, W). The image of `size` was `resized` and `padded` for the network, all (H, W)."""
    scores = class_logits.softmax(-1)[:, :-1]
    top, places = scores.flatten().topk(min(most, scores.numel()))
    labels, queries = places % scores.shape[1], places // scores.shape[1]
    logits = F.interpolate(mask_logits[None], padded, mode="bilinear", align_corners=False)
    logits = F.interpolate(logits[:, :, :resized[0], :resized[1]], size, mode="bilinear", align_corners=False)[0]
    masks, spans = logits > 0, []
    inside = masks.flatten(1)
    quality = (logits.sigmoid().flatten(1) * inside).sum(1) / (inside.sum(1) + 1e-6)
    for hit in (masks.any(1).int(), masks.any(2).int()):  # over x, over y
        spans.append((hit.argmax(1), hit.shape[1] - hit.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = spans
    boxes = torch.stack([x0, y0, x1, y1], 1) * inside.any(1)[:, None]
    return labels, torch.cat([boxes[queries], (top * quality[queries])[:, None]], 1), masks[queries]


@torch.no_grad()
def detect(net, image, names, threshold=0.3):
    """{class: [(box with score, mask as a PIL image)]} of the detections above GenEval's threshold, best first."""
    w, h = image.size
    scale = min(1333 / max(w, h), 800 / min(w, h))
    resized = int(h * scale + 0.5), int(w * scale + 0.5)
    padded = [-(-side // 32) * 32 for side in resized]
    x = F.interpolate(unit(image)[None], resized, mode="bilinear", align_corners=False)[0]
    x = to_tensor(x, COCO_MEAN, COCO_STD)
    x = F.pad(x, (0, padded[1] - resized[1], 0, padded[0] - resized[0]))[None].to(net.device)
    out, found = net(pixel_values=x), {}
    labels, boxes, masks = instances(out.class_queries_logits[0], out.masks_queries_logits[0], padded, resized, (h, w))
    for i in boxes[:, 4].argsort(descending=True).tolist():
        if boxes[i, 4] > threshold:
            mask = Image.fromarray(masks[i].cpu().numpy())
            found.setdefault(names[labels[i]], []).append((boxes[i].tolist(), mask))
    return found


def crop(image, box, mask):
    """What GenEval's CLIP sees of an object: grey outside its mask."""
    return Image.composite(image, Image.new("RGB", image.size, "#999"), mask).crop(tuple(box[:4]))


def name_colors(net, tokenizer, crops, name):
    """The colour of each crop of an object of class `name`, by CLIP's zero-shot classifier."""
    texts = [text.format(color) for color in COLORS
             for text in ("a photo of a {} " + name, "a photo of a {}-colored " + name, "a photo of a {} object")]
    seen, said = clip_embed(net, tokenizer, crops, texts)
    said = F.normalize(said.view(len(COLORS), 3, -1).mean(1), dim=1)
    return [COLORS[k] for k in (seen @ said.T).argmax(1).tolist()]


def load_geneval(device, data):
    with open(fetch("geneval/object_names.txt", data), encoding="utf-8") as file:
        names = file.read().splitlines()  # GenEval's names, in COCO's order: the hub's labels differ
    net = from_hub("Mask2FormerForUniversalSegmentation", HUB["detector"], device)
    clip, tokenizer = from_hub("CLIPModel", HUB["clip_l"], device), from_hub("AutoTokenizer", HUB["clip_l"])

    def judge(rows, images):
        found = []
        for row, image in zip(rows, images):
            things = detect(net, image, names)
            boxes = {name: [box for box, _ in pairs][:16] for name, pairs in things.items()}
            asked = {clause["class"] for clause in row["metadata"].get("include", []) if "color" in clause}
            colors = {name: name_colors(clip, tokenizer, [crop(image, *pair) for pair in things[name][:16]], name)
                      for name in asked if name in things}
            correct, reason = geneval_verdict(boxes, colors, row["metadata"])
            lenient, _ = geneval_verdict(boxes, colors, row["metadata"], lenient_position=True)
            found.append(dict(filename=row["path"], tag=row["group"], correct=correct, reason=reason, lenient=lenient,
                              details=json.dumps(boxes), metadata=json.dumps(row["metadata"])))
        return found
    return judge


def load_spacy():
    """The parser of T2I-CompBench, which used its version 3.5."""
    try:
        import spacy  # here, for it and its model are in requirements-eval.txt only

        return spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        sys.exit(f"T2I-CompBench needs spaCy and its model ({error}): pip install -r requirements-eval.txt")


def blip_from_salesforce(state):
    """The names of BLIP's own checkpoint -> those of BlipForQuestionAnswering."""
    renames = [("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
               ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
               ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
               ("visual_encoder.blocks", "vision_model.encoder.layers"),
               ("visual_encoder.norm", "vision_model.post_layernorm"), (".attn.proj", ".self_attn.projection"),
               (".attn.", ".self_attn."), (".norm1", ".layer_norm1"), (".norm2", ".layer_norm2")]
    return {rename(name, renames): x for name, x in state.items() if not name.endswith(".position_ids")}


def rename(name, renames):
    for old, new in renames:
        name = name.replace(old, new)
    return name


def from_url(build, config, url, convert, device):
    """A model of transformers with the weights of its authors' own checkpoint."""
    place = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    try:
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        sys.exit(f"cannot fetch or read {url} ({error}): delete {place} if it is there, or fetch it elsewhere and put "
                 "it there.")
    net = build(config)
    net.load_state_dict(convert(state))
    return net.to(device).eval().requires_grad_(False)


@torch.no_grad()
def blip_yes(net, image_states, ids):
    """P(yes) / (P(yes) + P(no)) for each image (N, patches, D), of one question's token ids (1, L).

    By its parts: the class's own forward gives no logits and starts with [CLS] where BLIP has [ENC]. Without padding:
    transformers 5.23 ignores the mask of a padded question in the decoder.
    """
    ids = ids.repeat(len(image_states), 1)
    ids[:, 0] = 30523  # [ENC]
    seen = torch.ones(image_states.shape[:2], dtype=torch.long, device=ids.device)
    question = net.text_encoder(input_ids=ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=image_states,
                                encoder_attention_mask=seen).last_hidden_state
    start = torch.full((len(ids), 1), 30522, device=ids.device)  # [DEC]
    p = net.text_decoder(input_ids=start, encoder_hidden_states=question).logits[:, 0].softmax(-1)
    return (p[:, 2748] / (p[:, 2748] + p[:, 2053])).tolist()  # yes, no


def load_blip(device, data):
    nlp, tokenizer = load_spacy(), from_hub("AutoTokenizer", HUB["bert"])
    net = from_url(transformers.BlipForQuestionAnswering, transformers.BlipConfig(**BLIP_CONFIG), BLIP,
                   lambda state: blip_from_salesforce(state["model"]), device)
    size = (net.config.vision_config.image_size,) * 2

    @torch.no_grad()
    def judge(rows, images):
        found = []
        for prompt, group in itertools.groupby(zip(rows, images), lambda pair: pair[0]["prompt"]):
            pixels = torch.stack([to_tensor(image.resize(size, Image.BICUBIC)) for _, image in group]).to(device)
            states, answers = net.vision_model(pixels).last_hidden_state, []  # a phrase may come twice
            for phrase in compbench_phrases([chunk.text for chunk in nlp(prompt).noun_chunks]):
                ids = tokenizer(compbench_question(phrase), truncation=True, max_length=35, return_tensors="pt")
                answers.append((phrase, blip_yes(net, states, ids.input_ids.to(device))))
            for k in range(len(states)):
                found.append(dict(value=compbench_product([p[k] for _, p in answers]),
                                  yes=[(phrase, p[k]) for phrase, p in answers]))
        return found
    return judge


def load_owl(device, data):
    nlp, tokenizer = load_spacy(), from_hub("AutoTokenizer", HUB["owl"])
    net = from_hub("Owlv2ForObjectDetection", HUB["owl"], device)
    size = (net.config.vision_config.image_size,) * 2

    @torch.no_grad()
    def judge(rows, images):
        found = []
        for row, image in zip(rows, images):
            nouns, objects = [token.text for token in nlp(row["prompt"]) if token.pos_ == "NOUN"], []
            names = list(dict.fromkeys(compbench_objects(nouns)))
            if names:
                tokens = tokenizer([f"a photo of a {name}" for name in names], padding="max_length", max_length=16,
                                   truncation=True, return_tensors="pt").to(device)
                out = net(**tokens, pixel_values=to_tensor(image.resize(size, Image.BILINEAR))[None].to(device))
                scores, places = out.logits[0].sigmoid().max(0)  # of (places, names): the best place of each name
                for name, score, (x, y, w, h) in zip(names, scores.tolist(), out.pred_boxes[0][places].tolist()):
                    box = [479 * side for side in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
                    objects += [dict(name=name, box=box, score=score)] if score > 0.1 else []
            found.append(dict(value=compbench_spatial_score(row["prompt"], nouns, objects), objects=objects))
        return found
    return judge


def load_cosine(name, scale=lambda net: 1.0):
    """A loader of a judge by a CLIPModel of the hub: scale times the cosine of image and prompt."""
    def load(device, data):
        net = from_hub("CLIPModel", HUB[name], device)
        return cosine(net, from_hub("AutoTokenizer", HUB["clip_h" if name == "pick" else name]), scale(net))
    return load


def cosine(net, tokenizer, scale, pixels=clip_pixels):
    def judge(rows, images):
        seen, said = clip_embed(net, tokenizer, images, [row["prompt"] for row in rows], pixels)
        return [dict(value=value) for value in (scale * (seen * said).sum(1)).tolist()]
    return judge


def clip_from_open_clip(state):
    """The names of open_clip's weights -> those of CLIPModel."""
    renames = [("token_embedding", "embeddings.token_embedding"), ("class_embedding", "embeddings.class_embedding"),
               ("positional_embedding", "embeddings.position_embedding.weight"), ("ln_pre", "pre_layrnorm"),
               ("conv1", "embeddings.patch_embedding"), ("ln_post", "post_layernorm"), ("ln_final", "final_layer_norm"),
               ("transformer.resblocks", "encoder.layers"), ("attn.out_proj", "self_attn.out_proj"),
               ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("c_fc", "fc1"), ("c_proj", "fc2")]
    whole = dict(logit_scale=state["logit_scale"])
    for name, x in state.items():
        new = ("vision_model." if name.startswith("visual.") else "text_model.") + rename(
            name.removeprefix("visual."), renames)
        if name in ("text_projection", "visual.proj"):
            whole[("visual" if name == "visual.proj" else "text") + "_projection.weight"] = x.T
        elif ".in_proj_" in name:
            for part, third in zip("qkv", x.chunk(3)):
                whole[new.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = third
        elif name != "logit_scale":
            whole[new] = x
    return whole


def load_hps(device, data):
    url = f"https://huggingface.co/{HUB['hps']}/resolve/main/HPS_v2_compressed.pt"  # version 2.0
    net = from_url(transformers.CLIPModel, from_hub("CLIPConfig", HUB["clip_h"]), url,
                   lambda state: clip_from_open_clip(state["state_dict"]), device)
    tokenizer = from_hub("AutoTokenizer", HUB["clip_h"])
    judge = cosine(net, tokenizer, 100, hps_pixels)
    return lambda rows, images: judge([row | dict(prompt=html.unescape(html.unescape(row["prompt"]))) for row in rows],
                                      images)  # as open_clip's tokenizer does


def load_shapes(device, data):
    import shapes  # which runs this file: so not above

    def judge(rows, images):
        if images[0].size != (shapes.SIZE, shapes.SIZE):
            sys.exit(f"the shapes benchmark needs images of {shapes.SIZE} x {shapes.SIZE} pixels, not {images[0].size}")
        found = [shapes.verdict(shapes.find_objects(np.array(x)), row["metadata"]) for row, x in zip(rows, images)]
        return [dict(correct=verdict["correct"], reason=verdict["reason"]) for verdict in found]
    return judge


JUDGES = {  # file in scores/: benchmark, the groups that it judges (None: all), loader
    "geneval": ("geneval", None, load_geneval),
    "blip": ("compbench", ("color", "shape", "texture", "complex"), load_blip),
    "clipscore": ("compbench", ("non_spatial", "complex"), load_cosine("clip_b")),
    "owl": ("compbench", ("spatial", "complex"), load_owl),
    "hps": ("hps", None, load_hps),
    "pick": ("pick", None, load_cosine("pick", lambda net: net.logit_scale.exp().item())),
    "shapes": ("shapes", None, load_shapes)}


# ---- scoring


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        sys.exit(f"cannot read {path} ({error}).")


def read_settings(path):
    found = read_json(path)
    if not isinstance(found, dict) or not {*FIXED, "base", "lists"} <= found.keys():
        sys.exit(f"{path} was not written by evaluate.py generate: give a folder that it made.")
    return found


def read_scores(path):
    """{path of an image: its row} of a file in scores/, less a last line that a stopped run left unfinished."""
    rows, number = {}, 0
    if not os.path.exists(path):
        return rows
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                number += 1
                row = json.loads(line) if line.endswith("\n") else None
                rows |= {row["path"]: row} if row else {}
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path}:{number} cannot be read ({error}): delete that line and give the command of score again.")
    return rows


def official_spatial(run):
    """{path: score} of the official UniDet script for spatial and complex, or None where it did not run on both."""
    found = {}
    for category in ("spatial", "complex"):
        folder = os.path.join(run, "compbench", category)
        path = os.path.join(folder, "labels", "annotation_obj_detection_2d", "vqa_result.json")
        if not os.path.exists(path):
            return None
        answers = {row["question_id"]: float(row["answer"]) for row in read_json(path)}
        names = [name for name in os.listdir(os.path.join(folder, "samples")) if name.endswith(".png")]
        names = {int(name[:-4].rsplit("_", 1)[1]): name for name in names}
        if answers.keys() != names.keys():
            sys.exit(f"{path} has {len(answers)} answers to {len(names)} images: run the official script again.")
        found |= {f"compbench/{category}/samples/{names[k]}": answer for k, answer in answers.items()}
    return found


def score(args):
    """Judges all images of the runs; a missing image is an error."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for run in args.runs:
        settings = read_settings(os.path.join(run, "settings.json"))
        for bench in args.bench or settings["lists"]:
            rows = items(bench, args.data)
            if settings["lists"].get(bench) != digest(rows):
                sys.exit(f"the images of {bench} in {run} were not made from the prompts in {args.data}.")
            missing = [row["path"] for row in rows if not os.path.exists(os.path.join(run, row["path"]))]
            if missing:
                sys.exit(f"{len(missing)} of {len(rows)} images of {bench} are missing in {run}, first {missing[0]}: "
                         "give the command of generate again.")
            with locked(os.path.join(run, "scores")):
                note = os.path.join(run, "scores", "settings.json")
                lists = {bench: settings["lists"][bench]}
                scored = check_settings(note, settings, lists, "delete that folder of scores")
                write_text(note, json.dumps(scored, indent=1) + "\n")
                if bench == "coco":
                    score_coco(run, rows, device, args)
                for name, (of, groups, load) in JUDGES.items():
                    if of == bench and not (name == "owl" and official_spatial(run)):
                        part = [row for row in rows if groups is None or row["group"] in groups]
                        judge_all(run, name, part, load, device, args)


def judge_all(run, name, rows, load, device, args):
    path = os.path.join(run, "scores", f"{name}.jsonl")
    done = read_scores(path)
    write_text(path, to_lines(done.values()))  # without an unfinished line
    rows = [row for row in rows if row["path"] not in done]
    judge = load(device, args.data) if rows else None
    with open(path, "a", encoding="utf-8") as file:
        for start in tqdm(range(0, len(rows), args.batch_size), f"score {run}: {name}", disable=not rows):
            batch = rows[start:start + args.batch_size]
            answers = judge(batch, [open_image(os.path.join(run, row["path"])) for row in batch])
            for row, answer in zip(batch, answers):
                kept = {key: row[key] for key in ("path", "prompt", "group", "index", "kind") if key in row}
                file.write(to_lines([kept | answer]))
            file.flush()


def open_image(path):
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        sys.exit(f"cannot read {path} ({error}): delete it and give the command of generate again.")


def load_inception(device):
    """(the trunk as pytorch-fid runs it: (N, 3, 299, 299) in [-1, 1] -> (N, 2048), the network as torch-fidelity runs
    it for IS: uint8 images -> (logits (N, 1008),))."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # pulls in torchvision

        net = FeatureExtractorInceptionV3("inception-v3-compat", ["logits_unbiased"]).to(device).eval()
    except ImportError as error:
        sys.exit(f"FID and IS need torch-fidelity ({error}): pip install -r requirements-eval.txt")
    return torch.nn.Sequential(*list(net.children())[:-1], torch.nn.Flatten()), net


@torch.no_grad()
def score_coco(run, rows, device, args, part=1000):
    """FID and IS; the features of `part` images are a file, until all are there."""
    path, folder = (os.path.join(run, "scores", name) for name in ("coco.json", "coco-parts"))
    if os.path.exists(path):
        return
    real = fetch("coco/real_im256.npz", args.data)
    try:
        mu, sigma = (torch.from_numpy(np.load(real)[key]).double() for key in ("mu", "sigma"))
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"cannot read {real} ({error}): delete it, so that it is fetched again.")
    rows = sorted(rows, key=lambda row: row["path"])  # as torch-fidelity does, before it shuffles and splits for IS
    trunk, net = load_inception(device)
    parts = []
    for start in tqdm(range(0, len(rows), part), f"score {run}: coco, {part} images each"):
        file = os.path.join(folder, f"{start:05d}.npz")
        if not os.path.exists(file):
            features, logits = [], []
            some = rows[start:start + part]
            for k in range(0, len(some), args.batch_size):
                images = [open_image(os.path.join(run, row["path"])) for row in some[k:k + args.batch_size]]
                x = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2).to(device)
                small = F.interpolate(x.float() / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
                features.append(trunk(small).cpu())
                logits.append(net(x)[0].cpu())
            buffer = io.BytesIO()
            np.savez(buffer, features=torch.cat(features).numpy(), logits=torch.cat(logits).numpy())
            write_text(file, buffer.getvalue())
        parts.append(np.load(file))
    features, logits = (torch.from_numpy(np.concatenate([p[key] for p in parts])) for key in ("features", "logits"))
    mean, spread = inception_score(logits)
    features = features.double()
    fid = frechet(features.mean(0), torch.cov(features.T), mu, sigma)
    write_text(path, json.dumps({"FID": fid, "IS": mean, "IS, spread over its 10 parts": spread}) + "\n")
    shutil.rmtree(folder)


# ---- the table

PAPER = [  # table, preset, row, numbers; Tables 1b and 1c give some of the same models other numbers than 1a and 1b
    ("1a", "sd14", "SD-1.4", dict(GenEval=.4245, CB=.3150, FID=13.05, IS=36.76)),
    ("1a", "sd14", "SD-1.4 + D-DPO", dict(GenEval=.4841, CB=.3723, FID=18.02, IS=36.64)),
    ("1a", "sd14", "SD-1.4 + DDSPO", dict(GenEval=.5045, CB=.3823, FID=16.39, IS=38.10)),
    ("1b", "sd14", "SD-1.4 + DDSPO", dict(GenEval=.5045, CB=.3723)),
    ("1b", "sdxl", "SDXL", dict(GenEval=.5229, CB=.4034)),
    ("1b", "sdxl", "SDXL + DDSPO", dict(GenEval=.6049, CB=.4857)),
    ("1b", "sana", "SANA", dict(GenEval=.6812, CB=.4846)),
    ("1b", "sana", "SANA + DDSPO", dict(GenEval=.7266, CB=.5255)),
    ("1c", "sdxl", "SDXL", dict(GenEval=.5229, CB=.4185)),
    ("1c", "sdxl", "SDXL + Itercomp", dict(GenEval=.6108, CB=.4644)),
    ("1c", "sdxl", "SDXL + CaPO", dict(GenEval=.5900, CB=.4652)),
    ("1c", "sdxl", "SDXL + DDSPO", dict(GenEval=.6049, CB=.5064)),
    ("2a", "sd15", "SD-1.5", dict(HPSv2=26.95, PickScore=21.14)),
    ("2a", "sd15", "SD-1.5 + D-DPO", dict(HPSv2=27.25, PickScore=21.34)),
    ("2a", "sd15", "SD-1.5 + D-KTO", dict(HPSv2=27.89, PickScore=21.39)),
    ("2a", "sd15", "SD-1.5 + DDSPO", dict(HPSv2=27.46, PickScore=21.35)),
    ("2b", "sdxl", "SDXL", dict(HPSv2=27.89, PickScore=22.27)),
    ("2b", "sdxl", "SDXL + D-DPO", dict(HPSv2=28.55, PickScore=22.61)),
    ("2b", "sdxl", "SDXL + DDSPO", dict(HPSv2=28.78, PickScore=22.70)),
    ("3a", "sd14", "SD-1.4", dict(GenEval=.4245, CB=.3150, HPSv2=26.88, PickScore=21.11)),
    ("3a", "sd14", "SD-1.4, Rand-removal", dict(GenEval=.5045, CB=.3823, HPSv2=27.28, PickScore=21.36)),
    ("3a", "sd14", "SD-1.4, LLaMA (TA)", dict(GenEval=.4854, CB=.3807, HPSv2=27.25, PickScore=21.36)),
    ("3a", "sd14", "SD-1.4, LLaMA (AQ)", dict(GenEval=.4758, CB=.3616, HPSv2=27.51, PickScore=21.39)),
    ("3b", "sd14", "SD-1.4, Rand-positive", dict(GenEval=.4866, CB=.3763)),
    ("3b", "sd14", "SD-1.4, Not-paired", dict(GenEval=.4891, CB=.3842))]
COLUMNS = ("GenEval", "GenEval, lenient", "CB", "CB~", "FID", "IS", "HPSv2", "PickScore", "shapes")
NOTES = {
    "GenEval": "the official rules with Facebook's Mask2Former Swin-S, not OpenMMLab's: compare the runs here only.",
    "GenEval, lenient": "the same with the position rule of the paper's authors, which its figures are by.",
    "CB": "noun phrases by the version of spaCy's model that is installed; T2I-CompBench used 3.5.",
    "CB~": "with OWLv2 in place of UniDet in spatial~ and complex~: no T2I-CompBench scores. For CB, run the official "
           "UniDet_eval/2D_spatial_eval.py --outpath on compbench/spatial and compbench/complex, and `table` again.",
    "HPSv2": "version 2.0, tensors resized without antialias, as torchvision did before 0.17; in float32.",
    "FID": "30,000 images by BK-SDM's protocol, without an interval: it is no mean over prompts."}


def per_prompt(rows, value):
    """{group: (prompts,) means of value(row) over a prompt's images}."""
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], {}).setdefault(row["index"], []).append(float(value(row)))
    return {group: np.array([np.mean(values[k]) for k in sorted(values)]) for group, values in groups.items()}


def collect(run):
    """{metric: {group: (prompts,)}, or a number for FID and IS} of all that has been scored. A metric is the mean over
    its groups of their means: GenEval's overall score, and the CB of the paper."""
    found, scores = {}, {}
    for name, (bench, groups, _) in JUDGES.items():
        rows = read_scores(os.path.join(run, "scores", f"{name}.jsonl"))
        whole = COUNTS[bench] * (len(groups) if groups else len(CATEGORIES)) // len(CATEGORIES)
        if rows and len(rows) != whole:
            sys.exit(f"{run}/scores/{name}.jsonl has {len(rows)} of {whole} images: give the command of score again, "
                     "or delete that file.")
        scores[name] = rows
    for key, name, of in (("correct", "GenEval", "geneval"), ("lenient", "GenEval, lenient", "geneval"),
                          ("correct", "shapes", "shapes"), ("value", "HPSv2", "hps"), ("value", "PickScore", "pick")):
        if scores[of]:
            found[name] = per_prompt(scores[of].values(), lambda row: row[key])  # noqa: B023
    spatial, mark = official_spatial(run), ""
    if not spatial:
        spatial, mark = {path: row["value"] for path, row in scores["owl"].items()}, "~"
    parts = {}
    for name in ("blip", "clipscore"):
        rows = [row for row in scores[name].values() if row["group"] != "complex"]
        parts |= per_prompt(rows, lambda row: row["value"])
    indices = {path: int(path[:-4].rsplit("_", 1)[1]) // 10 for path in spatial if "/spatial/" in path}
    parts |= per_prompt([dict(path=path, group="spatial", index=k) for path, k in indices.items()],
                        lambda row: spatial[row["path"]])
    if scores["blip"] and scores["clipscore"] and spatial:
        rows = [row for row in scores["blip"].values() if row["group"] == "complex"]
        parts |= per_prompt(rows, lambda row: three_in_one(row["kind"], row["value"], spatial[row["path"]],
                                                           scores["clipscore"][row["path"]]["value"]))
        found["CB" + mark] = {category: parts[category] for category in CATEGORIES}
    for name, groups in dict(GenEval=found.get("GenEval", {}), HPSv2=found.get("HPSv2", {}), CB=parts).items():
        for group, values in groups.items():
            own = mark if group in ("spatial", "complex") else ""
            found[f"{name}: {group}{own}"] = {group: values}
    if scores["geneval"]:
        found["GenEval: nothing detected"] = per_prompt(scores["geneval"].values(), lambda row: row["details"] == "{}")
    path = os.path.join(run, "scores", "coco.json")
    return found | (read_json(path) if os.path.exists(path) else {})


def bench_of(metric):
    return dict(GenEval="geneval", CB="compbench", FID="coco", IS="coco", HPSv2="hps", PickScore="pick",
                shapes="shapes")[metric.split(":")[0].split(",")[0].strip("~")]


def interval(groups, draws=1000):
    """The mean over groups of their means and its 95 % interval, from resampling each group's prompts."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=(draws, len(values)))].mean(1) for values in groups.values()]
    low, high = np.percentile(np.mean(means, 0), [2.5, 97.5])
    return dict(mean=float(np.mean([values.mean() for values in groups.values()])), low=float(low), high=float(high))


def table(args):
    """Prints the runs beside each other and beside the paper's rows, and writes the same as --out and as JSON."""
    names = list(dict.fromkeys(map(os.path.normpath, args.runs)))
    settings = {run: read_settings(os.path.join(run, "settings.json")) for run in names}
    found, rows, remarks = {}, {}, []
    for run in names:
        note = os.path.join(run, "scores", "settings.json")
        check_settings(note, settings[run], settings[run]["lists"], "delete that folder of scores")
        found[run] = collect(run)
        rows[run] = {name: interval(x) if isinstance(x, dict) else dict(mean=x) for name, x in found[run].items()}
        rest = settings[run]["lists"].keys() - {bench_of(name) for name in found[run] if ":" not in name}
        remarks += [f"{run}: not scored, or only in part: {', '.join(sorted(rest))}"] if rest else []
    if not any(found.values()):
        sys.exit(f"nothing in {', '.join(names)} has been scored yet: run evaluate.py score first.")
    first = names[0]
    for run in names[1:]:
        other = [key for key in FIXED[1:] if settings[run][key] != settings[first][key]]
        lists = [settings[name]["lists"] for name in (run, first)]
        paired = [name for name in found[run] if name in found[first] and "seed" not in other and
                  lists[0][bench_of(name)] == lists[1][bench_of(name)]]
        if other:
            remarks.append(f"{run} differs from {first} in " + ", ".join(
                f"{key} ({settings[run][key]}, not {settings[first][key]})" for key in other))
        if not paired:
            remarks.append(f"{run} and {first} share no benchmark with the same seeds and prompts: no differences.")
            continue
        rows[f"{run} − {first}"] = {
            name: interval({group: found[run][name][group] - found[first][name][group] for group in found[run][name]})
            if isinstance(found[run][name], dict) else dict(mean=found[run][name] - found[first][name])
            for name in paired if not name.startswith("IS, ")}
    paper = {f"paper, Table {number}: {row}": {
        "GenEval, lenient" if name == "GenEval" else name: dict(mean=x) for name, x in values.items()}
        for number, preset, row, values in PAPER if preset in {one["base"] for one in settings.values()}}
    metrics = list(dict.fromkeys(name for row in rows.values() for name in row))
    columns = [name for name in COLUMNS if name in metrics or (name == "CB" and "CB~" in metrics)]
    notes = [name for name in NOTES if name in metrics + columns]

    def cell(name, row):
        if name not in row:
            return ""
        digits = 2 if bench_of(name) in ("coco", "hps", "pick") else 4
        x = row[name]
        return f"{x['mean']:.{digits}f}" + (f" [{x['low']:.{digits}f}, {x['high']:.{digits}f}]" if "low" in x else "")

    def head(name):
        return name + (f" ({notes.index(name) + 1})" if name in notes else "")

    text = ["| | " + " | ".join(map(head, columns)) + " |", "| --- |" + " --- |" * len(columns)]
    text += [f"| {name} | " + " | ".join(cell(column, row) for column in columns) + " |"
             for name, row in (rows | paper).items() if any(column in row for column in columns)]
    rest = [name for name in metrics if name not in columns]
    if rest:
        text += ["", "| | " + " | ".join(rows) + " |", "| --- |" + " --- |" * len(rows)]
        text += [f"| {head(name)} | " + " | ".join(cell(name, row) for row in rows.values()) + " |" for name in rest]
    text += ["", "In brackets: 95 % intervals from resampling prompts; differences are paired.", ""]
    remarks += [f"{run}: " + ", ".join(f"{key} {value}" for key, value in settings[run].items() if key != "lists")
                for run in names]
    text += [f"- ({k + 1}) {name}: {NOTES[name]}" for k, name in enumerate(notes)] + [f"- {line}" for line in remarks]
    write_text(args.out, "\n".join(text) + "\n")
    whole = dict(runs=rows, paper=paper, notes=NOTES, remarks=remarks, settings=settings)
    write_text(os.path.splitext(args.out)[0] + ".json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(text))
    print(f"wrote {args.out} and {os.path.splitext(args.out)[0]}.json")


# ---- Fig. 3


def grid(args):
    """Writes Fig. 3 for the first --rows prompts: a row a prompt, a column a model, the same x_T all along a row."""
    prompts = [prompt for _, _, prompt in read_rows(args.prompts, ["prompt"]) if prompt][:args.rows]
    if not prompts:
        sys.exit(f"{args.prompts} has no prompts in it.")
    columns, device = [], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in args.models:
        model, steps, guidance = load_model(name, args, device)
        images = []
        for i in tqdm(range(0, len(prompts), args.batch_size), name):
            part = prompts[i:i + args.batch_size]
            images += sample_images(model, part, range(args.seed + i, args.seed + i + len(part)), steps, guidance)
        columns.append((name, images))
    plots.draw_grid(prompts, columns, args.out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)

    def command(run, text):
        found = commands.add_parser(run.__name__, help=text)
        found.set_defaults(run=run)
        return found

    make = command(generate, "all images of the benchmarks")
    make.add_argument("--model", required=True, help="a preset, hub id, diffusers folder or folder of a LoRA")
    make.add_argument("--out", required=True, help="the folder of this model's images")
    judge = command(score, "judges the images")
    judge.add_argument("runs", nargs="+", help="folders that generate made")
    judge.add_argument("--batch-size", type=int, default=20, help="images judged at once (guess)")
    for sub in (make, judge):
        sub.add_argument("--bench", nargs="+", choices=COUNTS, default=["geneval", "compbench", "coco", "hps", "pick"]
                         if sub is make else None, help="(default: all but shapes; score: all that have images)")
        sub.add_argument("--data", default="benchmarks", help="where the lists of prompts are kept, fetched if need be")
    tell = command(table, "means, intervals and differences, beside the paper's")
    tell.add_argument("runs", nargs="+", help="folders that score has scored; differences are to the first")
    tell.add_argument("--out", default="table.md")
    show = command(grid, "Fig. 3: the same prompts and seeds, a column a model")
    show.add_argument("--models", nargs="+", required=True, help="presets, hub ids or diffusers folders")
    show.add_argument("--prompts", required=True, help="a text file, one prompt a line, or a .jsonl file")
    show.add_argument("--out", default="grid.png")
    show.add_argument("--rows", type=int, default=4, help="how many prompts, from the first on")
    for sub, batch_size, seed in ((make, 20, 42), (show, 4, 0)):
        sub.add_argument("--steps", type=int, help="sampling steps (default, from scripts: 25, SANA 20)")
        sub.add_argument("--guidance", type=float, help="guidance scale (script: 7.5, SDXL and SD3 5.0, SANA 4.5)")
        sub.add_argument("--batch-size", type=int, default=batch_size, help="images sampled at once (guess)")
        sub.add_argument("--seed", type=int, default=seed, help="image i's noise comes from seed + i (script: 42)")
    args = parser.parse_args(argv)
    if args.run in (grid, table) and (os.path.isdir(args.out) or args.out.endswith(".json")):
        sys.exit(f"--out {args.out} must be the name of a {'PNG' if args.run is grid else 'Markdown'} file to write.")
    if args.run is not generate and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.exit(f"{args.run.__name__} runs in one process: start it with python, not with torchrun.")
    check_flags(args, rows=1, batch_size=1, seed=0, steps=1, guidance=0)
    try:
        args.run(args)
    except torch.OutOfMemoryError as error:
        sys.exit(f"out of memory: give a smaller --batch-size, and the same command otherwise. {error}")
    except OSError as error:
        sys.exit(f"cannot read or write: {error}. What is written stays: mend that, and give the same command again.")


if __name__ == "__main__":
    main()
