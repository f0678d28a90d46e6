#!/usr/bin/env bash
# Run an evaluation in 1, 2 and 4 processes on this machine, in turn, and compare the times with a simulation:
#   bash scripts/scale/check.sh gqa
#   bash scripts/scale/check.sh all --procs 2,4 --repeats 3
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune.eval.scale check "$@"
