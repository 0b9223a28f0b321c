"""What a run of train.py keeps in its folder: checkpoints, the log, and at the end the result.

    checkpoint-000040.pt     what is trained after 40 updates, with the optimizer's state; the newest two are kept
    log.jsonl                a line an update; curves.png is its picture
    pipeline/ or lora/       the result: a diffusers folder, or an adapter for load_lora_weights

Files appear whole or not at all. A stopped run goes on from its newest undamaged checkpoint.
"""

import contextlib
import glob
import json
import os
import pickle
import shutil
import sys
import zipfile

import numpy as np
import psutil
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import models
from common import UserError, write_file

BANDS = 10  # of time steps, in the log

# ---- checkpoints


def trained_state(net, optimizers=()):
    """What is trained, and the optimizer's state, whole and on the CPU. With --fsdp all processes must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state, optimizer_state = get_state_dict(net, optimizers, options=options)
    if hasattr(net, "peft_config"):  # LoRA
        state = {name: x for name, x in state.items() if ".theta." in name}
    return state, optimizer_state


def save_checkpoint(folder, identity, net, optimizer, scaler, rank, fsdp, update):
    """Writes checkpoint-UPDATE.pt and removes all but the newest two. With --fsdp all processes must call it."""
    if rank > 0 and not fsdp:
        return
    state, optimizer_state = trained_state(net, optimizer)
    if rank == 0:
        path = os.path.join(folder, f"checkpoint-{update:06d}.pt")
        try:
            torch.save(dict(identity=identity, update=update, net=state, optimizer=optimizer_state,
                            scaler=scaler.state_dict()), path + ".partial")
        except RuntimeError as error:  # this is how torch reports a full disk
            raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
        os.replace(path + ".partial", path)
        for old in checkpoints(folder)[2:]:
            os.remove(old)


def checkpoints(folder):
    """The checkpoints' paths, newest first. Whatever else lies beside them is left alone."""
    paths = glob.glob(os.path.join(glob.escape(folder), f"checkpoint-{'[0-9]' * 6}.pt"))
    return sorted(filter(os.path.isfile, paths), reverse=True)


def load_checkpoint(folder, identity, net, optimizer, scaler):
    """Continues from the newest undamaged checkpoint, if there is one. Returns the number of updates done. Raises
    UserError if the run in the folder is another one: if its identity, a dict, differs."""
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    for path in checkpoints(folder):
        state, damage = read_checkpoint(path, trained)
        if damage:
            print(f"{path} is damaged ({damage}) and is passed over.", file=sys.stderr)
            continue
        for name, value in identity.items():
            if state["identity"].get(name) != value:
                raise UserError(f"the run in {folder} was begun with {name} {state['identity'].get(name)}, not "
                                f"{value}: continue it with the same flags and pairs, or give another --out.")
        set_state_dict(net, optimizer, model_state_dict=state["net"], optim_state_dict=state["optimizer"],
                       options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False))
        scaler.load_state_dict(state["scaler"])
        return state["update"]
    for name in ("pipeline", "lora"):
        if os.path.exists(os.path.join(folder, name)):
            raise UserError(f"{os.path.join(folder, name)} is a result without a checkpoint, and would be replaced: "
                            "give another --out.")
    return 0


def read_checkpoint(path, trained):
    """(the state, "") of a checkpoint with the `trained` weights, or (None, what is wrong with it)."""
    try:
        with zipfile.ZipFile(path) as file:  # a torch checkpoint is a zip file, with a checksum for each tensor
            damage = file.testzip()
        state = None if damage else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, OSError) as error:
        return None, str(error).splitlines()[0]
    if damage:
        return None, damage
    if not isinstance(state, dict) or not {"identity", "update", "net", "optimizer", "scaler"} <= state.keys():
        return None, "it is another torch file"
    missing = sorted(trained - state["net"].keys())
    return (None, f"it lacks the weights {missing[:3]}") if missing else (state, "")


# ---- the result


def export(folder, flags, model, state):
    """Writes the tuned pipeline as a diffusers folder in float32, or the adapter as the pipeline's load_lora_weights
    reads it, with the run's flags in training.json."""
    lora = hasattr(model.net, "peft_config")
    folder = os.path.join(folder, "lora" if lora else "pipeline")
    shutil.rmtree(folder + ".partial", ignore_errors=True)
    if lora:
        weights = {name.replace(".theta.", "."): x.contiguous() for name, x in state.items()}
        type(model.pipe).save_lora_weights(folder + ".partial", **{model.net_name + "_lora_layers": weights})
    else:
        tuned = models.load(flags["model"])
        tuned.net.load_state_dict(state)
        tuned.pipe.save_pretrained(folder + ".partial")
    note = os.path.join(folder + ".partial", "training.json")
    write_file(note, json.dumps(flags, indent=1) + "\n")
    for path in glob.glob(os.path.join(glob.escape(folder + ".partial"), "**", "*.safetensors"), recursive=True):
        shutil.copymode(note, path)  # safetensors makes files that only their writer may read
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(folder + ".partial", folder)
    print(f"wrote {folder}")


# ---- the log


def open_log(folder, update, first_row, tensorboard):
    """log.jsonl, opened to go on after this update: a new one begins with first_row, and lines of later updates are
    taken out. Beside it TensorBoard's writer, or a context of None."""
    path, lines = os.path.join(folder, "log.jsonl"), [json.dumps(first_row) + "\n"]
    if update > 0:
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n") and json.loads(line)["update"] <= update]
    write_file(path, "".join(lines))
    board = contextlib.nullcontext()
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # here, since few need it
        board = SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=update + 1)
    return open(path, "a", encoding="utf-8"), board


def log_row(update, columns, num_train_timesteps, **more):
    """A line of the log: means over the update's pairs, and over those whose t lies in each of BANDS equal bands.
    `columns` is {name: (batch_size,)}, t among them."""
    band = (columns["t"] * BANDS // num_train_timesteps).astype(int)
    count = np.bincount(band, minlength=BANDS)
    row = dict(update=update, **more, pairs_by_t=count.tolist())
    if "logit" in columns:
        row["logit_quantiles"] = np.quantile(columns["logit"], [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
    for name in [name for name in columns if name != "t"]:
        sums = np.bincount(band, columns[name], BANDS)
        row |= {name: sums.sum() / count.sum(), name + "_by_t": [s / n if n else None for s, n in zip(sums, count)]}
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return row | dict(memory_gb=used / 1e9)


def show(log, board, bar, row):
    """Adds a row to the log, to TensorBoard and to the bar."""
    log.write(json.dumps(row) + "\n")
    log.flush()
    for name, values in row.items() if board else ():
        for i, value in enumerate(values if isinstance(values, list) else [values]):
            if value is not None:
                board.add_scalar(f"{name}/{i}" if isinstance(values, list) else name, value, row["update"])
    shown = ("loss", "accuracy", "winner", "loser", "pairs_per_second")
    bar.set_postfix({name: f"{row[name]:.3g}" for name in shown if name in row})
    bar.update()
