"""The simulation's client: the real core in a simulated process, and a caller that checks it."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec

from broker.core.events import Side
from broker.protocol.errors import LOAD_FAILED
from broker.protocol.header import MessageType
from broker.protocol.messages import (
    Cancel,
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
from tests.simulation.broker import SimBroker
from tests.simulation.sockets import ClientSockets
from tests.simulation.world import Party, Violation, World
from worker.engines.common.answer_parser import merged

GIVING_WAY = ("higher priority", " loads ", "unloaded")
"""Why a stream moved although nothing went wrong: for another request, for the turn of another
model, or for one that another broker ordered in the same moment."""


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
        self.sockets = ClientSockets(self, Side.FRONT, brokers)
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
                    # It may have ended in the same pass.
                    if exchange := self.core._requests.exchanges.get(id_):
                        call.blamed.update(exchange.lost_workers)
                    call.queued_s, call.lost_s = math.inf, min(call.lost_s, self.world.now_s)
                    self.world.note(self.name, f"{id_.hex()[:8]} recovers: {item.reason}")
                case BusError() if item.details.get(LOAD_FAILED) and item.retry_after_ms:
                    self._ask_again(name, call, item.retry_after_ms / 1000)
                    return
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

    def _ask_again(self, name: str, call: Call, after_s: float) -> None:
        """The application asks again when its model may be loaded after all: as told."""
        if call.token_ids:
            raise Violation(f"{name} is not to go on, although it was begun")
        call.asked_again += 1
        call.queued_s = math.inf  # until then it does not wait in the queue
        self.world.note(self.name, f"{name} asks again in {after_s:.3f} s")
        del self.calls[call.request_id]
        call.request_id = b"\x01" + self.world.rng.randbytes(15)
        self.calls[call.request_id] = call

        def again() -> None:
            if self.alive and not self.closed and not call.dropped:
                self.ask(call)

        self.world.after(after_s, again)

    def _tokens(self, name: str, call: Call, item: client_events.Tokens) -> None:
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
