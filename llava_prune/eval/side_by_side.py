"""A question answered by the unpruned model and by two methods, and what the page of `demo` shows of it."""

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
from ..report.overlay import counted
from .asking import check_loaded, out_of_memory
from .images import open_rgb
from .kept import ask, flops_text
from .protocol import Protocol
from .task import load_task

log = logging.getLogger(__name__)

NAMES = ("Unpruned", "A", "B")
"""Names of the answers on the page."""
EXAMPLES = 4
"""Questions of the benchmark files that the page offers."""
SMALLEST, LARGEST = 448, 1200
"""Pixels of the longer side of an overlay on the page; smaller and larger ones are resized."""


@dataclass(frozen=True)
class Shown:
    """What one question of the page found.

    Attributes:
        image: the image, RGB.
        padded: see `Protocol.padded`.
        answers, records: of the unpruned model and of each method; see `kept.ask`.
    """

    image: Any
    padded: bool | None
    answers: list[dict[str, Any]]
    records: list[Any]

    def label(self, number: int) -> str:
        """Name of an answer, 0 being the unpruned model's: "A: autoprune-64"."""
        return f"{NAMES[number]}: {self.answers[number]['name']}" if number else NAMES[0]

    def overlay(self, number: int, layer: int) -> tuple[Any, str]:
        """The image with the patches that a method keeps after a layer, and what it shows in words.

        Args:
            number: of the answer; 1 is A's.
            layer: decoder layer.
        """
        record, answer = self.records[number], self.answers[number]
        drawn = record.draw(self.image, layer, padded=self.padded)
        factor = -(-SMALLEST // max(drawn.size))
        if factor > 1:
            drawn = drawn.resize((drawn.width * factor, drawn.height * factor))
        drawn.thumbnail((LARGEST, LARGEST))
        _, merged = record.remaining(layer)
        words = f"{answer['name']} {counted(layer, answer['leaving'][layer], len(merged))}"
        about = record.describe()
        return drawn, f"{words}; {about}" if ":" in about else words

    def facts(self, number: int) -> str:
        """Tokens, FLOPs and times of an answer as an HTML table; see `label`."""
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
        """Visual tokens leaving each layer, one row for each answer and layer."""
        return [
            {"layer": layer, "tokens": tokens, "model": name}
            for name, answer in zip(NAMES, self.answers, strict=True)
            for layer, tokens in enumerate(answer["leaving"])
        ]


@dataclass(frozen=True)
class SideBySide:
    """A loaded model and what the page asks it.

    Attributes:
        loaded: see `llava_prune.load`.
        model: the checkpoint, for messages.
        protocol: prompts and preprocessing.
        new: largest number of new tokens of an answer.
        hyper: hyper-parameters for every method that has them.
        seed: random seed of methods that draw.
    """

    loaded: Any
    model: str
    protocol: Protocol
    new: int = 64
    hyper: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def runs(self, chosen: Sequence[tuple[str, str]]) -> list[Run]:
        """The methods of the page.

        Args:
            chosen: name and budget of each, a number of visual tokens or a share of them, as 64 or 11%.

        Raises:
            ValueError: for an unknown method, or a budget that it cannot have.
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
            image: image file, None where none was given.
            question: text of the user.
            short: add LLaVA's instruction for short answers.
            chosen: see `runs`.

        Raises:
            ValueError: for what the user can mend, in one line.
        """
        if image is None:
            raise ValueError("no image given; upload one, or choose an example")
        opened = open_rgb(image, Path(image).name)
        runs = self.runs(chosen)
        answers, records = ask(self.loaded, opened, self.protocol, question, runs, self.new, short)
        return Shown(opened, self.protocol.padded, answers, records)


def message(error: Exception) -> str:
    """What the page says about an error; one that is not the user's is logged with its traceback."""
    if isinstance(error, ValueError):
        return " ".join(str(error).split())
    log.error("a question of the page failed", exc_info=error)
    if out_of_memory(error):
        return "out of memory; use a smaller --dtype or another --device"
    detail = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{detail[:200]} (the terminal has the details)"


def examples(data: str) -> list[list[Any]]:
    """Image, question and `short` of questions about different images; none where GQA's files are absent."""
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
