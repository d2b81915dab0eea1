"""RESUME, and workers that come back: how a stream survives its sessions (SPEC.md section 6.4).

Functions on the core's state, called by the controller and by `membership`.
"""

from __future__ import annotations

from broker.core import admission, assignment, dispatch, endings, suspicion
from broker.core.events import Frames
from broker.core.phases import Phase
from broker.core.records import ClientSession, RequestState, Route, WorkerSession
from broker.core.resume_pace import ResumePace
from broker.core.state import BusState
from broker.protocol import codec, limits
from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.header import Header, MessageType
from broker.protocol.messages import Cancel, FailEvent, Held, Request


def resume(bus: BusState, client: ClientSession, head: Header, frames: Frames) -> None:
    """RESUME: continue a request where it is, or queue it again."""
    try:
        body = admission.read_body(bus, client, head, frames, resumed=True)
        _resume(bus, client, head.id, body, frames[1:])
    except RequestError as error:
        admission.fail_unqueued(bus, client, head, frames, error)


def _resume(
    bus: BusState, client: ClientSession, request_id: bytes, body: Request, frames: Frames
) -> None:
    facts = body.resume
    assert facts is not None, "admission checked it"
    bus.counters["resumes"] += 1
    existing = bus.requests.get(request_id)
    if (
        existing is not None
        and existing.phase is not Phase.INTERRUPTED
        and facts.epoch <= existing.epoch
    ):
        bus.counters["stale_resumes"] += 1
        if existing.client is not client:
            raise RequestError(
                ErrorCode.DUPLICATE_REQUEST, "another session resumed the request at a later epoch"
            )
        if facts.epoch < existing.epoch:
            raise RequestError(
                ErrorCode.INVALID_REQUEST, "the epoch of a RESUME must be higher than any before"
            )
        return  # a copy
    pace = (existing.pace if existing is not None else None) or ResumePace(bus.now_s)
    pace.take(len(facts.token_ids), bus.now_s)
    order = next(bus.numbers) if existing is None else existing.order
    until_s = existing.suspect_until_s if existing is not None else None
    if existing is not None and existing.alone:
        until_s = bus.now_s
    since_s = bus.now_s
    if existing is not None:
        if existing.client is not None and existing.client is not client:
            _detach_old_client(bus, existing, existing.client)
        if existing.worker is not None:
            existing.pace = pace
            _attach(bus, client, existing, existing.worker, body, frames)
            return
        if existing.phase in (Phase.QUEUED, Phase.PARKED):
            since_s = existing.queued_s
        bus.moved.pop(request_id, None)
        bus.release(existing)
        bus.forget(existing)
    elif (holder := _holder(bus, body)) is not None:
        # It came from another broker. A worker that does not have it any more will REJECT it.
        request = RequestState(request_id, body.model, bus.now_s)
        request.order, request.pace = order, pace
        bus.requests[request_id] = request
        _attach(bus, client, request, holder, body, frames)
        return
    request = RequestState(request_id, body.model, since_s)
    request.order, request.pace = order or next(bus.numbers), pace
    if existing is not None:
        request.moves, request.moved = existing.moves, existing.moved
        request.preempted_s, request.evened_s = existing.preempted_s, existing.evened_s
        request.beginning_s, request.progress_s = existing.beginning_s, existing.progress_s
        request.charged = existing.charged
        request.returned, request.deaths = existing.returned, existing.deaths
        request.lost_alone = existing.lost_alone
    request.lost_workers = suspicion.without(facts.lost_workers, request.returned)
    alone = facts.lost_alone or request.lost_alone
    request.lost_alone = suspicion.without(alone, request.returned)
    suspicion.consider(bus, request, until_s)
    request.admitted = existing is not None or bool(
        facts.token_ids or facts.holder or facts.lost_workers
    )
    admission.enqueue(bus, client, request, body, frames)
    suspicion.watch(bus, request)


def _holder(bus: BusState, body: Request) -> WorkerSession | None:
    """A connected worker that may have a request which this broker does not know: one that
    the client names, or one that the client believes dead although only a connection to
    another broker broke."""
    facts = body.resume
    assert facts is not None, "admission checked it"
    lost = facts.lost_workers if len(facts.lost_workers) >= suspicion.SUSPECT_DEATHS else ()
    here = (dispatch.connected(bus, name, body.model) for name in (facts.holder, *lost))
    return next((worker for worker in here if worker is not None), None)


