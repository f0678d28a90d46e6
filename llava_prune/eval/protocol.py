"""The protocol of a checkpoint: conversation template and image preprocessing, chosen as in LLaVA's own scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.config import ORIGINAL, is_original, read_config
from ..models.load import resolve
from .images import crops, pixels
from .prompt import IMAGE_ID, TEMPLATES, first_turn, token_ids

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PROCESSOR = "processor"
"""Conversation mode that uses the checkpoint's own chat template and image processor, through transformers."""
LLAMA_3, YI = 128_256, range(64_000, 64_128)
"""Smallest vocabulary of a Llama 3, and the vocabulary sizes of Yi-34B, the language model of llava-v1.6-34b."""
POINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""(height, width) of the resolutions for a config in transformers' format that states none."""


@dataclass(frozen=True)
class Protocol:
    """Prompts and preprocessing of one checkpoint.

    Attributes:
        conv_mode: conversation template, see `prompt.TEMPLATES`; or PROCESSOR.
        pad: whether images are padded to a square.
        resolutions: (width, height) of the resolutions at which images are cut into crops; empty for a model without
            crops.
    """

    conv_mode: str = "vicuna_v1"
    pad: bool = False
    resolutions: tuple[tuple[int, int], ...] = ()

    @property
    def padded(self) -> bool | None:
        """The argument `padded` for the overlays of a `Record`; None for crops, whose padding the record knows."""
        return None if self.resolutions else self.pad

    @property
    def places_known(self) -> bool:
        """Whether the place of each patch in the image follows from the image's size: with padding or in crops."""
        return self.pad or bool(self.resolutions)

    def token_ids(self, text: str, image: bool, loaded: Any) -> list[int]:
        """Return the token ids of a first turn, with -200 for the image.

        Args:
            text: user text after the image line, instruction included.
            image: whether an image precedes the text.
            loaded: the model, see `llava_prune.load`.
        """
        if self.conv_mode != PROCESSOR:
            return token_ids(first_turn(text, image, self.conv_mode), loaded.tokenizer)
        processor, token = loaded.processor, loaded.model.config.image_token_id
        content = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        prompt = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=processor.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        begins = processor.tokenizer.bos_token is not None and prompt.startswith(processor.tokenizer.bos_token)
        ids = processor.tokenizer(prompt, add_special_tokens=not begins).input_ids
        return [IMAGE_ID if i == token else i for i in ids]

    def pixels(self, image: Image, loaded: Any) -> Tensor:
        """Preprocess an image to (3, H, W) float32, or (crops, 3, H, W) for a model that sees images in crops."""
        if self.conv_mode == PROCESSOR:
            found: Tensor = loaded.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
            return found.float()
        if self.resolutions:
            return crops(image, loaded.image_processor, self.resolutions)
        return pixels(image, loaded.image_processor, self.pad)

    def check(self, loaded: Any, where: str) -> None:
        """Refuse a checkpoint that lacks the processor needed by the protocol.

        Raises:
            ValueError: naming the checkpoint, `where`.
        """
        if self.conv_mode != PROCESSOR:
            if loaded.image_processor is None:
                raise ValueError(f"{where} has no preprocessor_config.json; add that of its vision tower")
            return
        if loaded.family != "hf" or loaded.processor is None or loaded.processor.chat_template is None:
            raise ValueError(
                f"{where}: --conv-mode {PROCESSOR} needs a checkpoint in transformers' format with a processor and a "
                "chat template (processor_config.json or preprocessor_config.json, chat_template.jinja); give the name "
                f"of a conversation template ({', '.join(TEMPLATES)})"
            )


def protocol_of(model: str, conv_mode: str | None = None) -> Protocol:
    """Choose the protocol of a checkpoint from its config alone.

    Args:
        model: checkpoint folder or hub id.
        conv_mode: conversation template that replaces the checkpoint's own.

    Raises:
        ValueError: for an unknown template, or a checkpoint whose protocol is neither LLaVA-1.5's nor LLaVA-1.6's.
    """
    if conv_mode not in (None, PROCESSOR, *TEMPLATES):
        raise ValueError(f"--conv-mode {conv_mode}: choose one of {', '.join(TEMPLATES)}, {PROCESSOR}")
    config = read_config(resolve(model))
    mode = conv_mode or template_of(config, model)
    if is_original(config):
        return _original(model, config, mode)
    kind = config["model_type"]
    if kind == "llava_onevision" and mode != PROCESSOR:
        raise ValueError(
            f"{model} is a LLaVA-OneVision model, whose images package llava does not preprocess; leave out "
            f"--conv-mode {mode}, or give {PROCESSOR}"
        )
    if kind == "llava":
        return Protocol(mode, pad=mode != PROCESSOR)  # the format does not state the padding; LLaVA-1.5 pads
    points = config.get("image_grid_pinpoints") or POINTS
    return Protocol(mode, resolutions=tuple((w, h) for h, w in points))


def _original(model: str, config: dict[str, Any], mode: str) -> Protocol:
    """Return the protocol of a checkpoint in LLaVA's format.

    Raises:
        ValueError: for preprocessing or prompts that the protocols of LLaVA-1.5 and LLaVA-1.6 do not cover.
    """
    aspect = config.get("image_aspect_ratio")
    for name, value, known in (
        ("image_aspect_ratio", aspect, (None, "square", "pad", "anyres")),
        ("mm_use_im_start_end", config.get("mm_use_im_start_end"), (None, False)),
    ):
        if value not in known:
            raise ValueError(
                f"{model} has {name}={value!r}, which the protocols of LLaVA-1.5 and LLaVA-1.6 do not cover (they have "
                f"{', '.join(map(repr, known[1:]))}); give a checkpoint of one of them"
            )
    points = config["image_grid_pinpoints"] if aspect == "anyres" else []
    return Protocol(mode, aspect == "pad", tuple((w, h) for w, h in points))


def template_of(config: dict[str, Any], model: str) -> str:
    """Choose the conversation template of a checkpoint.

    LLaVA's programs choose by the name of the checkpoint (mistral, v1.6-34b, llama-2), and its benchmark scripts use
    vicuna_v1. Here the language model in the config takes precedence, so that a renamed folder gets the same template.

    Args:
        config: content of config.json.
        model: checkpoint folder or hub id.

    Source: llava/eval/run_llava.py and scripts/v1_5/eval of package llava; LLaVA-NeXT's for Llama 3 and Qwen.
    """
    name, text = Path(model).name.lower(), config
    language = ORIGINAL.get(config["model_type"], "llama")
    if not is_original(config):
        text = config["text_config"]
        language = text.get("model_type", "llama")
        tower = (config.get("vision_config") or {}).get("model_type", "clip_vision_model")
        if config["model_type"] == "llava_onevision" or not tower.startswith("clip"):
            return PROCESSOR
    if language == "mistral":
        return "mistral_instruct"
    if language.startswith("qwen"):
        return "qwen_1_5"
    vocabulary = text.get("vocab_size") or 0
    if vocabulary >= LLAMA_3:
        return "llava_llama_3"
    if "v1.6-34b" in name or vocabulary in YI:
        return "chatml_direct"
    return "llava_llama_2" if "llama-2" in name else "vicuna_v1"
