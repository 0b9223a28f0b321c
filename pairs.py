"""The pair store, which build_pairs.py writes and train.py reads. A folder of

    meta.json                   how the pairs were made; once all are there, a checksum for each shard too
    pairs.jsonl                 a row a pair: id, c, c_minus, strategy, seeds (or two image files), shard, row
    shard-00000.safetensors     x_0_w and x_0_l of the shard's pairs, each (pairs, channels, height, width)

Latents are stored as the network sees them, scaled by the autoencoder's factor. A shard appears whole or not at all.
"""

import functools
import os

from safetensors import safe_open

import models
from common import UserError, checksum, read_json, read_lines


class PairStore:
    """A finished pair store: store[i] -> (row, x_0_w, x_0_l), a dict and two tensors (channels, h, w); x_0_l is None in
    a store of winners only.

    Raises UserError if the store is unfinished, or if its table or a shard is not what was written. A shard is checked
    when it is first opened.
    """

    def __init__(self, folder):
        self.folder, self.meta, table = folder, read_meta(folder), os.path.join(folder, "pairs.jsonl")
        if "checksums" not in self.meta:
            raise UserError(f"the pair store {folder} is not finished: run the build_pairs.py command that began it.")
        if not os.path.isfile(table) or checksum(table) != self.meta["table"]:
            raise UserError(f"{table} is missing or was changed after the pairs were made: make them in a new folder.")
        self.rows, self.checked = read_lines(table), set()
        for number, row in enumerate(self.rows, 1):
            if not (isinstance(row.get("id"), str) and isinstance(row.get("c"), str) and row["c"].strip()
                    and isinstance(row.get("c_minus"), str | None) and type(row.get("row")) is int and row["row"] >= 0
                    and type(row.get("shard")) is int and 0 <= row["shard"] < len(self.meta["checksums"])):
                raise UserError(f"{table}:{number}: not a row of a pair store, or its c is empty or its shard is "
                                "missing.")
        if not len(self.rows) == self.meta["pairs"] > 0:
            raise UserError(f"{table} has {len(self.rows)} lines, and not one for each of {self.meta['pairs']} pairs.")
        self.open_shard = functools.lru_cache(64)(self.open_shard)  # a process may have some 1000 files open

    def open_shard(self, number):
        """An open safetensors file, mapped into memory."""
        path = shard_path(self.folder, number)
        if number not in self.checked and not (
                os.path.isfile(path) and checksum(path) == self.meta["checksums"][number]):
            raise UserError(f"{path} is missing or damaged: delete it and run its build_pairs.py command again.")
        self.checked.add(number)
        return safe_open(path, framework="pt")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        shard = self.open_shard(row["shard"])
        x_0_l = shard.get_slice("x_0_l")[row["row"]] if self.meta["negatives"] == "generated" else None
        return row, shard.get_slice("x_0_w")[row["row"]], x_0_l


def read_meta(folder):
    """A store's meta.json, as a dict."""
    path = os.path.join(folder, "meta.json")
    meta = read_json(path) if os.path.isfile(path) else None
    if not isinstance(meta, dict) or not {"model", "latents", "scale", "negatives", "pairs", "shard_size",
                                          "table"} <= meta.keys():
        raise UserError(f"{folder} is no pair store, or its meta.json is damaged: make the pairs in a new folder.")
    return meta


def misfit(meta, model):
    """Why a model cannot read a store's latents: a sentence, empty if it can."""
    shape, scale = list(model.latent_shape), models.latent_scale(model)
    if shape == meta["latents"] and scale == meta["scale"]:
        return ""
    return (f"it holds latents {meta['latents']} of scale {meta['scale']}, but {model.pipe.name_or_path} needs {shape} "
            f"of {scale}: make the pairs with this model.")


def shard_path(folder, number):
    return os.path.join(folder, f"shard-{number:05d}.safetensors")
