"""Stage 1: the vision tower, supervised densely on its features and through CLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from playground.tiny.data import SceneData, windows
from playground.tiny.loop import run_stage
from playground.tiny.model import Tower, TowerHeads
from playground.tiny.scenes import GRID

KEYS = ("shape", "colour", "size", "mark")


def tower_loss(
    tower: Tower, heads: TowerHeads, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of one batch of windows and the figures worth logging."""
    feature, last, cls = tower(batch["patches"], batch["ids"], want=True)
    *logits, centre, points = heads.dense(feature[:, 1:]).split([*heads.SIZES.values(), 1, 4], -1)
    fg, valid = batch["foreground"], ~batch["ignore"]
    weight = torch.where(fg, 1.0, 0.3) * valid
    weight = weight / weight.sum()
    loss, figures = feature.new_zeros(()), {}
    for key, out in zip(KEYS, logits, strict=True):
        ce = F.cross_entropy(out.flatten(0, 1), batch[key].flatten(), ignore_index=-100, reduction="none")
        loss = loss + (ce * weight.flatten()).sum()
        chosen = fg & valid & (batch["mark"] > 0 if key == "mark" else fg)
        figures[key] = (out.argmax(-1) == batch[key])[chosen].float().mean().item()
    bce = F.binary_cross_entropy_with_logits(centre[..., 0], batch["centre"], reduction="none", pos_weight=torch.tensor(4.0))
    loss = loss + 2 * (bce * weight).sum()
    far = F.smooth_l1_loss(points, torch.cat([batch["own"], batch["goal"]], -1), reduction="none", beta=0.1).mean(-1)
    loss = loss + 2 * (far * weight).sum()
    figures["offset"] = (points[..., 2:] - batch["goal"]).abs()[fg & valid].mean().item()
    for name, out in (("cls", heads.cls_feature(feature[:, 0])), ("end", heads.cls_last(tower.post_layernorm(last[:, 0])))):
        bce = F.binary_cross_entropy_with_logits(out, batch["present"], reduction="none", pos_weight=torch.tensor(3.0))
        loss = loss + bce.sum(-1).mean() / 8
        found = torch.sigmoid(out)[batch["present"] > 0].mean().item()
        figures[name] = found
    figures["on_things"] = (cls[:, 1:] * fg).sum().item() / cls[:, 1:].sum().item()
    figures["area"] = fg.float().mean().item()
    return loss, figures


def train_tower(cfg: dict[str, Any], data: SceneData, folder: Path, seed: int, device: str) -> Tower:
    """Train the tower on windows, then on whole pictures, and return it."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"tower": Tower(**cfg["model"]), "heads": TowerHeads(cfg["model"]["width"])}).to(device)

    def step(index: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        whole = index >= cfg["window_steps"]
        size, count = (GRID, cfg["whole_batch"]) if whole else (cfg["window"], cfg["window_batch"])
        batch = windows(data, rng.integers(0, len(data), count), size, rng)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            return tower_loss(model["tower"], model["heads"], {k: v.to(device) for k, v in batch.items()})

    run_stage("tower", model, step, cfg, folder, seed)
    return model["tower"].eval()
