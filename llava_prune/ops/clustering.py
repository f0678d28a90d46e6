"""Recycle pruned tokens as means of density-peak clusters, for AutoPrune and SparseVLM.

Shapes: B samples, Q points, C clusters, L token positions, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .selection import per_sample, take, to_device

RECYCLED = 0.3
"""Share of the pruned tokens that is clustered; there is one cluster for every ten clustered tokens."""
EPS = 1e-6
"""Added to the size of a cluster before dividing by it."""
MATRIX_PRODUCT = 25
"""Number of points beyond which torch.cdist uses a matrix product by default."""


@functools.lru_cache(maxsize=8192)
def recycled(pruned: int, share: float = RECYCLED) -> tuple[int, int]:
    """Return (tokens clustered, clusters) for `pruned` dropped tokens; (0, 0) if no token is dropped or share is 0."""
    if pruned <= 0 or share <= 0:
        return 0, 0
    q = min(int(share * pruned) + 1, pruned)
    return q, min(q // 10 + 1, q)


def dpc_knn(points: Tensor, counts: Sequence[int], clusters: Sequence[int]) -> Tensor:
    """Run density-peak clustering with k nearest neighbours, k being the number of clusters.

    The density of a point is exp(-mean of the k smallest squared distances), including the distance to itself. Centres
    are the points with the largest product of density and distance to the nearest denser point. Exact ties are resolved
    by torch.topk. Source: specifications of AutoPrune and SparseVLM, without the official code's random noise of 1e-6
    on the density.

    Args:
        points: (B, Q, D); the first counts[b] rows of a sample are points, the others padding.
        counts: number of points of each sample.
        clusters: number of clusters of each sample, at most its number of points.

    Returns:
        (B, Q) long, the cluster of each point, numbered by descending centre score; -1 on padding.
    """
    size, device = points.shape[1], points.device
    n_max = max(max(clusters), 1)
    even = all(q == size for q in counts) and all(c == n_max for c in clusters)  # no padding, so no masks are needed
    distance = _distances(points.float(), counts).div_(points.shape[2] ** 0.5)  # (B, Q, Q)
    numbers = torch.arange(n_max, device=device).expand(points.shape[0], -1)  # (B, C)
    if even:
        density = _density(distance.topk(n_max, dim=2, largest=False).values, n_max)
        delta = _to_denser(distance, density, distance.amax((1, 2), keepdim=True), None)
        centre = _centres(density * delta, counts, clusters)  # (B, C)
        label = distance.gather(2, centre[:, None].expand(-1, size, -1)).argmin(2)
        return label.scatter_(1, centre, numbers)  # each centre belongs to its own cluster
    slots = torch.arange(size, device=device)
    real = (slots < per_sample(counts, points)).expand(points.shape[:2])  # (B, Q)
    pair = real[:, None] & real[:, :, None]  # (B, Q, Q)
    nearest = distance.masked_fill(~pair, torch.inf).topk(min(n_max, size), dim=2, largest=False).values
    used = slots[: nearest.shape[2]] < per_sample(clusters, points)  # (B, K)
    nearest = nearest.masked_fill_(~(used[..., None, :] & real[:, :, None]), 0)
    density = _density(nearest, per_sample([max(c, 1) for c in clusters], points)).masked_fill_(~real, -1.0)
    farthest = distance.masked_fill(~pair, 0).amax((1, 2), keepdim=True)
    delta = _to_denser(distance, density, farthest, pair)
    centre = _centres(density * delta, counts, clusters)  # (B, C), Q for no centre
    to_centre = distance.gather(2, centre.clamp(max=size - 1)[:, None].expand(-1, size, -1))  # (B, Q, C)
    label = to_centre.masked_fill_((centre >= size)[:, None], torch.inf).argmin(2)
    label = torch.cat([label, label[:, :1]], 1)  # an extra column, which entries without a centre write to
    return label.scatter_(1, centre, numbers)[:, :size].masked_fill(~real, -1)


def _distances(points: Tensor, counts: Sequence[int]) -> Tensor:
    """Return (B, Q, Q) Euclidean distances of the points, (B, Q, D), of which counts[b] are real.

    Each sample is computed as torch.cdist, which the official code calls, computes it alone: by a matrix product for
    more than MATRIX_PRODUCT points. Its rounding leaves small distances from a point to itself, which can break ties.
    """

    def computed(product: bool) -> Tensor:
        mode = "use_mm_for_euclid_dist" if product else "donot_use_mm_for_euclid_dist"
        return torch.cdist(points, points, compute_mode=mode)

    many = [n > MATRIX_PRODUCT for n in counts]
    if len(set(many)) == 1:
        return computed(many[0])
    return torch.where(to_device(many, points).bool()[:, None, None], computed(True), computed(False))


def _density(nearest: Tensor, count: Tensor | int) -> Tensor:
    """Return (B, Q) densities from the distances (B, Q, K) to the nearest points, of which `count` are averaged."""
    return nearest.square().sum(2).div_(-count).exp_()


def _to_denser(distance: Tensor, density: Tensor, farthest: Tensor, pair: Tensor | None) -> Tensor:
    """Return (B, Q) distance to the nearest denser point, or (B, 1, 1) `farthest` for a point without one.

    If `pair` (B, Q, Q) is given, only pairs of points for which it is True count.
    """
    denser = density[:, None] > density[:, :, None]  # (B, i, j): j denser than i
    return torch.where(denser if pair is None else denser & pair, distance, farthest).amin(2)


def _centres(score: Tensor, counts: Sequence[int], clusters: Sequence[int]) -> Tensor:
    """Return (B, C) long: the best clusters[b] of the first counts[b] points, best first, padded with Q.

    Equal scores are common (the two densest points are often each other's neighbour), and their order determines the
    order of the merged tokens. They are ordered by torch.topk, as in the official code. Samples with the same counts
    share a call.
    """
    size = score.shape[1]
    if len(set(zip(counts, clusters, strict=True))) == 1 and clusters[0]:
        return score[:, : counts[0]].topk(clusters[0], dim=1).indices
    centre = torch.full((score.shape[0], max(max(clusters), 1)), size, dtype=torch.long, device=score.device)
    for q, c in sorted({(q, c) for q, c in zip(counts, clusters, strict=True) if c}):
        alike = to_device([b for b, pair in enumerate(zip(counts, clusters, strict=True)) if pair == (q, c)], score)
        best = score.index_select(0, alike)[:, :q].topk(c, dim=1).indices
        centre[:, :c].index_copy_(0, alike, best)
    return centre


def cluster_means(
    hidden: Tensor, picked: Tensor, counts: Sequence[int], clusters: Sequence[int], kernels: Any = None
) -> tuple[Tensor, Tensor | None]:
    """Cluster some tokens and return the means of the clusters.

    Args:
        hidden: (B, L, D) hidden states.
        picked: (B, Q) long, positions of the tokens to cluster; the first counts[b] of a sample are real.
        counts: number of tokens of each sample.
        clusters: number of clusters of each sample.
        kernels: see `View.kernels`.

    Returns:
        (B, C, D) means in the dtype of `hidden`; (B, Q) long, the cluster of each token as in `dpc_knn`, or None if all
        tokens are in one cluster.
    """
    if set(clusters) == {1} and all(n == picked.shape[1] for n in counts):  # all tokens are in one cluster
        size = picked.shape[1] + EPS
        if kernels is not None:
            mean: Tensor = kernels.mean_of(hidden, picked, size)
            return mean, None
        return take(hidden, picked).float().sum(1, keepdim=True).div_(size).to(hidden.dtype), None  # (B, 1, D)
    points = take(hidden, picked)  # (B, Q, D)
    label = dpc_knn(points, counts, clusters)
    return average(points, label, max(clusters)), label


def average(points: Tensor, label: Tensor, n_clusters: int) -> Tensor:
    """Return the sum of each cluster divided by (size + EPS), as in the official code.

    Args:
        points: (B, Q, D).
        label: (B, Q) long, -1 on padding.
        n_clusters: C.

    Returns:
        (B, C, D) in the dtype of `points`.
    """
    numbers = torch.arange(n_clusters, device=label.device)
    member = (label[:, None] == numbers[:, None]).float()  # (B, C, Q)
    total = member @ points.float()  # (B, C, D)
    return total.div_(member.sum(2, keepdim=True).add_(EPS)).to(points.dtype)
