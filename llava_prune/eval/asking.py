"""Put questions to a loaded model: batches of similar length, one tower pass a picture, halved when memory runs out."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shortuuid
import torch

import llava_prune

from ..models.load import resolve
from .images import pixels
from .plan import Run, Settings, check_budgets
from .prompt import check_tokenizer, token_ids, vicuna_v1
from .task import Question, Sources, Task

log = logging.getLogger(__name__)


@dataclass
class Files:
    """The benchmark's files, read and checked."""

    sources: Sources
    questions: list[Question]
    labels: Any


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
    from ..models.load import is_original, read_config

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


def prepare(settings: Settings, task: Task, files: Files, runs: Sequence[Run], loaded: Any = None) -> Bench:
    """Load the model, unless it is given, and tokenise all questions.

    Raises:
        ValueError: for a broken checkpoint, a foreign tokenizer, or a budget above the model's visual tokens.
    """
    start = time.perf_counter()
    loaded = loaded or load_model(settings)
    seconds = time.perf_counter() - start
    check_budgets(runs, loaded.n_visual)
    vocab = loaded.model.get_input_embeddings().num_embeddings
    text_config = getattr(loaded.model.config, "text_config", None) or loaded.model.config
    check_tokenizer(loaded.tokenizer, vocab, text_config, settings.model)
    if loaded.image_processor is None:
        raise ValueError(f"{settings.model} has no preprocessor_config.json; add the one of its vision tower")
    rows = [token_ids(vicuna_v1(q.text, q.image is not None), loaded.tokenizer) for q in files.questions]
    longest = max(len(r) for r in rows) + task.max_new_tokens
    batch = settings.batch or auto_batch(loaded, longest)
    return Bench(loaded, task, files, pads(loaded, settings.model), rows, batch, seconds)


def batches(bench: Bench, numbers: Sequence[int]) -> list[list[int]]:
    """Question numbers in batches of similar length, longest first; the same for a resumed run.

    Questions without a picture have batches of their own.
    """
    out = []
    for plain in (False, True):
        some = [i for i in numbers if (bench.files.questions[i].image is None) == plain]
        some.sort(key=lambda i: (-len(bench.rows[i]), i))
        out += [some[i : i + bench.batch] for i in range(0, len(some), bench.batch)]
    return out


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


def ask(bench: Bench, method: Any, numbers: Sequence[int]) -> torch.Tensor:
    """New ids of a batch of questions, (B, new)."""
    values, sizes, keys = [], [], []
    for name in (bench.files.questions[i].image for i in numbers):
        if name is None:
            continue
        if bench.memo is not None and bench.memo.holds(name, method):  # the pixels do not matter
            values.append(torch.zeros(bench.shape))
        else:
            image = bench.files.sources.picture(name)
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


def answer(bench: Bench, handle: Any, numbers: Sequence[int], run: Run, name: str) -> list[dict[str, Any]]:
    """Rows of the answer file for a batch; halves the batch when memory runs out.

    Args:
        bench: model and questions.
        handle: of the attached method.
        numbers: question numbers, all with a picture or all without.
        run: method and budget.
        name: what LLaVA writes as model_id.

    Raises:
        torch.OutOfMemoryError: when a single question does not fit.
    """
    if len(numbers) > bench.batch:
        parts = [numbers[i : i + bench.batch] for i in range(0, len(numbers), bench.batch)]
        return [row for part in parts for row in answer(bench, handle, part, run, name)]
    start, tower = time.perf_counter(), bench.tower
    try:
        new = ask(bench, run.method, numbers)
    except torch.OutOfMemoryError:
        if len(numbers) == 1:
            raise
        bench.batch = max(1, len(numbers) // 2)
        log.warning("out of memory with %d samples at once; going on with %d", len(numbers), bench.batch)
        new = None
    if new is None:  # outside the handler, which would keep the failed tensors alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return answer(bench, handle, numbers, run, name)
    tower = bench.tower - tower
    seconds = time.perf_counter() - start - tower
    texts = bench.loaded.tokenizer.batch_decode(new, skip_special_tokens=True)
    pictured = bench.files.questions[numbers[0]].image is not None  # a batch has pictures throughout or none
    none = [[0] * bench.loaded.shape.layers] * len(numbers)
    entering = handle.last.tokens_in.tolist() if pictured else none
    leaving = handle.last.tokens_out.tolist() if pictured else none
    stats = handle.last.stats if pictured else {}
    out = []
    for k, (i, text) in enumerate(zip(numbers, texts, strict=True)):
        question = bench.files.questions[i]
        out.append({
            "question_id": question.id,
            "prompt": question.stored,
            "text": text.strip(),
            "answer_id": shortuuid.uuid(name=f"{name} {run.label} {i} {question.id}"),  # the same in a resumed run
            "model_id": name,
            "metadata": {},
            **question.extra,
            "kept": {"entering": entering[k], "leaving": leaving[k]},
            "stats": {s: float(v[k]) for s, v in stats.items()},
            "row": i,
            "seconds": seconds / len(numbers),
            "tower_seconds": tower / len(numbers),
        })  # fmt: skip
    return out
