"""Streamed answers: server-sent events, keep-alives, and noticing at once when the reader
disconnects. An API of another framing gives its own media type and keep-alive.

`EventStream` is the only way from a stream of events to an HTTP answer. Events that arrive together
are sent in one write. The status line waits for the first event, so that a request that fails at
once gets a real HTTP status; a request that waits longer gets its headers and comment lines, which
keep proxies and readers from giving up. When the reader disconnects, the source is closed, which
cancels at the worker. A slow reader slows the source down.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from broker.protocol.errors import ErrorCode
from client.gateway.errors import ErrorShape, GatewayError, describe, error_body, error_response

__all__ = [
    "DONE",
    "KEEP_ALIVE",
    "STATUS_LEFT",
    "STOPPING",
    "EventStream",
    "Source",
    "Stopping",
    "encode",
    "until_disconnect",
]

STATUS_LEFT: Final = 499
"""Status of a stream whose reader disconnected: nginx's number, only used in log,
metrics and traces."""

STOPPING: Final = GatewayError(
    ErrorCode.DRAINING,
    "This gateway is stopping and the answer is not complete; ask again, or continue at another "
    "one.",
    retryable=True,
)
"""Ends an answer that is still running after the gateway's grace period."""

#: No empty line after it: OpenAI's SDKs would read that as an event without data, once they have
#: seen an id, and fail. The comment becomes the first line of the next event.
KEEP_ALIVE: Final = b": keep-alive\n"


WAITING_S: Final = 2.0
"""Between two comments to a reader whose request waits for a worker."""


def encode(data: str | bytes, *, event: str | None = None, id_: str | None = None) -> bytes:
    """One event. `data` is one line (JSON has no raw newline)."""
    raw = data.encode() if isinstance(data, str) else data
    lines = "" if id_ is None else f"id: {id_}\n"
    if event is not None:
        lines += f"event: {event}\n"
    return b"%bdata: %b\n\n" % (lines.encode(), raw)


DONE: Final = encode(b"[DONE]")

#: Batches of encoded events that arrived together; a batch is never empty.
Source = AsyncGenerator[Sequence[bytes], None]


