"""The interface to a library that does its own batching: insert, remove, next.

`LibraryRunner` drives a `Generator` as the transformers engine drives its own schedulers: it admits
sequences while there are slots, emits their tokens, and removes those that have ended. Knows no
library; must never touch a tensor.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from broker.protocol.errors import ErrorInfo, RequestError
from broker.protocol.messages import FinishReason
from worker.engines.base import EngineEvent
from worker.engines.common.runner import RunnerCounts
from worker.engines.common.sampling import Sampled
from worker.engines.common.sequence import Sequence, State

__all__ = ["Drawn", "Generator", "LibraryRunner"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """The next token of a sequence, or the error if there is none."""

    sequence: Sequence
    outcome: Sampled | ErrorInfo


class Generator(Protocol):
    """One loaded model of a library, with sequences in its batch. Called by one thread.

    A sequence is in the batch from `insert` until `remove`, which is called exactly once for each
    inserted sequence, even after a failure.
    """

    #: Sequences that may be in the batch at once.
    slots: int

    def insert(self, sequence: Sequence) -> None:
        """Take a sequence into the batch: its prompt, then `sequence.answer` (if the answer is
        resumed), precede the first new token. Raises RequestError if it cannot be taken; `remove`
        is then not called."""

    def remove(self, sequence: Sequence) -> None:
        """Stop computing a sequence and free its resources."""

    def next(self) -> Iterable[Drawn]:
        """Run one step of the batch; may yield nothing (while a prompt is prefilled) or several
        tokens of one sequence, in order. May set `prompt_logprobs` and `cached` of a sequence
        before its first token. Raises only if the library is broken."""

    def kv_total_tokens(self) -> int:
        """Tokens for which the batch has room; 0 if no limit is known."""

    def close(self) -> None:
        """Release the model."""


class LibraryRunner:
    """Runs the sequences of one model on its generator (see `runner.Runner`)."""

    def __init__(self, generator: Generator) -> None:
        self.slots = generator.slots
        self._generator = generator
        self._waiting: deque[Sequence] = deque()
        #: By identity of the sequence, in order of admission.
        self._running: dict[int, Sequence] = {}
        self._batch = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def submit(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def counts(self) -> RunnerCounts:
        return RunnerCounts(
            running=len(self._running),
            waiting=len(self._waiting),
            batch=self._batch,
            kv_used_tokens=sum(sequence.total for sequence in self._running.values()),
            kv_total_tokens=self._generator.kv_total_tokens(),
        )

    def close(self) -> None:
        self._waiting.clear()
        self._running.clear()
        self._generator.close()

    def step(self) -> list[EngineEvent]:
        """Cancel, admit, run one step of the library, emit events."""
        events: list[EngineEvent] = []
        self._cancel(events)
        self._admit(events)
        if not self._running:
            return events
        told: set[int] = set()
        for drawn in self._generator.next():
            sequence = drawn.sequence
            if id(sequence) not in self._running:
                # A library that computes ahead may still return tokens of an ended sequence.
                continue
            told.add(id(sequence))
            now = time.perf_counter()
            if isinstance(drawn.outcome, ErrorInfo):
                events += sequence.fail(drawn.outcome)
            else:
                sequence.state = State.DECODE
                sequence.append_token(drawn.outcome, now)
                events += sequence.flush_events(now)
            if sequence.state is State.DONE:
                self._leave(sequence)
        self._batch = len(told)
        return events

    def _cancel(self, events: list[EngineEvent]) -> None:
        now = time.perf_counter()
        for sequence in [s for s in self._waiting if s.cancelled]:
            self._waiting.remove(sequence)
            events += sequence.end(FinishReason.CANCELLED, now)
        for sequence in [s for s in self._running.values() if s.cancelled]:
            events += sequence.end(FinishReason.CANCELLED, now)
            self._leave(sequence)

    def _admit(self, events: list[EngineEvent]) -> None:
        while self._waiting and len(self._running) < self.slots:
            sequence = self._waiting.popleft()
            sequence.started_at = time.perf_counter()
            sequence.state = State.PREFILL
            try:
                self._generator.insert(sequence)
            except RequestError as error:
                events += sequence.fail(error.info)
            else:
                self._running[id(sequence)] = sequence

    def _leave(self, sequence: Sequence) -> None:
        del self._running[id(sequence)]
        self._generator.remove(sequence)
