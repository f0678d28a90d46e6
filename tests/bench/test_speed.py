"""`llava-prune bench` on the tiny shape, and its parts against values computed by hand."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_prune
from llava_prune.bench import shapes
from llava_prune.bench import speed as speed_module
from llava_prune.bench.floor import Machine, decode_floor, prefill_floor
from llava_prune.bench.flops import Size
from llava_prune.bench.latency import alternate, probing, quartiles, stages
from llava_prune.bench.memory import Peak
from llava_prune.bench.request import request
from llava_prune.bench.speed import Settings, speed
from llava_prune.cli import main
from llava_prune.experimental import graphs
from llava_prune.report.speed import draw_speed, plot
from tests.experimental.tape import Recorder

SMALL = ["bench", "--shape", "tiny", "--tokens", "64", "--batch", "1", "--text", "20", "--new", "2", "--repeats", "2"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: Any, request: Any) -> tuple[dict[str, Any], Path]:
    """The JSON that the command prints, and its folder."""
    out = tmp_path_factory.mktemp("bench")
    manager = request.config.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled(), pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("sys.stdout", type("Out", (), {"write": lambda _, s: lines.append(s), "flush": lambda _: None})())
        args = [*SMALL, "--method", "autoprune,random", "--warmup", "0", "--profile", "--json", "--out", str(out)]
        assert main(args) == 0
    return json.loads("".join(lines)), out


def test_rows_say_what_was_measured(result: Any) -> None:
    found, out = result
    assert json.loads((out / "bench.json").read_text()) == found
    assert [(r["method"], r["tokens"], r["batch"], r["visual"], r["text"]) for r in found["rows"]] == [
        ("autoprune", 64, 1, 576, 20),
        ("random", 64, 1, 576, 20),
    ]
    assert found["machine"]["dtype"] == "float32" and found["command"].startswith("llava-prune bench --shape tiny")


def test_efficiency_is_time_over_flops(result: Any) -> None:
    """Random keeps 64 of 576 in each of 4 layers of width 64 with MLPs of 160, beside 20 text tokens."""

    def layer(n: int) -> int:
        return 4 * n * 64**2 + 2 * n**2 * 64 + 3 * n * 64 * 160

    row = result[0]["rows"][1]
    assert row["flops"] == {
        "full": 4 * layer(596),
        "pruned": 4 * layer(84),
        "ratio": pytest.approx(layer(596) / layer(84)),
    }
    for row in result[0]["rows"]:
        times = row["stages"]["prefill"]
        assert row["efficiency"] == pytest.approx(times["speedup"]["median"] / row["flops"]["ratio"])
        assert row["overhead"]["share_of_full"] == pytest.approx(row["overhead"]["median"] / times["full"]["median"])
        for name in ("vision", "prefill", "decode", "total"):
            for who in ("full", "pruned", "speedup"):
                part = row["stages"][name][who]
                assert 0 < part["q1"] <= part["median"] <= part["q3"]
        parts = [row["stages"][k]["full"]["q1"] for k in ("vision", "prefill", "decode")]
        assert sum(parts) < row["stages"]["total"]["full"]["q3"] * 1.5
        assert 0 < row["floor"]["prefill_pruned"] < row["floor"]["prefill_full"]
        assert 0 < row["floor"]["decode_pruned"] < row["floor"]["decode_full"]


def test_memory_of_a_prefill(result: Any) -> None:
    """Peaks include the cache: the unpruned one alone has 4 layers x 2 x 596 tokens x 64 floats."""
    for row in result[0]["rows"]:
        full, cut = row["memory"]["full"], row["memory"]["pruned"]
        assert full["prefill"] > 4 * 2 * 596 * 64 * 4 * 0.99
        assert full["request"] >= full["prefill"]
        assert cut["prefill"] < full["prefill"]


def test_profile_writes_traces(result: Any) -> None:
    _, out = result
    trace = json.loads((out / "trace-random-64-b1-t20.json").read_text())
    assert any(e.get("name") == "aten::scaled_dot_product_attention" for e in trace["traceEvents"])
    assert "aten::" in (out / "trace-autoprune-64-b1-t20.txt").read_text()


def test_plot(result: Any, tmp_path: Path) -> None:
    """The command writes a plot, and the suffix of the file gives its format."""
    for path in (result[1] / "bench.png", tmp_path / "again.png"):
        if path.parent == tmp_path:
            plot(result[0], path)
        assert path.read_bytes()[:4] == b"\x89PNG"
    plot(result[0], tmp_path / "bench.svg")
    assert "<svg" in (tmp_path / "bench.svg").read_text()


def test_the_plot_shows_the_rows(result: Any) -> None:
    """One panel for each batch size, one point for each method and budget; failed rows are left out."""
    rows = result[0]["rows"]
    more = [*rows, {**rows[0], "batch": 8}, {**rows[0], "batch": 8, "tokens": 32, "error": "out of memory"}]
    figure = draw_speed([{**result[0], "rows": more}])
    first, second = figure.axes
    for axes, shown in ((first, rows), (second, rows[:1])):
        lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
        assert lines == {
            r["method"]: [[r["flops"]["ratio"], r["stages"]["prefill"]["speedup"]["median"]]] for r in shown
        }
        assert [t.get_text() for t in axes.texts] == ["64"] * len(shown)
    assert first.get_title() == "batch 1, 576 + 20 tokens" and second.get_title().startswith("batch 8")


@pytest.mark.experimental
def test_recorded_and_fused_requests(monkeypatch: Any, tmp_path: Path) -> None:
    """The stand-in for CUDA graphs is replayed in every timed pair; the fused kernels are interpreted."""
    tape = Recorder()
    monkeypatch.setattr(graphs, "recorder", lambda device: tape)
    settings = Settings(
        shape="tiny", methods=("full", "autoprune"), tokens=(64,), texts=(20,), new=4, repeats=2, memory=False,
        graphs=True, text_step=8, out=str(tmp_path),
    )  # fmt: skip
    rows = speed(settings)["rows"]
    assert [(r["method"], r["graphs"]) for r in rows] == [("full", True), ("autoprune", True)]
    assert tape.recorded == 1 + 2 and tape.replayed >= 2 * (1 + 2) and tape.steps >= 2 and tape.stepped >= 2 * 2 * 3
    pytest.importorskip("triton")
    plain = speed(dataclasses.replace(settings, methods=("autoprune",), graphs=False, text_step=None, repeats=1))
    fused = speed(
        dataclasses.replace(settings, methods=("autoprune",), graphs=False, text_step=None, repeats=1, fused=True)
    )
    counts = [r["rows"][0]["average_entering"] for r in (plain, fused)]
    assert counts[0] == counts[1]
    assert fused["settings"]["fused"] is True


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_a_row_without_memory(error: Exception, monkeypatch: Any, tmp_path: Path) -> None:
    """If memory runs out on a GPU or the host, the row says so, and the next one is measured; other errors end it."""
    measure = speed_module.measure

    def failing(settings: Any, loaded: Any, method: Any, *rest: Any) -> Any:
        if method.name == "uniform":
            raise error
        return measure(settings, loaded, method, *rest)

    monkeypatch.setattr(speed_module, "measure", failing)
    settings = Settings(
        shape="tiny", methods=("uniform", "random"), tokens=(64,), texts=(20,), new=2, repeats=1, warmup=0,
        memory=False, out=str(tmp_path),
    )  # fmt: skip
    rows = speed(settings)["rows"]
    assert [(r["method"], r.get("error")) for r in rows] == [("uniform", "out of memory"), ("random", None)]
    error = RuntimeError("another error")
    with pytest.raises(RuntimeError, match="another error"):
        speed(settings)


def test_no_plot_without_matplotlib(result: Any, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    """The command names what to install and continues."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install"):
        plot(result[0], tmp_path / "bench.png")
    assert main([*SMALL, "--method", "random", "--warmup", "0", "--no-memory", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "no plot: " in said.err and "random 64" in said.out
    assert (tmp_path / "out" / "bench.json").is_file() and not (tmp_path / "out" / "bench.png").exists()


def test_tables(result: Any) -> None:
    from rich.console import Console

    from llava_prune.bench.show import speed_tables

    failed = {**result[0]["rows"][0], "method": "other", "error": "out of memory"}
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in speed_tables({**result[0], "rows": [*result[0]["rows"], failed]}):
        console.print(table)
    text = console.export_text()
    assert "random 64, batch 1, 576+20" in text and "other 64" in text and "out of memory" in text
    assert f"{result[0]['rows'][0]['efficiency']:.2f}" in text


def test_presets_are_planned_as_in_eval(tmp_path: Path) -> None:
    """A preset with a budget keeps it, and one that fixes the counts has none."""
    settings = Settings(
        shape="tiny", methods=("fastv:paper", "fastv:192"), tokens=(64,), texts=(20,), new=2, repeats=1, warmup=0,
        memory=False, out=str(tmp_path),
    )  # fmt: skip
    rows = speed(settings)["rows"]
    assert [(r["label"], r["method"], r["tokens"]) for r in rows] == [
        ("fastv-paper", "fastv:paper", None),
        ("fastv-192-192", "fastv:192", 192),
    ]
    assert [r["average_entering"] for r in rows] == [(2 * 576 + 2 * 288) / 4, pytest.approx(192, abs=1)]


@pytest.fixture(scope="module")
def tiny_shape() -> Any:
    return shapes.random_model("tiny")


def test_unpruned_and_pruned_take_turns(tiny_shape: Any) -> None:
    lm = tiny_shape.model.model.language_model
    asked = request(tiny_shape, 1, 8, 2)
    seen = []

    def ask() -> None:
        seen.append("forward" in lm.__dict__)
        asked.ask()

    plain, cut, last = alternate(tiny_shape.model, ask, llava_prune.build("random", tokens=16), 2, 1)
    assert seen == [False, True] * 3 and len(plain) == len(cut) == 2
    assert last.tokens_in.tolist() == [[16] * 4] and "forward" not in lm.__dict__
    assert all(x["vision"] > 0 and x["prefill"] > 0 for x in (*plain, *cut))


def test_budgets_are_checked_before_the_first_measurement(tmp_path: Path) -> None:
    said: list[str] = []
    given = Settings(shape="tiny", methods=("random", "fastv"), tokens=(64,), out=str(tmp_path))
    with pytest.raises(ValueError, match="^fastv-64: tokens=64: .* give at least 145"):
        speed(given, said.append)
    with pytest.raises(ValueError, match="TOKENS=600: an image has 576 visual tokens"):
        speed(dataclasses.replace(given, tokens=(600,)), said.append)
    assert said == ["loading tiny"] * 2


def test_a_single_new_token_is_no_decoding(tiny_shape: Any) -> None:
    from llava_prune.bench.latency import once

    asked = request(tiny_shape, 1, 8, 2)
    with probing(tiny_shape.model) as probe, pytest.raises(ValueError, match="at least 2 new tokens"):
        once(asked.prefill, probe)


def test_anyres_requests() -> None:
    """Five crops: 576 tokens of the whole image, and 48 rows of 48 tokens with a newline each."""
    loaded = shapes.random_model("next-tiny")
    asked = request(loaded, 1, 8, 2)
    assert asked.visual == 576 + 48 * 49
    with llava_prune.pruned(loaded.model, "autoprune", tokens=320) as handle:
        asked.prefill()
    assert handle.last.tokens_in[0, 0] == asked.visual and handle.last.tokens_out[0, 0] == 800


def test_quartiles_and_ratios() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"q1": 2.0, "median": 3.0, "q3": 4.0}
    assert quartiles([7.0]) == {"q1": 7.0, "median": 7.0, "q3": 7.0}
    names = ("vision", "prefill", "decode", "total")
    pairs = stages([dict.fromkeys(names, 6.0)] * 2, [dict.fromkeys(names, 2.0), dict.fromkeys(names, 3.0)])
    assert pairs["decode"]["speedup"] == {"q1": 2.25, "median": 2.5, "q3": 2.75}


def test_floors_by_hand() -> None:
    """One layer of width 2 with an MLP of 3 (34 weights), 10 and 5 tokens, 4 bytes a value."""
    size = Size(1, 2, 3, 8)
    causal = 4 * 10 * 4 + 100 * 2 + 3 * 10 * 6 + 4 * 5 * 4 + 25 * 2 + 3 * 5 * 6
    traffic = 4 * (34 + 2 * 15 * 2)
    fast, wide = Machine(100.0, 1e12), Machine(1e12, 100.0)
    assert prefill_floor([[10], [5]], size, 4, fast) == pytest.approx(1000 * 2 * causal / 100)
    assert prefill_floor([[10], [5]], size, 4, wide) == pytest.approx(1000 * traffic / 100)
    assert decode_floor([[10], [5]], size, 4, wide) == pytest.approx(1000 * traffic / 100)


def test_peak_counts_what_lives_at_once() -> None:
    gauge = Peak(torch.device("cpu"))
    kept = torch.zeros(1000, 1000)
    gauge.start()
    for _ in range(3):
        kept = torch.zeros(1000, 1000) + 1  # two of 4 MB at once
    gauge.stop()
    assert kept.shape and 8_000_000 <= gauge.bytes < 12_100_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new": 1}, "new=1"),
        ({"repeats": 0}, "repeats=0"),
        ({"warmup": -1}, "warmup=-1: must be a non-negative integer"),
        ({"seed": 2**64}, "seed=18446744073709551616: must be an integer in"),
        ({"shape": "70b"}, "70b"),
        ({"methods": ("nothing",)}, "nothing"),
        ({"method_args": {"nothing": 1}}, "nothing"),
        ({"texts": (1,)}, "text=1"),
        ({"graphs": True}, "graphs=True needs a CUDA device"),
        ({"text_step": 16}, "text_step=16"),
    ],
)
def test_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(Settings(shape="tiny", out=str(tmp_path / "out")), **change)
    with pytest.raises(ValueError, match=message):
        speed(settings)
    assert not (tmp_path / "out").exists()
