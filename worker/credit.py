"""How the slots of one worker become credit at several brokers (SPEC.md section 7).

Credit is cumulative and never falls: what a broker was granted and does not spend cannot be taken
back: it moves only with a new session. Must never send anything: it counts.
"""

from __future__ import annotations

import math

from worker.connection import Connection

STARVED_S = 2.0
"""A broker without credit for so long may have some that an idle one sits on."""
RENEW_INTERVAL_S = 10.0
"""Between two renewals of an idle session for that."""
RENEWAL_S = 3.0
"""How long the credit of a broker whose session is renewed is kept for it."""


class CreditPool:
    """Grants slots to connections."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections
        #: Since when some open session has had no credit to spend.
        self._starved_s = math.inf
        #: The connection whose session was renewed last, and when.
        self._renewed: Connection | None = None
        self._renewed_s = -math.inf

    def distribute(self, slots: int, now_s: float) -> None:
        """Grant what is left of `slots` (those that no request takes), each to the broker that has
        the least to spend. A broker whose session is being renewed gets its share when it is back.
        """
        returning = self._renewed if now_s < self._renewed_s + RENEWAL_S else None
        shares = {
            connection.index: connection.unused
            for connection in self._connections
            if connection.open or connection is returning
        }
        for _ in range(slots - sum(shares.values()) if shares else 0):
            index = min(shares, key=lambda index: (shares[index], index))
            shares[index] += 1
            if self._connections[index].open:
                self._connections[index].granted += 1

    def surplus(self, now_s: float) -> Connection | None:
        """An idle session that is to be renewed, so that its credit is shared anew.

        Only for the sake of a broker that had none to spend for a while: a new session costs the
        idle broker a moment without this worker.
        """
        takers = [connection for connection in self._connections if connection.open]
        if len(takers) < 2 or min(connection.unused for connection in takers) > 0:
            self._starved_s = math.inf
            return None
        self._starved_s = min(self._starved_s, now_s)
        rested = now_s - self._renewed_s >= RENEW_INTERVAL_S
        if not rested or now_s - self._starved_s < STARVED_S:
            return None
        for connection in takers:
            if connection.unused >= 2 and connection.idle:
                self._renewed, self._renewed_s = connection, now_s
                self._starved_s = math.inf
                return connection
        return None
