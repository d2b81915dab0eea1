"""The normal course of a request through the broker core; cancel, window, credit and routes."""

from __future__ import annotations

import pytest

from broker.core import pace
from broker.core.events import Tick
from broker.core.instructions import Instruction, Send
from broker.protocol import codec, header
from broker.protocol.header import MessageType
from broker.protocol.messages import (
    Accepted,
    Credit,
    EndEvent,
    Finished,
    FinishReason,
    Ledger,
    TokensEvent,
    WorkerState,
)
from tests.core.broker_facts import Bus, Message, a_request, types


def test_a_request_is_accepted_assigned_streamed_and_ended() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    (assign,) = worker.assigned()
    assert assign.id == request_id
    assert assign.frames[2] == codec.encode(a_request()), "the client's body travels unchanged"
    accepted = client.only(MessageType.ACCEPTED)
    told = Accepted(worker="worker", route=assign.assign.reply_to)
    assert codec.convert(accepted.plain, Accepted) == told
    worker.tokens(assign, 0)
    worker.tokens(assign, 1)
    worker.finish(assign, tokens=2)
    events = client.events()
    assert [type(event) for event in events] == [TokensEvent, TokensEvent, EndEvent]
    assert client.query("bus.stats")["running"] == 0


def test_messages_leave_in_order_before_the_rest_of_their_event_is_worked_out() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    running: list[tuple[MessageType, int]] = []

    def carry_out(instruction: Instruction) -> None:
        if isinstance(instruction, Send):
            type_ = header.decode(instruction.frames[0]).type
            running.append((type_, len(bus.core.workers[worker.routing_id].running)))
            bus.mail.setdefault((instruction.side, instruction.routing_id), []).append(
                Message(instruction.frames)
            )

    bus.core.instruct = carry_out
    client.request()
    (assign,) = worker.assigned()
    worker.finish(assign, tokens=0)
    assert running == [
        (MessageType.ASSIGN, 1),
        (MessageType.ACCEPTED, 1),
        (MessageType.OUTPUT, 1),  # the ledger that came with it has not been read yet
    ]
    assert not bus.core.workers[worker.routing_id].running
    assert bus.core.handle(Tick(), bus.now_s) == [], "nothing is carried out twice"


def test_assign_leaves_before_its_accounts_are_written() -> None:
    bus = Bus()
    bus.worker()
    client = bus.client()
    assigned: list[int] = []

    def carry_out(instruction: Instruction) -> None:
        is_send = isinstance(instruction, Send)
        if is_send and header.decode(instruction.frames[0]).type is MessageType.ASSIGN:
            assigned.append(bus.core.counters["assigned"])

    bus.core.instruct = carry_out
    client.request()
    assert assigned == [0]
    assert bus.core.counters["assigned"] == 1


def test_where_one_worker_serves_the_model_nothing_is_reckoned_to_choose_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bus = Bus(placement="fastest_finish")
    worker, client = bus.worker(slots=8), bus.client()
    for tokens in range(1, 9):
        client.request()
        worker.finish(worker.assigned()[-1], tokens=tokens)
    monkeypatch.setattr(pace, "needs_s", None)
    for _ in range(8):
        client.request()
    assert len(worker.assigned()) == 8


def test_attachments_travel_unchanged() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    body = codec.encode(a_request(attachments=[{}, {}], prompt="<image><image>"))
    client.send(MessageType.REQUEST, bus.new_id(), body, b"first", b"\x00second")
    (assign,) = worker.assigned()
    assert assign.frames[3:] == (b"first", b"\x00second")


def test_the_body_is_dropped_when_it_is_assigned() -> None:
    bus = Bus()
    client = bus.client()
    bus.worker(grant=False)
    request_id = client.request()
    assert bus.core.requests[request_id].frames
    bus.worker("second")
    assert bus.core.requests[request_id].frames == ()
    assert bus.core.queued_bytes == 0


def test_a_request_that_waits_is_told_its_position() -> None:
    bus = Bus()
    bus.worker(grant=False)
    client = bus.client()
    for expected in range(3):
        client.request()
        assert client.only(MessageType.ACCEPTED).plain.get("position", 0) == expected


def test_output_without_a_ledger_takes_the_fast_path() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.request()
    (assign,) = worker.assigned()
    head = header.encode(MessageType.OUTPUT, assign.assign.reply_to, worker.sequence)
    way = bus.core.forward(worker.routing_id, head, bus.now_s)
    assert way is not None
    assert way[0] == client.routing_id
    sealed = header.decode(way[1])
    assert (sealed.type, sealed.id) == (MessageType.OUTPUT, assign.assign.reply_to)


