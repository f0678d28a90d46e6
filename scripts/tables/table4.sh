#!/usr/bin/env bash
# Table 4 of the paper. LLaVA-1.5-13B at an average of 288, 144 and 58 visual tokens: four methods on five benchmarks.
# What is finished already is not repeated. Without a model it is a demonstration on the miniature one; the reproduction is
#   MODEL=liuhaotian/llava-v1.5-13b DATA=playground/data/eval bash scripts/tables/table4.sh
# Every setting is an environment variable or the flag of the same name; docs/reproduction.md describes them.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune table 4 "$@"
