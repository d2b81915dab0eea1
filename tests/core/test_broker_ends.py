"""Workers whose end is known: what begins there, what moves away, and the races of both."""

from __future__ import annotations

import pytest

from broker.protocol.header import MessageType
from broker.protocol.messages import ModelInfo, Params, WorkerState
from tests.core.broker_facts import Bus, ClientPeer, Message, WorkerPeer, types

TOKEN_S = 0.1
BEGIN_S = 0.5


def ask(client: ClientPeer, tokens: int, **body: object) -> bytes:
    return client.request(params=Params(max_tokens=tokens), **body)


def answer(worker: WorkerPeer, assign: Message, tokens: int) -> None:
    """A whole answer at the speed that is measured here."""
    bus = worker.bus
    pass_time(bus, BEGIN_S, worker)
    worker.first_token(assign)
    pass_time(bus, TOKEN_S * (tokens - 1), worker)
    worker.finish(assign, tokens=tokens)


def pass_time(bus: Bus, seconds: float, *alive: WorkerPeer, **said: object) -> None:
    """Let time pass while these workers live; what they say of their end stays the same."""
    until_s = bus.now_s + seconds
    while bus.now_s < until_s:
        bus.wait(min(0.5, until_s - bus.now_s))
        for worker in alive:
            worker.beat(state=WorkerState.READY, **ends(worker))


def ends(worker: WorkerPeer) -> dict[str, int]:
    at_s = getattr(worker, "ends_s", None)
    return {} if at_s is None else {"ends_in_ms": max(0, int((at_s - worker.bus.now_s) * 1000))}


def end_in(worker: WorkerPeer, seconds: float | None) -> None:
    """The worker learns of its end and says so at once."""
    worker.ends_s = None if seconds is None else worker.bus.now_s + seconds  # type: ignore[attr-defined]
    worker.beat(state=WorkerState.READY, ends_why="spot notice", **ends(worker))


@pytest.fixture
def bus() -> Bus:
    """A broker that has measured the model's speed."""
    bus = Bus(model_grace_s=600.0, queue_s=600.0, client_liveness=1000)
    client, worker = bus.client("first"), bus.worker("measured")
    for _ in range(5):
        ask(client, 20)
        answer(worker, worker.assigned()[0], 20)
    worker.goodbye("drained")
    client.goodbye()
    return bus


def came_to(client: ClientPeer) -> list[str]:
    return types(client.receive())


# --- placement ------------------------------------------------------------------------------------


def test_what_will_not_end_in_time_begins_at_another_worker(bus: Bus) -> None:
    going, staying, client = bus.worker("going", slots=4), bus.worker("staying"), bus.client()
    end_in(going, 20.0)
    ask(client, 1000)
    assert len(staying.assigned_ids()) == 1
    short = ask(client, 50)
    assert going.assigned_ids() == [short]


def test_a_short_request_passes_a_long_one_that_waits_for_a_worker_that_stays(bus: Bus) -> None:
    going, staying, client = bus.worker("going"), bus.worker("staying"), bus.client()
    end_in(going, 20.0)
    ask(client, 1000)
    staying.assigned()
    long, short = ask(client, 1000), ask(client, 50)
    assert going.assigned_ids() == [short]
    assert bus.core.requests[long].phase.value == "queued"


def test_where_all_workers_end_the_one_that_is_there_longest_begins_it(bus: Bus) -> None:
    sooner, later, client = bus.worker("sooner"), bus.worker("later"), bus.client()
    end_in(sooner, 30.0)
    end_in(later, 60.0)
    request = ask(client, 10_000)
    assert later.assigned_ids() == [request]


def test_half_of_it_is_better_than_to_wait(bus: Bus) -> None:
    going, staying, client = bus.worker("going"), bus.worker("staying"), bus.client()
    ask(client, 1000)
    assert bool(going.assigned()) != bool(staying.assigned())
    bus = client.bus
    busy = going if bus.core.requests and _runs(bus, "going") else staying
    idle = staying if busy is going else going
    end_in(idle, 60.0)
    request = ask(client, 1000)  # 100 s
    assert idle.assigned_ids() == [request]


def _runs(bus: Bus, name: str) -> bool:
    return any(w.name == name and w.running for w in bus.core.workers.values())


def test_in_its_last_moments_a_worker_is_given_nothing(bus: Bus) -> None:
    going, client = bus.worker("going"), bus.client()
    end_in(going, 1.5)
    bus.wait(0.1)
    ask(client, 1)
    assert going.assigned() == []
    (row,) = client.query("bus.workers")
    assert row["state"] == "ending" and 0 < row["ends_in_ms"] <= 1400
    assert row["ends_why"] == "spot notice"


