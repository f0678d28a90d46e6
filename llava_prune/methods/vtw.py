"""VTW (visual tokens withdrawal): drop all visual tokens after one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.selection import Cut, assemble
from .base import Method, MethodInfo
from .checks import at_most_one, integer, real
from .registry import register
from .views import View

_PRESETS: dict[str, dict[str, int | float]] = {
    "half": {"flops": 0.5},
    "k15": {"layer": 15},
    "k16": {"layer": 16},
    "k20": {"layer": 20},
}


@register("vtw", presets=_PRESETS)
@dataclass(frozen=True)
class VTW(Method):
    """Drop all visual tokens before layer index `layer`; nothing is ranked.

    Source: lzhxmu/VTW. Text keeps its positions, and layers before the withdrawal keep the visual tokens in their
    caches.

    Without arguments the tokens are dropped after half of the layers: 16 of 32 and 20 of 40, the defaults of the
    official command line, which is exactly 50 % of the FLOPs counted on visual tokens alone ("half"). "k15" is the
    setting of the official README. The paper has no rows at 192, 128 and 64; for a budget, the layer with the nearest
    average is used.

    Args:
        tokens: budget, the mean over layers of visual tokens entering; the nearest layer is used, at least layer 1.
        layer: first layer without visual tokens, 0..L.
        flops: share of the unpruned model's FLOPs on visual tokens alone, 0..1. Text is not counted, so every layer
            costs the same, and this is the share of layers.
    """

    tokens: int | None = None
    layer: int | None = None
    flops: float | None = None

    info = MethodInfo(
        paper="Boosting Multimodal LLMs via Visual Tokens Withdrawal, AAAI 2025 (arXiv 2405.05803)",
        where="language model, all of them before one layer",
        source="lzhxmu/VTW @ a3d8cfc",
        licence="none given",
        batch="any (official code: 1)",
    )
    fixes_budget = ("layer", "flops")

    def __post_init__(self) -> None:
        at_most_one(tokens=self.tokens, layer=self.layer, flops=self.flops)
        integer("tokens", self.tokens, 1)
        integer("layer", self.layer)
        real("flops", self.flops, 0, 1)

    def first(self, n_visual: int, n_layers: int) -> int:
        """Return the first layer without visual tokens.

        Raises:
            ValueError: for a layer above the model's depth.
        """
        if self.layer is not None:
            if self.layer > n_layers:
                raise ValueError(f"layer={self.layer}: this model has {n_layers} layers; give at most {n_layers}")
            return self.layer
        if self.tokens is not None:
            if self.tokens >= n_visual:
                return n_layers
            return max(1, int(self.tokens * n_layers / n_visual + 0.5))
        return int((0.5 if self.flops is None else self.flops) * n_layers + 0.5)

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        if n_visual == 0:
            return [0] * n_layers
        first = self.first(n_visual, n_layers)
        return [n_visual] * first + [0] * (n_layers - first)

    def prune(self, layer: int, view: View) -> Cut | None:
        keep = self.keep_after(layer, view.spans)
        if keep is None:
            return None
        stays = torch.tensor([k > 0 for k in keep]).to(view.visual.device, non_blocking=True)[:, None]  # (B, 1)
        lengths = [n + k for n, k in zip(view.n_other, keep, strict=True)]
        return assemble(view.visual & stays, view.visual, view.valid, lengths)


ETA = {"llava-v1.5-7b": 0.003, "llava-v1.5-13b": 0.0005, "llava-v1.6-vicuna-7b": 0.0001}
"""Thresholds of the official search; 0.003 for any other model."""


def divergence(full: Tensor, withdrawn: Tensor) -> Tensor:
    """Compute KL(P_withdrawn || P_full) of the last prompt token, in the direction of the official code.

    Args:
        full: (..., vocabulary) logits of the unpruned model.
        withdrawn: (..., vocabulary) logits with visual tokens withdrawn.

    Returns:
        (...,) float32.
    """
    p, q = withdrawn.float().log_softmax(-1), full.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def first_below(errors: Sequence[float], eta: float, start: int = 5) -> int:
    """Return the first layer whose mean divergence is at most `eta`; the first entry of `errors` is layer `start`.

    Raises:
        ValueError: if there is no such layer.
    """
    for layer, error in enumerate(errors, start):
        if error <= eta:
            return layer
    raise ValueError(f"no layer from {start} on has a divergence of at most {eta:g}; least is {min(errors):g}")


def find_layer(
    logits: Callable[[VTW | None], Tensor], n_layers: int, eta: float = 0.003, start: int = 5
) -> tuple[int, list[float]]:
    """Run the official search for the withdrawal layer.

    Args:
        logits: function that returns (samples, vocabulary) logits at the last prompt token, of the model pruned by the
            given `VTW`, or of the unpruned model for None.
        n_layers: number of decoder layers.
        eta: threshold, see `ETA`.
        start: first candidate.

    Returns:
        The layer, and the mean divergence of every candidate.

    Raises:
        ValueError: if no candidate has a divergence of at most `eta`.
    """
    full = logits(None)
    errors = [float(divergence(full, logits(VTW(layer=k))).mean()) for k in range(start, n_layers)]
    return first_below(errors, eta, start), errors
