"""PyramidDrop: keep a share of the visual tokens at the end of each stage."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..ops.attention import last_attention
from ..ops.selection import Positions
from .base import MethodInfo, ScoreMethod
from .checks import at_most_one, choice, integer, integers, reals
from .registry import register
from .views import Spans, View

HALVES = (0.5, 0.25, 0.125)

_PRESETS: dict[str, dict[str, Any]] = {
    "official": {"layers": (8, 16, 24), "ratios": HALVES},
    "quarters": {"ratios": HALVES},
    "192-stages": {"layers": (8, 16, 24), "ratios": (0.2535, 0.2535**2, 0.2535**3)},
    "128-script": {"layers": (2, 10, 20), "ratios": (0.32, 0.16, 0.08)},
    "64-script": {"layers": (2, 8, 16), "ratios": (0.111, 0.056, 0.028)},
    "128-fork": {"layers": (1, 10, 15), "ratios": (218 / 576, 128 / 576, 54 / 576)},
}


@register("pdrop", presets=_PRESETS)
@dataclass(frozen=True)
class PyramidDrop(ScoreMethod):
    """After each of the layers `layers` (counted from 1), keep int(N ratio) of the N visual tokens of an image.

    Score: attention of the last prompt token with the norm, q and k of the *next* layer on the states at the boundary,
    softmax over the whole sequence, mean over heads. Positions become 0..n-1 after every drop. Source:
    Cooperx521/PyramidDrop; the paper uses the finished layer and a product without softmax, see `score`.

    Without arguments this is the published setting: quarters of the depth ([8, 16, 24] of 32) with 1/2, 1/4, 1/8. The
    official scripts pass [8, 16, 24] also for 40 layers ("official"). The schedules of the published rows at 192, 128
    and 64 are unknown. `tokens` follows the author's recipe (`pyramid_recipe`), and other candidates are presets:
    "192-stages" keeps the paper's stages; "128-script", "64-script" and "128-fork" are from third parties.

    Args:
        tokens: budget, the mean over layers of visual tokens entering (the author's definition).
        layers: numbers of the layers after which tokens are dropped, ascending, counted from 1.
        ratios: shares of the original count that remain after each of them, not ascending.
        score: "next" as in the official code; "finished" ranks by the dot products of the finished layer, as in the
            paper.
    """

    tokens: int | None = None
    layers: Sequence[int] | None = None
    ratios: Sequence[float] | None = None
    score: Literal["next", "finished"] = "next"

    info = MethodInfo(
        paper="PyramidDrop (Conical Visual Concentration), CVPR 2025 (arXiv 2410.17247)",
        where="language model, after three layers: quarters of the depth, by budget the first 2, 8, 16 of 32",
        source="Cooperx521/PyramidDrop @ 6444f30",
        licence="MIT",
        batch="any (official code: 1)",
    )
    positions = "renumber"
    decode = "cache"
    fixes_budget = ("layers", "ratios")
    replays = True

    def __post_init__(self) -> None:
        at_most_one(tokens=self.tokens, ratios=self.ratios)
        at_most_one(tokens=self.tokens, layers=self.layers)
        integer("tokens", self.tokens, 1)
        choice("score", self.score, ("next", "finished"))
        object.__setattr__(self, "layers", integers("layers", self.layers, 1))
        object.__setattr__(self, "ratios", reals("ratios", self.ratios, 0, 1))
        stages, ratios = self.layers or (), self.ratios or HALVES
        if any(b <= a for a, b in zip(stages, stages[1:], strict=False)):
            raise ValueError(f"layers={stages}: give them in ascending order")
        if any(b > a for a, b in zip(ratios, ratios[1:], strict=False)):
            raise ValueError(f"ratios={ratios}: a later share cannot be larger than an earlier one")
        if self.layers is not None and len(stages) != len(ratios):
            raise ValueError(f"{len(stages)} layers and {len(ratios)} ratios; give as many of one as of the other")

    def schedule(self, n_visual: int, n_layers: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return layer numbers and ratios for an image.

        Raises:
            ValueError: for layers that the model does not have, or a budget that cannot be met.
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

    def queries(self, layer: int, spans: Spans) -> Positions | None:
        return None if self.score == "next" else super().queries(layer, spans)

    def scores(self, layer: int, view: View) -> Tensor:
        if self.score == "next":
            assert view.next_attention is not None
            return last_attention(view.next_attention(view.spans.last_position()))
        assert view.attention is not None
        return last_attention(view.attention, product=True)


PYRAMID = (2, 8, 16)
"""Stages of 32 layers that PyramidDrop's author recommends for small budgets (issue #29 of the repository)."""


@functools.lru_cache(maxsize=512)
def pyramid_recipe(tokens: int, n_visual: int, n_layers: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return stages and ratios for a budget: the author's ratios l, l^2, l^3 at the stages [2, 8, 16] of 32 layers.

    For other depths the stages are scaled. l has at least two decimals, and only as many as are needed to bring the
    mean of tokens entering within 2 % of the budget (six if no l does); for 32 layers and 576 tokens it is .56, .42 and
    .19 for budgets of 192, 128 and 64. If the layers before the first drop alone exceed the budget, the first drop
    moves to layer 1.

    Raises:
        ValueError: if the layers before the first drop alone exceed the budget, or the model has too few layers.
    """
    first, *later = (round(s * n_layers / 32) for s in PYRAMID)
    for start in dict.fromkeys((max(1, first), 1)):
        if start * n_visual >= tokens * n_layers:
            continue
        stages = [start]
        for s in later:
            stages.append(max(stages[-1] + 1, s))
        if stages[-1] >= n_layers:
            break
        for decimals in (2, 3, 4, 5, 6):
            unit = 10**decimals
            low, high = 0, unit  # the mean grows with l; find the last l within the budget and the next one
            while high - low > 1:
                middle = (low + high) // 2
                over = _mean(middle / unit, stages, n_visual, n_layers) > tokens
                low, high = (low, middle) if over else (middle, high)
            best = min((low, high), key=lambda x: abs(_mean(x / unit, stages, n_visual, n_layers) - tokens))
            if abs(_mean(best / unit, stages, n_visual, n_layers) - tokens) <= 0.02 * tokens:
                break
        share = best / unit
        return tuple(stages), (share, share**2, share**3)
    raise ValueError(
        f"tokens={tokens}: no schedule of three drops on {n_layers} layers brings {n_visual} visual tokens to that "
        "average; give layers and ratios, or a larger budget"
    )


def _mean(share: float, stages: Sequence[int], n_visual: int, n_layers: int) -> float:
    counts = pyramid(stages, (share, share**2, share**3), n_visual, n_layers)
    return sum(counts) / n_layers


def pyramid(stages: Sequence[int], ratios: Sequence[float], n_visual: int, n_layers: int) -> list[int]:
    """Return the visual tokens entering each layer: int(ratio x original count) after each stage."""
    ends = [0, *stages, n_layers]
    kept = [n_visual, *(int(n_visual * r) for r in ratios)]
    return [k for k, a, b in zip(kept, ends[:-1], ends[1:], strict=True) for _ in range(b - a)]
