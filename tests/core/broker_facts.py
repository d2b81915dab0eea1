"""A broker core on a manual clock, with clients and workers that speak the protocol.

Every step checks the invariants. Nothing here depends on the core's internals.
"""

from __future__ import annotations

import random
from typing import Any

from broker.core.controller import BrokerCore
from broker.core.events import AccessChanged, Event, MessageReceived, Side, Tick
from broker.core.instructions import Instruction, Log, Send
from broker.core.settings import CoreSettings
from broker.protocol import codec, header, limits
from broker.protocol.header import Flag, Header, MessageType
from broker.protocol.messages import (
    Assign,
    Cancel,
    Credit,
    EndEvent,
    FailEvent,
    Finished,
    FinishReason,
    Goodbye,
    Heartbeat,
    Held,
    Hello,
    Interrupted,
    Kind,
    Ledger,
    ModelInfo,
    OutputEvent,
    Query,
    Refuse,
    Reject,
    Request,
    Resume,
    Timings,
    TokensEvent,
    Usage,
    Welcome,
    Window,
    WorkerState,
)

BODIES: dict[MessageType, type] = {
    MessageType.WELCOME: Welcome,
    MessageType.REFUSE: Refuse,
    MessageType.GOODBYE: Goodbye,
    MessageType.INTERRUPTED: Interrupted,
    MessageType.CANCEL: Cancel,
    MessageType.WINDOW: Window,
}


class Message:
    """A message from the broker."""

    def __init__(self, frames: tuple[bytes, ...]) -> None:
        self.header: Header = header.decode(frames[0])
        self.type = self.header.type
        self.id = self.header.id
        self.frames = frames

    @property
    def plain(self) -> Any:
        """The body as plain values."""
        return codec.unpack(self.frames[1], limits.MAX_REQUEST_BYTES)

    @property
    def body(self) -> Any:
        """The body, typed."""
        return codec.convert(self.plain, BODIES[self.type])

    @property
    def events(self) -> list[OutputEvent]:
        return codec.decode_events(self.frames[1], limits.MAX_OUTPUT_BYTES)

    @property
    def assign(self) -> Assign:
        return codec.convert(self.plain, Assign)

    def __repr__(self) -> str:
        return f"<{self.type.name} {self.plain}>"


class Bus:
    """A core, its clock, and its peers' messages."""

    def __init__(self, access: AccessChanged | None = None, **settings: Any) -> None:
        self.now_s = 1000.0
        self.core = BrokerCore(
            CoreSettings(**settings),
            generator=random.Random(7),
            access=access,
            now_s=self.now_s,
        )
        self.mail: dict[tuple[Side, bytes], list[Message]] = {}
        self.logs: list[Log] = []
        self.others: list[Instruction] = []
        self._ids = random.Random(11)

    def new_id(self) -> bytes:
        return b"\x01" + self._ids.randbytes(15)

    def handle(self, event: Event) -> None:
        for instruction in self.core.handle(event, self.now_s):
            match instruction:
                case Send(side, routing_id, frames):
                    self.mail.setdefault((side, routing_id), []).append(Message(frames))
                case Log():
                    self.logs.append(instruction)
                case _:
                    self.others.append(instruction)
        self.core.invariants()

    def wait(self, seconds: float) -> None:
        """Let time pass, with a tick at every deadline, while all peers are silent."""
        until_s = self.now_s + seconds
        while self.core.deadline_s() <= until_s:
            self.now_s = max(self.now_s, self.core.deadline_s())
            self.handle(Tick())
        self.now_s = until_s

    def client(self, name: str = "client", *, key: str = "") -> ClientPeer:
        client = ClientPeer(self, Side.FRONT, key)
        client.send(MessageType.HELLO, header.NO_ID, Hello(role="client", name=name))
        client.begin()
        return client

    def worker(
        self,
        name: str = "worker",
        *,
        models: tuple[str, ...] = ("demo",),
        slots: int = 1,
        holds: tuple[Held, ...] = (),
        grant: bool = True,
        brokers: int = 1,
        speed: float = 1.0,
        key: str = "",
    ) -> WorkerPeer:
        worker = WorkerPeer(self, Side.BACK, key)
        hello = Hello(
            role="worker",
            name=name,
            models=[ModelInfo(name=model) for model in models],
            capacity=slots,
            speed=speed,
            holds=list(holds),
            brokers=brokers,
        )
        worker.send(MessageType.HELLO, header.NO_ID, hello)
        worker.begin()
        if grant:
            worker.beat(state=WorkerState.READY)
            worker.grant(slots)
        return worker


