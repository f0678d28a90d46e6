"""The page of `llava-prune demo` in a headless Chromium; needs `pip install -e '.[dev,demo]'`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_prune.cli import main
from tests.report.browser import Opened, chromium

pytestmark = pytest.mark.browser
IMAGES = Path("playground/data/mini/gqa/data/images")
QUESTION = "What is the yellow object?"
SERVER = '''
import ipaddress, sys

def watch(event, args):
    """Report what leaves this machine."""
    host = None
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    if event == "socket.getaddrinfo":
        host = args[0]
    if host in (None, "localhost"):
        return
    try:
        inside = ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = False
    if not inside:
        sys.stderr.write(f"OUTSIDE {event} {host}\\n")

sys.addaudithook(watch)
from llava_prune import register
from llava_prune.cli import main
from llava_prune.methods.baselines import Random

@register("faulty")
class Faulty(Random):
    def scores(self, layer, view):
        raise RuntimeError("a <b>part</b> is broken")

raise SystemExit(main(["demo", *sys.argv[1:]]))
'''
OWN = ("Method not implemented.", "WARN The input spec uses Vega-Lite ")
"""Beginnings of the messages that gradio itself writes to the console, about its client and its plots."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if importlib.util.find_spec("gradio") is None:
        missing = "gradio is not installed; pip install -e '.[demo]'"
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    yield from chromium()


class Server:
    """A running `llava-prune demo`."""

    def __init__(self, root: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / "log.txt"
        env = {**os.environ, "PYTHONPATH": str(root), "GRADIO_TEMP_DIR": str(folder / "cache")}
        for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE"):
            env.pop(name, None)
        command = [sys.executable, "-c", SERVER, "--port", str(self.port), "--device", "cpu", "--new", "8"]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, cwd=root, env=env, stdout=out, stderr=out)
        end = time.monotonic() + 120
        while f"http://127.0.0.1:{self.port}/ (Ctrl+C ends it)" not in self.text():
            assert self.process.poll() is None and time.monotonic() < end, self.text()[-2000:]
            time.sleep(0.2)

    def text(self) -> str:
        """Return the output of the process on stdout and stderr."""
        return self.log.read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="module")
