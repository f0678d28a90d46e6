#!/usr/bin/env bash
# Every method at 50, 33 and 20 % of the FLOPs on nine benchmarks (equal_flops.yaml, see docs/results.md).
# Finished runs are not repeated. Without MODEL, the miniature model is used. LIMIT=100 evaluates the first 100
# questions of each benchmark.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune sweep \
    scripts/tables/equal_flops.yaml --figure playground/results/figures/equal_flops "$@"
