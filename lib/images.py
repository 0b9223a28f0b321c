"""Images as people have them: files and pairs of them, for build_pairs.py --from-images.

A pair of images is a row dict(id, c, c_minus=None, winner, loser). Winner and loser name an image each: a file, or
FILE/ROW GROUP/ROW/COLUMN of one of Pick-a-Pic's .parquet files, where the images stay.
"""

import collections
import functools
import glob
import hashlib
import io
import os

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from lib.files import UserError, count, json_lines
from lib.processes import from_all, is_first
from lib.prompts import check_rows, parquet_rows, stop_if_bad

# ---- one image


def open_rgb(file):
    """An image file (a path or a binary file) as a PIL image in RGB: upright, what is transparent on white, 16 bits a
    channel scaled to 8. Raises ValueError, with the reason, if it is damaged or cannot be shown so."""
    try:
        with Image.open(file) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:  # its text names the address of an object
        raise ValueError("it is no image, or of a kind that Pillow does not know") from None
    except (OSError, TypeError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises these
        raise ValueError(str(error)) from None


def to_rgb(image):
    """A PIL image of any mode in RGB. Raises ValueError if nothing says which of its values are black and white."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float64)
        if image.mode == "F" or not 0 <= values.min() <= values.max() <= 65535:
            raise ValueError(f"its pixels are numbers of kind {image.mode} without a known white: save it with 8 bits")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))  # 65535 / 257 = 255
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][1] == 0:
            raise ValueError("it is wholly transparent")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image, size):
    """A PIL image in RGB -> (3, size, size) in [-1, 1]: its shorter side resized, its middle cut out."""
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


# ---- pairs of images


def read_image_pairs(path):
    """A row for each line of a .jsonl file with c and the names of the two images, which are relative to the file's
    folder; or for each comparison in Pick-a-Pic's .parquet files. A folder stands for its metadata.jsonl or for its
    .parquet files, of which those of the training split are taken."""
    inside = os.path.join(glob.escape(path), "")
    files = (glob.glob(inside + "metadata.jsonl") or glob.glob(inside + "train*.parquet")
             or glob.glob(inside + "*.parquet") or [path])
    if not os.path.isfile(files[0]) or not files[0].endswith((".jsonl", ".parquet")):
        raise UserError(f"--from-images {path}: must be a folder with a metadata.jsonl or with Pick-a-Pic's .parquet "
                        "files, or one such file. A line of the .jsonl file is a pair, with c, winner and loser.")
    if files[0].endswith(".parquet"):
        return read_pick_a_pic(sorted(files))
    path, rows, bad = files[0], [], []
    for number, name, c, *sides in check_rows(path, json_lines(path), ["c", "winner", "loser"]):
        winner, loser = (os.path.join(os.path.dirname(path), file) for file in sides)
        rows.append(dict(id=name, c=c, c_minus=None, winner=winner, loser=loser))
        bad += [] if c else [f"{path}:{number}: c is empty"]
    stop_if_bad(path, bad)
    return rows


def read_pick_a_pic(files):
    """The rows of .parquet files with Pick-a-Pic's columns. Ties, and what else is no comparison, are left out and
    counted."""
    rows, bad, left_out, number = [], [], collections.Counter(), 0
    for path in files:
        for group, k, row in parquet_rows(path, ["caption", "label_0"], ["are_different"]):
            number += 1
            label = row["label_0"]
            label = "" if label != label else label  # NaN, as null
            if label not in ("", 0, 0.5, 1) or not isinstance(row["caption"], str):
                bad.append(f"{path}:{number}: not a row with a text as caption and 0, 0.5 or 1 as label_0: "
                           f"{str(row)[:80]}")
            elif label == 0.5:
                left_out["ties"] += 1
            elif label == "":
                left_out["without a label"] += 1
            elif not row["caption"].strip() or row.get("are_different") is False:
                left_out["without a caption or of one image"] += 1
            else:
                best, place = 0 if label == 1 else 1, f"{path}/{group}/{k}/jpg_"
                rows.append(dict(id=f"{number:06d}", c=row["caption"].strip(), c_minus=None,
                                 winner=f"{place}{best}", loser=f"{place}{1 - best}"))
    stop_if_bad(", ".join(files[:3]), bad)
    for which, n in left_out.items() if is_first() else ():
        print(f"left out {n} of {number} pairs: {which}")
    return rows


@functools.lru_cache(1)
def row_group(path, group):
    """The images of one row group of a .parquet file. The next call is for the same one as a rule."""
    return [row for *_, row in parquet_rows(path, ["jpg_0", "jpg_1"], group=group)]


def image_bytes(name):
    """The bytes of an image that a row names. Raises OSError if there is no such file."""
    if os.path.isfile(os.path.dirname(os.path.dirname(os.path.dirname(name)))):
        path, group, row, column = name.rsplit("/", 3)
        return row_group(path, int(group))[int(row)][column]
    with open(name, "rb") as file:
        return file.read()


def read_pair(row):
    """The winner and the loser of a row as PIL images in RGB, and a checksum of their bytes. Raises UserError if one
    cannot be read, or if both show the same."""
    images, contents = [], []
    for side in ("winner", "loser"):
        try:
            contents.append(image_bytes(row[side]))
            if not contents[-1]:
                raise ValueError("it is empty")
            images.append(open_rgb(io.BytesIO(contents[-1])))
        except (OSError, TypeError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"pair {row['id']}: {row[side]} cannot be read as an image: {what}") from None
    if images[0].size == images[1].size and images[0].tobytes() == images[1].tobytes():
        raise UserError(f"pair {row['id']}: {row['winner']} and {row['loser']} are the same image")
    return *images, hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def look_at(rows, rank, world, skip_bad):
    """{id: the checksum of its images, or None} for all rows, of which each process reads its share. None stands for a
    pair that cannot be read or shows the same twice. Raises UserError with all such pairs, but for skip_bad."""
    checksums, bad = {}, []
    for row in tqdm(rows[len(rows) * rank // world:len(rows) * (rank + 1) // world], "look", disable=rank > 0):
        try:
            checksums[row["id"]] = read_pair(row)[-1]
        except UserError as error:
            checksums[row["id"]] = None
            bad.append(str(error))
    shares = from_all((checksums, bad))
    bad = [sentence for _, some in shares for sentence in some]
    if bad and not skip_bad:
        raise UserError("\n".join([*bad[:20], f"{count(bad, 'bad pair')}: mend them, or give --skip-bad, which leaves "
                                              "them out."]))
    if bad and rank == 0:
        print("\n".join([f"left out {count(bad, 'bad pair')} of {len(rows)}:", *bad[:20]]))
    return {name: value for some, _ in shares for name, value in some.items()}
