#!/usr/bin/env bash
# What a first GPU is asked, in parts of at most eight minutes, the most valuable first. docs/speed.md keeps the answers.
#
#   bash tests/gpu.sh a        one part on a GPU: a, b, c or d; wheels/, if there is one, holds packages it lacks
#   bash tests/gpu.sh a small  the same commands with small networks on a CPU
set -euo pipefail
cd "$(dirname "$0")/.."
part=$1 size=${2:-gpu}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [ "$size" = small ]; then
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
    unet="mid" others=("mid --lora-rank 2") flags="--seconds 1" compile="" steady=2 sampling="--steps 2" family="sd" few=4
else
    nvidia-smi --query-gpu=name,driver_version,power.limit --format=csv,noheader
    if [ -d wheels ]; then pip install -q --no-deps wheels/*.whl; fi
    unet="sd14" others=("sana --micro-batch 16 --lora-rank 128" sdxl) flags="--precision fp16 --seconds 60"
    compile="--compile" steady=180 sampling="--batch-size 32" family="sd14" few=64
fi
python -c 'import torch, diffusers, transformers as t; print("torch", torch.__version__, "diffusers", diffusers.__version__, "transformers", t.__version__)'
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A Stable Diffusion with random weights of the published size (small: of the tests' size), and prompts.
make_model() {
    python - "$family" "$work/model" <<'PYTHON'
import sys
sys.path.insert(0, "tests")
import tiny_models
sizes = tiny_models.SIZES["sd14"][1] if sys.argv[1] == "sd14" else {}
tiny_models.FAMILIES["sd"](**sizes).save_pretrained(sys.argv[2])
PYTHON
    python perturb.py examples/prompts.txt "$work/perturbed.jsonl"
    head -n "$few" "$work/perturbed.jsonl" > "$work/few.jsonl"
}

case $part in
a)  # the step beside the plain one: eager, then compiled, with a steady minute for each arm
    python tests/bench.py --model $unet --micro-batch 24 $flags
    python tests/bench.py --model $unet --micro-batch 24 $flags $compile --seconds $steady
    ;;
b)  # real training: the small model of this repository, stopped and resumed; then SD-1.4's size with two micro-batches
    make_model
    python build_pairs.py --model shapes --prompts "$work/perturbed.jsonl" --out "$work/shapes-pairs"
    shapes="python train.py --model shapes --pairs $work/shapes-pairs --save-every 1 --updates"
    $shapes 4 --out "$work/stopped"
    $shapes 8 --out "$work/stopped"
    $shapes 8 --out "$work/straight"
    python build_pairs.py --model "$work/model" --prompts "$work/few.jsonl" --out "$work/pairs" --steps 5
    for micro in 8 16; do
        python train.py --model "$work/model" --pairs "$work/pairs" --updates 3 --warmup 0 --batch-size 64 \
            --micro-batch $micro --out "$work/micro-$micro"
    done
    for run in stopped straight micro-8 micro-16; do
        echo "$run"
        python -c 'import json, sys; [print({k: json.loads(l).get(k) for k in ("update", "loss", "logit", "grad_norm", "loss_scale", "noise_floor", "pairs_per_second", "memory_gb")}) for l in open(sys.argv[1])]' "$work/$run/log.jsonl"
    done
    ;;
c)  # making pairs, eager and compiled; images of a benchmark, with their files
    make_model
    time python build_pairs.py --model "$work/model" --prompts "$work/few.jsonl" --out "$work/eager" $sampling
    if [ "$size" = gpu ]; then
        time python build_pairs.py --model "$work/model" --prompts "$work/few.jsonl" --out "$work/compiled" $sampling --compile
    fi
    time python evaluate.py generate --model "$work/model" --bench shapes --steps 2 --batch-size 32 --out "$work/images"
    ;;
d)  # SANA with LoRA, SDXL, and SD-1.4 with other micro-batches
    for model in "${others[@]}"; do
        python tests/bench.py --model $model $flags $compile
    done
    for micro in 8 16 32; do
        python tests/bench.py --model $unet $flags $compile --micro-batch $micro
    done
    ;;
*)  echo "give a part: a, b, c or d" >&2; exit 2 ;;
esac
