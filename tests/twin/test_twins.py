"""The same weights in both packages: same logits, same cache lengths, same kept tokens, for every method."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_prune
from tests import models
from tests.contract.settings import NAMES
from tests.models import (
    SIDE,
    cache_lengths,
    crops,
    generate,
    inputs,
    prompt,
    tiny_hf,
    tiny_llava,
    tiny_mistral,
    tiny_next,
)
from tests.oracle.check import batch, check, small
from tests.oracle.dense import near
from tests.oracle.scripted import SCRIPT, Scripted


@functools.lru_cache(maxsize=8)
def model_of(kind: str) -> Any:
    if kind.endswith("mistral"):
        return tiny_mistral("hf" if kind.startswith(("hf", "next")) else "llava", kind.startswith(("anyres", "next")))
    builders = {"llava": tiny_llava, "hf": tiny_hf, "next": tiny_next}
    return tiny_llava(anyres=True) if kind == "anyres" else builders[kind]()


def run(model: Any, method: Any, given: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    with llava_prune.pruned(model, method) as handle:
        out = generate(model, given, **options)
        return out, handle.last


def same(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    """Check that two (output, record) pairs agree in logits, ids, cache lengths and records."""
    (out, record), (twin, mirror) = one, other
    for step, (a, b) in enumerate(zip(out.logits, twin.logits, strict=True)):
        near(a, b, 5e-5, f"logits of step {step}")
    assert out.sequences.tolist() == twin.sequences.tolist()
    assert cache_lengths(out.past_key_values) == cache_lengths(twin.past_key_values)
    assert record.tokens_in.tolist() == mirror.tokens_in.tolist()
    assert record.tokens_out.tolist() == mirror.tokens_out.tolist()
    assert [k.tolist() for k in record.kept] == [k.tolist() for k in mirror.kept]
    assert record.stats.keys() == mirror.stats.keys()
    for name, values in record.stats.items():
        assert values == pytest.approx(mirror.stats[name], rel=1e-4, abs=1e-5)


def pruned_somewhere(name: str, record: Any) -> bool:
    left = record.tokens_out.amin(1)
    whole = record.tokens_in[:, 0]
    return (
        bool((left == whole).all()) if name == "full" else bool(((left < whole) | (record.tokens_in[:, 0] < 36)).all())
    )


@pytest.mark.parametrize("language", ["", "-mistral"])
@pytest.mark.parametrize("name", NAMES)
def test_both_packages_agree(name: str, language: str) -> None:
    kinds = [f"{k}{language}" for k in ("llava", "hf")]
    pairs = [run(model_of(k), small(name), batch(model_of(k), "padded")) for k in kinds]
    same(*pairs)
    record = pairs[0][1]
    assert pruned_somewhere(name, record)


def test_unpruned_twins_agree() -> None:
    outs = [generate(model_of(k), batch(model_of(k), "padded")) for k in ("llava", "hf")]
    for a, b in zip(outs[0].logits, outs[1].logits, strict=True):
        near(a, b, 5e-5, "logits")


def test_a_checkpoint_in_transformers_format(tmp_path: Path) -> None:
    """A model that transformers has saved gives the same results when it is loaded again."""
    model = model_of("hf")
    given = batch(model, "padded")
    model.save_pretrained(tmp_path / "saved")
    again = llava_prune.load(tmp_path / "saved", dtype="float32", device="cpu")
    assert again.family == "hf" and again.model.config.image_token_id == model.config.image_token_id
    for method in ("autoprune", "random"):
        same(run(model, small(method), given), run(again.model, small(method), given))


def test_a_placeholder_inside_the_vocabulary(tmp_path: Path) -> None:
    """The placeholder may be an id of the tokenizer, as in checkpoints of the hub."""
    model, own = model_of("hf"), models.VOCAB - 1
    given = batch(model, "padded")
    ids = given["input_ids"]
    ids[ids == own] = own - 1
    other = copy.deepcopy(model)
    other.config.image_token_id = own
    other.set_input_embeddings(torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight[: models.VOCAB]))
    other.save_pretrained(tmp_path / "saved")
    again = llava_prune.load(tmp_path / "saved", dtype="float32", device="cpu").model
    assert again.get_input_embeddings().num_embeddings == models.VOCAB
    moved = {**given, "input_ids": ids.masked_fill(ids == models.VOCAB, own)}
    same(run(model, small("autoprune"), given), run(again, small("autoprune"), moved))


def test_embeddings_of_another_size_are_refused(tmp_path: Path) -> None:
    other = copy.deepcopy(model_of("hf"))
    other.set_input_embeddings(torch.nn.Embedding(models.VOCAB + 5, models.WIDTH))
    other.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"embed_tokens.weight has the shapes .*, the config asks for"):
        llava_prune.load(tmp_path / "saved", dtype="float32", device="cpu")


def test_a_next_checkpoint_in_transformers_format(tmp_path: Path) -> None:
    model = model_of("next")
    given = anyres_inputs(model, [(3 * SIDE, SIDE)])
    model.save_pretrained(tmp_path / "saved")
    again = llava_prune.load(tmp_path / "saved", family="hf", dtype="float32", device="cpu")
    assert type(again.model).__name__ == "LlavaNextForConditionalGeneration"
    same(run(model, small("autoprune"), given), run(again.model, small("autoprune"), given))


SIZES = {
    "square": [(SIDE, SIDE)],
    "wide": [(3 * SIDE, SIDE + 7)],
    "tall": [(SIDE - 20, 2 * SIDE)],
    "two": [(2 * SIDE, SIDE), (SIDE // 2, SIDE)],
}


def anyres_inputs(model: Any, sizes: list[tuple[int, int]], together: bool = False) -> dict[str, Any]:
    """Return anyres images, one in each prompt or all in one prompt."""
    cut = [crops(s, seed=i) for i, s in enumerate(sizes)]
    if together:
        rows = [prompt(4, 6, images=len(sizes))]
    else:
        rows = [prompt(4 + i, 6 + 2 * i, seed=i) for i in range(len(sizes))]
    return inputs(model, rows, cut, sizes)


@pytest.mark.parametrize("label", SIZES)
@pytest.mark.parametrize("name", ["full", "autoprune"])
def test_anyres_agrees(name: str, label: str) -> None:
    sizes = SIZES[label]
    pairs = [run(model_of(k), small(name), anyres_inputs(model_of(k), sizes)) for k in ("anyres", "next")]
    same(*pairs)
    assert pruned_somewhere(name, pairs[0][1])


@pytest.mark.parametrize("language", ["", "-mistral"])
@pytest.mark.parametrize("name", NAMES)
def test_anyres_agrees_for_every_method(name: str, language: str) -> None:
    """A batch of two images of different sizes."""
    sizes, kinds = [(3 * SIDE, SIDE), (SIDE, 2 * SIDE - 11)], [f"{k}{language}" for k in ("anyres", "next")]
    if "whole images" in small(name).requires:
        for kind in kinds:
            with pytest.raises(ValueError, match="crops"):
                llava_prune.attach(model_of(kind), small(name))
        return
    pairs = [run(model_of(k), small(name), anyres_inputs(model_of(k), sizes)) for k in kinds]
    same(*pairs)


def test_several_anyres_images_in_a_prompt() -> None:
    sizes = [(3 * SIDE, SIDE), (SIDE, 2 * SIDE - 11)]
    pairs = [
        run(model_of(k), Scripted(SCRIPT, "keep", "cache", 3), anyres_inputs(model_of(k), sizes, together=True))
        for k in ("anyres", "next")
    ]
    same(*pairs)


@pytest.mark.parametrize("kind", ["anyres", "next"])
@pytest.mark.parametrize("vision", [0, 3])
def test_anyres_equals_dense_model(kind: str, vision: int) -> None:
    """Unpadding, newline tokens and patches dropped by the vision side agree with the dense replay."""
    model = model_of(kind)
    given = anyres_inputs(model, [(3 * SIDE, SIDE), (SIDE, 2 * SIDE - 11)])
    found = check(model, Scripted(SCRIPT, "renumber", "cache", vision), given)
    assert found.columns[0] > found.columns[-1]


@pytest.mark.parametrize("kind", ["anyres", "next"])
def test_newline_tokens_stay_when_patches_go(kind: str) -> None:
    """If the vision side drops every patch, one newline token for each row of the unpadded grid is left."""
    model = model_of(kind)
    given = anyres_inputs(model, [(3 * SIDE, SIDE)])

    class Nothing(llava_prune.Method):
        def prune_vision(self, view: Any) -> Any:
            return llava_prune.VisionCut(torch.zeros_like(view.features[..., 0], dtype=torch.bool), view.features)

    _, record = run(model, Nothing(), given)
    rows = round(2 * models.GRID * SIDE / (3 * SIDE))  # an image 3:1 on a grid of two crops side by side
    assert record.tokens_in.tolist() == [[rows] * models.LAYERS]


@pytest.fixture(scope="module")
def large(tmp_path_factory: Any) -> tuple[Any, Any]:
    """Twins with LLaVA-NeXT's true shape: 24 x 24 patches a crop, five crops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "GRID", 24)
        patch.setattr(models, "PATCHES", 576)
        patch.setattr(models, "SIDE", 336)
        patch.setattr(models, "PINPOINTS", [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])
        folder = models.write_checkpoint(tmp_path_factory.mktemp("large") / "tiny", anyres=True)
    pair = [llava_prune.load(folder, family=f, dtype="float32", device="cpu").model for f in ("llava", "hf")]
    return pair[0], pair[1]


def test_2880_visual_tokens(large: tuple[Any, Any], monkeypatch: Any) -> None:
    """A square image at LLaVA-NeXT's largest: 2,880 patches and 48 newline tokens."""
    monkeypatch.setattr(models, "SIDE", 336)
    monkeypatch.setattr(models, "PINPOINTS", [[672, 672]])
    given = [inputs(m, [prompt(5, 9)], [crops((900, 900))], [(900, 900)]) for m in large]
    results = [
        run(m, llava_prune.build("autoprune", tokens=160), g, steps=2) for m, g in zip(large, given, strict=True)
    ]
    same(*results)
    record = results[0][1]
    assert record.tokens_in[0, 0] == 2880 + 48
    assert record.tokens_out[0, 0] == 400
    check(large[1], Scripted({-1: (0.5, 0), 2: (0.3, 3)}, "renumber", "cache", 2), given[1], steps=1)
