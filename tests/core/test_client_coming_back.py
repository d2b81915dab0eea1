"""When and where a client reconnects after it lost its broker or was refused (SPEC.md section
5)."""

from __future__ import annotations

import pytest

from broker.peer.connection import State
from broker.protocol import messages
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import NO_ID
from client.core import events
from client.errors import ConnectTimeout
from client.options import Retry, Timeout
from tests.core.client_wire import SESSION, T, Wire, toks


@pytest.fixture
def running(wire: Wire) -> tuple[Wire, bytes]:
    """A request that worker w1 runs."""
    id_ = wire.ask()
    wire.connect()
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w1"))
    return wire, id_


def _draining() -> messages.Refuse:
    error = ErrorInfo(code="draining", message="about to stop", retryable=True, retry_after_ms=1000)
    return messages.Refuse(error=error)


def test_a_new_client_asks_the_second_broker_at_once_while_the_first_one_drains() -> None:
    wire = Wire("tcp://a:1", "tcp://b:1")
    id_ = wire.ask()
    wire.tell(events.SocketOpened())
    error = ErrorInfo(code="draining", message="about to stop", retry_after_ms=31_000)
    wire.message(T.REFUSE, NO_ID, messages.Refuse(error=error))
    wire.at(0.0)
    assert wire.opened == ["tcp://a:1", "tcp://b:1"]
    wire.connect()
    assert [i for _, i, _ in wire.take_sent(T.REQUEST)] == [id_]


def test_a_refused_client_finds_the_next_broker_at_a_draining_brokers_address(wire: Wire) -> None:
    wire.ask()
    for _ in range(3):
        wire.tell(events.SocketOpened())
        wire.message(T.REFUSE, NO_ID, _draining())
        wire.opened.clear()
        wire.at(0.9)
        assert not wire.opened
        wire.at(0.7)
        assert wire.opened


def test_each_address_has_its_own_back_off() -> None:
    wire = Wire("tcp://a:1", "tcp://b:1")
    wire.ask(timeout=Timeout(connect=None))
    began_s = wire.now_s
    for _ in range(400):  # one is gone for good, the other is full
        if wire.session.link is State.WAITING:
            wire.next_socket()
        if wire.opened[-1] == "tcp://a:1":
            wire.tell(events.SocketLost("refused"))
        else:
            wire.tell(events.SocketOpened())
            error = ErrorInfo(code="overloaded", message="full", retry_after_ms=60_000)
            wire.message(T.REFUSE, NO_ID, messages.Refuse(error=error))
    asked = wire.opened.count("tcp://b:1")
    assert 1 <= asked <= 1 + (wire.now_s - began_s) / 60 < len(wire.opened) / 10


def test_however_often_a_broker_is_killed_its_client_comes_back_at_once(
    running: tuple[Wire, bytes],
) -> None:
    wire, _ = running
    for _ in range(20):
        lost_s = wire.now_s
        wire.tell(events.SocketLost("the connection was closed"))
        wire.next_socket()
        assert wire.now_s - lost_s <= 0.5
        wire.connect()
        wire.at(0.1)


def test_a_broker_that_ends_every_session_right_after_welcome_is_not_hammered(wire: Wire) -> None:
    wire.ask(timeout=Timeout(connect=None), retry=Retry(attempts=1000, reconnect=1000))
    waits = []
    for _ in range(12):
        wire.connect()
        lost_s = wire.now_s
        wire.message(T.GOODBYE, SESSION, messages.Goodbye(reason="protocol_error"))
        wire.next_socket()
        waits.append(wire.now_s - lost_s)
    assert 5.0 < max(waits[6:]) <= 30.0


def test_a_new_request_does_not_wait_for_a_long_back_off(wire: Wire) -> None:
    wire.ask(timeout=Timeout(connect=None))
    while wire.session.link is not State.WAITING or wire.session.deadline_s() < wire.now_s + 3:
        wire.tell(events.SocketLost("nobody listens there"))
        if wire.session.deadline_s() < wire.now_s + 3:
            wire.next_socket()
    wire.opened.clear()
    second = wire.ask(2)  # gives a broker ten seconds
    wire.at(1.0)
    assert wire.opened
    wire.connect()
    assert second in [i for _, i, _ in wire.take_sent(T.REQUEST)]


def test_a_time_named_by_the_broker_is_not_shortened(wire: Wire) -> None:
    wire.ask(timeout=Timeout(connect=100))
    wire.tell(events.SocketOpened())
    error = ErrorInfo(code="overloaded", message="full", retry_after_ms=7000)
    wire.message(T.REFUSE, NO_ID, messages.Refuse(error=error))
    wire.opened.clear()
    wire.ask(2)
    wire.at(6.9)
    assert not wire.opened


def test_a_new_request_moves_a_client_and_its_streams_from_a_draining_broker_to_the_next() -> None:
    wire = Wire("tcp://a:1", "tcp://b:1")
    running = wire.ask()
    wire.connect()
    wire.message(T.ACCEPTED, running, messages.Accepted(worker="w1"))
    wire.output(toks(running, 0, "abc"))
    wire.message(T.DRAIN, SESSION, messages.Drain(deadline_ms=30_000))
    wire.take_sent()
    new = wire.ask(2)
    assert not wire.take_sent(), "a GOODBYE would cancel the stream"
    assert wire.closed == 1
    wire.at(0.0)
    assert wire.opened[-1] == "tcp://b:1"
    wire.connect()
    sent = {id_: (type_, body) for type_, id_, body in wire.take_sent()}
    assert sent[new][0] is T.REQUEST
    assert sent[running][0] is T.RESUME
    assert sent[running][1].resume.holder == "w1"


def test_a_connect_timeout_says_what_happened_at_each_broker() -> None:
    wire = Wire("tcp://a:1", "tcp://b:1")
    id_ = wire.ask(timeout=Timeout(connect=2))
    wire.tell(events.SocketOpened())
    wire.message(T.REFUSE, NO_ID, _draining())
    wire.at(2.1)  # the second one does not answer
    error = wire.last(id_)
    assert isinstance(error, ConnectTimeout)
    assert "tcp://a:1: about to stop" in error.message
    assert "tcp://b:1: no answer so far" in error.message


@pytest.mark.parametrize("greeting", [False, True])
def test_a_starved_client_reads_what_has_arrived_before_it_gives_up_an_attempt(
    wire: Wire, greeting: bool
) -> None:
    wire.ask(timeout=Timeout(connect=None))
    if greeting:
        wire.tell(events.SocketOpened())
    wire.now_s = wire.session.deadline_s() + 12.0
    wire.tell(events.Tick())
    assert wire.closed == 0, "nobody can know yet that nothing came"
    wire.at(1.1)
    assert wire.closed == 1
