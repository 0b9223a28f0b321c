"""The paper's experiment (Sec. 4) on a laptop: a small world, a small Stable Diffusion, a score by rule.

    python shapes.py        four minutes on two CPU cores: three tuned models, tables and a picture

lib/shapes_world.py is the world: images of one or two coloured shapes, captions, and the score. weights/shapes is a
StableDiffusionPipeline of the real classes, trained from scratch on captions of which half are wrong, as in Fig. 2b and
as on the web. perturb.py, build_pairs.py and train.py do with it what they do with SD-1.4: D-DPO, DDSPO, and the
control, which asks whether DDSPO is more than guidance away from c_minus. The folder runs/shapes keeps all that is
made, and the same command goes on where it was stopped. studies/shapes_full.py is the same at length.
"""

import argparse
import functools
import itertools
import json
import os
import shlex
import textwrap

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it: a thread that waits must sleep and not spin

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import build_pairs
import evaluate
import perturb
import train
from judges.fid import frechet
from judges.shared import interval
from lib import models
from lib import shapes_world as world
from lib.files import checksum, json_lines, read_json, same_settings, to_lines, write_file
from lib.plots import markdown_table, plt, save_figure
from lib.processes import holding, program

METHODS = {  # beta, scale and lr are the best of the grid of studies/shapes_full.py, on a seed that is not reported
    "D-DPO": ["--objective", "diffusion-dpo", "--beta", 1000, "--lr", 3e-5],
    "DDSPO": ["--beta", 1000, "--lr", 3e-5],
    "Distilled": ["--objective", "distill", "--scale", 2, "--lr", 3e-5]}  # the control
SEED, PAIRS, PROMPTS, UPDATES = 0, 128, 400, 80
GUIDANCE = 3  # guess: the reference's practical one, for the pairs and for the scores
STEPS = 25  # of sampling (script)

# ---- the experiment, by the commands that a user would give


def command(script, *flags):
    """Runs a program of this repository as from the command line."""
    flags = [str(flag) for flag in flags]
    print("\n$ " + shlex.join(["python", f"{script.__name__}.py", *flags]))
    script.main(flags)


def perturbed(home, seed, pairs, *flags):
    """The rows (c, c_minus) of perturb.py for this seed's training prompts."""
    prompts, out = os.path.join(home, "prompts.txt"), os.path.join(home, "perturbed.jsonl")
    write_file(prompts, "".join(p["caption"] + "\n" for p in world.make_prompts([seed, 1], pairs)))
    command(perturb, prompts, out, "--seed", seed, *flags)
    return [row for _, row in json_lines(out)]


def make_store(home, rows, seed):
    """A pair store of these rows; its folder."""
    write_file(os.path.join(home, "rows.jsonl"), to_lines(rows))
    command(build_pairs, "--model", "shapes", "--prompts", os.path.join(home, "rows.jsonl"), "--out",
            os.path.join(home, "pairs"), "--steps", STEPS, "--guidance", GUIDANCE, "--batch-size", 64,
            "--seed", (seed + 1) * 100_000)
    return os.path.join(home, "pairs")


def tune(home, method, flags, store, seed, updates=None):
    """Tunes the reference with the pairs of a store. Returns the folder of the result."""
    out, updates = os.path.join(home, method), updates or UPDATES
    command(train, "--model", "shapes", "--pairs", store, "--out", out, *flags, "--batch-size", 64, "--micro-batch", 64,
            "--warmup", 0, "--updates", updates, "--save-every", updates, "--seed", seed)
    return os.path.join(out, "pipeline")


def score_model(path, folder, seed, guidance, batch=100, negatives=None):
    """One image for each of the seed's prompts, image i from the noise of seed i: dict(correct, reason, each a list,
    and frechet). The file `path` keeps it. `negatives` are negative prompts, in place of the empty one."""
    if not os.path.exists(path):
        model, prompts, images = models.load(folder), scored_prompts(seed), []
        for i in tqdm(range(0, len(prompts), batch), f"score {folder}, guidance {guidance:g}"):
            captions = [p["caption"] for p in prompts[i:i + batch]]
            if negatives:
                model.sampling = dict(negative_prompt=negatives[i:i + batch])
            images += evaluate.sample_images(model, captions, range(i, i + len(captions)), STEPS, guidance)
        found = [world.judge_image(image, p) for image, p in zip(images, prompts)]
        scored = dict(correct=[v["correct"] for v in found], reason=[v["reason"] for v in found],
                      frechet=frechet(*moments(model, np.stack(images)), *true_moments(seed)))
        write_file(path, json.dumps(scored))
    return read_json(path)


def scores_at(place, name, folder, seed, guidances):
    """{guidance: what `score_model` gives} of a model, kept in the folder `place`."""
    return {g: score_model(os.path.join(place, f"{name}-guidance{g:g}.json"), folder, seed, g)
            for g in sorted(guidances)}


def scored_prompts(seed):
    """The prompts that a seed's models are scored on, a quarter of them with held-out combinations."""
    return world.make_prompts([seed, 2], PROMPTS, held_out_share=0.25)


