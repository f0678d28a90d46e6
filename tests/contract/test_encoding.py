"""Calls around a request: the user gets true image features, nested calls use their own images, and embeddings are
refused."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

import llava_prune
from tests import models
from tests.contract.settings import Setting

ROWS = [models.prompt(4, 5), models.prompt(7, 3, seed=1)]
EMBEDS = "inputs_embeds on a pruned model"


def encoded(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return (N, T, D) features from the package's own encoder."""
    with torch.no_grad():
        if models.is_llava(model):
            return model.encode_images(pixels)
        return torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))


def embedded(model: Any, row: Any, features: torch.Tensor) -> torch.Tensor:
    """Return (1, L, D) embeddings of a prompt with the features of its image inserted."""
    table = models.language_model(model).embed_tokens
    at = row.index(models.IMAGE)
    before, after = torch.tensor([row[:at]]), torch.tensor([row[at + 1 :]])
    return torch.cat([table(before), features, table(after)], 1).detach()


def test_encoders_return_true_features(name: str, chosen: Setting, tiny: Any) -> None:
    """Outside of a request, before and after one, image features are those of the unpruned model, bit for bit."""
    pixels, given = models.pixels(2), models.inputs(tiny, ROWS, models.pixels(2, seed=5))
    base = encoded(tiny, pixels)
    with llava_prune.pruned(tiny, name, **chosen.hyper) as handle:
        assert torch.equal(encoded(tiny, pixels), base)
        expected = models.generate(tiny, given, 2)
        kept = [k.tolist() for k in handle.last.kept]
        assert torch.equal(encoded(tiny, pixels), base)
        again = models.generate(tiny, given, 2)
        assert torch.equal(again.logits[0], expected.logits[0])
        assert [k.tolist() for k in handle.last.kept] == kept
    assert torch.equal(encoded(tiny, pixels), base)


def features(out: Any) -> torch.Tensor:
    """Return (N, T, D) features; transformers before 5.24 gives one tensor, later releases a list."""
    found = out.image_hidden_states
    return torch.stack(list(found.split(models.PATCHES) if isinstance(found, torch.Tensor) else found))


def test_the_package_gets_true_features_in_a_request(name: str, chosen: Setting, tiny_models: dict[str, Any]) -> None:
    """transformers' splice gets the features of every patch (for ToMe, those of the merged tokens)."""
    model, given = tiny_models["hf"], models.inputs(tiny_models["hf"], ROWS, models.pixels(2))
    with torch.inference_mode():
        base = features(model(**given))
        with llava_prune.pruned(model, name, **chosen.hyper) as handle:
            got = features(model(**given))
    assert got.abs().amax(2).min() > 0, "no patch is a placeholder"
    if not handle.vision.merges:
        assert torch.allclose(got, base, atol=1e-5)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_embeddings_are_refused(name: str, chosen: Setting, tiny: Any, call: str) -> None:
    """Embeddings are refused in every call, and the refusal changes neither the record nor later answers."""
    pixels = models.pixels(2)
    given = models.inputs(tiny, ROWS[:1], pixels[:1])
    with llava_prune.pruned(tiny, name, **chosen.hyper) as handle:
        expected = models.generate(tiny, given, 2).logits[0]
        record = handle.last
        ready = [embedded(tiny, row, encoded(tiny, pixels[i : i + 1])) for i, row in enumerate(ROWS)]
        for embeds in reversed(ready):
            if call == "generate" and models.is_llava(tiny):
                with pytest.raises(NotImplementedError, match="inputs_embeds"):  # the package's own error
                    tiny.generate(inputs_embeds=embeds, max_new_tokens=2)
                continue
            with pytest.raises(ValueError, match=EMBEDS), torch.no_grad():
                tiny(inputs_embeds=embeds) if call == "forward" else tiny.generate(inputs_embeds=embeds)
        with pytest.raises(ValueError, match=EMBEDS), torch.no_grad():
            models.language_model(tiny)(inputs_embeds=ready[0])
        assert handle.last is record
        assert torch.equal(models.generate(tiny, given, 2).logits[0], expected)


def test_a_splice_prepared_ahead(name: str, chosen: Setting, tiny_models: dict[str, Any]) -> None:
    """The user may call package llava's own splice: its result is the unpruned one, and is refused as an input."""
    model = tiny_models["llava"]
    ids = torch.tensor([ROWS[0]])
    arguments = (ids, None, None, None, None, models.pixels(1))
    with torch.no_grad():
        base = model.prepare_inputs_labels_for_multimodal(*arguments)
        with llava_prune.pruned(model, name, **chosen.hyper):
            out = model.prepare_inputs_labels_for_multimodal(*arguments)
            assert torch.equal(out[4], base[4])
            with pytest.raises(ValueError, match=EMBEDS):
                model(inputs_embeds=out[4])


