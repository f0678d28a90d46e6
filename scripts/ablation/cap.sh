#!/usr/bin/env bash
# Ablation. AutoPrune, cap and ceiling of the retention curve: cap.yaml, see docs/ablations.md. Another file is run by
#   .venv/bin/llava-prune sweep FILE
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune sweep \
    scripts/ablation/cap.yaml --figure playground/results/figures/cap "$@"
