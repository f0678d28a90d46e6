"""Every scorer agrees with vectors recorded with the official scripts and with hand-computed cases."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llava_prune.cli import main
from llava_prune.eval.score import score_files
from llava_prune.eval.task import load_task, task_names
from llava_prune.eval.tasks import mmbench, mme, ocrbench, pope, sqa, textvqa, vqav2
from llava_prune.eval.vqa import PUNCTUATION, contractions, digits_articles, m4c, punctuation

VECTORS = json.loads(gzip.decompress((Path(__file__).parent / "vectors.json.gz").read_bytes()))
SHORT = "Answer the question using a single word or phrase."


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def whole(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def run(bench: str, answers: Path, data: Path, **more: Any) -> dict[str, Any]:
    return score_files(bench, answers, data, **more)[0]


def test_nine_benchmarks() -> None:
    assert set(task_names()) == {
        "gqa", "sqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "ocrbench", "vqav2"
    }  # fmt: skip
    long = {n for n in task_names() if load_task(n).max_new_tokens == 1024}
    assert long == {"sqa", "mmbench", "mmbench_cn"}
    assert all(load_task(n).max_new_tokens == 128 for n in set(task_names()) - long)


# normaliser ---------------------------------------------------------------------------------------------------


def test_tables() -> None:
    tables = VECTORS["tables"]
    assert contractions() == tables["contractions"]
    assert list(PUNCTUATION) == tables["punctuation_in_order"]
    assert [digits_articles(w) for w in tables["number_words"]] == list(tables["number_words"].values())
    assert [digits_articles(w) for w in tables["articles"]] == [""] * 3


@pytest.mark.parametrize("case", VECTORS["textvqa"]["normaliser"], ids=lambda c: repr(c["raw"]))
def test_normaliser(case: dict) -> None:
    assert m4c(case["raw"]) == case["m4c"]
    assert punctuation(case["raw"]) == case["punctuation_only"]
    assert digits_articles(case["raw"]) == case["digit_article_only"]


def test_at_most_32_dots_go() -> None:
    assert punctuation("." * 40) == "." * 8


# TextVQA ------------------------------------------------------------------------------------------------------


@pytest.fixture
def textvqa_files(tmp_path: Path) -> tuple[Path, Path]:
    inputs = VECTORS["textvqa"]["inputs"]
    whole(tmp_path / "TextVQA_0.5.1_val.json", inputs["annotation_file"])
    return tmp_path, lines(tmp_path / "answers" / "m.jsonl", inputs["answers"])


def test_textvqa(textvqa_files: tuple[Path, Path]) -> None:
    data, answers = textvqa_files
    got, expected = run("textvqa", answers, data), VECTORS["textvqa"]["expected"]
    assert got["figure"] == pytest.approx(100 * expected["mean_fraction"], abs=1e-9)
    assert got["rows"] == expected["samples"]
    assert round(got["figure"], 2) == expected["accuracy_percent_2dp"]
    assert got["versions"]["annotations"]["rows"] == 60


def test_textvqa_rows() -> None:
    inputs, expected = VECTORS["textvqa"]["inputs"], VECTORS["textvqa"]["expected"]["rows"]
    references = {r["image_id"]: r["answers"] for r in inputs["annotation_file"]["data"]}
    for answer in inputs["answers"]:
        want = expected[answer["question_id"]]
        scores = textvqa.answer_scores(references[answer["question_id"]])
        assert scores == pytest.approx(want["answer_scores"])
        assert m4c(answer["text"]) == want["normalised_prediction"]
        assert scores.get(m4c(answer["text"]), 0.0) == pytest.approx(want["score"])
        assert textvqa.question_of(answer["prompt"]) == want["question_key"]


def test_textvqa_prompts() -> None:
    assert textvqa.question_of("Reference OCR token: A\nWhat IS it?\nAnswer.") == "what is it?"
    assert textvqa.question_of("OCR tokens: A, B. Question: What? Short answer:") == "what?"
    assert textvqa.question_of("What?\nAnswer.") == "what?"
    assert textvqa.question_of("What?") is None and textvqa.question_of("a\nb\nc") is None


def test_textvqa_refuses(textvqa_files: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = textvqa_files
    rows = VECTORS["textvqa"]["inputs"]["answers"]
    for changed, message in (
        (rows[1:], "1 of 60 questions have no answer"),
        ([*rows, rows[3]], "answered more than once"),
        ([*rows, {**rows[0], "question_id": "else"}], "1 answers have no annotation"),
        ([{**rows[0], "prompt": "hello"}, *rows[1:]], "no question in the prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            run("textvqa", lines(tmp_path / "a.jsonl", changed), data)


# ScienceQA ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sqa_files(tmp_path: Path) -> tuple[Path, Path]:
    inputs = VECTORS["sqa"]["inputs"]
    for name in ("problems.json", "pid_splits.json"):
        whole(tmp_path / name, inputs[name])
    return tmp_path, lines(tmp_path / "answers" / "m.jsonl", inputs["answers"])


def test_sqa(sqa_files: tuple[Path, Path]) -> None:
    data, answers = sqa_files
    got, expected = run("sqa", answers, data), VECTORS["sqa"]["expected"]
    details = got["details"]
    assert (details["overall"]["right"], details["overall"]["rows"]) == (expected["correct"], expected["total"])
    assert (details["image"]["right"], details["image"]["rows"]) == (expected["img_correct"], expected["img_total"])
    assert got["figure"] == details["image"]["accuracy"]
    assert round(got["figure"], 2) == expected["img_accuracy_percent_2dp"]
    assert details["missing"] == 2


def test_sqa_letters() -> None:
    inputs, expected = VECTORS["sqa"]["inputs"], VECTORS["sqa"]["expected"]["rows"]
    for row in inputs["answers"]:
        assert sqa.letter(row["text"]) == expected[row["question_id"]]["parsed"]


def sqa_row(key: str, image: bool, options: int, answer: str) -> dict:
    text = "Context: A. B.\nWhich?\n" + "\n".join(f"{c}. choice {c}" for c in "ABCDE"[:options])
    row = {"id": key, "image": f"{key}/image.png"} if image else {"id": key}
    turns = [{"from": "human", "value": f"<image>\n{text}" if image else text}, {"from": "gpt", "value": answer}]
    return {**row, "conversations": turns}


@pytest.mark.parametrize("answer", [float("inf"), float("nan"), "one", None, [0]])
def test_sqa_answers_that_are_no_integers(answer: Any, sqa_files: tuple[Path, Path], tmp_path: Path) -> None:
    data, answers = sqa_files
    problems = json.loads((data / "problems.json").read_text(encoding="utf-8"))
    key = next(k for k, p in problems.items() if p["split"] == "test")
    whole(data / "problems.json", {**problems, key: {**problems[key], "answer": answer}})
    with pytest.raises(ValueError, match=f"question '{key}' lacks 'answer'"):
        run("sqa", answers, data)


def test_sqa_from_the_question_file_and_the_scorers_output(tmp_path: Path) -> None:
    whole(tmp_path / "llava_test_CQM-A.json", [sqa_row("1", True, 2, "B"), sqa_row("2", False, 3, "C")])
    output = {
        "correct": [{"question_id": "1", "question": "<image>\nx", "pred": "B"}],
        "incorrect": [{"question_id": "2", "question": "Unknown", "pred": "FAILED"}],
    }
    got = run("sqa", whole(tmp_path / "o.jsonl", output), tmp_path)
    assert got["figure"] == 100.0 and got["details"]["overall"]["accuracy"] == 50.0 and got["details"]["missing"] == 1
    wrong = [{"question_id": "1", "prompt": "<image>\nx", "text": "C"}]  # the question has two options
    assert run("sqa", lines(tmp_path / "a.jsonl", wrong), tmp_path)["figure"] == 0.0


# POPE ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pope_files(tmp_path: Path) -> tuple[Path, Path]:
    inputs = VECTORS["pope"]["inputs"]
    lines(tmp_path / "llava_pope_test.jsonl", inputs["questions"])
    for name, rows in inputs["labels"].items():
        lines(tmp_path / "coco" / name, rows)
    return tmp_path, lines(tmp_path / "answers" / "m.jsonl", inputs["answers"])


def test_pope(pope_files: tuple[Path, Path]) -> None:
    data, answers = pope_files
    got, expected = run("pope", answers, data), VECTORS["pope"]["expected"]
    for split, want in expected["per_split"].items():
        assert got["details"][split] == pytest.approx(want)
    assert got["figure"] == pytest.approx(100 * expected["average_f1"]) and got["rows"] == 60


@pytest.mark.parametrize("case", VECTORS["pope"]["parse_table"], ids=lambda c: repr(c["text"]))
def test_pope_parse(case: dict) -> None:
    assert pope.says_yes(case["text"]) == (case["parsed"] == "yes")


def test_pope_joins_are_checked(pope_files: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = pope_files
    rows = VECTORS["pope"]["inputs"]["answers"]
    texts = [r["text"] for r in rows]
    shifted = [{**r, "text": t, "prompt": q["prompt"]} for r, t, q in
               zip(rows, texts[1:] + texts[:1], rows[1:] + rows[:1], strict=True)]  # fmt: skip
    for changed, message in (
        (rows[:-1], "19 answers for 20 questions; missing are"),
        ([*rows, rows[0]], "21 answers for 20 questions"),
        ([rows[1], rows[0], *rows[2:]], "answer 1 is for question 2"),
        (shifted, "shifted or mixed"),
        ([{**rows[0], "question_id": 999}, *rows[1:]], "answers to question 999"),
    ):
        with pytest.raises(ValueError, match=message):
            run("pope", lines(tmp_path / "a.jsonl", changed), data)


def test_pope_label_versions(pope_files: tuple[Path, Path]) -> None:
    data, answers = pope_files
    path = data / "coco" / "coco_pope_random.json"
    before = path.read_text()
    path.write_text(before + before.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="random: 20 questions but 21 labels.*e3e3926"):
        run("pope", answers, data)
    rows = before.splitlines()
    path.write_text("\n".join([rows[1], rows[0], *rows[2:]]))
    with pytest.raises(ValueError, match="random: question 10000001 and label 1 do not match"):
        run("pope", answers, data)
    path.write_text(before)
    (data / "coco" / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no other JSON files"):
        run("pope", answers, data)


def test_pope_without_a_right_yes(pope_files: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = pope_files
    rows = [{**r, "text": "No"} for r in VECTORS["pope"]["inputs"]["answers"]]
    got = run("pope", lines(tmp_path / "a.jsonl", rows), data)
    assert got["figure"] is None and "F1 is undefined" in got["why"]


def test_pope_excerpt(pope_files: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = pope_files
    inputs = VECTORS["pope"]["inputs"]
    some = [q for q in inputs["questions"] if q["question_id"] % 3]
    ids = {q["question_id"] for q in some}
    answers = lines(tmp_path / "a.jsonl", [a for a in inputs["answers"] if a["question_id"] in ids])
    got = run("pope", answers, data, questions=lines(tmp_path / "q.jsonl", some))
    assert got["rows"] == len(some)


# MME ----------------------------------------------------------------------------------------------------------


def mme_files(root: Path) -> tuple[Path, list[dict]]:
    """Write a flat task with two images and a task with folders; return the root and right answers.

    One question has two spaces before its instruction.
    """
    release = root / "MME_Benchmark_release_version"
    rows = []
    for name, folder in (("count/1.jpg", "count"), ("count/2.jpg", "count"), ("scene/images/1.jpg", "scene")):
        stem = name.split("/")[-1].split(".")[0]
        place = release / folder / ("questions_answers_YN" if folder == "scene" else "")
        (release / name).parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(parents=True, exist_ok=True)
        blank = "  " if name == "count/2.jpg" else " "
        content = f"Is it a?{blank}Please answer yes or no.\tYes\nIs it b? Please answer yes or no.\tNo\n"
        (place / f"{stem}.txt").write_text(content)
        for letter, label in (("a", "Yes"), ("b", "No")):
            rows.append({"question_id": name, "prompt": f"Is it {letter}?\n{SHORT}", "text": label})
    return root, rows


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Yes", "yes"), ("no", "no"), ("Not sure", "no"), ("None", "no"), ("Know", "no"), ("Snow", "no"),
        ("Eyes", "yes"), ("Answer: Yes", "other"), ("", "other"), ("y", "other"), ("YES.", "yes"), ("\nYes", "yes"),
        ("A yes", "other"), ("oh no", "other"), ("noyes", "no"), ("yesno", "yes"), ("1 no", "no"), ("  yes", "other"),
    ],
)  # fmt: skip
def test_mme_parse(text: str, label: str) -> None:
    assert mme.label_of(text) == label


def test_mme(tmp_path: Path) -> None:
    data, rows = mme_files(tmp_path)
    rows[1]["text"] = "Yes"
    got = run("mme", lines(tmp_path / "a.jsonl", rows), data)
    tasks = got["details"]["tasks"]
    assert tasks["count"]["acc"] == 0.75 and tasks["count"]["acc_plus"] == 0.5 and tasks["count"]["score"] == 125.0
    assert tasks["scene"]["score"] == 200.0
    assert got["figure"] == got["details"]["perception"] == 325.0 and got["details"]["cognition"] is None
    assert got["details"]["total"] == 325.0 and got["rows"] == 6


def test_mme_of_one_group_of_tasks(tmp_path: Path, capsys: Any) -> None:
    """The figure is absent, and not 0, if no perception task was asked."""
    text = "1.jpg\tIs it? Please answer yes or no.\tYes\n1.jpg\tIs it not? Please answer yes or no.\tNo\n"
    path = tmp_path / "eval_tool" / "Your_Results" / "code_reasoning.txt"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    asked = ("Is it?", "Yes"), ("Is it not?", "no")
    rows = [{"question_id": "code_reasoning/1.jpg", "prompt": f"{q}\n{mme.ASKED}", "text": a} for q, a in asked]
    answers = lines(tmp_path / "a.jsonl", rows)
    got = run("mme", answers, tmp_path)
    assert got["figure"] is None and "no perception figure" in got["why"]
    assert got["details"]["perception"] is None and got["details"]["cognition"] == 200.0
    assert main(["score", "mme", "--answers", str(answers), "--data", str(tmp_path), "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["details"]["cognition"] == 200.0 and "no perception figure" in shown.err
    assert main(["score", "mme", "--answers", str(answers), "--data", str(tmp_path)]) == 1
    assert "200.0000" in capsys.readouterr().out


def test_mme_joins_are_checked(tmp_path: Path) -> None:
    data, rows = mme_files(tmp_path)
    shifted = [{**r, "question_id": q["question_id"]} for r, q in zip(rows, rows[1:] + rows[:1], strict=True)]
    foreign = [{**rows[0], "prompt": f"Is it c?\n{SHORT}"}, *rows[1:]]
    for changed, message in (
        (rows[:-1], "scene: 1 of 2 questions have no answer"),
        ([*rows, rows[0]], "answered twice"),
        ([rows[0], rows[2], rows[1], rows[3], *rows[4:]], "must be consecutive"),
        (shifted, "must be consecutive"),
        (foreign, "have no label"),
    ):
        with pytest.raises(ValueError, match=message):
            run("mme", lines(tmp_path / "a.jsonl", changed), data)


def test_mme_text_files_score_the_same(tmp_path: Path) -> None:
    """The files written for the official tool also serve as labels in the layout of the tool."""
    data, rows = mme_files(tmp_path / "one")
    rows[0]["text"] = "Yes,\tit is\nso"
    answers = lines(tmp_path / "m.jsonl", rows)
    first = run("mme", answers, data)
    written = tmp_path / "m_official" / "m"
    assert (written / "count.txt").read_text().splitlines()[0] == (
        "1.txt\tIs it a? Please answer yes or no.\tYes\tYes, it is so"
    )
    assert "Is it a?  Please answer" in (written / "count.txt").read_text().splitlines()[2]
    tool = tmp_path / "two" / "eval_tool" / "Your_Results"
    tool.parent.mkdir(parents=True)
    written.rename(tool)
    second = run("mme", answers, tmp_path / "two")
    assert second["details"] == first["details"] and second["figure"] == 400.0
    assert run("mme", tool, data, export=tmp_path / "three")["details"] == first["details"]


# MMBench ------------------------------------------------------------------------------------------------------

COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
           "comment", "split")  # fmt: skip
PIXEL = base64.b64encode(b"not an image").decode()


def table(path: Path, rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ["\t".join(columns)] + ["\t".join(str(r.get(c, "")) for c in columns) for r in rows]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def circular() -> list[dict]:
    """Return the rows of two questions, one with three options in three rows and one with two options in two rows."""
    base = {"image": PIXEL, "category": "c", "l2-category": "l", "split": "dev"}
    rows = []
    for index, words in ((7, ["cat", "dog", "cow"]), (9, ["red", "blue"])):
        for r in range(len(words)):
            turned = dict(zip("ABCD", words[-r:] + words[:-r], strict=False))
            answer = next(k for k, v in turned.items() if v == words[0])
            rows.append({**base, **turned, "index": index + r * 1_000_000, "question": "What?", "answer": answer})
    rows[0]["hint"] = "Look."
    return rows


def test_mmbench_circular(tmp_path: Path) -> None:
    rows = circular()
    table(tmp_path / "mmbench_dev_20230712.tsv", rows)
    answers = [{"question_id": r["index"], "text": r["answer"]} for r in rows]
    got = run("mmbench", lines(tmp_path / "a.jsonl", answers), tmp_path)
    assert got["figure"] == 100.0 and got["rows"] == 5 and got["details"]["questions"] == 2
    answers[1]["text"] = "A" if answers[1]["text"] != "A" else "B"
    answers[3]["text"] += "."
    got = run("mmbench", lines(tmp_path / "a.jsonl", answers), tmp_path)
    assert got["figure"] == 0.0 and got["details"]["circular_lenient"]["accuracy"] == 50.0
    assert got["details"]["single"]["accuracy"] == 50.0 and got["details"]["not_a_letter"] == 1
    assert got["versions"]["questions"]["questions"] == 2 and got["versions"]["questions"]["version"] is None
    with pytest.raises(ValueError, match="1 of 5 rows have no answer"):
        run("mmbench", lines(tmp_path / "b.jsonl", answers[1:]), tmp_path)


def test_mmbench_answers_to_another_table(tmp_path: Path) -> None:
    rows = circular()
    table(tmp_path / "mmbench_dev_20230712.tsv", rows)
    prompts = ["What?\nA. cat", "", "Look. \n What?", "<image>\nWhat?", "What?"]
    answers = [{"question_id": r["index"], "prompt": p, "text": "A"} for r, p in zip(rows, prompts, strict=True)]
    assert run("mmbench", lines(tmp_path / "a.jsonl", answers), tmp_path)["rows"] == 5
    answers[4]["prompt"] = "\u4ec0\u4e48?"
    with pytest.raises(ValueError, match="index .* is 'What.', its answer was given to .* give the answers to this"):
        run("mmbench", lines(tmp_path / "a.jsonl", answers), tmp_path)


def test_mmbench_indices_of_every_length(tmp_path: Path) -> None:
    """The rows of a question share their index modulo 1,000,000, however many digits the index has."""
    base = {"question": "What?", "A": "cat", "B": "dog", "answer": "A", "image": PIXEL, "split": "dev"}
    bases = [0, 1, 10, 11, 101, 1_001, 10_001, 100_001, 110_001, 100_000, 10_000, 999_999]
    turns = (0, 1, 3, 10, 21, 100)
    rows = [{**base, "index": b + t * 1_000_000, "category": str(b)} for t in turns for b in bases]
    table(tmp_path / "mmbench_dev_20230712.tsv", rows)
    for wrong in bases:
        for turn in turns[:: len(turns) - 1]:
            index = wrong + turn * 1_000_000
            texts = [{"question_id": r["index"], "text": "B" if r["index"] == index else "A"} for r in rows]
            details = run("mmbench", lines(tmp_path / "a.jsonl", texts), tmp_path)["details"]
            assert details["questions"] == details["circular"]["rows"] == len(bases)
            right = {name: found["accuracy"] == 100 for name, found in details["category"].items()}
            assert right == {str(b): b != wrong for b in bases}
            assert details["single"]["accuracy"] == pytest.approx(100 * (1 - (turn == 0) / len(bases)))
            assert details["rows"]["rows"] == len(rows)
    labels = {str(r["index"]): r for r in rows}
    scores = mmbench.score([{"question_id": k, "text": "A"} for k in labels], labels)["scores"]
    assert scores == {str(b): True for b in bases}


@pytest.mark.parametrize("answer", ["E", "AB", "BCD", "a"])
def test_mmbench_answers_are_single_letters(tmp_path: Path, answer: str) -> None:
    rows = [{"index": 1, "question": "Q", "A": "x", "B": "y", "answer": answer, "image": "i"}]
    table(tmp_path / "mmbench_dev_20230712.tsv", rows)
    with pytest.raises(ValueError, match="row 1: answer must be one of A, B, C, D, not"):
        run("mmbench", lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "A"}]), tmp_path)


def test_mmbench_options() -> None:
    assert mmbench.options({"A": "x", "B": "None", "C": "y"}) == ["x"]
    assert mmbench.options({"A": "x", "B": "y", "C": None, "D": "z"}) == ["x", "y"]
    assert mmbench.text_of({"hint": "NaN", "question": "Q", "A": "x", "B": "y"}) == "Q\nA. x\nB. y"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B. dog", "B"), ("(B)", "B"), ("a dog", "B"), ("A dog", "A"), ("cat or dog", None),
        ("Because", None),
    ],
)  # fmt: skip
def test_mmbench_lenient(text: str, letter: str | None) -> None:
    assert mmbench.lenient(text, {"A": "cat", "B": "dog"}) == letter


def test_mmbench_sheet(tmp_path: Path) -> None:
    load = pytest.importorskip("openpyxl").load_workbook
    rows = circular()
    table(tmp_path / "mmbench_dev_20230712.tsv", rows)
    texts = ["A", "=1+1", "B\x01\u4e2d", "C", "D"]
    answers = [{"question_id": r["index"], "text": t} for r, t in zip(rows, texts, strict=True)]
    path = lines(tmp_path / "m.jsonl", answers)
    score_files("mmbench", path, tmp_path)
    sheet = load(tmp_path / "m_official" / "m.xlsx").worksheets[0]
    cells = [[c.value for c in row] for row in sheet.iter_rows()]
    assert cells[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert cells[1] == [7, "What?", "cat", "dog", "cow", None, "A", "A", "dev"]
    assert [r[6] for r in cells[1:]] == ["A", "=1+1", "B\u4e2d", "C", "D"]
    sheet_path = tmp_path / "m_official" / "m.xlsx"
    got = run("mmbench", path, tmp_path, annotations=sheet_path)
    assert got["rows"] == 5 and got["versions"]["questions"]["file"] == "m.xlsx"
    assert run("mmbench", sheet_path, tmp_path)["details"]["rows"] == got["details"]["rows"]
    score_files("mmbench", lines(path, [{**a, "text": "None"} for a in answers]), tmp_path)
    assert run("mmbench", sheet_path, tmp_path)["details"]["not_a_letter"] == 5  # an answer, unlike an empty cell


def test_mmbench_without_answers(tmp_path: Path) -> None:
    table(tmp_path / "mmbench_dev_cn_20231003.tsv", [{**r, "answer": ""} for r in circular()])
    answers = lines(tmp_path / "a.jsonl", [{"question_id": r["index"], "text": "A"} for r in circular()])
    result, written, _ = score_files("mmbench_cn", answers, tmp_path)
    assert result["figure"] is None and "upload" in result["why"] and written[0].suffix == ".xlsx"


# OCRBench -----------------------------------------------------------------------------------------------------


def ocr_rows() -> list[dict]:
    base = {"question": "what is written in the image?", "type": "Regular Text Recognition"}
    return [
        {**base, "dataset_name": "svt", "id": 7, "image_path": "svt/1.jpg", "answers": "HOTEL"},
        {**base, "dataset_name": "other", "id": 7, "image_path": "o/1.jpg", "answers": ["nine", "Nine Lives"]},
        {**base, "dataset_name": "HME100k", "id": 3, "image_path": "H/1.jpg", "answers": "x ^ 2\n",
         "type": "Handwritten Mathematical Expression Recognition"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "row", "hit"),
    [
        ("the Hotel.", 0, True), ("HOT EL", 0, False), ("", 0, False), ("nine\nlives", 1, True), ("Canines", 1, True),
        ("x^2", 2, True), ("X^2", 2, False), ("y = x ^2", 2, True),
    ],
)  # fmt: skip
def test_ocr_rule(text: str, row: int, hit: bool) -> None:
    assert ocrbench.right(text, ocr_rows()[row]) is hit


def test_names_of_groups_are_plain_text(tmp_path: Path, capsys: Any) -> None:
    base = {"dataset_name": "x", "image_path": "1.jpg", "question": "What?", "answers": "a"}
    whole(tmp_path / "OCRBench.json", [{**base, "type": kind} for kind in ("[ocr] small", "[/b]")])
    answers = lines(tmp_path / "a.jsonl", [{"question_id": i, "text": "a"} for i in range(2)])
    assert main(["score", "ocrbench", "--answers", str(answers), "--data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "types: [ocr] small" in out and "types: [/b]" in out


def test_ocr_ids(tmp_path: Path) -> None:
    rows, texts = ocr_rows(), ["hotel", "no", "x^2"]
    whole(tmp_path / "OCRBench.json", rows)
    readings = ([r["id"] for r in rows], [0, 1, 2], [1, 2, 3], [r["image_path"] for r in rows])
    for keys in readings:
        answers = [{"question_id": k, "text": t} for k, t in zip(keys, texts, strict=True)]
        got = run("ocrbench", lines(tmp_path / "a.jsonl", answers), tmp_path)
        assert got["figure"] == 2 and got["details"]["groups"]["text recognition"] == {"right": 1, "rows": 2}
    answers.reverse()  # joined by image, in any order
    assert run("ocrbench", lines(tmp_path / "a.jsonl", answers), tmp_path)["figure"] == 2
    official = [{**r, "predict": t} for r, t in zip(rows, texts, strict=True)]
    assert run("ocrbench", whole(tmp_path / "r.json", official), tmp_path)["figure"] == 2
    mixed = [{"question_id": k, "text": t} for k, t in zip((7, 3, 7), texts, strict=True)]
    with pytest.raises(ValueError, match="repeated here: 7"):
        run("ocrbench", lines(tmp_path / "a.jsonl", mixed), tmp_path)
    with pytest.raises(ValueError, match="2 answers for 3 questions"):
        run("ocrbench", lines(tmp_path / "a.jsonl", mixed[:2]), tmp_path)


# VQAv2 --------------------------------------------------------------------------------------------------------


def annotation(key: int, answers: list[str], kind: str = "other") -> dict:
    return {"question_id": key, "answer_type": kind, "question_type": "what",
            "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(answers, 1)]}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "references", "value"),
    [
        ("net", ["net"] * 10, 1.0),
        ("Yes", ["yes"] * 10, 0.0),  # ten equal answers are not normalised
        ("Yes", ["yes"] * 9 + ["no"], 1.0),
        ("cup", ["cup"] + ["mug"] * 9, 0.3),
        ("cup", ["cup"] * 2 + ["mug"] * 8, 0.6),
        ("cup", ["cup"] * 3 + ["mug"] * 7, 0.9),
        ("a cup.", ["cup"] * 4 + ["mug"] * 6, 1.0),
        ("two", ["2"] * 5 + ["3"] * 5, 1.0),
    ],
)
def test_vqa_accuracy(text: str, references: list[str], value: float) -> None:
    assert vqav2.accuracy(text, references) == pytest.approx(value)


def test_vqav2(tmp_path: Path) -> None:
    rows = [annotation(1000, ["net"] * 10, "other"), annotation(1001, ["yes"] * 9 + ["no"], "yes/no")]
    whole(tmp_path / "annotations.json", {"annotations": rows})
    lines(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", [{"question_id": i} for i in (1001, 5, 1000)])
    answers = lines(tmp_path / "m.jsonl", [{"question_id": 1000, "text": "Net"}, {"question_id": 1001, "text": "No"}])
    got = run("vqav2", answers, tmp_path)
    assert got["figure"] == pytest.approx(65.0) and got["rows"] == 2
    assert got["details"]["unconverted"]["accuracy"] == pytest.approx(15.0)
    assert got["details"]["by_answer_type"]["yes/no"]["accuracy"] == pytest.approx(30.0)
    upload = json.loads((tmp_path / "m_official" / "m.json").read_text())
    assert upload == [{"question_id": 1001, "answer": "no"}, {"question_id": 5, "answer": ""},
                      {"question_id": 1000, "answer": "net"}]  # fmt: skip
    with pytest.raises(ValueError, match="1 of 2 questions have no answer"):
        run("vqav2", lines(tmp_path / "a.jsonl", [{"question_id": 1000, "text": "x"}]), tmp_path)
    given = whole(tmp_path / "u.json", [{"question_id": 1000, "answer": "Net"}, {"question_id": 1001, "answer": "no"}])
    assert run("vqav2", given, tmp_path)["figure"] == pytest.approx(15.0)  # an upload is taken as it is
    lines(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", [{"question_id": i} for i in (5, 6)])
    run("vqav2", answers, tmp_path)  # answers to another split, which must not get lost in an upload of empty ones
    upload = json.loads((tmp_path / "m_official" / "m.json").read_text())
    assert upload == [{"question_id": 1000, "answer": "net"}, {"question_id": 1001, "answer": "no"}]


def test_vqav2_without_annotations(tmp_path: Path) -> None:
    answers = lines(tmp_path / "m.jsonl", [{"question_id": 7, "text": "Two"}])
    result, written, _ = score_files("vqav2", answers, tmp_path)
    assert result["figure"] is None and "EvalAI" in result["why"]
    assert json.loads(written[0].read_text()) == [{"question_id": 7, "answer": "2"}]
