"""How sessions and requests end. Called by whatever finds that one must end: the controller, the
timers, the operator's verbs.

The session of a client or worker ends first, then what depended on it: a request at a lost worker
is interrupted; one whose client vanished becomes an orphan and lives on for a while.
"""

from __future__ import annotations

import math
from typing import Final

from broker.core import causes, failed_loads, fairness
from broker.core.phases import Phase
from broker.core.records import ClientSession, RequestState, Session, WorkerSession
from broker.core.state import BusState
from broker.protocol import codec
from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.header import MessageType
from broker.protocol.messages import (
    Cancel,
    EndEvent,
    FailEvent,
    FinishReason,
    Goodbye,
    Interrupted,
    Refuse,
    Timings,
    Usage,
)

CLEARED_S: Final = 0.5
"""A request that runs this long after its first token is not what kills its worker: its next step
depends only on the tokens so far, and it started from the same tokens at the workers that died."""

BACK_S: Final = 2.0
"""A request that was moved is expected back within this time; its client resumes it at once."""


# --- sessions -------------------------------------------------------------------------------------


def end_session(
    bus: BusState,
    session: Session,
    why: str,
    *,
    farewell: Goodbye | Refuse | None,
    died: bool = False,
) -> None:
    """End a session that failed. `farewell`: the last message; None if the peer cannot be reached.
    `died`: what ran there may have killed it. Silence alone is no evidence of that: where the
    network to the workers breaks, all of them fall silent, and no request is to blame."""
    if isinstance(farewell, Goodbye):
        bus.send(session, MessageType.GOODBYE, session.id, codec.encode(farewell), last=True)
    elif farewell is not None:
        bus.send(session, MessageType.REFUSE, session.id, codec.encode(farewell), last=True)
    if isinstance(session, ClientSession):
        drop_client(bus, session, why, goodbye=False)
    elif isinstance(session, WorkerSession):
        drop_worker(bus, session, why, lost=died)


def drop_client(bus: BusState, client: ClientSession, why: str, *, goodbye: bool) -> None:
    """Forget a client. `goodbye`: it said GOODBYE; otherwise its requests wait for a RESUME."""
    del bus.clients[client.routing_id]
    for route in list(client.routes.values()):
        bus.remove_route(route)
    for request in list(client.requests.values()):
        request.client = None
        if goodbye:
            cancel(bus, request, "the client said goodbye")
        else:
            orphan(bus, request)
    client.requests.clear()
    bus.log("info", "client left", client, why=why)


def drop_worker(
    bus: BusState,
    worker: WorkerSession,
    why: str,
    *,
    lost: bool,
    confirmed: bool = False,
    code: ErrorCode = ErrorCode.WORKER_LOST,
) -> None:
    """Forget a worker and interrupt what it ran. `lost`: it died, which counts against the
    requests. `confirmed`: it said so itself."""
    del bus.workers[worker.routing_id]
    bus.shared.pop(worker.routing_id, None)
    bus.swappers.pop(worker.routing_id, None)
    bus.registry.remove(worker, bus.now_s)
    failed_loads.left(bus, worker)
    for route in list(worker.routes.values()):
        bus.remove_route(route)
    error = ErrorInfo(
        code=code,
        message=f"worker {worker.name} left while it ran the request ({why}); resume it",
        retryable=True,
    )
    if worker.alone is not None:
        bus.free_cell(worker.alone)
    running = list(worker.running.values())
    evidence = [lost and is_evidence(bus, worker, request) for request in running]
    for request, alone in zip(running, evidence, strict=True):
        request.deaths += confirmed and lost
        interrupt(bus, request, error, lost=lost, alone=alone)
    for request in list(worker.ended.values()):
        client = request.client
        here = client is not None and bus.clients.get(client.routing_id) is client
        if request.end_held and here:
            interrupt(bus, request, error, lost=False)  # it had left its slot
        else:
            bus.release(request)
            bus.forget(request)
    for model in worker.models:
        if not bus.registry.serving(model):
            bus.at(bus.now_s + bus.settings.model_grace_s, on_model_grace, model)
    bus.dirty.update(worker.models)
    bus.log("info", "worker left", worker, why=why, lost=lost)


