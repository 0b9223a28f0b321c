"""toy2d.py: the closed forms against a second computation, and the claim of Sec. 4.1 at our scale."""

import math

import matplotlib.image
import numpy as np
import pytest
import torch

import toy2d


def log_density(x_t, t, c, std, swap):
    """log p_t(x_t | c) of one point, from the definition of the mixture."""
    alpha, sigma, total = toy2d.ALPHA[t].double(), toy2d.SIGMA[t].double(), 0
    for k, weight in ((c, 1 - swap), ((c - 1) % toy2d.K, swap / 2), ((c + 1) % toy2d.K, swap / 2)):
        variance = (alpha * std) ** 2 + sigma**2
        squared = (x_t - alpha * toy2d.MODES[k].double()).square().sum()
        total = total + weight * torch.exp(-squared / (2 * variance)) / (2 * math.pi * variance)
    return total.log()


@pytest.mark.parametrize("world", [toy2d.CLEAN, toy2d.NOISY])
def test_the_closed_form_noise_prediction_is_the_score_by_autograd(world):
    rng = torch.Generator().manual_seed(0)
    for t in (0, 10, 50, 90, 99):
        for c in (0, 3, 7):
            x = torch.randn(2, generator=rng, dtype=torch.float64) * 0.7
            x.requires_grad_()
            score, = torch.autograd.grad(log_density(x, t, c, **world), x)
            eps = toy2d.eps_exact(x.detach(), torch.tensor(t), torch.tensor(c), **world)
            torch.testing.assert_close(eps, -toy2d.SIGMA[t].double() * score, rtol=1e-6, atol=1e-9)


def test_the_trained_reference_has_learned_the_noisy_data_s_score():
    reference, rng = toy2d.train_reference([0]), torch.Generator().manual_seed(5)
    c, t = torch.randint(toy2d.K, (1, 4000), generator=rng), torch.randint(toy2d.T, (1, 4000), generator=rng)
    x_t = toy2d.noise(toy2d.draw(c, rng, **toy2d.NOISY), t, torch.randn(1, 4000, 2, generator=rng))
    exact = toy2d.eps_exact(x_t, t, c, **toy2d.NOISY)
    error = (reference(x_t, t, c) - exact).square().mean() / exact.square().mean()
    assert error < 0.01
    other = (toy2d.eps_exact(x_t, t, c, **toy2d.CLEAN) - exact).square().mean() / exact.square().mean()
    assert other > 10 * error  # it is the noisy data's score, not the clean one's


def test_noise_is_variance_preserving_and_spans_the_whole_range():
    torch.testing.assert_close(toy2d.ALPHA**2 + toy2d.SIGMA**2, torch.ones(toy2d.T))
    assert (toy2d.ALPHA.diff() <= 0).all() and toy2d.ALPHA[0] > 0.999 and toy2d.ALPHA[-1] <= 0.01


def test_draws_have_the_stated_shares_and_width():
    c = torch.full((200_000,), 2)
    x = toy2d.draw(c, torch.Generator().manual_seed(0), std=0.01, swap=0.3)
    nearest = torch.cdist(x, toy2d.MODES).argmin(1)
    shares = torch.bincount(nearest, minlength=toy2d.K) / len(c)
    torch.testing.assert_close(shares[1:4], torch.tensor([0.15, 0.7, 0.15]), atol=0.005, rtol=0)
    assert (x - toy2d.MODES[nearest]).std().item() == pytest.approx(0.01, rel=0.01)


