"""Checkpoints of real model shapes with random weights, in either format, for tests of loading and speed.

python -m llava_prune.bench.shapes 7b --format llava --out DIR --tokenizer playground/models/llava-tiny
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..arguments import positive
from ..arguments import seed as any_seed

Format = Literal["llava", "hf"]
SHARD = 2_000_000_000
"""Bytes after which a new weight file is started."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a LLaVA model.

    Attributes:
        layers, hidden, intermediate, heads, vocab: sizes of the language model.
        vision_layers, vision_hidden, vision_intermediate, vision_heads: sizes of the vision tower.
        anyres: whether images are cut into crops, as in LLaVA-NeXT.
        kv_heads: number of key and value heads; 0 for as many as `heads`.
        language: "llama" or "mistral".
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocab: int
    vision_layers: int = 24
    vision_hidden: int = 1024
    vision_intermediate: int = 4096
    vision_heads: int = 16
    anyres: bool = False
    kv_heads: int = 0
    language: str = "llama"


SHAPES = {
    "tiny": ModelShape(4, 64, 160, 4, 512, 3, 64, 128, 4),
    "next-tiny": ModelShape(4, 64, 160, 4, 512, 3, 64, 128, 4, anyres=True),
    "300m": ModelShape(12, 1024, 2752, 16, 32000, 6, 512, 2048, 8),
    "7b": ModelShape(32, 4096, 11008, 32, 32000),
    "13b": ModelShape(40, 5120, 13824, 40, 32000),
    "next-7b": ModelShape(32, 4096, 11008, 32, 32000, anyres=True),
    "next-mistral-7b": ModelShape(32, 4096, 14336, 32, 32000, anyres=True, kv_heads=8, language="mistral"),
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""(width, height) of LLaVA-NeXT's resolutions. transformers reads the same list as (height, width)."""


def llm_tensors(s: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, size) of the weights of language model and projector, under the names of haotian-liu/LLaVA."""
    d, m = s.hidden, s.intermediate
    kv = d // s.heads * (s.kv_heads or s.heads)
    yield "model.embed_tokens.weight", (s.vocab, d)
    for i in range(s.layers):
        for name, out in (("q_proj", d), ("k_proj", kv), ("v_proj", kv), ("o_proj", d)):
            yield f"model.layers.{i}.self_attn.{name}.weight", (out, d)
        yield f"model.layers.{i}.mlp.gate_proj.weight", (m, d)
        yield f"model.layers.{i}.mlp.up_proj.weight", (m, d)
        yield f"model.layers.{i}.mlp.down_proj.weight", (d, m)
        yield f"model.layers.{i}.input_layernorm.weight", (d,)
        yield f"model.layers.{i}.post_attention_layernorm.weight", (d,)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (s.vocab, d)
    for layer, width in ((0, s.vision_hidden), (2, d)):
        yield f"model.mm_projector.{layer}.weight", (d, width)
        yield f"model.mm_projector.{layer}.bias", (d,)
    if s.anyres:
        yield "model.image_newline", (d,)


def _random(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, generator=generator) * 0.02).to(torch.bfloat16)


def _vision_config(s: ModelShape) -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=s.vision_hidden,
        intermediate_size=s.vision_intermediate,
        num_hidden_layers=s.vision_layers,
        num_attention_heads=s.vision_heads,
        image_size=336,
        patch_size=14,
    )


def _text_config(s: ModelShape) -> dict[str, Any]:
    return {
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads or s.heads,
        "vocab_size": s.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **({"sliding_window": None} if s.language == "mistral" else {}),
    }


def _write(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write sharded safetensors files with an index."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    names: dict[str, int] = {}
    size = total = 0

    def flush() -> None:
        save_file(shards[-1], folder / f"part-{len(shards):05d}.safetensors", metadata={"format": "pt"})
        shards[-1] = {}

    for name, value in tensors:
        shards[-1][name] = value.contiguous()
        names[name] = len(shards)
        size += value.nbytes
        total += value.nbytes
        if size > SHARD:
            flush()
            shards.append({})
            size = 0
    flush()
    count = len(shards)
    for i in range(1, count + 1):
        (folder / f"part-{i:05d}.safetensors").rename(folder / f"model-{i:05d}-of-{count:05d}.safetensors")
    index = {n: f"model-{i:05d}-of-{count:05d}.safetensors" for n, i in names.items()}
    table = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table, indent=1))


def _processor(folder: Path) -> None:
    from ..models.files import processor_class

    processor_class()(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(folder)


def make(
    shape: str,
    out: Path,
    form: Format = "llava",
    tokenizer: Path | None = None,
    seed: int = 0,
    layers: int | None = None,
) -> None:
    """Write a checkpoint with random bfloat16 weights.

    Args:
        shape: a key of SHAPES.
        out: folder to write to; new or empty.
        form: "llava" (haotian-liu/LLaVA) or "hf" (transformers).
        tokenizer: folder whose tokenizer files are copied.
        seed: random seed of the weights, which are the same in both formats.
        layers: number of decoder layers; None for that of the shape.

    Raises:
        ValueError: for an unknown shape, or a folder that is not empty.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r}: choose one of {', '.join(SHAPES)}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new folder")
    from transformers import CLIPVisionModel

    s = SHAPES[shape] if layers is None else dataclasses.replace(SHAPES[shape], layers=layers)
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    tower: Any = CLIPVisionModel(_vision_config(s))
    tower.to(torch.bfloat16)
    llm = ((n, _random(size, generator)) for n, size in llm_tensors(s))
    if form == "llava":
        (out / "clip").mkdir()
        tower.save_pretrained(out / "clip")
        _processor(out / "clip")
        config = {
            **_text_config(s),
            "architectures": [f"Llava{s.language.capitalize()}ForCausalLM"],
            "model_type": f"llava_{s.language}",
            "image_aspect_ratio": "anyres" if s.anyres else "pad",
            "image_grid_pinpoints": PINPOINTS if s.anyres else None,
            "mm_hidden_size": s.vision_hidden,
            "mm_patch_merge_type": "spatial_unpad" if s.anyres else "flat",
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "clip",
            "tie_word_embeddings": False,
            "tokenizer_model_max_length": 4096 if s.anyres else 2048,
            "tokenizer_padding_side": "right",
            "torch_dtype": "bfloat16",
            "tune_mm_mlp_adapter": False,
            "use_mm_proj": True,
        }
        (out / "config.json").write_text(json.dumps(config, indent=1))
        _write(out, llm)
    else:
        _write_hf(out, s, tower, llm)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "llava_prune.json"):
        if tokenizer is not None and (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, out / name)


