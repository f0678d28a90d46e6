"""Seeded generator of small synthetic scenes with exact ground truth.

A scene is a textured background with three to six *things* on it.  Every thing has a shape, a colour and a size;
``sign`` things carry a printed word and ``card`` things a printed digit.  The canonical canvas has its longer side at
168 pixels (24 patches of 7 pixels); :func:`render` draws it at any scale, and :func:`preprocess` does what LLaVA does
before the vision tower (mean-colour padding to a square, bicubic resize).
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 168
GRID = 24
PATCH = SIDE // GRID
PAD_COLOUR = (122, 116, 104)
ASPECTS = {"square": (168, 168), "wide": (168, 126), "tall": (126, 168)}

COLOURS = {
    "red": (215, 35, 40),
    "green": (35, 160, 60),
    "blue": (45, 75, 215),
    "yellow": (240, 215, 45),
    "purple": (145, 50, 185),
    "orange": (242, 135, 25),
    "white": (246, 246, 246),
    "black": (18, 18, 18),
}
PLAIN_SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "diamond", "heart", "moon")
SHAPES = (*PLAIN_SHAPES, "card", "sign")
SIZES = ("small", "large")
WORDS = (
    "stop", "open", "exit", "sale", "cafe", "park", "taxi", "bank", "milk", "book",
    "fish", "cake", "west", "zoo", "bus", "pub", "gym", "hot", "ice", "jazz",
)  # fmt: skip
DIGITS = tuple("0123456789")
MARKS = ("", *DIGITS, *WORDS)
COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Thing:
    """One object: shape, colour, size and mark, and centre and half extents in canonical pixels, before padding."""

    shape: str
    colour: str
    size: str
    mark: str
    cx: float
    cy: float
    rx: float
    ry: float

    @property
    def name(self) -> str:
        """Colour and shape, e.g. ``red circle``."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A canvas and its things; ``seed`` makes the background texture reproducible."""

    width: int
    height: int
    things: tuple[Thing, ...]
    seed: int

    def offset(self) -> tuple[int, int]:
        """Return the position of the image's corner in the padded square (canonical pixels)."""
        side = max(self.width, self.height)
        return (side - self.width) // 2, (side - self.height) // 2


def _extent(rng: np.random.Generator, shape: str) -> tuple[str, float, float]:
    """Return size name and half extents of a new thing."""
    size = SIZES[int(rng.integers(2))]
    if shape == "sign":
        return "large", 22.0, 9.5
    if shape == "card":
        return "large", 10.0, 13.0
    radius = float(rng.uniform(9.0, 10.5) if size == "small" else rng.uniform(15.0, 18.0))
    return size, radius, radius


def _kinds(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return shapes and colours of a scene's things: distinct pairs, some with repeated shapes or colours."""
    total = int(rng.integers(3, 7))
    kinds: list[tuple[str, str]] = []
    if rng.random() < 0.45:
        kinds.append(("sign", COLOUR_NAMES[rng.integers(8)]))
    if rng.random() < 0.45:
        kinds.append(("card", COLOUR_NAMES[rng.integers(8)]))
    while len(kinds) < total:
        shape, colour = PLAIN_SHAPES[rng.integers(9)], COLOUR_NAMES[rng.integers(8)]
        draw = rng.random()
        if kinds and draw < 0.25 and kinds[-1][0] in PLAIN_SHAPES:
            shape = kinds[-1][0]
        elif kinds and draw < 0.45:
            colour = kinds[-1][1]
        if (shape, colour) not in kinds:
            kinds.append((shape, colour))
    return kinds


def make_scene(seed: int, aspect: str | None = None) -> Scene:
    """Return the scene of a seed (deterministic). ``aspect`` forces a canvas; otherwise half of them are square."""
    rng = np.random.default_rng([20_11, seed])
    drawn = ("square", "square", "wide", "tall")[rng.integers(4)]
    width, height = ASPECTS[aspect or drawn]
    things: list[Thing] = []
    for shape, colour in _kinds(rng):
        size, rx, ry = _extent(rng, shape)
        mark = ""
        if shape in ("sign", "card"):
            mark = str(rng.choice(WORDS if shape == "sign" else DIGITS))
        for _ in range(60):
            cx, cy = rng.uniform(rx + 2, width - rx - 2), rng.uniform(ry + 2, height - ry - 2)
            if all(abs(cx - t.cx) > rx + t.rx + 4 or abs(cy - t.cy) > ry + t.ry + 4 for t in things):
                things.append(Thing(shape, colour, size, mark, float(cx), float(cy), rx, ry))
                break
    return Scene(width, height, tuple(things), seed)


def _unit_polygon(shape: str) -> list[tuple[float, float]]:
    """Return the outline of a shape in [-1, 1] squared."""
    turn = [2 * math.pi * i / 40 for i in range(40)]
    if shape == "circle":
        return [(math.cos(a), math.sin(a)) for a in turn]
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "triangle":
        return [(0, -1), (1, 0.9), (-1, 0.9)]
    if shape == "diamond":
        return [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)]
    if shape == "cross":
        a = 0.34
        return [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    if shape == "star":
        radii = [1.05 if i % 2 == 0 else 0.42 for i in range(10)]
        return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]
    if shape == "heart":
        xs = [16 * math.sin(a) ** 3 / 16 for a in turn]
        ys = [(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16 for a in turn]
        return [(x, -y) for x, y in zip(xs, ys, strict=True)]
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(0.9, 2 * math.pi - 0.9, 30)]
    inner = [(0.42 + 0.8 * math.cos(a), 0.8 * math.sin(a)) for a in np.linspace(2 * math.pi - 1.4, 1.4, 30)]
    return [(x + 0.1, y) for x, y in outer + inner]


