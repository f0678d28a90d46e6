#!/usr/bin/env bash
# Table 1 of the paper. LLaVA-1.5-7B at an average of 128 and 64 visual tokens: seven methods on seven benchmarks.
# Finished runs are not repeated. Without MODEL, the miniature model is used as a demonstration. To reproduce the table:
#   MODEL=liuhaotian/llava-v1.5-7b DATA=playground/data/eval bash scripts/tables/table1.sh
# Settings are environment variables or flags of the same name; docs/reproduction.md describes them.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune table 1 "$@"
