"""Scorers on broken input: a clear error or the official figure, never a traceback or a wrong figure."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llava_prune.cli import main
from llava_prune.eval.score import score_files
from llava_prune.eval.task import Sources, load_task, questions_of, task_names

FOLDERS = {"sqa": "sqa", "mme": "MME", "ocrbench": "OCRBench"}
MANY = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LABELS = {
    "gqa": "data/testdev_balanced_questions.json",
    "sqa": "llava_test_CQM-A.json",
    "textvqa": "TextVQA_0.5.1_val.json",
    "pope": "coco/coco_pope_random.json",
    "mme": "MME_Benchmark_release_version/count/1.txt",
    "mmbench": "mmbench_dev_20230712.tsv",
    "mmbench_cn": "mmbench_dev_cn_20231003.tsv",
    "ocrbench": "OCRBench.json",
    "vqav2": "annotations.json",
}
RIGHT = {"sqa": "A", "mmbench": "A", "mmbench_cn": "A"}


@pytest.fixture(params=sorted(LABELS))
def bench(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def good(nine: Path, bench: str) -> list[dict]:
    """Return answers in the order of the questions, alternately yes and no (or A and B)."""
    questions = questions_of(Sources(load_task(bench), nine))
    words = ("A", "B") if bench in RIGHT else ("yes", "no")
    return [
        {"question_id": q.id, "prompt": q.stored, "text": words[i % 2], "model_id": "m"}
        for i, q in enumerate(questions)
    ]


def encode(rows: list[Any], end: bytes = b"\n") -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode("utf-8", "surrogatepass") + end for r in rows)


def score(bench: str, content: bytes, nine: Path, folder: Path, data: Path | None = None) -> Any:
    """Return the figure and details, or None if there is no figure; the message of an error must be one line."""
    path = folder / "a.jsonl"
    path.write_bytes(content)
    try:
        result = score_files(bench, path, data or nine / FOLDERS.get(bench, bench), export=folder / "out")[0]
    except ValueError as error:
        assert len(str(error)) > 20 and "\n" not in str(error)
        return None
    if result["figure"] is None:
        assert len(result["why"]) > 20
        return None
    json.dumps(result, allow_nan=False)
    return result["figure"], result["details"]


def test_the_nine_are_here() -> None:
    assert sorted(LABELS) == task_names()


def test_harmless_differences(bench: str, good: list[dict], nine: Path, tmp_path: Path) -> None:
    """Byte-order mark, CRLF, blank lines and further fields do not change the figure."""
    plain = score(bench, encode(good), nine, tmp_path)
    assert plain is not None
    assert score(bench, b"\xef\xbb\xbf" + encode(good), nine, tmp_path) == plain
    assert score(bench, encode(good, b"\r\n"), nine, tmp_path) == plain
    assert score(bench, b"\n" + encode(good, b"\n\n"), nine, tmp_path) == plain
    assert score(bench, encode([{**r, "more": [1], "also": None} for r in good]), nine, tmp_path) == plain


def test_refused(bench: str, good: list[dict], nine: Path, tmp_path: Path, capsys: Any) -> None:
    """Files that no scorer can read are refused, on the command line, too."""
    some = encode(good)
    bad = {
        "empty": b"",
        "blank": b"\n \n",
        "not UTF-8": some.replace(b"model_id", b"model\xff\xfe", 1),
        "UTF-16": some.decode().encode("utf-16"),
        "cut": some[:-5],
        "null bytes": b"\0" * 64,
        "a list": encode([[1, 2]]),
        "text is no string": encode([{**good[0], "text": None}, *good[1:]]),
        "id is a list": encode([{**good[0], "question_id": [1]}, *good[1:]]),
        "id is NaN": encode([{**good[0], "question_id": float("nan")}, *good[1:]]),
        "id is true": encode([{**good[0], "question_id": True}, *good[1:]]),
        "no text": encode([{k: v for k, v in r.items() if k != "text"} for r in good]),
        "deep": b"[" * 100_000,
        "other questions": encode([{**r, "question_id": f"x{i}"} for i, r in enumerate(good)]),
    }
    for name, content in bad.items():
        assert score(bench, content, nine, tmp_path) is None, name
    data = nine / FOLDERS.get(bench, bench)
    assert main(["score", bench, "--answers", str(tmp_path / "a.jsonl"), "--data", str(data), "--json"]) == 1
    got = capsys.readouterr()
    assert got.out == "" and "llava-prune: " in got.err and "Traceback" not in got.err


def test_missing_and_repeated_ids(bench: str, good: list[dict], nine: Path, tmp_path: Path) -> None:
    plain = score(bench, encode(good), nine, tmp_path)
    missing = score(bench, encode(good[:-1]), nine, tmp_path)
    if bench == "sqa":  # a missing answer is wrong in the total and not part of the figure
        assert missing is not None and missing[1]["missing"] == 1 and missing[1]["overall"]["rows"] == len(good)
    else:
        assert missing is None
    again = score(bench, encode([*good, good[0]]), nine, tmp_path)
    assert again == (plain if bench in ("gqa", "sqa", "vqav2", "mmbench", "mmbench_cn") else None)
    other = score(bench, encode([*good, {**good[0], "text": "neither"}]), nine, tmp_path)
    last = score(bench, encode([{**good[0], "text": "neither"}, *good[1:]]), nine, tmp_path)
    assert other == (last if again is not None else None)


def test_a_part_of_a_run(bench: str, good: list[dict], nine: Path, tmp_path: Path) -> None:
    """An interrupted run can be scored with a part of the question file, and the message says so."""
    data, half = nine / FOLDERS.get(bench, bench), good[: len(good) // 2]
    answers = tmp_path / "a.jsonl"
    answers.write_bytes(encode(half))
    if bench == "sqa":  # LLaVA's scorer counts missing answers as wrong
        said = "; ".join(score_files(bench, answers, data)[2])
        assert (
            "2 of 4 questions have no answer and count as wrong in 'overall', while IMG-Accuracy leaves them out"
            in said
        )
    else:
        with pytest.raises(ValueError, match="answer") as caught:
            score_files(bench, answers, data)
        said = str(caught.value)
    assert "complete the run first, or score a part of the benchmark with --questions" in said
    questions = Sources(load_task(bench), data, inside=True).path("questions")
    part, text = tmp_path / questions.name, questions.read_text(encoding="utf-8")
    if questions.suffix == ".json":
        part.write_text(json.dumps(json.loads(text)[: len(half)]), encoding="utf-8")
    else:
        head = questions.suffix == ".tsv"
        part.write_text("".join(text.splitlines(keepends=True)[: len(half) + head]), encoding="utf-8")
    result, _, warnings = score_files(bench, answers, data, questions=part)
    assert result["figure"] is not None and result["rows"] == len(half)
    assert "no answer" not in "; ".join(warnings)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("types", []), ("types", {"structural": {}}), ("types", {"structural": "verify", "semantic": {}}),
        ("types", {"structural": "verify", "semantic": 5}), ("types", None), ("groups", [1]), ("groups", "x"),
        ("groups", {"global": {}}), ("groups", {"global": [1]}), ("question", None), ("question", 5), ("answer", 1),
        ("isBalanced", []), ("isBalanced", "no"), ("semantic", 5), ("semantic", {"a": 1}), ("semantic", [5]),
        ("semantic", [{"operation": "select"}]), ("semantic", [{"operation": 1, "argument": "x"}]), (None, [5]),
    ],
)  # fmt: skip
def test_gqas_annotations(field: str | None, value: Any, nine: Path, tmp_path: Path) -> None:
    """Every field that the score reads is checked; the message names the file and the question."""
    labels = json.loads((nine / "gqa" / LABELS["gqa"]).read_text(encoding="utf-8"))
    labels["2"] = value if field is None else {**labels["2"], field: value}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(labels), encoding="utf-8")
    answers = tmp_path / "a.jsonl"
    answers.write_bytes(encode([{"question_id": k, "text": "yes"} for k in labels]))
    with pytest.raises(ValueError, match="question '2'.*; fetch the file again") as caught:
        score_files("gqa", answers, None, annotations=path)
    assert str(path) in str(caught.value) and (field or "object") in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("groups", None), ("groups", {"global": None}), ("semantic", None), ("semantic", []), ("isBalanced", True)],
)
def test_gqas_annotations_that_say_nothing(field: str, value: Any, nine: Path, tmp_path: Path) -> None:
    labels = json.loads((nine / "gqa" / LABELS["gqa"]).read_text(encoding="utf-8"))
    labels["2"][field] = value
    (tmp_path / "annotations.json").write_text(json.dumps(labels), encoding="utf-8")
    answers = tmp_path / "a.jsonl"
    answers.write_bytes(encode([{"question_id": k, "text": "yes"} for k in labels]))
    assert score_files("gqa", answers, None, annotations=tmp_path / "annotations.json")[0]["figure"] == 50


def test_order(bench: str, good: list[dict], nine: Path, tmp_path: Path) -> None:
    """Scorers that join answers by id ignore their order; scorers that join by order refuse another order."""
    if bench == "ocrbench":
        pytest.skip("all rows have the same id here")
    turned = score(bench, encode(good[::-1]), nine, tmp_path)
    if bench == "pope":
        assert turned is None
        assert score(bench, encode([good[1], good[0], *good[2:]]), nine, tmp_path) is None
    elif bench == "mme":
        # The pairs of two tasks alternate, and each pair is consecutive within its task.
        assert score(bench, encode([good[0], good[2], good[1], good[3]]), nine, tmp_path) is not None
    else:
        assert turned is not None and turned[0] == score(bench, encode(good), nine, tmp_path)[0]


@MANY
@given(st.lists(st.text(alphabet=st.characters(codec=None)), min_size=12, max_size=12))
@example(["\ud800", "\x00", "\t", "\u2028", "=1+1", "\r\n", "", "'", "\ufeff", "\x85", "\u0130", "ß"])
def test_any_text_scores(bench: str, good: list[dict], nine: Path, tmp_path: Path, texts: list[str]) -> None:
    """Any answer gives a figure in range (or POPE's undefined F1), and can be exported."""
    rows = [{**r, "text": t} for r, t in zip(good, texts, strict=False)]
    content = b"".join(json.dumps(r).encode() + b"\n" for r in rows)  # escapes, so surrogates get through
    got = score(bench, content, nine, tmp_path)
    if got is None:
        assert bench == "pope"
        return
    assert 0 <= got[0] <= {"mme": 2000, "ocrbench": len(good)}.get(bench, 100)
    assert (tmp_path / "out").exists() == hasattr(load_task(bench).scorer, "export")


@MANY
@given(st.binary(max_size=300))
@example(b"\xff\xfe{\x00}\x00")
@example(b'{"a": 1}')
@example(b"index\tanswer\n1\tA\n1\tA\n")
@example(b'index\tanswer\n"1\tA\n')
@example(b"index\tanswer\nnan\tA\n")
@example(b'{"annotations": [{"question_id": 1, "answers": [{"answer": NaN}]}]}')
@example(b'{"data": [{"image_id": "t0", "question": 5, "answers": []}]}')
@example(b'[{"id": 1, "conversations": []}]')
def test_any_label_file(bench: str, good: list[dict], nine: Path, tmp_path: Path, content: bytes) -> None:
    data = tmp_path / "data"
    shutil.rmtree(data, ignore_errors=True)
    source = nine / FOLDERS.get(bench, bench)
    shutil.copytree(source, data, ignore=shutil.ignore_patterns("*.png", "*.jpg"))
    (data / LABELS[bench]).write_bytes(content)
    assert score(bench, encode(good), nine, tmp_path, data) is None


def test_ten_megabytes(bench: str, good: list[dict], nine: Path, tmp_path: Path) -> None:
    """A 10 MB answer is scored."""
    long = "no, " + "x" * 10_000_000
    rows = [{**good[0], "text": long}, *good[1:]]
    assert score(bench, encode(rows), nine, tmp_path) is not None


def test_missing_options(nine: Path, tmp_path: Path) -> None:
    """A cell that pandas reads as missing ends the list of options, as in LLaVA's program."""
    text = (nine / "mmbench" / "mmbench_dev_20230712.tsv").read_text(encoding="utf-8")
    for cell in ("None", "nan", "NA", "null", ""):
        (tmp_path / "mmbench_dev_20230712.tsv").write_text(text.replace("cat\tdog", f"cat\t{cell}"), encoding="utf-8")
        first = questions_of(Sources(load_task("mmbench"), tmp_path))[0]
        assert first.extra["options"] == ["cat"] and "B." not in first.text


def test_unreadable_places(nine: Path, tmp_path: Path, capsys: Any) -> None:
    for argv in (
        ["score", "pope", "--answers", str(tmp_path / "none"), "--data", str(nine / "pope")],
        ["score", "pope", "--answers", str(tmp_path), "--data", str(nine / "pope")],
        ["score", "pope", "--answers", str(tmp_path), "--data", str(tmp_path / "none")],
        ["score", "pope", "--answers", str(tmp_path)],
        ["score", "mme", "--answers", str(tmp_path), "--data", str(nine / "MME")],
        ["score", "pope", "--answers", __file__, "--data", str(tmp_path)],
    ):
        assert main(argv) == 1
        assert "Traceback" not in capsys.readouterr().err
    with contextlib.suppress(ValueError):
        score_files("mmbench", Path(__file__), None, questions=Path(__file__))
