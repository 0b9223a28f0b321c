"""Sec. 4.1 and Fig. 2 of DDSPO (arXiv 2512.23426): D-DPO against DDSPO where the truth is known.

    python toy2d.py            five panels (figures/toy2d.png) and a table over 5 seeds
    python toy2d.py --sweep    both against the number of pairs N (figures/toy2d_sweep.png), every setting printed

Each class c is one mode of a 2D Gaussian mixture (a). The data that the reference model sees is noisy (b): the modes
are wider and some samples come from a neighbouring class; so is, then, what it generates (c). Each class now gets N = 2
preference pairs, x_0_w from class c and x_0_l from a neighbour c_minus, and the same pairs tune the same reference with
D-DPO (Eq. 4) (d) and with DDSPO (e). In DDSPO the winning and losing policies are the reference given c and c_minus
(Eq. 7, `--policies reference`) or, since this mixture's score is known, the true ones (Eq. 6, `--policies exact`).

The paper gives no numbers for its toy: those below are ours. A run's networks are small, and R of them (seeds, betas)
are trained at once, as one batched product, because one alone leaves the processor waiting for Python.
"""

import argparse
import itertools
import math
import os

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from loss import ddspo_loss, diffusion_dpo_loss, preference_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend that needs no screen must be chosen first)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ---- the world (a) and the data (b)

K = 8  # classes, evenly on the unit circle; neighbours are 0.77 apart
ANGLE = torch.arange(K) * 2 * math.pi / K
MODES = torch.stack([ANGLE.cos(), ANGLE.sin()], 1).to(DEVICE)  # (K, 2)
CLEAN = dict(std=0.1, swap=0.0)  # the ground truth
NOISY = dict(std=0.25, swap=0.3)  # what the reference is trained on: 2.5 times as wide, 30 % from the two neighbours


def draw(c, rng, std, swap):
    """x_0 ~ p(x_0 | c): (1 - swap) in mode c, swap / 2 in each neighbour. c: (...) -> (..., 2)."""
    u = torch.rand(c.shape, generator=rng).to(DEVICE)
    mode = (c + (u < swap).long() - 2 * (u < swap / 2).long()) % K  # c - 1 below swap/2, c + 1 below swap, else c
    return MODES[mode] + std * torch.randn(*c.shape, 2, generator=rng).to(DEVICE)


# ---- diffusion: x_t = alpha_t x_0 + sigma_t eps, t = 0 (almost clean) to T - 1 (almost noise), cosine schedule

T = 100
ALPHA_BAR = torch.cos((torch.arange(1, T + 1) / T + 0.008) / 1.008 * math.pi / 2).square() / math.cos(
    0.008 / 1.008 * math.pi / 2) ** 2
ALPHA = ALPHA_BAR.clamp(1e-4, 1).sqrt().to(DEVICE)
SIGMA = (1 - ALPHA**2).sqrt()


def noise(x_0, t, eps):
    """q(x_t | x_0): x_0 and eps (..., 2), t (...) -> x_t (..., 2)."""
    return ALPHA[t][..., None] * x_0 + SIGMA[t][..., None] * eps


def eps_exact(x_t, t, c, std, swap):
    """The exact noise prediction -sigma_t grad log p_t(x_t | c): x_t (..., 2), t and c (...) -> (..., 2).

    p_t(. | c) mixes three Gaussians N(alpha_t mode, (alpha_t^2 std^2 + sigma_t^2) I), weights swap/2, 1 - swap, swap/2.
    """
    modes = MODES[(c[..., None] + torch.tensor([-1, 0, 1], device=DEVICE)) % K].to(x_t)  # (..., 3, 2)
    weight = torch.tensor([swap / 2, 1 - swap, swap / 2], device=DEVICE).to(x_t)
    alpha, sigma = ALPHA[t][..., None].to(x_t), SIGMA[t][..., None].to(x_t)
    variance = alpha**2 * std**2 + sigma**2  # (..., 1)
    offset = x_t[..., None, :] - alpha[..., None] * modes  # (..., 3, 2)
    posterior = torch.softmax(weight.log() - offset.square().sum(-1) / (2 * variance), -1)  # which mode x_t came from
    return sigma * (posterior[..., None] * offset).sum(-2) / variance


