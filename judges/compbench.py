"""T2I-CompBench (Tables 1 and 3): six categories of 300 prompts, ten images each, by the rules of Karine-Huang's
T2I-CompBench (BLIP_vqa.py, 2D_spatial_eval.py, 3_in_1.py). The paper's CB is the mean of the six categories.

    color, shape, texture   BLIP-VQA (BSD-3): the product of P(yes) over the prompt's noun phrases
    spatial                 two detected objects and the relation of their boxes
    non_spatial             CLIPScore (judges/preference.py)
    complex                 the mean of those three scores that apply to the prompt

What differs from the official judges. BLIP-VQA: the noun phrases of spaCy 3.8, not 3.5. Complex: as DDSPO's authors run
it, without the `--complex True` of T2I-CompBench's README, by which UniDet looks for other nouns and CLIPScore leaves
out adjectives. Spatial: the official UniDet script (non-commercial) has no port, so its results are read where it has
run. Until then OWLv2 finds the objects: spatial~, complex~ and CB~, on another scale.
"""

import glob
import itertools
import os

import numpy as np
import torch
import transformers
from PIL import Image

from judges.shared import fetch_lines, from_hub, from_url, normalised, overlap, rename, unit
from lib.files import read_json, reading

CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
LISTS = "https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench/{}/examples/dataset/{}.txt"
COMMIT = "7710d059c3391fe97fbf9e2ad3813ed0e7d87979"  # before September 2025, when 5 prompts of color_val changed
COMMITS = dict(non_spatial_val="41388b8b6ae716108ebb507133930c1f030990c3")  # this list is of another commit
BLIP = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_base_vqa_capfilt_large.pth"
BLIP_CONFIG = dict(vision_config=dict(image_size=480, layer_norm_eps=1e-6), text_config=dict(num_attention_heads=12))
BERT, OWL = "bert-base-uncased", "google/owlv2-base-patch16-ensemble"


def items(data):
    """Ten images a prompt. `kind` says in which of CompBench's two lists a complex prompt is."""
    def listed(name):
        url = LISTS.format(COMMITS.get(name, COMMIT), name)
        return [line.strip() for line in fetch_lines(data, f"compbench/{name}.txt", url)]

    kinds = {plainly(prompt): kind for kind in ("action", "spatial") for prompt in listed(f"complex_val_{kind}")}
    return [dict(path=f"compbench/{category}/samples/{prompt}_{10 * i + k:06d}.png", prompt=prompt, group=category,
                 index=i, kind=kinds.get(plainly(prompt), "all"))
            for category in CATEGORIES
            for i, prompt in enumerate(listed(f"{category}_val"))
            for k in range(10)]


def plainly(prompt):
    """A prompt as 3_in_1.py compares it."""
    return prompt.strip().split(".")[0].lower()


# ---- the rules

LOCALITIES = ("on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of",
              "on top of")  # the last has no rule, so it scores 0


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
    return ["person" if noun in ("girl", "boy", "man", "woman") else noun for noun in nouns[:1] + nouns[-1:]]


def compbench_spatial_score(prompt, nouns, objects):
    """The score of "spatial" in [0, 1]; `objects` [{name, box, score}], best first, in the 479 x 479 frame."""
    locality = next((words for words in LOCALITIES if words in prompt), None)
    best = {thing["name"]: thing for thing in reversed(objects)}
    found = [best.get(name) for name in compbench_objects(nouns)]
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


def combine(blip, clipscore, spatial):
    """A row with its `value` for each image whose category's judges have all been run. The arguments are these judges'
    scores, {path: row}; a judge that was not run has none."""
    found = [row for row in (*blip.values(), *clipscore.values(), *spatial.values()) if row["group"] != "complex"]
    for path, row in blip.items():
        if row["group"] == "complex" and path in spatial and path in clipscore:
            value = three_in_one(row["kind"], row["value"], spatial[path]["value"], clipscore[path]["value"])
            found.append(row | dict(value=value))
    return found


# ---- the judges


def load_spacy():
    """T2I-CompBench's parser. It and its model are in requirements-eval.txt only."""
    with reading("spaCy's en_core_web_sm", "pip install -r requirements-eval.txt"):
        import spacy
        return spacy.load("en_core_web_sm")


def blip_from_salesforce(state):
    """The names of BLIP's own checkpoint -> those of BlipForQuestionAnswering."""
    renames = [("visual_encoder.", "vision_model."), ("cls_token", "embeddings.class_embedding"),
               ("pos_embed", "embeddings.position_embedding"), ("patch_embed.proj", "embeddings.patch_embedding"),
               ("model.blocks", "model.encoder.layers"), ("model.norm", "model.post_layernorm"),
               (".norm1", ".layer_norm1"), (".norm2", ".layer_norm2"), (".attn.proj", ".self_attn.projection"),
               (".attn.", ".self_attn.")]
    return rename({name: x for name, x in state.items() if not name.endswith(".position_ids")}, renames)


