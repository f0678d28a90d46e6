"""Wrapped and copied models: PEFT models are unwrapped; torch.compile and DataParallel are refused with advice."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

import llava_prune
from llava_prune.models.family import family_of
from tests import models
from tests.contract.settings import Setting

ROWS = [models.prompt(4, 5)]


@pytest.fixture
def given(tiny: Any) -> dict[str, Any]:
    return models.inputs(tiny, ROWS, models.pixels(1))


def test_peft_models_are_unwrapped(name: str, chosen: Setting, tiny: Any, given: Any, logits: Any) -> None:
    """A PEFT model with a zero adapter keeps the tokens of its base model; a non-zero adapter changes the logits."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r".*layers\.\d+\.self_attn\.[qk]_proj")
    wrapped = peft.get_peft_model(copy.deepcopy(tiny), config)
    with llava_prune.pruned(tiny, name, **chosen.hyper) as handle:
        expected = models.generate(tiny, given, 2)
        kept = [k.tolist() for k in handle.last.kept]
    with llava_prune.pruned(wrapped, name, **chosen.hyper) as handle:
        got = models.generate(wrapped.get_base_model(), given, 2)
        assert torch.allclose(got.logits[0], expected.logits[0], atol=1e-5)
        assert [k.tolist() for k in handle.last.kept] == kept
        with torch.inference_mode():
            assert torch.allclose(wrapped(**given).logits[:, -1], expected.logits[0], atol=1e-5)
        with torch.no_grad():
            for path, parameter in wrapped.named_parameters():
                if "lora_B" in path:
                    parameter.fill_(0.05)
        assert not torch.allclose(logits(wrapped, given), expected.logits[0], atol=1e-2)
        with pytest.raises(ValueError, match="already"):
            llava_prune.attach(wrapped, "uniform", tokens=3)


def test_an_adapter_that_copies_the_projector(tiny: Any, given: Any, logits: Any) -> None:
    """PEFT copies the modules of `modules_to_save`, hooks included: the copy prunes, and the model is not copied."""
    import peft

    name = "mm_projector" if models.is_llava(tiny) else "multi_modal_projector"
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[name])
    for method in ("visionzip", "tome", "autoprune"):
        with llava_prune.pruned(tiny, method, tokens=12):
            expected = logits(tiny, given)
        model = copy.deepcopy(tiny)
        handle = llava_prune.attach(model, method, tokens=12)
        wrapped = peft.get_peft_model(model, lora)
        assert torch.allclose(logits(wrapped, given), expected, atol=1e-5)
        projector = model.get_submodule(f"model.{name}").modules_to_save["default"]
        hooks = list(projector._forward_pre_hooks.values())
        assert [hook.__self__ for hook in hooks] == [handle.vision] and handle.vision.handle is handle
        handle.detach()
        copied = logits(wrapped, given)
        assert torch.allclose(copied, logits(tiny, given), atol=1e-5)


@pytest.mark.parametrize("how", ["torch.compile", "in place", "language model"])
def test_compiled_models_are_refused(tiny: Any, how: str) -> None:
    model = copy.deepcopy(tiny)
    compiled = model
    if how == "torch.compile":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        models.language_model(model).compile(backend="eager")
    with pytest.raises(ValueError, match="compile afterwards"):
        llava_prune.attach(compiled, "uniform", tokens=12)


def test_compiled_after_attach_can_be_detached(tiny: Any) -> None:
    model = copy.deepcopy(tiny)
    llava_prune.attach(model, "uniform", tokens=12)
    llava_prune.detach(torch.compile(model, backend="eager"))
    for nothing in (model, None, 5):
        with pytest.raises(ValueError, match="no method is attached"):
            llava_prune.detach(nothing)


def test_layers_compiled_on_their_own(tiny: Any, given: Any, logits: Any) -> None:
    """A compiled layer runs no hook inside it: a method that needs one is refused, another one prunes as ever."""
    model = copy.deepcopy(tiny)
    with llava_prune.pruned(model, "fastv", tokens=16):
        expected = logits(model, given)
    for layer in models.language_model(model).layers:
        layer.compile(backend="eager")
    logits(model, given)  # compiled without the hook
    with llava_prune.pruned(model, "fastv", tokens=16):
        assert torch.allclose(logits(model, given), expected, atol=1e-5)
    with (
        llava_prune.pruned(model, "topv", tokens=16),
        pytest.raises(ValueError, match=r"'topv' reads the input of the MLP in decoder layer \d, which .* compiled"),
    ):
        logits(model, given)
    torch.compiler.reset()


def test_data_parallel_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="DataParallel.*model.module"):
        llava_prune.attach(torch.nn.DataParallel(tiny), "uniform", tokens=12)


def test_a_copy_can_be_detached(name: str, chosen: Setting, tiny: Any, given: Any, logits: Any) -> None:
    """A copy of an attached model is pruned with its own record; detaching the copy leaves the original attached."""
    base = logits(tiny, given)
    with llava_prune.pruned(tiny, name, **chosen.hyper) as handle:
        pruned, record = logits(tiny, given), handle.last
        twin = copy.deepcopy(tiny)
        assert torch.equal(logits(twin, given), pruned) and handle.last is record
        with pytest.raises(ValueError, match=r"llava_prune.detach\(model\)"):
            llava_prune.attach(twin, "uniform", tokens=12)
        llava_prune.detach(twin)
        assert torch.equal(logits(twin, given), base)
        assert torch.equal(logits(tiny, given), pruned)
        with llava_prune.pruned(twin, "uniform", tokens=12) as second:
            logits(twin, given)
            assert second.last.tokens_in.tolist() == [[12] * models.LAYERS]
    assert torch.equal(logits(tiny, given), base)


