"""The interface of a scheduler. The transformers engine has two, `slots` (a batch) and `fallback`
(one by one), and `lengths` combines them; `generator` has one for other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from worker.engines.base import EngineEvent
from worker.engines.common.sequence import Sequence

__all__ = ["Runner", "RunnerCounts"]


@dataclass(frozen=True, slots=True)
class RunnerCounts:
    """Statistics of one scheduler, for the heartbeat."""

    #: Number of sequences in a slot (prefill and decode), and of those waiting for one.
    running: int = 0
    waiting: int = 0
    #: Number of rows of the last decode.
    batch: int = 0
    kv_used_tokens: int = 0
    #: 0 if there is no limit.
    kv_total_tokens: int = 0
    prefix_tokens: int = 0
    prefix_hit_tokens: int = 0
    #: Tokens that were drafted and verified, and those of them that were accepted.
    draft_tokens: int = 0
    accepted_tokens: int = 0


class Runner(Protocol):
    """Runs sequences of one model. All methods are called on the engine's thread."""

    #: Sequences that run at once.
    slots: int

    @property
    def busy(self) -> bool: ...

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence; it starts once there is a slot and memory."""

    def step(self) -> list[EngineEvent]:
        """Do one unit of work; this ends sequences that have `cancelled` set."""

    def counts(self) -> RunnerCounts: ...

    def close(self) -> None: ...
