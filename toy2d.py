"""Sec. 4.1 and Fig. 2 of DDSPO (arXiv 2512.23426): the losses of loss.py where the truth is known.

    python toy2d.py    six panels (figures/toy2d.png) and a table over five seeds, in half a minute of one core

Each class c is one mode of a 2D Gaussian mixture (a). The reference model is trained on noisy data (b): wider modes,
and some samples from a neighbouring class. It learns to generate just that (c). Each class gets N = 2 preference pairs,
and the same pairs tune the same reference with D-DPO (Eq. 4) (d), DSPO (e), which only the paper's second version has,
and DDSPO (Eq. 7) (f). As in Sec. 3.3 both samples of a pair come from the reference: x_0_w given c, x_0_l given a
neighbour c_minus. So a winner may lie in a neighbour's mode. D-DPO and DSPO learn from it all the same; DDSPO only
visits it, and asks the reference what to do there. The paper gives no numbers for its toy: those below are ours.
"""

import argparse
import copy
import math

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from lib.files import UserError
from lib.plots import markdown_table, plt, save_figure, try_path
from lib.processes import program
from loss import ddspo_loss, diffusion_dpo_loss, dspo_loss

# ---- the world (a) and the data (b)

K = 8  # classes, evenly on the unit circle; neighbours are 0.77 apart
ANGLE = torch.arange(K) * 2 * math.pi / K
MODES = torch.stack([ANGLE.cos(), ANGLE.sin()], 1)  # (K, 2)
CLEAN = dict(std=0.1, swap=0.0)  # the ground truth
NOISY = dict(std=0.25, swap=0.3)  # what the reference is trained on: 2.5 times as wide, 30 % from the two neighbours


def draw_data(c, rng, std, swap):
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
    return ALPHA.to(x_0.device)[t][..., None] * x_0 + SIGMA.to(x_0.device)[t][..., None] * eps


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
        wave = t[:, None] / T * math.pi * torch.arange(1, 9, device=t.device)  # (B, 8)
        return self.net(torch.cat([x_t, wave.cos(), wave.sin(), nn.functional.one_hot(c, K)], 1))


@torch.no_grad()
def ddim(model, c, x_T, steps=50):
    """Samples x_0 (B, 2) of the classes c (B,) from x_T (B, 2)."""
    x_t, times = x_T, torch.linspace(T - 1, 0, steps).round().long().tolist()
    for now, then in zip(times, times[1:] + [0]):  # the last x_t is not used
        eps = model(x_t, torch.full_like(c, now), c)
        x_0 = (x_t - SIGMA[now] * eps) / ALPHA[now]
        x_t = noise(x_0, then, eps)
    return x_0


# ---- the reference (c) and the pairs: always made on the CPU, so that the same seeds give the same on every device


