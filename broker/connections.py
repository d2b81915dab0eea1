"""Closes connections that have no session, so that no descriptor is held for nothing.

ZeroMQ never closes a connection whose handshake is done, and has no call that does. But its monitor
names the descriptor of each connection that it accepts, every message names the descriptor that it
came from, and to ZeroMQ a `shutdown` of it looks like the peer closing. Must never touch a
descriptor that was reused: ZeroMQ closes them on its own thread and the system hands the numbers
out again, so each is remembered with its inode.
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
"""How often all connections are looked at within the time that one may have no session."""


class _Connection:
    __slots__ = ("inode", "routing_id", "side", "since_s")

    def __init__(self, side: Side, inode: int) -> None:
        self.side = side
        self.inode = inode
        #: Routing id, known from HELLO; empty before that.
        self.routing_id = b""
        #: When it was first seen without a session; infinity while it has one.
        self.since_s = math.inf


class Connections:
    """All connections of the broker, by descriptor."""

    def __init__(self, patience_s: float) -> None:
        """`patience_s`: how long a connection without a session may stay."""
        self._patience_s = patience_s
        self._known: dict[int, _Connection] = {}
        self._swept_s = -math.inf

    def accepted(self, side: Side, descriptor: int) -> None:
        """ZeroMQ reports, with some delay, that it accepted a connection."""
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
        """Close connections that have had no session for too long; returns how many. `sessions`:
        routing ids with a session, only for sides whose messages have all been read: a HELLO that a
        suspended broker has not read yet must not count against its peer."""
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
    """None if the descriptor is closed."""
    try:
        return os.fstat(descriptor).st_ino
    except OSError:
        return None


def _shut_down(descriptor: int) -> bool:
    """Shut a connection of ZeroMQ's down; closing the descriptor stays ZeroMQ's business."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as shared:
        shared.shutdown(socket.SHUT_RDWR)
        return True
    return False
