"""Ask questions one at a time, as LLaVA's own program does, of a model in transformers' format.

The loop has the structure of that program: worker processes preprocess images and tokenise prompts ahead, and each
question is answered alone, at batch size 1. Images are encoded again for every question.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .asking import Files
from .protocol import Protocol

WORKERS = 4
"""Number of worker processes of `llava.eval.model_vqa_loader`."""


class _Prompts(Dataset[Any]):
    """Dataset of (token ids, pixels) of each question. It holds no model, so it can be sent to worker processes."""

    def __init__(self, files: Files, protocol: Protocol, loaded: Any) -> None:
        self.files, self.protocol = files, protocol
        parts = {"tokenizer": loaded.tokenizer, "image_processor": loaded.image_processor}
        self.parts = SimpleNamespace(**parts)

    def __len__(self) -> int:
        return len(self.files.questions)

    def __getitem__(self, index: int) -> tuple[list[int], torch.Tensor]:
        question = self.files.questions[index]
        image = self.files.sources.image(str(question.image))
        return self.protocol.token_ids(question.text, True, self.parts), self.protocol.pixels(image, self.parts)


def ask_one_by_one(
    loaded: Any, files: Files, protocol: Protocol, answers: Path, new: int, workers: int | None = None
) -> float:
    """Ask all questions in a loop and return the seconds from question to answer file, without loading the model.

    Args:
        loaded: a model that does not see images in crops.
        files: files of the benchmark; every question has an image.
        protocol: prompts and preprocessing, with a conversation template.
        answers: answer file to write.
        new: largest number of new tokens of an answer.
        workers: processes that prepare questions; by default WORKERS, or the number of cores if that is smaller.

    Raises:
        ValueError: for a model that sees images in crops, or questions without an image.
    """
    if loaded.crops > 1 or any(q.image is None for q in files.questions):
        raise ValueError("the loop asks questions with an image, of a model that sees images whole; leave it out")
    workers = min(WORKERS, os.cpu_count() or 1) if workers is None else workers
    start = time.perf_counter()
    prompts: Any = DataLoader(_Prompts(files, protocol, loaded), batch_size=None, num_workers=workers)
    with answers.open("w", encoding="utf-8") as out:
        for question, (ids, pixels) in zip(files.questions, prompts, strict=True):
            found = loaded.generate([ids], pixels[None], max_new_tokens=new)
            text = loaded.tokenizer.batch_decode(found, skip_special_tokens=True)[0].strip()
            out.write(json.dumps({"question_id": question.id, "prompt": question.stored, "text": text}) + "\n")
    return time.perf_counter() - start
