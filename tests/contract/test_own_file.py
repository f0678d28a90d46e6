"""A method in its own file, with no other file changed: in the package's folder of methods, or named to a command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_prune
import llava_prune.methods
from llava_prune import ScoreMethod
from llava_prune.cli import main
from llava_prune.methods.registry import from_file
from tests import models

pytestmark = pytest.mark.usefixtures("clean_registry")
MINE = """
from dataclasses import dataclass

from llava_prune import Cut, Method, MethodInfo, View, register


@register("mine", presets={"few": {"tokens": 3}})
@dataclass(frozen=True)
class Mine(Method):
    "Keep the first visual tokens after two layers."

    tokens: int = 8

    info = MethodInfo(paper="ours", where="language model, after two layers", source="ours", licence="-")

    def prune(self, layer: int, view: View) -> Cut | None:
        keep = self.keep_after(layer, view.spans)
        return None if keep is None else view.keep_top(-view.ids.float(), keep)

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [n_visual] * 2 + [min(self.tokens, n_visual)] * (n_layers - 2)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    return path


def test_a_file_in_the_folder_of_methods(file: Path, tiny: Any, logits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the folder of methods is found by its name, in both families, alone and in a composition."""
    monkeypatch.setattr(llava_prune.methods, "__path__", [*llava_prune.methods.__path__, str(file.parent)])
    try:
        assert "mine" in llava_prune.names() and "mine:few" in llava_prune.names(presets=True)
        given = models.inputs(tiny, [models.prompt(5, 7), models.prompt(4, 9, seed=1)], models.pixels(2))
        base = logits(tiny, given)
        with llava_prune.pruned(tiny, "mine", tokens=12, check=True) as handle:
            out = models.generate(tiny, given, 3)
            assert handle.last.tokens_in.tolist() == [[36, 36, 12, 12, 12, 12]] * 2
            assert handle.last.kept[-1].tolist() == [list(range(12))] * 2
        assert not torch.equal(out.logits[0], base) and torch.equal(logits(tiny, given), base)
        with llava_prune.pruned(tiny, "mine", tokens=36):
            assert torch.equal(logits(tiny, given), base)
        with llava_prune.pruned(tiny, "fastervlm+mine:few", vision_tokens=20) as handle:
            logits(tiny, given)
            assert handle.last.tokens_in.tolist() == [[20, 20, 3, 3, 3, 3]] * 2
    finally:
        sys.modules.pop("llava_prune.methods.mine", None)
        llava_prune.methods.__dict__.pop("mine", None)


def test_methods_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = f"{file}:mine:few,{file},fastervlm+mine"
    assert main(["methods", "--method", names, "--tokens", "96,64", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["name"], r["tokens"]) for r in rows] == [
        ("mine:few", 3), ("mine", 96), ("mine", 64), ("fastervlm+mine", 96), ("fastervlm+mine", 64)
    ]  # fmt: skip
    assert rows[2]["entering"] == [576] * 2 + [64] * 30 and rows[4]["entering"] == [160] * 2 + [64] * 30
    assert rows[1]["about"] == "Keep the first visual tokens after two layers."


def test_eval_command(
    file: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """METHOD=file.py:name selects the method, as the scripts pass it."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("METHOD", f"{file}:mine")
    argv = ["eval", "gqa", "--limit", "2", "--tokens", "50", "--out", str(tmp_path / "out"), "--no-reference", "--json"]
    assert main(argv) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert (result["method"], result["budget"]) == ("mine", 50)
    answers = (tmp_path / "out" / "mine-50" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == 2 and all(json.loads(a)["kept"]["entering"][-1] == 50 for a in answers)


@pytest.mark.parametrize(
    ("text", "named", "message"),
    [
        (None, "", "cannot be read (No such file or directory)"),
        ("import nothing_of_that_name", "", "could not be run: ModuleNotFoundError"),
        ("x = 1", "", "registers no method"),
        (MINE, ":yours", "registers mine; write"),
        (MINE + MINE.replace("mine", "mine2").replace("Mine", "Mine2"), "", "registers mine, mine2; write"),
    ],
)
def test_files_that_do_not_work(
    text: str | None, named: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["methods", "--method", f"{path}{named}"])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_that_fails_registers_nothing(tmp_path: Path) -> None:
    path, known = tmp_path / "half.py", llava_prune.names(presets=True)
    path.write_text(MINE + "\nraise RuntimeError('later')\n", encoding="utf-8")
    with pytest.raises(ValueError, match="could not be run: RuntimeError: later"):
        from_file(path)
    assert llava_prune.names(presets=True) == known


def schedule(*counts: float) -> Any:
    """Return a `plan` whose layers after the second one keep these counts."""
    return lambda self, n, layers: [n] * 2 + [counts[min(i, len(counts) - 1)] for i in range(layers - 2)]


def last_row(view: Any) -> Any:
    """Return (B, L) attention of the last position, mean over heads."""
    return view.attention.mean((1, 2))


@pytest.mark.parametrize(
    ("defined", "message"),
    [
        ({"scores": lambda self, i, view: last_row(view)[:1]}, r"scores of shape \(1, 45\): must be .* \(2, 45\)"),
        ({"scores": lambda self, i, view: last_row(view)[0]}, r"scores of shape \(45,\): must be .* \(2, 45\)"),
        ({"scores": lambda self, i, view: view.attention.mean(1)}, r"scores of shape \(2, 1, 45\): must be"),
        ({"scores": lambda self, i, view: None}, "scores of type NoneType: must be a tensor"),
        ({"plan": schedule(40)}, r"plan\(36, 6\) is \[36, 36, 40, 40, 40, 40\]; must be 6 integers"),
        ({"plan": schedule(4, 4, 9)}, r"plan\(36, 6\) is .*; must be 6 integers"),
        ({"plan": schedule(-1)}, r"plan\(36, 6\) is .*; must be 6 integers"),
        ({"plan": schedule(9.5)}, r"plan\(36, 6\) is .*; must be 6 integers"),
        ({"plan": lambda self, n, layers: [n] * 2 + [9]}, r"plan\(36, 6\) is .*; must be 6 integers"),
        ({"plan": lambda self, n, layers: [64] * layers}, r"plan\(36, 6\) is .*; must be 6 integers"),
        ({"plan": lambda self, n, layers: 9}, r"plan\(36, 6\) is 9; must be 6 integers"),
        ({"plan": llava_prune.Method.plan}, r"keeps every token: define plan\(\)"),
        ({"scores": ScoreMethod.scores}, r"keeps every token: define scores\(\) or vision_scores\(\)"),
    ],
)
def test_mistakes_in_a_score_or_a_schedule(defined: dict[str, Any], message: str, tiny: Any, logits: Any) -> None:
    """Counts and shapes that do not fit are refused; they would drop text, or rank a batch by its first sample."""
    usual = {"scores": lambda self, i, view: last_row(view), "plan": schedule(9)}
    given = models.inputs(tiny, [models.prompt(4, 5), models.prompt(6, 3)], models.pixels(2))
    with llava_prune.pruned(tiny, type("Mine", (ScoreMethod,), usual)()) as handle:
        logits(tiny, given)
        assert handle.last.tokens_out[:, -1].tolist() == [9, 9]
    mine = type("Mine", (ScoreMethod,), usual | defined)()
    with pytest.raises(ValueError, match=message), llava_prune.pruned(tiny, mine):
        logits(tiny, given)
    if r"plan\(36, 6\)" in message:  # tables do not show such counts either
        with pytest.raises(ValueError, match=message):
            mine.example(36, 6)


@pytest.mark.parametrize(
    ("defined", "message"),
    [
        (
            {"vision_scores": lambda self, view: view.features[:1, :, 0]},
            r"scores of shape \(1, 36\): must be .* \(2, 36\)",
        ),
        ({"vision_scores": lambda self, view: view.features}, r"scores of shape \(2, 36, 64\): must be"),
        ({"vision_scores": lambda self, view: view.class_attention()}, "class_attention.. with 0 recorded blocks"),
    ],
)
def test_mistakes_in_scores_of_patches(defined: dict[str, Any], message: str, tiny: Any, logits: Any) -> None:
    given = models.inputs(tiny, [models.prompt(4, 5), models.prompt(6, 3)], models.pixels(2))
    mine = type("Mine", (ScoreMethod,), {"tokens": 9} | defined)()
    with pytest.raises(ValueError, match=message), llava_prune.pruned(tiny, mine):
        logits(tiny, given)
