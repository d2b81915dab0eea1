"""The connection of whoever dials out, sans-IO: HELLO and WELCOME or REFUSE, sequence numbers,
liveness, and how long an address waits after a failure (SPEC.md section 5).

    IDLE ──▶ WAITING ──▶ CONNECTING ──▶ GREETING ──▶ OPEN
               ▲             │             │          │
               └─────────────┴─────────────┴──────────┘   `end`: the address waits, then again
                                                          `close`: CLOSED, for good

One socket is one connection is one session. Which broker is dialled next, and what the messages of
a session mean, the party decides: a worker keeps one connection to each of its brokers, a client
one to whichever of them answers. It is told what happens, with the time, and answers what follows.
Must never touch a socket or a clock.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Final

from msgspec import Struct

from broker.peer.backoff import ATTEMPT_S, SLEPT_S, Address
from broker.protocol import codec, header
from broker.protocol.errors import ErrorInfo, ProtocolError
from broker.protocol.header import NO_ID, Header, MessageType
from broker.protocol.limits import MAX_CONTROL_BYTES, MAX_FRAMES, PROTOCOL_VERSION
from broker.protocol.liveness import Liveness
from broker.protocol.messages import Goodbye, Hello, Refuse, Welcome

__all__ = ["BeatDue", "Ended", "PeerConnection", "State"]

SLACK_S: Final = 1.0
"""For reading what came while this process was held up."""


class State(Enum):
    """What the connection is waiting for."""

    #: No socket, and nobody needs one.
    IDLE = "idle"
    #: No socket until an address may be tried again.
    WAITING = "waiting"
    #: A socket that is not connected yet.
    CONNECTING = "connecting"
    #: HELLO is sent.
    GREETING = "greeting"
    #: Between WELCOME and the end of the session.
    OPEN = "open"
    CLOSED = "closed"


class Ended(Struct, frozen=True):
    """The session, or the attempt to have one, is over: close the socket and call `end`."""

    #: For people.
    reason: str
    #: Somebody answered, and does not want us.
    refused: bool = False
    #: When to come back, where the broker said it.
    retry_after_s: float | None = None
    #: What a REFUSE said.
    error: ErrorInfo | None = None
    #: It is no use to come back unchanged.
    fatal: bool = False

    @classmethod
    def by_protocol_error(cls, error: ProtocolError) -> Ended:
        """The broker cannot be talked to."""
        return cls(f"the broker broke the protocol: {error}", refused=True)


class BeatDue(Struct, frozen=True):
    """A HEARTBEAT is to be sent."""


class PeerConnection:
    """The connection to a broker, from one socket to the next."""

    __slots__ = (
        "_door",
        "_due_s",
        "_heard_sequence",
        "_interval_s",
        "_liveness",
        "_most_frames",
        "_opened_s",
        "_sent_sequence",
        "_steady",
        "address",
        "session",
        "state",
    )

    def __init__(
        self, address: Address, *, door: str, most_frames: int = MAX_FRAMES, steady: bool = False
    ) -> None:
        """`door`: which of a broker's addresses is dialled, "front" or "back". `most_frames`: of a
        message that the party is sent. `steady`: a HEARTBEAT is due each interval, whatever else is
        sent, because it carries what the broker is to know."""
        self._door = door
        self._most_frames = most_frames
        self._steady = steady
        #: The one in use, or used last.
        self.address = address
        self.state = State.IDLE
        self._reset()

    def _reset(self) -> None:
        """Forget the session; a subclass also forgets what it keeps of one."""
        #: The id of what the broker itself says; `NO_ID` without a session.
        self.session = NO_ID
        #: When the attempt has taken too long.
        self._due_s = math.inf
        self._opened_s = 0.0
        self._interval_s = 0.0
        self._liveness = Liveness(0.0, 0, 0.0)
        self._sent_sequence = 0
        self._heard_sequence = 0

    @property
    def open(self) -> bool:
        """There is a session."""
        return self.state is State.OPEN

    @property
    def has_socket(self) -> bool:
        """A socket is open, connected or not."""
        return self.state in (State.CONNECTING, State.GREETING, State.OPEN)

    @property
    def last_sequence(self) -> int:
        """The sequence number of the message that was received last."""
        return self._heard_sequence - 1

    def deadline_s(self) -> float:
        """When `tick` is due, or, while WAITING, the next `dial`; `inf`: never."""
        match self.state:
            case State.OPEN:
                return min(self._liveness.beat_due_s, self._liveness.dead_at_s)
            case State.CONNECTING | State.GREETING:
                return self._due_s
            case State.WAITING:
                return self.address.from_s
        return math.inf

    # --- the course of a connection ---------------------------------------------------------------

    def dial(self, address: Address, now_s: float) -> None:
        """A new socket is opened to this address."""
        self._reset()
        self.address = address
        self.state = State.CONNECTING
        self._due_s = now_s + ATTEMPT_S

    def greet(self, hello: Hello, now_s: float) -> tuple[bytes, bytes]:
        """The socket is connected, and whoever dials speaks first: HELLO."""
        self.state = State.GREETING
        self._due_s = now_s + self.address.backoff.greeting_s
        return self.message(MessageType.HELLO, NO_ID, hello, now_s)

    def receive(self, frames: tuple[bytes, ...], now_s: float) -> Header | Welcome | Ended:
        """Check a message's framing and sequence. WELCOME begins the session; a header is that of a
        message for the party. Raises `ProtocolError`."""
        if not 2 <= len(frames) <= self._most_frames:
            allowed = "2" if self._most_frames == 2 else f"2 to {self._most_frames}"
            raise ProtocolError(f"message of {len(frames)} frames; it has {allowed}")
        head = header.decode(frames[0])
        if len(frames) != 2 and head.type is not MessageType.ASSIGN:
            raise ProtocolError(f"{head.type.name} of {len(frames)} frames; it has 2")
        if head.type is MessageType.REFUSE:
            # Whatever its sequence: 0 from a broker that does not know the session.
            return _refused(codec.decode(Refuse, frames[1], MAX_CONTROL_BYTES))
        if head.sequence != self._heard_sequence:
            raise ProtocolError(
                f"message {head.sequence} of the session came where {self._heard_sequence} was due"
            )
        self._heard_sequence += 1
        if self.state is State.OPEN:
            self._liveness.heard(now_s)
            return _said_goodbye(frames[1]) if head.type is MessageType.GOODBYE else head
        if self.state is not State.GREETING:
            raise ProtocolError("the broker spoke before HELLO")
        if head.type is not MessageType.WELCOME:
            raise ProtocolError(f"HELLO was answered with {head.type.name}")
        return self._welcomed(head.id, codec.decode(Welcome, frames[1], MAX_CONTROL_BYTES), now_s)

    def _welcomed(self, session: bytes, welcome: Welcome, now_s: float) -> Welcome:
        if welcome.version != PROTOCOL_VERSION:
            raise ProtocolError(f"version {welcome.version} was not offered")
        self.state = State.OPEN
        self.session = session
        self._opened_s = now_s
        self._interval_s = welcome.heartbeat_interval_ms / 1000
        self._liveness = Liveness(self._interval_s, welcome.liveness, now_s)
        return welcome

    def tick(self, now_s: float) -> Ended | BeatDue | None:
        """Time has passed."""
        match self.state:
            case State.OPEN:
                return self._check_liveness(now_s)
            case State.CONNECTING | State.GREETING if now_s >= self._due_s:
                return self._on_attempt_due(now_s)
        return None

    def _check_liveness(self, now_s: float) -> Ended | BeatDue | None:
        liveness = self._liveness
        late_s = now_s - liveness.beat_due_s
        if late_s > self._interval_s:
            liveness.shift(late_s)  # it was this process that slept, not the broker
        if now_s >= liveness.dead_at_s:
            return Ended(f"the broker has been silent for {liveness.silent_s(now_s):.1f} s")
        return BeatDue() if now_s >= liveness.beat_due_s else None

    def _on_attempt_due(self, now_s: float) -> Ended | None:
        if now_s - self._due_s > SLEPT_S:
            self._due_s = now_s + SLACK_S  # this process slept: what came meanwhile is read first
            return None
        if self.state is State.CONNECTING:
            # libzmq does not report a host name that cannot be resolved.
            return Ended(
                f"no connection within {ATTEMPT_S:g} s; is the host's name right, and its network "
                "open?"
            )
        backoff = self.address.backoff
        waited_s = backoff.greeting_s
        backoff.unanswered()
        return Ended(
            f"no answer to HELLO within {waited_s:g} s; is that a tokenbus broker's {self._door}?"
        )

    def end(self, ended: Ended, now_s: float) -> float:
        """The socket is closed: its address waits, and others may be dialled. Returns the wait in
        seconds."""
        if self.open:
            lasted_s = now_s - self._opened_s
            self.address.backoff.session_over(lasted_s, refused=ended.refused)
        self.address.reason = ended.reason
        self._reset()
        self.state = State.WAITING
        return self.address.wait(now_s, refused=ended.refused, retry_after_s=ended.retry_after_s)

    def close(self) -> None:
        """Never to be opened again."""
        self._reset()
        self.state = State.CLOSED

    # --- what is sent -----------------------------------------------------------------------------

    def seal(self, prefix: bytes, now_s: float) -> bytes:
        """Complete a header's prefix; the message counts as sent."""
        sequence = self._sent_sequence
        self._sent_sequence = sequence + 1
        if not self._steady:
            self._liveness.sent(now_s)
        return header.seal(prefix, sequence)

    def message(
        self, type_: MessageType, id_: bytes, body: Struct, now_s: float
    ) -> tuple[bytes, bytes]:
        """The frames of a message that is one body."""
        if type_ is MessageType.HEARTBEAT:
            self._liveness.sent(now_s)
        return self.seal(header.prefix(type_, id_), now_s), codec.encode(body)

    def goodbye(self, reason: str, message: str, now_s: float) -> tuple[bytes, bytes]:
        """The last words of an open session."""
        body = Goodbye(reason=reason, message=message[:1000])
        return self.message(MessageType.GOODBYE, self.session, body, now_s)


def _refused(refuse: Refuse) -> Ended:
    error = refuse.error
    retry_after_s = None if error.retry_after_ms is None else error.retry_after_ms / 1000
    return Ended(error.message, True, retry_after_s, error, refuse.fatal)


def _said_goodbye(body: bytes) -> Ended:
    goodbye = codec.decode(Goodbye, body, MAX_CONTROL_BYTES)
    return Ended(
        f"the broker said goodbye: {goodbye.message or goodbye.reason}",
        refused=goodbye.reason != "shutdown",
    )
