"""Decode: the next token of every active row, in a forward of its own or together with a prompt.

A decode is launched, and collected later: an accelerator computes in between. Must never choose
which prompts are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.engines.base import EngineEvent
from worker.engines.common.failures import is_out_of_memory
from worker.engines.common.sequence import Sequence, State
from worker.engines.transformers.forward import Forward
from worker.engines.transformers.memory import release_cached
from worker.engines.transformers.packing import Along
from worker.engines.transformers.slot_drafts import SlotDrafts, StepDrafts
from worker.engines.transformers.slot_rows import SlotRows
from worker.engines.transformers.slot_tokens import NewTokens
from worker.engines.transformers.step_costs import Started, StepCosts

__all__ = ["Decode"]


@dataclass(slots=True)
class _Computed:
    """A decode that was launched."""

    sequences: list[Sequence]
    #: [rows, vocabulary], or [rows, width, vocabulary] with drafts.
    logits: torch.Tensor
    drafts: StepDrafts | None
    #: None if the forward also computed a prompt, so that its time says little about the decode.
    started: Started | None

    def keep(self, kept: list[int]) -> None:
        """Drop all rows but those at these indices."""
        if len(kept) == len(self.sequences):
            return
        self.sequences = [self.sequences[index] for index in kept]
        self.logits = self.logits[torch.tensor(kept, dtype=torch.long, device=self.logits.device)]
        if self.drafts is not None:
            drafts = [self.drafts.drafts[index] for index in kept]
            self.drafts = StepDrafts(self.drafts.width, drafts)


class Decode:
    """Decodes the active rows of one scheduler."""

    def __init__(
        self,
        forward: Forward,
        rows: SlotRows,
        tokens: NewTokens,
        costs: StepCosts,
        drafts: SlotDrafts | None,
    ) -> None:
        self._forward = forward
        self._rows = rows
        self._tokens = tokens
        self._costs = costs
        #: Drafts for speculative decoding; None if every step computes one token per row.
        self.drafts = drafts
        self._planned: StepDrafts | None = None
        #: A decode that was launched but not collected yet.
        self._computed: _Computed | None = None

    @property
    def launched(self) -> bool:
        """Whether there is a decode to collect."""
        return self._computed is not None

    def forget(self) -> None:
        """Drop a decode that was launched."""
        self._computed = None

    def leave_out(self, sequences: list[Sequence]) -> None:
        """These have left their rows: their tokens are not collected."""
        if self._computed is not None:
            ours = self._computed.sequences
            self._computed.keep([i for i, one in enumerate(ours) if one not in sequences])
            if not self._computed.sequences:
                self._computed = None

    def along(self) -> Along:
        """What the active rows compute in a forward that also computes prompts. There must be room
        for it (`SlotRows.make_room`); `went_along` follows the forward."""
        sequences = self._rows.decoding
        drafts = self._plan(sequences)
        self._planned = drafts
        if drafts is None:
            return Along(sequences)
        return Along(sequences, drafts.token_ids, drafts.width)

    def went_along(self, along: Along) -> None:
        """A forward of prompts has computed these rows too."""
        assert along.logits is not None
        self._launched(along.sequences, along.logits, self._planned, None)

    def launch(self, events: list[EngineEvent]) -> None:
        """Launch the forward for the next token of every active row; an accelerator may still be
        computing when this returns."""
        self._rows.make_room(events)
        sequences = self._rows.decoding
        if not sequences:
            return
        drafts = self._plan(sequences)
        started = self._costs.start()
        try:
            if drafts is None:
                logits = self._forward.decode(sequences)
            else:
                logits = self._forward.verify(sequences, drafts.token_ids, drafts.width)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if drafts is None:
                self._rows.on_out_of_memory(events)
            else:
                self._without_drafts(sequences, drafts)
            return
        self._launched(sequences, logits, drafts, started)

    def _plan(self, sequences: list[Sequence]) -> StepDrafts | None:
        if self.drafts is None:
            return None
        return self.drafts.plan(sequences, self._forward.cache.capacity)

    def _launched(
        self,
        sequences: list[Sequence],
        logits: torch.Tensor,
        drafts: StepDrafts | None,
        started: Started | None,
    ) -> None:
        for place, sequence in enumerate(sequences):
            sequence.filled += 1
            sequence.drafted = len(drafts.drafts[place].token_ids) if drafts is not None else 0
        self._computed = _Computed(sequences, logits, drafts, started)

    def _without_drafts(self, sequences: list[Sequence], drafts: StepDrafts) -> None:
        """A step with these drafts ran out of memory: make the next one narrower."""
        assert self.drafts is not None
        release_cached(self._forward.device)
        self.drafts.out_of_memory(len(sequences), drafts)

    def collect(self, events: list[EngineEvent]) -> None:
        """Sample tokens from the launched forward."""
        computed, self._computed = self._computed, None
        if computed is None:
            return
        for sequence in computed.sequences:
            sequence.drafted = 0
        # The others ended with the text of their previous token, or were cancelled.
        computed.keep([i for i, s in enumerate(computed.sequences) if s.state is State.DECODE])
        sequences, drafts = computed.sequences, computed.drafts
        if not sequences:
            return
        accepted = [0] * len(sequences)
        try:
            if drafts is None:
                self._tokens.take(sequences, self._tokens.sample(sequences, computed.logits))
            else:
                accepted = self._tokens.take_drafted(
                    sequences, drafts.token_ids, computed.logits, events
                )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            for sequence in sequences:
                if sequence.state is State.DECODE and sequence.filled == sequence.total:
                    # The token is computed again in the next step.
                    sequence.filled -= 1
            if drafts is None:
                self._rows.on_out_of_memory(events)
            else:
                self._without_drafts(sequences, drafts)
            return
        self._costs.measure()
        if self.drafts is not None and self._costs.known:
            started = computed.started
            spent_ms = None if started is None else self._costs.spent_ms(started)
            self.drafts.took(sequences, drafts, accepted, spent_ms)
