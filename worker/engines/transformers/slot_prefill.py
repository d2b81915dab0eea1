"""The prompts of a step: which of them are computed, how much of each, together or one by one.

A step spends a budget of tokens and of time on the rows that are being prefilled. Must never
tokenise or decode images.
"""

from __future__ import annotations

import logging

import torch

from broker.protocol.messages import TokenLogprob
from worker.engines.base import EngineEvent
from worker.engines.common.failures import is_out_of_memory
from worker.engines.common.sampling import Sampled, prompt_logprobs
from worker.engines.common.sequence import Sequence, State
from worker.engines.transformers.forward import Forward
from worker.engines.transformers.pace import StepBudget
from worker.engines.transformers.slot_rows import SlotRows
from worker.engines.transformers.slot_tokens import NewTokens
from worker.engines.transformers.step_costs import StepCosts

__all__ = ["Prefill"]

log = logging.getLogger(__name__)

IDLE_CHUNKS = 4
"""Chunks of prompts that a step computes while no stream waits for a token."""

BRANCHED_TOKENS = 256
"""So many tokens of a stem and its branches are computed together. The branches need a mask, which
doubles the attention of a long stem."""

GROUP_TOKENS = 64
GROUP_PADDING = 0.15
"""Prompts computed together have similar lengths: padding is at most what another forward costs, in
tokens, or this fraction."""


