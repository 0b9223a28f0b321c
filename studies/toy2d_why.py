"""Sec. 3.2 of DDSPO (arXiv 2512.23426), measured on the toy: does what each objective asks for point the right way?

    python -m studies.toy2d_why    figures/toy2d_why.png, figures/fig1.png, and the numbers as tables

The toy's true score is known. So at every state x_t of every t there is one correction that would make the reference
right,

    r = eps_exact(x_t, t, c) - eps_ref(x_t, t, c)

and one that an objective asks for: the way down its loss with respect to the prediction, at theta = ref. Up to one
factor, a pair asks for target_w - eps_ref at its winner's state and for -(target_l - eps_ref) at its loser's. Several
pairs lead to one state, and the student sees x_t, t and c only: it can learn their mean d there, and the rest of what
one pair asks for is noise.

    alignment        sum <d, r> / sqrt(sum |d|^2 sum |r|^2)    1: in the right direction; 0: across it; below 0: away
    signal to noise  sum |d|^2 / sum |what a pair asks for - d|^2

The sums are over the states that updates see, winners' and losers' together. fig1.png is the paper's Fig. 1 on these
numbers: where the reference would send a few states if it predicted eps_ref + d, and where eps_exact sends them.
"""

import argparse
import itertools
import os

import numpy as np
import torch
from tqdm import tqdm

import toy2d
from lib.plots import markdown_table, plt, save_figure, try_path
from lib.processes import program
from toy2d import ALPHA, CLEAN, MODES, SIGMA, K, T

# ---- the direction that an objective asks for, and the right one


def eps_exact(x_t, t, c, std, swap):
    """The exact noise prediction -sigma_t grad log p_t(x_t | c): x_t (..., 2), t and c (...) -> (..., 2).

    p_t(. | c) mixes three Gaussians N(alpha_t mode, (alpha_t^2 std^2 + sigma_t^2) I), weights swap/2, 1 - swap, swap/2.
    """
    modes = MODES[(c[..., None] + torch.tensor([-1, 0, 1])) % K].to(x_t)  # (..., 3, 2)
    weight = torch.tensor([swap / 2, 1 - swap, swap / 2]).to(x_t)
    alpha, sigma = ALPHA[t][..., None].to(x_t), SIGMA[t][..., None].to(x_t)
    variance = alpha**2 * std**2 + sigma**2  # (..., 1)
    offset = x_t[..., None, :] - alpha[..., None] * modes  # (..., 3, 2)
    posterior = torch.softmax(weight.log() - offset.square().sum(-1) / (2 * variance), -1)  # which mode x_t came from
    return sigma * (posterior[..., None] * offset).sum(-2) / variance


def asked(objective, ref, pairs, x_t, t, c):
    """What the pairs of class c ask for at x_t (B, 2), t and c (B,), whichever winner or loser led there: the mean d
    (B, 2), and the mean square of the rest (B,)."""
    x_0_w, x_0_l, _, c_minus = (x.unflatten(0, (-1, K))[:, c] for x in pairs)  # (N, B, 2), c_minus (N, B)
    x_0 = torch.stack([x_0_w, x_0_l])  # (2, N, B, 2)
    eps = (x_t - ALPHA[t][:, None] * x_0) / SIGMA[t][:, None]  # the noise that leads from x_0 to x_t
    eps_ref = ref(x_t, t, c)  # (B, 2)
    if objective == "diffusion-dpo":
        target = eps
    else:
        previous, following = ref(x_t, t, (c - 1) % K), ref(x_t, t, (c + 1) % K)
        target_l = torch.where((c_minus == (c + 1) % K)[..., None], following, previous)  # eps_ref_l_minus (N, B, 2)
        target = torch.stack([eps_ref.expand_as(target_l), target_l])
    sign = torch.tensor([1, -1]).view(2, 1, 1, 1)
    asks = (sign * (target - eps_ref)).flatten(0, 1)  # (2 N, B, 2)
    posterior = torch.softmax(-eps.flatten(0, 1).square().sum(-1) / 2, 0)[..., None]  # which x_0 led to x_t
    d = (posterior * asks).sum(0)
    return d, (posterior * (asks - d).square()).sum((0, 2))


def measure(ref, seed, source, n, objective):
    """For every t the means of <d, r>, |d|^2, |r|^2 and the noise over 512 winners' and 512 losers' states: (T, 4)."""
    pairs, rng = toy2d.draw_pairs(ref, seed, n, source), torch.Generator().manual_seed(4000 + seed)
    means = []
    for step in range(T):
        pick, eps = torch.randint(n * K, (512,), generator=rng), torch.randn(512, 2, generator=rng)
        x_0_w, x_0_l, c, _ = (x[pick] for x in pairs)
        t, terms = torch.full_like(pick, step), []
        for x_0 in (x_0_w, x_0_l):
            x_t = toy2d.noise(x_0, t, eps)
            r = eps_exact(x_t, t, c, **CLEAN) - ref(x_t, t, c)
            d, rest = asked(objective, ref, pairs, x_t, t, c)
            terms.append(torch.stack([(d * r).sum(1), d.square().sum(1), r.square().sum(1), rest], 1))  # (512, 4)
        means.append(torch.cat(terms).mean(0))
    return torch.stack(means).numpy()


