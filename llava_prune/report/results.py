"""`llava-prune results`: list finished runs, or compare two of them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..arguments import RESULTS
from ..console import difference_text, emit, figure_text, number_text, stderr, stdout, write
from .compare import Comparison, compare
from .store import UNPRUNED, StoredRun, find_run, frame, matching, read_runs

SHOWN = 20
"""Default number of flipped questions in the output of a comparison."""
LINES, LINE, ANSWER = 6, 100, 60
"""Number of last lines of a question, and of characters of a line and of an answer, in the table of flips."""


def results(args: argparse.Namespace) -> int:
    """Run `llava-prune results` and return its exit status.

    Raises:
        ValueError: for flags that cannot be combined; see also `listed`, `find_run` and `compare`.
    """
    places = args.places or [RESULTS]
    if args.compare:
        filters = [f"--{n}" for n in ("task", "method", "model", "tokens") if getattr(args, n)]
        unused = [*filters, *(["--csv"] if args.csv is not None else []), *(["--folders"] if args.folders else [])]
        if unused:
            raise ValueError(f"{', '.join(unused)} cannot be combined with --compare, which takes two runs")
        found = compare(*(find_run(name, places) for name in args.compare))
        if args.json:
            emit(dataclasses.asdict(found))
        else:
            _print_comparison(found, SHOWN if args.show is None else args.show)
        return 0
    if args.show is not None:
        raise ValueError(f"--show {args.show} needs --compare")
    runs = listed(places, args.task, args.method, args.model, args.tokens)
    if args.json:
        emit([run.row() for run in runs])
    elif args.csv is not None:
        _write_csv(runs, args.csv)
    else:
        stdout().print(runs_table(runs, args.folders))
    return 0


def listed(
    places: Sequence[str], task: Sequence[str], method: Sequence[str], model: Sequence[str], tokens: Sequence[int]
) -> list[StoredRun]:
    """Return the finished runs below some folders that match every condition, sorted with unpruned runs first.

    Raises:
        ValueError: if there are none, or for a condition that no run meets; see also `read_runs`.
    """
    where = ", ".join(places)
    default = list(places) == [RESULTS]
    runs = [] if default and not Path(RESULTS).is_dir() else read_runs(places)
    if not runs:
        way_out = "run an evaluation (llava-prune eval gqa), or give the folder of earlier ones"
        raise ValueError(f"no finished run in {where}; {way_out}")
    return sorted(matching(runs, where, task, method, model, tokens), key=_order)


def _order(run: StoredRun) -> tuple[Any, ...]:
    return run.bench, run.model_name, run.method != UNPRUNED, run.method, -(run.tokens or 0), str(run.folder)


def _write_csv(runs: Sequence[StoredRun], file: str) -> None:
    text = frame(runs).to_csv(index=False, lineterminator="\n")
    if file == "-":
        write(text)
        return
    path = Path(file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    stderr().print(f"{len(runs)} runs: {path}", markup=False, soft_wrap=True)


# tables -----------------------------------------------------------------------------------------------------------


def _plain(text: Any, most: int = 0) -> Text:
    """Return text for a cell, without markup and control characters, cut to `most` characters (0 for no limit)."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return Text(shown if not most or len(shown) <= most else f"{shown[: most - 1]}…")


def runs_table(runs: Sequence[StoredRun], folders: bool = False) -> Table:
    """Return a table with one row for each run.

    Args:
        runs: the runs.
        folders: whether to show the folder of each run.
    """
    caption = "figures with 95 % interval; FLOPs of a prefill by equation (2), text and entering tokens counted"
    table = Table(title=f"{len(runs)} finished run{'s' if len(runs) != 1 else ''}", caption=caption)
    for name in ("benchmark", "run", "model", "figure", "FLOPs %", *(["folder"] if folders else [])):
        table.add_column(name, justify="right" if name in ("figure", "FLOPs %") else "left", overflow="fold")
    for run in runs:
        limit = run.result["settings"].get("limit")
        table.add_row(
            _plain(run.bench if limit is None else f"{run.bench}, first {limit}"),
            _plain(run.name),
            _plain(run.model_name),
            figure_text(run.result),
            number_text(run.flops_percent()),
            *([_plain(run.folder)] if folders else []),
        )
    return table


def _print_comparison(found: Comparison, show: int) -> None:
    console = stdout()
    models = found.a["model"] != found.b["model"]
    for letter, run in (("A", found.a), ("B", found.b)):
        interval = None if run["low"] is None else (run["low"], run["high"])
        figure = f"{run['figure_name']} {figure_text({'figure': run['figure'], 'interval': interval})}"
        parts = [run["label"], *([run["model"]] if models else []), figure, run["folder"]]
        console.print(f"{letter}: {', '.join(parts)}", markup=False, soft_wrap=True, highlight=False)
    console.print(counts_table(found))
    p = f"= {found.p_value:.4f}" if found.p_value >= 1e-4 else "< 0.0001"
    lines = [
        f"questions with different scores: {len(found.flips)}; exact two-sided McNemar test p {p}",
        f"answers that differ in text only, with the same score: {found.reworded}",
    ]
    if found.unscored:
        lines.append(f"questions without a score, left out: {found.unscored}")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True, highlight=False)
    if found.flips and show:
        console.print(flips_table(found, show))


def counts_table(found: Comparison) -> Table:
    """Return the table of counts over all questions and by type."""
    partly = found.total.partly > 0
    credit = partly or any(score not in (0, 1) for f in found.flips for score in (f.score_a, f.score_b))
    more = ("more in A", "more in B") if credit else ("only A", "only B")
    caption = "questions right in both, one or neither; B - A: mean scores in points, paired 95 % interval"
    table = Table(title=f"{found.bench}: A and B on the same questions", caption=caption)
    for name in ("type", "questions", "both", *more, "neither", *(["equal partial credit"] if partly else []), "B - A"):
        table.add_column(name, justify="left" if name == "type" else "right", overflow="fold")
    for name, c in [("all", found.total), *found.by_type.items()]:
        row = [c.questions, c.both, c.only_a, c.only_b, c.neither, *([c.partly] if partly else [])]
        table.add_row(_plain(name), *map(str, row), difference_text(c.difference), end_section=c is found.total)
    return table


def flips_table(found: Comparison, show: int) -> Table:
    """Return the table of the first `show` flipped questions."""
    shown = found.flips[:show]
    table = Table(title=f"first {len(shown)} of {len(found.flips)} flipped questions", show_lines=True)
    for name in ("question_id", "type", "question", "A", "B", "scores"):
        table.add_column(name, justify="right" if name == "scores" else "left", overflow="fold")
    for flip in shown:
        question = Text("\n").join(_plain(line, LINE) for line in flip.prompt.split("\n")[-LINES:])
        answers = (_plain(flip.answer_a, ANSWER), _plain(flip.answer_b, ANSWER))
        scores = f"{flip.score_a:.3g} {flip.score_b:.3g}"
        table.add_row(_plain(flip.question_id), _plain(flip.type or "-"), question, *answers, scores)
    return table
