"""toy2d.py and its two studies: the closed forms against a second computation, and the claim of Sec. 4.1 at our scale."""

import itertools
import math

import matplotlib.image
import numpy as np
import pytest
import torch

import toy2d
from studies import toy2d_sweep, toy2d_why


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
            eps = toy2d_why.eps_exact(x.detach(), torch.tensor(t), torch.tensor(c), **world)
            torch.testing.assert_close(eps, -toy2d.SIGMA[t].double() * score, rtol=1e-6, atol=1e-9)


def test_the_trained_reference_has_learned_the_noisy_data_s_score():
    reference, rng = toy2d.train_reference(0), torch.Generator().manual_seed(5)
    c, t = torch.randint(toy2d.K, (4000,), generator=rng), torch.randint(toy2d.T, (4000,), generator=rng)
    x_t = toy2d.noise(toy2d.draw_data(c, rng, **toy2d.NOISY), t, torch.randn(4000, 2, generator=rng))
    exact = toy2d_why.eps_exact(x_t, t, c, **toy2d.NOISY)
    error = (reference(x_t, t, c) - exact).square().mean() / exact.square().mean()
    assert error < 0.01
    other = (toy2d_why.eps_exact(x_t, t, c, **toy2d.CLEAN) - exact).square().mean() / exact.square().mean()
    assert other > 10 * error  # it is the noisy data's score, not the clean one's


def test_noise_is_variance_preserving_and_spans_the_whole_range():
    torch.testing.assert_close(toy2d.ALPHA**2 + toy2d.SIGMA**2, torch.ones(toy2d.T))
    assert (toy2d.ALPHA.diff() <= 0).all() and toy2d.ALPHA[0] > 0.999 and toy2d.ALPHA[-1] <= 0.01


def test_draws_have_the_stated_shares_and_width():
    c = torch.full((200_000,), 2)
    x = toy2d.draw_data(c, torch.Generator().manual_seed(0), std=0.01, swap=0.3)
    nearest = torch.cdist(x, toy2d.MODES).argmin(1)
    shares = torch.bincount(nearest, minlength=toy2d.K) / len(c)
    torch.testing.assert_close(shares[1:4], torch.tensor([0.15, 0.7, 0.15]), atol=0.005, rtol=0)
    assert (x - toy2d.MODES[nearest]).std().item() == pytest.approx(0.01, rel=0.01)


def of_gaussians(centres, std):
    """A model that is exact for data N(centres[c], std^2): its samples tell the class and the x_T that they come from."""
    def model(x_t, t, c):
        alpha, sigma = toy2d.ALPHA[t][:, None], toy2d.SIGMA[t][:, None]
        return sigma * (x_t - alpha * centres[c]) / (alpha**2 * std**2 + sigma**2)
    return model


def test_pairs_take_both_neighbours_in_turn_and_grow_by_appending():
    ref = of_gaussians(toy2d.MODES, 0.1)
    for source in ("apart", "shared-noise", "clean"):
        whole = toy2d.draw_pairs(ref, 3, 4, source)
        side = ((whole[3] - whole[2]) % toy2d.K).view(4, toy2d.K)
        assert set(side.flatten().tolist()) == {1, toy2d.K - 1} and (whole[2].view(4, toy2d.K) == torch.arange(toy2d.K)).all()
        assert (side[0] == side[2]).all() and (side[0] != side[1]).all() and len(set(side[0].tolist())) == 2
        assert all((few == many[:2 * toy2d.K]).all() for few, many in zip(toy2d.draw_pairs(ref, 3, 2, source), whole))
        assert (toy2d.draw_pairs(ref, 4, 2, source)[0] != whole[0][:2 * toy2d.K]).any()


def test_the_reference_draws_the_winner_given_c_and_the_loser_given_c_minus():
    centres = 3 * toy2d.MODES + torch.tensor([0.5, 0])  # of this model and of no other
    for source in ("apart", "shared-noise"):
        x_0_w, x_0_l, c, c_minus = toy2d.draw_pairs(of_gaussians(centres, 0.1), 0, 64, source)
        assert (x_0_w - centres[c]).norm(dim=1).max() < 0.6 and (x_0_l - centres[c_minus]).norm(dim=1).max() < 0.6
        assert (x_0_w - centres[c]).std() == pytest.approx(0.1, rel=0.15)  # 50 steps of DDIM make it a little narrower


