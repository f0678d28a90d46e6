"""Attaching and detaching: a detached model is as it was before."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import llava_prune
from tests import models
from tests.contract.settings import Setting

ROWS = [models.prompt(4, 5), models.prompt(7, 3, seed=1)]


@pytest.fixture
def given(tiny: Any) -> dict[str, Any]:
    return models.inputs(tiny, ROWS, models.pixels(2))


def footprint(model: Any) -> dict[str, Any]:
    """Return what an attachment could change: callable attributes of instances and the hooks of every module."""
    out: dict[str, Any] = {}
    for path, module in model.named_modules():
        own = {k: v for k, v in module.__dict__.items() if callable(v)}
        found = (module.__dict__[k].values() for k in module.__dict__ if k.endswith("_hooks") and module.__dict__[k])
        hooks = [[h for h in some if "output_captur" not in repr(h)] for some in found]  # transformers' own
        out[path] = (own, [some for some in hooks if some])
    return out


def test_keep_all_equals_the_base_model_bit_for_bit(
    name: str, chosen: Setting, tiny: Any, given: dict[str, Any], logits: Any
) -> None:
    if chosen.keep_all is None:
        pytest.skip(f"{name} has no setting that keeps everything")
    base, answer = logits(tiny, given), models.generate(tiny, given)
    with llava_prune.pruned(tiny, name, **chosen.keep_all) as handle:
        assert torch.equal(logits(tiny, given), base)
        pruned = models.generate(tiny, given)
        assert handle.last.tokens_out.tolist() == [[models.PATCHES] * models.LAYERS] * 2
        everything = [list(range(models.PATCHES))] * 2
        assert [k.tolist() for k in handle.last.kept] == [everything] * models.LAYERS
    assert torch.equal(pruned.sequences, answer.sequences)
    assert all(torch.equal(a, b) for a, b in zip(pruned.logits, answer.logits, strict=True))


def test_detach_restores_everything(name: str, hyper: Any, tiny: Any, given: dict[str, Any], logits: Any) -> None:
    before, base = footprint(tiny), logits(tiny, given)
    handle = llava_prune.attach(tiny, name, **hyper)
    assert footprint(tiny) != before
    models.generate(tiny, given)
    handle.detach()
    assert footprint(tiny) == before
    assert torch.equal(logits(tiny, given), base)
    handle.detach()  # a second call does nothing
    assert footprint(tiny) == before


def test_own_forward_of_the_instance_comes_back(name: str, hyper: Any, given: dict[str, Any], tiny: Any) -> None:
    """A forward set on the instance, as accelerate does, runs for text-only requests and is restored by detach."""
    lm, calls = models.language_model(tiny), []
    stock = lm.forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock(*args, **kwargs)

    lm.forward = wrapper
    try:
        with llava_prune.pruned(tiny, name, **hyper):
            tiny(**models.inputs(tiny, [[1, 5, 6]]))
        assert calls == [1]
        assert lm.__dict__["forward"] is wrapper
    finally:
        del lm.__dict__["forward"]


def test_second_attach_is_refused(name: str, hyper: Any, tiny: Any, given: dict[str, Any], logits: Any) -> None:
    with llava_prune.pruned(tiny, name, **hyper):
        attached, pruned = footprint(tiny), logits(tiny, given)
        with pytest.raises(ValueError, match="already"):
            llava_prune.attach(tiny, "random", tokens=3)
        assert footprint(tiny) == attached
        assert torch.equal(logits(tiny, given), pruned)


@pytest.fixture(params=["tower", "projector", "layer 0", "layer 3"])
def broken(request: pytest.FixtureRequest, tiny: Any) -> Iterator[Any]:
    """A switch that makes one part of the model fail."""
    lm, llava = models.language_model(tiny), models.is_llava(tiny)
    parts = {
        "tower": tiny.get_vision_tower() if llava else tiny.model.vision_tower,
        "projector": tiny.model.mm_projector if llava else tiny.model.multi_modal_projector,
        "layer 0": lm.layers[0],
        "layer 3": lm.layers[3],
    }
    fail = {"on": False}

    def hook(module: Any, args: Any, output: Any) -> None:
        if fail["on"]:
            raise RuntimeError("out of memory, say")

    remove = parts[request.param].register_forward_hook(hook)
    yield fail
    remove.remove()


def test_exception_then_reuse(
    name: str, hyper: Any, tiny: Any, given: dict[str, Any], logits: Any, broken: dict[str, bool]
) -> None:
    text = models.inputs(tiny, [[1, 5, 6, 7, 8, 9, 10]])
    base, base_text = logits(tiny, given), logits(tiny, text)
    with llava_prune.pruned(tiny, name, **hyper) as handle:
        fine = logits(tiny, given)
        broken["on"] = True
        for call in (logits, models.generate):
            with pytest.raises(RuntimeError, match="out of memory"):
                call(tiny, given)
        broken["on"] = False
        assert torch.equal(logits(tiny, text), base_text)
        assert torch.equal(logits(tiny, given), fine)
        assert handle.last is not None
    assert torch.equal(logits(tiny, given), base)


def test_exception_in_the_method_then_reuse(tiny: Any, given: dict[str, Any], logits: Any) -> None:
    class Fails(llava_prune.Method):
        broken = True

        def prune(self, layer: int, view: llava_prune.View) -> None:
            if self.broken and layer == 2:
                raise ZeroDivisionError

    method = Fails()
    base = logits(tiny, given)
    with llava_prune.pruned(tiny, method):
        with pytest.raises(ZeroDivisionError):
            models.generate(tiny, given)
        method.broken = False
        assert torch.equal(logits(tiny, given), base)
    assert torch.equal(logits(tiny, given), base)


def test_exception_inside_the_block_detaches(name: str, hyper: Any, tiny: Any) -> None:
    before = footprint(tiny)
    with pytest.raises(KeyError), llava_prune.pruned(tiny, name, **hyper):
        raise KeyError("user's")
    assert footprint(tiny) == before


def test_copies_and_saves(name: str, hyper: Any, tiny: Any, given: dict[str, Any], logits: Any) -> None:
    """A copy of an attached model prunes by itself; a detached model is copied and saved like an untouched one."""
    base = logits(tiny, given)
    with llava_prune.pruned(tiny, name, **hyper) as handle:
        pruned = logits(tiny, given)
        twin = copy.deepcopy(tiny)
        last = handle.last
        assert torch.equal(logits(twin, given), pruned)
        assert handle.last is last  # the copy keeps its own record
    twin = copy.deepcopy(tiny)
    assert footprint(twin).keys() == footprint(tiny).keys()
    file = io.BytesIO()
    torch.save(tiny.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == tiny.state_dict().keys()
    assert torch.equal(logits(twin, given), base)
    assert torch.equal(logits(tiny, given), base)


@pytest.mark.parametrize("build", [models.tiny_llava, models.tiny_hf])
def test_an_attached_model_pickles(name: str, hyper: Any, build: Any) -> None:
    """No local function is stored on the model. (Hooks that transformers itself installs in a call do not pickle.)"""
    model, file = build(), io.BytesIO()
    before = {path: (own.keys(), hooks) for path, (own, hooks) in footprint(model).items()}
    with llava_prune.pruned(model, name, **hyper):
        torch.save(model, file)
    file.seek(0)
    copied = torch.load(file, weights_only=False)
    llava_prune.detach(copied)
    assert {path: (own.keys(), hooks) for path, (own, hooks) in footprint(copied).items()} == before


def test_unknown_hyper_parameters_are_refused(name: str, hyper: Any, tiny: Any) -> None:
    before = footprint(tiny)
    with pytest.raises(ValueError, match="no hyper-parameter colour"):
        llava_prune.attach(tiny, name, **hyper, colour="red")
    assert footprint(tiny) == before


@pytest.mark.parametrize("tokens", [-1, 1.5, "12", float("nan"), True, [12]])
def test_budgets_are_checked(name: str, chosen: Setting, tokens: Any) -> None:
    if "tokens" not in chosen.hyper:
        pytest.skip(f"{name} is not asked for a budget here")
    with pytest.raises(ValueError, match="tokens"):
        llava_prune.build(name, **{**chosen.hyper, "tokens": tokens})


def test_budgets_above_the_image_are_refused(name: str, chosen: Setting, tiny: Any) -> None:
    if "tokens" not in chosen.hyper:
        pytest.skip(f"{name} is not asked for a budget here")
    before = footprint(tiny)
    with pytest.raises(ValueError, match="37"):
        llava_prune.attach(tiny, name, **{**chosen.hyper, "tokens": models.PATCHES + 1})
    assert footprint(tiny) == before


def test_hyper_parameters_are_shown(name: str, hyper: Any) -> None:
    method = llava_prune.build(name, **hyper)
    assert method.name == name
    assert {k: method.hyper()[k] for k in hyper} == hyper
    assert llava_prune.build(name, **method.hyper()).hyper() == method.hyper()
    assert method.info.paper
