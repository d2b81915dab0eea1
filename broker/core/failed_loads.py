"""Models that workers could not load (SPEC.md section 7.3), and why: what callers are told at once
where nobody else serves the model.

What a worker said holds until it offers the model again, or says something else; a while after it
has left, it is forgotten. Must never hold up a model that some worker offers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from broker.core.records import LoadFailure, WorkerSession
from broker.core.state import BusState
from broker.protocol.errors import LOAD_FAILED, ErrorCode, RequestError
from broker.protocol.messages import FailedModel

__all__ = ["error_of", "learn", "left", "offered_again_s", "reasons", "returns_s", "unserved"]


def learn(bus: BusState, worker: WorkerSession, failed: Iterable[FailedModel]) -> None:
    """What a worker cannot load, in place of what it said before."""
    _forget(bus, worker.name)
    for one in failed:
        wait_s = math.inf if one.retry_in_ms is None else one.retry_in_ms / 1000
        told = bus.failed_loads.setdefault(one.name, {})
        if told.get(worker.name) is None:
            bus.log("warning", "model cannot be loaded", worker, model=one.name, cause=one.cause)
        told[worker.name] = LoadFailure(one.cause, bus.now_s + wait_s)


def left(bus: BusState, worker: WorkerSession) -> None:
    """The worker has left: what it said holds as long as models of workers that left are waited
    for."""
    until_s = bus.now_s + bus.settings.model_grace_s
    for told in bus.failed_loads.values():
        one = told.get(worker.name)
        if one is not None:
            told[worker.name] = replace(one, until_s=min(one.until_s, until_s), left=True)
    if bus.failed_loads:
        bus.at(until_s, _tidy, None)


def reasons(bus: BusState, model: str) -> str:
    """Why it cannot be loaded, by worker; empty where nothing is known."""
    return _words(_known(bus, model))


def unserved(bus: BusState) -> Iterator[tuple[str, str, float]]:
    """Models that nobody serves or may come with but workers that could not load them: name, why,
    and in how many seconds the first of these offers it again; infinity: none does."""
    for model, told in sorted(bus.failed_loads.items()):
        if bus.registry.serving(model) or _others_return_s(bus, model) > bus.now_s:
            continue
        grace_s = bus.settings.model_grace_s
        waited_for = {
            name: one
            for name, one in told.items()
            if one.until_s + (0.0 if one.left else grace_s) > bus.now_s
        }
        if waited_for:
            again_s = min(one.until_s for one in waited_for.values())
            yield model, _words(waited_for), max(0.0, again_s - bus.now_s)


def error_of(bus: BusState, model: str, *, begun: bool) -> RequestError | None:
    """What those who wait for a model are told if no worker that offered it can load it; None if
    one serves it, or may come (back). `begun`: of an answer that is partly there, and goes on once
    the model can be loaded."""
    known = _known(bus, model)
    if not known or bus.registry.serving(model) or returns_s(bus, model) > bus.now_s:
        return None
    again_s = min(one.until_s for one in known.values()) - bus.now_s
    again_ms = None if again_s == math.inf else max(1, round(1000 * again_s))
    hint = "it must be mended first"
    if again_ms is not None:
        hint = f"it is tried again when it is asked for in {again_s:.0f} s or later"
    return RequestError(
        ErrorCode.MODEL_UNAVAILABLE,
        f"model {model[:100]!r} cannot be loaded: {reasons(bus, model)}; {hint}",
        retryable=begun and again_ms is not None,
        retry_after_ms=again_ms,
        details={LOAD_FAILED: True},
    )


def returns_s(bus: BusState, model: str) -> float:
    """Until when a worker that has not failed to load the model may come (back)."""
    return max(_others_return_s(bus, model), offered_again_s(bus, model))


def offered_again_s(bus: BusState, model: str) -> float:
    """Until when a worker may offer it again whose time for that has come: its word may be late."""
    due = [
        one.until_s
        for one in bus.failed_loads.get(model, {}).values()
        if one.until_s <= bus.now_s and not one.left
    ]
    return max(due, default=-math.inf) + bus.settings.model_grace_s


def _others_return_s(bus: BusState, model: str) -> float:
    left_s = bus.registry.left_s(model)
    back_s = -math.inf if left_s is None else left_s + bus.settings.model_grace_s
    return max(back_s, bus.expected.get(model, -math.inf))


def _words(failures: dict[str, LoadFailure]) -> str:
    told = sorted(failures.items())
    more = f", and {len(told) - 3} more" if len(told) > 3 else ""
    return "; ".join(f"{one.cause.rstrip('. ')} (worker {name})" for name, one in told[:3]) + more


def _known(bus: BusState, model: str) -> dict[str, LoadFailure]:
    told = bus.failed_loads.get(model, {})
    return {name: one for name, one in told.items() if one.until_s > bus.now_s}


def _forget(bus: BusState, name: str) -> None:
    for model, told in list(bus.failed_loads.items()):
        told.pop(name, None)
        if not told:
            del bus.failed_loads[model]


def _tidy(bus: BusState, _: None) -> None:
    """Timer: forget what is over."""
    for model, told in list(bus.failed_loads.items()):
        for name, one in list(told.items()):
            if one.left and one.until_s <= bus.now_s:
                del told[name]
        if not told:
            del bus.failed_loads[model]
