"""The client's connection to a broker: which of several brokers, each with its own back-off, one at
a time (SPEC.md section 5; the ZeroMQ guide's Freelance pattern).

Knows nothing of requests; handshake and liveness are in `broker.peer.connection`. It passes its
instructions to `out` and reports to its host, the session; the host sets `now_s` before every call.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from broker.peer.backoff import Address
from broker.peer.connection import BeatDue, Ended, PeerConnection, State
from broker.protocol import codec, header, limits, messages
from broker.protocol.errors import ErrorInfo, ProtocolError
from broker.protocol.header import Header, MessageType
from client.core.events import CloseSocket, Instruction, OpenSocket, Send, Stop

DRAINING_S: Final = 1.0
"""Delay before a draining broker is tried again: a new one may have taken over its address."""
HURRY_S: Final = 1.0
"""Longest back-off once the application asks for something new, unless the broker named a time."""


class Host(Protocol):
    """What the connection reports to."""

    def session_began(self) -> None:
        """WELCOME has arrived: requests may be sent."""

    def session_over(self, story: str) -> None:
        """The session has ended."""

    def refused_for_good(self, error: ErrorInfo) -> None:
        """No broker is left that would ever accept this client."""

    def wants_session(self) -> bool:
        """Whether anything open needs a broker."""


class BrokerConnection:
    """Finds a broker, keeps one session with it, and reconnects."""

    def __init__(
        self,
        brokers: Sequence[str],
        hello: messages.Hello,
        host: Host,
        out: Callable[[Instruction], None],
        generator: random.Random,
    ) -> None:
        #: Addresses that may accept this client; the first is the one in use.
        self._addresses = [Address(name, generator) for name in brokers]
        self._peer = PeerConnection(self._addresses[0], door="front", most_frames=2)
        #: The broker is about to stop: running requests may finish, new ones are not sent.
        self.draining = False
        #: Monotonic seconds; set by the host.
        self.now_s = 0.0
        #: The latest WELCOME; its limits hold until the next.
        self.welcome: messages.Welcome | None = None
        self._hello = hello
        self._host = host
        self._out = out
        self._random = generator

    @property
    def state(self) -> State:
        """The state of the connection."""
        return self._peer.state

    @property
    def has_session(self) -> bool:
        """Whether there is a session: WELCOME has arrived, and it has not ended."""
        return self._peer.open

    @property
    def ready(self) -> bool:
        """There is a session, and the broker accepts new requests."""
        return self._peer.open and not self.draining

    @property
    def session_id(self) -> bytes:
        """Header id of the broker's own messages in the session."""
        return self._peer.session

    @property
    def last_sequence(self) -> int:
        """The sequence number of the last message read."""
        return self._peer.last_sequence

    @property
    def brokers(self) -> list[str]:
        """Addresses that may accept this client."""
        return [address.name for address in self._addresses]

    @property
    def alternative(self) -> bool:
        """Whether there is another address than the one in use."""
        return len(self._addresses) > 1

    def story(self) -> str:
        """How the latest attempts ended, for error messages."""
        if self.draining:
            self._addresses[0].reason = "it is about to stop and takes nothing new"
        elif self._peer.has_socket and not (self.has_session or self._addresses[0].reason):
            self._addresses[0].reason = "no answer so far"
        if not self.alternative:
            last = self._addresses[0].reason
            return f"last: {last}" if last else ""
        return "; ".join(f"{a.name}: {a.reason or 'not tried'}" for a in self._addresses)

    def deadline_s(self) -> float:
        """When to call `tick` next."""
        return self._reopen_s if self.state is State.WAITING else self._peer.deadline_s()

    # --- from the host ---

    def want(self) -> None:
        """A session is needed: connect, unless that is under way."""
        if self.state not in (State.IDLE, State.WAITING):
            return
        if self._reopen_s > self.now_s + HURRY_S:
            for address in self._addresses:
                if not address.hinted:
                    soon_s = self.now_s + self._random.uniform(0.0, HURRY_S)
                    address.from_s = min(address.from_s, soon_s)
        if self._reopen_s > self.now_s:
            self._peer.state = State.WAITING
        else:
            self._open()

    def send(self, type_: MessageType, id_: bytes, *frames: bytes) -> None:
        """Send a message in the session. The first frame is its encoded body."""
        head = self._peer.seal(header.prefix(type_, id_), self.now_s)
        self._out(Send((head, *frames)))

    def send_body(self, type_: MessageType, id_: bytes, body: msgspec.Struct) -> None:
        """Send a message with a body and no further frames."""
        self._out(Send(self._peer.message(type_, id_, body, self.now_s)))

    def leave(self, error: ProtocolError) -> None:
        """The broker broke the protocol: end the session with GOODBYE and reconnect."""
        self._say_goodbye("protocol_error", str(error))
        self._lose(Ended.by_protocol_error(error))

    def move_on(self, *, cancel: bool) -> None:
        """The broker drains: go to another one. `cancel`: nothing runs here, so send GOODBYE, which
        cancels whatever does; without it, running requests are resumed at the next broker."""
        if cancel:
            self._say_goodbye("drained")
        self._lose(Ended("the broker is draining", retry_after_s=DRAINING_S))

    def close(self) -> None:
        """Send GOODBYE, which cancels everything at the broker, and end for good."""
        if self.state is State.CLOSED:
            return
        self._say_goodbye("closed")
        if self._peer.has_socket:
            self._out(CloseSocket(linger=True))
        self._peer.close()
        self.draining = False
        self._out(Stop())

    def new_id(self) -> bytes:
        """Like `messages.new_id`, but from the injected generator."""
        return bytes((self._random.randrange(1, 256),)) + self._random.randbytes(15)

    # --- from the socket ---

    def opened(self) -> None:
        """The socket is connected: send HELLO, since the side that connects speaks first."""
        if self.state is State.CONNECTING:
            self._out(Send(self._peer.greet(self._hello, self.now_s)))

    def cut_off(self, reason: str) -> None:
        """The socket was refused or disconnected."""
        if self._peer.has_socket:
            self._lose(Ended(reason))

    def banned(self, error: ErrorInfo) -> None:
        """This broker will never accept this client: do not try it again."""
        if not self._peer.has_socket:
            return
        if self.alternative:
            self._lose(Ended(error.message), banned=True)
            return
        self._host.refused_for_good(error)
        self._lose(Ended(error.message, refused=True))

    def read(self, frames: tuple[bytes, ...]) -> tuple[MessageType, bytes, bytes] | None:
        """Type, id and body of a message for the host; None if it was handled here. Raises
        `ProtocolError`."""
        if not self._peer.has_socket:
            return None
        match self._peer.receive(frames, self.now_s):
            case Header() as head:
                return self._message(head, frames[1])
            case messages.Welcome() as welcome:
                self.welcome = welcome
                self._host.session_began()
            case Ended(error=ErrorInfo() as error, fatal=True):
                self.banned(error)
            case Ended() as ended:
                self._lose(ended)
        return None

    def tick(self) -> None:
        """Time has passed."""
        if self.state is State.WAITING:
            if self.now_s < self._reopen_s:
                return
            if self._host.wants_session():
                self._open()
            else:
                self._peer.state = State.IDLE
            return
        match self._peer.tick(self.now_s):
            case BeatDue():
                self.send_body(MessageType.HEARTBEAT, self.session_id, messages.Heartbeat())
            case Ended() as ended:
                self._lose(ended)

    # --- inside ---

    @property
    def _reopen_s(self) -> float:
        """When the next address may be tried."""
        return min(address.from_s for address in self._addresses)

    def _open(self) -> None:
        chosen = next(a for a in self._addresses if a.from_s <= self.now_s)
        self._addresses.remove(chosen)
        self._addresses.insert(0, chosen)
        self._peer.dial(chosen, self.now_s)
        self._out(OpenSocket(chosen.name))

    def _message(self, head: Header, body: bytes) -> tuple[MessageType, bytes, bytes] | None:
        match head.type:
            case MessageType.HEARTBEAT:
                codec.decode(messages.Heartbeat, body, limits.MAX_CONTROL_BYTES)
                return None
            case MessageType.DRAIN:
                codec.decode(messages.Drain, body, limits.MAX_CONTROL_BYTES)
                self.draining = True
        return head.type, head.id, body

    def _say_goodbye(self, reason: str, message: str = "") -> None:
        if self.has_session:
            self._out(Send(self._peer.goodbye(reason, message, self.now_s)))

    def _lose(self, ended: Ended, *, banned: bool = False) -> None:
        """The session or the attempt is over: tell the host, and reconnect later or elsewhere.

        Only this address backs off.
        """
        had_session = self.has_session
        self._out(CloseSocket())
        address = self._addresses.pop(0)
        self._peer.end(ended, self.now_s)
        self._peer.state = State.IDLE
        self.draining = False
        if not banned:
            self._addresses.append(address)
        if had_session:
            self._host.session_over(
                f"connection to the broker at {address.name} lost: {ended.reason}"
            )
        if self._host.wants_session():
            self._peer.state = State.WAITING
