"""Connections without a session, and their end: nobody holds a descriptor for nothing.

ZeroMQ never closes a connection whose handshake is done, and has no call that does. But its monitor
names the descriptor of each connection that it accepts, every message names the descriptor that it
came from, and `shutdown` on that is to ZeroMQ what a peer's own end is. Must never touch a
descriptor that is another thing by now: ZeroMQ closes them on its own thread, and the system gives
the numbers out again; so each is known with its inode.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Container, Mapping
from typing import Final

from broker.core.events import Side

_SWEEPS: Final = 3
"""Looks at all connections in the time that one without a session has."""


class _Connection:
    __slots__ = ("inode", "routing_id", "side", "since_s")

    def __init__(self, side: Side, inode: int) -> None:
        self.side = side
        self.inode = inode
        #: As it said in HELLO; empty: it has not said it.
        self.routing_id = b""
        #: When it was first seen without a session; infinity: it has one.
        self.since_s = math.inf


class Connections:
    """All connections of the broker, by descriptor."""

    def __init__(self, patience_s: float) -> None:
        """`patience_s`: a connection without a session may stay so long."""
        self._patience_s = patience_s
        self._known: dict[int, _Connection] = {}
        self._swept_s = -math.inf

    def accepted(self, side: Side, descriptor: int) -> None:
        """ZeroMQ accepted a connection, a while ago."""
        self._entry(side, descriptor)

    def named(self, side: Side, descriptor: int, routing_id: bytes) -> None:
        """HELLO came from a connection."""
        entry = self._entry(side, descriptor)
        if entry is not None:
            entry.routing_id = routing_id

    def _entry(self, side: Side, descriptor: int) -> _Connection | None:
        inode = _inode(descriptor)
        if inode is None:
            return None
        entry = self._known.get(descriptor)
        if entry is None or entry.inode != inode:
            entry = self._known[descriptor] = _Connection(side, inode)
        return entry

    @property
    def due_s(self) -> float:
        """When `sweep` is due."""
        return self._swept_s + self._patience_s / _SWEEPS

    def sweep(self, now_s: float, sessions: Mapping[Side, Container[bytes]]) -> int:
        """Close who has no session for too long; returns how many. `sessions`: routing ids of the
        sides whose messages are all read. What a stopped broker did not read in time proves
        nothing."""
        late = now_s > self.due_s + self._patience_s
        self._swept_s = now_s
        closed = 0
        for descriptor, entry in list(self._known.items()):
            here = sessions.get(entry.side)
            if here is None:
                continue
            if entry.routing_id in here:
                entry.since_s = math.inf
            elif _inode(descriptor) != entry.inode:
                del self._known[descriptor]
            elif late or entry.since_s == math.inf:
                entry.since_s = now_s
            elif now_s - entry.since_s >= self._patience_s:
                del self._known[descriptor]
                closed += _shut_down(descriptor)
        return closed


def _inode(descriptor: int) -> int | None:
    """None: it is closed."""
    try:
        return os.fstat(descriptor).st_ino
    except OSError:
        return None


def _shut_down(descriptor: int) -> bool:
    """End the connection under ZeroMQ's hands; the descriptor stays ZeroMQ's to close."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as shared:
        shared.shutdown(socket.SHUT_RDWR)
        return True
    return False
