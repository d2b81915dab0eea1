"""RESUME in every state, orphans, workers that come back, drains, and the broker's shutdown."""

from __future__ import annotations

import pytest

from broker.core.events import PeerUnreachable, ShutdownForced, ShutdownRequested, Side
from broker.core.instructions import StopLoop
from broker.protocol import codec
from broker.protocol.header import NO_ID, MessageType
from broker.protocol.messages import FailEvent, Finished, Held, Ledger, TokensEvent
from tests.core.broker_facts import Bus, ClientPeer, WorkerPeer, types


def vanish(peer: ClientPeer | WorkerPeer) -> None:
    """The connection breaks without GOODBYE."""
    peer.bus.handle(PeerUnreachable(peer.side, peer.routing_id))


# --- RESUME ---------------------------------------------------------------------------------------


def test_resume_of_a_running_request_attaches_to_its_worker_without_credit() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    first = worker.assigned()[0].assign
    vanish(client)
    again = bus.client()
    again.resume(request_id, tokens=3)
    (assign,) = worker.assigned()
    assert (assign.assign.attach, assign.assign.epoch) == (True, 1)
    assert assign.assign.reply_to != first.reply_to
    assert bus.core.workers[worker.routing_id].assigned == 1
    assert types(again.receive()) == ["ACCEPTED"]
    worker.tokens(assign, 3)
    worker.finish(assign, tokens=4)
    assert len(again.events()) == 2


def test_output_of_a_request_resumed_on_a_new_session_never_goes_to_the_old_one() -> None:
    """The old connection is half-open: the client is back on a new one, and the broker has both."""
    bus = Bus()
    worker, old = bus.worker(slots=2), bus.client()
    moved, other = old.request(), old.request()
    moved_assign, other_assign = worker.assigned()
    old.receive()
    new = bus.client()
    new.resume(moved)
    (fail,) = old.events()
    assert isinstance(fail, FailEvent)
    assert (fail.request_id, fail.error.code) == (moved, "duplicate_request")
    # Both requests travel in one message, sent before the worker saw the ASSIGN.
    worker.output(
        moved_assign.assign.reply_to,
        TokensEvent(moved, 0, 0, [1], "a"),
        TokensEvent(other, 0, 0, [1], "b"),
    )
    assert [event.request_id for event in old.events()] == [other]
    (attach,) = worker.assigned()
    worker.finish(attach)
    assert [event.request_id for event in new.events()] == [moved]
    worker.tokens(other_assign, 1)
    assert len(old.events()) == 1
    assert bus.core.fast_routes.keys() == {route.key for route in bus.core.routes.values()}


def test_resume_on_the_same_session_is_a_new_epoch_of_the_same_route() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    (first,) = worker.assigned()
    client.resume(request_id, tokens=1)
    (second,) = worker.assigned()
    assert second.assign.reply_to == first.assign.reply_to
    assert second.assign.epoch == 1


def test_resume_of_a_queued_request_replaces_it_and_keeps_its_age() -> None:
    bus = Bus()
    worker, client = bus.worker(grant=False), bus.client()
    first = client.request(user="u")
    second = client.request(user="u")
    client.resume(first, user="u", prompt="again")
    client.receive()
    worker.grant(2)
    assigned = worker.assigned()
    assert [message.id for message in assigned] == [first, second]
    assert codec.unpack(assigned[0].frames[2], 1 << 20)["prompt"] == "again"
    assert not assigned[0].assign.attach


def test_resume_of_a_queued_request_whose_client_vanished_keeps_its_age() -> None:
    bus = Bus()
    worker, client = bus.worker(grant=False), bus.client()
    first = client.request(user="u")
    bus.client("other").request(user="u")
    vanish(client)
    assert bus.core.queues["demo"].requests == 1, "not worth a slot while nobody listens"
    again = bus.client()
    again.resume(first, user="u")
    worker.grant()
    assert worker.assigned_ids() == [first]


def test_resume_of_an_ended_request_attaches_for_a_replay() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    worker.finish(worker.assigned()[0], tokens=5)
    vanish(client)
    again = bus.client()
    again.resume(request_id, tokens=2)
    (assign,) = worker.assigned()
    assert assign.assign.attach
    worker.finish(assign, tokens=5, grant=False)
    assert len(again.events()) == 1
    assert again.query("bus.clients")[0]["inflight"] == 0


