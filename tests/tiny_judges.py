"""Judges of the real classes with small random weights, short lists of prompts and golden cases, for tests of judges/ and
evaluate.py.
"""

import json
import os

import numpy as np
import tiny_models
import torch
import transformers

NAMES = [{47: "red cup", 78: "dog"}.get(i, f"thing {i}") for i in range(80)]  # both are what the detector below says


def clip(folder):
    torch.manual_seed(1)
    tokenizer, text = tiny_models.clip(projection_dim=16)
    config = transformers.CLIPConfig(
        text_config=text.config.to_dict(), projection_dim=16,
        vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                           patch_size=14, projection_dim=16, initializer_range=0.5))
    config.text_config.initializer_range = 0.5
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def mask2former(folder):
    torch.manual_seed(2)
    backbone = transformers.SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
                                       out_features=["stage1", "stage2", "stage3", "stage4"])
    net = transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=5, num_labels=80))
    net.class_predictor.weight.data *= 60  # sure of itself, so that something is above 0.3
    net.class_predictor.bias.data[78] += 12
    net.save_pretrained(folder)


def owl(folder):
    torch.manual_seed(3)
    tokenizer, text = tiny_models.clip()
    transformers.Owlv2ForObjectDetection(transformers.Owlv2Config(
        projection_dim=32, text_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                            vocab_size=len(tokenizer), max_position_embeddings=16),
        vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=64,
                           patch_size=16))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


BLIP_CONFIG = dict(
    vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                       patch_size=16, layer_norm_eps=1e-6, initializer_range=0.1),
    text_config=dict(hidden_size=32, encoder_hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                     projection_dim=32, initializer_range=0.2))


