"""Dispatch: brings waiting requests and free workers together (SPEC.md sections 6.1 and 7).

Functions on the core's state, called by the controller and by `admission`. `placement` chooses
among several free workers; `queue` says whose turn it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from broker.core import (
    assignment,
    ends,
    finish,
    placement,
    preemption,
    sharing,
    suspicion,
    swapping,
)
from broker.core.records import RequestState, WorkerSession
from broker.core.state import BusState

PASSED_OVER: Final = 64
"""How far into a queue a look goes for what will end in time at a worker that ends."""


def run(bus: BusState) -> None:
    """Assign waiting requests to free workers, one request of each model in turn. Then tell workers
    that are shared with other brokers what is still waiting."""
    looked = set(bus.dirty)
    _assign(bus)
    for model in sorted(looked):
        preemption.consider(bus, model)
        if bus.policy is None:
            finish.even_out(bus, model)
    if bus.swappers:
        swapping.consider(bus)
        _assign(bus)  # a worker that keeps its model for now takes requests again
    if bus.shared:
        sharing.tell_demand(bus)


def _assign(bus: BusState) -> None:
    while bus.dirty:
        turns: Sequence[str] = tuple(bus.dirty)
        if len(turns) > 1:
            turns = sorted(turns, key=lambda model: _last_served(bus, model))
        for model in turns:
            if not _assign_next(bus, model):
                bus.dirty.discard(model)


def _last_served(bus: BusState, model: str) -> int:
    queue = bus.queues.get(model)
    return queue.last_served if queue else 0


def _assign_next(bus: BusState, model: str) -> bool:
    queue = bus.queues.get(model)
    if queue is None:
        return False
    if suspicion.assign_next(bus, model, queue):
        return True
    free = bus.registry.available(model)
    if not free:
        return False
    plan = finish.Plan(bus, model) if bus.policy is None else None
    for passed_over, request in enumerate(queue.in_turn()):
        if passed_over >= PASSED_OVER and all(w.ends_s < math.inf for w in free):
            return False
        if plan is not None and passed_over >= plan.reach:
            return False
        worker = _choose(bus, request, free, plan)
        if worker is None:
            continue
        queue.remove(request)
        bus.queued_bytes -= request.size_bytes
        assignment.assign(bus, request, worker)
        queue.last_served = worker.last_assigned
        if not queue.requests:
            bus.queues.pop(model, None)
        return True
    return False


def _choose(
    bus: BusState, request: RequestState, free: list[WorkerSession], plan: finish.Plan | None
) -> WorkerSession | None:
    """A free worker for the request; None if it should wait for another one."""
    if awaits_worker(bus, request):
        return None
    serving = list(bus.registry.serving(request.model).values())
    if request.offset:
        serving = [worker for worker in serving if worker.can_continue(request)]
        free = [worker for worker in free if worker.can_continue(request)]
    if request.lost_workers:
        others = [worker for worker in serving if worker.name not in request.lost_workers]
        if others:
            serving = others
            free = [worker for worker in free if worker.name not in request.lost_workers]
    free = ends.candidates(bus, request, free, serving)
    if not free:
        return None
    if plan is not None:
        return finish.choose(bus, plan, request, free, serving)
    policy = bus.policy or placement.least_loaded
    return policy(request, free, serving, bus.generator)


def connected(bus: BusState, name: str, model: str) -> WorkerSession | None:
    """The worker of that name, if it is here and serves the model."""
    serving = bus.registry.serving(model).values() if name else ()
    return next((worker for worker in serving if worker.name == name), None)


def awaits_worker(bus: BusState, request: RequestState) -> bool:
    """Whether no worker may begin it now. A broker that has just started waits a moment for the
    worker that still runs a request, before another one computes it again."""
    return (
        request.suspect_until_s is not None
        or request.alone
        or (
            bool(request.holder)
            and bus.now_s < bus.started_s + bus.settings.settle_s
            and connected(bus, request.holder, request.model) is None
        )
    )


def on_settled(bus: BusState, model: str) -> None:
    """Workers that have not come back by now are no longer waited for."""
    bus.dirty.add(model)
