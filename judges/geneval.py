"""GenEval (Tables 1 and 3): 553 prompts, four images each, by the rules of djghosh13/geneval (evaluate_images.py).

A detector finds objects and CLIP L/14 names their colours. The verdict is right if the image shows what the prompt asks
for: so many objects of a class, of a colour, on the right side of others, and no more of them when they are counted.
`lenient` in the scores is the verdict by the position rule of DDSPO's authors.

The detector is GenEval's own, OpenMMLab's Mask2Former Swin-S, in transformers' class: mmdet's weights renamed, with
mmdet's input of 800 pixels and its bilinear masks. The file is mmdet 3's (...c9d0c4f2). GenEval's script fetches mmdet
2's (...743b7d99), of the same training run; the tensors of the two have not been compared.
"""

import itertools
import json

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from judges.shared import clip_embed, fetch_lines, from_hub, from_url, normalised, overlap, rename, unit

REPOSITORY = "https://raw.githubusercontent.com/djghosh13/geneval/16f1681160a110fd077309eb04c1e004f951e06d"
CLIP = "openai/clip-vit-large-patch14"
DETECTOR = ("https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco/"
            "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth")  # c9d0c4f2: of its sha256
DETECTOR_CONFIG = dict(num_labels=80)  # of COCO; transformers' other defaults fit this network
COCO_MEAN, COCO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONGEST, SHORTEST, MULTIPLE = 1333, 800, 32  # its input's largest long and short side, both padded to a multiple
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


def items(data):
    """Four images a prompt, in the folders that the official scorer reads. A group is a tag."""
    lines = fetch_lines(data, "geneval/evaluation_metadata.jsonl", f"{REPOSITORY}/prompts/evaluation_metadata.jsonl")
    return [dict(path=f"geneval/{i:05d}/samples/{k:05d}.png", prompt=row["prompt"], group=row["tag"], index=i,
                 metadata=row) for i, row in enumerate(map(json.loads, lines)) for k in range(4)]


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
    """Whether an image shows what its prompt says, and why not: (bool, str). `detections` {class: [[x0, y0, x1, y1,
    score]]} in any order, `colors` {class: [the colour of each, same order]}, `metadata` a line of
    evaluation_metadata.jsonl. Of each class the most confident `count` are looked at."""
    least = counting_threshold if metadata["tag"] == "counting" else threshold
    kept = {name: geneval_keep(boxes, least, max_objects, max_overlap) for name, boxes in detections.items()}
    reasons, groups = [], []  # groups: the boxes of each clause so far, None for one that failed
    for clause in metadata.get("include", []):
        name, count, problem = clause["class"], clause["count"], None
        found = kept.get(name, [])[:count]
        boxes = [detections[name][i] for i in found]
        if len(found) < count:
            problem = f"expected {name}>={count}, found {len(found)}"
        elif "color" in clause and (answers := [colors[name][i] for i in found]).count(clause["color"]) < count:
            seen = ", ".join(f"{answers.count(color)} {color}" for color in COLORS if color in answers)
            right = f"{answers.count(clause['color'])} {clause['color']}"
            problem = f"expected {clause['color']} {name}>={count}, found {right}; and {seen}"
        elif "position" in clause:
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
    logits = F.interpolate(mask_logits[None], padded, mode="bilinear")
    logits = F.interpolate(logits[:, :, :resized[0], :resized[1]], size, mode="bilinear")[0]
    masks = logits > 0
    inside = masks.flatten(1)
    quality = (logits.sigmoid().flatten(1) * inside).sum(1) / (inside.sum(1) + 1e-6)
    hits = masks.any(1).int(), masks.any(2).int()  # over x, over y
    (x0, x1), (y0, y1) = ((hit.argmax(1), hit.shape[1] - hit.flip(1).argmax(1)) for hit in hits)
    boxes = torch.stack([x0, y0, x1, y1], 1) * inside.any(1)[:, None]
    return labels, torch.cat([boxes[queries], (top * quality[queries])[:, None]], 1), masks[queries]


