"""Which request is served next, which fails while waiting, which is refused, and where it is
placed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from broker.core.admission import read_request
from broker.core.events import PeerUnreachable, Side
from broker.core.settings import CoreSettings
from broker.protocol import codec
from broker.protocol.errors import RequestError
from broker.protocol.header import MessageType
from broker.protocol.messages import Finished, Ledger, WorkerState
from tests.core.broker_facts import Bus, ClientPeer, a_request


def serve_all(bus: Bus, ids: dict[bytes, str]) -> list[str]:
    """Grant slots one by one; returns the names in the order of service."""
    worker = bus.worker("serves", grant=False)
    order = []
    for _ in ids:
        worker.grant()
        order += [ids[request_id] for request_id in worker.assigned_ids()]
    return order


# --- order ----------------------------------------------------------------------------------------


def test_higher_priority_goes_first_and_within_it_age() -> None:
    bus = Bus()
    client = bus.client()
    ids = {
        client.request(priority=priority): name
        for name, priority in [("a", 0), ("b", -5), ("c", 7), ("d", 0), ("e", 7)]
    }
    assert serve_all(bus, ids) == ["c", "e", "a", "d", "b"]


def test_clients_take_turns_however_much_one_of_them_sends() -> None:
    bus = Bus()
    greedy, modest = bus.client(), bus.client()
    ids = {greedy.request(): f"g{number}" for number in range(5)}
    ids |= {modest.request(): f"m{number}" for number in range(2)}
    assert serve_all(bus, ids) == ["g0", "m0", "g1", "m1", "g2", "g3", "g4"]


def test_users_of_one_gateway_take_turns() -> None:
    bus = Bus()
    gateway = bus.client()
    ids = {gateway.request(user=name[0]): name for name in ("a0", "a1", "a2", "b0", "c0")}
    assert serve_all(bus, ids) == ["a0", "b0", "c0", "a1", "a2"]


def test_a_client_with_a_thousand_requests_delays_anothers_first_by_one() -> None:
    bus = Bus(client_heartbeat_s=600)
    greedy, modest = bus.client(), bus.client()
    for _ in range(1000):
        greedy.request()
    greedy.receive()
    request_id = modest.request()
    assert modest.only(MessageType.ACCEPTED).plain["position"] == 1
    worker = bus.worker(grant=False)
    worker.grant(2)
    assert request_id in worker.assigned_ids()


# --- deadlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["queue_ms", "ttl_ms"])
def test_a_request_that_waited_too_long_fails_with_the_true_cause(limit: str) -> None:
    bus = Bus()
    bus.worker(grant=False)
    client = bus.client()
    client.request(**{limit: 1500})
    client.receive()
    bus.wait(1.4)
    assert client.receive() == []
    bus.wait(0.2)
    assert client.failure() == "deadline_exceeded"
    assert bus.core.queues == {}


def test_the_broker_s_own_limit_holds_where_the_request_names_none() -> None:
    bus = Bus(queue_s=3.0)
    bus.worker(grant=False)
    client = bus.client()
    client.request()
    bus.wait(3.1)
    assert "deadline_exceeded" in [event.error.code for event in client.events()]


def test_the_remaining_time_to_live_travels_with_the_request() -> None:
    bus = Bus()
    worker, client = bus.worker(grant=False), bus.client()
    client.request(ttl_ms=4000)
    bus.wait(1.0)
    worker.grant()
    assert worker.assigned()[0].assign.ttl_ms == 3000


def test_a_request_without_time_to_live_fails_at_once() -> None:
    bus = Bus()
    bus.worker()
    client = bus.client()
    client.request(ttl_ms=0)
    assert client.failure() == "deadline_exceeded"


# --- models ---------------------------------------------------------------------------------------


def test_an_unknown_model_fails_at_once_and_the_error_lists_the_models() -> None:
    bus = Bus()
    bus.worker(models=("demo", "other"))
    client = bus.client()
    client.request("dmeo")
    (event,) = client.events()
    assert (event.error.code, event.error.retryable) == ("model_unavailable", False)
    assert "demo, other" in event.error.message


def test_on_an_empty_bus_a_request_waits_for_the_first_worker() -> None:
    bus = Bus(model_grace_s=10)
    client = bus.client()
    request_id = client.request()
    bus.wait(9)
    worker = bus.worker()
    assert worker.assigned_ids() == [request_id]


def test_on_an_empty_bus_a_request_waits_only_for_the_grace() -> None:
    bus = Bus(model_grace_s=10)
    client = bus.client()
    client.request()
    client.receive()
    bus.wait(10.1)
    assert client.failure() == "model_unavailable"


def test_a_request_waits_for_a_model_that_is_loading() -> None:
    bus = Bus(model_grace_s=1, worker_liveness=100)
    worker, client = bus.worker(grant=False), bus.client()
    worker.beat(state=WorkerState.LOADING)
    request_id = client.request()
    bus.wait(5)
    worker.beat(state=WorkerState.READY)
    worker.grant()
    assert worker.assigned_ids() == [request_id]


def test_after_a_models_last_worker_left_requests_wait_for_the_grace_and_then_fail() -> None:
    bus = Bus(model_grace_s=5)
    worker, client = bus.worker(), bus.client()
    bus.worker("other", models=("other",))
    bus.handle(PeerUnreachable(Side.BACK, worker.routing_id))
    client.request()
    assert [m.type for m in client.receive()] == [MessageType.ACCEPTED]
    bus.wait(5.1)
    (event,) = client.events()
    assert (event.error.code, event.error.retryable) == ("model_unavailable", True)


def test_a_resume_is_always_given_the_grace() -> None:
    """After a broker's restart, a client may be back before its worker."""
    bus = Bus(model_grace_s=5)
    bus.worker("other", models=("other",))
    client = bus.client()
    client.resume(bus.new_id())
    assert [m.type for m in client.receive()] == [MessageType.ACCEPTED]


