"""How fast it is, beside a plain way of doing the same, measured in one run in turns (facts, not part of the method).

    python bench.py step                          the training step, beside a plain one and the hardware's limit
    python bench.py step --model sd14 sdxl sana   the same for the real networks, with random weights, on a GPU
    torchrun --nproc_per_node 2 bench.py network --model tiny-sd --store pairs/tiny-sd     what an update sends
    python bench.py pairs --model sd14            pairs a second, beside two pipeline calls at batch 4
    python bench.py store --pairs 200000          opening a pair store and reading it, beside a file for each latent

All take what device there is. A model can be a folder of tests/tiny_models.py, to try the commands on a CPU. The toy is
timed by  time python toy2d.py.
"""

import argparse
import json
import math
import os
import random
import statistics
import tempfile
import time
from argparse import Namespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import build_pairs
import models
import train
from perturb import check_flags, write_text
from tests import tiny_models  # pipelines of the real classes without a download

# ---- the training step

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
ARCHITECTURES = {  # the published networks, and one for CPUs: family, sizes, LoRA's rank, pairs at once
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


def build(family, sizes, device):
    """A model with random weights. SANA's text encoder is left out: its prompts are encoded as random numbers."""
    torch.manual_seed(0)
    with torch.device(device):
        pipe = tiny_models.FAMILIES[family](**sizes)
    with tempfile.TemporaryDirectory() as home:
        pipe.scheduler.save_pretrained(os.path.join(home, "scheduler"))
        pipe.register_to_config(_name_or_path=home)
        model = models.FAMILIES[type(pipe).__name__](pipe, torch.device(device))
    pipe.set_progress_bar_config(disable=True)
    if family == "sana":
        table = torch.randn(128, 300, model.net.config.caption_channels, device=device)
        model.encode = lambda prompts: dict(prompt_embeds=table[[len(p) for p in prompts]],
                                            prompt_attention_mask=torch.ones(len(prompts), 300, device=device))
    return model


def naive_loss(model, policies, c, c_minus, x_0_w, x_0_l, t, eps, beta):
    """Eq. 7 as it is commonly written: four samples in two calls of the reference, and differences of means."""
    def join(a, b):
        return torch.cat([a, b]) if torch.is_tensor(a) else {key: torch.cat([a[key], b[key]]) for key in a}

    x_t, tt = model.noise(join(x_0_w, x_0_l), join(t, t), join(eps, eps)), join(t, t)
    pred = model.predict(policies["theta"], x_t, tt, join(c, c)).float()
    with torch.no_grad():
        pred_ref = model.predict(policies["ref"], x_t, tt, join(c, c)).float()
        target = model.predict(policies["ref"], x_t, tt, join(c, c_minus)).float()
    error_w, error_l = (pred - target).square().mean((1, 2, 3)).chunk(2)
    error_ref_w, error_ref_l = (pred_ref - target).square().mean((1, 2, 3)).chunk(2)
    difference = (error_w - error_l) - (error_ref_w - error_ref_l)
    return -F.logsigmoid(-beta / 2 * model.weight(t) * difference)


def our_loss(model, policies, *batch, beta):
    return train.step_loss(model, policies, *batch, "ddspo", beta)[0]


def clock(device):
    """Seconds: of a GPU when its work is done, of a CPU the process's own, which other processes hardly change."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def step(args):
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this torch finds no GPU.")
    if device.type == "cpu":
        torch.set_num_threads(1)
        if {"sd14", "sdxl", "sana"} & set(args.model):
            raise SystemExit("--model sd14, sdxl and sana need a GPU: on a CPU take mid.")
    peak = matmul_peak(device, args.precision)
    print("| model, arm | pairs a second | to naive: median (least, most) | a micro-batch | an update's end | FLOP "
          "utilisation | a micro-batch's memory |\n" + "| --- " * 7 + "|")
    for name in args.model:
        measure(name, args, device, peak)
    after = matmul_peak(device, args.precision)
    print(f"\nmatrix product: {peak / 1e12:.4g} TFLOP/s before, {after / 1e12:.4g} after; {args.precision}")


def measure(name, args, device, peak):
    """Prints a row an arm, timed in turns on the same weights and batches, or stops if they do not do the same."""
    family, sizes, rank, batch_size = ARCHITECTURES[name]
    batch_size, beta = args.micro_batch or batch_size, 2000 if rank else 16000
    model = build(family, sizes, device)
    flags = Namespace(lora_rank=rank, seed=0, objective="ddspo", winner=None, loser=None, beta=beta,
                      precision=args.precision)
    policies, networks = train.make_policies(flags, model)
    parameters, batches = [p for p in model.net.parameters() if p.requires_grad], []
    with torch.no_grad():  # a student that is no more the reference
        for p in parameters:
            p += 1e-3 * torch.randn_like(p) * (p.std(correction=0) if p.any() else 1)
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        x_0_w, x_0_l, eps = torch.randn(3, batch_size, *model.latent_shape, generator=generator).to(device)
        t = torch.randint(model.num_train_timesteps, (batch_size,), generator=generator).to(device)
        c = [f"a photograph of {10 ** (k % 9) + i} red foxes on a hill" for k in range(batch_size)]
        batches.append((c, [f"photograph {p[16:20]} hill" for p in c], x_0_w, x_0_l, t, eps))
    c, _, x_0_w, _, t, eps = batches[0]
    c = model.encode(c)
    floor = train.noise_floor(flags, model, policies["ref"], (c, None, x_0_w, None, t, eps), device)
    half = train.HALF.get(args.precision)
    for net in networks if half else ():
        train.halve(net, half)
    for name_of, part in model.pipe.components.items() if half else ():
        part.to(half) if name_of.startswith("text_encoder") else None
    plain, fused = torch.optim.AdamW(parameters, lr=1e-12), torch.optim.AdamW(parameters, lr=1e-12, fused=True)
    arms = {"naive": (naive_loss, policies, plain), "naive, again": (naive_loss, policies, plain),
            "ours": (our_loss, policies, fused)}
    if args.compile:
        theta = torch.compile(model.net)
        ref = models.with_adapter(theta) if rank else torch.compile(policies["ref"])
        arms["ours, compiled"] = our_loss, dict(theta=theta, ref=ref), fused

    def micro(arm, i):
        loss_of, policies, _ = arms[arm]
        c, c_minus, *rest = batches[i % 4]
        c, c_minus = model.encode(c), model.encode(c_minus)  # as train.py does; one pass for both is no faster
        with train.precision(device, args.precision):
            loss = loss_of(model, policies, c, c_minus, *rest, beta=beta)
        loss.sum().backward()
        return loss.detach()

    def finish(arm, parts=1):
        for p in parameters:
            p.grad /= parts * batch_size
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        arms[arm][-1].step()
        arms[arm][-1].zero_grad()

    # the gate
    right, memory = None, {}
    for arm in arms:
        torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else None
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        result = [micro(arm, 0).cpu()]
        memory[arm] = f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.3g} GB" if before else ""
        result += [p.grad.to("cpu", copy=True) for p in parameters]  # SDXL's would fill the GPU
        right = right or result
        for what, part in (("loss", slice(1)), ("gradient", slice(1, None))):
            wrong = sum((x - y).square().sum() for x, y in zip(result[part], right[part]))
            off = (wrong / sum(y.square().sum() for y in right[part])).sqrt().item()
            if not off < (0.1 if half else 1e-2 if args.precision == "tf32" else 1e-4):
                raise SystemExit(f"{name}: the {what} of {arm!r} is off by {off:.2g} of naive's: nothing is timed.")
        finish(arm)
    del right, result

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with train.precision(device, args.precision):
            model.predict(policies["ref"], x_0_w[:1], t[:1], {key: x[:1] for key, x in c.items()})
    least = (7 if rank else 9) * counter.get_total_flops()  # of a pair; frozen weights have no gradient of their own

    parts, micros, ends, turn = {}, {arm: [] for arm in arms}, {arm: [] for arm in arms}, 0
    for arm in arms:  # warmed up; a turn is about 2 s on a GPU, one step on a CPU
        since = clock(device)
        micro(arm, 1)
        parts[arm] = 1 if device.type == "cpu" else math.ceil(2 / (clock(device) - since))
        finish(arm)
    while turn < 3 or sum(sum(micros[arm]) * parts[arm] for arm in arms) < args.seconds * len(arms):
        for arm in [*arms][turn % len(arms):] + [*arms][:turn % len(arms)]:
            times = [clock(device)]
            for i in range(parts[arm]):
                micro(arm, i)
            times.append(clock(device))
            finish(arm, parts[arm])
            micros[arm].append((times[1] - times[0]) / parts[arm])
            ends[arm].append(clock(device) - times[1])
        turn += 1
    together = batch_size if device.type == "cpu" else 2048  # pairs an update
    a_pair = {arm: [m / batch_size + e / together for m, e in zip(micros[arm], ends[arm])] for arm in arms}
    for arm in arms:
        ratios, rate = [a / b for a, b in zip(a_pair["naive"], a_pair[arm])], 1 / statistics.median(a_pair[arm])
        print(f"| {name}, {arm} | {rate:.3g} | {statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
              f" | {statistics.median(micros[arm]) * 1e3:.3g} ms | {statistics.median(ends[arm]) * 1e3:.3g} ms"
              f" | {rate * least / peak:.0%} | {memory[arm]} |")
    print(f"| {name}: {batch_size} pairs at once, {together} an update, {turn} turns; {least / 1e12:.4g} TFLOP a pair; "
          f"rounding lowers a logit by {floor:.2g} | | | | | | |", flush=True)


def matmul_peak(device, precision):
    """FLOP a second of a large matrix product in this precision: after 3 s of it on a GPU, on one thread of a CPU."""
    n, seconds = (8192, 3) if device.type == "cuda" else (1024, 0.5)
    a, b = torch.randn(2, n, n, device=device, dtype=train.HALF.get(precision, torch.float32))
    rates, since = [], time.perf_counter()
    with train.precision(device, precision):
        while len(rates) < 3 or time.perf_counter() - since < seconds:
            start = clock(device)
            for _ in range(10):
                a @ b
            rates.append(20 * n**3 / (clock(device) - start))
    return statistics.median(rates[len(rates) // 2:])


# ---- what processes send


def network(args):
    """Runs two updates of train.py under torchrun and tells what one process sent, and when."""
    sent, real, since = [], dist.all_reduce, time.perf_counter

    def all_reduce(tensor, *rest, **kinds):
        began = since()
        real(tensor, *rest, **kinds)
        sent.append((tensor.numel() * tensor.element_size(), since() - began))

    dist.all_reduce = all_reduce
    with tempfile.TemporaryDirectory() as home:
        train.main(["--model", args.model, "--pairs", args.store, "--out", home, "--updates", "2", "--batch-size", "32",
                    "--micro-batch", "2", "--beta", "100", "--lr", "1e-6", "--lora-rank", str(args.lora_rank)])
    if os.environ.get("RANK", "0") == "0":
        print(f"2 updates of {16 // int(os.environ.get('WORLD_SIZE', 1))} micro-batches: {len(sent)} calls of "
              f"all_reduce, {sum(size for size, _ in sent)} bytes in all, {sum(s for _, s in sent) * 1e3:.1f} ms")


# ---- making pairs


def naive_pairs(model, rows, args):
    """As two pipeline calls would do it, four prompts at a time: text, its empty counterpart and the images anew."""
    for start in range(0, len(rows), 4):
        part, latents = rows[start:start + 4], []
        x_T = torch.stack([models.initial_noise(row["seed"], model.latent_shape) for row in part])
        for key in ("c", "c_minus"):
            model.empty, c = None, model.encode([row[key] for row in part])
            latents.append(models.sample(model, c, x_T, args.steps, args.guidance))
        yield torch.cat(latents).cpu().split(len(part))


def our_pairs(model, rows, args):
    for start in range(0, len(rows), args.batch_size):
        yield build_pairs.make_latents(model, rows[start:start + args.batch_size], args).values()


def pairs(args):
    """Both ways on the same prompts, noise, model and precision, in turns; stops unless their latents agree."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    if args.random_weights:
        model = build(*ARCHITECTURES[args.model][:2], device)
        model.dtype = dtype
        for part in ("unet", "text_encoder", "text_encoder_2"):
            getattr(model.pipe, part).to(dtype) if hasattr(model.pipe, part) else None
    else:
        model = models.load(args.model, device, dtype)
    if args.compile:
        model.net.compile()
    settings = Namespace(from_images=None, negatives="generated", steps=args.steps or model.steps,
                         guidance=model.guidance, batch_size=args.batch_size)
    rows = [dict(c=f"a photograph of {i} red foxes on a hill", c_minus=f"photograph {i} hill", seed=i)
            for i in range(args.pairs)]
    seconds, latents = {naive_pairs: [], our_pairs: []}, {}
    for turn in range(args.turns + 1):  # the first warms up
        for way in sorted(seconds, key=lambda way, t=turn: (way is our_pairs) == bool(t % 2)):
            since = time.perf_counter()
            made = list(way(model, rows, settings))
            seconds[way].append(time.perf_counter() - since)
            latents[way] = [torch.cat(side).float() for side in zip(*made)]
    worst = max((a - b).abs().max().item() for a, b in zip(*latents.values()))
    if not worst < (0.5 if device == "cuda" else 1e-3):
        raise SystemExit(f"the two ways differ by {worst:.3g}: no time is worth printing.")
    ratios = [a / b for a, b in zip(*(s[1:] for s in seconds.values()))]
    c = model.encode(["a"])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        x_T, t = torch.zeros(1, *model.latent_shape, device=device), torch.zeros(1, dtype=torch.long, device=device)
        model.predict(model.net, x_T, t, c)
    least = 4 * settings.steps * counter.get_total_flops()  # of a pair: two images, each with and without its prompt
    peak = matmul_peak(torch.device(device), "fp16" if device == "cuda" else "fp32")
    for way, s in seconds.items():
        rate = args.pairs / statistics.median(s[1:])
        print(f"{way.__name__}: {rate:.3g} pairs a second, {rate * least / peak:.0%} of a matrix product's speed")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {args.turns} turns), "
          f"latents agree to {worst:.1g}; {args.model}, {settings.steps} steps, batch {args.batch_size}, {device}")


