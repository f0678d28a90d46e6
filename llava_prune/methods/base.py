"""Base classes of the pruning methods."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..ops.merging import Merge
from ..ops.selection import Cut, Positions, arranged, per_sample, take
from .checks import shown
from .views import Spans, View, VisionCut, VisionView

Requirement = Literal["class token", "whole images", "patch positions"]


@dataclass(frozen=True)
class MethodInfo:
    """Facts about a method for tables and documents (`llava-prune methods`); nothing else reads them.

    Attributes:
        paper: full reference.
        where: where the method prunes, e.g. "language model, after layers 8, 16, 24 of 32".
        source: repository and commit of the official code, or the source that was used instead.
        licence: the licence of the official code, not of this package.
        backends: attention implementations that the method works with.
        batch: limits on batches and images; "any" if there are none.
    """

    paper: str = ""
    where: str = ""
    source: str = ""
    licence: str = ""
    backends: str = "eager, sdpa, flash"
    batch: str = "any"


class Method:
    """Base class of a pruning method.

    A subclass overrides the hooks that it needs. It never changes masks, positions, caches or modules itself. Most
    methods override two hooks: `queries` and `prune` inside the language model, or `vision_queries` and `prune_vision`
    before it. `ScoreMethod` implements these hooks for methods that consist of a score and a schedule.

    Class attributes:
        name: set by `register`.
        info: see MethodInfo.
        positions: position ids after a cut: "keep" keeps those of the remaining tokens, "renumber" makes them 0..n-1.
        decode: position of a generated token: "original" is its position in the unpruned sequence, "cache" the length
            of each layer's own cache. An instance may differ from its class in these two and in `requires`.
        vision_positions: overrides `positions` for a `VisionCut`; None for the same rule. With "renumber" the shorter
            sequence counts as the prompt, also for generated tokens.
        requires: what the model must provide; `attach` refuses models without it. "class token": a vision tower with a
            class token; "whole images": images that are not split into crops; "patch positions": the patch of every
            visual token, which merged tokens do not have.
        fixes_budget: arguments that fix the token counts instead of `tokens`. A run that sets one of them has no
            budget.
        makes_tokens: whether its `VisionCut` contains tokens that stand for no patch.
        entry: in a composition, the first method if it is an `EntryMethod`.
        replays: whether a cut consists of device operations only, given the result of `decide`, so that a captured
            prefill can be replayed for another request (experimental).
    """

    name: ClassVar[str] = ""
    info: ClassVar[MethodInfo] = MethodInfo()
    positions: ClassVar[Literal["keep", "renumber"]] = "keep"
    decode: ClassVar[Literal["original", "cache"]] = "original"
    vision_positions: ClassVar[Literal["keep", "renumber"] | None] = None
    requires: ClassVar[frozenset[Requirement]] = frozenset()
    fixes_budget: ClassVar[tuple[str, ...]] = ()
    makes_tokens: ClassVar[bool] = False
    replays: ClassVar[bool] = False
    entry: EntryMethod | None = None

    # the vision tower ----------------------------------------------------------------------------------------
    def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
        """Return the attention to record in the vision tower: {block: query positions}; position 0 is the class token.

        [views.EVERY] asks for the mean over all query positions.

        Args:
            feature_layer: 0-based block whose output is the feature map.
        """
        return {}

    def merge_schedule(self, feature_layer: int, n_patches: int) -> tuple[int, ...]:
        """Return the number of tokens to merge away in each of the tower's blocks 0..feature_layer.

        An empty tuple leaves the tower unchanged.
        """
        return ()

    def merge(self, keys: Tensor, count: int) -> Merge:
        """Choose `count` tokens of a tower block to merge into others, between its attention and its MLP.

        Args:
            keys: (N, H, t, dh) keys of the block; the class token comes first.
            count: number of tokens to merge away.
        """
        raise TypeError(f"{self!r} merges in the vision tower and must define merge()")

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        """Return the tokens that replace the patches, or None to keep every patch.

        Called once for the images of a request, before the projector.
        """
        return None

    @property
    def sees_patches(self) -> bool:
        """Whether the method needs `prune_vision` and the hooks on the tower; otherwise it runs on any tower."""
        return prunes_before(type(self))

    # the language model --------------------------------------------------------------------------------------
    def queries(self, layer: int, spans: Spans) -> Positions | None:
        """Return the query positions whose attention in `layer` is needed by `prune`: a slice or (Q,) long, or None."""
        return None

    def needs_mlp_input(self, layer: int, spans: Spans) -> bool:
        """Return whether `prune` needs `View.mlp_input` of `layer`."""
        return False

    def host_values(self, layer: int, view: View) -> Tensor | None:
        """Return the values that the host needs before `prune` of this layer, or None (the default).

        Each tensor costs one synchronisation with the device.
        """
        return None

    def decide(self, layer: int, values: list[Any], view: View) -> Hashable:
        """Return the decision that follows from the values of `host_values`, which are given as nested lists.

        The result is stored in `view.scratch["decision"]`. Host code of this and later cuts must depend on this result
        and not on the values themselves.
        """
        raise TypeError(f"{self!r} asks for host values and must define decide()")

    def prune(self, layer: int, view: View) -> Cut | None:
        """Return the tokens that remain after `layer`, or None to keep every token.

        Called after each decoder layer, and with layer -1 before the first one.
        """
        return None

    # counts --------------------------------------------------------------------------------------------------
    def plan(self, n_visual: int, n_layers: int) -> list[int] | None:
        """Return the number of visual tokens entering each layer for one image, or None if it depends on the data."""
        return None

    def example(self, n_visual: int, n_layers: int) -> tuple[list[int], list[int], str] | None:
        """Return example counts for tables: visual tokens entering and leaving each layer, and a note.

        The default is the result of `plan` with an empty note. A method whose counts depend on the data may return a
        typical case and name it in the note. None if there is no example.
        """
        plan = self._checked_plan(n_visual, n_layers)
        return None if plan is None else (plan, [*plan[1:], *plan[-1:]], "")

    def curves(self, n_visual: int, n_layers: int) -> dict[str, tuple[int, ...]]:
        """Return label -> visual tokens leaving each layer for other questions, for methods whose counts vary."""
        return {}

    def keep_after(self, layer: int, spans: Spans) -> list[int] | None:
        """Return the number of visual tokens of each sample that `plan` keeps after `layer` (-1: before the first).

        Returns:
            One count for each sample, or None if the layer drops nothing or is the last one.

        Raises:
            ValueError: for a plan that is not possible.
        """
        made = {n: self._checked_plan(n, spans.n_layers) for n in set(spans.n_visual)}
        plans = [made[n] for n in spans.n_visual]
        if layer + 1 >= spans.n_layers or any(p is None for p in plans):
            return None
        pairs = zip(plans, spans.n_visual, strict=True)
        now = [n if layer < 0 else p[layer] for p, n in pairs if p is not None]
        after = [p[layer + 1] for p in plans if p is not None]
        return None if after == now else after

    def _checked_plan(self, n_visual: int, n_layers: int) -> list[int] | None:
        """Return `plan`. Raise for counts that are not integers or that grow, with which a cut would lose text."""
        plan = self.plan(n_visual, n_layers)
        if plan is None:
            return None
        counts = list(plan) if isinstance(plan, Iterable) else []
        whole = len(counts) == n_layers and all(isinstance(n, Integral) for n in counts)
        if not whole or any(low > high for high, low in pairwise([n_visual, *counts, 0])):
            raise ValueError(
                f"{self!r}: plan({n_visual}, {n_layers}) is {shown(plan)}; must be {n_layers} integers, the visual "
                f"tokens entering each layer: at most {n_visual} at first, then never more than in the layer before"
            )
        return counts

    def hyper(self) -> dict[str, Any]:
        """Return the hyper-parameters of this instance by argument name."""
        return {p: getattr(self, p) for p in inspect.signature(type(self)).parameters if hasattr(self, p)}

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.hyper().items())
        return f"{self.name or type(self).__name__}({inner})"


class ScoreMethod(Method):
    """Base class of methods that keep the tokens with the highest scores, as many as `plan` says.

    To prune inside the language model, define `scores`, and `queries` if it needs other attention than that of the last
    prompt token. To prune before the language model, define `vision_scores`; each image or crop then keeps its share of
    `tokens`. `plan` is the schedule in both cases.
    """

    def scores(self, layer: int, view: View) -> Tensor:
        """Return (B, L) float scores; the visual tokens with the highest scores remain, ties by position."""
        raise TypeError(f"{self!r} must define scores() or vision_scores()")

    def vision_scores(self, view: VisionView) -> Tensor:
        """Return (N, T) float scores; the patches with the highest scores remain, ties by index."""
        raise TypeError(f"{self!r} must define scores() or vision_scores()")

    def queries(self, layer: int, spans: Spans) -> Positions | None:
        return None if self._idle(layer, spans) else spans.last_position()

    def _idle(self, layer: int, spans: Spans) -> bool:
        """Return whether nothing is scored after `layer`."""
        return type(self).scores is ScoreMethod.scores or self.keep_after(layer, spans) is None

    def prune(self, layer: int, view: View) -> Cut | None:
        if type(self).scores is ScoreMethod.scores:
            return None
        keep = self.keep_after(layer, view.spans)
        return None if keep is None else view.keep_top(self.scores(layer, view), keep)

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        if type(self).vision_scores is ScoreMethod.vision_scores:
            return None
        keep = view.tokens_per_crop(getattr(self, "tokens"))  # noqa: B009 - a field of the subclass
        return None if keep >= view.features.shape[1] else view.keep_top(self.vision_scores(view), keep)


class EntryMethod(Method):
    """Base class of methods that choose among the projected visual tokens before the first layer.

    A subclass defines `choose` and `plan`. All visual tokens of a prompt form one list, including the newline tokens of
    images in crops. In a composition, such a method comes first.
    """

    positions = "renumber"
    decode = "cache"

    def choose(self, view: View, tokens: Tensor, real: Tensor, keep: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Choose the tokens that remain, in output order.

        Args:
            view: the request before the first layer.
            tokens: (B, V, D) visual tokens of each sample.
            real: (B, V) bool, False on ragged padding.
            keep: number of tokens that remain in each sample, at most V.

        Returns:
            (B, K) long with K = max(keep), indices into the V tokens followed by C new ones, of which the first keep[b]
            are real; (B, C, D) new tokens, or None.
        """
        raise TypeError(f"{self!r} must define choose()")

    def prune(self, layer: int, view: View) -> Cut | None:
        keep = self.keep_after(layer, view.spans) if layer < 0 else None
        if keep is None:
            return None
        places, real = view.visual_tokens()
        order, merged = self.choose(view, take(view.hidden, places), real, keep)
        everything = [k == n for k, n in zip(keep, view.spans.n_visual, strict=True)]
        if any(everything):  # these samples keep the order that they would have alone
            whole = torch.tensor(everything)[:, None].to(order.device, non_blocking=True)
            order = torch.where(whole, torch.arange(order.shape[1], device=order.device), order)
        lengths = [n + k for n, k in zip(view.n_other, keep, strict=True)]
        return arranged(order, keep, places, view.visual, view.valid, lengths, merged)


