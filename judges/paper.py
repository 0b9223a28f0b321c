"""The numbers of the paper's Tables 1 to 3, and the columns of evaluate.py's table with what must be said of them."""

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
    "GenEval": "the official rules with Facebook's Mask2Former Swin-S, not OpenMMLab's: compare the runs here only.",
    "GenEval, lenient": "the same with the position rule of the paper's authors, to which its numbers belong.",
    "CB": "noun phrases by the version of spaCy's model that is installed; T2I-CompBench used 3.5.",
    "CB~": "with OWLv2 in place of UniDet in spatial~ and complex~: no T2I-CompBench scores. For CB, run the official "
           "UniDet_eval/2D_spatial_eval.py --outpath on compbench/spatial and compbench/complex, and `table` again.",
    "HPSv2": "version 2.0, tensors resized without antialias, as torchvision did before 0.17; in float32.",
    "FID": "30,000 images by BK-SDM's protocol, without an interval: it is no mean over prompts."}


def bench_of(metric):
    """The benchmark of a column, or of a part of one such as "GenEval: colors"."""
    return COLUMNS[metric.split(":")[0].split(",")[0]]


def render(rows, paper):
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

    def markdown(heads, lines):
        return ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads),
                *[f"| {name} | " + " | ".join(cells) + " |" for name, cells in lines], ""]

    lines = markdown([head(metric) for metric in columns], [
        (name, [text(metric, row) for metric in columns])
        for name, row in (rows | paper).items() if row.keys() & set(columns)])
    if rest:
        lines += markdown(rows, [(head(metric), [text(metric, row) for row in rows.values()]) for metric in rest])
    lines += ["In brackets: 95 % intervals from resampling prompts; differences are paired.", ""]
    return lines + [f"- ({k + 1}) {metric}: {NOTES[metric]}" for k, metric in enumerate(notes)]
