"""Write the held-out questions in the layout LLaVA uses for GQA: ``python -m playground.tiny.make_gqa --out DIR``."""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np

from playground.tiny import questions as qs
from playground.tiny import scenes as sc
from playground.tiny.data import HELD_OUT_SEED

log = logging.getLogger(__name__)
GROUPS = {"colorQuery": "color", "shapeQuery": "shape", "wordQuery": "word", "numberQuery": "number", "count": "number"}


def _kind(question: qs.Question) -> str:
    """Return the name of the generator of a question from its detailed type."""
    names = {"wordQuery": "markQuery", "numberQuery": "markQuery", "existAnd": "logical", "existOr": "logical"}
    return names.get(question.detailed, question.detailed)


def select(scenes: list[sc.Scene], per_scene: int) -> list[tuple[int, qs.Question]]:
    """Select ``per_scene`` questions for every scene, with balanced types and answers.

    The types have the generators' proportions, and the answers within a type are about equally frequent.
    """
    total = len(scenes) * per_scene
    weight = {name: w for name, (_, w) in qs.GENERATORS.items()}
    target = {name: total * w / sum(weight.values()) for name, w in weight.items()}
    have: Counter[str] = Counter()
    answers: Counter[tuple[str, str]] = Counter()
    chosen = []
    pools = [qs.ask(s, np.random.default_rng([20_15, s.seed]), 80, dict.fromkeys(weight, 1.0)) for s in scenes]
    for _ in range(per_scene):
        for i, pool in enumerate(pools):
            used = {_kind(q) for j, q in chosen if j == i}
            fresh = [q for q in pool if _kind(q) not in used]
            best = min(fresh, key=lambda q: (have[_kind(q)] / target[_kind(q)], answers[q.detailed, q.answer], q.text))
            have[_kind(best)] += 1
            answers[best.detailed, best.answer] += 1
            chosen.append((i, best))
    return sorted(chosen, key=lambda pair: pair[0])


def annotation(question: qs.Question, scene: sc.Scene, identity: str, image: str) -> dict:
    """Return one entry of ``testdev_balanced_questions.json``."""
    steps = [{"operation": op, "dependencies": list(deps), "argument": arg} for op, arg, deps in question.program]
    text = "->".join(
        f"{s['operation']}: {s['argument']}" + (f" {s['dependencies']}" if s["dependencies"] else "") for s in steps
    )
    words = question.text.rstrip("?").split()
    spots = {}
    for index in question.things:
        thing = scene.things[index]
        for at, word in enumerate(words):
            if word in (thing.shape, qs.plural(thing.shape)) and str(at) not in spots:
                spots[str(at)] = str(index)
                break
    group = GROUPS.get(question.detailed)
    noun = scene.things[question.things[0]].shape if question.things else "none"
    return {
        "semantic": steps,
        "entailed": [],
        "equivalent": [identity],
        "question": question.text,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": group, "local": f"{question.detailed}-{noun}"},
        "answer": question.answer,
        "semanticStr": text,
        "annotations": {
            "answer": {"0": str(question.things[0])} if question.structural == "query" and question.things else {},
            "question": spots,
            "fullAnswer": {},
        },
        "types": {"detailed": question.detailed, "semantic": question.semantic, "structural": question.structural},
        "fullAnswer": question.full_answer,
    }


def write(out: Path, scenes: int = 100, per_scene: int = 4) -> None:
    """Write images, question lines and annotations."""
    images = out / "data" / "images"
    images.mkdir(parents=True, exist_ok=True)
    made = [sc.make_scene(HELD_OUT_SEED + i) for i in range(scenes)]
    for i, scene in enumerate(made):
        sc.render(scene, 1.5 if i % 3 == 2 else 1.0).save(images / f"n{9_000_000 + i}.jpg", "JPEG", quality=92)
    lines, entries = [], {}
    for number, (i, question) in enumerate(select(made, per_scene)):
        identity, image = str(900_000_000 + number), f"n{9_000_000 + i}"
        row = {"question_id": identity, "image": f"{image}.jpg", "text": question.prompt, "category": "default"}
        lines.append(json.dumps(row, ensure_ascii=False))
        entries[identity] = annotation(question, made[i], identity, image)
    (out / "llava_gqa_testdev_balanced.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = out / "data" / "testdev_balanced_questions.json"
    path.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    log.info("%d questions about %d images in %s", len(lines), scenes, out)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("playground/data/mini/gqa"))
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--per-scene", type=int, default=4)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    write(args.out, args.scenes, args.per_scene)


if __name__ == "__main__":
    main()
