"""loss.py against Eq. 4, 6 and 7 written out in plain form, in float64."""

import math

import pytest
import torch

from loss import ddspo_loss, diffusion_dpo_loss, distance_change, dspo_loss, preference_loss

NAMES = ["eps_theta_w", "eps_theta_l", "eps_ref_w", "eps_ref_l", "target_w", "target_l"]


def six(seed=0, shape=(5, 4, 3, 2), dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for _ in range(6)]


def plain(pred_w, pred_l, ref_w, ref_l, target_w, target_l, beta):
    """Eq. 6 as the paper writes it, mean for ||.||^2 and beta / 2."""
    def d(a, b):
        return ((a - b) ** 2).flatten(1).mean(1)
    bracket = d(target_w, pred_w) - d(target_w, ref_w) - (d(target_l, pred_l) - d(target_l, ref_l))
    return -torch.log(torch.sigmoid(-beta / 2 * bracket))


def test_by_hand():
    # One number per sample. Winner: (1 - 3)^2 - (1 - 0)^2 = 3. Loser: (2 - 1)^2 - (2 - 4)^2 = -3. Bracket: 3 - (-3) = 6.
    # The logit is -0.5 / 2 * 6 = -1.5, the loss log(1 + exp(1.5)).
    values = [torch.tensor([[x]], dtype=torch.float64) for x in (3.0, 1.0, 0.0, 4.0, 1.0, 2.0)]
    loss, info = preference_loss(*values, 0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(1.5)), rel=1e-14)
    assert [info[k].item() for k in ("winner", "loser", "logit")] == [3.0, -3.0, -1.5]


@pytest.mark.parametrize("beta", [1e-3, 0.7, 20, 16000.0])
def test_the_factored_form_is_the_plain_one(beta):
    x = six()
    if beta > 100:  # stay where the plain form does not overflow
        x = [x[2] + 1e-4 * x[0], x[3] + 1e-4 * x[1], *x[2:]]
    torch.testing.assert_close(preference_loss(*x, beta)[0], plain(*x, beta), rtol=1e-9, atol=0)


def test_beta_can_differ_between_pairs():
    beta = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    loss, _ = preference_loss(*six(), beta)
    one_by_one = [preference_loss(*[t[i:i + 1] for t in six()], b.item())[0] for i, b in enumerate(beta)]
    torch.testing.assert_close(loss, torch.cat(one_by_one), rtol=1e-14, atol=0)
    torch.testing.assert_close(preference_loss(*six(), torch.tensor(0.5))[0], preference_loss(*six(), 0.5)[0])


def test_gradients_are_right():
    x = [t.requires_grad_() for t in six(shape=(2, 3))]
    assert torch.autograd.gradcheck(lambda *x: preference_loss(*x, 1.5)[0], x)


def test_eq_4_is_eq_6_with_the_noise_as_target():
    theta_w, theta_l, ref_w, ref_l, noise_w, noise_l = six()
    def d(a, b):
        return ((a - b) ** 2).flatten(1).mean(1)
    inside = (d(noise_w, theta_w) - d(noise_w, ref_w)) - (d(noise_l, theta_l) - d(noise_l, ref_l))
    loss, _ = diffusion_dpo_loss(theta_w, theta_l, ref_w, ref_l, noise_w, noise_l, 3.0)
    torch.testing.assert_close(loss, torch.log1p(torch.exp(3.0 / 2 * inside)), rtol=1e-12, atol=0)


