"""Which request killed the workers? Kills from outside and requests that kill, with real cores."""

from __future__ import annotations

import pytest

from tests.simulation import plan as plans
from tests.simulation.plan import Ask
from tests.simulation.scenario import RESTART_S, Run


def _ask_all(run: Run) -> None:
    for ask in run.plan.asks:
        run._ask(ask)


def _to_the_end(run: Run) -> None:
    run.world.run(run.world.now_s + 300.0, run._all_over)


@pytest.mark.parametrize("seed", range(5))
def test_two_unrelated_kills_at_once_end_no_stream(seed: int) -> None:
    run = Run(plans.plain(seed, tuple(Ask(0.0, i, 300, 0, 0.0) for i in range(12))))
    world = run.world
    world.run(world.now_s + 1.0)
    _ask_all(run)
    for _ in range(4):
        world.run(world.now_s + 1.0)
        first, second, *_ = run.workers
        first.kill()
        world.run(world.now_s + world.rng.choice((0.0, 0.1, 0.4)))
        second.kill()
        world.run(world.now_s + RESTART_S)
    _to_the_end(run)
    assert [call.outcome for call in run.calls] == ["end"] * 12


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kills", ["worker", "engine"])
@pytest.mark.parametrize("fails_at", [0, 7])
def test_a_request_that_kills_is_stopped_and_no_other_is(
    seed: int, kills: str, fails_at: int
) -> None:
    poison = Ask(0.0, 0, 40, 0, 0.0, fails_at=fails_at, kills=kills)
    others = tuple(Ask(0.0, i, 200, 0, 0.0) for i in range(8))
    run = Run(plans.plain(seed, (*others, poison)))
    run.world.run(run.world.now_s + 1.0)
    _ask_all(run)
    _to_the_end(run)
    *harmless, killer = run.calls
    assert [call.outcome for call in harmless] == ["end"] * 8, "\n".join(run.world.story)
    assert killer.outcome == "poison"
    assert len(killer.token_ids) <= fails_at
    assert sum(worker.deaths for worker in run.all_workers) <= 5


@pytest.mark.parametrize("seed", range(5))
def test_two_requests_that_kill_are_both_found(seed: int) -> None:
    killers = tuple(Ask(0.0, i, 40, 0, 0.0, fails_at=3, kills="worker") for i in range(2))
    others = tuple(Ask(0.0, i, 200, 0, 0.0) for i in range(4))
    run = Run(plans.plain(seed, (*others, *killers)))
    run.world.run(run.world.now_s + 1.0)
    _ask_all(run)
    _to_the_end(run)
    assert [call.outcome for call in run.calls] == ["end"] * 4 + ["poison"] * 2
    assert sum(worker.deaths for worker in run.all_workers) <= 10
