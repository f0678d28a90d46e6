"""Ask a loaded model the questions of a benchmark, in batches of similar length."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import llava_prune

from ..methods.planner import Run, check_budgets, check_schedules
from ..models.parallel import smallest
from ..models.placement import devices, out_of_memory
from ..runtime.patching import execution_device
from ..runtime.questions import questions
from .feed import ImageFeed, Prepared
from .finite import Logits, locate
from .identity import vision_tower
from .plan import Settings
from .prompt import bare, check_tokenizer
from .protocol import Protocol, protocol_of
from .run_images import pack_layers
from .task import Question, Sources, Task, place_of

log = logging.getLogger(__name__)


@dataclass
class Files:
    """The files of a benchmark, read and checked."""

    sources: Sources
    questions: list[Question]
    labels: Any


@dataclass
class Bench:
    """A loaded model and the questions for it.

    Attributes:
        loaded: the model, see `llava_prune.load`.
        task: the benchmark.
        files: its files.
        protocol: prompts and preprocessing.
        rows: token ids of the prompt of each question.
        batch: batch size, halved when memory runs out.
        load: seconds spent on loading the model.
        feed: reads images in the background.
        tower: seconds spent in the vision tower so far.
        images: cache of the tower's outputs, see `Loaded.remember_images`.
        logits: records NaN and infinite logits, see `finite.watched`; None if the logits are not watched.
    """

    loaded: Any
    task: Task
    files: Files
    protocol: Protocol
    rows: list[list[int]]
    batch: int
    load: float
    feed: ImageFeed
    tower: float = 0.0
    images: Any = None
    logits: Logits | None = None

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Prompt length of each question in tokens."""
        return [len(r) for r in self.rows]


def load_model(settings: Settings) -> Any:
    """Load the model with the settings of an evaluation, see `llava_prune.load`.

    Raises:
        ValueError: if the checkpoint cannot be loaded.
    """
    family: Any = settings.family
    return llava_prune.load(
        settings.model,
        family=family,
        dtype=settings.dtype,
        device=settings.device,
        attn=settings.attn,
        model_base=settings.model_base,
        device_map=settings.device_map,
        load_8bit=settings.load_8bit,
        load_4bit=settings.load_4bit,
        engine=settings.engine,
    )


def auto_batch(loaded: Any, longest: int) -> int:
    """Choose a batch size: half of the free memory over a rough cost of a sample, at most 64 (16 on a CPU).

    The GPU with the least free memory decides, over all processes of an engine. The result is a power of two.

    Args:
        loaded: the model.
        longest: largest number of text tokens of a sample, new tokens included.
    """
    size, width = loaded.size, next(loaded.model.parameters()).element_size()
    n = longest + loaded.max_visual
    cost = n * (2 * size.layers * size.hidden * width + 12 * size.hidden * 4 + 3 * size.intermediate * 4)
    cost += n * loaded.model.get_input_embeddings().num_embeddings * 4
    gpus = [d for d in devices(loaded.model) if d.type == "cuda"]
    free, cap = (min(torch.cuda.mem_get_info(d)[0] for d in gpus), 64) if gpus else (_free_memory(), 16)
    fit = max(1, smallest(int(free / 2 / cost)))
    return min(cap, 1 << (fit.bit_length() - 1))


