"""What text says of a picture: mutual information, attention, and which words look at it."""

from __future__ import annotations

import torch
from torch import Tensor

from .fused import kernels_for
from .types import ColumnIndex


def mutual_information(attention: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """I(V; T) in bit, for each head.

    With a the attention of T text rows on V visual columns (not renormalised over them), p = a / T and
    p_v = sum_t p: I = sum p log2 max(p / (p_v / T + 1e-6), 1e-6). The 1e-6 is the official code's and not
    negligible; the arithmetic here is float32 where the official one is the model's dtype.

    Args:
        attention: (B, H, R, L) float32.
        text: (B, R) bool, rows that are text.
        visual: (B, L) bool.

    Returns:
        (B, H) float32; 0 for a sample without text rows or without visual tokens, never NaN.
    """
    count = text.sum(1).clamp(min=1)[:, None, None, None]  # (B, 1, 1, 1)
    live = text[:, None, :, None] & visual[:, None, None]  # (B, 1, R, L)
    joint = torch.nan_to_num(attention.float()).masked_fill_(~live, 0).div_(count)  # in place: large, and ours
    column = joint.sum(2, keepdim=True)  # (B, H, 1, L)
    ratio = (joint / (column / count + 1e-6)).clamp_(min=1e-6)
    return ratio.log2_().mul_(joint).sum((2, 3))


def text_attention(attention: Tensor, text: Tensor) -> Tensor:
    """Attention on each column, mean over heads and over the text rows of a sample.

    Args:
        attention: (B, H, R, L) float32.
        text: (B, R) bool, or the `shares` of its rows, for who asks in every layer.

    Returns:
        (B, L) float32; a row whose attention is not finite in some head counts 0.
    """
    weight = text if text.is_floating_point() else shares(text)
    kernels = kernels_for(attention)
    if kernels is not None:
        looked: Tensor = kernels.looked_at(attention, weight)
        return looked
    return (weight[:, None] @ attention.mean(1).nan_to_num_())[:, 0]


def shares(text: Tensor) -> Tensor:
    """(B, R) float32: what each row counts in a mean over the rows that are `text`, (B, R) bool."""
    return text / text.sum(1, keepdim=True).clamp(min=1)


def last_attention(attention: Tensor, product: bool = False) -> Tensor:
    """Attention of the last row on each column, mean over heads.

    Args:
        attention: (B, H, R, L) float32.
        product: rank by the mean of the dot products instead: a head's log-softmax is its product less a constant of
            the row. Columns whose attention underflows tie.

    Returns:
        (B, L) float32.
    """
    row = attention[:, :, -1]  # (B, H, L)
    return (row.clamp(min=torch.finfo(row.dtype).tiny).log() if product else row).mean(1)


def attention_ranks(attention: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """(B,) rank of each sample's (text rows x visual columns) attention, mean over heads.

    Args:
        attention: (B, H, R, L) float32.
        text: (B, R) bool.
        visual: (B, L) bool.
    """
    matrix = attention.mean(1).masked_fill(~(text[:, :, None] & visual[:, None]), 0)  # (B, R, L)
    size = torch.maximum(text.sum(1), visual.sum(1)).float()  # torch's default tolerance, of the matrix without zeros
    return torch.linalg.matrix_rank(matrix, rtol=size * torch.finfo(matrix.dtype).eps)


def strongest_heads(attention: Tensor, text: Tensor, visual: Tensor, count: int) -> Tensor:
    """The `count` heads with the largest sum over text rows and visual columns.

    Args:
        attention: (B, H, R, L).
        text: (B, R) bool.
        visual: (B, L) bool.

    Returns:
        (B, count, R, L).
    """
    live = text[:, None, :, None] & visual[:, None, None]
    chosen = attention.masked_fill(~live, 0).sum((2, 3)).topk(count, dim=1).indices  # (B, count)
    return attention.gather(1, chosen[..., None, None].expand(-1, -1, *attention.shape[2:]))


def raters(hidden: Tensor, visual: Tensor, text: Tensor) -> Tensor:
    """Text tokens that vote.

    Args:
        hidden: (B, L, D) embeddings.
        visual: (B, L) bool.
        text: (B, R) bool, live ones among the last R columns.

    Returns:
        (B, R) bool: weight above the average; all of `text` where none is.
    """
    states = hidden.float()
    product = states @ states[:, -text.shape[1] :].transpose(1, 2)  # (B, L, R)
    share = product.masked_fill(~text[:, None], torch.finfo(product.dtype).min).softmax(2)
    picture = visual.to(share.dtype)
    weight = (share * picture[..., None]).sum(1) / picture.sum(1, keepdim=True).clamp(min=1)  # (B, R)
    average = weight.masked_fill(~text, 0).sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
    chosen = text & (weight > average)
    return torch.where(chosen.any(1, keepdim=True), chosen, text)


def rotary_ones(cos: Tensor, sin: Tensor, rows: ColumnIndex) -> Tensor:
    """(B or 1, R, L): 2 / sqrt(d) sum_k cos((p_i - p_j) theta_k), the scaled product of rotated vectors of ones."""
    half = cos.shape[-1] // 2
    turned = torch.cat([cos[..., :half] - sin[..., :half], cos[..., half:] + sin[..., half:]], -1).float()  # (B, L, dh)
    return turned[:, rows] @ turned.transpose(1, 2) / cos.shape[-1] ** 0.5
