"""The client's side of the protocol, sans-IO: facts in, orders out.

`handle(event, now_s)` takes one fact and returns the orders that follow; `deadline_s()` says when
it wants a `Tick`. No socket, clock, thread or log; randomness is injected. Here are requests,
windows and the check of offsets (SPEC.md 6.1, 6.3), cancelling (6.2), RESUME (6.4), queries and
time limits; `dialer` keeps the connection, `exchange` what is known of one request.

A request is in `_exchanges` from the call to its END, FAIL or exception, wherever it runs. What
the application has dropped is in `_closing` until the bus confirms it, so that a cancel survives a
lost session.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from broker.peer.connection import State
from broker.protocol import codec, limits, messages
from broker.protocol.errors import ErrorCode, ErrorInfo, ProtocolError
from broker.protocol.header import MessageType
from broker.protocol.messages import (
    EndEvent,
    FailEvent,
    FinishReason,
    OutputEvent,
    PromptEvent,
    TokensEvent,
)
from client.core import events
from client.core.default_model import Naming
from client.core.dialer import Dialer
from client.core.events import Arrived, Deliver, End, Instruction, Item
from client.core.exchange import NEXT, Acceptance, Exchange, Phase
from client.core.queries import Questions
from client.errors import BusError, ClientClosed, ConnectTimeout, error_from
from client.options import Limits

LEAVE_S: Final = 1.0
"""How long a client that is closed waits for its cancels to be confirmed: one step of a worker."""

CANCEL_KEPT_S: Final = 60.0
"""How long an unconfirmed cancel is remembered: longer than any worker keeps a lost request."""


class ClientSession:
    """State of one client: its brokers, its session, its open requests."""

    def __init__(
        self,
        brokers: Sequence[str],
        *,
        name: str,
        software: str = "",
        client_limits: Limits | None = None,
        generator: random.Random | None = None,
    ) -> None:
        self._random = generator or random.SystemRandom()
        self._client_limits = client_limits or Limits()
        hello = messages.Hello(role="client", name=name, software=software)
        self._dialer = Dialer(brokers, hello, self, self._order, self._random)
        self._questions = Questions(
            self._dialer,
            answer=lambda id_, item: self._deliver(id_, item, final=True),
            timer=self._timer,
            no_broker=self._no_broker,
        )
        #: Set when no broker is left that would accept us.
        self._fatal: BusError | None = None

        self._exchanges: dict[bytes, Exchange] = {}
        #: Of these: HELD with a model name, in the order in which they may go.
        self._held: OrderedDict[bytes, Exchange] = OrderedDict()
        #: HELD until the broker tells which model is the only one.
        self._naming = Naming(self._dialer, self._hold, self._failed)
        #: The query that reports a worker's output, and what is wrong with it; until its answer.
        self._reported: tuple[bytes, str] | None = None
        #: QUEUED or RUNNING.
        self._at_broker: set[bytes] = set()
        #: Dropped here, not yet ended there: until when to remember.
        self._closing: dict[bytes, float] = {}
        #: (due, id) of exchanges, questions and closing ids; stale entries are skipped.
        self._timers: list[tuple[float, bytes]] = []

        #: Set once the application has closed the client: when to go at the latest.
        self._leaving_s: float | None = None
        self._now_s = 0.0
        self._out: list[Instruction] = []
        self._handlers: dict[type[events.Event], Callable[[Any], None]] = {
            events.MessageReceived: self._on_message,
            events.TokensTaken: self._on_taken,
            events.RequestMade: self._on_request,
            events.RequestDropped: self._on_dropped,
            events.QueryMade: self._on_query,
            events.Tick: self._on_tick,
            events.ConnectionOpened: lambda _: self._dialer.opened(),
            events.ConnectionLost: self._on_lost,
            events.CloseRequested: self._on_close,
        }
        self._message_handlers: dict[MessageType, Callable[[bytes, bytes], None]] = {
            MessageType.OUTPUT: self._on_output,
            MessageType.ACCEPTED: self._on_accepted,
            MessageType.INTERRUPTED: self._on_interrupted,
            MessageType.ANSWER: self._on_answer,
            MessageType.DRAIN: self._on_drain,
        }

    # --- the two entrances ------------------------------------------------------------------------

    def handle(self, event: events.Event, now_s: float) -> list[Instruction]:
        """Take a fact; return what is to be done, in order. `now_s` is monotonic seconds."""
        self._now_s = self._dialer.now_s = now_s
        self._handlers[type(event)](event)
        if self._held or self._naming.waiting:
            self._dispatch()
        if self._leaving_s is not None:
            self._leave_if_done(self._leaving_s)
        elif self._dialer.draining:
            self._move_on()
        out, self._out = self._out, []
        return out

    def _move_on(self) -> None:
        """Leave a draining broker once nothing runs there, or something new has somewhere to go:
        a stream that runs is resumed at the next broker, at the worker that holds it."""
        waiting = self._held or self._naming.waiting
        if not self._at_broker or (waiting and self._dialer.alternative):
            self._dialer.move_on(cancel=not self._at_broker)

    def deadline_s(self) -> float:
        """When the next `Tick` is due; `inf`: never."""
        timer_s = self._timers[0][0] if self._timers else math.inf
        leaving_s = math.inf if self._leaving_s is None else self._leaving_s
        return min(timer_s, leaving_s, self._dialer.deadline_s())

    @property
    def link(self) -> State:
        """The state of the session."""
        return self._dialer.state

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._exchanges)

    # --- the application's side -------------------------------------------------------------------

    def _on_request(self, made: events.RequestMade) -> None:
        refusal = self._refusal()
        if refusal is not None:
            self._deliver(made.request_id, refusal, final=True)
            return
        exchange = Exchange(made, self._now_s)
        self._exchanges[made.request_id] = exchange
        self._hold(exchange)
        self._dialer.want()

    def _on_query(self, made: events.QueryMade) -> None:
        refusal = self._refusal()
        if refusal is not None:
            self._deliver(made.query_id, refusal, final=True)
            return
        self._questions.made(made)
        self._dialer.want()

    def _on_taken(self, taken: events.TokensTaken) -> None:
        exchange = self._exchanges.get(taken.request_id)
        if exchange is None or taken.offset <= exchange.taken:
            return
        exchange.taken = taken.offset
        if exchange.id not in self._at_broker:
            return  # RESUME will carry it
        limit = taken.offset + self._window_of(exchange)
        if limit > exchange.window_limit:
            if len(exchange.token_ids) >= exchange.window_limit and exchange.heard_s is not None:
                exchange.heard_s = self._now_s  # only now can the worker go on
            exchange.window_limit = limit
            self._send(MessageType.WINDOW, exchange.id, messages.Window(limit=limit))
            self._schedule(exchange)

    def _on_dropped(self, dropped: events.RequestDropped) -> None:
        exchange = self._exchanges.get(dropped.request_id)
        if exchange is not None:
            self._forget(exchange, "dropped by the application")
        self._questions.forget(dropped.request_id)

    def _on_close(self, _: events.CloseRequested) -> None:
        if self._leaving_s is not None or self._dialer.state is State.CLOSED:
            return
        self._leaving_s = self._now_s + LEAVE_S
        for exchange in self._exchanges.values():
            if exchange.sent_before:
                self._cancel(exchange.id, "the client was closed")
        self._fail_all(ClientClosed("the client was closed while this was open; make a new Client"))
        self._timers.clear()

    def _leave_if_done(self, leaving_s: float) -> None:
        """Go once the cancels are confirmed: what a broker has not read when the connection ends
        may be lost, as it notices the end by its own next message to us."""
        if not self._closing or not self._dialer.has_session or self._now_s >= leaving_s:
            self._closing.clear()
            self._leaving_s = None
            self._dialer.close()

    def _refusal(self) -> BusError | None:
        if self._leaving_s is not None or self._dialer.state is State.CLOSED:
            return ClientClosed("this client is closed; make a new Client")
        return self._fatal

    # --- the connection's side (`dialer.Host`) ----------------------------------------------------

    def _on_lost(self, lost: events.ConnectionLost) -> None:
        if lost.unauthenticated:
            code = ErrorCode.UNAUTHENTICATED.value
            self._dialer.banned(ErrorInfo(code=code, message=lost.reason))
        else:
            self._dialer.cut_off(lost.reason)

    def wants_session(self) -> bool:
        """Something is open that needs a broker."""
        open_ = bool(self._exchanges or self._questions or self._closing)
        return open_ and self._leaving_s is None

    def session_began(self) -> None:
        """Cancel what was dropped meanwhile, then send what is held."""
        for request_id in self._closing:
            body = messages.Cancel(reason="dropped while there was no session")
            self._send(MessageType.CANCEL, request_id, body)
        self._questions.session_began()
        self._dispatch()
        for exchange in self._held.values():
            self._schedule(exchange)  # another limit counts now

    def refused_for_good(self, error: ErrorInfo) -> None:
        """Fail everything, now and later: a client MUST NOT come back unchanged."""
        self._fatal = error_from(error)
        self._closing.clear()
        self._fail_all(self._fatal)

    def session_over(self, story: str) -> None:
        """Recover what was at the broker, by a RESUME in the next session."""
        self._naming.session_over()
        self._reported = None
        error = ErrorInfo(code=ErrorCode.CONNECTION_LOST.value, message=story, retryable=True)
        at_broker, self._at_broker = self._at_broker, set()
        # In the order of their making, not of the set's: runs must be reproducible.
        # The latest first, since each goes to the head of those that are held.
        for exchange in [e for e in reversed(self._exchanges.values()) if e.id in at_broker]:
            self._recover(exchange, error, reconnecting=True)
        for exchange in self._exchanges.values():
            if exchange.phase is Phase.HELD:
                exchange.held_s = self._now_s
                self._schedule(exchange)
        self._questions.session_over(error)

    # --- time -------------------------------------------------------------------------------------

    def _on_tick(self, _: events.Tick) -> None:
        self._dialer.tick()
        while self._timers and self._timers[0][0] <= self._now_s:
            due_s, id_ = heapq.heappop(self._timers)
            self._on_timer(due_s, id_)

    def _timer(self, due_s: float, id_: bytes) -> None:
        if due_s != math.inf:
            heapq.heappush(self._timers, (due_s, id_))

    def _schedule(self, exchange: Exchange) -> None:
        """See to it that the exchange's next limit has an entry; later ones find themselves."""
        due_s = exchange.due_s(self._dialer.ready)
        if due_s < exchange.scheduled_s:
            exchange.scheduled_s = due_s
            heapq.heappush(self._timers, (due_s, exchange.id))

    def _on_timer(self, due_s: float, id_: bytes) -> None:
        exchange = self._exchanges.get(id_)
        if exchange is not None:
            if exchange.scheduled_s == due_s:
                exchange.scheduled_s = math.inf
                self._on_exchange_due(exchange)
        elif id_ in self._questions:
            self._questions.due(id_)
        elif self._closing.get(id_, math.inf) <= self._now_s:
            del self._closing[id_]

    def _on_exchange_due(self, exchange: Exchange) -> None:
        ready = self._dialer.ready
        if exchange.due_s(ready) > self._now_s:
            self._schedule(exchange)  # it had moved
        elif exchange.phase is Phase.BACKING_OFF and exchange.retry_at_s <= self._now_s:
            self._hold(exchange)
        elif (
            exchange.phase is Phase.HELD
            and exchange.phase_due_s(ready) <= self._now_s
            and (not ready or not exchange.request.model)
        ):
            self._end(exchange, self._no_broker(self._now_s - exchange.held_s, exchange))
        else:
            cls, story = exchange.overdue(self._now_s)
            info = ErrorInfo(code=ErrorCode.DEADLINE_EXCEEDED.value, message=story)
            self._end(exchange, self._error(exchange, info, cls))

    def _no_broker(self, waited_s: float, exchange: Exchange | None = None) -> BusError:
        where = " or ".join(self._dialer.brokers)
        story = self._dialer.story()
        because = f" ({story})" if story else ""
        story = (
            f"no broker answered at {where} within {waited_s:.3g} s{because}. Start one with "
            "`python -m broker`, or name its front address: Client('tcp://HOST:5555'), "
            "TOKENBUS_BROKER or --broker"
        )
        info = ErrorInfo(code=ErrorCode.CONNECTION_LOST.value, message=story, retryable=True)
        if exchange is None:
            return error_from(info, cls=ConnectTimeout)
        # Lost in the middle is another matter than never reached.
        return self._error(exchange, info, None if exchange.sent_before else ConnectTimeout)

    # --- requests: sending ------------------------------------------------------------------------

    def _hold(self, exchange: Exchange) -> None:
        exchange.enter(Phase.HELD, self._now_s)
        queue = self._held if exchange.request.model else self._naming.waiting
        queue[exchange.id] = exchange
        if exchange.sent_before and queue is self._held:
            # What runs somewhere is not kept for ever; what was never sent can wait.
            self._held.move_to_end(exchange.id, last=False)
        self._schedule(exchange)

    def _dispatch(self) -> None:
        """Send what is held, as far as the session and its limits allow."""
        if not self._dialer.ready:
            return
        self._naming.ask()
        while self._held and len(self._at_broker) + len(self._closing) < self._inflight_limit():
            id_ = next(iter(self._held))
            self._transmit(self._held.pop(id_))

    def _transmit(self, exchange: Exchange) -> None:
        sent_before = exchange.sent_before
        try:
            window = self._window_of(exchange)
            body = codec.encode(exchange.body(window, self._now_s, self._random))
        except (ValueError, OverflowError, TypeError, RecursionError) as error:
            # One caller's value, such as half of a surrogate pair: the requests of others go on.
            why = f"the request cannot be written: {error}; nothing was sent"
            info = ErrorInfo(code=ErrorCode.INVALID_REQUEST.value, message=why)
            self._end(exchange, self._error(exchange, info), ended=not sent_before)
            return
        excess = exchange.beyond(self._bounds(), len(body))
        if excess is not None:
            self._end(exchange, self._error(exchange, excess), ended=not sent_before)
            return
        type_ = MessageType.RESUME if sent_before else MessageType.REQUEST
        self._at_broker.add(exchange.id)
        exchange.enter(Phase.QUEUED, self._now_s)
        self._dialer.send(type_, exchange.id, body, *exchange.attachments)
        self._schedule(exchange)

    def _bounds(self) -> messages.BusLimits:
        welcome = self._dialer.welcome
        assert welcome is not None, "sent before WELCOME"
        return welcome.limits

    def _inflight_limit(self) -> int:
        own = self._client_limits.inflight
        theirs = max(1, self._bounds().inflight)
        return theirs if own is None else min(own, theirs)

    def _window_of(self, exchange: Exchange) -> int:
        if exchange.window_tokens is not None:
            return exchange.window_tokens
        if self._client_limits.window is not None:
            return self._client_limits.window
        welcome = self._dialer.welcome
        return limits.DEFAULT_WINDOW_TOKENS if welcome is None else welcome.window

    def _send(self, type_: MessageType, id_: bytes, body: msgspec.Struct) -> None:
        self._dialer.send_body(type_, id_, body)

    # --- requests: ending and recovering ----------------------------------------------------------

    def _recover(self, exchange: Exchange, error: ErrorInfo, *, reconnecting: bool = False) -> None:
        """The run is over and the request is not: RESUME it now, later or elsewhere, or give up."""
        running = exchange.phase is Phase.RUNNING
        self._at_broker.discard(exchange.id)
        exchange.failures += 1
        if exchange.failures > exchange.retry.attempts:
            self._end(exchange, self._error(exchange, error))
            return
        exchange.resumed += running
        self._deliver(exchange.id, events.Recovering(error.message, exchange.worker))
        exchange.worker = ""
        delay_s = (error.retry_after_ms or 0) / 1000
        if exchange.failures > 1 or not running:
            delay_s = max(delay_s, self._random.uniform(0.0, exchange.backoff_ceiling_s))
        if reconnecting or delay_s <= 0:
            self._hold(exchange)
            return
        exchange.enter(Phase.BACKING_OFF, self._now_s)
        exchange.retry_at_s = self._now_s + delay_s
        self._schedule(exchange)

    def _failed(self, exchange: Exchange, error: ErrorInfo) -> None:
        """The bus said FAIL: final, unless the policy says to try again."""
        self._at_broker.discard(exchange.id)
        exchange.holder = ""
        if error.retryable and error.code in exchange.retry.codes:
            self._recover(exchange, error)
        else:
            self._end(exchange, self._error(exchange, error), ended=True)

    def _error(
        self, exchange: Exchange, info: ErrorInfo, cls: type[BusError] | None = None
    ) -> BusError:
        return error_from(
            info,
            request_id=exchange.id,
            worker=exchange.worker,
            partial=bool(exchange.token_ids),
            cls=cls,
        )

    def _end(self, exchange: Exchange, item: Item, *, ended: bool = False) -> None:
        self._deliver(exchange.id, item, final=True)
        self._forget(exchange, "given up by the client", ended)

    def _forget(self, exchange: Exchange, why: str, ended: bool = False) -> None:
        """No longer ours. Unless the bus said that it ended, cancel it: it may run somewhere."""
        del self._exchanges[exchange.id]
        self._held.pop(exchange.id, None)
        self._naming.waiting.pop(exchange.id, None)
        self._at_broker.discard(exchange.id)
        if exchange.sent_before and not ended:
            self._cancel(exchange.id, why)

    def _cancel(self, request_id: bytes, why: str) -> None:
        until_s = self._now_s + CANCEL_KEPT_S
        self._closing[request_id] = until_s
        self._timer(until_s, request_id)
        if self._dialer.has_session:
            self._send(MessageType.CANCEL, request_id, messages.Cancel(reason=why))

    def _fail_all(self, error: BusError) -> None:
        for exchange in list(self._exchanges.values()):
            self._deliver(exchange.id, error, final=True)
        self._questions.fail_all(error)
        for table in (self._exchanges, self._held, self._naming.waiting):
            table.clear()
        self._at_broker.clear()

    def _order(self, instruction: Instruction) -> None:
        self._out.append(instruction)

    def _deliver(self, id_: bytes, *items: Item, final: bool = False) -> None:
        self._out.append(Deliver(id_, items, final))

    # --- messages ---------------------------------------------------------------------------------

    def _on_message(self, fact: events.MessageReceived) -> None:
        try:
            message = self._dialer.read(fact.frames)
            if message is not None:
                type_, id_, body = message
                handler = self._message_handlers.get(type_)
                if handler is None:
                    raise ProtocolError(f"{type_.name} is not for a client, or not now")
                handler(id_, body)
        except ProtocolError as error:
            self._dialer.leave(error)

    def _on_drain(self, _id: bytes, _body: bytes) -> None:
        for exchange in (*self._held.values(), *self._naming.waiting.values()):
            exchange.held_s = self._now_s
            self._schedule(exchange)

    def _on_accepted(self, request_id: bytes, body: bytes) -> None:
        accepted = codec.decode(messages.Accepted, body, limits.MAX_CONTROL_BYTES)
        exchange = self._exchanges.get(request_id)
        if exchange is None or request_id not in self._at_broker:
            return
        for name in accepted.returned:
            for names in (exchange.lost_workers, exchange.lost_alone):
                if name in names:
                    names.remove(name)
        if accepted.worker:
            exchange.route = accepted.route
        if not accepted.worker:
            exchange.position = accepted.position
            self._deliver(request_id, events.Queued(accepted.position))
        elif exchange.worker != accepted.worker or exchange.phase is not Phase.RUNNING:
            exchange.worker = exchange.holder = accepted.worker
            self._started(exchange)

    def _started(self, exchange: Exchange) -> None:
        if exchange.phase is not Phase.RUNNING:
            exchange.enter(Phase.RUNNING, self._now_s)
        started = events.Started(
            exchange.worker, exchange.request.model, exchange.resumed, self._window_of(exchange)
        )
        self._deliver(exchange.id, started)
        self._schedule(exchange)

    def _on_interrupted(self, request_id: bytes, body: bytes) -> None:
        interrupted = codec.decode(messages.Interrupted, body, limits.MAX_CONTROL_BYTES)
        exchange = self._exchanges.get(request_id)
        if exchange is None:
            self._closing.pop(request_id, None)  # there is nothing left to cancel
            return
        if request_id not in self._at_broker or interrupted.epoch != exchange.epoch:
            return
        if interrupted.lost and interrupted.worker:
            exchange.lost_workers.append(interrupted.worker)
            if interrupted.alone:
                exchange.lost_alone.append(interrupted.worker)
        exchange.worker = interrupted.worker
        exchange.holder = ""
        if interrupted.error.code in exchange.retry.codes:
            self._recover(exchange, interrupted.error)
        else:
            self._at_broker.discard(request_id)
            self._end(exchange, self._error(exchange, interrupted.error))

    def _on_output(self, route: bytes, body: bytes) -> None:
        exchanges, now_s = self._exchanges, self._now_s
        #: Of this message, not handed on yet: one order for many requests.
        fresh: list[TokensEvent] = []
        try:
            events_of_message = codec.decode_events(body, limits.MAX_OUTPUT_BYTES)
        except ProtocolError as error:
            self._report(str(error))
            return
        for event in events_of_message:
            exchange = exchanges.get(event.request_id)
            if exchange is None:
                if isinstance(event, EndEvent | FailEvent):
                    self._closing.pop(event.request_id, None)
                continue
            running = exchange.heard_s is not None
            if event.epoch != exchange.epoch or not (running or exchange.id in self._at_broker):
                if event.epoch not in exchange.epochs:
                    # It does not run the request. One guess a message is all that it gets.
                    self._report("an event of an epoch that was never asked for")
                    break
                continue
            if route != exchange.route and self._is_foreign(exchange, route):
                self._report("an event of a request that runs at another worker")
                break
            if running and type(event) is TokensEvent and exchange.accept(event, now_s) is NEXT:
                fresh.append(event)
                continue
            fresh = self._arrived(fresh)
            self._on_event(exchange, event)
        self._arrived(fresh)

    def _is_foreign(self, exchange: Exchange, route: bytes) -> bool:
        """Whether what came that way is neither from the request's worker nor from the broker."""
        return exchange.route is not None and route != self._dialer.session_id

    def _report(self, why: str) -> None:
        """An OUTPUT is not as it must be. The broker forwards it unread, and knows from whom: that
        worker is cut off, and everybody else's streams go on."""
        if self._reported is None:
            query_id = self._dialer.new_id()
            self._reported = query_id, why
            args = {"sequence": self._dialer.last_sequence, "why": why[:200]}
            self._send(MessageType.QUERY, query_id, messages.Query(verb="bus.report", args=args))

    def _on_event(self, exchange: Exchange, event: OutputEvent) -> None:
        """What is not simply the next tokens of a stream."""
        if exchange.phase is Phase.QUEUED and not isinstance(event, FailEvent | EndEvent):
            self._started(exchange)
        if isinstance(event, TokensEvent):
            match exchange.accept(event, self._now_s):
                case Acceptance.NEXT:
                    self._arrived([event])
                    self._schedule(exchange)
                case Acceptance.GAP:
                    self._recover(exchange, _gap(event.offset, len(exchange.token_ids)))
        elif isinstance(event, PromptEvent):
            self._deliver(exchange.id, event)
            exchange.prompt_seen = True
            exchange.heard_s = self._now_s
            self._schedule(exchange)
        elif isinstance(event, FailEvent):
            self._failed(exchange, event.error)
        else:
            self._ended(exchange, event)

    def _arrived(self, tokens: list[TokensEvent]) -> list[TokensEvent]:
        """Hand these on before anything else is said of their requests; returns an empty list."""
        if tokens:
            self._out.append(Arrived(tokens))
        return []

    def _ended(self, exchange: Exchange, event: EndEvent) -> None:
        have = len(exchange.token_ids)
        if event.finish_reason is FinishReason.CANCELLED:
            self._at_broker.discard(exchange.id)
            story = (
                f"the request was cancelled at the bus after {event.offset} tokens, and not by "
                "this client: by an operator, or because it was away for too long"
            )
            info = ErrorInfo(code=ErrorCode.CANCELLED.value, message=story)
            self._end(exchange, self._error(exchange, info), ended=True)
            return
        if event.offset != have:
            self._recover(exchange, _gap(event.offset, have))
            return
        self._at_broker.discard(exchange.id)
        end = End(
            finish_reason=event.finish_reason,
            text=event.text,
            usage=event.usage,
            timings=event.timings,
            result=event.result,
            stopped_by=event.stopped_by,
            model=exchange.request.model,
            worker=exchange.worker,
            resumed=exchange.resumed,
            first_token_s=exchange.first_token_s,
            total_s=self._now_s - exchange.made_s,
        )
        self._end(exchange, end, ended=True)

    # --- answers of the broker itself -------------------------------------------------------------

    def _on_answer(self, query_id: bytes, body: bytes) -> None:
        answer = codec.decode(messages.Answer, body, limits.MAX_ANSWER_BYTES)
        if self._reported is not None and query_id == self._reported[0]:
            why, self._reported = self._reported[1], None
            if answer.error is not None:  # it came from nobody else, so from the broker itself
                raise ProtocolError(why)
        elif self._naming.is_answer(query_id):
            self._naming.answered(answer)
        else:
            self._questions.answered(query_id, answer)

    # --- for tests and simulation -----------------------------------------------------------------

    def invariants(self) -> None:
        """Raise AssertionError, with the story, where the state contradicts itself."""
        for id_, exchange in self._exchanges.items():
            story = f"{id_.hex()[:8]} {exchange.phase.value} link={self._dialer.state.value}"
            at_broker = exchange.phase in (Phase.QUEUED, Phase.RUNNING)
            assert at_broker == (id_ in self._at_broker), f"{story}: phase and place differ"
            waiting = id_ in self._held or id_ in self._naming.waiting
            assert waiting == (exchange.phase is Phase.HELD), f"{story}: phase and queue differ"
            assert id_ not in self._closing, f"{story}: open and closing at once"
            due_s = exchange.due_s(self._dialer.ready)
            assert due_s == math.inf or exchange.scheduled_s <= due_s, f"{story}: no timer"
            assert exchange.taken <= len(exchange.token_ids), f"{story}: read before received"
        assert self._at_broker <= self._exchanges.keys(), "at the broker without an exchange"
        if self._at_broker:
            assert self._dialer.has_session, f"no session: {self._dialer.state}"
        if self._dialer.state is State.IDLE:
            assert not self.wants_session(), "idle although something is open"


def _gap(offset: int, have: int) -> ErrorInfo:
    story = f"the stream went on at token {offset} while {have} had arrived"
    return ErrorInfo(code=ErrorCode.CONNECTION_LOST.value, message=story, retryable=True)
