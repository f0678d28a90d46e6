"""Answer a question with the unpruned model and with two methods, and prepare the content of `demo`'s page."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from .. import arguments
from ..bench.flops import average_tokens
from ..methods.planner import Run, cases, plan
from ..methods.registry import resolve
from ..models.placement import out_of_memory
from ..report.overlay import counted
from .asking import check_loaded
from .images import open_rgb
from .kept import ask, flops_text
from .protocol import Protocol
from .task import load_task

log = logging.getLogger(__name__)

NAMES = ("Unpruned", "A", "B")
"""Names of the answers on the page."""
EXAMPLES = 4
"""Number of example questions on the page, taken from the benchmark files."""
SMALLEST, LARGEST = 448, 1200
"""Smallest and largest longer side of an overlay on the page, in pixels; other sizes are resized."""


@dataclass(frozen=True)
class Shown:
    """The answers to one question on the page.

    Attributes:
        image: the RGB image.
        protocol: prompt and preprocessing.
        answers, records: answers and records of the unpruned model and of each method; see `kept.ask`.
    """

    image: Any
    protocol: Protocol
    answers: list[dict[str, Any]]
    records: list[Any]

    def label(self, number: int) -> str:
        """Return the label of an answer, such as "A: autoprune-64". Number 0 is the unpruned model."""
        return f"{NAMES[number]}: {self.answers[number]['name']}" if number else NAMES[0]

    def overlay(self, number: int, layer: int) -> tuple[Any, str]:
        """Return the image with the patches that a method keeps after a layer, and its caption.

        Args:
            number: number of the answer; 1 is that of method A.
            layer: decoder layer.
        """
        record, answer = self.records[number], self.answers[number]
        drawn = record.draw(self.image, layer, padded=self.protocol.padded)
        factor = -(-SMALLEST // max(drawn.size))
        if factor > 1:
            drawn = drawn.resize((drawn.width * factor, drawn.height * factor))
        drawn.thumbnail((LARGEST, LARGEST))
        _, merged = record.remaining(layer)
        words = f"{answer['name']} {counted(layer, answer['leaving'][layer], len(merged))}"
        about = record.describe()
        return drawn, f"{words}; {about}" if ":" in about else words

    def facts(self, number: int) -> str:
        """Return tokens, FLOPs and times of an answer as an HTML table; for `number` see `label`."""
        found = self.answers[number]
        entering, leaving, ms = found["entering"], found["leaving"], found["ms"]
        rows = {
            "Visual tokens": f"{entering[0]} in, {leaving[-1]} out",
            "Entering a layer": f"{average_tokens(entering):.1f} on average",
            "Leaving a layer": f"{average_tokens(leaving):.1f} on average",
            "FLOPs": f"{found['percent']:.1f} %, {flops_text(found['tflops'])}",
            "Vision tower": f"{ms['vision']:.0f} ms",
            "Prefill": f"{ms['prefill']:.0f} ms",
            "Whole answer": f"{ms['total']:.0f} ms, {found['new']} new token{'s' * (found['new'] != 1)}",
        }
        body = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in rows.items())
        return f"<table>{body}</table>"

    def curves(self) -> list[dict[str, Any]]:
        """Return the visual tokens leaving each layer, one row for each answer and layer."""
        return [
            {"layer": layer, "tokens": tokens, "model": name}
            for name, answer in zip(NAMES, self.answers, strict=True)
            for layer, tokens in enumerate(answer["leaving"])
        ]


@dataclass(frozen=True)
class SideBySide:
    """A loaded model that answers the questions of the page.

    Attributes:
        loaded: the model, see `llava_prune.load`.
        model: the checkpoint, for messages.
        protocol: prompt and preprocessing.
        new: largest number of new tokens of an answer.
        hyper: hyper-parameters, which every method that has them receives.
        seed: random seed of randomised methods.
    """

    loaded: Any
    model: str
    protocol: Protocol
    new: int = 64
    hyper: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def runs(self, chosen: Sequence[tuple[str, str]]) -> list[Run]:
        """Build the methods of the page.

        Args:
            chosen: name and budget of each method. A budget is a number of visual tokens or a share, e.g. 64 or 11%.

        Raises:
            ValueError: for an unknown method, or an invalid budget.
        """
        out = []
        for name, budget in chosen:
            if not name:
                raise ValueError("no method chosen; choose one, such as autoprune")
            try:
                budgets = arguments.budgets(budget)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"budget of {name}: {error}") from error
            known = inspect.signature(resolve(name)[0]).parameters
            hyper = {k: v for k, v in self.hyper.items() if k in known}
            found = plan(cases([name], budgets, hyper, seed=self.seed, size=self.loaded.size))
            if len(found) != 1:
                raise ValueError(
                    f"{name} with a budget of {budget} gives {len(found)} runs; give one method and budget"
                )
            out += found
        check_loaded(self.loaded, self.model, out, self.protocol)
        return out

    def ask(self, image: str | None, question: str, short: bool, chosen: Sequence[tuple[str, str]]) -> Shown:
        """Answer a question with the unpruned model and with each method.

        Args:
            image: image file; None if none was given.
            question: text of the user.
            short: whether to add LLaVA's instruction for short answers.
            chosen: names and budgets, see `runs`.

        Raises:
            ValueError: for invalid input.
        """
        if image is None:
            raise ValueError("no image given; upload one, or choose an example")
        opened = open_rgb(image, Path(image).name)
        runs = self.runs(chosen)
        answers, records = ask(self.loaded, opened, self.protocol, question, runs, self.new, short)
        return Shown(opened, self.protocol, answers, records)


def message(error: Exception) -> str:
    """Return the page's message about an error. Errors other than ValueErrors are logged with their traceback."""
    if isinstance(error, ValueError):
        return " ".join(str(error).split())
    log.error("a question of the page failed", exc_info=error)
    if out_of_memory(error):
        return "out of memory; use a smaller --dtype or another --device"
    detail = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{detail[:200]} (the terminal has the details)"


def examples(data: str) -> list[list[Any]]:
    """Return image, question and `short` of example questions about different images; [] if GQA's files are missing."""
    task = load_task("gqa")
    folder = Path(data).expanduser() / "gqa"
    questions = folder / task.files["questions"].places[0]
    images = [folder / place for place in task.files["images"].places]
    if not questions.is_file():
        return []
    found: dict[str, list[Any]] = {}
    with questions.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            image = next((p / row["image"] for p in images if (p / row["image"]).is_file()), None)
            if image is not None and row["image"] not in found:
                found[row["image"]] = [str(image), row["text"].removesuffix(f"\n{task.suffix}"), True]
            if len(found) == EXAMPLES:
                break
    return list(found.values())
