"""Build a model from the files of a checkpoint, in either package's classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Source, add_lora
from .base import block_index
from .config import ORIGINAL, is_original
from .files import ATTENTION, clip_processor, image_processor, shapes, tensors, tower_folder
from .fit import check_depth, check_elements, refuse_missing, refuse_sizes, refuse_spare
from .llava import accept_cache
from .processor import clip_settings
from .tower import check_vision, load_tower, tower_config

TOWER = "model.vision_tower."
"""Prefix of the names of a vision tower's tensors in LLaVA's format."""


def _fill(model: nn.Module, state: Iterator[tuple[str, Tensor]], dtype: torch.dtype, source: str) -> None:
    """Copy tensors into a model built on the meta device.

    Raises:
        ValueError: for tensors that are missing, have the wrong size, or do not belong to the model.
    """
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    spare, filled = [], {}
    for name, value in state:
        if name not in places:
            spare.append(name)
            continue
        if places[name].shape != value.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(value.shape)}, the config asks for {tuple(places[name].shape)}"
            )
        if places[name].is_floating_point() != value.is_floating_point():
            raise ValueError(f"{source}: {name} holds {value.dtype}, the model has floating-point weights there")
        filled[name] = value.to(dtype) if value.is_floating_point() else value
    refuse_missing((n for n, _ in model.named_parameters() if n not in filled), source)
    refuse_spare(spare, source)
    model.load_state_dict(filled, strict=False, assign=True)


def _from_pretrained(
    build: Any, folder: Path, dtype: torch.dtype, attn: str | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a model by transformers; return it with its loading info, which the caller has to check."""
    if attn is not None:
        options["attn_implementation"] = attn
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    model, info = build.from_pretrained(str(folder), dtype=dtype, **options)
    return model, info


def load_original(source: Source, config: dict[str, Any], dtype: torch.dtype, attn: str | None) -> tuple[Any, Any]:
    """Load a checkpoint in haotian-liu/LLaVA's format into the class of package `llava`.

    Returns:
        The model and its image processor.
    """
    build = _original_class(config)
    accept_cache(build)
    stored, base = shapes(source.weights), str(source.weights)
    options = build.config_class.from_pretrained(str(source.folder), trust_remote_code=False)
    place = tower_folder(source.folders, options.mm_vision_tower)
    vision = tower_config(place, config)
    processor = image_processor(place)
    options.mm_vision_tower = place
    unfrozen = getattr(options, "unfreeze_mm_vision_tower", False)
    options.unfreeze_mm_vision_tower = False  # the tower is built empty first and loaded below
    check_depth(stored, options.num_hidden_layers, base, tower=False)
    check_elements(build, options, stored, base)
    encoder = load_tower(place, vision, dtype).requires_grad_(False)
    model, info = _from_pretrained(build, source.weights, dtype, attn, config=options)
    extra = dict(source.extra())
    refuse_sizes((m for m in info["mismatched_keys"] if m[0] not in extra), base)
    refuse_missing(set(info["missing_keys"]) - extra.keys(), base)
    refuse_spare((n for n in info["unexpected_keys"] if not n.startswith(TOWER)), base)
    _copy(model, extra, str(source.folder))
    tower = model.get_vision_tower()
    tower.vision_tower, tower.image_processor, tower.is_loaded = encoder, processor, True
    if unfrozen:
        _overlay(tower, chain(tensors(source.weights), extra.items()), base)
    add_lora(model, source)
    return model, processor


def _original_class(config: dict[str, Any]) -> Any:
    """Return the class of package `llava` for a config.json in haotian-liu/LLaVA's format."""
    try:
        if ORIGINAL[config["model_type"]] == "mistral":
            from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM

            return LlavaMistralForCausalLM
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    except ImportError as error:
        raise ValueError(
            f"family 'llava' needs the package llava (pip install --no-deps llava-torch==1.2.2.post1): {error}"
        ) from error


