"""Judges a scenario: how every call must have ended, and what may be left over.

The text, the window and the slots are checked as they happen (`client`, `engine`), and the cores'
own invariants after every event (`world`). An error is allowed only if the scenario gave a reason
for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.simulation.answers import Call
from tests.simulation.plan import (
    BROKER_DEATH,
    HARMLESS,
    PAUSE,
    WORKER_CONNECTION,
    WORKER_DEATH,
)
from tests.simulation.world import Violation

if TYPE_CHECKING:
    from tests.simulation.scenario import Run

Left = Callable[["Run"], str]

_SILENCE = frozenset({"pause_worker", "unplug_worker", "hang_engine"})
"""Faults after which a worker may be back too late and count as dead. One broken connection is not
enough, but after several, or a time without a broker, its back-off outlasts the time for which
requests are kept."""
_BROKEN = frozenset({"cut_worker", "garble_worker"})
_QUICK_RETURNS = 3
_NO_BROKER = frozenset({"kill_broker", "stop_broker", "pause_broker"})
_AWAY = frozenset({"pause_client", "unplug_client", "pause_broker", "kill_broker", "stop_broker"})
"""Faults in which a client may be away for longer than the grace period, and find its request
cancelled, without knowing how long it was away."""
AWAY_S = 2.5
"""An absence shorter than every time for which requests are kept."""
_ONCE = frozenset({*HARMLESS, "cut_client", "garble_client"})
"""Faults that give no reason to compute anything twice."""
_LOSES_WORKERS = frozenset({*WORKER_CONNECTION, *WORKER_DEATH, *BROKER_DEATH, *PAUSE})
"""Without these faults, workers leave in order or not at all, so no request is to blame."""
LATE_S = 0.001


def calls(run: Run) -> None:
    """Judge every call, some time after all faults were repaired."""
    lost = _LOSES_WORKERS & run.happened or any(worker.deaths for worker in run.all_workers)
    for call in run.calls:
        if not call.dropped and not call.gone and call.outcome != "end":
            _failure(run, call)
        if call.outcome and call.total_s is not None and "pause_client" not in run.happened:
            took_s = call.ended_s - call.made_s
            if took_s > call.total_s + LATE_S:
                raise Violation(f"request {call.name} took {took_s:.3f} s of {call.total_s} s")
        on_time = not any(kind.startswith(("pause", "unplug", "kill")) for kind in run.happened)
        on_time = on_time and not call.gave_way  # preemption is waiting too, but exceeds no limit
        if on_time and call.waited_s > run.plan.queue_s + 2 * run.plan.longest_delay_s + LATE_S:
            raise Violation(f"request {call.name} waited {call.waited_s:.3f} s in the queue")
        if not run.happened and call.resumed > call.gave_way and not call.answer.fails_once:
            raise Violation(f"request {call.name} was resumed although nothing went wrong")
        if call.blamed and not lost:
            raise Violation(f"request {call.name} blames {sorted(call.blamed)}, and none was lost")
    if run.happened <= _ONCE and run.plan.brokers == 1:
        _nothing_twice(run)


def _failure(run: Run, call: Call) -> None:
    if not call.outcome:
        raise Violation(
            f"request {call.name} was not served although all was repaired long ago: "
            f"{len(call.token_ids)} of {call.answer.length} tokens"
        )
    lived_s = call.ended_s - call.made_s + LATE_S
    deaths = sum(worker.deaths for worker in run.all_workers)
    faults = Counter(fault.kind for fault in run.plan.faults)
    silent, broken = (sum(faults[kind] for kind in kinds) for kinds in (_SILENCE, _BROKEN))
    late = broken if _NO_BROKER & run.happened else max(0, broken - _QUICK_RETURNS)
    # Jobs that failed at the worker while the connection was down do not come back with it, nor do
    # those that never reached it.
    lost = deaths + silent + late + call.answer.fails_once + call.unheard
    excuse = {
        "poison": lost >= 3,
        "cancelled": bool(_AWAY & run.happened) or call.away_s > AWAY_S,
        "engine_error": call.answer.fails_at is not None and not call.answer.fails_once,
        "deadline_exceeded": any(
            limit_s is not None and lived_s >= limit_s
            for limit_s in (call.total_s, call.queue_s, run.plan.queue_s)
        ),
    }
    if not excuse.get(call.outcome):
        raise Violation(f"request {call.name} failed without a reason: {call.error!r}")


def _nothing_twice(run: Run) -> None:
    """If only clients' connections broke, each request was started once and each token computed
    once."""
    runs: Counter[str] = Counter()
    computed: Counter[str] = Counter()
    for worker in run.all_workers:
        runs += worker.runs
        computed += worker.computed
    # A preemption that its client did not hear of, since its own RESUME crossed it. Only a run
    # without a restarted broker comes here, so nothing is missing from the counters.
    heard = sum(call.gave_way for call in run.calls)
    moved = ("preempted", "swap_moves")
    unheard = sum(b.core.counters[name] for b in run.brokers for name in moved) - heard
    for call in run.calls:
        if call.away_s > AWAY_S:
            continue
        again = (
            max(0, unheard)
            + (len(run.all_workers) if call.answer.fails_once else 0)
            + call.gave_way
        )
        if runs[call.answer.prompt] > 1 + again:
            raise Violation(f"request {call.name} was started {runs[call.answer.prompt]} times")
        if not again and computed[call.answer.prompt] > call.answer.length:
            raise Violation(f"{computed[call.answer.prompt]} tokens of {call.name} were computed")


def left_by_clients(run: Run) -> str:
    """What is left although all clients have gone; empty if nothing is."""
    for worker in run.workers:
        core = worker.core
        if not worker.alive:
            continue
        jobs = sum(len(engine.jobs) for engine in worker.engines)
        if jobs or core.running:
            return f"{worker.name} runs {jobs} jobs and counts {core.running}"
        if core._requests.streams:
            return f"{worker.name} keeps {len(core._requests.streams)} requests"
        if any(not engine.ready or engine.hung for engine in worker.engines):
            continue
        if not all(connection.open for connection in core._connections):
            return f"{worker.name} is not connected"
        credit = 0
        for broker in run.brokers:
            sessions = broker.core.workers.values()
            credit += sum(s.unspent for s in sessions if s.name == worker.name)
        if credit != worker.slots:
            return f"{worker.name} has {worker.slots} slots; brokers have credit for {credit}"
    for client in run.clients:
        if client.alive and client.core.open_requests:
            return f"{client.name} has {client.core.open_requests} open requests"
    return _left_at_brokers(run, ("clients", "requests", "queues", "queued_bytes", "routes"))


def left_by_workers(run: Run) -> str:
    """What is left although everyone has gone; empty if nothing is."""
    for worker in run.workers:
        if worker.alive:
            return f"{worker.name} was told to stop and has not"
    return _left_at_brokers(run, ("workers", "shared", "routes", "fast_routes", "requests"))


def _left_at_brokers(run: Run, tables: tuple[str, ...]) -> str:
    for broker in run.brokers:
        for table in tables:
            held = getattr(broker.core, table)
            if held:
                count = held if isinstance(held, int) else len(held)
                return f"{broker.name} has left behind {table}: {count}"
    return ""
