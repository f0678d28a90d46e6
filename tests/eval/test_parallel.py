"""Evaluations in several processes write the files of one process, even if processes fail."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore

from llava_prune.eval.answers import ANSWERS, RESULT, Answers, AnswerWriter, rank_journal
from llava_prune.eval.launch import process_count
from llava_prune.eval.pieces import LARGEST, SMALLEST, all_batches, piece_size, pieces
from llava_prune.eval.ranks import Ranks, SharedTask, _fresh
from llava_prune.eval.task import Question

ROOT = Path(__file__).resolve().parents[2]
TASKS, LABELS = ("gqa", "sqa"), ("full", "autoprune-64")
COMMAND = [sys.executable, "-m", "llava_prune", "eval", ",".join(TASKS), "--limit", "48", "--out"]


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, str(out), *more]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process; return its exit status and its output."""
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.returncode, out + err


def files(out: Path) -> dict[str, bytes]:
    return {f"{task} {label}": (out / task / label / ANSWERS).read_bytes() for task in TASKS for label in LABELS}


def left(out: Path) -> list[str]:
    """Return the names of files that only an incomplete run has."""
    return [p.name for p in out.rglob("*") if ".partial" in p.name or p.name.endswith(".draft")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results folder of an evaluation in one process."""
    out = tmp_path_factory.mktemp("alone")
    status, text = ended(start(out))
    assert status == 0, text
    rows = [json.loads(x) for x in (out / "sqa" / "full" / ANSWERS).read_text().splitlines()]
    assert {r["kept"]["entering"][0] for r in rows} == {0, 576}, "questions with an image and without one"
    seconds = json.loads((out / "gqa" / "full" / RESULT).read_text())["seconds"]
    assert 0 < seconds["images"] < 0.05 * (seconds["tower"] + seconds["generate"]), "the model waits for images"
    return out


@pytest.mark.parametrize("count", [2, 4])
def test_as_one_process(count: int, alone: Path, tmp_path: Path) -> None:
    status, text = ended(start(tmp_path, "--procs", str(count)))
    assert status == 0 and text.count("answers and results") == len(TASKS), text
    assert files(tmp_path) == files(alone) and not left(tmp_path)
    for task in TASKS:
        for label in LABELS:
            mine, theirs = (json.loads((p / task / label / RESULT).read_text()) for p in (tmp_path, alone))
            assert all(mine[k] == theirs[k] for k in ("figure", "visual_tokens", "settings", "method_stats"))


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of the workers of a launch."""
    return [int(x) for x in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def kill_one(process: subprocess.Popen[str], out: Path, first: bool) -> int:
    """Kill the first worker, or another one, as soon as it has written an answer; return its rank."""
    name = "answers.partial.jsonl" if first else "answers.rank*.partial.jsonl"
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # files and processes may disappear
            for found in (p for p in out.glob(f"*/full/{name}") if p.stat().st_size):
                rank = int("".join(re.findall("[0-9]+", found.name)) or "0")
                for pid in workers(process):
                    if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                        os.kill(pid, signal.SIGKILL)
                        return rank
        time.sleep(0.02)
    raise AssertionError("the run ended first")


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers in /proc")


@needs_proc
def test_a_killed_process(alone: Path, tmp_path: Path) -> None:
    """The answers given before a kill are kept, and another number of processes resumes the run."""
    process = start(tmp_path, "--procs", "3")
    rank = kill_one(process, tmp_path, first=False)
    status, text = ended(process)
    assert status == 1 and f"process {rank} of 3 was ended by SIGKILL" in text and "run the same command" in text
    assert f"answers.rank{rank}.partial.jsonl" in left(tmp_path)
    kept = sum(p.read_bytes().count(b"\n") for p in tmp_path.rglob("*.partial.jsonl"))
    status, text = ended(start(tmp_path, "--procs", "2"))
    assert status == 0 and kept > 0, text
    assert files(tmp_path) == files(alone) and not left(tmp_path)


@needs_proc
def test_processes_that_start_again(alone: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "--procs", "2", "--max-restarts", "1")
    assert kill_one(process, tmp_path, first=True) == 0
    status, text = ended(process)
    assert status == 0, text
    assert files(tmp_path) == files(alone) and not left(tmp_path)


@pytest.mark.parametrize("flags", [("--engine", "tp", "--procs", "2"), ("--device-map", "auto")])
def test_models_larger_than_a_gpu(flags: tuple[str, ...], alone: Path, tmp_path: Path) -> None:
    """A model that is split over processes, or dispatched by a device map, gives the same answers and kept tokens."""
    status, text = ended(start(tmp_path, *flags))
    assert status == 0 and text.count("answers and results") == len(TASKS), text
    assert not left(tmp_path)
    for task in TASKS:
        for label in LABELS:
            mine, theirs = (
                [json.loads(x) for x in (p / task / label / ANSWERS).read_text().splitlines()]
                for p in (tmp_path, alone)
            )
            assert [(r["text"], r["kept"]) for r in mine] == [(r["text"], r["kept"]) for r in theirs]


def test_a_message_is_printed_once(tmp_path: Path) -> None:
    status, text = ended(start(tmp_path, "--procs", "2", "--model", str(tmp_path / "none")))
    assert status == 1 and text.count("no such checkpoint folder") == 1


def test_numbers_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert process_count(None, None, False) == 4 and process_count(None, None, True) == 1
    assert process_count(3, None, True) == 3 and process_count(None, 2, False) == 2
    with pytest.raises(ValueError, match="GPUS=8: 4 GPUs are visible here; give 4"):
        process_count(8, None, False)
    with pytest.raises(ValueError, match="GPUS=2 and PROCS=2"):
        process_count(2, 2, False)


def test_devices_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    third = Ranks(HashStore(), rank=5, count=6, local_rank=1, local_count=2)
    assert third.device(None) == third.device("cuda") == "cuda:1" and third.device("cpu") == "cpu"
    with pytest.raises(ValueError, match="cuda:0.*6 processes take a device each"):
        third.device("cuda:0")
    with pytest.raises(ValueError, match="3 processes on a machine with 2 visible GPUs"):
        Ranks(HashStore(), rank=2, count=3, local_rank=2, local_count=3).device(None)
    assert Ranks().device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="LOCAL_RANK, .*MASTER_PORT not set"):
        Ranks.of({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"})
    assert Ranks.of({"RANK": "0"}).count == Ranks.of({"RANK": "0", "WORLD_SIZE": "1"}).count == 1


# pieces -----------------------------------------------------------------------------------------------------------


def asked(images: list[str | None]) -> dict[int, Question]:
    return {i: Question(i, image, "", "") for i, image in enumerate(images)}


def test_pieces() -> None:
    """Pieces keep the questions of an image together and text-only questions apart; longest prompts come first."""
    questions = asked([*(f"{i % 7}" for i in range(30)), None, None, *["many"] * 12])
    lengths = [10 + i % 5 for i in range(42)] + [99, 1]
    found = pieces(questions, lengths, 8)
    assert sorted(i for part in found for i in part) == list(range(44))
    for part in found:
        plain = {questions[i].image is None for i in part}
        assert len(plain) == 1 and (len(part) <= 8 or len({questions[i].image for i in part}) == 1)
    for image in {q.image for q in questions.values() if q.image}:
        assert sum(any(questions[i].image == image for i in part) for part in found) == 1
    assert 42 in found[0] and {30, 31} == set(found[-1])
    cut = all_batches(questions, lengths, 5)
    assert all(len(b) <= 5 for b in cut) and sorted(i for b in cut for i in b) == list(range(44))


def test_size_of_a_piece() -> None:
    assert piece_size(60, None) == SMALLEST and piece_size(10**6, None) == LARGEST and piece_size(2048, None) == 32
    assert piece_size(60, 40) == 40 and piece_size(2048, 8) == 32


# communication between processes ----------------------------------------------------------------------------------


def two() -> tuple[SharedTask, SharedTask]:
    store = HashStore()
    first, second = (Ranks(PrefixStore("job", store), rank, 2).task("gqa") for rank in (0, 1))
    return first, second


def test_every_piece_is_claimed_once() -> None:
    found: list[int] = []

    def claim(shared: SharedTask) -> None:
        found.extend(shared.claim() for _ in range(50))

    threads = [threading.Thread(target=claim, args=(shared,)) for shared in two()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(100))


def test_a_failure_of_the_first_process_reaches_the_others() -> None:
    first, second = two()
    with pytest.raises(ValueError, match="no such folder"), first:
        raise ValueError("no such folder")
    with pytest.raises(ValueError, match="no such folder"), second:
        second.receive()
    assert first.others_left and first.errors() == ["process 1: no such folder"]


def test_a_failure_of_another_process_reaches_the_first() -> None:
    first, second = two()
    first.publish({"jobs": []})
    assert not first.others_left
    with pytest.raises(ValueError, match="broken"), second:
        raise ValueError("n1.png is broken")
    assert first.others_left and first.errors() == ["process 1: n1.png is broken"]
    assert second.answered("full", 3) == 3 and first.answered("full") == 3


def test_processes_that_start_again_share_nothing_with_those_before() -> None:
    """In any order of arrival, processes wait for the first process of their own attempt."""
    store, found = HashStore(), {}

    def join(attempt: int, rank: int) -> None:
        found[attempt, rank] = Ranks(_fresh(store, rank, 3), rank, 3).task("gqa")

    for attempt, order in enumerate(((0, 1, 2), (2, 1, 0), (1, 0, 2))):
        threads = [threading.Thread(target=join, args=(attempt, rank)) for rank in order]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join(timeout=10)
        assert [found[attempt, rank].claim() for rank in range(3)] == [0, 1, 2]


def test_who_speaks() -> None:
    store = HashStore()
    first, second = Ranks(store, 0, 2), Ranks(store, 1, 2)
    assert second.first_to_report("one") and not first.first_to_report("one") and first.first_to_report("two")


# journals ---------------------------------------------------------------------------------------------------------

QUESTIONS = {i: Question(str(i), None, "text", f"question {i}") for i in range(4)}


def row(i: int, **more: Any) -> dict[str, Any]:
    return {"question_id": str(i), "prompt": f"question {i}", "text": "yes", "row": i, "seconds": 1.0, **more}


def test_journals_are_joined(tmp_path: Path) -> None:
    """An answer that two processes have counts once; an incomplete line does not count."""
    with Answers(tmp_path, {"a": 1}, QUESTIONS) as answers:
        with AnswerWriter(rank_journal(tmp_path, 2), answers.settings) as other:
            other.add([row(1), row(2)])
        answers.add([row(2, seconds=5.0)])
    with open(rank_journal(tmp_path, 2), "a") as handle:
        handle.write('{"question_id": "3"')
    with Answers(tmp_path, {"a": 1}, QUESTIONS) as answers:
        assert answers.done == {1, 2} and not rank_journal(tmp_path, 2).exists()
        answers.add([row(0), row(3)])
        rows = answers.finish()
    assert [r["question_id"] for r in rows] == list("0123") and answers.seconds["generate"] == 1 + 1 + 5 + 1


def test_a_journal_of_other_settings(tmp_path: Path) -> None:
    with Answers(tmp_path, {"a": 1}, QUESTIONS), AnswerWriter(rank_journal(tmp_path, 1), {"a": 2}) as other:
        other.add([row(1)])
    with pytest.raises(ValueError, match="rank1.*line 1: was edited, or is an answer of another run"):
        Answers(tmp_path, {"a": 1}, QUESTIONS)
    with pytest.raises(ValueError, match="were made with a=1, now it is 2"):
        Answers(tmp_path, {"a": 2}, QUESTIONS)
    with Answers(tmp_path, {"a": 2}, QUESTIONS, restart=True) as answers:
        assert not answers.done and not rank_journal(tmp_path, 1).exists()


def test_a_process_that_still_writes(tmp_path: Path) -> None:
    with AnswerWriter(rank_journal(tmp_path, 1), {"a": 1}) as other:
        other.add([row(1)])
        with pytest.raises(ValueError, match="another run is writing"):
            Answers(tmp_path, {"a": 1}, QUESTIONS, restart=True)
