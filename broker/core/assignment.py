"""Hands a request to a worker: ASSIGN to it, ACCEPTED to the client (SPEC.md sections 6.1 and 7).

`dispatch`, `suspicion` and `recovery` decide which request goes to which worker.
"""

from __future__ import annotations

from broker.core import fairness, pace, waiting
from broker.core.events import Frames
from broker.core.phases import Phase
from broker.core.records import RequestState, WorkerSession, short
from broker.core.state import BusState
from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.messages import Accepted, Assign, Continuation, Window


def assign(bus: BusState, request: RequestState, worker: WorkerSession) -> None:
    """Spend one credit on a request that was taken out of its queue."""
    worker.assigned += 1
    worker.waiting_sent = max(0, worker.waiting_sent - 1)
    worker.last_assigned = next(bus.numbers)
    if worker.turns:
        worker.used[request.model] = bus.now_s
    request.assigned_s = bus.now_s
    frames, request.frames = request.frames, ()
    attach(bus, request, worker, frames, attach=False)
    # ASSIGN is on its way: what follows keeps no first token waiting.
    bus.counters["assigned"] += 1
    bus.figures.assigned(request, bus.now_s)
    waiting.started(bus, request)
    fairness.charge(bus, request)
    pace.begins_at(request, worker)


def attach(
    bus: BusState, request: RequestState, worker: WorkerSession, frames: Frames, *, attach: bool
) -> None:
    """Send ASSIGN and link request, worker and client. The body is not kept.

    `attach`: the worker already has the request; no credit is spent.
    """
    client = request.client
    if client is None:
        raise AssertionError(f"request {short(request.id)} is assigned without a client")
    worker.running[request.id] = request
    request.worker = worker
    request.worker_name = worker.name
    request.to(Phase.RUNNING, bus.now_s)
    assign = Assign(
        reply_to=bus.route_to(worker, client).id,
        epoch=request.epoch,
        ttl_ms=max(1, round((request.ttl_until_s - bus.now_s) * 1000)),
        attach=attach,
    )
    bus.send(worker, MessageType.ASSIGN, request.id, codec.encode(assign), *frames)
    bus.note_running(request)
    if request.window > request.window_sent:
        body = codec.encode(Window(limit=request.window))
        bus.send(worker, MessageType.WINDOW, request.id, body)
    how = worker.models[request.model].resume if request.model in worker.models else ""
    inexact = bool(request.offset) and not attach and how not in ("", Continuation.EXACT)
    if inexact:
        bus.counters["resumes_inexact"] += 1
    tell_where(bus, request, how if inexact else "")
    bus.log_request("debug", "attached" if attach else "assigned", request, worker=worker)


def tell_where(bus: BusState, request: RequestState, resume: str = "") -> None:
    """Send ACCEPTED for a request at a worker. It names lost workers that came back with the
    request, because the client's next RESUME may go to another broker."""
    client = request.client
    if client is None:
        return
    route = client.routes.get(request.worker.id) if request.worker is not None else None
    accepted = Accepted(
        worker=request.worker_name,
        returned=list(request.returned),
        route=None if route is None else route.id,
        resume=resume,
    )
    request.returned = ()
    bus.send(client, MessageType.ACCEPTED, request.id, codec.encode(accepted))
