"""The documents are correct: their Python code runs, their tables match the code, and the files they name exist."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import LlavaProcessor

import llava_prune
from llava_prune.methods import registry

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / n for n in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
IMAGE = ROOT / "playground/data/mini/gqa/data/images/n9000000.jpg"
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
BLOCK = re.compile(r"(?:<!-- test: ([^>]*?) -->\n)?^```(\w*)\n(.*?)^```", re.S | re.M)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[tuple[str, str, int]]:
    """Return (instruction, code, line) of every fenced block of a language."""
    text = path.read_text(encoding="utf-8")
    found = [m for m in BLOCK.finditer(text) if m[2] == language]
    return [(m[1] or "", m[3], text[: m.start(3)].count("\n") + 1) for m in found]


WITH_PYTHON = [name for name in map(relative, DOCS) if blocks(ROOT / name, "python")]


@pytest.fixture(scope="module")
def ready() -> dict[str, Any]:
    """Return the variables that every document may use: a transformers model, a batch, a processor and an image."""
    torch.manual_seed(0)
    loaded = llava_prune.load(ROOT / "playground/models/llava-tiny", family="hf", dtype="float32", device="cpu")
    image = [loaded.model.config.image_token_id] * loaded.n_visual
    ids = torch.tensor([[1, 5, 7, *image, 9, 11, 13], [0, 1, 5, *image, 8, 12, 14]])
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    size = loaded.model.config.vision_config.image_size
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, size, size)}
    tokenizer = loaded.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        loaded.image_processor, tokenizer, patch_size=loaded.model.config.vision_config.patch_size,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    image = Image.open(IMAGE).convert("RGB")
    return {"model": loaded.model, "inputs": inputs, "processor": processor, "image": image}


@pytest.fixture
def clean(clean_registry: None) -> Any:
    """Undo the registrations and imports of documents."""
    yield
    for name in ("norm", "cls-top"):
        sys.modules.pop(name, None)


def run_document(path: Path, ready: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the Python blocks of a document in one namespace and return it.

    A block marked "compile, REASON" is only compiled. A block marked "method NAME" runs as a module of that name.
    """
    names: dict[str, Any] = dict(ready)
    for instruction, code, line in blocks(path, "python"):
        compiled = compile("\n" * (line - 1) + code, str(path), "exec")
        if instruction.startswith("compile"):
            assert instruction.startswith("compile, "), f"{path}:{line}: give a reason"
            continue
        if instruction.startswith("method "):
            name = instruction.removeprefix("method ")
            (folder / f"{name}.py").write_text(code, encoding="utf-8")
            module = ModuleType(name)
            module.__file__ = str(folder / f"{name}.py")
            sys.modules[name] = module  # dataclasses look up their module
            exec(compiled, module.__dict__)
        else:
            assert not instruction, f"{path}:{line}: {instruction}"
            exec(compiled, names)
    return names


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_blocks_run(name: str, ready: dict[str, Any], clean: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    before = "forward" in ready["model"].model.language_model.__dict__
    names = run_document(ROOT / name, ready, tmp_path)
    assert ("forward" in ready["model"].model.language_model.__dict__) == before == False  # noqa: E712
    if name == "README.md":
        record = names["handle"].last
        assert record.tokens_in[:, 0].tolist() == [576, 576]
        assert record.tokens_out.float().mean(1).tolist() == pytest.approx([64, 64], abs=1)
    if name == "docs/transformers.md":
        out, start = names["out"], names["inputs"]["input_ids"].shape[1]
        assert names["streamed"] == names["processor"].decode(out[0, start:], skip_special_tokens=True)
        assert torch.equal(names["again"], out) and torch.equal(names["adapted"], out)  # a fresh LoRA changes nothing


@pytest.mark.parametrize("name", ["norm", "cls-top"])
def test_example_methods_do_what_they_say(name: str, ready: dict[str, Any], clean: Any, tmp_path: Path) -> None:
    model, inputs = ready["model"], ready["inputs"]
    run_document(ROOT / "docs/adding-a-method.md", ready, tmp_path)
    method = llava_prune.build(name, tokens=40)
    layers = len(model.model.language_model.layers)
    with torch.inference_mode():
        whole = model(**inputs).logits[:, -1]
        with llava_prune.pruned(model, method, check=True) as handle:
            out = model(**inputs, use_cache=True)
            text = inputs["input_ids"].shape[1] - 576
            lengths = [layer.keys.shape[2] - text for layer in out.past_key_values.layers]
            assert handle.last.tokens_in.tolist() == [method.plan(576, layers)] * 2
            assert lengths == method.plan(576, layers)
            assert handle.last.kept[-1].shape == (2, 40)
            assert not torch.equal(out.logits[:, -1], whole)
        with llava_prune.pruned(model, name, tokens=576):
            assert torch.allclose(model(**inputs).logits[:, -1], whole, atol=2e-5)
        assert torch.equal(model(**inputs).logits[:, -1], whole)
    if name == "norm":
        states = hidden_after(model, inputs, 2)
        visual = inputs["input_ids"] == model.config.image_token_id
        for b in range(2):
            best = states[b][visual[b]].norm(dim=1).topk(40).indices.sort().values
            assert handle.last.kept[1][b].tolist() == best.tolist()


@torch.inference_mode()
def hidden_after(model: Any, inputs: dict[str, Any], layers: int) -> torch.Tensor:
    """Return the output of the first `layers` decoder layers of the unpruned model."""
    caught = []
    hook = model.model.language_model.layers[layers - 1].register_forward_hook(
        lambda module, args, output: caught.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    try:
        model(**inputs)
    finally:
        hook.remove()
    return caught[0]


def signature_tables() -> list[tuple[str, str, dict[str, Any]]]:
    out = []
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(r"<!-- signature: ([\w+-]+) -->\n((?:\|.*\n)+)", text):
            rows = [re.match(r"\| `(\w+)` \| `([^`]+)` \|", line) for line in found[2].splitlines()[2:]]
            assert all(rows), f"{relative(path)}: a row of the table of {found[1]} has no name and default"
            out.append((relative(path), found[1], {r[1]: ast.literal_eval(r[2]) for r in rows if r}))
    return out


def test_hyper_parameter_tables_equal_the_signatures() -> None:
    tables = signature_tables()
    assert {"autoprune", "autoprune-flash"} <= {name for _, name, _ in tables}
    for path, name, told in tables:
        real = {p.name: p.default for p in inspect.signature(registry.resolve(name)[0]).parameters.values()}
        assert told == real, f"{path}: {name}"
        assert {k: type(v) for k, v in told.items()} == {k: type(v) for k, v in real.items()}


def slug(heading: str) -> str:
    plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return plain.strip().replace(" ", "-")


@pytest.mark.parametrize("path", DOCS, ids=relative)
def test_relative_links(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), f"{relative(path)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.M)
            assert anchor in {slug(h) for h in headings}, f"{relative(path)} links to {target}"


OURS = tuple(relative(path) for path in DOCS)
MADE = ("playground/data/eval", "playground/results", "scripts/v1_5")
"""Paths that need not exist: data of users, results of runs, and files of LLaVA's repository."""


def named_paths(text: str) -> set[str]:
    """Return the repository paths named in code spans and commands."""
    spans = re.findall(r"`([^`\n]+)`", text) + [c for m in BLOCK.finditer(text) if m[2] == "bash" for c in m[3].split()]
    starts = ("scripts/", "docs/", "tests/", "playground/", "llava_prune/")
    words = (w.split("=", 1)[-1].strip(",:;.()") for s in spans for w in s.split())
    return {w for w in words if w.startswith(starts) and not re.search(r"[<>*]", w)}


@pytest.mark.parametrize("name", OURS)
def test_named_files_exist(name: str) -> None:
    paths = {p for p in named_paths((ROOT / name).read_text(encoding="utf-8")) if not p.startswith(MADE)}
    absent = sorted(p for p in paths if not (ROOT / p).exists() and not (ROOT / "llava_prune" / p).exists())
    assert not absent
    if name == "README.md":
        assert {"scripts/eval/gqa.sh", "scripts/test.sh"} <= paths


@pytest.mark.parametrize("name", OURS)
def test_named_modules_and_symbols_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for module in re.findall(r"`((?:ops|methods|runtime|models|eval|bench|experimental)/\w+\.py)`", text):
        assert (ROOT / "llava_prune" / module).is_file(), module
    for symbol in re.findall(r"`llava_prune\.(?!json)(\w+)", text):
        assert hasattr(llava_prune, symbol) or (ROOT / "llava_prune" / symbol).is_dir(), symbol


def test_named_presets_exist() -> None:
    known = llava_prune.names()
    spans = {span for path in DOCS for span in re.findall(r"`([^`\s]+)`", path.read_text(encoding="utf-8"))}
    presets = sorted(span for span in spans if re.fullmatch(r"[\w+-]+:[\w+:-]+", span) and span.split(":")[0] in known)
    assert len(presets) >= 10
    for span in presets:
        registry.resolve(span)


REPLACED = re.compile(
    r"\b(?:[Pp]ictures?|behind|taps?|tapped|filler|folds?|folded|settled?|survivors|memo|tower pass|the door|one[dD]nn|"
    r"keep_best|next_rows|vision_rows|text_rows|deciding|if free|cannot be told from|waits? for the device|killed run|"
    r"goes on where|has not been run|(?<![Tt]here )is no (?!longer\b|more\b|such\b)\w+|"
    r"llava_prune[./](?:core|families))\b"
)
"""Words and names that documents and messages must not contain; a standard term replaces each of them."""
RIGHT = {"fold"}
"""Strings of the package that may equal such a word: a value of rich's parameter `overflow`."""


@pytest.mark.parametrize("name", OURS)
def test_standard_terms(name: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.S | re.M)
    assert REPLACED.findall(" ".join(text.split())) == []


def test_standard_terms_in_messages_and_help() -> None:
    """No string of the package (message, help text or docstring) contains a word that standard terms replace."""
    found = [(REPLACED.findall(" ".join(text.split())), text[:200]) for text in messages() if text not in RIGHT]
    assert [pair for pair in found if pair[0]] == []


def commands() -> dict[str, set[str]]:
    """Return the subcommands of llava-prune and their flags."""
    from llava_prune.parsers import make_parser

    actions = make_parser({})._subparsers._group_actions[0]  # type: ignore[union-attr]
    return {n: {o for a in p._actions for o in a.option_strings} for n, p in actions.choices.items()}


@pytest.mark.parametrize("name", OURS)
def test_commands_and_flags_exist(name: str) -> None:
    known = commands()
    text = (ROOT / name).read_text(encoding="utf-8")
    for inside in re.findall(r"`llava-prune ([\w |]+)`", text):
        assert set(inside.replace("|", " ").split()) <= set(known), inside
    for block in (c for m in BLOCK.finditer(text) if m[2] == "bash" for c in re.sub(r"\\\n\s*", " ", m[3]).split("\n")):
        line = block.split("#")[0].split(" -- ")[0].split("-m llava_prune ")[-1]  # without the flags of a launcher
        found = re.search(r"llava-prune (\w+)", line)
        command = found[1] if found else "eval" if "gqa.sh" in line or line.startswith("eval ") else None
        if command is None:
            continue
        assert command in known, line
        assert set(re.findall(r"(?<=\s)--[\w-]+", line)) <= known[command] | {"--help"}, line


def test_environment_settings_are_flags() -> None:
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    listed = re.search(r"flag of the same name: ([A-Z_,\s]+)\.", text)
    assert listed
    names = {n.strip() for n in listed[1].split(",")}
    assert len(names) >= 10
    assert {"--" + n.lower().replace("_", "-") for n in names} <= commands()["eval"]


def messages() -> list[str]:
    """Return every string constant of the package; an f-string contributes the parts between its values."""
    out = []
    for path in (ROOT / "llava_prune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                out.append(node.value)
    return out


def test_quoted_error_messages_are_real() -> None:
    text = (ROOT / "docs/faq.md").read_text(encoding="utf-8").split("## Error messages")[1]
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.M)
    assert len(quoted) >= 15
    known = messages()
    for message in quoted:
        for part in filter(None, (p.strip() for p in message.split("…"))):
            assert any(part in k for k in known), message


def test_changelog_names_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{llava_prune.__version__}]" in text
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == llava_prune.__version__


def test_readme_names_every_method_and_keeps_its_results_block() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{n}`" in text for n in llava_prune.names())
    assert text.count("<!-- results:begin -->") == text.count("<!-- results:end -->") == 1
    assert text.index("<!-- results:begin -->") < text.index("<!-- results:end -->")


def test_the_table_of_methods_agrees_with_the_methods() -> None:
    """Every method has one line, with the positions, the requirements and the licence that the method states."""
    text = (ROOT / "docs/methods/index.md").read_text(encoding="utf-8")
    lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in re.findall(r"^\| \[`.*", text, re.M)]
    found = {name: cells for cells in lines for name in re.findall(r"\[`([\w+-]+)`\]", cells[0])}
    assert sorted(found) == llava_prune.names()
    for name, (_, _, _, needs, positions, licence, checked) in found.items():
        method = llava_prune.build(name)
        assert positions.split(" ")[0] == method.positions and checked, name
        assert {n for n in method.requires if n not in needs} == set(), name
        assert method.info.licence.startswith(licence), name


@pytest.mark.parametrize("name", OURS)
def test_lines_and_fences(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").split("\n")
    assert sum(line.startswith("```") for line in lines) % 2 == 0
    assert lines[-1] == "" and not any(line != line.rstrip() for line in lines)


def test_the_site_has_every_page() -> None:
    """The navigation of mkdocs.yml lists every document; scripts/site/build.sh builds the site and checks its links."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- (?:[^:\n]+: )?([\w/-]+\.md)$", text, re.M)
    assert sorted(listed) == sorted(
        path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")
    )


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code cell gives the text stored with it, and a PNG image where an image is stored."""
    path = ROOT / "docs" / "notebooks" / "quickstart.ipynb"
    monkeypatch.chdir(path.parent)
    names: dict[str, Any] = {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"cell {number}", "exec"), names)
            value = None if last is None else eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        stored = cell["outputs"]
        assert printed.getvalue() == "".join("".join(o["text"]) for o in stored if o["output_type"] == "stream")
        for data in (o["data"] for o in stored if o["output_type"] == "execute_result"):
            if "image/png" in data:
                assert value._repr_png_().startswith(b"\x89PNG")
            else:
                assert repr(value) == "".join(data["text/plain"])
