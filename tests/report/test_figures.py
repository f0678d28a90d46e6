"""`llava-prune figure` draws the numbers in the files of hand-made runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_prune import arguments
from llava_prune.cli import main
from llava_prune.report import accuracy, drawing, speed, tokens
from llava_prune.report.figures import OF_RUNS, SPEED
from llava_prune.report.store import StoredRun
from llava_prune.report.together import comparable
from tests.report.conftest import write_run

pytest.importorskip("matplotlib")

KEPT = [[144, 100, 60], [144, 90, 70], [144, 80, 75], [144, 40, 78]]
"""Visual tokens leaving the three layers, of four questions."""


def answers(leaving: Sequence[Sequence[int]], stats: Sequence[Sequence[float]] = ()) -> list[dict[str, Any]]:
    """Return rows of an answer file; `stats` are (mi1, slope)."""
    rows: list[dict[str, Any]] = []
    for i, kept in enumerate(leaving):
        entering = [576, *kept[:-1]] if any(kept) else [0] * len(kept)
        rows.append({"question_id": str(i), "kept": {"entering": entering, "leaving": kept}})
    for row, (mi1, slope) in zip(rows, stats, strict=False):
        row["stats"] = {"mi0": 0.0, "mi1": mi1, "slope": slope, "scale": 1.0}
    return rows


def suite(folder: Path) -> list[StoredRun]:
    """Write runs of two methods at two budgets and of the unpruned model."""
    return comparable(
        [
            write_run(folder / "a64", "autoprune", 64, 80.0, (75, 84), percent=20.5, leaving=64.2),
            write_run(folder / "a192", "autoprune", 192, 85.0, (81, 88), percent=36.6, leaving=192.1),
            write_run(folder / "r64", "random", 64, 60.0, None, percent=12.1, leaving=64.0),
            write_run(folder / "r192", "random", 192, 70.0, (66, 74), percent=28.5, leaving=192.0),
            write_run(folder / "full", "full", None, 86.0, (82, 89), percent=100.0, entering=(576, 576, 576)),
        ]
    )


def points(axes: Any) -> dict[str, list[list[float]]]:
    """Return the points of each line, by label."""
    bars = {c.get_label(): c.lines[0] for c in axes.containers}
    lines = {**{line.get_label(): line for line in axes.lines}, **bars}
    return {str(k): np.asarray(v.get_xydata()).tolist() for k, v in lines.items() if not str(k).startswith("_")}


def bars(axes: Any, label: str) -> list[list[float]]:
    """Return (low, high) of the error bars of a line, for the points that have one."""
    (found,) = [c for c in axes.containers if c.get_label() == label]
    return [part[:, 1].tolist() for part in found.lines[2][0].get_segments() if len(part)]


def band(axes: Any) -> tuple[float, float]:
    """Return (low, high) of the unpruned model's band."""
    (found,) = [p for p in axes.patches if p.get_label() == "unpruned"]
    box = found.get_extents().transformed(axes.transData.inverted())
    return float(box.y0), float(box.y1)


# benchmarks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "x", "label"),
    [
        (accuracy.draw_accuracy_flops, {"autoprune": [20.5, 36.6], "random": [12.1, 28.5]}, "FLOPs"),
        (accuracy.draw_accuracy_tokens, {"autoprune": [64.2, 192.1], "random": [64.0, 192.0]}, "tokens"),
    ],
)
def test_benchmark_over_cost(draw: Any, x: dict[str, list[float]], label: str, tmp_path: Path) -> None:
    """Points and bars are the numbers of the files, the band is the unpruned model's interval."""
    (axes,) = draw(suite(tmp_path)).axes
    found = points(axes)
    assert found["autoprune"] == [[x["autoprune"][0], 80.0], [x["autoprune"][1], 85.0]]
    assert found["random"] == [[x["random"][0], 60.0], [x["random"][1], 70.0]]
    assert bars(axes, "autoprune") == [[75, 84], [81, 88]]
    assert bars(axes, "random") == [[66, 74]]
    assert [y for _, y in found["unpruned"]] == [86.0, 86.0]
    assert band(axes) == pytest.approx((82, 89))
    assert label in axes.get_xlabel() and axes.get_ylabel() == "accuracy (%)" and axes.get_title() == "GQA"


