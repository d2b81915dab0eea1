"""A model in memory and what there is to know of it: context, end tokens, placeholders.

Reads configurations and tokenizers, probes rotary embeddings; must never load weights nor run the
model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import GenerationConfig

from broker.protocol.messages import MODEL_DEFAULTS, Params
from worker.engines.transformers.compat import rope_parameters
from worker.engines.transformers.loading.quantise import quantised_share
from worker.engines.transformers.rope import LengthRope, find_length_rope
from worker.engines.transformers.rows import RowAdapters
from worker.engines.transformers.settings import EngineSettings

__all__ = ["LoadedModel", "wrap_model"]

DEFAULT_CONTEXT_TOKENS = 2048
"""Where neither configuration nor tokenizer says: what the replaced systems assume."""


@dataclass(slots=True)
class LoadedModel:
    """A model ready to be run, and what there is to know of it."""

    model: Any
    #: None only in tests of bare models.
    tokenizer: Any
    #: The processor of a model that takes pictures, else None.
    processor: Any
    device: torch.device
    dtype: torch.dtype
    context_tokens: int
    eos_ids: frozenset[int]
    #: Picture, video and audio placeholders: never sampled, never taken from a user's text.
    placeholder_ids: frozenset[int]
    #: Ids that the model may write are below.
    vocabulary: int
    #: Ids that it reads are below, placeholders apart: those with a row in its embedding.
    embedding_rows: int
    takes_images: bool
    encoder_decoder: bool
    #: Only embeds: it has no output head.
    embedding_only: bool
    #: Folder of the model where it is local, for files beside the weights.
    folder: Path | None
    quantised: bool = False
    #: Names of adapters in the model, each chosen per row, and what chooses.
    adapters: tuple[str, ...] = ()
    rows: RowAdapters | None = None
    #: Of adapters that brought a tokenizer or template of their own: the facts that follow from it.
    adapter_texts: dict[str, LoadedModel] = field(default_factory=dict)
    #: The model as it was before adapters were put into it, until the self test is over.
    reference: Any = None
    #: Where positions have other angles in long sequences than in short ones.
    rope: LengthRope | None = None
    details: dict[str, Any] = field(default_factory=dict)
    #: The model's own values of `MODEL_DEFAULTS`, from its generation config.
    sampling_defaults: dict[str, float] = field(default_factory=dict)

    def choose_rows(self, adapters: Sequence[str | None]) -> None:
        """The adapter of each row of the next forwards, None for the model as it is."""
        if self.rows is not None:
            self.rows.choose(adapters)

    def any_length(self) -> AbstractContextManager[None]:
        """Inside, forwards of the model may be longer than `rope` allows a batch to be."""
        return nullcontext() if self.rope is None else self.rope.used()


def wrap_model(
    model: Any,
    tokenizer: Any,
    processor: Any = None,
    *,
    settings: EngineSettings | None = None,
    folder: Path | None = None,
    quantised: bool = False,
) -> LoadedModel:
    """Gather the facts of a model that is in memory already."""
    settings = settings or EngineSettings()
    model = model.eval()
    config = model.config
    text_config = config.get_text_config(decoder=True)
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    context = settings.context_tokens or _context_tokens(config, text_config, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = model.dtype
    share = quantised_share(model) if quantised else None
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        device=model.device,
        dtype=dtype,
        context_tokens=context,
        eos_ids=_eos_ids(model, tokenizer),
        placeholder_ids=_placeholder_ids(config, processor),
        vocabulary=int(text_config.vocab_size),
        embedding_rows=_embedding_rows(model, text_config),
        takes_images=processor is not None,
        encoder_decoder=encoder_decoder,
        embedding_only=head is None,
        folder=folder,
        quantised=quantised,
        sampling_defaults=_sampling_defaults(model),
        rope=find_length_rope(model, context),
        details={
            "architecture": type(model).__name__,
            "parameters": parameters,
            "dtype": str(dtype).removeprefix("torch."),
            "quantised": quantised,
            "attention": str(getattr(text_config, "_attn_implementation", "")),
            "layers": int(getattr(text_config, "num_hidden_layers", 0) or 0),
            **({"quantised_share": round(share, 3)} if share is not None else {}),
        },
    )


def _sampling_defaults(model: Any) -> dict[str, float]:
    """What the model's generation config says of `MODEL_DEFAULTS`; greedy where it says
    `do_sample: false`. Values that a request could not have are left out."""
    generation = getattr(model, "generation_config", None)
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


def _embedding_rows(model: Any, text_config: Any) -> int:
    """Rows of the input embedding; where that is elsewhere, what the configuration says."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    rows = getattr(embedding, "num_embeddings", None)
    return rows if isinstance(rows, int) else int(text_config.vocab_size)


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: those of generation config, configuration and tokenizer together."""
    text_config = model.config.get_text_config(decoder=True)
    own = _ids(tokenizer)
    configured = _ids(model.config) | _ids(text_config)
    generation = getattr(model, "generation_config", None) or GenerationConfig()
    if getattr(generation, "_from_model_config", False):
        configured |= _ids(generation)
    else:
        own |= _ids(generation)
    # A configuration without a word on it has its class's id, which may be any word of this model.
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    if own and special:
        defaults = _ids(type(model.config)) | _ids(type(text_config))
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
