"""The registry of workers: which models they serve, how much credit is left, who may take work.

State and look-ups only; the controller changes it through the few methods here, so that the index
by model is always that of the sessions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from broker.core.events import Side
from broker.core.sessions import ClientSession, Session
from broker.protocol.header import MessageType, prefix
from broker.protocol.messages import Heartbeat, Hello, ModelInfo, WorkerState

if TYPE_CHECKING:
    from broker.core.requests import RequestState


class Route:
    """The way of OUTPUT from one worker session to one client session.

    `reply_to` of ASSIGN names it; a worker sends everything for one client in one message. The
    client knows it from ACCEPTED and takes a request's events from no other.
    """

    __slots__ = ("client", "id", "key", "moved", "worker")

    def __init__(self, route_id: bytes, worker: WorkerSession, client: ClientSession) -> None:
        self.id = route_id
        self.worker = worker
        self.client = client
        #: The first 24 octets of an OUTPUT header of this route without flags, both from the worker
        #: and to the client.
        self.key = prefix(MessageType.OUTPUT, route_id)
        #: Requests that another session took over while this one lives: their events, already
        #: under way, must not arrive here. While it is not empty, bodies of the route are read.
        self.moved: set[bytes] = set()


class WorkerSession(Session):
    """A worker, as far as the broker may know it."""

    __slots__ = (
        "alone",
        "assigned",
        "beat",
        "capacity",
        "device",
        "drain_until_s",
        "draining",
        "ended",
        "engine",
        "granted",
        "held",
        "instance",
        "last_assigned",
        "models",
        "recalled",
        "returned",
        "routes",
        "running",
        "shared",
        "speed",
        "stalled",
        "state",
        "waiting_told",
    )

    def __init__(
        self,
        routing_id: bytes,
        session_id: bytes,
        hello: Hello,
        key: str,
        interval_s: float,
        liveness: int,
        now_s: float,
    ) -> None:
        super().__init__(
            Side.BACK,
            routing_id,
            session_id,
            hello.name,
            hello.software,
            key,
            interval_s,
            liveness,
            now_s,
        )
        self.models: dict[str, ModelInfo] = {model.name: model for model in hello.models}
        #: Requests that run at once, by the worker's own word.
        self.capacity = hello.capacity
        self.speed = hello.speed
        self.engine = hello.engine
        self.device = hello.device
        #: The process; None: it does not say.
        self.instance = hello.instance
        #: None until it says so. Never a reason to assign: only credit is.
        self.state: WorkerState | None = None
        self.beat = Heartbeat()
        #: Cumulative; never falls (SPEC.md section 7).
        self.granted = 0
        #: ASSIGNs that spent credit, of this session.
        self.assigned = 0
        #: Credit that was given back unspent; with `assigned` at most `granted`. And what was asked
        #: back so far. Both cumulative.
        self.returned = 0
        self.recalled = 0
        #: It serves other brokers from the same slots, so it is told what waits here for it.
        self.shared = hello.brokers > 1
        #: What it was told, less what it got since.
        self.waiting_told = 0
        #: A drain was ordered or announced: nothing more is assigned.
        self.draining = False
        #: An operator holds it: nothing more is assigned until it is released.
        self.held = False
        #: When the broker ends an ordered drain itself.
        self.drain_until_s = math.inf
        #: The engine makes no progress: nothing more is assigned until it does.
        self.stalled = False
        #: The suspected request for which it is kept, or that it runs: it gets nothing else.
        self.alone: RequestState | None = None
        #: Requests that it has and has not finished, by id.
        self.running: dict[bytes, RequestState] = {}
        #: Requests that it finished and still keeps, by id.
        self.ended: dict[bytes, RequestState] = {}
        #: By session id of the client.
        self.routes: dict[bytes, Route] = {}
        #: Number of the last assignment of the whole broker that went here.
        self.last_assigned = 0

    @property
    def free(self) -> int:
        """Slots that may be assigned: credit left of a worker that is fit to take work."""
        return self.unspent if self.fit and self.alone is None else 0

    @property
    def fit(self) -> bool:
        """It may be given work, if it has credit."""
        idle = self.draining or self.held or self.stalled
        return not (idle or self.state is WorkerState.LOADING)

    def may_take(self, model: str) -> bool:
        """A request of this model may be assigned."""
        # As `free`, written out: of a thousand workers, this is most of a placement.
        if self.granted <= self.assigned + self.returned:
            return False
        if self.draining or self.held or self.stalled or self.alone is not None:
            return False
        if self.state is WorkerState.LOADING:
            return False
        most = self.models[model].capacity
        return most is None or most > sum(r.model == model for r in self.running.values())

    @property
    def via(self) -> list[str]:
        """Brokers behind a worker that is a broker itself."""
        named = (info.details.get("via") for info in self.models.values())
        lists = (names for names in named if isinstance(names, list))
        return sorted({name for names in lists for name in names if isinstance(name, str)})

    @property
    def unspent(self) -> int:
        """Credit left, whether it may be spent now or not."""
        return self.granted - self.assigned - self.returned

    @property
    def state_name(self) -> str:
        """For people: the worst of what is known."""
        if self.draining:
            return WorkerState.DRAINING.value
        if self.held:
            return "held"
        if self.stalled:
            return "stalled"
        if self.state is not None:
            return self.state.value
        return WorkerState.READY.value if self.granted else "unknown"


class Registry:
    """All worker sessions, by routing id and by model."""

    def __init__(self) -> None:
        self._by_model: dict[str, dict[bytes, WorkerSession]] = {}
        #: When the last worker of a model that nobody serves any more went.
        self._gone_s: dict[str, float] = {}

    def add(self, worker: WorkerSession) -> None:
        """Index a worker by its models."""
        for name in worker.models:
            self._by_model.setdefault(name, {})[worker.id] = worker
            self._gone_s.pop(name, None)

    def remove(self, worker: WorkerSession, now_s: float) -> None:
        """Take a worker out of the index."""
        for name in worker.models:
            serving = self._by_model.get(name)
            if serving is None:
                continue
            serving.pop(worker.id, None)
            if not serving:
                del self._by_model[name]
                self._gone_s[name] = now_s

    def change_models(
        self, worker: WorkerSession, models: Iterable[ModelInfo], now_s: float
    ) -> None:
        """The worker said anew what it serves."""
        old = worker.models
        new = {model.name: model for model in models}
        worker.models = {name: info for name, info in old.items() if name not in new}
        self.remove(worker, now_s)
        worker.models = new
        self.add(worker)

    def forget_gone(self, model: str) -> None:
        """Drop the memory of a model that nobody serves any more."""
        self._gone_s.pop(model, None)

    def gone_s(self, model: str) -> float | None:
        """When the last worker of the model went; None: never seen, forgotten, or served."""
        return self._gone_s.get(model)

    def serving(self, model: str) -> dict[bytes, WorkerSession]:
        """Workers of a model in whatever state, by session id."""
        return self._by_model.get(model, {})

    def available(self, model: str) -> list[WorkerSession]:
        """Workers of a model that may take a request now."""
        return [worker for worker in self.serving(model).values() if worker.may_take(model)]

    def models(self) -> Iterator[str]:
        """Names of all models served, in whatever state their workers are."""
        return iter(self._by_model)
