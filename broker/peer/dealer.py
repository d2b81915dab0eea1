"""The socket of whoever dials out: a DEALER to one broker, its options and keys, its monitor, and
what the socket would not take yet.

One socket is one connection is one session (SPEC.md section 2): it is never connected again. Knows
nothing of the protocol and of who waits for it; never blocks. Not for two threads at once.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import zmq
from zmq.backend import Socket as BackendSocket

from broker.peer.keys import Keys
from broker.protocol.messages import new_id

__all__ = ["LINGER_MS", "CannotConnect", "Dealer", "Party", "Report"]

LINGER_MS: Final = 1000
"""How long last words, such as a GOODBYE, may take to leave."""

# Plain numbers, and pyzmq's method beneath its Python one: `|` of its flags takes longer than
# receiving a frame.
_LAST: Final = int(zmq.DONTWAIT)
_MORE: Final = int(zmq.DONTWAIT | zmq.SNDMORE)
_send: Final = BackendSocket.send
_EVENTS: Final = int(zmq.EVENTS)
_READABLE: Final = int(zmq.POLLIN)
_WRITABLE: Final = int(zmq.POLLOUT)

_OPTIONS: Final = {
    zmq.RECONNECT_IVL: -1,  # no silent reconnect
    zmq.IMMEDIATE: 1,  # nothing is queued for a broker that is not there
    zmq.SNDHWM: 1000,  # finite: a broker that stands still shows, and what waits can be given up
    # Some seconds of what a broker says to a busy client, which may be held up for as long; beyond
    # it TCP holds the broker back. Windows and credit bound what is large.
    zmq.RCVHWM: 10_000,
    zmq.LINGER: 0,  # but see `close`
    zmq.CONNECT_TIMEOUT: 5000,  # the kernel's own is minutes
    zmq.HANDSHAKE_IVL: 5000,
    zmq.HEARTBEAT_IVL: 0,  # libzmq's own heartbeats can abort the process (libzmq 3596)
    zmq.TCP_KEEPALIVE: 1,  # reap half-open connections
    zmq.TCP_KEEPALIVE_IDLE: 30,
    zmq.TCP_KEEPALIVE_INTVL: 10,
    zmq.TCP_KEEPALIVE_CNT: 3,
    zmq.TCP_MAXRT: 30_000,  # bounds unacknowledged data
}

_CONNECTED: Final = zmq.Event.HANDSHAKE_SUCCEEDED
_UNWANTED: Final = (zmq.Event.HANDSHAKE_FAILED_AUTH, zmq.Event.HANDSHAKE_FAILED_PROTOCOL)
_LOST: Final = (
    *_UNWANTED,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
    zmq.Event.CLOSED,
    zmq.Event.DISCONNECTED,
)
_MONITORED: Final = int(_CONNECTED | sum(_LOST))

_REPORT: Final = struct.Struct("=Hi")
"""First frame of a monitor's message: the event and a value, in the machine's own order."""


@dataclass(frozen=True, slots=True)
class Party:
    """Who dials out: the words of its users for what they can change, and what it may be sent."""

    #: "worker" or "client".
    role: str
    #: Which of a broker's addresses it needs: "back" or "front".
    door: str
    #: The options that name the broker's public key and the party's own key.
    server_key: str
    key: str
    #: The largest frame that a broker sends it.
    max_frame_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a monitor has seen since it was last asked."""

    #: The handshake is done.
    connected: bool = False
    #: Why the connection is lost, or was not made; nothing more arrives than what has.
    lost: str | None = None
    #: Somebody is there and does not let us in: a wrong key, CURVE on one side only.
    refused: bool = False


class CannotConnect(Exception):
    """A socket cannot even begin to connect: a malformed address, no descriptors left."""