def in_raster_order(order: Tensor, keep: Sequence[int]) -> Tensor:
    """Return (B, K) `order` with its first keep[b] entries sorted."""
    real = torch.arange(order.shape[1], device=order.device) < per_sample(keep, order)
    return torch.where(real, order, torch.iinfo(order.dtype).max).sort(dim=1).values.where(real, order)


def check_complete(method: Method) -> None:
    """Refuse a ScoreMethod that lacks its score or its schedule, and would keep every token.

    Raises:
        ValueError: with the function to define.
    """
    cls = type(method)
    if not isinstance(method, ScoreMethod):
        return
    if not prunes_inside(cls) and not prunes_before(cls):
        raise ValueError(f"{method!r} keeps every token: define scores() or vision_scores()")
    if prunes_inside(cls) and cls.plan is Method.plan and cls.keep_after is Method.keep_after:
        raise ValueError(f"{method!r} keeps every token: define plan(), the visual tokens entering each layer")


def prunes_inside(cls: type[Method]) -> bool:
    """Return whether a method drops tokens inside the language model, including its entry (layer -1)."""
    if issubclass(cls, ScoreMethod) and cls.prune is ScoreMethod.prune:
        return cls.scores is not ScoreMethod.scores
    return cls.prune is not Method.prune


def prunes_before(cls: type[Method]) -> bool:
    """Return whether a method reads, merges or drops patches before the language model."""
    if issubclass(cls, ScoreMethod) and cls.prune_vision is ScoreMethod.prune_vision:
        return cls.vision_scores is not ScoreMethod.vision_scores
    return cls.prune_vision is not Method.prune_vision or cls.merge_schedule is not Method.merge_schedule
