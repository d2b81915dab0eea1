"""Membership: HELLO and WELCOME, heartbeats, keys (SPEC.md sections 5 and 11).

Functions on the core's state, called by the controller alone. `endings` handles what ends
with a session.
"""

from __future__ import annotations

import functools
import math
from typing import Final

from broker.core import endings, ends, failed_loads, recovery, sharing, shutdown, swapping
from broker.core.events import AccessChanged, MessageReceived, Side
from broker.core.instructions import Log, Send
from broker.core.records import ClientSession, Session, WorkerSession
from broker.core.settings import CoreSettings
from broker.core.state import BusState
from broker.protocol import codec, header, limits
from broker.protocol.errors import ErrorCode, ErrorInfo, ProtocolError, RequestError
from broker.protocol.header import Header, MessageType
from broker.protocol.messages import BusLimits, Goodbye, Hello, Refuse, Welcome

_NOT_ALLOWED: Final = ErrorInfo(
    code=ErrorCode.UNAUTHENTICATED, message="the key is not on the broker's allow-list any more"
)
_LATE_BEATS: Final = 1.5
"""Intervals of silence after which a worker's heartbeat counts as late."""
NAME_TAKEN_MS: Final = 1000
"""When a worker whose name is taken may ask again: it takes about this long to notice that the
other one is dead."""
PROBE_SPACING_S: Final = 0.05
"""At most one round of probes in this time, however many connections drop at once."""


