"""A random LLaVA of 576 patches whose features, projected tokens and attention are replaced by recorded ones.

Recorded tokens are narrower than the model; they are padded with zeros, which changes neither norms nor products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import llava_prune
from llava_prune.runtime import vision
from llava_prune.runtime.attention import RecordedAttention
from tests import models

WIDTH = 256


def write_wide(folder: Path) -> Path:
    """Write a checkpoint of two layers in haotian-liu/LLaVA's format and return `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WIDTH": WIDTH, "LAYERS": 2, "GRID": 24, "PATCHES": 576, "SIDE": 336}.items():
            patch.setattr(models, name, value)
        return models.write_checkpoint(folder)


def projector(model: Any) -> Any:
    return model.model.mm_projector if models.is_llava(model) else model.model.multi_modal_projector


@contextmanager
def recorded_tokens(
    model: Any, features: Tensor | None = None, projected: Tensor | None = None, attention: Tensor | None = None
) -> Iterator[None]:
    """Replace the model's own tokens by recorded ones.

    Args:
        model: a model of either family, not attached yet.
        features: (T, Dv) features of the vision tower, the input of the projector.
        projected: (T, D) output of the projector, the input of the language model.
        attention: (H, T) or (H, 1 + T) attention of the class token in the recorded block, without or with itself.
    """
    hooks = []
    if features is not None:
        given = pad(features, (0, WIDTH - features.shape[1]))[None]
        hooks.append(projector(model).register_forward_pre_hook(lambda module, args: (given.to(args[0]),)))
    if projected is not None:
        out = pad(projected, (0, WIDTH - projected.shape[1]))[None]
        hooks.append(projector(model).register_forward_hook(lambda module, args, output: out.to(output)))
    with pytest.MonkeyPatch.context() as patch:
        if attention is not None:
            whole = pad(attention, (577 - attention.shape[1], 0))[None, :, None]  # (1, H, 1, 577)
            stand_in = RecordedAttention(whole, torch.zeros(1, 1, 577, 4), torch.zeros(1, 1, 1, 4))
            patch.setattr(vision, "tower_attention", lambda *_: stand_in)
        yield
    for hook in hooks:
        hook.remove()


def kept(model: Any, name: str, hyper: dict[str, Any], given: dict[str, Any]) -> list[int]:
    """Return the patches that enter the language model, in sequence order."""
    with llava_prune.pruned(model, name, check=True, **hyper) as handle, torch.inference_mode():
        assert model(**given).logits.isfinite().all()
    assert handle.last is not None
    out: list[int] = handle.last.kept[0][0].tolist()
    return out
