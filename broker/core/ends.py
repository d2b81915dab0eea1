"""Workers whose end is known: what may still begin there, and what moves away in time (SPEC.md
section 7.1).

A worker says when it will be gone (a Slurm job's limit, a spot notice, an owner who wants the
machine back, a drain). It is given what should end there before that. What would not is moved by
INTERRUPTED and CANCEL while another worker has room, the longest first; its client resumes it from
the tokens that it has. Where no other worker serves the model, a stream stays until the end.

Functions on the core's state, called by the controller, `dispatch`, `membership` and `shutdown`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from broker.core import endings, pace
from broker.core.records import RequestState, WorkerSession
from broker.core.state import BusState
from broker.protocol.errors import ErrorCode, ErrorInfo

LAST_S: Final = 2.0
"""Before its end, a worker is given nothing, and what will not be over by then leaves, room or not:
time for a few round trips."""
LOOK_S: Final = 0.25
"""Between two looks for room elsewhere."""
HALF: Final = 0.5
"""A worker that ends is better than waiting for one that does not, if it can do this much of what
the request still needs."""


def said(bus: BusState, worker: WorkerSession, ends_in_ms: int | None, why: str) -> None:
    """HELLO or HEARTBEAT: the worker's end, as it knows it now."""
    ends_s = math.inf if ends_in_ms is None else bus.now_s + ends_in_ms / 1000
    knew = worker.ends_s
    worker.end_said_s, worker.end_why = ends_s, why[:200]
    _changed(bus, worker, knew)


def drains(bus: BusState, worker: WorkerSession, within_s: float) -> None:
    """A drain, ordered or announced: the worker will be gone by then."""
    knew = worker.ends_s
    worker.end_drained_s = min(worker.end_drained_s, bus.now_s + within_s)
    _changed(bus, worker, knew)


def _changed(bus: BusState, worker: WorkerSession, knew_s: float) -> None:
    ends_s = worker.ends_s
    if worker.closing and ends_s - bus.now_s > LAST_S:
        worker.closing = False
        bus.dirty.update(worker.models)
    if abs(ends_s - knew_s) > 1.0:
        # Without an end before or after, the difference is infinite.
        in_s = None if ends_s == math.inf else round(ends_s - bus.now_s, 1)
        bus.log("info", "worker's end", worker, in_s=in_s, why=worker.end_why)
    if ends_s < math.inf:
        _watch_at(bus, worker, max(bus.now_s, ends_s - bus.settings.move_s))


def _watch_at(bus: BusState, worker: WorkerSession, due_s: float) -> None:
    """Look at the worker then, unless that is to happen earlier anyway."""
    if due_s < worker.end_watch_s:
        worker.end_watch_s = due_s
        bus.at(due_s, _watch, (worker, due_s))


def _watch(bus: BusState, about: tuple[WorkerSession, float]) -> None:
    """Timer of a worker that ends."""
    worker, due_s = about
    if bus.workers.get(worker.routing_id) is not worker or worker.end_watch_s != due_s:
        return
    worker.end_watch_s = math.inf
    left_s = worker.ends_s - bus.now_s
    if left_s == math.inf:
        return
    if left_s > bus.settings.move_s:
        _watch_at(bus, worker, worker.ends_s - bus.settings.move_s)
        return
    worker.closing = left_s <= LAST_S
    move_away(bus, worker)
    if left_s > 0:
        _watch_at(bus, worker, bus.now_s + min(LOOK_S, left_s))


def move_away(bus: BusState, worker: WorkerSession) -> None:
    """Move what will not end at this worker in time, as far as there is room; the longest first."""
    left_s = worker.ends_s - bus.now_s
    staying = []
    for request in worker.running.values():
        needs_s = pace.needs_s(bus, request, worker)
        if may_move(request) and (needs_s is None or needs_s > left_s):
            staying.append((math.inf if needs_s is None else needs_s, -request.order, request))
    staying.sort(key=lambda entry: entry[:2], reverse=True)
    for _, _, request in staying:
        # In the last moments, being first in the queue of others is better than being cut.
        if room(bus, request) or (worker.closing and _others(bus, request)):
            error = ErrorInfo(
                code=ErrorCode.DRAINING,
                message=f"worker {worker.name} ends in {max(0.0, left_s):.0f} s"
                + (f" ({worker.end_why})" if worker.end_why else "")
                + "; the answer goes on at another one",
                retryable=True,
            )
            bus.counters["moved"] += 1
            endings.move(bus, request, error, "moved, because this worker ends")


def may_move(request: RequestState) -> bool:
    """Whether somebody is there who resumes it, token for token, and it is not being isolated."""
    here = request.worker is not None and request.worker.is_exact(request.model)
    return here and request.client is not None and not request.cancelled and not request.alone


def _elsewhere(bus: BusState, request: RequestState) -> list[WorkerSession]:
    """The other workers at which a running request goes on as if it had not moved."""
    serving = bus.registry.serving(request.model).values()
    return [w for w in serving if w is not request.worker and w.is_exact(request.model)]


def _others(bus: BusState, request: RequestState) -> bool:
    """Whether another worker could continue it, if it had a free slot."""
    return any(lasts(bus, request, other) for other in _elsewhere(bus, request))


def room(bus: BusState, request: RequestState) -> bool:
    """Whether a running request could go on elsewhere at once, beside those that are on their
    way already."""
    here = request.worker
    serving = _elsewhere(bus, request)
    free = [w for w in serving if w.may_take(request.model)]
    if here is not None and here.ends_s < math.inf:
        free = [w for w in free if w.ends_s > here.ends_s + bus.settings.move_s]
    free = candidates(bus, request, free, serving) if free else []
    return sum(worker.room(request.model) for worker in free) > bus.on_their_way(request.model)


def lasts(bus: BusState, request: RequestState, worker: WorkerSession) -> bool:
    """Whether the request should end at this worker before the worker does."""
    if worker.ends_s == math.inf:
        return worker.fit
    left_s = worker.ends_s - bus.now_s
    needs_s = pace.needs_s(bus, request, worker)
    if needs_s is None:
        return worker.fit and left_s > bus.settings.move_s
    return worker.fit and needs_s + LAST_S <= left_s


def candidates(
    bus: BusState,
    request: RequestState,
    free: list[WorkerSession],
    serving: Sequence[WorkerSession],
) -> list[WorkerSession]:
    """Those of the free workers that may begin the request: where it should end in time; else the
    one that is there the longest, if it can do half of it or no worker could do all. In its last
    `move_s` a worker begins only what should end there."""
    if all(worker.ends_s == math.inf for worker in free):
        return free
    good = [worker for worker in free if lasts(bus, request, worker)]
    if good:
        return good
    latest = max(free, key=lambda worker: worker.ends_s)
    left_s = latest.ends_s - bus.now_s
    if left_s <= bus.settings.move_s:
        return []
    needs_s = pace.needs_s(bus, request, latest)
    if needs_s is not None and left_s < HALF * needs_s:
        busy = (worker for worker in serving if worker not in free)
        if any(lasts(bus, request, worker) for worker in busy):
            return []
    return [latest]
