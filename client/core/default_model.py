"""Requests that name no model get the only one served; sans-IO, a part of `session`.

They wait here while the broker is asked, once for all of them, which models it serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from broker.protocol import messages
from broker.protocol.errors import ErrorCode, ErrorInfo
from broker.protocol.header import MessageType
from client.core.connection import BrokerConnection
from client.core.exchange import Exchange


class DefaultModel:
    """The requests without a model, and the query for its name."""

    def __init__(
        self,
        broker: BrokerConnection,
        named: Callable[[Exchange], None],
        failed: Callable[[Exchange, ErrorInfo], None],
    ) -> None:
        """`named`: called once a request has a model. `failed`: called if it gets an error
        instead, as if by FAIL."""
        self._broker = broker
        self._named = named
        self._failed = failed
        self.waiting: dict[bytes, Exchange] = {}
        self._query_id: bytes | None = None

    def ask(self) -> None:
        """There is a session: send the query if a request waits and none is open."""
        if self.waiting and self._query_id is None:
            self._query_id = self._broker.new_id()
            query = messages.Query(verb="bus.models")
            self._broker.send_body(MessageType.QUERY, self._query_id, query)

    def session_over(self) -> None:
        """The answer will not come."""
        self._query_id = None

    def is_answer(self, query_id: bytes) -> bool:
        """Whether this is the query that this object sent."""
        return query_id == self._query_id

    def answered(self, answer: messages.Answer) -> None:
        """The broker answered which models are served."""
        self._query_id = None
        waiting, self.waiting = self.waiting, {}
        names = _names_of(answer.result)
        for exchange in waiting.values():
            if len(names) == 1:
                exchange.request = msgspec.structs.replace(exchange.request, model=names[0])
                self._named(exchange)
            else:
                self._failed(exchange, answer.error or _error(names))


def _error(names: list[str]) -> ErrorInfo:
    if names:
        story = f"several models are served; choose one of them with model=: {', '.join(names)}"
        return ErrorInfo(code=ErrorCode.INVALID_REQUEST.value, message=story)
    story = "no model is served yet; start a worker with `python -m worker`"
    return ErrorInfo(code=ErrorCode.MODEL_UNAVAILABLE.value, message=story, retryable=True)


def _names_of(result: Any) -> list[str]:
    rows = result if isinstance(result, list) else []
    names = (row.get("name") for row in rows if isinstance(row, dict))
    return sorted({name for name in names if isinstance(name, str) and name})
