"""`llava-prune show`: answer one question with and without pruning, and draw the kept patches."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llava_prune

from ..bench.flops import average_tokens, flops_with_text
from ..bench.latency import probing, timed
from ..console import emit, stdout
from ..methods.planner import REFERENCE, Run, cases, plan
from ..report.drawing import save
from .asking import check_loaded, context_of, load_model, stacked, too_long
from .command import settings_of
from .images import open_rgb
from .prompt import IMAGE_MARK
from .protocol import Protocol, protocol_of
from .task import load_task


def show(args: argparse.Namespace) -> int:
    """Run `llava-prune show` and return its exit status.

    Raises:
        ValueError: for bad input.
    """
    check_question(args.question)
    image = open_rgb(args.image.expanduser())
    runs = plan(cases([args.method], [args.tokens], args.method_args or {}, seed=args.seed))
    if len(runs) != 1:
        raise ValueError(f"--method {args.method} names {len(runs)} methods; give one")
    settings = settings_of(args, methods=[args.method], tokens=[args.tokens])
    protocol = protocol_of(settings.model, settings.conv_mode)
    loaded = load_model(settings)
    check_loaded(loaded, settings.model, runs, protocol)
    answers, records = ask(loaded, image, protocol, args.question, runs, args.new, args.short)
    found = {"question": args.question, "answers": answers}
    paths = write(args, image, protocol, found, records[-1])
    if args.json:
        emit({**found, "files": [str(p) for p in paths]})
        return 0
    console = stdout()
    for answer in found["answers"]:
        console.print(line(answer), markup=False, highlight=False, soft_wrap=True)
    for path in paths:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return 0


def check_question(question: str) -> None:
    """Refuse a question without text, or with LLaVA's image placeholder.

    Raises:
        ValueError: naming the question.
    """
    if IMAGE_MARK in question or not question.strip():
        raise ValueError(f"question {question!r}: give a text without {IMAGE_MARK}, which is added")


def ask(
    loaded: Any, image: Any, protocol: Protocol, question: str, runs: Sequence[Run], new: int, short: bool = False
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Answer a question with the unpruned model and with each run; return the answers and their records.

    An answer has its text, its tokens, FLOPs and times. It is timed once, after an untimed prefill. Preprocessing of
    the image is not timed.

    Args:
        loaded: the model, see `llava_prune.load`.
        image: RGB image.
        protocol: prompt and preprocessing.
        question: text of the user.
        runs: methods and budgets.
        new: largest number of new tokens.
        short: whether to add LLaVA's instruction for short answers.

    Raises:
        ValueError: for an invalid question, an image that cannot be preprocessed, or a method that the model does not
            support.
    """
    check_question(question)
    ids = protocol.token_ids(f"{question}\n{load_task('gqa').suffix}" if short else question, True, loaded)
    long = too_long(len(ids) - 1 + loaded.visual_tokens(image.size), context_of(loaded))
    if long:
        raise ValueError(long)
    values = stacked([protocol.pixels(image, loaded)])
    sizes = [image.size] if protocol.places_known else None
    answers: list[dict[str, Any]] = []
    records = []
    asked: list[tuple[str, Any]] = [("unpruned", REFERENCE), *((run.label, run.method) for run in runs)]
    for name, method in asked:
        with (
            probing(loaded.model) as probe,
            llava_prune.pruned(loaded.model, method) as handle,
            llava_prune.questions([question]),
        ):
            request = functools.partial(loaded.generate, [ids], values, sizes=sizes)
            request(max_new_tokens=1)
            out, times = timed(functools.partial(request, max_new_tokens=new), probe)
        record = handle.last
        assert record is not None
        records.append(record)
        entering, leaving = record.tokens_in[0].tolist(), record.tokens_out[0].tolist()
        flops = flops_with_text(entering, len(ids) - 1, loaded.size)
        answers.append({
            "name": name,
            "answer": loaded.tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip(),
            "entering": entering,
            "leaving": leaving,
            "tflops": flops / 1e12,
            "percent": 100 * flops / (answers[0]["tflops"] * 1e12 if answers else flops),
            "ms": times,
            "new": out.shape[1],
        })  # fmt: skip
    return answers, records


def line(found: Mapping[str, Any]) -> str:
    """Return an answer and the cost of its prefill in one line."""
    return f"{found['name']}: {found['answer']!r} ({cost(found)})"


def cost(found: Mapping[str, Any]) -> str:
    """Return the visual tokens and FLOPs of a prefill as text."""
    return (
        f"visual tokens {found['entering'][0]} in, averages {average_tokens(found['entering']):.1f} entering and "
        f"{average_tokens(found['leaving']):.1f} leaving a layer; {flops_text(found['tflops'])}, "
        f"{found['percent']:.1f} % of unpruned"
    )


def flops_text(tera: float) -> str:
    """Return FLOPs in a readable unit."""
    return f"{tera:.3g} TFLOPs" if tera >= 0.1 else f"{1000 * tera:.3g} GFLOPs"


def write(
    args: argparse.Namespace, image: Any, protocol: Protocol, found: Mapping[str, Any], record: Any
) -> list[Path]:
    """Write the contact sheet or the page and return the paths of the files."""
    out = args.out.expanduser()
    answers = found["answers"]
    if out.suffix == ".html":
        if args.layers is not None:
            raise ValueError(f"--layers with {out}: a page has all layers; leave it out")
        facts = {a["name"]: f"{a['answer']} ({cost(a)})" for a in answers}
        page = record.page(image, found["question"], facts, padded=protocol.padded)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
        return [out]
    text = "; ".join(f"{a['name']}: {a['answer']}" for a in answers)
    figure = record.show(image, args.layers, padded=protocol.padded, title=_wrapped(found["question"], text))
    return save(figure, out)


def _wrapped(*texts: str) -> str:
    """Join texts below each other, wrapped to the width of the sheet; each has at most four lines, cut with [...]."""
    import textwrap

    return "\n".join(textwrap.fill(text, 110, max_lines=4) for text in texts)
