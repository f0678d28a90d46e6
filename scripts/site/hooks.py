"""Hooks of the documentation site, which adapt pages that GitHub shows without changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Fill changelog.md, and replace links to files outside of docs/, which the site lacks, by their names."""
    if page.file.src_uri == "changelog.md":
        markdown = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    here = (Path(config["docs_dir"]) / page.file.src_uri).parent

    def name(found: re.Match[str]) -> str:
        target = (here / found[2]).resolve()
        inside = target.is_relative_to(Path(config["docs_dir"])) and "notebooks" not in target.parts
        return found[0] if inside else f"`{target.relative_to(ROOT).as_posix()}`"

    return LINK.sub(name, markdown)
