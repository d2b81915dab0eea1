"""Honest waiting: places and expected starts, how they are corrected, what is refused at once."""

from __future__ import annotations

import random
from typing import Any

import pytest

from broker.core.events import AccessChanged
from broker.core.records import RequestState
from broker.core.speed import Accuracy
from broker.protocol import header
from broker.protocol.header import MessageType
from broker.protocol.messages import Hello, Params, WorkerState
from tests.core.broker_facts import Bus, ClientPeer, Message, WorkerPeer
from tests.core.fleet_world import Fleet as FastAndSlow, Gpu

TOKEN_S = 0.1
BEGIN_S = 0.5
ANSWER_S = BEGIN_S + 19 * TOKEN_S


def answer(worker: WorkerPeer, assign: Message, tokens: int = 20, pace: float = 1.0) -> None:
    """A whole answer, `pace` times as slow as usual."""
    worker.bus.wait(BEGIN_S * pace)
    worker.first_token(assign)
    worker.bus.wait(TOKEN_S * (tokens - 1) * pace)
    worker.finish(assign, tokens=tokens)


def ask(client: ClientPeer, tokens: int = 20, **body: Any) -> bytes:
    return client.request(params=Params(max_tokens=tokens), **body)


class Fleet:
    """One worker of one slot, whose speed is known, and a client that hears of waits."""

    def __init__(self, **settings: Any) -> None:
        settings = {"queue_s": 600.0, "client_liveness": 1000, "worker_liveness": 1000} | settings
        self.bus = Bus(**settings)
        self.worker = self.bus.worker()
        self.client = ClientPeer(self.bus, self.bus.client().side)
        hello = Hello(role="client", name="hears", waits=True)
        self.client.send(MessageType.HELLO, header.NO_ID, hello)
        self.client.begin()
        for _ in range(5):
            ask(self.client)
            answer(self.worker, self.worker.assigned()[0])
        self.client.receive()

    def told(self, request: bytes) -> list[dict[str, Any]]:
        """What the client was told of a waiting request since the last look."""
        came = [m for m in self.client.receive() if m.type is MessageType.ACCEPTED]
        return [m.plain for m in came if m.id == request and "worker" not in m.plain]


def test_a_waiting_request_knows_its_place_and_when_it_should_start() -> None:
    fleet = Fleet()
    runs = ask(fleet.client)
    (assign,) = fleet.worker.assigned()
    assert assign.id == runs
    for place in range(3):
        (told,) = fleet.told(ask(fleet.client))
        assert told.get("position", 0) == place
        expected_s = ANSWER_S * (place + 1)
        assert told["starts_in_ms"] / 1000 == pytest.approx(expected_s, rel=0.1)


def test_it_hears_when_that_changes_and_not_else() -> None:
    fleet = Fleet()
    ask(fleet.client)
    (assign,) = fleet.worker.assigned()
    fleet.worker.first_token(assign)
    ask(fleet.client)
    last = ask(fleet.client)
    fleet.told(last)
    fleet.bus.wait(1.5)
    assert fleet.told(last) == [], "it counts down by itself"
    fleet.worker.finish(assign, tokens=16)
    fleet.bus.wait(1.2)
    (told,) = fleet.told(last)
    assert told.get("position", 0) == 0
    assert told["starts_in_ms"] < 1000 * ANSWER_S * 1.2


def test_a_client_that_did_not_ask_for_it_is_told_once() -> None:
    fleet = Fleet()
    other = fleet.bus.client("old")
    ask(other)
    (assign,) = fleet.worker.assigned()
    ask(other)
    request = ask(other)
    other.receive()
    answer(fleet.worker, assign)
    fleet.bus.wait(2.0)
    assert [m for m in other.receive() if m.type is MessageType.ACCEPTED and m.id == request] == []


def test_no_wait_is_announced_for_a_model_of_unknown_speed() -> None:
    bus = Bus()
    bus.worker()
    client = bus.client()
    client.request()
    client.receive()
    client.request()
    (accepted,) = client.receive()
    assert accepted.plain == {}


def test_a_higher_priority_starts_as_soon_as_somebody_gives_way() -> None:
    fleet = Fleet()
    ask(fleet.client, 1000, priority=-50)
    (low,) = fleet.worker.assigned()
    fleet.worker.first_token(low)
    (told,) = fleet.told(ask(fleet.client))
    assert told["starts_in_ms"] <= 200


def test_what_comes_of_it_corrects_the_next_word() -> None:
    """All answers take twice as long as the known speed predicts; after a while waits show it."""
    fleet = Fleet()
    said: list[float] = []
    ask(fleet.client)
    (assign,) = fleet.worker.assigned()
    for _ in range(40):
        request = ask(fleet.client)
        (told,) = fleet.told(request)
        said.append(told["starts_in_ms"] / 1000)
        answer(fleet.worker, assign, pace=2.0)
        (assign,) = fleet.worker.assigned()
    assert said[0] == pytest.approx(ANSWER_S, rel=0.1)
    assert said[-1] == pytest.approx(2 * ANSWER_S, rel=0.15)
    accuracy = fleet.bus.core.accuracy["demo"]
    assert accuracy.error is not None and accuracy.error < 0.5


def measured(fleet: Fleet) -> Message:
    """Waits that were predicted well; returns the running requests."""
    ask(fleet.client)
    (assign,) = fleet.worker.assigned()
    for _ in range(20):
        ask(fleet.client)
        answer(fleet.worker, assign)
        (assign,) = fleet.worker.assigned()
    fleet.client.receive()
    return assign