class EventStream(Response):
    """An HTTP answer whose body is the events of `source`.

    `on_error` makes the last events of a stream that fails after its headers were sent, and
    `error_shape` the whole answer of one that fails before. `keep_alive` makes what is sent after
    `keep_alive_s` of silence; `waiting` gives the headers that tell how long a request must wait,
    and none once it runs. `source` is closed on every path: end, failure, disconnect, server
    stopping.
    """

    def __init__(
        self,
        source: Source,
        *,
        on_error: Callable[[GatewayError], list[bytes]],
        request_id: str,
        keep_alive_s: float,
        headers: dict[str, str] | None = None,
        media_type: str = "text/event-stream",
        keep_alive: Callable[[], bytes] = lambda: KEEP_ALIVE,
        error_shape: ErrorShape = error_body,
        waiting: Callable[[], dict[str, str]] = dict,
    ) -> None:
        super().__init__(None, 200, headers, media_type)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        # Otherwise nginx would buffer the events.
        self.headers["x-accel-buffering"] = "no"
        self._source = source
        self._on_error = on_error
        self._request_id = request_id
        self._keep_alive_s = keep_alive_s
        self._keep_alive = keep_alive
        self._error_shape = error_shape
        self._waiting = waiting
        self._started = False
        #: Since when the source is waited for; None while waiting for the socket.
        self._silent_since_s: float | None = None
        #: The task sending a comment.
        self._comment: asyncio.Task[None] | None = None
        #: The outcome as a status, for log and metrics.
        self.outcome = 200
        self.failure: GatewayError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # One task drives the source from start to end, as asynchronous generators require.
        writer = asyncio.create_task(self._write(scope, receive, send))
        leaving = asyncio.create_task(_disconnected(receive))
        tasks: set[asyncio.Task[Any]] = {writer, leaving}
        stopping: Stopping = scope["app"].state.stopping
        over = asyncio.get_running_loop().create_future()

        def end(_: object = None) -> None:
            if not over.done():
                over.set_result(None)

        for task in tasks:
            task.add_done_callback(end)
        stopping.tell(end)
        try:
            while not over.done():
                await asyncio.wait({over}, timeout=self._keep_alive_in_s(send))
            if not writer.done() and leaving.done():
                self.outcome = STATUS_LEFT
            elif not writer.done():
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
                self.failure = STOPPING
                self.outcome = self.failure.status
                await self._last_words(scope, receive, send, self.failure)
        finally:
            stopping.forget(end)
            if self._comment is not None:
                tasks.add(self._comment)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _keep_alive_in_s(self, send: Send) -> float:
        """Start sending a comment if one is due; returns the time until the next."""
        if self._silent_since_s is None or self._comment is not None:
            return min(WAITING_S, self._keep_alive_s)
        now_s = asyncio.get_running_loop().time()
        # Before the first comment, an early failure still has its own status.
        waits = self._started and bool(self._waiting())
        every_s = min(WAITING_S, self._keep_alive_s) if waits else self._keep_alive_s
        left_s = self._silent_since_s + every_s - now_s
        if left_s > 0:
            return left_s
        self._silent_since_s = now_s
        self._comment = asyncio.create_task(self._tell(send, self._keep_alive()))
        self._comment.add_done_callback(self._commented)
        return every_s

    def _commented(self, task: asyncio.Task[None]) -> None:
        self._comment = None

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._source) as source:
            events = await self._next(source)
            while events:
                told, last = events, events[-1] == DONE
                if last:
                    # Nothing follows it, so that the end of the body goes in the same write.
                    events = await self._next(source)
                over = last and not events and self.failure is None
                await self._tell(send, b"".join(told), over=over)
                if over:
                    return
                if not last:
                    events = await self._next(source)
        if self.failure is None:
            await self._tell(send, b"", over=True)
        else:
            await self._last_words(scope, receive, send, self.failure)

    async def _last_words(
        self, scope: Scope, receive: Receive, send: Send, failure: GatewayError
    ) -> None:
        if self._started:
            await self._tell(send, b"".join(self._on_error(failure)), over=True)
        else:
            response = error_response(failure, self._request_id, self._error_shape)
            await response(scope, receive, send)

    async def _next(self, source: Source) -> Sequence[bytes]:
        """The next events; empty when the source is over or failed."""
        self._silent_since_s = asyncio.get_running_loop().time()
        events: Sequence[bytes] = ()
        try:
            events = await anext(source)
        except StopAsyncIteration:
            pass
        except Exception as error:
            self.failure = describe(error)
            self.outcome = self.failure.status
        self._silent_since_s = None
        if self._comment is not None:
            await asyncio.wait({self._comment})
        return events

    async def _tell(self, send: Send, raw: bytes, *, over: bool = False) -> None:
        if not self._started:
            self._started = True
            self.headers.update(self._waiting())
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
        await send({"type": "http.response.body", "body": raw, "more_body": not over})


class Stopping:
    """The gateway's grace period is over: tells everything that still streams. A call, and no task
    that waits: there may be thousands."""

    def __init__(self) -> None:
        self._begun = False
        self._told: set[Callable[[], None]] = set()

    def begin(self) -> None:
        """Now."""
        self._begun = True
        for call in tuple(self._told):
            call()

    def tell(self, call: Callable[[], None]) -> None:
        """Call this then, or at once if that has been."""
        self._told.add(call)
        if self._begun:
            call()

    def forget(self, call: Callable[[], None]) -> None:
        """It need not be called any more."""
        self._told.discard(call)


async def _disconnected(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


T = TypeVar("T")


async def until_disconnect(work: AsyncGenerator[Sequence[T], None], receive: Receive) -> list[T]:
    """Collect all batches of `work`, for an answer that is not streamed.

    Raises GatewayError(cancelled) as soon as the HTTP client disconnects, after closing `work`.
    """

    async def gather() -> list[T]:
        async with contextlib.aclosing(work):
            return [item async for batch in work for item in batch]

    working = asyncio.create_task(gather())
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise GatewayError(ErrorCode.CANCELLED, "The HTTP client disconnected.")
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(leaving, working, return_exceptions=True)
