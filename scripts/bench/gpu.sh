#!/usr/bin/env bash
# Benchmarks on a GPU. Times and memory of LLaVA-1.5-7B's shape at batch 1 and 16 and of LLaVA-NeXT-7B's at batch 1, with
# random weights in bfloat16 and sdpa, against the unpruned model: in plain torch, with fused cuts, with CUDA graphs, and
# with both (experimental; `full` with graphs shows what replaying gives without pruning). Then questions per second on
# the mini GQA with a random checkpoint of the 7B shape and answers of at most 2 tokens. It needs about 20 GB of GPU memory
# at batch 1, 40 GB at batch 16, and 14 GB of disk. Not tested.
#   bash scripts/bench/gpu.sh                         # sdpa
#   ATTN=flash_attention_2 bash scripts/bench/gpu.sh  # with the flash-attn package
# OUT is the folder for the results (default playground/results/bench/gpu); the checkpoint is written to OUT/checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
VENV="${VENV:-$PWD/.venv}"
export VENV DEVICE="${DEVICE:-cuda}" DTYPE="${DTYPE:-bfloat16}" METHOD="${METHOD:-autoprune,autoprune-flash}"
OUT="${OUT:-playground/results/bench/gpu}"
bash scripts/setup.sh
"$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "gpu.sh: no CUDA device; use scripts/bench/prefill.sh on a CPU" >&2; exit 1; }
bench() { "$VENV/bin/python" -m llava_prune bench --repeats "${REPEATS:-20}" --warmup "${WARMUP:-5}" "$@"; }
shapes() {  # $1: ending of the folders; then flags
    bench --shape 7b --batch 1,16 --tokens 192,128,64 --text 84 --new 32 --out "$OUT/7b$1" "${@:2}"
    bench --shape next-7b --batch 1 --tokens 640,320,160 --text 84 --new 32 --out "$OUT/next-7b$1" "${@:2}"
}
shapes "" --profile
shapes -fused --fused --profile --no-memory
export METHOD="full,$METHOD"
shapes -graphs --graphs --no-memory
shapes -graphs-fused --graphs --fused --no-memory

[ -e "$OUT/checkpoint/config.json" ] ||
    "$VENV/bin/python" -m llava_prune.bench.shapes 7b --out "$OUT/checkpoint" --tokenizer playground/models/llava-tiny
DTYPE=float16 METHOD=full,autoprune BATCH=1,8,auto TOKENS=64 "$VENV/bin/python" -m llava_prune.eval.rate \
    --model "$OUT/checkpoint" --max-new-tokens 2 --out "$OUT/questions.json"
