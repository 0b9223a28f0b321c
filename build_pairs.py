"""Sec. 3.3 'Training Pipeline' of DDSPO (arXiv 2512.23426): pairs (x_0_w, x_0_l, c, c_minus) from the reference model.

    torchrun build_pairs.py --model sd14 --prompts perturbed.jsonl        one GPU, or --nproc_per_node of them
    torchrun build_pairs.py --model sd14 --from-images pick-a-pic         from pairs of images that people compared

x_0_w is generated from c and x_0_l from c_minus, both from the same x_T; or they are the encodings of two images. They
are stored as latents, as the network sees them (scaled by the VAE's factor), in a pair store, a folder of

    meta.json                   how the pairs were made; once all is there also a checksum for every shard
    pairs.jsonl                 a row a pair: id, c, c_minus, seed of x_T (or two image files, no c_minus), shard, row
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
import math
import os
import sys

import diffusers
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
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
        self.rows = read_table(table, len(self.meta["checksums"]))
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
        return row, shard.get_slice("x_0_w")[row["row"]], shard.get_slice("x_0_l")[row["row"]]


def read_meta(folder):
    """A store's meta.json, as a dict."""
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        return {key: meta[key] for key in ("model", "latents", "scale", "pairs", "shard_size", "table")} | meta
    except (OSError, ValueError, TypeError, KeyError):
        sys.exit(f"{path} cannot be read: {folder} is no pair store, or damaged. Make the pairs in another folder.")


def read_table(path, shards):
    """The rows of a pairs.jsonl, or a sentence for every line that is none."""
    rows, bad, ids = [], [], set()
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                right = isinstance(row["id"], str) and isinstance(row["c_minus"], str | None) and row["c"].strip() and (
                    0 <= int(row["shard"]) < shards and int(row["row"]) >= 0 and row["id"] not in ids)
            except (ValueError, KeyError, TypeError, AttributeError):
                right = False
            if right:
                rows.append(row)
                ids.add(row["id"])
            else:
                bad.append(f"{path}:{number}: no row of a pair store, or with an empty c, an id that came before, or a "
                           f"shard that is not there: {line.strip()[:80]}")
    stop_if_bad(path, bad if rows else bad or [f"{path}: has no pairs in it"])
    return rows


def check_store(folder, tokenizers):
    """All that is wrong with a finished pair store, a sentence each."""
    store, shapes = PairStore(folder), {}
    problems = [f"{folder}: pair {name}: c and c_minus are the same to the model" for name in
                models.same_to_the_model(tokenizers, store.rows)]
    for number, expected in enumerate(tqdm(store.meta["checksums"], "check")):
        path = shard_path(folder, number)
        if not os.path.isfile(path) or checksum(path) != expected:
            problems.append(f"{path} is missing or damaged: delete it and run its build_pairs.py command again")
            continue
        try:
            with safe_open(path, framework="pt") as file:
                x_0 = {name: file.get_tensor(name) for name in ("x_0_w", "x_0_l")}
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
    stop_if_bad(path, [f"{path}:{number}: c is empty, or there is no file {os.path.join(folder, name)}"
                       for number, _, c, *files in rows for name in files
                       if not c or not os.path.isfile(os.path.join(folder, name))])
    if not rows:
        sys.exit(f"{path} has no pairs in it.")
    return [dict(id=name, c=c, c_minus=None, winner=os.path.join(folder, winner), loser=os.path.join(folder, loser))
            for _, name, c, winner, loser in rows]


