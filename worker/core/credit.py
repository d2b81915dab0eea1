"""How the slots of one worker become credit at several brokers (SPEC.md section 7).

Every free slot is granted to some broker, so that a request never waits for a grant. Where another
broker has requests waiting, credit that an idle one does not need is asked back. Must never send
anything: it counts.
"""

from __future__ import annotations

from broker.protocol.errors import ProtocolError
from worker.core.connection import Connection


class CreditPool:
    """Grants slots to connections."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections
        self._grants = 0
        self._assigns = 0

    def distribute(self, slots: int) -> None:
        """Grant what is left of `slots` (those that no request takes): first, in turn, to brokers
        where more waits than they may spend; then to whoever has least to spend, and of equals to
        the one that used it last, which will likely need it again."""
        open_ = [connection for connection in self._connections if connection.open]
        free = slots - sum(connection.unused for connection in open_)
        for _ in range(free if open_ else 0):
            taker = min(open_, key=_rank)
            taker.granted += 1
            self._grants += 1
            taker.granted_order = self._grants

    def spent(self, connection: Connection) -> None:
        """ASSIGN came. The broker counts what waits there in the same way."""
        self._assigns += 1
        connection.assigned += 1
        connection.assigned_order = self._assigns
        connection.waiting = max(0, connection.waiting - 1)

    def heard(self, connection: Connection, waiting: int, recalled: int, returned: int) -> None:
        """A broker's HEARTBEAT. Raises `ProtocolError`."""
        connection.waiting = waiting
        more = returned - connection.returned
        if more > max(0, connection.unused) or recalled > connection.recalled:
            raise ProtocolError(f"the broker gives back {more} of {connection.unused} credit")
        if more > 0:
            connection.returned = returned
        connection.answered = max(connection.answered, recalled)

    def recall(self, slots: int) -> None:
        """Ask idle brokers for credit that others wait for, and all for credit beyond `slots`,
        those that no request takes: a relay's may have gone to others.

        A broker is asked for more only when it has answered; what it had spent meanwhile it keeps.
        """
        if len(self._connections) == 1 and self._connections[0].unused <= slots:
            return  # the common case, after every step of the engine
        open_ = [connection for connection in self._connections if connection.open]
        beyond = sum(connection.unused for connection in open_) - slots
        beyond -= sum(connection.recalled - connection.answered for connection in open_)
        for connection in sorted(open_, key=lambda connection: connection.wanted):
            spare = min(beyond, connection.unused)
            if spare > 0 and connection.recalled == connection.answered:
                connection.recalled += spare
                beyond -= spare
        need = sum(max(0, connection.wanted) for connection in open_)
        need -= sum(connection.recalled - connection.answered for connection in open_)
        for connection in sorted(open_, key=lambda connection: -connection.unused):
            spare = min(need, -connection.wanted)
            if spare > 0 and connection.recalled == connection.answered:
                connection.recalled += spare
                need -= spare


def _rank(connection: Connection) -> tuple[int, int, int]:
    if connection.wanted > 0:
        return 0, connection.unused, connection.granted_order
    return 1, connection.unused, -connection.assigned_order
