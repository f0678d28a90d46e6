"""The interface through which the runtime accesses the LLaVA of either package."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from ..runtime.geometry import Geometry
from ..runtime.merging import Tower

TOWERS = {"CLIPVisionModel": ("CLIP", 1), "CLIPVisionTransformer": ("CLIP", 1), "Dinov2Model": ("DINOv2", 1)}
TOWERS |= {"SiglipVisionModel": ("SigLIP", 0), "SiglipVisionTransformer": ("SigLIP", 0)}
"""Vision towers by class name: (kind, number of tokens before the patches)."""


class Family(Protocol):
    """One of the two packages. Its methods take the whole model and return parts or facts of it; nothing is stored."""

    name: str

    def matches(self, model: Any) -> bool:
        """Return whether `model` is an instance of the package's classes."""

    def language_model(self, model: Any) -> Any:
        """Return the language model."""

    def tower(self, model: Any) -> Any:
        """Return the module whose call encodes images; the image cache wraps it."""

    def encoder(self, model: Any) -> Any:
        """Return the vision model inside `tower`."""

    def projector(self, model: Any) -> nn.Module:
        """Return the module between vision tower and language model."""

    def tower_facts(self, model: Any) -> Tower:
        """Return the facts against which the requirements of a method are checked."""

    def geometry(self, model: Any) -> Geometry:
        """Return the geometry, which maps visual tokens to boxes in the image."""

    def max_visual(self, model: Any) -> int:
        """Return the largest number of visual tokens of an image."""

    def install(self, model: Any, handle: Any) -> list[Any]:
        """Replace methods so that every outermost call opens a request and finds the visual tokens.

        Returns:
            The replacements, each with a method `remove`.
        """


def block_index(select_layer: int, depth: int) -> int:
    """Return the block whose output is hidden_states[select_layer]; hidden_states[0] are the embeddings.

    Raises:
        ValueError: if that state is not the output of a block.
    """
    index = depth + select_layer if select_layer < 0 else select_layer - 1
    if not 0 <= index < depth:
        raise ValueError(
            f"vision feature layer {select_layer} is not the output of any of the tower's {depth} blocks; give a layer "
            f"from {-depth} to -1, or from 1 to {depth}"
        )
    return index


def encoder_blocks(encoder: Any) -> Any:
    """Return the blocks of a vision model, which older releases wrap once more; () if they are not found."""
    inner = getattr(getattr(encoder, "vision_model", encoder), "encoder", None)
    return getattr(inner, "layers", getattr(inner, "layer", ()))


def tower_kind(encoder: Any) -> tuple[str, int | None]:
    """Return the kind of a vision model and its number of tokens before the patches; None for an unknown tower."""
    name = type(encoder).__name__
    return TOWERS.get(name, (name, None))


def image_tokens(rows: int, columns: int, crops: int, tall: int) -> int:
    """Return the largest number of visual tokens of an image: its crops, and a newline token for each row of patches.

    Args:
        rows, columns: patches of a crop.
        crops: largest number of crops, 1 if images are encoded whole.
        tall: largest number of rows of crops.
    """
    return rows * columns if crops == 1 else crops * rows * columns + tall * rows


def refuse_wrappers(model: Any) -> None:
    """Refuse wrappers whose calls would bypass the method.

    Raises:
        ValueError: for such a wrapper. The message says what to attach to instead.
    """
    if is_pipeline(model):
        model = model.model
    kind = type(model).__name__
    if kind in ("DataParallel", "DistributedDataParallel"):
        raise ValueError(
            f"{kind} is not supported: its copies of the model do not share the state of a request. Attach to the "
            "model inside it (model.module), and run one process for each device"
        )
    if kind == "OptimizedModule" or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"{kind} is compiled (torch.compile), and compiled code does not see a method that is attached later; "
            "attach to the model itself (model._orig_mod of what torch.compile returned), and compile afterwards"
        )


def is_pipeline(model: Any) -> bool:
    """Return whether this is a transformers pipeline, which holds a model."""
    return any(c.__name__ == "Pipeline" and c.__module__.startswith("transformers.") for c in type(model).__mro__)


def peel(model: Any) -> Any:
    """Return the LLaVA inside a pipeline, PeftModel, compiled model or DeepSpeed inference engine; else the model."""
    if is_pipeline(model):
        return peel(model.model)
    if type(model).__name__ == "OptimizedModule":
        return peel(model._orig_mod)
    if type(model).__name__ == "InferenceEngine":
        return peel(model.module)
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        return peel(model.get_base_model())
    return model
