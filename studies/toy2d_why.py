"""Sec. 3.2 and Fig. 1 of DDSPO (arXiv 2512.23426) on the toy: does what each objective asks for point the right way?

    python -m studies.toy2d_why    figures/toy2d_why.png, figures/fig1.png, and the numbers as tables

The toy's true score is known. So at every state x_t of every t there is one correction that would make the reference
right, r = eps_exact - eps_ref, and one that an objective asks for: the way down its loss with respect to the
prediction, at theta = ref. Up to one factor, a pair asks for target_w - eps_ref at its winner's state and for
-(target_l - eps_ref) at its loser's. Several pairs lead to one state, and the student sees x_t, t and c only: it can
learn their mean d there and no more. The alignment of d with r, over the states of winners and losers that updates see,
is sum <d, r> / sqrt(sum |d|^2 sum |r|^2). It is 1 in the right direction, 0 across it, and below 0 away from it.

fig1.png is the paper's Fig. 1 on these numbers: where eps_ref, eps_ref + d and eps_exact send a few states.
"""

import argparse
import os

import torch
from tqdm import tqdm

import toy2d
from lib.plots import markdown_table, plt, save_figure, try_path
from lib.processes import program
from toy2d import ALPHA, CLEAN, MODES, SIGMA, K, T


def eps_exact(x_t, t, c, std, swap):
    """The exact noise prediction -sigma_t grad log p_t(x_t | c): x_t (..., 2), t and c (...) -> (..., 2). p_t has three
    Gaussians N(alpha_t mode, (alpha_t^2 std^2 + sigma_t^2) I) with the weights swap/2, 1 - swap and swap/2."""
    modes = MODES[(c[..., None] + torch.tensor([-1, 0, 1])) % K].to(x_t)  # (..., 3, 2)
    weight = torch.tensor([swap / 2, 1 - swap, swap / 2]).to(x_t)
    alpha, sigma = ALPHA[t][..., None].to(x_t), SIGMA[t][..., None].to(x_t)
    variance = alpha**2 * std**2 + sigma**2  # (..., 1)
    offset = x_t[..., None, :] - alpha[..., None] * modes  # (..., 3, 2)
    posterior = torch.softmax(weight.log() - offset.square().sum(-1) / (2 * variance), -1)  # which mode x_t came from
    return sigma * (posterior[..., None] * offset).sum(-2) / variance


def asked(objective, ref, pairs, x_t, t, c):
    """The mean d (B, 2) of what the pairs of class c ask for at x_t (B, 2), t and c (B,), from any winner or loser."""
    x_0_w, x_0_l, _, c_minus = (x.unflatten(0, (-1, K))[:, c] for x in pairs)  # (N, B, 2), c_minus (N, B)
    eps = (x_t - ALPHA[t][:, None] * torch.cat([x_0_w, x_0_l])) / SIGMA[t][:, None]  # what leads from an x_0 to x_t
    eps_ref, target_w, target_l = ref(x_t, t, c), *eps.chunk(2)  # (B, 2), and Eq. 4's targets (N, B, 2)
    if objective == "ddspo":  # Eq. 7
        following, previous = ref(x_t, t, (c + 1) % K), ref(x_t, t, (c - 1) % K)
        target_w, target_l = eps_ref, torch.where((c_minus == (c + 1) % K)[..., None], following, previous)
    asks = torch.cat([(target_w - eps_ref).expand_as(x_0_w), eps_ref - target_l])  # (2 N, B, 2)
    return (torch.softmax(-eps.square().sum(-1) / 2, 0)[..., None] * asks).sum(0)  # weighted by which x_0 led to x_t


def measure(refs, n, objective):
    """The alignment (T,) over 512 winners' and 512 losers' states a seed."""
    t, sums = torch.arange(T).repeat_interleave(512), 0
    for seed, ref in refs.items():
        pairs, rng = toy2d.draw_pairs(ref, seed, n), torch.Generator().manual_seed(4000 + seed)
        draws = [(torch.randint(n * K, (512,), generator=rng), torch.randn(512, 2, generator=rng)) for _ in range(T)]
        pick, eps = map(torch.cat, zip(*draws))  # (512 T,) and (512 T, 2)
        x_0_w, x_0_l, c, _ = (x[pick] for x in pairs)
        for x_0 in (x_0_w, x_0_l):
            x_t = toy2d.noise(x_0, t, eps)
            r, d = eps_exact(x_t, t, c, **CLEAN) - ref(x_t, t, c), asked(objective, ref, pairs, x_t, t, c)
            sums += torch.stack([(d * r).sum(1), d.square().sum(1), r.square().sum(1)]).view(3, T, 512).sum(2)
    return sums[0] / (sums[1] * sums[2]).sqrt()


