"""Events fed to the worker's core: what happened at sockets, engine and operator.

Plain frozen values; the link and the tests make them, `session.WorkerCore.handle` reads them. A
broker is identified by its index in the list of brokers. Must never hold a socket or a file
descriptor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from worker.engines.base import Capabilities


@dataclass(frozen=True, slots=True)
class Tick:
    """The time given by `deadline_s` has come."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The socket that `OpenSocket` asked for is connected; the handshake is done."""

    broker: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The operating system or ZeroMQ reported that the connection is lost, or was never made."""

    broker: int
    reason: str
    #: Whether somebody answers but refuses us: a wrong key, or CURVE on one side only.
    refused: bool = False


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A whole message came from a broker; its header is the first frame."""

    broker: int
    frames: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SendBlocked:
    """The socket accepts no more for now; the link keeps the messages and sends them later."""

    broker: int


@dataclass(frozen=True, slots=True)
class SendUnblocked:
    """Everything that was waiting has been sent."""

    broker: int


@dataclass(frozen=True, slots=True)
class EngineLoading:
    """The engine process is (still) loading."""

    #: 0 to 1, or None if unknown.
    progress: float | None
    note: str
    #: Whether a model is loaded on demand, while the worker keeps serving.
    on_demand: bool = False


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The engine is loaded and accepts jobs."""

    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class EngineChanged:
    """The engine, still loaded, has different models or a different number of slots. A relay's
    slots are those that are free on its lower bus."""

    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class LoadRefused:
    """A model or adapter cannot be loaded on demand; the worker keeps serving."""

    model: str
    message: str


@dataclass(frozen=True, slots=True)
class EngineStepped:
    """The engine finished a step.

    `events` are the engine's events as plain arrays, tag first (`worker.engines.base`): they are
    passed on unread wherever possible, because this is the path of every token.
    """

    events: list[Any]


@dataclass(frozen=True, slots=True)
class EngineMeasured:
    """Statistics of the engine, about once a second."""

    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine process is gone; a new one is being started."""

    message: str


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Finish running requests and leave (SIGTERM). A second one does not wait."""

    reason: str


@dataclass(frozen=True, slots=True)
class EndKnown:
    """When this worker will be gone, on the clock of `handle`; infinity if no end is known any
    more."""

    ends_s: float
    #: For people: "Slurm job 123", "spot notice".
    why: str = ""


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """The engine cannot be started: end the sessions and leave with an error."""

    message: str


Event = (
    Tick
    | Connected
    | Disconnected
    | MessageReceived
    | SendBlocked
    | SendUnblocked
    | EngineLoading
    | EngineReady
    | EngineChanged
    | LoadRefused
    | EngineStepped
    | EngineMeasured
    | EngineLost
    | StopRequested
    | EndKnown
    | WorkerFailed
)
