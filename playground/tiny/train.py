"""Train the miniature LLaVA and export it: ``python -m playground.tiny.train --out DIR``.

Checkpoints and the log go to ``DIR/work``; the finished checkpoint is ``DIR`` itself.  ``--resume`` continues an
interrupted run; without it an existing work folder is refused.  Several processes (CPU cores or GPUs) share the
batches when started by ``torchrun --nproc_per_node N -m playground.tiny.train ...``; GPUs step through DeepSpeed
where that is installed (extra ``deepspeed``).
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from playground.tiny import tokenizer as tk
from playground.tiny.bank import Item, load_or_build
from playground.tiny.data import SceneData, load_or_generate
from playground.tiny.export import export
from playground.tiny.llm import Material, align_projector, cache_features, train_decoder, word_ids
from playground.tiny.loop import ranks, wait
from playground.tiny.model import Llama
from playground.tiny.nouns import Nouns, Words
from playground.tiny.tower import train_tower

log = logging.getLogger(__name__)


def prepare(cfg: dict[str, Any], out: Path) -> tuple[SceneData, list[list[Item]]]:
    """Prepare tokenizer, rendered scenes and tokenised questions; the first process makes them, others read them."""
    work, rank = out / "work", ranks()[0]
    for turn in (0, 1):
        if (rank > 0) == (turn > 0):
            if not (out / "tokenizer.model").exists():
                tk.train_tokenizer(out, cfg["vocab"])
            data = load_or_generate(work / "data", 0, cfg["scenes"], cfg["workers"])
            bank = load_or_build(out, work / "bank.pickle", cfg["scenes"], tuple(cfg["questions"]), cfg["workers"])
        wait()
    return data, bank


def run(cfg: dict[str, Any], out: Path, device: str) -> None:
    """Run all stages; each resumes from its checkpoint and is skipped if that is complete."""
    work, seed = out / "work", int(cfg["seed"])
    data, bank = prepare(cfg, out)
    tower = train_tower(cfg["tower"], data, work, seed, device)
    tokens = tk.load(out)
    prefix = [tokens.bos_id(), *tokens.encode(tk.SYSTEM + " USER: ")]
    places = [tokens.encode(word)[-1] for word in ("right", "left", "below", "above")]
    mat = Material(data, bank, None, prefix, places, word_ids(out), Words.read(out), device)
    torch.manual_seed(seed)
    llama = Llama(tokens.get_piece_size(), cfg["small"]["layers"], vision=cfg["tower"]["model"]["width"]).to(device)
    nouns = Nouns(llama.lm_head.in_features).to(device)
    mat.features = cache_features(tower, data, cfg["cached"], device, work / "features.npy")
    if not (work / "pairs.pt").exists():
        align_projector(llama, cfg["align"], mat, work, seed)
        train_decoder("small", llama, cfg["small"], mat, work, seed)
    train_decoder("pairs", llama, {**cfg["small"], **cfg["pairs"]}, mat, work, seed, nouns)
    llama = llama.deepened(cfg["deep"]["times"]).to(device)
    train_decoder("deep", llama, cfg["deep"], mat, work, seed, nouns)
    if ranks()[0] == 0:
        export(out, tower, llama, cfg["export"]["dtype"])
        log.info("exported to %s", out)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("recipe.yaml"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in OUT/work")
    parser.add_argument("--start", type=Path, help="begin with copies of this folder's checkpoints and tokenizer")
    args = parser.parse_args()
    if (args.out / "work").exists() and not args.resume and os.environ.get("RANK", "0") == "0":
        sys.exit(f"{args.out / 'work'} exists: pass --resume to continue that run")
    cfg = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    device, single = args.device, "WORLD_SIZE" not in os.environ
    if not single:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif device == "cpu":
        torch.set_num_threads(cfg["threads"])
    (args.out / "work").mkdir(parents=True, exist_ok=True)
    for path in sorted(args.start.iterdir()) if args.start and ranks()[0] == 0 else ():
        target = args.out / ("work" if path.suffix == ".pt" else ".") / path.name
        if not target.exists():
            shutil.copy(path, target)
    wait()
    handlers = [logging.StreamHandler(), logging.FileHandler(args.out / "work" / "train.log")]
    level = logging.INFO if ranks()[0] == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", handlers=handlers)
    run(cfg, args.out, device)


if __name__ == "__main__":
    main()