class Denoisers(nn.Module):
    """eps_theta(x_t, t, c) of R independent networks: x_t (R, B, 2), t and c (R, B) -> (R, B, 2). A seed each."""

    def __init__(self, seeds, width=128):
        super().__init__()
        sizes = [2 + 16 + K, width, width, width, 2]
        rngs = [torch.Generator().manual_seed(s) for s in seeds]
        weight = [torch.stack([torch.randn(n, m, generator=r) / math.sqrt(n) for r in rngs])
                  for n, m in zip(sizes, sizes[1:])]
        self.weight = nn.ParameterList(weight)
        self.bias = nn.ParameterList([torch.zeros(len(seeds), 1, m) for m in sizes[1:]])
        self.to(DEVICE)

    def forward(self, x_t, t, c):
        wave = t[..., None] / T * math.pi * torch.arange(1, 9, device=DEVICE)
        h = torch.cat([x_t, wave.cos(), wave.sin(), F.one_hot(c, K)], -1)
        for layer, (weight, bias) in enumerate(zip(self.weight, self.bias)):
            h = torch.baddbmm(bias, h if layer == 0 else F.silu(h), weight)
        return h

    def repeat(self, times):
        """A new set of R * times networks: network r's copies are at r, r + R, r + 2R, ..."""
        copy = Denoisers([0] * times * len(self.bias[0]), self.bias[0].shape[-1])
        copy.load_state_dict({k: v.repeat(times, 1, 1) for k, v in self.state_dict().items()})
        return copy


@torch.no_grad()
def sample(model, per_class=500, steps=50):
    """Samples of every class from every network by DDIM, all from the same x_T: (R, K, per_class, 2)."""
    runs = len(model.bias[0])
    c = torch.arange(K, device=DEVICE).repeat_interleave(per_class).expand(runs, -1)
    x = torch.randn(K * per_class, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE).expand(runs, -1, -1)
    times = torch.linspace(T - 1, 0, steps).round().long().tolist()
    for now, then in zip(times, times[1:] + [None]):
        eps = model(x, torch.full_like(c, now), c)
        x_0 = (x - SIGMA[now] * eps) / ALPHA[now]
        x = x_0 if then is None else ALPHA[then] * x_0 + SIGMA[then] * eps
    return x.view(runs, K, per_class, 2)


# ---- the reference (c), the pairs, and tuning with them (d), (e)


