"""The broker's controller: one object that takes facts and returns instructions. Open this first.

The main path of a request, top to bottom in this file:

    REQUEST ─▶ _on_request ─▶ enqueue ─▶ _dispatch ─▶ _assign ─▶ ASSIGN to a worker
    OUTPUT  ─▶ forward (the common case, one look-up)  or  _on_output (with a ledger)
    ledger  ─▶ _finish ─▶ credit is free again ─▶ _dispatch

Beside it: sessions begin and end here; `recovery` holds RESUME and orphans, `shutdown` the drains,
`queries` the operator's verbs, `admission` the checks of a body, `placement` who gets a request.

Sans-IO: no socket, clock, log or environment. All state lives in this object and is changed only
by this package, inside `handle` and `forward`, on one thread.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar

from broker.core import placement, queries, recovery, shutdown
from broker.core.admission import read_request, resume_facts
from broker.core.events import (
    AccessChanged,
    DisconnectReported,
    Event,
    LoopWasLate,
    MessageReceived,
    PeerOverflowed,
    PeerUnreachable,
    ShutdownForced,
    ShutdownRequested,
    Side,
    Tick,
)
from broker.core.instructions import ForgetPeer, Instruction, Log, Send
from broker.core.queue import ModelQueue
from broker.core.requests import Phase, Request
from broker.core.sessions import ClientSession, Session
from broker.core.settings import CoreSettings
from broker.core.workers import Registry, Route, WorkerSession
from broker.protocol import codec, header, limits
from broker.protocol.errors import ErrorCode, ErrorInfo, ProtocolError, RequestError
from broker.protocol.header import Flag, Header, MessageType
from broker.protocol.messages import (
    Accepted,
    Assign,
    BusLimits,
    Cancel,
    Credit,
    Drain,
    EndEvent,
    FailEvent,
    Finished,
    FinishReason,
    Goodbye,
    Heartbeat,
    Hello,
    Interrupted,
    OutputEvent,
    Refuse,
    Reject,
    Timings,
    Usage,
    Welcome,
    Window,
    WorkerState,
)
from broker.protocol.messages import Request as RequestBody

SOFTWARE: Final = "tokenbus 0.1.0"
EMPTY_MAP: Final = codec.pack({})
PROBE_SPACING_S: Final = 0.05
"""At most one round of probes in this time, however many connections drop at once."""

Frames = tuple[bytes, ...]
Level = Literal["debug", "info", "warning"]
T = TypeVar("T")


class BrokerCore:
    """All state of a broker and every rule about it."""

    def __init__(
        self,
        settings: CoreSettings,
        *,
        generator: random.Random | None = None,
        operators: frozenset[str] | None = None,
        now_s: float = 0.0,
    ) -> None:
        """`operators`: public keys that may use the operator's verbs; None: CURVE is off, everybody
        may. `now_s`: start, on the same monotonic clock as `handle`."""
        self.settings = settings
        self.generator = generator or random.SystemRandom()
        self.operators = operators
        self.started_s = now_s
        #: Time of the event being handled.
        self.now_s = now_s
        #: Sessions by routing id.
        self.clients: dict[bytes, ClientSession] = {}
        self.workers: dict[bytes, WorkerSession] = {}
        self.registry = Registry()
        #: Every request known, by id, in whatever phase.
        self.requests: dict[bytes, Request] = {}
        #: Waiting requests by model; an empty queue is dropped.
        self.queues: dict[str, ModelQueue] = {}
        self.queued_bytes = 0
        #: By route id.
        self.routes: dict[bytes, Route] = {}
        #: By the first 24 octets of an OUTPUT header: the routes that need no reading of bodies.
        self._fast: dict[bytes, Route] = {}
        #: ENDED and INTERRUPTED requests with the time to forget them, oldest first.
        self.kept: deque[tuple[float, Request]] = deque()
        #: The latest requests that are over, for the operator.
        self.history: deque[Request] = deque(maxlen=256)
        #: Smoothed time from ASSIGN to the free slot, seconds, by model.
        self.service_s: dict[str, float] = {}
        self.counters: Counter[str] = Counter()
        #: When a shutdown in progress gives up waiting; None: no shutdown.
        self.shutdown_until_s: float | None = None
        self.stopped = False
        self._policy = placement.POLICIES[settings.placement]
        self._timers: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self.numbers = itertools.count(1)
        #: Models whose queue or workers changed during this event.
        self._dirty: set[str] = set()
        self._out: list[Instruction] = []
        self._read_until_s = {Side.FRONT: math.inf, Side.BACK: math.inf}
        self._probe_at_s = -math.inf

    # --- the face ---------------------------------------------------------------------------------

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """Take a fact, return what is to be done about it, in order."""
        self.now_s = now_s
        match event:
            case MessageReceived():
                self._on_message(event)
            case Tick(front_read_s, back_read_s):
                self._read_until_s = {Side.FRONT: front_read_s, Side.BACK: back_read_s}
                self._run_timers()
            case PeerUnreachable(side, routing_id):
                if session := self._session(side, routing_id):
                    self.counters["peers_unreachable"] += 1
                    self.end_session(session, "connection lost", told=None)
                self._out.append(ForgetPeer(side, routing_id))
            case PeerOverflowed(side, routing_id):
                if session := self._session(side, routing_id):
                    self.counters["peers_overflowed"] += 1
                    self.end_session(
                        session,
                        "did not read its messages",
                        told=Goodbye(
                            reason="slow_consumer",
                            message="the broker's outgoing queue to this peer is full; read faster",
                        ),
                    )
            case DisconnectReported(side):
                if side is Side.BACK:
                    self._probe_workers_soon()
            case LoopWasLate(late_s):
                self._forgive(late_s)
            case AccessChanged():
                self._on_access_changed(event)
            case ShutdownRequested(grace_s, reason):
                shutdown.begin(self, grace_s, reason)
            case ShutdownForced():
                shutdown.finish(self)
        if self._dirty:
            self._dispatch()
        if self.shutdown_until_s is not None:
            shutdown.finish_if_idle(self)
        out, self._out = self._out, []
        return out

    def deadline_s(self) -> float:
        """When `handle(Tick())` is due next; infinity: never."""
        return self._timers[0][0] if self._timers else math.inf

    def forward(self, routing_id: bytes, frame: bytes, now_s: float) -> tuple[bytes, bytes] | None:
        """The common case of OUTPUT, body unread: routing id and header for the client.

        `frame` is the header of a message at the back. None: not the common case, `handle` must see
        the message. Otherwise the caller must send header and body to the client.
        """
        route = self._fast.get(frame[:24])
        if route is None:
            return None
        worker = route.worker
        if worker.routing_id != routing_id or frame[24:] != worker.expected.to_bytes(8, "big"):
            return None
        worker.expected += 1
        worker.heard(now_s)
        client = route.client
        sequence = client.sequence
        client.sequence = sequence + 1
        client.sent(now_s)
        return client.routing_id, client.output_prefix + sequence.to_bytes(8, "big")

    # --- messages ---------------------------------------------------------------------------------

    def _session(self, side: Side, routing_id: bytes) -> Session | None:
        return (self.clients if side is Side.FRONT else self.workers).get(routing_id)

    def _on_message(self, event: MessageReceived) -> None:
        session = self._session(event.side, event.routing_id)
        frames = event.frames
        try:
            head = header.decode(frames[0] if frames else b"")
            if not 2 <= len(frames) < limits.MAX_FRAMES:
                raise ProtocolError(f"{len(frames)} frames; a message has 2 to 19")
            if session is None:
                self._on_first_message(event, head)
                return
            if head.sequence != session.expected:
                raise ProtocolError(
                    f"sequence {head.sequence}, expected {session.expected}: "
                    "a message was lost, doubled or forged"
                )
            session.expected += 1
            session.heard(self.now_s)
            if isinstance(session, ClientSession):
                on_client = _FROM_CLIENT.get(head.type)
                if on_client is None:
                    raise ProtocolError(f"a client may not send {head.type.name} now")
                on_client(self, session, head, frames)
            elif isinstance(session, WorkerSession):
                on_worker = _FROM_WORKER.get(head.type)
                if on_worker is None:
                    raise ProtocolError(f"a worker may not send {head.type.name} now")
                on_worker(self, session, head, frames)
        except ProtocolError as error:
            self.counters["protocol_errors"] += 1
            info = ErrorInfo(code=ErrorCode.PROTOCOL_ERROR, message=str(error))
            if session is None:
                self.refuse(event.side, event.routing_id, info)
            else:
                self.end_session(session, str(error), told=Refuse(error=info))

    def _on_first_message(self, event: MessageReceived, head: Header) -> None:
        if head.type is not MessageType.HELLO:
            self.counters["unknown_sessions"] += 1
            self.refuse(
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
        try:
            hello = codec.decode(Hello, event.frames[1], limits.MAX_HELLO_OCTETS)
            self._check_hello(event.side, head, hello)
        except ProtocolError as error:
            # It would say the same again.
            info = ErrorInfo(code=ErrorCode.PROTOCOL_ERROR, message=f"HELLO: {error}")
            self.refuse(event.side, event.routing_id, info, fatal=True)
            return
        except RequestError as error:
            self.refuse(event.side, event.routing_id, error.info)
            return
        if event.side is Side.FRONT:
            self._welcome_client(event, hello)
        else:
            self._welcome_worker(event, hello)

    def _check_hello(self, side: Side, head: Header, hello: Hello) -> None:
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
        if self.shutdown_until_s is not None:
            raise shutdown.draining_error(self)
        full = (
            len(self.clients) >= self.settings.max_clients
            if side is Side.FRONT
            else len(self.workers) >= self.settings.max_workers
        )
        if full:
            raise RequestError(
                ErrorCode.OVERLOADED,
                f"this broker has as many {role}s as it takes; come back later",
                retryable=True,
                retry_after_ms=5000,
            )

    def _welcome_client(self, event: MessageReceived, hello: Hello) -> None:
        client = ClientSession(
            event.routing_id,
            self.new_id(),
            hello.name,
            hello.software,
            event.key,
            self.settings.client_heartbeat_s,
            self.settings.client_liveness,
            self.now_s,
        )
        client.operator = self.operators is None or event.key in self.operators
        self.clients[event.routing_id] = client
        self._begin(client, operator=client.operator)

    def _welcome_worker(self, event: MessageReceived, hello: Hello) -> None:
        worker = WorkerSession(
            event.routing_id,
            self.new_id(),
            hello,
            event.key,
            self.settings.worker_heartbeat_s,
            self.settings.worker_liveness,
            self.now_s,
        )
        self.workers[event.routing_id] = worker
        self._begin(worker, operator=False)
        self.registry.add(worker)
        self._dirty.update(worker.models)
        recovery.take_in(self, worker, hello.holds)

    def _begin(self, session: Session, *, operator: bool) -> None:
        settings = self.settings
        worker = session.side is Side.BACK
        heartbeat_s = settings.worker_heartbeat_s if worker else settings.client_heartbeat_s
        self.counters["sessions"] += 1
        self.send(
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
        self.at(session.beat_due_s, self._watch, session)
        self.log("info", f"{_role(session)} joined", session, software=session.software)

    def refuse(
        self, side: Side, routing_id: bytes, error: ErrorInfo, *, fatal: bool = False
    ) -> None:
        """Answer a connection that has no session."""
        self.counters["refused"] += 1
        frames = (
            header.encode(MessageType.REFUSE, header.NO_ID, 0),
            codec.encode(Refuse(error=error, fatal=fatal)),
        )
        self._out.append(Send(side, routing_id, frames, last=True))
        self._out.append(
            Log("info", "refused", {"side": side.value, "code": error.code, "why": error.message})
        )

    # --- liveness ---------------------------------------------------------------------------------

    def _watch(self, session: Session) -> None:
        """Timer of a session: send a sign of life when due, end it when it was silent too long."""
        if self._session(session.side, session.routing_id) is not session:
            return
        if min(self.now_s, self._read_until_s[session.side]) >= session.dead_at_s:
            self.counters["peers_silent"] += 1
            silent_s = session.silent_s(self.now_s)
            self.end_session(session, f"silent for {silent_s:.1f} s", told=Goodbye(reason="silent"))
            return
        if self.now_s >= session.beat_due_s:
            self.send(session, MessageType.HEARTBEAT, session.id, EMPTY_MAP)
        # Where a dead peer may not be judged yet, the next beat is the time to look again.
        dead_at_s = session.dead_at_s if session.dead_at_s > self.now_s else math.inf
        self.at(min(session.beat_due_s, dead_at_s), self._watch, session)

    def _probe_workers_soon(self) -> None:
        """Some worker's connection is gone: sending to each shows which (EHOSTUNREACH)."""
        if self._probe_at_s <= self.now_s:
            self._probe_at_s = max(self.now_s, self._probe_at_s) + PROBE_SPACING_S
            self._probe_workers(None)
        elif self._probe_at_s < math.inf:
            self.at(self._probe_at_s, self._probe_workers, None)
            self._probe_at_s = math.inf

    def _probe_workers(self, _: None) -> None:
        if self._probe_at_s == math.inf:
            self._probe_at_s = self.now_s + PROBE_SPACING_S
        for worker in self.workers.values():
            self.send(worker, MessageType.HEARTBEAT, worker.id, EMPTY_MAP)

    def _forgive(self, late_s: float) -> None:
        if late_s <= min(self.settings.worker_heartbeat_s, self.settings.client_heartbeat_s):
            return
        self.counters["loop_late"] += 1
        for session in (*self.clients.values(), *self.workers.values()):
            session.shift(late_s)
        for request in self.requests.values():
            request.orphan_until_s += late_s
        self._out.append(Log("warning", "the broker was late", {"late_s": round(late_s, 3)}))

    def _on_access_changed(self, event: AccessChanged) -> None:
        self.operators = event.operators
        for client in list(self.clients.values()):
            client.operator = client.key in event.operators
            if client.key not in event.clients:
                self._expel(client)
        for worker in list(self.workers.values()):
            if worker.key not in event.workers:
                self._expel(worker)

    def _expel(self, session: Session) -> None:
        info = ErrorInfo(
            code=ErrorCode.UNAUTHENTICATED, message="the key was taken off the broker's allow-list"
        )
        self.end_session(session, info.message, told=Refuse(error=info, fatal=True))

    # --- the end of a session ---------------------------------------------------------------------

    def end_session(self, session: Session, why: str, *, told: Goodbye | Refuse | None) -> None:
        """End a session that failed. `told`: last words; None: the peer cannot be reached."""
        if isinstance(told, Goodbye):
            self.send(session, MessageType.GOODBYE, session.id, codec.encode(told), last=True)
        elif told is not None:
            self.send(session, MessageType.REFUSE, session.id, codec.encode(told), last=True)
        if isinstance(session, ClientSession):
            self.drop_client(session, why, cancel=False)
        elif isinstance(session, WorkerSession):
            self.drop_worker(session, why, lost=True)

    def drop_client(self, client: ClientSession, why: str, *, cancel: bool) -> None:
        """Forget a client. `cancel`: it said GOODBYE; else its requests wait for a RESUME."""
        del self.clients[client.routing_id]
        for route in list(client.routes.values()):
            self._remove_route(route)
        for request in list(client.requests.values()):
            request.client = None
            if cancel:
                self.cancel(request, "the client said goodbye")
            else:
                recovery.orphan(self, request)
        client.requests.clear()
        self.log("info", "client left", client, why=why)

    def drop_worker(self, worker: WorkerSession, why: str, *, lost: bool) -> None:
        """Forget a worker and interrupt what it ran. `lost`: it died, which counts against the
        requests; else it gave them up."""
        del self.workers[worker.routing_id]
        self.registry.remove(worker, self.now_s)
        for route in list(worker.routes.values()):
            self._remove_route(route)
        error = ErrorInfo(
            code=ErrorCode.WORKER_LOST if lost else ErrorCode.DRAINING,
            message=f"worker {worker.name} left while it ran the request ({why}); resume it",
            retryable=True,
        )
        for request in list(worker.running.values()):
            self.interrupt(request, error, lost=lost)
        for request in worker.ended.values():
            if self.requests.get(request.id) is request:
                del self.requests[request.id]
        worker.ended.clear()
        for model in worker.models:
            if not self.registry.serving(model):
                self.at(self.now_s + self.settings.model_grace_s, self._on_model_grace, model)
        self._dirty.update(worker.models)
        self.log("info", "worker left", worker, why=why, lost=lost)

    def interrupt(self, request: Request, error: ErrorInfo, *, lost: bool) -> None:
        """The worker of a running request is gone or gave it up: tell the client, keep its age."""
        client, worker = request.client, request.worker
        self.release(request)
        self.counters["interrupted"] += 1
        if client is not None:
            body = Interrupted(
                epoch=request.epoch, worker=request.worker_name, lost=lost, error=error
            )
            self.send(client, MessageType.INTERRUPTED, request.id, codec.encode(body))
            request.phase = Phase.INTERRUPTED
            request.outcome = "interrupted"
            self.keep(request)
        else:
            request.outcome = "orphaned"
            self.forget(request)
        self.log_request("info", "interrupted", request, worker=worker, why=error.code, lost=lost)

    # --- from clients -----------------------------------------------------------------------------

    def _on_request(self, client: ClientSession, head: Header, frames: Frames) -> None:
        known = self.requests.get(head.id)
        if known is not None and known.phase is not Phase.INTERRUPTED:
            self.counters["duplicate_requests"] += 1
            if known.client is not client:
                error = ErrorInfo(
                    code=ErrorCode.DUPLICATE_REQUEST,
                    message="the broker holds a request of this id for another session; "
                    "RESUME is the way to attach to it",
                )
                self.send_events(client, FailEvent(head.id, 0, 0, error))
            return
        try:
            body = self.read_body(client, head, frames, resumed=False)
            request = Request(head.id, body.model, Phase.QUEUED, self.now_s)
            request.order = next(self.numbers)
            self.enqueue(client, request, body, frames[1:])
        except RequestError as error:
            self.fail_unqueued(client, head, frames, error)

    def read_body(
        self, client: ClientSession, head: Header, frames: Frames, *, resumed: bool
    ) -> RequestBody:
        """The checked body of REQUEST or RESUME. Raises RequestError."""
        if head.id[0] == 0:
            raise RequestError(ErrorCode.INVALID_REQUEST, "a request id must not begin with zero")
        return read_request(frames[1], frames[2:], resumed=resumed, settings=self.settings)

    def fail_unqueued(
        self, client: ClientSession, head: Header, frames: Frames, error: RequestError
    ) -> None:
        """Answer a request that does not get into the queue."""
        epoch, offset = resume_facts(frames[1], self.settings)
        self.counters["requests_refused"] += 1
        self.counters[f"failed_{error.code}"] += 1
        self.send_events(client, FailEvent(head.id, epoch, offset, error.info))
        self._out.append(
            Log(
                "info",
                "request refused",
                {"request": short(head.id), "client": client.name, "code": error.info.code},
            )
        )

    def enqueue(
        self, client: ClientSession, request: Request, body: RequestBody, frames: Frames
    ) -> None:
        """Put a request into its model's queue, from where `_dispatch` takes it. Raises
        RequestError when it cannot be queued. `frames`: body and attachments."""
        request.client = client
        request.kind = body.kind.value
        request.priority = body.priority
        request.user_key = body.user or client.id.hex()
        request.window = request.window_told = body.window
        request.frames = frames
        request.size_bytes = sum(map(len, frames))
        if body.resume is not None:
            request.epoch = body.resume.epoch
            request.offset = len(body.resume.token_ids)
            request.lost_workers = tuple(body.resume.lost_workers)
        if self.settings.placement == "affinity":
            request.prefix_key = placement.prefix_key(body)
        queue_s = self.settings.queue_s if body.queue_ms is None else body.queue_ms / 1000
        ttl_s = self.settings.ttl_s if body.ttl_ms is None else body.ttl_ms / 1000
        request.queue_until_s = self.now_s + queue_s
        request.ttl_until_s = self.now_s + ttl_s
        self._admit(client, request)
        self.requests[request.id] = request
        client.requests[request.id] = request
        queue = self.queues.setdefault(request.model, ModelQueue())
        queue.add(request)
        self.queued_bytes += request.size_bytes
        self.counters["requests"] += 1
        self._dirty.add(request.model)
        self._dispatch()
        if request.phase is Phase.QUEUED and self.requests.get(request.id) is request:
            self.at(min(request.queue_until_s, request.ttl_until_s), self._on_queue_timer, request)
            if not self.registry.serving(request.model):
                self.at(
                    self.now_s + self.settings.model_grace_s, self._on_model_grace, request.model
                )
            accepted = Accepted(position=queue.position(request))
            self.send(client, MessageType.ACCEPTED, request.id, codec.encode(accepted))
            self.log_request("debug", "queued", request, position=accepted.position)

    def _admit(self, client: ClientSession, request: Request) -> None:
        """Raises RequestError when there is no room or no hope."""
        if self.shutdown_until_s is not None:
            raise shutdown.draining_error(self)
        if request.ttl_until_s <= self.now_s:
            raise RequestError(ErrorCode.DEADLINE_EXCEEDED, "the request came with no time to live")
        if len(client.requests) >= self.settings.inflight:
            raise RequestError(
                ErrorCode.QUOTA,
                f"{len(client.requests)} requests of this client are queued or running, "
                f"the most that this broker takes; wait for one to end",
                retryable=True,
                retry_after_ms=self.retry_after_ms(request.model),
                details={"limit": self.settings.inflight},
            )
        self._check_model(request)
        queue = self.queues.get(request.model)
        if queue is None:
            queue = ModelQueue()
        while self._is_full(queue, request):
            # Longest queue drop: who waits with most makes room, so that nobody can fill the queue
            # for all others (Suter et al., "Buffer management schemes", 1999).
            victim = queue.longest_line(request.priority)
            mine = queue.waiting(request.priority, request.user_key)
            if victim is None or victim[0] == request.user_key:
                raise self._overloaded(request)
            theirs = queue.waiting(victim[1].priority, victim[0])
            if victim[1].priority == request.priority and theirs <= mine + 1:
                raise self._overloaded(request)
            self.fail(victim[1], self._overloaded(victim[1]))

    def _is_full(self, queue: ModelQueue, request: Request) -> bool:
        settings = self.settings
        # A resumed request was admitted once and its stream is open: only memory can refuse it.
        crowded = queue.requests >= settings.queue_requests and request.epoch == 0
        return (
            crowded
            or queue.bytes + request.size_bytes > settings.queue_bytes
            or self.queued_bytes + request.size_bytes > settings.queue_total_bytes
        )

    def _overloaded(self, request: Request) -> RequestError:
        return RequestError(
            ErrorCode.OVERLOADED,
            f"the queue of model {request.model} is full; send the request again later",
            retryable=True,
            retry_after_ms=self.retry_after_ms(request.model),
        )

    def _check_model(self, request: Request) -> None:
        """A model that nobody serves is waited for only where it may come (back)."""
        model = request.model
        if self.registry.serving(model) or not self.workers or request.epoch > 0:
            return
        gone_s = self.registry.gone_s(model)
        if gone_s is None or gone_s + self.settings.model_grace_s <= self.now_s:
            raise self._model_unavailable(model, retryable=gone_s is not None)

    def _model_unavailable(self, model: str, *, retryable: bool) -> RequestError:
        served = sorted(self.registry.models())
        names = ", ".join(served[:10]) + (", ..." if len(served) > 10 else "")
        hint = f"served are: {names}" if served else "no worker serves any model; start one"
        return RequestError(
            ErrorCode.MODEL_UNAVAILABLE,
            f"no worker serves model {model[:100]!r}; {hint}",
            retryable=retryable,
        )

    def retry_after_ms(self, model: str) -> int:
        """When a place in the queue of a model should be free, from the service times seen."""
        queue = self.queues.get(model)
        slots = sum(worker.capacity for worker in self.registry.serving(model).values())
        rounds = ((queue.requests if queue else 0) + 1) / max(slots, 1)
        return round(1000 * min(60.0, max(0.1, rounds * self.service_s.get(model, 1.0))))

    def _on_resume(self, client: ClientSession, head: Header, frames: Frames) -> None:
        recovery.resume(self, client, head, frames)

    def _on_cancel(self, client: ClientSession, head: Header, frames: Frames) -> None:
        reason = self._control(Cancel, frames).reason
        request = self.requests.get(head.id)
        if request is None or request.phase is Phase.INTERRUPTED:
            self.send_events(client, _cancelled(head.id, request.epoch if request else 0, 0))
            return
        if request.client is not client:
            # Knowing the id is the right to cancel; but the answer of the worker goes elsewhere.
            self.send_events(client, _cancelled(head.id, request.epoch, 0))
        self.cancel(request, reason)

    def cancel(self, request: Request, reason: str) -> None:
        """Cancel a request wherever it is. What is answered depends on where it was."""
        if request.worker is None:
            if request.client is not None:
                self.send_events(
                    request.client, _cancelled(request.id, request.epoch, request.offset)
                )
            self._close(request, "cancelled")
            return
        request.cancelled = True
        body = codec.encode(Cancel(reason=reason[:200]))
        self.send(request.worker, MessageType.CANCEL, request.id, body)
        self.log_request("debug", "cancelling", request)

    def _on_window(self, client: ClientSession, head: Header, frames: Frames) -> None:
        limit = self._control(Window, frames).limit
        request = self.requests.get(head.id)
        if request is None or request.client is not client or limit <= request.window:
            return
        request.window = limit
        if request.worker is not None:
            self.send(request.worker, MessageType.WINDOW, head.id, frames[1])

    def _on_query(self, client: ClientSession, head: Header, frames: Frames) -> None:
        queries.answer(self, client, head, frames)

    def _on_client_goodbye(self, client: ClientSession, head: Header, frames: Frames) -> None:
        goodbye = self._control(Goodbye, frames)
        self.drop_client(client, f"goodbye: {goodbye.reason}", cancel=True)

    def _on_client_heartbeat(self, client: ClientSession, head: Header, frames: Frames) -> None:
        self._control(Heartbeat, frames)

    # --- from the queue to a worker ---------------------------------------------------------------

    def _dispatch(self) -> None:
        """Give what waits to who is free, one request of each model in turn."""
        while self._dirty:
            for model in sorted(self._dirty, key=self._last_served):
                if not self._assign_next(model):
                    self._dirty.discard(model)

    def _last_served(self, model: str) -> int:
        queue = self.queues.get(model)
        return queue.last_served if queue else 0

    def _assign_next(self, model: str) -> bool:
        queue = self.queues.get(model)
        free = self.registry.available(model) if queue else []
        if queue is None or not free:
            return False
        passed_over = []
        try:
            while queue.requests:
                request = queue.take()
                worker = self._choose(request, free)
                if worker is None:
                    passed_over.append(request)
                    continue
                self.queued_bytes -= request.size_bytes
                self._assign(request, worker)
                queue.last_served = worker.last_assigned
                return True
            return False
        finally:
            for request in reversed(passed_over):
                queue.put_back(request)
            if not queue.requests:
                self.queues.pop(model, None)

    def _choose(self, request: Request, free: list[WorkerSession]) -> WorkerSession | None:
        """A free worker for the request; None: it should rather wait for another."""
        serving = list(self.registry.serving(request.model).values())
        if request.lost_workers:
            others = [worker for worker in serving if worker.name not in request.lost_workers]
            if others:
                serving = others
                free = [worker for worker in free if worker.name not in request.lost_workers]
        return self._policy(request, free, serving, self.generator) if free else None

    def _assign(self, request: Request, worker: WorkerSession) -> None:
        worker.assigned += 1
        worker.last_assigned = next(self.numbers)
        request.assigned_s = self.now_s
        self.counters["assigned"] += 1
        frames, request.frames = request.frames, ()
        self.attach(request, worker, frames, attach=False)

    def attach(
        self, request: Request, worker: WorkerSession, frames: Frames, *, attach: bool
    ) -> None:
        """Send ASSIGN and tie request, worker and client together. The body is not kept.

        `attach`: the worker has the request already, no credit is spent.
        """
        client = request.client
        if client is None:
            raise AssertionError(f"request {short(request.id)} is assigned without a client")
        if request.phase is not Phase.ENDED:
            request.phase = Phase.RUNNING
            worker.running[request.id] = request
        request.worker = worker
        request.worker_name = worker.name
        assign = Assign(
            reply_to=self._route(worker, client).id,
            epoch=request.epoch,
            ttl_ms=max(1, round((request.ttl_until_s - self.now_s) * 1000)),
            attach=attach,
        )
        self.send(worker, MessageType.ASSIGN, request.id, codec.encode(assign), *frames)
        if request.window > request.window_told:
            body = codec.encode(Window(limit=request.window))
            self.send(worker, MessageType.WINDOW, request.id, body)
        accepted = codec.encode(Accepted(worker=worker.name))
        self.send(client, MessageType.ACCEPTED, request.id, accepted)
        self.log_request("debug", "attached" if attach else "assigned", request, worker=worker)

    def _route(self, worker: WorkerSession, client: ClientSession) -> Route:
        route = worker.routes.get(client.id)
        if route is None:
            route = Route(self.new_id(), worker, client)
            worker.routes[client.id] = client.routes[worker.id] = route
            self.routes[route.id] = self._fast[route.key] = route
        return route

    def divert(self, route: Route, request_id: bytes) -> None:
        """From now on nothing of this request may pass this route: its bodies are read."""
        route.moved.add(request_id)
        self._fast.pop(route.key, None)

    def _remove_route(self, route: Route) -> None:
        del self.routes[route.id]
        self._fast.pop(route.key, None)
        del route.worker.routes[route.client.id]
        del route.client.routes[route.worker.id]

    # --- from workers -----------------------------------------------------------------------------

    def _on_output(self, worker: WorkerSession, head: Header, frames: Frames) -> None:
        """OUTPUT with a ledger, or of a route that is gone or must be read."""
        ledger = None
        if head.flags & Flag.LEDGER:
            if len(frames) != 3:
                raise ProtocolError(f"OUTPUT with a ledger has 3 frames, not {len(frames)}")
            ledger = codec.decode_ledger(frames[2], limits.MAX_HELLO_OCTETS)
        elif len(frames) != 2:
            raise ProtocolError(f"OUTPUT without a ledger has 2 frames, not {len(frames)}")
        if len(frames[1]) > limits.MAX_OUTPUT_OCTETS:
            raise ProtocolError(
                f"OUTPUT of {len(frames[1])} octets; the limit is {limits.MAX_OUTPUT_OCTETS}"
            )
        route = self.routes.get(head.id)
        if route is not None and route.worker is worker:
            body = recovery.without_moved(route, frames[1]) if route.moved else frames[1]
            self.send(route.client, MessageType.OUTPUT, route.client.id, body)
        else:
            # Its client is gone, or the worker answers to an earlier session.
            self.counters["output_without_route"] += 1
        if ledger is not None:
            for request_id in ledger.started:
                request = worker.running.get(request_id)
                if request is not None and request.started_s is None:
                    request.started_s = self.now_s
            for finished in ledger.finished:
                self._finish(worker, finished)
            self._grant(worker, ledger.granted)

    def _finish(self, worker: WorkerSession, finished: Finished) -> None:
        """A request left its slot. Its END may still wait at the worker for the client's window."""
        request = worker.running.pop(finished.request_id, None)
        if request is None:
            self.counters["finished_unknown"] += 1
            return
        for route in worker.routes.values():
            if request.id in route.moved:
                route.moved.discard(request.id)
                if not route.moved:
                    self._fast[route.key] = route
        if request.client is not None:
            request.client.requests.pop(request.id, None)
        request.phase = Phase.ENDED
        request.outcome = finished.outcome[:64]
        worker.ended[request.id] = request
        self.counters["ended"] += 1
        self.counters["prompt_tokens"] += finished.prompt_tokens
        self.counters["completion_tokens"] += finished.completion_tokens
        if request.assigned_s is not None:
            took_s = self.now_s - request.assigned_s
            # Weight of 1/8 as TCP smooths its round trip time (RFC 6298).
            smoothed_s = self.service_s.get(request.model, took_s)
            self.service_s[request.model] = smoothed_s + (took_s - smoothed_s) / 8
        self.keep(request)
        self.log_request(
            "info",
            "ended",
            request,
            worker=worker,
            outcome=request.outcome,
            tokens=finished.completion_tokens,
        )

    def _grant(self, worker: WorkerSession, granted: int) -> None:
        if granted > worker.granted:
            worker.granted = granted
            self._dirty.update(worker.models)

    def _on_credit(self, worker: WorkerSession, head: Header, frames: Frames) -> None:
        self._grant(worker, self._control(Credit, frames).granted)

    def _on_worker_heartbeat(self, worker: WorkerSession, head: Header, frames: Frames) -> None:
        beat = self._control(Heartbeat, frames)
        worker.beat = beat
        if beat.models is not None:
            gone = set(worker.models).difference(model.name for model in beat.models)
            self.registry.change_models(worker, beat.models, self.now_s)
            for model in gone:
                self.at(self.now_s + self.settings.model_grace_s, self._on_model_grace, model)
        if beat.capacity is not None:
            worker.capacity = beat.capacity
        if beat.state is not None and beat.state is not worker.state:
            worker.state = beat.state
            self.log("info", f"worker {beat.state.value}", worker, note=beat.note)
        if beat.state is WorkerState.DRAINING:
            worker.draining = True
        if beat.granted is not None:
            self._grant(worker, beat.granted)
        self._judge_engine(worker, beat.engine_age_ms / 1000)
        self._dirty.update(worker.models)

    def _judge_engine(self, worker: WorkerSession, age_s: float) -> None:
        """Dead, stalled and slow are three things: here the link lives and the engine does not."""
        if age_s >= self.settings.stall_lost_s:
            self.counters["workers_stalled"] += 1
            why = f"its engine made no progress for {age_s:.0f} s"
            self.end_session(worker, why, told=Goodbye(reason="stalled", message=why))
            return
        stalled = age_s >= self.settings.stall_no_work_s
        if stalled != worker.stalled:
            worker.stalled = stalled
            self.log(
                "warning",
                "worker stalled" if stalled else "worker moves again",
                worker,
                engine_age_s=round(age_s, 1),
            )

    def _on_reject(self, worker: WorkerSession, head: Header, frames: Frames) -> None:
        reject = self._control(Reject, frames)
        request = worker.running.get(head.id) or worker.ended.get(head.id)
        if request is not None:
            self.counters["rejected"] += 1
            if reject.error.retryable:
                self.interrupt(request, reject.error, lost=False)
            else:
                self._fail_with(request, reject.error)
        self._grant(worker, reject.granted)

    def _on_worker_drain(self, worker: WorkerSession, head: Header, frames: Frames) -> None:
        drain = self._control(Drain, frames)
        worker.draining = True
        self.log("info", "worker drains", worker, why=drain.reason)

    def _on_worker_goodbye(self, worker: WorkerSession, head: Header, frames: Frames) -> None:
        goodbye = self._control(Goodbye, frames)
        lost = goodbye.reason in ("engine_dead", "stalled")
        why = f"{goodbye.reason}: {goodbye.message}" if goodbye.message else goodbye.reason
        self.drop_worker(worker, why[:200], lost=lost)

    # --- the end of a request ---------------------------------------------------------------------

    def fail(self, request: Request, error: RequestError) -> None:
        """End a request that the broker holds with a FAIL."""
        self._fail_with(request, error.info)

    def _fail_with(self, request: Request, info: ErrorInfo) -> None:
        self.counters[f"failed_{info.code[:64]}"] += 1
        if request.client is not None:
            event = FailEvent(request.id, request.epoch, request.offset, info)
            self.send_events(request.client, event)
        self._close(request, info.code[:64])

    def _close(self, request: Request, outcome: str) -> None:
        self.release(request)
        request.outcome = outcome
        self.forget(request)
        self.log_request("info", "ended", request, outcome=outcome)

    def release(self, request: Request) -> None:
        """Take a request out of its queue, from its worker and from its client."""
        if request.phase is Phase.QUEUED:
            queue = self.queues[request.model]
            queue.remove(request)
            self.queued_bytes -= request.size_bytes
            request.frames = ()
            if not queue.requests:
                del self.queues[request.model]
        if request.worker is not None:
            request.worker.running.pop(request.id, None)
            request.worker.ended.pop(request.id, None)
            request.worker = None
        if request.client is not None:
            request.client.requests.pop(request.id, None)

    def keep(self, request: Request) -> None:
        """Remember a request that is over for a RESUME, bounded in time and number."""
        self.requests[request.id] = request
        request.ended_s = self.now_s
        self.history.append(request)
        if not self.kept:
            self.at(self.now_s + self.settings.ended_keep_s, self._forget_kept, None)
        self.kept.append((self.now_s + self.settings.ended_keep_s, request))
        while len(self.kept) > self.settings.ended_keep:
            self._forget_if_over(self.kept.popleft()[1])

    def forget(self, request: Request) -> None:
        """Nothing is known of this request any more but its line in the history."""
        if self.requests.get(request.id) is request:
            del self.requests[request.id]
        request.client = None
        if request.ended_s is None:
            request.ended_s = self.now_s
            self.history.append(request)

    def _forget_kept(self, _: None) -> None:
        while self.kept and self.kept[0][0] <= self.now_s:
            self._forget_if_over(self.kept.popleft()[1])
        if self.kept:
            self.at(self.kept[0][0], self._forget_kept, None)

    def _forget_if_over(self, request: Request) -> None:
        if request.phase in (Phase.ENDED, Phase.INTERRUPTED):
            self.release(request)
            self.forget(request)

    # --- timers -----------------------------------------------------------------------------------

    def at(self, due_s: float, act: Callable[[Any], None], about: Any) -> None:
        """Call `act(about)` then. It must look whether there is still something to do."""
        heapq.heappush(self._timers, (due_s, next(self.numbers), act, about))

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self.now_s:
            _, _, act, about = heapq.heappop(self._timers)
            act(about)

    def _on_queue_timer(self, request: Request) -> None:
        if request.phase is not Phase.QUEUED or self.requests.get(request.id) is not request:
            return
        waited_s = self.now_s - request.queued_s
        if self.now_s >= request.ttl_until_s:
            what = f"the request's time to live ended after {waited_s:.1f} s in the queue"
        elif self.now_s >= request.queue_until_s:
            what = f"no worker of model {request.model} was free for {waited_s:.1f} s"
        else:
            self.at(min(request.queue_until_s, request.ttl_until_s), self._on_queue_timer, request)
            return
        self.fail(request, RequestError(ErrorCode.DEADLINE_EXCEEDED, what))

    def _on_model_grace(self, model: str) -> None:
        """Nobody came (back) to serve the model: whoever waits for it is told."""
        if self.registry.serving(model):
            return
        gone_s = self.registry.gone_s(model)
        grace_s = self.settings.model_grace_s
        queue = self.queues.get(model)
        next_s = math.inf
        for request in queue.all() if queue else ():
            due_s = max(request.queued_s, -math.inf if gone_s is None else gone_s) + grace_s
            if due_s <= self.now_s:
                self.fail(request, self._model_unavailable(model, retryable=True))
            else:
                next_s = min(next_s, due_s)
        if next_s < math.inf:
            self.at(next_s, self._on_model_grace, model)
        if gone_s is not None and gone_s + grace_s <= self.now_s:
            self.registry.forget_gone(model)
            self.service_s.pop(model, None)

    # --- sending ----------------------------------------------------------------------------------

    def send(
        self,
        session: Session,
        type_: MessageType,
        id_: bytes,
        *frames: bytes,
        last: bool = False,
    ) -> None:
        """The next message of a session."""
        head = session.header(type_, id_, self.now_s)
        self._out.append(Send(session.side, session.routing_id, (head, *frames), last))

    def send_events(self, client: ClientSession, *events: OutputEvent) -> None:
        """OUTPUT of the broker's own making."""
        body = codec.encode_events(list(events))
        self.send(client, MessageType.OUTPUT, client.id, body)

    def instruct(self, instruction: Instruction) -> None:
        """Add an instruction to what `handle` returns."""
        self._out.append(instruction)

    def _control(self, type_: type[T], frames: Frames) -> T:
        if len(frames) != 2:
            raise ProtocolError(f"{len(frames)} frames; this message has 2")
        return codec.decode(type_, frames[1], limits.MAX_CONTROL_OCTETS)

    def new_id(self) -> bytes:
        """A fresh id of 16 octets, the first not zero."""
        value = self.generator.getrandbits(128)
        return (value | 1 << 120 if value >> 120 == 0 else value).to_bytes(16, "big")

    def log(self, level: Level, event: str, session: Session, **fields: Any) -> None:
        """A line about a session."""
        about = {"peer": session.name, "session": short(session.id), **fields}
        self._out.append(Log(level, event, about))

    def log_request(
        self,
        level: Level,
        event: str,
        request: Request,
        worker: WorkerSession | None = None,
        **fields: Any,
    ) -> None:
        """A line about a request."""
        about = {"request": short(request.id), "model": request.model}
        if worker is not None:
            about["worker"] = worker.name
        self._out.append(Log(level, f"request {event}", about | fields))


