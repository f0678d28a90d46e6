"""Run shell scripts that start programs of package llava, such as its scripts/v1_5/eval, with every model pruned."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

NAMES = ("python", "python3")
"""Commands by which scripts start Python."""


def package_folders() -> list[Path]:
    """Return the folders of package llava without importing it.

    Raises:
        ValueError: if the package is not installed.
    """
    spec = importlib.util.find_spec("llava")
    if spec is None:
        raise ValueError("package llava is not installed; pip install --no-deps llava-torch==1.2.2.post1")
    return [Path(folder) for folder in spec.submodule_search_locations or ()]


def pruned_modules() -> list[str]:
    """Return the modules of package llava that load a model when they run as programs, according to their source.

    Raises:
        ValueError: if the package is not installed.
    """
    out = []
    for folder in package_folders():
        for part in ("eval", "serve"):
            files = sorted((folder / part).glob("*.py"))
            out += [f"llava.{part}.{f.stem}" for f in files if "load_pretrained_model" in f.read_text(encoding="utf-8")]
    return out


def stand_in(flags: Sequence[str]) -> str:
    """Return a shell script that replaces `python`: it runs programs that load a model under `llava-prune run`.

    Args:
        flags: flags of `llava-prune run`.
    """
    python = shlex.quote(sys.executable)
    pruned = f"{python} -m llava_prune run {shlex.join(flags)} -- python"
    modules = "|".join(map(shlex.quote, pruned_modules()))
    return f"""#!/bin/sh
# Python of a script under `llava-prune run`
if [ "$1" = "-m" ]; then
    case "$2" in
        {modules}) exec {pruned} "$@" ;;
    esac
fi
exec {python} "$@"
"""


def run_script(words: Sequence[str], flags: Sequence[str]) -> int:
    """Run a command in which `python` is replaced by `stand_in`; return its exit status.

    Args:
        words: the command, such as ["bash", "scripts/v1_5/eval/gqa.sh"].
        flags: flags of `llava-prune run`.

    Raises:
        ValueError: if the command is not found, or package llava is not installed.
    """
    if shutil.which(words[0]) is None:
        raise ValueError(f"{words[0]}: no such command; give python -m llava.MODULE ..., or a script: bash FILE ...")
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            path = Path(folder) / name
            path.write_text(stand_in(flags), encoding="utf-8")
            path.chmod(0o755)
        env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
        done = subprocess.run(list(words), env=env, check=False)
    return done.returncode if done.returncode >= 0 else 128 - done.returncode