def test_resume_of_a_request_ended_too_long_ago_is_queued_as_new() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    worker.finish(worker.assigned()[0])
    for _ in range(61):
        bus.wait(1.0)
        worker.beat(), client.beat()
    client.resume(request_id)
    assert not worker.assigned()[0].assign.attach


def test_a_client_that_leaves_a_broken_session_may_resume_its_streams() -> None:
    """Found by the simulation: its requests were cancelled as if it had been closed."""
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    worker.receive()
    client.goodbye("protocol_error")
    assert worker.receive() == []
    again = bus.client()
    again.resume(request_id)
    assert worker.assigned()[0].assign.attach


def test_a_replay_that_is_rejected_late_is_still_interrupted() -> None:
    """Found by the simulation: the broker forgot the request between ASSIGN and REJECT."""
    bus = Bus(ended_keep_s=3)
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    worker.finish(worker.assigned()[0])
    bus.wait(2.9)
    client.resume(request_id)
    (assign,) = worker.assigned()
    bus.wait(0.2)
    client.receive()
    worker.reject(assign)
    assert client.only(MessageType.INTERRUPTED).id == request_id


def test_a_held_request_that_ended_while_being_attached_is_open_until_its_end_arrives() -> None:
    """Found by the simulation: the worker's report that it had ended crossed the ASSIGN."""
    bus = Bus()
    client = bus.client()
    request_id = bus.new_id()
    client.resume(request_id)
    worker = bus.worker(holds=(Held(request_id, 0, 7),))
    (assign,) = [m for m in worker.first if m.type is MessageType.ASSIGN]
    client.receive()
    worker.output(NO_ID, ledger=Ledger(worker.granted, [Finished(request_id, "stop", 1, 7)]))
    assert request_id in bus.core.clients[client.routing_id].requests
    worker.finish(assign, grant=False)
    assert bus.core.clients[client.routing_id].requests == {}


def test_a_replay_is_open_until_its_end_has_been_sent_again() -> None:
    """Found by the simulation: the worker was cut off just after ASSIGN, and lost much later."""
    bus = Bus(ended_keep_s=3)
    worker, client = bus.worker(), bus.client()
    request_id = client.request(window=10)
    worker.finish(worker.assigned()[0])
    client.resume(request_id, window=10)
    worker.assigned()
    client.receive()
    bus.wait(4)
    worker.beat()
    client.send(MessageType.WINDOW, request_id, {"limit": 20})
    assert worker.only(MessageType.WINDOW).body.limit == 20
    bus.wait(5.1)
    interrupted = client.only(MessageType.INTERRUPTED)
    assert (interrupted.id, interrupted.body.lost) == (request_id, False)


def test_an_end_held_back_is_remembered_as_long_as_the_client_reads() -> None:
    bus = Bus(ended_keep_s=3)
    worker, client = bus.worker(), bus.client()
    request_id = client.request(window=10)
    (assign,) = worker.assigned()
    worker.output(assign.assign.reply_to, ledger=Ledger(2, [Finished(request_id, "stop", 1, 99)]))
    for limit in range(20, 90, 10):
        bus.wait(2.5)
        worker.beat(), client.beat()
        client.send(MessageType.WINDOW, request_id, {"limit": limit})
        assert worker.only(MessageType.WINDOW).body.limit == limit
    client.goodbye()
    bus.wait(4)
    assert bus.core.requests == {}


def test_ended_requests_are_bounded_in_number() -> None:
    bus = Bus(ended_keep=3)
    worker, client = bus.worker(), bus.client()
    for _ in range(10):
        client.request()
        worker.finish(worker.assigned()[0])
    assert len(bus.core.requests) == 3
    assert len(bus.core.workers[worker.routing_id].ended) == 3


