"""New tokens of the rows: sampled from logits, appended to their sequences, emitted as events.

Must never run the model or choose what it computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from worker.engines.base import EngineEvent
from worker.engines.common.sampling import Sampled, Sampler, SamplerRow
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
        #: Sequences with a new token whose events are still to be emitted; empty between steps.
        self.fresh: list[Sequence] = []

    def sample(self, sequences: list[Sequence], logits: torch.Tensor) -> list[Sampled]:
        """Sample a token for each sequence, without changing the sequences."""
        return self._sample([sequence.row for sequence in sequences], logits)

    def _sample(self, rows: list[SamplerRow], logits: torch.Tensor) -> list[Sampled]:
        if self._sampler is None:
            self._sampler = Sampler(
                logits.shape[-1], banned_ids=sorted(self._banned), token_bytes=self.token_bytes
            )
        return self._sampler.sample(logits, rows)

    def choices(self, sequences: list[Sequence], logits: torch.Tensor) -> list[Sampled | None]:
        """A token sampled for each sequence; None for one that reads its logits instead, which it
        does here. `logits`: [sequences, vocabulary], of each one's last token."""
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

    def take_drafted(
        self,
        sequences: list[Sequence],
        drafts: list[list[int]],
        logits: torch.Tensor,
        events: list[EngineEvent],
    ) -> list[int]:
        """Draw and append the next token of each sequence, and go on for as long as its draft
        predicted what was drawn. Every token is drawn as it would be without drafts, from its
        sequence's own state and at its own position. Returns how many tokens of each draft were
        right.

        `logits` [sequences, width, vocabulary]; the cache already holds each sequence's last token
        and its draft. Events of all but a sequence's last new token are emitted here, since its
        text may end the sequence.
        """
        accepted = [0] * len(sequences)
        try:
            self._draw(sequences, drafts, logits, accepted, events)
        finally:
            # Only now: when rows move, what is copied depends on their final lengths.
            for sequence in sequences:
                if sequence.state is State.DONE:
                    self._rows.leave(self._rows.sequences.index(sequence))
        return accepted

    def _draw(
        self,
        sequences: list[Sequence],
        drafts: list[list[int]],
        logits: torch.Tensor,
        accepted: list[int],
        events: list[EngineEvent],
    ) -> None:
        width, flat = logits.shape[1], logits.flatten(0, 1)
        going, depth = list(range(len(sequences))), 0
        while going:
            # Unless the row is plain, what is drawn later depends on what is drawn now.
            counts = [
                len(drafts[index]) + 1 if sequences[index].row.plain else 1 for index in going
            ]
            rows: list[SamplerRow] = []
            places: list[int] = []
            for index, count in zip(going, counts, strict=True):
                rows += [sequences[index].row.ahead(further) for further in range(count)]
                places += range(index * width + depth, index * width + depth + count)
            chosen = iter(self._sample(rows, flat[torch.tensor(places, device=flat.device)]))
            if not depth:
                self.fresh += sequences
            before, going = going, []
            for index, count in zip(before, counts, strict=True):
                sequence = sequences[index]
                choices = [next(chosen) for _ in range(count)]
                right = self._append(sequence, choices, drafts[index][depth:], events)
                accepted[index] += right
                if right == count and sequence.state is State.DECODE:
                    going.append(index)
            depth += 1

    def _append(
        self,
        sequence: Sequence,
        choices: list[Sampled],
        draft: list[int],
        events: list[EngineEvent],
    ) -> int:
        """Append drawn tokens for as long as they agree with the draft, and the first that does
        not. Returns how many agreed."""
        now = time.perf_counter()
        right = 0
        for place, choice in enumerate(choices):
            events += sequence.flush_events(now)
            if sequence.state is State.DECODE:
                sequence.append_token(choice, now)
                agrees = draft[place : place + 1] == [choice.token_id]
                right += agrees
                if agrees and sequence.state is State.DECODE:
                    # The cache holds it already, and the logits after it are computed.
                    sequence.filled += 1
                    continue
            break
        return right

    def emit(self, events: list[EngineEvent]) -> None:
        """Emit the events of all new tokens; sequences that their text ends leave their rows."""
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
