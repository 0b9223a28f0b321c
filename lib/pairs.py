"""The pair store, which build_pairs.py writes and train.py reads. A folder of

    meta.json                   how the pairs were made; once all are there, a checksum for each shard too
    pairs.jsonl                 a row a pair: id, c, c_minus, strategy, seeds (or two image files), shard, row
    shard-00000.safetensors     x_0_w and x_0_l of the shard's pairs, each (pairs, channels, height, width)
    shard-00000.json            only until all are there: the checksum of the shard, and which of its pairs are no pairs

Latents are stored as the network sees them, scaled by the autoencoder's factor. A shard appears whole or not at all.
"""

import functools
import hashlib
import json
import os

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from lib import models, plots
from lib.files import UserError, checksum, count, read_json, read_lines, write_file


class PairStore:
    """A finished pair store: store[i] -> (row, x_0_w, x_0_l), a dict and two tensors (channels, h, w); x_0_l is None in
    a store of winners only.

    Raises UserError if the store is unfinished, or if its table or a shard is not what was written, or if a shard holds
    what can be no latents. A shard is checked when it is first opened.
    """

    def __init__(self, folder):
        self.folder, self.meta, table = folder, read_meta(folder), os.path.join(folder, "pairs.jsonl")
        if "checksums" not in self.meta:
            raise UserError(f"the pair store {folder} is not finished: run the build_pairs.py command that began it.")
        if not os.path.isfile(table) or checksum(table) != self.meta["table"]:
            raise UserError(f"{table} is missing or was changed after the pairs were made: make them in a new folder.")
        self.names = ("x_0_w", "x_0_l") if self.meta["negatives"] == "generated" else ("x_0_w",)
        left_out = set(self.meta.get("left_out", ()))
        self.rows, self.rows_of = [row for row in read_lines(table) if row["id"] not in left_out], {}
        for row in self.rows:
            self.rows_of.setdefault(row["shard"], []).append(row)
        if not self.rows:
            raise UserError(f"the pair store {folder} has no pairs: all were bad and left out.")
        self.check_shard = functools.cache(self.check_shard)
        self.open_shard = functools.lru_cache(64)(self.open_shard)  # a process may have some 1000 files open

    def open_shard(self, number):
        """An open safetensors file, mapped into memory, and its size."""
        self.check_shard(number)
        path = shard_path(self.folder, number)
        return safe_open(path, framework="pt"), os.path.getsize(path)

    def check_shard(self, number):
        """Raises UserError if a shard is not what was written, or holds what can be no latents of its pairs."""
        path = shard_path(self.folder, number)
        if not os.path.isfile(path) or checksum(path) != self.meta["checksums"][number]:
            raise UserError(f"{path} is missing or damaged: delete it and run its build_pairs.py command again.")
        size = self.meta["shard_size"]
        shape = [min(size, self.meta["pairs"] - number * size), *self.meta["latents"]]
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
            bad = [row for row in self.rows_of.get(number, ())
                   if not 0.001 <= deviation[row["row"]] <= 30]  # guess; it is near 1, or NaN
            if bad:
                raise UserError(f"{path}: {name} of the pairs {[row['id'] for row in bad[:10]]} has a deviation of "
                                f"{deviation[bad[0]['row']]:.3g}: these are no scaled latents. Make the pairs anew.")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        shard, size = self.open_shard(row["shard"])
        if os.path.getsize(shard_path(self.folder, row["shard"])) != size:  # reading past its end would end the process
            raise UserError(f"{shard_path(self.folder, row['shard'])} was changed during the run: make the pairs anew.")
        x_0 = [shard.get_slice(name)[row["row"]] for name in self.names]
        return row, x_0[0], x_0[1] if len(x_0) > 1 else None


