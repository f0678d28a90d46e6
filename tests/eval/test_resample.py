"""Mean ratios with bootstrap intervals: hand-checked cases, and every benchmark's figure from its stored scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_prune.eval import resample
from llava_prune.eval.resample import Units, mean_ratio, mean_units, ratio_to_full, units_of
from llava_prune.eval.result import score_rows
from llava_prune.eval.task import load_task
from llava_prune.report.store import StoredRun
from tests.eval.test_question_scores import NAMES, Made
from tests.report.conftest import make_run, write_run


def test_the_mean_of_ratios() -> None:
    """Ratios of 1/2 and 3/4 on two benchmarks have a mean of 5/8, whatever their numbers of questions."""
    full = mean_units([1.0, 1.0]), mean_units([1.0] * 4)
    pairs = [(full[0], [mean_units([1.0, 0.0])]), (full[1], [mean_units([1.0, 1.0, 1.0, 0.0])])]
    mean, low, high = mean_ratio(pairs)
    assert mean == 0.625 and 0 < low < mean < high <= 1


def test_seeds_are_averaged_before_the_ratio() -> None:
    full = mean_units([1.0, 1.0, 0.0, 0.0])
    runs = [mean_units([1.0, 0.0, 0.0, 0.0]), mean_units([0.0, 0.0, 0.0, 0.0])]
    assert mean_ratio([(full, runs)], draws=1)[0] == pytest.approx(0.25)


def test_the_same_questions_are_drawn_for_both_models() -> None:
    """Equal scores give a ratio of 1 in every draw, and halved scores a ratio of 1/2."""
    scores = [float(i % 3 > 0) for i in range(30)]
    full = mean_units(scores)
    assert mean_ratio([(full, [mean_units(scores)])]) == (1.0, 1.0, 1.0)
    assert mean_ratio([(full, [mean_units([s / 2 for s in scores])])]) == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_is_that_of_every_draw_of_three_questions() -> None:
    """The mean of 0, 1, 1 over 27 equally likely draws is 0 with probability 1/27 and 1 with 8/27."""
    full, run = mean_units([1.0] * 3), mean_units([0.0, 1.0, 1.0])
    _, low, high = mean_ratio([(full, [run])], draws=20000)
    assert (low, high) == (0.0, 1.0)
    weights = resample.draw(full.groups, 20000, (0, 0))
    found = resample.figures(run, weights) / 100
    assert [np.mean(np.isclose(found, k / 3)) for k in range(4)] == pytest.approx(
        [1 / 27, 6 / 27, 12 / 27, 8 / 27], abs=0.01
    )


def test_the_interval_is_as_wide_as_the_standard_error() -> None:
    """For 80 right answers of 100, the half-width is 1.96 x sqrt(0.8 x 0.2 / 100) = 0.078."""
    full, run = mean_units([1.0] * 100), mean_units([1.0] * 80 + [0.0] * 20)
    mean, low, high = mean_ratio([(full, [run])])
    assert mean == pytest.approx(0.8) and (mean - low, high - mean) == pytest.approx((0.078, 0.078), abs=0.011)


def test_the_interval_of_a_figure_and_of_a_difference() -> None:
    """For 80 right answers of 100, 1.96 standard errors are 7.8 points; for the paired difference to 90, 5.9."""
    run, full = ([float(i % 10 >= wrong) for i in range(100)] for wrong in (2, 1))
    units = mean_units(run)
    low, high = resample.interval(units) or (0, 0)
    assert (80 - low, high - 80) == pytest.approx((7.8, 7.8), abs=1.1)
    low, high = resample.interval(units, mean_units(full)) or (0, 0)  # 10 lost and none won
    assert (-10 - low, high + 10) == pytest.approx((5.9, 5.9), abs=1.1)
    assert resample.interval(mean_units([])) is None
    assert resample.interval(mean_units([1.0] * 9)) is None and resample.interval(units, units) is None
    with pytest.raises(ValueError, match="questions differ from those of the unpruned model"):
        resample.interval(units, mean_units(full[:50]))


def test_draws_are_repeatable_and_differ_between_benchmarks() -> None:
    scores = [i / 40 for i in range(1, 41)]
    pairs = [(mean_units(scores[::-1]), [mean_units(scores)])] * 2
    assert mean_ratio(pairs) == mean_ratio(pairs) != mean_ratio(pairs, seed=1)
    one, two = (resample.draw([""] * 9, 5, (0, n)) for n in (0, 1))
    assert (one != two).any()


def test_units_are_drawn_within_their_group() -> None:
    groups = ["a", "b", "a", "b", "b"]
    weights = resample.draw(groups, 50, (0, 0))
    assert (weights[:, [0, 2]].sum(1) == 2).all() and (weights[:, [1, 3, 4]].sum(1) == 3).all()


def test_other_questions_and_an_unpruned_zero() -> None:
    full = mean_units([0.0, 0.0])
    assert np.isnan(mean_ratio([(full, [mean_units([1.0, 0.0])])])).all()
    with pytest.raises(ValueError, match="benchmark 1 have other questions"):
        mean_ratio([(full, [mean_units([1.0])])])
    with pytest.raises(ValueError, match="at least one benchmark, and a run"):
        mean_ratio([(full, [])])


# benchmarks --------------------------------------------------------------------------------------------------------


def stored(folder: Path, made: Made, **more: Any) -> StoredRun:
    """Write a run with made-up answers as an evaluation stores it."""
    found = made.score()
    scores = score_rows(made.answers, found["questions"])
    settings = {"figure": found["figure"], "bench": made.task.name, "answers": made.answers, "scores": scores}
    return write_run(folder, **{**settings, **more})


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_follows_from_the_stored_scores(name: str, tmp_path: Path) -> None:
    """With weights of 1, the figure equals that of the scorer; the ratio of a run to itself is 100 %."""
    made = Made(name)
    run = stored(tmp_path / "a", made)
    units = units_of(made.task, run)
    assert resample.figures(units, np.ones((2, len(units.groups)))) == pytest.approx([run.figure] * 2)
    assert ratio_to_full([made.task], {name: run}, {name: [run]}) == {
        "ratio": pytest.approx(100), "low": pytest.approx(100), "high": pytest.approx(100), "why": None
    }  # fmt: skip


@pytest.mark.parametrize(("name", "count"), [("mme", 100), ("mmbench", 60), ("pope", 360), ("sqa", 100)])
def test_what_is_a_unit(name: str, count: int, tmp_path: Path) -> None:
    """Units are MME perception images, MMBench questions with rotations, and ScienceQA questions with an image."""
    made = Made(name)
    assert len(units_of(made.task, stored(tmp_path / "a", made)).groups) == count


def test_f1_of_drawn_questions() -> None:
    """Two right yes and a wrong no have an F1 of 0.8, a right yes drawn three times 1, a wrong no three times 0."""
    task = load_task("pope")
    answers = [{"text": text} for text in ("yes", "yes", "no")]
    scores = [{"score": s, "type": "random"} for s in (1.0, 1.0, 0.0)]
    units: Units = task.scorer.units(answers, scores)
    found = resample.figures(units, np.array([[1.0, 1, 1], [3, 0, 0], [0, 0, 3]]))
    assert found == pytest.approx([80, 100, 0])


def test_a_figure_that_does_not_follow_is_refused(tmp_path: Path) -> None:
    made = Made("gqa")
    with pytest.raises(ValueError, match="the figure is 12.5, but the scores of the questions give 66.5"):
        units_of(made.task, stored(tmp_path / "a", made, figure=12.5))


def test_reasons_without_a_ratio(tmp_path: Path) -> None:
    """The reason for a missing ratio is a benchmark not run, an undefined figure, or an unpruned figure of 0."""
    tasks = [load_task("gqa"), load_task("textvqa")]
    asked = [("Is it?", "yes", 1.0)], [("Is it?", "no", 0.0)]
    run, zero, other = (
        StoredRun(f, json.loads((f / "result.json").read_text()))
        for f in (
            make_run(tmp_path / "a", asked[0]),
            make_run(tmp_path / "b", asked[1]),
            make_run(tmp_path / "c", asked[0], figure=None),
        )
    )
    full = {"gqa": run, "textvqa": run}
    assert ratio_to_full(tasks, full, {"gqa": [run]})["why"] == "not run on textvqa"
    assert ratio_to_full(tasks, full, {"gqa": [run], "textvqa": [other]})["why"] == "no figure on textvqa"
    found = ratio_to_full(tasks, {"gqa": zero, "textvqa": run}, {"gqa": [run], "textvqa": [run]})
    assert found["ratio"] is None and found["why"] == "the unpruned model has 0 on gqa"
    assert ratio_to_full(tasks, full, {"gqa": [run], "textvqa": [zero]})["ratio"] == pytest.approx(50)
