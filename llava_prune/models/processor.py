"""The processor of a checkpoint in transformers' format: image processor, tokenizer and chat template."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import PROCESSOR, read_json

WHOLE = "processor_config.json"
"""File name of a processor's settings in newer transformers; older releases write only PROCESSOR."""
TEMPLATES = ("chat_template.jinja", "chat_template.json")
CLIP_LIKE = ("CLIP", "Llava", "LlavaNext")
"""Image processors that resize and crop like CLIP's. They differ only in the steps before, which LLaVA's code does."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processor:
    """The parts of an AutoProcessor, without the video processor.

    Attributes:
        image_processor: the checkpoint's image processor.
        tokenizer: the checkpoint's tokenizer.
        chat_template: a Jinja template; None if the checkpoint has none.
    """

    image_processor: Any
    tokenizer: Any
    chat_template: str | None


def load_processor(folder: Path, tokenizer: Any) -> Any:
    """Load the processor of a checkpoint; None if it has no tokenizer or no readable processor.

    Raises:
        ValueError: for broken files.
    """
    files = [folder / name for name in (WHOLE, PROCESSOR) if (folder / name).is_file()]
    if tokenizer is None or not files:
        return None
    for file in files:
        read_json(file)
    from transformers import AutoImageProcessor, AutoProcessor

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        return AutoProcessor.from_pretrained(str(folder), **options)
    except Exception as error:  # such as errors of other libraries about packages that are not installed
        log.debug("%s: no AutoProcessor (%s)", folder, error)
    try:
        images = AutoImageProcessor.from_pretrained(str(folder), **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        log.warning("%s: its processor cannot be loaded (%s: %s)", folder, type(error).__name__, reason)
        return None
    return Processor(images, tokenizer, _template(folder) or getattr(tokenizer, "chat_template", None))


def _template(folder: Path) -> str | None:
    for name in TEMPLATES:
        if (folder / name).is_file():
            if name.endswith(".jinja"):
                return (folder / name).read_text(encoding="utf-8")
            return read_json(folder / name).get("chat_template")
    return None


def clip_settings(folder: Path) -> dict[str, Any] | None:
    """Read the image settings of a checkpoint whose image processor is CLIP's or LLaVA's; None for any other.

    Raises:
        ValueError: for broken files.
    """
    found: dict[str, Any] | None = None
    if (folder / WHOLE).is_file():
        found = read_json(folder / WHOLE).get("image_processor")
    if found is None and (folder / PROCESSOR).is_file():
        found = read_json(folder / PROCESSOR)
    if not isinstance(found, dict):
        return None
    kind = str(found.get("image_processor_type") or found.get("feature_extractor_type") or "CLIPImageProcessor")
    known = kind.partition("ImageProcessor")[0] in CLIP_LIKE or kind == "CLIPFeatureExtractor"
    return found if known else None
