"""Sec. 4.1 and Fig. 2 of DDSPO (arXiv 2512.23426): D-DPO against DDSPO where the truth is known.

    python toy2d.py            five panels (figures/toy2d.png) and a table over 5 seeds
    python toy2d.py --sweep    how the settings are chosen; both methods against N and against the number of updates

Each class c is one mode of a 2D Gaussian mixture (a). The data that the reference model sees is noisy (b): the modes
are wider and some samples come from a neighbouring class; so is, then, what the reference generates (c). Each class
gets N = 2 preference pairs, and the same pairs tune the same reference with D-DPO (Eq. 4) (d) and with DDSPO (e).

As in Sec. 3.3 both samples of a pair come from the reference itself: x_0_w given c, x_0_l given a neighbour c_minus. So
a winner may well lie in a neighbour's mode. D-DPO learns from it all the same; DDSPO only visits it, and asks the
reference's scores given c and c_minus what to do there (Eq. 7; with `--policies exact` the true scores, Eq. 6).

The paper gives no numbers for its toy: those below are ours. Everything runs on the CPU, one seed in one process.
"""

import argparse
import concurrent.futures
import copy
import functools
import itertools
import math
import multiprocessing
import operator
import os
import threading

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from lib.plots import plt, save_figure, try_path
from lib.processes import program
from loss import ddspo_loss, diffusion_dpo_loss, preference_loss

# ---- the world (a) and the data (b)

K = 8  # classes, evenly on the unit circle; neighbours are 0.77 apart
ANGLE = torch.arange(K) * 2 * math.pi / K
MODES = torch.stack([ANGLE.cos(), ANGLE.sin()], 1)  # (K, 2)
CLEAN = dict(std=0.1, swap=0.0)  # the ground truth
NOISY = dict(std=0.25, swap=0.3)  # what the reference is trained on: 2.5 times as wide, 30 % from the two neighbours


def draw(c, rng, std, swap):
    """x_0 ~ p(x_0 | c): (1 - swap) in mode c, swap / 2 in each neighbour. c: (...) -> (..., 2)."""
    u = torch.rand(c.shape, generator=rng)
    mode = (c + (u < swap).long() - 2 * (u < swap / 2).long()) % K  # c - 1 below swap/2, c + 1 below swap, else c
    return MODES[mode] + std * torch.randn(*c.shape, 2, generator=rng)


# ---- diffusion: x_t = alpha_t x_0 + sigma_t eps, t = 0 (almost clean) to T - 1 (almost noise), cosine schedule

T = 100
ALPHA_BAR = torch.cos((torch.arange(1, T + 1) / T + 0.008) / 1.008 * math.pi / 2).square() / math.cos(
    0.008 / 1.008 * math.pi / 2) ** 2
ALPHA = ALPHA_BAR.clamp(1e-4, 1).sqrt()
SIGMA = (1 - ALPHA**2).sqrt()


def noise(x_0, t, eps):
    """q(x_t | x_0): x_0 and eps (..., 2), t (...) -> x_t (..., 2)."""
    return ALPHA[t][..., None] * x_0 + SIGMA[t][..., None] * eps


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


class Denoiser(nn.Module):
    """eps_theta(x_t, t, c): x_t (B, 2), t and c (B,) -> (B, 2)."""

    def __init__(self, seed, width=128):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(2 + 16 + K, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                 nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))
        for layer in self.net[::2]:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t, t, c):
        wave = t[:, None] / T * math.pi * torch.arange(1, 9)  # (B, 8)
        return self.net(torch.cat([x_t, wave.cos(), wave.sin(), F.one_hot(c, K)], 1))


@torch.no_grad()
def sample(model, c, x_T, steps=50):
    """x_0 of classes c (B,) from x_T (B, 2), by DDIM."""
    x_t = x_T
    times = torch.linspace(T - 1, 0, steps).round().long().tolist()
    for now, then in zip(times, times[1:] + [None]):
        eps = model(x_t, torch.full_like(c, now), c)
        x_0 = (x_t - SIGMA[now] * eps) / ALPHA[now]
        if then is not None:
            x_t = noise(x_0, then, eps)
    return x_0


