"""The benchmarks of Tables 1 to 3 and the pictures of Fig. 3 (Sec. 4.2 to 4.4 of DDSPO, arXiv 2512.23426).

    torchrun --nproc_per_node 8 evaluate.py generate --model sd14 --out eval/sd14
    torchrun --nproc_per_node 8 evaluate.py score eval/sd14
    python evaluate.py table eval/sd14
    python evaluate.py grid --models sd14 runs/sd14-ddspo/pipeline --prompts prompts.txt --out grid.png

`generate` writes a benchmark's images into the folders that its official scorer reads. Image i of a benchmark comes
from the noise of seed + i, and batch k holds the same images on any number of GPUs. `score` judges each image and keeps
what it found in scores/, a line an image (judges/table.py has the files); torchrun's processes share out the judges.
`table` makes means, 95 % intervals and paired differences of that. The same command goes on where `generate` or `score`
was stopped. A file of judges/ says how each benchmark is judged, and what differs from the official way.
"""

import argparse
import contextlib
import glob
import importlib.metadata
import io
import json
import os
import shlex
import types
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from tqdm import tqdm

from judges import compbench, fid, geneval, preference, shapes
from judges.table import FIXED, in_a_line, make_table, note_scores, read_coco, read_scores, read_settings
from lib import models, plots
from lib.files import UserError, checksum, json_lines, same_settings, text_checksum, text_lines, to_lines, write_file
from lib.parts import load_part, naming
from lib.processes import at_least, barrier, holding, place, processes, program
from lib.prompts import check_rows

BENCHMARKS = {  # (images, the list of them, {file in scores/: (the groups that it judges or None for all, its loader)})
    "geneval": (2212, geneval.items, {"geneval": (None, geneval.load)}),
    "compbench": (18000, compbench.items, {
        "blip": (("color", "shape", "texture", "complex"), compbench.load_blip),
        "clipscore": (("non_spatial", "complex"), preference.load_clipscore),
        "owl": (("spatial", "complex"), compbench.load_owl)}),
    "coco": (30000, fid.items, {"coco": (None, fid.load)}),
    "hps": (3200, preference.items_hps, {"hps": (None, preference.load_hps)}),
    "pick": (1632, preference.items_pick, {"pick": (None, preference.load_pick)}),
    "shapes": (400, shapes.items, {"shapes": (None, shapes.load)})}

WEIGHTS = {  # of the judges: what two versions of one find is not mixed in one file
    "geneval": f"{geneval.DETECTOR} {geneval.CLIP}", "blip": compbench.BLIP, "clipscore": preference.CLIP_B,
    "owl": compbench.OWL, "coco": "inception-v3-compat", "hps": preference.HPS, "pick": preference.PICK,
    "shapes": "rules"}
LIBRARIES = {"blip": ["spacy", "en_core_web_sm"], "owl": ["spacy", "en_core_web_sm"], "coco": ["torch-fidelity"]}
THREADS = 8  # that write or read images (guess)


def list_images(bench, data):
    """All images of a benchmark in the order of their seeds: a list of rows, see judges/shared.py."""
    count, items, _ = BENCHMARKS[bench]
    try:
        rows = items(data)
        if len({row["path"] for row in rows}) != count:
            raise ValueError(f"{len(rows)} images, not {count}")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the lists of prompts in {data}/{bench} ({error}): delete that folder, so that "
                        "they are fetched again.") from None
    return rows


# ---- what images are made with: settings.json


def settings_of(model, args):
    """(what images depend on, what else is worth knowing). The model is known by its fingerprint, because a path may
    hold another run's tomorrow."""
    fingerprint = models.model_checksum(model)
    if args.unet:
        fingerprint = text_checksum("".join([fingerprint, *map(checksum, model.unet_files)]))[:16]
    fixed = dict(fingerprint=fingerprint, steps=model.steps, guidance=model.guidance, seed=args.seed,
                 sampler=type(model.pipe.scheduler).__name__, precision=str(model.dtype),
                 pixels=model.latent_shape[1] * model.pipe.vae_scale_factor)
    base = models.training_of(args.model, "model") or args.model  # what the model was tuned from
    base = {path: preset for preset, path in models.PRESETS.items()}.get(base, base)
    return fixed, dict(model=args.model, unet=args.unet, base=base, lists={},
                       versions=f"torch {torch.__version__}, diffusers {diffusers.__version__}")


