"""What evaluate.py keeps of a model's images, the table of that, and the numbers of the paper's Tables 1 to 3.

    settings.json               what the images were made with, and the checksums of the lists of prompts
    scores/NAME.jsonl           what a judge found, a line an image; scores/coco.json, FID and IS
    scores/NAME/settings.json   of which images that is, and which weights and versions the judge has
"""

import json
import os

from judges import compbench
from judges.shared import interval, per_prompt
from lib.files import UserError, read_json, same_settings

# ---- a run's folder

FIXED = ("fingerprint", "steps", "guidance", "seed", "sampler", "precision", "pixels")  # the same for all in a folder
KEYS = dict(geneval=["correct", "lenient", "details"], shapes=["correct"], blip=["value", "kind"])  # else: value


def read_settings(path):
    found = read_json(path) if os.path.isfile(path) else {}
    if not isinstance(found, dict) or not {*FIXED, "base", "lists"} <= found.keys():
        raise UserError(f"cannot read {path}: it does not exist, or evaluate.py generate did not write it. Give a "
                        "folder that generate made, or --foreign to score images that were made elsewhere.")
    return found


def note_scores(folder, settings, bench, judge=()):
    """Notes in `folder` what its scores are of: images with these `settings` from the prompts of `bench`, and which
    weights and versions the `judge` has. Raises UserError if something else is noted there; gives the judge's notes."""
    path = os.path.join(folder, "settings.json")
    images = {key: settings[key] for key in FIXED} | dict(prompts=settings["lists"][bench])
    try:
        same_settings(path, images | dict(judge))
    except UserError as error:
        raise UserError(f"{error} Or delete {folder}*, so that all is judged again.") from None
    return {key: value for key, value in read_json(path).items() if key not in images}


def read_scores(run, name):
    """{path of an image: its row} of a judge's scores, without a last line that a stopped run left unfinished."""
    path = os.path.join(run, "scores", f"{name}.jsonl")
    if not os.path.exists(path):
        return {}
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row["path"]], _ = row, [row[key] for key in ("group", "index", *KEYS.get(name, ["value"]))]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number} cannot be read ({error!r}): delete that line and give the command of "
                            "score again.") from None
    return rows


def read_coco(run):
    """What is in scores/coco.json, or {} if there is none."""
    path = os.path.join(run, "scores", "coco.json")
    return read_json(path) if os.path.exists(path) else {}


def in_a_line(run, name):
    """What a judge found in a run."""
    if name == "coco":
        found = read_coco(run)
        return f"FID {found['FID']:.2f}, IS {found['IS']:.2f}"
    key = KEYS.get(name, ["value"])[0]
    found = interval(per_prompt(read_scores(run, name).values(), key))
    return f"{name} {found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


# ---- the table

COLUMNS = {  # and the benchmark of each
    "GenEval": "geneval", "GenEval, lenient": "geneval", "CB": "compbench", "CB~": "compbench", "FID": "coco",
    "IS": "coco", "HPSv2": "hps", "PickScore": "pick", "shapes": "shapes"}
