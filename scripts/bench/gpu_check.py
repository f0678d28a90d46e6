"""The stages of gpu_check.sh. Each runs in a process of its own and writes OUT/<stage>.json after every measurement.

python scripts/bench/gpu_check.py c --out results --device cuda --shape 7b    # one stage
python scripts/bench/gpu_check.py stages "a c d"                              # their processes and time limits
python scripts/bench/gpu_check.py table --out results                         # what was measured, as a short table
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"a": 40, "b": 55, "c": 120, "d1": 65, "d2": 70, "e": 80, "f": 40}
"""Process -> time limit in seconds. Stage d has two processes: tests, which may leave the GPU unusable, and times."""
WHOLE = 480
"""Time limit of all processes together in seconds."""
PACKAGES: tuple[str, ...] = ("torch", "transformers", "triton", "accelerate", "numpy", "pillow", "pytest", "hypothesis")
PACKAGES += ("rich", "sentencepiece", "safetensors", "shortuuid", "llava-torch")
CARD = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit"
CARD += ",temperature.gpu,utilization.gpu,compute_mode"
METHODS = ("autoprune", "fastv", "visionzip")
VECTORS = ("test_autoprune.py", "test_llm_side.py", "test_vision_side.py")


@dataclass(frozen=True)
class Plan:
    """The amount of work of a stage.

    Attributes:
        device: "cuda" or "cpu".
        shape, crops: random models without and with image crops, see `llava_prune.bench.shapes`.
        tokens: budget.
        repeats, warmup, new, batch: see `llava_prune.bench.speed.Settings`; `batch` is the large batch size.
        memory: whether to measure peak memory, which takes long on a CPU.
        questions, rounds: numbers of questions and rounds for the rate of questions.
        compared: number of questions whose kept tokens are compared.
    """

    device: str
    shape: str = "7b"
    tokens: int = 64
    repeats: int = 10
    warmup: int = 3
    new: int = 6
    batch: int = 16
    memory: bool = True
    questions: int = 128
    rounds: int = 2
    compared: int = 8

    @property
    def crops(self) -> str:
        return f"next-{self.shape}"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"


def plan_of(device: str, shape: str) -> Plan:
    """Return a plan with real sizes or, for shape "tiny", with sizes that take seconds on a CPU."""
    if shape != "tiny":
        return Plan(device, shape)
    return Plan(device, shape, 160, 1, 1, 2, batch=2, memory=False, questions=4, rounds=1, compared=1)


class Report:
    """A JSON result that is written to disk after every `put`."""

    def __init__(self, path: Path, **head: Any) -> None:
        self.path, self.began = path, time.perf_counter()
        self.values: dict[str, Any] = {**head, "complete": False}

    def put(self, **values: Any) -> None:
        """Add values and write the file atomically."""
        self.values |= values | {"seconds": round(time.perf_counter() - self.began, 1)}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.values, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(part, self.path)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record an error in the block under "errors" and continue."""
        try:
            yield
        except Exception as error:  # any library may fail; the next part may still work
            traceback.print_exc()
            self.put(errors={**self.values.get("errors", {}), name: message(error)})


def message(error: BaseException) -> str:
    """Return a short text for an error, which names a missing package."""
    if isinstance(error, ModuleNotFoundError):
        return f"package {error.name} is missing; put its wheel into the folder WHEELS"
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 600 else f"{text[:600]}..."


def versions() -> dict[str, str | None]:
    """Return the versions of the packages; None for missing ones."""
    out: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = None
    return out


