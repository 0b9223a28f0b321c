"""How weights/shapes was trained: a StableDiffusionPipeline of the world of lib/shapes_world.py, from scratch.

    python -m studies.shapes_reference              weights/shapes: three hours of one core
    python -m studies.shapes_reference FOLDER --updates 1000

First an autoencoder, then a U-Net and a text encoder together, on captions of which many are wrong, as on the web: the
model leaves room for a method that makes it follow prompts better. It runs on one core and keeps its state in runs/, so
that the same command goes on where it was stopped.
"""

import argparse
import json
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it: a thread that waits must sleep and not spin

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lib import models
from lib import shapes_world as world
from lib.files import UserError, read_json, replace_folder, save_state, write_file
from lib.processes import at_least, holding, program

SEED, IMAGES, AUTOENCODER_UPDATES, UPDATES, VALIDATION_PROMPTS = 0, 131072, 4000, 12000, 100
WRONG_CAPTIONS = 0.5  # guess: half of the captions have one thing wrong, as on the web
NO_CAPTION = 0.1  # dropped, so that guidance works (as Stable Diffusion was trained)


def make_dataset(seed, count):
    """count images (uint8), and for each the caption that training sees: half of them wrong, and a tenth empty."""
    rng = np.random.default_rng([10, seed])
    images, captions = np.empty((count, world.SIZE, world.SIZE, 3), np.uint8), []
    for i in tqdm(range(count), "world"):
        prompt = world.make_prompt(rng, world.TAGS[i % len(world.TAGS)])
        images[i] = world.render(world.make_scene(rng, prompt))
        said = world.corrupt(rng, prompt) if rng.random() < WRONG_CAPTIONS else prompt
        captions.append("" if rng.random() < NO_CAPTION else world.write_caption(rng, said))
    return images, captions


def fit(net, loss_of_batch, updates, batch, lr, path, check=None, every=500):
    """AdamW on batches of random indices; the rate is constant and goes to 0 over the last quarter. Returns the moving
    average of the weights and the state. That is kept in the file `path`, so that a stopped training goes on exactly
    from there, and one that ended goes on when it is asked for more updates ("ends" lists what was asked for so far):
    all that is random comes from the seed and the update's number."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=1e-2)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    start, state = 0, dict(seconds=0.0, ends=[])
    if os.path.exists(path):
        state = torch.load(path, weights_only=True)
        for part, saved in zip((net, optimizer, average), state["parts"]):
            part.load_state_dict(saved)
        start = state["update"]
    begin, ends = time.time() - state["seconds"], state["ends"]
    for update in tqdm(range(start, updates), path, initial=start, total=updates, mininterval=10):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (update + 1) / 200, (updates - update) / (0.25 * updates))
        loss = loss_of_batch(batch, torch.Generator().manual_seed(SEED * 1_000_000 + update))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(net)
        if (update + 1) % every == 0 or update + 1 == updates:
            state = dict(update=update + 1, seconds=time.time() - begin,
                         ends=ends + [updates] * (update + 1 == updates),
                         parts=[part.state_dict() for part in (net, optimizer, average)])
            save_state(path, state)
            if check:
                print(f"update {update + 1}, {(time.time() - begin) / 60:.0f} minutes, loss {loss.item():.4f}: "
                      f"{check(average.module.eval())}", flush=True)
    return average.module.eval(), state


def make_tokenizer(captions):
    """A CLIP tokenizer to which each word of this world is one token."""
    words = sorted({word for caption in captions for word in caption.split()})
    base = CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, [])
    tokenizer = base.train_new_from_iterator(words * 10, 600)
    tokenizer.model_max_length = 18  # the longest caption has 15 words
    return tokenizer


def make_denoiser(vocabulary, bos, eos):
    """(U-Net, text encoder), of 2.6 M parameters together."""
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 96), layers_per_block=1, norm_num_groups=16, attention_head_dim=4,
        cross_attention_dim=64, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=18, bos_token_id=bos, eos_token_id=eos))
    return torch.nn.ModuleList([unet, text_encoder])


def train_autoencoder(images, path):
    """An AutoencoderKL, 32 x 32 pixels <-> latents (4, 8, 8), that loses almost nothing of the images, (n, 3, 32, 32)
    uint8, and the state of its training."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(block_out_channels=(16, 32, 32), norm_num_groups=8, latent_channels=4, layers_per_block=1,
                        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
                        sample_size=world.SIZE)

    def loss_of_batch(batch, rng):
        x = images[torch.randint(len(images), (batch,), generator=rng)].float() / 127.5 - 1  # (batch, 3, 32, 32)
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample(generator=rng)).sample
        return F.mse_loss(reconstruction, x) * 10 + 1e-4 * posterior.kl().mean() / 64

    return fit(vae, loss_of_batch, AUTOENCODER_UPDATES, 16, 3e-3, path)


