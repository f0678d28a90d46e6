"""Training stages 2 to 5 on features of the frozen tower: projector alignment, a shallow decoder, and its deepening."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from playground.tiny import scenes as sc
from playground.tiny import tokenizer as tk
from playground.tiny.bank import TYPES, Item, attention_bias, pack
from playground.tiny.data import SceneData
from playground.tiny.loop import ranks, run_stage, share, wait
from playground.tiny.model import Llama, Tower
from playground.tiny.nouns import Nouns, Words


@dataclass
class Material:
    """Inputs of the language stages."""

    data: SceneData
    bank: list[list[Item]]
    features: np.ndarray | None
    prefix: list[int]
    places: list[int]
    words: dict[str, list[int]]
    vocabulary: Words
    device: str


@torch.no_grad()
def cache_features(tower: Tower, data: SceneData, count: int, device: str, path: Path, batch: int = 32) -> np.ndarray:
    """Compute (count, 576, D) float16 patch features of the frozen tower once, and memory-map them from ``path``.

    Every process computes a part of the file.
    """
    shape = (count, sc.GRID**2, tower.patch.out_features)
    part = path.with_suffix(".part")
    if not path.exists():
        rank, world = ranks()
        if rank == 0:
            np.lib.format.open_memmap(part, "w+", np.float16, shape).flush()
        wait()
        result = np.load(part, mmap_mode="r+")
        low, high = count * rank // world, count * (rank + 1) // world
        for at in tqdm(range(low, high, batch), desc="features", mininterval=10, disable=rank > 0):
            patches = torch.from_numpy(data.patches[at : min(at + batch, high)]).flatten(1, 2).to(device)
            result[at : at + len(patches)] = tower(patches, last=False)[0][:, 1:].half().cpu().numpy()
        result.flush()
        wait()
        if rank == 0:
            part.rename(path)
        wait()
    return np.load(path, mmap_mode="r")


def pick(mat: Material, scenes: np.ndarray, chosen: torch.Tensor) -> torch.Tensor:
    """Return cached features of the chosen patches as float32 on the training device."""
    return torch.from_numpy(mat.features[scenes[:, None], chosen.numpy()]).float().to(mat.device)


def choose_tokens(
    data: SceneData, index: np.ndarray, keep: int, rng: np.random.Generator, things: bool
) -> torch.Tensor:
    """Return (B, keep) sorted patch indices: random ones or, with ``things``, preferably those on objects."""
    keys = rng.random((len(index), sc.GRID**2))
    if things:
        keys = keys + 2.0 * (data.instances[index].reshape(len(index), -1) > 0)
    return torch.from_numpy(np.sort(np.argpartition(-keys, keep - 1, axis=1)[:, :keep], axis=1))


def shown(mat: Material, scenes: np.ndarray, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of the thing at chosen patches (B, K), 0 for none, and its row of the table (B, K, 6)."""
    inst = torch.from_numpy(mat.data.instances[scenes].astype(np.int64)).flatten(1).gather(1, chosen)
    rows = torch.cat([torch.full((len(scenes), 1, 6), -1.0), torch.from_numpy(mat.data.tables[scenes])], 1)
    return inst, rows.gather(1, inst[..., None].expand(-1, -1, 6))


def place_loss(llama: Llama, visual: torch.Tensor, mat: Material, scenes: np.ndarray, chosen: torch.Tensor):
    """Return the loss that teaches projected patches to express the position of their thing.

    The similarity to "right" minus that to "left" should grow with the thing's centre from left to right, and likewise
    for "below" and "above". An answer about places can then be copied from the patch, as an answer about colours can.
    """
    width = llama.lm_head.in_features
    inst, mine = shown(mat, scenes, chosen)
    words = F.rms_norm(llama.embed_tokens(torch.tensor(mat.places, device=mat.device)), (width,))
    scores = F.rms_norm(llama.mm_projector(visual), (width,)) @ words.T * (8 / width)  # (B, K, 4)
    found = torch.stack([scores[..., 0] - scores[..., 1], scores[..., 2] - scores[..., 3]], -1)
    return F.smooth_l1_loss(found[inst > 0], 5 * mine[..., 4:6][inst > 0].to(mat.device))


