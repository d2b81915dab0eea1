"""The options of a worker that its core needs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a worker that its core needs."""

    #: The worker's name at the brokers; unique, because clients list the names of workers that
    #: died.
    name: str
    #: Addresses of the brokers, for logs; the index identifies the broker.
    brokers: tuple[str, ...]
    #: Names of the models that are known before the engine is loaded.
    models: tuple[str, ...] = ()
    #: 16 random bytes that distinguish this process from another worker with the same name.
    instance: bytes | None = None
    software: str = ""
    speed: float = 1.0
    engine: str = ""
    device: str = ""
    #: How long requests of a lost session keep running.
    grace_s: float = 30.0
    #: How long running requests may take to finish when the worker is told to stop.
    drain_s: float = 30.0
    #: How long an ended request can be resumed (SPEC.md section 6.4).
    kept_s: float = 60.0
    #: How long tokens wait for the client's window (SPEC.md section 6.3).
    window_wait_s: float = 60.0
    #: An engine that has work but finishes no step for this long counts as hung.
    stall_s: float = 120.0
    #: Whether the brokers may ask for models to be loaded and unloaded.
    on_demand: bool = False
    #: Whether the engine is another bus (a relay). Others use its slots too, so their number
    #: varies, and it must be told about windows.
    relay: bool = False
