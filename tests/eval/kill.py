"""Kill a run with SIGKILL at random moments and resume it: python -m tests.eval.kill [KILLS [SEED [QUESTIONS]]].

About a quarter of the kills hit one of the two processes of a run in chunks. Each completed run is compared with an
uninterrupted one, byte by byte. The model is small and random, and answers have four tokens. The process loads the
model once and forks every run, so that a start costs no import.
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
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CLIPImageProcessorPil

from llava_prune.eval import run
from llava_prune.eval.answers import ANSWERS
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
    """Return the random model, and write a folder with the config that the evaluation reads."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(models.config()))
    side = {"height": models.SIDE, "width": models.SIDE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": models.SIDE}, crop_size=side)
    return Loaded(models.tiny_hf(), Letters(), processor, "hf", str(folder))


def start(loaded: Loaded, out: Path, limit: int, chunk: int | None = None) -> int:
    """Fork a process that evaluates with a loaded model, on all questions or on one of two chunks; return its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run.load_task = lambda name: dataclasses.replace(load_task(name), max_new_tokens=4)
        parts = {} if chunk is None else {"num_chunks": 2, "chunk_idx": chunk}
        settings = Settings(model=loaded.path, data=DATA, out=str(out), limit=limit, batch=2, tokens=(8,), **parts)
        run.evaluate(settings, loaded=loaded)
        status = 0
    finally:
        os._exit(status)


def files(out: Path) -> dict[str, bytes]:
    """Return the content of each answer file, by run label."""
    return {label: (out / label / ANSWERS).read_bytes() for label in LABELS}


def done(out: Path) -> int:
    """Return the number of answers on disk; answers of chunks count twice once the chunks are joined."""
    return sum(p.read_bytes().count(b"\n") for p in out.glob("*/*.jsonl"))


def disturbed(loaded: Loaded, out: Path, limit: int, chunks: Sequence[int | None], draw: Any, length: float) -> bool:
    """Start the processes of a run and kill one at a random moment; return whether it was still running."""
    pids = [start(loaded, out, limit, chunk) for chunk in chunks]
    time.sleep(draw.uniform(0.1, 0.9) * length)
    victim = draw.choice(pids)
    alive = not os.waitpid(victim, os.WNOHANG)[0]
    if alive:
        os.kill(victim, signal.SIGKILL)
    for pid in pids if alive else [p for p in pids if p != victim]:
        os.waitpid(pid, 0)
    return alive


def kill(loaded: Loaded, folder: Path, limit: int, chunks: Sequence[int | None], kills: int, draw: Any) -> Any:
    """Kill and resume runs until `kills` kills are reached; compare each completed run with an uninterrupted one.

    Returns:
        (completed runs, kills, numbers of answers on disk at the kills).
    """
    whole, began = folder / "whole", time.monotonic()
    finish(loaded, whole, limit, chunks)
    length, expected = time.monotonic() - began, files(whole)
    print(f"an uninterrupted run of {len(chunks)} processes takes {length:.1f} s", flush=True)
    through, killed, found = 0, 0, set()
    while killed < kills:
        out = folder / f"cut{through}"
        while killed < kills and disturbed(loaded, out, limit, chunks, draw, length):
            killed += 1
            found.add(done(out))
        finish(loaded, out, limit, chunks)
        if files(out) != expected:
            raise SystemExit(f"run {through}: the resumed answers differ after {killed} kills")
        left = [p.name for p in out.rglob("*") if p.name.endswith(".draft") or ".partial" in p.name]
        if left:
            raise SystemExit(f"run {through} left {left}")
        through += 1
    return through, killed, found


def finish(loaded: Loaded, out: Path, limit: int, chunks: Sequence[int | None]) -> None:
    """Run the processes of a run side by side until they end."""
    pids = [start(loaded, out, limit, chunk) for chunk in chunks]
    if any([os.waitpid(pid, 0)[1] != 0 for pid in pids]):  # noqa: C419 - waits for all of them
        raise SystemExit("a run that nothing disturbed failed")


def main(kills: int, seed: int, limit: int) -> None:
    """Kill runs in one process and runs in two chunks, and print the numbers of kills and of completed runs."""
    draw = random.Random(seed)
    torch.set_num_threads(1)  # a fork does not copy threads
    with tempfile.TemporaryDirectory() as folder:
        loaded = checkpoint(Path(folder) / "model")
        among = max(1, round(kills * 8 / 30))
        for name, chunks, number in (("whole", [None], kills - among), ("chunks", [0, 1], among)):
            (Path(folder) / name).mkdir()
            runs, times, where = kill(loaded, Path(folder) / name, limit, chunks, number, draw)
            print(f"{name}: {times} kills, {runs} runs completed and equal the uninterrupted one; answers on disk at "
                  f"{sorted(where)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(*map(int, [*sys.argv[1:], *("30", "0", "24")[len(sys.argv) - 1 :]]))
