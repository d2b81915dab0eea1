"""Continuous batching over the slot cache: what a step does, in which order.

One step spends a token budget on the rows being prefilled (`slot_prefill`), then computes one token
for every decoding row in one forward (`slot_decode`). Where the model's layers compute tokens of
different rows without padding, a prompt and all decoding rows share a forward. Sequences join and
leave at any step (`slot_rows`). Runs on the engine's thread only; must never tokenise or decode
images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from worker.engines.base import EngineEvent
from worker.engines.common.sequence import Sequence, State
from worker.engines.transformers.forward import Forward
from worker.engines.transformers.slot_decode import Decode
from worker.engines.transformers.slot_drafts import SlotDrafts
from worker.engines.transformers.slot_prefill import Prefill
from worker.engines.transformers.slot_rows import SlotRows
from worker.engines.transformers.slot_tokens import NewTokens
from worker.engines.transformers.step_costs import StepCosts

if TYPE_CHECKING:
    from worker.engines.common.runner import RunnerCounts

__all__ = ["SlotRunner"]


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
        self._decode = Decode(forward, self.rows, self._tokens, self.costs, drafts)
        self._prefill = Prefill(
            forward,
            self.rows,
            self._tokens,
            self.costs,
            self._decode,
            chunk=prefill_chunk,
            stall_ms=stall_ms,
            idle_ms=idle_ms,
            emits_first=not overlap,
        )
        self._overlap = overlap
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
            **({} if self._decode.drafts is None else self._decode.drafts.counts()),
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
        self._decode.leave_out(grown)
        return grown

    @property
    def draft_token_bytes(self) -> int:
        """Bytes of a draft model's own KV cache for each token of ours; 0 without one."""
        return 0 if self._decode.drafts is None else self._decode.drafts.token_bytes

    def limit_drafts(self, tokens: int) -> None:
        """Limit a draft model's KV cache to so many tokens over all rows."""
        if self._decode.drafts is not None:
            self._decode.drafts.limit(tokens)

    def close(self) -> None:
        self.rows.clear()
        self._decode.forget()

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
            self._decode.collect(events)
        began_s = self.costs.now_s()
        self.rows.admit(events)
        spent_ms = (self.costs.now_s() - began_s) * 1e3
        self._prefill.run(events, spent_ms, goes_on=self._first_emitted)
        self._first_emitted = False
        if self._overlap:
            # The device computes the next tokens while the host emits the last ones.
            if not self._decode.launched:
                self._decode.launch(events)
        elif self._decode.launched:
            # Every stream's next token was computed together with a prompt.
            self._decode.collect(events)
        elif self._tokens.fresh:
            # First tokens are returned at once. The rest of this step (further prompts within the
            # same budget, and the decode) is left to the next call.
            self._first_emitted = True
        elif self.rows.active:
            self._decode.launch(events)
            self._decode.collect(events)
        self._tokens.emit(events)
        return events
