"""What a run of train.py asks of its pairs, says, and keeps in its folder:

    checkpoint-000040.pt     what is trained after 40 updates, with the optimizer's state; the newest two are kept
    log.jsonl                a line an update; curves.png is its picture, tensorboard/ a copy
    preview-000040.png       the student beside the reference, with --preview
    pipeline/ or lora/       the result: a diffusers folder, or an adapter for load_lora_weights

Files appear whole or not at all. A stopped run goes on from its newest checkpoint.
"""

import glob
import json
import math
import os
import pathlib
import pickle
import re
import shlex
import shutil
import socket
import sys
import zipfile

import numpy as np
import psutil
import torch

from lib import models, plots
from lib.files import UserError, checksum, difference, replace_folder, save_state, text_checksum, write_file
from lib.pairs import PairStore
from lib.parts import copy_parts
from lib.processes import from_all
from lib.settings import HALF, find_row

BANDS = 10  # of time steps, in the log
FLAGS = ("objective", "side", "negatives", "lora_rank", "beta", "scale", "lr", "warmup", "batch_size", "seed")
BEFORE_A_CHECKPOINT = r"\.lock|log\.jsonl|tensorboard|preview-\d+\.png|.*\.partial"  # what a run may have written

# ---- its folders


def check_out(out):
    """Raises UserError if a run's folder is, or lies in, a model or a pair store."""
    where = pathlib.Path(out).resolve()
    for folder in (where, *where.parents):
        names = {path.name for path in folder.glob("*.json*")}
        if "model_index.json" in names or {"meta.json", "pairs.jsonl"} <= names:
            raise UserError(f"--out {out}: {folder} is a model or a pair store: give a folder outside it.")


def open_store(args, needs_c_minus):
    """The pair store. Raises UserError if there is none, or if its pairs do not go with the objective."""
    if not os.path.exists(os.path.join(args.pairs, "meta.json")):
        raise UserError(f"there is no pair store {args.pairs}: make it with\n    python perturb.py prompts.txt "
                        f"perturbed.jsonl\n    torchrun build_pairs.py --model {args.model} --prompts perturbed.jsonl "
                        f"--out {args.pairs}")
    store = PairStore(args.pairs)
    if args.negatives == "generated" and store.meta["negatives"] == "none":
        raise UserError(f"{args.pairs} holds winners only: take --negatives rand-positive or not-paired.")
    if args.negatives != "generated" and all(row["c"] == store.rows[0]["c"] for row in store.rows):
        raise UserError(f"--negatives {args.negatives} needs other prompts, but {args.pairs} has only one prompt.")
    if needs_c_minus and store.rows[0]["c_minus"] is None:
        raise UserError(f"{args.pairs} holds pairs of images without c_minus, which Eq. 7 needs: take --objective "
                        "diffusion-dpo, dspo or sft, or --winner and --loser (Eq. 6).")
    return store


# ---- checkpoints


def trained_state(net):
    """What is trained, on the CPU: the adapter theta, or the whole network."""
    lora = hasattr(net, "peft_config")
    return {name: x.detach().cpu() for name, x in net.state_dict().items() if ".theta." in name or not lora}


def save_checkpoint(run, update):
    """Writes checkpoint-UPDATE.pt and removes this run's earlier ones, but for the last."""
    optimizer = {name: {key: x.cpu() for key, x in run.optimizer.state[p].items()}
                 for name, p in run.model.net.named_parameters() if p in run.optimizer.state}
    path = os.path.join(run.args.out, f"checkpoint-{update:06d}.pt")
    save_state(path, dict(identity=run.identity, update=update, net=trained_state(run.model.net), optimizer=optimizer,
                          scaler=run.scaler.state_dict()))
    earlier = [old for old in checkpoints(run.args.out) if old < path]
    ours = [old for old in earlier if (read_checkpoint(old) or {}).get("identity") == run.identity]
    for old in ours[1:]:
        os.remove(old)


