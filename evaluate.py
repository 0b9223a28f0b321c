"""The benchmarks of Tables 1 to 3 and the pictures of Fig. 3 (Sec. 4.2 to 4.4 of DDSPO, arXiv 2512.23426).

    torchrun --nproc_per_node 8 evaluate.py generate --model sd14 --out eval/sd14
    torchrun --nproc_per_node 8 evaluate.py score eval/sd14
    python evaluate.py table eval/sd14
    python evaluate.py grid --models sd14 runs/sd14-ddspo/pipeline --prompts prompts.txt --out grid.png

`generate` writes a benchmark's images into the folders that its official scorer reads. Image i comes from the noise of
seed + i, and batch k holds the same images on any number of GPUs. `score` judges them and writes scores/. `table` makes
means, 95 % intervals and paired differences. The same command goes on after a stop. judges/ has a file a benchmark.
"""

import argparse
import json
import os
import shlex
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it: a thread that waits must sleep and not spin

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from judges import compbench, fid, geneval, geneval2, preference, shapes, shared
from judges.table import BRACKETS, make_table
from lib import models, plots
from lib.files import UserError, reading, stop_if_not_ours, to_lines, write_file
from lib.parts import replace_unet
from lib.processes import at_least, barrier, holding, place, processes, program
from lib.prompts import read_prompts

BENCHMARKS = {  # images, the list of them, {file in scores/: (groups that it judges or None for all, loader, weights)}
    "geneval": (2212, geneval.items, {"geneval": (None, geneval.load, f"{geneval.DETECTOR} {geneval.CLIP}")}),
    "compbench": (18000, compbench.items, {
        "blip": (("color", "shape", "texture", "complex"), compbench.load_blip, compbench.BLIP),
        "clipscore": (("non_spatial", "complex"), preference.load_clipscore, preference.CLIP_B),
        "owl": (("spatial", "complex"), compbench.load_owl, compbench.OWL)}),
    "coco": (30000, fid.items, {"coco": (None, fid.load, "inception-v3-compat")}),
    "hps": (3200, preference.items_hps, {
        "hps": (None, preference.load_hps, preference.HPS),
        "hps21": (None, lambda *place: preference.load_hps(*place, preference.HPS_21), preference.HPS_21)}),
    "pick": (1632, preference.items_pick, {"pick": (None, preference.load_pick, preference.PICK)}),
    "geneval2": (800, geneval2.items, {"geneval2": (None, geneval2.load, geneval2.JUDGE)}),
    "shapes": (400, shapes.items, {"shapes": (None, shapes.load, "rules")})}
PAPERS = [bench for bench in BENCHMARKS if bench not in ("geneval2", "shapes")]
POOL = ThreadPoolExecutor(8)  # threads that write and read images (guess)


def list_images(bench, data):
    """All images of a benchmark in the order of their seeds: a list of rows, see judges/shared.py."""
    (count, items, _), folder = BENCHMARKS[bench], os.path.join(data, bench)
    with reading(f"the list of prompts in {folder}", "delete that folder, so that it is fetched again."):
        rows = items(data)
        if len({row["path"] for row in rows}) != count:
            raise ValueError(f"{len(rows)} images, not {count}")
    return rows


# ---- generate


def generate(args):
    """Writes all images of the benchmarks --bench that are not there yet."""
    with processes(args.out) as (rank, world, device):
        rows = {bench: list_images(bench, args.data) for bench in args.bench}
        model = load_model(args.model, args, device, args.unet)
        if rank == 0:
            shared.begin(args.out, rows, *shared.settings_of(model, args))
        barrier()  # no process writes an image before the first one has found that it belongs here
        for bench in rows:
            write_images(bench, rows[bench], model, args, rank, world)
    if rank == 0:
        print(f"{args.out} has images of {', '.join(rows)}. Next:\npython evaluate.py score {shlex.quote(args.out)}")


def write_images(bench, rows, model, args, rank, world):
    """Writes this process's share of a benchmark: every world-th batch, from batch `rank` on. A batch is sampled whole
    even where only some of its images are missing, so that an image depends on neither a stop nor `world`."""
    if bench == "geneval" and rank == 0:
        for row in rows[::4]:
            path = os.path.join(args.out, row["path"].rsplit("/", 2)[0], "metadata.jsonl")
            write_file(path, json.dumps(row["metadata"]) + "\n")
    for start in tqdm(range(0, len(rows), args.batch_size)[rank::world], f"generate {bench}", disable=rank > 0):
        batch = rows[start:start + args.batch_size]
        paths = [os.path.join(args.out, row["path"]) for row in batch]
        if not all(map(shared.is_there, paths)):
            seeds = range(args.seed + start, args.seed + start + len(batch))
            images = sample_images(model, [row["prompt"] for row in batch], seeds, model.steps, model.guidance)
            list(POOL.map(save_image, images, paths))


