"""Sec. 3.2, 3.3 and 4 of DDSPO (arXiv 2512.23426): tuning a text-to-image model with Eq. 7, Eq. 6 or a baseline.

    torchrun train.py --model sd14                                   the paper's run on one GPU
    torchrun --nproc_per_node 8 train.py --model sd14                the same run on eight
    torchrun train.py --model sd14 --objective diffusion-dpo         the baseline, on the same pairs
    torchrun train.py --model sd14 --winner runs/w/lora --loser runs/l/lora     Eq. 6, with two trained policies

The same command continues a stopped run exactly where its newest checkpoint is. --batch-size is the number of pairs per
update and --lr the final learning rate, on any number of GPUs; --micro-batch, the pairs that a GPU holds at once,
changes memory and speed, and the result by no more than rounding. What an update sees (pairs, t, noise) is a function
of the seed and of the place in the run. What a run keeps in --out: runs.py.
"""

import contextlib
import copy
import functools
import math
import os
import signal
import sys
import time
import types

import numpy as np
import torch
import torch._functorch.config
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from lib import adapters, models, plots, runs
from lib.files import UserError
from lib.pairs import PairStore, misfit
from lib.processes import processes, program
from lib.settings import announce, needs_c_minus, parse
from loss import ddspo_loss, diffusion_dpo_loss, dspo_loss, preference_loss

WEIGHT_DECAY = 1e-2  # of AdamW (the authors' released scripts)
MAX_GRAD_NORM = 1.0  # guess: the default of the diffusers examples
FIRST_SCALE, GROW_AFTER = 2.0**5, 100  # guess: fp16's loss scale, and after how many good updates it is doubled
TEXT_BATCH = 32  # guess: pairs whose prompts the text encoders read at once
HALF = dict(fp16=torch.float16, bf16=torch.bfloat16)

