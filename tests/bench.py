"""How fast the training step (Eq. 7) is, beside a plain way of doing the same.

    python tests/bench.py                                                    a small U-Net on a CPU (45 s)
    python tests/bench.py --model sd14 --micro-batch 24 --precision fp16     a network of the published size, on a GPU

Both ways get the same random weights, on which speed does not depend, the same pairs and noise, and run in turns. Where
their losses or gradients differ, no time is printed. A CPU works on one thread, and its time is what this process uses.
The ratio to the plain way is a median over turns; that of "plain, again" is the measurement's own noise.
"""

import argparse
import os
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import tiny_models
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the programs are one folder up

import train
from lib import models
from lib.files import UserError
from lib.processes import at_least, program
from lib.settings import HALF


def plain_loss(model, policies, c, c_minus, x_0_w, x_0_l, t, eps, objective, beta):
    """Eq. 7 as it is commonly written: the reference sees four samples in two calls, and the logit is a difference of
    means. Arguments and result are those of train.step_loss."""
    x_t, tt = torch.cat([model.noise(x_0_w, t, eps), model.noise(x_0_l, t, eps)]), torch.cat([t, t])  # (2B, ...), (2B,)
    c_and_c = {name: torch.cat([x, x]) for name, x in c.items()}
    c_and_minus = {name: torch.cat([x, c_minus[name]]) for name, x in c.items()}
    eps_theta = model.predict(policies["theta"], x_t, tt, c_and_c).float()  # (2B, channels, h, w)
    with torch.no_grad():
        eps_ref = model.predict(policies["ref"], x_t, tt, c_and_c).float()
        target = model.predict(policies["ref"], x_t, tt, c_and_minus).float()
    error_w, error_l = (eps_theta - target).square().mean((1, 2, 3)).chunk(2)  # (B,), (B,)
    error_ref_w, error_ref_l = (eps_ref - target).square().mean((1, 2, 3)).chunk(2)
    return -F.logsigmoid(-beta / 2 * model.weight(t) * ((error_w - error_l) - (error_ref_w - error_ref_l))), {}


def make_run(args, device):
    """A run as train.py has it, but with random weights, and with one micro-batch for all steps."""
    family, sizes = tiny_models.SIZES[args.model]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            tiny_models.FAMILIES[family](**sizes).save_pretrained(folder)
        model = models.load(folder, device, HALF.get(args.precision, torch.float32), torch.float32)
    policies, networks = train.make_policies(args, model)
    for p in model.net.parameters():
        if p.requires_grad:  # as after some training: the student is not the reference
            p.data += 1e-3 * torch.randn_like(p)
    x_0_w, x_0_l, eps = torch.randn(3, args.micro_batch, *model.latent_shape, device=device)  # (B, channels, h, w) each
    t = torch.randint(model.num_train_timesteps, (args.micro_batch,), device=device)  # (B,)
    return SimpleNamespace(args=args, model=model, policies=policies, networks=networks, precision=args.precision,
                           tensors=(x_0_w, x_0_l, t, eps))


def micro_batch(run, step_loss):
    """A micro-batch as in train.py: text encoders, loss and backward. Returns how many seconds it took, and the loss
    (B,) and the gradients, {what it is: tensor}."""
    model, clock = run.model, time.process_time if run.model.device.type == "cpu" else time.perf_counter
    model.net.zero_grad()
    began = clock()
    with train.precision(model.device, run.precision):
        c, c_minus = (model.encode([text] * run.args.micro_batch) for text in ("a red fox on a hill", "fox hill"))
        loss, _ = step_loss(model, run.policies, c, c_minus, *run.tensors, "ddspo", 2000)
    loss.sum().backward()
    loss = loss.detach().cpu()  # this waits for the GPU
    gradients = {f"gradient of {name}": p.grad for name, p in model.net.named_parameters() if p.grad is not None}
    return clock() - began, dict(loss=loss) | gradients


def compare(arm, found, right, limit):
    """Raises UserError if the loss or a gradient of an arm is not the right one. NaN never is."""
    largest = max(x.norm() for what, x in right.items() if what != "loss")
    for what, x in right.items():
        slack = 0 if what == "loss" else 0.1 * largest  # guess: half precision blurs a small gradient
        if not (what in found and (found[what] - x).norm() <= limit * (x.norm() + slack)):
            raise UserError(f"{arm}: another {what} than that of the plain step, so that nothing is timed.")


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=tiny_models.SIZES, default="mid")
    add("--precision", choices=["fp16", "bf16", "tf32", "fp32"], default="fp32")
    add("--micro-batch", type=at_least(1), default=2, help="pairs at once")
    add("--lora-rank", type=at_least(0), default=0, help="0: all weights")
    add("--seconds", type=at_least(0, float), default=30, help="for all turns")
    add("--compile", action="store_true", help="torch.compile the networks, on a GPU")
    parser.set_defaults(seed=0, objective="ddspo", winner=None, loser=None, checkpointing=False)  # as train.py's flags
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    run = make_run(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    _, right = micro_batch(run, plain_loss)
    train.prepare(run)  # it halves and compiles, and what that breaks is noticed below
    limit = 0.1 if args.precision in HALF else 1e-2 if args.precision == "tf32" else 1e-4  # guess
    arms = {"plain": plain_loss, "plain, again": plain_loss, "ours": train.step_loss}
    for arm, step_loss in arms.items():
        compare(arm, micro_batch(run, step_loss)[1], right, limit)
    times, end = {arm: [] for arm in arms}, time.perf_counter() + args.seconds
    while len(times["plain"]) < 3 or time.perf_counter() < end:
        for arm, step_loss in arms.items():
            times[arm].append(micro_batch(run, step_loss)[0])
    for arm in arms:
        ratio = np.array(times["plain"]) / times[arm]
        print(f"{arm}: {args.micro_batch / np.median(times[arm]):.3g} pairs per second, {np.median(ratio):.2f} (from "
              f"{min(ratio):.2f} to {max(ratio):.2f}) times plain's, {len(ratio)} turns")


if __name__ == "__main__":
    main()
