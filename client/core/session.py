"""The client's side of the protocol, sans-IO: events in, instructions out.

`handle(event, now_s)` takes an event and returns the instructions that follow; `deadline_s()` says
when the next `Tick` is due. No sockets, clocks, threads or logs; randomness is injected. This
module only directs: `connection` finds and keeps a broker, `requests` and `queries` hold what the
application has asked for.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from broker.peer.connection import State
from broker.protocol import codec, limits, messages
from broker.protocol.errors import ErrorCode, ErrorInfo, ProtocolError
from broker.protocol.header import MessageType
from client.core import events
from client.core.connection import BrokerConnection
from client.core.events import Deliver, Instruction, Item
from client.core.queries import Queries
from client.core.requests import Requests
from client.errors import BusError, ClientClosed, error_from
from client.options import Limits

LEAVE_S: Final = 1.0
"""How long a closing client waits for its cancels to be confirmed: about one step of a worker."""


class ClientSession:
    """The state of one client: its brokers, session and open requests."""

    def __init__(
        self,
        brokers: Sequence[str],
        *,
        name: str,
        software: str = "",
        client_limits: Limits | None = None,
        generator: random.Random | None = None,
    ) -> None:
        generator = generator or random.SystemRandom()
        hello = messages.Hello(role="client", name=name, software=software, waits=True)
        self._broker = BrokerConnection(brokers, hello, self, self._emit, generator)
        self._requests = Requests(
            self._broker, self._emit, self._timer, client_limits or Limits(), generator
        )
        self._queries = Queries(
            self._broker,
            answer=self._deliver,
            timer=self._timer,
            no_broker=self._requests.no_broker,
        )
        #: Set when no broker is left that would accept this client.
        self._fatal: BusError | None = None

        #: (due, id) of requests, queries and `closing` ids; stale entries are skipped.
        self._timers: list[tuple[float, bytes]] = []

        #: Set once the application has closed the client: when to leave at the latest.
        self._leaving_s: float | None = None
        self._now_s = 0.0
        self._out: list[Instruction] = []
        self._handlers: dict[type[events.Event], Callable[[Any], None]] = {
            events.MessageReceived: self._on_message,
            events.TokensTaken: self._requests.taken,
            events.RequestMade: self._on_request,
            events.RequestDropped: self._on_dropped,
            events.QueryMade: self._on_query,
            events.Tick: self._on_tick,
            events.SocketOpened: lambda _: self._broker.opened(),
            events.SocketLost: self._on_lost,
            events.CloseRequested: self._on_close,
        }
        self._message_handlers: dict[MessageType, Callable[[bytes, bytes], None]] = {
            MessageType.OUTPUT: self._requests.on_output,
            MessageType.ACCEPTED: self._requests.on_accepted,
            MessageType.INTERRUPTED: self._requests.on_interrupted,
            MessageType.ANSWER: self._on_answer,
            MessageType.DRAIN: self._on_drain,
        }

    # --- the two entry points ---------------------------------------------------------------------

    def handle(self, event: events.Event, now_s: float) -> list[Instruction]:
        """Take an event; return the instructions to carry out, in order. `now_s` is monotonic."""
        self._now_s = self._broker.now_s = now_s
        self._handlers[type(event)](event)
        if self._requests.held or self._requests.default_model.waiting:
            self._requests.dispatch()
        if self._leaving_s is not None:
            self._leave_if_done(self._leaving_s)
        elif self._broker.draining:
            self._move_on()
        out, self._out = self._out, []
        return out

    def _move_on(self) -> None:
        """Leave a draining broker once nothing runs there, or once a new request could go to
        another: running streams are then resumed through that one, at the worker that holds
        them."""
        waiting = self._requests.held or self._requests.default_model.waiting
        if not self._requests.at_broker or (waiting and self._broker.alternative):
            self._broker.move_on(cancel=not self._requests.at_broker)

    def deadline_s(self) -> float:
        """When the next `Tick` is due; `inf` for never."""
        timer_s = self._timers[0][0] if self._timers else math.inf
        leaving_s = math.inf if self._leaving_s is None else self._leaving_s
        return min(timer_s, leaving_s, self._broker.deadline_s())

    @property
    def link(self) -> State:
        """The state of the session."""
        return self._broker.state

    @property
    def open_requests(self) -> int:
        """How many requests have not ended."""
        return len(self._requests.exchanges)

    # --- the application's side -------------------------------------------------------------------

    def _on_request(self, made: events.RequestMade) -> None:
        refusal = self._refusal()
        if refusal is not None:
            self._deliver(made.request_id, refusal)
            return
        self._requests.made(made)
        self._broker.want()

    def _on_query(self, made: events.QueryMade) -> None:
        refusal = self._refusal()
        if refusal is not None:
            self._deliver(made.query_id, refusal)
            return
        self._queries.made(made)
        self._broker.want()

    def _on_dropped(self, dropped: events.RequestDropped) -> None:
        self._requests.dropped(dropped.request_id)
        self._queries.forget(dropped.request_id)

    def _on_close(self, _: events.CloseRequested) -> None:
        if self._leaving_s is not None or self._broker.state is State.CLOSED:
            return
        self._leaving_s = self._now_s + LEAVE_S
        why = ClientClosed("the client was closed while this was open; make a new Client")
        self._requests.close(why)
        self._queries.fail_all(why)
        self._timers.clear()

    def _leave_if_done(self, leaving_s: float) -> None:
        """Leave once the cancels are confirmed. Messages that the broker has not read when the
        connection ends may be lost."""
        if not self._requests.closing or not self._broker.has_session or self._now_s >= leaving_s:
            self._requests.closing.clear()
            self._leaving_s = None
            self._broker.close()

    def _refusal(self) -> BusError | None:
        if self._leaving_s is not None or self._broker.state is State.CLOSED:
            return ClientClosed("this client is closed; make a new Client")
        return self._fatal

    # --- the connection's side (`connection.Host`) ------------------------------------------------

    def _on_lost(self, lost: events.SocketLost) -> None:
        if lost.unauthenticated:
            code = ErrorCode.UNAUTHENTICATED.value
            self._broker.banned(ErrorInfo(code=code, message=lost.reason))
        else:
            self._broker.cut_off(lost.reason)

    def wants_session(self) -> bool:
        """Whether anything open needs a broker."""
        open_ = bool(self._requests.exchanges or self._queries or self._requests.closing)
        return open_ and self._leaving_s is None

    def session_began(self) -> None:
        """Cancel what was dropped while there was no session, then send held requests."""
        self._requests.session_began()
        self._queries.session_began()
        self._requests.dispatch()
        for exchange in self._requests.held.values():
            self._requests.schedule(exchange)  # a different limit applies now

    def refused_for_good(self, error: ErrorInfo) -> None:
        """Fail everything, now and later: a refused client MUST NOT reconnect unchanged."""
        self._fatal = error_from(error)
        self._requests.closing.clear()
        self._requests.fail_all(self._fatal)
        self._queries.fail_all(self._fatal)

    def session_over(self, story: str) -> None:
        """Recover the requests at the broker."""
        error = ErrorInfo(code=ErrorCode.CONNECTION_LOST.value, message=story, retryable=True)
        self._requests.session_over(error)
        self._queries.session_over(error)

    # --- time -------------------------------------------------------------------------------------

    def _on_tick(self, _: events.Tick) -> None:
        self._broker.tick()
        while self._timers and self._timers[0][0] <= self._now_s:
            due_s, id_ = heapq.heappop(self._timers)
            if id_ in self._queries:
                self._queries.due(id_)
            else:
                self._requests.on_timer(due_s, id_)

    def _timer(self, due_s: float, id_: bytes) -> None:
        if due_s != math.inf:
            heapq.heappush(self._timers, (due_s, id_))

    def _emit(self, instruction: Instruction) -> None:
        self._out.append(instruction)

    def _deliver(self, id_: bytes, item: Item) -> None:
        """Deliver the only item of a request or query, which ends it."""
        self._out.append(Deliver(id_, (item,), final=True))

    # --- messages ---------------------------------------------------------------------------------

    def _on_message(self, event: events.MessageReceived) -> None:
        try:
            message = self._broker.read(event.frames)
            if message is not None:
                type_, id_, body = message
                handler = self._message_handlers.get(type_)
                if handler is None:
                    raise ProtocolError(f"a client does not take {type_.name} at this point")
                handler(id_, body)
        except ProtocolError as error:
            self._broker.leave(error)

    def _on_drain(self, _id: bytes, _body: bytes) -> None:
        self._requests.wait_anew()

    def _on_answer(self, query_id: bytes, body: bytes) -> None:
        answer = codec.decode(messages.Answer, body, limits.MAX_ANSWER_BYTES)
        if not self._requests.on_answer(query_id, answer):
            self._queries.answered(query_id, answer)

    # --- for tests and simulation -----------------------------------------------------------------

    def invariants(self) -> None:
        """Raise AssertionError, naming the request, if the state contradicts itself."""
        self._requests.invariants()
        if self._requests.at_broker:
            assert self._broker.has_session, f"no session: {self._broker.state}"
        if self._broker.state is State.IDLE:
            assert not self.wants_session(), "idle although something is open"