def test_a_pair_shares_its_x_T_only_if_asked_to():
    def deviations(source):
        x_0_w, x_0_l, c, c_minus = toy2d.draw_pairs(of_gaussians(toy2d.MODES, 0.1), 0, 64, source)
        return (x_0_w - toy2d.MODES[c]).flatten(), (x_0_l - toy2d.MODES[c_minus]).flatten()

    def correlation(a, b):
        return torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    (apart_w, apart_l), (shared_w, shared_l), (clean_w, clean_l) = map(deviations, ("apart", "shared-noise", "clean"))
    assert correlation(shared_w, shared_l) > 0.999 and abs(correlation(apart_w, apart_l)) < 0.1
    assert (apart_w == shared_w).all()  # the same winners, so that the source of the losers is all that differs
    assert abs(correlation(clean_w, clean_l)) < 0.1
    for deviation in (apart_w, apart_l, shared_w):  # every pair has an x_T of its own
        assert len(set(deviation.tolist())) > 0.99 * len(deviation)


def test_clean_pairs_are_the_ground_truth_s_and_ask_no_model():
    x_0_w, x_0_l, c, c_minus = toy2d.draw_pairs(None, 0, 64, "clean")
    for x_0, of in ((x_0_w, c), (x_0_l, c_minus)):
        assert (x_0 - toy2d.MODES[of]).std() == pytest.approx(toy2d.CLEAN["std"], rel=0.1)
        assert (x_0 - toy2d.MODES[of]).norm(dim=1).max() < 0.6


def test_the_reference_s_own_pairs_are_misaligned_as_often_as_its_data():
    """(b) puts 30 % into the neighbours' modes and widens all of them; the winners inherit that, and clean ones do not."""
    x_0_w, _, c, _ = toy2d.draw_pairs(toy2d.train_reference(0), 0, 64)
    data = toy2d.draw_data(c.repeat(20), torch.Generator().manual_seed(0), **toy2d.NOISY)
    shares = [(torch.cdist(x, toy2d.MODES).argmin(1) != of).float().mean().item() for x, of in ((x_0_w, c), (data, c.repeat(20)))]
    assert shares[1] > 0.35 and shares[0] == pytest.approx(shares[1], abs=0.06)


@pytest.mark.parametrize("objective", toy2d.OBJECTIVES.values())
def test_a_step_is_its_equation_written_out(objective):
    rng, beta = torch.Generator().manual_seed(0), 3
    c, t = torch.randint(toy2d.K, (50,), generator=rng), torch.randint(toy2d.T, (50,), generator=rng)
    c_minus = (c + 1) % toy2d.K
    x_0_w, x_0_l, eps = torch.randn(3, 50, 2, generator=rng)
    theta, ref = of_gaussians(toy2d.MODES, 0.2), of_gaussians(toy2d.MODES, 0.25)
    loss = toy2d.pair_loss(objective, theta, ref, x_0_w, x_0_l, c, c_minus, t, eps, beta)
    for i in range(50):
        at = t[i:i + 1]
        x_t_w, x_t_l = (toy2d.ALPHA[at] * x[i:i + 1] + toy2d.SIGMA[at] * eps[i:i + 1] for x in (x_0_w, x_0_l))

        def predictions(x_t):
            return theta(x_t, at, c[i:i + 1]), ref(x_t, at, c[i:i + 1]), ref(x_t, at, c_minus[i:i + 1])  # noqa: B023
        (theta_w, ref_w, ref_w_minus), (theta_l, ref_l, ref_l_minus) = predictions(x_t_w), predictions(x_t_l)
        target_w, target_l = (ref_w, ref_l_minus) if objective == "ddspo" else (eps[i], eps[i])

        def farther(theta_, ref_, target):
            return ((target - theta_) ** 2).mean() - ((target - ref_) ** 2).mean()
        logit = -beta / 2 * (farther(theta_w, ref_w, target_w) - farther(theta_l, ref_l, target_l)).item()
        weight = beta * (1 - 1 / (1 + math.exp(-logit)))
        at_w = ((theta_w - (beta * ref_w - (beta - 1) * ref_w_minus)) ** 2).mean().item()  # a control's s is beta here
        at_l = ((theta_l - (beta * ref_l - (beta - 1) * ref_l_minus)) ** 2).mean().item()
        expected = {
            "diffusion-dpo": math.log1p(math.exp(-logit)), "ddspo": math.log1p(math.exp(-logit)),
            "dspo": (((theta_w - eps[i]) - weight * (theta_w - ref_w)) ** 2).mean().item(),
            "guidance": at_w + at_l, "guidance-losers": at_l,
        }[objective]
        assert loss[i].item() == pytest.approx(expected, rel=1e-4)


