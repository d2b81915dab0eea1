"""Broker, worker with its engine, and client of the simulation: the real cores, simulated
processes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from broker.core import events as broker_fact
from broker.core.controller import BrokerCore
from broker.core.events import Side
from broker.core.instructions import ForgetPeer, StopLoop
from broker.core.instructions import Send as BrokerSend
from broker.core.settings import CoreSettings
from broker.protocol import codec
from broker.protocol.limits import MAX_REQUEST_OCTETS
from broker.protocol.messages import Kind, ModelInfo, Params, Request, TokensEvent
from client import events as client_fact
from client.errors import BusError
from client.options import Limits, Retry, Timeout
from client.session import ClientSession
from tests.simulation.world import Party, Violation, Wire, World
from worker import events as worker_fact
from worker.engines.base import Capabilities
from worker.instructions import (
    CloseSocket,
    EngineAdd,
    EngineCancel,
    Exit,
    OpenSocket,
    RestartEngine,
)
from worker.instructions import Send as WorkerSend
from worker.session import Settings, WorkerCore

MODEL = "model"
TOKENS, END = 0, 1
PEER_QUEUE_MESSAGES = 300
"""What ZeroMQ, the kernel and the broker together hold for a peer that does not read."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says to a prompt: a function of prompt, seed and position alone."""

    prompt: str
    seed: int
    length: int

    def token(self, position: int) -> int:
        octets = hashlib.blake2b(f"{self.prompt}/{self.seed}/{position}".encode(), digest_size=4)
        return int.from_bytes(octets.digest()) % 5000

    def piece(self, position: int) -> str:
        return f"{self.token(position)} "

    def sure_until(self, count: int) -> int:
        """Tokens of the first `count` whose text is certain: each fifth id is half a character."""
        while count and self.token(count - 1) % 5 == 0:
            count -= 1
        return count

    def text(self, count: int) -> str:
        return "".join(self.piece(i) for i in range(count))

    @classmethod
    def of(cls, request: Request) -> Answer:
        assert request.prompt is not None and request.params.max_tokens is not None
        return cls(request.prompt, request.params.seed, request.params.max_tokens)


class SimBroker(Party):
    """A broker process: it can be killed and started again, and forgets everything."""

    def __init__(self, world: World, name: str, settings: CoreSettings) -> None:
        super().__init__(world, name)
        self.settings = settings
        self.wires: dict[Side, dict[bytes, Wire]] = {}
        self.stopped_in_order = False
        self.start()

    def start(self) -> None:
        self.wires = {Side.FRONT: {}, Side.BACK: {}}
        self.core = BrokerCore(
            self.settings,
            generator=random.Random(self.world.rng.getrandbits(64)),
            now_s=self.world.now_s,
        )
        self.alive, self.paused = True, False
        self._inbox.clear()
        self.world.note(self.name, "starts")

    def kill(self) -> None:
        if not self.alive:
            return
        self.world.note(self.name, "is killed")
        self.alive = False
        for wires in self.wires.values():
            for wire in list(wires.values()):
                wire.cut("the connection was closed")

    def tick_event(self) -> Any:
        return broker_fact.Tick()

    def woke(self, late_s: float) -> None:
        self.handle(broker_fact.LoopWasLate(late_s))

    def accept(self, side: Side, wire: Wire) -> None:
        self.wires[side][wire.routing_id] = wire

    def received(self, side: Side, wire: Wire, frames: tuple[bytes, ...]) -> None:
        reads_at_once = self.alive and not self.paused and not self.backlog
        if side is Side.BACK and reads_at_once and len(frames) == 2:
            forward = self.core.forward(wire.routing_id, frames[0], self.world.now_s)
            if forward is not None:
                self._send(Side.FRONT, forward[0], (forward[1], frames[1]))
                return
        self.tell(broker_fact.MessageReceived(side, wire.routing_id, frames))

    def connection_gone(self, side: Side) -> None:
        self.tell(broker_fact.DisconnectReported(side))

    def carry_out(self, instruction: Any) -> None:
        match instruction:
            case BrokerSend(side, routing_id, frames):
                self._send(side, routing_id, frames)
            case ForgetPeer(side, routing_id):
                self.wires[side].pop(routing_id, None)
            case StopLoop():
                self.stopped_in_order = True
                # What was sent still leaves (linger).
                for wires in self.wires.values():
                    for wire in wires.values():
                        self.world.after(0.1, wire.cut, "the connection was closed")
                self.alive = False
                self.world.note(self.name, "has stopped in good order")

    def _send(self, side: Side, routing_id: bytes, frames: tuple[bytes, ...]) -> None:
        wire = self.wires[side].get(routing_id)
        if wire is None or (not wire.open and not wire.silent):
            self.world.after(0.0, self.tell, broker_fact.PeerUnreachable(side, routing_id))
            return
        wire.send_to_peer(frames)
        peer: Party = wire.peer  # type: ignore[attr-defined]
        if peer.backlog > PEER_QUEUE_MESSAGES:
            self.world.after(0.0, self.tell, broker_fact.PeerOverflowed(side, routing_id))


