"""Runs in a common figure: check that they are comparable, order them, and name them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .store import UNPRUNED, StoredRun

BENCHES = {
    "vqav2": "VQAv2",
    "gqa": "GQA",
    "sqa": "ScienceQA",
    "textvqa": "TextVQA",
    "pope": "POPE",
    "mme": "MME",
    "mmbench": "MMBench",
    "mmbench_cn": "MMBench-CN",
    "ocrbench": "OCRBench",
}
"""Benchmark -> its name in figures, in the order of figures."""
UNITS = {"perception": "points", "right of all rows": "count"}
"""Name of a figure that is not a percentage -> its unit."""
SYMBOLS = {
    "lam": (r"$\lambda$", "1 / bit"),
    "k0": ("$k_0$", "1 / layer"),
    "gamma": (r"$\gamma$", "1 / (layer bit)"),
    "x0": ("$x_0$", "layer"),
}
"""Hyper-parameter -> its symbol in AutoPrune's formulas, and its unit."""
FIRST, LAST = ("autoprune", "autoprune-flash"), ("random", "uniform")
"""Methods at the start and end of a legend; the others are in between, sorted by name."""


def comparable(runs: Iterable[StoredRun]) -> list[StoredRun]:
    """Return the runs sorted by benchmark, method, budget and hyper-parameters, without duplicates.

    Runs are duplicates if benchmark, method, budget, hyper-parameters and figure are equal. For example, the unpruned
    model occurs with every run of a sweep.

    Raises:
        ValueError: for several models, runs on different numbers of questions of one benchmark or scored with different
            labels, or two runs with the same settings and different figures.
    """
    found: dict[Any, StoredRun] = {}
    rows: dict[str, StoredRun] = {}
    runs = list(runs)
    models = sorted({r.model for r in runs})
    if len(models) > 1:
        raise ValueError(f"the runs are of several models ({', '.join(models)}); choose one with --model")
    for r in runs:
        other = rows.setdefault(r.bench, r)
        if other.result.get("rows") != r.result.get("rows"):
            raise ValueError(
                f"{other.folder} has {other.result.get('rows')} questions of {r.bench}, {r.folder} has "
                f"{r.result.get('rows')}; choose folders with the same questions"
            )
        if not r.same_labels(other):
            raise ValueError(
                f"{other.folder} and {r.folder} were scored with different label files of {r.bench}; run the "
                "evaluations again, which scores the answers anew, or choose folders with the same files"
            )
        hyper = tuple(sorted((n, order(v)) for n, v in r.hyper.items()))
        twin = found.setdefault((r.bench, r.method, r.tokens, hyper), r)
        if (twin.figure, twin.interval) != (r.figure, r.interval):
            raise ValueError(
                f"{twin.folder} and {r.folder} are {r.bench} {r.label} with the same hyper-parameters and different "
                "figures; choose folders that hold one of them"
            )
    return sorted(found.values(), key=_place)


def _place(run: StoredRun) -> tuple[Any, ...]:
    benches = list(BENCHES)
    bench = benches.index(run.bench) if run.bench in BENCHES else len(benches)
    method = FIRST.index(run.method) - 2 if run.method in FIRST else 1 if run.method in LAST else 0
    hyper = [order(v) for v in run.hyper.values()]
    return bench, run.bench, run.method != UNPRUNED, method, run.method, -(run.tokens or 0), run.varied, hyper


def order(value: Any) -> tuple[Any, ...]:
    """Return a sorting key for hyper-parameters of mixed types: None, then numbers, then other values by their text."""
    if value is None:
        return (0, 0.0, "")
    if is_number(value):
        return (1, float(value), "")
    return (2, 0.0, str(value))


def is_number(value: Any) -> bool:
    """Return whether a hyper-parameter is a number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def by_bench(runs: Iterable[StoredRun]) -> dict[str, list[StoredRun]]:
    """Group runs by benchmark."""
    out: dict[str, list[StoredRun]] = {}
    for r in runs:
        out.setdefault(r.bench, []).append(r)
    return out


def by_settings(runs: Iterable[StoredRun]) -> list[list[StoredRun]]:
    """Group runs that differ only in hyper-parameters, i.e. runs of one method and budget on one benchmark."""
    out: dict[tuple[str, str, int | None], list[StoredRun]] = {}
    for r in runs:
        out.setdefault((r.bench, r.method, r.tokens), []).append(r)
    return list(out.values())


def varying(runs: Sequence[StoredRun]) -> list[str]:
    """Return the hyper-parameters with more than one value among runs of one method and budget."""
    names = dict.fromkeys(n for r in runs for n in r.hyper)
    return [n for n in names if len({order(r.hyper.get(n)) for r in runs}) > 1]


def names(runs: Iterable[StoredRun], tokens: bool) -> list[str]:
    """Return the name of each run, e.g. "autoprune 64", with the hyper-parameters that distinguish it from other runs.

    Args:
        runs: the runs.
        tokens: whether the budget is part of the name.
    """
    runs = list(runs)
    shown: dict[str, list[str]] = {}
    for group in by_settings(runs):
        for name in varying(group):
            known = shown.setdefault(group[0].method, [])
            known += [] if name in known else [name]
    out = []
    for r in runs:
        budget = f" {r.tokens}" if tokens and r.tokens is not None else ""
        hyper = [setting(n, r.hyper[n]) for n in shown.get(r.method, []) if n in r.hyper]
        out.append(", ".join([r.method + budget, *hyper]))
    return out


def titles(runs: Sequence[StoredRun]) -> list[str]:
    """Return the title of a panel for each run: its benchmark and its name."""
    return [f"{bench_name(r.bench)}, {name}" for r, name in zip(runs, names(runs, tokens=True), strict=True)]


def bench_name(bench: str) -> str:
    """Return the name of a benchmark in figures."""
    return BENCHES.get(bench, bench)


def figure_axis(run: StoredRun) -> str:
    """Return the axis label of a benchmark's figure, with its unit."""
    name = str(run.result.get("figure_name", "figure")).partition(" (")[0]
    unit = "%" if "accuracy" in name.lower() or "F1" in name else UNITS.get(name)
    return name if unit is None else f"{name} ({unit})"


def hyper_axis(name: str) -> str:
    """Return the axis label of a hyper-parameter, with its unit."""
    symbol, unit = SYMBOLS.get(name, (name, ""))
    return f"{symbol} ({unit})" if unit else symbol


def setting(name: str, value: Any) -> str:
    """Return a hyper-parameter and its value as text."""
    return f"{SYMBOLS.get(name, (name,))[0]} = {text(value)}"


def text(value: Any) -> str:
    """Return the value of a hyper-parameter as text."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
