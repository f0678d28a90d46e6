#!/usr/bin/env bash
# Ablation. AutoPrune, position ids: positions.yaml, see docs/ablations.md. Another file is run by
#   .venv/bin/llava-prune sweep FILE
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune sweep \
    scripts/ablation/positions.yaml --figure playground/results/figures/positions "$@"
