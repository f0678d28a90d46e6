"""HoloV: share a budget among regions of the image by attention, then keep the best patches of each region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.selection import column, descending_order, inverse, true_first
from ..ops.shares import proportional
from .base import EntryMethod, MethodInfo, in_raster_order
from .checks import choice, integer, real
from .registry import register
from .views import View, VisionView

EPS = 1e-6
SCALE = 1000.0
"""Factor on the attention in the token scores."""


def strips(real: Tensor, parts: Sequence[int]) -> Tensor:
    """Split the real tokens of each sample into runs whose lengths differ by at most 1, the longer ones first.

    Args:
        real: (B, V) bool, the tokens to split.
        parts: number of runs of each sample.

    Returns:
        (B, V) long: the run of each token, parts[b] for tokens that are not real.
    """
    number, runs = real.cumsum(1) - 1, column(parts, real)  # (B, V), (B, 1)
    total = real.sum(1, keepdim=True)
    short, extra = total // runs, total % runs
    long = extra * (short + 1)  # tokens in the longer runs
    run = torch.where(number < long, number // (short + 1), extra + (number - long) // short.clamp(min=1))
    return torch.where(real, run, runs)


def region_scores(tokens: Tensor, attention: Tensor, region: Tensor, count: int, alpha: float) -> Tensor:
    """Compute the mean score of the tokens of each region: attention, plus variance of similarity inside the region.

    Args:
        tokens: (B, V, D), projected visual tokens.
        attention: (B, V), attention of the class token, mean over heads.
        region: (B, V) long, 0 to count - 1; larger for tokens that belong to no region.
        count: P, number of regions.
        alpha: weight of the variance. It has almost no effect, since the variance term is scaled to the mean attention.

    Returns:
        (B, P) float32.
    """
    x, a = tokens.float(), attention.float()
    unit = x / (x.norm(dim=2, keepdim=True) + EPS)
    alike = region[:, :, None] == region[:, None]  # (B, V, V)
    diagonal = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    similarity = (unit @ unit.transpose(1, 2)).masked_fill(~alike | diagonal, 0)
    others = (alike.sum(2) - 1).clamp(min=1)  # (B, V)
    mean = similarity.sum(2) / others
    variance = ((similarity - mean[..., None]).square() * alike).sum(2) / others
    member = (region[:, None] == torch.arange(count, device=x.device)[:, None]).float()  # (B, P, V)
    size = member.sum(2).clamp(min=1)

    def average(values: Tensor) -> Tensor:
        return (member @ values[..., None])[..., 0] / size  # (B, P)

    scaled = SCALE * a
    factor = average(scaled.abs()) / (average(variance.abs()) + EPS)
    score = average(scaled) + alpha * average(variance) * factor
    return torch.where(size == 1, average(a), score)


def region_counts(score: Tensor, sizes: Tensor, keep: Tensor, strict: bool) -> Tensor:
    """Return the number of tokens to keep in each region.

    A region gets its share of the budget by score, rounded down; the remainder goes to the regions with the largest
    scores.

    Args:
        score: (B, P), score of each region.
        sizes: (B, P) long, number of tokens of each region.
        keep: (B, 1) long, the budget.
        strict: if a share exceeds the size of a region, the excess is lost; otherwise the regions with room share it in
            the same way.

    Returns:
        (B, P) long.
    """
    if not strict:
        return proportional(score, keep, sizes, "weight")
    weight = score / (score.sum(1, keepdim=True) + EPS)
    share = (weight * keep).floor().long()
    rank = inverse(weight.sort(dim=1, descending=True, stable=True).indices)
    share = share + (rank < keep - share.sum(1, keepdim=True))
    return torch.minimum(share, sizes)


def select(
    tokens: Tensor,
    attention: Tensor,
    real: Tensor,
    keep: Sequence[int],
    parts: Sequence[int],
    alpha: float = 0.09,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose the tokens with the largest attention in each region, as many as `region_counts` says.

    Args:
        tokens: (B, V, D), projected visual tokens.
        attention: (B, V), attention of the class token.
        real: (B, V) bool, the tokens that have a patch.
        keep: budget of each sample.
        parts: number of regions of each sample.
        alpha, strict: see `region_scores` and `region_counts`.

    Returns:
        (B, V) long, an order with the chosen tokens first: region by region, by descending attention, or in raster
        order if a region keeps all of its tokens; (B, 1) long, the number of chosen tokens.
    """
    most, region = max(parts), strips(real, parts)  # (B, V)
    numbers = torch.arange(most, device=region.device)
    sizes = (region[:, None] == numbers[:, None]).sum(2).masked_fill(numbers >= column(parts, region), 0)  # (B, P)
    score = region_scores(tokens, attention, region.masked_fill(~real, most), most, alpha).masked_fill(sizes == 0, 0)
    share = region_counts(score, sizes, column(keep, sizes), strict)
    where = region.clamp(max=most - 1)
    wanted = share.gather(1, where).masked_fill(~real, 0)  # (B, V) number of tokens that each token's region keeps
    full = wanted == sizes.gather(1, where)
    place = torch.arange(real.shape[1], device=real.device)
    rank = torch.where(full, place, inverse(descending_order(attention, real)))
    order = (region.masked_fill(~real, most) * real.shape[1] + rank).sort(dim=1, stable=True).indices
    first = (sizes.cumsum(1) - sizes).gather(1, where)  # (B, V) where each token's region begins in the order
    chosen = (inverse(order) - first < wanted).gather(1, order)
    total = share.sum(1, keepdim=True)
    return order.gather(1, true_first(chosen)), total


