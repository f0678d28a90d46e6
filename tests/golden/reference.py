"""The model and the prompts that the recorded vectors were made with, drawn again from their seeds.

Model: Llama of 32 layers, width 64, 4 heads, MLP 128, vocabulary 256; CLIP of 4 blocks, width 64, 4 heads, 336 / 14
pixels (576 patches), quick_gelu. All matrices N(0, 0.02), norms 1, biases 0, q and k times 8 (Llama) and 11 (CLIP),
so that attention is neither flat nor one-hot; embedding rows 128.. share three directions. A second tower has 24
blocks, biases and norms that are not 0 and 1, and q and k times 6.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SEED = 20260101
LAYERS, WIDTH, MLP, VOCAB = 32, 64, 128, 256
CLIP_START = 1_765_056
"""Position in the stream of the vision tower's first number."""
IMAGE = -200
SHARED = ((128, 160, 0.12), (160, 192, 0.35), (192, 256, 0.5))
"""First embedding row, last row + 1, share of the rows' own direction."""


class _Stream:
    """Draws consecutive tensors of one seeded normal stream (all sizes are multiples of 16, as torch draws them)."""

    def __init__(self, count: int) -> None:
        self.values = torch.empty(count).normal_(0, 0.02, generator=torch.Generator().manual_seed(SEED))
        self.at = 0

    def __call__(self, *size: int, gain: float = 1.0) -> Tensor:
        n = torch.Size(size).numel()
        out = self.values[self.at : self.at + n].view(size) * gain
        self.at += n
        return out


def _llm(draw: _Stream) -> dict[str, Tensor]:
    embed = draw(VOCAB, WIDTH)
    for (first, last, own), base in zip(SHARED, draw(3, WIDTH), strict=True):
        embed[first:last] = base * (1 - own * own) ** 0.5 + own * embed[first:last]
    state = {"model.embed_tokens.weight": embed}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            state[f"{p}self_attn.{name}_proj.weight"] = draw(WIDTH, WIDTH, gain=8.0 if name in "qk" else 1.0)
        state[p + "mlp.gate_proj.weight"] = draw(MLP, WIDTH)
        state[p + "mlp.up_proj.weight"] = draw(MLP, WIDTH)
        state[p + "mlp.down_proj.weight"] = draw(WIDTH, MLP)
        state[p + "input_layernorm.weight"] = torch.ones(WIDTH)
        state[p + "post_attention_layernorm.weight"] = torch.ones(WIDTH)
    state["model.norm.weight"] = torch.ones(WIDTH)
    state["lm_head.weight"] = draw(VOCAB, WIDTH)
    for i in (0, 2):
        state[f"model.mm_projector.{i}.weight"] = draw(WIDTH, WIDTH)
        state[f"model.mm_projector.{i}.bias"] = torch.zeros(WIDTH)
    return state


def _clip(blocks: int) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
        projection_dim=WIDTH,
    )
    return CLIPVisionModel(config)


def _tower(draw: _Stream) -> Any:
    model = _clip(4)
    draw.at = CLIP_START
    state = {k: torch.ones_like(v) if "norm" in k else torch.zeros_like(v) for k, v in model.state_dict().items()}
    state |= {k: torch.zeros_like(v) for k, v in state.items() if k.endswith("bias")}
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in state) else ""
    e = prefix + "embeddings."
    state[e + "class_embedding"] = draw(WIDTH)
    state[e + "patch_embedding.weight"] = draw(WIDTH, 3, 14, 14)
    state[e + "position_embedding.weight"] = draw(577, WIDTH)
    for i in range(4):
        p = f"{prefix}encoder.layers.{i}."
        state[p + "mlp.fc1.weight"] = draw(MLP, WIDTH)
        state[p + "mlp.fc2.weight"] = draw(WIDTH, MLP)
        for name in ("k", "out", "q", "v"):
            state[f"{p}self_attn.{name}_proj.weight"] = draw(WIDTH, WIDTH, gain=11.0 if name in "qk" else 1.0)
    model.load_state_dict(state)
    return model


def _deep_tower(shallow: Any) -> Any:
    """Return the tower of 24 blocks: one normal stream over its parameters by name, embeddings of the other tower."""
    model, shared = _clip(24), shallow.state_dict()
    draw = torch.Generator().manual_seed(SEED + 1)
    state = {}
    for name in sorted(model.state_dict()):
        scale = 0.05 if name.endswith("bias") else 0.1 if "norm" in name else 0.02
        value = torch.empty(model.state_dict()[name].shape).normal_(0, scale, generator=draw)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = 6 * value
        elif "norm" in name and name.endswith("weight"):
            value = 1 + value
        state[name] = shared[name] if "embeddings" in name else value
    model.load_state_dict(state)
    return model


def write_reference(folder: Path, deep: bool = False) -> Path:
    """Write the checkpoint in haotian-liu/LLaVA's format, without tokenizer files, and return `folder`.

    Args:
        folder: the folder to write.
        deep: use the tower of 24 blocks.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    draw = _Stream(CLIP_START + 205_696)
    save_file({k: v.contiguous() for k, v in _llm(draw).items()}, folder / "model.safetensors", {"format": "pt"})
    tower = _tower(draw)
    (_deep_tower(tower) if deep else tower).save_pretrained(folder / "clip")
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": None,  # the recorded answers do not stop
        "pad_token_id": 0,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": WIDTH,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "clip",
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 2048,
        "torch_dtype": "float32",
        "use_mm_proj": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Case:
    """A prompt with its image.

    Attributes:
        ids: token ids, -200 for the image.
        pixels: (1, 3, 336, 336) float32, with values rounded to float16.
    """

    ids: list[int]
    pixels: Tensor


def _image(draw: torch.Generator, grid: int, noise: float, gain: float) -> Tensor:
    coarse = torch.randn(1, 3, grid, grid, generator=draw)
    smooth = functional.interpolate(coarse, size=(336, 336), mode="bicubic", align_corners=False) * gain
    return (smooth + noise * torch.randn(1, 3, 336, 336, generator=draw)).half().float()


FIRST = {0: (20260001, 12, 0.3, 1.0), 1: (20260101, 24, 0.3, 1.0), 2: (20260201, 12, 0.5, 1.0)}
"""Seed, grid, noise and gain of the images in the vectors of AutoPrune, SparseVLM and PyramidDrop."""
SECOND = {0: (7104, 6, 0.3, 1.0, 35, 12), 1: (7201, 12, 0.15, 1.2, 35, 37), 2: (7304, 5, 0.2, 1.5, 35, 90)}
"""The same and the lengths of the prompt, for the vectors of FastV, VTW and the vision-side methods."""


def first_case(i: int, ids: list[int]) -> Case:
    """Return case i of the first set; its ids are stored in the recorded file."""
    seed, grid, noise, gain = FIRST[i]
    return Case(ids, _image(torch.Generator().manual_seed(seed), grid, noise, gain))


def second_case(i: int) -> Case:
    """Return case i of the second set, ids included."""
    seed, grid, noise, gain, before, after = SECOND[i]
    draw = torch.Generator().manual_seed(seed)
    pixels = _image(draw, grid, noise, gain)
    head = torch.randint(3, 250, (before - 1,), generator=draw).tolist()
    tail = torch.randint(3, 250, (after,), generator=draw).tolist()
    return Case([1, *head, IMAGE, *tail], pixels)
