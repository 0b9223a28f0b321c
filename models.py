"""What the method needs from a text-to-image model, and what differs between model families.

    method      what it does                                                         SD-1.x
    encode      prompts -> c, what the network is conditioned on                     CLIP, 77 tokens
    sample_t    the law of the training time step                                    uniform
    noise       q(x_t | x_0): x_t = alpha_t x_0 + sigma_t eps                        sqrt(abar_t), sqrt(1 - abar_t)
    predict     one pass of a network: its prediction at (x_t, t, c)                 eps
    sample      noise -> x_0 by the pipeline's own sampler with guidance             PNDM

The objective, the pairs and the training loop know these five and nothing else of a model. A model is named by a
preset, a hub id or a local diffusers folder; its family is read from the folder's model_index.json.
"""

import contextlib
import datetime
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
import transformers

transformers.logging.set_verbosity_error()  # else it warns of image processors that nothing here uses
from diffusers import DiffusionPipeline, StableDiffusionPipeline  # noqa: E402

PRESETS = {"sd14": "CompVis/stable-diffusion-v1-4", "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
           "shapes": "runs/shapes-0/reference"}  # the last is made by shapes.py


class StableDiffusion:
    """SD-1.x: a U-Net that predicts eps from latents (B, 4, H/8, W/8) and a CLIP encoding of the prompt."""

    def __init__(self, name, device, dtype):
        # The safety checker replaces images by black ones: it has no place in training data or in a benchmark.
        self.pipe = StableDiffusionPipeline.from_pretrained(name, dtype=dtype, safety_checker=None,
                                                            feature_extractor=None, requires_safety_checker=False)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.to(device)
        self.net = self.pipe.unet
        self.num_train_timesteps = self.pipe.scheduler.config.num_train_timesteps
        if self.pipe.scheduler.config.prediction_type != "epsilon":
            sys.exit(f"{name} predicts {self.pipe.scheduler.config.prediction_type}; only epsilon is supported.")
        self.alpha_bar = self.pipe.scheduler.alphas_cumprod.to(device, torch.float32)  # (T,)
        self.latent_shape = (self.net.config.in_channels, self.net.config.sample_size, self.net.config.sample_size)

    @torch.no_grad()
    def encode(self, prompts):
        """B prompts -> c, (B, 77, width)."""
        return self.pipe.encode_prompt(list(prompts), self.pipe.device, 1, False)[0]

    def sample_t(self, rng):
        """Sec. 3.3: t ~ U{1, ..., T}, counted from 0 as diffusers does; rng is a numpy generator."""
        return int(rng.integers(self.num_train_timesteps))

    def noise(self, x_0, t, eps):
        """q(x_t | x_0) in float32, whatever the model's precision: sqrt(1 - abar_0) would be 0 in bfloat16."""
        abar = self.alpha_bar[t].view(-1, 1, 1, 1)
        return abar.sqrt() * x_0.float() + (1 - abar).sqrt() * eps.float()

    def predict(self, net, x_t, t, c):
        """eps(x_t, t, c): (B, 4, h, w), (B,), (B, 77, width) -> (B, 4, h, w)."""
        return net(x_t.to(c.dtype), t, encoder_hidden_states=c, return_dict=False)[0]

    @torch.no_grad()
    def sample(self, c, x_T, steps, guidance, output_type="latent"):
        """x_T (B, 4, h, w) and c -> x_0, latents as the network sees them, or PIL images for output_type "pil"."""
        empty = self.encode([""]).expand(len(c), -1, -1)
        return self.pipe(prompt_embeds=c, negative_prompt_embeds=empty, latents=x_T.to(c), num_inference_steps=steps,
                         guidance_scale=guidance, output_type=output_type).images


FAMILIES = {"StableDiffusionPipeline": StableDiffusion}


def load(name, device="cpu", dtype=torch.float32):
    """The model called `name`: a preset, a local diffusers folder or a hub id, with all its parts in one precision."""
    path = PRESETS.get(name, name)
    if name == "shapes" and not os.path.isdir(path):
        sys.exit(f"there is no {path} yet: make it with  python shapes.py")
    try:
        family = DiffusionPipeline.load_config(path).get("_class_name")
        if family not in FAMILIES:
            sys.exit(f"{name} is a {family}; supported are {', '.join(FAMILIES)}.")
        return FAMILIES[family](path, device, dtype)
    except OSError as error:
        sys.exit(f"{name} is no preset ({', '.join(PRESETS)}), and no diffusers folder or hub id that can be loaded "
                 "(without network: from the cache). " + str(error).strip().split("\n")[0])


def initial_noise(seed, shape):
    """x_T of one image: a float32 tensor that is a function of the seed alone, on any machine."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


@contextlib.contextmanager
def processes():
    """(rank, number of processes, device): torchrun's, or one process without it. Leaves the group cleanly."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:  # a day: one process may wait for another's last shard or for its checkpoint
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))
    yield rank, world, device
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
