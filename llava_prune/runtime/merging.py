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
    """The state of token merging inside a vision tower; the class token is the first token.

    Attributes:
        size: (N, t) float32, number of patches in each current token.
        groups: (N, 1 + T) long, the current token that contains each token of the first block.
        merged: whether any token stands for several patches.
    """

    size: Tensor
    groups: Tensor
    merged: bool = False

    @staticmethod
    def fresh(n: int, t: int, device: torch.device) -> Merging:
        return Merging(torch.ones(n, t, device=device), torch.arange(t, device=device).expand(n, t))

    def apply(self, merge: Merge, hidden: Tensor) -> Tensor:
        """Apply a merge to (N, t, D) states, update `size` and `groups`, and return the (N, t', D) states."""
        states, self.size, self.groups = merge_tokens(merge, hidden, self.size, self.groups)
        self.merged = True
        return states


@dataclass(frozen=True)
class Tower:
    """Facts about a vision tower, against which the requirements of a method are checked.

    Attributes:
        kind: "CLIP", "SigLIP", "DINOv2", or the class name of another tower.
        leading: number of tokens before the patches; None if it is not known.
        depth: number of blocks.
        feature_layer: 0-based block whose output is the feature map; -1 if features of several layers are joined.
        grid: (rows, columns) of patches.
        features: number of features of an image that the projector receives: its patches, plus the class token if the
            model keeps it.
        crops: largest number of crops into which an image is split, 1 if images are encoded whole.
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
        """Whether position 0 is a class token whose attention can rank patches, which only CLIP has."""
        return self.kind == "CLIP"

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


def merges_of(method: Method, tower: Tower) -> tuple[int, ...]:
    """Return the number of tokens to merge away in each block, up to the last block that merges any.

    The result is () if the method does not merge tokens in the tower.
    """
    if tower.feature_layer < 0:
        return ()
    counts = tuple(method.merge_schedule(tower.feature_layer, tower.patches))[: tower.feature_layer + 1]
    last = max((b for b, n in enumerate(counts) if n), default=-1)
    return counts[: last + 1]


def variant_of(method: Method, tower: Tower) -> Hashable:
    """Return a key of the features that a tower merging for `method` computes, None if the method does not merge.

    Methods that do not merge share the features of the unchanged tower.
    """
    return repr(method) if merges_of(method, tower) else None


def merging_block(layer: Any, method: Method, count: int, state: Merging, hidden: Tensor) -> Tensor:
    """Run a CLIP encoder layer that merges `count` tokens between attention and MLP.

    Attention is proportional unless the method's `prop_attn` is False: the log of each key's size is added to the
    attention scores once a token stands for several patches. The bias is the same for all queries. The tower's own
    attention implementation is not used, since flash kernels do not take a bias.

    Args:
        layer: CLIP encoder layer.
        method: the method that chooses the merges.
        count: number of tokens to merge away.
        state: the state of merging, which is updated.
        hidden: (N, t, Dv) input of the layer.

    Returns:
        (N, t', Dv) output of the layer.
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
