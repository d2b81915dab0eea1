"""Models that a worker loads on demand: when one gives way to another (SPEC.md section 7.3).

A worker that can have one of its models loaded at a time says which, and what a load costs.
Requests for the loaded model go first. Another model's turn comes when nothing is asked of the
loaded one, or when its oldest request has waited `swap_factor` loads, and no sooner than that after
the last swap: so swaps take at most 1/(1 + swap_factor) of a worker's time, and a model waits at
most for the turns of the others. A deadline shortens a turn to the length of one load. What still
runs when a turn has been over for that long moves away and goes on in its model's next turn.

Functions on the core's state, called by `dispatch`, `controller` and `queries`.
"""

from __future__ import annotations

import math
from typing import Final

from broker.core import endings
from broker.core.records import Swap, WorkerSession
from broker.core.state import BusState
from broker.protocol import codec
from broker.protocol.errors import ErrorCode, ErrorInfo
from broker.protocol.header import MessageType
from broker.protocol.messages import Accepted, Heartbeat

LOOK_S: Final = 0.1
"""Between two looks while something waits."""
FIRST_LOAD_S: Final = 10.0
"""What a load is taken to cost before one was measured."""
ASK_AGAIN_S: Final = 5.0
GIVE_UP_S: Final = 900.0
"""A load that takes longer is not waited for."""
IDLE_LOADS: Final = 0.25
"""A model gives way at once when nothing was asked of it for this share of a load: clients that are
answered together ask again a moment later."""
PROGRESS_STEP: Final = 0.1
"""Those who wait are told of a load's progress in steps of this."""


def consider(bus: BusState) -> None:
    """Look at the workers that load on demand and are not watched by a timer."""
    for worker in list(bus.swappers.values()):
        if not worker.swap_watched:
            _look(bus, worker)


def changed(bus: BusState, worker: WorkerSession) -> None:
    """The worker said what it has loaded, or how far it is."""
    if any(not info.loaded for info in worker.models.values()):
        bus.swappers[worker.routing_id] = worker
    else:
        bus.swappers.pop(worker.routing_id, None)
    swap = worker.swap
    if swap is None:
        return
    info = worker.models.get(swap.model)
    if swap.model and info is not None and info.loaded:
        worker.swap = None
        worker.turn_s = bus.now_s
        bus.counters["swaps"] += 1
        took_s = round(bus.now_s - swap.since_s, 1)
        bus.log("info", "model loaded", worker, model=swap.model, took_s=took_s)
    elif swap.asked_s > -math.inf and (
        info is None if swap.model else not any(i.loaded for i in worker.models.values())
    ):
        worker.swap = None  # it cannot be loaded after all; or it was unloaded, as asked
    else:
        _tell_progress(bus, worker, swap)
    bus.dirty.update(worker.models)


def ask(bus: BusState, worker: WorkerSession, model: str) -> None:
    """Load a model there next, or with an empty name unload what is loaded."""
    if worker.swap is None:
        bus.log("info", "model gives way", worker, next=model or "none")
    worker.swap = Swap(model, bus.now_s)
    _look(bus, worker)


def _look(bus: BusState, worker: WorkerSession) -> None:
    """Decide, and look again as long as something waits."""
    worker.swap_watched = False
    if bus.workers.get(worker.routing_id) is not worker:
        return
    if worker.swap is None and worker.fit and worker.alone is None and not worker.held:
        model, due_s = _next(bus, worker)
        if due_s == math.inf:
            return
        if due_s <= bus.now_s:
            ask(bus, worker, model)
            return
    elif worker.swap is not None:
        _carry_out(bus, worker, worker.swap)
    worker.swap_watched = True
    bus.at(bus.now_s + LOOK_S, _look, worker)


