"""A pruned model computed densely: plain tensors, no cache, no masks of a backend, one sample at a time.

Only the decisions of a method are used: the rows that leave after each layer, and the values of merged ones. `Watch`
records them; `replay` computes from weights and input embeddings the expected result of every layer and generated
token. Nothing of `llava_prune.runtime` or `llava_prune.models` is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import PATCHES, is_llava, language_model

NEWLINE, TEXT = -1, -2
MERGED, VISION = "merged", "vision"
ENTRY = -2
"""Layer number of the cut by a composition's first method, if that acts at the entry of the language model."""


# the spliced prompt -------------------------------------------------------------------------------------------


class _Stop(Exception):
    pass


@dataclass
class Prompt:
    """The input of the language model of an unpruned model.

    Attributes:
        embeds: (B, L, D) embeddings.
        valid: (B, L) bool, False for padding.
        source: (B, L) long, the patch of each row, counted over all images; NEWLINE or TEXT for other rows.
    """

    embeds: Tensor
    valid: Tensor
    source: Tensor


def _projector(model: Any) -> Any:
    return model.model.mm_projector if is_llava(model) else model.model.multi_modal_projector


def _caught(model: Any, given: dict[str, Any], hook: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
    """Return the embeddings and mask that the package passes to its language model, with a hook on the projector."""
    caught: dict[str, Any] = {}

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        caught.update(kwargs)
        raise _Stop

    handles = [language_model(model).register_forward_pre_hook(stop, with_kwargs=True), hook(_projector(model))]
    try:
        with torch.no_grad():
            model(**given)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    embeds = caught["inputs_embeds"]
    if embeds is None:
        embeds = language_model(model).embed_tokens(caught["input_ids"])
    mask = caught["attention_mask"]
    return embeds.detach(), torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()


def spliced(model: Any, given: dict[str, Any], features: Tensor | None = None) -> Prompt:
    """Return the prompt of an unpruned model; `features` (N, T, Dv) replace those of the tower.

    Patches are found by replacing the output of the projector with their numbers.
    """

    def number(module: Any, args: Any, output: Tensor) -> Tensor:
        n = torch.arange(output.shape[0] * output.shape[1]).view(*output.shape[:2])
        out = torch.zeros_like(output)
        out[..., 0], out[..., 1], out[..., 2] = 200, n // 200, n % 200  # small enough for bfloat16
        return out

    def replace(module: Any, args: Any) -> Any:
        return None if features is None else (features,)

    embeds, valid = _caught(model, given, lambda p: p.register_forward_pre_hook(replace))
    newline = getattr(model.model, "image_newline", None)
    if newline is not None:
        before = newline.data
        newline.data = torch.zeros_like(before).index_fill(0, torch.tensor(0), 100)
    try:
        marked, _ = _caught(model, given, lambda p: p.register_forward_hook(number))
    finally:
        if newline is not None:
            newline.data = before
    source = (marked[..., 1] * 200 + marked[..., 2]).round().long()
    source = source.masked_fill(marked[..., 0] == 100, NEWLINE).masked_fill(marked[..., 0] < 100, TEXT)
    return Prompt(embeds, valid, source.masked_fill(~valid, TEXT))


# a method's decisions -----------------------------------------------------------------------------------------


@dataclass
class Asked:
    """One call of a method's `prune`: its inputs and its answer."""

    layer: int
    hidden: Tensor
    visual: Tensor
    valid: Tensor
    ids: Tensor
    attention: Tensor | None
    rows: slice | Tensor | None
    spans: Any
    next_row: Tensor | None
    answer: Any


@dataclass
class Watch:
    """Records every decision of a method; `asked` holds those of the prefills since `clear`."""

    method: Any
    asked: list[Asked] = field(default_factory=list)
    vision: Any = None
    wanted: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        prune, queries, prune_vision = self.method.prune, self.method.queries, self.method.prune_vision

        def watched_queries(layer: int, spans: Any) -> Any:
            self.wanted[layer] = queries(layer, spans)
            return self.wanted[layer]

        def watched_prune_vision(view: Any) -> Any:
            self.vision = prune_vision(view)
            return self.vision

        def watched_prune(layer: int, view: Any) -> Any:
            nxt = None if view.next_attention is None else view.next_attention(view.spans.last_position())
            states = (view.hidden, view.visual, view.valid, view.ids, view.attention)
            seen = (*states, self.wanted.get(layer), view.spans, nxt)
            answer = prune(layer, view)
            self.asked.append(Asked(layer, *seen, answer))
            return answer

        first = getattr(self.method, "entry", None)
        if first is not None:
            entry = first.prune

            def watched_entry(layer: int, view: Any) -> Any:
                answer = entry(layer, view)
                states = (view.hidden, view.visual, view.valid, view.ids, None, None, view.spans, None)
                self.asked.append(Asked(ENTRY, *states, answer))
                return answer

            object.__setattr__(first, "prune", watched_entry)
        for name, hook in (
            ("prune", watched_prune),
            ("queries", watched_queries),
            ("prune_vision", watched_prune_vision),
        ):
            object.__setattr__(self.method, name, hook)

    def clear(self) -> None:
        self.asked, self.vision, self.wanted = [], None, {}


# dense arithmetic ---------------------------------------------------------------------------------------------


def _norm(module: Any, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight.to(x.dtype) * (x * scale)


def _turn(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Apply the rotary embedding to (n, H, dh) at (n,) positions."""
    half = x.shape[2] // 2
    angle = positions[:, None].to(x.dtype) * theta ** (-torch.arange(half).to(x.dtype) / half)  # (n, dh / 2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Dense:
    """The decoder layers of a language model in plain arithmetic, in `dtype`."""

    def __init__(self, model: Any, dtype: torch.dtype = torch.float64) -> None:
        self.lm, self.head, self.dtype = language_model(model), model.lm_head, dtype
        config = self.lm.config
        self.heads = config.num_attention_heads
        self.dh = self.lm.layers[0].self_attn.q_proj.out_features // self.heads
        self.theta = config.rope_parameters["rope_theta"]

    def _linear(self, module: Any, x: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias.to(x.dtype)
        return F.linear(x, module.weight.to(x.dtype), bias)

    def attention(self, n: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output of layer n's attention for normed (n, D) states, and its (H, n, n) weights."""
        attn, length = self.lm.layers[n].self_attn, x.shape[0]
        q, k = (self._linear(f, x).view(length, -1, self.dh) for f in (attn.q_proj, attn.k_proj))
        if hasattr(attn, "q_norm"):
            q, k = _norm(attn.q_norm, q), _norm(attn.k_norm, k)
        q, k = _turn(q, positions, self.theta), _turn(k, positions, self.theta)
        v = self._linear(attn.v_proj, x).view(length, -1, self.dh)
        k, v = (t.repeat_interleave(self.heads // t.shape[1], 1) for t in (k, v))
        score = torch.einsum("qhd,khd->hqk", q, k) / self.dh**0.5
        score = score + torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)
        weight = score.softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weight, v).flatten(1)
        return self._linear(attn.o_proj, out), weight

    def layer(self, n: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output (n, D) of layer n and its attention weights (H, n, n)."""
        layer = self.lm.layers[n]
        out, weight = self.attention(n, _norm(layer.input_layernorm, x), positions)
        x = x + out
        normed = _norm(layer.post_attention_layernorm, x)
        gate, up = self._linear(layer.mlp.gate_proj, normed), self._linear(layer.mlp.up_proj, normed)
        return x + self._linear(layer.mlp.down_proj, F.silu(gate) * up), weight

    def logits(self, x: Tensor) -> Tensor:
        return self._linear(self.head, _norm(self.lm.norm, x))


@dataclass
class Sample:
    """The result of `replay` for one sample.

    Attributes:
        logits: (1 + new, V) logits after the prompt's last row and after each further token.
        leaving: visual tokens leaving each layer: the original index, or -1 for a merged token.
        entering: (live rows, visual rows) entering each layer.
    """

    logits: Tensor
    leaving: list[list[int]] = field(default_factory=list)
    entering: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Replay:
    """The results for all samples, and the columns that each layer's cache must have after the prefill."""

    samples: list[Sample]
    columns: list[int]


class _Board:
    """The row in each column, by sample; None for padding.

    A row is its column in the unpruned prompt, (MERGED, layer, number) for a merged token, or (VISION, image, row) for
    a token that the vision side sends.
    """

    def __init__(self, prompt: Prompt, method: Any, vision: Any) -> None:
        self.prompt = prompt
        valid, source = prompt.valid, prompt.source
        gap = bool((valid[:, :-1] & ~valid[:, 1:]).any())
        live = valid.clone()
        self.patch: dict[Any, int] = {}
        if vision is not None and vision.ids is None:
            live &= (source < 0) | vision.live.flatten()[source.clamp(min=0)]
        self.columns: list[list[Any]] = [[i if v else None for i, v in enumerate(r)] for r in valid.tolist()]
        self.moved = vision is not None or gap
        if self.moved:
            rows = [[i for i, v in enumerate(r) if v] for r in live.tolist()]
            if vision is not None and vision.ids is not None:
                rows = [self._sent(b, r, vision) for b, r in enumerate(rows)]
            width = max(len(r) for r in rows)
            self.columns = [[None] * (width - len(r)) + r for r in rows]
        self.numbers: list[dict[int, int]] = []
        for s, v in zip(source.tolist(), valid.tolist(), strict=True):
            places = [i for i, x in enumerate(s) if x != TEXT and v[i]]
            self.numbers.append({column: n for n, column in enumerate(places)})

    def _sent(self, b: int, rows: list[int], vision: Any) -> list[Any]:
        """Return the rows of sample b, with those of the vision side in the places of its images."""
        patches, source = PATCHES, self.prompt.source[b].tolist()
        first = min((s // patches for s in source if s >= 0), default=0)
        out: list[Any] = []
        for i in rows:
            if source[i] == TEXT:
                out.append(i)
            elif source[i] % patches == 0:
                n = source[i] // patches
                for k in [k for k, ok in enumerate(vision.live[n].tolist()) if ok]:
                    out.append((VISION, n, k))
                    patch = int(vision.ids[n, k])
                    self.patch[VISION, n, k] = patch if patch < 0 else patch + (n - first) * patches
        return out

    def visual(self, b: int, row: Any) -> bool:
        return row is not None and (isinstance(row, tuple) or row in self.numbers[b])

    def number(self, b: int, row: Any) -> int:
        if row is None:
            return -2
        if isinstance(row, tuple):
            return self.patch.get(row, -1)
        return self.numbers[b].get(row, -3)

    def move(self, layer: int, cut: Any) -> None:
        """Apply a cut, after checking that it keeps the text and repeats no row."""
        for b, old in enumerate(self.columns):
            tail = 0 if cut.merged is None else cut.merged.shape[1]
            table = [*old, *((MERGED, layer, c) for c in range(tail))]
            live = [True] * cut.index.shape[1] if cut.valid is None else cut.valid[b].tolist()
            new = [table[i] if ok else None for i, ok in zip(cut.index[b].tolist(), live, strict=True)]
            rows = [r for r in new if r is not None]
            assert len(set(rows)) == len(rows), "a row stands twice"
            assert None not in [r for r, ok in zip(new, live, strict=True) if ok], "padding came back to life"
            text = [r for r in old if r is not None and not self.visual(b, r)]
            assert [r for r in new if r is not None and not self.visual(b, r)] == text, "text was touched"
            self.columns[b] = new

    def check(self, asked: Asked) -> None:
        """Check that the method was shown the rows on the board."""
        for b, columns in enumerate(self.columns):
            assert asked.valid[b].tolist() == [c is not None for c in columns]
            assert asked.visual[b].tolist() == [self.visual(b, c) for c in columns]
            numbers = [self.number(b, c) for c in columns]
            live = [(n, g) for n, g, c in zip(numbers, asked.ids[b].tolist(), columns, strict=True) if c is not None]
            assert [n for n, _ in live] == [g for _, g in live]


def _positions(method: Any, rows: list[Any], place: dict[Any, int], renumbered: bool) -> list[int]:
    if renumbered:
        return list(range(len(rows)))
    return [place[r] for r in rows]


@torch.no_grad()
def replay(
    model: Any,
    prompt: Prompt,
    watch: Watch,
    new: list[list[int]],
    dtype: torch.dtype = torch.float64,
    tol: float = 2e-4,
) -> Replay:
    """Compute densely the expected result of a pruned request.

    Args:
        model: the model, of which the weights are used.
        prompt: the unpruned prompt, see `spliced`.
        watch: the recorded decisions of the method.
        new: token ids of each sample that follow the prompt (the answer, or later turns without padding).
        dtype: dtype of the computation.
        tol: tolerance, relative to their size, for states and attention rows that the method was shown.
    """
    dense, method = Dense(model, dtype), watch.method
    layers = len(dense.lm.layers)
    asked = {a.layer: a for a in watch.asked}
    board = _Board(prompt, method, watch.vision)
    batch = prompt.embeds.shape[0]
    renumbered = board.moved and method.positions == "renumber"
    place = [{c: n for n, c in enumerate([i for i, v in enumerate(r) if v])} for r in prompt.valid.tolist()]
    base = [len(p) for p in place]
    samples = [Sample(torch.empty(0)) for _ in range(batch)]
    embeds = prompt.embeds.to(dtype)
    states = [embeds[b] for b in range(batch)]  # (columns of the prompt + merged rows, D)
    line = [{c: c for c in p} for p in place]  # the line of `states` of each row
    fresh = [dense.lm.embed_tokens(torch.tensor(t, dtype=torch.long)).detach().to(dtype) for t in new]
    columns = []
    if board.patch:
        shorter = method.vision_positions == "renumber"  # the sent rows count as the prompt
        assert renumbered or shorter, "rows of the vision side have no place in the unpruned prompt"
        for b, row in enumerate(board.columns):
            place[b] = {c: n for n, c in enumerate([c for c in row if c is not None])}
            base[b] = len(place[b]) if shorter else base[b]
        rows = _projector(model)(watch.vision.features).to(dtype)
        for b, line_of in enumerate(line):
            mine = [r for r in board.columns[b] if r in board.patch]
            line_of.update({r: len(states[b]) + i for i, r in enumerate(mine)})
            states[b] = torch.cat([states[b], *(rows[n, k][None] for _, n, k in mine)])

    def cut(layer: int) -> None:
        nonlocal renumbered
        answer = asked[layer].answer if layer in asked else None
        if answer is None:
            return
        for b, old in enumerate(board.columns):  # a merged row is at the end of the image
            last = max((place[b][c] for c in old if board.visual(b, c)), default=0)
            for c in range(0 if answer.merged is None else answer.merged.shape[1]):
                place[b][MERGED, layer, c] = last
                line[b][MERGED, layer, c] = len(states[b]) + c
            if answer.merged is not None:
                states[b] = torch.cat([states[b], answer.merged[b].to(dtype)])
        board.move(layer, answer)
        renumbered = renumbered or method.positions == "renumber"

    if ENTRY in asked:
        board.check(asked[ENTRY])
        cut(ENTRY)
        for b, row in enumerate(board.columns):  # the remaining rows count as the prompt
            place[b] = {c: n for n, c in enumerate([c for c in row if c is not None])}
            base[b] = len(place[b])
    if -1 in asked:
        board.check(asked[-1])
    cut(-1)
    for n in range(layers):
        columns.append(len(board.columns[0]))
        shown = asked.get(n)
        if shown is not None:
            board.check(shown)
        for b in range(batch):
            rows = [c for c in board.columns[b] if c is not None]
            visual = [c for c in rows if board.visual(b, c)]
            samples[b].entering.append((len(rows), len(visual)))
            positions = _positions(method, rows, place[b], renumbered)
            start = len(rows) if method.decode == "cache" else base[b]
            positions = positions + [start + t for t in range(len(new[b]))]
            lines = torch.tensor([line[b][c] for c in rows])
            out, weight = dense.layer(n, torch.cat([states[b][lines], fresh[b]]), torch.tensor(positions))
            states[b] = states[b].index_copy(0, lines, out[: len(rows)])
            fresh[b] = out[len(rows) :]
            if shown is not None:
                _compare(dense, shown, b, board.columns[b], out[: len(rows)], weight, positions, n, tol)
        if n + 1 == layers:
            for b in range(batch):
                end = states[b][line[b][[c for c in board.columns[b] if c is not None][-1]]]
                samples[b].logits = dense.logits(torch.cat([end[None], fresh[b]]))
        cut(n)
        for b in range(batch):
            samples[b].leaving.append([board.number(b, c) for c in board.columns[b] if board.visual(b, c)])
    return Replay(samples, columns)


def _compare(
    dense: Dense,
    shown: Asked,
    b: int,
    columns: list[Any],
    out: Tensor,
    weight: Tensor,
    positions: list[int],
    n: int,
    tol: float,
) -> None:
    """Compare the states and attention rows that a method was shown after layer n."""
    live = torch.tensor([i for i, c in enumerate(columns) if c is not None])
    at = {int(c): i for i, c in enumerate(live.tolist())}
    near(shown.hidden[b, live], out, tol, f"hidden after layer {n}, sample {b}")
    if shown.attention is not None:
        assert shown.rows is not None and shown.attention.dtype == torch.float32
        rows = [(r, at[c]) for r, c in enumerate(torch.arange(shown.spans.length)[shown.rows].tolist()) if c in at]
        got = shown.attention[b][:, [r for r, _ in rows]]  # (H, R, L)
        near(got[..., live], weight[:, [i for _, i in rows], : len(live)], tol, f"rows of layer {n}, sample {b}")
        dead = [i for i, c in enumerate(columns) if c is None]
        assert not dead or float(got[..., dead].abs().max()) == 0.0
    if shown.next_row is not None and n + 1 < len(dense.lm.layers):
        normed = _norm(dense.lm.layers[n + 1].input_layernorm, out)
        _, nxt = dense.attention(n + 1, normed, torch.tensor(positions[: len(live)]))
        near(shown.next_row[b, :, 0][:, live], nxt[:, -1], tol, f"next row after layer {n}, sample {b}")


def near(got: Tensor, want: Tensor, tol: float, what: str) -> None:
    """Check that the largest difference is at most `tol` times the largest expected value."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} against {tuple(want.shape)}"
    gap = float((got.to(want.dtype) - want).abs().max()) if got.numel() else 0.0
    size = max(float(want.abs().max()) if want.numel() else 0.0, 1e-6)
    assert gap <= tol * size, f"{what}: off by {gap:.2e} at a size of {size:.2e}"