# ---- the reference (c), the pairs, and tuning with them (d), (e)


@functools.cache
def train_reference(seed, updates=1500, batch=256, lr=5e-3):
    """The reference, trained on noisy data by the plain diffusion loss."""
    model, rng = Denoiser(seed), torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        c, t = (torch.randint(high, (batch,), generator=rng) for high in (K, T))
        x_0, eps = draw(c, rng, **NOISY), torch.randn(batch, 2, generator=rng)
        loss = (model(noise(x_0, t, eps), t, c) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return model.requires_grad_(False)


def make_pairs(ref, seed, n, source="apart"):
    """n pairs a class, the first n of 64: x_0_w and x_0_l (n K, 2), c and c_minus (n K,).

    The reference draws x_0_w given c and x_0_l given c_minus, each from its own x_T (source "apart") or both from the
    same x_T ("shared-noise", what build_pairs.py does); "clean" pairs are the ground truth's. c_minus is one of the two
    neighbours of c: the first is drawn, and then they take turns.
    """
    rng = torch.Generator().manual_seed(2000 + seed)
    c = torch.arange(K).expand(64, K)
    side = (torch.randint(2, (K,), generator=rng) + torch.arange(64)[:, None]) % 2  # (64, K)
    c_minus = (c + 1 - 2 * side) % K
    if source == "clean":
        x_0_w, x_0_l = draw(c, rng, **CLEAN), draw(c_minus, rng, **CLEAN)  # (64, K, 2)
    else:
        x_T_w, x_T_l = torch.randn(2, 64, K, 2, generator=rng)
        if source == "shared-noise":
            x_T_l = x_T_w
        x_0_w = sample(ref, c.flatten(), x_T_w.flatten(0, 1)).view(64, K, 2)
        x_0_l = sample(ref, c_minus.flatten(), x_T_l.flatten(0, 1)).view(64, K, 2)
    return [x[:n].flatten(0, 1) for x in (x_0_w, x_0_l, c, c_minus)]


def step_loss(objective, theta, ref, x_0_w, x_0_l, c, c_minus, t, eps, beta):
    """The loss of each pair of a batch: x_0_w, x_0_l and eps (B, 2), c, c_minus and t (B,) -> (B,)."""
    x_t_w, x_t_l = noise(x_0_w, t, eps), noise(x_0_l, t, eps)  # the same t and eps for both
    predictions = theta(x_t_w, t, c), theta(x_t_l, t, c), ref(x_t_w, t, c), ref(x_t_l, t, c)
    if objective == "diffusion-dpo":  # Eq. 4: the target is the noise, that is, the way to this very sample
        loss, _ = diffusion_dpo_loss(*predictions, eps, eps, beta)
    elif objective == "ddspo":  # Eq. 7: the target is what the reference says at this state
        loss, _ = ddspo_loss(*predictions, ref(x_t_l, t, c_minus), beta)
    else:  # Eq. 6 with the true scores, which only a toy knows
        target_w, target_l = eps_exact(x_t_w, t, c, **CLEAN), eps_exact(x_t_l, t, c_minus, **CLEAN)
        loss, _ = preference_loss(*predictions, target_w, target_l, beta)
    return loss


def tune(ref, pairs, objective, seed, beta, lr, updates=300, times=(0, T), batch=128):
    """The seed fixes which pairs, which t and which eps each update sees: the same for every objective and setting."""
    theta = copy.deepcopy(ref).requires_grad_(True)
    optimizer = torch.optim.Adam(theta.parameters(), lr, fused=True)
    rng = torch.Generator().manual_seed(3000 + seed)
    for _ in range(updates):
        pick = torch.randint(len(pairs[0]), (batch,), generator=rng)
        t = torch.randint(*times, (batch,), generator=rng)
        eps = torch.randn(batch, 2, generator=rng)
        x_0_w, x_0_l, c, c_minus = (x[pick] for x in pairs)
        loss = step_loss(objective, theta, ref, x_0_w, x_0_l, c, c_minus, t, eps, beta)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return theta


# ---- scores


def sample_classes(model, per_class=500):
    """Samples of every class, for every model from the same x_T: (K, per_class, 2)."""
    x_T = torch.randn(K * per_class, 2, generator=torch.Generator().manual_seed(0))
    return sample(model, torch.arange(K).repeat_interleave(per_class), x_T).view(K, per_class, 2)


def scores(samples):
    """samples (K, n, 2) -> the share nearest their own mode; the energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'|
    (unbiased) to the ground truth, mean over classes; the centres' mean shift."""
    n, c = samples.shape[1], torch.arange(K)[:, None].expand(samples.shape[:2])
    own = (torch.cdist(samples, MODES).argmin(-1) == c).float().mean()
    truth = draw(c, torch.Generator().manual_seed(1), **CLEAN)
    within = [torch.cdist(x, x).sum() / (K * n * (n - 1)) for x in (samples, truth)]
    energy = 2 * torch.cdist(samples, truth).mean() - within[0] - within[1]
    shift = (samples.mean(1) - MODES).norm(dim=-1).mean()
    return [own.item(), energy.item(), shift.item()]


def run(seed, objective, n=2, source="apart", **setting):
    """One seed's scores, samples and pairs, numpy arrays, after tuning; objective None leaves the reference untuned."""
    ref = train_reference(seed)
    pairs = make_pairs(ref, seed, n, source)
    model = tune(ref, pairs, objective, seed, **setting) if objective else ref
    samples = sample_classes(model)
    return scores(samples), samples.numpy(), [x.numpy() for x in pairs]


def in_processes(jobs, chunk):
    """[job() for job in jobs], `chunk` jobs at a time, in one process a core with one thread each: the networks are too
    small to share among threads, and threads that wait for one another come to a stop on a busy machine."""
    spawn = multiprocessing.get_context("spawn")  # the one way that every system has
    workers = min(os.cpu_count(), math.ceil(len(jobs) / chunk))
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, begin_worker) as pool:
        return list(tqdm(pool.map(operator.call, jobs, chunksize=chunk), "runs", len(jobs), leave=False))


