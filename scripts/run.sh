#!/usr/bin/env bash
# Shared by the other scripts: set up the environment and run a module of it. Usage: run.sh MODULE [arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-$PWD/.venv}"
export VENV
bash scripts/setup.sh
exec "$VENV/bin/python" -m "$@"
