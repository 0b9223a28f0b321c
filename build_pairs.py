"""Sec. 3.3 'Training Pipeline' of DDSPO (arXiv 2512.23426): pairs (x_0_w, x_0_l, c, c_minus) from the reference model.

    torchrun build_pairs.py --model sd14 --prompts perturbed.jsonl        one GPU, or --nproc_per_node of them
    torchrun build_pairs.py --model sd14 --from-images pick-a-pic         from pairs of images that people compared
    python build_pairs.py --inspect pairs/sd14                            what is in a store, and what is wrong with it

x_0_w is generated from c and x_0_l from c_minus, both from the same x_T; or they are the encodings of two images.
pairs.py says how they are stored. Pair i depends on row i of the prompts and on seed + i, and on nothing else. So a run
that was stopped goes on when the same command is run again, with any number of processes, to the same store: byte for
byte, if the machine and --batch-size are the same too.
"""

import argparse
import collections
import hashlib
import json
import math
import os

import diffusers
import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save
from tqdm import tqdm

import models
import plots
from common import (
    UserError,
    at_least,
    barrier,
    check_rows,
    checksum,
    json_lines,
    processes,
    program,
    same_settings,
    stop_if_bad,
    to_lines,
    write_file,
)
from pairs import PairStore, misfit, read_meta, shard_path

# ---- what the pairs are made of


def read_perturbed(path, seed):
    """A row, dict(id, c, c_minus, noise_seed and how perturb.py made c_minus), for each line of perturb.py's file or of
    another one in its format."""
    if not os.path.isfile(path) or not path.endswith(".jsonl"):
        raise UserError(f"--prompts {path}: there is no such .jsonl file. Make it with  python perturb.py prompts.txt "
                        "perturbed.jsonl")
    lines = list(json_lines(path))
    found = list(check_rows(path, lines, ["c", "c_minus"]))
    stop_if_bad(path, [f"{path}:{number}: c is empty, or c_minus is the same as c: they make no preference"
                       for number, _, c, c_minus in found if not c or c == c_minus])
    rows = []
    for i, ((_, name, c, c_minus), (_, line)) in enumerate(zip(found, lines)):
        how = {key: line[key] for key in ("strategy", "perturb_seed", "llm") if key in line}
        rows.append(dict(id=name, c=c, c_minus=c_minus, noise_seed=seed + i, **how))
    return rows


def read_image_pairs(path):
    """A row, dict(id, c, c_minus=None, winner, loser), for each line of a .jsonl file with c and the names of the two
    images, which are relative to the file's folder. A folder stands for its metadata.jsonl."""
    path = os.path.join(path, "metadata.jsonl") if os.path.isdir(path) else path
    if not os.path.isfile(path) or not path.endswith(".jsonl"):
        raise UserError(f"--from-images {path}: must be a folder with a metadata.jsonl, or such a .jsonl file: a "
                        "line a pair, with c, winner and loser.")
    rows, bad = [], []
    for number, name, c, *files in check_rows(path, json_lines(path), ["c", "winner", "loser"]):
        winner, loser = (os.path.join(os.path.dirname(path), file) for file in files)
        rows.append(dict(id=name, c=c, c_minus=None, winner=winner, loser=loser))
        if not c or winner == loser or not os.path.isfile(winner) or not os.path.isfile(loser):
            bad.append(f"{path}:{number}: c is empty, winner and loser are the same, or one of {files} is not there")
    stop_if_bad(path, bad)
    return rows


def read_image(path, size):
    """An image file -> (3, size, size) in [-1, 1]: upright, its shorter side resized, its middle cut out."""
    try:
        with Image.open(path) as image:
            image = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises these
        raise UserError(f"{path} cannot be read as an image ({error}): replace it, or take its pair out.") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1  # (3, size, size)


# ---- making them


def make_latents(model, rows, args):
    """dict(x_0_w, x_0_l) of some rows, each (len(rows), channels, height, width), or of the winners only."""
    if args.from_images:
        size = model.latent_shape[1] * model.pipe.vae_scale_factor
        files = [row["winner"] for row in rows] + [row["loser"] for row in rows]
        x_0 = models.encode_images(model, torch.stack([read_image(f, size) for f in files]))
    else:
        prompts = [row["c"] for row in rows]
        x_T = torch.stack([models.initial_noise(row["noise_seed"], model.latent_shape) for row in rows])  # (B, ...)
        if args.negatives == "generated":
            prompts, x_T = prompts + [row["c_minus"] for row in rows], torch.cat([x_T, x_T])
        x_0 = models.sample(model, prompts, x_T, args.steps, args.guidance)
    return dict(zip(("x_0_w", "x_0_l"), x_0.cpu().split(len(rows))))


