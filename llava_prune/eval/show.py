"""Tables and progress bars of the evaluation for the terminal."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..console import difference_text, figure_text, number_text


class _Rate(ProgressColumn):
    """Column with the answers, or other units, per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"-- {self._unit}/s" if speed is None else f"{speed:.1f} {self._unit}/s")


class Bars:
    """Progress bars, one for each run; call the object with (label, done, total)."""

    def __init__(self, console: Console, unit: str = "answers") -> None:
        ends = (MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), *ends)
        self._progress = Progress(*columns, console=console)
        self._ids: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def of(self, task: str) -> Callable[[str, int, int], None]:
        """Return the progress callback of a benchmark."""
        return lambda label, done, total: self(f"{task} {label}", done, total)

    def __call__(self, label: str, done: int, total: int) -> None:
        if label not in self._ids:
            self._ids[label] = self._progress.add_task(label, total=total)
            self._progress.update(self._ids[label], completed=done)
            self._progress.reset(self._ids[label], completed=done, total=total)  # earlier answers do not count as speed
        self._progress.update(self._ids[label], completed=done)


def _interval(share: Mapping[str, Any]) -> str:
    return "-" if share["accuracy"] is None else f"{share['accuracy']:.2f} [{share['low']:.1f}, {share['high']:.1f}]"


def _look_up(details: Mapping[str, Any], path: str) -> str:
    """Return the text of a figure of the details by its dotted path.

    A path that ends in "%" refers to a share, which is shown in percent.
    """
    value: Any = details
    for part in path.removesuffix("%").split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return number_text(100 * value if path.endswith("%") and value is not None else value)


def results_table(results: Sequence[Mapping[str, Any]], title: str, figure: str, columns: Mapping[str, str]) -> Table:
    """Return the table of a benchmark's runs, the reference first.

    Args:
        results: results of the runs, see `result.make_result`.
        title: title of the benchmark.
        figure: name of its headline figure.
        columns: heading -> dotted path into the details.
    """
    table = Table(title=title, caption="figures with 95 % interval; TFLOPs of a prefill by equation (2)")
    for name in ("method", "budget", figure, "vs full", *columns, "tokens in/out", "FLOPs %", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for r in results:
        tokens, flops = r["visual_tokens"], r["flops"]
        table.add_row(
            r["method"],
            "-" if r["budget"] is None else str(r["budget"]),
            figure_text(r),
            difference_text(r.get("difference_to_full")),
            *(_look_up(r["details"], path) for path in columns.values()),
            f"{tokens['average_entering']:.1f} / {tokens['average_leaving']:.1f}",
            f"{number_text(flops['with_text_entering']['percent_of_full'])}",
            number_text(sum(v for k, v in r["seconds"].items() if k != "load")),
        )
    return table


def summary_table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Return the table of several benchmarks: one row for each, and one column for each run, the reference first."""
    labels = list(dict.fromkeys(r["label"] for runs in results.values() for r in runs))
    table = Table(title="all benchmarks", caption="figures with 95 % interval")
    for name in ("benchmark", "figure", "rows", *labels):
        table.add_column(name, justify="left" if name in ("benchmark", "figure") else "right", overflow="fold")
    for name, runs in results.items():
        by = {r["label"]: figure_text(r) for r in runs}
        if runs:
            table.add_row(name, runs[0]["figure_name"], str(runs[0]["rows"]), *(by.get(label, "-") for label in labels))
    return table


def data_table(report: Mapping[str, Any]) -> Table:
    """Return the table of a benchmark's files: presence, size, and rows beside those of known releases."""
    state = "complete" if report["complete"] else "not complete"
    table = Table(title=f"{report['bench']}: {state}")
    for name in ("kind", "found", "size", "rows", "release"):
        table.add_column(name)
    for f in report["files"]:
        place = "yes" if f["path"] else "no (optional)" if f["optional"] else "no"
        size = "-" if f["bytes"] is None else f"{f['bytes'] / 1e6:.1f} MB, {f['files']} files"
        wanted = f["expected"]
        known = " or ".join(map(str, wanted)) if isinstance(wanted, list) else _text(wanted)
        rows = f"{_text(f['rows'])} of {known}" if wanted else _text(f["rows"])
        table.add_row(f["kind"], place, size, rows, _text(f["version"]))
    return table


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def score_table(result: Mapping[str, Any]) -> Table:
    """Return the table of a score's details, with the releases of the label files."""
    files = "; ".join(f"{n}: {v['version'] or 'unknown release'}" for n, v in result["versions"].items())
    title = (
        f"{result['bench']}: {result['figure_name']} {number_text(result['figure'], 2)} over {result['rows']} questions"
    )
    table = Table(title=title, caption=Text(files))
    for name in ("group", "value", "rows"):
        table.add_column(name, justify="left" if name == "group" else "right")
    _details(table, result["details"], "")
    return table


def _add(table: Table, label: str, value: str, rows: str = "") -> None:
    """Add a row of plain text: the names of groups come from label files and may look like rich's markup."""
    table.add_row(Text(label), Text(value), Text(rows))


def _value(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else _text(value)


def _details(table: Table, details: Mapping[str, Any], before: str) -> None:
    for name, value in details.items():
        label = f"{before}{name}"
        if not isinstance(value, Mapping):
            _add(table, label, _value(value))
        elif "low" in value:
            _add(table, label, _interval(value), str(value["rows"]))
        elif not any(isinstance(v, Mapping) for v in value.values()):
            rest = {k: v for k, v in value.items() if k not in ("rows", "samples")}
            text = ", ".join(f"{k} {_value(v)}" for k, v in rest.items())
            _add(table, label, text, str(value.get("rows", value.get("samples", ""))))
        else:
            _details(table, value, f"{label}: ")


def finish(
    module: str,
    argv: Sequence[str],
    measure: Callable[[], dict[str, Any]],
    table: Callable[[dict[str, Any]], Table],
    out: Path | None,
    as_json: bool,
) -> int:
    """Measure and show the result, as the last step of a module's command line; return its exit status.

    Args:
        module: dotted name of the module, for the command in the result.
        argv: arguments of the module.
        measure: runs the measurement; a ValueError becomes a message on stderr and status 1.
        table: returns the table of a result.
        out: JSON file for the result; None for no file.
        as_json: whether to print JSON on stdout and nothing else.
    """
    try:
        found = measure()
    except ValueError as error:
        Console(stderr=True).print(f"{module.rpartition('.')[2]}: {error}", markup=False, soft_wrap=True)
        return 1
    result = {"command": shlex.join(["python", "-m", module, *argv]), **found}
    text = json.dumps(result, indent=2) + "\n"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    if as_json:
        sys.stdout.write(text)
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(table(result))
    return 0
