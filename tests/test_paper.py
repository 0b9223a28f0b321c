"""docs/paper.md: a test for each of its statements, by numbers and a second computation, and that its map is true."""

import ast
import copy
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal

import loss as losses
import toy2d
import train
from lib import models, settings
from studies.toy2d_why import eps_exact

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "paper.md").read_text()
STATEMENTS = {int(n): text for n, text in re.findall(r"- \*\*S(\d+)\.\*\* (.*?)(?=\n\n|\n- |\Z)", TEXT, re.S)}


def says(number, *texts):
    """The statement has these words or numbers, however its lines are broken."""
    for text in texts:
        assert text in " ".join(STATEMENTS[number].split()), f"S{number} does not say {text}"


def f(u):
    return -torch.nn.functional.logsigmoid(u)


def draws(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, **tolerance):
    torch.testing.assert_close(torch.as_tensor(found).double(), torch.as_tensor(expected).double(), **tolerance)


def mean_is(samples, expected):
    """The mean of samples (n, ...) is the expected one: within five standard errors, which are small beside it."""
    error = samples.std(0) / len(samples) ** 0.5
    expected = torch.as_tensor(expected)
    assert ((samples.mean(0) - expected).abs() < 5 * error).all(), (samples.mean(0), expected, error)
    assert error.max() < 0.02 * expected.abs().max(), "too few samples to tell"


# ---- schedules: (alpha_t, sigma_t, alpha_t-1, sigma_t-1), of Stable Diffusion and of flow matching

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's
ALPHA_BAR = (1 - BETAS).cumprod(0)
SNR = ALPHA_BAR / (1 - ALPHA_BAR)
STEPS = [(ALPHA_BAR[t].sqrt().item(), (1 - ALPHA_BAR[t]).sqrt().item(), ALPHA_BAR[t - 1].sqrt().item(),
          (1 - ALPHA_BAR[t - 1]).sqrt().item()) for t in (1, 100, 500, 999)]
STEPS += [(1 - s, s, 1 - s_next, s_next) for s, s_next in ((0.1, 0.08), (0.5, 0.45), (0.95, 0.9))]
every_step = pytest.mark.parametrize("step", STEPS, ids=[f"vp{t}" for t in (1, 100, 500, 999)] + ["flow"] * 3)


def ddpm_s(step):
    """The standard deviation of q(x_t-1 | x_t, x_0), from the two variances of the noising itself."""
    alpha, sigma, alpha_next, sigma_next = step
    ratio = alpha / alpha_next
    added = sigma**2 - ratio**2 * sigma_next**2  # the variance of q(x_t | x_t-1)
    return math.sqrt(added * sigma_next**2 / sigma**2)


def mu(step, x_t, eps, s):
    """The mean of a step of DDPM or DDIM, as the page writes it."""
    alpha, sigma, alpha_next, sigma_next = step
    return alpha_next * (x_t - sigma * eps) / alpha + math.sqrt(sigma_next**2 - s**2) * eps


def kappa(step, s):
    return mu(step, 0.0, 0.0, s) - mu(step, 0.0, 1.0, s)


def omega(step, s):
    return kappa(step, s) ** 2 / (2 * s**2)


# ---- 1 and 2: rewards


def test_s1_the_best_model_of_eq_2_and_eq_3_is_the_reference_times_the_reward():
    beta, ref, r = 0.7, torch.softmax(draws(0, 6), 0), draws(1, 6)
    weight = ref * torch.exp(r / beta)
    best, log_z = weight / weight.sum(), weight.sum().log()

    def eq_2(p):
        return (p * r).sum() - beta * (p * (p / ref).log()).sum()
    close(eq_2(best), beta * log_z)
    for seed in range(20):
        other = torch.softmax(best.log() + 0.3 * draws(10 + seed, 6), 0)
        assert eq_2(other) < eq_2(best)
        close(eq_2(other), beta * log_z - beta * (other * (other / best).log()).sum())
    close(beta * (best / ref).log() + beta * log_z, r)
    logit = beta * (best / ref).log()
    close(logit[:, None] - logit, r[:, None] - r)  # Z cancels in every pair

    prefer = torch.sigmoid(r[:, None] - r)  # Eq. 1, for every pair
    theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def eq_3():
        optimizer.zero_grad()
        u = beta * (torch.log_softmax(theta, 0) - ref.log())
        value = (prefer * f(u[:, None] - u)).mean()
        value.backward()
        return value
    optimizer.step(eq_3)
    close(torch.softmax(theta.detach(), 0), best, rtol=1e-4, atol=1e-6)


