"""What has nothing to do with the method: errors as sentences, whole files, flags and processes."""

import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import math
import os
import sys

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError


class UserError(ValueError):
    """Something that the user can put right. Its text is a sentence that names the file, line or flag."""


def program(main):
    """Ends main with a sentence where the user can put it right; a bug keeps its traceback."""
    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except UserError as error:
            sys.exit(str(error))
        except (OSError, SafetensorError) as error:
            sys.exit(f"cannot read or write: {error}. What was written before is kept: run the same command again when "
                     "this is solved.")
        except torch.OutOfMemoryError as error:
            sys.exit("out of memory: give a smaller --batch-size, or to train.py a smaller --micro-batch, "
                     f"--checkpointing, --lora-rank or --fsdp. {error}")
        except KeyboardInterrupt:
            sys.exit("stopped. The same command goes on where this one was.")
    return run


# ---- files


def write_file(path, content):
    """Writes text or bytes, whole or not at all, and makes the folder if there is none."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(path + ".partial", "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(path + ".partial", path)
    except OSError as error:  # of a full disk it does not name the file
        raise OSError(error.errno, error.strerror, path) from None


def read_json(path):
    """The value in a JSON file. Raises UserError where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from None


def json_lines(path):
    """Yields (number, value) for each line of a .jsonl file. A line that is not JSON gives its text."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            text = line.decode("utf-8-sig", errors="surrogateescape").strip()  # check_rows notices what is not UTF-8
            if text:
                try:
                    yield number, json.loads(text)
                except (ValueError, RecursionError):
                    yield number, text


def read_lines(path):
    """The rows of a .jsonl file, a list of dicts. Raises UserError with the number of a line that is none."""
    rows = []
    for number, row in json_lines(path):
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object: {str(row)[:80]}")
        rows.append(row)
    return rows


def check_rows(path, rows, fields):
    """Yields (number, id, text, ...), the `fields` of each (number, dict) in `rows`; the id of a row without an `id` is
    its number. Raises UserError at the end, with all bad rows named by file and number."""
    first_seen, bad = {}, []
    for number, row in rows:
        try:
            texts, name = [row[field].strip() for field in fields], str(row.get("id", f"{number:06d}"))
            "".join(texts + [name]).encode()
        except UnicodeError:
            bad.append(f"{path}:{number}: not UTF-8")
        except (KeyError, TypeError, AttributeError):
            bad.append(f"{path}:{number}: not a row with texts {', '.join(fields)}: "
                       + str(row)[:80].encode(errors="replace").decode())
        else:
            if first_seen.setdefault(name, number) != number:
                bad.append(f"{path}:{number}: the id {name} is already that of line {first_seen[name]}")
            yield number, name, *texts
    stop_if_bad(path, bad)


def stop_if_bad(path, bad):
    """Raises UserError if there are bad lines, with the first of them."""
    if bad:
        lines = f"{len(bad)} bad line{'s' * (len(bad) > 1)}"
        raise UserError("\n".join([*bad[:20], f"{lines} in {path}: correct or delete them. Nothing was written."]))


def to_lines(rows):
    """The text of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def checksum(path):
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_settings(path, settings):
    """Writes what a folder is made with, or raises UserError if the folder was begun with something else."""
    if not os.path.exists(path):
        return write_file(path, json.dumps(settings, indent=1) + "\n")
    found = read_json(path)
    for key, value in settings.items():
        if found.get(key) != value:
            raise UserError(f"{os.path.dirname(path)} was begun with {key} {found.get(key)}, not {value}: use the same "
                            "again, or another folder.")


# ---- flags


def at_least(low, kind=int):
    """An argparse type: a finite number that is not below `low`."""
    def number(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be {low} or more, not {text}")
        return value
    return number


def positive(text):
    """An argparse type: a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
    return float(text)


# ---- processes


@contextlib.contextmanager
def holding(folder):
    """Makes a folder and holds it for this process alone. Raises UserError if another process holds it."""
    os.makedirs(folder, exist_ok=True)
    try:
        with FileLock(os.path.join(folder, ".lock"), timeout=0):
            yield
    except Timeout:
        raise UserError(f"another process is writing into {folder}: wait until it ends, or stop it.") from None


@contextlib.contextmanager
def processes(folder, hours=24):
    """(rank, number of processes, device) as torchrun gives them, or of one process. The first process alone holds
    `folder`. A process may wait so many hours for another."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=hours))
    with holding(folder) if rank == 0 else contextlib.nullcontext():
        yield rank, world, device
        barrier()
    if world > 1:
        dist.destroy_process_group()


def barrier():
    """Waits for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()
