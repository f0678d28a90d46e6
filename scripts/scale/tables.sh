#!/usr/bin/env bash
# Predict the hours for the paper's four tables on 1 to 64 GPUs, from the answers per second of one GPU (shown by
# llava-prune eval --dry-run) and the answer times of a finished evaluation in OUT:
#   bash scripts/scale/tables.sh playground/results/gqa/llava-tiny --rate-7b 10 --rate-13b 5
#   bash scripts/scale/tables.sh OUT --rate-7b 10 --rate-13b 5 --slow 0.5 --failures 0.01
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune.eval.scale tables "$@"
