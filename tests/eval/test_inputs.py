"""Prompts, token ids and pixels against vectors of LLaVA's own code."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from PIL import Image

from llava_prune.eval.images import open_rgb, pixels, square
from llava_prune.eval.prompt import check_tokenizer, token_ids, vicuna_v1
from llava_prune.eval.task import load_task

HERE = Path(__file__).parent
PROMPTS = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))["prompts"]
PIXELS = json.loads((HERE / "preprocess.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [n for n, p in PROMPTS.items() if "line_text" in p])
def test_prompt_strings(name: str) -> None:
    assert vicuna_v1(PROMPTS[name]["line_text"]) == PROMPTS[name]["prompt"]


def test_gqa_suffix_is_the_question_files() -> None:
    task = load_task("gqa")
    assert not task.add_suffix and task.max_new_tokens == 128
    assert PROMPTS["short_answer (gqa, vqav2, pope, mme)"]["line_text"].endswith("\n" + task.suffix)


def pattern(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width].astype(np.int64)
    return Image.fromarray(
        np.stack([(7 * x + 3 * y) % 256, (2 * x + 11 * y) % 256, (x * x + y) % 256], -1).astype(np.uint8)
    )


@pytest.mark.parametrize("case", PIXELS["cases"], ids=lambda c: f"{c['width']}x{c['height']}")
def test_pixels(case: dict) -> None:
    processor = transformers.CLIPImageProcessorPil(**PIXELS["processor"])
    image = pattern(case["width"], case["height"])
    assert square(image, tuple(PIXELS["background"])).size == tuple(case["square"])
    for key, pad in (("padded", True), ("no_pad_center_crop", False)):
        if not case.get(key):
            continue
        got = pixels(image, processor, pad)
        assert got.shape == (3, 336, 336)
        assert float(got.double().mean()) == pytest.approx(case[key]["mean"], abs=1e-6)
        for where, value in case[key]["points"].items():
            c, row, column = map(int, where.split(","))
            assert float(got[c, row, column]) == pytest.approx(value, abs=1e-6)


def test_an_unreadable_image(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="x.jpg is not a readable image"):
        open_rgb(tmp_path / "x.jpg")


def test_an_image_above_the_limit_of_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is whole, so fetching it again would not help."""
    pattern(30, 20).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"x.png has more pixels than Pillow opens .*600 pixels.*; scale it down"):
        open_rgb(tmp_path / "x.png")


class Letters:
    """A tokenizer with one id for each character, BOS 1."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, bos: bool = True) -> None:
        self.bos = bos

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=([1] if self.bos else []) + [ord(c) for c in text])

    def __len__(self) -> int:
        return 300


def test_pieces_are_tokenised_one_by_one() -> None:
    assert token_ids("a<image>\nb", Letters()) == [1, 97, -200, 10, 98]
    assert token_ids("a<image>b<image>c", Letters()) == [1, 97, -200, 98, -200, 99]
    assert token_ids("a<image>b", Letters(bos=False)) == [97, -200, 98]


def test_token_ids_equal_llavas() -> None:
    mm_utils = pytest.importorskip("llava.mm_utils")
    prompt = vicuna_v1("Is it?\nAnswer.")
    assert token_ids(prompt, Letters()) == mm_utils.tokenizer_image_token(prompt, Letters(), -200)


def test_tokenizers_of_other_models() -> None:
    config = SimpleNamespace(bos_token_id=1, eos_token_id=2)
    check_tokenizer(Letters(), 300, config, "here")
    with pytest.raises(ValueError, match="here has no tokenizer"):
        check_tokenizer(None, 300, config, "here")
    with pytest.raises(ValueError, match="300 pieces but the model embeds 299"):
        check_tokenizer(Letters(), 299, config, "here")
    with pytest.raises(ValueError, match="eos_token_id is 2, the model's is 5"):
        check_tokenizer(Letters(), 300, SimpleNamespace(bos_token_id=1, eos_token_id=5), "here")
