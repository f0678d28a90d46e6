"""Plots of visual tokens: retention and survival over the layers, mutual information and slope."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import drawing
from .store import ANSWERS, SCORES, UNPRUNED, StoredRun
from .together import bench_name, by_bench, names, titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_QUESTIONS = 200
"""Largest number of questions that are drawn. Medians and percentiles are computed from all questions."""
OUTER, MIDDLE = (5, 95), (25, 50, 75)
"""Percentiles of bands and lines, and of boxes."""
BAND = "5th to 95th percentile"
DARK, LIGHT, OTHER = drawing.PALETTE[0], drawing.PALETTE[5], drawing.PALETTE[1]


def _layers(axes: Axes, count: int) -> None:
    """Set up an axis of layers with whole numbers from 0, as in the documentation."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.03 * count, 1.03 * count - 1)
    axes.set_xlabel("decoder layer")


# retention --------------------------------------------------------------------------------------------------------


@drawing.style()
def draw_retention(runs: Sequence[StoredRun]) -> Figure:
    """Plot the visual tokens leaving each layer for each question, in runs whose questions keep different numbers.

    Each run has a panel. Thin lines are questions, at most 200 at equal distances in the answer file. The median and
    the band from the 5th to the 95th percentile are those of all questions with an image.

    Args:
        runs: finished runs, see `together.comparable`.

    Raises:
        ValueError: if no run has counts that differ, for a missing or broken answer file, for too many runs, or if
            matplotlib is not installed.
    """
    found = [(r, c) for r in runs if r.method != UNPRUNED and (np.diff(c := _leaving(r), axis=0) != 0).any()]
    if not found:
        raise ValueError(
            "the figure needs a run whose questions keep different numbers of tokens; make one with "
            "llava-prune eval gqa --method autoprune --tokens 64"
        )
    figure, grid = drawing.panels(len(found))
    for axes, (_, counts), title in zip(grid, found, titles([r for r, _ in found]), strict=True):
        questions, layers = counts.shape
        x = np.arange(layers)
        for row in counts[:: math.ceil(questions / MOST_QUESTIONS)]:
            axes.plot(x, row, color="0.7", linewidth=0.4, label="question")
        low, high = np.percentile(counts, OUTER, axis=0)
        axes.fill_between(x, low, high, color=LIGHT, alpha=0.4, linewidth=0, zorder=2.5, label=BAND)
        axes.plot(x, np.array([low, high]).T, color=DARK, linewidth=0.7, linestyle="--", zorder=3, label=BAND)
        axes.plot(x, np.median(counts, axis=0), color=DARK, linewidth=1.4, zorder=3, label="median")
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.text(0.04, 0.04, f"{questions} questions", transform=axes.transAxes)  # falling curves leave it free
        axes.set_ylabel("visual tokens leaving a layer")
        _layers(axes, layers)
    drawing.legend(figure)
    return figure


def _leaving(run: StoredRun) -> Any:
    """Return the visual tokens leaving each layer, (questions, layers), of questions with an image."""
    rows = run.answers()
    try:
        rows = [r for r in rows if r["kept"]["entering"][0]] or rows
        return np.array([r["kept"]["leaving"] for r in rows])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{run.folder / ANSWERS} does not state the tokens of each layer; run it again") from error


# survival ---------------------------------------------------------------------------------------------------------


