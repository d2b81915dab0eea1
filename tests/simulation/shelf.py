"""Engine processes of a simulated worker that loads models on demand: the real shelf, simulated
processes in place of its supervisors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.simulation.engine import SimEngine
from tests.simulation.world import Violation
from worker.core import events
from worker.engines.base import EngineOptions
from worker.process.shelf import HELD_BYTES, Shelf

if TYPE_CHECKING:
    from tests.simulation.worker import SimWorker

RESTART_S = 0.1
UNIT_BYTES = 1000
SIZES = (1, 1, 2)
"""What the models occupy, in units."""


def name_of(number: int) -> str:
    """The name of a model; the first is that of workers with a single one."""
    return "model" if number == 0 else f"model{number}"


class SimProcess:
    """Stands where a supervisor stands."""

    def __init__(self, shelf: SimShelf, names: tuple[str, ...]) -> None:
        self._shelf = shelf
        self._worker = shelf.worker
        self.names = names
        self.size = SIZES[shelf.names.index(names[0])]
        self.engine: SimEngine | None = None
        self.pipes = ()
        self._came: list[Any] = []
        self._restart_s = math.inf

    @property
    def waiting(self) -> bool:
        return bool(self._came)

    def start(self) -> None:
        self._restart_s = math.inf
        worker, fails = self._worker, self._shelf.load_fails()
        self.engine = SimEngine(worker, worker.step_s, worker.load_s, self.names, self._say, fails)
        self._shelf.check_room()

    def _say(self, engine: SimEngine, event: Any) -> None:
        if engine is self.engine:
            self._came.append(event)
            if isinstance(event, events.WorkerFailed):
                self.engine = None
                self._worker.world.note(self._worker.name, f"cannot load {self.names}")
            if isinstance(event, events.EngineReady):
                held = float(self.size * UNIT_BYTES)
                self._came.append(events.EngineMeasured({HELD_BYTES: held}))
            self._shelf.pump()

    def stop(self, *, wait: bool = True) -> None:
        if self.engine is not None:
            if self.engine.jobs and self._worker.alive:
                raise Violation(f"{self._worker.name} ends an engine that has work")
            self.engine.die()
        self.engine = None

    def die(self) -> None:
        """The process crashes."""
        if self.engine is not None:
            self._worker.deaths += 1
            self._shelf.died_alone += len(self._shelf.engines) > 1
            self.engine.die()
            self.engine = None
            self._restart_s = self._worker.world.now_s + RESTART_S
            self._came.append(events.EngineLost("killed by signal 9"))
            self._shelf.pump()

    def restart(self, reason: str, now_s: float) -> list[Any]:
        if self.engine is None or not self.engine.hung:
            raise Violation(f"{self._worker.name} restarts an engine that works")
        self._worker.deaths += 1
        self.engine.die()
        self.engine = None
        self._restart_s = now_s + RESTART_S
        return []

    def deadline_s(self) -> float:
        return self._restart_s

    def tick(self, now_s: float) -> list[Any]:
        self.start()
        return [events.EngineLoading(None, "restarting the engine")]

    def read(self, now_s: float) -> list[Any]:
        came, self._came = self._came, []
        return came

    def add(self, job_id: bytes, body: bytes, attachments: tuple[bytes, ...]) -> None:
        if self.engine is not None:
            self.engine.add(job_id, body)

    def cancel(self, job_id: bytes) -> None:
        if self.engine is not None:
            self.engine.cancel(job_id)


class SimShelf:
    """The shelf of one worker, and what the link does with it."""

    def __init__(
        self,
        worker: SimWorker,
        models: int,
        units: int,
        unload_idle_s: float,
        load_fails: Callable[[], bool],
        stall_s: float,
    ) -> None:
        """`units`: what fits at once; 0: one model. `load_fails`: whether the next load fails."""
        self.worker = worker
        self.load_fails = load_fails
        self.names = [name_of(number) for number in range(models)]
        self._units = units
        self.processes: list[SimProcess] = []
        #: Engines that ran at the same time, at most; that died while others went on.
        self.most_at_once = 0
        self.died_alone = 0
        self._pumping = False
        self._tick_at_s = math.inf
        self.shelf = Shelf(
            EngineOptions(
                engine="sim",
                model_paths=tuple(self.names),
                model_names=tuple((name,) for name in self.names),
                slots=worker.slots,
            ),
            {},
            unload_idle_s=unload_idle_s,
            memory_bytes=units * UNIT_BYTES,
            stall_s=stall_s,
            make=self._make,  # type: ignore[arg-type]
            clock=lambda: worker.world.now_s,
        )
        self.shelf.start()
        self.pump()

    def _make(self, options: EngineOptions, environment: dict[str, str]) -> SimProcess:
        self.processes.append(SimProcess(self, options.model_names[0]))
        return self.processes[-1]

    @property
    def engines(self) -> list[SimEngine]:
        """Those whose processes run."""
        return [process.engine for process in self.processes if process.engine is not None]

    def check_room(self) -> None:
        """No more may run at once than fits; a size is not known before it was measured."""
        running = [process for process in self.processes if process.engine is not None]
        self.most_at_once = max(self.most_at_once, len(running))
        ready = [p for p in running if p.engine is not None and p.engine.ready]
        known = sum(process.size for process in ready)
        if len(running) > 1 and (not self._units or known > max(self._units, SIZES[-1])):
            raise Violation(f"{self.worker.name} runs {len(running)} engines of {known} units")

    # --- the link's loop --------------------------------------------------------------------------

    def pump(self) -> None:
        """The link reads what its engines say, as soon as it runs."""
        if not self._pumping:
            self._pumping = True
            self.worker.world.after(0.0, self._pump)

    def _pump(self) -> None:
        self._pumping = False
        worker, now_s = self.worker, self.worker.world.now_s
        if not worker.alive or worker.paused:
            return
        for event in self.shelf.read(now_s):
            worker.tell(event)
        if worker.alive and self.shelf.deadline_s() <= now_s:
            for event in self.shelf.tick(now_s):
                worker.tell(event)
        if worker.alive and self.shelf.waiting:
            self.pump()
        due_s = self.shelf.deadline_s()
        if worker.alive and due_s < self._tick_at_s:
            self._tick_at_s = due_s
            worker.world.at(max(due_s, now_s), self._tick)

    def _tick(self) -> None:
        self._tick_at_s = math.inf
        self.pump()
