"""Kill a run with SIGKILL at random moments and resume it: python -m tests.eval.kill [KILLS [SEED [QUESTIONS]]].

Every time the run gets through, its files are compared with those of an undisturbed run, byte by byte. The process
loads the model and forks every run, so a start costs no import.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import llava_prune
from llava_prune.eval.answers import ANSWERS, JOURNAL
from llava_prune.eval.plan import Settings
from llava_prune.eval.run import evaluate

LABELS = ("full", "autoprune-64")


def start(loaded: Any, data: str, out: Path, limit: int) -> int:
    """Fork a run on a model that is loaded already; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        evaluate(Settings(model=loaded.path, data=data, out=str(out), limit=limit, batch=2), loaded=loaded)
        status = 0
    finally:
        os._exit(status)


def files(out: Path) -> dict[str, bytes]:
    """The answer files."""
    return {label: (out / label / ANSWERS).read_bytes() for label in LABELS}


def done(out: Path) -> int:
    """Answers on disk."""
    return sum(p.read_bytes().count(b"\n") for n in (ANSWERS, JOURNAL) for p in out.glob(f"*/{n}"))


def main(kills: int, seed: int, model: str, data: str, limit: int) -> tuple[int, int, set[int]]:
    """Returns runs that got through, kills, and the numbers of answers that kills found on disk."""
    draw = random.Random(seed)
    torch.set_num_threads(1)  # a fork must not find threads of the parent
    loaded = llava_prune.load(model, device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        began = time.monotonic()
        if os.waitpid(start(loaded, data, whole, limit), 0)[1]:
            raise SystemExit("the undisturbed run failed")
        length = time.monotonic() - began
        print(f"an undisturbed run takes {length:.1f} s", flush=True)
        expected, through, killed, found = files(whole), 0, 0, set()
        while killed < kills or through == 0:
            out = Path(folder) / f"cut{through}"
            while True:
                pid = start(loaded, data, out, limit)
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
    runs, times, where = main(kills, seed, "playground/models/llava-tiny", "playground/data/mini", questions)
    print(f"{times} kills, {runs} runs got through and equal the undisturbed one; answers on disk at {sorted(where)}")
