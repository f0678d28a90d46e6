"""Shared parts of the plugins: build prompts under LLaVA's protocol from a toolkit's questions, and answer them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..eval.asking import stacked
from ..eval.prompt import IMAGE_MARK, bare
from ..eval.protocol import PROCESSOR, Protocol
from ..methods.planner import Run, cases, plan
from ..runtime.questions import questions

DEFAULT = 64
"""Budget if none is given."""


@dataclass(frozen=True)
class Prompt:
    """A question as the model is asked.

    Attributes:
        ids: token ids with -200 for each image.
        images: pixels of each image, see `Protocol.pixels`.
        sizes: (width, height) of each image.
        questions: text of the question, once for each image.
    """

    ids: list[int]
    images: list[Tensor]
    sizes: list[tuple[int, int]]
    questions: list[str]


def one_run(method: str, tokens: int | None, hyper: Mapping[str, Any]) -> Run:
    """Build the method that a toolkit names.

    Raises:
        ValueError: for an unknown method or hyper-parameter, an invalid budget, or a name of several methods.
    """
    runs = plan(cases([method], [DEFAULT if tokens is None else tokens], dict(hyper)))
    if len(runs) != 1:
        raise ValueError(f"method={method} names {len(runs)} methods; give one")
    return runs[0]


def prepared(text: str, images: Sequence[Any], protocol: Protocol, loaded: Any) -> Prompt:
    """Build the prompt of a question.

    Args:
        text: user text, instruction included. Images precede it unless it marks their places with "<image>".
        images: PIL images.
        protocol: protocol of the checkpoint.
        loaded: the model, see `llava_prune.load`.

    Raises:
        ValueError: if the text marks another number of images, or for several images or marked places with a checkpoint
            whose own chat template is used.
    """
    asked = text
    found = [image.convert("RGB") for image in images]
    marks = text.count(IMAGE_MARK)
    if marks not in (0, len(found)):
        raise ValueError(f"the text has {marks} {IMAGE_MARK} for {len(found)} images: {text[:80]!r}")
    if protocol.conv_mode == PROCESSOR and (marks or len(found) > 1):
        raise ValueError(f"{len(found)} images in a question: the chat template of the checkpoint is asked with one")
    if len(found) > 1 and not marks:
        text = f"{' '.join([IMAGE_MARK] * len(found))}\n{text}"
        marks = len(found)
    ids = protocol.token_ids(text, len(found) == 1 and not marks, loaded)
    pixels, sizes = [protocol.pixels(image, loaded) for image in found], [image.size for image in found]
    return Prompt(ids, pixels, sizes, [bare(asked)] * len(found))


def answers(prompts: Sequence[Prompt], protocol: Protocol, loaded: Any, limit: int) -> list[str]:
    """Answer prompts greedily; either all of them have images or none has.

    Args:
        prompts: the prompts.
        protocol, loaded: see `prepared`.
        limit: largest number of new tokens.
    """
    pixels = [x for p in prompts for x in p.images]
    sizes = [x for p in prompts for x in p.sizes]
    with questions([text for p in prompts for text in p.questions] or None):
        new = loaded.generate(
            [p.ids for p in prompts],
            stacked(pixels) if pixels else None,
            sizes=sizes if pixels and protocol.places_known else None,
            max_new_tokens=limit,
        )
    return [text.strip() for text in loaded.tokenizer.batch_decode(new, skip_special_tokens=True)]
