"""ToMe: merge the most similar tokens in every block of the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.merging import Merge, merge_tokens
from ..ops.selection import inverse, take
from .base import Method, MethodInfo
from .checks import choice, integer, integers
from .registry import register
from .views import MERGED, VisionCut, VisionView

PRESETS: dict[str, dict[str, Any]] = {f"decreasing-{t}": {"tokens": t, "shape": "decreasing"} for t in (192, 128, 64)}
PRESETS |= {f"output-{t}": {"tokens": t, "reading": "output"} for t in (192, 128, 64)}
PRESETS |= {"constant-16": {"schedule": (16,) * 24}}


def even_schedule(remove: int, blocks: int, t: int) -> list[int]:
    """Spread merges over blocks as evenly as possible, larger numbers first.

    A block merges at most half of its tokens; if this limits some blocks, the others merge more.

    Args:
        remove: tokens to merge away in all blocks together.
        blocks: number of blocks that may merge.
        t: tokens entering the first block, including the class token.

    Raises:
        ValueError: if that many tokens cannot be merged away.
    """

    def run(level: int) -> list[int]:
        out, left = [], t
        for _ in range(blocks):
            out.append(min(level, (left - 1) // 2))
            left -= out[-1]
        return out

    level = next((c for c in range(-(-remove // max(blocks, 1)), t) if sum(run(c)) >= remove), None)
    if level is None:
        least = t - 1 - sum(run(t))
        raise ValueError(
            f"tokens={t - 1 - remove}: {blocks} blocks of the tower, each merging at most half, leave {least} of "
            f"{t - 1} patches; give at least {least}"
        )
    out = run(level)
    for block in reversed(range(blocks)):
        out[block] -= min(1, sum(out) - remove)
    return out


def decreasing_schedule(remove: int, blocks: int, t: int) -> list[int]:
    """Spread merges over blocks with linearly decreasing numbers; arguments as in `even_schedule`.

    If the limit of half of a block's tokens makes the sum too small, the result is that of `even_schedule`.

    Raises:
        ValueError: if that many tokens cannot be merged away.
    """
    share = [2 * remove * (blocks - b) / (blocks * (blocks + 1)) for b in range(blocks)]
    out: list[int] = []
    left = t
    for b in range(blocks):
        want = round(sum(share[: b + 1])) - sum(out)
        out.append(min(want, (left - 1) // 2))
        left -= out[-1]
    return out if sum(out) == remove else even_schedule(remove, blocks, t)


def match(metric: Tensor, count: int, protect: bool = True) -> Merge:
    """Choose merges by bipartite matching of the tokens at even and at odd positions.

    Each token at an even position is matched with the most similar token at an odd position, and the `count` tokens
    with the most similar partners are merged into them. Several tokens may be merged into the same token; tokens at odd
    positions always remain. Ties are resolved by index. Source: the description of ToMe.

    Args:
        metric: (N, t, d) vectors to compare by cosine.
        count: number of tokens to merge; at most half of the tokens (without the class token) are merged.
        protect: whether token 0 is a class token, which is never merged.

    Returns:
        Merge; the kept tokens at even positions come first, then all tokens at odd positions.
    """
    n, t = metric.shape[:2]
    count = min(count, (t - protect) // 2)
    unit = torch.nn.functional.normalize(metric.float(), dim=2)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (N, A, B)
    if protect:
        similarity[:, 0] = -torch.inf
    best, partner = similarity.max(2)  # (N, A)
    order = best.sort(dim=1, descending=True, stable=True).indices
    merged, rest = order[:, :count], order[:, count:].sort(dim=1).values
    odd = torch.arange(1, t, 2, device=metric.device).expand(n, -1)
    return Merge(torch.cat([2 * rest, odd], 1), 2 * merged, rest.shape[1] + partner.gather(1, merged))


@register("tome", presets=PRESETS)
@dataclass(frozen=True)
class ToMe(Method):
    """Merge the most similar pairs of tokens in every block of the tower, between attention and MLP.

    Metric: keys of the block, mean over heads. Merged tokens are means weighted by size, log(size) is added to the
    attention scores, and the class token takes no part. Blocks after the one whose output is the feature map do not
    merge. Tokens are in the order of the last merge, not in raster order. No official LLaVA integration exists. This is
    written from the description of ToMe (its code is CC BY-NC and was not used), in interpretation (A) of the
    tables: merging inside the tower.

    For a budget, the merges are spread evenly ([17]*16 + [16]*7 for 192); the schedules for 7B and 13B are not
    published. Presets: "decreasing-192" has linearly decreasing numbers with the same sum; "output-192" is
    interpretation (B), which merges the final features without the class token, at most half of them in a step;
    "constant-16" is the setting r = 16 of third-party ports (208 tokens). Images in crops are refused, since their
    assembly needs complete grids.

    Args:
        tokens: visual tokens that remain. Default 64 if there is no schedule.
        schedule: tokens merged away in each block, 0 for missing entries; a block merges at most half of its tokens.
        shape: "even" or "decreasing", how the merges for `tokens` are spread over the blocks.
        reading: "tower", or "output" for interpretation (B), in which means are weighted by size and the metric is the
            keys of the last block.
        prop_attn: False does not add log(size) to the attention scores.
        order: "merge", or "raster" to sort the tokens by their first patch.
    """

    tokens: int | None = None
    schedule: Sequence[int] | None = None
    shape: Literal["even", "decreasing"] = "even"
    reading: Literal["tower", "output"] = "tower"
    prop_attn: bool = True
    order: Literal["merge", "raster"] = "merge"

    info = MethodInfo(
        paper="Token Merging: Your ViT But Faster, ICLR 2023",
        where="inside the vision tower, in every block up to the features",
        source="the description of facebookresearch/ToMe @ af95e4b; its use on LLaVA is a reading",
        licence="CC-BY-NC-4.0 (no code taken)",
        backends="eager, sdpa, flash; merging blocks of the tower run torch's scaled-dot-product kernels",
        batch="any; images in crops (anyres) are refused",
    )
    positions = "renumber"
    decode = "cache"
    requires = frozenset({"class token", "whole images"})
    fixes_budget = ("schedule",)
    makes_tokens = True

    def __post_init__(self) -> None:
        choice("shape", self.shape, ("even", "decreasing"))
        choice("reading", self.reading, ("tower", "output"))
        choice("order", self.order, ("merge", "raster"))
        choice("prop_attn", self.prop_attn, (True, False))
        if self.schedule is None:
            object.__setattr__(self, "tokens", 64 if self.tokens is None else self.tokens)
            integer("tokens", self.tokens, 1)
            return
        if self.tokens is not None or self.reading == "output":
            raise ValueError("a schedule fixes the number of tokens in the tower; leave tokens and reading out")
        object.__setattr__(self, "schedule", integers("schedule", self.schedule))

    def merge_schedule(self, feature_layer: int, n_patches: int) -> tuple[int, ...]:
        if self.schedule is not None:
            return tuple(self.schedule)
        assert self.tokens is not None
        if self.reading == "output" or self.tokens >= n_patches:
            return ()
        spread = even_schedule if self.shape == "even" else decreasing_schedule
        return tuple(spread(n_patches - self.tokens, feature_layer + 1, n_patches + 1))

    def merge(self, keys: Tensor, count: int) -> Merge:
        return match(keys.mean(1), count)

    def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
        return {feature_layer: [0]} if self.reading == "output" else {}

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        features, groups = view.features, view.groups
        if self.reading == "output":
            assert self.tokens is not None
            if self.tokens >= features.shape[1]:
                return None
            features, groups = self._after(view, self.tokens)
        if groups is None:
            return None
        n, k = features.shape[:2]
        patch = torch.arange(groups.shape[1], device=groups.device).expand_as(groups)  # (N, T)
        members = torch.nn.functional.one_hot(groups, k)  # (N, T, K)
        first = torch.where(members > 0, patch[..., None], groups.shape[1]).amin(1)  # (N, K)
        ids = torch.where(members.sum(1) == 1, first, MERGED)
        if self.order == "raster":
            order = first.sort(dim=1).indices
            features = take(features, order)
            ids = ids.gather(1, order)
            groups = inverse(order).gather(1, groups)
        live = torch.ones(n, k, dtype=torch.bool, device=features.device)
        return VisionCut(live, features, ids, counts=[k] * n, groups=lambda: groups)

    def _after(self, view: VisionView, tokens: int) -> tuple[Tensor, Tensor]:
        """Merge the final features, at most half of them in a step, until `tokens` are left (interpretation B)."""
        (keys,) = view.keys.values()
        features = view.features
        metric = keys.mean(1)[:, 1:].to(features.device, torch.float32)  # (N, T, dh)
        n, t = features.shape[:2]
        size = torch.ones(n, t, device=features.device)
        groups = torch.arange(t, device=features.device).expand(n, t)
        while features.shape[1] > tokens:
            step = match(metric, features.shape[1] - tokens, protect=False)
            metric = merge_tokens(step, metric, size, groups)[0]
            features, size, groups = merge_tokens(step, features, size, groups)
        return features, groups

    def plan(self, n_visual: int, n_layers: int) -> list[int] | None:
        return None if self.tokens is None else [min(self.tokens, n_visual)] * n_layers

    def example(self, n_visual: int, n_layers: int) -> tuple[list[int], list[int], str] | None:
        if self.schedule is None:
            return super().example(n_visual, n_layers)
        left = n_visual
        for r in self.schedule[:23]:
            left -= min(r, left // 2)
        return [left] * n_layers, [left] * n_layers, "a tower of 24 blocks, features after the 23rd"
