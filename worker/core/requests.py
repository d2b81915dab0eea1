"""All requests that the worker runs or recently ran, and the messages about them.

Holds the table of streams and of the engine's jobs, and their timers (time to live, grace period
after a lost session, wait for the window, how long an answer is kept); `outbox` makes the OUTPUT
messages that result from an event. Knows nothing about handshakes, credit or the engine process;
instructions for the engine go into `out`. Must never touch a socket or a clock.
"""

from __future__ import annotations

import heapq
import logging
import math
from enum import IntEnum
from typing import Any

from broker.protocol.errors import ErrorCode
from broker.protocol.messages import Assign, Held, Request, Resume, new_id
from worker.core.connection import Connection
from worker.core.instructions import EngineAdd, EngineCancel, EngineWindow, Instruction, Log
from worker.core.outbox import Outbox
from worker.core.streams import COALESCED_TOKENS, Stream
from worker.engines.events import END, FAIL, PROMPT, TOKENS

KEPT_REQUESTS = 4096
"""Ended requests kept for a late RESUME."""
KEPT_BYTES = 64 << 20
"""Limit for their total size: about 1.5 million tokens."""

_EMPTY_RESUME = Resume(epoch=1)


class _Timer(IntEnum):
    """The kinds of timer of a stream."""

    TTL = 0
    ORPHANED = 1
    WINDOW = 2
    KEPT = 3