def blip_yes(net, image_states, ids):
    """P(yes) / (P(yes) + P(no)) for each image (N, patches, D), of one question's token ids (1, L). The class's own
    forward gives no logits and starts with [CLS] where BLIP has [ENC], so its parts are called one by one. Questions
    are not padded: transformers 5.23 ignores the mask of a padded question in the decoder."""
    ids = ids.repeat(len(image_states), 1)
    ids[:, 0] = 30523  # [ENC]
    question = net.text_encoder(input_ids=ids, encoder_hidden_states=image_states).last_hidden_state
    start = torch.full((len(ids), 1), 30522, device=ids.device)  # [DEC]
    p = net.text_decoder(input_ids=start, encoder_hidden_states=question).logits[:, 0].softmax(-1)
    return (p[:, 2748] / (p[:, 2748] + p[:, 2053])).tolist()  # yes, no


def load_blip(device, data):
    nlp, tokenizer = load_spacy(), from_hub("AutoTokenizer", BERT)
    net = from_url(transformers.BlipForQuestionAnswering, transformers.BlipConfig(**BLIP_CONFIG), BLIP,
                   lambda checkpoint: blip_from_salesforce(checkpoint["model"]), device)
    size = (net.config.vision_config.image_size,) * 2

    def judge(rows, images):
        found = []
        for prompt, group in itertools.groupby(zip(rows, images), lambda pair: pair[0]["prompt"]):
            pixels = torch.stack([normalised(unit(image.resize(size, Image.BICUBIC))) for _, image in group])
            states = net.vision_model(pixels.to(device)).last_hidden_state  # (images of this prompt, patches, D)
            answers = []  # (phrase, P(yes) of each image); a phrase may come twice
            for phrase in compbench_phrases([chunk.text for chunk in nlp(prompt).noun_chunks]):
                ids = tokenizer(compbench_question(phrase), truncation=True, max_length=35, return_tensors="pt")
                answers.append((phrase, blip_yes(net, states, ids.input_ids.to(device))))
            for k in range(len(states)):
                yes = [(phrase, p[k]) for phrase, p in answers]
                found.append(dict(value=compbench_product([p for _, p in yes]), yes=yes))
        return found
    return judge


def load_owl(device, data):
    nlp, tokenizer = load_spacy(), from_hub("AutoTokenizer", OWL)
    net = from_hub("Owlv2ForObjectDetection", OWL, device)
    size = (net.config.vision_config.image_size,) * 2

    def judge(row, image):
        nouns, objects = [token.text for token in nlp(row["prompt"]) if token.pos_ == "NOUN"], []
        if names := list(dict.fromkeys(compbench_objects(nouns))):
            tokens = tokenizer([f"a photo of a {name}" for name in names], padding="max_length", max_length=16,
                               truncation=True, return_tensors="pt").to(device)
            pixels = normalised(unit(image.resize(size, Image.BILINEAR)))[None].to(device)
            out = net(**tokens, pixel_values=pixels)
            scores, places = out.logits[0].sigmoid().max(0)  # of (places, names): the best place of each name
            for name, score, (x, y, w, h) in zip(names, scores.tolist(), out.pred_boxes[0][places].tolist()):
                if score > 0.1:
                    box = [479 * side for side in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
                    objects.append(dict(name=name, box=box, score=score))
        return dict(value=compbench_spatial_score(row["prompt"], nouns, objects), objects=objects)
    return lambda rows, images: list(map(judge, rows, images))


def official_spatial(run):
    """{path: row} of what the official UniDet script has found for spatial and complex, or {} where it has not judged
    both: UniDet_eval/2D_spatial_eval.py --outpath RUN/compbench/spatial, and --outpath RUN/compbench/complex."""
    found = {}
    for category in ("spatial", "complex"):
        path = os.path.join(run, f"compbench/{category}/labels/annotation_obj_detection_2d/vqa_result.json")
        if not os.path.exists(path):
            return {}
        with reading(path, "run the official script again, or put its images back."):
            images = {int(x[-10:-4]): x for x in glob.glob(f"compbench/{category}/samples/*.png", root_dir=run)}
            values = {row["question_id"]: float(row["answer"]) for row in read_json(path)}
            if values.keys() != images.keys() or not all(0 <= value <= 1 for value in values.values()):
                raise ValueError(f"{len(values)} answers to {len(images)} images, or one that is not from 0 to 1")
        found |= {x: dict(path=x, group=category, index=k // 10, value=values[k]) for k, x in images.items()}
    return found
