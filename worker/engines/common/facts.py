"""Facts about a model that prompts and texts need, wherever its weights are.

Reads configurations and tokenizers in memory; must never load weights or know a device.
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
"""Assumed if neither configuration nor tokenizer says, as the replaced systems did."""


@dataclass(slots=True, kw_only=True)
class ModelFacts:
    """A model as seen by its requests: tokens, context, end tokens, placeholders, names."""

    #: None only in tests of bare models.
    tokenizer: Any
    #: The processor of a model that accepts images, else None.
    processor: Any
    context_tokens: int
    eos_ids: frozenset[int]
    #: Image, video and audio placeholders: never sampled, never taken from a user's text.
    placeholder_ids: frozenset[int]
    #: Upper bound of ids that the model can write.
    vocabulary: int
    #: Upper bound of ids that it can read, apart from placeholders: the rows of its embedding.
    embedding_rows: int
    takes_images: bool
    #: Whether it requires an image.
    needs_image: bool = False
    encoder_decoder: bool
    #: Whether it only embeds, having no output head.
    embedding_only: bool = False
    #: The model's folder if it is local, for files next to the weights.
    folder: Path | None = None
    quantised: bool = False
    #: Names of adapters in the model, chosen per row.
    adapters: tuple[str, ...] = ()
    #: Facts for adapters that have their own tokenizer or template.
    adapter_texts: dict[str, ModelFacts] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    #: `--reasoning-parser`, see `reasoning.find_format`; empty: as the model shows.
    reasoning_parser: str = ""
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
        """Gather the facts from configurations, tokenizer and processor. `own`: further fields,
        known by the caller."""
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
    """Values for `MODEL_DEFAULTS` in the model's generation config; greedy if it has `do_sample:
    false`. Values that would be invalid in a request are left out."""
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
        # Newer kinds (yarn, llama3, longrope) already give the extended length.
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
    # A configuration that does not set an id has its class's default, which may be any token of
    # this model.
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
    # A processor may use this name for another token (Gemma 3: the one that opens an image).
    for holder in (config, processor):
        found = {getattr(holder, name, None) for name in names}
        ids = frozenset(value for value in found if isinstance(value, int) and value >= 0)
        if ids:
            return ids
    return frozenset()