def test_s2_eq_5_leaves_out_what_the_states_promise():
    beta, r = 0.7, draws(0, 4, 5)  # 4 states x_t, 5 next states x_t-1
    ref = torch.softmax(draws(1, 4, 5), 1)
    z = (ref * torch.exp(r / beta)).sum(1)
    best = ref * torch.exp(r / beta) / z[:, None]
    close(best.sum(1), torch.ones(4))
    u = beta * (best / ref).log()  # of one step
    for w in range(4):
        for l in range(4):
            missing = beta * z[w].log() - beta * z[l].log()
            close(r[w][:, None] - r[l], u[w][:, None] - u[l] + missing)
            assert (w == l) == (missing.abs() < 1e-9)  # in general it is not 0
    same = r - beta * z.log()[:, None]  # rewards for which all states promise the same
    close((ref * torch.exp(same / beta)).sum(1), torch.ones(4))


# ---- 3: from Eq. 5 to Eq. 6


def steps_of_a_policy(spread):
    """Log ratios u (states, steps) on Gaussian steps in one dimension, weighted by a fine grid of p_star (steps,)."""
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-z**2 / 2)
    weight, s, beta = weight / weight.sum(), 0.4, 1.5
    means = {who: draws(k, 12, 1) for k, who in enumerate(("star", "ref", "away"))}
    theta = means["ref"] + spread * means["away"]
    x = means["star"] + s * z  # (states, steps)
    return beta * (Normal(theta, s).log_prob(x) - Normal(means["ref"], s).log_prob(x)), weight


def test_s3_eq_6_is_below_eq_5_and_above_the_loss_on_whole_paths():
    u, weight = steps_of_a_policy(spread=0.5)
    inside = u @ weight  # (states,): the mean over x_t-1
    on_paths, eq_6, eq_5 = f(inside.mean()), f(inside).mean(), (f(u) @ weight).mean()
    assert on_paths + 0.05 < eq_6 and eq_6 + 0.05 < eq_5
    says(3, "*lower* bound of Eq. 5", "upper bound of the loss on whole paths")


def test_s4_at_the_reference_both_have_one_value_and_one_gradient_and_then_differ_by_an_eighth_of_the_variance():
    for spread in (0.003, 0.01):
        u, weight = steps_of_a_policy(spread)
        gap = f(u) @ weight - f(u @ weight)  # (states,)
        variance = (u - (u @ weight)[:, None]).square() @ weight
        close(gap / variance, torch.full((12,), 1 / 8), rtol=0.02, atol=0)
    spread = torch.zeros((), dtype=torch.float64, requires_grad=True)
    u, weight = steps_of_a_policy(spread)
    slopes = {name: torch.autograd.grad(value, spread, retain_graph=True)[0] for name, value in dict(
        eq_5=(f(u) @ weight).sum(), eq_6=f(u @ weight).sum(), mean=(u @ weight).sum()).items()}
    close(f(u.detach()), torch.full_like(u, math.log(2)))
    close(slopes["eq_5"], slopes["eq_6"], rtol=1e-9, atol=0)
    close(slopes["eq_6"], -slopes["mean"] / 2, rtol=1e-9, atol=0)
    assert slopes["mean"].abs() > 1


@pytest.mark.parametrize("p_star", ["its own variance", "another shape"])
def test_s5_the_mean_log_ratio_is_a_difference_of_squared_distances(p_star):
    star, theta, ref = draws(0, 3, 3)
    z = draws(1, 400_000, 3)
    noise = 1.7 * z if p_star == "its own variance" else z.square() - 1
    x = star + noise
    ratio = (Normal(theta, 0.6).log_prob(x) - Normal(ref, 0.6).log_prob(x)).sum(1)
    mean_is(ratio, -((star - theta).square().sum() - (star - ref).square().sum()) / (2 * 0.6**2))


@every_step
@pytest.mark.parametrize("share", [0.3, 1.0])  # of DDPM's variance: between DDIM and DDPM
def test_s6_a_step_keeps_the_marginal_and_its_log_ratio_is_omega_times_distances_of_noises(step, share):
    alpha, sigma, alpha_next, sigma_next = step
    s = share * ddpm_s(step)
    x_0, eps, z = 0.8, draws(0, 200_000), draws(1, 200_000)
    x_next = mu(step, alpha * x_0 + sigma * eps, eps, s) + s * z
    assert x_next.mean() == pytest.approx(alpha_next * x_0, abs=5 * sigma_next / 200_000**0.5)
    assert x_next.std() == pytest.approx(sigma_next, rel=0.01)

    x_t, (star, theta, ref) = draws(2, 3), draws(3, 3, 3)
    size = s / kappa(step, s)  # noises whose distance makes steps that can be told apart, and no more
    x = mu(step, x_t, size * star, s) + s * draws(4, 200_000, 3)
    ratio = (Normal(mu(step, x_t, size * theta, s), s).log_prob(x)
             - Normal(mu(step, x_t, size * ref, s), s).log_prob(x)).sum(1)
    formula = alpha_next * sigma / alpha - math.sqrt(sigma_next**2 - s**2)  # the page's kappa
    distances = size**2 * ((star - theta).square().sum() - (star - ref).square().sum())
    mean_is(ratio, -formula**2 / (2 * s**2) * distances)


