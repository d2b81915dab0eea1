"""Cheap peers on plain sockets: no client library, no libzmq, no threads."""

from __future__ import annotations

import selectors
from collections.abc import Sequence

from broker.protocol import codec
from broker.protocol.header import NO_ID, Flag, MessageType, decode, encode
from broker.protocol.limits import MAX_ANSWER_BYTES, MAX_CONTROL_BYTES, MAX_OUTPUT_BYTES
from broker.protocol.messages import (
    Accepted,
    Assign,
    Credit,
    EndEvent,
    Finished,
    FinishReason,
    Heartbeat,
    Hello,
    Ledger,
    ModelInfo,
    OutputEvent,
    Request,
    Timings,
    TokensEvent,
    Usage,
    Welcome,
    WorkerState,
    new_id,
)
from tests.support.zmtp import Connection

WAIT_S = 20.0
"""Longest wait for a message from the broker."""


class Watch:
    """Waits for many peers at once. When you take a message from a peer, take all that were read
    with it."""

    def __init__(self, peers: Sequence[RawPeer]) -> None:
        self._selector = selectors.DefaultSelector()
        for peer in peers:
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    def readable(self) -> list[RawPeer]:
        """The peers that have received something; waits for the first."""
        ready = [key.data for key, _ in self._selector.select(WAIT_S)]
        if not ready:
            raise TimeoutError(f"nothing arrived in {WAIT_S} s")
        return ready

    def close(self) -> None:
        """Release the selector."""
        self._selector.close()


class RawPeer:
    """One session on one connection, without threads or timers: the caller sends heartbeats."""

    def __init__(self, endpoint: str) -> None:
        self.connection = Connection(endpoint, new_id(), WAIT_S)
        self.session = NO_ID
        #: Sequence number of the next message sent.
        self.sequence = 0
        #: For a worker: the slots granted so far.
        self.granted = 0

    def send(self, type_: MessageType, id_: bytes, *frames: bytes) -> None:
        """Send one message."""
        self.connection.send((encode(type_, id_, self.sequence), *frames))
        self.sequence += 1

    def receive(self) -> tuple[MessageType, bytes, list[bytes]]:
        """The next message: type, id, frames after the header. Raises `TimeoutError`."""
        head, *frames = self.connection.receive()
        header = decode(head)
        return header.type, header.id, frames

    def expect(self, wanted: MessageType) -> tuple[bytes, list[bytes]]:
        """The next message of this type; heartbeats and ACCEPTED before it are skipped."""
        passing = {MessageType.HEARTBEAT, MessageType.ACCEPTED} - {wanted}
        while True:
            type_, id_, frames = self.receive()
            if type_ == wanted:
                return id_, frames
            if type_ not in passing:
                body = codec.unpack(frames[0], MAX_ANSWER_BYTES)
                raise ConnectionError(
                    f"expected {wanted.name}, the broker sent {type_.name}: {body}"
                )

    def hello(
        self,
        role: str,
        name: str,
        *,
        models: list[ModelInfo] | None = None,
        capacity: int = 0,
    ) -> Welcome:
        """Open the session."""
        self.say_hello(role, name, models=models, capacity=capacity)
        return self.welcomed()

    def say_hello(
        self,
        role: str,
        name: str,
        *,
        models: list[ModelInfo] | None = None,
        capacity: int = 0,
    ) -> None:
        """The first half of `hello`, which does not wait."""
        hello = Hello(role=role, name=name, models=models or [], capacity=capacity)
        self.send(MessageType.HELLO, NO_ID, codec.encode(hello))

    def welcomed(self) -> Welcome:
        """The second half of `hello`."""
        self.session, frames = self.expect(MessageType.WELCOME)
        return codec.decode(Welcome, frames[0], MAX_CONTROL_BYTES)

    def ready(self, models: list[ModelInfo], capacity: int) -> None:
        """Worker: say that it is ready, and grant its capacity."""
        beat = Heartbeat(state=WorkerState.READY, granted=0, models=models, capacity=capacity)
        self.send(MessageType.HEARTBEAT, self.session, codec.encode(beat))
        self.credit(capacity)

    def credit(self, granted: int) -> None:
        """Worker: grant slots; the number is cumulative."""
        self.granted = granted
        self.send(MessageType.CREDIT, self.session, codec.encode(Credit(granted=granted)))

    def beat(self, worker: bool = False) -> None:
        """Send a heartbeat."""
        body = codec.encode(Heartbeat(state=WorkerState.READY)) if worker else b"\x80"
        self.send(MessageType.HEARTBEAT, self.session, body)

    def request(self, model: str, max_tokens: int = 1 << 20) -> bytes:
        """Send a REQUEST for a completion; returns its id."""
        request_id = new_id()
        body = {
            "model": model,
            "kind": "complete",
            "prompt": "x",
            "params": {"max_tokens": max_tokens},
            "window": 1 << 30,
        }
        self.send(MessageType.REQUEST, request_id, codec.pack(body))
        return request_id

    def assigned(self) -> tuple[bytes, Assign, Request]:
        """Worker: the next ASSIGN, as request id, assignment and request."""
        id_, frames = self.expect(MessageType.ASSIGN)
        return (
            id_,
            codec.decode(Assign, frames[0], MAX_CONTROL_BYTES),
            codec.decode(Request, frames[1], MAX_ANSWER_BYTES),
        )

    def accepted(self) -> Accepted:
        """Client: the next ACCEPTED; its `worker` is empty while the request is queued."""
        _, frames = self.expect(MessageType.ACCEPTED)
        return codec.decode(Accepted, frames[0], MAX_CONTROL_BYTES)

    def output(self) -> list[OutputEvent]:
        """Client: the events of the next OUTPUT."""
        _, frames = self.expect(MessageType.OUTPUT)
        return codec.decode_events(frames[0], MAX_OUTPUT_BYTES)

    def answer(self, reply_to: bytes, request_id: bytes, granted: int) -> None:
        """Worker: answer with one token and the end, and grant the slot again."""
        events = [
            TokensEvent(request_id, 0, 0, [1234], " word"),
            EndEvent(request_id, 0, 1, FinishReason.LENGTH, "", Usage(), Timings()),
        ]
        ledger = Ledger(granted, [Finished(request_id, "length", 1, 1)], [request_id])
        head = encode(MessageType.OUTPUT, reply_to, self.sequence, Flag.LEDGER)
        self.connection.send((head, codec.encode_events(events), codec.encode(ledger)))
        self.sequence += 1

    def close(self) -> None:
        """Close the connection, without GOODBYE; the caller may send one."""
        self.connection.close()
