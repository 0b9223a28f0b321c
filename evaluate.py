"""Sec. 4 of DDSPO (arXiv 2512.23426): what the tuned model makes, beside the model that it was tuned from.

    python evaluate.py grid --models sd14 runs/sd14-ddspo/pipeline --prompts prompts.txt --out grid.png

`grid` is Fig. 3: a row a prompt, a column a model, the same x_T (from seed + row) all along a row.
"""

import argparse
import json
import os
import sys
import textwrap

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import models
from perturb import check_flags, read_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend that needs no screen must be chosen first)


def generate(model, name, prompts, args):
    """One PIL image a prompt; image i's noise comes from seed + i alone."""
    images = []
    for i in tqdm(range(0, len(prompts), args.batch_size), name):
        part = prompts[i:i + args.batch_size]
        c = model.encode(part)
        x_T = torch.stack([models.initial_noise(args.seed + i + k, model.latent_shape) for k in range(len(part))])
        images += models.sample(model, c, x_T, model.steps if args.steps is None else args.steps,
                                model.guidance if args.guidance is None else args.guidance, output_type="pil")
    return images


def grid(args):
    """Writes Fig. 3 for the first --rows prompts."""
    prompts = [prompt for _, _, prompt in read_rows(args.prompts, ["prompt"]) if prompt][:args.rows]
    if not prompts:
        sys.exit(f"{args.prompts} has no prompts in it.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = []
    for name in args.models:
        model = models.load(name, device, torch.float16 if device == "cuda" else torch.float32)
        columns.append((name, generate(model, name, prompts, args)))
    draw_grid(prompts, columns, args.out)


def draw_grid(prompts, columns, path):
    """Images side by side: a row a prompt, a column for each (name, images) in `columns`."""
    figure, axes = plt.subplots(len(prompts), len(columns), squeeze=False, layout="constrained",
                                figsize=(2.5 * len(columns) + 1, 2.5 * len(prompts) + 0.5))
    for column, (name, images) in enumerate(columns):
        axes[0, column].set_title("\n".join(textwrap.wrap(name, 34)), fontsize=8, parse_math=False)
        for row, image in enumerate(images):
            axes[row, column].imshow(image)
            axes[row, column].set(xticks=[], yticks=[])
            if column == 0:
                label = "\n".join(textwrap.wrap(prompts[row], 34, max_lines=5))
                axes[row, 0].set_ylabel(label, fontsize=7, parse_math=False)
    save_figure(figure, path)


def draw_pairs(columns, path):
    """Images with a caption under each: a column for each (title, images, captions)."""
    rows = len(columns[0][1])
    figure, axes = plt.subplots(rows, len(columns), squeeze=False, layout="constrained",
                                figsize=(3 * len(columns), 3.4 * rows))
    for column, (title, images, captions) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=8)
        for ax, image, caption in zip(axes[:, column], images, captions):
            ax.imshow(image)
            ax.set(xticks=[], yticks=[])
            label = "\n".join(textwrap.wrap(caption or "", 45, max_lines=4))
            ax.set_xlabel(label, fontsize=7, parse_math=False)
    save_figure(figure, path)


def draw_curves(path):
    """Draws the curves of a log.jsonl that train.py wrote as curves.png beside it."""
    if not os.path.isfile(path):
        sys.exit(f"there is no file {path}: --plot takes the log.jsonl of a run.")
    with open(path, encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["update"] > 0]
    if not rows:
        sys.exit(f"{path} has no update in it yet.")
    panels = [["loss"], ["winner", "loser"], ["accuracy"], ["logit_quantiles"], ["winner_by_t", "loser_by_t"],
              ["drift"], ["grad_norm"], ["lr"]]
    panels = [panel for panel in panels if panel[0] in rows[0]]
    figure, axes = plt.subplots(2, (len(panels) + 1) // 2, figsize=(14, 6), layout="constrained", squeeze=False)
    for ax, panel in zip(axes.flat, panels):
        for name in panel:
            values = np.array([row[name] for row in rows], float)  # None, where a band had no pair, becomes nan
            if name.endswith("_by_t"):  # the mean of the last tenth of the run, over the bands of time steps
                last = np.ma.masked_invalid(values[-max(1, len(rows) // 10):])
                ax.plot((np.arange(last.shape[1]) + 0.5) / last.shape[1], last.mean(0), ".-", label=name)
                ax.set_xlim(0, 1)
            else:
                ax.plot([row["update"] for row in rows], values, label=name)
        ax.set(title=", ".join(panel), xlabel="t / T, end of the run" if name.endswith("_by_t") else "update")
        if len(panel) > 1 or values.ndim > 1:
            ax.legend(["5 %", "25 %", "50 %", "75 %", "95 %"] if name == "logit_quantiles" else panel, fontsize=7)
    for ax in axes.flat[len(panels):]:
        ax.remove()
    save_figure(figure, os.path.join(os.path.dirname(path), "curves.png"))


def save_figure(figure, path):
    """Writes a PNG file whole or not at all, and its folder if need be."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path + ".partial", dpi=200, format="png")
    plt.close(figure)
    os.replace(path + ".partial", path)
    print(f"wrote {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("grid", help="Fig. 3: the same prompts and seeds, a column a model")
    command.set_defaults(run=grid)
    command.add_argument("--models", nargs="+", required=True, help="presets, hub ids or diffusers folders")
    command.add_argument("--prompts", required=True, help="a text file, one prompt a line, or a .jsonl file")
    command.add_argument("--out", default="grid.png")
    command.add_argument("--rows", type=int, default=4, help="how many prompts, from the first on")
    command.add_argument("--steps", type=int, help="sampling steps (default, from scripts: 25, SANA 20)")
    command.add_argument("--guidance", type=float, help="guidance scale (script: 7.5, SDXL and SD3 5.0, SANA 4.5)")
    command.add_argument("--batch-size", type=int, default=4, help="images sampled at once (guess)")
    command.add_argument("--seed", type=int, default=0, help="image i's noise comes from seed + i")
    args = parser.parse_args(argv)
    if os.path.isdir(args.out):
        sys.exit(f"--out {args.out} is a folder: give the name of a PNG file to write.")
    given = {flag: least for flag, least in dict(steps=1, guidance=0).items() if getattr(args, flag) is not None}
    check_flags(args, rows=1, batch_size=1, seed=0, **given)
    args.run(args)


if __name__ == "__main__":
    main()