def _copy(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy the tensors of an adapter into a model, except those of the vision tower, which are read later."""
    own = {n: v for n, v in state.items() if not n.startswith(TOWER)}
    try:
        found = model.load_state_dict(own, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())[:300]}") from error
    refuse_spare(found.unexpected_keys, source)


def _overlay(vision: Any, state: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Load the tower weights that were trained with the model, if the checkpoint contains any.

    Raises:
        ValueError: if the checkpoint contains some of them but not all, or weights that do not belong to the tower.
    """
    own = vision.vision_tower.state_dict()
    found = {_in_tower(name, own): value for name, value in state if name.startswith(TOWER)}
    if found:
        refuse_missing(set(own) - set(found), f"{source}, vision tower")
        refuse_spare(set(found) - set(own), source)
        vision.vision_tower.load_state_dict(found, strict=False)
        vision.vision_tower.requires_grad_(False)


def _in_tower(name: str, own: Any) -> str:
    """Return the tower's own name of one of its tensors in a checkpoint in LLaVA's format."""
    short = name.removeprefix(TOWER).removeprefix("vision_tower.")
    return short if short in own else short.removeprefix("vision_model.")


def load_converted(source: Source, config: dict[str, Any], dtype: torch.dtype, attn: str | None) -> tuple[Any, Any]:
    """Load a checkpoint in haotian-liu/LLaVA's format into transformers' class; tensors are renamed while reading.

    Returns:
        The model and its image processor.
    """
    if config.get("mm_projector_type", "linear") != "mlp2x_gelu":
        raise ValueError(
            f"mm_projector_type is {config.get('mm_projector_type', 'linear')!r}, and transformers has 'mlp2x_gelu' "
            "only; use family='llava'"
        )
    place = tower_folder(source.folders, config["mm_vision_tower"])
    vision = tower_config(place, config)
    processor = image_processor(place)
    tower = load_tower(place, vision, dtype).state_dict()
    build, full = _converted_config(config, vision)
    check_depth(shapes(source.weights), full.text_config.num_hidden_layers, str(source.weights), tower=False)
    extra = {} if attn is None else {"attn_implementation": attn}
    with torch.device("meta"):
        model = build._from_config(full, dtype=dtype, **extra)
    state = _renamed(source, tower, bool(config.get("unfreeze_mm_vision_tower")))
    _fill(model, state, dtype, str(source.weights))
    _rebuild_buffers(model)
    add_lora(model, source, rename)
    _add_placeholder(model)
    model.generation_config = _generation_config(source.weights, config)
    return model, processor


def _converted_config(config: dict[str, Any], vision: Any) -> tuple[Any, Any]:
    """Return transformers' class and config for a config.json in haotian-liu/LLaVA's format and its tower's config."""
    import transformers
    from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    drop = ("model_type", "architectures", "torch_dtype", "dtype", "transformers_version", *ATTENTION)
    language = getattr(transformers, f"{ORIGINAL[config['model_type']].capitalize()}Config")
    text = language(**{k: v for k, v in config.items() if k not in drop and not k.startswith("mm_")})
    text.tie_word_embeddings = False  # a checkpoint without lm_head gets a copy of its embeddings
    patches_only = config.get("mm_vision_select_feature", "patch") == "patch"
    common: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": config["vocab_size"],  # one past the vocabulary: logits keep their width
        "vision_feature_layer": config["mm_vision_select_layer"],
        "vision_feature_select_strategy": "default" if patches_only else "full",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
    }
    build: Any = LlavaForConditionalGeneration
    if config.get("image_aspect_ratio") != "anyres":
        return build, build.config_class(**common)
    if config.get("mm_patch_merge_type", "flat") != "spatial_unpad":
        raise ValueError(
            f"mm_patch_merge_type is {config.get('mm_patch_merge_type', 'flat')!r}, and transformers has "
            "'spatial_unpad' only; use family='llava'"
        )
    points = [(h, w) for w, h in config["image_grid_pinpoints"]]
    build = LlavaNextForConditionalGeneration
    return build, build.config_class(**common, image_grid_pinpoints=points)


def read_full_config(source: Source, config: dict[str, Any]) -> Any:
    """Return transformers' config of a checkpoint in either format, without reading weights.

    Args:
        source: folders of the checkpoint.
        config: content of its config.json.
    """
    if is_original(config):
        vision = tower_config(tower_folder(source.folders, config["mm_vision_tower"]), config)
        return _converted_config(config, vision)[1]
    return _converted_class(config).config_class.from_pretrained(str(source.folder), trust_remote_code=False)


def _converted_class(config: dict[str, Any]) -> Any:
    """Return transformers' class for a config.json in its own format."""
    import transformers

    parts = "".join(part.capitalize() for part in config["model_type"].split("_"))
    return getattr(transformers, f"{parts}ForConditionalGeneration")


PROJECTOR = {"model.mm_projector.0.": "linear_1.", "model.mm_projector.2.": "linear_2."}


def rename(name: str) -> str:
    """Return transformers' name of a tensor in haotian-liu/LLaVA's format (language model, projector, newline)."""
    for old, new in PROJECTOR.items():
        if name.startswith(old):
            return f"model.multi_modal_projector.{new}{name.removeprefix(old)}"
    if name in ("model.image_newline", "lm_head.weight") or not name.startswith("model."):
        return name
    return f"model.language_model.{name.removeprefix('model.')}"


