"""Sec. 3.2, 3.3 and 4 of DDSPO (arXiv 2512.23426): tuning a text-to-image model with Eq. 7, Eq. 6 or a baseline.

    torchrun train.py --model sd14                                   the paper's run on one GPU
    torchrun --nproc_per_node 8 train.py --model sd14                the same run on eight
    torchrun train.py --model sd14 --objective diffusion-dpo         the baseline, on the same pairs
    torchrun train.py --model sd14 --winner runs/w/lora --loser runs/l/lora     Eq. 6, with two trained policies

Running the same command again continues a stopped run exactly where its newest checkpoint is. `--batch-size` is the
number of pairs per update and `--lr` the final learning rate, on any number of GPUs: how many pairs a GPU holds at once
(`--micro-batch`) changes the speed only. Which pairs an update sees, and with which t and noise, is a function of the
seed and of the pair's place in the run.

In --out: log.jsonl (a line an update) and its picture curves.png, checkpoint-*.pt (the newest two), and the result:
pipeline/, a diffusers folder, or lora/, for load_lora_weights.
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
import pickle
import resource
import shutil
import signal
import sys
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import models
import plots
from build_pairs import PairStore, check_store, checksum
from loss import dspo_loss, preference_loss
from perturb import check_flags, locked, write_text

# A row for each experiment. Where the numbers are from: [p] the paper (with its overview), [r] the authors' research
# scripts, [o] their released scripts, [d] the code of the baseline's own authors, [g] our guess. The batch is 2048
# pairs [r, o] except where a row says otherwise. In [r], lr * beta = 0.08192 at this batch, over beta = 2000 to 24000;
# [o]'s README says the inverse (lr proportional to beta), against all scripts. Updates of SD-1.4: 100 [p], 500 with
# those from 100 on evaluated [r], 200 [o]. SDXL: AdamW [o], Adafactor [r]; t uniform [p], more small t [r], more weight
# to large t [o]. SANA: lr 8.192e-5 and rank 128 [o], 4.096e-5 (the law's) and rank 512 or 1024 [r]; weight decay 1e-2
# [o], 1e-4 [r]. SD3 [o] is not in the paper. The rows' marks are for beta, lr, updates and warmup.
EXPERIMENTS = {  # (model, task, objective): beta, lr, updates, warmup
    ("sd14", "alignment", "ddspo"): dict(beta=16000, lr=5.12e-6, updates=100, warmup=100),  # Table 1a, 3 [p r p r]
    ("sd14", "alignment", "diffusion-dpo"): dict(beta=8000, lr=1.024e-5, updates=100, warmup=100),  # Table 1a [r r g r]
    ("sd14", "aesthetic", "ddspo"): dict(beta=16000, lr=5.12e-6, updates=100, warmup=100),  # Table 3a [p g p g]
    ("sd15", "aesthetic", "ddspo"): dict(beta=16000, lr=5.12e-6, updates=100, warmup=100),  # Table 2a [p r p r]
    ("sd15", "aesthetic", "diffusion-dpo"): dict(beta=5000, lr=2.048e-5, updates=2000, warmup=500),  # Table 2a [d]
    ("sd15", "aesthetic", "dspo"): dict(beta=0.001, lr=2.048e-5, updates=2000, warmup=500),  # [d]
    ("sdxl", "alignment", "ddspo"): dict(beta=16000, lr=5.12e-6, updates=500, warmup=100),  # Table 1b, c [p r r r]
    ("sdxl", "alignment", "diffusion-dpo"): dict(beta=12000, lr=6.7584e-6, updates=500, warmup=100),  # [r r g g]
    ("sdxl", "aesthetic", "ddspo"): dict(beta=16000, lr=5.12e-6, updates=500, warmup=100),  # Table 2b [p g g g]
    ("sdxl", "aesthetic", "diffusion-dpo"): dict(beta=5000, lr=2.048e-5, updates=2000, warmup=200),  # Table 2b [d]
    ("sana", "alignment", "ddspo"): dict(beta=2000, lr=8.192e-5, updates=500, warmup=0),  # Table 1b [o]
    ("sana-1.6b", "alignment", "ddspo"): dict(beta=2000, lr=8.192e-5, updates=500, warmup=0),  # as sana [g]
    ("sd3", "alignment", "ddspo"): dict(beta=2000, lr=8.192e-5, updates=100, warmup=0),  # [o]
    ("sd14", "alignment", "policies"): dict(beta=8000, lr=5.12e-6, updates=100, warmup=100),  # Eq. 6 [o]
    ("sd14", "alignment", "sft"): dict(lr=1e-4, updates=300, warmup=0),  # Eq. 6's policies, with --lora-rank 4 [o]
    ("shapes", "alignment", "ddspo"): dict(beta=1000, lr=3e-5, batch_size=64, updates=80, warmup=0),  # shapes.py --grid
    ("shapes", "alignment", "diffusion-dpo"): dict(beta=200, lr=3e-5, batch_size=64, updates=80, warmup=0),
}
# The pairs that 24 GB hold at once without --checkpointing, 1 for other models (calculated, not measured; SDXL in full
# and SD3 do not fit there), and LoRA where the authors' scripts use it [o].
MICRO_BATCH = {"sd14": 2, "sd15": 2, "sd21": 2, "sana": 3, "sana-1.6b": 2}
LORA_RANK = {"sana": 128, "sana-1.6b": 128, "sd3": 128}
WEIGHT_DECAY = 1e-2  # AdamW [o]
MAX_GRAD_NORM = 1.0  # [g] the default of the diffusers examples
BANDS = 10  # of time steps, in the log
HALF = dict(fp16=torch.float16, bf16=torch.bfloat16)
FIRST_SCALE, GROW_AFTER = 2.0**5, 100  # [g] fp16's scale of a pair's loss: halved on overflow, doubled after so many
FREE_FLAGS = ("updates", "micro_batch", "save_every", "out", "pairs", "compile", "checkpointing", "fsdp", "tensorboard",
              "preview")  # a run may be continued with others of these

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
    if not (x_0_w.isfinite().all() and x_0_l.isfinite().all()):
        sys.exit(f"the latents of pair {row['id']} in {store.folder} are not all finite: train.py --check lists all "
                 "such pairs; make the pairs without them.")
    return c, c_minus, x_0_w, x_0_l, t, eps


def micro_batch(store, model, args, micro, device):
    """The examples of some slots, on the device: c, c_minus (None but for Eq. 7), x_0_w, x_0_l, t, eps."""
    c, c_minus, x_0_w, x_0_l, t, eps = zip(*[example(store, model, args.seed, *slot, args.negatives) for slot in micro])
    tensors = [torch.stack(x_0_w), torch.stack(x_0_l), torch.tensor(t), torch.stack(eps)]
    if device.type == "cuda":  # so that the copies do not wait for the GPU's work
        tensors = [x.pin_memory().to(device, non_blocking=True) for x in tensors]
    perturbed = args.objective == "ddspo" and not args.winner
    return model.encode(c), model.encode(c_minus) if perturbed else None, *tensors


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

    x_t_w, x_t_l = model.noise(x_0_w, t, eps), model.noise(x_0_l, t, eps)  # the same t and eps for both
    x_t, tt, cc = torch.cat([x_t_w, x_t_l]), torch.cat([t, t]), {name: torch.cat([x, x]) for name, x in c.items()}
    eps_theta = model.predict(policies["theta"], x_t, tt, cc)
    eps_theta_w, eps_theta_l = eps_theta.chunk(2)
    with torch.no_grad():  # in the student's batch shape, so that at theta = ref the two agree to the last bit
        eps_ref = model.predict(policies["ref"], x_t, tt, cc)
        eps_ref_w, eps_ref_l = eps_ref.chunk(2)
        if "winner" in policies:  # Eq. 6
            target_w = model.predict(policies["winner"], x_t_w, t, c)
            target_l = model.predict(policies["loser"], x_t_l, t, c)
        elif objective == "ddspo":  # Eq. 7
            target_w, target_l = eps_ref_w, model.predict(policies["ref"], x_t_l, t, c_minus)
        else:  # Eq. 4
            target_w, target_l = model.target(x_0_w, t, eps), model.target(x_0_l, t, eps)
    loss_of = dspo_loss if objective == "dspo" else preference_loss
    loss, info = loss_of(eps_theta_w, eps_theta_l, eps_ref_w, eps_ref_l, target_w, target_l, beta * model.weight(t))
    with torch.no_grad():
        drift = (eps_theta.float() - eps_ref.float()).square().flatten(1).mean(1).view(2, -1).mean(0)
        accuracy = (info["logit"].sign() + 1) / 2  # a tie is half right
        return loss, dict(loss=loss.detach(), **info, accuracy=accuracy, drift=drift)


def check_start(info):
    """At theta = ref every logit is 0 and the loss log 2 (Eq. 7). Stops where it is not so."""
    worst = info["logit"].abs().max().item() if "logit" in info else 0
    if not worst < 0.05:
        sys.exit(f"before the first update the model must be the reference, and every logit 0, but one is {worst:.3g}. "
                 "Either the two differ (in weights, dropout, precision), or beta is too large for the precision.")


# ---- policies and precision


def make_policies(args, model):
    """theta, ref and, for Eq. 6, winner and loser, as functions. With LoRA, one frozen network serves them all."""
    net = model.net
    if args.lora_rank:
        torch.manual_seed(args.seed)  # of the adapter's first weights
        models.add_lora(net, args.lora_rank)
        policies, base = dict(theta=net, ref=models.with_adapter(net)), net
    else:
        base = copy.deepcopy(net).requires_grad_(False) if args.objective != "sft" else None
        policies = dict(theta=net.requires_grad_(True), ref=base)
    for name, path in dict(winner=args.winner, loser=args.loser).items():
        if path:
            policies[name] = models.load_policy(path, name, base, model)
    networks = [net, base, *policies.values()]  # each once; what is none is an adapter as a function
    return policies, [n for i, n in enumerate(networks) if isinstance(n, torch.nn.Module) and n not in networks[:i]]


@contextlib.contextmanager
def precision(device, name):
    """Student and reference run in this precision: half by autocast from the same weights, norms in float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    with torch.autocast(device.type, HALF.get(name), enabled=name in HALF):
        yield


