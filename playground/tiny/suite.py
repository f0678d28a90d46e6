"""Questions in the prompt formats of the other eight benchmarks: yes/no, options, Chinese, printed text, no image.

Every maker takes a scene and a random generator and returns a :class:`Case` or None. :data:`MAKERS` names them with
their share of the training questions. ``make_suite`` writes the held-out files with the same makers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from playground.tiny import questions as qs
from playground.tiny import scenes as sc
from playground.tiny.scenes import Scene

LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
COLOURS_CN = dict(zip(sc.COLOURS, ("红色", "绿色", "蓝色", "黄色", "紫色", "橙色", "白色", "黑色"), strict=True))
SHAPES_CN = dict(
    zip(
        sc.SHAPES,
        ("圆形", "方形", "三角形", "十字", "圆环", "星形", "菱形", "心形", "月亮", "卡片", "标牌"),
        strict=True,
    )
)
WORDS_CN = dict(
    zip(
        sc.WORDS,
        (
            "停止", "打开", "出口", "打折", "咖啡馆", "公园", "出租车", "银行", "牛奶", "书",
            "鱼", "蛋糕", "西", "动物园", "公交车", "酒吧", "健身房", "热", "冰", "爵士乐",
        ),
        strict=True,
    )
)  # fmt: skip
SENSE = {
    "something to eat or drink": ("milk", "fish", "cake", "ice"),
    "something to ride": ("taxi", "bus"),
    "a place to go to": ("cafe", "park", "bank", "zoo", "pub", "gym"),
}


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        kind: e.g. "mme/color".
        text: the question alone.
        answer: the right answer.
        suffix: instruction line.
        options: texts of A, B, ...
        hint: context line of the question, without its label.
        ocr: OCR tokens in the prompt; None if the format has no such line.
        image: whether the question is about the image.
        things: indices of the things that the question asks about.
    """

    kind: str
    text: str
    answer: str
    suffix: str = qs.INSTRUCTION
    options: tuple[str, ...] = ()
    hint: str = ""
    ocr: tuple[str, ...] | None = None
    image: bool = True
    things: tuple[int, ...] = ()

    @property
    def body(self) -> str:
        """The user text without its instruction line."""
        lines = [self.hint] if self.hint else []
        lines.append(self.text)
        if self.ocr is not None:
            lines.append("Reference OCR token: " + ", ".join(self.ocr))
        lines += [f"{letter}. {option}" for letter, option in zip("ABCDE", self.options, strict=False)]
        return "\n".join(lines)

    @property
    def prompt(self) -> str:
        """The complete user text after the line of the image."""
        return f"{self.body}\n{self.suffix}"


Maker = Callable[[Scene, np.random.Generator], "Case | None"]


def _pick(rng: np.random.Generator, items: list | tuple):
    return items[int(rng.integers(len(items)))]


def _marked(scene: Scene, shape: str) -> int | None:
    """Return the index of the thing of that shape that carries a mark; None if there is none."""
    return next((i for i, t in enumerate(scene.things) if t.shape == shape), None)


def _said(kind: str, text: str, flag: bool, things: tuple[int, ...] = ()) -> Case:
    return Case(kind, text, "yes" if flag else "no", things=things)


# MME -------------------------------------------------------------------------------------------------------------
def mme_existence(scene: Scene, rng: np.random.Generator, flag: bool) -> Case | None:
    """Return a case such as "Is there a circle in this image?"."""
    shapes = {t.shape for t in scene.things}
    name = _pick(rng, sorted(shapes)) if flag else _pick(rng, [s for s in sc.SHAPES if s not in shapes])
    return _said("mme/existence", f"Is there {qs.article(name)} in this image?", flag)


def mme_count(scene: Scene, rng: np.random.Generator, flag: bool) -> Case | None:
    """Return a case such as "Are there 2 circles in this image?"."""
    counts = Counter(t.shape for t in scene.things)
    shape = _pick(rng, sorted(counts))
    n = counts[shape]
    said = n if flag else _pick(rng, [k for k in (1, 2, 3) if k != n])
    noun = qs.plural(shape) if said > 1 else shape
    verb = "Are" if said > 1 else "Is"
    return _said("mme/count", f"{verb} there {said} {noun} in this image?", flag)


def mme_position(scene: Scene, rng: np.random.Generator, flag: bool) -> Case | None:
    """Return a case such as "Is the red circle to the left of the blue star?"."""
    drawn = qs.related(scene, rng)
    if drawn is None:
        return None
    a, b, relation = drawn
    relation = relation if flag else qs.OPPOSITE[relation]
    first, second = scene.things[a].name, scene.things[b].name
    return _said("mme/position", f"Is the {first} {qs.RELATIONS[relation][0]} the {second}?", flag, (a, b))


def mme_color(scene: Scene, rng: np.random.Generator, flag: bool) -> Case | None:
    """Return a case such as "Is there a red circle in the image?"."""
    thing = _pick(rng, scene.things)
    names = {t.name for t in scene.things}
    wrong = [c for c in sc.COLOUR_NAMES if f"{c} {thing.shape}" not in names]
    name = thing.name if flag else f"{_pick(rng, wrong)} {thing.shape}"
    return _said("mme/color", f"Is there {qs.article(name)} in the image?", flag)


