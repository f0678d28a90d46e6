#!/usr/bin/env bash
# Ablation of AutoPrune: lambda of equation (1) (lambda.yaml, see docs/ablations.md). To run another sweep file:
#   .venv/bin/llava-prune sweep FILE
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune sweep \
    scripts/ablation/lambda.yaml --figure playground/results/figures/lambda "$@"
