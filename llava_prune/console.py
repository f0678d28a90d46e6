"""Where commands print: tables and JSON to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands import what they need: --help stays quick
    from rich.console import Console


def stdout() -> Console:
    """A console for tables, wide enough in files and pipes too."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def stderr() -> Console:
    """A console for messages and progress."""
    from rich.console import Console

    return Console(stderr=True)


def emit(value: Any) -> None:
    """Print JSON."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
