"""CDPruner: keep visual tokens that are diverse and relevant to the instruction, by a determinantal point process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.selection import per_sample, take, true_first
from ..ops.similarity import unit, wide
from .base import EntryMethod, MethodInfo, in_raster_order
from .checks import choice, integer, real, shown
from .registry import register
from .views import View, VisionView

EPS = 1e-6
THETA, CONTRIB_EPS = 0.5, 1e-5
"""Constants of the variant "contrib": the factor on the relevance in the exponent, and the number added to a gain under
the root."""
LEAST = 1e-6
"""Smallest gain of a step, as a share of the gain of the first step. Below it, the remaining tokens are linearly
dependent on the chosen ones."""


def clip_relevance(image_embeds: Tensor, text_embeds: Tensor, sign: int = -1, strict: bool = False) -> Tensor:
    """Compute relevance by CLIP, for the official form. The default sign negates the cosines, as in the official code.

    Args:
        image_embeds: (N, T, C), patches of the crops of an image in the space that CLIP shares with text.
        text_embeds: (M, C), projected text vectors of the question's segments.
        sign: sign of the cosines, -1 or 1.
        strict: do not apply a lower limit to norms and to the range.

    Returns:
        (N, T) in at least float32: 1e-6 / range for the least relevant patch of all crops together, about 1 for the
        most relevant one; 1 if all patches are equally relevant.
    """
    e, t = wide(image_embeds), wide(text_embeds)
    if strict:
        e, t = e / e.norm(dim=2, keepdim=True), t / t.norm(dim=1, keepdim=True)
    else:
        e, t = unit(e), unit(t[None])[0]
    q = sign * (e @ t.T).mean(2)  # (N, T)
    span = q.max() - q.min()
    scaled = (q - q.min() + EPS) / span
    return scaled if strict else torch.where(span > EPS, scaled, 1.0)


def embedding_relevance(tokens: Tensor, text: Tensor, real: Tensor, sign: int = 1) -> Tensor:
    """Compute relevance by the language model's embeddings, for the embedding form.

    Args:
        tokens: (B, V, D), projected visual tokens.
        text: (B, D), mean of the input embeddings of the instruction tokens.
        real: (B, V) bool, False on padding.
        sign: sign of the cosines, 1 or -1.

    Returns:
        (B, V) in at least float32: 0 for the least relevant token of a sample, about 1 for the most relevant one; 1 if
        all tokens are equally relevant.
    """
    t = wide(text)
    t = t / (t.square().sum(1, keepdim=True) + EPS).sqrt()
    return _scaled(sign * (_unit(tokens) @ t[..., None])[..., 0], real)


def rows_relevance(tokens: Tensor, directions: Tensor, real: Tensor, sign: int = -1) -> Tensor:
    """Compute relevance as the mean cosine with all instruction tokens, for the variant "contrib".

    Args:
        tokens: (B, V, D), projected visual tokens.
        directions: (B, D), mean of the instruction tokens' input embeddings, each normalised to length 1.
        real: (B, V) bool, False on padding.
        sign: sign of the cosines, 1 or -1.

    Returns:
        As `embedding_relevance`.
    """
    return _scaled(sign * (_unit(tokens) @ wide(directions)[..., None])[..., 0], real)


def _scaled(q: Tensor, real: Tensor) -> Tensor:
    """Scale (B, V) scores to 0..1 over the real tokens of each sample; 1 if all are equal."""
    low = q.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    span = q.masked_fill(~real, -torch.inf).amax(1, keepdim=True) - low
    return torch.where(span > EPS, (q - low) / (span + EPS), 1.0)


def clip_kernel(tokens: Tensor, relevance: Tensor, strict: bool = False) -> Tensor:
    """Return (N, T, T) r_i S_ij r_j, S the cosines of (N, T, D) `tokens`; `strict` normalises in their dtype."""
    rows = (tokens / tokens.norm(dim=2, keepdim=True)).float() if strict else unit(tokens)
    similarity = rows @ rows.transpose(1, 2)
    return relevance[:, :, None] * similarity * relevance[:, None]


def embedding_kernel(tokens: Tensor, relevance: Tensor, weight: float = 0.5) -> Tensor:
    """Return (B, V, V) (1 - w) S_ij + w r_i S_ij r_j, S the cosines of (B, V, D) with norms sqrt(sum x^2 + 1e-6)."""
    rows = _unit(tokens)
    similarity = rows @ rows.transpose(1, 2)
    return similarity * ((1 - weight) + weight * relevance[:, :, None] * relevance[:, None])


def exponential_kernel(tokens: Tensor, relevance: Tensor) -> Tensor:
    """Return (B, V, V) exp(a r_i) S_ij exp(a r_j) with a = 0.5 ("contrib"); S as in `embedding_kernel`."""
    rows, weight = _unit(tokens), (THETA * relevance).exp()
    return weight[:, :, None] * (rows @ rows.transpose(1, 2)) * weight[:, None]


def _unit(tokens: Tensor) -> Tensor:
    x = wide(tokens)
    return x / (x.square().sum(2, keepdim=True) + EPS).sqrt()


def greedy(kernel: Tensor, real: Tensor, count: int, eps: float = 0.0, strict: bool = False) -> tuple[Tensor, Tensor]:
    """Run greedy MAP inference of a determinantal point process.

    Each step chooses the token that increases the determinant most. Once the best gain is at most 1e-6 of the first
    one, the remaining tokens are linear combinations of the chosen ones up to rounding. From then on, the tokens with
    the largest diagonal entries are chosen, ties by index.

    Args:
        kernel: (B, V, V).
        real: (B, V) bool, the tokens that may be chosen.
        count: K, number of steps; results of a sample are valid up to its number of real tokens.
        eps: added to the gain under the root.
        strict: as in the official code, where gains below rounding may choose a token again.

    Returns:
        (B, K) long, the tokens in the order of choice; (B, K), the gain of each at its step.
    """
    batch, size = real.shape
    diagonal = kernel.diagonal(dim1=1, dim2=2)  # (B, V)
    gain = diagonal.masked_fill(~real, -torch.inf)
    left = gain
    rows = kernel.new_zeros(batch, count, size)
    order, gains = [], []
    live, first = torch.ones_like(real[:, :1]), gain.amax(1, keepdim=True)  # (B, 1) each
    for step in range(count):
        best = gain.argmax(1, keepdim=True)  # (B, 1)
        value = gain.gather(1, best)
        if not strict:
            live = live & (value > LEAST * first)
            best = torch.where(live, best, left.argmax(1, keepdim=True))
            left = left.scatter(1, best, -torch.inf)
        order.append(best)
        gains.append(value)
        done = rows[:, :step]  # (B, step, V)
        weight = done.gather(2, best[:, None].expand(-1, step, -1))  # (B, step, 1)
        row = (take(kernel, best)[:, 0] - (weight * done).sum(1)) / (value + eps).sqrt()
        rows[:, step] = row
        gain = (gain - row.square()).scatter(1, best, -torch.inf)
    return torch.cat(order, 1), torch.cat(gains, 1)


PRESETS: dict[str, dict[str, Any]] = {"relevance": {"weight": 1.0}, "diversity": {"weight": 0.0}}


@register("cdpruner", presets=PRESETS)
@dataclass(frozen=True)
class CDPruner(EntryMethod):
    """Keep the set of visual tokens with the largest determinant, weighted by relevance to the instruction.

    Embedding form: relevance is the cosine of a projected visual token with the mean input embedding of all text tokens
    of the prompt, scaled to 0..1 over the visual tokens; the kernel is (1 - w) S + w r S r with S the cosines among
    visual tokens. Source: openvinotoolkit/openvino.genai @ da1db86, whole image.

    Official form, with `clip`: relevance is the negated cosine of a patch with the question in CLIP's shared space; the
    kernel is r S r. LLaVA's checkpoints do not contain CLIP's text tower, so `clip` names its folder, and
    `llava_prune.questions([...])` gives the question of each image. Source: Theia-4869/CDPruner @ 9541616.

    Variant "contrib" of the embedding form: relevance is the negated mean cosine with all text tokens, and exp(r / 2)
    replaces the weight. Source: openvinotoolkit/openvino_contrib @ 9b77af1. Its S is computed from the tower's
    features, here from the projected tokens.

    Deviations: exactly `tokens` tokens remain even if the rank of the kernel is smaller (the others are chosen by their
    diagonal entry), and a constant relevance counts as 1. The visual tokens of images in crops form one list, including
    newline tokens.

    Presets: "relevance" is w = 1, the official product; "diversity" is w = 0.

    Args:
        tokens: visual tokens kept in every layer.
        weight: w, share of the relevance in the kernel of the embedding form.
        sign: 1 prefers tokens that are similar to the text, -1 those that are not; the default is -1 with `clip` and
            "contrib", else 1.
        variant: variant of the embedding form, "genai" or "contrib".
        halves: choose half of the tokens from each half of the sequence, as openvino.genai does by default.
        strict: continue to choose by gains below rounding, as the official code does, instead of by diagonal entries;
            raises an error if a token is then chosen twice. Costs one synchronisation with the device.
        clip: folder of a complete CLIP with the model's vision tower, for the official form.
    """

    tokens: int = 64
    weight: float = 0.5
    sign: int | None = None
    variant: Literal["genai", "contrib"] = "genai"
    halves: bool = False
    strict: bool = False
    clip: str | None = None

    info = MethodInfo(
        paper="Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning, NeurIPS 2025",
        where="before the language model, on projected tokens and text embeddings",
        source="openvinotoolkit/openvino.genai @ da1db86 (embedding form), Theia-4869/CDPruner @ 9541616",
        licence="Apache-2.0",
    )

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, 1, none=False)
        real("weight", self.weight, 0, 1, none=False)
        if self.sign is not None:
            choice("sign", self.sign, (1, -1))
        choice("variant", self.variant, ("genai", "contrib"))
        for name in ("halves", "strict"):
            choice(name, getattr(self, name), (True, False))
        if self.clip is not None and not isinstance(self.clip, str):
            raise ValueError(f"clip={shown(self.clip)}: must be the folder of a CLIP with its text tower")
        if self.clip is not None and (self.halves or self.weight != 0.5 or self.variant != "genai"):
            raise ValueError("weight, variant and halves belong to the embedding form; leave them out, or clip")
        if self.variant == "contrib" and (self.halves or self.weight != 0.5):
            raise ValueError('weight and halves belong to the variant "genai"; leave them out')

    @property
    def sees_patches(self) -> bool:
        return self.clip is not None

    def prune_vision(self, view: VisionView) -> None:
        if self.clip is None:
            return
        patches, texts = view.clip_embeddings(self.strict)
        images = view.layout
        times = len(images) // max(len(texts), 1)  # beam search repeats each image
        if not texts or times * len(texts) != len(images):
            raise ValueError(f"{len(texts)} questions for {len(images)} images; give one for each image")
        parts = patches.split([image.crops for image in images])
        found = [clip_relevance(p, texts[i // times], self.sign or -1, self.strict) for i, p in enumerate(parts)]
        view.patch_values["relevance"] = torch.cat(found).float()  # (N, T); 0 on newline tokens, which come last

    def choose(self, view: View, tokens: Tensor, real: Tensor, keep: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        if self.clip is not None:
            places, _ = view.visual_tokens()
            kernel = clip_kernel(tokens, view.patch_values("relevance").gather(1, places), self.strict)
            order, _ = greedy(kernel, real, max(keep), strict=self.strict)
            return in_raster_order(refuse_repeats(order) if self.strict else order, keep), None
        text = view.valid & ~view.visual
        rows = wide(view.hidden) if self.variant == "genai" else unit(view.hidden)
        mean = (text[:, None].to(rows.dtype) @ rows)[:, 0] / text.sum(1, keepdim=True).clamp(min=1)  # (B, D)
        return in_raster_order(self.order(tokens, mean, real, keep), keep), None

    def order(self, tokens: Tensor, text: Tensor, real: Tensor, keep: Sequence[int]) -> Tensor:
        """Return (B, max(keep)) long, the tokens in the order of choice of the embedding form.

        Args:
            tokens: (B, V, D), projected visual tokens.
            text: (B, D), mean of the input embeddings of the instruction tokens, each normalised to length 1 for
                "contrib".
            real: (B, V) bool, False on padding.
            keep: number of tokens that remain in each sample.
        """
        if not self.halves:
            return self._order(tokens, text, real, max(keep))
        number, total = real.cumsum(1), real.sum(1, keepdim=True)  # (B, V), (B, 1)
        parts = [real & (number <= total // 2), real & (number > total // 2)]
        most = max(k - k // 2 for k in keep)
        found = [self._order(tokens, text, part, most) for part in parts]
        slots = torch.arange(most, device=real.device)
        counts = [k // 2 for k in keep], [k - k // 2 for k in keep]
        wanted = torch.cat([(slots < per_sample(c, real)).expand(real.shape[0], -1) for c in counts], 1)
        return torch.cat(found, 1).gather(1, true_first(wanted)[:, : max(keep)])

    def _order(self, tokens: Tensor, text: Tensor, real: Tensor, count: int) -> Tensor:
        if self.variant == "contrib":
            kernel = exponential_kernel(tokens, rows_relevance(tokens, text, real, self.sign or -1))
            order, _ = greedy(kernel, real, count, CONTRIB_EPS, self.strict)
        else:
            relevance = embedding_relevance(tokens, text, real, self.sign or 1)
            order, _ = greedy(embedding_kernel(tokens, relevance, self.weight), real, count, EPS, self.strict)
        return refuse_repeats(order) if self.strict else order

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [min(self.tokens, n_visual)] * n_layers


def refuse_repeats(order: Tensor) -> Tensor:
    """Return a (B, K) order unchanged if it contains no token twice; synchronises with the device.

    Raises:
        ValueError: if a token is repeated. The message states the number of independent tokens.
    """
    again = (order[:, :, None] == order[:, None]).tril(-1).any(2).any(0)  # (K,)
    if bool(again.any()):
        raise ValueError(
            f"strict=True: after {int(again.long().argmax())} tokens the others are combinations of them, and the "
            "official code then keeps fewer than asked; give fewer tokens, or leave strict out"
        )
    return order