PAPER = [  # table, preset, row, numbers; Tables 1b and 1c give some of the same models other numbers than 1a and 1b
    ("1a", "sd14", "SD-1.4", dict(GenEval=.4245, CB=.3150, FID=13.05, IS=36.76)),
    ("1a", "sd14", "SD-1.4 + D-DPO", dict(GenEval=.4841, CB=.3723, FID=18.02, IS=36.64)),
    ("1a", "sd14", "SD-1.4 + DDSPO", dict(GenEval=.5045, CB=.3823, FID=16.39, IS=38.10)),
    ("1b", "sd14", "SD-1.4 + DDSPO", dict(GenEval=.5045, CB=.3723)),
    ("1b", "sdxl", "SDXL", dict(GenEval=.5229, CB=.4034)),
    ("1b", "sdxl", "SDXL + DDSPO", dict(GenEval=.6049, CB=.4857)),
    ("1b", "sana", "SANA", dict(GenEval=.6812, CB=.4846)),
    ("1b", "sana", "SANA + DDSPO", dict(GenEval=.7266, CB=.5255)),
    ("1c", "sdxl", "SDXL", dict(GenEval=.5229, CB=.4185)),
    ("1c", "sdxl", "SDXL + Itercomp", dict(GenEval=.6108, CB=.4644)),
    ("1c", "sdxl", "SDXL + CaPO", dict(GenEval=.5900, CB=.4652)),
    ("1c", "sdxl", "SDXL + DDSPO", dict(GenEval=.6049, CB=.5064)),
    ("2a", "sd15", "SD-1.5", dict(HPSv2=26.95, PickScore=21.14)),
    ("2a", "sd15", "SD-1.5 + D-DPO", dict(HPSv2=27.25, PickScore=21.34)),
    ("2a", "sd15", "SD-1.5 + D-KTO", dict(HPSv2=27.89, PickScore=21.39)),
    ("2a", "sd15", "SD-1.5 + DDSPO", dict(HPSv2=27.46, PickScore=21.35)),
    ("2b", "sdxl", "SDXL", dict(HPSv2=27.89, PickScore=22.27)),
    ("2b", "sdxl", "SDXL + D-DPO", dict(HPSv2=28.55, PickScore=22.61)),
    ("2b", "sdxl", "SDXL + DDSPO", dict(HPSv2=28.78, PickScore=22.70)),
    ("3a", "sd14", "SD-1.4", dict(GenEval=.4245, CB=.3150, HPSv2=26.88, PickScore=21.11)),
    ("3a", "sd14", "SD-1.4, Rand-removal", dict(GenEval=.5045, CB=.3823, HPSv2=27.28, PickScore=21.36)),
    ("3a", "sd14", "SD-1.4, LLaMA (TA)", dict(GenEval=.4854, CB=.3807, HPSv2=27.25, PickScore=21.36)),
    ("3a", "sd14", "SD-1.4, LLaMA (AQ)", dict(GenEval=.4758, CB=.3616, HPSv2=27.51, PickScore=21.39)),
    ("3b", "sd14", "SD-1.4, Rand-positive", dict(GenEval=.4866, CB=.3763)),
    ("3b", "sd14", "SD-1.4, Not-paired", dict(GenEval=.4891, CB=.3842))]
NOTES = {
    "GenEval": "the official rules and detector; not yet run on the published SD-1.5 (expected 0.43).",
    "GenEval, lenient": "the same with the position rule of the paper's authors, to which its numbers belong.",
    "CB": "complex as the authors run it, without the official `--complex True`; noun phrases by the installed spaCy "
          "(scores/blip/settings.json has its version), where T2I-CompBench used 3.5.",
    "CB~": "with OWLv2 in place of UniDet in spatial~ and complex~: no T2I-CompBench scores. For CB, run the official "
           "UniDet_eval/2D_spatial_eval.py --outpath on compbench/spatial and compbench/complex, and `table` again.",
    "HPSv2": "version 2.0, tensors resized without antialias, as torchvision did before 0.17; in float32.",
    "FID": "30,000 images by BK-SDM's protocol, without an interval: it is no mean over prompts."}


def bench_of(metric):
    """The benchmark of a column, or of a part of one such as "GenEval: colors"."""
    return COLUMNS[metric.split(":")[0].split(",")[0]]


def to_markdown(rows, paper):
    """The lines of two Markdown tables, of the metrics that the paper has too and of their parts, and their notes."""
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    columns = [metric for metric in COLUMNS if metric in metrics or (metric == "CB" and "CB~" in metrics)]
    rest = [metric for metric in metrics if metric not in columns]
    notes = [metric for metric in NOTES if metric in columns]

    def head(metric):
        return metric + (f" ({notes.index(metric) + 1})" if metric in notes else "")

    def text(metric, row):
        if metric not in row:
            return ""
        digits, x = 2 if bench_of(metric) in ("coco", "hps", "pick") else 4, row[metric]
        return f"{x['mean']:.{digits}f}" + (f" [{x['low']:.{digits}f}, {x['high']:.{digits}f}]" if "low" in x else "")

    def table(heads, lines):
        return ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads),
                *[f"| {name} | " + " | ".join(cells) + " |" for name, cells in lines], ""]

    lines = table([head(metric) for metric in columns], [
        (name, [text(metric, row) for metric in columns])
        for name, row in (rows | paper).items() if row.keys() & set(columns)])
    if rest:
        lines += table(rows, [(head(metric), [text(metric, row) for row in rows.values()]) for metric in rest])
    lines += ["In brackets: 95 % intervals from resampling prompts; differences are paired.", ""]
    return lines + [f"- ({k + 1}) {metric}: {NOTES[metric]}" for k, metric in enumerate(notes)]


