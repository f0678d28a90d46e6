"""Benchmarks, each defined by a YAML file and a scorer module in tasks/, and the places of their files."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from .images import open_rgb
from .prompt import IMAGE_MARK
from .reading import read_answers, read_jsonl, shown

FOLDER = Path(__file__).parent / "tasks"
WORKERS = 4
"""Number of threads that decode images; each holds one image."""
QuestionScores = list[tuple[float | None, str | None]]
"""(score, type) of each answer row: a score in 0..1 or None for a row that does not count, and a group of questions."""


@dataclass(frozen=True)
class Kind:
    """A kind of file of a benchmark.

    Attributes:
        places: paths below the benchmark's folder, in order of preference.
        folder: whether the places are folders.
        holds: pattern of which a folder must contain a file to be found.
        optional: whether evaluation and scoring work without it.
        rows: expected number of rows, or of files in a folder.
        source: publisher.
        url: web page where it is published.
        get: direct downloads, each with "url" and "to" (a file) or "unzip" (a folder).
        known: known releases, identified by md5, rows and other figures.
    """

    places: list[str]
    folder: bool = False
    holds: str = ""
    optional: bool = False
    rows: int | None = None
    source: str = ""
    url: str = ""
    get: list[dict[str, str]] = field(default_factory=list)
    known: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: stem of its YAML file.
        title: heading in tables.
        figure: name of the headline figure.
        suffix: instruction line of every question.
        add_suffix: whether the suffix is appended to the questions (False if the question file contains it).
        max_new_tokens: largest number of new tokens of an answer.
        folders: possible names of its folder under DATA.
        files: kind -> its files.
        columns: heading -> dotted path into the details, for the table of results; a path that ends in "%" refers to a
            share, which is shown in percent.
        method_args: hyper-parameters that the benchmark's official runner sets, for every method that has them.
        scorer: module with load_labels, unknown and score, and optionally export, read_answers, read_questions and
            units (see `resample`).
    """

    name: str
    title: str
    figure: str
    suffix: str
    add_suffix: bool
    max_new_tokens: int
    folders: list[str]
    files: dict[str, Kind]
    columns: dict[str, str]
    method_args: dict[str, Any]
    scorer: ModuleType

    def notes(self, results: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return notes on the hyper-parameters of results that are set by the benchmark's official runner."""
        hyper = [r["settings"]["hyper"] for r in results]
        used = [k for k, v in self.method_args.items() if any(k in h and h[k] == v for h in hyper)]
        return [f"{k}={self.method_args[k]}, as in the official runner of this benchmark" for k in used]

    def complete(self, text: str) -> str:
        """Return the text of a question with its instruction line."""
        return f"{text}\n{self.suffix}" if self.add_suffix else text


@dataclass(frozen=True)
class Question:
    """A question for the model.

    Attributes:
        id: id in the question file; not unique in every benchmark.
        image: name of its image (see `Sources.image`), or None.
        text: user text after the image line, instruction included.
        stored: prompt as stored in the answer file.
        extra: further fields of its answer row.
    """

    id: Any
    image: str | None
    text: str
    stored: str
    extra: Mapping[str, Any] = field(default_factory=dict)


class Sources:
    """The files of a benchmark, found below DATA or given individually.

    Attributes:
        versions: name of a file -> checksum, size, rows and release; see `note`.
        kinds: name of a file -> its kind.
        open_image: opens images that are not separate files; None if images are files.
        cache: values that a scorer keeps between calls.
    """

    def __init__(
        self, task: Task, data: Path | None, given: Mapping[str, Path | None] | None = None, inside: bool = False
    ) -> None:
        """Set the places to search; nothing is read yet.

        Args:
            task: the benchmark.
            data: folder with the folders of the benchmarks, or the benchmark's own folder.
            given: kind -> file that replaces the one in `data`.
            inside: whether `data` is searched as the benchmark's own folder first.
        """
        self.task, self.data = task, data
        self.given = {k: v for k, v in (given or {}).items() if v is not None}
        self.versions: dict[str, dict[str, Any]] = {}
        self.kinds: dict[str, str] = {}
        self.open_image: Callable[[str], Any] | None = None
        self.cache: dict[str, Any] = {}
        names = ["", *task.folders] if inside else [*task.folders, ""]
        self.bases = [] if data is None else [data / n for n in names]

    def places(self, kind: str) -> list[Path]:
        """Return all places where a kind of file may be."""
        return [base / place for base in self.bases for place in self.task.files[kind].places]

    def find(self, kind: str) -> Path | None:
        """Return the first existing place of a kind of file, or None.

        Raises:
            ValueError: if a given file does not exist.
        """
        spec = self.task.files[kind]
        if kind in self.given:
            path = self.given[kind]
            if not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path}: no such file")
            return path
        for place in self.places(kind):
            if place.is_dir() if spec.folder else place.is_file():
                if spec.holds and next(place.glob(spec.holds), None) is None:
                    continue
                return place
        return None

    def path(self, kind: str) -> Path:
        """Return the place of a required kind of file.

        Raises:
            ValueError: if DATA is not a folder or has none of the places.
        """
        found = self.find(kind)
        if found is not None:
            return found
        name = self.task.name
        if self.data is None:
            raise ValueError(f"no {kind} of {name}: give --data, the folder with the benchmark's files, or --{kind}")
        if not self.data.is_dir():
            raise ValueError(f"DATA={self.data}: no such folder; give the folder with {name}/ (DATA or --data)")
        looked = ", ".join(map(str, self.places(kind)))
        raise ValueError(f"no {kind} of {name}, looked for {looked}; set DATA to the folder that has them")

    def note(self, name: str, path: Path, kind: str, **figures: int) -> None:
        """Record checksum, size, rows and release of a file that the figure depends on."""
        self.kinds[name] = kind
        facts = file_version(path)
        md5 = facts.pop("md5")
        known = [k for k in self.task.files[kind].known if k.get("file", path.name) == path.name]
        same = [k for k in known if k.get("md5") == md5]
        alike = [k for k in known if "md5" not in k and all(k.get(f, n) == n for f, n in figures.items())]
        self.versions[name] = {**facts, **figures, "version": (same or alike or [{"version": None}])[0]["version"]}

    def image(self, name: str) -> Any:
        """Open the image of a question as RGB.

        Raises:
            ValueError: if it is not readable.
        """
        return self.open_image(name) if self.open_image else open_rgb(self.path("images") / name)

    def image_files(self, questions: Sequence[Question]) -> list[Path]:
        """Return the image files of questions without repeats, sorted by name; [] if images are cells of a table."""
        if self.open_image is not None:
            return []
        named = sorted({q.image for q in questions if q.image is not None})
        return [self.path("images") / name for name in named]


