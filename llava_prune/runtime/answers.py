"""Checks of what the hooks of a method return."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from ..methods.base import Method, Requirement
from ..methods.checks import choice, shown
from ..methods.views import EVERY, VisionCut
from ..ops.selection import Cut


def check_attributes(method: Method) -> None:
    """Refuse other values of the attributes that choose a rule.

    Raises:
        ValueError: with the value and the choices.
    """
    choice("positions", method.positions, ("keep", "renumber"))
    choice("vision_positions", method.vision_positions, ("keep", "renumber", None))
    choice("decode", method.decode, ("original", "cache"))
    known = frozenset(get_args(Requirement))
    if not isinstance(method.requires, frozenset) or not method.requires <= known:
        raise ValueError(f"requires={shown(method.requires)}: must be a frozenset of {', '.join(sorted(known))}")


def check_vision_queries(method: Method, queries: Any, length: int) -> None:
    """Refuse anything but query positions of blocks of a tower with `length` positions.

    Raises:
        ValueError: with what the method returned.
    """
    named: list[Any] = list(queries.values()) if isinstance(queries, dict) else [None]
    lists = all(isinstance(q, list) and q and all(isinstance(n, int) for n in q) for q in named)
    if not lists or not all(q == [EVERY] or 0 <= min(q) <= max(q) < length for q in named):
        raise ValueError(
            f"{method!r}: vision_queries() is {shown(queries)}; must be block -> list of query positions from 0 to "
            f"{length - 1}, as {{22: [0]}}"
        )


def check_positions(method: Method, layer: int, wanted: Any, length: int, values: bool) -> None:
    """Refuse query positions that are neither None, nor a slice within the sequence, nor a long tensor (Q,).

    Args:
        method: the method.
        layer: the decoder layer.
        wanted: what `queries` returned.
        length: number of positions of the sequence.
        values: verify the positions of a tensor too, which synchronises.

    Raises:
        ValueError: with the positions and the length of the sequence.
    """
    if isinstance(wanted, slice):
        ends = wanted.start, wanted.stop
        fine = wanted.step in (None, 1) and all(isinstance(n, int) for n in ends) and 0 <= ends[0] < ends[1] <= length
    else:
        fine = wanted is None or isinstance(wanted, Tensor) and wanted.dtype == torch.long and wanted.ndim == 1
    if fine and values and isinstance(wanted, Tensor):
        fine = bool(((wanted >= 0) & (wanted < length)).all())
    if not fine:
        raise ValueError(
            f"{method!r}: queries({layer}) is {shown(wanted)}; must be a slice with start and stop from 0 to {length}, "
            "a long tensor (Q,) of such positions, or None"
        )


def check_form(method: Method, cut: Any, batch: int) -> None:
    """Refuse anything but a Cut of a batch; `check_cut` verifies its indices.

    Raises:
        ValueError: with what the method returned.
    """
    index = cut.index if isinstance(cut, Cut) else None
    if index is None or index.ndim != 2 or index.shape[0] != batch or index.dtype != torch.long:
        found = type(cut).__name__ if index is None else f"a Cut with index {tuple(index.shape)} {index.dtype}"
        raise ValueError(f"{method!r}: prune() returned {found}; must be a Cut with index ({batch}, L') long, or None")


def check_vision_cut(method: Method, cut: Any, features: Tensor, patches: int, values: bool) -> None:
    """Refuse a VisionCut whose shapes do not fit the (N, T, Dv) features of the images.

    Args:
        method: the method.
        cut: what `prune_vision` returned.
        features: features of the patches.
        patches: number of patches of an image or crop.
        values: verify counts and indices too, which synchronises.

    Raises:
        ValueError: with the shapes or values.
    """
    if not isinstance(cut, VisionCut):
        raise ValueError(f"{method!r}: prune_vision() returned {type(cut).__name__}; must be a VisionCut or None")
    (n, _, width), k = features.shape, cut.live.shape[-1]
    ids = cut.ids
    fits = cut.live.shape == (n, k) and cut.live.dtype == torch.bool and cut.features.shape == (n, k, width)
    if not fits or (k != patches if ids is None else ids.shape != (n, k) or ids.dtype != torch.long):
        given = f"{tuple(cut.live.shape)} {cut.live.dtype}", tuple(cut.features.shape)
        named = None if ids is None else f"{tuple(ids.shape)} {ids.dtype}"
        raise ValueError(
            f"VisionCut: live is {given[0]}, features {given[1]}, ids {named}; must be ({n}, K) bool, ({n}, K, "
            f"{width}), ({n}, K) long; without ids give {patches} tokens"
        )
    if values and cut.counts is not None:
        counted = cut.live.sum(1).tolist()
        if counted != list(cut.counts):
            raise ValueError(f"VisionCut: counts are {list(cut.counts)}, and live has {counted}")
    if values and ids is not None and not bool((ids[cut.live] < patches).all()):
        raise ValueError(f"VisionCut: ids name patch {int(ids[cut.live].max())}; there are {patches}")