def _free_memory() -> int:
    """Return the free bytes of the host's memory; 2 GiB if the system does not report them."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]) * 1024
    return 2 << 30


def prepare(settings: Settings, task: Task, files: Files, runs: Sequence[Run], loaded: Any = None) -> Bench:
    """Load the model, unless it is given, check it, and tokenise the questions.

    Raises:
        ValueError: for a broken checkpoint, another model's tokenizer, a budget above the model's visual tokens, or a
            prompt that the model cannot take.
    """
    protocol = protocol_of(settings.model, settings.conv_mode)
    start = time.perf_counter()
    loaded = loaded or load_model(settings)
    seconds = time.perf_counter() - start
    check_loaded(loaded, settings.model, runs, protocol)
    rows = tokenised(files, loaded, protocol, context_of(loaded))
    longest = max(len(r) for r in rows) + task.max_new_tokens
    batch = settings.batch or auto_batch(loaded, longest)
    feed = ImageFeed(functools.partial(read_image, files.sources, loaded, protocol))
    return Bench(loaded, task, files, protocol, rows, batch, seconds, feed)


def check_loaded(loaded: Any, where: str, runs: Sequence[Run], protocol: Protocol) -> None:
    """Refuse a checkpoint without its own tokenizer and image processor, and budgets that it cannot have.

    A budget may be above the model's visual tokens, or out of a method's reach. For a model that sees images in crops,
    the latter depends on the image and is found when the question is asked.

    Raises:
        ValueError: naming the checkpoint, `where`, or the budget.
    """
    check_budgets(runs, loaded.max_visual)
    if loaded.crops == 1:
        check_schedules(runs, loaded.n_visual, loaded.size.layers)
    vocab = loaded.model.get_input_embeddings().num_embeddings
    text_config = getattr(loaded.model.config, "text_config", None) or loaded.model.config
    check_tokenizer(loaded.tokenizer, vocab, text_config, where, loaded.model.generation_config)
    protocol.check(loaded, where)
    check_crops(loaded, where)


def read_image(sources: Sources, loaded: Any, protocol: Protocol, name: str) -> Prepared:
    """Decode and preprocess an image.

    Raises:
        ValueError: naming the image, if it cannot be read or is too large.
    """
    image = sources.image(name)
    try:
        return protocol.pixels(image, loaded), image.size
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_crops(loaded: Any, where: str) -> None:
    """Refuse an image processor whose output size differs from the input size of the vision tower.

    Raises:
        ValueError: with both sizes.
    """
    crop = getattr(loaded.image_processor, "crop_size", None)
    tower = getattr(getattr(vision_tower(loaded), "config", None), "image_size", None)
    if crop is None or tower is None or (crop["height"], crop["width"]) == (tower, tower):
        return
    raise ValueError(
        f"{where}: the image processor crops to {crop['height']} x {crop['width']} pixels, and the vision tower takes "
        f"{tower} x {tower}; put the tower's own preprocessor_config.json beside it"
    )


def tokenised(files: Files, loaded: Any, protocol: Protocol, limit: int | None) -> list[list[int]]:
    """Return the token ids of the prompt of every question.

    Raises:
        ValueError: naming file, row and id, for a text that the tokenizer refuses, or a prompt of more than `limit`
            tokens, counting the largest number of visual tokens of an image.
    """
    out = []
    for number, q in enumerate(files.questions, 1):
        try:
            ids = protocol.token_ids(q.text, q.image is not None, loaded)
        except Exception as error:  # tokenizers raise errors of many types
            detail = f"{type(error).__name__}: {error}".split("\n")[0]
            where = place_of(number, q, files.sources)
            raise ValueError(f"{where}: the tokenizer refuses the text ({detail})") from error
        length = len(ids) + (loaded.max_visual - 1 if q.image is not None else 0)
        long = too_long(length, limit)
        if long:
            raise ValueError(f"{place_of(number, q, files.sources)}: {long}")
        out.append(ids)
    return out


def too_long(length: int, limit: int | None) -> str:
    """Return the error message for a prompt that exceeds the model's context; "" if it fits."""
    if limit is None or length <= limit:
        return ""
    return f"the prompt has {length} tokens with its image, the model's context {limit}; shorten the text"


def context_of(loaded: Any) -> int | None:
    """Return the context length of the model in tokens; None if its config does not state it."""
    text_config = getattr(loaded.model.config, "text_config", None) or loaded.model.config
    limit: int | None = getattr(text_config, "max_position_embeddings", None)
    return limit


@contextlib.contextmanager
def tower_clock(bench: Bench) -> Any:
    """Add the time spent in the vision tower during the block to `bench.tower`."""
    tower = vision_tower(bench.loaded)
    device, began = execution_device(tower, bench.loaded.device), [0.0]

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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


