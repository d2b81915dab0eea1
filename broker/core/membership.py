"""Who is on the bus: HELLO and WELCOME, signs of life, keys (SPEC.md sections 5 and 11).

Functions on the core's state, called by the controller alone. What ends with a session is the
controller's `drop_client` and `drop_worker`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from broker.core import recovery, shutdown
from broker.core.events import AccessChanged, MessageReceived, Side
from broker.core.instructions import Log, Send
from broker.core.records import ClientSession, Session, WorkerSession
from broker.core.state import EMPTY_MAP, SOFTWARE
from broker.protocol import codec, header, limits
from broker.protocol.errors import ErrorCode, ErrorInfo, ProtocolError, RequestError
from broker.protocol.header import Header, MessageType
from broker.protocol.messages import BusLimits, Goodbye, Heartbeat, Hello, Refuse, Welcome

if TYPE_CHECKING:
    from broker.core.controller import BrokerCore

_NOT_ALLOWED: Final = ErrorInfo(
    code=ErrorCode.UNAUTHENTICATED, message="the key is not on the broker's allow-list any more"
)
_LATE_BEATS: Final = 1.5
"""Intervals without a word after which a worker's sign of life counts as late."""
NAME_TAKEN_MS: Final = 1000
"""When a worker whose name is taken may ask again: a dead one is found out in about that time."""
PROBE_SPACING_S: Final = 0.05
"""At most one round of probes in this time, however many connections drop at once."""


def on_first_message(core: BrokerCore, event: MessageReceived, head: Header) -> None:
    if head.type is not MessageType.HELLO:
        core.counters["unknown_sessions"] += 1
        refuse(
            core,
            event.side,
            event.routing_id,
            ErrorInfo(
                code=ErrorCode.UNKNOWN_SESSION,
                message="this broker knows no session of this connection; "
                "open a new socket and say HELLO",
                retryable=True,
            ),
        )
        return
    access = core.access
    if access is not None:
        allowed = access.clients if event.side is Side.FRONT else access.workers
        if event.key not in allowed:
            # The gate let the connection in before the list changed.
            refuse(core, event.side, event.routing_id, _NOT_ALLOWED, fatal=True)
            return
    if len(event.routing_id) != limits.ID_OCTETS or event.routing_id[0] == 0:
        error = ErrorInfo(
            code=ErrorCode.PROTOCOL_ERROR,
            message="HELLO: the routing id must be 16 random octets, the first not zero",
        )
        refuse(core, event.side, event.routing_id, error, fatal=True)
        return
    try:
        hello = codec.decode(Hello, event.frames[1], limits.MAX_HELLO_OCTETS)
        check_hello(core, event.side, head, hello)
    except ProtocolError as error:
        # It would say the same again.
        info = ErrorInfo(code=ErrorCode.PROTOCOL_ERROR, message=f"HELLO: {error}")
        refuse(core, event.side, event.routing_id, info, fatal=True)
        return
    except RequestError as error:
        refuse(core, event.side, event.routing_id, error.info)
        return
    if event.side is Side.FRONT:
        welcome_client(core, event, hello)
    else:
        welcome_worker(core, event, hello)


def check_hello(core: BrokerCore, side: Side, head: Header, hello: Hello) -> None:
    """Raises ProtocolError for what can never be right, RequestError for what may be later."""
    role = "client" if side is Side.FRONT else "worker"
    if hello.role != role:
        raise ProtocolError(
            f"a {hello.role} came to the {side.value} of the broker, where {role}s connect; "
            "use its other address"
        )
    if head.sequence != 0:
        raise ProtocolError(f"sequence {head.sequence}; HELLO has 0")
    if not hello.min_version <= limits.PROTOCOL_VERSION <= hello.max_version:
        raise ProtocolError(
            f"the peer speaks versions {hello.min_version} to {hello.max_version}, "
            f"the broker {limits.PROTOCOL_VERSION}"
        )
    if core.shutdown_until_s is not None:
        raise shutdown.draining_error()
    full = (
        len(core.clients) >= core.settings.max_clients
        if side is Side.FRONT
        else len(core.workers) >= core.settings.max_workers
    )
    if full:
        raise RequestError(
            ErrorCode.OVERLOADED,
            f"this broker has as many {role}s as it takes; come back later",
            retryable=True,
            retry_after_ms=5000,
        )
    if side is Side.BACK:
        check_name(core, hello)


