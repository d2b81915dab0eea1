"""Models that a worker loads on demand: when one gives way to another (SPEC.md section 7.3).

A worker that cannot have all of its models loaded says which are, what each occupies, and what a
load costs. A model that fits beside those that are loaded is loaded as soon as it is asked for.
Otherwise the least recently used give way, and requests for them go first: another model's turn
comes when nothing is asked of those that give way, or when its oldest request has waited
`swap_factor` loads, and no sooner than that after they were loaded: so swaps take at most
1/(1 + swap_factor) of a worker's time, and a model waits at most for the turns of the others. A
deadline shortens a turn to the length of one load. What still runs when a turn has been over for
that long, and has made a token, moves away and goes on in its model's next turn. The other models
of the worker go on.

Functions on the core's state, called by `dispatch`, `controller` and `queries`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final

from broker.core import endings
from broker.core.records import RequestState, Swap, WorkerSession
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
BEGIN_TURNS: Final = 10
"""A stream without a token stays for so many turns; a worker may not tell when it has one."""
PROGRESS_STEP: Final = 0.1
"""Those who wait are told of a load's progress in steps of this."""


def consider(bus: BusState) -> None:
    """Look at the workers that load on demand and are not watched by a timer."""
    for worker in list(bus.swappers.values()):
        if not worker.swap_watched:
            _look(bus, worker)


def changed(bus: BusState, worker: WorkerSession) -> None:
    """The worker said what it has loaded, or how far it is."""
    loaded = {name for name, info in worker.models.items() if info.loaded}
    if len(loaded) < len(worker.models):
        bus.swappers[worker.routing_id] = worker
    else:
        bus.swappers.pop(worker.routing_id, None)
    if len(loaded) < len(worker.models) or worker.turns:
        for name in worker.models:
            if name in loaded:
                worker.turns.setdefault(name, bus.now_s)
            else:
                worker.turns.pop(name, None)
                worker.used.pop(name, None)
    swap = worker.swap
    if swap is None:
        return
    if swap.model in loaded:
        worker.swap = None
        bus.counters["swaps"] += 1
        took_s = round(bus.now_s - swap.since_s, 1)
        bus.log("info", "model loaded", worker, model=swap.model, took_s=took_s)
    elif swap.asked_s > -math.inf and (
        swap.model not in worker.models if swap.model else not swap.gives_way & loaded
    ):
        worker.swap = None  # it cannot be loaded after all; or they were unloaded, as asked
    else:
        _tell_progress(bus, worker, swap)
    bus.dirty.update(worker.models)


def ask(bus: BusState, worker: WorkerSession, model: str) -> None:
    """Load a model there next, in place of those that must give way to it."""
    gives_way = giving_way(bus, worker, model)
    if worker.swap is None:
        names = ", ".join(sorted(gives_way)) or "nothing"
        bus.log("info", "model is to be loaded", worker, model=model, in_place_of=names)
    patience_s = bus.settings.swap_factor * cost_s(worker, model)
    worker.swap = Swap(model, bus.now_s, gives_way, patience_s)
    _look(bus, worker)


def ask_unload(bus: BusState, worker: WorkerSession, model: str) -> tuple[str, ...]:
    """Unload a model there, which waits for what runs of it, or without a name all; returns their
    names."""
    gives_way = {name for name, info in worker.models.items() if info.loaded}
    patience_s = bus.settings.swap_factor * FIRST_LOAD_S
    if model:
        unit, patience_s = _unit(worker, model), math.inf
        gives_way = {name for name in gives_way if _unit(worker, name) == unit}
    if gives_way:
        bus.log("info", "model is to be unloaded", worker, model=", ".join(sorted(gives_way)))
        worker.swap = Swap("", bus.now_s, frozenset(gives_way), patience_s)
        _look(bus, worker)
    return tuple(sorted(gives_way))


def giving_way(bus: BusState, worker: WorkerSession, model: str) -> frozenset[str]:
    """The loaded models that must be unloaded before this one can be loaded there: of those that
    nobody asks for, the least recently used, then those whose turn is the longest."""
    loaded = [name for name, info in worker.models.items() if info.loaded]
    must_free = worker.models[model].must_free_bytes
    if must_free is None:
        return frozenset(loaded)
    units: dict[str, list[str]] = {}
    for name in loaded:
        if worker.models[name].memory_bytes:
            units.setdefault(_unit(worker, name), []).append(name)

    def order(unit: str) -> tuple[bool, float]:
        names = units[unit]
        turn_s = min(worker.turns[name] for name in names)
        if _is_asked_for(bus, worker, names):
            return True, turn_s
        return False, max(worker.used.get(name, turn_s) for name in names)

    freed: dict[str, int] = {}
    for unit in sorted(units, key=order):
        if sum(freed.values()) >= must_free:
            break
        freed[unit] = max(worker.models[name].memory_bytes for name in units[unit])
    for unit in list(freed):
        # A large one may have made smaller ones before it unnecessary.
        if sum(freed.values()) - freed[unit] >= must_free:
            del freed[unit]
    return frozenset(name for unit in freed for name in units[unit])


