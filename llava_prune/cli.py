"""The `llava-prune` command."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import functools
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from . import arguments


def _add_eval(commands: Any, env: Mapping[str, str]) -> None:
    from .eval.plan import DATA, RESULTS, TINY

    p = commands.add_parser(
        "eval",
        help="run a benchmark, pruned beside unpruned",
        epilog="Every flag of the first group can be set by the environment variable of the same name in capitals.",
    )
    p.add_argument("task", help="benchmark, a list a,b, or all: every one whose data are there")
    e = p.add_argument_group("settings")

    flag = functools.partial(arguments.flag, e, env)
    flag("model", TINY, "folder or hub id, in either format")
    flag("method", "autoprune", "method, list a,b, or all; your own as file.py:name", type=arguments.names)
    flag("tokens", "64", "visual token budget or list 192,128,64", type=arguments.counts)
    flag("data", DATA, "folder with the benchmark's files; LLaVA's playground/data/eval works")
    flag("family", "auto", "auto, llava or hf")
    flag("batch", "auto", "samples at once, halved when memory runs out; auto: by free memory", type=arguments.batch)
    flag("device", None, "cuda, cuda:1, cpu; default cuda where there is one")
    flag("dtype", None, "float32, float16 or bfloat16; default the checkpoint's")
    flag("attn", None, "eager, sdpa or flash_attention_2; default the package's choice")
    flag("out", None, f"folder of the results; default {RESULTS}/TASK/MODEL")
    flag("limit", None, "only the first so many questions", type=arguments.positive)
    flag("seed", "0", "of sampling and of methods that draw", type=int)
    flag("num-chunks", "1", "cut the questions into so many contiguous parts", type=arguments.positive)
    flag("chunk-idx", "0", "the part to run; the last to end joins the answers", type=int)
    flag("method-args", "", "hyper-parameters, e.g. mi_scale=8,k0=0.3", type=arguments.hyper)
    p.add_argument("--no-reference", action="store_true", help="leave out the unpruned model")
    p.add_argument("--restart", action="store_true", help="discard earlier answers in OUT")
    p.add_argument("--json", action="store_true", help="print the results as JSON, nothing else")
    p.set_defaults(run=_eval)


def _add_bench(commands: Any, env: Mapping[str, str]) -> None:
    p = commands.add_parser(
        "bench",
        help="time and memory, pruned beside unpruned in turn",
        epilog="Every flag of the first group can be set by the environment variable of the same name in capitals.",
    )
    flag = functools.partial(arguments.flag, p.add_argument_group("settings"), env)
    flag("model", None, "folder or hub id; without it a random model of the shape")
    flag("shape", "300m", "random model: tiny, 300m, 7b, 13b, next-7b")
    flag("method", "autoprune", "method or list a,b; your own as file.py:name", type=arguments.names)
    flag("tokens", "192,128,64", "visual token budget or list", type=arguments.counts)
    flag("batch", "1", "samples at once or list", type=arguments.counts)
    flag("text", "84", "text tokens of a prompt or list; the picture's come on top", type=arguments.counts)
    flag("new", "8", "new tokens of a request", type=arguments.positive)
    flag("repeats", "5", "pairs of an unpruned and a pruned request", type=arguments.positive)
    flag("warmup", "1", "pairs before the count", type=int)
    flag("family", "auto", "auto, llava or hf (with a model)")
    flag("device", None, "cuda, cuda:1, cpu; default cuda where there is one")
    flag("dtype", None, "float32, float16 or bfloat16")
    flag("attn", None, "eager, sdpa or flash_attention_2; default the package's choice")
    flag("threads", None, "of the CPU", type=arguments.positive)
    flag("method-args", "", "hyper-parameters, e.g. slope_step=0.05", type=arguments.hyper)
    flag("text-step", None, "with --graphs: round the text rows up to multiples", type=arguments.positive)
    flag("seed", "0", "of weights, prompts and pictures", type=int)
    flag("out", None, "folder of the results; default playground/results/bench/SHAPE or MODEL")
    p.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    p.add_argument("--graphs", action="store_true", help="replay pruned requests as CUDA graphs, see attach")
    p.add_argument("--fused", action="store_true", help="cuts by Triton kernels, see attach")
    p.add_argument("--profile", action="store_true", help="write a trace of a pruned prefill each")
    p.add_argument("--json", action="store_true", help="print the result as JSON, nothing else")
    p.set_defaults(run=_bench)


def _parser(env: Mapping[str, str]) -> argparse.ArgumentParser:
    from .eval.plan import DATA

    parser = argparse.ArgumentParser(prog="llava-prune", description="Visual token pruning for LLaVA.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_eval(commands, env)
    _add_bench(commands, env)
    p = commands.add_parser("score", help="score an answer file")
    p.add_argument("task", help="benchmark, e.g. gqa")
    p.add_argument("--answers", required=True, type=Path, help="answer file (JSON lines, LLaVA's fields)")
    p.add_argument("--data", type=Path, help="the benchmark's folder in LLaVA's layout")
    p.add_argument("--questions", type=Path, help="question file in place of DATA's: only its questions are scored")
    p.add_argument("--annotations", type=Path, help="annotation file (POPE, MME: folder) in place of DATA's")
    p.add_argument("--export", type=Path, help="folder for the official formats (default: beside the answers)")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_score)
    p = commands.add_parser("data", help="which files of a benchmark are there, and where the rest is published")
    p.add_argument("task", help="benchmark, or all")
    p.add_argument("--data", type=Path, default=env.get("DATA") or DATA, help=f"see eval (default {DATA})")
    p.add_argument("--download", action="store_true", help="fetch what is missing; goes on where it was")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_data)
    p = commands.add_parser(
        "methods", help="methods side by side: hyper-parameters, tokens of every layer, cost, origin"
    )
    p.add_argument(
        "--method",
        type=arguments.names,
        default=["all"],
        help="names, presets, compositions, file.py:name (default all)",
    )
    p.add_argument("--tokens", type=arguments.counts, default=[64], help="budget or list 192,128,64 (default 64)")
    _add_size(p)
    p.set_defaults(run=_methods)
    p = commands.add_parser("run", help="run a program of package llava with its model pruned, unchanged")
    p.add_argument("--method", default="autoprune", type=arguments.method, help="or file.py:name (default autoprune)")
    p.add_argument(
        "--tokens", type=arguments.positive, default=None, help="budget (the method's default where not given)"
    )
    p.add_argument("--hyper", type=arguments.hyper, action="append", default=[], metavar="NAME=VALUE")
    p.add_argument("program", nargs=argparse.REMAINDER, help="-- python -m llava.eval.model_vqa_loader ...")
    p.set_defaults(run=_run)
    p = commands.add_parser("flops", help="FLOPs by equation (2) under each way of counting")
    p.add_argument("--tokens", type=arguments.counts, default=[192, 128, 64])
    p.add_argument("--slope", type=arguments.floats, default=[0.0, 0.1, 0.2], help="slopes of AutoPrune's curve")
    p.add_argument(
        "--published", type=arguments.floats, default=[], help="percentages, one a budget: find the text length"
    )
    _add_size(p)
    p.set_defaults(run=_flops)
    return parser


def _add_size(p: argparse.ArgumentParser) -> None:
    """Flags of a model's size; the defaults are LLaVA-1.5-7B's."""
    for name, value in (("layers", 32), ("hidden", 4096), ("intermediate", 11008), ("visual", 576)):
        p.add_argument(f"--{name}", type=arguments.positive, default=value, help=f"default {value}")
    p.add_argument("--text", type=float, default=70.0, help="text tokens of a prompt (default 70)")
    p.add_argument("--json", action="store_true")


def _stdout() -> Console:
    """A console for tables, wide enough in files and pipes too."""
    return Console(width=None if sys.stdout.isatty() else 140)


def _emit(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _quiet() -> None:
    """Leave the terminal to our own bars: no bars and hints of transformers."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()