class _Sockets:
    """The sockets of a client or a worker, one to each broker."""

    def __init__(self, party: Party, side: Side, brokers: list[SimBroker]) -> None:
        self.party = party
        self.side = side
        self.brokers = brokers
        self.wires: dict[int, Wire] = {}
        self._attempts: dict[int, int] = {}
        #: No packet passes between this party and anybody.
        self.unplugged = False

    def open(self, index: int, routing_id: bytes) -> None:
        self._attempts[index] = attempt = self._attempts.get(index, 0) + 1
        world = self.party.world
        world.after(world.delay_s(), self._connect, index, attempt, routing_id)

    def _connect(self, index: int, attempt: int, routing_id: bytes) -> None:
        if not self.party.alive or self._attempts[index] != attempt or self.unplugged:
            return
        broker = self.brokers[index]
        if not broker.alive:
            self.party.tell(self.lost_event(index, "nobody listens there"))
            return

        def to_peer(frames: tuple[bytes, ...]) -> None:
            if self.wires.get(index) is wire:
                self.party.tell(self.message_event(index, frames))

        def to_broker(wire: Wire, frames: tuple[bytes, ...]) -> None:
            if broker.wires[self.side].get(wire.routing_id) is wire:
                broker.received(self.side, wire, frames)

        def on_cut(why: str) -> None:
            if self.wires.get(index) is wire:
                del self.wires[index]
                self.party.tell(self.lost_event(index, why))
            if broker.alive:
                broker.connection_gone(self.side)

        wire = Wire(self.party.world, routing_id, to_peer, to_broker, on_cut)
        wire.peer = self.party  # type: ignore[attr-defined]
        self.wires[index] = wire
        broker.accept(self.side, wire)
        self.party.tell(self.opened_event(index))

    def close(self, index: int) -> None:
        self._attempts[index] = self._attempts.get(index, 0) + 1
        wire = self.wires.pop(index, None)
        if wire is not None:
            wire.close()
            broker = self.brokers[index]
            self.party.world.after(0.01, lambda: broker.alive and broker.connection_gone(self.side))

    def send(self, index: int, frames: tuple[bytes, ...]) -> None:
        wire = self.wires.get(index)
        if wire is not None:
            wire.send_to_broker(frames)

    def cut_all(self) -> None:
        for wire in list(self.wires.values()):
            wire.cut("the connection was closed")

    def unplug(self) -> None:
        self.unplugged = True
        for wire in self.wires.values():
            wire.silent = True

    def plug_in(self) -> None:
        self.unplugged = False

    # Facts, in the words of the party's core:
    def opened_event(self, index: int) -> Any:
        return worker_fact.Connected(index)

    def lost_event(self, index: int, why: str) -> Any:
        return worker_fact.Disconnected(index, why)

    def message_event(self, index: int, frames: tuple[bytes, ...]) -> Any:
        return worker_fact.MessageReceived(index, frames)


class _ClientSockets(_Sockets):
    def opened_event(self, index: int) -> Any:
        return client_fact.ConnectionOpened()

    def lost_event(self, index: int, why: str) -> Any:
        return client_fact.ConnectionLost(why)

    def message_event(self, index: int, frames: tuple[bytes, ...]) -> Any:
        return client_fact.MessageReceived(frames)