def encode(bench: Bench, names: Sequence[str], size: int) -> dict[str, float]:
    """Encode images ahead of their questions, `size` at a time, or fewer for a model that sees images in crops.

    Returns:
        Seconds spent in the vision tower and waiting for images, under the names of the fields in `answer`'s rows.
    """
    tower, waited = bench.tower, bench.feed.waited
    size = max(1, size // bench.loaded.crops)
    for at in range(0, len(names), size):
        some = names[at : at + size]
        bench.images.encode(some, stacked([bench.feed.get(name)[0] for name in some]))
    return {"tower_seconds": bench.tower - tower, "image_seconds": bench.feed.waited - waited}


def stacked(images: Sequence[torch.Tensor]) -> Any:
    """Stack N images to (N, 3, H, W); images in crops, whose numbers of crops may differ, stay a list."""
    return torch.stack(list(images)) if images[0].ndim == 3 else list(images)


def ask(bench: Bench, method: Any, numbers: Sequence[int]) -> torch.Tensor:
    """Answer a batch of questions; return the new token ids, (B, new) long."""
    asked = [bench.files.questions[i] for i in numbers]
    names = [q.image for q in asked if q.image is not None]
    found = [bench.feed.get(name) for name in names]
    with questions([bare(q.text, bench.task.name) for q in asked if q.image is not None]):
        return bench.loaded.generate(
            [bench.rows[i] for i in numbers],
            stacked([image for image, _ in found]) if found else None,
            sizes=[size for _, size in found] if found and bench.protocol.places_known else None,
            keys=names or None,
            max_new_tokens=bench.task.max_new_tokens,
        )


def unpruned(bench: Bench, question: Question) -> dict[str, int]:
    """Return the number of visual tokens of a question before pruning, as a field of its row.

    The dictionary is empty unless the number depends on the image, i.e. for a model that sees images in crops.
    """
    if bench.loaded.crops == 1 or question.image is None:
        return {}
    return {"unpruned": bench.loaded.visual_tokens(bench.feed.get(question.image)[1])}


def _not_finite_in(bench: Bench, run: Run, number: int) -> str:
    """Ask a question again and return the name of the module that produces its NaN or infinite values."""
    found = locate(bench.loaded, functools.partial(ask, bench, run.method, [number]))
    if bench.logits is not None:
        bench.logits.take()
    return found


def answer(bench: Bench, handle: Any, numbers: Sequence[int], run: Run, name: str) -> list[dict[str, Any]]:
    """Answer a batch of questions and return its rows of the answer file.

    The batch size is halved when memory runs out.

    Args:
        bench: model and questions.
        handle: handle of the attached method.
        numbers: question numbers, all with an image or all without one.
        run: method and budget.
        name: model_id of the rows.

    Raises:
        torch.OutOfMemoryError: if a single question does not fit.
        ValueError: if memory runs out with an engine, whose processes cannot halve the batch size, and for an error of
            the method or of an image, naming the run.
    """
    if len(numbers) > bench.batch:
        parts = [numbers[i : i + bench.batch] for i in range(0, len(numbers), bench.batch)]
        return [row for part in parts for row in answer(bench, handle, part, run, name)]
    start, tower, waited = time.perf_counter(), bench.tower, bench.feed.waited
    try:
        new = ask(bench, run.method, numbers)
    except ValueError as error:  # such as a budget that the method cannot reach on this model
        raise ValueError(f"{run.label}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if len(numbers) == 1 or not out_of_memory(error):
            raise
        if bench.loaded.engine is not None:  # the other processes would wait for this one forever
            raise ValueError(
                f"out of memory at batch size {len(numbers)}, which is not halved with engine={bench.loaded.engine!r}; "
                "give a smaller --batch"
            ) from error
        bench.batch = max(1, len(numbers) // 2)
        log.warning("out of memory at batch size %d; continuing with %d", len(numbers), bench.batch)
        new = None
    if new is None:  # outside of the handler, whose traceback keeps the failed tensors alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return answer(bench, handle, numbers, run, name)
    bad = bench.logits.take() if bench.logits is not None else []
    tower, waited = bench.tower - tower, bench.feed.waited - waited
    seconds = time.perf_counter() - start - tower - waited
    texts = bench.loaded.tokenizer.batch_decode(new, skip_special_tokens=True)
    with_image = bench.files.questions[numbers[0]].image is not None  # the same for the whole batch
    none = [[0] * bench.loaded.size.layers] * len(numbers)
    entering = handle.last.tokens_in.tolist() if with_image else none
    leaving = handle.last.tokens_out.tolist() if with_image else none
    stats = handle.last.stats if with_image else {}
    patches = pack_layers(handle.last.survival) if with_image else [None] * len(numbers)
    places = {k: _not_finite_in(bench, run, numbers[k]) for k, flag in enumerate(bad) if flag}
    out = []
    for k, (i, text) in enumerate(zip(numbers, texts, strict=True)):
        question = bench.files.questions[i]
        # marks a question whose image was dropped entirely, unlike one without an image
        dropped = {"image": True} if with_image and not entering[k][0] else {}
        out.append({
            "question_id": question.id,
            "prompt": question.stored,
            "text": text.strip(),
            "answer_id": "",  # see `answers.row_checksum`
            "model_id": name,
            "metadata": {},
            **question.extra,
            "kept": {
                "entering": entering[k], "leaving": leaving[k], "patches": patches[k], **unpruned(bench, question),
                **dropped,
            },
            "stats": {s: float(v[k]) for s, v in stats.items() if math.isfinite(v[k])},
            **({"not_finite": places[k]} if k in places else {}),
            "row": i,
            "seconds": seconds / len(numbers),
            "tower_seconds": tower / len(numbers),
            "image_seconds": waited / len(numbers),
        })  # fmt: skip
    return out
