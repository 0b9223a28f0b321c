"""How fast the training step (Eq. 7) and the making of pairs are, beside a plain way of doing the same.

    python tests/bench.py step                        the step of a small U-Net on a CPU (45 s)
    python tests/bench.py step --model sd14 sana sdxl --precision fp16 --compile     published networks on a GPU
    python tests/bench.py pairs --model sd14          making pairs; --random-weights needs no download

Both ways get the same weights, pairs and noise, and run in turns in one process. Where their losses, gradients or
latents differ, no time is printed. `step` gives its networks random weights, on which speed does not depend. On a CPU
everything runs on one thread, and the time is what this process itself uses.

How to read it: a ratio to the plain way is the median over turns, with the least and the most beside it. "plain, again"
is the plain way once more: its distance from 1 is the measurement's own noise. Utilisation is the arithmetic that the
method needs (nine forward passes for a pair, seven with LoRA) per second, as a share of what a large matrix product
reaches in the same process. docs/speed.md keeps the results.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
from argparse import Namespace

import numpy as np
import tiny_models
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the programs are one folder up

import build_pairs
import train
from lib import adapters, models
from lib.files import UserError
from lib.processes import at_least, program

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
ARCHITECTURES = {  # a network for CPUs and three published ones: family, sizes, LoRA's rank, pairs in a micro-batch
    "mid": ("sd", dict(
        net=dict(sample_size=16, block_out_channels=(64, 128, 256), norm_num_groups=32, attention_head_dim=8,
                 cross_attention_dim=256, down_block_types=(CROSS_DOWN, CROSS_DOWN, DOWN),
                 up_block_types=(UP, CROSS_UP, CROSS_UP)),
        text=dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)), 0, 2),
    "sd14": ("sd", dict(
        net=dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, norm_num_groups=32,
                 attention_head_dim=8, cross_attention_dim=768, down_block_types=(CROSS_DOWN,) * 3 + (DOWN,),
                 up_block_types=(UP,) + (CROSS_UP,) * 3), text=CLIP_L), 0, 24),
    "sdxl": ("sdxl", dict(
        net=dict(sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, norm_num_groups=32,
                 attention_head_dim=[5, 10, 20], transformer_layers_per_block=[1, 2, 10], cross_attention_dim=2048,
                 use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
                 projection_class_embeddings_input_dim=2816, down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
                 up_block_types=(CROSS_UP, CROSS_UP, UP)), text=CLIP_L,
        text_2=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                    projection_dim=1280)), 0, 2),
    "sana": ("sana", dict(
        net=dict(sample_size=32, in_channels=32, out_channels=32, num_attention_heads=36, attention_head_dim=32,
                 num_layers=28, num_cross_attention_heads=16, cross_attention_head_dim=72, cross_attention_dim=1152,
                 caption_channels=2304)), 128, 16)}
HEADER = "| model, way | pairs per second | to plain: median (least, most) | utilisation |\n" + "| --- " * 4 + "|"

# ---- the same for both commands


def choose_device(args):
    """A GPU if there is one, else one thread of the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if args.compile:
        raise UserError("--compile is for GPUs: torch 2.13's compiler for CPUs loses the gradient of a U-Net's "
                        "downsampling.")
    torch.set_num_threads(1)
    return torch.device("cpu")


def build(name, device, dtype=torch.float32, net_dtype=None):
    """A model of ARCHITECTURES with random weights, loaded from a folder as any other. SANA's text encoder is left out:
    its prompts are encoded as random numbers."""
    family, sizes, _, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            tiny_models.FAMILIES[family](**sizes).save_pretrained(folder)
        model = models.load(folder, device, dtype, net_dtype)
    if family == "sana":
        table = torch.randn(128, 300, model.net.config.caption_channels, device=device)
        model.encode = lambda prompts: dict(prompt_embeds=table[[len(p) for p in prompts]],
                                            prompt_attention_mask=torch.ones(len(prompts), 300, device=device))
    return model