def digest(rows):
    """A checksum of a benchmark's list of images."""
    return text_checksum(json.dumps([[row["path"], row["prompt"]] for row in rows]))


def add_lists(path, lists):
    """Notes in settings.json from which prompts the images of these benchmarks are made."""
    found = read_settings(path)
    for bench, prompts in lists.items():
        if found["lists"].setdefault(bench, prompts) != prompts:
            raise UserError(f"{path} is of images from other prompts of {bench}: give another folder.")
    write_file(path, json.dumps(found, indent=1) + "\n")


# ---- generate


def load_model(name, args, device, unet=None):
    """The model, with the steps and the guidance scale that it is to sample with."""
    model = models.load(name, device, torch.float16 if device.type == "cuda" else torch.float32)
    if unet:
        replace_unet(model, unet)
    model.pipe.vae.enable_slicing()  # a decoder at 1024 pixels needs gigabytes an image
    model.steps = args.steps or model.steps
    model.guidance = model.guidance if args.guidance is None else args.guidance
    return model


def replace_unet(model, name):
    """Puts in a U-Net that is published alone: a hub id or a folder, with or without a subfolder `unet`."""
    files = ["config.json", "diffusion_pytorch_model*.safetensors*"]
    with naming(f"--unet {name}"):
        folder = name if os.path.isdir(name) else snapshot_download(
            name, allow_patterns=files + ["unet/" + file for file in files])
        inside = os.path.join(folder, "unet")
        path = inside if os.path.isdir(inside) else os.path.abspath(folder)
        net = load_part(*os.path.split(path), "diffusers", "UNet2DConditionModel", model.dtype)
    for key in ("in_channels", "cross_attention_dim", "addition_embed_type"):
        if net.config[key] != model.net.config.get(key):
            raise UserError(f"--unet {name} is of another kind than the model: its {key} is {net.config[key]}, not "
                            f"{model.net.config.get(key)}.")
    model.net = model.pipe.unet = net.to(model.device)
    model.unet_files = sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))


def sample_images(model, prompts, seeds, steps, guidance):
    """A PIL image for each prompt, from the noise of its seed."""
    x_T = torch.stack([models.initial_noise(seed, model.latent_shape) for seed in seeds])  # (B, channels, h, w)
    images = models.sample(model, prompts, x_T, steps, guidance, output_type="np")
    if not np.isfinite(images).all():
        raise UserError(f"the model {model.pipe.name_or_path} makes images that are not numbers (NaN): its weights are "
                        "damaged, or overflow in this precision.")
    return model.pipe.numpy_to_pil(images)


def generate(args):
    """Writes all images of the benchmarks --bench that are not there yet."""
    with processes(args.out) as (rank, world, device):
        rows = {bench: list_images(bench, args.data) for bench in args.bench}
        model = load_model(args.model, args, device, args.unet)
        if rank == 0:
            path = os.path.join(args.out, "settings.json")
            same_settings(path, *settings_of(model, args))
            add_lists(path, {bench: digest(rows[bench]) for bench in rows})
        barrier()  # no process writes an image before the first one has found that it belongs here
        for bench in rows:
            write_images(bench, rows[bench], model, args, rank, world)
    if rank == 0:
        print(f"{args.out} holds " + ", ".join(f"{len(rows[bench])} images of {bench}" for bench in rows)
              + ". Next:\n" + shlex.join(["python", "evaluate.py", "score", args.out]))


