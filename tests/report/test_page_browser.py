"""The page of `llava-prune report` in a headless Chromium."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llava_prune.cli import main
from llava_prune.report.compare import compare
from llava_prune.report.store import StoredRun, read_result
from tests.report.browser import Opened, chromium
from tests.report.conftest import SHORT, make_run

pytestmark = pytest.mark.browser
HOSTILE = (
    '<script>document.title = "bad"</script>',
    "</script><img src=x onerror='document.title=1'>",
    'a "quoted" word & an <b>entity</b> &amp; <!--',
)
KINDS = ("query", "verify", None)
COLOURS = ("red", "green", "blue", "yellow")


def asked(count: int, wrong: float, seed: int) -> list[tuple[str, str, float | None]]:
    """Return made-up questions with answers and scores; the questions do not depend on `seed`."""
    draw = random.Random(seed)
    out: list[tuple[str, str, float | None]] = []
    for i in range(count):
        shape = ("circle", "Star", "ring")[i % 3]
        right = COLOURS[i % 4]
        question = HOSTILE[i] if i < len(HOSTILE) else f"What color is the {shape} number {i}?"
        answer = right if draw.random() > wrong else draw.choice(COLOURS)
        out.append((question, answer, None if i == 20 else float(answer == right)))
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from chromium()


class Report(Opened):
    """The page of a report."""

    def shown(self) -> list[int]:
        """Return the numbers of the questions in the rows that are drawn."""
        return [int(i) for i in self.tab.eval_on_selector_all("#pairs tbody tr", "rs => rs.map(r => r.dataset.index)")]

    def every(self) -> list[int]:
        """Return the numbers of the questions from this page of rows to the last."""
        out = self.shown()
        while self.tab.locator(".pager:not([hidden]) button:enabled:text('Next')").count():
            self.tab.locator(".pager").first.get_by_role("button", name="Next").click()
            out += self.shown()
        return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three runs on 250 questions, two runs on another benchmark, and their report; return the folder."""
    out: Path = tmp_path_factory.mktemp("results")
    gap = {"points": -5.0, "low": -9.0, "high": -1.0}
    make_run(out / "gqa" / "full", asked(250, 0.1, 1), kinds=KINDS, figure=90.0)
    for tokens, wrong in ((64, 0.4), (128, 0.2)):
        more: dict[str, Any] = {"method": "autoprune", "tokens": tokens, "difference_to_full": gap}
        make_run(out / "gqa" / f"autoprune-{tokens}", asked(250, wrong, tokens), kinds=KINDS, **more)
    make_run(out / "pope" / "full", asked(30, 0.1, 5), bench="pope")
    make_run(out / "pope" / "random-64", asked(30, 0.5, 6), bench="pope", method="random", tokens=64)
    assert main(["report", str(out), "--out", str(out / "report.html")]) == 0
    return out


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Report]:
    opened = Report(browser, (folder / "report.html").as_uri())
    yield opened
    opened.context.close()
    assert opened.complaints == [] and opened.requests == [opened.url]


def run_of(folder: Path) -> StoredRun:
    return StoredRun(folder, read_result(folder / "result.json"))


def expected(a: StoredRun, b: StoredRun, needle: str = "", kind: str | None = None, show: str = "all") -> list[int]:
    """Return the numbers of the questions that the page should show, computed from the files."""
    rows = list(zip(a.answers(), b.answers(), a.scores(), b.scores(), strict=True))
    flips, others = [], []
    for i, (x, y, s, t) in enumerate(rows):
        texts = [x["prompt"].removesuffix(f"\n{SHORT}"), x["text"], y["text"]]
        if needle and not any(needle.lower() in text.lower() for text in texts):
            continue
        if kind is not None and s["type"] != kind:
            continue
        ours, theirs = s["score"], t["score"]
        scored = ours is not None and theirs is not None
        flipped = scored and ours != theirs
        wanted = {
            "all": True,
            "flipped": flipped,
            "a": scored and ours > theirs,
            "b": scored and ours < theirs,
            "both": scored and ours == theirs == 1,
            "neither": scored and ours == theirs == 0,
        }
        if wanted[show]:
            (flips if flipped else others).append(i)
    return flips + others


