#!/usr/bin/env bash
# Questions per second on GQA of the unpruned model, of AutoPrune at batch 1, 8 and auto, and of LLaVA's own
# llava.eval.model_vqa_loader, in turn, with the same model and questions in one process. Settings are environment
# variables or flags of `python -m llava_prune.eval.rate`:
#   TOKENS=64 BATCH=1,8,auto REPEATS=3 bash scripts/bench/questions.sh
#   bash scripts/bench/questions.sh --model liuhaotian/llava-v1.5-7b --data playground/data/eval --limit 400 --json
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune.eval.rate "$@"
