"""CLIP's text tower and projections, loaded from a folder with a complete CLIP; LLaVA's checkpoints lack them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import shapes

SEGMENT = 77
"""Number of token positions of the text tower."""
NEEDED = ("text_projection.weight", "visual_projection.weight", "vision_model.post_layernorm.weight")


class TextTower:
    """Embeds questions and patches in the space that CLIP shares between text and images, in float32.

    Args:
        folder: folder of a CLIP in transformers' format, with its tokenizer.
        device: device of the tower.

    Raises:
        ValueError: for a folder without a text tower.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        place = Path(folder).expanduser()
        try:
            stored = shapes(place)
        except (OSError, ValueError):  # no folder, or one without weights
            stored = {}
        absent = [name for name in NEEDED if name not in stored]
        if absent:
            raise ValueError(
                f"clip={folder}: is not a folder with a CLIP and its text tower (no {absent[0]}); give the folder of "
                "the whole CLIP whose vision tower the model has, or leave clip out, which uses the language model's "
                "embeddings"
            )
        model: Any = CLIPModel.from_pretrained(place, dtype=torch.float32, local_files_only=True)
        model.to(device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(place, local_files_only=True)
        vision = getattr(model.vision_model, "vision_model", model.vision_model)
        self.norm, self.visual = vision.post_layernorm, model.visual_projection
        self.model, self.projection = model.text_model.eval(), model.text_projection

    @torch.no_grad()
    def patches(self, features: Tensor) -> Tensor:
        """Return (N, T, C) float32 embeddings of (N, T, Dv) patch features.

        Raises:
            ValueError: for features whose width differs from that of this CLIP.
        """
        if features.shape[2] != self.visual.in_features:
            raise ValueError(
                f"clip: the features are {features.shape[2]} wide, and those of this CLIP {self.visual.in_features}; "
                "give the CLIP whose vision tower the model has"
            )
        out: Tensor = self.visual(self.norm(features.float()))
        return out

    @torch.no_grad()
    def text(self, question: str, strict: bool = False) -> Tensor:
        """Return (M, C) float32 embeddings of a question, one for each segment of 77 tokens; padded with id 0.

        The embedding of a segment is the output at its end token. Without an end token, it is the output at the last
        token, or with `strict` at the token with the largest id, as in the official code of CDPruner.
        """
        ids = self.tokenizer(question, truncation=False, verbose=False).input_ids
        segments = [ids[i : i + SEGMENT] for i in range(0, len(ids), SEGMENT)]
        end = self.tokenizer.eos_token_id
        at = [_place(segment, end, strict) for segment in segments]
        padded = torch.tensor([s + [0] * (SEGMENT - len(s)) for s in segments])
        mask = torch.tensor([[1] * len(s) + [0] * (SEGMENT - len(s)) for s in segments])
        device = self.projection.weight.device
        states = self.model(input_ids=padded.to(device), attention_mask=mask.to(device)).last_hidden_state
        rows = states[torch.arange(len(segments)), torch.tensor(at)]  # (M, Dt)
        out: Tensor = self.projection(rows)
        return out


def _place(segment: list[int], end: int, strict: bool) -> int:
    """Return the token position at which the embedding of a segment is read."""
    if end in segment:
        return segment.index(end)
    return segment.index(max(segment)) if strict else len(segment) - 1


@functools.lru_cache(maxsize=2)
def text_tower(folder: str, device: torch.device) -> TextTower:
    """Return the text tower of a folder, which is loaded once for a device."""
    return TextTower(folder, device)
