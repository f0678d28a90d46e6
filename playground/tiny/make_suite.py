"""Write the held-out mini versions of the other eight benchmarks: ``python -m playground.tiny.make_suite``.

Files and folders are those of LLaVA's ``playground/data/eval``; every benchmark has scenes of its own, which no
training scene shares.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from playground.tiny import questions as qs
from playground.tiny import scenes as sc
from playground.tiny import suite as su
from playground.tiny.data import HELD_OUT_SEED
from playground.tiny.suite import Case

log = logging.getLogger(__name__)
FIRST = {
    name: HELD_OUT_SEED + 10_000 * (i + 1)
    for i, name in enumerate(("pope", "mme", "mmbench", "mmbench_cn", "sqa", "textvqa", "ocrbench", "vqav2"))
}
Made = tuple[int, sc.Scene, Case]


def _rng(seed: int, salt: int = 0) -> np.random.Generator:
    return np.random.default_rng([20_18, seed, salt])


def choose(bench: str, count: int, maker: su.Maker, salt: int = 0, tries: int = 12) -> list[Made]:
    """Choose one question for each of ``count`` scenes, with answers balanced within each kind of question.

    Returns:
        (scene number, scene, case) of each question.
    """
    have: Counter[tuple[str, str]] = Counter()
    kinds: Counter[str] = Counter()
    chosen: list[Made] = []
    number = salt * 1000
    while len(chosen) < count:
        scene, rng = sc.make_scene(FIRST[bench] + number), _rng(FIRST[bench] + number, salt)
        cases = [c for c in (maker(scene, rng) for _ in range(tries)) if c is not None]
        if cases:
            best = min(cases, key=lambda c: (kinds[c.kind], have[c.kind, c.answer]))
            kinds[best.kind] += 1
            have[best.kind, best.answer] += 1
            chosen.append((number, scene, best))
        number += 1
    return chosen


def save_image(scene: sc.Scene, path: Path) -> None:
    """Save a scene; a third of the JPEG files are 1.5 times as large."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        sc.render(scene).save(path, optimize=True)
    else:
        sc.render(scene, 1.5 if scene.seed % 3 == 2 else 1.0).save(path, "JPEG", quality=92)


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def _question(identity: Any, image: str, text: str, category: str = "default") -> dict[str, Any]:
    return {"question_id": identity, "image": image, "text": text, "category": category}


def _ten(answer: str, other: str, rng: np.random.Generator) -> list[str]:
    """Return the answers of ten annotators, of whom up to three give another answer."""
    odd = int(rng.integers(0, 4))
    said = [other] * odd + [answer] * (10 - odd)
    return [said[int(i)] for i in rng.permutation(10)]


# POPE --------------------------------------------------------------------------------------------------------------
def pope_case(split: str, flag: bool, scene: sc.Scene, rng: np.random.Generator) -> Case:
    """Return a question such as "Is there a red circle in the image?".

    An absent object is any pair of colour and shape, a pair with a common shape ("popular"), or a pair whose shape
    occurs in the scene ("adversarial").
    """
    names = {t.name for t in scene.things}
    absent = [f"{c} {s}" for c in sc.COLOUR_NAMES for s in sc.SHAPES if f"{c} {s}" not in names]
    if split == "popular":  # signs and cards are the most frequent things
        absent = [n for n in absent if n.split()[1] in ("sign", "card")] or absent
    if split == "adversarial":
        shapes = {t.shape for t in scene.things}
        absent = [n for n in absent if n.split()[1] in shapes] or absent
    pool = sorted(names) if flag else absent
    name = pool[int(rng.integers(len(pool)))]
    text = f"Is there {qs.article(name)} in the image?"
    return Case(f"pope/{split}", text, "yes" if flag else "no")


