"""Sec. 3.3 'Training Pipeline' of DDSPO (arXiv 2512.23426): pairs (x_0_w, x_0_l, c, c_minus) from the reference model.

    torchrun build_pairs.py --model sd14 --prompts perturbed.jsonl        one GPU, or --nproc_per_node of them

x_0_w is generated from c and x_0_l from c_minus, both from the same x_T. They are stored as latents, as the network
sees them (scaled by the VAE's factor), in a pair store, a folder of

    meta.json                   how the pairs were made; once all is there also a checksum for every shard
    pairs.jsonl                 a row a pair: id, c, c_minus, seed (of x_T), shard, row
    shard-00000.safetensors     x_0_w and x_0_l, each (pairs of this shard, channels, height, width)

Shards appear whole or not at all, and pair i depends on row i of the prompts, on seed + i and on nothing else. So a
run that was stopped goes on where it was when the same command is run again, with any number of processes, to the same
store, byte for byte if machine and --batch-size are the same too.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import sys

import diffusers
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import models
from perturb import check_flags, locked, read_rows, stop_if_bad, write_text

# ---- the pair store


class PairStore:
    """A finished pair store, to be read: store[i] -> (row, x_0_w, x_0_l), a dict and two tensors (channels, h, w).

    Stops where the store is unfinished, or its table or a shard is not what was written; a shard is checked when it is
    first opened.
    """

    def __init__(self, folder):
        self.folder, self.meta, self.checked = folder, read_meta(folder), set()
        if "checksums" not in self.meta:
            sys.exit(f"the pair store {folder} is not finished: run the build_pairs.py command that began it again.")
        table = os.path.join(folder, "pairs.jsonl")
        if not os.path.isfile(table) or checksum(table) != self.meta["table"]:
            sys.exit(f"{table} is missing or was changed after the pairs were made: make them anew in another folder.")
        with open(table, encoding="utf-8") as file:
            self.rows = [json.loads(line) for line in file]
        self.shard = functools.lru_cache(maxsize=64)(self.shard)  # open files, of which a process may have about 1000

    def shard(self, number):
        """The opened shard: a safetensors file, mapped into memory."""
        path = shard_path(self.folder, number)
        if number not in self.checked:
            if not os.path.isfile(path) or checksum(path) != self.meta["checksums"][number]:
                sys.exit(f"{path} is missing or damaged: delete it and run its build_pairs.py command again.")
            self.checked.add(number)
        return safe_open(path, framework="pt")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        shard = self.shard(row["shard"])
        return row, shard.get_slice("x_0_w")[row["row"]], shard.get_slice("x_0_l")[row["row"]]


def read_meta(folder):
    """A store's meta.json, as a dict."""
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError):
        sys.exit(f"{path} cannot be read: {folder} is no pair store, or damaged. Make the pairs in another folder.")


def shard_path(folder, number):
    return os.path.join(folder, f"shard-{number:05d}.safetensors")


def checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- making it


def read_perturbed(path):
    """[(id, c, c_minus)] of a file that perturb.py wrote, or of one in its format."""
    if not os.path.isfile(path):
        sys.exit(f"there is no file {path}: make it with  python perturb.py prompts.txt {path}")
    if not path.endswith(".jsonl"):
        sys.exit(f"--prompts {path}: must be the .jsonl file that perturb.py writes.")
    rows = read_rows(path, ["c", "c_minus"])
    stop_if_bad(path, [f"{path}:{number}: c is empty, or c_minus is the same as c: they make no preference"
                       for number, _, c, c_minus in rows if not c or c == c_minus])
    if not rows:
        sys.exit(f"{path} has no prompts in it: make it with  python perturb.py prompts.txt {path}")
    return [row[1:] for row in rows]


def begin(args, rows, model):
    """Writes pairs.jsonl and meta.json, or checks that those which are there are the ones that it would write."""
    settings = dict(model=args.model, sampler=type(model.pipe.scheduler).__name__, steps=args.steps,
                    guidance=args.guidance, seed=args.seed, latents=list(model.latent_shape),
                    scale="times the VAE's scaling_factor", dtype=str(model.net.dtype).removeprefix("torch."),
                    pairs=len(rows), shard_size=args.shard_size)
    table = "".join(json.dumps(dict(id=name, c=c, c_minus=c_minus, seed=args.seed + i, shard=i // args.shard_size,
                                    row=i % args.shard_size), ensure_ascii=False) + "\n"
                    for i, (name, c, c_minus) in enumerate(rows))
    settings["table"] = hashlib.sha256(table.encode()).hexdigest()
    meta_path = os.path.join(args.out, "meta.json")
    if os.path.exists(meta_path):
        meta = read_meta(args.out)
        for key, value in settings.items():
            if meta.get(key) != value:
                what = f"{key} {meta.get(key)}, not {value}"
                what = f"other prompts than {args.prompts} has" if key == "table" else what
                sys.exit(f"the pair store {args.out} was begun with {what}: use the same again, or another --out.")
        return meta
    others = [f for f in os.listdir(args.out) if f != "pairs.jsonl" and not f.endswith(".partial")]
    kept = os.path.join(args.out, "pairs.jsonl")  # a run that was stopped right here has written it already
    if others or (os.path.exists(kept) and checksum(kept) != settings["table"]):
        sys.exit(f"{args.out} holds other files and no meta.json, so it is no pair store: give another --out.")
    settings["versions"] = dict(torch=torch.__version__, diffusers=diffusers.__version__)
    write_text(os.path.join(args.out, "pairs.jsonl"), table)
    write_text(meta_path, json.dumps(settings, indent=1) + "\n")  # last: a store begins with it
    return settings