def test_s6_the_logit_of_loss_py_is_that_of_eq_5_s_means():
    step, beta = STEPS[2], 0.01
    s = ddpm_s(step)
    x_t = {"w": draws(1, 8, 4), "l": draws(2, 8, 4)}
    eps = {(who, side): draws(k, 8, 4) for k, (who, side) in
           enumerate((who, side) for who in ("star", "theta", "ref") for side in "wl")}
    ratio = {side: -sum(sign * (mu(step, x_t[side], eps["star", side], s) - mu(step, x_t[side], eps[who, side], s))
                        .square().sum(1) for who, sign in (("theta", 1), ("ref", -1))) / (2 * s**2) for side in "wl"}
    value, info = losses.preference_loss(*(eps[who, side] for who in ("theta", "ref", "star") for side in "wl"),
                                         beta=beta * omega(step, s) * 2 * 4)  # mean over 4 numbers, and beta / 2
    close(info["logit"], beta * (ratio["w"] - ratio["l"]), rtol=1e-9, atol=0)
    close(value, f(beta * (ratio["w"] - ratio["l"])), rtol=1e-9, atol=0)


def test_s7_ddpm_s_omega_is_half_the_step_of_the_snr_the_least_of_all_and_not_constant():
    for step in STEPS:
        alpha, sigma, alpha_next, sigma_next = step
        snr, snr_next = (alpha / sigma) ** 2, (alpha_next / sigma_next) ** 2
        s = ddpm_s(step)
        assert s**2 == pytest.approx(sigma_next**2 * (1 - snr / snr_next), rel=1e-9)
        assert omega(step, s) == pytest.approx((snr_next / snr - 1) / 2, rel=1e-6)
        for other in (0.05, 0.5, 0.9, 0.99):
            assert omega(step, other * s) > omega(step, s)
            assert omega(step, s + other * (sigma_next - s)) > omega(step, s)
    weights = (SNR[:-1] / SNR[1:] - 1) / 2  # at t = 1, 2, ...
    late = weights[99:]  # from t = 100 on
    says(7, f"{late.min():.4f} to {late.max():.4f} from $`t = 100`$ on", f"rises to {weights[0]:.2f} at $`t = 1`$")
    assert weights.argmax() == 0 and weights[:99].min() > late.max()


def test_s7_ddpm_s_step_is_that_of_diffusers():
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)
    scheduler.set_timesteps(1000)
    x_t, eps = draws(0, 1, 2), draws(1, 1, 2)
    for t, step in zip((1, 100, 500, 999), STEPS):
        for eta in (0.4, 1.0):  # eta = 1 is DDPM
            theirs = scheduler.step(eps, t, x_t, eta=eta, variance_noise=torch.zeros_like(x_t)).prev_sample
            close(mu(step, x_t, eps, eta * ddpm_s(step)), theirs, rtol=1e-3, atol=1e-5)
        assert scheduler._get_variance(t, t - 1).sqrt().item() == pytest.approx(ddpm_s(step), rel=1e-2)


def test_s8_another_sampler_has_a_constant_omega_and_ddim_has_none():
    wanted = 1.01 * max(omega(step, ddpm_s(step)) for step in STEPS)
    for step in STEPS:
        sizes = torch.linspace(1e-4, 1, 2000, dtype=torch.float64) * ddpm_s(step)
        values = torch.tensor([omega(step, s.item()) for s in sizes])
        assert (values.diff() < 0).all() and values[0] > wanted > values[-1]  # so exactly one s_t has the wanted one
        assert omega(step, 1e-6 * ddpm_s(step)) > 1e6 * omega(step, ddpm_s(step))
    ddim = [kappa(step, 0.0) ** 2 for step in STEPS[:4]]
    assert max(ddim) > 10 * min(ddim)


def test_s9_in_flow_matching_equal_steps_have_one_omega():
    x_t, v, s = draws(0, 5), draws(1, 2, 5), 0.1

    def euler(sigma, sigma_next, v):  # by the predicted image and noise, as S6's step with s_t = 0 for the mean
        x_0, eps = x_t - sigma * v, x_t + (1 - sigma) * v
        return (1 - sigma_next) * x_0 + sigma_next * eps
    for sigma in (0.1, 0.5, 0.9):
        close(euler(sigma, sigma - 0.05, v[0]), x_t - 0.05 * v[0])
        distance = (euler(sigma, sigma - 0.05, v[0]) - euler(sigma, sigma - 0.05, v[1])).square() / (2 * s**2)
        close(distance, 0.05**2 / (2 * s**2) * (v[0] - v[1]).square())
    sana = object.__new__(models.Sana)
    sana.num_train_timesteps, sana.shift = 1000, 3.0
    steps = sana.sigma(torch.arange(1000)).flatten().double().diff()
    says(9, f"from {steps[0]:.4f} near the image to {steps[-1]:.5f} near the noise")


