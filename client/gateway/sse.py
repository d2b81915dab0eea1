"""Server-sent events: framing, keep-alives, and noticing at once that the reader is gone.

`EventStream` is the one way from a stream of events to an HTTP answer. The status line waits for
the first event, so that a request which fails at once gets a real HTTP status; a request that waits
longer gets its headers and comment lines, which keep proxies and readers from giving up. When the
reader goes away the source is closed, which cancels at the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from broker.protocol.errors import ErrorCode
from client.gateway.errors import GatewayError, describe, error_response

__all__ = ["DONE", "KEEP_ALIVE", "Event", "EventStream", "encode", "until_disconnect"]

KEEP_ALIVE: Final = b": keep-alive\n\n"

#: Events between the source and the socket; a reader that is slower holds the source back.
_QUEUED_EVENTS: Final = 64


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `data` is one line (JSON has no raw newline)."""

    data: str
    event: str | None = None
    id: str | None = None


DONE = Event("[DONE]")


def encode(event: Event) -> bytes:
    """The octets of one event."""
    lines = ""
    if event.id is not None:
        lines += f"id: {event.id}\n"
    if event.event is not None:
        lines += f"event: {event.event}\n"
    return f"{lines}data: {event.data}\n\n".encode()


Source = AsyncGenerator[Event, None]


class EventStream(Response):
    """An HTTP answer whose body is the events of `source`.

    `on_error` makes the last events of a stream that fails after its headers went out. `source` is
    closed on every path: end, failure, reader gone, server stopping.
    """

    def __init__(
        self,
        source: Source,
        *,
        on_error: Callable[[GatewayError], list[Event]],
        request_id: str,
        keep_alive_s: float,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(None, 200, headers, "text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        # nginx would otherwise hold the events back.
        self.headers["x-accel-buffering"] = "no"
        self._source = source
        self._on_error = on_error
        self._request_id = request_id
        self._keep_alive_s = keep_alive_s
        #: What became of it, for the log and the metrics: a status, 499 when the reader left.
        self.outcome = 200
        self.failure: GatewayError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(scope, receive, send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({writer, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not writer.done():
                self.outcome = 499
        finally:
            leaving.cancel()
            writer.cancel()
            await asyncio.gather(leaving, writer, return_exceptions=True)

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(_QUEUED_EVENTS)
        # One task drives the source from start to end, as asynchronous generators need it.
        reader = asyncio.create_task(self._read(queue))
        started = False
        try:
            while True:
                try:
                    async with asyncio.timeout(self._keep_alive_s):
                        item = await queue.get()
                except TimeoutError:
                    item = KEEP_ALIVE
                if isinstance(item, BaseException) and not started:
                    self.failure = describe(item)
                    self.outcome = self.failure.status
                    await error_response(self.failure, self._request_id)(scope, receive, send)
                    return
                if not started:
                    started = True
                    await self._start(send)
                octets, over = self._gathered(item, queue)
                await send({"type": "http.response.body", "body": octets, "more_body": not over})
                if over:
                    return
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, queue: asyncio.Queue[bytes | BaseException | None]) -> None:
        try:
            async with contextlib.aclosing(self._source):
                async for event in self._source:
                    await queue.put(encode(event))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    def _gathered(
        self,
        item: bytes | BaseException | None,
        queue: asyncio.Queue[bytes | BaseException | None],
    ) -> tuple[bytes, bool]:
        """The octets of `item` and of all that is ready, and whether they are the last."""
        octets = b""
        while True:
            if isinstance(item, BaseException):
                told = self.failure = describe(item)
                self.outcome = told.status
                return octets + b"".join(map(encode, self._on_error(told))), True
            if item is None:
                return octets, True
            octets += item
            if queue.empty():
                return octets, False
            item = queue.get_nowait()

    async def _start(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )


async def _disconnected(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


T = TypeVar("T")


async def until_disconnect(work: AsyncGenerator[T, None], receive: Receive) -> list[T]:
    """Everything that `work` yields, for an answer that is not streamed.

    Raises GatewayError(cancelled) as soon as the HTTP client is gone, after `work` was closed.
    """

    async def gather() -> list[T]:
        async with contextlib.aclosing(work):
            return [item async for item in work]

    working = asyncio.create_task(gather())
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise GatewayError(ErrorCode.CANCELLED, "The HTTP client went away.")
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(leaving, working, return_exceptions=True)