def checkpoints(folder):
    """The checkpoints' paths, newest first. Whatever else lies beside them is left alone."""
    paths = glob.glob(os.path.join(glob.escape(folder), f"checkpoint-{'[0-9]' * 6}.pt"))
    return sorted(filter(os.path.isfile, paths), reverse=True)


def read_checkpoint(path):
    """What save_checkpoint wrote, its tensors mapped into memory; None if the file is something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        parts = [state] + [state.get(name) for name in ("identity", "net", "optimizer", "scaler")]
        whole = all(isinstance(part, dict) for part in parts) and path.endswith(f"{state['update']:06d}.pt")
        return state if whole else None
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError):
        return None


def load_checkpoint(run):
    """Continues from the newest checkpoint, if there is one. Returns the number of updates done. Raises UserError if
    the folder holds another run or something else, or if the processes do not all find the same."""
    out, paths = run.args.out, checkpoints(run.args.out)
    newest = os.path.basename(paths[0]) if paths else "no checkpoint"
    agree(dict(run.identity, out=f"{out} with {newest}"))
    if not paths:
        others = [name for name in sorted(os.listdir(out)) if not re.fullmatch(BEFORE_A_CHECKPOINT, name)]
        if others:
            raise UserError(f"{out} holds {others[0]} and no checkpoint: move that away, or give another --out.")
        return 0
    state, trained = read_checkpoint(paths[0]), dict(run.model.net.named_parameters())
    trained = {name: p for name, p in trained.items() if p.requires_grad}
    if state and (what := difference(state["identity"], run.identity)):
        raise UserError(f"the run in {out} was begun with {what}: continue it with the same flags, models and pairs, "
                        "or give another --out.")
    whole = state and trained.keys() <= state["net"].keys() & state["optimizer"].keys()
    if not whole or zipfile.ZipFile(paths[0]).testzip():  # it holds a checksum of each tensor
        raise UserError(f"{paths[0]} cannot be read as a checkpoint: delete it to go on from the one before.")
    if state["update"] > run.args.updates:
        raise UserError(f"the run in {out} has {state['update']} updates, more than --updates {run.args.updates}: give "
                        "more, or another --out.")
    for name, p in trained.items():  # one tensor after another, so that none is on the GPU twice
        p.data.copy_(state["net"][name])
        run.optimizer.state[p] = {key: x.to(p.device, copy=True) for key, x in state["optimizer"][name].items()}
    run.scaler.load_state_dict(state["scaler"])
    return state["update"]


def identity_of(args, precision, store, model, policies):
    """What must be the same when a run is continued: some flags, and checksums of its pairs and of the weights that it
    starts from."""
    files = {"pairs": [store.meta["table"], *store.meta["checksums"]]}
    for role in [role for role in ("winner", "loser") if role in policies]:
        files[f"weights of --{role}"] = [*map(checksum, policies[role].files)]
    if args.winner and files["weights of --winner"] == files["weights of --loser"]:
        raise UserError(f"--winner {args.winner} and --loser {args.loser} are the same policy: there is no preference.")
    sums = {name: text_checksum("".join(parts)) for name, parts in files.items()}
    sums["scheduler of --model"] = models.scheduler_checksum(model)
    sums["weights of --model"] = models.model_checksum(model)
    return {name: getattr(args, name) for name in FLAGS} | dict(precision=precision) | sums


def agree(mine):
    """Raises UserError if another process has another identity than the first: machines that see other files would add
    up gradients of different runs."""
    everyone = from_all((socket.gethostname(), mine))
    first_host, first = everyone[0]
    for rank, (host, its) in enumerate(everyone):
        if what := difference(its, first):
            raise UserError(f"process {rank} on {host} and process 0 on {first_host} do not see the same: {what}. "
                            "--out, --pairs and the models must be the same files for all.")


# ---- the log


def open_log(run, update, floor):
    """Cuts log.jsonl to the updates that are done, or begins it with a row of what rounding does. Returns TensorBoard's
    writer, or None without --tensorboard."""
    path, lines = os.path.join(run.args.out, "log.jsonl"), []
    first = dict(update=0, noise_floor=floor, precision=run.precision)
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n") and json.loads(line)["update"] <= update]
    except FileNotFoundError:
        pass
    except (ValueError, TypeError, LookupError, RecursionError):
        raise UserError(f"{path} is damaged or no log of train.py: delete it, and a new one is begun.") from None
    write_file(path, "".join(lines) if lines and update > 0 else json.dumps(first) + "\n")
    if run.args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # here, because few runs need it

        return SummaryWriter(os.path.join(run.args.out, "tensorboard"), purge_step=update + 1)


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


def add_row(folder, board, row):
    """Adds a row to the log and to TensorBoard."""
    with open(os.path.join(folder, "log.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if board:
        for name, values in row.items():
            named = {f"{name}/{i}": x for i, x in enumerate(values)} if isinstance(values, list) else {name: values}
            for tag, value in named.items():
                if value is not None:
                    board.add_scalar(tag, value, row["update"])
        board.flush()


# ---- the result


def export(run):
    """Writes the adapter, or the model's own files with the tuned network, in float32, in place of its own; and beside
    them the run's flags and a model card. Returns the folder."""
    args, model = run.args, run.model
    folder = os.path.join(args.out, "lora" if args.lora_rank else "pipeline")
    partial = folder + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    if args.lora_rank:
        weights = {name.replace(".theta.", "."): x.contiguous() for name, x in trained_state(model.net).items()}
        type(model.pipe).save_lora_weights(partial, **{model.net_name + "_lora_layers": weights})
    else:
        copy_parts(*models.find(args.model), model.net_name, partial)
        model.net.save_pretrained(os.path.join(partial, model.net_name))
    note = os.path.join(partial, "training.json")
    more = {key: models.full_name(getattr(args, key)) for key in ("model", "winner", "loser") if getattr(args, key)}
    more |= dict(precision=run.precision, preset=models.preset_of(args.model), prediction_type=model.prediction_type)
    write_file(note, json.dumps(vars(args) | more, indent=1) + "\n")
    if not os.path.exists(os.path.join(folder, "README.md")):  # which its user may have written
        write_file(os.path.join(partial, "README.md"), model_card(args, more["model"]))
    for path in glob.glob(os.path.join(glob.escape(partial), "**", "*.safetensors"), recursive=True):
        shutil.copymode(note, path)  # safetensors makes files that only their writer may read
    replace_folder(partial, folder)
    print(f"wrote {folder}")
    return folder


