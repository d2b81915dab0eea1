"""Statistics by model: histograms, and ends of requests by outcome and error code.

Cheap: an observation is a bisection and two additions. Bounded: models that nobody serves share one
entry, as do those beyond `MAX_MODELS`, and an outcome is a finish reason or a known error code.
`exposition` formats it; nothing may be decided by it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import Final

from broker.core.records import RequestState
from broker.protocol.errors import ErrorCode
from broker.protocol.messages import Finished, FinishReason

MAX_MODELS: Final = 256
"""Entries for models that were ever served, about 2 kB each."""
OTHER: Final = "other"

#: Upper bounds in seconds: for waits and whole answers, and for the time between two tokens.
_WAIT_S: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
_TOKEN_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)

_OUTCOMES: Final = frozenset((*(reason.value for reason in FinishReason), *map(str, ErrorCode)))


class Histogram:
    """Observations in fixed buckets, as in Prometheus."""

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """`bounds`: upper bounds, ascending; observations above the last are counted too."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        #: Sum of all observations.
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many were observed."""
        return sum(self._counts)

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """For each bound, how many are at or below it."""
        seen = 0
        for bound, count in zip(self._bounds, self._counts, strict=False):
            seen += count
            yield bound, seen


class ModelFigures:
    """Statistics of the requests of one model."""

    __slots__ = (
        "completion_tokens",
        "duration",
        "first_token",
        "outcomes",
        "prompt_tokens",
        "queue_wait",
        "token_interval",
    )

    def __init__(self) -> None:
        #: From queueing to assignment.
        self.queue_wait = Histogram(_WAIT_S)
        #: From ASSIGN to the ledger that reports the first token.
        self.first_token = Histogram(_WAIT_S)
        #: Mean time between the tokens of an answer.
        self.token_interval = Histogram(_TOKEN_S)
        #: From queueing to the end, whatever the outcome.
        self.duration = Histogram(_WAIT_S)
        #: Ends, by finish reason or error code.
        self.outcomes: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.completion_tokens = 0


class Figures:
    """Statistics of all models."""

    def __init__(self) -> None:
        self._models: dict[str, ModelFigures] = {}

    def __iter__(self) -> Iterator[tuple[str, ModelFigures]]:
        return iter(self._models.items())

    def of(self, model: str, *, served: bool = True) -> ModelFigures:
        """The entry of a model. `served`: a worker serves it, so it gets an entry of its own; a
        request may name anything."""
        entry = self._models.get(model)
        if entry is None:
            if not served or not model or len(self._models) >= MAX_MODELS:
                model = OTHER
            entry = self._models.setdefault(model, ModelFigures())
        return entry

    def assigned(self, request: RequestState, now_s: float) -> None:
        """A worker got it."""
        self.of(request.model).queue_wait.observe(now_s - request.queued_s)

    def started(self, request: RequestState, now_s: float) -> None:
        """Its worker reported its first token."""
        if request.assigned_s is not None:
            self.of(request.model).first_token.observe(now_s - request.assigned_s)

    def finished(self, request: RequestState, finished: Finished, now_s: float) -> None:
        """It left its slot, for the first time."""
        entry = self.ended(request, finished.outcome, now_s)
        entry.prompt_tokens += finished.prompt_tokens
        # Only tokens generated here: a resumed answer brought `offset` tokens along.
        fresh = max(0, finished.completion_tokens - request.offset)
        entry.completion_tokens += fresh
        if request.started_s is not None and fresh > 1:
            entry.token_interval.observe((now_s - request.started_s) / (fresh - 1))

    def ended(
        self, request: RequestState, outcome: str, now_s: float, *, served: bool = True
    ) -> ModelFigures:
        """It is over; `outcome` is a finish reason or an error code."""
        entry = self.of(request.model, served=served)
        entry.outcomes[outcome if outcome in _OUTCOMES else OTHER] += 1
        entry.duration.observe(now_s - request.queued_s)
        return entry

    def refused(self, code: str) -> None:
        """A request was not even queued; its model may be unknown."""
        self.of(OTHER).outcomes[code if code in _OUTCOMES else OTHER] += 1
