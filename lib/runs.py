"""What a run of train.py asks of its pairs, says, and keeps in its folder:

    checkpoint-000040.pt     what is trained after 40 updates, with the optimizer's state; the newest two are kept
    log.jsonl                a line an update; curves.png is its picture, tensorboard/ a copy
    preview-000040.png       the student beside the reference, with --preview
    pipeline/ or lora/       the result: a diffusers folder, or an adapter for load_lora_weights
"""

import json
import math
import os
import pathlib
import shlex
import shutil
import zipfile

import numpy as np
import psutil
import torch
from huggingface_hub import ModelCardData

from lib import files, models, plots
from lib.files import UserError, checksum, difference, text_checksum
from lib.pairs import PairStore
from lib.parts import copy_parts
from lib.processes import from_all
from lib.settings import find_row

BANDS = 10  # of time steps, in the log
FLAGS = ("objective", "side", "negatives", "lora_rank", "beta", "scale", "lr", "warmup", "batch_size", "seed")

# ---- before it begins


def check_out(out):
    """Raises UserError if a run's folder is, or lies in, a model or a pair store, or has no place for the result."""
    where = pathlib.Path(out).resolve()
    for folder in (where, *where.parents):
        names = {path.name for path in folder.glob("*.json*")}
        if "model_index.json" in names or {"meta.json", "pairs.jsonl"} <= names:
            raise UserError(f"--out {out}: {folder} is a model or a pair store: give a folder outside it.")
    for result in (where / "pipeline", where / "lora"):
        if result.exists() and not (result.is_dir() and checkpoints(where)):
            raise UserError(f"{result} is a file, or lies beside no checkpoint: move it away, or change --out.")


def open_store(args, needs_c_minus):
    """The pair store. Raises UserError if there is none, or if its pairs do not go with the objective."""
    if not os.path.exists(os.path.join(args.pairs, "meta.json")):
        raise UserError(f"there is no pair store {args.pairs}: make it by perturb.py, and then torchrun build_pairs.py "
                        f"--model {args.model} --prompts perturbed.jsonl --out {args.pairs}")
    store = PairStore(args.pairs)
    if args.negatives == "generated" and store.meta["negatives"] == "none":
        raise UserError(f"{args.pairs} holds winners only: take Eq. 7 with --negatives rand-positive or not-paired.")
    if args.negatives != "generated" and all(row["c"] == store.rows[0]["c"] for row in store.rows):
        raise UserError(f"--negatives {args.negatives} needs other prompts, but {args.pairs} has only one prompt.")
    if needs_c_minus and store.rows[0]["c_minus"] is None:
        raise UserError(f"{args.pairs} has no c_minus, which Eq. 7 needs: take Eq. 6, or another --objective.")
    return store


def identity_of(args, precision, store, model, policies):
    """What must be the same when a run is continued: flags, and checksums of its pairs and of the weights it needs."""
    weights = {f"weights of --{role}": text_checksum("".join(map(checksum, policies[role].files)))
               for role in ("winner", "loser") if role in policies}
    if args.winner and weights["weights of --winner"] == weights["weights of --loser"]:
        raise UserError(f"--winner {args.winner} and --loser {args.loser} are the same policy: there is no preference.")
    flags = {name: getattr(args, name) for name in FLAGS} | dict(precision=precision)
    pairs = text_checksum("".join([store.meta["table"], *store.meta["checksums"]]))
    return flags | dict(pairs=pairs) | weights | {"scheduler of --model": models.scheduler_checksum(model),
                                                  "weights of --model": models.model_checksum(model)}


def announce(run, update):
    """Says what a run will do, and what is worth a note."""
    args, pairs = run.args, len(run.store)
    flags = ", ".join(f"{name} {getattr(args, name)}" for name in FLAGS if getattr(args, name) is not None)
    parts = math.ceil(args.batch_size / run.world / args.micro_batch)
    print(f"from update {update} of {args.updates} on {pairs} pairs: {flags}, {run.precision}; {run.world} x {parts} "
          f"micro-batches of up to {args.micro_batch}; defaults from {' '.join(find_row(args) or ['no experiment'])}")
    prompts = [text for row in run.store.rows for text in (row["c"], row["c_minus"]) if text is not None]
    if too_long := models.count_too_long(run.model, prompts):
        run.note(f"{too_long} of {len(prompts)} prompts exceed the text encoders' limit and are truncated")
    if pairs < args.batch_size:
        run.note(f"{pairs} pairs are fewer than a batch: an update sees each {args.batch_size / pairs:.3g} times")
    if run.floor and run.floor > 0.05:
        run.note(f"rounding in {run.precision} lowers each logit by {run.floor:.2g}: take fp32 or a lower --beta")


