"""The broker's controller: one object that takes events and returns instructions. Read this first.

The main path of a request, top to bottom in this file:

    REQUEST ─▶ _on_request ─▶ admission.enqueue ─▶ dispatch.run ─▶ ASSIGN to a worker
    OUTPUT  ─▶ forward (the common case, one look-up)  or  _on_output (with a ledger)
    ledger  ─▶ _finish ─▶ credit is free again ─▶ dispatch.run

Here are the face, the handlers of messages and their tables. The rules are functions on a
`BusState` in modules of their own, which never import this one: `admission` checks and queues a
request, `dispatch` brings queue and workers together (`placement` chooses, `assignment` sends),
`fairness` says whose turn it is, `finish` where a request ends first, `suspicion` finds requests
that kill workers, `ends` empties workers before their known end,
`recovery` holds RESUME, `membership` HELLO and signs
of life, `sharing` what other brokers need, `endings` how sessions and requests end, `shutdown` the
drains, `queries` the operator's verbs. `records` and `state` are the data, `phases` the moves that
a request may make.

Sans-IO: no socket, clock, log or environment. All state lives in this object and is changed only
by this package, inside `handle` and `forward`, on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, TypeVar

from broker.core import (
    admission,
    causes,
    dispatch,
    endings,
    ends,
    failed_loads,
    fairness,
    invariants,
    membership,
    pace,
    queries,
    recovery,
    sharing,
    shutdown,
    suspicion,
    swapping,
)
from broker.core.events import (
    AccessChanged,
    DisconnectReported,
    Event,
    Frames,
    LoopWasLate,
    MessageReceived,
    PeerOverflowed,
    PeerUnreachable,
    ShutdownForced,
    ShutdownRequested,
    Side,
    Tick,
)
from broker.core.instructions import ForgetPeer, Instruction
from broker.core.phases import Phase
from broker.core.records import ClientSession, RequestState, WorkerSession
from broker.core.state import BusState
from broker.protocol import codec, header, limits
from broker.protocol.errors import ErrorCode, ErrorInfo, ProtocolError, RequestError, VersionError
from broker.protocol.header import Flag, Header, MessageType
from broker.protocol.messages import (
    Cancel,
    Credit,
    Drain,
    FailEvent,
    Finished,
    Goodbye,
    Heartbeat,
    Refuse,
    Reject,
    Window,
    WorkerState,
)

T = TypeVar("T")

_LEDGER: Final = int(Flag.LEDGER)
"""`&` of an enum's flag takes as long as the rest of the check."""


