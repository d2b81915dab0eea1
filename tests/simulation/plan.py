"""A scenario as data, made from a seed, run to its end, judged, and shrunk when it fails.

A plan runs in three parts: requests and faults (`STORM_S`), then everything is mended and whatever
can be
served must be, then everyone leaves and nothing may be left behind.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from broker.core.settings import CoreSettings
from client.options import Limits, Retry
from tests.simulation.parties import Answer, Call, SimBroker, SimClient, SimWorker
from tests.simulation.world import Party, Violation, World

STORM_S = 20.0
MENDED_BOUND_S = 240.0
"""Everything that can be served is, this long after the last fault."""
KEEP_S = 3.0
GRACE_S = 6.0
STALL_S = 8.0
RESTART_S = 3.0
"""A supervisor starts another worker in place of one that is gone."""

FAULTS = (
    "cut_client",
    "cut_worker",
    "unplug_client",
    "unplug_worker",
    "kill_broker",
    "stop_broker",
    "kill_worker",
    "kill_engine",
    "hang_engine",
    "drain_worker",
    "order_drain",
    "pause_broker",
    "pause_worker",
    "pause_client",
    "drop",
    "burst",
)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong."""

    at_s: float
    kind: str
    #: Chooses the victim.
    index: int
    #: How long it lasts.
    lasts_s: float


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that an application makes."""

    at_s: float
    client: int
    length: int
    priority: int
    read_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole scenario."""

    seed: int
    brokers: int
    workers: int
    slots: int
    clients: int
    window_tokens: int
    step_s: float
    load_s: float
    longest_delay_s: float
    placement: str
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]


def make(
    seed: int,
    kinds: tuple[str, ...] = FAULTS,
    most_faults: int = 8,
    brokers: tuple[int, ...] = (1, 1, 2),
) -> Plan:
    """The plan of a seed."""
    rng = random.Random(seed)
    asks = tuple(
        Ask(
            at_s=rng.uniform(0, STORM_S * 0.8),
            client=rng.randrange(3),
            length=rng.choice((1, 3, 8, 20, 40)),
            priority=rng.choice((0, 0, 0, 5)),
            read_s=rng.choice((0.0, 0.0, 0.0, 0.02, 0.3)),
        )
        for _ in range(rng.randint(2, 12))
    )
    faults = tuple(
        Fault(
            at_s=rng.uniform(0, STORM_S),
            kind=rng.choice(kinds),
            index=rng.randrange(6),
            lasts_s=rng.choice((0.05, 0.5, 2.0, 7.0, 12.0)),
        )
        for _ in range(rng.randint(0, most_faults) if kinds else 0)
    )
    return Plan(
        seed=seed,
        brokers=rng.choice(brokers),
        workers=rng.randint(1, 3),
        slots=rng.randint(1, 3),
        clients=rng.randint(1, 3),
        window_tokens=rng.choice((2, 8, 64)),
        step_s=rng.choice((0.02, 0.1, 0.4)),
        load_s=rng.choice((0.1, 2.0)),
        longest_delay_s=rng.choice((0.003, 0.05, 0.4)),
        placement=rng.choice(("least_loaded", "shortest_queue", "lottery", "affinity")),
        asks=asks,
        faults=faults,
    )


