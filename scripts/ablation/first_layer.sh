#!/usr/bin/env bash
# Ablation of AutoPrune: the cut of the first layer (first_layer.yaml, see docs/ablations.md).
# To run another sweep file:
#   .venv/bin/llava-prune sweep FILE
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune sweep \
    scripts/ablation/first_layer.yaml --figure playground/results/figures/first_layer "$@"
