"""`llava-prune report` without a browser: the page contains the numbers and texts of the files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llava_prune.cli import main
from llava_prune.report.html import COLUMNS, page
from llava_prune.report.inline import drawn
from llava_prune.report.questions import columns
from llava_prune.report.store import StoredRun, read_result, read_runs
from llava_prune.report.together import comparable
from tests.report import browser
from tests.report.conftest import make_run, write_run

HOSTILE = '</script><script>alert("1")</script> <!-- \' & é 图 \ud83d'
GAP = {"points": -5.0, "low": -9.0, "high": -1.0}


class Read(HTMLParser):
    """A parser that collects the elements of a page, its texts and scripts, and the cells of its table of runs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.cells: list[dict[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag == "td":
            self.cells.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data
        self.texts.append(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write an unpruned run and two pruned runs on three questions; return their folder."""
    asked = [(HOSTILE, "yes", 1.0), ("What is it?", "no", 0.0), ("And this?", "a dog", None)]
    other = [(HOSTILE, "no", 0.0), ("What is it?", "no", 0.0), ("And this?", "a cat", None)]
    make_run(tmp_path / "full", asked)
    for tokens in (128, 64):
        make_run(tmp_path / f"autoprune-{tokens}", other, method="autoprune", tokens=tokens, difference_to_full=GAP)
    return tmp_path


def no_images(*_: Any) -> Any:
    raise AssertionError("these runs have no images")


def written(*argv: str) -> str:
    out = Path(argv[0]) / "made" / "page.html"
    assert main(["report", *argv, "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_content(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = written(str(folder))
    out, err = capsys.readouterr()
    assert out == f"{folder}/made/page.html\n" and not err
    read = Read(text)
    runs = comparable(read_runs([folder]))
    sorted_by = [key for key in COLUMNS.values() if key]
    numbers = [cell["data-value"] for cell in read.cells if "data-value" in cell]
    wanted = [run.row()[key] for run in runs for key in sorted_by]
    assert [None if n == "" else float(n or "nan") for n in numbers] == wanted
    for shown in ("50.00", "[10.0, 90.0]", "-5.00", "[-9.0, -1.0]", "25.0"):
        assert shown in map(str.strip, read.texts)
    assert ("strong", {}) in read.tags
    assert {"model", "models/llava-tiny", "questions answered", "3"} <= set(read.texts)
    data = json.loads(read.scripts[0])
    assert [run["name"] for run in data["runs"]] == ["full", "autoprune-128", "autoprune-64"]
    assert [run["pruned"] for run in data["runs"]] == [False, True, True]
    for found, run in zip(data["runs"], runs, strict=True):
        assert [data["texts"][i] for i in found["answers"]] == [row["text"] for row in run.answers()]
        assert found["scores"] == [row["score"] for row in run.scores()]
    assert data["ids"] == ["0", "1", "2"]
    assert [data["types"][i] for i in data["type"]] == ["query", "verify", "query"]
    assert data["questions"] == [HOSTILE.replace("\ud83d", "?"), "What is it?", "And this?"]


def test_texts_are_escaped_and_nothing_is_fetched(folder: Path) -> None:
    make_run(folder / "x", [("q", "a", 1.0)] * 3, method="<b>x</b>", tokens=3, bench='"><script>1', command=HOSTILE)
    text = written(str(folder))
    read = Read(text)
    kinds = [attrs.get("type") for tag, attrs in read.tags if tag == "script"]
    assert kinds == ["application/json"] * 2 + [None]
    assert not [tag for tag, _ in read.tags if tag in ("b", "img", "iframe", "object", "base")]
    policy = next(a["content"] or "" for t, a in read.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "http" not in policy
    links = [value for _, attrs in read.tags for name, value in attrs.items() if name in ("src", "href", "xlink:href")]
    assert all(str(link).startswith(("#", "data:")) for link in links)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_figures(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    read = Read(page(comparable(read_runs([folder])), no_images, 9)[0])
    labels = [attrs["aria-label"] for tag, attrs in read.tags if tag == "svg"]
    assert labels == [
        "GQA: figure against prefill FLOPs, with 95 % intervals; the table of runs has the numbers",
        "GQA: visual tokens entering each layer; the table of runs has the numbers",
    ]
    assert sum(tag == "style" for tag, _ in read.tags) == 1  # a figure's rules would apply to the page
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert (
        page(comparable(read_runs([folder])), no_images, 9)[0] == page(comparable(read_runs([folder])), no_images, 9)[0]
    )


def test_figures_that_cannot_be_drawn_are_explained(folder: Path) -> None:
    text = written(str(folder), "--method", "full")
    assert text.count("Not drawn: the figure needs a finished run of a pruning method") == 2 and "<svg" not in text


def test_figures_of_too_many_runs_show_fewer(tmp_path: Path) -> None:
    def most(limit: int) -> Any:
        def draw(some: Any) -> Any:
            if len(some) > limit:
                raise ValueError("too many")
            return some

        return draw

    runs = [write_run(tmp_path / "full", "full", None)]
    runs += [write_run(tmp_path / f"a{t}", "autoprune", t) for t in (128, 64)]
    runs += [write_run(tmp_path / "r64", "random", 64)]
    swept = write_run(tmp_path / "s", "autoprune", 64)
    swept.result["label"] += ",lam=1"
    for limit, shown, remark in (
        (5, 5, ""),
        (4, 4, "Without the variants of sweeps."),
        (3, 3, "Only the budget of 64 tokens, without the variants of sweeps."),
    ):
        found: Any = drawn(most(limit), [*runs, swept])
        assert (len(found[0]), found[1]) == (shown, remark)
    assert drawn(most(2), runs) == (None, "Not drawn: too many.")


def test_runs_that_cannot_be_compared_are_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(folder / "random-64", [("Another?", "no", 0.0)] * 3, method="random", tokens=64)
    (folder / "autoprune-64" / "scores.jsonl").unlink()
    text = written(str(folder))
    err = capsys.readouterr().err
    assert err.count("not among the questions: ") == 2
    assert "asked different questions" in err and "scores.jsonl cannot be read" in err
    read = Read(text)
    assert [run["name"] for run in json.loads(read.scripts[0])["runs"]] == ["full", "autoprune-128"]
    assert "Left out of this section: 2" in text
    for path in folder.rglob("answers.jsonl"):
        path.unlink()
    assert "No run has answers and scores that can be read." in written(str(folder))


def test_settings_are_stated_once(folder: Path) -> None:
    result = read_result(folder / "autoprune-64" / "result.json")
    result["settings"]["hyper"]["lam"] = 1.5
    (folder / "autoprune-64" / "result.json").write_text(json.dumps(result))
    text = written(str(folder))
    assert text.count("<dd>models/llava-tiny</dd>") == 1
    assert "<dt>hyper.lam</dt><dd>1.5 (default 0.3)</dd>" in text


def test_partial_scores_are_kept(tmp_path: Path) -> None:
    made = make_run(tmp_path / "a", [("q", "a", 0.3), ("r", "b", 1.0), ("s", "a", None)])
    found, _, left_out = columns([StoredRun(made, read_result(made / "result.json"))])
    assert found is not None and not left_out
    assert json.dumps(found["runs"][0]["scores"]) == "[0.3, 1, null]" and found["texts"] == ["a", "b"]


# refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no finished runs in"),
        (["--task", "mme"], "--task mme: no finished run in"),
        (["--method", "full,autoprun"], "--method autoprun: no finished run in"),
        (["--tokens", "7"], "--tokens 7: no finished run in"),
        (["--no-sweeps"], "the runs are of several models (lab/other, models/llava-tiny); choose one with --model"),
        (["/nowhere/at/all"], "/nowhere/at/all: no such folder"),
    ],
)
def test_refusals(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: Any, argv: list[str], message: str
) -> None:
    make_run(folder / "other", [("q", "a", 1.0)] * 3, settings={"model": "lab/other", "hyper": {}})
    place = folder if argv else tmp_path_factory.mktemp("empty")
    assert main(["report", str(place), *argv]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert main(["report", str(folder), "--model", "other", "--out", str(folder / "page.html")]) == 0


def test_the_message_without_jinja2(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(folder), "--out", str(folder / "page.html")]) == 1
    assert capsys.readouterr().err == "llava-prune: the report needs jinja2; pip install 'llava-prune[report]'\n"
    assert not (folder / "page.html").exists()


def test_without_matplotlib_the_page_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert written(str(folder)).count("Not drawn: the figure needs matplotlib; pip install") == 2


def test_loads_no_torch(folder: Path) -> None:
    code = "import sys; from llava_prune.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    argv = [sys.executable, "-c", code, "report", str(folder), "--out", str(folder / "page.html")]
    subprocess.run(argv, check=True, timeout=60)


# without Chromium -------------------------------------------------------------------------------------------------


def test_without_chromium_the_browser_tests_are_skipped_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "NAMES", ("no-such-program",))
    monkeypatch.delenv("REQUIRE_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="Chromium"):
        next(browser.chromium())
    monkeypatch.setenv("REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="Chromium"):
        next(browser.chromium())
