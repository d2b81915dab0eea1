"""The pipe between link and engine process: whole messages, no blocking, a clear end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from tests.harness import PATIENCE_S
from worker.core import events
from worker.engines.base import EngineOptions
from worker.process.pipe import Pipe, PipeClosed
from worker.process.supervisor import Supervisor


@pytest.fixture
def ends() -> Iterator[tuple[Pipe, Pipe]]:
    """The link's end, which never blocks, and the engine's, which does."""
    ours, theirs = socket.socketpair()
    link, engine = Pipe(ours, blocking=False), Pipe(theirs, blocking=True)
    yield link, engine
    link.close()
    engine.close()


def receive(pipe: Pipe, count: int) -> list[list[bytes]]:
    """Wait for `count` messages."""
    messages: list[list[bytes]] = []
    while len(messages) < count:
        messages += pipe.receive(PATIENCE_S)
    return messages


@pytest.mark.parametrize(
    "message",
    [[b""], [b"one"], [b"one", b"", b"three"], [bytes(300_000)], [b"x"] * 200],
)
def test_messages_arrive_whole_and_in_order(ends: tuple[Pipe, Pipe], message: list[bytes]) -> None:
    link, engine = ends
    engine_has: list[list[bytes]] = []
    reader = threading.Thread(target=lambda: engine_has.extend(receive(engine, 2)))
    reader.start()
    link.send(message)
    link.send([b"next"])
    while link.backlog_bytes:
        link.flush()
    reader.join(PATIENCE_S)
    assert engine_has == [message, [b"next"]]


def test_unread_messages_are_queued_without_blocking_and_counted(ends: tuple[Pipe, Pipe]) -> None:
    link, engine = ends
    images = [bytes((number,)) * (4 << 20) for number in range(4)]
    link.send([b"head", *images])
    assert link.backlog_bytes > 8 << 20
    got: list[list[bytes]] = []
    writer = threading.Thread(target=lambda: got.extend(receive(engine, 1)))
    writer.start()
    while link.backlog_bytes:
        link.flush()
    writer.join(PATIENCE_S)
    assert got == [[b"head", *images]]


def test_without_data_receive_returns_nothing_and_does_not_wait(ends: tuple[Pipe, Pipe]) -> None:
    assert ends[0].receive() == []
    assert ends[1].receive() == []


def test_an_incomplete_message_waits_for_the_rest() -> None:
    raw, theirs = socket.socketpair()
    pipe = Pipe(theirs, blocking=True)
    data = b"\x00\x00\x00\x01" + (5).to_bytes(8, "big") + b"hello"
    for byte in data[:-1]:
        raw.sendall(bytes((byte,)))
        assert pipe.receive() == []
    raw.sendall(data[-1:])
    assert pipe.receive(1.0) == [[b"hello"]]
    raw.close()
    pipe.close()


def test_the_other_sides_end_is_reported_after_its_last_message(ends: tuple[Pipe, Pipe]) -> None:
    link, engine = ends
    engine.send([b"last words"])
    engine.close()
    assert link.receive(1.0) == [[b"last words"]]
    with pytest.raises(PipeClosed):
        link.receive(1.0)
    with pytest.raises(PipeClosed):
        for _ in range(100):
            link.send([b"x" * 100_000])


def test_an_engines_last_message_is_read_even_if_a_write_to_it_failed_first(
    ends: tuple[Pipe, Pipe],
) -> None:
    """If the engine dies while it is sent an image, the write fails before the cause is read."""
    link, engine = ends
    supervisor = Supervisor(EngineOptions(engine="echo"))
    supervisor.pipe = link
    link.send([bytes(8 << 20)])
    assert link.backlog_bytes
    engine.send([msgspec.msgpack.encode(("broken", "the device is lost"))])
    engine.close()
    arrived = supervisor.read(0.0) + supervisor.read(0.0)
    assert [event for event in arrived if isinstance(event, events.EngineLost)] == [
        events.EngineLost("the device is lost")
    ]
