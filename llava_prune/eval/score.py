"""Score an answer file, and write it in the formats of the official tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .reading import WAY_OUT
from .task import Sources, Task, answers_of, load_task, questions_of

SUFFIX = "_official"


def score_files(
    bench: str,
    answers: Path,
    data: Path | None,
    questions: Path | None = None,
    annotations: Path | None = None,
    export: Path | None = None,
) -> tuple[dict[str, Any], list[Path], list[str]]:
    """Score an answer file, and write it in the formats of the official tools.

    Args:
        bench: benchmark.
        answers: answer file in LLaVA's format, or in another format of the benchmark.
        data: the benchmark's folder.
        questions: question file that replaces the one in `data`; only its questions are scored.
        annotations: label file that replaces the one in `data`.
        export: folder for the official formats; None for a folder beside the answers, if it can be created.

    Returns:
        The result (bench, figure, figure_name, details, rows, versions, why), the files written, and warnings. The
        figure is None if the files have no labels or the score is undefined; `why` then gives the reason.

    Raises:
        ValueError: for broken files, or files that do not belong together.
    """
    task = load_task(bench)
    if data is None and annotations is None and questions is None:
        raise ValueError("give --data, the folder with the benchmark's files, or --annotations")
    if data is not None and not data.is_dir():
        raise ValueError(f"DATA={data}: no such folder; give the folder with the files of {bench}")
    given, asked = {"questions": questions, "annotations": annotations}, None
    if "annotations" not in task.files:  # the question file contains the labels
        given = {"questions": annotations or questions}
    sources = Sources(task, data, given, inside=True)
    if questions is not None and "annotations" in task.files:
        asked = questions_of(sources)
    rows = answers_of(task, answers)
    labels = task.scorer.load_labels(sources)
    if asked is not None:
        absent = task.scorer.unknown(labels, asked)
        if absent:
            raise ValueError(f"{len(absent)} of {len(asked)} questions have no annotation: {', '.join(absent[:10])}")
    score = task.scorer.score(rows, labels, asked)
    result = {
        "bench": task.name,
        "figure": score["figure"],
        "figure_name": task.figure,
        "details": score["details"],
        "rows": score["rows"],
        "versions": sources.versions,
        "why": score.get("why"),
    }
    written, warnings = _export(task, rows, labels, answers, export)
    if score["details"].get("missing"):  # set if the official rule counts missing answers as wrong
        absent = f"{score['details']['missing']} of {score['rows']} questions have no answer"
        warnings.append(f"{absent} and count as wrong in 'overall', while {task.figure} leaves them out; {WAY_OUT}")
    warnings += [
        f"{name} is not a known release ({facts.get('rows', '?')} rows)"
        for name, facts in sources.versions.items()
        if facts["version"] is None
    ]
    return result, written, warnings


def _export(
    task: Task, rows: list[dict[str, Any]], labels: Any, answers: Path, folder: Path | None
) -> tuple[list[Path], list[str]]:
    """Write the official formats; return the files written, and warnings."""
    if not hasattr(task.scorer, "export"):
        return [], []
    name = answers.stem
    place = folder or answers.with_name(name + SUFFIX)
    try:
        place.mkdir(parents=True, exist_ok=True)
        return task.scorer.export(rows, labels, place, name), []
    except OSError as error:
        if folder is not None:
            raise
        return [], [f"{place} cannot be written ({error.strerror}); give another folder with --export"]
