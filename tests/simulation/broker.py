"""The simulation's broker: the real core in a simulated process."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from broker.core import events as broker_events
from broker.core.controller import BrokerCore
from broker.core.events import Side
from broker.core.instructions import ForgetPeer, Send as BrokerSend, StopLoop
from broker.core.settings import CoreSettings
from tests.simulation.world import Party, Wire, World


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
