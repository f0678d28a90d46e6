"""The base class of every pruning method."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from typing import Any, ClassVar, Literal

from torch import Tensor

from .types import ColumnIndex, Cut, Fold, Spans, View, VisionCut, VisionView


class Method:
    """One paper. Override the hooks it needs; a method never touches masks, positions, caches or modules.

    Class attributes:
        name: set by `register`.
        paper: full reference.
        positions: "keep" leaves surviving tokens their position ids, "renumber" makes them 0..n-1 after a cut.
        decode: "original" gives a generated token the position it has in the unpruned sequence, "cache" the
            length of each layer's own cache.
        vision_positions: what `positions` means for a `VisionCut`, where that differs. With "renumber" the shorter
            sequence counts as the prompt, also for generated tokens.
        anyres: whether the method can work on pictures that come in crops (LLaVA-NeXT).
        new_rows: whether its `VisionCut` has rows that stand for no patch.
        needs_patches: whether `cut` needs the patch behind each visual token, so that it cannot follow such a method.
        replays: whether its cuts are operations of the device alone, but for what `settle` says, so that a captured
            prefill can be replayed for another request (`attach(..., graphs=True)`).

    Class attributes that only tables and documents read (`llava-prune methods`):
        where: the place it prunes, e.g. "language model, after layers 8, 16, 24 of 32".
        source: repository and commit of the official code, or what stands in for it.
        licence: of that code (not of ours).
        backends: attention implementations it works with.
        batch: limits on batches and pictures; "any" where there are none.
        instead: arguments that fix the counts in place of `tokens`. A run that gives one of them gives no budget.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    where: ClassVar[str] = ""
    source: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    backends: ClassVar[str] = "eager, sdpa, flash"
    batch: ClassVar[str] = "any"
    instead: ClassVar[tuple[str, ...]] = ()
    positions: ClassVar[Literal["keep", "renumber"]] = "keep"
    decode: ClassVar[Literal["original", "cache"]] = "original"
    vision_positions: ClassVar[Literal["keep", "renumber"] | None] = None
    anyres: ClassVar[bool] = True
    new_rows: ClassVar[bool] = False
    needs_patches: ClassVar[bool] = False
    replays: ClassVar[bool] = False

    def vision_rows(self, feature_layer: int) -> dict[int, list[int]]:
        """Attention rows to record in the vision tower, {block: query rows}, row 0 being the class token.

        Args:
            feature_layer: 0-based block whose output is the feature map.
        """
        return {}

    def tower(self, feature_layer: int, n_patches: int) -> tuple[int, ...]:
        """Tokens to merge away in each of the tower's blocks 0..feature_layer; () leaves the tower alone."""
        return ()

    def fold(self, keys: Tensor, count: int) -> Fold:
        """Choose `count` tokens of a tower block that join others, after its attention and before its MLP.

        Args:
            keys: (N, H, t, dh) keys of the block, the class token's first.
        """
        raise TypeError(f"{self!r} merges in the tower and must say which tokens")

    def reduce(self, view: VisionView) -> VisionCut | None:
        """Asked once for the pictures of a request, before the projector. None leaves them alone."""
        return None

    def rows(self, layer: int, spans: Spans) -> ColumnIndex | None:
        """Columns whose attention in `layer` `cut` wants to see, a slice or (R,) long; None for none."""
        return None

    def middle(self, layer: int, spans: Spans) -> bool:
        """Whether `cut` wants `View.middle` of `layer`."""
        return False

    def ask(self, layer: int, view: View) -> Tensor | None:
        """What the host must know of the device before `cut` of this layer; None for nothing, as a rule.

        Each tensor is one wait for the device. A method that reads nowhere else can be replayed, see `replays`.
        """
        return None

    def settle(self, layer: int, values: list[Any], view: View) -> Hashable:
        """What follows from the values of `ask`, as nested lists. Kept in `view.scratch["settled"]`.

        What this and later cuts do on the host must follow from the answer, not from the values themselves.
        """
        raise TypeError(f"{self!r} asks for values and must say what follows from them")

    def cut(self, layer: int, view: View) -> Cut | None:
        """Asked after each decoder layer, and with layer -1 before the first. None leaves the sequence alone."""
        return None

    def plan(self, n_visual: int, n_layers: int) -> list[int] | None:
        """Visual tokens entering each layer for one picture, or None where the data decide."""
        return None

    def example(self, n_visual: int, n_layers: int) -> tuple[list[int], list[int], str] | None:
        """Visual tokens entering and leaving each layer, and what that assumes; for tables.

        By default what `plan` says, assuming nothing. A method whose data decide may give a typical case and say
        which; None where there is nothing to show.
        """
        plan = self.plan(n_visual, n_layers)
        return None if plan is None else (plan, [*plan[1:], *plan[-1:]], "")

    def keep_after(self, layer: int, spans: Spans) -> list[int] | None:
        """Visual tokens of each sample that `plan` lets through after `layer` (-1: before the first).

        Returns:
            One count a sample, or None when the layer drops nothing (and after the last layer).
        """
        plans = [self.plan(n, spans.n_layers) for n in spans.n_visual]
        if layer + 1 >= spans.n_layers or any(p is None for p in plans):
            return None
        pairs = zip(plans, spans.n_visual, strict=True)
        now = [n if layer < 0 else p[layer] for p, n in pairs if p is not None]
        after = [p[layer + 1] for p in plans if p is not None]
        return None if after == now else after

    def hyper(self) -> dict[str, Any]:
        """The hyper-parameters of this instance by argument name."""
        return {p: getattr(self, p) for p in inspect.signature(type(self)).parameters if hasattr(self, p)}

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.hyper().items())
        return f"{self.name or type(self).__name__}({inner})"
