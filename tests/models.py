"""Small random LLaVAs with the same weights in every class, and batches for them.

6 decoder layers of width 64 with 4 heads, a CLIP tower of 4 blocks on 6 x 6 patches of 14 pixels, vocabulary 128.
Import as `from tests.models import tiny_hf`; the fixtures `tiny` and `tiny_models` are in tests/conftest.py.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llava_prune
from llava_prune.models.load import Loaded

LAYERS = 6
HEADS = 4
WIDTH = 64
VOCAB = 128
GRID = 6
PATCHES = GRID * GRID
SIDE = 14 * GRID
IMAGE = -200
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]  # (width, height)


class _Draw:
    """Draws seeded weights, large enough that attention is far from uniform."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=self.generator) * scale

    def linear(self, out: int, width: int, gain: float = 1.0) -> Tensor:
        return self(out, width, scale=gain * width**-0.5)

    def norm(self, width: int) -> Tensor:
        return 1 + self(width, scale=0.1)


def llm_state(seed: int = 0, kv_heads: int = HEADS, anyres: bool = False) -> dict[str, Tensor]:
    """Return the weights of language model, projector and newline under haotian-liu/LLaVA's names."""
    draw, mlp, kv = _Draw(seed), 2 * WIDTH, WIDTH // HEADS * kv_heads
    state = {"model.embed_tokens.weight": draw(VOCAB, WIDTH)}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        state |= {
            p + "input_layernorm.weight": draw.norm(WIDTH),
            p + "self_attn.q_proj.weight": draw.linear(WIDTH, WIDTH, 1.5),
            p + "self_attn.k_proj.weight": draw.linear(kv, WIDTH, 1.5),
            p + "self_attn.v_proj.weight": draw.linear(kv, WIDTH),
            p + "self_attn.o_proj.weight": draw.linear(WIDTH, WIDTH),
            p + "post_attention_layernorm.weight": draw.norm(WIDTH),
            p + "mlp.gate_proj.weight": draw.linear(mlp, WIDTH),
            p + "mlp.up_proj.weight": draw.linear(mlp, WIDTH),
            p + "mlp.down_proj.weight": draw.linear(WIDTH, mlp),
        }
    state |= {
        "model.norm.weight": draw.norm(WIDTH),
        "lm_head.weight": draw.linear(VOCAB, WIDTH),
        "model.mm_projector.0.weight": draw.linear(WIDTH, WIDTH),
        "model.mm_projector.0.bias": draw(WIDTH, scale=0.1),
        "model.mm_projector.2.weight": draw.linear(WIDTH, WIDTH),
        "model.mm_projector.2.bias": draw(WIDTH, scale=0.1),
    }
    if anyres:
        state["model.image_newline"] = draw(WIDTH)
    return state


def tower(seed: int = 1) -> Any:
    """Return a CLIP tower with random weights, biases and norms."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=14,
        projection_dim=WIDTH,
    )
    model, draw = CLIPVisionModel(config), _Draw(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(draw.norm(p.shape[0]) if "norm" in name and "weight" in name else draw(*p.shape, scale=0.1))
            elif "position_embedding" in name:
                p.copy_(draw(*p.shape, scale=0.5))
            else:
                gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                p.copy_(draw(*p.shape, scale=gain * p[0].numel() ** -0.5))
    return model.eval()


def config(kv_heads: int = HEADS, anyres: bool = False, language: str = "llama") -> dict[str, Any]:
    """Return config.json in haotian-liu/LLaVA's format; without an end-of-sequence id, answer lengths are known."""
    return {
        "architectures": [f"Llava{language.capitalize()}ForCausalLM"],
        "model_type": f"llava_{language}",
        **({"sliding_window": None} if language == "mistral" else {}),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "image_aspect_ratio": "anyres" if anyres else "pad",
        "image_grid_pinpoints": PINPOINTS if anyres else None,
        "mm_hidden_size": WIDTH,
        "mm_patch_merge_type": "spatial_unpad" if anyres else "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "clip",
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 4096,
        "tokenizer_padding_side": "left",
        "torch_dtype": "float32",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }


