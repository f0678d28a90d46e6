"""`llava-prune show` on the miniature model."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llava_prune.cli import main

IMAGE = "playground/data/mini/gqa/data/images/n9000005.jpg"  # 252 x 189
QUESTION = "What color is the <card>?"


def show(root: Path, *more: str) -> int:
    given = ["--image", str(root / IMAGE), "--question", QUESTION, "--short", "--device", "cpu"]
    return main(["show", *given, "--model", str(root / "playground/models/llava-tiny"), *more])


def test_contact_sheet(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(root, "--out", str(tmp_path / "kept"), "--layers", "0,11", "--tokens", "32") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"unpruned: '.+' \(visual tokens 576 in, .*100\.0 % of unpruned\)", lines[0])
    assert re.fullmatch(r"autoprune-32: '.+' \(visual tokens 576 in, .* 32\.\d leaving a layer.*\)", lines[1])
    assert lines[2:] == [str(tmp_path / "kept.pdf"), str(tmp_path / "kept.png")]
    assert all(Path(p).stat().st_size > 10_000 for p in lines[2:])


def test_page(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kept.html"
    assert show(root, "--out", str(out), "--method", "fastv", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["files"] == [str(out)] and found["question"] == QUESTION
    unpruned, pruned = found["answers"]
    assert (unpruned["name"], pruned["name"]) == ("unpruned", "fastv-64") and pruned["percent"] < 30
    page = out.read_text(encoding="utf-8")
    assert "What color is the &lt;card&gt;?" in page and "<card>" not in page
    assert not re.search(r'(src|href)="(?!#|data:image/)|https?://|@import|url\((?!#)', page)  # works offline
    assert page.count("data:image/") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert [len(layer["kept"]) for layer in data["layers"]] == pruned["leaving"]
    assert len(data["views"][0]) == 576 and data["views"][0][0] is None  # padding above an image of 252 x 189
    assert data["views"][0][2 * 24] == [0, 0, 10.5, 0.5]  # 31 pixels of padding are almost three patches of 10.5
    encoded = re.search(r'id="clear"[^>]*base64,([^"]+)', page)
    assert encoded and base64.b64decode(encoded[1]).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "12"], "layer=12: the model has 12 decoder layers; give 0 to 11"),
        (["--method", "all"], "methods; give one"),
        (["--tokens", "577"], "TOKENS=577: an image has 576 visual tokens"),
        (["--question", "<image> and"], "without <image>"),
    ],
)
def test_refusals(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert show(root, "--out", str(tmp_path / "kept.png"), *more) == 1
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert not (tmp_path / "kept.png").exists()