@torch.no_grad()
def noise_floor(args, model, ref, batch, device):
    """What rounding alone does to a logit of Eq. 7. The winner's target is the reference's own prediction, so an error
    e of (pred - ref) enters squared, -beta/2 mean(e^2), and e^2 is up to twice that of one network."""
    c, _, x_0_w, _, t, eps = batch
    x_t = model.noise(x_0_w, t, eps)
    with precision(device, "fp32"):
        exact = model.predict(ref, x_t, t, c).float()
    with precision(device, args.precision):
        e = model.predict(ref, x_t, t, c).float() - exact
    return args.beta * (model.weight(t) * e.square().flatten(1).mean(1)).mean().item()


def halve(net, dtype):
    """Keeps the frozen weights of matrix products in half precision, to which autocast would round them at each use."""
    for module in net.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            for p in module.parameters(recurse=False):
                p.data = p.data if p.requires_grad else p.data.to(dtype)


def gradient_norms(args, model, policies, batch, device):
    """The norm of each trained parameter's gradient for a batch."""
    with precision(device, args.precision):
        loss, _ = step_loss(model, policies, *batch, args.objective, args.beta, args.side)
    loss.mean().backward()
    parameters = [p for p in model.net.parameters() if p.requires_grad]
    norms = torch.stack([p.grad.norm() for p in parameters])
    for p in parameters:
        p.grad = None
    return norms