def short(id_: bytes) -> str:
    """As much of an id as people may see: knowing all of it is the right to the stream."""
    return id_[:4].hex()


def _role(session: Session) -> str:
    return "client" if session.side is Side.FRONT else "worker"


def _cancelled(request_id: bytes, epoch: int, offset: int) -> EndEvent:
    return EndEvent(request_id, epoch, offset, FinishReason.CANCELLED, "", Usage(), Timings())


_ClientHandlers = dict[MessageType, Callable[[BrokerCore, ClientSession, Header, Frames], None]]
_WorkerHandlers = dict[MessageType, Callable[[BrokerCore, WorkerSession, Header, Frames], None]]

_FROM_CLIENT: Final[_ClientHandlers] = {
    MessageType.HEARTBEAT: BrokerCore._on_client_heartbeat,
    MessageType.GOODBYE: BrokerCore._on_client_goodbye,
    MessageType.REQUEST: BrokerCore._on_request,
    MessageType.RESUME: BrokerCore._on_resume,
    MessageType.CANCEL: BrokerCore._on_cancel,
    MessageType.WINDOW: BrokerCore._on_window,
    MessageType.QUERY: BrokerCore._on_query,
}
_FROM_WORKER: Final[_WorkerHandlers] = {
    MessageType.HEARTBEAT: BrokerCore._on_worker_heartbeat,
    MessageType.GOODBYE: BrokerCore._on_worker_goodbye,
    MessageType.DRAIN: BrokerCore._on_worker_drain,
    MessageType.CREDIT: BrokerCore._on_credit,
    MessageType.OUTPUT: BrokerCore._on_output,
    MessageType.REJECT: BrokerCore._on_reject,
}
