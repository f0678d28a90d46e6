#!/usr/bin/env bash
# Ablation. AutoPrune, lambda of equation (1): lambda.yaml, see docs/ablations.md. Another file is run by
#   .venv/bin/llava-prune sweep FILE
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune sweep \
    scripts/ablation/lambda.yaml --figure playground/results/figures/lambda "$@"
