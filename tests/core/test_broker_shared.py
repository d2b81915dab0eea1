"""A worker shared by several brokers, and clients that come from another broker, as seen by one
broker."""

from __future__ import annotations

from broker.protocol.header import MessageType
from broker.protocol.messages import Held
from tests.core.broker_facts import Bus

# --- credit of a worker that serves other brokers too ---------------------------------------------


def test_a_shared_worker_is_told_at_once_when_requests_start_and_stop_waiting() -> None:
    bus = Bus()
    worker, client = bus.worker(brokers=2), bus.client()
    running, first, second = (client.request() for _ in range(3))
    assert worker.beats_told() == [{"waiting": 1}], "a second waiting request is not news"
    client.cancel(first)
    assert worker.beats_told() == []
    client.cancel(second)
    assert worker.beats_told() == [{}]
    assert bus.core.requests[running].worker is not None


def test_an_assigned_request_stops_waiting_without_another_heartbeat() -> None:
    bus = Bus()
    worker, client = bus.worker(brokers=2), bus.client()
    client.request(), client.request()
    assert worker.beats_told() == [{"waiting": 1}]
    worker.grant()
    assert worker.beats_told() == []
    client.request()
    assert worker.beats_told() == [{"waiting": 1}]


def test_a_worker_of_one_broker_is_not_told_of_waiting_requests() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.request(), client.request()
    assert worker.beats_told() == []
    bus.wait(1.1)
    assert worker.beats_told() == [{}]


def test_unneeded_credit_is_returned_when_the_worker_recalls_it() -> None:
    bus = Bus()
    worker, client = bus.worker(slots=3, brokers=2), bus.client()
    client.request()
    worker.recall(1)
    assert worker.beats_told() == [{"recalled": 1, "returned": 1}]
    worker.recall(1)
    assert worker.beats_told() == [], "a repeated recall asks for nothing"
    client.request()
    worker.receive()
    client.request()
    assert worker.beats_told() == [{"waiting": 1, "recalled": 1, "returned": 1}]
    worker.recall(2)
    assert worker.beats_told() == [{"waiting": 1, "recalled": 2, "returned": 1}], "all was spent"


def test_waiting_requests_are_served_before_credit_is_returned() -> None:
    bus = Bus()
    worker, client = bus.worker(slots=1, brokers=2), bus.client()
    client.request()
    waiting = client.request()
    worker.receive()
    worker.granted += 1
    worker.recall(1)
    assert worker.assigned_ids() == [waiting]
    assert worker.beats_told()[-1] == {"recalled": 1}, "nothing was left to give back"


# --- a stream that comes from another broker ------------------------------------------------------


def test_a_resume_from_another_broker_is_attached_to_the_worker_that_holds_it() -> None:
    bus = Bus()
    worker, client = bus.worker(brokers=2), bus.client()
    client.request()
    worker.receive()
    moved = bus.new_id()
    client.resume(moved, epoch=3, tokens=2, holder="worker")
    (assign,) = worker.assigned()
    assert (assign.id, assign.assign.attach, assign.assign.epoch) == (moved, True, 3)
    worker.finish(assign, grant=False)
    assert client.receive()[-1].events[0].request_id == moved


def test_a_holder_that_no_longer_has_the_request_rejects_and_the_client_resumes_elsewhere() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    moved = bus.new_id()
    client.resume(moved, holder="worker")
    (assign,) = worker.assigned()
    client.receive()
    worker.granted -= 1  # no credit was spent
    worker.reject(assign, "worker_lost")
    interrupted = client.only(MessageType.INTERRUPTED)
    assert (interrupted.id, interrupted.body.lost) == (moved, False)
    client.resume(moved, epoch=2)
    (assign,) = worker.assigned()
    assert not assign.assign.attach


def test_a_new_broker_waits_a_moment_for_the_worker_that_still_runs_a_request() -> None:
    bus = Bus(settle_s=5)
    other, client = bus.worker("other"), bus.client()
    resumed = bus.new_id()
    client.resume(resumed, holder="holder")
    assert other.assigned() == []
    holder = bus.worker("holder", holds=(Held(resumed, 0, 7),))
    (assign,) = [m for m in holder.first if m.type is MessageType.ASSIGN]
    assert (assign.id, assign.assign.attach) == (resumed, True)


def test_a_request_stops_waiting_for_a_holder_that_arrives_without_it() -> None:
    bus = Bus(settle_s=5)
    other, client = bus.worker("other"), bus.client()
    resumed = bus.new_id()
    client.resume(resumed, holder="holder")
    assert other.assigned() == []
    bus.worker("holder")
    assert other.assigned_ids() == [resumed]


def test_a_request_does_not_wait_long_for_a_holder_that_does_not_arrive() -> None:
    bus = Bus(settle_s=5, worker_heartbeat_s=10)
    other, client = bus.worker("other"), bus.client()
    resumed = bus.new_id()
    client.resume(resumed, holder="holder")
    bus.wait(4.9)
    assert other.assigned() == []
    bus.wait(0.2)
    assert other.assigned_ids() == [resumed]


def test_a_broker_that_has_run_for_a_while_does_not_wait_for_a_holder() -> None:
    bus = Bus(settle_s=5, worker_heartbeat_s=10)
    other, client = bus.worker("other"), bus.client()
    bus.wait(6)
    resumed = bus.new_id()
    client.resume(resumed, holder="holder")
    assert other.assigned_ids() == [resumed]
