"""The sbatch file runs with stand-ins for Slurm's commands, as one node and as two local nodes."""

from __future__ import annotations

import argparse
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llava_prune.eval.answers import ANSWERS

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "scripts" / "slurm" / "eval.sbatch"
SRUN = """#!/usr/bin/env bash
pids=()
for _ in $(seq "$SLURM_NNODES"); do "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
exit $status
"""


def test_directives() -> None:
    """The file uses only options that sbatch has, each with a value of the right type."""
    text = FILE.read_text()
    given = re.findall(r"^#SBATCH (--\S+)$", text, re.MULTILINE)
    assert text.index("#SBATCH") < text.index("set -euo"), "sbatch stops reading at the first command"
    parser = argparse.ArgumentParser(exit_on_error=False)
    for name in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--time", type=lambda t: re.fullmatch(r"\d+:\d\d:\d\d", t)[0])  # type: ignore[index]
    parser.add_argument("--output", type=lambda t: re.fullmatch(r"[\w.-]*%j[\w.-]*", t)[0])  # type: ignore[index]
    parser.add_argument("--job-name")
    parser.add_argument("--requeue", action="store_true")
    found = parser.parse_args(given)
    assert found.ntasks_per_node == 1, "torchrun starts the processes of a node"


@pytest.mark.parametrize(("nodes", "procs"), [(1, 2), (2, 1)])
def test_the_sbatch_file_with_stand_ins(nodes: int, procs: int, tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", '#!/usr/bin/env bash\necho "localhost"\n')):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "VENV": str(Path(sys.executable).parents[1]),
        "OMP_NUM_THREADS": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": str(nodes),
        "SLURM_GPUS_ON_NODE": str(procs),
        "SLURM_JOB_ID": "1",
        "PORT": str(port),
    }
    command = ["bash", str(FILE), "gqa", "--limit=8", "--tokens=64", "--device=cpu", f"--out={tmp_path / 'out'}"]
    got = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert got.returncode == 0, got.stderr[-2000:]
    assert got.stdout.count("answers and results") == 1
    for label in ("full", "autoprune-64"):
        assert (tmp_path / "out" / label / ANSWERS).read_bytes().count(b"\n") == 8