def _next(bus: BusState, worker: WorkerSession) -> tuple[str, float]:
    """The model whose turn comes next there, and when."""
    best, least = "", (math.inf, math.inf)
    idle = not worker.running and not any(
        info.loaded and name in bus.queues for name, info in worker.models.items()
    )
    if not idle:
        worker.swap_idle = math.inf, -1
    for name, info in worker.models.items():
        queue = bus.queues.get(name)
        if info.loaded or queue is None or _on_its_way(bus, worker, name):
            continue
        waiting = queue.all()
        if not waiting:
            continue
        load_s = cost_s(worker, name)
        patience_s = bus.settings.swap_factor * load_s
        oldest_s = min(request.queued_s for request in waiting)
        deadline_s = min(min(r.queue_until_s, r.ttl_until_s) for r in waiting) - 2 * load_s
        due_s = max(oldest_s, worker.turn_s) + patience_s
        if idle and not _served_elsewhere(bus, worker, name):
            due_s = max(oldest_s, _idle_since_s(bus, worker) + IDLE_LOADS * load_s)
        # A deadline shortens a turn, and never below one load: else nothing but swaps would happen.
        due_s = min(due_s, max(deadline_s, worker.turn_s + load_s))
        # Of those that are due, whoever waits longest.
        if (max(due_s, bus.now_s), oldest_s) < least:
            best, least = name, (max(due_s, bus.now_s), oldest_s)
    return best, least[0]


def _idle_since_s(bus: BusState, worker: WorkerSession) -> float:
    """Since when it has had nothing to do, as far as was seen; a moment between two requests does
    not count. One that has nothing loaded has no model to wait for."""
    if not any(info.loaded for info in worker.models.values()):
        return -math.inf
    since_s, assigned = worker.swap_idle
    if assigned != worker.assigned:
        since_s = bus.now_s
        worker.swap_idle = since_s, worker.assigned
    return since_s


def cost_s(worker: WorkerSession, model: str) -> float:
    """What a load of the model takes, as far as the worker knows."""
    return worker.models[model].load_ms / 1000 or FIRST_LOAD_S


def _on_its_way(bus: BusState, worker: WorkerSession, model: str) -> bool:
    """Another worker is about to load it."""
    others = bus.registry.serving(model).values()
    return any(w is not worker and w.swap is not None and w.swap.model == model for w in others)


def _served_elsewhere(bus: BusState, worker: WorkerSession, model: str) -> bool:
    others = bus.registry.serving(model).values()
    return any(
        w is not worker and w.fit and w.swap is None and w.models[model].loaded for w in others
    )


def _carry_out(bus: BusState, worker: WorkerSession, swap: Swap) -> None:
    waited_s = bus.now_s - swap.since_s
    if waited_s > GIVE_UP_S:
        bus.log("warning", "model not loaded", worker, model=swap.model, waited_s=round(waited_s))
        worker.swap = None
        bus.dirty.update(worker.models)
        return
    if worker.running:
        patience_s = bus.settings.swap_factor * (
            cost_s(worker, swap.model) if swap.model in worker.models else FIRST_LOAD_S
        )
        if waited_s >= patience_s:
            _move_away(bus, worker, swap)
    elif not worker.moving and bus.now_s - swap.asked_s >= ASK_AGAIN_S:
        swap.asked_s = bus.now_s
        beat = Heartbeat(
            waiting=worker.waiting_sent,
            recalled=worker.recalled,
            returned=worker.returned,
            load=swap.model,
            unload=not swap.model,
        )
        bus.send(worker, MessageType.HEARTBEAT, worker.id, codec.encode(beat))


def _move_away(bus: BusState, worker: WorkerSession, swap: Swap) -> None:
    """Streams that outlast their model's turn go on in its next one."""
    error = ErrorInfo(
        code=ErrorCode.DRAINING,
        message=f"worker {worker.name} loads {swap.model or 'no other model'} now; the stream goes "
        "on when its model is loaded again",
        retryable=True,
    )
    for request in list(worker.running.values()):
        bus.counters["swap_moves"] += 1
        endings.move(bus, request, error, "moved, for the turn of another model")


def _tell_progress(bus: BusState, worker: WorkerSession, swap: Swap) -> None:
    """Tell those who wait for the model how far it is."""
    progress = worker.beat.progress
    queue = bus.queues.get(swap.model)
    if progress is None or queue is None or progress < swap.told + PROGRESS_STEP:
        return
    swap.told = progress
    for request in queue.all():
        if request.client is not None:
            accepted = Accepted(position=queue.position(request), progress=progress)
            body = codec.encode(accepted)
            bus.send(request.client, MessageType.ACCEPTED, request.id, body)
