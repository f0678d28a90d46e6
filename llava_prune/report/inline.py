"""Plots as SVG inside a page, without global style rules or clashing ids, with colours that follow the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from . import drawing
from .store import UNPRUNED, StoredRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALE = 1.1
"""Size on screen relative to the size on paper."""
SHRUNK = 0.85
"""Share of the screen size to which a figure may shrink in a narrow window, before it scrolls."""
PER_POINT = 96 / 72
"""CSS pixels of a point."""
THEMED = {"#000000": "currentColor", "#e6e6e6": "var(--grid)", "#d9d9d9": "var(--band)"}
"""Colour in figures -> colour in the page, for lines and text, the grid, and the band of the unpruned model."""
Draw = Callable[[Sequence[StoredRun]], "Figure"]


def svg(figure: Figure, prefix: str, label: str) -> str:
    """Return a figure as an <svg> element.

    Args:
        figure: the figure.
        prefix: prefix of its ids, which differs between the figures of a page.
        label: description for screen readers, without markup.
    """
    out = io.StringIO()
    with drawing.style():
        import matplotlib

        matplotlib.rcParams["svg.fonttype"] = "none"
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    found = out.getvalue()
    found = found[found.index("<svg") :]
    found = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", found, flags=re.DOTALL)
    found = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', found)
    found = re.sub(r'\b(?:xlink:)?href="#([^"]+)"', rf'href="#{prefix}\1"', found)
    found = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", found)
    for colour, themed in THEMED.items():
        found = re.sub(colour, themed, found, flags=re.IGNORECASE)
    width, height = (72 * PER_POINT * SCALE * inches for inches in figure.get_size_inches())
    box = re.search(r'viewBox="[^"]+"', found)
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
    start += f' style="max-width: max(100%, {SHRUNK * width:.0f}px); height: auto"'
    head = f'{start} {box[0] if box else ""} role="img" aria-label="{escape(label)}">'
    return re.sub(r"\n\s*", "\n", head + found[found.index(">") + 1 :]).strip()


def drawn(draw: Draw, runs: Sequence[StoredRun]) -> tuple[Figure | None, str]:
    """Draw as many of the runs as a figure can hold; return it with a sentence on the runs that are left out.

    If there are too many runs, the variants of sweeps are left out, then all budgets but the one with the most runs.

    Args:
        draw: draws a figure, see `figures.OF_RUNS`.
        runs: finished runs of one benchmark.

    Returns:
        The figure, and a sentence or "". If the figure is None, the sentence gives the reason.
    """
    plain = [r for r in runs if not r.varied]
    budgets = [r.tokens for r in plain if r.method != UNPRUNED]
    most = max(sorted(set(budgets), key=lambda b: (b is not None, b)), key=budgets.count, default=None)
    narrow = [r for r in plain if r.method == UNPRUNED or r.tokens == most]
    tries = [(list(runs), ""), (plain, "Without the variants of sweeps.")]
    tries += [(narrow, f"Only the budget of {most} tokens, without the variants of sweeps.")] if most else []
    refused = ""
    for some, remark in tries:
        try:
            return draw(some), remark
        except ValueError as error:
            refused = refused or str(error)
    return None, f"Not drawn: {refused}."
