"""Questions per second of whole evaluations and of LLaVA's own program, with the same model, questions and process.

Without package llava, a loop of the same structure can replace its program (`--loop`).

python -m llava_prune.eval.rate --batch 1,8,auto --tokens 64
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.table import Table

from .. import arguments
from ..arguments import DATA, TINY
from ..bench.flops import ragged_padding
from ..bench.latency import quartiles
from ..methods.planner import Run, expand
from .answers import ANSWERS, SETTINGS
from .asking import Bench, load_model, prepare
from .identity import of_model
from .loop import ask_one_by_one
from .pieces import all_batches
from .plan import Settings, plan_runs
from .protocol import protocol_of
from .run import evaluate, read_files
from .show import finish
from .task import Task, load_task

MODULE = "llava_prune.eval.rate"
LOADER = "llava.eval.model_vqa_loader"
LOOP = "one by one"
"""Method name of the arm that runs `loop.ask_one_by_one`."""
WARMUP = 8
"""Number of questions of the first round, which is not timed."""


@dataclass(frozen=True)
class Arm:
    """One configuration to time: a method at a batch size (None: auto), LLaVA's own program (`method` ""), or LOOP."""

    method: str
    batch: int | None = None

    @property
    def label(self) -> str:
        if self.method == LOOP:
            return LOOP
        return f"{self.method}, batch {self.batch or 'auto'}" if self.method else LOADER