@pytest.mark.parametrize("fault", ["other worker", "sequence", "long header", "ledger"])
def test_the_fast_path_refuses(fault: str) -> None:
    bus = Bus()
    worker, other, client = bus.worker(slots=2), bus.worker("other", grant=False), bus.client()
    client.request()
    (assign,) = worker.assigned()
    flags = 1 if fault == "ledger" else 0
    sequence = worker.sequence + (fault == "sequence")
    head = header.encode(MessageType.OUTPUT, assign.assign.reply_to, sequence, flags)
    if fault == "long header":
        head = head[:24] + b"\x00" + head[24:]
    sender = other if fault == "other worker" else worker
    assert bus.core.forward(sender.routing_id, head, bus.now_s) is None


def test_one_route_serves_all_requests_of_one_client_at_one_worker() -> None:
    bus = Bus()
    worker, client, other = bus.worker(slots=3), bus.client(), bus.client("other")
    client.request()
    client.request()
    other.request()
    first, second, third = (message.assign.reply_to for message in worker.assigned())
    assert first == second != third


def test_a_stale_worker_cannot_send_on_the_route_of_another() -> None:
    bus = Bus()
    worker, other, client = bus.worker(), bus.worker("other", grant=False), bus.client()
    client.request()
    (assign,) = worker.assigned()
    client.receive()
    other.tokens(assign)
    assert client.events() == []
    assert other.known, "its message was in order, only nobody's"


# --- credit ---------------------------------------------------------------------------------------


def test_a_worker_gets_no_more_than_it_granted() -> None:
    bus = Bus()
    worker, client = bus.worker(slots=2), bus.client()
    ids = [client.request() for _ in range(5)]
    assert worker.assigned_ids() == ids[:2]
    worker.grant(1)
    assert worker.assigned_ids() == ids[2:3]


def test_a_repeated_or_late_grant_does_no_harm() -> None:
    bus = Bus()
    worker, client = bus.worker(slots=2), bus.client()
    for granted in (2, 1, 2, 0):
        worker.send(MessageType.CREDIT, worker.id, Credit(granted=granted))
    for _ in range(4):
        client.request()
    assert len(worker.assigned()) == 2


def test_a_heartbeat_never_makes_a_worker_ready() -> None:
    bus = Bus()
    worker, client = bus.worker(grant=False), bus.client()
    client.request()
    for _ in range(3):
        worker.beat(state=WorkerState.READY)
    assert worker.assigned() == []


def test_a_ledger_frees_the_slot_for_the_next_request() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.request()
    second = client.request()
    (assign,) = worker.assigned()
    worker.finish(assign)
    assert worker.assigned_ids() == [second]


def test_a_heartbeat_and_a_reject_carry_credit_too() -> None:
    bus = Bus()
    worker, client = bus.worker(grant=False), bus.client()
    first, second = client.request(), client.request()
    worker.granted = 1
    worker.beat(granted=1)
    (assign,) = worker.assigned()
    assert assign.id == first
    worker.reject(assign)
    assert worker.assigned_ids() == [second]


def test_two_workers_share_the_load_evenly() -> None:
    bus = Bus()
    workers = [bus.worker(name, slots=4) for name in ("a", "b")]
    client = bus.client()
    for _ in range(8):
        client.request()
    assert [len(worker.assigned()) for worker in workers] == [4, 4]


def test_models_that_share_a_worker_take_turns() -> None:
    bus = Bus()
    worker, client = bus.worker(models=("a", "b"), grant=False), bus.client()
    for model in ("a", "a", "a", "b", "b", "b"):
        client.request(model)
    served = []
    for _ in range(6):
        worker.grant(1)
        (assign,) = worker.assigned()
        served.append(codec.unpack(assign.frames[2], 1 << 20)["model"])
    assert served in (["a", "b"] * 3, ["b", "a"] * 3)


# --- window ---------------------------------------------------------------------------------------


def test_window_goes_to_the_worker_once_and_only_upwards() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request(window=100)
    worker.receive()
    for limit in (200, 150, 200, 300):
        client.send(MessageType.WINDOW, request_id, {"limit": limit})
    told = [message.body.limit for message in worker.receive()]
    assert told == [200, 300]


def test_a_window_that_moved_in_the_queue_follows_assign() -> None:
    bus = Bus()
    client, worker = bus.client(), bus.worker(grant=False)
    request_id = client.request(window=100)
    client.send(MessageType.WINDOW, request_id, {"limit": 500})
    worker.grant()
    came = worker.receive()
    assert types(came) == ["ASSIGN", "WINDOW"]
    assert came[1].body.limit == 500


def test_a_window_after_the_slot_was_freed_still_reaches_the_worker() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request(window=10)
    (assign,) = worker.assigned()
    worker.output(assign.assign.reply_to, ledger=Ledger(2, [Finished(request_id, "stop", 1, 50)]))
    client.send(MessageType.WINDOW, request_id, {"limit": 60})
    assert worker.only(MessageType.WINDOW).body.limit == 60


