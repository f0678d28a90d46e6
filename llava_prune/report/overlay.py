"""Overlays that dim the pruned patches of an image, and contact sheets of overlays."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from ..runtime.geometry import Box, ImageView
    from ..runtime.record import Remaining

LIGHT = 0.45
"""Brightness of dropped patches, relative to the image."""
UNSEEN = 0.15
"""Brightness of pixels that the vision tower does not see, relative to the image."""
COLOUR = 0.3
"""Saturation of all pixels but those of kept patches, relative to the image."""
GAP = 8
"""Pixels between two images side by side."""
LEAST, MOST = 448, 1200
"""Smallest and largest longer side of an image in a contact sheet, in pixels; other sizes are resized."""
TALLEST, CURVES = 2.6, 1.9
"""Inches of the tallest overlay in a contact sheet, and of its curves."""
EDGE = (255, 214, 0)
"""Colour of the outline of kept patches."""
MERGED = ((0, 158, 224), (230, 97, 1), (0, 158, 115), (204, 90, 160), (120, 100, 220), (170, 120, 60))
"""Colours of merged patches. Patches merged into one token have the same colour; colours repeat."""
TINT = 0.4
"""Opacity of the colours of merged patches."""


def pixel_box(box: Box) -> tuple[int, int, int, int]:
    """Return the pixels of a box: (left, top, right, bottom), the last two exclusive. Touching boxes share no pixel."""
    left, top, right, bottom = (round(x) for x in box)
    return left, top, right, bottom


def draw_overlay(
    image: Image,
    boxes: Sequence[Box | None],
    kept: Collection[int],
    first: int = 0,
    merged: Sequence[Collection[int]] = (),
    outline: bool = False,
) -> Image:
    """Draw an image with dropped patches grey and dark, kept patches unchanged, and merged patches tinted.

    Args:
        image: the image as it was before preprocessing.
        boxes: place of each visual token; None for tokens without one.
        kept: indices of the kept visual tokens; indices outside of `boxes` are ignored.
        first: index of the first token of `boxes`.
        merged: for each merged token, the indices of the patches that were merged into it.
        outline: whether to outline regions of kept patches, on pixels of their dropped neighbours.

    Returns:
        An RGB image of the same size.
    """
    import numpy as np
    from PIL import Image as images

    image = image.convert("RGB")
    clear, seen = (np.zeros((image.height, image.width), dtype=bool) for _ in range(2))
    colour = np.zeros((image.height, image.width), dtype=np.uint8)  # 0 for none
    tokens = {index: 1 + token % len(MERGED) for token, some in enumerate(merged) for index in some}
    for index, box in enumerate(boxes, first):
        if box is None:
            continue
        left, top, right, bottom = pixel_box(box)
        seen[top:bottom, left:right] = True
        clear[top:bottom, left:right] |= index in kept
        colour[top:bottom, left:right] = tokens.get(index, 0)
    faded = images.blend(image.convert("L").convert("RGB"), image, COLOUR)
    out = faded.point(lambda value: value * UNSEEN)
    out.paste(faded.point(lambda value: value * LIGHT), mask=images.fromarray(seen))
    half = faded.point(lambda value: value * (1 + LIGHT) / 2)
    for number, tint in enumerate(MERGED, 1):
        area = images.fromarray(colour == number)
        out.paste(images.blend(half, images.new("RGB", image.size, tint), TINT), mask=area)
    out.paste(image, mask=images.fromarray(clear))
    if outline:
        grown = clear.copy()
        for axis in (0, 1):
            for step in (-2, -1, 1, 2):
                rolled = np.roll(clear, step, axis)
                edge = np.arange(clear.shape[axis])
                wrapped = edge < step if step > 0 else edge >= clear.shape[axis] + step
                grown |= rolled & ~(wrapped[:, None] if axis == 0 else wrapped[None])
        out.paste(EDGE, mask=images.fromarray(grown & ~clear))
    return out


def side_by_side(images: Sequence[Image]) -> Image:
    """Join images of equal height side by side, with a white gap."""
    from PIL import Image as made

    if len(images) == 1:
        return images[0]
    out = made.new("RGB", (sum(i.width for i in images) + GAP * (len(images) - 1), images[0].height), "white")
    x = 0
    for image in images:
        out.paste(image, (x, 0))
        x += image.width + GAP
    return out


def resized(image: Image, views: Sequence[ImageView]) -> tuple[Image, list[tuple[int, list[Box | None]]]]:
    """Resize an image for a contact sheet.

    Returns:
        The image, and for each view its first token and the boxes in the new image.
    """
    longest = max(image.size)
    factor: float = max(1, -(-LEAST // longest))  # a whole number, so that patch borders stay between pixels
    if longest > MOST:
        factor = MOST / longest
    if factor != 1:
        image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
    scaled: list[tuple[int, list[Box | None]]] = []
    for view in views:
        moved = (None if b is None else [x * factor for x in b] for b in view.boxes)
        scaled.append((view.first, [None if b is None else (b[0], b[1], b[2], b[3]) for b in moved]))
    return image, scaled


def counted(layer: int, leaving: int, merged: int) -> str:
    """Return the title of a layer: "after layer 4: 64 tokens (3 merged)"."""
    tail = f" ({merged} merged)" if merged else ""
    return f"after layer {layer}: {leaving} token{'s' * (leaving != 1)}{tail}"


@drawing.style()
def contact_sheet(
    image: Image,
    views: Sequence[ImageView],
    shown: Mapping[int, Remaining],
    leaving: Sequence[int],
    curves: Mapping[str, Sequence[int]],
    label: str,
    title: str = "",
) -> Figure:
    """Draw overlays of some layers and, below them, the visual tokens leaving each layer.

    Args:
        image: the image as it was before preprocessing.
        views: places of the visual tokens.
        shown: layer -> the tokens that leave it.
        leaving: visual tokens leaving each layer.
        curves: visual tokens leaving each layer for other questions, by label.
        label: label of `leaving` in the legend.
        title: text above the overlays; it is not wrapped.

    Returns:
        A Figure, which notebooks display.

    Raises:
        ValueError: for no layers, more layers than fit on a page, or if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    if not 1 <= len(shown) < drawing.MOST_PANELS:
        raise ValueError(f"{len(shown)} layers in a contact sheet: give 1 to {drawing.MOST_PANELS - 1} of them")
    across = min(len(shown), 3 if len(views) == 1 else 2)
    down = -(-len(shown) // across)
    large, scaled = resized(image, views)
    wide = large.width * len(views) + GAP * (len(views) - 1)
    tall = min(drawing.WIDTHS[3] / across * large.height / wide, TALLEST) + 0.2  # inches, 0.2 for the title
    figure = Figure(figsize=(drawing.WIDTHS[3], tall * down + CURVES + 0.3), layout="constrained")
    grid = figure.add_gridspec(down + 1, across, height_ratios=[tall] * down + [CURVES])
    for i, (layer, (kept, merged)) in enumerate(shown.items()):
        axes = figure.add_subplot(grid[i // across, i % across])
        parts = [draw_overlay(large, boxes, kept, first, merged, outline=True) for first, boxes in scaled]
        axes.imshow(side_by_side(parts), interpolation="none")
        axes.set_axis_off()
        number = range(len(leaving))[layer]
        axes.set_title(counted(number, leaving[number], len(merged)))
    _draw_curves(figure.add_subplot(grid[down, :]), leaving, curves, label, [range(len(leaving))[x] for x in shown])
    drawing.legend(figure)
    if title:
        figure.suptitle(title.replace("$", r"\$"))
    setattr(figure, "_repr_png_", lambda: png(figure))  # noqa: B010 - notebooks call it
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    file = io.BytesIO()
    with drawing.style():
        figure.savefig(file, dpi=drawing.DPI, format="png")
    return file.getvalue()


def _draw_curves(
    axes: Axes, leaving: Sequence[int], curves: Mapping[str, Sequence[int]], label: str, marked: list[int]
) -> None:
    """Draw the tokens leaving each layer: grey for other questions, with this question's curve on top."""
    from matplotlib.ticker import MaxNLocator

    for i, (name, counts) in enumerate(curves.items()):
        grey: Any = str(0.8 - 0.45 * i / max(1, len(curves) - 1))
        axes.plot(range(len(counts)), counts, color=grey, linewidth=0.9, linestyle=drawing.LINES[i % 5], label=name)
    look: Any = {"color": drawing.PALETTE[0], "marker": "o", "markevery": marked, "zorder": 3}
    axes.plot(range(len(leaving)), leaving, label=label, **look)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("visual tokens leaving a layer")