class BrokerCore(BusState):
    """All state of a broker and every rule about it."""

    # --- the face ---------------------------------------------------------------------------------

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """Take an event; return what is to be done about it, in order."""
        self.now_s = now_s
        match event:
            case MessageReceived():
                self._on_message(event)
            case Tick(front_read_s, back_read_s):
                self.read_until_s = {Side.FRONT: front_read_s, Side.BACK: back_read_s}
                self.run_timers()
            case PeerUnreachable(side, routing_id):
                if session := self.session(side, routing_id):
                    self.counters["peers_unreachable"] += 1
                    endings.end_session(self, session, "connection lost", farewell=None, died=True)
                self.instruct(ForgetPeer(side, routing_id))
            case PeerOverflowed(side, routing_id):
                if session := self.session(side, routing_id):
                    self.counters["peers_overflowed"] += 1
                    endings.end_session(
                        self,
                        session,
                        "did not read its messages",
                        farewell=Goodbye(
                            reason="slow_consumer",
                            message="the broker's outgoing queue to this peer is full; read faster",
                        ),
                    )
            case DisconnectReported(side):
                if side is Side.BACK:
                    membership.probe_workers_soon(self)
            case LoopWasLate(late_s):
                membership.forgive(self, late_s)
            case AccessChanged():
                membership.on_access_changed(self, event)
            case ShutdownRequested(grace_s, reason):
                shutdown.begin(self, grace_s, reason)
            case ShutdownForced():
                shutdown.finish(self)
        if self.dirty:
            dispatch.run(self)
        if self.shutdown_until_s is not None:
            shutdown.finish_if_idle(self)
        out, self.out = self.out, []
        return out

    def invariants(self) -> None:
        """Raises AssertionError with the story of a contradiction (for tests and simulation)."""
        invariants.check(self)

    def deadline_s(self) -> float:
        """When `handle(Tick())` is due next; infinity means never."""
        return self.timers[0][0] if self.timers else math.inf

    def forward(self, routing_id: bytes, frame: bytes, now_s: float) -> tuple[bytes, bytes] | None:
        """Forward an OUTPUT in the common case, body unread: routing id and header for the client.

        `frame` is the header of a message at the back. If the result is None, it is not the common
        case and the caller must pass the message to `handle`; otherwise the caller must send header
        and body to the client.
        """
        route = self.fast_routes.get(frame[:24])
        if route is None:
            return None
        worker = route.worker
        expected = worker.expected
        if worker.routing_id != routing_id or frame[24:] != expected.to_bytes(8, "big"):
            return None
        worker.expected = expected + 1
        worker.heard_s = now_s
        client = route.client
        sequence = client.sequence
        client.sequence = sequence + 1
        client.sources.append(worker)
        client.sent_s = now_s
        return client.routing_id, route.key + sequence.to_bytes(8, "big")

    # --- messages ---------------------------------------------------------------------------------

    def _on_message(self, event: MessageReceived) -> None:
        session = self.session(event.side, event.routing_id)
        frames = event.frames
        try:
            head = header.decode(frames[0] if frames else b"")
            if not 2 <= len(frames) < limits.MAX_FRAMES:
                raise ProtocolError(
                    f"{len(frames)} frames; a message has 2 to {limits.MAX_FRAMES - 1}"
                )
            if session is None:
                membership.on_first_message(self, event, head)
                return
            if head.sequence != session.expected:
                raise ProtocolError(
                    f"sequence {head.sequence}, expected {session.expected}: "
                    "a message was lost, duplicated or forged"
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
            fatal = isinstance(error, VersionError)
            if session is None:
                membership.refuse(self, event.side, event.routing_id, info, fatal=fatal)
            else:
                farewell = Refuse(error=info, fatal=fatal)
                endings.end_session(self, session, str(error), farewell=farewell)

    # --- from clients -----------------------------------------------------------------------------

    def _on_request(self, client: ClientSession, head: Header, frames: Frames) -> None:
        existing = self.requests.get(head.id)
        if existing is not None and existing.phase is not Phase.INTERRUPTED:
            self.counters["duplicate_requests"] += 1
            streams = existing.phase is not Phase.ENDED or existing.end_held
            if existing.client is not client or not streams:
                held = "for another session" if streams else "that has ended"
                error = ErrorInfo(
                    code=ErrorCode.DUPLICATE_REQUEST,
                    message=f"the broker holds a request of this id {held}; RESUME is the way to "
                    "attach to it, and a new request needs a new id",
                )
                self.send_events(client, FailEvent(head.id, 0, 0, error))
            return
        try:
            body = admission.read_body(self, client, head, frames, resumed=False)
            request = RequestState(head.id, body.model, self.now_s)
            request.order = next(self.numbers)
            admission.enqueue(self, client, request, body, frames[1:])
        except RequestError as error:
            admission.fail_unqueued(self, client, head, frames, error)

    def _on_cancel(self, client: ClientSession, head: Header, frames: Frames) -> None:
        reason = self._control(Cancel, frames).reason
        request = self.requests.get(head.id)
        if request is None or request.phase is Phase.INTERRUPTED:
            self.send_events(client, endings.cancelled(head.id, request.epoch if request else 0, 0))
            return
        if request.client is not client:
            # Whoever knows the id may cancel; but the worker's answer goes to the other session.
            self.send_events(client, endings.cancelled(head.id, request.epoch, 0))
        endings.cancel(self, request, reason)

    def _on_window(self, client: ClientSession, head: Header, frames: Frames) -> None:
        limit = self._control(Window, frames).limit
        request = self.requests.get(head.id)
        if request is None or request.client is not client or limit <= request.window:
            return
        request.window = limit
        if request.phase is Phase.ENDED:
            self.keep(request)  # somebody still reads
        if request.worker is not None:
            self.send(request.worker, MessageType.WINDOW, head.id, frames[1])

    def _on_client_goodbye(self, client: ClientSession, head: Header, frames: Frames) -> None:
        goodbye = self._control(Goodbye, frames)
        # A client that leaves because its session broke will come back for its streams.
        comes_back = goodbye.reason == ErrorCode.PROTOCOL_ERROR
        endings.drop_client(self, client, f"goodbye: {goodbye.reason}", goodbye=not comes_back)

    def _on_client_heartbeat(self, client: ClientSession, head: Header, frames: Frames) -> None:
        self._control(Heartbeat, frames)

    # --- from workers -----------------------------------------------------------------------------

    def _on_output(self, worker: WorkerSession, head: Header, frames: Frames) -> None:
        """OUTPUT with a ledger, or on a route that is gone or whose bodies must be read."""
        has_ledger = bool(head.flags & _LEDGER)
        if len(frames) != 2 + has_ledger:
            which = "with a ledger has 3" if has_ledger else "without a ledger has 2"
            raise ProtocolError(f"OUTPUT {which} frames, not {len(frames)}")
        if len(frames[1]) > limits.MAX_OUTPUT_BYTES:
            raise ProtocolError(
                f"OUTPUT of {len(frames[1])} bytes; the limit is {limits.MAX_OUTPUT_BYTES}"
            )
        route = self.routes.get(head.id)
        if route is not None and route.worker is worker:
            body = recovery.without_moved(route, frames[1]) if route.moved else frames[1]
            self.counters["output_forwarded"] += 1
            self.counters["output_bytes"] += len(body)
            self.send(route.client, MessageType.OUTPUT, route.id, body)
            route.client.sources[-1] = worker
        else:
            # Its client is gone, or the worker answers to an earlier session.
            self.counters["output_without_route"] += 1
        if has_ledger:
            # Read once the events are on their way.
            ledger = codec.decode_ledger(frames[2], limits.MAX_HELLO_BYTES)
            for request_id in ledger.started:
                request = worker.running.get(request_id)
                former = request_id in worker.moving
                if request is not None and request.started_s is None and not former:
                    request.started_s = self.now_s
                    suspicion.on_started(self, request)
                    self.figures.started(request, self.now_s)
            found_causes = causes.causes_in(frames[1], ledger.finished)
            for finished in ledger.finished:
                if finished.request_id in worker.moving:
                    # The run that was moved away, even if the request is back here by now.
                    worker.moving.discard(finished.request_id)
                    continue
                # Without a route, nobody receives these requests; one that was attached in the
                # meantime is replayed, and the ledger then names it again.
                if head.id != header.NO_ID or not self._awaited(worker, finished.request_id):
                    self._finish(worker, finished, found_causes.get(finished.request_id, ""))
            self._grant(worker, ledger.granted)

    def _awaited(self, worker: WorkerSession, request_id: bytes) -> bool:
        request = worker.running.get(request_id)
        return request is not None and request.client is not None and not request.cancelled

    def _finish(self, worker: WorkerSession, finished: Finished, cause: str) -> None:
        """A request left its slot. Its END may still wait at the worker for the client's window."""
        request = worker.running.pop(finished.request_id, None)
        if request is None:
            self.counters["finished_unknown"] += 1
            return
        self.end_diversions(request)
        if request.alone:
            self.unsuspect(request)
        if request.client is not None:
            request.client.requests.pop(request.id, None)
        # Its model may have fewer slots than the worker (`ModelInfo.capacity`).
        self.dirty.add(request.model)
        request.to(Phase.ENDED, self.now_s)
        request.outcome = finished.outcome[:64]
        request.cause = cause
        request.end_held = finished.completion_tokens > request.window
        worker.ended[request.id] = request
        self.counters["ended"] += 1
        self.counters["prompt_tokens"] += finished.prompt_tokens
        self.counters["completion_tokens"] += finished.completion_tokens
        if request.assigned_s is not None and self.registry.serving(request.model):
            took_s = self.now_s - request.assigned_s
            # Weight of 1/8 as TCP smooths its round trip time (RFC 6298).
            smoothed_s = self.service_s.get(request.model, took_s)
            self.service_s[request.model] = smoothed_s + (took_s - smoothed_s) / 8
        pace.observe(self, worker, request, finished)
        fairness.measured(self, request, finished)
        if request.ended_s is None:
            self.figures.finished(request, finished, self.now_s)
        self.keep(request)
        self.log_request(
            "info",
            "ended",
            request,
            worker=worker,
            outcome=request.outcome,
            tokens=finished.completion_tokens,
            **({"cause": cause} if cause else {}),
        )

    def _grant(self, worker: WorkerSession, granted: int) -> None:
        if granted > worker.granted:
            worker.granted = granted
            self.dirty.update(worker.models)

    def _on_credit(self, worker: WorkerSession, head: Header, frames: Frames) -> None:
        credit = self._control(Credit, frames)
        self._grant(worker, credit.granted)
        dispatch.run(self)  # what waits here goes first
        sharing.give_back(self, worker, credit.recalled)

    def _on_worker_heartbeat(self, worker: WorkerSession, head: Header, frames: Frames) -> None:
        beat = self._control(Heartbeat, frames)
        worker.beat = beat
        if beat.models is not None:
            gone = set(worker.models).difference(model.name for model in beat.models)
            failed = [model.name for model in beat.failed]
            self.registry.change_models(worker, beat.models, self.now_s, failed)
            failed_loads.learn(self, worker, beat.failed)
            # Loaded, perhaps, as another broker asked.
            self.dirty.update(worker.models)
            for model in gone:
                self.at(self.now_s + self.settings.model_grace_s, endings.on_model_grace, model)
            for model in failed:
                endings.on_load_failed(self, model)
        swapping.changed(self, worker)
        if beat.capacity is not None:
            worker.capacity = beat.capacity
        worker.engine = beat.engine or worker.engine
        worker.device = beat.device or worker.device
        if beat.state is not None and beat.state is not worker.state:
            worker.state = beat.state
            self.log("info", f"worker {beat.state.value}", worker, note=beat.note)
        if beat.state is WorkerState.DRAINING:
            worker.draining = True
        if beat.granted is not None:
            self._grant(worker, beat.granted)
        ends.said(self, worker, beat.ends_in_ms, beat.ends_why)
        membership.check_engine(self, worker, beat.engine_age_ms / 1000)
        self.dirty.update(worker.models)

    def _on_reject(self, worker: WorkerSession, head: Header, frames: Frames) -> None:
        reject = self._control(Reject, frames)
        request = worker.running.get(head.id) or worker.ended.get(head.id)
        if request is not None:
            self.counters["rejected"] += 1
            if reject.error.retryable:
                endings.interrupt(self, request, reject.error, lost=False)
            else:
                endings.fail(self, request, reject.error)
        self._grant(worker, reject.granted)

    def _on_worker_drain(self, worker: WorkerSession, head: Header, frames: Frames) -> None:
        drain = self._control(Drain, frames)
        worker.draining = True
        if drain.deadline_ms is not None:
            ends.drains(self, worker, drain.deadline_ms / 1000)
        self.log("info", "worker drains", worker, why=drain.reason)

    def _on_worker_goodbye(self, worker: WorkerSession, head: Header, frames: Frames) -> None:
        goodbye = self._control(Goodbye, frames)
        lost = goodbye.reason in ("engine_dead", "stalled")
        why = f"{goodbye.reason}: {goodbye.message}" if goodbye.message else goodbye.reason
        code = ErrorCode.WORKER_LOST if lost else ErrorCode.DRAINING
        endings.drop_worker(self, worker, why[:200], lost=lost, confirmed=True, code=code)

    def _control(self, type_: type[T], frames: Frames) -> T:
        if len(frames) != 2:
            raise ProtocolError(f"{len(frames)} frames; this message has 2")
        return codec.decode(type_, frames[1], limits.MAX_CONTROL_BYTES)


_ClientHandlers = dict[MessageType, Callable[[BrokerCore, ClientSession, Header, Frames], None]]
_WorkerHandlers = dict[MessageType, Callable[[BrokerCore, WorkerSession, Header, Frames], None]]

_FROM_CLIENT: Final[_ClientHandlers] = {
    MessageType.HEARTBEAT: BrokerCore._on_client_heartbeat,
    MessageType.GOODBYE: BrokerCore._on_client_goodbye,
    MessageType.REQUEST: BrokerCore._on_request,
    MessageType.RESUME: recovery.resume,
    MessageType.CANCEL: BrokerCore._on_cancel,
    MessageType.WINDOW: BrokerCore._on_window,
    MessageType.QUERY: queries.answer,
}
_FROM_WORKER: Final[_WorkerHandlers] = {
    MessageType.HEARTBEAT: BrokerCore._on_worker_heartbeat,
    MessageType.GOODBYE: BrokerCore._on_worker_goodbye,
    MessageType.DRAIN: BrokerCore._on_worker_drain,
    MessageType.CREDIT: BrokerCore._on_credit,
    MessageType.OUTPUT: BrokerCore._on_output,
    MessageType.REJECT: BrokerCore._on_reject,
}
