"""A worker's core with brokers and an engine played by the test, on a manual clock.

The brokers speak the real protocol: their messages are encoded, and the worker's are decoded and
checked (sequence numbers, credit), so that a test deals only with decoded messages and events.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

from broker.protocol import codec, header
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import NO_ID, Flag, MessageType
from broker.protocol.messages import (
    Assign,
    BusLimits,
    Cancel,
    Credit,
    Drain,
    EndEvent,
    FailEvent,
    Goodbye,
    Heartbeat,
    Hello,
    ModelInfo,
    OutputEvent,
    Params,
    Refuse,
    Reject,
    Request,
    Resume,
    TokensEvent,
    Welcome,
    Window,
)
from worker.core import events, instructions
from worker.core.session import WorkerCore
from worker.core.settings import Settings
from worker.engines.base import Capabilities
from worker.engines.events import END, FAIL, TOKENS

MODEL = "demo"
ROUTE = b"\x11" * 16
OTHER_ROUTE = b"\x22" * 16


def request_id(number: int) -> bytes:
    """The id of the test's n-th request."""
    return bytes((1,)) + number.to_bytes(15, "big")


def body(
    window: int = 1 << 20,
    resume: Resume | None = None,
    model: str = MODEL,
    **params: Any,
) -> bytes:
    """A client's REQUEST or RESUME body."""
    return codec.encode(
        Request(model=model, prompt="p", window=window, resume=resume, params=Params(**params))
    )


def resume(epoch: int, tokens: list[int], characters: int, prompt_seen: bool = False) -> Resume:
    """The RESUME of a client that has this much."""
    return Resume(
        epoch=epoch, token_ids=tokens, text_characters=characters, prompt_seen=prompt_seen
    )


@dataclass
class Answer:
    """One request's answer as a client assembles it (SPEC.md section 6.1)."""

    epoch: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    end: EndEvent | FailEvent | None = None

    def take(self, event: OutputEvent) -> None:
        """Add the next event; a gap or a repetition fails the test."""
        if event.epoch != self.epoch:
            return
        assert self.end is None, "an event after the end"
        if isinstance(event, TokensEvent):
            assert event.offset == len(self.token_ids), "a gap or a repetition"
            self.token_ids += event.token_ids
            self.text += event.text
            self.logprobs += event.logprobs or []
        elif isinstance(event, EndEvent):
            assert event.offset == len(self.token_ids)
            self.text += event.text
            self.end = event
        elif isinstance(event, FailEvent):
            self.end = event

    def resume(self) -> Resume:
        """The RESUME for it; from now on only the new epoch counts."""
        self.epoch += 1
        return resume(self.epoch, list(self.token_ids), len(self.text))


