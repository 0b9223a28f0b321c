"""Prompts as people have them: cut into tokens, chosen, read from files, and checked."""

import csv
import hashlib
import heapq
import os
import re

import huggingface_hub
from tqdm import tqdm

from lib.files import UserError, count, json_lines, reading, text_lines
from lib.processes import is_first

# Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese are written without spaces.
UNSPACED = "[\u0e00-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
WORDS = re.compile(rf"(?=\w){UNSPACED}|(?:(?!{UNSPACED})\w)+")  # without signs; such a letter is a word
LETTERS = re.compile(rf"\W*(?:{WORDS.pattern})\W*|\W+")  # the same, with the signs around it
WEIGHT = re.compile(r":\s*[\d.]+\s*[)\]]")  # of A1111's (red car:1.3)
PIECES = re.compile(rf"(?:[(\[]+[^()\[\]]*{WEIGHT.pattern}+|\S)+")  # words, but such a bracket is one
UNTIDY = re.compile(r",(?! [^\s,])")  # a comma without one space and a word after it
EMPTY = re.compile(r",(?:\s*,)+")  # an empty tag
GLUED = re.compile(r",(?:(?<=[^\s,],)(?=[^\W\d]|[(\[])|(?<=[^\s,\d],)(?=\d))")  # between two tags, and not in 1,000


def split_tokens(c):
    """A prompt -> its tokens, and a function that joins some of them. A token is a word. In tags as 1girl,solo it ends
    at the comma too, and empty tags are dropped; a weighted bracket is one token; and where a prompt has no spaces and
    its script is written so, each letter is a token."""
    words = c.split()
    if len(words) == 1 and re.search(UNSPACED, c):
        return LETTERS.findall(EMPTY.sub(",", words[0]).lstrip(",")), lambda some: "".join(some).rstrip(",，、")
    if "," in c and (UNTIDY.search(c) or c[0] == ","):
        tags = GLUED.sub(", ", EMPTY.sub(",", c).lstrip(", "))
        if tags != c:
            return PIECES.findall(tags.removesuffix(" ,")), lambda some: " ".join(some).rstrip(",")
    return PIECES.findall(c) if ":" in c and WEIGHT.search(c) else words, " ".join


def sample_prompts(source, fewest, limit, seed):
    """[(id, prompt)]: the different prompts of a source that have at least `fewest` words. With a limit, those whose
    sha256 of (seed, prompt) is smallest: the same ones on any machine and in any order. Only these and a hash of every
    prompt are in memory. Says which are left out. Raises UserError if none is left."""
    seen, short, repeated = set(), [], []

    def different():
        for number, name, c in tqdm(read_prompts(source), "read", disable=not is_first()):
            tokens, _ = split_tokens(c)
            key = hashlib.sha256(f"{seed} {' '.join(tokens)}".encode()).digest()  # spacing makes no difference
            if len(tokens) < fewest:
                short.append(number)
            elif key in seen:
                repeated.append(number)
            else:
                seen.add(key)
                yield key, number, name, c

    rows = different() if limit is None else heapq.nsmallest(limit, different())
    prompts = [(name, c) for _, _, name, c in sorted(rows, key=lambda row: row[1])]
    words = "one word" if fewest == 1 else "two words"
    if not prompts:
        raise UserError(f"{source} has no prompt of {words} or more; nothing was written.")
    for numbers, noun, more in ((short, "prompt", f" of fewer than {words}"), (repeated, "duplicate prompt", "")):
        if numbers and is_first():
            some = ", ".join(map(str, numbers[:10])) + ", ..." * (len(numbers) > 10)
            print(f"left out {count(numbers, noun)}{more}, in lines {some}")
    weighted = sum(1 for _, c in prompts if ":" in c and WEIGHT.search(c))
    if weighted and is_first():
        print(f"{weighted} of the prompts have weights like (red car:1.3): diffusers reads their signs as text")
    return prompts


# ---- files