def test_a_panel_for_each_benchmark(tmp_path: Path) -> None:
    """The panels are in the order of the tables and share one legend."""
    runs = [
        write_run(tmp_path / f"{bench}-{method}", method, budget, figure, bench=bench)
        for bench, figure in (("pope", 70.0), ("vqav2", 60.0))
        for method, budget in (("autoprune", 64), ("full", None))
    ]
    figure = accuracy.draw_accuracy_flops(comparable(runs))
    assert [a.get_title() for a in figure.axes] == ["VQAv2", "POPE"]
    assert [points(a)["autoprune"] for a in figure.axes] == [[[20.0, 60.0]], [[20.0, 70.0]]]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["unpruned", "autoprune"]


def test_runs_that_differ_in_a_hyper_parameter_are_lines(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(k), hyper={"k0": k, "lam": 0.3}, figure=80 + k) for k in (0.2, 0.4)]
    (axes,) = accuracy.draw_accuracy_flops(comparable(runs)).axes
    assert points(axes) == {"autoprune, $k_0$ = 0.2": [[20.0, 80.2]], "autoprune, $k_0$ = 0.4": [[20.0, 80.4]]}


def test_every_line_has_a_look(tmp_path: Path) -> None:
    """Lines use the colours of the palette, and no two of the lines that a figure may have share a marker."""
    most = len(drawing.MARKERS)
    runs = [write_run(tmp_path / str(i), f"m{i:02}") for i in range(most)]
    (axes,) = accuracy.draw_accuracy_flops(runs).axes
    lines = [c.lines[0] for c in axes.containers]
    assert len({line.get_marker() for line in lines}) == len(lines) == most
    assert {line.get_color() for line in lines} == set(drawing.PALETTE)
    assert len({(line.get_color(), str(line.get_linestyle())) for line in lines}) == most
    with pytest.raises(ValueError, match=f"{most + 1} lines are too many"):
        accuracy.draw_accuracy_flops([*runs, write_run(tmp_path / "more", "more")])