# ---- checkpoints


def trained_state(net):
    """What is trained, on the CPU: the adapter theta, or the whole network."""
    lora = hasattr(net, "peft_config")
    return {name: x.detach().cpu() for name, x in net.state_dict().items() if ".theta." in name or not lora}


def save_checkpoint(run, update):
    """Writes checkpoint-UPDATE.pt and removes all of this run's but the newest two."""
    optimizer = {name: {key: x.cpu() for key, x in run.optimizer.state[p].items()}
                 for name, p in run.model.net.named_parameters() if p in run.optimizer.state}
    state = dict(identity=run.identity, update=update, net=trained_state(run.model.net), optimizer=optimizer,
                 scaler=run.scaler.state_dict())
    files.write_file(f"{run.args.out}/checkpoint-{update:06d}.pt", lambda partial: torch.save(state, partial))
    ours = [old for old in checkpoints(run.args.out) if read_checkpoint(old).get("identity") == run.identity]
    for old in ours[2:]:
        os.remove(old)


def checkpoints(folder):
    """The paths of the files that have a checkpoint's name, newest first."""
    paths = [path for path in pathlib.Path(folder).glob(f"checkpoint-{'[0-9]' * 6}.pt") if path.is_file()]
    return sorted(map(str, paths), reverse=True)


def read_checkpoint(path):
    """What save_checkpoint wrote, its tensors mapped into memory; an empty dict if the file is something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state if isinstance(state.get("identity"), dict) and path.endswith(f"{state['update']:06d}.pt") else {}
    except files.DAMAGED:
        return {}


def load_checkpoint(run):
    """Continues from the newest checkpoint, if there is one. Returns the number of updates done. Raises UserError if
    the folder holds another run or something else, or if the processes do not all find the same."""
    out, paths = run.args.out, checkpoints(run.args.out)
    newest = os.path.basename(paths[0]) if paths else "no checkpoint"
    everyone = from_all(dict(run.identity, out=f"{out} with {newest}"))
    for rank, its in enumerate(everyone):  # else machines with different files would add up their gradients
        if what := difference(its, everyone[0]):
            raise UserError(f"processes {rank} and 0 do not see the same: {what}. Give all of them the same files.")
    if not paths:
        files.stop_if_foreign(os.path.join(out, "log.jsonl"))
        return 0
    state = read_checkpoint(paths[0])
    if state and (what := difference(state["identity"], run.identity)):
        raise UserError(f"the run in {out} was begun with {what}: continue it with the same, or give another --out.")
    trained = {name: p for name, p in run.model.net.named_parameters() if p.requires_grad}
    whole = state and trained.keys() <= state["net"].keys() & state["optimizer"].keys()
    if not whole or zipfile.ZipFile(paths[0]).testzip():  # the file holds a checksum of each tensor
        raise UserError(f"{paths[0]} cannot be read as a checkpoint: delete it to go on from the one before.")
    if state["update"] > run.args.updates:
        raise UserError(f"{out} has {state['update']} updates, more than --updates: give more, or another --out.")
    for name, p in trained.items():  # one tensor after another, so that none is on the GPU twice
        p.data.copy_(state["net"][name])
        run.optimizer.state[p] = {key: x.to(p.device, copy=True) for key, x in state["optimizer"][name].items()}
    run.scaler.load_state_dict(state["scaler"])
    return state["update"]


# ---- the log


def open_log(run, update):
    """Cuts log.jsonl to the updates that are done, or begins it. Returns TensorBoard's writer, or None without one."""
    path, rows = os.path.join(run.args.out, "log.jsonl"), []
    if os.path.exists(path):
        with files.reading(path, "delete it, and a new one is begun."), open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.endswith("\n")]  # a killed run leaves half a line
            if not all(isinstance(row.get("loss", 0.0), float) for row in rows):
                raise ValueError("a loss is no number")
            rows = [row for row in rows if row["update"] <= update]
    first = dict(update=0, noise_floor=run.floor, precision=run.precision)  # floor: what rounding takes off a logit
    files.write_file(path, files.to_lines(rows if rows and update else [first]))
    if run.args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # here, because few runs need it
        return SummaryWriter(os.path.join(run.args.out, "tensorboard"), purge_step=update + 1)


