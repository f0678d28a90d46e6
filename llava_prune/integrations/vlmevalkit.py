"""`llava-prune vlmevalkit`: run VLMEvalKit with a pruned model among its models.

VLMEvalKit has no plugins; its models are entries of one dictionary, which all its parts share. Importing VLMEvalKit
turns off the verification of SSL certificates and reads a .env file, so only this module imports it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from .. import attach, load
from ..eval.asking import check_loaded
from ..eval.protocol import protocol_of
from ..eval.task import load_task
from ..eval.tasks.mmbench import text_of
from ..methods.planner import Run
from ..report.store import model_id
from .answering import answers, one_run, prepared

POLITE = "Please answer yes or no."
"""Instruction at the end of VLMEvalKit's yes/no questions; LLaVA uses another one."""
LIMITS = {"MCQ": 1024, "Y/N": 128}
"""Type of a benchmark -> largest number of new tokens, as in LLaVA's scripts; 1024 for other types."""


def instruction(kind: str, name: str) -> str:
    """Return LLaVA's instruction line for a benchmark.

    Args:
        kind: type of the benchmark in VLMEvalKit.
        name: name of the benchmark.
    """
    task = "gqa"
    if kind == "MCQ":
        task = "mmbench_cn" if name.startswith(("MMBench_CN", "MMBench_DEV_CN", "MMBench_TEST_CN")) else "mmbench"
    return load_task(task).suffix


def question_text(row: Mapping[str, Any], kind: str, name: str) -> str:
    """Return the text of a question under LLaVA's protocol.

    Args:
        row: row of the benchmark's table.
        kind: "MCQ", "Y/N" or "VQA".
        name: name of the benchmark.
    """
    if kind == "MCQ":
        text = text_of({k: None if v != v or v is None else str(v) for k, v in row.items()})
    else:
        text = str(row["question"]).removesuffix(POLITE).rstrip()
    return f"{text}\n{instruction(kind, name)}"


def model_class() -> Any:
    """Create the class of the model, inside a function because its base class is VLMEvalKit's."""
    from vlmeval.dataset import DATASET_TYPE
    from vlmeval.vlm.base import BaseModel

    class LlavaPrune(BaseModel):
        """A pruned model, which VLMEvalKit asks one question at a time.

        Args:
            path: checkpoint folder or hub id.
            run: method and budget.
            conv_mode: see `protocol_of`.
            how: further arguments of `llava_prune.load`.
        """

        INTERLEAVE = True

        def __init__(self, path: str, run: Run, conv_mode: str | None = None, **how: Any) -> None:
            super().__init__()
            self.protocol = protocol_of(path, conv_mode)
            self.loaded = load(path, **how)
            check_loaded(self.loaded, path, [run], self.protocol)
            self.handle = attach(self.loaded.model, run.method)

        def use_custom_prompt(self, dataset: str) -> bool:
            """Return whether LLaVA's prompts are used: for multiple choice, yes/no and short answers."""
            return DATASET_TYPE(dataset) in ("MCQ", "Y/N", "VQA")

        def build_prompt(self, line: Any, dataset: str) -> list[dict[str, str]]:
            """Return images and text of a row of a benchmark."""
            text = question_text(dict(line), DATASET_TYPE(dataset), dataset)
            images = self.dump_image(line, dataset)
            parts = [{"type": "image", "value": str(path)} for path in images]
            return [*parts, {"type": "text", "value": text}]

        def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
            """Return the answer to a message."""
            from PIL import Image

            text = "\n".join(part["value"] for part in message if part["type"] == "text")
            with contextlib.ExitStack() as files:
                parts = [part["value"] for part in message if part["type"] == "image"]
                images = [files.enter_context(Image.open(path)) for path in parts]
                prompt = prepared(text, images, self.protocol, self.loaded)
            limit = LIMITS.get(DATASET_TYPE(dataset) if dataset else "", 1024)
            return answers([prompt], self.protocol, self.loaded, limit)[0]

    return LlavaPrune


def command(args: argparse.Namespace) -> int:
    """Run `llava-prune vlmevalkit` and return its exit status.

    Raises:
        ValueError: for bad input, or if VLMEvalKit is not installed.
    """
    words = args.program[1:] if args.program[:1] == ["--"] else list(args.program)
    if not words:
        raise ValueError("no program given; write it after --, e.g. -- run.py --data MME POPE")
    run = one_run(args.method, args.tokens, args.method_args or {})
    name = f"{model_id(args.model)}-{run.label}"
    how = {k: getattr(args, k) for k in ("family", "dtype", "device", "model_base") if getattr(args, k) is not None}
    try:
        from vlmeval.config import supported_VLM

        cls = model_class()
    except ImportError as error:
        raise ValueError(
            f"VLMEvalKit cannot be imported ({error}); install it from its repository, or pip install nvidia-vlmeval"
        ) from error
    supported_VLM[name] = functools.partial(cls, args.model, run, args.conv_mode, **how)
    if "--model" not in words and "--config" not in words:
        words += ["--model", name]
    with mock.patch.object(sys, "argv", words):
        if words[0].endswith(".py"):
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    return 0
