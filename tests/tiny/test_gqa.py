"""The held-out data set: layout, schema, balance."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from playground.tiny import make_gqa
from playground.tiny import scenes as sc
from playground.tiny.data import HELD_OUT_SEED
from playground.tiny.measure import chance
from playground.tiny.questions import INSTRUCTION

FIELDS = {
    "question", "imageId", "answer", "fullAnswer", "isBalanced", "groups", "types",
    "semantic", "semanticStr", "entailed", "equivalent", "annotations",
}  # fmt: skip


@pytest.fixture(scope="module")
def lines(gqa_dir):
    text = (gqa_dir / "llava_gqa_testdev_balanced.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def notes(gqa_dir):
    return json.loads((gqa_dir / "data" / "testdev_balanced_questions.json").read_text(encoding="utf-8"))


def test_question_lines_and_annotations_agree(lines, notes, gqa_dir):
    assert len(lines) == len(notes) == 400
    assert [row["question_id"] for row in lines] == list(notes)
    for row in lines:
        assert set(row) == {"question_id", "image", "text", "category"} and row["category"] == "default"
        note = notes[row["question_id"]]
        assert row["text"] == f"{note['question']}\n{INSTRUCTION}"
        assert row["image"] == f"{note['imageId']}.jpg"
        assert (gqa_dir / "data" / "images" / row["image"]).is_file()


def test_annotation_schema(notes):
    for note in notes.values():
        assert set(note) == FIELDS
        assert set(note["types"]) == {"structural", "semantic", "detailed"}
        assert note["types"]["structural"] in {"verify", "query", "choose", "logical", "compare"}
        assert set(note["groups"]) == {"global", "local"}
        assert note["isBalanced"] is True and note["answer"] == note["answer"].lower()
        for step in note["semantic"]:
            assert set(step) == {"operation", "dependencies", "argument"}


def test_answers_are_balanced(notes, gqa_dir):
    assert chance(gqa_dir)["detailed"] < 40
    table = defaultdict(Counter)
    for note in notes.values():
        table[note["types"]["structural"]][note["answer"]] += 1
    for kind in ("verify", "logical", "compare"):
        assert abs(table[kind]["yes"] - table[kind]["no"]) <= 3


def test_the_generator_makes_the_shipped_questions(lines, notes, gqa_dir):
    made = [sc.make_scene(HELD_OUT_SEED + i) for i in range(100)]
    chosen = make_gqa.select(made, 4)
    assert [q.prompt for _, q in chosen] == [row["text"] for row in lines]
    assert [q.answer for _, q in chosen] == [note["answer"] for note in notes.values()]
    for i in (0, 2, 51):
        scale = 1.5 if i % 3 == 2 else 1.0
        want = np.asarray(sc.render(made[i], scale), np.float32)
        got = np.asarray(Image.open(gqa_dir / "data" / "images" / f"n{9_000_000 + i}.jpg"), np.float32)
        assert want.shape == got.shape and np.abs(want - got).mean() < 6


def test_size_and_shapes(gqa_dir):
    images = sorted((gqa_dir / "data" / "images").glob("*.jpg"))
    assert len(images) == 100
    assert sum(p.stat().st_size for p in gqa_dir.rglob("*") if p.is_file()) < 4e6
    ratios = Counter(w / h > 1 if w != h else None for w, h in (Image.open(p).size for p in images))
    assert min(ratios[True], ratios[False]) >= 10 and ratios[None] >= 30
