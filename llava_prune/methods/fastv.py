"""FastV: after the first layers, keep the visual tokens with the largest attention of the last prompt token."""

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
    """After `layer` layers, keep the `keep` visual tokens with the largest attention of the last prompt token.

    Score: softmax attention of the last prompt token in layer index `layer` - 1, mean over heads. Source:
    pkunlp-icler/FastV (all released variants use this one token; the paper describes a mean over all tokens). Tokens
    are selected once, in the prefill. Remaining tokens keep their positions, as in the variants with a cache (HF fork,
    lmms-eval).

    Without arguments this is the paper's setting, layer 2 and half of the tokens. It is not documented which settings
    produced the widely copied rows at 192, 128 and 64. `tokens` is therefore an average of the tokens entering, with
    the cut after layer 2, and other interpretations are presets: "k3-192" is the same average with the cut after layer
    3; "keep192" keeps that many tokens after layer 2 (average 216); "one192" keeps that many after layer 1, which gives
    the FLOPs printed next to the copied rows. "keep288", "keep144" and "keep58" are the settings of FasterVLM's 13B
    rows.

    Args:
        tokens: budget, the mean over layers of visual tokens entering. The cut is after layer 2 if the budget allows
            it, else after layer 1.
        layer: number of layers before the cut (K >= 1), which see all visual tokens.
        keep: number of visual tokens after the cut; a float in [0, 1] is a share of the image's tokens (rounded).
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
        """Return (K, k) for an image: the number of layers before the cut, and the number of tokens after it.

        Raises:
            ValueError: for a layer that the model does not have, or a budget that K full layers exceed.
        """
        if self.layer is not None and self.layer >= n_layers:
            raise ValueError(f"layer={self.layer}: this model has {n_layers} layers; give at most {n_layers - 1}")
        if self.tokens is None:
            keep = 0.5 if self.keep is None else self.keep
            layer = self.layer or (2 if n_layers > 2 else 1)
            return layer, round(n_visual * keep) if isinstance(keep, float) else keep
        if self.tokens >= n_visual:
            return self.layer or 1, n_visual
        return full_layers(self.tokens, n_visual, n_layers, (2, 1) if self.layer is None else (self.layer,))
