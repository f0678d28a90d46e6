"""AutoPrune: the complexity of the question sets the slope of the retention curve.

This file follows section D of the paper's supplement. In order: equation (1) and its mutual information, the slope, the
retention curve, the search for the budget, and the recycling of pruned tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.attention import mean_weights, text_attention
from ..ops.clustering import RECYCLED, recycled
from ..ops.selection import Cut, Positions
from .base import Method, MethodInfo
from .checks import choice, integer, real, shown
from .registry import register
from .views import EVERY, Spans, View, VisionView

Budget = Literal["after", "before"]
ClassToken = Literal["own", "received"]
CAP = 2.5
"""Tokens kept by layer 0, as a multiple of the budget."""
PEAK = 0.75
"""Upper end of the logistic curve."""
LEAST = 2
"""Smallest budget: a layer that drops tokens keeps at least one and merges others into one. With a budget of 1, the
official search finds no factor and keeps 2 tokens."""


@register("autoprune")
@dataclass(frozen=True)
class AutoPrune(Method):
    """Prune in every layer along a logistic curve whose slope follows the text-image mutual information.

    Layer 0 keeps min(2.5 tokens, N) tokens by the score s = lam * I0 * alpha_text + alpha_CLS (equation 1). The mutual
    information I1 of layer 1 gives the slope max(k0 - gamma I1, 0); the curve is scaled to the budget. Layers 1..L-1
    keep the tokens with the highest text attention and recycle 30 % of the others as DPC-KNN cluster means. Source:
    official code as specified. Deviations: cluster densities have no random noise, mutual information is computed in
    float32, the cut of the last layer is counted but computed only when its record is read, and `tokens` >= N leaves
    the image unchanged. Every constant and every step is an argument whose default is the published value; see
    "Ablations" in docs/methods/autoprune.md.

    If the text gives no information (no text after the image, or values that are not finite), I0 = I1 = 0. Layer 0 then
    ranks by the class token alone, and the slope is k0.

    Args:
        tokens: the budget B >= 2, an average over layers.
        lam: lambda of equation (1).
        k0: largest slope.
        gamma: how fast information flattens the curve.
        x0: midpoint of the curve; default 14.9 for 32 and for 40 layers, 14.9 L / 32 for other depths.
        mi_scale: factor on both mutual informations. They are sums over heads, and k0 and gamma were tuned for 32
            heads.
        mask_padding: True sets the class-token attention on padding to 0 if the original sizes are known. False never
            does. A (T,) or (N, T) mask, 1 on padding, is used as it is.
        budget: "after" averages the tokens leaving each layer (the convention of the tables), "before" those entering.
        strict: False skips cuts that would only move one token to the end of the visual tokens.
        slope_step: rounds the slope to the nearest multiple, so that few schedules occur (9 of them with 0.05) and
            compiled or captured prefills can be reused; None uses the exact slope.
        first_cap: layer 0 keeps min(int(first_cap * tokens), N) tokens, and no later layer keeps more; at least 1.
        peak: upper end of the logistic curve, in [1e-9, 1]. The factor that scales the curve to the budget compensates
            for it as long as the factor stays below 20, so values from 0.1 on differ by rounding only.
        recycle: share of a layer's pruned tokens that is clustered, in [0, 1]; 0 drops them all.
        fixed_slope: a slope of at least 0 for every question, used instead of max(k0 - gamma I1, 0) and not rounded to
            `slope_step`; None uses the slope of the question.
        first_score: the score of layer 0: "equation1", alpha_text alone ("text") or alpha_CLS alone ("class"). "none"
            keeps all N tokens in layer 0. "text" and "none" need no class token.
        class_token: source of alpha_CLS: "own" is the class token of a CLIP tower. "received" is the mean attention
            that a patch receives from all positions of the tower's block; it is not in the paper and serves towers
            without such a token (SigLIP, DINOv2).
        positions: position ids after a cut. "renumber": 0..n-1, and the position of a generated token is the length of
            each layer's cache. "keep": those of the unpruned sequence, also for generated tokens; a merged token gets
            the position of the last visual token before the cut.
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
    first_cap: float = CAP
    peak: float = PEAK
    recycle: float = RECYCLED
    fixed_slope: float | None = None
    first_score: Literal["equation1", "text", "class", "none"] = "equation1"
    class_token: ClassToken = "own"
    positions: Literal["renumber", "keep"] = "renumber"  # type: ignore[misc]  # a class attribute of other methods

    info = MethodInfo(
        paper="Each Complexity Deserves a Pruning Policy, NeurIPS 2025",
        where="language model, after every layer",
        source="AutoLab-SAI-SJTU/AutoPrune @ e4a9918",
        licence="Apache-2.0",
        batch="any (official code: 1)",
    )
    decode = "cache"
    requires = frozenset({"class token"})
    replays = True

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, LEAST, none=False)
        for name in ("lam", "k0", "gamma", "mi_scale"):
            real(name, getattr(self, name), 0, none=False)
        real("x0", self.x0, 0)
        real("slope_step", self.slope_step, 1e-9)
        real("first_cap", self.first_cap, 1, none=False)
        real("peak", self.peak, 1e-9, 1, none=False)
        real("recycle", self.recycle, 0, 1, none=False)
        real("fixed_slope", self.fixed_slope, 0)
        choice("budget", self.budget, ("after", "before"))
        choice("strict", self.strict, (True, False))
        choice("first_score", self.first_score, ("equation1", "text", "class", "none"))
        choice("class_token", self.class_token, ("own", "received"))
        choice("positions", self.positions, ("renumber", "keep"))
        if not (
            isinstance(self.mask_padding, bool) or hasattr(self.mask_padding, "shape") or _is_mask(self.mask_padding)
        ):
            raise ValueError(f"mask_padding={shown(self.mask_padding)}: must be True, False or a mask, 1 on padding")
        object.__setattr__(self, "decode", "cache" if self.positions == "renumber" else "original")
        if self.class_token == "received" or not self.sees_patches:
            object.__setattr__(self, "requires", frozenset())

    # alpha_CLS of equation (1) -------------------------------------------------------------------------------
    def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
        if not self.sees_patches:
            return {}
        return {feature_layer: [0 if self.class_token == "own" else EVERY]}

    @property
    def sees_patches(self) -> bool:
        return self.first_score in ("equation1", "class")

    def prune_vision(self, view: VisionView) -> None:
        if not self.sees_patches:
            return
        padding = view.padding if self.mask_padding is True else None
        if not isinstance(self.mask_padding, bool):
            padding = view.mask("mask_padding", self.mask_padding)
        cls = view.class_attention()  # (N, T)
        view.patch_values["cls"] = cls if padding is None else cls.masked_fill(padding, 0)

    # attention and cut of each layer -------------------------------------------------------------------------
    def queries(self, layer: int, spans: Spans) -> Positions | None:
        return None if self._idle(layer, spans) else spans.text_positions()

    def _idle(self, layer: int, spans: Spans) -> bool:
        """Return whether a layer needs no attention: it is after layer 1, and the budget keeps every image whole."""
        return layer > 1 and all(n <= self.tokens for n in spans.n_visual)

    def prune(self, layer: int, view: View) -> Cut | None:
        if layer < 0:
            return None
        return self._first_cut(view) if layer == 0 else self._later_cut(layer, view)

    # layer 0: equation (1) -----------------------------------------------------------------------------------
    def _first_cut(self, view: View) -> Cut | None:
        """Keep min(first_cap B, N) tokens by s_v = lam I(V, T) alpha_{t,v} + alpha_{CLS,v}, or by `first_score`."""
        assert view.attention is not None
        view.scratch["weights"] = mean_weights(view.spans.text)  # (B, Q)
        view.scratch["mi0"] = information = self.information(view) / view.spans.text.sum(1).clamp(min=1)  # (B,)
        keep = [self._first_count(n) for n in view.spans.n_visual]
        return None if list(view.spans.n_visual) == keep else view.keep_top(self._first_scores(view, information), keep)

    def _first_count(self, n_visual: int) -> int:
        """Return the number of visual tokens that leave layer 0 for an image of `n_visual` tokens."""
        if self.first_score == "none" or self.tokens >= n_visual:
            return n_visual
        return min(int(self.first_cap * self.tokens), n_visual)

    def _first_scores(self, view: View, information: Tensor) -> Tensor:
        """Return (B, L) scores of equation (1), or the attention of one of its two terms."""
        if self.first_score == "class":
            return view.patch_values("cls")
        assert view.attention is not None
        attention = text_attention(view.attention, view.scratch["weights"], view.kernels)  # (B, L)
        if self.first_score == "text":
            return attention
        return self.lam * information[:, None] * attention + view.patch_values("cls")

    def information(self, view: View) -> Tensor:
        """Return (B,) mutual information I(V, T) in bit, summed over heads; 0 if no text follows the image."""
        assert view.attention is not None
        text = view.spans.text & ~view.visual[:, -view.spans.n_text :]  # its last position may be a visual token
        heads = mutual_information(view.attention, text, view.visual)  # (B, H)
        return torch.nan_to_num(heads.sum(1) * self.mi_scale, posinf=0.0)

    # after layer 1: the slope and the counts of every layer --------------------------------------------------
    def host_values(self, layer: int, view: View) -> Tensor | None:
        """Return (B, 2) after layer 1: the mutual informations I0 and I1. I1 determines the counts of every layer."""
        return torch.stack([view.scratch["mi0"], self.information(view)], 1) if layer == 1 else None

    def decide(self, layer: int, values: list[list[float]], view: View) -> tuple[Schedule, ...]:
        mi0, mi1 = zip(*values, strict=True)
        slopes = [self.slope(i) for i in mi1]
        n_layers = view.spans.n_layers
        plans = [self.schedule_of(k, n, n_layers) for k, n in zip(slopes, view.spans.n_visual, strict=True)]
        view.scratch["stats"] = {"mi0": list(mi0), "mi1": list(mi1), "slope": slopes, "scale": [p.scale for p in plans]}
        return tuple(plans) if self.strict else tuple(p.without_moves() for p in plans)

    def slope(self, information: float) -> float:
        """Return the slope k = max(k0 - gamma I1, 0) of the retention curve, or `fixed_slope`.

        Args:
            information: I1, the mutual information of layer 1.
        """
        if self.fixed_slope is not None:
            return float(self.fixed_slope)
        exact = max(self.k0 - self.gamma * information, 0.0)
        return exact if self.slope_step is None else round(exact / self.slope_step) * self.slope_step

    def midpoint(self, n_layers: int) -> float:
        """Return x0 for a model of `n_layers` layers."""
        if self.x0 is not None:
            return self.x0
        return 14.9 if n_layers in (32, 40) else 14.9 * n_layers / 32

    def schedule_of(self, slope: float, n_visual: int, n_layers: int) -> Schedule:
        """Return the counts of every layer for one image, with the arguments of this instance."""
        first, x0 = self._first_count(n_visual), self.midpoint(n_layers)
        constants = {"first_cap": self.first_cap, "peak": self.peak, "recycle": self.recycle}
        return schedule(slope, self.tokens, n_visual, n_layers, x0, self.budget, first, **constants)

    # layers 1..L-1: keep by text attention, recycle some of the rest -----------------------------------------
    def _later_cut(self, layer: int, view: View) -> Cut | None:
        plans: tuple[Schedule, ...] = view.scratch["decision"]
        keep = [p.keep[layer] for p in plans]
        if keep == [p.leaving[layer - 1] for p in plans]:
            return None
        recycle, clusters = [p.recycle[layer] for p in plans], [p.merged[layer] for p in plans]
        return view.keep_top(self.later_scores(view), keep, recycle, clusters)

    def later_scores(self, view: View) -> Tensor:
        """Return (B, L) attention of the text tokens, mean over heads."""
        assert view.attention is not None
        return text_attention(view.attention, view.scratch["weights"], view.kernels)

    # counts --------------------------------------------------------------------------------------------------
    def plan(self, n_visual: int, n_layers: int) -> list[int] | None:
        """Return the visual tokens entering each layer with a fixed slope; None if the question sets the slope."""
        if self.fixed_slope is None:
            return None
        return self.schedule_of(self.fixed_slope, n_visual, n_layers).entering(n_visual)

    def example(self, n_visual: int, n_layers: int) -> tuple[list[int], list[int], str]:
        """Return the schedule of `fixed_slope`, or that of a question of medium complexity (slope k0 / 2)."""
        fixed = self.fixed_slope
        slope, note = (self.k0 / 2, "the question sets it") if fixed is None else (fixed, "the same for every question")
        plan = self.schedule_of(slope, n_visual, n_layers)
        return plan.entering(n_visual), list(plan.leaving), f"slope {slope:g}; {note}"

    def curves(self, n_visual: int, n_layers: int) -> dict[str, tuple[int, ...]]:
        """Return the schedules of slopes from 0 to k0, the range of all questions; none if the slope is fixed."""
        if self.fixed_slope is not None:
            return {}
        slopes = [self.k0 * i / 4 for i in range(5)]
        return {f"slope {k:g}": self.schedule_of(k, n_visual, n_layers).leaving for k in dict.fromkeys(slopes)}