class Peer:
    """One connection."""

    def __init__(self, bus: Bus, side: Side, key: str = "") -> None:
        self.bus = bus
        self.side = side
        self.key = key
        self.routing_id = bus.new_id()
        self.sequence = 0
        self.heard = 0
        self.id = header.NO_ID
        self.first: list[Message] = []
        #: Heartbeats received since they were last read.
        self.beats: list[Message] = []

    def begin(self) -> None:
        """Read the answer to HELLO."""
        self.first = self.receive()
        if self.first and self.first[0].type is MessageType.WELCOME:
            self.id = self.first[0].id

    @property
    def welcomed(self) -> bool:
        return self.id != header.NO_ID

    def send(self, type_: MessageType, id_: bytes, body: Any, *more: bytes, flags: int = 0) -> None:
        data = body if isinstance(body, bytes) else codec.encode(body)
        self.send_frames(header.encode(type_, id_, self.sequence, flags), data, *more)
        self.sequence += 1

    def send_frames(self, *frames: bytes) -> None:
        self.bus.handle(MessageReceived(self.side, self.routing_id, frames, self.key))

    def receive(self) -> list[Message]:
        """The messages since the last call, without heartbeats; checks their sequence numbers."""
        came = self.bus.mail.pop((self.side, self.routing_id), [])
        for message in came:
            if message.id != header.NO_ID or message.type is not MessageType.REFUSE:
                assert message.header.sequence == self.heard, "the broker skipped a number"
                self.heard += 1
        self.beats += [message for message in came if message.type is MessageType.HEARTBEAT]
        return [message for message in came if message.type is not MessageType.HEARTBEAT]

    def only(self, type_: MessageType) -> Message:
        """The only message received, which must have this type."""
        came = self.receive()
        assert [message.type for message in came] == [type_], came
        return came[0]

    def beat(self, **body: Any) -> None:
        self.send(MessageType.HEARTBEAT, self.id, Heartbeat(**body))

    def goodbye(self, reason: str = "closed") -> None:
        self.send(MessageType.GOODBYE, self.id, Goodbye(reason=reason))

    @property
    def known(self) -> bool:
        """Whether the broker has a session for this connection."""
        core = self.bus.core
        return self.routing_id in (core.clients if self.side is Side.FRONT else core.workers)


class ClientPeer(Peer):
    """A client."""

    def request(self, model: str = "demo", request_id: bytes = b"", **body: Any) -> bytes:
        request_id = request_id or self.bus.new_id()
        self.send(MessageType.REQUEST, request_id, a_request(model, **body))
        return request_id

    def resume(
        self,
        request_id: bytes,
        epoch: int = 1,
        *,
        model: str = "demo",
        tokens: int = 0,
        lost: tuple[str, ...] = (),
        lost_alone: tuple[str, ...] = (),
        holder: str = "",
        **body: Any,
    ) -> None:
        facts = Resume(
            epoch=epoch,
            token_ids=list(range(tokens)),
            lost_workers=list(lost),
            lost_alone=list(lost_alone),
            holder=holder,
        )
        self.send(MessageType.RESUME, request_id, a_request(model, resume=facts, **body))

    def cancel(self, request_id: bytes) -> None:
        self.send(MessageType.CANCEL, request_id, Cancel())

    def query(self, verb: str, **args: Any) -> Any:
        """The result of a query, or its error."""
        self.send(MessageType.QUERY, self.bus.new_id(), Query(verb=verb, args=args))
        answers = [m for m in self.receive() if m.type is MessageType.ANSWER]
        assert len(answers) == 1
        return answers[0].plain.get("result", answers[0].plain.get("error"))

    def events(self) -> list[OutputEvent]:
        """The events of all OUTPUT received."""
        return [
            event
            for message in self.receive()
            if message.type is MessageType.OUTPUT
            for event in message.events
        ]

    def failure(self) -> str:
        """The error code of the only event received, a FAIL."""
        (event,) = self.events()
        assert isinstance(event, FailEvent), event
        return event.error.code


