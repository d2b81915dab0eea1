"""The worker's core: credit, and brokers that share one pool of slots. No sockets."""

from __future__ import annotations

from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.messages import FailEvent
from tests.core.worker_world import (
    World,
    request_id,
    resume,
    serving,
)
from worker.core import events

# --- credit ---------------------------------------------------------------------------------------


def test_credit_is_cumulative_and_returns_on_every_path() -> None:
    world = serving(capacity=4)
    (broker,) = world.brokers
    for number in range(1, 5):
        broker.assign(number, ttl_ms=1000 if number == 4 else None)
    assert broker.free == 0
    world.end(1)
    world.fail(2)
    broker.cancel(3)
    world.obey_cancels()
    assert broker.free == 3
    world.advance(1.1)  # request 4 is past its time to live
    assert broker.free == 3, "its slot is free when the engine has let it go"
    world.obey_cancels()
    assert (broker.free, broker.granted) == (4, 8)


def test_an_assignment_beyond_the_grant_is_rejected_and_counts_stay_consistent() -> None:
    world = serving(capacity=1)
    (broker,) = world.brokers
    broker.assign(1)
    broker.assign(2)
    (reject,) = broker.came(MessageType.REJECT)
    assert (reject.error.code, reject.error.retryable) == ("overloaded", True)
    assert broker.free == 0
    world.end(1)
    assert broker.free == 1


def test_an_assignment_to_a_loading_worker_is_rejected_and_does_not_change_its_grant() -> None:
    world = World(capacity=2)
    world.tell(events.Tick())
    (broker,) = world.brokers
    broker.connect()
    broker.assign(1)
    assert broker.came(MessageType.REJECT)[0].error.retryable
    world.ready()
    assert broker.free == 2


def test_a_request_for_an_unserved_model_is_rejected_and_its_credit_returned() -> None:
    world = serving(capacity=1)
    (broker,) = world.brokers
    broker.assign(1, model="other")
    (reject,) = broker.came(MessageType.REJECT)
    assert (reject.error.code, reject.granted, broker.free) == ("model_unavailable", 2, 1)


def test_a_malformed_request_fails_alone_and_its_credit_returns() -> None:
    world = serving(capacity=1)
    (broker,) = world.brokers
    broker.assign(1, request=codec.pack({"model": "demo", "window": 0}))
    end = broker.answer(1).end
    assert isinstance(end, FailEvent)
    assert end.error.code == "invalid_request"
    assert "window" in end.error.message
    assert broker.free == 1
    broker.assign(2, request=codec.pack({"model": "demo", "window": 1}), attachments=(b"x",))
    end = broker.answer(2).end
    assert isinstance(end, FailEvent)
    assert "describes 0 attachments, but 1 came" in end.error.message
    assert (broker.free, world.jobs) == (1, {})


def test_held_requests_count_against_the_grant_of_a_new_session() -> None:
    world = serving(capacity=3)
    (broker,) = world.brokers
    broker.assign(1)
    broker.assign(2)
    broker.lose()
    world.advance(1.0)
    broker.connect()
    assert broker.free == 1
    world.end(1)
    assert broker.free == 2


# --- several brokers ------------------------------------------------------------------------------


def test_several_brokers_share_one_pool_of_slots() -> None:
    world = World(brokers=2, capacity=5)
    world.tell(events.Tick())
    for broker in world.brokers:
        broker.connect()
    world.ready()
    one, two = world.brokers
    assert (one.free, two.free) == (3, 2)
    for number in range(1, 4):
        one.assign(number)
    world.end(1)
    assert (one.free, two.free) == (1, 2), "a freed slot goes to the broker with the least credit"


def test_the_credit_of_a_lost_broker_goes_to_the_others() -> None:
    world = serving(brokers=2, capacity=4)
    one, two = world.brokers
    one.assign(1)
    one.lose()
    assert two.free == 3
    world.end(1)
    assert two.free == 4


