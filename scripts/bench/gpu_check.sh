#!/usr/bin/env bash
# Check and measure this package on a machine with a GPU, in at most 8 minutes. Stages run in order of value, each in
# processes of its own. A process has a time limit, extended by the time that earlier ones did not need, and writes
# OUT/<stage>.json after every measurement. Weights are random and made on the GPU. No network, virtual environment or
# installation is needed, only a Python with torch, transformers, pytest and hypothesis, triton for the kernels, and
# about 45 GB of GPU memory. The GPU's settings are read but never changed.
# docs/performance.md and scripts/bench/gpu_check.py describe the stages.
#   bash scripts/bench/gpu_check.sh
#   STAGES="a b c" OUT=results bash scripts/bench/gpu_check.sh
#   WHEELS=wheels bash scripts/bench/gpu_check.sh                      # wheels of missing packages are in ./wheels
#   DEVICE=cpu SHAPE=tiny bash scripts/bench/gpu_check.sh              # a rehearsal without a GPU
# TIME_LIMIT is the time limit of all stages in seconds (default 480), PYTHON the interpreter (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON="${PYTHON:-python3}" DEVICE="${DEVICE:-cuda}" SHAPE="${SHAPE:-7b}" STAGES="${STAGES:-a b c d e f}"
OUT="${OUT:-playground/results/bench/gpu}" TIME_LIMIT="${TIME_LIMIT:-480}"
SECONDS=0
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
: >"$OUT/log.txt"
if [ -n "${WHEELS:-}" ]; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl \
        >>"$OUT/log.txt" 2>&1 || echo "gpu_check.sh: the wheels in $WHEELS cannot be installed, see $OUT/log.txt" >&2
    export PYTHONPATH="$PYTHONPATH:$site"
fi
check() { "$PYTHON" scripts/bench/gpu_check.py "$@"; }
plan="$(check stages "$STAGES")"
spare=0 # seconds that earlier processes did not need
while read -r stage limit; do
    left=$((TIME_LIMIT - SECONDS))
    if [ "$left" -lt 10 ]; then
        echo "gpu_check.sh: no time left for stage $stage" >&2
        continue
    fi
    limit=$((limit + spare))
    [ "$limit" -le "$left" ] || limit="$left"
    began="$SECONDS" status=0
    echo "== stage $stage" >>"$OUT/log.txt"
    timeout --signal=KILL "$limit" "$PYTHON" scripts/bench/gpu_check.py "$stage" --out "$OUT" --device "$DEVICE" \
        --shape "$SHAPE" </dev/null >>"$OUT/log.txt" 2>&1 || status=$?
    spare=$((limit - SECONDS + began))
    [ "$spare" -gt 0 ] || spare=0
    echo "stage $stage: status $status, $((SECONDS - began)) of $limit s"
done <<<"$plan"
check table --out "$OUT"
