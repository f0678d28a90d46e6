"""Costs on a grid and entropic transport between two sets of tokens, for batches of unequal size."""

from __future__ import annotations

import torch
from torch import Tensor


def feature_cost(source: Tensor, target: Tensor) -> Tensor:
    """(B, V, V) squared distances."""
    return torch.cdist(source, target).square()


def patch_places(pictures: int, grid: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Places of patches by name, (N, T) float32 each.

    "x", "y": column and row in the patch's own picture or crop; "crop": its number, from 1; "off": distance to the
    centre.

    Args:
        pictures: N, pictures or crops.
        grid: (height, width) in patches.
        device: of the tensors.
    """
    height, width = grid
    place = torch.arange(height * width, device=device, dtype=torch.float32).expand(pictures, -1)
    x, y = place % width, (place / width).floor()
    crop = torch.arange(1, pictures + 1, device=device, dtype=torch.float32)[:, None].expand_as(place)
    off = ((x - (width - 1) / 2) ** 2 + (y - (height - 1) / 2) ** 2).sqrt()
    return {"x": x, "y": y, "crop": crop, "off": off}


def grid_distance(x: Tensor, y: Tensor, crop: Tensor) -> Tensor:
    """(B, V, V) squared distances on the grid; patches of different pictures or crops are infinitely far."""
    square = (x[:, :, None] - x[:, None]).square() + (y[:, :, None] - y[:, None]).square()
    return square.masked_fill(crop[:, :, None] != crop[:, None], torch.inf)


def unit_range(values: Tensor, live: Tensor) -> Tensor:
    """Min-max to 0..1 over the live entries of a sample; 0 where all are equal."""
    flat, mask = values.flatten(1), live.flatten(1)
    low = flat.masked_fill(~mask, torch.inf).amin(1)
    high = flat.masked_fill(~mask, -torch.inf).amax(1)
    shape = (-1, *[1] * (values.ndim - 1))
    spread = (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    return ((values - low.view(shape)) / spread.view(shape)).masked_fill(~live, 0)


def transport(cost: Tensor, live: Tensor, eps: float, tau: float, iterations: int) -> Tensor:
    """The plan diag(u) exp(-C / eps) diag(v), uniform marginals, log-domain.

    Each iteration takes a row step damped by `tau`, u = (p / K v)^tau, then the exact column step.

    Args:
        cost: (B, V, V).
        live: (B, V) bool.
        eps: regularisation.
        tau: damping of the row step.
        iterations: at least 1.

    Returns:
        (B, V, V), 0 where row or column is not live. Columns sum to their marginal exactly.
    """
    pair = live[:, :, None] & live[:, None]
    kernel = (-cost / eps).masked_fill(~pair, -1e30)
    mass = -live.sum(1, keepdim=True).clamp(min=1).to(cost.dtype).log()  # (B, 1) log of the uniform marginal
    u = v = torch.zeros_like(kernel[:, 0])
    for _ in range(iterations):
        if tau:
            u = (tau * (mass - (kernel + v[:, None]).logsumexp(2))).masked_fill(~live, 0)
        v = (mass - (kernel + u[..., None]).logsumexp(1)).masked_fill(~live, 0)
    return (kernel + u[..., None] + v[:, None]).exp().masked_fill(~pair, 0)