def test_a_copy_of_a_detached_model_is_unpruned(tiny: Any, given: Any, logits: Any) -> None:
    base = logits(tiny, given)
    with llava_prune.pruned(tiny, "autoprune", tokens=12):
        logits(tiny, given)
    twin = copy.deepcopy(tiny)
    assert torch.equal(logits(twin, given), base)
    with pytest.raises(ValueError, match="no method"):
        llava_prune.detach(twin)


def test_representations(tiny: Any, given: Any, logits: Any) -> None:
    handle = llava_prune.attach(tiny, "uniform", tokens=12)
    try:
        assert "Uniform(tokens=12)" in repr(handle) and "last=None" in repr(handle)
        logits(tiny, given)
        assert "1 sample, 6 layers, visual tokens: 12 in" in repr(handle.last)
    finally:
        handle.detach()
    assert "detached from" in repr(handle)


def test_a_language_model_that_was_replaced(tiny: Any, given: Any, logits: Any) -> None:
    """Another language model would answer from all visual tokens; the way out is to attach again."""
    model = copy.deepcopy(tiny)
    with llava_prune.pruned(model, "fastv", tokens=16):
        expected = logits(model, given)
    owner, name = (model, "model") if models.is_llava(model) else (model.model, "language_model")
    llava_prune.attach(model, "fastv", tokens=16)
    if models.is_llava(model):  # the language model holds tower and projector
        fresh = copy.copy(owner.model)
        fresh.__dict__ = {k: v for k, v in vars(owner.model).items() if k != "forward"}
    else:
        fresh = copy.deepcopy(tiny.model.language_model)
    setattr(owner, name, fresh)
    for call in (lambda: logits(model, given), lambda: models.generate(model, given, 2)):
        with pytest.raises(ValueError, match="were not pruned: the language model.* was replaced .*; detach"):
            call()
    llava_prune.detach(model)
    with llava_prune.pruned(model, "fastv", tokens=16):
        assert torch.allclose(logits(model, given), expected, atol=1e-5)


def test_a_detached_model_is_freed() -> None:
    model = models.tiny_hf()
    gone = weakref.ref(model)
    with llava_prune.pruned(model, "autoprune", tokens=12):
        pass
    del model
    gc.collect()
    assert gone() is None


def test_later_replacements_are_told(tiny: Any) -> None:
    """If another forward has replaced the attached one, detach raises an error and changes nothing."""
    lm = models.language_model(tiny)
    handle = llava_prune.attach(tiny, "uniform", tokens=12)
    ours = lm.forward
    lm.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match="undo the later change"):
        handle.detach()
    assert handle.attached
    lm.forward = ours
    handle.detach()
    assert not handle.attached


def test_a_deleted_replacement_counts_as_removed(tiny: Any, given: Any, logits: Any) -> None:
    """A user wraps the forward of the instance and takes it back by deleting it, which deletes the attached one too."""
    model = copy.deepcopy(tiny)
    base = logits(model, given)
    handle = llava_prune.attach(model, "uniform", tokens=12)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    del model.forward
    handle.detach()
    assert not handle.attached and "forward" not in vars(model)
    assert torch.equal(logits(model, given), base)
    own = model.forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)
    with llava_prune.pruned(model, "uniform", tokens=12):
        del model.forward
    assert model.forward is own, "the forward of before attach comes back"


@pytest.mark.parametrize("part", ["tower", "encoder", "projector"])
def test_a_tower_or_projector_that_was_replaced(part: str, tiny: Any, given: Any, logits: Any) -> None:
    """The hooks are on the modules of before; the way out is to attach again."""
    model = copy.deepcopy(tiny)
    family = family_of(model)
    with llava_prune.pruned(model, "visionzip", tokens=12):
        expected = logits(model, given)
    old = getattr(family, part)(model)
    handle = llava_prune.attach(model, "visionzip", tokens=12)
    fresh = getattr(family, part)(copy.deepcopy(tiny))
    owner = next(m for m in model.modules() if old in m.children())
    setattr(owner, next(name for name, child in owner.named_children() if child is old), fresh)
    for call in (lambda: logits(model, given), lambda: models.generate(model, given, 2)):
        with pytest.raises(ValueError, match=r"replaced after attaching, .* compiled .*reset\(\) and attach it again"):
            call()
    handle.detach()
    with llava_prune.pruned(model, "visionzip", tokens=12):
        assert torch.equal(logits(model, given), expected)


def test_prefix_tuning_is_refused(tiny_models: dict[str, Any]) -> None:
    """PEFT caches its virtual tokens before the prompt; an image in the prompt then comes after cached tokens."""
    from peft import PrefixTuningConfig, get_peft_model

    model = copy.deepcopy(tiny_models["hf"])
    given = models.inputs(model, [models.prompt(4, 5)], models.pixels(1))
    wrapped = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with (
        llava_prune.pruned(wrapped, "fastv", tokens=16),
        torch.inference_mode(),
        pytest.raises(ValueError, match="after 4 cached tokens, .* prefix tuning: images are pruned in the prefill"),
    ):
        wrapped(**given)
