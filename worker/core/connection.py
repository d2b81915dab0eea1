"""The worker's session with one broker: its state, sequence numbers, credit and timers.

States (SPEC.md section 5):

    WAITING ──▶ CONNECTING ──▶ GREETING ──▶ OPEN
       ▲             │             │          │
       └─────────────┴─────────────┴──────────┘   lost: back-off, a new socket, HELLO again
                                                  REFUSE with `fatal`: GONE, for good

`Connection` builds frames and counts; what to do about a message is decided in `session`. Must
never touch a socket or a clock.
"""

from __future__ import annotations

import math
import random
from enum import Enum

from broker.protocol import codec, header
from broker.protocol.errors import ProtocolError
from broker.protocol.header import NO_ID, Header, MessageType
from broker.protocol.limits import MAX_FRAMES
from broker.protocol.liveness import ATTEMPT_S, SLEPT_S, Backoff, Liveness
from broker.protocol.messages import Welcome
from worker.core.streams import Route

SLACK_S = 1.0
"""For reading what came while this process was held up."""


class State(Enum):
    """What the connection is waiting for."""

    WAITING = "waiting"
    CONNECTING = "connecting"
    GREETING = "greeting"
    OPEN = "open"
    GONE = "gone"


class Connection:
    """State of the connection to one broker, from one socket to the next."""

    __slots__ = (
        "_backoff",
        "_heard_sequence",
        "_opened_s",
        "_sent_sequence",
        "announced",
        "answered",
        "assigned",
        "assigned_order",
        "beat_at_s",
        "blocked",
        "granted",
        "granted_order",
        "held",
        "index",
        "interval_s",
        "liveness",
        "models_told",
        "name",
        "recalled",
        "recalled_told",
        "returned",
        "routes",
        "session",
        "silent",
        "state",
        "told_absent",
        "until_s",
        "waiting",
    )

    def __init__(self, index: int, generator: random.Random, now_s: float) -> None:
        self.index = index
        self._backoff = Backoff(generator)
        self.state = State.WAITING
        #: When the wait of the present state is over.
        self.until_s = now_s
        #: The broker's own name, once it told it.
        self.name = ""
        #: The absence of this broker was told; not again until it was there.
        self.told_absent = False
        self._reset(now_s)

    def _reset(self, now_s: float) -> None:
        self.session = NO_ID
        self.liveness: Liveness | None = None
        self.interval_s = 0.0
        self.beat_at_s = math.inf
        self._opened_s = now_s
        self._sent_sequence = 0
        self._heard_sequence = 0
        #: The socket is full: no OUTPUT is made until it is not.
        self.blocked = False
        #: Credit, cumulative over the session: granted, as last told, and spent by the broker.
        self.granted = 0
        self.announced = 0
        self.assigned = 0
        #: Requests that wait at the broker for this worker, by its latest word.
        self.waiting = 0
        #: Credit that the broker was asked to give back, as last told, as far as it has answered,
        #: and what it gave. All cumulative.
        self.recalled = 0
        self.recalled_told = 0
        self.answered = 0
        self.returned = 0
        #: Numbers of the last grant and of the last ASSIGN of the whole worker that were its.
        self.granted_order = 0
        self.assigned_order = 0
        #: The broker knows the engine's models and capacity.
        self.models_told = False
        self.routes: dict[bytes, Route] = {}
        #: Running requests that HELLO named and that nobody resumed through this broker yet.
        self.held: set[bytes] = set()
        #: For a ledger that belongs to no client session: their end.
        self.silent = Route(self, NO_ID)

    # --- states -----------------------------------------------------------------------------------

    def opening(self, now_s: float) -> None:
        """A new socket is opened."""
        self._reset(now_s)
        self.state = State.CONNECTING
        self.until_s = now_s + ATTEMPT_S

    def greeting(self, now_s: float) -> None:
        """HELLO is sent."""
        self.state = State.GREETING
        self.until_s = now_s + self._backoff.greeting_s

    def opened(self, session: bytes, welcome: Welcome, now_s: float) -> None:
        """WELCOME came: its values bind both sides."""
        self.state = State.OPEN
        self.session = session
        self.name = welcome.broker
        self.interval_s = welcome.heartbeat_interval_ms / 1000
        self.liveness = Liveness(self.interval_s, welcome.liveness, now_s)
        self._opened_s = now_s
        self.beat_at_s = now_s
        self.told_absent = False

    def held_up(self, now_s: float) -> bool:
        """The limit of an attempt passed while this process did not run: what came meanwhile is to
        be read first. True at most once in a row."""
        if now_s - self.until_s <= SLEPT_S:
            return False
        self.until_s = now_s + SLACK_S
        return True

    def unanswered(self) -> None:
        """HELLO was sent, and nothing came back in time."""
        self._backoff.unanswered()

    def lost(
        self, now_s: float, *, refused: bool = False, retry_after_s: float | None = None
    ) -> float:
        """The session or the attempt is over; returns the wait before the next, seconds.
        `refused`: by the broker, which may have said after what time to come back."""
        if self.state is State.OPEN:
            self._backoff.session_over(now_s - self._opened_s, refused=refused)
        wait_s = (
            self._backoff.next_s(now_s, refused=refused)
            if retry_after_s is None
            else self._backoff.hinted_s(retry_after_s)
        )
        self._reset(now_s)
        self.state = State.WAITING
        self.until_s = now_s + wait_s
        return wait_s

    def gone(self, now_s: float) -> None:
        """Never to be opened again."""
        self._reset(now_s)
        self.state = State.GONE

    @property
    def open(self) -> bool:
        return self.state is State.OPEN

    @property
    def has_socket(self) -> bool:
        return self.state in (State.CONNECTING, State.GREETING, State.OPEN)

    @property
    def idle(self) -> bool:
        """No request goes to this broker."""
        return not any(route.streams for route in self.routes.values())

    @property
    def unused(self) -> int:
        """Credit that the broker has not spent."""
        return self.granted - self.assigned - self.returned

    @property
    def wanted(self) -> int:
        """Slots that the broker could use beyond its credit; negative: credit that nobody there
        waits for."""
        return self.waiting - self.unused

    def deadline_s(self) -> float:
        """When something is due, if nothing happens before."""
        if self.state is State.GONE:
            return math.inf
        if self.liveness is not None:
            return min(self.beat_at_s, self.liveness.dead_at_s)
        return self.until_s

    # --- messages ---------------------------------------------------------------------------------

    def route(self, reply_to: bytes) -> Route:
        """The route of that name; made when it is new."""
        found = self.routes.get(reply_to)
        if found is None:
            if len(self.routes) >= 64:
                self.routes = {k: r for k, r in self.routes.items() if r.streams}
            found = self.routes[reply_to] = Route(self, reply_to)
        return found

    def seal(self, prefix: bytes, now_s: float) -> bytes:
        """Complete a header's prefix; the message counts as sent."""
        sequence = self._sent_sequence
        self._sent_sequence = sequence + 1
        if self.liveness is not None:
            self.liveness.sent(now_s)
        return header.seal(prefix, sequence)

    def message(
        self, type_: MessageType, id_: bytes, body: object, now_s: float
    ) -> tuple[bytes, bytes]:
        """A control message; `body` is a struct of `broker.protocol.messages`."""
        return self.seal(header.prefix(type_, id_), now_s), codec.encode(body)

    def receive(self, frames: tuple[bytes, ...], now_s: float) -> Header:
        """Check a message's framing and sequence. Raises `ProtocolError`."""
        if len(frames) < 2:
            raise ProtocolError(f"message of {len(frames)} frames; it has a header and a body")
        if len(frames) > MAX_FRAMES:
            raise ProtocolError(f"message of {len(frames)} frames; the limit is {MAX_FRAMES}")
        head = header.decode(frames[0])
        if head.sequence != self._heard_sequence:
            raise ProtocolError(
                f"message {head.sequence} of the session came where {self._heard_sequence} was due"
            )
        self._heard_sequence += 1
        if self.liveness is not None:
            self.liveness.heard(now_s)
        return head
