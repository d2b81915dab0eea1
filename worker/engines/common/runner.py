"""What the engine asks of a scheduler; two exist, `slots` (a batch) and `fallback` (one by
one), and `lengths` joins them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from worker.engines.base import EngineEvent
from worker.engines.common.sequence import Sequence

__all__ = ["Runner", "RunnerCounts"]


@dataclass(frozen=True, slots=True)
class RunnerCounts:
    """Figures of one scheduler, for the heartbeat."""

    #: Sequences that hold a row (prefill and decode), and those that wait for one.
    running: int = 0
    waiting: int = 0
    #: Rows of the last decode.
    batch: int = 0
    kv_used_tokens: int = 0
    #: 0 where there is no bound.
    kv_total_tokens: int = 0
    prefix_tokens: int = 0
    prefix_hit_tokens: int = 0


class Runner(Protocol):
    """Runs sequences of one model; every method is called on the engine's thread."""

    #: Sequences that run at once.
    slots: int

    @property
    def busy(self) -> bool: ...

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence; it starts when a row and memory allow."""

    def step(self) -> list[EngineEvent]:
        """One unit of work. Sequences with `cancelled` set end in it."""

    def counts(self) -> RunnerCounts: ...

    def close(self) -> None: ...
