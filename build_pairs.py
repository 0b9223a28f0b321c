"""Sec. 3.3 'Training Pipeline' of DDSPO (arXiv 2512.23426): pairs (x_0_w, x_0_l, c, c_minus) from the reference model.

    torchrun build_pairs.py --model sd14 --prompts perturbed.jsonl        one GPU, or --nproc_per_node of them
    torchrun build_pairs.py --model sd14 --from-images pick-a-pic         from pairs of images that people compared
    python build_pairs.py --inspect pairs/sd14                            what is in a store, and what is wrong with it

x_0_w is generated from c and x_0_l from c_minus, both from the same x_T; or they are the encodings of two images: of
files that a metadata.jsonl names, or in Pick-a-Pic's .parquet files. pairs.py says how they are stored. Pair i depends
on row i of the prompts and on seed + i, and on nothing else. So a run that was stopped goes on when the same command is
run again, with any number of processes, to the same store: byte for byte, if the machine and --batch-size are the same
too.
"""

import argparse
import collections
import filecmp
import glob
import hashlib
import io
import json
import os
import shlex

import diffusers
import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from lib import models, plots
from lib.files import UserError, checksum, count, json_lines, same_settings, text_checksum, to_lines, write_file
from lib.pairs import PairStore, misfit, read_meta, shard_path
from lib.processes import at_least, barrier, is_first, processes, program
from lib.prompts import check_rows, parquet_rows, stop_if_bad

# ---- what the pairs are made of


def read_perturbed(path, seed):
    """A row, dict(id, c, c_minus, noise_seed and how perturb.py made c_minus), for each line of perturb.py's file or of
    another one in its format."""
    if not os.path.isfile(path) or not path.endswith(".jsonl"):
        raise UserError(f"--prompts {path}: there is no such .jsonl file. Make it with  python perturb.py prompts.txt "
                        "perturbed.jsonl")
    lines = dict(json_lines(path))  # {number: row}
    found = list(check_rows(path, lines.items(), ["c", "c_minus"]))
    stop_if_bad(path, [f"{path}:{number}: c is empty, or c_minus is the same as c: they make no preference"
                              for number, _, c, c_minus in found if not c or c == c_minus])
    rows = []
    for i, (number, name, c, c_minus) in enumerate(found):
        how = {key: lines[number][key] for key in ("strategy", "perturb_seed", "llm") if key in lines[number]}
        rows.append(dict(id=name, c=c, c_minus=c_minus, noise_seed=seed + i, **how))
    return rows


def read_image_pairs(path):
    """A row, dict(id, c, c_minus=None, winner, loser), for each line of a .jsonl file with c and the names of the two
    images, which are relative to the file's folder; or for each comparison in Pick-a-Pic's .parquet files. A folder
    stands for its metadata.jsonl or for its .parquet files, of which those of the training split are taken."""
    inside = os.path.join(glob.escape(path), "")
    files = (glob.glob(inside + "metadata.jsonl") or glob.glob(inside + "train*.parquet")
             or glob.glob(inside + "*.parquet") or [path])
    if not os.path.isfile(files[0]) or not files[0].endswith((".jsonl", ".parquet")):
        raise UserError(f"--from-images {path}: must be a folder with a metadata.jsonl or with Pick-a-Pic's .parquet "
                        "files, or one such file. A line of the .jsonl file is a pair, with c, winner and loser.")
    if files[0].endswith(".parquet"):
        return read_pick_a_pic(sorted(files))
    path, rows, bad = files[0], [], []
    for number, name, c, *sides in check_rows(path, json_lines(path), ["c", "winner", "loser"]):
        winner, loser = (os.path.join(os.path.dirname(path), file) for file in sides)
        rows.append(dict(id=name, c=c, c_minus=None, winner=winner, loser=loser))
        if not (c and os.path.isfile(winner) and os.path.isfile(loser) and not filecmp.cmp(winner, loser, False)):
            bad.append(f"{path}:{number}: c is empty, winner and loser are the same image, or one of {sides} is not "
                       "there")
    stop_if_bad(path, bad)
    return rows


