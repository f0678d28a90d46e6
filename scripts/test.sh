#!/usr/bin/env bash
# Set up, lint, check types and run the tests. Arguments go to pytest:
#   bash scripts/test.sh tests/eval -k resumes
#   bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-$PWD/.venv}"
export VENV
bash scripts/setup.sh dev
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m mypy llava_prune
exec "$VENV/bin/python" -m pytest -q "$@"
