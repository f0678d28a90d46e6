"""AutoPrune: the complexity of the question sets the slope of the retention curve.

Read beside section D of the paper's supplement. In order: equation (1) and the mutual information that it uses, the
slope, the retention curve, the search for the budget, and the recycling of pruned tokens.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.attention import last_attention, mean_weights, text_attention
from ..ops.clustering import recycled
from ..ops.selection import Cut, Positions
from .base import Method, MethodInfo
from .checks import choice, integer, real, shown
from .registry import register
from .views import Spans, View, VisionView

Budget = Literal["after", "before"]
PEAK = 0.75
"""Upper end of the logistic curve in the official code."""
LEAST = 2
"""Smallest budget: a layer that drops tokens keeps one and merges others into one. With 1, the official search finds no
factor and keeps 2."""


@register("autoprune")
@dataclass(frozen=True)
class AutoPrune(Method):
    """Pruning in every layer along a logistic curve whose slope follows the text-image mutual information.

    Layer 0 keeps min(2.5 tokens, N) by s = lam * I0 * alpha_text + alpha_CLS (equation 1). The mutual information
    I1 of layer 1 gives the slope max(k0 - gamma I1, 0); the curve is scaled to the budget. Layers 1..L-1 keep
    their best by text attention and recycle 30 % of the rest as DPC-KNN cluster means. Source: official code as
    specified; deviations: no random noise on the cluster densities, mutual information in float32, the last layer's
    cut is counted but computed only when its record is read, and `tokens` >= N leaves the image unchanged.

    Where the text gives no information (no text after the image, or values that are not finite) I0 = I1 = 0,
    so layer 0 goes by the class token alone and the slope is k0.

    Args:
        tokens: the budget B >= 2, an average over layers.
        lam: lambda of equation (1).
        k0: largest slope.
        gamma: how fast information flattens the curve.
        x0: midpoint of the curve; default 14.9 for 32 and for 40 layers, 14.9 L / 32 for other depths.
        mi_scale: factor on both mutual informations. They are sums over heads and k0, gamma were set for 32.
        mask_padding: True sets the class-token attention on padding to 0 where the original sizes are known;
            False never; or a (T,) or (N, T) mask, 1 on padding.
        budget: "after" averages the tokens leaving each layer (the tables' convention), "before" those entering.
        strict: False skips layers that would only move one token to the end of the visual tokens.
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

    info = MethodInfo(
        paper="Each Complexity Deserves a Pruning Policy, NeurIPS 2025",
        where="language model, after every layer",
        source="AutoLab-SAI-SJTU/AutoPrune @ e4a9918",
        licence="Apache-2.0",
        batch="any (official code: 1)",
    )
    positions = "renumber"
    decode = "cache"
    requires = frozenset({"class token"})
    replays = True

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, LEAST, none=False)
        for name in ("lam", "k0", "gamma", "mi_scale"):
            real(name, getattr(self, name), 0, none=False)
        real("x0", self.x0, 0)
        real("slope_step", self.slope_step, 1e-9)
        choice("budget", self.budget, ("after", "before"))
        choice("strict", self.strict, (True, False))
        if not (
            isinstance(self.mask_padding, bool) or hasattr(self.mask_padding, "shape") or _is_mask(self.mask_padding)
        ):
            raise ValueError(f"mask_padding={shown(self.mask_padding)}: must be True, False or a mask, 1 on padding")

    # alpha_CLS of equation (1) -------------------------------------------------------------------------------
    def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
        return {feature_layer: [0]}

    def prune_vision(self, view: VisionView) -> None:
        padding = view.padding if self.mask_padding is True else None
        if not isinstance(self.mask_padding, bool):
            padding = view.mask("mask_padding", self.mask_padding)
        cls = view.class_attention()  # (N, T)
        view.patch_values["cls"] = cls if padding is None else cls.masked_fill(padding, 0)

    # which layer does what -----------------------------------------------------------------------------------
    def queries(self, layer: int, spans: Spans) -> Positions | None:
        return None if self._idle(layer, spans) else spans.text_positions()

    def _idle(self, layer: int, spans: Spans) -> bool:
        """Whether a layer needs no attention: the budget keeps every image whole, and the information is known."""
        return layer > 1 and all(n <= self.tokens for n in spans.n_visual)

    def prune(self, layer: int, view: View) -> Cut | None:
        if layer < 0:
            return None
        return self._first_cut(view) if layer == 0 else self._later_cut(layer, view)

    # layer 0: equation (1) -----------------------------------------------------------------------------------
    def _first_cut(self, view: View) -> Cut | None:
        """Keep min(2.5 B, N) by s_v = lam I(V, T) alpha_{t,v} + alpha_{CLS,v}."""
        assert view.attention is not None
        view.scratch["weights"] = mean_weights(view.spans.text)  # (B, Q)
        view.scratch["mi0"] = information = self.information(view) / view.spans.text.sum(1).clamp(min=1)  # (B,)
        attention = text_attention(view.attention, view.scratch["weights"], view.kernels)  # (B, L)
        score = self.lam * information[:, None] * attention + view.patch_values("cls")
        keep = [min(int(2.5 * self.tokens), n) if self.tokens < n else n for n in view.spans.n_visual]
        return None if list(view.spans.n_visual) == keep else view.keep_top(score, keep)

    def information(self, view: View) -> Tensor:
        """(B,) mutual information I(V, T) in bit, summed over heads; 0 where no text follows the image."""
        assert view.attention is not None
        text = view.spans.text & ~view.visual[:, -view.spans.n_text :]  # a visual token may vote, but tells nothing
        heads = mutual_information(view.attention, text, view.visual)  # (B, H)
        return torch.nan_to_num(heads.sum(1) * self.mi_scale, posinf=0.0)

    # after layer 1: the slope and the counts of every layer --------------------------------------------------
    def host_values(self, layer: int, view: View) -> Tensor | None:
        """(B, 2) after layer 1: the mutual informations I0 and I1, from which every count follows."""
        return torch.stack([view.scratch["mi0"], self.information(view)], 1) if layer == 1 else None

    def decide(self, layer: int, values: list[list[float]], view: View) -> tuple[Schedule, ...]:
        mi0, mi1 = zip(*values, strict=True)
        slopes = [self.slope(i) for i in mi1]
        x0 = self.midpoint(view.spans.n_layers)
        plans = [
            schedule(k, self.tokens, n, view.spans.n_layers, x0, self.budget)
            for k, n in zip(slopes, view.spans.n_visual, strict=True)
        ]
        view.scratch["stats"] = {"mi0": list(mi0), "mi1": list(mi1), "slope": slopes, "scale": [p.scale for p in plans]}
        return tuple(plans) if self.strict else tuple(p.without_moves() for p in plans)

    def slope(self, information: float) -> float:
        """k = max(k0 - gamma I1, 0) of the retention curve, for the mutual information I1 of layer 1."""
        exact = max(self.k0 - self.gamma * information, 0.0)
        return exact if self.slope_step is None else round(exact / self.slope_step) * self.slope_step

    def midpoint(self, n_layers: int) -> float:
        """x0 for a model of `n_layers`."""
        if self.x0 is not None:
            return self.x0
        return 14.9 if n_layers in (32, 40) else 14.9 * n_layers / 32

    # layers 1..L-1: keep by text attention, recycle some of the rest -----------------------------------------
    def _later_cut(self, layer: int, view: View) -> Cut | None:
        plans: tuple[Schedule, ...] = view.scratch["decision"]
        keep = [p.keep[layer] for p in plans]
        if keep == [p.leaving[layer - 1] for p in plans]:
            return None
        recycle, clusters = [p.recycle[layer] for p in plans], [p.merged[layer] for p in plans]
        return view.keep_top(self.later_scores(view), keep, recycle, clusters)

    def later_scores(self, view: View) -> Tensor:
        """(B, L) attention of the text tokens, mean over heads."""
        assert view.attention is not None
        return text_attention(view.attention, view.scratch["weights"], view.kernels)

    def example(self, n_visual: int, n_layers: int) -> tuple[list[int], list[int], str]:
        """The schedule of a question of medium complexity: slope k0 / 2."""
        plan = schedule(self.k0 / 2, self.tokens, n_visual, n_layers, self.midpoint(n_layers), self.budget)
        return plan.entering(n_visual), list(plan.leaving), f"slope {self.k0 / 2:g}; the question sets it"


