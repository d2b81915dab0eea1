"""Several answers to one question as they arrive (`n`), for both faces.

Each is a request of its own, with a stream that survives on its own; here they come together, in
the order in which their events arrive. Whatever makes a caller stop reading cancels all of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Generic, Self

from client.closing import AsyncClosing, Closing
from client.completion import Completion, StreamState, text_of
from client.core.events import Item, StreamEvent
from client.core.shapes import T
from client.io.driver import Sink
from client.stream import AsyncInbox, Inbox, PassingSink

__all__ = ["AsyncChoiceStream", "ChoiceStream"]

#: Which of the answers, from 0, and what arrived of it.
Numbered = tuple[int, Item]


class _Choices(Generic[T]):
    """What both faces show of the streams."""

    def __init__(
        self,
        inbox: Inbox[Numbered] | AsyncInbox[Numbered],
        starts: Sequence[Callable[[Sink], StreamState]],
        owner: object,
    ) -> None:
        """`starts`: each sends one request, whose items go into the sink that it is given."""
        #: The client, kept alive as long as one of its streams is.
        self._owner = owner
        self._states: list[StreamState] = []
        for choice, start in enumerate(starts):
            add = _numbering(choice, inbox.add)
            self._states.append(start(PassingSink(add, inbox.wake)))

    @property
    def over(self) -> bool:
        """Nothing more will come of any."""
        return all(state.over for state in self._states)

    def close(self) -> None:
        """Take no more; cancels at the workers what has not ended. Idempotent."""
        for state in self._states:
            state.drop()

    def __del__(self) -> None:
        self.close()

    def _completions(self) -> list[Completion[Any]]:
        return [state.completion() for state in self._states]


def _numbering(choice: int, add: Callable[[Numbered], None]) -> Callable[[Item], None]:
    return lambda item: add((choice, item))


class ChoiceStream(_Choices[T], Closing):
    """The answers of `Client.chat(..., n=3, stream=True)`: iterate over it for `(choice, event)`,
    over `.text` for `(choice, piece)`; `result()` reads all to their ends.

    One thread reads it. Leaving the loop early cancels all of them, and so does the failure of one.
    """

    def __init__(self, starts: Sequence[Callable[[Sink], StreamState]], owner: object) -> None:
        self._inbox: Inbox[Numbered] = Inbox()
        super().__init__(self._inbox, starts, owner)

    def __iter__(self) -> Iterator[tuple[int, StreamEvent]]:
        try:
            while not self.over:
                for choice, item in self._inbox.get():
                    state = self._states[choice]
                    if not state.over:
                        yield choice, state.take(item)
        finally:
            self.close()

    @property
    def text(self) -> Iterator[tuple[int, str]]:
        """The text in the pieces in which it arrives, each with the number of its answer."""
        for choice, event in self:
            piece = text_of(event)
            if piece:
                yield choice, piece

    def result(self) -> list[Completion[T]]:
        """Read all to their ends. Raises what ended one of them, if it was not its end."""
        for _ in self:
            pass
        return self._completions()


class AsyncChoiceStream(_Choices[T], AsyncClosing):
    """Like `ChoiceStream`, with `async for` and `await`; one task reads it."""

    def __init__(
        self,
        inbox: AsyncInbox[Numbered],
        starts: Sequence[Callable[[Sink], StreamState]],
        owner: object,
    ) -> None:
        self._inbox = inbox
        super().__init__(inbox, starts, owner)

    def __aiter__(self) -> AsyncIterator[tuple[int, StreamEvent]]:
        return _Events(self)

    @property
    def text(self) -> AsyncIterator[tuple[int, str]]:
        """The text in the pieces in which it arrives, each with the number of its answer."""
        return _Texts(_Events(self))

    async def result(self) -> list[Completion[T]]:
        """Read all to their ends. Raises what ended one of them, if it was not its end."""
        async for _ in self:
            pass
        return self._completions()

    async def aclose(self) -> None:
        """The same as `close`, for `contextlib.aclosing`."""
        self.close()


class _Events:
    """One iteration; an object for the reason that `stream._Events` is one."""

    def __init__(self, stream: AsyncChoiceStream[Any]) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, StreamEvent]:
        stream = self._stream
        try:
            while not stream.over:
                choice, item = await stream._inbox.next()
                state = stream._states[choice]
                if not state.over:
                    return choice, state.take(item)
        except BaseException:
            stream.close()
            raise
        raise StopAsyncIteration

    def __del__(self) -> None:
        self._stream.close()


class _Texts:
    """The text pieces of an iteration."""

    def __init__(self, events: _Events) -> None:
        self._events = events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, str]:
        while True:
            choice, event = await anext(self._events)
            piece = text_of(event)
            if piece:
                return choice, piece
