"""What the runtime shows a method, and what a method answers.

Shapes: B samples, L token positions of the sequence now, D hidden size, H heads, Q query positions, dh head size,
N images or crops, T patches of one, Dv width of the vision tower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.clustering import cluster_means
from ..ops.selection import Cut, Positions, assemble, column, descending_order, top

MERGED = -1
"""Original index of a token that was made by merging others."""
PADDING = -2
"""Original index of a masked position that pads samples of unequal length (ragged padding)."""
TEXT = -3
"""Original index of a token that is not visual."""
EVERY = -1
"""In `Method.vision_queries`, alone in its list: the mean attention over all query positions of a block."""


@dataclass(frozen=True)
class Spans:
    """Where the tokens of a request are at one layer.

    Samples are right-aligned: padding on the right is moved to the left before a method sees the batch, and every cut
    keeps samples right-aligned. The text after the image is therefore always the last ``n_text`` positions.

    Attributes:
        length: L, token positions now.
        n_text: Q, positions after the last visual token, at least 1.
        text: (B, Q) bool, which of the last Q positions are a sample's text tokens after its image. In a sample with
            nothing after its image the last position counts; in one without an image, none.
        n_visual: visual tokens of each sample as they enter the language model, before any cut.
        n_layers: decoder layers of the model.
    """

    length: int
    n_text: int
    text: Tensor
    n_visual: tuple[int, ...]
    n_layers: int

    def text_positions(self) -> slice:
        """The Q positions after the image."""
        return slice(self.length - self.n_text, self.length)

    def last_position(self) -> slice:
        """The last position, which holds the last instruction token of every sample."""
        return slice(self.length - 1, self.length)


@dataclass
class View:
    """A request after one decoder layer, or before the first (layer -1).

    Attributes:
        hidden: (B, L, D) output of the layer.
        visual: (B, L) bool, visual tokens.
        valid: (B, L) bool, False on padding.
        ids: (B, L) long, index among the sample's original visual tokens, or MERGED, PADDING, TEXT.
        attention: (B, H, Q, L) float32, softmax attention of the positions that `Method.queries` named; None if none.
        spans: see Spans.
        scratch: dict that lives as long as the request; a method keeps its state here, never on itself.
        n_other: tokens of each sample that are neither visual nor padding.
        patch_table: name -> (B, V) values of the vision side by original visual index; read them with `patch_values`.
        next_attention: function of positions -> (B, H, Q, L) float32, attention of the next layer on these states.
        rope: cosine and sine of the layer's positions, (B or 1, L, dh) each.
        layer_input: (B, L, D) input of the layer, None before the first.
        mlp_input: (B, L, D) input of the layer's MLP, after its norm, where `Method.needs_mlp_input` says so.
        kernels: fused kernels that replace single operations (experimental), None for plain torch.
    """

    hidden: Tensor
    visual: Tensor
    valid: Tensor
    ids: Tensor
    attention: Tensor | None
    spans: Spans
    scratch: dict[str, Any]
    n_other: tuple[int, ...]
    patch_table: dict[str, Tensor] = field(default_factory=dict)
    next_attention: Callable[[Positions], Tensor] | None = None
    rope: tuple[Tensor, Tensor] | None = None
    layer_input: Tensor | None = None
    mlp_input: Tensor | None = None
    kernels: Any = None

    def patch_values(self, name: str) -> Tensor:
        """(B, L) values that `Method.prune_vision` left for the patches under `name`; 0 on tokens without a patch.

        Raises:
            ValueError: when nothing was left under that name.
        """
        if name not in self.patch_table:
            known = ", ".join(sorted(self.patch_table)) or "none"
            raise ValueError(f"no patch values {name!r} for these images (known: {known}); set them in prune_vision")
        values = self.patch_table[name].to(self.ids.device)  # (B, V) by original index
        if values.shape[1] == 0:
            return torch.zeros_like(self.visual, dtype=values.dtype)
        picked = values.gather(1, self.ids.clamp(0, values.shape[1] - 1))  # (B, L)
        return picked.masked_fill(~self.visual | (self.ids < 0), 0)

    def keep_top(
        self, score: Tensor, keep: Sequence[int], recycle: Sequence[int] = (), clusters: Sequence[int] = ()
    ) -> Cut:
        """Keep the best visual tokens in sequence order; the best of the others may return as cluster means.

        Args:
            score: (B, L) float, ties go by position.
            keep: visual tokens to keep, one count a sample.
            recycle: tokens that are clustered, the best after the kept ones; none if empty.
            clusters: clusters of each sample, appended after the kept tokens in the order of their centres.
        """
        if not any(recycle):
            clusters = recycle = [0] * len(keep)
        lengths = [n + k + c for n, k, c in zip(self.n_other, keep, clusters, strict=True)]
        even = all(len(set(x)) == 1 for x in (self.n_other, keep, clusters, recycle))
        if self.kernels is not None and even:
            index, picked = self.kernels.choose(
                score, self.visual, self.valid, keep[0], recycle[0], clusters[0], lengths[0]
            )
            if not recycle[0]:
                return Cut(index)
            means, label = cluster_means(self.hidden, picked, recycle, clusters, self.kernels)
            return Cut(index, means, members=functools.partial(_members, picked, label))
        best = descending_order(score, self.visual)  # (B, L) positions by rank
        kept = top(best, keep, self.visual)  # (B, L)
        if not any(recycle):
            return assemble(kept, self.visual, self.valid, lengths)
        if len(set(keep)) == 1:
            picked = best[:, keep[0] : keep[0] + max(recycle)]  # (B, R)
        else:
            slots = torch.arange(max(recycle), device=best.device)
            picked = best.gather(1, (column(keep, best) + slots).clamp(max=best.shape[1] - 1))
        means, label = cluster_means(self.hidden, picked, recycle, clusters, self.kernels)  # (B, C, D)
        cut = assemble(kept, self.visual, self.valid, lengths, means, clusters)
        return replace(cut, members=functools.partial(_members, picked, label))


def _members(picked: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `Cut.members`; without labels all are in one cluster."""
    return picked, torch.zeros_like(picked) if label is None else label


