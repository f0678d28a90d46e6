"""What the runtime needs to know about a package's LLaVA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from ..runtime.tower import Tower


class Family(Protocol):
    """One package. Methods take the whole model and return its parts; nothing is stored."""

    name: str

    def matches(self, model: Any) -> bool:
        """Whether `model` is one of the family's classes."""

    def language_model(self, model: Any) -> Any:
        """The LlamaModel."""

    def tower(self, model: Any) -> Any:
        """The module whose call encodes pictures; a memo wraps it."""

    def blocks(self, model: Any) -> nn.ModuleList:
        """The tower's encoder blocks."""

    def projector(self, model: Any) -> nn.Module:
        """The module between tower and language model."""

    def feature_layer(self, model: Any) -> int:
        """0-based block whose output is the feature map."""

    def grid(self, model: Any) -> tuple[int, int]:
        """Patches of one picture or crop (rows, columns)."""

    def max_visual(self, model: Any) -> int:
        """Most visual tokens one picture can become."""

    def crops(self, model: Any) -> int:
        """Most crops a picture is cut into; 1 where pictures are seen whole."""

    def pads(self, model: Any) -> bool:
        """Whether pictures are padded to a square, so that patches may show padding."""

    def mark(self, model: Any) -> list[Callable[[], None]]:
        """Leave a `Pending` before every prefill with pictures; returns the undo steps."""


def block_index(select_layer: int, depth: int) -> int:
    """The block whose output hidden_states[select_layer] is (hidden_states[0] being the embeddings).

    Raises:
        ValueError: when no block makes that state.
    """
    index = depth + select_layer if select_layer < 0 else select_layer - 1
    if not 0 <= index < depth:
        raise ValueError(f"vision feature layer {select_layer} is no output of the tower's {depth} blocks")
    return index


def tower_of(family: Family, model: Any) -> Tower:
    """What a method's demands on the model's vision tower are checked against."""
    return Tower(len(family.blocks(model)), family.feature_layer(model), family.grid(model), family.crops(model))


def restore(owner: Any, name: str, before: Any) -> None:
    """Take back an instance attribute; `before` is what the instance itself had, None for nothing."""
    if before is None:
        owner.__dict__.pop(name, None)
    else:
        setattr(owner, name, before)


def encoder_blocks(clip: Any) -> nn.ModuleList:
    """Blocks of a CLIPVisionModel, which older releases wrap once more."""
    return getattr(clip, "vision_model", clip).encoder.layers


def family_of(model: Any) -> Family:
    """The family that knows `model`.

    Raises:
        ValueError: for any other class, naming it.
    """
    from .hf import HF
    from .llava import Llava

    for family in (Llava(), HF()):
        if family.matches(model):
            return family
    raise ValueError(
        f"{type(model).__name__} is no LLaVA that can be pruned; give LlavaLlamaForCausalLM (package llava) or "
        "LlavaForConditionalGeneration / LlavaNextForConditionalGeneration (transformers)"
    )
