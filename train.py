"""Sec. 3.2, 3.3 and 4 of DDSPO (arXiv 2512.23426): tuning a text-to-image model with Eq. 7, Eq. 6 or a baseline.

    torchrun train.py --model sd14                                   the paper's run on one GPU
    torchrun --nproc_per_node 8 train.py --model sd14                the same run on eight
    torchrun train.py --model sd14 --objective diffusion-dpo         the baseline, on the same pairs
    torchrun train.py --model sd14 --winner runs/w/lora --loser runs/l/lora     Eq. 6, with two trained policies

The same command continues a stopped run from its newest checkpoint: on one CPU thread to the same bits. --batch-size is
the number of pairs per update and --lr the final learning rate, on any number of GPUs. --micro-batch, the pairs that a
GPU holds at once, changes memory and speed, and the result by rounding. lib/runs.py says what a run keeps in --out.
"""

import argparse
import copy
import functools
import math
import os
import sys
import time
import types

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it: a thread that waits must sleep and not spin

import numpy as np
import torch
import torch._functorch.config
from tqdm import tqdm

from lib import adapters, models, plots, runs
from lib.files import UserError
from lib.pairs import misfit
from lib.processes import add_up, at_least, processes, program
from lib.settings import HALF, with_defaults
from loss import dspo_loss, preference_loss

WEIGHT_DECAY = 1e-2  # of AdamW (the authors' released scripts)
MAX_GRAD_NORM = 1.0  # guess: the default of the diffusers examples
FIRST_SCALE, GROW_AFTER = 2.0**5, 100  # guess: fp16's loss scale, and after how many good updates it is doubled
SHOWN = ("update", "loss", "accuracy", "winner", "loser")  # of the log, beside the bar
TEXT_BATCH = 32  # guess: pairs whose prompts the text encoders read at once
GOES_WITH = dict(beta=["ddspo", "diffusion-dpo", "dspo"], scale=["distill"], side=["sft"], winner=["ddspo", "dspo"],
                 loser=["ddspo", "dspo"])  # flags that only some objectives take

# ---- what an update sees, a function of the seed and of the place in the run: epoch after epoch, each in a new order


def slots(n, seed, update, batch_size):
    """The (epoch, pair) of each place in an update's batch."""
    places = [divmod(p, n) for p in range(update * batch_size, (update + 1) * batch_size)]
    first, last = places[0][0], places[-1][0]
    orders = {epoch: np.random.default_rng([1, seed, epoch]).permutation(n) for epoch in range(first, last + 1)}
    return [(epoch, int(orders[epoch][place])) for epoch, place in places]


def example(store, model, seed, epoch, pair, negatives="generated"):
    """What an update sees of a pair: (c, c_minus, x_0_w, x_0_l, t, eps), a function of (seed, epoch, pair) alone."""
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