def test_images_encoded_before_the_call(name: str, chosen: Setting, tiny_models: dict[str, Any]) -> None:
    """transformers' mm_encoder_outputs are refused by methods that prune while images are encoded."""
    model = tiny_models["hf"]
    given = models.inputs(model, ROWS[:1], models.pixels(1))
    pixels = given.pop("pixel_values")
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        pytest.skip("this release of transformers encodes images in the forward")
    with torch.inference_mode(), llava_prune.pruned(model, name, **chosen.hyper) as handle:
        expected = models.generate(model, {**given, "pixel_values": pixels}, 2).logits[0]
        ahead = {"mm_encoder_outputs": {"image": model.model.get_image_features(pixel_values=pixels)}}
        for call in (lambda: model(**given, **ahead), lambda: models.generate(model, {**given, **ahead}, 2)):
            if handle.vision.sees_patches:
                with pytest.raises(ValueError, match="encoded outside of generate"):
                    call()
            else:
                assert torch.allclose(_first(call()), expected, atol=1e-5)
        assert torch.equal(models.generate(model, {**given, "pixel_values": pixels}, 2).logits[0], expected)


def _first(out: Any) -> torch.Tensor:
    return out.logits[0] if isinstance(out.logits, tuple) else out.logits[:, -1]


class Calls:
    """A logits processor that calls the model with another image, or without one, after every token."""

    def __init__(self, model: Any, given: dict[str, Any], encode: bool = False) -> None:
        self.model, self.given, self.encode = model, given, encode
        self.seen: list[torch.Tensor] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.encode:
            encoded(self.model, self.given["images" if models.is_llava(self.model) else "pixel_values"])
        else:
            self.seen.append(self.model(**self.given, use_cache=True).logits[:, -1])
        return scores


@pytest.mark.parametrize("what", ["image", "text", "encode"])
def test_calls_inside_generate(name: str, chosen: Setting, tiny: Any, what: str, logits: Any) -> None:
    """Calls made inside generate(), as by contrastive decoding, are answered as if they were alone."""
    given = models.inputs(tiny, ROWS[:1], models.pixels(1))
    other = models.inputs(tiny, [ROWS[1]], models.pixels(1, seed=9))
    if what == "text":
        other = models.inputs(tiny, [[1, 7, 9, 11]])
    cached = [True] if models.is_llava(tiny) else [True, False]  # package llava always caches
    with llava_prune.pruned(tiny, name, **chosen.hyper) as handle:
        for use_cache in cached:
            expected = models.generate(tiny, given, 3, use_cache=use_cache)
            alone = logits(tiny, other)
            inside = Calls(tiny, other, what == "encode")
            out = models.generate(tiny, given, 3, use_cache=use_cache, logits_processor=[inside])
            assert all(torch.equal(a, b) for a, b in zip(out.logits, expected.logits, strict=True))
            assert all(torch.allclose(seen, alone, atol=1e-5) for seen in inside.seen)
            assert handle.last is not None


def test_classifier_free_guidance_keeps_the_record(name: str, chosen: Setting, tiny_models: dict[str, Any]) -> None:
    model = tiny_models["hf"]
    given = models.inputs(model, ROWS[:1], models.pixels(1))
    with llava_prune.pruned(model, name, **chosen.hyper) as handle:
        plain = models.generate(model, given, 3)
        kept = [k.tolist() for k in handle.last.kept]
        guided = models.generate(model, given, 3, guidance_scale=1.5)
        assert [k.tolist() for k in handle.last.kept] == kept
        assert torch.equal(guided.logits[0], plain.logits[0])


def test_two_models_at_once(tiny_models: dict[str, Any], logits: Any) -> None:
    """A call of one attached model inside a call of another does not affect either."""
    outer, inner = tiny_models["hf"], tiny_models["llava"]
    given, other = (models.inputs(m, ROWS[:1], models.pixels(1)) for m in (outer, inner))
    with llava_prune.pruned(outer, "visionzip", tokens=12), llava_prune.pruned(inner, "autoprune", tokens=12) as second:
        alone, expected = logits(inner, other), models.generate(outer, given, 3)
        kept = [k.tolist() for k in second.last.kept]
        calls = Calls(inner, other)
        out = models.generate(outer, given, 3, logits_processor=[calls])
        assert all(torch.equal(a, b) for a, b in zip(out.logits, expected.logits, strict=True))
        assert all(torch.equal(seen, alone) for seen in calls.seen)
        assert [k.tolist() for k in second.last.kept] == kept


def test_an_interrupt_leaves_nothing_open(name: str, chosen: Setting, tiny: Any) -> None:
    """A KeyboardInterrupt in the tower leaves no open request, so embeddings are refused afterwards as well."""
    from llava_prune.runtime import state

    given = models.inputs(tiny, ROWS[:1], models.pixels(1))
    tower = tiny.get_vision_tower() if models.is_llava(tiny) else tiny.model.vision_tower

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with llava_prune.pruned(tiny, name, **chosen.hyper):
        hook = tower.register_forward_hook(interrupt)
        for call in (lambda: tiny(**given), lambda: models.generate(tiny, given, 2)):
            with pytest.raises(KeyboardInterrupt):
                call()
            assert state.current_request() is None and state.current_tower_pass() is None
        hook.remove()
        with pytest.raises(ValueError, match=EMBEDS), torch.no_grad():
            tiny(inputs_embeds=embedded(tiny, ROWS[0], encoded(tiny, models.pixels(1))))


