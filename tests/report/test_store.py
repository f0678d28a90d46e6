"""Finished runs are found, checked, selected and tabulated."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_prune.report.store import COUNTINGS, find_run, frame, model_path, read_runs, select


def labels(found: list[Any]) -> list[str]:
    return [f"{r.bench}/{r.model_name}/{r.label}" for r in found]


def test_every_run_once(store: Path, monkeypatch: Any) -> None:
    found = read_runs([store, store / "gqa", store / "gqa" / "other" / "full"])
    assert labels(found) == [
        "gqa/llava-tiny/autoprune-64", "gqa/llava-tiny/full", "gqa/llava-tiny/random-128",
        "gqa/other_checkpoint-7/full", "pope/llava-tiny/full",
    ]  # fmt: skip
    monkeypatch.chdir(store)
    assert [str(r.folder) for r in read_runs(["pope"])] == ["pope/llava-tiny/full"]
    with pytest.raises(ValueError, match="nothing: no such folder"):
        read_runs([store / "nothing"])


def test_select(store: Path) -> None:
    found = read_runs([store])
    assert select(found) == found
    assert labels(select(found, bench=["pope"])) == ["pope/llava-tiny/full"]
    assert labels(select(found, method=["random", "autoprune"], tokens=[64])) == ["gqa/llava-tiny/autoprune-64"]
    for name in ("lab/other/checkpoint-7", "other_checkpoint-7"):
        assert labels(select(found, model=[name])) == ["gqa/other_checkpoint-7/full"]
    assert len(select(found, model=["llava-tiny", "models/llava-tiny"])) == 4


def test_one_name_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here" / "models" / "some-llava"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for name in ("models/some-llava", "./models//some-llava/", str(folder), f"{folder}/", "../here/models/some-llava"):
        assert model_path(name) == "models/some-llava"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert model_path("~/some-llava") == "models/some-llava"
    assert model_path("liuhaotian/llava-v1.5-7b") == "liuhaotian/llava-v1.5-7b"
    monkeypatch.chdir(folder)
    assert model_path(".") == model_path(str(folder)) == str(folder)
    assert model_path("..") == str(folder.parent)


def test_select_by_any_path_of_a_model(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store)
    folder = store / "models" / "llava-tiny"
    folder.mkdir(parents=True)
    assert len(select(read_runs([store]), model=[str(folder)])) == 4


def test_rows(store: Path) -> None:
    rows = {str(r.folder.relative_to(store)): r.row() for r in read_runs([store])}
    pruned, full = rows["gqa/llava-tiny/autoprune-64"], rows["gqa/llava-tiny/full"]
    assert pruned == {
        "bench": "gqa", "model": "models/llava-tiny", "label": "autoprune-64", "method": "autoprune", "tokens": 64,
        "hyper.tokens": 64, "hyper.lam": 0.3, "hyper.layers": [1, 2],
        "figure": 100.0, "figure_name": "accuracy", "low": 10.0, "high": 90.0,
        "difference_to_full": -5.0, "difference_low": -9.0, "difference_high": 1.0,
        "average_entering": 576.0, "average_leaving": 64.0, **{f"flops_percent.{c}": 25.0 for c in COUNTINGS},
        "questions": 1, "seconds": 3.0, "folder": str(store / "gqa/llava-tiny/autoprune-64"),
    }  # fmt: skip
    assert full["tokens"] is None and full["difference_to_full"] is None and "hyper.tokens" not in full
    assert rows["pope/llava-tiny/full"]["figure"] is rows["pope/llava-tiny/full"]["low"] is None


def test_frame(store: Path) -> None:
    import pandas as pd

    found = read_runs([store])
    table = frame(found)
    assert list(table.columns[:8]) == [
        "bench", "model", "label", "method", "tokens", "hyper.lam", "hyper.layers", "hyper.tokens"
    ]  # fmt: skip
    assert set(table.columns) == {name for r in found for name in r.row()} and len(table) == len(found)
    assert table["tokens"].dtype == "Int64" and table["figure"].dtype == "float64"
    assert table["tokens"].tolist() == [64, pd.NA, 128, pd.NA, pd.NA]
    by = table.set_index("folder").loc[str(store / "gqa/llava-tiny/autoprune-64")]
    assert by["hyper.layers"] == [1, 2] and by["difference_to_full"] == -5.0
    text = table.to_csv(index=False)
    assert ',64,0.3,"[1, 2]",64,100.0,' in text and "64.0,0.3" not in text
    assert frame([]).empty


def test_frame_without_pandas(store: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match=r"needs pandas; pip install 'llava-prune\[report\]'"):
        frame(read_runs([store]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is broken; delete it"),
        ("[1]", r"not the result of an evaluation \(it lacks bench, label,"),
        ("{}", "it lacks bench, .*, settings, seconds"),
        ('{"settings": 1}', "it lacks bench, .*, settings, seconds"),
    ],
)
def test_broken_results(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=f"result.json .*{message}") as error:
        read_runs([tmp_path])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("flops", {}), ("interval", [1]), ("visual_tokens", None), ("seconds", {"a": "x"}), ("rows", None)],
)
def test_results_with_other_content(store: Path, name: str, value: Any) -> None:
    path = store / "pope" / "llava-tiny" / "full" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match="is not the result of an evaluation"):
        read_runs([store])


def test_settings_without_a_model(store: Path) -> None:
    path = store / "pope" / "llava-tiny" / "full" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "settings": {"hyper": {}}}))
    with pytest.raises(ValueError, match="it lacks settings.model"):
        read_runs([store])


def test_find_run(store: Path, monkeypatch: Any, runs: Callable[..., Path]) -> None:
    assert find_run(str(store / "gqa/llava-tiny/full"), []).folder == store / "gqa/llava-tiny/full"
    assert find_run("pope/llava-tiny/full", [store / "gqa", store]).bench == "pope"
    with pytest.raises(
        ValueError, match="gqa/full: no finished run, looked for gqa/full/result.json, .*/out/gqa/full/"
    ):
        find_run("gqa/full", [store])
    with pytest.raises(ValueError, match="gqa/llava-tiny holds 3 runs; name one of them, for example .*autoprune-64"):
        find_run("gqa/llava-tiny", [store])
    with pytest.raises(ValueError, match=" holds 3 runs"):
        find_run(str(store / "gqa/llava-tiny"), [store])


def test_files_of_a_run(store: Path) -> None:
    (run,) = read_runs([store / "pope"])
    assert run.answers()[0]["text"] == "yes" and run.scores() == [{"question_id": "0", "score": 1.0, "type": "query"}]
    (run.folder / "scores.jsonl").write_text('{"a": 1}\n[]\n')
    with pytest.raises(ValueError, match="scores.jsonl, line 2: is not an object"):
        run.scores()
    (run.folder / "scores.jsonl").unlink()
    with pytest.raises(ValueError, match="scores.jsonl cannot be read .* run the evaluation again"):
        run.scores()


def test_line_separators_in_texts(store: Path) -> None:
    """JSON leaves U+2028, U+2029 and U+0085 as they are; they end no row."""
    (run,) = read_runs([store / "pope"])
    rows = [{**run.answers()[0], "text": text} for text in ("a\u2028b\u2029c\x85d", "e\r\nf")]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (run.folder / "answers.jsonl").write_text(text, encoding="utf-8")
    assert run.answers() == rows
    (run.folder / "answers.jsonl").write_bytes(text.encode() + b"\xff\n")
    with pytest.raises(ValueError, match="answers.jsonl, line 3: is not JSON"):
        run.answers()
