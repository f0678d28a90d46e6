#!/usr/bin/env bash
# GQA, pruned and unpruned. Settings are environment variables or flags of the same name:
#   TOKENS=192,128,64 METHOD=autoprune,random bash scripts/eval/gqa.sh
#   bash scripts/eval/gqa.sh --model liuhaotian/llava-v1.5-7b --data playground/data/eval
# All visible GPUs are used, with one process each. Choose them with CUDA_VISIBLE_DEVICES=0,1 or GPUS=2; PROCS=2 starts
# two processes on the CPU. See docs/scale.md.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune eval gqa "$@"
