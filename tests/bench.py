"""How fast the training step (Eq. 7) is, beside a plain way of doing the same.

    python tests/bench.py                                             a small U-Net on a CPU (45 s)
    python tests/bench.py --model sd14 --precision fp16 --compile     a network of the published size, on a GPU

Both ways get the same random weights, on which speed does not depend, the same pairs and noise, and run in turns in one
process. Where their losses or gradients differ, no time is printed. On a CPU everything runs on one thread, and the
time is what this process itself uses.

A ratio to the plain way is the median over turns, with the least and the most beside it. "plain, again" is the plain
way once more: its distance from 1 is the measurement's own noise. docs/speed.md keeps the results.
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
from lib import adapters, models
from lib.files import UserError
from lib.plots import markdown_table
from lib.processes import at_least, program
from lib.settings import HALF

RANK = {"mid": 0, "sd14": 0, "sdxl": 0, "sana": 128}  # of LoRA; 0 trains all weights
SIZE = {"mid": 2, "sd14": 24, "sdxl": 2, "sana": 16}  # pairs in a micro-batch


def build(name, device, dtype):
    """A model of tiny_models.SIZES with random weights. SANA's prompts are encoded as random numbers, without Gemma."""
    family, sizes = tiny_models.SIZES[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            tiny_models.FAMILIES[family](**sizes).save_pretrained(folder)
        model = models.load(folder, device, dtype, torch.float32)
    if family == "sana":
        table = torch.randn(128, 300, model.net.config.caption_channels, device=device)
        model.encode = lambda prompts: dict(prompt_embeds=table[[len(p) for p in prompts]],
                                            prompt_attention_mask=torch.ones(len(prompts), 300, device=device))
    return model


def plain_loss(model, policies, c, c_minus, x_0_w, x_0_l, t, eps, beta):
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
    return -F.logsigmoid(-beta / 2 * model.weight(t) * ((error_w - error_l) - (error_ref_w - error_ref_l)))


def our_loss(model, policies, *batch, beta):
    return train.step_loss(model, policies, *batch, "ddspo", beta)[0]


def make_arms(args, device):
    """The model, its trained parameters, a micro-batch, and the arms, {name: (loss function, policies, optimizer)}."""
    half, rank, size = HALF.get(args.precision), RANK[args.model], args.micro_batch or SIZE[args.model]
    model = build(args.model, device, half if half and device.type == "cuda" else torch.float32)
    flags = SimpleNamespace(lora_rank=rank, seed=0, objective="ddspo", winner=None, loser=None)
    policies, networks = train.make_policies(flags, model)
    parameters = [p for p in model.net.parameters() if p.requires_grad]
    with torch.no_grad():  # as after some training, so that the student is not the reference
        for p in parameters:
            p += 1e-3 * torch.randn_like(p) * (p.std(correction=0) if p.any() else 1)
    for net in networks if half else []:
        train.halve(net, half)
    c = [f"a photograph of {10 ** (i % 9) + i} red foxes on a hill" for i in range(size)]  # of several lengths
    c_minus = [f"photograph {10 ** (i % 9) + i} hill" for i in range(size)]
    x_0_w, x_0_l, eps = torch.randn(3, size, *model.latent_shape, device=device)  # (B, channels, h, w) each
    t = torch.randint(model.num_train_timesteps, (size,), device=device)  # (B,)
    default = torch.optim.AdamW(parameters, lr=1e-12)  # so small that all arms keep the same weights
    fused = torch.optim.AdamW(parameters, lr=1e-12, fused=True)
    arms = {"plain": (plain_loss, policies, default), "plain, again": (plain_loss, policies, default),
            "ours": (our_loss, policies, fused)}
    if args.compile:
        theta = torch.compile(model.net)
        ref = adapters.with_adapter(theta) if rank else torch.compile(policies["ref"])
        arms["ours, compiled"] = our_loss, dict(theta=theta, ref=ref), fused
    return SimpleNamespace(model=model, parameters=parameters, batch=(c, c_minus, x_0_w, x_0_l, t, eps), arms=arms,
                           beta=2000 if rank else 16000, precision=args.precision)


def micro_batch(work, arm):
    """One micro-batch as train.py does it: text encoders, loss and backward. Returns the loss (B,)."""
    (loss_of, policies, _), (c, c_minus, *tensors), model = work.arms[arm], work.batch, work.model
    with train.precision(model.device, work.precision):
        loss = loss_of(model, policies, model.encode(c), model.encode(c_minus), *tensors, beta=work.beta)
    loss.sum().backward()
    return loss.detach()


def disagreement(work):
    """What is wrong with the first arm whose loss or gradient is not plain's, or "" if all agree. A NaN is wrong: each
    comparison below is one that NaN fails."""
    limit = 0.1 if work.precision in HALF else 1e-2 if work.precision == "tf32" else 1e-4  # guess
    right = {}
    for arm, (_, _, optimizer) in work.arms.items():
        found = dict(loss=[micro_batch(work, arm).cpu()])
        found["gradient"] = [torch.zeros(1) if p.grad is None else p.grad.cpu() for p in work.parameters]
        optimizer.zero_grad()
        right = right or found
        for what, tensors in found.items():
            off = norms([x - y for x, y in zip(tensors, right[what])]).norm() / norms(right[what]).norm()
            if not off <= limit:
                return f"the {what} of {arm!r} is off by {off:.2g} of plain's"
        size, right_size = norms(found["gradient"]), norms(right["gradient"])  # one for each parameter
        same = (size - right_size).abs() <= 0.1 * right_size + 0.01 * right_size.max()  # guess
        if not same.all():
            return f"{arm!r} has another gradient for {(~same).sum()} of {len(same)} parameters than plain"
    return ""


def norms(tensors):
    return torch.stack([x.norm() for x in tensors])


def seconds(work, arm, parts):
    """How long an update takes: its micro-batches, the mean over its pairs, clipping and the optimizer."""
    gpu, (_, _, optimizer) = work.model.device.type == "cuda", work.arms[arm]
    clock = (lambda: torch.cuda.synchronize() or time.perf_counter()) if gpu else time.process_time
    began = clock()
    for _ in range(parts):
        micro_batch(work, arm)
    for p in work.parameters:
        p.grad /= parts * len(work.batch[-1])
    torch.nn.utils.clip_grad_norm_(work.parameters, train.MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return clock() - began


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=RANK, default="mid")
    parser.add_argument("--precision", choices=["fp16", "bf16", "tf32", "fp32"], default="fp32")
    parser.add_argument("--micro-batch", type=at_least(1), help="pairs at once (default: 2, sd14 24, sana 16)")
    parser.add_argument("--seconds", type=at_least(0, float), default=10, help="for each arm")
    parser.add_argument("--compile", action="store_true", help="one more arm, on a GPU")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and (args.compile or args.model != "mid"):
        raise UserError("on a CPU there is --model mid alone, and no --compile, with which torch 2.13 loses a gradient.")
    if device.type == "cpu":
        torch.set_num_threads(1)
    work, parts = make_arms(args, device), 1 if device.type == "cpu" else 8  # micro-batches in an update (guess)
    if wrong := disagreement(work):
        raise UserError(f"{args.model}: {wrong}: not timed.")
    times, order, end = {arm: [] for arm in work.arms}, [*work.arms], time.perf_counter() + args.seconds * len(work.arms)
    while len(times["plain"]) < 4 or time.perf_counter() < end:  # each turn begins with another arm
        for arm in order:
            times[arm].append(seconds(work, arm, parts))
        order = order[1:] + order[:1]
    times = np.array([times[arm][1:] for arm in work.arms])  # (arms, turns): the first turn only warms up
    ratios, rates = times[0] / times, parts * len(work.batch[-1]) / np.median(times, 1)
    print(markdown_table([f"{args.model}, {args.precision}", "pairs per second", "to plain: median (least, most)"], [
        (arm, f"{rate:.3g}", f"{np.median(row):.2f} ({min(row):.2f}, {max(row):.2f})")
        for arm, rate, row in zip(work.arms, rates, ratios)]))
    print(f"{times.shape[1]} turns of {parts} x {len(work.batch[-1])} pairs")


if __name__ == "__main__":
    main()