def test_an_idle_brokers_spare_credit_goes_to_a_broker_with_waiting_requests() -> None:
    world = serving(brokers=2, capacity=2)
    one, two = world.brokers
    assert one.came(MessageType.HELLO)[0].brokers == 2
    assert (one.free, two.free) == (1, 1)
    two.beat(waiting=2)
    assert one.came(MessageType.CREDIT)[-1].recalled == 1
    two.beat(waiting=2)
    assert one.came(MessageType.CREDIT)[-1].recalled == 1, "it is asked once"
    assert two.free == 1, "what the first broker may still spend is not granted twice"
    one.give_back(1)
    assert (one.free, two.free) == (0, 2)


def test_credit_spent_in_the_meantime_stays_and_can_be_recalled_again() -> None:
    world = serving(brokers=2, capacity=1)
    one, two = world.brokers
    two.beat(waiting=1)
    one.assign(1)  # crosses the recall
    one.give_back(0, answers=1)
    assert (one.free, two.free) == (0, 0)
    world.end(1)
    assert (one.free, two.free) == (0, 1), "the freed slot goes where a request waits"
    two.assign(2)
    world.end(2)
    assert two.free == 1, "and stays with the one that used it"
    one.beat(waiting=1)
    assert two.came(MessageType.CREDIT)[-1].recalled == 1


def test_two_brokers_with_more_requests_than_credit_are_served_in_turn() -> None:
    world = serving(brokers=2, capacity=1)
    one, two = world.brokers
    turns = []
    for number in range(1, 7):
        one.beat(waiting=9)
        two.beat(waiting=9)
        taker = one if one.free else two
        turns.append(taker.index)
        taker.assign(number)
        world.end(number)
    assert turns == [0, 1, 0, 1, 0, 1]


def test_no_credit_is_recalled_while_nothing_waits() -> None:
    world = serving(brokers=2, capacity=1)
    one, two = world.brokers
    world.advance(60.0)
    for broker in (one, two):
        assert len(broker.came(MessageType.HELLO)) == 1
        assert all(credit.recalled == 0 for credit in broker.came(MessageType.CREDIT))


def test_returning_more_credit_than_granted_is_a_protocol_error() -> None:
    world = serving(brokers=2, capacity=2)
    one, two = world.brokers
    two.beat(waiting=2)
    one.give_back(2, answers=1)
    assert one.came(MessageType.GOODBYE)[0].reason == "protocol_error"


def test_a_stream_moves_from_one_broker_to_another() -> None:
    world = serving(brokers=2, capacity=4)
    one, two = world.brokers
    one.assign(1)
    world.generate(1, 0, 1)
    two.answer(1).token_ids, two.answer(1).text = [0], "0 "
    two.assign(1, resume=resume(1, [0], 2))
    assert one.finished == [(request_id(1), "cancelled")]
    world.generate(1, 2)
    one.cancel(1)
    assert world.cancels == [], "the first broker has no say in it any more"
    world.end(1)
    assert two.answer(1).text == "0 1 2 "
    assert one.free + two.free == 4


def test_a_cancel_of_a_request_that_moved_away_or_is_gone_is_answered() -> None:
    """Found by the simulation: the broker counted the request as running forever."""
    world = serving(brokers=2, capacity=4)
    one, two = world.brokers
    one.assign(1)
    two.assign(1, resume=resume(1, [], 0))
    one.finished.clear()
    one.cancel(1)
    one.cancel(2)
    assert one.finished == [(request_id(1), "cancelled"), (request_id(2), "cancelled")]
    assert world.cancels == []


def test_a_failed_run_that_another_broker_restarted_is_over_for_the_first() -> None:
    """Found by the simulation: the failure waited for the window of a client that had moved on."""
    world = serving(brokers=2, capacity=4)
    one, two = world.brokers
    one.assign(1, window=1)
    world.generate(1, 0, 1)
    world.fail(1, retryable=True)
    assert one.finished == []
    two.assign(1, resume=resume(1, [0], 2))
    assert one.finished == [(request_id(1), "cancelled")]
    assert request_id(1) in world.jobs
