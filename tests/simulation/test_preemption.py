"""A batch at low priority while interactive users come and go: every answer is exact, users hardly
wait, and no slot is idle."""

from __future__ import annotations

import dataclasses

from tests.simulation.answers import Answer, Call
from tests.simulation.client import SimClient
from tests.simulation.scenario import Run
from tests.simulation.test_fairness import QUIET, STEP_S, served

LONG = 200
SHORT = 10
FLOOR_S, AGAIN_S = 0.2, 2.0


def ask(run: Run, client: SimClient, number: int, tokens: int, priority: int) -> Call:
    request_id = b"\x01" + run.world.rng.randbytes(15)
    answer = Answer(f"{client.name} {number}||always", number, tokens)
    call = Call(request_id, answer, False, priority, 0.0)
    run.calls.append(call)
    client.ask(call)
    return call


def test_people_wait_for_no_batch_and_the_batch_loses_nothing() -> None:
    plan = dataclasses.replace(QUIET, slots=2, workers=2, preempt_s=(FLOOR_S, AGAIN_S))
    run = Run(plan)
    run.world.run(run.world.now_s + 1.0)
    batch, person = run.clients
    lines = [ask(run, batch, number, LONG, -50) for number in range(12)]
    run.world.run(run.world.now_s + 1.0)
    for number in range(20):
        call = ask(run, person, number, SHORT, 0)
        took_s = served(run, call)
        # One step until the slot is free, plus some messages' delays.
        assert took_s <= SHORT * STEP_S * 1.5 + 4 * STEP_S + 0.05, f"person {number}: {took_s}"
        run.world.run(run.world.now_s + 0.3)
    assert sum(call.gave_way for call in lines) > 5
    for call in lines:
        served(run, call, 300.0)  # the client checks that it is exact
    assert max(call.gave_way for call in lines) <= (run.world.now_s - 1000.0) / AGAIN_S + 1
