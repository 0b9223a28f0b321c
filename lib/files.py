"""Files: whole or not at all, checked where they are read; and errors as sentences."""

import contextlib
import csv
import errno
import hashlib
import json
import os
import pathlib
import pickle
import re
import struct
import zipfile

from safetensors import SafetensorError


class UserError(ValueError):
    """Something that the user can put right. Its text is a sentence that names the file, line or flag."""


DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError,
           zipfile.BadZipFile, struct.error, csv.Error, SafetensorError, ImportError)  # where files are damaged


@contextlib.contextmanager
def reading(what, advice):
    """Makes one sentence, with advice, of whatever is raised where a damaged file is read."""
    try:
        yield
    except UserError:
        raise
    except (pickle.UnpicklingError, struct.error):  # torch's own text advises to run what is in the file
        raise UserError(f"{what} cannot be read (it is damaged, or holds more than weights): {advice}") from None
    except DAMAGED as error:
        lines = map(str.strip, str(error).splitlines())  # "401 Client Error" says nothing, what follows it does
        reason = next((line for line in lines if not re.match("$|.*:$|4.. Client", line)), type(error).__name__)
        raise UserError(f"{what} cannot be read ({reason}): {advice}") from None


def write_file(path, content):
    """Writes text, bytes or what content(path) writes: whole or not at all, with its folder. A link stays a link."""
    path = os.path.realpath(path) if os.path.islink(path) else path
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        if callable(content):
            content(path + ".partial")
        else:
            with open(path + ".partial", "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
        with open(path + ".partial", "rb") as file:
            os.fsync(file.fileno())  # or after a power cut the new name may stand for an empty file
        os.replace(path + ".partial", path)
    except (OSError, RuntimeError) as error:  # of a full disk (torch: RuntimeError), without the file's name
        if os.path.isfile(path + ".partial"):
            os.remove(path + ".partial")
        reason = error.args if isinstance(error, OSError) else (errno.ENOSPC, "the disk may be full")
        raise OSError(*reason[:2], path) from None


def read_text(path):
    """The text of a file. Raises UserError if it cannot be read."""
    with reading(path, "it must be a text file in UTF-8."), open(path, encoding="utf-8-sig") as file:
        return file.read()


def read_json(path):
    """The value in a JSON file. Raises UserError if it cannot be read."""
    with reading(path, "it must be whole and valid JSON."):
        return json.loads(read_text(path))


def text_lines(path):
    """Yields (number, line) for each line of a text file. Bytes that are not UTF-8 become half characters."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            yield number, line.strip()


def json_lines(path):
    """Yields (number, value) for each line of a .jsonl file. A line that is not JSON gives its text."""
    for number, line in text_lines(path):
        if line:
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, line


def count(things, noun):
    """How many there are, in words: 1 line, 2 lines."""
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def to_lines(rows):
    """The text of a .jsonl file."""
    encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for each row
    return "".join([encode(row) + "\n" for row in rows])


def checksum(path):
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_checksum(text):
    """The sha256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def difference(found, wanted):
    """The first entry of `wanted` that `found` has otherwise, in words; None if there is none."""
    for key, value in wanted.items():
        if found.get(key) != value:
            if re.fullmatch("None|[0-9a-f]{16,}", str(found.get(key))):  # a checksum says nothing to a reader
                return f"other {key} than now"
            return f"{key} {found.get(key)}, not {value}"


def stop_if_foreign(path):
    """Raises UserError if the folder of a file `path` holds other files but not this one: then it is not ours."""
    folder, name = os.path.split(path)
    others = os.listdir(folder) if os.path.isdir(folder) and not os.path.exists(path) else ()
    if any(other != ".lock" and not other.endswith(".partial") for other in others):
        raise UserError(f"{folder} holds other files and no {name}: move it away, or give another name.")


def stop_if_not_ours(path, mark):
    """Raises UserError if there is a file without the mark that a program puts into what it writes there."""
    if os.path.exists(path) and mark not in pathlib.Path(path).read_bytes():
        raise UserError(f"{path} exists, and this program did not write it: give another name.")


def same_settings(path, settings, notes=()):
    """Writes what a folder is made with, and dict(notes) beside it. Raises UserError if the folder was begun with other
    settings, or if other files are in it already."""
    folder = os.path.dirname(path)
    if not os.path.exists(path):
        stop_if_foreign(path)
        return write_file(path, json.dumps(dict(notes) | settings, indent=1) + "\n")
    with reading(path, f"move {folder} away, or give another name."):
        if what := difference(json.loads(read_text(path)), settings):
            raise UserError(f"{folder} was begun with {what}: use the same again, or another folder.")