def write_checkpoint(
    folder: Path, seed: int = 0, kv_heads: int = HEADS, anyres: bool = False, language: str = "llama"
) -> Path:
    """Write a checkpoint in haotian-liu/LLaVA's format, with the tower inside it, and return `folder`."""
    from safetensors.torch import save_file

    from llava_prune.models.files import processor_class

    folder.mkdir(parents=True, exist_ok=True)
    tower(seed + 1).save_pretrained(folder / "clip")
    processor_class()(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder / "clip"
    )
    save_file(llm_state(seed, kv_heads, anyres), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(kv_heads, anyres, language), indent=1), encoding="utf-8")
    return folder


@functools.lru_cache(maxsize=8)
def _built(family: str, anyres: bool, seed: int, kv_heads: int, attn: str, language: str = "llama") -> Any:
    with tempfile.TemporaryDirectory() as place:
        folder = write_checkpoint(Path(place) / "tiny", seed, kv_heads, anyres, language)
        return llava_prune.load(folder, family=family, dtype="float32", device="cpu", attn=attn).model


def tiny_llava(seed: int = 0, kv_heads: int = HEADS, attn: str = "sdpa", anyres: bool = False) -> Any:
    """Return a new LlavaLlamaForCausalLM of package llava, float32 on the CPU."""
    return copy.deepcopy(_built("llava", anyres, seed, kv_heads, attn))


def tiny_hf(seed: int = 0, kv_heads: int = HEADS, attn: str = "sdpa") -> Any:
    """Return a new LlavaForConditionalGeneration with the weights of `tiny_llava` with the same seed."""
    return copy.deepcopy(_built("hf", False, seed, kv_heads, attn))


def tiny_next(seed: int = 0, kv_heads: int = HEADS, attn: str = "sdpa") -> Any:
    """Return a new LlavaNextForConditionalGeneration; `tiny_llava(anyres=True)` has the same weights."""
    return copy.deepcopy(_built("hf", True, seed, kv_heads, attn))


def tiny_mistral(family: str, anyres: bool = False) -> Any:
    """Return a new LlavaMistralForCausalLM, or its counterpart of transformers, with two key/value heads."""
    return copy.deepcopy(_built(family, anyres, 0, 2, "sdpa", "mistral"))


def is_llava(model: Any) -> bool:
    """Return whether a model is of package llava."""
    return hasattr(model, "prepare_inputs_labels_for_multimodal")


def language_model(model: Any) -> Any:
    """Return the language model of a model of either family."""
    return model.model if is_llava(model) else model.model.language_model


def loaded(model: Any) -> Loaded:
    """Return the `Loaded` that `llava_prune.load` would return, for its `generate`."""
    return Loaded(model, None, None, "llava" if is_llava(model) else "hf", "tiny")


def prompt(before: int, after: int, images: int = 1, seed: int = 0) -> list[int]:
    """Return token ids: begin-of-sequence, text, -200 for each image with two text ids between images, text."""
    draw = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(3, VOCAB, (before + after + 2 * images,), generator=draw).tolist()
    row = [1, *ids[: before - 1]]
    for i in range(images):
        row += [IMAGE, *([] if i + 1 == images else ids[before + 2 * i : before + 2 * i + 2])]
    return row + ids[len(ids) - after :] if after else row