@torch.no_grad()
def moments(model, images):
    """What the Fréchet distance compares, for images (n, 32, 32, 3) uint8: mean (64,) and covariance (64, 64) of the
    latents of the autoencoder, which no method changes, averaged to 4 x 4 places. Images of another layout, colour or
    sharpness than true ones differ there."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    latents = F.avg_pool2d(model.pipe.vae.encode(x).latent_dist.mean, 2).flatten(1).double()  # (n, 64)
    return latents.mean(0), latents.T.cov()


@functools.cache
def true_moments(seed):
    """The moments of five true images for each of the seed's prompts."""
    rng = np.random.default_rng(12)
    images = [world.render(world.make_scene(rng, p)) for p in scored_prompts(seed) * 5]
    return moments(models.load("shapes"), np.stack(images))


def begin(home, methods):
    """Begins the folder of an experiment, or raises UserError if it was begun with another reference or settings."""
    weights = os.path.join(models.PRESETS["shapes"], "unet", "diffusion_pytorch_model.safetensors")
    settings = json.dumps([methods, GUIDANCE, UPDATES, PROMPTS])
    same_settings(os.path.join(home, "settings.json"), dict(reference=checksum(weights), settings=settings))


# ---- the tables and the picture; `runs` is {seed: {model: {guidance: scores}}}


def right(runs, name, g):
    """{seed: (prompts,)}: whether all was right, as interval() takes it."""
    return {seed: np.array(results[name][g]["correct"], float) for seed, results in runs.items()}


def mean_frechet(runs, name, g):
    return np.mean([results[name][g]["frechet"] for results in runs.values()])


def with_interval(values):
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**interval(values))


def paired(runs, name, g, other, other_g):
    """A paired difference of two models with its interval, as text."""
    a, b = right(runs, name, g), right(runs, other, other_g)
    return "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**interval({seed: a[seed] - b[seed] for seed in a}))


def table_of_models(runs, title, guidances):
    """A row for each (model, guidance): the share of prompts with everything right, and paired differences to others of
    the table, each at its own guidance in it."""
    others = [name for name in ("Reference", "D-DPO", "Distilled") if name in guidances]
    rows = []
    for name, g in guidances.items():
        differences = ["" if name in ("Reference", other) else paired(runs, name, g, other, guidances[other])
                       for other in others]
        rows.append([name, f"{g:g}", with_interval(right(runs, name, g)), *differences,
                     f"{mean_frechet(runs, name, g):.2f}"])
    head = [title, "guidance", "all right", *[f"minus {other}" for other in others], "Fréchet distance ↓"]
    return markdown_table(head, rows) + "\n"


def table_by_tag(runs, g):
    """The share of prompts with everything right by what they ask for."""
    prompts = [p for seed in runs for p in scored_prompts(seed)]
    held_out = np.array([p["held_out"] for p in prompts])
    groups = [np.array([p["tag"] == tag for p in prompts]) & ~held_out for tag in world.TAGS] + [held_out]
    rows = []
    for name, results in next(iter(runs.values())).items():
        if g in results:
            values = np.concatenate(list(right(runs, name, g).values()))
            rows.append([name, *[f"{values[group].mean():.2f}" for group in groups]])
    return markdown_table([f"guidance {g:g}", *world.TAGS, "held out"], rows) + "\n"


def draw_images(folders, seed, guidance, path):
    """Images with a green frame where all is right, else a red one and what is wrong first. The prompts are the first
    of each tag, and the first of each tag with a held-out combination."""
    prompts = scored_prompts(seed)
    shown = [next(i for i, p in enumerate(prompts) if (p["tag"], p["held_out"]) == kind)
             for kind in itertools.product(world.TAGS, (False, True))]
    figure, axes = plt.subplots(len(folders), len(shown), figsize=(1.3 * len(shown), 1.5 * len(folders) + 0.7),
                                layout="constrained")
    for row, (name, folder) in zip(axes, folders.items()):
        captions = [prompts[i]["caption"] for i in shown]
        images = evaluate.sample_images(models.load(folder), captions, shown, STEPS, guidance)
        for axis, i, image in zip(row, shown, images):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            wrong = world.judge_image(image, prompts[i])["reason"]
            axis.spines[:].set(color="tab:red" if wrong else "tab:green", linewidth=3)
            axis.set_xlabel(f"wrong {wrong}" if wrong else "right", fontsize=7)
        row[0].set_ylabel(name)
    for axis, i in zip(axes[0], shown):
        axis.set_title(textwrap.fill(prompts[i]["caption"], 20), fontsize=7)
    figure.suptitle(f"guidance {guidance:g}; green: everything is right", fontsize=9)
    save_figure(figure, path)


@program
def main(argv=None):
    argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False).parse_args(argv)
    home = os.path.join("runs", "shapes")
    with holding(home):
        begin(home, METHODS)
        store = make_store(home, perturbed(home, SEED, PAIRS), SEED)
        folders = {"Reference": "shapes"}
        folders |= {method: tune(home, method, flags, store, SEED) for method, flags in METHODS.items()}
        runs = {SEED: {name: scores_at(home, name, folder, SEED, (1, GUIDANCE)) for name, folder in folders.items()}}
        draw_images(folders, SEED, GUIDANCE, os.path.join(home, "shapes.png"))
        text = "\n".join(table_of_models(runs, "model", dict.fromkeys(folders, g)) + "\n" + table_by_tag(runs, g)
                         for g in (GUIDANCE, 1))
        write_file(os.path.join(home, "table.md"), text)
        print("\n" + text)


if __name__ == "__main__":
    main()