def add_row(run, board, update, columns, **more):
    """Adds a line to the log and to TensorBoard, and returns it: means over the update's pairs, and over those whose t
    lies in each of BANDS equal bands. `columns` is {name: (batch_size,)}, t among them."""
    band = (columns["t"] * BANDS // run.model.num_train_timesteps).astype(int)
    count = np.bincount(band, minlength=BANDS)
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    row = dict(update=update, **more, memory_gb=used / 1e9, pairs_by_t=count.tolist())
    if "logit" in columns:
        row["logit_quantiles"] = np.quantile(columns["logit"], [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
    for name in [name for name in columns if name != "t"]:
        sums = np.bincount(band, columns[name], BANDS)
        row |= {name: sums.sum() / count.sum(), name + "_by_t": [s / n if n else None for s, n in zip(sums, count)]}
    with open(os.path.join(run.args.out, "log.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    for name, values in row.items() if board else ():
        for k, value in enumerate(values if isinstance(values, list) else [values]):
            if value is not None:
                board.add_scalar(f"{name}/{k}" if isinstance(values, list) else name, value, update)
        board.flush()
    return row


def check_update(run, update, batch, columns, norm):
    """Raises UserError, before an update is kept, if it is not finite or begins wrongly. Says what is worth a note."""
    bad = [run.store.rows[batch[i][1]]["id"] for i in np.flatnonzero(~np.isfinite(columns["loss"]))]
    if bad or not math.isfinite(norm) and (not run.scaler.is_enabled() or run.scaler.get_scale() < 1):
        what = f"the loss of the pairs {bad[:10]}" if bad else "the gradient, though no loss,"
        raise UserError(f"update {update + 1}: {what} is not finite. Take --precision fp32, or lower --lr.")
    if update == 0 and "logit" in columns and not abs(columns["logit"].mean()) < 0.05 + 4 * run.floor:  # guess
        raise UserError("before the first update the student must be the reference and the mean logit 0, but it is "
                        f"{columns['logit'].mean():.3g}, of which rounding explains {run.floor:.2g}.")
    if update == 0 and norm == 0:
        raise UserError("the first gradient is 0, so that nothing would be learned: weights or pairs are damaged.")
    if (columns["loss"] == 0).all() or (columns["loss"] > 10).all():
        run.note("every loss of an update is 0, or every one is above 10: take a smaller --beta or --lr")
    if run.size and columns["drift"].mean() > run.size:
        run.note("the student is further from the reference than its prediction is from 0: take a smaller --lr")


# ---- the result


def finish(run):
    """Writes the adapter or the tuned model, in float32, with the run's flags and a model card. Draws the curves."""
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
    files.write_file(note, json.dumps(vars(args) | more, indent=1) + "\n")
    if not os.path.exists(os.path.join(folder, "README.md")):  # which its user may have written
        files.write_file(os.path.join(partial, "README.md"), model_card(args, more["model"]))
    for path in pathlib.Path(partial).rglob("*.safetensors"):
        shutil.copymode(note, path)  # safetensors makes files that only their writer may read
    if os.path.exists(folder):  # file by file, since its user may have put others there
        shutil.copytree(partial, folder, copy_function=os.replace, dirs_exist_ok=True)
        shutil.rmtree(partial)
    else:
        os.replace(partial, folder)
    print(f"wrote {folder}\nnext:  python evaluate.py grid --models {shlex.join([args.model, folder])} --prompts "
          "examples/prompts.txt")
    plots.draw_curves(os.path.join(args.out, "log.jsonl"))


def model_card(args, base):
    """A page for the hub, with the fields that the pages of diffusers' training scripts have."""
    flags = [["--" + name.replace("_", "-")] + [str(value)] * (value is not True)
             for name, value in vars(args).items() if value is not None and value is not False]
    command = shlex.join(sum(flags, []))
    tags = ["text-to-image", "diffusers", "ddspo"] + ["lora"] * bool(args.lora_rank)
    of_the_hub = base.split("@")[0] if "/" in base and not os.path.isabs(base) else None
    head = ModelCardData(library_name="diffusers", base_model=of_the_hub, tags=tags).to_yaml()
    return (f"---\n{head}\n# license: (that of the base model and of the prompts)\n---\n\nTuned from {base} with the "
            f"reference implementation of https://arxiv.org/abs/2512.23426:\n\n    train.py {command}\n")
