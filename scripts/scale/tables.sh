#!/usr/bin/env bash
# Predict the hours of the paper's four tables on 1 to 64 GPUs, from the rate of one GPU (llava-prune eval --dry-run
# shows yours) and the times of the answers in OUT of a finished evaluation:
#   bash scripts/scale/tables.sh playground/results/gqa/llava-tiny --rate-7b 10 --rate-13b 5
#   bash scripts/scale/tables.sh OUT --rate-7b 10 --rate-13b 5 --slow 0.5 --failures 0.01
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune.eval.scale tables "$@"