def test_eq_7_is_eq_6_with_the_reference_as_both_policies():
    theta_w, theta_l, ref_w, ref_l, ref_l_minus, _ = six()
    def d(a, b):
        return ((a - b) ** 2).flatten(1).mean(1)
    inside = d(ref_w, theta_w) - (d(ref_l_minus, theta_l) - d(ref_l_minus, ref_l))  # the winner's second term vanishes
    loss, info = ddspo_loss(theta_w, theta_l, ref_w, ref_l, ref_l_minus, 3.0)
    torch.testing.assert_close(loss, torch.log1p(torch.exp(3.0 / 2 * inside)), rtol=1e-12, atol=0)
    torch.testing.assert_close(info["winner"], d(ref_w, theta_w), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_at_the_reference_the_loss_is_log_2_and_the_winner_has_no_gradient(dtype):
    _, _, ref_w, ref_l, ref_l_minus, _ = six(dtype=dtype)
    theta_w, theta_l = ref_w.clone().requires_grad_(), ref_l.clone().requires_grad_()
    loss, _ = ddspo_loss(theta_w, theta_l, ref_w, ref_l, ref_l_minus, 16000)
    assert (loss == torch.tensor(2.0, dtype=loss.dtype).log()).all()
    loss.sum().backward()
    assert (theta_w.grad == 0).all()
    assert (theta_l.grad != 0).any()


def test_a_step_towards_the_winning_policy_lowers_the_loss_and_one_towards_the_losing_policy_raises_it():
    _, _, ref_w, ref_l, target_w, target_l = six()
    towards_w, _ = preference_loss(ref_w + 0.1 * (target_w - ref_w), ref_l, ref_w, ref_l, target_w, target_l, 1.0)
    towards_l, _ = preference_loss(ref_w, ref_l + 0.1 * (target_l - ref_l), ref_w, ref_l, target_w, target_l, 1.0)
    assert (towards_w < math.log(2)).all() and (towards_l > math.log(2)).all()


def test_exchanging_winner_and_loser_turns_the_logit_round():
    pred_w, pred_l, ref_w, ref_l, target_w, target_l = six()
    there = preference_loss(pred_w, pred_l, ref_w, ref_l, target_w, target_l, 2.0)[1]
    back = preference_loss(pred_l, pred_w, ref_l, ref_w, target_l, target_w, 2.0)[1]
    assert (there["logit"] == -back["logit"]).all() and (there["winner"] == back["loser"]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    half = six(dtype=dtype)
    loss, info = preference_loss(*half, 5.0)
    assert {loss.dtype, *[x.dtype for x in info.values()]} == {torch.float32}
    assert (loss == preference_loss(*[x.float() for x in half], 5.0)[0]).all()
    assert preference_loss(*half[:5], half[5].double(), 5.0)[0].dtype == torch.float64


def test_small_differences_keep_their_digits_in_float32():
    # The model is 1e-4 away from the reference, the target far: a difference of means would lose three digits.
    x = six(shape=(4, 1000))
    x = [x[2] + 1e-4 * x[0], x[3] + 1e-4 * x[1], x[2], x[3], 10 * x[4], 10 * x[5]]
    single = [t.float() for t in x]
    exact = preference_loss(*[t.double() for t in single], 1.0)[1]["logit"]
    torch.testing.assert_close(preference_loss(*single, 1.0)[1]["logit"].double(), exact, rtol=1e-5, atol=0)


def test_huge_logits_stay_finite():
    x = [100 * t for t in six()]
    loss, _ = preference_loss(*x, 16000)
    assert loss.isfinite().all() and loss.max() > 1e6


def test_result_is_detached_per_pair_and_for_one_dimensional_samples_too():
    x = [t.requires_grad_() for t in six(shape=(7,))]
    loss, info = preference_loss(*x, 1.0)
    assert loss.shape == (7,) and loss.requires_grad
    assert all(v.shape == (7,) and not v.requires_grad for v in info.values())
    assert distance_change(*x[:3]).shape == (7,)


@pytest.mark.parametrize("place", range(6))
def test_wrong_shapes_and_integers_are_refused_by_name(place):
    for wrong, message in [(torch.zeros(5, 4, 3, 1), "has shape"), (torch.zeros(5, 4, 3, 2, dtype=torch.int64), "float"),
                           (3.0, "float tensor, not float")]:
        x = six()
        x[place] = wrong
        with pytest.raises(ValueError, match=message):
            preference_loss(*x, 1.0)
    x = six()
    x[place] = x[place].long()
    with pytest.raises(ValueError, match=NAMES[place]):
        preference_loss(*x, 1.0)


def test_empty_batches_and_single_numbers_are_refused():
    with pytest.raises(ValueError, match="non-empty"):
        preference_loss(*six(shape=(0, 3)), 1.0)
    with pytest.raises(ValueError, match="non-empty"):
        preference_loss(*six(shape=()), 1.0)


@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), torch.tensor([1.0, 1, 0, 1, 1])])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        preference_loss(*six(), beta)


@pytest.mark.parametrize("beta", [torch.ones(4), torch.ones(5, 1), torch.ones(5, dtype=torch.int64)])
def test_beta_must_have_one_float_a_pair(beta):
    with pytest.raises(ValueError, match=r"float tensor of shape \(5,\)"):
        preference_loss(*six(), beta)


# ---- DSPO


def test_dspo_is_its_formula_with_the_gradient_also_through_the_sigmoid():
    pred_w, pred_l, ref_w, ref_l, target_w, target_l = torch.randn(6, 3, 4, 5, 5, dtype=torch.float64)
    pred_w, pred_l, beta = pred_w.requires_grad_(), pred_l.requires_grad_(), torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    loss, info = dspo_loss(pred_w, pred_l, ref_w, ref_l, target_w, target_l, beta)

    def m(a, b):
        return (a - b).pow(2).mean((1, 2, 3))

    u = -0.5 * beta * ((m(pred_w, target_w) - m(pred_l, target_l)) - (m(ref_w, target_w) - m(ref_l, target_l)))
    factor = (beta * (1 - u.sigmoid()))[:, None, None, None]
    expected = ((pred_w - target_w) - factor * (pred_w - ref_w)).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(info["logit"], u.detach())
    for ours, theirs in zip(torch.autograd.grad(loss.sum(), [pred_w, pred_l]), torch.autograd.grad(expected.sum(), [pred_w, pred_l])):
        torch.testing.assert_close(ours, theirs)
        assert theirs.abs().max() > 1e-3  # pred_l has a gradient through the sigmoid only
    assert dspo_loss(pred_w, pred_l, ref_w, ref_l, target_w, target_l, 2.0)[0][1] == loss[1]


def test_dspo_with_the_reference_as_winning_policy_is_refused():
    pred_w, pred_l, ref_w, ref_l, target_l = torch.randn(5, 2, 4, 3, 3)
    with pytest.raises(ValueError, match="no gradient at the start"):
        dspo_loss(pred_w, pred_l, ref_w, ref_l, ref_w, target_l, 1.0)


def test_dspo_of_half_precision_is_computed_in_float32():
    predictions = torch.randn(6, 2, 4, 8, 8).bfloat16()
    loss, _ = dspo_loss(*predictions, 3.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dspo_loss(*predictions.float(), 3.0)[0])
