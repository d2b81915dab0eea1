"""Several models of one worker, loaded on demand: `--models`, `--models-memory`.

Each model gets an engine process of its own: whatever the engine, its device memory is free again
once the process has ended. Without a budget, one model is loaded at a time; with one, as many as
fit by the measured sizes of their processes. The brokers decide which model is loaded and which
ones give way; `load` carries that out. A model that nobody asks for is unloaded after a while, and
earlier if the budget is exceeded. Must never end a process that has work.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace as replaced

from broker.protocol.errors import ErrorCode, ErrorInfo
from broker.protocol.messages import ModelInfo
from worker.core import events
from worker.engines import events as engine_events
from worker.engines.base import Capabilities, EngineOptions, FailedLoad
from worker.engines.events import END, FAIL
from worker.process.pipe import Pipe
from worker.process.supervisor import Supervisor

log = logging.getLogger(__name__)

BYTES_PER_S = 500e6
"""Assumed speed of loading from a disk, until a load has been measured."""
LEAST_LOAD_MS = 3000
"""The time that an engine process takes to start, whatever it loads."""
HELD_BYTES = "memory_held_bytes"
"""The metric in which an engine process reports the memory that it occupies."""
TOLD_SHARE = 1 / 32
"""A footprint that has changed by less than this share of the budget since it was first measured is
not reported."""
STRIKES = 3
"""A request is not run again after this many engines have died while they ran it alone. The broker
cannot count these deaths, since the worker lives on with its other models."""
REMEMBERED = 1000
"""How many requests whose engines died are remembered."""
FIRST_RETRY_S = 30.0
"""How long a model that could not be loaded is not offered; it doubles each time that loading fails
again. The cause may have been removed since, or have been another process that held the memory."""
LONGEST_RETRY_S = 1800.0
LATE_S = 1.0
"""A tick that comes later than this means that the process was suspended."""
STALL_SHARE = 0.9
"""Share of the time after which the core considers the whole worker hung: one engine of several is
restarted earlier."""


class _Asked(msgspec.Struct):
    """The part of a request's body that is needed here."""

    model: str = ""


_READ: Final = msgspec.msgpack.Decoder(_Asked)


@dataclass(slots=True)
class _Entry:
    """A model on the shelf."""

    path: str
    names: tuple[str, ...]
    load_ms: int
    infos: tuple[ModelInfo, ...]
    #: What it occupies: the most that was measured of its latest process, at first the size of its
    #: files.
    memory_bytes: int
    #: The figure that was last reported to the brokers.
    told_bytes: int = 0
    #: Why it cannot be loaded; empty if it can, as far as is known.
    broken: str = ""
    #: Loads that failed in a row, and when it is offered again.
    failures: int = 0
    retry_s: float = math.inf
    #: None: it is not loaded.
    engine: Supervisor | None = None
    ready: bool = False
    #: Whether its process has died and is being restarted.
    lost: bool = False
    #: Since when it has been loading, has had nothing to do, has finished no step.
    since_s: float = 0.0
    idle_since_s: float = math.inf
    mark_s: float = 0.0
    jobs: set[bytes] = field(default_factory=set)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return ", ".join(self.names)

    @property
    def busy(self) -> bool:
        """Whether it has work, or is being loaded for some."""
        return bool(self.jobs) or (self.engine is not None and not self.ready and not self.lost)

    def serves(self, model: str) -> bool:
        return any(info.name == model for info in self.infos)


