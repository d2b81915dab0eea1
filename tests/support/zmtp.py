"""A DEALER on plain sockets for load generators: ZMTP 3.0 (RFC 23), NULL mechanism.

A load generator made of ZeroMQ sockets takes more CPU than the forwarder under load. This one
writes a burst of messages with one system call and counts the answers by bytes. It is not a general
library: no reconnect, no queue, no thread.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterable, Sequence

_GREETING = (
    b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
)
_MORE, _LONG, _COMMAND = 1, 2, 4
_CHUNK = 1 << 20


def encode(frames: Sequence[bytes]) -> bytes:
    """One message as its bytes on the wire."""
    parts: list[bytes] = []
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        more = _MORE if index < last else 0
        size = len(frame)
        if size < 256:
            parts.append(bytes((more, size)))
        else:
            parts.append(bytes((more | _LONG,)) + size.to_bytes(8, "big"))
        parts.append(frame)
    return b"".join(parts)


def _ready(identity: bytes) -> bytes:
    body = b"\x05READY"
    for name, value in ((b"Socket-Type", b"DEALER"), (b"Identity", identity)):
        body += bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value
    return bytes((_COMMAND, len(body))) + body


class Connection:
    """One connection of a DEALER to a ROUTER or a DEALER."""

    def __init__(self, endpoint: str, identity: bytes, timeout_s: float = 20.0) -> None:
        scheme, _, address = endpoint.partition("://")
        if scheme == "tcp":
            host, _, port = address.rpartition(":")
            self.socket = socket.create_connection((host, int(port)), timeout_s)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        elif scheme == "ipc":
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(timeout_s)
            self.socket.connect(address)
        else:
            raise ValueError(f"{endpoint}: only tcp:// and ipc:// endpoints")
        self.identity = identity
        self._buffer = bytearray()
        #: Whether the peer's greeting has been read. That happens with the first message, so that
        #: thousands of connections can be opened without waiting for each. (libzmq closes a
        #: connection on which a message arrives before it has sent its own greeting.)
        self._greeted = False
        self.socket.sendall(_GREETING + _ready(identity))

    def fileno(self) -> int:
        """For selectors."""
        return self.socket.fileno()

    def _fill(self) -> None:
        data = self.socket.recv(_CHUNK)
        if not data:
            raise ConnectionError("the peer closed the connection")
        self._buffer += data

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._fill()
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _frame(self) -> tuple[int, bytes]:
        flags = self._take(1)[0]
        size = int.from_bytes(self._take(8 if flags & _LONG else 1), "big")
        return flags, self._take(size)

    def send(self, frames: Sequence[bytes]) -> None:
        """Send one message."""
        self.settle()
        self.socket.sendall(encode(frames))

    def send_encoded(self, messages: Iterable[bytes]) -> None:
        """Send several messages from `encode`, with as few system calls as possible."""
        self.socket.sendall(b"".join(messages))

    def receive(self) -> list[bytes]:
        """The next message. Raises `TimeoutError`, or `ConnectionError` if the peer has gone."""
        self.settle()
        frames: list[bytes] = []
        while True:
            flags, body = self._frame()
            if flags & _COMMAND:
                continue
            frames.append(body)
            if not flags & _MORE:
                return frames

    def settle(self) -> None:
        """Wait for the peer's half of the handshake."""
        if not self._greeted:
            self._greeted = True
            self._take(len(_GREETING))
            self._frame()

    def readable(self, timeout_s: float) -> bool:
        """Wait for bytes. Uses `poll`, since `select` is limited to 1,024 descriptors."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return self.pending() or bool(poll.poll(timeout_s * 1000))

    def pending(self) -> bool:
        """Whether there are bytes that have been read but not yet returned as a message."""
        return bool(self._buffer)

    def skip(self, size: int) -> bytes:
        """Read `size` bytes of messages without parsing them; returns at most the last 64 KiB."""
        left = size
        tail = b""
        if self._buffer:
            tail = self._take(min(left, len(self._buffer)))
            left -= len(tail)
        while left:
            tail = self.socket.recv(min(left, 65_536))
            if not tail:
                raise ConnectionError("the peer closed the connection")
            left -= len(tail)
        return tail

    def close(self) -> None:
        """Close at once."""
        self.socket.close()
