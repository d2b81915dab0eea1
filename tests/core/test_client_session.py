"""The client's session in virtual time: events in, instructions out (SPEC.md sections 5 and 6)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import pairwise

import pytest

from broker.peer.connection import State
from broker.protocol import codec, header, messages
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import NO_ID
from broker.protocol.messages import EndEvent, FinishReason, OutputEvent, TokensEvent
from client import errors
from client.core import events
from client.core.events import End
from client.options import Retry, Timeout
from tests.core.client_wire import SESSION, T, Wire, failed, gone, over, rid, toks


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def running(wire: Wire) -> Iterator[tuple[Wire, bytes]]:
    """A request that worker w1 runs and of which "abc" has arrived."""
    id_ = wire.ask()
    wire.connect()
    wire.message(T.ACCEPTED, id_, messages.Accepted(position=2))
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w1"))
    wire.output(toks(id_, 0, "abc"))
    wire.take_sent()
    yield wire, id_


# --- sessions -------------------------------------------------------------------------------------


def test_nothing_is_opened_before_the_first_request(wire: Wire) -> None:
    wire.at(1000)
    assert not wire.opened
    assert wire.session.deadline_s() == math.inf


def test_hello_goes_first_and_the_request_after_welcome(wire: Wire) -> None:
    id_ = wire.ask()
    wire.tell(events.SocketOpened())
    assert [(t, i) for t, i, _ in wire.take_sent()] == [(T.HELLO, NO_ID)]
    wire.welcome()
    (request,) = wire.take_sent()
    assert request[:2] == (T.REQUEST, id_)
    assert request[2].window == 100, "the broker's default window"
    assert request[2].resume is None


def test_a_heartbeat_goes_out_after_a_silent_interval_and_not_while_sending(wire: Wire) -> None:
    wire.ask()
    wire.connect()
    wire.take_sent()
    wire.at(4.9)
    assert not wire.take_sent()
    wire.at(0.2)
    assert [(t, i) for t, i, _ in wire.take_sent()] == [(T.HEARTBEAT, SESSION)]


def test_a_silent_broker_is_lost_after_interval_times_liveness(wire: Wire) -> None:
    wire.ask()
    wire.connect()
    wire.at(14.9)
    assert wire.session.link is State.OPEN
    wire.at(0.2)
    assert wire.closed == 1
    assert wire.session.link is not State.OPEN


def test_any_message_counts_as_life(wire: Wire) -> None:
    wire.ask(timeout=Timeout(first_token=None))
    wire.connect()
    for _ in range(10):
        wire.at(10)
        wire.message(T.HEARTBEAT, SESSION, messages.Heartbeat())
    assert wire.closed == 0


def test_a_process_that_was_stopped_does_not_blame_the_broker(wire: Wire) -> None:
    wire.ask()
    wire.connect()
    wire.now_s += 3600  # SIGSTOP; no tick in between
    wire.tell(events.Tick())
    assert wire.session.link is State.OPEN
    assert [t for t, _, _ in wire.take_sent(T.HEARTBEAT)] == [T.HEARTBEAT]


def test_the_back_off_grows_up_to_a_ceiling(wire: Wire) -> None:
    wire.ask(timeout=Timeout(connect=None))
    began_s = wire.now_s
    for _ in range(60):
        lost_s = wire.now_s
        wire.tell(events.SocketLost("connection refused"))
        wire.next_socket()
        assert wire.now_s - lost_s <= min(10, max(0.5, (lost_s - began_s) / 4))
    assert wire.now_s - began_s > 60


def test_the_next_of_several_brokers_is_tried_at_once_and_each_round_ends_with_a_pause() -> None:
    wire = Wire("tcp://a:1", "tcp://b:1", "tcp://c:1")
    wire.ask()
    start_s = wire.now_s
    for _ in range(2):
        wire.tell(events.SocketLost("refused"))
        wire.tell(events.Tick())
    assert (wire.opened, wire.now_s) == (["tcp://a:1", "tcp://b:1", "tcp://c:1"], start_s)
    wire.tell(events.SocketLost("refused"))
    wire.tell(events.Tick())
    assert len(wire.opened) == 3
    wire.at(1)
    assert wire.opened[3] == "tcp://a:1"


def test_a_stream_moves_to_the_next_broker_when_its_own_dies() -> None:
    wire = Wire("tcp://a:1", "tcp://b:1")
    id_ = wire.ask()
    wire.connect()
    wire.output(toks(id_, 0, "abc"))
    wire.take_sent()
    wire.tell(events.SocketLost("disconnected"))
    wire.tell(events.Tick())
    assert wire.opened == ["tcp://a:1", "tcp://b:1"]
    wire.connect()
    ((_, _, resume),) = wire.take_sent(T.RESUME)
    assert resume.resume.token_ids == [97, 98, 99]


@pytest.mark.parametrize(
    "frames",
    [
        (b"nonsense", b""),
        (header.encode(T.HEARTBEAT, SESSION, 7), codec.encode(messages.Heartbeat())),
        (header.encode(T.OUTPUT, SESSION, 1), b"\xc1"),
        (header.encode(T.ASSIGN, SESSION, 1), b"\x80"),
        (header.encode(T.OUTPUT, SESSION, 1),),
        (header.encode(T.OUTPUT, SESSION, 1), b"\x90", b""),
    ],
    ids=["garbage", "skipped sequence", "bad body", "not for a client", "no body", "more frames"],
)
def test_a_broker_that_breaks_the_protocol_is_left_and_the_stream_resumed_elsewhere(
    running: tuple[Wire, bytes], frames: tuple[bytes, ...]
) -> None:
    wire, id_ = running
    wire.message(T.HEARTBEAT, SESSION, messages.Heartbeat())
    wire._in = 1
    wire.tell(events.MessageReceived(frames))
    assert [(t, b.reason) for t, _, b in wire.take_sent()] == [(T.GOODBYE, "protocol_error")]
    assert wire.closed == 1
    wire.reopen()
    assert [i for _, i, _ in wire.take_sent(T.RESUME)] == [id_]


def test_after_a_refusal_that_is_not_fatal_the_client_tries_again(wire: Wire) -> None:
    wire.ask(timeout=Timeout(connect=100))
    wire.tell(events.SocketOpened())
    error = ErrorInfo(code="overloaded", message="full", retry_after_ms=7000)
    wire.message(T.REFUSE, NO_ID, messages.Refuse(error=error))
    wire.opened.clear()
    wire.at(6.9)
    assert not wire.opened
    wire.at(3.7)
    assert wire.opened


def test_after_a_fatal_refusal_no_socket_is_opened_again(wire: Wire) -> None:
    id_ = wire.ask()
    wire.tell(events.SocketOpened())
    error = ErrorInfo(code="unauthenticated", message="no")
    wire.message(T.REFUSE, NO_ID, messages.Refuse(error=error, fatal=True))
    assert isinstance(wire.last(id_), errors.Unauthenticated)
    wire.opened.clear()
    assert isinstance(wire.last(wire.ask(2)), errors.Unauthenticated)
    wire.at(1000)
    assert not wire.opened


def test_after_a_fatal_refusal_by_one_broker_the_others_are_tried() -> None:
    wire = Wire("tcp://a:1", "tcp://b:1")
    wire.ask()
    wire.tell(events.SocketLost("no key", unauthenticated=True))
    wire.tell(events.Tick())
    assert wire.opened == ["tcp://a:1", "tcp://b:1"]
    wire.tell(events.SocketLost("refused"))
    wire.at(5)
    assert set(wire.opened[2:]) == {"tcp://b:1"}


def test_no_broker_within_the_connect_limit_is_an_error_that_says_what_to_do(wire: Wire) -> None:
    id_ = wire.ask(timeout=Timeout(connect=3))
    wire.tell(events.SocketLost("connection refused"))
    wire.at(2.9)
    assert id_ not in wire.got
    wire.at(0.2)
    error = wire.last(id_)
    assert isinstance(error, errors.ConnectTimeout)
    assert "python -m broker" in str(error) and "connection refused" in str(error)


def test_a_peer_that_never_answers_counts_as_no_broker(wire: Wire) -> None:
    wire.ask(timeout=Timeout(connect=60))
    wire.tell(events.SocketOpened())
    wire.at(5)
    assert wire.closed == 1


def test_closing_ends_everything_and_says_goodbye(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.tell(events.CloseRequested())
    assert isinstance(wire.last(id_), errors.ClientClosed)
    assert isinstance(wire.last(wire.ask(2)), errors.ClientClosed)
    assert [(t, i) for t, i, _ in wire.take_sent()] == [(T.CANCEL, id_)]
    wire.output(
        EndEvent(id_, 0, 3, FinishReason.CANCELLED, "", messages.Usage(), messages.Timings())
    )
    assert [(t, b.reason) for t, _, b in wire.take_sent()] == [(T.GOODBYE, "closed")]
    assert wire.closed == 1
    assert wire.session.deadline_s() == math.inf


def test_closing_waits_for_the_bus_no_longer_than_a_second(running: tuple[Wire, bytes]) -> None:
    wire, _ = running
    wire.tell(events.CloseRequested())
    wire.at(0.9)
    assert wire.closed == 0
    wire.at(0.2)
    assert [t for t, _, _ in wire.take_sent()] == [T.CANCEL, T.GOODBYE]
    assert wire.session.link is State.CLOSED


def test_closing_does_not_wait_if_nothing_is_open_or_no_broker_listens(wire: Wire) -> None:
    id_ = wire.ask()
    wire.connect()
    wire.output(over(id_, 0))
    wire.tell(events.CloseRequested())
    assert wire.session.link is State.CLOSED
    wire = Wire()
    wire.ask()
    wire.tell(events.CloseRequested())
    assert wire.session.link is State.CLOSED
    wire = Wire()
    wire.ask()
    wire.connect()
    wire.tell(events.CloseRequested())
    wire.tell(events.SocketLost("cut"))
    assert wire.session.link is State.CLOSED and wire.session.deadline_s() == math.inf


def test_a_draining_broker_gets_no_new_requests_and_is_left_when_the_old_ones_have_ended(
    running: tuple[Wire, bytes],
) -> None:
    wire, id_ = running
    wire.message(T.DRAIN, SESSION, messages.Drain(deadline_ms=1000))
    second = wire.ask(2)
    assert not wire.take_sent()
    wire.output(toks(id_, 3, "d"), over(id_, 4))
    assert wire.text(id_) == "abcd"
    assert [t for t, _, _ in wire.take_sent()] == [T.GOODBYE]
    wire.reopen()
    assert [(t, i) for t, i, _ in wire.take_sent(T.REQUEST)] == [(T.REQUEST, second)]


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


# --- interrupted streams --------------------------------------------------------------------------


def check_resume(wire: Wire, id_: bytes, epoch: int, text: str = "abc") -> messages.Request:
    ((type_, sent_id, body),) = wire.take_sent(T.REQUEST, T.RESUME, T.CANCEL)
    assert (type_, sent_id) == (T.RESUME, id_)
    assert body.resume.epoch == epoch
    assert body.resume.token_ids == [ord(c) for c in text]
    assert body.resume.text_characters == len(text)
    assert body.prompt == "hi"
    return body  # type: ignore[no-any-return]


def finish(wire: Wire, id_: bytes, epoch: int) -> End:
    """The new worker goes on; late output of the old one arrives in between."""
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w2"))
    wire.output(
        toks(id_, 3, "stale", epoch=epoch - 1), toks(id_, 3, "de", epoch), over(id_, 5, epoch)
    )
    end = wire.last(id_)
    assert isinstance(end, End), end
    assert wire.text(id_) == "abcde"
    assert (end.resumed, end.worker) == (epoch, "w2")
    return end


def test_an_interrupted_stream_is_resumed_at_once_and_names_the_lost_worker(
    running: tuple[Wire, bytes],
) -> None:
    wire, id_ = running
    wire.message(T.INTERRUPTED, id_, gone())
    body = check_resume(wire, id_, 1)
    assert body.resume is not None and body.resume.lost_workers == ["w1"]
    finish(wire, id_, 1)
    assert [type(item).__name__ for item in wire.got[id_]].count("Recovering") == 1


def test_a_worker_that_came_back_with_the_request_is_no_longer_counted_as_lost(
    running: tuple[Wire, bytes],
) -> None:
    wire, id_ = running
    wire.message(T.INTERRUPTED, id_, gone())
    check_resume(wire, id_, 1)
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w2", returned=["w1", "other"]))
    wire.message(T.INTERRUPTED, id_, gone(epoch=1, worker="w2"))
    if not (sent := wire.take_sent(T.RESUME)):
        wire.at(30)
        sent = wire.take_sent(T.RESUME)
    assert sent[0][2].resume.lost_workers == ["w2"]


def test_a_resume_names_the_worker_that_may_still_hold_the_request(
    running: tuple[Wire, bytes],
) -> None:
    wire, id_ = running
    wire.opened.clear()
    wire.tell(events.SocketLost("cut"))
    if not wire.opened:
        wire.at(1)
    wire.connect()
    body = check_resume(wire, id_, 1)
    assert body.resume is not None and body.resume.holder == "w1"
    wire.message(T.INTERRUPTED, id_, gone(epoch=1, lost=False))
    if not (sent := wire.take_sent(T.RESUME)):
        wire.at(30)
        sent = wire.take_sent(T.RESUME)
    assert sent[0][2].resume.holder == "", "it said that it does not"


def test_a_drained_worker_is_not_counted_as_lost(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.message(T.INTERRUPTED, id_, gone(lost=False))
    body = check_resume(wire, id_, 1)
    assert body.resume is not None and body.resume.lost_workers == []


def test_a_late_interruption_of_an_older_epoch_is_ignored(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.message(T.INTERRUPTED, id_, gone())
    check_resume(wire, id_, 1)
    wire.message(T.INTERRUPTED, id_, gone(epoch=0))
    assert not wire.take_sent()
    finish(wire, id_, 1)


@pytest.mark.parametrize("how", ["disconnected", "silence", "goodbye", "unknown session"])
def test_a_stream_is_resumed_after_a_lost_session(running: tuple[Wire, bytes], how: str) -> None:
    wire, id_ = running
    wire.opened.clear()
    match how:
        case "disconnected":
            wire.tell(events.SocketLost("cut"))
        case "silence":
            wire.at(16)
        case "goodbye":
            wire.message(T.GOODBYE, SESSION, messages.Goodbye(reason="slow_consumer"))
        case "unknown session":  # a restarted broker
            error = ErrorInfo(code="unknown_session", message="who are you?", retryable=True)
            wire.message(T.REFUSE, NO_ID, messages.Refuse(error=error))
    if not wire.opened:
        wire.at(1)
    wire.connect()
    check_resume(wire, id_, 1)
    finish(wire, id_, 1)


def test_open_streams_are_resumed_before_requests_that_were_never_sent(wire: Wire) -> None:
    """Found by the simulation: streams waited behind them until the workers' grace was over."""
    ids = [wire.ask(number) for number in range(1, 6)]
    wire.connect()
    assert [i for _, i, _ in wire.take_sent(T.REQUEST)] == ids[:3]
    wire.opened.clear()
    wire.tell(events.SocketLost("cut"))
    wire.reopen()
    assert [(t, i) for t, i, _ in wire.take_sent(T.REQUEST, T.RESUME)] == [
        (T.RESUME, id_) for id_ in ids[:3]
    ]