def _eval(args: argparse.Namespace) -> int:
    from .eval.plan import Settings, model_defaults
    from .eval.result import public
    from .eval.run import evaluate_all, out_folder
    from .eval.show import Bars, results_table, summary_table
    from .eval.task import load_task

    err = Console(stderr=True)
    fields = {f.name for f in dataclasses.fields(Settings)}
    given = {k: v for k, v in vars(args).items() if k in fields}
    settings = Settings(**given, methods=args.method, reference=not args.no_reference)
    if settings.data == "" or settings.model == "":
        raise ValueError("MODEL and DATA must not be empty")
    defaults = model_defaults(settings.model)
    if defaults:
        err.print(f"hyper-parameters stated by {settings.model}: {json.dumps(defaults)}", markup=False)
    _quiet()
    with Bars(err) as bars:
        results, failed = evaluate_all(settings, bars.of, shlex.join(["llava-prune", *args.argv]))
    if args.json:
        _emit([public(r) for runs in results.values() for r in runs])
    else:
        console = _stdout()
        for name, runs in results.items():
            task = load_task(name)
            if runs:
                console.print(results_table(runs, task.title, task.figure, task.columns))
            else:
                console.print(f"{name}: chunk {args.chunk_idx} of {args.num_chunks} done, others are missing")
            for note in dict.fromkeys(r["why_no_figure"] for r in runs if r["why_no_figure"]):
                console.print(f"{name}: {note}", markup=False, soft_wrap=True)
            console.print(f"answers and results: {out_folder(settings, name)}", markup=False, soft_wrap=True)
        if len(results) > 1:
            console.print(summary_table(results))
    if failed:
        raise ValueError("; ".join(f"{name}: {message}" for name, message in failed.items()))
    return 0


