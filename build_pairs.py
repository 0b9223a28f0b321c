"""Sec. 3.3 'Training Pipeline' of DDSPO (arXiv 2512.23426): pairs (x_0_w, x_0_l, c, c_minus) from the reference model.

    torchrun build_pairs.py --model sd14 --prompts perturbed.jsonl        one GPU, or --nproc_per_node of them
    torchrun build_pairs.py --model sd14 --from-images pick-a-pic         from pairs of images that people compared
    python build_pairs.py --inspect pairs/sd14                            what is in a store, and what is wrong with it

The model generates x_0_w from c and x_0_l from c_minus, both from the same x_T. Or x_0_w and x_0_l are the encodings of
two images (lib/images.py). Pair i depends on row i of the prompts and on seed + i, and on nothing else. So a stopped
run goes on when the same command is given again, with any number of processes, to the same store (lib/pairs.py): byte
for byte, if the machine and --batch-size are the same too.
"""

import argparse
import os
import shlex

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it: a thread that waits must sleep and not spin

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from lib import models
from lib.files import UserError, checksum, count, same_settings, stop_if_foreign, text_checksum, to_lines, write_file
from lib.images import look_at, read_image_pairs, read_pair, to_pixels
from lib.pairs import PairStore, inspect, read_meta, shard_path, write_shards
from lib.processes import at_least, barrier, from_all, given_flags, processes, program
from lib.prompts import read_perturbed, stop_if_bad


def sample_sides(model, rows, how):
    """x_0 of the winners of some rows and, but for negatives "none", of their losers: each (B, channels, h, w)."""
    prompts = [row["c"] for row in rows]
    x_T = torch.stack([models.initial_noise(row["noise_seed"], model.latent_shape) for row in rows])  # (B, ...)
    if how["negatives"] == "generated":
        prompts, x_T = prompts + [row["c_minus"] for row in rows], torch.cat([x_T, x_T])
    return models.sample(model, prompts, x_T, how["steps"], how["guidance"]).cpu().split(len(rows))


def encode_sides(model, rows):
    """x_0 of the winners and of the losers of some rows, which name images: each (B, channels, h, w)."""
    size, pairs = model.latent_shape[1] * model.pipe.vae_scale_factor, [read_pair(row) for row in rows]
    pixels = [to_pixels(pair[side], size) for side in (0, 1) for pair in pairs]
    return models.encode_images(model, torch.stack(pixels)).cpu().split(len(rows))


def make_shard(model, rows, args, how, images, bar):
    """The file of a shard, made --batch-size rows at a time: x_0_w and x_0_l, or x_0_w only; and the ids of the rows
    whose latents are not finite. `images` has a checksum of each row's images, which the file keeps."""
    parts = []
    for start in range(0, len(rows), args.batch_size):
        some = rows[start:start + args.batch_size]
        parts.append(encode_sides(model, some) if images else sample_sides(model, some, how))
        bar.update(len(some))
    shard = {name: torch.cat(x).contiguous() for name, x in zip(("x_0_w", "x_0_l"), zip(*parts))}
    bad = [row["id"] for i, row in enumerate(rows) if not all(x[i].isfinite().all() for x in shard.values())]
    if bad and not args.skip_bad:
        raise UserError(f"the latents of the pairs {bad} are not finite. Give --skip-bad, which leaves them out.")
    if bad:
        print(f"left out {count(bad, 'pair')}, whose latents are not finite: {bad}")
    return save(shard, dict(images=" ".join(images[row["id"]] for row in rows)) if images else None), bad


@program
def main(argv=None):
    args = parse(argv)
    if args.inspect:
        return inspect(args.inspect)
    out = args.out or os.path.join("pairs", os.path.basename(os.path.abspath(args.model)))
    rows = read_image_pairs(args.from_images) if args.from_images else read_perturbed(args.prompts, args.seed)
    stop_if_foreign(os.path.join(out, "meta.json"))
    with processes(out) as (rank, world, device):
        images = look_at(rows, rank, world, args.skip_bad) if args.from_images else {}
        rows = [row for row in rows if row["id"] in images or not args.from_images]  # without the bad ones
        if not rows:
            raise UserError(f"{args.from_images or args.prompts} has no pairs in it.")
        model = models.load(args.model, device, torch.float16 if device.type == "cuda" else torch.float32)
        how = dict(negatives=args.negatives)
        if not args.from_images:
            how |= dict(sampler=type(model.pipe.scheduler).__name__, steps=args.steps or model.steps,
                        guidance=model.guidance if args.guidance is None else args.guidance, seed=args.seed)
        if rank == 0:  # the first process alone begins the store
            begin_store(args, out, rows, model, how)
        barrier()
        if args.compile:
            model.net.compile()
        shards = [rows[k:k + args.shard_size] for k in range(0, len(rows), args.shard_size)]
        todo = missing_shards(out, shards, images, rank, world)
        own = sum(len(shards[number]) for number in todo[rank::world])
        with tqdm(desc="pairs", total=own, disable=rank > 0) as bar:
            for turn in range(0, len(todo), world):
                mine = todo[turn + rank:turn + rank + 1]  # the last turn may have none for this process
                made = [(number, *make_shard(model, shards[number], args, how, images, bar)) for number in mine]
                write_shards(out, made)
        if rank == 0:
            pairs = count(PairStore(out), "pair")
            print(f"wrote {out}: {pairs} in {count(shards, 'shard')}" if todo else
                  f"{out} is complete: {pairs}; nothing was done")
            method = (["--objective", "diffusion-dpo"] if args.from_images else
                      ["--negatives", "rand-positive"] if args.negatives == "none" else [])
            print("next: " + shlex.join(["python", "train.py", "--model", args.model, "--pairs", out, *method]))


