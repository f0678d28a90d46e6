#!/usr/bin/env bash
# Every benchmark whose data are present, pruned and unpruned, with a summary table at the end. Settings as in gqa.sh:
#   TOKENS=192,128,64 METHOD=autoprune,random bash scripts/eval/all.sh
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune eval all "$@"
