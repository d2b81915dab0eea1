"""The life of a client's connection, sans-IO: which broker, HELLO and WELCOME, sequence numbers,
heartbeats, and the list of brokers, each with a back-off of its own (SPEC.md section 5; the
guide's Freelance pattern).

Knows nothing of requests. It writes its orders into the list that it is given and tells its host,
the session, what happened; the host sets `now_s` before every call.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final, Protocol

import msgspec

from broker.protocol import codec, header, limits, messages
from broker.protocol.errors import ErrorInfo, ProtocolError
from broker.protocol.header import NO_ID, MessageType
from broker.protocol.liveness import ATTEMPT_S, SLEPT_S, Backoff, Liveness
from client.core.events import CloseSocket, Instruction, OpenSocket, Send, Stop

DRAINING_S: Final = 1.0
"""A broker that drains is asked again so soon: somebody else may have taken its address."""
HURRY_S: Final = 1.0
"""Longest wait once the application asks for something new, unless the broker named a time."""
SLACK_S: Final = 1.0
"""For reading what came while this process was held up."""


class Link(Enum):
    """The state of the connection."""

    #: No socket, and nobody needs one.
    IDLE = "idle"
    #: No socket until an address may be tried again.
    WAITING = "waiting"
    #: A socket that is not connected yet.
    CONNECTING = "connecting"
    #: HELLO sent.
    GREETING = "greeting"
    READY = "ready"
    #: The broker is about to stop: what runs may finish, nothing new is sent.
    DRAINING = "draining"
    CLOSED = "closed"


class Host(Protocol):
    """Whom the dialer serves."""

    def session_began(self) -> None:
        """WELCOME came: send."""

    def session_over(self, story: str) -> None:
        """There was a session, and it is gone."""

    def refused_for_good(self, error: ErrorInfo) -> None:
        """No broker is left that would ever accept us."""

    def wants_session(self) -> bool:
        """Something is open that needs a broker."""


class _Address:
    """One broker's address, and when it may be tried again."""

    __slots__ = ("backoff", "from_s", "name", "reason", "told")

    def __init__(self, name: str, generator: random.Random) -> None:
        self.name = name
        self.backoff = Backoff(generator)
        #: Not to be tried before.
        self.from_s = -math.inf
        #: That time is the broker's own word.
        self.told = False
        #: Why the last session or attempt ended.
        self.reason = ""


