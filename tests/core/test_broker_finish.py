"""Placement `fastest_finish`: unlike workers in virtual time, compared with the best schedule that
there could be, and with the placements that do not look at speed."""

from __future__ import annotations

import random

import pytest

from tests.core.fleet_world import Fleet, Gpu


def mixed(fleet: Fleet, count: int, rng: random.Random, *, known: bool) -> list[bytes]:
    """Questions, essays and summaries."""
    kinds = ((30, 50), (600, 50), (100, 1500))
    made = []
    for _ in range(count):
        answer, prompt = rng.choice(kinds)
        answer = max(1, round(answer * rng.uniform(0.5, 1.5)))
        made.append(fleet.ask(answer, round(prompt * rng.uniform(0.5, 1.5)), known=known))
    return made


def ratio(placement: str, seed: int, count: int = 100, *, known: bool = True) -> float:
    """How much longer a mixed load takes than the best schedule could."""
    fleet = Fleet(placement)
    fleet.learn()
    began_s = fleet.bus.now_s
    requests = mixed(fleet, count, random.Random(seed), known=known)
    fleet.run()
    took_s = max(fleet.ended_s[request] for request in requests) - began_s
    return took_s / fleet.shortest_s(requests)


@pytest.mark.parametrize("count", [40, 100])
@pytest.mark.parametrize("seed", range(3))
def test_two_workers_ten_to_one_end_a_mixed_load_within_1_15_of_the_best_schedule(
    seed: int, count: int
) -> None:
    """With fewer requests the last long answer decides, since requests keep their turn."""
    assert 1.0 <= ratio("fastest_finish", seed, count) <= 1.15


@pytest.mark.parametrize("seed", range(3))
def test_so_they_do_where_nobody_says_how_long_answers_may_become(seed: int) -> None:
    assert ratio("fastest_finish", seed, known=False) <= 1.15


def test_placements_that_do_not_know_speed_do_not() -> None:
    """Of twenty requests, half begin at the slow worker."""
    assert ratio("fastest_finish", 0, 20) <= 1.15
    assert ratio("least_loaded", 0, 20) > 2.0


def test_a_slow_worker_stays_idle_where_waiting_for_the_fast_one_is_sooner() -> None:
    fleet = Fleet("fastest_finish")
    fleet.learn()
    first = [fleet.ask(200) for _ in range(2)]
    assert {fleet.where[request] for request in first} == {"fast"}
    fleet.run(fleet.bus.now_s + 1.0)
    waits = fleet.ask(200)
    assert waits not in fleet.where, "a second here, or twenty there"
    fleet.run()
    assert fleet.where[waits] == "fast"


def test_what_ends_sooner_at_the_slow_worker_does_not_wait() -> None:
    fleet = Fleet("fastest_finish")
    fleet.learn()
    for _ in range(2):
        fleet.ask(2000)
    short = fleet.ask(20)
    assert fleet.where[short] == "slow"


def test_a_request_does_not_wait_for_ever_for_a_worker_that_turned_slow() -> None:
    fleet = Fleet("fastest_finish")
    fleet.learn()
    for _ in range(2):
        fleet.ask(100)
    fleet._due.clear()  # and never ends
    waits = fleet.ask(100)
    assert waits not in fleet.where
    for _ in range(30):
        fleet.bus.wait(1.0)
        fleet.beat()
    assert fleet.where.get(waits) == "slow"


def test_a_stream_that_becomes_longer_than_anybody_thought_moves_to_the_fast_worker() -> None:
    fleet = Fleet("fastest_finish")
    fleet.learn()
    for _ in range(2):
        fleet.ask(2000, known=False)
    long = fleet.ask(1000, known=False)
    fleet.run(fleet.bus.now_s + 5.0)
    fleet.run()
    assert fleet.where[long] == "fast"
    assert fleet.moves == 1


def test_a_long_prompt_goes_where_its_beginning_is_held() -> None:
    gpus = [
        Gpu("one", token_s=0.02, prefill_s=0.01, caches=True),
        Gpu("two", token_s=0.02, prefill_s=0.01, caches=True),
    ]
    fleet = Fleet("fastest_finish", gpus)
    fleet.learn()
    text = "a long document " * 200
    first = fleet.ask(20, prompt=800, text=text)
    fleet.run()
    home = fleet.where[first]
    busy = fleet.ask(200, prompt=20)
    for _ in range(5):
        again = fleet.ask(20, prompt=800, text=text)
        fleet.run(fleet.bus.now_s + 2.0)
        assert fleet.where[again] == home, fleet.where[busy]


def test_the_expected_start_knows_of_the_slow_worker() -> None:
    fleet = Fleet("fastest_finish")
    fleet.learn()
    for _ in range(2):
        fleet.ask(200)
    waits = fleet.ask(200)
    state = fleet.bus.core.requests[waits]
    assert state.expects_s == pytest.approx(2.0, rel=0.2)


def test_before_anything_is_measured_the_least_loaded_worker_is_taken() -> None:
    fleet = Fleet("fastest_finish")
    made = [fleet.ask(50) for _ in range(4)]
    assert sorted(fleet.where[request] for request in made) == ["fast", "fast", "slow", "slow"]
