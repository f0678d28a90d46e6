"""The mini versions of the other eight benchmarks: right answers, balance, and files that the generator writes."""

import base64
import csv
import filecmp
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from playground.tiny import make_suite as ms
from playground.tiny import scenes as sc
from playground.tiny import suite as su
from playground.tiny import tokenizer as tk


@pytest.fixture(scope="module")
def mini(gqa_dir):
    return gqa_dir.parent


def table(path):
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle, delimiter="\t"))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("maker", su.MME)
def test_yes_and_no_are_told_apart_by_the_scene(maker):
    made = 0
    for seed in range(40):
        scene = sc.make_scene(seed)
        both = [maker(scene, np.random.default_rng(seed), flag) for flag in (True, False)]
        if None in both:
            continue
        made += 1
        assert [c.answer for c in both] == ["yes", "no"] and both[0].text != both[1].text
        if maker is su.mme_ocr:
            sign = next(t.mark for t in scene.things if t.shape == "sign")
            assert f'"{sign}"' in both[0].text and f'"{sign}"' not in both[1].text
        if maker is su.mme_color:
            names = {t.name for t in scene.things}
            said = [" ".join(c.text.removesuffix(" in the image?").split()[-2:]) for c in both]
            assert said[0] in names and said[1] not in names
    assert made >= 8


@pytest.mark.parametrize("chinese", [False, True])
def test_the_letter_names_the_right_option(chinese):
    kinds = Counter()
    for seed in range(120):
        scene = sc.make_scene(seed)
        case = su.choice(scene, np.random.default_rng(seed), chinese=chinese)
        if case is None:
            continue
        kinds[case.kind.split("/")[1]] += 1
        right = case.options["ABCD".index(case.answer)]
        assert len(set(case.options)) == len(case.options) >= 2
        if case.kind.endswith("color"):
            thing = scene.things[case.things[0]]
            assert right == (su.COLOURS_CN[thing.colour] if chinese else thing.colour)
        if case.kind.endswith("count"):
            assert right == str(len(case.things))
    assert set(kinds) == {"color", "shape", "count", "word", "number", "side"}


def test_prompts_without_an_image_share_the_system_text(model_dir):
    model = tk.load(model_dir)
    case = su.science_text(sc.make_scene(0), np.random.default_rng(0))
    ids = tk.after_system(model, case.prompt)
    assert model.decode(ids).strip() == f"{case.prompt} ASSISTANT:"
    right = case.options["AB".index(case.answer)]
    assert f"{case.text.split()[-1].rstrip('?')} is {right}." in case.hint


@pytest.mark.parametrize("name", ["pope", "mmbench", "mmbench_cn"])
def test_files_are_those_the_generator_writes(name, mini, tmp_path):
    ms.WRITERS[name](tmp_path / name)
    made = sorted(p.relative_to(tmp_path) for p in (tmp_path / name).rglob("*") if p.is_file())
    kept = sorted(p.relative_to(mini) for p in (mini / name).rglob("*") if p.is_file())
    assert made == kept
    for path in made:
        if path.suffix in (".json", ".jsonl"):
            assert filecmp.cmp(tmp_path / path, mini / path, shallow=False), path
        elif path.suffix == ".tsv":  # images inside may differ with the JPEG library
            fresh, shipped = table(tmp_path / path), table(mini / path)
            for row in fresh + shipped:
                del row["image"]
            assert fresh == shipped


def test_sizes(mini):
    assert sum(p.stat().st_size for p in mini.rglob("*") if p.is_file()) < 25e6
    counts = {
        "pope": len(lines(mini / "pope" / "llava_pope_test.jsonl")),
        "mme": len(lines(mini / "MME" / "llava_mme.jsonl")),
        "mmbench": len(table(mini / "mmbench" / "mmbench_dev_20230712.tsv")),
        "mmbench_cn": len(table(mini / "mmbench_cn" / "mmbench_dev_cn_20231003.tsv")),
        "sqa": len(json.loads((mini / "scienceqa" / "llava_test_CQM-A.json").read_text(encoding="utf-8"))),
        "textvqa": len(lines(mini / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl")),
        "ocrbench": len(json.loads((mini / "OCRBench" / "OCRBench.json").read_text(encoding="utf-8"))),
        "vqav2": len(lines(mini / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl")),
    }
    assert all(100 <= n <= 400 for n in counts.values()), counts


def test_mme_has_a_yes_and_a_no_for_every_image(mini):
    tasks = Counter()
    for path in (mini / "MME" / "MME_Benchmark_release_version").rglob("*.txt"):
        said = [line.split("\t")[1] for line in path.read_text(encoding="utf-8").splitlines()]
        assert said == ["Yes", "No"] and path.with_suffix(".jpg").is_file()
        tasks[path.parent.name] += 1
    assert len(tasks) >= 8


def test_rotations_of_mmbench(mini):
    rows = table(mini / "mmbench" / "mmbench_dev_20230712.tsv")
    groups: dict[int, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(int(row["index"]) % 1_000_000, []).append(row)
    for group in groups.values():
        options = [[row[c] for c in "ABCD" if row[c]] for row in group]
        assert len(group) == len(options[0])
        assert len({row[row["answer"]] for row in group}) == 1
        for turn, shown in enumerate(options):
            assert shown == options[0][len(shown) - turn :] + options[0][: len(shown) - turn]
    Image.open(io.BytesIO(base64.b64decode(rows[0]["image"]))).convert("RGB")