class Dialer:
    """Finds a broker, keeps one session with it, and comes back."""

    def __init__(
        self,
        brokers: Sequence[str],
        hello: messages.Hello,
        host: Host,
        out: Callable[[Instruction], None],
        generator: random.Random,
    ) -> None:
        #: Addresses that may accept us; the first is the one in use.
        self._addresses = [_Address(name, generator) for name in brokers]
        self.state = Link.IDLE
        #: Monotonic seconds; set by the host.
        self.now_s = 0.0
        #: The latest; its bounds hold until the next.
        self.welcome: messages.Welcome | None = None
        self._hello = hello
        self._host = host
        self._out = out
        self._random = generator
        self._attempt_due_s = math.inf
        self._session_id = NO_ID
        self._ready_since_s = 0.0
        self._interval_s = 1.0
        self._liveness = Liveness(1.0, 1, 0.0)
        self._sequence_out = 0
        self._sequence_in = 0

    @property
    def session_id(self) -> bytes:
        """Header id of what the broker itself says in the session."""
        return self._session_id

    @property
    def last_sequence(self) -> int:
        """The sequence number of the message that was read last."""
        return self._sequence_in - 1

    @property
    def brokers(self) -> list[str]:
        """Addresses that may accept us."""
        return [address.name for address in self._addresses]

    @property
    def alternative(self) -> bool:
        """There is another address than the one in use."""
        return len(self._addresses) > 1

    def story(self) -> str:
        """What became of the latest attempts, for people."""
        if self.state is Link.DRAINING:
            self._addresses[0].reason = "it is about to stop and takes nothing new"
        elif self.state in (Link.CONNECTING, Link.GREETING) and not self._addresses[0].reason:
            self._addresses[0].reason = "no answer so far"
        if not self.alternative:
            last = self._addresses[0].reason
            return f"last: {last}" if last else ""
        return "; ".join(f"{a.name}: {a.reason or 'not tried'}" for a in self._addresses)

    @property
    def has_session(self) -> bool:
        """Between WELCOME and the end of the session."""
        return self.state in (Link.READY, Link.DRAINING)

    def deadline_s(self) -> float:
        """When `tick` is wanted next."""
        match self.state:
            case Link.WAITING:
                return self._reopen_s
            case Link.CONNECTING | Link.GREETING:
                return self._attempt_due_s
            case Link.READY | Link.DRAINING:
                return min(self._liveness.beat_due_s, self._liveness.dead_at_s)
        return math.inf

    # --- from the host ---

    def want(self) -> None:
        """Something is open now: connect, unless that is under way."""
        if self.state not in (Link.IDLE, Link.WAITING):
            return
        if self._reopen_s > self.now_s + HURRY_S:
            for address in self._addresses:
                if not address.told:
                    soon_s = self.now_s + self._random.uniform(0.0, HURRY_S)
                    address.from_s = min(address.from_s, soon_s)
        if self._reopen_s > self.now_s:
            self.state = Link.WAITING
        else:
            self._open()

    def send(self, type_: MessageType, id_: bytes, *frames: bytes) -> None:
        """Send a message in the session. The first frame is its encoded body."""
        head = header.encode(type_, id_, self._sequence_out)
        self._sequence_out += 1
        self._liveness.sent(self.now_s)
        self._out(Send((head, *frames)))

    def send_body(self, type_: MessageType, id_: bytes, body: msgspec.Struct) -> None:
        """Send a message that is one body."""
        self.send(type_, id_, codec.encode(body))

    def leave(self, why: str, *, reason: str, message: str = "") -> None:
        """End the session politely and come back."""
        if self._session_id != NO_ID:
            body = messages.Goodbye(reason=reason, message=message[:1000])
            self.send_body(MessageType.GOODBYE, self._session_id, body)
        self._lose(why, refused=True)

    def move_on(self, *, cancel: bool) -> None:
        """The broker drains: go to another one. `cancel`: nothing runs here, so say goodbye, which
        would cancel it; else what runs is resumed there."""
        if cancel and self._session_id != NO_ID:
            body = messages.Goodbye(reason="drained")
            self.send_body(MessageType.GOODBYE, self._session_id, body)
        self._lose("the broker is draining", retry_after_s=DRAINING_S)

    def close(self) -> None:
        """Say goodbye, which cancels everything at the broker, and end for good."""
        if self.state is Link.CLOSED:
            return
        if self.has_session:
            self.send_body(MessageType.GOODBYE, self._session_id, messages.Goodbye())
        if self.state not in (Link.IDLE, Link.WAITING):
            self._out(CloseSocket(linger=True))
        self.state = Link.CLOSED
        self._out(Stop())

    def new_id(self) -> bytes:
        """As `messages.new_id`, from the injected generator."""
        return bytes((self._random.randrange(1, 256),)) + self._random.randbytes(15)

    # --- from the socket ---

    def opened(self) -> None:
        """The socket is connected: the peer speaks first."""
        if self.state is Link.CONNECTING:
            self.state = Link.GREETING
            self._attempt_due_s = self.now_s + self._addresses[0].backoff.greeting_s
            self.send_body(MessageType.HELLO, NO_ID, self._hello)

    def cut_off(self, reason: str) -> None:
        """The socket was refused or disconnected."""
        if self.state not in (Link.IDLE, Link.WAITING, Link.CLOSED):
            self._lose(reason)

    def banned(self, error: ErrorInfo) -> None:
        """This broker will never accept us like this: do not come back to it."""
        if self.state in (Link.IDLE, Link.WAITING, Link.CLOSED):
            return
        if self.alternative:
            self._lose(error.message, banned=True)
            return
        self._host.refused_for_good(error)
        self._lose(error.message, refused=True)

    def read(self, frames: tuple[bytes, ...]) -> tuple[MessageType, bytes, bytes] | None:
        """Type, id and body of a message that concerns the host. Raises `ProtocolError`."""
        head = header.decode(frames[0])
        if len(frames) != 2:
            raise ProtocolError(f"{head.type.name} of {len(frames)} frames; a client gets two")
        body = frames[1]
        if head.type is MessageType.REFUSE:  # its sequence is always 0
            self._on_refuse(body)
            return None
        if head.sequence != self._sequence_in:
            raise ProtocolError(f"sequence {head.sequence}; {self._sequence_in} was to come")
        self._sequence_in += 1
        self._liveness.heard(self.now_s)
        if self.state is Link.GREETING:
            if head.type is not MessageType.WELCOME:
                raise ProtocolError(f"{head.type.name} instead of WELCOME")
            self._on_welcome(head.id, body)
            return None
        match head.type:
            case MessageType.HEARTBEAT:
                codec.decode(messages.Heartbeat, body, limits.MAX_CONTROL_BYTES)
            case MessageType.DRAIN:
                codec.decode(messages.Drain, body, limits.MAX_CONTROL_BYTES)
                self.state = Link.DRAINING
                return head.type, head.id, body
            case MessageType.GOODBYE:
                goodbye = codec.decode(messages.Goodbye, body, limits.MAX_CONTROL_BYTES)
                self._lose(
                    f"the broker said goodbye: {goodbye.message or goodbye.reason}",
                    refused=goodbye.reason != "shutdown",
                )
            case _:
                return head.type, head.id, body
        return None

    def tick(self) -> None:
        """Time has passed."""
        match self.state:
            case Link.WAITING if self.now_s >= self._reopen_s:
                if self._host.wants_session():
                    self._open()
                else:
                    self.state = Link.IDLE
            case Link.CONNECTING | Link.GREETING if self.now_s >= self._attempt_due_s:
                self._on_attempt_due()
            case Link.READY | Link.DRAINING:
                self._keep_alive()

    # --- inside ---

    @property
    def _reopen_s(self) -> float:
        """When the first address may be tried again."""
        return min(address.from_s for address in self._addresses)

    def _open(self) -> None:
        chosen = next(a for a in self._addresses if a.from_s <= self.now_s)
        self._addresses.remove(chosen)
        self._addresses.insert(0, chosen)
        self.state = Link.CONNECTING
        self._attempt_due_s = self.now_s + ATTEMPT_S
        self._sequence_out = self._sequence_in = 0
        self._session_id = NO_ID
        self._out(OpenSocket(chosen.name))

    def _on_attempt_due(self) -> None:
        if self.now_s - self._attempt_due_s > SLEPT_S:
            self._attempt_due_s = self.now_s + SLACK_S  # it was this process that slept
        elif self.state is Link.CONNECTING:
            # libzmq does not report a host name that cannot be resolved.
            self._lose(
                f"no connection within {ATTEMPT_S:g} s; is the host's name right, and its network "
                "open?"
            )
        else:
            backoff = self._addresses[0].backoff
            waited_s = backoff.greeting_s
            backoff.unanswered()
            self._lose(
                f"no answer to HELLO within {waited_s:g} s; is that a tokenbus broker's front?"
            )

    def _on_welcome(self, session_id: bytes, body: bytes) -> None:
        welcome = codec.decode(messages.Welcome, body, limits.MAX_CONTROL_BYTES)
        if welcome.version != limits.PROTOCOL_VERSION:
            raise ProtocolError(f"version {welcome.version} was not offered")
        self.welcome = welcome
        self.state = Link.READY
        self._session_id = session_id
        self._ready_since_s = self.now_s
        self._interval_s = welcome.heartbeat_interval_ms / 1000
        self._liveness = Liveness(self._interval_s, welcome.liveness, self.now_s)
        self._host.session_began()

    def _on_refuse(self, body: bytes) -> None:
        refuse = codec.decode(messages.Refuse, body, limits.MAX_CONTROL_BYTES)
        if refuse.fatal:
            self.banned(refuse.error)
        else:
            retry_after_ms = refuse.error.retry_after_ms
            retry_after_s = None if retry_after_ms is None else retry_after_ms / 1000
            self._lose(refuse.error.message, refused=True, retry_after_s=retry_after_s)

    def _keep_alive(self) -> None:
        late_s = self.now_s - self._liveness.beat_due_s
        if late_s > self._interval_s:
            self._liveness.shift(late_s)  # it was this process that slept, not the broker
        if self.now_s >= self._liveness.dead_at_s:
            silent_s = self._liveness.silent_s(self.now_s)
            self._lose(f"the broker has been silent for {silent_s:.1f} s")
        elif self.now_s >= self._liveness.beat_due_s:
            self.send_body(MessageType.HEARTBEAT, self._session_id, messages.Heartbeat())

    def _lose(
        self,
        reason: str,
        *,
        refused: bool = False,
        retry_after_s: float | None = None,
        banned: bool = False,
    ) -> None:
        """The session or the attempt is over: tell the host, come back later or elsewhere.

        Only this address waits: `retry_after_s` if the broker named a time, else its back-off.
        """
        had_session = self.has_session
        self._out(CloseSocket())
        self.state = Link.IDLE
        self._session_id = NO_ID
        address = self._addresses.pop(0)
        address.reason = reason
        if had_session:
            address.backoff.session_over(self.now_s - self._ready_since_s, refused=refused)
        address.told = retry_after_s is not None
        wait_s = (
            address.backoff.next_s(self.now_s, refused=refused)
            if retry_after_s is None
            else address.backoff.hinted_s(retry_after_s)
        )
        address.from_s = self.now_s + wait_s
        if not banned:
            self._addresses.append(address)
        if had_session:
            self._host.session_over(f"connection to the broker at {address.name} lost: {reason}")
        if self._host.wants_session():
            self.state = Link.WAITING
