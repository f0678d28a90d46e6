#!/usr/bin/env bash
# MME, pruned and unpruned. Settings are environment variables or flags of the same name:
#   TOKENS=192,128,64 METHOD=autoprune,random bash scripts/eval/mme.sh
#   bash scripts/eval/mme.sh --model liuhaotian/llava-v1.5-7b --data playground/data/eval
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune eval mme "$@"
