"""Continuous batching over the slot cache: decides which sequences occupy slots and what
a step computes.

One step spends a token budget on the rows being prefilled, then computes one token for every
decoding row in one forward. Sequences join and leave at any step. Rows 0 to `active` - 1 decode,
the rows after them are being prefilled; there are never gaps.

Memory is the cache's budget: a sequence waits until its prompt fits; if a row cannot grow, the
youngest one is preempted (it waits and is prefilled again later); only a sequence that does not fit
alone fails. Runs on the engine's thread only; must never tokenise or decode images.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from broker.protocol.errors import ErrorInfo
from broker.protocol.messages import FinishReason, TokenLogprob
from worker.engines.base import EngineEvent
from worker.engines.common.failures import error_info, is_out_of_memory
from worker.engines.common.sampling import Sampled, Sampler, prompt_logprobs
from worker.engines.common.sequence import Sequence, State
from worker.engines.transformers.forward import Forward
from worker.engines.transformers.memory import (
    no_room,
    release_cached,
    uncomputable,
)
from worker.engines.transformers.pace import PrefillCostModel, StepBudget
from worker.engines.transformers.prefix import SMALLEST_PREFIX, PrefixCache

if TYPE_CHECKING:
    from worker.engines.common.runner import RunnerCounts

__all__ = ["SlotRunner"]

log = logging.getLogger(__name__)

GROWTH_TOKENS = 128
"""Room after a prompt that is reserved on admission; longer answers grow on demand."""

KEPT_CAPACITY = 4096
"""Tokens per row that stay allocated when nothing runs; more is given back to the system."""

IDLE_CHUNKS = 4
"""Chunks of prompts that a step computes while no stream waits for a token."""

BRANCHED_TOKENS = 256
"""So many tokens of a stem and its branches are computed together. The branches need a mask, which
doubles the attention of a long stem."""

GROUP_TOKENS = 64
GROUP_PADDING = 0.15
"""Prompts computed together have similar lengths: padding is at most what another forward costs, in
tokens, or this fraction."""

IDLE_MS = 1000.0
"""Prompt time per step while no stream waits for a token: cancellations are checked in between."""

IMAGE_FORGET = 0.8
"""How much of the longest time for an image is expected of the next one."""

DECODE_WEIGHT = 0.3
"""Weight of the newest measurement of a decode."""


class SlotRunner:
    """Runs the sequences of one model in a batch of slots."""

    def __init__(
        self,
        forward: Forward,
        *,
        slots: int,
        prefill_chunk: int,
        stall_ms: float,
        banned_ids: frozenset[int],
        token_bytes: Callable[[int], bytes],
        whole_prompts: bool = False,
        overlap: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.forward = forward
        self.cache = forward.cache
        self.slots = slots
        self._chunk = prefill_chunk
        self._stall_ms = stall_ms
        self._banned = banned_ids
        self._token_bytes = token_bytes
        #: Whether a prompt must be prefilled in one piece and never reused, because its tokens
        #: see each other.
        self.whole_prompts = whole_prompts
        self.prefix = PrefixCache(0)
        self._sampler: Sampler | None = None
        self._waiting: deque[Sequence] = deque()
        self._rows: list[Sequence] = []
        self._active = 0
        self._admissions = 0
        #: Rows allowed after a forward ran out of memory; one more with each row that ends.
        self._max_rows = slots
        self._overlap = overlap
        #: Sequences and logits of a decode that was launched but not collected yet.
        self._computed: tuple[list[Sequence], torch.Tensor] | None = None
        #: Sequences with a token whose events were not emitted yet; empty between steps.
        self._fresh: list[Sequence] = []
        #: Whether the last step returned first tokens before its decode, which is still to come.
        self._first_told = False
        self._clock = clock
        self._pace = PrefillCostModel()
        #: Whether a forward is finished when it returns; elsewhere it is finished when its
        #: tokens are read.
        self._synchronous = forward.device.type == "cpu"
        #: Otherwise: since when the device has been working, prompt pieces launched since then
        #: (tokens, start, rows), and milliseconds of a decode.
        self._since = 0.0
        self._launched: list[tuple[int, int, int]] = []
        self._decode_ms = 0.0
        #: Milliseconds that an image may take.
        self._image_ms = 0.0

    # --- the Runner interface ---------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._waiting)

    def counts(self) -> RunnerCounts:
        from worker.engines.common.runner import RunnerCounts

        return RunnerCounts(
            running=len(self._rows),
            waiting=len(self._waiting),
            batch=self._active,
            kv_used_tokens=sum(sequence.filled for sequence in self._rows),
            kv_total_tokens=self.cache.budget,
            prefix_tokens=self.prefix.tokens,
            prefix_hit_tokens=self.prefix.hit_tokens,
        )

    def submit(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    @torch.inference_mode()
    def give_up(self, tokens: int) -> list[Sequence]:
        """Remove and return the sequences whose prompt and answer have reached `tokens`, for
        another scheduler to continue. Call it between steps."""
        grown = [sequence for sequence in self._rows[: self._active] if sequence.total >= tokens]
        for sequence in grown:
            self._leave(self._rows.index(sequence))
            sequence.state = State.WAITING
        if grown and self._computed is not None:
            sequences, logits = self._computed
            kept = [index for index, sequence in enumerate(sequences) if sequence not in grown]
            stay = [sequences[index] for index in kept]
            self._computed = (stay, logits[torch.tensor(kept).to(logits.device)]) if stay else None
        return grown

    def close(self) -> None:
        self._waiting.clear()
        self._rows.clear()
        self._active = 0
        self._computed = None
        self.prefix.clear()

    @torch.inference_mode()
    def step(self) -> list[EngineEvent]:
        """One unit of work: cancellations, admissions, a bounded prefill, one decode."""
        events: list[EngineEvent] = []
        self._drop_cancelled(events)
        if not self._rows and self.cache.capacity > KEPT_CAPACITY and not self.forward.static:
            self.cache.shrink(self.cache.slots, KEPT_CAPACITY)
        if self._computed is None:
            self._since = self._clock()
            self._launched.clear()
        if self._overlap:
            self._collect(events)
        if not self._first_told:
            began = self._clock()
            self._admit(events)
            self._prefill(events, (self._clock() - began) * 1e3)
        self._first_told = False
        if self._overlap:
            # The device computes the next tokens while the host emits the last ones.
            self._launch(events)
        elif self._fresh:
            # First tokens are returned before the decode that follows, which is left to
            # the next step.
            self._first_told = True
        elif self._active:
            self._launch(events)
            self._collect(events)
        self._tell(events)
        return events

    # --- joining and leaving ----------------------------------------------------------------------

    def _drop_cancelled(self, events: list[EngineEvent]) -> None:
        now = time.perf_counter()
        if any(sequence.cancelled for sequence in self._waiting):
            for sequence in self._waiting:
                if sequence.cancelled:
                    events += sequence.end(FinishReason.CANCELLED, now)
            self._waiting = deque(s for s in self._waiting if s.state is State.WAITING)
        for row in reversed(range(len(self._rows))):
            if self._rows[row].cancelled:
                events += self._rows[row].end(FinishReason.CANCELLED, now)
                self._leave(row)

    def _admit(self, events: list[EngineEvent]) -> None:
        while self._waiting and len(self._rows) < self._max_rows:
            sequence = self._waiting[0]
            need = min(sequence.total + GROWTH_TOKENS, self._longest(sequence))
            if not self._reserve(len(self._rows) + 1, need) and not self._reserve(
                len(self._rows) + 1, sequence.total + 1
            ):
                if self._rows or self.prefix.drop_oldest():
                    if self._rows:
                        return
                    continue
                self._waiting.popleft()
                events += sequence.fail(self._too_large(sequence))
                continue
            self._waiting.popleft()
            self._start(sequence, events)

    def _start(self, sequence: Sequence, events: list[EngineEvent]) -> None:
        """Give a sequence the next free row, with the cached prefix of its prompt."""
        now = time.perf_counter()
        sequence.started_at = sequence.started_at or now
        sequence.state = State.PREFILL
        self._admissions += 1
        sequence.admitted = self._admissions
        sequence.filled = 0
        sequence.follows = None
        sequence.prompt_logprobs = []
        sequence.begin()
        self._rows.append(sequence)
        row = len(self._rows) - 1
        try:
            self.forward.prepare(sequence)
            if not (self.whole_prompts or sequence.wants_prompt_logprobs):
                self._reuse(sequence, row)
        except Exception as error:
            self._fail_row(row, error, events)

    def _reuse(self, sequence: Sequence, row: int) -> None:
        """Copy the longest cached prefix of the prompt into the row, or wait for a row that is
        computing more of it (several answers to one prompt arrive together)."""
        if not self.cache.token_bytes:
            return
        limit = sequence.reusable_tokens
        shares = [self.prefix.shared(other, sequence, limit) for other in self._rows[:row]]
        least = max(SMALLEST_PREFIX, sequence.prompt.media_end)
        here = [
            share if share <= other.filled else other.filled if other.filled >= least else 0
            for share, other in zip(shares, self._rows, strict=False)
        ]
        entry, length = self.prefix.longest(sequence, limit)
        running = max(here, default=0)
        if running > length:
            self.cache.move(here.index(running), row, running)
            length = running
            self.prefix.hit_tokens += running
        elif entry is not None:
            self.cache.write(row, entry.states, length)
            self.prefix.used(entry, length)
        sequence.filled = length
        if not sequence.answer:
            sequence.cached = length
        sequence.shared = 0
        for other, share in zip(self._rows, shares, strict=False):
            # No row waits for a waiting row, so that there are no cycles.
            if other.follows is None and share >= max(length, sequence.shared) + SMALLEST_PREFIX:
                sequence.follows, sequence.shared = other, share

    def _release_followers(self) -> None:
        """Let rows go on whose prefix has been computed, or will not be."""
        for row in range(self._active, len(self._rows)):
            sequence = self._rows[row]
            leader = sequence.follows
            if leader is None or (
                leader.state is State.PREFILL and leader.filled < sequence.shared
            ):
                continue
            if leader in self._rows:
                self._take_prefix(row, self._rows.index(leader))
                continue
            sequence.follows = None
            if not sequence.cancelled:
                self._reuse(sequence, row)

    def _leave(self, row: int, *, keep: bool = True) -> None:
        """Remove a row; the last rows close the gap."""
        sequence = self._rows[row]
        self._hand_over(row)
        if keep and not sequence.failed and not self.whole_prompts and self.cache.token_bytes:
            self._keep(sequence, row)
        if sequence.state is State.DONE:
            self._max_rows = min(2 * self._max_rows, self.slots)
        hole = row
        if hole < self._active:
            last = self._active - 1
            if hole != last:
                self._move(last, hole)
            hole = last
            self._active -= 1
        if hole != len(self._rows) - 1:
            self._move(len(self._rows) - 1, hole)
        self._rows.pop()

    def _hand_over(self, row: int) -> None:
        """Rows that wait for what this one has computed get it before it leaves."""
        leader = self._rows[row]
        for other in range(self._active, len(self._rows)):
            follower = self._rows[other]
            if follower.follows is leader and leader.filled >= follower.shared:
                self._take_prefix(other, row)

    def _take_prefix(self, row: int, source: int) -> None:
        """A row gets the prefix that it has waited for from the row that computed it."""
        sequence = self._rows[row]
        sequence.follows = None
        self.cache.move(source, row, sequence.shared)
        self.prefix.hit_tokens += sequence.shared - sequence.filled
        sequence.filled = sequence.shared
        if not sequence.answer:
            sequence.cached = sequence.shared

    def _keep(self, sequence: Sequence, row: int) -> None:
        """Keep a row in the prefix cache, unless there is no memory for a copy."""
        try:
            self.prefix.store(sequence, lambda length: self.cache.read(row, length))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.prefix.drop_oldest()

    def _move(self, source: int, target: int) -> None:
        moved = self._rows[source]
        self.cache.move(source, target, moved.filled)
        self._rows[target] = moved

    def _activate(self, row: int) -> None:
        """Move a row with a finished prompt to those that decode."""
        self._exchange(row, self._active)
        self._rows[self._active].state = State.DECODE
        self._active += 1

    def _exchange(self, row: int, other: int) -> None:
        """Exchange the rows of two sequences."""
        if row == other:
            return
        one, two = self._rows[row], self._rows[other]
        length = max(one.filled, two.filled)
        if length:
            self.cache.swap(row, other, length)
        self._rows[row], self._rows[other] = two, one

    # --- memory -----------------------------------------------------------------------------------

    def _longest(self, sequence: Sequence) -> int:
        return len(sequence.prompt.ids) + sequence.max_tokens

    def _reserve(self, rows: int, length: int) -> bool:
        used = max((sequence.filled for sequence in self._rows), default=0)
        # Memory reserved for prompts that are still being computed stays reserved. One more:
        # prompts computed together store their padding there.
        promised = max((sequence.total + 1 for sequence in self._rows[self._active :]), default=0)
        return self.cache.reserve(rows, max(length, promised), len(self._rows), used)

    def _too_large(self, sequence: Sequence) -> ErrorInfo:
        return no_room(sequence.total, self.cache.budget, self.cache.capacity)

    def _make_room(self, events: list[EngineEvent]) -> None:
        """Make room for one more token of every active row, preempting the youngest
        rows if necessary."""
        while self._active:
            longest = max(sequence.filled for sequence in self._rows[: self._active]) + 1
            if longest <= self.cache.capacity:
                return
            wanted = min(
                longest + GROWTH_TOKENS,
                max(self._longest(sequence) for sequence in self._rows[: self._active]),
            )
            if self._reserve(len(self._rows), max(longest, wanted)):
                return
            if self._reserve(len(self._rows), longest) or self.prefix.drop_oldest():
                continue
            self._preempt_youngest(events)

    def _preempt_youngest(self, events: list[EngineEvent], *, computing: bool = False) -> None:
        """Preempt the youngest row, which goes back to the queue; if it is the only
        one, it fails."""
        release_cached(self.forward.device)
        if len(self._rows) == 1:
            sequence = self._rows[0]
            info = uncomputable(sequence.total) if computing else self._too_large(sequence)
            events += sequence.fail(info)
            self._leave(0, keep=False)
            return
        row = max(range(len(self._rows)), key=lambda index: self._rows[index].admitted)
        sequence = self._rows[row]
        self._leave(row)
        sequence.state = State.WAITING
        self._waiting.appendleft(sequence)

    def _on_out_of_memory(self, events: list[EngineEvent]) -> None:
        """A forward ran out of memory. Run fewer rows until one ends: otherwise the preempted row
        would come back in the next step, and there would be no progress."""
        self._preempt_youngest(events, computing=True)
        self._max_rows = len(self._rows) or self.slots

    # --- prefill ----------------------------------------------------------------------------------

    def _prefill(self, events: list[EngineEvent], spent_ms: float) -> None:
        """Spend what admissions left of the step's budget. The prompt with the fewest tokens left
        goes first, but half of the budget is for the oldest, so that none starves."""
        # While no stream waits for a token, a larger batch of prompts is cheaper.
        idle = not self._active
        budget = IDLE_CHUNKS * self._chunk if idle else self._chunk
        step = StepBudget(self._pace, budget, IDLE_MS)
        while len(self._rows) > self._active:
            if self._active:
                step.tighten(self._stall_ms, spent_ms)
            self._release_followers()
            if self._prefill_together(step, events):
                continue
            pending = [s for s in self._rows[self._active :] if s.follows is None]
            oldest = min(pending, key=lambda sequence: sequence.admitted)
            shortest = min(pending, key=lambda sequence: sequence.total - sequence.filled)
            chosen = shortest if step.tokens > budget / 2 else oldest
            if chosen.total - chosen.filled > step.piece(chosen.filled) // 2:
                chosen = oldest
            images = self.forward.images(chosen)
            if images is not None and not images.ready:
                if not step.fits(self._image_ms):
                    return
                self._compute_image(chosen, step, events)
                continue
            limit = step.piece(chosen.filled)
            if not limit or (idle and step.begun and limit < chosen.total - chosen.filled):
                # Without streams to serve in between, a cut would only cost another forward.
                return
            self._prefill_row(self._rows.index(chosen), limit, step, events)

    def _prefill_together(self, step: StepBudget, events: list[EngineEvent]) -> bool:
        """Prefill short prompts that fit into the budget in one forward. False if
        there are none."""
        if not self.forward.many_prompts or len(self._rows) - self._active < 2:
            return False
        able = [s for s in self._rows[self._active :] if s.follows is None and self._may_share(s)]
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
        for place, sequence in enumerate(chosen, self._active):
            self._exchange(self._rows.index(sequence), place)
        tokens = (chosen[-1].total - chosen[-1].filled) * len(chosen)
        started = self._clock()
        try:
            logits = self.forward.prefill_many(self._active, chosen)
            self._computed_piece(step, tokens, start, len(chosen), started)
            choices = self._choices(chosen, logits)
        except Exception as error:
            if is_out_of_memory(error):
                self._on_out_of_memory(events)
                step.spend(tokens, (self._clock() - started) * 1e3)
                return True
            # One by one, only the prompt that is the cause fails.
            log.warning("prompts are computed one by one: %s", error)
            return False
        for sequence in chosen:
            sequence.filled = sequence.total
            sequence.state = State.DECODE
        self._active += len(chosen)
        self._take(chosen, choices)
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
        if start == 0 and self.whole_prompts:
            return len(sequence.prompt.ids)
        end = min(total, start + limit)
        if sequence.prompt.media and start < sequence.prompt.media_end:
            if sequence.images is None:
                end = max(sequence.prompt.media_end, end)
            return min(end, sequence.stem_tokens)
        if start < sequence.stem_tokens < end and total - start > BRANCHED_TOKENS:
            return sequence.stem_tokens
        return end

    def _prefill_row(
        self, row: int, limit: int, step: StepBudget, events: list[EngineEvent]
    ) -> None:
        sequence = self._rows[row]
        start, end = sequence.filled, self._piece(sequence, limit)
        wants = sequence.wants_prompt_logprobs and start < len(sequence.prompt.ids)
        read = [position for position in sequence.reads if start <= position < end]
        started = self._clock()
        try:
            logits = self.forward.prefill(
                row, sequence, start, end, kept=range(start, end) if wants else read
            )
            self._computed_piece(step, end - start, start, 1, started)
            scores = self._prompt_scores(sequence, start, end, logits) if wants else []
            whole = end == sequence.total
            if read:
                sequence.read(logits)
            choices: list[Sampled | None] = [None]
            if whole and not sequence.reads:
                choices = [*self._sample([sequence], logits[-1:])]
            sequence.filled = end
            if end >= sequence.prompt.media_end:
                sequence.images = None
            sequence.prompt_logprobs += scores
            if whole:
                self._activate(row)
                self._take([sequence], choices)
        except Exception as error:
            if is_out_of_memory(error) and len(self._rows) > 1:
                self._on_out_of_memory(events)
            else:
                self._fail_row(self._rows.index(sequence), error, events)
            step.spend(end - start, (self._clock() - started) * 1e3)

    def _compute_image(
        self, sequence: Sequence, step: StepBudget, events: list[EngineEvent]
    ) -> None:
        """Compute one image of a prompt, whose tokens come later."""
        started = self._clock()
        try:
            self.forward.compute_image(sequence)
        except Exception as error:
            sequence.images = None
            if is_out_of_memory(error) and len(self._rows) > 1:
                self._on_out_of_memory(events)
            else:
                self._fail_row(self._rows.index(sequence), error, events)
        spent_s = self._clock() - started
        # An accelerator has waited for it: none of this is the tokens' time.
        self._since += spent_s
        self._image_ms = max(spent_s * 1e3, IMAGE_FORGET * self._image_ms)
        step.spend(0, spent_s * 1e3)

    def _prompt_scores(
        self, sequence: Sequence, start: int, end: int, logits: torch.Tensor
    ) -> list[TokenLogprob]:
        """Log probabilities of the prompt tokens that this piece predicts."""
        top = sequence.params.prompt_logprobs or 0
        ids = sequence.prompt.ids
        scores = [TokenLogprob(None, self._token_bytes(ids[0]))] if start == 0 else []
        count = min(end, len(ids) - 1) - start
        if count > 0:
            scores += prompt_logprobs(
                logits[:count], ids[start + 1 : start + 1 + count], top, self._token_bytes
            )
        return scores

    # --- decode -----------------------------------------------------------------------------------

    def _launch(self, events: list[EngineEvent]) -> None:
        """Launch the forward for the next token of every active row; an accelerator may still be
        computing when this returns."""
        self._make_room(events)
        sequences = self._rows[: self._active]
        if not sequences:
            return
        try:
            logits = self.forward.decode(sequences)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._on_out_of_memory(events)
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
            choices = self._sample(sequences, logits)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            for sequence in sequences:
                # The remaining rows compute it again.
                sequence.filled -= 1
            self._on_out_of_memory(events)
            return
        self._take(sequences, choices)
        self._measure()

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor) -> list[Sampled]:
        """Sample a token for each sequence, without changing the sequences."""
        if self._sampler is None:
            self._sampler = Sampler(
                logits.shape[-1], banned_ids=sorted(self._banned), token_bytes=self._token_bytes
            )
        return self._sampler.sample(logits, [sequence.row for sequence in sequences])

    def _choices(self, sequences: list[Sequence], logits: torch.Tensor) -> list[Sampled | None]:
        """What each sequence takes of its last logits; those that read them do so here."""
        drawing = [index for index, sequence in enumerate(sequences) if not sequence.reads]
        choices: list[Sampled | None] = [None] * len(sequences)
        if drawing:
            rows = logits if len(drawing) == len(sequences) else logits[torch.tensor(drawing)]
            sampled = self._sample([sequences[index] for index in drawing], rows)
            for index, choice in zip(drawing, sampled, strict=True):
                choices[index] = choice
        for index, sequence in enumerate(sequences):
            if sequence.reads:
                sequence.read(logits[index : index + 1])
        return choices

    def _take(
        self, sequences: list[Sequence], choices: list[Sampled] | list[Sampled | None]
    ) -> None:
        """Append each sequence's token; those that end with it leave their rows."""
        now = time.perf_counter()
        for sequence, choice in zip(sequences, choices, strict=True):
            sequence.append_token(choice, now)
            self._fresh.append(sequence)
            if sequence.state is State.DONE:
                self._leave(self._rows.index(sequence))

    def _tell(self, events: list[EngineEvent]) -> None:
        """Emit the events of all new tokens; sequences whose text ends them leave."""
        now = time.perf_counter()
        for sequence in self._fresh:
            over = sequence.state is State.DONE
            events += sequence.flush_events(now)
            if sequence.state is State.DONE and not over:
                if sequence in self._rows:
                    self._leave(self._rows.index(sequence))
                else:
                    self._waiting.remove(sequence)
        self._fresh.clear()

    def _fail_row(self, row: int, error: Exception, events: list[EngineEvent]) -> None:
        """Fail a single sequence: its image, its memory, or inputs that the model refuses."""
        sequence = self._rows[row]
        if is_out_of_memory(error):
            release_cached(self.forward.device)
            info = uncomputable(sequence.total)
        else:
            info = error_info(error, "the model failed on this prompt")
        events += sequence.fail(info)
        self._leave(row, keep=False)

    # --- the stall bound --------------------------------------------------------------------------

    def _computed_piece(
        self, step: StepBudget, tokens: int, start: int, rows: int, started: float
    ) -> None:
        """A piece of a prompt was computed or launched: account for its share of the step."""
        if not self._synchronous:
            step.spend(tokens, self._pace.predicted_ms(tokens, start, rows))
            self._launched.append((tokens, start, rows))
            return
        spent_ms = (self._clock() - started) * 1e3
        step.spend(tokens, spent_ms)
        self._pace.learn(tokens, start, spent_ms, rows)

    def _measure(self) -> None:
        """The tokens of a decode were read: the device has finished everything before it too."""
        if self._synchronous:
            return
        now = self._clock()
        spent_ms, self._since = (now - self._since) * 1e3, now
        if not self._launched:
            self._decode_ms += DECODE_WEIGHT * (spent_ms - self._decode_ms)
            return
        tokens = sum(piece[0] for piece in self._launched)
        for piece, start, rows in self._launched:
            self._pace.learn(piece, start, (spent_ms - self._decode_ms) * piece / tokens, rows)
        self._launched.clear()
