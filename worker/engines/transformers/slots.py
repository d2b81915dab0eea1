"""Continuous batching over the slot cache: what a step does, in which order.

One step spends a token budget on the rows being prefilled (`slot_prefill`), then computes one token
for every decoding row in one forward. Sequences join and leave at any step (`slot_rows`). Runs on
the engine's thread only; must never tokenise or decode images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from worker.engines.base import EngineEvent
from worker.engines.common.failures import is_out_of_memory
from worker.engines.common.sequence import Sequence, State
from worker.engines.transformers.forward import Forward
from worker.engines.transformers.memory import release_cached
from worker.engines.transformers.slot_drafts import SlotDrafts, StepDrafts
from worker.engines.transformers.slot_prefill import Prefill
from worker.engines.transformers.slot_rows import SlotRows
from worker.engines.transformers.slot_tokens import NewTokens
from worker.engines.transformers.step_costs import Started, StepCosts

if TYPE_CHECKING:
    from worker.engines.common.runner import RunnerCounts

__all__ = ["SlotRunner"]


@dataclass(slots=True)
class _Computed:
    """A decode that was launched."""

    sequences: list[Sequence]
    #: [rows, vocabulary], or [rows, width, vocabulary] with drafts.
    logits: torch.Tensor
    drafts: StepDrafts | None
    started: Started

    def keep(self, kept: list[int]) -> None:
        """Drop all rows but those at these indices."""
        if len(kept) == len(self.sequences):
            return
        self.sequences = [self.sequences[index] for index in kept]
        self.logits = self.logits[torch.tensor(kept, dtype=torch.long, device=self.logits.device)]
        if self.drafts is not None:
            drafts = [self.drafts.drafts[index] for index in kept]
            self.drafts = StepDrafts(self.drafts.width, drafts)


KEPT_CAPACITY = 4096
"""Tokens per row that stay allocated while nothing runs; the rest is given back to the system."""


class SlotRunner:
    """Runs the sequences of one model in a batch of slots."""

    def __init__(
        self,
        forward: Forward,
        *,
        slots: int,
        prefill_chunk: int,
        stall_ms: float,
        idle_ms: float,
        banned_ids: frozenset[int],
        token_bytes: Callable[[int], bytes],
        whole_prompts: bool = False,
        overlap: bool = False,
        drafts: SlotDrafts | None = None,
    ) -> None:
        self.forward = forward
        self.cache = forward.cache
        self.slots = slots
        self.rows = SlotRows(forward, slots, whole_prompts=whole_prompts)
        self._tokens = NewTokens(self.rows, banned_ids, token_bytes)
        self.costs = StepCosts(forward.device)
        self._prefill = Prefill(
            forward,
            self.rows,
            self._tokens,
            self.costs,
            chunk=prefill_chunk,
            stall_ms=stall_ms,
            idle_ms=idle_ms,
            emits_first=not overlap,
        )
        self._overlap = overlap
        #: Drafts for speculative decoding; None if every step computes one token per row.
        self._drafts = drafts
        #: A decode that was launched but not collected yet.
        self._computed: _Computed | None = None
        #: Whether the last call returned first tokens and left the rest of its step to the next.
        self._first_emitted = False

    # --- the Runner interface ---------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self.rows.sequences or self.rows.waiting)

    def counts(self) -> RunnerCounts:
        from worker.engines.common.runner import RunnerCounts

        return RunnerCounts(
            running=len(self.rows.sequences),
            waiting=len(self.rows.waiting),
            batch=self.rows.active,
            kv_used_tokens=sum(sequence.filled for sequence in self.rows.sequences),
            kv_total_tokens=self.cache.budget,
            prefix_tokens=self.rows.prefix.tokens,
            prefix_hit_tokens=self.rows.prefix.hit_tokens,
            **({} if self._drafts is None else self._drafts.counts()),
        )

    def submit(self, sequence: Sequence) -> None:
        self.rows.waiting.append(sequence)

    @torch.inference_mode()
    def give_up(self, tokens: int) -> list[Sequence]:
        """Remove and return the sequences whose prompt and answer have reached `tokens`, for
        another scheduler to continue. Call it between steps."""
        grown = [sequence for sequence in self.rows.decoding if sequence.total >= tokens]
        for sequence in grown:
            self.rows.leave(self.rows.sequences.index(sequence))
            sequence.state, sequence.drafted = State.WAITING, 0
        if grown and self._computed is not None:
            sequences = self._computed.sequences
            self._computed.keep([i for i, one in enumerate(sequences) if one not in grown])
            if not self._computed.sequences:
                self._computed = None
        return grown

    @property
    def draft_token_bytes(self) -> int:
        """Bytes of a draft model's own KV cache for each token of ours; 0 without one."""
        return 0 if self._drafts is None else self._drafts.token_bytes

    def limit_drafts(self, tokens: int) -> None:
        """Limit a draft model's KV cache to so many tokens over all rows."""
        if self._drafts is not None:
            self._drafts.limit(tokens)

    def close(self) -> None:
        self.rows.clear()
        self._computed = None

    @torch.inference_mode()
    def step(self) -> list[EngineEvent]:
        """One unit of work: cancellations, admissions, a bounded prefill, one decode."""
        events: list[EngineEvent] = []
        self.rows.drop_cancelled(events)
        if (
            not self.rows.sequences
            and self.cache.capacity > KEPT_CAPACITY
            and not self.forward.static
        ):
            self.cache.shrink(self.cache.slots, KEPT_CAPACITY)
        if self._overlap:
            self._collect(events)
        began_s = self.costs.now_s()
        self.rows.admit(events)
        spent_ms = (self.costs.now_s() - began_s) * 1e3
        self._prefill.run(events, spent_ms, goes_on=self._first_emitted)
        self._first_emitted = False
        if self._overlap:
            # The device computes the next tokens while the host emits the last ones.
            self._launch(events)
        elif self._tokens.fresh:
            # First tokens are returned at once. The rest of this step (further prompts within the
            # same budget, and the decode) is left to the next call.
            self._first_emitted = True
        elif self.rows.active:
            self._launch(events)
            self._collect(events)
        self._tokens.emit(events)
        return events

    # --- decode -----------------------------------------------------------------------------------

    def _launch(self, events: list[EngineEvent]) -> None:
        """Launch the forward for the next token of every active row; an accelerator may still be
        computing when this returns."""
        self.rows.make_room(events)
        sequences = self.rows.decoding
        if not sequences:
            return
        drafts = self._drafts.plan(sequences, self.cache.capacity) if self._drafts else None
        started = self.costs.start()
        try:
            logits = self._forward(sequences, drafts)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if drafts is None:
                self.rows.on_out_of_memory(events)
            else:
                self._without_drafts(sequences, drafts)
            return
        for place, sequence in enumerate(sequences):
            sequence.filled += 1
            sequence.drafted = len(drafts.drafts[place].token_ids) if drafts is not None else 0
        self._computed = _Computed(sequences, logits, drafts, started)

    def _forward(self, sequences: list[Sequence], drafts: StepDrafts | None) -> torch.Tensor:
        if drafts is None:
            return self.forward.decode(sequences)
        return self.forward.verify(sequences, drafts.token_ids, drafts.width)

    def _without_drafts(self, sequences: list[Sequence], drafts: StepDrafts) -> None:
        """A step with these drafts ran out of memory: make the next one narrower."""
        assert self._drafts is not None
        release_cached(self.forward.device)
        self._drafts.out_of_memory(len(sequences), drafts)

    def _collect(self, events: list[EngineEvent]) -> None:
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
                self.rows.on_out_of_memory(events)
            else:
                self._without_drafts(sequences, drafts)
            return
        self.costs.measure()
        if self._drafts is not None and self.costs.known:
            self._drafts.took(sequences, drafts, accepted, self.costs.spent_ms(computed.started))