# ---- reading them


def store(args):
    """Writes a store of latents of SD-1.x's size in float16, 33 kB each, and as many single files; then reads both."""
    with tempfile.TemporaryDirectory(dir=args.folder) as home:
        shard_size, files = 128, min(args.pairs, 2000)
        shards = range((args.pairs - 1) // shard_size + 1)
        rows = (dict(id=f"{i:08d}", c="a red fox on a hill, " * 5, c_minus="fox hill " * 5, seed=i,
                     shard=i // shard_size, row=i % shard_size) for i in range(args.pairs))
        write_text(os.path.join(home, "pairs.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
        latents = torch.randn(2, shard_size, 4, 64, 64).half()
        save_file(dict(x_0_w=latents[0], x_0_l=latents[1]), build_pairs.shard_path(home, 0))
        for s in shards[1:]:  # links to one file: a real store of this size would be 13 GB
            os.link(build_pairs.shard_path(home, 0), build_pairs.shard_path(home, s))
        meta = dict(model="sd14", latents=[4, 64, 64], scale=[0.18215, 0.0], negatives="generated", pairs=args.pairs,
                    shard_size=shard_size, table=build_pairs.checksum(os.path.join(home, "pairs.jsonl")),
                    checksums=[build_pairs.checksum(build_pairs.shard_path(home, 0))] * len(shards))
        write_text(os.path.join(home, "meta.json"), json.dumps(meta))
        for i in range(files):
            pair = dict(zip(("x_0_w", "x_0_l"), latents[:, i % shard_size].clone()))
            save_file(pair, os.path.join(home, f"{i}.safetensors"))

        before, since = resident(), time.perf_counter()
        opened = build_pairs.PairStore(home)
        seconds, grown = time.perf_counter() - since, resident() - before
        chosen = random.Random(0).sample(range(args.pairs), min(5000, args.pairs))
        some = [i for i in chosen if opened.rows[i]["shard"] in {opened.rows[c]["shard"] for c in chosen[:50]}]
        for i in some:
            opened[i]  # checksums, and the page cache
        ours, since = [], time.perf_counter()
        for i in some:
            opened[i]
        ours = (time.perf_counter() - since) / len(some)
        since = time.perf_counter()
        for i in some:
            load_file(os.path.join(home, f"{i % files}.safetensors"))
        single = (time.perf_counter() - since) / len(some)
        print(f"{args.pairs} pairs: opened in {seconds:.2f} s, {grown / 1e6:.1f} MB more memory; a pair read in "
              f"{ours * 1e6:.0f} microseconds, from a file of its own in {single * 1e6:.0f}")


def resident():
    """This process's memory in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("step", help="the training step")
    command.set_defaults(run=step)
    command.add_argument("--model", nargs="+", choices=ARCHITECTURES, default=["mid"])
    command.add_argument("--device", choices=["cpu", "cuda"], help="(default: what there is)")
    command.add_argument("--precision", choices=["fp16", "bf16", "tf32", "fp32"], default="fp32")
    command.add_argument("--compile", action="store_true", help="one more arm: ours, compiled")
    command.add_argument("--micro-batch", type=int, help="pairs at once (default: 2, 24, 2, 16)")
    command.add_argument("--seconds", type=float, default=10, help="for each arm")
    command = commands.add_parser("network", help="what processes send")
    command.set_defaults(run=network)
    command.add_argument("--model", required=True, help="as for train.py")
    command.add_argument("--store", required=True, help="its pair store")
    command.add_argument("--lora-rank", type=int, default=0)
    command = commands.add_parser("pairs", help="making pairs")
    command.set_defaults(run=pairs)
    command.add_argument("--model", required=True, help="as for build_pairs.py")
    command.add_argument("--pairs", type=int, default=64, help="how many pairs in a turn")
    command.add_argument("--turns", type=int, default=3)
    command.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    command.add_argument("--batch-size", type=int, default=16, help="pairs at once, ours")
    command.add_argument("--compile", action="store_true", help="torch.compile the network, for both ways")
    command.add_argument("--random-weights", action="store_true", help="mid, sd14 or sdxl, without a download")
    command = commands.add_parser("store", help="reading pairs")
    command.set_defaults(run=store)
    command.add_argument("--pairs", type=int, default=200_000)
    command.add_argument("--folder", help="where to write the store (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    if getattr(args, "random_weights", False) and args.model not in ("mid", "sd14", "sdxl"):
        raise SystemExit("--random-weights goes with --model mid, sd14 or sdxl.")
    check_flags(args, pairs=1, turns=1, steps=1, batch_size=1, micro_batch=1, seconds=0, lora_rank=0)
    args.run(args)


if __name__ == "__main__":
    main()
