"""A run that is killed at random moments and resumed writes the files of an uninterrupted run (tests/eval/kill.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILLS = 4
"""Number of kills; `python -m tests.eval.kill 30` runs more."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_equal_an_uninterrupted_one() -> None:
    command = [sys.executable, "-m", "tests.eval.kill", str(KILLS), "0", "12"]
    got = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert got.returncode == 0, got.stderr[-2000:]
    found = re.findall(r"(whole|chunks): (\d+) kills, (\d+) runs completed and equal", got.stdout)
    assert [name for name, *_ in found] == ["whole", "chunks"], got.stdout
    assert sum(int(kills) for _, kills, _ in found) == KILLS and all(int(runs) >= 1 for *_, runs in found)
