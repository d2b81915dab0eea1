"""What the broker knows of one request, session or route. These records refer to each other, so
they stand in one module.

State only: `phases` says how a request may move, `state` holds the tables of all records. Changed
by `broker.core` alone.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from broker.core.events import Side
from broker.core.phases import MOVES, IllegalMoveError, Move, Phase
from broker.protocol.header import MessageType, prefix, seal
from broker.protocol.liveness import Liveness
from broker.protocol.messages import Heartbeat, Hello, ModelInfo, WorkerState

SOURCES: Final = 2048
"""Latest messages to a client of which it is known who made them: more than wait in its socket."""
STORY_MOVES: Final = 16
"""Latest moves of a request that its story tells."""


class Session(Liveness):
    """What sessions of clients and of workers have in common."""

    __slots__ = (
        "expected",
        "id",
        "key",
        "name",
        "routing_id",
        "sequence",
        "side",
        "since_s",
        "software",
    )

    def __init__(
        self,
        side: Side,
        routing_id: bytes,
        session_id: bytes,
        name: str,
        software: str,
        key: str,
        interval_s: float,
        liveness: int,
        now_s: float,
    ) -> None:
        super().__init__(interval_s, liveness, now_s)
        self.side = side
        #: Names the connection; secret between the broker and this peer.
        self.routing_id = routing_id
        #: Header id of the session's own messages.
        self.id = session_id
        self.name = name
        self.software = software
        #: Z85 public key of the peer; empty without CURVE.
        self.key = key
        self.since_s = now_s
        #: Sequence number of the peer's next message; HELLO was 0.
        self.expected = 1
        #: Sequence number of the broker's next message.
        self.sequence = 0

    def header(self, type_: MessageType, id_: bytes, now_s: float) -> bytes:
        """The header of the next message to this peer. It must be sent, in this order."""
        sequence = self.sequence
        self.sequence = sequence + 1
        self.sent(now_s)
        return seal(prefix(type_, id_), sequence)


class ClientSession(Session):
    """A client (a gateway is one too)."""

    __slots__ = ("operator", "requests", "routes", "sources")

    def __init__(
        self,
        routing_id: bytes,
        session_id: bytes,
        name: str,
        software: str,
        key: str,
        interval_s: float,
        liveness: int,
        now_s: float,
    ) -> None:
        super().__init__(
            Side.FRONT, routing_id, session_id, name, software, key, interval_s, liveness, now_s
        )
        #: May use the operator's verbs.
        self.operator = False
        #: Queued or running requests by id: its length is what the in-flight limit bounds.
        self.requests: dict[bytes, RequestState] = {}
        #: By session id of the worker.
        self.routes: dict[bytes, Route] = {}
        #: Who made the latest messages to it, the last one last; None: the broker itself.
        self.sources: deque[WorkerSession | None] = deque(maxlen=SOURCES)

    def header(self, type_: MessageType, id_: bytes, now_s: float) -> bytes:
        """As of any session; the broker itself makes the message."""
        self.sources.append(None)
        return super().header(type_, id_, now_s)

    def source(self, sequence: int) -> WorkerSession | None:
        """The worker that made the message of that number; None: none, or it is too long ago."""
        index = sequence - (self.sequence - len(self.sources))
        return self.sources[index] if 0 <= index < len(self.sources) else None


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
        #: The first 24 bytes of an OUTPUT header of this route without flags, both from the worker
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
        "moving",
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
        #: Requests that were taken from it and whose former run it has not yet reported as over.
        self.moving: set[bytes] = set()
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


class RequestState:
    """One request. The body is held only while it is queued."""

    __slots__ = (
        "_phase",
        "admitted",
        "alone",
        "assigned_s",
        "cancelled",
        "cause",
        "cell",
        "client",
        "deaths",
        "diverted",
        "end_held",
        "ended_s",
        "epoch",
        "epoch_before",
        "frames",
        "holder",
        "id",
        "keep_until_s",
        "kind",
        "lost_alone",
        "lost_workers",
        "model",
        "moves",
        "offset",
        "order",
        "orphan_until_s",
        "outcome",
        "prefix_key",
        "priority",
        "queue_until_s",
        "queued_s",
        "returned",
        "size_bytes",
        "started_s",
        "suspect_until_s",
        "ttl_until_s",
        "user_key",
        "window",
        "window_told",
        "worker",
        "worker_name",
    )

    def __init__(self, request_id: bytes, model: str, now_s: float) -> None:
        self.id = request_id
        self.model = model
        self.kind = ""
        self._phase = Phase.NEW
        #: The latest moves, the last one last.
        self.moves: tuple[Move, ...] = ()
        #: Who gets its output; None: an orphan (its client vanished, or a worker brought it along).
        self.client: ClientSession | None = None
        #: Where it runs or ended; None while it is queued.
        self.worker: WorkerSession | None = None
        #: Outlives the worker's session, for the operator's list.
        self.worker_name = ""
        self.epoch = 0
        #: The one before, if the same worker was told of both: it may know only that.
        self.epoch_before: int | None = None
        #: Tokens that the client already has (RESUME).
        self.offset = 0
        #: Whose turn it takes in the queue.
        self.user_key = ""
        self.priority = 0
        #: Age: lower came earlier. Kept when the request is resumed.
        self.order = 0
        #: Body and attachments as the client sent them; empty once assigned.
        self.frames: tuple[bytes, ...] = ()
        self.size_bytes = 0
        #: It was let in before (it waited here, or a worker had it): only memory can refuse it now.
        self.admitted = False
        #: Highest window told by the client.
        self.window = 0
        #: The window that stands in the body; where it moved meanwhile, WINDOW follows ASSIGN.
        self.window_told = 0
        #: Workers that were lost while they ran it, as often, less those that came back with it.
        self.lost_workers: tuple[str, ...] = ()
        #: Those of them that ran nothing else.
        self.lost_alone: tuple[str, ...] = ()
        #: How many of the lost workers are surely dead: they said so.
        self.deaths = 0
        #: Lost workers that came back with it, as often, of which the client was not told yet.
        self.returned: tuple[str, ...] = ()
        #: It is suspected and waits so long for lost workers to come back; None: it does not.
        self.suspect_until_s: float | None = None
        #: It is suspected: it runs alone next, or does so now.
        self.alone = False
        #: The worker that is kept for it alone.
        self.cell: WorkerSession | None = None
        #: The worker that ran it last and may still have it, by the client's word; empty: none.
        self.holder = ""
        #: Of the affinity placement: equal for prompts that start alike.
        self.prefix_key = b""
        #: CANCEL was passed on to the worker.
        self.cancelled = False
        self.outcome = ""
        #: Why it failed, for the operator's list.
        self.cause = ""
        #: It left its slot, but its END waits at the worker until the client's window opens.
        self.end_held = False
        #: Routes of earlier owners on which its events are held back.
        self.diverted: list[Route] = []
        self.queued_s = now_s
        self.queue_until_s = math.inf
        self.ttl_until_s = math.inf
        self.orphan_until_s = math.inf
        #: When a request that is over is forgotten; moved on while somebody still reads its end.
        self.keep_until_s = -math.inf
        self.assigned_s: float | None = None
        self.started_s: float | None = None
        self.ended_s: float | None = None

    @property
    def phase(self) -> Phase:
        """Where it is; `to` changes it."""
        return self._phase

    def to(self, phase: Phase, now_s: float) -> None:
        """Go to another phase. Raises IllegalMoveError, and stays, where `MOVES` forbids it."""
        if phase not in MOVES[self._phase]:
            raise IllegalMoveError(
                f"{self.story()}; from {self._phase.value} it may not go to {phase.value}"
            )
        self._phase = phase
        move = (now_s, phase, self.epoch, self.worker_name)
        self.moves = (*self.moves[1 - STORY_MOVES :], move)

    def story(self) -> str:
        """What happened to it, for whoever looks for a bug: its latest moves, with their times on
        the broker's clock."""
        moves = ", ".join(
            f"{phase.value} at {at_s:.3f} s (epoch {epoch}"
            + (f", worker {worker})" if worker else ")")
            for at_s, phase, epoch, worker in self.moves
        )
        return f"request {short(self.id)}: {moves or self._phase.value}"


def short(id_: bytes) -> str:
    """As much of an id as people may see: knowing all of it is the right to the stream."""
    return id_[:4].hex()
