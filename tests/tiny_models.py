"""Diffusers pipeline folders of the real classes with small random weights, for tests and for trying the scripts:

    python tests/tiny_models.py FAMILY FOLDER        (a second, 2 MB; its images are noise, of 64 x 64 pixels)

FAMILY is sd (Stable Diffusion 1.x), sd2 (2.x: predicts v), sdxl, sana or sd3 (these two: flow matching). The schedulers
have the settings of the published models. SANA's pipeline asks for its size: height=64, width=64,
use_resolution_binning=False.
"""

import inspect
import json
import re
import string
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

CLIP, CLIP_PROJECTED = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
SD_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def clip(model=CLIP, pad="<|endoftext|>", **config):
    """A tokenizer that knows single characters only (different prompts are encoded differently), and its encoder."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *[x + "</w>" for x in letters], "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer({token: i for i, token in enumerate(vocabulary)}, [], pad_token=pad,
                                           model_max_length=77)
    return tokenizer, model(transformers.CLIPTextConfig(**{**dict(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1), **config}))


def unet(**changes):
    return diffusers.UNet2DConditionModel(**{**dict(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
        cross_attention_dim=32, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")), **changes})


def vae(latent_channels=4, **config):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=latent_channels, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, **config)


def on_cpu(scheduler, **settings):
    """A scheduler whose tables are where a file would put them, whatever the device of the networks."""
    with torch.device("cpu"):
        return scheduler(**settings)


def sd(net=None, text=None):
    tokenizer, text_encoder = clip(**text or {})
    scheduler = on_cpu(diffusers.PNDMScheduler, **SD_SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False)
    return diffusers.StableDiffusionPipeline(
        unet=unet(**net or {}), vae=vae(), text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def sd2():
    tokenizer, text_encoder = clip(pad="!", hidden_act="gelu")
    scheduler = on_cpu(diffusers.DDIMScheduler, **SD_SCHEDULE, prediction_type="v_prediction", clip_sample=False,
                       set_alpha_to_one=False)
    return diffusers.StableDiffusionPipeline(
        unet=unet(attention_head_dim=[2, 4], use_linear_projection=True), vae=vae(), text_encoder=text_encoder,
        tokenizer=tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


def sdxl(net=None, text=None, text_2=None):
    tokenizer, text_encoder = clip(**text or dict(projection_dim=32))
    tokenizer_2, text_encoder_2 = clip(CLIP_PROJECTED, "!", hidden_act="gelu",
                                       **text_2 or dict(hidden_size=48, projection_dim=48))
    network = unet(**net or dict(
        attention_head_dim=[2, 4], use_linear_projection=True, transformer_layers_per_block=[1, 2],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 + 48, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 6 * 8))
    scheduler = on_cpu(diffusers.EulerDiscreteScheduler, **SD_SCHEDULE, timestep_spacing="leading")
    return diffusers.StableDiffusionXLPipeline(
        unet=network, vae=vae(scaling_factor=0.13025, force_upcast=True), text_encoder=text_encoder,
        tokenizer=tokenizer, text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, scheduler=scheduler,
        force_zeros_for_empty_prompt=True)


def sana(net=None, text=None):
    # bytes, one token for the space, and one for each line of the default instruction, which stands before each prompt
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *[f"<0x{i:02X}>" for i in range(256)], "▁"]
    tokenizer = transformers.GemmaTokenizer({token: i for i, token in enumerate(vocabulary)}, add_bos_token=True)
    parameters = inspect.signature(diffusers.SanaPipeline.__call__).parameters
    tokenizer.add_tokens([transformers.AddedToken(line) for line in parameters["complex_human_instruction"].default])
    text_encoder = transformers.Gemma2Model(transformers.Gemma2Config(**{**dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, initializer_range=0.2), **(text or {})}))
    transformer = diffusers.SanaTransformer2DModel(**net or dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=32,
        sample_size=8))
    half = dict(block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"), block_out_channels=(8, 8, 8, 8),
                layers_per_block=(1, 1, 1, 1), qkv_multiscales=((), (), (), (5,)))
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, **{f"encoder_{k}": v for k, v in half.items()},
        **{f"decoder_{k}": v for k, v in half.items()}, downsample_block_type="conv",
        upsample_block_type="interpolate", scaling_factor=0.41407)
    scheduler = on_cpu(diffusers.DPMSolverMultistepScheduler, use_flow_sigmas=True, prediction_type="flow_prediction",
                       flow_shift=3.0)
    return diffusers.SanaPipeline(tokenizer, text_encoder, autoencoder, transformer, scheduler)


def sd3():
    tokenizer, text_encoder = clip(CLIP_PROJECTED, projection_dim=32)
    tokenizer_2, text_encoder_2 = clip(CLIP_PROJECTED, "!", hidden_size=48, hidden_act="gelu", projection_dim=48)
    letters = "▁" + string.digits + string.ascii_letters + string.punctuation
    scores = [(x, 0.0) for x in ("<pad>", "</s>", "<unk>")] + [(x, -1.0) for x in letters]
    tokenizer_3 = transformers.T5Tokenizer(scores, model_max_length=512)
    text_encoder_3 = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(tokenizer_3), d_model=96, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu"))
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=96, caption_projection_dim=16, pooled_projection_dim=32 + 48, pos_embed_max_size=12)
    for block in transformer.transformer_blocks:  # without this, a few letters among 333 tokens change little
        block.attn.add_v_proj.weight.data *= 10
    autoencoder = vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = on_cpu(diffusers.FlowMatchEulerDiscreteScheduler, shift=3.0)
    return diffusers.StableDiffusion3Pipeline(
        transformer, scheduler, autoencoder, text_encoder, tokenizer, text_encoder_2, tokenizer_2, text_encoder_3,
        tokenizer_3)


def as_published(folder):
    """Changes the names in a folder of `sd` or `sdxl` to those in the folders of the published models: vocab.json and
    merges.txt, `text_model.` and position_ids in CLIP, the old names of attention in SD's autoencoder, a safety checker
    that is named and not there, and variants in half precision beside the weights."""
    folder = Path(folder)
    index = json.loads((folder / "model_index.json").read_text())
    xl = "text_encoder_2" in index
    index = {part: entry for part, entry in index.items() if part not in ("image_encoder", "requires_safety_checker")}
    if not xl:
        index |= dict(feature_extractor=["transformers", "CLIPImageProcessor"],
                      safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    for part in folder.glob("tokenizer*"):
        model = json.loads((part / "tokenizer.json").read_text())["model"]
        (part / "vocab.json").write_text(json.dumps(model["vocab"]))
        (part / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in model["merges"]))
        config = json.loads((part / "tokenizer_config.json").read_text())
        names = [name for name in config if name.endswith("_token")]
        (part / "special_tokens_map.json").write_text(json.dumps({name: config[name] for name in names}))
        (part / "tokenizer.json").unlink()
    old = dict(to_q="query", to_k="key", to_v="value", to_out="proj_attn")
    for path in [path for path in folder.glob("*/*.safetensors") if path.stem in ("model", "diffusion_pytorch_model")]:
        weights = load_file(path)
        if path.parent.name.startswith("text_encoder"):
            weights = {f"text_model.{name}" if name.split(".")[0] in ("embeddings", "encoder", "final_layer_norm") else
                       name: x for name, x in weights.items()}
            weights |= {} if xl else {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        if path.parent.name == "vae" and not xl:
            weights = {re.sub(r"(attentions\.0)\.(to_\w+)(\.0)?\.", lambda found: f"{found[1]}.{old[found[2]]}.", name): x
                       for name, x in weights.items()}
        save_file(weights, path, metadata=dict(format="pt"))
        half = {name: x.half() if x.is_floating_point() else x for name, x in weights.items()}
        save_file(half, path.with_suffix(".fp16.safetensors"), metadata=dict(format="pt"))
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: x + 1 for name, x in load_file(path).items()}, path.with_suffix(".non_ema.safetensors"))


FAMILIES = dict(sd=sd, sd2=sd2, sdxl=sdxl, sana=sana, sd3=sd3)

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
SIZES = {  # a network for CPUs and three of the published sizes: the family, and what its function above takes
    "mid": ("sd", dict(
        net=dict(sample_size=16, block_out_channels=(64, 128, 256), norm_num_groups=32, attention_head_dim=8,
                 cross_attention_dim=256, down_block_types=(CROSS_DOWN, CROSS_DOWN, DOWN),
                 up_block_types=(UP, CROSS_UP, CROSS_UP)),
        text=dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4))),
    "sd14": ("sd", dict(
        net=dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, norm_num_groups=32,
                 attention_head_dim=8, cross_attention_dim=768, down_block_types=(CROSS_DOWN,) * 3 + (DOWN,),
                 up_block_types=(UP,) + (CROSS_UP,) * 3), text=CLIP_L)),
    "sdxl": ("sdxl", dict(
        net=dict(sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, norm_num_groups=32,
                 attention_head_dim=[5, 10, 20], transformer_layers_per_block=[1, 2, 10], cross_attention_dim=2048,
                 use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
                 projection_class_embeddings_input_dim=2816, down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
                 up_block_types=(CROSS_UP, CROSS_UP, UP)), text=CLIP_L,
        text_2=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                    projection_dim=1280))),
    "sana": ("sana", dict(
        net=dict(sample_size=32, in_channels=32, out_channels=32, num_attention_heads=36, attention_head_dim=32,
                 num_layers=28, num_cross_attention_heads=16, cross_attention_head_dim=72, cross_attention_dim=1152,
                 caption_channels=2304), text=dict(hidden_size=2304)))}  # its Gemma has this width, and two layers


def make(folder, family="sd", seed=0):
    """Writes the folder; the same bytes for the same family and seed."""
    torch.manual_seed(seed)
    FAMILIES[family]().save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in FAMILIES:
        sys.exit(__doc__)
    make(sys.argv[2], sys.argv[1])
    print(f"wrote {sys.argv[2]}")
