"""Records of one request, session or route. They refer to each other, so they share a module.

State only: `phases` defines how a request may move, `state` holds the tables of all records. Only
`broker.core` changes them.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final

from broker.core.events import Side
from broker.core.phases import MOVES, IllegalMoveError, Move, Phase
from broker.core.resume_pace import ResumePace
from broker.core.speed import Speed
from broker.protocol.header import MessageType, encode, prefix
from broker.protocol.liveness import Liveness
from broker.protocol.messages import Continuation, Heartbeat, Hello, ModelInfo, WorkerState

SOURCES: Final = 2048
"""How many of the latest messages to a client have a recorded source: more than can wait
in its socket."""
STORY_MOVES: Final = 16
"""How many of the latest moves a request's story contains."""


class Session(Liveness):
    """Common base of client and worker sessions."""

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
        return encode(type_, id_, sequence)


class ClientSession(Session):
    """A client (a gateway is a client too)."""

    __slots__ = ("hears_waits", "operator", "requests", "routes", "sources")

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
        #: Whether it wants to hear of its waiting requests again.
        self.hears_waits = False
        #: Whether it may use the operator's verbs.
        self.operator = False
        #: Queued or running requests by id; the in-flight limit bounds their number.
        self.requests: dict[bytes, RequestState] = {}
        #: By session id of the worker.
        self.routes: dict[bytes, Route] = {}
        #: Sources of the latest messages to it, latest last; None is the broker itself.
        self.sources: deque[WorkerSession | None] = deque(maxlen=SOURCES)

    def header(self, type_: MessageType, id_: bytes, now_s: float) -> bytes:
        """The header of the next message, which the broker itself makes."""
        self.sources.append(None)
        return super().header(type_, id_, now_s)

    def source(self, sequence: int) -> WorkerSession | None:
        """The worker that made the message with that number; None if the broker did, or if it is
        too long ago."""
        index = sequence - (self.sequence - len(self.sources))
        return self.sources[index] if 0 <= index < len(self.sources) else None


class Route:
    """The route of OUTPUT from one worker session to one client session.

    `reply_to` of ASSIGN names it; a worker sends everything for one client in one message. The
    client knows it from ACCEPTED and accepts a request's events from no other.
    """

    __slots__ = ("client", "id", "key", "moved", "worker")

    def __init__(self, route_id: bytes, worker: WorkerSession, client: ClientSession) -> None:
        self.id = route_id
        self.worker = worker
        self.client = client
        #: The first 24 bytes of an OUTPUT header on this route without flags, the same from the
        #: worker and to the client.
        self.key = prefix(MessageType.OUTPUT, route_id)
        #: Requests that another session took over while this one lives: events already on the way
        #: must not arrive here. While this is not empty, bodies on this route are read.
        self.moved: set[bytes] = set()


@dataclass(slots=True)
class Swap:
    """A worker is to load a model, once what runs of those that give way has ended; an empty name:
    to unload those."""

    model: str
    since_s: float
    #: Loaded models that are unloaded for it; nothing is assigned to them any more.
    gives_way: frozenset[str]
    #: How long what runs of them may take before it is moved away.
    patience_s: float
    asked_s: float = -math.inf
    told: float = -1.0


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """A worker's failure to load a model. See `failed_loads`."""

    cause: str
    #: When the worker offers the model again; infinity: not by itself.
    until_s: float
    #: The worker has left since.
    left: bool = False


