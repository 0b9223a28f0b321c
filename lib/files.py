"""Files: whole or not at all, checked where they are read; and errors as sentences."""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile

import torch
from safetensors import SafetensorError


class UserError(ValueError):
    """Something that the user can put right. Its text is a sentence that names the file, line or flag."""


DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError,
           zipfile.BadZipFile, SafetensorError)  # what reading a damaged file raises


@contextlib.contextmanager
def reading(what, advice):
    """Makes one sentence, with advice, of whatever is raised where a damaged file is read."""
    try:
        yield
    except UserError:
        raise
    except DAMAGED as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith(":")]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"{what} cannot be read ({reason}): {advice}") from None


def write_file(path, content):
    """Writes text or bytes, whole or not at all, and makes the folder if there is none. A link stays a link."""
    path = os.path.realpath(path) if os.path.islink(path) else path
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(path + ".partial", "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or after a power cut the new name may stand for an empty file
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


def replace_folder(made, folder):
    """Moves what lies in the folder `made` to `folder`: whole if that is new, else file by file. Other files stay."""
    if not os.path.exists(folder):
        return os.replace(made, folder)
    for where, _, names in os.walk(made):
        place = os.path.join(folder, os.path.relpath(where, made))
        os.makedirs(place, exist_ok=True)
        for name in names:
            os.replace(os.path.join(where, name), os.path.join(place, name))
    shutil.rmtree(made)


def read_json(path):
    """The value in a JSON file. Raises UserError where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from None


def read_text(path):
    """The text of a file. Raises UserError where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeError:
        raise UserError(f"{path} is not UTF-8: save the file as UTF-8.") from None


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


def read_lines(path):
    """The rows of a .jsonl file, a list of dicts. Raises UserError with the number of a line that is none."""
    rows = []
    for number, row in json_lines(path):
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object: {str(row)[:80]}")
        rows.append(row)
    return rows


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


def same_settings(path, settings, notes=()):
    """Writes what a folder is made with, and dict(notes) beside it. Raises UserError if the folder was begun with other
    settings, or if other files are in it already."""
    folder = os.path.dirname(path)
    if not os.path.exists(path):
        stop_if_foreign(path)
        write_file(path, json.dumps(dict(notes) | settings, indent=1) + "\n")
    elif not isinstance(found := read_json(path), dict):
        raise UserError(f"{path} is no JSON object: move {folder} away, or give another name.")
    elif what := difference(found, settings):
        raise UserError(f"{folder} was begun with {what}: use the same again, or another folder.")