class Dealer:
    """A DEALER to one broker, from `connect` to `close`."""

    def __init__(
        self, context: zmq.Context[Any], address: str, keys: Keys | None, party: Party
    ) -> None:
        """Start to connect. Raises `CannotConnect`."""
        self._party = party
        self._secured = keys is not None
        #: In order: what the socket would not take.
        self._outgoing: deque[tuple[bytes, ...]] = deque()
        #: The last look found nothing to do, and the socket was not touched since: until its
        #: descriptor says so, there is nothing.
        self._idle = False
        #: Messages received since the socket was last found empty.
        self._received = 0
        try:
            self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        except zmq.ZMQError as error:
            raise CannotConnect(f"cannot connect to {address}: {error}") from None
        try:
            self.monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(_MONITORED)
        except zmq.ZMQError as error:
            # The end of the context waits for every socket that is still open.
            self.socket.close(0)
            raise CannotConnect(f"cannot connect to {address}: {error}") from None
        #: What to poll. ZeroMQ's descriptors report a change only: see `due`.
        self.fd = self.socket.fileno()
        self.monitor_fd = self.monitor.fileno()
        # The descriptor is signalled only for a reader that has found nothing before.
        self.report()
        try:
            self._set_options(address, keys)
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise CannotConnect(f"cannot connect to {address}: {error}") from None

    def _set_options(self, address: str, keys: Keys | None) -> None:
        for option, value in _OPTIONS.items():
            self.socket.setsockopt(option, value)
        self.socket.setsockopt(zmq.MAXMSGSIZE, self._party.max_frame_bytes)
        # A new name for each socket: a ROUTER must never take it for an earlier one.
        self.socket.setsockopt(zmq.ROUTING_ID, new_id())
        if "[" in address:
            self.socket.setsockopt(zmq.IPV6, 1)
        if keys is not None:
            self.socket.curve_serverkey = keys.server
            self.socket.curve_publickey = keys.public
            self.socket.curve_secretkey = keys.secret

    def close(self, *, linger: bool = False) -> None:
        """Close the socket. `linger`: what was sent has `LINGER_MS` to leave."""
        self._outgoing.clear()
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(LINGER_MS if linger else 0)

    @property
    def blocked(self) -> bool:
        """Something waits for the socket to take it."""
        return bool(self._outgoing)

    def due(self) -> bool:
        """Something can be done without waiting. The descriptor need not say so: a send may have
        taken note of what came, so this is asked after the last send, before every wait."""
        if not self._idle:
            self._look()
        return not self._idle

    def _look(self) -> int:
        """Ask the socket what can be done: `_READABLE`, `_WRITABLE`."""
        found = int(self.socket.getsockopt(_EVENTS))
        self._idle = not found & (_READABLE | _WRITABLE if self._outgoing else _READABLE)
        return found

    def send(self, frames: tuple[bytes, ...]) -> bool:
        """Send, or keep in order; False when the socket has just refused to take more."""
        if self._outgoing:
            self._outgoing.append(frames)
            return True
        if self._send(frames):
            return True
        self._outgoing.append(frames)
        return False

    def flush(self) -> bool:
        """Send what was kept; True when nothing waits any more."""
        while self._outgoing and self._send(self._outgoing[0]):
            self._outgoing.popleft()
        return not self._outgoing

    def _send(self, frames: tuple[bytes, ...]) -> bool:
        # Frame by frame: `send_multipart` costs twice as much. Only the first can be refused.
        socket = self.socket
        last = len(frames) - 1
        self._idle = False
        try:
            for index, frame in enumerate(frames):
                _send(socket, frame, _MORE if index < last else _LAST)
        except zmq.Again:
            return False
        return True

    def receive(self) -> tuple[bytes, ...] | None:
        """The next message, if there is one. A frame object knows whether another follows; asking
        the socket takes longer than receiving."""
        socket = self.socket
        # To find nothing raises, which takes as long as to receive several messages. Mostly one has
        # come, so after it the socket is asked; of a burst, the rest is read to its end.
        if self._received == 1 and not self._look() & _READABLE:
            self._received = 0
            return None
        try:
            frame = socket.recv(_LAST, copy=False)
        except zmq.Again:
            self._received = 0
            self._idle = not self._outgoing
            return None
        self._idle = False
        self._received += 1
        frames = [frame.bytes]
        while frame.more:
            frame = socket.recv(_LAST, copy=False)
            frames.append(frame.bytes)
        return tuple(frames)

    def report(self) -> Report:
        """What the monitor saw since the last call. Messages that came before a loss still count:
        they are to be received first."""
        connected, lost, refused = False, None, False
        while True:
            try:
                message, _address = self.monitor.recv_multipart(_LAST)
            except zmq.Again:
                return Report(connected, lost, refused)
            # Read by hand: `zmq.utils.monitor` would load all of asyncio.
            event = zmq.Event(_REPORT.unpack(message)[0])
            if event is _CONNECTED:
                connected = True
            elif event in _LOST:
                lost = lost or self._why(event)
                refused |= event in _UNWANTED

    def _why(self, event: zmq.Event) -> str:
        """What a lost connection means to the party's users."""
        party = self._party
        match event:
            case zmq.Event.HANDSHAKE_FAILED_AUTH:
                return (
                    f"the broker refuses this {party.role}'s key ({party.key}); its operator must "
                    f"add it to the allow-list of {party.role}s (`python -m broker keys`)"
                )
            case zmq.Event.HANDSHAKE_FAILED_PROTOCOL:
                advice = (
                    f"the broker does not use CURVE; leave {party.server_key} out"
                    if self._secured
                    else f"the broker demands CURVE; give {party.server_key} and {party.key}"
                )
                return f"handshake failed: {advice}"
            case zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
                # Which side notices a mismatch first is chance; this one may also be no broker.
                guess = (
                    f"is {party.server_key} this broker's?"
                    if self._secured
                    else f"does the broker demand CURVE ({party.server_key}, {party.key})?"
                )
                return (
                    f"handshake broken off; is this a tokenbus broker's {party.door} address, "
                    f"and {guess}"
                )
            case zmq.Event.CLOSED:
                return "connection refused: nobody listens there"
        return "the connection was closed"
