"""The result of one method at one budget: figures, tokens, FLOPs, seconds, versions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ..bench.flops import Size, average_tokens, flops_visual_only, flops_with_text
from ..runtime.geometry import Geometry
from ..stats import mean_interval, paired_difference
from . import resample
from .resample import Units
from .task import QuestionScores


@dataclass(frozen=True)
class Facts:
    """Facts of a run for its result.

    Attributes:
        task: benchmark.
        figure: name of the headline figure.
        size: size of the model.
        geometry: places of the visual tokens in an image.
        settings: every setting that may have changed an answer.
    """

    task: str
    figure: str
    size: Size
    geometry: Geometry
    settings: Mapping[str, Any]


def token_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean visual tokens of samples with an image, entering and leaving, by layer and over all layers."""
    out: dict[str, Any] = {}
    rows = [r for r in rows if _has_image(r)] or rows
    for way in ("entering", "leaving"):
        layers = [sum(column) / len(rows) for column in zip(*(r["kept"][way] for r in rows), strict=True)]
        out[f"average_{way}"] = average_tokens(layers)
        out[f"{way}_by_layer"] = layers
    return out


def seen_tokens(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return {"seen": mean visual tokens of images in crops before pruning}; {} for a model without crops.

    The number differs between images because of unpadding and newline tokens.
    """
    found = [r["kept"]["unpruned"] for r in rows if "unpruned" in r["kept"]]
    return {"seen": fmean(found)} if found else {}


def unpruned_tokens(row: Mapping[str, Any], size: Size) -> int:
    """Return the visual tokens of a row before pruning; 0 without an image.

    For images in crops the number is stored in the row; otherwise it is that of the model.
    """
    kept = row["kept"]
    return int(kept.get("unpruned", size.visual if _has_image(row) else 0))


def flops_figures(rows: Sequence[Mapping[str, Any]], text: Sequence[int], size: Size) -> dict[str, Any]:
    """Return the mean TFLOPs of a prefill by equation (2) and their share of the unpruned model's.

    There is one entry for each way of counting tokens.
    """
    out: dict[str, Any] = {"text_tokens": sum(text) / len(text)}
    for way in ("entering", "leaving"):
        only = both = full_only = full_both = 0.0
        groups = Counter((tuple(r["kept"][way]), unpruned_tokens(r, size), t) for r, t in zip(rows, text, strict=True))
        for (counts, n, t), times in groups.items():
            start = [n] * len(counts)
            only += times * flops_visual_only(counts, size)
            both += times * flops_with_text(counts, t, size)
            full_only += times * flops_visual_only(start, size)
            full_both += times * flops_with_text(start, t, size)
        for name, value, full in (("visual_only", only, full_only), ("with_text", both, full_both)):
            out[f"{name}_{way}"] = {
                "tflops": value / len(rows) / 1e12,
                "percent_of_full": 100 * value / full if full else None,
            }
    return out


def _has_image(row: Mapping[str, Any]) -> bool:
    """Return whether a row's question has an image, even if the method drops all of its tokens."""
    return bool(row["kept"]["entering"][0] or row["kept"].get("image"))


def without_figure(score: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return a score unchanged, or without its figure if a row has NaN or infinite logits (`not_finite`)."""
    bad = [r for r in rows if r.get("not_finite")]
    if not bad:
        return score
    why = (
        f"the logits of {len(bad)} of {len(rows)} questions are NaN or infinite, first question_id "
        f"{bad[0]['question_id']} in {bad[0]['not_finite']}, so there is no figure; use another --dtype, or fetch the "
        "checkpoint again"
    )
    return {"figure": None, "rows": score["rows"], "details": {"not_finite": len(bad)}, "why": why}


def make_result(
    facts: Facts,
    label: str,
    score: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    text: Sequence[int],
    seconds: Mapping[str, float],
    units: Units | None = None,
) -> dict[str, Any]:
    """Build the result of a finished run. Its `scores` and `units` are not written to the result file (see `dump`).

    Args:
        facts: facts of the run.
        label: label of the run.
        score: return value of the scorer.
        rows: rows of the answer file.
        text: number of text tokens of each prompt.
        seconds: stage -> seconds.
        units: sampling units of a figure that is not a mean of scores; its interval is a bootstrap's.
    """
    size = facts.size
    score = without_figure(score, rows)
    names = dict.fromkeys(n for r in rows for n in r.get("stats", {}))
    scores, scale = score.get("scores"), score.get("scale", 100)
    interval = [scale * v for v in mean_interval(list(scores.values()))] if scores else None
    if units is not None and score["figure"] is not None:
        interval = resample.interval(units)
    return {
        "bench": facts.task,
        "label": label,
        "method": facts.settings["method"],
        "budget": facts.settings["tokens"],
        "figure": score["figure"],
        "figure_name": facts.figure,
        "interval": interval,
        "why_no_figure": score.get("why"),
        "rows": score["rows"],
        "details": score["details"],
        "visual_tokens": {"unpruned": facts.size.visual, **seen_tokens(rows), **token_figures(rows)},
        "flops": flops_figures(rows, text, size),
        "geometry": asdict(facts.geometry),
        "method_stats": {n: fmean(r["stats"][n] for r in rows if n in r["stats"]) for n in names},
        "seconds": dict(seconds),
        "settings": dict(facts.settings),
        "versions": facts.settings["versions"],
        "scores": scores,
        "scale": scale,
        "units": units,
    }


def compare(result: dict[str, Any], reference: Mapping[str, Any] | None) -> None:
    """Add the difference to the unpruned model, with its paired 95 % interval."""
    if reference is None or result["figure"] is None or reference["figure"] is None:
        return
    gap = {"points": result["figure"] - reference["figure"], "low": None, "high": None}
    ours, theirs = result.get("scores"), reference.get("scores")
    if ours and theirs:
        pair = paired_difference([ours[i] for i in theirs], list(theirs.values()))
        gap = dict(zip(gap, (result["scale"] * g for g in pair), strict=True))
    elif result.get("units") and reference.get("units"):
        gap["low"], gap["high"] = resample.interval(result["units"], reference["units"]) or (None, None)
    result["difference_to_full"] = gap


def without_scores(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result without the scores and units of the questions, which follow from the answer file."""
    return {k: v for k, v in result.items() if k not in ("scores", "scale", "units")}


def score_rows(rows: Sequence[Mapping[str, Any]], questions: QuestionScores) -> list[dict[str, Any]]:
    """Return question_id, score and type of each answer row, the rows of the score file."""
    pairs = zip(rows, questions, strict=True)
    return [{"question_id": row["question_id"], "score": score, "type": kind} for row, (score, kind) in pairs]


def dump_scores(scores: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of the score file: the rows of `score_rows` as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scores)


def dump(result: Mapping[str, Any]) -> str:
    """Return the text of the result file."""
    return json.dumps(without_scores(result), indent=2, ensure_ascii=False) + "\n"
