"""Plugins for evaluation toolkits. Each toolkit imports its own plugin; nothing else in the package imports them."""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """Return the model's manifest, which lmms-eval finds through the entry point group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llava_prune", simple_class_path="llava_prune.integrations.lmms_eval.LlavaPrune")