def task_names() -> list[str]:
    """Return the names of all benchmarks, sorted."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load_task(name: str) -> Task:
    """Load a benchmark by name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in task_names():
        raise ValueError(f"unknown benchmark {name!r}; known are {', '.join(task_names())}")
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    files = {k: Kind(**{("source" if f == "from" else f): v for f, v in s.items()}) for k, s in raw["files"].items()}
    return Task(
        name=name,
        title=raw["title"],
        figure=raw["figure"],
        suffix=raw["prompt"]["suffix"],
        add_suffix=raw["prompt"]["add"],
        max_new_tokens=raw["max_new_tokens"],
        folders=raw["folders"],
        files=files,
        columns=raw.get("columns", {}),
        method_args=raw.get("method_args", {}),
        scorer=importlib.import_module(f"llava_prune.eval.tasks.{raw['scorer']}"),
    )


def answers_of(task: Task, path: Path) -> list[dict[str, Any]]:
    """Read an answer file in LLaVA's format, or in another format of the benchmark.

    Raises:
        ValueError: naming file and row.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    return getattr(task.scorer, "read_answers", read_answers)(path)


def questions_of(sources: Sources) -> list[Question]:
    """Read the questions of a benchmark, in order.

    Raises:
        ValueError: naming file and row.
    """
    return getattr(sources.task.scorer, "read_questions", read_questions)(sources)


def read_questions(sources: Sources, unique: bool = True) -> list[Question]:
    """Read the questions of a JSON-lines file, in order.

    Args:
        sources: files of the benchmark; rows have question_id, text and usually image.
        unique: whether a repeated id is an error.

    Raises:
        ValueError: for broken rows, ids that are not str or int, or a repeated id.
    """
    path = sources.path("questions")
    out: list[Question] = []
    seen: set[str] = set()
    for number, row in enumerate(read_jsonl(path, ("question_id", "text")), 1):
        key, image, text = row["question_id"], row.get("image"), row["text"]
        if isinstance(key, bool) or not isinstance(key, (str, int)) or not isinstance(text, str):
            raise ValueError(f"{path}, row {number}: question_id must be a string or integer and text a string")
        if image is not None and not isinstance(image, str):
            raise ValueError(f"{path}, row {number}: image must be a path, found {image!r}")
        if unique and str(key) in seen:
            raise ValueError(f"{path}, row {number}: question_id {key!r} is repeated")
        seen.add(str(key))
        out.append(Question(key, image, sources.task.complete(text), sources.task.complete(text)))
    sources.note("questions", path, "questions", rows=len(out))
    return out


def place_of(number: int, question: Question, sources: Sources) -> str:
    """Return the place of a question for a message: file, row counted from 1, and id."""
    key = json.dumps(question.id)  # escapes characters that a terminal cannot show
    return f"{sources.path('questions')}, row {number} (question_id {key[:80]})"


def check_questions(questions: Sequence[Question], sources: Sources) -> None:
    """Refuse questions that cannot be part of a prompt.

    Raises:
        ValueError: naming file, row and id, for "<image>" in a text, or text that UTF-8 cannot encode.
    """
    for number, q in enumerate(questions, 1):
        if IMAGE_MARK in q.text:
            raise ValueError(
                f"{place_of(number, q, sources)}: the text contains {IMAGE_MARK!r}, which stands for an image in a "
                "prompt; remove it or write it differently"
            )
        try:
            json.dumps([q.id, q.text, q.stored, q.extra], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            letter = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(
                f"{place_of(number, q, sources)}: the text contains {letter}, half of a surrogate pair and not a "
                "character; fetch the file again"
            ) from error


def check_images(questions: Sequence[Question], sources: Sources) -> None:
    """Refuse questions whose images are missing.

    Raises:
        ValueError: with the number of missing files and the names of the first ten.
    """
    named = sorted({q.image for q in questions if q.image is not None})
    if sources.open_image is not None or not named:
        return
    folder = sources.path("images")
    missing = [n for n in named if not (folder / n).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(named)} images are missing in {folder}: {shown(missing)}; add them")


def check_labels(task: Task, labels: Any, questions: Sequence[Question]) -> None:
    """Score empty answers to the questions, so that files that do not belong together are found before any is asked.

    Raises:
        ValueError: see the scorer's `score`.
    """
    rows = [{"question_id": q.id, "prompt": q.stored, "text": ""} for q in questions]
    task.scorer.score(rows, labels, questions)


def open_images(questions: Sequence[Question], sources: Sources) -> None:
    """Decode every image once, in several threads, so that broken ones are found before anything is computed.

    Raises:
        ValueError: naming the image, and file, row and id of its first question.
    """
    first: dict[str, int] = {}
    for number, q in enumerate(questions, 1):
        if q.image is not None:
            first.setdefault(q.image, number)

    def problem(name: str) -> str | None:
        try:
            sources.image(name)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(WORKERS) as pool:
        for (_, number), message in zip(first.items(), pool.map(problem, first), strict=True):
            if message is not None:
                raise ValueError(f"{place_of(number, questions[number - 1], sources)}: {message}")


def file_version(path: Path) -> dict[str, Any]:
    """Return sha256, md5 and size in bytes of a data file, or of all text files below a folder."""
    sha, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    for part in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
        content = part.read_bytes()
        size += len(content)
        if path.is_dir():
            sha.update(f"{part.relative_to(path).as_posix()}:{len(content)};".encode())
        sha.update(content)
        md5.update(content)
    return {"file": path.name, "sha256": sha.hexdigest(), "bytes": size, "md5": md5.hexdigest()}
