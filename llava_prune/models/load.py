"""Load a checkpoint in either format into the classes of either package."""

from __future__ import annotations

import importlib.util
import logging
import operator
import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..methods.checks import shown
from ..ops.counts import Size
from ..runtime.geometry import Geometry
from ..runtime.patching import execution_device
from ..runtime.sizes import checked_sizes
from .adapter import Source, check_base
from .base import Family, peel
from .config import check_generation, is_original, pick_attention, pick_device, pick_dtype, read_config, weight_bytes
from .family import family_of
from .files import MORE, load_tokenizer, refuse_pointers
from .generate import ask_hf, ask_llava, refuse_made
from .hf import counted_crops
from .image_cache import LIMIT, ImageCache, cached_images
from .llava import IMAGE
from .parallel import check_engine, join, split
from .placement import DeviceMap, dispatch, out_of_memory, pick_bits, pick_map, quantise
from .processor import load_processor

log = logging.getLogger(__name__)
FamilyName = Literal["auto", "llava", "hf"]
LONGEST = 400  # characters kept of another library's error message


@dataclass
class Loaded:
    """A loaded model with its tokenizer and processors.

    Attributes:
        model: LlavaLlamaForCausalLM ("llava") or LlavaForConditionalGeneration / LlavaNext... ("hf").
        tokenizer: the checkpoint's tokenizer, or None if it has no tokenizer files.
        image_processor: the CLIP image processor of LLaVA's preprocessing, None for towers with another processor.
        family: "llava" or "hf".
        path: the path or hub id that was loaded.
        bits: "8bit" or "4bit" if the weights are quantised, else None.
        engine: "deepspeed" or "tp" if this process holds a part of the model, else None. All processes must then make
            the same calls in the same order.
        processor: transformers' AutoProcessor of a checkpoint in its format, None if it has none. If its class needs a
            package that is not installed (LLaVA-OneVision's video part needs torchvision), a `processor.Processor` with
            the parts for images and text.
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
        """The device for inputs. A model that is spread over devices or offloaded moves them further by itself."""
        return execution_device(self.model, torch.device("cpu"))

    @property
    def _family(self) -> Family:
        return family_of(peel(self.model))

    @property
    def n_visual(self) -> int:
        """Number of visual tokens of one image or crop: its patches, and the class token if the model keeps it."""
        return self._family.tower_facts(self.model).features

    @property
    def crops(self) -> int:
        """Largest number of crops of an image, including the whole image; 1 if images are encoded whole."""
        return self._family.tower_facts(self.model).crops

    @property
    def max_visual(self) -> int:
        """Largest number of visual tokens of an image, including newline tokens."""
        return self.n_visual if self.crops == 1 else self._family.max_visual(self.model)

    @property
    def size(self) -> Size:
        """Sizes of the language model, and the number of visual tokens that papers count for an image.

        For a model that splits images into crops, these are the patches of the largest number of crops (2,880 for
        LLaVA-NeXT; 7,290 for LLaVA-OneVision, whose limit is ten crops), without newline tokens and unpadding.
        `visual_tokens` returns the number of an actual image.
        """
        c = self._family.language_model(self.model).config
        crops = counted_crops(self.model.config) if self.family == "hf" else self.crops
        return Size(c.num_hidden_layers, c.hidden_size, c.intermediate_size, self.n_visual * crops)

    def visual_tokens(self, size: tuple[int, int]) -> int:
        """Return the number of visual tokens of an image of (width, height) before pruning, with newline tokens."""
        geometry = self._family.geometry(self.model)
        return geometry.count(size) if geometry.resolutions else self.n_visual

    @property
    def geometry(self) -> Geometry:
        """The geometry of the model, which maps visual tokens to boxes in the image."""
        return self._family.geometry(peel(self.model))

    @contextmanager
    def remember_images(self, methods: Sequence[Any] = (), limit: int = LIMIT) -> Iterator[ImageCache]:
        """Encode each image only once during the block; images are identified by the `keys` of `generate`.

        Args:
            methods: the methods that run in the block.
            limit: largest number of bytes of features to hold, on the model's device.
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
        """Generate answers to a batch of prompts, by default greedily.

        With package llava, a prompt longer than the model's context causes a warning and is kept whole; the package
        itself would truncate its end.

        Args:
            rows: B prompts of token ids with the id -200 for each image.
            pixels: (N, 3, H, W), the images in prompt order, or None if no prompt has an image. For a model that splits
                images into crops, N tensors (crops, 3, H, W) with the whole image first; the numbers of crops may
                differ.
            sizes: N (width, height) before padding, from which methods know the padding. Required with crops.
            keys: N image keys for `remember_images`.
            max_new_tokens: largest number of tokens of an answer.
            kwargs: further arguments of the model's generate().

        Returns:
            (B, new) long, the new ids only, padded with the padding id. With return_dict_in_generate=True, the output
            object of generate(), whose `sequences` are these ids.

        Raises:
            ValueError: if the number of placeholders, sizes or keys differs from the number of images, if `rows` are
                not prompts of token ids, or for an argument of generate() that is made from them.
        """
        rows = _token_ids(rows)
        refuse_made(kwargs)
        wanted = sum(r.count(IMAGE) for r in rows)
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
        out = call(self, rows, images, sizes, keys, options)
        return out.cpu() if isinstance(out, Tensor) else out

    def _placed(self, pixels: Tensor | Sequence[Tensor], sizes: Any) -> Tensor | list[Tensor]:
        """Move pixels to the device for inputs and the dtype of the tower; a list for a model with crops."""
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


