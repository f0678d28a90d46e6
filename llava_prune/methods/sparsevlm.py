"""SparseVLM: text tokens that attend to the image rate its tokens, and some of the pruned tokens are recycled.

Three versions share a base class. Version 1.0 determines counts by the rank of the attention. Version 1.5 has fixed
counts and recycles tokens. Version 2.0 (SparseVLM+) has fixed counts, keeps positions and removes the rotary bias from
the attention.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..ops.attention import text_attention
from ..ops.clustering import recycled
from ..ops.selection import Cut, Positions
from .base import Method, MethodInfo
from .checks import at_most_one, choice, integer, integers, real
from .registry import register
from .views import Spans, View

Step = tuple[int, int, int]
"""(kept, recycled, clusters) after one layer."""

_PRESETS: dict[str, dict[str, Any]] = {
    **{f"plus-{b}": {"tokens": b, "version": "2.0"} for b in (192, 128, 96, 64, 288, 144, 58, 640, 320, 160)},
    **{f"v1-{b}": {"tokens": b, "version": "1.0"} for b in (192, 128, 64)},
}


@register("sparsevlm", presets=_PRESETS)
@dataclass(frozen=True)
class SparseVLM(Method):
    """At a few layers, prune the visual tokens that the raters attend to least; some return as cluster means.

    Raters are the text tokens after the image whose weight under products of embeddings is above the average
    (`raters`); they are chosen once. The score at a sparse layer is their attention, mean over heads and raters.
    Source: Gumpest/SparseVLMs. Deviations: cluster densities have no random noise, raters and scores are computed in
    float32, and the attention of all text tokens is computed, since the number of raters is known on the device only.

    The version chooses the class: `SparseVLM(version="2.0")` is a `SparseVLMPlus`.
    "1.5": fixed counts, recycling, positions 0..n-1; the position of a generated token is the length of each layer's
    cache. "2.0" (SparseVLM+): no recycling, positions are kept, attention is divided by its value for vectors of ones
    under the rotary embedding, and only the heads with the most of this attention from raters to the image are used.
    "1.0": the count is scale x rank of the raters' attention + bias, read from the device at each of four layers; the
    official scales were tuned per benchmark.

    If `tokens` is in the official tables (192, 128, 96, 64 for 32 layers and 576 tokens), their counts are used;
    otherwise the counts of the nearest table are scaled to the budget (`sparse_schedule`). Other interpretations are
    presets: "plus-192" is version 2.0; "v1-192" is version 1.0 with the scale of the official scripts (tuned on MME;
    that of 128 on POPE, that of 64 on TextVQA).

    Args:
        tokens: budget, the mean over layers of visual tokens *leaving* (the official counter); default 192.
        version: "1.0", "1.5" or "2.0".
        layers: sparse layers, 0-based, instead of those of the table.
        retain: tokens kept at each sparse layer, instead of those of the table.
        heads: number of heads used in "2.0"; default 14 of 32, the same share of other numbers.
        scale: factor on the rank in "1.0"; default by `tokens` (192, 128 and 64 only).
        bias: number added to the scaled rank in "1.0"; default by `tokens`, or 0 if `scale` is given.
    """

    tokens: int | None = None
    version: Literal["1.0", "1.5", "2.0"] = "1.5"
    layers: Sequence[int] | None = None
    retain: Sequence[int] | None = None
    heads: int | None = None
    scale: float | None = None
    bias: float | None = None

    info = MethodInfo(
        paper="SparseVLM: Visual Token Sparsification for Efficient VLM Inference, ICML 2025 (arXiv 2410.04417)",
        where="language model, after the layers of index 2, 6, 15 of 32 (1.0: 19 as well)",
        source="Gumpest/SparseVLMs @ 26a5f48",
        licence="Apache-2.0",
        batch="any (official code: 1)",
    )
    positions: ClassVar[Literal["keep", "renumber"]] = "renumber"
    decode: ClassVar[Literal["original", "cache"]] = "cache"
    fixes_budget = ("retain", "scale")

    release: ClassVar[Literal["1.0", "1.5", "2.0"]] = "1.5"
    merging: ClassVar[bool] = False
    default_layers: ClassVar[tuple[int, ...]] = (2, 6, 15)
    table: ClassVar[dict[int, tuple[int, ...]]] = {}
    """Tokens kept at the sparse layers by budget, as released."""

    def __new__(cls, tokens: int | None = None, version: str = "1.5", *_: Any, **__: Any) -> SparseVLM:
        versions = {"1.0": SparseVLM1, "1.5": SparseVLM15, "2.0": SparseVLMPlus}
        if cls is SparseVLM:
            version = str(version) if isinstance(version, float) else version  # YAML reads 2.0 as a number
            choice("version", version, tuple(versions))
            cls = versions[version]
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", self.release)
        for name in ("layers", "retain"):
            object.__setattr__(self, name, integers(name, getattr(self, name)))
        for name in ("tokens", "heads"):
            integer(name, getattr(self, name), 1)
        real("scale", self.scale, 0)
        real("bias", self.bias)
        if self.heads is not None and self.release != "2.0":
            raise ValueError(
                f"heads={self.heads}: version {self.release!r} uses all heads; give version '2.0', or leave it out"
            )
        layers = self.layers or self.default_layers
        if any(b <= a for a, b in zip(layers, layers[1:], strict=False)):
            raise ValueError(f"layers={self.layers}: must be in ascending order")
        self.check()

    def check(self) -> None:
        """Check which arguments are given together, for versions with fixed counts.

        Raises:
            ValueError: for arguments that contradict each other.
        """
        if self.scale is not None or self.bias is not None:
            raise ValueError("version '1.0' counts by scale and bias, '1.5' and '2.0' by retain")
        at_most_one(tokens=self.tokens, retain=self.retain)
        layers = self.layers or self.default_layers
        if self.retain is None and self.layers is not None:
            raise ValueError("layers need retain, the tokens kept at each of them")
        if self.retain is not None and len(self.retain) != len(layers):
            raise ValueError(f"retain={self.retain}: give one count for each of the layers {layers}")

    @property
    def budget(self) -> int:
        """`tokens`, or 192 if it is not given."""
        return 192 if self.tokens is None else self.tokens

    # which layers are sparse, and what they keep -------------------------------------------------------------
    def steps(self, n_visual: int, n_layers: int) -> dict[int, Step]:
        """Return layer -> (kept, recycled, clusters) for the versions with fixed counts.

        Raises:
            ValueError: for a layer that the model does not have, or a budget that cannot be met.
        """
        if n_visual == 0 or (self.retain is None and self.budget >= n_visual):
            return {}
        if self.retain is not None:
            return dict(zip(self.sparse_layers(n_layers), chain(n_visual, self.retain, self.merging), strict=True))
        if n_layers == 32 and n_visual == 576 and self.budget in self.table:
            return dict(zip(self.default_layers, chain(n_visual, self.table[self.budget], self.merging), strict=True))
        nearest = min(self.table, key=lambda b: abs(math.log(b * n_visual / (self.budget * 576))))
        return sparse_schedule(self.budget, n_visual, n_layers, self.default_layers, self.table[nearest], self.merging)

    def sparse_layers(self, n_layers: int) -> Sequence[int]:
        """Return the sparse layers of a model.

        Raises:
            ValueError: for a layer that the model does not have.
        """
        layers = self.layers or self.default_layers
        if layers[-1] >= n_layers:
            raise ValueError(f"layers={layers}: this model has {n_layers} layers, 0 to {n_layers - 1}")
        return layers

    def is_sparse(self, layer: int, spans: Spans) -> bool:
        """Return whether any sample drops tokens after `layer`."""
        return any(layer in self.steps(n, spans.n_layers) for n in spans.n_visual)

    def plan(self, n_visual: int, n_layers: int) -> list[int] | None:
        shown = self.example(n_visual, n_layers)
        return None if shown is None else shown[0]

    def example(self, n_visual: int, n_layers: int) -> tuple[list[int], list[int], str] | None:
        counts = entering(self.steps(n_visual, n_layers), n_visual, n_layers + 1)
        return counts[:-1], counts[1:], ""

    # requests ------------------------------------------------------------------------------------------------
    def queries(self, layer: int, spans: Spans) -> Positions | None:
        return spans.text_positions() if self.is_sparse(layer, spans) else None

    def prune(self, layer: int, view: View) -> Cut | None:
        if layer < 0:
            view.scratch["raters"] = raters(view.hidden, view.visual, view.spans.text)
            view.scratch["now"] = list(view.spans.n_visual)
            return None
        if view.attention is None or not self.is_sparse(layer, view.spans):
            return None
        now: list[int] = view.scratch["now"]
        keep, recycle, clusters = (list(x) for x in zip(*self.request_steps(layer, view, now), strict=True))
        view.scratch["now"] = [k + c for k, c in zip(keep, clusters, strict=True)]
        return None if keep == now else view.keep_top(self.scores(view), keep, recycle, clusters)

    def request_steps(self, layer: int, view: View, now: list[int]) -> Sequence[Step]:
        """Return (kept, recycled, clusters) of each sample; `now` are their current numbers of visual tokens."""
        tables = [self.steps(n, view.spans.n_layers) for n in view.spans.n_visual]
        return [t.get(layer, (n, 0, 0)) for t, n in zip(tables, now, strict=True)]

    def scores(self, view: View) -> Tensor:
        """Return (B, L) attention of the raters, mean over heads."""
        assert view.attention is not None
        return text_attention(view.attention, view.scratch["raters"], view.kernels)


_parameters = list(inspect.signature(SparseVLM.__init__).parameters.values())
SparseVLM.__signature__ = inspect.Signature(_parameters[1:])  # type: ignore[attr-defined]  # of __init__, not __new__


class SparseVLM15(SparseVLM):
    """Version 1.5: fixed counts and recycling."""

    merging = True
    table = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}


class SparseVLMPlus(SparseVLM):
    """Version 2.0, SparseVLM+: fixed counts, no recycling, positions kept, attention without the rotary bias."""

    release = "2.0"
    positions = "keep"
    decode = "original"
    table = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}

    def scores(self, view: View) -> Tensor:
        assert view.attention is not None and view.rope is not None
        voters: Tensor = view.scratch["raters"]  # (B, Q)
        scaled = view.attention / rotary_ones(*view.rope, view.spans.text_positions())[:, None]  # (B, H, Q, L)
        heads = scaled.shape[1]
        count = max(1, round(14 / 32 * heads)) if self.heads is None else min(self.heads, heads)
        return text_attention(strongest_heads(scaled, voters, view.visual, count), voters, view.kernels)


class SparseVLM1(SparseVLM):
    """Version 1.0: the count follows from the rank of the raters' attention."""

    release = "1.0"
    default_layers = (2, 6, 15, 19)
    scales: ClassVar[dict[int, tuple[float, float]]] = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}
    """(scale, bias) of the released scripts by budget, each tuned on another benchmark (MME, POPE, TextVQA)."""

    def check(self) -> None:
        if self.retain is not None:
            raise ValueError("version '1.0' counts by scale and bias, '1.5' and '2.0' by retain")
        at_most_one(tokens=self.tokens, scale=self.scale)
        if self.scale is None and self.budget not in self.scales:
            known = ", ".join(map(str, sorted(self.scales)))
            raise ValueError(f"tokens={self.tokens}: scales of version '1.0' are known for {known}; give scale")

    def is_sparse(self, layer: int, spans: Spans) -> bool:
        return layer in self.sparse_layers(spans.n_layers)

    def example(self, n_visual: int, n_layers: int) -> None:
        return None

    def host_values(self, layer: int, view: View) -> Tensor | None:
        """Return (B,) ranks of the raters' attention in a sparse layer."""
        if view.attention is None or not self.is_sparse(layer, view.spans):
            return None
        return attention_ranks(view.attention, view.scratch["raters"], view.visual)

    def decide(self, layer: int, values: list[int], view: View) -> tuple[Step, ...]:
        scale, bias = self.scales[self.budget] if self.scale is None else (self.scale, 0.0)
        bias = bias if self.bias is None else self.bias
        pairs = list(zip(values, view.scratch["now"], strict=True))
        keep = [n if rank == n else max(0, min(int(rank * scale + bias), n - 1)) for rank, n in pairs]
        return tuple((k, *recycled(n - k)) for k, (_, n) in zip(keep, pairs, strict=True))

    def request_steps(self, layer: int, view: View, now: list[int]) -> Sequence[Step]:
        steps: Sequence[Step] = view.scratch["decision"]
        return steps


