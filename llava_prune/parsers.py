"""The argument parsers of the `llava-prune` command."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__, arguments
from .arguments import DATA, FORMATS, MOST, RESULTS, TINY

CONV_MODE = "conversation template, e.g. vicuna_v1 or mistral_instruct, or processor; default the checkpoint's"
ENVIRONMENT = "The flags under 'settings' can also be set by environment variables of the same name in capitals."


def _add_eval(commands: Any, env: Mapping[str, str]) -> None:
    p = commands.add_parser(
        "eval",
        help="evaluate benchmarks, pruned and unpruned",
        epilog=ENVIRONMENT,
    )
    p.add_argument("task", help="benchmark, a list a,b, or all for every benchmark whose data are present")
    e = p.add_argument_group("settings")
    flag = functools.partial(arguments.flag, e, env)
    flag("method", "autoprune", "method, list a,b, or all; a method of yours as file.py:name", type=arguments.names)
    text = "budget in visual tokens or percent of them, or a list 192,128,11%% (default 64)"
    flag("tokens", None, text, type=arguments.budgets)
    text = "budget in percent of the unpruned model's FLOPs, or a list 49%%,25%%; instead of TOKENS"
    flag("flops", None, text, type=arguments.flops_budgets)
    flag("out", None, "folder for the results of these runs; default STORE/TASK/MODEL")
    flag("store", RESULTS, "folder of all results")
    flag("num-chunks", "1", "split the questions into NUM_CHUNKS contiguous chunks", type=arguments.positive)
    flag("chunk-idx", "0", "chunk to run; the last chunk to finish joins the answers", type=arguments.natural)
    arguments.add_method_args(e, env, "mi_scale=8,k0=0.3")
    p.add_argument("--no-reference", action="store_true", help="leave out the unpruned model")
    p.add_argument("--restart", action="store_true", help="discard earlier answers of these runs")
    _add_evaluation(p, e, env)
    _add_json(p)
    p.set_defaults(many_runs=False)


def _add_evaluation(p: argparse.ArgumentParser, e: Any, env: Mapping[str, str]) -> None:
    """Add the flags of every command that evaluates: model, data, processes, --dry-run."""
    flag = functools.partial(arguments.flag, e, env)
    flag("model", TINY, "checkpoint folder or hub id, in either format")
    flag("model-base", None, "checkpoint that MODEL, a LoRA folder or a lone mm_projector.bin, was trained on")
    flag("data", DATA, "folder with the benchmarks' files, e.g. LLaVA's playground/data/eval")
    flag("family", "auto", "classes to load: llava (haotian-liu/LLaVA), hf (transformers) or auto")
    flag("conv-mode", None, CONV_MODE)
    flag("batch", "auto", "batch size, halved when memory runs out; auto chooses by free memory", type=arguments.batch)
    flag("device", None, "cuda, cuda:1 or cpu; default cuda where available")
    flag("dtype", None, "float32, float16 or bfloat16; default the checkpoint's own")
    flag("attn", None, "eager, sdpa or flash_attention_2; default the package's choice")
    arguments.add_placement(e, env)
    flag("limit", None, "evaluate the first LIMIT questions only", type=arguments.any_length)
    flag("seed", "0", "random seed of sampling, and of methods that draw", type=arguments.seed)
    flag("gpus", None, "GPUs, each with a process of its own; default all visible ones", type=arguments.positive)
    text = "processes on the CPU; default one, or for tables and sweeps of the miniature model one for each core"
    flag("procs", None, text, type=arguments.positive)
    flag("max-restarts", "0", "times that all processes start again when one fails", type=arguments.natural)
    p.add_argument("--dry-run", action="store_true", help="show what would run, what is answered already and the time")
    text = "answers per second of a process, for --dry-run; default as measured in earlier answers"
    p.add_argument("--rate", type=arguments.number(1e-6, MOST), help=text)


def _add_table(commands: Any, env: Mapping[str, str]) -> None:
    p = commands.add_parser(
        "table",
        help="run what a table of the paper needs, and print it beside the published one",
        description="Runs that are finished already are not repeated; cells that were not run stay empty.",
        epilog=ENVIRONMENT,
    )
    p.add_argument("table", help="1, 2, 3, 4 or next7b")
    e = p.add_argument_group("settings")
    flag = functools.partial(arguments.flag, e, env)
    flag("store", RESULTS, "folder of all results")
    flag("task", None, "run these benchmarks only, a list a,b", type=arguments.words)
    flag("method", None, "run these methods only, a list a,b", type=arguments.words)
    flag("tokens", None, "run the rows with these budgets only, a list a,b", type=arguments.counts)
    p.add_argument("--published", action="store_true", help="print the published table alone")
    p.add_argument("--no-run", action="store_true", help="run nothing, print what the store has")
    p.add_argument("--intervals", action="store_true", help="add the 95 %% intervals")
    _add_format(p)
    _add_evaluation(p, e, env)
    p.set_defaults(many_runs=True)


def _add_sweep(commands: Any, env: Mapping[str, str]) -> None:
    p = commands.add_parser(
        "sweep",
        help="evaluate every combination of some hyper-parameters",
        description="Runs that are finished already are not repeated. docs/ablations.md describes the file.",
        epilog=ENVIRONMENT,
    )
    p.add_argument("file", type=Path, help="YAML file: tasks, methods, tokens, grid or list, seeds")
    e = p.add_argument_group("settings")
    arguments.flag(e, env, "store", RESULTS, "folder of all results")
    arguments.add_method_args(e, env, "mi_scale=8,k0=0.3")
    p.add_argument(
        "--figure",
        metavar="FILE",
        help="also draw the results: FILE.pdf and FILE.png, or only FILE if it has a suffix (.pdf, .png, .svg)",
    )
    _add_format(p)
    _add_evaluation(p, e, env)
    p.set_defaults(many_runs=True)


def _add_bench(commands: Any, env: Mapping[str, str]) -> None:
    p = commands.add_parser(
        "bench",
        help="measure time and memory of pruned and unpruned requests, in turn",
        epilog=ENVIRONMENT,
    )
    e = p.add_argument_group("settings")
    flag = functools.partial(arguments.flag, e, env)
    flag("model", None, "checkpoint folder or hub id; default a random model of SHAPE")
    flag("shape", "300m", "size of the random model: tiny, next-tiny, 300m, 7b, 13b, next-7b or next-mistral-7b")
    flag("method", "autoprune", "method, list a,b, or all; a method of yours as file.py:name", type=arguments.names)
    flag("tokens", "192,128,64", "visual token budget, or a list", type=arguments.counts)
    flag("batch", "1", "batch size, or a list", type=arguments.counts)
    flag("text", "84", "text tokens of a prompt, or a list; visual tokens are not counted", type=arguments.counts)
    flag("new", "8", "new tokens of a request, at least 2", type=arguments.whole(2))
    flag("repeats", "5", "timed pairs of an unpruned and a pruned request", type=arguments.positive)
    flag("warmup", "1", "pairs that run before the timed ones", type=arguments.natural)
    flag("family", "auto", "classes to load: llava (haotian-liu/LLaVA), hf (transformers) or auto; for a MODEL only")
    flag("device", None, "cuda, cuda:1 or cpu; default cuda where available")
    flag("dtype", None, "float32, float16 or bfloat16")
    flag("attn", None, "eager, sdpa or flash_attention_2; default the package's choice")
    arguments.add_placement(e, env)
    flag("threads", None, "CPU threads; default torch's choice", type=arguments.whole(1, 1024))
    arguments.add_method_args(e, env, "slope_step=0.05")
    flag("text-step", None, "experimental, with --graphs: round text lengths up to multiples", type=arguments.positive)
    flag("seed", "0", "random seed of weights, prompts and images, and of methods that draw", type=arguments.seed)
    flag("out", None, f"folder for the results; default {RESULTS}/bench/SHAPE or {RESULTS}/bench/MODEL")
    p.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    p.add_argument("--graphs", action="store_true", help="experimental, not tested: replay CUDA graphs")
    p.add_argument("--fused", action="store_true", help="experimental, not tested: Triton kernels for the cuts")
    p.add_argument("--profile", action="store_true", help="write a profiler trace of one pruned prefill of each run")
    _add_json(p)


def _add_data(commands: Any, env: Mapping[str, str]) -> None:
    p = commands.add_parser("score", help="score an answer file")
    p.add_argument("task", help="benchmark, e.g. gqa")
    p.add_argument("--answers", required=True, type=Path, help="answer file: JSON lines with LLaVA's fields")
    p.add_argument("--data", type=Path, help="the benchmark's folder in LLaVA's layout")
    p.add_argument("--questions", type=Path, help="question file instead of DATA's; only its questions are scored")
    p.add_argument("--annotations", type=Path, help="annotation file (a folder for POPE and MME) instead of DATA's")
    p.add_argument("--export", type=Path, help="folder for the official formats; default beside the answers")
    _add_json(p)
    p = commands.add_parser("data", help="list the files of a benchmark, and where the missing ones are published")
    p.add_argument("task", help="benchmark, or all")
    p.add_argument("--data", type=Path, default=env.get("DATA") or DATA, help=f"folder, see eval (default {DATA})")
    p.add_argument("--download", action="store_true", help="fetch missing files; an interrupted download resumes")
    _add_json(p)


def _add_methods(commands: Any) -> None:
    p = commands.add_parser("methods", help="compare methods: where they prune, tokens, FLOPs; --long for everything")
    p.add_argument("--long", action="store_true", help="tokens of every layer, positions, origin and hyper-parameters")
    what = "method, preset, composition or file.py:name, a list of them, or all (default all)"
    p.add_argument("--method", type=arguments.names, default=["all"], help=what)
    text = "visual token budget, or a list 192,128,64 (default 64)"
    p.add_argument("--tokens", type=arguments.counts, default=[64], help=text)
    _add_size(p)
    p = commands.add_parser("flops", help="FLOPs by equation (2) under each way of counting tokens")
    text = "visual token budget, or a list (default 192,128,64)"
    p.add_argument("--tokens", type=arguments.counts, default=[192, 128, 64], help=text)
    text = "slopes of AutoPrune's retention curve (default 0,0.1,0.2)"
    p.add_argument("--slope", type=arguments.floats, default=[0.0, 0.1, 0.2], help=text)
    text = "published percentages, one for each budget: find the text length that gives them"
    p.add_argument("--published", type=arguments.percents, default=[], help=text)
    _add_size(p)


def _add_results(commands: Any) -> None:
    p = commands.add_parser("results", help="list finished runs, or compare two of them question by question")
    text = f"folder of a run, or one above several (default {RESULTS})"
    p.add_argument("places", nargs="*", metavar="PLACE", help=text)
    p.add_argument("--task", type=arguments.words, default=[], help="only these benchmarks, a list a,b")
    p.add_argument("--method", type=arguments.words, default=[], help="only these methods, a list a,b")
    text = "only these models: paths, hub ids or their last components, a list a,b"
    p.add_argument("--model", type=arguments.words, default=[], help=text)
    p.add_argument("--tokens", type=arguments.counts, default=[], help="only these budgets, a list 192,128,64")
    p.add_argument("--folders", action="store_true", help="show the folder of each run")
    text = "compare two runs: folders, or their paths below PLACE such as gqa/llava-tiny/full"
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help=text)
    text = "flipped questions that --compare lists (default 20)"
    p.add_argument("--show", type=arguments.natural, default=None, help=text)
    group = p.add_mutually_exclusive_group()
    _add_json(group)
    group.add_argument("--csv", metavar="FILE", help="write a table of all figures to a file; - for stdout")


def _add_figure(commands: Any) -> None:
    p = commands.add_parser("figure", help="draw figures of finished runs")
    p.add_argument("name", help=", ".join(arguments.FIGURES), metavar="NAME", choices=arguments.FIGURES)
    text = f"folders of runs, or above several; for speed, of measurements (default {RESULTS})"
    p.add_argument("--runs", nargs="+", default=[RESULTS], metavar="PLACE", help=text)
    _add_filters(p)
    text = f"file, .pdf, .png or .svg; without suffix a .pdf and a .png (default {RESULTS}/figures/NAME)"
    p.add_argument("--out", type=Path, help=text)


def _add_report(commands: Any) -> None:
    p = commands.add_parser("report", help="write a page with tables, figures and questions of finished runs")
    text = f"folders of runs, or above several (default {RESULTS})"
    p.add_argument("places", nargs="*", metavar="PLACE", help=text)
    _add_filters(p)
    text = "questions of each benchmark whose images are in the page, flipped ones first; 0 for none (default 60)"
    p.add_argument("--images", type=arguments.natural, default=60, metavar="N", help=text)
    text = f"file to write (default {RESULTS}/report.html)"
    p.add_argument("--out", type=Path, default=Path(RESULTS) / "report.html", metavar="FILE", help=text)


def _add_filters(p: argparse.ArgumentParser) -> None:
    """Add the flags that select finished runs of one model."""
    p.add_argument("--task", type=arguments.words, default=[], help="benchmark, or a list a,b (default all)")
    p.add_argument("--method", type=arguments.words, default=[], help="method, or a list a,b (default all)")
    p.add_argument("--model", help="checkpoint, needed where the runs are of several")
    p.add_argument("--tokens", type=arguments.counts, default=[], help="budget, or a list 128,64 (default all)")
    p.add_argument("--no-sweeps", action="store_true", help="leave out the variants of sweeps")


def _add_show(commands: Any, env: Mapping[str, str]) -> None:
    p = commands.add_parser(
        "show",
        help="ask about an image, and show the patches that each layer keeps",
        description="Answers a question with and without pruning, and draws the patches that remain.",
        epilog=ENVIRONMENT,
    )
    p.add_argument("--image", required=True, type=Path, help="image file")
    p.add_argument("--question", required=True, help="what to ask about it")
    p.add_argument("--short", action="store_true", help="ask for a single word or phrase, as GQA's questions do")
    p.add_argument("--layers", type=arguments.layers, help="decoder layers of the contact sheet, 0,4,11 (default six)")
    e = p.add_argument_group("settings")
    flag = functools.partial(arguments.flag, e, env)
    flag("method", "autoprune", "method, or file.py:name", type=arguments.method)
    flag("tokens", "64", "visual token budget", type=arguments.positive)
    arguments.add_method_args(e, env, "mi_scale=8,k0=0.3")
    _add_one_model(flag)
    text = f"file: .png, .pdf, .svg or .html; without suffix a .pdf and a .png (default {RESULTS}/figures/kept)"
    p.add_argument("--out", type=Path, default=Path(RESULTS) / "figures" / "kept", help=text)
    _add_json(p)


def _add_one_model(flag: Any) -> None:
    """Add the flags of commands that ask a model single questions."""
    _add_model_flags(flag)
    flag("seed", "0", "random seed of methods that draw", type=arguments.seed)
    flag("new", "64", "largest number of new tokens of an answer", type=arguments.positive)


def _add_model_flags(flag: Any) -> None:
    """Add the flags that say which model is loaded, and how."""
    flag("model", TINY, "checkpoint folder or hub id, in either format")
    flag("model-base", None, "checkpoint that MODEL, an adapter, was trained on")
    flag("family", "auto", "classes to load: llava (haotian-liu/LLaVA), hf (transformers) or auto")
    flag("conv-mode", None, CONV_MODE)
    flag("device", None, "cuda, cuda:1 or cpu; default cuda where available")
    flag("dtype", None, "float32, float16 or bfloat16; default the checkpoint's own")


def _add_demo(commands: Any, env: Mapping[str, str]) -> None:
    p = commands.add_parser(
        "demo",
        help="a local page that compares the answers of two methods with the unpruned one",
        description="Serves a page on this machine. It needs gradio: pip install 'llava-prune[demo]'.",
        epilog=ENVIRONMENT,
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine only)")
    p.add_argument("--port", type=arguments.whole(1, 65535), default=7860, help="port to listen on (default 7860)")
    p.add_argument("--short", action="store_true", help="ask for a single word or phrase at first")
    e = p.add_argument_group("settings")
    flag = functools.partial(arguments.flag, e, env)
    text = "methods at first, one or two; a method of yours as file.py:name"
    flag("method", "autoprune,fastv", text, type=arguments.names)
    flag("tokens", "64", "budget at first: visual tokens, or percent of them")
    arguments.add_method_args(e, env, "mi_scale=8,k0=0.3")
    _add_one_model(flag)
    flag("data", DATA, "folder with the benchmarks' files; GQA's give the examples")


def _add_run(commands: Any, env: Mapping[str, str]) -> None:
    text = "run a program of package llava or a script that starts some, unchanged, with every model pruned"
    epilog = "The environment variable METHOD_ARGS sets hyper-parameters, too."
    p = commands.add_parser("run", help=text, epilog=epilog)
    text = "method, or file.py:name (default autoprune)"
    p.add_argument("--method", default="autoprune", type=arguments.method, help=text)
    text = "visual token budget (default the method's own)"
    p.add_argument("--tokens", type=arguments.positive, default=None, help=text)
    arguments.add_method_args(p, env, "mi_scale=8,k0=0.3", "--hyper")
    text = "-- python -m llava.eval.model_vqa_loader ..., or a script that starts such programs: -- bash FILE ..."
    p.add_argument("program", nargs=argparse.REMAINDER, help=text)


def _add_vlmevalkit(commands: Any, env: Mapping[str, str]) -> None:
    p = commands.add_parser(
        "vlmevalkit",
        help="run VLMEvalKit with the pruned model among its models",
        description="The model is called CHECKPOINT-METHOD-TOKENS, and is chosen unless the program names another.",
        epilog=ENVIRONMENT,
    )
    e = p.add_argument_group("settings")
    flag = functools.partial(arguments.flag, e, env)
    flag("method", "autoprune", "method, or file.py:name", type=arguments.method)
    flag("tokens", "64", "visual token budget", type=arguments.positive)
    arguments.add_method_args(e, env, "mi_scale=8,k0=0.3")
    _add_model_flags(flag)
    text = "-- run.py --data MME POPE, of a clone of VLMEvalKit, or -- vlmeval.run --data ... of an installed one"
    p.add_argument("program", nargs=argparse.REMAINDER, help=text)


def _add_completion(commands: Any) -> None:
    text = "print a script that completes commands and flags in a shell"
    epilog = "For bash: llava-prune completion bash > ~/.local/share/bash-completion/completions/llava-prune"
    p = commands.add_parser("completion", help=text, epilog=epilog)
    p.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def make_parser(env: Mapping[str, str]) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    Args:
        env: environment variables, which are the defaults of settings.
    """
    out = argparse.ArgumentParser(prog="llava-prune", description="Visual token pruning for LLaVA.")
    out.add_argument("--version", action="version", version=f"llava-prune {__version__}")
    commands = out.add_subparsers(dest="command", required=True)
    _add_eval(commands, env)
    _add_table(commands, env)
    _add_sweep(commands, env)
    _add_bench(commands, env)
    _add_data(commands, env)
    _add_methods(commands)
    _add_results(commands)
    _add_figure(commands)
    _add_show(commands, env)
    _add_report(commands)
    _add_demo(commands, env)
    _add_run(commands, env)
    _add_vlmevalkit(commands, env)
    _add_completion(commands)
    return out


def _add_json(p: Any) -> None:
    p.add_argument("--json", action="store_true", help="print JSON on stdout, nothing else")


def _add_format(p: argparse.ArgumentParser) -> None:
    p.add_argument("--format", choices=FORMATS, default="text", help="default text, for the terminal")
    _add_json(p)


def _add_size(p: argparse.ArgumentParser) -> None:
    """Add the flags of a model's size; the defaults are those of LLaVA-1.5-7B."""
    p.add_argument("--layers", type=arguments.whole(1, 1000), default=32, help="decoder layers (default 32)")
    sizes = {"hidden": (4096, "hidden size"), "intermediate": (11008, "MLP size")}
    sizes["visual"] = 576, "visual tokens before pruning"
    for name, (value, text) in sizes.items():
        p.add_argument(f"--{name}", type=arguments.positive, default=value, help=f"{text} (default {value})")
    text = "text tokens of a prompt (default 70)"
    p.add_argument("--text", type=arguments.number(0, MOST), default=70.0, help=text)
    _add_json(p)
