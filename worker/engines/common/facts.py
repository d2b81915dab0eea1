"""What there is to know of a model for prompts and texts, wherever its weights are.

Reads configurations and tokenizers that are in memory; must never load weights nor know a device.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec
from transformers import GenerationConfig

from broker.protocol.messages import MODEL_DEFAULTS, Params
from worker.engines.common.arguments import SharedSettings
from worker.engines.common.compat import rope_parameters

__all__ = ["ModelFacts"]

DEFAULT_CONTEXT_TOKENS = 2048
"""Where neither configuration nor tokenizer says: what the replaced systems assume."""


@dataclass(slots=True, kw_only=True)
class ModelFacts:
    """A model as its requests see it: tokens, context, ends of answers, placeholders, names."""

    #: None only in tests of bare models.
    tokenizer: Any
    #: The processor of a model that takes pictures, else None.
    processor: Any
    context_tokens: int
    eos_ids: frozenset[int]
    #: Picture, video and audio placeholders: never sampled, never taken from a user's text.
    placeholder_ids: frozenset[int]
    #: Ids that the model may write are below.
    vocabulary: int
    #: Ids that it reads are below, placeholders apart: those with a row in its embedding.
    embedding_rows: int
    takes_images: bool
    #: It answers about a picture only.
    needs_image: bool = False
    encoder_decoder: bool
    #: Only embeds: it has no output head.
    embedding_only: bool = False
    #: Folder of the model where it is local, for files beside the weights.
    folder: Path | None = None
    quantised: bool = False
    #: Names of adapters in the model, each chosen per row.
    adapters: tuple[str, ...] = ()
    #: Of adapters that brought a tokenizer or template of their own: the facts that follow from it.
    adapter_texts: dict[str, ModelFacts] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    #: The model's own values of `MODEL_DEFAULTS`, from its generation config.
    sampling_defaults: dict[str, float] = field(default_factory=dict)

    @classmethod
    def gather(
        cls,
        config: Any,
        tokenizer: Any,
        processor: Any = None,
        *,
        settings: SharedSettings,
        generation_config: Any = None,
        **own: Any,
    ) -> Self:
        """The facts that follow from configurations, tokenizer and processor, and `own`: fields of
        the class that the caller knows."""
        text_config = config.get_text_config(decoder=True)
        facts: dict[str, Any] = {
            "tokenizer": tokenizer,
            "processor": processor,
            "context_tokens": settings.context_tokens
            or _context_tokens(config, text_config, tokenizer),
            "eos_ids": _eos_ids(config, generation_config, tokenizer),
            "placeholder_ids": _placeholder_ids(config, processor),
            "vocabulary": int(text_config.vocab_size),
            "embedding_rows": int(text_config.vocab_size),
            "takes_images": processor is not None,
            "encoder_decoder": bool(getattr(config, "is_encoder_decoder", False)),
            "sampling_defaults": _sampling_defaults(generation_config),
        }
        return cls(**facts | own)


def _sampling_defaults(generation: Any) -> dict[str, float]:
    """What the model's generation config says of `MODEL_DEFAULTS`; greedy where it says
    `do_sample: false`. Values that a request could not have are left out."""
    if getattr(generation, "do_sample", None) is False:
        return {"temperature": 0.0}
    found: dict[str, float] = {}
    for name in MODEL_DEFAULTS:
        value = getattr(generation, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(msgspec.ValidationError):
                msgspec.convert({name: value}, Params)
                found[name] = value
    return found


def _context_tokens(config: Any, text_config: Any, tokenizer: Any) -> int:
    """Longest prompt plus answer."""
    names = (
        "max_position_embeddings",
        "max_sequence_length",
        "n_positions",
        "seq_length",
        "max_seq_len",
    )
    length = next(
        (
            int(value)
            for name in names
            for value in (getattr(text_config, name, None),)
            if isinstance(value, int) and value > 0
        ),
        0,
    )
    scaling = rope_parameters(text_config)
    if length and scaling:
        kind = scaling.get("rope_type", scaling.get("type"))
        # Newer kinds (yarn, llama3, longrope) state the stretched length already.
        if kind in ("linear", "dynamic"):
            length = int(length * float(scaling.get("factor", 1.0)))
    if not length:
        stated = getattr(tokenizer, "model_max_length", None)
        if isinstance(stated, int) and 0 < stated < 10_000_000:
            length = stated
    return length or DEFAULT_CONTEXT_TOKENS


def _eos_ids(config: Any, generation: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: those of generation config, configuration and tokenizer together."""
    text_config = config.get_text_config(decoder=True)
    own = _ids(tokenizer)
    configured = _ids(config) | _ids(text_config)
    generation = generation or GenerationConfig()
    if getattr(generation, "_from_model_config", False):
        configured |= _ids(generation)
    else:
        own |= _ids(generation)
    # A configuration without a word on it has its class's id, which may be any word of this model.
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    if own and special:
        defaults = _ids(type(config)) | _ids(type(text_config))
        configured -= defaults - special
    return frozenset(i for i in own | configured if 0 <= i < int(text_config.vocab_size))


def _ids(source: Any) -> set[int]:
    ids = getattr(source, "eos_token_id", None)
    found = ids if isinstance(ids, list | tuple) else [ids]
    return {value for value in found if isinstance(value, int)}


def _placeholder_ids(config: Any, processor: Any) -> frozenset[int]:
    names = (
        "image_token_id",
        "image_token_index",
        "video_token_id",
        "video_token_index",
        "audio_token_id",
        "audio_token_index",
    )
    # A processor may call another token so (Gemma 3: the one that opens a picture).
    for holder in (config, processor):
        found = {getattr(holder, name, None) for name in names}
        ids = frozenset(value for value in found if isinstance(value, int) and value >= 0)
        if ids:
            return ids
    return frozenset()
