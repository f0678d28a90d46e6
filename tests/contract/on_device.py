"""Run every method on the CPU and on the stand-in for a GPU, and print as JSON what differs.

python -m tests.contract.on_device hf
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

import llava_prune
from tests import models
from tests.contract.settings import NAMES, setting
from tests.device import DEVICE, StandIn, standing_in, waits

MODELS: dict[str, Callable[[], Any]] = {
    "hf": models.tiny_hf,
    "llava": models.tiny_llava,
    "next": models.tiny_next,
    "llava-anyres": lambda: models.tiny_llava(anyres=True),
}
CROPS = ("next", "llava-anyres")
SIZES = [(2 * models.SIDE, models.SIDE), (models.SIDE, 2 * models.SIDE - 9)]
ROWS = [models.prompt(4, 5), models.prompt(6, 9, seed=1)]


def given(family: str, model: Any, n: int) -> dict[str, Any]:
    """Return the inputs of the first `n` prompts."""
    if family in CROPS:
        return models.inputs(model, ROWS[:n], [models.crops(s, i) for i, s in enumerate(SIZES[:n])], SIZES[:n])
    return models.inputs(model, ROWS[:n], models.pixels(n))


def answer(model: Any, inputs: dict[str, Any], name: str, hyper: dict[str, Any]) -> tuple[Any, Any, list[str]]:
    """Return the kept tokens of each layer, the new ids, and the waits of the request."""
    with llava_prune.pruned(model, name, **hyper) as handle:
        waits.clear()
        ids = models.generate(model, inputs, 3).sequences
        waited = list(waits)
        kept = [k.tolist() for k in handle.last.kept]
    return kept, (ids.inner if isinstance(ids, StandIn) else ids).tolist(), waited


def compare(family: str) -> dict[str, Any]:
    """Return {"method, batch n": {"kept": equal, "ids": equal, "waits": waits}}; a refused method is left out."""
    here = MODELS[family]()
    with standing_in():
        there = copy.deepcopy(here).to(DEVICE)
    out: dict[str, Any] = {}
    for name in NAMES:
        hyper = setting(name).hyper
        if family in CROPS and "tokens" in hyper:
            hyper = {**hyper, "tokens": 30}
        for n in (1, 2):
            inputs = given(family, here, n)
            try:
                kept, ids, _ = answer(here, inputs, name, hyper)
            except ValueError:  # methods that do not work on crops
                continue
            with standing_in():
                moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
                got = answer(there, moved, name, hyper)
            out[f"{name}, batch {n}"] = {"kept": got[0] == kept, "ids": got[1] == ids, "waits": sorted(got[2])}
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(compare(sys.argv[1])))
