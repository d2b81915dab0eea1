"""Two buses and the relay between them, in memory, with a manual clock.

    callers ── upper broker ── relay ── lower broker ── workers
                                            └────────── callers of its own

All cores are the real ones; messages arrive at once and in order. Only the engine of the lower
workers is simulated: a token of an answer is a function of its seed and position.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from broker.core import events as broker_events
from broker.core.controller import BrokerCore
from broker.core.events import Side
from broker.core.instructions import Send as BrokerSend
from broker.core.settings import CoreSettings
from broker.protocol import codec
from broker.protocol.limits import MAX_REQUEST_BYTES
from broker.protocol.messages import Kind, ModelInfo, Params, Request, TokensEvent, new_id
from client.core import events as client_events
from client.core.session import ClientSession
from client.errors import BusError
from client.options import Retry, Timeout
from worker.core import events as worker_events, instructions as worker_instructions
from worker.core.session import WorkerCore
from worker.core.settings import Settings
from worker.engines.base import Capabilities, FailedLoad
from worker.engines.events import END, FAIL, TOKENS
from worker.relay import core as relay


def token(seed: int, position: int) -> int:
    """The token at this position of any answer with this seed."""
    return (seed * 7919 + position * 104_729) % 5000


def answer(seed: int, length: int) -> list[int]:
    return [token(seed, position) for position in range(length)]


class World:
    """The clock, and the calls that are due now."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.now_s = 1000.0
        self.queue: deque[Callable[[], None]] = deque()
        self.parties: list[Any] = []

    def settle(self) -> None:
        """Deliver all messages in flight."""
        while self.queue:
            self.queue.popleft()()

    def advance(self, seconds: float) -> None:
        """Let time pass, timer by timer."""
        until_s = self.now_s + seconds
        self.settle()
        while True:
            due = min(self.parties, key=lambda party: party.deadline_s())
            if due.deadline_s() > until_s:
                break
            self.now_s = max(self.now_s, due.deadline_s())
            due.tick()
            self.settle()
        self.now_s = until_s


class Broker:
    """A broker; `lines` are its peers' connections, by side and routing id."""

    def __init__(self, world: World, name: str, **settings: Any) -> None:
        self.world, self.name, self.settings = world, name, settings
        self.lines: dict[tuple[Side, bytes], Callable[[tuple[bytes, ...]], None]] = {}
        self.cuts: dict[tuple[Side, bytes], Callable[[], None]] = {}
        world.parties.append(self)
        self.start()

    def start(self) -> None:
        options = CoreSettings(broker_name=self.name, **self.settings)
        self.core = BrokerCore(
            options, generator=random.Random(self.world.random.random()), now_s=self.world.now_s
        )

    def restart(self) -> None:
        """Kill and replace it: every connection breaks."""
        self.lines.clear()
        cuts, self.cuts = self.cuts, {}
        self.start()
        for cut in cuts.values():
            self.world.queue.append(cut)

    def deadline_s(self) -> float:
        return self.core.deadline_s()

    def tick(self) -> None:
        self._carry_out(self.core.handle(broker_events.Tick(), self.world.now_s))

    def hear(self, side: Side, routing_id: bytes, frames: tuple[bytes, ...]) -> None:
        if (side, routing_id) in self.lines:
            event = broker_events.MessageReceived(side, routing_id, frames)
            self._carry_out(self.core.handle(event, self.world.now_s))

    def _carry_out(self, instructions: list[Any]) -> None:
        for instruction in instructions:
            if isinstance(instruction, BrokerSend):
                line = self.lines.get((instruction.side, instruction.routing_id))
                if line is not None:
                    self.world.queue.append(
                        lambda line=line, frames=instruction.frames: line(frames)
                    )
        self.core.invariants()

    def query(self, verb: str) -> Any:
        """The answer to an observer's query."""
        from broker.core import queries

        return queries._VERBS[verb][1](self.core, queries._NoArgs())


