"""Broker, worker and client of the simulation: the real cores in simulated processes."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import msgspec

from broker.core import events as broker_events
from broker.core.controller import BrokerCore
from broker.core.events import Side
from broker.core.instructions import ForgetPeer, Send as BrokerSend, StopLoop
from broker.core.settings import CoreSettings
from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.messages import (
    Cancel,
    Credit,
    Kind,
    Params,
    Piece,
    PieceKind,
    Request,
    Resume,
    TokensEvent,
    Window,
)
from client.completion import pieces_of
from client.core import events as client_events
from client.core.session import ClientSession
from client.errors import BusError
from client.options import Limits, Retry, Timeout
from tests.simulation.answers import PIECES, Call, result_of, whole_request
from tests.simulation.engine import MODEL, SimEngine
from tests.simulation.shelf import SimShelf
from tests.simulation.world import Party, Violation, Wire, World
from worker.core import events as worker_events
from worker.core.instructions import (
    CloseSocket,
    EngineAdd,
    EngineCancel,
    EngineLoad,
    Exit,
    OpenSocket,
    RestartEngine,
    Send as WorkerSend,
)
from worker.core.session import WorkerCore
from worker.core.settings import Settings
from worker.engines.common.answer_parser import merged

GIVING_WAY = ("higher priority", " loads ", "unloaded")
"""Why a stream moved although nothing went wrong: for another request, for the turn of another
model, or for one that another broker ordered in the same moment."""


class SimBroker(Party):
    """A broker process: it can be killed and restarted, and then has forgotten everything."""

    def __init__(
        self,
        world: World,
        name: str,
        settings: CoreSettings,
        peer_queue_messages: int,
        on_exit: Callable[[SimBroker], None],
    ) -> None:
        super().__init__(world, name)
        self._on_exit = on_exit
        self.settings = settings
        #: How much ZeroMQ, the kernel and the broker together buffer for a peer that does not read.
        self.peer_queue_messages = peer_queue_messages
        self.wires: dict[Side, dict[bytes, Wire]] = {}
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
        self._on_exit(self)

    def tick_event(self) -> Any:
        return broker_events.Tick()

    def woke(self, late_s: float) -> None:
        self.handle(broker_events.LoopWasLate(late_s))

    def accept(self, side: Side, wire: Wire) -> None:
        self.wires[side][wire.routing_id] = wire

    def received(self, side: Side, wire: Wire, frames: tuple[bytes, ...]) -> None:
        reads_at_once = self.alive and not self.paused and not self.backlog
        if side is Side.BACK and reads_at_once and len(frames) == 2:
            forward = self.core.forward(wire.routing_id, frames[0], self.world.now_s)
            if forward is not None:
                self._send(Side.FRONT, forward[0], (forward[1], frames[1]))
                return
        self.tell(broker_events.MessageReceived(side, wire.routing_id, frames))

    def connection_gone(self, side: Side) -> None:
        self.tell(broker_events.DisconnectReported(side))

    def carry_out(self, instruction: Any) -> None:
        match instruction:
            case BrokerSend(side, routing_id, frames):
                self._send(side, routing_id, frames)
            case ForgetPeer(side, routing_id):
                self.wires[side].pop(routing_id, None)
            case StopLoop():
                # Messages already sent are still delivered (linger).
                for wires in self.wires.values():
                    for wire in wires.values():
                        self.world.after(0.1, wire.cut, "the connection was closed")
                self.alive = False
                self.world.note(self.name, "has stopped in order")
                self._on_exit(self)

    def _send(self, side: Side, routing_id: bytes, frames: tuple[bytes, ...]) -> None:
        wire = self.wires[side].get(routing_id)
        if wire is None or (not wire.open and not wire.silent):
            self.world.after(0.0, self.tell, broker_events.PeerUnreachable(side, routing_id))
            return
        wire.send_to_peer(frames)
        peer: Party = wire.peer  # type: ignore[attr-defined]
        if peer.backlog > self.peer_queue_messages:
            self.world.after(0.0, self.tell, broker_events.PeerOverflowed(side, routing_id))


class _Sockets:
    """The sockets of a client or a worker, one to each broker."""

    def __init__(self, party: Party, side: Side, brokers: list[SimBroker]) -> None:
        self.party = party
        self.side = side
        self.brokers = brokers
        self.wires: dict[int, Wire] = {}
        self._attempts: dict[int, int] = {}
        #: No packet passes between this party and any other.
        self.unplugged = False

    def open(self, index: int) -> None:
        self._attempts[index] = attempt = self._attempts.get(index, 0) + 1
        world = self.party.world
        routing_id = b"\x01" + world.rng.randbytes(15)
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

    def garble(self, copies: int) -> None:
        """The next message in each direction arrives this often, so it is lost or doubled."""
        for wire in self.wires.values():
            wire.copies_to_peer = wire.copies_to_broker = copies

    # Events, as the party's core defines them:
    def opened_event(self, index: int) -> Any:
        return worker_events.Connected(index)

    def lost_event(self, index: int, why: str) -> Any:
        return worker_events.Disconnected(index, why)

    def message_event(self, index: int, frames: tuple[bytes, ...]) -> Any:
        return worker_events.MessageReceived(index, frames)


class _ClientSockets(_Sockets):
    def opened_event(self, index: int) -> Any:
        return client_events.SocketOpened()

    def lost_event(self, index: int, why: str) -> Any:
        return client_events.SocketLost(why)

    def message_event(self, index: int, frames: tuple[bytes, ...]) -> Any:
        return client_events.MessageReceived(frames)


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
        on_demand: tuple[int, int, float] | None = None,
    ) -> None:
        super().__init__(world, name)
        self._on_exit = on_exit
        self.slots = slots
        self.step_s = step_s
        self.load_s = load_s
        self.sockets = _Sockets(self, Side.BACK, brokers)
        self.core = WorkerCore(
            Settings(
                name=name,
                brokers=tuple(broker.name for broker in brokers),
                models=(MODEL,) if on_demand is None else (),
                on_demand=on_demand is not None,
                instance=blake2b(f"{name} {world.now_s}".encode(), digest_size=16).digest(),
                **settings,
            ),
            world.now_s,
            random.Random(world.rng.getrandbits(64)),
        )
        self.exit: Exit | None = None
        self.deaths = 0
        #: Models that are loaded on demand; None: one that is loaded at start.
        self.shelf: SimShelf | None = None
        #: By prompt: how often it was started, tokens computed, planned failures.
        self.runs: Counter[str] = Counter()
        self.computed: Counter[str] = Counter()
        #: Split answers that were continued here, by what they were in.
        self.resumed_in: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        world.note(name, "starts")
        if on_demand is not None:
            self.shelf = SimShelf(self, *on_demand, settings["stall_s"])
        else:
            self._engine: SimEngine | None = SimEngine(self, step_s, load_s)
        self.arm()

    @property
    def engine(self) -> SimEngine:
        """The only engine."""
        assert self._engine is not None
        return self._engine

    @property
    def engines(self) -> list[SimEngine]:
        """Those whose processes run."""
        return [self.engine] if self.shelf is None else self.shelf.engines

    def woke(self, late_s: float) -> None:
        if self.shelf is not None:
            # As the link's loop does, before its timers.
            self._inbox.extend(self.shelf.shelf.read(self.world.now_s))
            self.shelf.pump()

    def tick_event(self) -> Any:
        return worker_events.Tick()

    def carry_out(self, instruction: Any) -> None:
        match instruction:
            case WorkerSend(broker, frames):
                self.sockets.send(broker, frames)
            case OpenSocket(broker):
                self.sockets.open(broker)
            case CloseSocket(broker):
                self.sockets.close(broker)
            case EngineAdd(job_id, body, attachments) if self.shelf is not None:
                self.shelf.shelf.add(job_id, body, attachments)
                self.shelf.pump()
            case EngineCancel(job_id) if self.shelf is not None:
                self.shelf.shelf.cancel(job_id)
            case EngineLoad(model, gives_way) if self.shelf is not None:
                self.shelf.shelf.load(model, gives_way)
                self.shelf.pump()
            case RestartEngine(reason) if self.shelf is not None:
                for event in self.shelf.shelf.restart(reason, self.world.now_s):
                    self._inbox.append(event)
                self.shelf.pump()
            case EngineAdd(job_id, body):
                self.engine.add(job_id, body)
            case EngineCancel(job_id):
                self.engine.cancel(job_id)
            case RestartEngine():
                if not self.engine.hung:
                    raise Violation(f"{self.name} restarts an engine that works")
                self._new_engine()
            case Exit():
                self.exit = instruction
                self.alive = False
                self._end_engines()
                self.sockets.cut_all()
                self.world.note(self.name, f"exits {instruction.code} {instruction.message}")
                self._on_exit(self)

    def _new_engine(self) -> None:
        self.deaths += 1
        self.engine.die()
        self._engine = SimEngine(self, self.step_s, self.load_s)

    def _end_engines(self) -> None:
        for engine in self.engines:
            engine.die()

    def engine_dies(self, dying: SimEngine | None = None, index: int = 0) -> None:
        """An engine process crashes, this one or by its number; the supervisor starts another."""
        if self.shelf is not None:
            running = [p for p in self.shelf.processes if p.engine is not None]
            if self.alive and running:
                named = [p for p in running if p.engine is dying]
                process = (named or running)[index % len(named or running)]
                self.world.note(self.name, f"loses the engine of {process.names}")
                process.die()
            return
        if self.alive and self.engine.ready and self.engine.alive:
            self.world.note(self.name, "loses its engine")
            self.engine.die()
            self.tell(worker_events.EngineLost("killed by signal 9"))

    def handle(self, event: Any) -> None:
        if isinstance(event, worker_events.EngineLost) and self.shelf is None:
            self._new_engine()  # the supervisor, part of this process, has noticed only now
        super().handle(event)

    def repeat_credit(self) -> None:
        """Repeat, late, an old grant."""
        for connection in self.core._connections:
            if self.alive and not self.paused and connection.open:
                credit = Credit(granted=self.world.rng.randint(0, connection.credit.announced))
                frames = connection.message(
                    MessageType.CREDIT, connection.session, credit, self.world.now_s
                )
                self.sockets.send(connection.index, frames)

    def engine_hangs(self, index: int = 0) -> None:
        if self.shelf is not None:
            ready = [engine for engine in self.engines if engine.ready]
            if self.alive and ready:
                hung = ready[index % len(ready)]
                self.world.note(self.name, f"has an engine that hangs: {hung.names}")
                hung.hung = True
            return
        if self.alive and self.engine.ready:
            self.world.note(self.name, "has an engine that hangs")
            self.engine.hung = True

    def say_odd_things(self) -> None:
        """Send events that a client must not accept: repeated, too early, of an earlier epoch."""
        streams = [s for s in self.core._requests.streams.values() if s.route and s.sent]
        for stream in streams if self.alive and not self.paused else ():
            route, connection = stream.route, stream.route.connection
            if connection.blocked or not stream.token_ids:
                continue
            last = stream.sent - 1
            event = self.world.rng.choice(
                (
                    (stream.epoch, last, stream.token_ids[last : last + 1], "repeated "),
                    (stream.epoch, stream.sent + 3, [1], "too early "),
                    (0, stream.sent, [1], "of long ago "),
                )
            )
            if event[0] == stream.epoch and event[1] == stream.sent:
                continue  # there is no epoch before the first
            body = codec.pack([[0, stream.request_id, *event]])
            frames = (connection.seal(route.plain, self.world.now_s), body)
            self.sockets.send(connection.index, frames)

    def forge(self, calls: list[tuple[Call, int]], guess: Callable[[SimWorker, int], int]) -> int:
        """Write into requests that run elsewhere, each with its epoch, over this worker's routes;
        returns how many events were sent."""
        forged = 0
        routes = {s.route for s in self.core._requests.streams.values() if s.route is not None}
        for route in sorted(routes, key=lambda route: route.plain):
            for call, epoch in calls:
                if call.request_id in self.core._requests.streams or route.connection.blocked:
                    continue
                at = len(call.token_ids)
                event = [0, call.request_id, guess(self, epoch), at, [666], "EVIL "]
                head = route.connection.seal(route.plain, self.world.now_s)
                self.sockets.send(route.connection.index, (head, codec.pack([event])))
                forged += 1
        return forged

    def kill(self) -> None:
        """kill -9 of the link; the engine follows."""
        if self.alive:
            self.world.note(self.name, "is killed")
            self.alive = False
            self.deaths += 1
            self._end_engines()
            self.sockets.cut_all()
            self._on_exit(self)


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
        return client_events.Tick()

    def ask(self, call: Call) -> None:
        """The application makes a request."""
        call.made_s = self.world.now_s
        self.calls[call.request_id] = call
        answer = call.answer
        if call.whole:
            asked = Request(model=call.model, window=1, **whole_request(answer.prompt))
        else:
            asked = Request(
                model=call.model,
                kind=Kind.COMPLETE,
                prompt=answer.prompt,
                params=Params(
                    max_tokens=answer.length,
                    seed=answer.seed,
                    pieces=PIECES if answer.split else [],
                ),
                priority=call.priority,
                window=1,
            )
        limits = Timeout(
            connect=None,
            queue=call.queue_s,
            first_token=None,
            between_tokens=None,
            total=call.total_s,
        )
        self.tell(client_events.RequestMade(call.request_id, asked, (), limits, self.retry))

    def drop(self, call: Call) -> None:
        """The application stops reading."""
        if call.request_id in self.calls:
            self.tell(client_events.RequestDropped(call.request_id))

    def handle(self, event: Any) -> None:
        if isinstance(event, client_events.RequestDropped):
            call = self.calls[event.request_id]
            if call.outcome or call.dropped:
                return
            call.dropped = True
            self.world.note(self.name, f"drops {call.request_id.hex()[:8]}")
        super().handle(event)

    def drain_worker(self, name: str) -> None:
        """The operator drains a worker."""
        self.order("bus.drain", {"worker": name, "deadline_ms": 2000})

    def order(self, verb: str, args: dict[str, Any]) -> None:
        """The operator asks for something."""
        query_id = self.world.rng.getrandbits(128).to_bytes(16)
        self.drains[query_id] = args["worker"]
        self.tell(client_events.QueryMade(query_id, verb, args, Timeout(total=5)))

    def kill(self) -> None:
        """kill -9: its answers are no longer read."""
        if self.alive:
            self.world.note(self.name, "is killed")
            self.alive = False
            for call in self.calls.values():
                call.gone = not call.outcome
            self.sockets.cut_all()

    def say_stray_things(self, calls: list[Call]) -> None:
        """Send valid messages without effect: late, repeated, or for unknown requests."""
        core, requests = self.core, self.core._requests
        if not self.alive or self.paused or not core._broker.has_session:
            return
        core._broker.now_s = self.world.now_s
        ended = [call.request_id for call in calls if call.outcome]
        for id_ in [b"\x01" + self.world.rng.randbytes(15), *ended[-2:]]:
            requests._send(MessageType.CANCEL, id_, Cancel())
            requests._send(MessageType.WINDOW, id_, Window(limit=1 << 20))
        for id_ in sorted(requests.at_broker)[:1]:
            requests._send(MessageType.WINDOW, id_, Window(limit=1))
            exchange = requests.exchanges[id_]
            again = msgspec.structs.replace(exchange.request, window=1)
            type_ = MessageType.REQUEST
            if exchange.epoch:
                type_ = MessageType.RESUME
                epochs = sorted(exchange.epochs - {0})
                resume = Resume(epoch=self.world.rng.choice(epochs))
                again = msgspec.structs.replace(again, resume=resume)
            requests._send(type_, id_, again)
        instructions, core._out = core._out, []
        for instruction in instructions:
            self.carry_out(instruction)

    def close(self) -> None:
        self.closed = True
        self.tell(client_events.CloseRequested())

    def carry_out(self, instruction: Any) -> None:
        match instruction:
            case client_events.Send(frames):
                self.sockets.send(self._socket, frames)
            case client_events.OpenSocket(address):
                self._socket = next(i for i, b in enumerate(self.brokers) if b.name == address)
                self.sockets.open(self._socket)
            case client_events.CloseSocket():
                self.sockets.close(self._socket)
            case client_events.Arrived(arrived):
                for event in arrived:
                    self._read(event.request_id, (event,), False)
            case client_events.Deliver(id_, items, final):
                self._read(id_, items, final)

    def _read(self, id_: bytes, items: tuple[Any, ...], final: bool) -> None:
        if id_ in self.drains:
            return
        call = self.calls[id_]
        name = f"{self.name} request {call.name}"
        if call.dropped and not self.closed:
            raise Violation(f"{name} was dropped and still gets {items}")
        if call.outcome:
            raise Violation(f"{name} ended with {call.outcome} and still gets {items}")
        for item in items:
            match item:
                case TokensEvent():
                    call.begun = False
                    self._tokens(name, call, item)
                case client_events.End():
                    call.outcome = "end"
                    self._said(name, call, item)
                    call.resumed, call.result = item.resumed, item.result
                    self._check_end(name, call)
                case client_events.Queued():
                    call.queued_s = self.world.now_s
                case client_events.Started():
                    call.begun = True
                    call.waited_s = max(call.waited_s, self.world.now_s - call.queued_s)
                    call.away_s = max(call.away_s, self.world.now_s - call.lost_s)
                    call.queued_s = call.lost_s = math.inf
                    self.world.note(self.name, f"{id_.hex()[:8]} runs at {item.worker}")
                case client_events.Recovering():
                    call.unheard += call.begun
                    call.begun = False
                    call.gave_way += any(words in item.reason for words in GIVING_WAY)
                    call.blamed.update(self.core._requests.exchanges[id_].lost_workers)
                    call.queued_s, call.lost_s = math.inf, min(call.lost_s, self.world.now_s)
                    self.world.note(self.name, f"{id_.hex()[:8]} recovers: {item.reason}")
                case BusError():
                    call.outcome, call.error = str(item.code), item
        if final != bool(call.outcome):
            raise Violation(f"{name}: final is {final}, the outcome {call.outcome!r}")
        if call.outcome:
            call.ended_s = self.world.now_s
            call.away_s = max(call.away_s, self.world.now_s - call.lost_s)
            self.world.note(self.name, f"{id_.hex()[:8]} ends: {call.outcome}")
        if (
            call.outcome
            and call.outcome != "end"
            and not _written(call.answer.whole).startswith(_written(call.said))
        ):
            raise Violation(f"{name} failed after text that is not a prefix: {call.said!r}")

    def _tokens(self, name: str, call: Call, item: TokensEvent) -> None:
        at = len(call.token_ids)
        right = [call.answer.token(i) for i in range(at, at + len(item.token_ids))]
        if item.offset != at or item.token_ids != right:
            raise Violation(f"{name} got {item} after {at} tokens instead of {right}")
        call.token_ids += item.token_ids
        self._said(name, call, item)
        exchange = self.core._requests.exchanges.get(
            call.request_id
        )  # None: it has ended meanwhile
        if exchange is not None and len(call.token_ids) > exchange.window_limit:
            raise Violation(
                f"{name} got {len(call.token_ids)} tokens; its window is {exchange.window_limit}"
            )
        if call.read_s:
            self.world.after(
                call.read_s * len(item.token_ids), self._take, call, len(call.token_ids)
            )
        else:
            self._take(call, len(call.token_ids))

    @staticmethod
    def _said(name: str, call: Call, item: TokensEvent | client_events.End) -> None:
        said = pieces_of(item)
        content = "".join(piece.text for piece in said if piece.kind == PieceKind.CONTENT)
        begins = said and not call.said
        if content != item.text or (begins and (item.pieces is None) is call.answer.split):
            raise Violation(f"{name} got {item} after {call.said}")
        call.text += item.text
        call.said = merged([*call.said, *said])

    def _take(self, call: Call, offset: int) -> None:
        if self.alive and not call.outcome and not call.dropped:
            self.world.after(0.0, self.tell, client_events.TokensTaken(call.request_id, offset))

    def _check_end(self, name: str, call: Call) -> None:
        whole = call.answer.whole
        if call.whole and call.result != result_of(call.answer.prompt)[1]:
            raise Violation(f"{name} ended with the result {call.result}")
        if call.answer.fails_at is not None and not call.answer.fails_once:
            raise Violation(f"{name} ended well although its engine failed it")
        if call.said != whole or len(call.token_ids) != call.answer.length:
            raise Violation(
                f"{name} ended with {len(call.token_ids)} of {call.answer.length} tokens and "
                f"{call.said!r} instead of {whole!r}"
            )


def _written(said: list[Piece]) -> str:
    """What was said, with its kinds."""
    return "".join(f"[{piece.kind}]{piece.text}" for piece in said)