def write_images(bench, rows, model, args, rank, world):
    """Writes this process's share of a benchmark: every world-th batch, from batch `rank` on. A batch is sampled whole
    even where only some of its images are missing, so that an image depends on neither a stop nor `world`. Threads
    write a batch while the next one is sampled."""
    if bench == "geneval" and rank == 0:
        for row in rows[::4]:
            folder = os.path.dirname(os.path.dirname(os.path.join(args.out, row["path"])))
            write_file(os.path.join(folder, "metadata.jsonl"), json.dumps(row["metadata"]) + "\n")
    with ThreadPoolExecutor(THREADS) as pool:
        writing = ()
        for start in tqdm(range(0, len(rows), args.batch_size)[rank::world], f"generate {bench}", disable=rank > 0):
            batch = rows[start:start + args.batch_size]
            paths = [os.path.join(args.out, row["path"]) for row in batch]
            if not all(map(os.path.exists, paths)):
                seeds = range(args.seed + start, args.seed + start + len(batch))
                images = sample_images(model, [row["prompt"] for row in batch], seeds, model.steps, model.guidance)
                list(writing)  # waits for the batch before, and raises its error
                writing = pool.map(save_image, images, paths)
        list(writing)


def save_image(image, path):
    """Writes a PNG or JPEG file (Pillow's quality 75), whole or not at all, if there is none. BK-SDM's protocol: a COCO
    image is written as JPEG into im512, read again, resized to 256 x 256 (bicubic) and written as JPEG into im256."""
    if os.path.exists(path):
        return
    folder, name = os.path.split(path)
    if os.path.basename(folder) == "im256":
        large = os.path.join(os.path.dirname(folder), "im512", name)
        save_image(image, large)
        image = Image.open(large).resize((256, 256))
    file = io.BytesIO()
    image.save(file, "PNG" if path.endswith(".png") else "JPEG", compress_level=1)  # of PNG: fast, a little larger
    write_file(path, file.getvalue())


# ---- score


def score(args):
    """Judges all images of the runs; a missing image is an error. A process of several takes its share of judges."""
    rank, world, device = place()
    runs = list(dict.fromkeys(map(os.path.normpath, args.runs)))
    jobs = [job for run in runs for job in find_jobs(run, args)][rank::world]
    with contextlib.ExitStack() as locks:
        for job in jobs:
            locks.enter_context(holding(job.folder))
            begin(job)
        loaders = {job.name: job.load for job in jobs if job.rows}
        for load in list(loaders.values())[1:]:  # for nothing, but what a judge lacks is noticed now, not after hours
            load(torch.device("cpu"), args.data)
        for job in jobs:
            if job.rows:
                write_scores(job, device, args)
            print(f"{job.run}: {in_a_line(job.run, job.name)}")
    if rank == 0:
        print(f"wrote {', '.join(os.path.join(run, 'scores') for run in runs)}. Next:\n"
              + shlex.join(["python", "evaluate.py", "table", *runs]))


def find_jobs(run, args):
    """What is to be judged in a run, one for each judge. Raises UserError if images are missing."""
    path, asked = os.path.join(run, "settings.json"), args.bench
    if args.foreign:
        asked = asked or [bench for bench in BENCHMARKS if os.path.isdir(os.path.join(run, bench))]
        if not asked:
            raise UserError(f"{run} has none of the folders {', '.join(BENCHMARKS)}: --foreign looks for images where "
                            "evaluate.py generate would write them.")
        if not os.path.exists(path):
            unknown = dict.fromkeys((*FIXED, "model", "base", "versions"), "unknown")
            write_file(path, json.dumps(unknown | dict(lists={})))
        if read_settings(path)["fingerprint"] != "unknown":
            raise UserError(f"--foreign: the images in {run} were made by evaluate.py generate. Score them without it.")
        add_lists(path, {bench: digest(list_images(bench, args.data)) for bench in asked})
    settings = read_settings(path)
    for bench in asked or settings["lists"]:
        rows = list_images(bench, args.data)
        if settings["lists"].get(bench) != digest(rows):
            raise UserError(f"{run} holds no images of {bench} from the prompts in {args.data}: make them by "
                            f"evaluate.py generate --bench {bench}.")
        missing = [row["path"] for row in rows if not os.path.exists(os.path.join(run, row["path"]))]
        if missing:
            raise UserError(f"{len(missing)} of {len(rows)} images of {bench} are missing in {run}, first "
                            f"{missing[0]}: " + ("put them there." if settings["fingerprint"] == "unknown" else
                                                 "give the command of generate again."))
        for name, (groups, load) in BENCHMARKS[bench][2].items():
            if not (name == "owl" and compbench.official_spatial(run)):
                yield types.SimpleNamespace(
                    run=run, bench=bench, name=name, load=load, settings=settings,
                    rows=[row for row in rows if groups is None or row["group"] in groups],
                    folder=os.path.join(run, "scores", name))