class WorkerPeer(Peer):
    """A worker that grants and sends what the test tells it to."""

    def __init__(self, bus: Bus, side: Side, key: str = "") -> None:
        super().__init__(bus, side, key)
        self.granted = 0

    def beats_told(self) -> list[dict[str, int]]:
        """The bodies of the heartbeats since the last call."""
        self.receive()
        came, self.beats = self.beats, []
        return [message.plain for message in came]

    def recall(self, credit: int) -> None:
        """Recall credit; the number is cumulative."""
        self.send(MessageType.CREDIT, self.id, Credit(granted=self.granted, recalled=credit))

    def grant(self, more: int = 1) -> None:
        self.granted += more
        self.send(MessageType.CREDIT, self.id, Credit(granted=self.granted))

    def assigned(self) -> list[Message]:
        return [m for m in self.receive() if m.type is MessageType.ASSIGN]

    def assigned_ids(self) -> list[bytes]:
        return [message.id for message in self.assigned()]

    def output(self, reply_to: bytes, *events: OutputEvent, ledger: Ledger | None = None) -> None:
        """Send OUTPUT as the loop handles it: the fast path first."""
        body = codec.encode_events(list(events))
        if ledger is not None:
            self.send(MessageType.OUTPUT, reply_to, body, codec.encode(ledger), flags=Flag.LEDGER)
            return
        head = header.encode(MessageType.OUTPUT, reply_to, self.sequence)
        way = self.bus.core.forward(self.routing_id, head, self.bus.now_s)
        if way is None:
            self.send(MessageType.OUTPUT, reply_to, body)
            return
        self.sequence += 1
        client_id, client_head = way
        mail = self.bus.mail.setdefault((Side.FRONT, client_id), [])
        mail.append(Message((client_head, body)))
        self.bus.core.invariants()

    def tokens(self, assign: Message, offset: int = 0, count: int = 1) -> None:
        event = TokensEvent(assign.id, assign.assign.epoch, offset, [7] * count, "x" * count)
        self.output(assign.assign.reply_to, event)

    def first_token(self, assign: Message, offset: int = 0) -> None:
        """Send the first token of a run, with the ledger that reports it."""
        event = TokensEvent(assign.id, assign.assign.epoch, offset, [7], "x")
        ledger = Ledger(self.granted, [], [assign.id])
        self.output(assign.assign.reply_to, event, ledger=ledger)

    def finish(
        self,
        assign: Message,
        *,
        prompt: int = 3,
        tokens: int = 0,
        outcome: str = "stop",
        grant: bool = True,
    ) -> None:
        """Send END, with a ledger that reports the request finished and grants its slot again."""
        self.granted += grant
        reason = FinishReason(outcome) if outcome in list(FinishReason) else FinishReason.STOP
        epoch = assign.assign.epoch
        end = EndEvent(assign.id, epoch, tokens, reason, "", Usage(), Timings())
        finished = Finished(assign.id, outcome, prompt, tokens)
        ledger = Ledger(self.granted, [finished])
        self.output(assign.assign.reply_to, end, ledger=ledger)

    def stopped(self, request_id: bytes, reply_to: bytes = b"") -> None:
        """Report that a cancelled run has ended, and grant its slot again."""
        self.granted += 1
        ledger = Ledger(self.granted, [Finished(request_id, "cancelled")])
        self.output(reply_to or self.bus.new_id(), ledger=ledger)

    def reject(self, assign: Message, code: str = "draining", *, retryable: bool = True) -> None:
        from broker.protocol.errors import ErrorInfo

        self.granted += 1
        error = ErrorInfo(code=code, message="no", retryable=retryable)
        body = Reject(error=error, granted=self.granted)
        self.send(MessageType.REJECT, assign.id, body)


def a_request(model: str = "demo", **body: Any) -> Request:
    """A valid body, unless told otherwise."""
    body.setdefault("window", 4096)
    if not {"kind", "messages", "token_ids", "inputs"} & set(body):
        body = {"prompt": "Once upon a time"} | body | {"kind": Kind.COMPLETE}
    return Request(model=model, **body)


def types(messages: list[Message]) -> list[str]:
    return [message.type.name for message in messages]
