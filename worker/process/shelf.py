"""Several models of one worker, of which one is loaded at a time: `--models`.

Each model gets an engine process of its own, and the one before has ended by then: whatever the
engine, all memory of its device is free again. The brokers decide whose turn it is (`load`); here
it is carried out. A model that nobody asks for is unloaded after a while. Must never end a process
that has work.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec.structs import replace as replaced

from broker.protocol.errors import ErrorCode, ErrorInfo
from broker.protocol.messages import ModelInfo
from worker.core import events
from worker.engines import events as engine_events
from worker.engines.base import Capabilities, EngineOptions
from worker.engines.events import END, FAIL
from worker.process.pipe import Pipe
from worker.process.supervisor import Supervisor

log = logging.getLogger(__name__)

BYTES_PER_S = 500e6
"""From a disk into memory; only until a load was measured."""
LEAST_LOAD_MS = 3000
"""An engine process starts, whatever it loads."""


@dataclass(slots=True)
class _Entry:
    """A model on the shelf."""

    path: str
    names: tuple[str, ...]
    load_ms: int
    infos: tuple[ModelInfo, ...]
    #: Why it cannot be loaded; empty if it can, as far as is known.
    broken: str = ""


class Shelf:
    """Stands where a `Supervisor` stands (`worker.loop.EngineSide`)."""

    def __init__(
        self,
        options: EngineOptions,
        environment: dict[str, str],
        *,
        unload_idle_s: float = math.inf,
        make: Callable[[EngineOptions, dict[str, str]], Supervisor] = Supervisor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`options.slots` is the number of slots, whichever model is loaded."""
        self._options = options
        self._environment = environment
        self._unload_idle_s = unload_idle_s
        self._make = make
        self._clock = clock
        self._entries = [
            _Entry(path, names, _guess_ms(path), tuple(ModelInfo(name=name) for name in names))
            for path, names in zip(options.model_paths, options.model_names, strict=True)
        ]
        self._current: _Entry | None = None
        self._engine: Supervisor | None = None
        self._since_s = 0.0
        self._ready = self._lost = False
        self._jobs: set[bytes] = set()
        self._idle_since_s = math.inf
        self._device = options.device
        self._events: list[events.Event] = []

    # --- as an engine -----------------------------------------------------------------------------

    @property
    def pipe(self) -> Pipe | None:
        return self._engine.pipe if self._engine is not None else None

    @property
    def waiting(self) -> bool:
        return bool(self._events) or (self._engine is not None and self._engine.waiting)

    def start(self) -> None:
        """Nothing is loaded until somebody asks for it."""
        self._events.append(events.EngineReady(self._capabilities()))

    def stop(self, *, wait: bool = True) -> None:
        if self._engine is not None:
            self._engine.stop(wait=wait)

    def restart(self, reason: str, now_s: float) -> list[events.Event]:
        if self._engine is None:
            return []
        self._forget_jobs(now_s)
        return self._translated(self._engine.restart(reason, now_s), now_s)

    def deadline_s(self) -> float:
        due_s = self._engine.deadline_s() if self._engine is not None else math.inf
        return min(due_s, self._idle_since_s + self._unload_idle_s)

    def tick(self, now_s: float) -> list[events.Event]:
        """Start an engine that was lost; unload a model that nobody asks for."""
        if self._engine is None:
            return []
        if now_s >= self._idle_since_s + self._unload_idle_s:
            log.info("model unloaded", extra={"fields": {"idle_s": round(self._unload_idle_s)}})
            self.load("")
            return self._taken()
        if now_s >= self._engine.deadline_s():
            return self._translated(self._engine.tick(now_s), now_s)
        return []

    def read(self, now_s: float) -> list[events.Event]:
        came = self._taken()
        if self._engine is not None:
            came += self._translated(self._engine.read(now_s), now_s)
        return came

    def add(self, job_id: bytes, body: bytes, attachments: tuple[bytes, ...]) -> None:
        """Hand a job to the engine; the core has seen that its model is loaded."""
        if self._engine is None or not self._ready:
            error = ErrorInfo(
                code=ErrorCode.WORKER_LOST.value,
                message="the model was unloaded a moment ago; send the request again",
                retryable=True,
            )
            self._events.append(events.EngineStepped([engine_events.failed(job_id, error)]))
            return
        self._jobs.add(job_id)
        self._idle_since_s = math.inf
        self._engine.add(job_id, body, attachments)

    def cancel(self, job_id: bytes) -> None:
        if self._engine is not None:
            self._engine.cancel(job_id)

    def widen(self, job_id: bytes, limit: int) -> None:
        """Do nothing, as the engines do."""

    # --- on demand --------------------------------------------------------------------------------

    def load(self, model: str) -> None:
        """Load a model in place of the one that is loaded; an empty name: only unload. Nothing
        happens while a request runs: the broker asks again."""
        entry = next((e for e in self._entries if model in e.names and not e.broken), None)
        if self._jobs or (model and (entry is None or entry is self._current)):
            return
        if self._engine is not None:
            # It has nothing to do; waiting for its farewell would hold up the link.
            self._engine.stop(wait=False)
        self._engine, self._current = None, entry
        self._ready = self._lost = False
        self._idle_since_s = math.inf
        self._events.append(events.EngineChanged(self._capabilities()))
        if entry is None:
            return
        log.info("model loads", extra={"fields": {"model": ", ".join(entry.names)}})
        self._since_s = self._clock()
        options = replace(self._options, model_paths=(entry.path,), model_names=(entry.names,))
        self._engine = self._make(options, self._environment)
        self._engine.start()
        self._events.append(events.EngineLoading(0.0, f"loading {model}", on_demand=True))

    # --- inside -----------------------------------------------------------------------------------

    def _taken(self) -> list[events.Event]:
        taken, self._events = self._events, []
        return taken

    def _translated(self, came: list[events.Event], now_s: float) -> list[events.Event]:
        translated: list[events.Event] = []
        for event in came:
            match event:
                case events.EngineStepped():
                    self._count(event, now_s)
                    translated.append(event)
                case events.EngineReady(capabilities):
                    translated.append(self._loaded(capabilities, now_s))
                case events.EngineLoading(progress, note):
                    on_demand = not self._lost
                    translated.append(events.EngineLoading(progress, note, on_demand=on_demand))
                case events.WorkerFailed(message) if not self._ready:
                    translated += self._unusable(message)
                case events.EngineLost(message) if not self._ready and not self._lost:
                    # It died while it loaded; the supervisor tries again, and gives up in the end.
                    log.warning("model not loaded", extra={"fields": {"cause": message}})
                case events.EngineLost():
                    self._lost, self._ready = True, False
                    self._forget_jobs(now_s)
                    self._idle_since_s = math.inf
                    translated.append(event)
                case _:
                    translated.append(event)
        return translated

    def _loaded(self, capabilities: Capabilities, now_s: float) -> events.Event:
        entry = self._current
        assert entry is not None
        if not self._lost:
            entry.load_ms = max(1, round((self._clock() - self._since_s) * 1000))
        slots = capabilities.capacity
        entry.infos = tuple(
            replaced(info, capacity=min(slots, info.capacity or slots))
            for info in capabilities.models
        )
        self._device = capabilities.device
        was_lost, self._lost, self._ready = self._lost, False, True
        self._idle_since_s = now_s
        known = self._capabilities()
        return events.EngineReady(known) if was_lost else events.EngineChanged(known)

    def _unusable(self, message: str) -> list[events.Event]:
        """The model cannot be loaded: the others can."""
        entry, self._current, self._engine = self._current, None, None
        assert entry is not None
        entry.broken = message
        log.error(
            "model unusable", extra={"fields": {"model": ", ".join(entry.names), "cause": message}}
        )
        if all(e.broken for e in self._entries):
            return [events.WorkerFailed(f"none of the models can be loaded; the last: {message}")]
        return [events.EngineChanged(self._capabilities())]

    def _count(self, event: events.EngineStepped, now_s: float) -> None:
        for told in event.events:
            if told[0] in (END, FAIL):
                self._jobs.discard(told[1])
                if not self._jobs:
                    self._idle_since_s = now_s

    def _forget_jobs(self, now_s: float) -> None:
        self._jobs.clear()

    def _capabilities(self) -> Capabilities:
        return Capabilities(
            engine=self._options.engine,
            device=self._device,
            models=tuple(
                replaced(
                    info,
                    loaded=self._ready and entry is self._current,
                    load_ms=entry.load_ms,
                )
                for entry in self._entries
                if not entry.broken
                for info in entry.infos
            ),
            capacity=self._options.slots,
        )


def _guess_ms(path: str) -> int:
    """What a load takes, from the size of the files."""
    folder = Path(path)
    files = [folder] if folder.is_file() else [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return LEAST_LOAD_MS + round(size / BYTES_PER_S * 1000)