def test_every_objective_sees_the_same_draws_and_every_t(monkeypatch):
    ref, seen = toy2d.Denoiser(0).requires_grad_(False), []
    pairs = toy2d.draw_pairs(ref, 0, 2)

    def record(objective, theta, ref, *batch):
        seen.append(batch)
        return theta(batch[0], batch[4], batch[2]).square().sum(1)
    monkeypatch.setattr(toy2d, "pair_loss", record)
    before = [x.clone() for x in ref.parameters()]
    for objective in ("diffusion-dpo", "ddspo"):
        theta = toy2d.finetune(ref, pairs, 0, objective, 1, 1e-3, updates=40)
        assert all((a != b).any() for a, b in zip(theta.parameters(), ref.parameters()))
    assert all((a == b).all() for a, b in zip(before, ref.parameters()))
    assert len(seen) == 80 and set(torch.cat([batch[4] for batch in seen]).tolist()) == set(range(toy2d.T))
    for one, other in zip(seen[:40], seen[40:]):
        assert all((a == b).all() for a, b in zip(one[:-1], other[:-1]))
    drawn = {tuple(x) for batch in seen for x in torch.cat([batch[0], batch[1], batch[2][:, None], batch[3][:, None]], 1).tolist()}
    assert drawn == {tuple(x) for x in torch.cat([pairs[0], pairs[1], pairs[2][:, None], pairs[3][:, None]], 1).tolist()}


def test_every_seed_and_setting_gets_its_own_result(monkeypatch):
    """run_all's bookkeeping, with a stand-in for tuning that says which run it was."""
    monkeypatch.setattr(toy2d, "train_reference", lambda seed: seed)
    monkeypatch.setattr(toy2d, "draw_pairs", lambda ref, seed, n, source: [source + "x" * 1000])
    monkeypatch.setattr(toy2d, "finetune", lambda ref, pairs, seed, *setting: [seed, setting[2], len(pairs[0])])
    monkeypatch.setattr(toy2d, "sample_classes", lambda model: model)
    monkeypatch.setattr(toy2d, "quality", lambda samples: samples)
    settings = [("apart", 2, "DDSPO", 1, 0.5, 300), ("clean", 4, "D-DPO", 1, 0.25, 300)]
    scores = toy2d_sweep.run_all(settings, [10, 11, 12])
    assert list(scores) == settings
    values = np.stack(list(scores.values()))
    assert values[..., 0].tolist() == [[10, 11, 12]] * 2 and values[..., 1].tolist() == [[0.5] * 3, [0.25] * 3]
    assert values[..., 2].tolist() == [[2 * toy2d.K] * 3, [4 * toy2d.K] * 3]


def test_a_run_tunes_with_its_own_pairs_and_setting(monkeypatch):
    monkeypatch.setattr(toy2d, "train_reference", lambda seed: toy2d.Denoiser(seed).requires_grad_(False))
    tuned_first, untuned = toy2d_sweep.run_all([("shared-noise", 3, "DDSPO", 2, 1e-3, 4), ("apart", 2, "DDSPO", 1, 0, 0)], [7]).values()
    ref = toy2d.train_reference(7)
    pairs = toy2d.draw_pairs(ref, 7, 3, "shared-noise")
    tuned = toy2d.sample_classes(toy2d.finetune(ref, pairs, 7, "ddspo", 2, 1e-3, updates=4))
    assert tuned_first[0].tolist() == toy2d.quality(tuned)
    assert untuned[0].tolist() == toy2d.quality(toy2d.sample_classes(ref)) != toy2d.quality(tuned)