def check_name(core: BrokerCore, hello: Hello) -> None:
    """Raises RequestError where another process has the worker's name: by it requests are held,
    drains ordered and deaths counted."""
    for other in core.workers.values():
        if other.name != hello.name or other.instance == hello.instance is not None:
            continue
        if None in (other.instance, hello.instance):
            # It may be the same that came back. As no other can be told, it is taken.
            core.log("warning", "two workers of one name", other)
            continue
        # If it is dead and nobody noticed, this shows it, and the next HELLO finds the name free.
        beat(core, other)
        raise RequestError(
            ErrorCode.FORBIDDEN,
            f"another worker is here by the name {hello.name[:100]!r}; give each worker a "
            "--worker-id of its own (where the other is a dead one of this, its name is free soon)",
            retryable=True,
            retry_after_ms=NAME_TAKEN_MS,
        )


def welcome_client(core: BrokerCore, event: MessageReceived, hello: Hello) -> None:
    client = ClientSession(
        event.routing_id,
        core.new_id(),
        hello.name,
        hello.software,
        event.key,
        core.settings.client_heartbeat_s,
        core.settings.client_liveness,
        core.now_s,
    )
    client.operator = core.access is None or event.key in core.access.operators
    core.clients[event.routing_id] = client
    begin(core, client, operator=client.operator)


def welcome_worker(core: BrokerCore, event: MessageReceived, hello: Hello) -> None:
    worker = WorkerSession(
        event.routing_id,
        core.new_id(),
        hello,
        event.key,
        core.settings.worker_heartbeat_s,
        core.settings.worker_liveness,
        core.now_s,
    )
    worker.held = worker.name in core.held
    core.workers[event.routing_id] = worker
    if worker.shared:
        core.shared[event.routing_id] = worker
    begin(core, worker, operator=False)
    core.registry.add(worker)
    core.dirty.update(worker.models)
    recovery.take_in(core, worker, hello.holds)


def begin(core: BrokerCore, session: Session, *, operator: bool) -> None:
    settings = core.settings
    worker = session.side is Side.BACK
    heartbeat_s = settings.worker_heartbeat_s if worker else settings.client_heartbeat_s
    core.counters["sessions"] += 1
    core.send(
        session,
        MessageType.WELCOME,
        session.id,
        codec.encode(
            Welcome(
                version=limits.PROTOCOL_VERSION,
                broker=settings.broker_name,
                software=SOFTWARE,
                heartbeat_interval_ms=max(1, round(heartbeat_s * 1000)),
                liveness=settings.worker_liveness if worker else settings.client_liveness,
                limits=BusLimits(
                    request_bytes=settings.request_bytes,
                    attachment_bytes=settings.attachment_bytes,
                    attachments_bytes=settings.attachments_bytes,
                    attachments=settings.attachments,
                    inflight=settings.inflight,
                ),
                window=settings.window_tokens,
                operator=operator,
            )
        ),
    )
    role = "worker" if worker else "client"
    core.at(session.beat_due_s, watch, session)
    core.log("info", f"{role} joined", session, software=session.software)


def refuse(
    core: BrokerCore, side: Side, routing_id: bytes, error: ErrorInfo, *, fatal: bool = False
) -> None:
    """Answer a connection that has no session."""
    core.counters["refused"] += 1
    frames = (
        header.encode(MessageType.REFUSE, header.NO_ID, 0),
        codec.encode(Refuse(error=error, fatal=fatal)),
    )
    core.instruct(Send(side, routing_id, frames, last=True))
    core.instruct(
        Log("info", "refused", {"side": side.value, "code": error.code, "why": error.message})
    )


def watch(core: BrokerCore, session: Session) -> None:
    """Timer of a session: send a sign of life when due, end it when it was silent too long."""
    if core.session(session.side, session.routing_id) is not session:
        return
    if min(core.now_s, core.read_until_s[session.side]) >= session.dead_at_s:
        core.counters["peers_silent"] += 1
        silent_s = session.silent_s(core.now_s)
        core.end_session(session, f"silent for {silent_s:.1f} s", told=Goodbye(reason="silent"))
        return
    late_s = _LATE_BEATS * core.settings.worker_heartbeat_s
    if session.side is Side.BACK and session.silent_s(core.now_s) > late_s:
        core.counters["heartbeats_late"] += 1
    if core.now_s >= session.beat_due_s:
        beat(core, session)
    # Where a dead peer may not be judged yet, the next beat is the time to look again.
    dead_at_s = session.dead_at_s if session.dead_at_s > core.now_s else math.inf
    core.at(min(session.beat_due_s, dead_at_s), watch, session)