@dataclass
class VisionView:
    """The images of a request between vision tower and projector.

    Attributes:
        features: (N, T, Dv) patch features, class token removed; fewer than T tokens where the method merged inside
            the tower.
        attention: block -> (N, H, Q, 1 + T) float32, softmax attention that `Method.vision_queries` asked for; T
            without the 1 in a tower without a class token.
        keys: block -> (N, H, 1 + T, dh) key projections of the same blocks.
        queries: block -> (N, H, Q, dh) query projections.
        grid: (height, width) in patches.
        cls: (N, Dv) feature of the class token, or None when the method asks for no attention of the tower, or the
            tower has none.
        groups: (N, T) long, the token of `features` that each patch is in; None where nothing was merged.
        crops: largest number of crops this model makes of an image, 1 where it sees images whole.
        feature_layer: 0-based block whose output the features are.
        leading: tokens of the tower before its patches: 1 with a class token, else 0.
        patch_values: name -> (N, T), values for `View.patch_values`; a method fills it.
        find_padding: what `padding` returns.
    """

    features: Tensor
    attention: dict[int, Tensor]
    keys: dict[int, Tensor]
    grid: tuple[int, int]
    queries: dict[int, Tensor] = field(default_factory=dict)
    cls: Tensor | None = None
    groups: Tensor | None = None
    crops: int = 1
    feature_layer: int = -1
    leading: int = 1
    patch_values: dict[str, Tensor] = field(default_factory=dict)
    find_padding: Callable[[], Tensor | None] = field(default=lambda: None)

    @property
    def padding(self) -> Tensor | None:
        """(N, T) bool, patches that show padding only, or None when the original sizes are unknown.

        Raises:
            ValueError: when the sizes were given in another thread, or do not fit the number of images.
        """
        return self.find_padding()

    def class_attention(self) -> Tensor:
        """(N, T) float32: attention of the class token on each patch in the one recorded block, mean over heads.

        Its attention on itself is left out without renormalising. Where `vision_queries` asked for EVERY, the mean
        attention that each patch receives.
        """
        (recorded,) = self.attention.values()  # (N, H, 1, leading + T)
        return recorded[:, :, 0, self.leading :].mean(1)

    def tokens_per_crop(self, tokens: int) -> int:
        """What each crop gets of a budget: tokens // (largest number of crops of the model), at least 1."""
        return max(tokens // self.crops, 1)

    def keep_top(self, score: Tensor, keep: int) -> VisionCut:
        """Keep the `keep` patches of each image or crop with the highest score (N, T), in raster order, ties by index.

        Neither newline tokens nor the unpadding of LLaVA-NeXT are applied to them.
        """
        every = torch.ones_like(score, dtype=torch.bool)
        live = top(descending_order(score, every), [keep] * score.shape[0], every)
        patches = torch.arange(live.shape[1], device=live.device).expand_as(live)
        return VisionCut(live, self.features, patches, counts=[keep] * live.shape[0])

    def mask(self, name: str, values: Any) -> Tensor:
        """(N, T) bool from what a user gave: T values for all images, or N x T, in any shape.

        Raises:
            ValueError: for another number of values, naming the argument.
        """
        n, t = self.features.shape[:2]
        given = torch.as_tensor(values, device=self.features.device).bool()
        if given.numel() not in (t, n * t):
            raise ValueError(f"{name} has {given.numel()} values; give {t} for all images or {n} x {t}")
        return given.reshape(-1, t).expand(n, t)


@dataclass(frozen=True)
class VisionCut:
    """The tokens that enter the language model in place of the patches.

    Attributes:
        live: (N, K) bool; K may differ from the number of patches.
        features: (N, K, Dv) features for the projector; those not `live` are ignored. `VisionView.features` itself
            where the tokens are unchanged patches, which then need no second projection.
        ids: (N, K) long, the patch that each token stands for, MERGED for none. Tokens are sent in this order, so
            patches may be reordered or repeated, and newline tokens are not sent. None when token j is patch j: patches
            then stay where the package packs them, among newline tokens, and those it removes as padding are lost.
        by_canvas: how crops are ordered when there are ids. The first crop (the whole image) always comes first. True
            places the patches of the others on the stitched image and sends them row by row, then tokens without a
            patch: those before the patches of their crop, crop by crop, then those after. False sends crop after crop.
        counts: live tokens of each image or crop, where the host knows them; otherwise they are read from the device.
        groups: for tokens without a patch, what they were made of: a function that returns for each patch its token
            (N, T), a position among the K, -1 for none. Only records call it.
    """

    live: Tensor
    features: Tensor
    ids: Tensor | None = None
    by_canvas: bool = True
    counts: Sequence[int] | None = None
    groups: Callable[[], Tensor] | None = None
