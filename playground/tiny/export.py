"""Write the trained networks as a LLaVA checkpoint folder (haotian-liu/LLaVA's format)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from playground.tiny import scenes as sc
from playground.tiny.data import MEAN, STD
from playground.tiny.model import Llama, Tower


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, torch.Tensor], path: Path, dtype: torch.dtype) -> None:
    save_file({k: v.detach().cpu().to(dtype).contiguous() for k, v in tensors.items()}, str(path), {"format": "pt"})
    path.chmod(0o644)


def tower_config(tower: Tower, dtype: str) -> dict:
    """Return the content of ``clip/config.json``."""
    width = tower.patch.out_features
    return {
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "image_size": sc.SIDE,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": tower.layers[0].self_attn.heads,
        "num_channels": 3,
        "num_hidden_layers": len(tower.layers),
        "patch_size": sc.PATCH,
        "projection_dim": width,
        "torch_dtype": dtype,
        "transformers_version": "4.37.2",
    }


def processor_config() -> dict:
    """Return the content of ``clip/preprocessor_config.json``: OpenAI CLIP's settings at this tower's resolution."""
    return {
        "crop_size": {"height": sc.SIDE, "width": sc.SIDE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": sc.SIDE},
    }


def llava_config(llama: Llama, dtype: str) -> dict:
    """Return the content of ``config.json``."""
    vocab, width = llama.embed_tokens.weight.shape
    layer = llama.layers[0]
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": width,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": layer.mlp["gate_proj"].out_features,
        "max_position_embeddings": 2048,
        "mm_hidden_size": llama.mm_projector[0].in_features,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "clip",
        "model_type": "llava_llama",
        "num_attention_heads": layer.heads,
        "num_hidden_layers": len(llama.layers),
        "num_key_value_heads": layer.heads,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "torch_dtype": dtype,
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": vocab,
    }


def tower_tensors(tower: Tower) -> dict[str, torch.Tensor]:
    """Return the tower's parameters under the names of transformers' ``CLIPVisionModel``."""
    prefix, p = "vision_model.", sc.PATCH
    names = {}
    for key, value in tower.state_dict().items():
        if key == "patch.weight":
            names[prefix + "embeddings.patch_embedding.weight"] = value.view(-1, 3, p, p)
        elif key == "position_embedding":
            names[prefix + "embeddings.position_embedding.weight"] = value
        elif key == "class_embedding":
            names[prefix + "embeddings.class_embedding"] = value
        else:
            names[prefix + ("encoder." if key.startswith("layers.") else "") + key] = value
    return names


def llama_tensors(llama: Llama) -> dict[str, torch.Tensor]:
    """Return the decoder's parameters under LLaVA's names."""
    return {k if k.startswith("lm_head") else f"model.{k}": v for k, v in llama.state_dict().items()}


def export(folder: Path, tower: Tower, llama: Llama, dtype: str = "float32", tower_dtype: str = "float32") -> None:
    """Write both networks and their configs into ``folder``; :mod:`playground.tiny.tokenizer` writes the tokenizer."""
    clip = folder / "clip"
    clip.mkdir(parents=True, exist_ok=True)
    _write(clip / "config.json", tower_config(tower, tower_dtype))
    _write(clip / "preprocessor_config.json", processor_config())
    _save(tower_tensors(tower), clip / "model.safetensors", getattr(torch, tower_dtype))
    _write(folder / "config.json", llava_config(llama, dtype))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "_from_model_config": True}
    _write(folder / "generation_config.json", generation)
    _save(llama_tensors(llama), folder / "model.safetensors", getattr(torch, dtype))
