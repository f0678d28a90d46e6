"""Bootstrap intervals: of a figure, of a difference to the unpruned model, and of a mean ratio over benchmarks.

In every draw, a benchmark's figure is recomputed from the stored scores of its questions by the benchmark's own rule:
the mean of the scores, or the rule defined by the scorer's `units` (a mean of F1, a sum over tasks, a circular
accuracy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..report.compare import check_same, scored
from ..report.store import StoredRun
from .task import Task

DRAWS = 2000
SEED = 0
"""Random seed of the draws, which makes tables reproducible."""
Array = NDArray[np.float64]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Units:
    """The sampling units of a bootstrap, and the rule that computes a figure from them.

    Attributes:
        groups: group of each unit. Units are drawn with replacement within their group, whose size stays the same.
        values: (units, quantities), the quantities that each unit contributes.
        figure: maps the mean of each quantity in each group, (draws, groups, quantities) with groups in order of
            appearance, to the figure, (draws,).
    """

    groups: Sequence[str]
    values: Sequence[Sequence[float]]
    figure: Callable[[Array], Array]


def mean_units(scores: Sequence[float], scale: float = 100.0) -> Units:
    """Return the units of a figure that is the mean of scores, times `scale`; every score is a unit."""
    return Units([""] * len(scores), [[s] for s in scores], lambda means: scale * means[:, 0, 0])


def scores_of(rows: Rows) -> list[float]:
    """Return the scores of the questions that have one."""
    return [float(r["score"]) for r in rows if r["score"] is not None]


def units_of(task: Task, run: StoredRun) -> Units:
    """Return the units of a run.

    Raises:
        ValueError: for missing or broken files, or a figure that does not follow from the stored scores.
    """
    answers = run.answers()
    rows = scored(run, answers)
    make = getattr(task.scorer, "units", None)
    out: Units = make(answers, rows) if make else mean_units(scores_of(rows))
    found = float(figures(out, np.ones((1, len(out.groups))))[0]) if out.groups else float("nan")
    if run.figure is None or not np.isclose(found, run.figure, rtol=1e-6, atol=1e-6):
        raise ValueError(
            f"{run.folder}: the figure is {run.figure}, but the scores of the questions give {found:g}; delete the "
            "folder and run the evaluation again"
        )
    return out


def figures(units: Units, weights: Array) -> Array:
    """Compute the figure in each draw.

    Args:
        units: the sampling units.
        weights: (draws, units), how often each unit was drawn.

    Returns:
        (draws,) figures.
    """
    names, values = np.array(units.groups), np.array(units.values, dtype=float)
    means = []
    for group in dict.fromkeys(units.groups):
        inside = names == group
        means.append(weights[:, inside] @ values[inside] / inside.sum())  # (draws, quantities)
    return units.figure(np.stack(means, axis=1))


def draw(groups: Sequence[str], draws: int, seed: Sequence[int]) -> Array:
    """Draw units with replacement within their groups; return how often each is drawn, (draws, units)."""
    random, names = np.random.default_rng(seed), np.array(groups)
    out = np.zeros((draws, len(groups)))
    for group in dict.fromkeys(groups):
        (places,) = np.nonzero(names == group)
        out[:, places] = random.multinomial(len(places), np.full(len(places), 1 / len(places)), size=draws)
    return out


def interval(units: Units, reference: Units | None = None) -> list[float] | None:
    """Return the 95 % percentile bootstrap interval of a figure, or of its paired difference to a reference.

    It is None without units, and if all draws agree, as where every answer is right: a bootstrap cannot tell how
    uncertain that is.

    Args:
        units: the sampling units.
        reference: units of the unpruned model on the same questions; the same units are drawn for both.

    Raises:
        ValueError: for other questions than those of the reference.
    """
    if reference is not None and list(units.groups) != list(reference.groups):
        raise ValueError("the questions differ from those of the unpruned model")
    if not units.groups:
        return None
    weights = draw(units.groups, DRAWS, (SEED, 0))
    drawn = figures(units, weights) - (0 if reference is None else figures(reference, weights))
    low, high = np.percentile(drawn, (2.5, 97.5))
    return [float(low), float(high)] if low < high else None


def mean_ratio(
    pairs: Sequence[tuple[Units, Sequence[Units]]], draws: int = DRAWS, seed: int = SEED
) -> tuple[float, float, float]:
    """Return the mean ratio of a method's figures to the unpruned model's, with its 95 % percentile bootstrap interval.

    In each draw, the questions of each benchmark are drawn again, the same ones for the pruned and the unpruned model.
    Figures of several random seeds of a method are averaged; seeds are not resampled. Draw number i of benchmark number
    j is the same in every call on the same questions, so that methods are compared on the same draws.

    Args:
        pairs: for each benchmark, the units of the unpruned model and those of the method's runs, one for each seed.
        draws: number of bootstrap draws.
        seed: random seed of the draws.

    Returns:
        (mean, low, high). The mean is NaN if an unpruned figure is 0, and the interval if one is 0 in a draw.

    Raises:
        ValueError: without benchmarks or runs, or for runs whose questions differ from those of the unpruned model.

    Source: Efron, "Bootstrap methods: another look at the jackknife" (1979); the percentile interval.
    """
    if not pairs or not all(runs for _, runs in pairs):
        raise ValueError("a mean ratio needs at least one benchmark, and a run of the method on each")
    exact: list[Array] = []
    drawn: list[Array] = []
    for number, (full, runs) in enumerate(pairs):
        if any(list(r.groups) != list(full.groups) for r in runs):
            raise ValueError(f"the runs of benchmark {number + 1} have other questions than the unpruned model")
        for weights, out in (
            (np.ones((1, len(full.groups))), exact),
            (draw(full.groups, draws, (seed, number)), drawn),
        ):
            ours, theirs = np.mean([figures(r, weights) for r in runs], axis=0), figures(full, weights)
            out.append(np.divide(ours, theirs, out=np.full(len(weights), np.nan), where=theirs > 0))
    low, high = np.percentile(np.mean(drawn, axis=0), (2.5, 97.5))
    return float(np.mean(exact)), float(low), float(high)


def ratio_to_full(
    tasks: Sequence[Task], full: Mapping[str, StoredRun], runs: Mapping[str, Sequence[StoredRun]]
) -> dict[str, Any]:
    """Return the mean ratio over all benchmarks in percent: `ratio`, `low`, `high`, and `why` if there is none.

    See `mean_ratio`.

    Args:
        tasks: benchmarks; all of them must have runs, so that every mean covers the same benchmarks.
        full: benchmark -> run of the unpruned model.
        runs: benchmark -> runs of a method, one for each seed.

    Raises:
        ValueError: see `units_of`, and for runs of different questions.
    """
    none = {"ratio": None, "low": None, "high": None}
    absent = [t.name for t in tasks if t.name not in full or not runs.get(t.name)]
    if absent:
        return {**none, "why": f"not run on {', '.join(absent)}"}
    unknown = [t.name for t in tasks if any(r.figure is None for r in (full[t.name], *runs[t.name]))]
    if unknown:
        return {**none, "why": f"no figure on {', '.join(unknown)}"}
    zero = [t.name for t in tasks if not full[t.name].figure]
    if zero:
        return {**none, "why": f"the unpruned model has 0 on {', '.join(zero)}"}
    pairs = []
    for task in tasks:
        first, rest = full[task.name], runs[task.name]
        for run in rest:
            check_same(first, run, first.answers(), run.answers())
        pairs.append((units_of(task, first), [units_of(task, run) for run in rest]))
    mean, low, high = (None if np.isnan(v) else 100 * v for v in mean_ratio(pairs))
    return {"ratio": mean, "low": low, "high": high, "why": None}