def test_a_foreign_window_is_ignored() -> None:
    bus = Bus()
    worker, client, other = bus.worker(), bus.client(), bus.client("other")
    request_id = client.request(window=10)
    worker.receive()
    other.send(MessageType.WINDOW, request_id, {"limit": 60})
    assert worker.receive() == []


# --- cancel ---------------------------------------------------------------------------------------


def the_end(message: Message) -> EndEvent:
    (event,) = message.events
    assert isinstance(event, EndEvent)
    return event


def test_cancel_of_a_queued_request_is_answered_by_the_broker() -> None:
    bus = Bus()
    bus.worker(grant=False)
    client = bus.client()
    request_id = client.request()
    client.receive()
    client.cancel(request_id)
    end = the_end(client.only(MessageType.OUTPUT))
    assert (end.request_id, end.finish_reason) == (request_id, FinishReason.CANCELLED)
    assert bus.core.queues == {}


def test_cancel_of_a_running_request_goes_to_the_worker_and_its_end_comes_back() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    (assign,) = worker.assigned()
    client.receive()
    client.cancel(request_id)
    assert worker.only(MessageType.CANCEL).id == request_id
    worker.finish(assign, outcome="cancelled")
    assert the_end(client.only(MessageType.OUTPUT)).finish_reason is FinishReason.CANCELLED


def test_a_cancel_that_crosses_the_end_is_not_answered() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    (assign,) = worker.assigned()
    worker.finish(assign, tokens=2)
    client.cancel(request_id)
    assert [event.finish_reason for event in client.events()] == [FinishReason.STOP]
    assert worker.receive() == []


def test_cancel_of_a_request_whose_end_waits_for_the_window_goes_to_the_worker() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request(window=10)
    (assign,) = worker.assigned()
    worker.output(assign.assign.reply_to, ledger=Ledger(2, [Finished(request_id, "stop", 1, 50)]))
    client.cancel(request_id)
    assert worker.only(MessageType.CANCEL).id == request_id


def test_cancel_of_an_unknown_request_ends_it_with_offset_zero() -> None:
    bus = Bus()
    client = bus.client()
    request_id = bus.new_id()
    client.cancel(request_id)
    client.cancel(request_id)
    ends = client.events()
    assert [(end.request_id, end.offset) for end in ends] == [(request_id, 0)] * 2


def test_a_client_that_says_goodbye_cancels_everything_it_has() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    running, _queued = client.request(), client.request()
    (assign,) = worker.assigned()
    client.goodbye()
    assert worker.only(MessageType.CANCEL).id == running
    assert bus.core.queues == {}
    worker.finish(assign, outcome="cancelled")
    assert worker.receive() == [], "the queued one is gone too"


# --- duplicates -----------------------------------------------------------------------------------


def test_the_same_request_twice_on_one_session_is_ignored() -> None:
    bus = Bus()
    worker, client = bus.worker(slots=2), bus.client()
    request_id = client.request()
    client.request(request_id=request_id)
    assert len(worker.assigned()) == 1
    assert types(client.receive()) == ["ACCEPTED"]


def test_the_same_id_after_the_end_is_refused_and_not_ignored() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    (assign,) = worker.assigned()
    worker.finish(assign)
    client.receive()
    client.request(request_id=request_id)
    assert client.failure() == "duplicate_request"
    assert worker.assigned() == []


def test_the_same_id_while_the_end_waits_for_the_window_is_ignored() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request(window=1)
    (assign,) = worker.assigned()
    worker.finish(assign, tokens=5)
    client.receive()
    client.request(request_id=request_id, window=1)
    assert client.receive() == []


def test_a_request_id_of_another_session_is_refused_and_the_error_says_how_to_attach() -> None:
    bus = Bus()
    bus.worker()
    client, other = bus.client(), bus.client("other")
    request_id = client.request()
    other.request(request_id=request_id)
    (event,) = other.events()
    assert event.error.code == "duplicate_request"
    assert "RESUME" in event.error.message


def test_reject_that_is_not_retryable_fails_the_request() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.request()
    (assign,) = worker.assigned()
    client.receive()
    worker.reject(assign, "context_overflow", retryable=False)
    assert client.failure() == "context_overflow"
    assert bus.core.requests == {}


def test_reject_that_is_retryable_interrupts_the_request() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.request()
    (assign,) = worker.assigned()
    client.receive()
    worker.reject(assign)
    interrupted = client.only(MessageType.INTERRUPTED).body
    assert (interrupted.worker, interrupted.lost) == ("worker", False)