# ---- 4: Eq. 4


@every_step
def test_s10_bayes_rule_gives_s6_s_step_with_the_noise_in_x_t(step):
    alpha, sigma, alpha_next, sigma_next = step
    x_0, eps = 0.6, 1.3
    x_t, ratio = alpha * x_0 + sigma * eps, alpha / alpha_next
    centre, width = mu(step, x_t, eps, ddpm_s(step)), ddpm_s(step)
    x = centre + width * torch.linspace(-9, 9, 100_001, dtype=torch.float64)
    added = math.sqrt(sigma**2 - ratio**2 * sigma_next**2)
    log_p = Normal(alpha_next * x_0, sigma_next).log_prob(x) + Normal(ratio * x, added).log_prob(torch.tensor(x_t))
    p = torch.softmax(log_p, 0)  # q(x_t-1 | x_t, x_0) on a grid, from q(x_t | x_t-1) q(x_t-1 | x_0)
    mean = (p * x).sum()
    assert mean == pytest.approx(centre, abs=1e-3 * width)
    assert (p * (x - mean).square()).sum().sqrt() == pytest.approx(width, rel=1e-3)
    other = mu(step, x_t, eps + 0.1 * width / kappa(step, width), width)  # another noise has another mean
    assert abs(mean - other) > 0.05 * width


def test_s10_eq_4_is_eq_6_with_the_noise_as_target():
    x = [draws(k, 6, 5) for k in range(6)]
    close(losses.diffusion_dpo_loss(*x, 3.0)[0], losses.preference_loss(*x[:4], target_w=x[4], target_l=x[5], beta=3.0)[0])


def test_s11_the_noise_targets_of_many_images_average_to_the_score_and_those_of_few_do_not():
    t, c = torch.tensor(30), torch.tensor(2)
    alpha, sigma = toy2d.ALPHA[t].double(), toy2d.SIGMA[t].double()
    images = toy2d.draw_data(c.expand(400_000), torch.Generator().manual_seed(0), **toy2d.NOISY).double()
    x_t = alpha * images[7] + sigma * draws(1, 2)
    exact = eps_exact(x_t, t, c, **toy2d.NOISY)

    def mean_target(x_0):
        eps = (x_t - alpha * x_0) / sigma  # the noise that leads from x_0 to x_t
        return (torch.softmax(-eps.square().sum(1) / 2, 0)[:, None] * eps).sum(0)
    assert (mean_target(images) - exact).norm() < 0.02 * exact.norm()
    few = torch.stack([mean_target(images[2 * k:2 * k + 2]) for k in range(200)])
    assert (few - exact).norm(dim=1).median() > 0.2 * exact.norm()

    at = x_t.clone().requires_grad_()  # -sigma grad log q by autograd, from a second set of images
    other = toy2d.draw_data(c.expand(400_000), torch.Generator().manual_seed(5), **toy2d.NOISY).double()
    log_q = torch.logsumexp(-(at - alpha * other).square().sum(1) / (2 * sigma**2), 0)
    score, = torch.autograd.grad(log_q, at)
    assert (-sigma * score - exact).norm() < 0.02 * exact.norm()


# ---- 5: Eq. 7


@pytest.fixture(scope="module")
def world():
    """A short-trained reference of the toy in float64, and what an update sees: (x_0_w, x_0_l, c, c_minus, t, eps)."""
    ref = toy2d.train_reference(0, updates=300)
    rng = torch.Generator().manual_seed(1)
    pairs = toy2d.draw_pairs(ref, 0, 4)
    pick = torch.randint(len(pairs[0]), (512,), generator=rng)
    x_0_w, x_0_l, c, c_minus = (x[pick] for x in pairs)
    return ref, (x_0_w, x_0_l, c, c_minus, torch.randint(toy2d.T, (512,), generator=rng),
                 torch.randn(512, 2, generator=rng))


def gradient(loss, theta):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(theta.parameters()))])


class Plain:
    """The least that train.step_loss asks of a model; predictions are a function of the state and of c."""

    def noise(self, x_0, t, eps):
        return x_0 + eps

    def weight(self, t):
        return torch.ones(len(t))

    def predict(self, net, x_t, t, c):
        return net(x_t, c["prompt"])


