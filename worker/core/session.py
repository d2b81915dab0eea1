"""The worker's side of the bus, sans-IO: engine state, credit, drain and every broker's session.

`WorkerCore.handle(event, now_s)` takes an event and returns instructions. One core serves several
brokers from one pool of slots. The main path: ASSIGN makes a stream and a job for the engine
(`requests`); each step of the engine is sent as one OUTPUT per client session; the end of a job
frees its slot, which is granted again (SPEC.md sections 6 and 7). Requests outlive sessions: those
of a lost session keep running for the grace period, and a client that resumes one gets it from the
requested offset. Must never touch a socket, a clock, a process or a log.
"""

from __future__ import annotations

import logging
import math
import random
from typing import Any

from msgspec import Struct

from broker.peer.connection import BeatDue, Ended, State
from broker.protocol import codec
from broker.protocol.errors import ErrorCode, ErrorInfo, ProtocolError
from broker.protocol.header import Header, MessageType
from broker.protocol.limits import (
    MAX_CONTROL_BYTES,
    MAX_HELD_REQUESTS,
    MAX_REQUEST_BYTES,
    MAX_SECONDS,
)
from broker.protocol.messages import (
    Assign,
    Cancel,
    Credit,
    Drain,
    Heartbeat,
    Hello,
    Reject,
    Request,
    Welcome,
    Window,
    WorkerState,
)
from worker.core import events
from worker.core.connection import Connection
from worker.core.credit import CreditPool
from worker.core.instructions import (
    CloseSocket,
    EngineLoad,
    Exit,
    Instruction,
    Log,
    OpenSocket,
    RestartEngine,
    Send,
)
from worker.core.offer import Offer
from worker.core.requests import Requests
from worker.core.settings import Settings
from worker.engines.base import Capabilities


