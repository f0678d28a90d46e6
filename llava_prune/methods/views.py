"""The views of a request that methods receive, and the `VisionCut` that they return.

Shapes: B samples, L current token positions, D hidden size, H heads, KV key-value heads, Q query positions, dh head
size, N images or crops, T patches of one image or crop, Dv width of the vision tower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.clustering import cluster_means
from ..ops.selection import Cut, Positions, assemble, column, descending_order, top, true_first

MERGED = -1
"""Original index of a token that was made by merging others."""
PADDING = -2
"""Original index of a masked position that pads samples of unequal lengths (ragged padding)."""
TEXT = -3
"""Original index of a token that is not visual."""
EVERY = -1
"""As the only entry of a list in `Method.vision_queries`: the mean attention over all query positions of a block."""


def per_crop(tokens: int, crops: int) -> int:
    """Return the share of a budget for each crop: tokens // (largest number of crops of the model), at least 1."""
    return max(tokens // crops, 1)


@dataclass(frozen=True)
class Spans:
    """The positions of the tokens of a request at one layer.

    Samples are right-aligned: padding on the right is moved to the left before a method sees the batch, and every cut
    keeps samples right-aligned. The text after the image is therefore always at the last ``n_text`` positions.

    Attributes:
        length: L, number of current token positions.
        n_text: Q, number of positions after the last visual token, at least 1.
        text: (B, Q) bool, which of the last Q positions are text tokens after the sample's image. For a sample with no
            token after its image, only the last position is True; for a sample without an image, none is.
        n_visual: number of visual tokens of each sample that enter the language model, before any cut.
        n_layers: number of decoder layers.
    """

    length: int
    n_text: int
    text: Tensor
    n_visual: tuple[int, ...]
    n_layers: int

    def text_positions(self) -> slice:
        """Return the last Q positions, which hold the text after the image."""
        return slice(self.length - self.n_text, self.length)

    def last_position(self) -> slice:
        """Return the last position, which holds the last instruction token of every sample."""
        return slice(self.length - 1, self.length)


@dataclass
class View:
    """A request after one decoder layer, or before the first layer (layer -1).

    Attributes:
        hidden: (B, L, D) output of the layer.
        visual: (B, L) bool, visual tokens.
        valid: (B, L) bool, False on padding.
        ids: (B, L) long, index among the sample's original visual tokens, or MERGED, PADDING, TEXT.
        attention: (B, H, Q, L) float32, softmax attention of the query positions that `Method.queries` returned; None
            if it returned None.
        spans: see Spans.
        scratch: dict that lives as long as the request; a method keeps its state here, never on itself.
        n_other: number of tokens of each sample that are neither visual nor padding.
        patch_table: name -> (B, V) values that `prune_vision` stored, by original visual index; read them with
            `patch_values`.
        next_attention: function of positions -> (B, H, Q, L) float32, attention of the next layer on these states.
        rope: cosine and sine of the layer's rotary embedding, (B or 1, L, dh) each.
        layer_input: (B, L, D) input of the layer, None before the first layer.
        mlp_input: (B, L, D) input of the layer's MLP, after its norm; None unless `Method.needs_mlp_input` asks for it.
        find_keys: function that computes the result of `keys`; None before the first layer.
        final_norm: function (B, R, D) -> (B, R, D), the norm after the model's last layer.
        kernels: module of fused kernels that replace single operations (experimental), None for plain torch.
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
    find_keys: Callable[[], Tensor] | None = None
    final_norm: Callable[[Tensor], Tensor] | None = None
    kernels: Any = None

    def keys(self) -> Tensor:
        """Return (B, KV, L, dh) keys of the layer with rotary embedding, as in the KV cache.

        Raises:
            ValueError: before the first layer.
        """
        if self.find_keys is None:
            raise ValueError("there are no keys before the first layer")
        return self.find_keys()

    def patch_values(self, name: str) -> Tensor:
        """Return (B, L) values that `Method.prune_vision` stored for the patches as `name`; 0 for other tokens.

        Raises:
            ValueError: if nothing is stored under that name.
        """
        if name not in self.patch_table:
            known = ", ".join(sorted(self.patch_table)) or "none"
            raise ValueError(f"no patch values {name!r} for these images (known: {known}); set them in prune_vision")
        values = self.patch_table[name].to(self.ids.device)  # (B, V) by original index
        if values.shape[1] == 0:
            return torch.zeros_like(self.visual, dtype=values.dtype)
        picked = values.gather(1, self.ids.clamp(0, values.shape[1] - 1))  # (B, L)
        return picked.masked_fill(~self.visual | (self.ids < 0), 0)

    def visual_tokens(self) -> tuple[Tensor, Tensor]:
        """Return (B, V) long, positions of the visual tokens of each sample in order, and (B, V) bool, which are real.

        V is the largest number of visual tokens of a sample that entered the language model.
        """
        width = max(self.spans.n_visual)
        places = true_first(self.visual)[:, :width]
        return places, self.visual.gather(1, places)

    def keep_top(
        self, score: Tensor, keep: Sequence[int], recycle: Sequence[int] = (), clusters: Sequence[int] = ()
    ) -> Cut:
        """Keep the visual tokens with the highest scores in sequence order, and optionally recycle some of the others.

        Recycled tokens are clustered, and the cluster means are appended as merged tokens.

        Args:
            score: (B, L) float; ties are resolved by position.
            keep: number of visual tokens to keep in each sample.
            recycle: number of tokens to cluster in each sample, the best after the kept ones; empty for none.
            clusters: number of clusters in each sample; their means follow the kept tokens in the order of their
                centres.
        """
        _check_scores(score, self.visual, "(B, L), one for each token position")
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


def _check_scores(score: Any, tokens: Tensor, what: str) -> None:
    """Refuse scores that do not have the shape of `tokens`; a smaller shape would rank every sample by the first one.

    Raises:
        ValueError: with both shapes.
    """
    if not isinstance(score, Tensor) or score.shape != tokens.shape:
        found = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else f"type {type(score).__name__}"
        raise ValueError(f"scores of {found}: must be a tensor of shape {tuple(tokens.shape)}: {what}")


def _members(picked: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the result of `Cut.members`; without labels, all tokens are in one cluster."""
    return picked, torch.zeros_like(picked) if label is None else label


@dataclass(frozen=True)
class ImageLayout:
    """How an image is split into crops.

    Attributes:
        crops: number of crops: the whole image and its tiles; 1 if the image is encoded whole only.
        rows, columns: grid of tiles; 0 if there are no tiles.
        size: (width, height) of the image; None if it is not known.
    """

    crops: int = 1
    rows: int = 0
    columns: int = 0
    size: tuple[int, int] | None = None


@dataclass
class VisionView:
    """The images of a request between vision tower and projector.

    Attributes:
        features: (N, T, Dv) patch features without the class token; fewer than T tokens if the method merged tokens
            inside the tower.
        attention: block -> (N, H, Q, 1 + T) float32, softmax attention that `Method.vision_queries` asked for; the last
            dimension is T in a tower without a class token.
        keys: block -> (N, H, 1 + T, dh) key projections of the same blocks.
        queries: block -> (N, H, Q, dh) query projections of the same blocks.
        grid: (height, width) in patches.
        cls: (N, Dv) feature of the class token; None if the method asks for no attention of the tower, or if the tower
            has no class token.
        groups: (N, T) long, the token of `features` that contains each patch; None if nothing was merged.
        crops: largest number of crops into which this model splits an image, 1 if it encodes images whole.
        feature_layer: 0-based block whose output is `features`.
        leading: number of tokens before the patches in the tower: 1 with a class token, else 0.
        patch_values: name -> (N, T) values for `View.patch_values`; a method fills this dict.
        find_padding: function that computes `padding`.
        find_layout: function that computes `layout`; None if every image is encoded whole.
        find_clip: function that computes the result of `clip_embeddings`; None if no CLIP was given.
        encode: function of (rows, columns) -> (N, rows x columns, Dv), features of the images resized to that many
            patches, with interpolated position embeddings. It runs the tower again. None if the pixels are not known.
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
    find_layout: Callable[[], list[ImageLayout]] | None = None
    find_clip: Callable[[bool], tuple[Tensor, list[Tensor]]] | None = None
    encode: Callable[[int, int], Tensor] | None = None

    @property
    def padding(self) -> Tensor | None:
        """(N, T) bool, patches that show padding only, or None if the original sizes are unknown.

        Raises:
            ValueError: if the sizes were given in another thread, or do not fit the number of images.
        """
        return self.find_padding()

    @property
    def layout(self) -> list[ImageLayout]:
        """The layout of each image; the crops of all images together are the N rows, in order.

        In transformers' LLaVA-NeXT this reads the image sizes, which costs a synchronisation if they are on a device.

        Raises:
            ValueError: if the crops of the images are not known.
        """
        n = self.features.shape[0]
        found = [ImageLayout()] * n if self.find_layout is None else self.find_layout()
        if sum(image.crops for image in found) != n:
            raise ValueError(f"{n} images and crops were encoded, and {len(found)} images make another number; give "
                             "input_ids and images to generate() or forward() together")  # fmt: skip
        return found

    def clip_embeddings(self, strict: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Embed patches and questions with the CLIP that a method's argument `clip` names.

        Args:
            strict: read a segment of text as the official code of CDPruner does, see `TextTower.text`.

        Returns:
            (N, T, C) float32 for the patches; for each image (M, C) float32 for the M segments of its question.

        Raises:
            ValueError: if no CLIP or no questions were given.
        """
        if self.find_clip is None:
            raise ValueError("no CLIP with a text tower was given; name its folder, as clip=...")
        return self.find_clip(strict)

    def class_attention(self) -> Tensor:
        """Return (N, T) float32: attention of the class token on each patch in the recorded block, mean over heads.

        Exactly one block must be recorded. The attention of the class token on itself is dropped without renormalising.
        If `vision_queries` asked for EVERY, this is the mean attention that each patch receives.

        Raises:
            ValueError: if none or several blocks are recorded.
        """
        if len(self.attention) != 1:
            raise ValueError(
                f"class_attention() with {len(self.attention)} recorded blocks of the vision tower: vision_queries "
                "must name one, as {feature_layer: [0]}"
            )
        (recorded,) = self.attention.values()  # (N, H, 1, leading + T)
        return recorded[:, :, 0, self.leading :].mean(1)

    def tokens_per_crop(self, tokens: int) -> int:
        """Return the share of a budget for each crop, see `per_crop`."""
        return per_crop(tokens, self.crops)

    def keep_top(self, score: Tensor, keep: int) -> VisionCut:
        """Keep the `keep` patches of each image or crop with the highest score (N, T), in raster order, ties by index.

        Newline tokens and the unpadding of LLaVA-NeXT are not applied to the kept patches.
        """
        _check_scores(score, self.features[..., 0], "(N, T), one for each patch")
        every = torch.ones_like(score, dtype=torch.bool)
        return self._raster(top(descending_order(score, every), [keep] * score.shape[0], every), keep)

    def keep(self, patches: Tensor) -> VisionCut:
        """Keep the patches (N, K) of each image or crop, each listed once, in raster order; see also `keep_top`."""
        live = torch.zeros(self.features.shape[:2], dtype=torch.bool, device=patches.device).scatter(1, patches, True)
        return self._raster(live, patches.shape[1])

    def _raster(self, live: Tensor, keep: int) -> VisionCut:
        patches = torch.arange(live.shape[1], device=live.device).expand_as(live)
        return VisionCut(live, self.features, patches, counts=[keep] * live.shape[0])

    def mask(self, name: str, values: Any) -> Tensor:
        """Return (N, T) bool from a user's mask: T values for all images, or N x T values, in any shape.

        Args:
            name: the argument, for the error message.
            values: the mask.

        Raises:
            ValueError: for any other number of values.
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
        live: (N, K) bool, the tokens to keep; K may differ from the number of patches.
        features: (N, K, Dv) features for the projector; those not `live` are ignored. If the tokens are unchanged
            patches, this should be the tensor `VisionView.features` itself, which is then not projected twice.
        ids: (N, K) long, the patch that each token stands for, MERGED for a token without a patch. Tokens enter the
            language model in this order, so patches may be reordered or repeated, and there are no newline tokens. None
            if token j is patch j: patches then stay where the package packs them, among newline tokens, and patches
            that the package removes as padding are lost.
        by_canvas: order of the crops if `ids` is given. The first crop (the whole image) always comes first. With True
            the patches of the other crops follow row by row on the stitched image, then the tokens without a patch:
            those before the patches of their crop, crop by crop, then those after them. With False, one crop follows
            the other.
        counts: number of live tokens of each image or crop, if the host knows it; otherwise it is read from the device.
        groups: for tokens without a patch, a function that returns (N, T) long: the token of each patch, as a position
            among the K tokens, -1 for none. Only records call it.
    """

    live: Tensor
    features: Tensor
    ids: Tensor | None = None
    by_canvas: bool = True
    counts: Sequence[int] | None = None
    groups: Callable[[], Tensor] | None = None