def mutual_information(attention: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """Compute the mutual information I(V; T) in bit for each head.

    With a the attention of T text tokens on V visual tokens (not renormalised over them), p = a / T and
    p_v = sum_t p: I = sum p log2 max(p / (p_v / T + 1e-6), 1e-6). The 1e-6 is from the official code and not
    negligible. The arithmetic is float32 here, and in the model's dtype in the official code.

    Args:
        attention: (B, H, Q, L) float32.
        text: (B, Q) bool, query positions that are text.
        visual: (B, L) bool.

    Returns:
        (B, H) float32; 0 for a sample without text or without visual tokens, never NaN.
    """
    count = text.sum(1).clamp(min=1)[:, None, None, None]  # (B, 1, 1, 1)
    live = text[:, None, :, None] & visual[:, None, None]  # (B, 1, Q, L)
    joint = torch.nan_to_num(attention.float()).masked_fill_(~live, 0).div_(count)  # in place on a new, large tensor
    marginal = joint.sum(2, keepdim=True)  # (B, H, 1, L)
    ratio = (joint / (marginal / count + 1e-6)).clamp_(min=1e-6)
    return ratio.log2_().mul_(joint).sum((2, 3))


def _is_mask(values: Any) -> bool:
    """Return whether a list holds only 0 and 1, in rows of equal length."""
    if not isinstance(values, (list, tuple)):
        return False
    try:
        table = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return bool(((table == 0) | (table == 1)).all())


# the retention curve and its budget: plain Python on integers and floats ------------------------------------------


def logistic(slope: float, x0: float, n_layers: int, peak: float = PEAK) -> list[float]:
    """Return the retention of layers l = 1..L-1: peak / (1 + exp(k (l - (x0 + k)))), k being the slope."""
    out = []
    for layer in range(1, n_layers):
        power = slope * (layer - (x0 + slope))
        out.append(peak / (1.0 + math.exp(min(power, 700.0))))
    return out


@dataclass(frozen=True)
class Schedule:
    """The token counts of AutoPrune in each layer.

    Attributes:
        keep: tokens kept by score in layers 0..L-1 (layer 0: equation 1).
        recycle: tokens clustered in each layer.
        merged: cluster means appended in each layer.
        leaving: visual tokens leaving each layer, keep + merged.
        scale: the factor on the curve.
        steps: number of cost evaluations of the search.
    """

    keep: tuple[int, ...]
    recycle: tuple[int, ...]
    merged: tuple[int, ...]
    leaving: tuple[int, ...]
    scale: float
    steps: int

    def entering(self, n_visual: int) -> list[int]:
        """Return the visual tokens entering each layer; all `n_visual` enter the first one."""
        return [n_visual, *self.leaving[:-1]]

    def without_moves(self) -> Schedule:
        """Return a schedule without cuts that drop one token and recycle it alone, which only moves it to the end."""
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
    *,
    first_cap: float = CAP,
    peak: float = PEAK,
    recycle: float = RECYCLED,
) -> Schedule:
    """Compute the counts of every layer for one image.

    Source: official code, sections 6 to 9 of the method's specification. The bisection stops once its interval is a
    single float, with the same result as the official 200 steps. The official code skips the search if it estimates
    that the unscaled curve meets the budget, which can miss the budget by several tokens. This estimate is used with
    the official constants only.

    Args:
        slope: k >= 0 of the logistic curve.
        tokens: budget B, the mean over layers of visual tokens leaving ("after") or entering ("before") a layer.
        n_visual: N, visual tokens of the image.
        n_layers: L >= 2.
        x0: midpoint of the curve, before the slope shifts it.
        budget: "after" or "before", which mean `tokens` refers to.
        first: tokens kept by layer 0; default min(int(first_cap B), N).
        first_cap: c >= 1; no layer after the first keeps more than min(int(c B), N) tokens.
        peak: upper end of the curve, in (0, 1].
        recycle: share of the pruned tokens that is clustered, in [0, 1].

    Raises:
        ValueError: for fewer than 2 layers, a budget below min(2, N), or a budget that no curve can meet.
    """
    if n_layers < 2:
        raise ValueError(f"a schedule needs at least 2 layers, got {n_layers}")
    if tokens < min(LEAST, n_visual):
        raise ValueError(f"tokens={tokens}: the budget must be at least {LEAST}")
    cap = min(int(first_cap * tokens), n_visual)
    first = cap if first is None else first
    if tokens >= n_visual:  # nothing to prune: leave the sequence unchanged
        whole, none = (n_visual,) * n_layers, (0,) * n_layers
        return Schedule(whole, none, none, whole, 1.0, 0)
    curve = logistic(slope, x0, n_layers, peak)
    cost = functools.partial(_cost, curve, first, cap, n_visual, budget, recycle)
    least = cost(0.0)
    if least > n_layers * tokens:
        what = "entering" if budget == "before" else "leaving"
        raise ValueError(
            f"tokens={tokens}: the first layers alone bring the average of tokens {what} each of {n_layers} layers to "
            f"{least / n_layers:.1f} for {n_visual} visual tokens; give a larger budget"
            + (" or budget='after'" if budget == "before" else "")
        )
    unscaled = [int(v) for v in (torch.tensor(curve, dtype=torch.float32) * first).tolist()]
    meets = abs(sum(unscaled) + unscaled[-1] - n_layers * tokens) < 1  # an estimate that omits layer 0 and clusters
    official = budget == "after" and (first_cap, peak, recycle) == (CAP, PEAK, RECYCLED) and first <= cap
    factor, steps = (1.0, 0) if official and meets else _search(cost, n_layers * tokens)
    scaled = torch.tensor([factor * r for r in curve], dtype=torch.float32)
    wanted = [int(v) for v in torch.ceil(scaled * torch.tensor(float(first - 1), dtype=torch.float32)).tolist()]
    keep, clustered, merged, leaving = [first], [0], [0], [first]
    for want in wanted:
        m = min(want, cap, leaving[-1])
        q, c = recycled(leaving[-1] - m, recycle)
        keep.append(m)
        clustered.append(q)
        merged.append(c)
        leaving.append(m + c)
    return Schedule(tuple(keep), tuple(clustered), tuple(merged), tuple(leaving), factor, steps)


def _search(cost: Callable[[float], int], goal: int) -> tuple[float, int]:
    """Find the factor on the curve that meets the budget by bisection; return it and the number of cost evaluations."""
    low, high, best, gap = 0.0, 20.0, 1.0, math.inf
    for step in range(1, 201):
        middle = (low + high) / 2
        now = cost(middle)
        if abs(now - goal) < gap:
            best, gap = middle, abs(now - goal)
        if gap < 0.01:
            return best, step
        if (now < goal and middle == low) or (now >= goal and middle == high):
            return best, step  # the interval is one float wide, so later steps cannot change the result
        low, high = (middle, high) if now < goal else (low, middle)
    return best, 200


def _cost(
    curve: list[float], first: int, cap: int, n_visual: int, budget: Budget, recycle: float, factor: float
) -> int:
    """Return the sum over layers of the visual tokens leaving (or entering) them, with `factor` on the curve."""
    n, total = first, first
    last, ceil = 0, math.ceil
    for r in curve:
        m = ceil((first - 1) * (factor * r))
        m = m if m < cap else cap
        m = m if m < n else n
        last = n = m + recycled(n - m, recycle)[1]
        total += n
    return total if budget == "after" else total - last + n_visual
