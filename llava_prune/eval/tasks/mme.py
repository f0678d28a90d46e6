"""MME: accuracy and accuracy+ of each task, summed as in the official calculation.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reading import read_answers as read_jsonl_answers
from ..reading import read_rows, read_text, shown, unanswered
from ..resample import Units
from ..task import Question, QuestionScores, Sources
from ..task import read_questions as read_lines

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ASKED = "Answer the question using a single word or phrase."
TAIL = " Please answer yes or no."
_FLAT = str.maketrans("\t\n\r", "   ")
"""Characters that the official tool treats as separators."""
Key = tuple[str, str, str]
"""Task, text file of the image, and question as in the release."""


@dataclass(frozen=True)
class Joined:
    """An answer with its label."""

    key: Key
    gold: str
    text: str


def read_questions(sources: Sources) -> list[Question]:
    """Read the question file. Ids are those of images, and each occurs in two rows."""
    return read_lines(sources, unique=False)


def label_of(text: str) -> str:
    """Return "yes", "no" or "other": "yes" or "no" if it is in the first four characters, "yes" taking precedence."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _lines(folder: Path) -> Iterator[tuple[Path, list[str], str, str]]:
    """Yield (file, [question, label], task, text file of the image) of every line below a folder of labels."""
    for entry in sorted(folder.iterdir()):
        inner = entry / "questions_answers_YN"
        files = sorted((inner if inner.is_dir() else entry).glob("*.txt")) if entry.is_dir() else [entry]
        for path in files:
            if path.suffix != ".txt":
                continue
            for line in read_text(path).split("\n"):
                cells = line.strip().split("\t")
                if entry.is_dir() and len(cells) >= 2:
                    yield path, cells[:2], entry.name, path.name
                elif len(cells) >= 3:  # <task>.txt of the official tool: image, question, label
                    yield path, cells[1:3], path.stem, _text_file(cells[0])
                elif line.strip():
                    raise ValueError(f"{path}: no question and label separated by a tab in {line[:80]!r}")


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read answers in LLaVA's format, or a folder of the official tool's <task>.txt files, whose lines have four cells.

    Raises:
        ValueError: for anything else.
    """
    if not path.is_dir():
        return read_jsonl_answers(path)
    rows = []
    for file in sorted(path.glob("*.txt")):
        for number, line in enumerate(read_text(file).split("\n"), 1):
            cells = line.removesuffix("\r").split("\t")
            if len(cells) == 4:
                rows.append({"question_id": f"{file.stem}/{cells[0]}", "prompt": cells[1], "text": cells[3]})
            elif line.strip():
                raise ValueError(
                    f"{file}, line {number}: {len(cells)} cells instead of image, question, label and answer"
                )
    if not rows:
        raise ValueError(f"{path} has no <task>.txt with answers")
    return rows


def _text_file(image: str) -> str:
    return image.split("/")[-1].split(".")[0] + ".txt"


def load_labels(sources: Sources) -> dict[Key, str]:
    """Read labels from the release folder, the tool's <task>.txt files, or a JSON-lines file with `label` or `answer`.

    Raises:
        ValueError: for broken files, labels other than Yes and No, or no labels at all.
    """
    path = sources.path("annotations")
    labels: dict[Key, str] = {}
    found: list[tuple[Key, Any, Path]]
    if path.is_dir():
        found = [((task, name, cells[0]), cells[1], file) for file, cells, task, name in _lines(path)]
    else:
        rows = read_rows(path, ("question_id",))
        found = [
            (_key(r, str(r.get("text") or r.get("question") or "")), r.get("label", r.get("answer")), path)
            for r in rows
        ]
    for key, label, file in found:
        if not isinstance(label, str) or label.strip().lower() not in ("yes", "no"):
            raise ValueError(f"{file}: label must be Yes or No, found {label!r}")
        labels[key] = label.strip()
    if not labels:
        raise ValueError(f"{path} has no labels (text files with question, tab, Yes or No)")
    sources.note("annotations", path, "annotations", rows=len(labels))
    return labels


def _key(row: Mapping[str, Any], prompt: str) -> Key:
    """Return the key of a row; the tail of the release's questions replaces the instruction in the prompt.

    Source: convert_answer_to_mme.py in LLaVA's eval.zip.
    """
    image = str(row["question_id"])
    question = prompt.replace(ASKED, "").strip() if ASKED in prompt else prompt
    return image.split("/")[0], _text_file(image), question if TAIL.strip() in question else question + TAIL


def _known(key: Key, labels: Mapping[Key, str]) -> Key | None:
    """Return the key as it is in the labels, or None; a few questions have two spaces before the tail."""
    double = (*key[:2], key[2].replace(TAIL, f" {TAIL}"))
    return key if key in labels else double if double in labels else None


def unknown(labels: Mapping[Key, str], asked: Sequence[Question]) -> list[str]:
    """Return the ids of questions that have no label."""
    return [str(q.id) for q in asked if _known(_key({"question_id": q.id}, q.stored), labels) is None]


def join(answers: Iterable[Mapping[str, Any]], labels: Mapping[Key, str]) -> dict[str, list[Joined]]:
    """Return answers with their labels by task, in order.

    Raises:
        ValueError: if the question of an answer has no label.
    """
    out: dict[str, list[Joined]] = defaultdict(list)
    strange = []
    for row in answers:
        key = _known(_key(row, row.get("prompt", "")), labels)
        if key is None:
            strange.append(f"{row['question_id']}: {row.get('prompt', '')[:60]!r}")
        else:
            out[key[0]].append(Joined(key, labels[key], row["text"]))
    if strange:
        raise ValueError(
            f"{len(strange)} answers have no label ({shown(strange[:3])}); the file is shifted or mixed, or its "
            "prompts are not those of LLaVA's question file"
        )
    return out


def _check(task: str, rows: Sequence[Joined], wanted: set[Key]) -> None:
    """Refuse answers unless every label has one answer and the two answers to each image are consecutive."""
    given = [r.key for r in rows]
    missing = sorted(wanted - set(given))
    if missing:
        raise ValueError(f"{task}: {unanswered([k[1] for k in missing], len(wanted))}")
    if len(set(given)) < len(given):
        twice = next(k for i, k in enumerate(given) if k in given[:i])
        raise ValueError(f"{task}: a question is answered twice: {twice[1:]}")
    for at in range(0, len(given), 2):
        pair = given[at : at + 2]
        if len(pair) < 2 or pair[0][1] != pair[1][1]:
            raise ValueError(
                f"{task}: answers {at + 1} and {at + 2} are not of one image ({', '.join(k[1] for k in pair)}); the "
                "score takes two lines at a time, so the two questions of an image must be consecutive"
            )


def _questions(
    answers: Sequence[Mapping[str, Any]], labels: Mapping[Key, str], wanted: Mapping[str, set[Key]]
) -> QuestionScores:
    """Return (score, task) of each answer row; the score is None if the question is not scored."""
    out: QuestionScores = []
    for row in answers:
        key = _known(_key(row, row.get("prompt", "")), labels)
        counts = key is not None and key in wanted.get(key[0], ())
        right = float(label_of(row["text"]) == labels[key].lower()) if key is not None and counts else None
        out.append((right, None if key is None else key[0]))
    return out


def units(answers: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> Units:
    """Return the units of the bootstrap: every image of a perception task is a unit, with its two questions."""
    right: dict[str, list[float]] = defaultdict(list)
    for row in scores:
        if row["score"] is not None and row["type"] in PERCEPTION:
            right[row["type"]].append(row["score"])
    pairs = [(task, a, b) for task, all_of in right.items() for a, b in zip(all_of[::2], all_of[1::2], strict=True)]
    values = [[(a + b) / 2 + a * b] for _, a, b in pairs]
    return Units([task for task, _, _ in pairs], values, lambda means: 100 * means[..., 0].sum(1))


def _sum(scores: Sequence[float]) -> float | None:
    """Return the sum of the scores of tasks; None if no task of the group was asked."""
    return sum(scores) if scores else None


def score(
    answers: Iterable[Mapping[str, Any]], labels: Mapping[Key, str], asked: Sequence[Question] | None = None
) -> dict[str, Any]:
    """Compute perception (the figure, of 2,000), cognition (of 800) and their sum.

    Args:
        answers: rows with `question_id`, `prompt` and `text`; the two answers to an image are consecutive.
        labels: labels, see `load_labels`.
        asked: the questions that the model was asked, if they are a part of the benchmark; None for all.

    Returns:
        figure (None for a single question, or without a perception task), rows, details (perception, cognition,
        total, tasks), and questions ((score, task) of each answer row). A group without tasks has None.

    Raises:
        ValueError: if answers and labels do not match one to one, or the answers are in another order.
    """
    answers = list(answers)
    said = join(answers, labels)
    wanted: dict[str, set[Key]] = defaultdict(set)
    keys: Iterable[Key | None] = labels
    if asked is not None:
        keys = [_known(_key({"question_id": q.id}, q.stored), labels) for q in asked]
        if len(keys) % 2:
            keys = keys[:-1]
    for key in filter(None, keys):
        wanted[key[0]].add(key)
    tasks: dict[str, dict[str, Any]] = {}
    for task in [t for t in (*PERCEPTION, *COGNITION) if t in wanted] + sorted(set(wanted) - {*PERCEPTION, *COGNITION}):
        rows = said.get(task, [])
        rows = rows if asked is None else [r for r in rows if r.key in wanted[task]]
        _check(task, rows, wanted[task])
        right = [label_of(r.text) == r.gold.lower() for r in rows]
        both = [a and b for a, b in zip(right[::2], right[1::2], strict=True)]
        acc, plus = sum(right) / len(right), sum(both) / len(both)
        other = sum(label_of(r.text) == "other" for r in rows)
        tasks[task] = {"score": 100 * (acc + plus), "acc": acc, "acc_plus": plus, "rows": len(rows), "other": other}
    if asked is not None and len(asked) == 1:
        why = "the two questions of an image are scored together, and one question was asked; ask 2 or more"
        return {"figure": None, "rows": 0, "details": {}, "why": why, "questions": _questions(answers, labels, wanted)}
    if not tasks:
        raise ValueError("the answers and the labels have no question in common; give the files of the same release")
    perception, cognition = (_sum([tasks[t]["score"] for t in g if t in tasks]) for g in (PERCEPTION, COGNITION))
    total = (perception or 0.0) + (cognition or 0.0)
    details: dict[str, Any] = {"perception": perception, "cognition": cognition, "total": total, "tasks": tasks}
    absent = [t for t in (*PERCEPTION, *COGNITION) if t not in tasks]
    if absent:
        details["tasks_without_labels"] = ", ".join(absent)
    why = "none of the questions is of a perception task, so there is no perception figure"
    out = {"figure": perception, "rows": sum(t["rows"] for t in tasks.values()), "details": details}
    return {**out, "why": why if perception is None else None, "questions": _questions(answers, labels, wanted)}


def export(answers: Iterable[Mapping[str, Any]], labels: Mapping[Key, str], folder: Path, name: str) -> list[Path]:
    """Write one text file of the official tool for each task: image, question, label, answer."""
    out = []
    for task, rows in join(answers, labels).items():
        lines = ("\t".join((r.key[1], r.key[2], r.gold, r.text.translate(_FLAT))) + "\n" for r in rows)
        path = folder / name / f"{Path(task).name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("".join(lines).encode("utf-8", "replace"))
        out.append(path)
    return out