def _unit(worker: WorkerSession, name: str) -> str:
    """What is loaded and unloaded together has the same."""
    info = worker.models.get(name)
    return name if info is None else info.loads_with or name


def _is_asked_for(bus: BusState, worker: WorkerSession, names: Collection[str]) -> bool:
    """Whether something runs there for one of these models, or waits."""
    running = any(request.model in names for request in worker.running.values())
    return running or any(name in bus.queues for name in names)


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
    for name, queue in bus.queues.items():
        info = worker.models.get(name)
        if info is None or info.loaded or _on_its_way(bus, worker, name):
            continue
        waiting = queue.all()
        if not waiting:
            continue
        gives_way = giving_way(bus, worker, name)
        load_s = cost_s(worker, name)
        patience_s = bus.settings.swap_factor * load_s
        oldest_s = min(request.queued_s for request in waiting)
        deadline_s = min(min(r.queue_until_s, r.ttl_until_s) for r in waiting) - 2 * load_s
        turn_s = max((worker.turns[other] for other in gives_way), default=-math.inf)
        due_s = max(oldest_s, turn_s) + patience_s
        if not _served_elsewhere(bus, worker, name):
            idle_s = _idle_since_s(bus, worker, name, gives_way)
            due_s = min(due_s, max(oldest_s, idle_s + IDLE_LOADS * load_s))
        # A deadline shortens a turn, and never below one load: else nothing but swaps would happen.
        due_s = min(due_s, max(deadline_s, turn_s + load_s))
        # Of those that are due, whoever waits longest.
        if (max(due_s, bus.now_s), oldest_s) < least:
            best, least = name, (max(due_s, bus.now_s), oldest_s)
    return best, least[0]


def _idle_since_s(
    bus: BusState, worker: WorkerSession, model: str, gives_way: frozenset[str]
) -> float:
    """Since when those that would give way to a model have had nothing to do, as far as was seen; a
    moment between two requests does not count."""
    if not gives_way:
        return -math.inf
    if _is_asked_for(bus, worker, gives_way):
        worker.swap_idle.pop(model, None)
        return math.inf
    used_s = max(worker.used.get(name, -math.inf) for name in gives_way)
    since_s, used_then_s = worker.swap_idle.get(model, (math.inf, math.inf))
    if used_then_s != used_s:
        since_s = bus.now_s
        worker.swap_idle[model] = since_s, used_s
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
    running = [r for r in worker.running.values() if r.model in swap.gives_way]
    if waited_s > GIVE_UP_S and not (running and swap.patience_s == math.inf):
        bus.log("warning", "model not loaded", worker, model=swap.model, waited_s=round(waited_s))
        worker.swap = None
        bus.dirty.update(worker.models)
        return
    if running:
        if waited_s >= swap.patience_s:
            # Streams whose first token takes longer than a turn would move for ever.
            all_ = waited_s >= BEGIN_TURNS * swap.patience_s
            _move_away(bus, worker, swap, [r for r in running if all_ or r.started_s is not None])
    elif not worker.moving and bus.now_s - swap.asked_s >= ASK_AGAIN_S:
        swap.asked_s = bus.now_s
        beat = Heartbeat(
            waiting=worker.waiting_sent,
            recalled=worker.recalled,
            returned=worker.returned,
            load=swap.model,
            unload=not swap.model,
            gives_way=sorted(swap.gives_way),
        )
        bus.send(worker, MessageType.HEARTBEAT, worker.id, codec.encode(beat))


def _move_away(
    bus: BusState, worker: WorkerSession, swap: Swap, running: list[RequestState]
) -> None:
    """Streams that outlast their model's turn go on in its next one."""
    error = ErrorInfo(
        code=ErrorCode.DRAINING,
        message=f"worker {worker.name} loads {swap.model or 'no other model'} now; the stream goes "
        "on when its model is loaded again",
        retryable=True,
    )
    for request in running:
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