def compile_all(args, model, policies, networks, batch, device):
    """Compiles the networks, and stops where that changes the gradient: torch 2.13 on CPUs does so for U-Nets."""
    eager = gradient_norms(args, model, policies, batch, device)
    for network in networks:
        network.compile()
    compiled = gradient_norms(args, model, policies, batch, device)
    wrong = (compiled - eager).abs() > 0.1 * eager + 0.01 * eager.max()
    if wrong.any():
        sys.exit(f"--compile gives another gradient for {wrong.sum()} of {len(wrong)} parameters: torch compiles this "
                 "network wrongly here. Run without --compile.")


def shard(net):
    """FSDP2: each process keeps its share of every block's weights, gradients and optimizer states."""
    for child in net.children():
        for block in child if isinstance(child, torch.nn.ModuleList) else []:
            fully_shard(block)
    fully_shard(net)


# ---- checkpoints


def gather(args, net, optimizers):
    """What is trained, and the optimizer's states, whole and on the CPU. With --fsdp all processes must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state, optimizer_state = get_state_dict(net, optimizers, options=options)
    return {name: x for name, x in state.items() if not args.lora_rank or ".theta." in name}, optimizer_state


def save_checkpoint(args, net, optimizer, update, scaling, rank):
    state, optimizer_state = gather(args, net, optimizer)
    if rank > 0:
        return
    path = os.path.join(args.out, f"checkpoint-{update:06d}.pt")
    try:
        torch.save(dict(update=update, net=state, optimizer=optimizer_state, scaling=scaling, flags=vars(args)),
                   path + ".partial")
    except RuntimeError as error:  # so torch says a full disk
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
    os.replace(path + ".partial", path)
    for old in checkpoints(args.out)[2:]:
        os.remove(old)


def checkpoints(folder):
    """The checkpoints' paths, newest first. Whatever else lies beside them is left alone."""
    paths = glob.glob(os.path.join(glob.escape(folder), f"checkpoint-{'[0-9]' * 6}.pt"))
    return sorted(filter(os.path.isfile, paths), reverse=True)


