"""With accelerate's hooks, answers, records and caches are those of the model without hooks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_prune
from tests import models
from tests.contract.settings import Setting

accelerate = pytest.importorskip("accelerate")
ROWS = [models.prompt(4, 5), models.prompt(7, 3, seed=1)]
PARTS = {
    "llava": ("model.vision_tower", "model.mm_projector", "model.embed_tokens", "model.norm", "model.layers"),
    "hf": (
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model.embed_tokens",
        "model.language_model.norm",
        "model.language_model.layers",
    ),
}


def dispatched(model: Any, how: str, folder: Path) -> Any:
    """Add accelerate's hooks to the model in place and return it."""
    family = "llava" if models.is_llava(model) else "hf"
    tower, projector, embed, norm, layers = PARTS[family]
    rotary = embed.replace("embed_tokens", "rotary_emb")
    cpu = dict.fromkeys((tower, projector, embed, norm, rotary, "lm_head"), "cpu")
    split = {f"{layers}.{i}": "cpu" if i < 3 else "disk" for i in range(models.LAYERS)}
    if how == "hooks on every module":
        device_map, options = {**cpu, layers: "cpu"}, {"force_hooks": True}
    elif how == "language model split":
        device_map, options = {**cpu, **split}, {}
    else:
        assert how == "tower blocks and projector on disk"
        inner = f"{tower}.vision_tower" if family == "llava" else tower
        cpu.pop(tower)
        encoder = {f"{inner}.{name}": "disk" if name == "encoder" else "cpu" for name in _children(model, inner)}
        device_map, options = {**cpu, **encoder, layers: "cpu", projector: "disk"}, {}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), **options)
    return model


def _children(model: Any, path: str) -> list[str]:
    return [name for name, _ in model.get_submodule(path).named_children()]


def observed(model: Any, name: str, hyper: Any, handle: Any = None) -> tuple[Any, Any, Any]:
    """Return (logits, kept tokens, cache lengths) of a greedy answer."""
    given = models.inputs(model, ROWS, models.pixels(2))

    def ask(handle: Any) -> tuple[Any, Any, Any]:
        out = models.generate(model, given, 3)
        kept = [k.tolist() for k in handle.last.kept]
        return torch.stack(out.logits), kept, models.cache_lengths(out.past_key_values)

    if handle is not None:
        return ask(handle)
    with llava_prune.pruned(model, name, **hyper) as made:
        return ask(made)


def same(one: tuple[Any, Any, Any], other: tuple[Any, Any, Any]) -> None:
    assert torch.allclose(one[0], other[0], atol=1e-5)
    assert one[1:] == other[1:]


@pytest.mark.parametrize("how", ["hooks on every module", "language model split", "tower blocks and projector on disk"])
def test_hooks_change_nothing(name: str, chosen: Setting, tiny: Any, how: str, tmp_path: Path) -> None:
    """A method attached to a dispatched model gives the same result as on the original model."""
    expected = observed(tiny, name, chosen.hyper)
    model = dispatched(copy.deepcopy(tiny), how, tmp_path)
    same(observed(model, name, chosen.hyper), expected)


@pytest.mark.parametrize("name", ["autoprune", "visionzip", "tome", "pdrop", "tome+sparsevlm"])
def test_attached_then_dispatched(name: str, tiny: Any, tmp_path: Path) -> None:
    """A model may be dispatched after attaching; detached with the hooks in place, it answers unpruned."""
    given = models.inputs(tiny, ROWS, models.pixels(2))
    base = models.generate(tiny, given, 3).logits
    model = copy.deepcopy(tiny)
    expected = observed(tiny, name, {"tokens": 16})
    handle = llava_prune.attach(model, name, tokens=16)
    same(observed(dispatched(model, "language model split", tmp_path), name, {}, handle), expected)
    handle.detach()
    again = models.generate(model, given, 3).logits
    assert torch.allclose(torch.stack(again), torch.stack(base), atol=1e-5)
    with llava_prune.pruned(model, name, tokens=16) as second:
        same(observed(model, name, {}, second), expected)


@pytest.mark.parametrize("name", ["autoprune", "visionzip", "tome"])
@pytest.mark.parametrize("first", ["attach", "dispatch"])
def test_hooks_removed_while_attached(name: str, first: str, tiny: Any, tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_module

    expected = observed(tiny, name, {"tokens": 16})
    model = copy.deepcopy(tiny)
    if first == "dispatch":
        dispatched(model, "hooks on every module", tmp_path)
    handle = llava_prune.attach(model, name, tokens=16)
    if first == "attach":
        dispatched(model, "hooks on every module", tmp_path)
    remove_hook_from_module(model, recurse=True)
    same(observed(model, name, {}, handle), expected)
    handle.detach()
    assert llava_prune.attach(model, name, tokens=16).attached


def test_rebuilt_arguments(name: str, chosen: Setting, tiny_models: dict[str, Any]) -> None:
    """A wrapper may rebuild the output of the image encoder: the state of the request is not stored in it."""
    model = copy.deepcopy(tiny_models["hf"])
    expected = observed(tiny_models["hf"], name, chosen.hyper)
    inner, stock = model.model, model.model.get_image_features

    def rebuilt(*args: Any, **kwargs: Any) -> Any:
        out = stock(*args, **kwargs)
        return type(out)(**{k: copy.deepcopy(v) for k, v in out.items() if v is not None})

    rebuilt.__wrapped__ = stock  # type: ignore[attr-defined]  # generate() reads its signature
    inner.get_image_features = rebuilt
    same(observed(model, name, chosen.hyper), expected)
