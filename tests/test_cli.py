"""The command line: flags, hyper-parameters and messages."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

import llava_prune
from llava_prune import arguments
from llava_prune.arguments import parse_args
from llava_prune.cli import _parser, main
from llava_prune.methods.registry import build

ENV: dict[str, str] = {}


def usage_error(capsys: Any, *argv: str) -> str:
    """The last line of a usage error."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().split("\n")[-1]


def test_version(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"llava-prune {llava_prune.__version__}\n"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        (" , ", {}),
        ("lam=0.3", {"lam": 0.3}),
        ("mi_scale=8, budget=after,strict=false,", {"mi_scale": 8, "budget": "after", "strict": False}),
        ("layers=[8,16,24],ratios=[0.5, 0.25],k=1", {"layers": [8, 16, 24], "ratios": [0.5, 0.25], "k": 1}),
        ("layers=(8,16,24)", {"layers": [8, 16, 24]}),
        ("slope_step=1e-9,x0=null", {"slope_step": 1e-9, "x0": None}),
    ],
)
def test_values(text: str, values: dict[str, Any]) -> None:
    assert parse_args(text) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lam=0,0.3", "'lam=0,0.3': one value is taken for each hyper-parameter; run the command once for each value"),
        ("k0=1,layers=8,16,24", r"'layers=8,16': one value .* or write a sequence in brackets, as layers=\[8,16\]"),
        ("lam=0,lam=0.3", "lam is given twice"),
        ("mi_scale", "'mi_scale' is not a hyper-parameter; write name=value"),
        ("0.3,lam=0", "'0.3' is not a hyper-parameter"),
        ("two words=1", "is not a hyper-parameter"),
        ("lam=", "'lam=' has no value; write lam=null"),
        ("layers=[8,16", "the brackets do not match"),
        ("layers=8]", "the brackets do not match"),
        ("lam={a: b: c}", "the value cannot be read"),
    ],
)
def test_refused_values(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_args(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [["eval", "gqa"], ["bench"], ["run"]],
)
def test_one_spelling_in_all_commands(argv: list[str], capsys: Any) -> None:
    """--method-args may be repeated; lists of values and repeated names are refused in one line."""
    parsed = _parser(ENV).parse_args([*argv, "--method-args", "lam=0,k0=0.1", "--method-args", "gamma=0.5"])
    assert parsed.method_args == {"lam": 0, "k0": 0.1, "gamma": 0.5}
    assert _parser(ENV).parse_args(argv).method_args == {}
    assert "one value is taken" in usage_error(capsys, *argv, "--method-args", "lam=0,0.3")
    assert "lam is given twice" in usage_error(capsys, *argv, "--method-args", "lam=0", "--method-args", "lam=1")


def test_run_keeps_its_old_spelling() -> None:
    parsed = _parser(ENV).parse_args(["run", "--hyper", "lam=0", "--hyper", "k0=0.1", "--", "python", "-m", "llava.x"])
    assert parsed.method_args == {"lam": 0, "k0": 0.1}
    assert parsed.program == ["--", "python", "-m", "llava.x"]


def test_the_environment_sets_hyper_parameters() -> None:
    """A flag replaces METHOD_ARGS, as with every other setting."""
    parser = _parser({"METHOD_ARGS": "lam=0"})
    assert parser.parse_args(["eval", "gqa"]).method_args == {"lam": 0}
    assert parser.parse_args(["bench", "--method-args", "k0=0.1"]).method_args == {"k0": 0.1}


def test_sequences_reach_the_method() -> None:
    method = build("pdrop", **parse_args("layers=[1,2],ratios=[0.5,0.25]"))
    assert tuple(method.hyper()["layers"]) == (1, 2)


def test_run_refuses_before_loading(capsys: Any) -> None:
    pytest.importorskip("llava")
    program = ["--", "python", "-m", "llava.eval.run_llava"]
    assert main(["run", "--method-args", "nosuch=1", *program]) == 1
    assert "has no hyper-parameter nosuch; it has" in " ".join(capsys.readouterr().err.split())
    assert main(["run"]) == 1
    assert "no program given" in capsys.readouterr().err


def test_bench_takes_presets(tmp_path: Any, capsys: Any) -> None:
    """As eval: fastv:paper has no budget, fastv:192 its own."""
    argv = ["bench", "--shape", "tiny", "--method", "fastv:paper,fastv:192", "--tokens", "64", "--text", "20", "--json"]
    argv += ["--new", "2", "--repeats", "1", "--warmup", "0", "--no-memory", "--out", str(tmp_path)]
    assert main(argv) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["label"], r["tokens"]) for r in rows] == [("fastv-paper", None), ("fastv-192-192", 192)]
    assert main(["bench", "--shape", "tiny", "--method", "fastv", "--method-args", "nosuch=1"]) == 1
    assert "hyper-parameter nosuch; known are keep, layer" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_integers(text: str) -> None:
    for kind in (arguments.positive, arguments.counts):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a positive integer"):
            kind(text)


def test_lists() -> None:
    assert arguments.counts("192, 128,64") == [192, 128, 64] and arguments.floats("0,0.1") == [0, 0.1]
    assert arguments.batch("auto") is None and arguments.batch("8") == 8
    with pytest.raises(argparse.ArgumentTypeError, match="must be a number"):
        arguments.floats("a")
    with pytest.raises(argparse.ArgumentTypeError, match="give a name"):
        arguments.names(" , ")
