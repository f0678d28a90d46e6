"""Every command of the documents runs, or is listed here with the reason why it does not.

Commands run on the first two questions, in one process, and write into a temporary folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .test_docs import DOCS, ROOT, blocks, relative

NOT_RUN = {
    r"liuhaotian/|llava-hf/|photo\.jpg|MODEL=": "needs a checkpoint, data or an image of the user",
    r"playground/data/eval": "needs the original benchmarks",
    r"^pip install|setup\.sh": "installs packages",
    r"scripts/test": "runs these tests",
    r"^sbatch|^export|^cd |scripts/v1_5": "needs a cluster or another repository; tests/scripts has stand-ins",
    r"CUDA_VISIBLE_DEVICES|GPUS=|gpu_check": "needs a GPU; tests/bench rehearses gpu_check.sh",
    r"llava-prune demo|llava\.serve": "starts a server; tests/eval/test_demo_page.py and tests/scripts do",
    r"playground\.tiny": "regenerates or trains the miniature model; tests/tiny covers it",
    r"scripts/(scale|bench)/|llava-prune bench|timeit|^S=": "measures for minutes; tests/bench and tests/eval cover it",
    r"equal_flops": "77 runs on each of nine benchmarks; tests/eval and tests/report cover it",
    r"norm\.py|answers\.jsonl|my-sweep\.yaml": "needs a file of the reader; tests/eval and tests/methods cover it",
    r"--runs playground/results/bench": "needs a measurement",
    r"^lmms-eval|run\.py": "needs the toolkit; scripts/test_integrations.sh runs it",
    r"torchrun --standalone|accelerate launch": "starts four processes; tests/eval/test_parallel.py covers it",
}
"""Patterns of commands that are not run, and why."""


def commands(path: Path) -> list[str]:
    """Return the commands of a document's bash blocks, without comments; a command that spans lines is joined."""
    lines = "\n".join(code for _, code, _ in blocks(path, "bash")).replace("\\\n", " ").split("\n")
    return [line for line in (re.sub(r"\s+#.*", "", raw).strip() for raw in lines) if line and line[0] != "#"]


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), None)


WITH_COMMANDS = [relative(p) for p in DOCS if any(reason(c) is None for c in commands(p))]


def test_every_reason_is_used() -> None:
    listed = [command for path in DOCS for command in commands(path)]
    assert [p for p in NOT_RUN if not any(re.search(p, command) for command in listed)] == []


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_commands_run(name: str, tmp_path: Path) -> None:
    """The commands of a document succeed when they run one after another."""
    for folder in ("scripts", "playground/data", "playground/models"):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        (tmp_path / folder).symlink_to(ROOT / folder)
    settings = {"STORE": str(tmp_path / "playground" / "results"), "LIMIT": "2", "PROCS": "1"}
    env = {"VENV": sys.prefix, **os.environ, **settings, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    todo = [command for command in commands(ROOT / name) if reason(command) is None]
    if any(re.search(r"llava-prune (results|figure|report)", command) for command in todo):
        todo.insert(0, "llava-prune eval gqa,pope --method autoprune,fastervlm,random --tokens 192,128,64")
    for command in todo:
        here = command.replace(".venv/bin/", "").replace("bash scripts/", f"bash {ROOT}/scripts/")
        here = here.replace("gqa/llava-tiny/", "gqa/llava-tiny-first2/")  # the folder of a run with LIMIT=2
        done = subprocess.run(["bash", "-c", here], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr, command
