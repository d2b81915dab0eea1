"""The memory for answers: its limit while they run, and which ones wait, are ended or forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from client.gateway.errors import GatewayError, UnknownAnswer
from client.gateway.reattach import Kept, Store, Transcript
from client.gateway.sse import Source
from tests.harness import PATIENCE_S

EVENT_BYTES = 952  # 1000 with the overhead of an event
COUNT = 100
ROOM = 50_000


class Answer:
    """An answer of `count` events, made as fast as the store accepts them."""

    def __init__(self, store: Store, name: str, *, grace_s: float | None, count: int = COUNT):
        self.made = 0
        self.ended = False
        self.kept = Kept(name, "me", "chat")
        self._count = count
        self.transcript: Transcript = store.run(
            self.kept, self._source(), self._failed, grace_s=grace_s, on_end=self._end
        )

    async def _source(self) -> Source:
        for number in range(self._count):
            await asyncio.sleep(0)
            self.made += 1
            id_line = b"id: %b:%d\n" % (self.kept.id.encode(), number + 1)
            yield [id_line.ljust(EVENT_BYTES, b"x")]

    def _failed(self, error: GatewayError) -> list[bytes]:
        return [f"failed {error.info.code}".encode()]

    def _end(self) -> None:
        self.ended = True


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))


async def settled() -> None:
    """Wait until all tasks are blocked."""
    for _ in range(20 * COUNT):
        await asyncio.sleep(0)


async def all_of(source: Source) -> list[bytes]:
    return [event async for events in source for event in events]


def test_unread_answers_wait_and_a_reader_gets_them_completely() -> None:
    async def test() -> None:
        store = Store(1000, ROOM)
        answers = [Answer(store, f"a{number}", grace_s=600) for number in range(4)]
        await settled()
        assert store.size_bytes <= ROOM + len(answers) * 1000
        assert 40 <= sum(answer.made for answer in answers) <= 60
        assert not any(answer.ended for answer in answers)
        for answer in answers[:1]:
            found = await all_of(answer.transcript.read())
            assert len(found) == COUNT and found[-1].startswith(b"id: a0:100\n")
        assert store.size_bytes <= ROOM + len(answers) * 1000
        await store.close()

    run(test)


def test_the_oldest_answer_that_nobody_reads_makes_room_for_one_that_is_read() -> None:
    async def test() -> None:
        store = Store(1000, ROOM)
        unread = [Answer(store, f"a{number}", grace_s=600) for number in range(3)]
        await settled()
        reader = Answer(store, "read", grace_s=600, count=1000)
        reading = asyncio.create_task(all_of(reader.transcript.read()))
        assert len(await reading) == 1000
        assert store.size_bytes <= ROOM + 4000
        ended = [answer.ended for answer in unread]
        assert ended[0] and ended == sorted(ended, reverse=True)
        # A reader that comes back gets the reason.
        assert await all_of(unread[0].transcript.read(2)) == [b"failed overloaded"]
        await store.close()

    run(test)


def test_background_answers_go_on_and_the_oldest_makes_room() -> None:
    async def test() -> None:
        store = Store(1000, ROOM)
        answers = [Answer(store, f"a{number}", grace_s=None, count=30) for number in range(3)]
        await settled()
        assert all(answer.ended for answer in answers)
        assert await all_of(answers[0].transcript.read()) == [b"failed overloaded"]
        assert len(await all_of(answers[2].transcript.read())) == 30
        alone = Answer(store, "alone", grace_s=None)
        await settled()
        assert alone.ended and await all_of(alone.transcript.read()) == [b"failed overloaded"]
        assert store.size_bytes <= ROOM

    run(test)


def test_a_slow_reader_holds_its_answer_back_once_memory_is_short() -> None:
    async def test() -> None:
        store = Store(1000, ROOM)
        answer = Answer(store, "slow", grace_s=600, count=1000)
        reading = answer.transcript.read()
        found = list(await anext(reading))
        await settled()
        assert answer.made <= 60 and store.size_bytes <= ROOM + 1000
        async for events in reading:
            found += events
            assert store.size_bytes <= ROOM + 1000
        assert len(found) == len(set(found)) == 1000
        # Its start was dropped: a reader of the start gets an error, the rest can be read.
        with pytest.raises(UnknownAnswer):
            await anext(answer.transcript.read())
        assert answer.transcript.behind("slow:5", 5) is None
        after = answer.transcript.behind("slow:990", 990)
        assert after is not None and len(await all_of(answer.transcript.read(after))) == 10

    run(test)


def test_an_answer_whose_reader_left_can_be_ended_to_make_room() -> None:
    async def test() -> None:
        store = Store(1000, ROOM)
        left = Answer(store, "left", grace_s=600, count=1000)
        reading = left.transcript.read()
        await anext(reading)
        await settled()
        waiting = Answer(store, "waits", grace_s=600, count=1000)
        whole = asyncio.create_task(all_of(waiting.transcript.read()))
        await settled()
        await reading.aclose()
        assert len(await whole) == 1000 and left.ended
        await store.close()

    run(test)


def test_finished_answers_are_dropped_first_oldest_first() -> None:
    async def test() -> None:
        store = Store(1000, ROOM)
        over = [Answer(store, f"a{number}", grace_s=600, count=15) for number in range(3)]
        await settled()
        assert all(answer.ended for answer in over)
        running = Answer(store, "new", grace_s=600, count=15)
        await settled()
        assert running.ended
        with pytest.raises(UnknownAnswer):
            store.find("a0", "me", "chat")
        assert len(await all_of(store.find("a2", "me", "chat").transcript.read())) == 15

    run(test)


def test_the_number_of_answers_is_limited() -> None:
    async def test() -> None:
        store = Store(2, ROOM)
        answers = [Answer(store, f"a{number}", grace_s=600) for number in range(4)]
        await settled()
        assert [answer.ended for answer in answers] == [True, True, False, False]
        with pytest.raises(UnknownAnswer):
            store.find("a0", "me", "chat")
        await store.close()

    run(test)


def test_the_end_of_a_grace_period_makes_room_for_waiting_answers() -> None:
    async def test() -> None:
        store = Store(1000, ROOM)
        short = Answer(store, "short", grace_s=600)
        reading = short.transcript.read()
        await settled()
        other = Answer(store, "other", grace_s=600, count=60)
        await settled()
        assert not other.ended
        await anext(reading)
        store.drop(short.kept)
        await settled()
        assert short.ended
        assert len(await all_of(other.transcript.read())) == 60
        assert store.size_bytes <= ROOM + 10_000

    run(test)


def test_a_value_without_events_counts_as_it_grows_and_is_kept_no_longer_than_there_is_room() -> (
    None
):
    store = Store(1000, ROOM)
    making: Any = SimpleNamespace(over=False)
    done: Any = SimpleNamespace(over=True)
    store.put(Kept("done", "me", "response", done, 20_000))
    kept = Kept("grows", "me", "response", making, 10_000)
    store.put(kept)
    kept.grew(25_000)
    with pytest.raises(UnknownAnswer):
        store.find("done", "me", "response")
    assert store.find("grows", "me", "response") is kept and store.size_bytes == 35_000
    kept.grew(25_000)
    with pytest.raises(UnknownAnswer):
        store.find("grows", "me", "response")
    assert store.size_bytes == 0
    kept.grew(25_000)
    assert store.size_bytes == 0


def test_a_regenerated_answer_replaces_the_first() -> None:
    async def test() -> None:
        store = Store(1000, ROOM)
        first = Answer(store, "a", grace_s=600, count=20)
        await settled()
        again = Answer(store, "a", grace_s=600, count=20)
        await settled()
        assert store.find("a", "me", "chat") is again.kept and first.ended
        assert store.size_bytes == again.kept.size_bytes == 20_000

    run(test)
