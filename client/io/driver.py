"""Socket, session and sinks of one client, without a way of waiting: `transport` calls it from a
thread of its own, `looped` from an event loop. It carries out what the session orders and hands
what arrived to the sinks.

It never blocks, knows nothing of the protocol, and is not for two threads at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import zmq

from broker.peer.dealer import LINGER_MS, CannotConnect, Dealer, Party, Report
from broker.protocol.limits import MAX_ANSWER_BYTES
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
from client.io.keys import keys_of
from client.options import Connection

ROUND_MESSAGES: Final = 64
"""Messages read before consumers are woken: a burst costs one wake-up, a token waits little."""

CLIENT: Final = Party(
    role="client",
    door="front",
    server_key="server_key",
    key="key_file",
    # Nothing that a broker sends is larger than an ANSWER.
    max_frame_bytes=MAX_ANSWER_BYTES + 1024,
)

CLOSE_S: Final = LINGER_MS / 1000
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
        self._context: zmq.Context[Any] = zmq.Context()
        #: The socket of the session or of the attempt to have one.
        self.dealer: Dealer | None = None
        #: Who got something in this round, and which requests and queries got their last.
        self._awaited: list[Sink] = []
        self._ended: list[bytes] = []

    def watched_by(self, opened: Callable[[], None], closing: Callable[[], None]) -> None:
        """Who waits for the socket: told after one was opened, and before it is closed."""
        self._opened, self._closing = opened, closing
        if self.dealer is not None:
            opened()

    @property
    def unsettled(self) -> bool:
        """The socket has something to do, and its descriptor need not say so: asked before anybody
        waits for the descriptor."""
        return self.dealer is not None and self.dealer.due()

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
                if self.dealer is not None:
                    self.dealer.send(frames)
            case CloseSocket(linger):
                self._close(linger=linger)
            case OpenSocket(address):
                try:
                    keys = keys_of(self._connection)
                    self.dealer = Dealer(self._context, address, keys, CLIENT)
                except (CannotConnect, BusError) as error:
                    lost = events.ConnectionLost(str(error))
                    later += self.session.handle(lost, time.monotonic())
                else:
                    self._opened()
            case Stop():
                self.stopped = True

    def read(self, *, reported: bool) -> bool:
        """Take what has come, and see what is due; `reported`: the monitor has something to say.
        True: there may be more at once. `hand_over` follows."""
        dealer = self.dealer
        more = False
        if dealer is not None:
            report = dealer.report() if reported else Report()
            if report.connected:
                self.tell(events.ConnectionOpened())
            if dealer.blocked:
                dealer.flush()
            more = self._receive(dealer, everything=report.lost is not None)
            if report.lost is not None and self.dealer is dealer:
                self.tell(events.ConnectionLost(report.lost, report.refused))
        if time.monotonic() >= self.session.deadline_s():
            self.tell(events.Tick())
        return more

    def _receive(self, dealer: Dealer, *, everything: bool) -> bool:
        """Read a round of messages, or, from a lost connection, all that arrived before; whether
        there may be more."""
        received = 0
        while self.dealer is dealer and (everything or received < ROUND_MESSAGES):
            frames = dealer.receive()
            if frames is None:
                return False
            received += 1
            self.tell(events.MessageReceived(frames))
        return True

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
        self._close(linger=False)

    def term(self) -> None:
        """After the end: wait until what was sent has left, or its time is over."""
        self._context.term()

    def _close(self, *, linger: bool) -> None:
        if self.dealer is not None:
            self._closing()
            self.dealer.close(linger=linger)
            self.dealer = None


def _nothing() -> None:
    pass
