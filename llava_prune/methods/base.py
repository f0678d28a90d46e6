"""The base classes of every pruning method."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..ops.merging import Merge
from ..ops.selection import Cut, Positions, arranged, per_sample, take
from .views import Spans, View, VisionCut, VisionView

Requirement = Literal["class token", "whole images", "patch positions"]


@dataclass(frozen=True)
class MethodInfo:
    """What tables and documents say of a method (`llava-prune methods`); nothing else reads it.

    Attributes:
        paper: full reference.
        where: the place it prunes, e.g. "language model, after layers 8, 16, 24 of 32".
        source: repository and commit of the official code, or what replaces it.
        licence: of that code, not of ours.
        backends: attention implementations it works with.
        batch: limits on batches and images; "any" where there are none.
    """

    paper: str = ""
    where: str = ""
    source: str = ""
    licence: str = ""
    backends: str = "eager, sdpa, flash"
    batch: str = "any"


class Method:
    """One paper. Override the hooks it needs; a method never touches masks, positions, caches or modules.

    Most papers override two hooks: `queries` and `prune` inside the language model, or `vision_queries` and
    `prune_vision` before it. `ScoreMethod` writes these for a method that is a score and a schedule.

    Class attributes:
        name: set by `register`.
        info: see MethodInfo.
        positions: "keep" leaves remaining tokens their position ids, "renumber" makes them 0..n-1 after a cut.
        decode: "original" gives a generated token the position it has in the unpruned sequence, "cache" the
            length of each layer's own cache. An instance may differ from its class in these two and in `requires`.
        vision_positions: what `positions` means for a `VisionCut`, where that differs. With "renumber" the shorter
            sequence counts as the prompt, also for generated tokens.
        requires: what the model must provide; `attach` refuses models without it. "class token": a vision tower with a
            class token, "whole images": images that are not cut into crops, "patch positions": the patch of every
            visual token, which merged tokens do not have.
        fixes_budget: arguments that fix the counts in place of `tokens`. A run that sets one of them has no budget.
        makes_tokens: whether its `VisionCut` has tokens that stand for no patch.
        entry: in a composition, a first method that cuts at the entry of the language model.
        replays: whether cuts are operations on the device alone, given what `decide` returned, so that a captured
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
        """Attention to record in the vision tower: {block: query positions}, position 0 being the class token.

        [views.EVERY] asks for the mean over all query positions.

        Args:
            feature_layer: 0-based block whose output is the feature map.
        """
        return {}

    def merge_schedule(self, feature_layer: int, n_patches: int) -> tuple[int, ...]:
        """Tokens to merge away in each of the tower's blocks 0..feature_layer; () leaves the tower unchanged."""
        return ()

    def merge(self, keys: Tensor, count: int) -> Merge:
        """Choose `count` tokens of a tower block to merge into others, after its attention and before its MLP.

        Args:
            keys: (N, H, t, dh) keys of the block, the class token's first.
        """
        raise TypeError(f"{self!r} merges in the vision tower and must define merge()")

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        """Called once for the images of a request, before the projector. None keeps every patch."""
        return None

    @property
    def sees_patches(self) -> bool:
        """Whether `prune_vision` and the hooks on the tower are needed; a method without them runs on any tower."""
        return prunes_before(type(self))

    # the language model --------------------------------------------------------------------------------------
    def queries(self, layer: int, spans: Spans) -> Positions | None:
        """Positions whose attention in `layer` `prune` needs: a slice or (Q,) long; None for none."""
        return None

    def needs_mlp_input(self, layer: int, spans: Spans) -> bool:
        """Whether `prune` needs `View.mlp_input` of `layer`."""
        return False

    def host_values(self, layer: int, view: View) -> Tensor | None:
        """What the host must know before `prune` of this layer; None for nothing, as a rule.

        Each tensor is one synchronisation with the device.
        """
        return None

    def decide(self, layer: int, values: list[Any], view: View) -> Hashable:
        """What follows from the values of `host_values`, given as nested lists. Kept in `view.scratch["decision"]`.

        What this and later cuts do on the host must follow from the return value, not from the values themselves.
        """
        raise TypeError(f"{self!r} asks for host values and must define decide()")

    def prune(self, layer: int, view: View) -> Cut | None:
        """Called after each decoder layer, and with layer -1 before the first. None keeps every token."""
        return None

    # counts --------------------------------------------------------------------------------------------------
    def plan(self, n_visual: int, n_layers: int) -> list[int] | None:
        """Visual tokens entering each layer for one image, or None where the data decide."""
        return None

    def example(self, n_visual: int, n_layers: int) -> tuple[list[int], list[int], str] | None:
        """Visual tokens entering and leaving each layer, and what that assumes; for tables.

        By default what `plan` returns, assuming nothing. A method whose data decide may give a typical case and name
        it; None where there is nothing to show.
        """
        plan = self.plan(n_visual, n_layers)
        return None if plan is None else (plan, [*plan[1:], *plan[-1:]], "")

    def curves(self, n_visual: int, n_layers: int) -> dict[str, tuple[int, ...]]:
        """Visual tokens leaving each layer for other questions, by label; for figures of methods that vary them."""
        return {}

    def keep_after(self, layer: int, spans: Spans) -> list[int] | None:
        """Visual tokens of each sample that `plan` keeps after `layer` (-1: before the first).

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


class ScoreMethod(Method):
    """A score and a schedule: after each layer the best tokens remain, as many as `plan` says.

    Inside the language model define `scores`, and `queries` where it reads other attention than that of the last prompt
    token. Before the language model define `vision_scores`; each image or crop then keeps its share of `tokens`. `plan`
    is the schedule of either.
    """

    def scores(self, layer: int, view: View) -> Tensor:
        """(B, L) float: the highest-scored visual tokens remain after `layer`; ties go by position."""
        raise TypeError(f"{self!r} must define scores() or vision_scores()")

    def vision_scores(self, view: VisionView) -> Tensor:
        """(N, T) float: the highest-scored patches remain; ties go by index."""
        raise TypeError(f"{self!r} must define scores() or vision_scores()")

    def queries(self, layer: int, spans: Spans) -> Positions | None:
        return None if self._idle(layer, spans) else spans.last_position()

    def _idle(self, layer: int, spans: Spans) -> bool:
        """Whether nothing is scored after `layer`."""
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
    """Choose among the projected visual tokens before the first layer; the others never enter the language model.

    Define `choose` and `plan`. All visual tokens of a prompt are one list, newline tokens of images in crops included.
    In a composition such a method comes first.
    """

    positions = "renumber"
    decode = "cache"

    def choose(self, view: View, tokens: Tensor, real: Tensor, keep: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The tokens that remain, in output order.

        Args:
            view: before the first layer.
            tokens: (B, V, D) visual tokens of each sample.
            real: (B, V) bool, False on ragged padding.
            keep: how many remain of each sample; V at most.

        Returns:
            (B, K) long with K = max(keep), into the V tokens followed by C new ones, the first keep[b] being real; new
            tokens (B, C, D), or None.
        """
        raise TypeError(f"{self!r} must define choose()")

    def prune(self, layer: int, view: View) -> Cut | None:
        keep = self.keep_after(layer, view.spans) if layer < 0 else None
        if keep is None:
            return None
        places, real = view.visual_tokens()
        order, merged = self.choose(view, take(view.hidden, places), real, keep)
        everything = [k == n for k, n in zip(keep, view.spans.n_visual, strict=True)]
        if any(everything):  # as if the sample were alone
            whole = torch.tensor(everything)[:, None].to(order.device, non_blocking=True)
            order = torch.where(whole, torch.arange(order.shape[1], device=order.device), order)
        lengths = [n + k for n, k in zip(view.n_other, keep, strict=True)]
        return arranged(order, keep, places, view.visual, view.valid, lengths, merged)


def in_raster_order(order: Tensor, keep: Sequence[int]) -> Tensor:
    """(B, K) an order whose first keep[b] entries are sorted."""
    real = torch.arange(order.shape[1], device=order.device) < per_sample(keep, order)
    return torch.where(real, order, torch.iinfo(order.dtype).max).sort(dim=1).values.where(real, order)


def prunes_inside(cls: type[Method]) -> bool:
    """Whether a method drops tokens inside the language model (layer -1, its entry, included)."""
    if issubclass(cls, ScoreMethod) and cls.prune is ScoreMethod.prune:
        return cls.scores is not ScoreMethod.scores
    return cls.prune is not Method.prune


def prunes_before(cls: type[Method]) -> bool:
    """Whether a method looks at or drops patches between vision tower and language model."""
    if issubclass(cls, ScoreMethod) and cls.prune_vision is ScoreMethod.prune_vision:
        return cls.vision_scores is not ScoreMethod.vision_scores
    return cls.prune_vision is not Method.prune_vision or cls.merge_schedule is not Method.merge_schedule
