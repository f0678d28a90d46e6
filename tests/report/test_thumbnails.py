"""Images in a report: the questions that have one, and the patches that runs kept of it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava_prune.eval.run_images import pack_layers
from llava_prune.report.html import page
from llava_prune.report.questions import columns
from llava_prune.report.store import StoredRun, read_runs
from llava_prune.report.thumbnails import FIRST, Thumbnail, shown_first, unpack_layers, with_images
from tests.report.browser import Opened, chromium
from tests.report.conftest import make_run

LAYERS = 3
SURVIVAL = {"full": [LAYERS] * 4, "autoprune": [3, 1, 2, 0]}
"""Method -> number of decoder layers after which each of the four tokens of an image is still kept."""
BOXES: list[Any] = [(0, 0, 10, 10), (10, 0, 20, 10), (0, 10, 10, 20), (10, 10, 20, 20)]


def images(run: StoredRun, rows: Sequence[int], side: int) -> list[Thumbnail | None]:
    """Return white images of 20 x 20 pixels; question 2 has none."""
    return [None if i == 2 else Thumbnail(Image.new("RGB", (20, 20), "white"), [(0, BOXES)]) for i in rows]


@pytest.fixture
def runs(tmp_path: Path) -> list[StoredRun]:
    """Write an unpruned and a pruned run on five questions; their scores differ in questions 1 and 3."""
    scores = {"full": (1.0, 1.0, 0.0, 0.0, 1.0), "autoprune": (1.0, 0.0, 0.0, 1.0, 1.0)}
    for name, values in scores.items():
        asked = [(f"Question {i}?", "yes", s) for i, s in enumerate(values)]
        folder = make_run(tmp_path / name, asked, method=name, tokens=None if name == "full" else 2)
        result = json.loads((folder / "result.json").read_text())
        result["visual_tokens"]["entering_by_layer"] = [4.0] * LAYERS
        (folder / "result.json").write_text(json.dumps(result))
        rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        for i, row in enumerate(rows):
            packed = pack_layers(torch.tensor([SURVIVAL[name]]))[0]
            row["kept"] = {"entering": [4] * LAYERS, "leaving": [4] * LAYERS, "patches": None if i == 2 else packed}
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sorted(read_runs([tmp_path]), key=lambda run: run.method, reverse=True)


def filled(runs: list[StoredRun], count: int) -> dict[str, Any]:
    found, shown, _ = columns(runs)
    assert found is not None
    with_images(found, shown, images, count)
    return found


def test_layers_as_text() -> None:
    survival = torch.tensor([[0, 3, 80, 12, 0], [1, 1, 1, 0, 0], [0] * 5])
    assert [list(unpack_layers(text)) for text in pack_layers(survival)] == [[0, 3, 80, 12], [1, 1, 1], []]


def test_flipped_questions_come_first(runs: list[StoredRun]) -> None:
    found = filled(runs, 3)
    assert shown_first(found["runs"]) == [1, 3, 0, 2, 4]
    assert list(found["images"]) == ["1", "3", "0"]
    assert list(filled(runs, 99)["images"]) == ["1", "3", "0", "4"]
    assert filled(runs, 0)["images"] == {}


def test_places_are_stated_once(runs: list[StoredRun]) -> None:
    found = filled(runs, 99)
    assert {image["place"] for image in found["images"].values()} == {0} and len(found["places"]) == 1
    (view,) = found["places"][0]["views"]
    assert view == {"first": 0, "boxes": [list(map(float, box)) for box in BOXES]}
    for run, survival in zip(found["runs"], SURVIVAL.values(), strict=True):
        assert run["layers"] == LAYERS and set(run["patches"]) == {"0", "1", "3", "4"}
        assert [ord(c) - FIRST for c in run["patches"]["1"].ljust(4, chr(FIRST))] == survival


def test_a_run_without_patches_has_none(runs: list[StoredRun]) -> None:
    answers = runs[1].folder / "answers.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    answers.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "kept"}) + "\n" for r in rows))
    found = filled(runs, 99)
    assert len(found["images"]) == 4 and [len(run["patches"]) for run in found["runs"]] == [4, 0]


def test_the_number_of_images_is_that_of_each_benchmark(tmp_path: Path) -> None:
    asked = [(f"Question {i}?", "yes", 1.0) for i in range(5)]
    for bench in ("gqa", "textvqa"):
        folder = make_run(tmp_path / bench, asked, bench=bench)
        rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        for row in rows:
            row["kept"] = {"entering": [4], "leaving": [4], "patches": pack_layers(torch.tensor([[1] * 4]))[0]}
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = []

    def counted(run: StoredRun, rows: Sequence[int], side: int) -> list[Thumbnail | None]:
        counts.append(len(rows))
        return [None] * len(rows)

    page(read_runs([tmp_path]), counted, 4)
    assert counts == [4, 4]


def test_images_that_are_gone_are_named(runs: list[StoredRun]) -> None:
    def gone(*_: Any) -> Any:
        raise ValueError("n1.jpg: no such file")

    text, left_out = page(runs, gone, 9)
    assert left_out == ["no images of GQA: n1.jpg: no such file"] and "n1.jpg: no such file" in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from chromium()


@pytest.mark.browser
def test_overlays_in_a_browser(browser: Any, runs: list[StoredRun], tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(runs, images, 2)[0], encoding="utf-8")
    opened = Opened(browser, file.as_uri())
    tab = opened.tab
    assert tab.get_by_role("button", name="Image of question").count() == 2
    button = tab.get_by_role("button", name="Image of question 1")
    button.focus()
    tab.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    slider = tab.get_by_label("After decoder layer")
    for layer in (2, 1, 0):
        slider.fill(str(layer))
        for letter, survival in zip("AB", SURVIVAL.values(), strict=True):
            shot = tab.get_by_role("img", name=f"Run {letter}").screenshot()
            drawn = np.asarray(Image.open(io.BytesIO(shot)).convert("L").resize((20, 20), Image.Resampling.NEAREST))
            clear = [bool(drawn[(t + b) // 2, (x + y) // 2] == 255) for x, t, y, b in BOXES]
            assert clear == [n > layer for n in survival], (letter, layer)
            caption = tab.locator(".overlays figcaption").nth("AB".index(letter)).text_content()
            count = sum(clear)
            assert caption.endswith(f", {count} patch" if count == 1 else f", {count} patches")
    tab.locator("#b").select_option("full")
    assert tab.locator(".overlays").count() == 0
    button.click()
    assert tab.locator(".overlays").count() == 1
    button.click()
    assert tab.locator(".overlays").count() == 0
    opened.context.close()
    assert opened.complaints == [] and opened.requests == [file.as_uri()]
