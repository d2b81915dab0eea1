"""The socket, session and sinks of one client, except for the waiting: `thread` calls the driver
from a background thread, `loop` from an event loop. It carries out the session's instructions and
passes what arrives to the sinks.

It never blocks, knows nothing of the protocol, and may be used by only one thread at a time.
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
"""Messages read before consumers are woken. A burst costs one wake-up, yet no token waits long."""

CLIENT: Final = Party(
    role="client",
    door="front",
    server_key="server_key",
    key="key_file",
    # A broker sends nothing larger than an ANSWER.
    max_frame_bytes=MAX_ANSWER_BYTES + 1024,
)

CLOSE_S: Final = LINGER_MS / 1000
"""How long the socket may take to send a GOODBYE."""


class Sink(Protocol):
    """Where the items of a request or query go."""

    @property
    def add(self) -> Callable[[Item], None]:
        """Take one item. Called in the driver's thread; must not block, and wakes nobody."""

    def wake(self) -> None:
        """Wake the reader. Called once everything from a round has been added, so that no reader
        delays another's items; may be called more than once."""


class Driver:
    """Runs only while it is called; it owns no thread."""

    def __init__(self, connection: Connection, software: str) -> None:
        self._connection = connection
        self.session = ClientSession(
            connection.brokers,
            name=connection.name,
            software=software,
            client_limits=connection.limits,
        )
        #: By request or query id; removed once the last item has been handed over.
        self.sinks: dict[bytes, Sink] = {}
        #: The session is closed for good.
        self.stopped = False
        self._opened: Callable[[], None] = _nothing
        self._closing: Callable[[], None] = _nothing
        self._context: zmq.Context[Any] = zmq.Context()
        #: The socket of the session, or of the current attempt to open one.
        self.dealer: Dealer | None = None
        #: Sinks that received something in this round; requests and queries that ended in it.
        self._awaited: list[Sink] = []
        self._ended: list[bytes] = []

    def watched_by(self, opened: Callable[[], None], closing: Callable[[], None]) -> None:
        """Call `opened` after a socket is opened, and `closing` before it is closed."""
        self._opened, self._closing = opened, closing
        if self.dealer is not None:
            opened()

    @property
    def unsettled(self) -> bool:
        """The socket has work that its descriptor may not signal. Check this before waiting for
        the descriptor."""
        return self.dealer is not None and self.dealer.due()

    def handle(self, event: events.Event) -> None:
        """Pass an event to the session and carry out its instructions. Call `hand_over` next."""
        todo: Sequence[Instruction] = self.session.handle(event, time.monotonic())
        while todo:
            later: list[Instruction] = []
            for instruction in todo:
                self._carry_out(instruction, later)
            todo = later
        if isinstance(event, events.RequestDropped):
            self.sinks.pop(event.request_id, None)

    def _carry_out(self, instruction: Instruction, later: list[Instruction]) -> None:
        match instruction:
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
                    lost = events.SocketLost(str(error))
                    later += self.session.handle(lost, time.monotonic())
                else:
                    self._opened()
            case Stop():
                self.stopped = True

    def read(self, *, reported: bool) -> bool:
        """Read what has arrived and run what is due; `reported`: the socket's monitor is readable.
        Returns True if there may be more to read now. Call `hand_over` next."""
        dealer = self.dealer
        more = False
        if dealer is not None:
            report = dealer.report() if reported else Report()
            if report.connected:
                self.handle(events.SocketOpened())
            if dealer.blocked:
                dealer.flush()
            more = self._receive(dealer, everything=report.lost is not None)
            if report.lost is not None and self.dealer is dealer:
                self.handle(events.SocketLost(report.lost, report.refused))
        if time.monotonic() >= self.session.deadline_s():
            self.handle(events.Tick())
        return more

    def _receive(self, dealer: Dealer, *, everything: bool) -> bool:
        """Read one round of messages; from a lost connection, everything that arrived before.
        Returns whether there may be more."""
        received = 0
        while self.dealer is dealer and (everything or received < ROUND_MESSAGES):
            frames = dealer.receive()
            if frames is None:
                return False
            received += 1
            self.handle(events.MessageReceived(frames))
        return True

    def hand_over(self) -> None:
        """Wake every sink that has received something."""
        awaited, self._awaited = self._awaited, []
        for sink in awaited:
            sink.wake()
        ended, self._ended = self._ended, []
        for id_ in ended:
            self.sinks.pop(id_, None)

    def fail_all(self, why: BusError) -> None:
        """Stop: raise `why` in everything that is open, and close the socket."""
        self.stopped = True
        sinks, self.sinks = self.sinks, {}
        for sink in sinks.values():
            sink.add(why)
            sink.wake()
        self._close(linger=False)

    def term(self) -> None:
        """After the end: wait until everything has been sent, or `CLOSE_S` has passed."""
        self._context.term()

    def _close(self, *, linger: bool) -> None:
        if self.dealer is not None:
            self._closing()
            self.dealer.close(linger=linger)
            self.dealer = None


def _nothing() -> None:
    pass
