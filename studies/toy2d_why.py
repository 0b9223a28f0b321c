"""Sec. 3.2 of DDSPO (arXiv 2512.23426), measured on the toy: does what each objective asks for point the right way?

    python -m studies.toy2d_why    figures/toy2d_why.png, and the numbers as tables

The toy's true score is known. So at every state x_t of every t there is one correction that would make the reference
right,

    r = eps_exact(x_t, t, c) - eps_ref(x_t, t, c)

and one that an objective asks for: the way down its loss with respect to the prediction, at theta = ref. Up to one
factor, a pair asks for target_w - eps_ref at its winner's state and for -(target_l - eps_ref) at its loser's. Several
pairs lead to one state, and the student sees x_t, t and c only: what it can learn there is their mean d, and what one
pair asks for beside it is noise.

    alignment        sum <d, r> / sqrt(sum |d|^2 sum |r|^2)    1: in the right direction; 0: across it; below 0: away
    signal to noise  sum |d|^2 / sum |what a pair asks for - d|^2

The sums are over the states that updates see, winners' and losers' together. The picture shows the mean given the
state, which may be a winner's or a loser's; the tables add the mean where that side is known, and what tuning with t
from a band only gives.
"""

import argparse
import functools
import itertools

import numpy as np
import torch

import toy2d
from lib.plots import plt, save_figure, try_path
from lib.processes import program
from toy2d import K, T

# ---- the direction that an objective asks for, and the right one


def asked(objective, ref, pairs, x_t, t, c, sides):
    """What the pairs of class c ask for at x_t (B, 2), t and c (B,): the mean d (B, 2), and the mean square of the rest
    (B,). x_t comes from a winner, sides [0], from a loser, [1], or from either, [0, 1]."""
    x_0_w, x_0_l, _, c_minus = (x.unflatten(0, (-1, K))[:, c] for x in pairs)  # (N, B, 2), c_minus (N, B)
    x_0 = torch.stack([x_0_w, x_0_l])  # (2, N, B, 2)
    eps = (x_t - toy2d.ALPHA[t][:, None] * x_0) / toy2d.SIGMA[t][:, None]  # the noise that leads from x_0 to x_t
    eps_ref = ref(x_t, t, c)  # (B, 2)
    if objective == "diffusion-dpo":
        target = eps
    else:
        previous, following = ref(x_t, t, (c - 1) % K), ref(x_t, t, (c + 1) % K)
        target_l = torch.where((c_minus == (c + 1) % K)[..., None], following, previous)  # eps_ref_l_minus (N, B, 2)
        target = torch.stack([eps_ref.expand_as(target_l), target_l])
    sign = torch.tensor([1, -1]).view(2, 1, 1, 1)
    asks = (sign * (target - eps_ref))[sides].flatten(0, 1)  # (N or 2 N, B, 2)
    posterior = torch.softmax(-eps[sides].flatten(0, 1).square().sum(-1) / 2, 0)[..., None]  # which x_0 led to x_t
    d = (posterior * asks).sum(0)
    return d, (posterior * (asks - d).square()).sum((0, 2))


def measure(seed, source, n, objective, side_known):
    """For every t the means of <d, r>, |d|^2, |r|^2 and the noise over 512 winners' and 512 losers' states: (T, 4)."""
    ref = toy2d.train_reference(seed)
    pairs, rng = toy2d.make_pairs(ref, seed, n, source), torch.Generator().manual_seed(4000 + seed)
    means = []
    for step in range(T):
        pick, eps = torch.randint(n * K, (512,), generator=rng), torch.randn(512, 2, generator=rng)
        x_0_w, x_0_l, c, _ = (x[pick] for x in pairs)
        t, terms = torch.full_like(pick, step), []
        for side, x_0 in enumerate((x_0_w, x_0_l)):
            x_t = toy2d.noise(x_0, t, eps)
            r = toy2d.eps_exact(x_t, t, c, **toy2d.CLEAN) - ref(x_t, t, c)
            d, rest = asked(objective, ref, pairs, x_t, t, c, [side] if side_known else [0, 1])
            terms.append(torch.stack([(d * r).sum(1), d.square().sum(1), r.square().sum(1), rest], 1))  # (512, 4)
        means.append(torch.cat(terms).mean(0))
    return torch.stack(means).numpy()


def ratios(means):
    """Alignment and signal to noise (...) from what `measure` gives (..., 4). Where one pair alone leads to a state
    there is no noise, and signal to noise is infinite."""
    d_r, d_d, r_r, rest = np.moveaxis(means.astype(np.float64), -1, 0)
    with np.errstate(divide="ignore"):
        return d_r / np.sqrt(d_d * r_r), d_d / rest


