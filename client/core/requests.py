"""The requests of a client, sans-IO: from the call to END, FAIL or exception, wherever they run.

Here are sending, windows and the check of offsets (SPEC.md 6.1, 6.3), cancelling (6.2), RESUME
(6.4) and time limits; `exchange` holds what is known of one request. A part of `session`, which has
the connection, the timers and the way to the application.

A request is in `exchanges` as long as the application waits for it. What the application has
dropped is in `closing` until the bus confirms it, so that a cancel survives a lost session.
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
from client.core.default_model import DefaultModel
from client.core.dialer import Dialer
from client.core.events import Arrived, Deliver, End, Instruction, Item
from client.core.exchange import NEXT, Acceptance, Exchange, Phase
from client.errors import BusError, ConnectTimeout, error_from
from client.options import Limits

CANCEL_KEPT_S: Final = 60.0
"""How long an unconfirmed cancel is remembered: longer than any worker keeps a lost request."""


class Requests:
    """Open requests, and those that were dropped and may still run."""

    def __init__(
        self,
        dialer: Dialer,
        out: Callable[[Instruction], None],
        timer: Callable[[float, bytes], None],
        client_limits: Limits,
        generator: random.Random,
    ) -> None:
        """`timer`: call `on_timer` with these at that time."""
        self._dialer = dialer
        self._out = out
        self._timer = timer
        self._client_limits = client_limits
        self._random = generator
        self.exchanges: dict[bytes, Exchange] = {}
        #: Of these: HELD with a model name, in the order in which they may go.
        self.held: OrderedDict[bytes, Exchange] = OrderedDict()
        #: HELD until the broker tells which model is the only one.
        self.default_model = DefaultModel(dialer, self._hold, self._failed)
        #: QUEUED or RUNNING.
        self.at_broker: set[bytes] = set()
        #: Dropped here, not yet ended there: until when to remember.
        self.closing: dict[bytes, float] = {}
        #: The query that reports a worker's output, and what is wrong with it; until its answer.
        self._reported: tuple[bytes, str] | None = None

    # --- the application's side -------------------------------------------------------------------

    def made(self, made: events.RequestMade) -> None:
        """The application asks."""
        exchange = Exchange(made, self._dialer.now_s)
        self.exchanges[made.request_id] = exchange
        self._hold(exchange)

    def taken(self, taken: events.TokensTaken) -> None:
        """The application has read on: the worker may send more."""
        exchange = self.exchanges.get(taken.request_id)
        if exchange is None or taken.offset <= exchange.taken:
            return
        exchange.taken = taken.offset
        if exchange.id not in self.at_broker:
            return  # RESUME will carry it
        limit = taken.offset + self._window_of(exchange)
        if limit > exchange.window_limit:
            if len(exchange.token_ids) >= exchange.window_limit and exchange.heard_s is not None:
                exchange.heard_s = self._dialer.now_s  # only now can the worker go on
            exchange.window_limit = limit
            self._send(MessageType.WINDOW, exchange.id, messages.Window(limit=limit))
            self.schedule(exchange)

    def dropped(self, request_id: bytes) -> None:
        """The application is no longer interested."""
        exchange = self.exchanges.get(request_id)
        if exchange is not None:
            self._forget(exchange, "dropped by the application")

    def close(self, error: BusError) -> None:
        """The application closes the client: cancel what runs, end everything."""
        for exchange in self.exchanges.values():
            if exchange.sent_before:
                self._cancel(exchange.id, "the client was closed")
        self.fail_all(error)

    # --- the session's side -----------------------------------------------------------------------

    def session_began(self) -> None:
        """Cancel what was dropped meanwhile."""
        for request_id in self.closing:
            body = messages.Cancel(reason="dropped while there was no session")
            self._send(MessageType.CANCEL, request_id, body)

    def session_over(self, error: ErrorInfo) -> None:
        """Recover what was at the broker, by a RESUME in the next session."""
        self.default_model.session_over()
        self._reported = None
        at_broker, self.at_broker = self.at_broker, set()
        # In the order of their making, not of the set's: runs must be reproducible.
        # The latest first, since each goes to the head of those that are held.
        for exchange in [e for e in reversed(self.exchanges.values()) if e.id in at_broker]:
            self._recover(exchange, error, reconnecting=True)
        for exchange in self.exchanges.values():
            if exchange.phase is Phase.HELD:
                exchange.held_s = self._dialer.now_s
                self.schedule(exchange)

    def wait_anew(self) -> None:
        """The broker drains: from now on what is held waits for another."""
        for exchange in (*self.held.values(), *self.default_model.waiting.values()):
            exchange.held_s = self._dialer.now_s
            self.schedule(exchange)

    def on_answer(self, query_id: bytes, answer: messages.Answer) -> bool:
        """An ANSWER to a question of our own; False where it is the application's. Raises
        `ProtocolError` where the broker says that what was reported was its own doing."""
        if self._reported is not None and query_id == self._reported[0]:
            why, self._reported = self._reported[1], None
            if answer.error is not None:  # it came from nobody else, so from the broker itself
                raise ProtocolError(why)
        elif self.default_model.is_answer(query_id):
            self.default_model.answered(answer)
        else:
            return False
        return True

    # --- time -------------------------------------------------------------------------------------

    def schedule(self, exchange: Exchange) -> None:
        """See to it that the exchange's next limit has an entry; later ones find themselves."""
        due_s = exchange.due_s(self._dialer.ready)
        if due_s < exchange.scheduled_s:
            exchange.scheduled_s = due_s
            self._timer(due_s, exchange.id)

    def on_timer(self, due_s: float, id_: bytes) -> None:
        """A timer of a request, open or closing, is due; it may have been overtaken."""
        exchange = self.exchanges.get(id_)
        if exchange is not None:
            if exchange.scheduled_s == due_s:
                exchange.scheduled_s = math.inf
                self._on_exchange_due(exchange)
        elif self.closing.get(id_, math.inf) <= self._dialer.now_s:
            del self.closing[id_]

    def _on_exchange_due(self, exchange: Exchange) -> None:
        ready = self._dialer.ready
        if exchange.due_s(ready) > self._dialer.now_s:
            self.schedule(exchange)  # it had moved
        elif exchange.phase is Phase.BACKING_OFF and exchange.retry_at_s <= self._dialer.now_s:
            self._hold(exchange)
        elif (
            exchange.phase is Phase.HELD
            and exchange.phase_due_s(ready) <= self._dialer.now_s
            and (not ready or not exchange.request.model)
        ):
            self._end(exchange, self.no_broker(self._dialer.now_s - exchange.held_s, exchange))
        else:
            cls, story = exchange.overdue(self._dialer.now_s)
            info = ErrorInfo(code=ErrorCode.DEADLINE_EXCEEDED.value, message=story)
            self._end(exchange, self._error(exchange, info, cls))

    def no_broker(self, waited_s: float, exchange: Exchange | None = None) -> BusError:
        """What whoever waited so long for a broker reads."""
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

    # --- sending ----------------------------------------------------------------------------------

    def _hold(self, exchange: Exchange) -> None:
        exchange.enter(Phase.HELD, self._dialer.now_s)
        queue = self.held if exchange.request.model else self.default_model.waiting
        queue[exchange.id] = exchange
        if exchange.sent_before and queue is self.held:
            # What runs somewhere is not kept for ever; what was never sent can wait.
            self.held.move_to_end(exchange.id, last=False)
        self.schedule(exchange)

    def dispatch(self) -> None:
        """Send what is held, as far as the session and its limits allow."""
        if not self._dialer.ready:
            return
        self.default_model.ask()
        while self.held and len(self.at_broker) + len(self.closing) < self._inflight_limit():
            id_ = next(iter(self.held))
            self._transmit(self.held.pop(id_))

    def _transmit(self, exchange: Exchange) -> None:
        sent_before = exchange.sent_before
        try:
            window = self._window_of(exchange)
            body = codec.encode(exchange.body(window, self._dialer.now_s, self._random))
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
        self.at_broker.add(exchange.id)
        exchange.enter(Phase.QUEUED, self._dialer.now_s)
        self._dialer.send(type_, exchange.id, body, *exchange.attachments)
        self.schedule(exchange)

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

    # --- ending and recovering --------------------------------------------------------------------

    def _recover(self, exchange: Exchange, error: ErrorInfo, *, reconnecting: bool = False) -> None:
        """The run is over and the request is not: RESUME it now, later or elsewhere, or give up."""
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
        exchange.enter(Phase.BACKING_OFF, self._dialer.now_s)
        exchange.retry_at_s = self._dialer.now_s + delay_s
        self.schedule(exchange)

    def _failed(self, exchange: Exchange, error: ErrorInfo) -> None:
        """The bus said FAIL: final, unless the policy says to try again."""
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
        """No longer ours. Unless the bus said that it ended, cancel it: it may run somewhere."""
        del self.exchanges[exchange.id]
        self.held.pop(exchange.id, None)
        self.default_model.waiting.pop(exchange.id, None)
        self.at_broker.discard(exchange.id)
        if exchange.sent_before and not ended:
            self._cancel(exchange.id, why)

    def _cancel(self, request_id: bytes, why: str) -> None:
        until_s = self._dialer.now_s + CANCEL_KEPT_S
        self.closing[request_id] = until_s
        self._timer(until_s, request_id)
        if self._dialer.has_session:
            self._send(MessageType.CANCEL, request_id, messages.Cancel(reason=why))

    def fail_all(self, error: BusError) -> None:
        """End everything that is open; nothing is cancelled."""
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
            self._deliver(request_id, events.Queued(accepted.position))
        elif exchange.worker != accepted.worker or exchange.phase is not Phase.RUNNING:
            exchange.worker = exchange.holder = accepted.worker
            self._started(exchange)

    def _started(self, exchange: Exchange) -> None:
        if exchange.phase is not Phase.RUNNING:
            exchange.enter(Phase.RUNNING, self._dialer.now_s)
        started = events.Started(
            exchange.worker, exchange.request.model, exchange.resumed, self._window_of(exchange)
        )
        self._deliver(exchange.id, started)
        self.schedule(exchange)

    def on_interrupted(self, request_id: bytes, body: bytes) -> None:
        """INTERRUPTED: the run is over, and the request is not."""
        interrupted = codec.decode(messages.Interrupted, body, limits.MAX_CONTROL_BYTES)
        exchange = self.exchanges.get(request_id)
        if exchange is None:
            self.closing.pop(request_id, None)  # there is nothing left to cancel
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
        """OUTPUT: events of any of the requests. Every token of the client passes here."""
        exchanges, now_s = self.exchanges, self._dialer.now_s
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
                    self.closing.pop(event.request_id, None)
                continue
            running = exchange.heard_s is not None
            if event.epoch != exchange.epoch or not (running or exchange.id in self.at_broker):
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
            match exchange.accept(event, self._dialer.now_s):
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
            exchange.heard_s = self._dialer.now_s
            self.schedule(exchange)
        elif isinstance(event, FailEvent):
            self._failed(exchange, event.error)
        else:
            self._ended(exchange, event)

    def _arrived(self, tokens: list[TokensEvent]) -> list[TokensEvent]:
        """Hand these on before anything else is said of their requests; returns an empty list."""
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
            total_s=self._dialer.now_s - exchange.made_s,
            pieces=event.pieces,
        )
        self._end(exchange, end, ended=True)

    # --- for tests and simulation -----------------------------------------------------------------

    def invariants(self) -> None:
        """Raise AssertionError, with the story, where the state contradicts itself."""
        for id_, exchange in self.exchanges.items():
            story = f"{id_.hex()[:8]} {exchange.phase.value} link={self._dialer.state.value}"
            at_broker = exchange.phase in (Phase.QUEUED, Phase.RUNNING)
            assert at_broker == (id_ in self.at_broker), f"{story}: phase and place differ"
            waiting = id_ in self.held or id_ in self.default_model.waiting
            assert waiting == (exchange.phase is Phase.HELD), f"{story}: phase and queue differ"
            assert id_ not in self.closing, f"{story}: open and closing at once"
            due_s = exchange.due_s(self._dialer.ready)
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
