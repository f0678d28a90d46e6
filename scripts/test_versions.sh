#!/usr/bin/env bash
# Run the tests with other versions of Python and transformers, each in an environment of its own (.venv-3.10 and so on).
#   bash scripts/test_versions.sh
#   PYTHONS="3.12" TRANSFORMERS="5.14.1 5.17.0" bash scripts/test_versions.sh tests/golden
# PYTHONS lists versions of Python (default: 3.10 to 3.13; one that is not on PATH counts as failed), TRANSFORMERS
# releases of transformers for the default Python (default: the oldest supported one). Arguments go to pytest.
# TORCH_SPEC is passed on, see scripts/setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
failed=()

check() {  # $1: name of the version, which is part of the name of its environment; the rest: arguments of pytest
    local version="$1"
    shift
    echo "== $version"
    export VENV="$PWD/.venv-$version" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    bash scripts/setup.sh dev && "$VENV/bin/python" -m pytest -q -n auto --maxprocesses 8 --dist worksteal "$@" ||
        failed+=("$version")
}

for version in ${PYTHONS-3.10 3.11 3.12 3.13}; do
    PYTHON="python$version" check "$version" "$@"
done
for release in ${TRANSFORMERS-5.14.1}; do
    TRANSFORMERS_SPEC="transformers==$release" check "transformers-$release" "$@"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
