"""How the settings of toy2d.py were chosen, and its methods against the number of pairs and the number of updates.

    python -m studies.toy2d_sweep    figures/toy2d_sweep.png, and every number as two tables; 35 minutes of one core

The rule is the same for every method: of its grid, the setting with the least mean energy distance to the truth on five
seeds that are reported nowhere else. At N = 2 pairs a class it chooses beta (for the controls the guidance scale s) and
the learning rate, for each source of pairs; for other N it keeps toy2d.py's beta and chooses the learning rate alone.
"""

import argparse
import itertools

import numpy as np
import torch
from tqdm import tqdm

import toy2d
from lib.plots import plt, save_figure, try_path
from lib.processes import program
from toy2d import OBJECTIVES, SETTINGS

TUNING_SEEDS = [100, 101, 102, 103, 104]
COUNTS, UPDATES = [1, 2, 4, 16, 64], [75, 150, 300, 600, 1200]
LR = [2.5e-6, 5e-6, 1e-5, 2e-5]
BETA = {name: [3, 10, 50] if "guidance" in objective else [0.1, 1, 10] for name, objective in OBJECTIVES.items()}


def run_all(settings, seeds):
    """{setting: its scores, (seeds, 3)}. A setting is (source of pairs, N, name of the method, beta, lr, updates)."""
    scores = {setting: [] for setting in settings}
    for seed in seeds:
        ref = toy2d.train_reference(seed)
        pairs = {source: toy2d.draw_pairs(ref, seed, max(COUNTS), source) for source in SETTINGS}
        for setting in tqdm(scores, f"seed {seed}", leave=False):
            source, n, name, beta, lr, updates = setting
            first = [x[:n * toy2d.K] for x in pairs[source]]
            theta = toy2d.finetune(ref, first, seed, OBJECTIVES[name], beta, lr, updates)
            scores[setting].append(toy2d.quality(toy2d.sample_classes(theta)))
    return {setting: np.array(values) for setting, values in scores.items()}


def label(source, n, name, beta, lr, updates):
    """A setting's row in a table."""
    return f"{source}, {n}, {name}, {beta:g}, {lr:g}, {updates}" if updates else "Reference"


def choose_settings():
    """{(source, N, method): its best setting}; prints the whole grid."""
    grid = {}
    for source, n in itertools.product(SETTINGS, COUNTS):
        for name, (beta, _) in zip(OBJECTIVES, SETTINGS[source]):
            if source != "clean" or n == 2:
                grid[source, n, name] = [(source, n, name, beta, lr, 300)
                                         for beta in (BETA[name] if n == 2 else [beta]) for lr in LR]
    scores = run_all(sum(grid.values(), []), TUNING_SEEDS)
    best = {key: min(settings, key=lambda setting: scores[setting][:, 1].mean()) for key, settings in grid.items()}
    print(f"The grid, {len(TUNING_SEEDS)} other seeds:\n")
    print(toy2d.quality_table("pairs, N, method, beta or s, lr, updates", {
        label(*setting) + (" (best)" if setting in best.values() else ""): x for setting, x in scores.items()}))
    return best


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", default="figures/toy2d_sweep.png", help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    try_path(args.out)
    torch.set_num_threads(1)  # as in toy2d.py
    lines = {"Reference": ("apart", 2, "DDSPO", 1, 0, 0)} | choose_settings()
    for source, updates, name in itertools.product(["apart", "shared-noise"], UPDATES, OBJECTIVES):
        beta, lr = lines[source, 2, name][3], lines[source, 2, "DDSPO"][4]
        lines[source, f"{updates} updates", name] = source, 2, name, beta, lr, updates
    scores = run_all(lines.values(), toy2d.SEEDS)
    print(f"\nEach method at its best, and at DDSPO's lr after other numbers of updates, {len(toy2d.SEEDS)} seeds:\n")
    print(toy2d.quality_table("pairs, N, method, beta or s, lr, updates", {label(*x): scores[x] for x in scores}))
    draw_lines({line: scores[setting] for line, setting in lines.items()}, args.out)


def draw_lines(values, path):
    """Share against N, energy distance against N and against the number of updates; a row a source of pairs."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.5), sharex="col", sharey="col", layout="constrained")
    panels = [(COUNTS, COUNTS, 0), (COUNTS, COUNTS, 1), (UPDATES, [f"{updates} updates" for updates in UPDATES], 1)]
    for (source, text), row in zip({"apart": "samples of a pair drawn apart",
                                    "shared-noise": "samples of a pair from one x_T"}.items(), axes):
        for axis, (xs, changes, score) in zip(row, panels):
            for i, name in enumerate(OBJECTIVES):
                y = np.stack([values[source, change, name][:, score] for change in changes])  # (xs, seeds)
                beside = 1.04 ** (i - 2)  # so that the bars do not hide one another
                axis.errorbar(np.array(xs) * beside, y.mean(1), y.std(1, ddof=1), label=name, capsize=2,
                              color=["C3", "C1", "C0", "0.5", "black"][i], linestyle="--" if i > 2 else "-")
            axis.axhline(values["Reference"][:, score].mean(), color="grey", linestyle=":", label="Reference")
            axis.set(xscale="log", xticks=xs, xticklabels=xs, yscale="log" if score else "linear", title=text,
                     xlabel="updates with N = 2 and DDSPO's learning rate" if xs is UPDATES else "pairs per class N",
                     ylabel=["share nearest own mode: higher is better",
                             "energy distance to the truth: lower is better"][score])
            axis.xaxis.minorticks_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
