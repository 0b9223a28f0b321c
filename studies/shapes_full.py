"""The experiment of shapes.py at length: three seeds, the controls, how long to train, and what the gain depends on.

    python -m studies.shapes_full                      all but `settings`: about seven hours of one core
    python -m studies.shapes_full --parts controls     one part, or several

    settings    the search for each method's settings and best guidance, on a seed that is not reported
    methods     the methods of Tables 1a and 3b and the two distilled controls, each with its curve over guidance
    controls    the reference with c_minus as negative prompt
    length      D-DPO and DDSPO after 20 to 640 updates
    variants    other pairs, for D-DPO and DDSPO: fewer, losers from other noise, c_minus that lost little or much

The controls ask whether Eq. 7 does more than guidance away from c_minus (the authors coded both and published no
result). runs/shapes-full keeps all that is made, and the same command goes on where it was stopped. Pictures go into
figures/.
"""

import argparse
import itertools
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it: a thread that waits must sleep and not spin

import numpy as np
import torch
from safetensors.torch import save_file

import perturb
import shapes
from lib import shapes_world as world
from lib.files import checksum, json_lines, to_lines, write_file
from lib.pairs import PairStore
from lib.plots import markdown_table, plt, save_figure
from lib.processes import holding, program
from shapes import (
    GUIDANCE,
    make_store,
    mean_frechet,
    paired,
    perturbed,
    right,
    score_model,
    scores_at,
    table_by_tag,
    table_of_models,
    tune,
    with_interval,
)

METHODS = shapes.METHODS | {
    "Rand-positive": [*shapes.METHODS["DDSPO"], "--negatives", "rand-positive"],  # Table 3b: DDSPO without made losers
    "Not-paired": [*shapes.METHODS["DDSPO"], "--negatives", "not-paired"],
    "Distilled, no prompt": ["--objective", "distill", "--scale", 2, "--lr", 1e-4]}  # plain guidance: c_minus is empty
GRID, RATES = {"--beta": (250, 1000, 4000), "--scale": (1.5, 2, 3)}, (1e-5, 3e-5, 1e-4)  # of `settings`
GRID_SEED, SEEDS, FULL_PAIRS = 100, (0, 1, 2), 1024
CURVE = (1, 1.5, 2, 3, 4, 5, 7.5, 10)
BEST_GUIDANCE = {"Reference": 5, "D-DPO": 4, "DDSPO": 3, "Distilled": 3, "Distilled, no prompt": 3}  # on GRID_SEED
SHARES = {"25 %": (.25, .25), "50 %": (.5, .5), "75 %": (.75, .75), "40 to 70 %": (.4, .7)}  # of words removed
NEGATIVE_SCALES = (1.5, 2, 3, 5, 7.5)
LENGTHS = (20, 40, 80, 160, 320, 640)
FEW_PAIRS = (16, 64, 256, FULL_PAIRS)

# ---- methods, and the search for their settings


def stores_of(home, seed):
    """{method: the pair store}: all methods have the same pairs, but one without c_minus."""
    whole = make_store(home, perturbed(home, seed, FULL_PAIRS), seed)
    without = select(whole, whole, range(FULL_PAIRS), os.path.join(home, "pairs without c_minus"), c_minus="")
    return dict.fromkeys(METHODS, whole) | {"Distilled, no prompt": without}


def select(winners, losers, chosen, out, **changes):
    """A store of the chosen pairs, the winners of one store beside the losers of another of the same prompts; its
    folder. `changes` replace entries of each row."""
    if not os.path.exists(out):
        os.makedirs(out + ".partial", exist_ok=True)
        table, shard = (os.path.join(out + ".partial", name) for name in ("pairs.jsonl", "shard-00000.safetensors"))
        winners, losers = PairStore(winners), PairStore(losers)
        x_0_w, x_0_l = [winners[i][1] for i in chosen], [losers[i][2] for i in chosen]
        save_file(dict(x_0_w=torch.stack(x_0_w), x_0_l=torch.stack(x_0_l)), shard)
        rows = [losers.rows[i] | changes | dict(shard=0, row=k) for k, i in enumerate(chosen)]
        write_file(table, to_lines(rows))
        write_file(os.path.join(out + ".partial", "meta.json"), json.dumps(
            dict(losers.meta, pairs=len(rows), shard_size=len(rows), table=checksum(table),
                 checksums=[checksum(shard)])))
        os.replace(out + ".partial", out)
    return out


