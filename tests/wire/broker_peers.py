"""A broker process, and raw DEALER peers that speak the protocol frame by frame."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import zmq

from broker.protocol import codec, header, limits
from broker.protocol.header import Header, MessageType
from broker.protocol.messages import (
    Assign,
    Credit,
    EndEvent,
    Finished,
    FinishReason,
    Heartbeat,
    Hello,
    Kind,
    Ledger,
    ModelInfo,
    Query,
    Request,
    Timings,
    TokensEvent,
    Usage,
    new_id,
)
from tests.harness import PATIENCE_S, Bus


class BrokerProcess(Bus):
    """`python -m broker` on free addresses, without workers."""

    def __init__(self, folder: Path, *options: str) -> None:
        # Raw peers send no heartbeats, so they count as silent only if a test asks for it.
        for party in ("worker", "client"):
            if f"--{party}-heartbeat-s" not in options:
                options += (f"--{party}-heartbeat-s", str(PATIENCE_S))
        super().__init__(folder, *options)
        self.process = self.start_broker().popen
        self.ready = json.loads((folder / "ready-1.json").read_text())

    @property
    def log(self) -> str:
        return self.broker.log()

    def signal(self, number: signal.Signals) -> None:
        self.broker.signal(number)


@contextmanager
def running_broker(folder: Path, *options: str) -> Iterator[BrokerProcess]:
    with BrokerProcess(folder, *options) as broker:
        yield broker


@contextmanager
def peers_context() -> Iterator[zmq.Context[Any]]:
    """A context for raw peers; closes the sockets that they leave open."""
    with zmq.Context() as context:
        try:
            yield context
        finally:
            while RawPeer.open_sockets:
                RawPeer.open_sockets.pop().close(linger=0)


class RawPeer:
    """One DEALER connection, driven by the test. It sends no heartbeats by itself."""

    open_sockets: ClassVar[list[zmq.Socket[Any]]] = []

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        *,
        keys: tuple[bytes, bytes, bytes] | None = None,
        receive_limit: int = 1000,
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.open_sockets.append(self.socket)
        self.socket.setsockopt(zmq.ROUTING_ID, new_id())
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, receive_limit)
        if keys is not None:
            server, public, secret = keys
            self.socket.setsockopt(zmq.CURVE_SERVERKEY, server)
            self.socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self.socket.connect(address)
        self.sequence = 0
        self.id = header.NO_ID

    def send(self, type_: MessageType, id_: bytes, body: Any, *more: bytes, flags: int = 0) -> None:
        data = body if isinstance(body, bytes) else codec.encode(body)
        head = header.encode(type_, id_, self.sequence, flags)
        self.socket.send_multipart([head, data, *more])
        self.sequence += 1

    def receive(self, patience_s: float = PATIENCE_S) -> tuple[Header, list[bytes]]:
        """The next message that is not a heartbeat."""
        until_s = time.monotonic() + patience_s
        while True:
            left_ms = max(0, int((until_s - time.monotonic()) * 1000))
            assert self.socket.poll(left_ms), "no message came"
            head, *frames = self.socket.recv_multipart()
            decoded = header.decode(head)
            if decoded.type is not MessageType.HEARTBEAT:
                return decoded, frames

    def expect(self, type_: MessageType, patience_s: float = PATIENCE_S) -> tuple[Header, Any]:
        """The next message, which must be of this type; its body is returned as plain values."""
        head, frames = self.receive(patience_s)
        body = codec.unpack(frames[0], limits.MAX_REQUEST_BYTES)
        assert head.type is type_, (head, body)
        return head, body

    def hello(self, **body: Any) -> dict[str, Any]:
        self.send(MessageType.HELLO, header.NO_ID, Hello(**body))
        head, welcome = self.expect(MessageType.WELCOME)
        self.id = head.id
        return dict(welcome)

    def beat(self) -> None:
        self.send(MessageType.HEARTBEAT, self.id, Heartbeat())

    def close(self) -> None:
        self.socket.close(linger=0)


class RawClient(RawPeer):
    """A client driven by the test."""

    def request(self, model: str = "demo", *attachments: bytes, **body: Any) -> bytes:
        request_id = new_id()
        given = {"kind": Kind.COMPLETE, "prompt": "Once", "window": 1 << 40} | body
        value = Request(model=model, attachments=[{} for _ in attachments], **given)
        self.send(MessageType.REQUEST, request_id, value, *attachments)
        return request_id

    def query(self, verb: str, **args: Any) -> Any:
        self.send(MessageType.QUERY, new_id(), Query(verb=verb, args=args))
        while True:
            head, frames = self.receive()
            if head.type is MessageType.ANSWER:
                answer = codec.unpack(frames[0], limits.MAX_ANSWER_BYTES)
                return answer.get("result", answer.get("error"))


class RawWorker(RawPeer):
    """A worker driven by the test."""

    granted = 0

    def join(
        self, name: str = "worker", *, slots: int = 4, models: Sequence[str] = ("demo",)
    ) -> None:
        self.hello(
            role="worker", name=name, models=[ModelInfo(name=m) for m in models], capacity=slots
        )
        self.granted = slots
        self.send(MessageType.CREDIT, self.id, Credit(granted=slots))

    def take(self) -> tuple[bytes, Assign, list[bytes]]:
        """The next ASSIGN: request id, assignment, the client's frames."""
        head, frames = self.receive()
        assert head.type is MessageType.ASSIGN, head
        return head.id, codec.decode(Assign, frames[0], limits.MAX_CONTROL_BYTES), frames[1:]

    def tokens(self, request_id: bytes, reply_to: bytes, offset: int, text: str = "x") -> None:
        event = TokensEvent(request_id, 0, offset, [1], text)
        self.send(MessageType.OUTPUT, reply_to, codec.encode_events([event]))

    def finish(self, request_id: bytes, reply_to: bytes, tokens: int) -> None:
        self.granted += 1
        end = EndEvent(request_id, 0, tokens, FinishReason.STOP, "", Usage(), Timings())
        ledger = Ledger(self.granted, [Finished(request_id, "stop", 1, tokens)])
        body, frame = codec.encode_events([end]), codec.encode(ledger)
        self.send(MessageType.OUTPUT, reply_to, body, frame, flags=1)


def stream_works(client: RawClient, worker: RawWorker) -> None:
    """Run one whole stream from end to end."""
    request_id = client.request()
    assigned_id, assign, _ = worker.take()
    assert assigned_id == request_id
    for offset in range(3):
        worker.tokens(request_id, assign.reply_to, offset)
    worker.finish(request_id, assign.reply_to, 3)
    client.expect(MessageType.ACCEPTED)
    events = []
    for _ in range(4):
        head, frames = client.receive()
        assert head.type is MessageType.OUTPUT
        events += codec.decode_events(frames[0], limits.MAX_OUTPUT_BYTES)
    assert [event.offset for event in events] == [0, 1, 2, 3]
    assert {event.request_id for event in events} == {request_id}
