"""VisionZip: keep dominant patches by class-token attention and compress the others into contextual tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.selection import descending_rank, take, true_first
from .base import Method, MethodInfo
from .checks import choice, integer, shown
from .registry import register
from .views import MERGED, VisionCut, VisionView, per_crop


def contextual_tokens(features: Tensor, metric: Tensor, rest: Tensor, contextual: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compress patches into `contextual` tokens: evenly spaced targets, each plus the mean of its nearest patches.

    Args:
        features: (N, T, Dv) patch features.
        metric: (N, T, d) keys, which are compared by cosine.
        rest: (N, R) long, patches to compress, ascending.
        contextual: number of tokens to make, 1 to R.

    Returns:
        (N, contextual, Dv) tokens in raster order; (N, contextual) long, their target patches; (N, R) long, the token
        to which each patch of `rest` belongs.
    """
    stride = max(1, rest.shape[1] // contextual)
    places = torch.arange(contextual, device=rest.device) * stride
    keys = take(metric.float(), rest)  # (N, R, d)
    keys = torch.nn.functional.normalize(keys, dim=2)
    label = (keys @ keys[:, places].transpose(1, 2)).argmax(2)  # (N, R)
    states = take(features, rest)  # (N, R, Dv)
    member = torch.nn.functional.one_hot(label, contextual).float()  # (N, R, C)
    member[:, places] = 0  # targets do not count as members
    total = member.transpose(1, 2) @ states.float()
    mean = total / member.sum(1).clamp(min=1)[..., None]
    slots = torch.arange(contextual, device=rest.device)
    label = label.index_copy(1, places, slots.expand(rest.shape[0], -1))
    return states[:, places] + mean.to(states.dtype), rest[:, places], label


def _groups(order: Tensor, token: Tensor) -> Tensor:
    """Return (N, T) long, the groups of a `VisionCut`: `token` (N, R) for the last R patches of `order`, else -1."""
    rest = order[:, order.shape[1] - token.shape[1] :]
    return torch.full_like(order, -1).scatter(1, rest, token)


@register("visionzip", presets={"default": {"dominant": 191, "contextual": 30}})
@dataclass(frozen=True)
class VisionZip(Method):
    """Keep the class token, the patches with its largest attention, and contextual tokens made of the other patches.

    Score: attention of the class token in the block whose output is the feature map, mean over heads (the official
    sum ranks the same). The other patches are assigned to evenly spaced targets by the cosine of their keys in that
    block (mean over heads, then normalised). A contextual token is its target PLUS the mean of its members, as in the
    official code, not a mean over all. Source: official code 3151f6d. Deviations: ties of the score are resolved by
    index, and contextual=0 prunes only. Images in crops: the same in each crop, without newline tokens and unpadding; a
    budget of all tokens keeps the image unchanged.

    Budgets: 192, 128 and 64 are the paper's 162+30, 108+20 and 54+10 as others transcribe it; 32, 640, 320 and 160 are
    those of LightCompress. 288, 144 and 58 are not published; as an interpretation, the share is the same, contextual =
    round(5 tokens / 32). Preset "default" is the official function's default, 191+30.

    Args:
        tokens: dominant and contextual tokens together, split as above; each crop gets tokens // (largest number of
            crops of the model). Default 64 if the other two are not given.
        dominant: dominant tokens of each image or crop, including the class token; default 191 if only `contextual` is
            given.
        contextual: contextual tokens of each image or crop; default 30 if only `dominant` is given.
        keep_cls: False keeps one more patch instead of the class token, which LLaVA does not see in training.
    """

    tokens: int | None = None
    dominant: int | None = None
    contextual: int | None = None
    keep_cls: bool = True

    info = MethodInfo(
        paper="VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025",
        where="before the language model, by the vision tower's class-token attention and keys",
        source="dvlab-research/VisionZip @ 3151f6d",
        licence="Apache-2.0",
    )
    requires = frozenset({"class token"})
    fixes_budget = ("dominant", "contextual")
    makes_tokens = True
    positions = "renumber"
    decode = "cache"

    def __post_init__(self) -> None:
        choice("keep_cls", self.keep_cls, (True, False))
        explicit = self.dominant is not None or self.contextual is not None
        if explicit and self.tokens is not None:
            raise ValueError(
                f"tokens={shown(self.tokens)} splits itself; give either tokens or dominant and contextual"
            )
        if not explicit:
            object.__setattr__(self, "tokens", 64 if self.tokens is None else self.tokens)
            integer("tokens", self.tokens, 1)
            return
        object.__setattr__(self, "dominant", 191 if self.dominant is None else self.dominant)
        object.__setattr__(self, "contextual", 30 if self.contextual is None else self.contextual)
        integer("dominant", self.dominant, 1)
        integer("contextual", self.contextual)

    def split(self, crops: int = 1) -> tuple[int, int]:
        """Return (dominant, contextual) of each image or crop."""
        if self.tokens is None:
            assert self.dominant is not None and self.contextual is not None
            return self.dominant, self.contextual
        total = per_crop(self.tokens, crops)
        contextual = (10 * total + 32) // 64  # 5/32 of the total, halves rounded up
        return total - contextual, contextual

    def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
        return {feature_layer: [0]}

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        n, t = view.features.shape[:2]
        dominant, contextual = self.split(view.crops)
        if self.tokens is not None and dominant + contextual >= t:
            return None
        patches = dominant - self.keep_cls
        if patches + contextual > t:
            raise ValueError(
                f"dominant={dominant}, contextual={contextual}: there are {t} patches, so give at most "
                f"{t + self.keep_cls} together"
            )
        score = view.class_attention()  # (N, T)
        best = descending_rank(score, score == score) < patches
        order = true_first(best)  # dominant patches, then the rest, ascending
        tokens = [take(view.features, order[:, :patches])]
        ids = [order[:, :patches]]
        if self.keep_cls:
            assert view.cls is not None
            tokens.insert(0, view.cls[:, None].to(view.features.dtype))
            ids.insert(0, order.new_full((n, 1), MERGED))
        groups = None
        if contextual:
            (keys,) = view.keys.values()  # (N, H, 1 + T, dh)
            metric = keys.mean(1)[:, 1:].to(order.device)  # (N, T, dh)
            made, _, label = contextual_tokens(view.features, metric, order[:, patches:], contextual)
            tokens.append(made)
            ids.append(order.new_full((n, contextual), MERGED))
            groups = functools.partial(_groups, order, label + dominant)
        features = torch.cat(tokens, 1)
        live = torch.ones_like(features[..., 0], dtype=torch.bool)
        return VisionCut(live, features, torch.cat(ids, 1), counts=[live.shape[1]] * n, groups=groups)

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [min(self.tokens, n_visual) if self.tokens is not None else sum(self.split())] * n_layers
