"""PruMerge and PruMerge+: keep outliers of class-token attention and merge the patches most similar to them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.selection import column, inverse, take
from .base import Method, MethodInfo
from .checks import at_most_one, choice, integer, real
from .registry import register
from .views import MERGED, VisionCut, VisionView, per_crop

PRESETS: dict[str, dict[str, Any]] = {"adaptive": {"adaptive": True}, "ratio": {"adaptive": False}}
SMALLEST = 1e-6
"""Smallest `ratio`: an image then keeps one patch."""


def outliers(score: Tensor) -> Tensor:
    """Count the scores of each image strictly above q3 + 1.5 (q3 - q1), with quartiles by linear interpolation.

    Args:
        score: (N, T).

    Returns:
        (N,) long.
    """
    s = score.double()
    q1, q3 = s.quantile(0.25, dim=1), s.quantile(0.75, dim=1)
    fence = q3 + 1.5 * (q3 - q1)
    return (s > fence[:, None]).sum(1)


def absorb(
    features: Tensor, keys: Tensor, score: Tensor, kept: Tensor, counts: list[int], neighbours: int = 32
) -> tuple[Tensor, Tensor]:
    """Add to each kept patch its nearest candidates, and sum the patches that are not kept.

    y_i = x_i + sum of score_j x_j over the `neighbours` candidates j with the largest cosine. Candidates are the
    patches that are not kept and the other entries of the kept list. If that list contains patches twice, the same
    number of unkept patches with the lowest indices is omitted from the candidates and the sum, as in the official
    code.

    Args:
        features: (N, T, Dv) patch features.
        keys: (N, T, C) keys, all heads concatenated.
        score: (N, T) class-token attention.
        kept: (N, K) long, kept patches, of which the first counts[n] are real.
        counts: number of kept patches of each image.
        neighbours: largest number of candidates added to a patch.

    Returns:
        (N, K, Dv) float32, the kept patches with their neighbours; (N, Dv) float32, the sum of the others weighted by
        `score`.
    """
    n, t = score.shape
    size = kept.shape[1]
    real = torch.arange(size, device=kept.device) < column(counts, kept)  # (N, K)
    named = torch.zeros(n, t + 1, dtype=torch.bool, device=kept.device)
    named = named.scatter(1, kept.masked_fill(~real, t), True)[:, :t]
    twice = column(counts, kept) - named.sum(1, keepdim=True)  # (N, 1)
    pool = ~named & ((~named).cumsum(1) > twice)  # (N, T)
    unit = torch.nn.functional.normalize(keys.float(), dim=2)
    mine = take(unit, kept)  # (N, K, C)
    similarity = torch.cat([mine @ unit.transpose(1, 2), mine @ mine.transpose(1, 2)], 2)  # (N, K, T + K)
    own = torch.eye(size, dtype=torch.bool, device=kept.device)
    free = torch.cat([pool[:, None].expand(-1, size, -1), real[:, None] & ~own], 2)  # (N, K, T + K)
    near = similarity.masked_fill(~free, -torch.inf).topk(min(neighbours, similarity.shape[2]), dim=2)
    weights = torch.cat([score, score.gather(1, kept)], 1)[:, None].expand(-1, size, -1).gather(2, near.indices)
    weights = weights.masked_fill(near.values == -torch.inf, 0)
    share = torch.zeros_like(similarity, dtype=weights.dtype).scatter(2, near.indices, weights)
    x = features.float()
    centre = take(x, kept)
    left = (score * pool)[:, None] @ x  # (N, 1, Dv)
    return centre + share[..., :t] @ x + share[..., t:] @ centre, left[:, 0]


def _rest(kept: Tensor, t: int) -> Tensor:
    """Return (N, T) long, the groups of a `VisionCut`: K, the last token, for patches not in `kept` (N, K), else -1."""
    named = torch.zeros(kept.shape[0], t + 1, dtype=torch.bool, device=kept.device).scatter(1, kept, True)[:, :t]
    return torch.where(named, -1, kept.shape[1])


@register("prumerge", presets=PRESETS)
@dataclass(frozen=True)
class PruMerge(Method):
    """Keep patches with outlying class-token attention, merge the 32 nearest into each, and add a token for the rest.

    Attention and keys come from the block after the feature map, at full width: the class token's query times each key
    over sqrt(C), softmax, without the class token's own column. Output: kept patches by descending attention, then the
    sum of the patches that are not kept, weighted by attention. Weights are not normalised. Source: official code
    097c041. Deviations: the threshold is computed for each image separately (the official code pools a batch),
    quartiles are in float64, and ties are resolved by index. Images in crops are processed crop by crop, which is an
    interpretation.

    Presets: "adaptive" is the official default. Budgets are not published. As an interpretation, `tokens` patches are
    kept, so tokens + 1 with the sum; `exact=True` keeps one patch fewer. "ratio" is the official 1/8.

    Args:
        tokens: fixed number of patches kept; each crop gets tokens // (largest number of crops of the model).
        ratio: fixed share of the patches kept, in [1e-6, 1]; default 1/8 if adaptive=False.
        adaptive: keep all outliers of an image (the default if neither tokens nor ratio is given).
        exact: with `tokens`, include the sum in the number.
        strict: only for PruMerge+.
    """

    tokens: int | None = None
    ratio: float | None = None
    adaptive: bool | None = None
    exact: bool = False
    strict: bool = False

    info = MethodInfo(
        paper="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, ICCV 2025",
        where="before the language model, by attention and keys of the block after the features",
        source="42Shawn/LLaVA-PruMerge @ 097c041",
        licence="Apache-2.0",
        batch="any (official code: 1)",
    )
    requires = frozenset({"class token"})
    fixes_budget = ("ratio", "adaptive")
    makes_tokens = True
    positions = "renumber"
    decode = "cache"

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, 1)
        real("ratio", self.ratio, SMALLEST, 1)
        choice("adaptive", self.adaptive, (None, True, False))
        for name in ("exact", "strict"):
            choice(name, getattr(self, name), (True, False))
        at_most_one(tokens=self.tokens, ratio=self.ratio)
        fixed = self.tokens is not None or self.ratio is not None
        if self.adaptive and fixed:
            raise ValueError("adaptive=True finds the number itself; leave tokens and ratio out")
        if self.adaptive is None:
            object.__setattr__(self, "adaptive", not fixed)
        if not self.adaptive and not fixed:
            object.__setattr__(self, "ratio", 1 / 8)

    def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
        return {feature_layer + 1: [0]}

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        (layer,) = view.keys
        n, t = view.features.shape[:2]
        if self.tokens is not None and view.tokens_per_crop(self.tokens) >= t:
            return None
        keys = view.keys[layer].transpose(1, 2).flatten(2).to(view.features.device)  # (N, 1 + T, C)
        query = view.queries[layer].transpose(1, 2).flatten(2).to(keys.device)  # (N, 1, C)
        logits = (query @ keys.transpose(1, 2))[:, 0] / keys.shape[2] ** 0.5
        score = logits.softmax(1, dtype=torch.float32)[:, 1:]  # (N, T)
        kept, counts = self.choose(score, view.crops)
        tokens, rest = absorb(view.features, keys[:, 1:], score, kept, counts)
        features = torch.cat([tokens, rest[:, None]], 1).to(view.features.dtype)
        real = torch.arange(kept.shape[1], device=kept.device) < column(counts, kept)
        live = torch.cat([real, real.new_ones(n, 1)], 1)
        ids = torch.cat([kept, kept.new_full((n, 1), MERGED)], 1)
        groups = functools.partial(_rest, kept.masked_fill(~real, t), t)
        return VisionCut(live, features, ids, by_canvas=False, counts=[c + 1 for c in counts], groups=groups)

    def share(self, t: int, crops: int) -> float:
        """Return the fixed ratio, or the one that corresponds to `tokens` of t patches."""
        return self.ratio if self.tokens is None else self.target(crops) / t  # type: ignore[return-value]

    def target(self, crops: int) -> int:
        assert self.tokens is not None
        return max(per_crop(self.tokens, crops) - self.exact, 0)

    def choose(self, score: Tensor, crops: int) -> tuple[Tensor, list[int]]:
        """Return (N, K) kept patches in output order, and the number of real ones in each image."""
        n, t = score.shape
        counts: list[int]
        counts = outliers(score).tolist() if self.adaptive else [int(t * self.share(t, crops) + 1e-9)] * n
        return score.sort(dim=1, descending=True, stable=True).indices[:, : max(counts)], counts

    def plan(self, n_visual: int, n_layers: int) -> list[int] | None:
        if self.adaptive:
            return None
        if self.tokens is not None:
            return [n_visual if self.tokens >= n_visual else self.target(1) + 1] * n_layers
        return [int(n_visual * self.share(n_visual, 1) + 1e-9) + 1] * n_layers


@register("prumerge+", presets=PRESETS)
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge that also keeps a regular grid of patches, so that every part of the image is covered.

    Adaptive: every s-th patch from 0 on, s = floor(floor(N / k) / 3) for k outliers. Fixed: every t-th from floor(t/2)
    on, t = floor(1 / ratio). The last patch is never on the grid. Output: outliers by descending attention, the grid in
    ascending order, the sum. Source: official code 097c041 (the divisor of the stride was different before 2024-05-02;
    it is not known which version produced the tables). Deviations in addition to those of PruMerge: s and k are at
    least 1 (the official code divides by zero if there is no outlier); the length of the grid may differ from k; with a
    fixed ratio, a patch that is both outlier and grid point occurs once, unless `strict`.

    Presets: budgets are not published. As an interpretation, the ratio is tokens / 1152, half outliers and half grid,
    which gives at most tokens + 1 tokens for 192, 128, 64 and 144.

    Args:
        tokens: number of outliers and grid points together, half each.
        ratio: share of the patches kept as outliers, and again as grid, in [1e-6, 1/2]; default 1/8 if adaptive=False.
        adaptive: as in PruMerge.
        exact: with `tokens`, include the sum in the number.
        strict: with a fixed ratio, repeat a patch that is both outlier and grid point, and omit as many other patches
            with the lowest indices, as the official code does.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and self.ratio > 0.5:
            raise ValueError(f"ratio={self.ratio}: outliers and grid take it twice; give at most 1/2")

    def share(self, t: int, crops: int) -> float:
        if self.tokens is None:
            return super().share(t, crops)
        return max(self.target(crops), 2) / (2 * t)

    def example(self, n_visual: int, n_layers: int) -> tuple[list[int], list[int], str] | None:
        plan = None if self.adaptive else replace(self, strict=True).plan(n_visual, n_layers)
        once = "" if self.strict else "at most: a patch that is outlier and grid point is sent once"
        return None if plan is None else (plan, plan, once)

    def choose(self, score: Tensor, crops: int) -> tuple[Tensor, list[int]]:
        n, t = score.shape
        order = score.sort(dim=1, descending=True, stable=True).indices
        places = torch.arange(t, device=order.device)
        best: Tensor | int
        if self.adaptive:
            best = outliers(score).clamp(min=1)[:, None]  # (N, 1)
            regular = places % (t // best // 3).clamp(min=1) == 0
        else:
            ratio = self.share(t, crops)
            few, step = max(int(t * ratio + 1e-9), 1), int(1 / ratio + 1e-9)
            if self.strict:
                grid = torch.arange(step // 2, t - 1, step, device=order.device).expand(n, -1)
                kept = torch.cat([order[:, :few], grid], 1)
                return kept, [kept.shape[1]] * n
            best, regular = few, places % step == step // 2
        rank = inverse(order)
        first = rank < best
        chosen = first | regular & (places < t - 1)
        counts: list[int] = chosen.sum(1).tolist()
        key = torch.where(first, rank, t + places).masked_fill(~chosen, 2 * t)
        return key.sort(dim=1).indices[:, : max(counts)], counts

    def plan(self, n_visual: int, n_layers: int) -> list[int] | None:
        if self.tokens is not None and self.tokens >= n_visual:
            return [n_visual] * n_layers
        if self.adaptive or not self.strict:
            return None
        ratio = self.share(n_visual, 1)
        step = int(1 / ratio + 1e-9)
        return [max(int(n_visual * ratio + 1e-9), 1) + len(range(step // 2, n_visual - 1, step)) + 1] * n_layers
