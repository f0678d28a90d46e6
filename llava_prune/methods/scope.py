"""SCOPE: keep patches that cover all others by similarity, weighted by class-token attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.selection import take
from ..ops.similarity import cosines
from .base import Method, MethodInfo
from .checks import choice, integer, real
from .registry import register
from .views import VisionCut, VisionView


def cover(
    features: Tensor,
    attention: Tensor,
    count: int,
    alpha: float = 1.0,
    combine: Literal["multiply", "add"] = "multiply",
) -> Tensor:
    """Choose patches one by one, each with the largest gain of coverage weighted by attention.

    The coverage of a patch is its largest cosine with a chosen patch, at least 0. The gain of a candidate is the
    increase of coverage summed over all patches. Ties are resolved by index; the order for a smaller count is a prefix
    of that for a larger one.

    Args:
        features: (N, T, Dv), output of the feature layer.
        attention: (N, T), attention of the class token, sum over heads.
        count: K, at most T.
        alpha: exponent of the attention.
        combine: "multiply" the gain by attention^alpha, or "add" both.

    Returns:
        (N, K) long, the patches in the order of choice.
    """
    similarity = cosines(features)  # (N, T, T)
    weight = attention.to(similarity.dtype) ** alpha
    covered = torch.zeros_like(weight)
    taken = torch.zeros_like(weight, dtype=torch.bool)
    order = []
    for _ in range(count):
        gain = (similarity - covered[:, None]).clamp_(min=0).sum(2)  # (N, T), similarity is symmetric
        score = gain * weight if combine == "multiply" else gain + weight
        best = score.masked_fill(taken, -torch.inf).argmax(1, keepdim=True)  # (N, 1)
        order.append(best)
        taken = taken.scatter(1, best, True)
        covered = torch.maximum(covered, take(similarity, best)[:, 0])
    return torch.cat(order, 1)


PRESETS: dict[str, dict[str, Any]] = {"add": {"combine": "add"}}


@register("scope", presets=PRESETS)
@dataclass(frozen=True)
class SCOPE(Method):
    """Greedily cover all patches by cosine similarity; each gain is multiplied by the patch's class-token attention.

    Features and attention come from the block whose output is the feature map; attention is summed over heads. Source:
    kinredon/SCOPE @ 6bf7306, from a description (the repository has no licence file). Deviations: float32, norms have
    the lower limit 1e-12, and every image of a batch has the whole budget. Images in crops: tokens // (largest number
    of crops of the model) in each crop, without newline tokens and unpadding; `strict` divides by the crops of the
    request, as the official code does, and takes one image at a time.

    Preset: "add" adds gain and attention; the published rows multiply them.

    Args:
        tokens: visual tokens of an image.
        alpha: exponent of the attention; 0 ignores attention.
        combine: "multiply" or "add".
        strict: share the budget among crops as the official code does, floor(tokens / crops).
    """

    tokens: int = 64
    alpha: float = 1.0
    combine: Literal["multiply", "add"] = "multiply"
    strict: bool = False

    info = MethodInfo(
        paper="SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs, NeurIPS 2025",
        where="before the language model, by the vision tower's class-token attention and features",
        source="kinredon/SCOPE @ 6bf7306",
        licence="none given (no code taken)",
    )
    positions = "renumber"
    decode = "cache"
    requires = frozenset({"class token"})

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, 1, none=False)
        real("alpha", self.alpha, 0, none=False)
        choice("combine", self.combine, ("multiply", "add"))
        choice("strict", self.strict, (True, False))

    def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
        return {feature_layer: [0]}

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        n, t = view.features.shape[:2]
        keep = view.tokens_per_crop(self.tokens)
        if self.strict:
            if len(view.layout) > 1:
                raise ValueError(f"strict=True: {len(view.layout)} images at once; the official code shares the budget "
                                 "among them, so give one image at a time or leave strict out")  # fmt: skip
            keep = self.tokens // n
        if keep >= t:
            return None
        (recorded,) = view.attention.values()  # (N, H, 1, 1 + T)
        order = cover(view.features, recorded[:, :, 0, 1:].sum(1), keep, self.alpha, self.combine)
        return view.keep(order)

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [min(self.tokens, n_visual)] * n_layers
