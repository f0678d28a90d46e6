"""scripts/bench/gpu_check.sh on a CPU with small models: its stages run and end within their time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench" / "gpu_check.sh"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT.with_suffix(".py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(out: Path, stages: str, **env: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run the script on the CPU; return the process and the results by file."""
    given = {"DEVICE": "cpu", "SHAPE": "tiny", "STAGES": stages, "OUT": str(out), "PYTHON": sys.executable}
    given |= {"OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        ["bash", str(SCRIPT)], env={**os.environ, **given}, capture_output=True, text=True, timeout=200
    )
    return done, {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def test_two_stages(tmp_path: Path) -> None:
    done, found = run(tmp_path, "a c")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "c.json", "log.txt"]
    a, c = found["a"], found["c"]
    assert a["complete"] and a["equal"] and a["versions"]["torch"] and len(a["against_cpu"]) == 3
    assert c["complete"] and "errors" not in c
    labels = [(r["shape"], r["batch"], r["label"]) for r in c["rows"]]
    assert labels[:3] == [("tiny", 1, "autoprune-160"), ("tiny", 2, "autoprune-160"), ("next-tiny", 1, "autoprune-160")]
    assert [x[2] for x in labels[3:]] == [
        "autoprune-128", "autoprune-192", "autoprune-flash-160", "fastv-160", "visionzip-160",
    ]  # fmt: skip
    assert all({"stages", "floor", "overhead"} <= r.keys() for r in c["rows"])
    assert "stage c: status 0" in done.stdout and "visionzip-160" in done.stdout


def test_a_failing_stage_says_why_and_stops_no_other(tmp_path: Path) -> None:
    """A missing package and a lack of time are reported, and the script continues."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    done, found = run(tmp_path / "out", "f a", PYTHONPATH=str(tmp_path / "hide"))
    assert done.returncode == 0, done.stderr
    for name in ("a", "f"):
        assert (
            found[name]["error"].startswith("package torch is missing; put its wheel") and not found[name]["complete"]
        )
    assert done.stdout.count("package torch is missing") == 2
    done, found = run(tmp_path / "none", "a f", TIME_LIMIT="5")
    assert done.returncode == 0 and found == {} and "no time left for stage f" in done.stderr


def test_time_limits_add_up_to_eight_minutes(check: ModuleType) -> None:
    assert list(check.LIMITS) == list(check.STAGES)
    assert sum(check.LIMITS.values()) + 10 <= check.WHOLE == 480
    assert f'TIME_LIMIT="${{TIME_LIMIT:-{check.WHOLE}}}"' in SCRIPT.read_text()


def test_stages_by_letter(check: ModuleType) -> None:
    assert check.chosen("d a") == ["a", "d1", "d2"] and check.chosen("a b c d e f") == list(check.STAGES)
    with pytest.raises(ValueError, match="there is no stage x; choose from a b c d e f"):
        check.chosen("a x")


def test_errors_of_parts(check: ModuleType, tmp_path: Path) -> None:
    """An error in one part does not stop the others, and the file is complete after each part."""
    report = check.Report(tmp_path / "c.json")
    for name in ("one", "two"):
        with report.attempt(name):
            raise ImportError("no") if name == "one" else ModuleNotFoundError("no", name="triton")
    report.put(rows=[])
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["errors"]["one"] == "ImportError: no" and found["errors"]["two"].startswith(
        "package triton is missing"
    )
    assert found["rows"] == [] and not found["complete"] and len(list(tmp_path.iterdir())) == 1