def test_the_figure_s_program_tunes_each_method_with_its_own_setting_and_shows_the_median_seed(monkeypatch, capsys):
    """main's loop with stand-ins: the gain in energy distance of seeds 0 to 4 is 5, 40, 20, 10 and 25 hundredths."""
    def quality(model):
        seed, *how = model
        d_dpo, ddspo = [10, 50, 30, 20, 45][seed], [5, 10, 10, 10, 20][seed]
        return [seed, (d_dpo if "diffusion-dpo" in how else ddspo) / 100, 0]
    shown = []
    monkeypatch.setattr(toy2d, "train_reference", lambda seed: torch.nn.Identity())
    monkeypatch.setattr(toy2d, "draw_pairs", lambda ref, seed, n, source: [torch.tensor([seed, n]), source])
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: x.clone())
    monkeypatch.setattr(toy2d, "finetune", lambda ref, pairs, seed, *how: (seed, *how))
    monkeypatch.setattr(toy2d, "sample_classes", lambda model, device: (9,) if isinstance(model, torch.nn.Identity) else model)
    monkeypatch.setattr(toy2d, "quality", quality)
    monkeypatch.setattr(toy2d, "draw_figure", lambda *arguments: shown.append(arguments))
    monkeypatch.setattr(toy2d, "draw_pairs", lambda ref, seed, n, source: [torch.tensor([seed, n])])
    monkeypatch.setattr(toy2d, "try_path", lambda path: None)
    monkeypatch.setattr(toy2d, "quality", lambda model: quality(model) if model != (9,) else [9, 9, 9])
    toy2d.main(["--pairs", "clean"])
    (samples, pairs, path), = shown
    assert pairs[0].tolist() == [2, 2] and path == "figures/toy2d.png"
    assert samples == {"Reference": (9,)} | {name: (2, objective, *setting) for (name, objective), setting
                                            in zip(toy2d.OBJECTIVES.items(), toy2d.SETTINGS["clean"])}
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if "±" in line]
    assert [row[0].strip() for row in rows] == list(samples) and rows[1][1].strip() == "2.000 ± 1.581"


def test_a_device_that_is_not_there_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        with pytest.raises(SystemExit, match=f"no {device} device here: leave out --device {device}"):
            toy2d.main(["--device", device, "--out", str(tmp_path / "a.png")])
    assert not list(tmp_path.iterdir())


def test_tuning_and_sampling_stay_on_the_device_of_the_model(monkeypatch):
    """The device "meta" knows shapes and no numbers, and refuses to be mixed with the CPU, as a GPU does."""
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, fused: adam(parameters, lr))  # meta has no fused one
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: x)
    ref = toy2d.Denoiser(0).requires_grad_(False)
    pairs = [x.to("meta") for x in toy2d.draw_pairs(ref, 0, 2)]
    for objective in toy2d.OBJECTIVES.values():
        theta = toy2d.finetune(ref.to("meta"), pairs, 0, objective, 1, 1e-3, updates=2)
        assert toy2d.sample_classes(theta, "meta", 3).device.type == "meta"


def test_scores_of_known_samples():
    c = torch.arange(toy2d.K)[:, None].expand(toy2d.K, 500)
    truth = toy2d.draw_data(c, torch.Generator().manual_seed(7), **toy2d.CLEAN)
    turned = truth.roll(1, 0)  # every class where its neighbour should be
    shifted = truth + torch.tensor([0.06, 0.08])
    own, energy, shift = zip(*map(toy2d.quality, (truth, turned, shifted)))
    assert own[0] > 0.999 and own[1] < 0.001
    assert abs(energy[0]) < 0.002 and energy[1] > 1 and 0.005 < energy[2] < 0.1
    np.testing.assert_allclose(shift, [0, 2 * math.sin(math.pi / 8), 0.1], atol=0.01)


def test_energy_distance_is_unbiased_and_matches_its_definition():
    x = torch.randn(toy2d.K, 6, 2, generator=torch.Generator().manual_seed(0))
    c = torch.arange(toy2d.K)[:, None].expand(toy2d.K, 6)
    truth = toy2d.draw_data(c, torch.Generator().manual_seed(1), **toy2d.CLEAN)  # the sample that scores() draws

    def mean_distance(a, b, skip):
        return np.mean([math.dist(p, q) for i, p in enumerate(a.tolist()) for j, q in enumerate(b.tolist())
                        if not skip or i != j])
    by_class = [2 * mean_distance(a, b, False) - mean_distance(a, a, True) - mean_distance(b, b, True)
                for a, b in zip(x, truth)]
    assert toy2d.quality(x)[1] == pytest.approx(np.mean(by_class), rel=1e-4)


