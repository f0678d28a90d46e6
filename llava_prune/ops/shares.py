"""Share a budget among parts in proportion to weights, on the device.

Shapes: B samples or images, P parts of each.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .selection import inverse


def proportional(weight: Tensor, total: Tensor, room: Tensor, first: Literal["weight", "fraction"]) -> Tensor:
    """Shares of a total: rounded down, the remainder one each, and what a part has no room for to the others.

    What does not fit is shared again among the parts that have room, until all of the total is given out or every
    part is full.

    Args:
        weight: (B, P) float, at least 0. Where those of all parts with room are 0, their room is the weight.
        total: (B, 1) long.
        room: (B, P) long, the most that each part takes.
        first: parts that get the remainder first: those of the largest weight, or of the largest fraction that was
            rounded off; ties go by index.

    Returns:
        (B, P) long.
    """
    given = torch.zeros_like(room)
    for _ in range(weight.shape[1]):  # each round gives everything out or fills a part
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