def begin(job):
    """Leaves in job.rows what is not judged yet, and puts the rest into job.done. An image that has changed since it
    was judged is judged again."""
    libraries = ["transformers", *LIBRARIES.get(job.name, [])]
    try:
        versions = {library: importlib.metadata.version(library) for library in libraries}
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{job.name} needs {error.name}: pip install -r requirements-eval.txt") from None
    note_scores(job.folder, job.settings, job.bench, dict(judge=WEIGHTS[job.name]) | versions)
    if job.name == "coco":
        sums = checksums(job.run, [row["path"] for row in job.rows])
        job.images = text_checksum("".join(sums))
        job.rows = [] if read_coco(job.run).get("images") == job.images else job.rows
    else:
        found = read_scores(job.run, job.name)
        known = [row["path"] for row in job.rows if row["path"] in found]
        sums = dict(zip(known, checksums(job.run, known)))
        job.done = {path: row for path, row in found.items() if row.get("image") == sums.get(path, "")}
        job.rows = [row for row in job.rows if row["path"] not in job.done]
        if len(job.done) < len(found):
            print(f"images in {job.run} that have changed since {job.name} judged them, and are judged again: "
                  f"{len(found) - len(job.done)}")


def checksums(run, paths):
    """Of images in a run."""
    with ThreadPoolExecutor(THREADS) as pool:
        return [found[:16] for found in pool.map(checksum, [os.path.join(run, path) for path in paths])]


def judged(job, device, args):
    """Yields (row, what the judge found) for each image. Threads open a batch while the one before it is judged."""
    def read(row):
        path = os.path.join(job.run, row["path"])
        return open_image(path, 256 if job.name == "coco" else job.settings["pixels"]), checksum(path)[:16]

    judge = job.load(device, args.data)
    batches = [job.rows[i:i + args.batch_size] for i in range(0, len(job.rows), args.batch_size)]
    with ThreadPoolExecutor(THREADS) as pool:
        coming = pool.map(read, batches[0])
        for batch, following in zip(tqdm(batches, f"score {job.run}: {job.name}"), [*batches[1:], ()]):
            images, coming = list(coming), pool.map(read, following)
            for row, found, (_, image) in zip(batch, judge(batch, [image for image, _ in images]), images):
                yield row, found | dict(image=image)


def write_scores(job, device, args):
    """Writes scores/`name`.jsonl, a line an image, and goes on after the last whole line that is there; or
    scores/coco.json, once all images have been seen."""
    if job.name == "coco":
        found = fid.summary([found for _, found in judged(job, device, args)], args.data)
        return write_file(job.folder + ".json", json.dumps(found | dict(images=job.images)) + "\n")
    write_file(job.folder + ".jsonl", to_lines(job.done.values()))  # without an unfinished line
    with open(job.folder + ".jsonl", "a", encoding="utf-8") as file:
        for row, found in judged(job, device, args):
            kept = {key: row[key] for key in ("path", "prompt", "group", "index", "kind") if key in row}
            file.write(to_lines([kept | found]))
            file.flush()


def open_image(path, size="unknown"):
    """The image of a file, as RGB. Raises UserError if it is damaged, or not of size x size pixels."""
    try:
        image = Image.open(path).convert("RGB")
        if size != "unknown" and image.size != (size, size):
            raise OSError(f"it has {image.width} x {image.height} pixels, not {size} x {size}")
    except (OSError, SyntaxError) as error:  # Pillow's SyntaxError: a damaged PNG file
        raise UserError(f"cannot judge {path} ({error}): delete it and give the command of generate again.") from None
    return image


# ---- table and grid


