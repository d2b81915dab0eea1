"""Lossless preemption: who gives way to whom, when, and what bounds it."""

from __future__ import annotations

from broker.protocol.header import MessageType
from broker.protocol.messages import ModelInfo, WorkerState
from tests.core.broker_facts import Bus, ClientPeer, WorkerPeer

FLOOR_S, AGAIN_S = 0.25, 10.0


def fleet(slots: int = 1, **settings: object) -> tuple[Bus, WorkerPeer, ClientPeer]:
    bus = Bus(
        queue_s=600.0,
        client_liveness=1000,
        worker_liveness=1000,
        preempt_floor_s=FLOOR_S,
        preempt_again_s=AGAIN_S,
        **settings,
    )
    return bus, bus.worker(slots=slots), bus.client()


def running(worker: WorkerPeer, client: ClientPeer, *priorities: int) -> list[bytes]:
    """Requests of these priorities that have made enough progress."""
    requests = [client.request(priority=priority) for priority in priorities]
    for assign in worker.assigned():
        worker.first_token(assign)
        worker.bus.wait(0.01)
    worker.bus.wait(FLOOR_S)
    client.receive()
    return requests


def gave_way(client: ClientPeer, worker: WorkerPeer) -> list[bytes]:
    """The requests that gave their slots up; the worker was told to stop each."""
    interrupted = [m for m in client.receive() if m.type is MessageType.INTERRUPTED]
    assert not any(m.body.lost for m in interrupted)
    assert [m.id for m in worker.receive() if m.type is MessageType.CANCEL] == [
        m.id for m in interrupted
    ]
    return [m.id for m in interrupted]


def test_a_higher_priority_takes_the_slot_and_the_other_goes_on_after_it() -> None:
    bus, worker, client = fleet()
    (low,) = running(worker, client, -50)
    caller = bus.client("person")
    high = caller.request()
    assert gave_way(client, worker) == [low]
    client.resume(low, tokens=12, priority=-50)
    assert worker.assigned() == [], "the slot is not free yet"
    worker.stopped(low)
    (assign,) = worker.assigned()
    assert assign.id == high
    worker.finish(assign)
    (again,) = worker.assigned()
    assert again.id == low


def test_the_one_that_gave_way_goes_on_before_those_that_have_not_begun() -> None:
    bus, worker, client = fleet()
    (low,) = running(worker, client, -50)
    others = [client.request(priority=-50) for _ in range(3)]
    high = bus.client("person").request()
    client.receive()
    worker.receive()
    client.resume(low, tokens=12, priority=-50)
    worker.stopped(low)
    (assign,) = worker.assigned()
    assert assign.id == high
    worker.finish(assign)
    assert worker.assigned_ids() == [low]
    assert all(other in bus.core.requests for other in others)


def test_nobody_gives_way_to_an_equal_or_a_lower() -> None:
    _, worker, client = fleet()
    running(worker, client, 0)
    client.request(priority=0)
    client.request(priority=-1)
    assert gave_way(client, worker) == []


def test_nobody_gives_way_while_a_slot_is_free() -> None:
    _, worker, client = fleet(slots=2)
    running(worker, client, -50)
    client.request()
    assert gave_way(client, worker) == []


def test_the_lowest_priority_gives_way_and_of_those_the_one_with_least_to_do_again() -> None:
    bus, worker, client = fleet(slots=3)
    middle, early, late = running(worker, client, -10, -50, -50)
    bus.core.requests[early].offset = 500  # it came with what it has
    client.request(priority=5)
    assert gave_way(client, worker) == [late]
    assert middle in bus.core.requests


def test_one_slot_is_asked_for_each_request_that_waits_and_no_more() -> None:
    bus, worker, client = fleet(slots=3)
    running(worker, client, -50, -50, -50)
    person = bus.client("person")
    person.request()
    assert len(gave_way(client, worker)) == 1
    bus.wait(0.2)
    assert gave_way(client, worker) == []
    person.request()
    assert len(gave_way(client, worker)) == 1


def test_a_slot_that_was_granted_and_taken_is_not_waited_for_again() -> None:
    """A worker grants the slot when it reads CANCEL, and says only later that the run is over."""
    bus, worker, client = fleet(slots=2)
    running(worker, client, -50, -50)
    person = bus.client("person")
    first = person.request()
    assert len(gave_way(client, worker)) == 1
    worker.grant()
    assert worker.assigned_ids() == [first]
    person.request()
    assert len(gave_way(client, worker)) == 1


def test_a_slot_that_does_not_come_free_is_asked_for_elsewhere() -> None:
    bus, worker, client = fleet(slots=2)
    running(worker, client, -50, -50)
    bus.client("person").request()
    assert len(gave_way(client, worker)) == 1
    bus.wait(4.0)
    assert gave_way(client, worker) == []
    bus.wait(2.0)
    assert len(gave_way(client, worker)) == 1


def test_it_makes_some_progress_first() -> None:
    bus, worker, client = fleet()
    low = client.request(priority=-50)
    (assign,) = worker.assigned()
    client.receive()
    bus.client("person").request()
    bus.wait(5.0)
    assert gave_way(client, worker) == [], "it has no token yet"
    worker.first_token(assign)
    bus.wait(4.5)
    assert gave_way(client, worker) == [], "that would be half of its time for nothing"
    bus.wait(1.0)
    assert gave_way(client, worker) == [low]


