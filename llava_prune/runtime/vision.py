"""Hooks on the vision tower and the projector: recorded attention, `prune_vision`, and the tokens of a `VisionCut`.

The package always receives the features of all patches from the projector. The tokens that a method chooses or makes
are kept in the request state and replace the patches at the entry of the language model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Method
from ..methods.views import VisionCut, VisionView
from ..ops.selection import take, true_first
from .answers import check_attributes, check_vision_cut, check_vision_queries
from .attention import output_of, tower_attention
from .layout import places_among
from .merging import Merging, Tower, merges_of, merging_block, variant_of
from .patching import replace_method
from .sizes import known_sizes
from .state import Chosen, ImageState, RequestState, Sizes, TowerPass, VisionTokens, current_tower_pass, request_of

AGAIN = (
    "Where vision tower or projector was replaced after attaching, or the model was compiled and run before it, detach "
    "the method, call torch.compiler.reset() and attach it again"
)
"""The way out where hooks of an attached method do not run."""


def padding_mask(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return a mask of the patches that lie in the padding of an image that was padded to a square.

    A border of about one patch around the image stays unmasked. Source: official evaluation code. With S the longer
    side of the image and a grid of 24 x 24, b = floor((S + 23) / 24) pixels of border stay unmasked, and cell i is
    represented by pixel floor(i S / 24).

    Args:
        size: (width, height) of the image.
        grid: (rows, columns) of patches, equal numbers.

    Returns:
        (rows, columns) bool, True on padding.
    """
    width, height = size
    side, cells = max(width, height), grid[0]
    mask = torch.zeros(grid, dtype=torch.bool)
    if width == height:
        return mask
    border = (side + cells - 1) // cells
    gap = abs(width - height) // 2
    low, high = max(gap - border, 0), min((width + height) // 2 + border, side)
    pixel = torch.arange(cells) * side // cells
    outside = (pixel < low) | (pixel >= high)
    return outside[:, None].expand(grid).clone() if width > height else outside[None].expand(grid).clone()


def batch_padding(sizes: Sizes | None, n: int, grid: tuple[int, int]) -> Tensor | None:
    """Return the `padding_mask` of every image, (N, T) bool, or None if the sizes are unknown.

    N may be a multiple of the number of sizes, since beam search can encode every image several times.

    Raises:
        ValueError: if the number of sizes does not fit the number of images.
    """
    if sizes is None or grid[0] != grid[1]:
        return None
    if not sizes or n % len(sizes):
        raise ValueError(f"{len(sizes)} image sizes for {n} images; give one (width, height) for each image")
    masks = torch.stack([padding_mask(s, grid).flatten() for s in sizes])  # (sizes, T)
    return masks.repeat_interleave(n // len(sizes), 0)


class VisionHooks:
    """The hooks on the tower's blocks and on the projector, one instance for each attachment.

    The instance holds no state of a request.

    Args:
        handle: the handle of the attachment.
        method: the pruning method.
        tower: facts about the model's vision tower.

    Raises:
        ValueError: if the method needs something that the tower does not have.
    """

    def __init__(self, handle: Any, method: Method, tower: Tower) -> None:
        self.handle, self.method, self.tower = handle, method, tower
        check_attributes(method)
        check_requirements(method, tower)
        self.queries = method.vision_queries(tower.feature_layer) if tower.feature_layer >= 0 else {}
        check_vision_queries(method, self.queries, tower.patches + (tower.leading or 0))
        self.merges = merges_of(method, tower)
        self.variant = variant_of(method, tower)
        self.sees_patches = method.sees_patches
        self.text_tower: Any = None
        self.modules: tuple[Any, Any] | None = None
        late = [b for b in self.queries if not 0 <= b < tower.depth]
        if late:
            raise ValueError(
                f"{method!r} reads block {late[0]} of the vision tower, which has {tower.depth} blocks and takes its "
                f"features after block {tower.feature_layer}; use a checkpoint that takes them after an earlier block"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> VisionHooks:
        """See `Handle.__deepcopy__`."""
        handle = copy.deepcopy(self.handle, memo)
        if handle is self.handle:
            return self
        if id(self) in memo:  # copied with the handle
            return memo[id(self)]
        made = memo[id(self)] = type(self).__new__(type(self))
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def install(self, tower: Any, encoder: Any, blocks: Any, projector: Any) -> list[Any]:
        """Install all hooks and return the handles that remove them."""
        if not self.sees_patches:
            return []
        self.modules = tower, encoder
        undo: list[Any] = [tower.register_forward_pre_hook(self.start, with_kwargs=True)]
        undo += record_attention(blocks, self.queries, self.tower.feature_layer)
        undo += [
            replace_method(blocks[block], "forward", _merging_forward, self, blocks[block], block, count)
            for block, count in enumerate(self.merges)
        ]
        undo.append(projector.register_forward_pre_hook(self.before_projector))
        undo.append(projector.register_forward_hook(self.after_projector))
        return undo

    def start(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Tower pre-hook: the first pass of a request encodes its images; later passes are ignored."""
        request = request_of(self.handle)
        if request is not None and request.images is None:
            given = args[0] if args else kwargs.get("pixel_values", kwargs.get("images"))
            pixels = given if isinstance(given, Tensor) and given.ndim == 4 else None
            if pixels is not None and self.modules is not None:
                _refuse_other_grid(self.method, pixels, self.modules[1].config.patch_size, self.tower.grid)
            request.images = ImageState(TowerPass(self.queries, pixels=pixels))

    def _encoding(self) -> ImageState | None:
        """Return the images of the open request while they are being encoded, else None."""
        request = request_of(self.handle)
        images = None if request is None else request.images
        return images if images is not None and not images.encoded else None

    def before_projector(self, module: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """Projector pre-hook: call `prune_vision` and append tokens that are not patches to the projector's input."""
        images, request = self._encoding(), request_of(self.handle)
        if images is None or request is None or images.tower is None:
            return None
        features: Tensor = args[0]
        merging = images.tower.merging
        expected = self.tower.patches if merging is None else merging.size.shape[1] - 1
        if features.shape[1] != expected:
            raise ValueError(
                f"the projector got {features.shape[1]} features of each image in place of {expected}; the feature "
                "selection must be 'patch' (package llava) or 'default' (transformers)"
            )
        view = self._view(images.tower, features, request)
        answer = self.method.prune_vision(view)
        images.patch_values = view.patch_values
        if answer is None:
            if merging is not None:
                raise ValueError(f"{self.method!r} merges in the vision tower, so prune_vision must return its tokens")
            return None
        check_vision_cut(self.method, answer, features, self.tower.patches, self.handle.check)
        index, ids, counts = compact(answer)
        groups = None if answer.groups is None else functools.partial(_among, answer.groups, index, counts)
        images.chosen = Chosen(index, ids, counts, answer.by_canvas, answer.ids is None, groups)
        if answer.features is features:
            return None
        images.chosen.index = features.shape[1] + torch.arange(index.shape[1], device=index.device).expand_as(index)
        return (torch.cat([features, take(answer.features, index).to(features)], 1),)

    def _view(self, found: TowerPass, features: Tensor, request: RequestState) -> VisionView:
        there, n = features.device, features.shape[0]
        missing = [b for b in self.queries if b not in found.attention]
        if missing:
            raise ValueError(
                f"{self.method.name or self.method!r} reads the attention of block {missing[0]} of the vision tower, "
                "which was not recorded; in a block of remember_images, name the method: remember_images([method]). "
                + AGAIN
            )
        recorded = {b: found.attention[b] for b in self.queries}  # an image cache may hold blocks of other methods, too
        grid = self.tower.grid

        def padding() -> Tensor | None:
            mask = batch_padding(known_sizes(request.hints), n, grid) if self.tower.padded else None
            return None if mask is None else mask.to(there, non_blocking=True)

        return VisionView(
            features=features,
            attention={b: r.attention.to(there) for b, r in recorded.items()},
            keys={b: r.keys for b, r in recorded.items()},
            grid=grid,
            queries={b: r.queries for b, r in recorded.items()},
            cls=None if found.cls is None or not self.tower.leading else found.cls.to(there),
            groups=None if found.merging is None else found.merging.groups[:, 1:].to(there) - 1,
            crops=self.tower.crops,
            feature_layer=self.tower.feature_layer,
            leading=self.tower.leading or 0,
            find_padding=padding,
            find_layout=request.layout,
            encode=None if found.pixels is None else functools.partial(self._resized, found.pixels),
            find_clip=None if self.text_tower is None else functools.partial(self._clip, features, request),
        )

    def _clip(self, features: Tensor, request: RequestState, strict: bool) -> tuple[Tensor, list[Tensor]]:
        """See `VisionView.clip_embeddings`."""
        asked = request.hints.questions
        if asked is None:
            raise ValueError(
                f"{self.method.name or self.method!r} compares patches with the question; wrap the call in "
                "llava_prune.questions([...]), one for each image"
            )
        tower = self.text_tower(features.device)
        return tower.patches(features), [tower.text(question, strict) for question in asked]

    def _resized(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        """See `VisionView.encode`. This calls the package's own tower, since its weights may be offloaded."""
        assert self.modules is not None
        tower, encoder = self.modules
        inner = getattr(encoder, "vision_model", encoder)
        size = rows * inner.embeddings.patch_size, columns * inner.embeddings.patch_size
        small = torch.nn.functional.interpolate(pixels.float(), size, mode="bicubic", antialias=True)
        hook = encoder.register_forward_pre_hook(_interpolating, with_kwargs=True)
        try:
            with output_of(encoder, lambda out: out.hidden_states[self.tower.feature_layer + 1]) as states:
                tower(small.to(pixels.dtype))
        finally:
            hook.remove()
        return states[0][:, states[0].shape[1] - rows * columns :]  # (N, rows x columns, Dv)

    def after_projector(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Projector hook: store the tokens of the method and return the features of all patches to the package."""
        images = self._encoding()
        if images is None or images.tower is None:
            return None
        merging, chosen = images.tower.merging, images.chosen
        images.tower, images.chosen, images.encoded = None, None, True
        if chosen is None:
            return None
        layout = [(1, 0, 0)] * len(chosen.counts)
        embeds = take(output, chosen.index.to(output.device))  # (N, K, D)
        images.tokens = VisionTokens(
            embeds, chosen.ids, chosen.counts, self.tower.grid, chosen.by_canvas, chosen.packed, layout, chosen.groups
        )
        if merging is not None:  # each patch gets the feature of the token that it was merged into
            return take(output, merging.groups[:, 1:].to(output.device) - 1)
        return output[:, : self.tower.patches]


def _refuse_other_grid(method: Method, pixels: Tensor, patch: int, grid: tuple[int, int]) -> None:
    """Refuse images that make another grid of patches than the model's, which `interpolate_pos_encoding` permits.

    Raises:
        ValueError: with both sizes.
    """
    height, width = pixels.shape[-2:]
    rows, columns = grid
    if (height // patch, width // patch) != grid:
        raise ValueError(
            f"images of {width} x {height} pixels: {method.name or method!r} looks at the vision tower, and works on "
            f"its {rows} x {columns} patches of {patch} pixels; give images of {columns * patch} x {rows * patch}, or "
            "interpolate (interpolate_pos_encoding) with a method that does not look at the tower, as fastv or pdrop"
        )


def _interpolating(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Encoder pre-hook: interpolate position embeddings for images of any size, and return all hidden states."""
    return args, {**kwargs, "interpolate_pos_encoding": True, "output_hidden_states": True}


def check_requirements(method: Method, tower: Tower) -> None:
    """Refuse a method that needs something that the vision tower does not have.

    Raises:
        ValueError: with the reason.
    """
    name = method.name or repr(method)
    if "class token" in method.requires and not tower.class_token:
        why = {"SigLIP": "which has none", "DINOv2": "whose class token was not trained with text"}
        raise ValueError(
            f"{name} needs the class token of a CLIP tower; this tower is {tower.kind}, "
            f"{why.get(tower.kind, 'whose layout is not known')}. Use a method that does not look at the tower, as "
            "fastv, pdrop, sparsevlm, vtw or uniform; autoprune and fastervlm take class_token='received', the mean "
            "attention that a patch receives, which their papers do not have"
        )
    if "whole images" in method.requires and tower.crops > 1:
        raise ValueError(
            f"{name} cannot work on images in crops (LLaVA-NeXT's anyres); use a checkpoint that sees images whole, or "
            "another method"
        )
    if not method.sees_patches:
        return
    if tower.depth == 0 or tower.leading is None:
        raise ValueError(
            f"{name} looks at the vision tower, and the layout of this tower ({tower.kind}) is not known; use a method "
            "that works inside the language model"
        )
    if tower.feature_layer < 0:
        raise ValueError(
            f"{name} works on patch features of a single layer, and this model joins those of several "
            "(vision_feature_layer is a list); use a method that works inside the language model"
        )
    if tower.features != tower.patches:
        selection = "'patch' (package llava) or 'default' (transformers)" if tower.leading else "'full'"
        raise ValueError(
            f"{name} works on patch features, and this model's feature selection gives {tower.features} features for "
            f"{tower.patches} patches; it must be {selection}"
        )


def record_attention(blocks: Any, queries: dict[int, list[int]], feature_layer: int) -> list[Any]:
    """Register hooks that record the attention for which the current `TowerPass` asks; return their handles."""
    hooks = [
        blocks[block].register_forward_pre_hook(functools.partial(_record, block), with_kwargs=True)
        for block in queries
    ]
    if queries:
        hooks.append(blocks[feature_layer].register_forward_hook(_record_class_token))
    return hooks


def _record(block: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Block pre-hook: record the attention of the block."""
    found = current_tower_pass()
    if found is None or block not in found.queries or block in found.attention:
        return
    hidden = args[0] if args else kwargs["hidden_states"]
    found.attention[block] = tower_attention(module, hidden.detach(), found.queries[block])


def _record_class_token(module: Any, args: Any, output: Any) -> None:
    """Hook on the feature block: record the class token's feature, which the packages drop."""
    found = current_tower_pass()
    if found is not None and found.cls is None:
        found.cls = (output[0] if isinstance(output, tuple) else output)[:, 0].detach()


def _merging_forward(
    hooks: VisionHooks, layer: Any, block: int, count: int, stock: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Run the merging forward of a block in a request of its attachment, and the stock forward otherwise."""
    found = current_tower_pass() if request_of(hooks.handle) is not None else None
    if found is None or not found.merges:
        out: Tensor = stock(hidden_states, *args, **kwargs)
        return out
    if block == 0:
        n, t = hidden_states.shape[:2]
        found.merging = Merging.fresh(n, t, hidden_states.device)
    assert found.merging is not None
    return merging_block(layer, hooks.method, count, found.merging, hidden_states)


def compact(cut: VisionCut) -> tuple[Tensor, Tensor, list[int]]:
    """Gather the live tokens of a `VisionCut` to the left.

    Synchronises with the device once, unless the cut states its counts.

    Returns:
        (N, K') long, positions of the live tokens; (N, K') long, their patches; the number of live tokens of each
        image or crop.

    Raises:
        ValueError: for another number of counts than images.
    """
    n, k = cut.live.shape
    index = torch.arange(k, device=cut.live.device).expand(n, k)
    ids = index if cut.ids is None else cut.ids
    counts = cut.live.sum(1).tolist() if cut.counts is None else list(cut.counts)
    if len(counts) != n:
        raise ValueError(f"VisionCut: {len(counts)} counts for {n} images or crops")
    if all(c == k for c in counts):
        return index, ids, counts
    order = true_first(cut.live)[:, : max(*counts, 1)]
    return order, ids.gather(1, order), counts


def _among(groups: Callable[[], Tensor], index: Tensor, counts: list[int]) -> Tensor:
    """Return (N, T) long: the result of `VisionCut.groups` as positions among the live tokens `index` (N, K')."""
    return places_among(groups().cpu(), index.cpu(), counts)
