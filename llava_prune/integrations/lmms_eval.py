"""The model `llava_prune` of lmms-eval: any checkpoint supported by this package, pruned by any of its methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from tqdm import tqdm

from .. import attach, load
from ..eval.asking import auto_batch, check_loaded
from ..eval.protocol import protocol_of
from .answering import Prompt, answers, one_run, prepared

GREEDY = {"do_sample": (False, None), "temperature": (0, None), "num_beams": (1, None)}
"""Generation argument -> its values under greedy search."""
IGNORED = ("until", "top_p")
"""Generation arguments that do not affect greedy answers. lmms-eval's own LLaVA ignores `until` as well."""


class LlavaPrune(lmms):
    """A pruned model.

    Prompts and preprocessing are those of `llava-prune eval`. lmms-eval builds the text of a question and scores the
    answers.

    Args:
        pretrained: checkpoint folder or hub id.
        method: name of a method; "full" for the unpruned model.
        tokens: visual token budget, 64 by default; methods without a budget ignore it.
        batch_size: batch size, or "auto".
        device: device of a single process; with several processes, each has a GPU of its own.
        max_batch_size: not used.
        family, dtype, attn, model_base, device_map, load_8bit, load_4bit: see `llava_prune.load`.
        conv_mode: conversation template that replaces the checkpoint's own, see `llava-prune eval --conv-mode`.
        hyper: hyper-parameters of the method.

    Raises:
        ValueError: for an unsupported checkpoint, an unknown method or an invalid budget.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        method: str = "autoprune",
        tokens: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: Any = None,
        family: Any = "auto",
        dtype: str | None = None,
        attn: str | None = None,
        model_base: str | None = None,
        device_map: str | None = None,
        load_8bit: bool = False,
        load_4bit: bool = False,
        conv_mode: str | None = None,
        **hyper: Any,
    ) -> None:
        super().__init__()
        run = one_run(method, tokens, hyper)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available() or device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 or device in (None, "cuda"):
            device = str(self.accelerator.device)
        self.protocol = protocol_of(pretrained, conv_mode)
        self.loaded = load(
            pretrained, family=family, dtype=dtype, device=None if device_map else device, attn=attn,
            model_base=model_base, device_map=device_map, load_8bit=load_8bit, load_4bit=load_4bit,
        )  # fmt: skip
        check_loaded(self.loaded, pretrained, [run], self.protocol)
        self.handle = attach(self.loaded.model, run.method)
        self.batch_size = None if batch_size == "auto" else int(batch_size)

    @property
    def device(self) -> torch.device:
        """Device of the tensors that the processes of lmms-eval exchange."""
        return self.loaded.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests greedily; return the answers in the order of the requests.

        Raises:
            ValueError: for sampling, beam search, and unsupported arguments of generate().
        """
        said = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="llava-prune", disable=self.rank != 0)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].args[0]), reverse=True)
        groups: dict[str, list[int]] = {}
        for i in order:
            groups.setdefault(json.dumps(requests[i].args[1], sort_keys=True, default=str), []).append(i)
        for some in groups.values():
            limit = new_tokens(requests[some[0]].args[1])
            at = 0
            while at < len(some):
                first = self._prompt(requests[some[at]])
                size = self.batch_size or auto_batch(self.loaded, len(first.ids) + limit)
                batch = some[at : at + size]
                prompts = [first, *(self._prompt(requests[i]) for i in batch[1:])]
                for i, text in zip(batch, self._answers(prompts, limit), strict=True):
                    said[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args[:2], text)
                at += len(batch)
                bar.update(len(batch))
        bar.close()
        return said

    def _prompt(self, request: Any) -> Prompt:
        context, _, images_of, doc_id, task, split = request.args
        images = [x for x in images_of(self.task_dict[task][split][doc_id]) or () if x is not None]
        return prepared(context, images, self.protocol, self.loaded)

    def _answers(self, prompts: Sequence[Prompt], limit: int) -> list[str]:
        """Answer prompts with and without images separately, since a batch has images in all prompts or in none."""
        out = [""] * len(prompts)
        for with_images in (True, False):
            some = [i for i, p in enumerate(prompts) if bool(p.images) == with_images]
            if not some:
                continue
            said = answers([prompts[i] for i in some], self.protocol, self.loaded, limit)
            for i, text in zip(some, said, strict=True):
                out[i] = text
        return out

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Refuse requests for log-likelihoods.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "llava_prune answers questions and computes no log-likelihoods: positions of the answer would differ "
            "between layers; choose a task with output_type generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Refuse requests of several rounds.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("llava_prune answers one question at a time; choose a task of a single round")


def new_tokens(given: Mapping[str, Any]) -> int:
    """Return the largest number of new tokens of generation arguments; refuse anything but greedy search.

    Raises:
        ValueError: for other arguments.
    """
    for name, values in GREEDY.items():
        if given.get(name, values[0]) not in values:
            raise ValueError(
                f"{name}={given[name]}: llava_prune searches greedily; give --gen_kwargs {name}={values[0]}"
            )
    unknown = sorted(set(given) - {*GREEDY, *IGNORED, "max_new_tokens"})
    if unknown:
        raise ValueError(f"generation argument {unknown[0]}={given[unknown[0]]!r} is not supported; leave it out")
    return int(given.get("max_new_tokens", 1024))
