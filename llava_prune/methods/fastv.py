"""FastV: all visual tokens enter the first layers, then only those the last prompt token attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..ops.attention import last_attention
from ..ops.counts import full_layers
from .base import MethodInfo, ScoreMethod
from .checks import at_most_one, integer, real
from .registry import register
from .views import View

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"layer": 2, "keep": 0.5},
    "lmms-eval": {"layer": 3, "keep": 0.5},
    **{f"k3-{b}": {"tokens": b, "layer": 3} for b in (192, 128, 64)},
    **{f"keep{b}": {"layer": 2, "keep": b} for b in (192, 128, 64, 288, 144, 58)},
    **{f"one{b}": {"layer": 1, "keep": b} for b in (192, 128, 64)},
}


@register("fastv", presets=_PRESETS)
@dataclass(frozen=True)
class FastV(ScoreMethod):
    """The first `layer` layers see every visual token, the others the best `keep` by the last prompt token's attention.

    Score: softmax attention of the last prompt token in layer index `layer` - 1, mean over heads. Source:
    pkunlp-icler/FastV (all released variants use this one token; the paper words it as a mean over all tokens).
    Selection once, in the prefill; remaining tokens keep their positions, as in the variants with a cache (HF fork,
    lmms-eval).

    Without arguments this is the paper's setting, layer 2 and half of the tokens. What the widely copied rows at 192,
    128 and 64 ran is not documented, so `tokens` takes the reading that is true to its name, an average of tokens
    entering with the cut after layer 2, and the others are presets: "k3-192", the same after layer 3; "keep192", that
    many after layer 2 (average 216); "one192", that many after layer 1, which gives the FLOPs printed beside the copied
    rows. "keep288", "keep144" and "keep58" are how the 13B rows of FasterVLM were run.

    Args:
        tokens: budget, the mean over layers of visual tokens entering. After layer 2 where the budget allows it,
            else after layer 1.
        layer: layers that see everything (K >= 1).
        keep: visual tokens in the other layers; a number below 1 is a share of the image's, rounded.
    """

    tokens: int | None = None
    layer: int | None = None
    keep: int | float | None = None

    info = MethodInfo(
        paper="An Image is Worth 1/2 Tokens After Layer 2, ECCV 2024 (arXiv 2403.06764)",
        where="language model, after the first 2 layers (or as `layer` says)",
        source="pkunlp-icler/FastV @ d165972",
        licence="none given",
        batch="any (official code: 1)",
    )
    fixes_budget = ("keep",)
    replays = True

    def __post_init__(self) -> None:
        at_most_one(tokens=self.tokens, keep=self.keep)
        integer("tokens", self.tokens, 1)
        integer("layer", self.layer, 1)
        if isinstance(self.keep, float):
            real("keep", self.keep, 0, 1)
        else:
            integer("keep", self.keep)

    def scores(self, layer: int, view: View) -> Tensor:
        assert view.attention is not None
        return last_attention(view.attention)

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        if n_visual == 0:
            return [0] * n_layers
        full, keep = self.setting(n_visual, n_layers)
        return [n_visual] * full + [min(keep, n_visual)] * (n_layers - full)

    def setting(self, n_visual: int, n_layers: int) -> tuple[int, int]:
        """(K, k) for an image: layers that see everything, tokens in the others.

        Raises:
            ValueError: for a layer the model does not have, or a budget that K full layers exceed.
        """
        if self.layer is not None and self.layer >= n_layers:
            raise ValueError(f"layer={self.layer}: this model has {n_layers} layers; give at most {n_layers - 1}")
        if self.tokens is None:
            keep = 0.5 if self.keep is None else self.keep
            return self.layer or min(2, n_layers - 1), round(n_visual * keep) if isinstance(keep, float) else keep
        if self.tokens >= n_visual:
            return self.layer or 1, n_visual
        return full_layers(self.tokens, n_visual, n_layers, (2, 1) if self.layer is None else (self.layer,))
