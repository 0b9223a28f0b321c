"""Sec. 4 of DDSPO (arXiv 2512.23426): the settings of the paper's experiments, the defaults of train.py's flags."""

import argparse
import os

import torch

from lib import models

# A row is an experiment. Its numbers (beta, lr, updates, warmup) are from [p] the paper, [r] the authors' research
# scripts (github.com/dohyun-as/DDSPO a0f3bc9), [o] their released scripts (KU-MIIL/DDSPO f8e47a5), [d] the code of the
# baseline's authors (SalesforceAIResearch/DiffusionDPO 5233e75, huaishengzhu/DSPO 8b4e09b), or [g] our guess; one
# letter stands for all four. The batch is 2048 pairs [r, o]. They contradict each other: lr * beta = 0.08192 for beta
# from 2000 to 24000 [r], lr is proportional to beta [o's README]. Updates of SD-1.4: 100 [p], 500 (from 100 on
# evaluated) [r], 200 [o]. SDXL: AdamW [o], Adafactor [r]; t uniform [p], more small t [r], large t [o]. SANA: lr
# 8.192e-5 and rank 128 [o], 4.096e-5 (by lr * beta) and rank 512 or 1024 [r]; weight decay 1e-2 [o], 1e-4 [r].
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
    ("shapes", "alignment", "distill"):       dict(scale=2,    lr=3e-5,      updates=80,   warmup=0, batch_size=64),
}  # the numbers after # are the paper's tables; the last three rows: shapes.py
FAMILY = {"sd15": "sd14", "sd21": "sd14", "sana-1.6b": "sana"}  # a model without a row takes one of its family
# Pairs that 24 GB hold at once without --checkpointing (calculated); 1 for other models, of which SDXL, SD3 need more.
MICRO_BATCH = {"sd14": 2, "sd15": 2, "sd21": 2, "sana": 2, "sana-1.6b": 1, "shapes": 64}
LORA_RANK = {"sana": 128, "sana-1.6b": 128, "sd3": 128}  # where the authors' scripts use LoRA [o]
HALF = dict(fp16=torch.float16, bf16=torch.bfloat16)


def find_row(args):
    """The row of EXPERIMENTS for a run's defaults: of its model and task, else its model, else its family; or None."""
    preset = models.preset_of(args.model)
    objective = "policies" if args.winner and args.objective == "ddspo" else args.objective
    fitting = [key for key in EXPERIMENTS if key[2] == objective and
               FAMILY.get(key[0], key[0]) == FAMILY.get(preset, preset)]
    return min(fitting, key=lambda key: (key[0] != preset, key[1] != args.task), default=None)


def with_defaults(given):
    """train.py's flags, with those that are None filled in."""
    name = os.path.basename(os.path.abspath(given.model)) + ("-aesthetic" if given.task == "aesthetic" else "")
    method = given.objective if given.negatives == "generated" else given.negatives
    method += "-policies" if given.winner else f"-{given.side}" if given.side else ""
    preset = models.preset_of(given.model)
    defaults = dict(out=os.path.join("runs", f"{name}-{method}"), pairs=os.path.join("pairs", name), batch_size=2048,
                    updates=100, warmup=0, micro_batch=MICRO_BATCH.get(preset, 1), lora_rank=LORA_RANK.get(preset, 0))
    defaults |= EXPERIMENTS.get(find_row(given), {})
    return argparse.Namespace(**{name: defaults.get(name) if value is None else value
                                 for name, value in vars(given).items()})
