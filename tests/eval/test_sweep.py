"""Sweep files are read into requests, and their runs make up one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_prune.cli import main
from llava_prune.eval.sweep import read_sweep
from llava_prune.report.equal_flops import TOLERANCE

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_grid_list_and_seeds(tmp_path: Path) -> None:
    text = (
        "grid: {gamma: [0, 0.1], k0: [0.4]}\nlist: [{lam: 1e-3}, {budget: before}]\nseeds: [1, 2]\ntokens: [64, 11%]\n"
    )
    found = read_sweep(write(tmp_path, text))
    assert (found.title, found.tasks) == ("sweep", ["gqa"])
    hyper = [dict(r.hyper) for r in found.requests]
    points: list[dict[str, Any]] = [
        {"gamma": 0, "k0": 0.4}, {"gamma": 0.1, "k0": 0.4}, {"lam": 0.001}, {"budget": "before"}
    ]  # fmt: skip
    assert hyper == [{**point, "seed": seed} for point in points for seed in (1, 2)]
    assert {(tuple(r.methods), len(r.budgets)) for r in found.requests} == {(("autoprune",), 2)}
    assert [dict(r.hyper) for r in read_sweep(write(tmp_path, "methods: fastv")).requests] == [{}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a sweep is an object with the keys title, tasks"),
        ("- 1", "a sweep is an object"),
        ("a: [", "line 1: is not YAML (expected the node content"),
        ("grids: {}", "unknown key grids; known are title"),
        ("tasks: [nosuch]", "unknown benchmark 'nosuch'"),
        ("grid: [1]", "grid is [1]; write hyper-parameter: [values]"),
        ("grid: {gamma: 0.1}", "grid.gamma is 0.1; give a list"),
        ("grid: {gamma: []}", "grid.gamma is []; give a list"),
        ("list: [1]", "list has 1; each entry is an object"),
        ("list: []", "list is []; give a list"),
        ("grid:\n  gamma: [0]\n  gamma: [1]", "line 3: is not YAML (gamma is given twice)"),
        ("tokens: [4]\ntokens: [8]", "line 2: is not YAML (tokens is given twice)"),
        ("tokens: [0]", "'0': must be a positive integer"),
        ("flops: [49]", "'49': must be a percentage above 0, written as 49%"),
        ("tokens: [4]\nflops: [49%]", "tokens and flops are both given"),
        ("seeds: []", "seeds is []; give a list"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, message: str, capsys: Any) -> None:
    path = write(tmp_path, text)
    assert main(["sweep", str(path)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert message in said and str(path) in said.replace(" ", "")


def test_other_encodings(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, "")
    path.write_bytes("tasks: [gqa]".encode("utf-16"))
    assert main(["sweep", str(path)]) == 1
    assert "byte 0 is not UTF-8; save the file as UTF-8" in " ".join(capsys.readouterr().err.split())


def test_a_benchmark_that_is_listed_twice_counts_once(tmp_path: Path) -> None:
    assert read_sweep(write(tmp_path, "tasks: [gqa, pope, gqa]")).tasks == ["gqa", "pope"]


def test_missing_file(tmp_path: Path, capsys: Any) -> None:
    assert main(["sweep", str(tmp_path / "no.yaml")]) == 1
    assert "no.yaml cannot be read (No such file or directory)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {nosuch: [1]}", "none of autoprune has a hyper-parameter nosuch"),
        ("seeds: [1]", "none of autoprune has a hyper-parameter seed"),
        ("grid: {gamma: [-1]}", "gamma=-1"),
    ],
)
def test_refused_hyper_parameters(tmp_path: Path, text: str, message: str, capsys: Any) -> None:
    assert main(["sweep", str(write(tmp_path, text)), "--dry-run"]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_sweep(nine: Path, tmp_path: Path, stand_in: Any, capsys: Any) -> None:
    """A sweep makes every run once and shows the figures in one table; a second call runs nothing."""
    model = stand_in()
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    text = (
        "title: two methods\ntasks: [gqa, textvqa]\nmethods: [autoprune, random]\ntokens: [4]\n"
        "list: [{gamma: 0.2}, {gamma: 0}]\nseeds: [0, 1]\n"
    )
    argv = ["sweep", str(write(tmp_path, text)), "--model", str(folder), "--data", str(nine)]
    argv += ["--store", str(tmp_path / "store"), "--batch", "2"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["title"] == "two methods" and found["varied"] == ["gamma"]
    rows = [(r["method"], r["hyper"], {t: s["seeds"] for t, s in r["scores"].items()}) for r in found["rows"]]
    assert rows == [
        ("autoprune", {"gamma": 0.2}, {"gqa": 1, "textvqa": 1}),
        ("random", {}, {"gqa": 2, "textvqa": 2}),
        ("autoprune", {"gamma": 0}, {"gqa": 1, "textvqa": 1}),
    ]
    assert found["rows"][1]["scores"]["gqa"]["sd"] == 0 and "difference" in found["rows"][0]["scores"]["gqa"]
    for row in found["rows"]:
        for place in row["runs"]:
            stored = json.loads((Path(place) / "result.json").read_text())
            score = row["scores"][stored["bench"]]
            assert score["figure"] == stored["figure"]
    labels = {p.parent.name for p in (tmp_path / "store").rglob("result.json")}
    assert labels == {"full", "autoprune-4", "autoprune-4,gamma=0", "random-4", "random-4,seed=1"}
    assert all(row["share"] is None and "ratio" in row["ratio"] for row in found["rows"])
    calls = len(model.calls)
    for kind, start in (("text", " "), ("markdown", "**two methods**"), ("latex", "% two"), ("csv", "method,tokens")):
        assert main([*argv, "--format", kind]) == 0
        assert capsys.readouterr().out.startswith(start)
    assert len(model.calls) == calls


def test_methods_at_equal_flops(nine: Path, tmp_path: Path, stand_in: Any, monkeypatch: Any, capsys: Any) -> None:
    """Each method has a row for each budget, the mean over its seeds; a method without a budget has one row."""
    model = stand_in()
    monkeypatch.setattr("llava_prune.eval.plan.read_size", lambda *_: model.size)
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    text = "tasks: [gqa, ocrbench]\nmethods: [random, uniform, text-only]\nflops: [50%, 25%]\nseeds: [0, 1]\n"
    argv = ["sweep", str(write(tmp_path, text)), "--model", str(folder), "--data", str(nine)]
    argv += ["--store", str(tmp_path / "store"), "--batch", "2"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [(r["method"], r["share"], {t: s["seeds"] for t, s in r["scores"].items()}) for r in found["rows"]]
    assert sorted(rows, key=str) == sorted(
        [
            (m, s, dict.fromkeys(("gqa", "ocrbench"), n))
            for m, n in (("random", 2), ("uniform", 1))
            for s in (50.0, 25.0)
        ]
        + [("text-only", None, {"gqa": 1, "ocrbench": 1})],
        key=str,
    )
    spent = {r["share"]: r["flops_visual"] for r in found["rows"] if r["method"] == "uniform"}
    for row in found["rows"]:
        assert row["ratio"]["ratio"] == pytest.approx(100), row["ratio"]  # the stand-in's answers ignore the method
    assert main([*argv, "--format", "csv", "--figure", str(tmp_path / "f.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("method,budget,tokens,flops_visual") and (tmp_path / "f.png").is_file()
    kept = {share for share, value in spent.items() if abs(value - share) <= TOLERANCE}
    assert kept and kept == {float(c[1]) for c in (x.split(",") for x in lines) if c[0] == "uniform" and not c[5]}


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/[at]*/*.yaml")), ids=lambda p: p.stem)
def test_the_sweeps_of_the_repository_can_be_run(path: Path, capsys: Any) -> None:
    assert main(["sweep", str(path), "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) >= 3 and path.with_suffix(".sh").is_file()
