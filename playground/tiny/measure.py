"""Accuracy of a checkpoint with all or some visual tokens: ``python -m playground.tiny.measure``.

Loads the exported files into transformers' ``CLIPVisionModel`` and ``LlamaForCausalLM`` and decodes greedily.  A
subset of the visual tokens is either random or the one the CLS token of the feature layer attends to most; the kept
tokens stay in order and the positions are renumbered consecutively.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from playground.tiny import tokenizer as tk
from playground.tiny.data import MEAN, STD
from playground.tiny.scenes import preprocess

log = logging.getLogger(__name__)


class Evaluated:
    """A checkpoint folder loaded through transformers."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "config.json").read_text())
        tensors = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        used = {k: config[k] for k in LlamaConfig().to_dict() if k in config and k not in ("model_type", "torch_dtype")}
        used.pop("architectures", None)
        used.pop("rope_scaling", None)
        self.llm = LlamaForCausalLM(LlamaConfig(**used)).eval()
        plain = {k: v for k, v in tensors.items() if "mm_projector" not in k}
        self.llm.load_state_dict(plain)
        self.projector = nn.Sequential(
            nn.Linear(config["mm_hidden_size"], config["hidden_size"]),
            nn.GELU(),
            nn.Linear(config["hidden_size"], config["hidden_size"]),
        )
        prefix = "model.mm_projector."
        self.projector.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        clip = json.loads((folder / config["mm_vision_tower"] / "config.json").read_text())
        clip = CLIPVisionConfig(**{k: v for k, v in clip.items() if k not in ("torch_dtype", "architectures")})
        clip._attn_implementation = "eager"
        self.tower = CLIPVisionModel(clip).eval()
        weights = {k: v.float() for k, v in load_file(folder / config["mm_vision_tower"] / "model.safetensors").items()}
        if not any(k.startswith("vision_model.") for k in self.tower.state_dict()):
            weights = {k.removeprefix("vision_model."): v for k, v in weights.items()}
        missing = self.tower.load_state_dict(weights, strict=False)
        if missing.unexpected_keys or [k for k in missing.missing_keys if not k.endswith("position_ids")]:
            raise ValueError(f"vision tower weights do not fit: {missing}")
        self.layer, self.side = config["mm_vision_select_layer"], clip.image_size
        self.tokens = tk.load(folder)

    @torch.no_grad()
    def see(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Return projected visual tokens (N, D) and the feature layer's CLS attention (N,), averaged over heads."""
        pixels = torch.from_numpy(preprocess(image, self.side).copy()).permute(2, 0, 1).float() / 255
        pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        out = self.tower(pixels[None], output_hidden_states=True, output_attentions=True)
        features = out.hidden_states[self.layer][0, 1:]
        return self.projector(features), out.attentions[self.layer][0, :, 0, 1:].mean(0)

    @torch.no_grad()
    def answer(self, visual: torch.Tensor, text: str, limit: int = 8) -> str:
        """Return the greedy answer to one user text about the given visual tokens."""
        ids = tk.encode_prompt(self.tokens, tk.prompt(text))
        at = ids.index(tk.IMAGE)
        embed = self.llm.get_input_embeddings()
        before, after = (embed(torch.tensor(part, dtype=torch.long)) for part in (ids[:at], ids[at + 1 :]))
        embeds, cache, made = torch.cat([before, visual, after])[None], None, []
        for _ in range(limit):
            out = self.llm(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
            token = int(out.logits[0, -1].argmax())
            if token == self.tokens.eos_id():
                break
            made.append(token)
            cache, embeds = out.past_key_values, embed(torch.tensor([[token]]))
        return self.tokens.decode(made).strip()


def subset(mode: str, scores: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the sorted indices of the kept visual tokens for ``full``, ``random:K`` or ``cls:K``."""
    if mode == "full":
        return torch.arange(len(scores))
    name, keep = mode.split(":")
    if name == "cls":
        return scores.topk(int(keep)).indices.sort().values
    rng = np.random.default_rng([20_16, seed])
    return torch.from_numpy(np.sort(rng.choice(len(scores), int(keep), replace=False)))


def normal(text: str) -> str:
    """Normalise a prediction as GQA does."""
    return text.rstrip(".").lower()


def measure(model: Evaluated, data: Path, modes: list[str], limit: int | None = None) -> dict[str, dict[str, float]]:
    """Return the percentage of correct answers per mode, overall and by structural and detailed type."""
    notes = json.loads((data / "data" / "testdev_balanced_questions.json").read_text(encoding="utf-8"))
    lines = (data / "llava_gqa_testdev_balanced.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
    hits: dict[str, dict[str, list[float]]] = {m: defaultdict(list) for m in modes}
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for number, row in enumerate(map(json.loads, tqdm(lines, mininterval=10))):
        if row["image"] not in seen:
            seen = {row["image"]: model.see(Image.open(data / "data" / "images" / row["image"]).convert("RGB"))}
        visual, scores = seen[row["image"]]
        note = notes[row["question_id"]]
        for mode in modes:
            said = normal(model.answer(visual[subset(mode, scores, number)], row["text"]))
            for key in ("all", note["types"]["structural"], note["types"]["detailed"]):
                hits[mode][key].append(float(said == note["answer"]))
    return {m: {k: 100 * float(np.mean(v)) for k, v in sorted(table.items())} for m, table in hits.items()}


def chance(data: Path) -> dict[str, float]:
    """Return the percentage correct of the best constant answer per detailed type and per structural type."""
    notes = json.loads((data / "data" / "testdev_balanced_questions.json").read_text(encoding="utf-8"))
    result = {}
    for level in ("detailed", "structural"):
        table: dict[str, Counter] = defaultdict(Counter)
        for note in notes.values():
            table[note["types"][level]][note["answer"]] += 1
        result[level] = 100 * sum(max(c.values()) for c in table.values()) / len(notes)
    return result


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("playground/models/llava-tiny"))
    parser.add_argument("--data", type=Path, default=Path("playground/data/mini/gqa"))
    modes = ["full", *(f"{name}:{k}" for k in (192, 128, 64) for name in ("cls", "random"))]
    parser.add_argument("--modes", nargs="+", default=modes)
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    result = measure(Evaluated(args.model), args.data, args.modes, args.limit)
    log.info("best constant answer: %s", json.dumps(chance(args.data)))
    keys = list(result[args.modes[0]])
    log.info("%-20s %s", "", " ".join(f"{m:>10}" for m in args.modes))
    for key in sorted(keys, key=lambda k: (k != "all", k)):
        log.info("%-20s %s", key, " ".join(f"{result[m][key]:10.1f}" for m in args.modes))


if __name__ == "__main__":
    main()
