"""Selection and merging as pure tensor functions: ordered top-k, DPC-KNN, bipartite matching, reassembly of a sequence.

All take batches whose samples keep different numbers of tokens; the counts are host integers, so no function
here reads from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .fused import kernels_for
from .types import Cut, Fold, View


def descending_order(score: Tensor, among: Tensor) -> Tensor:
    """Entries by score, best first, ties by index; those not `among` come last.

    Args:
        score: (B, L) float. NaN counts as the lowest.
        among: (B, L) bool.

    Returns:
        (B, L) long, columns.
    """
    key = torch.nan_to_num(score.float(), nan=-3e38, posinf=3e38, neginf=-3e38)
    return torch.where(among, key, -torch.inf).sort(dim=1, descending=True, stable=True).indices


def inverse(order: Tensor) -> Tensor:
    """(B, L) long: the place of each column in an order."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def descending_rank(score: Tensor, among: Tensor) -> Tensor:
    """(B, L) long, 0 for the best; see `descending_order`."""
    return inverse(descending_order(score, among))


def top(order: Tensor, counts: Sequence[int], among: Tensor) -> Tensor:
    """(B, L) bool: the first counts[b] entries of an order (see `descending_order`, with the same `among`)."""
    if len(set(counts)) == 1:
        return torch.zeros_like(among).scatter_(1, order[:, : counts[0]], True)
    return among & (inverse(order) < column(counts, order))


def sent(values: Sequence[Any], like: Tensor) -> Tensor:
    """Host integers as a long tensor on the device of `like`, copied without waiting for it."""
    return torch.tensor(values, dtype=torch.long).to(like.device, non_blocking=True)


def column(values: Sequence[int], like: Tensor) -> Tensor:
    """(B, 1) long on the device of `like`, see `sent`."""
    return sent(values, like)[:, None]


def take(rows: Tensor, index: Tensor) -> Tensor:
    """(B, K, D) rows of (B, L, D) by (B, K) long. Whole rows are copied, which `gather` does element by element."""
    batch, length, width = rows.shape
    flat = index if batch == 1 else index + torch.arange(batch, device=index.device)[:, None] * length
    return rows.reshape(batch * length, width).index_select(0, flat.reshape(-1)).view(batch, index.shape[1], width)


def per_sample(values: Sequence[int], like: Tensor) -> Tensor | int:
    """`column`, or the plain number when all samples share it: nothing is copied to the device then."""
    return values[0] if len(set(values)) == 1 else column(values, like)


def assemble(
    keep: Tensor,
    visual: Tensor,
    valid: Tensor,
    lengths: Sequence[int],
    merged: Tensor | None = None,
    merged_counts: Sequence[int] = (),
    at: Tensor | None = None,
) -> Cut:
    """Close the gaps: kept rows in order, merged rows after the last visual place, all aligned at the right end.

    Args:
        keep: (B, L) bool, visual tokens that stay. Rows that are not visual stay if they are valid.
        visual: (B, L) bool.
        valid: (B, L) bool.
        lengths: live rows of each sample afterwards: not visual + kept + merged.
        merged: (B, C, D) new rows, or None.
        merged_counts: how many of the C belong to each sample.
        at: (B, C) long, columns that the merged rows follow; None for the last visual place.

    Returns:
        Cut with L' = max(lengths); `valid` is None when all samples have that length.
    """
    n_merged = 0 if merged is None else merged.shape[1]
    step = n_merged + 1  # between two columns there is room for all merged rows
    places = torch.arange(0, keep.shape[1] * step, step, device=keep.device)
    key = torch.where(torch.where(visual, keep, valid), places, -1)  # (B, L)
    if merged is not None:
        after = (visual * places).amax(1, keepdim=True) if at is None else at * step  # (B, 1 or C)
        slots = torch.arange(1, step, device=keep.device)
        extra = after + slots  # (B, C)
        if any(n != n_merged for n in merged_counts):
            extra = extra.masked_fill(slots > column(merged_counts, keep), -1)
        key = torch.cat([key, extra], 1)
    ordered, index = key.sort(dim=1, stable=True)
    width = max(lengths)
    live = None if all(n == width for n in lengths) else ordered[:, -width:] >= 0
    return Cut(index[:, index.shape[1] - width :], merged, live)