def begin_worker():
    """One thread to compute, and one that ends this process when the program is killed."""
    torch.set_num_threads(1)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def run_all(settings, seeds):
    """The scores of every setting, (settings, seeds, 3), and [[(samples, pairs) of each setting] of each seed]."""
    jobs = [functools.partial(run, seed, **setting) for seed in seeds for setting in settings]
    results = in_processes(jobs, min(len(settings), 10))  # a process trains the reference of a seed once
    of_seeds = [results[i:i + len(settings)] for i in range(0, len(results), len(settings))]
    values = np.array([[result[0] for result in of_seed] for of_seed in of_seeds])  # (seeds, settings, 3)
    return values.swapaxes(0, 1), [[result[1:] for result in of_seed] for of_seed in of_seeds]


# ---- the table and the figure

SEEDS, TUNING_SEEDS = [0, 1, 2, 3, 4], [100, 101, 102, 103, 104]  # settings are chosen on seeds that are not reported
GRID = dict(lr=[2.5e-6, 5e-6, 1e-5, 2e-5], beta=[0.1, 1, 10])
BETA = 1  # 0.1 is better by about 0.001 in energy distance, a tenth of the spread over seeds
LR = {  # at N = 2, by `--sweep`: each method's best of GRID
    "apart": {"D-DPO": 5e-6, "DDSPO": 1e-5},
    "shared-noise": {"D-DPO": 1e-5, "DDSPO": 1e-5},
    "clean": {"D-DPO": 1e-5, "DDSPO": 1e-5},
}


def print_table(title, rows):
    """Mean and standard deviation over seeds of each score, as Markdown; rows {name: (seeds, 3)}."""
    print(f"| {title} | nearest own mode (best 1) | energy distance (best 0) | centre shift (best 0) |")
    print("| --- | --- | --- | --- |")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in values.T) + " |")