def align_projector(llama: Llama, cfg: dict[str, Any], mat: Material, folder: Path, seed: int) -> None:
    """Run stage 2: align projected patches with the embeddings of the words for their content, and keep positions."""
    width = llama.lm_head.in_features
    places = nn.Linear(width, 5)
    model = nn.ModuleDict({"llama": llama, "places": places}).to(mat.device)
    for name, p in llama.named_parameters():
        p.requires_grad_(name.startswith(("mm_projector", "embed_tokens")))

    def step(index: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        scenes = rng.integers(0, len(mat.features), share(cfg["batch"]))
        chosen = choose_tokens(mat.data, scenes, cfg["keep"], rng, True)
        feats = pick(mat, scenes, chosen)
        inst, mine = shown(mat, scenes, chosen)
        own = torch.stack([chosen % sc.GRID, chosen // sc.GRID], -1) * (2 / sc.GRID) + (1 / sc.GRID - 1)
        centre = ((own - mine[..., 4:6]).abs().amax(-1) < 1 / sc.GRID) & (inst > 0)
        out = F.rms_norm(llama.mm_projector(feats), (width,))
        logits = out @ F.rms_norm(llama.embed_tokens.weight, (width,)).T * (8 / width)
        loss, figures = logits.new_zeros(()), {}
        for column, key in enumerate(("shape", "colour", "size", "mark")):
            table = torch.tensor(mat.words[key])
            valid = (inst > 0) & (mine[..., column] > (0 if key == "mark" else -1))
            target = mine[..., column].long()[valid] - (1 if key == "mark" else 0)
            scores = logits[valid][:, table.to(mat.device)]
            loss = loss + F.cross_entropy(scores, target.to(mat.device))
            figures[key] = (scores.argmax(-1).cpu() == target).float().mean().item()
        guess = places(out)
        goal = torch.cat([own, torch.where(inst[..., None] > 0, mine[..., 4:6], own)], -1).to(mat.device)
        loss = loss + 2 * F.smooth_l1_loss(guess[..., :4], goal, beta=0.1)
        loss = loss + F.binary_cross_entropy_with_logits(guess[..., 4], centre.float().to(mat.device))
        figures["place"] = (guess[..., :2] - goal[..., :2]).abs().mean().item()
        return loss, figures

    run_stage("align", model, step, cfg, folder, seed)
    for p in llama.parameters():
        p.requires_grad_(True)


def answer_loss(
    llama: Llama,
    visual: torch.Tensor,
    mat: Material,
    index: np.ndarray,
    rng: np.random.Generator,
    cfg: dict[str, Any],
    nouns: Nouns | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the cross entropy of answers and end tokens of packed questions, and the accuracy by type."""
    weights = np.array([cfg.get("weights", {}).get(t, 1.0) for t in TYPES])
    batch = pack(mat.bank, index, cfg["budget"], rng, cfg["full"], weights)
    device = mat.device
    start = llama.embed_tokens(torch.tensor(mat.prefix, device=device)).expand(len(index), -1, -1)
    embeds = torch.cat([start, llama.mm_projector(visual), llama.embed_tokens(batch.ids.to(device))], 1)
    prefix = len(mat.prefix) + visual.shape[1]
    system = len(mat.prefix) - 1  # a prompt without an image lacks the space before the image
    begin = torch.where(batch.alone, system, prefix)
    positions = torch.cat([torch.arange(prefix).expand(len(index), -1), batch.positions + begin], 1).to(device)
    hidden, states = llama(embeds, positions, attention_bias(prefix, system, batch).to(device))
    hidden = hidden[:, prefix:]
    spots = batch.labels != -100
    labels, kinds = batch.labels[spots].to(device), batch.kinds[spots]
    logits = llama.lm_head(hidden[spots.to(device)]).float()
    loss = F.cross_entropy(logits, labels, reduction="none")
    last = kinds >= 0
    right = (logits.argmax(-1) == labels).cpu()[last].float()
    figures = {"right": right.mean().item()}
    for kind in kinds[last].unique().tolist():
        figures[TYPES[kind]] = right[kinds[last] == kind].mean().item()
    weight = torch.where(last, 1.0, 0.2).to(device)
    loss = (loss * weight).sum() / weight.sum()
    if nouns is not None:
        depth = len(states)
        half, late = (states[i - 1][:, prefix:] for i in (depth // 2, depth * 3 // 4))
        more, known = nouns(mat.vocabulary, half, late, batch, mat.data.tables[index])
        loss, figures = loss + cfg["nouns"] * more, figures | known
    return loss, figures


def between(ends: list[float], part: float) -> float:
    """Interpolate linearly between two numbers; ``part`` is 0 for the first and 1 for the second."""
    return ends[0] + (ends[1] - ends[0]) * part


def train_decoder(
    name: str, llama: Llama, cfg: dict[str, Any], mat: Material, folder: Path, seed: int, nouns: Nouns | None = None
) -> None:
    """Run one of stages 3 to 5: train the decoder on cached features and few visual tokens."""

    def step(index: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        scenes = rng.integers(0, len(mat.features), share(cfg["batch"]))
        keep = int(np.random.default_rng([seed, index]).integers(cfg["keep"][0], cfg["keep"][1] + 1))
        chosen = choose_tokens(mat.data, scenes, keep, rng, cfg.get("things", True))
        visual = pick(mat, scenes, chosen)
        now = dict(cfg, full=between(cfg["full"], index / cfg["steps"]))
        now["weights"] = {k: between(v, index / cfg["steps"]) for k, v in cfg.get("weights", {}).items()}
        with torch.autocast(mat.device, torch.bfloat16, enabled=mat.device != "cpu"):
            loss, figures = answer_loss(llama, visual, mat, scenes, rng, now, nouns)
            place = place_loss(llama, visual, mat, scenes, chosen)
        return loss + cfg["places"] * place, figures | {"place": place.item()}

    model = llama if nouns is None else nn.ModuleDict({"llama": llama, "nouns": nouns})
    run_stage(name, model, step, cfg, folder, seed)


def word_ids(folder: Path) -> dict[str, list[int]]:
    """Return the token of every shape, colour, size and mark word (with its leading space)."""
    model = tk.load(folder)
    lists = {"shape": sc.SHAPES, "colour": sc.COLOUR_NAMES, "size": sc.SIZES, "mark": sc.MARKS[1:]}
    return {key: [model.encode(word)[-1] for word in words] for key, words in lists.items()}
