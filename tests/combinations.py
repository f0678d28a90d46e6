"""Small random LLaVAs of every combination of class, language model and vision tower, in transformers' classes.

The shapes are those of tests.models (36 patches an image or crop, width 64), so that its prompts and images fit; head
size, grouped keys, biases and tied embeddings differ by language model, as they do in the checkpoints that people use.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from tests.models import HEADS, PINPOINTS, SIDE, VOCAB, WIDTH, _Draw

LAYERS = 4
LANGUAGES = ("llama", "mistral", "qwen2", "qwen3")
TOWERS = ("clip", "siglip", "dinov2")
CLASSES = {"llava": "Llava", "next": "LlavaNext", "onevision": "LlavaOnevision"}


def text_config(language: str, **more: Any) -> Any:
    """Return the config of a small language model; `more` replaces entries."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCAB + 8,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    own: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": True},
        "mistral": {"sliding_window": None, "head_dim": 24},
        "qwen2": {"tie_word_embeddings": True},
        "qwen3": {"head_dim": 24, "attention_bias": True},
    }
    build = getattr(transformers, f"{language.capitalize()}Config")
    return build(**{**common, **own[language], **more})


def vision_config(tower: str, side: int = SIDE) -> Any:
    """Return the config of a small vision tower of 4 blocks for images of side x side pixels, with patches of 14."""
    import transformers

    build = {"clip": "CLIPVisionConfig", "siglip": "SiglipVisionConfig", "dinov2": "Dinov2Config"}[tower]
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": HEADS}
    sizes |= {"image_size": side, "patch_size": 14}
    if tower != "dinov2":
        sizes["intermediate_size"] = 2 * WIDTH
    if tower == "siglip":
        sizes["vision_use_head"] = False
    return getattr(transformers, build)(**sizes)


def config(
    kind: str, language: str, tower: str = "clip", text: dict[str, Any] | None = None, side: int = SIDE, **more: Any
) -> Any:
    """Return the config of a small LLaVA; `text` replaces entries of its language model, `more` those of the whole."""
    import transformers

    plain = tower == "siglip"
    given: dict[str, Any] = {
        "text_config": text_config(language, **text or {}),
        "vision_config": vision_config(tower, side),
        "image_token_index": VOCAB,
        "vision_feature_layer": -1 if plain else -2,
        "vision_feature_select_strategy": "full" if plain else "default",
    }
    if kind != "llava":
        given["image_grid_pinpoints"] = [[h * side // SIDE, w * side // SIDE] for w, h in PINPOINTS]
    if kind == "onevision":
        given["video_token_index"] = VOCAB + 1
    return getattr(transformers, f"{CLASSES[kind]}Config")(**{**given, **more})


def randomise(model: Any, seed: int = 0) -> Any:
    """Fill a model with seeded weights, large enough that attention is far from uniform."""
    draw = _Draw(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and "norm" in name and name.endswith("weight"):
                p.copy_(draw.norm(p.shape[0]))
            elif p.ndim == 1:
                p.copy_(draw(*p.shape, scale=1.0 if "newline" in name else 0.1))
            elif "embed_tokens" in name:
                p.copy_(draw(*p.shape))
            elif "embedding" in name and "patch" not in name:
                p.copy_(draw(*p.shape, scale=0.5))
            else:
                gain = 1.5 if any(part in name for part in ("q_proj", "k_proj", "query", "key")) else 1.0
                p.copy_(draw(*p.shape, scale=gain * p[0].numel() ** -0.5))
    return model.eval()


@functools.lru_cache(maxsize=32)
def _built(kind: str, language: str, tower: str, attn: str) -> Any:
    import transformers

    build = getattr(transformers, f"{CLASSES[kind]}ForConditionalGeneration")
    return randomise(build._from_config(config(kind, language, tower), attn_implementation=attn))


def build(kind: str, language: str, tower: str = "clip", attn: str = "sdpa") -> Any:
    """Return a new model, float32 on the CPU; `kind` is "llava", "next" or "onevision"."""
    return copy.deepcopy(_built(kind, language, tower, attn))
