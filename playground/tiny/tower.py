"""Training stage 1: the vision tower, supervised densely on its features and through CLS."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from playground.tiny.data import SceneData, windows
from playground.tiny.loop import run_stage, share
from playground.tiny.model import Tower, TowerHeads
from playground.tiny.scenes import GRID

KEYS = ("shape", "colour", "size", "mark")


def _presence_loss(out: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Return the multi-label loss of the objects in the image."""
    bce = F.binary_cross_entropy_with_logits(out, present, reduction="none", pos_weight=out.new_tensor(3.0))
    return bce.sum(-1).mean() / 8


def feature_loss(
    heads: TowerHeads, feature: torch.Tensor, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss of the feature layer: attributes, centre and place of every patch, and presence from CLS."""
    *logits, centre, points = heads.dense(feature[:, 1:]).split([*heads.SIZES.values(), 1, 4], -1)
    fg, valid = batch["foreground"], ~batch["ignore"]
    weight = torch.where(fg, 1.0, 0.3) * valid
    weight = weight / weight.sum()
    loss, figures = feature.new_zeros(()), {}
    for key, out in zip(KEYS, logits, strict=True):
        ce = F.cross_entropy(out.flatten(0, 1), batch[key].flatten(), ignore_index=-100, reduction="none")
        stress = 1.5 * torch.where(batch["mark"] > 0, 8.0, 1.0) if key == "mark" else {"shape": 1.5}.get(key, 1.0)
        loss = loss + (ce * (weight * stress).flatten()).sum()
        chosen = fg & valid & (batch["mark"] > 0 if key == "mark" else fg)
        figures[key] = (out.argmax(-1) == batch[key])[chosen].float().mean().item()
    bce = F.binary_cross_entropy_with_logits(
        centre[..., 0], batch["centre"], reduction="none", pos_weight=centre.new_tensor(4.0)
    )
    loss = loss + 2 * (bce * weight).sum()
    far = F.smooth_l1_loss(points, torch.cat([batch["own"], batch["goal"]], -1), reduction="none", beta=0.1).mean(-1)
    loss = loss + 2 * (far * weight).sum()
    figures["offset"] = (points[..., 2:] - batch["goal"]).abs()[fg & valid].mean().item()
    present = heads.cls_feature(feature[:, 0])
    figures["cls"] = torch.sigmoid(present)[batch["present"] > 0].mean().item()
    return loss + _presence_loss(present, batch["present"]), figures


def tower_loss(
    tower: Tower, heads: TowerHeads, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss of one batch of windows, and the metrics to log."""
    feature, last, cls = tower(batch["patches"], batch["ids"], want=True)
    loss, figures = feature_loss(heads, feature, batch)
    present = heads.cls_last(tower.post_layernorm(last[:, 0]))
    figures["end"] = torch.sigmoid(present)[batch["present"] > 0].mean().item()
    figures["on_things"] = (cls[:, 1:] * batch["foreground"]).sum().item() / cls[:, 1:].sum().item()
    figures["area"] = batch["foreground"].float().mean().item()
    return loss + _presence_loss(present, batch["present"]), figures


def train_tower(cfg: dict[str, Any], data: SceneData, folder: Path, seed: int, device: str) -> Tower:
    """Train the tower on windows, then on whole images, and finally polish it on whole images."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"tower": Tower(**cfg["model"]), "heads": TowerHeads(cfg["model"]["width"])}).to(device)

    def step(window_steps: int, index: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        whole = index >= window_steps
        size, count = (GRID, cfg["whole_batch"]) if whole else (cfg["window"], cfg["window_batch"])
        batch = windows(data, rng.integers(0, len(data), share(count)), size, rng)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            return tower_loss(model["tower"], model["heads"], {k: v.to(device) for k, v in batch.items()})

    if not (folder / "polish.pt").exists():
        run_stage("tower", model, functools.partial(step, cfg["window_steps"]), cfg, folder, seed)
    run_stage("polish", model, functools.partial(step, 0), {**cfg, **cfg["polish"]}, folder, seed)
    return model["tower"]
