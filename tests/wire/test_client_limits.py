"""Brokers that are absent, wrong, slow or killed: which error a caller of the library gets."""

from __future__ import annotations

import math
import socket
import threading

import pytest

import client as library
from broker.protocol import codec, limits, messages
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import MessageType
from client import (
    BusError,
    Client,
    ConnectionLost,
    ConnectTimeout,
    InvalidRequest,
    Limits,
    Overloaded,
    Retry,
    Timeout,
    Tokens,
    Unauthenticated,
)
from tests.harness import PATIENCE_S
from tests.wire.scripted_broker import ScriptedBroker, endless, fail, request_of, silent, tokens

# --- limits and losses ----------------------------------------------------------------------------


def test_an_absent_broker_is_an_error_within_the_connect_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        Client(f"tcp://127.0.0.1:{port}", timeout=Timeout(connect=3)) as client,
        pytest.raises(ConnectTimeout, match=r"refused.*python -m broker"),
    ):
        client.chat("demo", "x")


@pytest.mark.parametrize("address", ["ipc:///nowhere/at/all", "tcp://no-such-host.invalid:5555"])
def test_an_address_that_leads_nowhere_is_an_error(address: str) -> None:
    with Client(address, timeout=Timeout(connect=0.5)) as client, pytest.raises(ConnectTimeout):
        client.models()


@pytest.mark.parametrize(
    "address",
    ["", "localhost:5555", "http://x:1", "tcp://x", "tcp://x:0", "tcp://x:y", "udp://x:1"],
)
def test_a_malformed_address_is_an_error_at_once(address: str) -> None:
    with pytest.raises(InvalidRequest, match="address"):
        Client([address])


def test_a_listener_that_is_not_a_broker_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with Client(address, timeout=Timeout(connect=0.5)) as client, pytest.raises(ConnectTimeout):
            client.models()


def test_the_environment_names_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENBUS_BROKER", "tcp://h:1, ipc:///x")
    assert Client().brokers == ("tcp://h:1", "ipc:///x")
    assert Client("tcp://other:2").brokers == ("tcp://other:2",)


def test_what_the_wire_cannot_say_is_refused_before_anything_is_sent() -> None:
    for deadline_s in (math.inf, math.nan, -1.0, 2e9):
        with Client() as client, pytest.raises(library.InvalidRequest, match="deadline_s is"):
            client.drain("w1", deadline_s=deadline_s)
    for name in ("\udcff", "é" * 129):
        with pytest.raises(library.InvalidRequest, match="the name of the client"):
            Client(name=name)


@pytest.mark.parametrize(
    ("timeout", "cls"),
    [
        (Timeout(queue=0.2), library.QueueTimeout),
        (Timeout(total=0.2), library.TotalTimeout),
    ],
)
def test_a_request_that_no_worker_takes_fails_at_its_time_limit(
    timeout: Timeout, cls: type[BusError]
) -> None:
    with ScriptedBroker(silent) as broker, Client(broker.address) as client:
        with pytest.raises(cls):
            client.chat("demo", "x", timeout=timeout)
        broker.wait_for(MessageType.CANCEL)


def test_a_request_whose_worker_falls_silent_fails_at_its_time_limit() -> None:
    def taken(broker: ScriptedBroker, request_id: bytes, *_: object) -> None:
        broker.send(MessageType.ACCEPTED, request_id, messages.Accepted(worker="w1"))

    with ScriptedBroker(taken) as broker, Client(broker.address) as client:
        with pytest.raises(library.FirstTokenTimeout, match="w1"):
            client.chat("demo", "x", timeout=Timeout(first_token=2))
        broker.wait_for(MessageType.CANCEL)
    with ScriptedBroker(endless) as broker, Client(broker.address) as client:
        with pytest.raises(library.TokenTimeout) as caught:
            client.chat("demo", "x", timeout=Timeout(between_tokens=0.2))
        assert caught.value.partial
        broker.wait_for(MessageType.CANCEL)


