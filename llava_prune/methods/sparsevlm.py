"""SparseVLM: words that look at the picture rate its tokens; some of the pruned ones are recycled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..core.budget import recycled
from ..core.checks import at_most_one, choice, real, whole, wholes
from ..core.information import attention_ranks, raters, rotary_ones, strongest_heads, text_attention
from ..core.method import Method
from ..core.registry import register
from ..core.select import keep_best
from ..core.stages import Step, chain, entering, sparse_schedule
from ..core.types import ColumnIndex, Cut, Spans, View

LAYERS = {"1.0": (2, 6, 15, 19), "1.5": (2, 6, 15), "2.0": (2, 6, 15)}
RETAIN: dict[str, dict[int, tuple[int, ...]]] = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
SCALES = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}
"""Version 1.0: (scale, bias) of the released scripts, each tuned on another benchmark (MME, POPE, TextVQA)."""

_PRESETS: dict[str, dict[str, Any]] = {
    **{str(b): {"tokens": b} for b in (192, 128, 96, 64, 288, 144, 58, 640, 320, 160)},
    **{f"plus-{b}": {"tokens": b, "version": "2.0"} for b in (192, 128, 96, 64, 288, 144, 58, 640, 320, 160)},
    **{f"v1-{b}": {"tokens": b, "version": "1.0"} for b in (192, 128, 64)},
}


@register("sparsevlm", presets=_PRESETS)
@dataclass(frozen=True)
class SparseVLM(Method):
    """At a few layers the visual tokens that the raters attend to least go, and some come back as cluster means.

    Raters: text tokens behind the picture whose weight under products of embeddings is above the average (`raters`),
    chosen once. Score at a sparse layer: its attention, mean over heads and raters. Source: Gumpest/SparseVLMs;
    deviations: no random noise on cluster densities, raters and scores in float32, and rows of all text tokens are
    computed (how many rate is known to the device only).

    "1.5": fixed counts, recycling, positions 0..n-1, new tokens after each layer's cache. "2.0" (SparseVLM+): no
    recycling, positions kept, attention divided by its value for vectors of ones under the rotary embedding, and only
    the heads with the most of it from raters to the picture vote. "1.0": the count is scale x rank of the raters'
    attention + bias, read from the device at each of four layers; its scales were tuned per benchmark.

    `tokens` of the official tables (192, 128, 96, 64 on 32 layers and 576 tokens) take those; otherwise counts of the
    nearest table are scaled to the budget (`core.stages.sparse_schedule`). Readings as presets: "192" is version 1.5,
    "plus-192" 2.0, "v1-192" 1.0 with the scripts' scale (tuned on MME; 128 on POPE, 64 on TextVQA).

    Args:
        tokens: budget, the mean over layers of visual tokens *leaving* (the official counter); default 192.
        version: "1.0", "1.5" or "2.0".
        layers: sparse layers, 0-based, in place of the table's.
        retain: tokens kept at each of them, in place of the table's.
        heads: heads that vote in "2.0"; default 14 of 32, the same share of other numbers.
        scale: of the rank in "1.0"; default by `tokens` (192, 128 and 64 only).
        bias: added to it.
    """

    tokens: int | None = None
    version: Literal["1.0", "1.5", "2.0"] = "1.5"
    layers: Sequence[int] | None = None
    retain: Sequence[int] | None = None
    heads: int | None = None
    scale: float | None = None
    bias: float | None = None

    paper = "SparseVLM: Visual Token Sparsification for Efficient VLM Inference, ICML 2025 (arXiv 2410.04417)"
    where = "language model, after the layers of index 2, 6, 15 of 32 (1.0: 19 as well)"
    source = "Gumpest/SparseVLMs @ 26a5f48"
    licence = "Apache-2.0"
    positions = "renumber"
    decode = "cache"
    batch = "any (official code: 1)"
    instead = ("retain", "scale")

    def __post_init__(self) -> None:
        choice("version", self.version, tuple(LAYERS))
        for name in ("layers", "retain"):
            object.__setattr__(self, name, wholes(name, getattr(self, name)))
        for name in ("tokens", "heads"):
            whole(name, getattr(self, name), 1)
        real("scale", self.scale, 0)
        real("bias", self.bias)
        if self.version == "2.0":
            object.__setattr__(self, "positions", "keep")
            object.__setattr__(self, "decode", "original")
        self._check()

    def _check(self) -> None:
        layers = self.layers or LAYERS[self.version]
        if any(b <= a for a, b in zip(layers, layers[1:], strict=False)):
            raise ValueError(f"layers={self.layers}: give them in ascending order")
        ranked = self.version == "1.0"
        if (self.retain is not None and ranked) or (self.scale is not None and not ranked):
            raise ValueError("version '1.0' counts by scale and bias, '1.5' and '2.0' by retain")
        at_most_one(tokens=self.tokens, retain=self.retain, scale=self.scale)
        if ranked and self.scale is None and self.budget not in SCALES:
            raise ValueError(
                f"tokens={self.tokens}: scales of version '1.0' are known for {sorted(SCALES)}; give scale"
            )
        if not ranked and self.retain is None and self.layers is not None:
            raise ValueError("layers need retain, the tokens kept at each of them")
        if self.retain is not None and len(self.retain) != len(layers):
            raise ValueError(f"retain={self.retain}: give one count for each of the layers {layers}")

    @property
    def budget(self) -> int:
        """`tokens`, 192 where it was not given."""
        return 192 if self.tokens is None else self.tokens

    def steps(self, n_visual: int, n_layers: int) -> dict[int, Step]:
        """Layer -> (kept, recycled, clusters) for versions 1.5 and 2.0.

        Raises:
            ValueError: for a layer the model does not have, or a budget nobody can meet.
        """
        if n_visual == 0 or (self.retain is None and self.budget >= n_visual):
            return {}
        tables, layers, merging = RETAIN[self.version], LAYERS[self.version], self.version == "1.5"
        if self.retain is not None:
            return dict(zip(self._layers(n_layers), chain(n_visual, self.retain, merging), strict=True))
        if n_layers == 32 and n_visual == 576 and self.budget in tables:
            return dict(zip(layers, chain(n_visual, tables[self.budget], merging), strict=True))
        nearest = min(tables, key=lambda b: abs(math.log(b * n_visual / (self.budget * 576))))
        return sparse_schedule(self.budget, n_visual, n_layers, layers, tables[nearest], merging)

    def _layers(self, n_layers: int) -> Sequence[int]:
        layers = self.layers or LAYERS[self.version]
        if layers[-1] >= n_layers:
            raise ValueError(f"layers={layers}: this model has {n_layers} layers, 0 to {n_layers - 1}")
        return layers

    def plan(self, n_visual: int, n_layers: int) -> list[int] | None:
        shown = self.example(n_visual, n_layers)
        return None if shown is None else shown[0]

    def example(self, n_visual: int, n_layers: int) -> tuple[list[int], list[int], str] | None:
        if self.version == "1.0":
            return None
        counts = entering(self.steps(n_visual, n_layers), n_visual, n_layers + 1)
        return counts[:-1], counts[1:], ""

    # ---------------------------------------------------------------------------------------------------------
    def _sparse(self, layer: int, spans: Spans) -> bool:
        if self.version == "1.0":
            return layer in self._layers(spans.n_layers)
        return any(layer in self.steps(n, spans.n_layers) for n in spans.n_visual)

    def rows(self, layer: int, spans: Spans) -> ColumnIndex | None:
        return spans.text_rows() if self._sparse(layer, spans) else None

    def cut(self, layer: int, view: View) -> Cut | None:
        if layer < 0:
            view.scratch["raters"] = raters(view.hidden, view.visual, view.spans.text)
            view.scratch["now"] = list(view.spans.n_visual)
            return None
        if view.probs is None or not self._sparse(layer, view.spans):
            return None
        score = self._score(view)
        now: list[int] = view.scratch["now"]
        if self.version == "1.0":
            steps = view.scratch["settled"]
        else:
            tables = [self.steps(n, view.spans.n_layers) for n in view.spans.n_visual]
            steps = [t.get(layer, (n, 0, 0)) for t, n in zip(tables, now, strict=True)]
        keep, pool, clusters = (list(x) for x in zip(*steps, strict=True))
        view.scratch["now"] = [k + c for k, c in zip(keep, clusters, strict=True)]
        return None if keep == now else keep_best(view, score, keep, clusters, pool)

    def _score(self, view: View) -> Tensor:
        """(B, L) attention of the raters."""
        assert view.probs is not None
        voters: Tensor = view.scratch["raters"]  # (B, R)
        if self.version != "2.0":
            return text_attention(view.probs, voters)
        assert view.rope is not None
        scaled = view.probs / rotary_ones(*view.rope, view.spans.text_rows())[:, None]  # (B, H, R, L)
        heads = scaled.shape[1]
        count = max(1, round(14 / 32 * heads)) if self.heads is None else min(self.heads, heads)
        return text_attention(strongest_heads(scaled, voters, view.visual, count), voters)

    def ask(self, layer: int, view: View) -> Tensor | None:
        """Version 1.0: (B,) ranks of the raters' attention in a sparse layer."""
        if self.version != "1.0" or view.probs is None or not self._sparse(layer, view.spans):
            return None
        return attention_ranks(view.probs, view.scratch["raters"], view.visual)

    def settle(self, layer: int, values: list[int], view: View) -> tuple[Step, ...]:
        scale, bias = SCALES[self.budget] if self.scale is None else (self.scale, 0.0)
        bias = bias if self.bias is None else self.bias
        pairs = list(zip(values, view.scratch["now"], strict=True))
        keep = [n if rank == n else max(0, min(int(rank * scale + bias), n - 1)) for rank, n in pairs]
        return tuple((k, *recycled(n - k)) for k, (_, n) in zip(keep, pairs, strict=True))