@contextlib.contextmanager
def _for_cpu(model: Any) -> Iterator[Any]:
    """Yield a stand-in of a model for LLaVA's program, which hard-codes CUDA and float16.

    Tensors are moved to the device and dtype of the model instead. Tensor.to is replaced outside of `generate` only, so
    that generation is not slowed down.
    """
    stock, parameter = torch.Tensor.to, next(model.parameters())

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = parameter.device
        if kwargs.get("dtype") is torch.float16:
            kwargs["dtype"] = parameter.dtype
        return stock(self, *args, **kwargs)

    def generate(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(torch.Tensor, "to", stock):
            return model.generate(*args, **kwargs)

    with mock.patch.object(torch.Tensor, "to", to):
        yield SimpleNamespace(config=model.config, generate=generate)


def ask_llava(loaded: Any, questions: Path, images: Path, answers: Path, new: int) -> float:
    """Run LLaVA's own program on a question file and return its seconds, without loading the model.

    Args:
        loaded: an unpruned model of family "llava".
        questions: JSON lines with question_id, image and text.
        images: folder of the images.
        answers: answer file to write.
        new: largest number of new tokens of an answer.

    Raises:
        ValueError: if package llava is not installed, or the model is of another family.
    """
    if loaded.family != "llava":
        raise ValueError(
            "LLaVA's own program needs a model of family 'llava'; give a checkpoint in its format, or use --no-llava"
        )
    try:
        import llava.eval.model_vqa_loader as program
    except ImportError as error:
        raise ValueError(f"{LOADER}: package llava is not installed ({error})") from error
    args = SimpleNamespace(
        model_path=loaded.path,
        model_base=None,
        image_folder=str(images),
        question_file=str(questions),
        answers_file=str(answers),
        conv_mode=protocol_of(loaded.path).conv_mode,
        num_chunks=1,
        chunk_idx=0,
        temperature=0,
        top_p=None,
        num_beams=1,
        max_new_tokens=new,
    )
    with contextlib.ExitStack() as stack:
        model = loaded.model
        if model.device.type != "cuda":
            model = stack.enter_context(_for_cpu(model))
        found = loaded.tokenizer, model, loaded.image_processor, 2048
        stack.enter_context(mock.patch.object(program, "load_pretrained_model", lambda *_: found))
        stack.enter_context(mock.patch.object(program, "args", args, create=True))  # the program reads this global
        stack.enter_context(mock.patch.object(program, "disable_torch_init", lambda: None))
        start = time.perf_counter()
        program.eval_model(args)
        return time.perf_counter() - start


class Rate:
    """Times arms on the first questions of a benchmark with one loaded model.

    Attributes:
        texts: arm label -> answers of its last round, in question order.
        batch: arm label -> batch size at the end of the round.
        padding: arm label -> ragged padding: padding tokens over real tokens in all layers of all batches.
    """

    def __init__(self, settings: Settings, loaded: Any, folder: Path) -> None:
        self.settings, self.loaded, self.folder = settings, loaded, folder
        self.task: Task = load_task(settings.task)
        self.files = read_files(self.task, settings)
        self.texts: dict[str, list[str]] = {}
        self.batch: dict[str, int] = {}
        self.padding: dict[str, float] = {}

    @functools.cached_property
    def model(self) -> dict[str, Any]:
        """The identity of the model. Its checksum takes seconds for 7B parameters and counts as loading time."""
        return of_model(self.loaded, self.settings.model, self.settings.model_base)

    def seconds(self, arm: Arm, limit: int | None) -> float:
        """Run one evaluation and return its seconds, from question file to answer file and score, loading excluded."""
        if arm.method == LOOP:
            return self._loop(limit)
        return self._ours(arm, limit) if arm.method else self._theirs(limit)

    def _ours(self, arm: Arm, limit: int | None) -> float:
        out = self.folder / arm.label.replace(", ", "-").replace(" ", "-")
        settings = replace(_settings(self.settings, arm), out=str(out), limit=limit, restart=True)
        model = self.model
        start = time.perf_counter()
        evaluate(settings, loaded=self.loaded, model=model)
        took = time.perf_counter() - start
        run = _run(settings, arm)
        self.batch[arm.label] = json.loads((out / run.label / SETTINGS).read_text(encoding="utf-8"))["batch"]
        self.texts[arm.label] = _texts(out / run.label / ANSWERS)
        settings = replace(settings, batch=self.batch[arm.label])
        bench = prepare(settings, self.task, self.files, [run], self.loaded)
        self.padding[arm.label] = _padding(bench, _rows(out / run.label / ANSWERS))
        return took

    def _theirs(self, limit: int | None) -> float:
        asked, answers = self.folder / "questions.jsonl", self.folder / "loader" / "answers.jsonl"
        rows = [
            {"question_id": q.id, "image": q.image, "text": q.text} for q in self.files.questions[:limit] if q.image
        ]
        asked.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        images = self.files.sources.find("images")
        if images is None:
            raise ValueError(f"{self.task.name} has no folder of images, which {LOADER} needs; use --no-llava")
        new = self.settings.max_new_tokens or self.task.max_new_tokens
        took = ask_llava(self.loaded, asked, images, answers, new)
        self.texts[LOADER], self.batch[LOADER] = _texts(answers), 1
        return took

    def _loop(self, limit: int | None) -> float:
        answers, some = self.folder / "loop.jsonl", replace(self.files, questions=self.files.questions[:limit])
        protocol = protocol_of(self.settings.model, self.settings.conv_mode)
        new = self.settings.max_new_tokens or self.task.max_new_tokens
        took = ask_one_by_one(self.loaded, some, protocol, answers, new)
        self.texts[LOOP], self.batch[LOOP] = _texts(answers), 1
        return took


def _settings(settings: Settings, arm: Arm) -> Settings:
    return replace(settings, methods=(arm.method,), batch=arm.batch, reference=False)


def _run(settings: Settings, arm: Arm) -> Run:
    """Return the run of an arm.

    Raises:
        ValueError: see `plan_runs`; also for several budgets.
    """
    runs = plan_runs(_settings(settings, arm))
    if len(runs) != 1:
        raise ValueError(f"TOKENS={','.join(str(n) for n in settings.tokens)}: give a single budget")
    return runs[0]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _texts(path: Path) -> list[str]:
    return [row["text"].strip() for row in _rows(path)]


def _padding(bench: Bench, answers: Sequence[dict[str, Any]]) -> float:
    entering = {i: row["kept"]["entering"] for i, row in enumerate(answers)}  # answers are in question order
    asked = {i: bench.files.questions[i] for i in entering}
    return ragged_padding(
        [[n + len(bench.rows[i]) - 1 for n in entering[i]] for i in numbers]
        for numbers in all_batches(asked, bench.lengths, bench.batch)
    )


def measure(
    settings: Settings,
    arms: Sequence[Arm],
    repeats: int,
    loaded: Any = None,
    progress: Callable[[str, float], None] = lambda *_: None,
) -> dict[str, Any]:
    """Time every arm once in each round, after a short round that is not timed.

    Args:
        settings: model, data, one budget, limit of questions.
        arms: configurations to time.
        repeats: number of timed rounds.
        loaded: a loaded model; None to load that of the settings.
        progress: called with (label, seconds) of an arm after each of its timed rounds.

    Returns:
        {"machine", "model", "questions", "repeats", "rows"}. A row has the arm, its budget and batch size, quartiles of
        questions per second and of its speed relative to LLaVA's program and to the loop within a round, the ragged
        padding (padding tokens over real tokens), and the share of answers equal to theirs and to the first arm's.

    Raises:
        ValueError: for bad settings, see `evaluate` and `ask_llava`.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: give 1 or more")
    budgets = {arm.label: _run(settings, arm).tokens for arm in arms if arm.method not in ("", LOOP)}
    loaded = loaded or load_model(settings)
    parameter = next(loaded.model.parameters())
    took: dict[str, list[float]] = {arm.label: [] for arm in arms}
    with tempfile.TemporaryDirectory() as place:
        rate = Rate(settings, loaded, Path(place))
        count = len(rate.files.questions)
        for i in range(repeats + 1):
            for arm in arms:
                seconds = rate.seconds(arm, settings.limit if i else min(WARMUP, count))
                if i:
                    took[arm.label].append(seconds)
                    progress(arm.label, seconds)
    rows = []
    for arm in arms:
        mine = took[arm.label]
        row: dict[str, Any] = {
            "arm": arm.label,
            "method": arm.method if arm.label in budgets else None,
            "tokens": budgets.get(arm.label),
            "batch": rate.batch[arm.label],
            "per_second": quartiles([count / s for s in mine]),
            "ragged_padding": rate.padding.get(arm.label, 0.0),  # LLaVA's program and the loop have batch size 1
            "same_answers": {"first": _same(rate.texts, arm.label, arms[0].label)},
        }
        for name, other in (("llava", LOADER), ("loop", LOOP)):
            if other in took:
                row[f"times_{name}"] = quartiles([b / a for a, b in zip(mine, took[other], strict=True)])
                row["same_answers"][name] = _same(rate.texts, arm.label, other)
        rows.append(row)
    machine = {
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {"machine": machine, "model": settings.model, "questions": count, "repeats": repeats, "rows": rows}


def _same(texts: dict[str, list[str]], a: str, b: str) -> float:
    return sum(x == y for x, y in zip(texts[a], texts[b], strict=True)) / len(texts[a])


def table(result: dict[str, Any]) -> Table:
    """Return the result as a table."""
    machine = result["machine"]
    out = Table(
        title=f"questions per second, {result['questions']} questions, {machine['device']}, {machine['dtype']}, "
        f"{machine['threads']} threads",
        caption="question file to answer file, without loading; medians, quartiles in brackets",
    )
    base = "loop" if all("times_llava" not in r for r in result["rows"]) else "llava"
    times_title = "x LLaVA's program" if base == "llava" else f"x {LOOP}"
    for name in ("run", "batch", "per second", times_title, "padding, %", "same answers, %"):
        out.add_column(name, justify="left" if name == "run" else "right")
    for r in result["rows"]:
        rate, times = r["per_second"], r.get(f"times_{base}")
        label = r["arm"] + (f", {r['tokens']} tokens" if r["tokens"] else "")
        same = r["same_answers"].get(base, r["same_answers"]["first"])
        out.add_row(
            label,
            str(r["batch"]),
            f"{rate['median']:.2f} [{rate['q1']:.2f}, {rate['q3']:.2f}]",
            "-" if times is None else f"{times['median']:.2f} [{times['q1']:.2f}, {times['q3']:.2f}]",
            f"{100 * r['ragged_padding']:.1f}",
            f"{100 * same:.1f}",
        )
    return out


def _batches(text: str) -> list[int | None]:
    try:
        out = [arguments.batch(p.strip()) for p in text.split(",") if p.strip()]
    except argparse.ArgumentTypeError:
        out = []
    if not out:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a batch size or a list of them, e.g. 1,8,auto")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog=MODULE, description=(__doc__ or "").splitlines()[0])
    flag = functools.partial(arguments.flag, parser, os.environ)
    flag("task", "gqa", "benchmark")
    flag("model", TINY, "checkpoint folder or hub id, in LLaVA's format")
    flag("data", DATA, "folder with the benchmark's files")
    flag("method", "full,autoprune", "method, list a,b, or all", type=arguments.names)
    flag("tokens", "64", "visual token budget", type=arguments.positive)
    flag("batch", "1,8,auto", "batch size, or a list", type=_batches)
    flag("limit", None, "evaluate the first LIMIT questions only", type=arguments.positive)
    flag("repeats", "3", "number of rounds", type=arguments.positive)
    flag("device", None, "cuda, cuda:1 or cpu; default cuda where available")
    flag("dtype", None, "float32, float16 or bfloat16; default the checkpoint's")
    flag("attn", None, "eager, sdpa or flash_attention_2; default the package's choice")
    flag("threads", None, "CPU threads; default torch's choice", type=arguments.positive)
    parser.add_argument(
        "--max-new-tokens",
        type=arguments.positive,
        default=None,
        help="largest number of new tokens of an answer; default the benchmark's own",
    )
    parser.add_argument("--no-llava", action="store_true", help=f"leave out {LOADER}")
    parser.add_argument("--loop", action="store_true", help="add a loop that asks one question at a time")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the result")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, nothing else")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    arms = [Arm(m, b) for b in args.batch for m in expand(args.method)]
    settings = Settings(
        task=args.task,
        model=args.model,
        tokens=(args.tokens,),
        data=args.data,
        family="auto" if args.no_llava else "llava",
        device=args.device,
        dtype=args.dtype,
        attn=args.attn,
        limit=args.limit,
        max_new_tokens=args.max_new_tokens,
    )
    arms += [Arm(LOOP)] * args.loop + ([] if args.no_llava else [Arm("")])
    return finish(MODULE, argv, lambda: measure(settings, arms, args.repeats), table, args.out, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
