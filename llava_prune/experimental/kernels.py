"""Triton kernels for the operations of a cut between two layers, a few instead of dozens of small ones.

Each function gives the same result as the plain torch function that it names, up to the order of float32 sums; shapes
and errors are described there. All samples of a batch must keep the same counts. Only `engine.py` imports this module,
since triton may be missing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-3.4028234663852886e38)
EDGE = tl.constexpr(-3e38)
"""The key of NaN, see `selection.descending_order`."""


def choose(
    score: Tensor, visual: Tensor, valid: Tensor, keep: int, recycle: int, clusters: int, width: int
) -> tuple[Tensor, Tensor]:
    """Compute `selection.descending_order`, `top` and `assemble` in one.

    Args:
        score: (B, L) float.
        visual, valid: (B, L) bool.
        keep, recycle, clusters: counts of each sample.
        width: L', number of tokens of each sample afterwards.

    Returns:
        (B, L') long, tokens in output order, indices from L on for merged ones; (B, recycle) long, the tokens with the
        best scores after the kept ones.
    """
    batch, length = score.shape
    score, visual, valid = score.contiguous(), visual.contiguous(), valid.contiguous()
    rank = torch.empty(batch, length, dtype=torch.int32, device=score.device)
    index = torch.empty(batch, width, dtype=torch.long, device=score.device)
    picked = torch.empty(batch, recycle, dtype=torch.long, device=score.device)
    _rank[batch, triton.cdiv(length, 64)](score, visual, rank, length, BLOCK=64, TILE=128)
    block = triton.next_power_of_2(max(length, clusters))
    _place[batch,](rank, visual, valid, index, picked, length, width, keep, recycle, clusters, BLOCK=block)
    return index, picked


@triton.jit(do_not_specialize=["length"])
def _rank(score, among, rank, length, BLOCK: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute ranks by score, best first, ties by column; columns not in `among` come last."""
    row = tl.program_id(0) * length
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = _key(score + row, among + row, j, length)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, TILE):
        i = start + tl.arange(0, TILE)
        other = _key(score + row, among + row, i, length)
        ahead = (other[:, None] > mine[None, :]) | ((other[:, None] == mine[None, :]) & (i[:, None] < j[None, :]))
        count += tl.sum(ahead.to(tl.int32), 0)
    tl.store(rank + row + j, count, mask=j < length)


@triton.jit
def _key(score, among, column, length):  # type: ignore[no-untyped-def]
    here = column < length
    key = tl.load(score + column, mask=here, other=0.0).to(tl.float32)
    key = tl.where(key == key, key, EDGE)
    key = tl.minimum(tl.maximum(key, EDGE), -EDGE)
    return tl.where(tl.load(among + column, mask=here, other=0) != 0, key, float("-inf"))


@triton.jit(do_not_specialize=["length", "width", "keep", "recycle", "clusters"])
def _place(  # type: ignore[no-untyped-def]
    rank, visual, valid, index, picked, length, width, keep, recycle, clusters, BLOCK: tl.constexpr
):
    """Write kept tokens in sequence order, merged tokens after the last visual token, right-aligned."""
    row = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    here = j < length
    place = tl.load(rank + row * length + j, mask=here, other=length)
    seen = tl.load(visual + row * length + j, mask=here, other=0) != 0
    live = tl.load(valid + row * length + j, mask=here, other=0) != 0
    stays = tl.where(here & ((seen & (place < keep)) | (~seen & live)), 1, 0)
    last = tl.max(tl.where(seen, j, 0), 0)
    after = tl.cumsum(stays, 0)
    shift = width - clusters - tl.sum(stays, 0)
    to = shift + after - 1 + tl.where(j > last, clusters, 0)
    tl.store(index + row * width + to, j.to(tl.int64), mask=(stays != 0) & (to >= 0))
    to = shift + tl.sum(tl.where(j <= last, stays, 0), 0) + j
    tl.store(index + row * width + to, (length + j).to(tl.int64), mask=(j < clusters) & (to >= 0))
    slot = place - keep
    tl.store(picked + row * recycle + slot, j.to(tl.int64), mask=here & (slot >= 0) & (slot < recycle))


def mean_of(rows: Tensor, index: Tensor, divisor: float) -> Tensor:
    """Return (B, 1, D): the rows (B, L, D) at `index` (B, Q), summed in float32 and divided, in the dtype of `rows`."""
    batch, length, width = rows.shape
    rows, index = rows.contiguous(), index.contiguous()
    out = torch.empty(batch, 1, width, dtype=rows.dtype, device=rows.device)
    _mean_of[batch, triton.cdiv(width, 128)](rows, index, out, length, width, index.shape[1], divisor, BLOCK=128)
    return out


