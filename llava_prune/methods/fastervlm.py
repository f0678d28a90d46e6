"""FasterVLM: keep the patches with the largest attention of the vision tower's class token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .base import MethodInfo, ScoreMethod
from .checks import choice, integer
from .registry import register
from .views import EVERY, VisionView


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(ScoreMethod):
    """Keep the patches with the largest class-token attention, in raster order, without merging.

    The class token itself is not kept. Score: attention of the class token in the block whose output is the feature
    map, mean over heads, without its attention on itself and without renormalising. Source: official code f5d5f12.
    Deviation: ties are resolved by index. Images in crops: the same number of patches in each crop, without newline
    tokens and unpadding, as the official code enforces; a budget of all tokens keeps the image unchanged.

    Budgets 192, 128, 64, 640, 320 and 160 are not in the official tables; the code takes any number.

    Args:
        tokens: visual tokens of an image; each crop of it gets tokens // (largest number of crops of the model).
        class_token: "own" ranks by the class token of a CLIP tower. "received" ranks by the mean attention that a patch
            receives from all positions of the tower's block; it is not in the paper and serves towers without such a
            token (SigLIP, DINOv2).
    """

    tokens: int = 64
    class_token: Literal["own", "received"] = "own"

    info = MethodInfo(
        paper="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster, 2024",
        where="before the language model, by the vision tower's class-token attention",
        source="Theia-4869/FasterVLM @ f5d5f12",
        licence="Apache-2.0",
    )
    positions = "renumber"
    decode = "cache"
    requires = frozenset({"class token"})

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, 1, none=False)
        choice("class_token", self.class_token, ("own", "received"))
        if self.class_token == "received":
            object.__setattr__(self, "requires", frozenset())

    def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
        return {feature_layer: [0 if self.class_token == "own" else EVERY]}

    def vision_scores(self, view: VisionView) -> Tensor:
        return view.class_attention()

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [min(self.tokens, n_visual)] * n_layers