def pope(out: Path, scenes: int = 20, each: int = 6) -> None:
    """Write three splits of ``scenes`` x ``each`` questions about the same images, alternating between yes and no."""
    starts, rows = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}, []
    for salt, (split, start) in enumerate(starts.items()):
        labels = []
        for n in range(scenes):
            scene, seen = sc.make_scene(FIRST["pope"] + n), set()
            rng = _rng(scene.seed, salt)
            while len(seen) < each:
                case = pope_case(split, len(seen) % 2 == 0, scene, rng)
                if case.text in seen:
                    continue
                seen.add(case.text)
                image = f"COCO_val2014_{n + 1:012d}.jpg"
                at = len(labels) + 1
                labels.append({"question_id": at, "image": image, "text": case.text, "label": case.answer})
                rows.append(_question(start + at, image, case.prompt, split))
        _lines(out / "coco" / f"coco_pope_{split}.json", labels)
    for n in range(scenes):
        save_image(sc.make_scene(FIRST["pope"] + n), out / "val2014" / f"COCO_val2014_{n + 1:012d}.jpg")
    _lines(out / "llava_pope_test.jsonl", rows)


# MME ---------------------------------------------------------------------------------------------------------------
def mme(out: Path, pairs: int = 20) -> None:
    """Write eight tasks; every image has one question answered yes and one answered no."""
    release, rows = out / "MME_Benchmark_release_version", []
    for salt, maker in enumerate(su.MME):
        number, made = salt * 1000, 0
        while made < pairs:
            scene = sc.make_scene(FIRST["mme"] + number)
            number += 1
            rng = _rng(scene.seed)
            both = [maker(scene, rng, flag) for flag in (True, False)]
            if None in both:
                continue
            made += 1
            task = both[0].kind.split("/")[1]
            image, key = f"{task}/{made:012d}.jpg", f"{task}/{made:012d}.txt"
            save_image(scene, release / image)
            lines = [f"{c.text} Please answer yes or no.\t{c.answer.capitalize()}" for c in both]
            (release / key).write_text("\n".join(lines) + "\n", encoding="utf-8")
            rows += [_question(image, image, c.prompt, task) for c in both]
    _lines(out / "llava_mme.jsonl", rows)


# MMBench -----------------------------------------------------------------------------------------------------------
COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
    "comment", "split",
)  # fmt: skip


def mmbench(out: Path, chinese: bool = False, count: int = 60) -> None:
    """Write the table with base64 images; rotations of options are separate rows, with indices a million apart."""
    bench = "mmbench_cn" if chinese else "mmbench"
    name = "mmbench_dev_cn_20231003.tsv" if chinese else "mmbench_dev_20230712.tsv"
    base, turned = [], []
    for at, (_, scene, case) in enumerate(choose(bench, count, partial(su.choice, chinese=chinese))):
        buffer = io.BytesIO()
        sc.render(scene).save(buffer, "JPEG", quality=90)
        image = base64.b64encode(buffer.getvalue()).decode()
        n, options = len(case.options), list(case.options)
        right = options["ABCD".index(case.answer)]
        hint = ("仔细看图。" if chinese else "Look at the picture.") if at % 3 == 0 else ""
        for turn in range(n):
            shown = options[-turn:] + options[:-turn] if turn else options
            row = dict.fromkeys(COLUMNS, "")
            row.update(zip("ABCD", shown, strict=False))
            row.update(index=at + 1000 * (at % 2) + turn * 1_000_000, question=case.text, hint=hint, image=image)
            row.update(answer="ABCD"[shown.index(right)], category=case.kind.split("/")[1], split="dev")
            row.update(source="generated", **{"l2-category": "perception"})
            (turned if turn else base).append(row)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / name, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(base + sorted(turned, key=lambda r: r["index"]))


# ScienceQA ---------------------------------------------------------------------------------------------------------
def sqa(out: Path, images: int = 100, texts: int = 60) -> None:
    """Write questions with and without an image in random order."""
    made = choose("sqa", images, partial(su.choice, most=4)) + choose("sqa", texts, su.science_text, salt=9)
    order = np.random.default_rng(20_19).permutation(len(made))
    rows, problems = [], {}
    for number, i in enumerate(order, 1):
        _, scene, case = made[int(i)]
        identity, hint = str(number), case.hint
        if case.image and number % 3 == 0:
            hint = "Context: Look at the picture."
        value = Case(**{**vars(case), "hint": hint}).body
        row: dict[str, Any] = {"id": identity}
        if case.image:
            row["image"] = f"{identity}/image.png"
            save_image(scene, out / "images" / "test" / row["image"])
            value = f"<image>\n{value}"
        row["conversations"] = [{"from": "human", "value": value}, {"from": "gpt", "value": case.answer}]
        rows.append(row)
        problems[identity] = {
            "question": case.text,
            "choices": list(case.options),
            "answer": "ABCDE".index(case.answer),
            "hint": hint.removeprefix("Context: "),
            "image": "image.png" if case.image else None,
            "split": "test",
        }
    _json(out / "llava_test_CQM-A.json", rows)
    _json(out / "problems.json", problems)
    _json(out / "pid_splits.json", {"test": list(problems)})