class Prefill:
    """Computes the prompts of one scheduler's rows."""

    def __init__(
        self,
        forward: Forward,
        rows: SlotRows,
        tokens: NewTokens,
        costs: StepCosts,
        *,
        chunk: int,
        stall_ms: float,
        idle_ms: float,
    ) -> None:
        self._forward = forward
        self._rows = rows
        self._tokens = tokens
        self._costs = costs
        self._chunk = chunk
        self._stall_ms = stall_ms
        self._idle_ms = idle_ms

    def run(self, events: list[EngineEvent], spent_ms: float) -> None:
        """Spend what admissions left of the step's budget. The prompt with the fewest tokens left
        goes first, but half of the budget is for the oldest, so that none starves."""
        # While no stream waits for a token, a larger batch of prompts is cheaper.
        idle = not self._rows.active
        budget = IDLE_CHUNKS * self._chunk if idle else self._chunk
        step = StepBudget(self._costs.pace, budget, self._idle_ms)
        while len(self._rows.sequences) > self._rows.active:
            if self._rows.active:
                step.tighten(self._stall_ms, spent_ms)
            self._rows.release_followers()
            if self._together(step, events):
                continue
            pending = [s for s in self._rows.prefilling if s.follows is None]
            oldest = min(pending, key=lambda sequence: sequence.admitted)
            shortest = min(pending, key=lambda sequence: sequence.total - sequence.filled)
            chosen = shortest if step.tokens > budget / 2 else oldest
            if chosen.total - chosen.filled > step.piece(chosen.filled) // 2:
                chosen = oldest
            images = self._forward.images(chosen)
            if images is not None and not images.ready:
                if not step.fits(self._costs.image_ms):
                    return
                self._compute_image(chosen, step, events)
                continue
            limit = step.piece(chosen.filled)
            if not limit or (idle and step.begun and limit < chosen.total - chosen.filled):
                # Without streams to serve in between, a cut would only cost another forward.
                return
            self._one(self._rows.sequences.index(chosen), limit, step, events)

    def _together(self, step: StepBudget, events: list[EngineEvent]) -> bool:
        """Prefill short prompts that fit into the budget in one forward. False if
        there are none."""
        if not self._forward.many_prompts or len(self._rows.sequences) - self._rows.active < 2:
            return False
        able = [s for s in self._rows.prefilling if s.follows is None and self._may_share(s)]
        if len(able) < 2:
            return False
        able.sort(key=lambda sequence: sequence.total - sequence.filled)
        start = max(sequence.filled for sequence in able)
        budget = step.piece(start)
        chosen: list[Sequence] = []
        real = 0
        for sequence in able:
            left = sequence.total - sequence.filled
            padded = left * (len(chosen) + 1)
            real += left
            if padded > budget or padded - real > max(GROUP_TOKENS, GROUP_PADDING * padded):
                break
            chosen.append(sequence)
        if len(chosen) < 2:
            return False
        for place, sequence in enumerate(chosen, self._rows.active):
            self._rows.exchange(self._rows.sequences.index(sequence), place)
        tokens = (chosen[-1].total - chosen[-1].filled) * len(chosen)
        started = self._costs.start()
        try:
            logits = self._forward.prefill_many(self._rows.active, chosen)
            self._costs.computed_piece(step, tokens, start, len(chosen), started)
            choices = self._tokens.choices(chosen, logits)
        except Exception as error:
            if is_out_of_memory(error):
                self._rows.on_out_of_memory(events)
                step.spend(tokens, self._costs.spent_ms(started))
                return True
            # One by one, only the prompt that is the cause fails.
            log.warning("prompts are computed one by one: %s", error)
            return False
        for sequence in chosen:
            sequence.filled = sequence.total
            sequence.state = State.DECODE
        self._rows.active += len(chosen)
        self._tokens.take(chosen, choices)
        return True

    def _may_share(self, sequence: Sequence) -> bool:
        """Whether the rest of a prompt is plain tokens of which only the last logits are needed."""
        return (
            sequence.filled >= sequence.prompt.media_end
            and sequence.reads_last
            and not sequence.wants_prompt_logprobs
        )

    def _piece(self, sequence: Sequence, limit: int) -> int:
        """Where the next piece of a prompt ends."""
        start, total = sequence.filled, sequence.total
        if start == 0 and self._rows.whole_prompts:
            return len(sequence.prompt.ids)
        end = min(total, start + limit)
        if sequence.prompt.media and start < sequence.prompt.media_end:
            if sequence.images is None:
                end = max(sequence.prompt.media_end, end)
            return min(end, sequence.stem_tokens)
        if start < sequence.stem_tokens < end and total - start > BRANCHED_TOKENS:
            return sequence.stem_tokens
        return end

    def _one(self, row: int, limit: int, step: StepBudget, events: list[EngineEvent]) -> None:
        sequence = self._rows.sequences[row]
        start, end = sequence.filled, self._piece(sequence, limit)
        wants = sequence.wants_prompt_logprobs and start < len(sequence.prompt.ids)
        read = [position for position in sequence.reads if start <= position < end]
        started = self._costs.start()
        try:
            logits = self._forward.prefill(
                row, sequence, start, end, kept=range(start, end) if wants else read
            )
            self._costs.computed_piece(step, end - start, start, 1, started)
            scores = self._prompt_scores(sequence, start, end, logits) if wants else []
            whole = end == sequence.total
            if read:
                sequence.read(logits)
            choices: list[Sampled | None] = [None]
            if whole and not sequence.reads:
                choices = [*self._tokens.sample([sequence], logits[-1:])]
            sequence.filled = end
            if end >= sequence.prompt.media_end:
                sequence.images = None
            sequence.prompt_logprobs += scores
            if whole:
                self._rows.activate(row)
                self._tokens.take([sequence], choices)
        except Exception as error:
            if is_out_of_memory(error) and len(self._rows.sequences) > 1:
                self._rows.on_out_of_memory(events)
            else:
                self._rows.fail(self._rows.sequences.index(sequence), error, events)
            step.spend(end - start, self._costs.spent_ms(started))

    def _compute_image(
        self, sequence: Sequence, step: StepBudget, events: list[EngineEvent]
    ) -> None:
        """Compute one image of a prompt, whose tokens come later."""
        started = self._costs.start()
        try:
            self._forward.compute_image(sequence)
        except Exception as error:
            sequence.images = None
            if is_out_of_memory(error) and len(self._rows.sequences) > 1:
                self._rows.on_out_of_memory(events)
            else:
                self._rows.fail(self._rows.sequences.index(sequence), error, events)
        self._costs.computed_image(step, started)

    def _prompt_scores(
        self, sequence: Sequence, start: int, end: int, logits: torch.Tensor
    ) -> list[TokenLogprob]:
        """Log probabilities of the prompt tokens that this piece predicts."""
        top = sequence.params.prompt_logprobs or 0
        ids = sequence.prompt.ids
        scores = [TokenLogprob(None, self._tokens.token_bytes(ids[0]))] if start == 0 else []
        count = min(end, len(ids) - 1) - start
        if count > 0:
            scores += prompt_logprobs(
                logits[:count], ids[start + 1 : start + 1 + count], top, self._tokens.token_bytes
            )
        return scores
