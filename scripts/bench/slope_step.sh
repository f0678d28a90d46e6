#!/usr/bin/env bash
# Compare AutoPrune's exact slope with slopes rounded to a step: number of schedules, kept tokens, answers and accuracy.
#   STEP=0.05 METHOD=autoprune TOKENS=192,128,64 bash scripts/bench/slope_step.sh
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune.eval.rounding "$@"
