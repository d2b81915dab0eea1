"""Instructions of the core. `BrokerCore.handle` returns them; the loop carries them out in order.

A failed `Send` comes back as an event (`PeerUnreachable`, `PeerOverflowed`), never as an exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from broker.core.events import Side


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message, header first."""

    side: Side
    routing_id: bytes
    frames: tuple[bytes, ...]
    #: The last message: the session is over, and what is still queued for the peer may be dropped
    #: after a while.
    last: bool = False


@dataclass(frozen=True, slots=True)
class ForgetPeer:
    """The connection is gone: drop what is queued for it."""

    side: Side
    routing_id: bytes


@dataclass(frozen=True, slots=True)
class ReloadAccess:
    """Read keys and allow-lists again and report `AccessChanged`."""


@dataclass(frozen=True, slots=True)
class StopLoop:
    """Nothing is left to send: flush, close the sockets, end the process."""


@dataclass(frozen=True, slots=True)
class Log:
    """One log line for people. Never contains a prompt, a token or a whole id."""

    level: Literal["debug", "info", "warning"]
    event: str
    fields: dict[str, Any]


Instruction = Send | ForgetPeer | ReloadAccess | StopLoop | Log