class Shelf:
    """Takes the place of a `Supervisor` (`worker.loop.EngineSide`)."""

    def __init__(
        self,
        options: EngineOptions,
        environment: dict[str, str],
        *,
        unload_idle_s: float = math.inf,
        memory_bytes: int = 0,
        stall_s: float = math.inf,
        make: Callable[[EngineOptions, dict[str, str]], Supervisor] = Supervisor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`options.slots` is the number of slots of all models together. `memory_bytes`: how much
        the loaded models may occupy; 0: one model at a time, whatever it occupies."""
        self._options = options
        self._environment = environment
        self._unload_idle_s = unload_idle_s
        self._budget_bytes = memory_bytes
        self._stall_s = stall_s
        self._make = make
        self._clock = clock
        self._entries = [
            _entry(path, names)
            for path, names in zip(options.model_paths, options.model_names, strict=True)
        ]
        #: The model of each running job.
        self._jobs: dict[bytes, _Entry] = {}
        #: How often a request's engine died while it ran alone.
        self._strikes: dict[bytes, int] = {}
        #: Whether the whole worker counts as lost, because its only engine has died.
        self._all_lost = False
        #: When `tick` is due.
        self._due_s = math.inf
        self._device = options.device
        self._events: list[events.Event] = []

    # --- as an engine -----------------------------------------------------------------------------

    @property
    def pipes(self) -> list[Pipe]:
        return [pipe for entry in self._loaded() for pipe in _engine(entry).pipes]

    @property
    def waiting(self) -> bool:
        return bool(self._events) or any(_engine(entry).waiting for entry in self._loaded())

    def start(self) -> None:
        """Become ready; nothing is loaded until somebody asks for it."""
        self._events.append(events.EngineReady(self._capabilities()))

    def stop(self, *, wait: bool = True) -> None:
        for entry in self._loaded():
            _engine(entry).stop(wait=wait)

    def restart(self, reason: str, now_s: float) -> list[events.Event]:
        """Kill and restart every engine that has work."""
        came: list[events.Event] = []
        for entry in self._loaded():
            if entry.jobs:
                came += self._restarted(entry, reason, now_s, told=True)
        return came

    def deadline_s(self) -> float:
        due_s = min((entry.retry_s for entry in self._entries if entry.broken), default=math.inf)
        for entry in self._loaded():
            due_s = min(due_s, _engine(entry).deadline_s())
            if entry.jobs:
                due_s = min(due_s, self._stalled_s(entry))
            else:
                due_s = min(due_s, entry.idle_since_s + self._unload_idle_s)
        self._due_s = due_s
        return due_s

    def tick(self, now_s: float) -> list[events.Event]:
        """Start an engine that was lost, kill one that hangs, unload a model that nobody asks for,
        and offer again one that could not be loaded."""
        came: list[events.Event] = []
        again = [entry for entry in self._entries if entry.broken and now_s >= entry.retry_s]
        for entry in again:
            entry.broken = ""
            log.info("model is offered again", extra={"fields": {"model": entry.title}})
        if again:
            self._changed()
        late_s = now_s - self._due_s
        for entry in self._loaded():
            if late_s > LATE_S:
                entry.mark_s += late_s  # this process was suspended, and saw no steps
            if entry.engine is None:
                continue  # unloaded in the meantime, to keep the budget
            if entry.jobs and now_s >= self._stalled_s(entry):
                silent_s = now_s - entry.mark_s
                reason = f"the engine of {entry.title} finished no step for {silent_s:.0f} s"
                came += self._restarted(entry, reason, now_s, told=False)
            elif not entry.jobs and now_s >= entry.idle_since_s + self._unload_idle_s:
                self._unload(entry, f"nobody asked for it for {self._unload_idle_s:.0f} s")
            elif now_s >= _engine(entry).deadline_s():
                came += self._translated(entry, _engine(entry).tick(now_s), now_s)
        return self._taken() + came

    def _stalled_s(self, entry: _Entry) -> float:
        """When an engine with work counts as hung. If it is the only one, the core decides."""
        alone = len(self._loaded()) == 1
        return math.inf if alone else entry.mark_s + STALL_SHARE * self._stall_s

    def read(self, now_s: float) -> list[events.Event]:
        came = self._taken()
        for entry in self._loaded():
            if entry.engine is not None:  # else unloaded in the meantime, to keep the budget
                came += self._translated(entry, entry.engine.read(now_s), now_s)
        return came + self._taken()

    def add(self, job_id: bytes, body: bytes, attachments: tuple[bytes, ...]) -> None:
        """Hand a job to its model's engine; the core has checked that it is loaded."""
        model = _READ.decode(body).model
        entry = next((e for e in self._loaded() if e.ready and e.serves(model)), None)
        if entry is None:
            message = f"model {model} was unloaded a moment ago; send the request again"
            self._fail(job_id, ErrorCode.WORKER_LOST, message, retryable=True)
            return
        if self._strikes.get(job_id, 0) >= STRIKES:
            message = f"{STRIKES} engines died while they ran this request and nothing else"
            self._fail(job_id, ErrorCode.POISON, message)
            return
        if not entry.jobs:
            entry.mark_s = self._clock()
        entry.jobs.add(job_id)
        entry.idle_since_s = math.inf
        self._jobs[job_id] = entry
        _engine(entry).add(job_id, body, attachments)

    def cancel(self, job_id: bytes) -> None:
        entry = self._jobs.get(job_id)
        if entry is not None and entry.engine is not None:
            entry.engine.cancel(job_id)

    def widen(self, job_id: bytes, limit: int) -> None:
        """Do nothing: engines ignore windows."""

    # --- on demand --------------------------------------------------------------------------------

    def load(self, model: str, gives_way: Collection[str] = ()) -> None:
        """Load a model in place of those that give way, and of others whose memory it needs. With
        an empty name only unload those that give way, or all if none are named. Nothing happens
        while a request runs on one of them: the broker asks again."""
        loaded = self._loaded()
        leaving = [e for e in loaded if any(e.serves(name) for name in gives_way)]
        entry = None
        if model:
            entry = next((e for e in self._entries if e.serves(model) and not e.broken), None)
            if entry is None or entry.engine is not None:
                return
            leaving = self._making_room(entry, leaving)
        elif not gives_way:
            leaving = loaded
        if any(e.busy if model else e.jobs for e in leaving):
            return
        for other in leaving:
            self._unload(other, f"for {model}" if model else "as the operator asked")
        if entry is None:
            return
        log.info("model loads", extra={"fields": {"model": entry.title}})
        entry.since_s = self._clock()
        entry.engine = self._make(self._options_of(entry), self._environment)
        entry.engine.start()
        self._events.append(events.EngineChanged(self._capabilities()))
        self._events.append(events.EngineLoading(0.0, f"loading {model}", on_demand=True))

    def _making_room(self, entry: _Entry, leaving: list[_Entry]) -> list[_Entry]:
        """The models that must be unloaded before this one can be loaded: at least `leaving`."""
        if not self._budget_bytes:
            return self._loaded()
        rest = [e for e in self._loaded() if e not in leaving]
        leaving = list(leaving)
        # Idle ones first, the least recently used before others.
        rest.sort(key=lambda e: (e.busy, e.idle_since_s))
        while rest and self._occupied(rest) + entry.memory_bytes > self._budget_bytes:
            leaving.append(rest.pop(0))
        return leaving

    def _options_of(self, entry: _Entry) -> EngineOptions:
        others = self._occupied(e for e in self._loaded() if e is not entry)
        room = max(1, self._budget_bytes - others) if self._budget_bytes else 0
        return replace(
            self._options,
            model_paths=(entry.path,),
            model_names=(entry.names,),
            memory_bytes=room,
        )

    @staticmethod
    def _occupied(entries: Iterable[_Entry]) -> int:
        return sum(entry.memory_bytes for entry in entries)

    # --- inside -----------------------------------------------------------------------------------

    def _loaded(self) -> list[_Entry]:
        """The models that have an engine, loaded or loading."""
        return [entry for entry in self._entries if entry.engine is not None]

    def _taken(self) -> list[events.Event]:
        taken, self._events = self._events, []
        return taken

    def _fail(
        self, job_id: bytes, code: ErrorCode, message: str, *, retryable: bool = False
    ) -> None:
        error = ErrorInfo(code=code.value, message=message, retryable=retryable)
        self._events.append(events.EngineStepped([engine_events.failed(job_id, error)]))

    def _unload(self, entry: _Entry, why: str) -> None:
        assert not entry.jobs, "a process that has work is never ended"
        # It has nothing to do; to wait for its end would hold up the link.
        _engine(entry).stop(wait=False)
        entry.engine = None
        entry.ready = entry.lost = False
        entry.idle_since_s = math.inf
        entry.metrics = {}
        log.info("model unloaded", extra={"fields": {"model": entry.title, "why": why}})
        self._changed()

    def _changed(self) -> None:
        self._events.append(events.EngineChanged(self._capabilities()))

    def _translated(
        self, entry: _Entry, came: list[events.Event], now_s: float
    ) -> list[events.Event]:
        translated: list[events.Event] = []
        for event in came:
            match event:
                case events.EngineStepped():
                    entry.mark_s = now_s
                    self._count(entry, event, now_s)
                    translated.append(event)
                case events.EngineReady(capabilities):
                    translated.append(self._is_ready(entry, capabilities, now_s))
                case events.EngineChanged(capabilities):
                    self._learn(entry, capabilities)
                    translated.append(events.EngineChanged(self._capabilities()))
                case events.EngineLoading(progress, note):
                    on_demand = not self._all_lost
                    translated.append(events.EngineLoading(progress, note, on_demand=on_demand))
                case events.EngineMeasured(metrics):
                    translated += self._measured(entry, metrics)
                case events.WorkerFailed(message) if not entry.ready:
                    translated += self._unusable(entry, message)
                case events.EngineLost(message) if not entry.ready and not entry.lost:
                    # It died while loading; the supervisor tries again, and gives up eventually.
                    log.warning("model not loaded", extra={"fields": {"cause": message}})
                case events.EngineLost(message):
                    translated += self._is_lost(entry, message, now_s)
                case _:
                    translated.append(event)
        return translated

    def _is_ready(self, entry: _Entry, capabilities: Capabilities, now_s: float) -> events.Event:
        if not entry.lost:
            entry.load_ms = max(1, round((self._clock() - entry.since_s) * 1000))
        self._learn(entry, capabilities)
        self._device = capabilities.device
        entry.lost, entry.ready, entry.failures = False, True, 0
        entry.idle_since_s = now_s
        # Its memory is measured anew; until then the previous value counts.
        entry.metrics = {}
        was_lost, self._all_lost = self._all_lost, False
        known = self._capabilities()
        return events.EngineReady(known) if was_lost else events.EngineChanged(known)

    def _learn(self, entry: _Entry, capabilities: Capabilities) -> None:
        slots = capabilities.capacity
        entry.infos = tuple(
            replaced(info, capacity=min(slots, info.capacity or slots))
            for info in capabilities.models
        )

    def _is_lost(self, entry: _Entry, message: str, now_s: float) -> list[events.Event]:
        """A process has died, and the supervisor starts another. If it was the only one, the whole
        worker is lost, as without a shelf; otherwise only the jobs that ran on it."""
        if len(self._loaded()) == 1:
            self._all_lost = True
            self._forget_jobs(entry)
            entry.lost, entry.ready = True, False
            return [events.EngineLost(message)]
        return self._failed_jobs(entry, message)

    def _failed_jobs(self, entry: _Entry, message: str) -> list[events.Event]:
        alone = len(entry.jobs) == 1
        error = ErrorInfo(
            code=ErrorCode.WORKER_LOST.value,
            message=f"the engine of {entry.title} was lost: {message}",
            retryable=True,
        )
        failed = []
        for job_id in sorted(entry.jobs):
            failed.append(engine_events.failed(job_id, error))
            if alone:
                self._strikes[job_id] = self._strikes.pop(job_id, 0) + 1
                if len(self._strikes) > REMEMBERED:
                    del self._strikes[next(iter(self._strikes))]
        self._forget_jobs(entry)
        entry.lost, entry.ready = True, False
        told: list[events.Event] = [events.EngineChanged(self._capabilities())]
        return [*told, events.EngineStepped(failed)] if failed else told

    def _forget_jobs(self, entry: _Entry) -> None:
        for job_id in entry.jobs:
            self._jobs.pop(job_id, None)
        entry.jobs.clear()
        entry.idle_since_s = math.inf

    def _restarted(
        self, entry: _Entry, reason: str, now_s: float, *, told: bool
    ) -> list[events.Event]:
        """Restart a process that hangs. `told`: whether the core knows, and counts its jobs as
        lost."""
        if told:
            self._all_lost = True
            self._forget_jobs(entry)
            entry.lost, entry.ready = True, False
            lost: list[events.Event] = []
        else:
            lost = self._is_lost(entry, reason, now_s)
        return lost + self._translated(entry, _engine(entry).restart(reason, now_s), now_s)

    def _unusable(self, entry: _Entry, message: str) -> list[events.Event]:
        """A model cannot be loaded. It is offered again after a while, which doubles with each
        failure; the worker fails only if none can be loaded."""
        entry.engine, entry.lost = None, False
        entry.broken = message
        wait_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0**entry.failures)
        entry.failures, entry.retry_s = entry.failures + 1, self._clock() + wait_s
        self._all_lost = False
        log.error("model unusable", extra={"fields": {"model": entry.title, "cause": message}})
        refused = events.LoadRefused(entry.title, message)
        told: list[events.Event] = [refused, events.EngineChanged(self._capabilities())]
        if all(e.broken for e in self._entries):
            reason = f"none of the models can be loaded; the last: {message}"
            told.append(events.WorkerFailed(reason))
        return told

    def _count(self, entry: _Entry, event: events.EngineStepped, now_s: float) -> None:
        for told in event.events:
            if told[0] in (END, FAIL):
                self._jobs.pop(told[1], None)
                entry.jobs.discard(told[1])
                if not entry.jobs:
                    entry.idle_since_s = now_s

    # --- memory -----------------------------------------------------------------------------------

    def _measured(self, entry: _Entry, metrics: dict[str, float]) -> list[events.Event]:
        first = HELD_BYTES not in entry.metrics
        held = int(metrics.get(HELD_BYTES, 0))
        entry.metrics = metrics
        if held:
            entry.memory_bytes = held if first else max(held, entry.memory_bytes)
        came: list[events.Event] = [events.EngineMeasured(self._metrics())]
        if not self._budget_bytes or not entry.ready:
            return came
        changed = abs(entry.memory_bytes - entry.told_bytes)
        if first or changed > self._budget_bytes * TOLD_SHARE:
            self._changed()
        self._keep_budget()
        return came

    def _keep_budget(self) -> None:
        """Unload models without work, the least recently used first, while more memory is occupied
        than the budget allows."""
        idle = [e for e in self._loaded() if e.ready and not e.jobs]
        idle.sort(key=lambda e: e.idle_since_s)
        while idle and len(self._loaded()) > 1:
            over = self._occupied(self._loaded()) - self._budget_bytes
            if over <= 0:
                return
            self._unload(idle.pop(0), f"{over} bytes over --models-memory")

    def _metrics(self) -> dict[str, float]:
        """Metrics of all engines: sums, and the longest time to first token."""
        total: dict[str, float] = {}
        for entry in self._loaded():
            for name, value in entry.metrics.items():
                join = max if name == "ttft_ms" else float.__add__
                total[name] = join(total.get(name, 0.0), value)
        return total

    def _capabilities(self) -> Capabilities:
        occupied = self._occupied(self._loaded())
        infos = []
        for entry in self._entries:
            entry.told_bytes = entry.memory_bytes
            must_free = None
            free = self._budget_bytes - occupied
            if self._budget_bytes and entry.memory_bytes <= self._budget_bytes:
                must_free = max(0, entry.memory_bytes - free)
            for info in () if entry.broken else entry.infos:
                infos.append(
                    replaced(
                        info,
                        loaded=entry.ready and info.loaded,
                        load_ms=entry.load_ms,
                        memory_bytes=entry.memory_bytes if self._budget_bytes else 0,
                        loads_with=entry.names[0] if len(entry.infos) > 1 else "",
                        must_free_bytes=None if entry.engine is not None else must_free,
                    )
                )
        return Capabilities(
            engine=self._options.engine,
            device=self._device,
            models=tuple(infos),
            capacity=self._options.slots,
            failed=tuple(
                FailedLoad(info.name, entry.broken, entry.retry_s)
                for entry in self._entries
                if entry.broken
                for info in entry.infos
            ),
        )


def _engine(entry: _Entry) -> Supervisor:
    assert entry.engine is not None
    return entry.engine


def _entry(path: str, names: tuple[str, ...]) -> _Entry:
    size = _size_bytes(path)
    load_ms = LEAST_LOAD_MS + round(size / BYTES_PER_S * 1000)
    return _Entry(path, names, load_ms, tuple(ModelInfo(name=name) for name in names), size)


def _size_bytes(path: str) -> int:
    """The size of a model's files."""
    folder = Path(path)
    files = [folder] if folder.is_file() else [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return sum(file.stat().st_size for file in files if file.is_file())
