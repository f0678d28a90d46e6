"""The shell scripts parse, are executable, and refuse what they cannot use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("scripts/**/*.sh"), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_bash_reads_it(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text()


def test_ci_entry_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def setup(tmp_path: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "setup.sh"), *args]
    full = {**os.environ, "VENV": str(tmp_path / "venv"), **env}
    return subprocess.run(command, env=full, capture_output=True, text=True, timeout=60)


def test_setup_names_the_way_out(tmp_path: Path) -> None:
    got = setup(tmp_path, PYTHON="/bin/false")
    assert got.returncode == 1 and "Python 3.10 to 3.13" in got.stderr
    got = setup(tmp_path, "nonsense")
    assert got.returncode == 1 and "nonsense" in got.stderr


def test_setup_leaves_foreign_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine.txt").write_text("keep")
    got = setup(tmp_path)
    assert got.returncode == 1 and "not made by this script" in got.stderr
    assert (tmp_path / "venv" / "mine.txt").read_text() == "keep"


@pytest.mark.slow
def test_readme_prints_what_gqa_measures(tmp_path: Path) -> None:
    """Measured accuracies equal README's table within one question of 400, and tokens and FLOPs within 0.1."""
    command = [sys.executable, "-m", "llava_prune", "eval", "gqa", "--out", str(tmp_path), "--device", "cpu"]
    env = {**os.environ, "METHOD": "autoprune,random,uniform", "TOKENS": "64"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- results:begin -->")[1]
    pattern = r"^\| `([\w-]+)` \| (-|64) \| ([\d.]+) .*?\| ([\d.]+) / ([\d.]+) \| ([\d.]+) \|$"
    printed = {m[1]: tuple(map(float, m.groups()[2:])) for m in re.finditer(pattern, text, re.M)}
    results = [json.loads(path.read_text()) for path in tmp_path.rglob("result.json")]
    assert {r["method"] for r in results} == {"full", "autoprune", "random", "uniform"} <= printed.keys()
    for result in results:
        accuracy, *costs = printed[result["method"]]
        tokens = result["visual_tokens"]
        measured = tokens["average_entering"], tokens["average_leaving"]
        measured += (result["flops"]["with_text_entering"]["percent_of_full"],)
        assert abs(result["figure"] - accuracy) <= 0.25, result["label"]
        assert costs == pytest.approx(measured, abs=0.1), result["label"]
