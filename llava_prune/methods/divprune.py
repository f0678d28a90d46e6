"""DivPrune: keep the visual tokens that are farthest apart, by greedy max-min distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ops.selection import take
from ..ops.similarity import cosines
from .base import EntryMethod, MethodInfo, in_raster_order
from .checks import at_most_one, choice, integer, real
from .registry import register
from .views import View


def max_min(tokens: Tensor, real: Tensor, count: int, strict: bool = False) -> tuple[Tensor, Tensor]:
    """Choose tokens one by one, each as far as possible from those chosen before.

    Distance is 1 - cosine. The first token maximises the distance to its nearest other token, each further token the
    distance to the nearest chosen token; ties are resolved by index. The order for a smaller count is a prefix of that
    for a larger one.

    Args:
        tokens: (B, V, D) projected visual tokens.
        real: (B, V) bool, the tokens that may be chosen.
        count: K, number of tokens to choose.
        strict: as in the official code: compute in the dtype of `tokens`, apply no lower limit to norms, and allow a
            token to be chosen again.

    Returns:
        (B, K) long, the tokens in the order of selection; (B, K), the distance of each at its step.
    """
    if strict:
        unit = tokens / tokens.norm(dim=2, keepdim=True)
        distance = 1 - unit @ unit.transpose(1, 2)  # (B, V, V)
    else:
        distance = 1 - cosines(tokens)
    two = min(2, distance.shape[1])  # the smallest distance of a token is that to itself
    away = distance.masked_fill(~real[..., None], torch.inf).topk(two, dim=1, largest=False).values[:, -1]  # (B, V)
    away = away.masked_fill(~real, -torch.inf)
    distance = distance.masked_fill(~real[:, None], -torch.inf)
    order, at = [], []
    for step in range(count):
        best = away.argmax(1, keepdim=True)  # (B, 1)
        order.append(best)
        at.append(away.gather(1, best))
        row = take(distance, best)[:, 0]
        away = torch.minimum(away, row) if step else row
        if not strict:
            away = away.scatter(1, torch.cat(order, 1), -torch.inf)
    empty = real.new_zeros(real.shape[0], 0, dtype=torch.long)
    return torch.cat([empty, *order], 1), torch.cat([distance.new_zeros(real.shape[0], 0), *at], 1)


@register("divprune", presets={"paper": {"ratio": 0.098}})
@dataclass(frozen=True)
class DivPrune(EntryMethod):
    """Keep the most diverse visual tokens before the first layer, by greedy max-min cosine distance.

    Source: vbdi/divprune @ 799e2d9. Deviations: chosen tokens are not chosen again, norms have the lower limit 1e-12,
    and norms, products and distances are in float32 for every model dtype (`strict` undoes these three); the visual
    tokens of each sample are found in the prompt, while the official code takes 576 rows after a prefix of 35 in the
    first sample. Newline tokens of images in crops take part.

    Presets: "paper" is the published setting, 9.8 % of the tokens (56 of 576). Budgets of 192, 128 and 64 are from the
    tables of other papers.

    Args:
        tokens: visual tokens kept in every layer; default 64 if `ratio` is not given.
        ratio: share of the visual tokens kept, rounded (halves to even), instead of `tokens`.
        order: "raster", or "selection" for the order in which tokens are chosen, as in the paper's first table.
        strict: the official arithmetic: computed in the dtype of the features, zero vectors become NaN, and a token
            that is chosen twice occurs twice.
    """

    tokens: int | None = None
    ratio: float | None = None
    order: Literal["raster", "selection"] = "raster"
    strict: bool = False

    info = MethodInfo(
        paper="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, CVPR 2025",
        where="before the language model, on projected tokens",
        source="vbdi/divprune @ 799e2d9",
        licence="CC-BY-NC-4.0 (no code taken)",
        batch="any (official code: 1)",
    )
    fixes_budget = ("ratio",)

    def __post_init__(self) -> None:
        at_most_one(tokens=self.tokens, ratio=self.ratio)
        integer("tokens", self.tokens, 1)
        real("ratio", self.ratio, 0, 1)
        choice("order", self.order, ("raster", "selection"))
        choice("strict", self.strict, (True, False))
        if self.tokens is None and self.ratio is None:
            object.__setattr__(self, "tokens", 64)

    def choose(self, view: View, tokens: Tensor, real: Tensor, keep: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        order, _ = max_min(tokens, real, max(keep), self.strict)
        if self.order == "raster":
            order = in_raster_order(order, keep)
        if not self.strict:
            return order, None
        again = (order[:, :, None] == order[:, None]).tril(-1).any(2)  # (B, K) chosen before
        slots = torch.arange(order.shape[1], device=order.device) + tokens.shape[1]
        return torch.where(again, slots, order), take(tokens, order)

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        keep = round(self.ratio * n_visual) if self.ratio is not None else self.tokens
        assert keep is not None
        return [min(keep, n_visual)] * n_layers
