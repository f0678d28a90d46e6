"""Ordered top-k, clustering, merging and reassembly against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_prune.ops.clustering import average, dpc_knn
from llava_prune.ops.selection import assemble, column, descending_rank


def test_rank_breaks_ties_by_index_and_puts_outsiders_last() -> None:
    score = torch.tensor([[1.0, 3.0, 3.0, 9.0, float("nan"), float("-inf")]])
    among = torch.tensor([[True, True, True, False, True, True]])
    rank = descending_rank(score, among)[0].tolist()
    assert rank[:3] == [2, 0, 1]
    assert rank[3] == 5
    assert sorted(rank) == list(range(6))


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=50)
def test_rank_is_a_stable_sort(entries: list[tuple[int, bool]]) -> None:
    score = torch.tensor([[float(s) for s, _ in entries]])
    among = torch.tensor([[a for _, a in entries]])
    order = sorted((i for i, (_, a) in enumerate(entries) if a), key=lambda i: (-entries[i][0], i))
    rank = descending_rank(score, among)[0]
    assert [int(rank[i]) for i in order] == list(range(len(order)))


ROW = st.lists(st.sampled_from("tvV."), min_size=1, max_size=10)
"""t: text, v: dropped visual token, V: kept visual token, .: padding."""


@given(st.lists(st.tuples(ROW, st.integers(0, 3)), min_size=1, max_size=4))
@settings(max_examples=80)
def test_assemble_is_a_list_comprehension(samples: list[tuple[list[str], int]]) -> None:
    """Kept rows stay in order, merged ones follow the last visual position, and padding is on the left."""
    width = max(len(r) for r, _ in samples)
    rows = ["." * (width - len(r)) + "".join(r) for r, _ in samples]
    counts = [c if set(r) & {"v", "V"} else 0 for r, c in samples]
    expected = []
    for row, c in zip(rows, counts, strict=True):
        last = max((i for i, x in enumerate(row) if x in "vV"), default=-1)
        line = [i for i in range(last + 1) if row[i] in "tV"]
        line += [width + j for j in range(c)]
        expected.append(line + [i for i in range(last + 1, width) if row[i] == "t"])
    lengths = [len(e) for e in expected]
    if max(lengths) == 0:
        return

    def mask(letters: str) -> torch.Tensor:
        return torch.tensor([[x in letters for x in r] for r in rows])

    most = max(counts)
    merged = torch.zeros(len(rows), most, 2) if most else None
    cut = assemble(mask("V"), mask("vV"), mask("tvV"), lengths, merged, counts)
    assert cut.index.shape == (len(rows), max(lengths))
    assert (cut.valid is None) == (len(set(lengths)) == 1)
    for b, line in enumerate(expected):
        live = torch.ones(max(lengths), dtype=torch.bool) if cut.valid is None else cut.valid[b]
        assert cut.index[b][live].tolist() == line
        assert live.tolist() == [False] * (max(lengths) - len(line)) + [True] * len(line)


def clustered(points: torch.Tensor, k: int) -> tuple[list[float], list[int], list[int]]:
    """Return densities, centres and labels of one sample, by loops that follow the specification."""
    n, width = points.shape
    distance = [[float((a - b).norm()) / width**0.5 for b in points.double()] for a in points.double()]
    density = [torch.tensor(-sum(x * x for x in sorted(row)[:k]) / k).exp().item() for row in distance]
    farthest = max(max(row) for row in distance)
    delta = [min((distance[i][j] for j in range(n) if density[j] > density[i]), default=farthest) for i in range(n)]
    centres = sorted(range(n), key=lambda i: -density[i] * delta[i])[:k]
    label = [min(range(k), key=lambda c: distance[i][centres[c]]) for i in range(n)]
    for c, i in enumerate(centres):
        label[i] = c
    return density, centres, label


def test_clusters_of_the_specification() -> None:
    """SparseVLM's worked example; the loops also give densities and centres, which the function does not return."""
    points = torch.tensor([0, 0.1, 0.3, 1.0, 1.2, 2.0])[:, None]
    density, centres, label = clustered(points, 3)
    assert density == pytest.approx([0.9672, 0.9835, 0.9576, 0.8381, 0.7972, 0.5789], abs=5e-5)
    assert centres == [1, 3, 5]
    assert dpc_knn(points[None], [6], [3])[0].tolist() == label == [0, 0, 0, 1, 1, 2]
    torch.testing.assert_close(
        average(points[None], torch.tensor([label]), 3)[0, :, 0], torch.tensor([0.4 / 3, 1.1, 2.0]), atol=1e-5, rtol=0
    )


@given(st.integers(0, 10_000), st.integers(2, 14), st.integers(1, 4))
@settings(max_examples=40)
def test_clusters_of_one_sample(seed: int, n: int, k: int) -> None:
    k = min(k, n)
    points = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    density, centres, expected = clustered(points, k)
    label = dpc_knn(points[None], [n], [k])[0].tolist()
    tie = k > 1 and density[centres[0]] == pytest.approx(density[centres[1]])  # each other's neighbours
    if label != expected and tie:
        swap = {0: 1, 1: 0}
        label = [swap.get(x, x) for x in label]
    assert label == expected


def test_clusters_of_a_batch_are_those_of_its_samples() -> None:
    draw = torch.Generator().manual_seed(5)
    points = torch.randn(4, 9, 6, generator=draw)
    counts, clusters = [9, 5, 1, 0], [3, 2, 1, 0]
    label = dpc_knn(points, counts, clusters)
    for b, (n, k) in enumerate(zip(counts, clusters, strict=True)):
        assert label[b, n:].tolist() == [-1] * (9 - n)
        if n:
            assert label[b, :n].tolist() == dpc_knn(points[b : b + 1, :n], [n], [k])[0].tolist()


def test_merge_divides_by_size_plus_epsilon() -> None:
    points = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [10.0, 20.0], [99.0, 99.0]]])
    out = average(points, torch.tensor([[0, 0, 1, -1]]), 3)
    expected = (
        torch.tensor([[[4.0, 6.0], [10.0, 20.0], [0.0, 0.0]]]) / torch.tensor([2 + 1e-6, 1 + 1e-6, 1e-6])[:, None]
    )
    assert torch.allclose(out, expected, rtol=1e-6)
    assert average(points.bfloat16(), torch.tensor([[0, 0, 1, -1]]), 2).dtype == torch.bfloat16


def test_column_is_host_numbers_as_a_column() -> None:
    assert column([3, 1], torch.zeros(2, 2)).tolist() == [[3], [1]]


@pytest.mark.parametrize("k", [1, 2])
def test_equal_points_make_no_trouble(k: int) -> None:
    label = dpc_knn(torch.ones(1, 4, 3), [4], [k])
    assert label.min() >= 0 and label.max() < k
