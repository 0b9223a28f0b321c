"""Stable Diffusion 1.4 at full size, with random weights, in the layout of its published folder, and README.md's four
commands on it, offline: prompts, two pairs, one update, a grid.

    python tests/published.py FOLDER            (9 minutes and 18 GB of memory on two CPU cores; 18 GB of disk)
    python tests/published.py FOLDER --small    (half a minute: the same with a network of 2 MB)

It says how long each command took and how much memory it needed. What it cannot show is what the real weights do.
"""

import argparse
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import tiny_models
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {"perturb.py": "--limit 2", "build_pairs.py": "--steps 2 --batch-size 2",
         "train.py": "--updates 1 --warmup 0 --batch-size 2 --micro-batch 1", "evaluate.py": "--steps 2"}


def stable_diffusion():
    """tiny_models.sd in the sizes of SD-1.4. The first tokens of its vocabulary are single characters."""
    small = tiny_models.sd()
    vocabulary = small.tokenizer.get_vocab()
    *characters, start, end = sorted(vocabulary, key=vocabulary.get)
    words = [*characters, *[f"word{i}</w>" for i in range(49406 - len(characters))], start, end]
    large = dict(
        tokenizer=transformers.CLIPTokenizer({word: i for i, word in enumerate(words)}, [], pad_token=end,
                                             model_max_length=77),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            bos_token_id=49406, eos_token_id=49407, projection_dim=768)),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4),
        unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8))
    return diffusers.StableDiffusionPipeline(**small.components | large, requires_safety_checker=False)


def lay_out(cache, small):
    """The hub's cache with the model as this project fetches it."""
    home = cache / "models--CompVis--stable-diffusion-v1-4"
    folder = home / "snapshots" / ("a" * 40)
    torch.manual_seed(0)
    (tiny_models.sd() if small else stable_diffusion()).save_pretrained(folder)
    tiny_models.as_published(folder)
    for path in [*folder.glob("*/*.fp16.*"), *folder.glob("*/*.non_ema.*")]:  # which it does not fetch
        path.unlink()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    return folder


def commands():
    """README.md's first command of each program with sd14, and what makes it short."""
    text = (ROOT / "README.md").read_text()
    for name, flags in FLAGS.items():
        command = re.search(rf"^(?:python|torchrun) {name} (?!.*diffusiondb).*$", text, re.MULTILINE)[0].split("#")[0]
        program, script, *rest = shlex.split(command)
        start = [sys.executable] if program == "python" else [sys.executable, "-m", "torch.distributed.run"]
        yield command.strip(), [*start, str(ROOT / script), *rest, *flags.split()]


def main():
    parser = argparse.ArgumentParser(usage="published.py FOLDER [--small]", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    work, cache = args.folder.resolve() / "work", args.folder.resolve() / "cache"
    work.mkdir(parents=True)
    (work / "examples").symlink_to(ROOT / "examples")
    source = lay_out(cache, args.small)
    for said, command in commands():
        since = time.monotonic()
        subprocess.run(command, cwd=work, env=os.environ | dict(HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1"), check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # of all so far, in GB on Linux
        print(f"== {said}: {time.monotonic() - since:.0f} s, at most {peak:.1f} GB so far", flush=True)
    result, = work.glob("runs/*/pipeline")
    for path in source.glob("*/*"):
        if path.parent.name != "unet" and (result / path.relative_to(source)).read_bytes() != path.read_bytes():
            sys.exit(f"{path.relative_to(source)} of the result is not that of the source")
    diffusers.DiffusionPipeline.from_pretrained(result)
    print("the result has the source's own files but for its network, and diffusers loads it")


if __name__ == "__main__":
    main()
