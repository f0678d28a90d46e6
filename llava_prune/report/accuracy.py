"""Plots of benchmark figures against FLOPs, visual tokens and hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import drawing, together
from .store import UNPRUNED, StoredRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 30
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
RING: dict[str, Any] = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgecolor": "black"}
RING |= {"markeredgewidth": 0.8, "linestyle": "none", "label": "default"}
CLOSE = 0.14
"""Smallest distance between values that serve as ticks, as a share of their range."""


@drawing.style()
def draw_accuracy_flops(runs: Sequence[StoredRun]) -> Figure:
    """Plot benchmark figures against the FLOPs of a prefill in percent of the unpruned model's, text counted.

    Args:
        runs: finished runs, see `together.comparable`.

    Raises:
        ValueError: for runs without a figure or FLOPs, for too many runs, or if matplotlib is not installed.
    """
    return _against(runs, StoredRun.flops_percent, "prefill FLOPs (% of unpruned)")


@drawing.style()
def draw_accuracy_tokens(runs: Sequence[StoredRun]) -> Figure:
    """Plot benchmark figures against the visual tokens leaving a layer, averaged over layers and questions.

    Args:
        runs: finished runs, see `together.comparable`.

    Raises:
        ValueError: for runs without a figure, for too many runs, or if matplotlib is not installed.
    """
    return _against(runs, StoredRun.average_tokens, "mean visual tokens leaving a layer")


def _against(runs: Sequence[StoredRun], cost: Callable[[StoredRun], float | None], label: str) -> Figure:
    """Draw a panel for each benchmark, with a line for each method over its budgets."""
    shown = [r for r in runs if r.method != UNPRUNED and r.figure is not None and cost(r) is not None]
    if not shown:
        raise ValueError(
            "the figure needs a finished run of a pruning method; make some with "
            "llava-prune eval gqa --method autoprune,random --tokens 192,128,64"
        )
    lines = together.names(shown, tokens=False)
    looks = drawing.looks(lines)
    benches = together.by_bench(shown)
    figure, grid = drawing.panels(len(benches))
    for axes, (bench, here) in zip(grid, benches.items(), strict=True):
        _unpruned(axes, runs, bench)
        for name in looks:
            points = [r for r, n in zip(shown, lines, strict=True) if n == name and r.bench == bench]
            points.sort(key=lambda r: cost(r) or 0.0)
            if points:
                _errorbar(axes, [cost(r) for r in points], points, name, looks[name])
        axes.set_xlabel(label)
        axes.set_ylabel(together.figure_axis(here[0]))
        axes.set_title(together.bench_name(bench))
    drawing.legend(figure)
    return figure


def _unpruned(axes: Axes, runs: Sequence[StoredRun], bench: str) -> None:
    for r in runs:
        if r.bench == bench and r.method == UNPRUNED:
            drawing.reference(axes, r.figure, r.interval)
            return


def _errorbar(axes: Axes, x: Sequence[Any], runs: Sequence[StoredRun], name: str, look: Mapping[str, Any]) -> None:
    """Draw the figures of runs with their 95 % intervals, if they have one."""
    y = np.array([r.figure for r in runs], dtype=float)
    low, high = np.array([r.interval or (np.nan, np.nan) for r in runs]).T
    reach = np.maximum(0, [y - low, high - y])  # an interval may miss its figure by a rounding error
    drawing.errorbar(axes, x, y, None if np.isnan(reach).all() else reach, name, look)


# sweeps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """Runs of one method and budget that differ in one hyper-parameter.

    Attributes:
        name: hyper-parameter on the x axis.
        label: label in the legend.
        runs: the runs, sorted by the value of the hyper-parameter.
        default: whether each run has the default values.
    """

    name: str
    label: str
    runs: Sequence[StoredRun]
    default: Sequence[bool]

    def values(self) -> list[Any]:
        """Return the value of the hyper-parameter in each run."""
        return [r.hyper.get(self.name) for r in self.runs]


@drawing.style()
def draw_sweep(runs: Sequence[StoredRun]) -> Figure:
    """Plot benchmark figures against the hyper-parameters that vary among runs of one method and budget.

    If every run differs from a central run in one hyper-parameter, each hyper-parameter has a panel. If two
    hyper-parameters vary freely, the one with more values is on the x axis, and each value of the other is a line. An
    axis of numbers is logarithmic if they are positive and span a factor of 30; values that are not numbers are evenly
    spaced. Runs with the default values of the varying hyper-parameters are ringed.

    Args:
        runs: finished runs, see `together.comparable`.

    Raises:
        ValueError: if no hyper-parameter varies, if more than two vary freely, for too many runs, or if matplotlib is
            not installed.
    """
    found: dict[tuple[str, str], list[_Line]] = {}
    for group in together.by_settings(r for r in runs if r.method != UNPRUNED and r.figure is not None):
        for line in _lines(group):
            found.setdefault((group[0].bench, line.name), []).append(line)
    if not found:
        raise ValueError(
            "the figure needs runs of one method and budget that differ in a hyper-parameter; make them with "
            "llava-prune sweep scripts/ablation/slope.yaml, or a sweep file of yours"
        )
    looks = drawing.looks([line.label for lines in found.values() for line in lines])
    figure, grid = drawing.panels(len(found))
    for axes, ((bench, name), lines) in zip(grid, found.items(), strict=True):
        _unpruned(axes, runs, bench)
        _sweep_panel(axes, lines, looks)
        axes.set_xlabel(together.hyper_axis(name))
        axes.set_ylabel(together.figure_axis(lines[0].runs[0]))
        axes.set_title(together.bench_name(bench))
    drawing.legend(figure)
    return figure


def _lines(group: Sequence[StoredRun]) -> list[_Line]:
    """Return the lines of runs that differ only in hyper-parameters; see `draw_sweep`."""
    changed = together.varying(group)
    label = together.names([group[0]], tokens=True)[0]
    centre = _centre(group, changed)
    if centre is not None:
        near = {n: [r for r in group if r is centre or _changes(r, centre, changed) == [n]] for n in changed}
        return [_line(n, label, found, changed) for n, found in near.items()]
    if len(changed) > 2:
        raise ValueError(
            f"{', '.join(changed)} vary among the runs of {label}, and the figure shows two at a time; give --runs "
            "with fewer, or runs that differ in one of them from a central one"
        )
    across, other = sorted(changed, key=lambda n: -len({together.order(r.hyper.get(n)) for r in group}))
    rows: dict[Any, list[StoredRun]] = {}
    for r in sorted(group, key=lambda r: together.order(r.hyper.get(other))):
        rows.setdefault(together.order(r.hyper.get(other)), []).append(r)
    labels = [f"{label}, {together.setting(other, rs[0].hyper.get(other))}" for rs in rows.values()]
    return [_line(across, name, rs, changed) for name, rs in zip(labels, rows.values(), strict=True)]


def _line(name: str, label: str, runs: Sequence[StoredRun], changed: Sequence[str]) -> _Line:
    runs = sorted(runs, key=lambda r: together.order(r.hyper.get(name)))
    return _Line(name, label, runs, [_is_default(r, changed) for r in runs])


def _changes(run: StoredRun, centre: StoredRun, changed: Sequence[str]) -> list[str]:
    return [n for n in changed if together.order(run.hyper.get(n)) != together.order(centre.hyper.get(n))]


def _centre(group: Sequence[StoredRun], changed: Sequence[str]) -> StoredRun | None:
    """Return the run from which all others differ in one hyper-parameter, preferably the default; else None."""
    for run in sorted(group, key=lambda r: not _is_default(r, changed)):
        if all(len(_changes(r, run, changed)) == 1 for r in group if r is not run):
            return run
    return None


def _is_default(run: StoredRun, changed: Sequence[str]) -> bool:
    """Return whether a run has the default values of the hyper-parameters that vary."""
    return all(n in run.defaults and run.hyper.get(n) == run.defaults[n] for n in changed)


def _sweep_panel(axes: Axes, lines: Sequence[_Line], looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw lines over numbers, or points side by side over other values; ring the default values."""
    values = sorted({together.order(v): v for line in lines for v in line.values()}.items())
    numeric = all(together.is_number(v) for _, v in values)
    at = [float(v) if numeric else float(i) for i, (_, v) in enumerate(values)]
    place = dict(zip([key for key, _ in values], at, strict=True))
    for i, line in enumerate(lines):
        aside = 0.0 if numeric else 0.12 * (i - (len(lines) - 1) / 2)
        look = looks[line.label] if numeric else {**looks[line.label], "linestyle": "none"}
        x = [place[together.order(v)] + aside for v in line.values()]
        _errorbar(axes, x, line.runs, line.label, look)
        for point, run, default in zip(x, line.runs, line.default, strict=True):
            if default:
                axes.plot([point], [float(run.figure or 0)], **RING)
    log = numeric and at[0] > 0 and at[-1] / at[0] >= WIDE
    if log:
        axes.set_xscale("log")
        axes.minorticks_off()
    if not numeric:
        axes.set_xlim(-0.5, len(at) - 0.5)
        axes.grid(False, axis="x")
    scaled = np.log(at) if log else np.array(at)
    if not numeric or np.diff(scaled).min() >= CLOSE * np.ptp(scaled):
        axes.set_xticks(at, [together.text(v) for _, v in values])
