"""Sec. 3.3 'Training Pipeline' of DDSPO (arXiv 2512.23426): pairs (x_0_w, x_0_l, c, c_minus) from the reference model.

    torchrun build_pairs.py --model sd14 --prompts perturbed.jsonl        one GPU, or --nproc_per_node of them
    torchrun build_pairs.py --model sd14 --from-images pick-a-pic         from pairs of images that people compared
    python build_pairs.py --inspect pairs/sd14                            what is in a store, and a picture of it

x_0_w is generated from c and x_0_l from c_minus, both from the same x_T; or they are the encodings of two images. They
are stored as latents, as the network sees them (scaled by the VAE's factor), in a pair store, a folder of

    meta.json                   how the pairs were made; once all is there also a checksum for every shard
    pairs.jsonl                 a row a pair: id, c, c_minus, seed of x_T (or two image files), shard, row
    shard-00000.safetensors     x_0_w and x_0_l, each (pairs of this shard, channels, height, width)

Shards appear whole or not at all, and pair i depends on row i of the prompts, on seed + i and on nothing else. So a
run that was stopped goes on where it was when the same command is run again, with any number of processes, to the same
store, byte for byte if machine and --batch-size are the same too.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import math
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

import models
import plots
from perturb import check_flags, locked, read_rows, stop_if_bad, to_lines, write_text

# ---- the pair store


class PairStore:
    """A finished pair store, to be read: store[i] -> (row, x_0_w, x_0_l), a dict and two tensors (channels, h, w), or
    None for x_0_l in a store of winners only.

    Stops where the store is unfinished, or its table or a shard is not what was written; a shard is checked when first
    opened. Opening takes part of a second and some megabytes at 200K pairs: a row is read when it is asked for.
    """

    def __init__(self, folder):
        self.folder, self.meta, self.checked = folder, read_meta(folder), set()
        if "checksums" not in self.meta:
            sys.exit(f"the pair store {folder} is not finished: run the build_pairs.py command that began it again.")
        table = os.path.join(folder, "pairs.jsonl")
        if not os.path.isfile(table) or checksum(table) != self.meta["table"]:
            sys.exit(f"{table} is missing or was changed after the pairs were made: make them anew in another folder.")
        self.rows = Table(table, len(self.meta["checksums"]))
        if len(self.rows) != self.meta["pairs"]:
            sys.exit(f"{table} has {len(self.rows)} lines, and not one for each of {self.meta['pairs']} pairs.")
        self.shard = functools.lru_cache(maxsize=64)(self.shard)  # open files, of which a process may have about 1000

    def shard(self, number):
        """The opened shard: a safetensors file, mapped into memory."""
        path = shard_path(self.folder, number)
        if number not in self.checked:
            if not os.path.isfile(path) or checksum(path) != self.meta["checksums"][number]:
                sys.exit(f"{path} is missing or damaged: delete it and run its build_pairs.py command again "
                         "(train.py --check lists all such files).")
            self.checked.add(number)
        return safe_open(path, framework="pt")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        shard = self.shard(row["shard"])
        x_0_l = shard.get_slice("x_0_l")[row["row"]] if self.meta["negatives"] == "generated" else None
        return row, shard.get_slice("x_0_w")[row["row"]], x_0_l


class Table:
    """The rows of a pairs.jsonl, each parsed and checked when it is asked for."""

    def __init__(self, path, shards):
        self.path, self.shards, self.starts = path, shards, [np.zeros(1, np.int64)]
        with open(path, "rb") as file:
            for i, block in enumerate(iter(lambda: file.read(1 << 20), b"")):
                self.starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1 + (i << 20))
            self.starts = np.concatenate(self.starts)
            if len(self.starts) < 2:
                sys.exit(f"{path}: has no pairs in it")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError
        line = self.data[self.starts[i]:self.starts[i + 1]]
        try:
            row = json.loads(line)
            right = isinstance(row["id"], str) and isinstance(row["c_minus"], str | None) and row["c"].strip() and (
                type(row["shard"]) is type(row["row"]) is int and 0 <= row["shard"] < self.shards and row["row"] >= 0)
        except (ValueError, KeyError, TypeError, AttributeError):
            right = False
        if not right:
            sys.exit(f"{self.path}:{i + 1}: no row of a pair store, or with an empty c or a shard that is not there: "
                     f"{line[:80].decode(errors='replace').strip()}")
        return row


def read_meta(folder):
    """A store's meta.json, as a dict."""
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        for key in ("model", "latents", "scale", "negatives", "pairs", "shard_size", "table"):
            meta[key]
        return meta
    except (OSError, ValueError, TypeError, KeyError):
        sys.exit(f"{path} cannot be read: {folder} is no pair store, or damaged. Make the pairs in another folder.")