PRESETS: dict[str, dict[str, Any]] = {"literal": {"tokens": 64, "regions": 16, "strict": True}}


@register("holov", presets=PRESETS)
@dataclass(frozen=True)
class HoloV(EntryMethod):
    """Share the budget among strips of the image by class-token attention; keep the best patches of each strip.

    The score is the attention of the class token in the block whose output is the feature map, mean over heads. Source:
    obananas/HoloV @ 1d2e65e. The score of a strip also contains a variance of similarity of the projected tokens, which
    cancels: for any alpha, the share of a strip is its share of the attention. Deviations: if a share exceeds the size
    of a strip, the excess goes to other strips, while the official code inserts tokens of zeros; tokens are in
    raster order; ties are resolved by index; a budget of all tokens prunes nothing. `strict` undoes the first two.
    Images in crops form one sequence as the package packs it, without newline tokens.

    Preset: "literal" is the setting in the official file, 64 tokens in 16 strips.

    Args:
        tokens: visual tokens kept in every layer.
        regions: number of strips; by default 1024 // tokens for 576 visual tokens, in proportion for other numbers, at
            least 1.
        alpha: weight of the variance term, which has no effect.
        strict: use the official counts, tokens of zeros and order.
    """

    tokens: int = 64
    regions: int | None = None
    alpha: float = 0.09
    strict: bool = False

    info = MethodInfo(
        paper="Don't Just Chase 'Highlighted Tokens' in MLLMs: Visual Holistic Context Retention, NeurIPS 2025",
        where="before the language model, by the vision tower's class-token attention and projected tokens",
        source="obananas/HoloV @ 1d2e65e",
        licence="Apache-2.0",
    )
    requires = frozenset({"class token"})

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, 1, none=False)
        integer("regions", self.regions, 1)
        real("alpha", self.alpha, 0, none=False)
        choice("strict", self.strict, (True, False))

    def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
        return {feature_layer: [0]}

    def prune_vision(self, view: VisionView) -> None:
        view.patch_values["cls"] = view.class_attention()  # (N, T)
        view.patch_values["patch"] = torch.ones_like(view.patch_values["cls"])  # 0 on newline tokens

    def choose(self, view: View, tokens: Tensor, real: Tensor, keep: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        places, _ = view.visual_tokens()
        attention, patch = (view.patch_values(name).gather(1, places) for name in ("cls", "patch"))  # (B, V) each
        parts = [self.strips(n, k) for n, k in zip(view.spans.n_visual, keep, strict=True)]
        order, total = select(tokens, attention, real & (patch > 0), keep, parts, self.alpha, self.strict)
        order = order[:, : max(keep)]
        if not self.strict:
            return in_raster_order(order, keep), None
        slots = torch.arange(order.shape[1], device=order.device)
        zeros = torch.zeros_like(tokens[:, : order.shape[1]])
        return torch.where(slots < total, order, tokens.shape[1] + slots), zeros

    def strips(self, n_visual: int, keep: int) -> int:
        """Return the number of strips of an image."""
        if self.regions is not None:
            return min(self.regions, max(n_visual, 1))
        return min(max(1024 * n_visual // (576 * max(keep, 1)), 1), max(n_visual, 1))

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [min(self.tokens, n_visual)] * n_layers