def test_s12_the_winner_starts_with_value_and_gradient_0_and_three_passes_are_enough():
    seen = []

    def ref(x_t, c):
        seen.extend((tuple(x.flatten().tolist()), y.item()) for x, y in zip(x_t, c))
        return x_t * (1 + c[:, None, None, None])
    scale = torch.ones((), requires_grad=True)
    x_0_w, x_0_l, eps = draws(0, 3, 5, 1, 2, 2).float()
    c, c_minus = (dict(prompt=torch.full((5,), value)) for value in (2.0, 3.0))
    policies = dict(theta=lambda x_t, c: scale * x_t * (1 + c[:, None, None, None]), ref=ref)
    value, info = train.step_loss(Plain(), policies, c, c_minus, x_0_w, x_0_l, torch.zeros(5, dtype=torch.long), eps,
                                  "ddspo", 7.0)
    states = [(tuple(x.flatten().tolist()), y) for x_0, y in ((x_0_w, 2), (x_0_l, 2), (x_0_l, 3)) for x in x_0 + eps]
    assert sorted(seen) == sorted(states)  # three passes a pair, and which
    assert (info["winner"] == 0).all() and value[0].item() == pytest.approx(math.log(2), rel=1e-6)

    eps_w, eps_l, eps_l_minus = draws(1, 3, 4, 6)
    theta_w = eps_w.clone().requires_grad_()
    first, = torch.autograd.grad(losses.ddspo_loss(theta_w, eps_l, eps_w, eps_l, eps_l_minus, 7.0)[0].sum(), theta_w)
    assert (first == 0).all()
    moved = eps_w + 0.1
    logit = losses.ddspo_loss(moved, eps_l, eps_w, eps_l, eps_l_minus, 7.0)[1]["logit"]
    close(logit, torch.full((4,), -7.0 / 2 * 0.1**2), rtol=1e-6, atol=0)  # a leash: it lowers the logit


@pytest.mark.parametrize("s", [1.5, 3.0, 7.5])
def test_s13_the_first_gradient_of_eq_7_is_that_of_distilled_guidance(world, s):
    ref, update = world
    ref, theta, beta = copy.deepcopy(ref).double(), copy.deepcopy(ref).double().requires_grad_(True), 5.0
    x_0_w, x_0_l, c, c_minus, t, eps = update
    x_t_w, x_t_l = (toy2d.noise(x_0, t, eps).double() for x_0 in (x_0_w, x_0_l))
    ref_w, ref_l, ref_l_minus = ref(x_t_w, t, c), ref(x_t_l, t, c), ref(x_t_l, t, c_minus)

    def first_gradient(loss_function, *targets):
        return gradient(loss_function(theta(x_t_w, t, c), theta(x_t_l, t, c), ref_w, ref_l, *targets, beta)[0].mean(), theta)
    first = first_gradient(losses.ddspo_loss, ref_l_minus)
    guided = ref_l_minus + s * (ref_l - ref_l_minus)
    regression = gradient(((theta(x_t_l, t, c) - guided).square().sum(1) / (2 * 2)).mean(), theta)  # D = 2
    close(first, beta / (2 * (s - 1)) * regression, rtol=1e-6, atol=1e-9)
    assert first.norm() > 0.01
    d_dpo = first_gradient(losses.diffusion_dpo_loss, eps.double(), eps.double())
    assert torch.cosine_similarity(d_dpo, first, 0) < 0.9  # it starts elsewhere


def test_s14_the_leash_holds_winners_only_and_where_the_states_are_one_there_is_none():
    beta, count = 3.0, 7
    ref_w, ref_l, ref_l_minus, delta_w, delta_l = draws(0, 5, 6, count)
    d = ref_l - ref_l_minus

    def logit(delta_w, delta_l, ref_w=ref_w):
        return losses.ddspo_loss(ref_w + delta_w, ref_l + delta_l, ref_w, ref_l, ref_l_minus, beta)[1]["logit"]
    bracket = delta_w.square().sum(1) - delta_l.square().sum(1) - 2 * (delta_l * d).sum(1)
    close(logit(delta_w, delta_l), -beta / (2 * count) * bracket)
    for direction in (d, -d, delta_l):  # the loss falls to 0, however the student runs away at the loser's state
        assert f(logit(0 * d, 100 * direction)).max() < 1e-6
    assert (f(logit(100 * d, 0 * d)) > 100).all()  # at the winner's it grows without bound
    same = logit(delta_l, delta_l, ref_w=ref_l)  # one state, so that one prediction moves
    close(same, beta / count * (delta_l * d).sum(1))
    close(logit(10 * delta_l, 10 * delta_l, ref_w=ref_l), 10 * same)  # a straight line: no minimum


