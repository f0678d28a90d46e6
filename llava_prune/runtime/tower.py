"""A vision tower whose blocks merge tokens between attention and MLP."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.method import Method
from .request import VISION, Merging


@dataclass(frozen=True)
class Tower:
    """What a method's demands on the tower are checked against.

    Attributes:
        depth: blocks.
        feature_layer: 0-based block whose output is the feature map.
        grid: (rows, columns) of patches.
        crops: most crops a picture is cut into, 1 where pictures are seen whole.
    """

    depth: int
    feature_layer: int
    grid: tuple[int, int]
    crops: int = 1


def merges_of(method: Method, tower: Tower) -> tuple[int, ...]:
    """Tokens to merge away in each block up to the last that merges any; () when the tower is left alone."""
    counts = tuple(method.tower(tower.feature_layer, tower.grid[0] * tower.grid[1]))[: tower.feature_layer + 1]
    last = max((b for b, n in enumerate(counts) if n), default=-1)
    return counts[: last + 1]


def variant_of(method: Method, tower: Tower) -> Hashable:
    """Names the tower that `method` makes; None for the tower as it is, whose features methods may share."""
    return repr(method) if merges_of(method, tower) else None


def merging_block(
    layer: Any, stock: Any, method: Method, count: int, first: bool, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Forward of a CLIP encoder layer that merges `count` tokens between attention and MLP.

    Attention is proportional (unless the method's `prop_attn` is False): the log of each key's size is added to the
    scores once tokens stand for several patches. That bias is one row for all queries. The tower's own attention
    implementation is not asked, since flash kernels take no bias.
    """
    vision = VISION.get()
    if vision is None:
        return stock(hidden_states, *args, **kwargs)
    attn, hidden = layer.self_attn, hidden_states
    n, t = hidden.shape[:2]
    if first:
        vision.merging.append(Merging.fresh(n, t, hidden.device))
    state = vision.merging[-1]
    states = layer.layer_norm1(hidden)
    query, keys, values = (
        f(states).view(n, t, -1, attn.head_dim).transpose(1, 2) for f in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    bias = None
    if state.merged and getattr(method, "prop_attn", True):
        bias = state.size.log().to(query.dtype)[:, None, None]  # (N, 1, 1, t)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=attn.scale)
    hidden = hidden + attn.out_proj(mixed.transpose(1, 2).flatten(2))
    if count:
        hidden = state.fold(method.fold(keys, count), hidden)
    return hidden + layer.mlp(layer.layer_norm2(hidden))
