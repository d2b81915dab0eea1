"""Prefill: which prompts a step computes, how much of each, and which of them in one forward.

A step spends a budget of tokens and of time on the rows that are being prefilled. Where forwards
are packed, the rows that decode go along with the first prompts, and the step ends there: streams
then wait for one forward only. Must never tokenise or decode images.
"""

from __future__ import annotations

import logging
import statistics

import numpy as np
import torch

from broker.protocol.messages import TokenLogprob
from worker.engines.base import EngineEvent
from worker.engines.common.failures import is_out_of_memory
from worker.engines.common.sampling import Sampled, prompt_logprobs
from worker.engines.common.sequence import Sequence, State
from worker.engines.transformers.forward import Forward
from worker.engines.transformers.pace import NO_LOAD, Load, StepBudget
from worker.engines.transformers.packing import Along
from worker.engines.transformers.prefix import sequence_key
from worker.engines.transformers.slot_decode import Decode
from worker.engines.transformers.slot_rows import SlotRows
from worker.engines.transformers.slot_tokens import NewTokens
from worker.engines.transformers.step_costs import Started, StepCosts

__all__ = ["Prefill"]

log = logging.getLogger(__name__)

FANNED_TOKENS = 64
"""Prompts that begin with at least this many equal tokens are computed in one row."""

AGAIN_TOKENS = 16
"""Up to this many tokens of each may be computed a second time for that."""

IDLE_CHUNKS = 4
"""Chunks of prompts that a step computes while no stream waits for a token."""

BRANCHED_TOKENS = 256
"""Up to this many tokens, a stem and its branches are computed in one forward. Branches need a
mask, which doubles the cost of attention over a long stem."""

GROUP_TOKENS = 64
GROUP_PADDING = 0.15
"""Prompts computed together have similar lengths: their padding is at most this many tokens, which
cost about as much as another forward, or this fraction of all tokens."""

PACKED_TOKENS = 128
"""Without padding, prompts that are to be answered are computed together up to this many tokens:
reading the weights then takes a tenth of the forward's time, and the first prompts need not wait
for all others."""