def dpc_knn(points: Tensor, counts: Sequence[int], clusters: Sequence[int]) -> Tensor:
    """Density-peak clustering with k nearest neighbours, k being the number of clusters.

    Source: specs of AutoPrune and SparseVLM; density exp(-mean of the k smallest squared distances, itself
    included), distance to the nearest denser point, centres by their product; the official code's random noise of
    1e-6 on the density is left out. Exact ties of centres go as torch.topk orders them.

    Args:
        points: (B, Q, D); the first counts[b] rows of a sample are points, the rest padding.
        counts: points of each sample.
        clusters: clusters of each sample, at most its points.

    Returns:
        (B, Q) long, the cluster of each point, numbered by descending centre score; -1 on padding.
    """
    size, device = points.shape[1], points.device
    n_max = max(max(clusters), 1)
    even = all(q == size for q in counts) and all(c == n_max for c in clusters)  # nothing to mask
    distance = torch.cdist(points.float(), points.float()).div_(points.shape[2] ** 0.5)  # (B, Q, Q)
    numbers = torch.arange(n_max, device=device).expand(points.shape[0], -1)  # (B, C)
    if even:
        density = _density(distance.topk(n_max, dim=2, largest=False).values, n_max)
        delta = _to_denser(distance, density, distance.amax((1, 2), keepdim=True), None)
        centre = _centres(density * delta, counts, clusters)  # (B, C)
        label = distance.gather(2, centre[:, None].expand(-1, size, -1)).argmin(2)
        return label.scatter_(1, centre, numbers)  # centres belong to themselves
    slots = torch.arange(size, device=device)
    real = (slots < per_sample(counts, points)).expand(points.shape[:2])  # (B, Q)
    pair = real[:, None] & real[:, :, None]  # (B, Q, Q)
    nearest = distance.masked_fill(~pair, torch.inf).topk(min(n_max, size), dim=2, largest=False).values
    used = slots[: nearest.shape[2]] < per_sample(clusters, points)  # (B, K)
    nearest = nearest.masked_fill_(~(used[..., None, :] & real[:, :, None]), 0)
    density = _density(nearest, per_sample([max(c, 1) for c in clusters], points)).masked_fill_(~real, -1.0)
    farthest = distance.masked_fill(~pair, 0).amax((1, 2), keepdim=True)
    delta = _to_denser(distance, density, farthest, pair)
    centre = _centres(density * delta, counts, clusters)  # (B, C), Q where there is none
    to_centre = distance.gather(2, centre.clamp(max=size - 1)[:, None].expand(-1, size, -1))  # (B, Q, C)
    label = to_centre.masked_fill_((centre >= size)[:, None], torch.inf).argmin(2)
    label = torch.cat([label, label[:, :1]], 1)  # one column more, for the centres that are none
    return label.scatter_(1, centre, numbers)[:, :size].masked_fill(~real, -1)


def _density(nearest: Tensor, count: Tensor | int) -> Tensor:
    """(B, Q) from the distances (B, Q, K) to the nearest points, of which `count` are averaged."""
    return nearest.square().sum(2).div_(-count).exp_()


def _to_denser(distance: Tensor, density: Tensor, farthest: Tensor, pair: Tensor | None) -> Tensor:
    """(B, Q) distance to the nearest denser point, (B, 1, 1) `farthest` where there is none; only among `pair`s."""
    denser = density[:, None] > density[:, :, None]  # (B, i, j): j denser than i
    return torch.where(denser if pair is None else denser & pair, distance, farthest).amin(2)


def _centres(score: Tensor, counts: Sequence[int], clusters: Sequence[int]) -> Tensor:
    """(B, C) long: the best clusters[b] of the first counts[b] points, best first, Q filling up.

    Equal scores are common (the two densest points are often each other's neighbour), and their order is the order
    of the merged tokens. torch.topk decides it, as in the official code, so samples with the same counts share a call.
    """
    size = score.shape[1]
    if len(set(zip(counts, clusters, strict=True))) == 1 and clusters[0]:
        return score[:, : counts[0]].topk(clusters[0], dim=1).indices
    centre = torch.full((score.shape[0], max(max(clusters), 1)), size, dtype=torch.long, device=score.device)
    for q, c in sorted({(q, c) for q, c in zip(counts, clusters, strict=True) if c}):
        alike = sent([b for b, pair in enumerate(zip(counts, clusters, strict=True)) if pair == (q, c)], score)
        best = score.index_select(0, alike)[:, :q].topk(c, dim=1).indices
        centre[:, :c].index_copy_(0, alike, best)
    return centre