def compare_methods(home, seed):
    """{model: {guidance: scores}} of one seed; over the whole curve only the models that have a BEST_GUIDANCE."""
    stores = stores_of(home, seed)
    folders = {"Reference": "shapes"} | {m: tune(home, m, flags, stores[m], seed) for m, flags in METHODS.items()}
    return {name: scores_at(home, name, folder, seed, CURVE if name in BEST_GUIDANCE else (1, GUIDANCE, 5))
            for name, folder in folders.items()}


def search_settings(home):
    """Every setting of GRID on GRID_SEED: the shares of prompts with everything right, and Fréchet distances. For each
    method's best setting, by the share at GUIDANCE in per cent and then by that at 1, the shares over CURVE."""
    stores, rows, best = stores_of(home, GRID_SEED), [], {"Reference": ((), home, "shapes")}
    for method in [name for name in METHODS if name in BEST_GUIDANCE]:
        *kind, flag, _, _, _ = METHODS[method]
        for value, lr in itertools.product(GRID[flag], RATES):
            place, flags = os.path.join(home, f"{value:g}-{lr:g}"), [*kind, flag, value, "--lr", lr]
            folder = tune(place, method, flags, stores[method], GRID_SEED)
            found = scores_at(place, method, folder, GRID_SEED, (1, GUIDANCE))
            shares = {g: np.mean(found[g]["correct"]) for g in found}
            rows.append([method, value, lr, *[f"{shares[g]:.3f}, {found[g]['frechet']:.2f}" for g in found]])
            rank = round(shares[GUIDANCE], 2), shares[1]
            best[method] = max(best.get(method, ((), "", "")), (rank, place, folder))
    curves = []
    for name, (_, place, folder) in best.items():
        found = scores_at(place, name, folder, GRID_SEED, CURVE)
        curves.append([f"{name}, {os.path.basename(place)}", *[f"{np.mean(found[g]['correct']):.3f}" for g in CURVE]])
    return (markdown_table(["method", "beta or scale", "lr", "guidance 1", f"guidance {GUIDANCE}"], rows) + "\n\n"
            + markdown_table(["at its best setting", *[f"guidance {g:g}" for g in CURVE]], curves) + "\n")


# ---- the reference with c_minus as negative prompt, and how long to train


def negative_prompt(home, seed, share, scale):
    """The scores of the reference, untuned, with each prompt's c_minus, which lost this share, as negative prompt."""
    low, high = SHARES[share]
    c_minus = [perturb.remove_words(p["caption"], seed, low=low, high=high) for p in shapes.scored_prompts(seed)]
    path = os.path.join(home, "negative prompt", f"{low:g}-{high:g}-guidance{scale:g}.json")
    return score_model(path, "shapes", seed, scale, negatives=c_minus)


def table_of_negatives(homes):
    """The share of prompts with everything right at every share and scale on GRID_SEED, and at the best on SEEDS."""
    every = {(share, scale): np.mean(negative_prompt(homes[GRID_SEED], GRID_SEED, share, scale)["correct"])
             for share, scale in itertools.product(SHARES, NEGATIVE_SCALES)}
    share, scale = max(every, key=every.get)
    best = {seed: {"": {scale: negative_prompt(homes[seed], seed, share, scale)}} for seed in SEEDS}
    rows = [[share, *[f"{every[share, scale]:.3f}" for scale in NEGATIVE_SCALES]] for share in SHARES]
    return (markdown_table(["c_minus has lost", *[f"scale {scale:g}" for scale in NEGATIVE_SCALES]], rows)
            + f"\n\nThe best of these, {share} and scale {scale:g}, on the three other seeds: "
            + f"{with_interval(right(best, '', scale))}, Fréchet distance {mean_frechet(best, '', scale):.2f}\n")


def compare_lengths(home, seed, store):
    """{method: {updates: {guidance: scores, "log": (winner's distance, drift)}}} along one run of each method."""
    place, found = os.path.join(home, "length"), {}
    for method in ("D-DPO", "DDSPO"):
        found[method] = {}
        for updates in LENGTHS:
            name = f"{method}, {updates} updates"
            paths = [os.path.join(place, f"{name}-guidance{g}.json") for g in (1, GUIDANCE)]
            folder = os.path.join(place, method, "pipeline")
            if not all(map(os.path.exists, paths)):  # the same run goes on to this update, and is exported
                folder = tune(place, method, METHODS[method], store, seed, updates)
            log = [row for _, row in json_lines(os.path.join(place, method, "log.jsonl"))]  # row 0: the settings
            found[method][updates] = scores_at(place, name, folder, seed, (1, GUIDANCE)) | dict(
                log=[np.mean([row[key] for row in log[updates - 9:updates + 1]]) for key in ("winner", "drift")])
    return found


