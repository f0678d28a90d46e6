#!/usr/bin/env bash
# Create or repair the virtual environment. Usage: bash scripts/setup.sh [dev]
# It can be run any number of times and returns at once if nothing has changed.
#   PYTHON      base interpreter, 3.10 to 3.13 (default: the first suitable one on PATH)
#   VENV        folder of the environment (default: .venv in the root of this checkout)
#   TORCH_SPEC  pip requirement for torch, e.g. "torch==2.13.0" (default: chosen below)
#   TRANSFORMERS_SPEC  pip requirement for transformers, e.g. "transformers==5.14.1" (default: see constraints.txt)
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
EXTRA="${1:-}"
TORCH_VERSION=2.13.0
LLAVA_SPEC=llava-torch==1.2.2.post1

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

case "$EXTRA" in "" | dev) ;; *) die "unknown argument '$EXTRA'; the only one is 'dev' (tools for the tests)" ;; esac

suitable() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        suitable "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.10 to 3.13; name one, e.g. PYTHON=python3.11"
        BASE="$PYTHON"
        return
    fi
    for name in python3 python3.11 python3.12 python3.13 python3.10 python; do
        if suitable "$name"; then BASE="$name"; return; fi
    done
    die "no Python 3.10 to 3.13 on PATH; install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

# Print a key that changes whenever the environment must be created again.
key() {
    SPECS="${TORCH_SPEC:-} ${TRANSFORMERS_SPEC:-}" "$BASE" - "$ROOT" "$VENV" <<'PY'
import hashlib, os, pathlib, sys
root = pathlib.Path(sys.argv[1])
h = hashlib.sha256(repr((sys.argv[1:], sys.version, os.environ["SPECS"])).encode())
for name in ("setup.py", "pyproject.toml", "constraints.txt", "scripts/setup.sh"):
    h.update((root / name).read_bytes())
print(h.hexdigest())
PY
}

ready() {  # whether the environment is up to date; $1: the extra
    [ -x "$VENV/bin/python" ] && [ ! -e "$VENV/.unfinished" ] && [ "$(cat "$VENV/.ready-$1" 2>/dev/null)" = "$KEY" ]
}

has_cuda_torch() {
    "$BASE" - 2>/dev/null <<'PY'
import sys, torch
version = tuple(int(v) for v in torch.__version__.split("+")[0].split(".")[:2])
sys.exit(0 if torch.version.cuda and version >= (2, 4) else 1)
PY
}

# pip warns about the old pins in llava-torch's metadata whenever it is installed already; that is expected.
pip_install() {
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" \
        2> >(grep -vE "llava-torch .* requires|dependency resolver does not currently" >&2)
}

# Install the CPU build unless there is a GPU: on Linux x86 the default build brings gigabytes of CUDA libraries.
install_torch() {
    if [ -n "${TORCH_SPEC:-}" ]; then
        pip_install $TORCH_SPEC
    elif [ "$SITE" = yes ]; then
        say "using the CUDA torch of $BASE"
    elif nvidia-smi >/dev/null 2>&1 || [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
        pip_install "torch==$TORCH_VERSION"
    else
        pip_install "torch==$TORCH_VERSION+cpu" 2>/dev/null ||
            pip_install --index-url https://download.pytorch.org/whl/cpu "torch==$TORCH_VERSION" 2>/dev/null ||
            pip_install "torch==$TORCH_VERSION"
    fi
}

make_venv() {
    # Only an environment made by this script is ever removed.
    if [ -e "$VENV" ] && [ -n "$(ls -A "$VENV" 2>/dev/null)" ]; then
        [ -e "$VENV/.made-by-setup" ] || die "$VENV exists and was not made by this script; move it away or set VENV"
        local now wanted
        wanted="$("$BASE" -c 'import sys; print(sys.version)') $SITE"
        now="$(cat "$VENV/.made-by-setup")"
        if [ -e "$VENV/.unfinished" ] || [ "$now" != "$wanted" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
            say "remaking the environment (unfinished, or made for another Python)"
            rm -rf "$VENV"
        fi
    fi
    if [ ! -x "$VENV/bin/python" ]; then
        mkdir -p "$VENV"
        : >"$VENV/.made-by-setup"
        : >"$VENV/.unfinished"
        local site=()
        [ "$SITE" = no ] || site=(--system-site-packages)
        "$BASE" -m venv ${site[@]+"${site[@]}"} "$VENV" || die "'$BASE -m venv' failed; on Debian install python3-venv"
        echo "$("$BASE" -c 'import sys; print(sys.version)') $SITE" >"$VENV/.made-by-setup"
    fi
    : >"$VENV/.unfinished"
}

fill_venv() {  # chained with &&, since `fill_venv || ...` turns "set -e" off inside the function
    say "1 of 3: torch" && install_torch &&
        say "2 of 3: llava-prune and what it needs" &&
        pip_install -c "$ROOT/constraints.txt" setuptools wheel &&
        pip_install -c "$ROOT/constraints.txt" --no-build-isolation -e "$ROOT[llava,report${EXTRA:+,$EXTRA}]" &&
        { [ -z "${TRANSFORMERS_SPEC:-}" ] || pip_install $TRANSFORMERS_SPEC; } &&
        say "3 of 3: package llava" &&
        pip_install --no-deps "$LLAVA_SPEC" &&  # its metadata pins torch 2.0.1, but it works with this version
        (cd / && "$VENV/bin/python" -c 'import llava_prune; llava_prune.load, llava_prune.attach')
}

find_python
KEY="$(key)"
if ready "$EXTRA"; then exit 0; fi
if command -v flock >/dev/null 2>&1; then  # of two set-ups at once, the second waits and finds the work done
    exec 9>"$VENV.lock"
    flock 9
    if ready "$EXTRA"; then exit 0; fi
fi
say "making $VENV (some minutes the first time)"
SITE=no
if [ -z "${TORCH_SPEC:-}" ] && has_cuda_torch; then SITE=yes; fi
make_venv
fill_venv || die "installation failed, see above; the next call repairs it (TORCH_SPEC=torch==$TORCH_VERSION names another build)"
rm -f "$VENV"/.ready-*
echo "$KEY" >"$VENV/.ready-"
if [ -n "$EXTRA" ]; then echo "$KEY" >"$VENV/.ready-$EXTRA"; fi
rm -f "$VENV/.unfinished"
say "ready"