def check_store(folder, tokenizers):
    """All that is wrong with a finished pair store, a sentence each."""
    store, shapes = PairStore(folder), {}
    ids = collections.Counter(row["id"] for row in store.rows)
    problems = [f"{folder}: {n} pairs have the id {name}" for name, n in ids.items() if n > 1]
    problems += [f"{folder}: pair {name}: c and c_minus are the same to the model" for name in
                 models.same_to_the_model(tokenizers, store.rows)]
    names = ("x_0_w", "x_0_l") if store.meta["negatives"] == "generated" else ("x_0_w",)
    for number, expected in enumerate(tqdm(store.meta["checksums"], "check")):
        path = shard_path(folder, number)
        if not os.path.isfile(path) or checksum(path) != expected:
            problems.append(f"{path} is missing or damaged: delete it and run its build_pairs.py command again")
            continue
        try:
            with safe_open(path, framework="pt") as file:
                x_0 = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            problems.append(f"{path}: not a shard of a pair store: {error}")
            continue
        shapes[number] = min(len(x) for x in x_0.values())
        for name, x in x_0.items():
            if list(x.shape[1:]) != store.meta["latents"]:
                problems.append(f"{path}: {name} has shape {list(x.shape)}, not pairs of {store.meta['latents']}")
            elif not x.isfinite().all():
                where = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
                problems.append(f"{path}: {name} is not finite in rows {where[:10]}")
            elif not 0.1 < x.float().std() < 10:  # guess; scaled latents have a deviation near 1
                problems.append(f"{path}: {name} has a deviation of {x.float().std():.3g}, so hardly scaled latents")
    return problems + [f"{folder}: pair {row['id']} is row {row['row']} of a shard of {shapes[row['shard']]}"
                       for row in store.rows if row["row"] >= shapes.get(row["shard"], math.inf)]


def shard_path(folder, number):
    return os.path.join(folder, f"shard-{number:05d}.safetensors")


def checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- making it


def read_perturbed(path, seed):
    """A row, dict(id, c, c_minus, seed), for each line of a file that perturb.py wrote, or of one in its format."""
    if not os.path.isfile(path):
        sys.exit(f"there is no file {path}: make it with  python perturb.py prompts.txt {path}")
    if not path.endswith(".jsonl"):
        sys.exit(f"--prompts {path}: must be the .jsonl file that perturb.py writes.")
    rows = read_rows(path, ["c", "c_minus"])
    stop_if_bad(path, [f"{path}:{number}: c is empty, or c_minus is the same as c: they make no preference"
                       for number, _, c, c_minus in rows if not c or c == c_minus])
    if not rows:
        sys.exit(f"{path} has no prompts in it: make it with  python perturb.py prompts.txt {path}")
    return [dict(id=name, c=c, c_minus=c_minus, seed=seed + i) for i, (_, name, c, c_minus) in enumerate(rows)]


def read_image_pairs(path):
    """A row, dict(id, c, c_minus=None, winner, loser), for each line of a .jsonl file with c and the names of the two
    images (from that file's folder); a folder stands for its metadata.jsonl."""
    path = os.path.join(path, "metadata.jsonl") if os.path.isdir(path) else path
    if not os.path.isfile(path) or not path.endswith(".jsonl"):
        sys.exit(f"--from-images {path}: must be a folder with a metadata.jsonl, or such a .jsonl file: a line a pair, "
                 "with c, winner and loser.")
    folder, rows = os.path.dirname(path), read_rows(path, ["c", "winner", "loser"])
    stop_if_bad(path, [f"{path}:{number}: c is empty, winner and loser are the same, or one of {files} is not there"
                       for number, _, c, *files in rows if not c or files[0] == files[1] or
                       not all(os.path.isfile(os.path.join(folder, name)) for name in files)])
    if not rows:
        sys.exit(f"{path} has no pairs in it.")
    return [dict(id=name, c=c, c_minus=None, winner=os.path.join(folder, winner), loser=os.path.join(folder, loser))
            for _, name, c, winner, loser in rows]


