"""Compositions of two methods: one before the language model, one inside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from dataclasses import fields, replace
from typing import Any, ClassVar

from torch import Tensor

from ..ops.merging import Merge
from ..ops.selection import Cut, Positions
from .base import EntryMethod, Method, MethodInfo, prunes_before, prunes_inside
from .views import Spans, View, VisionCut, VisionView

VISION = "vision_"
"""Prefix of arguments that go to the first method only."""
SHARE = 2.5
"""Default budget of the first method, as a multiple of that of the second; the same as AutoPrune's `first_cap`."""


def split(name: str, known: Callable[[str], bool]) -> tuple[str, str] | None:
    """Split a name such as "visionzip+autoprune" into its two parts, or return None.

    A name may itself end in a plus ("prumerge++fastv").
    """
    for i, letter in enumerate(name):
        if letter == "+" and known(name[:i]) and known(name[i + 1 :]):
            return name[:i], name[i + 1 :]
    return None


class Composed(Method):
    """A method before the language model, followed by a method inside it that prunes the remaining tokens.

    `tokens` is the budget of the second method, an average over layers. The budget of the first is `vision_tokens`, by
    default 2.5 times `tokens` (or all tokens, if there are fewer). If the second method has no `tokens` either, the
    first uses its own default. Other hyper-parameters go to the method that has them, or to both. If the defaults of
    both differ, an argument with the prefix "vision_" goes to the first method only. Positions of the second method
    count from the shortened prompt. Patch values, such as AutoPrune's class-token attention, are 0 on tokens that stand
    for no patch.
    """

    parts: ClassVar[tuple[type[Method], type[Method]]]
    vision_positions = "renumber"

    def __init__(self, **hyper: Any) -> None:
        first, second = self.parts
        mine, its = (inspect.signature(p).parameters for p in (first, second))
        given = {k: v for k, v in hyper.items() if k in mine and k != "tokens"}
        own = {k: hyper.get(VISION + k) for k in mine if k != "tokens"}
        given |= {k: v for k, v in own.items() if v is not None}
        self.given = hyper
        self.language = second(**{k: v for k, v in hyper.items() if k in its})
        tokens, inside = hyper.get("vision_tokens"), getattr(self.language, "tokens", None)
        fixed = "tokens" not in mine or any(given.get(k) is not None for k in first.fixes_budget)
        if tokens is None and not fixed and isinstance(inside, int):
            tokens = int(SHARE * inside)
        self.vision = first(**given, **({} if tokens is None else {"tokens": tokens}))
        self.entry = self.vision if isinstance(self.vision, EntryMethod) else None
        requires = self.vision.requires | self.language.requires  # an instance may differ from its class
        vars(self).update(positions=self.language.positions, decode=self.language.decode, requires=requires)
        for name in inspect.signature(type(self)).parameters:
            owner = self.language if name in its else self.vision
            setattr(self, name, getattr(owner, name if name in its or name in mine else name.removeprefix(VISION)))

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuilt, (*self.parts, self.name, self.given)  # pickle cannot find the class of a composition by name

    def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
        queries = self.vision.vision_queries(feature_layer)
        for block, wanted in self.language.vision_queries(feature_layer).items():
            if queries.setdefault(block, wanted) != wanted:
                raise ValueError(f"{self.name}: the two need different query positions of tower block {block}")
        return queries

    def merge_schedule(self, feature_layer: int, n_patches: int) -> tuple[int, ...]:
        merges = self.vision.merge_schedule(feature_layer, n_patches)
        if any(merges) and self.language.vision_queries(feature_layer):
            raise ValueError(
                f"{self.name}: {self.vision.name} changes the tower that {self.language.name} reads; "
                "combine either with another method"
            )
        return merges

    def merge(self, keys: Tensor, count: int) -> Merge:
        return self.vision.merge(keys, count)

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        for part in (self.language, self.vision):
            blocks = part.vision_queries(view.feature_layer)
            tables = (view.attention, view.keys, view.queries)
            attention, keys, queries = ({b: t for b, t in table.items() if b in blocks} for table in tables)
            shown = replace(view, attention=attention, keys=keys, queries=queries)  # both parts share `patch_values`
            answer = part.prune_vision(shown)
        return answer

    @property
    def sees_patches(self) -> bool:
        return self.vision.sees_patches or self.language.sees_patches

    def queries(self, layer: int, spans: Spans) -> Positions | None:
        return self.language.queries(layer, spans)

    def needs_mlp_input(self, layer: int, spans: Spans) -> bool:
        return self.language.needs_mlp_input(layer, spans)

    def host_values(self, layer: int, view: View) -> Tensor | None:
        return self.language.host_values(layer, view)

    def decide(self, layer: int, values: list[Any], view: View) -> Hashable:
        return self.language.decide(layer, values, view)

    def prune(self, layer: int, view: View) -> Cut | None:
        return self.language.prune(layer, view)

    def plan(self, n_visual: int, n_layers: int) -> list[int] | None:
        first = self.vision.plan(n_visual, n_layers)
        return None if first is None else self.language.plan(first[0], n_layers)

    def example(self, n_visual: int, n_layers: int) -> tuple[list[int], list[int], str] | None:
        first = self.vision.example(n_visual, n_layers)
        second = None if first is None else self.language.example(first[0][0], n_layers)
        if first is None or second is None:
            return None
        return second[0], second[1], "; ".join(filter(None, (first[2], second[2])))