def _attach(
    bus: BusState,
    client: ClientSession,
    request: RequestState,
    worker: WorkerSession,
    body: Request,
    frames: Frames,
) -> None:
    """The worker has the request: tell it to continue for this client. No credit is spent."""
    assert body.resume is not None, "admission checked it"
    if request.phase is Phase.ENDED:
        # Its end is sent again, with a ledger that names it again; it is open until then.
        del worker.ended[request.id]
        request.end_held = False
    request.client = client
    request.model = body.model
    request.most_tokens = body.params.max_tokens
    request.kind = body.kind.value
    request.epoch_before = request.epoch if request.worker is worker else None
    request.epoch = body.resume.epoch
    request.offset = len(body.resume.token_ids)
    request.window = request.window_sent = body.window
    ttl_s = bus.settings.ttl_s if body.ttl_ms is None else body.ttl_ms / 1000
    request.ttl_until_s = bus.now_s + ttl_s
    client.requests[request.id] = request
    bus.counters["attached"] += 1
    assignment.attach(bus, request, worker, frames, attach=True)


def _detach_old_client(bus: BusState, request: RequestState, old: ClientSession) -> None:
    """Another session resumed the request while `old` lives: `old` must no longer receive it."""
    if bus.clients.get(old.routing_id) is not old or not (
        request.phase is not Phase.ENDED or request.end_held
    ):
        return
    old.requests.pop(request.id, None)
    route = old.routes.get(request.worker.id) if request.worker is not None else None
    if route is not None:
        bus.divert(route, request)
    error = ErrorInfo(
        code=ErrorCode.DUPLICATE_REQUEST,
        message="another session resumed this request; its stream goes on there",
    )
    bus.send_events(old, FailEvent(request.id, request.epoch, request.offset, error))


def without_moved(route: Route, body: bytes) -> bytes:
    """The body of an OUTPUT without events of requests that moved to another session.
    Raises ProtocolError."""
    events = codec.decode_events(body, limits.MAX_OUTPUT_BYTES)
    return codec.encode_events([event for event in events if event.request_id not in route.moved])


def _exonerate(bus: BusState, worker: WorkerSession, holds: list[Held]) -> None:
    """Clear requests that were suspected of killing a worker which comes back. A worker that brings
    along a request with which it was lost is the same process, because no other knows the id. So it
    lost only its connection, and nothing that was sent to it killed it. Requests that were lost on
    the way there are cleared too, although it does not name them."""
    name = worker.name
    known = (bus.requests.get(held.request_id) for held in holds)
    came = {request.id for request in known if request is not None and name in request.lost_workers}
    if not came:
        return
    for request in bus.requests.values():
        if name not in request.lost_workers or (request.deaths and request.id not in came):
            continue
        suspicion.exonerate(bus, request, (name,))


def readopt(bus: BusState, worker: WorkerSession, holds: list[Held]) -> None:
    """A worker brought requests along from an earlier session with this broker or another."""
    _exonerate(bus, worker, holds)
    for held in holds:
        existing = bus.requests.get(held.request_id)
        other = existing.worker if existing is not None else None
        if other is worker:
            continue  # named twice
        if existing is not None and other is not None:
            if not _is_run(existing, held, worker):
                # It runs elsewhere by now: a worker that missed this must not go on with it.
                if held.running:
                    body = codec.encode(Cancel(reason="resumed at another worker"))
                    bus.send(worker, MessageType.CANCEL, held.request_id, body)
                continue
            # Its old connection is dead, which nobody had noticed yet.
            endings.drop_worker(bus, other, "it came back on a new connection", lost=False)
            existing = bus.requests.get(held.request_id)
        _hold(bus, worker, held, existing)


def _is_run(existing: RequestState, held: Held, worker: WorkerSession) -> bool:
    """Whether a worker that says HELLO holds the same run that the broker knows on another
    connection. The request id proves nothing, since any worker that lost the request knows it, and
    neither does the name; but only the process that was told to run it knows its epoch."""
    other = existing.worker
    return (
        other is not None
        and (other.name, other.key) == (worker.name, worker.key)
        and held.epoch in (existing.epoch, existing.epoch_before)
    )


def _hold(bus: BusState, worker: WorkerSession, held: Held, existing: RequestState | None) -> None:
    request = existing or RequestState(held.request_id, "", bus.now_s)
    waiting = request.phase is Phase.QUEUED
    client, frames = request.client, request.frames
    bus.release(request)
    request.worker = worker
    request.worker_name = worker.name
    request.cancelled = False
    request.suspect_until_s = None
    bus.requests[request.id] = request
    if waiting and client is not None:
        # Its RESUME came before the worker.
        client.requests[request.id] = request
        request.epoch_before = held.epoch
        bus.counters["attached"] += 1
        assignment.attach(bus, request, worker, frames, attach=True)
        return
    request.client = None
    request.epoch = max(held.epoch, request.epoch)
    if held.running:
        worker.running[request.id] = request
        request.to(Phase.RUNNING, bus.now_s)
        endings.orphan(bus, request)
    else:
        worker.ended[request.id] = request
        request.to(Phase.ENDED, bus.now_s)
        request.outcome = "held"
        bus.keep(request)
