"""Sec. 4 of DDSPO (arXiv 2512.23426): the settings of the paper's experiments, the defaults of train.py's flags."""

import argparse
import math
import os
import sys

import torch

from lib import models
from lib.files import UserError
from lib.processes import at_least

# A row is an experiment. Its numbers (beta, lr, updates, warmup) are from [p] the paper, [r] the authors' research
# scripts (github.com/dohyun-as/DDSPO a0f3bc9), [o] their released scripts (KU-MIIL/DDSPO f8e47a5), [d] the code of the
# baseline's authors (SalesforceAIResearch/DiffusionDPO 5233e75, huaishengzhu/DSPO 8b4e09b), or [g] our guess; one
# letter stands for all four. The batch is 2048 pairs [r, o]. The sources contradict each other: in [r], lr * beta =
# 0.08192 for beta from 2000 to 24000, but [o]'s README says that lr is proportional to beta. Updates of SD-1.4: 100
# [p], 500 (from 100 on evaluated) [r], 200 [o]. SDXL: AdamW [o], Adafactor [r]; t uniform [p], more small t [r], large
# t [o]. SANA: lr 8.192e-5 and rank 128 [o], 4.096e-5 (by lr * beta) and rank 512 or 1024 [r]; weight decay 1e-2 [o],
# 1e-4 [r].
EXPERIMENTS = {
    # model      task         objective              beta         lr             updates       warmup
    ("sd14",   "alignment", "ddspo"):         dict(beta=16000, lr=5.12e-6,   updates=100,  warmup=100),  # 1a, 3 [prpr]
    ("sd14",   "alignment", "diffusion-dpo"): dict(beta=8000,  lr=1.024e-5,  updates=100,  warmup=100),  # 1a [rrgr]
    ("sd14",   "alignment", "policies"):      dict(beta=8000,  lr=5.12e-6,   updates=100,  warmup=100),  # Eq. 6 [o]
    ("sd14",   "alignment", "sft"):           dict(            lr=1e-4,      updates=300,  warmup=0),    # Eq. 6 [o]
    ("sd14",   "aesthetic", "ddspo"):         dict(beta=16000, lr=5.12e-6,   updates=100,  warmup=100),  # 3a [pgpg]
    ("sd15",   "aesthetic", "ddspo"):         dict(beta=16000, lr=5.12e-6,   updates=100,  warmup=100),  # 2a [prpr]
    ("sd15",   "aesthetic", "diffusion-dpo"): dict(beta=5000,  lr=2.048e-5,  updates=2000, warmup=500),  # 2a [d]
    ("sd15",   "aesthetic", "dspo"):          dict(beta=0.001, lr=2.048e-5,  updates=2000, warmup=500),  # [d]
    ("sdxl",   "alignment", "ddspo"):         dict(beta=16000, lr=5.12e-6,   updates=500,  warmup=100),  # 1b, 1c [prrr]
    ("sdxl",   "alignment", "diffusion-dpo"): dict(beta=12000, lr=6.7584e-6, updates=500,  warmup=100),  # [rrgg]
    ("sdxl",   "aesthetic", "ddspo"):         dict(beta=16000, lr=5.12e-6,   updates=500,  warmup=100),  # 2b [pggg]
    ("sdxl",   "aesthetic", "diffusion-dpo"): dict(beta=5000,  lr=2.048e-5,  updates=2000, warmup=200),  # 2b [d]
    ("sana",   "alignment", "ddspo"):         dict(beta=2000,  lr=8.192e-5,  updates=500,  warmup=0),    # 1b [o]
    ("sd3",    "alignment", "ddspo"):         dict(beta=2000,  lr=8.192e-5,  updates=100,  warmup=0),    # [o]
    ("shapes", "alignment", "ddspo"):         dict(beta=1000,  lr=3e-5,      updates=80,   warmup=0, batch_size=64),
    ("shapes", "alignment", "diffusion-dpo"): dict(beta=1000,  lr=3e-5,      updates=80,   warmup=0, batch_size=64),
}  # the numbers after # are the paper's tables; the last two rows: shapes.py
FAMILY = {"sd15": "sd14", "sd21": "sd14", "sana-1.6b": "sana"}  # where a model has no row, one of its family fits
# Pairs that 24 GB hold at once without --checkpointing, 1 for other models (calculated, not measured; SDXL and SD3 do
# not fit there); and LoRA where the authors' scripts use it [o].
MICRO_BATCH = {"sd14": 2, "sd15": 2, "sd21": 2, "sana": 2, "sana-1.6b": 1, "shapes": 64}
LORA_RANK = {"sana": 128, "sana-1.6b": 128, "sd3": 128}
MEMORY = """GB on a GPU in fp16 or bf16, calculated and not measured (with --checkpointing in brackets):
sd14, sd15, sd21  18, and 2.6 (0.4) for each pair of --micro-batch    with LoRA   3, and 2.6 (0.4)
sdxl              53, and  18 (1.5)                                   with LoRA   9, and  18 (1.5)
sana                                                                  with LoRA   8, and   6 (0.4)
sana-1.6b                                                             with LoRA  10, and   9 (0.7)
sd3                                                                   with LoRA  16, and  17 (1.1)
--fsdp divides most of it among the GPUs; each process then takes 4 bytes a weight of the host's memory at the start."""