# ---- before the loop


def begin_store(args, out, rows, model, how):
    """Writes meta.json and pairs.jsonl, or raises UserError if the store was begun with something else."""
    meta, table = os.path.join(out, "meta.json"), os.path.join(out, "pairs.jsonl")
    if not (args.from_images or os.path.exists(meta)):
        stop_if_bad(args.prompts, [f"{args.prompts}: {name}: c and c_minus are the same in the tokens that the model "
                                   "reads" for name in models.same_tokens(model, rows)])
    settings = dict(scheduler=models.scheduler_checksum(model), weights=models.model_checksum(model),
                    latents=list(model.latent_shape), scale=model.latent_scale, pairs=len(rows),
                    dtype=str(model.dtype).removeprefix("torch."), shard_size=args.shard_size, **how)
    text = to_lines(row | dict(shard=i // args.shard_size, row=i % args.shard_size) for i, row in enumerate(rows))
    notes = dict(model=models.full_name(args.model), table=text_checksum(text),
                 versions=dict(torch=torch.__version__, diffusers=diffusers.__version__))
    begun = read_meta(out) if os.path.exists(meta) else notes
    same_settings(meta, settings, notes)
    if begun["table"] != notes["table"]:
        raise UserError(f"{out} was begun with other prompts than {args.from_images or args.prompts} has: use the same "
                        "again, or another --out.")
    if not os.path.exists(table):
        write_file(table, text)
    empty = [row for row in rows if row["c_minus"] == ""]
    if empty:
        print(f"{count(empty, 'pair')} of {len(rows)} with an empty c_minus, which is the null prompt")


def missing_shards(out, shards, images, rank, world):
    """The numbers of the shards to be made: those that are not there, and damaged ones of an unfinished store. Raises
    UserError if one of a finished store is damaged, or if one was made from other images than are there now."""
    missing, checksums = [], read_meta(out)["checksums"]
    store = PairStore(out) if None not in checksums else None
    for number in range(len(shards))[rank::world]:
        path = shard_path(out, number)
        if not os.path.exists(path):
            missing.append(number)
        elif store:
            store.check_shard(number)
        elif checksum(path) != checksums[number]:
            print(f"{path} is damaged or was not finished: it is made again")
            missing.append(number)
        if images and number not in missing:
            with safe_open(path, framework="pt") as shard:
                seen = shard.metadata()["images"].split()
            changed = [row["id"] for row, then in zip(shards[number], seen) if images[row["id"]] != then]
            if changed:
                raise UserError(f"{path} was made from other images of the pairs {changed[:10]} than are there now: "
                                "put those back, or delete the shard, which is then made again.")
    return sorted(sum(from_all(missing), []))  # all were checked before the first is made


def parse(argv):
    """The flags. Raises UserError where one does not go with the others."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--inspect", metavar="STORE", help="only say and draw what is in a store, and what is wrong")
    add("--model", type=os.path.normpath, help=f"{', '.join(models.PRESETS)}, a hub id or a folder; or NAME@VARIANT")
    add("--prompts", default="perturbed.jsonl", help="what perturb.py wrote (default: perturbed.jsonl)")
    add("--out", help="the pair store (default: pairs/MODEL)")
    add("--from-images", metavar="PATH", help="in place of --prompts: Pick-a-Pic, or metadata.jsonl: c, winner, loser")
    add("--skip-bad", action="store_true", help="leave out pairs of bad or equal images, or of non-finite latents")
    add("--negatives", choices=["generated", "none"], default="generated", help="none: winners only, at half the cost")
    add("--steps", type=at_least(1, high=500), help="of sampling (default, from scripts: 25, SANA 20)")
    add("--guidance", type=at_least(0, float, 100), help="default, by scripts: 7.5, SDXL and SD3 5, SANA 4.5; shapes 3")
    add("--batch-size", type=at_least(1), default=16, help="pairs sampled at once, of one shard (default: 16, guess)")
    add("--shard-size", type=at_least(1), default=128, help="pairs in a file (default: 128, guess)")
    add("--seed", type=at_least(0), default=0, help="x_T of pair i comes from seed + i (default: 0)")
    add("--compile", action="store_true", help="torch.compile the network")
    args, given = parser.parse_args(argv), given_flags(parser, argv)
    if (args.inspect or not args.model) and given != {"inspect"}:
        raise UserError("give --model, or --inspect STORE and nothing else.")
    for name in ("prompts", "negatives", "seed", "steps", "guidance", "compile"):
        if args.from_images and name in given:
            raise UserError(f"--{name} goes with pairs that are generated, not with --from-images.")
    return args


if __name__ == "__main__":
    main()
