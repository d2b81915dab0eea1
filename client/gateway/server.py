"""The HTTP server with limits: time for each head and body, size of heads, number of connections.

uvicorn's own protocol class does the work; this adds the limits that it lacks against greedy
callers. A connection is *unused* until a head is complete, and again once its answer is complete:
then it has a time limit, and it is closed first when there are too many. Knows HTTP but no API;
`RequestContext.body` limits the size of bodies.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from broker.protocol.descriptors import raise_descriptor_limit
from broker.protocol.errors import ErrorCode
from client.gateway.config import Config
from client.gateway.errors import GatewayError, error_body

__all__ = ["Bounds", "Server", "protocol_class"]

log = logging.getLogger("tokenbus.gateway")

MAX_HEAD_BYTES: Final = 64 * 1024
"""Limit for names and values of all header fields plus the address. Real heads have a few hundred
bytes, single sign-on tokens a few thousand."""
MAX_FIELDS: Final = 200

BODY_BYTES_PER_S: Final = 16 * 1024
"""A body that arrives at this rate is never late; a modem is faster."""

KEEP_ALIVE_S: Final = 5
"""How long a connection may be unused between two requests; uvicorn's default."""

BACKLOG: Final = 512
"""Connections that may wait to be accepted. This many may be accepted in one step of the loop,
before the limit on connections is checked."""

RESERVED_DESCRIPTORS: Final = 64
"""For the bus, remote images, files and peers."""

LAST_WORDS_S: Final = 2
"""Time for the last events to be sent, after the grace period."""

LOG_INTERVAL_S: Final = 60.0

_OUT_OF_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Bounds:
    """State that all connections of one server share."""

    def __init__(self, config: Config, descriptors: int) -> None:
        """`descriptors`: how many this process may have."""
        self.head_s = config.head_s
        self.body_s = config.body_s
        room = descriptors - RESERVED_DESCRIPTORS
        #: Connections at once.
        self.connections = max(1, min(config.max_connections, room))
        #: Unused connections, longest unused first.
        self.unused: OrderedDict[Connection, None] = OrderedDict()


def protocol_class(bounds: Bounds) -> type[Connection]:
    """A connection class with these limits, as uvicorn expects it."""
    return type("Connection", (Connection,), {"bounds": bounds})


class Connection(HttpToolsProtocol):
    """One connection."""

    bounds: Bounds

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        #: Timer that ends an incomplete head or body.
        self._deadline: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0
        #: Why the head is refused.
        self._refusal: tuple[HTTPStatus, str] | None = None
        self._body_bytes = 0
        self._body_since_s = 0.0

    # --- the connection ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_deadline(self.bounds.head_s, self._head_is_late)
        self.bounds.unused[self] = None
        if len(self.connections) > self.bounds.connections:
            oldest = next(iter(self.bounds.unused))
            if oldest is self:
                # All others are in use.
                self._refuse(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    f"This gateway has {self.bounds.connections} connections; try again.",
                    ErrorCode.OVERLOADED,
                )
            else:
                oldest.transport.abort()
                # Not removed at once: `connection_lost` is called in a later step of the loop.
                oldest._gone()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone()
        super().connection_lost(exc)

    def _gone(self) -> None:
        self._clear_deadline()
        self.bounds.unused.pop(self, None)
        self.connections.discard(self)

    # --- what comes in ---

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if self._deadline is None and self._is_unused:
            # Also for data that does not begin a message, such as empty lines.
            self._set_deadline(self.bounds.head_s, self._head_is_late)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                # Another protocol has the connection from now on, and counts it.
                self._gone()
                self.handle_websocket_upgrade()
                return
            # Any other upgrade is ignored, as if it had not been requested.
        except httptools.HttpParserError as error:
            if self._refusal is not None:
                self._refuse(*self._refusal)
            else:
                self._refuse(HTTPStatus.BAD_REQUEST, f"This is not an HTTP request: {error}.")
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(*_LARGE_HEAD)

    @property
    def _is_unused(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self._refusal = None

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if len(self.headers) >= MAX_FIELDS:
            self._stop(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"over {MAX_FIELDS} fields")
        super().on_header(name, value)

    def _count(self, size_bytes: int) -> None:
        self._head_bytes += size_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            self._stop(*_LARGE_HEAD)

    def _stop(self, status: HTTPStatus, message: str) -> None:
        """End the parsing of a head. It is `data_received` that refuses."""
        self._refusal = status, message
        raise ValueError(message)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._clear_deadline()
        self.bounds.unused.pop(self, None)
        self._body_bytes = 0
        self._body_since_s = self.loop.time()
        self._set_deadline(self.bounds.body_s, self._body_is_late)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._clear_deadline()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self._is_unused:
            self.bounds.unused[self] = None

    # --- time ---

    def _set_deadline(self, in_s: float, late: Callable[[], None]) -> None:
        self._clear_deadline()
        self._deadline = self.loop.call_later(in_s, late)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _head_is_late(self) -> None:
        if self._in_head:
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT,
                f"The head of the request did not arrive within {self.bounds.head_s:g} s.",
            )
        else:
            self.transport.close()

    def _body_is_late(self) -> None:
        passed_s = self.loop.time() - self._body_since_s
        left_s = self.bounds.body_s + self._body_bytes / BODY_BYTES_PER_S - passed_s
        if left_s > 0:
            self._set_deadline(left_s, self._body_is_late)
            return
        self._refuse(
            HTTPStatus.REQUEST_TIMEOUT,
            f"The body did not arrive: {self._body_bytes} bytes of it in {passed_s:.0f} s.",
        )

    def _refuse(
        self, status: HTTPStatus, message: str, code: ErrorCode = ErrorCode.INVALID_REQUEST
    ) -> None:
        """Send an error, unless an answer has begun, and close the connection."""
        self._clear_deadline()
        if self._is_unused or not self.cycle.response_started:
            retryable = code is ErrorCode.OVERLOADED
            told = GatewayError(code, message, status=status, retryable=retryable)
            body = json.dumps(error_body(told)).encode()
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\n"
                "content-type: application/json\r\n"
                f"content-length: {len(body)}\r\n"
                f"x-should-retry: {'true' if retryable else 'false'}\r\n"
                "connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