def read_prompts(source):
    """Yields (number, id, prompt) for each line of a text file, each row of a .jsonl file with `prompt` or `c`, or each
    row of a .csv or .parquet file with `prompt`; "diffusiondb" is the paper's data set. An empty line is an empty
    prompt. Raises UserError where there is no such file, and at the end if some rows were bad."""
    if source == "diffusiondb" and not os.path.exists(source):
        with reading("metadata.parquet of the dataset poloclub/diffusiondb", "fetch it from https://huggingface.co/"
                     "datasets/poloclub/diffusiondb/tree/main and give its path instead of diffusiondb."):
            source = huggingface_hub.hf_hub_download("poloclub/diffusiondb", "metadata.parquet", repo_type="dataset")
    if not os.path.isfile(source):
        raise UserError(f"{source} is a folder or a pipe, and no file." if os.path.exists(source) else
                        f"there is no file {source}.")
    kind = os.path.splitext(source)[1].lower()
    if kind == ".jsonl":
        rows = ((number, {"prompt": row["c"]} | row if isinstance(row, dict) and "c" in row else row)
                for number, row in json_lines(source))
    elif kind == ".parquet":
        rows = enumerate((row for *_, row in parquet_rows(source, ["prompt"], ["id"])), 1)
    elif kind == ".csv":
        lines = (line + "\n" for _, line in text_lines(source))
        with reading(source, "write it as a .csv file with one column prompt, and texts with commas in quotes."):
            table = csv.DictReader(lines, restkey="prompt", strict=True)
            if table.fieldnames and table.fieldnames.count("prompt") != 1:
                raise ValueError(f"its columns are {', '.join(table.fieldnames)}")
            rows = [(table.line_num, row) for row in table]  # a row may have several lines: its last
    elif kind in (".txt", ""):
        rows = ((number, dict(prompt=line)) for number, line in text_lines(source))
    else:
        raise UserError(f"{source}: the prompts must be a .txt, .jsonl, .csv or .parquet file.")
    return check_rows(source, rows, ["prompt"])


def read_perturbed(path, seed):
    """A row, dict(id, c, c_minus, noise_seed, how c_minus was made), for each line of a file in perturb.py's format."""
    if not os.path.isfile(path) or not path.endswith(".jsonl"):
        raise UserError(f"--prompts {path}: there is no such .jsonl file. Make it with  python perturb.py prompts.txt "
                        "perturbed.jsonl")
    lines, rows = dict(json_lines(path)), []  # {number: row}
    for number, name, c, c_minus in check_rows(path, lines.items(), ["c", "c_minus"]):
        how = {key: lines[number][key] for key in ("strategy", "perturb_seed", "llm") if key in lines[number]}
        rows.append(dict(id=name, c=c, c_minus=c_minus, noise_seed=seed + len(rows), **how))
    return rows


def is_perturbed(path):
    """Whether all lines of a file are as perturb.py writes them, and so may be replaced. A pair store's have more."""
    always = {"id", "c", "strategy", "perturb_seed"}
    return all(isinstance(row, dict) and always <= row.keys() <= always | {"c_minus", "answer", "reason", "llm"}
               for _, row in json_lines(path))


def parquet_rows(path, columns, optional=(), group=None):
    """Yields (row group, number in it, {column: cell}) for each row of a .parquet file or of one row group; an empty
    cell is an empty text. Raises UserError if the file cannot be read or has not all `columns`."""
    import pyarrow.parquet  # here, because few runs need it

    with reading(path, f"it must be a whole .parquet file with columns {', '.join(columns)}, each once."):
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)  # no whole column at once
        wanted = [file.schema_arrow.field(name).name for name in columns]  # KeyError unless there is exactly one
        wanted += [name for name in optional if name in file.schema_arrow.names]
        for g in range(file.num_row_groups) if group is None else [group]:
            batches = file.iter_batches(4096, [g], wanted)
            for k, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                yield g, k, {name: "" if cell is None else cell for name, cell in row.items()}


def check_rows(path, rows, fields):
    """Yields (number, id, text, ...), the `fields` of each (number, dict) in `rows`; the id of a row without an `id` is
    its number. Raises UserError at the end, with all bad rows named by file and number."""
    first_seen, bad = {}, []
    for number, row in rows:
        try:
            texts, name = [row[field].strip() for field in fields], row.get("id")
            if not isinstance(name, str | int | float | None):
                raise TypeError("an id is a text or a number")
            name = f"{number:06d}" if name in (None, "") else str(name)
            said = f"{name} {' '.join(texts)}"
        except (KeyError, TypeError, AttributeError):
            texts, said = None, str(row)
        if "\0" in said or not said.isascii() and re.search("[\ud800-\udfff]", said):  # bytes that are not UTF-8
            bad.append(f"{path}:{number}: it holds a NUL, or is in another encoding than UTF-8: save the file as UTF-8")
        elif texts is None:
            bad.append(f"{path}:{number}: not a row with texts {', '.join(fields)}: {said[:80]}")
        elif fields[0] == "c" and texts[0] in ("", texts[1]):
            bad.append(f"{path}:{number}: c is empty, or the same as {fields[1]}: they make no preference")
        elif first_seen.setdefault(name, number) != number:
            bad.append(f"{path}:{number}: the id {name} is already that of line {first_seen[name]}")
        else:
            yield number, name, *texts
    stop_if_bad(path, bad)


def stop_if_bad(path, bad):
    """Raises UserError if there are bad lines, with the first of them."""
    if bad:
        raise UserError("\n".join([*bad[:20], f"{count(bad, 'bad line')} in {path} to be corrected or deleted."]))