def of_length(runs, method, updates):
    """{seed: {method: {guidance: scores}}} after so many updates; `runs` {seed: what compare_lengths gives}."""
    return {seed: {method: found[method][updates]} for seed, found in runs.items()}


def table_of_lengths(runs):
    """A row for each method and number of updates."""
    rows = []
    for method, updates in itertools.product(("D-DPO", "DDSPO"), LENGTHS):
        these = of_length(runs, method, updates)
        winner, drift = np.mean([found[method]["log"] for found in these.values()], 0)
        rows.append([method, updates, *[cell for g in (1, GUIDANCE) for cell in (
            with_interval(right(these, method, g)), f"{mean_frechet(these, method, g):.2f}")],
            f"{winner:.2g}", f"{drift:.2g}"])
    return markdown_table(["method", "updates", "guidance 1", "Fréchet distance ↓", f"guidance {GUIDANCE}",
                           "Fréchet distance ↓", "winner's distance", "drift"], rows) + "\n"


def draw_lengths(runs, methods, path):
    """Alignment, Fréchet distance and what curves.png shows beside them, against the number of updates; `methods`
    {seed: {"Reference": {guidance: scores}}}."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    lines, colors = ((1, "--"), (GUIDANCE, "-")), {"D-DPO": "C1", "DDSPO": "C2"}
    for (method, color), (g, line) in itertools.product(colors.items(), lines):
        these = [of_length(runs, method, updates) for updates in LENGTHS]
        style = dict(color=color, linestyle=line, marker=".", label=f"{method}, guidance {g:g}")
        axes[0].plot(LENGTHS, [mean_right(x, method, g) for x in these], **style)
        axes[1].plot(LENGTHS, [mean_frechet(x, method, g) for x in these], **style)
    for g, line in lines:
        axes[0].axhline(mean_right(methods, "Reference", g), color="grey", linestyle=line,
                        label=f"Reference, guidance {g:g}")
        axes[1].axhline(mean_frechet(methods, "Reference", g), color="grey", linestyle=line)
    for method, color in colors.items():
        logs = np.array([np.mean([found[method][n]["log"] for found in runs.values()], 0) for n in LENGTHS])
        axes[2].plot(LENGTHS, logs[:, 0], ".-", color=color, label=f"{method}: winner's distance")
        axes[2].plot(LENGTHS, logs[:, 1], ".:", color=color, label=f"{method}: drift")
    for axis, title in zip(axes, ("prompts with everything right: higher is better",
                                  "Fréchet distance to true images: lower is better",
                                  "what curves.png shows of the same runs")):
        axis.set_title(title, fontsize=9)
        axis.set(xscale="log", xticks=LENGTHS, xticklabels=LENGTHS, xlabel="updates")
        axis.minorticks_off()
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=7)
    axes[2].legend(fontsize=7)
    save_figure(figure, path)


# ---- what the gain depends on: other pairs, for D-DPO and DDSPO


def variants(home, seed):
    """{name: the pair store}, from that of a seed's experiment: fewer pairs, losers from other noise, c_minus that lost
    little or much."""
    whole, rows = os.path.join(home, "pairs"), [row for _, row in json_lines(os.path.join(home, "rows.jsonl"))]
    home, other = os.path.join(home, "variants"), {}
    for share in (0.2, 0.55):
        folder = os.path.join(home, f"{share:.0%}")
        other[f"{share:.0%} removed"] = perturbed(folder, seed, FULL_PAIRS // 4, "--low", share, "--high", share)
    other["100% removed"] = [dict(c=row["c"], c_minus="", strategy=row["strategy"]) for row in rows[:FULL_PAIRS // 4]]
    stores = {name: make_store(os.path.join(home, name), part, seed) for name, part in other.items()}
    noise = make_store(os.path.join(home, "other noise"), rows, seed + 50)
    for n, (losers, source) in itertools.product(FEW_PAIRS, (("", whole), (", losers of other noise", noise))):
        if n < FULL_PAIRS or losers:
            name = f"{n} pairs{losers}"
            stores[name] = select(whole, source, range(n), os.path.join(home, name, "pairs"))
    lost = np.argsort([kept_share(row) for row in rows], kind="stable")[::-1]  # those that lost least come first
    for which, chosen in zip(("least", "more", "most"), np.array_split(lost, 3)):
        name = f"c_minus lost {which}"
        stores[name] = select(whole, whole, chosen.tolist(), os.path.join(home, name, "pairs"))
    return stores


def kept_share(row):
    """The share of the caption's content words that c_minus keeps."""
    c, c_minus = ([word for word in row[key].split() if word in world.CONTENT] for key in ("c", "c_minus"))
    return len(c_minus) / len(c)


