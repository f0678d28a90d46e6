"""DART: drop visual tokens that duplicate a few pivot tokens of image and text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.counts import full_layers
from ..ops.selection import Cut, assemble, column, descending_order, descending_rank, take, to_device
from ..ops.similarity import wide
from .base import Method, MethodInfo
from .checks import at_most_one, choice, integer
from .registry import register
from .views import View

PIVOTS = 4
"""Number of pivots among the visual tokens, and number of pivots among the text tokens."""
SMALLEST = 1e-8
"""Lower limit of a norm in a cosine, as in torch.cosine_similarity."""


def pivots(norm: Tensor, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Find the visual and the text tokens with the largest key norms.

    Args:
        norm: (B, L), L1 norm of the key of each token.
        visual: (B, L) bool.
        text: (B, L) bool, tokens after the image.

    Returns:
        (B, 8) long, positions: visual pivots by descending norm, then text pivots; (B, 8) bool, False for entries
        without a pivot.
    """
    found = [(descending_order(norm, among)[:, :PIVOTS], among) for among in (visual, text)]
    return torch.cat([p for p, _ in found], 1), torch.cat([among.gather(1, p) for p, among in found], 1)


def least_similar(states: Tensor, order: Tensor, quota: Tensor, free: Tensor) -> Tensor:
    """Let each pivot in turn take the free tokens with the smallest cosine with it, ties by position.

    Args:
        states: (B, L, D) hidden states.
        order: (B, P) long, positions of the pivots in the order of their turns.
        quota: (B, P) long, number of tokens that each pivot takes.
        free: (B, L) bool, the candidates.

    Returns:
        (B, L) bool, the tokens that were taken.
    """
    unit = torch.nn.functional.normalize(states, dim=2, eps=SMALLEST)
    left = free
    for turn in range(order.shape[1]):
        cosine = (unit @ take(unit, order[:, turn : turn + 1]).transpose(1, 2))[..., 0]  # (B, L)
        left = left & (descending_rank(-cosine, left) >= quota[:, turn : turn + 1])
    return free & ~left