# --- moving ---------------------------------------------------------------------------------------


def moved(client: ClientPeer, going: WorkerPeer) -> list[bytes]:
    """The requests that the broker has taken from the worker, in order; it was told each."""
    interrupted = [m for m in client.receive() if m.type is MessageType.INTERRUPTED]
    assert not any(m.body.lost for m in interrupted)
    cancelled = [m.id for m in going.receive() if m.type is MessageType.CANCEL]
    assert cancelled == [m.id for m in interrupted]
    return cancelled


def two_workers(
    bus: Bus, *lengths: int, elsewhere: int = 8
) -> tuple[ClientPeer, WorkerPeer, WorkerPeer, list[bytes]]:
    """Requests that run at a worker which then learns of its end, and another with room."""
    going = bus.worker("going", slots=8)
    client = bus.client()
    requests = [ask(client, length) for length in lengths]
    for assign in going.assigned():
        going.first_token(assign)
    other = bus.worker("other", slots=elsewhere, grant=elsewhere > 0)
    client.receive()
    return client, going, other, requests


def test_streams_move_before_the_end_and_the_longest_first(bus: Bus) -> None:
    client, going, other, (middle, long, short) = two_workers(bus, 700, 1000, 50)
    end_in(going, 60.0)
    pass_time(bus, 44.0, going, other)
    assert moved(client, going) == [], "there is time"
    pass_time(bus, 2.0, going, other)
    assert moved(client, going) == [long, middle], "and the short one ends there"
    client.resume(long, tokens=450)
    assert other.assigned_ids() == [long]
    assert _runs(bus, "going")
    assert bus.core.requests[short].worker_name == "going"


def test_no_more_move_than_there_is_room_for(bus: Bus) -> None:
    client, going, other, requests = two_workers(bus, 1000, 2000, 3000, elsewhere=1)
    end_in(going, 10.0)
    pass_time(bus, 1.0, going, other)
    assert moved(client, going) == [requests[2]]
    client.resume(requests[2], tokens=10)
    other.grant()
    pass_time(bus, 1.0, going, other)
    assert moved(client, going) == [requests[1]]


def test_at_the_last_moment_they_are_first_in_the_queue_of_others(bus: Bus) -> None:
    going, client = bus.worker("going"), bus.client()
    request = ask(client, 1000)
    going.first_token(going.assigned()[0])
    client.receive()
    other, stranger = bus.worker("other"), bus.client("stranger")
    ask(stranger, 1000)
    (runs,) = other.assigned()
    ask(stranger, 1000)
    end_in(going, 10.0)
    pass_time(bus, 7.5, going, other)
    assert moved(client, going) == [], "the other is full"
    pass_time(bus, 1.0, going, other)
    assert moved(client, going) == [request]
    client.resume(request, tokens=5)
    other.finish(runs, tokens=1000)
    assert other.assigned_ids() == [request], "before what has not begun yet"


def test_without_another_worker_a_stream_stays_until_the_end_and_then_waits(bus: Bus) -> None:
    going, client = bus.worker("going"), bus.client()
    request = ask(client, 1000)
    going.first_token(going.assigned()[0])
    client.receive()
    end_in(going, 10.0)
    pass_time(bus, 9.9, going)
    assert came_to(client) == []
    going.goodbye("drained")
    assert came_to(client) == ["INTERRUPTED"]
    client.resume(request, tokens=90)
    assert came_to(client) == ["ACCEPTED"]
    back = bus.worker("going")
    assert back.assigned_ids() == [request]


def test_a_new_worker_takes_streams_over_while_the_other_ends(bus: Bus) -> None:
    going, client = bus.worker("going"), bus.client()
    request = ask(client, 1000)
    going.first_token(going.assigned()[0])
    client.receive()
    end_in(going, 10.0)
    pass_time(bus, 4.0, going)
    other = bus.worker("other")
    pass_time(bus, 0.5, going, other)
    assert moved(client, going) == [request]


def test_what_would_not_go_on_token_for_token_stays(bus: Bus) -> None:
    going = bus.worker("going", slots=8)
    client = bus.client()
    ask(client, 1000)
    going.first_token(going.assigned()[0])
    other = bus.worker("other", grant=False)
    other.beat(models=[ModelInfo(name="demo", resume="text")], state=WorkerState.READY)
    other.grant()
    client.receive()
    end_in(going, 10.0)
    pass_time(bus, 9.5, going, other)
    assert moved(client, going) == []


# --- races ----------------------------------------------------------------------------------------


