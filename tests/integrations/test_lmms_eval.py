"""lmms-eval with the model `llava_prune`: its command line on local tasks, against `llava-prune eval`.

Run by scripts/test_integrations.sh, in an environment that has lmms-eval.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

lmms_eval = pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; see scripts/test_integrations.sh")
pytestmark = pytest.mark.integrations
ROOT = Path(__file__).parents[2]
MINI = ROOT / "playground" / "data" / "mini"
TINY = ROOT / "playground" / "models" / "llava-tiny"
COUNT = 40
FUNCTIONS = """
from PIL import Image


def images(row):
    return [Image.open(row["image"]).convert("RGB")]


def text(row, lmms_eval_specific_kwargs=None):
    return row["text"]


def score(row, results):
    said = results[0].rstrip(".").lower().strip()
    return {"accuracy": float(said == row["answer"])}
"""
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
task: {name}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.images
doc_to_text: !function functions.text
doc_to_target: answer
process_results: !function functions.score
generation_kwargs: {{max_new_tokens: 128, temperature: 0, num_beams: 1, do_sample: false}}
metric_list:
  - {{metric: accuracy, aggregation: mean, higher_is_better: true}}
metadata: [{{version: 0.0}}]
"""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks mini_gqa and mini_pope on the first questions of the mini data."""
    out: Path = tmp_path_factory.mktemp("tasks")
    (out / "functions.py").write_text(FUNCTIONS, encoding="utf-8")
    labels = json.loads((MINI / "gqa" / "data" / "testdev_balanced_questions.json").read_text(encoding="utf-8"))
    pope = {r["question_id"]: r["label"] for r in lines(MINI / "pope" / "coco" / "coco_pope_adversarial.json")}
    rows = {
        "gqa": [
            (MINI / "gqa" / "data" / "images" / r["image"], r["text"], labels[r["question_id"]]["answer"])
            for r in lines(MINI / "gqa" / "llava_gqa_testdev_balanced.jsonl")[:COUNT]
        ],
        "pope": [
            (MINI / "pope" / "val2014" / r["image"], r["text"], pope[r["question_id"]])
            for r in lines(MINI / "pope" / "llava_pope_test.jsonl")[:COUNT]
        ],
    }
    for name, some in rows.items():
        data = out / f"{name}.jsonl"
        made = [json.dumps({"image": str(image), "text": text, "answer": answer}) for image, text, answer in some]
        data.write_text("\n".join(made) + "\n", encoding="utf-8")
        (out / f"mini_{name}.yaml").write_text(TASK.format(name=f"mini_{name}", data=data), encoding="utf-8")
    return out


def run(tasks: Path, out: Path, arguments: str, *flags: str, launcher: tuple[str, ...] = ("-m",)) -> Any:
    command = [sys.executable, *launcher, "lmms_eval", "--model", "llava_prune", "--model_args"]
    command += [f"pretrained={TINY},{arguments}", "--include_path", str(tasks), "--tasks", "mini_gqa,mini_pope"]
    command += ["--output_path", str(out), "--log_samples", *flags]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tasks / "hub"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)


def said(out: Path, name: str) -> list[str]:
    """Return the answers in the order of the questions."""
    (path,) = out.rglob(f"*_samples_mini_{name}.jsonl")
    return [row["filtered_resps"] for row in sorted(lines(path), key=lambda row: row["doc_id"])]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """Benchmark -> label of the run -> answers of `llava-prune eval`."""
    out = tmp_path_factory.mktemp("ours")
    found: dict[str, dict[str, list[str]]] = {}
    for name in ("gqa", "pope"):
        command = [sys.executable, "-m", "llava_prune", "eval", name, "--model", str(TINY), "--data", str(MINI)]
        command += ["--tokens", "64", "--limit", str(COUNT), "--out", str(out / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        runs = ("full", "autoprune-64")
        found[name] = {run: [r["text"] for r in lines(out / name / run / "answers.jsonl")] for run in runs}
    return found


@pytest.mark.parametrize(
    ("label", "arguments", "flags"),
    [
        ("full", "method=full", ("--batch_size", "1")),
        ("autoprune-64", "method=autoprune,tokens=64", ("--batch_size", "4")),
        ("autoprune-64", "tokens=64,gamma=0.2,family=hf", ("--batch_size", "auto")),
    ],
)
def test_the_command_line_answers_as_our_evaluation(
    tasks: Path, tmp_path: Path, ours: dict[str, Any], label: str, arguments: str, flags: tuple[str, ...]
) -> None:
    done = run(tasks, tmp_path, arguments, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("gqa", "pope"):
        assert said(tmp_path, name) == ours[name][label], name
    (result,) = tmp_path.rglob("*_results.json")
    scores = json.loads(result.read_text(encoding="utf-8"))["results"]
    print({name: scores[f"mini_{name}"]["accuracy,none"] for name in ("gqa", "pope")})
    for name in ("gqa", "pope"):
        labels = [r["answer"] for r in lines(tasks / f"{name}.jsonl")]
        right = [t.rstrip(".").lower().strip() == a for t, a in zip(ours[name][label], labels, strict=True)]
        assert scores[f"mini_{name}"]["accuracy,none"] == pytest.approx(sum(right) / COUNT)


def test_two_processes_answer_as_one(tasks: Path, tmp_path: Path, ours: dict[str, Any]) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    done = run(tasks, tmp_path, "tokens=64", "--batch_size", "4", launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("gqa", "pope"):
        assert said(tmp_path, name) == ours[name]["autoprune-64"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("method=nosuch", "nosuch"),
        ("tokens=577", "577"),
        ("colour=red", "colour"),
    ],
)
def test_refusals_name_the_argument(tasks: Path, tmp_path: Path, arguments: str, message: str) -> None:
    done = run(tasks, tmp_path, arguments)
    assert message in done.stderr + done.stdout and not list(tmp_path.rglob("*_results.json"))


def test_what_is_not_greedy_search_is_refused() -> None:
    from llava_prune.integrations.lmms_eval import LlavaPrune, new_tokens

    assert new_tokens({"max_new_tokens": 16, "temperature": 0, "until": ["\n\n"], "top_p": None}) == 16
    for name, value in (("temperature", 0.7), ("num_beams", 3), ("do_sample", True), ("penalty", 2)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            new_tokens({name: value})
    model = SimpleNamespace()
    for method in (LlavaPrune.loglikelihood, LlavaPrune.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="choose a task"):
            method(model, [])  # type: ignore[arg-type]
