"""`broker.readiness`: no message is missed, whatever ZeroMQ's descriptors say."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from broker.readiness import Readiness

Socket = zmq.Socket[Any]
Pair = Callable[[int, int], tuple[Socket, Socket]]
LONG_S = 20.0
"""Longer than any test may take: a wait this long means that a message was missed."""


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Makes two connected sockets of the given types."""
    context: zmq.Context[Any] = zmq.Context()
    made: list[Socket] = []

    def make(kind: int, peer_kind: int) -> tuple[Socket, Socket]:
        ours, theirs = context.socket(kind), context.socket(peer_kind)
        made.extend((ours, theirs))
        theirs.setsockopt(zmq.ROUTING_ID, b"peer")
        ours.bind("inproc://here")
        theirs.connect("inproc://here")
        return ours, theirs

    yield make
    for each in made:
        each.close(0)
    context.term()


@pytest.fixture
def bell() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


def drain(ours: Socket) -> int:
    """Read all messages; return how many there were."""
    count = 0
    while True:
        try:
            ours.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return count
        count += 1


def test_a_message_makes_its_socket_ready_until_it_is_read(
    pair: Pair, bell: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair(zmq.ROUTER, zmq.DEALER)
    readiness = Readiness([ours], [], bell[0].fileno(), set())
    assert readiness.wait(0.0) == set()
    theirs.send(b"one")
    assert readiness.wait(LONG_S) == {ours}
    assert readiness.wait(LONG_S) == {ours}, "until it is read"
    assert drain(ours) == 1
    assert readiness.wait(0.0) == set()


def test_a_message_that_arrived_during_a_send_is_not_missed(
    pair: Pair, bell: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair(zmq.ROUTER, zmq.DEALER)
    empty: set[Socket] = set()
    readiness = Readiness([ours], [], bell[0].fileno(), empty)
    theirs.send(b"hello")
    readiness.wait(LONG_S)
    for _ in range(100):
        assert drain(ours) == 1
        empty.add(ours)
        theirs.send(b"next")
        # Any operation on the socket clears the signal of its descriptor.
        ours.getsockopt(zmq.EVENTS)
        ours.send_multipart([b"peer", b"answer"])
        empty.discard(ours)
        assert readiness.wait(LONG_S) == {ours}


def test_a_socket_that_was_found_empty_is_not_asked_and_its_next_message_is_not_missed(
    pair: Pair, bell: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair(zmq.ROUTER, zmq.DEALER)
    empty: set[Socket] = set()
    readiness = Readiness([ours], [], bell[0].fileno(), empty)
    assert readiness.wait(0.0) == set()
    assert empty == {ours}
    asked: list[int] = []
    monkeypatch.setattr(
        zmq.Socket, "getsockopt", lambda socket, option: asked.append(option) or socket.get(option)
    )
    assert readiness.wait(0.0) == set() and not asked
    theirs.send(b"one")
    assert readiness.wait(LONG_S) == {ours} and not asked and not empty
    # It is read in part, or not at all: so it is asked again.
    assert readiness.wait(LONG_S) == {ours} and asked


def test_a_drained_socket_is_ready_at_first_and_when_messages_were_left(
    pair: Pair, bell: tuple[socket.socket, socket.socket]
) -> None:
    theirs, ours = pair(zmq.PAIR, zmq.PAIR)  # ours connects, like the reader of a monitor
    readiness = Readiness([], [ours], bell[0].fileno(), set())
    assert readiness.wait(LONG_S) == {ours}, "otherwise its descriptor might never become readable"
    assert drain(ours) == 0
    for part in (b"one", b"two"):
        theirs.send(part)
    assert readiness.wait(LONG_S) == {ours}
    assert ours.recv() == b"one"
    readiness.again(ours)
    assert readiness.wait(LONG_S) == {ours}
    assert drain(ours) == 1
    theirs.send(b"three")
    assert readiness.wait(LONG_S) == {ours}


def test_a_plain_descriptor_is_reported_by_its_number(
    pair: Pair, bell: tuple[socket.socket, socket.socket]
) -> None:
    ours, _ = pair(zmq.ROUTER, zmq.DEALER)
    readiness = Readiness([ours], [], bell[0].fileno(), set())
    bell[1].send(b"!")
    assert readiness.wait(LONG_S) == {bell[0].fileno()}
