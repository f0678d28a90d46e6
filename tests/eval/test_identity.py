"""A change of anything that can change an answer is refused with a message that states both values."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from llava_prune.cli import main
from llava_prune.eval import answers as store
from llava_prune.eval import identity, run
from llava_prune.eval.answers import (
    ANSWERS,
    JOURNAL,
    RESULT,
    SCORES,
    SETTINGS,
    TIMING,
    Answers,
    merge,
    named,
    total_seconds,
    write_whole,
)
from llava_prune.eval.plan import Settings
from llava_prune.eval.rows import read_finished
from llava_prune.eval.task import Question
from tests import models

QUESTIONS = {i: Question(str(i), None, f"question {i}", f"question {i}") for i in range(4)}
MADE = {"task": "gqa", "batch": 2, "hyper": {"k0": 0.4}}


# compared settings --------------------------------------------------------------------------------------------------


def settings(nine: Path, out: Path, **more: Any) -> Settings:
    given: dict[str, Any] = {"model": "a/b", "data": str(nine), "out": str(out), "tokens": (4,), "batch": 2}
    return Settings(**{**given, **more})


def _image(model: Any, data: Path) -> None:
    path = data / "gqa" / "data" / "images" / "n1.png"
    Image.new("RGB", Image.open(path).size, (41, 40, 40)).save(path)


def _question(model: Any, data: Path) -> None:
    path = data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    path.write_text(path.read_text().replace("long and wide", "wide and long"))


def _weight(model: Any, data: Path) -> None:
    model.model.get_input_embeddings().weight.data[150, 3] += 1e-6


CHANGES: dict[str, Callable[[Any, Path], None]] = {
    "weights": _weight,
    "images": _image,
    "questions": _question,
    "config": lambda model, data: setattr(model.model.config, "to_dict", lambda: {"rope_theta": 5e5}),
    "tokenizer": lambda model, data: setattr(model, "tokenizer", _other_tokenizer(model.tokenizer)),
    "prompts": lambda model, data: setattr(model, "tokenizer", _other_encoding(model.tokenizer)),
    "attn": lambda model, data: setattr(model.model.config, "_attn_implementation", "eager"),
    "versions.torch": lambda model, data: None,
}


def _other_tokenizer(old: Any) -> Any:
    return type(type(old).__name__, (type(old),), {"get_vocab": lambda self: {"a": 1}})()


def _other_encoding(old: Any) -> Any:
    encode = {"__call__": lambda self, text: SimpleNamespace(input_ids=[1, *map(ord, text.lower())])}
    return type(type(old).__name__, (type(old),), encode)()


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("finished", [True, False])
def test_a_change_is_refused_with_both_values(
    name: str, finished: bool, nine: Path, tmp_path: Path, stand_in: Any, monkeypatch: Any
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(nine / "gqa", data / "gqa")
    stand_in(None if finished else {2: KeyboardInterrupt()})
    try:
        run.evaluate(settings(data, out))
    except KeyboardInterrupt:
        assert not finished
    before = {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    stored = json.loads((out / "full" / SETTINGS).read_text())
    model = stand_in()
    run.evaluate(settings(data, tmp_path / "same"))  # changes nothing that is compared
    CHANGES[name](model, data)
    if name == "versions.torch":
        monkeypatch.setattr(identity, "versions", lambda: {**stored["versions"], "torch": "9.9"})
    old = stored["versions"]["torch"] if name == "versions.torch" else stored[name]
    model.calls.clear()
    with pytest.raises(
        ValueError, match=re.escape(f"were made with {name}={old!r}, now it is ") + ".*--restart"
    ) as refused:
        run.evaluate(settings(data, out))
    assert "\n" not in str(refused.value) and not model.calls
    assert before == {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    restarted = run.evaluate(settings(data, out, restart=True))
    assert model.calls and restarted[0]["settings"] != stored
    if name == "versions.torch":
        assert restarted[0]["versions"]["torch"] == "9.9"


def test_every_byte_of_every_tensor_counts(tiny_models: Any) -> None:
    model = models.tiny_hf()
    before = identity.weights(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.data.view(-1)
        old = flat[len(flat) // 2].clone()
        flat[len(flat) // 2] = old + 1
        assert identity.weights(model) != before, name
        flat[len(flat) // 2] = old
    assert identity.weights(model) == before == identity.weights(models.tiny_hf())


def test_a_method_of_the_users_own_is_part_of_the_identity(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = (
        "from llava_prune import Method, register\n\n\n@register('mine')\nclass Mine(Method):\n"
        "    def __init__(self):\n        super().__init__()\n"
    )
    file.write_text(text)
    code = (
        "import sys\nfrom llava_prune.methods.registry import from_file, build\n"
        "from llava_prune.methods.planner import Run\n"
        "from llava_prune.eval import identity\n"
        "from_file(sys.argv[1])\nprint(identity.source(Run('m', 'mine', None, build('mine'))))\n"
        "print(identity.source(Run('f', 'fastv', 64, build('fastv', tokens=64))))\n"
    )
    seen = []
    for more in ("", "# another version\n"):
        file.write_text(text + more)
        seen.append(subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True))
    one, two = (s.stdout.split() for s in seen)
    assert one[0] != two[0] and len(one[0]) == 64 and one[1] == two[1] == "None"


def test_settings_without_answers_are_replaced(nine: Path, tmp_path: Path, stand_in: Any) -> None:
    """Settings without answers, as of a run that ended before its first answer, are replaced."""
    stand_in({1: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(settings(nine, tmp_path, seed=1))
    (tmp_path / "full").mkdir(exist_ok=True)
    (tmp_path / "full" / SETTINGS).write_text("{}")
    stand_in()
    run.evaluate(settings(nine, tmp_path, seed=2))
    assert json.loads((tmp_path / "full" / SETTINGS).read_text())["seed"] == 2


def test_everything_is_checked_before_the_first_answer(nine: Path, tmp_path: Path, stand_in: Any) -> None:
    """If the folder of the second run has answers of another seed, the first run asks nothing."""
    stand_in()
    run.evaluate(settings(nine, tmp_path / "out", methods=("random",), reference=False, seed=1))
    model = stand_in()
    with pytest.raises(ValueError, match=r"random-4 were made with .*seed=1, now it is 2"):
        run.evaluate(settings(nine, tmp_path / "out", methods=("random",), seed=2))
    assert not model.calls and not (tmp_path / "out" / "full" / ANSWERS).exists()


# rows -----------------------------------------------------------------------------------------------------------


def row(i: int, **more: Any) -> dict[str, Any]:
    text = {"question_id": str(i), "prompt": f"question {i}", "text": "yes", "answer_id": "", "row": i, "seconds": 1.0}
    return {**text, **more}


def fill(folder: Path, count: int = 4, finish: bool = True, **more: Any) -> Path:
    with Answers(folder, {**MADE, **more}, QUESTIONS) as answers:
        answers.add([row(i) for i in range(count)])
        if finish:
            answers.finish()
    return folder / (ANSWERS if finish else JOURNAL)


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def _join(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        ("permuted", lambda x: x[::-1], "line 1: has question_id"),
        ("repeated", lambda x: [x[0]] * 4, "line 2: has question_id"),
        ("a number", lambda x: [*x[:3], b"5"], "line 4: is 5, not an object"),
        ("an array", lambda x: [b"[1]", *x[1:]], "line 1: is .1., not an object"),
        ("edited", lambda x: [x[0].replace(b"yes", b"no"), *x[1:]], "line 1: was edited"),
        ("text is a number", lambda x: [x[0].replace(b'"yes"', b"5"), *x[1:]], "line 1: was edited"),
        ("prompt", lambda x: [x[0].replace(b"question 0", b"question 9"), *x[1:]], "line 1: has prompt"),
        ("no id", lambda x: [x[0].replace(b"question_id", b"id"), *x[1:]], "line 1: has question_id null"),
        ("broken before others", lambda x: [x[0], x[1][:20], *x[2:]], "line 2: is not JSON"),
        ("not UTF-8", lambda x: [x[0], b"\xff\xfe", *x[2:]], "line 2: is not JSON"),
        ("too deep", lambda x: [x[0], b"[" * 100_000, *x[2:]], "line 2: is not JSON"),
    ],
)
def test_rows_that_are_not_this_runs(tmp_path: Path, finished: bool, name: str, edit: Any, says: str) -> None:
    path = fill(tmp_path, finish=finished)
    content = _join(edit(_lines(path)))
    path.write_bytes(content)
    if not finished and name in ("permuted", "repeated"):  # a journal has its rows in any order
        with Answers(tmp_path, MADE, QUESTIONS) as answers:
            assert len(answers.done) == (len(_lines(path)) if name == "permuted" else 1)
        return
    with pytest.raises(ValueError, match=rf"{path.name}, {says}.*--restart") as refused:
        Answers(tmp_path, MADE, QUESTIONS)
    assert "\n" not in str(refused.value) and path.read_bytes() == content, "the file was changed"


def test_answers_of_another_run_with_these_settings(tmp_path: Path) -> None:
    """Rows of another run are refused even if settings.json matches, because each has a checksum of its settings."""
    other = fill(tmp_path / "other", hyper={"k0": 0.5})
    mine = fill(tmp_path / "mine")
    mine.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="line 1: was edited, or is an answer of another run"):
        Answers(tmp_path / "mine", MADE, QUESTIONS)


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x.replace(b"\n", b"\r\n"), lambda x: x + b"\n\n"])
def test_an_editors_line_ends_cost_no_row(tmp_path: Path, change: Any) -> None:
    path = fill(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    with Answers(tmp_path, MADE, QUESTIONS) as answers:
        assert answers.complete and [r["question_id"] for r in answers.finish()] == list("0123")
    assert path.read_bytes() == change(whole), "a finished answer file was changed"


@pytest.mark.parametrize("cut", [1, 40])
def test_a_finished_file_is_never_truncated(tmp_path: Path, cut: int) -> None:
    path = fill(tmp_path)
    path.write_bytes(path.read_bytes()[: -1 - cut])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 4: is not JSON"):
        Answers(tmp_path, MADE, QUESTIONS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("tail", [b'{"question_id": "2', b"\0" * 50, b"\0" * 50 + b"\n", b"\0\n\0\n\0"])
def test_what_an_interruption_leaves_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = fill(tmp_path, 2, finish=False)
    before = path.read_bytes()
    path.write_bytes(before + tail)
    with Answers(tmp_path, MADE, QUESTIONS) as answers:
        assert sorted(answers.done) == [0, 1]
        assert path.read_bytes() == before, "half a line was kept"
        answers.add([row(2), row(3)])
        assert [r["question_id"] for r in answers.finish()] == list("0123")
    assert [json.loads(x)["question_id"] for x in _lines(tmp_path / ANSWERS)] == list("0123")


@pytest.mark.parametrize("number", [99, -1, True, None, [1], "1", 1.0])
def test_journal_rows_of_no_question(tmp_path: Path, number: Any) -> None:
    path = fill(tmp_path, 2, finish=False)
    path.write_bytes(path.read_bytes() + json.dumps(row(2, row=number)).encode() + b"\n")
    with pytest.raises(ValueError, match="line 3: is for question number"):
        Answers(tmp_path, MADE, QUESTIONS)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("content", [None, "", "[]", "5", '{"task": "g', "[" * 100_000])
def test_answers_without_settings(tmp_path: Path, finished: bool, content: str | None) -> None:
    fill(tmp_path, finish=finished)
    (tmp_path / SETTINGS).unlink()
    if content is not None:
        (tmp_path / SETTINGS).write_text(content)
    with pytest.raises(ValueError, match="so nothing says how .*--restart"):
        Answers(tmp_path, MADE, QUESTIONS)
    with Answers(tmp_path, MADE, QUESTIONS, restart=True) as answers:
        assert not answers.done


@pytest.mark.parametrize("batch", [None, 0, "2", True, 1.5])
def test_a_stored_batch_size_that_is_none(tmp_path: Path, batch: Any) -> None:
    fill(tmp_path, 2, finish=False)
    (tmp_path / SETTINGS).write_text(json.dumps({**MADE, "batch": batch}))
    with pytest.raises(ValueError, match="batch is .*, not a positive integer"):
        Answers(tmp_path, {**MADE, "batch": None}, QUESTIONS, fill={"batch": 4})


def test_a_resumed_run_takes_the_stored_batch_size(tmp_path: Path) -> None:
    fill(tmp_path, 2, finish=False)
    with Answers(tmp_path, {**MADE, "batch": None}, QUESTIONS, fill={"batch": 4}) as answers:
        assert answers.settings["batch"] == 2


# files and processes ------------------------------------------------------------------------------------------------


def test_drafts_carry_the_process(tmp_path: Path, monkeypatch: Any) -> None:
    """Each process has a draft of its own, a failure leaves no draft, and drafts of dead processes are deleted."""
    drafts: list[str] = []
    replace = os.replace
    monkeypatch.setattr(store.os, "replace", lambda a, b: (drafts.append(Path(a).name), replace(a, b)))
    write_whole(tmp_path / "x", "1")
    assert drafts == [f"x.{os.getpid()}.draft"] and (tmp_path / "x").read_text() == "1"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "x", "2")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "1"
    monkeypatch.setattr(store.os, "replace", replace)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for name in (RESULT, SCORES):
        leftover, living = (tmp_path / f"{name}.{pid}.draft" for pid in (int(dead.stdout), os.getppid()))
        leftover.write_text("half"), living.write_text("half")
        fill(tmp_path)
        assert not leftover.exists() and living.exists()


def test_the_journal_is_locked_until_the_result_is_written(nine: Path, tmp_path: Path, stand_in: Any) -> None:
    """While a run scores and exports, another run with the same OUT is refused."""
    stand_in()
    refused: list[str] = []
    before = run.dump

    def dump(result: Any) -> str:
        with pytest.raises(ValueError, match="another run is writing") as error:
            Answers(tmp_path / result["label"], {}, {})
        refused.append(str(error.value))
        return before(result)

    run.dump = dump
    try:
        run.evaluate(settings(nine, tmp_path))
    finally:
        run.dump = before
    assert len(refused) == 2


def test_chunks_are_joined_and_scored_under_a_lock(nine: Path, tmp_path: Path, stand_in: Any) -> None:
    stand_in()
    parts = [settings(nine, tmp_path, num_chunks=2, chunk_idx=i, methods=("full",)) for i in range(2)]
    run.evaluate(parts[0])
    waited: list[bool] = []
    before = run.dump

    def dump(result: Any) -> str:
        with open(tmp_path / "full" / store.LOCK, "ab") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                waited.append(False)
            except BlockingIOError:
                waited.append(True)
        return before(result)

    run.dump = dump
    try:
        run.evaluate(parts[1])
    finally:
        run.dump = before
    assert waited == [True]


def chunks(folder: Path, count: int = 2, **more: Any) -> None:
    half = len(QUESTIONS) // count
    for c in range(count):
        part = {i: QUESTIONS[i] for i in range(c * half, (c + 1) * half)}
        with Answers(folder, {**MADE, **more.get(f"settings{c}", {})}, part, stem=f"{count}_{c}") as answers:
            answers.add([row(i) for i in part])
            answers.finish()


def test_joined_chunks_have_settings(tmp_path: Path) -> None:
    chunks(tmp_path)
    assert merge(tmp_path, 2, "2_0")
    with Answers(tmp_path, MADE, QUESTIONS) as answers:  # a run without chunks accepts them
        assert answers.complete and len(answers.done) == 4
    with pytest.raises(ValueError, match=r"made with hyper.k0=0.4, now it is 0.7"):
        Answers(tmp_path, {**MADE, "hyper": {"k0": 0.7}}, QUESTIONS)
    with pytest.raises(ValueError, match=r"made with hyper.k0=0.4, now it is 0.7"):  # nor does a chunk overwrite them
        Answers(tmp_path, {**MADE, "hyper": {"k0": 0.7}}, {0: QUESTIONS[0]}, stem="4_0")


@pytest.mark.parametrize("mine", ["2_0", "2_1"])
@pytest.mark.parametrize("other", [{"hyper": {"k0": 0.5}}, {"seed": 3}])
def test_chunks_with_other_settings_do_not_join(tmp_path: Path, mine: str, other: dict[str, Any]) -> None:
    """The chunk that joins may be either one, and a setting that only one of them has counts as well."""
    chunks(tmp_path, settings1=other)
    with pytest.raises(ValueError, match=r"chunk 2_. in .* was made with (hyper.k0|seed)=.* in chunk"):
        merge(tmp_path, 2, mine)
    assert not (tmp_path / ANSWERS).exists()


def test_chunks_of_any_batch_size_join(tmp_path: Path) -> None:
    chunks(tmp_path, settings1={"batch": 8})
    assert merge(tmp_path, 2, "2_0")
    rows = read_finished(tmp_path / ANSWERS, list(QUESTIONS.values()), MADE)
    assert [r["question_id"] for r in rows] == list("0123")
    assert total_seconds(tmp_path / TIMING)["generate"] == 4


def test_a_chunk_without_its_last_newline_joins_whole(tmp_path: Path) -> None:
    chunks(tmp_path)
    part = tmp_path / named(ANSWERS, "2_0")
    part.write_bytes(part.read_bytes()[:-1])
    assert merge(tmp_path, 2, "2_0")
    assert len(read_finished(tmp_path / ANSWERS, list(QUESTIONS.values()), MADE)) == 4


def test_an_edited_chunk_is_not_scored(nine: Path, tmp_path: Path, stand_in: Any) -> None:
    stand_in()
    parts = [settings(nine, tmp_path, num_chunks=2, chunk_idx=i, methods=("full",)) for i in range(2)]
    run.evaluate(parts[0])
    path = tmp_path / "full" / "2_0.jsonl"
    path.write_text(path.read_text().replace("Yes.", "never", 1).replace("no", "never", 1))
    with pytest.raises(ValueError, match="line 1: was edited"):
        run.evaluate(parts[1])


@pytest.mark.parametrize("name", [named(SETTINGS, "2_1"), named(TIMING, "2_1")])
def test_broken_files_of_a_chunk(tmp_path: Path, name: str) -> None:
    chunks(tmp_path)
    (tmp_path / name).write_text("[")
    if "settings" in name:
        with pytest.raises(ValueError, match=f"{name} is broken"):
            merge(tmp_path, 2, "2_0")
    else:  # only the seconds are lost
        assert merge(tmp_path, 2, "2_0") and total_seconds(tmp_path / TIMING)["generate"] == 0


def test_the_message_on_the_command_line(nine: Path, tmp_path: Path, stand_in: Any, capsys: Any) -> None:
    model = stand_in()
    argv = ["eval", "gqa", "--model=a/b", f"--data={nine}", f"--out={tmp_path}", "--tokens=4", "--batch=2"]
    assert main(argv) == 0
    capsys.readouterr()
    model.model.get_input_embeddings().weight.data[0, 0] = 1
    assert main(argv) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("llava-prune")]
    assert "made with weights=" in line and line.count("'") == 4
    assert main([*argv, "--restart"]) == 0


def test_weights_that_are_not_finite(nine: Path, tmp_path: Path, stand_in: Any) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        model = stand_in()
        model.model.get_input_embeddings().weight.data[3, 3] = torch.tensor(value)
        with pytest.raises(ValueError, match="a/b: 1 tensors have values in float32 that are NaN or infinite, first w"):
            run.evaluate(settings(nine, tmp_path))
        assert not model.calls
