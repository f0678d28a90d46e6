"""FastV, VTW, PyramidDrop, SparseVLM and SparseVLM+ against recorded runs of their official code (float32, CPU).

llm_side.npz holds tokens of every layer, kept indices and the logits of five greedy steps. FastV: the variants with a
cache (HF fork, and lmms-eval's with 3 full layers), and the one without, which selects again for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_prune
from llava_prune.methods.vtw import find_layer
from tests import models
from tests.golden.reference import Case, first_case, second_case

FIRST: dict[str, tuple[str, dict[str, Any]]] = {
    "pdrop/case0_b64": ("pdrop", {"tokens": 64}),
    "pdrop/case0_b128": ("pdrop", {"layers": [2, 8, 16], "ratios": [0.42, 0.42**2, 0.42**3]}),
    "pdrop/case1_b270": ("pdrop", {"layers": [8, 16, 24], "ratios": [0.5, 0.25, 0.125]}),
    "pdrop/case2_b192s": ("pdrop:192-stages", {}),
    "sparsevlm/case0_b192": ("sparsevlm", {"tokens": 192, "version": "1.5"}),
    "sparsevlm/case1_b64": ("sparsevlm", {"tokens": 64, "version": "1.5"}),
    "sparsevlm/case2_b128": ("sparsevlm", {"tokens": 128, "version": "1.5"}),
    "sparsevlm_plus/case0_b64": ("sparsevlm", {"tokens": 64, "version": "2.0"}),
    "sparsevlm_plus/case1_b128": ("sparsevlm:plus-128", {}),
    "sparsevlm_plus/case2_b192": ("sparsevlm", {"tokens": 192, "version": "2.0"}),
}
SECOND: dict[str, tuple[str, dict[str, Any]]] = {
    "fastv_hf/case0_b64": ("fastv", {"layer": 2, "keep": 64}),
    "fastv_hf/case2_b192": ("fastv:keep192", {}),
    "fastv_lmms/case1_k3r50": ("fastv:lmms-eval", {}),
    "vtw/case0_k16": ("vtw", {"layer": 16}),
    "vtw/case1_b64": ("vtw", {"tokens": 64}),
}


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("llm_side.npz")) as file:
        return {k: file[k] for k in file.files}


@pytest.fixture(scope="module")
def first() -> Callable[[int], Case]:
    with np.load(Path(__file__).with_name("autoprune.npz")) as file:
        made = {i: first_case(i, file[f"case{i}/input_ids"].tolist()) for i in range(3)}
    return lambda i: made[i]


def number(key: str) -> int:
    return int(key.split("/case")[1][0])


def run(loaded: Any, case: Case, method: str, hyper: dict[str, Any], **options: Any) -> tuple[Any, np.ndarray, Any]:
    """Return the record, (5, V) logits and the output."""
    given = models.inputs(loaded.model, [case.ids], case.pixels)
    with llava_prune.pruned(loaded.model, method, **hyper) as handle:
        out = models.generate(loaded.model, given, 5, **options)
    return handle.last, torch.stack(out.logits)[:, 0].cpu().numpy(), out


def cached(out: Any) -> list[int]:
    """Return the cache lengths after the prefill."""
    return [n - 4 for n in models.cache_lengths(out.past_key_values)]


@pytest.mark.parametrize("key", FIRST)
def test_pyramiddrop_and_sparsevlm(key: str, reference: Any, recorded: Any, first: Any) -> None:
    last, logits, out = run(reference, first(number(key)), *FIRST[key])
    assert last.tokens_in.tolist() == [recorded[f"{key}/tokens_in"].tolist()]
    assert last.tokens_out.tolist() == [recorded[f"{key}/tokens_out"].tolist()]
    for layer, row in zip(recorded[f"{key}/after"].tolist(), recorded[f"{key}/kept"], strict=True):
        assert last.kept[layer].tolist() == [row[row != -2].tolist()], f"layer {layer}"
    assert cached(out) == recorded[f"{key}/cache"].tolist()
    np.testing.assert_allclose(logits, recorded[f"{key}/logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("key", SECOND)
def test_fastv_and_vtw(key: str, reference: Any, recorded: Any) -> None:
    case = second_case(number(key))
    last, logits, out = run(reference, case, *SECOND[key])
    tokens = recorded[f"{key}/tokens_in"].tolist()
    assert last.tokens_in.tolist() == [tokens]
    assert cached(out) == [n + len(case.ids) - 1 for n in tokens]
    if f"{key}/kept" in recorded:
        assert last.kept[-1].tolist() == [recorded[f"{key}/kept"].tolist()]
    np.testing.assert_allclose(logits, recorded[f"{key}/logits"], atol=2e-5, rtol=0)


def test_fastv_without_a_cache_selects_for_every_token(reference: Any, recorded: Any) -> None:
    """With `use_cache=False` transformers runs the whole prompt for every token, as FastV's latency script does."""
    if reference.family == "llava":
        pytest.skip("package llava caches whatever it is told")
    key = "fastv/case0_b64"
    last, logits, _ = run(reference, second_case(0), "fastv", {"layer": 2, "keep": 64}, use_cache=False)
    steps = recorded[f"{key}/kept"].tolist()
    assert steps[0] != steps[4]
    assert last.kept[-1].tolist() == [steps[4]]
    np.testing.assert_allclose(logits, recorded[f"{key}/logits"], atol=2e-5, rtol=0)


def test_search_for_vtw_layer(reference: Any, recorded: Any) -> None:
    """Divergences of the candidates 5..31 equal those of the official search; the first below 0.003 is layer 14."""
    if reference.family == "llava":
        pytest.skip("one family says it all")
    case = second_case(0)
    given = models.inputs(reference.model, [case.ids], case.pixels)

    def logits(method: Any) -> torch.Tensor:
        with torch.inference_mode():
            if method is None:
                return reference.model(**given).logits[:, -1]
            with llava_prune.pruned(reference.model, method):
                return reference.model(**given).logits[:, -1]

    layer, errors = find_layer(logits, 32)
    np.testing.assert_allclose(errors, recorded["vtw/case0_k16/divergence"], atol=1e-6, rtol=0)
    assert layer == 14
