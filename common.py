"""What has nothing to do with the method: errors as sentences, whole files, flags and processes."""

import argparse
import contextlib
import datetime
import functools
import hashlib
import io
import json
import math
import os
import re
import sys

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError


class UserError(ValueError):
    """Something that the user can put right. Its text is a sentence that names the file, line or flag."""


AGAIN = "The same command goes on from what was written, or begins anew where nothing was."


def program(main):
    """Ends main with a sentence where the user can put it right; a bug keeps its traceback."""
    @functools.wraps(main)
    def run(argv=None):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # not every terminal has every character
        try:
            result = main(argv)
            sys.stdout.flush()
            return result
        except UserError as error:
            message = str(error)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own last flush fails too
            message = "stopped, because nothing reads the output any more. " + AGAIN
        except torch.OutOfMemoryError as error:
            message = ("out of memory: give a smaller --batch-size, or to train.py a smaller --micro-batch, "
                       f"--checkpointing, --lora-rank or --fsdp. {error}")
        except (OSError, SafetensorError) as error:
            message = (f"cannot read or write: {error}. What was written before is kept: run the same command again "
                       "when this is solved.")
        except KeyboardInterrupt:
            message = "stopped. " + AGAIN
        sys.exit(message)  # here the error and what it held are gone, so that a progress bar has ended its line
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
        if os.path.isfile(path + ".partial"):
            os.remove(path + ".partial")
        raise OSError(error.errno, error.strerror, path) from None


def save_state(path, state):
    """torch.save, whole or not at all."""
    try:
        torch.save(state, path + ".partial")
    except RuntimeError as error:  # this is how torch reports a full disk, and it does not name the file
        os.remove(path + ".partial")
        raise OSError(f"torch could not write all of {path}: the disk may be full") from error
    os.replace(path + ".partial", path)


def read_json(path):
    """The value in a JSON file. Raises UserError where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from None


def text_lines(path):
    """Yields (number, line) for each line of a text file. What is not UTF-8 becomes half characters, the zeros of
    UTF-16 too, and check_rows names them."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            yield number, line.strip().replace("\0", "\udc00")


def json_lines(path):
    """Yields (number, value) for each line of a .jsonl file. A line that is not JSON gives its text."""
    for number, line in text_lines(path):
        if line:
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, line


def parquet_rows(path, columns, optional=(), group=None, at_once=4096):
    """Yields (row group, number in it, {column: cell}) for each row of a .parquet file or of one row group, with
    `at_once` of them in memory. Raises UserError if the file cannot be read or lacks one of the `columns`."""
    import pyarrow.parquet  # here, because few runs need it

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:  # no whole column at once
            names = file.schema_arrow.names
            for name in columns:
                if names.count(name) != 1:
                    raise UserError(f"{path} must have one column {name}; it has {', '.join(names)}.")
            wanted = [*columns, *[name for name in optional if name in names]]
            for g in range(file.num_row_groups) if group is None else [group]:
                batches = file.iter_batches(at_once, [g], wanted)
                for k, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                    yield g, k, {name: "" if cell is None else cell for name, cell in row.items()}
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read as a .parquet file: {str(error).splitlines()[0]}") from None


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
            if isinstance(row, str):  # a line that is no JSON
                row.encode()
            texts, name = [row[field].strip() for field in fields], str(row.get("id", f"{number:06d}"))
            "".join(texts + [name]).encode()
        except UnicodeError:
            bad.append(f"{path}:{number}: not UTF-8: save the file as UTF-8")
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
        raise UserError("\n".join([*bad[:20], f"{count(bad, 'bad line')} in {path} to be corrected or deleted. Nothing "
                                              "was written."]))


def count(things, noun):
    """How many there are, in words: 1 line, 2 lines."""
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def to_lines(rows):
    """The text of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def checksum(path):
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of(text):
    """The sha256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def same_settings(path, settings, notes=()):
    """Writes what a folder is made with, and dict(notes) beside it. Raises UserError if the folder was begun with other
    settings, or if other files are in it already."""
    folder = os.path.dirname(path)
    if not os.path.exists(path):
        if any(name != ".lock" and not name.endswith(".partial") for name in os.listdir(folder)):
            raise UserError(f"{folder} holds other files and no {os.path.basename(path)}: move it away, or give "
                            "another name.")
        return write_file(path, json.dumps(dict(notes) | settings, indent=1) + "\n")
    found = read_json(path)
    for key, value in settings.items():
        if found.get(key) != value:
            what = f"{key} {found.get(key)}, not {value}"
            if re.fullmatch("None|[0-9a-f]{16,}", str(found.get(key))):  # a checksum, which says nothing to a reader
                what = f"other {key} than now"
            raise UserError(f"{folder} was begun with {what}: use the same again, or another folder.")


# ---- flags


def at_least(low, kind=int, high=math.inf):
    """An argparse type: a finite number that is not below `low`, and not above `high`."""
    def number(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be {low:g} or more, not {text}")
        if value > high:
            raise argparse.ArgumentTypeError(f"must be {high:g} or less, not {text}")
        return value
    return number


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


def place():
    """(rank, number of processes, device) of this process as torchrun gives them, or of the only one."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return rank, world, device


@contextlib.contextmanager
def processes(folder, hours=24):
    """What `place` gives, with the processes connected. The first process alone holds `folder`. A process may wait so
    many hours for another."""
    rank, world, device = place()
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=hours))
    with holding(folder) if rank == 0 else contextlib.nullcontext():
        yield rank, world, device
        barrier()
    if world > 1:
        dist.destroy_process_group()


def is_first():
    """Whether this is the first process, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def barrier():
    """Waits for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()
