"""The seeded, resumable optimisation loop of all training stages."""

from __future__ import annotations

import importlib.util
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
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

log = logging.getLogger(__name__)
Step = Callable[[int, np.random.Generator], tuple[torch.Tensor, dict[str, float]]]


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of processes (0 and 1 without ``torchrun``)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    """Wait for all other processes."""
    if dist.is_initialized():
        dist.barrier()


def share(batch: int) -> int:
    """Return this process's share of a global batch."""
    return max(1, batch // ranks()[1])


def average_gradients(modules: nn.Module) -> None:
    """Average the gradients over all processes."""
    world = ranks()[1]
    if world > 1:
        grads = [p.grad for p in modules.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for grad, mean in zip(grads, (flat / world).split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))


def deepspeed_engine(modules: nn.Module, opt: torch.optim.Optimizer) -> Any:
    """Return DeepSpeed's engine if several GPUs share the batches and it is installed; None otherwise.

    With stage 0 every process keeps the whole optimiser, so checkpoints are the same with and without DeepSpeed.
    """
    if ranks()[1] == 1 or not torch.cuda.is_available() or importlib.util.find_spec("deepspeed") is None:
        return None
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0},
    }
    return deepspeed.initialize(model=modules, optimizer=opt, config=config)[0]


def update(modules: nn.Module, opt: torch.optim.Optimizer, loss: torch.Tensor, engine: Any) -> None:
    """Take one optimiser step with gradients averaged over all processes and clipped to norm 1."""
    if engine is not None:
        engine.backward(loss)
        engine.step()
        return
    opt.zero_grad()
    loss.backward()
    average_gradients(modules)
    nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
    opt.step()


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the learning rate: linear warm-up, then a cosine schedule down to 3 % of the peak."""
    ramp = min(1.0, (step + 1) / max(1, warmup))
    return peak * ramp * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))


def optimiser(modules: nn.Module, peak: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in modules.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in modules.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))


def _save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically, so that an interruption never leaves half a file."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def run_stage(name: str, modules: nn.Module, step_fn: Step, cfg: dict[str, Any], folder: Path, seed: int) -> None:
    """Optimise ``modules`` for ``cfg['steps']`` steps, resuming from ``folder/name.pt`` if that exists.

    Every step draws from a generator seeded by (seed, stage, step, rank), so a resumed run sees the same batches as an
    uninterrupted one. Under ``torchrun`` every process takes its share of each batch.
    """
    path, steps = folder / f"{name}.pt", int(cfg["steps"])
    opt = optimiser(modules, cfg["lr"])
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["modules"])
        first = int(state["step"])
        if first < steps and "optimiser" in state:  # shipped checkpoints hold weights only
            opt.load_state_dict(state["optimiser"])
        log.info("stage %s continues at step %d", name, first)
    tag = sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31
    sums: dict[str, list[float]] = defaultdict(list)
    began = time.perf_counter()
    rank, engine = ranks()[0], deepspeed_engine(modules, opt)
    for step in tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=10, disable=rank > 0):
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, steps, cfg["lr"], cfg.get("warmup", 100))
        loss, figures = step_fn(step, np.random.default_rng([seed, tag, step, rank]))
        update(modules, opt, loss, engine)
        for key, value in {"loss": loss.item(), **figures}.items():
            if not math.isnan(value):
                sums[key].append(value)
        if rank == 0 and ((step + 1) % cfg.get("log_every", 50) == 0 or step + 1 == steps):
            text = " ".join(f"{k} {np.mean(v):.3f}" for k, v in sums.items())
            log.info("%s %d/%d %.0fs %s", name, step + 1, steps, time.perf_counter() - began, text)
            sums.clear()
        if rank == 0 and ((step + 1) % cfg.get("save_every", 200) == 0 or step + 1 == steps):
            _save(path, {"modules": modules.state_dict(), "optimiser": opt.state_dict(), "step": step + 1})
    wait()
