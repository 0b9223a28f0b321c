"""Pictures: the grid of Fig. 3, the pairs of a store, the curves of a run. And tables, in Markdown."""

import os
import textwrap

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend that needs no screen must be chosen first)

from lib.files import UserError, json_lines, reading, stop_if_not_ours, write_file


def draw_grid(prompts, columns, path):
    """Images side by side: a row a prompt, a column for each (title, images) in `columns`. Where a column is (title,
    images, captions), each image has its caption under it, and `prompts` is not shown."""
    rows = len(columns[0][1])
    figure, axes = plt.subplots(rows, len(columns), squeeze=False, layout="constrained",
                                figsize=(2.5 * len(columns) + 1, 2.5 * rows + 0.5))
    for column, (title, images, *captions) in enumerate(columns):
        axes[0, column].set_title(textwrap.fill(title, 34), fontsize=8, parse_math=False)
        for row, image in enumerate(images):
            axis = axes[row, column]
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            if captions or column == 0:
                label, text = (axis.set_xlabel, captions[0][row]) if captions else (axis.set_ylabel, prompts[row])
                label(textwrap.fill(text or "", 34, max_lines=5), fontsize=7, parse_math=False)
    save_figure(figure, path)


CURVES = [  # of a run's log: the columns of a panel, its title, the unit of its y axis and, if fixed, its ends
    (["loss"], "loss: lower is better", "mean over an update's pairs", 0),
    (["winner", "loser"], "distance to the target, minus that of the reference", "mean squared error"),
    (["accuracy"], "preferred as they should be: higher is better, 0.5 is chance", "share of an update's pairs", 0, 1),
    (["logit_quantiles"], "preferred by how much: higher is better", "logit"),
    (["winner_by_t", "loser_by_t"], "the same distances at the end of the run", "mean squared error"),
    (["drift"], "how far the student is from the reference", "mean squared difference"),
    (["grad_norm"], "gradient, before it is clipped to 1", "norm"),
    (["lr"], "learning rate", "")]
LABELS = dict(winner="winner: lower is better", loser="loser: higher is better",
              logit_quantiles=[f"{share} % of the pairs are below" for share in (5, 25, 50, 75, 95)])


def draw_curves(path):
    """Draws the curves of the log.jsonl that train.py wrote as curves.png beside it."""
    with reading(path, "it is no log of train.py with an update in it."):
        rows = [row for _, row in json_lines(path) if row["update"] > 0]
        panels = [panel for panel in CURVES if panel[0][0] in rows[0]]
        columns = {name: np.array([row[name] for row in rows], float) for names, *_ in panels for name in names}
    figure, axes = plt.subplots(2, (len(panels) + 1) // 2, figsize=(16, 7), layout="constrained", squeeze=False)
    for axis, (names, title, unit, *ends) in zip(axes.flat, panels):
        for name in names:
            values, label = columns[name], LABELS.get(name.removesuffix("_by_t"))
            if name.endswith("_by_t"):  # the mean of the last tenth of the run, over the bands of time steps
                last = np.ma.masked_invalid(values[-max(1, len(rows) // 10):])  # a band without a pair has none
                axis.plot((np.arange(last.shape[1]) + 0.5) / last.shape[1], last.mean(0), ".-", label=label)
                axis.set_xlim(0, 1)
            else:
                axis.plot([row["update"] for row in rows], values, label=label)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="t / T (0: least noise)" if name.endswith("_by_t") else "update", ylabel=unit)
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.set_ylim(*ends)
        if label:
            axis.legend(fontsize=7)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    save_figure(figure, os.path.join(os.path.dirname(path), "curves.png"))


def markdown_table(head, rows):
    """A Markdown table as text: the cells of its head, and those of each row."""
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows))


def save_figure(figure, path):
    """Writes a PNG file, whole or not at all, and makes its folder if there is none."""
    write_file(path, lambda partial: figure.savefig(partial, dpi=200, format="png"))
    plt.close(figure)
    print(f"wrote {path}")


def try_path(path):
    """Raises UserError or OSError, before anything is computed, if no picture can be written here."""
    if os.path.isdir(path) or not path.lower().endswith(".png"):
        raise UserError(f"{path!r} must be the name of a picture to write, a file that ends in .png.")
    stop_if_not_ours(path, b"Software\0Matplotlib")
    write_file(path + ".try", b"")
    os.remove(path + ".try")
