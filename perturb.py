"""Sec. 3.3 and 4.4 of DDSPO (arXiv 2512.23426): the degraded prompt c_minus of a prompt c.

    python perturb.py prompts.txt perturbed.jsonl

Rand-removal, Sec. 4.2: 40 to 70 % of the tokens are removed at random, so that c_minus says less than c. A token is a
word here, as in the authors' code: what is left stays readable to any text encoder. One word cannot both stay and go,
so prompts of one word, and empty ones, give no pair: they are left out and counted.

In: plain text, one prompt a line, or .jsonl with a `prompt` and, if wished, an `id` in each line.
Out: .jsonl, a line a pair: id, c, c_minus, strategy, seed.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import random
import sys

from tqdm import tqdm


def remove_words(c, seed=0, variant=0, low=0.4, high=0.7):
    """c -> c_minus: the words of c, in order, without a random 40 to 70 % of them (Sec. 4.2).

    A function of its arguments alone, the same on every machine and in every process. The share removed lies in
    [low, high] wherever that can be done in whole words, and at least one word stays and one goes.

    >>> remove_words("a red circle to the left of a blue square", seed=0)
    'red the left a blue'

    Raises ValueError for a prompt of fewer than two words and for bounds that are not 0 < low <= high < 1.
    """
    if not 0 < low <= high < 1:
        raise ValueError(f"the share to remove must satisfy 0 < low <= high < 1, not low = {low}, high = {high}.")
    words = c.split()
    n = len(words)
    if n < 2:
        raise ValueError(f"a prompt needs two words or more to lose some of them, not {c!r}.")
    rng = random.Random(f"{seed} {variant} {c}")  # seeded by a string: independent of PYTHONHASHSEED
    fewest, most = math.ceil(low * n - 1e-9), math.floor(high * n + 1e-9)  # 1e-9: 0.7 * 10 is not 7 for a computer
    if fewest > most:  # no whole number of words lies in the range: the one nearest to its middle
        fewest = most = round((low + high) / 2 * n)
    count = min(max(rng.randint(fewest, most), 1), n - 1)
    gone = set(rng.sample(range(n), count))
    return " ".join(word for i, word in enumerate(words) if i not in gone)


STRATEGIES = {"random-removal": remove_words}


def read_rows(path, fields):
    """[(line number, id, text, ...)] of a file of prompts: the `fields` of each line of a .jsonl file, the whole line
    of any other. A line without an `id` gets its number for one. Stops with all bad lines named by file and number."""
    if not os.path.isfile(path):
        sys.exit(f"there is no file {path}.")
    rows, first_seen, bad = [], {}, []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig").strip()
                if path.endswith(".jsonl"):
                    if not text:
                        continue
                    row = json.loads(text)
                    texts, name = [row[field].strip() for field in fields], str(row.get("id", f"{number:06d}"))
                    "".join(texts + [name]).encode()  # JSON can hold half characters, which no file can
                else:
                    texts, name = [text], f"{number:06d}"
            except UnicodeError:
                bad.append(f"{path}:{number}: not UTF-8")
                continue
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                bad.append(f"{path}:{number}: not a JSON object with texts {', '.join(fields)}: {text[:80]}")
                continue
            if name in first_seen:
                bad.append(f"{path}:{number}: the id {name} is already that of line {first_seen[name]}")
            first_seen[name] = number
            rows.append((number, name, *texts))
    stop_if_bad(path, bad)
    return rows


def stop_if_bad(path, bad):
    if bad:
        sys.exit("\n".join(bad[:20] + [f"{len(bad)} bad lines in {path}: mend or delete them. Nothing was written."]))


def check_flags(args, above_0=(), **least):
    """Stops unless each of these flags is a finite number, above 0 or of at least its bound."""
    for flag, bound in (dict.fromkeys(above_0) | least).items():
        value = getattr(args, flag)
        if not (value > 0 if bound is None else value >= bound) or value == math.inf:
            wanted = "more than 0" if bound is None else f"{bound} or more"
            sys.exit(f"--{flag.replace('_', '-')} must be {wanted}, not {value}.")


def write_text(path, text):
    """Writes a file whole or not at all, and its folder if need be."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path + ".partial", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(path + ".partial", path)
    except OSError as error:
        sys.exit(f"cannot write {path}: {error.strerror}.")


@contextlib.contextmanager
def locked(folder):
    """Makes a folder and holds it for this process alone until it ends, however it ends; stops if another holds it."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"another process is writing into {folder}: wait for it, or stop it first.")
    except OSError as error:
        sys.exit(f"cannot write into {folder}: {error.strerror}.")
    try:
        yield
    finally:
        os.close(lock)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompts", help="a text file, one prompt a line, or a .jsonl file")
    parser.add_argument("out", help="the .jsonl file to write")
    parser.add_argument("--strategy", choices=STRATEGIES, default="random-removal", help="Table 3a")
    parser.add_argument("--variants", type=int, default=1, help="different c_minus of each prompt (fewer if few words)")
    parser.add_argument("--low", type=float, default=0.4, help="least share of words to remove (paper)")
    parser.add_argument("--high", type=float, default=0.7, help="largest share of words to remove (paper)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    check_flags(args, variants=1)
    if not 0 < args.low <= args.high < 1:
        sys.exit(f"--low and --high must satisfy 0 < low <= high < 1, not {args.low} and {args.high}.")

    prompts = read_rows(args.prompts, ["prompt"])
    if os.path.isdir(args.out):
        sys.exit(f"{args.out} is a folder: give the name of a .jsonl file to write.")
    if os.path.exists(args.out) and os.path.samefile(args.prompts, args.out):
        sys.exit(f"{args.out} is the file of prompts itself: give another name for the result.")
    lines, short = [], []
    for number, name, c in tqdm(prompts, "perturb"):
        if len(c.split()) < 2:
            short.append(number)
            continue
        variants = [STRATEGIES[args.strategy](c, args.seed, v, args.low, args.high) for v in range(args.variants)]
        for v, c_minus in enumerate(dict.fromkeys(variants)):  # without repeats, in order
            row = dict(id=f"{name}-{v}" if args.variants > 1 else name, c=c, c_minus=c_minus, strategy=args.strategy,
                       seed=args.seed)
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    if not lines:
        sys.exit(f"{args.prompts} has no prompt of two words or more; nothing was written.")
    write_text(args.out, "".join(lines))
    print(f"wrote {args.out}: {len(lines)} pairs of prompts")
    if short:
        print(f"left out {len(short)} prompts of fewer than two words, in lines {', '.join(map(str, short[:10]))}"
              + ", ..." * (len(short) > 10))


if __name__ == "__main__":
    main()