def read_image(path, size):
    """An image file -> (3, size, size) in [-1, 1]: upright, its shorter side resized, its middle cut out."""
    try:
        with Image.open(path) as image:
            image = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except OSError as error:
        sys.exit(f"{path} cannot be read as an image ({error}): mend it or take its pair out.")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def begin(args, rows, model):
    """Writes pairs.jsonl and meta.json, or checks that those which are there are the ones that it would write."""
    settings = dict(model=args.model, latents=list(model.latent_shape), scale=models.latent_scale(model),
                    dtype=str(model.dtype).removeprefix("torch."), pairs=len(rows), shard_size=args.shard_size)
    if not args.from_images:
        settings |= dict(sampler=type(model.pipe.scheduler).__name__, steps=args.steps, guidance=args.guidance,
                         seed=args.seed)
    places = (dict(shard=i // args.shard_size, row=i % args.shard_size) for i in range(len(rows)))
    table = "".join(json.dumps(row | place, ensure_ascii=False) + "\n" for row, place in zip(rows, places))
    settings["table"] = hashlib.sha256(table.encode()).hexdigest()
    meta_path = os.path.join(args.out, "meta.json")
    if os.path.exists(meta_path):
        meta = read_meta(args.out)
        for key, value in settings.items():
            if meta.get(key) != value:
                what = f"{key} {meta.get(key)}, not {value}"
                what = f"other prompts than {args.from_images or args.prompts} has" if key == "table" else what
                sys.exit(f"the pair store {args.out} was begun with {what}: use the same again, or another --out.")
        return meta
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
    return settings


def make_latents(model, rows, args):
    """x_0_w and x_0_l of some rows, each (len(rows), channels, height, width)."""
    if args.from_images:
        size = model.latent_shape[1] * model.pipe.vae_scale_factor
        files = [row["winner"] for row in rows] + [row["loser"] for row in rows]
        return models.encode_images(model, torch.stack([read_image(f, size) for f in files])).cpu().chunk(2)
    x_T = torch.stack([models.initial_noise(row["seed"], model.latent_shape) for row in rows])
    c = model.encode([row["c"] for row in rows] + [row["c_minus"] for row in rows])
    return models.sample(model, c, torch.cat([x_T, x_T]), args.steps, args.guidance).cpu().chunk(2)


def make_shard(model, rows, args, bar):
    """A shard: dict(x_0_w, x_0_l)."""
    x_0 = dict(x_0_w=[], x_0_l=[])
    for start in range(0, len(rows), args.batch_size):
        part = rows[start:start + args.batch_size]
        latents = make_latents(model, part, args)
        bad = [row["id"] for row, *pair in zip(part, *latents) if not all(x.isfinite().all() for x in pair)]
        if bad:
            sys.exit(f"the latents of the pairs {bad} are not finite: their shard was not written. Leave them out.")
        for side, x in zip(x_0.values(), latents):
            side.append(x)
        bar.update(len(part))
    return {name: torch.cat(x) for name, x in x_0.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help=f"{', '.join(models.PRESETS)}, a hub id or a diffusers folder")
    parser.add_argument("--prompts", help="what perturb.py wrote (default: perturbed.jsonl)")
    parser.add_argument("--out", help="the pair store (default: pairs/MODEL)")
    parser.add_argument("--from-images", metavar="PATH", help="instead of --prompts: a folder with a metadata.jsonl, "
                        "or such a file, with c, winner and loser (image files) in each line")
    parser.add_argument("--steps", type=int, help="sampling steps (default, from scripts: 25, SANA 20)")
    parser.add_argument("--guidance", type=float, help="guidance scale (script: 7.5, SDXL and SD3 5.0, SANA 4.5)")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs sampled at once (guess)")
    parser.add_argument("--shard-size", type=int, default=128, help="pairs in a file (guess)")
    parser.add_argument("--seed", type=int, help="x_T of pair i comes from seed + i (default: 0)")
    args = parser.parse_args(argv)
    args.model = args.model.rstrip("/")
    args.out = args.out or os.path.join("pairs", os.path.basename(args.model))
    sampling = dict(prompts="perturbed.jsonl", seed=0, steps=None, guidance=None)
    for flag, default in sampling.items():
        if args.from_images and getattr(args, flag) is not None:
            sys.exit(f"--{flag} goes with pairs that are generated, not with --from-images.")
        setattr(args, flag, default if getattr(args, flag) is None else getattr(args, flag))
    given = {flag: least for flag, least in dict(steps=1, guidance=0).items() if getattr(args, flag) is not None}
    check_flags(args, batch_size=1, shard_size=1, seed=0, **given)

    rows = read_image_pairs(args.from_images) if args.from_images else read_perturbed(args.prompts, args.seed)
    with models.processes() as (rank, world, device), contextlib.ExitStack() as stack:
        if rank == 0:
            stack.enter_context(locked(args.out))
        model = models.load(args.model, device, torch.float16 if device.type == "cuda" else torch.float32)
        args.steps = model.steps if args.steps is None else args.steps
        args.guidance = model.guidance if args.guidance is None else args.guidance
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
                shard, path = make_shard(model, rows[first:first + args.shard_size], args, bar), shard_path(args.out, s)
                try:
                    save_file(shard, path + ".partial")
                    os.replace(path + ".partial", path)
                except (OSError, SafetensorError) as error:
                    sys.exit(f"cannot write {path} ({error}): make space and give the same command again. The shards "
                             "before it are whole.")
        if world > 1:
            dist.barrier()
        if rank == 0:
            meta["checksums"] = [checksum(shard_path(args.out, s)) for s in shards]
            write_text(os.path.join(args.out, "meta.json"), json.dumps(meta, indent=1) + "\n")
            print(f"wrote {args.out}: {len(rows)} pairs in {len(shards)} shards")


if __name__ == "__main__":
    main()
