"""AutoPrune's functions against what the official code's functions returned (float32, CPU).

autoprune_units.npz holds 234 schedules, eight slopes, eight padding masks, six clusterings (without the official
code's random term) and three attention maps with their mutual information.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import llava_prune
from llava_prune.methods.autoprune import logistic, mutual_information, schedule
from llava_prune.ops.clustering import average, dpc_knn
from llava_prune.runtime.vision import padding_mask

Arrays = Callable[[str], np.ndarray]


@pytest.fixture(scope="module")
def vector() -> Arrays:
    with np.load(Path(__file__).with_name("autoprune_units.npz")) as file:
        table = {k: file[k] for k in file.files}
    return lambda name: table[name]


def test_schedules(vector: Arrays) -> None:
    total = len(vector("schedule_L"))
    assert total == 234
    for i in range(total):
        depth, n, target, first = (int(vector(f"schedule_{k}")[i]) for k in ("L", "ori", "target", "n0"))
        slope = float(vector("schedule_k")[i])
        plan = schedule(slope, target, n, depth, 14.9)
        case = f"row {i}: L={depth} N={n} B={target} k={slope}"
        assert plan.leaving[0] == first, case
        assert list(plan.keep[1:]) == vector("schedule_realised_keep")[i][: depth - 1].tolist(), case
        assert list(plan.leaving[1:]) == vector("schedule_realised_out")[i][: depth - 1].tolist(), case
        assert sum(plan.leaving) == vector("schedule_realised_total")[i], case
        assert plan.scale == pytest.approx(vector("schedule_scale")[i], abs=1e-12), case
        raw = vector("schedule_keep_raw")[i][: depth - 1]
        assert logistic(slope, 14.9, depth) == pytest.approx(raw.tolist(), rel=1e-12), case


def test_slope(vector: Arrays) -> None:
    method = llava_prune.build("autoprune")
    for information, k in zip(vector("slope_mi"), vector("slope_k"), strict=True):
        assert method.slope(float(information)) == pytest.approx(k, abs=1e-12)


@pytest.mark.parametrize(
    "size", ["640x427", "300x500", "500x180", "480x480", "1024x100", "333x500", "500x499", "100x99"]
)
def test_padding_mask(vector: Arrays, size: str) -> None:
    width, height = map(int, size.split("x"))
    mask = padding_mask((width, height), (24, 24))
    assert torch.equal(mask, torch.from_numpy(vector(f"padding_{size}")).bool())


@pytest.mark.parametrize("j", range(6))
def test_clusters(vector: Arrays, j: int) -> None:
    points = torch.from_numpy(vector(f"cluster_x{j}"))[None]
    k = int(vector(f"cluster_k{j}"))
    label = dpc_knn(points, [points.shape[1]], [k])
    assert label[0].tolist() == vector(f"cluster_assign{j}").tolist()
    centres = vector(f"cluster_center{j}")
    assert label[0][centres].tolist() == list(range(k))
    expected = torch.from_numpy(vector(f"cluster_merged{j}"))
    assert torch.allclose(average(points, label, k)[0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("j", [0, 3, 4])
def test_mutual_information(vector: Arrays, j: int) -> None:
    rows = torch.from_numpy(vector(f"information_attn{j}"))  # (H, T, V)
    text = torch.ones(1, rows.shape[1], dtype=torch.bool)
    visual = torch.ones(1, rows.shape[2], dtype=torch.bool)
    assert mutual_information(rows[None], text, visual)[0].tolist() == pytest.approx(
        vector(f"information_mi{j}").tolist(), abs=1e-5
    )
