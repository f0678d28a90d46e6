"""Kill a run with SIGKILL at random moments and resume it: python -m tests.eval.kill [KILLS [SEED [QUESTIONS]]].

Each completed run is compared with an uninterrupted one, byte by byte. The model is a small random one, and answers
have four tokens. The process loads the model and forks every run, so that a start costs no import.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CLIPImageProcessorPil

from llava_prune.eval import run
from llava_prune.eval.answers import ANSWERS, JOURNAL
from llava_prune.eval.plan import Settings
from llava_prune.eval.task import load_task
from llava_prune.models.load import Loaded
from tests import models

LABELS = ("full", "autoprune-8")
DATA = "playground/data/mini"


class Letters:
    """A tokenizer with one id for each character."""

    bos_token_id, eos_token_id = 1, None

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[1, *(3 + ord(c) % 120 for c in text)])

    def __len__(self) -> int:
        return models.VOCAB

    def get_vocab(self) -> dict[str, int]:
        return {}

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(i) for i in row if i >= 32) for row in ids.tolist()]


def checkpoint(folder: Path) -> Loaded:
    """The random model, and a folder for the evaluation to read."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(models.config()))
    side = {"height": models.SIDE, "width": models.SIDE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": models.SIDE}, crop_size=side)
    return Loaded(models.tiny_hf(), Letters(), processor, "hf", str(folder))


def start(loaded: Loaded, out: Path, limit: int) -> int:
    """Fork a run with a loaded model; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run.load_task = lambda name: dataclasses.replace(load_task(name), max_new_tokens=4)
        settings = Settings(model=loaded.path, data=DATA, out=str(out), limit=limit, batch=2, tokens=(8,))
        run.evaluate(settings, loaded=loaded)
        status = 0
    finally:
        os._exit(status)


def files(out: Path) -> dict[str, bytes]:
    """The answer files."""
    return {label: (out / label / ANSWERS).read_bytes() for label in LABELS}


def done(out: Path) -> int:
    """Answers on disk."""
    return sum(p.read_bytes().count(b"\n") for n in (ANSWERS, JOURNAL) for p in out.glob(f"*/{n}"))


def main(kills: int, seed: int, limit: int) -> tuple[int, int, set[int]]:
    """Returns completed runs, kills, and the numbers of answers on disk at the kills."""
    draw = random.Random(seed)
    torch.set_num_threads(1)  # a fork does not copy threads
    with tempfile.TemporaryDirectory() as folder:
        loaded = checkpoint(Path(folder) / "model")
        whole = Path(folder) / "whole"
        began = time.monotonic()
        if os.waitpid(start(loaded, whole, limit), 0)[1]:
            raise SystemExit("the uninterrupted run failed")
        length = time.monotonic() - began
        print(f"an uninterrupted run takes {length:.1f} s", flush=True)
        expected, through, killed, found = files(whole), 0, 0, set()
        while killed < kills or through == 0:
            out = Path(folder) / f"cut{through}"
            while True:
                pid = start(loaded, out, limit)
                deadline = time.monotonic() + draw.uniform(0.1, 0.6) * length
                while killed < kills and time.monotonic() < deadline and not os.waitpid(pid, os.WNOHANG)[0]:
                    time.sleep(0.002)
                if killed < kills and time.monotonic() >= deadline:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    killed += 1
                    found.add(done(out))
                    continue
                break
            if killed >= kills and os.waitpid(pid, 0)[1]:
                raise SystemExit("a resumed run failed")
            if files(out) != expected:
                raise SystemExit(f"run {through}: the resumed answers differ after {killed} kills")
            through += 1
    return through, killed, found


if __name__ == "__main__":
    kills, seed, questions = [*map(int, sys.argv[1:]), *(30, 0, 24)[len(sys.argv) - 1 :]]
    runs, times, where = main(kills, seed, questions)
    print(f"{times} kills, {runs} runs completed and equal the uninterrupted one; answers on disk at {sorted(where)}")
