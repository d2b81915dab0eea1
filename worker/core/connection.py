"""The worker's session with one broker: beside the connection itself, its credit and routes.

Kept from one socket to the next, and begun anew with each; what to do about a message is decided in
`session`. Must never touch a socket or a clock.
"""

from __future__ import annotations

import random

from broker.peer.backoff import Address
from broker.peer.connection import PeerConnection, State
from broker.protocol.header import NO_ID
from worker.core.credit import Account
from worker.core.streams import Route


class Connection(PeerConnection):
    """The connection to one broker, always the same."""

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
        #: The absence of this broker was told; not again until it was there.
        self.told_absent = False
        self.state = State.WAITING

    def _reset(self) -> None:
        super()._reset()
        #: The socket is full: no OUTPUT is made until it is not.
        self.blocked = False
        self.credit = Account()
        #: The broker knows the engine's models and capacity.
        self.models_told = False
        self.routes: dict[bytes, Route] = {}
        #: Running requests that HELLO named and that nobody resumed through this broker yet.
        self.held: set[bytes] = set()
        #: For a ledger that belongs to no client session: their end.
        self.silent = Route(self, NO_ID)

    def route(self, reply_to: bytes) -> Route:
        """The route of that name; made when it is new."""
        found = self.routes.get(reply_to)
        if found is None:
            if len(self.routes) >= 64:
                self.routes = {k: r for k, r in self.routes.items() if r.streams}
            found = self.routes[reply_to] = Route(self, reply_to)
        return found
