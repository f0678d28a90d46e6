#!/usr/bin/env bash
# Shared by the scripts of the benchmarks: set up the environment and run a benchmark. Usage: _run.sh BENCH [flags]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
VENV="${VENV:-$PWD/.venv}"
export VENV
bash scripts/setup.sh
exec "$VENV/bin/python" -m llava_prune eval "$@"