def model_card(args, base):
    """A page for the hub, with the fields that diffusers' training scripts give theirs."""
    flags = [[f"--{key.replace('_', '-')}"] + [str(value)] * (value is not True) for key, value in vars(args).items()
             if key != "out" and value is not None and value is not False]
    known = not os.path.isabs(base) and "/" in base
    return f"""---
library_name: diffusers
{f"base_model: {base.split('@')[0]}" if known else "# base_model: (the hub id of the model that was tuned)"}
# license: (that of the base model and of the prompts)
tags: [text-to-image, diffusers, ddspo{", lora" * bool(args.lora_rank)}]
---

{"A LoRA adapter of" if args.lora_rank else "A model tuned from"} {base}, made with the reference implementation of
[DDSPO](https://arxiv.org/abs/2512.23426):

    train.py {shlex.join(flag for pair in flags for flag in pair)}
"""


def finish(run):
    """Exports the result, draws the curves and says how to go on. Without its curves the result is still whole."""
    args, result = run.args, export(run)
    try:
        plots.draw_curves(os.path.join(args.out, "log.jsonl"))
    except (OSError, UserError) as error:
        print(f"curves.png was not drawn ({error}): the same command does it when this is solved.", file=sys.stderr)
    if args.objective == "sft":
        print("next, when both sides are trained:  torchrun train.py with both results as --winner and --loser")
    else:
        print(f"next:  python evaluate.py grid --models {shlex.join([args.model, result])} --prompts "
              "examples/prompts.txt")