# ---- tables and picture

SOURCES = ["apart", "shared-noise"]
OBJECTIVES = {"D-DPO": "diffusion-dpo", "DDSPO": "ddspo"}
LINES = {  # (method, N): colour
    ("DDSPO", 2): "C0", ("DDSPO", 64): "navy",
    ("D-DPO", 1): "lightpink", ("D-DPO", 2): "C3", ("D-DPO", 16): "brown", ("D-DPO", 64): "black",
}


def print_table(title, means):
    """Everything at some t; means {(method, N): (T, 4)}."""
    rows = {"to correct: mean r²": means["D-DPO", 2][:, 2]}
    rows |= {f"alignment, {name}, N = {n}": ratios(x)[0] for (name, n), x in means.items()}
    rows |= {f"signal to noise, {name}, N = {n}": ratios(x)[1] for (name, n), x in means.items()}
    rows |= {f"asked for: mean d², {name}, N = {n}": x[:, 1] for (name, n), x in means.items()}
    times = [1, 5, 10, 20, 35, 50, 65, 80, 95]
    print(f"\n{title}:\n\n| t | {' | '.join(map(str, times))} |\n" + "| --- " * (len(times) + 1) + "|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join("> 1000" if x > 1000 else f"{x:.2g}" for x in values[times]) + " |")


def draw(means, path):
    """Alignment, signal to noise and sizes against t, a column a source; means {(source, (method, N)): (T, 4)}."""
    figure, axes = plt.subplots(3, 2, figsize=(10, 9), sharex=True, sharey="row", layout="constrained")
    for (top, middle, bottom), source in zip(axes.T, SOURCES):
        for (name, n), colour in LINES.items():
            alignment, signal_to_noise = ratios(means[source, (name, n)])
            top.plot(alignment, color=colour, label=f"{name}, N = {n}")
            middle.semilogy(signal_to_noise, color=colour)
            bottom.semilogy(means[source, (name, n)][:, 1], color=colour)
        bottom.semilogy(means[source, ("D-DPO", 2)][:, 2], color="grey", linestyle=":", linewidth=3,
                        label="what there is to correct, r²")
        top.axhline(0, color="grey", linewidth=0.5)
        top.set(title=f"pairs {source}")
        middle.set(ylim=(1e-2, 1e3))
        bottom.set(xlabel="t (0: almost clean, 99: almost noise)")
    axes[0, 0].set(ylabel="alignment with the right correction")
    axes[1, 0].set(ylabel="signal to noise")
    axes[2, 0].set(ylabel="what is asked for, d²")
    axes[0, 0].legend(fontsize=8)
    axes[2, 0].legend(fontsize=8)
    save_figure(figure, path)


def print_bands():
    """Both methods tuned with t from a band only, at N = 2 and DDSPO's setting."""
    lines = list(itertools.product(SOURCES, OBJECTIVES, [(0, T), (0, 35), (35, T)]))
    settings = [dict(objective=OBJECTIVES[name], source=source, beta=toy2d.BETA, lr=toy2d.LR[source]["DDSPO"],
                     times=band) for source, name, band in lines]
    values, _ = toy2d.run_all(settings, toy2d.SEEDS)
    names = [f"{source}, {name}, t from {low} to {high - 1}" for source, name, (low, high) in lines]
    print()
    toy2d.print_table(f"N = 2, {len(toy2d.SEEDS)} seeds, t from a band only", dict(zip(names, values)))


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", default="figures/toy2d_why.png", help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    try_path(args.out)

    keys = list(itertools.product(SOURCES, LINES, [False, True]))
    jobs = [functools.partial(measure, seed, source, n, OBJECTIVES[name], known)
            for seed in toy2d.SEEDS for source, (name, n), known in keys]
    of_seeds = np.stack(toy2d.in_processes(jobs, len(keys))).reshape(len(toy2d.SEEDS), len(keys), T, 4)
    means = dict(zip(keys, of_seeds.mean(0)))  # (T, 4) each
    for known, source in itertools.product([False, True], SOURCES):
        title = f"Pairs {source}, {len(toy2d.SEEDS)} seeds; d is the mean given the state" + " and its side" * known
        print_table(title, {line: means[source, line, known] for line in LINES})
    draw({(source, line): means[source, line, False] for source in SOURCES for line in LINES}, args.out)
    print_bands()


if __name__ == "__main__":
    main()
