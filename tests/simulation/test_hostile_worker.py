"""A worker that writes into requests that have moved away from it, with the real cores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from tests.simulation import plan as plans
from tests.simulation.plan import Ask
from tests.simulation.scenario import Run
from tests.simulation.worker import SimWorker

GUESSES: dict[str, Callable[[SimWorker, int], int]] = {
    "the next epoch": lambda worker, _: (
        max((stream.epoch for stream in worker.core._requests.streams.values()), default=0) + 1
    ),
    "any epoch": lambda worker, _: worker.world.rng.getrandbits(38),
    "the right epoch, by a miracle": lambda _, right: right,
}


@pytest.mark.parametrize("brokers", [1, 2])
@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("seed", range(3))
def test_its_output_is_never_shown_and_it_is_cut_off(seed: int, guess: str, brokers: int) -> None:
    plan = dataclasses.replace(
        plans.plain(seed, ()),
        brokers=brokers,
        clients=2,
        step_s=0.05,
        placement="least_loaded",
    )
    run = Run(plan)
    world, forged = run.world, 0
    world.run(world.now_s + 1.0)
    for number in range(8):
        run._ask(Ask(0.0, number, 300, 0, 0.0))
    for _ in range(6):
        world.run(world.now_s + 1.0)
        evil = run.workers[0]
        evil.sockets.cut_all()  # its requests move elsewhere, and it reconnects
        run._ask(Ask(0.0, 0, 100, 0, 0.0))
        run._ask(Ask(0.0, 1, 100, 0, 0.0))
        world.run(world.now_s + 1.0)
        open_ = [
            (call, exchange.epoch)
            for client in run.clients
            for call in client.calls.values()
            if (exchange := client.core._requests.exchanges.get(call.request_id)) and call.token_ids
        ]
        forged += evil.forge(open_, GUESSES[guess])
    world.run(world.now_s + 300.0, run._all_over)
    assert forged
    assert [call.outcome for call in run.calls] == ["end"] * len(run.calls)
    assert sum(broker.core.counters["workers_cut_off"] for broker in run.brokers) >= 1
