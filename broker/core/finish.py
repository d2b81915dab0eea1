"""Placement `fastest_finish`: a request goes where it should end first, by measured speed.

The finish at a worker is reckoned from when one of its slots is free, the prompt's prefill there
(less of a prefix that the worker holds already), and the time between its tokens (`pace`). Requests
are planned in the order of their turns, each at the slot where it ends first. One that ends sooner
by waiting for a busy worker waits, and a slow worker stays idle meanwhile; a later one may take it.
This is list scheduling by earliest completion time (Ibarra and Kim, "Heuristic algorithms for
scheduling independent tasks on nonidentical processors", 1977).

Nobody knows how long an answer becomes. Where nothing waits, and a stream would end much sooner at
a worker with a free slot, it moves there and goes on, token for token (`even_out`).

A plan holds for one look at the queue and changes nothing. Called by `dispatch` and `waiting`.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from typing import Final

from broker.core import endings, ends, pace, placement
from broker.core.records import RequestState, WorkerSession
from broker.core.state import BusState
from broker.protocol.errors import ErrorCode, ErrorInfo

NAME: Final = "fastest_finish"
STEPS: Final = 20_000
"""Workers times requests that one look at a queue weighs: some milliseconds."""
REACH: Final = 512
"""How far into the queue a look goes."""
SURE: Final = 0.9
"""Another worker must end it in this share of the time, or the free one is taken: what is expected
is no more exact than that."""

GAIN: Final = 0.5
"""A stream moves to a faster worker if it ends there in this share of the time,"""
GAIN_S: Final = 2.0
"""and so much sooner at least: its caller sees a pause."""
MOVE_AGAIN_S: Final = 10.0
"""A stream that moved stays for this long."""


class Plan:
    """When the slots of a model's workers are free, with what was planned so far."""

    def __init__(self, bus: BusState, model: str) -> None:
        self._bus = bus
        self._model = model
        self._mean_s = bus.service_s.get(model, 1.0)
        self.reach = max(1, min(REACH, STEPS // max(1, len(bus.registry.serving(model)))))

    @functools.cached_property
    def _slots(self) -> dict[bytes, list[float]]:
        """By worker, in how many seconds each slot is free; a heap. Everything that runs is looked
        at, so only once there is a choice."""
        bus, model = self._bus, self._model
        found: dict[bytes, list[float]] = {}
        for worker in bus.registry.serving(model).values():
            if worker.fit and worker.has_loaded(model) and worker.alone is None:
                slots = [0.0] * worker.room(model)
                for request in worker.running.values():
                    needs_s = pace.needs_s(bus, request, worker, high=False)
                    slots.append(self._mean_s / 2 if needs_s is None else needs_s)
                heapq.heapify(slots)
                if slots:
                    found[worker.id] = slots
        return found

    def place(
        self,
        request: RequestState,
        free: Sequence[WorkerSession],
        serving: Sequence[WorkerSession],
    ) -> WorkerSession | None:
        """The free worker where the request should end first; None if it should wait for another
        one, whose slot is then planned for it."""
        best, ends_s = self._best(request, free)
        if best is None:
            return None
        waits_for, later_s = self._best(request, [w for w in serving if w not in free])
        if waits_for is None or later_s >= SURE * ends_s:
            self._take(request, best)
            return best
        now_s = self._bus.now_s
        if request.passed_over_s is None:
            request.passed_over_s = now_s
        if now_s - request.passed_over_s > ends_s:
            self._take(request, best)  # it would have ended there by now: something was wrong
            return best
        self._take(request, waits_for)
        return None

    def start_s(self, request: RequestState) -> float | None:
        """In how many seconds the request should start, and plan it so; None if that is not
        known."""
        serving = self._bus.registry.serving(self._model).values()
        best, _ = self._best(request, list(serving))
        return None if best is None else self._take(request, best)

    def _best(
        self, request: RequestState, workers: Sequence[WorkerSession]
    ) -> tuple[WorkerSession | None, float]:
        """Where it ends first, and in how many seconds."""
        best, least = None, (math.inf, math.inf, 0)
        for worker in workers:
            slots = self._slots.get(worker.id)
            if slots is None:
                continue
            ends_s = slots[0] + self._takes_s(request, worker)
            if slots[0] > 0.0 and worker.ends_s < math.inf and not self._lasts(worker, ends_s):
                continue
            load = len(worker.running) / (worker.capacity or 1)
            key = ends_s, load, worker.last_assigned
            if key < least:
                best, least = worker, key
        return best, least[0]

    def _lasts(self, worker: WorkerSession, ends_s: float) -> bool:
        return self._bus.now_s + ends_s + ends.LAST_S <= worker.ends_s

    def _takes_s(self, request: RequestState, worker: WorkerSession) -> float:
        needs_s = pace.needs_s(self._bus, request, worker, high=False)
        return self._mean_s if needs_s is None else needs_s

    def _take(self, request: RequestState, worker: WorkerSession) -> float:
        """Plan the request at the worker; returns in how many seconds it starts there."""
        slots = self._slots[worker.id]
        at_s = slots[0]
        heapq.heapreplace(slots, at_s + self._takes_s(request, worker))
        return at_s


def knows(bus: BusState, request: RequestState) -> bool:
    """Whether anything was measured yet; until then the least loaded worker is taken."""
    return pace.needs_s(bus, request, None, high=False) is not None


def choose(
    bus: BusState,
    plan: Plan,
    request: RequestState,
    free: Sequence[WorkerSession],
    serving: Sequence[WorkerSession],
) -> WorkerSession | None:
    """One of the free workers, or None: the request waits."""
    if len(free) == len(serving) == 1:
        return free[0]
    if not knows(bus, request):
        return placement.least_loaded(request, free, serving, bus.generator)
    return plan.place(request, free, serving)


def even_out(bus: BusState, model: str) -> None:
    """Nothing waits for the model: the stream that gains most moves to a faster worker with a free
    slot, if one gains enough. One at a time: the next look comes when it is back."""
    if len(bus.registry.serving(model)) < 2 or model in bus.queues or bus.on_their_way(model):
        return
    free = bus.registry.available(model)
    best, most_s = None, 0.0
    for worker in bus.registry.serving(model).values() if free else ():
        for request in worker.running.values():
            gain_s = _gain_s(bus, request, worker, free)
            if gain_s > most_s:
                best, most_s = request, gain_s
    if best is None or best.worker is None:
        return
    best.evened_s = bus.now_s
    bus.counters["evened_out"] += 1
    error = ErrorInfo(
        code=ErrorCode.DRAINING,
        message=f"a faster worker than {best.worker.name} is free; the answer goes on there",
        retryable=True,
    )
    endings.move(bus, best, error, "moved to a faster worker")


def _gain_s(
    bus: BusState, request: RequestState, here: WorkerSession, free: Sequence[WorkerSession]
) -> float:
    """How much sooner a stream would end at one of the free workers; 0: it should stay."""
    fresh = bus.now_s - request.evened_s < MOVE_AGAIN_S
    if request.model not in here.speeds or request.started_s is None or fresh:
        return 0.0
    left_s = pace.needs_s(bus, request, here, high=False)
    here_s = pace.token_s(bus, request.model, here)
    if left_s is None or not here_s or not ends.may_move(request):
        return 0.0
    done = pace.done_tokens(bus, request)
    soonest_s = math.inf
    for other in free:
        each_s = pace.token_s(bus, request.model, other)
        known = request.model in other.speeds and each_s is not None
        if other is here or not known or not other.is_exact(request.model):
            continue
        assert each_s is not None
        begins_s = pace.begin_s(bus, request, other, extra_tokens=done - request.offset)
        there_s = begins_s + left_s / here_s * each_s
        if bus.now_s + there_s + ends.LAST_S <= other.ends_s:
            soonest_s = min(soonest_s, there_s)
    return left_s - soonest_s if soonest_s <= min(GAIN * left_s, left_s - GAIN_S) else 0.0