class Requests:
    """The worker's requests, from ASSIGN until nobody can resume them any more."""

    def __init__(
        self,
        connections: list[Connection],
        grace_s: float,
        kept_s: float,
        window_wait_s: float,
        *,
        tell_windows: bool = False,
    ) -> None:
        self._connections = connections
        self._grace_s = grace_s
        self._kept_s = kept_s
        self._window_wait_s = window_wait_s
        #: Whether the engine generates only up to the client's window and must be told about it.
        self._tell_windows = tell_windows
        #: Instructions of the current call; replaced by the core for each event.
        self.out: list[Instruction] = []
        #: By request id: running requests, and ended ones that can still be resumed.
        self.streams: dict[bytes, Stream] = {}
        #: By job id: everything that the engine still has. A job occupies a slot unless it is in
        #: `_slotless`: then it was cancelled or started again, and its slot belongs to the next.
        self._jobs: dict[bytes, Stream] = {}
        self._slotless: set[bytes] = set()
        #: Models whose requests the engine can stop at its next step, however long they are: all
        #: but those that it runs one at a time.
        self.batched: frozenset[str] = frozenset()
        #: Ended requests in the order of their end, with their size.
        self._kept: dict[bytes, int] = {}
        self._kept_bytes = 0
        #: Heap of (time, timer, request id). Outdated entries stay until they are due or the heap
        #: has doubled, so they must not keep a stream alive.
        self._timers: list[tuple[float, int, bytes]] = []
        self._timers_tidied = 0
        self._outbox = Outbox(self._drop)

    # --- queries -------------------------------------------------------------------------

    @property
    def slots_taken(self) -> int:
        """Number of slots that the engine's jobs occupy."""
        return len(self._jobs) - len(self._slotless)

    @property
    def engine_busy(self) -> bool:
        """Whether the engine has something to do."""
        return bool(self._jobs)

    @property
    def unfinished(self) -> bool:
        """Whether a request runs, or its end has not been sent to a waiting client yet."""
        return bool(self._jobs) or any(s.route is not None for s in self.streams.values())

    def holds(self) -> list[Held]:
        """The requests that can be resumed here, for HELLO."""
        return [
            Held(s.request_id, s.epoch, len(s.token_ids), s.running)
            for s in self.streams.values()
            if not s.cancelled  # given up: what is left of it is not an answer
        ]

    def orphans(self) -> int:
        """Number of running requests without a session."""
        return sum(s.orphaned_s is not None and s.running for s in self.streams.values())

    def invariants(self) -> None:
        """Raise AssertionError if the state contradicts itself."""
        assert self._slotless <= self._jobs.keys(), "a slotless job that the engine does not have"
        assert self._outbox.empty, "output that was never sent"
        assert self._kept_bytes == sum(self._kept.values()), "bytes kept are miscounted"
        for request_id, stream in self.streams.items():
            assert stream.request_id == request_id
            assert stream.running == (request_id not in self._kept), "an end that is not kept"
            assert not stream.running or self._jobs.get(stream.job_id) is stream, "no job runs it"
            assert stream.sent <= max(stream.window, stream.attached_at), (
                f"{stream.sent} tokens sent, the window is {stream.window}"
            )
            assert stream.route is None or stream.route.connection.open, "a route to nowhere"
            assert not stream.running or (stream.route is None) == (stream.orphaned_s is not None)

    # --- timers -----------------------------------------------------------------------------------

    def deadline_s(self) -> float:
        """When the next timer of a request is due."""
        return self._timers[0][0] if self._timers else math.inf

    def tick(self, now_s: float) -> None:
        """Act on the timers that are due."""
        while self._timers and self._timers[0][0] <= now_s:
            when_s, timer, request_id = heapq.heappop(self._timers)
            stream = self.streams.get(request_id)
            if stream is not None:
                self._fire(_Timer(timer), stream, when_s, now_s)

    def _at(self, when_s: float, timer: _Timer, stream: Stream) -> None:
        heapq.heappush(self._timers, (when_s, int(timer), stream.request_id))
        if len(self._timers) > 2 * self._timers_tidied + 64:
            self._timers = [entry for entry in self._timers if entry[2] in self.streams]
            heapq.heapify(self._timers)
            self._timers_tidied = len(self._timers)

    def _fire(self, timer: _Timer, stream: Stream, when_s: float, now_s: float) -> None:
        """A timer is due; it may be outdated, so its condition is checked here."""
        match timer:
            case _Timer.TTL:
                if stream.ttl_until_s <= when_s and not stream.end_sent:
                    message = "the request's time to live ended while it ran; allow more time"
                    self._fail(stream, ErrorCode.DEADLINE_EXCEEDED, message, now_s)
            case _Timer.ORPHANED:
                since_s = stream.orphaned_s
                if stream.running and since_s is not None and since_s + self._grace_s <= when_s:
                    self._log("request abandoned", stream, cause="nobody resumed it")
                    self.abandon(stream)
            case _Timer.WINDOW:
                stream.window_timer = False
                since_s = stream.blocked_since_s
                if since_s is None:
                    return
                if since_s + self._window_wait_s > when_s:
                    self._watch_window(stream, since_s)
                    return
                message = f"the client read no tokens for {self._window_wait_s:g} s"
                self._fail(stream, ErrorCode.SLOW_CONSUMER, message, now_s)
            case _Timer.KEPT:
                # An answer that is still being read, however slowly, is kept; only the window timer
                # may end it.
                if (
                    not stream.running
                    and stream.route is None
                    and stream.kept_since_s + self._kept_s <= when_s
                ):
                    self.forget(stream)

    # --- begin and resume -------------------------------------------------------------------------

    def start(
        self,
        connection: Connection,
        request_id: bytes,
        assign: Assign,
        request: Request,
        body: bytes,
        attachments: tuple[bytes, ...],
        now_s: float,
    ) -> None:
        """Run a request from the start, or from the tokens that another worker generated."""
        resume = request.resume or _EMPTY_RESUME
        stream = Stream(
            request_id,
            new_id() if request_id in self._jobs else request_id,
            request.model,
            request.params.stream_interval,
            resume.token_ids,
            resume.text_characters,
        )
        self.streams[request_id] = stream
        self._jobs[stream.job_id] = stream
        self._direct(connection, stream, assign, request, now_s)
        self.out.append(EngineAdd(stream.job_id, body, attachments))
        self._log("request started", stream, resumed_at=stream.base_tokens)

    def resume(
        self,
        connection: Connection,
        stream: Stream,
        assign: Assign,
        request: Request,
        now_s: float,
    ) -> bool:
        """Send a request held here to the client that resumes it, from the requested offset.

        False if it cannot be continued for this client, which has different tokens; the caller then
        starts it again (SPEC.md section 6.4).
        """
        resume = request.resume or _EMPTY_RESUME
        if not stream.holds(resume.token_ids, resume.text_characters):
            return False
        old = stream.route
        new = connection.route(assign.reply_to)
        if old is new and stream.epoch == assign.epoch:
            return True  # a duplicate of the current attempt
        self._leave_broker(connection, stream)
        self._direct(connection, stream, assign, request, now_s)
        self._log("request resumed", stream, resumed_at=stream.attached_at)
        self._tell_window(stream)
        self.advance(stream, now_s)
        return True

    def _direct(
        self,
        connection: Connection,
        stream: Stream,
        assign: Assign,
        request: Request,
        now_s: float,
    ) -> None:
        resume = request.resume or _EMPTY_RESUME
        stream.attach(
            connection.route(assign.reply_to),
            assign.epoch,
            request.window,
            len(resume.token_ids),
            resume.text_characters,
            resume.prompt_seen,
        )
        # A client that looks for calls in the text may stop at one, and counts the tokens up to it.
        stream.joins = not request.tools
        connection.held.discard(stream.request_id)
        stream.ttl_until_s = math.inf
        if assign.ttl_ms is not None:
            stream.ttl_until_s = now_s + assign.ttl_ms / 1000
            self._at(stream.ttl_until_s, _Timer.TTL, stream)

    def _leave_broker(self, connection: Connection, stream: Stream) -> None:
        """The request comes through `connection` now: tell its former broker to forget it."""
        old = stream.route
        if old is not None and old.connection is not connection:
            self._tell_over(old.connection, stream.request_id)

    def _tell_over(self, connection: Connection, request_id: bytes) -> None:
        """Tell a broker that it will get nothing more of this request from here, so that it does
        not wait for its end."""
        connection.silent.finished.append((request_id, "cancelled"))
        self._outbox.touch(connection.silent)

    def renounce(self, connection: Connection, stream: Stream) -> bool:
        """Give up a held request that cannot be continued for its client. True if a new run takes
        its place and slot; False if it had already ended."""
        self._leave_broker(connection, stream)
        connection.held.discard(stream.request_id)  # for this broker the request continues
        if not stream.running:
            self.forget(stream)
            return False
        self.abandon(stream)
        self._slotless.add(stream.job_id)
        return True

    def drop_cancelled(self, connection: Connection, stream: Stream) -> None:
        """Forget a run that the broker cancelled because the request moved; the engine's job keeps
        its slot until it is over. This CANCEL is answered like any other."""
        if stream.running:
            stream.end = (END, "cancelled", "", {}, {})
        if not stream.end_sent:
            self._tell_over(connection, stream.request_id)
        self._leave_broker(connection, stream)
        connection.held.discard(stream.request_id)
        self.forget(stream)

    def abandon(self, stream: Stream) -> None:
        """Stop a running request for which nothing more will be sent."""
        self.out.append(EngineCancel(stream.job_id))
        stream.end = (END, "cancelled", "", {}, {})
        self._tell_holders(stream, "cancelled")
        self.forget(stream)

    def _tell_holders(self, stream: Stream, outcome: str) -> None:
        """Tell the brokers that know from HELLO that it is held, and that wait for its client, that
        it is over."""
        for connection in self._connections:
            if connection.open and stream.request_id in connection.held:
                connection.held.discard(stream.request_id)
                connection.silent.finished.append((stream.request_id, outcome))
                self._outbox.touch(connection.silent)

    def tell_ended(self, connection: Connection) -> None:
        """Tell a broker whose session has just begun which requests that HELLO named as running
        have ended in the meantime."""
        for request_id in sorted(connection.held):
            stream = self.streams.get(request_id)
            if stream is None or stream.end is not None:
                connection.held.discard(request_id)
                connection.silent.finished.append((request_id, _outcome(stream)))
                self._outbox.touch(connection.silent)

    def forget(self, stream: Stream) -> None:
        """Drop all that is kept of a request; the engine may still have its job for a moment."""
        stream.detach()
        del self.streams[stream.request_id]
        self._kept_bytes -= self._kept.pop(stream.request_id, 0)

    def orphan(self, connection: Connection, now_s: float) -> None:
        """Detach the requests of a lost session, which keep running for the grace period."""
        for stream in self.streams.values():
            if stream.route is not None and stream.route.connection is connection:
                stream.detach()
                stream.blocked_since_s = None
                if stream.running:
                    stream.orphaned_s = now_s
                    self._at(now_s + self._grace_s, _Timer.ORPHANED, stream)
                else:
                    self._keep_from(stream, now_s)
        self._outbox.session_over(connection)

    def engine_lost(self) -> None:
        """Forget running requests, which are lost; ended ones can still be resumed."""
        for stream in list(self.streams.values()):
            if stream.running:
                stream.detach()
                del self.streams[stream.request_id]
        self._jobs.clear()
        self._slotless.clear()

    # --- window, cancel, end ----------------------------------------------------------------------

    def widen(self, connection: Connection, request_id: bytes, limit: int, now_s: float) -> None:
        """WINDOW: tokens below `limit` may be sent."""
        stream = self.streams.get(request_id)
        if stream is None or stream.route is None or stream.route.connection is not connection:
            return
        if limit > stream.window:
            stream.window = limit
            stream.blocked_since_s = None
            self._tell_window(stream)
            self.advance(stream, now_s)

    def _tell_window(self, stream: Stream) -> None:
        if self._tell_windows and stream.running:
            self.out.append(EngineWindow(stream.job_id, stream.window))

    def cancel(self, connection: Connection, request_id: bytes, now_s: float) -> None:
        """CANCEL: the engine's next step answers it, unless the request had already ended.

        A request that nobody receives any more is dropped: the broker knows that it runs elsewhere,
        or that its client will not come back. A CANCEL from another broker stops nothing, since the
        request has moved away from it; that broker is told not to wait.
        """
        stream = self.streams.get(request_id)
        route = stream.route if stream is not None else None
        if stream is None or (route is None and not stream.running):
            self._tell_over(connection, request_id)
        elif route is None:
            self._log("request abandoned", stream, cause="the broker cancelled it")
            self._tell_over(connection, request_id)
            connection.held.discard(request_id)
            self.abandon(stream)
        elif route.connection is not connection:
            self._tell_over(connection, request_id)
        elif stream.running:
            if not stream.cancelled:
                stream.cancelled = True
                self.out.append(EngineCancel(stream.job_id))
                if stream.model in self.batched:
                    # The engine stops it at its next step; the request that takes its place arrives
                    # before that, and waits in the engine for the memory.
                    self._slotless.add(stream.job_id)
        elif not stream.end_sent and stream.end is not None:
            # It ended, but the window holds the rest back, which nobody wants any more.
            # No later run may continue from what is cut here.
            stream.cancelled = True
            stream.cut()
            stream.end = (END, "cancelled", "", _usage(stream.end), {})
            self.advance(stream, now_s)

    def refuse(
        self, connection: Connection, request_id: bytes, assign: Assign, code: ErrorCode, why: str
    ) -> None:
        """Answer an ASSIGN without a valid request with FAIL."""
        route = connection.route(assign.reply_to)
        error = {"code": code.value, "message": why}
        route.events.append((FAIL, request_id, assign.epoch, 0, error))
        route.finished.append((request_id, code.value))
        self._outbox.touch(route)

    def _fail(self, stream: Stream, code: ErrorCode, message: str, now_s: float) -> None:
        """Fail a request, whatever the engine does; unsent tokens are dropped."""
        if stream.running:
            self.out.append(EngineCancel(stream.job_id))
        stream.cut()
        self._end(stream, (FAIL, {"code": code.value, "message": message}, {}), now_s)

    def _end(self, stream: Stream, end: tuple[Any, ...], now_s: float) -> None:
        """The answer is complete: send it as far as the window allows, and keep it for a while."""
        if stream.cancelled and len(stream.token_ids) > stream.window:
            # The rest would wait for a window that nobody will widen any more.
            stream.cut()
            end = (END, "cancelled", "", _usage(end), {})
        stream.end = end
        outcome = _outcome(stream)
        self._log("request ended", stream, outcome=outcome, tokens=len(stream.token_ids))
        self._tell_holders(stream, outcome)
        size = stream.size_bytes()
        self._kept_bytes += size - self._kept.pop(stream.request_id, 0)
        self._kept[stream.request_id] = size
        if stream.route is None:
            self._keep_from(stream, now_s)
        self.advance(stream, now_s)
        while len(self._kept) > KEPT_REQUESTS or self._kept_bytes > KEPT_BYTES:
            self._release(self._least_needed())

    def _keep_from(self, stream: Stream, now_s: float) -> None:
        """Keep an ended request that nobody receives at present, in case of a RESUME."""
        stream.kept_since_s = now_s
        self._at(now_s + self._kept_s, _Timer.KEPT, stream)

    def _least_needed(self) -> Stream:
        """The ended request to give up first: the oldest that nobody receives, otherwise the
        oldest."""
        alone = (id_ for id_ in self._kept if self.streams[id_].route is None)
        return self.streams[next(alone, None) or next(iter(self._kept))]

    def _release(self, stream: Stream) -> None:
        """Stop keeping an ended request; if a client still waits for the rest, tell it."""
        if stream.route is not None:
            message = "the client read the answer too slowly for its tokens to be kept"
            stream.cut()
            stream.end = (FAIL, {"code": ErrorCode.SLOW_CONSUMER.value, "message": message}, {})
            # One last event, even if the socket accepts no more for now: the link keeps it.
            self._outbox.touch(stream.route)
            stream.send_ready()
        self.forget(stream)

    # --- output -----------------------------------------------------------------------------------

    def stepped(self, engine_events: list[Any], now_s: float) -> None:
        """Take the events of one engine step. Every token of the worker passes through here."""
        jobs = self._jobs
        for event in engine_events:
            stream = jobs.get(event[1])
            if stream is None:
                continue
            if event[0] != TOKENS:
                self._engine_event(stream, event, now_s)
                continue
            if stream.end is not None:
                continue
            _, _, ids, text, logprobs, *more = event
            pieces = more[0] if more else None
            tokens = stream.token_ids
            offset = len(tokens)
            count = offset + len(ids)
            route = stream.route
            if (
                logprobs is None
                and route is not None
                and stream.sent == offset
                and count <= stream.window
                and stream.interval == 1
                and stream.piece == len(stream.ends)
                and not route.connection.blocked
                and (stream.shows_kinds or not stream.split or pieces)
            ):
                # Nothing is held back, so the event is passed on unchanged. If this process is
                # behind and reads several steps at once, a stream's tokens become one event, which
                # saves work for everyone downstream.
                tokens += ids
                stream.ends.append(count)
                stream.sent = count
                stream.piece += 1
                if pieces:
                    stream.split = stream.shows_kinds = True
                    stream.texts.append(pieces)
                    route.events.append(
                        (TOKENS, stream.request_id, stream.epoch, offset, ids, text, None, pieces)
                    )
                else:
                    stream.texts.append(text)
                    unsent = stream.unsent
                    if (
                        unsent is not None
                        and stream.unsent_batch == route.batch
                        and unsent[3] + len(unsent[4]) == offset
                        and count - unsent[3] <= COALESCED_TOKENS
                    ):
                        unsent[4] += ids
                        unsent[5] += text
                    else:
                        unsent = [TOKENS, stream.request_id, stream.epoch, offset, ids, text]
                        route.events.append(unsent)
                        if stream.joins:
                            stream.unsent, stream.unsent_batch = unsent, route.batch
                if not stream.started:
                    stream.started = True
                    route.started.append(stream.request_id)
                if not route.touched:
                    self._outbox.touch(route)
            else:
                stream.append(ids, text, logprobs, pieces)
                self.advance(stream, now_s)

    def _engine_event(self, stream: Stream, event: list[Any], now_s: float) -> None:
        tag, job_id, *fields = event
        if tag == PROMPT:
            stream.prompt = tuple(fields)
            self.advance(stream, now_s)
            return
        del self._jobs[job_id]
        self._slotless.discard(job_id)
        if stream.end is None:
            self._end(stream, (tag, *fields), now_s)

    def advance(self, stream: Stream, now_s: float) -> None:
        """Send as much of a stream as possible."""
        route = stream.route
        if route is None or route.connection.blocked:
            return
        self._outbox.touch(route)
        if stream.send_ready():
            stream.blocked_since_s = None
        elif stream.blocked_since_s is None:
            stream.blocked_since_s = now_s
            self._watch_window(stream, now_s)
        if stream.end_sent:
            stream.detach()
            self._keep_from(stream, now_s)

    def _watch_window(self, stream: Stream, since_s: float) -> None:
        """Start the window timer; one for each stream, however often its window is used up."""
        if not stream.window_timer:
            stream.window_timer = True
            self._at(since_s + self._window_wait_s, _Timer.WINDOW, stream)

    def unblocked(self, connection: Connection, now_s: float) -> None:
        """Catch up after the socket accepts messages again, with as few events per stream as
        possible."""
        for stream in list(self.streams.values()):
            if stream.route is not None and stream.route.connection is connection:
                self.advance(stream, now_s)

    def flush(self, now_s: float) -> None:
        """Send one OUTPUT to each client session for which there are events."""
        self._outbox.flush(self.out, now_s)

    def _drop(self, request_id: bytes) -> None:
        """Give up a request whose event is too large for any OUTPUT."""
        stream = self.streams.get(request_id)
        if stream is not None and stream.running:
            self.abandon(stream)
        elif stream is not None:
            self.forget(stream)

    def _log(self, event: str, stream: Stream, **fields: Any) -> None:
        fields = {"request": stream.request_id[:4].hex(), "model": stream.model, **fields}
        self.out.append(Log(event, fields, logging.DEBUG))


def _outcome(stream: Stream | None) -> str:
    """The finish reason, or the code of the failure, of a request that is over."""
    if stream is None or stream.end is None:
        return "cancelled"
    outcome: str = stream.end[1] if stream.end[0] == END else stream.end[1]["code"]
    return outcome


def _usage(end: tuple[Any, ...]) -> dict[str, int]:
    usage: dict[str, int] = end[3] if end[0] == END else end[2]
    return usage
