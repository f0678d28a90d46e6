"""Tables of methods and of speed on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .flops import Size
from .methods import Row, runs


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


PLACES = {"before the language model": "before", "language model": "inside", "inside the vision tower": "in the tower"}
"""First part of `MethodInfo.where` -> where the method prunes, relative to the language model."""


def methods_table(rows: Sequence[Row], size: Size, text: float) -> Table:
    """Return the short table: where each method prunes, both averages, and the cost of a prefill, for each budget."""
    title = f"methods: {size.layers} layers, {size.visual} visual tokens, {text:g} text tokens"
    caption = "FLOPs of a prefill by equation (2) on entering tokens, in percent of the unpruned model; --long has more"
    table = Table(title=title, caption=caption)
    for name in ("method", "budget", "prunes", "entering", "leaving", "FLOPs %"):
        table.add_column(name, justify="left" if name in ("method", "prunes") else "right")
    for r in rows:
        averages = _number(r.average_entering), _number(r.average_leaving)
        budget = "-" if r.tokens is None else str(r.tokens)
        table.add_row(
            r.name, budget, PLACES.get(r.where.partition(",")[0], "-"), *averages, _number(r.percent_with_text)
        )
    return table


def methods_tables(rows: Sequence[Row], size: Size, text: float) -> list[Table]:
    """Return the long tables: costs of the methods, their positions and origin, and their hyper-parameters."""
    about = f"{size.layers} layers, {size.visual} visual tokens; FLOPs of a prefill by equation (2) on entering tokens"
    cost = Table(title=f"methods: {about}, in percent of the unpruned model", caption="NxC: N layers of C tokens")
    for name in ("method", "budget", "prunes", "tokens entering each layer", "avg in", "avg out"):
        cost.add_column(name)
    cost.add_column("FLOPs % visual only", justify="right")
    cost.add_column(f"FLOPs % with {text:g} text", justify="right")
    for r in rows:
        counts = "-" if r.entering is None else runs(r.entering)
        cost.add_row(
            r.name,
            "-" if r.tokens is None else str(r.tokens),
            r.where,
            f"{counts} ({r.note})" if r.note else counts,
            _number(r.average_entering),
            _number(r.average_leaving),
            _number(r.percent_visual_only),
            _number(r.percent_with_text),
        )
    facts = Table(title="positions and origin")
    for name in ("method", "positions", "position of new tokens", "backends", "batch", "official code", "its licence"):
        facts.add_column(name)
    arguments = Table(title="hyper-parameters")
    for name in ("method", "about", "arguments and defaults", "presets"):
        arguments.add_column(name)
    seen: set[str] = set()
    for r in rows:
        if r.name in seen:
            continue
        seen.add(r.name)
        counted = "unpruned sequence" if r.decode == "original" else "cache of each layer"
        facts.add_row(r.name, r.positions, counted, r.backends, r.batch, r.source, r.licence)
        hyper = ", ".join(f"{k}={v!r}" for k, v in r.hyper.items()) or "-"
        arguments.add_row(r.name, r.about, hyper, ", ".join(r.presets) or "-")
    return [cost, facts, arguments]


def speed_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of times and of speed-ups beside FLOPs ratios, for a result of `llava-prune bench`."""
    machine = result["machine"]
    how = [f"pruned: {name}" for name in ("fused", "graphs") if result["settings"].get(name)]
    where = ", ".join([machine["device"], machine["dtype"], f"{machine['threads']} threads", *how])
    times = Table(title=f"milliseconds, unpruned > pruned ({where})", caption="medians; decode: for each new token")
    times.add_column("request")
    for name in ("vision", "prefill", "prefill q1-q3", "decode", "total", "prefill MiB"):
        times.add_column(name, justify="right")
    ratios = Table(
        title="ratios, unpruned / pruned",
        caption="efficiency: prefill x / FLOPs x, with quartiles; overhead: pruning overhead (scores, selection, "
        "merging) in percent of the unpruned prefill; bound x: upper bound by arithmetic and memory traffic; padding: "
        "ragged padding",
    )
    ratios.add_column("request")
    for name in ("FLOPs x", "prefill x", "efficiency", "efficiency without overhead", "decode x", "total x"):
        ratios.add_column(name, justify="right")
    for name in ("overhead %", "bound x", "padding %"):
        ratios.add_column(name, justify="right")
    for r in result["rows"]:
        budget = "" if r["tokens"] is None else f" {r['tokens']}"
        label = f"{r['method']}{budget}, batch {r['batch']}, {r['visual']}+{r['text']}"
        if "error" in r:
            times.add_row(label, r["error"])
            continue
        times.add_row(label, *_times(r))
        ratios.add_row(label, *_ratios(r))
    return [times, ratios]


def _times(r: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row of the table of times."""
    stages, memory = r["stages"], r.get("memory")

    def pair(name: str) -> str:
        return f"{stages[name]['full']['median']:.1f} > {stages[name]['pruned']['median']:.1f}"

    prefill = stages["prefill"]
    spread = [f"{prefill[k]['q1']:.1f}-{prefill[k]['q3']:.1f}" for k in ("full", "pruned")]
    mib = "-" if memory is None else " > ".join(f"{memory[k]['prefill'] / 2**20:.1f}" for k in ("full", "pruned"))
    return [pair("vision"), pair("prefill"), " > ".join(spread), pair("decode"), pair("total"), mib]


def _ratios(r: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row of the table of ratios."""
    ratio, floor, speedup = r["flops"]["ratio"], r["floor"], r["stages"]["prefill"]["speedup"]
    prefill, decode, total = (r["stages"][k]["speedup"]["median"] for k in ("prefill", "decode", "total"))
    return [
        f"{ratio:.2f}",
        f"{prefill:.2f}",
        f"{r['efficiency']:.2f} ({speedup['q1'] / ratio:.2f}-{speedup['q3'] / ratio:.2f})",
        f"{r['efficiency'] / (1 - r['overhead']['share_of_pruned']):.2f}",
        f"{decode:.2f}",
        f"{total:.2f}",
        f"{100 * r['overhead']['share_of_full']:.1f}",
        f"{floor['prefill_full'] / floor['prefill_pruned']:.2f}",
        f"{100 * r['padding']:.1f}",
    ]
