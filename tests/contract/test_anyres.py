"""LLaVA-NeXT: images in crops of several resolutions, with unpadding and newline tokens, in both families."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llava_prune
from tests import combinations, models
from tests.contract.settings import Setting

SIZES = [(200, 90), (60, 160)]
ROWS = [models.prompt(4, 5), models.prompt(7, 3, seed=1)]
TEXT = torch.tensor([len(r) - 1 for r in ROWS])[:, None]


@pytest.fixture(scope="session")
def anyres(tiny_models: dict[str, Any]) -> dict[str, Any]:
    return {
        "llava": models.tiny_llava(anyres=True),
        "hf": tiny_models["next"],
        "llava-mistral": models.tiny_mistral("llava", anyres=True),
        "onevision": onevision(),
    }


def onevision() -> Any:
    """Return a LLaVA-OneVision as deep as the other small models."""
    from transformers import LlavaOnevisionForConditionalGeneration

    config = combinations.config("onevision", "qwen2", "siglip", {"num_hidden_layers": models.LAYERS})
    return combinations.randomise(LlavaOnevisionForConditionalGeneration(config))


@pytest.fixture(params=["llava", "hf", "llava-mistral", "onevision"])
def model(request: pytest.FixtureRequest, anyres: dict[str, Any]) -> Any:
    return anyres[request.param]


def given(model: Any) -> dict[str, Any]:
    return models.inputs(model, ROWS, [models.crops(s, seed=i) for i, s in enumerate(SIZES)], SIZES)


@pytest.fixture
def hyper(chosen: Setting) -> dict[str, Any]:
    """The arguments for whole images, with a budget three times as large: images here have up to 114 tokens."""
    return {k: 3 * v if k == "tokens" else v for k, v in chosen.hyper.items()}


def refused(name: str, hyper: dict[str, Any], model: Any) -> bool:
    """Return whether a method refuses the model: it cannot work on crops, or needs a class token that is missing."""
    needs = llava_prune.build(name, **hyper).requires
    siglip = type(model).__name__.startswith("LlavaOnevision")
    return "whole images" in needs or (siglip and "class token" in needs)


def test_keep_all_equals_the_base_model(name: str, chosen: Setting, model: Any, logits: Any) -> None:
    if chosen.keep_all is None:
        pytest.skip(f"{name} has no setting that keeps everything")
    if refused(name, chosen.hyper, model):
        pytest.skip(f"{name} is refused by this model")
    base, everything = logits(model, given(model)), visual(model)
    most = 5 * models.PATCHES  # of the largest image, since budgets before the language model are shared by its crops
    more = {"tokens": most} if "tokens" in chosen.keep_all else {}
    hyper = {**chosen.keep_all, **more}
    with llava_prune.pruned(model, name, **hyper) as handle:
        assert torch.equal(logits(model, given(model)), base)
        assert handle.last.tokens_out.tolist() == everything[:, None].expand(-1, models.LAYERS).tolist()


def visual(model: Any) -> torch.Tensor:
    """Return the (B,) numbers of visual tokens of the images, newline tokens included."""
    with llava_prune.pruned(model, "full") as handle, torch.inference_mode():
        model(**given(model))
    return handle.last.tokens_in[:, 0]


def test_pruning_reaches_the_cache(name: str, chosen: Setting, hyper: dict[str, Any], model: Any) -> None:
    if refused(name, hyper, model):
        with pytest.raises(ValueError):
            llava_prune.attach(model, name, **hyper)
        return
    everything = visual(model)
    assert everything.unique().numel() == 2  # the two images differ
    with llava_prune.pruned(model, name, check=True, **hyper) as handle:
        out = models.generate(model, given(model), 2)
        last = handle.last
    assert all(step.isfinite().all() for step in out.logits)
    if not chosen.prunes:
        return
    assert (last.tokens_out.float().mean(1) < everything * 0.95).all()
    lengths = [n - 1 for n in models.cache_lengths(out.past_key_values)]
    assert lengths[-1] == (last.tokens_in[:, -1:] + TEXT).max()
    for b, n in enumerate(everything.tolist()):
        for kept in last.kept:
            assert (kept[b] < n).all()


def test_batch_equals_single_runs(name: str, hyper: dict[str, Any], model: Any) -> None:
    if refused(name, hyper, model):
        pytest.skip(f"{name} is refused by this model")
    with llava_prune.pruned(model, name, **hyper) as handle:
        out = models.generate(model, given(model), 1)
        batch = handle.last
        for b, (row, size) in enumerate(zip(ROWS, SIZES, strict=True)):
            single = models.inputs(model, [row], [models.crops(size, seed=b)], [size])
            alone = models.generate(model, single, 1)
            assert batch.tokens_out[b].tolist() == handle.last.tokens_out[0].tolist()
            for a, s in zip(batch.kept, handle.last.kept, strict=True):
                assert a[b][a[b] != -2].tolist() == s[0].tolist()
            assert torch.allclose(out.logits[0][b], alone.logits[0][0], atol=2e-4)
