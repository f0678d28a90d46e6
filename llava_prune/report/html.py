"""`llava-prune report`: write finished runs as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..arguments import RESULTS
from ..console import number_text, stderr, stdout
from .accuracy import draw_accuracy_flops
from .figures import chosen
from .inline import drawn, svg
from .questions import columns
from .store import StoredRun
from .thumbnails import Images, with_images
from .together import bench_name, by_bench
from .tokens import draw_survival

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("report.js", "questions.js")
FIGURES = {
    "accuracy-flops": ("Figure against prefill FLOPs, with 95 % intervals", draw_accuracy_flops),
    "survival": ("Visual tokens entering each layer", draw_survival),
}
"""Name of a figure in `llava-prune figure` -> its caption, and the function that draws it."""
COLUMNS = {
    "Benchmark": "",
    "Run": "",
    "Metric": "",
    "Figure": "figure",
    "Difference to unpruned": "difference_to_full",
    "Tokens entering": "average_entering",
    "Tokens leaving": "average_leaving",
    "FLOPs %": "flops_percent.with_text_entering",
}
"""Heading in the table of runs -> the number in `StoredRun.row` by which the column is sorted; "" for text."""


def report(args: Namespace, images: Images) -> int:
    """Run `llava-prune report`: write the page and print its path.

    Args:
        args: places, task, method, model, tokens, no_sweeps, images and out, see `cli`.
        images: returns the images of questions.

    Returns:
        The exit status.

    Raises:
        ValueError: for no suitable runs, runs of several models, broken results, or if jinja2 is not installed.
    """
    runs = chosen(args, args.places or [RESULTS])
    out = Path(args.out).expanduser()
    text, left_out = page(runs, images, args.images)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(text.encode("utf-8", "replace"))  # answers may hold half of a surrogate pair
    for reason in left_out:
        stderr().print(reason, markup=False, highlight=False, soft_wrap=True)
    stdout().print(str(out), markup=False, highlight=False, soft_wrap=True)
    return 0


def page(runs: Sequence[StoredRun], images: Images, count: int) -> tuple[str, list[str]]:
    """Build the page of some runs.

    Args:
        runs: finished runs, see `together.comparable`.
        images: returns the images of questions.
        count: largest number of images of a benchmark.

    Returns:
        HTML, and sentences on the runs and images that are left out.

    Raises:
        ValueError: if jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ValueError("the report needs jinja2; pip install 'llava-prune[report]'") from error
    script = "".join(_source(name) for name in SCRIPTS)
    benches = by_bench(runs)
    data, left_out = [], []
    for some in benches.values():
        found, shown, reasons = columns(some)
        left_out += [f"not among the questions: {reason}" for reason in reasons]
        if found is not None:
            try:
                with_images(found, shown, images, count)
            except ValueError as error:
                left_out.append(f"no images of {found['title']}: {error}")
            data.append({"title": found["title"], "count": len(found["runs"]), "json": Markup(_embedded(found))})
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("report.html").render(
        model=runs[0].model,
        benches=[bench_name(b) for b in benches],
        columns=COLUMNS,
        runs=[_row(r) for r in runs],
        figures=[_figures(some, i) for i, some in enumerate(benches.values())],
        settings=_settings(benches),
        data=data,
        left_out=left_out,
        style=Markup(_source("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return text, left_out


def _source(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _embedded(value: Any) -> str:
    """Return JSON for a script element, escaped so that no text can end the element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


# the table of runs and the figures --------------------------------------------------------------------------------


def _row(run: StoredRun) -> dict[str, Any]:
    """Return the cells of a run; `numbers` has the sorting keys of its columns as text, "" for missing ones."""
    row = run.row()
    gap = run.result.get("difference_to_full")
    ends = None if gap is None or gap["low"] is None else (gap["low"], gap["high"])
    limit = run.result["settings"].get("limit")
    return {
        "folder": str(run.folder),
        "bench": bench_name(run.bench),
        "limit": "" if limit is None else f", first {limit}",
        "name": run.name,
        "metric": row["figure_name"],
        "figure": number_text(run.figure, 2),
        "interval": "" if run.interval is None else f"[{run.interval[0]:.1f}, {run.interval[1]:.1f}]",
        "difference": number_text(row["difference_to_full"], 2, sign=True, absent=""),
        "difference_interval": "" if ends is None else f"[{ends[0]:+.1f}, {ends[1]:+.1f}]",
        "excludes_0": ends is not None and (ends[0] > 0 or ends[1] < 0),
        "entering": number_text(row["average_entering"]),
        "leaving": number_text(row["average_leaving"]),
        "flops": number_text(run.flops_percent()),
        "numbers": {k: "" if row[k] is None else repr(row[k]) for k in COLUMNS.values() if k},
    }


def _figures(runs: Sequence[StoredRun], number: int) -> dict[str, Any]:
    """Return the figures of benchmark number `number` of the page."""
    from markupsafe import Markup

    title = bench_name(runs[0].bench)
    out = []
    for name, (caption, draw) in FIGURES.items():
        figure, remark = drawn(draw, runs)
        for axes in [] if figure is None else figure.axes:
            axes.set_title("")  # the page has a heading instead
        label = f"{title}: {caption[0].lower()}{caption[1:]}; the table of runs has the numbers"
        image = "" if figure is None else Markup(svg(figure, f"f{number}-{name}-", label))
        out.append({"name": name, "caption": caption, "svg": image, "remark": remark})
    return {"title": title, "figures": out}


# settings ---------------------------------------------------------------------------------------------------------


def _settings(benches: Mapping[str, Sequence[StoredRun]]) -> dict[str, Any]:
    """Return the settings, each stated once: shared by all runs, shared within a benchmark, or of a single run."""
    found = {bench: [_flat_settings(r) for r in runs] for bench, runs in benches.items()}
    everywhere = _common([t for some in found.values() for t in some])
    out = []
    for bench, runs in benches.items():
        here = _common(found[bench])
        rest = [{k: v for k, v in t.items() if k not in here} for t in found[bench]]
        shown = [{"name": r.name, "items": t} for r, t in zip(runs, rest, strict=True)]
        items = {k: v for k, v in here.items() if k not in everywhere}
        out.append({"title": bench_name(bench), "items": items, "runs": shown})
    return {"items": everywhere, "benches": out}


def _flat_settings(run: StoredRun) -> dict[str, str]:
    """Return the settings of a run under flat names, as text, with its command and folder."""
    out = dict(_flat(run.result["settings"]))
    for name, value in run.hyper.items():
        if name in run.defaults and run.defaults[name] != value and name != "tokens":
            out[f"hyper.{name}"] = f"{_text(value)} (default {_text(run.defaults[name])})"
    row = run.row()
    out |= {"questions answered": str(row["questions"]), "seconds without loading": f"{row['seconds']:.1f}"}
    return out | {"command": _text(run.result.get("command")), "folder": str(run.folder)}


def _flat(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{above}{name}.")
        else:
            yield f"{above}{name}", _text(inner)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _common(found: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the settings that are equal in all runs."""
    return {k: v for k, v in found[0].items() if all(t.get(k) == v for t in found[1:])}
