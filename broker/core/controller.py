"""The broker's controller: one object that takes facts and returns instructions. Open this first.

The main path of a request, top to bottom in this file:

    REQUEST ─▶ _on_request ─▶ enqueue ─▶ _dispatch ─▶ ASSIGN to a worker
    OUTPUT  ─▶ forward (the common case, one look-up)  or  _on_output (with a ledger)
    ledger  ─▶ _finish ─▶ credit is free again ─▶ _dispatch

Beside it: sessions begin and end here; `dispatch` brings queue and workers together, `recovery`
holds RESUME and orphans, `shutdown` the drains, `queries` the operator's verbs, `admission` the
checks of a request, `placement` who gets it, `membership` HELLO and signs of life, `state` the
tables.

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
    invariants,
    membership,
    placement,
    queries,
    recovery,
    shutdown,
    suspicion,
)
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
from broker.core.instructions import ForgetPeer, Instruction
from broker.core.phases import Phase
from broker.core.queue import ModelQueue
from broker.core.records import ClientSession, RequestState, Session, WorkerSession
from broker.core.state import BusState
from broker.protocol import codec, header, limits
from broker.protocol.errors import ErrorCode, ErrorInfo, ProtocolError, RequestError
from broker.protocol.header import Flag, Header, MessageType
from broker.protocol.messages import (
    Accepted,
    Cancel,
    Credit,
    Drain,
    EndEvent,
    FailEvent,
    Finished,
    FinishReason,
    Goodbye,
    Heartbeat,
    Interrupted,
    Refuse,
    Reject,
    Request,
    Timings,
    Usage,
    Window,
    WorkerState,
)

Frames = tuple[bytes, ...]
T = TypeVar("T")


class BrokerCore(BusState):
    """All state of a broker and every rule about it."""

    # --- the face ---------------------------------------------------------------------------------

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """Take a fact, return what is to be done about it, in order."""
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
                    self.end_session(session, "connection lost", told=None, died=True)
                self.out.append(ForgetPeer(side, routing_id))
            case PeerOverflowed(side, routing_id):
                if session := self.session(side, routing_id):
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
            self._dispatch()
        if self.shutdown_until_s is not None:
            shutdown.finish_if_idle(self)
        out, self.out = self.out, []
        return out

    def invariants(self) -> None:
        """Raises AssertionError with the story of what contradicts itself (tests, simulation)."""
        invariants.check(self)

    def deadline_s(self) -> float:
        """When `handle(Tick())` is due next; infinity: never."""
        return self.timers[0][0] if self.timers else math.inf

    def forward(self, routing_id: bytes, frame: bytes, now_s: float) -> tuple[bytes, bytes] | None:
        """The common case of OUTPUT, body unread: routing id and header for the client.

        `frame` is the header of a message at the back. None: not the common case, `handle` must see
        the message. Otherwise the caller must send header and body to the client.
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
                raise ProtocolError(f"{len(frames)} frames; a message has 2 to 19")
            if session is None:
                membership.on_first_message(self, event, head)
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
                membership.refuse(self, event.side, event.routing_id, info)
            else:
                self.end_session(session, str(error), told=Refuse(error=info))

    # --- the end of a session ---------------------------------------------------------------------

    def end_session(
        self, session: Session, why: str, *, told: Goodbye | Refuse | None, died: bool = False
    ) -> None:
        """End a session that failed. `told`: last words; None: the peer cannot be reached.
        `died`: what ran there may have killed it. Silence alone is no such sign: where the network
        to the workers breaks, all fall silent, one after the other, and no request is to blame."""
        if isinstance(told, Goodbye):
            self.send(session, MessageType.GOODBYE, session.id, codec.encode(told), last=True)
        elif told is not None:
            self.send(session, MessageType.REFUSE, session.id, codec.encode(told), last=True)
        if isinstance(session, ClientSession):
            self.drop_client(session, why, cancel=False)
        elif isinstance(session, WorkerSession):
            self.drop_worker(session, why, lost=died)

    def drop_client(self, client: ClientSession, why: str, *, cancel: bool) -> None:
        """Forget a client. `cancel`: it said GOODBYE; else its requests wait for a RESUME."""
        del self.clients[client.routing_id]
        for route in list(client.routes.values()):
            self.remove_route(route)
        for request in list(client.requests.values()):
            request.client = None
            if cancel:
                self.cancel(request, "the client said goodbye")
            else:
                recovery.orphan(self, request)
        client.requests.clear()
        self.log("info", "client left", client, why=why)

    def drop_worker(
        self,
        worker: WorkerSession,
        why: str,
        *,
        lost: bool,
        told: bool = False,
        code: ErrorCode = ErrorCode.WORKER_LOST,
    ) -> None:
        """Forget a worker and interrupt what it ran. `lost`: it died, which counts against the
        requests. `told`: it said so itself."""
        del self.workers[worker.routing_id]
        self.shared.pop(worker.routing_id, None)
        self.registry.remove(worker, self.now_s)
        for route in list(worker.routes.values()):
            self.remove_route(route)
        error = ErrorInfo(
            code=code,
            message=f"worker {worker.name} left while it ran the request ({why}); resume it",
            retryable=True,
        )
        if worker.alone is not None:
            self.free_cell(worker.alone)
        running = list(worker.running.values())
        evidence = [lost and suspicion.is_evidence(self, worker, request) for request in running]
        for request, alone in zip(running, evidence, strict=True):
            request.deaths += told and lost
            self.interrupt(request, error, lost=lost, alone=alone)
        for request in list(worker.ended.values()):
            client = request.client
            here = client is not None and self.clients.get(client.routing_id) is client
            if request.end_held and here:
                self.interrupt(request, error, lost=False)  # it had left its slot
            else:
                self.release(request)
                self.forget(request)
        for model in worker.models:
            if not self.registry.serving(model):
                self.at(self.now_s + self.settings.model_grace_s, admission.on_model_grace, model)
        self.dirty.update(worker.models)
        self.log("info", "worker left", worker, why=why, lost=lost)

    def interrupt(
        self, request: RequestState, error: ErrorInfo, *, lost: bool, alone: bool = False
    ) -> None:
        """The worker of a running request is gone or gave it up: tell the client, keep its age.
        `alone`: it died, and ran nothing else."""
        client, worker = request.client, request.worker
        self.release(request)
        self.counters["interrupted"] += 1
        if client is not None:
            body = Interrupted(
                epoch=request.epoch,
                worker=request.worker_name,
                lost=lost,
                alone=alone,
                error=error,
            )
            self.send(client, MessageType.INTERRUPTED, request.id, codec.encode(body))
            request.client = None
            request.phase = Phase.INTERRUPTED
            request.outcome = "interrupted"
            if lost:
                request.lost_workers += (request.worker_name,)
            if alone:
                request.lost_alone += (request.worker_name,)
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
            body = admission.read_body(self, client, head, frames, resumed=False)
            request = RequestState(head.id, body.model, Phase.QUEUED, self.now_s)
            request.order = next(self.numbers)
            self.enqueue(client, request, body, frames[1:])
        except RequestError as error:
            admission.fail_unqueued(self, client, head, frames, error)

    def enqueue(
        self, client: ClientSession, request: RequestState, body: Request, frames: Frames
    ) -> None:
        """Put a request into its model's queue, from where `_dispatch` takes it. Raises
        RequestError when it cannot be queued. `frames`: body and attachments."""
        request.client = client
        request.kind = body.kind.value
        request.priority = body.priority
        request.user_key = f"user {body.user}" if body.user else f"session {client.id.hex()}"
        request.window = request.window_told = body.window
        request.frames = frames
        request.size_bytes = sum(map(len, frames))
        if body.resume is not None:
            request.epoch = body.resume.epoch
            request.offset = len(body.resume.token_ids)
            request.holder = body.resume.holder
        if self.settings.placement == "affinity":
            request.prefix_key = placement.prefix_key(body)
        queue_s = self.settings.queue_s if body.queue_ms is None else body.queue_ms / 1000
        ttl_s = self.settings.ttl_s if body.ttl_ms is None else body.ttl_ms / 1000
        request.queue_until_s = self.now_s + queue_s
        request.ttl_until_s = self.now_s + ttl_s
        admission.admit(self, client, request)
        self.requests[request.id] = request
        client.requests[request.id] = request
        queue = self.queues.setdefault(request.model, ModelQueue())
        queue.add(request)
        self.queued_bytes += request.size_bytes
        self.counters["requests"] += 1
        self.counters["request_bytes"] += request.size_bytes
        self.dirty.add(request.model)
        self._dispatch()
        if request.phase is Phase.QUEUED and self.requests.get(request.id) is request:
            self.at(
                min(request.queue_until_s, request.ttl_until_s), admission.on_queue_timer, request
            )
            if not self.registry.serving(request.model):
                self.at(
                    self.now_s + self.settings.model_grace_s,
                    admission.on_model_grace,
                    request.model,
                )
            if dispatch.awaits_worker(self, request):
                settled_s = self.started_s + self.settings.settle_s
                self.at(settled_s, dispatch.on_settled, request.model)
            accepted = Accepted(position=queue.position(request))
            self.send(client, MessageType.ACCEPTED, request.id, codec.encode(accepted))
            self.log_request("debug", "queued", request, position=accepted.position)

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

    def cancel(self, request: RequestState, reason: str) -> None:
        """Cancel a request wherever it is. What is answered depends on where it was."""
        if request.worker is None:
            if request.client is not None:
                self.send_events(
                    request.client, _cancelled(request.id, request.epoch, request.offset)
                )
            self._close(request, "cancelled")
            return
        if request.phase is Phase.ENDED and not request.end_held:
            return  # its END crossed the CANCEL
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
        if request.phase is Phase.ENDED:
            self.keep(request)  # somebody still reads
        if request.worker is not None:
            self.send(request.worker, MessageType.WINDOW, head.id, frames[1])

    def _on_query(self, client: ClientSession, head: Header, frames: Frames) -> None:
        queries.answer(self, client, head, frames)

    def _on_client_goodbye(self, client: ClientSession, head: Header, frames: Frames) -> None:
        goodbye = self._control(Goodbye, frames)
        # Who leaves because of a broken session comes back for its streams.
        cancel = goodbye.reason != ErrorCode.PROTOCOL_ERROR
        self.drop_client(client, f"goodbye: {goodbye.reason}", cancel=cancel)

    def _on_client_heartbeat(self, client: ClientSession, head: Header, frames: Frames) -> None:
        self._control(Heartbeat, frames)

    def _dispatch(self) -> None:
        """Give what waits to who is free, and tell workers that other brokers use too."""
        dispatch.run(self)
        if self.shared:
            membership.tell_demand(self)

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
            self.counters["output_forwarded"] += 1
            self.counters["output_bytes"] += len(body)
            self.send(route.client, MessageType.OUTPUT, route.id, body)
            route.client.sources[-1] = worker
        else:
            # Its client is gone, or the worker answers to an earlier session.
            self.counters["output_without_route"] += 1
        if ledger is not None:
            for request_id in ledger.started:
                request = worker.running.get(request_id)
                if request is not None and request.started_s is None:
                    request.started_s = self.now_s
                    suspicion.on_started(self, request)
                    self.figures.started(request, self.now_s)
            told = causes.told_in(frames[1], ledger.finished)
            for finished in ledger.finished:
                # Without a route it is about requests that nobody receives; one that was attached
                # meanwhile is replayed, and named again with its end.
                if head.id != header.NO_ID or not self._awaited(worker, finished.request_id):
                    self._finish(worker, finished, told.get(finished.request_id, ""))
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
        request.phase = Phase.ENDED
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
        self._dispatch()  # what waits here goes first
        membership.give_back(self, worker, credit.recalled)

    def _on_worker_heartbeat(self, worker: WorkerSession, head: Header, frames: Frames) -> None:
        beat = self._control(Heartbeat, frames)
        worker.beat = beat
        if beat.models is not None:
            gone = set(worker.models).difference(model.name for model in beat.models)
            self.registry.change_models(worker, beat.models, self.now_s)
            for model in gone:
                self.at(self.now_s + self.settings.model_grace_s, admission.on_model_grace, model)
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
        membership.judge_engine(self, worker, beat.engine_age_ms / 1000)
        self.dirty.update(worker.models)

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
        code = ErrorCode.WORKER_LOST if lost else ErrorCode.DRAINING
        self.drop_worker(worker, why[:200], lost=lost, told=True, code=code)

    # --- the end of a request ---------------------------------------------------------------------

    def fail(self, request: RequestState, error: RequestError) -> None:
        """End a request that the broker holds with a FAIL."""
        self._fail_with(request, error.info)

    def _fail_with(self, request: RequestState, info: ErrorInfo) -> None:
        self.count_failure(info)
        request.cause = causes.in_words(info)
        if request.client is not None:
            event = FailEvent(request.id, request.epoch, request.offset, info)
            self.send_events(request.client, event)
        self._close(request, info.code[:64])

    def _close(self, request: RequestState, outcome: str) -> None:
        self.release(request)
        request.outcome = outcome
        if request.ended_s is None:
            served = bool(self.registry.serving(request.model))
            self.figures.ended(request, outcome, self.now_s, served=served)
        self.forget(request)
        self.log_request("info", "ended", request, outcome=outcome)

    def _control(self, type_: type[T], frames: Frames) -> T:
        if len(frames) != 2:
            raise ProtocolError(f"{len(frames)} frames; this message has 2")
        return codec.decode(type_, frames[1], limits.MAX_CONTROL_OCTETS)


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
