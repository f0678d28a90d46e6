"""Plot prefill speed-ups against FLOPs ratios, from the results of `llava-prune bench`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BENCH = "bench.json"
LABEL = (0.16, 0.08)
"""Size of a budget label as a share of the panel's width and height."""


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the figure of one result and write it to a file.

    Args:
        result: return value of `bench.speed.speed`, or the content of bench.json.
        path: a .png, .svg or .pdf file.

    Raises:
        ValueError: if matplotlib is not installed, or nothing was measured.
    """
    drawing.save(draw_speed([result]), path)


@drawing.style()
def draw_speed(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the ratio of prefill times against the ratio of FLOPs, both unpruned over pruned.

    Each result, batch size and prompt length has a panel, and each budget a point. On the dashed line the speed-up
    equals the FLOPs ratio. Error bars are the quartiles of the paired ratios.

    Args:
        results: contents of bench.json.

    Raises:
        ValueError: if nothing was measured, for too many panels, or if matplotlib is not installed.
    """
    found: dict[tuple[int, int, int, int], list[Mapping[str, Any]]] = {}
    for i, result in enumerate(results):
        for r in result["rows"]:
            if "error" not in r:
                found.setdefault((i, r["batch"], r["visual"], r["text"]), []).append(r)
    if not found:
        raise ValueError("the figure needs a measurement; make one with llava-prune bench --tokens 192,128,64")
    looks = drawing.looks([r["method"] for rows in found.values() for r in rows])
    machines = [f"{measured(r)}, {r['machine']['device']}, {r['machine']['dtype']}" for r in results]
    figure, grid = drawing.panels(len(found), height=2.6)
    for axes, ((i, batch, visual, text), rows) in zip(grid, found.items(), strict=True):
        _panel(axes, rows, looks)
        title = f"batch {batch}, {visual} + {text} tokens"
        axes.set_title(title if len(results) == 1 else f"{machines[i]}\n{title}")
    if len(results) == 1:
        figure.suptitle(machines[0])
    drawing.legend(figure)
    return figure


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the methods at one batch size and prompt length."""
    top = max([1.0, *(r["flops"]["ratio"] for r in rows)])
    axes.plot([1, top], [1, top], "--", color="0.6", linewidth=1, label="time ratio = FLOPs ratio")
    budgets: dict[Any, list[tuple[float, float]]] = {}
    for method in dict.fromkeys(r["method"] for r in rows):
        points = sorted((r for r in rows if r["method"] == method), key=lambda r: r["flops"]["ratio"])
        x = [r["flops"]["ratio"] for r in points]
        ratios = [r["stages"]["prefill"]["speedup"] for r in points]
        y = [v["median"] for v in ratios]
        reach = [[v["median"] - v["q1"] for v in ratios], [v["q3"] - v["median"] for v in ratios]]
        drawing.errorbar(axes, x, y, reach, method, looks[method])
        for r, *place in zip(points, x, y, strict=True):
            budgets.setdefault((r["tokens"], round(place[0], 2)), []).append((place[1], place[0]))
    axes.margins(x=0.08, y=0.15)
    _name_budgets(axes, {min(places)[::-1]: tokens for (tokens, _), places in budgets.items() if tokens is not None})
    axes.set_xlabel("FLOPs, unpruned / pruned")
    axes.set_ylabel("prefill time, unpruned / pruned")


def _name_budgets(axes: Axes, budgets: Mapping[tuple[float, float], int]) -> None:
    """Write budgets below their points, or above them if labels would overlap, or not at all if both places are taken.

    Args:
        axes: the panel.
        budgets: point -> budget; methods with the same FLOPs and budget share a label at the lowest point.
    """
    scale = np.array([np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())])
    taken: dict[tuple[int, int], list[Any]] = {(4, -10): [], (0, 6): []}
    for point, tokens in sorted(budgets.items()):
        at = np.array(point) / scale
        for offset, others in taken.items():
            if all((np.abs(at - other) > LABEL).any() for other in others):
                others.append(at)
                side = "left" if offset[0] else "center"
                axes.annotate(str(tokens), point, xytext=offset, textcoords="offset points", ha=side)
                break


def measured(result: Mapping[str, Any]) -> str:
    """Return the name of the measured model: the last component of the checkpoint, or the shape of the random model."""
    settings = result["settings"]
    return Path(settings["model"]).name if settings.get("model") else str(settings.get("shape"))


def read_bench(places: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Read bench.json files, given as files or as folders that contain them at any depth.

    Raises:
        ValueError: for a place that does not exist, or a broken file.
    """
    found: dict[Path, dict[str, Any]] = {}
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"{place}: no such file or folder; give a {BENCH}, or a folder that holds some")
        for path in [place] if place.is_file() else place.rglob(BENCH):
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(f"{path} is broken; run llava-prune bench again") from error
            if not _is_result(result):
                raise ValueError(f"{path} is not a result of llava-prune bench")
            found[path.resolve()] = result
    return [found[path] for path in sorted(found)]


def _is_result(result: Any) -> bool:
    """Return whether the content of a file has everything that a figure shows."""
    try:
        rows = [r for r in result["rows"] if "error" not in r]
        for r in rows:
            prefill = r["stages"]["prefill"]["speedup"]
            numbers = [r["flops"]["ratio"], *(prefill[k] for k in ("median", "q1", "q3"))]
            float(sum(numbers)), r["method"], r["tokens"], r["batch"], r["visual"], r["text"]
        return bool(result["machine"]["device"] and result["machine"]["dtype"] and result["settings"] is not None)
    except (KeyError, TypeError, IndexError):
        return False


def select_bench(
    results: Iterable[dict[str, Any]],
    method: Sequence[str] = (),
    model: Sequence[str] = (),
    tokens: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Return the results with the rows that match every condition; an empty condition matches all.

    Args:
        results: contents of bench.json.
        method: names of methods, presets included.
        model: checkpoints or their last components, or shapes of random models.
        tokens: budgets.
    """
    out = []
    for result in results:
        if model and not {result["settings"].get("model"), measured(result)} & set(model):
            continue
        rows = [r for r in result["rows"] if not method or r["method"] in method]
        rows = [r for r in rows if not tokens or r["tokens"] in tokens]
        out += [{**result, "rows": rows}] if rows else []
    return out