def pixels(n: int, seed: int = 0) -> Tensor:
    """Return (n, 3, SIDE, SIDE) float32 images of coarse blobs and noise."""
    draw = torch.Generator().manual_seed(2000 + seed)
    coarse = torch.randn(n, 3, 3, 3, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    return smooth + 0.3 * torch.randn(n, 3, SIDE, SIDE, generator=draw)


def crops(size: tuple[int, int], seed: int = 0) -> Tensor:
    """Return (1 + crops, 3, SIDE, SIDE): an anyres image of (width, height), in crops as both packages cut it."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution((size[1], size[0]), [(h, w) for w, h in PINPOINTS])
    return pixels(1 + (height // SIDE) * (width // SIDE), seed)


def inputs(
    model: Any,
    rows: Sequence[Sequence[int]],
    images: Tensor | Sequence[Tensor] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    side: str = "left",
) -> dict[str, Any]:
    """Return arguments for `model(**...)` of either family, or for `generate` below.

    Args:
        model: a model of either family.
        rows: prompts with -200 for each image (package llava takes a blank image for a row without one).
        images: (N, 3, H, W), or for anyres models a list of N (crops, 3, H, W).
        sizes: N (width, height); needed for anyres.
        side: side of the padding, "left" or "right".
    """
    if not is_llava(model):
        rows = _spread(model, rows, images, sizes)
    width = max(len(r) for r in rows)
    fill = [[0] * (width - len(r)) for r in rows]
    text = [list(r) for r in rows]
    ones = [[1] * len(r) for r in rows]
    pairs = zip(fill, text, ones, strict=True)
    both = [(f + t, f + o) if side == "left" else (t + f, o + f) for f, t, o in pairs]
    out: dict[str, Any] = {
        "input_ids": torch.tensor([a for a, _ in both]),
        "attention_mask": torch.tensor([b for _, b in both]),
    }
    if images is None:
        return _placed(out, model)
    if is_llava(model):
        blanks = [IMAGE not in r for r in rows]
        if any(blanks):
            stack = iter(images)
            images = torch.stack(
                [x for r, b in zip(rows, blanks, strict=True) for x in _taken(stack, list(r).count(IMAGE), b)]
            )
        out["images"] = images
        if sizes is not None:
            out["image_sizes"] = list(sizes)
    elif isinstance(images, Tensor):
        out["pixel_values"] = images
    else:
        most = max(x.shape[0] for x in images)
        out["pixel_values"] = torch.stack(
            [torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])]) for x in images]
        )
        out["image_sizes"] = torch.tensor([[h, w] for w, h in sizes or ()])
    return _placed(out, model)


def _placed(given: dict[str, Any], model: Any) -> dict[str, Any]:
    """Move arguments to the device of the model."""
    return {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in given.items()}


def _taken(stack: Any, n: int, blank: bool) -> list[Tensor]:
    return [torch.zeros(3, SIDE, SIDE)] if blank else [next(stack) for _ in range(n)]


def _spread(model: Any, rows: Any, images: Any, sizes: Any) -> list[list[int]]:
    """Repeat the placeholders as transformers expects them: one for each visual token."""
    counts = [loaded(model).n_visual] * sum(list(r).count(IMAGE) for r in rows)
    if images is not None and not isinstance(images, Tensor):
        flat = torch.cat(list(images))
        with torch.no_grad():
            packed = model.model.get_image_features(flat, torch.tensor([[h, w] for w, h in sizes])).pooler_output
        counts = [len(p) for p in packed]
    left = iter(counts)
    token = model.config.image_token_id
    return [[y for x in r for y in ([token] * next(left) if x == IMAGE else [x])] for r in rows]


def generate(model: Any, given: dict[str, Any], steps: int = 4, **options: Any) -> Any:
    """Call generate() on the result of `inputs`, greedily by default, and return its output with logits and cache.

    `sequences` of the output holds only the new ids in both families.
    """
    given = dict(given)
    greedy = {"do_sample": False, "max_new_tokens": steps, "pad_token_id": 0, "use_cache": True}
    prompt_length = 0 if is_llava(model) else given["input_ids"].shape[1]
    if is_llava(model):
        given["inputs"] = given.pop("input_ids")
    with torch.inference_mode():
        out = model.generate(**given, **{**greedy, **options}, return_dict_in_generate=True, output_logits=True)
    out.sequences = out.sequences[:, prompt_length:]
    return out


def cache_lengths(cache: Any) -> list[int]:
    """Return the number of columns in the cache of each layer."""
    return [layer.keys.shape[2] for layer in cache.layers]
