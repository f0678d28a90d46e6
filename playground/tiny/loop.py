"""One seeded, resumable optimisation loop shared by all stages."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

log = logging.getLogger(__name__)
Step = Callable[[int, np.random.Generator], tuple[torch.Tensor, dict[str, float]]]


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then cosine to 3 % of the peak."""
    ramp = min(1.0, (step + 1) / max(1, warmup))
    return peak * ramp * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))


def optimiser(modules: nn.Module, peak: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    matrices = [p for p in modules.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in modules.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))


def _save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that an interruption never leaves half a file."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def run_stage(name: str, modules: nn.Module, step_fn: Step, cfg: dict[str, Any], folder: Path, seed: int) -> None:
    """Optimise ``modules`` for ``cfg['steps']`` steps; continues from ``folder/name.pt`` when that exists.

    Every step draws from a generator seeded by (seed, stage, step), so a resumed run sees the batches the
    uninterrupted one would have seen.
    """
    path, steps = folder / f"{name}.pt", int(cfg["steps"])
    opt = optimiser(modules, cfg["lr"])
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["modules"])
        first = int(state["step"])
        if first < steps:
            opt.load_state_dict(state["optimiser"])
        log.info("stage %s continues at step %d", name, first)
    tag = sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31
    sums: dict[str, list[float]] = defaultdict(list)
    began = time.perf_counter()
    for step in tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=10):
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, steps, cfg["lr"], cfg.get("warmup", 100))
        loss, figures = step_fn(step, np.random.default_rng([seed, tag, step]))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        opt.step()
        for key, value in {"loss": loss.item(), **figures}.items():
            if not math.isnan(value):
                sums[key].append(value)
        if (step + 1) % cfg.get("log_every", 50) == 0 or step + 1 == steps:
            text = " ".join(f"{k} {np.mean(v):.3f}" for k, v in sums.items())
            log.info("%s %d/%d %.0fs %s", name, step + 1, steps, time.perf_counter() - began, text)
            sums.clear()
        if (step + 1) % cfg.get("save_every", 200) == 0 or step + 1 == steps:
            _save(path, {"modules": modules.state_dict(), "optimiser": opt.state_dict(), "step": step + 1})
