"""Answers that outlive their connection, and answers kept for a follow-up.

A `Transcript` runs the source of an answer in its own task and keeps its events, numbered from 1,
so that a reader who lost the connection can continue where it stopped. When nobody reads, the task
is cancelled after a grace period, which cancels at the worker; an answer in the background runs on.

The store is limited in entries and bytes, including running answers as they grow. When it is full,
room is made in this order: finished answers that nobody reads are forgotten, oldest first; events
that every reader of an answer has read are forgotten; the oldest of the answers that run unread is
ended. An answer in its grace period never ends another: it waits, and so (through the bus's window)
does its worker. The same holds for one whose reader is slow.

The store is in this gateway's memory only; other gateways ask for what it keeps (`peers`), and
responses may be in a folder beside it (`openai/responses_folder.py`).
Independently of that, the same request sent again with `Last-Event-ID` is continued at any gateway,
because an answer is determined by its seed (see `openai/position.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from broker.protocol.errors import ErrorCode
from client.gateway.errors import GatewayError, UnknownAnswer, describe
from client.gateway.sse import Source

__all__ = ["Kept", "Store", "Transcript"]

#: Events sent in one write to a reader who comes back.
_READ_EVENTS: Final = 64
#: Memory of an event in addition to its bytes: the object and its list entry.
_EVENT_BYTES: Final = 48


class Transcript:
    """The events of one answer, running or over. `Store.run` makes them."""

    def __init__(
        self,
        store: Store,
        kept: Kept,
        source: Source,
        on_error: Callable[[GatewayError], list[bytes]],
        *,
        grace_s: float | None,
        on_end: Callable[[], None],
        first: int = 0,
    ) -> None:
        """`grace_s`: how long it runs while nobody reads; None means to its end. `first`: the
        number, in its id, of the event before the first."""
        self._store = store
        self._kept = kept
        self._events: list[bytes] = []
        #: Number of forgotten events, before those in `_events`.
        self._forgotten = 0
        self._first = first
        self._on_error = on_error
        self._grace_s = grace_s
        self._on_end = on_end
        #: For each reader, how many events it has received.
        self._readers: dict[object, int] = {}
        self._changed = asyncio.Event()
        self._resume = asyncio.Event()
        self._first_error: BaseException | None = None
        #: Why it was ended early.
        self._given_up: GatewayError | None = None
        self._giving_up: asyncio.TimerHandle | None = None
        self.over = False
        self._task = asyncio.create_task(self._run(source))
        self._task.add_done_callback(self._ended)

    async def _run(self, source: Source) -> None:
        try:
            async with contextlib.aclosing(source):
                async for events in source:
                    self._append(events)
                    if self._store.full:
                        await self._store.make_room(self)
        except Exception as error:
            if not self.begun:
                # Its reader still waits for the status line.
                self._first_error = error
            self._append(self._on_error(describe(error)))

    def _ended(self, task: asyncio.Task[None]) -> None:
        # Not at the end of `_run`, which never begins in a task that is cancelled at once.
        if self._given_up is not None:
            self._append(self._on_error(self._given_up))
        self.over = True
        self._wake()
        self._on_end()
        self._store.changed()

    def _append(self, events: Sequence[bytes]) -> None:
        self._events += events
        self._kept.grew(sum(map(len, events)) + _EVENT_BYTES * len(events))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, after: int = 0, *, asking: bool = False) -> Source:
        """The events after number `after`, and those to come. Raises UnknownAnswer
        for forgotten events.

        `asking`: the reader is the original request, for which a failure before any event becomes
        the HTTP status; a later reader gets it as an event.
        """
        if after < self._forgotten and self._given_up is None:
            raise UnknownAnswer(
                f"The first {self._forgotten} events of {self._kept.id!r} are not kept any more: "
                "the memory for answers (--store-bytes) is full."
            )
        me = object()
        self._readers[me] = position = max(after, self._forgotten)
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
        if self._store.full:
            self._store.changed()
        try:
            while True:
                if position - self._forgotten < len(self._events):
                    if self._first_error is not None and asking:
                        raise self._first_error
                    at = position - self._forgotten
                    behind = self._events[at : at + _READ_EVENTS]
                    yield behind
                    # Only events that were sent count as read: a stalled reader holds them.
                    self._readers[me] = position = position + len(behind)
                    if self._store.full:
                        self._store.was_read(self)
                    continue
                if self.over:
                    return
                await self._changed.wait()
        finally:
            del self._readers[me]
            if not self._readers and not self.over:
                self._store.changed()
                if self._grace_s is not None:
                    # Without an event, no reader could know what to come back for.
                    wait_s = self._grace_s if self.begun else 0.0
                    loop = asyncio.get_running_loop()
                    self._giving_up = loop.call_later(wait_s, self._task.cancel)

    def behind(self, event_id: str, number: int) -> int | None:
        """The position after the event with that id, which contains its number; None if there is no
        such event, because another gateway made it or it is forgotten."""
        place = number - self._first
        at = place - 1 - self._forgotten
        if 0 <= at < len(self._events):
            line = b"id: %b\n" % event_id.encode()
            return place if self._events[at].startswith(line) else None
        return None

    def after(self, number: int) -> int | None:
        """The position after the event with that number; None if that is not certain: where another
        gateway had begun this answer, its reader may have been told other events by that number."""
        return number - self._first if self._first in (0, number) else None

    def cancel(self) -> None:
        """Stop it now, at the worker too."""
        self._task.cancel()

    async def finished(self) -> None:
        """Wait until it is over, however it ends."""
        await asyncio.wait({self._task})

    # --- for the store ---

    @property
    def is_read(self) -> bool:
        """Whether somebody reads it."""
        return bool(self._readers)

    @property
    def begun(self) -> bool:
        """Whether there have been events."""
        return bool(self._forgotten or self._events)

    @property
    def waits(self) -> bool:
        """Whether it may wait: its reader or its grace period will end that."""
        if self._readers:
            return min(self._readers.values()) < self._forgotten + len(self._events)
        return self._grace_s is not None

    def forget_read(self) -> None:
        """Forget the events that every reader has."""
        if self._readers:
            self._forget(min(self._readers.values()) - self._forgotten)

    def give_up(self, error: GatewayError) -> None:
        """End it, and forget unread events."""
        self._given_up = error
        self._forget(len(self._events))
        self._task.cancel()

    def _forget(self, count: int) -> None:
        gone = self._events[:count]
        del self._events[:count]
        self._forgotten += len(gone)
        self._kept.grew(-sum(map(len, gone)) - _EVENT_BYTES * len(gone))

    async def hold(self) -> None:
        """Take nothing from the source until `release`."""
        self._resume.clear()
        await self._resume.wait()

    def release(self) -> None:
        """See `hold`."""
        self._resume.set()


@dataclass(slots=True, eq=False)
class Kept:
    """An answer in the store."""

    id: str
    #: Name of the key that asked; no other key may see it.
    owner: str
    #: What it is: "chat", "response", "conversation", ...
    kind: str
    #: The endpoint's own data; without a transcript, its `over` says when it ended.
    value: Any = None
    #: Size of the value and of the transcript, as far as known.
    size_bytes: int = 0
    transcript: Transcript | None = None
    #: The store that counts it; None if in no store, or no longer.
    store: Store | None = None

    @property
    def over(self) -> bool:
        """Nothing more will be said."""
        return bool(self.value.over) if self.transcript is None else self.transcript.over

    @property
    def is_read(self) -> bool:
        """Whether somebody reads it now."""
        return self.transcript is not None and self.transcript.is_read

    def grew(self, size_bytes: int) -> None:
        """The value or the transcript has grown by this much."""
        self.size_bytes += size_bytes
        if self.store is not None:
            self.store.grew(size_bytes)
            if self.transcript is None and self.store is not None and self.store.full:
                self.store.tidy(self)


@dataclass(slots=True, eq=False)
class Store:
    """A limited number of answers, found by id and owner."""

    max_entries: int
    max_bytes: int
    #: Total size of all entries.
    size_bytes: int = 0
    #: By kind and id.
    _entries: OrderedDict[tuple[str, str], Kept] = field(default_factory=OrderedDict)
    #: Kind and id of the latest that were deleted.
    _deleted: OrderedDict[tuple[str, str], None] = field(default_factory=OrderedDict)
    #: Transcripts that wait for room.
    _held: set[Transcript] = field(default_factory=set)
    #: After room was not found: do not search again before this size or a change.
    _futile_bytes: int = 0

    @property
    def full(self) -> bool:
        """Whether the store is beyond a limit."""
        return self.size_bytes > self.max_bytes

    def put(self, kept: Kept) -> None:
        """Keep an answer; others make room. One that was deleted, and is generated again for a
        reader who comes back to it, is not kept."""
        if self.is_deleted(kept.id, kept.kind):
            return
        if (before := self._entries.get((kept.kind, kept.id))) is not None:
            self.drop(before)
        kept.store = self
        self._entries[kept.kind, kept.id] = kept
        self.size_bytes += kept.size_bytes
        if self.full or self._crowded:
            self._free(may_end=True)

    def run(
        self,
        kept: Kept,
        source: Source,
        on_error: Callable[[GatewayError], list[bytes]],
        *,
        grace_s: float | None,
        on_end: Callable[[], None],
        first: int = 0,
    ) -> Transcript:
        """Keep an answer that runs whether or not it is read; see `Transcript`."""
        kept.transcript = Transcript(
            self, kept, source, on_error, grace_s=grace_s, on_end=on_end, first=first
        )
        self.put(kept)
        return kept.transcript

    def find(self, id_: str, owner: str, kind: str) -> Kept:
        """The answer; raises UnknownAnswer."""
        kept = self._entries.get((kind, id_))
        if kept is None or kept.owner != owner:
            what = "Response" if kind == "response" else "Answer"
            raise UnknownAnswer(
                f"{what} with id {id_!r} not found. It is too old, belongs to another key, was not "
                "to be kept, or was made by a gateway that cannot be asked."
            )
        return kept

    def touch(self, kept: Kept) -> None:
        """It is used: among those that are over it is now the last to make room."""
        if kept.store is self:
            self._entries.move_to_end((kept.kind, kept.id))

    def of(self, owner: str, kind: str) -> Iterator[Kept]:
        """The answers of a kind that this key may see."""
        return (kept for kept in self._entries.values() if (kept.owner, kept.kind) == (owner, kind))

    def drop(self, kept: Kept) -> None:
        """Forget an answer, and stop it if it runs."""
        self._forget(kept)
        if kept.transcript is not None:
            kept.transcript.cancel()
        self.changed()

    def delete(self, kept: Kept) -> None:
        """Forget an answer for good, and stop it if it runs."""
        self._deleted[kept.kind, kept.id] = None
        if len(self._deleted) > self.max_entries:
            self._deleted.popitem(last=False)
        self.drop(kept)

    def is_deleted(self, id_: str, kind: str) -> bool:
        """Whether its owner deleted it, not long ago."""
        return (kind, id_) in self._deleted

    async def close(self) -> None:
        """Stop everything that runs."""
        running = [kept.transcript for kept in self._entries.values() if not kept.over]
        for transcript in running:
            if transcript is not None:
                transcript.cancel()
                await transcript.finished()

    # --- room ---

    def grew(self, size_bytes: int) -> None:
        """An entry has grown by this much."""
        self.size_bytes += size_bytes
        if size_bytes < 0 and not self.full:
            self._release_all()

    def changed(self) -> None:
        """A reader came or left, or an answer is over: there may be room now."""
        self._futile_bytes = 0
        self._release_all()

    def was_read(self, transcript: Transcript) -> None:
        """A reader of this transcript made progress while memory is short."""
        transcript.forget_read()
        if not transcript.waits:
            transcript.release()

    def tidy(self, kept: Kept) -> None:
        """Make room for an answer that is being read, or stop keeping it."""
        self._free(may_end=True)
        if self.full:
            self._forget(kept)

    async def make_room(self, transcript: Transcript) -> None:
        """Wait until the transcript may grow; memory is short."""
        while self.full:
            if self.size_bytes >= self._futile_bytes:
                self._free(may_end=transcript.is_read or not transcript.waits)
                # The search is linear in the number of entries.
                self._futile_bytes = self.size_bytes + self.max_bytes // 64
            if not self.full or not transcript.waits:
                return
            self._held.add(transcript)
            try:
                await transcript.hold()
            finally:
                self._held.discard(transcript)

    def _release_all(self) -> None:
        for transcript in self._held:
            transcript.release()

    def _free(self, *, may_end: bool) -> None:
        """Make room, a little more than needed, so that it is not searched for at every event."""
        enough_bytes = self.max_bytes - self.max_bytes // 8 if self.full else self.max_bytes
        # The entry beyond the limit is the newest, for which room is made.
        entries = list(self._entries.values())[: -1 if self._crowded else None]
        for kept in entries:
            if self.size_bytes <= enough_bytes and not self._crowded:
                return
            if kept.over and not kept.is_read:
                self._forget(kept)
        for kept in entries:
            if self.size_bytes <= enough_bytes:
                break
            if kept.transcript is not None:
                kept.transcript.forget_read()
        for kept in entries:
            if not may_end or not (self.full or self._crowded):
                return
            if kept.transcript is None or kept.over or kept.is_read:
                continue
            # Without an event there is nothing to gain, and its reader is about to come.
            if kept.transcript.begun or self._crowded:
                kept.transcript.give_up(_unread(kept))
                if self._crowded:
                    self._forget(kept)

    @property
    def _crowded(self) -> bool:
        return len(self._entries) > self.max_entries

    def _forget(self, kept: Kept) -> None:
        if self._entries.pop((kept.kind, kept.id), None) is not None:
            kept.store = None
            self.grew(-kept.size_bytes)


def _unread(kept: Kept) -> GatewayError:
    return GatewayError(
        ErrorCode.OVERLOADED,
        f"Answer {kept.id!r} was ended: nobody read it, and the gateway's memory for answers "
        "(--store-bytes, --store-entries) is full. Ask again, and read the answer as it arrives.",
        retryable=True,
    )
