"""Which sequence has which row of the slot cache: admission, moves, reuse of prefixes, memory.

Rows 0 to `active` - 1 decode, the rows after them are being prefilled; there are never gaps.

Memory is the cache's budget: a sequence waits until its prompt fits; if a row cannot grow, the
youngest one is preempted (it waits and is prefilled again later); only a sequence that does not fit
alone fails. Must never run the model or sample.
"""

from __future__ import annotations

import time
from collections import deque

from broker.protocol.errors import ErrorInfo
from broker.protocol.messages import FinishReason
from worker.engines.base import EngineEvent
from worker.engines.common.failures import error_info, is_out_of_memory
from worker.engines.common.sequence import Sequence, State
from worker.engines.transformers.forward import Forward
from worker.engines.transformers.memory import (
    no_room,
    release_cached,
    uncomputable,
)
from worker.engines.transformers.prefix import SMALLEST_PREFIX, PrefixCache

__all__ = ["SlotRows"]

FAN_TOKENS = 512
"""Most room that is reserved for computing the rest of several prompts in one row."""

GROWTH_TOKENS = 128
"""Room after a prompt that is reserved on admission; longer answers grow on demand."""


class SlotRows:
    """The rows of one slot cache, and the sequences that wait for one."""

    def __init__(self, forward: Forward, slots: int, *, whole_prompts: bool) -> None:
        self._forward = forward
        self.cache = forward.cache
        self.slots = slots
        #: Whether a prompt must be prefilled in one piece and never reused, because its tokens
        #: attend to later ones.
        self.whole_prompts = whole_prompts
        self.prefix = PrefixCache(0)
        self.waiting: deque[Sequence] = deque()
        #: The sequence of each row.
        self.sequences: list[Sequence] = []
        self.active = 0
        self._admissions = 0
        #: Rows allowed: fewer after a forward ran out of memory, twice as many with each that ends.
        self._most = slots

    @property
    def decoding(self) -> list[Sequence]:
        return self.sequences[: self.active]

    @property
    def prefilling(self) -> list[Sequence]:
        return self.sequences[self.active :]

    def clear(self) -> None:
        self.waiting.clear()
        self.sequences.clear()
        self.active = 0
        self.prefix.clear()

    # --- joining and leaving ----------------------------------------------------------------------

    def drop_cancelled(self, events: list[EngineEvent]) -> None:
        now = time.perf_counter()
        if any(sequence.cancelled for sequence in self.waiting):
            for sequence in self.waiting:
                if sequence.cancelled:
                    events += sequence.end(FinishReason.CANCELLED, now)
            self.waiting = deque(s for s in self.waiting if s.state is State.WAITING)
        for row in reversed(range(len(self.sequences))):
            if self.sequences[row].cancelled:
                events += self.sequences[row].end(FinishReason.CANCELLED, now)
                self.leave(row)

    def admit(self, events: list[EngineEvent]) -> None:
        while self.waiting and len(self.sequences) < self._most:
            sequence = self.waiting[0]
            need = min(sequence.total + GROWTH_TOKENS, self._longest(sequence))
            if not self._reserve(len(self.sequences) + 1, need) and not self._reserve(
                len(self.sequences) + 1, sequence.total + 1
            ):
                if self.sequences or self.prefix.drop_oldest():
                    if self.sequences:
                        return
                    continue
                self.waiting.popleft()
                events += sequence.fail(self._too_large(sequence))
                continue
            self.waiting.popleft()
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
        self.sequences.append(sequence)
        row = len(self.sequences) - 1
        try:
            self._forward.prepare(sequence)
            if not (self.whole_prompts or sequence.wants_prompt_logprobs):
                self._reuse(sequence, row)
        except Exception as error:
            self.fail(row, error, events)

    def _reuse(self, sequence: Sequence, row: int) -> None:
        """Copy the longest cached prefix of the prompt into the row, and wait if another row is
        computing more of it, as when several answers to one prompt are requested at once."""
        if not self.cache.token_bytes:
            return
        limit = sequence.reusable_tokens
        shares = [self.prefix.shared(other, sequence, limit) for other in self.sequences[:row]]
        least = max(SMALLEST_PREFIX, sequence.prompt.media_end)
        here = [
            share if share <= other.filled else other.filled if other.filled >= least else 0
            for share, other in zip(shares, self.sequences, strict=False)
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
        for other, share in zip(self.sequences, shares, strict=False):
            # A row never waits for one that waits itself, so there are no cycles.
            if other.follows is None and share >= max(length, sequence.shared) + SMALLEST_PREFIX:
                sequence.follows, sequence.shared = other, share
        self._reserve_fan(max(length, sequence.shared))

    def _reserve_fan(self, start: int) -> None:
        """Reserve room, if there is any, for the tokens after `start` of all prompts that take
        their first `start` tokens from elsewhere: these can be computed in one row
        (`prefill_fanned`). Done while the rows are empty: growing later would copy them."""
        if start and self._forward.branches:
            shares = [max(sequence.filled, sequence.shared) for sequence in self.prefilling]
            rests = [
                sequence.total - start
                for sequence, share in zip(self.prefilling, shares, strict=True)
                if share == start
            ]
            self._reserve(len(self.sequences), start + min(sum(rests), FAN_TOKENS))

    def release_followers(self) -> bool:
        """Resume rows that wait for a prefix once it is computed, or never will be. Returns whether
        there were any."""
        ready: list[tuple[int, int]] = []
        found = False
        for row in range(self.active, len(self.sequences)):
            sequence = self.sequences[row]
            leader = sequence.follows
            if leader is None or (
                leader.state is State.PREFILL and leader.filled < sequence.shared
            ):
                continue
            found = True
            if leader in self.sequences:
                ready.append((row, self.sequences.index(leader)))
                continue
            sequence.follows = None
            if not sequence.cancelled:
                self._reuse(sequence, row)
        self._take_prefixes(ready)
        return found

    def leave(self, row: int, *, keep: bool = True) -> None:
        """Remove a row, into whose place the last rows move. `keep`: store it in the prefix cache,
        unless it failed."""
        sequence = self.sequences[row]
        self._hand_over(row)
        if keep and not sequence.failed and not self.whole_prompts and self.cache.token_bytes:
            self._keep(sequence, row)
        if sequence.state is State.DONE:
            self._most = min(2 * self._most, self.slots)
        hole = row
        if hole < self.active:
            last = self.active - 1
            if hole != last:
                self._move(last, hole)
            hole = last
            self.active -= 1
        if hole != len(self.sequences) - 1:
            self._move(len(self.sequences) - 1, hole)
        self.sequences.pop()

    def _hand_over(self, row: int) -> None:
        """Before a row leaves, copy what it has computed to the rows that wait for it."""
        leader = self.sequences[row]
        self._take_prefixes(
            [
                (other, row)
                for other, follower in enumerate(self.sequences)
                if follower.follows is leader and leader.filled >= follower.shared
            ]
        )

    def _take_prefixes(self, ready: list[tuple[int, int]]) -> None:
        """Copy prefixes to rows that have waited for them. `ready`: pairs of such a row and the row
        that computed its prefix, in order of the former."""
        runs: list[list[int]] = []
        for row, source in ready:
            sequence = self.sequences[row]
            sequence.follows = None
            self.prefix.hit_tokens += sequence.shared - sequence.filled
            sequence.filled = sequence.shared
            if not sequence.answer:
                sequence.cached = sequence.shared
            if runs and runs[-1][1:] == [row, source, sequence.shared]:
                runs[-1][1] = row + 1
            else:
                runs.append([row, row + 1, source, sequence.shared])
        for first, last, source, shared in runs:
            self.cache.share(source, first, last, shared)

    def _keep(self, sequence: Sequence, row: int) -> None:
        """Keep a row in the prefix cache, unless there is no memory for a copy."""
        try:
            self.prefix.store(sequence, lambda length: self.cache.read(row, length))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.prefix.drop_oldest()

    def _move(self, source: int, target: int) -> None:
        moved = self.sequences[source]
        self.cache.move(source, target, moved.stored)
        self.sequences[target] = moved

    def activate(self, row: int) -> None:
        """Move a row whose prompt is computed to the rows that decode."""
        self.exchange(row, self.active)
        self.sequences[self.active].state = State.DECODE
        self.active += 1

    def exchange(self, row: int, other: int) -> None:
        """Exchange the rows of two sequences."""
        if row == other:
            return
        one, two = self.sequences[row], self.sequences[other]
        if one.stored and two.stored:
            self.cache.swap(row, other, max(one.stored, two.stored))
        elif one.stored:
            self.cache.move(row, other, one.stored)
        elif two.stored:
            self.cache.move(other, row, two.stored)
        self.sequences[row], self.sequences[other] = two, one

    # --- memory -----------------------------------------------------------------------------------

    def _longest(self, sequence: Sequence) -> int:
        return len(sequence.prompt.ids) + sequence.max_tokens

    def _reserve(self, rows: int, length: int) -> bool:
        used = max((sequence.stored for sequence in self.sequences), default=0)
        # Memory reserved for prompts that are still being computed stays reserved. One more:
        # prompts computed together store their padding there.
        promised = max((sequence.total + 1 for sequence in self.prefilling), default=0)
        return self.cache.reserve(rows, max(length, promised), len(self.sequences), used)

    def _too_large(self, sequence: Sequence) -> ErrorInfo:
        return no_room(sequence.total, self.cache.budget, self.cache.capacity)

    def make_room(self, events: list[EngineEvent]) -> None:
        """Make room for one more token of every active row, preempting the youngest rows if
        necessary."""
        while self.active:
            longest = max(sequence.filled for sequence in self.decoding) + 1
            if longest <= self.cache.capacity:
                return
            wanted = min(
                longest + GROWTH_TOKENS,
                max(self._longest(sequence) for sequence in self.decoding),
            )
            if self._reserve(len(self.sequences), max(longest, wanted)):
                return
            if self._reserve(len(self.sequences), longest) or self.prefix.drop_oldest():
                continue
            self.preempt_youngest(events)

    def preempt_youngest(self, events: list[EngineEvent], *, computing: bool = False) -> None:
        """Preempt the youngest row, which goes back to the queue; if it is the only one, it fails.
        `computing`: memory ran out during a forward."""
        release_cached(self._forward.device)
        if len(self.sequences) == 1:
            sequence = self.sequences[0]
            info = uncomputable(sequence.total) if computing else self._too_large(sequence)
            events += sequence.fail(info)
            self.leave(0, keep=False)
            return
        row = max(range(len(self.sequences)), key=lambda index: self.sequences[index].admitted)
        sequence = self.sequences[row]
        self.leave(row)
        sequence.state = State.WAITING
        self.waiting.appendleft(sequence)

    def on_out_of_memory(self, events: list[EngineEvent]) -> None:
        """A forward ran out of memory. Run fewer rows until one ends: otherwise the preempted row
        would come back in the next step, and there would be no progress."""
        self.preempt_youngest(events, computing=True)
        self._most = len(self.sequences) or self.slots

    def fail(self, row: int, error: Exception, events: list[EngineEvent]) -> None:
        """Fail a single sequence, whose image, memory or inputs are at fault."""
        sequence = self.sequences[row]
        if is_out_of_memory(error):
            release_cached(self._forward.device)
            info = uncomputable(sequence.total)
        else:
            info = error_info(error, "the model failed on this prompt")
        events += sequence.fail(info)
        self.leave(row, keep=False)
