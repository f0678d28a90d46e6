"""TopV (a reconstruction): keep the visual tokens that contribute most to a transport problem over one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.counts import Size, layer_flops, tokens_after_full_layers, tokens_for_flops
from ..ops.selection import Cut, assemble, descending_order, take, top
from .base import Method, MethodInfo
from .checks import at_most_one, choice, integer, real
from .registry import register
from .views import Spans, View, VisionView

_PRESETS: dict[str, dict[str, Any]] = {
    "half": {"flops": 0.5},
    "49-less": {"flops": 0.51},
    "35": {"flops": 0.35},
    "full3": {"flops": 0.5, "full_layers": 3},
    "recover4": {"flops": 0.51, "r": 4},
    "recover6": {"flops": 0.51, "r": 6},
    "balanced": {"flops": 0.5, "tau": 1.0},
    "unit": {"flops": 0.5, "unit": True},
}


@register("topv", presets=_PRESETS)
@dataclass(frozen=True)
class TopV(Method):
    """A reconstruction of TopV: no official code is known, and parity with the paper is not claimed.

    Sources are the visual tokens entering layer index `full_layers` - 1, targets are the inputs of its MLP. The cost of
    a pair is alpha (squared distance) + beta (1 - Gaussian of the distance on the grid) + gamma (distance of the source
    to the centre), with the first and the last term scaled to 0..1. The importance of a source is its row sum of the
    transport plan with uniform marginals; row steps are damped by `tau`, and the exact column step comes last. Details
    that the paper does not state are choices of this package or of third parties; docs/methods/topv.md lists them.

    Without arguments this is 50 % of the FLOPs on visual tokens alone ("half": 272 of 576 tokens after two of 32
    layers). The paper's "49 %" is interpreted as a reduction ("49-less"). "recover4" and "recover6" put discarded
    tokens back at the same cost, "full3" prunes one layer later (the index of the paper's layer 2 is unknown),
    "balanced" is plain Sinkhorn, "unit" normalises sources and targets.

    Args:
        tokens: budget, the mean over layers of visual tokens entering, including recovered ones. The cut is after
            `full_layers` layers; without `full_layers`, after layer 2 if the budget allows it, else after layer 1.
        rho: share of the visual tokens kept by rank, round(rho N); recovered tokens are added to them.
        flops: share of the unpruned model's FLOPs on visual tokens alone, including recovered tokens.
        full_layers: number of layers that see all visual tokens; scores are computed in the last of them. Default 2.
        r: put every r-th discarded token back; 0 for none.
        alpha: weight of the feature distance.
        beta: weight of the grid distance.
        gamma: weight of the centre distance.
        sigma: width of the Gaussian, in patches.
        eps: entropic regularisation.
        tau: 1 is balanced Sinkhorn; 0 leaves the rows free, the only setting in which all three terms have the intended
            effect.
        iterations: number of Sinkhorn iterations.
        unit: L2-normalise sources and targets first.
    """

    tokens: int | None = None
    rho: float | None = None
    flops: float | None = None
    full_layers: int | None = None
    r: int = 0
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.01
    sigma: float = 10.0
    eps: float = 0.1
    tau: float = 0.0
    iterations: int = 3
    unit: bool = False

    info = MethodInfo(
        paper="TopV: Compatible Token Pruning with Inference Time Optimization, CVPR 2025 (arXiv 2503.18278)",
        where="language model, after the first 2 layers (or as `full_layers` says)",
        source="none; a reconstruction",
        licence="-",
    )
    requires = frozenset({"patch positions"})
    fixes_budget = ("rho", "flops")

    def __post_init__(self) -> None:
        at_most_one(tokens=self.tokens, rho=self.rho, flops=self.flops)
        integer("tokens", self.tokens, 1)
        integer("full_layers", self.full_layers, 1)
        integer("r", self.r)
        integer("iterations", self.iterations, 1, 1000)
        for name in ("rho", "flops", "tau"):
            real(name, getattr(self, name), 0, 1)
        for name in ("alpha", "beta", "gamma"):
            real(name, getattr(self, name), 0)
        for name in ("sigma", "eps"):
            real(name, getattr(self, name), 1e-6)
        choice("unit", self.unit, (True, False))

    # counts --------------------------------------------------------------------------------------------------
    def setting(self, n_visual: int, n_layers: int) -> tuple[int, int, int]:
        """Return (full layers, tokens kept by rank, tokens recovered) for an image.

        Raises:
            ValueError: for a layer that the model does not have, or a budget that cannot be met.
        """
        full = self.full_layers
        if full is not None and full >= n_layers:
            raise ValueError(f"full_layers={full}: this model has {n_layers} layers; give at most {n_layers - 1}")
        if self.rho is not None:
            return full or min(2, n_layers - 1), *with_recovery(round(self.rho * n_visual), n_visual, self.r)
        if self.tokens is not None and self.tokens >= n_visual:
            return full or 1, n_visual, 0
        for f in (2, 1) if full is None else (full,):
            if self.tokens is not None:
                total = tokens_after_full_layers(self.tokens, n_visual, n_layers, f)
            else:
                total = tokens_by_flops(0.5 if self.flops is None else self.flops, n_visual, n_layers, f)
            keep, back = within_total(total, n_visual, self.r)
            if keep:
                return f, keep, back
        asked = f"tokens={self.tokens}" if self.tokens is not None else f"flops={self.flops}"
        raise ValueError(
            f"{asked}: {f} full layer(s) of {n_layers} with {n_visual} visual tokens"
            + (f" and every {self.r}th discarded one" if self.r else "")
            + " exceed that; give more"
        )

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        if n_visual == 0:
            return [0] * n_layers
        full, keep, back = self.setting(n_visual, n_layers)
        return [n_visual] * full + [keep + back] * (n_layers - full)

    # requests ------------------------------------------------------------------------------------------------
    def prune_vision(self, view: VisionView) -> None:
        """Store the place of each patch in its own image or crop."""
        view.patch_values.update(patch_places(view.features.shape[0], view.grid, view.features.device))

    def needs_mlp_input(self, layer: int, spans: Spans) -> bool:
        return self.keep_after(layer, spans) is not None

    def prune(self, layer: int, view: View) -> Cut | None:
        after = self.keep_after(layer, view.spans)
        if after is None or view.mlp_input is None or view.layer_input is None:
            return None
        settings = [self.setting(n, view.spans.n_layers) if n else (layer + 1, 0, 0) for n in view.spans.n_visual]
        plans = zip(settings, view.spans.n_visual, after, strict=True)
        keep = [s[1] if s[0] == layer + 1 else (n if s[0] > layer else total) for s, n, total in plans]
        place, live = view.visual_tokens()  # (B, V) each
        importance = self._importance(view, place, live)
        score = torch.zeros(view.visual.shape, device=importance.device).scatter(1, place, importance)
        stay = top(descending_order(score, view.visual), keep, view.visual)
        lengths = [n + k for n, k in zip(view.n_other, after, strict=True)]
        if self.r:
            dropped = view.visual & ~stay
            due = torch.tensor([s[0] == layer + 1 for s in settings]).to(dropped.device, non_blocking=True)[:, None]
            stay = stay | dropped & due & ((dropped.cumsum(1) - 1) % self.r == 0)
        return assemble(stay, view.visual, view.valid, lengths)

    def _importance(self, view: View, place: Tensor, live: Tensor) -> Tensor:
        """Return (B, V) row sums of the transport plan, 0 on padding."""
        assert view.layer_input is not None and view.mlp_input is not None
        source, target = take(view.layer_input, place).float(), take(view.mlp_input, place).float()  # (B, V, D)
        if self.unit:
            source, target = (torch.nn.functional.normalize(z, dim=2) for z in (source, target))
        crop = view.patch_values("crop").gather(1, place)  # (B, V), 0 on tokens without a patch
        index = torch.arange(crop.shape[1], device=crop.device).expand_as(crop)
        before = index.masked_fill(crop == 0, 0).cummax(1).values  # newline tokens get the place of the patch before
        x, y, off = (view.patch_values(k).gather(1, place).gather(1, before) for k in ("x", "y", "off"))
        grid = grid_distance(x, y, crop.gather(1, before))
        cost = self.cost(feature_cost(source, target), grid, off, live)
        return transport(cost, live, self.eps, self.tau, self.iterations).sum(2)

    def cost(self, feature: Tensor, grid: Tensor, off: Tensor, live: Tensor) -> Tensor:
        """Return the (B, V, V) weighted sum of the three cost terms.

        Args:
            feature: (B, V, V) squared distance of source i and target j.
            grid: (B, V, V) squared distance of their places.
            off: (B, V) distance of source i to the centre.
            live: (B, V) bool, False on padding.
        """
        pair = live[:, :, None] & live[:, None]
        near = 1 - torch.exp(-grid / (2 * self.sigma**2))
        return self.alpha * unit_range(feature, pair) + self.beta * near + self.gamma * unit_range(off, live)[..., None]


# counts ----------------------------------------------------------------------------------------------------------


def tokens_by_flops(share: float, n_visual: int, n_layers: int, full: int) -> int:
    """Return the number of tokens after `full` layers for a share of the unpruned FLOPs on visual tokens alone.

    The FLOPs are as near to the share as possible. The result may be 0.
    """
    if full >= n_layers:
        return 0
    model = Size()  # LLaVA-1.5-7B; 13B has nearly the same ratio of MLP size to hidden size
    each = layer_flops(n_visual, model.hidden, model.intermediate)
    left = (share * n_layers - full) * each / (n_layers - full)
    return tokens_for_flops(left, model.hidden, model.intermediate)


def with_recovery(keep: int, n_visual: int, every: int) -> tuple[int, int]:
    """Return (kept by rank, recovered) if every `every`-th other token is recovered; `every` = 0 recovers none."""
    keep = min(keep, n_visual)
    return keep, math.ceil((n_visual - keep) / every) if every else 0


def within_total(total: int, n_visual: int, every: int) -> tuple[int, int]:
    """Return the largest (kept by rank, recovered) with at most `total` tokens together; (0, 0) if there is none."""
    keep = (every * total - n_visual) // (every - 1) if every > 1 else 0 if every else total
    return with_recovery(keep, n_visual, every) if keep > 0 else (0, 0)


# the transport problem --------------------------------------------------------------------------------------------


def feature_cost(source: Tensor, target: Tensor) -> Tensor:
    """Return (B, V, V) squared distances of sources and targets."""
    return torch.cdist(source, target).square()


def patch_places(images: int, grid: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Return the places of patches by name, (N, T) float32 each.

    "x" and "y" are column and row in the patch's own image or crop, "crop" is its number, counted from 1, and "off" is
    the distance to the centre.

    Args:
        images: N, number of images or crops.
        grid: (height, width) in patches.
        device: device of the tensors.
    """
    height, width = grid
    place = torch.arange(height * width, device=device, dtype=torch.float32).expand(images, -1)
    x, y = place % width, (place / width).floor()
    crop = torch.arange(1, images + 1, device=device, dtype=torch.float32)[:, None].expand_as(place)
    off = ((x - (width - 1) / 2) ** 2 + (y - (height - 1) / 2) ** 2).sqrt()
    return {"x": x, "y": y, "crop": crop, "off": off}


def grid_distance(x: Tensor, y: Tensor, crop: Tensor) -> Tensor:
    """Return (B, V, V) squared distances on the grid; infinite for patches of different images or crops."""
    square = (x[:, :, None] - x[:, None]).square() + (y[:, :, None] - y[:, None]).square()
    return square.masked_fill(crop[:, :, None] != crop[:, None], torch.inf)


def unit_range(values: Tensor, live: Tensor) -> Tensor:
    """Scale values to 0..1 by minimum and maximum over the live entries of a sample; 0 if all are equal."""
    flat, mask = values.flatten(1), live.flatten(1)
    low = flat.masked_fill(~mask, torch.inf).amin(1)
    high = flat.masked_fill(~mask, -torch.inf).amax(1)
    shape = (-1, *[1] * (values.ndim - 1))
    spread = (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    return ((values - low.view(shape)) / spread.view(shape)).masked_fill(~live, 0)


def transport(cost: Tensor, live: Tensor, eps: float, tau: float, iterations: int) -> Tensor:
    """Compute the transport plan diag(u) exp(-C / eps) diag(v) with uniform marginals, in the log domain.

    Each iteration takes a row step damped by `tau`, u = (p / K v)^tau, then the exact column step.

    Args:
        cost: (B, V, V) costs C.
        live: (B, V) bool, False on padding.
        eps: entropic regularisation.
        tau: damping of the row step.
        iterations: number of iterations, at least 1.

    Returns:
        (B, V, V) plan, 0 where row or column is not live. Columns sum to their marginal exactly.
    """
    pair = live[:, :, None] & live[:, None]
    kernel = (-cost / eps).masked_fill(~pair, -1e30)
    mass = -live.sum(1, keepdim=True).clamp(min=1).to(cost.dtype).log()  # (B, 1) log of the uniform marginal
    u = v = torch.zeros_like(kernel[:, 0])
    for _ in range(iterations):
        if tau:
            u = (tau * (mass - (kernel + v[:, None]).logsumexp(2))).masked_fill(~live, 0)
        v = (mass - (kernel + u[..., None]).logsumexp(1)).masked_fill(~live, 0)
    return (kernel + u[..., None] + v[:, None]).exp().masked_fill(~pair, 0)