def server(browser: Any, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    out = Server(root, tmp_path_factory.mktemp("demo"))
    yield out
    out.process.terminate()
    out.process.wait(20)
    assert "OUTSIDE" not in out.text()


class Page(Opened):
    """The page of the demo."""

    def __init__(self, browser: Any, server: Server, width: int = 1280, scheme: str = "light") -> None:
        super().__init__(browser, f"http://127.0.0.1:{server.port}/", width, scheme)
        self.button = self.tab.get_by_role("button", name="Ask", exact=True)
        self.button.wait_for()

    def fill(self, image: Path | None, question: str = QUESTION) -> None:
        """Upload an image, if one is given, and enter a question."""
        if image is not None:
            with self.tab.expect_response(lambda reply: "/upload" in reply.url):
                self.tab.locator("input[type=file]").first.set_input_files(image)
            self.tab.get_by_role("button", name="Remove Image").or_(self.tab.get_by_label("Clear")).first.wait_for()
        self.tab.get_by_label("Question").fill(question)

    def answer(self, label: str) -> str:
        """Return the text of an answer."""
        field = self.tab.get_by_role("textbox", name=label, exact=True)
        field.wait_for(timeout=60_000)
        return str(field.input_value())

    def error(self) -> str:
        """Return the newest error that is shown, in one line."""
        toast = self.tab.get_by_test_id("toast-text").last
        toast.wait_for(timeout=60_000)
        return " ".join(toast.inner_text().split())


@pytest.fixture
def opened(browser: Any, server: Server) -> Iterator[Callable[..., Page]]:
    """Return a function that opens the page; at the end, check the console messages and requests of all pages."""
    pages: list[Page] = []

    def new(**given: Any) -> Page:
        pages.append(Page(browser, server, **given))
        return pages[-1]

    yield new
    for page in pages:
        page.context.close()
        assert [text for text in page.complaints if not text.startswith(OWN)] == []
        assert {url for url in page.requests if not url.startswith((page.url, "data:", "blob:"))} == set()


@pytest.fixture
def image(root: Path) -> Path:
    return root / IMAGES / "n9000003.jpg"


def test_answers_are_those_of_show(
    opened: Callable[..., Page], root: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = opened()
    page.fill(image)
    page.button.click()
    told = [page.answer("A: autoprune-64"), page.answer("B: fastv-64"), page.answer("Unpruned")]
    asked = ["show", "--image", str(image), "--question", QUESTION, "--device", "cpu", "--new", "8", "--json"]
    asked += ["--model", str(root / "playground/models/llava-tiny"), "--out", str(tmp_path / "kept.html")]
    found = {}
    for method in ("autoprune", "fastv"):
        assert main([*asked, "--method", method]) == 0
        found |= {a["name"]: a for a in json.loads(capsys.readouterr().out)["answers"]}
    assert told == [found[name]["answer"] for name in ("autoprune-64", "fastv-64", "unpruned")]
    facts = page.tab.locator(".facts table").all_inner_texts()
    assert len(facts) == 3 and all(re.search(r"Prefill\s+\d+ ms", text) for text in facts)
    for text, name in zip(facts, ("unpruned", "autoprune-64", "fastv-64"), strict=True):
        assert f"576 in, {found[name]['leaving'][-1]} out" in text and f"{found[name]['percent']:.1f} %" in text
    curve = page.tab.get_by_label("layer: 0; visual tokens leaving a layer: 160; model: A").first
    assert curve.get_attribute("aria-roledescription") == "line mark"


def test_layers_by_slider(opened: Callable[..., Page], image: Path) -> None:
    page = opened()
    page.fill(image)
    page.tab.get_by_label("Question").press("Enter")
    page.answer("A: autoprune-64")
    slider, overlay = page.tab.get_by_label("range slider for Layer of A"), page.tab.get_by_alt_text("autoprune-64")
    before, other = overlay.get_attribute("src"), page.tab.get_by_alt_text("fastv-64").get_attribute("src")
    slider.focus()
    page.tab.keyboard.press("Home")
    page.tab.get_by_text("autoprune-64 after layer 0: 160 tokens").wait_for()
    assert overlay.get_attribute("src") != before
    page.tab.keyboard.press("ArrowRight")
    page.tab.get_by_text("autoprune-64 after layer 1: ").wait_for()
    assert overlay.get_attribute("alt").startswith("Patches kept by autoprune-64 after layer 1: ")
    assert page.tab.get_by_alt_text("fastv-64").get_attribute("src") == other


def test_by_keyboard_with_an_example(opened: Callable[..., Page]) -> None:
    page = opened()
    page.tab.get_by_role("button", name="Drop an image file here to upload").focus()
    with page.tab.expect_file_chooser():
        page.tab.keyboard.press("Enter")
    page.tab.get_by_role("button", name="Do you see a black circle?").focus()
    page.tab.keyboard.press("Enter")
    page.tab.wait_for_function("document.querySelector('textarea').value != ''")
    assert page.tab.get_by_label("Question").input_value() == "Do you see a black circle?"
    assert page.tab.get_by_label("Ask for a single word").is_checked()
    page.tab.get_by_label("Question").focus()
    for _ in range(12):
        page.tab.keyboard.press("Tab")
        if page.button.evaluate("button => button === document.activeElement"):
            break
    page.tab.keyboard.press("Enter")
    assert page.answer("A: autoprune-64") in ("yes", "no")


def test_errors_are_shown(opened: Callable[..., Page], server: Server, image: Path) -> None:
    page = opened()
    page.button.click()
    assert page.error() == "no image given; upload one, or choose an example"
    page.fill(image, " ")
    page.button.click()
    page.tab.get_by_text("give a text without <image>, which is added").wait_for()
    page.fill(None)
    page.tab.get_by_label("Budget of B").fill("577")
    page.button.click()
    page.tab.get_by_text("TOKENS=577: an image has 576 visual tokens in this model; give 576 or fewer").wait_for()
    assert "Traceback" not in server.text()
    page.tab.get_by_label("Budget of B").fill("32")
    page.tab.get_by_label("Method B").fill("faulty")
    page.tab.get_by_label("Method B").press("Enter")
    page.button.click()
    page.tab.get_by_text("RuntimeError: a <b>part</b> is broken (the terminal has the details)").wait_for()
    assert "Traceback" in server.text() and "a <b>part</b> is broken" in server.text()
    page.tab.get_by_label("Method B").fill("random")
    page.tab.get_by_label("Method B").press("Enter")
    page.button.click()
    assert page.answer("B: random-32")  # the failure left the model intact


def test_a_file_that_is_no_image(opened: Callable[..., Page], tmp_path: Path) -> None:
    file = tmp_path / "text.png"
    file.write_text("no image", encoding="utf-8")
    page = opened()
    page.fill(file)
    page.button.click()
    assert "image" in page.error()


def test_two_tabs_at_once(opened: Callable[..., Page], image: Path) -> None:
    first, second = opened(), opened()
    first.fill(image)
    second.fill(image, "What color is the heart?")
    second.tab.get_by_label("Budget of A").fill("128")
    first.button.click()
    second.button.click()
    assert first.answer("A: autoprune-64") and second.answer("A: autoprune-128") and second.answer("B: fastv-64")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_windows_do_not_scroll_sideways(opened: Callable[..., Page], image: Path, scheme: str) -> None:
    page = opened(width=375, scheme=scheme)
    page.fill(image)
    page.button.click()
    page.answer("A: autoprune-64")
    page.tab.get_by_alt_text("fastv-64").scroll_into_view_if_needed()
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= 375
    right = "Math.max(...[...document.querySelectorAll('main *')].map(e => e.getBoundingClientRect().right))"
    assert page.tab.evaluate(right) <= 376


def test_fields_have_labels(opened: Callable[..., Page]) -> None:
    page = opened()
    fields = "[...document.querySelectorAll('input:not([type=file]), textarea, select')]"
    assert page.tab.evaluate(f"{fields}.length") >= 10
    assert page.tab.evaluate(f"{fields}.filter(f => !f.labels.length && !f.getAttribute('aria-label')).length") == 0
    assert page.tab.get_by_role("heading", level=1).inner_text() == "Visual token pruning"
    assert page.tab.title() == "Visual token pruning"