# printed text ------------------------------------------------------------------------------------------------------
def textvqa(out: Path, count: int = 200) -> None:
    """Write question lines with reference tokens, and ten annotators."""
    rows, data = [], []
    for number, scene, case in choose("textvqa", count, su.textvqa):
        image, rng = f"{0xF000_0000_0000_0000 + number:016x}", _rng(scene.seed, 7)
        save_image(scene, out / "train_images" / f"{image}.jpg")
        rows.append(_question(image, f"{image}.jpg", case.prompt))
        said = _ten(case.answer, f"the {case.answer} sign", rng)
        note = {"question_id": 34_602 + number, "image_id": image, "question": case.text, "answers": said}
        data.append({**note, "set_name": "val"})
    _lines(out / "llava_textvqa_val_v051_ocr.jsonl", rows)
    _json(out / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_version": "0.5.1", "data": data})


def ocrbench(out: Path, count: int = 200) -> None:
    """Write OCRBench's list; answers are a text or a list of texts."""
    rows = []
    for number, scene, case in choose("ocrbench", count, su.ocrbench):
        image = f"generated/test/{number}.jpg"
        save_image(scene, out / "OCRBench_Images" / image)
        answers = case.answer.upper() if number % 3 else [case.answer.upper(), f"{case.answer}."]
        row = {"dataset_name": "generated", "id": number, "image_path": image, "question": case.text}
        rows.append({**row, "answers": answers, "type": case.kind.split("/")[1]})
    _json(out / "OCRBench.json", rows)


# VQAv2 -------------------------------------------------------------------------------------------------------------
def vqav2(out: Path, scenes: int = 100, each: int = 3) -> None:
    """Write questions of GQA's kinds with ten annotators; the upload list has half as many additional ids."""
    rows, notes, have = [], [], Counter()
    for n in range(1, scenes + 1):
        scene = sc.make_scene(FIRST["vqav2"] + n)
        rng, image = _rng(scene.seed), f"COCO_test2015_{n:012d}.jpg"
        save_image(scene, out / "test2015" / image)
        pool = qs.ask(scene, rng, 24)
        for k in range(each):
            best = min(pool, key=lambda q: (have[q.detailed], have[q.detailed, q.answer]))
            pool.remove(best)
            have[best.detailed] += 1
            have[best.detailed, best.answer] += 1
            identity = n * 1000 + k
            rows.append(_question(identity, image, best.prompt))
            kind = {"yes": "yes/no", "no": "yes/no"}.get(best.answer, "number" if best.answer.isdigit() else "other")
            other = {"yes": "no", "no": "yes"}.get(best.answer, "nothing")
            said = _ten(best.answer, other, rng)
            notes.append({
                "question_id": identity,
                "image_id": n,
                "question_type": " ".join(best.text.lower().split()[:2]),
                "answer_type": kind,
                "multiple_choice_answer": best.answer,
                "answers": [
                    {"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(said, 1)
                ],
            })  # fmt: skip
    _lines(out / "llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    more = [_question(10_000_000 + r["question_id"], r["image"], r["text"]) for r in rows[::2]]
    _lines(out / "llava_vqav2_mscoco_test2015.jsonl", rows + more)
    _json(out / "v2_mscoco_test-dev2015_annotations.json", {"annotations": notes})


WRITERS: dict[str, Callable[[Path], None]] = {
    "pope": pope,
    "MME": mme,
    "mmbench": mmbench,
    "mmbench_cn": partial(mmbench, chinese=True),
    "scienceqa": sqa,
    "textvqa": textvqa,
    "OCRBench": ocrbench,
    "vqav2": vqav2,
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("playground/data/mini"))
    parser.add_argument("--only", choices=WRITERS, nargs="+", default=list(WRITERS))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in args.only:
        WRITERS[name](args.out / name)
        size = sum(p.stat().st_size for p in (args.out / name).rglob("*") if p.is_file())
        log.info("%s: %.2f MB", name, size / 1e6)


if __name__ == "__main__":
    main()