def make_shard(model, rows, first, args, bar):
    """x_0_w and x_0_l, each (len(rows), channels, h, w), of the pairs first, first + 1, ..."""
    x_0_w, x_0_l = [], []
    for start in range(0, len(rows), args.batch_size):
        names, c, c_minus = zip(*rows[start:start + args.batch_size])
        seeds = range(args.seed + first + start, args.seed + first + start + len(c))
        x_T = torch.stack([models.initial_noise(seed, model.latent_shape) for seed in seeds])
        x_0 = model.sample(model.encode([*c, *c_minus]), torch.cat([x_T, x_T]), args.steps, args.guidance).cpu()
        finite = x_0.isfinite().flatten(1).all(1).view(2, -1).all(0)
        if not finite.all():
            bad = [name for name, ok in zip(names, finite) if not ok]
            sys.exit(f"the latents of the pairs {bad} are not finite: their shard was not written. Leave them out.")
        x_0_w += x_0[:len(c)]
        x_0_l += x_0[len(c):]
        bar.update(len(c))
    return torch.stack(x_0_w), torch.stack(x_0_l)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help=f"{', '.join(models.PRESETS)}, a hub id or a diffusers folder")
    parser.add_argument("--prompts", default="perturbed.jsonl", help="what perturb.py wrote")
    parser.add_argument("--out", help="the pair store (default: pairs/MODEL)")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (script)")
    parser.add_argument("--guidance", type=float, default=7.5, help="guidance scale (script)")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs sampled at once (guess)")
    parser.add_argument("--shard-size", type=int, default=128, help="pairs in a file (guess)")
    parser.add_argument("--seed", type=int, default=0, help="x_T of pair i comes from seed + i")
    args = parser.parse_args(argv)
    args.model = os.path.normpath(args.model)
    args.out = args.out or os.path.join("pairs", os.path.basename(args.model))
    check_flags(args, steps=1, guidance=0, batch_size=1, shard_size=1, seed=0)

    rows = read_perturbed(args.prompts)
    with models.processes() as (rank, world, device), contextlib.ExitStack() as stack:
        if rank == 0:
            stack.enter_context(locked(args.out))
        model = models.load(args.model, device, torch.float16 if device.type == "cuda" else torch.float32)
        if world > 1 and rank > 0:
            dist.barrier()  # the first process alone begins the store
        meta = begin(args, rows, model)
        if world > 1 and rank == 0:
            dist.barrier()
        shards = range((len(rows) - 1) // args.shard_size + 1)
        todo = [s for s in shards if not os.path.exists(shard_path(args.out, s))]
        if "checksums" in meta and not todo:
            store = PairStore(args.out)
            for s in shards:
                store.shard(s)
            print(f"{args.out} is complete: {len(rows)} pairs; nothing was done") if rank == 0 else None
            return
        if world > 1:
            dist.barrier()  # all have seen the same list of shards before any adds to them
        mine = todo[rank::world]
        with tqdm(total=min(len(mine) * args.shard_size, len(rows)), desc="pairs", disable=rank > 0) as bar:
            for s in mine:
                first = s * args.shard_size
                x_0_w, x_0_l = make_shard(model, rows[first:first + args.shard_size], first, args, bar)
                save_file(dict(x_0_w=x_0_w, x_0_l=x_0_l), shard_path(args.out, s) + ".partial")
                os.replace(shard_path(args.out, s) + ".partial", shard_path(args.out, s))
        if world > 1:
            dist.barrier()
        if rank == 0:
            meta["checksums"] = [checksum(shard_path(args.out, s)) for s in shards]
            write_text(os.path.join(args.out, "meta.json"), json.dumps(meta, indent=1) + "\n")
            print(f"wrote {args.out}: {len(rows)} pairs in {len(shards)} shards")


if __name__ == "__main__":
    main()