def test_sampling_with_the_exact_score_gives_the_exact_distribution():
    own, energy, shift = toy2d.quality(toy2d.sample_classes(lambda x_t, t, c: toy2d_why.eps_exact(x_t, t, c, **toy2d.CLEAN)))
    assert own > 0.999 and energy < 0.005 and shift < 0.02


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    def compute(*args):
        raise AssertionError("computed first")
    monkeypatch.setattr(toy2d, "train_reference", compute)
    (tmp_path / "file").write_text("")
    for program in (toy2d.main, toy2d_sweep.main, toy2d_why.main):
        for path in (str(tmp_path), str(tmp_path / "new") + "/", str(tmp_path / "file" / "a.png")):
            with pytest.raises(SystemExit, match="folder|cannot read or write|name of a picture"):
                program(["--out", path])
        with pytest.raises(AssertionError, match="computed first"):
            program(["--out", str(tmp_path / "new" / "a.png")])
    assert not list(tmp_path.rglob("*.partial"))


def test_the_sweep_chooses_by_energy_distance_on_other_seeds_and_reports_what_it_chose(tmp_path, capsys, monkeypatch):
    best = {"D-DPO": (10, 2.5e-6), "DSPO": (1, 2e-5), "DDSPO": (0.1, 1e-5), "Guidance distilled": (3, 5e-6),
            "Guidance distilled at losers": (50, 1e-5)}  # what this stand-in for tuning likes: beta or s, and lr
    asked = []

    def run_all(settings, seeds):
        settings = list(dict.fromkeys(settings))
        asked.append((settings, seeds))
        values = np.random.default_rng(0).normal(0, 1e-3, (len(settings), len(seeds), 3))
        for i, (_, _, name, beta, lr, _) in enumerate(settings):
            values[i, :, 0] += lr * 1e4  # a share that would choose otherwise
            if lr:
                values[i, :, 1] += abs(math.log(lr / best[name][1])) + 0.1 * abs(math.log(beta / best[name][0]))
        return dict(zip(settings, values))
    monkeypatch.setattr(toy2d_sweep, "run_all", run_all)
    toy2d_sweep.main(["--out", str(tmp_path / "sweep.png")])
    (tried, tuning_seeds), (shown, seeds) = asked
    assert not set(tuning_seeds) & set(seeds) and len(tuning_seeds) == len(seeds) == 5 and seeds == toy2d.SEEDS
    for source, n, name in itertools.product(["apart", "shared-noise"], [1, 2, 4, 16, 64], best):
        at, (beta, lr) = list(best).index(name), best[name]
        if n != 2:  # beta is the figure's, and the learning rate alone is chosen
            beta = toy2d.SETTINGS[source][at][0]
        assert (source, n, name, beta, lr, 300) in shown
        mine = [setting[3:5] for setting in tried if setting[:3] == (source, n, name)]
        betas = {3, 10, 50} if "Guidance" in name else {0.1, 1, 10}
        assert sorted(mine) == sorted(itertools.product(betas if n == 2 else {beta}, [2.5e-6, 5e-6, 1e-5, 2e-5]))
    for source, name in itertools.product(["apart", "shared-noise"], best):  # by the number of updates all run at DDSPO's lr
        mine = [s for s in shown if s[:3] == (source, 2, name) and s[3:5] == (best[name][0], 1e-5)]
        assert {s[5] for s in mine} == set(toy2d_sweep.UPDATES)
    printed = capsys.readouterr().out
    assert printed.count("(best)") == 55 and "apart, 2, D-DPO, 10, 2.5e-06, 300 (best)" in printed
    assert matplotlib.image.imread(tmp_path / "sweep.png")[..., :3].std() > 0.05


def test_the_settings_of_the_figure_are_of_the_sweep_s_grid():
    for settings in toy2d.SETTINGS.values():
        for name, (beta, lr) in zip(toy2d.OBJECTIVES, settings, strict=True):
            assert beta in toy2d_sweep.BETA[name] and lr in toy2d_sweep.LR


