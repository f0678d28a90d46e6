#!/usr/bin/env bash
# Table 4 of the paper. LLaVA-1.5-13B at an average of 288, 144 and 58 visual tokens: four methods on five benchmarks.
# Finished runs are not repeated. Without MODEL, the miniature model is used as a demonstration. To reproduce the table:
#   MODEL=liuhaotian/llava-v1.5-13b DATA=playground/data/eval bash scripts/tables/table4.sh
# Settings are environment variables or flags of the same name; docs/reproduction.md describes them.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune table 4 "$@"
