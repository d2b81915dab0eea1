"""Messages on real sockets, as the kit sends and reads them.

Each message that arrives is checked against SPEC.md before a case sees it. `Peer` dials out, as a
client or a worker does; `KitBroker` binds, as a broker does, and holds one `Session` for each
connection that said HELLO. Both send heartbeats while a case waits, and measure how long the
subject is silent. Nothing here knows what a case is about.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgpack
import zmq

from broker.protocol import codec, header, limits, messages
from broker.protocol.errors import ProtocolError
from broker.protocol.header import NO_ID, Flag, MessageType
from tests.conformance.verdicts import Broken, CannotStart

T: Final = MessageType
BODIES: Final[dict[MessageType, Any]] = {
    T.HELLO: messages.Hello,
    T.WELCOME: messages.Welcome,
    T.REFUSE: messages.Refuse,
    T.HEARTBEAT: messages.Heartbeat,
    T.GOODBYE: messages.Goodbye,
    T.DRAIN: messages.Drain,
    T.REQUEST: messages.Request,
    T.ACCEPTED: messages.Accepted,
    T.ASSIGN: messages.Assign,
    T.CANCEL: messages.Cancel,
    T.WINDOW: messages.Window,
    T.CREDIT: messages.Credit,
    T.REJECT: messages.Reject,
    T.RESUME: messages.Request,
    T.INTERRUPTED: messages.Interrupted,
    T.QUERY: messages.Query,
    T.ANSWER: messages.Answer,
}
FROM_CLIENT: Final = {
    *(T.HELLO, T.HEARTBEAT, T.GOODBYE, T.REQUEST, T.CANCEL, T.WINDOW, T.RESUME, T.QUERY)
}
FROM_WORKER: Final = {*(T.HELLO, T.HEARTBEAT, T.GOODBYE, T.DRAIN, T.CREDIT, T.OUTPUT, T.REJECT)}
TO_CLIENT: Final = {
    *(T.WELCOME, T.REFUSE, T.HEARTBEAT, T.GOODBYE, T.DRAIN),
    *(T.ACCEPTED, T.OUTPUT, T.INTERRUPTED, T.ANSWER),
}
TO_WORKER: Final = {
    *(T.WELCOME, T.REFUSE, T.HEARTBEAT, T.GOODBYE, T.DRAIN, T.ASSIGN, T.CANCEL, T.WINDOW)
}
SEND_MS: Final = 5000
NEVER_MS: Final = 3_600_000
"""So long that no case sees a reconnection. RECONNECT_IVL -1 would forbid it, but then libzmq drops
messages that have arrived and are not read yet when a connection ends; the kit wants all of
them."""
START_LIMIT_S: Final = 60.0
"""Time limit until a subject listens, or has said its first HELLO."""
_LIMIT: Final = limits.MAX_REQUEST_BYTES


def new_id(generator: random.Random) -> bytes:
    """16 bytes, of which the first is not zero."""
    return bytes((generator.randrange(1, 256),)) + generator.randbytes(15)


def next_epoch(above: int, generator: random.Random) -> int:
    """The epoch of the next RESUME."""
    return above + (1 << 36) + generator.getrandbits(36)


class Got(NamedTuple):
    """A message that arrived and was checked."""

    type: MessageType
    flags: int
    id: bytes
    #: A struct of `broker.protocol.messages`; for OUTPUT the list of events.
    body: Any
    frames: list[bytes]
    at_s: float
    sequence: int

    @property
    def plain(self) -> Any:
        """The body as plain values."""
        return msgpack.unpackb(self.frames[1])

    @property
    def ledger(self) -> messages.Ledger | None:
        """The ledger of an OUTPUT, if it has one."""
        return codec.decode_ledger(self.frames[2], _LIMIT) if self.flags & Flag.LEDGER else None


class Closed(Exception):
    """The other side ended the session."""

    def __init__(self, got: Got) -> None:
        super().__init__(f"{got.type.name} {got.plain}")
        self.got = got


def read(frames: list[bytes], allowed: set[MessageType], who: str) -> Got:
    """Check a message as far as it can be checked alone. Raises `Broken`."""
    try:
        head = header.decode(frames[0] if frames else b"")
    except ProtocolError as error:
        raise Broken("F1", f"{who} sent a malformed header: {error}") from None
    if head.type not in allowed:
        raise Broken("F3", f"{who} sent {head.type.name}, which only other parties send")
    if head.flags & ~Flag.LEDGER or (head.flags and head.type is not T.OUTPUT):
        raise Broken("F5", f"{who} set flags {head.flags:#06x} in {head.type.name}")
    body: Any
    try:
        if head.type is T.OUTPUT:
            _expect_frames(frames, 3 if head.flags & Flag.LEDGER else 2, head.type, who)
            body = list(codec.decode_events(frames[1], limits.MAX_OUTPUT_BYTES))
            if head.flags:
                codec.decode_ledger(frames[2], _LIMIT)
        elif head.type in (T.REQUEST, T.RESUME):
            body = codec.decode(messages.Request, frames[1], _LIMIT)
            if len(frames) - 2 != len(body.attachments):
                raise Broken(
                    "R2",
                    f"{who} sent {len(frames) - 2} attachments, described {len(body.attachments)}",
                )
            if (body.resume is not None) != (head.type is T.RESUME):
                raise Broken("R3", f"{who} sent {head.type.name} with resume {body.resume}")
        elif head.type is T.ASSIGN:
            body = codec.decode(messages.Assign, frames[1], _LIMIT)
        else:
            _expect_frames(frames, 2, head.type, who)
            body = codec.decode(BODIES[head.type], frames[1], _LIMIT)
    except ProtocolError as error:
        raise Broken("E4", f"{who} sent {head.type.name} with a malformed body: {error}") from None
    return Got(head.type, head.flags, head.id, body, frames, time.monotonic(), head.sequence)


def _expect_frames(frames: list[bytes], count: int, type_: MessageType, who: str) -> None:
    if len(frames) != count:
        raise Broken("F2", f"{who} sent {type_.name} with {len(frames)} frames; it has {count}")


class Endpoint:
    """One end of a session: sequence numbers, heartbeats, and the messages that are not read
    yet."""

    def __init__(self, send: Callable[[list[bytes]], None], who: str, patience_s: float) -> None:
        self._send = send
        self.patience_s = patience_s
        self.who = who
        self.id = NO_ID
        self.sequence = 0
        self.expected = 0
        self.interval_s = 3600.0
        self.silence_s = 3600.0
        self.sent_s = self.heard_s = time.monotonic()
        self.inbox: list[Got] = []
        self.over = False
        #: False: the kit sends no heartbeats, as if it were dead.
        self.beats = True
        #: The first rule that the subject broke; `check` raises it.
        self.broken: Broken | None = None

    def send(
        self, type_: MessageType, id_: bytes, body: Any = None, *more: bytes, flags: int = 0
    ) -> None:
        """Send a message; `body` is a struct, plain values, encoded bytes, or None for an empty
        map."""
        if not isinstance(body, bytes):
            plain = not hasattr(body, "__struct_fields__")
            body = msgpack.packb({} if body is None else body) if plain else codec.encode(body)
        self.raw([header.encode(type_, id_, self.sequence, flags), body, *more])

    def raw(self, frames: list[bytes]) -> None:
        """Send these frames unchanged; they count as one message."""
        self._send(frames)
        self.sequence += 1
        self.sent_s = time.monotonic()

    def events(self, id_: bytes, *events: Any, ledger: Any = None) -> None:
        """Send an OUTPUT of plain arrays."""
        more = () if ledger is None else (msgpack.packb(ledger),)
        self.send(
            T.OUTPUT, id_, msgpack.packb(list(events)), *more, flags=0 if ledger is None else 1
        )

    def beat(self) -> None:
        """Send a HEARTBEAT if one is due."""
        if self.beats and not self.over and time.monotonic() - self.sent_s >= self.interval_s / 2:
            self.send(T.HEARTBEAT, self.id)

    def take(self, frames: list[bytes], allowed: set[MessageType]) -> None:
        """File a message that arrived. If it is wrong, the next `check` raises."""
        try:
            got = read(frames, allowed, self.who)
            if got.sequence != self.expected and got.type is not T.REFUSE:
                raise Broken(
                    "F4",
                    f"{self.who} sent {got.type.name} with sequence "
                    f"{got.sequence}; expected {self.expected}",
                )
        except Broken as broken:
            self.broken = self.broken or broken
            return
        self.expected += 1
        self.heard_s = got.at_s
        self.inbox.append(got)
        if got.type in (T.GOODBYE, T.REFUSE):
            self.over = True

    def check(self) -> None:
        """Raise if the subject broke a rule or has been silent for too long."""
        if self.broken is not None:
            raise self.broken
        silent_s = time.monotonic() - self.heard_s
        if not self.over and silent_s > self.silence_s:
            raise Broken(
                "S7",
                f"{self.who} sent nothing for {silent_s:.1f} "
                f"s; its interval is {self.interval_s} s",
            )

    def pump(self, seconds: float) -> None:
        """Read messages for up to this long, and send heartbeats meanwhile."""
        raise NotImplementedError

    def next(self, *passing: MessageType, seconds: float | None = None) -> Got | None:
        """The next message except HEARTBEATs and `passing`; None if none came in this time."""
        until_s = time.monotonic() + (self.patience_s if seconds is None else seconds)
        skipped = {T.HEARTBEAT, *passing}
        while True:
            while self.inbox:
                got = self.inbox.pop(0)
                if got.type not in skipped:
                    return got
            self.check()
            if time.monotonic() >= until_s:
                return None
            self.pump(min(0.2, max(0.0, until_s - time.monotonic())))

    def expect(self, type_: MessageType, *passing: MessageType, rule: str = "?") -> Got:
        """The next message, which must be of this type."""
        got = self.next(*(p for p in passing if p is not type_))
        if got is None:
            raise Broken(rule, f"{type_.name} did not come within {self.patience_s:g} s")
        if got.type is not type_:
            raise Broken(rule, f"{got.type.name} {_short(got)} came instead of {type_.name}")
        return got


class Peer(Endpoint):
    """A client or a worker of the kit, connected to the subject's front or back."""

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        role: str,
        patience_s: float,
        generator: random.Random,
        routing_id: bytes | None = None,
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.RECONNECT_IVL, NEVER_MS),
            (zmq.SNDTIMEO, SEND_MS),
        ):
            self.socket.setsockopt(option, value)
        self.socket.setsockopt(zmq.ROUTING_ID, routing_id or new_id(generator))
        self.random = generator
        super().__init__(self._put, "the broker", patience_s)
        self.address = address
        self.allowed = TO_CLIENT if role == "client" else TO_WORKER
        self.role = role
        self.granted = 0
        self.welcome: Any = None
        #: All peers of the case; their heartbeats must go on while this one waits.
        self.others: list[Peer] = [self]

    def _put(self, frames: list[bytes]) -> None:
        try:
            self.socket.send_multipart(frames)
        except zmq.Again:
            raise Broken("?", "the broker is gone: it accepts no messages") from None

    def beat(self) -> None:
        """Send a HEARTBEAT if one is due and the broker can take it."""
        if self.socket.poll(0, zmq.POLLOUT):
            super().beat()

    def connect(self) -> None:
        """Dial."""
        self.socket.connect(self.address)

    def hello(self, name: str, **more: Any) -> None:
        """Connect, send HELLO, and receive the WELCOME."""
        self.connect()
        self.send(T.HELLO, NO_ID, {"role": self.role, "name": name, **more})
        got = self.expect(T.WELCOME)
        if got.sequence != 0 or got.id == NO_ID:
            raise Broken("S3", f"WELCOME with sequence {got.sequence}, id {got.id.hex()}")
        self.id, self.welcome = got.id, got.body
        self.interval_s = got.body.heartbeat_interval_ms / 1000
        self.silence_s = self.interval_s * got.body.liveness + 2.0

    def pump(self, seconds: float) -> None:
        """Read messages for up to this long, and send the heartbeats of all peers meanwhile."""
        until_s = time.monotonic() + seconds
        while True:
            for peer in self.others:
                with contextlib.suppress(zmq.Again):
                    peer.beat()
                    while True:
                        peer.take(peer.socket.recv_multipart(zmq.DONTWAIT), peer.allowed)
            left_s = until_s - time.monotonic()
            if left_s <= 0 or self.inbox:
                return
            self.socket.poll(int(min(left_s, 0.02) * 1000) + 1)

    def quiet(self, rule: str, what: str, *passing: MessageType, seconds: float = 0.3) -> None:
        """Fail if anything but `passing` comes within this time."""
        until_s = time.monotonic() + seconds
        while (got := self.next(*passing, seconds=until_s - time.monotonic())) is not None:
            if got.body != []:  # an OUTPUT without events says nothing
                raise Broken(rule, f"{what}: {got.type.name} {_short(got)} came")

    def rest(self, seconds: float) -> None:
        """Let time pass, with heartbeats; messages stay in the inbox."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self.pump(0.0)
            self.check()
            time.sleep(0.01)

    def vanish(self) -> None:
        """Close the connection without GOODBYE."""
        self.over = True
        self.socket.close(linger=0)
        if self in self.others:
            self.others.remove(self)

    def leave(self, reason: str = "closed") -> None:
        """Send GOODBYE and close."""
        self.send(T.GOODBYE, self.id, {"reason": reason})
        self.over = True
        self.socket.close(linger=500)
        if self in self.others:
            self.others.remove(self)


def _short(got: Got) -> str:
    return str(got.plain)[:200]


class Session(Endpoint):
    """The subject's session with the kit's broker."""

    def __init__(self, broker: KitBroker, routing_id: bytes, who: str) -> None:
        super().__init__(lambda frames: broker.send(routing_id, frames), who, broker.patience_s)
        self._broker = broker
        self.routing_id = routing_id
        self.hello: messages.Hello | None = None

    def pump(self, seconds: float) -> None:
        """Read messages of this session and all others of the broker."""
        self._broker.pump(min(seconds, 0.02))


class KitBroker:
    """The kit's broker: one ROUTER, to which the subject connects."""

    def __init__(self, role: str, patience_s: float, generator: random.Random) -> None:
        self.role = role
        self.random = generator
        self.patience_s = patience_s
        self.context: zmq.Context[Any] = zmq.Context()
        self.router: zmq.Socket[Any] | None = None
        self.port = 0
        self.sessions: dict[bytes, Session] = {}
        #: New sessions that no case has taken yet, in the order of their HELLO.
        self.greeting: list[Session] = []
        self.allowed = FROM_CLIENT if role == "client" else FROM_WORKER
        #: Whether the subject still runs; if not, nothing more will come.
        self.alive: Callable[[], bool] = lambda: True
        self.open()

    @property
    def address(self) -> str:
        """The address that the subject connects to."""
        return f"tcp://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Bind; after `close`, to the same port again."""
        self.router = self.context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if self.port:
            until_s = time.monotonic() + 10
            while True:
                try:
                    self.router.bind(self.address)
                    return
                except zmq.ZMQError:
                    if time.monotonic() > until_s:
                        raise
                    time.sleep(0.02)
        self.port = self.router.bind_to_random_port("tcp://127.0.0.1")

    def close(self) -> None:
        """Break all connections and stop listening."""
        if self.router is not None:
            self.router.close(linger=0)
            self.router = None
        for session in self.sessions.values():
            session.over = True
        self.sessions.clear()
        self.greeting.clear()

    def end(self) -> None:
        """Release all resources."""
        self.close()
        self.context.destroy(linger=0)

    def send(self, routing_id: bytes, frames: list[bytes]) -> None:
        """Send to one connection; what cannot be delivered is lost, as on a network."""
        if self.router is not None:
            with contextlib.suppress(zmq.ZMQError):
                self.router.send_multipart([routing_id, *frames])

    def pump(self, seconds: float) -> None:
        """Wait up to this long for messages and read those that are there; send heartbeats
        first."""
        for session in self.sessions.values():
            session.beat()
        if self.router is None or not self.router.poll(int(seconds * 1000)):
            return
        with contextlib.suppress(zmq.Again):
            while True:
                routing_id, *frames = self.router.recv_multipart(zmq.DONTWAIT)
                self._take(routing_id, frames)

    def _take(self, routing_id: bytes, frames: list[bytes]) -> None:
        session = self.sessions.get(routing_id)
        if session is None:
            session = Session(self, routing_id, f"the {self.role}")
            self.sessions[routing_id] = session
            session.take(frames, self.allowed)
            self.greeting.append(session)
        elif not session.over:
            session.take(frames, self.allowed)

    def hello(self, *, first: bool = False, rule: str = "S10") -> Session:
        """The next connection that says HELLO, not answered yet.

        `first`: it is the subject's first one. Raises `Broken`, or `CannotStart` if the first HELLO
        does not come.
        """
        seconds = START_LIMIT_S if first else self.patience_s
        session = self.dialled(seconds)
        if session is None and first:
            why = f"said no HELLO in {seconds:g} s" if self.alive() else "exited before its HELLO"
            raise CannotStart(f"it {why}")
        if session is None:
            raise Broken(rule, f"the {self.role} did not say HELLO within {seconds:g} s")
        return session

    def dialled(self, seconds: float) -> Session | None:
        """Like `hello`, but None if no connection came in this time."""
        until_s = time.monotonic() + seconds
        while not self.greeting:
            if time.monotonic() > until_s:
                return None
            alive = self.alive()
            self.pump(0.02)
            if not alive and not self.greeting:
                return None
        session = self.greeting.pop(0)
        if session.broken is not None:
            raise session.broken
        if len(session.routing_id) != 16 or session.routing_id[0] == 0:
            raise Broken("T1", f"routing id {session.routing_id.hex()}")
        got = session.inbox.pop(0)
        if got.type is not T.HELLO:
            raise Broken("S1", f"the {self.role} began with {got.type.name}")
        if got.id != NO_ID:
            raise Broken("S1", f"HELLO with id {got.id.hex()}; expected zero")
        if got.body.role != self.role:
            raise Broken("S1", f"HELLO of a {got.body.role}; this is where a {self.role} connects")
        session.hello = got.body
        return session

    def welcome(
        self,
        session: Session,
        *,
        interval_s: float = 0.25,
        liveness: int = 12,
        window: int = 4096,
        **more: Any,
    ) -> None:
        """Answer HELLO with WELCOME."""
        session.id = new_id(self.random)
        bounds = {
            "request_bytes": limits.MAX_REQUEST_BYTES,
            "attachment_bytes": limits.MAX_ATTACHMENT_BYTES,
            "attachments_bytes": limits.MAX_ATTACHMENTS_BYTES,
            "attachments": limits.MAX_ATTACHMENTS,
            "inflight": 256,
        }
        body = {
            "version": 1,
            "broker": "kit",
            "heartbeat_interval_ms": int(interval_s * 1000),
            "liveness": liveness,
            "limits": bounds,
            "window": window,
            **more,
        }
        session.send(T.WELCOME, session.id, body)
        session.interval_s = interval_s
        session.silence_s = interval_s * liveness

    def wait(self, seconds: float, *sessions: Session) -> None:
        """Let time pass, with heartbeats; messages stay in the inboxes."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self.pump(min(0.02, max(0.0, until_s - time.monotonic())))
            for session in sessions:
                session.check()