def train_reference(seed, updates=1500, batch=256, lr=5e-3):
    """The reference, trained on noisy data by the plain diffusion loss."""
    model, rng = Denoiser(seed), torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        c, t = (torch.randint(high, (batch,), generator=rng) for high in (K, T))
        x_0, eps = draw_data(c, rng, **NOISY), torch.randn(batch, 2, generator=rng)
        loss = (model(noise(x_0, t, eps), t, c) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return model.requires_grad_(False)


def draw_pairs(ref, seed, n, source="apart"):
    """n pairs a class, the first n of 64: x_0_w and x_0_l (n K, 2), c and c_minus (n K,). The reference draws x_0_w
    given c and x_0_l given c_minus, each from its own x_T (source "apart") or both from one ("shared-noise", as
    build_pairs.py does); "clean" pairs are the ground truth's. A class's neighbours take turns as c_minus."""
    rng = torch.Generator().manual_seed(2000 + seed)
    c, i = torch.arange(K).repeat(64), torch.arange(64).repeat_interleave(K)  # (64 K,): pair i of class c
    side = (torch.randint(2, (K,), generator=rng)[c] + i) % 2  # chance says which comes first
    c_minus = (c + 1 - 2 * side) % K
    if source == "clean":
        x_0_w, x_0_l = draw_data(c, rng, **CLEAN), draw_data(c_minus, rng, **CLEAN)  # (64 K, 2)
    else:
        x_T_w, x_T_l = torch.randn(2, 64 * K, 2, generator=rng)
        x_0_w, x_0_l = ddim(ref, c, x_T_w), ddim(ref, c_minus, x_T_w if source == "shared-noise" else x_T_l)
    return [x[:n * K] for x in (x_0_w, x_0_l, c, c_minus)]


# ---- tuning (d), (e), (f), and two controls: is DDSPO more than guidance away from c_minus?


def pair_loss(objective, theta, ref, x_0_w, x_0_l, c, c_minus, t, eps, beta):
    """The loss of each pair of a batch: x_0_w, x_0_l and eps (B, 2), c, c_minus and t (B,) -> (B,)."""
    x_t_w, x_t_l = noise(x_0_w, t, eps), noise(x_0_l, t, eps)  # the same t and eps for both
    eps_theta_w, eps_theta_l = theta(x_t_w, t, c), theta(x_t_l, t, c)
    eps_ref_w, eps_ref_l = ref(x_t_w, t, c), ref(x_t_l, t, c)
    if objective == "diffusion-dpo":  # Eq. 4: the target is the noise, that is, the way to this very sample
        return diffusion_dpo_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, eps, eps, beta)[0]
    if objective == "dspo":  # with the same target
        return dspo_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, eps, eps, beta)[0]
    eps_ref_l_minus = ref(x_t_l, t, c_minus)
    if objective == "ddspo":  # Eq. 7: the target is what the reference says at this state
        return ddspo_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, eps_ref_l_minus, beta)[0]
    s, eps_ref_w_minus = beta, ref(x_t_w, t, c_minus)  # a control has a guidance scale s in place of beta
    loss_w = (eps_theta_w - (eps_ref_w_minus + s * (eps_ref_w - eps_ref_w_minus))).square().mean(1)
    loss_l = (eps_theta_l - (eps_ref_l_minus + s * (eps_ref_l - eps_ref_l_minus))).square().mean(1)
    return loss_w + loss_l if objective == "guidance" else loss_l  # at both states, or at the loser's only


def finetune(ref, pairs, seed, objective, beta, lr, updates=300, batch=128):
    """The seed fixes which pairs, which t and which eps each update sees: the same for every objective and setting."""
    theta = copy.deepcopy(ref).requires_grad_(True)
    optimizer = torch.optim.Adam(theta.parameters(), lr, fused=True)
    rng = torch.Generator().manual_seed(3000 + seed)
    for _ in range(updates):
        pick = torch.randint(len(pairs[0]), (batch,), generator=rng)
        t, eps = torch.randint(T, (batch,), generator=rng), torch.randn(batch, 2, generator=rng)
        pick, t, eps = (x.to(pairs[0].device) for x in (pick, t, eps))
        loss = pair_loss(objective, theta, ref, *(x[pick] for x in pairs), t, eps, beta)  # (batch,)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return theta


def sample_classes(model, device="cpu", per_class=500):
    """Samples of every class, for every model from the same x_T: (K, per_class, 2), on the CPU."""
    x_T = torch.randn(K * per_class, 2, generator=torch.Generator().manual_seed(0))
    c = torch.arange(K).repeat_interleave(per_class)
    return ddim(model, c.to(device), x_T.to(device)).view(K, per_class, 2).cpu()


def quality(samples):
    """samples (K, n, 2) -> the share nearest their own mode; the energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'|
    (unbiased) to the ground truth, mean over classes; the centres' mean shift."""
    n, c = samples.shape[1], torch.arange(K)[:, None].expand(samples.shape[:2])
    own = (torch.cdist(samples, MODES).argmin(-1) == c).float().mean()
    truth = draw_data(c, torch.Generator().manual_seed(1), **CLEAN)
    within = sum(torch.cdist(x, x).sum() / (K * n * (n - 1)) for x in (samples, truth))
    energy = 2 * torch.cdist(samples, truth).mean() - within
    shift = (samples.mean(1) - MODES).norm(dim=-1).mean()
    return [own.item(), energy.item(), shift.item()]


