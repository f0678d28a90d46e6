"""Divide a budget among parts in proportion to weights, on the device.

Shapes: B samples or images, P parts of each.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .selection import inverse


def proportional(weight: Tensor, total: Tensor, room: Tensor, first: Literal["weight", "fraction"]) -> Tensor:
    """Divide a total among parts in proportion to weights, with an upper limit for each part.

    Shares are rounded down, and the remainder is given out one by one. Amounts above the limit of a part are divided
    again among the parts that have room, until the whole total is given out or every part is full.

    Args:
        weight: (B, P) float, at least 0. If the weights of all parts with room are 0, their room is the weight.
        total: (B, 1) long, the total to divide.
        room: (B, P) long, the upper limit of each part.
        first: parts that get the remainder first: those with the largest weight ("weight"), or those with the largest
            fraction that was rounded off ("fraction"); ties are resolved by index.

    Returns:
        (B, P) long, the share of each part.
    """
    given = torch.zeros_like(room)
    for _ in range(weight.shape[1]):  # each round gives out the whole total or fills a part
        free = room - given
        left = total - given.sum(1, keepdim=True)  # (B, 1)
        some = weight * (free > 0)
        some = torch.where(some.sum(1, keepdim=True) > 0, some, free.to(weight.dtype))
        exact = some / some.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) * left
        share = exact.floor()
        priority = torch.where(free > 0, some if first == "weight" else exact - share, -1)
        rank = inverse(priority.sort(dim=1, descending=True, stable=True).indices)
        share = share.long() + (rank < left - share.long().sum(1, keepdim=True))
        given = given + torch.minimum(share, free)
    return given