def card() -> dict[str, str] | None:
    """Return the facts about the GPU that nvidia-smi reports; None without it. Settings are read only."""
    try:
        command = ["nvidia-smi", f"--query-gpu={CARD}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(CARD.split(","), (v.strip() for v in done.stdout.split("\n")[0].split(",")), strict=False))


# stages -------------------------------------------------------------------------------------------------------


def stage_a(plan: Plan, report: Report) -> None:
    """Record versions, GPU and clocks; measure peak rates; compare the tiny model's kept tokens on device and CPU."""
    report.put(versions=versions(), card=card())
    import torch

    import llava_prune
    from llava_prune.bench.floor import measure_machine
    from llava_prune.bench.flops import Size

    report.put(cuda=torch.version.cuda, threads=torch.get_num_threads(), cores=os.cpu_count())
    width = 8192 if plan.device == "cuda" else 256
    machine = measure_machine(torch.device(plan.device), getattr(torch, plan.dtype), width, Size(1, width, width, 1))
    report.put(matrix_product_flops=machine.flops, copy_bytes=machine.bandwidth, card_after=card())
    load: Any = _tiny
    same = compared(plan, load("cpu", "float32"), load(plan.device, "float32"))
    report.put(llava_prune=llava_prune.__version__, against_cpu=same, equal=all(r["equal"] for r in same))


def _tiny(device: str, dtype: str) -> Any:
    import torch

    import llava_prune
    from llava_prune.arguments import TINY

    torch.backends.cudnn.allow_tf32 = False  # rounds float32 convolutions
    return llava_prune.load(TINY, family="hf", dtype=dtype, device=device)


def compared(plan: Plan, first: Any, second: Any) -> list[dict[str, Any]]:
    """Compare the kept tokens of two models for the same questions.

    The measure is intersection over union, as mean and least over layers.
    """
    from statistics import fmean

    from llava_prune.eval.asking import prepare
    from llava_prune.eval.plan import Settings, plan_runs
    from llava_prune.eval.rounding import overlap, watch
    from llava_prune.eval.run import read_files
    from llava_prune.eval.task import load_task

    settings = Settings(methods=METHODS, tokens=(64,), family="hf", limit=plan.compared, reference=False, batch=1)
    task = load_task(settings.task)
    files, runs = read_files(task, settings), plan_runs(settings, task)
    benches = [prepare(settings, task, files, runs, loaded) for loaded in (first, second)]
    out = []
    for run in runs:
        one, two = (watch(bench, run) for bench in benches)
        shares = overlap(one, two)
        row = {"method": run.label, "questions": len(one.kept), "equal": one.kept == two.kept}
        row |= {"overlap": {"mean": fmean(shares), "least": min(shares)}}
        row["same_answers"] = fmean(one.rows[i]["text"] == two.rows[i]["text"] for i in one.rows)
        out.append(row)
    return out


def stage_b(plan: Plan, report: Report) -> None:
    """Check recorded vectors in float32 on the device; compare the tokens kept in bfloat16 and in float32."""
    os.environ["GOLDEN_DEVICE"] = plan.device
    files = [str(ROOT / "tests" / "golden" / name) for name in VECTORS]
    with report.attempt("vectors"):
        run_tests(report, [*files, "-k", "test_autoprune or fastv or visionzip"])
    report.put(bfloat16=compared(plan, _tiny(plan.device, "float32"), _tiny(plan.device, "bfloat16")))


def run_tests(report: Report, arguments: Sequence[str]) -> None:
    """Run pytest in this process; the counts and failures so far are written to disk after every test."""
    import pytest

    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: dict[str, str] = {}
    skips: Counter[str] = Counter()

    class Watcher:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1
                if report.failed:
                    crash = getattr(report.longrepr, "reprcrash", None)
                    failures[report.nodeid] = str(crash.message if crash else report.longrepr)[:600]
                if report.skipped:
                    skips[reason(report)] += 1
                note()

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                failures[report.nodeid] = str(report.longrepr)[-600:]
            if report.skipped:
                skips[reason(report)] += 1

    def reason(report: Any) -> str:
        return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[-200:]

    def note() -> None:
        report.put(tests={**counts, "failures": failures, "skips": dict(skips)})

    base = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "--import-mode=importlib"]
    status = pytest.main([*base, "--rootdir", str(ROOT), *arguments], plugins=[Watcher()])
    note()
    report.put(tests={**report.values["tests"], "status": int(status)})


def stage_c(plan: Plan, report: Report) -> None:
    """Measure prefill, decode, total and memory: batch 1 and a large batch, crops, then other budgets and methods."""
    loaded = _random(plan, plan.shape)
    times(plan, report, loaded, "batch 1")
    times(plan, report, loaded, f"batch {plan.batch}", batches=(plan.batch,))
    times(plan, report, _random(plan, plan.crops), "crops", tokens=(160,))
    times(plan, report, loaded, "budgets", tokens=(128, 192))
    for name in ("autoprune-flash", "fastv", "visionzip"):
        times(plan, report, loaded, name, methods=(name,))


def _random(plan: Plan, shape: str) -> Any:
    import torch

    from llava_prune.bench.shapes import random_model

    return random_model(shape, torch.device(plan.device), getattr(torch, plan.dtype), "sdpa")


def times(plan: Plan, report: Report, loaded: Any, name: str, **more: Any) -> None:
    """Add rows of `llava-prune bench` as soon as they are measured, by default for AutoPrune."""
    from llava_prune.bench.speed import Settings, results

    given: dict[str, Any] = {"tokens": (plan.tokens,), "new": plan.new, "repeats": plan.repeats, "warmup": plan.warmup}
    given |= {"memory": plan.memory, **more}
    settings = Settings(shape=loaded.path, **given)
    before = report.values.get("rows", [])
    with report.attempt(name):
        for result in results(settings, print, loaded=loaded):
            rows = [{"part": name, "shape": loaded.path, **row} for row in result["rows"]]
            report.put(machine=result["machine"], rows=[*before, *rows])