def test_s15_one_noise_for_both_changes_no_mean_gradient_and_lowers_the_variance_of_eq_4(world):
    ref, update = world
    x_0_w, x_0_l, c, c_minus, t, _ = (x[:128] for x in update)
    theta = copy.deepcopy(ref).requires_grad_(True)
    eps = draws(3, 2, 150, 128, 2).float()

    def first(objective, shared, k):
        states = [toy2d.noise(x_0, t, eps[0 if shared else side, k]) for side, x_0 in enumerate((x_0_w, x_0_l))]
        predictions = [net(x_t, t, c) for net in (theta, ref) for x_t in states]
        if objective == "ddspo":
            value = losses.ddspo_loss(*predictions, ref(states[1], t, c_minus), 1.0)[0]
        else:
            value = losses.diffusion_dpo_loss(*predictions, eps[0, k], eps[0 if shared else 1, k], 1.0)[0]
        return gradient(value.mean(), theta)
    found = {shared: torch.stack([first("diffusion-dpo", shared, k) for k in range(150)]) for shared in (True, False)}
    variance = {shared: x.var(0).sum() for shared, x in found.items()}
    assert 0.18 < variance[True] / variance[False] < 0.35
    says(15, "on the toy, with about a quarter of the variance")
    means = {shared: x.mean(0) for shared, x in found.items()}
    error = ((variance[True] + variance[False]) / 150).sqrt()  # of the difference of the means, its length
    assert (means[True] - means[False]).norm() < 2 * error < 0.5 * means[True].norm()
    x_t_l = toy2d.noise(x_0_l, t, eps[0, 0])  # Eq. 7's gradient at the start: the loser's, whatever the winner's noise
    for k in (1, 2):
        x_t_w = toy2d.noise(x_0_w, t, eps[1, k])
        value = losses.ddspo_loss(theta(x_t_w, t, c), theta(x_t_l, t, c), ref(x_t_w, t, c), ref(x_t_l, t, c),
                                  ref(x_t_l, t, c_minus), 1.0)[0]
        torch.testing.assert_close(gradient(value.mean(), theta), first("ddspo", True, 0), rtol=1e-3, atol=1e-7)


# ---- 6: beta