def micro_batches(store, model, args, some, device):
    """Yields the examples of some slots, --micro-batch at a time: c and c_minus encoded (c_minus None where the loss
    does not need it), then x_0_w, x_0_l (B, channels, h, w), t (B,) and eps (B, channels, h, w). The text encoders read
    the prompts of several micro-batches in one pass, because a GPU waits for each pass."""
    size, both = args.micro_batch, needs_c_minus(args)
    together = size * max(1, TEXT_BATCH // size)
    for start in range(0, len(some), together):
        examples = [example(store, model, args.seed, *slot, args.negatives) for slot in some[start:start + together]]
        c, c_minus, x_0_w, x_0_l, t, eps = zip(*examples)
        tensors = [torch.stack(x_0_w), torch.stack(x_0_l), torch.tensor(t), torch.stack(eps)]
        if device.type == "cuda":  # so that the copies do not wait for the GPU's work
            tensors = [x.pin_memory() for x in tensors]
        tensors = [x.to(device, non_blocking=True) for x in tensors]
        encoded = model.encode(c + c_minus if both else c)  # {name: (2B or B, ...)}
        for k in range(0, len(t), size):
            rows = slice(k, min(k + size, len(t)))
            minus_rows = slice(len(t) + rows.start, len(t) + rows.stop)
            yield ({name: x[rows] for name, x in encoded.items()},
                   {name: x[minus_rows] for name, x in encoded.items()} if both else None, *[x[rows] for x in tensors])


# ---- the step


def needs_c_minus(args):
    """Whether the loss asks for c_minus, as that of Eq. 7 does."""
    return args.objective in ("ddspo", "distill") and not args.winner


def step_loss(model, policies, c, c_minus, x_0_w, x_0_l, t, eps, objective, beta, side=None, scale=None):
    """The loss of each of B pairs: latents and eps (B, channels, h, w), t (B,), c and c_minus encoded -> loss (B,) and
    a dict of (B,) tensors to log. `policies` are networks, or functions like them: theta, ref, and for Eq. 6 winner and
    loser."""
    if objective == "sft":  # the diffusion loss on one side of the pairs, which makes Eq. 6's policies
        x_0 = x_0_w if side == "w" else x_0_l
        eps_theta = model.predict(policies["theta"], model.noise(x_0, t, eps), t, c).float()
        loss = (eps_theta - model.target(x_0, t, eps)).square().flatten(1).mean(1)
        return loss, dict(loss=loss.detach())

    frozen = torch.no_grad()(model.predict)
    x_t_w, x_t_l = model.noise(x_0_w, t, eps), model.noise(x_0_l, t, eps)  # (B, ...), the same t and eps for both
    both = torch.cat([x_t_w, x_t_l]), torch.cat([t, t]), {name: torch.cat([x, x]) for name, x in c.items()}
    eps_theta = model.predict(policies["theta"], *both)  # (2B, ...)
    eps_ref = frozen(policies["ref"], *both)  # in the student's batch shape: at theta = ref the same to the last bit
    if objective == "distill":  # no preference, but a control: guidance away from c_minus, learned at the same states
        eps_ref_minus = frozen(policies["ref"], *both[:2], {name: torch.cat([x, x]) for name, x in c_minus.items()})
        target = eps_ref_minus.float() + scale * (eps_ref.float() - eps_ref_minus.float())
        loss = (eps_theta.float() - target).square().flatten(1).mean(1).view(2, -1).mean(0)
        return loss, dict(loss=loss.detach())

    eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l = *eps_theta.chunk(2), *eps_ref.chunk(2)  # (B, ...)
    if "winner" in policies:  # Eq. 6: two trained policies
        target_w, target_l = frozen(policies["winner"], x_t_w, t, c), frozen(policies["loser"], x_t_l, t, c)
    elif objective == "ddspo":  # Eq. 7: the reference, given c and given c_minus (this is ddspo_loss of loss.py)
        target_w, target_l = eps_ref_w, frozen(policies["ref"], x_t_l, t, c_minus)
    else:  # Eq. 4: the noise
        target_w, target_l = model.target(x_0_w, t, eps), model.target(x_0_l, t, eps)
    loss_of = dspo_loss if objective == "dspo" else preference_loss
    loss, info = loss_of(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, target_w, target_l, beta * model.weight(t))
    with torch.no_grad():
        drift = (eps_theta.float() - eps_ref.float()).square().flatten(1).mean(1).view(2, -1).mean(0)
        accuracy = (info["logit"].sign() + 1) / 2  # a tie is half right
        return loss, dict(loss=loss.detach(), **info, accuracy=accuracy, drift=drift)


def gradient(run, update, batch, bar):
    """Leaves the mean gradient over an update's pairs in the parameters, clipped to MAX_GRAD_NORM. Returns what is
    logged of each pair, {name: (batch_size,)}, and the gradient's norm before it was clipped."""
    args, mine, rows = run.args, slice(run.rank, None, run.world), []
    run.optimizer.zero_grad()
    for part in micro_batches(run.store, run.model, args, batch[mine], run.device):
        with precision(run.device, run.precision):
            loss, info = step_loss(run.model, run.policies, *part, args.objective, args.beta, args.side, args.scale)
        run.scaler.scale(loss.sum() / args.micro_batch).backward()  # a mean: --micro-batch changes no overflow
        rows.append(torch.stack([*info.values(), part[4]], 1))  # (B, columns)
        bar.update(min(run.world * len(loss), (update + 1) * args.batch_size - bar.n))
    record = torch.zeros(args.batch_size, len(info) + 1, device=run.device)
    record[mine] = torch.cat(rows)
    add_up([record, *[p.grad for p in run.parameters]])  # over the processes
    run.scaler.unscale_(run.optimizer)
    for p in run.parameters:
        p.grad /= args.batch_size / args.micro_batch
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, MAX_GRAD_NORM).item()  # waits for the GPU
    return dict(zip([*info, "t"], record.cpu().numpy().T)), norm