def is_evidence(bus: BusState, worker: WorkerSession, request: RequestState) -> bool:
    """Whether the death of a worker is evidence against a request: nothing else ran there, and the
    request had hardly begun."""
    others = len(worker.running) > 1 or (worker.shared and worker.beat.running > 1)
    started_s = request.started_s
    cleared = started_s is not None and bus.now_s - started_s >= CLEARED_S
    return not others and request.assigned_s is not None and not cleared


# --- requests -------------------------------------------------------------------------------------


def interrupt(
    bus: BusState, request: RequestState, error: ErrorInfo, *, lost: bool, alone: bool = False
) -> None:
    """The worker of a running request is gone or gave it up: tell the client, keep the request's
    age. `alone`: the worker died and ran nothing else."""
    client, worker = request.client, request.worker
    fairness.interrupted(bus, request)
    bus.release(request)
    bus.counters["interrupted"] += 1
    if client is not None:
        body = Interrupted(
            epoch=request.epoch, worker=request.worker_name, lost=lost, alone=alone, error=error
        )
        bus.send(client, MessageType.INTERRUPTED, request.id, codec.encode(body))
        request.client = None
        request.to(Phase.INTERRUPTED, bus.now_s)
        request.outcome = "interrupted"
        request.moved = not lost
        if lost:
            request.lost_workers += (request.worker_name,)
        if alone:
            request.lost_alone += (request.worker_name,)
        bus.keep(request)
    else:
        request.outcome = "orphaned"
        bus.forget(request)
    bus.log_request("info", "interrupted", request, worker=worker, why=error.code, lost=lost)


def move(bus: BusState, request: RequestState, error: ErrorInfo, reason: str) -> None:
    """Take a running request from a worker that lives: its client resumes it elsewhere, and the
    worker is told to stop. `error`: for the client; `reason`: for the worker."""
    worker = request.worker
    assert worker is not None, "only what runs can be moved"
    interrupt(bus, request, error, lost=False)
    worker.moving.add(request.id)
    bus.send(worker, MessageType.CANCEL, request.id, codec.encode(Cancel(reason=reason)))
    if request.phase is Phase.INTERRUPTED:
        bus.moved[request.id] = (request.model, bus.now_s + BACK_S)


def orphan(bus: BusState, request: RequestState) -> None:
    """The client vanished. The request lives on for a while, in case it comes back."""
    request.orphan_until_s = bus.now_s + bus.settings.orphan_grace_s
    bus.counters["orphaned"] += 1
    if request.phase is Phase.QUEUED:
        # Not worth a slot while nobody receives it; a RESUME brings the body again.
        bus.release(request)
        request.to(Phase.PARKED, bus.now_s)
    bus.at(request.orphan_until_s, _end_orphan, request)


def _end_orphan(bus: BusState, request: RequestState) -> None:
    alone = request.client is None and bus.requests.get(request.id) is request
    if not alone or request.phase not in (Phase.PARKED, Phase.RUNNING) or request.cancelled:
        return
    if bus.now_s < request.orphan_until_s:
        bus.at(request.orphan_until_s, _end_orphan, request)
        return
    cancel(bus, request, "its client did not come back")


def cancel(bus: BusState, request: RequestState, reason: str) -> None:
    """Cancel a request wherever it is; the answer depends on where it was."""
    if request.worker is None:
        if request.client is not None:
            bus.send_events(request.client, cancelled(request.id, request.epoch, request.offset))
        _close(bus, request, "cancelled")
        return
    if request.phase is Phase.ENDED and not request.end_held:
        return  # its END crossed the CANCEL
    request.cancelled = True
    body = codec.encode(Cancel(reason=reason[:200]))
    bus.send(request.worker, MessageType.CANCEL, request.id, body)
    bus.log_request("debug", "cancelling", request)


