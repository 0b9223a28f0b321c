"""The preference losses of DDSPO (arXiv 2512.23426), to be read beside Sec. 3.1 to 3.3 of the paper.

A pair of images gives two noisy states at the same time step t, in training with the same noise,

    x_t_w = alpha_t x_0_w + sigma_t eps    (preferred)        x_t_l = alpha_t x_0_l + sigma_t eps    (dispreferred)

and each term of each loss is a squared distance between two predictions made at one of these two states:

    paper                     here              the prediction of                             at
    eps_theta(x_t^w, t, c)    eps_theta_w       the model being trained                       x_t_w, given c
    eps_ref(x_t^w, t, c)      eps_ref_w         its frozen starting point, the reference      x_t_w, given c
    eps_ref(x_t^l, t, c^-)    eps_ref_l_minus   the reference, given the degraded prompt c^-  x_t_l, given c_minus
    eps_star^w, eps_star^l    target_w, _l      the winning and the losing policy             x_t_w, x_t_l

The loss, Eq. 6, is always the same. The methods differ in their targets, and in nothing else:

    method                              target_w                    target_l
    Diffusion DPO (D-DPO), Eq. 4        the noise that made x_t_w   the noise that made x_t_l
    DDSPO, perturbed prompts, Eq. 7     eps_ref(x_t_w, t, c)        eps_ref(x_t_l, t, c_minus)
    DDSPO, trained policies, Eq. 6      eps_w(x_t_w, t, c)          eps_l(x_t_l, t, c)

DSPO, a baseline of another paper (ICLR 2025), puts the same logit into a squared error: `dspo_loss`.

Convention. The paper writes beta ||.||^2. As in the released D-DPO and DDSPO code, to which the paper's beta = 16000
belongs, ||.||^2 here is the MEAN over all non-batch dimensions and the logit carries beta/2. With D numbers per sample,
this beta is the sum form's beta_sum = beta / (2 D): for SD-1.x latents, D = 4 * 64 * 64, 16000 is 0.49.
Models that predict a velocity (SD-2.x, SANA, SD3) put v in the place of eps. SD3 also multiplies beta by a weight of t.
"""

import torch
import torch.nn.functional as F


def preference_loss(pred_w, pred_l, ref_w, ref_l, target_w, target_l, beta):
    """Eq. 6: -log sigmoid(-beta/2 [ ||target_w - pred_w||^2 - ||target_w - ref_w||^2
                                   - (||target_l - pred_l||^2 - ||target_l - ref_l||^2) ]).

    Takes six tensors of one shape (B, ...), of any float type, and `beta`, a positive number or a float tensor (B,).
    Returns (loss, info). `loss`, shape (B,), is per pair, so that time-step weights can multiply it; it is float32, or
    float64 if any input is. `info` holds detached (B,) tensors: `winner` and `loser`, the two differences of distances
    (negative where the model is closer to the target than the reference is), and `logit`, the sigmoid's argument.
    Where the model equals the reference, both differences are exactly 0 and the loss is exactly log 2.
    Raises ValueError for tensors that are not float or not of one shape, and for a beta that is not positive.
    """
    tensors = dict(pred_w=pred_w, pred_l=pred_l, ref_w=ref_w, ref_l=ref_l, target_w=target_w, target_l=target_l)
    dtype = torch.float32
    for name, x in tensors.items():
        if not torch.is_tensor(x) or not x.is_floating_point():
            raise ValueError(f"{name} must be a float tensor, not {getattr(x, 'dtype', type(x).__name__)}.")
        if x.shape != pred_w.shape or x.numel() == 0 or x.ndim == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; all predictions and targets must have one non-empty "
                             f"shape (B, ...), and pred_w has {tuple(pred_w.shape)}.")
        dtype = torch.promote_types(dtype, x.dtype)
    if torch.is_tensor(beta):
        if not beta.is_floating_point() or beta.shape not in ((), pred_w.shape[:1]):
            raise ValueError(f"beta must be a number or a float tensor of shape ({len(pred_w)},), one entry a pair, "
                             f"not {beta.dtype} of shape {tuple(beta.shape)}.")
        beta = beta.to(pred_w.device, dtype)
    if not (torch.is_tensor(beta) and beta.is_cuda) and not torch.as_tensor(beta > 0).all():  # a GPU is not waited for
        raise ValueError(f"beta must be positive, not {beta}.")

    pred_w, pred_l, ref_w, ref_l, target_w, target_l = (x.to(dtype) for x in tensors.values())
    winner = distance_change(target_w, pred_w, ref_w)
    loser = distance_change(target_l, pred_l, ref_l)
    logit = -beta / 2 * (winner - loser)
    info = dict(logit=logit.detach(), winner=winner.detach(), loser=loser.detach())
    return -F.logsigmoid(logit), info


def distance_change(target, pred, ref):
    """||target - pred||^2 - ||target - ref||^2 per sample: three (B, ...) tensors -> (B,).

    Computed as <pred - ref, (pred - target) + (ref - target)>, which is the same number: the plain difference of two
    large and nearly equal means would lose the digits that matter, since pred stays close to ref.
    """
    return ((pred - ref) * ((pred - target) + (ref - target))).reshape(len(pred), -1).mean(1)


def diffusion_dpo_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, noise_w, noise_l, beta):
    """Eq. 4, Diffusion DPO: Eq. 6 with the noise as the target. Shapes, result and errors as in `preference_loss`."""
    return preference_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, noise_w, noise_l, beta)


def ddspo_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, eps_ref_l_minus, beta):
    """Eq. 7, DDSPO with perturbed prompts: Eq. 6 with the reference given c as the winning policy and the reference
    given c_minus as the losing one. Shapes, result and errors as in `preference_loss`.

    The winner's reference prediction is its own target, so ||target_w - ref_w||^2 vanishes: three passes of the
    reference are enough, and the winner's term is a leash, ||pred_w - ref_w||^2, whose gradient starts at exactly 0.
    """
    return preference_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, eps_ref_w, eps_ref_l_minus, beta)


def dspo_loss(pred_w, pred_l, ref_w, ref_l, target_w, target_l, beta):
    """DSPO (Direct Score Preference Optimization, ICLR 2025) in the form of its authors' code for SD-1.5:

        || (pred_w - target_w) - beta (1 - sigmoid(u)) (pred_w - ref_w) ||^2,   u the logit of Eq. 6 with the same beta,

    with the gradient also through u. Shapes, result and errors as in `preference_loss`; the targets are the noise, or a
    winning and a losing policy's predictions. The reference as its own winning policy is a ValueError: then loss and
    gradient would both be 0 at the start, and nothing would be learned.
    """
    if target_w is ref_w:
        raise ValueError("DSPO with the reference's prediction as target_w has no gradient at the start: give the "
                         "noise, or the prediction of a trained winning policy.")
    loss, info = preference_loss(pred_w, pred_l, ref_w, ref_l, target_w, target_l, beta)
    weight = beta * -torch.expm1(-loss)  # beta (1 - sigmoid(u)), since loss is -log sigmoid(u)
    pred_w, ref_w, target_w = (x.to(loss.dtype) for x in (pred_w, ref_w, target_w))
    weight = weight.view(-1, *[1] * (pred_w.ndim - 1))
    return ((pred_w - target_w) - weight * (pred_w - ref_w)).square().reshape(len(pred_w), -1).mean(1), info
