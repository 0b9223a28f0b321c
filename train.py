"""Sec. 3.3 and 4.2 of DDSPO (arXiv 2512.23426): tuning a text-to-image model with Eq. 7, or with Eq. 4.

    torchrun train.py --model sd14                                   the paper's run on one GPU
    torchrun --nproc_per_node 8 train.py --model sd14                the same run on eight
    torchrun train.py --model sd14 --objective diffusion-dpo         the baseline, on the same pairs

Running the same command again continues a stopped run exactly where its newest checkpoint is. `--batch-size` is the
number of pairs per update and `--lr` the final learning rate, on any number of GPUs: how many pairs a GPU holds at once
(`--micro-batch`) changes the speed only. Which pairs an update sees, and with which t and noise, is a function of the
seed and of the pair's place in the run.

In --out: log.jsonl (a line an update), checkpoint-*.pt (the newest two), pipeline/ (the result, a diffusers folder).
"""

import argparse
import contextlib
import copy
import functools
import glob
import hashlib
import json
import math
import os
import shutil
import sys
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import models
from build_pairs import PairStore
from loss import ddspo_loss, diffusion_dpo_loss
from perturb import check_flags, locked, write_text

# The paper's experiments. beta and 100 updates are the paper's (its overview); batch size, learning rate (2.5e-9 a pair
# times 2048), warm-up and D-DPO's rows are from the authors' research scripts. The scripts contradict each other on the
# number of updates for SD-1.4: 500, evaluated from 100 on; 200 in the release. A model without a row takes sd14's.
PRESETS = {
    ("sd14", "ddspo"): dict(beta=16000, lr=5.12e-6, batch_size=2048, updates=100, warmup=100),
    ("sd15", "ddspo"): dict(beta=16000, lr=5.12e-6, batch_size=2048, updates=100, warmup=100),
    ("sd14", "diffusion-dpo"): dict(beta=8000, lr=1.024e-5, batch_size=2048, updates=100, warmup=100),
    ("sd15", "diffusion-dpo"): dict(beta=8000, lr=1.024e-5, batch_size=2048, updates=100, warmup=100),
    # ours, by `python shapes.py --grid`
    ("shapes", "ddspo"): dict(beta=1000, lr=3e-5, batch_size=64, updates=80, warmup=0, pairs="runs/shapes-0/pairs"),
    ("shapes", "diffusion-dpo"): dict(beta=200, lr=3e-5, batch_size=64, updates=80, warmup=0,
                                      pairs="runs/shapes-0/pairs"),
}
WEIGHT_DECAY = 1e-2  # AdamW (script)
MAX_GRAD_NORM = 1.0  # guess: the default of the diffusers examples
BANDS = 10  # of time steps, in the log
FREE_FLAGS = ("updates", "micro_batch", "save_every", "out", "pairs")  # a run may be continued with others of these

# ---- what update u sees: the run reads epoch after epoch, each a new order of all pairs


@functools.lru_cache(maxsize=2)
def order(n, seed, epoch):
    return np.random.default_rng([1, seed, epoch]).permutation(n)


def slots(n, seed, update, batch_size):
    """The (epoch, pair) of each place in an update's batch."""
    places = (divmod(p, n) for p in range(update * batch_size, (update + 1) * batch_size))
    return [(epoch, int(order(n, seed, epoch)[place])) for epoch, place in places]


def example(store, model, seed, epoch, pair, negatives="generated"):
    """What an update sees of a pair, (c, c_minus, x_0_w, x_0_l, t, eps), as a function of (seed, epoch, pair) alone.
    The winner and the loser share t and eps."""
    rng = np.random.default_rng([2, seed, epoch, pair])
    t, eps = model.sample_t(rng), torch.from_numpy(rng.standard_normal(model.latent_shape, dtype=np.float32))
    row, x_0_w, x_0_l = store[pair]
    c, c_minus = row["c"], row["c_minus"]
    if negatives != "generated":  # Table 3b: x_0_l is the winner of another prompt
        other = pair
        while store.rows[other]["c"] == c:
            other = int(rng.integers(len(store)))
        other_row, x_0_l, _ = store[other]
        c_minus = other_row["c"] if negatives == "rand-positive" else c_minus
    return c, c_minus, x_0_w, x_0_l, t, eps


# ---- the step


