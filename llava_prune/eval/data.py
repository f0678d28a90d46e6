"""The files of a benchmark: find them, identify known releases, and download missing ones."""

from __future__ import annotations

import contextlib
import functools
import http.client
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .task import Kind, Question, Sources, Task, check_labels, load_task, questions_of

CHUNK = 1 << 20
PART = ".part"
"""Suffix of an incomplete download, which the next call resumes."""
UNPACKING = ".unpacking"
"""Suffix of the mark of an archive that is not unpacked completely."""
TIMEOUT = 60
"""Seconds without data after which a download fails."""


def size_of(path: Path, pattern: str = "") -> tuple[int, int]:
    """Return (number of files, bytes) of a file, or of all files below a folder.

    With a pattern, only the matching files directly in the folder count.
    """
    files = path.glob(pattern) if pattern else path.rglob("*") if path.is_dir() else [path]
    sizes = [p.stat().st_size for p in files if p.is_file()]
    return len(sizes), sum(sizes)


def inspect(name: str, data: Path) -> dict[str, Any]:
    """Report on the files of a benchmark.

    Args:
        name: benchmark.
        data: folder with the folders of the benchmarks, or the benchmark's own folder.

    Returns:
        bench, complete (whether the benchmark can be evaluated), problems (messages), and files: a list with the kind,
        path, optional, files, bytes, rows, expected, version, source, url and direct (whether it can be downloaded) of
        each.
    """
    task = load_task(name)
    sources = Sources(task, data)
    problems: list[str] = []
    questions: list[Question] = []
    with _noting(problems):
        if sources.find("questions"):
            questions = questions_of(sources)
    with _noting(problems):
        if all(sources.find(k) for k, spec in task.files.items() if not spec.optional and k != "images"):
            labels = task.scorer.load_labels(sources)
            absent = task.scorer.unknown(labels, questions)
            if absent:
                problems.append(f"{len(absent)} of {len(questions)} questions have no label, e.g. {absent[0]}")
            elif questions:
                check_labels(task, labels, questions)
    files = [_file(kind, spec, sources, questions, problems) for kind, spec in task.files.items()]
    complete = not problems and all(f["path"] or f["optional"] for f in files)
    return {"bench": name, "complete": complete, "problems": problems, "files": files}


@contextlib.contextmanager
def _noting(problems: list[str]) -> Any:
    """Append the message of a ValueError in the block to `problems` instead of raising it."""
    try:
        yield
    except ValueError as error:
        problems.append(str(error))


def _file(kind: str, spec: Kind, sources: Sources, questions: list[Question], problems: list[str]) -> dict[str, Any]:
    """Return the entry of one kind of file for `inspect`; add its problems to `problems`."""
    path = sources.find(kind)
    facts = [v for k, v in sources.versions.items() if sources.kinds[k] == kind]
    out: dict[str, Any] = {
        "kind": kind,
        "path": None if path is None else str(path),
        "optional": spec.optional,
        "files": None,
        "bytes": None,
        "rows": sum(f.get("rows", 0) for f in facts) or None,
        "expected": sorted({k["rows"] for k in spec.known if "rows" in k}) if not spec.folder else spec.rows,
        "version": ", ".join(sorted({f["version"] or "unknown release" for f in facts})) or None,
        "source": spec.source,
        "url": spec.url,
        "direct": bool(spec.get),
    }
    if path is not None:
        out["files"], out["bytes"] = size_of(path, spec.holds)
    if path is not None and kind == "images":
        named = {q.image for q in questions if q.image is not None}
        missing = sorted(n for n in named if not (path / n).is_file())
        out["rows"] = len(named) - len(missing)
        if missing:
            problems.append(f"{len(missing)} of {len(named)} images are missing in {path}, e.g. {missing[0]}")
    return out


def fetch(url: str, to: Path, progress: Callable[[int, int | None], None] = lambda *_: None) -> Path:
    """Download a file. An interrupted download, `<to>.part`, resumes.

    Args:
        url: http or https.
        to: file to write.
        progress: called with (bytes so far, total bytes or None).

    Returns:
        The path of the file.

    Raises:
        ValueError: if the server refuses or the connection fails; the bytes received so far are kept.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(to.name + PART)
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    total: int | None = None
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if have and answer.status != 206:  # the server sends the whole file
                have = 0
            length = answer.headers.get("Content-Length")
            total = None if length is None else have + int(length)
            with open(part, "ab" if have else "wb") as handle:
                while block := answer.read(CHUNK):
                    handle.write(block)
                    have += len(block)
                    progress(have, total)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the file is complete
            raise ValueError(f"{url}: the server answered {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise ValueError(f"{url}: {error}; {have} bytes are kept, run the same command to resume") from error
    if total is not None and have < total:
        raise ValueError(f"{url}: ended after {have} of {total} bytes; run the same command to resume")
    part.replace(to)
    return to


def download(task: Task, data: Path, progress: Callable[[str, int, int | None], None]) -> tuple[list[str], list[str]]:
    """Download the missing files that have a direct address.

    Args:
        task: benchmark.
        data: folder with the folders of the benchmarks, or the benchmark's own folder.
        progress: called with (url, bytes so far, total bytes or None).

    Returns:
        (kinds that were downloaded, kinds that can only be fetched by hand from a web page).

    Raises:
        ValueError: if a download fails; the next call resumes it. An archive whose unpacking was interrupted is
            unpacked again.
    """
    sources = Sources(task, data)
    base = _base(sources, data)
    done, by_hand = [], []
    for kind, spec in task.files.items():
        files = [base / item.get("to", f"downloads/{item['url'].rsplit('/', 1)[-1]}") for item in spec.get]
        if sources.find(kind) is not None and not any(to.exists() and _mark(to).exists() for to in files):
            continue
        if not spec.get:
            by_hand.append(kind)
            continue
        for item, to in zip(spec.get, files, strict=True):
            if not to.exists():
                fetch(item["url"], to, functools.partial(progress, item["url"]))
            if "unzip" in item:
                _unzip(to, base / item["unzip"])
        done.append(kind)
    return done, by_hand


def _base(sources: Sources, data: Path) -> Path:
    """Return the folder of a benchmark: one below `data`, or `data` if it has the benchmark's name or some file."""
    files = [place for spec in sources.task.files.values() if not spec.folder for place in spec.places]
    own = data.resolve().name in sources.task.folders or any((data / place).is_file() for place in files)
    below = next((b for b in sources.bases[:-1] if b.is_dir()), None)
    return below or (data if own else sources.bases[0])


def _mark(archive: Path) -> Path:
    """Return the path of an empty file that exists while an archive is unpacked, also after an interruption."""
    return archive.with_name(archive.name + UNPACKING)


def _unzip(path: Path, folder: Path) -> None:
    _mark(path).touch()
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is a broken archive ({error}); delete it and run the command again") from error
    _mark(path).unlink()
