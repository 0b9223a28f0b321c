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
from lib.files import json_lines, read_json, same_settings, to_lines, write_file
from lib.plots import markdown_table, plt, save_figure
from lib.processes import holding, program

METHODS = {  # beta, scale and lr are the best of the grid of studies/shapes_full.py, on a seed that is not reported
    "D-DPO": {"--objective": "diffusion-dpo", "--beta": 1000, "--lr": 3e-5},
    "DDSPO": {"--beta": 1000, "--lr": 3e-5},
    "Distilled": {"--objective": "distill", "--scale": 2, "--lr": 3e-5}}  # the control
SEED, PAIRS, PROMPTS, UPDATES = 0, 128, 400, 80
GUIDANCE = 3  # guess: the reference's practical one, for the pairs and for the scores
STEPS = 25  # of sampling (script)

# ---- the experiment, by the commands that a user would give


def command(script, *flags):
    """Runs a program of this repository as from the command line."""
    flags = [str(flag) for flag in flags]
    print("\n$ " + shlex.join(["python", f"{script.__name__}.py", *flags]))
    script.main(flags)


def perturbed(home, seed, pairs):
    """The rows (c, c_minus) of perturb.py for this seed's training prompts."""
    write_file(f"{home}/prompts.txt", "".join(p["caption"] + "\n" for p in world.make_prompts([seed, 1], pairs)))
    command(perturb, f"{home}/prompts.txt", f"{home}/perturbed.jsonl", "--seed", seed)
    return [row for _, row in json_lines(f"{home}/perturbed.jsonl")]


def make_store(home, rows, seed):
    """A pair store of these rows; its folder."""
    write_file(f"{home}/rows.jsonl", to_lines(rows))
    command(build_pairs, "--model", "shapes", "--prompts", f"{home}/rows.jsonl", "--out", f"{home}/pairs",
            "--steps", STEPS, "--guidance", GUIDANCE, "--batch-size", 64, "--seed", (seed + 1) * 100_000)
    return f"{home}/pairs"


def tune(home, name, flags, store, seed):
    """Tunes the reference with the pairs of a store. The folder NAME in `home` keeps the run."""
    flags = {"--updates": UPDATES} | flags
    command(train, "--model", "shapes", "--pairs", store, "--out", f"{home}/{name}", "--seed", seed,
            "--save-every", flags["--updates"], *itertools.chain(*flags.items()))


def load(home, name):
    """The reference, or a model that `tune` made."""
    return models.load("shapes" if name.startswith("Reference") else f"{home}/{name}/pipeline")


def score_model(home, name, seed, guidance, negatives=None):
    """One image for each of the seed's prompts, image i from the noise of seed i: dict(correct, a list, and frechet),
    which a file in `home` keeps. `negatives` are negative prompts, in place of the empty one."""
    path = f"{home}/{name}-guidance{guidance:g}.json"
    if not os.path.exists(path):
        model, prompts, images = load(home, name), scored_prompts(seed), []
        for i in tqdm(range(0, len(prompts), 100), f"score {home}, {name}, guidance {guidance:g}"):
            captions = [p["caption"] for p in prompts[i:i + 100]]
            if negatives:
                model.sampling = dict(negative_prompt=negatives[i:i + 100])
            images += evaluate.sample_images(model, captions, range(i, i + len(captions)), STEPS, guidance)
        correct = [world.judge_image(image, p)["correct"] for image, p in zip(images, prompts)]
        distance = frechet(*moments(model, np.stack(images)), *true_moments(seed))
        write_file(path, json.dumps(dict(correct=correct, frechet=distance)))
    return read_json(path)


def scored_prompts(seed):
    """The prompts that a seed's models are scored on, a quarter of them with held-out combinations."""
    return world.make_prompts([seed, 2], PROMPTS, held_out_share=0.25)


@torch.no_grad()
def moments(model, images):
    """What the Fréchet distance compares, for images (n, 32, 32, 3) uint8: mean (64,) and covariance (64, 64) of the
    latents, averaged to 4 x 4 places. They tell layout, colour and sharpness, and no method changes the autoencoder."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    latents = F.avg_pool2d(model.pipe.vae.encode(x).latent_dist.mean, 2).flatten(1).double()  # (n, 64)
    return latents.mean(0), latents.T.cov()


@functools.cache
def true_moments(seed):
    """The moments of five true images for each of the seed's prompts."""
    rng = np.random.default_rng(12)
    images = [world.render(world.make_scene(rng, p)) for p in scored_prompts(seed) * 5]
    return moments(models.load("shapes"), np.stack(images))


