"""Requests that a pruned model cannot serve are refused with a reason, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llava_prune
from tests import models
from tests.contract.settings import NAMES, Setting, setting

ROWS = [models.prompt(4, 5), models.prompt(7, 3, seed=1)]
NEEDS_CLASS_TOKEN = {
    "autoprune", "autoprune-flash", "fastervlm", "visionzip", "prumerge", "prumerge+", "tome",
    "vispruner", "scope", "holov", "hired",
    "visionzip+autoprune", "fastervlm+topv", "prumerge++pdrop", "tome+sparsevlm", "holov+autoprune",
}  # fmt: skip


def test_labels_are_refused(name: str, chosen: Setting, tiny: Any) -> None:
    given = models.inputs(tiny, ROWS[:1], models.pixels(1))
    text = models.inputs(tiny, [[1, 5, 6, 7]])
    with torch.inference_mode(), llava_prune.pruned(tiny, name, **chosen.hyper) as handle:
        with pytest.raises(ValueError, match="labels on a pruned model.*after the image"):
            tiny(**given, labels=given["input_ids"])
        assert handle.last is None, "nothing has run"
        assert tiny(**text, labels=text["input_ids"]).loss.isfinite()


def test_last_logits_belong_to_the_last_ids(name: str, chosen: Setting, tiny_models: dict[str, Any]) -> None:
    """`logits_to_keep` can select the tokens after the image, at most, as documented."""
    model = tiny_models["hf"]
    given = models.inputs(model, ROWS[:1], models.pixels(1))
    after = 5
    with torch.inference_mode(), llava_prune.pruned(model, name, **chosen.hyper):
        every = model(**given).logits
        for keep in (1, 3, after):
            assert torch.allclose(model(**given, logits_to_keep=keep).logits, every[:, -keep:], atol=1e-6)
        for keep in (after + 1, 40):
            with pytest.raises(ValueError, match=f"logits_to_keep={keep}.*give at most {after}"):
                model(**given, logits_to_keep=keep)
        for odd in (torch.tensor([1, 2]), slice(-3, None), -3, None):
            with pytest.raises(ValueError, match="logits_to_keep=.*give the number of last logits"):
                model(**given, logits_to_keep=odd)
        text = models.inputs(model, [[1, 5, 6, 7]])
        assert model(**text, logits_to_keep=3).logits.shape[1] == 3


@pytest.mark.parametrize("method", ["fastv", "visionzip"])
def test_masks_and_positions_of_another_shape(method: str, tiny: Any) -> None:
    given = models.inputs(tiny, ROWS, models.pixels(2))
    batch, length = given["input_ids"].shape
    wrong = [("attention_mask", (batch, length + n)) for n in (-3, 3)] + [("attention_mask", (1, length))]
    if not models.is_llava(tiny):  # package llava makes the position ids
        wrong += [("position_ids", (1, length + n)) for n in (-3, 3)]
    with llava_prune.pruned(tiny, method, tokens=16), torch.inference_mode():
        for name, shape in wrong:
            with pytest.raises(ValueError, match=rf"{name} has the shape .* and the prompt \(2, {length}\); give"):
                tiny(**{**given, name: torch.ones(shape, dtype=torch.long)})
        with pytest.raises(ValueError, match=r"attention_mask.* and the prompt \(2, "):
            models.generate(tiny, {**given, "attention_mask": torch.ones(batch, length - 3, dtype=torch.long)}, 2)


def siglip() -> Any:
    """Return a LLaVA of transformers with a SigLIP tower of the size of the small models."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    vision = SiglipVisionConfig(**sizes, num_hidden_layers=4, image_size=models.SIDE, patch_size=14)
    text = LlamaConfig(**sizes, num_hidden_layers=models.LAYERS, vocab_size=models.VOCAB + 1, eos_token_id=None)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=models.VOCAB,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def siglip_model() -> Any:
    return siglip()


def test_towers_without_a_class_token(name: str, chosen: Setting, siglip_model: Any, logits: Any) -> None:
    """Methods that need the class token are refused with the reason; the others prune as with CLIP."""
    given = models.inputs(siglip_model, ROWS[:1], models.pixels(1))
    base = logits(siglip_model, given)
    if name in NEEDS_CLASS_TOKEN:
        with pytest.raises(ValueError, match="needs the class token of a CLIP tower; this tower is SigLIP"):
            llava_prune.attach(siglip_model, name, **chosen.hyper)
    else:
        with llava_prune.pruned(siglip_model, name, check=True, **chosen.hyper) as handle:
            models.generate(siglip_model, given, 2)
            assert (int(handle.last.tokens_out.sum()) < models.PATCHES * models.LAYERS) == chosen.prunes
    assert torch.equal(logits(siglip_model, given), base)


def test_every_method_declares_what_it_needs() -> None:
    """A method that uses position 0 of the tower declares the class token."""
    for name in NAMES:
        method = llava_prune.build(name, **setting(name).hyper)
        looks = bool(method.vision_queries(2)) or any(method.merge_schedule(2, models.PATCHES))
        assert not looks or "class token" in method.requires, name
        assert ("class token" in method.requires) == (name in NEEDS_CLASS_TOKEN)


def test_unknown_towers(siglip_model: Any) -> None:
    class Dinosaur(type(siglip_model.model.vision_tower)):  # type: ignore[misc]
        """A tower of an unknown class."""

    tower, stock = siglip_model.model.vision_tower, type(siglip_model.model.vision_tower)
    tower.__class__ = Dinosaur
    try:
        with pytest.raises(ValueError, match="this tower is Dinosaur, whose layout is not known"):
            llava_prune.attach(siglip_model, "visionzip", tokens=12)
        with llava_prune.pruned(siglip_model, "uniform", tokens=12) as handle:
            assert handle.attached
    finally:
        tower.__class__ = stock


def test_features_with_the_class_token(tiny_models: dict[str, Any], logits: Any) -> None:
    """vision_feature_select_strategy="full" keeps the class token among the features, which patch methods refuse."""
    model = tiny_models["hf"]
    model.config.vision_feature_select_strategy = "full"
    try:
        with pytest.raises(ValueError, match="37 features for 36 patches"):
            llava_prune.attach(model, "visionzip", tokens=12)
    finally:
        model.config.vision_feature_select_strategy = "default"
    with llava_prune.pruned(model, "visionzip", tokens=12):
        logits(model, models.inputs(model, ROWS[:1], models.pixels(1)))


def test_other_language_models_are_named() -> None:
    """A language model with the module names of Llama but norms in other places is refused by name."""
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**sizes, num_hidden_layers=4, image_size=84, patch_size=14)
    text = transformers.Gemma2Config(
        **sizes, num_hidden_layers=2, num_key_value_heads=4, vocab_size=140, head_dim=16, pad_token_id=0
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(ValueError, match="Gemma2Model is not supported; .*those of Llama, Mistral, Qwen2, Qwen3"):
        llava_prune.attach(model, "uniform", tokens=8)


def test_other_models_are_named() -> None:
    with pytest.raises(ValueError, match="Linear is not a supported LLaVA model"):
        llava_prune.attach(torch.nn.Linear(2, 2), "uniform", tokens=8)
