"""The experiment of shapes.py at length: three seeds, the controls, how long to train, and what the gain depends on.

    python -m studies.shapes_full                      all but `settings`: five and a half hours of one core
    python -m studies.shapes_full --parts controls     one part, or several

    settings    the search for each method's settings and best guidance, on a seed that is not reported
    methods     the methods of Tables 1a and 3b and distilled controls, the main ones with their curves over guidance
    controls    the reference with c_minus as negative prompt
    length      D-DPO and DDSPO after 20 to 640 updates
    variants    other pairs, for D-DPO and DDSPO: fewer, losers from other noise, c_minus that lost little or much

The controls ask whether Eq. 7 does more than guidance away from c_minus (the authors coded both and published no
result). runs/shapes-full keeps all that is made, and the same command goes on where it was stopped.
"""

import argparse
import itertools
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it: a thread that waits must sleep and not spin

import numpy as np
import torch
from safetensors.torch import save

import perturb
import shapes
from lib import shapes_world as world
from lib.files import checksum, json_lines, same_settings, to_lines, write_file
from lib.pairs import PairStore, shard_path
from lib.plots import markdown_table, plt, save_figure
from lib.processes import holding, program
from shapes import GUIDANCE, make_store, perturbed, score_model, scores, tune, with_interval

METHODS = shapes.METHODS | {
    "Rand-positive": shapes.METHODS["DDSPO"] | {"--negatives": "rand-positive"},  # Table 3b: DDSPO without made losers
    "Not-paired": shapes.METHODS["DDSPO"] | {"--negatives": "not-paired"},
    "Distilled, no prompt": shapes.METHODS["Distilled"] | {"--lr": 1e-4},  # plain guidance: each c_minus is empty
    "Distilled, no pairs": shapes.METHODS["Distilled"] | {"--lr": 1e-4, "--negatives": "not-paired"}}
GRID, RATES = {"--beta": (250, 1000, 4000), "--scale": (1.5, 2, 3)}, (1e-5, 3e-5, 1e-4)  # of `settings`
GRID_SEED, SEEDS, FULL_PAIRS = 100, (0, 1, 2), 1024
CURVE, NEGATIVE_SCALES = (1, 1.5, 2, 3, 4, 5, 7.5, 10), (1.5, 2, 3, 5, 7.5)  # guidance; of the negative prompt
BEST_GUIDANCE = {"Reference": 5, "D-DPO": 4, "DDSPO": 3, "Distilled": 3, "Distilled, no prompt": 3}  # on GRID_SEED
SHARES = {"25 %": (.25, .25), "50 %": (.5, .5), "75 %": (.75, .75), "40 to 70 %": (.4, .7)}  # of words removed
LENGTHS, BOTH = (20, 40, 80, 160, 320, 640), ("D-DPO", "DDSPO")  # of `length`; BOTH of `variants`, too
FEW_PAIRS = (16, 64, 256, FULL_PAIRS)
HOME = "runs/shapes-full"

# ---- the pairs of a seed, in the folder `home` of its models


def stores_of(home, seed):
    """{method: its pair store}: all have the same pairs, but in one each c_minus is empty."""
    whole = make_store(home, perturbed(home, seed, FULL_PAIRS), seed)
    without = select(f"{home}/pairs without c_minus", whole, whole, range(FULL_PAIRS), c_minus="")
    return dict.fromkeys(METHODS, whole) | dict.fromkeys(("Distilled, no prompt", "Distilled, no pairs"), without)