def probe_workers_soon(core: BrokerCore) -> None:
    """Some worker's connection is gone: sending to each shows which (EHOSTUNREACH).

    The report may come before ZeroMQ takes the connection out of use, and the send still succeed;
    so every report is followed by a second round, and reports until then need none of their own.
    """
    if core.probe_at_s == math.inf:
        return
    if core.probe_at_s <= core.now_s:
        probe_workers(core)
        core.probe_at_s = core.now_s
    core.at(core.probe_at_s + PROBE_SPACING_S, _on_probe_due, None)
    core.probe_at_s = math.inf


def _on_probe_due(core: BrokerCore, _: None) -> None:
    probe_workers(core)
    core.probe_at_s = core.now_s + PROBE_SPACING_S


def probe_workers(core: BrokerCore) -> None:
    """Send every worker a sign of life."""
    for worker in core.workers.values():
        beat(core, worker)


def beat(core: BrokerCore, session: Session) -> None:
    """A sign of life. To a worker that other brokers use too, with what it needs to know to share
    its slots out (SPEC.md section 7)."""
    body = EMPTY_MAP
    if isinstance(session, WorkerSession) and session.shared:
        session.waiting_told = demand(core, session)
        body = codec.encode(
            Heartbeat(
                waiting=session.waiting_told, recalled=session.recalled, returned=session.returned
            )
        )
    core.send(session, MessageType.HEARTBEAT, session.id, body)


def demand(core: BrokerCore, worker: WorkerSession) -> int:
    """Requests that wait here for this worker's models."""
    queues = (core.queues.get(model) for model in worker.models)
    return sum(queue.requests for queue in queues if queue is not None)


def tell_demand(core: BrokerCore) -> None:
    """Tell workers that other brokers use too that something waits for them, or no longer."""
    for worker in core.shared.values():
        if (demand(core, worker) > 0) != (worker.waiting_told > 0):
            beat(core, worker)


def give_back(core: BrokerCore, worker: WorkerSession, recalled: int) -> None:
    """The worker wants credit back for another broker: what nobody here needs goes. It is answered
    even if that is nothing, so that the worker may ask again."""
    if recalled > worker.recalled:
        worker.returned += min(recalled - worker.recalled, worker.unspent)
        worker.recalled = recalled
        beat(core, worker)


def forgive(core: BrokerCore, late_s: float) -> None:
    if late_s <= min(core.settings.worker_heartbeat_s, core.settings.client_heartbeat_s):
        return
    core.counters["loop_late"] += 1
    for session in (*core.clients.values(), *core.workers.values()):
        session.shift(late_s)
    for request in core.requests.values():
        request.orphan_until_s += late_s
        if request.suspect_until_s is not None:
            request.suspect_until_s += late_s
    core.instruct(Log("warning", "the broker was late", {"late_s": round(late_s, 3)}))


def on_access_changed(core: BrokerCore, event: AccessChanged) -> None:
    core.access = event
    for client in list(core.clients.values()):
        client.operator = client.key in event.operators
        if client.key not in event.clients:
            expel(core, client)
    for worker in list(core.workers.values()):
        if worker.key not in event.workers:
            expel(core, worker)


def expel(core: BrokerCore, session: Session) -> None:
    told = Refuse(error=_NOT_ALLOWED, fatal=True)
    core.end_session(session, _NOT_ALLOWED.message, told=told)


def judge_engine(core: BrokerCore, worker: WorkerSession, age_s: float) -> None:
    """Dead, stalled and slow are three things: here the link lives and the engine does not."""
    if age_s >= core.settings.stall_lost_s:
        core.counters["workers_stalled"] += 1
        why = f"its engine made no progress for {age_s:.0f} s"
        core.end_session(worker, why, told=Goodbye(reason="stalled", message=why), died=True)
        return
    stalled = age_s >= core.settings.stall_no_work_s
    if stalled != worker.stalled:
        worker.stalled = stalled
        core.log(
            "warning",
            "worker stalled" if stalled else "worker moves again",
            worker,
            engine_age_s=round(age_s, 1),
        )
