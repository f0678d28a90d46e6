"""TopV (a reconstruction): visual tokens that contribute most in a transport problem over one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import at_most_one, real, whole
from ..core.method import Method
from ..core.registry import register
from ..core.select import assemble, descending_order, take, top
from ..core.stages import after_full, after_full_by_flops, with_recovery, within_total
from ..core.transport import feature_cost, grid_distance, patch_places, transport, unit_range
from ..core.types import Cut, Spans, View, VisionView

_PRESETS: dict[str, dict[str, Any]] = {
    "half": {"flops": 0.5},
    "49-less": {"flops": 0.51},
    "35": {"flops": 0.35},
    "full3": {"flops": 0.5, "full_layers": 3},
    "recover4": {"flops": 0.51, "r": 4},
    "recover6": {"flops": 0.51, "r": 6},
    "balanced": {"flops": 0.5, "tau": 1.0},
    "unit": {"flops": 0.5, "unit": True},
    **{str(b): {"tokens": b} for b in (192, 128, 64, 288, 144, 58, 640, 320, 160)},
}


@register("topv", presets=_PRESETS)
@dataclass(frozen=True)
class TopV(Method):
    """A reconstruction: no code of the authors exists, and parity with the paper is not claimed.

    Sources are the visual tokens entering layer index `full_layers` - 1, targets what its MLP is given. The cost of a
    pair is alpha (squared distance) + beta (1 - Gaussian of the distance on the grid) + gamma (distance of the source
    to the centre), the first and last scaled to 0..1; the importance of a source is its row sum of the transport plan
    with uniform marginals, row steps damped by `tau`, the exact column step last. What the paper does not state is our
    choice or a third party's; docs/methods/topv.md lists every decision.

    Nothing given is 50 % of the FLOPs on visual tokens alone ("half": 272 of 576 tokens after two of 32 layers). The
    paper's "49 %" is read as a reduction ("49-less"). "recover4" and "recover6" put discarded tokens back within the
    same cost, "full3" prunes a layer later (the index of the paper's layer 2 is unknown), "balanced" is plain Sinkhorn,
    "unit" normalises both ends.

    Args:
        tokens: budget, the mean over layers of visual tokens entering, recovered ones included. After `full_layers`
            where the budget allows it, else after layer 1.
        rho: share of the visual tokens kept by rank, round(rho N); recovered ones come on top.
        flops: share of the unpruned model's FLOPs on visual tokens alone, recovered ones included.
        full_layers: layers that see everything; scoring happens in the last of them. Default 2.
        r: every r-th discarded token comes back; 0 for none.
        alpha: weight of the feature distance.
        beta: weight of the grid distance.
        gamma: weight of the centre distance.
        sigma: width of the Gaussian, in patches.
        eps: entropic regularisation.
        tau: 1 is balanced Sinkhorn; 0 leaves the rows free, the only setting in which all three terms act as meant.
        iterations: Sinkhorn iterations.
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

    paper = "TopV: Compatible Token Pruning with Inference Time Optimization, CVPR 2025 (arXiv 2503.18278)"
    where = "language model, after the first 2 layers (or as `full_layers` says)"
    source = "none; a reconstruction"
    licence = "-"
    instead = ("rho", "flops")
    needs_patches = True

    def __post_init__(self) -> None:
        at_most_one(tokens=self.tokens, rho=self.rho, flops=self.flops)
        whole("tokens", self.tokens, 1)
        whole("full_layers", self.full_layers, 1)
        whole("r", self.r)
        whole("iterations", self.iterations, 1)
        for name in ("rho", "flops", "tau"):
            real(name, getattr(self, name), 0, 1)
        for name in ("alpha", "beta", "gamma"):
            real(name, getattr(self, name), 0)
        for name in ("sigma", "eps"):
            real(name, getattr(self, name), 1e-6)

    # counts --------------------------------------------------------------------------------------------------
    def setting(self, n_visual: int, n_layers: int) -> tuple[int, int, int]:
        """(full layers, tokens kept by rank, tokens recovered) for a picture.

        Raises:
            ValueError: for a layer the model does not have, or a budget that cannot be met.
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
                total = after_full(self.tokens, n_visual, n_layers, f)
            else:
                total = after_full_by_flops(0.5 if self.flops is None else self.flops, n_visual, n_layers, f)
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
    def reduce(self, view: VisionView) -> None:
        """Places of the patches, each in its own picture or crop."""
        view.carry.update(patch_places(view.features.shape[0], view.grid, view.features.device))

    def middle(self, layer: int, spans: Spans) -> bool:
        return self.keep_after(layer, spans) is not None

    def cut(self, layer: int, view: View) -> Cut | None:
        after = self.keep_after(layer, view.spans)
        if after is None or view.middle is None or view.entering is None:
            return None
        settings = [self.setting(n, view.spans.n_layers) if n else (layer + 1, 0, 0) for n in view.spans.n_visual]
        plans = zip(settings, view.spans.n_visual, after, strict=True)
        keep = [s[1] if s[0] == layer + 1 else (n if s[0] > layer else total) for s, n, total in plans]
        width = max(view.spans.n_visual)
        place = (~view.visual).to(torch.int8).sort(dim=1, stable=True).indices[:, :width]  # (B, V)
        live = view.visual.gather(1, place)
        importance = self._importance(view, place, live)
        score = torch.zeros(view.visual.shape, device=importance.device).scatter(1, place, importance)
        stay = top(descending_order(score, view.visual), keep, view.visual)
        lengths = [n + k for n, k in zip(view.counts, after, strict=True)]
        if self.r:
            gone = view.visual & ~stay
            due = torch.tensor([s[0] == layer + 1 for s in settings]).to(gone.device, non_blocking=True)[:, None]
            stay = stay | gone & due & ((gone.cumsum(1) - 1) % self.r == 0)
        return assemble(stay, view.visual, view.valid, lengths)

    def _importance(self, view: View, place: Tensor, live: Tensor) -> Tensor:
        """(B, V) row sums of the plan, 0 on filler."""
        assert view.entering is not None and view.middle is not None
        source, target = take(view.entering, place).float(), take(view.middle, place).float()  # (B, V, D)
        if self.unit:
            source, target = (torch.nn.functional.normalize(z, dim=2) for z in (source, target))
        crop = view.carry("crop").gather(1, place)  # (B, V), 0 on tokens without a patch
        index = torch.arange(crop.shape[1], device=crop.device).expand_as(crop)
        before = index.masked_fill(crop == 0, 0).cummax(1).values  # a newline token stands where the one before it does
        x, y, off = (view.carry(k).gather(1, place).gather(1, before) for k in ("x", "y", "off"))
        grid = grid_distance(x, y, crop.gather(1, before))
        cost = self.cost(feature_cost(source, target), grid, off, live)
        return transport(cost, live, self.eps, self.tau, self.iterations).sum(2)

    def cost(self, feature: Tensor, grid: Tensor, off: Tensor, live: Tensor) -> Tensor:
        """(B, V, V) weighted sum of the three terms.

        Args:
            feature: (B, V, V) squared distance of source i and target j.
            grid: (B, V, V) squared distance of their places.
            off: (B, V) distance of source i to the centre.
            live: (B, V) bool.
        """
        pair = live[:, :, None] & live[:, None]
        near = 1 - torch.exp(-grid / (2 * self.sigma**2))
        return self.alpha * unit_range(feature, pair) + self.beta * near + self.gamma * unit_range(off, live)[..., None]