def read_pick_a_pic(files):
    """The rows of .parquet files with Pick-a-Pic's columns. Their images stay in the files: winner and loser are
    FILE/ROW GROUP/ROW/COLUMN. Ties, and what else is no comparison, are left out and counted."""
    rows, left_out, number = [], collections.Counter(), 0
    for path in files:
        for group, k, row in parquet_rows(path, ["caption", "label_0"], ["are_different"]):
            number += 1
            if row["label_0"] not in (0, 1):
                left_out["ties"] += 1
            elif not row["caption"].strip() or row.get("are_different") is False:
                left_out["without a caption or of one image"] += 1
            else:
                best, place = 0 if row["label_0"] == 1 else 1, f"{path}/{group}/{k}/jpg_"
                rows.append(dict(id=f"{number:06d}", c=row["caption"].strip(), c_minus=None,
                                 winner=f"{place}{best}", loser=f"{place}{1 - best}"))
    for which, n in left_out.items() if is_first() else ():
        print(f"left out {n} of {number} pairs: {which}")
    return rows


class Images:
    """Reads the bytes of image files and of images in .parquet files. Of these it reads on from the last one, a few
    rows at a time, because a row group may be larger than the memory."""

    place = None

    def read(self, name):
        if os.path.isfile(name):
            with open(name, "rb") as file:
                return file.read()
        path, group, row, column = name.rsplit("/", 3)
        if self.place != (path, group) or int(row) < self.row:
            self.rows = parquet_rows(path, ["jpg_0", "jpg_1"], group=int(group), at_once=16)
            self.place, self.row = (path, group), -1
        while self.row < int(row):
            _, self.row, self.cells = next(self.rows)
        if not isinstance(self.cells[column], bytes):
            raise UserError(f"{name} is not the bytes of an image file.")
        return self.cells[column]


def read_image(name, content, size):
    """The bytes of an image -> (3, size, size) in [-1, 1]: upright, its shorter side resized, its middle cut out."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises these
        raise UserError(f"{name} cannot be read as an image ({error}): replace it, or take its pair out.") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1  # (3, size, size)


# ---- making them


def generate(model, rows, args):
    """x_0 of the winners of some rows and, but for --negatives none, of their losers."""
    prompts = [row["c"] for row in rows]
    x_T = torch.stack([models.initial_noise(row["noise_seed"], model.latent_shape) for row in rows])  # (B, ...)
    if args.negatives == "generated":
        prompts, x_T = prompts + [row["c_minus"] for row in rows], torch.cat([x_T, x_T])
    return models.sample(model, prompts, x_T, args.steps, args.guidance)


def encode(model, rows, contents):
    """x_0 of the winners of some rows and of their losers. `contents` are the bytes of each pair's images."""
    size = model.latent_shape[1] * model.pipe.vae_scale_factor
    pixels = [read_image(row[side], pair[i], size) for i, side in enumerate(("winner", "loser"))
              for row, pair in zip(rows, contents)]
    return models.encode_images(model, torch.stack(pixels))


def read_contents(rows, images):
    """The bytes of the two images of each row, and a checksum of each pair."""
    contents = [(images.read(row["winner"]), images.read(row["loser"])) for row in rows]
    same = [row["id"] for row, (winner, loser) in zip(rows, contents) if winner == loser]
    if same:
        raise UserError(f"the winner and the loser of the pairs {same[:10]} are the same image: take these pairs out.")
    return contents, [hashlib.sha256(b"".join(pair)).hexdigest()[:16] for pair in contents]


def make_shard(model, rows, args, bar, images):
    """The file of a shard, made --batch-size rows at a time: x_0_w and x_0_l, or x_0_w only. Where they come from
    images, the file keeps a checksum of each pair's too."""
    contents, checksums = read_contents(rows, images) if args.from_images else ((), ())
    parts = []
    for start in range(0, len(rows), args.batch_size):
        some = rows[start:start + args.batch_size]
        x_0 = encode(model, some, contents[start:start + args.batch_size]) if contents else generate(model, some, args)
        parts.append(x_0.cpu().split(len(some)))
        bar.update(len(some))
    shard = {name: torch.cat(x).contiguous() for name, x in zip(("x_0_w", "x_0_l"), zip(*parts))}
    bad = [row["id"] for i, row in enumerate(rows) if not all(x[i].isfinite().all() for x in shard.values())]
    if bad:
        raise UserError(f"the latents of the pairs {bad} are not finite: their shard was not written. Leave them out.")
    return save(shard, dict(images=" ".join(checksums)) if contents else None)


