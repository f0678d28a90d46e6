"""The content of the page of `llava-prune demo` and the refusals of the command, tested without gradio."""

from __future__ import annotations

import logging
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import llava_prune
from llava_prune.cli import main
from llava_prune.eval.demo import check_port
from llava_prune.eval.protocol import Protocol
from llava_prune.eval.side_by_side import Shown, SideBySide, examples, message
from llava_prune.handle import attached_handle

QUESTION = "What is the yellow object?"
CHOSEN = [("autoprune", "64"), ("fastv", "11%")]


@pytest.fixture(scope="module")
def asked(tiny_path: Path) -> SideBySide:
    return SideBySide(
        llava_prune.load(tiny_path, device="cpu"), str(tiny_path), protocol=Protocol(pad=True), new=4, seed=3
    )


@pytest.fixture(scope="module")
def image(root: Path) -> str:
    return str(root / "playground/data/mini/gqa/data/images/n9000005.jpg")  # 252 x 189


@pytest.fixture(scope="module")
def shown(asked: SideBySide, image: str) -> Shown:
    return asked.ask(image, QUESTION, True, CHOSEN)


def test_answers_of_three_models(shown: Shown) -> None:
    assert [a["name"] for a in shown.answers] == ["unpruned", "autoprune-64", "fastv-63"]
    assert [shown.label(i) for i in range(3)] == ["Unpruned", "A: autoprune-64", "B: fastv-63"]
    assert all(a["answer"] and a["ms"]["total"] > a["ms"]["prefill"] > 0 for a in shown.answers)
    assert shown.answers[0]["leaving"] == [576] * 12 and sum(shown.answers[1]["leaving"]) == 64 * 12
    assert shown.answers[0]["percent"] == 100 > shown.answers[1]["percent"] > 10


def test_facts(shown: Shown) -> None:
    rows = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', shown.facts(1)))
    answer = shown.answers[1]
    assert rows["Visual tokens"] == f"576 in, {answer['leaving'][-1]} out"
    assert rows["Leaving a layer"] == "64.0 on average" and rows["FLOPs"].startswith(f"{answer['percent']:.1f} %, ")
    assert rows["Prefill"] == f"{answer['ms']['prefill']:.0f} ms"
    assert rows["Whole answer"].endswith("new tokens") and answer["new"] >= 2


def test_overlays_are_those_of_the_records(shown: Shown) -> None:
    for number, layer in ((1, 0), (1, 11), (2, 6)):
        record = shown.records[number]
        drawn, words = shown.overlay(number, layer)
        expected = record.draw(shown.image, layer, padded=True)
        assert drawn.size == (504, 378)  # twice as large
        assert drawn.tobytes() == expected.resize(drawn.size).tobytes()
        leaving = shown.answers[number]["leaving"][layer]
        assert words.startswith(f"{shown.answers[number]['name']} after layer {layer}: {leaving} tokens")
    merged = len(shown.records[1].remaining(11)[1])
    assert merged and f"tokens ({merged} merged); this question: slope" in shown.overlay(1, 11)[1]
    assert "slope" in shown.overlay(1, 0)[1] and "slope" not in shown.overlay(2, 0)[1]


