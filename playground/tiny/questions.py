"""Questions about scenes in GQA's categories, with their answers and short programs.

Every generator takes a scene and a random generator and yields :class:`Question` objects. :data:`GENERATORS` maps each
detailed type to its generator, so that a new kind of question is one function and one entry.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from playground.tiny import scenes as sc
from playground.tiny.scenes import Scene, Thing

INSTRUCTION = "Answer the question using a single word or phrase."
LETTERS = "ABCD"
RELATIONS = {
    "left": ("to the left of", lambda a, b: b.cx - a.cx),
    "right": ("to the right of", lambda a, b: a.cx - b.cx),
    "above": ("above", lambda a, b: b.cy - a.cy),
    "below": ("below", lambda a, b: a.cy - b.cy),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
MARGIN = 15.0


@dataclass(frozen=True)
class Question:
    """A question without its instruction line, with its answer, GQA's types and a semantic program."""

    text: str
    answer: str
    full_answer: str
    structural: str
    semantic: str
    detailed: str
    program: tuple[tuple[str, str, tuple[int, ...]], ...]
    things: tuple[int, ...] = ()
    suffix: str = INSTRUCTION

    @property
    def prompt(self) -> str:
        """The user text as in the question files."""
        return f"{self.text}\n{self.suffix}" if self.suffix else self.text


Made = Iterator[Question]


def plural(word: str) -> str:
    """Return the English plural of a shape word."""
    return {"box": "boxes", "cross": "crosses"}.get(word, word + "s")


def article(name: str) -> str:
    """Return the name with ``a`` or ``an``."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def unique(scene: Scene, key: Callable[[Thing], object]) -> list[int]:
    """Return the indices of things whose key occurs once."""
    counts = Counter(key(t) for t in scene.things)
    return [i for i, t in enumerate(scene.things) if counts[key(t)] == 1]


def _pick(rng: np.random.Generator, items: list | tuple):
    """Return one item, drawn uniformly."""
    return items[int(rng.integers(len(items)))]


def _other(rng: np.random.Generator, items: tuple[str, ...], *taken: str) -> str:
    """Return a random item that is not among ``taken``."""
    return _pick(rng, [x for x in items if x not in taken])


def _refer(scene: Scene, rng: np.random.Generator, index: int) -> str:
    """Return a name that identifies the thing: mostly colour and shape, sometimes the shape alone."""
    thing = scene.things[index]
    alone = sum(t.shape == thing.shape for t in scene.things) == 1
    return thing.shape if alone and rng.random() < 0.3 else thing.name


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _absent(scene: Scene, rng: np.random.Generator) -> str:
    """Return a colour and shape that is not in the scene, although one of the two mostly is."""
    names = {t.name for t in scene.things}
    for _ in range(50):
        thing, draw = _pick(rng, scene.things), rng.random()
        shape = thing.shape if draw < 0.4 else _pick(rng, sc.SHAPES)
        colour = thing.colour if draw > 0.6 else _pick(rng, sc.COLOUR_NAMES)
        if f"{colour} {shape}" not in names:
            return f"{colour} {shape}"
    return "pink cloud"


def exist(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "Is there a red circle?"."""
    flag = rng.random() < 0.5
    index = int(rng.integers(len(scene.things)))
    name = scene.things[index].name if flag else _absent(scene, rng)
    text = _pick(rng, ["Is there {}?", "Is there {} in the image?", "Do you see {}?"]).format(article(name))
    full = f"Yes, there is {article(name)}." if flag else f"No, there is no {name}."
    program = (("select", name, ()), ("exist", "?", (0,)))
    yield Question(text, _yes(flag), full, "verify", "obj", "exist", program, (index,) if flag else ())


