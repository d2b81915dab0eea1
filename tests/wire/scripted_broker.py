"""A scripted broker for tests of the client: one ROUTER that answers as the test says.

It speaks `broker.protocol` and nothing more: it has no queue and no workers. Refusals, error codes,
silence and garbage are easier to script than to provoke.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import zmq

from broker.protocol import codec, header, limits, messages
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import NO_ID, MessageType
from broker.protocol.messages import EndEvent, FailEvent, FinishReason, OutputEvent, TokensEvent
from tests.harness import PATIENCE_S

LIMITS = messages.BusLimits(
    request_bytes=limits.MAX_REQUEST_BYTES,
    attachment_bytes=limits.MAX_ATTACHMENT_BYTES,
    attachments_bytes=limits.MAX_ATTACHMENTS_BYTES,
    attachments=limits.MAX_ATTACHMENTS,
    inflight=256,
)

#: Called for each REQUEST and RESUME: (broker, request id, body, attachments).
Answer = Callable[["ScriptedBroker", bytes, messages.Request, list[bytes]], None]


def tokens(
    request_id: bytes, text: str, offset: int = 0, epoch: int = 0, count: int | None = None
) -> TokensEvent:
    """A TOKENS event with one token per character, or with `count` tokens."""
    ids = [ord(c) for c in text] if count is None else list(range(count))
    return TokensEvent(request_id, epoch, offset, ids, text)


def end(
    request_id: bytes, offset: int, epoch: int = 0, reason: FinishReason = FinishReason.STOP
) -> EndEvent:
    usage = messages.Usage(prompt_tokens=1, completion_tokens=offset)
    return EndEvent(request_id, epoch, offset, reason, "", usage, messages.Timings())


def spell(broker: ScriptedBroker, request_id: bytes, request: messages.Request, _: object) -> None:
    """Answer a request with its own prompt, one character per token, from where it was resumed."""
    text = request.prompt or str((request.messages or [messages.Message(role="user")])[-1].content)
    resume = request.resume
    start = len(resume.token_ids) if resume else 0
    epoch = resume.epoch if resume else 0
    broker.send(MessageType.ACCEPTED, request_id, messages.Accepted(worker="w1"))
    events: list[OutputEvent] = [
        tokens(request_id, character, offset, epoch)
        for offset, character in enumerate(text)
        if offset >= start
    ]
    broker.output(*events, end(request_id, len(text), epoch))


def endless(
    broker: ScriptedBroker, request_id: bytes, request: messages.Request, _: object
) -> None:
    """Start an answer and leave it open."""
    broker.send(MessageType.ACCEPTED, request_id, messages.Accepted(worker="w1"))
    broker.output(tokens(request_id, "abc"))


def silent(*_: object) -> None:
    """Never answer."""


def fail(error: ErrorInfo) -> Answer:
    """Answer every request with an error."""

    def answer(
        broker: ScriptedBroker, request_id: bytes, request: messages.Request, _: object
    ) -> None:
        epoch = request.resume.epoch if request.resume else 0
        broker.output(FailEvent(request_id, epoch, 0, error))

    return answer


class ScriptedBroker:
    """Runs in its own thread while the `with` block lasts."""

    def __init__(
        self,
        answer: Answer = spell,
        *,
        address: str = "tcp://127.0.0.1:*",
        window: int = limits.DEFAULT_WINDOW_TOKENS,
        bus_limits: messages.BusLimits = LIMITS,
        refuse: messages.Refuse | None = None,
        mute: bool = False,
        models: tuple[str, ...] = ("demo",),
    ) -> None:
        self._answer = answer
        self._window = window
        self._limits = bus_limits
        self._refuse = refuse
        self._mute = mute
        self._models = models
        #: Every message received, in order: (type, id, body bytes).
        self.seen: list[tuple[MessageType, bytes, bytes]] = []
        self.failure: BaseException | None = None
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self._router.bind(address)
        self.address: str = self._router.last_endpoint.decode()
        self._peer = b""
        self._sequences: dict[bytes, int] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    # --- called by the script, in the thread ---

    def send(self, type_: MessageType, id_: bytes, body: object) -> None:
        self.send_bytes(type_, id_, codec.encode(body))

    def send_bytes(self, type_: MessageType, id_: bytes, body: bytes) -> None:
        sequence = self._sequences.get(self._peer, 0)
        self._sequences[self._peer] = sequence + 1
        self._router.send_multipart((self._peer, header.encode(type_, id_, sequence), body))

    def output(self, *events: OutputEvent) -> None:
        self.send_bytes(MessageType.OUTPUT, NO_ID, codec.encode_events(list(events)))

    # --- called by the test ---

    def wait_for(
        self, type_: MessageType, count: int = 1, timeout_s: float = PATIENCE_S
    ) -> list[bytes]:
        """The bodies of the messages of this type, once there are `count` of them."""

        def bodies() -> list[bytes]:
            return [body for seen, _, body in self.seen if seen is type_]

        with self._changed:
            arrived = self._changed.wait_for(lambda: len(bodies()) >= count, timeout_s)
        assert arrived, f"{len(bodies())} of {count} {type_.name}; seen {self.names()}"
        return bodies()

    def names(self) -> list[str]:
        return [type_.name for type_, _, _ in self.seen]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Vanish without a message, like a killed broker."""
        self._stop.set()
        self._thread.join()
        self._router.close(0)
        self._context.term()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if self._router.poll(20):
                    self._peer, *frames = self._router.recv_multipart()
                    self._take(frames)
        except BaseException as error:
            self.failure = error

    def _take(self, frames: list[bytes]) -> None:
        head = header.decode(frames[0])
        if not self._mute:
            self._respond(head, frames)
        with self._changed:
            self.seen.append((head.type, head.id, frames[1]))
            self._changed.notify_all()

    def _respond(self, head: header.Header, frames: list[bytes]) -> None:
        match head.type:
            case MessageType.HELLO if self._refuse is not None:
                self.send(MessageType.REFUSE, NO_ID, self._refuse)
            case MessageType.HELLO:
                welcome = messages.Welcome(
                    version=1,
                    broker="scripted",
                    heartbeat_interval_ms=60_000,
                    liveness=3,
                    limits=self._limits,
                    window=self._window,
                )
                self.send(MessageType.WELCOME, messages.new_id(), welcome)
            case MessageType.REQUEST | MessageType.RESUME:
                request = codec.decode(messages.Request, frames[1], limits.MAX_REQUEST_BYTES)
                self._answer(self, head.id, request, frames[2:])
            case MessageType.CANCEL:  # always answered (SPEC.md section 6.2)
                self.output(end(head.id, 0, reason=FinishReason.CANCELLED))
            case MessageType.QUERY:
                query = codec.decode(messages.Query, frames[1], limits.MAX_CONTROL_BYTES)
                rows = [{"name": name} for name in self._models]
                known = query.verb == "bus.models"
                error = ErrorInfo(code="invalid_request", message=f"unknown verb {query.verb!r}")
                answer = messages.Answer(result=rows) if known else messages.Answer(error=error)
                self.send(MessageType.ANSWER, head.id, answer)


def request_of(broker: ScriptedBroker, index: int = -1) -> messages.Request:
    """The latest REQUEST that the broker got."""
    body = broker.wait_for(MessageType.REQUEST)[index]
    return codec.decode(messages.Request, body, limits.MAX_REQUEST_BYTES)