def quality_table(title, rows):
    """Mean and standard deviation over seeds of each score, as Markdown; rows {name: (seeds, 3)}."""
    head = [title, "nearest own mode (best 1)", "energy distance (best 0)", "centre shift (best 0)"]
    return markdown_table(head, [[name, *(f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in values.T)]
                                 for name, values in rows.items()])


# ---- Fig. 2

SEEDS = [0, 1, 2, 3, 4]
OBJECTIVES = {"D-DPO": "diffusion-dpo", "DSPO": "dspo", "DDSPO": "ddspo",
              "Guidance distilled": "guidance", "Guidance distilled at losers": "guidance-losers"}
SETTINGS = {  # (beta or s, lr) at N = 2: the best of studies/toy2d_sweep.py on other seeds, beta 0.1 or 1 being as good
    "apart": [(1, 5e-6), (10, 2.5e-6), (1, 1e-5), (50, 1e-5), (50, 1e-5)],
    "shared-noise": [(1, 1e-5), (10, 2.5e-6), (1, 1e-5), (50, 1e-5), (50, 1e-5)],
    "clean": [(1, 1e-5), (1, 2e-5), (1, 1e-5), (50, 1e-5), (50, 1e-5)]}


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--pairs", choices=SETTINGS, default="apart", help="own x_T each, one x_T, or the ground truth")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", default="figures/toy2d.png", help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if not dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())[args.device]:
        raise UserError(f"torch finds no {args.device} device here: leave out --device {args.device}.")
    try_path(args.out)
    torch.set_num_threads(1)  # the networks are too small to share, and on a busy machine threads wait for one another
    results = []  # of each seed: the samples of each model, and the pairs
    for seed in tqdm(SEEDS, "seeds", leave=False):
        ref = train_reference(seed)
        pairs = draw_pairs(ref, seed, 2, args.pairs)
        ref, on_device = ref.to(args.device), [x.to(args.device) for x in pairs]
        samples = {"Reference": sample_classes(ref, args.device)}
        for (name, objective), (beta, lr) in zip(OBJECTIVES.items(), SETTINGS[args.pairs]):
            samples[name] = sample_classes(finetune(ref, on_device, seed, objective, beta, lr), args.device)
        results.append((samples, pairs))
    scores = {name: np.array([quality(samples[name]) for samples, _ in results]) for name in samples}
    print(quality_table(f"N = 2, pairs {args.pairs}, {len(SEEDS)} seeds", scores))
    gain = scores["D-DPO"][:, 1] - scores["DDSPO"][:, 1]
    draw_figure(*results[gain.argsort()[len(SEEDS) // 2]], args.out)  # the seed with the median gain


def draw_figure(samples, pairs, path):
    """Fig. 2 from one seed's samples and pairs; it marks the pairs of the class whose winner lies farthest off."""
    classes, rng = torch.arange(K)[:, None].expand(K, 500), torch.Generator().manual_seed(0)
    panels = {"(a) Ground truth": draw_data(classes, rng, **CLEAN), "(b) Noisy data": draw_data(classes, rng, **NOISY)}
    panels |= {f"({letter}) {name}": samples[name] for letter, name in zip("cdef", samples)}
    x_0_w, x_0_l, c, _ = pairs
    marked = c[(x_0_w - MODES[c]).norm(dim=1).argmax()].item()
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.6), sharex=True, sharey=True, layout="constrained")
    for axis, (title, points) in zip(axes.flat, panels.items()):
        for k in range(K):
            axis.plot(*points[k].T, ".", color=plt.cm.hsv(k / K), markersize=1.2, alpha=0.5, rasterized=True)
        axis.plot(*MODES.T, "k+", markersize=5, label="true centre of a class (a colour each)")
        style = dict(color=plt.cm.hsv(marked / K), markeredgecolor="black", linestyle="none", markersize=7)
        if axis not in axes[0, :2]:
            axis.plot(*x_0_w[c == marked].T, "^", label="winners of one class", **style)
            axis.plot(*x_0_l[c == marked].T, "v", label="its losers", **style)
        axis.set(xlim=(-1.9, 1.9), ylim=(-1.9, 1.9), xticks=[-1, 0, 1], yticks=[-1, 0, 1], aspect="equal")
        axis.set_title(f"{title}: {quality(points)[0]:.0%} nearest their own +", fontsize=9)
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
