"""Device-to-host copies ("reads") of a pruned request: their number for every method, with any number of layers."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llava_prune
from llava_prune.methods.compose import split
from tests import models
from tests.contract.settings import NAMES, setting

READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero")
SEARCHES = ("aten.nonzero", "masked_select", "unique")
PROMPT = "prompt.py:_read"
"""The read of the prompt's lengths, before the first layer; `Loaded.generate` passes the lengths instead."""
BEYOND = {
    "autoprune": ["prefill.py:decide"],  # mutual information, after layer 1
    "autoprune-flash": ["prefill.py:decide"],
    "prumerge+": ["prumerge.py:choose"],  # how many outliers are grid points as well
}
"""Further reads of a method; a method that is not listed has none."""


def beyond(name: str) -> list[str]:
    """Return the reads of a method, or of both parts of a composition, besides that of the prompt."""
    parts = split(name, llava_prune.names().__contains__) or (name,)
    return [x for part in parts for x in BEYOND.get(part, [])]


CASES = [(name, setting(name).hyper, beyond(name)) for name in NAMES] + [
    ("prumerge", {"adaptive": True}, ["prumerge.py:choose"]),
    ("prumerge+", {"adaptive": True}, ["prumerge.py:choose"]),
    ("dart", {"keep": 12, "strict": True}, ["prefill.py:decide"]),
    ("cdpruner", {"tokens": 12, "strict": True}, ["cdpruner.py:refuse_repeats"]),
    ("sparsevlm", {"version": "1.0", "layers": (1, 2, 4), "scale": 1.5}, ["prefill.py:decide"] * 3),
]


class _Searches(TorchDispatchMode):
    """Records operators whose output size depends on values, which synchronise with a GPU."""

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
    """Record the reads of tensors in the block, each as the path and function that made it."""
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            stock = getattr(torch.Tensor, name)

            def read(self: Any, *args: Any, _stock: Any = stock, **kwargs: Any) -> Any:
                frame = traceback.extract_stack(limit=2)[0]
                found.append(f"{frame.filename}:{frame.name}")
                return _stock(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, read)
        yield found


HOST = ("autoprune.py:schedule", "autoprune.py:_search", "layout.py:_orders", "load.py:generate")
"""Functions that handle tensors on the host only: the budget search, the order of crops and the answer itself."""


def short(found: list[str]) -> list[str]:
    """Return the file and function of each read, without those of HOST."""
    names = [x.rsplit("/", 1)[-1] for x in found]
    return sorted(x for x in names if not x.startswith(HOST))


def ours(found: list[str]) -> list[str]:
    """Return the reads that the package itself makes; haotian-liu/LLaVA's splice makes many of its own."""
    return short([x for x in found if "/llava_prune/" in x])


@dataclass
class Watch:
    """The reads and searches in a block.

    Attributes:
        found: all reads.
        within: reads by any code while the language model runs.
        searches: operators with an output size that depends on values, while the language model runs.
        calls: number of runs of the language model.
    """

    found: list[str]
    within: list[str] = field(default_factory=list)
    searches: list[str] = field(default_factory=list)
    calls: int = 0


@contextmanager
def watching(model: Any, new: bool = False) -> Iterator[Watch]:
    """Watch reads in the block, and those of the language model in prefills, or with `new` in decoding steps."""
    lm, mode = models.language_model(model), _Searches()
    open_blocks: list[Any] = []

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        given = kwargs.get("inputs_embeds")
        length = (kwargs["input_ids"] if given is None else given).shape[1]
        if (length == 1) == new:
            watch.calls += 1
            open_blocks.append(len(watch.found))
            mode.__enter__()

    def leave(*_: Any) -> None:
        if open_blocks:
            watch.within += watch.found[open_blocks.pop() :]
            mode.__exit__(None, None, None)

    hooks = [lm.register_forward_pre_hook(enter, with_kwargs=True), lm.register_forward_hook(leave)]
    try:
        with reads() as found:
            watch = Watch(found, searches=mode.found)
            yield watch
    finally:
        leave()
        for hook in hooks:
            hook.remove()
    assert watch.calls, "the language model never ran"


ROWS = [models.prompt(5, 9), models.prompt(3, 6, seed=1)]