class Caller:
    """A client's session with a broker, and the answers to its requests."""

    def __init__(self, world: World, broker: Broker, name: str) -> None:
        self.world, self.broker = world, broker
        self.session = ClientSession(
            ["tcp://broker:1"], name=name, generator=random.Random(world.random.random())
        )
        self._routing_id = b""
        self.tokens: dict[bytes, list[int]] = {}
        self.texts: dict[bytes, str] = {}
        self.ends: dict[bytes, client_events.End | BusError] = {}
        self.taken: dict[bytes, int] = {}
        self.resumed = 0
        world.parties.append(self)

    def deadline_s(self) -> float:
        return self.session.deadline_s()

    def tick(self) -> None:
        self.tell(client_events.Tick())

    def tell(self, event: client_events.Event) -> None:
        for instruction in self.session.handle(event, self.world.now_s):
            match instruction:
                case client_events.OpenSocket():
                    self._routing_id = routing_id = new_id()
                    key = Side.FRONT, routing_id
                    self.broker.lines[key] = lambda frames, r=routing_id: self._hear(r, frames)
                    self.broker.cuts[key] = lambda r=routing_id: self._cut(r)
                    self.world.queue.append(lambda: self.tell(client_events.SocketOpened()))
                case client_events.CloseSocket():
                    self.broker.lines.pop((Side.FRONT, self._routing_id), None)
                case client_events.Send(frames):
                    routing_id = self._routing_id
                    self.world.queue.append(
                        lambda r=routing_id, f=frames: self.broker.hear(Side.FRONT, r, f)
                    )
                case client_events.Arrived(arrived):
                    for event in arrived:
                        self.deliver(event.request_id, (event,))
                case client_events.Deliver(id_, items, _):
                    self.deliver(id_, items)
        self.session.invariants()

    def _hear(self, routing_id: bytes, frames: tuple[bytes, ...]) -> None:
        if routing_id == self._routing_id:
            self.tell(client_events.MessageReceived(frames))

    def _cut(self, routing_id: bytes) -> None:
        if routing_id == self._routing_id:
            self.tell(client_events.SocketLost("disconnected"))

    def deliver(self, id_: bytes, items: tuple[client_events.Item, ...]) -> None:
        for item in items:
            match item:
                case TokensEvent():
                    assert len(self.tokens[id_]) == item.offset
                    self.tokens[id_] += item.token_ids
                    self.texts[id_] += item.text
                case client_events.Recovering():
                    self.resumed += 1
                case client_events.End() | BusError():
                    assert id_ not in self.ends, "it ends once"
                    self.ends[id_] = item
                    if isinstance(item, client_events.End):
                        self.texts[id_] += item.text

    def ask(
        self,
        seed: int,
        length: int,
        *,
        model: str = "model",
        window: int = 100_000,
        **more: Any,
    ) -> bytes:
        """Make a request; returns its id."""
        id_ = bytes((1,)) + self.world.random.randbytes(15)
        self.tokens[id_], self.texts[id_] = [], ""
        request = Request(
            model=model,
            kind=Kind.COMPLETE,
            prompt="x",
            params=Params(seed=seed, max_tokens=length),
            window=window,
            **more,
        )
        made = client_events.RequestMade(
            id_, request, (), Timeout(), Retry(attempts=50), window_tokens=window
        )
        self.tell(made)
        return id_

    def read(self, id_: bytes) -> None:
        """Take all tokens that have arrived."""
        self.tell(client_events.TokensTaken(id_, len(self.tokens[id_])))

    def drop(self, id_: bytes) -> None:
        self.ends[id_] = BusError("dropped")
        self.tell(client_events.RequestDropped(id_))


