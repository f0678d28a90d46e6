"""VLMEvalKit with a pruned model: its run.py on a local table, against `llava-prune eval`.

Run by scripts/test_integrations.sh, in an environment that has VLMEvalKit.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openpyxl")
if importlib.util.find_spec("vlmeval") is None:
    pytest.skip("VLMEvalKit is not installed; see scripts/test_integrations.sh", allow_module_level=True)
pytestmark = pytest.mark.integrations
ROOT = Path(__file__).parents[2]
TABLE = ROOT / "playground" / "data" / "mini" / "mmbench" / "mmbench_dev_20230712.tsv"
TINY = ROOT / "playground" / "models" / "llava-tiny"
COUNT = 12
START = """
import sys
from transformers.models.llava import modeling_llava
from transformers.utils import is_torchvision_available
is_torchvision_available()  # asked before the stand-in is there
import llava_prune
llava_prune.attach, llava_prune.load
sys.path.insert(0, sys.argv.pop(1))
from llava_prune.cli import main
raise SystemExit(main(sys.argv[1:]))
"""
STAND_IN = """
import enum
class InterpolationMode(enum.Enum):
    BICUBIC = "bicubic"
def __getattr__(name):
    return object
"""


@pytest.fixture(scope="module")
def torchvision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for torchvision, which VLMEvalKit imports for benchmarks that these tests do not run."""
    out: Path = tmp_path_factory.mktemp("torchvision")
    folder = out / "torchvision" / "transforms"
    folder.mkdir(parents=True)
    (out / "torchvision" / "__init__.py").touch()
    (folder / "functional.py").write_text(STAND_IN, encoding="utf-8")
    text = f"from . import functional\nfrom .functional import InterpolationMode\n{STAND_IN}"
    (folder / "__init__.py").write_text(text, encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first questions of mini MMBench, as a table of VLMEvalKit and as one of this package.

    VLMEvalKit encodes each image as JPEG again, which changes an answer here, unless the file of the image exists.
    """
    out: Path = tmp_path_factory.mktemp("data")
    lines = TABLE.read_text(encoding="utf-8").splitlines(keepends=True)[: COUNT + 1]
    text = "".join(lines)
    (out / "MiniMC.tsv").write_text(text, encoding="utf-8")
    images = out / "images" / "MiniMC"
    images.mkdir(parents=True)
    head, *rows = (line.rstrip("\n").split("\t") for line in lines)
    payloads = {row[head.index("index")]: row[head.index("image")] for row in rows}
    for index, payload in payloads.items():
        (images / f"{index}.jpg").write_bytes(base64.b64decode(payloads.get(payload, payload)))
    (out / "mmbench").mkdir()
    (out / "mmbench" / TABLE.name).write_text(text, encoding="utf-8")
    return out


def start(torchvision: Path, data: Path, *arguments: str) -> Any:
    command = [sys.executable, "-c", START, str(torchvision), "vlmevalkit", "--model", str(TINY), "--device", "cpu"]
    env = {**os.environ, "LMUData": str(data), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *arguments], cwd=data, env=env, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.parametrize(("method", "label"), [("full", "full"), ("autoprune", "autoprune-64")])
def test_answers_are_those_of_our_evaluation(
    torchvision: Path, data: Path, tmp_path: Path, method: str, label: str
) -> None:
    from openpyxl import load_workbook

    program = ("--", "vlmeval.run", "--data", "MiniMC", "--judge", "exact_matching", "--work-dir", str(tmp_path / "w"))
    done = start(torchvision, data, "--method", method, *program)
    assert done.returncode == 0, done.stderr[-3000:]
    (sheet,) = (tmp_path / "w" / f"llava-tiny-{label}").glob(f"T*/llava-tiny-{label}_MiniMC.xlsx")
    head, *rows = load_workbook(sheet).active.iter_rows(values_only=True)
    theirs = [row[head.index("prediction")] for row in rows]
    command = [sys.executable, "-m", "llava_prune", "eval", "mmbench", "--model", str(TINY), "--data", str(data)]
    command += ["--method", method, "--tokens", "64", "--batch", "1", "--no-reference", "--out", str(tmp_path / "ours")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    mine = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert mine.returncode == 0, mine.stderr[-2000:]
    text = (tmp_path / "ours" / label / "answers.jsonl").read_text(encoding="utf-8")
    assert theirs == [json.loads(line)["text"] for line in text.splitlines()] and len(theirs) == COUNT


def test_texts_are_those_of_llavas_protocol() -> None:
    from llava_prune.integrations.vlmevalkit import question_text

    short = "Answer the question using a single word or phrase."
    asked = {"question": "Is there a dog? Please answer yes or no.", "answer": "Yes"}
    assert question_text(asked, "Y/N", "POPE") == f"Is there a dog?\n{short}"
    assert question_text({"question": "What is it?"}, "VQA", "TextVQA_VAL") == f"What is it?\n{short}"
    row = {"question": "Which?", "hint": float("nan"), "A": 3.0, "B": "two", "C": float("nan"), "D": float("nan")}
    letter = "Answer with the option's letter from the given choices directly."
    assert question_text(row, "MCQ", "MMBench_DEV_EN") == f"Which?\nA. 3.0\nB. two\n{letter}"
    assert question_text(row, "MCQ", "MMBench_DEV_CN").endswith("\n请直接回答选项字母。")


def test_a_program_is_needed(torchvision: Path, data: Path) -> None:
    done = start(torchvision, data)
    assert done.returncode == 1 and "no program given" in done.stderr and "Traceback" not in done.stderr
