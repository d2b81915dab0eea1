"""A scenario as data: generated from a seed, and shrunk if it fails."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

STORM_S = 20.0
"""Requests and faults happen in the first part of a scenario."""

#: Faults of connections.
CLIENT_CONNECTION = ("cut_client", "unplug_client", "garble_client")
WORKER_CONNECTION = ("cut_worker", "unplug_worker", "garble_worker")
#: Faults of processes.
BROKER_DEATH = ("kill_broker", "stop_broker")
WORKER_DEATH = ("kill_worker", "kill_engine", "hang_engine")
DRAIN = ("drain_worker", "order_drain")
#: Announced ends of workers: on time, earlier, or postponed and withdrawn.
ENDS = ("end_known", "end_early", "end_changed")
PAUSE = ("pause_broker", "pause_worker", "pause_client")
#: Orders of an operator to workers that load models on demand.
ORDERS = ("order_load", "order_unload")
#: Events of applications, and valid messages without effect.
APPLICATION = ("drop", "burst", "kill_client", "new_client")
HARMLESS = ("repeat_credit", "stray", "odd_output", "drop", "burst", "new_client")

FAULTS = tuple(
    dict.fromkeys(
        CLIENT_CONNECTION
        + WORKER_CONNECTION
        + BROKER_DEATH
        + WORKER_DEATH
        + DRAIN
        + ENDS
        + PAUSE
        + APPLICATION
        + HARMLESS
    )
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
    #: Tokens of the answer; 0 asks for an embedding or a decision.
    length: int
    priority: int
    read_s: float
    total_s: float | None = None
    queue_s: float | None = None
    fails_at: int | None = None
    fails_once: bool = False
    #: What dies at that token: "engine" or "worker".
    kills: str = ""


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
    queue_requests: int
    #: The broker's own time limit for its queue.
    queue_s: float
    inflight: int
    peer_queue_messages: int
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]
    #: How long a stream must have run before it can be preempted, and again after a preemption.
    preempt_s: tuple[float, float] = (0.25, 1.0)
    #: Models of each worker; more than one are loaded on demand.
    models: int = 1
    #: What fits into a worker's memory at once (`shelf.SIZES`); 0: one model.
    units: int = 0
    unload_idle_s: float = math.inf
    swap_factor: float = 5.0
    #: Loads on demand that fail, at most.
    load_failures: int = 0


def make(
    seed: int,
    kinds: tuple[str, ...] = FAULTS,
    most_faults: int = 8,
    brokers: tuple[int, ...] = (1, 1, 2),
    models: tuple[int, ...] = (1,),
) -> Plan:
    """The plan of a seed."""
    # Drawn apart: the same seeds without models on demand stay the same.
    shelf = random.Random(~seed)
    rng = random.Random(seed)
    asks = tuple(_ask(rng) for _ in range(rng.randint(2, 12)))
    faults = tuple(
        Fault(
            at_s=rng.uniform(0, STORM_S),
            kind=rng.choice(kinds),
            index=rng.randrange(6),
            lasts_s=rng.choice((0.05, 0.5, 2.0, 7.0, 12.0)),
        )
        for _ in range(rng.randint(1, most_faults) if kinds else 0)
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
        placement=_placement(seed, rng),
        queue_requests=rng.choice((2, 1000, 1000)),
        queue_s=rng.choice((2.0, 10_000.0, 10_000.0, 10_000.0)),
        inflight=rng.choice((2, 1000, 1000)),
        peer_queue_messages=rng.choice((8, 300)),
        asks=asks,
        faults=faults,
        preempt_s=rng.choice(((0.25, 1.0), (0.0, 10.0), (0.0, 0.0))),
        models=shelf.choice(models),
        units=shelf.choice((0, 2, 3)),
        unload_idle_s=shelf.choice((math.inf, math.inf, 1.0)),
        swap_factor=shelf.choice((0.5, 2.0, 5.0)),
        load_failures=shelf.choice((0, 1, 3)),
    )


def _placement(seed: int, rng: random.Random) -> str:
    drawn = rng.choice(("least_loaded", "shortest_queue", "lottery", "affinity"))
    return drawn if seed % 5 else "fastest_finish"


def plain(seed: int, asks: tuple[Ask, ...], slots: int = 4) -> Plan:
    """A plan without faults, whose limits are never reached: one broker, three workers and three
    clients."""
    return dataclasses.replace(
        make(seed, ()),
        brokers=1,
        workers=3,
        slots=slots,
        clients=3,
        window_tokens=64,
        step_s=0.02,
        load_s=0.1,
        longest_delay_s=0.003,
        queue_requests=1000,
        queue_s=10_000.0,
        inflight=1000,
        peer_queue_messages=300,
        asks=asks,
    )


def _ask(rng: random.Random) -> Ask:
    length = rng.choice((0, 1, 3, 8, 20, 40))
    fails = rng.choice(("", "", "", "", "", "once", "always")) if length > 1 else ""
    return Ask(
        at_s=rng.uniform(0, STORM_S * 0.8),
        client=rng.randrange(3),
        length=length,
        priority=rng.choice((0, 0, 0, 5)),
        read_s=rng.choice((0.0, 0.0, 0.0, 0.02, 0.3)),
        total_s=rng.choice((None, None, None, None, 3.0)),
        queue_s=rng.choice((None, None, None, None, 1.0)),
        fails_at=rng.randrange(length) if fails else None,
        fails_once=fails == "once",
    )


def shrink(plan: Plan, fails: Callable[[Plan], str]) -> Plan:
    """A smaller plan that still fails: without the faults and requests that do not matter."""
    changed = True
    while changed:
        changed = False
        for field in ("faults", "asks"):
            items = getattr(plan, field)
            for index in range(len(items)):
                rest = (*items[:index], *items[index + 1 :])
                smaller = dataclasses.replace(plan, **{field: rest})
                if fails(smaller):
                    plan, changed = smaller, True
                    break
    return plan
