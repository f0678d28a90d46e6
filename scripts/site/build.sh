#!/usr/bin/env bash
# Build the documentation site into site/, in a separate environment. Warnings are errors.
#   bash scripts/site/build.sh            # site/index.html
#   bash scripts/site/build.sh serve      # http://127.0.0.1:8000, rebuilt on changes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
SITE="$PWD/.venv-site"
if [ ! -e "$SITE/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$SITE"
    "$SITE/bin/python" -m pip install --quiet --disable-pip-version-check \
        "mkdocs==1.6.1" "mkdocs-material==9.8.2" "mkdocstrings[python]==1.0.8"
    touch "$SITE/.ready"
fi
exec "$SITE/bin/python" -m mkdocs "${1:-build}" --strict
