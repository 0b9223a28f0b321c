"""Pictures: Fig. 3's grid, the curves of a run, a store's pairs; each file appears whole or not at all."""

import json
import os
import sys
import textwrap

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend that needs no screen must be chosen first)


def draw_grid(prompts, columns, path):
    """Images side by side: a row a prompt, a column for each (name, images) in `columns`. Where the columns are (name,
    images, captions), the caption of each image stands under it and `prompts` is not shown."""
    rows = len(columns[0][1])
    figure, axes = plt.subplots(rows, len(columns), squeeze=False, layout="constrained",
                                figsize=(2.5 * len(columns) + 1, 2.5 * rows + 0.5))
    for column, (name, images, *captions) in enumerate(columns):
        axes[0, column].set_title("\n".join(textwrap.wrap(name, 34)), fontsize=8, parse_math=False)
        for row, image in enumerate(images):
            axes[row, column].imshow(image)
            axes[row, column].set(xticks=[], yticks=[])
            set_label = axes[row, column].set_xlabel if captions else axes[row, column].set_ylabel
            if captions or column == 0:
                text = captions[0][row] if captions else prompts[row]
                set_label("\n".join(textwrap.wrap(text or "", 34, max_lines=5)), fontsize=7, parse_math=False)
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
