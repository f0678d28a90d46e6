"""Downloads from a local server: whole, resumed, refused."""

from __future__ import annotations

import dataclasses
import errno
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from llava_prune.eval.data import PART, download, fetch
from llava_prune.eval.task import Kind, load_task

CONTENT = bytes(range(256)) * 40


def archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as handle:
        handle.writestr("v/a.jpg", b"image")
    return out.getvalue()


class Handler(BaseHTTPRequestHandler):
    asked: list[str | None] = []

    def do_GET(self) -> None:
        body = {"/file.json": CONTENT, "/plain.json": CONTENT, "/v.zip": archive(), "/broken.zip": b"PK"}.get(self.path)
        if body is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.path != "/plain.json" else 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.asked = []
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.mark.parametrize(("have", "name"), [(0, "file"), (1000, "file"), (len(CONTENT), "file"), (1000, "plain")])
def test_fetch_resumes(server: str, tmp_path: Path, have: int, name: str) -> None:
    to = tmp_path / "in" / "f.json"
    to.parent.mkdir()
    if have:
        to.with_name(to.name + PART).write_bytes(CONTENT[:have])
    seen: list[tuple[int, int | None]] = []
    fetch(f"{server}/{name}.json", to, lambda *p: seen.append(p))
    assert to.read_bytes() == CONTENT and not to.with_name(to.name + PART).exists()
    assert Handler.asked[:1] == [f"bytes={have}-" if have else None]
    assert have == len(CONTENT) or seen[-1] == (len(CONTENT), len(CONTENT))


def test_fetch_failures_have_a_message(server: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the server answered 404"):
        fetch(f"{server}/none", tmp_path / "f")
    with pytest.raises(ValueError, match="0 bytes are kept, run the same command to resume"):
        fetch("http://127.0.0.1:9/file.json", tmp_path / "f")


def test_only_what_is_missing_is_fetched(server: str, tmp_path: Path) -> None:
    kinds = {
        "questions": Kind(["q.jsonl"]),
        "annotations": Kind(["a.json"], get=[{"url": f"{server}/file.json", "to": "a.json"}]),
        "images": Kind(["v"], folder=True, get=[{"url": f"{server}/v.zip", "unzip": "."}]),
    }
    task = dataclasses.replace(load_task("gqa"), files=kinds)
    (tmp_path / "gqa").mkdir()
    assert download(task, tmp_path, lambda *_: None) == (["annotations", "images"], ["questions"])
    assert (tmp_path / "gqa" / "v" / "a.jpg").read_bytes() == b"image"
    assert download(task, tmp_path, lambda *_: None) == ([], ["questions"]) and len(Handler.asked) == 2
    kinds["more"] = Kind(["m"], get=[{"url": f"{server}/broken.zip", "unzip": "."}])
    with pytest.raises(ValueError, match="broken archive"):
        download(task, tmp_path, lambda *_: None)


@pytest.mark.parametrize("name", ["gqa", "mine"])
def test_the_benchmarks_own_folder(server: str, tmp_path: Path, name: str) -> None:
    kinds = {
        "questions": Kind(["q.jsonl"]),
        "annotations": Kind(["a.json"], get=[{"url": f"{server}/file.json", "to": "a.json"}]),
    }
    task = dataclasses.replace(load_task("gqa"), files=kinds)
    (tmp_path / name).mkdir()
    if name == "mine":
        (tmp_path / name / "q.jsonl").write_text("{}")
    download(task, tmp_path / name, lambda *_: None)
    assert (tmp_path / name / "a.json").is_file() and not (tmp_path / name / "gqa").exists()


def test_unpacking_that_was_interrupted_is_repeated(server: str, tmp_path: Path, monkeypatch: Any) -> None:
    kinds = {"images": Kind(["v"], folder=True, get=[{"url": f"{server}/v.zip", "unzip": "."}])}
    task = dataclasses.replace(load_task("gqa"), files=kinds)

    def full(self: zipfile.ZipFile, folder: Path) -> None:
        (folder / "v").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(zipfile.ZipFile, "extractall", full)
        download(task, tmp_path, lambda *_: None)
    assert download(task, tmp_path, lambda *_: None) == (["images"], [])
    assert (tmp_path / "gqa" / "v" / "a.jpg").read_bytes() == b"image" and len(Handler.asked) == 1
    assert download(task, tmp_path, lambda *_: None) == ([], [])
