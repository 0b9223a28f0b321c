"""How weights/shapes was trained: a StableDiffusionPipeline of the world of lib/shapes_world.py, from scratch.

    python -m studies.shapes_reference              makes the same in runs/shapes-reference: 156 minutes of one core
    python -m studies.shapes_reference FOLDER --updates 1000

First the autoencoder, then the U-Net and the text encoder together, on captions of which many are wrong, as on the web:
the model leaves room for a method that makes it follow prompts better. Architecture, schedule and tokenizer are read
from weights/shapes (a new tokenizer would number its tokens otherwise). The same command goes on where it was stopped.
"""

import argparse
import functools
import os

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib import models
from lib import shapes_world as world
from lib.files import reading, same_settings, write_file
from lib.processes import at_least, holding, program

SEED, IMAGES, AUTOENCODER_UPDATES = 0, 131072, 4000
UPDATES = [5000, 12000]  # of the U-Net: the training ended after 5000, and went on to 12000
WRONG_CAPTIONS = 0.5  # guess: half of the captions have one thing wrong, as on the web
NO_CAPTION = 0.1  # dropped, so that guidance works (as Stable Diffusion was trained)


def make_dataset(seed, count):
    """Images (count, 3, 32, 32) uint8, and for each the caption that training sees: half are wrong, a tenth empty."""
    rng = np.random.default_rng([10, seed])
    images, captions = np.empty((count, world.SIZE, world.SIZE, 3), np.uint8), []
    for i in tqdm(range(count), "world"):
        prompt = world.make_prompt(rng, world.TAGS[i % len(world.TAGS)])
        images[i] = world.render(world.make_scene(rng, prompt))
        said = world.corrupt(rng, prompt) if rng.random() < WRONG_CAPTIONS else prompt
        captions.append("" if rng.random() < NO_CAPTION else world.write_caption(rng, said))
    return torch.from_numpy(images).permute(0, 3, 1, 2), captions


def fit(net, loss_of_batch, data, ends, lr, path, every=500):
    """AdamW up to each update in `ends`; the rate falls to 0 over the last quarter before it. Returns the moving
    average of the weights. The file `path` keeps the state, from which a stopped training goes on exactly."""
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=1e-2)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    parts, start = (net, optimizer, average), 0
    if os.path.exists(path):
        with reading(path, "delete it, and its training begins anew."):
            start, states = torch.load(path, weights_only=True)
            for part, state in zip(parts, states):
                part.load_state_dict(state)
    for update in tqdm(range(start, ends[-1]), path, initial=start, total=ends[-1], mininterval=10):
        end = next(end for end in ends if update < end)
        optimizer.param_groups[0]["lr"] = lr * min(1, (update + 1) / 200, (end - update) / (0.25 * end))
        loss = loss_of_batch(net, torch.Generator().manual_seed(SEED * 1_000_000 + update), *data)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(net)
        if (update + 1) % every == 0 or update + 1 == ends[-1]:
            write_file(path, functools.partial(torch.save, [update + 1, [part.state_dict() for part in parts]]))
    return average.module.eval()  # in training mode the autoencoder rounds otherwise


def autoencoder_loss(vae, rng, images):
    """32 x 32 pixels <-> latents (4, 8, 8), which lose almost nothing of the images."""
    x = images[torch.randint(len(images), (16,), generator=rng)].float() / 127.5 - 1  # (16, 3, 32, 32)
    posterior = vae.encode(x).latent_dist
    reconstruction = vae.decode(posterior.sample(generator=rng)).sample
    return F.mse_loss(reconstruction, x) * 10 + 1e-4 * posterior.kl().mean() / 64


def denoiser_loss(net, rng, scheduler, latents, ids):
    """net (U-Net, text encoder) on scaled latents (images, 4, 8, 8) and the tokens of their captions (images, 18)."""
    i = torch.randint(len(latents), (128,), generator=rng)
    t = torch.randint(1000, (128,), generator=rng)
    eps = torch.randn(128, 4, 8, 8, generator=rng)
    x_t = scheduler.add_noise(latents[i], eps, t)
    return F.mse_loss(net[0](x_t, t, net[1](ids[i])[0]).sample, eps)


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", nargs="?", default="runs/shapes-reference", help="(default: %(default)s)")
    parser.add_argument("--updates", nargs="+", type=at_least(1), default=UPDATES, help="of the U-Net; lr falls to 0")
    args = parser.parse_args(argv)
    folder, ends = args.folder, sorted(args.updates)
    torch.set_num_threads(1)  # with another number of threads the weights differ by rounding
    with holding(folder):
        same_settings(f"{folder}/training.json", dict(seed=SEED, images=IMAGES, autoencoder_updates=AUTOENCODER_UPDATES,
                                                      updates=ends), notes=dict(torch=torch.__version__))
        pipe = models.load("shapes").pipe
        images, captions = make_dataset(SEED, IMAGES)
        torch.manual_seed(SEED)
        vae = pipe.vae.from_config(pipe.vae.config)
        vae = fit(vae, autoencoder_loss, [images], [AUTOENCODER_UPDATES], 3e-3, f"{folder}/vae.pt")
        with torch.no_grad():
            latents = torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.mean for x in images.split(256)])
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        latents *= vae.config.scaling_factor
        ids = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        torch.manual_seed(SEED)
        net = torch.nn.ModuleList([pipe.unet.from_config(pipe.unet.config),
                                   type(pipe.text_encoder)(pipe.text_encoder.config)])
        net = fit(net, denoiser_loss, [pipe.scheduler, latents, ids], ends, 1e-3, f"{folder}/net.pt")
        pipe.register_modules(vae=vae, unet=net[0], text_encoder=net[1])
        pipe.to(dtype=torch.float16).save_pretrained(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
