"""Scores by CLIP: HPSv2 and PickScore (Tables 2 and 3a), and the CLIPScore of T2I-CompBench (Tables 1 and 3).

    HPSv2       4 styles of 800 prompts, an image each      100 cos, weights of version 2.0, and of 2.1 (Apache-2.0)
    PickScore   1,632 PartiPrompts, an image each           the network's own scale times cos
    CLIPScore   non_spatial and complex of CompBench        cos, CLIP B/32

All are cosines of image and prompt by a CLIPModel with torchvision's pixels, as the official ones but for precision:
official HPSv2 and CLIPScore are in float16. The paper's HPSv2 is on the scale of version 2.0: its authors' script gives
those weights by name, and its 26.95 for SD-1.5 is HPSv2's own number for SD-1.4 with 2.0 (2.1: 25.35).
"""

import html
import json
import re

import torch.nn.functional as F
import transformers

from judges.shared import cosine, fetch_lines, fetch_text, from_hub, from_url, normalised, rename, unit

STYLES = ("anime", "concept-art", "paintings", "photo")
PROMPTS = "https://huggingface.co/datasets/zhwang/HPDv2/resolve/main/benchmark/{}.json"  # its commits are not known
PARTI = "https://raw.githubusercontent.com/google-research/parti/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071/PartiPrompts.tsv"
CLIP_B, CLIP_H = "openai/clip-vit-base-patch32", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICK, HPS = "yuvalkirstain/PickScore_v1", "https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2_compressed.pt"
HPS_21 = HPS.replace("v2_", "v2.1_")


def items_hps(data):
    """An image a prompt, in the folders that the official scorer reads. A group is a style."""
    return [dict(path=f"hps/{style}/{i:05d}.jpg", prompt=prompt, group=style, index=i) for style in STYLES
            for i, prompt in enumerate(json.loads(fetch_text(data, f"hps/{style}.json", PROMPTS.format(style))))]


def items_pick(data):
    """An image a prompt. The file is not read by csv, because its quotation marks are the prompts' own."""
    return [dict(path=f"pick/images/{i:05d}.jpg", prompt=line.split("\t")[0], group="pick", index=i)
            for i, line in enumerate(fetch_lines(data, "pick/PartiPrompts.tsv", PARTI)[1:])]


def load_clipscore(device, data):
    return cosine(from_hub("CLIPModel", CLIP_B, device), from_hub("AutoTokenizer", CLIP_B), 1.0)


def load_pick(device, data):
    net = from_hub("CLIPModel", PICK, device)
    return cosine(net, from_hub("AutoTokenizer", CLIP_H), net.logit_scale.exp().item())


def hps_pixels(image, size=224):
    """HPSv2 resizes the longest side of a tensor without antialias, as torchvision did before 0.17; then it pads."""
    x = unit(image)[None]
    h, w = (round(side * size / max(image.size)) for side in x.shape[2:])
    x = F.interpolate(x, (h, w), mode="bicubic", align_corners=False, antialias=False)
    left, top = (size - w) // 2, (size - h) // 2
    return normalised(F.pad(x, (left, size - w - left, top, size - h - top))[0])


def open_clip_text(prompt):
    """A prompt as open_clip's tokenizer cleans it: straight quotation marks (by ftfy), and unescaped twice."""
    prompt = re.sub("[\u02bc\u2018-\u201b]", "'", re.sub("[\u201c-\u201f]", '"', prompt))
    return html.unescape(html.unescape(prompt))


def clip_from_open_clip(state):
    """The names of open_clip's weights -> those of CLIPModel."""
    renames = [("visual.", "vision_model."), ("vision_model.proj", "visual_projection.weight"),
               ("text_model.text_projection", "text_projection.weight"), ("text_model.logit_scale", "logit_scale"),
               ("token_embedding", "embeddings.token_embedding"), ("class_embedding", "embeddings.class_embedding"),
               ("positional_embedding", "embeddings.position_embedding.weight"), ("ln_pre", "pre_layrnorm"),
               ("conv1", "embeddings.patch_embedding"), ("ln_post", "post_layernorm"),
               ("ln_final", "final_layer_norm"), ("transformer.resblocks", "encoder.layers"), ("c_fc", "fc1"),
               ("c_proj", "fc2"), ("attn.in_proj_", "self_attn.{}_proj."), ("attn.out_proj", "self_attn.out_proj"),
               ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")]
    found = rename({name if "visual." in name else "text_model." + name: x for name, x in state.items()}, renames)
    return found | {name: found[name].T for name in ("text_projection.weight", "visual_projection.weight")}


def load_hps(device, data, weights=HPS):
    net = from_url(transformers.CLIPModel, from_hub("CLIPConfig", CLIP_H), weights,
                   lambda checkpoint: clip_from_open_clip(checkpoint["state_dict"]), device)
    return cosine(net, from_hub("AutoTokenizer", CLIP_H), 100, hps_pixels, open_clip_text)