def _token_ids(rows: Any) -> list[list[int]]:
    """Return prompts as lists of token ids.

    Raises:
        ValueError: for anything else, such as text or a single prompt.
    """
    try:
        made = [[operator.index(x) for x in row] for row in rows]
    except TypeError:
        made = []
    if not made or not all(made):
        raise ValueError(f"rows={shown(rows)}: must be a list of prompts, each a list of token ids, as [[1, -200, 5]]")
    return made


# loading ------------------------------------------------------------------------------------------------------


def resolve(path: str | Path, files: str | None = None) -> Path:
    """Return a local checkpoint folder for `path`; a hub id is downloaded through huggingface_hub.

    Args:
        path: folder or hub id.
        files: pattern of the files to download; None for all files.

    Raises:
        ValueError: if there is no such folder and no hub repository can be reached.
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
    """Return the sizes of a checkpoint as in `Loaded.size`, from its config files alone.

    Args:
        path: folder or hub id.
        model_base: the checkpoint that `path` was trained on, if `path` is an adapter.

    Raises:
        ValueError: for a missing checkpoint, or one that is not a supported LLaVA.
    """
    from .checkpoint import read_full_config

    source = Source(resolve(path, "*.json"), None if model_base is None else resolve(model_base, "*.json"))
    try:
        full = read_full_config(source, read_config(source.folder))
    except Exception as error:  # includes errors of other libraries
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
    """Load a LLaVA model.

    Args:
        path: folder or hub id, in haotian-liu/LLaVA format (for either family) or transformers format ("hf").
        family: the package whose classes are built; "auto" is "llava" for a checkpoint in its own format if the
            package is installed, else "hf".
        dtype: torch dtype or name; by default that of the checkpoint. On a CPU, half precision is by default loaded as
            float32 if the weight files are small, and as bfloat16 otherwise; see `pick_dtype`.
        device: by default cuda if it is available, else cpu.
        attn: "eager", "sdpa" or "flash_attention_2"; by default that of the checkpoint's config, else the package's
            choice.
        model_base: folder or hub id of the checkpoint that an adapter in LLaVA's format (a LoRA folder, or a folder
            with a mm_projector.bin) was trained on. The config is the adapter's; tokenizer and language model are the
            base's.
        device_map: spreads the model over several GPUs, CPU memory and disk: "auto", "balanced", "balanced_low_0" or
            "sequential" by free memory, or a dict of module -> device (modules on "disk", and on "cpu" if there is a
            GPU, are offloaded).
        max_memory: with the name of a device map: device -> bytes, or a size such as "10GiB", that weights may take.
        load_8bit: quantise the linear layers of language model and projector to 8 bit (bitsandbytes' LLM.int8()).
        load_4bit: quantise them to 4 bit (nf4 with double quantisation).
        engine: splits the language model over the processes of torchrun by "deepspeed" or "tp" (transformers' own).
            It joins the process group, and LOCAL_RANK selects the GPU.

    Returns:
        The loaded model. A vision tower with a relative path is searched inside the checkpoint. Without tokenizer
        files, `.tokenizer` is None. In "hf", `.model.config.image_token_id` is the placeholder id, one past the
        vocabulary if the checkpoint has none.

    Raises:
        ValueError: for a checkpoint that is missing, truncated or not a supported LLaVA, a family that cannot read it,
            a device, dtype, attention backend or package that is not available, contradictory ways of placing the
            model, or a lack of memory. An error of the checkpoint names it.

    Source: adapters follow llava/model/builder.py of package llava; LoRA is added in float32.
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
    except BaseException as error:  # libraries raise their own errors, and those in Rust may panic
        raise ValueError(_message(path, where, error)) from error


def _message(path: str | Path, where: torch.device, error: BaseException) -> str:
    """Return a message of one line for an error while loading, which names the checkpoint."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    short = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    if out_of_memory(error):
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
    torch.set_num_threads(torch.get_num_threads())  # forked process: else the loader's threads race to make a new pool
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
    """Move a model from CPU memory to its device, by at most one of device map, quantisation and engine."""
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
