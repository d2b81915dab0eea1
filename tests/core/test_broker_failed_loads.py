"""A model that cannot be loaded: its requests fail with the cause at once, and none of them while
some worker may serve it."""

from __future__ import annotations

from typing import Any

import pytest

from broker.core.events import Side
from broker.protocol import header
from broker.protocol.header import MessageType
from broker.protocol.messages import FailedModel, Hello, ModelInfo, WorkerState
from tests.core.broker_facts import Bus, ClientPeer, WorkerPeer

GRACE_S = 30.0
RETRY_S = 60.0


def a_bus(**settings: Any) -> Bus:
    return Bus(
        model_grace_s=GRACE_S,
        queue_s=3600.0,
        ttl_s=7200.0,
        worker_liveness=1000,
        client_liveness=1000,
        **settings,
    )


def shelf(bus: Bus, name: str = "w1") -> WorkerPeer:
    """A worker with two models of which none is loaded."""
    worker = bus.worker(name, models=("a", "b"), grant=False)
    offers(worker, "a", "b")
    return worker


def offers(
    worker: WorkerPeer, *models: str, failed: str = "", retry_s: float | None = RETRY_S
) -> None:
    """What it can load; `failed`: what it has just failed to load."""
    infos = [ModelInfo(name=name, loaded=False, load_ms=2000) for name in models]
    retry_in_ms = None if retry_s is None else round(1000 * retry_s)
    told = [FailedModel(name=failed, cause="no config.json", retry_in_ms=retry_in_ms)]
    worker.beat(state=WorkerState.READY, models=infos, failed=told if failed else [])


def failures(client: ClientPeer) -> list[tuple[bytes, dict[str, Any]]]:
    """Requests that failed since the last call, and how."""
    return [
        (event.request_id, event.error)
        for message in client.receive()
        if message.type is MessageType.OUTPUT
        for event in message.events
        if type(event).__name__ == "FailEvent"
    ]


def test_those_who_wait_are_told_the_cause_at_once() -> None:
    bus = a_bus()
    worker, client = shelf(bus), bus.client()
    first, second = client.request("a"), client.request("a")
    assert failures(client) == []
    offers(worker, "b", failed="a")
    told = dict(failures(client))
    assert set(told) == {first, second}
    error = told[first]
    assert error.code == "model_unavailable" and error.details == {"load_failed": True}
    assert "'a' cannot be loaded: no config.json (worker w1)" in error.message
    assert (error.retryable, error.retry_after_ms) == (False, 60_000)


def test_who_comes_later_is_told_until_the_worker_offers_it_again() -> None:
    bus = a_bus()
    worker, client = shelf(bus), bus.client()
    offers(worker, "b", failed="a")
    bus.wait(RETRY_S / 2)
    late = client.request("a")
    [(id_, error)] = failures(client)
    assert id_ == late and error.retry_after_ms == 30_000
    bus.wait(RETRY_S / 2)
    # Its time has come, and the worker's word is on its way.
    soon = client.request("a")
    assert failures(client) == []
    worker.beats_told()
    offers(worker, "a", "b")
    assert failures(client) == []
    bus.wait(1.0)
    assert [beat["load"] for beat in worker.beats_told() if beat.get("load")] == ["a"]
    offers(worker, "b", failed="a", retry_s=2 * RETRY_S)
    [(id_, error)] = failures(client)
    assert id_ == soon and error.retry_after_ms == 120_000


def test_a_relay_is_told_which_models_callers_wait_for_in_vain() -> None:
    bus = a_bus()
    worker, client = shelf(bus), bus.client()
    other = bus.worker("w2", models=("b",))
    offers(worker, "b", failed="a")
    cause = "no config.json (worker w1)"
    told = {"model": "a", "cause": cause, "retry_in_ms": 60_000}
    assert client.query("bus.failed_loads") == [told]
    offers(worker, "a", failed="b")
    assert client.query("bus.failed_loads") == [], "another worker serves it"
    other.goodbye()
    assert client.query("bus.failed_loads") == [], "that one may come back"
    offers(worker, "b", failed="a")
    bus.wait(RETRY_S + 1)
    # Its worker's word is awaited: nobody is told of a failure, nor that there is no such model.
    assert client.query("bus.failed_loads") == [{**told, "retry_in_ms": 0}]
    bus.wait(GRACE_S)
    assert client.query("bus.failed_loads") == []