# --- limits ---------------------------------------------------------------------------------------


def test_a_client_has_a_bounded_number_in_flight() -> None:
    bus = Bus(inflight=2)
    worker, client = bus.worker(), bus.client()
    client.request(), client.request()
    client.receive()
    client.request()
    (event,) = client.events()
    assert (event.error.code, event.error.retryable) == ("quota", True)
    assert event.error.retry_after_ms is not None
    worker.finish(worker.assigned()[0])
    client.receive()
    client.request()
    assert [m.type for m in client.receive()] == [MessageType.ACCEPTED]


def test_a_full_queue_refuses_and_says_when_to_come_back_from_the_times_seen() -> None:
    bus = Bus(queue_requests=3)
    worker, client = bus.worker(), bus.client()
    client.request()
    (assign,) = worker.assigned()
    bus.wait(2.0)
    worker.finish(assign)
    for _ in range(4):
        client.request()
    client.receive()
    client.request()
    (event,) = client.events()
    assert (event.error.code, event.error.retryable) == ("overloaded", True)
    assert event.error.retry_after_ms == 8000, "four turns of two seconds at one slot"


def test_a_client_that_fills_the_queue_makes_room_for_others() -> None:
    bus = Bus(queue_requests=4)
    bus.worker(grant=False)
    greedy, modest = bus.client(), bus.client()
    ids = [greedy.request() for _ in range(4)]
    greedy.receive()
    modest.request()
    assert [m.type for m in modest.receive()] == [MessageType.ACCEPTED]
    (event,) = greedy.events()
    assert (event.request_id, event.error.code) == (ids[-1], "overloaded")


def test_a_lower_priority_makes_room_for_a_higher_one_but_not_the_reverse() -> None:
    bus = Bus(queue_requests=1)
    bus.worker(grant=False)
    low, high = bus.client(), bus.client()
    low.request(priority=-1)
    low.receive()
    high.request(priority=1)
    assert low.failure() == "overloaded"
    high.receive()
    low.request(priority=-1)
    assert low.failure() == "overloaded"


def test_the_queue_is_bounded_in_bytes() -> None:
    bus = Bus(queue_bytes=3000)
    bus.worker(grant=False)
    client = bus.client()
    client.request(prompt="x" * 2000)
    client.receive()
    client.request(prompt="x" * 2000)
    assert client.failure() == "overloaded"


# --- bodies ---------------------------------------------------------------------------------------

NESTED: Any = {}
for _ in range(40):
    NESTED = {"deeper": NESTED}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"prompt": "x"}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "prompt": "x"}, "exactly one"),
        ({"kind": "complete"}, "prompt"),
        ({"kind": "embed", "prompt": "x"}, "inputs"),
        ({"kind": "detokenize", "prompt": "x"}, "token_ids"),
        ({"kind": "juggle", "prompt": "x"}, "kind"),
        ({"kind": "complete", "prompt": "x", "priority": 101}, "priority"),
        ({"kind": "complete", "prompt": "x", "window": 0}, "window"),
        ({"kind": "complete", "prompt": "x", "params": {"top_p": 0}}, "top_p"),
        ({"kind": "complete", "prompt": "x", "resume": {"epoch": 1}}, "RESUME"),
        ({"kind": "complete", "prompt": "x", "attachments": [{}]}, "1 attachments"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "attachment": 0}]}]},
            "attachment 0",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [NESTED]}, "tools"),
        ({"kind": "complete", "prompt": "x", "template_args": NESTED}, "template_args"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [NESTED]}]},
            "messages[0].tool_calls",
        ),
    ],
)
def test_the_error_for_a_wrong_body_names_the_field(body: dict[str, Any], word: str) -> None:
    data = codec.pack({"model": "demo", "window": 10} | body)
    with pytest.raises(RequestError) as caught:
        read_request(data, (), resumed=False, settings=CoreSettings())
    assert caught.value.info.code == "invalid_request"
    assert word in caught.value.info.message