@triton.jit(do_not_specialize=["length", "count", "divisor"])
def _mean_of(rows, index, out, length, width, count, divisor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    sample = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for q in range(0, count):
        row = tl.load(index + sample * count + q)
        total += tl.load(rows + (sample * length + row) * width + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + sample * width + column, (total / divisor).to(out.dtype.element_ty), mask=here)


def turned(queries: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Apply the rotary embedding to query projections.

    Args:
        queries: (B, R, H dh).
        cos, sin: (B or 1, R, dh) rotary embedding.
        heads: H, number of heads.

    Returns:
        (B, H, R, dh).
    """
    batch, count, width = queries.shape
    size = width // heads
    out = torch.empty(batch, heads, count, size, dtype=queries.dtype, device=queries.device)
    queries, cos, sin = queries.contiguous(), cos.contiguous(), sin.contiguous()
    step = 0 if cos.shape[0] == 1 else count * size
    block = triton.next_power_of_2(size)
    _turned[batch, count, heads](queries, cos, sin, out, count, heads, step, SIZE=size, BLOCK=block)
    return out


@triton.jit(do_not_specialize=["count", "step"])
def _turned(  # type: ignore[no-untyped-def]
    queries, cos, sin, out, count, heads, step, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    sample, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BLOCK)
    here = d < SIZE
    source = queries + ((sample * count + row) * heads + head) * SIZE
    half: tl.constexpr = SIZE // 2
    one = tl.load(source + d, mask=here, other=0.0).to(tl.float32)
    two = tl.load(source + tl.where(d < half, d + half, d - half), mask=here, other=0.0).to(tl.float32)
    table = sample * step + row * SIZE + d
    cosine = tl.load(cos + table, mask=here, other=0.0).to(tl.float32)
    sine = tl.load(sin + table, mask=here, other=0.0).to(tl.float32)
    value = one * cosine + tl.where(d < half, -two, two) * sine
    tl.store(out + ((sample * heads + head) * count + row) * SIZE + d, value.to(out.dtype.element_ty), mask=here)


def attention(score: Tensor, scale: float, start: int, valid: Tensor | None) -> Tensor:
    """Compute the causal softmax of query-key products.

    Args:
        score: (B, H, R, L) products, not scaled.
        scale: factor on the products.
        start: position of the first query row; the other rows follow.
        valid: (B or 1, L) bool, columns that may be attended to; None for all.

    Returns:
        (B, H, R, L) float32.
    """
    batch, heads, count, length = score.shape
    out = torch.empty(batch, heads, count, length, dtype=torch.float32, device=score.device)
    live = score if valid is None else valid.contiguous()
    step = 0 if valid is None or valid.shape[0] == 1 else length
    block = triton.next_power_of_2(length)
    _attention[batch, heads, count](
        score.contiguous(), live, out, scale, start, heads, count, length, step, MASKED=valid is not None, BLOCK=block
    )
    return out


@triton.jit(do_not_specialize=["scale", "start", "count", "length", "step"])
def _attention(  # type: ignore[no-untyped-def]
    score, live, out, scale, start, heads, count, length, step, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    sample, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    j = tl.arange(0, BLOCK)
    here = j < length
    base = ((sample * heads + head) * count + row).to(tl.int64) * length
    value = tl.load(score + base + j, mask=here, other=0.0).to(tl.float32) * scale
    seen = j <= start + row
    if MASKED:
        seen = seen & (tl.load(live + sample * step + j, mask=here, other=0) != 0)
    value = tl.where(here, tl.where(seen, value, LOWEST), float("-inf"))
    value = tl.exp(value - tl.max(value, 0))
    tl.store(out + base + j, value / tl.sum(value, 0), mask=here)


def looked_at(attention: Tensor, weight: Tensor) -> Tensor:
    """Compute `attention.text_attention` with the weights (B, R) float32 of the query positions."""
    batch, heads, count, length = attention.shape
    rows, columns = 4, 64
    parts = triton.cdiv(count, rows)
    out = torch.empty(batch, parts, length, dtype=torch.float32, device=attention.device)
    _looked_at[batch, parts, triton.cdiv(length, columns)](
        attention.contiguous(), weight.contiguous(), out, heads, count, length,
        ROWS=rows, HEADS=triton.next_power_of_2(heads), BLOCK=columns,
    )  # fmt: skip
    return out.sum(1)


@triton.jit(do_not_specialize=["count", "length"])
def _looked_at(  # type: ignore[no-untyped-def]
    attention, weight, out, heads, count, length, ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute the partial sum of a few rows; the caller adds the parts in a fixed order."""
    sample, part = tl.program_id(0), tl.program_id(1)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    h = tl.arange(0, HEADS)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(0, ROWS):
        row = part * ROWS + step
        limit = tl.where(row < count, length, 0)
        here = (h[:, None] < heads) & (j[None, :] < limit)
        at = ((sample * heads + h[:, None]) * count + row).to(tl.int64) * length + j[None, :]
        mean = tl.sum(tl.load(attention + at, mask=here, other=0.0), 0) / heads
        mean = tl.where(mean == mean, tl.minimum(tl.maximum(mean, LOWEST), -LOWEST), 0.0)
        total += mean * tl.load(weight + sample * count + tl.minimum(row, count - 1))
    parts = tl.num_programs(1)
    tl.store(out + (sample * parts + part) * length + j, total, mask=j < length)
