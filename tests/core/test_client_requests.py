"""The client's requests in virtual time: their order, errors, time limits, and queries."""

from __future__ import annotations

import pytest

from broker.peer.connection import State
from broker.protocol import messages
from broker.protocol.errors import ErrorInfo
from broker.protocol.messages import EndEvent, FinishReason
from client import errors
from client.core import events
from client.options import Retry, Timeout
from tests.core.client_wire import SESSION, T, Wire, check_resume, failed, gone, over, rid, toks

# --- requests -------------------------------------------------------------------------------------


def test_events_reach_the_caller_in_order_and_once(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.output(toks(id_, 3, "de"), over(id_, 5, text="!"))
    kinds = [type(item).__name__ for item in wire.got[id_]]
    assert kinds == ["Queued", "Started", "TokensEvent", "TokensEvent", "End"]
    assert wire.text(id_) == "abcde!"
    assert wire.last(id_).worker == "w1"
    assert wire.session.open_requests == 0
    assert not wire.take_sent(), "an ended request is not cancelled"


def test_a_repeated_event_is_dropped(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.output(toks(id_, 1, "bc"), toks(id_, 3, "d"), over(id_, 4))
    assert wire.text(id_) == "abcd"


def test_events_of_unknown_requests_and_other_epochs_are_dropped(
    running: tuple[Wire, bytes],
) -> None:
    wire, id_ = running
    wire.message(T.INTERRUPTED, id_, gone())
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w2"))
    wire.take_sent()
    wire.output(toks(rid(99), 0, "x"), toks(id_, 3, "x", epoch=0), toks(id_, 3, "d", epoch=1))
    assert wire.text(id_) == "abcd"
    assert not wire.take_sent(), "they are late, not forged"


def test_requests_beyond_the_brokers_limit_wait_here_in_order(wire: Wire) -> None:
    ids = [wire.ask(n) for n in range(5)]
    wire.connect()
    assert [i for _, i, _ in wire.take_sent(T.REQUEST)] == ids[:3]
    wire.output(over(ids[1], 0))
    assert [i for _, i, _ in wire.take_sent(T.REQUEST)] == [ids[3]]


def test_a_dropped_request_counts_until_the_bus_confirms_it(wire: Wire) -> None:
    ids = [wire.ask(n) for n in range(4)]
    wire.connect()
    wire.take_sent()
    wire.tell(events.RequestDropped(ids[0]))
    assert [(t, i) for t, i, _ in wire.take_sent()] == [(T.CANCEL, ids[0])]
    wire.output(
        EndEvent(*(ids[0], 0, 0, FinishReason.CANCELLED, "", messages.Usage(), messages.Timings()))
    )
    assert [(t, i) for t, i, _ in wire.take_sent()] == [(T.REQUEST, ids[3])]


def test_a_request_dropped_before_it_was_sent_is_never_sent(wire: Wire) -> None:
    id_ = wire.ask()
    wire.tell(events.RequestDropped(id_))
    wire.connect()
    assert [t for t, _, _ in wire.take_sent()] == [T.HELLO]


def test_a_cancel_survives_a_lost_session(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.tell(events.SocketLost("cut"))
    wire.tell(events.RequestDropped(id_))
    wire.reopen()
    assert [(t, i) for t, i, _ in wire.take_sent(T.CANCEL, T.RESUME)] == [(T.CANCEL, id_)]


def test_a_cancel_that_nobody_confirms_is_forgotten(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.tell(events.RequestDropped(id_))
    wire.tell(events.SocketLost("cut"))
    wire.at(100)
    wire.opened.clear()
    wire.at(1000)
    assert not wire.opened, "nothing is open, so nobody needs a broker"


def test_reading_raises_the_window(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.tell(events.TokensTaken(id_, 3))
    wire.tell(events.TokensTaken(id_, 2))
    assert [(t, i, b.limit) for t, i, b in wire.take_sent()] == [(T.WINDOW, id_, 103)]


def test_a_request_that_is_too_large_for_the_broker_is_not_sent(wire: Wire) -> None:
    wire.ask(1, user="x")
    wire.connect()
    wire.take_sent()
    too_much = {
        2: wire.ask(2, attachments=(b"x" * 1001,)),
        3: wire.ask(3, attachments=(b"x" * 800, b"x" * 800)),
        4: wire.ask(4, attachments=(b"x",) * 5),
        5: wire.ask(5, trace={"t": "x" * 10_000}),
    }
    for id_ in too_much.values():
        assert isinstance(wire.last(id_), errors.TooLarge)
    assert not wire.take_sent()


def test_the_only_model_is_found_once_for_all_requests_without_one(wire: Wire) -> None:
    ids = [wire.ask(n, model="") for n in (1, 2)]
    wire.connect()
    ((_, query_id, query),) = wire.take_sent(T.QUERY, T.REQUEST)
    assert query.verb == "bus.models"
    wire.message(T.ANSWER, query_id, messages.Answer(result=[{"name": "demo"}]))
    assert [(i, b.model) for _, i, b in wire.take_sent(T.REQUEST)] == [(i, "demo") for i in ids]


def test_without_a_model_name_several_models_are_an_error_that_lists_them(wire: Wire) -> None:
    id_ = wire.ask(model="")
    wire.connect()
    ((_, query_id, _),) = wire.take_sent(T.QUERY)
    wire.message(T.ANSWER, query_id, messages.Answer(result=[{"name": "b"}, {"name": "a"}]))
    assert isinstance(wire.last(id_), errors.InvalidRequest)
    assert "a, b" in str(wire.last(id_))


def test_without_a_model_name_a_bus_without_models_is_asked_again(wire: Wire) -> None:
    id_ = wire.ask(model="", retry=Retry(attempts=1))
    wire.connect()
    ((_, query_id, _),) = wire.take_sent(T.QUERY)
    wire.message(T.ANSWER, query_id, messages.Answer(result=[]))
    wire.at(1)
    ((_, query_id, _),) = wire.take_sent(T.QUERY)
    wire.message(T.ANSWER, query_id, messages.Answer(result=[]))
    assert isinstance(wire.last(id_), errors.ModelUnavailable)
    assert "python -m worker" in str(wire.last(id_))


# --- errors and retries ---------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "cls"), errors.CLASS_OF_CODE.items())
def test_every_code_is_raised_as_its_own_class(
    running: tuple[Wire, bytes], code: str, cls: type[errors.BusError]
) -> None:
    wire, id_ = running
    wire.output(failed(id_, code, details={"n": 1}, retry_after_ms=5))
    error = wire.last(id_)
    assert type(error) is cls
    assert error.code == code and error.details == {"n": 1} and error.retry_after_ms == 5
    assert (error.worker, error.partial, error.retryable) == ("w1", True, False)
    assert wire.session.open_requests == 0
    assert not wire.take_sent()


def test_an_unknown_error_code_is_a_bus_error(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.output(failed(id_, "invented_tomorrow"))
    assert type(wire.last(id_)) is errors.BusError
    assert wire.last(id_).code == "invented_tomorrow"


def test_a_request_to_an_overloaded_bus_is_retried_after_the_time_that_it_names(wire: Wire) -> None:
    id_ = wire.ask()
    wire.connect()
    wire.take_sent()
    wire.output(failed(id_, "overloaded", retryable=True, retry_after_ms=3000))
    wire.at(2.9)
    assert not wire.take_sent(T.RESUME)
    wire.at(0.2)
    check_resume(wire, id_, 1, text="")


def test_an_overloaded_bus_is_an_error_after_all_attempts(wire: Wire) -> None:
    id_ = wire.ask(retry=Retry(attempts=3))
    wire.connect()
    for epoch in range(4):
        wire.output(failed(id_, "overloaded", epoch, retryable=True))
        wire.at(2)
    assert isinstance(wire.last(id_), errors.Overloaded)
    assert len(wire.take_sent(T.REQUEST, T.RESUME)) == 4


def test_an_error_code_outside_the_retry_policy_is_not_retried(wire: Wire) -> None:
    id_ = wire.ask(retry=Retry(codes=frozenset({"draining"})))
    wire.connect()
    wire.output(failed(id_, "overloaded", retryable=True))
    assert isinstance(wire.last(id_), errors.Overloaded)


def test_a_cancel_by_someone_else_is_an_error_and_not_a_short_answer(
    running: tuple[Wire, bytes],
) -> None:
    wire, id_ = running
    wire.output(
        EndEvent(id_, 0, 3, FinishReason.CANCELLED, "", messages.Usage(), messages.Timings())
    )
    assert isinstance(wire.last(id_), errors.Cancelled)


# --- time limits ----------------------------------------------------------------------------------


def alive(wire: Wire, seconds: float) -> None:
    """Let time pass with a live broker."""
    while seconds > 0:
        wire.at(min(1.0, seconds))
        seconds -= 1.0
        if wire.session.link is State.OPEN:
            wire.message(T.HEARTBEAT, SESSION, messages.Heartbeat())


def test_the_queue_limit_counts_until_a_worker_takes_it(wire: Wire) -> None:
    first, second = (wire.ask(n, timeout=Timeout(queue=20)) for n in (1, 2))
    wire.connect()
    wire.message(T.ACCEPTED, first, messages.Accepted(worker="w1"))
    wire.message(T.ACCEPTED, second, messages.Accepted(position=4))
    wire.take_sent()
    alive(wire, 19.5)
    assert not wire.final.get(second)
    alive(wire, 1)
    assert isinstance(wire.last(second), errors.QueueTimeout)
    assert "number 4" in str(wire.last(second))
    assert [i for _, i, _ in wire.take_sent(T.CANCEL)] == [second]
    assert not wire.final.get(first)


def test_the_first_token_limit_counts_from_the_worker(wire: Wire) -> None:
    id_ = wire.ask(timeout=Timeout(first_token=10))
    wire.connect()
    alive(wire, 30)
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w1"))
    alive(wire, 9.5)
    assert not wire.final.get(id_)
    alive(wire, 1)
    assert isinstance(wire.last(id_), errors.FirstTokenTimeout)
    assert wire.take_sent(T.CANCEL)


def test_the_limit_between_tokens_counts_from_the_last(wire: Wire) -> None:
    id_ = wire.ask(timeout=Timeout(first_token=100, between_tokens=5))
    wire.connect()
    for offset in range(10):
        wire.output(toks(id_, offset, "x"))
        alive(wire, 4)
    assert not wire.final.get(id_)
    alive(wire, 2)
    assert isinstance(wire.last(id_), errors.TokenTimeout)
    assert wire.last(id_).partial


def test_a_full_window_is_not_the_workers_fault(wire: Wire) -> None:
    id_ = wire.ask(timeout=Timeout(between_tokens=5), window=3)
    wire.connect()
    wire.output(toks(id_, 0, "abc"))
    alive(wire, 50)
    assert not wire.final.get(id_)
    wire.tell(events.TokensTaken(id_, 3))
    alive(wire, 4)
    assert not wire.final.get(id_)
    alive(wire, 2)
    assert isinstance(wire.last(id_), errors.TokenTimeout)


def test_the_total_limit_counts_everything_and_travels_with_the_request(wire: Wire) -> None:
    id_ = wire.ask(timeout=Timeout(total=10))
    wire.at(2)
    wire.connect()
    ((_, _, body),) = wire.take_sent(T.REQUEST)
    assert body.ttl_ms == 9000, "eight are left, and one of grace: ours is the exact exception"
    for offset in range(7):
        wire.output(toks(id_, offset, "x"))
        alive(wire, 1)
    assert not wire.final.get(id_)
    alive(wire, 2)
    assert isinstance(wire.last(id_), errors.TotalTimeout)


def test_resuming_does_not_renew_the_total_limit(running: tuple[Wire, bytes]) -> None:
    wire = Wire()
    id_ = wire.ask(timeout=Timeout(total=10))
    wire.connect()
    alive(wire, 6)
    wire.take_sent()
    wire.message(T.INTERRUPTED, id_, gone())
    wire.at(1)
    ((_, _, body),) = wire.take_sent(T.RESUME)
    assert 4000 <= body.ttl_ms <= 5000
    alive(wire, 5)
    assert isinstance(wire.last(id_), errors.TotalTimeout)


# --- queries --------------------------------------------------------------------------------------


def ask_bus(wire: Wire, verb: str, **timeout: float) -> bytes:
    wire.tell(events.QueryMade(rid(77), verb, {}, Timeout(**timeout)))
    return rid(77)


def test_a_query_is_answered(wire: Wire) -> None:
    id_ = ask_bus(wire, "bus.stats")
    wire.connect()
    assert [(i, b.verb) for _, i, b in wire.take_sent(T.QUERY)] == [(id_, "bus.stats")]
    wire.message(T.ANSWER, id_, messages.Answer(result={"x": 1}))
    assert wire.last(id_) == events.Answered({"x": 1})


def test_a_query_that_fails_raises(wire: Wire) -> None:
    id_ = ask_bus(wire, "bus.drain")
    wire.connect()
    error = ErrorInfo(code="forbidden", message="operators only")
    wire.message(T.ANSWER, id_, messages.Answer(error=error))
    assert isinstance(wire.last(id_), errors.Forbidden)


def test_a_read_only_query_survives_a_lost_session_and_a_command_does_not(wire: Wire) -> None:
    id_ = ask_bus(wire, "bus.models")
    wire.tell(events.QueryMade(rid(78), "bus.shutdown", {}, Timeout()))
    wire.connect()
    wire.take_sent()
    wire.tell(events.SocketLost("cut"))
    assert isinstance(wire.last(rid(78)), errors.ConnectionLost)
    wire.opened.clear()
    wire.at(1)
    wire.connect()
    assert [i for _, i, _ in wire.take_sent(T.QUERY)] == [id_]


def test_an_unanswered_query_ends_at_its_limit(wire: Wire) -> None:
    id_ = ask_bus(wire, "bus.stats", total=7)
    wire.connect()
    alive(wire, 6.5)
    assert id_ not in wire.final
    alive(wire, 1)
    assert isinstance(wire.last(id_), errors.DeadlineExceeded)


def test_a_query_without_a_broker_ends_at_the_connect_limit(wire: Wire) -> None:
    id_ = ask_bus(wire, "bus.stats", connect=2)
    wire.at(2.1)
    assert isinstance(wire.last(id_), errors.ConnectTimeout)
