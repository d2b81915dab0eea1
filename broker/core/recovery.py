"""RESUME, orphans and workers that come back: how a stream outlives sessions (SPEC.md section 6.4).

Functions on the core's state, called by the controller alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.core import admission, dispatch, suspicion
from broker.core.phases import Phase
from broker.core.records import RequestState
from broker.protocol import codec, limits
from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.header import Header, MessageType
from broker.protocol.messages import Cancel, FailEvent, Held, Request

if TYPE_CHECKING:
    from broker.core.controller import BrokerCore, Frames
    from broker.core.records import ClientSession, Route, WorkerSession


def resume(core: BrokerCore, client: ClientSession, head: Header, frames: Frames) -> None:
    """RESUME: go on with a request where it is, or queue it anew."""
    try:
        body = admission.read_body(core, client, head, frames, resumed=True)
        _resume(core, client, head.id, body, frames[1:])
    except RequestError as error:
        admission.fail_unqueued(core, client, head, frames, error)


def _resume(
    core: BrokerCore, client: ClientSession, request_id: bytes, body: Request, frames: Frames
) -> None:
    facts = body.resume
    assert facts is not None, "admission checked it"
    core.counters["resumes"] += 1
    known = core.requests.get(request_id)
    if known is not None and known.phase is not Phase.INTERRUPTED and facts.epoch <= known.epoch:
        core.counters["stale_resumes"] += 1
        if known.client is not client:
            raise RequestError(
                ErrorCode.DUPLICATE_REQUEST, "another session resumed the request at a later epoch"
            )
        if facts.epoch < known.epoch:
            raise RequestError(
                ErrorCode.INVALID_REQUEST, "the epoch of a RESUME must be higher than any before"
            )
        return  # a copy
    order = next(core.numbers) if known is None else known.order
    until_s = known.suspect_until_s if known is not None else None
    if known is not None and known.alone:
        until_s = core.now_s
    if known is not None:
        if known.client is not None and known.client is not client:
            _take_over(core, known, known.client)
        if known.worker is not None:
            _attach(core, client, known, known.worker, body, frames)
            return
        core.release(known)
        core.forget(known)
    elif (holder := _holder(core, body)) is not None:
        # It came from another broker. A worker that does not have it any more will REJECT it.
        request = RequestState(request_id, body.model, Phase.RUNNING, core.now_s)
        request.order = order
        core.requests[request_id] = request
        _attach(core, client, request, holder, body, frames)
        return
    waiting = known is not None and known.phase in (Phase.QUEUED, Phase.PARKED)
    since_s = known.queued_s if known is not None and waiting else core.now_s
    request = RequestState(request_id, body.model, Phase.QUEUED, since_s)
    request.order = order or next(core.numbers)
    if known is not None:
        request.returned, request.deaths = known.returned, known.deaths
        request.lost_alone = known.lost_alone
    request.lost_workers = suspicion.without(facts.lost_workers, request.returned)
    alone = facts.lost_alone or request.lost_alone
    request.lost_alone = suspicion.without(alone, request.returned)
    suspicion.consider(core, request, until_s)
    request.admitted = known is not None or bool(
        facts.token_ids or facts.holder or facts.lost_workers
    )
    core.enqueue(client, request, body, frames)
    suspicion.watch(core, request)


def _holder(core: BrokerCore, body: Request) -> WorkerSession | None:
    """A worker that is here and may have a request that this broker does not know: by the client's
    word, or one that it takes for dead although only a connection to another broker broke."""
    facts = body.resume
    assert facts is not None, "admission checked it"
    lost = facts.lost_workers if len(facts.lost_workers) >= suspicion.SUSPECT_DEATHS else ()
    here = (dispatch.connected(core, name, body.model) for name in (facts.holder, *lost))
    return next((worker for worker in here if worker is not None), None)


def _attach(
    core: BrokerCore,
    client: ClientSession,
    request: RequestState,
    worker: WorkerSession,
    body: Request,
    frames: Frames,
) -> None:
    """The worker has it: tell it to go on for this client. No credit is spent."""
    assert body.resume is not None, "admission checked it"
    if request.phase is Phase.ENDED:
        # Its end is sent again, with a ledger that names it again: until then it is open.
        del worker.ended[request.id]
        request.phase = Phase.RUNNING
        request.end_held = False
    request.client = client
    request.model = body.model
    request.kind = body.kind.value
    request.epoch_before = request.epoch if request.worker is worker else None
    request.epoch = body.resume.epoch
    request.offset = len(body.resume.token_ids)
    request.window = request.window_told = body.window
    ttl_s = core.settings.ttl_s if body.ttl_ms is None else body.ttl_ms / 1000
    request.ttl_until_s = core.now_s + ttl_s
    client.requests[request.id] = request
    core.counters["attached"] += 1
    dispatch.attach(core, request, worker, frames, attach=True)


def _take_over(core: BrokerCore, request: RequestState, old: ClientSession) -> None:
    """Another session resumed the request while this one lives: it must not receive it any more."""
    if core.clients.get(old.routing_id) is not old or not (
        request.phase is not Phase.ENDED or request.end_held
    ):
        return
    old.requests.pop(request.id, None)
    route = old.routes.get(request.worker.id) if request.worker is not None else None
    if route is not None:
        core.divert(route, request)
    error = ErrorInfo(
        code=ErrorCode.DUPLICATE_REQUEST,
        message="another session resumed this request; its stream goes on there",
    )
    core.send_events(old, FailEvent(request.id, request.epoch, request.offset, error))


def without_moved(route: Route, body: bytes) -> bytes:
    """The body of an OUTPUT without the events of requests that moved to another session. Raises
    ProtocolError."""
    events = codec.decode_events(body, limits.MAX_OUTPUT_OCTETS)
    return codec.encode_events([event for event in events if event.request_id not in route.moved])


def orphan(core: BrokerCore, request: RequestState) -> None:
    """The client vanished. The request lives on for a while, in case it comes back."""
    request.orphan_until_s = core.now_s + core.settings.orphan_grace_s
    core.counters["orphaned"] += 1
    if request.phase is Phase.QUEUED:
        # Not worth a slot while nobody listens; a RESUME brings the body again.
        core.release(request)
        request.phase = Phase.PARKED
    core.at(request.orphan_until_s, _end_orphan, request)


def _end_orphan(core: BrokerCore, request: RequestState) -> None:
    alone = request.client is None and core.requests.get(request.id) is request
    if not alone or request.phase not in (Phase.PARKED, Phase.RUNNING) or request.cancelled:
        return
    if core.now_s < request.orphan_until_s:
        core.at(request.orphan_until_s, _end_orphan, request)
        return
    core.cancel(request, "its client did not come back")


def _clear_of_blame(core: BrokerCore, worker: WorkerSession, holds: list[Held]) -> None:
    """A worker that brings along a request with which it was lost is the same process: no other
    knows the id. So it had lost its connection only, and nothing that was sent to it killed it.
    What was lost on its way there, it does not even name."""
    name = worker.name
    known = (core.requests.get(held.request_id) for held in holds)
    came = {request.id for request in known if request is not None and name in request.lost_workers}
    if not came:
        return
    for request in core.requests.values():
        if name not in request.lost_workers or (request.deaths and request.id not in came):
            continue
        suspicion.exonerate(core, request, (name,))


def take_in(core: BrokerCore, worker: WorkerSession, holds: list[Held]) -> None:
    """A worker brought requests along from an earlier session, of this broker or another."""
    _clear_of_blame(core, worker, holds)
    for held in holds:
        known = core.requests.get(held.request_id)
        other = known.worker if known is not None else None
        if other is worker:
            continue  # named twice
        if known is not None and other is not None:
            if not _is_run(known, held, worker):
                # It runs elsewhere by now: the one that slept through that must not go on.
                if held.running:
                    body = codec.encode(Cancel(reason="resumed at another worker"))
                    core.send(worker, MessageType.CANCEL, held.request_id, body)
                continue
            # Its old connection is dead, unnoticed so far.
            core.drop_worker(other, "it came back on a new connection", lost=False)
            known = core.requests.get(held.request_id)
        _hold(core, worker, held, known)


def _is_run(known: RequestState, held: Held, worker: WorkerSession) -> bool:
    """Whether a worker that says HELLO holds the run that the broker knows at another connection.
    The id is no proof, since whoever lost the request knows it, nor is the name; but only the
    process that was told to run it knows its epoch."""
    other = known.worker
    return (
        other is not None
        and (other.name, other.key) == (worker.name, worker.key)
        and held.epoch in (known.epoch, known.epoch_before)
    )


def _hold(core: BrokerCore, worker: WorkerSession, held: Held, known: RequestState | None) -> None:
    request = known or RequestState(held.request_id, "", Phase.INTERRUPTED, core.now_s)
    waiting = request.phase is Phase.QUEUED
    client, frames = request.client, request.frames
    core.release(request)
    wanted = waiting and client is not None
    request.phase = Phase.RUNNING if held.running or wanted else Phase.ENDED
    request.worker = worker
    request.worker_name = worker.name
    request.cancelled = False
    request.suspect_until_s = None
    core.requests[request.id] = request
    (worker.running if request.phase is Phase.RUNNING else worker.ended)[request.id] = request
    if request.phase is Phase.ENDED:
        request.outcome = "held"
        core.keep(request)
    if wanted and client is not None:
        # Its RESUME came before the worker did.
        request.client = client
        client.requests[request.id] = request
        request.epoch_before = held.epoch
        core.counters["attached"] += 1
        dispatch.attach(core, request, worker, frames, attach=True)
        return
    request.client = None
    request.epoch = max(held.epoch, request.epoch)
    if held.running:
        orphan(core, request)
