"""Load a checkpoint of either format into either family."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.counts import Size
from ..runtime.geometry import Geometry
from ..runtime.patching import execution_device
from ..runtime.sizes import checked_sizes
from .adapter import Source, check_base
from .base import Family, peel
from .config import check_generation, is_original, pick_attention, pick_device, pick_dtype, read_config, weight_bytes
from .family import family_of
from .files import MORE, load_tokenizer, refuse_pointers
from .generate import ask_hf, ask_llava
from .hf import counted_crops
from .image_cache import LIMIT, ImageCache, cached_images
from .llava import IMAGE
from .parallel import check_engine, join, split
from .placement import DeviceMap, dispatch, pick_bits, pick_map, quantise
from .processor import load_processor

log = logging.getLogger(__name__)
FamilyName = Literal["auto", "llava", "hf"]
LONGEST = 400  # letters of a message of another library


@dataclass
class Loaded:
    """A model ready to be pruned and asked.

    Attributes:
        model: LlavaLlamaForCausalLM ("llava") or LlavaForConditionalGeneration / LlavaNext... ("hf").
        tokenizer: the checkpoint's, or None when it has no tokenizer files.
        image_processor: the CLIP image processor of LLaVA's preprocessing, None for towers with another.
        family: "llava" or "hf".
        path: where it came from.
        bits: "8bit" or "4bit" where the weights are quantised, else None.
        engine: "deepspeed" or "tp" where this process has a part of the model, else None. Every process then makes
            the same calls in the same order.
        processor: transformers' AutoProcessor of a checkpoint in its format, None where it has none. Where its class
            needs a package that is missing (LLaVA-OneVision's video part needs torchvision), a `processor.Processor`
            with its parts for images and text.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    family: str
    path: str
    bits: str | None = None
    engine: str | None = None
    processor: Any = None

    @property
    def device(self) -> torch.device:
        """Where inputs go. A model that is spread over devices or offloaded moves them on by itself."""
        return execution_device(self.model, torch.device("cpu"))

    @property
    def _family(self) -> Family:
        return family_of(peel(self.model))

    @property
    def n_visual(self) -> int:
        """Visual tokens of one image or crop: its patches, and the class token where the model keeps it."""
        return self._family.tower_facts(self.model).features

    @property
    def crops(self) -> int:
        """Largest number of crops that an image is cut into, the whole image included; 1 where it is seen whole."""
        return self._family.tower_facts(self.model).crops

    @property
    def max_visual(self) -> int:
        """Largest number of visual tokens that an image can become, newline tokens included."""
        return self.n_visual if self.crops == 1 else self._family.max_visual(self.model)

    @property
    def size(self) -> Size:
        """Sizes of the language model, with the visual tokens that papers count for an image.

        Of a model that sees images in crops these are the patches of the largest number of crops (2,880 for LLaVA-NeXT;
        7,290 for LLaVA-OneVision, whose limit is ten crops), without newline tokens and unpadding; `visual_tokens` has
        what an image really becomes.
        """
        c = self._family.language_model(self.model).config
        crops = counted_crops(self.model.config) if self.family == "hf" else self.crops
        return Size(c.num_hidden_layers, c.hidden_size, c.intermediate_size, self.n_visual * crops)

    def visual_tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of an image of (width, height) before pruning, newline tokens included."""
        geometry = self._family.geometry(self.model)
        return geometry.count(size) if geometry.resolutions else self.n_visual

    @property
    def geometry(self) -> Geometry:
        """Where in an image its visual tokens are."""
        return self._family.geometry(peel(self.model))

    @contextmanager
    def remember_images(self, methods: Sequence[Any] = (), limit: int = LIMIT) -> Iterator[ImageCache]:
        """Encode each image once for the length of the block; images are identified by the `keys` of `generate`.

        Args:
            methods: the methods that will run in the block.
            limit: bytes of features to hold at most, on the model's device.
        """
        with cached_images(self.model, self._family, list(methods), limit) as cache:
            yield cache

    @torch.inference_mode()
    def generate(
        self,
        rows: Sequence[Sequence[int]],
        pixels: Tensor | Sequence[Tensor] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        keys: Sequence[Hashable] | None = None,
        max_new_tokens: int = 128,
        **kwargs: Any,
    ) -> Any:
        """Greedy answers (unless `kwargs` say otherwise) to a batch of prompts.

        Prompts longer than the model's context are warned of and kept whole; package llava would cut off their end.

        Args:
            rows: B prompts of token ids with -200 where an image goes.
            pixels: (N, 3, H, W), the images in prompt order, or None when no prompt has one. For a model that sees
                images in crops N tensors (crops, 3, H, W), the whole image first; their numbers may differ.
            sizes: N (width, height) before padding; lets methods tell padding from image. Crops need them.
            keys: N image identities for `remember_images`.
            max_new_tokens: limit of each answer.
            kwargs: for the model's generate().

        Returns:
            (B, new) long, the new ids only, padded with the padding id; with return_dict_in_generate=True the
            package's output object, `sequences` holding the same.

        Raises:
            ValueError: when placeholders, sizes or keys do not match the images.
        """
        wanted = sum(list(r).count(IMAGE) for r in rows)
        given = 0 if pixels is None else len(pixels)
        if wanted != given:
            raise ValueError(f"the prompts name {wanted} images, {given} were given")
        for label, values in (("sizes", sizes), ("keys", keys)):
            if values is not None and len(values) != given:
                raise ValueError(f"{len(values)} {label} for {given} images; give one for each image")
        options = {"do_sample": False, "num_beams": 1, "use_cache": True, "max_new_tokens": max_new_tokens, **kwargs}
        if not options["do_sample"]:
            options = {"temperature": None, "top_p": None, "top_k": None, **options}
        pad = self.model.generation_config.pad_token_id
        options.setdefault("pad_token_id", 0 if pad is None else pad)
        sizes = None if sizes is None else checked_sizes(sizes)
        images = None if pixels is None else self._placed(pixels, sizes)
        call = ask_llava if self.family == "llava" else ask_hf
        out = call(self, [list(r) for r in rows], images, sizes, keys, options)
        return out.cpu() if isinstance(out, Tensor) else out

    def _placed(self, pixels: Tensor | Sequence[Tensor], sizes: Any) -> Tensor | list[Tensor]:
        """Pixels on the device and in the dtype of the tower; a list for a model that sees images in crops."""
        kind = {"device": self.device, "dtype": next(self._family.tower(self.model).parameters()).dtype}
        if self.crops == 1:
            if not isinstance(pixels, Tensor):
                raise ValueError("this model sees images whole; give pixels as one tensor (N, 3, H, W)")
            return pixels.to(**kind)
        if sizes is None or any(x.ndim != 4 for x in pixels):
            raise ValueError(
                "this model sees images in crops; give pixels as a list of (crops, 3, H, W), and sizes of the images"
            )
        return [x.to(**kind) for x in pixels]


# loading ------------------------------------------------------------------------------------------------------


def resolve(path: str | Path, files: str | None = None) -> Path:
    """A local checkpoint folder for `path`, downloading a hub id (or the `files` of a pattern) through huggingface_hub.

    Raises:
        ValueError: when neither a folder nor a hub repository can be had.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists() or str(path).startswith(("/", ".", "~")) or str(path).count("/") != 1:
        raise ValueError(f"{path}: no such checkpoint folder; give a folder with a config.json or a hub id owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=files))
    except Exception as error:
        raise ValueError(f"{path}: not a local folder, and no hub repository can be reached ({error})") from error


def read_size(path: str | Path, model_base: str | Path | None = None) -> Size:
    """Sizes of a checkpoint as `Loaded.size` gives them, from its config files alone.

    Args:
        path: folder or hub id.
        model_base: checkpoint that `path`, an adapter, was trained on.

    Raises:
        ValueError: for a missing or foreign checkpoint.
    """
    from .checkpoint import read_full_config

    source = Source(resolve(path, "*.json"), None if model_base is None else resolve(model_base, "*.json"))
    try:
        full = read_full_config(source, read_config(source.folder))
    except Exception as error:  # of other libraries
        raise ValueError(_message(path, torch.device("cpu"), error)) from error
    text, vision = full.text_config, full.vision_config
    whole = full.vision_feature_select_strategy == "full" and vision.model_type.startswith("clip")
    visual = ((vision.image_size // vision.patch_size) ** 2 + whole) * counted_crops(full)
    return Size(text.num_hidden_layers, text.hidden_size, text.intermediate_size, visual)


def load(
    path: str | Path,
    family: FamilyName = "auto",
    dtype: Any = None,
    device: Any = None,
    attn: str | None = None,
    model_base: str | Path | None = None,
    device_map: DeviceMap | None = None,
    max_memory: dict[Any, Any] | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    engine: str | None = None,
) -> Loaded:
    """Load a LLaVA.

    Args:
        path: folder or hub id; haotian-liu/LLaVA format (either family) or transformers format ("hf").
        family: which package's classes to build; "auto" is "llava" for its own format where the package is
            installed, else "hf".
        dtype: torch dtype or name; default the checkpoint's own; on a CPU half precision is read as float32 where the
            weight files are small, and as bfloat16 otherwise, see `pick_dtype`.
        device: default cuda if there is one, else cpu.
        attn: "eager", "sdpa" or "flash_attention_2"; default the package's choice.
        model_base: checkpoint that an adapter in LLaVA's format (a LoRA folder, or a folder with a mm_projector.bin)
            was trained on, folder or hub id. The config is the adapter's, tokenizer and language model are the base's.
        device_map: spreads a model over several GPUs, CPU memory and disk: "auto", "balanced", "balanced_low_0" or
            "sequential" by free memory, or a dict of module and device ("cpu" beside a GPU, or "disk", is offloaded).
        max_memory: with the name of a device map, device -> bytes or "10GiB" that weights may take.
        load_8bit: quantise the linear layers of language model and projector to 8 bit (bitsandbytes' LLM.int8()).
        load_4bit: quantise them to 4 bit (nf4 with double quantisation).
        engine: splits the language model over the processes of torchrun, "deepspeed" or "tp" (transformers' own);
            joins the process group, and LOCAL_RANK chooses the GPU.

    Returns:
        Loaded. A vision tower named by a relative path is looked for inside the checkpoint; without tokenizer files
        `.tokenizer` is None. In "hf", `.model.config.image_token_id` is the placeholder id, one past the
        vocabulary where the checkpoint has none.

    Raises:
        ValueError: for a missing, truncated or foreign checkpoint, a family that cannot read it, a device, dtype,
            attention backend or package that is not there, ways of placing a model that do not go together, or a lack
            of memory. The message names the checkpoint.

    Source: adapters as llava/model/builder.py of package llava; LoRA is added in float32.
    """
    if family not in ("auto", "llava", "hf"):
        raise ValueError(f"family={family!r}: choose 'auto', 'llava' or 'hf'")
    beside = {"device_map": device_map, "engine": engine}
    bits = pick_bits(load_8bit, load_4bit, beside)
    if max_memory is not None and not isinstance(device_map, str):
        raise ValueError("max_memory goes with the name of a device map, such as device_map='auto'")
    if engine is not None:
        check_engine(engine, {"device": device, "device_map": device_map})
        where = join()
    else:
        where = pick_device(device) if device_map is None else pick_map(device_map, device)
    try:
        loaded = _load(path, family, dtype, where, attn, model_base)
        _place(loaded, where, device_map, max_memory, bits, engine)
        return loaded
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # libraries raise errors of their own, and those in Rust panic
        raise ValueError(_message(path, where, error)) from error


def _message(path: str | Path, where: torch.device, error: BaseException) -> str:
    """One line for an error of loading, which names the checkpoint."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    short = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return f"{path} does not fit into the memory of {where}; use a smaller dtype, or another device"
    if type(error).__name__ == "UnpicklingError":
        return f"{path}: the vision tower's weight file {MORE}"
    if not isinstance(error, ValueError):
        return f"{path} cannot be loaded: {type(error).__name__}: {short}"
    return short if str(path) in short else f"{path}: {short}"


def _load(
    path: str | Path, family: str, dtype: Any, where: torch.device, attn: str | None, model_base: str | Path | None
) -> Loaded:
    from .checkpoint import load_converted, load_original, load_transformers

    source = Source(resolve(path), None if model_base is None else resolve(model_base))
    for folder in source.folders:
        refuse_pointers(folder)
    config = read_config(source.folder)
    check_base(source.folder, source.base)
    original = is_original(config)
    if family == "llava" and not original:
        raise ValueError(f"{path} is in transformers' format, which package llava cannot read; use family='hf'")
    if family == "auto":
        family = "llava" if original and _has_llava() else "hf"
    attn = pick_attention(attn, config, source.folder / "config.json")
    kind = pick_dtype(dtype, config, where, weight_bytes(source.weights))
    build = (load_original if family == "llava" else load_converted) if original else load_transformers
    check_generation(source.weights / "generation_config.json")
    tokenizer = load_tokenizer(source.weights, original)
    torch.set_num_threads(torch.get_num_threads())  # in a forked process, the loader's threads race to remake the pool
    model, processor = build(source, config, kind, attn)
    loaded = Loaded(model.eval(), tokenizer, processor, family, str(path))
    if not original:
        loaded.processor = load_processor(source.folder, tokenizer)
    return loaded


def _place(
    loaded: Loaded,
    where: torch.device,
    device_map: DeviceMap | None,
    max_memory: Any,
    bits: str | None,
    engine: str | None,
) -> None:
    """Bring a model from CPU memory to where it computes; at most one of the three ways is asked for."""
    model, family = loaded.model, loaded._family
    if device_map is not None:
        return dispatch(model, family, device_map, max_memory)
    if bits is not None:
        if getattr(model, "is_quantized", False):
            raise ValueError(f"{loaded.path} is a quantised checkpoint; leave out load_{bits}")
        quantise(model, family, bits, where)
    elif engine is not None:
        split(model, family, engine, next(model.parameters()).dtype)
    model.to(where)
    loaded.bits, loaded.engine = bits, engine


def _has_llava() -> bool:
    return importlib.util.find_spec("llava") is not None
