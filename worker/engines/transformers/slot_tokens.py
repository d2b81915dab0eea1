"""New tokens of the rows: sampled from logits, appended to their sequences, told as events.

Must never run the model or choose what it computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from worker.engines.base import EngineEvent
from worker.engines.common.sampling import Sampled, Sampler
from worker.engines.common.sequence import Sequence, State
from worker.engines.transformers.slot_rows import SlotRows

__all__ = ["NewTokens"]


class NewTokens:
    """Turns logits into tokens, and tokens into events."""

    def __init__(
        self, rows: SlotRows, banned_ids: frozenset[int], token_bytes: Callable[[int], bytes]
    ) -> None:
        self._rows = rows
        self._banned = banned_ids
        self.token_bytes = token_bytes
        self._sampler: Sampler | None = None
        #: Sequences with a token whose events were not emitted yet; empty between steps.
        self.fresh: list[Sequence] = []

    def sample(self, sequences: list[Sequence], logits: torch.Tensor) -> list[Sampled]:
        """Sample a token for each sequence, without changing the sequences."""
        if self._sampler is None:
            self._sampler = Sampler(
                logits.shape[-1], banned_ids=sorted(self._banned), token_bytes=self.token_bytes
            )
        return self._sampler.sample(logits, [sequence.row for sequence in sequences])

    def choices(self, sequences: list[Sequence], logits: torch.Tensor) -> list[Sampled | None]:
        """What each sequence takes of its last logits; those that read them do so here."""
        drawing = [index for index, sequence in enumerate(sequences) if not sequence.reads]
        choices: list[Sampled | None] = [None] * len(sequences)
        if drawing:
            rows = logits if len(drawing) == len(sequences) else logits[torch.tensor(drawing)]
            sampled = self.sample([sequences[index] for index in drawing], rows)
            for index, choice in zip(drawing, sampled, strict=True):
                choices[index] = choice
        for index, sequence in enumerate(sequences):
            if sequence.reads:
                sequence.read(logits[index : index + 1])
        return choices

    def take(
        self, sequences: list[Sequence], choices: list[Sampled] | list[Sampled | None]
    ) -> None:
        """Append each sequence's token; those that end with it leave their rows."""
        now = time.perf_counter()
        for sequence, choice in zip(sequences, choices, strict=True):
            sequence.append_token(choice, now)
            self.fresh.append(sequence)
            if sequence.state is State.DONE:
                self._rows.leave(self._rows.sequences.index(sequence))

    def tell(self, events: list[EngineEvent]) -> None:
        """Emit the events of all new tokens; sequences whose text ends them leave."""
        now = time.perf_counter()
        for sequence in self.fresh:
            over = sequence.state is State.DONE
            events += sequence.flush_events(now)
            if sequence.state is State.DONE and not over:
                if sequence in self._rows.sequences:
                    self._rows.leave(self._rows.sequences.index(sequence))
                else:
                    self._rows.waiting.remove(sequence)
        self.fresh.clear()
