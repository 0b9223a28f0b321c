"""The table of what the judges found in several runs, beside the numbers of the paper's Tables 1 to 3."""

from judges import compbench, geneval2
from judges.shared import interval, per_prompt, read_scores, read_settings
from lib.files import UserError, reading
from lib.plots import markdown_table

COLUMNS = {  # of each: its benchmark and, if it is a plain mean, the judge and the key of what is averaged
    "GenEval": ("geneval", "geneval", "correct"), "GenEval, lenient": ("geneval", "geneval", "lenient"),
    "CB": ("compbench",), "CB~": ("compbench",), "FID": ("coco",), "IS": ("coco",), "HPSv2": ("hps", "hps", "value"),
    "HPSv2.1": ("hps", "hps21", "value"), "PickScore": ("pick", "pick", "value"), "GenEval 2 AM": ("geneval2",),
    "GenEval 2 GM": ("geneval2",), "shapes": ("shapes", "shapes", "correct")}
PAPER = [  # source, preset, row, numbers; Tables 1b and 1c give some of the same models other numbers than 1a and 1b
    ("Table 1a", "sd14", "SD-1.4", dict(GenEval=.4245, CB=.3150, FID=13.05, IS=36.76)),
    ("Table 1a", "sd14", "SD-1.4 + D-DPO", dict(GenEval=.4841, CB=.3723, FID=18.02, IS=36.64)),
    ("Table 1a", "sd14", "SD-1.4 + DDSPO", dict(GenEval=.5045, CB=.3823, FID=16.39, IS=38.10)),
    ("Table 1b", "sd14", "SD-1.4 + DDSPO (its CB is that of D-DPO in Table 1a)", dict(GenEval=.5045, CB=.3723)),
    ("Table 1b", "sdxl", "SDXL", dict(GenEval=.5229, CB=.4034)),
    ("Table 1b", "sdxl", "SDXL + DDSPO", dict(GenEval=.6049, CB=.4857)),
    ("Table 1b", "sana", "SANA", dict(GenEval=.6812, CB=.4846)),
    ("Table 1b", "sana", "SANA + DDSPO", dict(GenEval=.7266, CB=.5255)),
    ("Table 1c", "sdxl", "SDXL", dict(GenEval=.5229, CB=.4185)),
    ("Table 1c", "sdxl", "SDXL + Itercomp", dict(GenEval=.6108, CB=.4644)),
    ("Table 1c", "sdxl", "SDXL + CaPO", dict(GenEval=.5900, CB=.4652)),
    ("Table 1c", "sdxl", "SDXL + DDSPO", dict(GenEval=.6049, CB=.5064)),
    ("Table 2a", "sd15", "SD-1.5", dict(HPSv2=26.95, PickScore=21.14)),
    ("Table 2a", "sd15", "SD-1.5 + D-DPO", dict(HPSv2=27.25, PickScore=21.34)),
    ("Table 2a", "sd15", "SD-1.5 + D-KTO", dict(HPSv2=27.89, PickScore=21.39)),
    ("Table 2a", "sd15", "SD-1.5 + DDSPO", dict(HPSv2=27.46, PickScore=21.35)),
    ("Table 2b", "sdxl", "SDXL", dict(HPSv2=27.89, PickScore=22.27)),
    ("Table 2b", "sdxl", "SDXL + D-DPO", dict(HPSv2=28.55, PickScore=22.61)),
    ("Table 2b", "sdxl", "SDXL + DDSPO", dict(HPSv2=28.78, PickScore=22.70)),
    ("Table 3a", "sd14", "SD-1.4", dict(GenEval=.4245, CB=.3150, HPSv2=26.88, PickScore=21.11)),
    ("Table 3a", "sd14", "SD-1.4, Rand-removal", dict(GenEval=.5045, CB=.3823, HPSv2=27.28, PickScore=21.36)),
    ("Table 3a", "sd14", "SD-1.4, LLaMA (TA)", dict(GenEval=.4854, CB=.3807, HPSv2=27.25, PickScore=21.36)),
    ("Table 3a", "sd14", "SD-1.4, LLaMA (AQ)", dict(GenEval=.4758, CB=.3616, HPSv2=27.51, PickScore=21.39)),
    ("Table 3b", "sd14", "SD-1.4, Rand-positive", dict(GenEval=.4866, CB=.3763)),
    ("Table 3b", "sd14", "SD-1.4, Not-paired", dict(GenEval=.4891, CB=.3842)),
    # the rows that only the second version has: the project page dohyun-as/DDSPO, index.html @e5281b4
    ("version 2", "sd14", "SD-1.4 + DSPO", dict(GenEval=.4841, CB=.3793, FID=18.28, IS=35.87)),
    ("version 2", "sd14", "SD-1.4 + DSPO with policy pairs", dict(GenEval=.4978, CB=.3854, FID=17.12, IS=37.47)),
    ("version 2", "sd3", "SD3-M", dict(GenEval=.7123, CB=.5155)),
    ("version 2", "sd3", "SD3-M + DDSPO", dict(GenEval=.7384, CB=.5740)),
    ("version 2", "sd15", "SD-1.5 + SPO", dict(HPSv2=27.50, PickScore=21.41)),
    ("version 2", "sd15", "SD-1.5 + DDSPO on Pick-a-Pic", dict(HPSv2=27.60, PickScore=21.50)),
    ("version 2", "sdxl", "SDXL + MaPO", dict(HPSv2=28.22, PickScore=22.30)),
    ("version 2", "sdxl", "SDXL + SPO", dict(HPSv2=29.21, PickScore=23.11)),
    ("version 2", "sdxl", "SDXL + DDSPO on Pick-a-Pic", dict(HPSv2=29.09, PickScore=22.71))]
