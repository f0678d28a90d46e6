#!/usr/bin/env bash
# Set up, lint, check types and run the tests, with one single-threaded worker for each core (WORKERS=0: no workers).
# Arguments go to pytest:
#   bash scripts/test.sh tests/eval -k resumes
#   bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-$PWD/.venv}"
export VENV
bash scripts/setup.sh dev
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m mypy llava_prune
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$VENV/bin/python" -m pytest -q -n "${WORKERS:-auto}" --maxprocesses 8 --dist worksteal "$@"