def verify_attribute(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "Is the circle red?"."""
    found = unique(scene, lambda t: t.shape)
    if not found:
        return
    index, flag = _pick(rng, found), rng.random() < 0.5
    thing = scene.things[index]
    colour = thing.colour if flag else _other(rng, sc.COLOUR_NAMES, thing.colour)
    full = f"Yes, the {thing.shape} is {colour}." if flag else f"No, the {thing.shape} is {thing.colour}."
    program = (("select", thing.shape, ()), ("verify color", colour, (0,)))
    text = f"Is the {thing.shape} {colour}?"
    yield Question(text, _yes(flag), full, "verify", "attr", "verifyAttr", program, (index,))


def related(scene: Scene, rng: np.random.Generator) -> tuple[int, int, str] | None:
    """Return two things with unique names and a relation that clearly holds from the first to the second."""
    found = unique(scene, lambda t: t.name)
    for _ in range(20):
        if len(found) < 2:
            return None
        a, b = (int(i) for i in rng.choice(found, 2, replace=False))
        relation = _pick(rng, list(RELATIONS))
        if RELATIONS[relation][1](scene.things[a], scene.things[b]) > MARGIN:
            return a, b, relation
    return None


def verify_relation(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "Is the red circle to the left of the blue star?"."""
    drawn = related(scene, rng)
    if drawn is None:
        return
    a, b, relation = drawn
    flag = rng.random() < 0.5
    if not flag:
        relation = OPPOSITE[relation]
    first, second = _refer(scene, rng, a), _refer(scene, rng, b)
    phrase = RELATIONS[relation][0]
    full = f"{_yes(flag).capitalize()}, the {first} is {'' if flag else 'not '}{phrase} the {second}."
    program = (("select", second, ()), ("verify rel", f"{first},{phrase},s", (0,)))
    text = f"Is the {first} {phrase} the {second}?"
    yield Question(text, _yes(flag), full, "verify", "rel", "verifyRel", program, (a, b))


def choose_relation(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "Is the red circle to the left or to the right of the blue star?"."""
    drawn = related(scene, rng)
    if drawn is None:
        return
    a, b, relation = drawn
    first, second = _refer(scene, rng, a), _refer(scene, rng, b)
    sides = "to the left or to the right of" if relation in ("left", "right") else "above or below"
    full = f"The {first} is {RELATIONS[relation][0]} the {second}."
    program = (("select", second, ()), ("choose rel", f"{first},{sides},s", (0,)))
    text = f"Is the {first} {sides} the {second}?"
    yield Question(text, relation, full, "choose", "rel", "relChooser", program, (a, b))


def side(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "On which side of the image is the red circle?"."""
    found = [i for i in unique(scene, lambda t: t.name) if abs(scene.things[i].cx - scene.width / 2) > MARGIN]
    if not found:
        return
    index = _pick(rng, found)
    name, answer = _refer(scene, rng, index), "left" if scene.things[index].cx < scene.width / 2 else "right"
    full = f"The {name} is on the {answer} side."
    program = (("select", name, ()), ("query", "hposition", (0,)))
    text = f"On which side of the image is the {name}?"
    yield Question(text, answer, full, "query", "attr", "positionQuery", program, (index,))


def query_colour(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "What color is the circle?"."""
    found = unique(scene, lambda t: t.shape)
    if not found:
        return
    index = _pick(rng, found)
    thing = scene.things[index]
    text = _pick(rng, ["What color is the {}?", "What is the color of the {}?"]).format(thing.shape)
    program = (("select", thing.shape, ()), ("query", "color", (0,)))
    full = f"The {thing.shape} is {thing.colour}."
    yield Question(text, thing.colour, full, "query", "attr", "colorQuery", program, (index,))


def query_shape(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "What shape is the red object?"."""
    found = unique(scene, lambda t: t.colour)
    if not found:
        return
    index = _pick(rng, found)
    thing = scene.things[index]
    text = _pick(rng, ["What shape is the {} object?", "What is the {} object?"]).format(thing.colour)
    program = (("select", f"{thing.colour} object", ()), ("query", "name", (0,)))
    full = f"The {thing.colour} object is {article(thing.shape)}."
    yield Question(text, thing.shape, full, "query", "cat", "shapeQuery", program, (index,))


def query_mark(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "What word is on the sign?"."""
    found = [i for i, t in enumerate(scene.things) if t.mark]
    if not found:
        return
    index = _pick(rng, found)
    thing = scene.things[index]
    name, kind = _refer(scene, rng, index), "word" if thing.shape == "sign" else "number"
    text = _pick(rng, [f"What {kind} is on the {name}?", f"What does the {name} say?"])
    program = (("select", name, ()), ("query", "text", (0,)))
    yield Question(
        text, thing.mark, f"The {name} says {thing.mark}.", "query", "attr", f"{kind}Query", program, (index,)
    )


def count(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "How many circles are there?"."""
    by_shape, groups = rng.random() < 0.5, defaultdict(list)
    for i, t in enumerate(scene.things):
        groups[t.shape if by_shape else t.colour].append(i)
    sizes = sorted({len(v) for v in groups.values()})
    size = _pick(rng, sizes)
    if size == 1 and len(sizes) == 1 and rng.random() < 0.6:
        return
    key = _pick(rng, [k for k, v in groups.items() if len(v) == size])
    noun = plural(key) if by_shape else f"{key} objects"
    program = (("select", noun, ()), ("count", "?", (0,)))
    full = f"There are {size} {noun}." if size > 1 else f"There is 1 {noun[:-1]}."
    yield Question(f"How many {noun} are there?", str(size), full, "query", "obj", "count", program, tuple(groups[key]))


def _two(rng: np.random.Generator, right: str, wrong: str) -> tuple[str, str]:
    """Return the two options in random order."""
    return (right, wrong) if rng.random() < 0.5 else (wrong, right)


def choose_colour(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "Is the circle red or blue?"."""
    found = unique(scene, lambda t: t.shape)
    if not found:
        return
    index = _pick(rng, found)
    thing = scene.things[index]
    a, b = _two(rng, thing.colour, _other(rng, sc.COLOUR_NAMES, thing.colour))
    program = (("select", thing.shape, ()), ("choose color", f"{a}|{b}", (0,)))
    full = f"The {thing.shape} is {thing.colour}."
    text = f"Is the {thing.shape} {a} or {b}?"
    yield Question(text, thing.colour, full, "choose", "attr", "chooseAttr", program, (index,))


def choose_shape(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "Is the red object a circle or a star?"."""
    found = unique(scene, lambda t: t.colour)
    if not found:
        return
    index = _pick(rng, found)
    thing = scene.things[index]
    a, b = _two(rng, thing.shape, _other(rng, sc.SHAPES, thing.shape))
    program = (("select", f"{thing.colour} object", ()), ("choose name", f"{a}|{b}", (0,)))
    full = f"The {thing.colour} object is {article(thing.shape)}."
    text = f"Is the {thing.colour} object {article(a)} or {article(b)}?"
    yield Question(text, thing.shape, full, "choose", "cat", "categoryThatChoose", program, (index,))


def choose_size(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "Is the red circle small or large?"."""
    found = [i for i in unique(scene, lambda t: t.name) if not scene.things[i].mark]
    if not found:
        return
    index = _pick(rng, found)
    thing, name = scene.things[index], _refer(scene, rng, index)
    a, b = _two(rng, "small", "large")
    program = (("select", name, ()), ("choose size", f"{a}|{b}", (0,)))
    full = f"The {name} is {thing.size}."
    yield Question(f"Is the {name} {a} or {b}?", thing.size, full, "choose", "attr", "chooseSize", program, (index,))


def logical(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "Is there a red circle and a blue star?"."""
    both, flag = rng.random() < 0.5, rng.random() < 0.5
    if len(scene.things) < 2:
        return
    i, j = (int(v) for v in rng.choice(len(scene.things), 2, replace=False))
    names, used = [scene.things[i].name, scene.things[j].name], (i, j)
    if both and not flag or (not both and flag):
        hidden = int(rng.integers(2))
        names[hidden], used = _absent(scene, rng), (used[1 - hidden],)
    elif not both:
        names, used = [_absent(scene, rng), _absent(scene, rng)], ()
    word = "and" if both else "or"
    phrase = f"{article(names[0])} {word} {article(names[1])}"
    program = (("select", names[0], ()), ("exist", "?", (0,)), ("select", names[1], ()), ("exist", "?", (2,)))
    full = f"{_yes(flag).capitalize()}, there is {'' if flag else 'not '}{phrase}."
    detailed = "existAnd" if both else "existOr"
    program = (*program, (word, "", (1, 3)))
    yield Question(f"Is there {phrase}?", _yes(flag), full, "logical", "obj", detailed, program, used)


def same_colour(scene: Scene, rng: np.random.Generator) -> Made:
    """Yield a question such as "Are the circle and the star the same color?"."""
    found, want = unique(scene, lambda t: t.shape), rng.random() < 0.5
    pairs = [(a, b) for a in found for b in found if a != b]
    pairs = [p for p in pairs if (scene.things[p[0]].colour == scene.things[p[1]].colour) == want]
    if not pairs or (not want and rng.random() < 0.5):
        return
    a, b = _pick(rng, pairs)
    first, second = scene.things[a].shape, scene.things[b].shape
    program = (("select", first, ()), ("select", second, ()), ("same color", "", (0, 1)))
    shared = "the same color" if want else "different colors"
    full = f"{_yes(want).capitalize()}, the {first} and the {second} have {shared}."
    text = f"Are the {first} and the {second} the same color?"
    yield Question(text, _yes(want), full, "compare", "attr", "twoSame", program, (a, b))


GENERATORS: dict[str, tuple[Callable[[Scene, np.random.Generator], Made], float]] = {
    "exist": (exist, 1.4),
    "verifyAttr": (verify_attribute, 1.0),
    "verifyRel": (verify_relation, 1.2),
    "relChooser": (choose_relation, 1.2),
    "positionQuery": (side, 0.7),
    "colorQuery": (query_colour, 1.4),
    "shapeQuery": (query_shape, 1.4),
    "markQuery": (query_mark, 1.4),
    "count": (count, 0.9),
    "chooseAttr": (choose_colour, 0.8),
    "categoryThatChoose": (choose_shape, 0.8),
    "chooseSize": (choose_size, 0.8),
    "logical": (logical, 1.0),
    "twoSame": (same_colour, 0.5),
}


def ask(scene: Scene, rng: np.random.Generator, number: int, weights: dict[str, float] | None = None) -> list[Question]:
    """Return up to ``number`` distinct questions; ``weights`` override those of :data:`GENERATORS`."""
    names = list(GENERATORS)
    chance = np.array([(weights or {}).get(n, GENERATORS[n][1]) for n in names], float)
    chance /= chance.sum()
    made: dict[str, Question] = {}
    for _ in range(3 * number):
        for question in GENERATORS[names[int(rng.choice(len(names), p=chance))]][0](scene, rng):
            made.setdefault(question.text, question)
        if len(made) >= number:
            break
    return list(made.values())[:number]
