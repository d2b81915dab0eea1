"""Answers that outlive the connection they are read on, and answers kept for a follow-up.

A `Transcript` runs the source of an answer in a task of its own and keeps its events, numbered from
1, so that a reader who lost the connection goes on where it stopped. When nobody reads, the task is
cancelled after a grace time, which cancels at the worker; an answer in the background runs on.

The store is bounded in entries and octets: the oldest finished answers go first. It is this
gateway's memory alone; other gateways ask for what it keeps (`peers`). Without them, what holds is
told in `openai_chat`: the same request sent again with `Last-Event-ID` is continued anywhere,
because an answer follows from its seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from client.gateway.errors import GatewayError, UnknownAnswer, describe
from client.gateway.sse import Source

__all__ = ["Kept", "Store", "Transcript"]

#: Events that a reader who comes back gets in one write.
_READ_EVENTS: Final = 64


class Transcript:
    """The events of one answer, running or over."""

    def __init__(
        self,
        source: Source,
        on_error: Callable[[GatewayError], list[bytes]],
        *,
        grace_s: float | None,
        on_end: Callable[[], None],
    ) -> None:
        """`grace_s`: how long it runs while nobody reads; None: to its end."""
        self._events: list[bytes] = []
        self._on_error = on_error
        self._grace_s = grace_s
        self._on_end = on_end
        self._readers = 0
        self._changed = asyncio.Event()
        self._first_error: BaseException | None = None
        self._giving_up: asyncio.TimerHandle | None = None
        self.over = False
        self.size_bytes = 0
        self._task = asyncio.create_task(self._run(source))

    async def _run(self, source: Source) -> None:
        try:
            async with contextlib.aclosing(source):
                async for events in source:
                    self._append(events)
        except Exception as error:
            if not self._events:
                # Its reader still waits for the status line.
                self._first_error = error
            self._append(self._on_error(describe(error)))
        finally:
            self.over = True
            self._wake()
            self._on_end()

    def _append(self, events: Sequence[bytes]) -> None:
        self._events += events
        self.size_bytes += sum(map(len, events))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, after: int = 0, *, asking: bool = False) -> Source:
        """The events behind number `after`, and those to come.

        `asking`: the reader is the request itself, which hears of a failure before any event by its
        status; a later one reads of it as an event.
        """
        self._readers += 1
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
        position = after
        try:
            while True:
                if position < len(self._events):
                    if self._first_error is not None and asking:
                        raise self._first_error
                    behind = self._events[position : position + _READ_EVENTS]
                    position += len(behind)
                    yield behind
                    continue
                if self.over:
                    return
                await self._changed.wait()
        finally:
            self._readers -= 1
            if not self._readers and not self.over and self._grace_s is not None:
                # Without an event nobody knows what to come back for.
                wait_s = self._grace_s if self._events else 0.0
                loop = asyncio.get_running_loop()
                self._giving_up = loop.call_later(wait_s, self._task.cancel)

    def cancel(self) -> None:
        """Stop it now, at the worker too."""
        self._task.cancel()

    async def finished(self) -> None:
        """Wait until it is over, however it ends."""
        await asyncio.wait({self._task})


@dataclass(slots=True)
class Kept:
    """An answer in the store."""

    id: str
    #: Name of the key that asked; nobody else sees it.
    owner: str
    transcript: Transcript | None = None
    #: What the endpoint wants to find again.
    value: Any = None
    value_bytes: int = 0
    _: dataclasses.KW_ONLY
    #: The endpoint that made it: "chat", "completion", "response".
    kind: str = ""

    @property
    def over(self) -> bool:
        return self.transcript is None or self.transcript.over

    @property
    def size_bytes(self) -> int:
        return self.value_bytes + (self.transcript.size_bytes if self.transcript else 0)


@dataclass(slots=True)
class Store:
    """A bounded number of answers, found by id and owner."""

    max_entries: int
    max_bytes: int
    _entries: OrderedDict[str, Kept] = field(default_factory=OrderedDict)

    def put(self, kept: Kept) -> None:
        """Keep an answer; the oldest finished ones make room."""
        self._entries[kept.id] = kept
        size = sum(kept.size_bytes for kept in self._entries.values())
        for id_, kept in list(self._entries.items()):
            if len(self._entries) <= self.max_entries and size <= self.max_bytes:
                return
            if kept.over:
                size -= kept.size_bytes
                del self._entries[id_]

    def find(self, id_: str, owner: str, kind: str) -> Kept:
        """The answer; raises UnknownAnswer."""
        kept = self._entries.get(id_)
        if kept is None or kept.owner != owner or kept.kind != kind:
            raise UnknownAnswer(
                f"No answer {id_!r} here: it is too old, belongs to another key, was not to be "
                "kept, or was made by a gateway that cannot be asked."
            )
        return kept

    def of(self, owner: str, kind: str) -> Iterator[Kept]:
        """The answers of a kind that this key may see."""
        return (kept for kept in self._entries.values() if (kept.owner, kept.kind) == (owner, kind))

    def has(self, id_: str, owner: str) -> bool:
        """The answer is here and may be read by this key."""
        kept = self._entries.get(id_)
        return kept is not None and kept.owner == owner and kept.transcript is not None

    def drop(self, kept: Kept) -> None:
        """Forget an answer, and stop it if it runs."""
        self._entries.pop(kept.id, None)
        if kept.transcript is not None:
            kept.transcript.cancel()

    async def close(self) -> None:
        """Stop everything that runs."""
        running = [kept.transcript for kept in self._entries.values() if not kept.over]
        for transcript in running:
            if transcript is not None:
                transcript.cancel()
                await transcript.finished()
