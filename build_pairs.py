"""Sec. 3.3 'Training Pipeline' of DDSPO (arXiv 2512.23426): pairs (x_0_w, x_0_l, c, c_minus) from the reference model.

    torchrun build_pairs.py --model sd14 --prompts perturbed.jsonl        one GPU, or --nproc_per_node of them
    torchrun build_pairs.py --model sd14 --from-images pick-a-pic         from pairs of images that people compared
    python build_pairs.py --inspect pairs/sd14                            what is in a store, and what is wrong with it

The model generates x_0_w from c and x_0_l from c_minus, both from the same x_T. Or x_0_w and x_0_l are the encodings of
two images, which lib/images.py reads. lib/pairs.py says how the pairs are stored. Pair i depends on row i of the
prompts and on seed + i, and on nothing else. So a stopped run goes on when the same command is given again, with any
number of processes, to the same store: byte for byte, if the machine and --batch-size are the same too.
"""

import argparse
import os
import shlex

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it: a thread that waits must sleep and not spin

import diffusers
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from lib import models
from lib.files import UserError, count, same_settings, stop_if_foreign, text_checksum, to_lines, write_file
from lib.images import look_at, read_image_pairs, read_pair, to_pixels
from lib.pairs import PairStore, finish_store, inspect, is_whole, read_meta, shard_path, write_shard
from lib.processes import at_least, barrier, given_flags, processes, program
from lib.prompts import read_perturbed, stop_if_bad


def sample_sides(model, rows, how):
    """x_0 of the winners of some rows and, but for negatives "none", of their losers: (B or 2 B, channels, h, w)."""
    prompts = [row["c"] for row in rows]
    x_T = torch.stack([models.initial_noise(row["noise_seed"], model.latent_shape) for row in rows])  # (B, ...)
    if how["negatives"] == "generated":
        prompts, x_T = prompts + [row["c_minus"] for row in rows], torch.cat([x_T, x_T])
    return models.sample(model, prompts, x_T, how["steps"], how["guidance"])


def encode_sides(model, pairs):
    """x_0 of the winners and of the losers of some (winner, loser), which are PIL images: (2 B, channels, h, w)."""
    size = model.latent_shape[1] * model.pipe.vae_scale_factor
    pixels = [to_pixels(pair[side], size) for side in (0, 1) for pair in pairs]
    return models.encode_images(model, torch.stack(pixels))


def make_shard(model, rows, args, how, images, bar):
    """The file of a shard, made --batch-size rows at a time: x_0_w and x_0_l, or x_0_w only; and the ids of its rows
    that give no pair. `images` has the checksums of each row's images, which the file keeps."""
    parts, made_from, black = [], [], Image.new("RGB", (8, 8))
    for start in range(0, len(rows), args.batch_size):
        some = rows[start:start + args.batch_size]
        if args.from_images:
            pairs = [read_pair(row) if images[row["id"]] else (black, black, "-") for row in some]
            made_from += [pair[-1] for pair in pairs]
            x_0 = encode_sides(model, pairs)
        else:
            x_0 = sample_sides(model, some, how)
        parts.append(x_0.cpu().split(len(some)))
        bar.update(len(some))
    shard = {name: torch.cat(x).contiguous() for name, x in zip(("x_0_w", "x_0_l"), zip(*parts))}
    bad = [row["id"] for i, row in enumerate(rows) if not all(x[i].isfinite().all() for x in shard.values())]
    if bad and not args.skip_bad:
        raise UserError(f"the latents of the pairs {bad} are not finite: their shard was not written. Give --skip-bad, "
                        "which leaves these pairs out.")
    content = save(shard, dict(images=" ".join(made_from)) if args.from_images else None)
    return content, bad + [row["id"] for row in rows if args.from_images and not images[row["id"]]]


@program
def main(argv=None):
    args = parse(argv)
    if args.inspect:
        return inspect(args.inspect)
    out = args.out or os.path.join("pairs", os.path.basename(os.path.abspath(args.model)))
    rows = read_image_pairs(args.from_images) if args.from_images else read_perturbed(args.prompts, args.seed)
    if not rows:
        raise UserError(f"{args.from_images or args.prompts} has no pairs in it.")
    stop_if_foreign(os.path.join(out, "meta.json"))
    with processes(out) as (rank, world, device):
        images = look_at(rows, rank, world, args.skip_bad) if args.from_images else {}
        model = models.load(args.model, device, torch.float16 if device.type == "cuda" else torch.float32)
        how = dict(negatives=args.negatives, steps=args.steps or model.steps,
                   guidance=model.guidance if args.guidance is None else args.guidance)
        if rank == 0:  # the first process alone begins the store
            begin_store(args, out, rows, model, how)
        barrier()
        if args.compile:
            model.net.compile()
        shards = [rows[k:k + args.shard_size] for k in range(0, len(rows), args.shard_size)]
        store = PairStore(out) if "checksums" in read_meta(out) else None  # a finished store must be whole still
        for number in range(len(shards))[rank::world]:
            check_made(out, number, shards[number], images, store)
        barrier()  # all shards were checked before the list of those to be made
        todo = [number for number in range(len(shards)) if not os.path.exists(shard_path(out, number))]
        barrier()  # all processes have this list before any makes a shard
        mine = todo[rank::world]
        with tqdm(desc="pairs", total=sum(len(shards[number]) for number in mine), disable=rank > 0) as bar:
            for number in mine:
                write_shard(out, number, *make_shard(model, shards[number], args, how, images, bar))
        barrier()
        if rank == 0:
            finish_store(out, len(shards))
            pairs = count(PairStore(out), "pair")
            print(f"wrote {out}: {pairs} in {count(shards, 'shard')}" if todo else
                  f"{out} is complete: {pairs}; nothing was done")
            method = (["--objective", "diffusion-dpo"] if args.from_images else
                      ["--negatives", "rand-positive"] if args.negatives == "none" else [])
            print("next: " + shlex.join(["python", "train.py", "--model", args.model, "--pairs", out, *method]))


