"""A stand-in for the flash-attention kernel that accepts only what the real kernel can read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import language_model


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the kernel; return a list of the masks that it gets: 2-D of the keys' length, or None.

    The stand-in refuses position ids, and its causal mask is aligned at the end.
    """
    from transformers.integrations import flash_attention

    masks: list[Any] = []

    def kernel(query: Any, key: Any, value: Any, mask: Any, query_length: int, is_causal: bool, **rest: Any) -> Any:
        assert rest["attn_implementation"] == "flash_attention_2" and is_causal
        assert rest.get("position_ids") is None, "gapped positions look packed to the kernel"
        assert not any(k.startswith(("cu_seq", "max_length")) for k in rest)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        assert k.shape[2] >= q.shape[2] == query_length
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        blocked = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])[None, None]
        masks.append(mask)
        if mask is not None:
            assert mask.shape == (k.shape[0], k.shape[2]) and not mask.all()
            blocked = blocked | ~mask.bool()[:, None, None]
        score = (q @ k.transpose(2, 3) * rest["softmax_scale"]).masked_fill(blocked, torch.finfo(q.dtype).min)
        return (score.softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    return masks


def flash(model: Any) -> Any:
    """Make the language model use the kernel, and return the model."""
    language_model(model).config._attn_implementation_internal = "flash_attention_2"
    return model
