"""Normalisation of answers as in the VQA evaluation and in LLaVA's M4C evaluator.

The rules are those of GT-Vision-Lab/VQA (vqaEval.py) and llava/eval/m4c_evaluator.py, including their quirks.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import yaml

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(n) for n, word in enumerate(_WORDS)}}
_ARTICLES = ("a", "an", "the")
_DOT = re.compile(r"\.(?!\d)")
_DOTS = 32
"""Largest number of deleted dots: the original passes re.UNICODE (32) in place of a count."""
_COMMA = re.compile(r"\d,\d")
_COMMAS = re.compile(r"\d,+\d")


@cache
def contractions() -> dict[str, str]:
    """Return the table of contractions: word -> replacement."""
    table = (Path(__file__).parent / "contractions.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(table))


def one_line(text: str) -> str:
    """Replace newlines and tabs by spaces and strip both ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def punctuation(text: str, commas: bool = False) -> str:
    """Delete each punctuation mark or replace it by a space, then delete dots.

    A mark is deleted everywhere if it is next to a space once or the text has a number such as 1,000.

    Args:
        text: the answer.
        commas: use M4C's test for such a number, which allows several commas between digits.
    """
    out = text
    number = (_COMMAS if commas else _COMMA).search(text) is not None
    for mark in PUNCTUATION:
        if mark in text:
            out = out.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    return _DOT.sub("", out, count=_DOTS)


def digits_articles(text: str) -> str:
    """Convert to lower case, replace number words by digits, drop articles, and replace contractions by the table."""
    words = (_NUMBERS.get(w, w) for w in text.lower().split())
    return " ".join(contractions().get(w, w) for w in words if w not in _ARTICLES)


def m4c(text: str) -> str:
    """Return LLaVA's normalised answer, used for TextVQA's score and VQAv2's upload."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return digits_articles(punctuation(one_line(text), commas=True))
