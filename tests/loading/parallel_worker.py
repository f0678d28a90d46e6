"""One process of a tensor-parallel group, which saves its answers with every method. See test_parallel.py."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path
from typing import Any

import torch

import llava_prune
from llava_prune.eval import identity
from llava_prune.models.load import Loaded
from tests import models
from tests.contract.settings import NAMES, setting

LIMIT = 120
"""Seconds after which the process prints its stack and ends, in case it waits for the others."""
ROWS = [models.prompt(4, 5), models.prompt(7, 3, seed=1)]


def answers(loaded: Loaded, model: Any = None) -> dict[str, Any]:
    """Return method -> (logits, kept tokens, new ids) of a batch of two, or the error of a method that is refused."""
    out: dict[str, Any] = {}
    for name in NAMES:
        try:
            with llava_prune.pruned(model or loaded.model, name, **setting(name).hyper) as handle:
                given = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
                got = loaded.generate(ROWS, models.pixels(2), **given)
                kept = [k.tolist() for k in handle.last.kept]
                out[name] = torch.stack(got.logits), kept, got.sequences.tolist()
        except ValueError as error:
            out[name] = str(error)
    return out


def _loaded(engine: str, folder: Path, family: Any) -> tuple[Loaded, Any]:
    """Return the loaded model, and the model to which methods are attached."""
    if engine != "own":
        loaded = llava_prune.load(folder, family=family, dtype="float32", engine=engine)
        return loaded, loaded.model
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    loaded = llava_prune.load(folder, family=family, dtype="float32", device="cpu")
    made = deepspeed.init_inference(loaded.model, tensor_parallel={"tp_size": 2}, dtype=torch.float32)
    return loaded, made  # the vision tower is split as well


def main() -> None:
    engine, family, folder, out = sys.argv[1:]
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    loaded, model = _loaded(engine, Path(folder), family)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with llava_prune.pruned(model, "autoprune", tokens=12) as handle:
        for _ in range(2):
            loaded.generate(ROWS, models.pixels(2), max_new_tokens=2)
            if rank == 0:  # only one process reads the record
                assert handle.last.kept
    found = {"answers": answers(loaded, model), "weights": identity.weights(loaded.model), "engine": loaded.engine}
    torch.save(found, Path(out) / f"{rank}.pt")


if __name__ == "__main__":
    main()
