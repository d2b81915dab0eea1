"""An answer as it arrives, for both clients.

`completion.StreamState` tracks what was read. `Stream` and `AsyncStream` differ only in how they
wait. Whatever makes a caller stop reading (break, close, an exception, garbage collection) cancels
the request at the worker.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, Self

from broker.protocol.messages import (
    Piece,
    PieceKind,
)
from client.closing import AsyncClosing, Closing
from client.completion import Completion, StreamState, pieces_of, text_of
from client.core.events import (
    End,
    Item,
    Queued,
    Recovering,
    Started,
    StreamEvent,
    Tokens,
)
from client.core.shapes import T
from client.errors import BusError

if TYPE_CHECKING:
    import asyncio  # never at run time: a blocking program need not load it

    from typing_extensions import TypeVar

    #: What an inbox holds.
    Held = TypeVar("Held", default=Item)
else:
    from typing import TypeVar

    Held = TypeVar("Held")


class _Reading:
    """Properties that both kinds of stream have."""

    def __init__(self, state: StreamState, owner: object) -> None:
        self._state = state
        #: The client, kept alive as long as one of its streams is.
        self._owner = owner

    @property
    def end(self) -> End:
        """How it ended; only available once it is over. Raises the error if it failed."""
        if self._state.error is not None:
            raise self._state.error
        if self._state.end is None:
            raise RuntimeError("the stream is not over; read it to its end first")
        return self._state.end

    @property
    def request_id(self) -> str:
        """First hex digits of the request id, as logs of broker and worker show them."""
        return self._state.request_id

    @property
    def model(self) -> str:
        """The model; if the caller left it out, known once the request has started."""
        return self._state.model

    @property
    def worker(self) -> str:
        """The worker that runs it; empty if none does."""
        return self._state.worker

    @property
    def queued(self) -> Queued | None:
        """Its place in the queue and its expected start from now, while it waits for a worker."""
        queued = self._state.queued
        if queued is None or queued.starts_in_s is None:
            return queued
        left_s = queued.starts_in_s - (time.monotonic() - self._state.queued_at_s)
        return replace(queued, starts_in_s=max(0.0, left_s))

    @property
    def resumed(self) -> int:
        """How often the stream was continued after an interruption."""
        return self._state.resumed

    @property
    def seed(self) -> int:
        """The seed of its sampling."""
        return self._state.seed

    @property
    def text_so_far(self) -> str:
        """The text read so far."""
        return self._state.text

    @property
    def reasoning_so_far(self) -> str:
        """What was thought in what was read so far."""
        return self._state.reasoning

    def close(self) -> None:
        """Stop reading; cancels the request at the worker if it has not ended. Idempotent."""
        self._state.drop()

    def __del__(self) -> None:
        self._state.drop()


class PassingSink:
    """A sink that stands before another: what is added passes through `add` on its way."""

    __slots__ = ("add", "wake")

    def __init__(self, add: Callable[[Item], None], wake: Callable[[], None]) -> None:
        self.add = add
        self.wake = wake


class Inbox(Generic[Held]):
    """The sink of a blocking consumer."""

    __slots__ = ("_added", "_queue")

    def __init__(self) -> None:
        self._queue: SimpleQueue[Sequence[Held]] = SimpleQueue()
        #: In this round.
        self._added: list[Held] = []

    def add(self, item: Held) -> None:
        """In the transport's thread."""
        self._added.append(item)

    def wake(self) -> None:
        """In the transport's thread."""
        if self._added:
            added, self._added = self._added, []
            self._queue.put(added)

    def get(self) -> Sequence[Held]:
        """Wait for the next items. The session's own limits end every wait."""
        return self._queue.get()


class Stream(_Reading, Closing, Generic[T]):
    """A stream of a `Client`: iterate over it for events, over `.text` for text; `result()` reads.

    One thread reads a stream. Leaving the loop early cancels the request.
    """

    def __init__(self, state: StreamState, inbox: Inbox, owner: object) -> None:
        super().__init__(state, owner)
        self._inbox = inbox
        #: Received but not yet handed to the application.
        self._items: deque[Item] = deque()

    def __iter__(self) -> Iterator[StreamEvent]:
        state, items, take = self._state, self._items, self._state.take
        try:
            while not state.over:
                if not items:
                    items.extend(self._inbox.get())
                while items and not state.over:
                    yield take(items.popleft())
        finally:
            self.close()

    @property
    def text(self) -> Iterator[str]:
        """The text in the pieces in which it arrives."""
        for event in self:
            piece = text_of(event)
            if piece:
                yield piece

    @property
    def pieces(self) -> Iterator[Piece]:
        """Thoughts and text in the pieces in which they arrive: `kind` and `text`."""
        for event in self:
            yield from pieces_of(event)

    def result(self) -> Completion[T]:
        """Read to the end. Raises the error if the request failed."""
        for _ in self:
            pass
        return self._state.completion()