def choose(
    states: Tensor, keys: Tensor, visual: Tensor, text: Tensor, keep: Sequence[int], turns: Tensor | None = None
) -> Tensor:
    """Choose the visual tokens that remain: the visual pivots, and the tokens that the pivots take.

    Args:
        states: (B, L, D) hidden states after the model's final norm.
        keys: (B, KV, L, dh) keys with rotary embedding.
        visual: (B, L) bool.
        text: (B, L) bool, tokens after the image.
        keep: number of visual tokens that remain in each sample.
        turns: (B, 8) long, the order in which the pivots (as `pivots` returns them) take tokens; each takes the same
            number, rounded down. None for the order of `pivots`, with numbers that sum to `keep`.

    Returns:
        (B, L) bool, the visual tokens that remain.
    """
    found, there = pivots(keys.abs().sum((1, 3)), visual, text)  # (B, 8)
    own = column([min(PIVOTS, k) for k in keep], found)  # (B, 1) visual pivots
    there[:, :PIVOTS] &= torch.arange(PIVOTS, device=found.device) < own
    chosen = torch.zeros_like(visual).scatter(1, found[:, :PIVOTS], there[:, :PIVOTS])
    rest = column(keep, found) - own
    if turns is None:
        count, turn = there.sum(1, keepdim=True).clamp(min=1), there.cumsum(1) - 1
        quota = (rest // count + (turn < rest % count)) * there
    else:
        found = found.gather(1, turns)
        quota = (rest // (2 * PIVOTS)).expand_as(found)
    return chosen | least_similar(states, found, quota, visual & ~chosen)


def from_start(keys: Tensor, rope: tuple[Tensor, Tensor], valid: Tensor) -> Tensor:
    """Return keys as if the first token of each sample had position 0, as it has in the official code.

    The L1 norm of a key depends on its position, and forward() without position ids counts padding before a prompt.

    Args:
        keys: (B, KV, L, dh) keys with rotary embedding.
        rope: cosine and sine of the rotary embedding, (B or 1, L, dh) each.
        valid: (B, L) bool, False on padding.
    """
    first = valid.to(torch.int8).argmax(1)[:, None, None]  # (B, 1, 1)
    cos, sin = (x.expand(len(keys), -1, -1).gather(1, first.expand(-1, 1, x.shape[2]))[:, None] for x in rope)
    low, high = keys.chunk(2, 3)
    return keys * cos.to(keys) - torch.cat([-high, low], 3) * sin.to(keys)


def set_order(values: Sequence[int]) -> list[int]:
    """Return the indices of integers in the iteration order of a Python set of them."""
    return [values.index(v) for v in list(set(values))]


PRESETS: dict[str, dict[str, Any]] = {f"keep{b}": {"keep": b} for b in (192, 128, 64)}
PRESETS |= {f"official-{b}": {"keep": b, "strict": True} for b in (640, 320, 192, 160, 128, 64)}


@register("dart", presets=PRESETS)
@dataclass(frozen=True)
class DART(Method):
    """After the first 2 layers, keep a few pivots and the visual tokens least similar to them.

    Pivots are the 4 visual and the 4 text tokens (after the image) with the largest L1 norm of their keys in layer
    index `layer` - 1. Each pivot in turn keeps the visual tokens with the smallest cosine with it, computed from the
    layer's output after the model's final norm. No attention is needed. Remaining tokens keep their positions.

    Source: ZichenWen1/DART @ 5a19452. Deviations: exactly `keep` tokens remain, while the official code keeps 4 + 8
    floor(keep / 8); pivots take turns by descending norm, visual ones first, while the official order is that of a
    Python set of positions; norms and cosines are in float32; with fewer than 4 text tokens after the image there are
    fewer pivots; all images of a prompt form one list; a budget of all tokens prunes nothing. `strict` undoes the first
    three and refuses the other cases.

    Presets: "keep192" and so on keep that many tokens after layer 2; "official-128" is the official setting with that
    argument (132 tokens), "official-320" that of LLaVA-NeXT.

    Args:
        tokens: budget, the mean over layers of visual tokens entering. The cut is after layer 2 if the budget allows
            it, else after layer 1. Default 64 if `keep` is not given.
        keep: number of visual tokens after the cut, instead of `tokens`.
        layer: number of layers before the cut (K >= 1), which see all visual tokens.
        strict: use the official counts, order of pivots and dtype; costs one synchronisation with the device.
    """

    tokens: int | None = None
    keep: int | None = None
    layer: int | None = None
    strict: bool = False

    info = MethodInfo(
        paper="Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, EMNLP 2025",
        where="language model, after the first 2 layers (or as `layer` says)",
        source="ZichenWen1/DART @ 5a19452",
        licence="Apache-2.0",
        batch="any (official code: 1)",
    )
    fixes_budget = ("keep",)

    def __post_init__(self) -> None:
        at_most_one(tokens=self.tokens, keep=self.keep)
        for name in ("tokens", "keep", "layer"):
            integer(name, getattr(self, name), 1)
        choice("strict", self.strict, (True, False))
        if self.tokens is None and self.keep is None:
            object.__setattr__(self, "tokens", 64)

    def host_values(self, layer: int, view: View) -> Tensor | None:
        """With `strict`, return unpadded positions of the pivots, number of text tokens, and runs of visual tokens."""
        if not self.strict or self.keep_after(layer, view.spans) is None:
            return None
        found, _ = pivots(_keys(view).abs().sum((1, 3)), view.visual, _text(view))
        rows = (view.valid.cumsum(1) - 1).gather(1, found)  # (B, 8)
        starts = view.visual[:, 1:] & ~view.visual[:, :-1]
        runs = starts.sum(1, keepdim=True) + view.visual[:, :1]
        return torch.cat([rows, _text(view).sum(1, keepdim=True), runs], 1)

    def decide(self, layer: int, values: list[list[int]], view: View) -> tuple[tuple[int, ...], ...]:
        """Return the order in which the pivots take tokens, as indices into the result of `pivots`.

        Raises:
            ValueError: for prompts that the official code does not support.
        """
        for n, (*_, text, runs) in zip(view.spans.n_visual, values, strict=True):
            if n and text < PIVOTS:
                raise ValueError(f"strict=True: {text} tokens after the image; the official code needs {PIVOTS}")
            if n and runs > 1:
                raise ValueError(f"strict=True: {runs} images in a prompt; the official code takes one")
        return tuple(tuple(set_order(rows[: 2 * PIVOTS])) if n else tuple(range(2 * PIVOTS))
                     for n, rows in zip(view.spans.n_visual, values, strict=True))  # fmt: skip

    def prune(self, layer: int, view: View) -> Cut | None:
        keep = self.keep_after(layer, view.spans)
        if keep is None or layer < 0:
            return None
        assert view.final_norm is not None
        states, keys, turns = view.final_norm(view.hidden), _keys(view), None
        if self.strict:
            turns = to_device(view.scratch["decision"], view.visual)
        else:
            states, keys = wide(states), wide(keys)
        kept = choose(states, keys, view.visual, _text(view), keep, turns)
        lengths = [n + k for n, k in zip(view.n_other, keep, strict=True)]
        return assemble(kept, view.visual, view.valid, lengths)

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        if n_visual == 0:
            return [0] * n_layers
        full, keep = self.setting(n_visual, n_layers)
        return [n_visual] * full + [min(keep, n_visual)] * (n_layers - full)

    def setting(self, n_visual: int, n_layers: int) -> tuple[int, int]:
        """Return (K, number of tokens after K layers) for an image.

        Raises:
            ValueError: for a layer that the model does not have, or a budget that cannot be met.
        """
        if self.layer is not None and self.layer >= n_layers:
            raise ValueError(f"layer={self.layer}: this model has {n_layers} layers; give at most {n_layers - 1}")
        if self.keep is not None:
            full, keep = self.layer or (2 if n_layers > 2 else 1), self.keep
        elif self.tokens is not None and self.tokens >= n_visual:
            return self.layer or 1, n_visual
        else:
            assert self.tokens is not None
            full, keep = full_layers(self.tokens, n_visual, n_layers, (2, 1) if self.layer is None else (self.layer,))
        if not self.strict:
            return full, keep
        each = keep // (2 * PIVOTS)
        if 2 * PIVOTS * each > n_visual - PIVOTS:
            raise ValueError(
                f"strict=True: {2 * PIVOTS} pivots cannot take {each} of {n_visual} visual tokens each; give "
                f"a keep below {n_visual - PIVOTS + 2 * PIVOTS - (n_visual - PIVOTS) % (2 * PIVOTS)}"
            )
        return full, PIVOTS + 2 * PIVOTS * each


def _keys(view: View) -> Tensor:
    """Return (B, KV, L, dh) keys of the layer, see `from_start`."""
    assert view.rope is not None
    return from_start(view.keys(), view.rope, view.valid)


def _text(view: View) -> Tensor:
    """Return (B, L) bool, the text tokens after the image."""
    before = torch.zeros_like(view.visual[:, : view.spans.length - view.spans.n_text])
    return torch.cat([before, view.spans.text], 1) & ~view.visual
