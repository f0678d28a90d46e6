"""AutoPrune: the complexity of the question sets the slope of the retention curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.budget import Budget, Schedule, schedule
from ..core.checks import choice, real, whole
from ..core.information import last_attention, mutual_information, shares, text_attention
from ..core.method import Method
from ..core.registry import register
from ..core.select import keep_best
from ..core.types import ColumnIndex, Cut, Spans, View, VisionView


@register("autoprune")
@dataclass(frozen=True)
class AutoPrune(Method):
    """Pruning in every layer along a logistic curve whose slope follows the text-image mutual information.

    Layer 0 keeps min(2.5 tokens, N) by s = lam * I0 * alpha_text + alpha_CLS (equation 1). The mutual information
    I1 of layer 1 gives the slope max(k0 - gamma I1, 0); the curve is scaled to the budget. Layers 1..L-1 keep
    their best by text attention and recycle 30 % of the rest as DPC-KNN cluster means. Source: official code as
    specified; deviations: no random noise on the cluster densities, mutual information in float32, the last layer's
    cut is accounted but computed only when its record is read, and `tokens` >= N leaves the picture alone.

    Where the text gives no information (no text after the picture, or values that are not finite) I0 = I1 = 0,
    so layer 0 goes by the class token alone and the slope is k0.

    Args:
        tokens: the budget B >= 1, an average over layers.
        lam: lambda of equation (1).
        k0: largest slope.
        gamma: how fast information flattens the curve.
        x0: midpoint of the curve; default 14.9 for 32 and for 40 layers, 14.9 L / 32 for other depths.
        mi_scale: factor on both mutual informations. They are sums over heads and k0, gamma were set for 32.
        mask_padding: True zeroes the class-token attention on padding where the original sizes are known;
            False never; or a (T,) or (N, T) mask, 1 on padding.
        budget: "after" averages the tokens leaving each layer (the tables' convention), "before" those entering.
        strict: False skips layers that would only move one token to the end of the visual block.
        slope_step: rounds the slope to the nearest multiple, so that few schedules occur (0.05 leaves 9 of them) and
            compiled or captured prefills can be used again; None is the exact slope.
    """

    tokens: int = 64
    lam: float = 0.3
    k0: float = 0.4
    gamma: float = 0.2
    x0: float | None = None
    mi_scale: float = 1.0
    mask_padding: Any = True
    budget: Budget = "after"
    strict: bool = True
    slope_step: float | None = None

    paper = "Each Complexity Deserves a Pruning Policy, NeurIPS 2025"
    where = "language model, after every layer"
    source = "AutoLab-SAI-SJTU/AutoPrune @ e4a9918"
    licence = "Apache-2.0"
    batch = "any (official code: 1)"
    positions = "renumber"
    decode = "cache"
    replays = True

    def __post_init__(self) -> None:
        whole("tokens", self.tokens, 1, none=False)
        for name in ("lam", "k0", "gamma", "mi_scale"):
            real(name, getattr(self, name), 0, none=False)
        real("x0", self.x0)
        real("slope_step", self.slope_step, 0)
        if self.slope_step == 0:
            raise ValueError("slope_step=0: give a positive step, or None for the exact slope")
        choice("budget", self.budget, ("after", "before"))
        choice("strict", self.strict, (True, False))
        if not (isinstance(self.mask_padding, (bool, list, tuple)) or hasattr(self.mask_padding, "shape")):
            raise ValueError(f"mask_padding={self.mask_padding!r}: give True, False or a mask, 1 on padding")

    def midpoint(self, n_layers: int) -> float:
        """x0 for a model of `n_layers`."""
        if self.x0 is not None:
            return self.x0
        return 14.9 if n_layers in (32, 40) else 14.9 * n_layers / 32

    def slope(self, information: float) -> float:
        """k of the retention curve, for the mutual information I1 of layer 1."""
        exact = max(self.k0 - self.gamma * information, 0.0)
        return exact if self.slope_step is None else round(exact / self.slope_step) * self.slope_step

    def example(self, n_visual: int, n_layers: int) -> tuple[list[int], list[int], str]:
        """The schedule of a middling question: slope k0 / 2."""
        plan = schedule(self.k0 / 2, self.tokens, n_visual, n_layers, self.midpoint(n_layers), self.budget)
        return plan.entering(n_visual), list(plan.leaving), f"slope {self.k0 / 2:g}; the question sets it"

    # the tower ----------------------------------------------------------------------------------------------
    def vision_rows(self, feature_layer: int) -> dict[int, list[int]]:
        return {feature_layer: [0]}

    def reduce(self, view: VisionView) -> None:
        padding = view.padding if self.mask_padding is True else None
        if not isinstance(self.mask_padding, bool):
            padding = view.mask("mask_padding", self.mask_padding)
        cls = view.class_attention()  # (N, T)
        view.carry["cls"] = cls if padding is None else cls.masked_fill(padding, 0)

    # the language model -------------------------------------------------------------------------------------
    def rows(self, layer: int, spans: Spans) -> ColumnIndex | None:
        return None if self._idle(layer, spans) else spans.text_rows()

    def _idle(self, layer: int, spans: Spans) -> bool:
        """Whether a layer only passes on: the budget lets every picture through, and the information is known."""
        return layer > 1 and all(n <= self.tokens for n in spans.n_visual)

    def score(self, layer: int, view: View) -> Tensor:
        """(B, L) ranking of layers 1..L-1."""
        assert view.probs is not None
        return text_attention(view.probs, view.scratch["shares"])

    def cut(self, layer: int, view: View) -> Cut | None:
        if layer <= 0:
            return self._first(view) if layer == 0 else None
        plans: tuple[Schedule, ...] = view.scratch["settled"]
        keep = [p.keep[layer] for p in plans]
        if keep == [p.leaving[layer - 1] for p in plans]:
            return None
        clusters, pool = [p.merged[layer] for p in plans], [p.recycle[layer] for p in plans]
        return keep_best(view, self.score(layer, view), keep, clusters, pool)

    def _first(self, view: View) -> Cut | None:
        assert view.probs is not None
        view.scratch["shares"] = shares(view.spans.text)
        view.scratch["mi0"] = information = self._information(view) / view.spans.text.sum(1).clamp(min=1)
        attention = text_attention(view.probs, view.scratch["shares"])
        score = self.lam * information[:, None] * attention + view.carry("cls")
        keep = [min(int(2.5 * self.tokens), n) if self.tokens < n else n for n in view.spans.n_visual]
        if list(view.spans.n_visual) == keep:
            return None
        return keep_best(view, score, keep)

    def _information(self, view: View) -> Tensor:
        """(B,) mutual information, summed over heads; 0 where no text follows the picture."""
        assert view.probs is not None
        text = view.spans.text & ~view.visual[:, -view.spans.n_text :]  # a visual row may vote, but tells nothing
        heads = mutual_information(view.probs, text, view.visual)  # (B, H)
        return torch.nan_to_num(heads.sum(1) * self.mi_scale, posinf=0.0)

    def ask(self, layer: int, view: View) -> Tensor | None:
        """(B, 2) after layer 1: the mutual informations, from which every count follows."""
        return torch.stack([view.scratch["mi0"], self._information(view)], 1) if layer == 1 else None

    def settle(self, layer: int, values: list[list[float]], view: View) -> tuple[Schedule, ...]:
        mi0, mi1 = zip(*values, strict=True)
        slopes = [self.slope(i) for i in mi1]
        x0 = self.midpoint(view.spans.n_layers)
        plans = [
            schedule(k, self.tokens, n, view.spans.n_layers, x0, self.budget)
            for k, n in zip(slopes, view.spans.n_visual, strict=True)
        ]
        view.scratch["stats"] = {"mi0": list(mi0), "mi1": list(mi1), "slope": slopes, "scale": [p.scale for p in plans]}
        return tuple(plans) if self.strict else tuple(p.without_moves() for p in plans)


@register("autoprune-flash")
@dataclass(frozen=True)
class AutoPruneFlash(AutoPrune):
    """AutoPrune that ranks layers 1..L-1 by the last instruction token alone (supplement, section C).

    No official code exists. Our reading: the mutual information of a single row is 0 by definition, so layers 0
    and 1 read the text rows for it (and for equation 1); ranking from layer 1 on takes the row of the last token.

    Args:
        flash_score: "softmax" averages the attention of the heads, as PyramidDrop's code does; "dot" averages the
            dot products themselves, as the supplement says.
    """

    flash_score: Literal["softmax", "dot"] = "softmax"

    source = "none; section C of the supplement"
    licence = "-"
    batch = "any"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("flash_score", self.flash_score, ("softmax", "dot"))

    def rows(self, layer: int, spans: Spans) -> ColumnIndex | None:
        if layer <= 1:
            return spans.text_rows()
        return None if self._idle(layer, spans) else spans.last_row()

    def score(self, layer: int, view: View) -> Tensor:
        assert view.probs is not None
        return last_attention(view.probs, product=self.flash_score == "dot")
