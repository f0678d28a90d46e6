"""FasterVLM, VisionZip, PruMerge and PruMerge+ against their official code's own runs (float32, CPU, 4-block tower).

vision_side.npz holds kept patches and the logits of five greedy steps. Runs on a 24-block tower, ToMe's among them,
were compared too and are not kept here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_prune
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


@pytest.mark.parametrize("run", RUNS)
def test_recorded_runs(run: str, reference: Any) -> None:
    name, hyper = RUNS[run]
    with np.load(Path(__file__).with_name("vision_side.npz")) as file:
        kept, logits = file[f"{run}/kept"].tolist(), file[f"{run}/logits"]
    if name == "visionzip":
        kept = [-1, *kept, *[-1] * (20 if "b128" in run else 10)]  # class token, then contextual tokens behind
    elif name.startswith("prumerge"):
        kept = [*kept, -1]
    case = second_case(int(run.split("case")[1][0]))
    given = models.inputs(reference.model, [case.ids], case.pixels)
    with llava_prune.pruned(reference.model, name, check=True, **hyper) as handle:
        out = models.generate(reference.model, given, 5)
    last = handle.last
    assert last.tokens_in.tolist() == last.tokens_out.tolist() == [[len(kept)] * LAYERS]
    assert all(k.tolist() == [kept] for k in last.kept)
    np.testing.assert_allclose(torch.stack(out.logits)[:, 0].numpy(), logits, atol=2e-5, rtol=0)
