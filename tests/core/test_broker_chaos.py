"""Whatever clients and workers do, in whatever order, the core's tables stay consistent.

Promises about streams are tested by the simulation. Here, no order of events may break an invariant
or raise, and nothing may be left behind at the end.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from broker.core.events import (
    DisconnectReported,
    LoopWasLate,
    PeerOverflowed,
    PeerUnreachable,
    ShutdownForced,
    Side,
)
from broker.protocol.header import MessageType
from broker.protocol.messages import Held, WorkerState
from tests.core.broker_facts import Bus, ClientPeer, Message, WorkerPeer


class Chaos:
    """Random but legal moves of all peers; every step checks the invariants."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.bus = Bus(
            orphan_grace_s=2,
            ended_keep_s=3,
            ended_keep=20,
            model_grace_s=2,
            queue_requests=12,
            inflight=6,
            queue_s=4,
            placement=self.random.choice(["least_loaded", "lottery", "affinity"]),
        )
        self.clients: list[ClientPeer] = []
        self.workers: list[WorkerPeer] = []
        self.ids: list[tuple[bytes, str]] = []
        self.epochs: dict[bytes, int] = {}
        self.held: dict[str, dict[bytes, None]] = {}
        self.assigned: dict[WorkerPeer, list[Message]] = {}

    def step(self) -> None:
        self.random.choice(self.MOVES)(self)
        self.bus.wait(self.random.choice((0.0, 0.0, 0.01, 0.3, 1.1)))
        for client in list(self.clients):
            client.receive()
            if not client.known:
                self.clients.remove(client)
        for worker in list(self.workers):
            self.assigned[worker] += worker.assigned()
            if not worker.known:
                self.workers.remove(worker)

    def join_client(self) -> None:
        if len(self.clients) < 4:
            self.clients.append(self.bus.client())

    def join_worker(self) -> None:
        if len(self.workers) >= 4:
            return
        name = self.random.choice("abc")
        holds = [
            Held(request_id, self.epochs.get(request_id, 0), 3, self.random.random() < 0.7)
            for request_id in self.held.get(name, ())
            if self.random.random() < 0.8
        ]
        models = tuple(self.random.sample(("demo", "other"), self.random.randrange(1, 3)))
        slots = self.random.randrange(1, 4)
        worker = self.bus.worker(name, models=models, slots=slots, holds=tuple(holds))
        self.workers.append(worker)
        self.assigned[worker] = [m for m in worker.first if m.type is MessageType.ASSIGN]

    def request(self) -> None:
        if self.clients:
            model = self.random.choice(("demo", "other", "third"))
            priority = self.random.randrange(-1, 2)
            client = self.random.choice(self.clients)
            request_id = client.request(
                model, priority=priority, window=self.random.choice((2, 4096))
            )
            self.ids.append((request_id, model))
            self.epochs[request_id] = 0

    def some_id(self) -> tuple[bytes, str]:
        if not self.ids:
            return self.bus.new_id(), "demo"
        return self.random.choice(self.ids[-15:])

    def resume(self) -> None:
        if self.clients:
            request_id, model = self.some_id()
            epoch = max(1, self.epochs.get(request_id, 0) + self.random.choice((0, 1, 1, 1)))
            self.epochs[request_id] = epoch
            lost = tuple(self.random.sample("abc", self.random.choice((0, 0, 0, 1, 2))))
            self.random.choice(self.clients).resume(request_id, epoch, model=model, lost=lost)

    def cancel(self) -> None:
        if self.clients:
            self.random.choice(self.clients).cancel(self.some_id()[0])

    def window(self) -> None:
        if self.clients:
            limit = {"limit": self.random.randrange(1, 9999)}
            client = self.random.choice(self.clients)
            client.send(MessageType.WINDOW, self.some_id()[0], limit)

    def repeat(self) -> None:
        if self.clients:
            request_id, model = self.some_id()
            self.random.choice(self.clients).request(model, request_id=request_id)

    def work(self) -> None:
        busy = [worker for worker in self.workers if self.assigned[worker]]
        if not busy:
            return
        worker = self.random.choice(busy)
        assign = self.random.choice(self.assigned[worker])
        name = self.bus.core.workers[worker.routing_id].name
        move = self.random.random()
        if move < 0.4:
            worker.tokens(assign, 0)
            self.held.setdefault(name, {})[assign.id] = None
        elif move < 0.85:
            self.assigned[worker].remove(assign)
            fresh = not assign.assign.attach
            worker.finish(assign, tokens=self.random.choice((1, 50)), grant=fresh)
        else:
            self.assigned[worker].remove(assign)
            worker.reject(assign, retryable=self.random.random() < 0.7)

    def beat(self) -> None:
        for worker in self.workers:
            if worker.known:
                stuck = self.random.random() < 0.1
                age_ms = self.random.choice((31_000, 121_000)) if stuck else 0
                worker.beat(state=WorkerState.READY, engine_age_ms=age_ms)
        for client in self.clients:
            client.beat()

    def change_models(self) -> None:
        if self.workers:
            model = self.random.choice(("demo", "other", "new"))
            self.random.choice(self.workers).beat(models=[{"name": model}])

    def leave(self) -> None:
        peers = [*self.clients, *self.workers]
        if peers and self.random.random() < 0.5:
            peer = self.random.choice(peers)
            match self.random.randrange(4):
                case 0:
                    peer.goodbye(self.random.choice(("closed", "drained", "engine_dead")))
                case 1:
                    peer.send_frames(b"garbage", b"")
                case 2:
                    self.bus.handle(PeerOverflowed(peer.side, peer.routing_id))
                case _:
                    self.bus.handle(PeerUnreachable(peer.side, peer.routing_id))

    def drain(self) -> None:
        if self.clients and self.workers and self.random.random() < 0.3:
            name = self.bus.core.workers[self.random.choice(self.workers).routing_id].name
            self.random.choice(self.clients).query("bus.drain", worker=name, deadline_ms=100)

    def look(self) -> None:
        if self.clients:
            for verb in ("bus.models", "bus.workers", "bus.clients", "bus.stats", "bus.requests"):
                self.random.choice(self.clients).query(verb)

    def disturb(self) -> None:
        self.bus.handle(DisconnectReported(Side.BACK))
        self.bus.handle(LoopWasLate(self.random.choice((0.1, 3.0))))

    MOVES: tuple[Any, ...] = (
        join_client, join_worker, join_worker, request, request, request, resume, resume, cancel,
        window, repeat, work, work, work, work, beat, beat, change_models, leave, drain, look,
        disturb,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_no_order_of_events_breaks_an_invariant_or_leaves_anything_behind(seed: int) -> None:
    chaos = Chaos(seed)
    for _ in range(250):
        chaos.step()
    bus, core = chaos.bus, chaos.bus.core
    assert core.counters["ended"] + core.counters["interrupted"] > 5, "something happened"
    if seed % 4 == 0:
        bus.handle(ShutdownForced())
    bus.wait(4000)
    for table in (
        core.clients, core.workers, core.requests, core.queues, core.routes, core.fast_routes,
        core.kept, core.service_s, core.timers,
    ):  # fmt: skip
        assert not table, table
    assert core.queued_bytes == 0