class WorkerSession(Session):
    """A worker, as the broker sees it."""

    __slots__ = (
        "alone",
        "assigned",
        "beat",
        "capacity",
        "closing",
        "device",
        "drain_until_s",
        "draining",
        "end_drained_s",
        "end_said_s",
        "end_watch_s",
        "end_why",
        "ended",
        "engine",
        "granted",
        "held",
        "instance",
        "last_assigned",
        "models",
        "moving",
        "prefixes",
        "recalled",
        "returned",
        "routes",
        "running",
        "shared",
        "speed",
        "speeds",
        "stalled",
        "state",
        "swap",
        "swap_idle",
        "swap_watched",
        "turns",
        "used",
        "waiting_sent",
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
        #: How many requests it runs at once, as it reports.
        self.capacity = hello.capacity
        self.speed = hello.speed
        self.engine = hello.engine
        self.device = hello.device
        #: Identifies the process; None if it does not say.
        self.instance = hello.instance
        #: None until it reports one. Never a reason to assign: only credit is.
        self.state: WorkerState | None = None
        self.beat = Heartbeat()
        #: Requests that were taken from it and whose former run it has not yet reported as over.
        self.moving: set[bytes] = set()
        #: Cumulative; never falls (SPEC.md section 7).
        self.granted = 0
        #: ASSIGNs of this session that spent credit.
        self.assigned = 0
        #: Credit given back unspent (`assigned` plus this is at most `granted`), and credit asked
        #: back so far. Both cumulative.
        self.returned = 0
        self.recalled = 0
        #: Whether it serves other brokers from the same slots and so is told what waits
        #: for it here.
        self.shared = hello.brokers > 1
        #: The number waiting that it was last told, minus what it was assigned since.
        self.waiting_sent = 0
        #: A drain was ordered or announced: nothing more is assigned.
        self.draining = False
        #: An operator holds it: nothing more is assigned until it is released.
        self.held = False
        #: When the broker ends an ordered drain itself.
        self.drain_until_s = math.inf
        #: When it will be gone, as it says itself, and by a drain; infinity: not known. Why.
        self.end_said_s = math.inf
        self.end_drained_s = math.inf
        self.end_why = ""
        #: When `ends` looks at it next.
        self.end_watch_s = math.inf
        #: Its end is so near that nothing more is assigned.
        self.closing = False
        #: Measured, by model.
        self.speeds: dict[str, Speed] = {}
        #: Tokens of prompts that it computed lately, by their beginning (`prefix_key`); the oldest
        #: is first.
        self.prefixes: OrderedDict[bytes, float] = OrderedDict()
        #: The engine makes no progress: nothing more is assigned until it does.
        self.stalled = False
        #: The suspect that it runs or is reserved for; it is assigned nothing else.
        self.alone: RequestState | None = None
        #: Requests that it has not finished, by id.
        self.running: dict[bytes, RequestState] = {}
        #: Requests that it finished but still keeps, by id.
        self.ended: dict[bytes, RequestState] = {}
        #: By session id of the client.
        self.routes: dict[bytes, Route] = {}
        #: Number, among all assignments of the broker, of the latest one to this worker.
        self.last_assigned = 0
        #: The model that it is to load, and those that give way to it. See `swapping`.
        self.swap: Swap | None = None
        #: Whether a timer looks at it.
        self.swap_watched = False
        #: By the model that would be loaded: since when those that would give way were seen with
        #: nothing to do, and when they were last used by then.
        self.swap_idle: dict[str, tuple[float, float]] = {}
        #: By loaded model, of a worker that loads on demand: since when it has its turn, and when a
        #: request was last assigned to it.
        self.turns: dict[str, float] = {}
        self.used: dict[str, float] = {}

    @property
    def free(self) -> int:
        """Requests that may be assigned to it: its unspent credit, if it is fit to take work."""
        return self.unspent if self.fit and self.alone is None else 0

    @property
    def fit(self) -> bool:
        """Whether it may be given work, provided it has credit."""
        idle = self.draining or self.held or self.stalled or self.closing
        return not (idle or self.state is WorkerState.LOADING)

    def may_take(self, model: str) -> bool:
        """Whether a request for this model may be assigned to it."""
        # Like `free`, but written out: with a thousand workers, this is most of the cost
        # of a placement.
        if self.granted <= self.assigned + self.returned:
            return False
        if self.draining or self.held or self.stalled or self.alone is not None or self.closing:
            return False
        if self.state is WorkerState.LOADING:
            return False
        if self.swap is not None and model in self.swap.gives_way:
            return False
        info = self.models[model]
        if not info.loaded:
            return False
        most = info.capacity
        return most is None or most > sum(r.model == model for r in self.running.values())

    def has_loaded(self, model: str) -> bool:
        """Whether the model is loaded there and stays so for now."""
        gives_way = self.swap is not None and model in self.swap.gives_way
        return self.models[model].loaded and not gives_way

    def can_continue(self, request: RequestState) -> bool:
        """Whether it can go on from the tokens that a request came with."""
        if not request.offset:
            return True
        how = self.models[request.model].resume
        if how == Continuation.EXACT:
            return not request.carries_text
        return request.carries_text or how == Continuation.IDS

    def is_exact(self, model: str) -> bool:
        """Whether a request for this model goes on here, and elsewhere after it ran here, with the
        tokens that it would have had without a move."""
        info = self.models.get(model)  # unknown: what a worker brought along has no model yet
        return info is not None and info.resume == Continuation.EXACT

    def room(self, model: str) -> int:
        """How many requests for this model may be assigned to it."""
        if not self.may_take(model):
            return 0
        most = self.models[model].capacity
        if most is None:
            return self.unspent
        return min(self.unspent, most - sum(r.model == model for r in self.running.values()))

    @property
    def ends_s(self) -> float:
        """When it will be gone; infinity if no end is known."""
        return min(self.end_said_s, self.end_drained_s)

    @property
    def via(self) -> list[str]:
        """Names of the brokers behind a worker that is itself a relay."""
        named = (info.details.get("via") for info in self.models.values())
        lists = (names for names in named if isinstance(names, list))
        return sorted({name for names in lists for name in names if isinstance(name, str)})

    @property
    def unspent(self) -> int:
        """Credit left, whether it may be spent now or not."""
        return self.granted - self.assigned - self.returned

    @property
    def state_name(self) -> str:
        """The state as shown to people; the most severe one if several apply."""
        if self.draining:
            return WorkerState.DRAINING.value
        if self.held:
            return "held"
        if self.stalled:
            return "stalled"
        if self.closing:
            return "ending"
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
        "beginning_s",
        "cancelled",
        "carries_text",
        "cause",
        "cell",
        "charged",
        "client",
        "cost",
        "deaths",
        "diverted",
        "end_held",
        "ended_s",
        "epoch",
        "epoch_before",
        "evened_s",
        "expected_tokens",
        "expects_s",
        "frames",
        "fresh_tokens",
        "holder",
        "id",
        "keep_until_s",
        "kind",
        "lost_alone",
        "lost_workers",
        "model",
        "most_tokens",
        "moved",
        "moves",
        "offset",
        "order",
        "orphan_until_s",
        "outcome",
        "pace",
        "passed_over_s",
        "position",
        "preempted_s",
        "prefix_key",
        "priority",
        "progress_s",
        "prompt_guess",
        "queue_until_s",
        "queued_s",
        "returned",
        "said_at_s",
        "said_factor",
        "said_s",
        "size_bytes",
        "started_s",
        "suspect_until_s",
        "told_at_s",
        "told_why",
        "ttl_until_s",
        "unsettled",
        "user_key",
        "window",
        "window_sent",
        "worker",
        "worker_name",
    )

    def __init__(self, request_id: bytes, model: str, now_s: float) -> None:
        self.id = request_id
        self.model = model
        self.kind = ""
        self._phase = Phase.NEW
        #: The latest moves, latest last.
        self.moves: tuple[Move, ...] = ()
        #: Receives its output; None for an orphan (its client vanished, or a worker
        #: brought it along).
        self.client: ClientSession | None = None
        #: Where it runs or ended; None while it is queued.
        self.worker: WorkerSession | None = None
        #: Outlives the worker's session, for the operator's list.
        self.worker_name = ""
        self.epoch = 0
        #: The previous epoch, if the same worker was sent both: it may not know the newer one yet.
        self.epoch_before: int | None = None
        #: Tokens that the client already has (RESUME).
        self.offset = 0
        #: Whether these are ids that carry text (`messages.TEXT_IDS`).
        self.carries_text = False
        #: The longest answer that it allows, tokens (`max_tokens`); None: as long as it becomes.
        self.most_tokens: int | None = None
        #: It ran, and its worker gave it up alive: it is first in the queue when it comes back.
        self.moved = False
        #: While it waits: what its client was told last, and when: its place, in how many seconds
        #: it should start (None: not known), why it waits.
        self.position = 0
        self.expects_s: float | None = None
        self.told_why = ""
        self.told_at_s = now_s
        #: What it was told first, to compare, when, and with which correction.
        self.said_factor = 1.0
        self.said_s: float | None = None
        self.said_at_s = now_s
        #: When it gave way to a higher priority last.
        self.preempted_s = -math.inf
        #: In the slots that it gave up: time until its first tokens, and after them.
        self.beginning_s = 0.0
        self.progress_s = 0.0
        #: When it moved to a faster worker last.
        self.evened_s = -math.inf
        #: The user whose turn it takes in the queue.
        self.user_key = ""
        #: Tokens: what its user is charged for it when it is assigned, how many of them are the
        #: answer's, what its prompt's size suggests, and what the user was charged so far; of that,
        #: what is expected of the present run. See `fairness`.
        self.cost = 1.0
        self.prompt_guess = 0.0
        self.expected_tokens = 0.0
        self.charged = 0.0
        self.unsettled = 0.0
        self.priority = 0
        #: Age: lower came earlier. Kept when the request is resumed.
        self.order = 0
        #: Body and attachments as the client sent them; empty once assigned.
        self.frames: tuple[bytes, ...] = ()
        self.size_bytes = 0
        #: Whether it was admitted before (it waited here, or a worker had it); then only the memory
        #: limits can refuse it.
        self.admitted = False
        #: The highest window that the client has sent.
        self.window = 0
        #: The window in the body; if it has moved since, WINDOW follows ASSIGN.
        self.window_sent = 0
        #: Workers lost while they ran it, once per loss, without those that came back with it.
        self.lost_workers: tuple[str, ...] = ()
        #: Those of them that ran nothing else at the time.
        self.lost_alone: tuple[str, ...] = ()
        #: How many of the lost workers certainly died: they said so.
        self.deaths = 0
        #: Lost workers that came back with it, once per loss, and that the client has not been
        #: told of yet.
        self.returned: tuple[str, ...] = ()
        #: How often it may still be resumed; None before the first time.
        self.pace: ResumePace | None = None
        #: Until when a suspect waits for its lost workers to come back; None if it is not waiting.
        self.suspect_until_s: float | None = None
        #: Whether it is suspected: it runs alone next, or is doing so now.
        self.alone = False
        #: The worker reserved for it while it is suspected.
        self.cell: WorkerSession | None = None
        #: The worker that, according to the client, ran it last and may still have it;
        #: empty if none.
        self.holder = ""
        #: Tokens of its prompt that its worker had to compute, roughly.
        self.fresh_tokens = 0.0
        #: Since when it waits for a busy worker although another one is free (`finish`).
        self.passed_over_s: float | None = None
        #: For placement by prefixes: equal for prompts with the same beginning.
        self.prefix_key = b""
        #: Whether CANCEL was passed on to the worker.
        self.cancelled = False
        self.outcome = ""
        #: Why it failed, for the operator's list.
        self.cause = ""
        #: Whether it left its slot but its END waits at the worker for the client's window.
        self.end_held = False
        #: Routes of earlier clients on which its events are filtered out.
        self.diverted: list[Route] = []
        self.queued_s = now_s
        self.queue_until_s = math.inf
        self.ttl_until_s = math.inf
        self.orphan_until_s = math.inf
        #: When a request that is over is forgotten; extended while its end is still being read.
        self.keep_until_s = -math.inf
        self.assigned_s: float | None = None
        self.started_s: float | None = None
        self.ended_s: float | None = None

    @property
    def phase(self) -> Phase:
        """The current phase; `to` changes it."""
        return self._phase

    def to(self, phase: Phase, now_s: float) -> None:
        """Move to another phase. Raises IllegalMoveError, and changes nothing, if
        `MOVES` forbids it."""
        if phase not in MOVES[self._phase]:
            raise IllegalMoveError(
                f"{self.story()}; it may not move from {self._phase.value} to {phase.value}"
            )
        self._phase = phase
        move = (now_s, phase, self.epoch, self.worker_name)
        self.moves = (*self.moves[1 - STORY_MOVES :], move)

    def story(self) -> str:
        """What happened to it, for debugging: its latest moves, with times on the broker's
        clock."""
        moves = ", ".join(
            f"{phase.value} at {at_s:.3f} s (epoch {epoch}"
            + (f", worker {worker})" if worker else ")")
            for at_s, phase, epoch, worker in self.moves
        )
        return f"request {short(self.id)}: {moves or self._phase.value}"


def short(id_: bytes) -> str:
    """As much of an id as people may see: whoever knows all of it may take over the stream."""
    return id_[:4].hex()
