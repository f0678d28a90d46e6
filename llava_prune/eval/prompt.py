"""Prompts and token ids of haotian-liu/LLaVA, by conversation template."""

from __future__ import annotations

from typing import Any

IMAGE_ID = -200
"""Token id that stands for an image in a prompt."""
IMAGE_MARK = "<image>"
POLITE = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
VISUAL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
CONVERSATION = "A conversation between a user and an LLM-based AI assistant. "
CONVERSATION += "The assistant gives helpful and honest answers."


def _chatml(system: str, line: str = "") -> tuple[str, str]:
    """Return the texts before and after the text of a user in ChatML; `line` ends each message."""
    start, end = "<|im_start|>", f"<|im_end|>{line}"
    return f"{start}system\n{system}{end}{start}user\n", f"{end}{start}assistant\n"


def _llama_3(system: str) -> tuple[str, str]:
    """Return the texts before and after the text of a user in the chat template of Llama 3.

    The authors' role names begin with <|start_header_id|>, and the template adds it once more for the user.
    """
    head, end = "<|start_header_id|>", "<|end_header_id|>\n\n"
    before = f"<|begin_of_text|>{head}system{end}{system}<|eot_id|>{head}{head}user{end}"
    return before, f"<|eot_id|>{head}assistant{end}"


TEMPLATES = {
    "vicuna_v1": (f"{POLITE.format('user')} USER: ", " ASSISTANT:"),
    "llava_v1": (f"{POLITE.format('human')} USER: ", " ASSISTANT:"),
    "llava_v0": (f"{POLITE.format('human')}###Human: ", "###Assistant:"),
    "mistral_instruct": ("[INST] ", " [/INST]"),
    "llava_llama_2": (f"[INST] <<SYS>>\n{VISUAL}\n<</SYS>>\n\n", " [/INST]"),
    "chatml_direct": _chatml("Answer the questions."),
    "mistral_direct": _chatml("Answer the questions."),
    "mpt": _chatml(CONVERSATION),
    "llava_llama_3": _llama_3(VISUAL),
    "qwen_1_5": _chatml("You are a helpful assistant.", "\n"),
}
"""Conversation templates: the texts before and after the text of a user in a first turn.

Source: llava/conversation.py of package llava; llava_llama_3 and qwen_1_5 of LLaVA-VL/LLaVA-NeXT @ 19ddd2e.
"""


def first_turn(text: str, image: bool = True, mode: str = "vicuna_v1") -> str:
    """Return the prompt of a first turn.

    Args:
        text: user text after the image line, instruction included.
        image: whether an image precedes the text.
        mode: a name in TEMPLATES.
    """
    before, after = TEMPLATES[mode]
    return f"{before}{IMAGE_MARK}\n{text}{after}" if image else f"{before}{text}{after}"


def vicuna_v1(text: str, image: bool = True) -> str:
    """Return the prompt of a first turn with LLaVA-1.5; see `first_turn`."""
    return first_turn(text, image, "vicuna_v1")


def token_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a prompt, with -200 for each "<image>".

    The text is split at the placeholders and each piece is tokenised on its own; the BOS of later pieces is dropped.

    Source: llava/mm_utils.py, `tokenizer_image_token`.

    Raises:
        ValueError: if the tokenizer returns no ids.
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


def check_tokenizer(tokenizer: Any, vocab: int, config: Any, where: str, generation: Any = None) -> None:
    """Refuse a missing tokenizer and one of another model.

    Args:
        tokenizer: the loaded tokenizer, or None.
        vocab: number of rows of the model's embedding.
        config: the language model's config, whose `bos_token_id` and `eos_token_id` are compared if they are ints.
        where: the checkpoint, for the message.
        generation: the generation config; the tokenizer's EOS may also be one of its EOS tokens.

    Raises:
        ValueError: if there is no tokenizer, its vocabulary is larger than the model's, or its special ids differ.
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
        stated = getattr(generation, name, None) if name == "eos_token_id" else None
        if name == "bos_token_id" and ours is None:  # Qwen's prompts begin without BOS
            continue
        if isinstance(theirs, int) and ours not in (theirs, *(stated if isinstance(stated, list) else [stated])):
            raise ValueError(
                f"{where}: the tokenizer's {name} is {ours}, the model's is {theirs}; "
                "it belongs to another model; put the right one in the checkpoint folder"
            )


INSTRUCTIONS = (
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer with the option's letter from the given choices directly.",
)
"""Instructions on the form of the answer, which end a question."""


def bare(text: str, task: str = "") -> str:
    """Return a question without its instruction on the form of the answer; MMBench's questions are unchanged.

    Source: CDPruner's evaluation code.
    """
    if task.startswith("mmbench"):
        return text
    for instruction in INSTRUCTIONS:
        text = text.removesuffix(instruction)
    return text