EPS = 1e-6
"""Added to the size of a cluster."""


def cluster_means(hidden: Tensor, picked: Tensor, counts: Sequence[int], clusters: Sequence[int]) -> Tensor:
    """(B, C, D) means of the rows (B, L, D) `picked` (B, Q) by the clusters of `dpc_knn`, which see."""
    if set(clusters) == {1} and all(n == picked.shape[1] for n in counts):  # one cluster takes them all
        size, kernels = picked.shape[1] + EPS, kernels_for(hidden)
        if kernels is not None:
            return kernels.mean_of(hidden, picked, size)
        return take(hidden, picked).float().sum(1, keepdim=True).div_(size).to(hidden.dtype)
    points = take(hidden, picked)  # (B, Q, D)
    return merge(points, dpc_knn(points, counts, clusters), max(clusters))


def merge(points: Tensor, label: Tensor, n_clusters: int) -> Tensor:
    """Sum of each cluster divided by (size + EPS), as the official code does.

    Args:
        points: (B, Q, D).
        label: (B, Q) long, -1 on padding.
        n_clusters: C.

    Returns:
        (B, C, D) in the dtype of `points`.
    """
    numbers = torch.arange(n_clusters, device=label.device)
    member = (label[:, None] == numbers[:, None]).float()  # (B, C, Q)
    total = member @ points.float()
    return total.div_(member.sum(2, keepdim=True).add_(EPS)).to(points.dtype)


def keep_best(
    view: View, score: Tensor, keep: Sequence[int], clusters: Sequence[int] = (), recycle: Sequence[int] = ()
) -> Cut:
    """The best visual tokens stay in sequence order; the best of the others may come back as cluster means.

    Args:
        view: the request.
        score: (B, L) ranking of columns, ties by index.
        keep: visual tokens that stay, one count a sample.
        clusters: merged tokens a sample, appended behind the kept ones in the order of their centres; none if empty.
        recycle: tokens those are made of, the best behind the kept ones.
    """
    if not any(recycle):
        clusters = recycle = [0] * len(keep)
    lengths = [n + k + c for n, k, c in zip(view.counts, keep, clusters, strict=True)]
    kernels = kernels_for(view.hidden)
    if kernels is not None and all(len(set(x)) == 1 for x in (view.counts, keep, clusters, recycle)):
        index, picked = kernels.choose(score, view.visual, view.valid, keep[0], recycle[0], clusters[0], lengths[0])
        return Cut(index, cluster_means(view.hidden, picked, recycle, clusters) if recycle[0] else None)
    best = descending_order(score, view.visual)  # (B, L) columns by rank
    kept = top(best, keep, view.visual)
    if not any(recycle):
        return assemble(kept, view.visual, view.valid, lengths)
    if len(set(keep)) == 1:
        picked = best[:, keep[0] : keep[0] + max(recycle)]  # (B, Q)
    else:
        slots = torch.arange(max(recycle), device=best.device)
        picked = best.gather(1, (column(keep, best) + slots).clamp(max=best.shape[1] - 1))
    means = cluster_means(view.hidden, picked, recycle, clusters)  # (B, C, D)
    return assemble(kept, view.visual, view.valid, lengths, means, clusters)


