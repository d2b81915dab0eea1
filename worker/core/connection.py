"""The worker's connection to one broker, with the session's credit and routes.

The object outlives its sockets; each new session resets its state. What to do about a message is
decided in `session`. Must never touch a socket or a clock.
"""

from __future__ import annotations

import random

from broker.peer.backoff import Address
from broker.peer.connection import PeerConnection, State
from broker.protocol.header import NO_ID
from worker.core.credit import Account
from worker.core.streams import Route


class Connection(PeerConnection):
    """The connection to one broker; its address never changes."""

    __slots__ = (
        "blocked",
        "credit",
        "held",
        "index",
        "models_told",
        "routes",
        "silent",
        "told_absent",
    )

    def __init__(self, index: int, address: str, generator: random.Random, now_s: float) -> None:
        super().__init__(Address(address, generator, from_s=now_s), door="back", steady=True)
        self.index = index
        #: Whether this broker's absence has been logged; it is logged again only after it was back.
        self.told_absent = False
        self.state = State.WAITING

    def _reset(self) -> None:
        super()._reset()
        #: Whether the socket is full: no OUTPUT is made until it has room.
        self.blocked = False
        self.credit = Account()
        #: Whether the broker knows the engine's models and capacity.
        self.models_told = False
        self.routes: dict[bytes, Route] = {}
        #: Running requests named in HELLO that no client has resumed through this broker yet.
        self.held: set[bytes] = set()
        #: For ledgers about requests that belong to no client session.
        self.silent = Route(self, NO_ID)

    def route(self, reply_to: bytes) -> Route:
        """The route for this reply address; created if it is new."""
        found = self.routes.get(reply_to)
        if found is None:
            if len(self.routes) >= 64:
                self.routes = {k: r for k, r in self.routes.items() if r.streams}
            found = self.routes[reply_to] = Route(self, reply_to)
        return found
