"""A client's session with a broker played by the test, on a manual clock."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from broker.peer.connection import State
from broker.protocol import codec, header, limits, messages
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import MessageType
from broker.protocol.messages import EndEvent, FailEvent, FinishReason, OutputEvent, TokensEvent
from client.core import events
from client.core.events import Arrived, CloseSocket, Deliver, End, OpenSocket, Send
from client.core.session import ClientSession
from client.options import Limits, Retry, Timeout

T = MessageType  # tests use this a lot
SESSION = bytes([9]) * 16
LIMITS = messages.BusLimits(
    request_bytes=10_000,
    attachment_bytes=1000,
    attachments_bytes=1500,
    attachments=4,
    inflight=3,
)
BODIES: dict[MessageType, type[msgspec.Struct]] = {
    T.HELLO: messages.Hello,
    T.HEARTBEAT: messages.Heartbeat,
    T.GOODBYE: messages.Goodbye,
    T.REQUEST: messages.Request,
    T.RESUME: messages.Request,
    T.CANCEL: messages.Cancel,
    T.WINDOW: messages.Window,
    T.QUERY: messages.Query,
}


def rid(number: int) -> bytes:
    return bytes([1]) + number.to_bytes(15, "big")


class Wire:
    """A session on a manual clock, and a broker played by the test."""

    def __init__(self, *brokers: str, seed: int = 1, **client_limits: Any) -> None:
        self.session = ClientSession(
            brokers or ("tcp://a:1",),
            name="test",
            client_limits=Limits(**client_limits),
            generator=random.Random(seed),
        )
        self.now_s = 1000.0
        #: Instructions since they were last read.
        self.opened: list[str] = []
        self.closed = 0
        self.sent: list[tuple[MessageType, bytes, Any]] = []
        self.got: dict[bytes, list[Any]] = {}
        self.final: dict[bytes, int] = {}
        self._in = 0
        self._out = 0
        #: The epochs of each request, in order. Tests call them 0, 1, 2, ...
        self.epochs: dict[bytes, list[int]] = {}

    # --- events ---

    def tell(self, event: events.Event) -> None:
        instructions = self.session.handle(event, self.now_s)
        self.session.invariants()
        for instruction in instructions:
            match instruction:
                case OpenSocket(address):
                    self.opened.append(address)
                    self._in = self._out = 0
                case CloseSocket():
                    self.closed += 1
                case Send(frames):
                    head = header.decode(frames[0])
                    assert head.sequence == self._out, "the client skips a sequence number"
                    self._out += 1
                    body = codec.decode(BODIES[head.type], frames[1], limits.MAX_REQUEST_BYTES)
                    if head.type is T.RESUME:
                        body = self._resumed(head.id, body)
                    self.sent.append((head.type, head.id, body))
                case Arrived(arrived):
                    for event in arrived:
                        assert not self.final.get(event.request_id), "something follows the end"
                        self.got.setdefault(event.request_id, []).append(event)
                case Deliver(id_, items, final):
                    assert not self.final.get(id_), "something follows the end"
                    self.got.setdefault(id_, []).extend(items)
                    self.final[id_] = final

    def ask(self, number: int = 1, model: str = "m", **options: Any) -> bytes:
        """The application makes a request."""
        timeout = options.pop("timeout", Timeout())
        retry = options.pop("retry", Retry())
        window = options.pop("window", None)
        attachments = options.pop("attachments", ())
        request = messages.Request(model=model, prompt="hi", window=1, **options)
        made = events.RequestMade(rid(number), request, attachments, timeout, retry, window)
        self.tell(made)
        return rid(number)

    def _resumed(self, id_: bytes, body: messages.Request) -> messages.Request:
        """The RESUME with its epoch replaced by its number; the epoch must be higher than
        before."""
        assert body.resume is not None
        epochs = self.epochs.setdefault(id_, [0])
        assert body.resume.epoch - epochs[-1] >= 1 << 36
        epochs.append(body.resume.epoch)
        resume = msgspec.structs.replace(body.resume, epoch=len(epochs) - 1)
        return msgspec.structs.replace(body, resume=resume)

    def epoch(self, id_: bytes, number: int) -> int:
        """The epoch with this number; beyond the last, one that was never asked for."""
        epochs = self.epochs.get(id_, [0])
        return epochs[number] if number < len(epochs) else epochs[-1] + 1

    def message(self, type_: MessageType, id_: bytes, body: Any) -> None:
        """The broker sends a message."""
        if isinstance(body, messages.Interrupted):
            body = msgspec.structs.replace(body, epoch=self.epoch(id_, body.epoch))
        data = body if isinstance(body, bytes) else codec.encode(body)
        frames = (header.encode(type_, id_, self._in), data)
        self._in += 1
        self.tell(events.MessageReceived(frames))

    def output(self, *output_events: OutputEvent, route: bytes = SESSION) -> None:
        real = [
            msgspec.structs.replace(event, epoch=self.epoch(event.request_id, event.epoch))
            for event in output_events
        ]
        self.message(T.OUTPUT, route, codec.encode_events(real))

    def connect(self) -> None:
        """Connect an opened socket, and send WELCOME."""
        assert self.opened, "no socket was opened"
        self.tell(events.SocketOpened())
        self.welcome()

    def welcome(self, **changes: Any) -> None:
        body = messages.Welcome(
            version=1,
            broker="b",
            heartbeat_interval_ms=5000,
            liveness=3,
            limits=LIMITS,
            window=100,
        )
        self.message(T.WELCOME, SESSION, msgspec.structs.replace(body, **changes))

    def at(self, seconds: float) -> None:
        """Move the clock to this time, with a tick at each deadline."""
        until_s = self.now_s + seconds
        for _ in range(10_000):
            due_s = self.session.deadline_s()
            if due_s > until_s:
                break
            self.now_s = max(self.now_s, due_s)
            self.tell(events.Tick())
        else:
            raise AssertionError("the session never stops ticking")
        self.now_s = until_s

    def reopen(self) -> None:
        """Wait for the back-off, and connect again."""
        self.next_socket()
        self.connect()

    def next_socket(self) -> None:
        """Move the clock until a socket is opened."""
        while self.session.link is State.WAITING:
            self.now_s = max(self.now_s, self.session.deadline_s())
            self.tell(events.Tick())

    # --- instructions ---

    def take_sent(self, *types: MessageType) -> list[tuple[MessageType, bytes, Any]]:
        """The messages of these types sent since the last call."""
        sent, self.sent = self.sent, []
        return [item for item in sent if not types or item[0] in types]

    def text(self, id_: bytes) -> str:
        return "".join(item.text for item in self.got[id_] if isinstance(item, TokensEvent | End))

    def last(self, id_: bytes) -> Any:
        assert self.final.get(id_), f"not over: {self.got.get(id_)}"
        return self.got[id_][-1]


def toks(id_: bytes, offset: int, text: str, epoch: int = 0) -> TokensEvent:
    return TokensEvent(id_, epoch, offset, [ord(c) for c in text], text)


def over(id_: bytes, offset: int, epoch: int = 0, text: str = "") -> EndEvent:
    return EndEvent(
        id_, epoch, offset, FinishReason.STOP, text, messages.Usage(), messages.Timings()
    )


def failed(id_: bytes, code: str, epoch: int = 0, **fields: Any) -> FailEvent:
    return FailEvent(id_, epoch, 0, ErrorInfo(code=code, message=f"{code} it is", **fields))


def gone(epoch: int = 0, worker: str = "w1", lost: bool = True) -> messages.Interrupted:
    error = ErrorInfo(code="worker_lost", message=f"{worker} died", retryable=True)
    return messages.Interrupted(epoch=epoch, worker=worker, lost=lost, error=error)


def check_resume(wire: Wire, id_: bytes, epoch: int, text: str = "abc") -> messages.Request:
    ((type_, sent_id, body),) = wire.take_sent(T.REQUEST, T.RESUME, T.CANCEL)
    assert (type_, sent_id) == (T.RESUME, id_)
    assert body.resume.epoch == epoch
    assert body.resume.token_ids == [ord(c) for c in text]
    assert body.resume.text_characters == len(text)
    assert body.prompt == "hi"
    return body  # type: ignore[no-any-return]
