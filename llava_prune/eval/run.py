"""Run a benchmark: every method and budget over the same questions, one tower pass a picture."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shortuuid
import torch

import llava_prune

from ..families.load import resolve
from .answers import Answers, model_id, write_whole
from .images import open_rgb, pixels
from .plan import RESULTS, Run, Settings, check_budgets, fingerprint, plan_runs
from .prompt import IMAGE_ID, check_tokenizer, token_ids, vicuna_v1
from .result import Facts, compare, dump, make_result
from .task import Question, Task, check_images, file_version, load_task, read_questions

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
"""Called with (run label, answers done, answers wanted)."""


@dataclass
class Files:
    """The benchmark's files, read and checked."""

    questions: list[Question]
    images: Path
    annotations: Path
    labels: dict[str, Any]
    versions: dict[str, Any]


@dataclass
class Bench:
    """A loaded model before its questions.

    Attributes:
        loaded: see `llava_prune.load`.
        rows: token ids of each question.
        batch: samples at once, halved for good when memory runs out.
        load: seconds that loading took.
        tower: seconds in the vision tower so far.
        memo: what the tower made of each picture.
        sizes: (width, height) of the pictures so far.
        shape: (3, H, W) of the tower's input.
    """

    loaded: Any
    task: Task
    files: Files
    pad: bool
    rows: list[list[int]]
    batch: int
    load: float
    tower: float = 0.0
    memo: Any = None
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    shape: tuple[int, ...] = ()


def read_files(task: Task, settings: Settings) -> Files:
    """Find and check everything a run needs from disk.

    Raises:
        ValueError: for missing or broken files, missing pictures, or questions without annotation.
    """
    data = Path(settings.data).expanduser()
    path = task.find(data, "questions")
    annotations = task.find(data, "annotations")
    images = task.find(data, "images", folder=True)
    questions = read_questions(path, settings.limit)
    check_images(questions, images)
    labels = task.scorer.load_labels(annotations)
    unknown = [str(q.id) for q in questions if str(q.id) not in labels]
    if unknown:
        shown = ", ".join(unknown[:10])
        raise ValueError(f"{annotations} lacks {len(unknown)} of the {len(questions)} questions in {path}: {shown}")
    return Files(
        questions,
        images,
        annotations,
        labels,
        {"questions": file_version(path), "annotations": file_version(annotations)},
    )