def step_loss(model, net, ref, x_0_w, x_0_l, c, c_minus, t, eps, objective, beta):
    """The loss of each of B pairs: latents and eps (B, 4, h, w), t (B,), c and c_minus encoded (B, 77, width) ->
    loss (B,) and a dict of (B,) tensors to log."""
    x_t_w, x_t_l = model.noise(x_0_w, t, eps), model.noise(x_0_l, t, eps)  # the same t and eps for both
    x_t, tt, cc = torch.cat([x_t_w, x_t_l]), torch.cat([t, t]), torch.cat([c, c])

    eps_theta = model.predict(net, x_t, tt, cc)
    with torch.no_grad():  # in the student's batch shape, so that at theta = ref the two agree to the last bit
        eps_ref = model.predict(ref, x_t, tt, cc)
    eps_theta_w, eps_theta_l = eps_theta.chunk(2)
    eps_ref_w, eps_ref_l = eps_ref.chunk(2)
    if objective == "ddspo":  # Eq. 7
        with torch.no_grad():
            eps_ref_l_minus = model.predict(ref, x_t_l, t, c_minus)
        loss, info = ddspo_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, eps_ref_l_minus, beta)
    else:  # Eq. 4
        loss, info = diffusion_dpo_loss(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, eps, eps, beta)
    with torch.no_grad():
        drift = (eps_theta.float() - eps_ref.float()).square().flatten(1).mean(1).view(2, -1).mean(0)
        accuracy = (info["logit"].sign() + 1) / 2  # a tie is half right
        return loss, dict(loss=loss.detach(), **info, accuracy=accuracy, drift=drift)


def check_start(logit):
    """At theta = ref every logit is 0 and the loss log 2 (Eq. 7). Stops where it is not so."""
    worst = logit.abs().max().item()
    if not worst < 0.05:
        sys.exit(f"before the first update the model must be the reference, and every logit 0, but one is {worst:.3g}. "
                 "Either the two differ (in weights, dropout, precision), or beta is too large for the precision.")


# ---- checkpoints


def save_checkpoint(args, net, optimizer, update):
    path = os.path.join(args.out, f"checkpoint-{update:06d}.pt")
    torch.save(dict(update=update, net=net.state_dict(), optimizer=optimizer.state_dict(), flags=vars(args)),
               path + ".partial")
    os.replace(path + ".partial", path)
    for old in sorted(glob.glob(os.path.join(args.out, "checkpoint-*.pt")))[:-2]:
        os.remove(old)


def load_checkpoint(args):
    """The newest readable checkpoint, or None. Stops if it was made with other flags."""
    for path in sorted(glob.glob(os.path.join(args.out, "checkpoint-*.pt")), reverse=True):
        try:
            with zipfile.ZipFile(path) as file:  # a torch checkpoint is a zip file, with a checksum for each tensor
                damaged = file.testzip()
        except zipfile.BadZipFile as error:
            damaged = error
        if damaged:
            print(f"{path} is damaged ({damaged}) and is passed over", file=sys.stderr)
            continue
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in vars(args).items():
            if name not in FREE_FLAGS and checkpoint["flags"][name] != value:
                sys.exit(f"the run in {args.out} was begun with {name} {checkpoint['flags'][name]}, not {value}: "
                         "continue it with the same flags and pairs, or give another --out.")
        if checkpoint["update"] > args.updates:
            sys.exit(f"the run in {args.out} has {checkpoint['update']} updates, more than --updates {args.updates}: "
                     "give more, or another --out.")
        return checkpoint
    if os.path.exists(os.path.join(args.out, "pipeline")):
        sys.exit(f"{args.out}/pipeline is a result without a checkpoint, and would be replaced. Give another --out.")
    return None