@dataclass(slots=True)
class _Job:
    answer: Answer
    position: int
    cancelled: bool = False


class SimEngine:
    """An engine process: steps all its jobs at once; can die and hang."""

    def __init__(self, worker: SimWorker, step_s: float, load_s: float) -> None:
        self.worker = worker
        self.world = worker.world
        self.step_s = step_s
        self.jobs: dict[bytes, _Job] = {}
        self.alive = True
        self.hung = False
        self.stepping = False
        self.ready = False
        self.world.after(load_s, self._loaded)

    def _loaded(self) -> None:
        if self.alive:
            self.ready = True
            model = ModelInfo(name=MODEL, kinds=(Kind.COMPLETE,), context_tokens=1 << 20)
            capabilities = Capabilities("sim", "none", (model,), self.worker.slots)
            self.worker.tell(worker_fact.EngineReady(capabilities))

    def add(self, job_id: bytes, body: bytes) -> None:
        if not self.ready:
            raise Violation(f"{self.worker.name} was given work while it loads")
        request = codec.decode(Request, body, MAX_REQUEST_OCTETS)
        answer = Answer.of(request)
        position = 0
        if request.resume is not None:
            position = len(request.resume.token_ids)
            given = request.resume.token_ids
            if given != [answer.token(i) for i in range(position)]:
                raise Violation(f"{self.worker.name} is to continue tokens that were never said")
            sure = len(answer.text(answer.sure_until(position)))
            if request.resume.text_characters != sure:
                raise Violation(
                    f"{self.worker.name} is to continue after {request.resume.text_characters} "
                    f"characters; {position} tokens are {sure}"
                )
        self.jobs[job_id] = _Job(answer, position)
        if len(self.jobs) > self.worker.slots + self.worker.replacing:
            raise Violation(
                f"{self.worker.name} runs {len(self.jobs)} in {self.worker.slots} slots"
            )
        self._go_on()

    def cancel(self, job_id: bytes) -> None:
        if job_id in self.jobs:
            self.jobs[job_id].cancelled = True
            self._go_on()

    def _go_on(self) -> None:
        if not self.stepping and self.jobs and self.alive and not self.hung:
            self.stepping = True
            self.world.after(self.step_s * self.world.rng.uniform(0.5, 1.5), self._step)

    def _step(self) -> None:
        self.stepping = False
        if not self.alive or self.hung:
            return
        events: list[list[Any]] = []
        for job_id, job in list(self.jobs.items()):
            answer = job.answer
            if job.cancelled:
                del self.jobs[job_id]
                events.append([END, job_id, "cancelled", "", {}, {}, None, None])
                continue
            if job.position < answer.length:
                before, job.position = job.position, job.position + 1
                text = answer.text(answer.sure_until(job.position))[
                    len(answer.text(answer.sure_until(before))) :
                ]
                events.append([TOKENS, job_id, [answer.token(before)], text, None])
            if job.position >= answer.length:
                del self.jobs[job_id]
                sure = len(answer.text(answer.sure_until(job.position)))
                rest = answer.text(job.position)[sure:]
                usage = {"prompt_tokens": 1, "completion_tokens": answer.length}
                events.append([END, job_id, "length", rest, usage, {}, None, None])
        self.worker.tell(worker_fact.EngineStepped(events))
        self._go_on()

    def die(self) -> None:
        self.alive = False
        self.jobs.clear()