@drawing.style()
def draw_survival(runs: Sequence[StoredRun]) -> Figure:
    """Plot the visual tokens entering each layer, averaged over questions, in percent of the unpruned model's.

    Each benchmark has a panel, and each run a line.

    Args:
        runs: finished runs, see `together.comparable`.

    Raises:
        ValueError: without a run of a pruning method, for too many runs, or if matplotlib is not installed.
    """
    if all(r.method == UNPRUNED for r in runs):
        raise ValueError(
            "the figure needs a finished run of a pruning method; make some with "
            "llava-prune eval gqa --method autoprune,fastv --tokens 64"
        )
    labels = names(runs, tokens=True)
    looks = drawing.looks([n for r, n in zip(runs, labels, strict=True) if r.method != UNPRUNED])
    benches = by_bench(runs)
    figure, grid = drawing.panels(len(benches))
    for axes, bench in zip(grid, benches, strict=True):
        for run, name in zip(runs, labels, strict=True):
            if run.bench != bench:
                continue
            tokens = run.result["visual_tokens"]
            y = [100 * n / tokens["unpruned"] for n in tokens["entering_by_layer"]]
            if run.method == UNPRUNED:
                axes.plot(range(len(y)), y, color=drawing.UNPRUNED_COLOUR, linewidth=1, label=drawing.UNPRUNED_LABEL)
                continue
            step = max(2, min(len(looks), len(y) // 3))
            start = list(looks).index(name) % step  # shifts the markers, so that overlapping lines stay visible
            axes.plot(range(len(y)), y, markevery=(start, step), label=name, **looks[name])
            _layers(axes, len(y))
        axes.set_ylim(0, 104)
        axes.set_ylabel("visual tokens entering a layer\n(% of unpruned)")
        axes.set_title(bench_name(bench))
    drawing.legend(figure)
    return figure


# information ------------------------------------------------------------------------------------------------------

ALL, UNTYPED = "all", "no type"
STATS = {"mi1": "mutual information $I$ (bit)", "slope": "slope $k$ (1 / layer)"}
"""AutoPrune's statistics of a question -> labels of their axes."""


@drawing.style()
def draw_information(runs: Sequence[StoredRun]) -> Figure:
    """Plot the mutual information of question and image, and the slope of the retention curve, by type of question.

    Each run of AutoPrune has a row of two panels. Boxes are quartiles, and lines reach from the 5th to the 95th
    percentile. The types are those of scores.jsonl; without that file, one box shows all questions.

    Args:
        runs: finished runs, see `together.comparable`.

    Raises:
        ValueError: without a run of AutoPrune, for a missing or broken answer file, for scores of other questions, for
            too many runs, or if matplotlib is not installed.
    """
    found = [(r, t) for r in runs if (t := _by_type(r))]
    if not found:
        raise ValueError(
            "the figure needs a run of AutoPrune, whose answers state mutual information and slope; make one with "
            "llava-prune eval gqa --method autoprune --tokens 64"
        )
    most = max(len(t) for _, t in found)
    figure, grid = drawing.panels(2 * len(found), height=0.75 + 0.2 * most, columns=2)
    for i, ((_, types), title) in enumerate(zip(found, titles([r for r, _ in found]), strict=True)):
        left, right = pair = grid[2 * i : 2 * i + 2]
        for j, (axes, (stat, label), colour) in enumerate(zip(pair, STATS.items(), (DARK, OTHER), strict=True)):
            if i:
                axes.sharex(grid[j])
            _boxes(axes, [[s[stat] for s in stats] for stats in types.values()], colour)
            axes.set_xlabel(label)
        left.set_yticks(range(len(types)), [f"{name} ({len(stats)})" for name, stats in types.items()])
        right.set_yticks([])
        left.set_title(title, loc="left")
    return figure


def _by_type(run: StoredRun) -> dict[str, list[Mapping[str, float]]]:
    """Return type of question -> statistics of its questions: all questions first, then the types sorted by name."""
    rows = run.answers()
    types: list[Any] = [None] * len(rows)
    if (run.folder / SCORES).is_file():
        scores = run.scores()
        if [s.get("question_id") for s in scores] != [r.get("question_id") for r in rows]:
            raise ValueError(
                f"{run.folder / SCORES} has other questions than the answer file beside it; run the evaluation again, "
                "which writes it"
            )
        types = [s.get("type") for s in scores]
    known = [(t, r["stats"]) for t, r in zip(types, rows, strict=True) if set(STATS) <= set(r.get("stats", {}))]
    out: dict[str, list[Mapping[str, float]]] = {ALL: [s for _, s in known]} if known else {}
    kinds = sorted({t for t, _ in known if t is not None})
    for kind in kinds:
        out[kind] = [s for t, s in known if t == kind]
    if kinds and (rest := [s for t, s in known if t is None]):
        out[UNTYPED] = rest
    return out


def _boxes(axes: Axes, data: Sequence[Sequence[float]], colour: str) -> None:
    """Draw horizontal boxes from the top down.

    They are drawn by hand, because the argument for the orientation of `Axes.boxplot` differs between versions.
    """
    low, high = np.array([np.percentile(d, OUTER) for d in data]).T
    q1, median, q3 = np.array([np.percentile(d, MIDDLE) for d in data]).T
    y = np.arange(len(data))
    axes.hlines(y, low, high, color=colour, linewidth=1)
    axes.barh(y, q3 - q1, left=q1, height=0.55, color="white", edgecolor=colour, linewidth=1, zorder=2.5)
    axes.vlines(median, y - 0.275, y + 0.275, color=colour, linewidth=2, zorder=3)
    axes.locator_params(axis="x", nbins=5)
    axes.set_ylim(len(data) - 0.4, -0.6)
    axes.grid(False, axis="y")