class _Worker:
    """The common part of workers and the relay: a WorkerCore and its connections."""

    def __init__(
        self, world: World, brokers: list[Broker], name: str, *, relay: bool = False
    ) -> None:
        self.world, self.brokers, self.name = world, brokers, name
        settings = Settings(
            name=name, brokers=tuple(broker.name for broker in brokers), relay=relay
        )
        self.core = WorkerCore(settings, world.now_s, random.Random(world.random.random()))
        self.exit: worker_instructions.Exit | None = None
        self._routing_ids: dict[int, bytes] = {}
        world.parties.append(self)

    def deadline_s(self) -> float:
        return math.inf if self.exit else self.core.deadline_s()

    def tick(self) -> None:
        self.tell(worker_events.Tick())

    def tell(self, event: worker_events.Event) -> None:
        for instruction in self.core.handle(event, self.world.now_s):
            match instruction:
                case worker_instructions.OpenSocket(index):
                    self._open(index)
                case worker_instructions.CloseSocket(index):
                    routing_id = self._routing_ids.pop(index, b"")
                    self.brokers[index].cuts.pop((Side.BACK, routing_id), None)
                case worker_instructions.Send(index, frames):
                    routing_id = self._routing_ids[index]
                    self.world.queue.append(
                        lambda i=index, r=routing_id, f=frames: self.brokers[i].hear(
                            Side.BACK, r, f
                        )
                    )
                case worker_instructions.Exit():
                    self.exit = instruction
                case _:
                    self.engine(instruction)
        self.core.invariants()

    def _open(self, index: int) -> None:
        routing_id = bytes((1,)) + self.world.random.randbytes(15)
        self._routing_ids[index] = routing_id
        key = Side.BACK, routing_id
        broker = self.brokers[index]

        def hear(frames: tuple[bytes, ...]) -> None:
            if self._routing_ids.get(index) == routing_id:
                self.tell(worker_events.MessageReceived(index, frames))

        def cut() -> None:
            if self._routing_ids.get(index) == routing_id:
                self.tell(worker_events.Disconnected(index, "the connection was closed"))

        broker.lines[key], broker.cuts[key] = hear, cut
        self.world.queue.append(lambda: self.tell(worker_events.Connected(index)))

    def engine(self, instruction: Any) -> None:
        """An instruction for the engine."""
        raise NotImplementedError


class Worker(_Worker):
    """A worker of the lower bus; its engine runs `slots` jobs, with one token of each per step."""

    def __init__(
        self, world: World, broker: Broker, name: str, slots: int, models: tuple[str, ...]
    ) -> None:
        super().__init__(world, [broker], name)
        self.slots = slots
        #: The request of each job, and how many tokens it has so far.
        self.jobs: dict[bytes, tuple[Request, int]] = {}
        #: The requests in order of arrival.
        self.ran: list[Request] = []
        #: The jobs that the next step ends.
        self.cancelled: list[bytes] = []
        #: The error with which the next step fails all jobs.
        self.error: dict[str, Any] | None = None
        infos = tuple(ModelInfo(name=model, kinds=(Kind.COMPLETE,)) for model in models)
        self.tell(worker_events.EngineReady(Capabilities("made up", "cpu", infos, slots)))

    def offers(self, *models: str, failed: tuple[FailedLoad, ...] = ()) -> None:
        """What it can load from now on, and what it could not."""
        infos = tuple(ModelInfo(name=model, kinds=(Kind.COMPLETE,)) for model in models)
        told = Capabilities("made up", "cpu", infos, self.slots, failed=failed)
        self.tell(worker_events.EngineChanged(told))

    def engine(self, instruction: Any) -> None:
        match instruction:
            case worker_instructions.EngineAdd(job_id, body, _):
                request = codec.decode(Request, body, MAX_REQUEST_BYTES)
                count = len(request.resume.token_ids) if request.resume else 0
                if request.resume:
                    assert request.params.max_tokens is not None
                    assert request.resume.token_ids == answer(request.params.seed, count)
                self.jobs[job_id] = request, count
                self.ran.append(request)
                # What is cancelled ends at the next step; its successor may come before.
                ending = len(self.jobs.keys() & set(self.cancelled))
                assert len(self.jobs) - ending <= self.slots, "more than its slots"
            case worker_instructions.EngineCancel(job_id) if job_id in self.jobs:
                self.cancelled.append(job_id)

    def step(self) -> None:
        """Generate one token for every job."""
        events: list[list[Any]] = []
        for job_id in self.cancelled:
            _, count = self.jobs.pop(job_id, (None, 0))
            events.append([END, job_id, "cancelled", "", {"completion_tokens": count}, {}])
        self.cancelled.clear()
        for job_id, (request, count) in list(self.jobs.items()):
            length = request.params.max_tokens
            assert length is not None
            if self.error is not None:
                events.append([FAIL, job_id, self.error, {}])
                del self.jobs[job_id]
                continue
            if count < length:
                next_token = token(request.params.seed, count)
                events.append([TOKENS, job_id, [next_token], f"{next_token} ", None])
                count += 1
                self.jobs[job_id] = request, count
            if count >= length:
                usage = {"prompt_tokens": 1, "completion_tokens": count}
                events.append([END, job_id, "length", "", usage, {"decode_ms": 1.5}])
                del self.jobs[job_id]
        if events:
            self.tell(worker_events.EngineStepped(events))