def _draw_mark(draw: ImageDraw.ImageDraw, thing: Thing, zoom: float) -> None:
    """Print the word or digit of a sign or card in black or white, whichever has more contrast."""
    level = np.dot(COLOURS[thing.colour], (0.3, 0.59, 0.11))
    size = (15.0 if thing.shape == "sign" else 20.0) * zoom
    font = ImageFont.load_default(size)
    text = thing.mark.upper()
    ink = (15, 15, 15) if level > 110 else (250, 250, 250)
    draw.text((thing.cx * zoom, thing.cy * zoom), text, fill=ink, font=font, anchor="mm", stroke_width=zoom * 0.25)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, zoom: float, rng: np.random.Generator) -> None:
    """Draw one thing with slightly random colour and rotation."""
    fill = tuple(int(v) for v in np.clip(np.array(COLOURS[thing.colour]) + rng.normal(0, 6, 3), 0, 255))
    x, y, rx, ry = thing.cx * zoom, thing.cy * zoom, thing.rx * zoom, thing.ry * zoom
    if thing.mark:
        draw.rounded_rectangle([x - rx, y - ry, x + rx, y + ry], radius=2 * zoom, fill=fill)
        _draw_mark(draw, thing, zoom)
    elif thing.shape == "ring":
        draw.ellipse([x - rx, y - ry, x + rx, y + ry], outline=fill, width=int(0.42 * rx))
    else:
        angle = rng.uniform(-0.15, 0.15)
        c, s = math.cos(angle), math.sin(angle)
        points = [(x + rx * (c * px - s * py), y + ry * (s * px + c * py)) for px, py in _unit_polygon(thing.shape)]
        draw.polygon(points, fill=fill)


def _background(size: tuple[int, int], zoom: float, rng: np.random.Generator) -> Image.Image:
    """Return a muted background with a smooth gradient and low-contrast clutter (thin lines and small specks)."""
    base = rng.uniform(95, 165) + rng.normal(0, 9, 3)
    coarse = np.clip(base + rng.normal(0, 9, (4, 4, 1)) + rng.normal(0, 4, (4, 4, 3)), 0, 255)
    image = Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 10))):
        ink = tuple(int(v) for v in np.clip(base + rng.normal(0, 18, 3), 40, 215))
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        if rng.random() < 0.6:
            dx, dy = rng.normal(0, 40 * zoom, 2)
            draw.line([x, y, x + dx, y + dy], fill=ink, width=max(1, int(1.2 * zoom)))
        else:
            r = rng.uniform(1, 2.5) * zoom
            draw.ellipse([x - r, y - r, x + r, y + r], fill=ink)
    return image


def render(scene: Scene, scale: float = 1.0) -> Image.Image:
    """Draw a scene at ``scale`` times its canonical size (drawn at twice that size, reduced, then noised)."""
    rng = np.random.default_rng([20_12, scene.seed])
    zoom = 2 * scale
    size = (int(scene.width * scale) * 2, int(scene.height * scale) * 2)
    image = _background(size, zoom, rng)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(draw, thing, zoom, rng)
    pixels = np.asarray(image.reduce(2), dtype=np.float32)
    pixels = pixels + rng.normal(0, rng.uniform(1.5, 6.0), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return the image after a JPEG round trip, so that training images have its artefacts."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def preprocess(image: Image.Image, side: int = SIDE) -> np.ndarray:
    """Apply LLaVA's ``pad`` preprocessing up to the resize: (side, side, 3) uint8, not yet normalised."""
    longest = max(image.size)
    if image.size[0] != image.size[1]:
        square = Image.new("RGB", (longest, longest), PAD_COLOUR)
        square.paste(image, ((longest - image.size[0]) // 2, (longest - image.size[1]) // 2))
        image = square
    if longest != side:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image)


def instance_map(scene: Scene) -> np.ndarray:
    """Return (24, 24) uint8: 1 + index of the thing that covers at least about a third of the patch, else 0."""
    ox, oy = scene.offset()
    edges = np.arange(GRID) * PATCH
    result = np.zeros((GRID, GRID), np.uint8)
    for index, t in enumerate(scene.things):
        shrink = 1.0 if t.mark else 0.92
        x0, x1, y0, y1 = t.cx + ox - t.rx * shrink, t.cx + ox + t.rx * shrink, t.cy + oy - t.ry * shrink, 0
        y1 = t.cy + oy + t.ry * shrink
        wide = np.clip(np.minimum(edges + PATCH, x1) - np.maximum(edges, x0), 0, PATCH)
        high = np.clip(np.minimum(edges + PATCH, y1) - np.maximum(edges, y0), 0, PATCH)
        result[np.outer(high, wide) >= 0.34 * PATCH * PATCH] = index + 1
    return result
