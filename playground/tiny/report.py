"""Tables of the documentation from finished runs: ``python -m playground.tiny.report gqa|pivot|suite OUT``.

``OUT`` is the folder of ``scripts/eval/gqa.sh`` or ``scripts/eval/all.sh``; tables are printed as markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llava_prune.eval.show import figure_text, gap_text

Result = dict[str, Any]
BENCHES = ("gqa", "sqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "ocrbench", "vqav2")


def read(out: Path) -> dict[str, list[Result]]:
    """Results under ``out`` by benchmark: the unpruned model, baselines, other methods; large budgets first."""
    first = ("full", "autoprune", "autoprune-flash", "random", "uniform")

    def place(r: Result) -> tuple[int, bool, str, int]:
        known = first.index(r["method"]) if r["method"] in first else len(first)
        return known, "+" in r["method"].rstrip("+"), r["method"], -(r["budget"] or 0)

    found: dict[str, list[Result]] = {}
    for path in out.rglob("result.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(result["bench"], []).append(result)
    return {bench: sorted(found[bench], key=place) for bench in sorted(found, key=BENCHES.index)}


def percent(result: Result) -> float:
    """FLOPs of a prefill in percent of the unpruned model, text counted."""
    return result["flops"]["with_text_entering"]["percent_of_full"]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def gqa_table(runs: list[Result]) -> str:
    """Every run with its interval, its paired difference, its tokens and its FLOPs."""
    head = [
        "method",
        "tokens",
        "accuracy, %",
        "to full, paired",
        "tokens entering / leaving a layer",
        "FLOPs, % of full",
    ]
    rows = []
    for r in runs:
        tokens = r["visual_tokens"]
        rows.append(
            [
                f"`{r['method']}`",
                "-" if r["budget"] is None else str(r["budget"]),
                figure_text(r),
                gap_text(r) if "difference_to_full" in r else "",
                f"{tokens['average_entering']:.1f} / {tokens['average_leaving']:.1f}",
                f"{percent(r):.1f}",
            ]
        )
    return table(head, rows)


def pivot_table(runs: list[Result]) -> str:
    """One row a method, one column a budget."""
    budgets = sorted({r["budget"] for r in runs if r["budget"]}, reverse=True)
    rows = []
    for name in dict.fromkeys(r["method"] for r in runs if r["budget"]):
        by = {r["budget"]: f"{r['figure']:.2f} ({percent(r):.0f} %)" for r in runs if r["method"] == name}
        rows.append([f"`{name}`", *(by.get(b, "") for b in budgets)])
    return table(["method", *map(str, budgets)], rows)


def suite_table(found: dict[str, list[Result]]) -> str:
    """One row a benchmark, one column a run."""
    labels = list(dict.fromkeys(r["label"] for runs in found.values() for r in runs))
    rows = []
    for bench, runs in found.items():
        by = {r["label"]: figure_text(r) for r in runs}
        rows.append([bench, runs[0]["figure_name"], str(runs[0]["rows"]), *(by.get(label, "") for label in labels)])
    return table(["benchmark", "figure", "questions", *labels], rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=("gqa", "pivot", "suite"))
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    found = read(args.out)
    if not found:
        parser.error(f"no result.json under {args.out}")
    if args.table == "suite":
        print(suite_table(found))
    else:
        print({"gqa": gqa_table, "pivot": pivot_table}[args.table](found["gqa"]))


if __name__ == "__main__":
    main()
