"""Find the package that a model belongs to."""

from __future__ import annotations

from typing import Any

from ..runtime.decoder import ARCHITECTURES, architecture
from .base import Family
from .hf import HF
from .llava import Llava

KNOWN = ", ".join(ARCHITECTURES.values())


def family_of(model: Any) -> Family:
    """Return the family of the package that `model` belongs to.

    Raises:
        ValueError: for a model that is not supported. The message lists the supported ones.
    """
    for family in (Llava(), HF()):
        if family.matches(model):
            language = family.language_model(model)
            if architecture(language) is None:
                raise ValueError(
                    f"{type(model).__name__} with the language model {type(language).__name__} is not supported; the "
                    f"decoder layers must be those of {KNOWN} (transformers)"
                )
            return family
    raise ValueError(
        f"{type(model).__name__} is not a supported LLaVA model; give LlavaLlamaForCausalLM or LlavaMistralForCausalLM "
        "(package llava), or LlavaForConditionalGeneration, LlavaNextForConditionalGeneration or "
        f"LlavaOnevisionForConditionalGeneration (transformers), whose language model is one of {KNOWN}"
    )