class Broker:
    """One broker: a session's two counters, its view of the credit, and the messages received."""

    def __init__(self, world: World, index: int) -> None:
        self.world = world
        self.index = index
        self.session = NO_ID
        self.granted = 0
        self.assigned = 0
        self.returned = 0
        self.messages: list[tuple[header.Header, Any]] = []
        self.finished: list[tuple[bytes, str]] = []
        self.started: list[bytes] = []
        self.outputs: list[tuple[bytes, list[OutputEvent]]] = []
        self.answers: dict[bytes, Answer] = {}
        self.routes: dict[int, bytes] = {}
        self.up = False
        #: How many sessions there have been.
        self.sessions = 0
        self._sent = self._heard = 0

    @property
    def free(self) -> int:
        return self.granted - self.assigned - self.returned

    def came(self, type_: MessageType) -> list[Any]:
        """The bodies of all messages of this type."""
        return [content for head, content in self.messages if head.type is type_]

    def answer(self, number: int) -> Answer:
        return self.answers.setdefault(request_id(number), Answer())

    # --- sending ----------------------------------------------------------------------------------

    def say(self, type_: MessageType, id_: bytes, *frames: bytes) -> None:
        head = header.encode(type_, id_, self._sent)
        self._sent += 1
        self.world.tell(events.MessageReceived(self.index, (head, *frames)))

    def connect(self, welcome: bool = True) -> None:
        """Connect the worker's socket, and answer its HELLO."""
        assert self.index in self.world.sockets, "the worker opened no socket"
        self.up = True
        self.sessions += 1
        self._sent = self._heard = 0
        self.granted = self.assigned = self.returned = 0
        self.world.tell(events.Connected(self.index))
        if welcome:
            self.session = bytes((9, self.index)) + bytes(14)
            self.say(MessageType.WELCOME, self.session, codec.encode(WELCOME))

    def lose(self) -> None:
        """Break the connection."""
        self.up = False
        self.world.tell(events.Disconnected(self.index, "reset"))

    def assign(
        self,
        number: int,
        route: bytes = ROUTE,
        epoch: int = 0,
        attach: bool = False,
        ttl_ms: int | None = None,
        attachments: tuple[bytes, ...] = (),
        request: bytes | None = None,
        **fields: Any,
    ) -> None:
        """ASSIGN a request; `fields` are set in the client's body."""
        if not attach:
            self.assigned += 1
        given: Resume | None = fields.get("resume")
        seen = self.answer(number)
        if given is not None:
            epoch = given.epoch
        elif epoch == 0 and route != self.routes.get(number, route):
            given = resume(1, [], 0)  # another client with the same id has nothing
        if given is not None:
            del seen.token_ids[len(given.token_ids) :]
            seen.text = seen.text[: given.text_characters]
            seen.end = None
        self.routes[number] = route
        assign = Assign(reply_to=route, epoch=epoch, ttl_ms=ttl_ms, attach=attach)
        seen.epoch = epoch
        self.say(
            MessageType.ASSIGN,
            request_id(number),
            codec.encode(assign),
            body(**fields) if request is None else request,
            *attachments,
        )

    def cancel(self, number: int) -> None:
        self.say(MessageType.CANCEL, request_id(number), codec.encode(Cancel()))

    def window(self, number: int, limit: int) -> None:
        self.say(MessageType.WINDOW, request_id(number), codec.encode(Window(limit=limit)))

    def beat(self, **fields: int) -> None:
        """Send a heartbeat; without `fields`, like a broker that knows of no others."""
        fields = {"returned": self.returned} | fields
        self.say(MessageType.HEARTBEAT, self.session, codec.encode(Heartbeat(**fields)))

    def give_back(self, credit: int, answers: int | None = None) -> None:
        """Answer a recall."""
        self.returned += credit
        self.beat(recalled=credit if answers is None else answers)

    def drain(self, deadline_ms: int | None = None) -> None:
        message = Drain(reason="test", deadline_ms=deadline_ms)
        self.say(MessageType.DRAIN, self.session, codec.encode(message))

    def goodbye(self) -> None:
        self.say(MessageType.GOODBYE, self.session, codec.encode(Goodbye(reason="shutdown")))

    def refuse(self, fatal: bool, retry_after_ms: int | None = None) -> None:
        error = ErrorInfo(code="forbidden", message="no", retry_after_ms=retry_after_ms)
        self.say(MessageType.REFUSE, NO_ID, codec.encode(Refuse(error=error, fatal=fatal)))

    # --- receiving --------------------------------------------------------------------------------

    def hear(self, frames: tuple[bytes, ...]) -> None:
        head = header.decode(frames[0])
        assert head.sequence == self._heard, "the worker's sequence has a gap"
        self._heard += 1
        if head.type is MessageType.OUTPUT:
            arrived = codec.decode_events(frames[1], 1 << 20)
            self.outputs.append((head.id, arrived))
            for event in arrived:
                self.answers.setdefault(event.request_id, Answer()).take(event)
            if head.flags & Flag.LEDGER:
                ledger = codec.decode_ledger(frames[2], 1 << 20)
                self._grant(ledger.granted)
                self.finished += [(f.request_id, f.outcome) for f in ledger.finished]
                self.started += ledger.started
            else:
                assert len(frames) == 2
            self.messages.append((head, arrived))
            return
        content = codec.decode(TYPES[head.type], frames[1], 1 << 22)
        self.messages.append((head, content))
        granted = getattr(content, "granted", None)
        if granted is not None:
            self._grant(granted)

    def _grant(self, granted: int) -> None:
        assert granted >= self.granted, "credit fell"
        self.granted = granted


TYPES: dict[MessageType, type] = {
    MessageType.HELLO: Hello,
    MessageType.HEARTBEAT: Heartbeat,
    MessageType.GOODBYE: Goodbye,
    MessageType.DRAIN: Drain,
    MessageType.CREDIT: Credit,
    MessageType.REJECT: Reject,
}
WELCOME = Welcome(
    version=1,
    broker="b",
    heartbeat_interval_ms=1000,
    liveness=5,
    limits=BusLimits(
        request_bytes=1 << 23,
        attachment_bytes=1 << 24,
        attachments_bytes=1 << 26,
        attachments=16,
        inflight=256,
    ),
    window=4096,
)


