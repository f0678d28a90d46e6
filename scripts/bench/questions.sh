#!/usr/bin/env bash
# Measure questions per second on GQA: the unpruned model and AutoPrune at batch 1, 8 and auto, and LLaVA's own
# llava.eval.model_vqa_loader, in turn, with the same model and questions in one process. Settings are environment
# variables or flags of `python -m llava_prune.eval.rate`:
#   TOKENS=64 BATCH=1,8,auto REPEATS=3 bash scripts/bench/questions.sh
#   bash scripts/bench/questions.sh --model liuhaotian/llava-v1.5-7b --data playground/data/eval --limit 400 --json
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune.eval.rate "$@"
