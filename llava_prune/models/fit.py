"""Whether the weights of a checkpoint are those that its config asks for; nothing is allocated here."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

Shapes = Mapping[str, tuple[int, ...]]
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
UNUSED = ("inv_freq", "position_ids")
"""Ends of the names of buffers that old checkpoints hold and models compute."""


def refuse_spare(names: Iterable[str], source: str, place: str = "a LLaVA with this language model") -> None:
    """Refuse weights that the model has no place for, as attention biases.

    Raises:
        ValueError: naming the first of them.
    """
    spare = sorted(n for n in names if not n.endswith(UNUSED))
    if spare:
        raise ValueError(
            f"{source}: {len(spare)} tensors have no place in {place}, first {spare[0]}; this is a checkpoint of "
            "another architecture, which is not supported"
        )


def refuse_missing(names: Iterable[str], source: str) -> None:
    """Refuse a model that would keep random weights.

    Raises:
        ValueError: naming the first of them.
    """
    missing = sorted(n for n in names if not n.endswith(UNUSED))
    if missing:
        raise ValueError(f"{source}: {len(missing)} tensors are missing, first {missing[0]}")


def refuse_sizes(mismatched: Iterable[Any], source: str) -> None:
    """Refuse tensors of another size than the config asks for.

    Args:
        mismatched: (name, shape in the file, shape in the model) each, as transformers reports them.
        source: where they are.

    Raises:
        ValueError: naming the first of them.
    """
    for name, found, wanted in sorted(mismatched):
        raise ValueError(f"{source}: {name} has shape {tuple(found)}, the config asks for {tuple(wanted)}")


def check_depth(stored: Shapes, depth: int, source: str, tower: bool | None = None) -> None:
    """Refuse a config of another number of layers than the weights have, before a model is built from it.

    Args:
        stored: name -> shape of the weights.
        depth: what the config says.
        source: where they are.
        tower: count the layers of the vision tower (True) or the language model (False) in a whole model; None where
            the weights are of one of them alone.

    Raises:
        ValueError: with both numbers.
    """
    names = (n for n in stored if tower is None or ("vision" in n) == tower)
    found = len({m[1] for m in map(LAYER.search, names) if m})
    if found != depth:
        raise ValueError(f"{source}: num_hidden_layers is {depth} in the config, the weights have {found} layers")


def check_elements(build: Any, config: Any, stored: Shapes, source: str) -> None:
    """Refuse a config of a far larger model than the weights make up, before memory is asked for.

    Args:
        build: the model's class.
        config: its config.
        stored: name -> shape of the weights.
        source: where they are.

    Raises:
        ValueError: with both numbers.
    """
    with torch.device("meta"):
        empty = build._from_config(copy.deepcopy(config), attn_implementation="eager")
    wanted = sum(p.numel() for p in empty.parameters())
    found = sum(math.prod(shape) for shape in stored.values())
    if wanted > 2 * found:  # less is told tensor by tensor
        raise ValueError(f"{source}: the config asks for {wanted:,} parameters, the weight files hold {found:,}")