class Relay(_Worker):
    """The relay: its engine is a caller of the lower bus."""

    def __init__(self, world: World, uppers: list[Broker], lower: Broker, name: str) -> None:
        super().__init__(world, uppers, name, relay=True)
        self.relay = relay.RelayCore(
            relay.RelaySettings(mark=lower.name, lower=lower.name),
            random.Random(world.random.random()),
        )
        self.caller = Caller(world, lower, name)
        self.caller.deliver = self._arrived  # type: ignore[method-assign]
        self.reports: list[worker_events.Event] = []
        world.parties.append(_RelayClock(self))
        self.join(relay.Begun())

    def _arrived(self, id_: bytes, items: tuple[client_events.Item, ...]) -> None:
        self.world.queue.append(lambda: self.join(relay.ItemsArrived(id_, items)))

    def join(self, event: relay.Event) -> None:
        for instruction in self.relay.handle(event, self.world.now_s):
            match instruction:
                case relay.Ask(asked):
                    self.world.queue.append(lambda f=asked: self.caller.tell(f))
                case relay.Report(reported):
                    self.reports.append(reported)
                    self.world.queue.append(lambda f=reported: self.tell(f))
        self.relay.invariants()

    def engine(self, instruction: Any) -> None:
        match instruction:
            case worker_instructions.EngineAdd(job_id, body, attachments):
                event: relay.Event = relay.JobAdded(job_id, body, attachments)
            case worker_instructions.EngineCancel(job_id):
                event = relay.JobCancelled(job_id)
            case worker_instructions.EngineWindow(job_id, limit):
                event = relay.WindowMoved(job_id, limit)
            case _:
                return
        self.world.queue.append(lambda: self.join(event))


class _RelayClock:
    """The timers of the relay's own core."""

    def __init__(self, owner: Relay) -> None:
        self._owner = owner

    def deadline_s(self) -> float:
        return self._owner.relay.deadline_s()

    def tick(self) -> None:
        self._owner.join(relay.Tick())


class TwoBuses:
    """An upper broker, a relay, a lower broker with workers, and a caller at each broker."""

    def __init__(
        self, seed: int = 0, workers: tuple[tuple[int, tuple[str, ...]], ...] = ((4, ("model",)),)
    ) -> None:
        self.world = World(seed)
        self.upper = Broker(self.world, "upper")
        self.lower = Broker(self.world, "lower")
        self.workers = [
            Worker(self.world, self.lower, f"w{index}", slots, models)
            for index, (slots, models) in enumerate(workers)
        ]
        self.relay = Relay(self.world, [self.upper], self.lower, "relay")
        self.above = Caller(self.world, self.upper, "above")
        self.below = Caller(self.world, self.lower, "below")
        self.world.advance(3.0)

    def steps(self, count: int = 1, pause_s: float = 0.01) -> None:
        """Run steps of all engines."""
        for _ in range(count):
            for worker in self.workers:
                worker.step()
            self.world.advance(pause_s)

    @property
    def credit(self) -> int:
        """How many requests the upper broker may still assign to the relay."""
        return sum(worker.unspent for worker in self.upper.core.workers.values())

    @property
    def queued_below(self) -> int:
        """How many requests wait in the lower broker."""
        return sum(queue.requests for queue in self.lower.core.queues.values())
