"""The socket of one session: a DEALER, its monitor, its keys, and what does not fit into its queue.

Knows nothing of the protocol and of who waits for it; never blocks. Not for two threads at once.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from typing import Final

import zmq
from zmq.backend import Socket as BackendSocket

from broker.protocol.keyfiles import exposed
from broker.protocol.limits import MAX_ANSWER_BYTES
from client.core import events
from client.errors import BusError, InvalidRequest
from client.options import Connection

# Plain numbers, and pyzmq's method beneath its Python one: `|` of its flags takes longer than
# receiving a frame.
_DONT_WAIT: Final = int(zmq.DONTWAIT)
_MORE_FOLLOWS: Final = int(zmq.DONTWAIT | zmq.SNDMORE)
_send: Final = BackendSocket.send

_Monitored: Final = (
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.DISCONNECTED
    | zmq.Event.CLOSED
)

_REPORT: Final = struct.Struct("=Hi")
"""First frame of a monitor's message: the event and a value, in the machine's own order."""

LOSS: Final = frozenset(
    (
        zmq.Event.HANDSHAKE_FAILED_AUTH,
        zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
        zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
        zmq.Event.DISCONNECTED,
        zmq.Event.CLOSED,
    )
)
"""Reports after which nothing more arrives than what has."""


class Dealer:
    """The socket of one session, its monitor, and what does not fit into its queue yet."""

    def __init__(self, connection: Connection) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._connection = connection
        self._outbox: deque[tuple[bytes, ...]] = deque()
        self.socket: zmq.Socket[bytes] | None = None
        self.monitor: zmq.Socket[bytes] | None = None
        #: A send may take back the socket's word that something came: `receive` has to look again
        #: before anybody waits for its descriptor.
        self.unsettled = False

    def open(self, address: str, routing_id: bytes) -> str:
        """Start to connect. Returns why it cannot, if it cannot."""
        try:
            self._open(address, routing_id)
        except (zmq.ZMQError, BusError) as error:
            self.close(0)
            return f"cannot connect to {address}: {error}"
        return ""

    def _open(self, address: str, routing_id: bytes) -> None:
        dealer = self._context.socket(zmq.DEALER)
        self.socket = dealer
        # One socket is one connection is one session: no silent reconnect, nothing is queued
        # while there is no connection.
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)
        dealer.setsockopt(zmq.IMMEDIATE, 1)
        dealer.setsockopt(zmq.ROUTING_ID, routing_id)
        # Finite: beyond it messages wait in the outbox, where the session can still give up.
        dealer.setsockopt(zmq.SNDHWM, 1000)
        dealer.setsockopt(zmq.RCVHWM, 10_000)
        # Nothing that a broker sends is larger than an ANSWER.
        dealer.setsockopt(zmq.MAXMSGSIZE, MAX_ANSWER_BYTES + 1024)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.CONNECT_TIMEOUT, 5000)
        dealer.setsockopt(zmq.HANDSHAKE_IVL, 5000)
        # Reap half-open connections; ZMTP heartbeats stay off, they can abort the process.
        dealer.setsockopt(zmq.TCP_KEEPALIVE, 1)
        dealer.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
        dealer.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
        dealer.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
        dealer.setsockopt(zmq.TCP_MAXRT, 30_000)
        if "[" in address:
            dealer.setsockopt(zmq.IPV6, 1)
        self._set_keys(dealer)
        self.monitor = dealer.get_monitor_socket(int(_Monitored))
        dealer.connect(address)
        self.unsettled = True

    def _set_keys(self, dealer: zmq.Socket[bytes]) -> None:
        server_key = self._connection.server_key
        if server_key is None:
            return
        public, secret = key_pair(self._connection)
        dealer.curve_serverkey = server_key.encode("ascii")
        dealer.curve_publickey = public
        dealer.curve_secretkey = secret

    def close(self, linger_ms: int) -> None:
        """Close the socket, if there is one; what was sent has so long to leave."""
        self._outbox.clear()
        if self.socket is None:
            return
        self.socket.disable_monitor()
        if self.monitor is not None:
            self.monitor.close(0)
        self.socket.close(linger_ms)
        self.socket = self.monitor = None

    def term(self) -> None:
        """After the last `close`: wait until what was sent has left, or its time is over."""
        self._context.term()

    def send(self, frames: tuple[bytes, ...]) -> None:
        """Send in order; what the socket does not take now waits."""
        if self.socket is None:
            return
        if self._outbox or not self._try(frames):
            self._outbox.append(frames)

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        while self._outbox and self._try(self._outbox[0]):
            self._outbox.popleft()

    @property
    def blocked(self) -> bool:
        """Something waits for the socket."""
        return bool(self._outbox)

    def _try(self, frames: tuple[bytes, ...]) -> bool:
        dealer = self.socket
        assert dealer is not None
        self.unsettled = True
        try:
            # Only the first frame can be refused.
            for frame in frames[:-1]:
                _send(dealer, frame, _MORE_FOLLOWS)
            _send(dealer, frames[-1], _DONT_WAIT)
        except zmq.Again:
            return False
        return True

    def receive(self) -> tuple[bytes, ...] | None:
        """The next message, or None. A frame object knows whether another follows; asking
        the socket takes longer than receiving."""
        dealer = self.socket
        if dealer is None:
            return None
        try:
            frame = dealer.recv(_DONT_WAIT, copy=False)
        except zmq.Again:
            self.unsettled = False
            return None
        frames = [frame.bytes]
        while frame.more:
            frame = dealer.recv(_DONT_WAIT, copy=False)
            frames.append(frame.bytes)
        return tuple(frames)

    def reports(self) -> list[zmq.Event]:
        """What the monitor saw since the last call."""
        seen = []
        while self.monitor is not None:
            try:
                report, _address = self.monitor.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            # Read by hand: `zmq.utils.monitor` would load all of asyncio.
            seen.append(zmq.Event(_REPORT.unpack(report)[0]))
        return seen


def key_pair(connection: Connection) -> tuple[bytes, bytes]:
    """The client's CURVE keys: from its file, or fresh ones where any key will do.

    Raises `InvalidRequest` for a file that is not a secret certificate, or that others can read.
    """
    if connection.key_pair is not None:
        public_text, secret_text = connection.key_pair
        return public_text.encode("ascii"), secret_text.encode("ascii")
    if connection.key_file is None:
        return zmq.curve_keypair()
    if not connection.key_file.exists():
        raise InvalidRequest(
            f"key file {str(connection.key_file)!r} does not exist; "
            "`python -m broker keys` makes it"
        )
    from zmq import auth  # only where CURVE is on: it is slow to load

    try:
        public, secret = auth.load_certificate(connection.key_file)
        why = exposed(connection.key_file) if secret is not None else ""
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"cannot read key file {str(connection.key_file)!r}: {error}"
        ) from None
    if secret is None:
        raise InvalidRequest(
            f"key file {str(connection.key_file)!r} holds no secret key; "
            "give the file that ends in .key_secret"
        )
    if why:
        raise InvalidRequest(f"key file {why}")
    return public, secret


def server_key_of(given: str) -> str:
    """A broker's public key: 40 characters of Z85, or a path to its `.key` file.

    Raises `InvalidRequest` for anything else.
    """
    if len(given) == 40 and not os.path.exists(given):  # noqa: PTH110  # 40 characters may be no path
        return given
    from zmq import auth

    try:
        public, _ = auth.load_certificate(given)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"server_key {given!r} is neither 40 characters of Z85 nor a .key file: {error}"
        ) from None
    return public.decode("ascii")


def fact_of(report: zmq.Event, secured: bool) -> events.Event | None:
    """What a report of the monitor means to the session; `secured`: we use CURVE."""
    if report is zmq.Event.HANDSHAKE_SUCCEEDED:
        return events.ConnectionOpened()
    match report:
        case zmq.Event.HANDSHAKE_FAILED_AUTH:
            return events.ConnectionLost(
                "the broker refuses this client's key; its operator adds it to the allow-list "
                "(`python -m broker keys`)",
                unauthenticated=True,
            )
        case zmq.Event.HANDSHAKE_FAILED_PROTOCOL:
            advice = (
                "the broker does not use CURVE; leave server_key out"
                if secured
                else "the broker demands CURVE; give server_key and key_file"
            )
            return events.ConnectionLost(f"handshake failed: {advice}", unauthenticated=True)
        case zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
            # Which side notices a mismatch first is chance; this one may also be no broker.
            guess = (
                "is server_key this broker's?"
                if secured
                else "does the broker demand CURVE (server_key, key_file)?"
            )
            return events.ConnectionLost(
                f"handshake broken off; is this a tokenbus broker's front address, and {guess}"
            )
        case zmq.Event.CLOSED:
            return events.ConnectionLost("connection refused: nobody listens there")
        case zmq.Event.DISCONNECTED:
            return events.ConnectionLost("disconnected")
    return None
