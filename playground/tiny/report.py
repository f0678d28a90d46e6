"""Tables of the documentation from finished runs: ``python -m playground.tiny.report gqa|pivot|suite PLACE``.

``PLACE`` is a folder of runs, for example ``playground/results/gqa/llava-tiny``; tables are printed as markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_prune.console import difference_text, figure_text
from llava_prune.report.formats import markdown_table
from llava_prune.report.store import UNPRUNED, StoredRun, read_runs
from llava_prune.report.together import BENCHES

FIRST = (UNPRUNED, "autoprune", "autoprune-flash", "random", "uniform")


def read(place: Path) -> dict[str, list[StoredRun]]:
    """Read the runs below ``place`` by benchmark: the unpruned model, baselines, other methods; large budgets first.

    The variants of sweeps are left out.
    """

    def order(r: StoredRun) -> tuple[int, bool, str, int]:
        known = FIRST.index(r.method) if r.method in FIRST else len(FIRST)
        return known, "+" in r.method.rstrip("+"), r.method, -(r.tokens or 0)

    found: dict[str, list[StoredRun]] = {}
    for run in sorted((r for r in read_runs([place]) if not r.varied), key=order):
        found.setdefault(run.bench, []).append(run)
    order_of = ("gqa", "sqa", *(b for b in BENCHES if b not in ("gqa", "sqa", "vqav2")), "vqav2")
    return {bench: found[bench] for bench in order_of if bench in found}


def gqa_table(runs: list[StoredRun]) -> str:
    """Return a table of every run with its interval, paired difference, tokens and FLOPs."""
    head = [
        "method",
        "tokens",
        "accuracy, %",
        "to full, paired",
        "tokens entering / leaving a layer",
        "FLOPs, % of full",
    ]
    rows = [
        [
            f"`{r.method}`",
            "-" if r.tokens is None else str(r.tokens),
            figure_text(r.result),
            "" if r.method == UNPRUNED else difference_text(r.result.get("difference_to_full")),
            f"{r.average_tokens('entering'):.1f} / {r.average_tokens('leaving'):.1f}",
            f"{r.flops_percent():.1f}",
        ]
        for r in runs
    ]
    return markdown_table(head, rows)


def pivot_table(runs: list[StoredRun]) -> str:
    """Return a table with one row for each method and one column for each budget."""
    budgets = sorted({r.tokens for r in runs if r.tokens}, reverse=True)
    rows = []
    for name in dict.fromkeys(r.method for r in runs if r.tokens):
        by = {r.tokens: f"{r.figure:.2f} ({r.flops_percent():.0f} %)" for r in runs if r.method == name}
        rows.append([f"`{name}`", *(by.get(b, "") for b in budgets)])
    return markdown_table(["method", *map(str, budgets)], rows)


def suite_table(found: dict[str, list[StoredRun]]) -> str:
    """Return a table with one row for each benchmark and one column for each run."""
    labels = list(dict.fromkeys(r.label for runs in found.values() for r in runs))
    rows = []
    for bench, runs in found.items():
        by = {r.label: figure_text(r.result) for r in runs}
        facts = runs[0].result
        rows.append([bench, facts["figure_name"], str(facts["rows"]), *(by.get(label, "") for label in labels)])
    return markdown_table(["benchmark", "figure", "questions", *labels], rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=("gqa", "pivot", "suite"))
    parser.add_argument("place", type=Path)
    args = parser.parse_args()
    found = read(args.place)
    if not found:
        parser.error(f"no finished run in {args.place}")
    if args.table == "suite":
        print(suite_table(found))
    else:
        print({"gqa": gqa_table, "pivot": pivot_table}[args.table](found["gqa"]))


if __name__ == "__main__":
    main()
