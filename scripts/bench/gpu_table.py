"""Print the results of gpu_check.sh as a short table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


def lines(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a short table of the measurements of the processes `names`."""
    for name in names:
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        yield f"{name}: {'complete' if found['complete'] else 'NOT COMPLETE'}, {found.get('seconds', 0)} s"
        for where, text in {
            **found.get("errors", {}),
            **({"stage": found["error"]} if "error" in found else {}),
        }.items():
            yield f"   {where}: {text.splitlines()[0][:150]}"
        yield from _LINES.get(name, _rows)(found)


def _sanity(found: dict[str, Any]) -> Iterator[str]:
    if "matrix_product_flops" in found:
        yield f"   {found['matrix_product_flops'] / 1e12:.3g} TFLOP/s, {found['copy_bytes'] / 1e12:.2f} TB/s"
    for row in found.get("against_cpu", found.get("bfloat16", [])):
        mean, least = row["overlap"].values()
        yield f"   {row['method']}: kept tokens in common {100 * mean:.1f} % (least {100 * least:.1f} %)"
    yield from _tests(found)


def _tests(found: dict[str, Any]) -> Iterator[str]:
    tests = found.get("tests")
    if tests:
        yield f"   tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
        for test, text in list(tests["failures"].items())[:5]:
            yield f"   {test.rsplit('/', 1)[-1]}: {text.splitlines()[0][:110] if text else ''}"
        for reason, number in tests["skips"].items():
            yield f"   {number} skipped: {reason[:110]}"


def _rows(found: dict[str, Any]) -> Iterator[str]:
    for row in found.get("rows", []):
        head = f"   {row['part']:16} {row['label']:20} batch {row['batch']:2}"
        if "error" in row:
            yield f"{head} {row['error']}"
            continue
        s, floor = row["stages"], row["floor"]
        prefill, decode = (s[n]["full"]["median"] for n in ("prefill", "decode"))
        measured = s["prefill"]["pruned"]["median"]
        yield (
            f"{head} prefill {prefill:7.2f} > {measured:7.2f} ms ({floor['prefill_pruned']:.2f}) "
            f"x{s['prefill']['speedup']['median']:.2f}, overhead {100 * row['overhead']['share_of_full']:.1f} %, "
            f"decode {decode:.2f} ms x{s['decode']['speedup']['median']:.2f}"
        )


def _rates(found: dict[str, Any]) -> Iterator[str]:
    for row in found.get("rows", []):
        times = row["times_loop"]["median"]
        yield f"   {row['arm']:24} batch {row['batch']:3} {row['per_second']['median']:7.2f} per second, x{times:.2f}"


def _profile(found: dict[str, Any]) -> Iterator[str]:
    for name in ("autoprune", "full"):
        if name in found:
            one = found[name]
            counts, outside = one["prefill"], one["outside"]
            yield (
                f"   {name}: {counts['launches']} launches ({outside['launches']} outside the layers), "
                f"{counts['synchronisations']} synchronisations, {counts['to_host']} copies to the host, "
                f"{outside['microseconds']:.0f} us outside"
            )
            first = (f"{o['name']} {o['microseconds']:.0f}" for o in one["operations"][:5])
            yield f"      {', '.join(first)}"


_LINES: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {"a": _sanity, "b": _sanity, "d1": _tests}
_LINES |= {"e": _rates, "f": _profile}
