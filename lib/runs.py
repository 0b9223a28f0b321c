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
import shlex
import shutil
import socket
import sys
import zipfile

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from lib import models, plots
from lib.files import UserError, checksum, save_state, text_checksum, write_file

BANDS = 10  # of time steps, in the log
FLAGS = ("objective", "side", "negatives", "lora_rank", "beta", "lr", "warmup", "batch_size", "precision", "seed")

# ---- checkpoints


def trained_state(args, rank, net, optimizer=()):
    """What is trained, and the optimizer's state, whole and on the CPU, for the first process. All of them call it."""
    if rank > 0 and not args.fsdp:
        return None, None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state, optimizer_state = get_state_dict(net, optimizer, options=options)
    if hasattr(net, "peft_config"):  # LoRA
        state = {name: x for name, x in state.items() if ".theta." in name}
    return state, optimizer_state


def save_checkpoint(args, identity, net, optimizer, scaler, rank, update):
    """Writes checkpoint-UPDATE.pt and removes all but the newest two. All processes call it."""
    state, optimizer_state = trained_state(args, rank, net, optimizer)
    if rank == 0:
        whole = dict(identity=identity, update=update, net=state, optimizer=optimizer_state, scaler=scaler.state_dict())
        save_state(os.path.join(args.out, f"checkpoint-{update:06d}.pt"), whole)
        for old in checkpoints(args.out)[2:]:
            os.remove(old)


def checkpoints(folder):
    """The checkpoints' paths, newest first. Whatever else lies beside them is left alone."""
    paths = glob.glob(os.path.join(glob.escape(folder), f"checkpoint-{'[0-9]' * 6}.pt"))
    return sorted(filter(os.path.isfile, paths), reverse=True)


def identity_of(args, store, model):
    """What must be the same when a run is continued: some flags, and checksums of its pairs and of the weights that it
    starts from, under names that say what is wrong where they differ."""
    files = {"other pairs": [store.meta["table"], *store.meta["checksums"]]}
    for role, path in dict(winner=args.winner, loser=args.loser).items():
        if path:
            folder = path if os.path.isfile(os.path.join(path, models.LORA)) else models.find(path)[0]
            weights = glob.glob(os.path.join(glob.escape(folder), "**", "*.safetensors"), recursive=True)
            files[f"other weights of --{role}"] = [*map(checksum, sorted(weights))]
    if args.winner and files["other weights of --winner"] == files["other weights of --loser"]:
        raise UserError(f"--winner {args.winner} and --loser {args.loser} are the same policy: there is no preference.")
    sums = {name: text_checksum("".join(parts)) for name, parts in files.items()}
    sums["other weights of --model"] = models.model_checksum(model)
    return {name: getattr(args, name) for name in FLAGS} | sums


def load_checkpoint(args, identity, net, optimizer, scaler):
    """Continues from the newest undamaged checkpoint, if there is one. Returns the number of updates done. Raises
    UserError if the run in --out is another one, or if the processes do not all find the same."""
    trained, state = {name: p for name, p in net.named_parameters() if p.requires_grad}, None
    for path in checkpoints(args.out):
        try:
            state = read_checkpoint(path, trained.keys())
            break
        except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, OSError) as error:
            print(f"{path} is damaged ({str(error).splitlines()[0]}) and is passed over.", file=sys.stderr)
    update = state["update"] if state else 0
    agree(dict(identity, out=f"{args.out} after update {update}"))
    if not state:
        for result in (os.path.join(args.out, name) for name in ("pipeline", "lora", "curves.png")):
            if os.path.exists(result):
                raise UserError(f"{result} is a result without a checkpoint, and would be replaced: give another "
                                "--out.")
        return 0
    if what := difference(state["identity"], identity):
        raise UserError(f"the run in {args.out} was begun with {what}: continue it with the same flags, models and "
                        "pairs, or give another --out.")
    if update > args.updates:
        raise UserError(f"the run in {args.out} has {update} updates, more than --updates {args.updates}: give more, "
                        "or another --out.")
    for name, p in trained.items():  # one tensor after another, so that none is on the GPU twice
        p.data.copy_(shard_like(state["net"][name], p))
        optimizer.state[p] = {key: x.to(p.device, copy=True) if key == "step" else shard_like(x, p)
                              for key, x in state["optimizer"]["state"][name].items()}
    scaler.load_state_dict(state["scaler"])
    return update


def read_checkpoint(path, trained):
    """What is in a checkpoint with the `trained` weights. Raises BadZipFile, or what torch raises, if it is damaged."""
    with zipfile.ZipFile(path) as file:  # a torch checkpoint is a zip file, with a checksum for each tensor
        damage = file.testzip()
    if damage:
        raise zipfile.BadZipFile(damage)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict) or not {"identity", "update", "net", "optimizer", "scaler"} <= state.keys():
        raise zipfile.BadZipFile("it is another torch file")
    missing = sorted(trained - (state["net"].keys() & state["optimizer"]["state"].keys()))
    if missing:
        raise zipfile.BadZipFile(f"it lacks the weights {missing[:3]}")
    return state


