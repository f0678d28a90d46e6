"""`llava-prune show`: answer one question with and without pruning, and draw the patches that remain."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llava_prune

from ..bench.flops import average_tokens, flops_with_text
from ..console import emit, stdout
from ..methods.planner import Run, cases, plan
from ..report.drawing import save
from .asking import check_loaded, load_model, stacked
from .command import settings_of
from .images import open_rgb
from .prompt import IMAGE_MARK
from .protocol import Protocol, protocol_of
from .task import load_task


def show(args: argparse.Namespace) -> int:
    """Run `llava-prune show`; returns its exit status.

    Raises:
        ValueError: for bad input.
    """
    if IMAGE_MARK in args.question or not args.question.strip():
        raise ValueError(f"--question {args.question!r}: give a text without {IMAGE_MARK}, which is added")
    image = open_rgb(args.image.expanduser())
    runs = plan(cases([args.method], [args.tokens], args.method_args or {}, seed=args.seed))
    if len(runs) != 1:
        raise ValueError(f"--method {args.method} names {len(runs)} methods; give one")
    run = runs[0]
    settings = settings_of(args, methods=[args.method], tokens=[args.tokens])
    protocol = protocol_of(settings.model, settings.conv_mode)
    loaded = load_model(settings)
    check_loaded(loaded, settings.model, [run], protocol)
    found, record = ask(loaded, image, protocol, args.question, run, args.new, args.short)
    paths = write(args, image, None if protocol.resolutions else protocol.pad, found, record)
    if args.json:
        emit({**found, "files": [str(p) for p in paths]})
        return 0
    console = stdout()
    for answer in found["answers"]:
        console.print(line(answer), markup=False, highlight=False, soft_wrap=True)
    for path in paths:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return 0


def ask(
    loaded: Any, image: Any, protocol: Protocol, question: str, run: Run, new: int, short: bool = False
) -> tuple[dict[str, Any], Any]:
    """The question with answers and costs of the unpruned and the pruned model, and the record of the pruned one.

    Args:
        loaded: see `llava_prune.load`.
        image: RGB image.
        protocol: prompt and preprocessing.
        question: text of the user.
        run: method and budget.
        new: largest number of new tokens.
        short: add LLaVA's instruction for short answers.
    """
    ids = protocol.token_ids(f"{question}\n{load_task('gqa').suffix}" if short else question, True, loaded)
    values = stacked([protocol.pixels(image, loaded)])
    sizes = [image.size] if protocol.places_known else None
    answers: list[dict[str, Any]] = []
    for name, method in (("unpruned", "full"), (run.label, run.method)):
        with llava_prune.pruned(loaded.model, method) as handle:
            out = loaded.generate([ids], values, sizes=sizes, max_new_tokens=new)
        record = handle.last
        assert record is not None
        entering, leaving = record.tokens_in[0].tolist(), record.tokens_out[0].tolist()
        flops = flops_with_text(entering, len(ids) - 1, loaded.size)
        answers.append({
            "name": name,
            "answer": loaded.tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip(),
            "entering": entering,
            "leaving": leaving,
            "tflops": flops / 1e12,
            "percent": 100 * flops / (answers[0]["tflops"] * 1e12 if answers else flops),
        })  # fmt: skip
    return {"question": question, "answers": answers}, record


def line(found: Mapping[str, Any]) -> str:
    """An answer and what its prefill costs."""
    return f"{found['name']}: {found['answer']!r} ({cost(found)})"


def cost(found: Mapping[str, Any]) -> str:
    """Visual tokens and FLOPs of a prefill."""
    tera = found["tflops"]
    flops = f"{tera:.3g} TFLOPs" if tera >= 0.1 else f"{1000 * tera:.3g} GFLOPs"
    return (
        f"visual tokens {found['entering'][0]} in, averages {average_tokens(found['entering']):.1f} entering and "
        f"{average_tokens(found['leaving']):.1f} leaving a layer; {flops}, "
        f"{found['percent']:.1f} % of unpruned"
    )


def write(args: argparse.Namespace, image: Any, pad: bool | None, found: Mapping[str, Any], record: Any) -> list[Path]:
    """Write the contact sheet or the page; returns the paths."""
    out = args.out.expanduser()
    answers = found["answers"]
    if out.suffix == ".html":
        if args.layers is not None:
            raise ValueError(f"--layers with {out}: a page has all layers; leave it out")
        facts = {a["name"]: f"{a['answer']} ({cost(a)})" for a in answers}
        page = record.page(image, found["question"], facts, padded=pad)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
        return [out]
    text = "; ".join(f"{a['name']}: {a['answer']}" for a in answers)
    figure = record.show(image, args.layers, padded=pad, title=_wrapped(found["question"], text))
    return save(figure, out)


def _wrapped(*texts: str) -> str:
    """Texts below each other, in lines that fit on the sheet."""
    import textwrap

    return "\n".join(part for text in texts for part in textwrap.wrap(text, 110)[:4])
