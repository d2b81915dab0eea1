"""The common base of `Client` and `AsyncClient`: construction, defaults, starting a stream,
closing.

They differ only in how they wait; nothing here waits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from broker.protocol.limits import MAX_SECONDS
from broker.protocol.messages import new_id
from client.calls import Call, Defaults
from client.completion import StreamState
from client.core import events
from client.core.call_reader import CallReader
from client.errors import InvalidRequest, short_id
from client.io.driver import Sink
from client.io.keys import keys_of, server_key_of
from client.io.thread import Transport
from client.options import Connection, Limits, Retry, Timeout
from client.stream import PassingSink


class BaseClient:
    """A client without a way of waiting. It connects with the first call."""

    def __init__(
        self,
        broker: str | Sequence[str] | None = None,
        *,
        timeout: Timeout | float | None = None,
        retry: Retry | None = None,
        limits: Limits | None = None,
        name: str | None = None,
        server_key: str | bytes | None = None,
        key_file: str | os.PathLike[str] | None = None,
        join: str | os.PathLike[str] | None = None,
    ) -> None:
        """`broker`: a front address, several separated by commas, or a list; without it,
        `TOKENBUS_BROKER`, else tcp://127.0.0.1:5555. The first one that answers is used.

        `timeout`: a `Timeout`, or seconds for each whole request. `retry`: how to recover.
        `limits`: bounds on memory and on requests in flight. `name`: shown in logs and by
        `clients()`. `server_key`: CURVE, the broker's public key or `.key` file; `key_file`: our
        own `.key_secret` file, where the broker has an allow-list. `join`: an invitation
        (`python -m broker invite`) or a file that holds one, in place of these and the address.

        Raises `InvalidRequest` for invalid arguments.
        """
        if isinstance(server_key, bytes):
            server_key = server_key.decode("ascii")
        connection = Connection.resolve(
            broker,
            name=name,
            server_key=None if server_key is None else server_key_of(server_key),
            key_file=key_file,
            join=join,
            limits=limits,
        )
        if connection.server_key is not None:
            keys_of(connection)  # report a missing file here, not from the thread
        if timeout is None or isinstance(timeout, int | float):
            timeout = Timeout(total=timeout)
        self._defaults = Defaults(timeout, retry or Retry())
        self._connection = connection
        self._prepare()

    def _prepare(self) -> None:
        """The rest of the construction."""
        raise NotImplementedError

    def _current_transport(self) -> Transport:
        """The transport for calls made here."""
        raise NotImplementedError

    @property
    def defaults(self) -> Defaults:
        """Defaults for calls that do not say otherwise."""
        return self._defaults

    @property
    def brokers(self) -> tuple[str, ...]:
        """The addresses that this client tries, in order."""
        return self._connection.brokers

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._connection.name!r} of {', '.join(self.brokers)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a client cannot be pickled, since sockets cannot be sent: make the Client in the "
            "process "
            "that uses it"
        )

    def _start(self, call: Call, sink: Sink) -> StreamState:
        request_id = new_id()
        made = events.RequestMade(
            request_id,
            call.request,
            call.attachments,
            call.timeout,
            call.retry,
            call.window_tokens,
        )
        transport = self._current_transport()
        state = StreamState(
            request_id, call.request.model, call.request.params.seed, transport.post, call.shape
        )
        if call.reading is not None:
            reader = CallReader(call.reading, short_id(request_id), sink.add)
            sink = PassingSink(reader.add, sink.wake)
        transport.open(made, sink)
        return state

    def _ask(
        self, verb: str, args: dict[str, Any] | None, timeout: float | None, sink: Sink
    ) -> bytes:
        limit = self._defaults.timeout
        query_id = new_id()
        chosen = Timeout(connect=limit.connect, total=timeout if timeout is not None else None)
        self._current_transport().open(events.QueryMade(query_id, verb, args or {}, chosen), sink)
        return query_id

    def _forget(self, id_: bytes) -> None:
        self._current_transport().post(events.RequestDropped(id_))


def drain_args(worker: str, deadline_s: float | None, reason: str) -> dict[str, Any]:
    """Arguments of `bus.drain`."""
    args: dict[str, Any] = {"worker": worker}
    if deadline_s is not None:
        if not 0 <= deadline_s <= MAX_SECONDS:
            raise InvalidRequest(f"deadline_s is {deadline_s!r}; give seconds, 0 or more")
        args["deadline_ms"] = round(deadline_s * 1000)
    if reason:
        args["reason"] = reason
    return args