def read_meta(folder):
    """A store's meta.json, as a dict."""
    path = os.path.join(folder, "meta.json")
    try:
        meta = read_json(path) if os.path.isfile(path) else {}
    except UserError:
        meta = {}
    kinds = dict(model=str, latents=list, scale=list, negatives=str, pairs=int, shard_size=int, table=str)
    good = isinstance(meta, dict) and all(type(meta.get(key)) is kind for key, kind in kinds.items())
    if good and "checksums" in meta:  # it is finished
        good = (isinstance(meta["checksums"], list) and isinstance(meta.get("left_out", []), list)
                and meta["shard_size"] > 0 and len(meta["checksums"]) == -(-meta["pairs"] // meta["shard_size"]))
    if not good or meta["negatives"] not in ("generated", "none"):
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


# ---- how a store is written


def note_path(folder, number):
    return os.path.join(folder, f"shard-{number:05d}.json")


def write_shard(folder, number, content, left_out):
    """Writes a shard, and before it its checksum and the ids of the rows whose latents are no pairs."""
    note = dict(checksum=hashlib.sha256(content).hexdigest(), left_out=left_out)
    write_file(note_path(folder, number), json.dumps(note) + "\n")
    write_file(shard_path(folder, number), content)


def is_whole(folder, number):
    """Whether a shard of an unfinished store is what was written."""
    try:
        note = read_json(note_path(folder, number))
    except (UserError, OSError):
        return False
    return isinstance(note, dict) and note.get("checksum") == checksum(shard_path(folder, number))


def finish_store(folder, shards):
    """Puts the checksums of new shards, and the ids of the rows that are no pairs, into meta.json."""
    meta = read_meta(folder)
    checksums, left_out = meta.get("checksums", [None] * shards), set(meta.get("left_out", ()))
    notes = {number: note_path(folder, number) for number in range(shards) if os.path.exists(note_path(folder, number))}
    for number, path in notes.items():
        note = read_json(path)
        checksums[number] = note["checksum"]
        left_out.update(note["left_out"])
    if notes:
        meta |= dict(checksums=checksums) | (dict(left_out=sorted(left_out)) if left_out else {})
        write_file(os.path.join(folder, "meta.json"), json.dumps(meta, indent=1) + "\n")
    for path in notes.values():
        os.remove(path)


# ---- build_pairs.py --inspect


def check_store(store, model):
    """All that is wrong with a pair store, a sentence each."""
    problems = [f"pair {name}: c and c_minus are the same to the model"
                for name in models.same_tokens(model, store.rows)]
    if misfit(store.meta, model):
        problems.append(f"{store.folder}: {misfit(store.meta, model)}")
    for number in tqdm(range(len(store.meta["checksums"])), "check"):
        try:
            store.check_shard(number)
        except UserError as error:
            problems.append(str(error))
    return problems


def inspect(folder):
    """Says what is in a store, draws four of its pairs as FOLDER.png, and raises UserError with all that is wrong."""
    store, picture = PairStore(folder), os.path.normpath(folder) + ".png"
    plots.try_path(picture)
    print(json.dumps({key: value for key, value in store.meta.items() if key not in ("checksums", "table")}, indent=1))
    model = models.load(store.meta["model"])
    problems = check_store(store, model)
    if problems:
        raise UserError("\n".join([*problems, f"{folder}: {count(problems, 'problem')}."]))
    some = [store[i] for i in np.linspace(0, len(store) - 1, min(256, len(store))).astype(int)]
    shown, columns, shares = some[::max(1, len(some) // 4)][:4], [], (0, 5, 50, 95, 100)
    for name, side, key in (("x_0_w", 1, "c"), ("x_0_l", 2, "c_minus")):
        words = [len(row[key].split()) for row in store.rows if row[key] is not None]
        if words:
            print(f"{key}: {len(words)} prompts; words: "
                  + ", ".join(f"{share}% {n:.3g}" for share, n in zip(shares, np.percentile(words, shares))))
        if shown[0][side] is not None:
            x_0 = torch.stack([pair[side] for pair in some]).float()  # (pairs, channels, h, w)
            print(f"{name} of {len(x_0)} pairs: mean {x_0.mean():.3f}, deviation {x_0.std():.3f}")
            images = models.decode(model, torch.stack([pair[side] for pair in shown]))
            columns.append((name, images, [row[key] for row, *_ in shown]))
    plots.draw_grid(None, columns, picture)
    print(f"{folder} is whole")