def detect(net, image, names, threshold=0.3):
    """{class: [(box with score, mask as a PIL image)]} of the detections above GenEval's threshold, best first."""
    size = image.size[::-1]
    scale = min(LONGEST / max(size), SHORTEST / min(size))
    h, w = resized = [int(side * scale + 0.5) for side in size]
    padded = [-(-side // MULTIPLE) * MULTIPLE for side in resized]
    x = F.interpolate(unit(image)[None], resized, mode="bilinear")[0]
    x = F.pad(normalised(x, COCO_MEAN, COCO_STD), (0, padded[1] - w, 0, padded[0] - h))
    out, found = net(pixel_values=x[None].to(net.device)), {}
    labels, boxes, masks = instances(out.class_queries_logits[0], out.masks_queries_logits[0], padded, resized, size)
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


FFN = [("ffn.layers.0.0", "fc1"), ("ffn.layers.1", "fc2")]
MMDET = [  # a part of mmdet's network, its place in transformers' network, and what is renamed in it, in this order
    ("backbone.norm", "model.pixel_level_module.encoder.hidden_states_norms.", [
        (f"norms.{i}", f"norms.stage{i + 1}") for i in range(4)]),
    ("backbone.", "model.pixel_level_module.encoder.swin.", [
        ("stages", "encoder.layers"), ("patch_embed.projection", "embeddings.patch_embeddings.projection"),
        ("patch_embed.norm", "embeddings.norm"), (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
        ("ffn", "mlp.ffn"), *FFN, ("attn.w_msa.qkv", "attention.{}_proj"), ("attn.w_msa.proj", "attention.o_proj"),
        ("attn.w_msa.relative", "attention.relative_position_bias.relative")]),
    ("panoptic_head.pixel_decoder.", "model.pixel_level_module.decoder.", [
        ("input_convs", "input_projections"), ("lateral_convs.0", "adapter_1"), ("output_convs.0", "layer_1"),
        ("mask_feature", "mask_projection"), ("level_encoding.weight", "level_embed"), (".conv.", ".0."),
        (".gn.", ".1."), ("norms.0", "self_attn_layer_norm"), ("norms.1", "final_layer_norm"), *FFN]),
    ("panoptic_head.transformer_decoder.", "model.transformer_module.decoder.", [
        ("self_attn.attn.in_proj_", "self_attn.{}_proj."), ("_attn.attn.", "_attn."), ("post_norm", "layernorm"), *FFN,
        ("norms.0", "cross_attn_layer_norm"), ("norms.1", "self_attn_layer_norm"), ("norms.2", "final_layer_norm")]),
    ("panoptic_head.", "model.transformer_module.", [
        ("query_embed", "queries_embedder"), ("query_feat", "queries_features"),
        ("model.transformer_module.cls_embed", "class_predictor"),
        *[(f"mask_embed.{2 * i}.", f"decoder.mask_predictor.mask_embedder.{i}.0.") for i in range(3)]])]


def mask2former_from_mmdet(state):
    """The names of mmdet's checkpoint -> those of Mask2FormerForUniversalSegmentation."""
    found = {}
    for name, x in state.items():
        if ".downsample." in name:  # nn.Unfold's order of a patch's four neighbours -> Swin's own
            x = x.unflatten(-1, (-1, 4)).mT[..., [0, 2, 1, 3], :].flatten(-2)
        if not name.endswith("relative_position_index"):  # a buffer that transformers computes
            part, place, renames = next(row for row in MMDET if name.startswith(row[0]))
            found |= rename({name: x}, [(part, place), *renames])
    return found


def mask2former(config):
    """The network without its loss and a norm that is not used: mmdet's checkpoint has nothing for them."""
    net = transformers.Mask2FormerForUniversalSegmentation(config)
    net.criterion, net.model.pixel_level_module.encoder.swin.layernorm = None, torch.nn.Identity()
    return net


def load(device, data):
    # GenEval's names of the classes, in COCO's order; the hub's labels differ
    names = fetch_lines(data, "geneval/object_names.txt", f"{REPOSITORY}/evaluation/object_names.txt")
    net = from_url(mask2former, transformers.Mask2FormerConfig(**DETECTOR_CONFIG), DETECTOR,
                   lambda checkpoint: mask2former_from_mmdet(checkpoint["state_dict"]), device)
    clip, tokenizer = from_hub("CLIPModel", CLIP, device), from_hub("AutoTokenizer", CLIP)

    def judge(row, image):
        things = {name: pairs[:16] for name, pairs in detect(net, image, names).items()}
        boxes = {name: [box for box, _ in pairs] for name, pairs in things.items()}
        asked = {clause["class"] for clause in row["metadata"].get("include", []) if "color" in clause}
        colors = {name: name_colors(clip, tokenizer, [crop(image, *pair) for pair in things[name]], name)
                  for name in asked if name in things}
        correct, reason = geneval_verdict(boxes, colors, row["metadata"])
        lenient, _ = geneval_verdict(boxes, colors, row["metadata"], lenient_position=True)
        return dict(filename=row["path"], tag=row["group"], correct=correct, reason=reason, lenient=lenient,
                    details=json.dumps(boxes), metadata=json.dumps(row["metadata"]))
    return lambda rows, images: list(map(judge, rows, images))