def compose(name: str, first: type[Method], second: type[Method]) -> type[Composed]:
    """Return the class of the composition "first+second".

    Args:
        name: name of the composition.
        first: the method before the language model.
        second: the method inside it.

    Raises:
        ValueError: if `first` does not prune before the language model only, if `second` does not prune inside it, or
            if `second` needs the patch of every token and `first` makes tokens that stand for no patch.
    """
    if not issubclass(first, EntryMethod) and (prunes_inside(first) or not prunes_before(first)):
        raise ValueError(f"{name!r}: {first.name!r} does not work before the language model; put such a method first")
    if not prunes_inside(second) or issubclass(second, EntryMethod):
        raise ValueError(f"{name!r}: {second.name!r} does not work in the language model; put such a method second")
    if first.makes_tokens and "patch positions" in second.requires:
        raise ValueError(
            f"{name!r}: {second.name!r} needs the position of every token, and {first.name!r} makes tokens that stand "
            "for no patch; put a method first that only chooses patches, or another one second"
        )
    table: dict[str, inspect.Parameter] = {}
    if "tokens" in inspect.signature(first).parameters:
        table["vision_tokens"] = inspect.Parameter("vision_tokens", inspect.Parameter.KEYWORD_ONLY, default=None)
    for part in (second, first):
        for p in inspect.signature(part).parameters.values():
            if p.name != "tokens" or part is second:
                known = table.setdefault(p.name, p.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                if known.default != p.default:  # each part keeps its own default
                    name_of_first = VISION + p.name
                    table[name_of_first] = inspect.Parameter(
                        name_of_first, inspect.Parameter.KEYWORD_ONLY, default=None
                    )
    both = {f.name: f"{getattr(first.info, f.name)}; {getattr(second.info, f.name)}" for f in fields(MethodInfo)}
    facts = {
        "name": name,
        "parts": (first, second),
        "positions": second.positions,
        "decode": second.decode,
        "info": MethodInfo(**{**both, "backends": second.info.backends}),
        "requires": first.requires | second.requires,
        "fixes_budget": second.fixes_budget,
        "__doc__": f"{first.name}, then {second.name} on what it leaves.",
        "__signature__": inspect.Signature(list(table.values())),
    }
    return type("Composed", (Composed,), facts)


def rebuilt(first: type[Method], second: type[Method], name: str, hyper: dict[str, Any]) -> Method:
    """Rebuild a composition that was pickled or copied."""
    return compose(name, first, second)(**hyper)