class SimWorker(Party):
    """A worker: link process and engine process."""

    def __init__(
        self,
        world: World,
        name: str,
        brokers: list[SimBroker],
        *,
        slots: int,
        step_s: float,
        load_s: float,
        settings: dict[str, Any],
        on_exit: Callable[[SimWorker], None],
    ) -> None:
        super().__init__(world, name)
        self._on_exit = on_exit
        self.slots = slots
        self.step_s = step_s
        self.load_s = load_s
        #: Jobs that end at the next step while their successor is added (a RESUME run anew).
        self.replacing = 0
        self.sockets = _Sockets(self, Side.BACK, brokers)
        self.core = WorkerCore(
            Settings(
                name=name,
                brokers=tuple(broker.name for broker in brokers),
                models=(MODEL,),
                **settings,
            ),
            world.now_s,
            random.Random(world.rng.getrandbits(64)),
        )
        self.exit: Exit | None = None
        self.deaths = 0
        self.runs: dict[bytes, int] = {}
        world.note(name, "starts")
        self.engine = SimEngine(self, step_s, load_s)
        self.arm()

    def tick_event(self) -> Any:
        return worker_fact.Tick()

    def carry_out(self, instruction: Any) -> None:
        match instruction:
            case WorkerSend(broker, frames):
                self.sockets.send(broker, frames)
            case OpenSocket(broker):
                self.sockets.open(broker, b"\x01" + self.world.rng.randbytes(15))
            case CloseSocket(broker):
                self.sockets.close(broker)
            case EngineAdd(job_id, body):
                self.replacing = sum(job.cancelled for job in self.engine.jobs.values())
                self.engine.add(job_id, body)
                self.runs[job_id] = self.runs.get(job_id, 0) + 1
            case EngineCancel(job_id):
                self.engine.cancel(job_id)
            case RestartEngine():
                self._new_engine()
            case Exit():
                self.exit = instruction
                self.alive = False
                self.engine.die()
                self.sockets.cut_all()
                self.world.note(self.name, f"exits {instruction.code} {instruction.message}")
                self._on_exit(self)

    def _new_engine(self) -> None:
        self.deaths += 1
        self.engine.die()
        self.engine = SimEngine(self, self.step_s, self.load_s)

    def engine_dies(self) -> None:
        """The engine process crashes; the supervisor starts another."""
        if self.alive and self.engine.ready:
            self.world.note(self.name, "loses its engine")
            self._new_engine()
            self.tell(worker_fact.EngineLost("killed by signal 9"))

    def engine_hangs(self) -> None:
        if self.alive and self.engine.ready:
            self.world.note(self.name, "has an engine that hangs")
            self.engine.hung = True

    def kill(self) -> None:
        """kill -9 of the link; the engine follows."""
        if self.alive:
            self.world.note(self.name, "is killed")
            self.alive = False
            self.deaths += 1
            self.engine.die()
            self.sockets.cut_all()
            self._on_exit(self)


@dataclass(slots=True)
class Call:
    """One request of an application, and everything that it saw."""

    request_id: bytes
    answer: Answer
    priority: int
    #: Seconds that the application needs for a token; 0: it reads at once.
    read_s: float
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    taken: int = 0
    made_s: float = 0.0
    ended_s: float = 0.0
    dropped: bool = False
    #: "end", or the code of the error.
    outcome: str = ""
    error: BusError | None = None
    resumed: int = 0