def test_pairs_take_both_neighbours_in_turn_and_grow_by_appending():
    x_0_w, x_0_l, c, c_minus = toy2d.make_pairs(3, 4)
    side = (c_minus - c) % toy2d.K
    assert set(side.tolist()) == {1, toy2d.K - 1}
    assert (side.view(4, -1)[0] == side.view(4, -1)[2]).all() and (side.view(4, -1)[0] != side.view(4, -1)[1]).all()
    assert (x_0_w - toy2d.MODES[c]).abs().max() < 0.5 and (x_0_l - toy2d.MODES[c_minus]).abs().max() < 0.5
    drawn = toy2d.make_pairs(3, 40, "random")
    side = ((drawn[3] - drawn[2]) % toy2d.K == 1).float()
    assert 0.4 < side.mean() < 0.6 and 0.4 < (side[8:] == side[:-8]).float().mean() < 0.6
    for neighbours, whole in (("both", (x_0_w, x_0_l, c, c_minus)), ("random", drawn)):
        for few, many in zip(toy2d.make_pairs(3, 2, neighbours), whole):
            assert (few == many[:2 * toy2d.K]).all()
    assert (toy2d.make_pairs(4, 2)[0] != toy2d.make_pairs(3, 2)[0]).any()


def test_networks_in_one_batch_do_not_mix():
    together = toy2d.tune(toy2d.train_reference([0, 1], updates=20), "ddspo", [0, 1], 2, [1, 16], 1e-3, updates=3)
    alone = toy2d.tune(toy2d.train_reference([1], updates=20), "ddspo", [1], 2, [16], 1e-3, updates=3)
    for many, one in zip(together.parameters(), alone.parameters()):  # order: beta, then seed
        torch.testing.assert_close(many[3:4], one, atol=1e-5, rtol=1e-4)
        assert (many[0] != many[1]).any() and (many[1] != many[3]).any()


def test_scores_of_known_samples():
    c = torch.arange(toy2d.K)[:, None].expand(toy2d.K, 500)
    truth = toy2d.draw(c, torch.Generator().manual_seed(7), **toy2d.CLEAN)
    turned = truth.roll(1, 0)  # every class where its neighbour should be
    shifted = truth + torch.tensor([0.06, 0.08])
    own, energy, shift = toy2d.scores(torch.stack([truth, turned, shifted]))
    assert own[0] > 0.999 and own[1] < 0.001
    assert abs(energy[0]) < 0.002 and energy[1] > 1 and 0.005 < energy[2] < 0.1
    np.testing.assert_allclose(shift, [0, 2 * math.sin(math.pi / 8), 0.1], atol=0.01)


def test_energy_distance_is_unbiased_and_matches_its_definition():
    x = torch.randn(1, toy2d.K, 6, 2, generator=torch.Generator().manual_seed(0))
    c = torch.arange(toy2d.K)[:, None].expand(toy2d.K, 6)
    truth = toy2d.draw(c, torch.Generator().manual_seed(1), **toy2d.CLEAN)  # the sample that scores() draws
    def mean_distance(a, b, skip):
        return np.mean([math.dist(p, q) for i, p in enumerate(a.tolist()) for j, q in enumerate(b.tolist())
                        if not skip or i != j])
    by_class = [2 * mean_distance(a, b, False) - mean_distance(a, a, True) - mean_distance(b, b, True)
                for a, b in zip(x[0], truth)]
    assert toy2d.scores(x)[1][0] == pytest.approx(np.mean(by_class), rel=1e-4)


def test_sampling_with_the_exact_score_gives_the_exact_distribution():
    class Exact:
        bias = [torch.zeros(1, 1)]

        def __call__(self, x_t, t, c):
            return toy2d.eps_exact(x_t, t, c, **toy2d.CLEAN)

    own, energy, shift = toy2d.scores(toy2d.sample(Exact()))
    assert own[0] > 0.999 and energy[0] < 0.005 and shift[0] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("policies", ["reference", "exact"])
def test_ddspo_beats_d_dpo_and_the_reference_at_2_pairs_per_class(policies, tmp_path, capsys):
    toy2d.figure_2(policies, "both", str(tmp_path / "toy2d.png"))
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "±" in line]
    own, energy = ({row[0].strip(): float(row[i].split("±")[0]) for row in rows} for i in (1, 2))
    assert own["DDSPO"] > own["D-DPO"] - 0.01 * (policies == "exact") and own["D-DPO"] > own["Reference"]
    assert energy["DDSPO"] < energy["D-DPO"] < energy["Reference"]
    picture = matplotlib.image.imread(tmp_path / "toy2d.png")
    assert picture.shape[1] > 4 * picture.shape[0] and picture[..., :3].std() > 0.1