def find_row(args):
    """The row of EXPERIMENTS that gives a run's defaults: of its model and task, else of its model's other task, else
    of a model of its family; or None."""
    preset, objective = models.preset_of(args.model), args.objective
    objective = "policies" if args.winner and objective == "ddspo" else objective
    fitting = [key for key in EXPERIMENTS if key[2] == objective and
               FAMILY.get(key[0], key[0]) == FAMILY.get(preset, preset)]
    return min(fitting, key=lambda key: (key[0] != preset, key[1] != args.task), default=None)


def parse(argv):
    """train.py's flags, with those that are not given filled in from EXPERIMENTS."""
    parser = argparse.ArgumentParser(prog="train.py", usage="train.py --model MODEL [flags]", allow_abbrev=False,
                                     description="Tunes a text-to-image model with DDSPO (Eq. 7 or 6) or a baseline.",
                                     epilog=MEMORY, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"{', '.join(models.PRESETS)}, a hub id or a diffusers folder")
    parser.add_argument("--task", choices=["alignment", "aesthetic"], default="alignment",
                        help="of Table 1 or of Table 2: chooses the defaults and the pairs")
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
    parser.add_argument("--beta", type=at_least(1e-6, float, 1e6),  # guess, as are the bounds of --lr
                        help="this and the next six: see EXPERIMENTS in experiments.py")
    parser.add_argument("--lr", type=at_least(1e-12, float, 0.1), help="final learning rate")
    parser.add_argument("--updates", type=at_least(1))
    parser.add_argument("--warmup", type=at_least(0), help="updates of linear warm-up")
    parser.add_argument("--batch-size", type=at_least(1), help="pairs per update over all GPUs")
    parser.add_argument("--lora-rank", type=at_least(0), help="0: all weights (default: 128 for SANA and SD3, else 0)")
    parser.add_argument("--micro-batch", type=at_least(1), help="pairs on a GPU at once (default: what 24 GB hold)")
    parser.add_argument("--precision", choices=["fp32", "tf32", "fp16", "bf16"], help="default: on a CPU fp32; else "
                        "bf16 if the network is stored in it, or fp16")
    parser.add_argument("--checkpointing", action="store_true", help="less memory for a quarter more arithmetic")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks, on a GPU")
    parser.add_argument("--fsdp", action="store_true", help="divide weights and states among the GPUs (FSDP2)")
    parser.add_argument("--save-every", type=at_least(1), default=10, help="updates between checkpoints (default: 10, "
                        "guess)")
    parser.add_argument("--preview", type=at_least(1), help="draw four prompts every so many updates")
    parser.add_argument("--tensorboard", action="store_true", help="also write the log for TensorBoard")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the order of pairs, t and noise (default: 0)")
    args = parser.parse_args(argv)
    args.model = args.model.rstrip("/")

    name = os.path.basename(os.path.abspath(args.model)) + ("-aesthetic" if args.task == "aesthetic" else "")
    method = args.objective if args.negatives == "generated" else args.negatives
    method += "-policies" if args.winner else f"-{args.side}" if args.side else ""
    args.out = args.out or os.path.join("runs", f"{name}-{method}")
    args.pairs = args.pairs or os.path.join("pairs", name)
    preset, row = models.preset_of(args.model), EXPERIMENTS.get(find_row(args), {})
    defaults = dict(batch_size=2048, updates=100, warmup=0, micro_batch=MICRO_BATCH.get(preset, 1),
                    lora_rank=LORA_RANK.get(preset, 0)) | row
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    check(args)
    return args


def needs_c_minus(args):
    """Whether the loss asks for c_minus, as that of Eq. 7 does."""
    return args.objective == "ddspo" and not args.winner


