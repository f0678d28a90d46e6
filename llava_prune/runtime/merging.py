"""A vision tower whose blocks merge tokens between attention and MLP."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Method
from ..ops.merging import Merge, merge_tokens
from .attention import all_heads


@dataclass
class Merging:
    """Tokens of a tower that merges, the class token being the first.

    Attributes:
        size: (N, t) float32, patches in each token now.
        groups: (N, 1 + T) long, the token that each of the first block's tokens is in now.
        merged: whether any token stands for several.
    """

    size: Tensor
    groups: Tensor
    merged: bool = False

    @staticmethod
    def fresh(n: int, t: int, device: torch.device) -> Merging:
        return Merging(torch.ones(n, t, device=device), torch.arange(t, device=device).expand(n, t))

    def apply(self, merge: Merge, hidden: Tensor) -> Tensor:
        """(N, t', D) states after a merge, which is noted."""
        states, self.size, self.groups = merge_tokens(merge, hidden, self.size, self.groups)
        self.merged = True
        return states


@dataclass(frozen=True)
class Tower:
    """What a method's demands on the vision tower are checked against.

    Attributes:
        kind: "CLIP", "SigLIP", "DINOv2", or the class name of another tower.
        leading: tokens before the patches; None where that is not known.
        depth: number of blocks.
        feature_layer: 0-based block whose output is the feature map; -1 where features of several layers are joined.
        grid: (rows, columns) of patches.
        features: features of an image that the projector gets: the patches, or one more with the class token.
        crops: largest number of crops an image is cut into, 1 where images are seen whole.
        padded: whether images are padded to a square, so that patches may show padding.
    """

    kind: str
    leading: int | None
    depth: int
    feature_layer: int
    grid: tuple[int, int]
    features: int
    crops: int = 1
    padded: bool = False

    @property
    def class_token(self) -> bool:
        """Whether position 0 is a class token that methods rank patches by: that of CLIP."""
        return self.kind == "CLIP"

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


def merges_of(method: Method, tower: Tower) -> tuple[int, ...]:
    """Tokens to merge away in each block up to the last that merges any; () when the tower is unchanged."""
    if tower.feature_layer < 0:
        return ()
    counts = tuple(method.merge_schedule(tower.feature_layer, tower.patches))[: tower.feature_layer + 1]
    last = max((b for b, n in enumerate(counts) if n), default=-1)
    return counts[: last + 1]


def variant_of(method: Method, tower: Tower) -> Hashable:
    """Names the tower that `method` makes; None for the tower as it is, whose features methods may share."""
    return repr(method) if merges_of(method, tower) else None


def merging_block(layer: Any, method: Method, count: int, state: Merging, hidden: Tensor) -> Tensor:
    """A CLIP encoder layer that merges `count` tokens between attention and MLP.

    Attention is proportional (unless the method's `prop_attn` is False): the log of each key's size is added to the
    scores once tokens stand for several patches. The bias is the same for all queries. The tower's own attention
    implementation is not used, since flash kernels take no bias.

    Args:
        layer: CLIP encoder layer.
        hidden: (N, t, Dv).

    Returns:
        (N, t', Dv).
    """
    attn = layer.self_attn
    n, t = hidden.shape[:2]
    states = layer.layer_norm1(hidden)
    query, keys, values = (
        f(states).view(n, t, -1, attn.head_dim).transpose(1, 2) for f in (attn.q_proj, attn.k_proj, attn.v_proj)
    )  # (N, H, t, dh) each
    bias = None
    if state.merged and getattr(method, "prop_attn", True):
        bias = state.size.log().to(query.dtype)[:, None, None]  # (N, 1, 1, t)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=attn.scale)
    hidden = hidden + attn.out_proj(mixed.transpose(1, 2).flatten(2))
    if count:
        hidden = state.apply(method.merge(all_heads(attn, keys), count), hidden)
    return hidden + layer.mlp(layer.layer_norm2(hidden))