def mme_ocr(scene: Scene, rng: np.random.Generator, flag: bool) -> Case | None:
    """Return a case such as 'Is the word in the image "stop"?'."""
    index = _marked(scene, "sign")
    if index is None:
        return None
    word = scene.things[index].mark
    word = word if flag else _pick(rng, [w for w in sc.WORDS if w != word])
    return _said("mme/OCR", f'Is the word in the image "{word}"?', flag, (index,))


def mme_number(scene: Scene, rng: np.random.Generator, flag: bool) -> Case | None:
    """Return a case such as "Is the number on the card larger than 4?"."""
    index = _marked(scene, "card")
    if index is None:
        return None
    number = int(scene.things[index].mark)
    fits = [k for k in range(10) if (number > k) == flag]
    if not fits:
        return None
    text = f"Is the number on the card larger than {_pick(rng, fits)}?"
    return _said("mme/numerical_calculation", text, flag, (index,))


def mme_translation(scene: Scene, rng: np.random.Generator, flag: bool) -> Case | None:
    """Return a case such as 'Is it appropriate to translate the word in the image into Chinese "停止"?'."""
    index = _marked(scene, "sign")
    if index is None:
        return None
    word = scene.things[index].mark
    word = word if flag else _pick(rng, [w for w in sc.WORDS if w != word])
    text = f'Is it appropriate to translate the word in the image into Chinese "{WORDS_CN[word]}"?'
    return _said("mme/text_translation", text, flag, (index,))


def mme_sense(scene: Scene, rng: np.random.Generator, flag: bool) -> Case | None:
    """Return a case such as "Does the sign name something to eat or drink?"."""
    index = _marked(scene, "sign")
    if index is None:
        return None
    fits = [k for k, words in SENSE.items() if (scene.things[index].mark in words) == flag]
    if not fits:
        return None
    return _said("mme/commonsense_reasoning", f"Does the sign name {_pick(rng, fits)}?", flag, (index,))


MME = (
    mme_existence, mme_count, mme_position, mme_color, mme_ocr, mme_number, mme_translation, mme_sense,
)  # fmt: skip


def yes_no(scene: Scene, rng: np.random.Generator) -> Case | None:
    """Return a case of a random kind of MME."""
    return _pick(rng, MME)(scene, rng, bool(rng.random() < 0.5))


# options -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fact:
    """Something that a scene shows: the question, the right answer and wrong answers, each in English and Chinese."""

    kind: str
    english: str
    chinese: str
    right: tuple[str, str]
    wrong: tuple[tuple[str, str], ...]
    things: tuple[int, ...]


def _both(words: dict[str, str], right: str) -> tuple[tuple[str, str], tuple[tuple[str, str], ...]]:
    return (right, words[right]), tuple((e, c) for e, c in words.items() if e != right)


def fact(scene: Scene, rng: np.random.Generator) -> Fact | None:
    """Return a random fact of a scene."""
    draw, things = int(rng.integers(6)), scene.things
    if draw == 0:
        found = qs.unique(scene, lambda t: t.shape)
        if found:
            i = _pick(rng, found)
            shape = things[i].shape
            texts = f"What color is the {shape}?", f"图中的{SHAPES_CN[shape]}是什么颜色？"
            return Fact("color", *texts, *_both(COLOURS_CN, things[i].colour), (i,))
    elif draw == 1:
        found = qs.unique(scene, lambda t: t.colour)
        if found:
            i = _pick(rng, found)
            colour = things[i].colour
            texts = f"What is the {colour} object?", f"图中{COLOURS_CN[colour]}的物体是什么？"
            return Fact("shape", *texts, *_both(SHAPES_CN, things[i].shape), (i,))
    elif draw == 2:
        counts = Counter(t.shape for t in things)
        shape = _pick(rng, sorted(counts))
        numbers = {str(k): str(k) for k in range(1, max(4, counts[shape]) + 1)}
        texts = f"How many {qs.plural(shape)} are there?", f"图中有几个{SHAPES_CN[shape]}？"
        chosen = tuple(i for i, t in enumerate(things) if t.shape == shape)
        return Fact("count", *texts, *_both(numbers, str(counts[shape])), chosen)
    elif draw in (3, 4):
        shape, words = ("sign", sc.WORDS) if draw == 3 else ("card", sc.DIGITS)
        index = _marked(scene, shape)
        if index is not None:
            kind, cn = ("word", "标牌上写的是什么词？") if draw == 3 else ("number", "卡片上的数字是几？")
            same = {w: w for w in words}
            return Fact(kind, f"What {kind} is on the {shape}?", cn, *_both(same, things[index].mark), (index,))
    else:
        found = [i for i in qs.unique(scene, lambda t: t.name) if abs(things[i].cx - scene.width / 2) > qs.MARGIN]
        if found:
            i = _pick(rng, found)
            thing = things[i]
            right = "left" if thing.cx < scene.width / 2 else "right"
            cn = f"{COLOURS_CN[thing.colour]}的{SHAPES_CN[thing.shape]}在图的哪一边？"
            sides = {"left": "左边", "right": "右边"}
            return Fact("side", f"On which side of the image is the {thing.name}?", cn, *_both(sides, right), (i,))
    return None


