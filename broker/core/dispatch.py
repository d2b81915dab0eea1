"""From the queue to a worker: who waits meets who is free (SPEC.md sections 6.1 and 7).

Functions on the core's state, called by the controller and by `recovery`. Which of several free
workers it is, `placement` says; whose turn it is, `queue`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.core import suspicion
from broker.core.phases import Phase
from broker.core.records import RequestState, WorkerSession
from broker.core.state import short
from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.messages import Accepted, Assign, Window

if TYPE_CHECKING:
    from broker.core.controller import BrokerCore, Frames


def run(core: BrokerCore) -> None:
    """Give what waits to who is free, one request of each model in turn."""
    while core.dirty:
        for model in sorted(core.dirty, key=lambda model: _last_served(core, model)):
            if not _assign_next(core, model):
                core.dirty.discard(model)


def _last_served(core: BrokerCore, model: str) -> int:
    queue = core.queues.get(model)
    return queue.last_served if queue else 0


def _assign_next(core: BrokerCore, model: str) -> bool:
    queue = core.queues.get(model)
    if queue is None:
        return False
    if suspicion.assign_next(core, model, queue):
        return True
    free = core.registry.available(model)
    if not free:
        return False
    passed_over = []
    try:
        while queue.requests:
            request = queue.take()
            worker = _choose(core, request, free)
            if worker is None:
                passed_over.append(request)
                continue
            core.queued_bytes -= request.size_bytes
            assign(core, request, worker)
            queue.last_served = worker.last_assigned
            return True
        return False
    finally:
        for request in reversed(passed_over):
            queue.put_back(request)
        if not queue.requests:
            core.queues.pop(model, None)


def _choose(
    core: BrokerCore, request: RequestState, free: list[WorkerSession]
) -> WorkerSession | None:
    """A free worker for the request; None: it should rather wait for another."""
    if awaits_worker(core, request):
        return None
    serving = list(core.registry.serving(request.model).values())
    if request.lost_workers:
        others = [worker for worker in serving if worker.name not in request.lost_workers]
        if others:
            serving = others
            free = [worker for worker in free if worker.name not in request.lost_workers]
    return core.policy(request, free, serving, core.generator) if free else None


def assign(core: BrokerCore, request: RequestState, worker: WorkerSession) -> None:
    """Spend credit on a request that was taken out of its queue."""
    worker.assigned += 1
    worker.waiting_told = max(0, worker.waiting_told - 1)
    worker.last_assigned = next(core.numbers)
    request.assigned_s = core.now_s
    core.counters["assigned"] += 1
    core.figures.assigned(request, core.now_s)
    frames, request.frames = request.frames, ()
    attach(core, request, worker, frames, attach=False)


def attach(
    core: BrokerCore, request: RequestState, worker: WorkerSession, frames: Frames, *, attach: bool
) -> None:
    """Send ASSIGN and tie request, worker and client together. The body is not kept.

    `attach`: the worker has the request already, no credit is spent.
    """
    client = request.client
    if client is None:
        raise AssertionError(f"request {short(request.id)} is assigned without a client")
    request.phase = Phase.RUNNING
    worker.running[request.id] = request
    request.worker = worker
    request.worker_name = worker.name
    assign = Assign(
        reply_to=core.route_to(worker, client).id,
        epoch=request.epoch,
        ttl_ms=max(1, round((request.ttl_until_s - core.now_s) * 1000)),
        attach=attach,
    )
    core.send(worker, MessageType.ASSIGN, request.id, codec.encode(assign), *frames)
    if request.window > request.window_told:
        body = codec.encode(Window(limit=request.window))
        core.send(worker, MessageType.WINDOW, request.id, body)
    tell_where(core, request)
    core.log_request("debug", "attached" if attach else "assigned", request, worker=worker)


def tell_where(core: BrokerCore, request: RequestState) -> None:
    """ACCEPTED of a request at a worker. Which lost workers came back with it, the client must know
    too: its next RESUME may be to another broker."""
    client = request.client
    if client is None:
        return
    route = client.routes.get(request.worker.id) if request.worker is not None else None
    accepted = Accepted(
        worker=request.worker_name,
        returned=list(request.returned),
        route=None if route is None else route.id,
    )
    request.returned = ()
    core.send(client, MessageType.ACCEPTED, request.id, codec.encode(accepted))


def connected(core: BrokerCore, name: str, model: str) -> WorkerSession | None:
    """The worker of that name, if it is here and serves the model."""
    serving = core.registry.serving(model).values() if name else ()
    return next((worker for worker in serving if worker.name == name), None)


def awaits_worker(core: BrokerCore, request: RequestState) -> bool:
    """No worker may begin it now. A broker that has just started waits a moment for the worker that
    still runs a request, before another one computes it again."""
    return (
        request.suspect_until_s is not None
        or request.alone
        or (
            bool(request.holder)
            and core.now_s < core.started_s + core.settings.settle_s
            and connected(core, request.holder, request.model) is None
        )
    )


def on_settled(core: BrokerCore, model: str) -> None:
    """Who has not come by now is not waited for any longer."""
    core.dirty.add(model)