class World:
    """The core, its brokers, its engine and the clock."""

    def __init__(self, brokers: int = 1, capacity: int = 2, seed: int = 7, **settings: Any) -> None:
        self.now_s = 1000.0
        self.capacity = capacity
        addresses = tuple(f"tcp://b{index}:1" for index in range(brokers))
        self.core = WorkerCore(
            Settings(name="w", brokers=addresses, models=(MODEL,), **settings),
            self.now_s,
            random.Random(seed),
        )
        self.brokers = [Broker(self, index) for index in range(brokers)]
        self.sockets: set[int] = set()
        #: The engine's jobs: the body of the request by job id.
        self.jobs: dict[bytes, bytes] = {}
        self.attachments: dict[bytes, tuple[bytes, ...]] = {}
        self.cancels: list[bytes] = []
        self.restarts: list[str] = []
        self.logs: list[instructions.Log] = []
        self.exit: instructions.Exit | None = None

    # --- events -----------------------------------------------------------------------------------

    def tell(self, event: events.Event) -> None:
        for instruction in self.core.handle(event, self.now_s):
            self._do(instruction)
        if self.exit is None:
            self.core.invariants()

    def _do(self, instruction: instructions.Instruction) -> None:
        match instruction:
            case instructions.Send(broker, frames):
                assert broker in self.sockets, "sent to a closed socket"
                self.brokers[broker].hear(frames)
            case instructions.OpenSocket(broker):
                assert broker not in self.sockets, "two sockets to one broker"
                self.sockets.add(broker)
            case instructions.CloseSocket(broker):
                self.sockets.remove(broker)
                self.brokers[broker].up = False
            case instructions.EngineAdd(job_id, content, attachments):
                assert job_id not in self.jobs, "a job was added twice"
                self.jobs[job_id] = content
                self.attachments[job_id] = attachments
                held = len(self.jobs) - len(self.cancels)
                assert held <= self.capacity, "the engine holds more than its slots"
            case instructions.EngineCancel(job_id):
                self.cancels.append(job_id)
            case instructions.RestartEngine(reason):
                self.restarts.append(reason)
            case instructions.Log():
                self.logs.append(instruction)
            case instructions.Exit():
                self.exit = instruction

    def advance(self, seconds: float, brokers_live: bool = True) -> None:
        """Let time pass: every timer fires at its time, and live brokers send heartbeats."""
        until_s = self.now_s + seconds
        while self.now_s < until_s and self.exit is None:
            due_s = min(self.core.deadline_s(), until_s)
            beat_s = math.floor(self.now_s) + 1.0 if brokers_live else math.inf
            self.now_s = max(self.now_s, min(due_s, beat_s))
            if brokers_live and self.now_s == beat_s:
                for broker in self.brokers:
                    if broker.up:
                        broker.beat()
            if self.exit is None and self.core.deadline_s() <= self.now_s:
                self.tell(events.Tick())

    # --- engine -----------------------------------------------------------------------------------

    def ready(self, capacity: int | None = None) -> None:
        """The engine is loaded."""
        info = ModelInfo(name=MODEL, context_tokens=1000)
        capabilities = Capabilities("echo", "cpu", (info,), capacity or self.capacity)
        self.tell(events.EngineReady(capabilities))

    def step(self, *entries: list[Any]) -> None:
        self.tell(events.EngineStepped(list(entries)))

    def generate(self, number: int, *token_ids: int, job: bytes | None = None) -> None:
        """A step with one event: tokens, each with its number and a space as text."""
        text = "".join(f"{token} " for token in token_ids)
        self.step([TOKENS, job or request_id(number), list(token_ids), text, None])

    def end(
        self, number: int, reason: str = "stop", text: str = "", job: bytes | None = None
    ) -> None:
        """The engine ends a job."""
        job = job or request_id(number)
        self._gone(job)
        usage = {"prompt_tokens": 1, "completion_tokens": 2}
        self.step([END, job, reason, text, usage, {}, None, None])

    def fail(self, number: int, code: str = "engine_error", retryable: bool = False) -> None:
        self._gone(request_id(number))
        error = {"code": code, "message": "m"} | ({"retryable": True} if retryable else {})
        self.step([FAIL, request_id(number), error, {}])

    def _gone(self, job: bytes) -> None:
        del self.jobs[job]
        self.cancels = [other for other in self.cancels if other != job]

    def obey_cancels(self) -> None:
        """Let the engine's next step end every cancelled job."""
        for job in list(self.cancels):
            if job in self.jobs:
                self._gone(job)
                self.step([END, job, "cancelled", "", {}, {}, None, None])
        self.cancels.clear()


def serving(brokers: int = 1, capacity: int = 2, **settings: Any) -> World:
    """A worker with a loaded engine, connected to all its brokers."""
    world = World(brokers, capacity, **settings)
    world.tell(events.Tick())
    for broker in world.brokers:
        broker.connect()
    world.ready()
    return world


def text_of(*token_ids: int) -> str:
    """The text of these tokens from `World.generate`."""
    return "".join(f"{token} " for token in token_ids)
