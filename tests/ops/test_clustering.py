"""Density-peak clusters of a sample do not depend on the other samples of its batch."""

from __future__ import annotations

import pytest
import torch

from llava_prune.ops.clustering import dpc_knn


@pytest.mark.parametrize("seed", range(4))
def test_more_points_in_another_sample(seed: int) -> None:
    """Of 15 points the two densest are each other's neighbour, a tie that rounding must not break beside 60 points."""
    draw = torch.Generator().manual_seed(seed)
    few, many = (torch.randn(1, n, 64, generator=draw) + 5 for n in (15, 60))
    alone = dpc_knn(few, [15], [2])
    batch = torch.cat([torch.nn.functional.pad(few, (0, 0, 0, 45), value=7.0), many])
    together = dpc_knn(batch, [15, 60], [2, 7])
    assert together[0, :15].tolist() == alone[0].tolist()
    assert (together[0, 15:] == -1).all()
    assert together[1].tolist() == dpc_knn(many, [60], [7])[0].tolist()