def load_checkpoint(args):
    """The newest readable checkpoint, or None. Stops if it was made with other flags."""
    for path in checkpoints(args.out):
        try:
            with zipfile.ZipFile(path) as file:  # a torch checkpoint is a zip file, with a checksum for each tensor
                damaged = file.testzip()
            checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, OSError) as error:
            damaged = str(error).splitlines()[0]
        if damaged:
            print(f"{path} is damaged, or no checkpoint ({damaged}), and is passed over", file=sys.stderr)
            continue
        for name, value in vars(args).items():
            if name not in FREE_FLAGS and checkpoint["flags"].get(name) != value:
                sys.exit(f"the run in {args.out} was begun with {name} {checkpoint['flags'].get(name)}, not {value}: "
                         "continue it with the same flags and pairs, or give another --out.")
        if checkpoint["update"] > args.updates:
            sys.exit(f"the run in {args.out} has {checkpoint['update']} updates, more than --updates {args.updates}: "
                     "give more, or another --out.")
        return checkpoint
    if os.path.exists(result(args)):
        sys.exit(f"{result(args)} is a result without a checkpoint, and would be replaced. Give another --out.")
    return None


def result(args):
    return os.path.join(args.out, "lora" if args.lora_rank else "pipeline")


def export(args, model, state):
    """The result, whole or not at all: the tuned pipeline as a diffusers folder in one precision, float32, or the
    adapter as the pipeline's load_lora_weights reads it."""
    folder = result(args)
    shutil.rmtree(folder + ".partial", ignore_errors=True)
    if args.lora_rank:
        weights = {name.replace(".theta.", "."): x.contiguous() for name, x in state.items()}
        type(model.pipe).save_lora_weights(folder + ".partial", **{model.net_name + "_lora_layers": weights})
    else:
        tuned = models.load(args.model)
        tuned.net.load_state_dict(state)
        tuned.pipe.save_pretrained(folder + ".partial")
    note = os.path.join(folder + ".partial", "training.json")
    write_text(note, json.dumps(vars(args), indent=1) + "\n")
    for path in glob.glob(os.path.join(glob.escape(folder + ".partial"), "**", "*.safetensors"), recursive=True):
        shutil.copymode(note, path)  # safetensors lets nobody but their writer read them
    shutil.rmtree(folder, ignore_errors=True)  # of fewer updates; the checkpoint can make it again
    os.replace(folder + ".partial", folder)


def finished(args):
    """Whether the export of this very run, after this many updates, is there."""
    path = os.path.join(result(args), "training.json")
    if not os.path.exists(path):
        return False
    with open(path) as file:
        flags = json.load(file)
    fixed = [name for name in vars(args) if name == "updates" or name not in FREE_FLAGS]
    return all(flags.get(name) == getattr(args, name) for name in fixed)


# ---- the loop


