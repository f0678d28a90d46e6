"""The command line: flags, hyper-parameters and messages."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

import llava_prune
from llava_prune import arguments
from llava_prune.arguments import parse_args
from llava_prune.cli import main
from llava_prune.methods.registry import build
from llava_prune.parsers import make_parser

ENV: dict[str, str] = {}


def usage_error(capsys: Any, *argv: str) -> str:
    """Run a command that must end with a usage error, and return the last line of its message."""
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
        ("lam=0,0.3", "'lam=0,0.3': one value is taken for each hyper-parameter; use llava-prune sweep"),
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
    parsed = make_parser(ENV).parse_args([*argv, "--method-args", "lam=0,k0=0.1", "--method-args", "gamma=0.5"])
    assert parsed.method_args == {"lam": 0, "k0": 0.1, "gamma": 0.5}
    assert make_parser(ENV).parse_args(argv).method_args == {}
    assert "one value is taken" in usage_error(capsys, *argv, "--method-args", "lam=0,0.3")
    assert "lam is given twice" in usage_error(capsys, *argv, "--method-args", "lam=0", "--method-args", "lam=1")


def test_run_keeps_its_old_spelling() -> None:
    parsed = make_parser(ENV).parse_args(
        ["run", "--hyper", "lam=0", "--hyper", "k0=0.1", "--", "python", "-m", "llava.x"]
    )
    assert parsed.method_args == {"lam": 0, "k0": 0.1}
    assert parsed.program == ["--", "python", "-m", "llava.x"]


def test_the_environment_sets_hyper_parameters() -> None:
    """METHOD_ARGS sets hyper-parameters, and the flag replaces it."""
    parser = make_parser({"METHOD_ARGS": "lam=0"})
    assert parser.parse_args(["eval", "gqa"]).method_args == {"lam": 0}
    assert parser.parse_args(["run"]).method_args == {"lam": 0}
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
    """As in eval, fastv:paper has no budget and fastv:192 has its own."""
    argv = ["bench", "--shape", "tiny", "--method", "fastv:paper,fastv:192", "--tokens", "64", "--text", "20", "--json"]
    argv += ["--new", "2", "--repeats", "1", "--warmup", "0", "--no-memory", "--out", str(tmp_path)]
    assert main(argv) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["label"], r["tokens"]) for r in rows] == [("fastv-paper", None), ("fastv-192-192", 192)]
    assert main(["bench", "--shape", "tiny", "--method", "fastv", "--method-args", "nosuch=1"]) == 1
    assert "hyper-parameter nosuch; known are keep, layer" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5", "many", "", "1_0", "\u0663", "\u00b2", "+5", "1e3", "0x10", "0" * 5000]
)
def test_refused_integers(text: str) -> None:
    for kind in (arguments.positive, arguments.counts, arguments.batch, arguments.any_length):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a positive integer") as caught:
            kind(text)
        assert len(str(caught.value)) < 200


def test_limits_of_integers() -> None:
    assert arguments.positive(str(arguments.MOST)) == arguments.MOST and arguments.positive(" 007 ") == 7
    assert arguments.positive("0" * 5000 + "8") == 8  # Python refuses to read so many digits
    for text in (str(arguments.MOST + 1), "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a positive integer, at most 1000000$"):
            arguments.positive(text)
    assert arguments.natural("0") == 0
    for text in ("-1", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a non-negative integer$"):
            arguments.natural(text)


def test_lists() -> None:
    assert arguments.counts("192, 128,64") == [192, 128, 64] and arguments.floats("0,0.1,.5,1e-3") == [
        0,
        0.1,
        0.5,
        1e-3,
    ]
    assert arguments.batch("auto") is None and arguments.batch("8") == 8
    with pytest.raises(argparse.ArgumentTypeError, match="'1_0': must be a positive integer; a list is written as"):
        arguments.counts("64,1_0")
    with pytest.raises(argparse.ArgumentTypeError, match="give a name"):
        arguments.names(" , ")


@pytest.mark.parametrize("text", ["a", "", "nan", "inf", "-1", "1e308", "1_0", "\u0663", "1e999", "0x1p3", "1000001"])
def test_refused_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be a number in \[0, 1e\+06\]"):
        arguments.floats(text)


def test_seeds() -> None:
    for value in (0, -1, -(2**63), 2**64 - 1):
        assert arguments.seed(f" {value} ") == value
    for text in (str(2**64), str(-(2**63) - 1), "1.5", "abc", "", "1_0", "\u0663", "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must be an integer in \[-9223372036854775808, 184467"):
            arguments.seed(text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "gqa", "--seed", str(2**64)], "the range of torch.manual_seed"),
        (["bench", "--seed", "1.5"], "the range of torch.manual_seed"),
        (["eval", "gqa", "--chunk-idx=-1"], "'-1': must be a non-negative integer"),
        (["bench", "--warmup=-1"], "'-1': must be a non-negative integer"),
        (["bench", "--new", "1"], "'1': must be an integer of at least 2"),
        (["bench", "--threads", "100000"], "must be a positive integer, at most 1024"),
        (["flops", "--slope=-1"], "'-1': must be a number in [0, 1e+06]"),
        (["flops", "--slope", ""], "'': must be a number"),
        (["flops", "--published", "101"], "'101': must be a number in [0, 100]"),
        (["flops", "--text=-1"], "'-1': must be a number in [0, 1e+06]"),
        (["methods", "--text", "nan"], "'nan': must be a number"),
        (["methods", "--hidden", "1" + "0" * 400], "must be a positive integer, at most 1000000"),
        (["flops", "--layers", "100000"], "must be a positive integer, at most 1000"),
        (["flops", "--visual", "0"], "must be a positive integer"),
        (["run", "--tokens", "1_0", "--", "python", "-m", "llava.x"], "must be a positive integer"),
    ],
)
def test_odd_numbers(argv: list[str], message: str, capsys: Any) -> None:
    assert message in usage_error(capsys, *argv)


@pytest.mark.parametrize("command", ["flops", "methods"])
def test_the_largest_sizes_give_finite_tables(command: str, capsys: Any) -> None:
    most = str(arguments.MOST)
    sizes = ["--layers", "1000", "--hidden", most, "--intermediate", most, "--visual", most, "--text", most]
    assert main([command, *sizes, "--tokens", "2,1000", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    shares = [r["percent_visual_only"] for r in rows if r["percent_visual_only"] is not None]
    assert shares and 0 <= min(shares) <= max(shares) <= 100.001


def test_a_budget_given_twice(capsys: Any, monkeypatch: Any) -> None:
    """A budget given both as --tokens and as a hyper-parameter is refused."""
    pytest.importorskip("llava")
    program = ["--", "python", "-m", "llava.eval.run_llava"]
    for tokens in ("3", "64"):
        for more in (["--method-args", f"tokens={tokens}"], []):
            if not more:
                monkeypatch.setenv("METHOD_ARGS", f"tokens={tokens}")
            assert main(["run", "--tokens", "64", *more, *program]) == 1
            monkeypatch.undo()
            said = " ".join(capsys.readouterr().err.split())
            assert "tokens is given twice, as --tokens 64 and in METHOD_ARGS" in said
    assert main(["bench", "--shape", "tiny", "--method-args", "tokens=3"]) == 1
    assert "METHOD_ARGS tokens=3: the budget has a flag of its own" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1_0", "1_0"),  # YAML: 10
        ("010", "010"),  # YAML: 8
        ("0x10", "0x10"),  # YAML: 16
        ("1:30", "1:30"),  # YAML: 90
        ("2020-01-01", "2020-01-01"),  # YAML: a date
        ("\u0663", "\u0663"),
        ("[1_0, 1e-3, .5]", ["1_0", 1e-3, 0.5]),
        ("1e5", 1e5),
        ("-7", -7),
        (".inf", float("inf")),
        ("off", False),
    ],
)
def test_hyper_parameters_are_written_in_plain_digits(text: str, value: Any) -> None:
    found = parse_args(f"lam={text}")["lam"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["!!int ''", "!!timestamp x", "[" * 2000 + "]" * 2000, "9" * 5000, "'", "*a", "\0"])
def test_values_that_yaml_cannot_read(text: str) -> None:
    with pytest.raises(ValueError, match="the value cannot be read; give a number") as caught:
        parse_args(f"lam={text}")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("autoprune:", "'autoprune:': no preset after the colon; write 'autoprune', or a preset after it"),
        ("full:", "'full:': no preset after the colon"),
        ("visionzip:+autoprune", "'visionzip:': no preset after the colon"),
        ("visionzip+autoprune:", "no preset after the colon"),
        ("autoprune:\u0663", "'autoprune' has no preset '\u0663'; it has"),
        ("autoprune:064", "'autoprune' has no preset '064'"),
        ("x" * 5000, "unknown method 'xxx"),
        ("fastv," + "a+" * 300, "unknown method 'a+a+"),
    ],
)
def test_names_of_methods(name: str, message: str, capsys: Any) -> None:
    assert main(["methods", "--method", name]) == 1
    said = capsys.readouterr().err
    assert message in said and len(said) < 600 and said.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("folder", "cannot be read (Is a directory)"),
        (r"raise OSError('two\nlines')", "could not be run: OSError: two lines"),
        ("raise SystemExit(0)", "could not be run: SystemExit: 0"),
        ("x = (", "could not be run: SyntaxError: '(' was never closed"),
    ],
)
def test_files_of_methods(content: str | None, message: str, tmp_path: Any, capsys: Any) -> None:
    path = tmp_path / "mine.py"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    said = usage_error(capsys, "methods", "--method", str(path))
    assert f"{path} {message}" in said and "Error: [Errno" not in said


def test_homes_that_do_not_exist(capsys: Any) -> None:
    assert "~nobody-of-this-name/x.py cannot be read" in usage_error(
        capsys, "run", "--method", "~nobody-of-this-name/x.py"
    )