def test_opens_with_the_unpruned_run_and_the_first_pruned_one(page: Report, folder: Path) -> None:
    a, b = run_of(folder / "gqa" / "full"), run_of(folder / "gqa" / "autoprune-128")
    assert page.tab.locator("#head-a").text_content() == "A: full"
    assert page.tab.locator("#head-b").text_content() == "B: autoprune-128"
    assert page.shown() == expected(a, b)[:100]
    total = compare(a, b).total
    text = page.tab.locator("#totals").text_content()
    assert f"{total.both} right in both · {total.only_a} A right, B wrong · {total.only_b} B right, A wrong" in text
    assert f"{total.neither} wrong in both · 1 without a score" in text
    assert page.every() == expected(a, b)


@pytest.mark.parametrize(("needle", "kind"), [("", None), ("STAR", "verify"), ("yellow", None), ("number 1", "query")])
def test_filters_show_what_the_files_say(page: Report, folder: Path, needle: str, kind: str | None) -> None:
    page.tab.get_by_label("Run B").select_option("autoprune-64")
    page.tab.get_by_label("Type").select_option(kind or "all")
    page.tab.get_by_label("Search questions and answers").fill(needle)
    runs = run_of(folder / "gqa" / "full"), run_of(folder / "gqa" / "autoprune-64")
    for show in ("flipped", "a", "b", "both", "neither", "all"):
        page.tab.get_by_label("Show").select_option(show)
        wanted = expected(*runs, needle, kind, show)
        assert page.every() == wanted, show
        assert page.tab.locator("#found").text_content().startswith(str(len(wanted)))


def test_another_benchmark_and_a_run_from_the_table(page: Report, folder: Path) -> None:
    page.tab.get_by_role("button", name="random-64", exact=True).click()
    assert page.tab.locator("#totals").text_content().startswith("POPE")
    assert page.shown() == expected(run_of(folder / "pope" / "full"), run_of(folder / "pope" / "random-64"))
    assert page.tab.evaluate("document.activeElement.id") == "b"
    page.tab.locator("#search").fill("nothing has this")
    assert page.shown() == [] and page.tab.locator("#rows").is_hidden()


def test_texts_are_text(page: Report) -> None:
    page.tab.locator("#search").fill("<")
    assert set(page.tab.locator(".question").all_text_contents()) == set(HOSTILE)
    assert page.tab.locator("#pairs :is(img, b, script)").count() == 0
    assert page.tab.title().startswith("Visual token pruning")
    assert page.tab.locator("mark").first.text_content() == "<"


def test_sorting_by_keyboard(page: Report) -> None:
    names = "#table tbody tr:not([hidden]) th"
    page.tab.get_by_label("Benchmark").first.select_option("GQA")
    page.tab.get_by_role("columnheader", name="Run", exact=True).get_by_role("button").focus()
    for _ in range(2):  # past "Metric"
        page.tab.keyboard.press("Tab")
    assert page.tab.evaluate("document.activeElement.textContent") == "Figure"
    head = page.tab.locator("#table thead th").nth(3)
    outline = page.tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid" and head.get_attribute("aria-sort") is None
    page.tab.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    up = page.tab.locator(names).all_text_contents()
    page.tab.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending" and len(up) == 3
    assert page.tab.locator(names).all_text_contents() == up[::-1]
    page.tab.keyboard.press("Tab")
    page.tab.keyboard.press("Enter")
    assert page.tab.locator("#table [aria-sort]").count() == 1
    assert page.tab.locator(names).all_text_contents()[-1] == "full"  # it has no difference to itself