def load_model(name, args, device, unet=None):
    """The model, with the steps and the guidance scale that it is to sample with."""
    model = models.load(name, device, torch.float16 if device.type == "cuda" else torch.float32)
    if unet:
        replace_unet(model, unet)
    model.pipe.vae.enable_slicing()  # a decoder at 1024 pixels needs gigabytes an image
    model.steps = args.steps or model.steps
    model.guidance = model.guidance if args.guidance is None else args.guidance
    return model


def sample_images(model, prompts, seeds, steps, guidance):
    """A PIL image for each prompt, from the noise of its seed."""
    x_T = torch.stack([models.initial_noise(seed, model.latent_shape) for seed in seeds])  # (B, channels, h, w)
    images = models.sample(model, prompts, x_T, steps, guidance, output_type="np")
    if not np.isfinite(images).all():
        raise UserError(f"{model.pipe.name_or_path} makes images of NaN: its weights are damaged, or overflow.")
    return model.pipe.numpy_to_pil(images)


def save_image(image, path):
    """Writes a PNG (level 1: fast) or JPEG file (Pillow's quality 75), if there is none. BK-SDM's protocol: a COCO
    image is written as JPEG into im512, read again, resized to 256 x 256 (bicubic) and written as JPEG into im256."""
    if shared.is_there(path):
        return
    folder, name = os.path.split(path)
    if os.path.basename(folder) == "im256":
        large = os.path.join(os.path.dirname(folder), "im512", name)
        save_image(image, large)
        image = Image.open(large).resize((256, 256))
    write_file(path, lambda partial: image.save(partial, "PNG" if path.endswith(".png") else "JPEG", compress_level=1))


# ---- score


def score(args):
    """Judges all images of the runs that have no score yet: no image may be missing, and processes share the judges."""
    rank, world, device = place()
    runs = list(dict.fromkeys(map(os.path.normpath, args.runs)))
    tasks = [task for run in runs for task in find_tasks(run, args)][rank::world]
    for load in list(dict.fromkeys(load for *_, batches, load in tasks if batches))[1:]:
        load(device, args.data)  # each judge once, so that a missing package fails now, not after hours
    for run, name, origin, batches, load in tasks:
        if batches:
            with holding(os.path.join(run, "scores", name)):
                write_scores(run, name, origin, batches, load(device, args.data), args.data)
    if rank == 0:
        print(f"wrote the scores of {', '.join(runs)}. Next:\npython evaluate.py table {shlex.join(runs)}")


def find_tasks(run, args):
    """Yields (run, name, origin, batches, load) for each judge: its scores' name, what they belong to, the batches that
    lack some (judged whole, so that none depends on a stop), its loader. Raises UserError if an image is missing."""
    there = [bench for bench in args.bench or BENCHMARKS if args.foreign and os.path.isdir(os.path.join(run, bench))]
    if there:
        shared.begin(run, {bench: list_images(bench, args.data) for bench in there}, shared.MADE_ELSEWHERE)
    settings = shared.read_settings(run)
    for bench in dict.fromkeys(args.bench or settings["lists"]):
        if bench not in BENCHMARKS:
            raise UserError(f"{run}/settings.json names {bench}, which is no benchmark: take it out of the lists.")
        rows = list_images(bench, args.data)
        if settings["lists"].get(bench) != shared.list_checksum(rows):
            raise UserError(f"{run} has no images of the prompts in {args.data}/{bench}: generate makes them.")
        missing = [row["path"] for row in rows if not shared.is_there(os.path.join(run, row["path"]))]
        if missing:
            raise UserError(f"{len(missing)} of {len(rows)} images of {bench} are missing in {run}, first "
                            f"{missing[0]}: give the command of generate again, or put them there.")
        for name, (groups, load, weights) in BENCHMARKS[bench][2].items():
            own = [row for row in rows if groups is None or row["group"] in groups]
            batches = [own[start:start + args.batch_size] for start in range(0, len(own), args.batch_size)]
            origin = settings | dict(lists=settings["lists"][bench], judge=weights)
            scores = shared.read_scores(run, name, origin)
            left = [batch for batch in batches if any({row["path"], "all"}.isdisjoint(scores) for row in batch)]
            if not (name == "owl" and compbench.official_spatial(run)):
                yield run, name, origin, left, load