def check_images(path, rows, images):
    """Raises UserError if a shard was made from other images than its rows' files hold now."""
    with safe_open(path, framework="pt") as shard:
        made_from = (shard.metadata() or {}).get("images", "").split()
    found = read_contents(rows, images)[1]
    changed = [row["id"] for row, now, then in zip(rows, found, made_from) if now != then]
    if changed:
        raise UserError(f"{path} was made from other images of the pairs {changed[:10]} than are there now: put those "
                        "back, or delete the shard, which is then made again.")


def begin_store(args, rows, model):
    """Writes meta.json and pairs.jsonl, or raises UserError if the store was begun with something else."""
    settings = dict(weights=models.model_checksum(model), latents=list(model.latent_shape),
                    scale=models.latent_scale(model), dtype=str(model.dtype).removeprefix("torch."), pairs=len(rows),
                    shard_size=args.shard_size, negatives=args.negatives)
    if not args.from_images:
        settings |= dict(sampler=type(model.pipe.scheduler).__name__, steps=args.steps, guidance=args.guidance,
                         seed=args.seed)
    placed = [row | dict(shard=i // args.shard_size, row=i % args.shard_size) for i, row in enumerate(rows)]
    text = to_lines(placed)
    notes = dict(model=args.model, table=text_checksum(text),
                 versions=dict(torch=torch.__version__, diffusers=diffusers.__version__))
    meta, table = os.path.join(args.out, "meta.json"), os.path.join(args.out, "pairs.jsonl")
    begun = read_meta(args.out) if os.path.exists(meta) else None
    if not begun and not args.from_images:
        limit = max(model.max_tokens.values(), default=model.pipe.tokenizer.model_max_length)
        stop_if_bad(args.prompts, [f"{args.prompts}: {name}: c and c_minus are the same in the {limit} tokens "
                                          "that the model reads" for name in models.same_tokens(model, rows)])
    same_settings(meta, settings, notes)
    if begun and begun["table"] != notes["table"]:
        raise UserError(f"{args.out} was begun with other prompts than {args.from_images or args.prompts} has: use the "
                        "same again, or another --out.")
    if not os.path.exists(table):
        write_file(table, text)
    empty = [row for row in rows if row["c_minus"] == ""]
    if empty:
        print(f"{count(empty, 'pair')} of {len(rows)} with an empty c_minus, which is the null prompt")


# ---- looking at them


def check_store(store, model):
    """All that is wrong with a pair store, a sentence each."""
    problems = [f"pair {name}: c and c_minus are the same to the model"
                for name in models.same_tokens(model, store.rows)]
    if misfit(store.meta, model):
        problems.append(f"{store.folder}: {misfit(store.meta, model)}")
    for number in tqdm(range(len(store.meta["checksums"])), "check"):
        try:
            store.check_shard(number)
        except UserError as error:
            problems.append(str(error))
    return problems


def inspect(folder):
    """Says what is in a store, draws four of its pairs as FOLDER.png, and raises UserError with all that is wrong."""
    store, picture = PairStore(folder), os.path.normpath(folder) + ".png"
    plots.try_path(picture)
    print(json.dumps({key: value for key, value in store.meta.items() if key not in ("checksums", "table")}, indent=1))
    model = models.load(store.meta["model"])
    problems = check_store(store, model)
    if problems:
        raise UserError("\n".join([*problems, f"{folder}: {count(problems, 'problem')}."]))
    some = [store[i] for i in np.linspace(0, len(store) - 1, min(256, len(store))).astype(int)]
    shown, columns, shares = some[::max(1, len(some) // 4)][:4], [], (0, 5, 50, 95, 100)
    for name, side, key in (("x_0_w", 1, "c"), ("x_0_l", 2, "c_minus")):
        words = [len(row[key].split()) for row in store.rows if row[key] is not None]
        if words:
            print(f"{key}: {len(words)} prompts; words: "
                  + ", ".join(f"{share}% {n:.3g}" for share, n in zip(shares, np.percentile(words, shares))))
        if shown[0][side] is not None:
            x_0 = torch.stack([pair[side] for pair in some]).float()  # (pairs, channels, h, w)
            print(f"{name} of {len(x_0)} pairs: mean {x_0.mean():.3f}, deviation {x_0.std():.3f}")
            images = models.decode(model, torch.stack([pair[side] for pair in shown]))
            columns.append((name, images, [row[key] for row, *_ in shown]))
    plots.draw_grid(None, columns, picture)
    print(f"{folder} is whole")


def parse(argv):
    """The flags. Raises UserError where one does not go with the others."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="build_pairs.py --model MODEL [flags]",
                                     allow_abbrev=False)
    parser.add_argument("--inspect", metavar="STORE", help="only say and draw what is in a store, and what is wrong")
    parser.add_argument("--model", help=f"{', '.join(models.PRESETS)}, a hub id or a diffusers folder")
    parser.add_argument("--prompts", help="what perturb.py wrote (default: perturbed.jsonl)")
    parser.add_argument("--out", help="the pair store (default: pairs/MODEL)")
    parser.add_argument("--from-images", metavar="PATH", help="instead of --prompts: a folder with a metadata.jsonl "
                        "(c, winner and loser in each line) or with Pick-a-Pic's .parquet files, or one such file")
    parser.add_argument("--negatives", choices=["generated", "none"], help="none: winners only, for half the cost "
                        "(enough for train.py --negatives rand-positive and not-paired)")
    parser.add_argument("--steps", type=at_least(1, high=1000), help="of sampling (default, from scripts: 25, SANA 20)")
    parser.add_argument("--guidance", type=at_least(0, float, 100), help="guidance scale (default, from scripts: "
                        "7.5, SDXL and SD3 5.0, SANA 4.5; shapes 3)")
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="pairs sampled at once (default: 16, guess)")
    parser.add_argument("--shard-size", type=at_least(1), default=128, help="pairs in a file (default: 128, guess)")
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
    args.out = args.out or os.path.join("pairs", os.path.basename(os.path.abspath(args.model)))
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
        if args.compile:
            model.net.compile()
        meta = read_meta(args.out)
        store = PairStore(args.out) if "checksums" in meta else None  # whole once: what is there must be as it was then
        parts = {s: rows[k:k + args.shard_size] for s, k in enumerate(range(0, len(rows), args.shard_size))}
        done = [s for s in parts if os.path.exists(shard_path(args.out, s))]
        todo, images = [s for s in parts if s not in done], Images()
        for s in done[rank::world]:
            if store:
                store.open_shard(s)
            if args.from_images:
                check_images(shard_path(args.out, s), parts[s], images)
        barrier()  # all have seen the same list of shards before any adds to them
        mine = todo[rank::world]
        with tqdm(desc="pairs", total=sum(len(parts[s]) for s in mine), disable=rank > 0) as bar:
            for s in mine:
                write_file(shard_path(args.out, s), make_shard(model, parts[s], args, bar, images))
        barrier()
        if rank == 0:
            if todo or not store:
                meta["checksums"] = [checksum(shard_path(args.out, s)) for s in parts]
                write_file(os.path.join(args.out, "meta.json"), json.dumps(meta, indent=1) + "\n")
            print(f"wrote {args.out}: {count(rows, 'pair')} in {count(parts, 'shard')}" if todo else
                  f"{args.out} is complete: {count(rows, 'pair')}; nothing was done")
            method = (["--objective", "diffusion-dpo"] if args.from_images else
                      ["--negatives", "rand-positive"] if args.negatives == "none" else [])
            print("next: " + shlex.join(["python", "train.py", "--model", args.model, "--pairs", args.out, *method]))


if __name__ == "__main__":
    main()