# raters and scores ------------------------------------------------------------------------------------------------


def raters(hidden: Tensor, visual: Tensor, text: Tensor) -> Tensor:
    """Choose the text tokens that rate the visual tokens.

    Args:
        hidden: (B, L, D) embeddings.
        visual: (B, L) bool.
        text: (B, Q) bool, text tokens among the last Q positions.

    Returns:
        (B, Q) bool: text tokens with a weight above the average; all of `text` if there are none.
    """
    states = hidden.float()
    product = states @ states[:, -text.shape[1] :].transpose(1, 2)  # (B, L, Q)
    share = product.masked_fill(~text[:, None], torch.finfo(product.dtype).min).softmax(2)
    image = visual.to(share.dtype)
    weight = (share * image[..., None]).sum(1) / image.sum(1, keepdim=True).clamp(min=1)  # (B, Q)
    average = weight.masked_fill(~text, 0).sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
    chosen = text & (weight > average)
    return torch.where(chosen.any(1, keepdim=True), chosen, text)


def strongest_heads(attention: Tensor, text: Tensor, visual: Tensor, count: int) -> Tensor:
    """Select the `count` heads with the largest attention summed over text and visual tokens.

    Args:
        attention: (B, H, Q, L).
        text: (B, Q) bool.
        visual: (B, L) bool.
        count: number of heads to select.

    Returns:
        (B, count, Q, L).
    """
    live = text[:, None, :, None] & visual[:, None, None]
    chosen = attention.masked_fill(~live, 0).sum((2, 3)).topk(count, dim=1).indices  # (B, count)
    return attention.gather(1, chosen[..., None, None].expand(-1, -1, *attention.shape[2:]))


