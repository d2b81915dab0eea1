"""What a model's own `generate()` computes for two short prompts: the reference of the self test.

Must never use slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from worker.engines.base import EngineLoadError
from worker.engines.common.compat import cache_argument, forward_parameters
from worker.engines.common.failures import is_out_of_memory, one_line
from worker.engines.common.prompt import Prompt
from worker.engines.transformers.fallback import plain_generation_config
from worker.engines.transformers.forward import Unsupported
from worker.engines.transformers.loaded import LoadedModel

__all__ = ["STEPS", "Reference", "memory_short", "references", "text_prompt"]

STEPS = 4
"""Answer tokens compared for each prompt."""

MakeCache = Callable[..., Any]
"""Makes one of transformers' caches from its argument `config`."""


class Reference(NamedTuple):
    """A prompt and the output of plain greedy `generate()` for it."""

    prompt: Prompt
    #: float32 [vocabulary] for each of `STEPS` tokens.
    logits: list[torch.Tensor]
    tokens: list[int]


def references(
    loaded: LoadedModel, image_prompt: Prompt | None, make_cache: MakeCache | None = None
) -> tuple[Reference, Reference]:
    """A long prompt (with an image if one is given) and a short one, run by `generate()`, with its
    own cache or one that `make_cache` makes from the text model's configuration.

    Raises `EngineLoadError` if that fails, `Unsupported` if it needs an image.
    """
    long = _generated(loaded, image_prompt or text_prompt(loaded, 13), make_cache)
    try:
        return long, _generated(loaded, text_prompt(loaded, 5), make_cache)
    except EngineLoadError as error:
        if image_prompt is None:
            raise
        raise Unsupported(f"a prompt without an image fails: {error}") from error


def _generated(loaded: LoadedModel, prompt: Prompt, make_cache: MakeCache | None) -> Reference:
    try:
        with torch.inference_mode(), loaded.any_length():
            return _reference(loaded, prompt, make_cache)
    except Exception as error:
        if is_out_of_memory(error):
            raise memory_short(error) from error
        if make_cache is not None:
            raise EngineLoadError(
                "kv_cache_dtype=int8: the model's own generate() fails if a cache is passed in: "
                f"{type(error).__name__}: {one_line(error, 300)}; omit --engine-arg kv_cache_dtype"
            ) from error
        raise EngineLoadError(
            f"the model's own generate() fails, so no request could be answered: "
            f"{type(error).__name__}: {one_line(error, 300)}"
        ) from error


def memory_short(error: BaseException) -> EngineLoadError:
    """The error if there is too little memory for two short prompts."""
    return EngineLoadError(
        f"too little memory for two short prompts beside the weights: {one_line(error, 300)}; "
        "--load-8bit and --load-4bit need less"
    )


def text_prompt(loaded: LoadedModel, length: int) -> Prompt:
    """A prompt of `length` ordinary tokens, spread over the vocabulary."""
    import numpy as np

    special = set(getattr(loaded.tokenizer, "all_special_ids", None) or [])
    special |= loaded.placeholder_ids
    stride = max(loaded.vocabulary // (2 * length + 7), 1)
    ordinary = [
        token_id
        for token_id in range(loaded.vocabulary // 3, loaded.vocabulary, stride)
        if token_id not in special
    ]
    ids = (ordinary * length)[:length]
    return Prompt(ids=ids, key=np.asarray(ids, dtype=np.int64))


def _reference(loaded: LoadedModel, prompt: Prompt, make_cache: MakeCache | None) -> Reference:
    if loaded.head is not None:
        return _read_reference(loaded, prompt, make_cache)
    # The model before adapters were attached, if there are any.
    model = loaded.model if loaded.reference is None else loaded.reference
    ids = torch.tensor([prompt.ids], device=loaded.device)
    inputs = prompt.inputs(loaded.device, loaded.dtype) | _cache(model, make_cache)
    config = plain_generation_config(
        model,
        max_new_tokens=STEPS,
        return_dict_in_generate=True,
        output_logits=True,
        suppress_tokens=sorted(loaded.placeholder_ids) or None,
        # Given a cache with use_cache off, generate() would add the whole text to it at every step.
        **({} if make_cache is None else {"cache_implementation": None, "use_cache": True}),
    )
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, **inputs
    )
    tokens = output.sequences[0, -STEPS:].tolist()
    return Reference(prompt, [logits[0].float() for logits in output.logits], tokens)


def _read_reference(loaded: LoadedModel, prompt: Prompt, make_cache: MakeCache | None) -> Reference:
    """The same for a decision model, which generates nothing: its outputs after a prompt and after
    each of some ordinary tokens that follow."""
    ordinary = text_prompt(loaded, STEPS + len(prompt.ids)).ids
    tokens = ordinary[-STEPS:]
    rows = []
    for count in range(STEPS):
        ids = torch.tensor([prompt.ids + tokens[:count]], device=loaded.device)
        inputs = prompt.media_on(loaded.device, loaded.dtype)
        for name, value in prompt.aligned.items():
            padded = torch.nn.functional.pad(value, (0, count))
            inputs[name] = padded.to(loaded.device)
        inputs |= {"use_cache": make_cache is not None} | _cache(loaded.model, make_cache)
        rows.append(loaded.model(input_ids=ids, **inputs).logits[0, -1].float())
    return Reference(prompt, rows, tokens)


def _cache(model: Any, make: MakeCache | None) -> dict[str, Any]:
    """The keyword argument that passes a new cache to a forward; empty without `make`."""
    argument = cache_argument(forward_parameters(model))
    if make is None or argument is None:
        return {}
    return {argument: make(config=model.config.get_text_config(decoder=True))}
