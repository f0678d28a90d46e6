"""The lists and comparisons of `llava-prune results`."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llava_prune.arguments import RESULTS
from llava_prune.cli import main
from llava_prune.report import results
from llava_prune.report.compare import compare
from llava_prune.report.store import find_run, read_runs


def said(capsys: Any, *argv: str, status: int = 0) -> str:
    """Run the command; return its output, or the message of a failure."""
    assert main(["results", *argv]) == status
    got = capsys.readouterr()
    if status:
        assert got.out == "" and got.err.count("\n") == 1 and got.err.startswith("llava-prune: ")
    return got.err if status else got.out


def drawn(table: Any, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.fixture
def narrow(monkeypatch: Any) -> None:
    monkeypatch.setattr(results, "stdout", lambda: Console(width=80))


@pytest.fixture
def pair(tmp_path: Path, runs: Callable[..., Path]) -> Path:
    """Write two runs on thirty questions; the pruned one has every third answer wrong, with markup in its text."""
    asked = [(f"What is {i}?", "yes", 1.0) for i in range(30)]
    runs(tmp_path / "gqa" / "tiny" / "full", asked)
    pruned = [(q, t, 1.0) if i % 3 else (q, "[/b]\x1b[31m\nno", 0.0) for i, (q, t, _) in enumerate(asked)]
    runs(tmp_path / "gqa" / "tiny" / "autoprune-64", pruned, method="autoprune", tokens=64)
    return tmp_path


def test_the_list(store: Path, capsys: Any, monkeypatch: Any) -> None:
    text = said(capsys, str(store))
    order = ["full", "autoprune-64", "random-128", "other_checkpoint-7", "pope"]
    assert "5 finished runs" in text and "100.00 [10.0, 90.0]" in text and "25.0" in text and "gqa, first 1" in text
    places = [text.index(word) for word in order]
    assert places == sorted(places) and str(store) not in text
    monkeypatch.chdir(store)
    assert "gqa/llava-tiny/random-128" in said(capsys, "gqa", "--folders")


def test_the_list_is_readable_at_80_columns(store: Path) -> None:
    lines = drawn(results.runs_table([r for r in read_runs([store]) if r.model_name == "llava-tiny"]))
    assert max(map(len, lines)) <= 80
    for text in ("autoprune-64", "llava-tiny", "100.00 [10.0, 90.0]", "FLOPs %"):
        assert any(text in line for line in lines), text


@pytest.mark.parametrize(
    ("flags", "labels"),
    [
        ((), ["full", "autoprune-64", "random-128", "full", "full"]),
        (("--task", "pope"), ["full"]),
        (("--task", "gqa,pope", "--method", "autoprune,random"), ["autoprune-64", "random-128"]),
        (("--tokens", "128,64", "--task", "gqa"), ["autoprune-64", "random-128"]),
        (("--model", "other_checkpoint-7"), ["full"]),
        (("--model", "models/llava-tiny", "--task", "pope"), ["full"]),
    ],
)
def test_filters(store: Path, capsys: Any, flags: tuple[str, ...], labels: list[str]) -> None:
    rows = json.loads(said(capsys, str(store), "--json", *flags))
    assert [r["label"] for r in rows] == labels
    assert all(not isinstance(v, dict) for r in rows for v in r.values())
    if labels[0] == "autoprune-64":
        assert rows[0]["hyper.lam"] == 0.3 and rows[0]["folder"] == str(store / "gqa/llava-tiny/autoprune-64")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "gqa,gqaa"], "--task gqaa: no finished run in .* has it; there are gqa, pope"),
        (["--method", "fastv"], "--method fastv: .* there are autoprune, full, random"),
        (["--tokens", "32"], "--tokens 32: .* there are 64, 128"),
        (["--model", "nope"], "--model nope: .* there are llava-tiny, other_checkpoint-7"),
        (["--task", "pope", "--method", "random"], "none of the 5 runs in .* meets all conditions; leave one out"),
        (["--show", "3"], "--show 3 needs --compare"),
        (["--compare", "pope/llava-tiny/full", "gqa/llava-tiny/full"], "is a run of pope and .* of gqa"),
        (["--compare", "gqa/x", "gqa/llava-tiny/full"], "gqa/x: no finished run, looked for"),
        (["--compare", "a", "b", "--task", "gqa", "--csv", "-"], "--task, --csv cannot be combined with --compare"),
    ],
)
def test_bad_input(store: Path, capsys: Any, argv: list[str], message: str) -> None:
    assert re.search(message, said(capsys, str(store), *argv, status=1))


def test_nothing_there(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for argv in ([], ["--json"]):
        text = said(capsys, *argv, status=1)
        assert f"no finished run in {RESULTS}; run an evaluation (llava-prune eval gqa)" in text
    assert "no finished run in " in said(capsys, str(tmp_path), status=1)
    assert "nope: no such folder" in said(capsys, str(tmp_path / "nope"), status=1)


def test_csv(store: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    text = said(capsys, str(store), "--csv", "-")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [r["label"] for r in rows] == ["full", "autoprune-64", "random-128", "full", "full"]
    assert rows[1]["tokens"] == rows[1]["hyper.tokens"] == "64" and rows[1]["hyper.layers"] == "[1, 2]"
    assert rows[0]["tokens"] == rows[0]["hyper.lam"] == rows[4]["figure"] == "" and rows[0]["figure"] == "100.0"
    path = tmp_path / "new" / "runs.csv"
    assert said(capsys, str(store), "--csv", str(path)) == "" and path.read_text() == text
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert "pip install 'llava-prune[report]'" in said(capsys, str(store), "--csv", "-", status=1)
    with pytest.raises(SystemExit):
        main(["results", str(store), "--csv", "-", "--json"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_comparison(pair: Path, capsys: Any, narrow: None, monkeypatch: Any) -> None:
    names = ("gqa/tiny/full", str(pair / "gqa" / "tiny" / "autoprune-64"))
    text = said(capsys, str(pair), "--compare", *names)
    assert "questions with different scores: 10; exact two-sided McNemar test p = 0.0020" in text  # 2 / 2**10
    assert "first 10 of 10 flipped questions" in text and "What is 27?" in text
    assert "[/b] [31m no" in text and "\x1b" not in text
    assert f"B: autoprune-64, accuracy 66.67 [10.0, 90.0], {names[1]}" in text
    assert max(len(line) for line in text.splitlines() if line[:1] in "┏┃┡│├└") <= 80
    text = said(capsys, str(pair), "--compare", *names, "--show", "2")
    assert "first 2 of 10 flipped questions" in text and "What is 3?" in text and "What is 6?" not in text
    assert "question_id" not in said(capsys, str(pair), "--compare", *names, "--show", "0")
    (pair / "playground").mkdir()
    (pair / "gqa").rename(pair / RESULTS)  # as playground/results/gqa would be
    monkeypatch.chdir(pair)
    assert "different scores: 10" in said(capsys, "--compare", "tiny/full", "tiny/autoprune-64")


@pytest.mark.parametrize("flags", [[], ["--compare", "gqa/tiny/full", "gqa/tiny/autoprune-64"], ["--csv", "-"]])
def test_no_model_is_loaded(pair: Path, root: Path, flags: list[str]) -> None:
    """The command runs in a process of its own, because these tests have already loaded torch."""
    code = "import sys; from llava_prune.cli import main; main(sys.argv[1:]); sys.stderr.write(' '.join(sys.modules))"
    argv = [sys.executable, "-c", code, "results", str(pair), *flags]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=True)
    modules = set(done.stderr.split())
    assert "autoprune-64" in done.stdout and "llava_prune.report.compare" in modules
    assert not modules & {"torch", "transformers", "llava_prune.eval"}
    assert ("pandas" in modules) == ("--csv" in flags)


def test_comparison_as_json(pair: Path, capsys: Any) -> None:
    names = ("gqa/tiny/full", "gqa/tiny/autoprune-64")
    got = json.loads(said(capsys, str(pair), "--compare", *names, "--json", "--show", "1"))
    assert got["p_value"] == 2 / 2**10 and len(got["flips"]) == 10
    assert got["total"]["only_a"] == 10 and got["total"]["both"] == 20 and got["by_type"]["query"]["questions"] == 15
    assert got["flips"][1] == {
        "question_id": "3", "type": "verify", "prompt": "What is 3?", "answer_a": "yes",
        "answer_b": "[/b]\x1b[31m\nno", "score_a": 1.0, "score_b": 0.0,
    }  # fmt: skip
    assert got["a"]["label"] == "full" and got["b"]["folder"] == str(pair / "gqa" / "tiny" / "autoprune-64")


def test_partial_credit_is_named(tmp_path: Path, runs: Callable[..., Path]) -> None:
    runs(tmp_path / "a", [("What?", "x", 0.3), ("Who?", "y", 0.3)])
    runs(tmp_path / "b", [("What?", "x", 0.3), ("Who?", "z", 0.6)])
    found = compare(find_run("a", [tmp_path]), find_run("b", [tmp_path]))
    text = "\n".join(drawn(results.counts_table(found), 120))
    assert "more in B" in text and "equal partial credit" in " ".join(text.split()) and "only" not in text
    assert any("0.3 0.6" in line for line in drawn(results.flips_table(found, 5)))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/runs.csv", "a part of this path is a file or a broken link, give another path"),
        ("file/below/runs.csv", "a part of this path is a file or a broken link, give another path"),
        ("broken/runs.csv", "a part of this path is a file or a broken link, give another path"),
        ("", "this is a folder, give the path of a file"),
    ],
)
def test_paths_that_cannot_be_written(store: Path, tmp_path: Path, capsys: Any, place: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    err = said(capsys, str(store), "--csv", str(tmp_path / place), status=1)
    assert message in err and str(tmp_path) in err