def test_chunked_prefills_are_refused(tiny_models: dict[str, Any]) -> None:
    model = tiny_models["hf"]
    given = models.inputs(model, ROWS[:1], models.pixels(1))
    with llava_prune.pruned(model, "uniform", tokens=12), pytest.raises(ValueError, match="prefill_chunk_size"):
        models.generate(model, given, 2, prefill_chunk_size=16)
    model = copy.copy(model)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.prefill_chunk_size = 16
    with llava_prune.pruned(model, "uniform", tokens=12), pytest.raises(ValueError, match="prefill_chunk_size"):
        models.generate(model, given, 2)


def test_the_inner_model_is_pruned_too(name: str, chosen: Setting, tiny_models: dict[str, Any]) -> None:
    """A direct call of transformers' LlavaModel, with positional arguments, is pruned too."""
    model = tiny_models["hf"]
    given = models.inputs(model, ROWS[:1], models.pixels(1))
    with torch.inference_mode(), llava_prune.pruned(model, name, **chosen.hyper) as handle:
        expected = model(**given).logits[:, -1]
        record = [k.tolist() for k in handle.last.kept]
        inner = model.model(given["input_ids"], given["pixel_values"], given["attention_mask"], None, None)
        assert [k.tolist() for k in handle.last.kept] == record
        assert torch.allclose(model.lm_head(inner.last_hidden_state[:, -1]), expected, atol=1e-5)


def test_a_pruned_cache_is_refused_by_an_unpruned_model(name: str, chosen: Setting, tiny: Any) -> None:
    """A pruned cache is refused after detaching; once a method is attached again, the conversation continues."""
    given = models.inputs(tiny, ROWS[:1], models.pixels(1))
    length = len(ROWS[0]) - 1 + models.PATCHES
    new, mask = torch.tensor([[17]]), torch.ones(1, length + 1, dtype=torch.long)
    with torch.inference_mode():
        with llava_prune.pruned(tiny, name, **chosen.hyper):
            cache = tiny(**given, use_cache=True).past_key_values
            copied = copy.deepcopy(cache)
            expected = tiny(input_ids=new, attention_mask=mask, past_key_values=copied).logits
        lengths = models.cache_lengths(cache)
        for held in (cache, copied):
            with pytest.raises(ValueError, match="not pruned any more"):
                tiny(input_ids=new, attention_mask=mask, past_key_values=held)
        assert models.cache_lengths(cache) == lengths
        with llava_prune.pruned(tiny, name, **chosen.hyper):
            assert torch.equal(tiny(input_ids=new, attention_mask=mask, past_key_values=cache).logits, expected)


def test_a_cache_that_was_reset_serves_another_request(name: str, chosen: Setting, tiny: Any) -> None:
    given = models.inputs(tiny, ROWS[:1], models.pixels(1))
    with torch.inference_mode(), llava_prune.pruned(tiny, name, **chosen.hyper):
        expected = tiny(**given, use_cache=True)
        cache = tiny(**given, use_cache=True).past_key_values
        cache.reset()
        if Version(transformers.__version__) < Version("5.20") and cache.get_seq_length():
            pytest.skip("in older releases of transformers, a cache keeps its length when it is reset")
        again = tiny(**given, past_key_values=cache)
        assert torch.equal(again.logits, expected.logits)
        assert models.cache_lengths(cache) == models.cache_lengths(expected.past_key_values)
    with torch.inference_mode():
        cache.reset()
        plain = tiny(**given, past_key_values=cache)
        assert torch.equal(plain.logits, tiny(**given).logits)


def test_a_cache_made_from_the_layers_of_another(tiny: Any) -> None:
    """The copy has no decode state: a stock step would count positions from the length of the first layer."""
    given = models.inputs(tiny, [models.prompt(4, 5)], models.pixels(1))
    with llava_prune.pruned(tiny, "autoprune", tokens=12), torch.inference_mode():
        out = tiny(**given, use_cache=True)
        again = DynamicCache()
        for i, layer in enumerate(out.past_key_values.layers):
            again.update(layer.keys, layer.values, i)
        step = {"input_ids": torch.tensor([[5]]), "use_cache": True}
        expected = tiny(**step, past_key_values=copy.deepcopy(out.past_key_values)).logits
        with pytest.raises(ValueError, match=r"layers of this KV cache hold \d+ to 45 tokens.*deepcopy"):
            tiny(**step, past_key_values=again)
        assert torch.allclose(tiny(**step, past_key_values=out.past_key_values).logits, expected, atol=1e-6)


def test_embeddings_on_a_pruned_cache(name: str, chosen: Setting, tiny: Any) -> None:
    """Embeddings are refused in a later turn too, since they may hold an image."""
    given = models.inputs(tiny, ROWS[:1], models.pixels(1))
    with torch.inference_mode(), llava_prune.pruned(tiny, name, **chosen.hyper):
        cache = tiny(**given, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=EMBEDS):
            tiny(inputs_embeds=torch.zeros(1, 2, models.WIDTH), past_key_values=cache)