# ---- the loop


@program
def main(argv=None):
    args = parse(argv)
    with processes(args.out, hours=0.5) as (rank, world, device):  # guess
        run = set_up(args, rank, world, device)
        update = runs.load_checkpoint(run)
        run.floor, run.size = noise_floor(run) if args.beta else (None, None)
        prepare(run)
        if rank == 0:
            runs.announce(run, update)
            board = runs.open_log(run, update)
        bar = tqdm(desc="train", unit=" pairs", initial=update * args.batch_size, total=args.updates * args.batch_size,
                   disable=rank > 0)
        while update < args.updates:
            began = time.perf_counter()
            batch = slots(len(run.store), args.seed, update, args.batch_size)
            columns, norm = gradient(run, update, batch, bar)
            runs.check_update(run, update, batch, columns, norm)
            if not math.isfinite(norm):  # fp16 overflowed: the same update is done again with half the loss scale
                run.scaler.update()
                run.note(f"update {update + 1} overflowed and is done again with loss scale {run.scaler.get_scale():g}")
                continue
            lr = run.optimizer.param_groups[0]["lr"] = args.lr * min(1, (update + 1) / max(args.warmup, 1))  # warm-up
            run.scaler.step(run.optimizer)
            run.scaler.update()
            update += 1

            if rank == 0:
                speed = args.batch_size / (time.perf_counter() - began)
                row = runs.add_row(run, board, update, columns, lr=lr, grad_norm=norm, pairs_per_second=speed,
                                   loss_scale=run.scaler.get_scale())
                bar.set_postfix({name: f"{row[name]:.4g}" for name in SHOWN if name in row})
                if update % args.save_every == 0 or update == args.updates:
                    runs.save_checkpoint(run, update)
                if args.preview and update % args.preview == 0:  # not before: it may need more memory than there is
                    preview(run, update)
        bar.close()
        if rank == 0:
            runs.finish(run)


