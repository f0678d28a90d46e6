"""Vision towers and feature selections other than LLaVA-1.5's: methods that work, need a substitute or are refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import llava_prune
from llava_prune.methods.registry import names, resolve
from llava_prune.models.base import encoder_blocks
from tests import combinations, models

ROWS = [models.prompt(5, 7)]
LONG = (5 * models.SIDE, models.SIDE)


def model_with(tower: str, **more: Any) -> Any:
    given = combinations.config("llava", "llama", tower, **more)
    return combinations.randomise(transformers.LlavaForConditionalGeneration(given))


@pytest.mark.parametrize("tower", combinations.TOWERS)
def test_received_attention_is_the_mean_of_the_towers_own_maps(tower: str) -> None:
    model = combinations.build("llava", "llama", tower, attn="eager")
    encoder, images = model.model.vision_tower, models.pixels(2)
    block = combinations.LAYERS - 1 if tower == "siglip" else combinations.LAYERS - 2  # the block of the features
    seen: dict[str, Any] = {}

    class Reads(llava_prune.Method):
        def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
            return llava_prune.build("autoprune", class_token="received").vision_queries(feature_layer)

        def prune_vision(self, view: Any) -> None:
            seen.update(received=view.class_attention(), blocks=list(view.attention))

    with torch.inference_mode():
        with llava_prune.pruned(model, Reads()):
            model(**models.inputs(model, ROWS * 2, images))
        maps = encoder(images, output_attentions=True).attentions[block]  # (N, H, K, K)
    leading = maps.shape[-1] - models.PATCHES
    assert seen["blocks"] == [block] and leading == (tower != "siglip") and len(encoder_blocks(encoder)) == 4
    assert torch.allclose(seen["received"], maps.mean((1, 2))[:, leading:], atol=1e-6)


@pytest.mark.parametrize("tower, why", [("siglip", "SigLIP, which has none"), ("dinov2", "DINOv2, whose class token")])
def test_the_substitute_must_be_asked_for(tower: str, why: str) -> None:
    model = combinations.build("llava", "llama", tower)
    for name in ("autoprune", "fastervlm"):
        with pytest.raises(ValueError, match=f"{name} needs the class token.*{why}.*class_token='received'"):
            llava_prune.attach(model, name, tokens=12)
        with llava_prune.pruned(model, name, tokens=12, class_token="received") as handle:
            models.generate(model, models.inputs(model, ROWS, models.pixels(1)), 1)
            assert int(handle.last.tokens_out.sum()) < models.PATCHES * combinations.LAYERS
    for name in ("visionzip", "prumerge"):
        with pytest.raises(ValueError, match=f"{name} needs the class token"):
            llava_prune.attach(model, name, tokens=12)


def test_features_of_several_layers() -> None:
    """Methods inside the language model work; methods that need the features of a single layer are refused."""
    model = model_with("clip", vision_feature_layer=[-3, -2])
    given = models.inputs(model, ROWS, models.pixels(1))
    for name, hyper in (("fastv", {}), ("sparsevlm", {}), ("autoprune", {"first_score": "text"})):
        with llava_prune.pruned(model, name, tokens=16, **hyper) as handle:
            models.generate(model, given, 1)
            assert int(handle.last.tokens_out[0, -1]) < models.PATCHES
    for name in ("autoprune", "fastervlm", "visionzip"):
        with pytest.raises(ValueError, match="patch features of a single layer"):
            llava_prune.attach(model, name, tokens=16)


@pytest.mark.parametrize("how", ["forward", "generate", "config"])
def test_another_feature_layer_than_at_attach(how: str) -> None:
    """A call may name the feature layer; methods that read the tower's attention must know it when they attach."""
    model = model_with("clip")
    given = models.inputs(model, ROWS, models.pixels(1))
    own, other = model.config.vision_feature_layer, -1
    assert own != other
    for name, refused in (("fastervlm", True), ("resize", True), ("topv", True), ("fastv", False)):
        with llava_prune.pruned(model, name, tokens=16), torch.inference_mode():
            model(**given, vision_feature_layer=own)
            call: dict[str, Any] = {} if how == "config" else {"vision_feature_layer": other}
            model.config.vision_feature_layer = other if how == "config" else own
            try:
                if not refused:
                    models.generate(model, given, 1, **call)
                    continue
                with pytest.raises(ValueError, match=f"vision_feature_layer=-1: '?{name}.* features after block 2 "):
                    models.generate(model, given, 1, **call) if how == "generate" else model(**given, **call)
            finally:
                model.config.vision_feature_layer = own


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_images_of_another_size(tower: str) -> None:
    """Interpolated position embeddings make another grid of patches than that on which methods of the tower work."""
    model = model_with(tower)
    row = [1, 5, *[model.config.image_token_id] * 64, 7, 9, 11]
    ids = torch.tensor([row])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 112, 112)}
    own = {"class_token": "received"} if tower == "dinov2" else {}
    with torch.inference_mode():
        for name, more in (("autoprune", own), ("fastervlm", own), ("topv", {}), ("resize", {})):
            message = rf"images of 112 x 112 pixels: '{name}' .* 6 x 6 patches of 14 pixels; give images of 84 x 84"
            with llava_prune.pruned(model, name, tokens=16, **more), pytest.raises(ValueError, match=message):
                model(**given, interpolate_pos_encoding=True)
        try:
            model(**given, interpolate_pos_encoding=True)
        except ValueError:
            pytest.skip("this release of transformers does not interpolate in this tower")
        with llava_prune.pruned(model, "fastv", layer=1, keep=16) as handle:
            model(**given, interpolate_pos_encoding=True)
        assert handle.last.tokens_in[0].tolist()[:2] == [64, 16]


