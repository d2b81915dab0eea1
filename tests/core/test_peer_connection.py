"""The connection of peers that dial out (worker, client, relay), in virtual time."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest

from broker.peer.backoff import ATTEMPT_S, GREETING_LONGEST_S, Address
from broker.peer.connection import SLACK_S, BeatDue, Ended, PeerConnection, State
from broker.protocol import codec, header, messages
from broker.protocol.errors import ErrorInfo, ProtocolError
from broker.protocol.header import NO_ID, Header, MessageType

SESSION = bytes([9]) * 16
INTERVAL_S = 1.0
LIVENESS = 3
WELCOME = messages.Welcome(
    version=1,
    broker="b",
    heartbeat_interval_ms=int(INTERVAL_S * 1000),
    liveness=LIVENESS,
    limits=messages.BusLimits(
        request_bytes=1,
        attachment_bytes=1,
        attachments_bytes=1,
        attachments=1,
        inflight=1,
    ),
    window=1,
)
HELLO = messages.Hello(role="client", name="test")


class Line:
    """A connection, its broker and the clock."""

    def __init__(self, **options: Any) -> None:
        self.now_s = 1000.0
        self.address = Address("tcp://a:1", random.Random(1))
        self.connection = PeerConnection(self.address, door="front", **options)
        self.broker_sent = 0

    def dial(self) -> None:
        self.connection.dial(self.address, self.now_s)
        self.broker_sent = 0

    def greet(self) -> Header:
        self.dial()
        return header.decode(self.connection.greet(HELLO, self.now_s)[0])

    def open(self) -> None:
        self.greet()
        assert self.hear(MessageType.WELCOME, WELCOME) == WELCOME

    def hear(self, type_: MessageType, body: msgspec.Struct, id_: bytes = SESSION) -> Any:
        """The broker sends a message."""
        frames = (header.encode(type_, id_, self.broker_sent), codec.encode(body))
        self.broker_sent += 1
        return self.connection.receive(frames, self.now_s)

    def at(self, after_s: float) -> Ended | BeatDue | None:
        """A tick after this time."""
        self.now_s += after_s
        return self.connection.tick(self.now_s)

    def say(self, type_: MessageType = MessageType.QUERY) -> int:
        """Send a message; returns its sequence number."""
        body = messages.Heartbeat() if type_ is MessageType.HEARTBEAT else messages.Query(verb="v")
        frames = self.connection.message(type_, NO_ID, body, self.now_s)
        return header.decode(frames[0]).sequence


# --- handshake ------------------------------------------------------------------------------------


def test_the_dialing_side_sends_hello_and_welcome_begins_the_session() -> None:
    line = Line()
    hello = line.greet()
    assert (hello.type, hello.sequence) == (MessageType.HELLO, 0)
    assert line.connection.state is State.GREETING and line.connection.session == NO_ID
    line.hear(MessageType.WELCOME, WELCOME)
    assert line.connection.open and line.connection.session == SESSION


def test_only_a_connection_in_use_has_a_socket() -> None:
    line = Line()
    seen = {line.connection.state: line.connection.has_socket}
    line.dial()
    seen[line.connection.state] = line.connection.has_socket
    line.open()
    seen[line.connection.state] = line.connection.has_socket
    line.connection.end(Ended("lost"), line.now_s)
    seen[line.connection.state] = line.connection.has_socket
    line.connection.close()
    seen[line.connection.state] = line.connection.has_socket
    assert seen == {
        State.IDLE: False,
        State.CONNECTING: True,
        State.OPEN: True,
        State.WAITING: False,
        State.CLOSED: False,
    }
    assert line.connection.deadline_s() == math.inf


def test_another_answer_to_hello_is_a_protocol_error() -> None:
    line = Line()
    line.greet()
    with pytest.raises(ProtocolError, match="HELLO was answered with HEARTBEAT"):
        line.hear(MessageType.HEARTBEAT, messages.Heartbeat())


def test_a_version_that_was_not_offered_is_a_protocol_error() -> None:
    line = Line()
    line.greet()
    with pytest.raises(ProtocolError, match="version 2"):
        line.hear(MessageType.WELCOME, msgspec.structs.replace(WELCOME, version=2))


def test_a_broker_never_speaks_first() -> None:
    line = Line()
    line.dial()
    with pytest.raises(ProtocolError, match="before HELLO"):
        line.hear(MessageType.WELCOME, WELCOME)


@pytest.mark.parametrize("fatal", [False, True])
@pytest.mark.parametrize("open_", [False, True])
def test_a_refusal_ends_it_with_the_brokers_message_and_retry_time(
    open_: bool, fatal: bool
) -> None:
    line = Line()
    line.open() if open_ else line.greet()
    error = ErrorInfo(code="forbidden", message="not you", retry_after_ms=2000)
    ended = line.hear(MessageType.REFUSE, messages.Refuse(error=error, fatal=fatal))
    assert ended == Ended("not you", True, 2.0, error, fatal)
    assert 2.0 <= line.connection.end(ended, line.now_s) <= 3.0
    assert line.address.hinted


def test_unknown_session_is_accepted_whatever_its_sequence() -> None:
    """The broker sends it with sequence 0, since it has no session."""
    line = Line()
    line.open()
    line.hear(MessageType.HEARTBEAT, messages.Heartbeat())
    line.broker_sent = 0
    error = ErrorInfo(code="unknown_session", message="say HELLO")
    ended = line.hear(MessageType.REFUSE, messages.Refuse(error=error, fatal=False), NO_ID)
    assert isinstance(ended, Ended) and ended.error == error


@pytest.mark.parametrize(("reason", "refused"), [("shutdown", False), ("slow_consumer", True)])
def test_a_goodbye_counts_as_a_refusal_unless_the_broker_stops(reason: str, refused: bool) -> None:
    line = Line()
    line.open()
    ended = line.hear(MessageType.GOODBYE, messages.Goodbye(reason=reason))
    assert ended == Ended(f"the broker said goodbye: {reason}", refused)


# --- framing and sequence -------------------------------------------------------------------------


def test_each_direction_counts_its_messages_from_zero_in_every_session() -> None:
    line = Line()
    for _ in range(2):
        line.open()
        assert [line.say() for _ in range(3)] == [1, 2, 3]
        line.hear(MessageType.HEARTBEAT, messages.Heartbeat())
        assert line.connection.last_sequence == 1
        line.connection.end(Ended("lost"), line.now_s)


@pytest.mark.parametrize("skipped", [-1, 1])
def test_a_lost_or_doubled_message_is_a_protocol_error(skipped: int) -> None:
    line = Line()
    line.open()
    line.hear(MessageType.HEARTBEAT, messages.Heartbeat())
    line.broker_sent += skipped
    with pytest.raises(ProtocolError, match=f"message {2 + skipped} .* came where 2 was due"):
        line.hear(MessageType.HEARTBEAT, messages.Heartbeat())


@pytest.mark.parametrize(("most", "frames"), [(2, 1), (2, 3), (20, 1), (20, 21)])
def test_a_message_with_too_many_frames_is_a_protocol_error(most: int, frames: int) -> None:
    line = Line(most_frames=most)
    line.open()
    head = header.encode(MessageType.ANSWER, SESSION, 1)
    with pytest.raises(ProtocolError, match=f"message of {frames} frames"):
        line.connection.receive((head, *[b""] * (frames - 1)), line.now_s)


# --- liveness -------------------------------------------------------------------------------------


def test_a_silent_broker_is_lost_after_interval_times_liveness() -> None:
    line = Line()
    line.open()
    for _ in range(LIVENESS - 1):
        assert line.at(INTERVAL_S) == BeatDue()
        line.say(MessageType.HEARTBEAT)
    assert line.at(INTERVAL_S) == Ended("the broker has been silent for 3.0 s")


def test_any_message_is_a_sign_of_life() -> None:
    line = Line()
    line.open()
    for _ in range(3 * LIVENESS):
        assert not isinstance(line.at(INTERVAL_S), Ended)
        line.say(MessageType.HEARTBEAT)
        line.hear(MessageType.ANSWER, messages.Answer())


@pytest.mark.parametrize("steady", [False, True])
def test_a_heartbeat_is_due_after_a_silent_interval_or_steadily(steady: bool) -> None:
    line = Line(steady=steady)
    line.open()
    assert line.at(INTERVAL_S / 2) is None
    line.say()
    assert (line.at(INTERVAL_S / 2) == BeatDue()) is steady
    line.say(MessageType.HEARTBEAT)
    assert line.at(INTERVAL_S / 2) is None, "a beat is a beat in either way"


@pytest.mark.parametrize("steady", [False, True])
def test_time_while_this_process_was_stopped_is_not_the_brokers_silence(steady: bool) -> None:
    line = Line(steady=steady)
    line.open()
    assert line.at(60.0) == BeatDue()
    line.say(MessageType.HEARTBEAT)
    outcomes = []
    for _ in range(2 * LIVENESS):
        outcomes.append(line.at(INTERVAL_S))
        line.say(MessageType.HEARTBEAT)
    assert any(isinstance(outcome, Ended) for outcome in outcomes), "but now it is"


# --- attempts and waits ---------------------------------------------------------------------------


def test_an_attempt_without_progress_times_out() -> None:
    line = Line()
    line.dial()
    assert line.connection.deadline_s() == line.now_s + ATTEMPT_S
    ended = line.at(ATTEMPT_S)
    assert isinstance(ended, Ended) and "is the host's name right" in ended.reason


def test_each_unanswered_hello_gives_the_next_one_more_time() -> None:
    line = Line()
    waits = []
    for _ in range(4):
        line.greet()
        waits.append(line.connection.deadline_s() - line.now_s)
        ended = line.at(waits[-1])
        assert isinstance(ended, Ended) and "a tokenbus broker's front?" in ended.reason
        line.connection.end(ended, line.now_s)
    assert waits == [5, 10, GREETING_LONGEST_S, GREETING_LONGEST_S]


@pytest.mark.parametrize("greeting", [False, True])
def test_messages_from_while_this_process_was_stopped_are_read_before_giving_up(
    greeting: bool,
) -> None:
    line = Line()
    line.greet() if greeting else line.dial()
    assert line.at(60.0) is None
    assert isinstance(line.at(SLACK_S), Ended)


def test_the_address_of_a_lost_connection_backs_off_and_keeps_the_reason() -> None:
    line = Line()
    line.dial()
    wait_s = line.connection.end(Ended("nobody listens there"), line.now_s)
    assert line.connection.state is State.WAITING
    assert line.connection.deadline_s() == line.address.from_s == line.now_s + wait_s
    assert line.address.reason == "nobody listens there" and not line.address.hinted


def test_a_useful_session_resets_the_back_off_and_a_refused_one_does_not() -> None:
    line = Line()
    ceilings = []
    for refused in (True, True, False):
        line.open()
        line.now_s += 0.1
        line.connection.end(Ended("over", refused), line.now_s)
        ceilings.append(max(line.address.backoff.next_s(line.now_s) for _ in range(200)))
    assert ceilings[0] > 0.5 and ceilings[1] > ceilings[0] and ceilings[2] <= 0.5


def test_one_connection_serves_several_addresses_each_with_its_own_back_off() -> None:
    line = Line()
    other = Address("tcp://b:1", random.Random(2))
    line.dial()
    line.connection.end(Ended("a is away"), line.now_s)
    line.connection.dial(other, line.now_s)
    line.connection.end(Ended("b is away"), line.now_s)
    assert (line.address.reason, other.reason) == ("a is away", "b is away")
    assert line.address.from_s > line.now_s and other.from_s > line.now_s


def test_a_goodbye_is_limited_in_size_and_belongs_to_the_session() -> None:
    line = Line()
    line.open()
    frames = line.connection.goodbye("protocol_error", "x" * 5000, line.now_s)
    assert header.decode(frames[0])[2] == SESSION
    goodbye = codec.decode(messages.Goodbye, frames[1], 1 << 16)
    assert goodbye == messages.Goodbye(reason="protocol_error", message="x" * 1000)
