"""How fast it is, beside a plain way of doing the same, measured in one run in turns (facts, not part of the method).

    python bench.py pairs --model sd14            pairs a second, beside two pipeline calls at batch 4
    python bench.py store --pairs 200000          opening a pair store and reading it, beside a file for each latent

Both take what device there is. A model can be a folder of tests/tiny_models.py, to try the commands on a CPU.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from argparse import Namespace

import torch
from safetensors.torch import load_file, save_file

import build_pairs
import models
from perturb import check_flags, write_text

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
    model = models.load(args.model, device, torch.float16 if device == "cuda" else torch.float32)
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
    for way, s in seconds.items():
        print(f"{way.__name__}: {args.pairs / statistics.median(s[1:]):.2f} pairs a second")
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
    command = commands.add_parser("pairs", help="making pairs")
    command.set_defaults(run=pairs)
    command.add_argument("--model", required=True, help="as for build_pairs.py")
    command.add_argument("--pairs", type=int, default=64, help="how many pairs in a turn")
    command.add_argument("--turns", type=int, default=3)
    command.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    command.add_argument("--batch-size", type=int, default=16, help="pairs at once, ours")
    command.add_argument("--compile", action="store_true", help="torch.compile the network, for both ways")
    command = commands.add_parser("store", help="reading pairs")
    command.set_defaults(run=store)
    command.add_argument("--pairs", type=int, default=200_000)
    command.add_argument("--folder", help="where to write the store (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    numbers = ("pairs", "turns", "steps", "batch_size")
    check_flags(args, **{name: 1 for name in numbers if getattr(args, name, None) is not None})
    args.run(args)


if __name__ == "__main__":
    main()
