"""Lossless preemption: a request of higher priority takes the slot of a stream that can go on later
(SPEC.md section 7.2).

Where every slot is taken, the running stream of the lowest priority that costs least to move gives
its slot up: INTERRUPTED to its client, CANCEL to its worker. It goes on elsewhere if there is room,
else from the head of its own priority's queue, with the tokens that it has. Nobody gives way to an
equal, before some progress, or twice within a time.

Functions on the core's state, called by `dispatch` alone.
"""

from __future__ import annotations

import math
from typing import Final

from broker.core import endings, ends, pace
from broker.core.phases import Phase
from broker.core.records import RequestState, WorkerSession
from broker.core.state import BusState
from broker.protocol.errors import ErrorCode, ErrorInfo

LOOK_S: Final = 0.05
"""Until the next look, where nobody may give way yet."""
FREED_S: Final = 5.0
"""A slot that was asked for is expected within this time; then another one is asked for."""
CHARACTERS: Final = 4
"""Bytes of a prompt for each of its tokens, roughly: it must be computed again."""
WAITING: Final = 64
"""How many of the waiting requests are looked at: each takes a slot from somebody."""


def consider(bus: BusState, model: str) -> None:
    """Requests wait for this model, and no slot is free: somebody may have to give way."""
    queue = bus.queues.get(model)
    if queue is None or not bus.settings.preempt:
        return
    if bus.now_s < bus.preempt_from_s.get(model, -math.inf):
        return
    bus.preempt_from_s.pop(model, None)
    lowest = bus.lowest_running()
    if lowest is None or queue.highest() <= lowest:
        return
    asked = _asked_for(bus, model)
    for request in queue.upcoming(WAITING):
        if request.priority <= lowest:
            return
        if request.alone or request.suspect_until_s is not None:
            continue
        if asked > 0:
            asked -= 1  # a slot is on its way to it
            continue
        victim = _victim(bus, request)
        if victim is None:
            bus.preempt_from_s[model] = bus.now_s + LOOK_S
            bus.at(bus.now_s + LOOK_S, _look_again, model)
            return
        _preempt(bus, victim)
        bus.at(bus.now_s + FREED_S, _look_again, model)


def _look_again(bus: BusState, model: str) -> None:
    bus.preempt_from_s.pop(model, None)
    bus.dirty.add(model)


def _asked_for(bus: BusState, model: str) -> int:
    """Slots of workers of this model that streams were told to leave and have not left yet."""
    for request_id, (worker, until_s, granted) in list(bus.freeing.items()):
        here = bus.workers.get(worker.routing_id) is worker
        # Most workers grant the slot when they read CANCEL, before the run has ended.
        if not here or until_s <= bus.now_s or worker.granted >= granted:
            del bus.freeing[request_id]
    return sum(model in worker.models for worker, _, _ in bus.freeing.values())


def _victim(bus: BusState, waiting: RequestState) -> RequestState | None:
    """Who gives way to the request: of the lowest priority, the one that costs least to move."""
    best, least = None, (math.inf, True, math.inf)
    rooms: dict[str, bool] = {}
    for request in bus.running_below(waiting.priority):
        if (request.priority, False, 0.0) > least or not _may_give_way(bus, request):
            continue
        worker = request.worker
        if worker is None or not _would_serve(bus, waiting, worker, request):
            continue
        if request.model not in rooms:
            rooms[request.model] = ends.room(bus, request)
        stays = not rooms[request.model]
        again = pace.done_tokens(bus, request) + request.size_bytes / CHARACTERS
        cost = (request.priority, stays, again)
        if cost < least:
            best, least = request, cost
    return best


def _may_give_way(bus: BusState, request: RequestState) -> bool:
    """Whether it has made some progress, and did not give way a moment ago.

    Over all its times in slots, at least half is progress: what it took to begin is computed again.
    So a stream that has run for long gives way at once, even before its first token.
    """
    if not ends.may_move(request):
        return False
    beginning_s, progress_s = _so_far(bus, request)
    return (
        progress_s >= max(bus.settings.preempt_floor_s, beginning_s)
        and bus.now_s - request.preempted_s >= bus.settings.preempt_again_s
    )


def _so_far(bus: BusState, request: RequestState) -> tuple[float, float]:
    """Seconds in slots until its first tokens, and after them."""
    began_s = bus.now_s if request.started_s is None else request.started_s
    # A stream that its worker brought along from another broker was not assigned by this one.
    assigned_s = began_s if request.assigned_s is None else request.assigned_s
    return request.beginning_s + began_s - assigned_s, request.progress_s + bus.now_s - began_s


def _would_serve(
    bus: BusState, waiting: RequestState, worker: WorkerSession, victim: RequestState
) -> bool:
    """Whether the waiting request could have the victim's slot."""
    info = worker.models.get(waiting.model)
    if info is None or not worker.fit or worker.alone is not None:
        return False
    if not worker.has_loaded(waiting.model):
        return False
    if not worker.can_continue(waiting) or worker.name in waiting.lost_workers:
        return False
    if info.capacity is not None and victim.model != waiting.model:
        mine = sum(request.model == waiting.model for request in worker.running.values())
        if mine >= info.capacity:
            return False
    return ends.lasts(bus, waiting, worker)


def _preempt(bus: BusState, request: RequestState) -> None:
    worker = request.worker
    assert worker is not None
    bus.counters["preempted"] += 1
    request.beginning_s, request.progress_s = _so_far(bus, request)
    request.preempted_s = bus.now_s
    error = ErrorInfo(
        code=ErrorCode.DRAINING,
        message="a request of higher priority has its slot; it goes on as soon as one is free",
        retryable=True,
    )
    endings.move(bus, request, error, "moved, for a request of higher priority")
    if request.phase is Phase.INTERRUPTED:
        others = sum(other is worker for other, _, _ in bus.freeing.values())
        granted = worker.granted + others + 1
        bus.freeing[request.id] = (worker, bus.now_s + FREED_S, granted)
