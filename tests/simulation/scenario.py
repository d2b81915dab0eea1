"""Runs a plan in three parts: requests and faults; then all faults are repaired, and everything
that can be served must be; then everyone leaves, and nothing may be left behind."""

from __future__ import annotations

import math
import random

from broker.core.events import ShutdownRequested
from broker.core.settings import CoreSettings
from client.options import Limits, Retry
from tests.simulation import judge
from tests.simulation.answers import Answer, Call
from tests.simulation.broker import SimBroker
from tests.simulation.client import SimClient
from tests.simulation.plan import STORM_S, Ask, Fault, Plan
from tests.simulation.shelf import name_of
from tests.simulation.worker import SimWorker
from tests.simulation.world import Party, Violation, World
from worker.core.events import EndKnown, StopRequested

MENDED_BOUND_S = 240.0
"""This long after the last fault, everything that can be served has been."""
GONE_BOUND_S = 60.0
"""This long after everyone has gone, nothing is left behind: all grace periods, an attempt to
connect and the longest back-off."""
RESTART_S = 3.0
"""How long a supervisor takes to replace a process that has died."""
KEEP_S = 3.0
GRACE_S = 6.0
STALL_S = 8.0


class Run:
    """One scenario."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world = world = World(plan.seed ^ 0x5EED, plan.longest_delay_s)
        settings = CoreSettings(
            queue_s=plan.queue_s,
            ttl_s=10_000.0,
            model_grace_s=600.0,
            client_heartbeat_s=1.0,
            client_liveness=4,
            orphan_grace_s=GRACE_S,
            ended_keep_s=KEEP_S,
            stall_no_work_s=STALL_S / 2,
            stall_lost_s=STALL_S,
            drain_s=2.0,
            move_s=5.0,
            preempt_floor_s=plan.preempt_s[0],
            preempt_again_s=plan.preempt_s[1],
            window_tokens=plan.window_tokens,
            placement=plan.placement,
            queue_requests=plan.queue_requests,
            inflight=plan.inflight,
            swap_factor=plan.swap_factor,
        )
        self.brokers = [
            SimBroker(world, f"broker{i}", settings, plan.peer_queue_messages, self._broker_gone)
            for i in range(plan.brokers)
        ]
        self.workers: list[SimWorker] = []
        self.gone_workers: list[SimWorker] = []
        for _ in range(plan.workers):
            self._start_worker()
        self.clients: list[SimClient] = []
        for _ in range(plan.clients):
            self._start_client()
        self.calls: list[Call] = []
        self.broker_away_s = RESTART_S
        self.happened: set[str] = set()
        #: Loads that failed; drawn apart, so that plans without such stay the same.
        self.failed_loads = 0
        self._loads = random.Random(~plan.seed)
        self.leaving = False

    @property
    def all_workers(self) -> list[SimWorker]:
        """All workers, including those that are gone."""
        return [*self.gone_workers, *self.workers]

    # --- the three parts --------------------------------------------------------------------------

    def to_the_end(self) -> Run:
        """Run all three parts; raises Violation, with the story."""
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
        judge.calls(self)

    def _leave(self) -> None:
        self.leaving = True
        for client in self.clients:
            client.close()
        self._until_nothing("after all clients have gone", judge.left_by_clients)
        for worker in self.workers:
            worker.tell(StopRequested("SIGTERM"))
        self._until_nothing("after all workers have gone", judge.left_by_workers)

    def _until_nothing(self, when: str, left: judge.Left) -> None:
        """Let time pass until nothing is left."""
        until_s = self.world.now_s + GONE_BOUND_S
        while story := left(self):
            if self.world.now_s >= until_s:
                raise Violation(f"{when}: {story}")
            self.world.run(self.world.now_s + 1.0)

    def _all_over(self) -> bool:
        return all(call.outcome or call.dropped or call.gone for call in self.calls)

    # --- what happens -----------------------------------------------------------------------------

    def _start_worker(self) -> None:
        plan = self.plan
        number = len(self.workers) + len(self.gone_workers)
        worker = SimWorker(
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
            on_demand=(plan.models, plan.units, plan.unload_idle_s, self._load_fails)
            if plan.models > 1
            else None,
        )
        self.workers.append(worker)

    def _load_fails(self) -> bool:
        """Whether a load that begins now fails."""
        fails = self.failed_loads < self.plan.load_failures and self._loads.random() < 0.4
        self.failed_loads += fails
        return fails

    def _replace(self, worker: SimWorker) -> None:
        if not self.leaving:
            self.workers.remove(worker)
            self.gone_workers.append(worker)
            self._start_worker()

    def _start_client(self) -> None:
        retry = Retry(attempts=10_000, backoff_first=0.05, backoff_longest=0.5, reconnect=10_000.0)
        limits = Limits(window=self.plan.window_tokens)
        name = f"client{len(self.clients)}"
        self.clients.append(SimClient(self.world, name, self.brokers, retry, limits))

    def _ask(self, ask: Ask) -> None:
        living = [client for client in self.clients if client.alive]
        client = living[ask.client % len(living)]
        rng = self.world.rng
        number = len(self.calls)
        if ask.length:
            fails_at = "" if ask.fails_at is None else ask.fails_at
            how = ask.kills or ("once" if ask.fails_once else "always")
            prompt = f"prompt {number}|{fails_at}|{how}"
            seed = rng.getrandbits(32)
            answer = Answer(prompt, seed, ask.length, ask.fails_at, ask.fails_once, ask.kills)
        else:
            answer = Answer(f"input {number}", 0, 0)
        request_id = b"\x01" + rng.randbytes(15)
        call = Call(
            request_id,
            answer,
            ask.length == 0,
            ask.priority,
            ask.read_s,
            ask.total_s,
            ask.queue_s,
            model=name_of(number % self.plan.models),
        )
        self.calls.append(call)
        client.ask(call)

    def _happen(self, fault: Fault) -> None:
        world = self.world
        broker = self.brokers[fault.index % len(self.brokers)]
        worker = self.workers[fault.index % len(self.workers)]
        client = self.clients[fault.index % len(self.clients)]
        peer = client if fault.kind.endswith("client") else worker
        self.happened.add(fault.kind)
        world.note("world", f"{fault.kind} {fault.index} {fault.lasts_s}")
        match fault.kind:
            case "cut_client" | "cut_worker":
                peer.sockets.cut_all()
            case "unplug_client" | "unplug_worker":
                peer.sockets.unplug()
                world.after(fault.lasts_s, peer.sockets.plug_in)
            case "garble_client" | "garble_worker":
                peer.sockets.garble(0 if fault.lasts_s < 2 else 2)
            case "kill_broker":
                self.broker_away_s = fault.lasts_s + RESTART_S
                broker.kill()
            case "stop_broker":
                self.broker_away_s = fault.lasts_s + RESTART_S
                broker.tell(ShutdownRequested(min(fault.lasts_s, 2.0)))
            case "kill_worker":
                worker.kill()
            case "drain_worker":
                worker.tell(StopRequested("SIGTERM"))
            case "end_known":
                self._end_known(worker, fault.lasts_s, "a notice")
            case "end_early":
                self._end_known(worker, 2 * fault.lasts_s, "a notice that is wrong")
                world.after(fault.lasts_s, worker.kill)
            case "end_changed":
                self._end_known(worker, 2 * fault.lasts_s, "a notice")
                later_s = 8.0 if fault.index % 2 else math.inf
                world.after(fault.lasts_s, self._end_known, worker, later_s, "another notice")
            case "order_drain":
                client.drain_worker(worker.name)
            case "kill_engine":
                worker.engine_dies(index=fault.index)
            case "hang_engine":
                worker.engine_hangs(fault.index)
            case "order_load":
                model = name_of(fault.index % self.plan.models)
                client.order("bus.load", {"worker": worker.name, "model": model})
            case "order_unload":
                model = "" if fault.index % 3 == 0 else name_of(fault.index % self.plan.models)
                client.order("bus.unload", {"worker": worker.name, "model": model})
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
            case "kill_client":
                self._start_client()
                client.kill()
            case "new_client":
                self._start_client()
            case "repeat_credit":
                worker.repeat_credit()
            case "odd_output":
                worker.say_odd_things()
            case "stray":
                client.say_stray_things(self.calls)

    def _end_known(self, worker: SimWorker, in_s: float, why: str) -> None:
        self.world.note(worker.name, f"will be gone in {in_s} s")
        worker.tell(EndKnown(self.world.now_s + in_s, why))

    def _broker_gone(self, broker: SimBroker) -> None:
        self.world.after(self.broker_away_s, self._restart, broker)

    def _restart(self, broker: SimBroker) -> None:
        if not broker.alive:
            broker.start()


def fails(plan: Plan) -> str:
    """The story of the plan's violation; empty if there is none."""
    try:
        Run(plan).to_the_end()
    except Exception as error:  # whatever breaks is a failure of the plan
        return f"{type(error).__name__}: {error}"
    return ""