def shard_like(x, p):
    """A copy of a tensor where the parameter p is: with FSDP, this process's share of it."""
    x = x.to(p.device, copy=True)
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else x


def difference(found, wanted):
    """The first difference between two identities, in words: a flag with its two values, or the name of files, whose
    checksums say nothing. None if they are the same."""
    for name, value in wanted.items():
        if found.get(name) != value:
            return name if name.startswith("other ") else f"{name} {found.get(name)}, not {value}"


def agree(mine):
    """Raises UserError if another process has another identity than the first: machines that see other files would add
    up gradients of different runs."""
    if not dist.is_initialized():
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), mine))
    first_host, first = everyone[0]
    for rank, (host, its) in enumerate(everyone):
        if what := difference(its, first):
            raise UserError(f"process {rank} on {host} and process 0 on {first_host} do not see the same: {what}. "
                            "--out, --pairs and the models must be the same files for all.")


# ---- the result


def export(args, model, state):
    """Writes the tuned pipeline in float32, or the adapter, and the run's flags beside it. Returns the folder."""
    lora = hasattr(model.net, "peft_config")
    folder = os.path.join(args.out, "lora" if lora else "pipeline")
    shutil.rmtree(folder + ".partial", ignore_errors=True)
    if lora:
        weights = {name.replace(".theta.", "."): x.contiguous() for name, x in state.items()}
        type(model.pipe).save_lora_weights(folder + ".partial", **{model.net_name + "_lora_layers": weights})
    else:
        tuned = models.load(args.model)
        tuned.net.load_state_dict(state)
        tuned.pipe.save_pretrained(folder + ".partial")
    note = os.path.join(folder + ".partial", "training.json")
    more = dict(preset=models.preset_of(args.model), prediction_type=model.prediction_type)
    write_file(note, json.dumps(vars(args) | more, indent=1) + "\n")
    for path in glob.glob(os.path.join(glob.escape(folder + ".partial"), "**", "*.safetensors"), recursive=True):
        shutil.copymode(note, path)  # safetensors makes files that only their writer may read
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(folder + ".partial", folder)
    print(f"wrote {folder}")
    return folder


def finish(args, model, rank):
    """Exports the result, draws the log, which is worth less, and says how to go on. All processes call it."""
    state, _ = trained_state(args, rank, model.net)
    if rank > 0:
        return
    result = export(args, model, state)
    try:
        plots.draw_curves(os.path.join(args.out, "log.jsonl"))
    except (OSError, UserError) as error:
        print(f"curves.png was not drawn ({error}): the same command does it when this is solved.", file=sys.stderr)
    if args.objective == "sft":
        print("next, when both sides are trained:  torchrun train.py with both results as --winner and --loser")
    else:
        print(f"next:  python evaluate.py grid --models {shlex.join([args.model, result])} --prompts "
              "examples/prompts.txt")


# ---- the log


def open_log(folder, update, first_row, tensorboard):
    """log.jsonl, opened to go on after this update: a new one begins with first_row, and lines of later updates are
    taken out. One that is damaged is moved aside. Beside it TensorBoard's writer, or a context of None."""
    path, lines = os.path.join(folder, "log.jsonl"), []
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n") and json.loads(line)["update"] <= update]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        os.replace(path, path + ".damaged")
        print(f"{path} is not a log of train.py, or is damaged: it is now {path}.damaged, and a new one is begun.",
              file=sys.stderr)
    write_file(path, "".join(lines if update > 0 and lines else [json.dumps(first_row) + "\n"]))
    board = contextlib.nullcontext()
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # here, because few runs need it

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
    """Adds a row to the log and to TensorBoard, and shows some of it beside the bar."""
    log.write(json.dumps(row) + "\n")
    log.flush()
    for name, values in row.items() if board else ():
        for i, value in enumerate(values if isinstance(values, list) else [values]):
            if value is not None:
                board.add_scalar(f"{name}/{i}" if isinstance(values, list) else name, value, row["update"])
    shown = {name: f"{row[name]:.3g}" for name in ("loss", "accuracy", "winner", "loser") if name in row}
    bar.set_postfix(dict(update=row["update"]) | shown)


def oddities(columns, size):
    """What is strange about an update, a sentence each. `size` is the mean square of the reference's prediction."""
    if (columns["loss"] == 0).all():
        yield "note: every loss of an update is 0, so that nothing more is learned: take a smaller --beta or --lr"
    if (columns["loss"] > 10).all():
        yield "note: every loss of an update is above 10, and it began at 0.69: take a smaller --beta or --lr"
    if size and columns["drift"].mean() > size:
        yield ("note: the student is further from the reference than the reference's prediction is from 0: take a "
               "smaller --lr or fewer --updates")