def export(args, model):
    """The tuned pipeline as a diffusers folder in one precision, float32, whole or not at all."""
    folder = os.path.join(args.out, "pipeline")
    shutil.rmtree(folder + ".partial", ignore_errors=True)
    model.pipe.save_pretrained(folder + ".partial")
    write_text(os.path.join(folder + ".partial", "training.json"), json.dumps(vars(args), indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)  # of fewer updates; the checkpoint can make it again
    os.replace(folder + ".partial", folder)


def finished(args):
    """Whether the export of this very run, after this many updates, is there."""
    path = os.path.join(args.out, "pipeline", "training.json")
    if not os.path.exists(path):
        return False
    with open(path) as file:
        flags = json.load(file)
    fixed = [name for name in vars(args) if name == "updates" or name not in FREE_FLAGS]
    return all(flags[name] == getattr(args, name) for name in fixed)


# ---- the loop


def main(argv=None):
    args = parse(argv)
    with models.processes() as (rank, world, device), contextlib.ExitStack() as stack:
        if args.batch_size < world:
            sys.exit(f"--batch-size {args.batch_size} is too small for {world} processes: use fewer of them.")
        store = open_store(args)
        args.store = hashlib.sha256("".join([store.meta["table"], *store.meta["checksums"]]).encode()).hexdigest()
        if finished(args):
            print(f"{args.out} is finished after {args.updates} updates; nothing was done") if rank == 0 else None
            return
        if rank == 0:
            stack.enter_context(locked(args.out))
        checkpoint = load_checkpoint(args)

        torch.set_float32_matmul_precision("high")  # tf32 on GPUs: it shifts logits by about 0.01 at beta = 16000
        model = models.load(args.model, device)
        ref = copy.deepcopy(model.net).requires_grad_(False)  # the frozen starting point
        net = model.net.requires_grad_(True)
        if list(model.latent_shape) != store.meta["latents"]:
            sys.exit(f"--pairs {args.pairs} holds latents {store.meta['latents']}, but {args.model} needs "
                     f"{list(model.latent_shape)}: make its pairs with build_pairs.py --model {args.model}.")
        parameters = list(net.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=WEIGHT_DECAY, fused=True)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        start = 0
        if checkpoint:
            net.load_state_dict(checkpoint["net"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            start = checkpoint["update"]
            del checkpoint
        log = open_log(args, start) if rank == 0 else None
        if rank == 0:
            micro_batches = math.ceil(args.batch_size / world / args.micro_batch)
            print(f"{args.objective} on {len(store)} pairs from update {start}: {args.batch_size} pairs an update; on "
                  f"each of {world} processes {micro_batches} micro-batches of up to {args.micro_batch}")

        bar = tqdm(range(start, args.updates), "train", initial=start, total=args.updates, disable=rank > 0)
        for update in bar:
            mine = slots(len(store), args.seed, update, args.batch_size)[rank::world]
            sums, not_finite = None, []
            optimizer.zero_grad(set_to_none=False)
            for m in range(0, len(mine), args.micro_batch):
                micro = mine[m:m + args.micro_batch]
                examples = [example(store, model, args.seed, epoch, pair, args.negatives) for epoch, pair in micro]
                c, c_minus, x_0_w, x_0_l, t, eps = zip(*examples)
                x_0_w, x_0_l, eps = (torch.stack(x).to(device) for x in (x_0_w, x_0_l, eps))
                t = torch.tensor(t, device=device)
                c = model.encode(c)
                c_minus = model.encode(c_minus) if args.objective == "ddspo" else None

                loss, info = step_loss(model, net, ref, x_0_w, x_0_l, c, c_minus, t, eps, args.objective, args.beta)
                if update == 0:
                    check_start(info["logit"])
                (loss.sum() / args.batch_size).backward()

                band = t * BANDS // model.num_train_timesteps
                values = torch.stack([*info.values(), torch.ones_like(loss)], 1)  # (B, metrics + 1)
                sums = torch.zeros(BANDS, values.shape[1], device=device) if sums is None else sums
                sums.index_add_(0, band, values)
                not_finite.append((micro, loss.detach().isfinite()))

            if world > 1:  # once an update, after the last micro-batch
                for tensor in (*[p.grad for p in parameters], sums):
                    dist.all_reduce(tensor)
            norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            sums = torch.cat([sums.flatten(), norm[None]]).tolist()  # the one time in an update to wait for the GPU
            sums, norm = np.reshape(sums[:-1], (BANDS, -1)), sums[-1]
            if not math.isfinite(sums.sum() + norm):
                stop_not_finite(args, store, update, not_finite)

            lr = args.lr * min(1, (update + 1) / max(args.warmup, 1))  # linear warm-up, then constant
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

            if rank == 0:
                row = log_row(update, lr, norm, list(info), sums)
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix({k: f"{row[k]:.3g}" for k in ("loss", "accuracy", "winner", "loser")})
                if (update + 1) % args.save_every == 0 or update + 1 == args.updates:
                    save_checkpoint(args, net, optimizer, update + 1)
        if rank == 0:
            log.close()
            export(args, model)
            print(f"wrote {os.path.join(args.out, 'pipeline')}")


def stop_not_finite(args, store, update, not_finite):
    """Names the pairs with a loss that is not finite, before anything of this update is kept."""
    bad = [store.rows[pair]["id"] for micro, finite in not_finite for (_, pair), ok in zip(micro, finite) if not ok]
    what = f"the loss of the pairs {bad[:10]}" if bad else "the gradient, or the loss of another process's pairs,"
    sys.exit(f"update {update + 1}: {what} is not finite. The newest checkpoint in {args.out} is from before this "
             "update. Lower --lr, or make the pairs without these prompts.")


def log_row(update, lr, norm, names, sums):
    """One line of the log: means over the update's pairs, and over those whose t lies in each of BANDS equal bands."""
    count = sums[:, -1]
    row = dict(update=update + 1, lr=lr, grad_norm=norm, pairs_by_t=count.astype(int).tolist())
    for i, name in enumerate(names):
        row[name] = sums[:, i].sum() / count.sum()
        row[name + "_by_t"] = [s / n if n else None for s, n in zip(sums[:, i], count)]
    return row


def open_log(args, start):
    """The log, with the lines of updates that the newest checkpoint does not know of taken out."""
    path = os.path.join(args.out, "log.jsonl")
    lines = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n") or json.loads(line)["update"] > start:
                    break
                lines.append(line)
    write_text(path, "".join(lines))
    return open(path, "a", encoding="utf-8")


def open_store(args):
    if not os.path.exists(os.path.join(args.pairs, "meta.json")):
        sys.exit(f"there is no pair store {args.pairs}: make it with\n"
                 f"    python perturb.py prompts.txt perturbed.jsonl\n"
                 f"    torchrun build_pairs.py --model {args.model} --prompts perturbed.jsonl --out {args.pairs}")
    store = PairStore(args.pairs)
    if store.meta["model"] not in (args.model, models.PRESETS.get(args.model)):
        print(f"note: the pairs in {args.pairs} were made by {store.meta['model']}, not {args.model}", file=sys.stderr)
    if args.negatives != "generated" and len({row["c"] for row in store.rows}) < 2:
        sys.exit(f"--negatives {args.negatives} takes x_0_l from another prompt, but {args.pairs} has only one prompt.")
    return store


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help=f"{', '.join(models.PRESETS)}, a hub id or a diffusers folder")
    parser.add_argument("--pairs", help="the pair store (default: pairs/MODEL)")
    parser.add_argument("--out", help="the run's folder (default: runs/MODEL-OBJECTIVE or -NEGATIVES)")
    parser.add_argument("--objective", choices=["ddspo", "diffusion-dpo"], default="ddspo", help="Eq. 7 or Eq. 4")
    parser.add_argument("--negatives", choices=["generated", "rand-positive", "not-paired"], default="generated",
                        help="Table 3b: x_0_l made from c_minus; or another prompt's winner, with that prompt as "
                             "c_minus, or with the pair's own c_minus")
    parser.add_argument("--beta", type=float, help="default: the preset's")
    parser.add_argument("--lr", type=float, help="final learning rate (default: the preset's)")
    parser.add_argument("--batch-size", type=int, help="pairs per update over all GPUs (default: the preset's)")
    parser.add_argument("--updates", type=int, help="default: the preset's")
    parser.add_argument("--warmup", type=int, help="updates of linear warm-up (default: the preset's)")
    parser.add_argument("--micro-batch", type=int, default=1, help="pairs on a GPU at once (1 fits SD-1.x in 24 GB)")
    parser.add_argument("--save-every", type=int, default=10, help="updates between checkpoints (guess)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.objective != "ddspo" and args.negatives != "generated":
        sys.exit(f"--negatives {args.negatives} is a variant of DDSPO: --objective {args.objective} has no c_minus.")
    args.model = os.path.normpath(args.model)
    name = os.path.basename(args.model)
    variant = args.objective if args.negatives == "generated" else args.negatives
    args.out = args.out or os.path.join("runs", f"{name}-{variant}")
    for key, value in PRESETS.get((args.model, args.objective), PRESETS["sd14", args.objective]).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.pairs = args.pairs or os.path.join("pairs", name)
    check_flags(args, above_0=("beta", "lr"), batch_size=1, updates=1, warmup=0, micro_batch=1, save_every=1, seed=0)
    return args


if __name__ == "__main__":
    main()
