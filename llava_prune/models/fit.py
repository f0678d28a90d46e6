"""Check that the weights of a checkpoint fit its config, without allocating memory for weights."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

Shapes = Mapping[str, tuple[int, ...]]
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
UNUSED = ("inv_freq", "position_ids")
"""Suffixes of the names of buffers that old checkpoints contain and that models compute themselves."""


def check_positive(file: Path, name: str, value: Any) -> None:
    """Refuse an entry of a config that is not a positive integer.

    Raises:
        ValueError: with the file, the entry and its value.
    """
    if type(value) is not int or value < 1:
        raise ValueError(f"{file}: {name} is {value!r}; it must be a positive integer")


def refuse_spare(names: Iterable[str], source: str, place: str = "a LLaVA with this language model") -> None:
    """Refuse weights that do not belong to the model, such as attention biases.

    Raises:
        ValueError: with the first such tensor.
    """
    spare = sorted(n for n in names if not n.endswith(UNUSED))
    if spare:
        raise ValueError(
            f"{source}: {len(spare)} tensors have no place in {place}, first {spare[0]}; this is a checkpoint of "
            "another architecture, which is not supported"
        )


def refuse_missing(names: Iterable[str], source: str) -> None:
    """Refuse missing weights, which would leave random values in the model.

    Raises:
        ValueError: with the first missing tensor.
    """
    missing = sorted(n for n in names if not n.endswith(UNUSED))
    if missing:
        raise ValueError(f"{source}: {len(missing)} tensors are missing, first {missing[0]}")


def refuse_sizes(mismatched: Iterable[Any], source: str) -> None:
    """Refuse tensors whose sizes differ from the config.

    Args:
        mismatched: (name, shape in the file, shape in the model) of each tensor, as transformers reports them.
        source: the files, for the error message.

    Raises:
        ValueError: with the first such tensor.
    """
    for name, found, wanted in sorted(mismatched):
        raise ValueError(f"{source}: {name} has shape {tuple(found)}, the config asks for {tuple(wanted)}")


def check_depth(stored: Shapes, depth: int, source: str, tower: bool | None = None) -> None:
    """Refuse a config whose number of layers differs from that of the weights, before a model is built from it.

    Args:
        stored: name -> shape of the weights.
        depth: number of layers in the config.
        source: the files, for the error message.
        tower: count the layers of the vision tower (True) or of the language model (False) in a complete model; None if
            the weights are those of one of them alone.

    Raises:
        ValueError: if the numbers differ.
    """
    names = (n for n in stored if tower is None or ("vision" in n) == tower)
    found = len({m[1] for m in map(LAYER.search, names) if m})
    if found != depth:
        raise ValueError(f"{source}: num_hidden_layers is {depth} in the config, the weights have {found} layers")


def check_elements(build: Any, config: Any, stored: Shapes, source: str) -> None:
    """Refuse a config of a model that is more than twice as large as the weights, before memory is allocated.

    Args:
        build: the model's class.
        config: its config.
        stored: name -> shape of the weights.
        source: the files, for the error message.

    Raises:
        ValueError: if the config asks for more than twice the stored number of parameters.
    """
    with torch.device("meta"):
        empty = build._from_config(copy.deepcopy(config), attn_implementation="eager")
    wanted = sum(p.numel() for p in empty.parameters())
    found = sum(math.prod(shape) for shape in stored.values())
    if wanted > 2 * found:  # smaller differences are reported tensor by tensor later
        raise ValueError(f"{source}: the config asks for {wanted:,} parameters, the weight files hold {found:,}")
