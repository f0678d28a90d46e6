#!/usr/bin/env bash
# Table 1 of the paper. LLaVA-1.5-7B at an average of 128 and 64 visual tokens: seven methods on seven benchmarks.
# What is finished already is not repeated. Without a model it is a demonstration on the miniature one; the reproduction is
#   MODEL=liuhaotian/llava-v1.5-7b DATA=playground/data/eval bash scripts/tables/table1.sh
# Every setting is an environment variable or the flag of the same name; docs/reproduction.md describes them.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune table 1 "$@"
