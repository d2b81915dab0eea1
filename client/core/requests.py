"""The requests of a client, sans-IO: from the call to END, FAIL or exception, wherever they run.

Covers sending, windows and the check of offsets (SPEC.md 6.1, 6.3), cancelling (6.2), RESUME (6.4)
and time limits; `exchange` holds the state of one request. A part of `session`, which owns the
connection, the timers and the path to the application.

A request is in `exchanges` as long as the application waits for it. A request that the application
dropped is in `closing` until the bus confirms its end, so that a cancel survives a lost session.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import msgspec

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
from client.core.connection import BrokerConnection
from client.core.default_model import DefaultModel
from client.core.events import Arrived, Deliver, End, Instruction, Item
from client.core.exchange import NEXT, Acceptance, Exchange, Phase
from client.errors import BusError, ConnectTimeout, error_from
from client.options import Limits

CANCEL_KEPT_S: Final = 60.0
"""How long an unconfirmed cancel is kept: longer than any worker keeps an orphaned request."""


class Requests:
    """The open requests, and dropped ones that may still run."""

    def __init__(
        self,
        broker: BrokerConnection,
        out: Callable[[Instruction], None],
        timer: Callable[[float, bytes], None],
        client_limits: Limits,
        generator: random.Random,
    ) -> None:
        """`timer`: arranges for `on_timer` to be called with the same arguments at that time."""
        self._broker = broker
        self._out = out
        self._timer = timer
        self._client_limits = client_limits
        self._random = generator
        self.exchanges: dict[bytes, Exchange] = {}
        #: The HELD ones with a model name, in sending order.
        self.held: OrderedDict[bytes, Exchange] = OrderedDict()
        #: The HELD ones without, until the broker says which model is the only one.
        self.default_model = DefaultModel(broker, self._hold, self._failed)
        #: QUEUED or RUNNING.
        self.at_broker: set[bytes] = set()
        #: Dropped here, but not known to have ended on the bus: until when to remember it.
        self.closing: dict[bytes, float] = {}
        #: The open query that reports a worker's output, and what was wrong with the output.
        self._reported: tuple[bytes, str] | None = None

    # --- the application's side -------------------------------------------------------------------

    def made(self, made: events.RequestMade) -> None:
        """The application made a request."""
        exchange = Exchange(made, self._broker.now_s)
        self.exchanges[made.request_id] = exchange
        self._hold(exchange)

    def taken(self, taken: events.TokensTaken) -> None:
        """The application has read more tokens, so the worker may send more."""
        exchange = self.exchanges.get(taken.request_id)
        if exchange is None or taken.offset <= exchange.taken:
            return
        exchange.taken = taken.offset
        if exchange.id not in self.at_broker:
            return  # the RESUME will carry the new window
        limit = taken.offset + self._window_of(exchange)
        if limit > exchange.window_limit:
            if len(exchange.token_ids) >= exchange.window_limit and exchange.heard_s is not None:
                exchange.heard_s = self._broker.now_s  # the worker could not go on until now
            exchange.window_limit = limit
            self._send(MessageType.WINDOW, exchange.id, messages.Window(limit=limit))
            self.schedule(exchange)

    def dropped(self, request_id: bytes) -> None:
        """The application no longer wants the answer."""
        exchange = self.exchanges.get(request_id)
        if exchange is not None:
            self._forget(exchange, "dropped by the application")

    def close(self, error: BusError) -> None:
        """The application closes the client: cancel what may run, and end everything."""
        for exchange in self.exchanges.values():
            if exchange.sent_before:
                self._cancel(exchange.id, "the client was closed")
        self.fail_all(error)

    # --- the session's side -----------------------------------------------------------------------

    def session_began(self) -> None:
        """Cancel what was dropped while there was no session."""
        for request_id in self.closing:
            body = messages.Cancel(reason="dropped while there was no session")
            self._send(MessageType.CANCEL, request_id, body)

    def session_over(self, error: ErrorInfo) -> None:
        """Recover the requests at the broker, by a RESUME in the next session."""
        self.default_model.session_over()
        self._reported = None
        at_broker, self.at_broker = self.at_broker, set()
        # In order of creation, not in the set's order: runs must be reproducible.
        # Newest first, because each is put at the head of `held`.
        for exchange in [e for e in reversed(self.exchanges.values()) if e.id in at_broker]:
            self._recover(exchange, error, reconnecting=True)
        for exchange in self.exchanges.values():
            if exchange.phase is Phase.HELD:
                exchange.held_s = self._broker.now_s
                self.schedule(exchange)

    def wait_anew(self) -> None:
        """The broker drains: held requests now wait for another one, with new time limits."""
        for exchange in (*self.held.values(), *self.default_model.waiting.values()):
            exchange.held_s = self._broker.now_s
            self.schedule(exchange)

    def on_answer(self, query_id: bytes, answer: messages.Answer) -> bool:
        """Handle an ANSWER to one of this object's own queries; False if it is the application's.
        Raises `ProtocolError` if the reported output came from the broker itself."""
        if self._reported is not None and query_id == self._reported[0]:
            why, self._reported = self._reported[1], None
            if answer.error is not None:  # no worker sent it, so the broker itself did
                raise ProtocolError(why)
        elif self.default_model.is_answer(query_id):
            self.default_model.answered(answer)
        else:
            return False
        return True

    # --- time -------------------------------------------------------------------------------------

    def schedule(self, exchange: Exchange) -> None:
        """Make sure that the exchange's next limit has a timer; that one sets any later timer."""
        due_s = exchange.due_s(self._broker.ready)
        if due_s < exchange.scheduled_s:
            exchange.scheduled_s = due_s
            self._timer(due_s, exchange.id)

    def on_timer(self, due_s: float, id_: bytes) -> None:
        """A timer of a request, open or closing, is due; it may be out of date."""
        exchange = self.exchanges.get(id_)
        if exchange is not None:
            if exchange.scheduled_s == due_s:
                exchange.scheduled_s = math.inf
                self._on_exchange_due(exchange)
        elif self.closing.get(id_, math.inf) <= self._broker.now_s:
            del self.closing[id_]

    def _on_exchange_due(self, exchange: Exchange) -> None:
        ready = self._broker.ready
        if exchange.due_s(ready) > self._broker.now_s:
            self.schedule(exchange)  # the limit has moved
        elif exchange.phase is Phase.BACKING_OFF and exchange.retry_at_s <= self._broker.now_s:
            self._hold(exchange)
        elif (
            exchange.phase is Phase.HELD
            and exchange.phase_due_s(ready) <= self._broker.now_s
            and (not ready or not exchange.request.model)
        ):
            self._end(exchange, self.no_broker(self._broker.now_s - exchange.held_s, exchange))
        else:
            cls, story = exchange.overdue(self._broker.now_s)
            info = ErrorInfo(code=ErrorCode.DEADLINE_EXCEEDED.value, message=story)
            self._end(exchange, self._error(exchange, info, cls))

    def no_broker(self, waited_s: float, exchange: Exchange | None = None) -> BusError:
        """The error for a caller that waited this long for a broker."""
        where = " or ".join(self._broker.brokers)
        story = self._broker.story()
        because = f" ({story})" if story else ""
        story = (
            f"no broker answered at {where} within {waited_s:.3g} s{because}. Start one with "
            "`python -m broker`, or name its front address: Client('tcp://HOST:5555'), "
            "TOKENBUS_BROKER or --broker"
        )
        info = ErrorInfo(code=ErrorCode.CONNECTION_LOST.value, message=story, retryable=True)
        if exchange is None:
            return error_from(info, cls=ConnectTimeout)
        # A connection lost midway is a different error from one never made.
        return self._error(exchange, info, None if exchange.sent_before else ConnectTimeout)

    # --- sending ----------------------------------------------------------------------------------

    def _hold(self, exchange: Exchange) -> None:
        exchange.enter(Phase.HELD, self._broker.now_s)
        queue = self.held if exchange.request.model else self.default_model.waiting
        queue[exchange.id] = exchange
        if exchange.sent_before and queue is self.held:
            # Workers do not keep orphans forever; a request that was never sent can wait.
            self.held.move_to_end(exchange.id, last=False)
        self.schedule(exchange)

    def dispatch(self) -> None:
        """Send held requests, as far as the session and its limits allow."""
        if not self._broker.ready:
            return
        self.default_model.ask()
        while self.held and len(self.at_broker) + len(self.closing) < self._inflight_limit():
            id_ = next(iter(self.held))
            self._transmit(self.held.pop(id_))

    def _transmit(self, exchange: Exchange) -> None:
        sent_before = exchange.sent_before
        try:
            window = self._window_of(exchange)
            body = codec.encode(exchange.body(window, self._broker.now_s, self._random))
        except (ValueError, OverflowError, TypeError, RecursionError) as error:
            # A bad value from one caller, such as a lone surrogate, must not stop other requests.
            why = f"the request cannot be written: {error}; nothing was sent"
            info = ErrorInfo(code=ErrorCode.INVALID_REQUEST.value, message=why)
            self._end(exchange, self._error(exchange, info), ended=not sent_before)
            return
        excess = exchange.beyond(self._bounds(), len(body))
        if excess is not None:
            self._end(exchange, self._error(exchange, excess), ended=not sent_before)
            return
        type_ = MessageType.RESUME if sent_before else MessageType.REQUEST
        self.at_broker.add(exchange.id)
        exchange.enter(Phase.QUEUED, self._broker.now_s)
        self._broker.send(type_, exchange.id, body, *exchange.attachments)
        self.schedule(exchange)

    def _bounds(self) -> messages.BusLimits:
        welcome = self._broker.welcome
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
        welcome = self._broker.welcome
        return limits.DEFAULT_WINDOW_TOKENS if welcome is None else welcome.window

    def _send(self, type_: MessageType, id_: bytes, body: msgspec.Struct) -> None:
        self._broker.send_body(type_, id_, body)

    # --- ending and recovering --------------------------------------------------------------------

    def _recover(self, exchange: Exchange, error: ErrorInfo, *, reconnecting: bool = False) -> None:
        """The run is over, but not the request: RESUME it now or later, or give up."""
        running = exchange.phase is Phase.RUNNING
        self.at_broker.discard(exchange.id)
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
        exchange.enter(Phase.BACKING_OFF, self._broker.now_s)
        exchange.retry_at_s = self._broker.now_s + delay_s
        self.schedule(exchange)

    def _failed(self, exchange: Exchange, error: ErrorInfo) -> None:
        """The bus sent FAIL: final, unless the retry policy covers the error."""
        self.at_broker.discard(exchange.id)
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
        """Forget the request. Unless the bus said that it ended, cancel it: it may still run."""
        del self.exchanges[exchange.id]
        self.held.pop(exchange.id, None)
        self.default_model.waiting.pop(exchange.id, None)
        self.at_broker.discard(exchange.id)
        if exchange.sent_before and not ended:
            self._cancel(exchange.id, why)

    def _cancel(self, request_id: bytes, why: str) -> None:
        until_s = self._broker.now_s + CANCEL_KEPT_S
        self.closing[request_id] = until_s
        self._timer(until_s, request_id)
        if self._broker.has_session:
            self._send(MessageType.CANCEL, request_id, messages.Cancel(reason=why))

    def fail_all(self, error: BusError) -> None:
        """End everything that is open, without cancelling it."""
        for exchange in list(self.exchanges.values()):
            self._deliver(exchange.id, error, final=True)
        for table in (self.exchanges, self.held, self.default_model.waiting):
            table.clear()
        self.at_broker.clear()

    def _deliver(self, id_: bytes, *items: Item, final: bool = False) -> None:
        self._out(Deliver(id_, items, final))

    # --- messages ---------------------------------------------------------------------------------

    def on_accepted(self, request_id: bytes, body: bytes) -> None:
        """ACCEPTED: the broker has it, or a worker runs it."""
        accepted = codec.decode(messages.Accepted, body, limits.MAX_CONTROL_BYTES)
        exchange = self.exchanges.get(request_id)
        if exchange is None or request_id not in self.at_broker:
            return
        for name in accepted.returned:
            for names in (exchange.lost_workers, exchange.lost_alone):
                if name in names:
                    names.remove(name)
        if accepted.worker:
            exchange.route = accepted.route
        if not accepted.worker:
            exchange.position = accepted.position
            starts_ms = accepted.starts_in_ms
            starts_s = None if starts_ms is None else starts_ms / 1000
            self._deliver(
                request_id,
                events.Queued(accepted.position, starts_s, accepted.why, accepted.progress),
            )
        elif exchange.worker != accepted.worker or exchange.phase is not Phase.RUNNING:
            exchange.worker = exchange.holder = accepted.worker
            if accepted.resume and exchange.continued != messages.Continuation.TEXT:
                exchange.continued = accepted.resume
            self._started(exchange, accepted.resume)

    def _started(self, exchange: Exchange, continued: str = "") -> None:
        if exchange.phase is not Phase.RUNNING:
            exchange.enter(Phase.RUNNING, self._broker.now_s)
        started = events.Started(
            exchange.worker,
            exchange.request.model,
            exchange.resumed,
            self._window_of(exchange),
            continued,
        )
        self._deliver(exchange.id, started)
        self.schedule(exchange)

    def on_interrupted(self, request_id: bytes, body: bytes) -> None:
        """INTERRUPTED: the run is over, but not the request."""
        interrupted = codec.decode(messages.Interrupted, body, limits.MAX_CONTROL_BYTES)
        exchange = self.exchanges.get(request_id)
        if exchange is None:
            self.closing.pop(request_id, None)  # nothing is left to cancel
            return
        if request_id not in self.at_broker or interrupted.epoch != exchange.epoch:
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
            self.at_broker.discard(request_id)
            self._end(exchange, self._error(exchange, interrupted.error))

    def on_output(self, route: bytes, body: bytes) -> None:
        """OUTPUT: events of any of the requests. Every token of the client passes through here."""
        exchanges, now_s = self.exchanges, self._broker.now_s
        #: Tokens of this message that are not delivered yet: one instruction for many requests.
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
                    self.closing.pop(event.request_id, None)
                continue
            running = exchange.heard_s is not None
            if event.epoch != exchange.epoch or not (running or exchange.id in self.at_broker):
                if event.epoch not in exchange.epochs:
                    # The sender does not run the request. Stop here, so that it cannot guess
                    # more than one epoch per message.
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
        """Whether this route is neither the request's worker nor the broker."""
        return exchange.route is not None and route != self._broker.session_id

    def _report(self, why: str) -> None:
        """Report an invalid OUTPUT. The broker forwards OUTPUT unread but knows the sender: it cuts
        off that worker, and all other streams go on."""
        if self._reported is None:
            query_id = self._broker.new_id()
            self._reported = query_id, why
            args = {"sequence": self._broker.last_sequence, "why": why[:200]}
            self._send(MessageType.QUERY, query_id, messages.Query(verb="bus.report", args=args))

    def _on_event(self, exchange: Exchange, event: OutputEvent) -> None:
        """Handle an event that is not simply the next tokens of a running stream."""
        if exchange.phase is Phase.QUEUED and not isinstance(event, FailEvent | EndEvent):
            self._started(exchange)
        if isinstance(event, TokensEvent):
            match exchange.accept(event, self._broker.now_s):
                case Acceptance.NEXT:
                    self._arrived([event])
                    self.schedule(exchange)
                case Acceptance.GAP:
                    self._recover(exchange, _gap(event.offset, len(exchange.token_ids)))
                case Acceptance.UNSPLIT:
                    self._recover(exchange, _unsplit(exchange.worker))
        elif isinstance(event, PromptEvent):
            self._deliver(exchange.id, event)
            exchange.prompt_seen = True
            exchange.heard_s = self._broker.now_s
            self.schedule(exchange)
        elif isinstance(event, FailEvent):
            self._failed(exchange, event.error)
        else:
            self._ended(exchange, event)

    def _arrived(self, tokens: list[TokensEvent]) -> list[TokensEvent]:
        """Deliver these before any other item of their requests; returns an empty list."""
        if tokens:
            self._out(Arrived(tokens))
        return []

    def _ended(self, exchange: Exchange, event: EndEvent) -> None:
        have = len(exchange.token_ids)
        if event.finish_reason is FinishReason.CANCELLED:
            self.at_broker.discard(exchange.id)
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
        if not exchange.splits_like_before(event):
            self._recover(exchange, _unsplit(exchange.worker))
            return
        self.at_broker.discard(exchange.id)
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
            total_s=self._broker.now_s - exchange.made_s,
            pieces=event.pieces,
            continued=exchange.continued,
        )
        self._end(exchange, end, ended=True)

    # --- for tests and simulation -----------------------------------------------------------------

    def invariants(self) -> None:
        """Raise AssertionError, naming the request, if the state contradicts itself."""
        for id_, exchange in self.exchanges.items():
            story = f"{id_.hex()[:8]} {exchange.phase.value} link={self._broker.state.value}"
            at_broker = exchange.phase in (Phase.QUEUED, Phase.RUNNING)
            assert at_broker == (id_ in self.at_broker), f"{story}: phase and place differ"
            waiting = id_ in self.held or id_ in self.default_model.waiting
            assert waiting == (exchange.phase is Phase.HELD), f"{story}: phase and queue differ"
            assert id_ not in self.closing, f"{story}: open and closing at once"
            due_s = exchange.due_s(self._broker.ready)
            assert due_s == math.inf or exchange.scheduled_s <= due_s, f"{story}: no timer"
            assert exchange.taken <= len(exchange.token_ids), f"{story}: read before received"
        assert self.at_broker <= self.exchanges.keys(), "at the broker without an exchange"


def _unsplit(worker: str) -> ErrorInfo:
    story = (
        f"worker {worker!r} continued an answer without separating its reasoning, which was "
        "separate so far: it is of an older version, or has another --reasoning-parser"
    )
    return ErrorInfo(code=ErrorCode.CONNECTION_LOST.value, message=story, retryable=True)


def _gap(offset: int, have: int) -> ErrorInfo:
    story = f"the stream went on at token {offset} while {have} had arrived"
    return ErrorInfo(code=ErrorCode.CONNECTION_LOST.value, message=story, retryable=True)
