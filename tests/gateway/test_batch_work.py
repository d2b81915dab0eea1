"""The parts of a batch by themselves: room for lines, working through them, their two kinds of
files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from client import InvalidRequest
from client.gateway.batches.lines import Line, check, lines
from client.gateway.batches.output import Output
from client.gateway.batches.work import Room, work_through


def line(custom_id: str, **body: Any) -> Line:
    raw = msgspec.Raw(msgspec.json.encode({"model": "m", **body}))
    return Line(custom_id=custom_id, method="POST", url="/v1/embeddings", body=raw)


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


# --- room -----------------------------------------------------------------------------------------


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_a_line_that_finds_no_room_waits_for_its_turn() -> None:
    async def work() -> None:
        room, entered = Room(lambda _: 2), []

        async def come(who: int) -> None:
            await room.enter("m")
            entered.append(who)

        tasks = [asyncio.create_task(come(i)) for i in range(4)]
        await settled()
        assert entered == [0, 1]
        room.leave("m")
        await settled()
        assert entered == [0, 1, 2] and room.inside("m") == 2
        for _ in range(3):
            room.leave("m")
            await settled()
        assert entered == [0, 1, 2, 3] and room.inside("m") == 0
        await asyncio.gather(*tasks)

    run(work())


def test_names_have_room_of_their_own_and_limits_may_change() -> None:
    async def work() -> None:
        limits = {"a": 0, "b": 1}
        room = Room(lambda name: limits[name])
        waiting = asyncio.create_task(room.enter("a"))
        await room.enter("b")
        await settled()
        assert not waiting.done()
        limits["a"] = 1
        room.look()
        await waiting
        assert (room.inside("a"), room.inside("b")) == (1, 1)

    run(work())


def test_a_turn_that_is_given_up_goes_to_the_next() -> None:
    async def work() -> None:
        room = Room(lambda _: 1)
        await room.enter("m")
        first, second = (asyncio.create_task(room.enter("m")) for _ in range(2))
        await settled()
        first.cancel()
        await settled()
        third = asyncio.create_task(room.enter("m"))
        await settled()
        # Admitted and cancelled in the same step: its place must not be lost.
        room.leave("m")
        second.cancel()
        await asyncio.wait_for(third, 5)
        assert room.inside("m") == 1
        with contextlib.suppress(asyncio.CancelledError):
            await second

    run(work())


def test_who_wants_an_open_name_is_sent_away_when_it_closes() -> None:
    async def work() -> None:
        limits = {"m": 1}
        room = Room(lambda name: limits[name])
        assert await room.enter("m", while_open=True)
        waits = asyncio.create_task(room.enter("m"))
        wants = asyncio.create_task(room.enter("m", while_open=True))
        await settled()
        limits["m"] = 0
        room.look()
        assert not await wants and not await room.enter("m", while_open=True)
        room.leave("m")
        await settled()
        assert not waits.done() and room.inside("m") == 0
        opened = asyncio.create_task(room.opened("m"))
        await settled()
        assert not opened.done()
        limits["m"] = 1
        room.look()
        await opened
        assert await waits and room.inside("m") == 1

    run(work())


# --- working through ------------------------------------------------------------------------------


class Work:
    """Lines that enter, are answered and leave."""

    def __init__(self, most: int = 3) -> None:
        self.room = Room(lambda _: most)
        self.answered: list[str] = []
        self.left: list[str] = []
        self.most = 0
        self.fails = ""
        self.hangs = False
        self.full = asyncio.Event()

    async def enter(self, line: Line) -> None:
        await self.room.enter("")

    def leave(self, line: Line) -> None:
        self.left.append(line.custom_id)
        self.room.leave("")

    async def answer(self, line: Line) -> None:
        self.most = max(self.most, self.room.inside(""))
        if self.most == 3:
            self.full.set()
        await asyncio.sleep(0)
        if line.custom_id == self.fails:
            raise InvalidRequest("it fails")
        if self.hangs:
            await asyncio.Event().wait()
        self.answered.append(line.custom_id)

    async def through(self, lines: Iterator[Line]) -> None:
        await work_through(lines, self.enter, self.answer, self.leave)


NAMES = [f"l{i}" for i in range(100)]


def test_every_line_is_answered_once_and_never_more_at_a_time_than_allowed() -> None:
    work = Work()
    run(work.through(map(line, NAMES)))
    assert sorted(work.answered) == sorted(NAMES) == sorted(work.left)
    assert work.most == 3 and work.room.inside("") == 0


def test_the_first_failure_ends_the_rest_and_is_raised() -> None:
    work = Work()
    work.fails = "l50"
    with pytest.raises(InvalidRequest, match="it fails"):
        run(work.through(map(line, NAMES)))
    assert len(work.answered) < 60 and work.room.inside("") == 0


def test_cancelled_lines_leave() -> None:
    async def cancel(work: Work) -> None:
        task = asyncio.create_task(work.through(map(line, NAMES)))
        await work.full.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.room.inside("") == 0 and len(work.left) == 3

    work = Work()
    work.hangs = True
    run(cancel(work))
    assert work.answered == []


# --- files ----------------------------------------------------------------------------------------


def answer(custom_id: str, status: int = 200, **usage: Any) -> dict[str, Any]:
    body = {"usage": usage} if usage else {}
    return {"custom_id": custom_id, "response": {"status_code": status, "body": body}}


def test_a_tally_counts_the_tokens_of_every_kind_of_answer(tmp_path: Path) -> None:
    with Output(tmp_path / "out") as output:
        output.write(
            answer(
                "chat",
                prompt_tokens=10,
                completion_tokens=5,
                prompt_tokens_details={"cached_tokens": 4},
                completion_tokens_details={"reasoning_tokens": 2},
            )
        )
        output.write(
            answer(
                "response",
                input_tokens=100,
                output_tokens=50,
                input_tokens_details={"cached_tokens": 40},
                output_tokens_details={"reasoning_tokens": 20},
            )
        )
        output.write(answer("vectors", prompt_tokens=1000, total_tokens=1000))
        output.write(answer("wrong", 400))
        output.write(answer("strange", prompt_tokens="many"))
        first = output.written
    with Output(tmp_path / "out") as output:
        again = output.before
        assert output.done == {"chat", "response", "vectors", "wrong", "strange"}
    for tally in (first, again):
        assert (tally.completed, tally.failed) == (4, 1)
        assert (tally.prompt_tokens, tally.completion_tokens) == (1110, 55)
        assert (tally.cached_tokens, tally.reasoning_tokens) == (44, 22)


def test_a_broken_line_is_cut_off_only_in_a_file_of_our_own(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with Output(path) as output:
        for name in ("a", "b", "c"):
            output.write(answer(name))
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + b"\0" * len(whole[1]) + whole[2])
    broken = path.read_bytes()
    with pytest.raises(InvalidRequest, match="not a batch answer"):
        Output(path)
    assert path.read_bytes() == broken
    with Output(path, own=True) as output:
        assert output.done == {"a"} and output.torn_bytes == len(broken) - len(whole[0])
        output.write(answer("b"))
    assert path.read_bytes() == whole[0] + whole[1]


def test_nothing_follows_a_line_that_was_written_in_part(tmp_path: Path) -> None:
    class Full:
        """A disk with room for a part of a line."""

        def __init__(self, file: Any) -> None:
            self._file = file
            self.fileno, self.flush, self.close = file.fileno, file.flush, file.close

        def write(self, data: bytes) -> None:
            self._file.write(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "out"
    with Output(path) as output:
        output.write(answer("a"))
        whole = output._file
        output._file = Full(whole)  # type: ignore[assignment]
        with pytest.raises(OSError, match="No space"):
            output.write(answer("b"))
        output._file = whole
        for work in (lambda: output.write(answer("c")), output.sync):
            with pytest.raises(OSError, match="in part"):
                work()
    with Output(path) as output:
        assert output.done == {"a"} and output.torn_bytes == 10


def test_a_long_line_is_refused_without_being_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "in"
    text = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}})
    path.write_text(f"{text}\n{'x' * 1000}\n{text}\n")
    [mistake] = check(path, line_bytes=100, most_mistakes=10).mistakes
    assert (mistake.code, mistake.line) == ("line_too_large", 2)
    [mistake] = check(path, most_lines=0, most_mistakes=10).mistakes
    assert (mistake.code, mistake.line) == ("too_many_requests", 1)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "in"
    text = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}})
    path.write_text(f"{text}\n", encoding="utf-8-sig")
    assert check(path).mistakes == []
    assert [each.custom_id for each in lines(path)] == ["a"]


def test_an_input_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text("nonsense\n")
    with pytest.raises(InvalidRequest, match="line 1, was changed"):
        list(lines(path))
