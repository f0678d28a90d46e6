#!/usr/bin/env bash
# What a GPU should show: LLaVA-1.5-7B's shape at batch 1 and 16 and LLaVA-NeXT-7B's at batch 1, as ever, with fused cuts,
# replayed as CUDA graphs, and both, random weights in bfloat16, against the unpruned model with sdpa (`full` among the
# replayed ones says what replaying alone gives); then questions per second on the mini GQA with a random checkpoint of
# the 7B shape, answers of at most 2 tokens. About 20 GB of GPU memory at batch 1, 40 GB at batch 16, 14 GB of disk.
# This script has not been run: no GPU was at hand.
#   bash scripts/bench/gpu.sh                         # sdpa
#   ATTN=flash_attention_2 bash scripts/bench/gpu.sh  # with the flash-attn package
# OUT is the folder of the results (default playground/results/bench/gpu); the checkpoint is made in OUT/checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
VENV="${VENV:-$PWD/.venv}"
export VENV DEVICE="${DEVICE:-cuda}" DTYPE="${DTYPE:-bfloat16}" METHOD="${METHOD:-autoprune,autoprune-flash}"
OUT="${OUT:-playground/results/bench/gpu}"
bash scripts/setup.sh
"$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "gpu.sh: no CUDA device; scripts/bench/prefill.sh runs on a CPU" >&2; exit 1; }
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