class SimClient(Party):
    """A client process and its application."""

    def __init__(
        self,
        world: World,
        name: str,
        brokers: list[SimBroker],
        retry: Retry,
        limits: Limits,
    ) -> None:
        super().__init__(world, name)
        self.brokers = brokers
        self.retry = retry
        self.sockets = _ClientSockets(self, Side.FRONT, brokers)
        self.core = ClientSession(
            [broker.name for broker in brokers],
            name=name,
            client_limits=limits,
            generator=random.Random(world.rng.getrandbits(64)),
        )
        self.calls: dict[bytes, Call] = {}
        self.drains: dict[bytes, str] = {}
        self._socket = -1
        self.closed = False

    def tick_event(self) -> Any:
        return client_fact.Tick()

    def ask(self, call: Call) -> None:
        """The application makes a request."""
        call.made_s = self.world.now_s
        self.calls[call.request_id] = call
        request = Request(
            model=MODEL,
            kind=Kind.COMPLETE,
            prompt=call.answer.prompt,
            params=Params(max_tokens=call.answer.length, seed=call.answer.seed),
            priority=call.priority,
            window=1,
        )
        made = client_fact.RequestMade(
            call.request_id,
            request,
            (),
            Timeout(connect=None, first_token=None, between_tokens=None),
            self.retry,
        )
        self.tell(made)

    def drop(self, call: Call) -> None:
        """The application stops reading."""
        if call.request_id in self.calls:
            self.tell(client_fact.RequestDropped(call.request_id))

    def handle(self, event: Any) -> None:
        if isinstance(event, client_fact.RequestDropped):
            call = self.calls[event.request_id]
            if call.outcome or call.dropped:
                return
            call.dropped = True
            self.world.note(self.name, f"drops {call.request_id.hex()[:8]}")
        super().handle(event)

    def drain_worker(self, name: str) -> None:
        """The operator's verb."""
        query_id = self.world.rng.getrandbits(128).to_bytes(16)
        self.drains[query_id] = name
        args = {"worker": name, "deadline_ms": 2000}
        self.tell(client_fact.QueryMade(query_id, "bus.drain", args, Timeout(total=5)))

    def close(self) -> None:
        self.closed = True
        self.tell(client_fact.CloseRequested())

    def carry_out(self, instruction: Any) -> None:
        match instruction:
            case client_fact.Send(frames):
                self.sockets.send(self._socket, frames)
            case client_fact.OpenSocket(address, routing_id):
                self._socket = next(i for i, b in enumerate(self.brokers) if b.name == address)
                self.sockets.open(self._socket, routing_id)
            case client_fact.CloseSocket():
                self.sockets.close(self._socket)
            case client_fact.Deliver(id_, items, final):
                self._read(id_, items, final)

    def _read(self, id_: bytes, items: tuple[Any, ...], final: bool) -> None:
        if id_ in self.drains:
            return
        call = self.calls[id_]
        name = f"{self.name} request {id_.hex()[:8]}"
        if call.dropped and not self.closed:
            raise Violation(f"{name} was dropped and still gets {items}")
        if call.outcome:
            raise Violation(f"{name} ended with {call.outcome} and still gets {items}")
        for item in items:
            match item:
                case TokensEvent():
                    self._tokens(name, call, item)
                case client_fact.End():
                    call.outcome, call.text = "end", call.text + item.text
                    call.resumed = item.resumed
                    self._check_end(name, call)
                case client_fact.Started():
                    self.world.note(self.name, f"{id_.hex()[:8]} runs at {item.worker}")
                case client_fact.Recovering():
                    self.world.note(self.name, f"{id_.hex()[:8]} recovers: {item.reason}")
                case BusError():
                    call.outcome, call.error = str(item.code), item
        if final != bool(call.outcome):
            raise Violation(f"{name}: final is {final}, the outcome {call.outcome!r}")
        if call.outcome:
            call.ended_s = self.world.now_s
            self.world.note(self.name, f"{id_.hex()[:8]} ends: {call.outcome}")
        if (
            call.outcome
            and call.outcome != "end"
            and not call.answer.text(call.answer.length).startswith(call.text)
        ):
            raise Violation(f"{name} failed after text that is no prefix: {call.text!r}")

    def _tokens(self, name: str, call: Call, item: TokensEvent) -> None:
        at = len(call.token_ids)
        right = [call.answer.token(i) for i in range(at, at + len(item.token_ids))]
        if item.offset != at or item.token_ids != right:
            raise Violation(f"{name} got {item} after {at} tokens; right is {right}")
        call.token_ids += item.token_ids
        call.text += item.text
        if call.read_s:
            self.world.after(
                call.read_s * len(item.token_ids), self._take, call, len(call.token_ids)
            )
        else:
            self._take(call, len(call.token_ids))

    def _take(self, call: Call, offset: int) -> None:
        if self.alive and not call.outcome and not call.dropped:
            self.world.after(0.0, self.tell, client_fact.TokensTaken(call.request_id, offset))

    def _check_end(self, name: str, call: Call) -> None:
        whole = call.answer.text(call.answer.length)
        if call.text != whole or len(call.token_ids) != call.answer.length:
            raise Violation(
                f"{name} ended with {len(call.token_ids)} of {call.answer.length} tokens and "
                f"{call.text!r} instead of {whole!r}"
            )
