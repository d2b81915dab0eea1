"""Works through the lines of a batch: as many at once as there is room for, each started once.

Knows neither the bus nor an API.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

from client.gateway.batches.lines import Line

__all__ = ["Room", "work_through"]

#: Lines read from the file in one step, in another thread.
_READ_LINES: Final = 16


@dataclass(slots=True, eq=False)
class _Turn:
    """One that waits."""

    has_room: asyncio.Future[bool]
    while_open: bool


class Room:
    """Counts what is in flight under each name; who comes when a name is at its limit waits, first
    come first served. A name whose limit is 0 is closed."""

    def __init__(self, limit: Callable[[str], int]) -> None:
        """`limit`: how many a name may have in flight now; `look` must follow when that rises."""
        self._limit = limit
        self._inside: dict[str, int] = {}
        self._waiting: dict[str, deque[_Turn]] = {}
        #: Set, and replaced, by `look`.
        self._looked = asyncio.Event()

    def inside(self, name: str) -> int:
        """How many are in flight."""
        return self._inside.get(name, 0)

    async def opened(self, name: str) -> None:
        """Wait while the name is closed."""
        while self._limit(name) < 1:
            await self._looked.wait()

    async def enter(self, name: str, *, while_open: bool = False) -> bool:
        """Wait for room. `leave` must follow. `while_open`: return False instead if the name is
        closed before there was room."""
        queue = self._waiting.setdefault(name, deque())
        turn = _Turn(asyncio.get_running_loop().create_future(), while_open)
        queue.append(turn)
        self._admit(name)
        try:
            return await turn.has_room
        except asyncio.CancelledError:
            has_room = turn.has_room
            if turn in queue:
                queue.remove(turn)
                self._admit(name)
            elif not has_room.cancelled() and has_room.result():
                self.leave(name)
            raise

    def leave(self, name: str) -> None:
        """One is over."""
        self._inside[name] -= 1
        self._admit(name)

    def look(self) -> None:
        """Limits have changed."""
        for name in list(self._waiting):
            self._admit(name)
        self._looked.set()
        self._looked = asyncio.Event()

    def _admit(self, name: str) -> None:
        queue, limit = self._waiting.get(name, deque()), self._limit(name)
        while queue and self.inside(name) < limit:
            turn = queue.popleft()
            if not turn.has_room.done():
                self._inside[name] = self.inside(name) + 1
                turn.has_room.set_result(True)
        if limit < 1:
            for turn in [turn for turn in queue if turn.while_open]:
                queue.remove(turn)
                if not turn.has_room.done():
                    turn.has_room.set_result(False)
        if not queue:
            self._waiting.pop(name, None)
            if not self.inside(name):
                self._inside.pop(name, None)


async def work_through(
    lines: Iterator[Line],
    enter: Callable[[Line], Awaitable[None]],
    answer: Callable[[Line], Awaitable[None]],
    leave: Callable[[Line], None],
) -> None:
    """Start `answer` for every line once `enter` returned for it; returns when all are answered.

    `leave` is called for every line that entered, however its answer ended. The first failure ends
    what runs, and is raised; so does cancellation.
    """
    running: set[asyncio.Task[None]] = set()
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ended(line: Line, task: asyncio.Task[None]) -> None:
        running.discard(task)
        leave(line)
        error = None if task.cancelled() else task.exception()
        if error is not None and not failed.done():
            failed.set_exception(error)

    async def feed() -> None:
        while some := await asyncio.to_thread(_some, lines):
            for line in some:
                await enter(line)
                task = asyncio.ensure_future(_run(answer, line))
                running.add(task)
                task.add_done_callback(partial(ended, line))
        while running:
            await asyncio.wait(set(running))

    feeding = asyncio.create_task(feed())
    try:
        await asyncio.wait({feeding, failed}, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            failed.result()
        feeding.result()
    finally:
        feeding.cancel()
        for task in running:
            task.cancel()
        await asyncio.gather(feeding, *running, return_exceptions=True)
        if failed.done():
            failed.exception()  # seen


async def _run(answer: Callable[[Line], Awaitable[None]], line: Line) -> None:
    await answer(line)


def _some(lines: Iterator[Line]) -> list[Line]:
    return list(islice(lines, _READ_LINES))