def check(args):
    """Raises UserError if flags do not go together, if a run would come to nothing, or if this machine cannot do it."""
    if os.path.exists(os.path.join(args.model, models.LORA)):
        raise UserError(f"--model {args.model} is an adapter: give a whole model to be tuned.")
    if args.negatives != "generated" and not needs_c_minus(args):
        raise UserError(f"--negatives {args.negatives} is a variant of Eq. 7: take --objective ddspo and no --winner.")
    if (args.side is None) == (args.objective == "sft"):
        raise UserError("--side goes with --objective sft, and sft needs it.")
    if (args.winner is None) != (args.loser is None):
        raise UserError("--winner and --loser go together: Eq. 6 needs both.")
    if args.winner and args.objective not in ("ddspo", "dspo"):
        raise UserError(f"--winner and --loser go with --objective ddspo or dspo: {args.objective} has none.")
    if args.beta is not None and args.objective == "sft":
        raise UserError("--objective sft has no beta.")
    missing = [f"--{key}" for key in ("beta", "lr")
               if getattr(args, key) is None and (key, args.objective) != ("beta", "sft")]
    if missing:
        raise UserError(f"EXPERIMENTS has no row for {args.model} with --objective {args.objective}"
                        + " and policies" * bool(args.winner) + f": give {' and '.join(missing)}.")
    if args.warmup > args.updates:
        raise UserError(f"--warmup {args.warmup} is longer than the run of {args.updates} updates, which would end at "
                        f"{args.updates / args.warmup:.2g} of --lr: give a --warmup of at most --updates.")
    for mark in ("model_index.json", "meta.json"):
        if os.path.exists(os.path.join(args.out, mark)):
            raise UserError(f"--out {args.out} is a model or a pair store: give another folder.")
    world, gpu = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    if args.precision == "tf32" and not gpu:
        raise UserError("--precision tf32 is for NVIDIA GPUs: on a CPU take fp32.")
    if args.compile and not gpu:
        raise UserError("--compile is for GPUs: on a CPU, torch 2.13 loses the gradient of a U-Net's downsampling.")
    if args.batch_size < world:
        raise UserError(f"--batch-size {args.batch_size} is too small for {world} processes: use fewer of them.")
    if args.fsdp and (args.lora_rank or args.winner or args.preview or args.compile or world < 2
                      or args.batch_size % world):
        raise UserError("--fsdp is for all weights (--lora-rank 0) on two or more processes (torchrun --nproc_per_node "
                        "N), N a divisor of --batch-size, without --winner, --loser, --preview and --compile.")


def announce(args, model, store, update, floor, world):
    """Prints what a run will do."""
    pairs, parts, row = len(store), math.ceil(args.batch_size / world / args.micro_batch), find_row(args)
    print(f"{args.objective} on {pairs} pairs, from update {update} of {args.updates} ({args.batch_size} pairs each, "
          f"{args.updates * args.batch_size / pairs:.3g} epochs); {world} process{'es' * (world > 1)} with {parts} "
          f"micro-batch{'es' * (parts > 1)} of up to {args.micro_batch}; "
          + (f"beta {args.beta:g}, " if args.beta else "") + f"lr {args.lr:g} after {args.warmup} updates of warm-up; "
          f"{args.precision}; what was not given is from "
          + (f"the experiment nearest to this model, {' '.join(row)}" if row else "no experiment of the paper"))
    prompts = [text for row in store.rows for text in (row["c"], row["c_minus"]) if text is not None]
    too_long = models.count_too_long(model, prompts)
    if too_long:
        print(f"note: the model reads {too_long} of {len(prompts)} prompts not to their end", file=sys.stderr)
    if pairs < args.batch_size:
        advice = (" For few pairs, shapes.py's batch and updates and twice the paper's rate are a start (guess): "
                  "--batch-size 64 --updates 80 --lr 1e-05 --warmup 0") if args.batch_size > 64 else ""
        print(f"note: {pairs} pairs are fewer than a batch: an update sees each {args.batch_size / pairs:.3g} times, "
              f"with another t and noise each time.{advice}", file=sys.stderr)
    if floor is not None:
        print(f"rounding in {args.precision} lowers each logit by about {floor:.2g}")
        if floor > 0.05:
            print("note: that is more than 0.05 and hides small preferences: take fp16 in place of bf16, or "
                  "--precision fp32, or a smaller --beta", file=sys.stderr)