def stage_d1(plan: Plan, report: Report) -> None:
    """Run the tests of the experimental kernels and graphs."""
    folder = ROOT / "tests" / "experimental"
    files = [str(folder / name) for name in ("test_cuda.py", "test_fused.py", "test_kernels.py")]
    run_tests(report, [*files, "-m", "experimental", "--deselect", f"{files[-1]}::test_they_compile_for_a_gpu"])


def stage_d2(plan: Plan, report: Report) -> None:
    """Measure times in plain torch, with fused cuts, with graphs, and with both."""
    loaded = _random(plan, plan.shape)
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "fused": {"fused": True},
        "graphs": {"graphs": True, "methods": ("autoprune", "full")},
        "graphs and fused": {"graphs": True, "fused": True},
    }
    for name, more in variants.items():
        times(plan, report, loaded, name, memory=False, **more)


def stage_e(plan: Plan, report: Report) -> None:
    """Measure questions per second on the mini GQA: batch size chosen by memory against a loop at batch 1."""
    from llava_prune.arguments import TINY
    from llava_prune.eval.plan import Settings
    from llava_prune.eval.rate import LOOP, Arm, measure

    settings = Settings(model=TINY, family="hf", tokens=(64,), limit=plan.questions, max_new_tokens=2)
    arms = [Arm(LOOP), Arm("autoprune"), Arm("full")]
    took: dict[str, list[float]] = {}

    def note(arm: str, seconds: float) -> None:
        took.setdefault(arm, []).append(seconds)
        report.put(round_seconds=took)

    result = measure(settings, arms, plan.rounds, _answering(plan), note)
    report.put(**{**result, "model": plan.shape})


def _answering(plan: Plan) -> Any:
    """Return a random model with a tokenizer and an image processor; in a rehearsal, the tiny model itself."""
    from llava_prune.arguments import TINY
    from llava_prune.models.files import load_tokenizer, processor_class
    from llava_prune.models.load import Loaded

    if plan.shape == "tiny":
        return _tiny(plan.device, plan.dtype)
    model = _random(plan, plan.shape).model
    side = model.config.vision_config.image_size
    processor = processor_class()(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return Loaded(model, load_tokenizer(Path(TINY), True), processor, "hf", TINY)


def stage_f(plan: Plan, report: Report) -> None:
    """Profile a pruned and an unpruned prefill: operations outside the layers, launches, synchronisations."""
    import llava_prune
    from llava_prune.bench.operations import operations
    from llava_prune.bench.request import request

    loaded = _random(plan, plan.shape)
    asked = request(loaded, 1, 84, 2)
    for name in ("autoprune", "full"):
        hyper = {"tokens": 64} if name == "autoprune" else {}
        with report.attempt(name), llava_prune.pruned(loaded.model, name, **hyper):
            report.put(**{name: operations(loaded.model, asked.prefill)})


STAGES: dict[str, Callable[[Plan, Report], None]] = {
    "a": stage_a,
    "b": stage_b,
    "c": stage_c,
    "d1": stage_d1,
    "d2": stage_d2,
    "e": stage_e,
    "f": stage_f,
}


# command line -------------------------------------------------------------------------------------------------------


def chosen(names: str) -> list[str]:
    """Return the processes of some stages, in order of value.

    Raises:
        ValueError: for an unknown stage.
    """
    wanted = names.replace(",", " ").split()
    for name in wanted:
        if not any(stage.startswith(name) for stage in STAGES):
            raise ValueError(f"STAGES={names}: there is no stage {name}; choose from a b c d e f")
    return [stage for stage in STAGES if any(stage.startswith(name) for name in wanted)]


def run(name: str, plan: Plan, out: Path) -> int:
    """Run a stage; return 1 if an error stops it, which is recorded in its file."""
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out / f"{name}.json", stage=name, plan=vars(plan))
    report.put()
    try:
        STAGES[name](plan, report)
    except Exception as error:
        traceback.print_exc()
        report.put(error=message(error))
        return 1
    report.put(complete=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*STAGES, "stages", "table"])
    parser.add_argument("names", nargs="?", default="a b c d e f", help="stages to list")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b")
    args = parser.parse_args(argv)
    if args.what == "stages":
        print("\n".join(f"{name} {LIMITS[name]}" for name in chosen(args.names)))
    elif args.what == "table":
        from gpu_table import lines

        print("\n".join(lines(args.out, STAGES)))
    else:
        return run(args.what, plan_of(args.device, args.shape), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