class Prefill:
    """Computes the prompts of one scheduler's rows."""

    def __init__(
        self,
        forward: Forward,
        rows: SlotRows,
        tokens: NewTokens,
        costs: StepCosts,
        decode: Decode,
        *,
        chunk: int,
        stall_ms: float,
        idle_ms: float,
        emits_first: bool,
    ) -> None:
        self._forward = forward
        self._rows = rows
        self._tokens = tokens
        self._costs = costs
        self._decode = decode
        self._chunk = chunk
        self._stall_ms = stall_ms
        self._idle_ms = idle_ms
        #: Whether first tokens are emitted before the next prompts are computed.
        self._emits_first = emits_first
        #: The budget of the step, its size in tokens, and whether no stream ran when it began.
        self._step = StepBudget(costs.pace, 0, 0.0)
        self._most = 0
        self._idle = True
        #: Whether decoding rows go along with prompts.
        self._mixes = forward.packs
        #: The oldest prompt, and how many tokens of others were computed since its last turn.
        self._oldest: Sequence | None = None
        self._others = 0

    def run(self, events: list[EngineEvent], spent_ms: float, *, goes_on: bool) -> None:
        """Compute prompts within the step's budget, of which admissions took `spent_ms`; with
        `goes_on`, within what the last call left of its budget.

        The prompt with the fewest tokens left goes first, but after half of the budget it is the
        oldest's turn, so that none starves.
        """
        if not goes_on or (self._idle and self._rows.active):
            # While no stream waits for a token, a larger batch of prompts is cheaper.
            self._idle = not self._rows.active
            self._most = IDLE_CHUNKS * self._chunk if self._idle else self._chunk
            self._step = StepBudget(self._costs.pace, self._most, self._idle_ms)
        else:
            self._step.spend(0, spent_ms)
        step = self._step
        while len(self._rows.sequences) > self._rows.active:
            if self._decode.launched or (self._emits_first and self._tokens.fresh):
                return
            if self._rows.active:
                step.tighten(self._stall_ms, spent_ms)
            if self._rows.active and self._mixes:
                self._rows.make_room(events)
                decoding = self._rows.decoding
                step.along = _load(decoding, tokens=len(decoding))
                if len(self._rows.sequences) == self._rows.active:
                    return
            began_s = self._costs.now_s()
            if self._rows.release_followers():
                step.spend(0, (self._costs.now_s() - began_s) * 1e3)
            pending = [s for s in self._rows.prefilling if s.follows is None]
            oldest = self._oldest = min(pending, key=lambda sequence: sequence.admitted)
            its_turn = self._others >= self._most / 2
            if self._together(step, events, oldest if its_turn else None):
                continue
            shortest = min(pending, key=lambda sequence: sequence.total - sequence.filled)
            chosen = oldest if its_turn else shortest
            if chosen.total - chosen.filled > step.piece(chosen.filled) // 2:
                chosen = oldest
            images = self._forward.images(chosen)
            if images is not None and not images.ready:
                if not step.fits(self._costs.image_ms):
                    return
                self._compute_image(chosen, step, events)
                continue
            limit = step.piece(chosen.filled)
            if not limit or (self._idle and step.begun and limit < chosen.total - chosen.filled):
                # No stream has to be served in between, so a cut would only cost another forward.
                return
            self._one(self._rows.sequences.index(chosen), limit, step, events)

    def _together(
        self, step: StepBudget, events: list[EngineEvent], oldest: Sequence | None
    ) -> bool:
        """Prefill several prompts that fit into the budget in one forward; `oldest` must be one of
        them, unless it is None. Returns False if there are not at least two, or they have to be
        computed one by one."""
        if not self._forward.many_prompts or len(self._rows.sequences) - self._rows.active < 2:
            return False
        able = [s for s in self._rows.prefilling if s.follows is None and self._may_share(s)]
        start, chosen = self._alike(able, step)
        fanned = len(chosen) > 1
        if not fanned:
            start, chosen = self._of_similar_length(able, step)
        if len(chosen) < 2 or (oldest is not None and oldest not in chosen):
            return False
        active = self._rows.active
        for place, sequence in enumerate(chosen, active):
            self._rows.exchange(self._rows.sequences.index(sequence), place)
        if fanned:
            tokens, rows = sum(sequence.total - start for sequence in chosen), 1
        else:
            rows = len(chosen)
            lengths = [sequence.total - sequence.filled for sequence in chosen]
            tokens = sum(lengths) if self._forward.packs else max(lengths) * rows
        along = self._along()
        started = self._costs.start()
        try:
            if fanned:
                logits = self._forward.prefill_fanned(active, chosen, start)
            else:
                logits = self._forward.prefill_many(active, chosen, along)
            self._computed(chosen, step, tokens, start, rows, started, along)
            choices = self._tokens.choices(chosen, logits)
        except Exception as error:
            if is_out_of_memory(error):
                self._rows.on_out_of_memory(events)
                step.spend(tokens, self._costs.spent_ms(started))
                return True
            if self._went_wrong(along, error):
                return True
            # Computed one by one, only the prompt at fault fails.
            log.warning("prompts are computed one by one, since together they failed: %s", error)
            return False
        for sequence in chosen:
            sequence.filled = sequence.total
            sequence.state = State.DECODE
        self._rows.active += len(chosen)
        self._tokens.take(chosen, choices)
        return True

    def _alike(self, able: list[Sequence], step: StepBudget) -> tuple[int, list[Sequence]]:
        """The length of a common beginning that is already computed, and the prompts that share it
        and whose remaining tokens fit into the budget, and into one row after that beginning. If
        some prompts have a few more tokens computed than others, those are computed again."""
        if len(able) < 2 or not self._forward.branches or self._forward.packs:
            return 0, []
        usual = statistics.mode(sequence.filled for sequence in able)
        near = [s for s in able if abs(s.filled - usual) <= AGAIN_TOKENS and not s.branches]
        start = min((sequence.filled for sequence in near), default=0)
        if start < FANNED_TOKENS or any(start < s.prompt.media_end for s in near):
            return 0, []
        room = min(step.piece(start), self._rows.cache.capacity - start)
        first = next(sequence for sequence in near if sequence.filled == usual)
        beginning = sequence_key(first)[:start]
        chosen: list[Sequence] = []
        for sequence in near:
            rest = sequence.total - start
            if (
                rest <= room
                and sequence.adapter == first.adapter
                and np.array_equal(sequence_key(sequence)[:start], beginning)
            ):
                chosen.append(sequence)
                room -= rest
        return start, chosen

    def _of_similar_length(
        self, able: list[Sequence], step: StepBudget
    ) -> tuple[int, list[Sequence]]:
        """The prompts with the fewest tokens left, as many as fit into the budget with little
        padding, after the most tokens that any of them has computed (for the estimate of costs).
        The limit on padding holds even where nothing is padded: there it keeps short prompts from
        waiting for a much longer one."""
        chosen: list[Sequence] = []
        start = real = 0
        for sequence in sorted(able, key=lambda s: (s.total - s.filled, s.admitted)):
            left = sequence.total - sequence.filled
            if self._forward.packs and real >= PACKED_TOKENS and not sequence.reads:
                break
            padded = left * (len(chosen) + 1)
            real += left
            behind = max(start, sequence.filled)
            computed = real if self._forward.packs else padded
            if computed > step.piece(behind, left) or padded - real > max(
                GROUP_TOKENS, GROUP_PADDING * padded
            ):
                break
            start = behind
            chosen.append(sequence)
        return start, chosen

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
        along = self._along() if self._forward.takes_along(sequence, start, end) else None
        started = self._costs.start()
        try:
            logits = self._forward.prefill(
                row, sequence, start, end, kept=range(start, end) if wants else read, along=along
            )
            self._computed([sequence], step, end - start, start, 1, started, along)
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
            elif not self._went_wrong(along, error):
                self._rows.fail(self._rows.sequences.index(sequence), error, events)
            step.spend(end - start, self._costs.spent_ms(started))

    def _along(self) -> Along | None:
        """The decode that goes along with prompts, if there is one and it is not computed yet."""
        if self._mixes and self._rows.active and not self._decode.launched:
            return self._decode.along()
        return None

    def _went_wrong(self, along: Along | None, error: Exception) -> bool:
        """Whether a forward of prompts and decoding rows failed: from now on they are computed
        apart, so that only what is at fault fails."""
        if along is None or along.logits is not None:
            return False
        log.warning("prompts and running requests are computed apart, since together: %s", error)
        self._mixes = False
        return True

    def _computed(
        self,
        sequences: list[Sequence],
        step: StepBudget,
        tokens: int,
        start: int,
        rows: int,
        started: Started,
        along: Along | None,
    ) -> None:
        """A forward of these prompts was computed or launched (other arguments as in
        `StepCosts.computed_piece`)."""
        self._others = 0 if self._oldest in sequences else self._others + tokens
        load = NO_LOAD
        if along is not None:
            load = _load(along.sequences, along.tokens)
            self._decode.went_along(along)
        self._costs.computed_piece(step, tokens, start, rows, started, load)

    def _compute_image(
        self, sequence: Sequence, step: StepBudget, events: list[EngineEvent]
    ) -> None:
        """Compute one image of a prompt; its tokens are prefilled later."""
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


def _load(decoding: list[Sequence], tokens: int) -> Load:
    """What these rows and so many tokens of them add to a forward."""
    return Load(tokens, sum(sequence.filled for sequence in decoding))
