"""Finished runs, read from the folders that an evaluation leaves; nothing here loads a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT, ANSWERS, SCORES = "result.json", "answers.jsonl", "scores.jsonl"
UNPRUNED = "full"
"""The method that prunes nothing."""


@dataclass(frozen=True)
class StoredRun:
    """One method at one budget on one benchmark.

    Attributes:
        folder: the run's folder: result.json, and beside it answers.jsonl and scores.jsonl.
        result: content of result.json.
    """

    folder: Path
    result: dict[str, Any]

    @property
    def bench(self) -> str:
        """Name of the benchmark."""
        return str(self.result["bench"])

    @property
    def label(self) -> str:
        """Method, budget and hyper-parameters, e.g. "autoprune-64"."""
        return str(self.result["label"])

    @property
    def method(self) -> str:
        """Name of the method, with its preset."""
        return str(self.result["method"])

    @property
    def tokens(self) -> int | None:
        """Budget in visual tokens; None for a method without one."""
        found: int | None = self.result["budget"]
        return found

    @property
    def model(self) -> str:
        """Checkpoint folder or hub id."""
        return str(self.result["settings"]["model"])

    @property
    def hyper(self) -> dict[str, Any]:
        """Hyper-parameters of the method."""
        return dict(self.result["settings"]["hyper"])

    @property
    def figure(self) -> float | None:
        """The benchmark's headline figure; None where it is undefined."""
        found: float | None = self.result["figure"]
        return found

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the figure; None where it is no mean over questions."""
        found = self.result["interval"]
        return None if found is None else (found[0], found[1])

    def average_tokens(self, way: str = "leaving") -> float:
        """Visual tokens "entering" or "leaving" a layer, mean over layers and images."""
        return float(self.result["visual_tokens"][f"average_{way}"])

    def flops_percent(self, counting: str = "with_text_entering") -> float | None:
        """FLOPs of a prefill by equation (2) in percent of the unpruned model's.

        Args:
            counting: "visual_only" or "with_text", then "_entering" or "_leaving"; see docs/flops.md.
        """
        found: float | None = self.result["flops"][counting]["percent_of_full"]
        return found

    def answers(self) -> list[dict[str, Any]]:
        """Rows of the answer file, in question order: question_id, prompt, text, `kept` and `stats`, see `eval.rows`.

        Raises:
            ValueError: for a missing or broken file.
        """
        return list(_json_lines(self.folder / ANSWERS))

    def scores(self) -> list[dict[str, Any]]:
        """Score (0 to 1, None where it does not count) and type of each question, in the order of `answers`.

        Raises:
            ValueError: for a missing or broken file.
        """
        return list(_json_lines(self.folder / SCORES))


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); run the evaluation again, which completes it"
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: is not JSON") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: is not an object")
        yield row


def read_runs(places: Iterable[str | Path]) -> list[StoredRun]:
    """Every finished run in or below some folders, sorted by folder, each once.

    Raises:
        ValueError: for a folder that does not exist, or a result file that is broken.
    """
    found: dict[Path, StoredRun] = {}
    for place in map(Path, places):
        if not place.is_dir():
            raise ValueError(f"{place}: no such folder; give the folder of a run, or one above several")
        for path in place.rglob(RESULT):
            found[path.parent.resolve()] = StoredRun(path.parent, read_result(path))
    return [found[folder] for folder in sorted(found)]


def read_result(path: Path) -> dict[str, Any]:
    """Content of a result file.

    Raises:
        ValueError: for a file that is broken or is not the result of an evaluation.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is broken; delete it, and the evaluation writes it again") from error
    needed = ("bench", "label", "method", "budget", "figure", "interval", "visual_tokens", "flops", "settings")
    absent = [n for n in needed if not isinstance(result, dict) or n not in result]
    if absent:
        raise ValueError(f"{path} is not the result of an evaluation (it lacks {', '.join(absent)})")
    return dict(result)


def select(
    runs: Iterable[StoredRun],
    bench: Sequence[str] = (),
    method: Sequence[str] = (),
    model: Sequence[str] = (),
    tokens: Sequence[int] = (),
) -> list[StoredRun]:
    """The runs that match every condition; an empty one matches all.

    Args:
        runs: what to choose from.
        bench: names of benchmarks.
        method: names of methods, with preset.
        model: paths or hub ids of checkpoints, or their last components.
        tokens: budgets.
    """
    return [
        r
        for r in runs
        if (not bench or r.bench in bench)
        and (not method or r.method in method)
        and (not model or r.model in model or Path(r.model).name in model)
        and (not tokens or r.tokens in tokens)
    ]
