"""Modules that commands load, and imports allowed between the parts of the package (lazy imports included)."""

from __future__ import annotations

import ast
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llava_prune"
COMMANDS = ("eval", "table", "sweep", "results", "figure", "report", "show", "bench")
COMMANDS += ("score", "data", "methods", "flops", "run", "demo")

# loaded modules ------------------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "rich", "yaml", "numpy", "PIL", "matplotlib", "pandas", "jinja2", "gradio")
COMPILER = ("torch._dynamo", "torch._inductor")
RUN = """
import json, sys
argv = json.loads(sys.argv[1])
try:
    if argv:
        from llava_prune.cli import main
        main(argv)
    else:
        import llava_prune
except SystemExit:
    pass
sys.stderr.write("\\n" + json.dumps(sorted(sys.modules)))
"""


def loaded(*argv: str) -> set[str]:
    """Return the modules that a command loads; without arguments, those that `import llava_prune` loads."""
    command = [sys.executable, "-c", RUN, json.dumps(argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stderr.strip().split("\n")[-1]))


def below(modules: set[str], names: tuple[str, ...]) -> list[str]:
    """Return the modules that are one of `names` or inside one of them."""
    return sorted(m for m in modules if m in names or m.startswith(tuple(f"{n}." for n in names)))


def test_the_package_alone() -> None:
    assert not below(loaded(), HEAVY)


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)], ids=" ".join)
def test_help_loads_nothing_heavy(argv: list[str]) -> None:
    assert not below(loaded(*argv), HEAVY)


def test_help_is_quick() -> None:
    """Help takes less than 0.5 s of CPU time in the best of three runs."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "llava_prune", "--help"], cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5, times


def test_data_and_score_load_no_torch(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question_id": "1", "text": "yes"}\n')
    for argv in (["data", "gqa"], ["data", "all", "--json"]):
        assert not below(loaded(*argv), ("torch", "transformers")), argv
    scored = loaded("score", "gqa", "--answers", str(answers), "--data", "playground/data/mini/gqa")
    assert "llava_prune.eval.score" in scored and not below(scored, ("torch", "transformers"))


def test_results_load_no_torch(tmp_path: Path) -> None:
    """An empty folder needs no torch; tests/report checks folders with runs."""
    modules = loaded("results", str(tmp_path))
    assert "llava_prune.report.results" in modules
    assert not below(modules, ("torch", "transformers", "pandas", "llava_prune.eval"))


@pytest.mark.parametrize("argv", [["flops"], ["methods"], ["methods", "--method", "visionzip+autoprune", "--json"]])
def test_tables_load_no_compiler_and_no_transformers(argv: list[str]) -> None:
    modules = loaded(*argv)
    assert "llava_prune.methods.registry" in modules and not below(modules, (*COMPILER, "transformers"))


# allowed imports -----------------------------------------------------------------------------------------------

CORE = ("ops", "methods", "runtime", "models", "handle")
ALLOWED = {
    "ops": {"ops"},
    "methods": {"methods", "ops"},
    "runtime": {"runtime", "methods", "ops"},
    "models": {"models", "runtime", "methods", "ops"},
    "handle": {"models", "runtime", "methods", "ops"},  # and experimental, inside functions only
    "experimental": {"experimental", "runtime", "methods", "ops"},
    "arguments": {"methods", "ops"},
    "bench": {"bench", "report", "experimental", "arguments", "console", "", *CORE},
    "eval": {"eval", "bench", "report", "stats", "experimental", "arguments", "console", "", *CORE},
    "report": {"report", "arguments", "console", "stats"},
    "stats": set(),
    "llava_programs": {"llava_scripts", *CORE},
    "llava_scripts": set(),
    "integrations": {"integrations", "eval", "methods", "report", "runtime", ""},
    "parsers": {"arguments", ""},
    "cli": {"eval", "bench", "report", "integrations", "parsers", "console", "llava_programs"},
    "console": set(),
    "__main__": {"cli"},
    "": set(),
}
"""Part of the package -> parts that it may import; "" is llava_prune itself."""
LAZY_ONLY = {"handle": "experimental", "bench": "experimental", "eval": "experimental", "runtime": "report"}
"""Parts that import another part inside functions only."""
OUTSIDE_OPS = {"torch", "math", "collections", "dataclasses", "typing", "functools", "__future__"}
INTERNALS = ("transformers.models", "transformers.cache_utils", "transformers.masking_utils")
INTERNALS += ("transformers.modeling_outputs", "transformers.modeling_utils", "transformers.integrations")
INTERNAL_USERS = {
    "llava_prune.runtime.compat": None,
    "llava_prune.models.hf": {"transformers.models.llava_next.modeling_llava_next"},  # for the grid of crops
}
"""Module -> internals of transformers that it may import (None: all)."""


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imports(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield (import, whether it is inside a function), except imports for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, lazy
        elif not _typing_only(child):
            yield from _imports(child, lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


@cache
def imports(module: str) -> list[tuple[str, bool]]:
    """Return (imported module, whether inside a function) for each import of a module, relative imports resolved."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node, lazy in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(a.name, lazy) for a in node.names]
            continue
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            inside = f"{base}.{alias.name}"
            found.append((inside if inside in modules() else base, lazy))
    return found


def ours(name: str) -> bool:
    return name.split(".")[0] == "llava_prune"


def test_the_reader_finds_imports() -> None:
    """Imports are found; otherwise the rules below would pass for any package."""
    assert ("llava_prune.methods.base", False) in imports("llava_prune.methods.planner")
    assert ("llava_prune.eval.command", True) in imports("llava_prune.cli")
    assert ("llava_prune.arguments", False) in imports("llava_prune.parsers")
    assert any(lazy and "experimental" in name for name, lazy in imports("llava_prune.handle"))
    assert not any(ours(name) for name, _ in imports("llava_prune"))


@pytest.mark.parametrize("module", modules())
def test_parts_import_what_they_may(module: str) -> None:
    part = part_of(module)
    assert part in ALLOWED, f"{module}: add its part to the rules"
    for name, lazy in imports(module):
        if not ours(name):
            continue
        wanted = part_of(name)
        allowed = wanted in ALLOWED[part] or (lazy and LAZY_ONLY.get(part) == wanted)
        assert allowed, f"{module} imports {name}"
        assert lazy or LAZY_ONLY.get(part) != wanted, f"{module} imports {name} outside a function"


@pytest.mark.parametrize("module", [m for m in modules() if part_of(m) == "ops"])
def test_ops_need_torch_only(module: str) -> None:
    outside = {name.split(".")[0] for name, _ in imports(module) if not ours(name)}
    assert outside <= OUTSIDE_OPS, f"{module} imports {outside - OUTSIDE_OPS}"


@pytest.mark.parametrize("module", modules())
def test_internals_of_transformers(module: str) -> None:
    """Only a few listed modules import internals of transformers."""
    internal = {name for name, _ in imports(module) if name.startswith(INTERNALS)}
    allowed = INTERNAL_USERS.get(module, set())
    assert allowed is None or internal <= allowed, f"{module} imports {sorted(internal)}"


def test_no_circles() -> None:
    """No import cycles exist, not even through imports inside functions. Plug-ins found by name do not count."""
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module in done:
            return
        for name, _ in imports(module):
            if name in modules() and name != module:
                visit(name, (*above, module))
        done.add(module)

    for module in modules():
        visit(module, ())