@pytest.mark.slow
def test_the_figure_separates_the_modes_with_ddspo_and_not_with_d_dpo(tmp_path, capsys, monkeypatch):
    """The figure's program, on two of its seeds."""
    monkeypatch.setattr(toy2d, "SEEDS", [0, 1])
    toy2d.main(["--out", str(tmp_path / "toy2d.png")])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "±" in line]
    own, energy = ({row[0].strip(): float(row[i].split("±")[0]) for row in rows} for i in (1, 2))
    assert own["DDSPO"] > own["D-DPO"] + 0.1 > own["Reference"] + 0.2
    assert 2 * energy["DDSPO"] < energy["D-DPO"] < energy["Reference"]
    # DSPO stays where the reference is; guidance at the losers' states is all that DDSPO does, and not at the winners'
    assert own["DSPO"] == pytest.approx(own["Reference"], abs=0.02)
    assert own["Guidance distilled at losers"] == pytest.approx(own["DDSPO"], abs=0.02)
    assert own["DDSPO"] > own["Guidance distilled"] + 0.04 and energy["Guidance distilled"] > 1.5 * energy["DDSPO"]
    picture = matplotlib.image.imread(tmp_path / "toy2d.png")  # two rows of three square panels
    assert 1.2 < picture.shape[1] / picture.shape[0] < 1.5 and picture[..., :3].std() > 0.1


# ---- toy2d_why.py


@pytest.mark.parametrize("objective", ["diffusion-dpo", "ddspo"])
def test_what_an_objective_asks_for_is_the_loss_s_gradient_averaged_over_the_pairs_that_lead_to_a_state(objective):
    """The second computation: at one state, the gradient of step_loss by autograd for every pair and for either of its
    sides, weighted by the density with which it leads there."""
    ref, rng, n, beta = of_gaussians(toy2d.MODES, 0.25), torch.Generator().manual_seed(0), 3, 2
    pairs = toy2d.draw_pairs(ref, 0, n)
    for t, k in ((5, 0), (20, 3), (40, 7), (60, 5), (90, 2)):
        mine = [i for i in range(n * toy2d.K) if pairs[2][i] == k]
        start = pairs[0][mine[0]] * toy2d.ALPHA[t] + toy2d.SIGMA[t] * torch.randn(2, generator=rng)
        x_t, t, c = start[None], torch.tensor([t]), torch.tensor([k])
        density, gradient = [], []
        for side in (0, 1):
            for i in mine:
                eps = (x_t - toy2d.ALPHA[t] * pairs[side][i]) / toy2d.SIGMA[t]
                deltas = [torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)]
                of_call = iter(deltas)  # theta is asked at the winner's state and then at the loser's

                def theta(x, t, c):
                    return ref(x, t, c) + next(of_call)  # noqa: B023 (used in this round only)
                toy2d.pair_loss(objective, theta, ref, *(x[i:i + 1] for x in pairs), t, eps, beta).sum().backward()
                gradient.append(-deltas[side].grad[0].double() / (beta / 4))  # 1 / 2 of the sigmoid, beta / 2, 2 / D
                density.append(math.exp(-((start - toy2d.ALPHA[t] * pairs[side][i]).square().sum() / 2 / toy2d.SIGMA[t]**2)))
        weight, gradients = torch.tensor(density, dtype=torch.float64) / sum(density), torch.stack(gradient)
        mean = (weight[:, None] * gradients).sum(0)
        d = toy2d_why.asked(objective, ref, pairs, x_t, t, c)
        torch.testing.assert_close(d[0].double(), mean, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["diffusion-dpo", "ddspo"])
def test_the_measured_alignment_is_that_of_single_pairs_drawn_at_random(objective, monkeypatch):
    """d is a mean given the state and r a function of it, so <ask, r> = <d, r> on average, and |ask|^2 is |d|^2 or more."""
    ref, rng, beta = of_gaussians(toy2d.MODES, 0.25), torch.Generator().manual_seed(1), 2
    monkeypatch.setattr(toy2d_why, "T", 61)
    alignment = toy2d_why.measure({0: ref}, 2, objective)
    pairs = toy2d.draw_pairs(ref, 0, 2)
    for step in (10, 30, 60):
        batch = torch.randint(2 * toy2d.K, (20_000,), generator=rng)
        x_0_w, x_0_l, c, c_minus = (x[batch] for x in pairs)
        t, eps = torch.full((20_000,), step), torch.randn(20_000, 2, generator=rng)
        deltas = [torch.zeros(20_000, 2, requires_grad=True), torch.zeros(20_000, 2, requires_grad=True)]
        of_call = iter(deltas)
        toy2d.pair_loss(objective, lambda *at: ref(*at) + next(of_call), ref, x_0_w, x_0_l, c, c_minus, t, eps, beta).sum().backward()  # noqa: B023
        asks = [-delta.grad / (beta / 4) for delta in deltas]
        rights, means = [], []
        for x_0 in (x_0_w, x_0_l):
            x_t = toy2d.noise(x_0, t, eps)
            rights.append(of_gaussians(toy2d.MODES, 0.1)(x_t, t, c) - ref(x_t, t, c))
            means.append(toy2d_why.asked(objective, ref, pairs, x_t, t, c))
        ask_r, ask_ask, mean_mean, r_r = ((torch.cat(a) * torch.cat(b)).sum(1).mean().item()
                                          for a, b in ((asks, rights), (asks, asks), (means, means), (rights, rights)))
        assert mean_mean < 1.1 * ask_ask
        assert alignment[step].item() == pytest.approx(ask_r / math.sqrt(mean_mean * r_r), abs=0.1)


