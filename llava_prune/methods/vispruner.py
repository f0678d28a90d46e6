"""VisPruner: keep the patches with the largest class-token attention and the most diverse of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.selection import take
from ..ops.similarity import cosines, wide
from .base import Method, MethodInfo
from .checks import choice, integer, real
from .registry import register
from .views import VisionCut, VisionView

ROUND = 8
"""Number of tokens removed in a round."""


def select(features: Tensor, score: Tensor, tokens: int, ratio: float, strict: bool = False) -> tuple[Tensor, Tensor]:
    """Choose important patches by attention, and diverse ones by rounds of duplicate removal among the others.

    The others form a list by descending attention. In each round the patches at even positions of the list are compared
    with those at odd positions, and the 8 patches with the most similar partner are removed. The remaining patches of
    the even positions, most similar first, and then those of the odd positions form the next list.

    Args:
        features: (N, T, Dv), output of the feature layer, in the dtype of the computation.
        score: (N, T), attention of the class token, mean over heads.
        tokens: number of patches to keep, fewer than T.
        ratio: share of important patches among them, rounded down.
        strict: refuse numbers that the official code does not support, and apply no lower limit to norms.

    Returns:
        (N, int(tokens ratio)) long, important patches by descending score; (N, the rest) long, the diverse patches in
        the order of the last list.

    Raises:
        ValueError: with `strict`, for numbers that the official rounds cannot reach.
    """
    order = score.sort(dim=1, descending=True, stable=True).indices
    important = int(tokens * ratio)
    diverse = tokens - important
    rest = order[:, important:]
    if strict:
        _check_rounds(rest.shape[1], diverse)
        unit = features / features.norm(dim=2, keepdim=True)
        similarity = unit @ unit.transpose(1, 2)
    else:
        similarity = cosines(features)  # (N, T, T)
    if diverse == 0:
        rest = rest[:, :0]
    while rest.shape[1] > diverse:
        even, odd = rest[:, ::2], rest[:, 1::2]
        count = min(ROUND, rest.shape[1] - diverse, even.shape[1])
        among = take(similarity, even).gather(2, odd[:, None].expand(-1, even.shape[1], -1))  # (N, A, B)
        by = among.amax(2).sort(dim=1, descending=True, stable=True).indices[:, count:]
        rest = torch.cat([even.gather(1, by), odd], 1)
    return order[:, :important], rest


def _check_rounds(others: int, diverse: int) -> None:
    """Refuse numbers of patches for which the rounds of the official code fail.

    Raises:
        ValueError: with the numbers.
    """
    left = others
    while left > diverse > 0:
        if left % 2:
            raise ValueError(
                f"strict=True: the official code cannot split {left} patches into even and odd places; give another "
                "number of tokens, or leave strict out"
            )
        count = min(ROUND, left - diverse)
        if count > left // 2:
            raise ValueError(
                f"strict=True: the official code cannot remove {count} of {left // 2} patches; give more tokens, or "
                "leave strict out"
            )
        left -= count


PRESETS: dict[str, dict[str, Any]] = {"mme-64": {"tokens": 64, "ratio": 0.75}}


@register("vispruner", presets=PRESETS)
@dataclass(frozen=True)
class VisPruner(Method):
    """Keep patches with the largest class-token attention for half of the budget, diverse patches for the other half.

    Score: attention of the class token in the block whose output is the feature map, mean over heads. Similarity:
    cosine of the feature map, before the projector. Source: Theia-4869/VisPruner @ aefa01a. Deviations: float32 and
    stable sorts, while the official code runs in the tower's dtype, where rounding determines its second half; lists of
    odd length and budgets below 16 are supported. `strict` uses the tower's dtype and refuses such lists and budgets.
    Images in crops: the same in each crop, without newline tokens and unpadding, as the official code enforces.

    Presets: "mme-64" is the published setting for MME. The ratios of the other published rows are not known; the
    default of the official scripts is 0.5.

    Args:
        tokens: visual tokens of an image; each crop of it gets tokens // (largest number of crops of the model).
        ratio: share of the budget that is chosen by attention, rounded down; 1 is FasterVLM.
        strict: compute in the tower's dtype, and raise errors where the official code fails.
    """

    tokens: int = 64
    ratio: float = 0.5
    strict: bool = False

    info = MethodInfo(
        paper="Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs, ICCV 2025",
        where="before the language model, by the vision tower's class-token attention and features",
        source="Theia-4869/VisPruner @ aefa01a",
        licence="Apache-2.0",
    )
    positions = "renumber"
    decode = "cache"
    requires = frozenset({"class token"})

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, 1, none=False)
        real("ratio", self.ratio, 0, 1, none=False)
        choice("strict", self.strict, (True, False))

    def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
        return {feature_layer: [0]}

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        keep = view.tokens_per_crop(self.tokens)
        if keep >= view.features.shape[1]:
            return None
        features, score = view.features, view.class_attention()
        if self.strict:
            score = score.to(features.dtype)
        else:
            features = wide(features)
        return view.keep(torch.cat(select(features, score, keep, self.ratio, self.strict), 1))

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [min(self.tokens, n_visual)] * n_layers