# ---- what it says, and when it ends


def announce(run, update, floor):
    """Prints what a run will do, and what is worth a note."""
    args, pairs, row = run.args, len(run.store), find_row(run.args)
    parts = math.ceil(args.batch_size / run.world / args.micro_batch)
    strength = f"beta {args.beta:g}, " if args.beta else f"scale {args.scale:g}, " if args.scale else ""
    print(f"{args.objective} on {pairs} pairs, from update {update} of {args.updates} ({args.batch_size} pairs each, "
          f"{args.updates * args.batch_size / pairs:.3g} epochs); {run.world} process{'es' * (run.world > 1)} with "
          f"{parts} micro-batch{'es' * (parts > 1)} of up to {args.micro_batch}; {strength}lr {args.lr:g} after "
          f"{args.warmup} updates of warm-up; {run.precision}; defaults from "
          f"{' '.join(row) if row else 'no experiment of the paper'}")
    prompts = [text for row in run.store.rows for text in (row["c"], row["c_minus"]) if text is not None]
    too_long = models.count_too_long(run.model, prompts)
    if too_long:
        print(f"note: {too_long} of {len(prompts)} prompts exceed the text encoders' limit and are truncated",
              file=sys.stderr)
    if pairs < args.batch_size:
        advice = (" For few pairs, shapes.py's batch and updates and twice the paper's rate are a start (guess): "
                  "--batch-size 64 --updates 80 --lr 1e-05 --warmup 0") if args.batch_size > 64 else ""
        print(f"note: {pairs} pairs are fewer than a batch: an update sees each {args.batch_size / pairs:.3g} times, "
              f"with another t and noise each time.{advice}", file=sys.stderr)
    if floor is not None:
        print(f"rounding in {run.precision} lowers each logit by about {floor:.2g}")
        if floor > 0.05:
            print("note: that is more than 0.05 and hides small preferences: take fp16 in place of bf16, or "
                  "--precision fp32, or a smaller --beta", file=sys.stderr)


def oddities(columns, size):
    """What is strange about an update, a sentence each. `size` is the mean square of the reference's prediction."""
    if (columns["loss"] == 0).all():
        yield "note: every loss of an update is 0, so that nothing more is learned: take a smaller --beta or --lr"
    if (columns["loss"] > 10).all():
        yield "note: every loss of an update is above 10, and it began at 0.69: take a smaller --beta or --lr"
    if size and columns["drift"].mean() > size:
        yield ("note: the student is further from the reference than the reference's prediction is from 0: take a "
               "smaller --lr or fewer --updates")


def check_update(run, update, batch, columns, norm, floor):
    """Raises UserError, before anything of an update is kept, if a loss or the gradient is not finite, if the first
    logits are not 0, as they are where the student is the reference, or if the first gradient is 0."""
    bad = np.flatnonzero(~np.isfinite(columns["loss"]))
    if bad.size or not math.isfinite(norm) and (not run.scaler.is_enabled() or run.scaler.get_scale() < 1):
        what = "the gradient is not finite, though each loss is"
        if bad.size:
            what = f"the loss of the pairs {[run.store.rows[batch[i][1]]['id'] for i in bad[:10]]} is not finite"
        cure = ("take --precision fp32" if run.precision in HALF else "lower --lr" if update > 0 else
                "the model or the pairs must be damaged")
        raise UserError(f"update {update + 1}: {what}. Nothing of this update is kept: {cure}.")
    if update == 0 and "logit" in columns and not abs(columns["logit"].mean()) < 0.05 + 4 * floor:  # guess
        raise UserError("before the first update the student must be the reference and every logit 0, but their mean "
                        f"is {columns['logit'].mean():.3g}, where rounding explains {floor:.2g}: the two differ, in "
                        "weights or by dropout.")
    if update == 0 and norm == 0:
        raise UserError("the first gradient is 0, so that nothing would be learned: the weights of the network, or all "
                        "pairs, must be damaged.")
