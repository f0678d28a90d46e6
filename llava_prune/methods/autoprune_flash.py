"""AutoPrune-Flash: AutoPrune that ranks by one query position, as outlined in section C of the supplement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ..ops.attention import last_attention
from ..ops.selection import Positions
from .autoprune import AutoPrune
from .checks import choice
from .registry import register
from .views import Spans, View


@register("autoprune-flash")
@dataclass(frozen=True)
class AutoPruneFlash(AutoPrune):
    """AutoPrune that ranks layers 1..L-1 by the last instruction token alone (supplement, section C).

    No official code exists; this is an interpretation. The mutual information of a single text token is 0 by
    definition, so layers 0 and 1 use all text tokens for it (and for equation 1). Ranking from layer 1 on uses the last
    token.

    Args:
        flash_score: "softmax" averages the attention over heads, as PyramidDrop's code does; "dot" averages the dot
            products themselves, as the supplement says.
    """

    flash_score: Literal["softmax", "dot"] = "softmax"

    info = replace(AutoPrune.info, source="none; section C of the supplement", licence="-", batch="any")

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("flash_score", self.flash_score, ("softmax", "dot"))

    def queries(self, layer: int, spans: Spans) -> Positions | None:
        if layer <= 1:
            return spans.text_positions()
        return None if self._idle(layer, spans) else spans.last_position()

    def later_scores(self, view: View) -> Tensor:
        assert view.attention is not None
        return last_attention(view.attention, product=self.flash_score == "dot")