def collect(run, benchmarks):
    """{metric: {group: (prompts,)}, or a number for FID and IS} of all that has been scored. A metric is the mean over
    its groups of their means: GenEval's overall score, and the CB of the paper."""
    scores, found = {}, {}
    for count, _, judges in benchmarks.values():
        for name, (groups, _) in judges.items():
            scores[name] = read_scores(run, name)
            whole = count * len(groups) // len(compbench.CATEGORIES) if groups else count
            if scores[name] and len(scores[name]) != whole:
                raise UserError(f"{run}/scores/{name}.jsonl has {len(scores[name])} of {whole} images: give the "
                                "command of score again, or delete that file.")
    for metric, name, key in (
            ("GenEval", "geneval", "correct"), ("GenEval, lenient", "geneval", "lenient"),
            ("shapes", "shapes", "correct"), ("HPSv2", "hps", "value"), ("PickScore", "pick", "value")):
        if scores[name]:
            found[metric] = per_prompt(scores[name].values(), key)
    official = compbench.official_spatial(run)
    mark = "" if official else "~"
    parts = per_prompt(compbench.combine(scores["blip"], scores["clipscore"], official or scores["owl"]))
    if len(parts) == len(compbench.CATEGORIES):
        found["CB" + mark] = {category: parts[category] for category in compbench.CATEGORIES}
    for metric, groups in dict(GenEval=found.get("GenEval", {}), HPSv2=found.get("HPSv2", {}), CB=parts).items():
        for group, values in groups.items():
            found[f"{metric}: {group}{mark if group in ('spatial', 'complex') else ''}"] = {group: values}
    if scores["geneval"]:
        blank = [row | dict(value=row["details"] == "{}") for row in scores["geneval"].values()]
        found["GenEval: nothing detected"] = per_prompt(blank)
    return found | {key: value for key, value in read_coco(run).items() if key != "images"}


def cell(value):
    """What the table's JSON file holds of a metric's value. FID and IS are numbers, which have no interval."""
    return interval(value) if isinstance(value, dict) else dict(mean=value)


def compare(run, first, found, settings, judges):
    """({metric: run less first, prompt by prompt}, remarks on what is not the same in both)."""
    other = [key for key in FIXED[1:] if settings[run][key] != settings[first][key]]
    same = {} if "seed" in other else dict(settings[run]["lists"].items() & settings[first]["lists"].items())
    paired, remarks = {}, []
    for metric, value in found[run].items():
        if bench_of(metric) in same and metric in found[first] and not metric.startswith("IS, "):
            base = found[first][metric]
            paired[metric] = {k: value[k] - base[k] for k in value} if isinstance(value, dict) else value - base
    if other:
        remarks.append(f"{run} differs from {first} in " + ", ".join(
            f"{key} ({settings[run][key]}, not {settings[first][key]})" for key in other))
    changed = [name for name, judge in judges[run].items() if judge != judges[first].get(name, judge)]
    if changed:
        remarks.append(f"{run} and {first} were judged by other versions of {', '.join(changed)}: see "
                       "scores/*/settings.json")
    if not paired:
        remarks.append(f"{run} and {first} share no benchmark with the same seeds and prompts: no differences.")
    return paired, remarks


def make_table(runs, benchmarks):
    """(the lines of the table as a text, all that is in it as a dict)."""
    settings, judges, found, rows, remarks = {}, {}, {}, {}, []
    for run in runs:
        settings[run], judges[run] = read_settings(os.path.join(run, "settings.json")), {}
        for bench in settings[run]["lists"]:
            for name in benchmarks[bench][2]:
                folder = os.path.join(run, "scores", name)
                if os.path.exists(os.path.join(folder, "settings.json")):
                    judges[run][name] = note_scores(folder, settings[run], bench)
        found[run] = collect(run, benchmarks)
        rows[run] = {metric: cell(value) for metric, value in found[run].items()}
        rest = settings[run]["lists"].keys() - {bench_of(metric) for metric in found[run] if ":" not in metric}
        remarks += [f"{run}: not scored, or only in part: {', '.join(sorted(rest))}"] if rest else []
    if not any(found.values()):
        raise UserError(f"nothing in {', '.join(runs)} has been scored yet: run evaluate.py score first.")
    for run in runs[1:]:
        paired, more = compare(run, runs[0], found, settings, judges)
        remarks += more
        if paired:
            rows[f"{run} − {runs[0]}"] = {metric: cell(value) for metric, value in paired.items()}
    remarks += [f"{run}: " + ", ".join(f"{key} {value}" for key, value in settings[run].items()
                                       if value is not None and key != "lists") for run in runs]
    paper = {f"paper, Table {number}: {row}": {  # the paper's GenEval is by the lenient rule
        "GenEval, lenient" if metric == "GenEval" else metric: dict(mean=x) for metric, x in values.items()}
        for number, preset, row, values in PAPER if preset in {one["base"] for one in settings.values()}}
    text = "\n".join([*to_markdown(rows, paper), *[f"- {line}" for line in remarks]])
    return text, dict(runs=rows, paper=paper, notes=NOTES, remarks=remarks, settings=settings)