def test_features_with_the_class_token() -> None:
    """Selection "full" of CLIP adds one visual token, which only methods that do not use patches accept."""
    model = model_with("clip", vision_feature_select_strategy="full")
    given = models.inputs(model, ROWS, models.pixels(1))
    for name in ("fastv", "pdrop", "uniform"):
        with llava_prune.pruned(model, name, tokens=20) as handle:
            models.generate(model, given, 1)
            assert int(handle.last.tokens_in[0, 0]) <= models.PATCHES + 1
    with pytest.raises(ValueError, match="37 features for 36 patches; it must be 'patch'"):
        llava_prune.attach(model, "autoprune", tokens=16)


def test_a_dropped_first_patch() -> None:
    """Selection "default" drops a patch of a tower without a class token."""
    model = model_with("siglip", vision_feature_select_strategy="default")
    with pytest.raises(ValueError, match="35 features for 36 patches; it must be 'full'"):
        llava_prune.attach(model, "autoprune", tokens=16, class_token="received")
    given = models.inputs(model, ROWS, models.pixels(1))
    with llava_prune.pruned(model, "fastv", tokens=20) as handle:
        models.generate(model, given, 1)
        assert int(handle.last.tokens_in[0, 0]) == models.PATCHES - 1


@pytest.fixture(scope="module")
def onevision() -> Any:
    """A LLaVA-OneVision that interpolates images of two or more crops to the number of tokens of one crop."""
    given = combinations.config("onevision", "qwen2", "siglip", vision_aspect_ratio="anyres_max_1")
    return combinations.randomise(transformers.LlavaOnevisionForConditionalGeneration(given))


def test_interpolated_patches(onevision: Any) -> None:
    """Methods inside the language model prune interpolated tokens; methods that choose patches are refused."""
    given = models.inputs(onevision, ROWS, [models.crops((170, 170))], [(170, 170)])
    everything = int((given["input_ids"] == models.VOCAB).sum())
    assert everything == models.PATCHES + models.GRID * (models.GRID + 1)  # 4 crops on the tokens of one
    with llava_prune.pruned(onevision, "fastv", tokens=40) as handle:
        models.generate(onevision, given, 1)
        assert handle.last.tokens_in[0, 0] == everything and handle.last.tokens_out[0, -1] < everything
    with llava_prune.pruned(onevision, "fastervlm", tokens=40, class_token="received"):
        with pytest.raises(ValueError, match="'fastervlm' chooses patches before the language model.*fewer pixels"):
            models.generate(onevision, given, 1)
        small = models.inputs(onevision, ROWS, [models.crops(LONG)], [LONG])
        models.generate(onevision, small, 1)  # after unpadding, no more tokens than one crop has


