"""The paper's experiment (Sec. 4) on a laptop: a small world, a small Stable Diffusion, a score by rule.

    python shapes.py                 four minutes on two CPU cores: two tuned models, a table and a picture
    python shapes.py --full          all methods on three seeds, and what the gain depends on: some hours
    python shapes.py --grid          the search for each method's settings, on a seed that is not reported
    python shapes.py --reference     trains weights/shapes anew: some hours of one core

judges/shapes.py is the world: images of one or two coloured objects, captions, and the score. weights/shapes is a
StableDiffusionPipeline of the real classes, trained here from scratch on captions of which half are wrong, as in Fig.
2b and as on the web. perturb.py, build_pairs.py and train.py do with it what they do with SD-1.4. What is done is kept
in runs/, tables and pictures too (the pictures of --full are written into figures/), and a stopped run goes on when the
same command is run again.
"""

import argparse
import functools
import itertools
import json
import os
import shlex
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

import build_pairs
import evaluate
import perturb
import train
from judges.fid import frechet
from judges.shared import interval
from lib import models, plots
from lib import shapes_world as world
from lib.files import checksum, read_json, read_lines, same_settings, to_lines, write_file
from lib.pairs import PairStore
from lib.plots import plt
from lib.processes import at_least, holding, program
from studies import shapes_reference

# ---- the experiment, by the commands that a user would give

REFERENCE = models.PRESETS["shapes"]
METHODS = {"D-DPO": ["--objective", "diffusion-dpo"], "DDSPO": [], "Rand-positive": ["--negatives", "rand-positive"],
           "Not-paired": ["--negatives", "not-paired"]}  # Tables 1a and 3b; the last two are DDSPO without made losers
SETTINGS = {"D-DPO": (1000, 3e-5), "DDSPO": (1000, 3e-5)}  # beta and lr, the best of GRID; the others take DDSPO's
GRID, GRID_SEED = dict(beta=(250, 1000, 4000), lr=(1e-5, 3e-5, 1e-4)), 100
GUIDANCE = 3  # guess: the reference's practical one, for the pairs and for the scores
CURVE = (1, 1.5, 2, 3, 4, 5, 7.5, 10)
BEST_GUIDANCE = {"Reference": 5, "D-DPO": 4, "DDSPO": 3}  # of CURVE, on GRID_SEED
UPDATES_OF_TUNING, PROMPTS, QUICK_PAIRS, FULL_PAIRS, SEEDS = 80, 400, 128, 1024, (0, 1, 2)
PAIRS = (16, 64, 256, FULL_PAIRS)  # are few enough?
STEPS = 25  # of sampling


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
    return read_lines(out)


def make_pairs(home, rows, seed):
    """A pair store of these rows; its folder."""
    write_file(os.path.join(home, "rows.jsonl"), to_lines(rows))
    command(build_pairs, "--model", "shapes", "--prompts", os.path.join(home, "rows.jsonl"), "--out",
            os.path.join(home, "pairs"), "--steps", STEPS, "--guidance", GUIDANCE, "--batch-size", 64,
            "--seed", (seed + 1) * 100_000)
    return os.path.join(home, "pairs")


def train_method(home, method, pairs, seed, setting=None):
    """Tunes the reference and returns the folder of the result."""
    beta, lr = setting or SETTINGS.get(method, SETTINGS["DDSPO"])
    out = os.path.join(home, method)
    command(train, "--model", "shapes", "--pairs", pairs, "--out", out, *METHODS[method], "--beta", beta, "--lr", lr,
            "--batch-size", 64, "--micro-batch", 64, "--warmup", 0, "--updates", UPDATES_OF_TUNING,
            "--save-every", UPDATES_OF_TUNING, "--seed", seed)
    return os.path.join(out, "pipeline")


def score(path, name, seed, guidance, batch=100):
    """One image for each of the seed's prompts, image i from the noise of seed i: dict(correct, reason, each a list,
    and frechet). Kept in the file `path`."""
    if not os.path.exists(path):
        model, prompts, images = models.load(name), scored_prompts(seed), []
        for i in tqdm(range(0, len(prompts), batch), f"score {name}, guidance {guidance:g}"):
            captions = [p["caption"] for p in prompts[i:i + batch]]
            images += evaluate.sample_images(model, captions, range(i, i + len(captions)), STEPS, guidance)
        found = [world.judge_image(image, p) for image, p in zip(images, prompts)]
        scored = dict(correct=[v["correct"] for v in found], reason=[v["reason"] for v in found],
                      frechet=frechet(*moments(model, np.stack(images)), *true_moments(seed)))
        write_file(path, json.dumps(scored))
    return read_json(path)