def test_an_interrupted_request_is_resumed_at_another_worker() -> None:
    bus = Bus()
    dies, client = bus.worker("dies"), bus.client()
    request_id = client.request()
    lives = bus.worker("lives")
    vanish(dies)
    assert client.receive()[-1].body.worker == "dies"
    client.resume(request_id, tokens=2, lost=("dies",))
    (assign,) = lives.assigned()
    assert (assign.id, assign.assign.attach, assign.assign.epoch) == (request_id, False, 1)


def test_an_interrupted_request_keeps_its_age() -> None:
    bus = Bus()
    dies, client = bus.worker("dies"), bus.client()
    first = client.request(user="u")
    second = client.request(user="u")
    vanish(dies)
    client.resume(first, user="u", lost=("dies",))
    lives = bus.worker("lives", slots=2)
    assert lives.assigned_ids() == [first, second]


def test_lost_workers_are_avoided_while_another_serves_the_model() -> None:
    bus = Bus()
    bad, other, client = bus.worker("bad"), bus.worker("other", grant=False), bus.client()
    request_id = client.request(request_id=bus.new_id())
    bad.finish(bad.assigned()[0])
    request_id = bus.new_id()
    client.resume(request_id, lost=("bad",))
    assert bad.assigned() == []
    client.request(user="next")
    assert len(bad.assigned()) == 1, "a request that may go there does not wait"
    other.grant()
    assert other.assigned_ids() == [request_id]


def test_a_lost_worker_is_used_again_if_it_is_the_only_one() -> None:
    bus = Bus()
    worker, client = bus.worker("only"), bus.client()
    client.resume(bus.new_id(), lost=("only",))
    assert len(worker.assigned()) == 1


def test_a_stale_resume_from_another_session_does_not_steal_the_stream() -> None:
    bus = Bus()
    worker, new = bus.worker(), bus.client("new")
    old = bus.client("old")
    request_id = new.request()
    new.resume(request_id, epoch=3)
    worker.receive()
    old.resume(request_id, epoch=2)
    assert old.failure() == "duplicate_request"
    assert worker.receive() == []


def test_a_broken_resume_fails_with_its_own_epoch() -> None:
    bus = Bus()
    client = bus.client()
    body = codec.encode({"model": "demo", "resume": {"epoch": 5, "token_ids": [1, 2]}})
    client.send(MessageType.RESUME, bus.new_id(), body)
    (fail,) = client.events()
    assert (fail.error.code, fail.epoch, fail.offset) == ("invalid_request", 5, 2)


def test_a_worker_that_rejects_an_attach_gets_the_resume_as_new_work() -> None:
    bus = Bus()
    worker, client = bus.worker(slots=2), bus.client()
    request_id = client.request()
    worker.receive()
    client.resume(request_id, epoch=1)
    worker.reject(worker.assigned()[0])
    assert client.receive()[-1].type is MessageType.INTERRUPTED
    client.resume(request_id, epoch=2)
    assert not worker.assigned()[0].assign.attach


def test_a_worker_that_dies_with_an_end_held_back_interrupts_the_request() -> None:
    """Its slot was free, but the client's window did not allow the rest."""
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request(window=10)
    (assign,) = worker.assigned()
    client.receive()
    worker.output(assign.assign.reply_to, ledger=Ledger(2, [Finished(request_id, "stop", 1, 50)]))
    vanish(worker)
    assert [m.id for m in client.receive() if m.type is MessageType.INTERRUPTED] == [request_id]


# --- orphans --------------------------------------------------------------------------------------


def test_an_orphan_is_cancelled_at_the_worker_after_its_grace() -> None:
    bus = Bus(orphan_grace_s=3)
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    (assign,) = worker.assigned()
    vanish(client)
    bus.wait(2.9)
    assert worker.receive() == []
    bus.wait(0.2)
    assert worker.only(MessageType.CANCEL).id == request_id
    worker.finish(assign, outcome="cancelled")
    assert bus.core.workers[worker.routing_id].running == {}


def test_an_orphan_that_is_resumed_in_time_goes_on() -> None:
    bus = Bus(orphan_grace_s=3)
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    vanish(client)
    bus.client().resume(request_id)
    worker.receive()
    bus.wait(4)
    assert MessageType.CANCEL not in {message.type for message in worker.receive()}


