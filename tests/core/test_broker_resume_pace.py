"""How often the broker lets one request be resumed (SPEC.md M17)."""

from __future__ import annotations

from broker.protocol.header import MessageType
from broker.protocol.messages import FailEvent
from tests.core.broker_facts import Bus, ClientPeer, WorkerPeer


def rejected_and_resumed(bus: Bus, client: ClientPeer, worker: WorkerPeer, id_: bytes) -> int:
    """A worker rejects and its client resumes at once, until the broker says no: how often it was
    taken."""
    for round_ in range(1, 40):
        worker.reject(worker.assigned()[0])
        client.receive()
        client.resume(id_, round_)
        for message in client.receive():
            if message.type is MessageType.OUTPUT:
                (event,) = message.events
                assert isinstance(event, FailEvent)
                assert (event.error.code, event.error.retryable) == ("overloaded", True)
                assert event.epoch == round_
                assert 0 < (event.error.retry_after_ms or 0) <= 5001
                return round_ - 1
    raise AssertionError("at the speed of the network")


def test_a_worker_that_rejects_and_a_client_that_resumes_at_once_make_no_loop() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    assert rejected_and_resumed(bus, client, worker, request_id) == 10
    # It is kept as it was: after a while it may be resumed again.
    bus.now_s += 6.0
    client.resume(request_id, 50)
    assert [assign.id for assign in worker.assigned()] == [request_id]


def test_a_token_in_between_makes_the_pace_new() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    for round_ in range(1, 40):
        worker.reject(worker.assigned()[0])
        client.receive()
        client.resume(request_id, round_, tokens=round_)
    assert len(worker.assigned()) == 1
