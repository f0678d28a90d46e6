"""The page of `Record.page` in a headless Chromium."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.report.browser import Opened, chromium
from tests.report.test_overlay import SIZE, ask, expected

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from chromium()


@pytest.fixture
def page(browser: Any, tmp_path: Path, tiny: Any) -> Iterator[tuple[Opened, Any]]:
    record = ask(tiny, "autoprune", tokens=12)
    file = tmp_path / "kept.html"
    image = Image.new("RGB", SIZE, "white")
    file.write_text(record.page(image, "Is 1 < 2 & <b>bold</b>?", {"unpruned": "<i>yes</i>"}), encoding="utf-8")
    opened = Opened(browser, file.as_uri())
    yield opened, record
    opened.context.close()
    assert opened.complaints == [] and opened.requests == [file.as_uri()]


def pixels(opened: Opened) -> np.ndarray:
    """Return the (H, W, 3) overlay as the browser draws it, in the size of the image."""
    shot = Image.open(io.BytesIO(opened.tab.locator(".views svg").first.screenshot())).convert("RGB")
    return np.asarray(shot.resize(SIZE, Image.Resampling.NEAREST)).astype(int)


def patch_middles(patches: set[int]) -> np.ndarray:
    """Return a (H, W) bool mask of the pixels of `patches` that are more than a pixel from every patch border."""
    out = np.zeros((SIZE[1], SIZE[0]), dtype=bool)
    for patch in patches:
        area = np.pad(expected({patch}), 2)
        inner = area.copy()
        for axis in (0, 1):
            for step in (-2, 2):
                inner &= np.roll(area, step, axis)
        out |= inner[2:-2, 2:-2]
    return out


def test_the_slider_shows_the_patches_of_its_layer(page: tuple[Opened, Any]) -> None:
    opened, record = page
    slider = opened.tab.get_by_label("After decoder layer")
    last = record.tokens_in.shape[1] - 1
    assert slider.input_value() == str(last)
    slider.focus()
    for layer in range(last, -1, -1):
        kept, merged = record.remaining(layer)
        drawn = pixels(opened)
        assert (drawn[patch_middles(kept)] == 255).all(), layer
        dropped = set(range(36)) - kept - {i for some in merged for i in some}
        assert drawn[patch_middles(dropped)].max(initial=0) < 200, layer
        tinted = drawn[patch_middles({i for some in merged for i in some})]
        assert ((tinted.max(1) - tinted.min(1)) > 10).all(), layer
        text = opened.tab.locator("#text").text_content()
        assert text.startswith(f"after layer {layer}: {record.tokens_out[0, layer]} token")
        assert slider.get_attribute("aria-valuetext") == text
        opened.tab.keyboard.press("ArrowLeft")
    assert slider.input_value() == "0"


def test_texts_are_text(page: tuple[Opened, Any]) -> None:
    tab = page[0].tab
    assert tab.locator("h1").text_content() == "Is 1 < 2 & <b>bold</b>?"
    assert tab.locator("td").first.text_content() == "<i>yes</i>" and tab.locator("b, i").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_windows_and_both_themes(page: tuple[Opened, Any], browser: Any, scheme: str) -> None:
    opened = Opened(browser, page[0].url, 375, scheme)
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= 375
    light = opened.tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    opened.context.close()
