"""Prompt text and token ids as haotian-liu/LLaVA makes them (conversation vicuna_v1)."""

from __future__ import annotations

from typing import Any

IMAGE_ID = -200
"""Placeholder id that stands for a whole picture."""
IMAGE_MARK = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def vicuna_v1(text: str, image: bool = True) -> str:
    """The whole prompt of a first turn.

    Args:
        text: complete user text after the image line, instruction included.
        image: whether a picture goes before the text.

    Source: llava/conversation.py, `conv_templates["vicuna_v1"]`.
    """
    user = f"{IMAGE_MARK}\n{text}" if image else text
    return f"{SYSTEM} USER: {user} ASSISTANT:"


def token_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Ids of a prompt with -200 in place of each "<image>".

    The text is cut at the mark and every piece is tokenised on its own; the BOS of later pieces is dropped.

    Source: llava/mm_utils.py, `tokenizer_image_token`.

    Raises:
        ValueError: when the text is empty or the tokenizer gives no ids.
    """
    pieces = [list(tokenizer(piece).input_ids) for piece in prompt.split(IMAGE_MARK)]
    first = pieces[0]
    has_bos = bool(first) and first[0] == tokenizer.bos_token_id
    out = list(first)
    for piece in pieces[1:]:
        out += [IMAGE_ID, *(piece[1:] if has_bos else piece)]
    if not any(i != IMAGE_ID for i in out):
        raise ValueError(f"the tokenizer made no ids of {prompt[:60]!r}; is it the checkpoint's own?")
    return out


def check_tokenizer(tokenizer: Any, vocab: int, config: Any, where: str) -> None:
    """Refuse a tokenizer that cannot belong to the model.

    Args:
        tokenizer: the loaded tokenizer or None.
        vocab: rows of the model's embedding.
        config: the language model's config (`bos_token_id`, `eos_token_id` are compared when they are ints).
        where: the checkpoint, for the message.

    Raises:
        ValueError: when there is none, it has more pieces than the model embeds, or other special ids.
    """
    if tokenizer is None:
        raise ValueError(
            f"{where} has no tokenizer; put the tokenizer.model or tokenizer.json it was trained with there"
        )
    if len(tokenizer) > vocab:
        raise ValueError(
            f"{where}: the tokenizer has {len(tokenizer)} pieces but the model embeds {vocab}; "
            "this is another model's tokenizer, put the right one in the checkpoint folder"
        )
    for name in ("bos_token_id", "eos_token_id"):
        ours, theirs = getattr(tokenizer, name, None), getattr(config, name, None)
        if isinstance(theirs, int) and ours != theirs:
            raise ValueError(
                f"{where}: the tokenizer's {name} is {ours}, the model's is {theirs}; "
                "this is another model's tokenizer, put the right one in the checkpoint folder"
            )