def ratios(means):
    """Alignment and signal to noise (...) from what `measure` gives (..., 4). Where one pair alone leads to a state
    there is no noise, and signal to noise is infinite."""
    d_r, d_d, r_r, rest = np.moveaxis(means.astype(np.float64), -1, 0)
    with np.errstate(divide="ignore"):
        return d_r / np.sqrt(d_d * r_r), d_d / rest


# ---- the tables and the pictures

SOURCES = ["apart", "shared-noise"]
OBJECTIVES = {"D-DPO": "diffusion-dpo", "DDSPO": "ddspo"}
LINES = {  # (method, N): colour
    ("DDSPO", 2): "C0", ("DDSPO", 64): "navy",
    ("D-DPO", 1): "lightpink", ("D-DPO", 2): "C3", ("D-DPO", 16): "brown", ("D-DPO", 64): "black",
}


def times_table(means):
    """Everything at some t, as Markdown; means {(method, N): (T, 4)}."""
    rows = {"to correct: mean r²": means["D-DPO", 2][:, 2]}
    rows |= {f"alignment, {name}, N = {n}": ratios(x)[0] for (name, n), x in means.items()}
    rows |= {f"signal to noise, {name}, N = {n}": ratios(x)[1] for (name, n), x in means.items()}
    rows |= {f"asked for: mean d², {name}, N = {n}": x[:, 1] for (name, n), x in means.items()}
    times = [1, 5, 10, 20, 35, 50, 65, 80, 95]
    return markdown_table(["t", *times], [[name, *("> 1000" if x > 1000 else f"{x:.2g}" for x in values[times])]
                                          for name, values in rows.items()])


def draw_ratios(means, path):
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


def draw_arrows(ref, seed, path):
    """Fig. 1 of the paper on one pair of the toy: its winner's and its loser's state at three time steps."""
    pairs = toy2d.draw_pairs(ref, seed, 2)
    farthest = (pairs[0] - MODES[pairs[2]]).norm(dim=1).argmax()  # the winner farthest from its mode, as in Fig. 2
    x_0_w, x_0_l, k, _ = (x[farthest] for x in pairs)
    x_0, c = torch.stack([x_0_w, x_0_l]), torch.stack([k, k])  # (2, 2) and (2,)
    eps = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed))
    figure, axes = plt.subplots(1, 3, figsize=(12, 5.2), sharex=True, sharey=True, layout="constrained")
    for axis, step, kind in zip(axes, (70, 40, 15), ("mostly noise", "half way", "almost clean")):
        t = torch.full((2,), step)
        x_t = toy2d.noise(x_0, t, eps)
        ways = {"the untuned reference sends it": ref(x_t, t, c)}
        ways |= {f"{name} sends it": ref(x_t, t, c) + asked(objective, ref, pairs, x_t, t, c)[0]
                 for name, objective in OBJECTIVES.items()}
        ways["the truth sends it"] = eps_exact(x_t, t, c, **CLEAN)
        axis.add_patch(plt.Circle(MODES[k], 2 * CLEAN["std"], color="0.85", zorder=0, label="the true mode of class c"))
        axis.plot(*MODES.T, "+", color="0.5", label="centres of all classes")
        axis.plot(*x_0_w, "^", color="gold", markeredgecolor="black", markersize=9, label="winner x_0_w, class c")
        axis.plot(*x_0_l, "v", color="gold", markeredgecolor="black", markersize=9, label="loser x_0_l, a neighbour")
        axis.plot(*x_t.T, "ko", label="their noisy states x_t")
        for (label, way), colour in zip(ways.items(), ("0.6", "C3", "C0", "C2")):
            to = (x_t - SIGMA[step] * way) / ALPHA[step]  # the clean point that this noise prediction stands for
            axis.quiver(*x_t.T, *(to - x_t).T, color=colour, label=label, angles="xy", scale_units="xy", scale=1,
                        width=0.007)
        axis.set(title=f"t = {step} of {T} ({kind})", aspect="equal", xlim=(MODES[k, 0] - 1.3, MODES[k, 0] + 1.3),
                 ylim=(MODES[k, 1] - 1.3, MODES[k, 1] + 1.3))
    figure.suptitle("Where a noisy state of class c is sent: samples bend D-DPO's way, DDSPO's is part of the true one")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    save_figure(figure, path)


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", default="figures/toy2d_why.png", help="the picture (default: %(default)s); fig1.png "
                        "is written beside it")
    args = parser.parse_args(argv)
    fig1 = os.path.join(os.path.dirname(args.out), "fig1.png")
    for path in (args.out, fig1):
        try_path(path)
    torch.set_num_threads(1)  # as in toy2d.py
    refs = {seed: toy2d.train_reference(seed) for seed in tqdm(toy2d.SEEDS, "references", leave=False)}
    draw_arrows(refs[2], 2, fig1)  # the seed that Fig. 2 shows
    means = {}
    for source, (name, n) in tqdm(list(itertools.product(SOURCES, LINES)), "lines", leave=False):
        means[source, (name, n)] = np.mean([measure(ref, seed, source, n, OBJECTIVES[name])
                                            for seed, ref in refs.items()], 0)  # (T, 4)
    for source in SOURCES:
        print(f"\nPairs {source}, {len(refs)} seeds; d is the mean given the state:\n")
        print(times_table({line: means[source, line] for line in LINES}))
    draw_ratios(means, args.out)


if __name__ == "__main__":
    main()