def rotary_ones(cos: Tensor, sin: Tensor, queries: Positions) -> Tensor:
    """Return (B or 1, Q, L): 2 / sqrt(d) sum_k cos((p_i - p_j) theta_k), scaled products of rotated vectors of ones."""
    half = cos.shape[-1] // 2
    parts = cos[..., :half] - sin[..., :half], cos[..., half:] + sin[..., half:]
    rotated = torch.cat(parts, -1).float()  # (B or 1, L, dh)
    return rotated[:, queries] @ rotated.transpose(1, 2) / cos.shape[-1] ** 0.5


def attention_ranks(attention: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """Return (B,) rank of each sample's (text x visual tokens) attention matrix, mean over heads.

    Args:
        attention: (B, H, Q, L) float32.
        text: (B, Q) bool.
        visual: (B, L) bool.
    """
    matrix = attention.mean(1).masked_fill(~(text[:, :, None] & visual[:, None]), 0)  # (B, Q, L)
    size = torch.maximum(text.sum(1), visual.sum(1)).float()  # torch's default tolerance, of the matrix without zeros
    return torch.linalg.matrix_rank(matrix, rtol=size * torch.finfo(matrix.dtype).eps)


# counts -----------------------------------------------------------------------------------------------------------


def chain(n_visual: int, retain: Sequence[int], merging: bool) -> list[Step]:
    """Compute the counts of consecutive sparse layers; each keeps at least one token fewer than enter it.

    Args:
        n_visual: visual tokens that enter the first sparse layer.
        retain: tokens to keep at each sparse layer.
        merging: whether pruned tokens are recycled.

    Returns:
        (kept, recycled, clusters) for each sparse layer; kept + clusters tokens leave it.
    """
    steps, now = [], n_visual
    for want in retain:
        keep = max(0, min(want, now - 1))
        pool, clusters = recycled(now - keep) if merging else (0, 0)
        steps.append((keep, pool, clusters))
        now = keep + clusters
    return steps


@functools.lru_cache(maxsize=512)
def sparse_schedule(
    tokens: int, n_visual: int, n_layers: int, layers: tuple[int, ...], shape: tuple[int, ...], merging: bool
) -> dict[int, Step]:
    """Compute sparse layers and their counts for an average of `tokens` leaving the layers, for any depth and image.

    `layers` (0-based, of 32) are scaled to the depth: "after 3, 7 and 16 of 32 layers" becomes the same shares of other
    depths. The counts of `shape` are multiplied by the factor that brings the average nearest to the budget. If the
    layers before the first sparse layer alone exceed the budget, the first sparse layer moves forward.

    Raises:
        ValueError: if no factor comes within 5 % of the budget.
    """
    wanted = [max(1, round((x + 1) * n_layers / 32)) - 1 for x in layers]
    for first in range(wanted[0], -1, -1):
        places = [first]
        for x in wanted[1:]:
            places.append(max(places[-1] + 1, x))
        if places[-1] >= n_layers:
            break
        gap, steps = _fit(tokens, n_visual, n_layers, places, shape, merging)
        if gap <= max(0.5, 0.05 * tokens):
            return dict(zip(places, steps, strict=True))
    raise ValueError(
        f"tokens={tokens}: {len(layers)} sparse layers on {n_layers} layers cannot bring {n_visual} visual tokens to "
        "that average; give layers and retain, or another budget"
    )


def _fit(
    tokens: int, n_visual: int, n_layers: int, layers: Sequence[int], shape: Sequence[int], merging: bool
) -> tuple[float, list[Step]]:
    """Find a factor on `shape` by bisection; return the distance of the average from the budget, and the counts."""
    low, high = 0.0, n_visual / min(shape)
    best: tuple[float, list[Step]] = (math.inf, [])
    for _ in range(40):
        factor = (low + high) / 2
        steps = chain(n_visual, [max(1, round(factor * k)) for k in shape], merging)
        leaving = entering(dict(zip(layers, steps, strict=True)), n_visual, n_layers + 1)[1:]
        average = sum(leaving) / n_layers
        if abs(average - tokens) < best[0]:
            best = abs(average - tokens), steps
        low, high = (factor, high) if average < tokens else (low, factor)
    return best


def entering(steps: Mapping[int, Step], n_visual: int, n_layers: int) -> list[int]:
    """Return the visual tokens entering each layer, for steps after layers 0..n_layers - 2."""
    counts = [n_visual]
    for layer in range(n_layers - 1):
        keep, _, clusters = steps.get(layer, (counts[-1], 0, 0))
        counts.append(keep + clusters)
    return counts