def scores(place, name, folder, seed, guidances):
    """{guidance: what `score` gives} of a model, kept in the folder `place`."""
    return {g: score(os.path.join(place, f"{name}-guidance{g:g}.json"), folder, seed, g) for g in sorted(guidances)}


def scored_prompts(seed):
    """The prompts that a seed's models are scored on, a quarter with held-out combinations."""
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


def experiment(home, seed, pairs, methods, guidances, curve=()):
    """One seed: {model: {guidance: scores}}; over the curve only the models that have a BEST_GUIDANCE."""
    store = make_pairs(home, perturbed(home, seed, pairs), seed)
    folders = {"Reference": "shapes"} | {method: train_method(home, method, store, seed) for method in methods}
    return {name: scores(home, name, folder, seed, {*guidances, *(curve if name in BEST_GUIDANCE else ())})
            for name, folder in folders.items()}


# ---- what the gain depends on: other pairs, for D-DPO and DDSPO


def variants(home, seed):
    """{name: the pair store}, from that of a seed's experiment: fewer pairs, losers from other noise, c_minus that lost
    little or much."""
    whole, rows = os.path.join(home, "pairs"), read_lines(os.path.join(home, "rows.jsonl"))
    home, other = os.path.join(home, "variants"), {}
    for share in (0.2, 0.55):
        folder = os.path.join(home, f"{share:.0%}")
        other[f"{share:.0%} removed"] = perturbed(folder, seed, FULL_PAIRS // 4, "--low", share, "--high", share)
    other["100% removed"] = [dict(c=row["c"], c_minus="", strategy=row["strategy"]) for row in rows[:FULL_PAIRS // 4]]
    stores = {name: make_pairs(os.path.join(home, name), part, seed) for name, part in other.items()}
    noise = make_pairs(os.path.join(home, "other noise"), rows, seed + 50)
    for n, (losers, source) in itertools.product(PAIRS, (("", whole), (", losers of other noise", noise))):
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


def select(winners, losers, chosen, out):
    """A store of the chosen pairs, the winners of one store beside the losers of another of the same prompts; its
    folder."""
    if not os.path.exists(out):
        os.makedirs(out + ".partial", exist_ok=True)
        table, shard = (os.path.join(out + ".partial", name) for name in ("pairs.jsonl", "shard-00000.safetensors"))
        losers = PairStore(losers)
        x_0_w, x_0_l = [PairStore(winners)[i][1] for i in chosen], [losers[i][2] for i in chosen]
        save_file(dict(x_0_w=torch.stack(x_0_w), x_0_l=torch.stack(x_0_l)), shard)
        write_file(table, to_lines(dict(losers.rows[i], shard=0, row=k) for k, i in enumerate(chosen)))
        write_file(os.path.join(out + ".partial", "meta.json"), json.dumps(
            dict(losers.meta, pairs=len(chosen), shard_size=len(chosen), table=checksum(table),
                 checksums=[checksum(shard)])))
        os.replace(out + ".partial", out)
    return out


def compare_variants(home, seed, whole):
    """{variant: {model: {guidance: scores}}} of one seed; `whole` has those of all its pairs."""
    results = {f"{FULL_PAIRS} pairs": whole}
    for name, store in variants(home, seed).items():
        place = os.path.dirname(store)
        folders = {method: train_method(place, method, store, seed) for method in SETTINGS}
        results[name] = {method: scores(place, method, folder, seed, (1, GUIDANCE))
                         for method, folder in folders.items()}
    return results


# ---- the search for settings


def grid(home):
    """D-DPO and DDSPO with every setting of GRID on a seed of its own: prints the shares of prompts with everything
    right. For each method's best setting, by the share at GUIDANCE in per cent and then by that at 1, it prints
    CURVE."""
    def share(place, name, folder, g):
        return np.mean(scores(place, name, folder, GRID_SEED, [g])[g]["correct"])

    store = make_pairs(home, perturbed(home, GRID_SEED, FULL_PAIRS), GRID_SEED)
    lines, best = [], {"Reference": ((), home, "shapes")}  # the two shares, and where the scores and the model are
    for method, setting in itertools.product(SETTINGS, itertools.product(*GRID.values())):
        place = os.path.join(home, f"{setting[0]}-{setting[1]}")
        folder = train_method(place, method, store, GRID_SEED, setting)
        shares = [share(place, method, folder, g) for g in (1, GUIDANCE)]
        lines.append(f"| {method} | {setting[0]} | {setting[1]} | {shares[0]:.3f} | {shares[1]:.3f} |")
        best[method] = max(best.get(method, ((), "", "")), ((round(shares[1], 2), shares[0]), place, folder))
    print(f"\n| method | beta | lr | guidance 1 | guidance {GUIDANCE} |\n" + "| --- " * 5 + "|\n" + "\n".join(lines))
    print("\n| model | " + " | ".join(f"{g:g}" for g in CURVE) + " |\n" + "| --- " * (len(CURVE) + 1) + "|")
    for name, (_, place, folder) in best.items():
        print(f"| {name}, {folder} | " + " | ".join(f"{share(place, name, folder, g):.3f}" for g in CURVE) + " |")


# ---- the tables and the pictures


def right(runs, name, g):
    """{seed: (prompts,)}: whether all was right, as interval() takes it."""
    return {seed: np.array(results[name][g]["correct"], float) for seed, results in runs.items()}


def mean_right(runs, name, g):
    """The share of prompts with everything right, the mean over the seeds."""
    return interval(right(runs, name, g))["mean"]


def of_variant(runs, variant):
    """{seed: {model: {guidance: scores}}} of one variant; `runs` {seed: what compare_variants gives}."""
    return {seed: results[variant] for seed, results in runs.items()}


def with_interval(values):
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**interval(values))


def difference(runs, name, g, other, other_g):
    """A paired difference of two models with its interval, as text."""
    a, b = right(runs, name, g), right(runs, other, other_g)
    return "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**interval({seed: a[seed] - b[seed] for seed in a}))


def table(runs, guidances):
    """For each guidance the share of prompts with everything right, with paired differences; and by tag."""
    lines, names = [], list(next(iter(runs.values())))
    for g in guidances:
        lines += [f"| guidance {g:g} | all right | minus the reference | minus D-DPO | Fréchet distance ↓ |",
                  "| --- " * 5 + "|"]
        for name in names:
            cells = [with_interval(right(runs, name, g))]
            for other in ("Reference", "D-DPO"):
                cells.append("" if name in ("Reference", other) else difference(runs, name, g, other, g))
            cells.append(f"{np.mean([results[name][g]['frechet'] for results in runs.values()]):.2f}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", f"| guidance {g:g} | " + " | ".join(world.TAGS) + " | held out |", "| --- " * 7 + "|"]
        for name in names:
            prompts = [p for seed in runs for p in scored_prompts(seed)]
            values = np.concatenate(list(right(runs, name, g).values()))
            held_out = np.array([p["held_out"] for p in prompts])
            groups = [np.array([p["tag"] == tag for p in prompts]) & ~held_out for tag in world.TAGS] + [held_out]
            lines.append(f"| {name} | " + " | ".join(f"{values[group].mean():.2f}" for group in groups) + " |")
        lines.append("")
    return "\n".join(lines)


def table_at_best(runs):
    """Each model at its own best guidance, which was chosen on another seed, with paired differences."""
    lines = ["| at its best guidance | guidance | all right | minus the reference | minus D-DPO |", "| --- " * 5 + "|"]
    for name, g in BEST_GUIDANCE.items():
        cells = ["" if name in ("Reference", other) else difference(runs, name, g, other, BEST_GUIDANCE[other])
                 for other in ("Reference", "D-DPO")]
        lines.append(f"| {name} | {g:g} | {with_interval(right(runs, name, g))} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_images(folders, seed, path):
    """Images at guidance 1, each with a green frame where all is right, else a red one and what is wrong first. The
    prompts are the first of each tag, and the first of each tag with a held-out combination."""
    prompts = scored_prompts(seed)
    shown = [next(i for i, p in enumerate(prompts) if (p["tag"], p["held_out"]) == kind)
             for kind in itertools.product(world.TAGS, (False, True))]
    figure, axes = plt.subplots(len(folders), len(shown), figsize=(1.3 * len(shown), 1.5 * len(folders) + 0.5),
                                layout="constrained")
    for row, (name, folder) in zip(axes, folders.items()):
        captions = [prompts[i]["caption"] for i in shown]
        images = evaluate.sample_images(models.load(folder), captions, shown, STEPS, 1)
        for axis, i, image in zip(row, shown, images):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            wrong = world.judge_image(image, prompts[i])["reason"]
            axis.spines[:].set(color="tab:red" if wrong else "tab:green", linewidth=3)
            axis.set_xlabel(f"wrong {wrong}" if wrong else "right", fontsize=7)
        row[0].set_ylabel(name)
    for axis, i in zip(axes[0], shown):
        axis.set_title(textwrap.fill(prompts[i]["caption"], 20), fontsize=7)
    plots.save_figure(figure, path)


def draw_front(runs, path):
    """Alignment against guidance, and against the Fréchet distance along it; means over the seeds."""
    figure, (left, middle) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for name in BEST_GUIDANCE:
        shares = [mean_right(runs, name, g) for g in CURVE]
        distances = [np.mean([results[name][g]["frechet"] for results in runs.values()]) for g in CURVE]
        left.plot(CURVE, shares, ".-", label=name)
        middle.plot(distances, shares, ".-")
        for g, x, y in zip(CURVE, distances, shares):
            middle.annotate(f"{g:g}", (x, y), (2, 3), textcoords="offset points", fontsize=6)
        best = CURVE.index(BEST_GUIDANCE[name])
        for axis, x in ((left, CURVE), (middle, distances)):
            axis.plot(x[best], shares[best], "k*")
    left.set(xlabel="guidance (star: the best on another seed)", ylabel="prompts with everything right")
    left.legend(fontsize=8)
    middle.set(xlabel="Fréchet distance (the number at a point is its guidance)")
    plots.save_figure(figure, path)


def draw_few_pairs(runs, path):
    """Alignment against the number of pairs; `runs` {seed: what compare_variants gives}."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, g in zip(axes, (1, GUIDANCE)):
        for (method, color), (losers, line) in itertools.product((("D-DPO", "C1"), ("DDSPO", "C2")),
                                                                 (("", "-"), (", losers of other noise", ":"))):
            shares = [mean_right(of_variant(runs, f"{n} pairs{losers}"), method, g) for n in PAIRS]
            axis.plot(PAIRS, shares, line, marker=".", color=color, label=method + losers)
        whole = of_variant(runs, f"{FULL_PAIRS} pairs")
        axis.axhline(mean_right(whole, "Reference", g), color="grey", label="Reference")
        axis.set(xscale="log", xticks=PAIRS, xticklabels=PAIRS, xlabel="pairs", ylabel="prompts with everything right",
                 title=f"guidance {g:g}")
        axis.minorticks_off()
    axes[0].legend(fontsize=8)
    plots.save_figure(figure, path)


def table_of_variants(runs):
    """A row a variant: D-DPO, DDSPO and their paired difference at two guidances."""
    head = [f"D-DPO, guidance {g:g} | DDSPO | DDSPO minus D-DPO" for g in (1, GUIDANCE)]
    lines = [f"| pairs | {' | '.join(head)} |", "| --- " * 7 + "|"]
    for variant in next(iter(runs.values())):
        these, cells = of_variant(runs, variant), []
        for g in (1, GUIDANCE):
            cells += [f"{mean_right(these, name, g):.3f}" for name in ("D-DPO", "DDSPO")]
            cells.append(difference(these, "DDSPO", g, "D-DPO", g))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="all methods on three seeds, and what the gain depends on")
    parser.add_argument("--grid", action="store_true", help="the search for each method's settings")
    parser.add_argument("--reference", metavar="FOLDER", nargs="?", const=REFERENCE,
                        help=f"train the reference anew and write it there (default: {REFERENCE})")
    parser.add_argument("--updates", type=at_least(1), default=shapes_reference.UPDATES,
                        help="of --reference (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.reference:
        return shapes_reference.make_reference(args.reference, args.updates)

    home = os.path.join("runs", "shapes-full" if args.full else "shapes-grid" if args.grid else "shapes")
    settings = dict(reference=checksum(os.path.join(REFERENCE, "unet", "diffusion_pytorch_model.safetensors")),
                    settings=json.dumps([SETTINGS, GUIDANCE, UPDATES_OF_TUNING, PROMPTS, QUICK_PAIRS, FULL_PAIRS]))
    with holding(home):
        same_settings(os.path.join(home, "settings.json"), settings)
        if args.grid:
            return grid(home)
        seeds, pairs = (SEEDS, FULL_PAIRS) if args.full else (SEEDS[:1], QUICK_PAIRS)
        methods, guidances = ((METHODS, (1, GUIDANCE, BEST_GUIDANCE["Reference"])) if args.full else
                              (SETTINGS, (1, GUIDANCE)))
        homes = {seed: os.path.join(home, f"seed-{seed}") for seed in seeds}
        curve = CURVE if args.full else ()
        runs = {seed: experiment(homes[seed], seed, pairs, methods, guidances, curve) for seed in seeds}
        text, name = table(runs, guidances), os.path.join("figures" if args.full else home, "shapes")
        folders = {"Reference": "shapes"} | {m: os.path.join(homes[seeds[0]], m, "pipeline") for m in methods}
        draw_images(folders, seeds[0], name + ".png")
        if args.full:
            other = {seed: compare_variants(homes[seed], seed, runs[seed]) for seed in seeds}
            text += "\n" + table_at_best(runs) + "\n" + table_of_variants(other)
            draw_front(runs, name + "-front.png")
            draw_few_pairs(other, name + "-pairs.png")
        write_file(os.path.join(home, "table.md"), text + "\n")
        print("\n" + text)


if __name__ == "__main__":
    main()
