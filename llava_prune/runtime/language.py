"""The forward of a pruned language model: prefills with images are pruned, all other calls run the stock forward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NoReturn

from torch import Tensor

from .compat import CACHE, BaseModelOutputWithPast, DynamicCache
from .decode import Decode, DecodeState, decode_state, refuse_later_image, refuse_rebuilt
from .geometry import Seen
from .prefill import Prefill
from .prompt import Prompt, check_shapes, read_prompt
from .record import Record
from .state import RequestState, hints, request_of


def language_forward(
    handle: Any,
    lm: Any,
    stock: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Replace the forward of the language model of an attached model.

    The other arguments are those of the stock forward.

    Args:
        handle: the handle of the attachment.
        lm: the language model.
        stock: the forward before the replacement.

    Raises:
        ValueError: for embeddings whose images are not known, and for options that a sequence of changing length does
            not support.
    """
    cache = kwargs.pop("cache", None)  # the name since transformers 5.24; callers may use either name
    past_key_values = cache if past_key_values is None else past_key_values
    state, request = decode_state(past_key_values), request_of(handle)
    prompt, past = None, 0 if past_key_values is None else past_key_values.get_seq_length()
    if state is not None:
        _refuse_mask(attention_mask)
    elif request is not None and request.splice is not None:
        _refuse_mask(attention_mask)
        prompt = _prompt(request, input_ids, inputs_embeds, attention_mask, position_ids, past)
    elif inputs_embeds is not None and (request is None or not request.has_ids):
        refuse_embeddings()
    if state is None and prompt is None:
        refuse_rebuilt(past_key_values)
        return stock(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: past_key_values},
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
    _refuse_options(kwargs, past_key_values)
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    hidden = lm.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    use_cache = lm.config.use_cache if use_cache is None else use_cache
    kwargs.pop("return_dict", None)
    kwargs.pop("cache_position", None)
    if state is not None:
        hidden = _decode(handle, lm, state, past_key_values, attention_mask, hidden, kwargs)
    else:
        assert prompt is not None
        if past:
            refuse_later_image(past)
        _refuse_logits(prompt)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=lm.config)
        hidden = _prefill(handle, lm, prompt, past_key_values, attention_mask, hidden, kwargs)
    return BaseModelOutputWithPast(last_hidden_state=lm.norm(hidden), **{CACHE: past_key_values})


def _prompt(
    request: RequestState,
    input_ids: Any,
    inputs_embeds: Any,
    mask: Tensor | None,
    position_ids: Tensor | None,
    past: int,
) -> Prompt | None:
    """Return the prompt of a request with images after `past` cached tokens, or None if it has no visual token."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert request.splice is not None
    if given is None:
        return None
    request.entered, splice = True, request.splice()
    batch, length = given.shape[:2]
    if not past:
        check_shapes(batch, length, mask, position_ids)
    known = request.hints.prompts
    prompt = read_prompt(splice, batch, length, given.device, mask, position_ids, known)
    return prompt if any(prompt.n_visual) else None


def _decode(
    handle: Any, lm: Any, state: DecodeState, cache: Any, mask: Tensor | None, hidden: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """Run new tokens after a pruned prefill and return (B, q, D) states after the last layer."""
    decode = Decode(lm, state, cache, mask, hidden)
    out: Tensor | None = None if handle.engine is None else handle.engine.step(decode, cache, hidden, kwargs)
    if out is None:
        with state.decoding():
            out = decode.run(hidden, kwargs)
    return out


def _prefill(
    handle: Any, lm: Any, prompt: Prompt, cache: Any, mask: Tensor | None, hidden: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """Run the prefill and return (B, L', D) states after the last layer.

    Sets `handle.last` to the record and attaches the decode state to the cache.
    """
    handle.last = None  # frees the tensors of the previous record
    engine = handle.engine
    with nullcontext() if engine is None else engine.on(hidden.device):
        made = None if engine is None else engine.prefill(lm, handle, prompt, cache, hidden, kwargs)
        if made is None:
            kernels = None if engine is None else engine.kernels
            prefill = Prefill(lm, handle.method, prompt, cache, mask, hidden, kernels, handle.check)
            made = prefill.run(kwargs), prefill.decode, prefill.trace
    hidden, state, trace = made
    handle.last = Record(trace, Seen(handle.geometry, prompt.n_visual, hints().image_sizes), handle.method)
    if cache is not None:
        state.keep_in(cache)
    return hidden


def refuse_embeddings() -> NoReturn:
    """Raise the error for a prefill from embeddings instead of token ids."""
    raise ValueError(
        "inputs_embeds on a pruned model: embeddings do not say where an image is, and images that were encoded "
        "outside of generate() or forward() are not pruned. Give input_ids with pixel_values (package llava: images), "
        "or detach the method to use embeddings"
    )


def refuse_labels() -> NoReturn:
    """Raise the error for labels, which need one logit for each input id."""
    raise ValueError(
        "labels on a pruned model: logits are returned for the remaining tokens only, so they do not line up with the "
        "input ids. The last n logits belong to the last n ids, n being the number of tokens after the image: compute "
        "the loss from logits[:, -n:], or detach the method"
    )


def _refuse_logits(prompt: Prompt) -> None:
    keep = hints().logits_to_keep
    if keep > max(1, prompt.least_text):
        raise ValueError(
            f"logits_to_keep={keep} on a pruned model: only the {prompt.least_text} tokens after the image line up "
            f"with the last input ids; give at most {max(1, prompt.least_text)}, or detach the method"
        )


def _refuse_mask(mask: Any) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise ValueError("a pruned model takes a 2-D attention mask (batch, length); drop custom 4-D masks")


def _refuse_options(kwargs: dict[str, Any], cache: Any) -> None:
    """Refuse options that a sequence of changing length does not support, before any layer runs."""
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.pop(name, None):
            raise ValueError(f"{name}=True: pruned layers differ in length; detach the method, or read handle.last")
    if getattr(cache, "is_compileable", False):
        raise ValueError(f"{type(cache).__name__} has one length for all layers; use cache_implementation='dynamic'")