@torch.no_grad()
def encode_all(vae, images):
    """(n, 3, 32, 32) uint8 -> latents (n, 4, 8, 8), without the scale."""
    return torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in images.split(256)])


def make_pipeline(vae, tokenizer, net, scheduler):
    pipe = StableDiffusionPipeline(vae, net[1], tokenizer, net[0], scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def validate(pipe, prompts):
    """The share of prompts with everything right at two guidances, as text."""
    captions, shares = [p["caption"] for p in prompts], []
    for guidance in (1, 4):
        noise = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        images = pipe(captions, num_inference_steps=25, guidance_scale=guidance, generator=noise).images
        right = [world.judge_image(image, p)["correct"] for image, p in zip(images, prompts)]
        shares.append(f"{np.mean(right):.2f} at guidance {guidance}")
    return "right " + ", ".join(shares)


def make_reference(folder, updates, home="runs/shapes-reference"):
    """Trains the pipeline and writes it to `folder` in float16, with how it was made in training.json. The states of
    the two trainings are kept in `home`."""
    with holding(home):
        vae_path, net_path = (os.path.join(home, name + ".pt") for name in ("autoencoder", "denoiser"))
        pixels, captions = make_dataset(SEED, IMAGES)
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (images, 3, 32, 32)
        vae, vae_state = train_autoencoder(pixels, vae_path)
        latents = encode_all(vae, pixels)
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        latents *= vae.config.scaling_factor
        tokenizer = make_tokenizer(captions)
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids  # (images, 18)
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                  set_alpha_to_one=False, steps_offset=1)  # SD-1.4's schedule
        torch.manual_seed(SEED)
        net = make_denoiser(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)

        def loss_of_batch(batch, rng):
            i = torch.randint(IMAGES, (batch,), generator=rng)
            t = torch.randint(1000, (batch,), generator=rng)
            eps = torch.randn(batch, 4, 8, 8, generator=rng)
            x_t = scheduler.add_noise(latents[i], eps, t)
            return F.mse_loss(net[0](x_t, t, net[1](ids[i])[0]).sample, eps)

        prompts = world.make_prompts([SEED, 4], VALIDATION_PROMPTS)
        average, state = fit(net, loss_of_batch, updates, 128, 1e-3, net_path,
                             lambda net: validate(make_pipeline(vae, tokenizer, net, scheduler), prompts))
        make_pipeline(vae, tokenizer, average, scheduler).to(dtype=torch.float16).save_pretrained(folder + ".partial")
        commands = [f"python -m studies.shapes_reference --updates {n}" for n in state["ends"]]
        training = dict(commands=commands, seed=SEED, images=IMAGES, autoencoder_updates=AUTOENCODER_UPDATES,
                        updates=updates, minutes=round((vae_state["seconds"] + state["seconds"]) / 60),
                        threads=torch.get_num_threads(), versions=dict(torch=torch.__version__))
        write_file(os.path.join(folder + ".partial", "training.json"), json.dumps(training, indent=1) + "\n")
        replace_folder(folder + ".partial", folder)
        print(f"wrote {folder}")


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", nargs="?", default=models.PRESETS["shapes"], help="(default: weights/shapes)")
    parser.add_argument("--updates", type=at_least(1), default=UPDATES, help="of the U-Net (default: %(default)s)")
    args = parser.parse_args(argv)
    folder = os.path.normpath(args.folder)
    note = os.path.join(folder, "training.json")
    if os.path.lexists(folder) and not (os.path.isfile(note) and "autoencoder_updates" in read_json(note)):
        raise UserError(f"{folder} is there already, and this program did not write it: give another name.")
    make_reference(folder, args.updates)


if __name__ == "__main__":
    main()