def compare_variants(home, seed, whole):
    """{variant: {model: {guidance: scores}}} of one seed; `whole` has those of all its pairs."""
    results = {f"{FULL_PAIRS} pairs": whole}
    for name, store in variants(home, seed).items():
        place = os.path.dirname(store)
        folders = {method: tune(place, method, METHODS[method], store, seed) for method in ("D-DPO", "DDSPO")}
        results[name] = {method: scores_at(place, method, folder, seed, (1, GUIDANCE))
                         for method, folder in folders.items()}
    return results


def of_variant(runs, variant):
    """{seed: {model: {guidance: scores}}} of one variant; `runs` {seed: what compare_variants gives}."""
    return {seed: results[variant] for seed, results in runs.items()}


def table_of_variants(runs):
    """A row a variant: D-DPO, DDSPO and their paired difference at two guidances."""
    head, rows = ["pairs"], []
    for g in (1, GUIDANCE):
        head += [f"D-DPO, guidance {g:g}", "DDSPO", "DDSPO minus D-DPO"]
    for variant in next(iter(runs.values())):
        these, cells = of_variant(runs, variant), []
        for g in (1, GUIDANCE):
            cells += [f"{mean_right(these, name, g):.3f}" for name in ("D-DPO", "DDSPO")]
            cells.append(paired(these, "DDSPO", g, "D-DPO", g))
        rows.append([variant, *cells])
    return markdown_table(head, rows) + "\n"


# ---- pictures and main


def mean_right(runs, name, g):
    """The share of prompts with everything right, the mean over the seeds."""
    return np.mean([results[name][g]["correct"] for results in runs.values()])


def draw_front(runs, path):
    """Alignment against guidance, and against the Fréchet distance along it; means over the seeds."""
    figure, (left, middle) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for name, best in BEST_GUIDANCE.items():
        shares = [mean_right(runs, name, g) for g in CURVE]
        distances = [mean_frechet(runs, name, g) for g in CURVE]
        style = dict(marker=".", label=name, linestyle="--" if name.startswith("Distilled") else "-")
        left.plot(CURVE, shares, **style)
        middle.plot(distances, shares, **style)
        for g, x, y in zip(CURVE, distances, shares):
            middle.annotate(f"{g:g}", (x, y), (2, 3), textcoords="offset points", fontsize=6)
        for axis, x in ((left, CURVE), (middle, distances)):
            axis.plot(x[CURVE.index(best)], shares[CURVE.index(best)], "k*")
    left.set(xlabel="guidance (star: the best on another seed)", ylabel="prompts with everything right")
    left.legend(fontsize=8)
    middle.set(xlabel="Fréchet distance (the number at a point is its guidance)")
    save_figure(figure, path)


PARTS = ("settings", "methods", "controls", "length", "variants")


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[1:], help="(default: all but settings)")
    parts = parser.parse_args(argv).parts
    home = os.path.join("runs", "shapes-full")
    homes = {seed: os.path.join(home, f"seed-{seed}") for seed in (*SEEDS, GRID_SEED)}
    with holding(home):
        shapes.begin(home, METHODS)
        texts = {}
        if "settings" in parts:
            texts["settings"] = search_settings(homes[GRID_SEED])
        if {"methods", "length", "variants"} & {*parts}:
            runs = {seed: compare_methods(homes[seed], seed) for seed in SEEDS}
        if "methods" in parts:
            tables = [table_of_models(runs, "at its best guidance", BEST_GUIDANCE)]
            for g in (GUIDANCE, 1, 5):
                tables += [table_of_models(runs, "model", dict.fromkeys(("Reference", *METHODS), g)),
                           table_by_tag(runs, g)]
            texts["methods"] = "\n".join(tables)
            folders = {m: os.path.join(homes[SEEDS[0]], m, "pipeline") for m in ("D-DPO", "DDSPO", "Distilled")}
            shapes.draw_images({"Reference": "shapes"} | folders, SEEDS[0], GUIDANCE, "figures/shapes.png")
            draw_front(runs, "figures/shapes-front.png")
        if "controls" in parts:
            texts["controls"] = table_of_negatives(homes)
        if "length" in parts:
            lengths = {seed: compare_lengths(homes[seed], seed, os.path.join(homes[seed], "pairs")) for seed in SEEDS}
            texts["length"] = table_of_lengths(lengths)
            draw_lengths(lengths, runs, "figures/shapes-length.png")
        if "variants" in parts:
            texts["variants"] = table_of_variants({s: compare_variants(homes[s], s, runs[s]) for s in SEEDS})
        for part, text in texts.items():
            write_file(os.path.join(home, f"{part}.md"), text)
            print("\n" + text)


if __name__ == "__main__":
    main()