def make_shard(model, rows, args, bar):
    """dict(x_0_w, x_0_l) of the rows of a shard, or of the winners only, made --batch-size rows at a time."""
    parts = []
    for start in range(0, len(rows), args.batch_size):
        parts.append(make_latents(model, rows[start:start + args.batch_size], args))
        bar.update(len(parts[-1]["x_0_w"]))
    shard = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
    bad = [row["id"] for i, row in enumerate(rows) if not all(x[i].isfinite().all() for x in shard.values())]
    if bad:
        raise UserError(f"the latents of the pairs {bad} are not finite: their shard was not written. Leave them out.")
    return shard


def begin_store(args, rows, model):
    """Writes pairs.jsonl and meta.json, or raises UserError if the store was begun with something else."""
    settings = dict(model=args.model, latents=list(model.latent_shape), scale=models.latent_scale(model),
                    dtype=str(model.dtype).removeprefix("torch."), pairs=len(rows), shard_size=args.shard_size,
                    negatives=args.negatives)
    if not args.from_images:
        settings |= dict(sampler=type(model.pipe.scheduler).__name__, steps=args.steps, guidance=args.guidance,
                         seed=args.seed)
    text = to_lines(row | dict(shard=i // args.shard_size, row=i % args.shard_size) for i, row in enumerate(rows))
    table = hashlib.sha256(text.encode()).hexdigest()
    meta, kept = os.path.join(args.out, "meta.json"), os.path.join(args.out, "pairs.jsonl")
    if os.path.exists(meta):
        begun_with = read_meta(args.out)["table"]
        same_settings(meta, settings)
        if begun_with != table:
            raise UserError(f"{args.out} was begun with other prompts than {args.from_images or args.prompts} has: use "
                            "the same again, or another --out.")
        return
    others = [f for f in os.listdir(args.out) if f not in ("pairs.jsonl", ".lock") and not f.endswith(".partial")]
    if others or (os.path.exists(kept) and checksum(kept) != table):  # the same table: a run was stopped right here
        raise UserError(f"{args.out} holds other files and no meta.json, so it is no pair store: give another --out.")
    if not args.from_images:
        stop_if_bad(args.prompts, [f"{args.prompts}: {name}: c and c_minus are the same in what the model reads"
                                   for name in models.same_tokens(model, rows)])
    write_file(kept, text)
    versions = dict(torch=torch.__version__, diffusers=diffusers.__version__)
    same_settings(meta, settings | dict(table=table, versions=versions))  # last: a store begins with it


# ---- looking at them

PERCENTILES = (0, 5, 50, 95, 100)  # of the number of words in a prompt


def check_store(store, model):
    """All that is wrong with a pair store, a sentence each."""
    ids, sizes = collections.Counter(row["id"] for row in store.rows), {}
    problems = [f"{n} pairs have the id {name}" for name, n in ids.items() if n > 1]
    for name in models.same_tokens(model, store.rows):
        problems.append(f"pair {name}: c and c_minus are the same to the model")
    if misfit(store.meta, model):
        problems.append(misfit(store.meta, model))
    names = ("x_0_w", "x_0_l") if store.meta["negatives"] == "generated" else ("x_0_w",)
    for number in tqdm(range(len(store.meta["checksums"])), "check"):
        path = shard_path(store.folder, number)
        try:
            shard = store.open_shard(number)
            x_0 = {name: shard.get_tensor(name).float() for name in names}  # (pairs, channels, h, w) each
        except UserError as error:  # missing or damaged
            problems.append(str(error))
            continue
        except SafetensorError:
            problems.append(f"{path} is not a shard of a pair store")
            continue
        sizes[number] = min(map(len, x_0.values()))
        for name, x in x_0.items():
            if list(x.shape[1:]) != store.meta["latents"]:
                problems.append(f"{path}: {name} has shape {list(x.shape)}, not pairs of {store.meta['latents']}")
            elif not x.isfinite().all():
                where = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
                problems.append(f"{path}: {name} is not finite in rows {where[:10]}")
            elif not 0.1 < x.std() < 10:  # guess; scaled latents have a deviation near 1
                problems.append(f"{path}: {name} has a deviation of {x.std():.3g}, so these are hardly scaled latents")
    return problems + [f"pair {row['id']} is row {row['row']} of a shard of {sizes[row['shard']]}"
                       for row in store.rows if row["row"] >= sizes.get(row["shard"], math.inf)]


def inspect(folder):
    """Says what is in a store, draws four of its pairs as FOLDER.png, and raises UserError with all that is wrong."""
    store = PairStore(folder)
    print(json.dumps({key: value for key, value in store.meta.items() if key not in ("checksums", "table")}, indent=1))
    model = models.load(store.meta["model"])
    problems = check_store(store, model)
    if problems:
        raise UserError("\n".join([*problems, f"{folder}: {len(problems)} problem{'s' * (len(problems) > 1)}."]))
    some = [store[i] for i in np.linspace(0, len(store) - 1, min(256, len(store))).astype(int)]
    shown, columns = some[::max(1, len(some) // 4)][:4], []
    for name, side, key in (("x_0_w", 1, "c"), ("x_0_l", 2, "c_minus")):
        words = [len(row[key].split()) for row in store.rows if row[key] is not None]
        if words:
            print(f"{key}: {len(words)} prompts; words: " + ", ".join(
                f"{share}% {value:.3g}" for share, value in zip(PERCENTILES, np.percentile(words, PERCENTILES))))
        if shown[0][side] is not None:
            x_0 = torch.stack([pair[side] for pair in some]).float()  # (pairs, channels, h, w)
            print(f"{name} of {len(x_0)} pairs: mean {x_0.mean():.3f}, deviation {x_0.std():.3f}")
            images = models.decode(model, torch.stack([pair[side] for pair in shown]))
            columns.append((name, images, [row[key] for row, *_ in shown]))
    plots.draw_grid(None, columns, os.path.normpath(folder) + ".png")
    print(f"{folder} is whole")


def parse(argv):
    """The flags. Raises UserError where one does not go with the others."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="build_pairs.py --model MODEL [flags]",
                                     allow_abbrev=False)
    parser.add_argument("--inspect", metavar="STORE", help="only say what is in a store and what is wrong with it, and "
                        "draw some of it")
    parser.add_argument("--model", help=f"{', '.join(models.PRESETS)}, a hub id or a diffusers folder")
    parser.add_argument("--prompts", help="what perturb.py wrote (default: perturbed.jsonl)")
    parser.add_argument("--out", help="the pair store (default: pairs/MODEL)")
    parser.add_argument("--from-images", metavar="PATH", help="instead of --prompts: a folder with a metadata.jsonl, "
                        "or such a file, with c, winner and loser (image files) in each line")
    parser.add_argument("--negatives", choices=["generated", "none"], help="none: winners only, "
                        "which is all that train.py --negatives rand-positive and not-paired need, for half the cost")
    parser.add_argument("--steps", type=at_least(1), help="sampling steps (default, from scripts: 25, SANA 20)")
    parser.add_argument("--guidance", type=at_least(0, float),
                        help="guidance scale (script: 7.5, SDXL and SD3 5.0, SANA 4.5)")
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="pairs sampled at once (guess)")
    parser.add_argument("--shard-size", type=at_least(1), default=128, help="pairs in a file (guess)")
    parser.add_argument("--seed", type=at_least(0), help="x_T of pair i comes from seed + i (default: 0)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = parser.parse_args(argv)
    if args.inspect or not args.model:
        if [name for name, value in vars(args).items() if value != parser.get_default(name)] != ["inspect"]:
            raise UserError("give --model, or --inspect STORE and nothing else.")
        return args
    sampling = dict(prompts="perturbed.jsonl", negatives="generated", seed=0, steps=None, guidance=None)
    for name, default in sampling.items():
        if args.from_images and getattr(args, name) is not None:
            raise UserError(f"--{name} goes with pairs that are generated, not with --from-images.")
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    args.model = args.model.rstrip("/")
    args.out = args.out or os.path.join("pairs", os.path.basename(args.model))
    return args


@program
def main(argv=None):
    args = parse(argv)
    if args.inspect:
        return inspect(args.inspect)
    rows = read_image_pairs(args.from_images) if args.from_images else read_perturbed(args.prompts, args.seed)
    if not rows:
        raise UserError(f"{args.from_images or args.prompts} has no pairs in it.")
    with processes(args.out) as (rank, world, device):
        model = models.load(args.model, device, torch.float16 if device.type == "cuda" else torch.float32)
        args.steps = args.steps or model.steps
        args.guidance = model.guidance if args.guidance is None else args.guidance
        if rank == 0:  # the first process alone begins the store
            begin_store(args, rows, model)
        barrier()
        meta, path = read_meta(args.out), os.path.join(args.out, "meta.json")
        if args.compile:
            model.net.compile()
        shards = range((len(rows) - 1) // args.shard_size + 1)
        todo = [s for s in shards if not os.path.exists(shard_path(args.out, s))]
        if "checksums" in meta:  # it was whole once, and what is there must be as it was then
            store = PairStore(args.out)
            for s in set(shards) - set(todo):
                store.open_shard(s)
        barrier()  # all have seen the same list of shards before any adds to them
        mine = todo[rank::world]
        parts = {s: rows[s * args.shard_size:(s + 1) * args.shard_size] for s in mine}
        with tqdm(desc="pairs", total=sum(map(len, parts.values())), disable=rank > 0) as bar:
            for s, part in parts.items():
                write_file(shard_path(args.out, s), save(make_shard(model, part, args, bar)))
        barrier()
        if rank == 0 and (todo or "checksums" not in meta):
            meta["checksums"] = [checksum(shard_path(args.out, s)) for s in shards]
            write_file(path, json.dumps(meta, indent=1) + "\n")
        if rank == 0:
            print(f"wrote {args.out}: {len(rows)} pairs in {len(shards)} shards" if todo else
                  f"{args.out} is complete: {len(rows)} pairs; nothing was done")


if __name__ == "__main__":
    main()
