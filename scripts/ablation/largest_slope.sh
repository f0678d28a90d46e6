#!/usr/bin/env bash
# Ablation of AutoPrune: largest slope k0 (largest_slope.yaml, see docs/ablations.md). To run another sweep file:
#   .venv/bin/llava-prune sweep FILE
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune sweep \
    scripts/ablation/largest_slope.yaml --figure playground/results/figures/largest_slope "$@"