def test_what_cannot_start_in_time_is_refused_at_once_with_an_honest_time() -> None:
    fleet = Fleet()
    measured(fleet)
    for _ in range(10):
        ask(fleet.client)
    fleet.client.receive()
    ask(fleet.client, queue_ms=2000)
    (event,) = fleet.client.events()
    assert event.error.code == "overloaded" and event.error.retryable  # type: ignore[union-attr]
    after_s = event.error.retry_after_ms / 1000  # type: ignore[union-attr]
    assert after_s == pytest.approx(11 * ANSWER_S - 2.0, rel=0.15)
    assert "10 requests wait" in event.error.message  # type: ignore[union-attr]


def test_what_may_start_in_time_waits() -> None:
    fleet = Fleet()
    measured(fleet)
    for _ in range(10):
        ask(fleet.client)
    fleet.client.receive()
    request = ask(fleet.client, queue_ms=40_000)
    assert fleet.bus.core.requests[request].phase.value == "queued"
    resumed = ask(fleet.client)
    assert fleet.bus.core.requests[resumed].phase.value == "queued", "it names no limit"


def test_the_operators_list_and_the_metrics_show_it() -> None:
    fleet = Fleet()
    measured(fleet)
    ask(fleet.client)
    ask(fleet.client)
    fleet.client.receive()
    fleet.bus.wait(0.5)
    rows = [r for r in fleet.client.query("bus.requests") if r["state"] == "queued"]
    assert sorted(row["position"] for row in rows) == [0, 1]
    assert all(row["starts_in_ms"] > 0 for row in rows)
    text = fleet.client.query("bus.metrics")["text"]
    assert 'tokenbus_queue_wait_error_seconds{model="demo"}' in text


def test_a_worker_that_stands_still_does_not_make_the_broker_say_nonsense() -> None:
    fleet = Fleet()
    measured(fleet)
    fleet.worker.beat(state=WorkerState.READY, engine_age_ms=60_000)
    request = ask(fleet.client)
    (told,) = fleet.told(request)
    assert "starts_in_ms" not in told, "no slot will be free that is known of"


# --- calibration ----------------------------------------------------------------------------------


def relative_errors(seed: int, count: int = 250) -> list[float]:
    """People come at random times, now more and now fewer than are served, and want answers of
    unlike length that no `max_tokens` tells: of each wait, how wrong was what was said first."""
    rng = random.Random(seed)
    fleet = FastAndSlow("least_loaded", [Gpu("gpu", 0.01, 0.0005, slots=4)])
    told: dict[bytes, tuple[float, float, RequestState]] = {}
    due_s = fleet.bus.now_s
    for _ in range(count):
        load = (1.5, 0.6)[int((due_s - 1000.0) / 15.0) % 2]
        due_s += rng.expovariate(load * 4 / 0.7)
        fleet.run(due_s)
        fleet.bus.wait(max(0.0, due_s - fleet.bus.now_s))
        request = fleet.ask(rng.choice((10, 40, 150)), known=False)
        state = fleet.bus.core.requests[request]
        if state.worker is None and state.expects_s is not None:
            told[request] = fleet.bus.now_s, state.expects_s, state
    fleet.run()
    waits = [(said_s, (state.assigned_s or 0.0) - at_s) for at_s, said_s, state in told.values()]
    return sorted(abs(said_s - took_s) / took_s for said_s, took_s in waits if took_s >= 0.25)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_half_of_the_announced_waits_are_right_within_a_fifth(seed: int) -> None:
    errors = relative_errors(seed)
    assert len(errors) > 150
    assert errors[len(errors) // 2] <= 0.2, "lengths are random: so are sums of them"
    assert errors[len(errors) * 3 // 4] <= 0.4


def test_one_wrong_word_to_many_is_corrected_once() -> None:
    """Forty wait and were told a third of what it becomes. Each of them shows that, and together
    they must not make the next word a hundred times as long."""
    accuracy = Accuracy()
    for _ in range(40):
        accuracy.observe(10.0, 10.0, 30.0)
    assert 1.2 < accuracy.factor < 3.0


# --- workers that somebody will start -------------------------------------------------------------


def test_a_model_whose_workers_are_expected_is_waited_for_and_the_caller_hears_why() -> None:
    bus = Bus(model_grace_s=5.0, client_liveness=1000, worker_liveness=1000)
    bus.worker("other", models=("other",))
    launcher, client = bus.client("launcher"), bus.client("person")
    args = {"models": ["demo"], "note": "starting: job 7 pending (Resources)", "ttl_ms": 60_000}
    assert launcher.query("bus.expect", **args)["waiting"] == {"demo": 0}
    request = client.request()
    (accepted,) = client.receive()
    assert accepted.plain["why"] == "starting: job 7 pending (Resources)"
    bus.wait(30.0)
    assert launcher.query("bus.expect", **args)["waiting"] == {"demo": 1}
    bus.wait(59.0)
    assert client.events() == []
    worker = bus.worker()
    assert worker.assigned_ids() == [request]


def test_a_launcher_that_is_gone_keeps_nobody_waiting() -> None:
    bus = Bus(model_grace_s=5.0, client_liveness=1000, worker_liveness=1000)
    bus.worker("other", models=("other",))
    launcher, client = bus.client("launcher"), bus.client("person")
    launcher.query("bus.expect", models=["demo"], ttl_ms=10_000)
    client.request()
    client.receive()
    bus.wait(9.0)
    assert client.events() == []
    bus.wait(10.0)
    assert client.failure() == "model_unavailable"
    client.request()
    assert client.failure() == "model_unavailable"


def test_only_an_operator_may_say_what_is_expected() -> None:
    access = AccessChanged(frozenset({"k"}), frozenset(), frozenset())
    bus = Bus(access)
    client = bus.client(key="k")
    assert client.query("bus.expect", models=["demo"])["code"] == "forbidden"
    assert bus.core.expected == {}
