"""Thousands of scenarios, by what goes wrong in them. A failing seed is shrunk and prints its
story.

Rerun a single one with `python -m tests.simulation.run --start SEED --seeds 1 --kinds ...`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.simulation import plan as plans
from tests.simulation.plan import FAULTS, make, shrink
from tests.simulation.scenario import Run, fails


def run_seeds(
    first: int,
    count: int,
    kinds: tuple[str, ...],
    brokers: tuple[int, ...],
    models: tuple[int, ...] = (1,),
) -> None:
    """Run this many scenarios; fails with the shrunk story of the first that is wrong."""
    for seed in range(first, first + count):
        plan = make(seed, kinds, brokers=brokers, models=models)
        if story := fails(plan):
            small = shrink(plan, fails)
            pytest.fail(f"seed {seed}: {fails(small) or story}", pytrace=False)


ONE_KIND = {
    "nothing goes wrong": (),
    "connections of clients break": plans.CLIENT_CONNECTION,
    "connections of workers break": plans.WORKER_CONNECTION,
    "brokers die": plans.BROKER_DEATH,
    "workers and engines die": plans.WORKER_DEATH,
    "workers are drained": plans.DRAIN,
    "workers end as announced, or otherwise": plans.ENDS,
    "processes are stopped and go on": plans.PAUSE,
    "applications come, go and lose interest": plans.APPLICATION,
    "odd but legal messages arrive": plans.HARMLESS,
}


@pytest.mark.parametrize("brokers", [(1,), (2,)], ids=["one broker", "two brokers"])
@pytest.mark.parametrize("what", ONE_KIND)
def test_every_stream_is_exact_or_fails_with_a_reason_when(
    what: str, brokers: tuple[int, ...]
) -> None:
    run_seeds(1000, 30, ONE_KIND[what], brokers)


@pytest.mark.parametrize("first", range(20_000, 20_300, 100))
def test_every_stream_is_exact_or_fails_with_a_reason_whatever_goes_wrong(first: int) -> None:
    run_seeds(first, 100, FAULTS, (1,))


@pytest.mark.parametrize("first", range(60_000, 60_200, 100))
def test_every_stream_is_exact_where_models_are_loaded_on_demand(first: int) -> None:
    """Two or three models of which one, or some, fit; operators load and unload them too."""
    run_seeds(first, 100, FAULTS + plans.ORDERS, (1, 1, 2), models=(2, 3))


def test_models_on_demand_meet_what_they_are_made_for() -> None:
    """Models take turns, streams outlast them, several are loaded at once, engines die alone."""
    seen = {"swaps": 0, "swap_moves": 0, "beside": 0, "alone": 0}
    for seed in range(40):
        run = Run(make(seed, (*FAULTS, "kill_engine", "kill_engine"), models=(2, 3))).to_the_end()
        for broker in run.brokers:
            seen["swaps"] += broker.core.counters["swaps"]
            seen["swap_moves"] += broker.core.counters["swap_moves"]
        for worker in run.all_workers:
            assert worker.shelf is not None
            seen["beside"] += worker.shelf.most_at_once > 1
            seen["alone"] += worker.shelf.died_alone
    assert all(seen.values()), seen


def test_the_same_seed_is_the_same_run() -> None:
    for seed in range(5):
        one, two = (Run(make(seed)).to_the_end().world for _ in range(2))
        assert (one.events, list(one.story)) == (two.events, list(two.story))


def test_a_run_does_not_depend_on_the_order_of_sets() -> None:
    script = (
        "import sys; from tests.simulation.plan import make;"
        "from tests.simulation.scenario import Run;"
        "worlds = [Run(make(seed)).to_the_end().world for seed in range(12)];"
        "print([(world.events, list(world.story)) for world in worlds])"
    )
    stories = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(stories) == 1


def test_scenarios_meet_what_they_are_made_for() -> None:
    """The faults have an effect: streams are resumed, requests refused, limits exceeded."""
    seen = {"resumed": 0, "deadline_exceeded": 0, "engine_error": 0, "end": 0}
    for seed in range(1, 60):
        run = Run(make(seed)).to_the_end()
        for call in run.calls:
            seen["resumed"] += call.resumed > 0
            if call.outcome in seen:
                seen[call.outcome] += 1
    assert all(seen.values()), seen


def test_a_failing_plan_shrinks_to_what_matters() -> None:
    def needs_a_cut_and_a_long_request(plan: plans.Plan) -> str:
        cut = any(fault.kind == "cut_client" for fault in plan.faults)
        return "fails" if cut and any(ask.length > 3 for ask in plan.asks) else ""

    plan = next(p for p in map(make, range(100)) if needs_a_cut_and_a_long_request(p))
    small = shrink(plan, needs_a_cut_and_a_long_request)
    assert (len(small.faults), len(small.asks)) == (1, 1)
