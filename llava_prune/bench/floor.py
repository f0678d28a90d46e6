"""Lower bounds of the prefill and decoding time on a machine, from arithmetic and memory traffic."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.counts import layer_flops
from .flops import Size
from .latency import Clock


@dataclass(frozen=True)
class Machine:
    """Measured peak rates of a device.

    Attributes:
        flops: floating-point operations per second of a matrix product; a multiply-add counts as two.
        bandwidth: bytes per second of a large copy, counting bytes read and bytes written.
    """

    flops: float
    bandwidth: float


def measure_machine(device: torch.device, dtype: torch.dtype, tokens: int, size: Size) -> Machine:
    """Measure the fastest product of `tokens` rows with an MLP weight of the model, and the fastest copy."""
    clock = Clock(device)
    rows = torch.randn(tokens, size.hidden, device=device).to(dtype)
    weight = torch.randn(size.intermediate, size.hidden, device=device).to(dtype)
    source = torch.ones(1 << 25, dtype=torch.float32, device=device)  # 128 MiB
    target = torch.empty_like(source)
    product = _best(clock, lambda: torch.nn.functional.linear(rows, weight))
    copy = _best(clock, lambda: target.copy_(source))
    return Machine(2 * tokens * weight.numel() / product, 2 * source.nbytes / copy)


def _best(clock: Clock, call: Callable[[], Any], times: int = 10, seconds: float = 1.0) -> float:
    """Return the seconds of the fastest of up to `times` calls."""
    best, began = float("inf"), time.perf_counter()
    for i in range(times + 1):
        clock.wait()
        start = clock.mark()
        call()
        end = clock.mark()
        clock.wait()
        if i:  # the first call warms up
            best = min(best, clock.ms(start, end) / 1000)
        if i and time.perf_counter() - began > seconds:
            break
    return best


def layer_bytes(size: Size, cached: float, width: int) -> float:
    """Return the least bytes that a decoder layer moves: its weights once, and the KV cache of `cached` tokens.

    Args:
        size: the model.
        cached: tokens in the layer's cache, summed over the samples.
        width: bytes of a value.
    """
    weights = 4 * size.hidden**2 + 3 * size.hidden * size.intermediate
    return width * (weights + 2 * cached * size.hidden)


def prefill_floor(counts: Sequence[Sequence[float]], size: Size, width: int, machine: Machine) -> float:
    """Return a lower bound of a prefill in milliseconds: for each layer, the longer of arithmetic and memory traffic.

    Args:
        counts: tokens (visual and text) of each sample (outer) in each layer (inner).
        size: the model.
        width: bytes of a value.
        machine: see `measure_machine`.
    """
    total = 0.0
    for layer in zip(*counts, strict=True):
        arithmetic = sum(2 * _causal(n, size) for n in layer) / machine.flops
        total += max(arithmetic, layer_bytes(size, sum(layer), width) / machine.bandwidth)
    return 1000 * total


def _causal(n: float, size: Size) -> float:
    """Return equation (2) for one layer with half of its attention: causal attention computes one triangle only."""
    return layer_flops(n, size.hidden, size.intermediate) - n**2 * size.hidden


def decode_floor(counts: Sequence[Sequence[float]], size: Size, width: int, machine: Machine) -> float:
    """Return a lower bound of a decoding step in milliseconds, given the tokens cached in each layer."""
    total = 0.0
    for layer in zip(*counts, strict=True):
        arithmetic = sum(2 * layer_flops(1, size.hidden, size.intermediate) for _ in layer)
        arithmetic += sum(4 * n * size.hidden for n in layer)
        total += max(arithmetic / machine.flops, layer_bytes(size, sum(layer), width) / machine.bandwidth)
    return 1000 * total
