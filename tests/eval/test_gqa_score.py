"""GQA's scorer on hand-computed cases and on broken input, and the statistics of scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_prune.eval.reading import read_jsonl
from llava_prune.eval.task import Question, Sources, load_task, read_questions
from llava_prune.eval.tasks.gqa import export, load_labels, prediction, score
from llava_prune.stats import mean_interval, paired_difference, wilson


def label(answer: str, structural: str = "query", group: str | None = "thing", **more: object) -> dict:
    return {
        "question": "What is it?",
        "answer": answer,
        "isBalanced": True,
        "types": {"structural": structural, "semantic": "obj", "detailed": "d"},
        "groups": {"global": group, "local": None},
        "semantic": [
            {"operation": "select", "argument": "cat (0)", "dependencies": []},
            {"operation": "query", "argument": "name", "dependencies": [0]},
        ],
        **more,
    }


LABELS = {
    "1": label("yes", "verify", None),
    "2": label("cup"),
    "3": label("cat"),
    "4": label("left", "choose"),
    "5": label("dog", isBalanced=False),
}


def asked(*ids: str) -> list[Question]:
    return [Question(i, None, "", "") for i in ids]


def files(**given: Path) -> Sources:
    return Sources(load_task("gqa"), None, given)


def said(*texts: str) -> list[dict]:
    return [{"question_id": str(i), "text": t} for i, t in enumerate(texts, 1)]


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("Yes.", "yes"),
        ("No...", "no"),
        ("t-shirt", "t-shirt"),
        ("a. b.", "a. b"),
        ("Cup. ", "cup. "),
        ("The Cup", "the cup"),
    ],
)
def test_conversion(text: str, out: str) -> None:
    assert prediction(text) == out


def test_figures_by_hand() -> None:
    got = score(said("Yes.", "cup", "the cat", "right"), LABELS)
    assert got["figure"] == 50.0 and got["rows"] == 4
    details = got["details"]
    assert details["binary"]["accuracy"] == 50.0 and details["open"]["accuracy"] == 50.0
    assert {k: v["right"] for k, v in details["structural"].items()} == {"choose": 0, "query": 1, "verify": 1}
    assert details["steps"] == {"1": details["overall"]} and details["words"] == {"3": details["overall"]}
    # group "thing": gold cup, cat, left once each; predicted cup once: (0 + 1 + 1) * 3 / 3 / 100
    assert details["distribution"] == pytest.approx(0.02)
    assert got["scores"] == {"1": True, "2": True, "3": False, "4": False}


def test_every_balanced_question_needs_an_answer() -> None:
    with pytest.raises(ValueError, match="1 of 4 questions have no answer"):
        score(said("yes", "cup", "cat"), LABELS)
    assert score(said("yes", "cup"), LABELS, asked=asked("1", "2"))["figure"] == 100.0
    with pytest.raises(ValueError, match="no balanced question"):
        score(said("yes"), LABELS, asked=asked("5"))


def test_last_of_repeated_answers_counts() -> None:
    assert score([*said("no"), *said("yes")], LABELS, asked=asked("1"))["figure"] == 100.0


def test_export(tmp_path: Path) -> None:
    (path,) = export(said("Yes."), LABELS, tmp_path, "m")
    assert json.loads(path.read_text()) == [{"questionId": "1", "prediction": "yes"}]
    assert path.name == "testdev_balanced_predictions.json"


@given(st.lists(st.text(), min_size=4, max_size=4))
def test_any_text_scores(texts: list[str]) -> None:
    got = score(said(*texts), LABELS)
    assert 0 <= got["figure"] <= 100 and got["details"]["overall"]["right"] == sum(got["scores"].values())


@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_error_or_rows(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("x") / "q.jsonl"
    path.write_bytes(content)
    for read, kind in ((read_questions, "questions"), (load_labels, "annotations")):
        try:
            read(files(**{kind: path}))
        except ValueError as error:
            assert str(path) in str(error)


def test_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": "1", "text": "a"}\n\n{"question_id": "2", \n')
    with pytest.raises(ValueError, match="q.jsonl, line 3: broken JSON"):
        read_questions(files(questions=path))
    path.write_text('{"question_id": "1"}\n')
    with pytest.raises(ValueError, match="line 1: no field 'text'"):
        read_jsonl(path, ("question_id", "text"))
    path.write_text('{"question_id": "1", "text": "a"}\n{"question_id": "1", "text": "b"}\n')
    with pytest.raises(ValueError, match="is repeated"):
        read_questions(files(questions=path))


def test_wilson() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.490162, abs=1e-6), pytest.approx(0.943318, abs=1e-6))
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="outside"):
        wilson(3, 2)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share(case: tuple[int, int]) -> None:
    low, high = wilson(*case)
    assert 0 <= low <= case[0] / case[1] <= high <= 1


def test_paired_difference() -> None:
    mean, low, high = paired_difference([True, True, False, False], [True, False, False, False])
    zero = wilson(0, 4)[1]
    assert mean == 0.25 and high == pytest.approx(wilson(1, 4)[1])
    assert low == pytest.approx(0.25 - ((0.25 - wilson(1, 4)[0]) ** 2 + zero**2) ** 0.5)
    assert paired_difference([0.3, 1.0], [0.0, 1.0])[0] == pytest.approx(0.15)
    low, high = mean_interval([0.0, 0.3, 1.0, 0.9])
    assert 0 <= low < 0.55 < high <= 1 and mean_interval([1, 0]) == wilson(1, 2)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([True], [])


@pytest.mark.parametrize("score", [0.0, 0.3, 1.0])
def test_intervals_of_equal_answers_have_a_width(score: float) -> None:
    """The interval of equal answers has a positive width, which shrinks with their number."""
    widths = []
    for n in (1, 10, 100, 10_000):
        mean, low, high = paired_difference([score] * n, [score] * n)
        assert mean == 0 and low == -high and high == pytest.approx(wilson(0, n)[1])
        widths.append(high)
        inside = mean_interval([score] * n)
        assert inside[0] <= score <= inside[1] and inside[1] - inside[0] >= wilson(0, n)[1]
    assert widths == sorted(widths, reverse=True) and widths[1] > 0.2 and widths[-1] < 0.001


@pytest.mark.parametrize("n", [10, 25])
@pytest.mark.parametrize(("gained", "lost"), [(0.02, 0.02), (0.1, 0.1), (0.05, 0.2), (0.3, 0.25), (0.0, 0.1)])
def test_coverage_of_the_paired_interval(n: int, gained: float, lost: float) -> None:
    """The interval contains the true difference in about 95 % of samples, computed exactly over all outcomes."""
    held = 0.0
    for up in range(n + 1):
        for down in range(n + 1 - up):
            ours = [1] * up + [0] * down + [1] * (n - up - down)
            theirs = [0] * up + [1] * down + [1] * (n - up - down)
            _, low, high = paired_difference(ours, theirs)
            ways = math.comb(n, up) * math.comb(n - up, down)
            chance = ways * gained**up * lost**down * (1 - gained - lost) ** (n - up - down)
            held += chance * (low <= gained - lost <= high)
    assert held >= 0.925


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_the_paired_interval_holds_its_mean(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    mean, low, high = paired_difference(ours, theirs)
    assert -1 <= low <= mean <= high <= 1 and high > low
    back = paired_difference(theirs, ours)
    assert back == pytest.approx((-mean, -high, -low))
