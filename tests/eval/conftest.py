"""A stand-in for the model, and small files of all nine benchmarks."""

from __future__ import annotations

import base64
import io
import json
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import llava_prune
from llava_prune.eval import asking, run
from llava_prune.eval.protocol import Protocol
from llava_prune.ops.counts import Size
from llava_prune.runtime.geometry import Geometry

SHORT = "Answer the question using a single word or phrase."


class Tokenizer:
    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[1, *map(ord, text)])

    def __len__(self) -> int:
        return 200

    def get_vocab(self) -> dict[str, int]:
        return {}

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return ["Yes." if i % 2 else " no " for i in ids[:, 0].tolist()]


class Model:
    """A stand-in for the model whose answers depend on the prompt length only; call n raises `fail[n]`."""

    family, n_visual, max_visual, crops, tokenizer = "hf", 16, 16, 1, Tokenizer()
    bits, engine, device = None, None, torch.device("cpu")
    size = Size(layers=8, hidden=8, intermediate=16, visual=16)
    geometry = Geometry(grid=(4, 4), side=8)
    image_processor = SimpleNamespace(image_mean=[0.5] * 3, to_dict=dict)

    def __init__(self, fail: dict[int, BaseException] | None = None) -> None:
        weight = torch.nn.Embedding(200, 8, _weight=torch.zeros(200, 8))
        self.model = SimpleNamespace(
            config=SimpleNamespace(to_dict=dict),
            generation_config=None,
            named_parameters=weight.named_parameters,
            named_buffers=weight.named_buffers,
            named_modules=weight.named_modules,
            modules=weight.modules,
            get_output_embeddings=torch.nn.Identity,
            device=torch.device("cpu"),
            parameters=lambda: iter([weight.weight]),
            get_input_embeddings=lambda: weight,
            model=SimpleNamespace(vision_tower=torch.nn.Identity()),
        )
        self.calls: list[list[int]] = []
        self.fresh: list[str] = []
        self.limits: set[int] = set()
        self.fail = fail or {}

    def remember_images(self, methods: Any) -> Any:
        self.seen: set[str] = set()
        return nullcontext(SimpleNamespace(encode=self.encode, clear=self.seen.clear))

    def encode(self, keys: list[str], pixels: torch.Tensor) -> None:
        assert len(keys) == len(pixels)
        self.fresh += [k for k in keys if k not in self.seen]
        self.seen |= set(keys)

    def generate(self, rows: Any, pixels: Any, sizes: Any, keys: Any, max_new_tokens: int) -> torch.Tensor:
        self.calls.append([len(r) for r in rows])
        if len(self.calls) in self.fail:
            raise self.fail[len(self.calls)]
        self.limits.add(max_new_tokens)
        if pixels is None:
            assert not any(-200 in r for r in rows)
            return torch.tensor([[len(r) % 2] for r in rows])
        assert sizes == [(6, 4)] * len(rows)
        assert self.seen >= set(keys), "a question was asked before its image was encoded"
        return torch.tensor([[len(r) % 2] for r in rows])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    @contextmanager
    def pruned(model: Any, method: Any) -> Any:
        kept = [[getattr(method, "tokens", None) or 16] * 8] * 64
        yield SimpleNamespace(
            last=SimpleNamespace(
                tokens_in=torch.tensor(kept),
                tokens_out=torch.tensor(kept),
                survival=torch.tensor([[8] * kept[0][0] + [0] * (16 - kept[0][0])] * 64),
                stats={"mi1": [1.0] * 64},
            ),
            vision=SimpleNamespace(variant=None),
        )

    monkeypatch.setattr(llava_prune, "pruned", pruned)
    monkeypatch.setattr(asking, "protocol_of", lambda *_: Protocol(pad=True))
    monkeypatch.setattr(Protocol, "pixels", lambda *_: torch.ones(3, 2, 2))

    def install(fail: dict[int, BaseException] | None = None) -> Model:
        model = Model(fail)
        monkeypatch.setattr(asking, "load_model", lambda settings: model)
        monkeypatch.setattr(run, "load_model", lambda settings: model)
        return model

    return install


def image(number: int) -> Image.Image:
    return Image.fromarray(np.full((4, 6, 3), 40 * number, np.uint8))


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image(number).save(path)


def jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def _mmbench(path: Path, question: str) -> None:
    columns = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "split")
    lines = ["\t".join(columns)]
    for index in (3, 4):
        buffer = io.BytesIO()
        image(index).save(buffer, "PNG")
        payload = base64.b64encode(buffer.getvalue()).decode()
        for turn, (a, b, answer) in enumerate((("cat", "dog", "A"), ("dog", "cat", "B"))):
            cells = (str(index + turn * 1_000_000), question, "", a, b, "", "", answer, "kind", payload, "dev")
            lines.append("\t".join(cells))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_nine(root: Path) -> Path:
    """Write the nine benchmarks with four to twelve questions each, in their original layouts; return `root`."""
    plain = [("Is it red?", "yes"), ("Is it so very blue?", "no"), ("Is it?", "yes"), ("Is it long and wide?", "no")]
    texts = [f"{q}\n{SHORT}" for q, _ in plain]
    # GQA
    base = root / "gqa"
    for i in range(2):
        save(base / "data" / "images" / f"n{i}.png", i)
    jsonl(base / "llava_gqa_testdev_balanced.jsonl",
          [{"question_id": str(i), "image": f"n{i % 2}.png", "text": t} for i, t in enumerate(texts)])  # fmt: skip
    labels = {str(i): {"answer": a, "types": {"structural": "verify"}} for i, (_, a) in enumerate(plain)}
    (base / "data" / "testdev_balanced_questions.json").write_text(json.dumps(labels))
    # ScienceQA, in a folder named sqa instead of scienceqa; every second question has no image
    rows = []
    for i, (question, _) in enumerate(plain):
        value = f"{question}\nA. one\nB. two"
        row = {
            "id": str(i),
            "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "AB"[i // 2]}],
        }
        if i % 2 == 0:
            save(root / "sqa" / "images" / "test" / str(i) / "image.png", i)
            row["image"] = f"{i}/image.png"
            row["conversations"][0]["value"] = f"<image>\n{value}"
        rows.append(row)
    (root / "sqa" / "llava_test_CQM-A.json").write_text(json.dumps(rows))
    # TextVQA: two questions about an image share one id
    base, rows, labels = root / "textvqa", [], []
    for i, (question, answer) in enumerate(plain):
        save(base / "train_images" / f"t{i // 2}.jpg", i)
        text = f"{question}\nReference OCR token: A, B\n{SHORT}"
        rows.append({"question_id": f"t{i // 2}", "image": f"t{i // 2}.jpg", "text": text})
        labels.append({"image_id": f"t{i // 2}", "question": question, "answers": [answer] * 10})
    jsonl(base / "llava_textvqa_val_v051_ocr.jsonl", rows)
    (base / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": labels}))
    # POPE
    base, rows = root / "pope", []
    for s, split in enumerate(("adversarial", "random", "popular")):
        label_rows = []
        for i, (question, answer) in enumerate(plain):
            save(base / "val2014" / f"c{i % 2}.jpg", i)
            rows.append(
                {"question_id": s * 10_000_000 + i + 1, "image": f"c{i % 2}.jpg", "text": texts[i], "category": split}
            )
            label_rows.append({"question_id": i + 1, "image": f"c{i % 2}.jpg", "text": question, "label": answer})
        jsonl(base / "coco" / f"coco_pope_{split}.json", label_rows)
    jsonl(base / "llava_pope_test.jsonl", rows)
    # MME: a flat task and one with folders
    base, rows = root / "MME", []
    release = base / "MME_Benchmark_release_version"
    for name, place in (("count/1.png", "count"), ("scene/images/2.png", "scene/questions_answers_YN")):
        save(release / name, 1)
        (release / place).mkdir(exist_ok=True)
        pair = [(f"{plain[i][0]}", plain[i][1].capitalize()) for i in (0, 1)]
        content = "".join(f"{q} Please answer yes or no.\t{a}\n" for q, a in pair)
        (release / place / f"{Path(name).stem}.txt").write_text(content)
        rows += [
            {"question_id": name, "image": name, "text": f"{q}\n{SHORT}", "category": name.split("/")[0]}
            for q, _ in pair
        ]
    jsonl(base / "llava_mme.jsonl", rows)
    _mmbench(root / "mmbench" / "mmbench_dev_20230712.tsv", "What is it?")
    _mmbench(root / "mmbench_cn" / "mmbench_dev_cn_20231003.tsv", "图中是什么？")
    # OCRBench
    rows = []
    for i, (question, answer) in enumerate(plain):
        save(root / "OCRBench" / "OCRBench_Images" / "set" / f"{i}.png", i)
        row = {"dataset_name": "set", "id": 1, "image_path": f"set/{i}.png", "type": "Scene Text-centric VQA"}
        rows.append({**row, "question": question, "answers": answer})
    (root / "OCRBench" / "OCRBench.json").write_text(json.dumps(rows))
    # VQAv2
    base = root / "vqav2"
    save(base / "test2015" / "v.jpg", 1)
    jsonl(base / "llava_vqav2_mscoco_test-dev2015.jsonl",
          [{"question_id": 1000 + i, "image": "v.jpg", "text": t} for i, t in enumerate(texts)])  # fmt: skip
    jsonl(base / "llava_vqav2_mscoco_test2015.jsonl", [{"question_id": 999 + i} for i in range(6)])
    labels = []
    for i, (_, answer) in enumerate(plain):
        ten = [{"answer": answer, "answer_id": n} for n in range(10)]
        labels.append({"question_id": 1000 + i, "answer_type": "yes/no", "question_type": "is it", "answers": ten})
    (base / "annotations.json").write_text(json.dumps({"annotations": labels}))
    return root


@pytest.fixture(scope="session")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of `make_nine`, which tests must not change."""
    return make_nine(tmp_path_factory.mktemp("nine"))
