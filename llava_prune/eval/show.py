"""Results on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..bench.flops import Size
from ..bench.methods import Row, runs


class _Rate(ProgressColumn):
    """Answers a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("-- answers/s" if speed is None else f"{speed:.1f} answers/s")


class Bars:
    """One progress bar a run; call with (label, done, total)."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._ids: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, label: str, done: int, total: int) -> None:
        if label not in self._ids:
            self._ids[label] = self._progress.add_task(label, total=total)
            self._progress.update(self._ids[label], completed=done)
            self._progress.reset(self._ids[label], completed=done, total=total)  # the rate counts this run's alone
        self._progress.update(self._ids[label], completed=done)


def _interval(share: Mapping[str, Any]) -> str:
    return "-" if share["accuracy"] is None else f"{share['accuracy']:.2f} [{share['low']:.1f}, {share['high']:.1f}]"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def results_table(results: Sequence[Mapping[str, Any]], title: str) -> Table:
    """All runs side by side, the reference first."""
    table = Table(title=title, caption="accuracy in percent with 95 % interval; TFLOPs of a prefill by equation (2)")
    for name in ("method", "budget", "accuracy", "to full", "binary", "open", "tokens in/out", "FLOPs %", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    for r in results:
        gap, tokens, flops = r.get("difference_to_full"), r["visual_tokens"], r["flops"]
        table.add_row(
            r["method"],
            "-" if r["budget"] is None else str(r["budget"]),
            _interval(r["details"]["overall"]),
            "-" if gap is None else f"{gap['points']:+.2f} [{gap['low']:+.1f}, {gap['high']:+.1f}]",
            _number(r["details"]["binary"]["accuracy"]),
            _number(r["details"]["open"]["accuracy"]),
            f"{tokens['average_entering']:.1f} / {tokens['average_leaving']:.1f}",
            f"{_number(flops['with_text_entering']['percent_of_full'])}",
            _number(sum(v for k, v in r["seconds"].items() if k != "load")),
        )
    return table


def score_table(result: Mapping[str, Any]) -> Table:
    """A scorer's details."""
    table = Table(title=f"{result['bench']}: {result['figure']:.2f} over {result['rows']} questions")
    for name in ("group", "accuracy [95 %]", "rows"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for name, value in result["details"].items():
        if not isinstance(value, dict):
            table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value), "")
        elif "accuracy" in value:
            table.add_row(name, _interval(value), str(value["rows"]))
        else:
            for key, share in value.items():
                table.add_row(f"{name}: {key}", _interval(share), str(share["rows"]))
    return table


def methods_tables(rows: Sequence[Row], size: Size, text: float) -> list[Table]:
    """What every method costs, what it does to positions and where it comes from, and its arguments."""
    about = f"{size.layers} layers, {size.visual} visual tokens; FLOPs of a prefill by equation (2) on entering tokens"
    cost = Table(title=f"methods: {about}, in percent of the unpruned model", caption="NxC: N layers with C tokens")
    for name in ("method", "budget", "prunes", "tokens entering each layer", "avg in", "avg out"):
        cost.add_column(name, overflow="fold")
    cost.add_column("FLOPs % visual only", justify="right")
    cost.add_column(f"FLOPs % with {text:g} text", justify="right")
    for r in rows:
        counts = "-" if r.entering is None else runs(r.entering)
        cost.add_row(
            r.name,
            "-" if r.tokens is None else str(r.tokens),
            r.where,
            f"{counts} ({r.note})" if r.note else counts,
            _number(r.average_entering),
            _number(r.average_leaving),
            _number(r.percent_visual_only),
            _number(r.percent_with_text),
        )
    facts = Table(title="positions and origin")
    for name in ("method", "positions", "new tokens count from", "backends", "batch", "official code", "its licence"):
        facts.add_column(name, overflow="fold")
    arguments = Table(title="hyper-parameters")
    for name in ("method", "about", "arguments and defaults", "presets"):
        arguments.add_column(name, overflow="fold")
    seen: set[str] = set()
    for r in rows:
        if r.name in seen:
            continue
        seen.add(r.name)
        counted = "unpruned length" if r.decode == "original" else "each layer's cache"
        facts.add_row(r.name, r.positions, counted, r.backends, r.batch, r.source, r.licence)
        hyper = ", ".join(f"{k}={v!r}" for k, v in r.hyper.items()) or "-"
        arguments.add_row(r.name, r.about, hyper, ", ".join(r.presets) or "-")
    return [cost, facts, arguments]