def typical(d_dpo, ddspo):
    """The seed that the pictures show, an index: the one with the median gain in energy distance; (seeds, 3) each."""
    return np.argsort(d_dpo[:, 1] - ddspo[:, 1])[len(d_dpo) // 2]


def scatter(axis, title, samples, pairs=None):
    """One panel: samples (K, n, 2), a colour a class. Marks the pairs of one class, the one whose winner lies farthest
    from its mode."""
    for k in range(K):
        axis.plot(*samples[k].T, ".", color=plt.cm.hsv(k / K), markersize=1.2, alpha=0.5, rasterized=True)
    axis.plot(*MODES.T, "k+", markersize=5, markeredgewidth=0.8)
    axis.set(title=title, xlim=(-1.9, 1.9), ylim=(-1.9, 1.9), xticks=[-1, 0, 1], yticks=[-1, 0, 1], aspect="equal")
    if pairs is not None:
        x_0_w, x_0_l, c, _ = pairs
        k = c[np.linalg.norm(x_0_w - MODES.numpy()[c], axis=1).argmax()]
        style = dict(color=plt.cm.hsv(k / K), markeredgecolor="black", markeredgewidth=0.8, linestyle="none")
        axis.plot(*x_0_w[c == k].T, "^", label="winners", markersize=7, **style)
        axis.plot(*x_0_l[c == k].T, "v", label="losers", markersize=7, **style)


def figure_2(source, methods, path):
    """Fig. 2 of the paper (one seed) and the table (all seeds)."""
    settings = [dict(how, n=2, source=source, beta=BETA, lr=LR[source][name]) for name, how in methods.items()]
    values, results = run_all([dict(settings[0], objective=None), *settings], SEEDS)
    print_table(f"N = 2, pairs {source}, {len(SEEDS)} seeds", dict(zip(["Reference", *methods], values)))

    c, rng = torch.arange(K)[:, None].expand(K, 500), torch.Generator().manual_seed(0)
    figure, axes = plt.subplots(1, 5, figsize=(12, 2.7), sharex=True, sharey=True, layout="constrained")
    scatter(axes[0], "(a) Ground truth", draw(c, rng, **CLEAN))
    scatter(axes[1], "(b) Noisy data", draw(c, rng, **NOISY))
    of_seed = results[typical(*values[1:])]
    for axis, title, (samples, pairs) in zip(axes[2:], ["(c) Reference", "(d) D-DPO", "(e) DDSPO"], of_seed):
        scatter(axis, title, samples, pairs)
    axes[2].legend(loc="center", fontsize=7, title="one class's", title_fontsize=7)
    save_figure(figure, path)


# ---- how the settings are chosen, and what the number of pairs and of updates changes

COUNTS, UPDATES = [1, 2, 4, 16, 64], [75, 150, 300, 600, 1200]


def choose(methods):
    """{(source, N, method): its best setting}, by mean energy distance over TUNING_SEEDS. Tries every lr of GRID, for
    the figure's pairs also every beta, and prints all of it."""
    grid = {}
    for source, n, name in itertools.product(LR, COUNTS, methods):
        if source != "clean" or n == 2:
            betas = GRID["beta"] if (source, n) == ("apart", 2) else [BETA]
            grid[source, n, name] = [dict(methods[name], n=n, source=source, beta=beta, lr=lr)
                                     for beta in betas for lr in GRID["lr"]]
    values = iter(run_all(sum(grid.values(), []), TUNING_SEEDS)[0])
    best, rows = {}, {}
    for (source, n, name), settings in grid.items():
        tried = [next(values) for _ in settings]  # (seeds, 3) each
        first = np.argmin([of_seeds[:, 1].mean() for of_seeds in tried])
        best[source, n, name] = settings[first]
        for i, (setting, of_seeds) in enumerate(zip(settings, tried)):
            mark = " (best)" if i == first else ""
            rows[f"{source}, {n}, {name}, {setting['beta']:g}, {setting['lr']:g}{mark}"] = of_seeds
    print(f"The grid, {len(TUNING_SEEDS)} other seeds:")
    print_table("pairs, N, method, beta, lr", rows)
    return best


def sweep(methods, path):
    """Each method at its best against N, and both against the number of updates, at DDSPO's best for N = 2."""
    lines = choose(methods)  # {(source, what changes, method): setting}
    for source, updates, name in itertools.product(["apart", "shared-noise"], UPDATES, methods):
        lines[source, f"{updates} updates", name] = lines[source, 2, "DDSPO"] | methods[name] | dict(updates=updates)
    values, results = run_all([*lines.values(), dict(objective=None)], SEEDS)
    result = dict(zip([*lines, "Reference"], values))
    rows = {"Reference": result["Reference"]}
    for (source, change, name), how in lines.items():
        rows[f"{source}, {change}, {name}, {how['beta']:g}, {how['lr']:g}"] = result[source, change, name]
    print(f"\nEach method at its best, and after other numbers of updates, {len(SEEDS)} seeds:")
    print_table("pairs, N (or updates at N = 2), method, beta, lr", rows)

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.5), layout="constrained")
    after = [f"{updates} updates" for updates in UPDATES]
    draw_lines(axes[0], result, COUNTS, COUNTS, 0, "pairs per class N", "share nearest own mode")
    draw_lines(axes[1], result, COUNTS, COUNTS, 1, "pairs per class N", "energy distance to the truth")
    draw_lines(axes[2], result, UPDATES, after, 1, "updates at N = 2, DDSPO's setting", "energy distance to the truth")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    seed = typical(result["apart", 2, "D-DPO"], result["apart", 2, "DDSPO"])
    scatter(axes[3], "D-DPO at DDSPO's setting", *results[seed][list(lines).index(("apart", "300 updates", "D-DPO"))])
    save_figure(figure, path)


