"""How the slots of one worker become credit at several brokers (SPEC.md section 7, appendix A).

Every free slot is granted to some broker, so that a request never waits for a grant. If another
broker has requests waiting, an idle broker is asked to give back credit that it does not need. No
other module changes an account. Must never send anything: it only counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.protocol.errors import ProtocolError

if TYPE_CHECKING:
    from worker.core.connection import Connection


class Account:
    """The credit of one session; all counts except `waiting` are cumulative over it."""

    __slots__ = (
        "_recalled_told",
        "announced",
        "answered",
        "assigned",
        "assigned_order",
        "granted",
        "granted_order",
        "recalled",
        "returned",
        "waiting",
    )

    def __init__(self) -> None:
        #: Credit granted, the figure last sent to the broker, and credit that the broker has spent.
        self.granted = 0
        self.announced = 0
        self.assigned = 0
        #: Requests that wait at the broker for this worker, as it last reported.
        self.waiting = 0
        #: Credit that the broker is to give back, the figure last sent to it, the figure that it
        #: last answered, and what it has given back.
        self.recalled = 0
        self._recalled_told = 0
        self.answered = 0
        self.returned = 0
        #: Numbers, counted over the whole worker, of this session's last grant and last ASSIGN.
        self.granted_order = 0
        self.assigned_order = 0

    @property
    def unused(self) -> int:
        """Credit that the broker has not spent."""
        return self.granted - self.assigned - self.returned

    @property
    def wanted(self) -> int:
        """Slots that the broker could use beyond its credit; if negative, credit that it does not
        need."""
        return self.waiting - self.unused

    @property
    def untold(self) -> bool:
        """Whether the broker has not been told yet what it is granted, or is to give back."""
        return self.announced != self.granted or self._recalled_told != self.recalled

    def announce(self) -> int:
        """The credit granted, for a message that reports it."""
        self.announced = self.granted
        return self.granted

    def ask_back(self) -> int:
        """The credit to be given back, for a message that asks for it."""
        self._recalled_told = self.recalled
        return self.recalled


class CreditPool:
    """Grants slots to connections, and keeps their accounts."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections
        self._grants = 0
        self._assigns = 0

    def _open(self) -> list[Account]:
        return [connection.credit for connection in self._connections if connection.open]

    def distribute(self, slots: int) -> None:
        """Grant what is left of `slots` (those that no request occupies): first, in turn, to
        brokers with more waiting requests than credit; then to the broker with the least credit,
        and among equals to the one that spent some last, since it will probably need it again."""
        open_ = self._open()
        free = slots - sum(account.unused for account in open_)
        for _ in range(free if open_ else 0):
            taker = min(open_, key=_rank)
            taker.granted += 1
            self._grants += 1
            taker.granted_order = self._grants

    def spent(self, account: Account) -> bool:
        """ASSIGN came; the broker counts what waits there in the same way. Returns False if it had
        no credit left: then it is counted, but there is no slot for it."""
        covered = account.unused > 0
        account.granted += not covered
        self._assigns += 1
        account.assigned += 1
        account.assigned_order = self._assigns
        account.waiting = max(0, account.waiting - 1)
        return covered

    def heard(self, account: Account, waiting: int, recalled: int, returned: int) -> None:
        """Take the counts in a broker's HEARTBEAT. Raises `ProtocolError` if they make no sense."""
        account.waiting = waiting
        more = returned - account.returned
        if more > max(0, account.unused) or recalled > account.recalled:
            raise ProtocolError(f"the broker gives back {more} of {account.unused} credit")
        if more > 0:
            account.returned = returned
        account.answered = max(account.answered, recalled)

    def recall(self, slots: int) -> None:
        """Ask idle brokers for credit that others wait for, and all brokers for credit beyond
        `slots` (those that no request occupies): a relay's slots may have gone to others.

        A broker is asked again only after it has answered; it keeps credit that it has spent in the
        meantime.
        """
        if len(self._connections) == 1 and self._connections[0].credit.unused <= slots:
            return  # the common case, after every step of the engine
        open_ = self._open()
        beyond = sum(account.unused for account in open_) - slots
        beyond -= sum(account.recalled - account.answered for account in open_)
        for account in sorted(open_, key=lambda account: account.wanted):
            spare = min(beyond, account.unused)
            if spare > 0 and account.recalled == account.answered:
                account.recalled += spare
                beyond -= spare
        need = sum(max(0, account.wanted) for account in open_)
        need -= sum(account.recalled - account.answered for account in open_)
        for account in sorted(open_, key=lambda account: -account.unused):
            spare = min(need, -account.wanted)
            if spare > 0 and account.recalled == account.answered:
                account.recalled += spare
                need -= spare


def _rank(account: Account) -> tuple[int, int, int]:
    if account.wanted > 0:
        return 0, account.unused, account.granted_order
    return 1, account.unused, -account.assigned_order