def write_scores(run, name, origin, batches, judge, data):
    """Adds what the judge finds to scores/`name`.jsonl, a line an image, or makes scores/coco.json of all images."""
    path, scores = os.path.join(run, "scores", name), shared.read_scores(run, name, origin)
    pixels, bar = 256 if name == "coco" else origin["pixels"], tqdm(batches, f"score {run}: {name}")
    write_file(os.path.join(path, "settings.json"), json.dumps(origin, indent=1) + "\n")

    def judged(batch):
        images = list(POOL.map(lambda row: shared.open_image(os.path.join(run, row["path"]), pixels), batch))
        return [row | found for row, found in zip(batch, judge(batch, images)) if row["path"] not in scores]

    if name == "coco":
        write_file(path + ".json", to_lines([fid.summary([row for batch in bar for row in judged(batch)], data)]))
        return
    write_file(path + ".jsonl", to_lines(scores.values()))  # without an unfinished line
    for batch in bar:
        with open(path + ".jsonl", "a", encoding="utf-8") as file:
            file.write(to_lines(judged(batch)))


# ---- table and grid


def table(args):
    """Prints the runs beside each other and beside the paper's rows, and writes the same to --out and as JSON."""
    path = os.path.splitext(args.out)[0] + ".json"
    if not args.out.lower().endswith(".md"):
        raise UserError(f"--out {args.out} must be the name of a file to write that ends in .md.")
    stop_if_not_ours(args.out, BRACKETS.encode())
    stop_if_not_ours(path, b'{\n "runs": {')
    text, whole = make_table(list(dict.fromkeys(map(os.path.normpath, args.runs))), BENCHMARKS)
    write_file(args.out, text + "\n")
    write_file(path, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    print(f"{text}\nwrote {args.out} and {path}")


def grid(args):
    """Writes Fig. 3 for the first --rows prompts: a row a prompt, a column a model, the same x_T all along a row."""
    plots.try_path(args.out)
    prompts = [prompt for _, _, prompt in read_prompts(args.prompts) if prompt][:args.rows]
    if not prompts:
        raise UserError(f"{args.prompts} has no prompts in it.")
    columns, device = [], place()[2]
    for name in args.models[1:]:  # load each once, so that a damaged one fails now and not after an hour
        load_model(name, args, device)
    for name in args.models:
        model, images = load_model(name, args, device), []
        for i in tqdm(range(0, len(prompts), args.batch_size), name):
            part = prompts[i:i + args.batch_size]
            seeds = range(args.seed + i, args.seed + i + len(part))
            images += sample_images(model, part, seeds, model.steps, model.guidance)
        columns.append((name, images))
    plots.draw_grid(prompts, columns, args.out)


@program
def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="program", required=True)
    programs = {run.__name__: run for run in (generate, score, table, grid)}
    make, judge, tell, show = [commands.add_parser(name, help=(run.__doc__ or "").split(":")[0], allow_abbrev=False)
                               for name, run in programs.items()]
    make.add_argument("--model", required=True, help="a preset, hub id, diffusers folder or folder of a LoRA")
    make.add_argument("--out", required=True, help="the folder of this model's images")
    make.add_argument("--unet", help="a U-Net published alone, in place of the model's: a hub id or folder")
    judge.add_argument("runs", nargs="+", help="folders that generate made")
    judge.add_argument("--batch-size", type=at_least(1), default=20, help="images judged at once (default: 20, guess)")
    judge.add_argument("--foreign", action="store_true", help="for images made elsewhere; delete scores/ for others")
    for sub, default, text in ((make, PAPERS, "the paper's"), (judge, None, "all that have images")):
        sub.add_argument("--bench", nargs="+", choices=BENCHMARKS, default=default, help=f"(default: {text})")
        sub.add_argument("--data", default="benchmarks", help="the folder of fetched lists (default: %(default)s)")
    tell.add_argument("runs", nargs="+", help="folders that score has scored; differences are to the first")
    tell.add_argument("--out", default="table.md", help="(default: %(default)s)")
    show.add_argument("--models", nargs="+", required=True, help="presets, hub ids, diffusers or LoRA folders")
    show.add_argument("--prompts", required=True, help="a .txt, .jsonl, .csv or .parquet file")
    show.add_argument("--out", default="grid.png", help="(default: %(default)s)")
    show.add_argument("--rows", type=at_least(1), default=4, help="how many prompts, from the first on (default: 4)")
    for sub, size, seed in ((make, 20, 42), (show, 4, 0)):
        sub.add_argument("--steps", type=at_least(1, high=500), help="of sampling (default by scripts: 25, SANA 20)")
        sub.add_argument("--guidance", type=at_least(0, float, 100), help="(by scripts: 7.5, SDXL, SD3 5, SANA 4.5)")
        sub.add_argument("--batch-size", type=at_least(1), default=size, help=f"images at once (guess: {size})")
        sub.add_argument("--seed", type=at_least(0), default=seed, help=f"of image 0 (default {seed}; authors' 42)")
    args = parser.parse_args(argv)
    alone = args.program in ("table", "grid") or getattr(args, "foreign", False)
    if alone and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{args.program} runs in one process here: start it with python, not with torchrun.")
    programs[args.program](args)


if __name__ == "__main__":
    main()