def test_a_client_that_comes_back_may_cancel_what_it_left() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    worker.receive()
    vanish(client)
    again = bus.client()
    again.cancel(request_id)
    assert worker.only(MessageType.CANCEL).id == request_id
    assert [event.request_id for event in again.events()] == [request_id]


# --- workers that come back -----------------------------------------------------------------------


def test_after_a_broker_restart_a_request_named_in_hello_can_be_attached() -> None:
    bus = Bus()
    request_id = bus.new_id()
    worker = bus.worker(slots=1, holds=(Held(request_id, 0, 12),), grant=False)
    client = bus.client()
    client.resume(request_id, tokens=12)
    (assign,) = worker.assigned()
    assert assign.assign.attach
    worker.finish(assign, tokens=14)
    assert len(client.events()) == 1


def test_a_resume_that_came_before_its_worker_attaches_when_the_worker_comes() -> None:
    bus = Bus()
    client = bus.client()
    request_id = bus.new_id()
    client.resume(request_id, tokens=3)
    worker = bus.worker(slots=1, holds=(Held(request_id, 0, 5),), grant=False)
    (assign,) = [m for m in worker.first if m.type is MessageType.ASSIGN]
    assert assign.assign.attach
    assert bus.core.queues == {}


def test_a_worker_back_on_a_new_connection_ends_its_old_session() -> None:
    bus = Bus()
    old, client = bus.worker("w"), bus.client()
    request_id = client.request()
    client.receive()
    new = bus.worker("w", holds=(Held(request_id, 0, 1),), grant=False)
    assert not old.known
    assert not client.only(MessageType.INTERRUPTED).body.lost
    client.resume(request_id, tokens=1)
    assert new.assigned()[0].assign.attach


def test_a_worker_that_missed_a_resume_is_told_to_stop() -> None:
    bus = Bus()
    sleeper, client = bus.worker("sleeper"), bus.client()
    request_id = client.request()
    vanish(sleeper)
    other = bus.worker("other")
    client.resume(request_id, lost=("sleeper",))
    assert other.assigned_ids() == [request_id]
    back = bus.worker("sleeper", holds=(Held(request_id, 0, 9),), grant=False)
    assert [m.type for m in back.first if m.id == request_id] == [MessageType.CANCEL]


def test_a_held_request_that_nobody_resumes_is_cancelled() -> None:
    bus = Bus(orphan_grace_s=3)
    request_id = bus.new_id()
    worker = bus.worker(holds=(Held(request_id, 0, 9), Held(request_id, 0, 9)), grant=False)
    bus.wait(3.5)
    assert worker.only(MessageType.CANCEL).id == request_id


# --- drains ---------------------------------------------------------------------------------------


def test_an_operator_drains_a_worker_and_it_gets_nothing_more() -> None:
    bus = Bus()
    worker, client = bus.worker(slots=2), bus.client()
    client.request()
    (assign,) = worker.assigned()
    client.query("bus.drain", worker="worker", deadline_ms=5000, reason="new weights")
    drain = worker.only(MessageType.DRAIN).plain
    assert drain == {"reason": "new weights", "deadline_ms": 5000}
    client.request()
    worker.finish(assign)
    worker.grant(1)
    assert worker.assigned() == [], "whatever it granted"
    assert client.query("bus.workers")[0]["state"] == "draining"


def test_a_drain_at_once_is_told_as_such() -> None:
    bus = Bus()
    worker = bus.worker()
    bus.client().query("bus.drain", worker="worker", deadline_ms=0)
    assert worker.only(MessageType.DRAIN).plain["deadline_ms"] == 0


def test_a_drained_worker_that_does_not_leave_is_dropped_and_its_requests_interrupted() -> None:
    bus = Bus(worker_liveness=100)
    worker, client = bus.worker(), bus.client()
    client.request()
    client.query("bus.drain", worker="worker", deadline_ms=1000)
    bus.wait(6.5)
    interrupted = [m.body for m in client.receive() if m.type is MessageType.INTERRUPTED]
    assert [(body.lost, body.error.code) for body in interrupted] == [(False, "draining")]
    assert not worker.known