def test_a_reference_that_lacks_what_ddspo_asks_for_is_aligned_with_it(monkeypatch):
    """Where eps_exact is eps_ref + 3 d, the alignment is 1; where it is eps_ref - d, it is -1."""
    ref = of_gaussians(toy2d.MODES, 0.25)
    pairs = toy2d.draw_pairs(ref, 0, 2)
    monkeypatch.setattr(toy2d_why, "T", 20)
    for factor in (3, -1):
        monkeypatch.setattr(toy2d_why, "eps_exact", lambda x_t, t, c, **_: ref(x_t, t, c) + factor * toy2d_why.asked("ddspo", ref, pairs, x_t, t, c))  # noqa: B023
        torch.testing.assert_close(toy2d_why.measure({0: ref}, 2, "ddspo"), torch.full((20,), float(factor > 0) * 2 - 1))


def test_the_arrows_of_fig_1_lead_where_the_targets_do(monkeypatch, tmp_path):
    """The second computation, in clean points: p_i is the share of the states here that sample i leads to. D-DPO adds
    p_i (x_0_i - what the reference has) for winners and subtracts it for losers; DDSPO subtracts, at losers, what the
    reference has given c_minus; the truth is the mean of the class's own Gaussian given x_t."""
    ref, figures = of_gaussians(toy2d.MODES, 0.25), []
    monkeypatch.setattr(toy2d_why, "save_figure", lambda figure, path: figures.append(figure))
    toy2d_why.draw_arrows(ref, 2, tmp_path / "fig1.png")
    pairs = toy2d.draw_pairs(ref, 2, 2)
    k = pairs[2][(pairs[0] - toy2d.MODES[pairs[2]]).norm(dim=1).argmax()]
    mine = [i for i in range(2 * toy2d.K) if pairs[2][i] == k]
    x_0, c_minus = torch.cat([pairs[0][mine], pairs[1][mine]]), [pairs[3][i] for i in mine]
    axes = figures[0].axes
    assert len(axes) == 3
    for axis in axes:
        step = torch.tensor([int(axis.get_title().split()[2])])
        alpha, sigma = toy2d.ALPHA[step], toy2d.SIGMA[step]
        arrows = [x for x in axis.collections if hasattr(x, "U")]
        assert [x.get_label().split(" sends")[0] for x in arrows] == ["the untuned reference", "D-DPO", "DDSPO", "the truth"]
        for j, x_t in enumerate(torch.tensor(np.stack([arrows[0].X, arrows[0].Y], 1), dtype=torch.float32)):
            def clean(c):
                return (x_t - sigma * ref(x_t[None], step, c[None])[0]) / alpha  # noqa: B023 (used in this round only)
            p = torch.softmax(-(x_t - alpha * x_0).square().sum(1) / 2 / sigma**2, 0)
            narrow = alpha * 0.01 / (alpha**2 * 0.01 + sigma**2)
            ends = [clean(k),
                    clean(k) + (p[:, None] * torch.tensor([1, 1, -1, -1])[:, None] * (x_0 - clean(k))).sum(0),
                    clean(k) + p[2] * (clean(k) - clean(c_minus[0])) + p[3] * (clean(k) - clean(c_minus[1])),
                    toy2d.MODES[k] + narrow * (x_t - alpha * toy2d.MODES[k])]
            for arrow, end in zip(arrows, ends):
                np.testing.assert_allclose([arrow.U[j], arrow.V[j]], end - x_t, atol=1e-4)