def test_theme(page: Report, browser: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.tab.evaluate(background)
    page.tab.get_by_role("button", name="Dark theme").click()
    dark = page.tab.evaluate(background)
    assert dark != light
    page.tab.get_by_role("button", name="Light theme").click()
    assert page.tab.evaluate(background) == light
    other = Report(browser, page.url, scheme="dark")
    assert other.tab.evaluate(background) == dark
    other.context.close()


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  let worst = [99, ""];
  for (const e of document.querySelectorAll("body *:not(script, svg, svg *, :disabled)")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility()) continue;
    let under = e;
    while (under && rgb(getComputedStyle(under).backgroundColor)[3] === 0) under = under.parentElement;
    const [x, y] = [getComputedStyle(e).color, getComputedStyle(under || document.body).backgroundColor]
      .map((c) => light(rgb(c)));
    const ratio = (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
    if (ratio < worst[0]) worst = [ratio, `${e.tagName}.${e.className} ${e.textContent.slice(0, 40)}`];
  }
  return worst;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_labels_and_landmarks(browser: Any, folder: Path, scheme: str) -> None:
    opened = Report(browser, (folder / "report.html").as_uri(), scheme=scheme)
    opened.tab.locator("#search").fill("color")
    ratio, where = opened.tab.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    assert opened.tab.evaluate("[...document.querySelectorAll('input, select')].every(c => c.labels.length)")
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert opened.tab.get_by_role(landmark).count() == 1
    levels = opened.tab.eval_on_selector_all("h1, h2, h3", "hs => hs.map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    ids = opened.tab.eval_on_selector_all("[id]", "es => es.map(e => e.id)")
    assert len(ids) == len(set(ids))
    opened.context.close()


@pytest.mark.parametrize("width", [320, 375])
def test_narrow_windows_do_not_scroll_sideways(browser: Any, folder: Path, width: int) -> None:
    opened = Report(browser, (folder / "report.html").as_uri(), width)
    opened.tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.tab.locator("#pairs tbody tr").first.is_visible()
    opened.context.close()


PAINT = """() => new Promise((done) => {
  const look = () => {
    const times = performance.getEntriesByType("paint").map((e) => e.startTime);
    if (times.length > 1) done(Math.max(...times)); else requestAnimationFrame(look);
  };
  look();
})"""
"""The time of the first paint of content; the page's policy forbids playwright's wait_for_function."""


@pytest.mark.parametrize("words", [0, 35], ids=["short answers", "long answers"])
def test_ten_thousand_questions(browser: Any, tmp_path: Path, words: int) -> None:
    """File size, first paint and the slowest search stay below limits with four runs; pytest -rP prints them."""
    methods: Sequence[tuple[str, int | None]] = (("full", None), ("autoprune", 128), ("autoprune", 64), ("random", 64))
    for seed, (method, tokens) in enumerate(methods):
        draw = random.Random(seed)
        rows = [(q, " ".join([x, *draw.choices(COLOURS, k=words)]), s) for q, x, s in asked(10_000, 0.2, seed)]
        make_run(tmp_path / "gqa" / f"{method}{tokens}", rows, method=method, tokens=tokens)
    file = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "gqa"), "--out", str(file)]) == 0
    opened = Report(browser, file.as_uri())
    paint = opened.tab.evaluate(PAINT)
    search = opened.tab.evaluate(
        """() => Math.max(...["7", "star", "number 99", "", "green", "number 123"].map((text) => {
          const field = document.getElementById("search");
          const start = performance.now();
          field.value = text;
          field.dispatchEvent(new Event("input"));
          document.body.offsetHeight; // lays out what was drawn
          return performance.now() - start;
        }))"""
    )
    measured = f"{file.stat().st_size / 1e6:.1f} MB, first paint {paint:.0f} ms, slowest search {search:.0f} ms"
    print(measured)
    wanted = expected(run_of(tmp_path / "gqa" / "fullNone"), run_of(tmp_path / "gqa" / "autoprune128"), "number 123")
    assert opened.every() == wanted and len(wanted) == 11
    assert file.stat().st_size < 15e6 and paint < 2000 and search < 500, measured
    assert opened.complaints == [] and opened.requests == [file.as_uri()]
    opened.context.close()
