"""FasterVLM, VisionZip, PruMerge, PruMerge+ and ToMe against runs of their official code (float32, CPU).

vision_side.npz (tower of 4 blocks) and deep_tower.npz (24 blocks, which some of the official codes assume) hold the
kept patches, for ToMe the token into which each patch was merged, and the logits of five greedy steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_prune
from llava_prune.methods.tome import ToMe
from tests import models
from tests.golden.reference import LAYERS, second_case

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "fastervlm/case0_b64": ("fastervlm", {"tokens": 64}),
    "visionzip/case1_b128": ("visionzip", {"tokens": 128}),
    "visionzip/case2_b64": ("visionzip", {"dominant": 54, "contextual": 10}),
    "prumerge/case2_adaptive": ("prumerge", {"adaptive": True}),
    "prumerge/case0_b192": ("prumerge", {"ratio": 192 / 576}),
    "prumerge_plus/case1_r8": ("prumerge+", {"ratio": 1 / 8, "strict": True}),
    "prumerge_plus/case0_adaptive": ("prumerge+", {"adaptive": True}),  # 577 tokens, more than there are patches
    "prumerge_plus/case2_adaptive": ("prumerge+", {"adaptive": True}),
}


DEEP: dict[str, tuple[str, dict[str, Any]]] = {
    "visionzip/case0_b64": ("visionzip:64", {}),
    "prumerge/case1_adaptive": ("prumerge", {}),
    "prumerge_plus/case0_adaptive": ("prumerge+", {}),
}
TOME: dict[str, tuple[str, dict[str, Any]]] = {
    "tome/case0_b192": ("tome", {"schedule": [17] * 16 + [16] * 7 + [0]}),
    "tome/case1_b64": ("tome", {"tokens": 64}),
    "tome/case2_b128": ("tome:128", {}),
    "tome/case1_r16": ("tome:constant-16", {}),
}


def recorded(file: str, key: str) -> list[Any]:
    with np.load(Path(__file__).with_name(file)) as table:
        return table[key].tolist()


def compare(model: Any, run: str, name: str, hyper: dict[str, Any], kept: list[int], logits: list[Any]) -> None:
    """Compare counts and kept patches exactly, logits to 2e-5."""
    case = second_case(int(run.split("case")[1][0]))
    given = models.inputs(model, [case.ids], case.pixels)
    with llava_prune.pruned(model, name, check=True, **hyper) as handle:
        out = models.generate(model, given, 5)
    last = handle.last
    assert last.tokens_in.tolist() == last.tokens_out.tolist() == [[len(kept)] * LAYERS]
    assert all(k.tolist() == [kept] for k in last.kept)
    np.testing.assert_allclose(torch.stack(out.logits)[:, 0].cpu().numpy(), logits, atol=2e-5, rtol=0)


def patches(name: str, run: str, chosen: list[int]) -> list[int]:
    """Return the kept indices of the record, in which tokens that do not stand for a patch are -1."""
    if name.startswith("visionzip"):
        return [-1, *chosen, *[-1] * (20 if "b128" in run else 10)]  # class token, then contextual tokens after them
    return [*chosen, -1] if name.startswith("prumerge") else chosen


@pytest.mark.parametrize("run", RUNS)
def test_recorded_runs(run: str, reference: Any) -> None:
    name, hyper = RUNS[run]
    kept = patches(name, run, recorded("vision_side.npz", f"{run}/kept"))
    compare(reference.model, run, name, hyper, kept, recorded("vision_side.npz", f"{run}/logits"))


@pytest.mark.parametrize("run", DEEP)
def test_recorded_runs_on_the_deep_tower(run: str, deep_reference: Any) -> None:
    name, hyper = DEEP[run]
    kept = patches(name, run, recorded("deep_tower.npz", f"{run}/kept"))
    compare(deep_reference.model, run, name, hyper, kept, recorded("deep_tower.npz", f"{run}/logits"))


@pytest.mark.parametrize("run", TOME)
def test_tome_recorded_runs(run: str, deep_reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token into which each patch is merged, and the logits, equal the recorded ones."""
    groups: list[Any] = []
    stock = ToMe.prune_vision
    monkeypatch.setattr(ToMe, "prune_vision", lambda self, view: groups.append(view.groups) or stock(self, view))
    of_patch = recorded("deep_tower.npz", f"{run}/groups")
    members = [[p for p, g in enumerate(of_patch) if g == j] for j in range(max(of_patch) + 1)]
    kept = [m[0] if len(m) == 1 else -1 for m in members]
    compare(deep_reference.model, run, *TOME[run], kept, recorded("deep_tower.npz", f"{run}/logits"))
    assert groups[0].tolist() == [of_patch]