def test_text_is_readable_and_the_legend_beside_the_data(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure = accuracy.draw_accuracy_flops(suite(tmp_path))
    drawing.save(figure, tmp_path / "f.png")
    assert dict(matplotlib.rcParams) == before
    figure.draw_without_rendering()
    (axes,) = figure.axes
    texts = [axes.xaxis.label, axes.yaxis.label, axes.title, *axes.get_xticklabels(), *figure.legends[0].get_texts()]
    assert min(t.get_fontsize() for t in texts) >= 8
    assert figure.get_figwidth() == 3.5
    assert figure.legends[0].get_window_extent().y1 < axes.get_tightbbox().y0
    inside = axes.xaxis.label, axes.yaxis.label, axes.title, *figure.legends[0].get_texts()
    for text in (t.get_window_extent() for t in inside):
        assert text.x0 >= 0 and text.x1 <= figure.bbox.x1 and text.y0 >= 0 and text.y1 <= figure.bbox.y1


# sweeps ------------------------------------------------------------------------------------------------------------


def sweep(folder: Path, hyper: Sequence[dict[str, Any]], method: str = "autoprune") -> list[StoredRun]:
    """Write a run for each set of hyper-parameters, with figures 70, 71, ... and intervals of 3 points."""
    runs = [
        write_run(folder / f"{method}{i}", method, 64, 70.0 + i, (67.0 + i, 73.0 + i), hyper={"strict": True, **h})
        for i, h in enumerate(hyper)
    ]
    return comparable([*runs, write_run(folder / f"{method}full", "full", None, 86.0, (82, 89))])


def test_sweep_of_a_number(tmp_path: Path) -> None:
    """The only hyper-parameter that varies, k0, is the axis, and the run with its default is marked."""
    hyper = [{"k0": k, "gamma": 0.2} for k in (0.4, 0.2, 0.6)]
    (axes,) = accuracy.draw_sweep(sweep(tmp_path, hyper)).axes
    found = points(axes)
    assert found["autoprune 64"] == [[0.2, 71.0], [0.4, 70.0], [0.6, 72.0]]
    assert bars(axes, "autoprune 64") == [[68, 74], [67, 73], [69, 75]]
    assert found["default"] == [[0.4, 70.0]] and band(axes) == pytest.approx((82, 89))
    assert axes.get_xlabel() == "$k_0$ (1 / layer)" and axes.get_xscale() == "linear"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.2", "0.4", "0.6"]


def test_sweep_over_orders_of_magnitude(tmp_path: Path) -> None:
    (axes,) = accuracy.draw_sweep(sweep(tmp_path, [{"mi_scale": 10.0**i} for i in range(3)])).axes
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "mi_scale"


def test_sweep_of_two_numbers(tmp_path: Path) -> None:
    """The hyper-parameter with more values is the axis, and each value of the other is a line."""
    hyper = [{"gamma": g, "k0": k} for g in (0.0, 0.2) for k in (0.2, 0.4, 0.6)]
    (axes,) = accuracy.draw_sweep(sweep(tmp_path, hyper)).axes
    found = points(axes)
    assert found[r"autoprune 64, $\gamma$ = 0"] == [[0.2, 70.0], [0.4, 71.0], [0.6, 72.0]]
    assert found[r"autoprune 64, $\gamma$ = 0.2"] == [[0.2, 73.0], [0.4, 74.0], [0.6, 75.0]]
    assert found["default"] == [[0.4, 74.0]] and axes.get_xlabel().startswith("$k_0$")


def test_sweep_around_a_run(tmp_path: Path) -> None:
    """If each run differs from a central one in one of three hyper-parameters, each of them has a panel."""
    centre = {"k0": 0.4, "gamma": 0.2, "lam": 0.3}
    changes: list[dict[str, Any]] = [{}, {"k0": 0.2}, {"gamma": 0.1}, {"gamma": 0.4}, {"lam": 0.0}]
    figure = accuracy.draw_sweep(sweep(tmp_path, [{**centre, **c} for c in changes]))
    found = {a.get_xlabel()[:4]: points(a)["autoprune 64"] for a in figure.axes}
    assert found == {
        "$k_0": [[0.2, 71.0], [0.4, 70.0]],
        "$\\ga": [[0.1, 72.0], [0.2, 70.0], [0.4, 73.0]],
        "$\\la": [[0.0, 74.0], [0.3, 70.0]],
    }
    assert all(points(a)["default"][0][1] == 70.0 for a in figure.axes)


def test_sweep_of_words(tmp_path: Path) -> None:
    """If None is among the values, each value has its own place on the axis, and no line connects them."""
    (axes,) = accuracy.draw_sweep(sweep(tmp_path, [{"x0": 20.0}, {"x0": None}, {"x0": 9.5}])).axes
    assert points(axes)["autoprune 64"] == [[0, 71.0], [1, 72.0], [2, 70.0]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["None", "9.5", "20"]
    assert axes.containers[0].lines[0].get_linestyle() == "None" and points(axes)["default"] == [[0, 71.0]]


def test_sweep_of_two_budgets_is_two_lines(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{t}-{k}", tokens=t, figure=t + k, hyper={"k0": k}) for t in (64, 192) for k in (0.2, 0.4)
    ]
    (axes,) = accuracy.draw_sweep(comparable(runs)).axes
    found = points(axes)
    assert found["autoprune 64"] == [[0.2, 64.2], [0.4, 64.4]]
    assert found["autoprune 192"] == [[0.2, 192.2], [0.4, 192.4]]


# tokens ------------------------------------------------------------------------------------------------------------


def test_retention(tmp_path: Path) -> None:
    """Lines show each question with an image, median and percentiles; a run with equal counts is left out."""
    rows = answers([*KEPT, [0, 0, 0]])
    run = write_run(tmp_path / "a", answers=rows)
    even = write_run(tmp_path / "r", "random", answers=answers([[64, 64, 64]] * 4))
    (axes,) = tokens.draw_retention([run, even]).axes
    lines = [line.get_ydata().tolist() for line in axes.lines if line.get_label() == "question"]
    assert lines == KEPT
    assert points(axes)["median"] == [[0, 144], [1, 85], [2, 72.5]]
    edges = [line.get_ydata().tolist() for line in axes.lines if line.get_label() == tokens.BAND]
    assert edges == np.percentile(KEPT, (5, 95), axis=0).tolist()
    (area,) = axes.collections
    x, y = area.get_paths()[0].vertices.T
    assert (y[x == 1].min(), y[x == 1].max()) == pytest.approx((edges[0][1], edges[1][1]))
    assert [t.get_text() for t in axes.texts] == ["4 questions"] and axes.get_title() == "GQA, autoprune 64"


def test_retention_draws_some_of_many_questions(tmp_path: Path) -> None:
    kept = [[144, n, 10] for n in range(601)]
    (axes,) = tokens.draw_retention([write_run(tmp_path / "a", answers=answers(kept))]).axes
    lines = [line.get_ydata()[1] for line in axes.lines if line.get_label() == "question"]
    assert lines == list(range(0, 601, 4)) and points(axes)["median"][1] == [1, 300]


def test_survival(tmp_path: Path) -> None:
    """Shares are of the unpruned model's 576 tokens, also for a method that prunes before the first layer."""
    runs = [
        write_run(tmp_path / "a", entering=(576, 144, 72)),
        write_run(tmp_path / "r", "random", entering=(64, 64, 64)),
        write_run(tmp_path / "f", "full", None, entering=(576, 576, 576)),
    ]
    (axes,) = tokens.draw_survival(runs).axes
    found = points(axes)
    assert found["autoprune 64"] == [[0, 100], [1, 25], [2, 12.5]]
    assert found["random 64"] == [[i, pytest.approx(100 / 9)] for i in range(3)]
    assert found["unpruned"] == [[0, 100], [1, 100], [2, 100]]


STATS = [(1.0, 0.2), (2.0, 0.0), (1.5, 0.1), (0.5, 0.3)]
TYPES = ["verify", "query", "query", None]


def test_information_by_type(tmp_path: Path) -> None:
    scores = [{"question_id": str(i), "score": 1.0, "type": t} for i, t in enumerate(TYPES)]
    run = write_run(tmp_path / "a", answers=answers(KEPT, STATS), scores=scores)
    plain = write_run(tmp_path / "r", "random", answers=answers(KEPT))
    left, right = tokens.draw_information([run, plain]).axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["all (4)", "query (2)", "verify (1)", "no type (1)"]
    medians = [c for c in left.collections if len(c.get_segments()) == 4][1]
    assert [s[0, 0] for s in medians.get_segments()] == [1.25, 1.75, 1.0, 0.5]
    boxes = [(p.get_x(), p.get_x() + p.get_width()) for p in right.patches]
    assert boxes[:2] == [pytest.approx(np.percentile([0.2, 0.0, 0.1, 0.3], (25, 75))), pytest.approx((0.025, 0.075))]
    assert "(bit)" in left.get_xlabel() and "slope" in right.get_xlabel()


def test_information_without_scores(tmp_path: Path) -> None:
    (left, _) = tokens.draw_information([write_run(tmp_path / "a", answers=answers(KEPT, STATS))]).axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["all (4)"]


def test_scores_of_other_questions_are_refused(tmp_path: Path) -> None:
    scores = [{"question_id": str(i), "score": 1.0, "type": "query"} for i in (1, 0, 2, 3)]
    run = write_run(tmp_path / "a", answers=answers(KEPT, STATS), scores=scores)
    with pytest.raises(ValueError, match=r"scores.jsonl has other questions than the answer file beside it"):
        tokens.draw_information([run])


def test_answers_without_counts_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", answers=[{"question_id": "0", "text": "no"}])
    with pytest.raises(ValueError, match=r"answers.jsonl does not state the tokens of each layer"):
        tokens.draw_retention([run])


# speed -------------------------------------------------------------------------------------------------------------


def measured(method: str, budget: int, ratio: float, times: float) -> dict[str, Any]:
    """Return a row of bench.json."""
    spread = {"q1": times - 0.25, "median": times, "q3": times + 0.5}
    head = {"method": method, "tokens": budget, "batch": 1, "visual": 576, "text": 84}
    return {**head, "flops": {"ratio": ratio}, "stages": {"prefill": {"speedup": spread}}}


def bench(folder: Path, device: str, rows: Sequence[dict[str, Any]]) -> None:
    result = {"rows": rows, "settings": {"model": None, "shape": "7b"}, "machine": {"device": device, "dtype": "f16"}}
    folder.mkdir(parents=True)
    (folder / "bench.json").write_text(json.dumps(result))


def test_speed(tmp_path: Path) -> None:
    """Each file has a panel, and rows can be selected by method, model and budget."""
    rows = [measured("autoprune", 64, 3.5, 3.0), measured("autoprune", 192, 2.0, 1.75), measured("vtw", 64, 3.5, 2.0)]
    bench(tmp_path / "a", "CPU", [*rows, {**rows[0], "error": "out of memory"}])
    bench(tmp_path / "b", "GPU", rows[:1])
    found = speed.read_bench([tmp_path, tmp_path / "a" / "bench.json"])
    first, second = speed.draw_speed(found).axes
    assert first.get_title() == "7b, CPU, f16\nbatch 1, 576 + 84 tokens" and second.get_title().startswith("7b, GPU")
    assert points(first)["autoprune"] == [[2.0, 1.75], [3.5, 3.0]] and points(first)["vtw"] == [[3.5, 2.0]]
    assert bars(first, "autoprune") == [[1.5, 2.25], [2.75, 3.5]]
    assert sorted((t.get_text(), *t.xy) for t in first.texts) == [("192", 2.0, 1.75), ("64", 3.5, 2.0)]
    chosen = speed.select_bench(found, method=["vtw"], model=["7b"], tokens=[64])
    assert [r["rows"] for r in chosen] == [rows[2:]] and not speed.select_bench(found, model=["13b"])


def test_budgets_of_close_points_do_not_cover_each_other(tmp_path: Path) -> None:
    """The first budget is written below its point, the second above its point, and the third is omitted."""
    rows = [measured("autoprune", 100 + i, 2.0 + 0.1 * i, 2.0) for i in range(3)] + [measured("vtw", 64, 9.0, 8.0)]
    bench(tmp_path / "a", "CPU", rows)
    (axes,) = speed.draw_speed(speed.read_bench([tmp_path])).axes
    assert {t.get_text(): t.xyann[1] > 0 for t in axes.texts} == {"100": False, "101": True, "64": False}


# files and the command ---------------------------------------------------------------------------------------------


def test_files(tmp_path: Path, capsys: Any) -> None:
    """A PDF and a PNG are written unless a suffix selects one format; two calls write the same bytes."""
    suite(tmp_path / "runs")
    command = ["figure", "accuracy-flops", "--runs", str(tmp_path / "runs"), "--out"]
    for name in ("one", "two"):
        assert main([*command, str(tmp_path / name / "v1.5")]) == 0
    one, two = ([tmp_path / n / f"v1.5.{s}" for s in ("pdf", "png")] for n in ("one", "two"))
    assert capsys.readouterr().out.splitlines() == [*map(str, one), *map(str, two)]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    text = one[0].read_bytes()
    assert text.startswith(b"%PDF") and b"/CreationDate" not in text
    assert b"/FontFile2" in text and b"/Type3" not in text and b"/Subtype /Image" not in text
    with Image.open(one[1]) as image:
        assert image.width == round(3.5 * drawing.DPI) and image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    for suffix in ("png", "svg", "pdf"):
        assert main([*command, str(tmp_path / suffix / f"f.{suffix}")]) == 0
        assert [p.name for p in (tmp_path / suffix).iterdir()] == [f"f.{suffix}"]


def test_the_default_place(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    suite(tmp_path / "playground/results/gqa")
    assert main(["figure", "survival", "--method", "random", "--tokens", "64"]) == 0
    assert capsys.readouterr().out.split() == [f"playground/results/figures/survival.{s}" for s in ("pdf", "png")]


def test_the_unpruned_model_stays_when_runs_are_chosen(tmp_path: Path, monkeypatch: Any) -> None:
    suite(tmp_path / "runs")
    write_run(tmp_path / "runs" / "pope", bench="pope")
    seen: list[StoredRun] = []
    monkeypatch.setattr("llava_prune.report.figures.save", lambda figure, out: [])
    draw = OF_RUNS["survival"]
    monkeypatch.setitem(OF_RUNS, "survival", lambda runs: [seen.extend(runs), draw(runs)][1])
    choice = ["--task", "gqa", "--method", "autoprune", "--tokens", "192", "--model", "llava-tiny"]
    assert main(["figure", "survival", "--runs", str(tmp_path / "runs"), *choice]) == 0
    assert [r.label for r in seen] == ["full", "autoprune-192"]


def test_every_name_is_a_figure() -> None:
    assert {*OF_RUNS, SPEED} == set(arguments.FIGURES)


def refused(capsys: Any, *argv: str) -> str:
    """Run a command that is refused; return its message of one line."""
    assert main(["figure", *argv]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_variants_of_sweeps_can_be_left_out(tmp_path: Path, capsys: Any) -> None:
    """If there are more runs than a figure can show, the message suggests --no-sweeps, which draws fewer."""
    suite(tmp_path)
    for n in range(20):
        run = write_run(tmp_path / f"v{n}", figure=50.0 + n, hyper={"k0": n / 10})
        varied = {**run.result, "label": f"autoprune-64,k0={n / 10}"}
        (run.folder / "result.json").write_text(json.dumps(varied), encoding="utf-8")
    argv = ["figure", "accuracy-flops", "--runs", str(tmp_path), "--out", str(tmp_path / "x.png")]
    assert main(argv) == 1 and "--no-sweeps" in capsys.readouterr().err
    assert main([*argv, "--no-sweeps"]) == 0 and (tmp_path / "x.png").is_file()


def test_unsuitable_runs_are_refused(tmp_path: Path, capsys: Any) -> None:
    """Each refusal names the missing run or measurement and the command that makes it."""
    (tmp_path / "none").mkdir()
    full = tmp_path / "full"
    write_run(full, "full", None, answers=answers([[576] * 3] * 2))
    even = tmp_path / "even"
    write_run(even, "random", answers=answers([[64] * 3] * 2))
    expected = {
        ("survival", tmp_path / "none"): "no finished runs in .*; make some with llava-prune eval gqa",
        ("accuracy-flops", full): "needs a finished run of a pruning method.* llava-prune eval gqa",
        ("survival", full): "needs a finished run of a pruning method.* llava-prune eval gqa",
        ("retention", even): "needs a run whose questions keep different numbers.* --method autoprune",
        ("information", even): "needs a run of AutoPrune.* --method autoprune",
        ("sweep", even): "differ in a hyper-parameter.* llava-prune sweep",
        ("speed", even): "no matching measurement in .*; make one with llava-prune bench",
    }
    for (name, place), message in expected.items():
        with pytest.raises(ValueError, match=message):
            raise ValueError(refused(capsys, name, "--runs", str(place)))
    assert "--task pope: no finished run in" in refused(capsys, "sweep", "--runs", str(even), "--task", "pope")
    assert "--task is for runs" in refused(capsys, "speed", "--runs", str(even), "--task", "gqa")


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, capsys: Any) -> None:
    first = write_run(tmp_path / "a" / "x")
    write_run(tmp_path / "b" / "x", model="other/13b")
    write_run(tmp_path / "c" / "x", questions=5, method="random")
    write_run(tmp_path / "d" / "x", figure=91.0)
    write_run(tmp_path / "e" / "x")
    base = ["accuracy-flops", "--out", str(tmp_path / "f.png"), "--runs", str(tmp_path / "a")]
    assert "several models (models/llava-tiny, other/13b); choose one with --model" in refused(
        capsys, *base, str(tmp_path / "b")
    )
    assert "has 4 questions of gqa" in refused(capsys, *base, str(tmp_path / "c"))
    assert "same hyper-parameters and different figures" in refused(capsys, *base, str(tmp_path / "d"))
    assert main(["figure", *base, str(tmp_path / "b"), "--model", "13b"]) == 0
    assert main(["figure", *base, str(tmp_path / "e")]) == 0  # the same run twice
    assert [r.folder for r in comparable([first, first])] == [first.folder]
    relabelled = write_run(tmp_path / "e" / "one")
    path = relabelled.folder / "result.json"
    for letter in "xy":
        path.write_text(json.dumps({**relabelled.result, "files": {"annotations": {"sha256": letter}}}))
        shutil.copytree(relabelled.folder, tmp_path / "f" / letter)
    assert "were scored with different label files of gqa" in refused(capsys, *base[:-1], str(tmp_path / "f"))


def test_sweeps_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    hyper = [{"k0": a, "gamma": b, "lam": c} for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    with pytest.raises(
        ValueError, match="k0, gamma, lam vary among the runs of autoprune 64, and the figure shows two"
    ):
        accuracy.draw_sweep(sweep(tmp_path, hyper))


def test_too_many_panels_are_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i), tokens=i + 2, answers=answers(KEPT)) for i in range(13)]
    with pytest.raises(ValueError, match="13 panels are too many"):
        tokens.draw_retention(runs)


def test_matplotlib_is_optional(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    write_run(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = refused(capsys, "survival", "--runs", str(tmp_path))
    assert "needs matplotlib; pip install 'llava-prune[report]'" in message


def test_no_torch_and_no_pyplot(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    code = (
        "import sys; from llava_prune.cli import main\n"
        f"assert main(['figure', 'survival', '--runs', {str(tmp_path)!r}, '--out', {str(tmp_path / 'f.png')!r}]) == 0\n"
        "assert 'matplotlib.figure' in sys.modules\n"
        "assert not {'torch', 'transformers', 'matplotlib.pyplot', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2], timeout=60)
