"""GenEval (Tables 1 and 3): 553 prompts, four images each, by the rules of djghosh13/geneval (evaluate_images.py).

A detector finds objects and CLIP L/14 names their colours. The verdict is right if the image shows what the prompt asks
for: so many objects of a class, of a colour, on the right side of others, and no more of them when they are counted.

What differs from the official judge: the detector is Facebook's Mask2Former Swin-S (CC BY-NC), not OpenMMLab's. It is
the same network with other weights, so that scores compare only with those made here. Input and post-processing are
those of mmdet: 800 pixels and its bilinear masks, not the hub's 384. The rules give the official answers. `lenient` in
the scores is the position rule of DDSPO's authors, to which the paper's figures belong.
"""

import itertools
import json

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from judges.shared import clip_embed, fetch_lines, from_hub, normalised, overlap, unit

REPOSITORY = "https://raw.githubusercontent.com/djghosh13/geneval/16f1681160a110fd077309eb04c1e004f951e06d"
DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
COCO_MEAN, COCO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INPUT = (800, 800)  # mmdet's size of a square image; it is a multiple of 32, so that nothing is padded
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


def items(data):
    """Four images a prompt, in the folders that the official scorer reads. A group is a tag."""
    found, prompts = [], {}  # prompts: of each tag so far
    lines = fetch_lines(data, "geneval/evaluation_metadata.jsonl", f"{REPOSITORY}/prompts/evaluation_metadata.jsonl")
    for i, row in enumerate(map(json.loads, lines)):
        index = prompts[row["tag"]] = prompts.get(row["tag"], -1) + 1
        found += [dict(path=f"geneval/{i:05d}/samples/{k:05d}.png", prompt=row["prompt"], group=row["tag"],
                       index=index, metadata=row) for k in range(4)]
    return found


# ---- the rules


def geneval_keep(boxes, least, max_objects=16, max_overlap=1.0):
    """The places of the detections (x0, y0, x1, y1, score) that count, best first."""
    boxes = np.array(boxes, np.float32).reshape(-1, 5)  # the detector gives float32
    order = [i for i in np.argsort(boxes[:, 4])[::-1] if boxes[i, 4] > np.float32(least)][:max_objects]
    kept = []
    while order:
        kept.append(order.pop(0))
        order = [i for i in order if max_overlap == 1 or overlap(boxes[kept[-1]], boxes[i], 1) < max_overlap]
    return kept


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
    `metadata` a line of evaluation_metadata.jsonl. Of each class the most confident `count` are looked at.
    """
    least = counting_threshold if metadata["tag"] == "counting" else threshold
    kept = {name: geneval_keep(boxes, least, max_objects, max_overlap) for name, boxes in detections.items()}
    reasons, groups = [], []  # groups: the boxes of each clause so far, None for one that failed
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


# ---- the judge


def instances(class_logits, mask_logits, padded, resized, size, most=100):
    """mmdet's instances from Mask2Former's logits (Q, classes + 1), (Q, h, w): labels (N,), boxes with scores (N, 5),
    masks (N, H, W). The image of `size` was `resized` and `padded` for the network, all (H, W)."""
    scores = class_logits.softmax(-1)[:, :-1]  # the last class is "no object"
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
    """{class: [(box with score, mask as a PIL image)]} of the detections above GenEval's threshold, best first, in a
    square image."""
    x = F.interpolate(unit(image)[None], INPUT, mode="bilinear", align_corners=False)[0]
    out, found = net(pixel_values=normalised(x, COCO_MEAN, COCO_STD)[None].to(net.device)), {}
    labels, boxes, masks = instances(out.class_queries_logits[0], out.masks_queries_logits[0], INPUT, INPUT,
                                     image.size[::-1])
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


def load(device, data):
    names = fetch_lines(data, "geneval/object_names.txt", f"{REPOSITORY}/evaluation/object_names.txt")
    # ^ GenEval's names in COCO's order; the hub's labels differ
    net = from_hub("Mask2FormerForUniversalSegmentation", DETECTOR, device)
    clip, tokenizer = from_hub("CLIPModel", CLIP, device), from_hub("AutoTokenizer", CLIP)

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
