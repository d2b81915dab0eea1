"""Socket, session and sinks of one client, without a way of waiting: `transport` calls it from a
thread of its own, `looped` from an event loop. It carries out what the session orders and hands
what arrived to the sinks.

It never blocks, knows nothing of the protocol, and is not for two threads at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from client.core import events
from client.core.events import (
    Arrived,
    CloseSocket,
    Deliver,
    Instruction,
    Item,
    OpenSocket,
    Send,
    Stop,
)
from client.core.session import ClientSession
from client.errors import BusError
from client.io.dealer import LOSS, Dealer, fact_of
from client.options import Connection

ROUND_MESSAGES: Final = 64
"""Messages read before consumers are woken: a burst costs one wake-up, a token waits little."""

CLOSE_S: Final = 1.0
"""How long a GOODBYE may take to leave."""


class Sink(Protocol):
    """Where the items of a request or query go."""

    @property
    def add(self) -> Callable[[Item], None]:
        """Take one. Called where the driver is called; never blocks, and wakes nobody."""

    def wake(self) -> None:
        """What was added can be read. Called when all that came in a round is added, so that
        nobody's turn delays another's items; maybe more than once."""


class Driver:
    """Whoever calls it gives it the time that it has."""

    def __init__(self, connection: Connection, software: str) -> None:
        self._connection = connection
        self.session = ClientSession(
            connection.brokers,
            name=connection.name,
            software=software,
            client_limits=connection.limits,
        )
        #: By request or query; those whose last item was handed over are gone.
        self.sinks: dict[bytes, Sink] = {}
        #: Nothing more will happen.
        self.stopped = False
        self._opened: Callable[[], None] = _nothing
        self._closing: Callable[[], None] = _nothing
        self.dealer = Dealer(connection)
        #: Who got something in this round, and which requests and queries got their last.
        self._awaited: list[Sink] = []
        self._ended: list[bytes] = []

    def watched_by(self, opened: Callable[[], None], closing: Callable[[], None]) -> None:
        """Who waits for the socket: told after one was opened, and before it is closed."""
        self._opened, self._closing = opened, closing
        if self.dealer.socket is not None:
            opened()

    def tell(self, fact: events.Event) -> None:
        """Tell the session a fact and carry out its orders; `hand_over` follows."""
        todo: Sequence[Instruction] = self.session.handle(fact, time.monotonic())
        while todo:
            later: list[Instruction] = []
            for order in todo:
                self._carry_out(order, later)
            todo = later
        if isinstance(fact, events.RequestDropped):
            self.sinks.pop(fact.request_id, None)

    def _carry_out(self, order: Instruction, later: list[Instruction]) -> None:
        match order:
            case Arrived(tokens):
                find, awaited = self.sinks.get, self._awaited
                for event in tokens:
                    sink = find(event.request_id)
                    if sink is not None:
                        sink.add(event)
                        awaited.append(sink)
            case Deliver(id_, items, final):
                sink = self.sinks.get(id_)
                if sink is not None:
                    for item in items:
                        sink.add(item)
                    self._awaited.append(sink)
                if final:
                    self._ended.append(id_)
            case Send(frames):
                self.dealer.send(frames)
            case CloseSocket(linger):
                self._close(int(CLOSE_S * 1000) if linger else 0)
            case OpenSocket(address, routing_id):
                reason = self.dealer.open(address, routing_id)
                if reason:
                    lost = events.ConnectionLost(reason)
                    later += self.session.handle(lost, time.monotonic())
                else:
                    self._opened()
            case Stop():
                self.stopped = True

    def read(self, *, reported: bool) -> bool:
        """Take what has come, and see what is due; `reported`: the monitor has something to say.
        True: there may be more at once. `hand_over` follows."""
        dealer = self.dealer
        # Reports are read first and told last: what arrived before a disconnect still counts.
        watched = dealer.socket
        reports = dealer.reports() if reported else []
        if dealer.blocked:
            dealer.flush()
        lost = any(report in LOSS for report in reports)
        received = 0
        more = True
        while lost or received < ROUND_MESSAGES:
            frames = dealer.receive()
            if frames is None:
                more = False
                break
            received += 1
            self.tell(events.MessageReceived(frames))
        for report in reports:
            fact_seen = fact_of(report, self._connection.server_key is not None)
            if fact_seen is not None and dealer.socket is watched:
                self.tell(fact_seen)
        if time.monotonic() >= self.session.deadline_s():
            self.tell(events.Tick())
        return more

    def hand_over(self) -> None:
        """Wake those for whom something has arrived."""
        awaited, self._awaited = self._awaited, []
        for sink in awaited:
            sink.wake()
        ended, self._ended = self._ended, []
        for id_ in ended:
            self.sinks.pop(id_, None)

    def fail_all(self, why: BusError) -> None:
        """Nothing goes on: raise `why` in whatever is open, and close the socket."""
        self.stopped = True
        sinks, self.sinks = self.sinks, {}
        for sink in sinks.values():
            sink.add(why)
            sink.wake()
        self._close(0)

    def _close(self, linger_ms: int) -> None:
        if self.dealer.socket is not None:
            self._closing()
            self.dealer.close(linger_ms)


def _nothing() -> None:
    pass