def cancelled(request_id: bytes, epoch: int, offset: int) -> EndEvent:
    """The END of a request that was cancelled before a worker had it."""
    return EndEvent(request_id, epoch, offset, FinishReason.CANCELLED, "", Usage(), Timings())


def fail(bus: BusState, request: RequestState, error: ErrorInfo) -> None:
    """End a request that the broker holds with a FAIL."""
    bus.count_failure(error)
    request.cause = causes.in_words(error)
    if request.client is not None:
        event = FailEvent(request.id, request.epoch, request.offset, error)
        bus.send_events(request.client, event)
    _close(bus, request, error.code[:64])


def _close(bus: BusState, request: RequestState, outcome: str) -> None:
    fairness.interrupted(bus, request)
    bus.release(request)
    request.outcome = outcome
    if request.ended_s is None:
        served = bool(bus.registry.serving(request.model))
        bus.figures.ended(request, outcome, bus.now_s, served=served)
    bus.forget(request)
    bus.log_request("info", "ended", request, outcome=outcome)


# --- models ---------------------------------------------------------------------------------------


def on_model_grace(bus: BusState, model: str) -> None:
    """Timer: nobody came (back) to serve the model; requests that wait for it fail."""
    if bus.registry.serving(model):
        return
    if bus.expected.get(model, -math.inf) > bus.now_s:
        # Somebody says that workers will come; as long as that is repeated, requests wait.
        bus.at(bus.expected[model], on_model_grace, model)
        return
    again_s = failed_loads.offered_again_s(bus, model)
    if again_s > bus.now_s:
        bus.at(again_s, on_model_grace, model)
        return
    gone_s = bus.registry.gone_s(model)
    grace_s = bus.settings.model_grace_s
    queue = bus.queues.get(model)
    next_s = math.inf
    for request in queue.all() if queue else ():
        due_s = max(request.queued_s, -math.inf if gone_s is None else gone_s) + grace_s
        if due_s <= bus.now_s:
            fail(bus, request, model_unavailable(bus, model, retryable=True).info)
        else:
            next_s = min(next_s, due_s)
    if next_s < math.inf:
        bus.at(next_s, on_model_grace, model)
    if gone_s is not None and gone_s + grace_s <= bus.now_s:
        bus.registry.forget_gone(model)
        bus.service_s.pop(model, None)
        # A worker that no longer serves the model may still run requests of it, not settled yet.
        if model in bus.shares and all(share.idle for _, share in bus.shares[model]):
            del bus.shares[model]


def on_load_failed(bus: BusState, model: str) -> None:
    """A worker could not load the model, or (timer) one that left has not come back: if that was
    the last hope, those who wait are told why."""
    returns_s = failed_loads.returns_s(bus, model)
    if returns_s > bus.now_s and model in bus.queues:
        bus.at(returns_s, on_load_failed, model)
        return
    queue = bus.queues.get(model)
    for request in queue.all() if queue else ():
        error = failed_loads.error_of(bus, model, begun=request.epoch > 0)
        if error is not None:
            fail(bus, request, error.info)


def model_unavailable(bus: BusState, model: str, *, retryable: bool) -> RequestError:
    served = sorted(bus.registry.models())
    names = ", ".join(served[:10]) + (", ..." if len(served) > 10 else "")
    hint = f"models served: {names}" if served else "no worker serves any model; start one"
    why = failed_loads.reasons(bus, model)
    if why:
        hint = f"it could not be loaded: {why}"
    return RequestError(
        ErrorCode.MODEL_UNAVAILABLE,
        f"no worker serves model {model[:100]!r}; {hint}",
        retryable=retryable,
    )
