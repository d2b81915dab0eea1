"""How soon streams flow again: the real cores, and one broker that is killed several times."""

from __future__ import annotations

import pytest

from tests.simulation import plan as plans
from tests.simulation.plan import Ask, Plan
from tests.simulation.scenario import Run

AWAY_S = 0.8
"""How long a broker process takes to start."""
SOON_S = 1.0
"""Time from when the broker listens until every stream has tokens."""


def _plan(seed: int) -> Plan:
    asks = tuple(Ask(0.0, client, 3000, 0, 0.0) for client in range(3) for _ in range(3))
    return plans.plain(seed, asks, slots=3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lived_s", [0.3, 1.0, 3.0, 12.0])
def test_every_stream_flows_within_a_second_of_each_of_five_restarts(
    seed: int, lived_s: float
) -> None:
    run = Run(_plan(seed))
    world, (broker,) = run.world, run.brokers
    for ask in run.plan.asks:
        run._ask(ask)
    world.run(world.now_s + 5.0)
    run.broker_away_s = AWAY_S
    for _ in range(5):
        broker.kill()
        world.run(world.now_s + AWAY_S)
        assert broker.alive
        had = [len(call.token_ids) for call in run.calls]
        world.run(world.now_s + SOON_S)
        stuck = [
            call.name for call, n in zip(run.calls, had, strict=True) if n == len(call.token_ids)
        ]
        assert not stuck, "\n".join(world.story)
        world.run(world.now_s + max(0.0, lived_s - SOON_S))