class AsyncInbox(Generic[Held]):
    """The sink of an asyncio consumer; everything happens in its loop."""

    __slots__ = ("_future", "_waiter", "add", "items")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        #: A future of the loop, and the method that adds an item, bound once since it is called
        #: for every token.
        self._future = loop.create_future
        #: Arrived but not yet read.
        self.items: deque[Held] = deque()
        self.add: Callable[[Held], None] = self.items.append
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """What was added can be read."""
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():  # cancelled
                waiter.set_result(None)

    def waiter(self) -> asyncio.Future[None]:
        """Await this while there are no items; then check again."""
        self._waiter = waiter = self._future()
        return waiter

    async def next(self) -> Held:
        """Wait for the next item."""
        while not self.items:
            await self.waiter()
        return self.items.popleft()


class AsyncStream(_Reading, AsyncClosing, Generic[T]):
    """A stream of an `AsyncClient`. Like `Stream`, with `async for` and `await`.

    One task reads a stream. Leaving the loop early or cancelling the task cancels the request.
    """

    def __init__(self, state: StreamState, inbox: AsyncInbox, owner: object) -> None:
        super().__init__(state, owner)
        self._inbox = inbox

    def __aiter__(self) -> AsyncIterator[StreamEvent]:
        return _Events(self)

    @property
    def text(self) -> AsyncIterator[str]:
        """The text in the pieces in which it arrives."""
        return _Texts(_Events(self))

    @property
    def pieces(self) -> AsyncIterator[Piece]:
        """Thoughts and text in the pieces in which they arrive: `kind` and `text`."""
        return _Pieces(_Events(self))

    @property
    def batches(self) -> AsyncIterator[list[StreamEvent]]:
        """The events in batches as they arrived, for callers that pass them on."""
        return _Batches(_Events(self))

    async def result(self) -> Completion[T]:
        """Read to the end. Raises the error if the request failed."""
        async for _ in self:
            pass
        return self._state.completion()

    async def aclose(self) -> None:
        """The same as `close`, for `contextlib.aclosing`."""
        self.close()


class _Events:
    """One iteration. An object rather than an asynchronous generator: Python closes an abandoned
    generator only some time later, this one at once."""

    def __init__(self, stream: AsyncStream) -> None:
        #: Keeps the stream alive: `async for event in await client.chat(...)` refers only to this.
        self._stream = stream
        self._state = stream._state
        self._inbox = stream._inbox
        self._items = stream._inbox.items

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent:
        state = self._state
        if state.over:
            raise StopAsyncIteration
        items = self._items
        while not items:
            try:
                await self._inbox.waiter()
            except BaseException:
                state.drop()
                raise
        return state.take(items.popleft())

    def __del__(self) -> None:
        self._state.drop()


class _Batches:
    """Batches of all events that have arrived."""

    def __init__(self, events_: _Events) -> None:
        self._events = events_
        self._state = events_._state
        self._items = events_._items

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[StreamEvent]:
        batch = [await anext(self._events)]
        state, items = self._state, self._items
        # An error waits for its turn, so that what came before it is not lost.
        while items and not state.over and not isinstance(items[0], BusError):
            batch.append(state.take(items.popleft()))
        return batch


class _Pieces:
    """The typed pieces of an iteration."""

    def __init__(self, events_: _Events) -> None:
        self._events = events_
        self._left: deque[Piece] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        while not self._left:
            self._left.extend(pieces_of(await anext(self._events)))
        return self._left.popleft()


class _Texts:
    """The text pieces of an iteration."""

    def __init__(self, events_: _Events) -> None:
        self._events = events_

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while True:
            piece = text_of(await anext(self._events))
            if piece:
                return piece


__all__ = [
    "AsyncStream",
    "Completion",
    "Piece",
    "PieceKind",
    "Queued",
    "Recovering",
    "Started",
    "Stream",
    "StreamEvent",
    "Tokens",
]