def test_one_that_is_not_tried_again_is_told_until_its_worker_has_left_for_long() -> None:
    bus = a_bus()
    worker, client = shelf(bus), bus.client()
    offers(worker, "b", failed="a", retry_s=None)
    bus.wait(10 * RETRY_S)
    client.request("a")
    [(_, error)] = failures(client)
    assert error.retry_after_ms is None and "mended" in error.message
    worker.goodbye()
    client.request("a")
    [(_, error)] = failures(client)
    assert "no config.json" in error.message
    bus.wait(GRACE_S + 1)
    assert not bus.core.failed_loads, "it is forgotten"


def test_nobody_is_told_while_another_worker_offers_the_model() -> None:
    bus = a_bus()
    first, second, client = shelf(bus, "w1"), shelf(bus, "w2"), bus.client()
    request = client.request("a")
    offers(first, "b", failed="a")
    bus.wait(1.0)
    assert failures(client) == []
    assert [beat["load"] for beat in second.beats_told() if beat.get("load")] == ["a"]
    offers(second, "b", failed="a")
    [(id_, error)] = failures(client)
    assert id_ == request and "(worker w1)" in error.message and "(worker w2)" in error.message


@pytest.mark.parametrize("returns", [True, False])
def test_a_worker_that_left_without_a_word_may_come_back(returns: bool) -> None:
    bus = a_bus()
    other, worker, client = bus.worker("w2", models=("a",)), shelf(bus), bus.client()
    other.goodbye()
    bus.wait(10.0)
    request = client.request("a")
    offers(worker, "b", failed="a")
    bus.wait(GRACE_S - 11.0)
    assert failures(client) == []
    if returns:
        assert request in bus.worker("w2", models=("a",)).assigned_ids()
        return
    bus.wait(1.5)
    [(id_, error)] = failures(client)
    assert id_ == request and "no config.json" in error.message


def test_those_who_expect_a_worker_wait_for_it() -> None:
    bus = a_bus()
    worker, client = shelf(bus), bus.client()
    client.query("bus.expect", models=["a"], ttl_ms=5000)
    client.request("a")
    offers(worker, "b", failed="a")
    bus.wait(4.0)
    assert failures(client) == []
    bus.wait(2.0)
    assert len(failures(client)) == 1


def test_an_answer_that_is_partly_there_is_to_be_asked_for_again() -> None:
    bus = a_bus()
    worker, client = shelf(bus), bus.client()
    offers(worker, "b", failed="a")
    client.resume(bus.new_id(), model="a", tokens=1)
    [(_, error)] = failures(client)
    assert (error.retryable, error.retry_after_ms) == (True, 60_000)


def test_a_new_broker_hears_of_it_in_hello() -> None:
    bus = a_bus()
    client, worker = bus.client(), WorkerPeer(bus, Side.BACK, "")
    waits = client.request("a")
    failed = [FailedModel(name="a", cause="no config.json", retry_in_ms=60_000)]
    models = [ModelInfo(name="b")]
    hello = Hello(role="worker", name="w1", models=models, capacity=1, failed=failed)
    worker.send(MessageType.HELLO, header.NO_ID, hello)
    [(id_, error)] = failures(client)
    assert id_ == waits and "no config.json" in error.message


def test_a_worker_that_says_nothing_more_of_it_has_mended_it() -> None:
    bus = a_bus()
    worker, client = shelf(bus), bus.client()
    offers(worker, "b", failed="a")
    offers(worker, "b")
    client.request("a")
    assert failures(client) == [], "its callers wait as for any other model"


def test_the_operator_is_told_why_it_cannot_be_loaded() -> None:
    bus = a_bus()
    worker, client = shelf(bus), bus.client()
    offers(worker, "b", failed="a")
    told = client.query("bus.load", worker="w1", model="a")
    assert "cannot load model 'a': no config.json" in told["message"]