def hf_config(s: ModelShape) -> Any:
    """Return the config in transformers' format. Its vocabulary has 64 more ids, as in the published conversions."""
    import transformers
    from transformers import LlavaConfig, LlavaNextConfig

    text: Any = getattr(transformers, f"{s.language.capitalize()}Config")
    extra = {"image_grid_pinpoints": PINPOINTS} if s.anyres else {}
    kind: Any = LlavaNextConfig if s.anyres else LlavaConfig
    config = kind(
        vision_config=_vision_config(s),
        text_config=text(**{**_text_config(s), "vocab_size": s.vocab + 64}),
        image_token_id=s.vocab,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype="bfloat16",
        **extra,
    )
    config.architectures = [f"Llava{'Next' if s.anyres else ''}ForConditionalGeneration"]
    return config


def random_model(shape: str, device: Any = "cpu", dtype: Any = None, attn: str | None = None, seed: int = 0) -> Any:
    """Build a model of transformers' classes with random weights on a device.

    Args:
        shape: a key of SHAPES.
        device: device of the model.
        dtype: torch dtype; float32 if None.
        attn: attention implementation; transformers' choice if None.
        seed: random seed of the weights.

    Returns:
        `llava_prune.models.load.Loaded` without tokenizer and image processor.

    Raises:
        ValueError: for an unknown shape.
    """
    from transformers import AutoModelForImageTextToText

    from ..models.load import Loaded

    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r}: choose one of {', '.join(SHAPES)}")
    torch.manual_seed(seed)
    extra = {} if attn is None else {"attn_implementation": attn}
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(hf_config(SHAPES[shape]), dtype=dtype or torch.float32, **extra)
    return Loaded(model.to(device).eval(), None, None, "hf", shape)


def _write_hf(out: Path, s: ModelShape, tower: Any, llm: Iterator[tuple[str, Tensor]]) -> None:
    """Write the same weights under the names of transformers."""
    from ..models.checkpoint import rename

    config = hf_config(s)
    config.save_pretrained(out)
    _processor(out)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, value in llm:
            if value.shape[0] == s.vocab and name in ("model.embed_tokens.weight", "lm_head.weight"):
                value = torch.cat([value, value.new_zeros(64, value.shape[1])])
            yield rename(name), value
        for name, value in tower.state_dict().items():
            yield f"model.vision_tower.{name}", value

    _write(out, tensors())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--format", choices=("llava", "hf"), default="llava", help="whose checkpoint format")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files are copied")
    parser.add_argument("--seed", type=any_seed, default=0)
    parser.add_argument("--layers", type=positive, help="decoder layers in place of the shape's")
    args = parser.parse_args()
    make(args.shape, args.out, args.format, args.tokenizer, args.seed, args.layers)


if __name__ == "__main__":
    main()