# ---- what update u sees: the run reads epoch after epoch, each a new order of all pairs


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
    """Yields the examples of some slots, --micro-batch at a time, on the device: c and c_minus encoded (c_minus for
    Eq. 7 only, else None), then x_0_w, x_0_l (B, channels, h, w), t (B,) and eps (B, channels, h, w). The text encoders
    read the prompts of several micro-batches in one pass, because a GPU waits for each pass."""
    size, eq7 = args.micro_batch, needs_c_minus(args)
    together = size * max(1, TEXT_BATCH // size)
    for start in range(0, len(some), together):
        examples = [example(store, model, args.seed, *slot, args.negatives) for slot in some[start:start + together]]
        c, c_minus, x_0_w, x_0_l, t, eps = zip(*examples)
        tensors = [torch.stack(x_0_w), torch.stack(x_0_l), torch.tensor(t), torch.stack(eps)]
        if device.type == "cuda":  # so that the copies do not wait for the GPU's work
            tensors = [x.pin_memory().to(device, non_blocking=True) for x in tensors]
        encoded = model.encode(c + c_minus if eq7 else c)  # {name: (2B or B, ...)}
        for k in range(0, len(t), size):
            rows = slice(k, min(k + size, len(t)))
            minus_rows = slice(len(t) + rows.start, len(t) + rows.stop)
            yield ({name: x[rows] for name, x in encoded.items()},
                   {name: x[minus_rows] for name, x in encoded.items()} if eq7 else None, *[x[rows] for x in tensors])


# ---- the step


def step_loss(model, policies, c, c_minus, x_0_w, x_0_l, t, eps, objective, beta, side=None):
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
    predictions = *eps_theta.chunk(2), *eps_ref.chunk(2)  # eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l: (B, ...)
    beta = beta * model.weight(t)  # (B,)
    if "winner" in policies:  # Eq. 6
        targets = frozen(policies["winner"], x_t_w, t, c), frozen(policies["loser"], x_t_l, t, c)
        loss, info = (dspo_loss if objective == "dspo" else preference_loss)(*predictions, *targets, beta)
    elif objective == "ddspo":  # Eq. 7
        eps_ref_l_minus = frozen(policies["ref"], x_t_l, t, c_minus)
        loss, info = ddspo_loss(*predictions, eps_ref_l_minus, beta)
    else:  # Eq. 4
        targets = model.target(x_0_w, t, eps), model.target(x_0_l, t, eps)
        loss, info = (dspo_loss if objective == "dspo" else diffusion_dpo_loss)(*predictions, *targets, beta)
    with torch.no_grad():
        drift = (eps_theta.float() - eps_ref.float()).square().flatten(1).mean(1).view(2, -1).mean(0)
        accuracy = (info["logit"].sign() + 1) / 2  # a tie is half right
        return loss, dict(loss=loss.detach(), **info, accuracy=accuracy, drift=drift)


# ---- policies and precision


def make_policies(args, model):
    """theta, ref and, for Eq. 6, winner and loser; and the networks among them: with LoRA, one serves them all."""
    net = model.net
    if args.lora_rank:
        torch.manual_seed(args.seed)  # of the adapter's first weights
        adapters.add_lora(net, args.lora_rank)
        policies, base = dict(theta=net, ref=adapters.with_adapter(net)), net
    else:
        base = None
        if args.objective != "sft":
            base = (copy_shares if isinstance(net, FSDPModule) else copy.deepcopy)(net).requires_grad_(False)
        policies = dict(theta=net.requires_grad_(True), ref=base)
    for role, path in dict(winner=args.winner, loser=args.loser).items():
        if path:
            policies[role] = adapters.load_policy(path, role, base, model)
    return policies, [policy for policy in policies.values() if isinstance(policy, torch.nn.Module)]


@contextlib.contextmanager
def precision(device, name):
    """Student and reference run in this precision: half by autocast from the same weights, with norms in float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # sums in float32
    with torch.autocast(device.type, HALF.get(name), enabled=name in HALF):
        yield


@torch.no_grad()
def noise_floor(args, model, ref, batch, device):
    """By how much rounding alone lowers a logit of Eq. 7, and the mean square of the reference's prediction. The
    winner's target is the reference's own prediction, so an error e of (eps_theta - eps_ref) enters squared, -beta/2
    mean(e^2), and e^2 is up to twice that of one network."""
    c, _, x_0_w, _, t, eps = batch
    x_t = model.noise(x_0_w, t, eps)
    with precision(device, "fp32"):
        exact = model.predict(ref, x_t, t, c).float()
    with precision(device, args.precision):
        e = model.predict(ref, x_t, t, c).float() - exact
    return args.beta * (model.weight(t) * e.square().flatten(1).mean(1)).mean().item(), exact.square().mean().item()


def halve(net, dtype):
    """Keeps the frozen weights of matrix products in half precision, to which autocast would round them at each use."""
    for module in net.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            for p in module.parameters(recurse=False):
                p.data = p.data if p.requires_grad else p.data.to(dtype)


def shard_weights(net):
    """FSDP2: each process keeps, on its device, its share of every block's weights, gradients and optimizer states."""
    for child in net.children():
        for block in child if isinstance(child, torch.nn.ModuleList) else []:
            fully_shard(block)
    fully_shard(net)


@torch.no_grad()
def copy_shares(net):
    """A copy of a network whose weights are shared out. It is never whole in any memory."""
    with torch.device("meta"):
        other = type(net).from_config(net.config).eval()
    other.set_attn_processor(net.attn_processors)  # SANA's are ours
    shard_weights(other)
    other.to_empty(device=next(net.parameters()).device)
    for x, y in zip([*other.parameters(), *other.buffers()], [*net.parameters(), *net.buffers()], strict=True):
        x.copy_(y)
    return other


# ---- the loop


def set_up(args, device):
    """The model, its policies, the networks among them, the optimizer of what is trained, and fp16's loss scaler."""
    gpu = device.type == "cuda"
    half = HALF.get(args.precision or "fp16", torch.float32) if gpu else torch.float32
    model = models.load(args.model, device, half, torch.float32)
    args.precision = args.precision or ("fp32" if not gpu else "bf16" if model.stored == "BF16" else "fp16")
    if args.fsdp:
        shard_weights(model.net)
    policies, networks = make_policies(args, model)
    if args.checkpointing:
        model.net.enable_gradient_checkpointing()
    trained = [p for p in model.net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    scaler = torch.amp.GradScaler(device.type, FIRST_SCALE, growth_interval=GROW_AFTER,
                                  enabled=args.precision == "fp16")
    return model, policies, networks, optimizer, scaler


@program
def main(argv=None):
    args = parse(argv)
    with contextlib.ExitStack() as stack:
        signals = handle_signals(stack)
        rank, world, device = stack.enter_context(processes(args.out, hours=0.5))  # guess
        if not os.path.exists(os.path.join(args.pairs, "meta.json")):
            raise UserError(f"there is no pair store {args.pairs}: make it with\n    python perturb.py prompts.txt "
                            f"perturbed.jsonl\n    torchrun build_pairs.py --model {args.model} --prompts "
                            f"perturbed.jsonl --out {args.pairs}")
        store = PairStore(args.pairs)
        model, policies, networks, optimizer, scaler = set_up(args, device)
        check_pairs(args, store, model)
        parameters = optimizer.param_groups[0]["params"]
        identity = runs.identity_of(args, store, model)
        update = runs.load_checkpoint(args, identity, model.net, optimizer, scaler)
        save = functools.partial(runs.save_checkpoint, args, identity, model.net, optimizer, scaler, rank)
        floor, size = None, None
        if args.objective != "sft":
            some = slots(len(store), args.seed, 0, args.micro_batch)
            floor, size = noise_floor(args, model, policies["ref"],
                                      next(micro_batches(store, model, args, some, device)), device)
        prepare(args, networks)
        if rank == 0:
            announce(args, model, store, update, floor, world)
            first_row = dict(update=0, noise_floor=floor, precision=args.precision)
            log, board = map(stack.enter_context, runs.open_log(args.out, update, first_row, args.tensorboard))
        # fp16: the loss is the mean over a micro-batch, so that no overflow depends on how an update is divided. FSDP2
        # takes the mean over processes too. Each gradient is then multiplied to be the mean over the update.
        share = args.micro_batch if scaler.is_enabled() else 1
        pairs_in_grad = args.batch_size / share / (world if args.fsdp else 1)
        once = functools.cache(functools.partial(tqdm.write, file=sys.stderr))  # says each sentence once
        bar = stack.enter_context(tqdm(desc="train", unit=" pairs", initial=update * args.batch_size,
                                       total=args.updates * args.batch_size, disable=rank > 0))

        signals.at_once = False
        while update < args.updates:
            began, batch = time.perf_counter(), slots(len(store), args.seed, update, args.batch_size)
            mine = batch[rank::world]
            optimizer.zero_grad()
            parts = micro_batches(store, model, args, mine, device)
            for k, part in zip(range(0, len(mine), args.micro_batch), parts):
                if k < args.batch_size // world and any_process(signals.came):  # all processes have this micro-batch
                    stop(save, update)  # the weights are still those after it
                with precision(device, args.precision):
                    loss, info = step_loss(model, policies, *part, args.objective, args.beta, args.side)  # (B,)
                scaler.scale(loss.sum() / share).backward()
                info["t"] = part[4]
                if k == 0:
                    record = torch.zeros(args.batch_size, len(info), device=device)  # a row a pair
                record[rank::world][k:k + len(loss)] = torch.stack([*info.values()], 1)
                bar.update(min(world * len(loss), (update + 1) * args.batch_size - bar.n))
                if k == 0 and update == 0 and scaler.is_enabled() and any_process(overflowed(parameters)):
                    break  # and not after all the others

            if world > 1:  # once an update, after the last micro-batch
                add_up([record] if args.fsdp else [record, *[p.grad for p in parameters]])
            scaler.unscale_(optimizer)
            for p in parameters:
                p.grad /= pairs_in_grad
            norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            norm = (norm.full_tensor() if args.fsdp else norm).item()  # waits for the GPU
            columns = dict(zip(info, record.cpu().numpy().T))  # {name: (batch_size,)}
            check_update(args, store, update, batch, columns, norm, floor, scaler)
            if not math.isfinite(norm):  # fp16 overflowed: the same update is done again with half the loss scale
                scaler.update()
                if rank == 0:
                    tqdm.write(f"update {update + 1} overflowed and is done again with loss scale "
                               f"{scaler.get_scale():g}", file=sys.stderr)
                continue
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, (update + 1) / max(args.warmup, 1))  # linear warm-up, then constant
            scaler.step(optimizer)
            scaler.update()
            update += 1

            if rank == 0:
                speed = args.batch_size / (time.perf_counter() - began)
                runs.show(log, board, bar, runs.log_row(
                    update, columns, model.num_train_timesteps, lr=group["lr"], grad_norm=norm,
                    loss_scale=scaler.get_scale(), pairs_per_second=speed))
                for oddity in runs.oddities(columns, size):
                    once(oddity)
            if rank == 0 and args.preview and update % args.preview == 0:
                preview(args, model, policies, store, update, device)
            if update % args.save_every == 0 or update == args.updates:
                save(update)
        signals.at_once = True
        bar.close()
        runs.finish(args, model, rank)


def prepare(args, networks):
    """The last changes to the networks, once the exact weights are needed no more."""
    for network in networks:
        if args.precision in HALF and not args.fsdp:
            halve(network, HALF[args.precision])
        if args.compile:  # the backward is traced too, and SANA's would be cast to fp16 and overflow there
            torch._functorch.config.backward_pass_autocast = "off"
            network.compile()
        if not args.lora_rank and not args.fsdp:
            # torch takes mm or bmm by this, and the reference must take what the student takes. It is not trained: the
            # optimizer does not have it, and it runs without gradients. (With FSDP, autocast would copy its weights.)
            network.requires_grad_(True)


def any_process(true):
    """Whether something is true in any process. All of them must ask."""
    found = torch.tensor(float(bool(true)))  # on the CPU, so that no GPU is waited for
    if dist.is_initialized():
        add_up([found])
    return found.item() > 0


def overflowed(parameters):
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    return not math.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def add_up(tensors):
    """Sums tensors over the processes, in place."""
    try:
        for tensor in tensors:
            dist.all_reduce(tensor)
    except RuntimeError as error:
        raise UserError(f"another process was lost ({str(error).splitlines()[0][:200]}), so this one ends too. Go on "
                        "from the newest checkpoint with the same command.") from error


def handle_signals(stack):
    """An object whose `came` says whether SIGTERM or SIGINT did. They end the program, unless its `at_once` is False:
    then that is left to who reads `came`. (A library that is being imported may swallow the end.)"""
    signals = types.SimpleNamespace(came=False, at_once=True)

    def handle(*_):
        signals.came = True
        if signals.at_once:
            raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        stack.callback(signal.signal, number, signal.signal(number, handle))  # at the end it is handled as before
    return signals


def stop(save, update):
    """Ends the run on a signal, with the last whole update saved."""
    if update > 0:
        save(update)
    raise UserError(f"stopped by a signal after update {update}: run the same command again to go on.")


def check_update(args, store, update, batch, columns, norm, floor, scaler):
    """Raises UserError, before anything of an update is kept, if it is not sound: if a loss or the gradient is not
    finite, or if the run's first logits are not 0, as they are where the student is the reference."""
    bad = [pair for (_, pair), finite in zip(batch, np.isfinite(columns["loss"])) if not finite]
    if bad or not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1):
        what = "the gradient is not finite, though each loss is"
        ways = ["lower --lr"] * (update > 0) + ["take --precision fp32"] * (args.precision in HALF)
        if bad:
            what = f"the loss of the pairs {[store.rows[pair]['id'] for pair in bad[:10]]} is not finite"
        cure = " or ".join(ways) or "the model or the pairs must be damaged"
        raise UserError(f"update {update + 1}: {what}. Nothing of this update is kept: {cure}.")
    if update == 0 and "logit" in columns and not abs(columns["logit"].mean()) < 0.05 + 4 * floor:  # guess
        raise UserError("before the first update the student must be the reference and every logit 0, but their mean "
                        f"is {columns['logit'].mean():.3g}, where rounding explains {floor:.2g}: the two differ, in "
                        "weights or by dropout.")


