#!/usr/bin/env bash
# Shared by the scripts of the tables: set up the environment and run a table. Usage: _run.sh NAME [flags]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
VENV="${VENV:-$PWD/.venv}"
export VENV
bash scripts/setup.sh
exec "$VENV/bin/python" -m llava_prune table "$@"
