"""What a stream reports to the session as the application reads, and how items enter a loop."""

from __future__ import annotations

import asyncio

import pytest

from broker.protocol.messages import TokensEvent
from client.completion import StreamState
from client.core import events
from client.core.events import Item, Started
from client.stream import AsyncInbox

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


def test_reading_is_reported_every_quarter_of_the_window_and_not_for_the_first_token() -> None:
    state, told = reading(window_tokens=8)
    for offset in range(5):
        state.take(token(offset))
    assert told == [events.TokensTaken(ID, 2), events.TokensTaken(ID, 4)]


def test_with_a_window_of_one_token_every_token_is_reported() -> None:
    state, told = reading(window_tokens=1)
    for offset in range(3):
        state.take(token(offset))
    assert told == [events.TokensTaken(ID, taken) for taken in (1, 2, 3)]


def test_a_stream_resumed_elsewhere_counts_from_what_has_been_read() -> None:
    state, told = reading(window_tokens=8)
    state.take(token(0))
    state.take(started(window_tokens=8))
    state.take(token(1))
    assert not told
    state.take(token(2))
    assert told == [events.TokensTaken(ID, 3)]


def test_a_waiting_reader_is_woken_once_for_many_items() -> None:
    async def read() -> tuple[int, list[int]]:
        inbox = AsyncInbox(asyncio.get_running_loop())
        woken = 0
        seen: list[int] = []

        async def reader() -> None:
            nonlocal woken
            while len(seen) < 4:
                await inbox.waiter()
                woken += 1
                while inbox.items:
                    item = inbox.items.popleft()
                    assert isinstance(item, TokensEvent)
                    seen.append(item.offset)

        task = asyncio.ensure_future(reader())
        await asyncio.sleep(0)  # now the reader waits
        for offset in range(3):
            inbox.add(token(offset))
        inbox.wake()
        await asyncio.sleep(0)
        inbox.add(token(3))
        inbox.wake()
        await task
        return woken, seen

    assert asyncio.run(read()) == (2, [0, 1, 2, 3])


def test_items_for_a_cancelled_reader_do_no_harm() -> None:
    async def main() -> Item:
        inbox = AsyncInbox(asyncio.get_running_loop())
        task = asyncio.ensure_future(inbox.next())
        await asyncio.sleep(0)
        task.cancel()
        inbox.add(token(0))
        inbox.wake()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await inbox.next()

    assert asyncio.run(main()) == token(0)
