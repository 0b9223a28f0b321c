"""The pair store, which build_pairs.py writes and train.py reads. A folder of

    meta.json                   how the pairs were made, and a checksum for each shard that is there
    pairs.jsonl                 a row a pair: id, c, c_minus, strategy, seeds (or two image files), shard, row
    shard-00000.safetensors     x_0_w and x_0_l of the shard's pairs, each (pairs, channels, height, width)

Latents are stored as the network sees them, scaled by the autoencoder's factor. A shard appears whole or not at all.
"""

import functools
import hashlib
import json
import os

import torch
from safetensors import safe_open
from tqdm import tqdm

from lib import models, plots
from lib.files import UserError, checksum, count, json_lines, reading, write_file
from lib.processes import from_all, is_first


class PairStore:
    """A finished pair store: store[i] -> (row, x_0_w, x_0_l), a dict and two tensors (channels, h, w); x_0_l is None in
    a store of winners only. Raises UserError if it is unfinished or damaged; a shard is checked at its first read."""

    def __init__(self, folder):
        self.folder, self.meta, table = folder, read_meta(folder), os.path.join(folder, "pairs.jsonl")
        if None in self.meta["checksums"]:
            raise UserError(f"the pair store {folder} is not finished: run the build_pairs.py command that began it.")
        if not os.path.isfile(table) or checksum(table) != self.meta["table"]:
            raise UserError(f"{table} is missing or was changed after the pairs were made: make them in a new folder.")
        self.names = ("x_0_w", "x_0_l") if self.meta["negatives"] == "generated" else ("x_0_w",)
        self.table, self.left_out = [row for _, row in json_lines(table)], set(self.meta.get("left_out", ()))
        self.rows = [row for row in self.table if row["id"] not in self.left_out]
        if not self.rows:
            raise UserError(f"the pair store {folder} has no pairs: all were bad and left out.")
        self.check_shard = functools.cache(self.check_shard)

    def check_shard(self, number):
        """The path of a shard. Raises UserError if it is not what was written, or if its numbers are no latents."""
        path, size = shard_path(self.folder, number), self.meta["shard_size"]
        if not os.path.isfile(path) or checksum(path) != self.meta["checksums"][number]:
            raise UserError(f"{path} is missing or damaged: delete it and run its build_pairs.py command again.")
        rows = self.table[number * size:(number + 1) * size]
        with reading(path, "make the pairs in a new folder."), safe_open(path, framework="pt") as shard:
            for name in self.names:
                x_0 = shard.get_tensor(name).view(len(rows), *self.meta["latents"]).float()
                for row, deviation in zip(rows, x_0.flatten(1).std(1).tolist()):  # it is near 1, or NaN
                    if not 0.001 <= deviation <= 30 and row["id"] not in self.left_out:  # both ends are guesses
                        raise ValueError(f"{name} of the pair {row['id']} has a deviation of {deviation:.3g}, which no "
                                         "scaled latents have")
        return path

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        path = self.check_shard(row["shard"])
        with reading(path, "it was changed during the run. Make the pairs anew."):
            with safe_open(path, framework="pt") as shard:  # opened each time: reading a cut file kills the process
                x_0 = {name: shard.get_slice(name)[row["row"]] for name in self.names}
        return row, x_0["x_0_w"], x_0.get("x_0_l")


def read_meta(folder):
    """A store's meta.json, as a dict; the checksum of a shard that is not there yet is None."""
    path = os.path.join(folder, "meta.json")
    with reading(path, "give a pair store, or make the pairs in a new folder."), open(path, encoding="utf-8") as file:
        meta = json.load(file)
        shards = range(0, meta["pairs"], meta["shard_size"])
        meta.setdefault("checksums", [None] * len(shards))
        kinds = dict(model=str, table=str, checksums=list, left_out=list)
        if (len(meta["checksums"]) != len(shards) or meta["negatives"] not in ("generated", "none")
                or not all(isinstance(meta.get(key, kind()), kind) for key, kind in kinds.items())):
            raise ValueError("its entries do not fit together")
        return meta


def misfit(meta, model):
    """Why a model cannot read a store's latents: a sentence, empty if it can."""
    shape, scale = list(model.latent_shape), model.latent_scale
    if shape == meta["latents"] and scale == meta["scale"]:
        return ""
    return (f"it holds latents {meta['latents']} of scale {meta['scale']}, but {model.pipe.name_or_path} needs {shape} "
            f"of {scale}: make the pairs with this model.")


def shard_path(folder, number):
    return os.path.join(folder, f"shard-{number:05d}.safetensors")


def write_shards(folder, made):
    """Writes the shards that this process made, each (number, content, ids of rows to leave out). Then the
    first process puts the checksums and the ids of all processes into meta.json."""
    notes = []
    for number, content, left_out in made:
        write_file(shard_path(folder, number), content)
        notes.append((number, hashlib.sha256(content).hexdigest(), left_out))
    notes = sum(from_all(notes), [])
    if is_first():
        meta = read_meta(folder)
        for number, found, left_out in notes:
            meta["checksums"][number] = found
            if left_out:
                meta["left_out"] = sorted({*meta.get("left_out", ()), *left_out})
        write_file(os.path.join(folder, "meta.json"), json.dumps(meta, indent=1) + "\n")


# ---- build_pairs.py --inspect


def inspect(folder):
    """Says what is in a store and draws four of its pairs as FOLDER.png. Raises UserError with all that is wrong."""
    store, picture = PairStore(folder), os.path.abspath(folder) + ".png"
    plots.try_path(picture)
    print(json.dumps({key: value for key, value in store.meta.items() if key not in ("checksums", "table")}, indent=1))
    model = models.load(store.meta["model"])
    same = models.same_tokens(model, store.rows)
    problems = [f"pair {name}: c and c_minus are the same to the model" for name in same]
    problems += [f"{folder}: {what}"] if (what := misfit(store.meta, model)) else []
    for number in tqdm(range(len(store.meta["checksums"])), "check"):
        try:
            store.check_shard(number)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join([*problems, f"{folder}: {count(problems, 'problem')}."]))
    rows, *sides = zip(*[store[i] for i in range(len(store))[::max(1, len(store) // 4)][:4]])
    columns = [(name, models.decode(model, torch.stack(x_0)), [row[key] for row in rows])
               for name, x_0, key in zip(store.names, sides, ("c", "c_minus"))]
    plots.draw_grid(None, columns, picture)
    print(f"{folder} is whole")