# ---- before the loop


def begin_store(args, out, rows, model, how):
    """Writes meta.json and pairs.jsonl, or raises UserError if the store was begun with something else."""
    settings = dict(scheduler=models.scheduler_checksum(model), weights=models.model_checksum(model),
                    latents=list(model.latent_shape), scale=models.latent_scale(model), pairs=len(rows),
                    dtype=str(model.dtype).removeprefix("torch."), shard_size=args.shard_size,
                    negatives=args.negatives)
    if not args.from_images:
        settings |= dict(sampler=type(model.pipe.scheduler).__name__, steps=how["steps"], guidance=how["guidance"],
                         seed=args.seed)
    text = to_lines(row | dict(shard=i // args.shard_size, row=i % args.shard_size) for i, row in enumerate(rows))
    notes = dict(model=args.model, table=text_checksum(text),
                 versions=dict(torch=torch.__version__, diffusers=diffusers.__version__))
    meta, table = os.path.join(out, "meta.json"), os.path.join(out, "pairs.jsonl")
    begun = read_meta(out) if os.path.exists(meta) else None
    if not begun and not args.from_images:
        limit = max(model.max_tokens.values(), default=model.pipe.tokenizer.model_max_length)
        stop_if_bad(args.prompts, [f"{args.prompts}: {name}: c and c_minus are the same in the {limit} tokens that the "
                                   "model reads" for name in models.same_tokens(model, rows)])
    same_settings(meta, settings, notes)
    if begun and begun["table"] != notes["table"]:
        raise UserError(f"{out} was begun with other prompts than {args.from_images or args.prompts} has: use the same "
                        "again, or another --out.")
    if not os.path.exists(table):
        write_file(table, text)
    empty = [row for row in rows if row["c_minus"] == ""]
    if empty:
        print(f"{count(empty, 'pair')} of {len(rows)} with an empty c_minus, which is the null prompt")


def check_made(out, number, rows, images, store):
    """Raises UserError if a shard of a finished store is damaged, or was made from other images than are there now. In
    an unfinished store a damaged shard is removed, and so made again."""
    path = shard_path(out, number)
    if not os.path.exists(path):
        return
    if store:
        store.check_shard(number)
    elif not is_whole(out, number):
        os.remove(path)
        print(f"{path} is damaged: it is made again")
        return
    with safe_open(path, framework="pt") as shard:
        made_from = (shard.metadata() or {}).get("images", "").split()
    changed = [row["id"] for row, then in zip(rows, made_from) if (images[row["id"]] or "-") != then]
    if changed:
        raise UserError(f"{path} was made from other images of the pairs {changed[:10]} than are there now: put those "
                        "back, or delete the shard, which is then made again.")


def parse(argv):
    """The flags. Raises UserError where one does not go with the others."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="build_pairs.py --model MODEL [flags]",
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--inspect", metavar="STORE", help="only say and draw what is in a store, and what is wrong")
    add("--model", type=os.path.normpath,
        help=f"{', '.join(models.PRESETS)}, a hub id or a diffusers folder; NAME@fp16 takes the files of a variant")
    add("--prompts", default="perturbed.jsonl", help="what perturb.py wrote (default: perturbed.jsonl)")
    add("--out", help="the pair store (default: pairs/MODEL)")
    add("--from-images", metavar="PATH", help="instead of --prompts: a folder with a metadata.jsonl (c, winner and "
        "loser in each line) or with Pick-a-Pic's .parquet files, or one such file")
    add("--skip-bad", action="store_true", help="leave out pairs whose images cannot be read or are the same, or whose "
        "latents are not finite")
    add("--negatives", choices=["generated", "none"], default="generated", help="none: winners only, for half the cost "
        "(enough for train.py --negatives rand-positive and not-paired)")
    add("--steps", type=at_least(1, high=1000), help="of sampling (default, from scripts: 25, SANA 20)")
    add("--guidance", type=at_least(0, float, 100), help="guidance scale (default, from scripts: 7.5, SDXL and SD3 "
        "5.0, SANA 4.5; shapes 3)")
    add("--batch-size", type=at_least(1), default=16, help="pairs sampled at once (default: 16, guess)")
    add("--shard-size", type=at_least(1), default=128, help="pairs in a file (default: 128, guess)")
    add("--seed", type=at_least(0), default=0, help="x_T of pair i comes from seed + i (default: 0)")
    add("--compile", action="store_true", help="torch.compile the network")
    args, given = parser.parse_args(argv), given_flags(parser, argv)
    if (args.inspect or not args.model) and given != {"inspect"}:
        raise UserError("give --model, or --inspect STORE and nothing else.")
    for name in ("prompts", "negatives", "seed", "steps", "guidance"):
        if args.from_images and name in given:
            raise UserError(f"--{name} goes with pairs that are generated, not with --from-images.")
    return args


if __name__ == "__main__":
    main()
