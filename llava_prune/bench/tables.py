"""`llava-prune methods` and `llava-prune flops`, which load no model."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ..console import emit, print_table, stdout
from .flops import Size
from .flops import table as flops_of
from .methods import table as methods_of
from .show import methods_table, methods_tables

OPTIONAL = ("prunes", "its licence", "backends", "batch", "FLOPs % visual only", "avg out", "presets", "about")
"""Columns of the long tables that are left out, in this order, when the terminal is narrow."""


def methods(args: argparse.Namespace) -> int:
    """Run `llava-prune methods` and return its exit status.

    Raises:
        ValueError: for bad input.
    """
    size = Size(args.layers, args.hidden, args.intermediate, args.visual)
    rows = methods_of(args.tokens, size, args.text, args.method)
    if args.json:
        emit([dataclasses.asdict(r) for r in rows])
        return 0
    console = stdout()
    if not args.long:
        print_table(console, methods_table(rows, size, args.text), ("prunes", "leaving"))
        return 0
    for shown in methods_tables(rows, size, args.text):
        print_table(console, shown, OPTIONAL)
    return 0


def flops(args: argparse.Namespace) -> int:
    """Run `llava-prune flops` and return its exit status.

    Raises:
        ValueError: for bad input.
    """
    size = Size(args.layers, args.hidden, args.intermediate, args.visual)
    rows = [dataclasses.asdict(r) for r in flops_of(args.tokens, args.slope, size, args.text, args.published)]
    if args.json:
        emit(rows)
        return 0
    title = f"equation (2), {args.layers} layers, {args.visual} visual tokens, {args.text:g} text tokens"
    stdout().print(_flops_table(rows, title, bool(args.published)))
    return 0


def _flops_table(rows: Sequence[Mapping[str, Any]], title: str, published: bool) -> Table:
    shown = Table(title=title)
    names = [n for n in rows[0] if published or "published" not in n]
    for name in names:
        shown.add_column(name.replace("_", " "), justify="left" if name == "counting" else "right")
    for row in rows:
        values = [row[n] for n in names]
        shown.add_row(*("-" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v) for v in values))
    return shown
