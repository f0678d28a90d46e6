#!/usr/bin/env bash
# Set up the environment and run a Python module in it; used by the other scripts. Usage: run.sh MODULE [arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-$PWD/.venv}"
export VENV
bash scripts/setup.sh
exec "$VENV/bin/python" -m "$@"
