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

from lib.files import UserError, count, json_lines, reading
from lib.processes import from_all, is_first
from lib.prompts import check_rows, parquet_rows

# ---- one image


def open_rgb(file):
    """An image file (a path or a binary file) as a PIL image in RGB: upright, what is transparent on white, 16 bits a
    channel scaled to 8. Raises ValueError, with the reason, if it is damaged, fully transparent or of unknown white."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError:  # its text names the address of an object
        raise ValueError("it is no image, or of a kind that Pillow does not know") from None
    except (OSError, TypeError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises these
        raise ValueError(str(error)) from None
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float64)
        if image.mode == "F" or values.min() < 0 or not 255 < values.max() <= 65535:
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
    folder, path = os.path.dirname(files[0]), files[0] if len(files) == 1 else path
    pairs = read_pick_a_pic(sorted(files)) if files[0].endswith(".parquet") else json_lines(path)
    found = check_rows(path, pairs, ["c", "winner", "loser"])
    return [dict(id=name, c=c, c_minus=None, winner=os.path.join(folder, winner), loser=os.path.join(folder, loser))
            for _, name, c, winner, loser in found]


def read_pick_a_pic(files):
    """Yields (number, dict(c, winner, loser)) for each comparison in .parquet files with Pick-a-Pic's columns. Leaves
    out ties and what else is no comparison, and says how many."""
    left_out, number = collections.Counter(), 0
    for path in files:
        for group, k, row in parquet_rows(path, ["caption", "label_0"], ["are_different"]):
            number, c, label = number + 1, row["caption"], row["label_0"]
            if label == label and label not in ("", 0, 0.5, 1):  # null is "" here, and NaN does not equal itself
                raise UserError(f"{path}:{number}: label_0 must be 0, 0.5 or 1, not {label!r}.")
            if label == 0.5:
                left_out["ties"] += 1
            elif label not in (0, 1) or not str(c).strip() or row.get("are_different") is False:
                left_out["without a label, a caption or a second image"] += 1
            else:
                best, place = 0 if label == 1 else 1, f"{os.path.basename(path)}/{group}/{k}/jpg_"
                yield number, dict(c=c, winner=f"{place}{best}", loser=f"{place}{1 - best}")
    for which, n in left_out.items() if is_first() else ():
        print(f"left out {n} of {number} pairs: {which}")


@functools.lru_cache(1)
def row_group(path, group):
    """The images of one row group of a .parquet file. Most calls ask for the group of the call before."""
    return [row for *_, row in parquet_rows(path, ["jpg_0", "jpg_1"], group=group)]


def image_bytes(name):
    """The bytes of an image that a row names. Raises OSError if there is no such file."""
    path, *place = name.rsplit("/", 3)
    if place and os.path.isfile(path):
        group, row, column = place
        return row_group(path, int(group))[int(row)][column] or b""  # for null
    with open(name, "rb") as file:
        return file.read()


def read_pair(row):
    """The winner and the loser of a row as PIL images in RGB, and a checksum of their bytes. Raises UserError if one
    cannot be read, or if both show the same."""
    images, contents = [], []
    for side in ("winner", "loser"):
        with reading(f"pair {row['id']}: {row[side]}", "put a whole image there, or leave the pair out."):
            contents.append(image_bytes(row[side]))
            images.append(open_rgb(io.BytesIO(contents[-1])))
    if images[0].size == images[1].size and images[0].tobytes() == images[1].tobytes():
        raise UserError(f"pair {row['id']}: {row['winner']} and {row['loser']} are the same image")
    return *images, hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def look_at(rows, rank, world, skip_bad):
    """{id: a checksum of its images} of the rows whose images can be read and differ; each process reads its share.
    Raises UserError with all the others, unless skip_bad."""
    good, bad = {}, []
    for row in tqdm(rows[len(rows) * rank // world:len(rows) * (rank + 1) // world], "look", disable=rank > 0):
        try:
            good[row["id"]] = read_pair(row)[-1]
        except UserError as error:
            bad.append(str(error))
    shares = from_all((good, bad))
    bad = [sentence for _, some in shares for sentence in some]
    said = "\n".join(bad[:20])
    if bad and not skip_bad:
        raise UserError(f"{said}\n{count(bad, 'bad pair')}: mend them, or give --skip-bad, which leaves them out.")
    if bad and rank == 0:
        print(f"left out {count(bad, 'bad pair')} of {len(rows)}:\n{said}")
    return {name: value for some, _ in shares for name, value in some.items()}
