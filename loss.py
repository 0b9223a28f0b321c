"""The preference losses of DDSPO (arXiv 2512.23426), to be read beside Sec. 3.1 to 3.3 of the paper.

A pair of images gives two noisy states at the same time step t, in training with the same noise,

    x_t_w = alpha_t x_0_w + sigma_t eps    (preferred)        x_t_l = alpha_t x_0_l + sigma_t eps    (dispreferred)

and each term of each loss is a squared distance between two predictions made at one of these two states:

    paper                     here              the prediction of                             at
    eps_theta(x_t^w, t, c)    eps_theta_w       the model being trained                       x_t_w, given c
    eps_ref(x_t^w, t, c)      eps_ref_w         its frozen starting point, the reference      x_t_w, given c
    eps_ref(x_t^l, t, c^-)    eps_ref_l_minus   the reference, given the degraded prompt c^-  x_t_l, given c_minus

The loss, Eq. 6, is always the same. The methods differ in their targets, the winning and the losing policy:

    method                              target_w (eps_star^w)       target_l (eps_star^l)
    Diffusion DPO (D-DPO), Eq. 4        the noise that made x_t_w   the noise that made x_t_l
    DDSPO, perturbed prompts, Eq. 7     eps_ref(x_t_w, t, c)        eps_ref(x_t_l, t, c_minus)
    DDSPO, trained policies, Eq. 6      eps_w(x_t_w, t, c)          eps_l(x_t_l, t, c)

Convention. As in the released D-DPO and DDSPO code, to which the paper's beta = 16000 belongs, ||.||^2 is the MEAN over
all non-batch dimensions, and the logit carries beta/2. With D numbers per sample, this is the paper's beta ||.||^2 with
a beta of beta / (2 D): for SD-1.x latents, D = 4 * 64 * 64, 16000 is 0.49. Models that predict a velocity (SD-2.x,
SANA, SD3) put v in the place of eps. SD3 also multiplies beta by a weight of t.
"""

import torch
import torch.nn.functional as F


def preference_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, target_w, target_l, beta):
    """Eq. 6: -log sigmoid(-beta/2 [ ||target_w - eps_theta_w||^2 - ||target_w - eps_ref_w||^2
                                   - (||target_l - eps_theta_l||^2 - ||target_l - eps_ref_l||^2) ]).

    Takes six float tensors of one shape (B, ...), and `beta`, a positive number or a float tensor (B,); anything else
    is a ValueError. Returns (loss, info): `loss` (B,), float32, or float64 if any input is, and detached (B,) tensors:
    `winner` and `loser`, the two differences of distances (negative where theta is closer to the target than ref), and
    `logit`, the sigmoid's argument. Where theta equals ref, both are exactly 0 and the loss is exactly log 2.
    """
    tensors, beta = checked([eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, target_w, target_l], beta)
    eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, target_w, target_l = tensors
    winner = distance_change(target_w, eps_theta_w, eps_ref_w)  # (B,)
    loser = distance_change(target_l, eps_theta_l, eps_ref_l)  # (B,)
    logit = -beta / 2 * (winner - loser)
    return -F.logsigmoid(logit), dict(logit=logit.detach(), winner=winner.detach(), loser=loser.detach())


def distance_change(target, eps_theta, eps_ref):
    """||target - eps_theta||^2 - ||target - eps_ref||^2 per sample: three (B, ...) tensors -> (B,). It is factored,
    because the difference of two large and nearly equal means would lose the digits that matter."""
    return ((eps_theta - eps_ref) * ((eps_theta - target) + (eps_ref - target))).reshape(len(target), -1).mean(1)


def diffusion_dpo_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, noise_w, noise_l, beta):
    """Eq. 4, Diffusion DPO: Eq. 6 with the noise as the target. Shapes, result and errors as in `preference_loss`."""
    return preference_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, noise_w, noise_l, beta)


def ddspo_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, eps_ref_l_minus, beta):
    """Eq. 7, DDSPO with perturbed prompts: ref given c wins, ref given c_minus loses. Else as `preference_loss`. Since
    eps_ref_w is its own target, three passes of ref are enough, and the winner's term is ||eps_theta_w - eps_ref_w||^2,
    a leash whose gradient starts at exactly 0."""
    return preference_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, eps_ref_w, eps_ref_l_minus, beta)


def dspo_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, target_w, target_l, beta):
    """DSPO, a baseline (Direct Score Preference Optimization, ICLR 2025), as in its authors' code for SD-1.5:

        || (eps_theta_w - target_w) - beta (1 - sigmoid(u)) (eps_theta_w - eps_ref_w) ||^2,   u the logit of Eq. 6,

    with the gradient also through u. Its targets are the noise, or the predictions of trained policies."""
    if target_w is eps_ref_w:
        raise ValueError("DSPO with the reference as its own winning policy has no gradient at the start.")
    loss, info = preference_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, target_w, target_l, beta)
    weight = (beta * -torch.expm1(-loss)).view(-1, *[1] * (target_w.ndim - 1))  # beta (1 - sigmoid(u))
    eps_theta_w, eps_ref_w, target_w = (x.to(loss.dtype) for x in (eps_theta_w, eps_ref_w, target_w))
    return ((eps_theta_w - target_w) - weight * (eps_theta_w - eps_ref_w)).square().reshape(len(loss), -1).mean(1), info


def checked(tensors, beta):
    """The arguments of `preference_loss` in the dtype of its result. Raises its errors."""
    names = ("eps_theta_w", "eps_theta_l", "eps_ref_w", "eps_ref_l", "target_w", "target_l")
    for name, x in zip(names, tensors):
        if not torch.is_tensor(x) or not x.is_floating_point():
            raise ValueError(f"{name} must be a float tensor, not {getattr(x, 'dtype', type(x).__name__)}.")
        if x.shape != tensors[0].shape or x.numel() == 0 or x.ndim == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: all six need one non-empty shape (B, ...).")
    dtype = torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32
    if torch.is_tensor(beta):
        if not beta.is_floating_point() or beta.shape not in ((), tensors[0].shape[:1]):
            raise ValueError(f"beta must be a number or a float tensor of shape ({len(tensors[0])},), not {beta}.")
        beta = beta.to(tensors[0].device, dtype)
    if not (torch.is_tensor(beta) and beta.is_cuda) and not torch.as_tensor(beta > 0).all():  # a GPU is not waited for
        raise ValueError(f"beta must be positive, not {beta}.")
    return [x.to(dtype) for x in tensors], beta