class Socket(WebSocketsSansIOProtocol):
    """One WebSocket. When the server stops, the application closes it: once its answer is over."""

    def shutdown(self) -> None:
        """See `Server.shutdown`, which tells the application."""


_LARGE_HEAD: Final = (
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    f"The head of the request is beyond {MAX_HEAD_BYTES} bytes.",
)


class Server(uvicorn.Server):
    """uvicorn's server with these limits."""

    def __init__(self, app: Any, config: Config) -> None:
        descriptors = raise_descriptor_limit(config.max_connections + BACKLOG + 256)
        bounds = Bounds(config, descriptors)
        if bounds.connections < config.max_connections:
            log.warning(
                "%d connections at once, not %d: this process may have %d descriptors (ulimit -n)",
                bounds.connections,
                config.max_connections,
                descriptors,
            )
        self._app = app
        self._shutdown_s = config.shutdown_s
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_class(bounds),
                ws=Socket,
                # A message is a body; what goes out are events, too short to be worth packing.
                ws_max_size=config.body_bytes,
                ws_per_message_deflate=False,
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                ssl_certfile=config.tls_cert,
                ssl_keyfile=config.tls_key,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(config.shutdown_s) + LAST_WORDS_S,
            )
        )

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Handle a signal. After the first one, answers may continue for `--shutdown-s`; the
        second ends them."""
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._end)
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        """Accept nothing new; after the grace period, open streams get a last event
        that says so."""
        self._loop = asyncio.get_running_loop()
        self._app.state.leaving.set()
        self._loop.call_later(self._shutdown_s, self._end)
        await super().shutdown(sockets)

    def _end(self) -> None:
        """End open streams with an event that says so; then cancel whatever else runs, which
        answers it with an error."""
        assert self._loop is not None
        self._app.state.stopping.begin()
        self._loop.call_later(LAST_WORDS_S, self._cancel)

    def _cancel(self) -> None:
        for task in self.server_state.tasks:
            task.cancel()

    async def startup(self, sockets: Any = None) -> None:
        asyncio.get_running_loop().set_exception_handler(ExceptionHandler())
        await super().startup(sockets)


class ExceptionHandler:
    """Exception handler of the event loop. asyncio reports each connection that it could not
    accept, many times a second; one line a minute is enough."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said_s = float("-inf")
        self._unsaid = 0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _OUT_OF_DESCRIPTORS:
            loop.default_exception_handler(context)
            return
        now_s = self._clock()
        if now_s - self._said_s < LOG_INTERVAL_S:
            self._unsaid += 1
            return
        log.error(
            "a connection could not be accepted: %s (%d more since the last such line); raise "
            "`ulimit -n` or lower --max-connections",
            error.strerror,
            self._unsaid,
        )
        self._said_s, self._unsaid = now_s, 0