# ---- the tables and the pictures

LINES = {("DDSPO", 2): "C0", ("DDSPO", 64): "navy", ("D-DPO", 1): "lightpink", ("D-DPO", 2): "C3",
         ("D-DPO", 16): "brown", ("D-DPO", 64): "black"}  # {(method, N): colour}


def draw_alignment(measured, path):
    """Prints and draws the alignment against t; measured {(method, N): the result of `measure`}."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    times, cells = [1, 5, 10, 20, 35, 50, 65, 80, 95], []
    for (name, n), alignment in measured.items():
        axis.plot(alignment, color=LINES[name, n], label=f"{name}, N = {n}")
        cells.append([f"{name}, N = {n}", *(f"{x:.2g}" for x in alignment[times].tolist())])
    axis.set(title="alignment with what is right", xlabel="t (0: almost clean, 99: almost noise)")
    axis.legend(fontsize=8)
    print(markdown_table(["alignment with what is right at t =", *times], cells))
    save_figure(figure, path)


def draw_arrows(ref, seed, path):
    """Fig. 1 of the paper on one pair of the toy: its winner's and its loser's state at three time steps."""
    pairs = toy2d.draw_pairs(ref, seed, 2)
    farthest = (pairs[0] - MODES[pairs[2]]).norm(dim=1).argmax()  # the winner farthest from its mode, as in Fig. 2
    x_0_w, x_0_l, k, _ = (x[farthest] for x in pairs)
    eps, c = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed)), k.expand(2)
    figure, axes = plt.subplots(1, 3, figsize=(12, 5.2), sharex=True, sharey=True, layout="constrained")
    for axis, step, kind in zip(axes, (70, 40, 15), ("mostly noise", "half way", "almost clean")):
        t = torch.full((2,), step)
        x_t = toy2d.noise(torch.stack([x_0_w, x_0_l]), t, eps)
        eps_ref = ref(x_t, t, c)
        ways = {"the untuned reference": (eps_ref, "0.6"),
                "D-DPO": (eps_ref + asked("diffusion-dpo", ref, pairs, x_t, t, c), "C3"),
                "DDSPO": (eps_ref + asked("ddspo", ref, pairs, x_t, t, c), "C0"),
                "the truth": (eps_exact(x_t, t, c, **CLEAN), "C2")}
        axis.add_patch(plt.Circle(MODES[k], 2 * CLEAN["std"], color="0.85", zorder=0, label="the true mode of class c"))
        axis.plot(*MODES.T, "+", color="0.5", label="centres of all classes")
        axis.plot(*x_0_w, "^", color="gold", markeredgecolor="black", markersize=9, label="winner x_0_w, class c")
        axis.plot(*x_0_l, "v", color="gold", markeredgecolor="black", markersize=9, label="loser x_0_l, a neighbour")
        axis.plot(*x_t.T, "ko", label="their noisy states x_t")
        for who, (way, colour) in ways.items():
            to = (x_t - SIGMA[step] * way) / ALPHA[step]  # the clean point that this noise prediction stands for
            axis.quiver(*x_t.T, *(to - x_t).T, color=colour, label=f"{who} sends it", angles="xy", scale_units="xy",
                        scale=1, width=0.007)
        axis.set(title=f"t = {step} of {T} ({kind})", aspect="equal", xlim=(MODES[k, 0] - 1.3, MODES[k, 0] + 1.3),
                 ylim=(MODES[k, 1] - 1.3, MODES[k, 1] + 1.3))
    figure.suptitle("Where a noisy state of class c is sent: samples bend D-DPO's way, DDSPO's is part of the true one")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    save_figure(figure, path)


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", default="figures/toy2d_why.png", help="(default: %(default)s; fig1.png beside it)")
    args = parser.parse_args(argv)
    try_path(args.out)
    torch.set_num_threads(1)  # as in toy2d.py
    refs = {seed: toy2d.train_reference(seed) for seed in tqdm(toy2d.SEEDS, "references", leave=False)}
    draw_arrows(refs[2], 2, os.path.join(os.path.dirname(args.out), "fig1.png"))  # of the seed that Fig. 2 shows
    measured = {(name, n): measure(refs, n, toy2d.OBJECTIVES[name]) for name, n in tqdm(LINES, "lines", leave=False)}
    draw_alignment(measured, args.out)


if __name__ == "__main__":
    main()