def on_first_message(bus: BusState, event: MessageReceived, head: Header) -> None:
    if head.type is not MessageType.HELLO:
        bus.counters["unknown_sessions"] += 1
        refuse(
            bus,
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
    access = bus.access
    if access is not None:
        allowed = access.clients if event.side is Side.FRONT else access.workers
        if event.key not in allowed:
            # The gate let the connection in before the list changed.
            refuse(bus, event.side, event.routing_id, _NOT_ALLOWED, fatal=True)
            return
    if len(event.routing_id) != limits.ID_BYTES or event.routing_id[0] == 0:
        error = ErrorInfo(
            code=ErrorCode.PROTOCOL_ERROR,
            message="HELLO: the routing id must be 16 random bytes, the first not zero",
        )
        refuse(bus, event.side, event.routing_id, error, fatal=True)
        return
    try:
        if len(event.frames) != 2:
            raise ProtocolError(f"{len(event.frames)} frames; this message has 2")
        hello = codec.decode(Hello, event.frames[1], limits.MAX_HELLO_BYTES)
        check_hello(bus, event.side, head, hello)
    except ProtocolError as error:
        # A retry would say the same.
        info = ErrorInfo(code=ErrorCode.PROTOCOL_ERROR, message=f"HELLO: {error}")
        refuse(bus, event.side, event.routing_id, info, fatal=True)
        return
    except RequestError as error:
        refuse(bus, event.side, event.routing_id, error.info)
        return
    if event.side is Side.FRONT:
        welcome_client(bus, event, hello)
    else:
        welcome_worker(bus, event, hello)


def check_hello(bus: BusState, side: Side, head: Header, hello: Hello) -> None:
    """Raises ProtocolError for what can never be valid, RequestError for what may be accepted
    later."""
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
    if bus.shutdown_until_s is not None:
        raise shutdown.draining_error()
    full = (
        len(bus.clients) >= bus.settings.max_clients
        if side is Side.FRONT
        else len(bus.workers) >= bus.settings.max_workers
    )
    if full:
        raise RequestError(
            ErrorCode.OVERLOADED,
            f"this broker already has its maximum of {role}s; come back later",
            retryable=True,
            retry_after_ms=5000,
        )
    if side is Side.BACK:
        check_name(bus, hello)


def check_name(bus: BusState, hello: Hello) -> None:
    """Raises RequestError if another process has the worker's name: names identify workers that
    hold requests, are drained or have died."""
    for other in bus.workers.values():
        if other.name != hello.name or other.instance == hello.instance is not None:
            continue
        if None in (other.instance, hello.instance):
            # It may be the same worker coming back. Since the two cannot be distinguished,
            # it is accepted.
            bus.log("warning", "two workers of one name", other)
            continue
        # If the other is dead unnoticed, this probe shows it, and the next HELLO finds
        # the name free.
        sharing.beat(bus, other)
        raise RequestError(
            ErrorCode.FORBIDDEN,
            f"another worker is connected under the name {hello.name[:100]!r}; give each worker a "
            "--worker-id of its own (if the other is a dead predecessor of this one, the name will "
            "be free soon)",
            retryable=True,
            retry_after_ms=NAME_TAKEN_MS,
        )


def welcome_client(bus: BusState, event: MessageReceived, hello: Hello) -> None:
    client = ClientSession(
        event.routing_id,
        bus.new_id(),
        hello.name,
        hello.software,
        event.key,
        bus.settings.client_heartbeat_s,
        bus.settings.client_liveness,
        bus.now_s,
    )
    client.operator = bus.access is None or event.key in bus.access.operators
    client.hears_waits = hello.waits
    bus.clients[event.routing_id] = client
    begin(bus, client, operator=client.operator)


def welcome_worker(bus: BusState, event: MessageReceived, hello: Hello) -> None:
    worker = WorkerSession(
        event.routing_id,
        bus.new_id(),
        hello,
        event.key,
        bus.settings.worker_heartbeat_s,
        bus.settings.worker_liveness,
        bus.now_s,
    )
    worker.held = worker.name in bus.held
    bus.workers[event.routing_id] = worker
    if worker.shared:
        bus.shared[event.routing_id] = worker
    begin(bus, worker, operator=False)
    bus.registry.add(worker)
    failed_loads.learn(bus, worker, hello.failed)
    for model in hello.failed:
        endings.on_load_failed(bus, model.name)
    bus.dirty.update(worker.models)
    swapping.changed(bus, worker)
    ends.said(bus, worker, hello.ends_in_ms, hello.ends_why)
    recovery.readopt(bus, worker, hello.holds)


def begin(bus: BusState, session: Session, *, operator: bool) -> None:
    settings = bus.settings
    worker = session.side is Side.BACK
    bus.counters["sessions"] += 1
    welcome = _welcome(settings, bus.software, worker=worker, operator=operator)
    bus.send(session, MessageType.WELCOME, session.id, welcome)
    role = "worker" if worker else "client"
    bus.at(session.beat_due_s, watch, session)
    bus.log("info", f"{role} joined", session, software=session.software)


@functools.lru_cache(maxsize=8)
def _welcome(settings: CoreSettings, software: str, *, worker: bool, operator: bool) -> bytes:
    """The body of WELCOME, the same for all of a kind: thousands come at once after a restart."""
    heartbeat_s = settings.worker_heartbeat_s if worker else settings.client_heartbeat_s
    return codec.encode(
        Welcome(
            version=limits.PROTOCOL_VERSION,
            broker=settings.broker_name,
            software=software,
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
    )


def refuse(
    bus: BusState, side: Side, routing_id: bytes, error: ErrorInfo, *, fatal: bool = False
) -> None:
    """Answer a connection that has no session."""
    bus.counters["refused"] += 1
    frames = (
        header.encode(MessageType.REFUSE, header.NO_ID, 0),
        codec.encode(Refuse(error=error, fatal=fatal)),
    )
    bus.instruct(Send(side, routing_id, frames, last=True))
    bus.instruct(
        Log("info", "refused", {"side": side.value, "code": error.code, "why": error.message})
    )


def watch(bus: BusState, session: Session) -> None:
    """Timer of a session: send a heartbeat when due; end the session if the peer was
    silent too long."""
    if bus.session(session.side, session.routing_id) is not session:
        return
    if min(bus.now_s, bus.read_until_s[session.side]) >= session.dead_at_s:
        bus.counters["peers_silent"] += 1
        silent_s = session.silent_s(bus.now_s)
        endings.end_session(
            bus, session, f"silent for {silent_s:.1f} s", farewell=Goodbye(reason="silent")
        )
        return
    late_s = _LATE_BEATS * bus.settings.worker_heartbeat_s
    if session.side is Side.BACK and session.silent_s(bus.now_s) > late_s:
        bus.counters["heartbeats_late"] += 1
    if bus.now_s >= session.beat_due_s:
        sharing.beat(bus, session)
    # If the peer may not be judged dead yet, look again at the next heartbeat.
    dead_at_s = session.dead_at_s if session.dead_at_s > bus.now_s else math.inf
    bus.at(min(session.beat_due_s, dead_at_s), watch, session)


def probe_workers_soon(bus: BusState) -> None:
    """Some worker's connection is gone: a send to each worker shows whose (EHOSTUNREACH).

    The report may come before ZeroMQ has dropped the connection, and the send still succeeds; so
    every report is followed by a second round, which also covers reports that arrive before it.
    """
    if bus.probe_at_s == math.inf:
        return
    if bus.probe_at_s <= bus.now_s:
        probe_workers(bus)
        bus.probe_at_s = bus.now_s
    bus.at(bus.probe_at_s + PROBE_SPACING_S, _on_probe_due, None)
    bus.probe_at_s = math.inf


def _on_probe_due(bus: BusState, _: None) -> None:
    probe_workers(bus)
    bus.probe_at_s = bus.now_s + PROBE_SPACING_S


def probe_workers(bus: BusState) -> None:
    """Send every worker a heartbeat."""
    for worker in bus.workers.values():
        sharing.beat(bus, worker)


def forgive(bus: BusState, late_s: float) -> None:
    if late_s <= min(bus.settings.worker_heartbeat_s, bus.settings.client_heartbeat_s):
        return
    bus.counters["loop_late"] += 1
    for session in (*bus.clients.values(), *bus.workers.values()):
        session.shift(late_s)
    for request in bus.requests.values():
        request.orphan_until_s += late_s
        if request.suspect_until_s is not None:
            request.suspect_until_s += late_s
    bus.instruct(Log("warning", "the broker was late", {"late_s": round(late_s, 3)}))


def on_access_changed(bus: BusState, event: AccessChanged) -> None:
    bus.access = event
    for client in list(bus.clients.values()):
        client.operator = client.key in event.operators
        if client.key not in event.clients:
            expel(bus, client)
    for worker in list(bus.workers.values()):
        if worker.key not in event.workers:
            expel(bus, worker)


def expel(bus: BusState, session: Session) -> None:
    farewell = Refuse(error=_NOT_ALLOWED, fatal=True)
    endings.end_session(bus, session, _NOT_ALLOWED.message, farewell=farewell)


def check_engine(bus: BusState, worker: WorkerSession, age_s: float) -> None:
    """Note how long a worker's engine has made no progress. Its link is alive, so it is
    stalled, not dead."""
    if age_s >= bus.settings.stall_lost_s:
        bus.counters["workers_stalled"] += 1
        why = f"its engine made no progress for {age_s:.0f} s"
        endings.end_session(
            bus, worker, why, farewell=Goodbye(reason="stalled", message=why), died=True
        )
        return
    stalled = age_s >= bus.settings.stall_no_work_s
    if stalled != worker.stalled:
        worker.stalled = stalled
        bus.log(
            "warning",
            "worker stalled" if stalled else "worker makes progress again",
            worker,
            engine_age_s=round(age_s, 1),
        )