NOTES = {
    "GenEval": "the official rules and detector; not yet run on the published SD-1.5 (expected 0.43).",
    "GenEval, lenient": "the same with the position rule of the paper's authors, to which its numbers belong.",
    "CB": "complex as the authors run it, without the official `--complex True`; spaCy 3.8 in place of 3.5.",
    "CB~": "with OWLv2 in place of UniDet in spatial~ and complex~, so no CB; judges/compbench.py has the way to it.",
    "HPSv2": "version 2.0, without antialias, as torchvision did before 0.17; in float32. 2.1 has another scale.",
    "GenEval 2 AM": "Soft-TIFA; changes by a factor of two with guidance and steps: compare runs of equal settings."}
BRACKETS = "In brackets: 95 % intervals from resampling prompts; differences are paired."


def bench_of(metric):
    """The benchmark of a column, or of a part of one such as "GenEval: colors"."""
    return COLUMNS[metric.split(":")[0].split(",")[0]][0]


def as_text(metric, x):
    """A mean and its interval, with as many digits as the paper gives."""
    digits = 2 if bench_of(metric) in ("coco", "hps", "pick", "geneval2") else 4
    return f"{x['mean']:.{digits}f}" + (f" [{x['low']:.{digits}f}, {x['high']:.{digits}f}]" if "low" in x else "")


def to_markdown(rows, paper):
    """Two Markdown tables, of the columns and of their parts, and their notes, as a text."""
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    columns = [metric for metric in COLUMNS if metric in metrics or (metric == "CB" and "CB~" in metrics)]
    parts = [metric for metric in metrics if metric not in columns]
    cells = {name: {metric: as_text(metric, x) for metric, x in row.items()} for name, row in (rows | paper).items()}
    texts = [markdown_table(["", *columns], [(name, *[row.get(metric, "") for metric in columns])
                                             for name, row in cells.items() if row.keys() & set(columns)])]
    if parts:
        texts += [markdown_table(["", *rows], [(part, *[cells[run].get(part, "") for run in rows]) for part in parts])]
    notes = [f"- {metric}: {NOTES[metric]}" for metric in columns if metric in NOTES]
    return "\n\n".join([*texts, BRACKETS, "\n".join(notes)])