def choice(scene: Scene, rng: np.random.Generator, chinese: bool = False, most: int = 4) -> Case | None:
    """Return a fact as a question with two to four options, answered by a letter."""
    known = fact(scene, rng)
    if known is None:
        return None
    count = min(int(rng.integers(2, most + 1)), 1 + len(known.wrong))
    wrong = [known.wrong[int(i)] for i in rng.permutation(len(known.wrong))[: count - 1]]
    at = int(rng.integers(count))
    options = tuple(pair[chinese] for pair in (*wrong[:at], known.right, *wrong[at:]))
    text, suffix = (known.chinese, LETTER_CN) if chinese else (known.english, LETTER)
    name = ("mmbench_cn/" if chinese else "mmbench/") + known.kind
    return Case(name, text, "ABCDE"[at], suffix, options, things=known.things)


def choice_en(scene: Scene, rng: np.random.Generator) -> Case | None:
    """Return a case of MMBench, or of ScienceQA's questions with an image."""
    case = choice(scene, rng)
    if case is None or rng.random() < 0.6:
        return case
    return Case(**{**vars(case), "hint": _pick(rng, ["Context: Look at the picture.", "Look at the picture."])})


def choice_cn(scene: Scene, rng: np.random.Generator) -> Case | None:
    """Return a case of MMBench-CN."""
    return choice(scene, rng, chinese=True)


def science_text(scene: Scene, rng: np.random.Generator) -> Case | None:
    """Return a case of ScienceQA without an image; its context states the answer."""
    shapes = [sc.PLAIN_SHAPES[int(i)] for i in rng.permutation(len(sc.PLAIN_SHAPES))[:2]]
    colours = [sc.COLOUR_NAMES[int(i)] for i in rng.permutation(len(sc.COLOUR_NAMES))[:2]]
    facts = " ".join(f"The {s} is {c}." for s, c in zip(shapes, colours, strict=True))
    at = int(rng.integers(2))
    options = tuple(colours[int(i)] for i in rng.permutation(2))
    letter = "AB"[options.index(colours[at])]
    text = f"What color is the {shapes[at]}?"
    return Case("sqa/text", text, letter, LETTER, options, f"Context: {facts}", image=False)


# printed text ------------------------------------------------------------------------------------------------------
def textvqa(scene: Scene, rng: np.random.Generator) -> Case | None:
    """Return a case of TextVQA; the reference tokens are absent, or the true ones among others."""
    found = [i for i, t in enumerate(scene.things) if t.mark]
    if not found:
        return None
    index = _pick(rng, found)
    thing, tokens = scene.things[index], []
    if rng.random() < 0.5:
        pool = [w for w in (*sc.WORDS, *sc.DIGITS) if w not in {t.mark for t in scene.things}]
        tokens = [scene.things[i].mark for i in found] + [pool[int(i)] for i in rng.permutation(len(pool))[:3]]
        tokens = [tokens[int(i)].upper() for i in rng.permutation(len(tokens))]
    kind = "word" if thing.shape == "sign" else "number"
    text = _pick(rng, [f"What {kind} is on the {thing.name}?", f"What does the {thing.shape} say?"]).capitalize()
    return Case("textvqa/" + kind, text, thing.mark, ocr=tuple(tokens), things=(index,))


def ocrbench(scene: Scene, rng: np.random.Generator) -> Case | None:
    """Return a case of OCRBench's short questions."""
    kind = int(rng.integers(4))
    index = _marked(scene, "sign" if kind < 2 else "card")
    if index is None:
        return None
    thing = scene.things[index]
    named, text = (
        ("Regular Text Recognition", "what is written in the image?"),
        ("Scene Text-centric VQA", f"What word is on the {thing.colour} sign?"),
        ("Digit String Recognition", "what is the number in the image?"),
        (
            "Key Information Extraction",
            "what is the number on the card? Answer this question using the text in the image directly.",
        ),
    )[kind]
    return Case("ocrbench/" + named, text, thing.mark, things=(index,))


MAKERS: dict[str, tuple[Maker, float]] = {
    "yesNo": (yes_no, 2.0),
    "letter": (choice_en, 2.0),
    "letterCn": (choice_cn, 1.6),
    "textOnly": (science_text, 0.8),
    "ocrTokens": (textvqa, 1.0),
    "printed": (ocrbench, 1.0),
}


def ask(scene: Scene, rng: np.random.Generator, number: int) -> list[tuple[str, Case]]:
    """Return up to ``number`` distinct cases with the names of their makers."""
    names = list(MAKERS)
    chance = np.array([weight for _, weight in MAKERS.values()])
    made: dict[str, tuple[str, Case]] = {}
    for _ in range(3 * number):
        name = names[int(rng.choice(len(names), p=chance / chance.sum()))]
        case = MAKERS[name][0](scene, rng)
        if case is not None:
            made.setdefault(case.prompt, (name, case))
        if len(made) == number:
            break
    return list(made.values())
