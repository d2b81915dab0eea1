"""One request at the worker: what was generated, what was sent, and to whom.

A `Stream` keeps every token, piece of text and logprob of an answer, so that it can be sent again
from any offset (SPEC.md section 6.4), and sends no token past the client's window (6.3). A `Route`
gathers the events of one client session. Must never know about credit, timers or sockets.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from broker.protocol.header import Flag, MessageType, prefix
from broker.protocol.messages import PieceKind
from worker.engines.events import END, FAIL, PROMPT, TOKENS

if TYPE_CHECKING:
    from worker.core.connection import Connection

CONTENT: Final = PieceKind.CONTENT.value
_RUNS: Final = (CONTENT, PieceKind.REASONING.value, PieceKind.ARGUMENTS.value)
"""Kinds of pieces that are joined when they are adjacent."""

COALESCED_TOKENS: Final = 4096
"""Longest TOKENS event made when catching up: far below MAX_OUTPUT_BYTES at 5 bytes per token."""
COALESCED_LOGPROBS: Final = 256
"""The same with logprobs, which take about 1 KiB for each token with 20 alternatives."""


class Route:
    """A client session at a broker, as the worker sees it: the header id of its OUTPUT."""

    __slots__ = (
        "batch",
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
        #: Counts messages, so that a stream knows whether its latest event is still in this one.
        self.batch = 0
        self.started: list[bytes] = []
        self.finished: list[Any] = []
        #: Number of streams that use the route; unused ones are dropped from time to time.
        self.streams = 0
        #: Whether it is in the list of routes to be sent to.
        self.touched = False

    def clear(self) -> None:
        """Begin a new message: the last one was sent, or never will be."""
        self.events = []
        self.batch += 1
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
        "interval",
        "job_id",
        "joins",
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
        "shows_kinds",
        "skip",
        "split",
        "started",
        "texts",
        "token_ids",
        "ttl_until_s",
        "unsent",
        "unsent_batch",
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
        #: Texts as the engine returned them, and the number of tokens with which each was complete.
        #: If the answer is split into pieces, a text is a list of [kind, text].
        self.texts: list[Any] = []
        self.ends: list[int] = []
        self.split = False
        #: One entry for each token from `base_tokens` on, or None if not requested.
        self.logprobs: list[Any] | None = None
        #: Number of tokens that another worker generated; their text is not kept here.
        self.base_tokens = len(prior_token_ids)
        self.base_characters = prior_characters
        #: The PROMPT event's fields after the offset.
        self.prompt: tuple[Any, ...] | None = None
        #: The END or FAIL event's fields after the offset, tag first; None while it runs.
        self.end: tuple[Any, ...] | None = None
        #: When it ended unread, or lost its reader after its end; the time it is kept begins then.
        self.kept_since_s = 0.0
        #: Whether the client asked for cancellation.
        self.cancelled = False

        # Destination and progress in the current epoch:
        self.route: Route | None = None
        self.epoch = 0
        #: The first token offset that may not be sent.
        self.window = 0
        #: Number of tokens sent; `piece` and `skip` (characters of that text) say how much of the
        #: text was sent.
        self.sent = self.base_tokens
        self.piece = 0
        self.skip = 0
        #: Whether pieces were sent; the first text of a split answer must show that it is split.
        self.shows_kinds = False
        #: Token offset at which the current epoch began.
        self.attached_at = self.base_tokens
        self.prompt_sent = False
        self.started = False
        self.end_sent = False
        #: Whether tokens of several steps may be sent as one event.
        self.joins = True
        #: Its latest event without pieces or logprobs, and the `batch` of its route in which that
        #: is sent: until then more tokens can join it.
        self.unsent: list[Any] | None = None
        self.unsent_batch = 0
        #: When its time to live ends.
        self.ttl_until_s = math.inf
        #: Since when tokens wait for the client's window.
        self.blocked_since_s: float | None = None
        #: Whether a timer watches that.
        self.window_timer = False
        #: When its session was lost; only while it has no route.
        self.orphaned_s: float | None = None

    # --- what was generated ---------------------------------------------------------------------

    def append(
        self,
        token_ids: list[int],
        text: str,
        logprobs: list[Any] | None,
        pieces: list[Any] | None = None,
    ) -> None:
        """Keep what the engine generated."""
        if logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += logprobs
        self.token_ids += token_ids
        self.split = self.split or bool(pieces)
        self.texts.append(pieces or text)
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
        characters = sum(map(_characters, self.texts))
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
            <= self.base_characters + sum(map(_characters, self.texts))
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
        self.started = self.end_sent = self.shows_kinds = False
        self.blocked_since_s = self.orphaned_s = None
        rest = characters - self.base_characters
        piece = 0
        while piece < len(self.texts) and rest >= (size := _characters(self.texts[piece])):
            rest -= size
            piece += 1
        self.piece = piece
        self.skip = rest

    def detach(self) -> None:
        """Forget the destination."""
        if self.route is not None:
            self.route.streams -= 1
            self.route = None
            self.unsent = None

    def _text_until(
        self, token_count: int, rest: str = "", rest_pieces: list[Any] | None = None
    ) -> tuple[str, list[Any] | None]:
        """Take the unsent text that was complete with the first `token_count` tokens, and `rest`:
        its content, and all of it in pieces if the answer is split."""
        first = self.piece
        last = first
        ends = self.ends
        while last < len(ends) and ends[last] <= token_count:
            last += 1
        unsent = self.texts[first:last]
        skip = self.skip
        if last != first:
            self.piece = last
            self.skip = 0
        else:
            skip = 0
        if not self.split and not rest_pieces:
            return "".join(unsent)[skip:] + rest, None
        pieces = _joined([*unsent, rest_pieces or rest], skip)
        content = "".join([piece[1] for piece in pieces if piece[0] == CONTENT])
        plain = all(piece[0] == CONTENT for piece in pieces)
        if plain and (self.shows_kinds or not pieces):
            return content, None
        self.shows_kinds = True
        return content, pieces

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
            text, pieces = self._text_until(count)
            logprobs = None
            if self.logprobs is not None:
                base = self.base_tokens
                logprobs = self.logprobs[offset - base : count - base]
            event: tuple[Any, ...] = (TOKENS, self.request_id, self.epoch, offset, ids, text)
            if pieces is not None:
                event += (logprobs, pieces)
            elif logprobs is not None:
                event += (logprobs,)
            route.events.append(event)
            self.sent = count
            if not self.started:
                self.started = True
                route.started.append(self.request_id)

    def _send_end(self, route: Route) -> None:
        assert self.end is not None
        tag, *fields = self.end
        offset = len(self.token_ids)
        if tag == END:
            reason, text, usage, timings, *rest = fields
            text, pieces = self._text_until(offset, text, rest[2] if len(rest) > 2 else None)
            rest = rest[:2] if pieces is None else [*rest[:2], pieces]
            outcome = reason
            route.events.append(
                (END, self.request_id, self.epoch, offset, reason, text, usage, timings, *rest)
            )
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


def _characters(text: str | list[Any]) -> int:
    """Number of characters of a text, whole or in pieces."""
    return len(text) if isinstance(text, str) else sum(len(piece[1]) for piece in text)


def _joined(texts: list[Any], skip: int) -> list[Any]:
    """The pieces of texts after the first `skip` characters."""
    joined: list[Any] = []
    for text in texts:
        for kind, said, *more in [(CONTENT, text)] if isinstance(text, str) else text:
            passed = min(skip, len(said))
            skip -= passed
            if passed == len(said):
                continue
            if joined and joined[-1][0] == kind and kind in _RUNS:
                joined[-1][1] += said[passed:]
            else:
                joined.append([kind, said[passed:], *more])
    return joined