def other_stores(home, seed):
    """{variant: its pair store}: all pairs, fewer, losers from other noise, c_minus that lost little or much."""
    whole, kept = stores_of(home, seed)["DDSPO"], []
    rows, stores = PairStore(whole).rows, {f"{FULL_PAIRS} pairs": whole}
    for share in (0.2, 0.55, 1):
        some = [row | dict(c_minus=perturb.remove_words(row["c"], seed, share, share) if share < 1 else "")
                for row in rows[:FULL_PAIRS // 4]]
        stores[f"{share:.0%} removed"] = make_store(f"{home}/{share:.0%} removed", some, seed)
    noise = make_store(f"{home}/other noise", rows, seed + 50)
    for n, (which, losers) in itertools.product(FEW_PAIRS, (("", whole), (", losers of other noise", noise))):
        name = f"{n} pairs{which}"
        if name not in stores:
            stores[name] = select(f"{home}/{name}/pairs", whole, losers, range(n))
    for row in rows:
        c, c_minus = ([word for word in row[key].split() if word in world.CONTENT] for key in ("c", "c_minus"))
        kept.append(len(c_minus) / len(c))  # of the words that say what to draw
    lost = np.argsort(kept, kind="stable")[::-1]  # those that lost least come first
    for which, chosen in zip(("least", "more", "most"), np.array_split(lost, 3)):
        stores[f"c_minus lost {which}"] = select(f"{home}/c_minus lost {which}/pairs", whole, whole, chosen.tolist())
    return stores


def select(out, winners, losers, chosen, **changes):
    """A store of the chosen pairs, the winners of one store beside the losers of another of the same prompts; its
    folder. `changes` replace entries of each row."""
    winners, losers = PairStore(winners), PairStore(losers)
    rows = [losers.rows[i] | changes | dict(shard=0, row=k) for k, i in enumerate(chosen)]
    x_0_w, x_0_l = [winners[i][1] for i in chosen], [losers[i][2] for i in chosen]
    write_file(f"{out}/pairs.jsonl", to_lines(rows))
    write_file(shard_path(out, 0), save(dict(x_0_w=torch.stack(x_0_w), x_0_l=torch.stack(x_0_l))))
    size = dict(pairs=len(rows), shard_size=len(rows))
    checksums = dict(table=checksum(f"{out}/pairs.jsonl"), checksums=[checksum(shard_path(out, 0))])
    write_file(f"{out}/meta.json", json.dumps(losers.meta | size | checksums))
    return out


# ---- the parts, each a function of {seed: the folder of its models} that returns its table


def settings(homes):
    """Shares of prompts with everything right, and Fréchet distances, at every setting of GRID; and the shares over
    CURVE at each method's best setting, by the share at GUIDANCE in per cent and then by that at 1."""
    home, rows, best = homes[GRID_SEED], [], ["Reference"]
    stores = stores_of(home, GRID_SEED)
    for method in list(BEST_GUIDANCE)[1:]:
        flag, ranks = next(flag for flag in GRID if flag in METHODS[method]), {}
        for value, lr in itertools.product(GRID[flag], RATES):
            name = f"{method}, {value:g}-{lr:g}"
            tune(home, name, METHODS[method] | {flag: value, "--lr": lr}, stores[method], GRID_SEED)
            shares = {g: scores(homes, name, g).mean() for g in (1, GUIDANCE)}
            ranks[name] = round(shares[GUIDANCE], 2), shares[1]
            rows.append([method, value, lr, *[f"{shares[g]:.3f}, {scores(homes, name, g, 'frechet').mean():.2f}"
                                              for g in shares]])
        best.append(max(ranks, key=ranks.get))
    curves = [[name, *[f"{scores(homes, name, g).mean():.3f}" for g in CURVE]] for name in best]
    return (markdown_table(["method", "beta or scale", "lr", "guidance 1", f"guidance {GUIDANCE}"], rows) + "\n\n"
            + markdown_table(["at its best setting", *[f"guidance {g:g}" for g in CURVE]], curves) + "\n")


def methods(homes):
    """Each beside the others, at its best guidance and at three others."""
    for seed, home in homes.items():
        stores = stores_of(home, seed)
        for name, flags in METHODS.items():
            tune(home, name, flags, stores[name], seed)
    shapes.draw_images(homes[SEEDS[0]], ("Reference", *shapes.METHODS), SEEDS[0], "figures/shapes.png")
    draw_front(homes, "figures/shapes-front.png")
    best = shapes.table_of_models(homes, "at its best guidance", BEST_GUIDANCE)
    return "\n".join([best, *[shapes.tables_at(homes, ("Reference", *METHODS), g) for g in (GUIDANCE, 1, 5)]])


def negative_prompt(homes, share, scale):
    """Scores the untuned reference with each prompt's c_minus, which lost this share, as negative prompt; its name."""
    name = f"Reference, c_minus without {share} as negative prompt"
    for seed, home in homes.items():
        captions = [p["caption"] for p in shapes.scored_prompts(seed)]
        score_model(home, name, seed, scale, [perturb.remove_words(c, seed, *SHARES[share]) for c in captions])
    return name


def controls(homes):
    """The share of prompts with everything right at every share and scale on GRID_SEED, and at the best on SEEDS."""
    grid, every = {GRID_SEED: f"{HOME}/seed-{GRID_SEED}"}, {}
    for share, scale in itertools.product(SHARES, NEGATIVE_SCALES):
        every[share, scale] = scores(grid, negative_prompt(grid, share, scale), scale).mean()
    rows = [[share, *[f"{every[share, scale]:.3f}" for scale in NEGATIVE_SCALES]] for share in SHARES]
    share, scale = max(every, key=every.get)
    best = negative_prompt(homes, share, scale), scale
    return (markdown_table(["c_minus has lost", *[f"scale {scale:g}" for scale in NEGATIVE_SCALES]], rows)
            + f"\n\nThe best of these, {share} and scale {scale:g}, on the three other seeds: "
            + f"{with_interval(scores(homes, *best))}, Fréchet distance {scores(homes, *best, 'frechet').mean():.2f}\n")


def length(homes):
    """A row for each method and number of updates."""
    rows, logs = [], {}
    for seed, home in homes.items():
        store = stores_of(home, seed)["DDSPO"]
        for method, updates in itertools.product(BOTH, LENGTHS):
            tune(home, f"{method}, {updates} updates", METHODS[method] | {"--updates": updates}, store, seed)
    for method, updates in itertools.product(BOTH, LENGTHS):
        name, cells = f"{method}, {updates} updates", []
        for g in (1, GUIDANCE):
            cells += [with_interval(scores(homes, name, g)), f"{scores(homes, name, g, 'frechet').mean():.2f}"]
        last = [row for home in homes.values() for _, row in [*json_lines(f"{home}/{name}/log.jsonl")][-10:]]
        logs[name] = [np.mean([row[key] for row in last]) for key in ("winner", "drift")]
        rows.append([method, updates, *cells, *[f"{number:.2g}" for number in logs[name]]])
    draw_lengths(homes, logs, "figures/shapes-length.png")
    return markdown_table(["method", "updates", "guidance 1", "Fréchet distance ↓", f"guidance {GUIDANCE}",
                           "Fréchet distance ↓", "winner's distance", "drift"], rows) + "\n"


def variants(homes):
    """A row a variant: D-DPO, DDSPO and their paired difference at two guidances."""
    rows = []
    for seed, home in homes.items():
        stores = other_stores(home, seed)
        for variant, method in itertools.product(stores, BOTH):
            tune(home, f"{method}, {variant}", METHODS[method], stores[variant], seed)
    for variant in stores:
        cells = []
        for g in (1, GUIDANCE):
            d_dpo, ddspo = (scores(homes, f"{method}, {variant}", g) for method in BOTH)
            cells += [*[f"{x.mean(1).mean():.3f}" for x in (d_dpo, ddspo)], with_interval(ddspo - d_dpo, "+")]
        rows.append([variant, *cells])
    return markdown_table(["pairs", "D-DPO, guidance 1", "DDSPO", "DDSPO minus D-DPO", f"D-DPO, guidance {GUIDANCE}",
                           "DDSPO", "DDSPO minus D-DPO"], rows) + "\n"


# ---- pictures and main


def draw_front(homes, path):
    """Alignment against guidance, and against the Fréchet distance along it; means over the seeds."""
    figure, (left, middle) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for name, best in BEST_GUIDANCE.items():
        shares = [scores(homes, name, g).mean() for g in CURVE]
        distances = [scores(homes, name, g, "frechet").mean() for g in CURVE]
        for axis, x in ((left, CURVE), (middle, distances)):
            axis.plot(x, shares, marker=".", label=name, linestyle="--" if name.startswith("Distilled") else "-")
            axis.plot(x[CURVE.index(best)], shares[CURVE.index(best)], "k*")
        for g, x, y in zip(CURVE, distances, shares):
            middle.annotate(f"{g:g}", (x, y), (2, 3), textcoords="offset points", fontsize=6)
    left.set(xlabel="guidance (star: the best on another seed)", ylabel="prompts with everything right")
    left.legend(fontsize=8)
    middle.set(xlabel="Fréchet distance (the number at a point is its guidance)")
    save_figure(figure, path)


def draw_lengths(homes, logs, path):
    """Alignment, Fréchet distance and what curves.png shows beside them, against the number of updates."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    lines, colors = {1: "--", GUIDANCE: "-"}, {"D-DPO": "C1", "DDSPO": "C2"}
    for axis, what in zip(axes, ("correct", "frechet")):
        for (method, color), g in itertools.product(colors.items(), lines):
            values = [scores(homes, f"{method}, {updates} updates", g, what).mean() for updates in LENGTHS]
            axis.plot(LENGTHS, values, color=color, linestyle=lines[g], marker=".", label=f"{method}, guidance {g:g}")
        for g, line in lines.items():
            axis.axhline(scores(homes, "Reference", g, what).mean(), color="grey", linestyle=line,
                         label=f"Reference, guidance {g:g}")
    for method, color in colors.items():
        winner, drift = zip(*[logs[f"{method}, {updates} updates"] for updates in LENGTHS])
        axes[2].plot(LENGTHS, winner, ".-", color=color, label=f"{method}: winner's distance")
        axes[2].plot(LENGTHS, drift, ".:", color=color, label=f"{method}: drift")
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


PARTS = dict(settings=settings, methods=methods, controls=controls, length=length, variants=variants)


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS][1:], help="(default: all but settings)")
    parts = parser.parse_args(argv).parts
    with holding(HOME):
        same_settings(f"{HOME}/settings.json", dict(METHODS, guidance=GUIDANCE, updates=shapes.UPDATES,
                                                    prompts=shapes.PROMPTS, pairs=FULL_PAIRS))
        for part in parts:
            seeds = [GRID_SEED] if part == "settings" else SEEDS
            text = PARTS[part]({seed: f"{HOME}/seed-{seed}" for seed in seeds})
            write_file(f"{HOME}/{part}.md", text)
            print("\n" + text)


if __name__ == "__main__":
    main()
