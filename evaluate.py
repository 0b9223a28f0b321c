"""The benchmarks of Tables 1 to 3 and the pictures of Fig. 3 (Sec. 4.2 to 4.4 of DDSPO, arXiv 2512.23426).

    torchrun --nproc_per_node 8 evaluate.py generate --model sd14 --out eval/sd14
    python evaluate.py score eval/sd14
    python evaluate.py table eval/sd14
    python evaluate.py grid --models sd14 runs/sd14-ddspo/pipeline --prompts prompts.txt --out grid.png

    benchmark   images                              judged by (judges/ says how, and what differs from the official way)
    geneval     553 prompts, 4 each                 Mask2Former and CLIP L/14, GenEval's rules
    compbench   6 categories of 300 prompts, 10     BLIP-VQA, CLIP B/32, UniDet or OWLv2
    coco        30,000 captions, 1 each             FID and IS by BK-SDM's protocol
    hps         4 styles of 800 prompts, 1          HPSv2, version 2.0
    pick        1,632 PartiPrompts, 1               PickScore
    shapes      400 prompts of shapes.py, 1         its rules

`generate` writes a benchmark's images into the folders that its official scorer reads. Image i of a benchmark comes
from the noise of seed + i, and batch k holds the same images on any number of GPUs. `score` judges each image and keeps
what it found in scores/, a line an image. `table` makes means, 95 % intervals and paired differences of that. The same
command goes on where `generate` or `score` was stopped.
"""

import argparse
import hashlib
import json
import operator
import os

import diffusers
import torch
from PIL import Image
from tqdm import tqdm

import models
import plots
from common import UserError, at_least, barrier, holding, processes, program, read_json, to_lines, write_file
from judges import compbench, fid, geneval, preference, shapes
from judges.paper import NOTES, PAPER, bench_of, render
from judges.shared import interval, per_prompt

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


def list_images(bench, data):
    """All images of a benchmark in the order of their seeds: a list of rows, see judges/shared.py."""
    count, items, _ = BENCHMARKS[bench]
    advice = "delete that folder, so that they are fetched again."
    try:
        rows = items(data)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the lists of prompts in {data}/{bench} ({error}): {advice}") from None
    if len({row["path"] for row in rows}) != count:
        raise UserError(f"the lists of prompts in {data}/{bench} give {len(rows)} images, not {count}: {advice}")
    return rows


# ---- what images are made with: settings.json

FIXED = ("weights", "steps", "guidance", "seed", "sampler", "precision")  # the same for all images in a folder


