"""Queries to the broker itself, and their answers (SPEC.md section 10), sans-IO.

Part of `session`, which owns the connection, the timers and the path to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from broker.protocol import messages
from broker.protocol.errors import ErrorCode, ErrorInfo
from broker.protocol.header import MessageType
from client.core import events
from client.core.connection import BrokerConnection
from client.core.events import Item
from client.errors import BusError, error_from

ANSWER_S: Final = 30.0
"""Longest wait for the broker's answer if the caller gives no total limit."""

REPEATABLE_VERBS: Final = frozenset(
    f"bus.{name}"
    for name in ("version", "models", "workers", "clients", "stats", "metrics", "requests")
)
"""Read-only queries: safe to repeat, so they survive a lost session."""


@dataclass(slots=True)
class _Query:
    made: events.QueryMade
    made_s: float
    due_s: float
    #: When it fails if it has not been sent by then.
    connect_due_s: float
    sent: bool = False

    @property
    def next_due_s(self) -> float:
        return self.due_s if self.sent else min(self.due_s, self.connect_due_s)


class Queries:
    """The open queries of a session."""

    def __init__(
        self,
        broker: BrokerConnection,
        answer: Callable[[bytes, Item], None],
        timer: Callable[[float, bytes], None],
        no_broker: Callable[[float], BusError],
    ) -> None:
        self._broker = broker
        self._answer = answer
        self._timer = timer
        self._no_broker = no_broker
        self._open: dict[bytes, _Query] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, query_id: bytes) -> bool:
        return query_id in self._open

    def made(self, event: events.QueryMade) -> None:
        """The application made a query; it is sent at once if there is a session."""
        now_s = self._broker.now_s
        query = _Query(
            event,
            now_s,
            now_s + (event.timeout.total or ANSWER_S),
            now_s + _limit(event.timeout.connect),
        )
        self._open[event.query_id] = query
        self._timer(query.next_due_s, event.query_id)
        if self._broker.has_session:
            self._send(query)

    def session_began(self) -> None:
        """Send the open queries."""
        for query in self._open.values():
            self._send(query)

    def session_over(self, error: ErrorInfo) -> None:
        """Keep queries that may be repeated. Fail the rest: they may or may not have been carried
        out."""
        for query_id, query in list(self._open.items()):
            if not query.sent or query.made.verb in REPEATABLE_VERBS:
                query.sent = False
                limit_s = _limit(query.made.timeout.connect)
                query.connect_due_s = self._broker.now_s + limit_s
                self._timer(query.next_due_s, query_id)
            else:
                self._end(query_id, error_from(error))

    def answered(self, query_id: bytes, answer: messages.Answer) -> None:
        """The broker answered. An answer that nobody waits for any more is dropped."""
        if query_id in self._open:
            result = events.Answered(answer.result)
            self._end(query_id, error_from(answer.error) if answer.error else result)

    def due(self, query_id: bytes) -> None:
        """A timer of this query has fired."""
        query = self._open[query_id]
        now_s = self._broker.now_s
        if not query.sent and now_s >= query.connect_due_s:
            self._end(query_id, self._no_broker(query.made.timeout.connect or 0.0))
        elif now_s >= query.due_s and not query.sent:
            self._end(query_id, self._no_broker(now_s - query.made_s))
        elif now_s >= query.due_s:
            story = f"the broker did not answer {query.made.verb} in time; ask again"
            info = ErrorInfo(code=ErrorCode.DEADLINE_EXCEEDED.value, message=story)
            self._end(query_id, error_from(info))
        else:
            self._timer(query.next_due_s, query_id)

    def forget(self, query_id: bytes) -> None:
        """The caller no longer waits for the answer."""
        self._open.pop(query_id, None)

    def fail_all(self, error: BusError) -> None:
        """End all open queries with this error."""
        for query_id in list(self._open):
            self._end(query_id, error)

    def _send(self, query: _Query) -> None:
        query.sent = True
        body = messages.Query(verb=query.made.verb, args=query.made.args)
        self._broker.send_body(MessageType.QUERY, query.made.query_id, body)

    def _end(self, query_id: bytes, item: Item) -> None:
        del self._open[query_id]
        self._answer(query_id, item)


def _limit(limit_s: float | None) -> float:
    return math.inf if limit_s is None else limit_s
