"""Overlays place every visual token as the real preprocessing does, and draw kept and merged patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import llava_prune
from llava_prune.eval.images import pixels
from llava_prune.models.family import family_of
from llava_prune.models.files import processor_class
from llava_prune.runtime.geometry import Geometry, ImageView
from tests import models

SIZES = [(640, 400), (300, 500)]
Values = Callable[[Image.Image], torch.Tensor]
"""Image -> (V, C) pixels that each visual token shows."""


@pytest.fixture(scope="module")
def anyres(tiny_models: dict[str, Any]) -> dict[str, Any]:
    return {"llava": models.tiny_llava(anyres=True), "hf": tiny_models["next"]}


def processor() -> Any:
    return processor_class()(
        size={"shortest_edge": models.SIDE}, crop_size={"height": models.SIDE, "width": models.SIDE}
    )


def tiles(values: torch.Tensor) -> torch.Tensor:
    """Return the (N, patches, C) pixels of each patch of (N, 3, SIDE, SIDE) values."""
    n, side = values.shape[0], models.SIDE // models.GRID
    cut = values.reshape(n, 3, models.GRID, side, models.GRID, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, models.PATCHES, -1)


def whole(padded: bool) -> Values:
    return lambda image: tiles(pixels(image, processor(), padded)[None])[0]


def llava_crops(merge: str = "spatial_unpad") -> Values:
    """Return the preprocessing and splicing of anyres images by package llava; newline tokens are 0."""
    from llava.mm_utils import process_images

    model: Any = models.tiny_llava(anyres=True)
    width = tiles(torch.zeros(1, 3, models.SIDE, models.SIDE)).shape[-1]
    model.config.mm_patch_merge_type, model.encode_images = merge, tiles
    model.model.image_newline = torch.nn.Parameter(torch.zeros(width), requires_grad=False)
    model.model.embed_tokens.forward = lambda ids: torch.zeros(*ids.shape, width)

    def values(image: Image.Image) -> torch.Tensor:
        found = process_images([image], processor(), model.config)[0]
        given = (torch.tensor([[1, models.IMAGE]]), None, None, None, None, [found], [image.size])
        return model.prepare_inputs_labels_for_multimodal(*given)[4][0, 1:]

    return values


def hf_crops(model: Any) -> Values:
    """Return the preprocessing and packing of anyres images by transformers' LLaVA-NeXT; newline tokens are 0."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    def values(image: Image.Image) -> torch.Tensor:
        edge = {"height": models.SIDE, "width": models.SIDE}
        points = [list(p) for p in model.config.image_grid_pinpoints]
        made = LlavaNextImageProcessorPil(size={"shortest_edge": models.SIDE}, crop_size=edge)
        found = made(image, image_grid_pinpoints=points, return_tensors="pt")
        features = tiles(found["pixel_values"][0])
        newline = torch.zeros(features.shape[-1])
        packed = model.model.pack_image_features([features], found["image_sizes"], "default", newline)[0]
        return packed[0]

    return values