def make_rows(n):
    """Rows as a pair store has them, with prompts of several lengths."""
    return [dict(id=i, noise_seed=i, c=f"a photograph of {10 ** (i % 9) + i} red foxes on a hill",
                 c_minus=f"photograph {10 ** (i % 9) + i} hill") for i in range(n)]


def clock(device):
    """Seconds: on a GPU, once its work is done; on a CPU, this process's own, which other processes hardly change."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(ways, device, turns, seconds=0):
    """Times the ways, {name: function}, in turns, each of which begins with another way: at least so many turns, and
    about so many seconds for each way. Returns the seconds that they took, {name: (turns,)}."""
    times, order, end = {name: [] for name in ways}, list(ways), time.perf_counter() + seconds * len(ways)
    while len(times["plain"]) <= turns or time.perf_counter() < end:
        for name in order:
            began = clock(device)
            ways[name]()
            times[name].append(clock(device) - began)
        order = order[1:] + order[:1]
    return {name: np.array(found[1:]) for name, found in times.items()}  # the first turn only warms up


def report(model, times, pairs, flops, peak, how):
    """Prints a row for each way, from the seconds that it took for so many pairs and the arithmetic of one pair, and a
    row that says how this was measured."""
    for way, seconds in times.items():
        rate, ratios = pairs / np.median(seconds), times["plain"] / seconds
        print(f"| {model}, {way} | {rate:.3g} | {np.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f}) | "
              f"{rate * flops / peak:.0%} |")
    print(f"| {model}: {len(seconds)} turns, {how} | | | |", flush=True)


def pass_flops(model, net):
    """The floating-point operations of one pass of a network for one image."""
    c, t = model.encode(["a"]), torch.zeros(1, dtype=torch.long, device=model.device)
    x_t = torch.zeros(1, *model.latent_shape, device=model.device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.predict(net, x_t, t, c)
    return counter.get_total_flops()


def matmul_peak(device, precision):
    """The floating-point operations per second of a large matrix product: on a GPU over 3 s, so that it is as warm as
    in a run."""
    n, seconds = (8192, 3) if device.type == "cuda" else (1024, 1)
    a, b = torch.randn(2, n, n, device=device, dtype=train.HALF.get(precision, torch.float32))
    rates, end = [], time.perf_counter() + seconds
    with train.precision(device, precision):
        while time.perf_counter() < end:
            began = clock(device)
            for _ in range(10):
                a @ b
            rates.append(20 * n**3 / (clock(device) - began))
    return np.median(rates[len(rates) // 2:])


# ---- the training step


def plain_loss(model, policies, c, c_minus, x_0_w, x_0_l, t, eps, beta):
    """Eq. 7 as it is commonly written: the reference sees four samples in two calls, and the logit is a difference of
    means. Arguments and result are those of train.step_loss."""
    x_t, tt = torch.cat([model.noise(x_0_w, t, eps), model.noise(x_0_l, t, eps)]), torch.cat([t, t])  # (2B, ...), (2B,)
    c_and_c = {name: torch.cat([x, x]) for name, x in c.items()}
    c_and_minus = {name: torch.cat([x, c_minus[name]]) for name, x in c.items()}
    pred = model.predict(policies["theta"], x_t, tt, c_and_c).float()  # (2B, channels, h, w)
    with torch.no_grad():
        pred_ref = model.predict(policies["ref"], x_t, tt, c_and_c).float()
        target = model.predict(policies["ref"], x_t, tt, c_and_minus).float()
    error_w, error_l = (pred - target).square().mean((1, 2, 3)).chunk(2)  # (B,), (B,)
    error_ref_w, error_ref_l = (pred_ref - target).square().mean((1, 2, 3)).chunk(2)
    difference = (error_w - error_l) - (error_ref_w - error_ref_l)
    return -F.logsigmoid(-beta / 2 * model.weight(t) * difference)


def our_loss(model, policies, *batch, beta):
    return train.step_loss(model, policies, *batch, "ddspo", beta)[0]


def prepare(name, args, device):
    """What `step` times of a model: its arms, {name: (loss function, policies, optimizer)}, its trained parameters and
    a micro-batch."""
    *_, rank, size = ARCHITECTURES[name]
    size, half = args.micro_batch or size, train.HALF.get(args.precision)
    model = build(name, device, half if half and device.type == "cuda" else torch.float32, torch.float32)
    flags = Namespace(lora_rank=rank, seed=0, objective="ddspo", winner=None, loser=None)
    policies, networks = train.make_policies(flags, model)
    parameters = [p for p in model.net.parameters() if p.requires_grad]
    with torch.no_grad():  # as after some training, so that the student is not the reference
        for p in parameters:
            p += 1e-3 * torch.randn_like(p) * (p.std(correction=0) if p.any() else 1)

    c, c_minus = ([row[key] for row in make_rows(size)] for key in ("c", "c_minus"))
    x_0_w, x_0_l, eps = torch.randn(3, size, *model.latent_shape, device=device)  # (B, channels, h, w) each
    t = torch.randint(model.num_train_timesteps, (size,), device=device)  # (B,)
    flops = (7 if rank else 9) * pass_flops(model, policies["ref"])  # LoRA: frozen weights have no gradient
    for net in networks if half else []:
        train.halve(net, half)
    default = torch.optim.AdamW(parameters, lr=1e-12)  # so small that all arms keep the same weights
    fused = torch.optim.AdamW(parameters, lr=1e-12, fused=True)
    arms = {"plain": (plain_loss, policies, default), "plain, again": (plain_loss, policies, default),
            "ours": (our_loss, policies, fused)}
    if args.compile:
        theta = torch.compile(model.net)
        ref = adapters.with_adapter(theta) if rank else torch.compile(policies["ref"])
        arms["ours, compiled"] = our_loss, dict(theta=theta, ref=ref), fused
    return Namespace(model=model, arms=arms, parameters=parameters, batch=(c, c_minus, x_0_w, x_0_l, t, eps), size=size,
                     parts=1 if device.type == "cpu" else 8,  # micro-batches in an update (guess)
                     beta=2000 if rank else 16000, precision=args.precision, device=device, flops=flops)


def micro_batch(work, arm):
    """One micro-batch as train.py does it: text encoders, loss and backward. Returns the loss (B,)."""
    loss_of, policies, _ = work.arms[arm]
    c, c_minus, *tensors = work.batch
    c, c_minus = work.model.encode(c), work.model.encode(c_minus)
    with train.precision(work.device, work.precision):
        loss = loss_of(work.model, policies, c, c_minus, *tensors, beta=work.beta)
    loss.sum().backward()
    return loss.detach()


def update(work, arm):
    """One update: its micro-batches, the mean over its pairs, clipping and the optimizer."""
    for _ in range(work.parts):
        micro_batch(work, arm)
    for p in work.parameters:
        p.grad /= work.size * work.parts
    torch.nn.utils.clip_grad_norm_(work.parameters, train.MAX_GRAD_NORM)
    _, _, optimizer = work.arms[arm]
    optimizer.step()
    optimizer.zero_grad()


def disagreement(work):
    """What is wrong with the first arm whose loss or gradient is not plain's, or "" if all agree. A NaN is wrong: each
    comparison below is one that NaN fails."""
    limit = 0.1 if work.precision in train.HALF else 1e-2 if work.precision == "tf32" else 1e-4  # guess
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


def time_model(name, args, device, peak):
    """Prints a row for each arm. If the arms disagree it prints one row, which says so, and returns False."""
    work = prepare(name, args, device)
    wrong = disagreement(work)
    if wrong:
        print(f"| {name}: {wrong}: not timed | | | |", flush=True)
        return False
    times = take_turns({arm: functools.partial(update, work, arm) for arm in work.arms}, device, 3, args.seconds)
    report(name, times, work.size * work.parts, work.flops, peak, f"updates of {work.parts} x {work.size} pairs, "
           f"{work.flops / 1e12:.4g} TFLOP a pair, {args.precision}")
    return True


def step(args, device):
    if device.type == "cpu" and {"sd14", "sdxl", "sana"} & set(args.model):
        raise UserError("--model sd14, sdxl and sana need a GPU: on a CPU take mid.")
    peak = matmul_peak(device, args.precision)
    print(HEADER)
    failed = [name for name in args.model if not time_model(name, args, device, peak)]
    if failed:
        raise UserError(f"not timed, because their arms disagree: {', '.join(failed)}.")


# ---- making pairs


def plain_pairs(model, rows, args):
    """Two pipeline calls for four prompts at a time -> latents (2, pairs, channels, h, w)."""
    parts = []
    for start in range(0, len(rows), 4):
        part = rows[start:start + 4]
        x_T = torch.stack([models.initial_noise(row["noise_seed"], model.latent_shape) for row in part])
        sides = [models.sample(model, [row[key] for row in part], x_T, args.steps, args.guidance)
                 for key in ("c", "c_minus")]
        parts.append(torch.stack(sides).float().cpu())
    return torch.cat(parts, 1)


def our_pairs(model, rows, args):
    """As build_pairs.py makes them -> latents (2, pairs, channels, h, w)."""
    made = load(build_pairs.make_shard(model, rows, args, tqdm(disable=True), None))
    return torch.stack([made["x_0_w"], made["x_0_l"]]).float()


def pairs(args, device):
    if args.random_weights and args.model not in ("mid", "sd14", "sdxl"):
        raise UserError("--random-weights goes with --model mid, sd14 or sdxl.")
    precision, dtype = ("fp16", torch.float16) if device.type == "cuda" else ("fp32", torch.float32)
    model = (build if args.random_weights else models.load)(args.model, device, dtype)
    if args.compile:
        model.net.compile()
    settings = Namespace(from_images=None, negatives="generated", steps=args.steps or model.steps,
                         guidance=model.guidance, batch_size=args.batch_size)
    rows = make_rows(args.pairs)
    ways = dict(plain=functools.partial(plain_pairs, model, rows, settings),
                ours=functools.partial(our_pairs, model, rows, settings))
    worst = (ways["plain"]() - ways["ours"]()).abs().max().item()  # NaN if there is one anywhere
    if not worst <= (0.5 if device.type == "cuda" else 1e-3):  # guess
        raise UserError(f"the two ways differ by {worst:.3g}: no time is worth printing.")
    flops = 4 * settings.steps * pass_flops(model, model.net)  # two images, each with and without its prompt
    print(HEADER)
    times = take_turns(ways, device, args.turns)
    report(args.model, times, args.pairs, flops, matmul_peak(device, precision), f"{settings.steps} steps, batches of "
           f"{args.batch_size} pairs, latents agree to {worst:.1g}, {precision}")


@program
def main(argv=None):
    parser = argparse.ArgumentParser(usage="bench.py step or pairs [flags]", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    of_step = commands.add_parser("step", help="the training step")
    of_step.set_defaults(run=step)
    of_step.add_argument("--model", nargs="+", choices=ARCHITECTURES, default=["mid"])
    of_step.add_argument("--precision", choices=["fp16", "bf16", "tf32", "fp32"], default="fp32")
    of_step.add_argument("--micro-batch", type=at_least(1), help="pairs at once (default: 2, 24, 2, 16)")
    of_step.add_argument("--seconds", type=at_least(0, float), default=10, help="for each arm")
    of_pairs = commands.add_parser("pairs", help="making pairs")
    of_pairs.set_defaults(run=pairs)
    of_pairs.add_argument("--model", required=True, help="as for build_pairs.py")
    of_pairs.add_argument("--random-weights", action="store_true", help="of mid, sd14 or sdxl, without a download")
    of_pairs.add_argument("--pairs", type=at_least(1), default=64, help="how many pairs in a turn")
    of_pairs.add_argument("--turns", type=at_least(1), default=3)
    of_pairs.add_argument("--steps", type=at_least(1), help="sampling steps (default: the model's)")
    of_pairs.add_argument("--batch-size", type=at_least(1), default=16, help="pairs at once, ours")
    for command in (of_step, of_pairs):
        command.add_argument("--compile", action="store_true", help="on a GPU: one more arm of step, both ways of pairs")
    args = parser.parse_args(argv)
    args.run(args, choose_device(args))


if __name__ == "__main__":
    main()
