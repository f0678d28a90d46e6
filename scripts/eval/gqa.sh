#!/usr/bin/env bash
# GQA, pruned and unpruned. Every setting is an environment variable or the flag of the same name:
#   TOKENS=192,128,64 METHOD=autoprune,random bash scripts/eval/gqa.sh
#   bash scripts/eval/gqa.sh --model liuhaotian/llava-v1.5-7b --data playground/data/eval
# All visible GPUs are used, one process each: CUDA_VISIBLE_DEVICES=0,1 or GPUS=2, and PROCS=2 on the CPU; docs/scale.md.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune eval gqa "$@"