def test_s16_the_code_s_beta_and_that_of_sums():
    x = [draws(k, 5, 4, 3, 2) for k in range(6)]
    theta_w, theta_l, ref_w, ref_l, target_w, target_l = x

    def squares(a, b):
        return (a - b).square().flatten(1).sum(1)
    bracket = squares(target_w, theta_w) - squares(target_w, ref_w) - squares(target_l, theta_l) + squares(target_l, ref_l)
    close(losses.preference_loss(*x, 3.0)[0], torch.log1p(torch.exp(3.0 / (2 * 24) * bracket)))

    latents = {"SD-1.x at 512 pixels": ("sd14", 4, 512 // 8), "SDXL at 1024": ("sdxl", 4, 1024 // 8),
               "SANA at 1024, distances of v": ("sana", 32, 1024 // 32),
               "SD3 at 1024, distances of x₀": ("sd3", 16, 1024 // 8)}
    rows = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in TEXT.splitlines() if " × " in line)}
    assert rows.keys() == latents.keys()
    for name, (preset, channels, side) in latents.items():
        count, beta = channels * side * side, settings.EXPERIMENTS[preset, "alignment", "ddspo"]["beta"]
        assert rows[name] == [f"{channels} × {side} × {side}", f"{count}", f"{beta}", f"{beta / (2 * count):.3g}"]
    weights = (SNR[:-1] / SNR[1:] - 1) / 2
    of_eq_2 = 16000 / (2 * 4 * 64 * 64) / weights
    says(16, f"{of_eq_2[0]:.2f} at $`t = 1`$", f"{of_eq_2[499]:.0f} at $`t = 500`$")


# ---- 7: DSPO and velocities


def test_s17_dspo_with_the_reference_as_winning_policy_does_not_start():
    ref_w, ref_l, ref_l_minus, away, noise = draws(0, 5, 6, 8)
    for beta in (0.001, 1.0, 5000.0):
        for target, starts in ((ref_w.clone(), False), (noise, True)):
            theta_w, theta_l = ref_w.clone().requires_grad_(), ref_l.clone().requires_grad_()
            value = losses.dspo_loss(theta_w, theta_l, ref_w, ref_l, target, ref_l_minus, beta)[0]
            gradients = torch.autograd.grad(value.sum(), [theta_w, theta_l])
            assert ((value > 0).all(), (gradients[0] != 0).any()) == (starts, starts)
        value, info = losses.dspo_loss(ref_w + away, ref_l, ref_w, ref_l, ref_w.clone(), ref_l_minus, beta)
        factor = 1 - beta + beta * torch.sigmoid(info["logit"])
        close(value, factor**2 * away.square().mean(1))
        plain = (ref_w + away - noise) - (beta * (1 - torch.sigmoid(info["logit"])))[:, None] * away
        logit = losses.preference_loss(ref_w + away, ref_l, ref_w, ref_l, noise, ref_l_minus, beta)[1]["logit"]
        plain = (ref_w + away - noise) - (beta * torch.sigmoid(-logit))[:, None] * away
        close(losses.dspo_loss(ref_w + away, ref_l, ref_w, ref_l, noise, ref_l_minus, beta)[0], plain.square().mean(1))
    with pytest.raises(ValueError, match="DSPO"):
        losses.dspo_loss(ref_w, ref_l, ref_w, ref_l, ref_w, ref_l_minus, 1.0)


def family(name):
    """(the model, alpha_t, sigma_t) of a family at t (B,), without its networks."""
    t = torch.tensor([5, 300, 800])
    if name == "sd2":
        model = object.__new__(models.StableDiffusion)
        model.prediction_type, model.alpha_bar = "v_prediction", ALPHA_BAR.float()
        return model, t, ALPHA_BAR[t].sqrt(), (1 - ALPHA_BAR[t]).sqrt()
    model = object.__new__(models.SD3 if name == "sd3" else models.Sana)
    model.num_train_timesteps, model.shift = 1000, 3.0
    sigma = 3 * ((t + 1) / 1000) / (1 + 2 * (t + 1) / 1000)
    return model, t, 1 - sigma.double(), sigma.double()


@pytest.mark.parametrize("name", ["sd2", "sana", "sd3"])
def test_s18_at_one_state_velocities_differ_by_the_noises_over_alpha(name):
    model, t, alpha, sigma = (family(name))
    eps = draws(0, 2, 3, 4, 2, 2)  # two noises, and with them two images, of one x_t
    x_0, wide = draws(1, 3, 4, 2, 2), (-1, 1, 1, 1)
    alpha, sigma = alpha.view(wide), sigma.view(wide)
    x_t = alpha * x_0 + sigma * eps[0]
    other = (x_t - sigma * eps[1]) / alpha
    close(model.noise(x_0, t, eps[0]), x_t, rtol=1e-5, atol=1e-5)
    v = [model.target(image, t, noise) for image, noise in ((x_0, eps[0]), (other, eps[1]))]
    close(v[1] - v[0], (eps[1] - eps[0]) / alpha, rtol=1e-4, atol=1e-4)

    policies = draws(2, 6, 3, 4, 2, 2)  # six noise predictions at x_t; v from each
    velocity = [(e - sigma * x_t) / alpha if name == "sd2" else e - (x_t - sigma * e) / alpha for e in policies]
    on_eps = losses.preference_loss(*policies, beta=2.0 / alpha.flatten() ** 2)[1]["logit"]
    close(losses.preference_loss(*velocity, beta=2.0)[1]["logit"], on_eps, rtol=1e-6, atol=1e-9)


def test_s19_sd3_s_weight_makes_distances_of_velocities_distances_of_images():
    model, t, alpha, sigma = family("sd3")
    eps, wide = draws(0, 6, 3, 4, 2, 2), (-1, 1, 1, 1)
    x_t = draws(1, 3, 4, 2, 2)
    images = [(x_t - sigma.view(wide) * e) / alpha.view(wide) for e in eps]
    velocity = [e - image for e, image in zip(eps, images)]
    for v, image in zip(velocity, images):
        close(x_t - sigma.view(wide) * v, image)
    on_images = losses.preference_loss(*images, beta=2.0)[1]["logit"]
    close(losses.preference_loss(*velocity, beta=2.0 * model.weight(t).double())[1]["logit"], on_images, rtol=1e-5, atol=0)
    close(losses.preference_loss(*eps, beta=2.0 * sigma**2 / alpha**2)[1]["logit"], on_images, rtol=1e-6, atol=0)
    assert (family("sana")[0].weight(t) == 1).all() and (family("sd2")[0].weight(t) == 1).all()


# ---- 8: the states


def gaussian_images(step, mean, std):
    """Of images N(mean, std^2): the exact prediction E[eps | x_t], Var(eps | x_t), and E and Var of x_t-1 given x_t."""
    alpha, sigma, alpha_next, sigma_next = step
    ratio = alpha / alpha_next
    variance, variance_next = alpha**2 * std**2 + sigma**2, alpha_next**2 * std**2 + sigma_next**2
    share = ratio * variance_next / variance  # of the regression of x_t-1 on x_t

    def eps(x_t):
        return sigma * (x_t - alpha * mean) / variance

    def next_mean(x_t):
        return alpha_next * mean + share * (x_t - alpha * mean)
    return eps, 1 - sigma**2 / variance, next_mean, variance_next - share * ratio * variance_next


@every_step
def test_s20_the_approximation_is_exact_for_a_policy_s_own_images_but_for_a_sampler_s_variance(step):
    alpha, sigma, alpha_next, sigma_next = step
    n, mean, std = 400_000, 0.7, 0.5
    eps, eps_variance, next_mean, next_variance = gaussian_images(step, mean, std)
    x_0, ratio = mean + std * draws(0, n), alpha / alpha_next
    x_next = alpha_next * x_0 + sigma_next * draws(1, n)  # the true path, in the noising's own order
    x_t = ratio * x_next + math.sqrt(sigma**2 - ratio**2 * sigma_next**2) * draws(2, n)
    true = torch.stack([x_t, x_next])
    x_t = alpha * (mean + std * draws(3, n)) + sigma * draws(4, n)  # the paper's way: noise an image, ask for a step
    own = torch.stack([x_t, next_mean(x_t) + math.sqrt(next_variance) * draws(5, n)])
    close(own.mean(1), true.mean(1), rtol=0, atol=0.01)
    close(own.cov(), true.cov(), rtol=0, atol=0.01)
    s = ddpm_s(step)
    close(mu(step, x_t, eps(x_t), s), next_mean(x_t), rtol=1e-6, atol=1e-6)
    assert next_variance - s**2 == pytest.approx(kappa(step, s) ** 2 * eps_variance, rel=1e-4)


@every_step
def test_s21_images_from_elsewhere_move_the_states_and_not_the_targets(step):
    alpha, sigma, *_ = step
    n, m = 200_000, 0.9
    eps, _, next_mean, _ = gaussian_images(step, 0.7, 0.5)
    target = []
    for moved in (0.0, m):
        x_t = alpha * (0.7 + moved + 0.5 * draws(0, n)) + sigma * draws(1, n)
        target.append((x_t, eps(x_t)))
    (x_t, at_own), (elsewhere, at_other) = target
    close(elsewhere.mean() - x_t.mean(), alpha * m, rtol=1e-6, atol=1e-9)
    slopes = [torch.stack([x, y]).cov()[0, 1] / x.var() for x, y in target]
    close(slopes[0], slopes[1], rtol=1e-6, atol=1e-9)  # the same function of the state
    assert (at_other - at_own).abs().mean() > 1e-4  # other states are asked


def test_s21_the_states_move_near_the_image_and_hardly_in_the_noise():
    vp = [alpha for alpha, *_ in STEPS[:4]]
    assert vp[0] > 0.99 and vp[-1] < 0.07 and vp == sorted(vp, reverse=True)


# ---- the page itself


def test_each_statement_has_its_test():
    tested = {int(n) for n in re.findall(r"^def test_s(\d+)_", Path(__file__).read_text(), re.M)}
    assert set(STATEMENTS) == tested == set(range(1, 22))


def test_github_renders_the_mathematics():
    """Display formulas are fenced, with blank lines around; inline ones have GitHub's backticks and end on their line."""
    outside, *rest = re.split(r"^```math\n(.*?)\n```$", TEXT, flags=re.M | re.S)
    display, after = rest[::2], rest[1::2]
    texts = [outside, *after]
    assert len(display) >= 2 and all(text.endswith("\n\n") for text in texts[:-1])
    assert all(text.startswith("\n\n") for text in texts[1:])
    inline = [m for text in texts for line in text.splitlines() for m in re.findall(r"\$`([^`$]+)`\$", line)]
    for text in texts:
        assert "$" not in re.sub(r"\$`[^`$\n]+`\$", "", text)
    for row in (line for line in TEXT.splitlines() if line.startswith("|")):
        assert not re.findall(r"\$`[^`]*(?<!\\)\|[^`]*`\$", row) and "\\|" not in row  # it would end the cell
    known = ("alpha approx beta bigl bigr Bigl Bigr cdot delta Delta epsilon eta frac hat kappa langle le log mathrm mid mu nabla "
             "omega qquad rangle sigma sim sqrt star text tfrac theta").split()
    for formula in (*inline, *display):
        assert formula.count("{") == formula.count("}") and formula.count("(") == formula.count(")")
        assert set(re.findall(r"\\([A-Za-z]+)", formula)) <= set(known)


def names_in(path):
    """The functions, classes and constants that a file defines at its top."""
    tree = ast.parse((ROOT / path).read_text()).body
    found = {node.name for node in tree if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return found | {target.id for node in tree if isinstance(node, ast.Assign) for target in node.targets
                    if isinstance(target, ast.Name)}


def test_the_map_names_files_functions_and_flags_that_exist():
    rows = [line.strip("| ").split(" | ") for line in TEXT.split("## The map")[1].splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20 and {len(row) for row in rows} == {4}
    for _, where, state, commands in rows:
        assert re.match("reproduced|in part|not|open", state)
        path = None
        for token in re.findall("`([^`]+)`", where):  # a file, file:name, or another name in the same file
            path, _, name = token.partition(":") if "." in token else (path, "", token)
            assert (ROOT / path).is_file() and (not name or name in names_in(path)), token
        assert path
        for command in re.findall("`([^`]+)`", commands):
            program, *words = command.removeprefix("python -m ").removeprefix("python ").removeprefix("torchrun ").split()
            path = program if program.endswith(".py") else program.replace(".", "/") + ".py"
            source = (ROOT / path).read_text() if program != "pytest" else ""
            for flag in (word for word in words if word.startswith("--")):
                assert f'"{flag}"' in source, command
            if program == "pytest":
                assert (ROOT / words[-1]).is_file()


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("https://") or (ROOT / "docs" / link).exists(), link
