"""Benchmark requests of a given size for any LLaVA model, with random text around one random image in each sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.family import family_of
from ..models.hf import has_crops
from ..models.llava import IMAGE

BEFORE = 35
"""Number of text tokens before the image in LLaVA-1.5's prompts. Shorter prompts have half of their text before the
image.
"""


@dataclass(frozen=True)
class Request:
    """A batch of prompts that can be run repeatedly.

    Attributes:
        batch: batch size.
        text: number of text tokens of each sample.
        visual: number of visual tokens of each sample.
        ask: generates a fixed number of new tokens.
        prefill: generates a single new token.
    """

    batch: int
    text: int
    visual: int
    ask: Callable[[], Any]
    prefill: Callable[[], Any]


def request(loaded: Any, batch: int, text: int, new: int, seed: int = 0) -> Request:
    """Return a request of `batch` prompts with `text` text tokens around an image, which generates `new` tokens.

    LLaVA-NeXT gets a square image of 672 pixels, i.e. five crops of 576 patches.

    Raises:
        ValueError: for fewer than 2 text tokens, or an anyres model of package llava.
    """
    if text < 2:
        raise ValueError(f"text={text}: a prompt needs a text token before and after the image; give 2 or more")
    config = loaded.model.config
    if loaded.family == "llava" and getattr(config, "image_aspect_ratio", None) == "anyres":
        raise ValueError("bench supports anyres models of family 'hf' only; use --family hf")
    draw = torch.Generator().manual_seed(seed)
    vocabulary = family_of(loaded.model).language_model(loaded.model).config.vocab_size
    ids = torch.randint(3, min(vocabulary, 30_000) - 64, (batch, text), generator=draw)
    before = min(BEFORE, text // 2)
    anyres = loaded.family == "hf" and has_crops(loaded.model)
    ask = _next(loaded, ids, before, draw) if anyres else _plain(loaded, ids, before, draw)
    visual = _crops(loaded)[0] if anyres else loaded.n_visual
    return Request(batch, text, visual, lambda: ask(new), lambda: ask(1))


def _side(loaded: Any) -> int:
    if loaded.family == "llava":
        return int(loaded.model.get_vision_tower().config.image_size)
    return int(loaded.model.config.vision_config.image_size)


def _random_pixels(loaded: Any, size: tuple[int, ...], draw: torch.Generator) -> Tensor:
    parameter = next(loaded.model.parameters())
    return torch.randn(size, generator=draw).to(device=loaded.device, dtype=parameter.dtype)


def _plain(loaded: Any, ids: Tensor, before: int, draw: torch.Generator) -> Callable[[int], Any]:
    rows = [[*row[:before], IMAGE, *row[before:]] for row in ids.tolist()]
    side = _side(loaded)
    pixels = _random_pixels(loaded, (len(rows), 3, side, side), draw)
    return lambda new: loaded.generate(rows, pixels, max_new_tokens=new, min_new_tokens=new)


def _crops(loaded: Any) -> tuple[int, int]:
    """Return (visual tokens, number of crops) of a square image of twice the tower's image size."""
    side = 2 * _side(loaded)
    return loaded.visual_tokens((side, side)), 5


def _next(loaded: Any, ids: Tensor, before: int, draw: torch.Generator) -> Callable[[int], Any]:
    side, batch = _side(loaded), ids.shape[0]
    visual, crops = _crops(loaded)
    images = ids.new_full((batch, visual), loaded.model.config.image_token_id)
    whole = torch.cat([ids[:, :before], images, ids[:, before:]], 1).to(loaded.device)
    given = {
        "input_ids": whole,
        "attention_mask": torch.ones_like(whole),
        "pixel_values": _random_pixels(loaded, (batch, crops, 3, side, side), draw),
        "image_sizes": torch.tensor([[2 * side, 2 * side]] * batch),
    }

    @torch.inference_mode()
    def ask(new: int) -> Any:
        return loaded.model.generate(**given, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)

    return ask
