"""What the application's side of a stream tells the session, and how items get into a loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from broker.protocol.messages import TokensEvent
from client import events
from client.events import Started
from client.stream import AsyncInbox, LoopGate, StreamState

ID = bytes(range(1, 17))


def started(window_tokens: int) -> Started:
    return Started("worker", "model", 0, window_tokens)


def token(offset: int) -> TokensEvent:
    return TokensEvent(ID, 0, offset, [offset], "x")


def reading(window_tokens: int) -> tuple[StreamState, list[events.Event]]:
    told: list[events.Event] = []
    state = StreamState(ID, "model", 0, told.append)
    state.take(started(window_tokens))
    return state, told


def test_what_was_read_is_reported_each_quarter_of_the_window_and_not_for_the_first_token() -> None:
    state, told = reading(window_tokens=8)
    for offset in range(5):
        state.take(token(offset))
    assert told == [events.TokensTaken(ID, 2), events.TokensTaken(ID, 4)]


def test_with_a_window_of_one_token_every_token_is_reported() -> None:
    state, told = reading(window_tokens=1)
    for offset in range(3):
        state.take(token(offset))
    assert told == [events.TokensTaken(ID, taken) for taken in (1, 2, 3)]


def test_a_stream_that_goes_on_elsewhere_counts_from_what_was_read() -> None:
    state, told = reading(window_tokens=8)
    state.take(token(0))
    state.take(started(window_tokens=8))
    state.take(token(1))
    assert not told
    state.take(token(2))
    assert told == [events.TokensTaken(ID, 3)]


class CountingLoop:
    """As much of an event loop as a gate needs; runs what it was given when it is told to."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def run(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


def test_a_loop_that_is_behind_is_called_once_for_many_rounds() -> None:
    loop: Any = CountingLoop()
    gate = LoopGate(loop)
    inbox = AsyncInbox(gate)
    for offset in range(3):
        inbox.put([token(offset)])
        gate.flush()
    assert len(loop.calls) == 1
    loop.run()
    inbox.put([token(3)])
    gate.flush()
    assert len(loop.calls) == 1, "what comes after a hand-over needs another"
    loop.run()

    async def read() -> list[int]:
        return [(await inbox.next()).offset for _ in range(4)]

    assert asyncio.run(read()) == [0, 1, 2, 3]
