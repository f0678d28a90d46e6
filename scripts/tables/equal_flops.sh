#!/usr/bin/env bash
# Every method at 50, 33 and 20 % of the FLOPs, on nine benchmarks: equal_flops.yaml, see docs/results.md.
# What is finished already is not repeated. Without a model it runs on the miniature one; LIMIT=100 takes the first 100
# questions of each benchmark.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune sweep \
    scripts/tables/equal_flops.yaml --figure playground/results/figures/equal_flops "$@"