def main(argv=None):
    args = parse(argv)
    if args.plot:
        return plots.draw_curves(args.plot)
    with models.processes(hours=0.5) as (rank, world, device), contextlib.ExitStack() as stack:  # [g] the longest write
        check_processes(args, world, device)
        store = open_store(args)
        if args.check:
            problems = check_store(args.pairs, models.load_tokenizers(args.model))
            if problems:
                sys.exit("\n".join(problems) + f"\n{args.pairs}: {len(problems)} problems")
            return print(f"{args.pairs} is whole")
        args.policies = [checksum(path) for folder in (args.winner, args.loser) if folder for path in
                         sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.safetensors"), recursive=True))]
        args.store = hashlib.sha256("".join([store.meta["table"], *store.meta["checksums"]]).encode()).hexdigest()
        if finished(args):
            print(f"{args.out} is finished after {args.updates} updates; nothing was done") if rank == 0 else None
            return
        if rank == 0:
            stack.enter_context(locked(args.out))
        checkpoint = load_checkpoint(args)
        signals = stack.enter_context(faults())

        half = HALF.get(args.precision, torch.float32) if device.type == "cuda" else torch.float32
        model = models.load(args.model, device, half, torch.float32, "cpu" if args.fsdp else None)
        policies, networks = make_policies(args, model)
        net, floor = model.net, None
        if args.fsdp:  # which moves each share to its device
            for network in networks:
                shard(network)
        first = micro_batch(store, model, args, slots(len(store), args.seed, 0, args.micro_batch), device)
        if checkpoint is None and args.objective != "sft":
            floor = noise_floor(args, model, policies["ref"], first, device)
        if args.precision in HALF and not args.fsdp:
            for network in networks:
                halve(network, HALF[args.precision])
        if args.checkpointing:
            net.enable_gradient_checkpointing()
        if args.compile:
            compile_all(args, model, policies, networks, first, device)
        parameters = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=WEIGHT_DECAY, fused=True)
        total = world if args.fsdp else 1  # FSDP2 takes the mean over processes, where we want the sum
        update, scaling = 0, dict(scale=FIRST_SCALE if args.precision == "fp16" else 1.0, since=0, skipped=0)
        if checkpoint:
            set_state_dict(net, optimizer, model_state_dict=checkpoint["net"], optim_state_dict=checkpoint["optimizer"],
                           options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False))
            update, scaling = checkpoint["update"], checkpoint["scaling"]
            del checkpoint
        log = board = None
        if rank == 0:
            announce(args, update, floor, len(store), world)
            log = stack.enter_context(open_log(args, update, floor))
            if args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # here, since few need it
                board = stack.enter_context(SummaryWriter(os.path.join(args.out, "tensorboard"), purge_step=update + 1))

        since = time.perf_counter()
        bar = tqdm(desc="train", initial=update, total=args.updates, disable=rank > 0)
        while update < args.updates:
            mine = slots(len(store), args.seed, update, args.batch_size)[rank::world]
            sums, margins, not_finite = None, torch.zeros(args.batch_size, device=device), []
            optimizer.zero_grad()
            for m in range(0, len(mine), args.micro_batch):
                if signals and rank == 0 and not args.fsdp:  # the state is still that after the last update
                    if update > 0:
                        save_checkpoint(args, net, optimizer, update, scaling, rank)
                    sys.exit(f"stopped by a signal after update {update}: go on by the same command.")
                micro = mine[m:m + args.micro_batch]
                batch = micro_batch(store, model, args, micro, device)
                with precision(device, args.precision):
                    loss, info = step_loss(model, policies, *batch, args.objective, args.beta, args.side)
                if update == 0:
                    check_start(info)
                (scaling["scale"] * total * loss.sum()).backward()

                t = batch[4]
                values = torch.stack([*info.values(), torch.ones_like(loss)], 1)  # (B, metrics + 1)
                sums = torch.zeros(BANDS, values.shape[1], device=device) if sums is None else sums
                sums.index_add_(0, t * BANDS // model.num_train_timesteps, values)
                margins[rank::world][m:m + len(micro)] = info.get("logit", loss.detach())
                not_finite.append((micro, loss.detach().isfinite()))

            sums = torch.cat([sums.flatten(), margins, margins.new_tensor([len(signals)])])
            if world > 1:  # once an update, after the last micro-batch
                add_up([sums] if args.fsdp else [p.grad for p in parameters] + [sums])
            for p in parameters:
                p.grad /= scaling["scale"] * args.batch_size
            norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            norm = norm.full_tensor() if args.fsdp else norm
            *sums, stop, norm = torch.cat([sums, norm[None]]).tolist()  # waits for the GPU, as else only the text does
            if not all(map(math.isfinite, sums)):
                stop_not_finite(args, store, update, not_finite)
            if not math.isfinite(norm):  # fp16's overflow: the same update again, with a smaller scale
                scaling.update(scale=scaling["scale"] / 2, since=0, skipped=scaling["skipped"] + 1)
                if args.precision != "fp16" or scaling["scale"] < 1:
                    stop_not_finite(args, store, update, not_finite)
                tqdm.write(f"update {update + 1} overflowed and is done again with loss scale {scaling['scale']:g}",
                           file=sys.stderr) if rank == 0 else None
                continue

            lr = args.lr * min(1, (update + 1) / max(args.warmup, 1))  # linear warm-up, then constant
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            update += 1
            scaling["since"] += 1
            if args.precision == "fp16" and scaling["since"] == GROW_AFTER:
                scaling.update(scale=scaling["scale"] * 2, since=0)

            if rank == 0:
                speed, since = args.batch_size / (time.perf_counter() - since), time.perf_counter()
                by_band = np.reshape(sums[:-args.batch_size], (BANDS, -1))
                row = log_row(update, lr, norm, list(info), by_band, sums[-args.batch_size:], scaling, speed)
                log.write(json.dumps(row) + "\n")
                log.flush()
                for name, values in row.items() if board else ():
                    for i, value in enumerate(values if isinstance(values, list) else [values]):
                        if value is not None:
                            board.add_scalar(f"{name}/{i}" if isinstance(values, list) else name, value, update)
                shown = ("loss", "accuracy", "winner", "loser", "pairs_per_second")
                bar.set_postfix({name: f"{row[name]:.3g}" for name in shown if name in row})
                bar.update()
                if args.preview and update % args.preview == 0:
                    preview(args, model, policies, store, update, device)
            if update % args.save_every == 0 or update == args.updates or (stop and args.fsdp):
                if rank == 0 or args.fsdp:
                    save_checkpoint(args, net, optimizer, update, scaling, rank)
            if stop and args.fsdp:
                sys.exit(f"stopped by a signal after update {update}: go on by the same command.")
        bar.close()
        state = gather(args, net, [])[0] if rank == 0 or args.fsdp else None
        if rank == 0:
            export(args, model, state)
            print(f"wrote {result(args)}")
            plots.draw_curves(os.path.join(args.out, "log.jsonl"))


def add_up(tensors):
    """Sums tensors over the processes."""
    try:
        for tensor in tensors:
            dist.all_reduce(tensor)
    except RuntimeError as error:
        sys.exit(f"another process was lost ({str(error).splitlines()[0][:200]}): this one ends too. Go on from the "
                 "newest checkpoint by the same command.")


@contextlib.contextmanager
def faults():
    """What can end a run from outside, as a sentence; gives a list to which SIGTERM and SIGINT are added."""
    came = []
    before = {s: signal.signal(s, lambda number, _: came.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    except torch.OutOfMemoryError as error:
        sys.exit(f"out of memory: give a smaller --micro-batch, --checkpointing, --lora-rank or --fsdp. {error}")
    except (OSError, SafetensorError) as error:
        sys.exit(f"cannot read or write: {error}. The newest checkpoint is whole: mend that, or make space, and give "
                 "the same command again.")
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def stop_not_finite(args, store, update, not_finite):
    """Names the pairs with a loss that is not finite, before anything of this update is kept."""
    bad = [store.rows[pair]["id"] for micro, finite in not_finite for (_, pair), ok in zip(micro, finite) if not ok]
    what = f"the loss of the pairs {bad[:10]}" if bad else "the gradient, or the loss of another process's pairs,"
    sys.exit(f"update {update + 1}: {what} is not finite. The newest checkpoint in {args.out} is from before this "
             "update. Lower --lr, make the pairs without these prompts, or take --precision tf32 instead of half.")


# ---- what the user sees


def announce(args, start, floor, pairs, world):
    """What the run will do, on the screen."""
    parts = math.ceil(args.batch_size / world / args.micro_batch)
    print(f"{args.objective} on {pairs} pairs, from update {start} of {args.updates} ({args.batch_size} pairs each, "
          f"{args.updates * args.batch_size / pairs:.3g} epochs); on each of {world} processes {parts} micro-batches "
          f"of up to {args.micro_batch}; " + (f"beta {args.beta:g}, " if args.beta else "") + f"lr {args.lr:g} after "
          f"{args.warmup} updates of warm-up; {args.precision}; settings of {args.preset}")
    if pairs < args.batch_size:
        print(f"note: {pairs} pairs are fewer than a batch: an update sees each {args.batch_size / pairs:.3g} times, "
              "with another t and noise each time", file=sys.stderr)
    if floor is not None:
        print(f"rounding in {args.precision} lowers each logit by about {floor:.2g}")
        if floor > 0.05:
            better = "tf32 or fp32" if args.precision == "fp16" else "fp16 or tf32"
            print(f"note: that is more than 0.05 and hides small preferences: take --precision {better}, or a smaller "
                  "--beta", file=sys.stderr)


def open_log(args, start, floor=None):
    """The log, with the lines of updates that the newest checkpoint does not know of taken out."""
    path, lines = os.path.join(args.out, "log.jsonl"), []
    if floor is not None:
        lines = [json.dumps(dict(update=0, noise_floor=floor, precision=args.precision)) + "\n"]
    elif os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n") and json.loads(line)["update"] <= start]
    write_text(path, "".join(lines))
    return open(path, "a", encoding="utf-8")


def log_row(update, lr, norm, names, sums, margins, scaling, pairs_per_second):
    """One line of the log: means over the update's pairs, and over those whose t lies in each of BANDS equal bands."""
    count = sums[:, -1]
    row = dict(update=update, lr=lr, grad_norm=norm, skipped=scaling["skipped"], loss_scale=scaling["scale"],
               pairs_by_t=count.astype(int).tolist())
    for i, name in enumerate(names):
        row[name] = sums[:, i].sum() / count.sum()
        row[name + "_by_t"] = [s / n if n else None for s, n in zip(sums[:, i], count)]
    if "logit" in names:
        row["logit_quantiles"] = np.quantile(margins, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    row["memory_gb"] = (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak) / 1e9
    row["pairs_per_second"] = pairs_per_second
    return row


def preview(args, model, policies, store, update, device):
    """Draws the first four prompts with the reference and with the model as it is now, from the same x_T."""
    prompts, columns = [store.rows[i]["c"] for i in range(min(4, len(store)))], []
    x_T = torch.stack([models.initial_noise(args.seed + i, model.latent_shape) for i in range(len(prompts))])
    for name, title in (("ref", "reference"), ("theta", "student")):
        if args.lora_rank:
            model.net.set_adapter(["theta"] if name == "theta" else [])
        else:
            setattr(model.pipe, model.net_name, policies[name])
        c = model.encode(prompts)
        with precision(device, args.precision):
            x_0 = models.sample(model, c, x_T, model.steps, model.guidance)
        columns.append((title, models.decode(model, x_0)))  # not in half precision, where SDXL's decoder overflows
    plots.draw_grid(prompts, columns, os.path.join(args.out, f"preview-{update:06d}.png"))


# ---- the flags, and what can be wrong with them or with the pairs


def open_store(args):
    if not os.path.exists(os.path.join(args.pairs, "meta.json")):
        sys.exit(f"there is no pair store {args.pairs}: make it with\n"
                 f"    python perturb.py prompts.txt perturbed.jsonl\n"
                 f"    torchrun build_pairs.py --model {args.model} --prompts perturbed.jsonl --out {args.pairs}")
    store = PairStore(args.pairs)
    if os.path.normpath(store.meta["model"]) not in (os.path.normpath(args.model), models.PRESETS.get(args.model)):
        print(f"note: the pairs in {args.pairs} were made by {store.meta['model']}, not {args.model}", file=sys.stderr)
    if args.negatives == "generated" and store.meta["negatives"] == "none":
        sys.exit(f"{args.pairs} holds winners only: take --negatives rand-positive or not-paired.")
    if args.negatives != "generated" and all(row["c"] == store.rows[0]["c"] for row in store.rows):
        sys.exit(f"--negatives {args.negatives} takes x_0_l from another prompt, but {args.pairs} has only one prompt.")
    if args.objective == "ddspo" and not args.winner and store.rows[0]["c_minus"] is None:
        sys.exit(f"{args.pairs} holds pairs of images without c_minus, which Eq. 7 needs: take --objective "
                 "diffusion-dpo or dspo, or --winner and --loser (Eq. 6).")
    shape, scale = models.latents_of(args.model)
    if shape != store.meta["latents"] or scale != store.meta["scale"]:
        sys.exit(f"--pairs {args.pairs} holds latents {store.meta['latents']} of scale {store.meta['scale']}, but "
                 f"{args.model} needs {shape} of {scale}: make its pairs with build_pairs.py --model {args.model}.")
    return store


def check_processes(args, world, device):
    args.precision = args.precision or ("fp16" if device.type == "cuda" else "fp32")
    if args.precision == "tf32" and device.type != "cuda":
        sys.exit("--precision tf32 is for NVIDIA GPUs: on a CPU take fp32.")
    if args.batch_size < world:
        sys.exit(f"--batch-size {args.batch_size} is too small for {world} processes: use fewer of them.")
    if args.fsdp and (world < 2 or args.batch_size % world):
        sys.exit("--fsdp divides the states among two or more processes (torchrun --nproc_per_node N), whose "
                 "number must divide --batch-size.")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help=f"{', '.join(models.PRESETS)}, a hub id or a diffusers folder")
    parser.add_argument("--task", choices=["alignment", "aesthetic"], default="alignment", help="Table 1 or Table 2: "
                        "which row of EXPERIMENTS gives the defaults, and which pairs")
    parser.add_argument("--pairs", help="the pair store (default: pairs/MODEL, for Table 2 pairs/MODEL-aesthetic)")
    parser.add_argument("--out", help="the run's folder (default: runs/ and model, task and method)")
    parser.add_argument("--objective", choices=["ddspo", "diffusion-dpo", "dspo", "sft"], default="ddspo",
                        help="Eq. 7 (or 6, see --winner), Eq. 4, DSPO, or the diffusion loss on one side of the pairs")
    parser.add_argument("--side", choices=["w", "l"], help="of --objective sft: train on x_0_w or on x_0_l")
    parser.add_argument("--winner", help="Eq. 6: the winning policy, a lora/ or pipeline/ folder (of --objective sft)")
    parser.add_argument("--loser", help="Eq. 6: the losing policy")
    parser.add_argument("--negatives", choices=["generated", "rand-positive", "not-paired"], default="generated",
                        help="Table 3b: x_0_l made from c_minus; or another prompt's winner, with that prompt as "
                             "c_minus, or with the pair's own c_minus")
    parser.add_argument("--lora-rank", type=int, help="0: all weights (default: 128 for SANA and SD3, else 0)")
    parser.add_argument("--beta", type=float, help="default: see EXPERIMENTS in train.py, as for the next four")
    parser.add_argument("--lr", type=float, help="final learning rate")
    parser.add_argument("--batch-size", type=int, help="pairs per update over all GPUs")
    parser.add_argument("--updates", type=int)
    parser.add_argument("--warmup", type=int, help="updates of linear warm-up")
    parser.add_argument("--micro-batch", type=int, help="pairs on a GPU at once (default: what fits in 24 GB)")
    parser.add_argument("--precision", choices=["fp32", "tf32", "fp16", "bf16"], help="default: fp16, on a CPU fp32")
    parser.add_argument("--checkpointing", action="store_true", help="less memory for a quarter more arithmetic")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--fsdp", action="store_true", help="divide weights and states among the GPUs (FSDP2)")
    parser.add_argument("--save-every", type=int, default=10, help="updates between checkpoints (guess)")
    parser.add_argument("--preview", type=int, help="draw four prompts every so many updates")
    parser.add_argument("--tensorboard", action="store_true", help="also write the log for TensorBoard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="only read all pairs and say what is wrong with them")
    parser.add_argument("--plot", metavar="LOG", help="only draw the curves of a log.jsonl")
    args = parser.parse_args(argv)
    if args.plot or not args.model:
        given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        if given != ["plot"]:
            parser.error("give --model, or --plot LOG and nothing else")
        return args

    eq7 = args.objective == "ddspo" and not args.winner and not args.loser
    for wrong, why in (
            (args.negatives != "generated" and not eq7, f"--negatives {args.negatives} is a variant of Eq. 7: it goes "
             "with --objective ddspo and without --winner and --loser"),
            ((args.side is None) == (args.objective == "sft"), "--side goes with --objective sft, and sft needs it"),
            ((args.winner is None) != (args.loser is None), "--winner and --loser go together: Eq. 6 needs both"),
            (args.winner and args.objective not in ("ddspo", "dspo"), "--winner and --loser are policies for "
             f"--objective ddspo or dspo: {args.objective} has none"),
            (args.beta is not None and args.objective == "sft", "--objective sft has no beta")):
        if wrong:
            sys.exit(why + ".")

    args.model = args.model.rstrip("/")
    if os.path.exists(os.path.join(args.model, models.LORA)):
        sys.exit(f"--model {args.model} is an adapter: give a whole model to be tuned.")
    name = os.path.basename(os.path.abspath(args.model)) + ("-aesthetic" if args.task == "aesthetic" else "")
    variant = args.objective if args.negatives == "generated" else args.negatives
    variant = f"{variant}-policies" if args.winner else f"sft-{args.side}" if args.side else variant
    args.out = args.out or os.path.join("runs", f"{name}-{variant}")
    for mark in ("model_index.json", "meta.json"):
        if os.path.exists(os.path.join(args.out, mark)):
            sys.exit(f"--out {args.out} is a model or a pair store: give another folder.")
    args.pairs = args.pairs or ("runs/shapes-0/pairs" if args.model == "shapes" else os.path.join("pairs", name))
    objective = "policies" if args.winner and args.objective == "ddspo" else args.objective
    preset = models.preset_of(args.model)
    rows = [key for key in EXPERIMENTS if key[2] == objective]  # this model and task; else this model; else the first
    rows.sort(key=lambda key: (key[0] != preset, key[:2] != (preset, args.task)))
    args.preset = " ".join(rows[0])
    defaults = dict(batch_size=2048, micro_batch=MICRO_BATCH.get(preset, 1), lora_rank=LORA_RANK.get(preset, 0))
    for key, value in (defaults | EXPERIMENTS[rows[0]]).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    check_flags(args, above_0=("beta", "lr"), updates=1, warmup=0, batch_size=1, micro_batch=1, save_every=1, seed=0,
                lora_rank=0, preview=1)
    if args.fsdp and (args.lora_rank or args.winner or args.preview or args.compile):
        sys.exit("--fsdp is for all weights (--lora-rank 0), without --winner, --loser, --preview and --compile.")
    return args


if __name__ == "__main__":
    main()
