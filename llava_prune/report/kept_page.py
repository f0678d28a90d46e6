"""A self-contained web page of one question, which shows the kept patches of every layer with a slider."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from .overlay import MERGED, counted, draw_overlay

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..runtime.geometry import ImageView
    from ..runtime.record import Remaining

TEMPLATE = Path(__file__).with_name("page") / "kept.html"
LARGEST = 1024
"""Largest longer side of an image in a page, in pixels."""
PHOTO = 300_000
"""Number of pixels above which an image is stored as JPEG instead of PNG."""
NOTE = "<p>Tinted patches were merged: those of one token have the same colour (colours repeat).</p>"
NAMES = {"image": "The image as a whole", "crops": "The crops of the image"}
WIDE, HIGH, LEFT, BELOW = 640, 200, 40, 24
"""Units of the chart: width and height of the plot, and left and bottom margins for numbers."""


def kept_page(
    image: Image,
    views: Sequence[ImageView],
    layers: Sequence[Remaining],
    leaving: Sequence[int],
    curves: Mapping[str, Sequence[int]],
    label: str,
    title: str,
    facts: Mapping[str, str],
) -> str:
    """Return the HTML of a page.

    Args:
        image: the image as it was before preprocessing.
        views: places of the visual tokens.
        layers: the tokens that leave each layer.
        leaving: visual tokens leaving each layer.
        curves: visual tokens leaving each layer for other questions, by label.
        label: label of `leaving`.
        title: heading.
        facts: rows of the table below the heading.
    """
    points = _points(leaving, max(1, *leaving, *(n for c in curves.values() for n in c)))
    rounded = [[None if b is None else [round(x, 1) for x in b] for b in view.boxes] for view in views]
    boxes: list[list[Any]] = [[None] * view.first + found for view, found in zip(views, rounded, strict=True)]
    data = [
        {"kept": sorted(kept), "merged": _tinted(merged), "text": counted(i, n, len(merged)), "x": x, "y": y}
        for i, ((kept, merged), n, (x, y)) in enumerate(zip(layers, leaving, points, strict=True))
    ]
    dim = draw_overlay(image, views[0].boxes, ())
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        facts="".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in facts.items()),
        last=len(leaving) - 1,
        text=escape(str(data[-1]["text"])),
        width=image.width,
        height=image.height,
        clear=_embedded(image.convert("RGB")),
        dim=_embedded(dim),
        views="".join(_figure(i, view.name, image.size, boxes[i], layers[-1].kept) for i, view in enumerate(views)),
        tints="".join(f"[data-tint='{i}'] {{ fill: rgb{colour} }} " for i, colour in enumerate(MERGED)),
        note=NOTE if any(patches for layer in layers for patches in layer.merged) else "",
        curves=_chart(leaving, curves, label),
        data=json.dumps({"views": boxes, "layers": data}, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _tinted(merged: Sequence[Collection[int]]) -> list[list[int]]:
    """Return the patches of each colour."""
    return [sorted(i for some in merged[colour :: len(MERGED)] for i in some) for colour in range(len(MERGED))]


def _embedded(image: Image) -> str:
    """Return a data URL of an image, reduced to `LARGEST`."""
    image = image.copy()
    image.thumbnail((LARGEST, LARGEST))
    photo = image.width * image.height > PHOTO
    file = io.BytesIO()
    if photo:
        image.save(file, "JPEG", quality=88)
    else:
        image.save(file, "PNG")
    return f"data:image/{'jpeg' if photo else 'png'};base64,{base64.b64encode(file.getvalue()).decode()}"


def _figure(number: int, name: str, size: tuple[int, int], boxes: Sequence[Any], kept: Collection[int]) -> str:
    """Return a view as it is after the last layer; the page's script updates it when the slider moves."""
    path = "".join(f"M{b[0]} {b[1]}H{b[2]}V{b[3]}H{b[0]}Z" for i, b in enumerate(boxes) if i in kept and b is not None)
    label = f"{NAMES[name]}; dropped patches are dark, merged ones tinted"
    tints = "".join(f'<path class="tint" data-tint="{i}" id="tint{number}-{i}"/>' for i in range(len(MERGED)))
    return (
        f'<figure><svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{label}">'
        f'<defs><clipPath id="area{number}"><path id="clip{number}" d="{path}"/></clipPath></defs>'
        f'<use href="#dim"/>{tints}<use href="#clear" clip-path="url(#area{number})"/>'
        f'<path class="edge" id="edge{number}" d="{path}"/></svg>'
        f"<figcaption>{NAMES[name]}</figcaption></figure>"
    )


def _points(counts: Sequence[int], most: int) -> list[tuple[float, float]]:
    """Return counts as points of the chart."""
    step = WIDE / max(1, len(counts) - 1)
    return [(round(LEFT + i * step, 1), round(10 + HIGH * (1 - n / most), 1)) for i, n in enumerate(counts)]


def _chart(leaving: Sequence[int], curves: Mapping[str, Sequence[int]], label: str) -> str:
    """Return the chart of visual tokens leaving each layer; curves of other questions are faint."""
    most = max(1, *leaving, *(n for counts in curves.values() for n in counts))
    lines = [("", name, counts) for name, counts in curves.items()] + [("own", label, leaving)]
    drawn = "".join(
        f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in _points(counts, most))}">'
        f"<title>{escape(name)}</title></polyline>"
        for kind, name, counts in lines
    )
    others = f"; thin lines are other questions ({escape(', '.join(curves))})" if curves else ""
    bottom = HIGH + 10
    return (
        f'<figure style="margin: 1.5rem 0"><svg class="curves" viewBox="0 0 {WIDE + LEFT + 10} {bottom + BELOW}" '
        f'role="img" aria-label="Visual tokens leaving each layer: {", ".join(map(str, leaving))}">'
        f'<path d="M{LEFT} 10V{bottom}H{LEFT + WIDE}" fill="none"/>{drawn}<circle id="dot" r="5" cx="-9" cy="-9"/>'
        f'<text x="{LEFT - 6}" y="14" text-anchor="end">{most}</text><text x="{LEFT - 6}" y="{bottom}" '
        f'text-anchor="end">0</text><text x="{LEFT}" y="{bottom + 16}">0</text><text x="{LEFT + WIDE}" '
        f'y="{bottom + 16}" text-anchor="end">layer {len(leaving) - 1}</text></svg>'
        f"<figcaption>Visual tokens leaving each decoder layer. Thick line: {escape(label)}{others}.</figcaption>"
        "</figure>"
    )
