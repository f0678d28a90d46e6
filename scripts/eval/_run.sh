#!/usr/bin/env bash
# What the scripts of the benchmarks share: _run.sh BENCH [flags]. Makes the environment, then runs the benchmark.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
VENV="${VENV:-$PWD/.venv}"
export VENV
bash scripts/setup.sh
exec "$VENV/bin/python" -m llava_prune eval "$@"
