"""Prompts and token ids of haotian-liu/LLaVA (conversation template vicuna_v1)."""

from __future__ import annotations

from typing import Any

IMAGE_ID = -200
"""Token id that stands for an image in a prompt."""
IMAGE_MARK = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def vicuna_v1(text: str, image: bool = True) -> str:
    """The prompt of a first turn.

    Args:
        text: user text after the image line, instruction included.
        image: whether an image precedes the text.

    Source: llava/conversation.py, `conv_templates["vicuna_v1"]`.
    """
    user = f"{IMAGE_MARK}\n{text}" if image else text
    return f"{SYSTEM} USER: {user} ASSISTANT:"


def token_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt, with -200 for each "<image>".

    The text is split at the marks and each piece is tokenised on its own; the BOS of later pieces is dropped.

    Source: llava/mm_utils.py, `tokenizer_image_token`.

    Raises:
        ValueError: when the tokenizer returns no ids.
    """
    pieces = [list(tokenizer(piece).input_ids) for piece in prompt.split(IMAGE_MARK)]
    first = pieces[0]
    has_bos = bool(first) and first[0] == tokenizer.bos_token_id
    out = list(first)
    for piece in pieces[1:]:
        out += [IMAGE_ID, *(piece[1:] if has_bos else piece)]
    if not any(i != IMAGE_ID for i in out):
        raise ValueError(f"the tokenizer returns no ids for {prompt[:60]!r}; use the checkpoint's own tokenizer")
    return out


def check_tokenizer(tokenizer: Any, vocab: int, config: Any, where: str) -> None:
    """Refuse a tokenizer that is not the model's.

    Args:
        tokenizer: the loaded tokenizer, or None.
        vocab: rows of the model's embedding.
        config: the language model's config (`bos_token_id`, `eos_token_id` are compared when they are ints).
        where: the checkpoint, for the message.

    Raises:
        ValueError: when there is none, its vocabulary is larger than the model's, or its special ids differ.
    """
    if tokenizer is None:
        raise ValueError(
            f"{where} has no tokenizer; add the tokenizer.model or tokenizer.json that the model was trained with"
        )
    if len(tokenizer) > vocab:
        raise ValueError(
            f"{where}: the tokenizer has {len(tokenizer)} pieces but the model embeds {vocab}; "
            "it belongs to another model; put the right one in the checkpoint folder"
        )
    for name in ("bos_token_id", "eos_token_id"):
        ours, theirs = getattr(tokenizer, name, None), getattr(config, name, None)
        if isinstance(theirs, int) and ours != theirs:
            raise ValueError(
                f"{where}: the tokenizer's {name} is {ours}, the model's is {theirs}; "
                "it belongs to another model; put the right one in the checkpoint folder"
            )


INSTRUCTIONS = (
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer with the option's letter from the given choices directly.",
)
"""How to answer, at the end of a question."""


def bare(text: str, task: str) -> str:
    """A question without the instruction how to answer, but MMBench's as it is. Source: CDPruner's evaluation code."""
    if task.startswith("mmbench"):
        return text
    for instruction in INSTRUCTIONS:
        text = text.removesuffix(instruction)
    return text
