"""The SentencePiece tokenizer of the miniature model, and LLaVA's way of splitting a prompt at the image."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import sentencepiece as spm

from playground.tiny import questions as qs
from playground.tiny import scenes as sc
from playground.tiny import suite as su

IMAGE = -200
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
EXTRA_LINES = (
    "Answer with the option's letter from the given choices directly.",
    "Please answer yes or no.",
    "Reference OCR token:",
    "Hint: Context: There are several options: A. B. C. D. E. N/A",
    "Please answer the question. What is written in the image? What text is shown?",
    "What is in the picture? Which one is it? Where is it? Who? When? How? Why?",
    "top bottom left right middle front back near far big small large tiny round",
    "one two three four five six seven eight nine ten zero none many few",
    "pink brown gray grey cloud box line dot letter word number text sign card object objects shape color colour",
    "The following is a photo. It can be seen that there are this that these those with without from by on in at for",
    "请直接回答选项字母。",
)


def prompt(text: str, image: bool = True) -> str:
    """Return the ``vicuna_v1`` conversation around one user text."""
    return f"{SYSTEM} USER: {'<image>' + chr(10) if image else ''}{text} ASSISTANT:"


def corpus(scenes: int = 3000) -> list[str]:
    """Return the lines from which the pieces are learnt: questions with answers, the prompt, and lines of other tasks.

    The copies of lines after a full stop teach the pieces without a leading space that follow a newline in a prompt.
    """
    lines = []
    for seed in range(scenes):
        rng = np.random.default_rng([20_14, seed])
        for q in qs.ask(sc.make_scene(seed), rng, 8):
            lines += [q.text, q.answer, q.full_answer, f".{q.text}", f".{q.answer}"]
        for _, case in su.ask(sc.make_scene(seed), rng, 6):
            lines += [line for text in case.body.splitlines() for line in (text, f".{text}")]
    words = [
        *sc.WORDS,
        *sc.SHAPES,
        *sc.COLOURS,
        *sc.SIZES,
        *map(qs.plural, sc.SHAPES),
        *sc.DIGITS,
        *qs.LETTERS,
        *su.COLOURS_CN.values(),
        *su.SHAPES_CN.values(),
        *su.WORDS_CN.values(),
        "左边",
        "右边",
        "yes",
        "no",
    ]
    lines += 40 * [*words, *(w.upper() for w in sc.WORDS)]
    lines += 400 * [
        f".{qs.INSTRUCTION}",
        f".{su.LETTER}",
        f".{su.LETTER_CN}",
        SYSTEM,
        "USER: ASSISTANT:",
        f"{qs.INSTRUCTION} ASSISTANT:",
        "ASSISTANT: yes",
        "ASSISTANT: no",
    ]
    return lines + 60 * [*EXTRA_LINES, *(f".{line}" for line in EXTRA_LINES)]


def train_tokenizer(folder: Path, vocab: int) -> None:
    """Write tokenizer.model and the two JSON files that make transformers load it as a slow Llama tokenizer."""
    buffer = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=vocab,
        hard_vocab_limit=True,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    mapping = {key: {"content": value, **special} for key, value in names.items()}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        **{key: {"__type": "AddedToken", **value} for key, value in mapping.items()},
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    mapping["pad_token"] = "<unk>"
    for name, value in (("tokenizer_config.json", config), ("special_tokens_map.json", mapping)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> spm.SentencePieceProcessor:
    """Load the trained tokenizer."""
    return spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def encode_prompt(model: spm.SentencePieceProcessor, text: str) -> list[int]:
    """Return the ids of a prompt: BOS first, each text between images tokenised alone, ``-200`` for every image."""
    ids = [model.bos_id()]
    for i, part in enumerate(text.split("<image>")):
        ids += ([IMAGE] if i else []) + model.encode(part)
    return ids


def after_system(model: spm.SentencePieceProcessor, text: str) -> list[int]:
    """Return the ids of a prompt without an image, minus those shared by all prompts (BOS and the system text).

    The shared part of a prompt with an image is one piece longer: the space before the image.
    """
    shared = model.encode(SYSTEM + " USER: ")[:-1]
    ids = model.encode(prompt(text, image=False))
    if ids[: len(shared)] != shared:
        raise ValueError("the system text is cut into other pieces before this question")
    return ids[len(shared) :]