def read_image(path, size):
    """An image file -> (3, size, size) in [-1, 1]: upright, its shorter side resized, its middle cut out."""
    try:
        with Image.open(path) as image:
            image = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:  # all Pillow's
        sys.exit(f"{path} cannot be read as an image ({error}): mend it or take its pair out.")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def begin(args, rows, model):
    """Writes pairs.jsonl and meta.json, or checks that those which are there are the ones that it would write."""
    settings = dict(model=args.model, latents=list(model.latent_shape), scale=models.latent_scale(model),
                    dtype=str(model.dtype).removeprefix("torch."), pairs=len(rows), shard_size=args.shard_size,
                    negatives=args.negatives)
    if not args.from_images:
        settings |= dict(sampler=type(model.pipe.scheduler).__name__, steps=args.steps, guidance=args.guidance,
                         seed=args.seed)
    table = to_lines(row | dict(shard=i // args.shard_size, row=i % args.shard_size) for i, row in enumerate(rows))
    settings["table"] = hashlib.sha256(table.encode()).hexdigest()
    meta_path = os.path.join(args.out, "meta.json")
    if os.path.exists(meta_path):
        meta = read_meta(args.out)
        for key, value in settings.items():
            if meta.get(key) != value:
                what = f"{key} {meta.get(key)}, not {value}"
                what = f"other prompts than {args.from_images or args.prompts} has" if key == "table" else what
                sys.exit(f"the pair store {args.out} was begun with {what}: use the same again, or another --out.")
        return
    others = [f for f in os.listdir(args.out) if f != "pairs.jsonl" and not f.endswith(".partial")]
    kept = os.path.join(args.out, "pairs.jsonl")  # a run that was stopped right here has written it already
    if others or (os.path.exists(kept) and checksum(kept) != settings["table"]):
        sys.exit(f"{args.out} holds other files and no meta.json, so it is no pair store: give another --out.")
    if not args.from_images:
        same = models.same_to_the_model(models.load_tokenizers(args.model), rows)
        stop_if_bad(args.prompts, [f"{args.prompts}: {name}: c and c_minus differ only where the model reads no further"
                                   for name in same])
    settings["versions"] = dict(torch=torch.__version__, diffusers=diffusers.__version__)
    write_text(os.path.join(args.out, "pairs.jsonl"), table)
    write_text(meta_path, json.dumps(settings, indent=1) + "\n")  # last: a store begins with it


def make_latents(model, rows, args):
    """dict(x_0_w, x_0_l) of some rows, each (len(rows), channels, height, width), or of the winners only."""
    if args.from_images:
        size = model.latent_shape[1] * model.pipe.vae_scale_factor
        files = [row["winner"] for row in rows] + [row["loser"] for row in rows]
        x_0 = models.encode_images(model, torch.stack([read_image(f, size) for f in files]))
    else:
        prompts = [row["c"] for row in rows]
        x_T = torch.stack([models.initial_noise(row["seed"], model.latent_shape) for row in rows])
        if args.negatives == "generated":
            prompts, x_T = prompts + [row["c_minus"] for row in rows], torch.cat([x_T, x_T])
        x_0 = models.sample(model, model.encode(prompts), x_T, args.steps, args.guidance)
    return dict(zip(("x_0_w", "x_0_l"), x_0.cpu().split(len(rows))))


def make_shard(model, rows, args, bar):
    """A shard: dict(x_0_w, x_0_l), or dict(x_0_w)."""
    parts = []
    for start in range(0, len(rows), args.batch_size):
        part = rows[start:start + args.batch_size]
        parts.append(make_latents(model, part, args))
        bad = [row["id"] for i, row in enumerate(part) if not all(x[i].isfinite().all() for x in parts[-1].values())]
        if bad:
            sys.exit(f"the latents of the pairs {bad} are not finite: their shard was not written. Leave them out.")
        bar.update(len(part))
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def inspect(folder):
    """Says what is in a store, and draws four of its pairs as FOLDER.png."""
    store = PairStore(folder)
    print(json.dumps({key: value for key, value in store.meta.items() if key not in ("checksums", "table")}, indent=1))
    for key in ("c", "c_minus"):
        words = [len(row[key].split()) for row in store.rows if row[key] is not None]
        if words:
            print(f"{key}: {len(words)} prompts; words: " + quantiles(words))
    some = [store[i] for i in np.linspace(0, len(store) - 1, min(256, len(store))).astype(int)]
    for name, x_0 in (("x_0_w", [w for _, w, _ in some]), ("x_0_l", [x for *_, x in some if x is not None])):
        if x_0:
            x_0 = torch.stack(x_0).float()
            print(f"{name} of {len(x_0)} pairs: mean {x_0.mean():.3f}, deviation {x_0.std():.3f}; of single latents: "
                  + quantiles(x_0.flatten(1).std(1)))
    model, shown = models.load(store.meta["model"]), some[::max(1, len(some) // 4)][:4]
    sides = ("x_0_w", 1, "c"), ("x_0_l", 2, "c_minus")
    columns = [(title, models.decode(model, torch.stack([pair[i] for pair in shown])), [pair[0][key] for pair in shown])
               for title, i, key in sides if shown[0][i] is not None]
    plots.draw_grid(None, columns, os.path.normpath(folder) + ".png")


def quantiles(values):
    shares = (0, 0.05, 0.5, 0.95, 1)
    return ", ".join(f"{share:.0%} {value:.3g}" for share, value in zip(shares, np.quantile(values, shares)))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inspect", metavar="STORE", help="only say what is in a store, and draw some of it")
    parser.add_argument("--model", help=f"{', '.join(models.PRESETS)}, a hub id or a diffusers folder")
    parser.add_argument("--prompts", help="what perturb.py wrote (default: perturbed.jsonl)")
    parser.add_argument("--out", help="the pair store (default: pairs/MODEL)")
    parser.add_argument("--from-images", metavar="PATH", help="instead of --prompts: a folder with a metadata.jsonl, "
                        "or such a file, with c, winner and loser (image files) in each line")
    parser.add_argument("--negatives", choices=["generated", "none"], help="none: winners only, which is all that "
                        "train.py --negatives rand-positive and not-paired need, for half the cost")
    parser.add_argument("--steps", type=int, help="sampling steps (default, from scripts: 25, SANA 20)")
    parser.add_argument("--guidance", type=float, help="guidance scale (script: 7.5, SDXL and SD3 5.0, SANA 4.5)")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs sampled at once (guess)")
    parser.add_argument("--shard-size", type=int, default=128, help="pairs in a file (guess)")
    parser.add_argument("--seed", type=int, help="x_T of pair i comes from seed + i (default: 0)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = parser.parse_args(argv)
    if args.inspect or not args.model:
        if [name for name, value in vars(args).items() if value != parser.get_default(name)] != ["inspect"]:
            parser.error("give --model, or --inspect STORE and nothing else")
        return inspect(args.inspect)
    args.model = args.model.rstrip("/")
    args.out = args.out or os.path.join("pairs", os.path.basename(args.model))
    sampling = dict(prompts="perturbed.jsonl", negatives="generated", seed=0, steps=None, guidance=None)
    for flag, default in sampling.items():
        if args.from_images and getattr(args, flag) is not None:
            sys.exit(f"--{flag} goes with pairs that are generated, not with --from-images.")
        setattr(args, flag, default if getattr(args, flag) is None else getattr(args, flag))
    check_flags(args, batch_size=1, shard_size=1, seed=0, steps=1, guidance=0)

    rows = read_image_pairs(args.from_images) if args.from_images else read_perturbed(args.prompts, args.seed)
    with models.processes() as (rank, world, device), locked(args.out) if rank == 0 else contextlib.nullcontext():
        model = models.load(args.model, device, torch.float16 if device.type == "cuda" else torch.float32)
        args.steps = model.steps if args.steps is None else args.steps
        args.guidance = model.guidance if args.guidance is None else args.guidance
        if rank == 0:  # the first process alone begins the store
            begin(args, rows, model)
        models.barrier()
        meta = read_meta(args.out)
        shards = range((len(rows) - 1) // args.shard_size + 1)
        if args.compile:
            model.net.compile()
        todo = [s for s in shards if not os.path.exists(shard_path(args.out, s))]
        if "checksums" in meta:  # complete once: what is there must be as it was then
            store = PairStore(args.out)
            for s in set(shards) - set(todo):
                store.shard(s)
            if not todo:
                print(f"{args.out} is complete: {len(rows)} pairs; nothing was done") if rank == 0 else None
                return
        models.barrier()  # all have seen the same list of shards before any adds to them
        mine = todo[rank::world]
        total = min(len(mine) * args.shard_size, len(rows))
        with ThreadPoolExecutor(1) as writer, tqdm(total=total, desc="pairs", disable=rank > 0) as bar:
            written = writer.submit(int)  # nothing yet
            for s in mine:
                first = s * args.shard_size
                shard = make_shard(model, rows[first:first + args.shard_size], args, bar)
                written.result()  # of the shard before, meanwhile
                written = writer.submit(write_text, shard_path(args.out, s), save(shard))  # save_file's are private
            written.result()
        models.barrier()
        if rank == 0:
            meta["checksums"] = [checksum(shard_path(args.out, s)) for s in shards]
            write_text(os.path.join(args.out, "meta.json"), json.dumps(meta, indent=1) + "\n")
            print(f"wrote {args.out}: {len(rows)} pairs in {len(shards)} shards")


if __name__ == "__main__":
    main()