def draw_lines(axis, result, xs, changes, score, xlabel, ylabel):
    """Mean and standard deviation over seeds of one score against xs, a line a source and method."""
    for source, name in itertools.product(["apart", "shared-noise"], ["D-DPO", "DDSPO"]):
        y = np.stack([result[source, change, name][:, score] for change in changes])  # (xs, seeds)
        beside = 1.04 if source == "apart" else 0.96  # so that the bars do not hide one another
        axis.errorbar(np.array(xs) * beside, y.mean(1), y.std(1, ddof=1), label=f"{name}, {source}", capsize=2,
                      color="C3" if name == "D-DPO" else "C0", linestyle="-" if source == "apart" else "--")
    axis.set(xscale="log", xticks=xs, xticklabels=xs, xlabel=xlabel, ylabel=ylabel, yscale="log" if score else "linear")
    axis.xaxis.minorticks_off()
    axis.axhline(result["Reference"][:, score].mean(), color="grey", linestyle=":", label="Reference")


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--sweep", action="store_true", help="N and the number of updates instead of the figure")
    parser.add_argument("--pairs", choices=list(LR), help="the two samples of a pair are drawn by the reference, apart "
                        "(the default) or from one x_T, or are clean: drawn from the ground truth")
    parser.add_argument("--policies", choices=["reference", "exact"], default="reference",
                        help="DDSPO's winning and losing policies: the reference given c and c_minus, or the true ones")
    parser.add_argument("--out", help="the picture (default: figures/toy2d.png or figures/toy2d_sweep.png)")
    args = parser.parse_args(argv)
    if args.sweep and args.pairs:
        parser.error("--sweep compares the sources of pairs: leave out --pairs.")
    path = args.out or ("figures/toy2d_sweep.png" if args.sweep else "figures/toy2d.png")
    try_path(path)
    ddspo = "ddspo" if args.policies == "reference" else "exact"
    methods = {"D-DPO": dict(objective="diffusion-dpo"), "DDSPO": dict(objective=ddspo)}
    if args.sweep:
        sweep(methods, path)
    else:
        figure_2(args.pairs or "apart", methods, path)


if __name__ == "__main__":
    main()
