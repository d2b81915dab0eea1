"""The sockets of a simulated worker or client."""

from __future__ import annotations

from typing import Any

from broker.core.events import Side
from client.core import events as client_events
from tests.simulation.broker import SimBroker
from tests.simulation.world import Party, Wire
from worker.core import events as worker_events


class Sockets:
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


class ClientSockets(Sockets):
    def opened_event(self, index: int) -> Any:
        return client_events.SocketOpened()

    def lost_event(self, index: int, why: str) -> Any:
        return client_events.SocketLost(why)

    def message_event(self, index: int, frames: tuple[bytes, ...]) -> Any:
        return client_events.MessageReceived(frames)