def set_up(args, rank, world, device):
    """What a run consists of, under one name."""
    store, gpu = runs.open_store(args, needs_c_minus(args)), device.type == "cuda"
    frozen_dtype = HALF.get(args.precision or "fp16", torch.float32) if gpu else torch.float32
    model = models.load(args.model, device, frozen_dtype, torch.float32)
    if problem := misfit(store.meta, model):
        raise UserError(f"--pairs {args.pairs}: {problem}")
    name = args.precision or ("fp32" if not gpu else "bf16" if model.stored == "BF16" else "fp16")
    policies, networks = make_policies(args, model)
    parameters = [p for p in model.net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    scaler = torch.amp.GradScaler(device.type, FIRST_SCALE, growth_interval=GROW_AFTER, enabled=name == "fp16")
    note = functools.cache(lambda text: tqdm.write("note: " + text, file=sys.stderr) if rank == 0 else None)
    return types.SimpleNamespace(
        args=args, rank=rank, world=world, device=device, store=store, model=model, policies=policies,
        networks=networks, precision=name, parameters=parameters, optimizer=optimizer, scaler=scaler, note=note,
        identity=runs.identity_of(args, name, store, model, policies))


# ---- policies


def make_policies(args, model):
    """Returns theta, ref and, for Eq. 6, winner and loser, and the networks among them: with LoRA there is only one."""
    net = model.net
    if args.lora_rank:
        torch.manual_seed(args.seed)  # of the adapter's first weights
        adapters.add_lora(net, args.lora_rank)
        policies, base = dict(theta=net, ref=adapters.with_adapter(net)), net
    else:
        base = copy.deepcopy(net).requires_grad_(False) if args.objective != "sft" or args.preview else None
        policies = dict(theta=net.requires_grad_(True), ref=base)
    for role, path in dict(winner=args.winner, loser=args.loser).items():
        if path:
            policies[role] = adapters.load_policy(path, role, base, model)
    return policies, [policy for policy in policies.values() if isinstance(policy, torch.nn.Module)]


def prepare(run):
    """Readies the networks for the loop, once noise_floor has used their exact weights. For half precision it rounds
    the frozen weights of matrix products once, which autocast would round at each use."""
    if run.args.checkpointing:
        run.model.net.enable_gradient_checkpointing()
    for network in run.networks:
        for module in network.modules():
            if run.precision in HALF and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                for p in module.parameters(recurse=False):
                    p.data = p.data if p.requires_grad else p.data.to(HALF[run.precision])
        if run.args.compile:  # the backward is traced too, and SANA's would be cast to fp16 and overflow there
            torch._functorch.config.backward_pass_autocast = "off"
            network.compile()
        if not run.args.lora_rank:
            network.requires_grad_(True)  # torch chooses mm or bmm by this: the reference must run the student's


# ---- precision


def precision(device, name):
    """A context in which networks run in a precision: half by autocast, with norms and trained weights in float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # sums in float32
    return torch.autocast(device.type, HALF.get(name), enabled=name in HALF)


@torch.no_grad()
def noise_floor(run):
    """How much rounding alone lowers a logit of Eq. 7, and the mean square of the reference's prediction. An error e of
    eps_theta - eps_ref adds -beta/2 mean(e^2) to the logit; this takes mean(e^2) as twice that of one network."""
    args, model, some = run.args, run.model, slots(len(run.store), run.args.seed, 0, run.args.micro_batch)
    c, _, x_0_w, _, t, eps = next(micro_batches(run.store, model, args, some, run.device))
    x_t = model.noise(x_0_w, t, eps)
    with precision(run.device, "fp32"):
        exact = model.predict(run.policies["ref"], x_t, t, c).float()
    with precision(run.device, run.precision):
        e = model.predict(run.policies["ref"], x_t, t, c).float() - exact
    return args.beta * (model.weight(t) * e.square().flatten(1).mean(1)).mean().item(), exact.square().mean().item()


def preview(run, update):
    """Draws the first four prompts with the reference and with the student as it is now, from the same x_T."""
    args, model, columns = run.args, run.model, []
    prompts = [row["c"] for row in run.store.rows[:4]]
    x_T = torch.stack([models.initial_noise(args.seed + i, model.latent_shape) for i in range(len(prompts))])
    for name, title in (("ref", "reference"), ("theta", "student")):
        if args.lora_rank:
            model.net.set_adapter(["theta"] if name == "theta" else [])
        else:
            setattr(model.pipe, model.net_name, run.policies[name])
        with precision(run.device, "bf16" if run.precision == "fp16" else run.precision):  # T5 overflows in float16
            x_0 = models.sample(model, prompts, x_T, model.steps, model.guidance)
        columns.append((title, [models.decode(model, x[None])[0] for x in x_0]))  # in float32: half overflows in SDXL
    plots.draw_grid(prompts, columns, os.path.join(args.out, f"preview-{update:06d}.png"))


# ---- checks and flags


def check(args):
    """Raises UserError if flags do not go together, if a run would come to nothing, or if this machine cannot do it."""
    for name, objectives in GOES_WITH.items():
        if getattr(args, name) is not None and args.objective not in objectives:
            raise UserError(f"--{name} goes with --objective {' or '.join(objectives)}, not with {args.objective}.")
    needed = [name for name in ("beta", "scale", "side") if args.objective in GOES_WITH[name]] + ["lr"]
    if missing := [f"--{name}" for name in needed if getattr(args, name) is None]:
        raise UserError(f"give {' and '.join(missing)}, which no experiment of {args.model} with these flags has.")
    if (args.winner is None) != (args.loser is None):
        raise UserError("--winner and --loser go together: Eq. 6 needs both.")
    if args.negatives != "generated" and not needs_c_minus(args):
        raise UserError(f"--negatives {args.negatives} is a variant of Eq. 7: take --objective ddspo and no --winner.")
    if os.path.exists(os.path.join(args.model, models.LORA)):
        raise UserError(f"--model {args.model} is an adapter: give a whole model to be tuned.")
    exports = os.path.exists(os.path.join(args.out, f"checkpoint-{args.updates:06d}.pt"))  # then it trains no more
    if args.warmup > args.updates and not exports:
        raise UserError(f"--warmup {args.warmup} is longer than the run of {args.updates} updates: give at most those.")
    if not torch.cuda.is_available() and (args.precision == "tf32" or args.compile):  # torch 2.13 loses a gradient
        raise UserError("--precision tf32 and --compile are for GPUs: on a CPU take fp32 and no --compile.")
    if args.batch_size < int(os.environ.get("WORLD_SIZE", 1)):
        raise UserError(f"--batch-size {args.batch_size} is less than a pair a process: start fewer processes.")
    runs.check_out(args.out)


def parse(argv):
    """The flags, with those that are not given filled in from EXPERIMENTS. Raises what `check` raises."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="DDSPO or a baseline; memory: docs/speed.md.")
    add = parser.add_argument
    add("--model", required=True, type=lambda path: path.rstrip("/"),
        help=f"{', '.join(models.PRESETS)}, a hub id or a diffusers folder; NAME@fp16 takes the files of a variant")
    add("--task", choices=["alignment", "aesthetic"], default="alignment", help="Table 1 or 2: its defaults and pairs")
    add("--pairs", help="the pair store (default: pairs/MODEL, for Table 2 pairs/MODEL-aesthetic)")
    add("--out", help="the run's folder (default: runs/ and model, task and method)")
    add("--objective", choices=["ddspo", "diffusion-dpo", "dspo", "sft", "distill"], default="ddspo",
        help="Eq. 7 (or 6, see --winner), Eq. 4, DSPO, the diffusion loss on one side, or guidance away from c_minus")
    add("--side", choices=["w", "l"], help="of --objective sft: train on x_0_w or on x_0_l")
    add("--winner", help="Eq. 6: the winning policy, a lora/ or pipeline/ folder (of --objective sft)")
    add("--loser", help="Eq. 6: the losing policy")
    add("--negatives", choices=["generated", "rand-positive", "not-paired"], default="generated",
        help="Table 3b: x_0_l made from c_minus; or another prompt's winner, with that prompt or c_minus as c_minus")
    add("--beta", type=at_least(1e-6, float, 1e6), help="this and the next five: see EXPERIMENTS in lib/settings.py")
    add("--scale", type=at_least(1, float, 100), help="of --objective distill: the guidance scale")
    add("--lr", type=at_least(1e-12, float, 0.1), help="final learning rate")  # the bounds are guesses, as beta's are
    add("--updates", type=at_least(1))
    add("--warmup", type=at_least(0), help="updates of linear warm-up")
    add("--batch-size", type=at_least(1), help="pairs per update over all GPUs")
    add("--lora-rank", type=at_least(0), help="0: all weights (default: 128 for SANA and SD3, else 0)")
    add("--micro-batch", type=at_least(1), help="pairs on a GPU at once (default: what 24 GB hold, or 1)")
    add("--precision", choices=["fp32", "tf32", "fp16", "bf16"], help="default: fp32; on a GPU fp16, or a model's bf16")
    add("--checkpointing", action="store_true", help="less memory for a quarter more arithmetic")
    add("--compile", action="store_true", help="torch.compile the networks, on a GPU")
    add("--save-every", type=at_least(1), default=10, help="updates between checkpoints (default: 10, guess)")
    add("--preview", type=at_least(1), help="draw four prompts every so many updates")
    add("--tensorboard", action="store_true", help="also write the log for TensorBoard")
    add("--seed", type=at_least(0, high=2**63), default=0, help="of the order of pairs, t and noise (default: 0)")
    args = with_defaults(parser.parse_args(argv))
    check(args)
    return args


if __name__ == "__main__":
    main()
