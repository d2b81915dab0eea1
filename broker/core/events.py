"""Events that happen to the broker. The loop reports them; `BrokerCore.handle` takes them.

Plain frozen values; they carry no behaviour and no time (that is an argument of `handle`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

Frames = tuple[bytes, ...]
"""The frames of a message without its routing id."""


class Side(StrEnum):
    """One of the two sockets: clients connect at the front, workers at the back. Text, because a
    plain member of `Enum` is hashed by a Python function, a dozen times for each message."""

    FRONT = "front"
    BACK = "back"


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A message: header first, without the routing id frame."""

    side: Side
    routing_id: bytes
    frames: tuple[bytes, ...]
    #: Z85 public key that CURVE proved for this connection; empty without CURVE. Needed only with
    #: HELLO: the session is bound to it.
    key: str = ""


@dataclass(frozen=True, slots=True)
class PeerUnreachable:
    """A send found no connection with that routing id."""

    side: Side
    routing_id: bytes


@dataclass(frozen=True, slots=True)
class PeerOverflowed:
    """The bounded outgoing queue to this peer is full: it does not read."""

    side: Side
    routing_id: bytes


@dataclass(frozen=True, slots=True)
class DisconnectReported:
    """The operating system reported that a connection of this side is gone, but not whose."""

    side: Side


@dataclass(frozen=True, slots=True)
class LoopWasLate:
    """This process was suspended or overloaded: no peer's silence during that time counts."""

    late_s: float


@dataclass(frozen=True, slots=True)
class AccessChanged:
    """The allow-lists were read again (Z85 public keys); only where CURVE is on."""

    clients: frozenset[str]
    workers: frozenset[str]
    operators: frozenset[str]


@dataclass(frozen=True, slots=True)
class ShutdownRequested:
    """Stop gracefully: accept nothing new; running requests may end within `grace_s`."""

    grace_s: float
    reason: str = "shutdown"


@dataclass(frozen=True, slots=True)
class ShutdownForced:
    """Stop now."""


@dataclass(frozen=True, slots=True)
class Tick:
    """`deadline_s()` has passed.

    A peer's silence is judged only up to the time at which its socket was last read empty: a
    heartbeat that is still queued behind data in a busy broker counts.
    """

    front_read_s: float = math.inf
    back_read_s: float = math.inf


Event = (
    MessageReceived
    | PeerUnreachable
    | PeerOverflowed
    | DisconnectReported
    | LoopWasLate
    | AccessChanged
    | ShutdownRequested
    | ShutdownForced
    | Tick
)
