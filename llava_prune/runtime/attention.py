"""Attention of a few query positions, computed next to the layer.

The attention backend (eager, sdpa, flash) computes the layer's output. Only the attention of the query positions that a
method asks for is computed a second time, so an L x L matrix is never built.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..methods.views import EVERY
from ..ops.selection import Positions
from .compat import repeat_kv, rotate_half
from .decoder import heads


def head_group(attention: Any) -> Any:
    """Return the process group over which an attention module's heads are split, or None if it holds all heads.

    The key projection shows the split: under transformers' tensor parallelism its weight is a DTensor, under DeepSpeed
    it is a layer with an `mp_group`.
    """
    projection = attention.k_proj
    mesh = getattr(getattr(projection, "weight", None), "device_mesh", None)
    return getattr(projection, "mp_group", None) if mesh is None else mesh.get_group()


def all_heads(attention: Any, values: Tensor) -> Tensor:
    """Gather (B, H, ...) values of all heads from the heads of every process, in the head order of the whole model."""
    group = head_group(attention)
    if group is None:
        return values
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.cat(parts, 1)


def decoder_attention(
    layer: nn.Module,
    hidden: Tensor,
    rope: tuple[Tensor, Tensor],
    positions: Positions,
    valid: Tensor | None,
    keys: Tensor | None = None,
    queries: Tensor | None = None,
    kernels: Any = None,
) -> Tensor:
    """Compute the softmax attention of some query positions in a decoder layer.

    Args:
        layer: decoder layer of a supported language model, see `decoder.ARCHITECTURES`.
        hidden: (B, L, D) input of the layer, on the layer's device.
        rope: cosine and sine of the rotary embedding, (B or 1, L, dh) each.
        positions: query positions: a slice with start and stop, or (Q,) long.
        valid: (B, L) bool, or None if no position is padding.
        keys: (B, KV, L, dh) keys with rotary embedding, as in the KV cache; None to compute them.
        queries: (B, Q, H dh) query projections of the layer; None to compute them.
        kernels: see `View.kernels`.

    Returns:
        (B, H, Q, L) float32.
    """
    attn: Any = layer.self_attn
    norm: Any = layer.input_layernorm
    length = hidden.shape[1]
    cos, sin = rope
    if keys is None:
        states = norm(hidden)
        keys = _project_keys(attn, states, rope)
        queries = attn.q_proj(states[:, positions]) if queries is None else queries
    elif queries is None:
        queries = attn.q_proj(norm(hidden[:, positions]))
    transposed = repeat_kv(keys, attn.num_key_value_groups).transpose(2, 3)  # (B, H, dh, L)
    query = heads(attn, "q", queries)  # (B, H, Q, dh)
    if kernels is not None and isinstance(positions, slice) and not queries.requires_grad:
        flat = query.transpose(1, 2).flatten(2)  # (B, Q, H dh)
        query = kernels.turned(flat, cos[:, positions], sin[:, positions], query.shape[1])
        attention: Tensor = kernels.attention(query @ transposed, attn.scaling, positions.start, valid)
        return all_heads(attn, attention)
    score = (_rotate(query, cos[:, positions], sin[:, positions]) @ transposed).mul_(attn.scaling)  # (B, H, Q, L)
    lowest = torch.finfo(score.dtype).min
    if isinstance(positions, slice):
        if length - positions.start > 1:
            count = positions.stop - positions.start, length - positions.start
            score[..., positions.start :].masked_fill_(_future(*count, score.device), lowest)
    else:
        score.masked_fill_(torch.arange(length, device=positions.device) > positions[:, None], lowest)
    if valid is not None:
        score.masked_fill_(~valid[:, None, None], lowest)
    return all_heads(attn, score.softmax(-1, dtype=torch.float32))


def decoder_keys(layer: nn.Module, hidden: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor | None) -> Tensor:
    """Return (B, KV, L, dh) keys of all heads with rotary embedding; arguments as in `decoder_attention`."""
    attn: Any = layer.self_attn
    norm: Any = layer.input_layernorm
    return all_heads(attn, _project_keys(attn, norm(hidden), rope) if keys is None else keys)


def _project_keys(attn: Any, states: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return (B, KV, L, dh) keys of this process's heads from normed (B, L, D) states."""
    return _rotate(heads(attn, "k", attn.k_proj(states)), *rope)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding, cosine and sine (B or 1, Q, dh), to (B, H, Q, dh) states."""
    return states * cos.unsqueeze(1) + rotate_half(states) * sin.unsqueeze(1)


@functools.cache
@torch.inference_mode(False)
def _future(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the (queries, keys) bool causal mask, True where a key is later than the query.

    The first key and the first query have the same position.

    The masks are cached permanently, since captured prefills read them in place. Each takes a few kilobytes.
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu_(1)


@dataclass(frozen=True)
class RecordedAttention:
    """Attention, keys and queries recorded in one block of the vision tower.

    Attributes:
        attention: (N, H, Q, 1 + T) float32, softmax attention of the recorded query positions.
        keys: (N, H, 1 + T, dh) keys of all positions.
        queries: (N, H, Q, dh) queries of the recorded positions.
    """

    attention: Tensor
    keys: Tensor
    queries: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention, self.keys, self.queries

    def map(self, change: Callable[[Tensor], Tensor]) -> RecordedAttention:
        """Return a copy with `change` applied to every tensor."""
        return RecordedAttention(*map(change, self.tensors()))

    @staticmethod
    def joined(several: Sequence[RecordedAttention], join: Callable[[list[Tensor]], Tensor]) -> RecordedAttention:
        """Join several recordings of a block into one; `join` is torch.cat or torch.stack."""
        parts = zip(*(r.tensors() for r in several), strict=True)
        return RecordedAttention(*(join(list(part)) for part in parts))


@dataclass(frozen=True)
class TowerParts:
    """What the attention of a vision tower's block is computed from.

    Attributes:
        norm: the norm before the attention.
        q_proj, k_proj: query and key projections.
        head_dim: dh, size of a head.
        scale: factor on the dot products.
    """

    norm: Any
    q_proj: Any
    k_proj: Any
    head_dim: int
    scale: float


def tower_parts(layer: Any) -> TowerParts:
    """Return the parts of a block of CLIP, SigLIP or DINOv2."""
    norm = getattr(layer, "layer_norm1", None) or layer.norm1
    attn = getattr(layer, "self_attn", None) or layer.attention
    inner = getattr(attn, "attention", None)
    if inner is not None:  # DINOv2 before transformers 5.18
        return TowerParts(norm, inner.query, inner.key, inner.attention_head_size, inner.scaling)
    return TowerParts(
        norm, attn.q_proj, attn.k_proj, attn.head_dim, attn.scale if hasattr(attn, "scale") else attn.scaling
    )


def tower_attention(layer: nn.Module, hidden: Tensor, positions: list[int]) -> RecordedAttention:
    """Compute softmax attention, keys and queries of some query positions in a block of a vision tower.

    Args:
        layer: block of CLIP, SigLIP or DINOv2.
        hidden: (N, K, Dv) input of the block; K is 1 + T with a class token.
        positions: query positions, position 0 being the class token; [EVERY] for the mean over all query positions.
    """
    attn = tower_parts(layer)
    n, length = hidden.shape[:2]
    states = attn.norm(hidden)
    keys = attn.k_proj(states).view(n, length, -1, attn.head_dim).transpose(1, 2)  # (N, H, K, dh)
    # a list as an index would be copied to the device, and the host would wait for it
    asked = states if positions == [EVERY] else torch.cat([states.narrow(1, p, 1) for p in positions], 1)
    query = attn.q_proj(asked).view(n, asked.shape[1], -1, attn.head_dim).transpose(1, 2)  # (N, H, Q, dh)
    if positions == [EVERY]:  # one image at a time, since each needs a K x K matrix per head
        parts = [
            (q @ k.mT * attn.scale).softmax(-1, dtype=torch.float32).mean(1) for q, k in zip(query, keys, strict=True)
        ]
        attention, query = torch.stack(parts)[:, :, None], query.mean(2, keepdim=True)  # (N, H, 1, K), (N, H, 1, dh)
    else:
        attention = (query @ keys.transpose(2, 3) * attn.scale).softmax(-1, dtype=torch.float32)
    return RecordedAttention(attention, keys, query).map(functools.partial(all_heads, attn))


def catch_mlp_input(layer: nn.Module, wanted: bool) -> AbstractContextManager[list[Tensor]]:
    """Catch the input of a decoder layer's MLP while the layer runs in this thread, as a list of one (B, L, D) tensor.

    The list stays empty if `wanted` is False.
    """
    norm: Any = layer.post_attention_layernorm
    return output_of(norm, lambda x: x) if wanted else nullcontext([])


def catch_queries(layer: nn.Module, positions: Positions | None) -> AbstractContextManager[list[Tensor]]:
    """Catch query projections while a decoder layer runs in this thread, as a list of one (B, Q, H dh) tensor.

    The list stays empty if `positions` is None.
    """
    attn: Any = layer.self_attn
    if positions is None:
        return nullcontext([])
    return output_of(attn.q_proj, lambda x: x[:, positions].clone())  # a view would keep all positions in memory


@contextmanager
def output_of(module: nn.Module, pick: Callable[[Any], Tensor]) -> Iterator[list[Tensor]]:
    """Yield a list that receives `pick(output)` whenever the module runs in this thread; it is empty before."""
    box: list[Tensor] = []
    thread = threading.get_ident()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            box[:] = [pick(output).detach()]

    hook = module.register_forward_hook(keep)
    try:
        yield box
    finally:
        hook.remove()