def fold_tokens(fold: Fold, states: Tensor, size: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge tokens: means weighted by size, without atomics, so the same every time.

    Args:
        fold: who joins whom.
        states: (N, t, D).
        size: (N, t) float32, patches in each token.
        groups: (N, T) long, the token that each patch is in.

    Returns:
        (N, t', D) in the dtype of `states`, (N, t') and (N, T) afterwards. A token that nobody joins stays bit for bit.
    """
    count = fold.stay.shape[1]
    joins = torch.nn.functional.one_hot(fold.into, count).transpose(1, 2).float()  # (N, t', r)
    weighted = states.float() * size[..., None]
    total = take(weighted, fold.stay) + joins @ take(weighted, fold.gone)  # (N, t', D)
    before = size.gather(1, fold.stay)
    after = before + (joins @ size.gather(1, fold.gone)[..., None])[..., 0]
    mean = (total / after[..., None]).to(states.dtype)
    merged = torch.where((after == before)[..., None], take(states, fold.stay), mean)
    places = torch.arange(count, device=states.device).expand(states.shape[0], -1)
    moved = torch.empty(states.shape[:2], dtype=torch.long, device=states.device)
    moved = moved.scatter(1, fold.stay, places).scatter(1, fold.gone, fold.into)
    return merged, after, moved.gather(1, groups)


def match(metric: Tensor, count: int, protect: bool = True) -> Fold:
    """The `count` tokens at even places that are most like one at an odd place join it.

    Source: ToMe's description. Several may join the same token; those at odd places never move. Ties go by index.

    Args:
        metric: (N, t, d); its length does not matter.
        count: at most half of the tokens (without the class token) are taken.
        protect: row 0 is the class token and takes no part.

    Returns:
        Fold; the tokens that stay at even places come first, then all at odd places.
    """
    n, t = metric.shape[:2]
    count = min(count, (t - protect) // 2)
    unit = torch.nn.functional.normalize(metric.float(), dim=2)
    like = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (N, A, B)
    if protect:
        like[:, 0] = -torch.inf
    best, partner = like.max(2)  # (N, A)
    order = best.sort(dim=1, descending=True, stable=True).indices
    gone, rest = order[:, :count], order[:, count:].sort(dim=1).values
    odd = torch.arange(1, t, 2, device=metric.device).expand(n, -1)
    return Fold(torch.cat([2 * rest, odd], 1), 2 * gone, rest.shape[1] + partner.gather(1, gone))


def absorb(
    features: Tensor, keys: Tensor, score: Tensor, kept: Tensor, counts: list[int], neighbours: int = 32
) -> tuple[Tensor, Tensor]:
    """Add to each kept patch its nearest others, and sum up what is not kept.

    y_i = x_i + sum of score_j x_j over the `neighbours` candidates j of largest cosine; candidates are the patches
    that are not kept and the other places of the kept list. Where that list names a patch twice, as many of the
    lowest patches that are not kept are lost to candidates and sum, as in the official code.

    Args:
        features: (N, T, Dv).
        keys: (N, T, C).
        score: (N, T).
        kept: (N, K) long, the first counts[n] being real.
        counts: kept places of each picture.
        neighbours: at most so many.

    Returns:
        (N, K, Dv) float32 and (N, Dv) float32.
    """
    n, t = score.shape
    size = kept.shape[1]
    real = torch.arange(size, device=kept.device) < column(counts, kept)  # (N, K)
    named = torch.zeros(n, t + 1, dtype=torch.bool, device=kept.device)
    named = named.scatter(1, kept.masked_fill(~real, t), True)[:, :t]
    twice = column(counts, kept) - named.sum(1, keepdim=True)  # (N, 1)
    pool = ~named & ((~named).cumsum(1) > twice)  # (N, T)
    unit = torch.nn.functional.normalize(keys.float(), dim=2)
    mine = take(unit, kept)  # (N, K, C)
    like = torch.cat([mine @ unit.transpose(1, 2), mine @ mine.transpose(1, 2)], 2)  # (N, K, T + K)
    own = torch.eye(size, dtype=torch.bool, device=kept.device)
    free = torch.cat([pool[:, None].expand(-1, size, -1), real[:, None] & ~own], 2)  # (N, K, T + K)
    near = like.masked_fill(~free, -torch.inf).topk(min(neighbours, like.shape[2]), dim=2)
    weights = torch.cat([score, score.gather(1, kept)], 1)[:, None].expand(-1, size, -1).gather(2, near.indices)
    weights = weights.masked_fill(near.values == -torch.inf, 0)
    share = torch.zeros_like(like).scatter(2, near.indices, weights)
    x = features.float()
    centre = take(x, kept)
    left = (score * pool)[:, None] @ x  # (N, 1, Dv)
    return centre + share[..., :t] @ x + share[..., t:] @ centre, left[:, 0]