# ---- the tables and the picture; `homes` is {seed: the folder of its models}


def scores(homes, name, g, what="correct"):
    """Whether all was right, for each seed and prompt (seeds, prompts); with "frechet" the distances (seeds,)."""
    return np.array([score_model(home, name, seed, g)[what] for seed, home in homes.items()], float)


def with_interval(values, sign=""):
    """The mean of values (seeds, prompts) with its 95 % interval, as text; with the sign "+" for a difference."""
    numbers = interval(dict(enumerate(values)))
    return "{mean:{0}.3f} [{low:{0}.3f}, {high:{0}.3f}]".format(sign, **numbers)


def table_of_models(homes, title, guidances):
    """For each model in {name: guidance} the share of prompts that are all right, and paired differences to others."""
    others, rows = ("Reference", "D-DPO", "Distilled"), []
    for name, g in guidances.items():
        right, distance = scores(homes, name, g), scores(homes, name, g, "frechet").mean()
        differences = ["" if name in ("Reference", other) else
                       with_interval(right - scores(homes, other, guidances[other]), "+") for other in others]
        rows.append([name, f"{g:g}", with_interval(right), *differences, f"{distance:.2f}"])
    head = [title, "guidance", "all right", *[f"minus {other}" for other in others], "Fréchet distance ↓"]
    return markdown_table(head, rows) + "\n"


def tables_at(homes, names, g):
    """The table of these models at one guidance, and a table of the shares by what the prompts ask for."""
    prompts = [p for seed in homes for p in scored_prompts(seed)]
    tags, rows = np.array(["held out" if p["held_out"] else p["tag"] for p in prompts]), []
    for name in names:
        right = scores(homes, name, g).flatten()
        rows.append([name, *[f"{right[tags == tag].mean():.2f}" for tag in (*world.TAGS, "held out")]])
    by_tag = markdown_table([f"guidance {g:g}", *world.TAGS, "held out"], rows)
    return table_of_models(homes, "model", dict.fromkeys(names, g)) + "\n" + by_tag + "\n"


def draw_images(home, names, seed, path):
    """Images with a green frame where all is right, else a red one and what is wrong first. The prompts are the first
    of each tag, and the first of each tag with a held-out combination."""
    prompts = scored_prompts(seed)
    shown = [next(i for i, p in enumerate(prompts) if (p["tag"], p["held_out"]) == kind)
             for kind in itertools.product(world.TAGS, (False, True))]
    captions = [prompts[i]["caption"] for i in shown]
    figure, axes = plt.subplots(len(names), len(shown), figsize=(1.3 * len(shown), 1.5 * len(names) + 0.7),
                                layout="constrained")
    for row, name in zip(axes, names):
        images = evaluate.sample_images(load(home, name), captions, shown, STEPS, GUIDANCE)
        for axis, i, image in zip(row, shown, images):
            wrong = world.judge_image(image, prompts[i])["reason"]
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color="tab:red" if wrong else "tab:green", linewidth=3)
            axis.set_xlabel(f"wrong {wrong}" if wrong else "right", fontsize=7)
        row[0].set_ylabel(name)
    for axis, caption in zip(axes[0], captions):
        axis.set_title(textwrap.fill(caption, 20), fontsize=7)
    figure.suptitle(f"guidance {GUIDANCE:g}; green: everything is right", fontsize=9)
    save_figure(figure, path)


@program
def main(argv=None):
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False).parse_args(argv)
    home, names = "runs/shapes", ("Reference", *METHODS)
    with holding(home):
        same_settings(f"{home}/settings.json", dict(METHODS, guidance=GUIDANCE, updates=UPDATES, prompts=PROMPTS))
        store = make_store(home, perturbed(home, SEED, PAIRS), SEED)
        for name, flags in METHODS.items():
            tune(home, name, flags, store, SEED)
        draw_images(home, names, SEED, f"{home}/shapes.png")
        text = "\n".join(tables_at({SEED: home}, names, g) for g in (GUIDANCE, 1))
        write_file(f"{home}/table.md", text)
        print("\n" + text)


if __name__ == "__main__":
    main()
