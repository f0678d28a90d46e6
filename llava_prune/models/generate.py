"""Generate with a loaded model of either package, from prompts with the id -200 for each image."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..runtime.state import HostPrompts, with_hints
from .image_cache import BLANK, crop_keys
from .llava import IMAGE, context_limit

Images = Tensor | list[Tensor] | None
"""(N, 3, H, W), or N tensors (crops, 3, H, W); None if there are no images."""

MADE = frozenset({
    "inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "images", "pixel_values", "image_sizes"
})  # fmt: skip
"""Arguments of generate() that `Loaded.generate` makes from its own."""


def refuse_made(given: Iterable[str]) -> None:
    """Refuse arguments of generate() that are made here.

    Raises:
        ValueError: with the arguments.
    """
    names = sorted(MADE.intersection(given))
    if names:
        raise ValueError(
            f"{' and '.join(names)} for Loaded.generate, which makes them from rows, pixels and sizes; leave them out, "
            "or call model.generate"
        )


def _padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return left-padded ids and attention mask, (B, L) long each."""
    width = max(len(r) for r in rows)
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], dtype=torch.long)
    return ids.to(device), mask.to(device)


_CONFIGS = threading.Lock()
_IN_USE: dict[int, tuple[int, dict[str, Any]]] = {}
"""id of a config -> (number of calls in progress, values before the first of them)."""


@contextmanager
def _config_values(config: Any, **values: Any) -> Iterator[None]:
    """Set values of a config while any thread is in the block; the last thread to leave restores them."""
    with _CONFIGS:
        calls, before = _IN_USE.get(id(config), (0, {name: getattr(config, name, None) for name in values}))
        _IN_USE[id(config)] = calls + 1, before
        for name, value in values.items():
            setattr(config, name, value)
    try:
        yield
    finally:
        with _CONFIGS:
            calls, before = _IN_USE.pop(id(config))
            if calls > 1:
                _IN_USE[id(config)] = calls - 1, before
            else:
                for name, value in before.items():
                    setattr(config, name, value)


def _host_prompts(loaded: Any, rows: list[list[int]], images: Images) -> HostPrompts | None:
    """Return the prompts as hints for the request; None for crops, whose numbers of visual tokens differ."""
    return None if isinstance(images, list) else HostPrompts(rows, IMAGE, loaded.n_visual)


def _counts(loaded: Any, rows: list[list[int]], sizes: Any, images: Images) -> list[int]:
    """Return the number of visual tokens of each image in the prompts."""
    if isinstance(images, list):
        return [loaded.visual_tokens(size) for size in sizes]
    return [loaded.n_visual] * sum(r.count(IMAGE) for r in rows)


def ask_llava(
    loaded: Any, rows: list[list[int]], images: Images, sizes: Any, keys: Any, options: dict[str, Any]
) -> Any:
    """Call `generate` of package llava; see `Loaded.generate`."""
    model = loaded.model
    ids, mask = _padded(rows, options["pad_token_id"], loaded.device)
    prompts = _host_prompts(loaded, rows, images)
    if images is None:
        with with_hints(prompts=prompts, image_keys=None, image_sizes=None, sizes_given=True):
            return model.generate(ids, attention_mask=mask, **options)
    left = iter(_counts(loaded, rows, sizes, images))
    longest = max(len(r) + sum(next(left) - 1 for x in r if x == IMAGE) for r in rows)
    if any(IMAGE not in r for r in rows):
        images, sizes, keys = _with_blanks(rows, images, sizes, keys)
    limit = context_limit(model)
    values: dict[str, Any] = {"tokenizer_padding_side": "left"}
    if limit is not None and longest > limit:
        warnings.warn(
            f"a prompt of {longest} tokens, images included, is longer than the model's context of {limit} "
            "(tokenizer_model_max_length). Package llava would cut off its end, which holds the question; it is kept "
            "whole here, and the model was not trained at this length",
            stacklevel=4,
        )
    if limit is not None:
        values["tokenizer_model_max_length"] = None
    known = {"prompts": prompts, "image_keys": crop_keys(images, keys), "image_sizes": None}
    with _config_values(model.config, **values), with_hints(**known, sizes_given=True):
        return model.generate(ids, images=images, image_sizes=sizes, attention_mask=mask, **options)


def _with_blanks(rows: list[list[int]], images: Any, sizes: Any, keys: Any) -> tuple[Any, Any, Any]:
    """Insert a blank image for each prompt without an image, since the package takes one from the list for it."""
    side, at = images[0].shape[-1], 0
    order: list[int | None] = []  # image numbers, None for a blank one
    for r in rows:
        n = r.count(IMAGE)
        order.extend(range(at, at + n) if n else [None])
        at += n
    blank = images[0].new_zeros((1, 3, side, side) if isinstance(images, list) else images.shape[1:])
    filled = [blank if i is None else images[i] for i in order]
    sizes = None if sizes is None else [(side, side) if i is None else sizes[i] for i in order]
    keys = None if keys is None else [BLANK if i is None else keys[i] for i in order]
    return filled if isinstance(images, list) else torch.stack(filled), sizes, keys


def ask_hf(loaded: Any, rows: list[list[int]], images: Images, sizes: Any, keys: Any, options: dict[str, Any]) -> Any:
    """Call `generate` of transformers' classes; see `Loaded.generate`."""
    model = loaded.model
    left = iter(_counts(loaded, rows, sizes, images))
    token = model.config.image_token_id
    spread = [[t for x in r for t in ([token] * next(left) if x == IMAGE else [x])] for r in rows]
    ids, mask = _padded(spread, options["pad_token_id"], loaded.device)
    extra = {} if images is None else _pixel_values(images, sizes)
    known = {"prompts": _host_prompts(loaded, rows, images), "image_keys": crop_keys(images, keys)}
    with with_hints(**known, image_sizes=sizes, sizes_given=True):
        out = model.generate(input_ids=ids, attention_mask=mask, **extra, **options)
    if isinstance(out, Tensor):
        return out[:, ids.shape[1] :]
    out.sequences = out.sequences[:, ids.shape[1] :]
    return out


def _pixel_values(images: Tensor | list[Tensor], sizes: Any) -> dict[str, Tensor]:
    """Stack the crops, padded to the largest number, with sizes as (height, width), for transformers' classes."""
    if isinstance(images, Tensor):
        return {"pixel_values": images}
    most = max(len(x) for x in images)
    stacked = torch.stack([torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in images])
    return {"pixel_values": stacked, "image_sizes": torch.tensor([[h, w] for w, h in sizes])}
