"""Honest waiting: which place a request has and when it should start (SPEC.md section 6.6).

The start is reckoned from what runs, what waits before it, and measured speed (`pace`): slots
become free one after another, and each takes the next request of the queue. What was said is
compared with what came of it, and the next word is corrected by that. Nothing is known before a
model's first answers; then nothing is said.

Functions on the core's state, called by `admission`, `dispatch` and `queries`.
"""

from __future__ import annotations

import heapq
import math
from typing import Final

from broker.core import finish, pace
from broker.core.records import RequestState
from broker.core.speed import Accuracy
from broker.core.state import BusState
from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.messages import Accepted

REACH: Final = 512
"""How far into a queue the starts are reckoned; behind it they grow in proportion."""
TELL_S: Final = 1.0
"""Between two words to those that wait."""
GIVES_WAY_S: Final = 0.1
"""Until a slot is free that a stream of lower priority gives up."""
LEARNT: Final = 8
"""Waits that were compared before anything is refused for what they say."""
SHORT_S: Final = 0.25
"""Waits that are not compared with what was said: they are mostly round trips."""


def starts(bus: BusState, model: str) -> list[tuple[RequestState, float | None]]:
    """The requests of a queue in the order of their turn, the first `REACH` of them, and in how
    many seconds each should start; None where that is not known."""
    queue = bus.queues.get(model)
    if queue is None:
        return []
    waiting = queue.upcoming(REACH)
    speed = bus.speeds.get(model)
    slots, priorities = _slots(bus, model)
    if speed is None or not slots:
        return [(request, None) for request in waiting]
    mean_s = _mean_s(bus, model)
    factor = _factor(bus, model)
    plan = finish.Plan(bus, model) if bus.policy is None else None
    heapq.heapify(slots)
    found: list[tuple[RequestState, float | None]] = []
    for request in waiting:
        needs_s = pace.needs_s(bus, request, None, high=False)
        lasts_s = mean_s if needs_s is None else needs_s
        if bus.settings.preempt and priorities and priorities[0] < request.priority:
            # Somebody gives way to it, whose turn comes again later.
            heapq.heappop(priorities)
            at_s = GIVES_WAY_S
            heapq.heapreplace(slots, max(slots[0], at_s) + lasts_s)
        elif plan is not None and (planned_s := plan.start_s(request)) is not None:
            at_s = planned_s
        else:
            at_s = slots[0]
            heapq.heapreplace(slots, at_s + lasts_s)
        found.append((request, at_s * factor if at_s > SHORT_S else at_s))
    return found


def start_s(bus: BusState, request: RequestState) -> float | None:
    """In how many seconds a waiting request should start; None where that is not known."""
    return _outlook(bus, request)[1]


def _outlook(bus: BusState, request: RequestState) -> tuple[int, float | None]:
    """A waiting request's place, and in how many seconds it should start."""
    found = starts(bus, request.model)
    for position, (other, at_s) in enumerate(found):
        if other is request:
            return position, at_s
    position = max(len(found), bus.queues[request.model].position(request))
    last_s = found[-1][1] if len(found) >= REACH else None
    return position, None if last_s is None else last_s * (position + 1) / REACH


def _slots(bus: BusState, model: str) -> tuple[list[float], list[int]]:
    """For each slot of the model's workers, when it should be free (seconds from now); and the
    priorities of the streams that may be made to give way."""
    slots: list[float] = []
    priorities: list[int] = []
    mean_s = _mean_s(bus, model)
    for worker in bus.registry.serving(model).values():
        if not worker.fit:
            continue
        slots += [0.0] * worker.room(model)
        for request in worker.running.values():
            needs_s = pace.needs_s(bus, request, worker, high=False)
            slots.append(mean_s / 2 if needs_s is None else needs_s)
            if request.client is not None:
                priorities.append(request.priority)
    heapq.heapify(priorities)
    return slots, priorities


def _factor(bus: BusState, model: str) -> float:
    """By how much longer waits are than reckoned."""
    accuracy = bus.accuracy.get(model)
    return accuracy.factor if accuracy is not None else 1.0


def _mean_s(bus: BusState, model: str) -> float:
    """Of a request of which nothing else is known."""
    return bus.service_s.get(model, 1.0)


# --- saying it ------------------------------------------------------------------------------------


def queued(bus: BusState, request: RequestState) -> None:
    """Tell the client its place for the first time, and go on telling while it waits."""
    request.position, expected_s = _outlook(bus, request)
    request.expects_s = expected_s
    request.said_s, request.said_at_s = expected_s, bus.now_s
    request.said_factor = _factor(bus, request.model)
    request.told_at_s = bus.now_s
    request.told_why = why(bus, request.model)
    tell(bus, request)
    if request.model not in bus.telling:
        bus.telling.add(request.model)
        bus.at(bus.now_s + TELL_S, _tell_again, request.model)


def tell(bus: BusState, request: RequestState) -> None:
    """Send ACCEPTED with what is known now."""
    assert request.client is not None, "what waits has a client"
    expects_s = request.expects_s
    accepted = Accepted(
        position=request.position,
        starts_in_ms=None if expects_s is None else max(0, round(expects_s * 1000)),
        why=why(bus, request.model),
    )
    bus.send(request.client, MessageType.ACCEPTED, request.id, codec.encode(accepted))


def why(bus: BusState, model: str) -> str:
    """Why nothing runs yet, in words, if somebody said so; empty otherwise."""
    note = bus.notes.get(model)
    return note[0] if note is not None and bus.now_s < note[1] else ""


def _tell_again(bus: BusState, model: str) -> None:
    """Timer: those that wait for the model hear what has changed."""
    bus.telling.discard(model)
    if model not in bus.queues:
        return
    note = why(bus, model)
    for position, (request, expects_s) in enumerate(starts(bus, model)):
        client = request.client
        told = request.told_why
        if client is None or not client.hears_waits:
            continue
        if position == request.position and note == told and _near(expects_s, request, bus.now_s):
            continue
        request.position, request.expects_s = position, expects_s
        request.told_why = note
        tell(bus, request)
        request.told_at_s = bus.now_s
    bus.telling.add(model)
    bus.at(bus.now_s + TELL_S, _tell_again, model)


def _near(expects_s: float | None, request: RequestState, now_s: float) -> bool:
    """Whether the client reckons with about that start already: it counts down by itself."""
    told_s = request.expects_s
    if expects_s is None or told_s is None:
        return expects_s is told_s
    due_s = told_s - (now_s - request.told_at_s)
    return abs(due_s - expects_s) <= max(0.5, 0.1 * expects_s)


def started(bus: BusState, request: RequestState) -> None:
    """It leaves the queue for a worker: was it told the truth?"""
    said_s = request.said_s
    if said_s is None or said_s < SHORT_S or request.preempted_s > -math.inf:
        return
    accuracy = bus.accuracy.get(request.model)
    if accuracy is None:
        if len(bus.accuracy) >= pace.MAX_MODELS:
            return
        accuracy = bus.accuracy[request.model] = Accuracy()
    reckoned_s = said_s / request.said_factor
    accuracy.observe(reckoned_s, said_s, bus.now_s - request.said_at_s)


def surely_after_s(bus: BusState, request: RequestState) -> float:
    """A time in which a waiting request will hardly have started, by how well the starts were told
    so far; 0 where too little is known to refuse anything."""
    expects_s = start_s(bus, request)
    accuracy = bus.accuracy.get(request.model)
    if expects_s is None or accuracy is None or accuracy.said < LEARNT:
        return 0.0
    return expects_s * max(0.0, 1.0 - 2.0 * accuracy.deviation)
