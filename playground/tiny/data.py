"""Training data of the tower: patchified scenes, instance maps and tables of things."""

from __future__ import annotations

import logging
import multiprocessing as mp
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from playground.tiny import scenes as sc

log = logging.getLogger(__name__)
MAX_THINGS = 8
VALIDATION_SEED = 5_000_000
HELD_OUT_SEED = 10_000_000
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PAIRS = len(sc.SHAPES) * len(sc.COLOURS)
PRESENCE = PAIRS + len(sc.MARKS) - 1


def patchify(pixels: np.ndarray) -> np.ndarray:
    """Reshape (168, 168, 3) to (24, 24, 147); each patch is flattened channel first, like a convolution kernel."""
    g, p = sc.GRID, sc.PATCH
    return pixels.reshape(g, p, g, p, 3).transpose(0, 2, 4, 1, 3).reshape(g, g, 3 * p * p)


def pixels_of(scene: sc.Scene) -> np.ndarray:
    """Return a scene's preprocessed training image, at a random scale and two times in three with JPEG artefacts."""
    rng = np.random.default_rng([20_13, scene.seed])
    image = sc.render(scene, (1.0, 1.0, 1.5)[rng.integers(3)])
    if rng.random() < 0.67:
        image = sc.jpeg(image, int(rng.integers(88, 97)))
    return sc.preprocess(image)


def table(scene: sc.Scene) -> np.ndarray:
    """Return (8, 6) float32 rows: shape, colour, size and mark indices, and the centre in the padded square.

    Coordinates are in [-1, 1].
    """
    rows = np.full((MAX_THINGS, 6), -1, np.float32)
    ox, oy = scene.offset()
    for i, t in enumerate(scene.things):
        kinds = (sc.SHAPES.index(t.shape), sc.COLOUR_NAMES.index(t.colour), sc.SIZES.index(t.size))
        centre = ((t.cx + ox) / sc.SIDE * 2 - 1, (t.cy + oy) / sc.SIDE * 2 - 1)
        rows[i] = (*kinds, sc.MARKS.index(t.mark), *centre)
    return rows


def _one(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scene = sc.make_scene(seed)
    return patchify(pixels_of(scene)), sc.instance_map(scene), table(scene)


@dataclass
class SceneData:
    """The data of consecutive scenes.

    Attributes:
        patches: (N, 24, 24, 147) uint8.
        instances: (N, 24, 24) uint8 instance maps.
        tables: (N, 8, 6) float32 tables of things.
        first: seed of the first scene.
    """

    patches: np.ndarray
    instances: np.ndarray
    tables: np.ndarray
    first: int

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.patches)


def generate(first: int, count: int, workers: int) -> SceneData:
    """Render ``count`` scenes from consecutive seeds in ``workers`` processes."""
    data = SceneData(
        np.empty((count, sc.GRID, sc.GRID, 3 * sc.PATCH**2), np.uint8),
        np.empty((count, sc.GRID, sc.GRID), np.uint8),
        np.empty((count, MAX_THINGS, 6), np.float32),
        first,
    )
    with mp.get_context("fork").Pool(workers) as pool:
        results = pool.imap(_one, range(first, first + count), chunksize=32)
        for i, (patches, instances, rows) in enumerate(tqdm(results, total=count, desc="scenes", mininterval=5)):
            data.patches[i], data.instances[i], data.tables[i] = patches, instances, rows
    return data


def load_or_generate(folder: Path, first: int, count: int, workers: int) -> SceneData:
    """Load :func:`generate`'s result from ``folder``, generating it if it does not exist, e.g. for a resumed run."""
    names = {key: folder / f"{key}_{first}_{count}.npy" for key in ("patches", "instances", "tables")}
    if all(path.exists() for path in names.values()):
        return SceneData(**{key: np.load(path, mmap_mode="r") for key, path in names.items()}, first=first)
    data = generate(first, count, workers)
    folder.mkdir(parents=True, exist_ok=True)
    for key, path in names.items():
        np.save(path, getattr(data, key))
    return data


def normalise(patches: torch.Tensor) -> torch.Tensor:
    """Apply CLIP's normalisation to uint8 patches (..., 147), channel first within a patch."""
    repeat = sc.PATCH**2
    mean = torch.tensor(MEAN, device=patches.device).repeat_interleave(repeat)
    std = torch.tensor(STD, device=patches.device).repeat_interleave(repeat)
    return (patches.float() / 255 - mean) / std


def windows(data: SceneData, index: np.ndarray, size: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Cut random ``size`` x ``size`` patch windows from the scenes ``index``, with their labels.

    The patches of a thing that is less than 60 % inside the window have label -100, and the thing does not count as
    present.
    """
    n, span = len(index), np.arange(size)
    top, left = rng.integers(0, sc.GRID - size + 1, (2, n))
    rows, cols = (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]
    pick = index[:, None, None]
    inst = data.instances[pick, rows, cols].reshape(n, -1).astype(np.int64)
    whole = data.instances[index].reshape(n, -1)
    ids = (rows * sc.GRID + cols).reshape(n, -1)
    ones = np.arange(n)[:, None]
    inside = np.zeros((n, MAX_THINGS + 1))
    total = np.zeros((n, MAX_THINGS + 1))
    np.add.at(inside, (ones, inst), 1)
    np.add.at(total, (ones, whole), 1)
    seen = inside >= 0.6 * np.maximum(total, 1)
    seen[:, 0] = True
    return _labels(data, index, inst, ids, seen) | {
        "patches": torch.from_numpy(data.patches[pick, rows, cols].reshape(n, size * size, -1)),
        "ids": torch.from_numpy(ids),
    }


def _labels(
    data: SceneData, index: np.ndarray, inst: np.ndarray, ids: np.ndarray, seen: np.ndarray
) -> dict[str, torch.Tensor]:
    """Return dense and presence labels of windows (see :func:`windows`)."""
    n, ones = len(index), np.arange(len(index))[:, None]
    rows = data.tables[index]
    padded = np.concatenate([np.full((n, 1, 6), -1, np.float32), rows], 1)
    mine = padded[ones, inst]
    ignore = ~seen[ones, inst]
    own = np.stack([ids % sc.GRID, ids // sc.GRID], -1) * (2 / sc.GRID) + (1 / sc.GRID - 1)
    goal = np.where(inst[..., None] > 0, mine[..., 4:6], own)
    is_centre = (np.abs(own - mine[..., 4:6]).max(-1) < 1 / sc.GRID) & (inst > 0)
    present = np.zeros((n, PRESENCE), np.float32)
    for slot in range(MAX_THINGS):
        ok = seen[:, slot + 1] & (rows[:, slot, 0] >= 0)
        pair = (rows[:, slot, 0] * len(sc.COLOURS) + rows[:, slot, 1]).astype(int)
        present[np.nonzero(ok)[0], pair[ok]] = 1
        ok &= rows[:, slot, 3] > 0
        present[np.nonzero(ok)[0], PAIRS + rows[ok, slot, 3].astype(int) - 1] = 1
    result = {"foreground": inst > 0, "ignore": ignore, "centre": is_centre.astype(np.float32), "present": present}
    for column, key in enumerate(("shape", "colour", "size", "mark")):
        label = mine[..., column].astype(np.int64) + (0 if key == "mark" else 1)
        label[inst == 0] = 0
        label[ignore] = -100
        result[key] = label
    result["own"], result["goal"] = own.astype(np.float32), goal.astype(np.float32)
    return {key: torch.from_numpy(value) for key, value in result.items()}
