"""The pair store, which build_pairs.py writes and train.py reads. A folder of

    meta.json                   how the pairs were made; once all are there, a checksum for each shard too
    pairs.jsonl                 a row a pair: id, c, c_minus, strategy, seeds (or two image files), shard, row
    shard-00000.safetensors     x_0_w and x_0_l of the shard's pairs, each (pairs, channels, height, width)

Latents are stored as the network sees them, scaled by the autoencoder's factor. A shard appears whole or not at all.
"""

import functools
import os

from safetensors import SafetensorError, safe_open

from lib import models
from lib.files import UserError, checksum, read_json, read_lines


class PairStore:
    """A finished pair store: store[i] -> (row, x_0_w, x_0_l), a dict and two tensors (channels, h, w); x_0_l is None in
    a store of winners only.

    Raises UserError if the store is unfinished, or if its table or a shard is not what was written or can be no pairs.
    A shard is checked when it is first opened.
    """

    def __init__(self, folder):
        self.folder, self.meta, table = folder, read_meta(folder), os.path.join(folder, "pairs.jsonl")
        if "checksums" not in self.meta:
            raise UserError(f"the pair store {folder} is not finished: run the build_pairs.py command that began it.")
        if not os.path.isfile(table) or checksum(table) != self.meta["table"]:
            raise UserError(f"{table} is missing or was changed after the pairs were made: make them in a new folder.")
        self.names = ("x_0_w", "x_0_l") if self.meta["negatives"] == "generated" else ("x_0_w",)
        self.rows, ids = read_lines(table), set()
        if not len(self.rows) == self.meta["pairs"] > 0:
            raise UserError(f"{table} has {len(self.rows)} lines, and not one for each of {self.meta['pairs']} pairs.")
        for i, row in enumerate(self.rows):
            name, c, c_minus = row.get("id"), row.get("c"), row.get("c_minus")
            if not (isinstance(name, str) and isinstance(c, str) and c.strip() and isinstance(c_minus, str | None)
                    and (row.get("shard"), row.get("row")) == divmod(i, self.meta["shard_size"])):
                raise UserError(f"{table}:{i + 1}: not a row of a pair store, or its c is empty or its shard wrong.")
            if name in ids:
                raise UserError(f"{table}:{i + 1}: 2 pairs have the id {name}.")
            if c == c_minus:
                raise UserError(f"{table}:{i + 1}: pair {name}: c and c_minus are the same to the model.")
            ids.add(name)
        self.check_shard = functools.cache(self.check_shard)
        self.open_shard = functools.lru_cache(64)(self.open_shard)  # a process may have some 1000 files open

    def open_shard(self, number):
        """An open safetensors file, mapped into memory."""
        self.check_shard(number)
        return safe_open(shard_path(self.folder, number), framework="pt")

    def check_shard(self, number):
        """Raises UserError if a shard is not what was written, or holds what can be no latents of its pairs."""
        path, size = shard_path(self.folder, number), self.meta["shard_size"]
        if not os.path.isfile(path) or checksum(path) != self.meta["checksums"][number]:
            raise UserError(f"{path} is missing or damaged: delete it and run its build_pairs.py command again.")
        ids = [row["id"] for row in self.rows[number * size:(number + 1) * size]]
        shape = [len(ids), *self.meta["latents"]]
        try:
            with safe_open(path, framework="pt") as shard:
                latents = {name: shard.get_tensor(name) for name in self.names}
        except SafetensorError as error:
            raise UserError(f"{path} is not a shard of a pair store ({error}): make the pairs anew.") from None
        for name, x in latents.items():
            if list(x.shape) != shape or not x.is_floating_point():
                raise UserError(f"{path}: {name} is {x.dtype} of shape {list(x.shape)}, not floats of shape {shape}: "
                                "make the pairs in a new folder.")
            deviation = x.float().flatten(1).std(1)  # (pairs,)
            bad = (deviation != deviation.clamp(0.001, 30)).nonzero().flatten().tolist()  # guess; it is near 1, or NaN
            if bad:
                raise UserError(f"{path}: {name} of the pairs {[ids[k] for k in bad[:10]]} has a deviation of "
                                f"{deviation[bad[0]]:.3g}: these are no scaled latents. Make the pairs anew.")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        number, row = divmod(i, self.meta["shard_size"])
        shard = self.open_shard(number)
        x_0 = [shard.get_slice(name)[row] for name in self.names]
        return self.rows[i], x_0[0], x_0[1] if len(x_0) > 1 else None


def read_meta(folder):
    """A store's meta.json, as a dict."""
    path = os.path.join(folder, "meta.json")
    meta = read_json(path) if os.path.isfile(path) else None
    if not isinstance(meta, dict) or not {"model", "latents", "scale", "negatives", "pairs", "shard_size",
                                          "table"} <= meta.keys():
        raise UserError(f"{folder} is no pair store, or its meta.json is damaged: give another path, or make the pairs "
                        "in a new folder.")
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
