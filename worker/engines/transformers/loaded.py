"""A model in memory: its device, dtype, adapters and what the engine needs to know of it.

Runs rotary embeddings on a few positions; must never load weights or run the model.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worker.engines.common.facts import ModelFacts
from worker.engines.transformers.heads import Backbone, DecisionHead, is_decision_model
from worker.engines.transformers.loading.quantise import numbers_of, quantised_share
from worker.engines.transformers.rope import LengthRope, find_length_rope
from worker.engines.transformers.rows import RowAdapters
from worker.engines.transformers.settings import EngineSettings

__all__ = ["LoadedModel", "labels_of", "wrap_model"]

_LABELS_SHOWN = 100
"""How many of a classifier's labels its details list: they are sent to every client that asks."""


def labels_of(config: Any) -> tuple[str, ...]:
    """The names of a classifier's labels, in the order of its logits; made unique by appending the
    index to a repeated one."""
    names = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    found: list[str] = []
    for index in range(int(config.num_labels)):
        name = names.get(index, f"LABEL_{index}")
        found.append(f"{name} ({index})" if name in found else name)
    return tuple(found)


@dataclass(slots=True, kw_only=True)
class LoadedModel(ModelFacts):
    """A model ready to run, and its facts."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    #: The adapters that can be chosen per row, if there are any.
    rows: RowAdapters | None = None
    #: The model before adapters were attached, until the self test is over.
    reference: Any = None
    #: The scoring head of a decision model, which generates no text; `model` is then its backbone.
    head: DecisionHead | None = None
    #: The label names of a sequence classifier, which generates no text.
    labels: tuple[str, ...] = ()
    #: Set if rotary frequencies depend on the length of a sequence.
    rope: LengthRope | None = None

    def choose_rows(self, adapters: Sequence[str | None]) -> None:
        """Choose the adapter of each row for the next forwards, None for the base model."""
        if self.rows is not None:
            self.rows.choose(adapters)

    def any_length(self) -> AbstractContextManager[None]:
        """Context in which a forward may be longer than `rope` allows in a shared batch."""
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
    """A `LoadedModel` of a transformers model that is already in memory.

    `folder` is where its other files are (sentence-transformers, decision.json); `quantised` says
    whether it computes like a quantised model.
    """
    model = model.eval()
    architecture, decision_head = type(model).__name__, None
    if is_decision_model(model):
        decision_head = DecisionHead(model)
        model = Backbone(model).eval()
    text_config = model.config.get_text_config(decoder=True)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    share = quantised_share(model) if quantised else None
    loaded = LoadedModel.gather(
        model.config,
        tokenizer,
        processor,
        settings=settings or EngineSettings(),
        generation_config=getattr(model, "generation_config", None),
        model=model,
        device=model.device,
        dtype=model.dtype,
        embedding_rows=_embedding_rows(model, text_config),
        needs_image=_needs_image(model),
        embedding_only=head is None,
        folder=folder,
        quantised=quantised,
        details={
            "architecture": architecture,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "numbers": numbers_of(model, quantised=quantised),
            "quantised": quantised,
            "attention": str(getattr(text_config, "_attn_implementation", "")),
            "layers": int(getattr(text_config, "num_hidden_layers", 0) or 0),
            **({"quantised_share": round(share, 3)} if share is not None else {}),
        },
    )
    loaded.head = decision_head
    if type(model).__name__.endswith("ForSequenceClassification"):
        loaded.labels = labels_of(model.config)
        loaded.details["labels"] = list(loaded.labels[:_LABELS_SHOWN])
    loaded.context_tokens = min(loaded.context_tokens, _positions(model))
    loaded.rope = find_length_rope(model, loaded.context_tokens)
    return loaded


def _positions(model: Any) -> int:
    """How many tokens have a learned position embedding. RoBERTa and its relatives start counting
    after their padding index, so they have fewer than their configuration says."""
    table = next(
        (one for name, one in model.named_modules() if name.endswith("position_embeddings")), None
    )
    if not isinstance(table, torch.nn.Embedding) or table.padding_idx is None:
        return sys.maxsize
    return table.num_embeddings - table.padding_idx - 1


def _needs_image(model: Any) -> bool:
    """Whether the model's `generate` requires an image, as BLIP-2's does."""
    generate = getattr(type(model), "generate", None)
    parameters = {} if generate is None else inspect.signature(generate).parameters
    return "pixel_values" in parameters and (
        parameters["pixel_values"].default is inspect.Parameter.empty
    )


def _embedding_rows(model: Any, text_config: Any) -> int:
    """Rows of the input embedding; from the configuration if the embedding is elsewhere."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    rows = getattr(embedding, "num_embeddings", None)
    return rows if isinstance(rows, int) else int(text_config.vocab_size)