def test_patch_values_of_interpolated_patches(onevision: Any) -> None:
    """An interpolated token has the value of its nearest patch, here the number of the patch's column."""
    seen: dict[str, torch.Tensor] = {}
    side = models.GRID

    class Numbers(llava_prune.Method):
        def prune_vision(self, view: Any) -> None:
            view.patch_values["column"] = (torch.arange(models.PATCHES) % side + 1.0).expand(len(view.features), -1)

        def prune(self, layer: int, view: Any) -> None:
            seen["column"] = view.patch_values("column")[view.visual]

    given = models.inputs(onevision, ROWS, [models.crops((170, 170))], [(170, 170)])
    with torch.inference_mode(), llava_prune.pruned(onevision, Numbers()):
        onevision(**given)
    whole, rest = seen["column"][: models.PATCHES], seen["column"][models.PATCHES :].view(side, side + 1)
    assert whole.tolist() == [float(i % side + 1) for i in range(models.PATCHES)]
    assert (rest[:, -1] == 0).all()  # newline tokens
    assert (rest[:, :-1] == torch.tensor([2.0, 4.0, 6.0, 2.0, 4.0, 6.0])).all()  # 12 columns of two crops on 6 tokens
    with llava_prune.pruned(onevision, "autoprune", tokens=40, class_token="received") as handle:
        models.generate(onevision, given, 1)
    assert handle.last.tokens_out.float().mean() == pytest.approx(40, abs=2)


def test_several_images_of_onevision() -> None:
    """Images that share a prompt are not cut into crops (`batch_num_images`)."""
    model = combinations.build("onevision", "qwen2", "siglip")
    token, tail = models.VOCAB, [5, 6, 7]
    image = [token] * (models.PATCHES + 1)  # and a newline
    given = {
        "input_ids": torch.tensor([[1, *image, 9, *image, *tail]]),
        "pixel_values": models.pixels(2)[:, None],
        "image_sizes": torch.tensor([[60, 170], [90, 80]]),
        "batch_num_images": torch.tensor([2]),
    }
    with torch.inference_mode(), llava_prune.pruned(model, "autoprune", tokens=30, class_token="received") as handle:
        model(**given)
    assert handle.last.tokens_in.tolist()[0][0] == 2 * (models.PATCHES + 1)
    assert handle.last.tokens_out[0, -1] < 2 * models.PATCHES


def test_videos_are_refused(onevision: Any) -> None:
    ids = torch.tensor([[1, *[models.VOCAB + 1] * 10, 5, 6]])
    video = torch.zeros(1, 1, 3, models.SIDE, models.SIDE)
    with llava_prune.pruned(onevision, "uniform", tokens=12), torch.inference_mode():
        for call in (onevision, onevision.generate):
            with pytest.raises(ValueError, match="videos are not supported"):
                call(input_ids=ids, pixel_values_videos=video)


def documented() -> dict[str, list[str]]:
    """Return the table of methods in docs/models.md: method -> cells."""
    text = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    table = text.split("<!-- models: begin -->")[1].split("<!-- models: end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    return {row[0].strip("`"): row[1:] for row in rows}


def built(kind: str, tower: str, **more: Any) -> Any:
    given = combinations.config(kind, "qwen2" if kind == "onevision" else "llama", tower, side=168, **more)
    return getattr(transformers, f"{combinations.CLASSES[kind]}ForConditionalGeneration")(given)


def outcome(model: Any, name: str) -> str:
    known = inspect.signature(resolve(name)[0]).parameters
    budget = {"tokens": 100} if "tokens" in known else {}
    for mark, more in (("works", {}), ("substitute", {"class_token": "received"})):
        if more.keys() <= known.keys():
            try:
                llava_prune.attach(model, name, **budget, **more).detach()
            except ValueError:
                continue
            return mark
    return "refused"


def test_the_documented_table_is_true() -> None:
    columns = [
        built("llava", "clip"), built("llava", "siglip"), built("llava", "dinov2"), built("next", "clip"),
        built("onevision", "siglip"), built("llava", "clip", vision_feature_layer=[-3, -2]),
        built("llava", "clip", vision_feature_select_strategy="full"),
    ]  # fmt: skip
    for name, cells in documented().items():
        assert [outcome(model, name) for model in columns] == cells, name
    assert set(documented()) == set(names())
