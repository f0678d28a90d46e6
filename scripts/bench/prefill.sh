#!/usr/bin/env bash
# Measure time and memory of pruned and unpruned requests, alternating between them. Settings are
# environment variables or flags of `llava-prune bench`:
#   SHAPE=300m METHOD=autoprune,autoprune-flash TOKENS=192,128,64 bash scripts/bench/prefill.sh
#   bash scripts/bench/prefill.sh --model liuhaotian/llava-v1.5-7b --batch 1,8 --profile
set -euo pipefail
export METHOD="${METHOD:-autoprune,autoprune-flash}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune bench "$@"
