"""Appearance and output of plots: sizes, colours, panels, legends and files.

matplotlib is an extra of the package, so it is imported inside functions. Plots are made without pyplot, in a context
that restores matplotlib's settings.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours of Okabe and Ito that stand out from white, and from black, the colour of the unpruned model."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h", "d", "x", "+", "1")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
UNPRUNED_LABEL = "unpruned"
"""Label of the unpruned model in legends."""
UNPRUNED_COLOUR = "#000000"
BAND_COLOUR = "#D9D9D9"
WIDTHS = {1: 3.5, 2: 5.5, 3: 6.9}
"""Number of panels in a row -> width of the figure in inches: a column, NeurIPS's text width, a two-column page."""
MOST_PANELS = 12
MOST_IN_COLUMN = 8
"""Largest number of legend entries in a figure as wide as a column; with more entries the figure is wider."""
SUFFIXES = (".pdf", ".png")
"""Formats that are written if the file name has no suffix."""
METADATA: dict[str, dict[str, Any]] = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
"""Metadata to leave out of a file, so that equal figures give equal files."""
DPI = 200
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "legend.columnspacing": 1.4,
    "figure.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "svg.hashsalt": "llava-prune",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Apply matplotlib's defaults with STYLE, independent of a user's matplotlibrc; a context manager or a decorator.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise ValueError("the figure needs matplotlib; pip install 'llava-prune[report]'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def look(index: int) -> dict[str, Any]:
    """Return colour, marker and line style of line number `index` in a figure; the first 16 lines differ in marker."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the look of every line of a figure by its label.

    Raises:
        ValueError: for more lines than there are markers.
    """
    names = list(dict.fromkeys(labels))
    if len(names) > len(MARKERS):
        raise ValueError(
            f"{len(names)} lines are too many for a figure (at most {len(MARKERS)}); choose with --method, --tokens or "
            "--no-sweeps"
        )
    return {name: look(i) for i, name in enumerate(names)}


def panels(count: int, height: float = 2.2, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """Create a figure with `count` panels.

    Args:
        count: number of panels.
        height: height of a row in inches.
        columns: largest number of panels in a row, at most 3.

    Raises:
        ValueError: for more panels than fit on a page.
    """
    from matplotlib.figure import Figure

    if count > MOST_PANELS:
        raise ValueError(
            f"{count} panels are too many for a figure (at most {MOST_PANELS}); choose with --task, --method, --tokens"
        )
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = Figure(figsize=(WIDTHS[across], height * down), layout="constrained")
    return figure, [figure.add_subplot(down, across, i + 1) for i in range(count)]


def legend(figure: Figure) -> None:
    """Add one legend for all panels below them, in as many columns as fit; the figure grows by its height."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown = found.setdefault(label, [])
            shown += [] if type(handle) in map(type, shown) else [handle]
    if not found:
        return
    width, height = figure.get_size_inches()
    if len(found) > MOST_IN_COLUMN:
        width = max(width, WIDTHS[2])
    columns = _columns(list(found), width - 0.1)
    rows = math.ceil(len(found) / columns)
    figure.set_size_inches(width, height + 0.165 * rows + 0.1)
    handles: Any = [tuple(shown) for shown in found.values()]  # band and line of the unpruned model are one entry
    figure.legend(handles, list(found), loc="outside lower center", ncols=math.ceil(len(found) / rows))


def _columns(labels: Sequence[str], width: float) -> int:
    """Return the largest number of legend columns that fit into a width in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    letter = STYLE["legend.fontsize"] / 72
    handle = letter * (STYLE["legend.handlelength"] + 0.8 + STYLE["legend.columnspacing"])  # 0.8: handle to text
    font = FontProperties(size=STYLE["legend.fontsize"])
    widths = [handle + TextPath((0, 0), label, prop=font).get_extents().width / 72 for label in labels]
    for columns in range(len(labels), 1, -1):
        rows = math.ceil(len(labels) / columns)
        if sum(max(widths[i : i + rows]) for i in range(0, len(widths), rows)) <= width:
            return columns
    return 1


def reference(axes: Axes, value: float | None, interval: tuple[float, float] | None) -> None:
    """Draw the unpruned model: a horizontal line, and its 95 % interval, if given, as a band."""
    if value is None:
        return
    if interval is not None:
        axes.axhspan(*interval, color=BAND_COLOUR, linewidth=0, zorder=0, label=UNPRUNED_LABEL)
    axes.axhline(value, color=UNPRUNED_COLOUR, linewidth=1, label=UNPRUNED_LABEL)


def errorbar(axes: Axes, x: Any, y: Any, reach: Any, label: str, look: Mapping[str, Any]) -> None:
    """Draw points with error bars that do not hide the points of other lines.

    Args:
        axes: the panel.
        x, y: coordinates of the points.
        reach: (2, points), lengths of the bars below and above, NaN for points without a bar; None without bars.
        label: label in the legend.
        look: colour, marker and line style.
    """
    _, caps, bars = axes.errorbar(x, y, yerr=reach, capsize=2, elinewidth=0.8, label=label, **look)
    for part in (*caps, *bars):
        part.set_alpha(0.6)


def save(figure: Figure, out: Path) -> list[Path]:
    """Write a figure; equal figures give equal files.

    Args:
        figure: the figure.
        out: a .pdf, .png or .svg file, or a file name without such a suffix, which gives a PDF and a PNG.

    Returns:
        The paths written.
    """
    one = out.suffix in (".pdf", ".png", ".svg")
    paths = [out] if one else [out.with_name(out.name + suffix) for suffix in SUFFIXES]
    out.parent.mkdir(parents=True, exist_ok=True)
    with style():
        for path in paths:
            figure.savefig(path, dpi=DPI, metadata=METADATA.get(path.suffix))
    return paths
