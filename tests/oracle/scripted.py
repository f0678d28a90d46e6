"""A method that follows a script: cuts of every kind at given layers, for tests of the runtime itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from llava_prune import Cut, Method, Spans, View, VisionCut, VisionView
from llava_prune.ops.selection import assemble


@dataclass(frozen=True, eq=False)
class Scripted(Method):
    """Keep different shares of the visual tokens of each sample, and return clusters of dropped ones as means.

    Args:
        script: layer (-1 before the first) -> (share kept of the first sample, clusters of the first sample); the next
            two samples keep a quarter and a half of the share less, and each sample has one cluster more.
        positions: as in Method.
        decode: as in Method.
        vision: the vision side drops one patch in this many; 0 for no vision cut.
        copies: number of rows that belong to one sample (beams).
    """

    script: dict[int, tuple[float, int]] = field(default_factory=dict)
    positions: Any = "keep"
    decode: Any = "original"
    vision: int = 0
    copies: int = 1

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        if not self.vision:
            return None
        view.patch_values["number"] = torch.arange(view.features[..., 0].numel()).view(view.features.shape[:2]) + 1.0
        n, t = view.features.shape[:2]
        live = (torch.arange(n * t) % self.vision != 0).view(n, t)  # images keep different counts
        return VisionCut(live, view.features.roll(1, 1) * 0.5 + view.features)

    def queries(self, layer: int, spans: Spans) -> torch.Tensor | None:
        return spans.text_positions() if layer % 2 else None

    def prune(self, layer: int, view: View) -> Cut | None:
        if layer not in self.script:
            return None
        share, clusters = self.script[layer]
        score = view.hidden.float().square().mean(2)  # (B, L)
        batch = view.visual.shape[0]
        keep, merged, counts = torch.zeros_like(view.visual), [], []
        for b in range(batch):
            columns = view.visual[b].nonzero()[:, 0]
            n = int(len(columns) * share * (1 - 0.25 * (b // self.copies % 3)))
            order = columns[score[b, columns].argsort(descending=True)]
            keep[b, order[:n]] = True
            c = min(clusters + b // self.copies, len(columns) - n) if clusters else 0
            groups = [order[n:][i::c] for i in range(c)]
            merged.append([view.hidden[b, g].mean(0) for g in groups])
            counts.append(c)
        lengths = [t + int(keep[b].sum()) + counts[b] for b, t in enumerate(view.n_other)]
        if not any(counts):
            return assemble(keep, view.visual, view.valid, lengths)
        rows = view.hidden.new_zeros(batch, max(counts), view.hidden.shape[2])
        for b, values in enumerate(merged):
            for c, value in enumerate(values):
                rows[b, c] = value
        return assemble(keep, view.visual, view.valid, lengths, rows, counts)


SCRIPT = {-1: (0.9, 0), 1: (0.7, 2), 2: (0.6, 0), 3: (0.0, 1), 5: (0.5, 0)}
"""Cuts before the first layer, with and without merged tokens, of all visual tokens, and after the last layer."""