def collect(run, settings, benchmarks):
    """{metric: {group: (prompts,)}} of all that has been scored in a run, but dict(mean=number) for FID and IS. A
    metric is the mean over groups of their means: GenEval's overall score, and the CB of the paper."""
    scores, found = {}, {}
    for bench, (count, _, judges) in benchmarks.items():
        for name, (groups, _, weights) in judges.items():
            rows = read_scores(run, name, settings | dict(lists=settings["lists"].get(bench), judge=weights))
            whole = count * len(groups) // len(compbench.CATEGORIES) if groups else count
            scores[name] = rows if "all" in rows or len(rows) == whole else {}
    for metric, (_, *plain) in COLUMNS.items():
        if plain and scores[plain[0]]:
            found[metric] = per_prompt(scores[plain[0]].values(), plain[1])
    official = compbench.official_spatial(run)
    mark = "" if official else "~"
    parts = per_prompt(compbench.combine(scores["blip"], scores["clipscore"], official or scores["owl"]))
    if len(parts) == len(compbench.CATEGORIES):
        found["CB" + mark] = {category: parts[category] for category in compbench.CATEGORIES}
    for metric, groups in dict(GenEval=found.get("GenEval", {}), HPSv2=found.get("HPSv2", {}), CB=parts).items():
        for group, values in groups.items():
            found[f"{metric}: {group}{mark if group in ('spatial', 'complex') else ''}"] = {group: values}
    if scores["geneval2"]:
        in_order = sorted(scores["geneval2"].values(), key=lambda row: row["index"])
        am, gm, skills, atoms = geneval2.geneval2_values(in_order)
        named = {"AM": am, "GM": gm} | {f"AM: {skill}": x for skill, x in skills.items()}
        named |= {f"GM: {count} atoms": x for count, x in atoms.items()}
        found |= {f"GenEval 2 {name}": dict(all=x) for name, x in named.items()}
    return found | {metric: dict(mean=x) for metric, x in scores["coco"].get("all", {}).items()}


def make_table(runs, benchmarks):
    """(the lines of the table as a text, all that is in it as a dict)."""
    settings, rows, remarks = {run: read_settings(run) for run in runs}, {}, []
    with reading(f"one of the scores of {', '.join(runs)}", "delete scores/ there, so that all is judged again."):
        found = {run: collect(run, settings[run], benchmarks) for run in runs}
    if not any(found.values()):
        raise UserError(f"no benchmark in {', '.join(runs)} has been scored yet: run evaluate.py score first.")
    for run in runs:
        rows[run] = {metric: value if "mean" in value else interval(value) for metric, value in found[run].items()}
        part = {bench for metric, (bench, *plain) in COLUMNS.items() if plain and metric not in rows[run]}
        rest = settings[run]["lists"].keys() - ({bench_of(metric) for metric in rows[run] if ":" not in metric} - part)
        remarks += [f"{run}: not scored, or only in part: {', '.join(sorted(rest))}"] if rest else []
        made = [f"{key} {value}" for key, value in settings[run].items() if value is not None and key != "lists"]
        remarks.append(f"{run}: {', '.join(made)}")
    for run in runs[1:]:
        same = {bench for bench, _ in settings[run]["lists"].items() & settings[runs[0]]["lists"].items()} - {"coco"}
        both = [metric for metric in found[run] if metric in found[runs[0]] and bench_of(metric) in same]
        if both and settings[run]["seed"] == settings[runs[0]]["seed"]:
            paired = rows[f"{run} − {runs[0]}"] = {}
            for metric in both:
                base = found[runs[0]][metric]
                paired[metric] = interval({group: x - base[group] for group, x in found[run][metric].items()})
        else:
            remarks.append(f"{run} and {runs[0]} share no benchmark with equal seeds and prompts: no differences.")
    paper = {f"paper, {source}: {row}": {  # the paper's GenEval is by the lenient rule
        "GenEval, lenient" if metric == "GenEval" else metric: dict(mean=x) for metric, x in values.items()}
        for source, preset, row, values in PAPER if preset in {one["base"] for one in settings.values()}}
    text = "\n".join([to_markdown(rows, paper), *[f"- {line}" for line in remarks]])
    return text, dict(runs=rows, paper=paper, notes=NOTES, remarks=remarks, settings=settings)
