"""What a pruned prefill reads from the device: two small tables, however many layers there are, and no `nonzero`."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llava_prune
from tests import models

READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero")
SEARCHES = ("aten.nonzero", "masked_select", "unique", "_local_scalar_dense")


class _Searches(TorchDispatchMode):
    """Operators whose result's size depends on values; a GPU waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        masked = "index.Tensor" in name and any(t is not None and t.dtype == torch.bool for t in args[1])
        if masked or any(word in name for word in SEARCHES):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def reads() -> Iterator[list[str]]:
    """Reads of tensors in the block, as the innermost function of ours or theirs that made them."""
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            stock = getattr(torch.Tensor, name)

            def read(self: Any, *args: Any, _stock: Any = stock, **kwargs: Any) -> Any:
                frame = traceback.extract_stack(limit=2)[0]
                found.append(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.name}")
                return _stock(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, read)
        yield found


def batch(model: Any) -> dict[str, Any]:
    """Two samples of unequal length."""
    return models.inputs(model, [models.prompt(5, 9), models.prompt(3, 6, seed=1)], models.pictures(2))


def count(model: Any, given: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(reads, searches) while the language model works on a prefill."""
    lm, found, searches = models.language_model(model), [], _Searches()
    open_blocks: list[Any] = []

    def enter(*_: Any) -> None:
        for block in (reads(), searches):
            open_blocks.append(block)
            got = block.__enter__()
            if isinstance(got, list):
                found.append(got)

    def leave(*_: Any) -> None:
        while open_blocks:
            open_blocks.pop().__exit__(None, None, None)

    hooks = [lm.register_forward_pre_hook(enter), lm.register_forward_hook(leave)]
    try:
        with torch.inference_mode():
            model(**given, use_cache=True)
    finally:
        leave()
        for hook in hooks:
            hook.remove()
    return found[0], searches.found


@pytest.mark.parametrize("method", ["autoprune", "autoprune-flash"])
@pytest.mark.parametrize("samples", [1, 2])
def test_two_reads_a_prefill(method: str, samples: int, tiny: Any) -> None:
    """The lengths of the request before the first layer, and the mutual information in layer 1."""
    given = batch(tiny) if samples == 2 else models.inputs(tiny, [models.prompt(5, 9)], models.pictures(1))
    with llava_prune.pruned(tiny, method, tokens=10) as handle:
        found, searches = count(tiny, given)
    # transformers may look whether a mask hides anything; the budget search reads tensors of its own, on the host
    found = [x for x in found if not x.startswith("budget.py")]
    ours = [x for x in found if not x.startswith("masking_utils")]
    assert ours == ["loop.py:_read_lengths", "autoprune.py:_plan"]
    assert samples == 2 or found == ours
    assert [x for x in searches if "_local_scalar_dense" not in x] == []
    assert int(handle.last.tokens_out[0, -1]) < 36


def test_the_counter_counts() -> None:
    """Every kind of read and search is seen."""
    values = torch.arange(3)
    with reads() as found, _Searches() as searches:
        _ = (bool(values[0]), int(values[1]), values.tolist(), values.sum().item(), values[values > 1], values.cpu())
    assert len(found) == 5 and all("test_the_counter_counts" in x for x in found)
    assert any("index.Tensor" in x for x in searches.found)
