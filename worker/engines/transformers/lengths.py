"""Batches short sequences, and runs those that grow past a length one by one.

For models whose rotary frequencies depend on the sequence length (`rope`): up to some length they
do not change, so rows share a batch; beyond it each sequence has its own forward. Must never touch
a model.
"""

from __future__ import annotations

from dataclasses import fields

from worker.engines.base import EngineEvent
from worker.engines.common.runner import RunnerCounts
from worker.engines.common.sequence import Sequence
from worker.engines.transformers.fallback import GenerateRunner
from worker.engines.transformers.slots import SlotRunner

__all__ = ["LengthRunner"]


class LengthRunner:
    """Runs a sequence in `batch` while prompt and answer have fewer than `limit` tokens, then in
    `single`."""

    def __init__(self, batch: SlotRunner, single: GenerateRunner, limit: int) -> None:
        self.slots = batch.slots
        self._batch = batch
        self._single = single
        self._limit = limit

    @property
    def busy(self) -> bool:
        return self._batch.busy or self._single.busy

    def submit(self, sequence: Sequence) -> None:
        runner = self._batch if sequence.total < self._limit else self._single
        runner.submit(sequence)

    def step(self) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        if self._batch.busy:
            events += self._batch.step()
            for sequence in self._batch.give_up(self._limit):
                self._single.submit(sequence)
        if self._single.busy:
            events += self._single.step()
        return events

    def counts(self) -> RunnerCounts:
        both = self._batch.counts(), self._single.counts()
        return RunnerCounts(
            **{
                f.name: sum(getattr(counts, f.name) for counts in both)
                for f in fields(RunnerCounts)
            }
        )

    def close(self) -> None:
        self._batch.close()
        self._single.close()