@register("autoprune-flash")
@dataclass(frozen=True)
class AutoPruneFlash(AutoPrune):
    """AutoPrune that ranks layers 1..L-1 by the last instruction token alone (supplement, section C).

    No official code exists. Our reading: the mutual information of a single text token is 0 by definition, so layers 0
    and 1 use all text tokens for it (and for equation 1); ranking from layer 1 on uses the last token.

    Args:
        flash_score: "softmax" averages the attention of the heads, as PyramidDrop's code does; "dot" averages the
            dot products themselves, as the supplement says.
    """

    flash_score: Literal["softmax", "dot"] = "softmax"

    info = replace(AutoPrune.info, source="none; section C of the supplement", licence="-", batch="any")

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("flash_score", self.flash_score, ("softmax", "dot"))

    def queries(self, layer: int, spans: Spans) -> Positions | None:
        if layer <= 1:
            return spans.text_positions()
        return None if self._idle(layer, spans) else spans.last_position()

    def later_scores(self, view: View) -> Tensor:
        assert view.attention is not None
        return last_attention(view.attention, product=self.flash_score == "dot")


def mutual_information(attention: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """I(V; T) in bit, for each head.

    With a the attention of T text tokens on V visual tokens (not renormalised over them), p = a / T and
    p_v = sum_t p: I = sum p log2 max(p / (p_v / T + 1e-6), 1e-6). The 1e-6 is the official code's and not
    negligible; the arithmetic here is float32 where the official one is the model's dtype.

    Args:
        attention: (B, H, Q, L) float32.
        text: (B, Q) bool, query positions that are text.
        visual: (B, L) bool.

    Returns:
        (B, H) float32; 0 for a sample without text or without visual tokens, never NaN.
    """
    count = text.sum(1).clamp(min=1)[:, None, None, None]  # (B, 1, 1, 1)
    live = text[:, None, :, None] & visual[:, None, None]  # (B, 1, Q, L)
    joint = torch.nan_to_num(attention.float()).masked_fill_(~live, 0).div_(count)  # in place: large, and ours
    marginal = joint.sum(2, keepdim=True)  # (B, H, 1, L)
    ratio = (joint / (marginal / count + 1e-6)).clamp_(min=1e-6)
    return ratio.log2_().mul_(joint).sum((2, 3))


def _is_mask(values: Any) -> bool:
    """Whether a list holds 0 and 1 only, in rows of equal length."""
    if not isinstance(values, (list, tuple)):
        return False
    try:
        table = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return bool(((table == 0) | (table == 1)).all())


# the retention curve and its budget: plain Python on integers and floats ------------------------------------------


def logistic(slope: float, x0: float, n_layers: int) -> list[float]:
    """Retention of layers 1..L-1: 0.75 / (1 + exp(k (l - (x0 + k)))), k the slope; its midpoint is x0 + k."""
    out = []
    for layer in range(1, n_layers):
        power = slope * (layer - (x0 + slope))
        out.append(PEAK / (1.0 + math.exp(min(power, 700.0))))
    return out


@dataclass(frozen=True)
class Schedule:
    """What AutoPrune keeps in each layer.

    Attributes:
        keep: tokens kept by rank in layers 0..L-1 (layer 0: equation 1).
        recycle: tokens clustered in each layer.
        merged: clusters appended in each layer.
        leaving: visual tokens leaving each layer, keep + merged.
        scale: the factor on the curve.
        steps: cost evaluations of the search.
    """

    keep: tuple[int, ...]
    recycle: tuple[int, ...]
    merged: tuple[int, ...]
    leaving: tuple[int, ...]
    scale: float
    steps: int

    def entering(self, n_visual: int) -> list[int]:
        """Visual tokens entering each layer, the first seeing all `n_visual`."""
        return [n_visual, *self.leaving[:-1]]

    def without_moves(self) -> Schedule:
        """The same counts, but a layer that drops one token and recycles it alone (moves it to the end) keeps it."""
        moves = [pair == (1, 1) for pair in zip(self.recycle, self.merged, strict=True)]
        keep = tuple(k + m for k, m in zip(self.keep, moves, strict=True))
        recycle = tuple(n * (not m) for n, m in zip(self.recycle, moves, strict=True))
        merged = tuple(n * (not m) for n, m in zip(self.merged, moves, strict=True))
        return replace(self, keep=keep, recycle=recycle, merged=merged)


@functools.lru_cache(maxsize=4096)
def schedule(
    slope: float,
    tokens: int,
    n_visual: int,
    n_layers: int,
    x0: float,
    budget: Budget = "after",
    first: int | None = None,
) -> Schedule:
    """Counts of every layer for one image.

    Source: official code, sections 6 to 9 of the method's specification. The bisection stops once its interval
    is a single float, with the answer of the official 200 steps.

    Args:
        slope: k >= 0 of the logistic curve.
        tokens: budget B, the mean over layers of visual tokens leaving ("after") or entering ("before") a layer.
        n_visual: N, visual tokens of the image.
        n_layers: L >= 2.
        x0: midpoint of the curve, before the slope shifts it.
        budget: which mean `tokens` is.
        first: tokens kept by layer 0; default min(2.5 B, N).

    Raises:
        ValueError: for fewer than 2 layers, a budget below 2 of more tokens, or one that no curve can meet.
    """
    if n_layers < 2:
        raise ValueError(f"a schedule needs at least 2 layers, got {n_layers}")
    if tokens < min(LEAST, n_visual):
        raise ValueError(f"tokens={tokens}: the budget must be at least {LEAST}")
    cap = min(int(2.5 * tokens), n_visual)
    first = cap if first is None else first
    if tokens >= n_visual:  # nothing to prune: leave the sequence unchanged
        whole, none = (n_visual,) * n_layers, (0,) * n_layers
        return Schedule(whole, none, none, whole, 1.0, 0)
    curve = logistic(slope, x0, n_layers)
    least = _cost(curve, 0.0, first, cap, n_visual, budget)
    if least > n_layers * tokens:
        what = "entering" if budget == "before" else "leaving"
        raise ValueError(
            f"tokens={tokens}: the first layers alone bring the average of tokens {what} each of {n_layers} layers to "
            f"{least / n_layers:.1f} for {n_visual} visual tokens; give a larger budget"
            + (" or budget='after'" if budget == "before" else "")
        )
    factor, steps = _search(curve, first, cap, tokens, n_visual, budget)
    scaled = torch.tensor([factor * r for r in curve], dtype=torch.float32)
    wanted = [int(v) for v in torch.ceil(scaled * torch.tensor(float(first - 1), dtype=torch.float32)).tolist()]
    keep, recycle, merged, leaving = [first], [0], [0], [first]
    for want in wanted:
        m = min(want, leaving[-1])
        q, c = recycled(leaving[-1] - m)
        keep.append(m)
        recycle.append(q)
        merged.append(c)
        leaving.append(m + c)
    return Schedule(tuple(keep), tuple(recycle), tuple(merged), tuple(leaving), factor, steps)


def _search(
    curve: list[float], first: int, cap: int, tokens: float, n_visual: int, budget: Budget
) -> tuple[float, int]:
    """The factor on the curve that meets the budget, by bisection, and the cost evaluations that took."""
    goal = (len(curve) + 1) * tokens
    unscaled = [int(v) for v in (torch.tensor(curve, dtype=torch.float32) * first).tolist()]
    if budget == "after" and unscaled and abs(sum(unscaled) + unscaled[-1] - goal) < 1:
        return 1.0, 0
    low, high, best, gap = 0.0, 20.0, 1.0, math.inf
    for step in range(1, 201):
        middle = (low + high) / 2
        cost = _cost(curve, middle, first, cap, n_visual, budget)
        if abs(cost - goal) < gap:
            best, gap = middle, abs(cost - goal)
        if gap < 0.01:
            return best, step
        if (cost < goal and middle == low) or (cost >= goal and middle == high):
            return best, step  # the interval is one float wide: no later step could change the answer
        low, high = (middle, high) if cost < goal else (low, middle)
    return best, 200


def _cost(curve: list[float], factor: float, first: int, cap: int, n_visual: int, budget: Budget) -> int:
    """Sum over layers of the visual tokens leaving (or entering) them, with `factor` on the curve."""
    n, total = first, first
    last, ceil = 0, math.ceil
    for r in curve:
        share = factor * r
        m = ceil((first - 1) * share) if share < 1.0 else first - 1
        m = m if m < cap else cap
        last = n = m + recycled(n - m)[1]
        total += n
    return total if budget == "after" else total - last + n_visual