@pytest.mark.parametrize("known", [True, False], ids=["loaded", "tensors"])
@pytest.mark.parametrize(("name", "hyper", "besides"), CASES, ids=[f"{n}-{'-'.join(h)}" for n, h, _ in CASES])
def test_reads_of_a_prefill(name: str, hyper: Any, besides: list[str], known: bool, tiny: Any) -> None:
    """A prefill of two samples of unequal length reads what the method needs, and the prompt's lengths unless known."""
    with llava_prune.pruned(tiny, name, **hyper) as handle, watching(tiny) as seen:
        if known:
            models.loaded(tiny).generate(ROWS, models.pixels(2), max_new_tokens=1)
        else:
            with torch.inference_mode():
                tiny(**models.inputs(tiny, ROWS, models.pixels(2)), use_cache=True)
    assert ours(seen.found) == sorted(besides + ([] if known else [PROMPT]))
    in_layers = [x for x in besides if not x.startswith("prumerge")]  # prumerge reads in the vision tower
    assert short(seen.within) == sorted(in_layers + ([] if known else [PROMPT])), "transformers looks at nothing either"
    assert seen.searches == [] and seen.calls == 1
    assert handle.last is not None and int(handle.last.tokens_in[0, -1]) <= 36


@pytest.mark.parametrize("name", ["autoprune", "pdrop", "visionzip", "random"])
def test_a_new_token_reads_nothing(name: str, tiny: Any) -> None:
    """A decoding step reads nothing, although the samples keep different counts and every cut layer has a mask."""
    with llava_prune.pruned(tiny, name, **setting(name).hyper), watching(tiny, new=True) as seen:
        models.loaded(tiny).generate(ROWS, models.pixels(2), max_new_tokens=4)
    assert seen.within == [] and seen.searches == [] and seen.calls == 3


@pytest.mark.parametrize("name", ["autoprune", "visionzip", "prumerge"])
@pytest.mark.parametrize("family", ["next", "llava"])
def test_crops_need_no_further_read(name: str, family: str, tiny_models: Any) -> None:
    """Ordering the tokens of crops needs the patch of each token, which comes with the read of the prompt."""
    model = tiny_models["next"] if family == "next" else models.tiny_llava(anyres=True)
    size = (2 * models.SIDE, models.SIDE)
    given = models.inputs(model, [models.prompt(5, 9)], [models.crops(size)], [size])
    with llava_prune.pruned(model, name, tokens=30), reads() as found, torch.inference_mode():
        model(**given, use_cache=True)
    assert ours(found) == sorted([PROMPT, *beyond(name)])


@pytest.mark.parametrize("family", ["next", "llava"])
def test_hired_reads_counts_of_crops(family: str, tiny_models: Any) -> None:
    """HiRED reads the tokens that each crop keeps and, in transformers, the image sizes (usually on the host)."""
    model = tiny_models["next"] if family == "next" else models.tiny_llava(anyres=True)
    size = (2 * models.SIDE, models.SIDE)
    given = models.inputs(model, [models.prompt(5, 9)], [models.crops(size)], [size])
    with llava_prune.pruned(model, "hired", tokens=30), reads() as found, torch.inference_mode():
        model(**given, use_cache=True)
    assert ours(found) == sorted([PROMPT, "vision.py:compact", *(["hf.py:found"] if family == "next" else [])])


@pytest.mark.parametrize("known", [True, False], ids=["loaded", "tensors"])
def test_beams_and_blank_images(known: bool, tiny: Any) -> None:
    """The prompt lengths that `Loaded.generate` passes equal those read from the device."""
    from llava_prune.runtime import language, prompt

    rows = [models.prompt(4, 3), [1, 9, 8, 7], models.prompt(2, 6, images=2, seed=2)]
    seen = []
    stock = prompt.read_prompt

    def spy(*args: Any) -> Any:
        out, again = stock(*args), stock(*args[:-1], None)
        assert (args[-1] is not None) == known
        fields = ("n_visual", "n_other", "n_text", "least_text", "gaps")
        seen.append([[getattr(x, f) for f in fields] + [[list(c) for c in x.first]] for x in (out, again)])
        return out

    with pytest.MonkeyPatch.context() as patch, llava_prune.pruned(tiny, "visionzip", tokens=12):
        patch.setattr(language, "read_prompt", spy)
        if known:
            models.loaded(tiny).generate(rows, models.pixels(3), max_new_tokens=2, num_beams=2)
        else:
            models.generate(tiny, models.inputs(tiny, rows, models.pixels(3)), num_beams=2)
    assert len(seen) == 1 and seen[0][0] == seen[0][1]
    assert seen[0][0][0] in ((36, 0, 72), (36, 36, 0, 0, 72, 72))


def test_the_counter_counts() -> None:
    """The counters find reads and searches."""
    values = torch.arange(3)
    with reads() as found, _Searches() as searches:
        _ = (bool(values[0]), int(values[1]), float(values[1]), range(values[1]), values.tolist(), values.sum().item())
        _ = (values.cpu(), values.numpy(), values.nonzero())
        _ = (values[values > 1], values.masked_select(values > 1), values.unique())
    assert len(found) == len(READS) and all("test_the_counter_counts" in x for x in found)
    assert [any(word in x for x in searches.found) for word in ("index.Tensor", *SEARCHES)] == [True] * 4