def test_a_worker_that_announces_a_drain_gets_nothing_more() -> None:
    bus = Bus()
    worker, client = bus.worker(slots=3), bus.client()
    worker.send(MessageType.DRAIN, worker.id, {"reason": "SIGTERM", "deadline_ms": 1000})
    client.request()
    assert worker.assigned() == []


def test_the_error_for_draining_an_unknown_worker_lists_the_known_ones() -> None:
    bus = Bus()
    bus.worker("here")
    error = bus.client().query("bus.drain", worker="there")
    assert error["code"] == "invalid_request"
    assert "here" in error["message"]


def test_a_held_worker_gets_nothing_stays_and_is_released() -> None:
    bus = Bus()
    worker, client = bus.worker(slots=2), bus.client()
    client.request()
    (assign,) = worker.assigned()
    assert client.query("bus.hold", worker="worker") == {"worker": "worker", "state": "held"}
    assert client.query("bus.workers")[0]["state"] == "held"
    waiting = client.request()
    worker.finish(assign)
    assert worker.assigned() == [], "whatever it granted"
    assert worker.known
    client.query("bus.release", worker="worker")
    assert worker.assigned_ids() == [waiting]
    assert client.query("bus.workers")[0]["state"] == "ready"


def test_a_worker_is_held_by_name_even_after_it_comes_back() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.query("bus.hold", worker="worker")
    worker.goodbye()
    again = bus.worker()
    waiting = client.request()
    assert again.assigned() == []
    client.query("bus.release", worker="worker")
    assert again.assigned_ids() == [waiting]


def test_a_worker_that_leaves_cannot_be_released_and_an_unknown_one_is_named() -> None:
    bus = Bus()
    bus.worker()
    client = bus.client()
    client.query("bus.drain", worker="worker", deadline_ms=5000)
    assert "is leaving" in client.query("bus.release", worker="worker")["message"]
    for verb in ("bus.hold", "bus.release"):
        assert "no worker 'nobody'" in client.query(verb, worker="nobody")["message"]


# --- the broker's own end -------------------------------------------------------------------------


def test_a_stopping_broker_takes_nothing_new_and_lets_streams_end() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.request()
    (assign,) = worker.assigned()
    client.receive()
    bus.handle(ShutdownRequested(10.0))
    assert client.only(MessageType.DRAIN).plain["deadline_ms"] == 10_000
    client.request()
    assert client.failure() == "draining"
    assert bus.client("late").first[0].body.error.code == "draining"
    assert StopLoop() not in bus.others
    worker.finish(assign)
    assert types(client.receive()) == ["OUTPUT", "GOODBYE"]
    assert worker.only(MessageType.GOODBYE).body.reason == "shutdown"
    assert bus.others == [StopLoop()]


def test_at_the_end_of_the_grace_remaining_requests_are_interrupted_for_the_next_broker() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    running, queued = client.request(), client.request()
    client.receive()
    bus.handle(ShutdownRequested(2.0))
    bus.wait(2.1)
    came = client.receive()
    interrupted = {m.id: m.body.lost for m in came if m.type is MessageType.INTERRUPTED}
    assert interrupted == {running: False, queued: False}
    assert MessageType.CANCEL not in {m.type for m in worker.receive()}, "the worker goes on"
    assert StopLoop() in bus.others


def test_a_second_signal_forces() -> None:
    bus = Bus()
    bus.worker()
    client = bus.client()
    client.request()
    bus.handle(ShutdownRequested(60.0))
    bus.handle(ShutdownForced())
    assert StopLoop() in bus.others


def test_an_idle_broker_stops_at_once() -> None:
    bus = Bus()
    bus.client(), bus.worker()
    bus.handle(ShutdownRequested(60.0))
    assert StopLoop() in bus.others


def test_the_operator_s_shutdown_is_answered_first() -> None:
    bus = Bus()
    client = bus.client()
    assert client.query("bus.shutdown") == {}
    bus.wait(0.1)
    assert StopLoop() in bus.others


@pytest.mark.parametrize("side", list(Side))
def test_an_unreachable_stranger_causes_nothing(side: Side) -> None:
    bus = Bus()
    bus.handle(PeerUnreachable(side, b"nobody"))
    assert bus.logs == []