def load_model(settings: Settings) -> Any:
    """`llava_prune.load` with every failure as a ValueError."""
    try:
        return llava_prune.load(
            settings.model, family=settings.family, dtype=settings.dtype, device=settings.device, attn=settings.attn
        )
    except (ValueError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        detail = str(error).strip().split("\n")[0]
        raise ValueError(f"{settings.model} cannot be loaded: {type(error).__name__}: {detail}") from error


def pads(loaded: Any, model: str) -> bool:
    """Whether LLaVA's code pads pictures for this checkpoint; transformers' format says nothing and is padded.

    Raises:
        ValueError: for anyres checkpoints, whose protocol is another one.
    """
    from ..families.load import is_original, read_config

    config = read_config(resolve(model))
    aspect = config.get("image_aspect_ratio")
    if aspect == "anyres" or config.get("model_type") == "llava_next":
        raise ValueError(f"{model}: the LLaVA-1.5 protocol has no anyres pictures; evaluate a LLaVA-1.5 checkpoint")
    return aspect == "pad" if is_original(config) else True


def auto_batch(loaded: Any, longest: int) -> int:
    """A batch that should fit: half the free memory over a rough cost of one sample, at most 64 (16 on a CPU)."""
    shape, width = loaded.shape, next(loaded.model.parameters()).element_size()
    n = longest + loaded.n_visual
    cost = n * (2 * shape.layers * shape.hidden * width + 12 * shape.hidden * 4 + 3 * shape.intermediate * 4)
    cost += n * loaded.model.get_input_embeddings().num_embeddings * 4
    device = loaded.model.device
    if device.type == "cuda":
        free, cap = torch.cuda.mem_get_info(device)[0], 64
    else:
        free, cap = _free_memory(), 16
    fit = max(1, int(free / 2 / cost))
    return min(cap, 1 << (fit.bit_length() - 1))


def _free_memory() -> int:
    """Bytes a process may still take on the host; 2 GiB where the system does not say."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]) * 1024
    return 2 << 30


def prepare(settings: Settings, task: Task, files: Files, runs: Sequence[Run]) -> Bench:
    """Load the model and tokenise all questions.

    Raises:
        ValueError: for a broken checkpoint, a foreign tokenizer, or a budget above the model's visual tokens.
    """
    start = time.perf_counter()
    loaded = load_model(settings)
    seconds = time.perf_counter() - start
    check_budgets(runs, loaded.n_visual)
    vocab = loaded.model.get_input_embeddings().num_embeddings
    text_config = getattr(loaded.model.config, "text_config", None) or loaded.model.config
    check_tokenizer(loaded.tokenizer, vocab, text_config, settings.model)
    if loaded.image_processor is None:
        raise ValueError(f"{settings.model} has no preprocessor_config.json; add the one of its vision tower")
    rows = [token_ids(prompt_of(q, task), loaded.tokenizer) for q in files.questions]
    longest = max(len(r) for r in rows) + task.max_new_tokens
    batch = settings.batch or auto_batch(loaded, longest)
    return Bench(loaded, task, files, pads(loaded, settings.model), rows, batch, seconds)


def prompt_of(question: Question, task: Task) -> str:
    """The whole prompt of a question."""
    text = f"{question.text}\n{task.suffix}" if task.add_suffix else question.text
    return vicuna_v1(text, question.image is not None)


def batches(rows: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Question numbers in batches of similar length, longest first; the same for a resumed run."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    return [order[i : i + size] for i in range(0, len(order), size)]


@contextlib.contextmanager
def tower_clock(bench: Bench) -> Any:
    """Add the tower's time to `bench.tower`."""
    model = bench.loaded.model
    tower = model.get_vision_tower() if bench.loaded.family == "llava" else model.model.vision_tower
    began = [0.0]

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    def before(*_: Any) -> None:
        began[0] = now()

    def after(*_: Any) -> None:
        bench.tower += now() - began[0]

    hooks = [tower.register_forward_pre_hook(before), tower.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ask(bench: Bench, numbers: Sequence[int]) -> torch.Tensor:
    """New ids of a batch of questions, (B, new)."""
    values, sizes, keys = [], [], []
    for name in (bench.files.questions[i].image for i in numbers):
        if name is None:
            continue
        if bench.memo is not None and bench.memo.holds(name):  # the pixels do not matter
            values.append(torch.zeros(bench.shape))
        else:
            image = open_rgb(bench.files.images / name)
            values.append(pixels(image, bench.loaded.image_processor, bench.pad))  # (3, H, W)
            bench.shape = tuple(values[-1].shape)
            bench.sizes[name] = image.size
        sizes.append(bench.sizes[name])
        keys.append(name)
    return bench.loaded.generate(
        [bench.rows[i] for i in numbers],
        torch.stack(values) if values else None,
        sizes=sizes or None,
        keys=keys or None,
        max_new_tokens=bench.task.max_new_tokens,
    )


def answer(bench: Bench, handle: Any, numbers: Sequence[int], name: str) -> list[dict[str, Any]]:
    """Rows of the answer file for a batch; halves the batch when memory runs out.

    Raises:
        torch.OutOfMemoryError: when a single question does not fit.
    """
    if len(numbers) > bench.batch:
        parts = [numbers[i : i + bench.batch] for i in range(0, len(numbers), bench.batch)]
        return [row for part in parts for row in answer(bench, handle, part, name)]
    start, tower = time.perf_counter(), bench.tower
    try:
        new = ask(bench, numbers)
    except torch.OutOfMemoryError:
        if len(numbers) == 1:
            raise
        bench.batch = max(1, len(numbers) // 2)
        log.warning("out of memory with %d samples at once; going on with %d", len(numbers), bench.batch)
        new = None
    if new is None:  # outside the handler, which would keep the failed tensors alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return answer(bench, handle, numbers, name)
    tower = bench.tower - tower
    seconds = time.perf_counter() - start - tower
    texts = bench.loaded.tokenizer.batch_decode(new, skip_special_tokens=True)
    none = [[0] * bench.loaded.shape.layers] * len(numbers)  # no picture in the whole batch
    entering = handle.last.tokens_in.tolist() if handle.last else none
    leaving = handle.last.tokens_out.tolist() if handle.last else none
    stats = handle.last.stats if handle.last else {}
    out = []
    for k, (i, text) in enumerate(zip(numbers, texts, strict=True)):
        question = bench.files.questions[i]
        out.append({
            "question_id": question.id,
            "prompt": question.text,
            "text": text.strip(),
            "answer_id": shortuuid.uuid(),
            "model_id": name,
            "metadata": {},
            "kept": {"entering": entering[k], "leaving": leaving[k]},
            "stats": {s: float(v[k]) for s, v in stats.items()},
            "seconds": seconds / len(numbers),
            "tower_seconds": tower / len(numbers),
        })  # fmt: skip
    return out


def settings_of(settings: Settings, run: Run, bench: Bench, checkpoint: str) -> dict[str, Any]:
    """Everything that may change an answer."""
    loaded, parameter = bench.loaded, next(bench.loaded.model.parameters())
    return {
        "task": settings.task,
        "model": settings.model,
        "checkpoint": checkpoint,
        "method": run.name,
        "tokens": run.tokens,
        "hyper": {
            k: v if isinstance(v, (int, float, str, type(None))) else repr(v) for k, v in run.method.hyper().items()
        },
        "family": loaded.family,
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "attn": settings.attn,
        "max_new_tokens": bench.task.max_new_tokens,
        "limit": settings.limit,
        "seed": settings.seed,
        "questions": bench.files.versions["questions"]["sha256"],
        "pad": bench.pad,
    }


def run_method(bench: Bench, run: Run, answers: Answers, progress: Progress, name: str) -> None:
    """Answer whatever is not answered yet."""
    ids = [str(q.id) for q in bench.files.questions]
    total = len(ids)
    progress(run.label, len(answers.rows), total)
    if len(answers.rows) >= total:
        return
    with llava_prune.pruned(bench.loaded.model, run.method) as handle:
        for numbers in batches(bench.rows, bench.batch):
            if all(ids[i] in answers.rows for i in numbers):
                continue
            answers.add(answer(bench, handle, numbers, name))  # whole batches: a resumed run computes the same
            progress(run.label, len(answers.rows), total)


def out_folder(settings: Settings) -> Path:
    """Where results go: OUT, or playground/results/<task>/<model>[-first<limit>]."""
    if settings.out:
        return Path(settings.out).expanduser()
    part = "" if settings.limit is None else f"-first{settings.limit}"
    return Path(RESULTS) / settings.task / (model_id(settings.model) + part)


def evaluate(settings: Settings, progress: Progress = lambda *_: None, command: str = "") -> list[dict[str, Any]]:
    """Run every method at every budget and write answers, predictions and one result JSON for each.

    Args:
        settings: what to run.
        progress: told after every batch.
        command: recorded in the results.

    Returns:
        The results, the reference first; see `result.make_result`.

    Raises:
        ValueError: for bad input of any kind; what was answered stays on disk.
        OSError: when the disk is full or not writable.
    """
    task = load_task(settings.task)
    runs = plan_runs(settings)
    files = read_files(task, settings)
    out = out_folder(settings)
    torch.manual_seed(settings.seed)
    bench = prepare(settings, task, files, runs)
    checkpoint = fingerprint(resolve(settings.model))
    results: list[dict[str, Any]] = []
    with bench.loaded.remember_images([r.method for r in runs]) as bench.memo, tower_clock(bench):
        for run in runs:
            wanted = {**settings_of(settings, run, bench, checkpoint), "batch": settings.batch}
            with Answers(out / run.label, wanted, settings.restart, fill={"batch": bench.batch}) as answers:
                bench.batch = answers.settings["batch"]
                run_method(bench, run, answers, progress, model_id(settings.model))
                result = finish(bench, run, answers, command)
            compare(result, results[0] if settings.reference and results else None)
            write_whole(out / run.label / "result.json", dump(result))
            results.append(result)
    return results


def finish(bench: Bench, run: Run, answers: Answers, command: str) -> dict[str, Any]:
    """Write answers and predictions of a complete run and score it."""
    order = [q.id for q in bench.files.questions]
    seconds = {"load": bench.load, **answers.seconds()}
    rows = answers.finish(order)
    start = time.perf_counter()
    score = bench.task.scorer.score(rows, bench.files.labels, {str(q) for q in order})
    bench.task.scorer.export(rows, answers.folder)
    seconds["score"] = time.perf_counter() - start
    text = [sum(i != IMAGE_ID for i in r) for r in bench.rows]
    facts = Facts(bench.task.name, bench.task.figure, bench.loaded.shape, bench.loaded.n_visual, answers.settings)
    result = make_result(facts, run.label, score, rows, text, seconds)
    return {**result, "files": bench.files.versions, "command": command}
