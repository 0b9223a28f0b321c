"""Judges of the real classes with small random weights, short lists of prompts and golden cases, for tests of judges/ and
evaluate.py.
"""

import json
import os

import numpy as np
import tiny_models
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

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


DETECTOR_CONFIG = dict(
    feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2,
    num_attention_heads=2, dim_feedforward=16, num_queries=5, num_labels=80, backbone_config=dict(
        model_type="swin", embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"]))


def mask2former():
    """Mask2FormerForUniversalSegmentation, and its weights under the names of mmdet's checkpoint."""
    torch.manual_seed(2)
    net = transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(**DETECTOR_CONFIG)).eval()
    for x in net.parameters():  # no two alike, not even the norms
        x.data += 1e-4 * torch.randn(x.shape)
    net.class_predictor.weight.data *= 60  # sure of itself, so that something is above 0.3
    net.class_predictor.bias.data[78] += 14
    state, theirs = net.state_dict(), {}
    encoder, pixel, module = "model.pixel_level_module.encoder.", "model.pixel_level_module.decoder.", "model.transformer_module."

    def move(new, old, kinds=("weight", "bias")):
        for kind in kinds:
            theirs[f"{new}.{kind}"] = state.pop(f"{old}.{kind}")

    def join(new, old):
        """The three projections of an attention in one tensor."""
        for kind in ("weight", "bias"):
            theirs[new + kind] = torch.cat([state.pop(f"{old}.{letter}_proj.{kind}") for letter in "qkv"])

    def mlp(new, old):
        move(new + ".ffn.layers.0.0", old + "fc1")
        move(new + ".ffn.layers.1", old + "fc2")

    move("backbone.patch_embed.projection", encoder + "swin.embeddings.patch_embeddings.projection")
    move("backbone.patch_embed.norm", encoder + "swin.embeddings.norm")
    for i in range(4):
        new, old = f"backbone.stages.{i}.blocks.0", f"{encoder}swin.encoder.layers.{i}.blocks.0"
        join(new + ".attn.w_msa.qkv.", old + ".attention")
        move(new + ".attn.w_msa.proj", old + ".attention.o_proj")
        theirs[new + ".attn.w_msa.relative_position_bias_table"] = state.pop(
            old + ".attention.relative_position_bias.relative_position_bias_table")
        theirs[new + ".attn.w_msa.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
        move(new + ".norm1", old + ".layernorm_before")
        move(new + ".norm2", old + ".layernorm_after")
        mlp(new, old + ".mlp.")
        move(f"backbone.norm{i}", f"{encoder}hidden_states_norms.stage{i + 1}")
        if i < 3:  # Swin has the neighbours (y, x) = 00, 10, 01, 11, each with all channels; nn.Unfold 00, 01, 10, 11 of a channel
            for name in ("reduction.weight", "norm.weight", "norm.bias"):
                x = state.pop(f"{encoder}swin.encoder.layers.{i}.downsample.{name}")
                four = x.chunk(4, -1)
                theirs[f"backbone.stages.{i}.downsample.{name}"] = torch.stack([four[0], four[2], four[1], four[3]], -1).flatten(-2)
    head = "panoptic_head.pixel_decoder."
    for i in range(3):
        move(f"{head}input_convs.{i}.conv", f"{pixel}input_projections.{i}.0")
        move(f"{head}input_convs.{i}.gn", f"{pixel}input_projections.{i}.1")
    for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
        move(f"{head}encoder.layers.0.self_attn.{part}", f"{pixel}encoder.layers.0.self_attn.{part}")
    move(head + "encoder.layers.0.norms.0", pixel + "encoder.layers.0.self_attn_layer_norm")
    move(head + "encoder.layers.0.norms.1", pixel + "encoder.layers.0.final_layer_norm")
    mlp(head + "encoder.layers.0", pixel + "encoder.layers.0.")
    theirs[head + "level_encoding.weight"] = state.pop(pixel + "level_embed")
    for new, old, bias in (("lateral_convs.0.conv", "adapter_1.0", []), ("lateral_convs.0.gn", "adapter_1.1", ["bias"]),
                           ("output_convs.0.conv", "layer_1.0", []), ("output_convs.0.gn", "layer_1.1", ["bias"]),
                           ("mask_feature", "mask_projection", ["bias"])):
        move(head + new, pixel + old, ["weight", *bias])
    for i in range(DETECTOR_CONFIG["decoder_layers"] - 1):
        new, old = f"panoptic_head.transformer_decoder.layers.{i}", f"{module}decoder.layers.{i}."
        join(new + ".self_attn.attn.in_proj_", old + "self_attn")
        move(new + ".self_attn.attn.out_proj", old + "self_attn.out_proj")
        for kind in ("weight", "bias"):
            theirs[f"{new}.cross_attn.attn.in_proj_{kind}"] = state.pop(f"{old}cross_attn.in_proj_{kind}")
        move(new + ".cross_attn.attn.out_proj", old + "cross_attn.out_proj")
        for k, norm in enumerate(("cross_attn", "self_attn", "final")):
            move(f"{new}.norms.{k}", f"{old}{norm}_layer_norm")
        mlp(new, old)
    move("panoptic_head.transformer_decoder.post_norm", module + "decoder.layernorm")
    move("panoptic_head.cls_embed", "class_predictor")
    for new, old in dict(query_embed="queries_embedder", query_feat="queries_features", level_embed="level_embed").items():
        move(f"panoptic_head.{new}", module + old, ["weight"])
    for i in range(3):
        move(f"panoptic_head.mask_embed.{2 * i}", f"{module}decoder.mask_predictor.mask_embedder.{i}.0")
    assert sorted(state) == ["criterion.empty_weight", f"{encoder}swin.layernorm.bias", f"{encoder}swin.layernorm.weight"]
    return net, theirs


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


def qwen(folder):
    """Qwen3-VL with a tokenizer that knows single bytes only, and an image processor that keeps images of 64 x 64."""
    torch.manual_seed(6)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    vocabulary = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token=special[0], eos_token=special[2], unk_token=None,
                                            additional_special_tokens=special)
    text = dict(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, head_dim=16, initializer_range=0.3, pad_token_id=vocabulary[special[0]],
                rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[4, 2, 2], mrope_interleaved=True))
    vision = dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, patch_size=16, out_hidden_size=32,
                  num_position_embeddings=16, deepstack_visual_indexes=[0], initializer_range=0.3)
    ids = {f"{name}_token_id": vocabulary[token] for name, token in
           zip(("vision_start", "vision_end", "image", "video"), special[3:])}
    net = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.Qwen2VLImageProcessorPil(patch_size=16, size=dict(shortest_edge=32 * 32, longest_edge=128 * 128), image_mean=[0.5] * 3,
                                          image_std=[0.5] * 3).save_pretrained(folder)


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
    n = dict(geneval=2, compbench=2, coco=12, hps=3, pick=4, geneval2=20) if small else dict(
        geneval=None, compbench=300, coco=30000, hps=800, pick=1632, geneval2=800)
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
    questions = [["How many dogs are in the image?", "two"], ["Are there any dogs in the image?", "Yes"],
                 ["Are the dogs chasing the cups?", "Yes"], ["Are the dogs red?", "Yes"]]
    skills = ["count", "object", "verb", "attribute"]
    files["geneval2/geneval2_data.jsonl"] = "".join(json.dumps(dict(
        prompt=f"two dogs {i}", atom_count=3 + i % 2, vqa_list=questions[:3 + i % 2], skills=skills[:3 + i % 2])) + "\n" for i in range(n["geneval2"]))
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
    return dict(geneval=4 * len(rows), compbench=60 * n["compbench"], coco=n["coco"], hps=4 * n["hps"], pick=n["pick"], geneval2=n["geneval2"],
                shapes=4)


def golden(name):
    """The cases of a file in tests/golden."""
    with open(os.path.join(os.path.dirname(__file__), "golden", name)) as file:
        return [json.loads(line) for line in file] if name.endswith(".jsonl") else json.load(file)
