"""Thumbnails of the images of finished runs, for reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_prune.cli import main
from llava_prune.eval import run
from llava_prune.eval.run_images import thumbnails
from llava_prune.report.store import find_run
from llava_prune.report.thumbnails import unpack_layers
from tests.eval.test_run import data, rows, settings  # noqa: F401


def test_thumbnails_of_a_run(data: Path, tmp_path: Path, stand_in: Any, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    stand_in()
    run.evaluate(settings(data, tmp_path / "out", methods=("autoprune",)))
    found = find_run("autoprune-4", [tmp_path / "out"])
    assert [list(unpack_layers(r["kept"]["patches"])) for r in rows(found.folder)] == [[8] * 4] * 7
    first, last = thumbnails(found, [0, 5], 3)
    assert first is not None and last is not None
    assert first.image.size == (3, 2) and first.image.getpixel((0, 0)) == (0, 0, 0)
    assert last.image.getpixel((0, 0)) == (40, 40, 40)
    ((start, boxes),) = first.views  # 6 x 4 pixels, padded to 6 x 6: the first and the last row of patches are cut off
    assert start == 0 and len(boxes) == 16 and boxes[0] == (0, 0, 0.75, 0.25) and boxes[5] == (0.75, 0.25, 1.5, 1)
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().err == "" and "data:image/jpeg" in (tmp_path / "page.html").read_text()
    (data / "gqa" / "data" / "images" / "n1.png").unlink()
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]) == 0
    error = capsys.readouterr().err
    assert error.startswith("no images of GQA: ") and "n1.png" in error and error.count("\n") == 1
    assert main(["report", str(tmp_path / "out"), "--images", "0", "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().err == "" and "data:image/jpeg" not in (tmp_path / "page.html").read_text()