@pytest.mark.parametrize(
    ("limits", "attachments"),
    [
        ({"request_bytes": 1024}, ()),
        ({"attachments": 1}, (b"a", b"b")),
        ({"attachment_bytes": 10}, (b"a" * 11,)),
        ({"attachments_bytes": 10}, (b"a" * 6, b"b" * 6)),
    ],
)
def test_the_error_for_a_request_that_is_too_large_names_both_sizes(
    limits: dict[str, int], attachments: tuple[bytes, ...]
) -> None:
    data = codec.encode(a_request(prompt="x" * 2000, attachments=[{} for _ in attachments]))
    with pytest.raises(RequestError) as caught:
        read_request(data, attachments, resumed=False, settings=CoreSettings(**limits))
    assert caught.value.info.code == "too_large"
    assert caught.value.info.details["limit"] == next(iter(limits.values()))


# --- placement ------------------------------------------------------------------------------------


def placed(bus: Bus, client: ClientPeer, count: int, **body: Any) -> Counter[str]:
    """How many of `count` requests go to each worker, if each ends before the next begins."""
    seen: Counter[str] = Counter()
    for _ in range(count):
        request_id = client.request(**body)
        request = bus.core.requests[request_id]
        assert request.worker is not None
        seen[request.worker.name] += 1
        worker = request.worker
        peer = next(p for p in WORKERS[bus] if p.routing_id == worker.routing_id)
        peer.granted += 1
        ledger = Ledger(peer.granted, [Finished(request_id, "stop")])
        peer.output(bus.new_id(), ledger=ledger)
    return seen


WORKERS: dict[Bus, list[Any]] = {}


def bus_with(placement: str, **speeds: float) -> tuple[Bus, ClientPeer]:
    bus = Bus(placement=placement)
    WORKERS[bus] = [bus.worker(name, slots=4, speed=speed) for name, speed in speeds.items()]
    return bus, bus.client()


def test_least_loaded_takes_the_least_recently_used_of_equals() -> None:
    bus, client = bus_with("least_loaded", a=1, b=1, c=1)
    assert placed(bus, client, 9) == {"a": 3, "b": 3, "c": 3}


def test_shortest_queue_divides_by_speed() -> None:
    bus, client = bus_with("shortest_queue", slow=1, fast=3)
    for _ in range(4):
        client.request()
    assert {w.name: len(w.running) for w in bus.core.workers.values()} == {"slow": 1, "fast": 3}


def test_lottery_draws_by_speed() -> None:
    bus, client = bus_with("lottery", slow=1, fast=9)
    seen = placed(bus, client, 400)
    assert 0.85 < seen["fast"] / 400 < 0.95


def test_affinity_keeps_a_prefix_at_one_worker_while_it_has_credit() -> None:
    bus, client = bus_with("affinity", a=1, b=1, c=1)
    homes = set()
    for topic in range(12):
        turns = [{"role": "user", "content": f"topic {topic}"}]
        first = placed(bus, client, 3, messages=turns)
        turns += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "more"}]
        assert placed(bus, client, 1, messages=turns).keys() == first.keys()
        assert len(first) == 1
        homes |= first.keys()
    assert homes == {"a", "b", "c"}, "different prefixes are spread"
    turns = [{"role": "user", "content": "hot"}]
    for _ in range(12):
        client.request(messages=turns)
    assert [len(worker.running) for worker in bus.core.workers.values()] == [4, 4, 4]


def test_the_same_seed_places_the_same_way() -> None:
    outcomes = []
    for _ in range(2):
        bus, client = bus_with("lottery", a=1, b=1)
        outcomes.append(placed(bus, client, 20))
    assert outcomes[0] == outcomes[1]


# --- queries --------------------------------------------------------------------------------------


def test_an_unknown_verb_names_the_known_ones() -> None:
    error = Bus().client().query("bus.dance")
    assert error["code"] == "invalid_request"
    assert "bus.models" in error["message"]


def test_the_latest_requests_are_listed_without_their_ids() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    done, waits = client.request(), client.request()
    worker.finish(worker.assigned()[0])
    worker.receive()
    listed = client.query("bus.requests", limit=10)
    assert {entry["id"] for entry in listed} == {done.hex()[:8], waits.hex()[:8]}
    assert {entry["outcome"] for entry in listed} == {"stop", ""}
    assert client.query("bus.requests", limit=1) == [listed[0]]


def test_a_refused_request_that_is_resumed_does_not_bypass_the_full_queue() -> None:
    """Found by the simulation: clients send it again as a RESUME, which was always accepted."""
    bus = Bus(queue_requests=1)
    bus.worker()
    client = bus.client()
    client.request(), client.request()
    refused = client.request()
    assert client.failure() == "overloaded"
    client.resume(refused)
    assert client.failure() == "overloaded"
    client.resume(refused, epoch=2, tokens=3)
    assert client.events() == [], "a stream that was let in before is"