# ---- the pairs and the pictures


def check_pairs(args, store, model):
    """Raises UserError if the pairs do not go with the objective or with the model."""
    if args.negatives == "generated" and store.meta["negatives"] == "none":
        raise UserError(f"{args.pairs} holds winners only: take --negatives rand-positive or not-paired.")
    if args.negatives != "generated" and all(row["c"] == store.rows[0]["c"] for row in store.rows):
        raise UserError(f"--negatives {args.negatives} needs other prompts, but {args.pairs} has only one prompt.")
    if needs_c_minus(args) and store.rows[0]["c_minus"] is None:
        raise UserError(f"{args.pairs} holds pairs of images without c_minus, which Eq. 7 needs: take --objective "
                        "diffusion-dpo, dspo or sft, or --winner and --loser (Eq. 6).")
    if problem := misfit(store.meta, model):
        raise UserError(f"--pairs {args.pairs}: {problem}")


def preview(args, model, policies, store, update, device):
    """Draws the first four prompts with the reference and with the student as it is now, from the same x_T."""
    prompts, columns = [store.rows[i]["c"] for i in range(min(4, len(store)))], []
    x_T = torch.stack([models.initial_noise(args.seed + i, model.latent_shape) for i in range(len(prompts))])
    for name, title in (("ref", "reference"), ("theta", "student")):
        if args.lora_rank:
            model.net.set_adapter(["theta"] if name == "theta" else [])
        else:
            setattr(model.pipe, model.net_name, policies[name])
        with precision(device, "bf16" if args.precision == "fp16" else args.precision):  # T5 overflows in float16
            x_0 = models.sample(model, prompts, x_T, model.steps, model.guidance)
        columns.append((title, models.decode(model, x_0)))  # not in half precision, in which SDXL's decoder overflows
    plots.draw_grid(prompts, columns, os.path.join(args.out, f"preview-{update:06d}.png"))


if __name__ == "__main__":
    main()
