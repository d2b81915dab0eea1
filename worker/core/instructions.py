"""Instructions of the worker's core, which the link carries out in order.

Plain frozen values. Must never have behaviour.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class OpenSocket:
    """Open a new socket with a new random routing id to this broker (SPEC.md section 2)."""

    broker: int


@dataclass(frozen=True, slots=True)
class CloseSocket:
    """Close the socket to this broker."""

    broker: int
    #: Whether messages already sent must leave first; otherwise they are dropped.
    linger: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message, header first. Never blocks; messages that do not fit are queued in order."""

    broker: int
    frames: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class EngineAdd:
    """Give the engine a job. `body` is the client's `Request`, already checked but still
    encoded."""

    job_id: bytes
    body: bytes
    attachments: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class EngineCancel:
    """Stop a job of the engine."""

    job_id: bytes


@dataclass(frozen=True, slots=True)
class EngineWindow:
    """The client accepts tokens of this job with offsets below `limit`. Only for an engine that
    waits for the window."""

    job_id: bytes
    limit: int


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Load a model in place of those in `gives_way`. If `model` is empty, only unload: those, or
    all models if `gives_way` is empty."""

    model: str
    gives_way: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RestartEngine:
    """Kill the engine process, which no longer steps, and start another."""

    reason: str


@dataclass(frozen=True, slots=True)
class Exit:
    """Nothing is left to send; end the process."""

    code: int
    #: The reason, for the terminal; empty if everything went as requested.
    message: str = ""


@dataclass(frozen=True, slots=True)
class Log:
    """A transition that people may want to read; never a prompt or a token."""

    event: str
    fields: dict[str, Any] = field(default_factory=dict)
    level: int = logging.INFO


Instruction = (
    OpenSocket
    | CloseSocket
    | Send
    | EngineAdd
    | EngineCancel
    | EngineWindow
    | EngineLoad
    | RestartEngine
    | Exit
    | Log
)
