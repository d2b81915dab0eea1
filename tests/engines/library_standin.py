"""A library that computes nothing: the next token is a fixed function of the tokens so far.

Stands where vLLM, MLX, llama.cpp or SGLang stand, so that what tokenbus does around them (jobs,
slots, cancels, stops, resumes) is tested without their packages.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

from transformers import LlamaConfig

from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from tests.engines import tiny
from worker.engines.common.arguments import SharedSettings
from worker.engines.common.facts import ModelFacts
from worker.engines.common.generator import Drawn, Generator
from worker.engines.common.library_model import LibraryEngine, LibraryModel, architecture
from worker.engines.common.sampling import Sampled
from worker.engines.common.sequence import Sequence

__all__ = ["StandIn", "described", "following", "served", "written"]

FIRST_WORD = 20
"""Tokens from this id on have text."""


def following(token_ids: Items[int]) -> int:
    """The token after these."""
    value = 17
    for token_id in token_ids:
        value = (value * 31 + token_id) % 1_000_003
    return FIRST_WORD + value % (len(tiny.tokenizer()) - FIRST_WORD)


def written(prompt: Items[int], count: int) -> list[int]:
    """The first tokens of the answer to a prompt."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(following(ids))
    return ids[len(prompt) :]


def described(**changes: Any) -> ModelFacts:
    """Facts of a model without weights."""
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=512,
        eos_token_id=tiny.END,
        bos_token_id=tiny.BOS,
    )
    details = {"architecture": architecture(config), "library": "stand-in"}
    return ModelFacts.gather(
        config, tiny.tokenizer(), settings=SharedSettings(), details=details | changes
    )


class StandIn:
    """A `Generator` of `following`. `at_once` tokens come with each step."""

    def __init__(self, slots: int = 2, at_once: int = 1) -> None:
        self.slots = slots
        self.at_once = at_once
        self.batch: list[Sequence] = []
        self.inserted = 0
        self.removed = 0
        self.steps = 0
        #: Prompt lengths that it refuses, and those whose computation fails.
        self.refused: set[int] = set()
        self.failing: set[int] = set()

    def insert(self, sequence: Sequence) -> None:
        if len(sequence.prompt.ids) in self.refused:
            raise RequestError(ErrorCode.INVALID_REQUEST, "the library refuses this request")
        assert len(self.batch) < self.slots
        self.batch.append(sequence)
        self.inserted += 1

    def remove(self, sequence: Sequence) -> None:
        self.batch.remove(sequence)
        self.removed += 1

    def next(self) -> list[Drawn]:
        self.steps += 1
        drawn: list[Drawn] = []
        for sequence in self.batch:
            if len(sequence.prompt.ids) in self.failing:
                code = ErrorCode.ENGINE_ERROR.value
                drawn.append(Drawn(sequence, ErrorInfo(code=code, message="it broke")))
                continue
            ids = sequence.tokens(0, sequence.total)
            for _ in range(self.at_once):
                ids.append(following(ids))
                drawn.append(Drawn(sequence, Sampled(ids[-1], None, ok=True)))
        return drawn

    def kv_total_tokens(self) -> int:
        return 1000

    def close(self) -> None:
        self.batch.clear()


def served(generator: Generator, unsupported: dict[str, str] | None = None) -> LibraryEngine:
    """An engine that serves "tiny" from a generator."""
    settings = SharedSettings()
    model = LibraryModel(described(), ("tiny",), settings, generator, unsupported=unsupported)
    return LibraryEngine("stand-in", "cpu", [model], settings)