def train_reference(seeds, updates=2000, batch=256, lr=3e-3):
    """One reference a seed, each on its own noisy data, by the plain diffusion loss."""
    model, rngs = Denoisers(seeds), [torch.Generator().manual_seed(1000 + s) for s in seeds]
    optimizer = torch.optim.Adam(model.parameters(), lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in tqdm(range(updates), "reference", leave=False):
        c, t = (torch.stack([torch.randint(n, (batch,), generator=r) for r in rngs]).to(DEVICE) for n in (K, T))
        x_0 = torch.stack([draw(c_, r, **NOISY) for c_, r in zip(c, rngs)])
        eps = torch.stack([torch.randn(batch, 2, generator=r) for r in rngs]).to(DEVICE)
        loss = (model(noise(x_0, t, eps), t, c) - eps).square().mean((1, 2)).sum()  # summed: the networks do not mix
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return model.requires_grad_(False)


def make_pairs(seed, n, neighbours="both"):
    """n pairs a class: x_0_w and x_0_l (K n, 2), c and c_minus (K n,). c_minus is one of c's two neighbours: the first
    is drawn and then they take turns ("both"), or each is drawn ("random"). The pairs for n are the first of any more.
    """
    rng = torch.Generator().manual_seed(2000 + seed)
    c, first = torch.arange(K, device=DEVICE), torch.randint(2, (K,), generator=rng)
    pairs = []
    for i in range(n):
        side = (first + i) % 2 if neighbours == "both" else torch.randint(2, (K,), generator=rng)
        c_minus = (c + 1 - 2 * side.to(DEVICE)) % K
        pairs.append((draw(c, rng, **CLEAN), draw(c_minus, rng, **CLEAN), c, c_minus))
    return [torch.cat(x) for x in zip(*pairs)]


def tune(reference, method, seeds, n, betas, lr, policies="reference", neighbours="both", updates=300, batch=128):
    """Tunes every seed's reference with every beta: networks in the order beta, seed. The seed fixes the pairs, and
    which of them, which t and which eps each update sees, so that all methods and settings see the same."""
    ref, theta = reference.repeat(len(betas)), reference.repeat(len(betas))
    optimizer = torch.optim.Adam(theta.parameters(), lr)
    rngs = [torch.Generator().manual_seed(3000 + s) for s in seeds]
    of_seeds = zip(*[make_pairs(s, n, neighbours) for s in seeds])
    pairs = [torch.stack(x).repeat(len(betas), *[1] * x[0].ndim) for x in of_seeds]
    beta = torch.tensor(betas, dtype=torch.float32, device=DEVICE).repeat_interleave(len(seeds) * batch)
    for _ in tqdm(range(updates), f"{method}, N = {n}", leave=False):
        pick, t = (torch.stack([torch.randint(high, (batch,), generator=r) for r in rngs]).to(DEVICE)
                   .repeat(len(betas), 1) for high in (K * n, T))
        eps = torch.stack([torch.randn(batch, 2, generator=r) for r in rngs]).to(DEVICE).repeat(len(betas), 1, 1)
        run = torch.arange(len(pick), device=DEVICE)[:, None]
        x_0_w, x_0_l, c, c_minus = (x[run, pick] for x in pairs)
        x_t_w, x_t_l = noise(x_0_w, t, eps), noise(x_0_l, t, eps)  # the same t and eps for both

        eps_theta_w, eps_theta_l = both(theta, [x_t_w, x_t_l], t, [c, c])
        eps_ref_w, eps_ref_l, eps_ref_l_minus = both(ref, [x_t_w, x_t_l, x_t_l], t, [c, c, c_minus])
        predictions = [x.reshape(-1, 2) for x in (eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l)]  # (R B, 2)
        if method == "diffusion-dpo":  # Eq. 4
            loss, _ = diffusion_dpo_loss(*predictions, eps.view(-1, 2), eps.view(-1, 2), beta)
        elif policies == "reference":  # Eq. 7
            loss, _ = ddspo_loss(*predictions, eps_ref_l_minus.reshape(-1, 2), beta)
        else:  # Eq. 6
            target_w, target_l = eps_exact(x_t_w, t, c, **CLEAN), eps_exact(x_t_l, t, c_minus, **CLEAN)
            loss, _ = preference_loss(*predictions, target_w.view(-1, 2), target_l.view(-1, 2), beta)
        optimizer.zero_grad()
        (loss.sum() / batch).backward()  # each network's mean loss, summed: the networks do not mix
        optimizer.step()
    return theta


def both(model, states, t, prompts):
    """The model's predictions at several states in one pass."""
    return model(torch.cat(states, 1), t.repeat(1, len(states)), torch.cat(prompts, 1)).chunk(len(states), 1)


# ---- scores, the table and the figure


def scores(samples):
    """samples (R, K, n, 2) -> three numpy arrays (R,): the share nearest their own mode; the energy distance
    2 E|X - Y| - E|X - X'| - E|Y - Y'| (unbiased) to the ground truth, mean over classes; the centres' mean shift."""
    runs, _, n, _ = samples.shape
    c = torch.arange(K, device=DEVICE)[:, None].expand(K, n)
    own = (torch.cdist(samples, MODES.expand(runs, 1, K, 2)).argmin(-1) == c).float().mean((1, 2))
    truth = draw(c, torch.Generator().manual_seed(1), **CLEAN).expand_as(samples)
    within = [torch.cdist(x, x).sum((2, 3)) / (n * (n - 1)) for x in (samples, truth)]
    energy = (2 * torch.cdist(samples, truth).mean((2, 3)) - within[0] - within[1]).mean(1)
    shift = (samples.mean(2) - MODES).norm(dim=-1).mean(1)
    return [x.cpu().numpy() for x in (own, energy, shift)]


def row(name, values):
    """A line of Markdown: the mean and the standard deviation over seeds of each score."""
    return f"| {name} | " + " | ".join(f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in values) + " |"


HEADER = ("| {} | nearest own mode ↑ | energy distance ↓ | centre shift ↓ |\n" + "| --- " * 4 + "|").format

METHODS = {"D-DPO": "diffusion-dpo", "DDSPO": "ddspo"}
GRID = dict(beta=[1, 4, 16, 64], lr=[5e-6, 1e-5, 2e-5])
BETA, LR = 1, 1e-5  # at N = 2, by `--sweep` (and `--sweep --policies exact`) the best of GRID for both methods
SEEDS, TUNING_SEEDS = [0, 1, 2, 3, 4], [100, 101, 102, 103, 104]  # settings are chosen on seeds that are not reported


def save(figure, path):
    """Writes a picture whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path + ".partial", dpi=200, bbox_inches="tight", format="png")
    os.replace(path + ".partial", path)
    print(f"wrote {path}")


def figure_2(policies, neighbours, path):
    """Fig. 2 of the paper (seed 0) and the table (all seeds)."""
    reference = train_reference(SEEDS)
    samples = {"Reference": sample(reference)}
    for name, method in METHODS.items():
        samples[name] = sample(tune(reference, method, SEEDS, 2, [BETA], LR, policies, neighbours))
    print(HEADER(f"N = 2, {len(SEEDS)} seeds"))
    for name, x in samples.items():
        print(row(name, scores(x)))

    c, rng = torch.arange(K, device=DEVICE)[:, None].expand(K, 500), torch.Generator().manual_seed(0)
    panels = {"(a) Ground truth": draw(c, rng, **CLEAN), "(b) Noisy data": draw(c, rng, **NOISY)}
    panels |= {f"({letter}) {name}": x[0] for letter, (name, x) in zip("cde", samples.items())}
    figure, axes = plt.subplots(1, 5, figsize=(12, 2.7), sharex=True, sharey=True, layout="constrained")
    for axis, (title, x) in zip(axes, panels.items()):
        for k in range(K):
            axis.plot(*x[k].cpu().T, ".", color=plt.cm.hsv(k / K), markersize=1.2, alpha=0.5, rasterized=True)
        axis.plot(*MODES.cpu().T, "k+", markersize=5, markeredgewidth=0.8)
        axis.set(title=title, xlim=(-1.9, 1.9), ylim=(-1.9, 1.9), xticks=[-1, 0, 1], yticks=[-1, 0, 1], aspect="equal")
    save(figure, path)


def sweep(policies, neighbours, path):
    """N = 1 to 16: for each N and method the best of GRID by mean energy distance on TUNING_SEEDS, shown on SEEDS."""
    tuning_reference, reference = train_reference(TUNING_SEEDS), train_reference(SEEDS)
    counts, result = [1, 2, 4, 8, 16], {}
    print(f"The grid, {len(TUNING_SEEDS)} other seeds:\n" + HEADER("N, method, beta, lr"))
    for n, (name, method) in tqdm(list(itertools.product(counts, METHODS.items())), "sweep"):
        grid = {}
        for lr in GRID["lr"]:
            model = tune(tuning_reference, method, TUNING_SEEDS, n, GRID["beta"], lr, policies, neighbours)
            of_betas = zip(*[v.reshape(-1, len(TUNING_SEEDS)) for v in scores(sample(model))])
            grid |= {(beta, lr): values for beta, values in zip(GRID["beta"], of_betas)}
        best = min(grid, key=lambda setting: grid[setting][1].mean())
        tqdm.write("\n".join(row(f"{n}, {name}, {b:g}, {lr:g}" + " (best)" * ((b, lr) == best), v)
                             for (b, lr), v in grid.items()))
        model = tune(reference, method, SEEDS, n, [best[0]], best[1], policies, neighbours)
        result[name, n] = best, scores(sample(model))

    start = scores(sample(reference))
    print(f"\nEach method at its best, {len(SEEDS)} seeds:\n" + HEADER("method, N, beta, lr"))
    print(row("Reference", start))
    for (name, n), ((beta, lr), values) in sorted(result.items()):
        print(row(f"{name}, {n}, {beta:g}, {lr:g}", values))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for i, (axis, label) in enumerate(zip(axes, ("share nearest own mode", "energy distance to the truth"))):
        axis.axhline(start[i].mean(), color="grey", linestyle=":", label="Reference")
        for name in METHODS:
            values = np.stack([result[name, n][1][i] for n in counts])  # (N, seeds)
            line, = axis.plot(counts, values.mean(1), marker="o", label=name)
            axis.fill_between(counts, values.min(1), values.max(1), color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(xscale="log", xticks=counts, xticklabels=counts, xlabel="pairs per class N", ylabel=label)
        axis.minorticks_off()
    axes[0].legend(title="mean, and range of 5 seeds")
    save(figure, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sweep", action="store_true", help="N in 1, 2, 4, 8, 16 instead of the figure at N = 2")
    parser.add_argument("--policies", choices=["reference", "exact"], default="reference",
                        help="DDSPO's winning and losing policies: the reference given c and c_minus, or the true ones")
    parser.add_argument("--neighbours", choices=["both", "random"], default="both",
                        help="a class's pairs take c_minus from its two neighbours in turn, or at random")
    parser.add_argument("--out", help="the picture (default: figures/toy2d.png or figures/toy2d_sweep.png)")
    args = parser.parse_args()
    if args.sweep:
        sweep(args.policies, args.neighbours, args.out or "figures/toy2d_sweep.png")
    else:
        figure_2(args.policies, args.neighbours, args.out or "figures/toy2d.png")
