"""OUTPUT messages: one for each client session that has something to receive after an event.

`streams.Route` gathers the events of a session; here they become messages, with a ledger for the
broker if one is due. Knows nothing about requests. Must never touch a socket or a clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import msgspec

from broker.protocol.errors import ErrorCode
from broker.protocol.limits import MAX_OUTPUT_BYTES
from worker.core.connection import Connection
from worker.core.instructions import Instruction, Send
from worker.core.streams import Route
from worker.engines.events import FAIL

_ARRAY_HEADER_BYTES = 5
_encode = msgspec.msgpack.Encoder().encode
"""For events and ledgers, which are plain values made here: it produces the same bytes as
`codec.pack`, four times as fast."""


class Outbox:
    """The routes to which something must be sent."""

    def __init__(self, drop: Callable[[bytes], None]) -> None:
        """`drop`: called with the id of a request whose event is too large for any OUTPUT."""
        self._drop = drop
        self._touched: list[Route] = []

    @property
    def empty(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self._touched

    def touch(self, route: Route) -> None:
        """Note that the route has something to send."""
        if not route.touched:
            route.touched = True
            self._touched.append(route)

    def session_over(self, connection: Connection) -> None:
        """Drop what waits for a lost session."""
        for route in self._touched:
            if route.connection is connection:
                route.clear()
        self._touched = [route for route in self._touched if route.connection is not connection]

    def flush(self, out: list[Instruction], now_s: float) -> None:
        """Append one OUTPUT for each route that has something to send to `out`."""
        touched, self._touched = self._touched, []
        for route in touched:
            if route.events or route.finished:
                self._send(route, out, now_s)
            route.clear()

    def _send(self, route: Route, out: list[Instruction], now_s: float) -> None:
        connection = route.connection
        body = _encode(route.events)
        if len(body) > MAX_OUTPUT_BYTES:
            *bodies, body = self._split(route)
            for part in bodies:
                out.append(Send(connection.index, (connection.seal(route.plain, now_s), part)))
        credit = connection.credit
        if route.started or route.finished or credit.announced != credit.granted:
            ledger = _encode((credit.announce(), route.finished, route.started))
            frames = (connection.seal(route.flagged, now_s), body, ledger)
            out.append(Send(connection.index, frames))
        else:
            out.append(Send(connection.index, (connection.seal(route.plain, now_s), body)))

    def _split(self, route: Route) -> list[bytes]:
        """Bodies within MAX_OUTPUT_BYTES; an event too large for one becomes FAIL `too_large`."""
        groups: list[list[bytes]] = [[]]
        size = _ARRAY_HEADER_BYTES
        for event in route.events:
            packed = _encode(event)
            if len(packed) + _ARRAY_HEADER_BYTES > MAX_OUTPUT_BYTES:
                packed = _encode(self._too_large(route, event, len(packed)))
            if size + len(packed) > MAX_OUTPUT_BYTES:
                groups.append([])
                size = _ARRAY_HEADER_BYTES
            groups[-1].append(packed)
            size += len(packed)
        head = msgpack.Packer().pack_array_header
        return [head(len(group)) + b"".join(group) for group in groups]

    def _too_large(self, route: Route, event: tuple[Any, ...], size: int) -> tuple[Any, ...]:
        _, request_id, epoch, offset, *_ = event
        error = {
            "code": ErrorCode.TOO_LARGE.value,
            "message": f"one event of the answer has {size} bytes, more than the limit of "
            f"{MAX_OUTPUT_BYTES}; ask for less at a time",
        }
        self._drop(request_id)
        route.finished = [entry for entry in route.finished if entry[0] != request_id]
        route.finished.append((request_id, ErrorCode.TOO_LARGE.value))
        return (FAIL, request_id, epoch, offset, error)