def test_a_gap_in_offsets_is_resumed_on_the_same_session(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.output(toks(id_, 4, "e"))
    check_resume(wire, id_, 1)
    assert wire.closed == 0
    finish(wire, id_, 1)


def test_an_end_that_counts_more_tokens_than_arrived_is_a_gap(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.output(over(id_, 5))
    check_resume(wire, id_, 1)
    finish(wire, id_, 1)


def test_a_partly_repeated_event_leads_to_a_resume(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.output(toks(id_, 2, "cde"))
    check_resume(wire, id_, 1)
    finish(wire, id_, 1)


def test_events_after_a_gap_in_the_same_message_are_not_delivered(
    running: tuple[Wire, bytes],
) -> None:
    wire, id_ = running
    wire.output(toks(id_, 4, "e"), toks(id_, 3, "x"), over(id_, 4))
    assert wire.text(id_) == "abc"
    check_resume(wire, id_, 1)
    finish(wire, id_, 1)


def test_a_request_that_was_queued_when_the_broker_died_is_resumed_without_tokens(
    wire: Wire,
) -> None:
    id_ = wire.ask()
    wire.connect()
    wire.take_sent()
    wire.tell(events.SocketLost("cut"))
    wire.reopen()
    check_resume(wire, id_, 1, text="")


def test_a_stream_waits_for_its_broker_as_long_as_the_retry_policy_says(wire: Wire) -> None:
    id_ = wire.ask(retry=Retry(reconnect=12), timeout=Timeout(connect=3))
    wire.connect()
    wire.output(toks(id_, 0, "abc"))
    wire.tell(events.SocketLost("cut"))
    for _ in range(50):
        wire.at(0.3)
        if wire.session.link is State.CONNECTING:
            wire.tell(events.SocketLost("connection refused"))
    error = wire.last(id_)
    assert type(error) is errors.ConnectionLost
    assert error.partial and "connection refused" in str(error)


def test_without_retries_an_interruption_is_the_workers_error(wire: Wire) -> None:
    id_ = wire.ask(retry=Retry(attempts=0))
    wire.connect()
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w1"))
    wire.output(toks(id_, 0, "abc"))
    wire.message(T.INTERRUPTED, id_, gone())
    error = wire.last(id_)
    assert isinstance(error, errors.WorkerLost)
    assert (error.worker, error.partial, error.request_id) == ("w1", True, id_.hex()[:8])


def test_only_recoveries_without_progress_count_as_attempts(wire: Wire) -> None:
    id_ = wire.ask(retry=Retry(attempts=2))
    wire.connect()
    for epoch in range(10):
        wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w1"))
        wire.output(toks(id_, epoch, "x", epoch))
        wire.message(T.INTERRUPTED, id_, gone(epoch, lost=False))
        wire.at(1)
    assert not wire.final[id_]
    for epoch in (10, 11):
        wire.message(T.INTERRUPTED, id_, gone(epoch, lost=False))
        wire.at(1)
        wire.message(T.HEARTBEAT, SESSION, messages.Heartbeat())
    assert isinstance(wire.last(id_), errors.WorkerLost)


def test_a_request_abandoned_after_a_gap_is_cancelled_at_the_worker(wire: Wire) -> None:
    id_ = wire.ask(retry=Retry(attempts=0))
    wire.connect()
    wire.output(toks(id_, 0, "abc"), toks(id_, 9, "x"))
    assert isinstance(wire.last(id_), errors.ConnectionLost)
    assert [i for _, i, _ in wire.take_sent(T.CANCEL)] == [id_]


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


# --- everything at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_the_text_is_exact_or_an_error_follows_a_prefix(seed: int) -> None:
    """A broker that cuts, interrupts, leaves gaps and fails at random, by a seed."""
    chance = random.Random(seed)
    wire = Wire(seed=seed)
    texts = {wire.ask(n): "".join(chance.choices("abcdef", k=chance.randrange(40))) for n in (1, 2)}
    position: dict[bytes, int] = {}
    epochs: dict[bytes, int] = {}

    def hear() -> None:
        for type_, id_, body in wire.take_sent(T.REQUEST, T.RESUME, T.CANCEL):
            if type_ is T.CANCEL:
                position.pop(id_, None)
                continue
            resume = body.resume
            epochs[id_] = resume.epoch if resume else 0
            position[id_] = len(resume.token_ids) if resume else 0
            if resume:
                have = "".join(chr(t) for t in resume.token_ids)
                assert texts[id_].startswith(have) and resume.text_characters == len(have)

    for _ in range(600):
        if all(wire.final.get(id_) for id_ in texts):
            break
        if wire.session.link is not State.OPEN:
            position.clear()
            wire.at(0.5)
            if wire.session.link is State.CONNECTING:
                wire.connect()
            hear()
            continue
        dice = chance.random()
        if dice < 0.04:
            wire.tell(events.SocketLost("cut"))
            position.clear()
            continue
        wire.at(0.05)
        hear()
        batch: list[OutputEvent] = []
        for id_ in sorted(position):
            start, text, epoch = position[id_], texts[id_], epochs[id_]
            if dice < 0.10 and chance.random() < 0.5:
                del position[id_]
                wire.message(T.INTERRUPTED, id_, gone(epoch, lost=chance.random() < 0.3))
                hear()
                continue
            stop = min(len(text), start + chance.randrange(4))
            skip = 1 if dice > 0.95 and start + 1 < stop else 0
            if stop > start:
                batch.append(toks(id_, start + skip, text[start + skip : stop], epoch))
            position[id_] = stop
            if stop == len(text):
                batch.append(over(id_, len(text), epoch))
        wire.output(*batch)
        hear()
    for id_, text in texts.items():
        last = wire.last(id_)
        if isinstance(last, End):
            assert wire.text(id_) == text
        else:
            assert isinstance(last, errors.BusError)
            assert text.startswith(wire.text(id_))
    offsets = [
        item.offset for id_ in texts for item in wire.got[id_] if isinstance(item, TokensEvent)
    ]
    assert offsets or not any(texts.values())
    assert all(a < b or b == 0 for a, b in pairwise(offsets))
