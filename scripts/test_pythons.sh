#!/usr/bin/env bash
# Run the tests with several versions of Python, each in an environment of its own (.venv-3.10 and so on).
#   PYTHONS="3.10 3.12" bash scripts/test_pythons.sh tests/golden
# PYTHONS lists the versions (default: 3.10 to 3.13). A version that is not on PATH counts as failed.
# Arguments go to pytest. TORCH_SPEC is passed on, see scripts/setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
failed=()
for version in ${PYTHONS:-3.10 3.11 3.12 3.13}; do
    echo "== Python $version"
    if ! "python$version" -c "" 2>/dev/null; then
        echo "python$version is not on PATH"
        failed+=("$version")
    elif ! PYTHON="python$version" VENV="$PWD/.venv-$version" bash scripts/test.sh "$@"; then
        failed+=("$version")
    fi
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