def table(args):
    """Prints the runs beside each other and beside the paper's rows, and writes the same to --out and as JSON."""
    text, whole = make_table(list(dict.fromkeys(map(os.path.normpath, args.runs))), BENCHMARKS)
    path = os.path.splitext(args.out)[0] + ".json"
    write_file(args.out, text + "\n")
    write_file(path, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    print(f"{text}\nwrote {args.out} and {path}")


def read_prompts(path):
    """The prompts of a text file, one a line, or of a .jsonl file, whose rows have `prompt` or `c`."""
    if path.lower().endswith((".json", ".csv", ".tsv", ".parquet")):
        raise UserError(f"{path} is no text file with a prompt in each line, and no .jsonl file.")
    rows = ((number, dict(prompt=line)) for number, line in text_lines(path) if line)
    if path.endswith(".jsonl"):
        rows = ((number, dict(prompt=row.get("prompt", row.get("c"))) if isinstance(row, dict) else row)
                for number, row in json_lines(path))
    return [prompt for _, _, prompt in check_rows(path, rows, ["prompt"])]


def grid(args):
    """Writes Fig. 3 for the first --rows prompts: a row a prompt, a column a model, the same x_T all along a row."""
    prompts = read_prompts(args.prompts)[:args.rows]
    if not prompts:
        raise UserError(f"{args.prompts} has no prompts in it.")
    plots.try_path(args.out)
    columns, device = [], torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)

    def command(run, text):
        found = commands.add_parser(run.__name__, help=text, allow_abbrev=False)
        found.set_defaults(run=run)
        return found

    make = command(generate, "all images of the benchmarks")
    make.add_argument("--model", required=True, help="a preset, hub id, diffusers folder or folder of a LoRA")
    make.add_argument("--out", required=True, help="the folder of this model's images")
    make.add_argument("--unet", help="a U-Net published alone, in place of the model's: a hub id or folder")
    judge = command(score, "judges the images")
    judge.add_argument("runs", nargs="+", help="folders that generate made")
    judge.add_argument("--batch-size", type=at_least(1), default=20, help="images judged at once (default: 20, guess)")
    judge.add_argument("--foreign", action="store_true", help="the images were made elsewhere, in generate's layout")
    all_but_shapes = [bench for bench in BENCHMARKS if bench != "shapes"]
    for sub, default, text in ((make, all_but_shapes, "all but shapes"), (judge, None, "all that have images")):
        sub.add_argument("--bench", nargs="+", choices=BENCHMARKS, default=default, help=f"(default: {text})")
        sub.add_argument("--data", default="benchmarks", help="where the lists of prompts are kept, fetched if need be "
                         "(default: %(default)s)")
    tell = command(table, "means, intervals and differences, beside the paper's")
    tell.add_argument("runs", nargs="+", help="folders that score has scored; differences are to the first")
    tell.add_argument("--out", default="table.md", help="(default: %(default)s)")
    show = command(grid, "Fig. 3: the same prompts and seeds, a column a model")
    show.add_argument("--models", nargs="+", required=True, help="presets, hub ids, diffusers or LoRA folders")
    show.add_argument("--prompts", required=True, help="a text file, one prompt a line, or a .jsonl file")
    show.add_argument("--out", default="grid.png", help="(default: %(default)s)")
    show.add_argument("--rows", type=at_least(1), default=4, help="how many prompts, from the first on (default: 4)")
    for sub, batch_size, seed in ((make, 20, 42), (show, 4, 0)):
        sub.add_argument("--steps", type=at_least(1), help="sampling steps (default, from scripts: 25, SANA 20)")
        sub.add_argument("--guidance", type=at_least(0, float, high=100),
                         help="guidance scale (default, from scripts: 7.5, SDXL and SD3 5.0, SANA 4.5; shapes 3)")
        sub.add_argument("--batch-size", type=at_least(1), default=batch_size,
                         help="images sampled at once (default: %(default)s, guess)")
        sub.add_argument("--seed", type=at_least(0), default=seed, help=f"of image 0 (default {seed}; authors' 42)")
    args = parser.parse_args(argv)
    suffix = {table: ".md", grid: ".png"}.get(args.run)
    if suffix and not args.out.lower().endswith(suffix):
        raise UserError(f"--out {args.out} must be the name of a file to write that ends in {suffix}.")
    if (args.run in (grid, table) or getattr(args, "foreign", False)) and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{args.run.__name__} runs in one process here: start it with python, not with torchrun.")
    args.run(args)


if __name__ == "__main__":
    main()
