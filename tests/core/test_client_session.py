"""The client's session in virtual time: brokers, handshakes, silence, closing (SPEC.md
section 5)."""

from __future__ import annotations

import math

import pytest

from broker.peer.connection import State
from broker.protocol import codec, header, messages
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import NO_ID
from broker.protocol.messages import EndEvent, FinishReason
from client import errors
from client.core import events
from client.options import Timeout
from tests.core.client_wire import SESSION, T, Wire, over, toks

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
