"""Read finished runs from the folders that an evaluation writes; no model is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT, ANSWERS, SCORES = "result.json", "answers.jsonl", "scores.jsonl"
UNPRUNED = "full"
"""Name of the method that prunes nothing."""
COUNTINGS = ("visual_only_entering", "visual_only_leaving", "with_text_entering", "with_text_leaving")
"""Ways of counting the FLOPs of a prefill; see docs/flops.md."""
_NEEDED: dict[str, tuple[str, ...]] = {
    "": ("bench", "label", "method", "budget", "figure", "figure_name", "interval", "rows", "visual_tokens", "flops"),
    "settings": ("model", "hyper"),
    "seconds": (),
}


def model_id(path: str) -> str:
    """Return the model_id that LLaVA writes: the last path component, "parent_checkpoint-N" for a trainer's checkpoint.

    Source: llava/mm_utils.py, `get_model_name_from_path`.
    """
    parts = path.strip("/").split("/")
    return f"{parts[-2]}_{parts[-1]}" if parts[-1].startswith("checkpoint-") and len(parts) > 1 else parts[-1]


def model_path(name: str) -> str:
    """Return the one name under which results list a checkpoint.

    Args:
        name: a folder, relative or absolute, or a hub id.

    Returns:
        For a folder below the working directory, the path from there; for another folder, the absolute path. Links are
        not followed. Any other name is returned unchanged.
    """
    folder = Path(os.path.abspath(Path(name).expanduser()))
    if not folder.is_dir():
        return name
    here = Path.cwd()
    return str(folder.relative_to(here) if here in folder.parents else folder)


@dataclass(frozen=True)
class StoredRun:
    """One method at one budget on one benchmark.

    Attributes:
        folder: folder of the run, with result.json, answers.jsonl and scores.jsonl.
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
        """Name of the method, including its preset."""
        return str(self.result["method"])

    @property
    def tokens(self) -> int | None:
        """Budget in visual tokens; None for a method without one."""
        found: int | None = self.result["budget"]
        return found

    @property
    def model(self) -> str:
        """Checkpoint folder or hub id, see `model_path`."""
        return model_path(str(self.result["settings"]["model"]))

    @property
    def model_name(self) -> str:
        """Short name of the model, see `model_id`."""
        return model_id(self.model)

    @property
    def hyper(self) -> dict[str, Any]:
        """Hyper-parameters of the method."""
        return dict(self.result["settings"]["hyper"])

    @property
    def defaults(self) -> dict[str, Any]:
        """Default values of the method's hyper-parameters, including those of its preset."""
        return dict(self.result.get("defaults", {}))

    @property
    def name(self) -> str:
        """Name of the run's folder, with non-default hyper-parameters unless the label states them."""
        changed = {
            k: v for k, v in self.hyper.items() if k in self.defaults and self.defaults[k] != v and k != "tokens"
        }
        return ",".join([self.folder.name, *(f"{k}={v}" for k, v in changed.items() if f"{k}=" not in self.label)])

    @property
    def labels(self) -> dict[str, str]:
        """Sha256 of each label file that the run was scored with; benchmarks without one have the question file."""
        files = {name: str(facts.get("sha256")) for name, facts in self.result.get("files", {}).items()}
        return {name: sha for name, sha in files.items() if name not in ("questions", "upload")} or files

    def same_labels(self, other: StoredRun) -> bool:
        """Whether two runs were scored with the same label files, as far as both results name theirs."""
        return not self.labels or not other.labels or self.labels == other.labels

    @property
    def varied(self) -> bool:
        """Whether a sweep changed hyper-parameters of the run."""
        return "," in self.label

    @property
    def figure(self) -> float | None:
        """Headline figure of the benchmark; None if it is undefined."""
        found: float | None = self.result["figure"]
        return found

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the figure; None if there is none."""
        found = self.result["interval"]
        return None if found is None else (found[0], found[1])

    def average_tokens(self, way: str = "leaving") -> float:
        """Return the visual tokens "entering" or "leaving" a layer, averaged over layers and images."""
        return float(self.result["visual_tokens"][f"average_{way}"])

    def flops_percent(self, counting: str = "with_text_entering") -> float | None:
        """Return the FLOPs of a prefill by equation (2) in percent of the unpruned model's.

        Args:
            counting: one of COUNTINGS.
        """
        found: float | None = self.result["flops"][counting]["percent_of_full"]
        return found

    def row(self) -> dict[str, Any]:
        """Return everything that tables show of a run, under flat names.

        Returns:
            bench, model, label, method, tokens, hyper.NAME for each hyper-parameter, figure, figure_name, low and high
            (95 % interval), difference_to_full, difference_low and difference_high (in the unit of the figure),
            average_entering, average_leaving, flops_percent.COUNTING for each of COUNTINGS, questions, seconds
            (without loading the model), and folder.
        """
        low, high = self.interval or (None, None)
        gap = self.result.get("difference_to_full") or {}
        seconds = sum(float(v) for k, v in self.result["seconds"].items() if k != "load")
        return {
            "bench": self.bench,
            "model": self.model,
            "label": self.label,
            "method": self.method,
            "tokens": self.tokens,
            **{f"hyper.{name}": value for name, value in self.hyper.items()},
            "figure": self.figure,
            "figure_name": self.result["figure_name"],
            "low": low,
            "high": high,
            "difference_to_full": gap.get("points"),
            "difference_low": gap.get("low"),
            "difference_high": gap.get("high"),
            "average_entering": self.average_tokens("entering"),
            "average_leaving": self.average_tokens("leaving"),
            **{f"flops_percent.{name}": self.flops_percent(name) for name in COUNTINGS},
            "questions": int(self.result["rows"]),
            "seconds": seconds,
            "folder": str(self.folder),
        }

    def answers(self) -> list[dict[str, Any]]:
        """Read the rows of the answer file, in question order; see `eval.rows`.

        A row has question_id, prompt, text, `kept` and `stats`, among others.

        Raises:
            ValueError: for a missing or broken file.
        """
        return list(_json_lines(self.folder / ANSWERS))

    def scores(self) -> list[dict[str, Any]]:
        """Read the score (0 to 1; None if it does not count) and type of each question, in the order of `answers`.

        Raises:
            ValueError: for a missing or broken file.
        """
        return list(_json_lines(self.folder / SCORES))


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()  # of text, it would split at separators inside of answers, too
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
    """Read every finished run in or below some folders, sorted by folder, each once.

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
    """Read a result file.

    Raises:
        ValueError: for a file that is broken or is not the result of an evaluation.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is broken; delete it, and the evaluation writes it again") from error
    absent = []
    for part, names in _NEEDED.items():
        found = result if not part else result.get(part) if isinstance(result, dict) else None
        if not isinstance(found, dict):
            absent += [part] if part else list(names)
        else:
            absent += [f"{part}.{n}" if part else n for n in names if n not in found]
    if absent:
        raise ValueError(f"{path} is not the result of an evaluation (it lacks {', '.join(absent)})")
    try:
        StoredRun(path.parent, result).row()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not the result of an evaluation ({error!r})") from error
    return dict(result)


def find_run(name: str, places: Iterable[str | Path]) -> StoredRun:
    """Find a finished run by its folder, or by its path relative to one of some places.

    Args:
        name: for example "playground/results/gqa/llava-tiny/full", or "gqa/llava-tiny/full".
        places: folders with results.

    Raises:
        ValueError: if there is no finished run of that name, or its result file is broken.
    """
    folders = [Path(name).expanduser(), *(Path(place) / name for place in places)]
    for folder in folders:
        if (folder / RESULT).is_file():
            return StoredRun(folder, read_result(folder / RESULT))
    below = [run.folder for run in read_runs(folder for folder in folders if folder.is_dir())]
    if below:
        raise ValueError(f"{name} holds {len(below)} runs; name one of them, for example {below[0]}")
    looked = ", ".join(str(f / RESULT) for f in folders)
    raise ValueError(f"{name}: no finished run, looked for {looked}; llava-prune results --folders lists the runs")


def select(
    runs: Iterable[StoredRun],
    bench: Sequence[str] = (),
    method: Sequence[str] = (),
    model: Sequence[str] = (),
    tokens: Sequence[int] = (),
) -> list[StoredRun]:
    """Return the runs that match every condition; an empty condition matches all runs.

    Args:
        runs: the runs to select from.
        bench: names of benchmarks.
        method: names of methods, presets included.
        model: paths or hub ids of checkpoints, or their names, see `StoredRun.model_name`.
        tokens: budgets.
    """
    models = {model_path(name) for name in model}
    return [
        r
        for r in runs
        if (not bench or r.bench in bench)
        and (not method or r.method in method)
        and (not models or r.model in models or r.model_name in models)
        and (not tokens or r.tokens in tokens)
    ]


def matching(
    runs: Sequence[StoredRun],
    where: str,
    task: Sequence[str],
    method: Sequence[str],
    model: Sequence[str],
    tokens: Sequence[int],
) -> list[StoredRun]:
    """Return the runs that match every condition of a command line, see `select`; `where` says where they are from.

    Raises:
        ValueError: naming the flag, for a condition that no run meets, or if no run meets all of them.
    """
    models = [model_path(name) for name in model]
    known: dict[str, tuple[Sequence[Any], set[Any]]] = {
        "task": (task, {r.bench for r in runs}),
        "method": (method, {r.method for r in runs}),
        "model": (models, {r.model_name for r in runs} | ({r.model for r in runs} & set(models))),
        "tokens": (tokens, {r.tokens for r in runs} - {None}),
    }
    for name, (given, there) in known.items():
        absent = [str(v) for v in given if v not in there]
        if absent:
            have = ", ".join(map(str, sorted(there))) or "none"
            raise ValueError(f"--{name} {','.join(absent)}: no finished run in {where} has it; there are {have}")
    found = select(runs, task, method, model, tokens)
    if not found:
        raise ValueError(f"none of the {len(runs)} runs in {where} meets all conditions; leave one out")
    return found


def frame(runs: Sequence[StoredRun]) -> Any:
    """Return a pandas.DataFrame with one row for each run.

    Args:
        runs: the runs.

    Returns:
        Columns as in `StoredRun.row`, with a hyper.NAME for every hyper-parameter of any run. Cells of runs without the
        hyper-parameter are missing.

    Raises:
        ValueError: if pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ValueError("a data frame of runs needs pandas; pip install 'llava-prune[report]'") from error
    rows = [run.row() for run in runs]
    hyper = sorted({name for row in rows for name in row if name.startswith("hyper.")})
    names = [name for name in (rows[0] if rows else ()) if not name.startswith("hyper.")]
    kinds = dict.fromkeys(("bench", "model", "label", "method", *hyper, "figure_name", "folder"), "object")
    kinds |= {"tokens": "Int64", "questions": "Int64"}
    columns = [*names[:5], *hyper, *names[5:]]
    return pd.DataFrame(
        {name: pd.Series([r.get(name) for r in rows], dtype=kinds.get(name, "float64")) for name in columns}
    )
