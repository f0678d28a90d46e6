"""Which package a model is of."""

from __future__ import annotations

from typing import Any

from .base import LANGUAGE_MODELS, Family
from .hf import HF
from .llava import Llava


def family_of(model: Any) -> Family:
    """The package that `model` is of.

    Raises:
        ValueError: for any other model, naming what is not supported and what is.
    """
    for family in (Llava(), HF()):
        if family.matches(model):
            language = type(family.language_model(model)).__name__
            if language not in LANGUAGE_MODELS:
                raise ValueError(
                    f"{type(model).__name__} with the language model {language} is not supported; the language model "
                    "must be a LlamaModel"
                )
            return family
    raise ValueError(
        f"{type(model).__name__} is not a supported LLaVA model; give LlavaLlamaForCausalLM (package llava), or "
        "LlavaForConditionalGeneration or LlavaNextForConditionalGeneration (transformers) with a Llama language model"
    )
