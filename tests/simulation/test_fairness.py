"""How long requests wait, in virtual time: fair shares, priority, bounded queues."""

from __future__ import annotations

import dataclasses

import pytest

from tests.simulation.answers import Answer, Call
from tests.simulation.client import SimClient
from tests.simulation.plan import Plan
from tests.simulation.scenario import Run

TOKENS = 10
STEP_S = 0.02
SERVICE_S = TOKENS * STEP_S * 1.5
"""The longest time that one request occupies its slot; steps vary by half."""
DELAYS_S = 0.05

QUIET = Plan(
    seed=1,
    brokers=1,
    workers=1,
    slots=1,
    clients=2,
    window_tokens=64,
    step_s=STEP_S,
    load_s=0.1,
    longest_delay_s=0.003,
    placement="least_loaded",
    queue_requests=4096,
    queue_s=10_000.0,
    inflight=1024,
    peer_queue_messages=300,
    asks=(),
    faults=(),
)


def ask(run: Run, client: SimClient, number: int, priority: int = 0, tokens: int = TOKENS) -> Call:
    """A client's next request."""
    request_id = b"\x01" + run.world.rng.randbytes(15)
    answer = Answer(f"{client.name} {number}||always", number, tokens)
    call = Call(request_id, answer, False, priority, 0.0)
    run.calls.append(call)
    client.ask(call)
    return call


def served(run: Run, call: Call, bound_s: float = 60.0) -> float:
    """How long a call took."""
    run.world.run(run.world.now_s + bound_s, lambda: bool(call.outcome))
    assert call.outcome == "end", call
    return call.ended_s - call.made_s


def ready(**changes: object) -> Run:
    run = Run(dataclasses.replace(QUIET, **changes))  # type: ignore[arg-type]
    run.world.run(run.world.now_s + 1.0)
    return run


def test_a_thousand_requests_of_one_client_delay_anothers_first_by_one_service_time() -> None:
    run = ready()
    greedy, modest = run.clients
    for number in range(1000):
        ask(run, greedy, number)
    run.world.run(run.world.now_s + 1.0)
    assert served(run, ask(run, modest, 0)) <= 2 * SERVICE_S + DELAYS_S


@pytest.mark.parametrize("slots", [1, 3])
def test_two_clients_with_long_lines_get_equal_shares(slots: int) -> None:
    run = ready(slots=slots)
    for client in run.clients:
        for number in range(60):
            ask(run, client, number)
    run.world.run(run.world.now_s + 20 * SERVICE_S / slots)
    done = [sum(bool(c.outcome) for c in client.calls.values()) for client in run.clients]
    assert min(done) > 5
    # The first client gets all slots before the other has asked.
    assert abs(done[0] - done[1]) <= slots + 1


@pytest.mark.parametrize("slots", [1, 3])
def test_long_answers_of_one_client_and_short_ones_of_another_get_equal_tokens(slots: int) -> None:
    run = ready(slots=slots)
    long, short = 100, 5
    for number in range(10 * slots):
        ask(run, run.clients[0], number, tokens=long)
    for number in range(100 * slots):
        ask(run, run.clients[1], number, tokens=short)
    run.world.run(run.world.now_s + 12.0)
    got = [
        sum(call.answer.length for call in client.calls.values() if call.outcome)
        for client in run.clients
    ]
    # The first client gets all slots before the other has asked. Prompts have 5 tokens or so.
    assert min(got) > 100 * slots
    assert abs(got[0] - got[1]) <= 2 * slots * long, got


def test_a_higher_priority_waits_for_one_request_at_most() -> None:
    run = ready()
    greedy, modest = run.clients
    for number in range(50):
        ask(run, greedy, number)
        ask(run, modest, number)
    run.world.run(run.world.now_s + 1.0)
    assert served(run, ask(run, greedy, 99, priority=5)) <= 2 * SERVICE_S + DELAYS_S


def test_a_full_queue_makes_room_for_a_client_that_has_nothing_in_it() -> None:
    run = ready(queue_requests=20)
    greedy, modest = run.clients
    for number in range(100):
        ask(run, greedy, number)
    run.world.run(run.world.now_s + 1.0)
    (queue,) = run.brokers[0].core.queues.values()
    assert 10 < queue.requests <= 20
    assert served(run, ask(run, modest, 0)) <= 2 * SERVICE_S + DELAYS_S


def test_what_a_full_queue_refused_is_served_in_the_end() -> None:
    run = ready(queue_requests=2, slots=2)
    calls = [ask(run, run.clients[number % 2], number) for number in range(30)]
    for call in calls:
        served(run, call, 120.0)


def test_two_brokers_share_one_slot_fairly() -> None:
    run = ready(brokers=2)
    for client in run.clients:
        for number in range(60):
            ask(run, client, number)
    run.world.run(run.world.now_s + 1.0)
    at = {client.core._broker.brokers[0] for client in run.clients}
    assert at == {"broker0"}, "both begin with the first"
    run.clients[1].sockets.cut_all()
    run.world.run(run.world.now_s + 1.0)
    before = [sum(bool(c.outcome) for c in client.calls.values()) for client in run.clients]
    run.world.run(run.world.now_s + 20 * SERVICE_S)
    after = [sum(bool(c.outcome) for c in client.calls.values()) for client in run.clients]
    shares = [later - earlier for earlier, later in zip(before, after, strict=True)]
    assert min(shares) > 5
    assert abs(shares[0] - shares[1]) <= 2