class WorkerCore:
    """Everything of the worker except sockets and processes."""

    def __init__(
        self, settings: Settings, now_s: float, generator: random.Random | None = None
    ) -> None:
        self._settings = settings
        self._random = generator or random.SystemRandom()
        self._connections = [
            Connection(index, address, self._random, now_s)
            for index, address in enumerate(settings.brokers)
        ]
        # Engine.
        self._state = WorkerState.LOADING
        self._offer = Offer(settings.models)
        self._metrics: dict[str, float] = {}
        #: When the engine last finished a step, or got its first job after being idle.
        self._mark_s = now_s
        self._requests = Requests(
            self._connections,
            settings.grace_s,
            settings.kept_s,
            settings.window_wait_s,
            tell_windows=settings.relay,
        )
        self._credit = CreditPool(self._connections)
        # Stopping.
        self._drain_until_s = math.inf
        #: When the worker must have left, and why; infinity: no end is known.
        self._ends_s = math.inf
        self._end_why = ""
        self._exited = False
        # State of the current call.
        self._out: list[Instruction] = []
        #: What `deadline_s` last returned: a much later Tick means that this process was suspended.
        self._tick_due_s = math.inf

    # --- interface --------------------------------------------------------------------------------

    def handle(self, event: events.Event, now_s: float) -> list[Instruction]:
        """Take an event; returns instructions, to be carried out in order."""
        if self._exited:
            return []
        out: list[Instruction] = []
        self._out = self._requests.out = out
        match event:
            case events.EngineStepped():
                self._mark_s = now_s
                self._requests.stepped(event.events, now_s)
            case events.MessageReceived():
                self._received(event, now_s)
            case events.Tick():
                self._tick(now_s)
            case events.Connected():
                self._connected(self._connections[event.broker], now_s)
            case events.Disconnected():
                connection = self._connections[event.broker]
                if connection.has_socket:
                    self._lose(connection, Ended(event.reason, event.refused), now_s)
            case events.SendBlocked():
                connection = self._connections[event.broker]
                connection.blocked = True
                self._log("broker reads slowly", connection, level=logging.DEBUG)
            case events.SendUnblocked():
                connection = self._connections[event.broker]
                connection.blocked = False
                self._requests.unblocked(connection, now_s)
            case events.EngineLoading():
                self._offer.loading(event)
            case events.EngineReady() | events.EngineChanged():
                self._engine_ready(event.capabilities, now_s)
            case events.LoadRefused(model, message):
                self._offer.refused(model, message)
            case events.EngineMeasured():
                self._metrics = event.metrics
            case events.EngineLost():
                self._engine_lost("engine_dead", event.message, now_s)
            case events.StopRequested():
                self._stop_requested(event.reason, now_s)
            case events.EndKnown():
                self._end_known(event.ends_s, event.why, now_s)
            case events.WorkerFailed():
                if self._offer.given_up(event.message):
                    for connection in self._connections:
                        if connection.open:
                            self._beat(connection, now_s, tell=True)
                self._leave("engine_dead", event.message, 1, now_s)
        self._settle(now_s)
        return out

    def deadline_s(self) -> float:
        """When a `Tick` is due, seconds of the monotonic clock; `math.inf` for never."""
        due_s = min(connection.deadline_s() for connection in self._connections)
        due_s = min(due_s, self._requests.deadline_s(), self._leaves_s())
        if self._requests.engine_busy:
            due_s = min(due_s, self._mark_s + self._settings.stall_s)
        self._tick_due_s = due_s
        return due_s

    @property
    def running(self) -> int:
        """Number of requests that occupy a slot."""
        return self._requests.slots_taken

    @property
    def capacity(self) -> int:
        """Slots of the engine; 0 until it is loaded."""
        return self._offer.capacity

    def invariants(self) -> None:
        """Raise AssertionError if the state contradicts itself."""
        self._requests.invariants()
        unused = sum(c.credit.unused for c in self._connections if c.open)
        # A relay may for a moment have granted slots that it has just lost to others.
        fixed = not self._settings.relay
        loaded = self._offer.capabilities is not None
        if fixed and loaded and self._state is not WorkerState.LOADING:
            assert self.running + unused <= self.capacity, (
                f"{self.running} running and {unused} granted of {self.capacity} slots"
            )
        for connection in self._connections:
            credit = connection.credit
            assert credit.unused >= 0, f"credit {credit.unused} at {connection.index}"
            assert credit.announced <= credit.granted

    # --- timers -----------------------------------------------------------------------------------

    def _tick(self, now_s: float) -> None:
        late_s = now_s - self._tick_due_s
        if late_s > 1.0:
            # This process was suspended, so it did not see the engine's steps.
            self._mark_s += late_s
        for connection in self._connections:
            self._tick_connection(connection, now_s)
        self._requests.tick(now_s)
        if self._requests.engine_busy and now_s >= self._mark_s + self._settings.stall_s:
            message = f"the engine finished no step for {now_s - self._mark_s:.0f} s"
            self._out.append(RestartEngine(message))
            self._engine_lost("stalled", message, now_s)
        if now_s >= self._leaves_s():
            over = "the time allowed for draining is over"
            why = over if now_s >= self._drain_until_s else self._end_why
            self._leave("drained", why, 0, now_s)

    def _tick_connection(self, connection: Connection, now_s: float) -> None:
        if connection.state is State.WAITING:
            if now_s >= connection.address.from_s:
                connection.dial(connection.address, now_s)
                self._out.append(OpenSocket(connection.index))
            return
        match connection.tick(now_s):
            case BeatDue():
                self._beat(connection, now_s)
            case Ended() as ended:
                self._lose(connection, ended, now_s)

    # --- sessions ---------------------------------------------------------------------------------

    def _connected(self, connection: Connection, now_s: float) -> None:
        if connection.state is not State.CONNECTING:
            return
        settings, capabilities = self._settings, self._offer.capabilities
        holds = self._requests.holds()[-MAX_HELD_REQUESTS:]
        connection.held = {held.request_id for held in holds if held.running}
        hello = Hello(
            role="worker",
            name=settings.name,
            software=settings.software,
            models=self._offer.models,
            capacity=self.capacity,
            speed=settings.speed,
            engine=capabilities.engine if capabilities else settings.engine,
            device=capabilities.device if capabilities else settings.device,
            holds=holds,
            brokers=len(settings.brokers) + settings.relay,
            instance=settings.instance,
            ends_in_ms=self._ends_in_ms(now_s),
            ends_why=self._end_why,
            failed=self._offer.failed(now_s),
        )
        self._out.append(Send(connection.index, connection.greet(hello, now_s)))

    def _lose(self, connection: Connection, ended: Ended, now_s: float) -> None:
        """End a session, or an attempt to open one; its requests live on."""
        was_open = connection.open
        self._out.append(CloseSocket(connection.index))
        self._requests.orphan(connection, now_s)
        wait_s = connection.end(ended, now_s)
        cause = ended.reason
        if ended.error is not None:
            cause = f"refused: {cause} ({ended.error.code})"
        if was_open:
            held = self._requests.orphans()
            self._log(
                "broker lost", connection, level=logging.WARNING, cause=cause, requests_held=held
            )
        elif not connection.told_absent:
            level = logging.WARNING if ended.refused else logging.INFO
            self._log("broker absent", connection, level=level, cause=cause, retrying="yes")
        else:
            self._log("broker absent", connection, level=logging.DEBUG, cause=cause, wait_s=wait_s)
        connection.told_absent = True

    def _part(self, connection: Connection, reason: str, message: str, now_s: float) -> None:
        """Send BYE, if there is a session."""
        if connection.open:
            self._requests.flush(now_s)
            goodbye = connection.goodbye(reason, message, now_s)
            self._out.append(Send(connection.index, goodbye))

    def _beat(self, connection: Connection, now_s: float, *, tell: bool = False) -> None:
        """Send a HEARTBEAT. `tell`: with the models, even if they have not changed."""
        busy = self._requests.engine_busy
        loading = self._state is WorkerState.LOADING
        capabilities = self._offer.capabilities
        tell = tell or (not connection.models_told and capabilities is not None)
        connection.models_told |= tell
        heartbeat = Heartbeat(
            state=self._state,
            running=self.running,
            waiting=int(self._metrics.get("waiting", 0)),
            granted=connection.credit.announce(),
            engine_age_ms=max(0, int((now_s - self._mark_s) * 1000)) if busy else 0,
            progress=self._offer.progress(loading=loading),
            note=self._offer.note(loading=loading)[:500],
            metrics=self._metrics,
            models=self._offer.models if tell else None,
            failed=self._offer.failed(now_s) if tell else [],
            capacity=self.capacity if tell else None,
            engine=capabilities.engine if tell and capabilities else None,
            device=capabilities.device if tell and capabilities else None,
            ends_in_ms=self._ends_in_ms(now_s),
            ends_why=self._end_why,
        )
        self._send(connection, MessageType.HEARTBEAT, connection.session, heartbeat, now_s)

    def _send(
        self, connection: Connection, type_: MessageType, id_: bytes, body: Struct, now_s: float
    ) -> None:
        self._out.append(Send(connection.index, connection.message(type_, id_, body, now_s)))

    # --- messages ---------------------------------------------------------------------------------

    def _received(self, event: events.MessageReceived, now_s: float) -> None:
        connection = self._connections[event.broker]
        if not connection.has_socket:
            return
        try:
            match connection.receive(event.frames, now_s):
                case Header() as head:
                    self._message(connection, head.type, head.id, event.frames, now_s)
                case Welcome() as welcome:
                    self._opened(connection, welcome, now_s)
                case Ended(error=ErrorInfo() as error, fatal=True):
                    self._refused_for_good(connection, error, now_s)
                case Ended() as ended:
                    self._lose(connection, ended, now_s)
        except ProtocolError as error:
            self._part(connection, "protocol_error", str(error), now_s)
            self._lose(connection, Ended.by_protocol_error(error), now_s)

    def _opened(self, connection: Connection, welcome: Welcome, now_s: float) -> None:
        connection.told_absent = False
        self._requests.tell_ended(connection)
        self._log("broker connected", connection, broker=welcome.broker)
        self._beat(connection, now_s)

    def _refused_for_good(self, connection: Connection, error: ErrorInfo, now_s: float) -> None:
        self._out.append(CloseSocket(connection.index))
        self._requests.orphan(connection, now_s)
        connection.close()
        self._log(
            "broker refuses", connection, level=logging.ERROR, cause=error.message, code=error.code
        )
        if all(c.state is State.CLOSED for c in self._connections):
            self._exit(1, f"the broker refuses this worker: {error.message} ({error.code})")

    def _message(
        self,
        connection: Connection,
        type_: MessageType,
        id_: bytes,
        frames: tuple[bytes, ...],
        now_s: float,
    ) -> None:
        body = frames[1]
        match type_:
            case MessageType.HEARTBEAT:
                beat = codec.decode(Heartbeat, body, MAX_CONTROL_BYTES)
                self._credit.heard(connection.credit, beat.waiting, beat.recalled, beat.returned)
                if self._settings.on_demand and (beat.load or beat.unload):
                    self._out.append(EngineLoad(beat.load, tuple(beat.gives_way)))
            case MessageType.ASSIGN:
                if len(frames) < 3:
                    raise ProtocolError("ASSIGN without the client's body")
                assign = codec.decode(Assign, body, MAX_CONTROL_BYTES)
                self._assigned(connection, id_, assign, frames[2], frames[3:], now_s)
            case MessageType.CANCEL:
                codec.decode(Cancel, body, MAX_CONTROL_BYTES)
                self._requests.cancel(connection, id_, now_s)
            case MessageType.WINDOW:
                limit = codec.decode(Window, body, MAX_CONTROL_BYTES).limit
                self._requests.widen(connection, id_, limit, now_s)
            case MessageType.DRAIN:
                drain = codec.decode(Drain, body, MAX_CONTROL_BYTES)
                drain_s = self._settings.drain_s
                if drain.deadline_ms is not None:
                    drain_s = drain.deadline_ms / 1000
                self._drain(drain.reason or "ordered by the broker", drain_s, now_s)
            case _:
                raise ProtocolError(f"{type_.name} is not for a worker")

    # --- requests ---------------------------------------------------------------------------------

    def _assigned(
        self,
        connection: Connection,
        request_id: bytes,
        assign: Assign,
        body: bytes,
        attachments: tuple[bytes, ...],
        now_s: float,
    ) -> None:
        beyond = not assign.attach and not self._credit.spent(connection.credit)
        try:
            request = codec.decode(Request, body, MAX_REQUEST_BYTES)
            if len(request.attachments) != len(attachments):
                raise ProtocolError(
                    f"the request describes {len(request.attachments)} attachments, but "
                    f"{len(attachments)} came"
                )
        except ProtocolError as error:
            code = ErrorCode.INVALID_REQUEST
            self._requests.refuse(connection, request_id, assign, code, str(error))
            return
        requests = self._requests
        stream = requests.streams.get(request_id)
        renounced = False
        if stream is not None:
            if assign.epoch < stream.epoch:
                message = "a later epoch of the request is already running here"
                self._reject(connection, request_id, ErrorCode.DUPLICATE_REQUEST, message, now_s)
                return
            if stream.cancelled:
                # It was moved away and now comes back: what is left of that run is not an answer.
                requests.drop_cancelled(connection, stream)
            elif not stream.retryable and requests.resume(
                connection, stream, assign, request, now_s
            ):
                return
            else:
                # What is held here is not what this client has: run it again from what it has.
                renounced = requests.renounce(connection, stream)
        if not renounced:
            refusal = self._refusal(assign, beyond, request.model)
            if refusal is not None:
                code, message, retryable = refusal
                self._reject(connection, request_id, code, message, now_s, retryable)
                return
        if not requests.engine_busy:
            self._mark_s = now_s
        requests.start(connection, request_id, assign, request, body, attachments, now_s)

    def _refusal(
        self, assign: Assign, beyond: bool, model: str
    ) -> tuple[ErrorCode, str, bool] | None:
        """Why a new request cannot be started here: (code, message, retryable), or None."""
        name = self._settings.name
        if self._state is WorkerState.DRAINING:
            return ErrorCode.DRAINING, f"worker {name} is draining; send it elsewhere", True
        if assign.attach:
            return ErrorCode.WORKER_LOST, f"worker {name} no longer holds the request", True
        refusal = self._offer.refusal(name, model)
        if refusal is not None:
            return refusal
        if beyond:
            return ErrorCode.OVERLOADED, f"worker {name} granted no slot for this request", True
        return None

    def _reject(
        self,
        connection: Connection,
        request_id: bytes,
        code: ErrorCode,
        message: str,
        now_s: float,
        retryable: bool = False,
    ) -> None:
        """Send REJECT, which also returns the credit at once if there is a slot for it."""
        self._distribute(now_s)
        error = ErrorInfo(code=code.value, message=message, retryable=retryable)
        reject = Reject(error=error, granted=connection.credit.announce())
        self._send(connection, MessageType.REJECT, request_id, reject, now_s)
        self._log(
            "request rejected", connection, level=logging.DEBUG, cause=message, code=code.value
        )

    # --- credit -----------------------------------------------------------------------------------

    def _distribute(self, now_s: float) -> None:
        if self._state is WorkerState.READY:
            slots = max(0, self.capacity - self.running)
            self._credit.recall(slots)
            self._credit.distribute(slots)

    def _settle(self, now_s: float) -> None:
        """After every event: grant free slots, send what is ready, leave once everything is
        done."""
        if self._exited:
            return
        self._distribute(now_s)
        self._requests.flush(now_s)
        for connection in self._connections:
            account = connection.credit
            if connection.open and account.untold:
                credit = Credit(granted=account.announce(), recalled=account.ask_back())
                self._send(connection, MessageType.CREDIT, connection.session, credit, now_s)
        if self._state is WorkerState.DRAINING and not self._requests.unfinished:
            self._leave("drained", "", 0, now_s)

    # --- engine and end ---------------------------------------------------------------------------

    def _engine_ready(self, capabilities: Capabilities, now_s: float) -> None:
        self._offer.ready(capabilities)
        if not self._settings.relay:
            batched = (model.name for model in capabilities.models if not model.serial)
            self._requests.batched = frozenset(batched)
        if self._state is WorkerState.LOADING:
            self._state = WorkerState.READY
        for connection in self._connections:
            connection.models_told = False
            if connection.open:
                self._beat(connection, now_s)

    def _engine_lost(self, reason: str, message: str, now_s: float) -> None:
        """Leave all brokers: running requests are lost, ended ones can still be resumed."""
        self._requests.engine_lost()
        self._offer.lost()
        self._metrics = {}
        for connection in self._connections:
            if connection.open:
                self._part(connection, reason, message, now_s)
                self._out.append(CloseSocket(connection.index, linger=True))
                self._requests.orphan(connection, now_s)
                connection.end(Ended(message), now_s)
        if self._state is WorkerState.DRAINING:
            self._exit(1, f"the engine was lost while draining: {message}")
        self._state = WorkerState.LOADING

    def _stop_requested(self, reason: str, now_s: float) -> None:
        if self._state is WorkerState.DRAINING:
            self._leave("drained", "stopped by a second signal", 0, now_s)
        elif self._state is WorkerState.LOADING:
            self._leave("drained", reason, 0, now_s)
        else:
            self._drain(reason, self._settings.drain_s, now_s)

    def _end_known(self, ends_s: float, why: str, now_s: float) -> None:
        """Tell all brokers, which then move requests that would not end in time."""
        self._ends_s, self._end_why = ends_s, why[:200]
        known = ends_s < math.inf
        fields: dict[str, Any] = {"cause": why}
        if known:
            fields["in_s"] = round(ends_s - now_s, 1)
        self._out.append(Log("end known" if known else "end no longer known", fields))
        for connection in self._connections:
            if connection.open:
                self._beat(connection, now_s)

    def _gone_s(self) -> float:
        """When the worker will be gone, as far as is known."""
        return min(self._ends_s, self._drain_until_s)

    def _leaves_s(self) -> float:
        """When the worker leaves by itself. A relay stays: other workers may join its bus."""
        return self._drain_until_s if self._settings.relay else self._gone_s()

    def _ends_in_ms(self, now_s: float) -> int | None:
        left_s = self._gone_s() - now_s
        # An end that is further away than can be said, such as the year 9999, is none.
        return None if left_s > MAX_SECONDS else max(0, int(left_s * 1000))

    def _drain(self, reason: str, drain_s: float, now_s: float) -> None:
        if self._state is WorkerState.DRAINING:
            self._drain_until_s = min(self._drain_until_s, now_s + drain_s)
            return
        if self._state is WorkerState.LOADING:
            self._leave("drained", reason, 0, now_s)
            return
        self._state = WorkerState.DRAINING
        self._drain_until_s = now_s + drain_s
        self._out.append(
            Log(
                "draining",
                {
                    "cause": reason,
                    "running": self.running,
                    "within_s": drain_s,
                    "hint": "a second signal ends it at once",
                },
            )
        )
        for connection in self._connections:
            if connection.open:
                drain = Drain(reason=reason[:500], deadline_ms=int(drain_s * 1000))
                self._send(connection, MessageType.DRAIN, connection.session, drain, now_s)
                self._beat(connection, now_s)

    def _leave(self, reason: str, message: str, code: int, now_s: float) -> None:
        for connection in self._connections:
            self._part(connection, reason, message, now_s)
            if connection.has_socket:
                self._out.append(CloseSocket(connection.index, linger=True))
        self._exit(code, message if code else "")

    def _exit(self, code: int, message: str) -> None:
        if not self._exited:
            self._exited = True
            self._out.append(Exit(code, message))

    # --- log --------------------------------------------------------------------------------------

    def _log(
        self, event: str, connection: Connection, level: int = logging.INFO, **fields: Any
    ) -> None:
        address = self._settings.brokers[connection.index]
        self._out.append(Log(event, {"address": address, **fields}, level))