def changed(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Return the tokens whose pixels change by more than a quarter of the largest change."""
    difference = (after - before).abs().mean(1)
    return torch.nonzero(difference > difference.max() / 4).flatten().tolist()


def check_places(views: list[ImageView], size: tuple[int, int], values: Values, step: int = 1) -> None:
    """Paint the middle of every box and check that only the token of the box changes in its view."""
    base = Image.new("RGB", size, (120, 130, 110))
    before = values(base)
    assert sum(len(v.boxes) for v in views) == len(before)
    for view in views:
        mine = slice(view.first, view.first + len(view.boxes))
        whole_box = max((b[2] - b[0]) * (b[3] - b[1]) for b in view.boxes if b is not None)
        for index, box in list(enumerate(view.boxes))[::step]:
            if box is None or (box[2] - box[0]) * (box[3] - box[1]) < whole_box / 3:
                continue
            image = base.copy()
            dx, dy = (box[2] - box[0]) / 5, (box[3] - box[1]) / 5
            image.paste((255, 0, 0), tuple(round(x) for x in (box[0] + dx, box[1] + dy, box[2] - dx, box[3] - dy)))
            assert changed(before[mine], values(image)[mine]) == [index], (view.name, index, box)
    after = values(Image.new("RGB", size, (255, 0, 0)))
    blind = [view.first + i for view in views for i, box in enumerate(view.boxes) if box is None]
    assert torch.equal(before[blind], after[blind])
    assert (before != after).any(1).sum() == len(before) - len(blind)


def geometry(model: Any) -> Geometry:
    return family_of(model).geometry(model)


# geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*SIZES, (97, 97), (41, 200)])
@pytest.mark.parametrize("padded", [True, False])
def test_places_in_whole_images(tiny: Any, size: tuple[int, int], padded: bool) -> None:
    found = geometry(tiny)
    assert found.padded and found.grid == (models.GRID, models.GRID)
    check_places(replace(found, padded=padded).views(size), size, whole(padded))


@pytest.mark.parametrize("size", [*SIZES, (200, 90), (70, 80)])
@pytest.mark.parametrize("name", ["llava", "hf"])
def test_places_in_crops(anyres: dict[str, Any], name: str, size: tuple[int, int]) -> None:
    model = anyres[name]
    views = geometry(model).views(size)
    assert [v.name for v in views] == ["image", "crops"]
    check_places(views, size, llava_crops() if name == "llava" else hf_crops(model), step=3)


@pytest.mark.parametrize("merge", ["flat", "spatial"])
def test_places_without_unpadding(anyres: dict[str, Any], merge: str) -> None:
    views = replace(geometry(anyres["llava"]), merge=merge).views((640, 400))
    check_places(views, (640, 400), llava_crops(merge), step=4)


def test_a_class_token_has_no_place() -> None:
    view = Geometry((2, 2), 28, leading=1).views((10, 10))[0]
    assert view.boxes[0] is None and view.boxes[1] == (0, 0, 5, 5) and len(view.boxes) == 5


# drawing --------------------------------------------------------------------------------------------------------

SIZE = (200, 90)


def ask(model: Any, method: str, sizes: Any = (SIZE,), rows: int = 1, images: int = 1, **hyper: Any) -> Any:
    """Run a prefill and return its record."""
    prompts = [models.prompt(4, 5 + i, images) for i in range(rows)]
    given = models.inputs(model, prompts, models.pixels(rows * images), None)
    if models.is_llava(model) and sizes is not None:
        given["image_sizes"] = list(sizes)
    with (
        llava_prune.pruned(model, method, **hyper) as handle,
        llava_prune.image_sizes(None if models.is_llava(model) else sizes),
        torch.inference_mode(),
    ):
        model(**given)
    return handle.last


def expected(kept: Iterable[int]) -> np.ndarray:
    """Return a (H, W) bool mask of the pixels of an image of SIZE that lie in kept patches."""
    (width, height), kept = SIZE, set(kept)
    scale = models.GRID / width
    rows, columns = np.mgrid[:height, :width]
    patch = ((rows + 0.5 + (width - height) // 2) * scale).astype(int) * models.GRID
    return np.isin(patch + ((columns + 0.5) * scale).astype(int), list(kept))


@pytest.mark.parametrize("method", ["autoprune", "fastv", "visionzip", "tome"])
def test_kept_patches_are_clear(tiny: Any, method: str) -> None:
    record = ask(tiny, method, tokens=12)
    white = Image.new("RGB", SIZE, "white")
    for layer in (0, 3, -1):
        kept = [i for i in record.kept[layer][0].tolist() if i >= 0]
        clear = (np.asarray(record.draw(white, layer)) == 255).all(2)
        assert clear.shape == (SIZE[1], SIZE[0]) and clear.sum() > 0
        assert np.array_equal(clear, expected(kept)), layer
    assert not clear.all()


def test_crops_are_drawn_side_by_side(anyres: dict[str, Any]) -> None:
    for model in anyres.values():
        given = models.inputs(model, [models.prompt(4, 5)], [models.crops(SIZE)], [SIZE])
        with llava_prune.pruned(model, "fastv", tokens=20) as handle, torch.inference_mode():
            model(**given)
        record, white = handle.last, Image.new("RGB", SIZE, "white")
        image = record.draw(white)
        assert image.size == (2 * SIZE[0] + 8, SIZE[1])
        assert record.show(white, layers=[0, -1]).axes
        with pytest.raises(ValueError, match="41 x 90 pixels"):
            record.draw(white.resize((41, 90)))
        with pytest.raises(ValueError, match="crops"):
            record.draw(white, padded=False)


def test_refusals(tiny: Any) -> None:
    record, image = ask(tiny, "fastv", tokens=12), Image.new("RGB", SIZE)
    with pytest.raises(ValueError, match=r"200 x 91 pixels .* 200 x 90 pixels; give"):
        record.draw(Image.new("RGB", (200, 91)))
    with pytest.raises(ValueError, match="layer=6: the model has 6 decoder layers; give 0 to 5"):
        record.draw(image, layer=6)
    with pytest.raises(ValueError, match="sample=1: the last prefill has 1 samples?; give 0"):
        record.show(image, sample=1)
    for odd in ("photo.jpg", None, np.zeros((90, 200, 3)), torch.zeros(3, 90, 200)):
        with pytest.raises(ValueError, match=r"image=.*: must be a PIL image"):
            record.draw(odd)
    for name in ("layer", "sample"):
        with pytest.raises(ValueError, match=f"{name}='0': the .*; give 0"):
            record.draw(image, **{name: "0"})
    with pytest.raises(ValueError, match="0 layers in a contact sheet"):
        record.show(image, layers=[])
    several = ask(tiny, "fastv", [SIZE] * 2, images=2, tokens=24)
    with pytest.raises(ValueError, match="several images"):
        several.draw(image)


def test_each_sample_has_its_own_image(tiny: Any) -> None:
    record = ask(tiny, "fastv", [SIZE, (50, 60)], rows=2, tokens=12)
    assert record.draw(Image.new("RGB", (50, 60)), sample=1).size == (50, 60)
    with pytest.raises(ValueError, match="50 x 60 pixels"):
        record.draw(Image.new("RGB", (50, 60)), sample=0)


def test_contact_sheet(tiny: Any) -> None:
    record, image = ask(tiny, "autoprune", tokens=12), Image.new("RGB", SIZE, "white")
    figure = record.show(image, title="How much is 2$?")
    titles = [a.get_title() for a in figure.axes[:-1]]
    assert len(titles) == 6 and titles[0].startswith(f"after layer 0: {record.tokens_out[0, 0]} tokens")
    *family, own = figure.axes[-1].get_lines()
    assert [line.get_label() for line in family] == [f"slope {k:g}" for k in (0, 0.1, 0.2, 0.3, 0.4)]
    assert own.get_ydata().tolist() == record.tokens_out[0].tolist()
    assert figure._repr_png_().startswith(b"\x89PNG")  # notebooks call it
    assert len(ask(tiny, "fastv", tokens=12).show(image, [1]).axes[-1].get_lines()) == 1


# merged tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["autoprune", "sparsevlm"])
def test_merged_tokens_are_means_of_the_patches_that_are_named(
    tiny: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, cuts = type(llava_prune.build(method, tokens=12)), []
    stock = cls.prune

    def noted(self: Any, layer: int, view: Any) -> Any:
        cut = stock(self, layer, view)
        if cut is not None and cut.merged is not None:
            cuts.append((layer, view.hidden.clone(), view.ids.clone(), cut))
        return cut

    monkeypatch.setattr(cls, "prune", noted)
    record = ask(tiny, method, rows=2, sizes=None, tokens=12)
    assert cuts
    for _, hidden, _, cut in cuts:
        position, place = cut.members()
        for b, c in {(row, int(place[row, q])) for row, q in torch.nonzero(place >= 0).tolist()}:
            mean = hidden[b, position[b][place[b] == c]].mean(0)
            assert torch.allclose(mean, cut.merged[b, c], atol=1e-4), (b, c)
    layer, _, ids, cut = cuts[0]
    position, place = cut.members()
    for b in range(2):
        named = [set(ids[b, position[b][place[b] == c]].tolist()) for c in range(int(place[b].max()) + 1)]
        assert sorted(record.remaining(layer, b).merged, key=min) == sorted(named, key=min)
    for layer in range(record.tokens_in.shape[1]):
        kept, merged = record.remaining(layer)
        every = [i for some in merged for i in some]
        assert all(merged) and len(set(every)) == len(every) and not kept & set(every)
        assert len(kept) + len(merged) == record.tokens_out[0, layer]


ANY: list[tuple[str, dict[str, Any]]] = [("visionzip", {"tokens": 20}), ("prumerge", {"tokens": 12}), ("prumerge", {})]
WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("tome", {"tokens": 12} | more) for more in ({}, {"order": "raster"}, {"reading": "output"})
]


@pytest.mark.parametrize(
    ("name", "method", "hyper"),
    [("llava", *case) for case in ANY + WHOLE] + [(name, *case) for name in ("next", "anyres") for case in ANY],
)
def test_every_patch_is_kept_or_in_one_merged_token(
    tiny_models: dict[str, Any], anyres: dict[str, Any], name: str, method: str, hyper: dict[str, Any]
) -> None:
    model = anyres["llava"] if name == "anyres" else tiny_models[name]
    size = (200, 90)
    if name == "llava":
        record, newlines = ask(model, method, **hyper), 0
    else:
        given = models.inputs(model, [models.prompt(4, 5)], [models.crops(size)], [size])
        with llava_prune.pruned(model, method, **hyper) as handle, torch.inference_mode():
            model(**given)
        record = handle.last
        newlines = sum(b is None for view in geometry(model).views(size) for b in view.boxes)
    kept, merged = record.remaining(-1)
    every = [*kept, *(i for some in merged for i in some)]
    assert len(every) == len(set(every)) == sum(record._seen.n_visual) - newlines
    assert sum(not some for some in merged) == (method == "visionzip") * (
        1 if name == "llava" else len(models.crops(size))
    )


def test_a_class_token_is_merged_from_nothing(tiny: Any) -> None:
    kept, merged = ask(tiny, "visionzip", dominant=5, contextual=3).remaining(0)
    assert len(kept) == 4 and [bool(some) for some in merged] == [False, True, True, True]
    assert kept | set().union(*merged) == set(range(models.PATCHES))


def test_merged_patches_are_tinted(tiny: Any) -> None:
    record, white = ask(tiny, "visionzip", dominant=5, contextual=3), Image.new("RGB", SIZE, "white")
    drawn = np.asarray(record.draw(white)).astype(int)
    kept, merged = record.remaining(-1)
    coloured = drawn.max(2) - drawn.min(2) > 10
    assert np.array_equal(coloured, expected(set().union(*merged)))
    first = [drawn[expected(some)][0].tolist() for some in merged if some]
    assert len({tuple(c) for c in first}) == 3
    for some, colour in zip([m for m in merged if m], first, strict=True):
        assert (drawn[expected(some)] == colour).all()