def blip():
    """BlipForQuestionAnswering, and its weights under the names of BLIP's own checkpoint."""
    torch.manual_seed(4)
    net = transformers.BlipForQuestionAnswering(transformers.BlipConfig(**BLIP_CONFIG)).eval()
    names = {"vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
             "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
             "vision_model.embeddings.patch_embedding.weight": "visual_encoder.patch_embed.proj.weight",
             "vision_model.embeddings.patch_embedding.bias": "visual_encoder.patch_embed.proj.bias",
             "vision_model.post_layernorm.weight": "visual_encoder.norm.weight",
             "vision_model.post_layernorm.bias": "visual_encoder.norm.bias"}
    for i in range(2):
        for own, theirs in (("self_attn.qkv", "attn.qkv"), ("self_attn.projection", "attn.proj"), ("layer_norm1", "norm1"),
                            ("layer_norm2", "norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            for kind in ("weight", "bias"):
                names[f"vision_model.encoder.layers.{i}.{own}.{kind}"] = f"visual_encoder.blocks.{i}.{theirs}.{kind}"
    state = {names.get(name, name): x for name, x in net.state_dict().items()}
    state |= {f"text_{part}.embeddings.position_ids": torch.arange(512)[None] for part in ("encoder", "decoder.bert")}
    return net, state


def bert_tokenizer(folder):
    """As bert-base-uncased: [PAD] 0, [UNK] 100, [CLS] 101, [SEP] 102; words of one letter from 1000 on."""
    words = ["[PAD]", *[f"[unused{i}]" for i in range(99)], "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"[unused{i}]" for i in range(99, 1000 - len(words) + 99)]
    letters = "abcdefghijklmnopqrstuvwxyz?0123456789"
    words += [*letters, *["##" + x for x in letters]]
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "vocab.txt"), "w") as file:
        file.write("\n".join(words))
    transformers.BertTokenizer(os.path.join(folder, "vocab.txt")).save_pretrained(folder)


def open_clip(net):
    """A CLIPModel's weights under open_clip's names."""
    state, out = net.state_dict(), {}
    for name in ("weight", "bias"):
        out |= {f"ln_final.{name}": state[f"text_model.final_layer_norm.{name}"],
                f"visual.ln_pre.{name}": state[f"vision_model.pre_layrnorm.{name}"],
                f"visual.ln_post.{name}": state[f"vision_model.post_layernorm.{name}"]}
        for side, prefix in (("text_model", ""), ("vision_model", "visual.")):
            for i in range(2):
                own, theirs = f"{side}.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
                out[f"{theirs}attn.in_proj_{name}"] = torch.cat([state[f"{own}self_attn.{x}_proj.{name}"] for x in "qkv"])
                for a, b in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                             ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                    out[f"{theirs}{a}.{name}"] = state[f"{own}{b}.{name}"]
    return out | dict(logit_scale=state["logit_scale"], text_projection=state["text_projection.weight"].T) | {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T}


class Word:
    def __init__(self, text, pos=None):
        self.text, self.pos_ = text, pos


class Parse(list):
    """What a spaCy pipeline gives, by a rule: a noun is a word after a, an, the or a colour."""
    def __init__(self, prompt):
        words, small = prompt.strip(".").split(), ("a", "an", "the", "red", "blue")
        super().__init__(Word(word, "NOUN" if k and words[k - 1].lower() in small and word not in small else "X")
                         for k, word in enumerate(words))
        self.noun_chunks = [Word("the " + word.text) for word in self if word.pos_ == "NOUN"]


def lists(folder, small=True):
    """Writes lists of prompts of the benchmarks' own form: short ones, or of the official length."""
    n = dict(geneval=2, compbench=2, coco=12, hps=3, pick=4) if small else dict(geneval=None, compbench=300, coco=30000, hps=800, pick=1632)
    tags = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    sizes = [n["geneval"]] * 6 if small else [80, 99, 80, 94, 100, 100]
    dog, cup = dict({"class": "dog"}, count=1), dict({"class": "red cup"}, count=1)
    clauses = dict(single_object=[dog], two_object=[dog, cup], counting=[dog | dict(count=2)], colors=[dog | dict(color="red")],
                   position=[dog, cup | dict(position=["left of", 0])], color_attr=[dog | dict(color="red"), cup | dict(color="blue")])
    rows = [dict(tag=tag, include=clauses[tag], prompt=f"a photo of a dog {tag} {i}") for tag, size in zip(tags, sizes) for i in range(size)]
    files = {"geneval/evaluation_metadata.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
             "geneval/object_names.txt": "\n".join(NAMES) + "\n",
             "coco/metadata.csv": "file_name,text\n" + "".join(f'COCO_val2014_{i:012d}.jpg,"A dog, number {i}"\n' for i in reversed(range(n["coco"]))),
             "pick/PartiPrompts.tsv": "Prompt\tCategory\n" + "".join(f'"G {i}" by a dog\tArts\n' for i in range(n["pick"]))}
    for category in ("color", "shape", "texture", "spatial", "non_spatial", "complex"):
        prompts = [f"a dog and a dog next to the cup {i}." for i in range(n["compbench"])]
        prompts[-1] = prompts[0]  # color_val.txt has the same prompt twice
        files[f"compbench/{category}_val.txt"] = "\n".join(prompts) + "\n"
    files["compbench/complex_val_spatial.txt"] = "A dog and a dog next to the cup 0.\n"
    files["compbench/complex_val_action.txt"] = "a dog and a dog next to the cup 1\n"
    for style in ("anime", "concept-art", "paintings", "photo"):
        files[f"hps/{style}.json"] = json.dumps([f"{style} &amp; a dog {i}" for i in range(n["hps"])])
    for name, text in files.items():
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        with open(os.path.join(folder, name), "w") as file:
            file.write(text)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((50, 4))
    np.savez(os.path.join(folder, "coco/real_im256.npz"), mu=features.mean(0), sigma=np.cov(features.T))
    return dict(geneval=4 * len(rows), compbench=60 * n["compbench"], coco=n["coco"], hps=4 * n["hps"], pick=n["pick"], shapes=4)


def golden(name):
    """The cases of a file in tests/golden."""
    with open(os.path.join(os.path.dirname(__file__), "golden", name)) as file:
        return [json.loads(line) for line in file] if name.endswith(".jsonl") else json.load(file)
