"""PyramidDrop: at the end of each stage a share of the visual tokens survives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..core.checks import at_most_one, choice, real, whole, wholes
from ..core.information import last_attention
from ..core.method import Method
from ..core.registry import register
from ..core.select import keep_best
from ..core.stages import pyramid, pyramid_recipe
from ..core.types import ColumnIndex, Cut, Spans, View

HALVES = (0.5, 0.25, 0.125)

_PRESETS: dict[str, dict[str, Any]] = {
    "official": {"layers": (8, 16, 24), "ratios": HALVES},
    "quarters": {"ratios": HALVES},
    **{str(b): {"tokens": b} for b in (192, 128, 64, 288, 144, 58, 640, 320, 160)},
    "192-stages": {"layers": (8, 16, 24), "ratios": (0.2535, 0.2535**2, 0.2535**3)},
    "128-script": {"layers": (2, 10, 20), "ratios": (0.32, 0.16, 0.08)},
    "64-script": {"layers": (2, 8, 16), "ratios": (0.111, 0.056, 0.028)},
    "128-fork": {"layers": (1, 10, 15), "ratios": (218 / 576, 128 / 576, 54 / 576)},
}


@register("pdrop", presets=_PRESETS)
@dataclass(frozen=True)
class PyramidDrop(Method):
    """After layer number r of `layers` (counted from 1) int(N ratio) visual tokens go on, N being the picture's.

    Score: attention of the last prompt token with the norm, q and k of the *next* layer on the states at the boundary,
    softmax over the whole sequence, mean over heads. Positions become 0..n-1 after every drop. Source:
    Cooperx521/PyramidDrop; the paper speaks of the finished layer and of a product without softmax, see `score`.

    Nothing given is the published setting: quarters of the depth ([8, 16, 24] of 32) with 1/2, 1/4, 1/8. On 40 layers
    the official scripts pass [8, 16, 24] all the same ("official"). Schedules of the published rows at 192, 128 and 64
    are unknown; `tokens` follows the author's recipe (`core.stages.pyramid_recipe`), and other candidates are presets:
    "192-stages" keeps the paper's stages, "128-script", "64-script" and "128-fork" are third parties'.

    Args:
        tokens: budget, the mean over layers of visual tokens entering (the author's definition).
        layers: numbers of the layers after which tokens are dropped, ascending, from 1.
        ratios: shares of the original count that go on, not ascending.
        score: "next" as the official code; "finished" ranks by the dot products of the layer just run, as the paper.
    """

    tokens: int | None = None
    layers: Sequence[int] | None = None
    ratios: Sequence[float] | None = None
    score: Literal["next", "finished"] = "next"

    paper = "PyramidDrop (Conical Visual Concentration), CVPR 2025 (arXiv 2410.17247)"
    where = "language model, after three layers: quarters of the depth, by budget the first 2, 8, 16 of 32"
    source = "Cooperx521/PyramidDrop @ 6444f30"
    licence = "MIT"
    positions = "renumber"
    decode = "cache"
    batch = "any (official code: 1)"
    instead = ("layers", "ratios")
    replays = True

    def __post_init__(self) -> None:
        at_most_one(tokens=self.tokens, ratios=self.ratios)
        at_most_one(tokens=self.tokens, layers=self.layers)
        whole("tokens", self.tokens, 1)
        choice("score", self.score, ("next", "finished"))
        object.__setattr__(self, "layers", wholes("layers", self.layers, 1))
        if self.ratios is not None:
            object.__setattr__(self, "ratios", tuple(self.ratios))
        for r in self.ratios or ():
            real("ratios", r, 0, 1, none=False)
        stages, ratios = self.layers or (), self.ratios or HALVES
        if any(b <= a for a, b in zip(stages, stages[1:], strict=False)):
            raise ValueError(f"layers={stages}: give them in ascending order")
        if any(b > a for a, b in zip(ratios, ratios[1:], strict=False)):
            raise ValueError(f"ratios={ratios}: a later share cannot be larger than an earlier one")
        if self.layers is not None and len(stages) != len(ratios):
            raise ValueError(f"{len(stages)} layers and {len(ratios)} ratios; give as many of one as of the other")

    def schedule(self, n_visual: int, n_layers: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Layer numbers and ratios for a picture.

        Raises:
            ValueError: for layers the model does not have, or a budget nobody can meet.
        """
        if self.tokens is not None:
            return ((), ()) if self.tokens >= n_visual else pyramid_recipe(self.tokens, n_visual, n_layers)
        ratios = tuple(self.ratios or HALVES)
        stages = self.layers
        if stages is None:
            stages = tuple(n_layers * (i + 1) // (len(ratios) + 1) for i in range(len(ratios)))
        if stages and (stages[-1] >= n_layers or stages[0] < 1):
            raise ValueError(f"layers={tuple(stages)}: this model has {n_layers} layers; the last drop is after "
                             f"layer {n_layers - 1} at most")  # fmt: skip
        return tuple(stages), ratios

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        if n_visual == 0:
            return [0] * n_layers
        return pyramid(*self.schedule(n_visual, n_layers), n_visual, n_layers)

    def rows(self, layer: int, spans: Spans) -> ColumnIndex | None:
        if self.score == "next" or self.keep_after(layer, spans) is None:
            return None
        return spans.last_row()

    def cut(self, layer: int, view: View) -> Cut | None:
        keep = self.keep_after(layer, view.spans)
        if keep is None:
            return None
        if self.score == "next":
            assert view.next_rows is not None
            return keep_best(view, last_attention(view.next_rows(view.spans.last_row())), keep)
        assert view.probs is not None
        return keep_best(view, last_attention(view.probs, product=True), keep)
