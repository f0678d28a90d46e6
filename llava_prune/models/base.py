"""What the runtime needs to know about a package's LLaVA."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from ..runtime.geometry import Geometry
from ..runtime.merging import Tower

TOWERS = {"CLIPVisionModel": ("CLIP", 1), "CLIPVisionTransformer": ("CLIP", 1), "Dinov2Model": ("DINOv2", 1)}
TOWERS |= {"SiglipVisionModel": ("SigLIP", 0), "SiglipVisionTransformer": ("SigLIP", 0)}
"""Vision towers by class name: (kind, number of tokens before the patches)."""


class Family(Protocol):
    """One package. Methods take the whole model and return its parts; nothing is stored."""

    name: str

    def matches(self, model: Any) -> bool:
        """Whether `model` is one of the package's classes."""

    def language_model(self, model: Any) -> Any:
        """The language model."""

    def tower(self, model: Any) -> Any:
        """The module whose call encodes images; the image cache wraps it."""

    def encoder(self, model: Any) -> Any:
        """The vision model inside `tower`."""

    def projector(self, model: Any) -> nn.Module:
        """The module between vision tower and language model."""

    def tower_facts(self, model: Any) -> Tower:
        """What a method's demands on the vision tower are checked against."""

    def geometry(self, model: Any) -> Geometry:
        """Where in an image its visual tokens are."""

    def max_visual(self, model: Any) -> int:
        """Largest number of visual tokens that one image can become."""

    def install(self, model: Any, handle: Any) -> list[Any]:
        """Open a request in every outermost call, and find the visual tokens; returns what removes that."""


def block_index(select_layer: int, depth: int) -> int:
    """The block whose output hidden_states[select_layer] is (hidden_states[0] being the embeddings).

    Raises:
        ValueError: when no block makes that state.
    """
    index = depth + select_layer if select_layer < 0 else select_layer - 1
    if not 0 <= index < depth:
        raise ValueError(
            f"vision feature layer {select_layer} is not the output of any of the tower's {depth} blocks; give a layer "
            f"from {-depth} to -1, or from 1 to {depth}"
        )
    return index


def encoder_blocks(encoder: Any) -> Any:
    """Blocks of a vision model, which older releases wrap once more; () where they are somewhere else."""
    inner = getattr(getattr(encoder, "vision_model", encoder), "encoder", None)
    return getattr(inner, "layers", getattr(inner, "layer", ()))


def tower_kind(encoder: Any) -> tuple[str, int | None]:
    """Kind of a vision model, and the number of its tokens before the patches; None for a tower that is not known."""
    name = type(encoder).__name__
    return TOWERS.get(name, (name, None))


def image_tokens(rows: int, columns: int, crops: int, tall: int) -> int:
    """Largest number of visual tokens of an image: its crops, and one newline token for each row of patches."""
    return rows * columns if crops == 1 else crops * rows * columns + tall * rows


def refuse_wrappers(model: Any) -> None:
    """Refuse wrappers whose calls would go around the method.

    Raises:
        ValueError: with the way out.
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
    """Whether this is a pipeline of transformers, which holds a model."""
    return any(c.__name__ == "Pipeline" and c.__module__.startswith("transformers.") for c in type(model).__mro__)


def peel(model: Any) -> Any:
    """The LLaVA inside a pipeline, a PeftModel, a compiled model or DeepSpeed's inference engine; others unchanged."""
    if is_pipeline(model):
        return peel(model.model)
    if type(model).__name__ == "OptimizedModule":
        return peel(model._orig_mod)
    if type(model).__name__ == "InferenceEngine":
        return peel(model.module)
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        return peel(model.get_base_model())
    return model
