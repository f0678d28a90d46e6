"""FasterVLM: keep the patches that the tower's class token attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.budget import per_crop
from ..core.checks import whole
from ..core.method import Method
from ..core.registry import register
from ..core.select import descending_rank
from ..core.types import VisionCut, VisionView

BUDGETS = (192, 128, 64, 288, 144, 58, 640, 320, 160)


@register("fastervlm", presets={str(t): {"tokens": t} for t in BUDGETS})
@dataclass(frozen=True)
class FasterVLM(Method):
    """Keep the patches with the largest class-token attention, in raster order; no merging, no class token.

    Score: attention of the class token in the block whose output is the feature map, mean over heads, its own column
    taken away without renormalising. Source: official code f5d5f12. Deviations: only the patches that stay go through
    the projector (it works token by token), and ties go by index. Pictures in crops: the same number in each crop,
    neither newline tokens nor unpadding, as the official code forces; a budget of all tokens leaves the picture alone.

    Presets: budgets by name. 192, 128, 64, 640, 320, 160 are not in the official tables; the code takes any number.

    Args:
        tokens: visual tokens of a picture; with crops each of them gets tokens // (most crops of the model).
    """

    tokens: int = 64

    paper = "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster, 2024"
    where = "before the projector, by the tower's class-token attention"
    source = "Theia-4869/FasterVLM @ f5d5f12"
    licence = "Apache-2.0"
    positions = "renumber"
    decode = "cache"

    def __post_init__(self) -> None:
        whole("tokens", self.tokens, 1, none=False)

    def vision_rows(self, feature_layer: int) -> dict[int, list[int]]:
        return {feature_layer: [0]}

    def reduce(self, view: VisionView) -> VisionCut | None:
        keep = per_crop(self.tokens, view.crops)
        if keep >= view.features.shape[1]:
            return None
        score = view.class_attention()  # (N, T)
        live = descending_rank(score, score == score) < keep
        patches = torch.arange(live.shape[1], device=live.device).expand_as(live)
        return VisionCut(live, view.features, patches, counts=[keep] * live.shape[0])

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [min(self.tokens, n_visual)] * n_layers