def _bench(args: argparse.Namespace) -> int:
    from .bench.plot import plot
    from .bench.show import speed_tables
    from .bench.speed import Settings, out_folder, speed

    err = Console(stderr=True)
    fields = {f.name for f in dataclasses.fields(Settings)}
    given = {k: v for k, v in vars(args).items() if k in fields}
    settings = Settings(**given, methods=args.method, batches=args.batch, texts=args.text, memory=not args.no_memory)
    _quiet()
    result = speed(settings, lambda what: err.print(what, markup=False), shlex.join(["llava-prune", *args.argv]))
    try:
        plot(result, out_folder(settings) / "bench.png")
    except ValueError as error:
        err.print(f"no plot: {error}", markup=False)
    if args.json:
        _emit(result)
        return 0
    console = _stdout()
    for table in speed_tables(result):
        console.print(table)
    console.print(f"results: {out_folder(settings)}", markup=False, soft_wrap=True)
    return 0


def _score(args: argparse.Namespace) -> int:
    from .eval.score import score_files
    from .eval.show import score_table

    result, written, warnings = score_files(
        args.task, args.answers, args.data, args.questions, args.annotations, args.export
    )
    err = Console(stderr=True)
    for text in warnings:
        err.print(f"note: {text}", markup=False, soft_wrap=True)
    if written:
        err.print(f"for the official tools: {', '.join(map(str, written))}", markup=False, soft_wrap=True)
    if result["figure"] is None:
        raise ValueError(result["why"])
    if args.json:
        _emit({k: result[k] for k in ("bench", "figure", "details", "rows", "versions")})
    else:
        _stdout().print(score_table(result))
    return 0


def _data(args: argparse.Namespace) -> int:
    from .eval.data import download, inspect
    from .eval.show import Bars, data_table
    from .eval.task import load_task, task_names

    names = task_names() if args.task == "all" else [load_task(args.task).name]
    by_hand: list[str] = []
    if args.download:
        with Bars(Console(stderr=True), "MB") as bars:
            for name in names:
                left = download(load_task(name), args.data, lambda u, n, t: bars(u, n >> 20, (t or n) >> 20))[1]
                by_hand += [f"{name}: {kind}" for kind in left]
    reports = [inspect(name, args.data) for name in names]
    if args.json:
        _emit(reports)
    else:
        console = _stdout()
        for report in reports:
            console.print(data_table(report))
            for problem in report["problems"]:
                console.print(f"{report['bench']}: {problem}", markup=False, soft_wrap=True)
        if by_hand:
            console.print(f"only on their owners' pages: {'; '.join(by_hand)}", markup=False, soft_wrap=True)
    return 0 if all(r["complete"] for r in reports) else 1


def _methods(args: argparse.Namespace) -> int:
    from .bench.flops import Size
    from .bench.methods import table
    from .bench.show import methods_tables

    size = Size(args.layers, args.hidden, args.intermediate, args.visual)
    rows = table(args.tokens, size, args.text, args.method)
    if args.json:
        _emit([dataclasses.asdict(r) for r in rows])
        return 0
    for shown in methods_tables(rows, size, args.text):
        _stdout().print(shown)
    return 0


def _run(args: argparse.Namespace) -> int:
    from .families import llava_cli

    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not program:
        raise ValueError("no program given; write it after --, e.g. -- python -m llava.eval.run_llava ...")
    hyper = {k: v for part in args.hyper for k, v in part.items()}
    if args.tokens is not None:
        hyper["tokens"] = args.tokens
    return int(llava_cli.run(program, args.method, hyper) or 0)


def _flops(args: argparse.Namespace) -> int:
    from .bench.flops import Size, table

    size = Size(args.layers, args.hidden, args.intermediate, args.visual)
    rows = [dataclasses.asdict(r) for r in table(args.tokens, args.slope, size, args.text, args.published)]
    if args.json:
        _emit(rows)
        return 0
    shown = Table(title=f"equation (2), {args.layers} layers, {args.visual} visual tokens, {args.text:g} text tokens")
    for name in rows[0]:
        if args.published or "published" not in name:
            shown.add_column(name.replace("_", " "), justify="left" if name == "counting" else "right")
    for row in rows:
        values = [v for k, v in row.items() if args.published or "published" not in k]
        shown.add_row(*("-" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v) for v in values))
    _stdout().print(shown)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 failed with a message on stderr, 2 wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser(os.environ).parse_args(argv)
    args.argv = argv
    err = Console(stderr=True)
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)]
    )
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        message, status = "stopped; the same command goes on where it was", 130
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        message, status = f"{error.strerror or error}{where}", 1
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space left on the disk{where}; what was answered is kept: make room and run the same command"
    except (MemoryError, ValueError) as error:
        message, status = str(error) or "out of memory; set BATCH=1 or choose a smaller model", 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        message, status = "out of memory with a single sample; choose a smaller DTYPE or another DEVICE", 1
    err.print(f"llava-prune: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