def test_the_end_comes_earlier_than_said(bus: Bus) -> None:
    client, going, other, (request,) = two_workers(bus, 1000)
    end_in(going, 600.0)
    pass_time(bus, 3.0, going, other)
    end_in(going, 5.0)
    pass_time(bus, 0.5, going, other)
    assert moved(client, going) == [request]


def test_the_worker_dies_before_the_end_that_it_said(bus: Bus) -> None:
    client, going, other, (request,) = two_workers(bus, 1000)
    end_in(going, 600.0)
    pass_time(bus, 3.0, going, other)
    going.goodbye("engine_dead")
    assert came_to(client) == ["INTERRUPTED"]
    client.resume(request, tokens=30, lost=("going",))
    assert other.assigned_ids() == [request]


def test_an_end_that_is_called_off_moves_nothing_and_the_worker_takes_more(bus: Bus) -> None:
    client, going, other, _ = two_workers(bus, 1000)
    end_in(going, 17.0)
    pass_time(bus, 1.0, going, other)
    end_in(going, None)
    pass_time(bus, 30.0, going, other)
    assert moved(client, going) == []
    (row, _) = client.query("bus.workers")
    assert row["ends_in_ms"] is None and row["state"] == "ready"


def test_an_end_that_is_put_off_in_the_last_moment_opens_the_worker_again(bus: Bus) -> None:
    going, client = bus.worker("going"), bus.client()
    end_in(going, 1.0)
    bus.wait(0.1)
    request = ask(client, 20)
    assert going.assigned() == []
    end_in(going, 600.0)
    assert going.assigned_ids() == [request]


def test_a_notice_while_streams_move_moves_none_twice(bus: Bus) -> None:
    client, going, other, requests = two_workers(bus, 1000, 2000)
    end_in(going, 14.0)
    pass_time(bus, 0.5, going, other)
    assert set(moved(client, going)) == set(requests)
    client.resume(requests[0], tokens=7)
    end_in(going, 4.0)
    pass_time(bus, 1.0, going, other)
    client.resume(requests[1], tokens=7)
    assert set(other.assigned_ids()) == set(requests)
    pass_time(bus, 4.0, other)
    assert MessageType.INTERRUPTED not in [m.type for m in client.receive()]


def test_both_workers_learn_of_their_end_and_nothing_goes_in_circles(bus: Bus) -> None:
    client, going, other, (request,) = two_workers(bus, 1000)
    end_in(going, 20.0)
    end_in(other, 22.0)
    pass_time(bus, 19.5, going, other)
    assert moved(client, going) == [], "it would have to move again at once"
    assert bus.core.requests[request].worker_name == "going"


def test_a_moved_request_whose_client_does_not_come_back_blocks_no_room_for_long(bus: Bus) -> None:
    client, going, other, requests = two_workers(bus, 1000, 2000, elsewhere=1)
    end_in(going, 14.0)
    pass_time(bus, 0.5, going, other)
    assert moved(client, going) == [requests[1]]
    pass_time(bus, 3.0, going, other)
    assert moved(client, going) == [requests[0]]


def test_what_a_worker_finishes_of_a_moved_request_is_not_the_new_run(bus: Bus) -> None:
    client, going, other, (request,) = two_workers(bus, 1000)
    (assign,) = [r for r in bus.core.requests.values() if r.id == request]
    end_in(going, 10.0)
    pass_time(bus, 0.5, going, other)
    assert moved(client, going) == [request]
    client.resume(request, tokens=7)
    (again,) = other.assigned()
    assert assign.phase.value == "forgotten"
    assert bus.core.requests[request].worker_name == "other"
    other.finish(again, tokens=1000)
    assert came_to(client)[-1] == "OUTPUT"


def test_a_drain_is_an_end_too(bus: Bus) -> None:
    client, going, _, (long, short) = two_workers(bus, 1000, 40)
    client.query("bus.drain", worker="going", deadline_ms=8000)
    going.receive()
    bus.wait(0.5)
    assert moved(client, going) == [long]
    assert bus.core.requests[short].worker_name == "going"


def test_the_metrics_say_when_a_worker_ends_and_how_many_streams_moved(bus: Bus) -> None:
    client, going, other, _ = two_workers(bus, 1000)
    end_in(going, 10.0)
    pass_time(bus, 0.5, going, other)
    text = client_metrics(client)
    assert 'tokenbus_worker_ends_seconds{worker="going"} 9.5' in text
    assert 'tokenbus_worker_ends_seconds{worker="other"}' not in text
    assert "tokenbus_moves_total 1" in text


def client_metrics(client: ClientPeer) -> str:
    client.receive()
    return str(client.query("bus.metrics")["text"])