class Run:
    """A plan in motion."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world = world = World(plan.seed ^ 0x5EED, plan.longest_delay_s)
        settings = CoreSettings(
            queue_s=10_000.0,
            ttl_s=10_000.0,
            model_grace_s=600.0,
            client_heartbeat_s=1.0,
            client_liveness=4,
            orphan_grace_s=GRACE_S,
            ended_keep_s=KEEP_S,
            stall_no_work_s=STALL_S / 2,
            stall_lost_s=STALL_S,
            drain_s=2.0,
            window_tokens=plan.window_tokens,
            placement=plan.placement,
        )
        self.brokers = [SimBroker(world, f"broker{i}", settings) for i in range(plan.brokers)]
        self.workers: list[SimWorker] = []
        self.gone_workers: list[SimWorker] = []
        for _ in range(plan.workers):
            self._start_worker()
        retry = Retry(attempts=10_000, backoff_first=0.05, backoff_longest=0.5, reconnect=10_000.0)
        self.clients = [
            SimClient(world, f"client{i}", self.brokers, retry, Limits(window=plan.window_tokens))
            for i in range(plan.clients)
        ]
        self.calls: list[Call] = []
        self.happened: set[str] = set()
        self.leaving = False

    # --- the three parts --------------------------------------------------------------------------

    def to_the_end(self) -> Run:
        """Run all three parts; raises Violation with the story."""
        try:
            self._storm()
            self._mend()
            self._leave()
        except AssertionError as error:
            story = "\n".join(self.world.story)
            raise Violation(f"{error}\n\nplan: {self.plan}\n\n{story}") from error
        return self

    def _storm(self) -> None:
        world, start_s = self.world, self.world.now_s
        for ask in self.plan.asks:
            world.at(start_s + ask.at_s, self._ask, ask)
        for fault in self.plan.faults:
            world.at(start_s + fault.at_s, self._happen, fault)
        world.run(start_s + STORM_S)

    def _mend(self) -> None:
        for party in [*self.brokers, *self.workers, *self.clients]:
            party.resume()
        for broker in self.brokers:
            if not broker.alive:
                broker.start()
        for peer in [*self.workers, *self.clients]:
            peer.sockets.plug_in()
        self.world.note("world", "is mended")
        self.world.run(self.world.now_s + MENDED_BOUND_S, self._all_over)
        for call in self.calls:
            self._judge(call)

    def _leave(self) -> None:
        self.leaving = True
        for client in self.clients:
            client.close()
        # A second for what is under way, and the time that ended requests are kept.
        self.world.run(self.world.now_s + GRACE_S + KEEP_S + 12.0)
        for worker in self.workers:
            if worker.alive and worker.engine.jobs:
                raise Violation(f"{worker.name} still runs {len(worker.engine.jobs)} jobs")
            if worker.alive and worker.core.running:
                raise Violation(f"{worker.name} still counts {worker.core.running} running")
            worker.tell(_stop())
        self.world.run(self.world.now_s + GRACE_S + KEEP_S + 12.0)
        for worker in self.workers:
            if worker.alive:
                raise Violation(f"{worker.name} was told to stop and has not")
        for broker in self.brokers:
            core = broker.core
            left = {
                "clients": len(core.clients),
                "workers": len(core.workers),
                "requests": len(core.requests),
                "queues": len(core.queues),
                "routes": len(core.routes),
                "queued_bytes": core.queued_bytes,
            }
            if any(left.values()):
                raise Violation(f"{broker.name} has left behind {left}")

    def _all_over(self) -> bool:
        return all(call.outcome or call.dropped for call in self.calls)

    def _judge(self, call: Call) -> None:
        if call.dropped or call.outcome == "end":
            return
        name = call.request_id.hex()[:8]
        if not call.outcome:
            raise Violation(
                f"request {name} was not served in {MENDED_BOUND_S:.0f} s after all was mended: "
                f"{len(call.token_ids)} of {call.answer.length} tokens"
            )
        deaths = sum(worker.deaths for worker in [*self.workers, *self.gone_workers])
        away = {"pause_client", "unplug_client", "cut_client", "kill_broker", "stop_broker"}
        excuse = {
            # Two workers died while they ran it. One that is silent for too long counts as dead.
            "poison": deaths + sum(f.kind in _SILENCE for f in self.plan.faults) >= 2,
            # Its client was away for longer than the grace.
            "cancelled": bool(away & self.happened),
        }
        if not excuse.get(call.outcome):
            raise Violation(f"request {name} failed without need: {call.error!r}")

    # --- what happens -----------------------------------------------------------------------------

    def _start_worker(self) -> None:
        plan = self.plan
        number = len(self.workers) + len(self.gone_workers)
        self.workers.append(
            SimWorker(
                self.world,
                f"worker{number}",
                self.brokers,
                slots=plan.slots,
                step_s=plan.step_s,
                load_s=plan.load_s,
                settings={
                    "grace_s": GRACE_S,
                    "drain_s": 2.0,
                    "kept_s": KEEP_S,
                    "window_wait_s": 600.0,
                    "stall_s": STALL_S,
                },
                on_exit=lambda worker: self.world.after(RESTART_S, self._replace, worker),
            )
        )

    def _ask(self, ask: Ask) -> None:
        client = self.clients[ask.client % len(self.clients)]
        rng = self.world.rng
        answer = Answer(f"prompt {len(self.calls)}", rng.getrandbits(32), ask.length)
        request_id = b"\x01" + rng.randbytes(15)
        call = Call(request_id, answer, ask.priority, ask.read_s)
        self.calls.append(call)
        client.ask(call)

    def _happen(self, fault: Fault) -> None:
        world = self.world
        broker = self.brokers[fault.index % len(self.brokers)]
        worker = self.workers[fault.index % len(self.workers)]
        client = self.clients[fault.index % len(self.clients)]
        self.happened.add(fault.kind)
        world.note("world", f"{fault.kind} {fault.index} {fault.lasts_s}")
        match fault.kind:
            case "cut_client":
                client.sockets.cut_all()
            case "cut_worker":
                worker.sockets.cut_all()
            case "unplug_client" | "unplug_worker":
                peer = client if fault.kind == "unplug_client" else worker
                peer.sockets.unplug()
                world.after(fault.lasts_s, peer.sockets.plug_in)
            case "kill_broker" | "stop_broker":
                if fault.kind == "kill_broker":
                    broker.kill()
                else:
                    broker.tell(_shutdown(min(fault.lasts_s, 2.0)))
                world.after(fault.lasts_s + 3.0, self._restart, broker)
            case "kill_worker":
                worker.kill()
            case "drain_worker":
                worker.tell(_stop())
            case "order_drain":
                client.drain_worker(worker.name)
            case "kill_engine":
                worker.engine_dies()
            case "hang_engine":
                worker.engine_hangs()
            case "pause_broker" | "pause_worker" | "pause_client":
                party: Party = {"b": broker, "w": worker, "c": client}[fault.kind[6]]
                party.pause()
                world.after(fault.lasts_s, party.resume)
            case "drop":
                if self.calls:
                    call = self.calls[fault.index % len(self.calls)]
                    owner = next(c for c in self.clients if call.request_id in c.calls)
                    owner.drop(call)
            case "burst":
                for _ in range(6):
                    self._ask(Ask(0, fault.index, 3, 0, 0.0))

    def _restart(self, broker: SimBroker) -> None:
        if not broker.alive:
            broker.start()

    def _replace(self, worker: SimWorker) -> None:
        """A supervisor starts another process where one is gone."""
        if not self.leaving:
            self.workers.remove(worker)
            self.gone_workers.append(worker)
            self._start_worker()


_SILENCE = ("pause_worker", "unplug_worker", "pause_broker", "cut_worker", "hang_engine")


def _stop() -> Any:
    from worker.events import StopRequested

    return StopRequested("SIGTERM")


def _shutdown(grace_s: float) -> Any:
    from broker.core.events import ShutdownRequested

    return ShutdownRequested(grace_s)


def shrink(plan: Plan) -> Plan:
    """A smaller plan that still fails: without faults and requests that do not matter."""
    changed = True
    while changed:
        changed = False
        for field in ("faults", "asks"):
            items = getattr(plan, field)
            for index in range(len(items)):
                smaller = dataclasses.replace(
                    plan, **{field: (*items[:index], *items[index + 1 :])}
                )
                if fails(smaller):
                    plan, changed = smaller, True
                    break
    return plan


def fails(plan: Plan) -> str:
    """The story of the plan's violation; empty when there is none."""
    try:
        Run(plan).to_the_end()
    except Exception as error:  # whatever breaks is a failure of the plan
        return f"{type(error).__name__}: {error}"
    return ""
