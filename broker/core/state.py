"""The tables of the broker, and the basic operations on them that every rule needs.

Contains no rules: those are in the modules that `controller.py` lists.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final, Literal

from broker.core import placement
from broker.core.events import AccessChanged, Side
from broker.core.figures import Figures
from broker.core.instructions import Instruction, Log, Send
from broker.core.phases import Phase
from broker.core.queue import ModelQueue
from broker.core.records import (
    ClientSession,
    LoadFailure,
    RequestState,
    Route,
    Session,
    WorkerSession,
    short,
)
from broker.core.registry import Registry
from broker.core.settings import CoreSettings
from broker.core.shares import Shares
from broker.core.speed import Accuracy, ModelSpeed
from broker.protocol import codec
from broker.protocol.errors import ErrorCode, ErrorInfo
from broker.protocol.header import MessageType
from broker.protocol.messages import Interrupted, OutputEvent

EMPTY_MAP: Final = codec.pack({})

MAX_SHARED: Final = 256
"""Models whose users' shares are remembered, besides those that have requests waiting."""

Level = Literal["debug", "info", "warning"]


class BusState:
    """All state of the broker. Changed only by `broker.core`, on one thread."""

    def __init__(
        self,
        settings: CoreSettings,
        *,
        generator: random.Random | None = None,
        access: AccessChanged | None = None,
        now_s: float = 0.0,
        software: str = "tokenbus",
    ) -> None:
        """`access`: keys that may connect; None if CURVE is off and everybody may, as an operator
        too. `now_s`: start time, on the same monotonic clock as `handle`. `software`: name and
        version, for WELCOME and `bus.version`."""
        self.settings = settings
        self.software = software
        self.generator = generator or random.SystemRandom()
        self.access = access
        self.started_s = now_s
        #: Time of the event being handled.
        self.now_s = now_s
        #: Sessions by routing id.
        self.clients: dict[bytes, ClientSession] = {}
        self.workers: dict[bytes, WorkerSession] = {}
        self.registry = Registry()
        #: Names of workers that an operator holds; they survive the workers' sessions.
        self.held: set[str] = set()
        #: Workers shared with other brokers, by routing id.
        self.shared: dict[bytes, WorkerSession] = {}
        #: Models that workers could not load, by model and name of the worker.
        self.failed_loads: dict[str, dict[str, LoadFailure]] = {}
        #: Workers that load models on demand, by routing id.
        self.swappers: dict[bytes, WorkerSession] = {}
        #: Every request known, by id, in whatever phase.
        self.requests: dict[bytes, RequestState] = {}
        #: Waiting requests by model; an empty queue is dropped.
        self.queues: dict[str, ModelQueue] = {}
        self.queued_bytes = 0
        #: What users were served, by model.
        self.shares: dict[str, Shares] = {}
        #: By route id.
        self.routes: dict[bytes, Route] = {}
        #: Routes whose bodies need not be read, by the first 24 bytes of an OUTPUT header.
        self.fast_routes: dict[bytes, Route] = {}
        #: ENDED and INTERRUPTED requests with the time to forget them, oldest first.
        self.kept: deque[tuple[float, RequestState]] = deque()
        #: The latest requests that are over, for the operator.
        self.history: deque[RequestState] = deque(maxlen=256)
        #: Smoothed time from ASSIGN to the free slot, seconds, by model.
        self.service_s: dict[str, float] = {}
        self.counters: Counter[str] = Counter()
        #: Number of reports about workers' output in the current minute, by the client's
        #: key or name.
        self.reports: Counter[str] = Counter()
        self.reports_until_s = -math.inf
        #: Measured speed and length of answers, by model.
        self.speeds: dict[str, ModelSpeed] = {}
        #: Requests that were moved and have not come back yet: model, and until when they are
        #: expected, by id.
        self.moved: dict[bytes, tuple[str, float]] = {}
        #: Running requests by priority and id, to find one that gives way; entries of requests that
        #: run no more stay until the next look.
        self.by_priority: dict[int, dict[bytes, RequestState]] = {}
        self.by_priority_count = self.by_priority_tidied = 0
        #: Slots that streams were told to leave: worker, until when they should be free, and the
        #: worker's `granted` that says so, by the id of the request.
        self.freeing: dict[bytes, tuple[WorkerSession, float, int]] = {}
        #: What was said of the models' waits, and what came of it.
        self.accuracy: dict[str, Accuracy] = {}
        #: Models whose waiting requests hear of their places.
        self.telling: set[str] = set()
        #: Until when somebody (`bus.expect`) will start workers of a model where requests wait.
        self.expected: dict[str, float] = {}
        #: Why nothing serves a model yet, in words, and until when that counts, by model.
        self.notes: dict[str, tuple[str, float]] = {}
        #: No look for somebody who gives way before this time, by the model that waits.
        self.preempt_from_s: dict[str, float] = {}
        #: Statistics by model.
        self.figures = Figures()
        #: Counters of the loop around the core; shown by bus.stats, never used in decisions.
        self.loop_figures: dict[str, float] = {}
        #: When a shutdown in progress gives up waiting; None: no shutdown.
        self.shutdown_until_s: float | None = None
        self.stopped = False
        #: None: `finish` decides.
        self.policy = placement.POLICIES.get(settings.placement)
        self.timers: list[tuple[float, int, Callable[[Any, Any], None], Any]] = []
        self.numbers = itertools.count(1)
        #: Queued requests that run alone next, by model and id.
        self.suspects: dict[str, dict[bytes, RequestState]] = {}
        #: Models whose queue or workers changed during this event.
        self.dirty: set[str] = set()
        self.out: list[Instruction] = []
        #: Takes every instruction as it is given, in order. A loop that carries it out at once sets
        #: this, and a message leaves before the rest of its event is worked out; otherwise `handle`
        #: returns them all.
        self.instruct: Callable[[Instruction], None] = self._collect
        self.read_until_s = {Side.FRONT: math.inf, Side.BACK: math.inf}
        self.probe_at_s = -math.inf

    def _collect(self, instruction: Instruction) -> None:
        self.out.append(instruction)

    def at(self, due_s: float, act: Callable[[Any, Any], None], about: Any) -> None:
        """Call `act(bus, about)` at `due_s`. It must check whether there is still
        something to do."""
        heapq.heappush(self.timers, (due_s, next(self.numbers), act, about))

    def run_timers(self) -> None:
        while self.timers and self.timers[0][0] <= self.now_s:
            _, _, act, about = heapq.heappop(self.timers)
            act(self, about)

    def send(
        self,
        session: Session,
        type_: MessageType,
        id_: bytes,
        *frames: bytes,
        last: bool = False,
    ) -> None:
        """Send the next message of a session."""
        head = session.header(type_, id_, self.now_s)
        self.instruct(Send(session.side, session.routing_id, (head, *frames), last))

    def send_events(self, client: ClientSession, *events: OutputEvent) -> None:
        """Send an OUTPUT with the broker's own events."""
        body = codec.encode_events(list(events))
        self.send(client, MessageType.OUTPUT, client.id, body)

    def shares_of(self, model: str) -> Shares:
        """What users of a model were served."""
        shares = self.shares.get(model)
        if shares is None:
            if len(self.shares) >= MAX_SHARED:
                idle = (name for name in self.shares if name not in self.queues)
                self.shares.pop(next(idle, ""), None)
            shares = self.shares[model] = Shares()
        return shares

    def count_failure(self, error: ErrorInfo) -> None:
        """Count a FAIL by its code; unknown codes share one counter."""
        known = error.code in ErrorCode.__members__.values()
        self.counters[f"failed_{error.code if known else 'other'}"] += 1

    def new_id(self) -> bytes:
        """A fresh id of 16 bytes, the first not zero."""
        value = self.generator.getrandbits(128)
        return (value | 1 << 120 if value >> 120 == 0 else value).to_bytes(16, "big")

    def log(self, level: Level, event: str, session: Session, **fields: Any) -> None:
        """A line about a session."""
        about = {"peer": session.name, "session": short(session.id), **fields}
        self.instruct(Log(level, event, about))

    def log_request(
        self,
        level: Level,
        event: str,
        request: RequestState,
        worker: WorkerSession | None = None,
        **fields: Any,
    ) -> None:
        """A line about a request."""
        about = {"request": short(request.id), "model": request.model}
        if worker is not None:
            about["worker"] = worker.name
        self.instruct(Log(level, f"request {event}", about | fields))

    def route_to(self, worker: WorkerSession, client: ClientSession) -> Route:
        route = worker.routes.get(client.id)
        if route is None:
            route = Route(self.new_id(), worker, client)
            worker.routes[client.id] = client.routes[worker.id] = route
            self.routes[route.id] = self.fast_routes[route.key] = route
        return route

    def divert(self, route: Route, request: RequestState) -> None:
        """From now on no event of this request may pass this route: its bodies are read."""
        route.moved.add(request.id)
        request.diverted.append(route)
        self.fast_routes.pop(route.key, None)

    def note_running(self, request: RequestState) -> None:
        """It runs now: it may have to give way to a higher priority."""
        self.by_priority.setdefault(request.priority, {})[request.id] = request
        self.by_priority_count += 1
        if self.by_priority_count > 2 * self.by_priority_tidied + 256:
            for priority in list(self.by_priority):
                self._tidy(priority)
            self.by_priority_count = sum(map(len, self.by_priority.values()))
            self.by_priority_tidied = self.by_priority_count

    def _tidy(self, priority: int) -> dict[bytes, RequestState]:
        """The requests of a priority that still run."""
        noted = self.by_priority.get(priority, {})
        running = {
            id_: request
            for id_, request in noted.items()
            if request.phase is Phase.RUNNING and request.priority == priority
        }
        if running:
            self.by_priority[priority] = running
        else:
            self.by_priority.pop(priority, None)
        return running

    def lowest_running(self) -> int | None:
        """The lowest priority of any running request."""
        while self.by_priority:
            lowest = min(self.by_priority)
            noted = self.by_priority[lowest].values()
            if any(request.phase is Phase.RUNNING for request in noted) or self._tidy(lowest):
                return lowest
        return None

    def running_below(self, priority: int) -> list[RequestState]:
        """All running requests of lower priorities, the lowest first."""
        lower = sorted(other for other in self.by_priority if other < priority)
        return [request for other in lower for request in self._tidy(other).values()]

    def on_their_way(self, model: str) -> int:
        """Number of requests for this model that were moved and will be back in a moment."""
        late = [id_ for id_, (_, until_s) in self.moved.items() if until_s <= self.now_s]
        for id_ in late:
            del self.moved[id_]
        return sum(name == model for name, _ in self.moved.values())

    def end_diversions(self, request: RequestState) -> None:
        """The request is over: bodies on routes that it left need not be read for it any more."""
        for route in request.diverted:
            route.moved.discard(request.id)
            if not route.moved and self.routes.get(route.id) is route:
                self.fast_routes[route.key] = route
        request.diverted = []

    def remove_route(self, route: Route) -> None:
        del self.routes[route.id]
        self.fast_routes.pop(route.key, None)
        del route.worker.routes[route.client.id]
        del route.client.routes[route.worker.id]

    def release(self, request: RequestState) -> None:
        """Take a request out of its queue, from its worker and from its client."""
        if request.phase is Phase.QUEUED:
            queue = self.queues[request.model]
            queue.remove(request)
            self.queued_bytes -= request.size_bytes
            request.frames = ()
            if not queue.requests:
                del self.queues[request.model]
                self.dirty.add(request.model)
        self.end_diversions(request)
        if request.alone:
            self.unsuspect(request)
        if request.worker is not None:
            if request.worker.running.pop(request.id, None) is not None:
                self.dirty.add(request.model)
            request.worker.ended.pop(request.id, None)
            request.worker = None
        if request.client is not None:
            request.client.requests.pop(request.id, None)

    def unsuspect(self, request: RequestState) -> None:
        """The request need not run alone any more, or is over."""
        request.alone = False
        suspects = self.suspects.get(request.model)
        if suspects is not None:
            suspects.pop(request.id, None)
            if not suspects:
                del self.suspects[request.model]
        self.free_cell(request)

    def free_cell(self, request: RequestState) -> None:
        """The worker that was reserved for it may take other requests again."""
        cell, request.cell = request.cell, None
        if cell is not None and cell.alone is request:
            cell.alone = None
            self.dirty.update(cell.models, self.suspects)

    def keep(self, request: RequestState) -> None:
        """Remember a request that is over for a RESUME, bounded in time and number."""
        self.requests[request.id] = request
        if request.ended_s is None:
            request.ended_s = self.now_s
            self.history.append(request)
        request.keep_until_s = self.now_s + self.settings.ended_keep_s
        if not self.kept:
            self.at(request.keep_until_s, BusState._forget_kept, None)
        self.kept.append((request.keep_until_s, request))
        while len(self.kept) > self.settings.ended_keep:
            self._forget_if_over(*self.kept.popleft())

    def forget(self, request: RequestState) -> None:
        """Drop everything about this request except its entry in the history."""
        if self.requests.get(request.id) is request:
            del self.requests[request.id]
        request.client = None
        request.to(Phase.FORGOTTEN, self.now_s)
        if request.ended_s is None:
            request.ended_s = self.now_s
            self.history.append(request)

    def _forget_kept(self, _: None) -> None:
        while self.kept and self.kept[0][0] <= self.now_s:
            self._forget_if_over(*self.kept.popleft())
        if self.kept:
            self.at(self.kept[0][0], BusState._forget_kept, None)

    def _forget_if_over(self, until_s: float, request: RequestState) -> None:
        # If it was kept again since, it has a later entry in the line too.
        current = request.keep_until_s == until_s
        if not current or request.phase not in (Phase.ENDED, Phase.INTERRUPTED):
            return
        if request.end_held and request.client is not None:
            # It is unknown whether its end was read. A client that has the END ignores this; one
            # that still waits will resume.
            error = ErrorInfo(
                code=ErrorCode.WORKER_LOST,
                message="the end of the answer was not read in time; resume the request",
                retryable=True,
            )
            body = Interrupted(
                epoch=request.epoch, worker=request.worker_name, lost=False, error=error
            )
            if self.clients.get(request.client.routing_id) is request.client:
                client = request.client
                self.send(client, MessageType.INTERRUPTED, request.id, codec.encode(body))
        self.release(request)
        self.forget(request)

    def session(self, side: Side, routing_id: bytes) -> Session | None:
        """The session of a connection."""
        return (self.clients if side is Side.FRONT else self.workers).get(routing_id)
