"""Continuous batching over the slot cache: the order of a step.

One step spends a token budget on the rows being prefilled (`slot_prefill`), then computes one token
for every decoding row in one forward. Sequences join and leave at any step (`slot_rows`). Runs on
the engine's thread only; must never tokenise or decode images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from worker.engines.base import EngineEvent
from worker.engines.common.failures import is_out_of_memory
from worker.engines.common.sequence import Sequence, State
from worker.engines.transformers.forward import Forward
from worker.engines.transformers.slot_prefill import Prefill
from worker.engines.transformers.slot_rows import SlotRows
from worker.engines.transformers.slot_tokens import NewTokens
from worker.engines.transformers.step_costs import StepCosts

if TYPE_CHECKING:
    from worker.engines.common.runner import RunnerCounts

__all__ = ["SlotRunner"]

KEPT_CAPACITY = 4096
"""Tokens per row that stay allocated when nothing runs; more is given back to the system."""


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
        )
        self._overlap = overlap
        #: Sequences and logits of a decode that was launched but not collected yet.
        self._computed: tuple[list[Sequence], torch.Tensor] | None = None
        #: Whether the last step returned first tokens before its decode, which is still to come.
        self._first_told = False

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
            sequence.state = State.WAITING
        if grown and self._computed is not None:
            sequences, logits = self._computed
            kept = [index for index, sequence in enumerate(sequences) if sequence not in grown]
            stay = [sequences[index] for index in kept]
            self._computed = (stay, logits[torch.tensor(kept).to(logits.device)]) if stay else None
        return grown

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
        if not self._first_told:
            began = self.costs.now_s()
            self.rows.admit(events)
            self._prefill.run(events, (self.costs.now_s() - began) * 1e3)
        self._first_told = False
        if self._overlap:
            # The device computes the next tokens while the host emits the last ones.
            self._launch(events)
        elif self._tokens.fresh:
            # First tokens are returned before the decode that follows, which is left to
            # the next step.
            self._first_told = True
        elif self.rows.active:
            self._launch(events)
            self._collect(events)
        self._tokens.tell(events)
        return events

    # --- decode -----------------------------------------------------------------------------------

    def _launch(self, events: list[EngineEvent]) -> None:
        """Launch the forward for the next token of every active row; an accelerator may still be
        computing when this returns."""
        self.rows.make_room(events)
        sequences = self.rows.decoding
        if not sequences:
            return
        try:
            logits = self.forward.decode(sequences)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.rows.on_out_of_memory(events)
            return
        for sequence in sequences:
            sequence.filled += 1
        self._computed = (sequences, logits)

    def _collect(self, events: list[EngineEvent]) -> None:
        """Sample tokens from the launched forward."""
        if self._computed is None:
            return
        sequences, logits = self._computed
        self._computed = None
        alive = [i for i, s in enumerate(sequences) if s.state is State.DECODE]
        if len(alive) < len(sequences):
            # Ended by the text of the previous token, or cancelled: computed in vain.
            sequences = [sequences[index] for index in alive]
            if not sequences:
                return
            logits = logits[torch.tensor(alive, device=logits.device)]
        try:
            choices = self._tokens.sample(sequences, logits)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            for sequence in sequences:
                # The remaining rows compute it again.
                sequence.filled -= 1
            self.rows.on_out_of_memory(events)
            return
        self._tokens.take(sequences, choices)
        self.costs.measure()
