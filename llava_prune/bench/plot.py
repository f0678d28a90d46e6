"""Plot of prefill speed-ups over FLOPs ratios."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Write the figure of `draw` to a file.

    Args:
        result: return value of `speed`, or the content of bench.json.
        path: a .png, .svg or .pdf file.

    Raises:
        ValueError: when matplotlib is not installed.
    """
    draw(result).savefig(path, dpi=150)


def draw(result: Mapping[str, Any]) -> Any:
    """A figure with a panel for each batch size and prompt length, and a point for each budget.

    On the dashed line the speed-up equals the FLOPs ratio; bars are the quartiles of the paired ratios.

    Raises:
        ValueError: when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the plot needs matplotlib; pip install 'llava-prune[report]'") from error
    rows = [r for r in result["rows"] if "error" not in r]
    panels = list(dict.fromkeys((r["batch"], r["visual"], r["text"]) for r in rows))
    figure = Figure(figsize=(4.5 * max(1, len(panels)), 4.2), layout="constrained")
    grid = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=False):
        shown = [r for r in rows if (r["batch"], r["visual"], r["text"]) == panel]
        top = max([1.0, *(r["flops"]["ratio"] for r in shown)])
        axes.plot([1, top], [1, top], "--", color="0.6", linewidth=1, label="FLOPs ratio")
        for method in dict.fromkeys(r["method"] for r in shown):
            points = sorted((r for r in shown if r["method"] == method), key=lambda r: r["flops"]["ratio"])
            x = [r["flops"]["ratio"] for r in points]
            ratios = [r["stages"]["prefill"]["speedup"] for r in points]
            y = [v["median"] for v in ratios]
            below = [v["median"] - v["q1"] for v in ratios]
            above = [v["q3"] - v["median"] for v in ratios]
            axes.errorbar(x, y, yerr=[below, above], marker="o", markersize=4, capsize=3, label=method)
            for r, place in zip(points, zip(x, y, strict=True), strict=True):
                if r["tokens"] is not None:
                    axes.annotate(str(r["tokens"]), place, xytext=(4, -10), textcoords="offset points", fontsize=7)
        axes.set_xlabel("FLOPs, unpruned / pruned")
        axes.set_ylabel("prefill time, unpruned / pruned")
        axes.set_title(f"batch {panel[0]}, {panel[1]} + {panel[2]} tokens", fontsize=9)
        axes.legend(fontsize=7)
    machine = result["machine"]
    figure.suptitle(f"{machine['device']}, {machine['dtype']}", fontsize=9)
    return figure