def _renamed(source: Source, tower: dict[str, Tensor], unfrozen: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the original format under transformers' names.

    As in package llava, tower weights of the checkpoint are used only if the tower was trained (`unfrozen`). For a
    checkpoint without lm_head, a copy of its embeddings is used.

    Raises:
        ValueError: if a trained tower is incomplete.
    """
    seen, embeddings, head = set(), None, False
    for name, value in source.tensors():
        head = head or name == "lm_head.weight"
        embeddings = value if name == "model.embed_tokens.weight" else embeddings
        if name.startswith(TOWER):
            if not unfrozen:
                continue
            short = _in_tower(name, tower)
            seen.add(short)
            yield f"model.vision_tower.{short}", value
        else:
            yield rename(name), value
    if not head and embeddings is not None:
        yield "lm_head.weight", embeddings.clone()
    refuse_missing((n for n in tower if seen and n not in seen), f"{source.weights}, vision tower")
    for short, value in tower.items():
        if short not in seen:
            yield f"model.vision_tower.{short}", value


def _generation_config(folder: Path, config: dict[str, Any]) -> Any:
    """Return the checkpoint's generation config, as in package llava; special ids default to those of its config."""
    from transformers import GenerationConfig

    stated = (folder / "generation_config.json").is_file()
    made = GenerationConfig.from_pretrained(str(folder)) if stated else GenerationConfig()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(made, name) is None:
            setattr(made, name, config.get(name))
    if made.pad_token_id is None:
        made.pad_token_id = 0
    return made


def _rebuild_buffers(model: Any) -> None:
    """Compute the buffers that checkpoints do not store (rotary frequencies, position ids) in a model built on meta."""
    inner = model.model
    lm = inner.language_model
    lm.rotary_emb = type(lm.rotary_emb)(config=lm.config)
    for module in inner.vision_tower.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:
            module.register_buffer("position_ids", torch.arange(ids.shape[-1])[None], persistent=False)
    left = [n for n, b in model.named_buffers() if b.is_meta]
    if left:
        raise ValueError(f"buffers {left} are not known; this transformers release is not supported")


def _add_placeholder(model: Any) -> None:
    """Add an input embedding for the placeholder id, which is one past the vocabulary."""
    old = model.get_input_embeddings()
    if model.config.image_token_id < old.num_embeddings:
        return
    new = nn.Embedding(old.num_embeddings + 1, old.embedding_dim, padding_idx=old.padding_idx, device="meta")
    weight = torch.cat([old.weight.data, old.weight.data.new_zeros(1, old.embedding_dim)])
    new.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    model.set_input_embeddings(new)


def load_transformers(source: Source, config: dict[str, Any], dtype: torch.dtype, attn: str | None) -> tuple[Any, Any]:
    """Load a checkpoint in transformers' own format, including a placeholder one past the vocabulary.

    Returns:
        The model and its image processor, None for a processor that is not CLIP's.
    """
    folder, build = source.folder, _converted_class(config)
    vocabulary = (config.get("text_config") or {}).get("vocab_size")
    past = vocabulary is not None and config.get("image_token_id", config.get("image_token_index")) == vocabulary
    full = build.config_class.from_pretrained(str(folder), trust_remote_code=False)
    _check_transformers(build, full, folder, config)
    settings = clip_settings(folder)
    processor = None if settings is None else clip_processor(settings)
    model, info = _from_pretrained(build, folder, dtype, attn)
    refuse_missing(info["missing_keys"], str(folder))
    refuse_spare(info["unexpected_keys"], str(folder))
    if past:
        _read_placeholder(model, folder, info["mismatched_keys"])
    else:
        refuse_sizes(info["mismatched_keys"], str(folder))
    return model, processor


def _check_transformers(build: Any, full: Any, folder: Path, config: dict[str, Any]) -> None:
    """Refuse a config in transformers' format that does not fit the weights, before a model is built.

    Raises:
        ValueError: with the entry.
    """
    file = folder / "config.json"
    check_vision(full.vision_config, file)
    layers = full.vision_feature_layer
    for layer in layers if isinstance(layers, (list, tuple)) else [layers]:
        block_index(layer, full.vision_config.num_hidden_layers)
    if config.get("quantization_config"):
        return  # quantised weights are packed as integers
    stored = shapes(folder)
    check_depth(stored, full.text_config.num_hidden_layers, str(folder), tower=False)
    check_depth(stored, full.vision_config.num_hidden_layers, str(folder), tower=True)
    check_elements(build, full, stored, str(folder))


def _read_placeholder(model: Any, folder: Path, mismatched: Any) -> None:
    """Read the input embeddings of a vocabulary with a placeholder after it, whose size transformers reports as wrong.

    Raises:
        ValueError: if any other tensor has a size that differs from the config.
    """
    last = "embed_tokens.weight"
    refuse_sizes((m for m in mismatched if not m[0].endswith(last)), str(folder))
    _add_placeholder(model)
    weight = model.get_input_embeddings().weight
    stored = [v for n, v in tensors(folder) if n.endswith(last)]
    if len(stored) != 1 or stored[0].shape[1] != weight.shape[1] or len(weight) - len(stored[0]) not in (0, 1):
        shapes = [tuple(v.shape) for v in stored]
        raise ValueError(f"{folder}: {last} has the shapes {shapes}, the config asks for {tuple(weight.shape)}")
    with torch.no_grad():
        weight[: len(stored[0])] = stored[0].to(weight)