def test_errors_of_the_bus_are_raised_where_the_answer_is_read() -> None:
    error = ErrorInfo(code="overloaded", message="too much", retryable=True, retry_after_ms=9)
    with ScriptedBroker(fail(error)) as broker, Client(broker.address) as client:
        stream = client.chat("demo", "x", stream=True, retry=Retry(attempts=0))
        with pytest.raises(Overloaded, match="too much") as caught:
            list(stream)
        assert caught.value.retry_after_ms == 9
        assert caught.value.request_id == stream.request_id
        with pytest.raises(Overloaded):
            stream.result()


def test_a_refused_key_is_an_error_at_once() -> None:
    error = ErrorInfo(code="unauthenticated", message="not on the list")
    refuse = messages.Refuse(error=error, fatal=True)
    with ScriptedBroker(refuse=refuse) as broker, Client(broker.address) as client:
        for _ in range(2):
            with pytest.raises(Unauthenticated, match="not on the list"):
                client.models()
    assert broker.names().count("HELLO") == 1


def test_a_stream_continues_at_the_next_broker_of_the_list() -> None:
    def half(
        broker: ScriptedBroker, request_id: bytes, request: messages.Request, _: object
    ) -> None:
        broker.send(MessageType.ACCEPTED, request_id, messages.Accepted(worker="w1"))
        broker.output(tokens(request_id, "abc"))

    with ScriptedBroker(half) as first, ScriptedBroker() as second:
        with Client([first.address, second.address]) as client:
            stream = client.chat("demo", "abcdef", stream=True)
            texts = stream.text
            assert next(texts) == "abc"
            first.stop()
            assert "".join(texts) == "def"
            assert stream.resumed == 1
        ((body),) = second.wait_for(MessageType.RESUME)
    resume = codec.decode(messages.Request, body, limits.MAX_REQUEST_BYTES).resume
    assert resume is not None and resume.token_ids == [97, 98, 99]


def test_a_killed_broker_is_noticed_and_is_an_error_if_it_does_not_come_back() -> None:
    """The closed connection reveals it: heartbeats would be overdue only after minutes."""
    with ScriptedBroker(endless) as broker:
        client = Client(broker.address, retry=Retry(reconnect=0.3))
        stream = client.chat("demo", "x", stream=True)
        texts = stream.text
        next(texts)
        broker.stop()
        with client, pytest.raises(ConnectionLost) as caught:
            list(texts)
    assert caught.value.partial


def test_a_reader_that_stops_holds_no_more_than_its_window() -> None:
    sent = threading.Event()

    def within_window(
        broker: ScriptedBroker, request_id: bytes, request: messages.Request, _: object
    ) -> None:
        broker.send(MessageType.ACCEPTED, request_id, messages.Accepted(worker="w1"))
        broker.output(tokens(request_id, "x" * request.window))
        sent.set()

    with ScriptedBroker(within_window) as broker, Client(broker.address) as client:
        stream = client.chat("demo", "x", stream=True, window=8)
        assert request_of(broker).window == 8
        assert sent.wait(PATIENCE_S)
        client.query("bus.models")  # everything sent before it has arrived
        assert "WINDOW" not in broker.names()
        for event in stream:
            if isinstance(event, Tokens):
                break
        stream.close()
    with ScriptedBroker(within_window, window=16) as broker:
        client = Client(broker.address)
        stream = client.chat("demo", "x", stream=True)
        events = iter(stream)
        while not isinstance(next(events), Tokens):
            pass
        (body,) = broker.wait_for(MessageType.WINDOW)
        client.close()
    assert codec.decode(messages.Window, body, 100).limit == 32, (
        "16 were read, and 16 more may come"
    )


def test_requests_beyond_the_limit_wait_in_the_client() -> None:
    with (
        ScriptedBroker(endless) as broker,
        Client(broker.address, limits=Limits(inflight=2)) as client,
    ):
        streams = [client.chat("demo", "x", stream=True) for _ in range(3)]
        broker.wait_for(MessageType.REQUEST, 2)
        client.query("bus.models")
        assert broker.names().count("REQUEST") == 2
        for stream in streams:
            stream.close()
