"""One session per connected peer: sequence numbers, liveness, and what hangs on it.

State only; the rules of who may do what are in `controller.py`. All fields of a session are changed
by the controller alone.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from broker.core.events import Side
from broker.protocol.header import MessageType, prefix, seal
from broker.protocol.liveness import Liveness

if TYPE_CHECKING:
    from broker.core.requests import RequestState
    from broker.core.workers import Route, WorkerSession

SOURCES: Final = 2048
"""Latest messages to a client of which it is known who made them: more than wait in its socket."""


class Session(Liveness):
    """What sessions of clients and of workers have in common."""

    __slots__ = (
        "expected",
        "id",
        "key",
        "name",
        "routing_id",
        "sequence",
        "side",
        "since_s",
        "software",
    )

    def __init__(
        self,
        side: Side,
        routing_id: bytes,
        session_id: bytes,
        name: str,
        software: str,
        key: str,
        interval_s: float,
        liveness: int,
        now_s: float,
    ) -> None:
        super().__init__(interval_s, liveness, now_s)
        self.side = side
        #: Names the connection; secret between the broker and this peer.
        self.routing_id = routing_id
        #: Header id of the session's own messages.
        self.id = session_id
        self.name = name
        self.software = software
        #: Z85 public key of the peer; empty without CURVE.
        self.key = key
        self.since_s = now_s
        #: Sequence number of the peer's next message; HELLO was 0.
        self.expected = 1
        #: Sequence number of the broker's next message.
        self.sequence = 0

    def header(self, type_: MessageType, id_: bytes, now_s: float) -> bytes:
        """The header of the next message to this peer. It must be sent, in this order."""
        sequence = self.sequence
        self.sequence = sequence + 1
        self.sent(now_s)
        return seal(prefix(type_, id_), sequence)


class ClientSession(Session):
    """A client (a gateway is one too)."""

    __slots__ = ("operator", "requests", "routes", "sources")

    def __init__(
        self,
        routing_id: bytes,
        session_id: bytes,
        name: str,
        software: str,
        key: str,
        interval_s: float,
        liveness: int,
        now_s: float,
    ) -> None:
        super().__init__(
            Side.FRONT, routing_id, session_id, name, software, key, interval_s, liveness, now_s
        )
        #: May use the operator's verbs.
        self.operator = False
        #: Queued or running requests by id: its length is what the in-flight limit bounds.
        self.requests: dict[bytes, RequestState] = {}
        #: By session id of the worker.
        self.routes: dict[bytes, Route] = {}
        #: Who made the latest messages to it, the last one last; None: the broker itself.
        self.sources: deque[WorkerSession | None] = deque(maxlen=SOURCES)

    def header(self, type_: MessageType, id_: bytes, now_s: float) -> bytes:
        """As of any session; the broker itself makes the message."""
        self.sources.append(None)
        return super().header(type_, id_, now_s)

    def source(self, sequence: int) -> WorkerSession | None:
        """The worker that made the message of that number; None: none, or it is too long ago."""
        index = sequence - (self.sequence - len(self.sources))
        return self.sources[index] if 0 <= index < len(self.sources) else None
