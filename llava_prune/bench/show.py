"""Tables of methods and of speed on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .flops import Size
from .methods import Row, runs


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def methods_tables(rows: Sequence[Row], size: Size, text: float) -> list[Table]:
    """What every method costs, what it does to positions and where it comes from, and its arguments."""
    about = f"{size.layers} layers, {size.visual} visual tokens; FLOPs of a prefill by equation (2) on entering tokens"
    cost = Table(title=f"methods: {about}, in percent of the unpruned model", caption="NxC: N layers with C tokens")
    for name in ("method", "budget", "prunes", "tokens entering each layer", "avg in", "avg out"):
        cost.add_column(name, overflow="fold")
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
    for name in ("method", "positions", "new tokens count from", "backends", "batch", "official code", "its licence"):
        facts.add_column(name, overflow="fold")
    arguments = Table(title="hyper-parameters")
    for name in ("method", "about", "arguments and defaults", "presets"):
        arguments.add_column(name, overflow="fold")
    seen: set[str] = set()
    for r in rows:
        if r.name in seen:
            continue
        seen.add(r.name)
        counted = "unpruned length" if r.decode == "original" else "each layer's cache"
        facts.add_row(r.name, r.positions, counted, r.backends, r.batch, r.source, r.licence)
        hyper = ", ".join(f"{k}={v!r}" for k, v in r.hyper.items()) or "-"
        arguments.add_row(r.name, r.about, hyper, ", ".join(r.presets) or "-")
    return [cost, facts, arguments]


def speed_tables(result: Mapping[str, Any]) -> list[Table]:
    """Times, and what they should have been, of a result of `llava-prune bench`."""
    machine = result["machine"]
    how = [f"pruned: {name}" for name in ("fused", "graphs") if result["settings"].get(name)]
    where = ", ".join([machine["device"], machine["dtype"], f"{machine['threads']} threads", *how])
    times = Table(title=f"milliseconds, unpruned > pruned ({where})", caption="medians; decode per token")
    times.add_column("request", overflow="fold")
    for name in ("vision", "prefill", "prefill q1-q3", "decode", "total", "prefill MiB"):
        times.add_column(name, justify="right")
    ratios = Table(
        title="pruned against unpruned",
        caption="times x: unpruned / pruned; efficiency: prefill x / FLOPs x, with quartiles; if free: were deciding "
        "free; deciding: share of the unpruned prefill; floor: what arithmetic and traffic leave possible",
    )
    ratios.add_column("request", overflow="fold")
    for name in (
        "FLOPs x", "prefill x", "efficiency", "if free", "decode x", "total x", "deciding %", "floor x", "filler %"
    ):  # fmt: skip
        ratios.add_column(name, justify="right")
    for r in result["rows"]:
        budget = "" if r["tokens"] is None else f" {r['tokens']}"
        label = f"{r['method']}{budget}, batch {r['batch']}, {r['visual']}+{r['text']}"
        if "error" in r:
            times.add_row(label, r["error"])
            continue
        stages, memory, floor = r["stages"], r.get("memory"), r["floor"]

        def pair(name: str, stages: Any = stages) -> str:
            return f"{stages[name]['full']['median']:.1f} > {stages[name]['pruned']['median']:.1f}"

        prefill = stages["prefill"]
        spread = [f"{prefill[k]['q1']:.1f}-{prefill[k]['q3']:.1f}" for k in ("full", "pruned")]
        mib = "-" if memory is None else " > ".join(f"{memory[k]['prefill'] / 2**20:.1f}" for k in ("full", "pruned"))
        times.add_row(label, pair("vision"), pair("prefill"), " > ".join(spread), pair("decode"), pair("total"), mib)
        ratio = r["flops"]["ratio"]
        speedups = [stages[k]["speedup"]["median"] for k in ("prefill", "decode", "total")]
        ratios.add_row(
            label,
            f"{ratio:.2f}",
            f"{speedups[0]:.2f}",
            f"{r['efficiency']:.2f} ({prefill['speedup']['q1'] / ratio:.2f}-{prefill['speedup']['q3'] / ratio:.2f})",
            f"{r['efficiency'] / (1 - r['deciding']['share_of_pruned']):.2f}",
            f"{speedups[1]:.2f}",
            f"{speedups[2]:.2f}",
            f"{100 * r['deciding']['share_of_full']:.1f}",
            f"{floor['prefill_full'] / floor['prefill_pruned']:.2f}",
            f"{100 * r['padding']:.1f}",
        )
    return [times, ratios]
