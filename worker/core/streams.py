"""One request at the worker: what was generated, what was sent, and to whom.

A `Stream` keeps every token, piece of text and log probability of an answer, so that it can be sent
again from any offset (SPEC.md section 6.4), and sends no token past the client's window (6.3). A
`Route` gathers the events of one client session. Must never know of credit, timers or sockets.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from broker.protocol.header import Flag, MessageType, prefix
from worker.engines.events import END, FAIL, PROMPT, TOKENS

if TYPE_CHECKING:
    from worker.core.connection import Connection

COALESCED_TOKENS: Final = 4096
"""Longest TOKENS event made when catching up: far below MAX_OUTPUT_BYTES at 5 bytes per token."""
COALESCED_LOGPROBS: Final = 256
"""The same with log probabilities: about 1 KiB for each token with 20 alternatives."""


class Route:
    """A client session at a broker, as the worker sees it: the header id of its OUTPUT."""

    __slots__ = (
        "connection",
        "events",
        "finished",
        "flagged",
        "plain",
        "started",
        "streams",
        "touched",
    )

    def __init__(self, connection: Connection, reply_to: bytes) -> None:
        self.connection = connection
        #: The first 24 bytes of the header, without and with the LEDGER flag.
        self.plain = prefix(MessageType.OUTPUT, reply_to)
        self.flagged = prefix(MessageType.OUTPUT, reply_to, Flag.LEDGER)
        #: Events of the message being assembled; empty between two calls of the core.
        self.events: list[Any] = []
        self.started: list[bytes] = []
        self.finished: list[Any] = []
        #: Streams that use the route; it is forgotten with the last one.
        self.streams = 0
        #: Whether it is in the list of routes to be sent to.
        self.touched = False

    def clear(self) -> None:
        """The message was sent, or will never be."""
        self.events = []
        self.started = []
        self.finished = []
        self.touched = False


class Stream:
    """A request that this worker runs or recently ran."""

    __slots__ = (
        "attached_at",
        "base_characters",
        "base_tokens",
        "blocked_since_s",
        "cancelled",
        "end",
        "end_sent",
        "ends",
        "epoch",
        "in_engine",
        "interval",
        "job_id",
        "kept_since_s",
        "logprobs",
        "model",
        "orphaned_s",
        "piece",
        "prompt",
        "prompt_sent",
        "request_id",
        "route",
        "sent",
        "skip",
        "started",
        "texts",
        "token_ids",
        "ttl_until_s",
        "window",
        "window_timer",
    )

    def __init__(
        self,
        request_id: bytes,
        job_id: bytes,
        model: str,
        interval: int,
        prior_token_ids: list[int],
        prior_characters: int,
    ) -> None:
        self.request_id = request_id
        #: The engine's id for this run: the request id, or a fresh id if it had to be run again.
        self.job_id = job_id
        self.model = model
        #: `Params.stream_interval`.
        self.interval = interval
        #: The answer's tokens, including those that came with a RESUME.
        self.token_ids: list[int] = list(prior_token_ids)
        #: Pieces of text as the engine returned them, and the token count at which
        #: each was complete.
        self.texts: list[str] = []
        self.ends: list[int] = []
        #: One entry for each token from `base_tokens` on, or None if not requested.
        self.logprobs: list[Any] | None = None
        #: Number of tokens that another worker generated; their text is not here.
        self.base_tokens = len(prior_token_ids)
        self.base_characters = prior_characters
        #: The PROMPT event's fields after the offset.
        self.prompt: tuple[Any, ...] | None = None
        #: The END or FAIL event's fields after the offset, tag first; None while it runs.
        self.end: tuple[Any, ...] | None = None
        #: When it ended unread, or lost its reader after its end; the retention period starts here.
        self.kept_since_s = 0.0
        #: Whether the engine still has the job, so that it still occupies a slot.
        self.in_engine = True
        #: Whether the client asked for cancellation.
        self.cancelled = False

        # Destination and progress in the current epoch:
        self.route: Route | None = None
        self.epoch = 0
        #: The first token offset that may not be sent.
        self.window = 0
        #: Number of tokens sent; `piece` and `skip` (characters of that piece) say how much of the
        #: text was sent.
        self.sent = self.base_tokens
        self.piece = 0
        self.skip = 0
        #: Token offset at which the current epoch began.
        self.attached_at = self.base_tokens
        self.prompt_sent = False
        self.started = False
        self.end_sent = False
        #: When its time to live ends.
        self.ttl_until_s = math.inf
        #: Since when tokens wait for the client's window.
        self.blocked_since_s: float | None = None
        #: Whether a timer watches that.
        self.window_timer = False
        #: When its session was lost; only while it has no route.
        self.orphaned_s: float | None = None

    # --- what was generated ---------------------------------------------------------------------

    def append(self, token_ids: list[int], text: str, logprobs: list[Any] | None) -> None:
        """Keep what the engine generated."""
        if logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += logprobs
        self.token_ids += token_ids
        self.texts.append(text)
        self.ends.append(len(self.token_ids))

    @property
    def running(self) -> bool:
        """Whether its end is not known yet."""
        return self.end is None

    @property
    def retryable(self) -> bool:
        """Whether it failed in a way that another attempt may fix: a RESUME runs it again."""
        return self.end is not None and self.end[0] == FAIL and bool(self.end[1].get("retryable"))

    def size_bytes(self) -> int:
        """Approximate size in memory; used to limit what is kept of ended requests."""
        characters = sum(map(len, self.texts))
        logprobs = len(self.logprobs or ()) * 1024
        return 512 + 40 * len(self.token_ids) + 120 * len(self.texts) + 2 * characters + logprobs

    def holds(self, token_ids: list[int], characters: int) -> bool:
        """Whether the stream can continue after the tokens and characters that a client has.

        False if the client has received different or more tokens from another worker, or asks for
        text that this worker never had.
        """
        count = len(token_ids)
        return (
            self.base_tokens <= count <= len(self.token_ids)
            and self.base_characters
            <= characters
            <= self.base_characters + sum(map(len, self.texts))
            and self.token_ids[:count] == token_ids
        )

    # --- sending --------------------------------------------------------------------------------

    def attach(
        self, route: Route, epoch: int, window: int, count: int, characters: int, prompt_seen: bool
    ) -> None:
        """Send to `route` under `epoch`, starting at token `count` and character `characters`."""
        self.detach()
        route.streams += 1
        self.route = route
        self.epoch = epoch
        self.window = window
        self.sent = self.attached_at = count
        self.prompt_sent = prompt_seen
        self.started = self.end_sent = False
        self.blocked_since_s = self.orphaned_s = None
        rest = characters - self.base_characters
        piece = 0
        while piece < len(self.texts) and rest >= len(self.texts[piece]):
            rest -= len(self.texts[piece])
            piece += 1
        self.piece = piece
        self.skip = rest

    def detach(self) -> None:
        """Forget the destination."""
        if self.route is not None:
            self.route.streams -= 1
            self.route = None

    def _text_until(self, token_count: int) -> str:
        """Unsent text that was complete with the first `token_count` tokens; it then
        counts as sent."""
        first = self.piece
        last = first
        ends = self.ends
        while last < len(ends) and ends[last] <= token_count:
            last += 1
        if last == first:
            return ""
        text = "".join(self.texts[first:last])[self.skip :]
        self.piece = last
        self.skip = 0
        return text

    def send_ready(self) -> bool:
        """Add everything that may be sent now to the route's next message.

        Tokens past the window stay; fewer than `interval` tokens wait for more. Returns False if
        the window holds something back.
        """
        route = self.route
        if route is None or self.end_sent:
            return True
        events = route.events
        if self.prompt is not None and not self.prompt_sent:
            events.append((PROMPT, self.request_id, self.epoch, 0, *self.prompt))
            self.prompt_sent = True
        total = len(self.token_ids)
        limit = min(total, self.window)
        if limit - self.sent >= self.interval or self.end is not None or limit < total:
            self._send_tokens(route, limit)
        if self.sent < total:
            return limit == total
        if self.end is not None:
            self._send_end(route)
        return True

    def _send_tokens(self, route: Route, limit: int) -> None:
        most = COALESCED_TOKENS if self.logprobs is None else COALESCED_LOGPROBS
        while self.sent < limit:
            offset = self.sent
            count = min(limit, offset + most)
            ids = self.token_ids[offset:count]
            text = self._text_until(count)
            if self.logprobs is None:
                route.events.append((TOKENS, self.request_id, self.epoch, offset, ids, text))
            else:
                base = self.base_tokens
                logprobs = self.logprobs[offset - base : count - base]
                route.events.append(
                    (TOKENS, self.request_id, self.epoch, offset, ids, text, logprobs)
                )
            self.sent = count
            if not self.started:
                self.started = True
                route.started.append(self.request_id)

    def _send_end(self, route: Route) -> None:
        assert self.end is not None
        tag, *fields = self.end
        offset = len(self.token_ids)
        if tag == END:
            reason, text, *rest = fields
            text = self._text_until(offset) + text
            usage = rest[0]
            outcome = reason
            route.events.append((END, self.request_id, self.epoch, offset, reason, text, *rest))
        else:
            error, usage = fields
            outcome = error["code"]
            route.events.append((FAIL, self.request_id, self.epoch, offset, error))
        route.finished.append(
            (
                self.request_id,
                outcome,
                usage.get("prompt_tokens", 0),
                usage.get("completion_tokens", 0),
            )
        )
        self.end_sent = True

    def cut(self) -> None:
        """Drop what was generated but not sent: the answer ends with what the client has."""
        del self.token_ids[self.sent :]
        del self.texts[self.piece :]
        del self.ends[self.piece :]
        if self.logprobs is not None:
            del self.logprobs[max(0, self.sent - self.base_tokens) :]