def test_progress_counts_over_all_slots_so_one_may_give_way_before_its_first_token() -> None:
    """A person leaves, the stream gets that slot, and at once the next person comes."""
    bus, worker, client = fleet()
    (low,) = running(worker, client, -50)
    bus.wait(30.0)
    person = bus.client("person")
    for epoch in range(1, 4):
        high = person.request()
        assert gave_way(client, worker) == [low]
        client.resume(low, epoch, tokens=12, priority=-50)
        worker.stopped(low)
        (assign,) = worker.assigned()
        assert assign.id == high
        bus.wait(AGAIN_S)
        worker.finish(assign)
        assert worker.assigned_ids() == [low]
        bus.wait(2.0)  # it computes its prompt again


def test_half_of_the_time_in_slots_is_progress_however_often_it_gives_way() -> None:
    bus, worker, client = fleet()
    (low,) = running(worker, client, -50)
    bus.wait(5.0)
    person = bus.client("person")
    person.request()
    assert gave_way(client, worker) == [low]
    client.resume(low, 1, tokens=12, priority=-50)
    worker.stopped(low)
    bus.wait(AGAIN_S)
    worker.finish(worker.assigned()[0])
    (again,) = worker.assigned()
    bus.wait(6.0)  # more than the progress that it had made
    person.request()
    assert gave_way(client, worker) == []
    worker.first_token(again)
    bus.wait(0.5)
    assert gave_way(client, worker) == []
    bus.wait(1.0)
    assert gave_way(client, worker) == [low]


def test_one_that_began_at_once_runs_for_a_moment_first() -> None:
    bus, worker, client = fleet()
    low = client.request(priority=-50)
    (assign,) = worker.assigned()
    worker.first_token(assign)
    client.receive()
    bus.client("person").request()
    bus.wait(FLOOR_S - 0.1)
    assert gave_way(client, worker) == []
    bus.wait(0.2)
    assert gave_way(client, worker) == [low]


def test_nobody_gives_way_twice_within_a_time() -> None:
    bus, worker, client = fleet()
    (low,) = running(worker, client, -50)
    person = bus.client("person")
    person.request()
    assert gave_way(client, worker) == [low]
    client.resume(low, tokens=12, priority=-50)
    worker.stopped(low)
    worker.finish(worker.assigned()[0])
    worker.first_token(worker.assigned()[0])
    client.receive()
    person.request()
    bus.wait(AGAIN_S - 1.5)
    assert gave_way(client, worker) == []
    bus.wait(2.0)
    assert gave_way(client, worker) == [low]


def test_one_without_a_client_or_that_is_cancelled_stays() -> None:
    bus, worker, client = fleet(slots=2)
    orphan, cancelled = running(worker, client, -50, -50)
    client.cancel(cancelled)
    worker.receive()
    bus.core.requests[orphan].client = None
    client.requests = {}  # type: ignore[attr-defined]
    bus.core.clients[client.routing_id].requests.pop(orphan)
    person = bus.client("person")
    person.request()
    assert [m.type for m in worker.receive() if m.type is MessageType.CANCEL] == []


def test_one_that_would_not_go_on_token_for_token_stays() -> None:
    bus = Bus(queue_s=600.0)
    worker = bus.worker(grant=False)
    worker.beat(models=[ModelInfo(name="demo", resume="text")], state=WorkerState.READY)
    worker.grant()
    client = bus.client()
    running(worker, client, -50)
    bus.client("person").request()
    assert gave_way(client, worker) == []


def test_a_stream_of_another_model_gives_way_where_it_has_room_elsewhere() -> None:
    """Two models share a worker's slots; one of them is served by another worker too."""
    bus = Bus(queue_s=600.0)
    client = bus.client()
    both = bus.worker("both", models=("a", "b"), slots=2)
    on_a, on_b = (client.request(model, priority=-50) for model in ("a", "b"))
    for assign in both.assigned():
        both.first_token(assign)
    bus.wait(FLOOR_S)
    client.receive()
    only_b = bus.worker("only-b", models=("b",))
    high = bus.client("person").request("a")
    assert gave_way(client, both) == [on_b], "nobody needs to wait for it"
    client.resume(on_b, model="b", tokens=5, priority=-50)
    assert only_b.assigned_ids() == [on_b]
    both.stopped(on_b)
    assert both.assigned_ids() == [high]
    assert on_a in bus.core.requests


def test_it_can_be_turned_off() -> None:
    bus, worker, client = fleet(preempt=False)
    running(worker, client, -50)
    bus.client("person").request()
    assert gave_way(client, worker) == []


def test_who_gave_way_is_not_failed_for_waiting_by_the_brokers_own_limit() -> None:
    bus = Bus(queue_s=2.0, client_liveness=1000, worker_liveness=1000)
    worker, client = bus.worker(), bus.client()
    (low,) = running(worker, client, -50)
    bus.client("person").request()
    gave_way(client, worker)
    client.resume(low, tokens=12, priority=-50)
    worker.stopped(low)
    bus.wait(60.0)
    assert bus.core.requests[low].phase.value == "queued"


def test_who_waits_for_a_worker_that_ends_takes_no_slot_there() -> None:
    """The waiting request would not end there in time, so nobody makes room for it."""
    bus, worker, client = fleet()
    running(worker, client, -50)
    worker.beat(state=WorkerState.READY, ends_in_ms=5000)
    client.receive()
    bus.client("person").request()
    assert gave_way(client, worker) == []
