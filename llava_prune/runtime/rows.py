"""Attention of a few query rows, computed beside the layer.

The real backend (eager, sdpa, flash) makes the layer's output; only the rows a method asks for are scored again,
so no L x L map exists anywhere.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.fused import kernels_for
from ..core.types import ColumnIndex
from .compat import repeat_kv, rotate_half


def text_rows(
    layer: nn.Module,
    hidden: Tensor,
    rope: tuple[Tensor, Tensor],
    rows: ColumnIndex,
    valid: Tensor | None,
    keys: Tensor | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """Softmax attention of `rows` in a decoder layer.

    Args:
        layer: Llama decoder layer.
        hidden: (B, L, D) input of the layer.
        rope: cosine and sine, each (B or 1, L, dh).
        rows: a slice with start and stop, or (R,) long.
        valid: (B, L) bool, or None when every row is live.
        keys: (B, KV, L, dh) keys with rotary positions, as the cache holds them; None computes them.
        queries: (B, R, H dh) projections of the rows, as the layer made them; None computes them.

    Returns:
        (B, H, R, L) float32.
    """
    attn: Any = layer.self_attn
    norm: Any = layer.input_layernorm
    batch, length = hidden.shape[:2]
    cos, sin = rope
    if keys is None:
        states = norm(hidden)
        keys = attn.k_proj(states).view(batch, length, -1, attn.head_dim).transpose(1, 2)
        keys = _turned(keys, cos, sin)
        queries = attn.q_proj(states[:, rows]) if queries is None else queries
    elif queries is None:
        queries = attn.q_proj(norm(hidden[:, rows]))
    columns = repeat_kv(keys, attn.num_key_value_groups).transpose(2, 3)  # (B, H, dh, L)
    kernels = kernels_for(queries)
    if kernels is not None and isinstance(rows, slice):
        query = kernels.turned(queries, cos[:, rows], sin[:, rows], queries.shape[2] // attn.head_dim)
        probs: Tensor = kernels.attention(query @ columns, attn.scaling, rows.start, valid)
        return probs
    query = queries.view(*queries.shape[:2], -1, attn.head_dim).transpose(1, 2)  # (B, H, R, dh)
    score = (_turned(query, cos[:, rows], sin[:, rows]) @ columns).mul_(attn.scaling)  # (B, H, R, L)
    lowest = torch.finfo(score.dtype).min
    if isinstance(rows, slice):
        if length - rows.start > 1:
            count = rows.stop - rows.start, length - rows.start
            score[..., rows.start :].masked_fill_(_future(*count, score.device), lowest)
    else:
        score.masked_fill_(torch.arange(length, device=rows.device) > rows[:, None], lowest)
    if valid is not None:
        score.masked_fill_(~valid[:, None, None], lowest)
    return score.softmax(-1, dtype=torch.float32)


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, R, dh) with rotary positions, whose cosine and sine are (B or 1, R, dh)."""
    return states * cos.unsqueeze(1) + rotate_half(states) * sin.unsqueeze(1)


@functools.cache
@torch.inference_mode(False)
def _future(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) bool, what a row does not see of the columns that begin with its first row's own.

    A few kilobytes for each number of text rows, kept for good: recorded prefills read it where it is.
    """
    return torch.ones(rows, columns, dtype=torch.bool, device=device).triu_(1)


@dataclass(frozen=True)
class Tap:
    """What one tower block shows: softmax rows (N, H, R, 1 + T) float32, keys (N, H, 1 + T, dh), queries (N, H, R, dh).

    A picture of its own has no first dimension.
    """

    probs: Tensor
    keys: Tensor
    queries: Tensor

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.probs, self.keys, self.queries

    @staticmethod
    def joined(taps: Sequence[Tap], join: Callable[[list[Tensor]], Tensor]) -> Tap:
        """Several taps of a block as one; `join` is torch.cat or torch.stack."""
        return Tap(*(join(list(part)) for part in zip(*(t.parts() for t in taps), strict=True)))


def vision_rows(layer: nn.Module, hidden: Tensor, rows: list[int]) -> Tap:
    """Softmax attention of `rows` in a CLIP encoder layer, with the layer's keys and the rows' queries.

    Args:
        layer: CLIP encoder layer.
        hidden: (N, 1 + T, Dv) input of the layer.
        rows: query rows, 0 being the class token.
    """
    attn: Any = layer.self_attn
    norm: Any = layer.layer_norm1
    n, length = hidden.shape[:2]
    states = norm(hidden)
    keys = attn.k_proj(states).view(n, length, -1, attn.head_dim).transpose(1, 2)
    query = attn.q_proj(states[:, rows]).view(n, len(rows), -1, attn.head_dim).transpose(1, 2)
    return Tap((query @ keys.transpose(2, 3) * attn.scale).softmax(-1, dtype=torch.float32), keys, query)


def middle_of(layer: nn.Module, wanted: bool) -> AbstractContextManager[list[Tensor]]:
    """Catch what a decoder layer's MLP is given while it runs in this thread: a list of one tensor (B, L, D)."""
    norm: Any = layer.post_attention_layernorm
    return _output(norm, lambda x: x) if wanted else nullcontext([])


def queries_of(layer: nn.Module, rows: ColumnIndex | None) -> AbstractContextManager[list[Tensor]]:
    """Catch the query projections of `rows` while a decoder layer runs in this thread: a list of one (B, R, H dh)."""
    attn: Any = layer.self_attn
    if rows is None:
        return nullcontext([])
    return _output(attn.q_proj, lambda x: x[:, rows].clone())  # a slice would keep all rows alive


@contextmanager
def _output(module: nn.Module, pick: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """A list that holds `pick` of the module's output after it ran in this thread; empty before."""
    box: list[Tensor] = []
    thread = threading.get_ident()

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        if threading.get_ident() == thread:
            box[:] = [pick(output.detach())]

    hook = module.register_forward_hook(keep)
    try:
        yield box
    finally:
        hook.remove()
