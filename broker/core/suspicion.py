"""Finds requests that kill their workers (poison, SPEC.md section 6.4).

A worker that dies takes down everything that ran there, and most of those requests are not to
blame. So a request that lost two workers is only suspected: it runs next at a worker that runs
nothing else, one suspect per model at a time. If it gets past its first tokens there, it is
cleared and its count starts at zero. If that worker dies too, that is evidence, and enough
evidence is a verdict.

Functions on the core's state, called by the controller, `dispatch` and `recovery`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from broker.core import assignment, endings
from broker.core.phases import Phase
from broker.core.queue import ModelQueue
from broker.core.records import RequestState, WorkerSession
from broker.core.state import BusState
from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError

SUSPECT_DEATHS: Final = 2
"""Number of lost workers after which a request runs alone."""
VERDICT_ALONE: Final = 3
"""A verdict needs this many workers lost while they ran the request alone and it had hardly begun:
two of them may both have been killed from outside."""
RETURN_S: Final = 1.0
"""How long a suspect waits for lost workers that may only have lost their connections: such workers
come back within half a second, and bring it along."""
EMPTY_S: Final = 5.0
"""How long a worker reserved for a suspect may go on with its other requests; those left then move
to other workers."""


def without(names: Sequence[str], returned: Sequence[str]) -> tuple[str, ...]:
    """Lost workers without those that came back with the request, counting repetitions: the request
    did not kill those."""
    return tuple((Counter(names) - Counter(returned)).elements())


def consider(bus: BusState, request: RequestState, until_s: float | None) -> None:
    """Decide whether a request that comes back by RESUME is suspected. `until_s`: until when it
    already waits for its lost workers, if it was suspected before. Must be called before the
    request is queued, and `watch` after."""
    if len(request.lost_workers) < SUSPECT_DEATHS:
        return
    if until_s is None:
        # If the workers said that they died, there is nothing to wait for.
        confirmed = request.deaths >= SUSPECT_DEATHS
        most_s = bus.settings.poison_wait_s if _proved(request) else RETURN_S
        until_s = bus.now_s + (0.0 if confirmed else min(most_s, bus.settings.poison_wait_s))
    request.suspect_until_s = until_s


def watch(bus: BusState, request: RequestState) -> None:
    """Timer of a suspect that waits for its lost workers; after that it runs alone, or fails."""
    due_s = request.suspect_until_s
    mine = bus.requests.get(request.id) is request and request.phase is Phase.QUEUED
    if due_s is None or not mine:
        return
    if bus.now_s < due_s:
        bus.at(due_s, watch, request)
    elif _proved(request):
        endings.fail(bus, request, _verdict(request).info)
    else:
        request.suspect_until_s = None
        request.alone = True
        bus.suspects.setdefault(request.model, {})[request.id] = request
        bus.dirty.add(request.model)
        bus.log_request("info", "runs alone next", request, lost=", ".join(request.lost_workers))


def _proved(request: RequestState) -> bool:
    return len(request.lost_alone) >= VERDICT_ALONE


def _verdict(request: RequestState) -> RequestError:
    alone = ", ".join(request.lost_alone[:8])
    others = ", ".join(without(request.lost_workers, request.lost_alone)[:8])
    beside = f"; so did {others}, where other requests ran too" if others else ""
    return RequestError(
        ErrorCode.POISON,
        f"workers {alone} died while they ran this request and nothing else{beside}. It is not "
        "given to another worker; if something else killed them, send it as a new request",
        details={"lost_workers": list(request.lost_workers), "alone": list(request.lost_alone)},
    )


def exonerate(bus: BusState, request: RequestState, names: Sequence[str]) -> None:
    """Stop counting these lost workers against the request; ACCEPTED tells its client."""
    request.returned += tuple(names)
    request.lost_workers = without(request.lost_workers, names)
    request.lost_alone = without(request.lost_alone, names)
    if request.phase is Phase.RUNNING:
        assignment.tell_where(bus, request)
    elif len(request.lost_workers) < SUSPECT_DEATHS:
        request.suspect_until_s = None
        bus.unsuspect(request)
        bus.dirty.add(request.model)


# --- running alone --------------------------------------------------------------------------------


def assign_next(bus: BusState, model: str, queue: ModelQueue) -> bool:
    """Give the model's next suspect a worker of its own; True when one was assigned."""
    suspects = bus.suspects.get(model)
    if not suspects:
        return False
    serving = bus.registry.serving(model).values()
    cell = next((w for w in serving if w.alone is not None and w.alone.model == model), None)
    if cell is not None and not cell.fit and cell.alone is not None and cell.alone.worker is None:
        bus.free_cell(cell.alone)
        cell = None
    if cell is None:
        request = min(suspects.values(), key=lambda suspect: suspect.order)
        cell = _emptiest(
            request, [w for w in serving if w.has_loaded(model) and w.can_continue(request)]
        )
        if cell is None:
            return False
        cell.alone, request.cell = request, cell
        bus.at(bus.now_s + EMPTY_S, _empty, request)
    suspect = cell.alone
    if suspect is None or suspect.id not in suspects or cell.running or cell.unspent <= 0:
        return False  # it is already running, or waits for the worker to become empty
    queue.remove(suspect)
    del suspects[suspect.id]
    bus.queued_bytes -= suspect.size_bytes
    assignment.assign(bus, suspect, cell)
    queue.last_served = cell.last_assigned
    if not queue.requests:
        bus.queues.pop(model, None)
    return True


def _emptiest(request: RequestState, serving: list[WorkerSession]) -> WorkerSession | None:
    """The fit worker that should be empty first; if possible, not one that died with the
    request."""
    others = [worker for worker in serving if worker.name not in request.lost_workers]
    fit = [worker for worker in others or serving if worker.fit and worker.alone is None]
    fit = [worker for worker in fit if worker.running or worker.unspent > 0]
    return min(fit, key=lambda worker: (len(worker.running), worker.last_assigned), default=None)


def _empty(bus: BusState, request: RequestState) -> None:
    """Timer: interrupt what still runs at the worker reserved for a suspect. Those requests resume
    elsewhere, or here again once the suspect is finished."""
    worker = request.cell
    if worker is None or request.phase is not Phase.QUEUED or worker.alone is not request:
        return
    error = ErrorInfo(
        code=ErrorCode.DRAINING,
        message=f"worker {worker.name} is needed for a request that must run alone; resume it",
        retryable=True,
    )
    for other in list(worker.running.values()):
        endings.move(bus, other, error, "moved, so that a suspect can run alone")
    bus.dirty.add(request.model)


def on_started(bus: BusState, request: RequestState) -> None:
    """The request's first token arrived."""
    if request.alone:
        bus.at(bus.now_s + endings.CLEARED_S, _on_cleared, request)


def _on_cleared(bus: BusState, request: RequestState) -> None:
    """Timer: the request has run alone for a while without harm."""
    if request.alone and request.phase is Phase.RUNNING and request.cell is request.worker:
        bus.log_request("info", "is cleared", request, lost=", ".join(request.lost_workers))
        exonerate(bus, request, request.lost_workers)
        bus.unsuspect(request)
