"""Every method on a stand-in for a GPU: tensors are on one device, and the host waits only where it must."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contract.test_synchronisations import PROMPT, beyond

SIZES = "hf.py:_sizes_on_host"
"""The read of the image sizes of transformers' LLaVA-NeXT, at the start of a request."""


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this release of torch cannot register a device in Python",
)
@pytest.mark.parametrize("family", ["hf", "llava", "next", "llava-anyres"])
def test_tensors_are_on_one_device(family: str, root: Path) -> None:
    """Kept tokens and answers equal those on the CPU; the waits are those that the method is known for."""
    if "llava" in family and importlib.util.find_spec("llava") is None:
        pytest.skip("package llava is not installed")
    command = [sys.executable, "-m", "tests.contract.on_device", family]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 2 * 25
    for case, got in found.items():
        name = case.split(",")[0]
        crops = family in ("next", "llava-anyres")
        more = ["vision.py:compact"] if crops and name == "hired" else []
        expected = [PROMPT, *beyond(name), *more, *([SIZES] if family == "next" else [])]
        assert got == {"kept": True, "ids": True, "waits": sorted(expected)}, case
