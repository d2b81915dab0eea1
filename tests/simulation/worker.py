"""The simulation's worker: the real core, over a simulated engine, in a simulated process."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from broker.core.events import Side
from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.messages import (
    Credit,
)
from tests.simulation.answers import Call
from tests.simulation.broker import SimBroker
from tests.simulation.engine import MODEL, SimEngine
from tests.simulation.shelf import SimShelf
from tests.simulation.sockets import Sockets
from tests.simulation.world import Party, Violation, World
from worker.core import events as worker_events
from worker.core.instructions import (
    CloseSocket,
    EngineAdd,
    EngineCancel,
    EngineLoad,
    Exit,
    OpenSocket,
    RestartEngine,
    Send as WorkerSend,
)
from worker.core.session import WorkerCore
from worker.core.settings import Settings


class SimWorker(Party):
    """A worker: link process and engine process."""

    def __init__(
        self,
        world: World,
        name: str,
        brokers: list[SimBroker],
        *,
        slots: int,
        step_s: float,
        load_s: float,
        settings: dict[str, Any],
        on_exit: Callable[[SimWorker], None],
        on_demand: tuple[int, int, float, Callable[[], bool]] | None = None,
    ) -> None:
        super().__init__(world, name)
        self._on_exit = on_exit
        self.slots = slots
        self.step_s = step_s
        self.load_s = load_s
        self.sockets = Sockets(self, Side.BACK, brokers)
        self.core = WorkerCore(
            Settings(
                name=name,
                brokers=tuple(broker.name for broker in brokers),
                models=(MODEL,) if on_demand is None else (),
                on_demand=on_demand is not None,
                instance=blake2b(f"{name} {world.now_s}".encode(), digest_size=16).digest(),
                **settings,
            ),
            world.now_s,
            random.Random(world.rng.getrandbits(64)),
        )
        self.exit: Exit | None = None
        self.deaths = 0
        #: Models that are loaded on demand; None: one that is loaded at start.
        self.shelf: SimShelf | None = None
        #: By prompt: how often it was started, tokens computed, planned failures.
        self.runs: Counter[str] = Counter()
        self.computed: Counter[str] = Counter()
        #: Split answers that were continued here, by what they were in.
        self.resumed_in: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        world.note(name, "starts")
        if on_demand is not None:
            self.shelf = SimShelf(self, *on_demand, settings["stall_s"])
        else:
            self._engine: SimEngine | None = SimEngine(self, step_s, load_s)
        self.arm()

    @property
    def engine(self) -> SimEngine:
        """The only engine."""
        assert self._engine is not None
        return self._engine

    @property
    def engines(self) -> list[SimEngine]:
        """Those whose processes run."""
        return [self.engine] if self.shelf is None else self.shelf.engines

    def woke(self, late_s: float) -> None:
        if self.shelf is not None:
            # As the link's loop does, before its timers.
            self._inbox.extend(self.shelf.shelf.read(self.world.now_s))
            self.shelf.pump()

    def tick_event(self) -> Any:
        return worker_events.Tick()

    def carry_out(self, instruction: Any) -> None:
        match instruction:
            case WorkerSend(broker, frames):
                self.sockets.send(broker, frames)
            case OpenSocket(broker):
                self.sockets.open(broker)
            case CloseSocket(broker):
                self.sockets.close(broker)
            case EngineAdd(job_id, body, attachments) if self.shelf is not None:
                self.shelf.shelf.add(job_id, body, attachments)
                self.shelf.pump()
            case EngineCancel(job_id) if self.shelf is not None:
                self.shelf.shelf.cancel(job_id)
            case EngineLoad(model, gives_way) if self.shelf is not None:
                self.shelf.shelf.load(model, gives_way)
                self.shelf.pump()
            case RestartEngine(reason) if self.shelf is not None:
                for event in self.shelf.shelf.restart(reason, self.world.now_s):
                    self._inbox.append(event)
                self.shelf.pump()
            case EngineAdd(job_id, body):
                self.engine.add(job_id, body)
            case EngineCancel(job_id):
                self.engine.cancel(job_id)
            case RestartEngine():
                if not self.engine.hung:
                    raise Violation(f"{self.name} restarts an engine that works")
                self._new_engine()
            case Exit():
                self.exit = instruction
                self.alive = False
                self._end_engines()
                self.sockets.cut_all()
                self.world.note(self.name, f"exits {instruction.code} {instruction.message}")
                self._on_exit(self)

    def _new_engine(self) -> None:
        self.deaths += 1
        self.engine.die()
        self._engine = SimEngine(self, self.step_s, self.load_s)

    def _end_engines(self) -> None:
        for engine in self.engines:
            engine.die()

    def engine_dies(self, dying: SimEngine | None = None, index: int = 0) -> None:
        """An engine process crashes, this one or by its number; the supervisor starts another."""
        if self.shelf is not None:
            running = [p for p in self.shelf.processes if p.engine is not None]
            if self.alive and running:
                named = [p for p in running if p.engine is dying]
                process = (named or running)[index % len(named or running)]
                self.world.note(self.name, f"loses the engine of {process.names}")
                process.die()
            return
        if self.alive and self.engine.ready and self.engine.alive:
            self.world.note(self.name, "loses its engine")
            self.engine.die()
            self.tell(worker_events.EngineLost("killed by signal 9"))

    def handle(self, event: Any) -> None:
        if isinstance(event, worker_events.EngineLost) and self.shelf is None:
            self._new_engine()  # the supervisor, part of this process, has noticed only now
        super().handle(event)

    def repeat_credit(self) -> None:
        """Repeat, late, an old grant."""
        for connection in self.core._connections:
            if self.alive and not self.paused and connection.open:
                credit = Credit(granted=self.world.rng.randint(0, connection.credit.announced))
                frames = connection.message(
                    MessageType.CREDIT, connection.session, credit, self.world.now_s
                )
                self.sockets.send(connection.index, frames)

    def engine_hangs(self, index: int = 0) -> None:
        if self.shelf is not None:
            ready = [engine for engine in self.engines if engine.ready]
            if self.alive and ready:
                hung = ready[index % len(ready)]
                self.world.note(self.name, f"has an engine that hangs: {hung.names}")
                hung.hung = True
            return
        if self.alive and self.engine.ready:
            self.world.note(self.name, "has an engine that hangs")
            self.engine.hung = True

    def say_odd_things(self) -> None:
        """Send events that a client must not accept: repeated, too early, of an earlier epoch."""
        streams = [s for s in self.core._requests.streams.values() if s.route and s.sent]
        for stream in streams if self.alive and not self.paused else ():
            route, connection = stream.route, stream.route.connection
            if connection.blocked or not stream.token_ids:
                continue
            last = stream.sent - 1
            event = self.world.rng.choice(
                (
                    (stream.epoch, last, stream.token_ids[last : last + 1], "repeated "),
                    (stream.epoch, stream.sent + 3, [1], "too early "),
                    (0, stream.sent, [1], "of long ago "),
                )
            )
            if event[0] == stream.epoch and event[1] == stream.sent:
                continue  # there is no epoch before the first
            body = codec.pack([[0, stream.request_id, *event]])
            frames = (connection.seal(route.plain, self.world.now_s), body)
            self.sockets.send(connection.index, frames)

    def forge(self, calls: list[tuple[Call, int]], guess: Callable[[SimWorker, int], int]) -> int:
        """Write into requests that run elsewhere, each with its epoch, over this worker's routes;
        returns how many events were sent."""
        forged = 0
        routes = {s.route for s in self.core._requests.streams.values() if s.route is not None}
        for route in sorted(routes, key=lambda route: route.plain):
            for call, epoch in calls:
                if call.request_id in self.core._requests.streams or route.connection.blocked:
                    continue
                at = len(call.token_ids)
                event = [0, call.request_id, guess(self, epoch), at, [666], "EVIL "]
                head = route.connection.seal(route.plain, self.world.now_s)
                self.sockets.send(route.connection.index, (head, codec.pack([event])))
                forged += 1
        return forged

    def kill(self) -> None:
        """kill -9 of the link; the engine follows."""
        if self.alive:
            self.world.note(self.name, "is killed")
            self.alive = False
            self.deaths += 1
            self._end_engines()
            self.sockets.cut_all()
            self._on_exit(self)