def settings_of(model, args):
    """What images depend on. The weights are known by a checksum, because a path may hold another run's tomorrow."""
    weights = hashlib.sha256()
    for part, module in sorted(model.pipe.components.items()):
        for name, x in sorted(module.state_dict().items() if isinstance(module, torch.nn.Module) else ()):
            weights.update(f"{part} {name}".encode())
            weights.update(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    base, note = args.model, os.path.join(args.model, "training.json")
    if os.path.exists(note):
        base = read_json(note).get("model", base)  # the model that this one was tuned from
    base = {path: preset for preset, path in models.PRESETS.items()}.get(base, base)
    return dict(model=args.model, base=base, weights=weights.hexdigest()[:16], steps=model.steps,
                guidance=model.guidance, seed=args.seed, sampler=type(model.pipe.scheduler).__name__,
                precision=str(model.dtype),
                versions=f"torch {torch.__version__}, diffusers {diffusers.__version__}")


def digest(rows):
    """A checksum of a benchmark's list of images."""
    return hashlib.sha256(json.dumps([[row["path"], row["prompt"]] for row in rows]).encode()).hexdigest()


def read_settings(path):
    if not os.path.isfile(path):
        raise UserError(f"cannot read {path}, which does not exist: give a folder that evaluate.py generate made.")
    found = read_json(path)
    if not isinstance(found, dict) or not {*FIXED, "base", "lists"} <= found.keys():
        raise UserError(f"{path} was not written by evaluate.py generate: give a folder that it made.")
    return found


def check_settings(path, settings, lists, advice):
    """The text for the file `path`: its settings, or `settings` if there is none, and these benchmarks' `lists`. Raises
    UserError if the file is of images with other settings or prompts."""
    old = read_settings(path) if os.path.exists(path) else settings | dict(lists={})
    differ = [f"{key} {old[key]}, not {settings[key]}" for key in FIXED if old[key] != settings[key]]
    differ += [f"other prompts of {bench}" for bench in lists if old["lists"].get(bench, lists[bench]) != lists[bench]]
    if differ:
        raise UserError(f"{path} is of images made with {'; '.join(differ)}: {advice}.")
    return json.dumps(old | dict(lists=old["lists"] | lists), indent=1) + "\n"


# ---- generate


def load_model(name, args, device):
    """The model, with the steps and the guidance scale that it is to sample with."""
    model = models.load(name, device, torch.float16 if device.type == "cuda" else torch.float32)
    model.pipe.vae.enable_slicing()  # a decoder at 1024 pixels needs gigabytes an image
    model.steps = model.steps if args.steps is None else args.steps
    model.guidance = model.guidance if args.guidance is None else args.guidance
    return model


def sample_images(model, prompts, seeds, steps, guidance):
    """A PIL image for each prompt, from the noise of its seed."""
    x_T = torch.stack([models.initial_noise(seed, model.latent_shape) for seed in seeds])  # (B, channels, h, w)
    return models.sample(model, prompts, x_T, steps, guidance, output_type="pil")


def generate(args):
    """Writes all images of the benchmarks --bench that are not there yet."""
    with processes(args.out) as (rank, world, device):
        rows = {bench: list_images(bench, args.data) for bench in args.bench}
        model = load_model(args.model, args, device)
        if rank == 0:
            path = os.path.join(args.out, "settings.json")
            if not os.path.exists(path) and BENCHMARKS.keys() & set(os.listdir(args.out)):
                raise UserError(f"{args.out} holds images but no settings.json that says how they were made: give "
                                "another --out.")
            lists = {bench: digest(rows[bench]) for bench in rows}
            write_file(path, check_settings(path, settings_of(model, args), lists, "give another --out"))
        barrier()  # no process writes an image before the first one has found that it belongs here
        for bench in rows:
            write_images(bench, rows[bench], model, args, rank, world)


def write_images(bench, rows, model, args, rank, world):
    """Writes this process's share of a benchmark: every world-th batch, from batch `rank` on. A batch is sampled whole
    even where only some of its images are missing, so that an image depends on neither a stop nor `world`."""
    if bench == "geneval" and rank == 0:
        for row in rows[::4]:
            folder = os.path.dirname(os.path.dirname(os.path.join(args.out, row["path"])))
            write_file(os.path.join(folder, "metadata.jsonl"), json.dumps(row["metadata"]) + "\n")
    for start in tqdm(range(0, len(rows), args.batch_size)[rank::world], f"generate {bench}", disable=rank > 0):
        batch = rows[start:start + args.batch_size]
        missing = [not os.path.exists(os.path.join(args.out, row["path"])) for row in batch]
        if any(missing):
            seeds = range(args.seed + start, args.seed + start + len(batch))
            images = sample_images(model, [row["prompt"] for row in batch], seeds, model.steps, model.guidance)
            for row, image, is_missing in zip(batch, images, missing):
                if is_missing:
                    save_image(image, os.path.join(args.out, row["path"]), os.path.join(args.out, f"{rank}.partial"))


def save_image(image, path, partial):
    """Writes a PNG or JPEG file (Pillow's quality 75) whole or not at all. BK-SDM's protocol: a COCO image is written
    as JPEG into im512, read again, resized to 256 x 256 (bicubic) and written as JPEG into im256."""
    folder, name = os.path.split(path)
    if os.path.basename(folder) == "im256":
        large = os.path.join(os.path.dirname(folder), "im512", name)
        save_image(image, large, partial)
        image = Image.open(large).resize((256, 256))
    os.makedirs(folder, exist_ok=True)
    image.save(partial, format="PNG" if path.endswith(".png") else "JPEG")  # not in `folder`, which a scorer reads
    os.replace(partial, path)


# ---- score


def score(args):
    """Judges all images of the runs; a missing image is an error."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for run in args.runs:
        settings = read_settings(os.path.join(run, "settings.json"))
        for bench in args.bench or settings["lists"]:
            rows = list_images(bench, args.data)
            if settings["lists"].get(bench) != digest(rows):
                raise UserError(f"the images of {bench} in {run} were not made from the prompts in {args.data}.")
            missing = [row["path"] for row in rows if not os.path.exists(os.path.join(run, row["path"]))]
            if missing:
                raise UserError(f"{len(missing)} of {len(rows)} images of {bench} are missing in {run}, first "
                                f"{missing[0]}: give the command of generate again.")
            with holding(os.path.join(run, "scores")):
                note, lists = os.path.join(run, "scores", "settings.json"), {bench: settings["lists"][bench]}
                write_file(note, check_settings(note, settings, lists, "delete that folder of scores"))
                for name, (groups, load) in BENCHMARKS[bench][2].items():
                    if not (name == "owl" and compbench.official_spatial(run)):
                        part = [row for row in rows if groups is None or row["group"] in groups]
                        (score_coco if name == "coco" else score_each)(run, name, part, load, device, args)


def judged(run, name, rows, load, device, args):
    """Yields (row, what the judge found) for each image."""
    judge = load(device, args.data) if rows else None
    for start in tqdm(range(0, len(rows), args.batch_size), f"score {run}: {name}", disable=not rows):
        batch = rows[start:start + args.batch_size]
        yield from zip(batch, judge(batch, [open_image(os.path.join(run, row["path"])) for row in batch]))


def score_each(run, name, rows, load, device, args):
    """Writes scores/`name`.jsonl, a line an image; goes on after the last whole line that is there."""
    path = os.path.join(run, "scores", f"{name}.jsonl")
    done = read_scores(path)
    write_file(path, to_lines(done.values()))  # without an unfinished line
    rows = [row for row in rows if row["path"] not in done]
    with open(path, "a", encoding="utf-8") as file:
        for row, found in judged(run, name, rows, load, device, args):
            kept = {key: row[key] for key in ("path", "prompt", "group", "index", "kind") if key in row}
            file.write(to_lines([kept | found]))
            file.flush()


def score_coco(run, name, rows, load, device, args):
    """Writes scores/coco.json, once all images have been seen."""
    path = os.path.join(run, "scores", "coco.json")
    if not os.path.exists(path):
        found = [found for _, found in judged(run, name, rows, load, device, args)]
        write_file(path, json.dumps(fid.summary(found, args.data)) + "\n")


def read_scores(path):
    """{path of an image: its row} of a file in scores/, without a last line that a stopped run left unfinished."""
    if not os.path.exists(path):
        return {}
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row["path"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number} cannot be read ({error}): delete that line and give the command of score "
                            "again.") from None
    return rows


def open_image(path):
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow's SyntaxError: a damaged PNG file
        raise UserError(f"cannot read {path} ({error}): delete it and give the command of generate again.") from None


# ---- table


def collect(run):
    """{metric: {group: (prompts,)}, or a number for FID and IS} of all that has been scored. A metric is the mean over
    its groups of their means: GenEval's overall score, and the CB of the paper."""
    scores, found = {}, {}
    for count, _, judges in BENCHMARKS.values():
        for name, (groups, _) in judges.items():
            path = os.path.join(run, "scores", f"{name}.jsonl")
            scores[name] = read_scores(path)
            whole = count * len(groups) // len(compbench.CATEGORIES) if groups else count
            if scores[name] and len(scores[name]) != whole:
                raise UserError(f"{path} has {len(scores[name])} of {whole} images: give the command of score again, "
                                "or delete that file.")
    for metric, name, key in (
            ("GenEval", "geneval", "correct"), ("GenEval, lenient", "geneval", "lenient"),
            ("shapes", "shapes", "correct"), ("HPSv2", "hps", "value"), ("PickScore", "pick", "value")):
        if scores[name]:
            found[metric] = per_prompt(scores[name].values(), operator.itemgetter(key))
    official = compbench.official_spatial(run)
    mark = "" if official else "~"
    rows = compbench.combine(scores["blip"], scores["clipscore"], official or scores["owl"])
    parts = per_prompt(rows, operator.itemgetter("value"))
    if len(parts) == len(compbench.CATEGORIES):
        found["CB" + mark] = {category: parts[category] for category in compbench.CATEGORIES}
    for metric, groups in dict(GenEval=found.get("GenEval", {}), HPSv2=found.get("HPSv2", {}), CB=parts).items():
        for group, values in groups.items():
            found[f"{metric}: {group}{mark if group in ('spatial', 'complex') else ''}"] = {group: values}
    if scores["geneval"]:
        found["GenEval: nothing detected"] = per_prompt(scores["geneval"].values(), lambda row: row["details"] == "{}")
    path = os.path.join(run, "scores", "coco.json")
    return found | (read_json(path) if os.path.exists(path) else {})


def cell(value):
    """What the table's JSON file holds of a metric's value, as in `collect`."""
    return interval(value) if isinstance(value, dict) else dict(mean=value)


def compare(run, first, found, settings):
    """({metric: run less first, prompt by prompt}, remarks on what is not the same in both)."""
    other = [key for key in FIXED[1:] if settings[run][key] != settings[first][key]]
    lists, lists_of_first = settings[run]["lists"], settings[first]["lists"]
    paired, remarks = {}, []
    for name, value in found[run].items():
        bench = bench_of(name)
        same = "seed" not in other and lists[bench] == lists_of_first.get(bench)
        if same and name in found[first] and not name.startswith("IS, "):
            base = found[first][name]
            paired[name] = {k: value[k] - base[k] for k in value} if isinstance(value, dict) else value - base
    if other:
        remarks.append(f"{run} differs from {first} in " + ", ".join(
            f"{key} ({settings[run][key]}, not {settings[first][key]})" for key in other))
    if not paired:
        remarks.append(f"{run} and {first} share no benchmark with the same seeds and prompts: no differences.")
    return paired, remarks


def table(args):
    """Prints the runs beside each other and beside the paper's rows, and writes the same to --out and as JSON."""
    runs = list(dict.fromkeys(map(os.path.normpath, args.runs)))
    settings, found, rows, remarks = {}, {}, {}, []
    for run in runs:
        settings[run] = read_settings(os.path.join(run, "settings.json"))
        note = os.path.join(run, "scores", "settings.json")
        check_settings(note, settings[run], settings[run]["lists"], "delete that folder of scores")
        found[run] = collect(run)
        rows[run] = {metric: cell(value) for metric, value in found[run].items()}
        rest = settings[run]["lists"].keys() - {bench_of(metric) for metric in found[run] if ":" not in metric}
        remarks += [f"{run}: not scored, or only in part: {', '.join(sorted(rest))}"] if rest else []
    if not any(found.values()):
        raise UserError(f"nothing in {', '.join(runs)} has been scored yet: run evaluate.py score first.")
    for run in runs[1:]:
        paired, more = compare(run, runs[0], found, settings)
        remarks += more
        if paired:
            rows[f"{run} − {runs[0]}"] = {metric: cell(value) for metric, value in paired.items()}
    remarks += [f"{run}: " + ", ".join(f"{key} {value}" for key, value in settings[run].items() if key != "lists")
                for run in runs]
    paper = {f"paper, Table {number}: {row}": {  # the paper's GenEval is by the lenient rule
        "GenEval, lenient" if metric == "GenEval" else metric: dict(mean=x) for metric, x in values.items()}
        for number, preset, row, values in PAPER if preset in {one["base"] for one in settings.values()}}
    text = "\n".join([*render(rows, paper), *[f"- {line}" for line in remarks]])
    path = os.path.splitext(args.out)[0] + ".json"
    whole = dict(runs=rows, paper=paper, notes=NOTES, remarks=remarks, settings=settings)
    write_file(args.out, text + "\n")
    write_file(path, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    print(f"{text}\nwrote {args.out} and {path}")


# ---- grid


def read_prompts(path):
    """The prompts of a text file, one a line, or of a .jsonl file, whose rows have `prompt` or `c`."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file if line.strip()]
        if path.endswith(".jsonl"):
            return [row["prompt" if "prompt" in row else "c"] for row in map(json.loads, lines)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not UTF-8, or a row of it has no prompt ({error!r}).") from None
    return lines


def grid(args):
    """Writes Fig. 3 for the first --rows prompts: a row a prompt, a column a model, the same x_T all along a row."""
    prompts = read_prompts(args.prompts)[:args.rows]
    if not prompts:
        raise UserError(f"{args.prompts} has no prompts in it.")
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
    judge = command(score, "judges the images")
    judge.add_argument("runs", nargs="+", help="folders that generate made")
    judge.add_argument("--batch-size", type=at_least(1), default=20, help="images judged at once (guess)")
    all_but_shapes = [bench for bench in BENCHMARKS if bench != "shapes"]
    for sub, default, text in ((make, all_but_shapes, "all but shapes"), (judge, None, "all that have images")):
        sub.add_argument("--bench", nargs="+", choices=BENCHMARKS, default=default, help=f"(default: {text})")
        sub.add_argument("--data", default="benchmarks", help="where the lists of prompts are kept, fetched if need be")
    tell = command(table, "means, intervals and differences, beside the paper's")
    tell.add_argument("runs", nargs="+", help="folders that score has scored; differences are to the first")
    tell.add_argument("--out", default="table.md")
    show = command(grid, "Fig. 3: the same prompts and seeds, a column a model")
    show.add_argument("--models", nargs="+", required=True, help="presets, hub ids or diffusers folders")
    show.add_argument("--prompts", required=True, help="a text file, one prompt a line, or a .jsonl file")
    show.add_argument("--out", default="grid.png")
    show.add_argument("--rows", type=at_least(1), default=4, help="how many prompts, from the first on")
    for sub, batch_size, seed in ((make, 20, 42), (show, 4, 0)):
        sub.add_argument("--steps", type=at_least(1), help="sampling steps (default, from scripts: 25, SANA 20)")
        sub.add_argument("--guidance", type=at_least(0, float),
                         help="guidance scale (default, from scripts: 7.5, SDXL and SD3 5.0, SANA 4.5)")
        sub.add_argument("--batch-size", type=at_least(1), default=batch_size, help="images sampled at once (guess)")
        sub.add_argument("--seed", type=at_least(0), default=seed,
                         help=f"image i's noise comes from seed + i (default {seed}; the authors' is 42)")
    args = parser.parse_args(argv)
    if args.run in (grid, table) and (os.path.isdir(args.out) or args.out.endswith(".json")):
        kind = "PNG" if args.run is grid else "Markdown"
        raise UserError(f"--out {args.out} must be the name of a {kind} file to write.")
    if args.run is not generate and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{args.run.__name__} runs in one process: start it with python, not with torchrun.")
    args.run(args)


if __name__ == "__main__":
    main()