def test_large_images_are_sent_smaller(asked: SideBySide, image: str, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    with Image.open(image) as small:
        small.convert("RGBA").resize((2000, 500)).save(large)
    drawn, _ = asked.ask(str(large), QUESTION, False, CHOSEN).overlay(1, 4)
    assert drawn.size == (1200, 300)


def test_curves(shown: Shown) -> None:
    rows = shown.curves()
    assert len(rows) == 3 * 12 and {r["model"] for r in rows} == {"Unpruned", "A", "B"}
    assert [r["tokens"] for r in rows if r["model"] == "A"] == shown.records[1].tokens_out[0].tolist()


def test_the_model_is_left_as_it_was(asked: SideBySide, shown: Shown) -> None:
    assert shown.records and attached_handle(asked.loaded.model) is None


def test_the_same_method_twice_and_presets(asked: SideBySide) -> None:
    runs = asked.runs([("fastv:192", "64"), ("fastv:192", "64")])
    assert [r.label for r in runs] == ["fastv-192-192"] * 2
    (drawn,) = asked.runs([("random", "64")])
    assert drawn.method.hyper()["seed"] == 3


def test_hyper_parameters_go_to_the_methods_that_have_them(asked: SideBySide) -> None:
    given = SideBySide(asked.loaded, asked.model, asked.protocol, hyper={"k0": 0.3})
    first, second = given.runs(CHOSEN)
    assert first.method.hyper()["k0"] == 0.3 and "k0" not in second.method.hyper()


@pytest.mark.parametrize(
    ("question", "chosen", "words"),
    [
        (" ", ("fastv", "64"), "question ' ': give a text without <image>"),
        ("<image> what?", ("fastv", "64"), "give a text without <image>"),
        ("what? " * 2000, ("fastv", "64"), "shorten the text"),
        (QUESTION, ("fastv", "577"), "TOKENS=577: an image has 576 visual tokens"),
        (QUESTION, ("fastv", "some"), "budget of fastv: 'some': must be a positive integer"),
        (QUESTION, ("fastv", ""), "budget of fastv: '': must be a positive integer"),
        (QUESTION, ("fastv", "64,32"), "gives 2 runs; give one method and budget"),
        (QUESTION, ("all", "64"), "unknown method 'all'"),
        (QUESTION, ("", "64"), "no method chosen"),
        (QUESTION, ("fastvv", "64"), "unknown method 'fastvv'"),
        (QUESTION, ("/etc/method.py:x", "64"), "unknown method '/etc/method.py:x'"),  # files only on the command line
    ],
)
def test_refusals(asked: SideBySide, image: str, question: str, chosen: tuple[str, str], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        asked.ask(image, question, False, [("autoprune", "64"), chosen])
    assert words in message(caught.value) and "\n" not in message(caught.value)


def test_images_that_are_none(asked: SideBySide, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image given; upload one"):
        asked.ask(None, QUESTION, False, CHOSEN)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="^text.png is not a readable image"):
        asked.ask(str(tmp_path / "text.png"), QUESTION, False, CHOSEN)


def test_errors_that_are_not_the_users_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert message(ValueError("two\nlines")) == "two lines" and not caplog.records
        assert message(RuntimeError("a\nb" * 500)).startswith("RuntimeError: a b")
        assert len(message(RuntimeError("a\nb" * 500))) < 250
        assert "smaller --dtype" in message(torch.OutOfMemoryError("CUDA out of memory"))
    assert len(caplog.records) == 3 and all(r.exc_info for r in caplog.records)


def test_examples(root: Path, tmp_path: Path) -> None:
    found = examples(str(root / "playground/data/mini"))
    assert len(found) == len({image for image, _, _ in found}) == 4
    for image, question, short in found:
        assert Path(image).is_file() and question.endswith("?") and short is True
    assert examples(str(tmp_path)) == []


# the command ----------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["demo", *more]) == 1
    return capsys.readouterr().err.strip()


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert refusal(capsys) == "llava-prune: the demo needs gradio; pip install 'llava-prune[demo]'"


@pytest.fixture
def gradio(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Replace gradio by a module that has only a version."""
    module = ModuleType("gradio")
    module.__version__ = "6.31.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gradio", module)
    yield module


def test_another_version_of_gradio(gradio: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    gradio.__version__ = "4.16.0"  # type: ignore[attr-defined]
    assert "the demo needs gradio 6, and 4.16.0 is installed; pip install" in refusal(capsys)


def test_what_the_command_refuses(gradio: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Unusable arguments are refused before the model is loaded."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = refusal(capsys, "--port", port)
        assert said == (
            f"llava-prune: port {port} of 127.0.0.1 cannot be used (address already in use); give another with --port"
        )
    assert "the page compares two methods" in refusal(capsys, "--method", "fastv,random,vtw")
    assert "unknown method 'fastvv'" in refusal(capsys, "--method", "fastvv")
    assert "has a hyper-parameter nosuch" in refusal(capsys, "--method-args", "nosuch=1")
    assert "--host 192.0.2.1 is not an address of this machine" in refusal(capsys, "--host", "192.0.2.1")
    with pytest.raises(SystemExit):
        main(["demo", "--port", "0"])


def test_a_free_port_is_left_free() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    for _ in range(2):
        check_port("127.0.0.1", port)
