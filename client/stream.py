"""An answer as it arrives, for both clients.

`StreamState` tracks what was read and assembles the `Completion`; it does no IO. `Stream` and
`AsyncStream` differ only in how they wait. Whatever makes a caller stop reading (break, close, an
exception, garbage collection) cancels the request at the worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, cast

from broker.protocol.messages import (
    FinishReason,
    Piece,
    PieceKind,
    PromptEvent,
    Timings,
    TokenLogprob,
    TokensEvent,
    Usage,
)
from client.core import events
from client.core.events import (
    Answered,
    End,
    Item,
    Prompt,
    Queued,
    Recovering,
    Started,
    StreamEvent,
    Tokens,
)
from client.core.shapes import Shape, T
from client.core.tools import ToolCall
from client.errors import BusError, InvalidAnswer, short_id

if TYPE_CHECKING:
    import asyncio  # never at run time: a blocking program need not load it

    from typing_extensions import TypeVar

    #: What an inbox holds.
    Held = TypeVar("Held", default=Item)
else:
    from typing import TypeVar

    Held = TypeVar("Held")


@dataclass(frozen=True)
class Completion(Generic[T]):
    """A whole answer. `str(completion)` is its text, without what was thought."""

    #: Without the calls of tools.
    text: str
    token_ids: list[int]
    #: Of each token, if requested.
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason
    #: The stop string or token id that ended it.
    stopped_by: str | int | None
    usage: Usage
    #: Measured at the worker.
    timings: Timings
    #: Only if `echo` or `prompt_logprobs` was requested.
    prompt: Prompt | None
    model: str
    #: The worker that finished it.
    worker: str
    #: How often the stream was continued after an interruption.
    resumed: int
    #: The seed that was used; give it again to get the same answer.
    seed: int
    #: First hex digits of the request id, as logs show them.
    request_id: str
    #: Measured here, seconds from the call; None if there was no token.
    first_token_s: float | None
    total_s: float
    #: The result of embed, count, tokenize, detokenize and template.
    result: dict[str, Any] | None = None
    #: Where `tools` were given: the calls that the model makes, in order.
    tool_calls: list[ToolCall] = field(default_factory=list)
    #: What `response_format` asked for.
    shape: Shape | None = field(default=None, repr=False)
    #: Thoughts and text in the order in which they came, neighbours of different kinds.
    pieces: tuple[Piece, ...] = ()
    #: Empty: every continuation was exact. `ids`, `text`: the least exact of them, see `Started`.
    continued: str = ""

    @property
    def reasoning(self) -> str:
        """What the model thought; empty where it did not, or where its worker does not tell."""
        return "".join(piece.text for piece in self.pieces if piece.kind == PieceKind.REASONING)

    def __str__(self) -> str:
        return self.text

    @cached_property
    def parsed(self) -> T:
        """The answer as what `response_format` asked for: an instance of the class, or what JSON
        gives; None without one. Raises `InvalidAnswer`, as for an answer that was cut."""
        if self.shape is None:
            return cast(T, None)
        try:
            return cast(T, self.shape.read(self.text))
        except InvalidAnswer as error:
            if self.finish_reason is FinishReason.STOP:
                raise
            why = "raise max_tokens" if self.finish_reason is FinishReason.LENGTH else "it was left"
            raise InvalidAnswer(f"{error}; the answer is not complete: {why}") from error.__cause__

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of the conversation, for the next question."""
        made: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            made["reasoning_content"] = self.reasoning
        if self.tool_calls:
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments_json},
                }
                for call in self.tool_calls
            ]
        return made


Post = Callable[[events.Event], None]


class StreamState:
    """What the application has read of one stream."""

    __slots__ = (
        "_calls",
        "_id",
        "_logprobs",
        "_post",
        "_prompt",
        "_report_at",
        "_report_every",
        "_said",
        "_shape",
        "_token_ids",
        "end",
        "error",
        "model",
        "over",
        "queued",
        "resumed",
        "seed",
        "worker",
    )

    def __init__(
        self, request_id: bytes, model: str, seed: int, post: Post, shape: Shape | None = None
    ) -> None:
        self._id = request_id
        self._post = post
        #: Tokens between two reports to the session, and the count at which the next is due; set by
        #: `Started`, which precedes every token. The first report is not immediate: that would send
        #: a WINDOW for each request.
        self._report_every = 1
        self._report_at = 1
        #: The texts taken, by kind where they are not all content.
        self._said: list[str | list[Piece]] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt: PromptEvent | None = None
        self._calls: list[ToolCall] = []
        self._shape = shape
        #: Whether nothing more will come: there is an `end` or an `error`.
        self.over = False
        self.end: End | None = None
        self.error: BusError | None = None
        self.model = model
        self.worker = ""
        self.resumed = 0
        self.queued: Queued | None = None
        self.seed = seed

    @property
    def request_id(self) -> str:
        return short_id(self._id)

    @property
    def text(self) -> str:
        """The text taken so far."""
        return self._text_of_kind(PieceKind.CONTENT)

    @property
    def reasoning(self) -> str:
        """What was thought in what was taken so far."""
        return self._text_of_kind(PieceKind.REASONING)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Thoughts and text so far, neighbours of one kind joined."""
        runs: list[tuple[str, list[str]]] = []
        for kind, text in self._runs():
            if not runs or runs[-1][0] != kind:
                runs.append((kind, []))
            runs[-1][1].append(text)
        return tuple(Piece(kind, "".join(texts)) for kind, texts in runs)

    def _text_of_kind(self, wanted: PieceKind) -> str:
        return "".join(text for kind, text in self._runs() if kind == wanted)

    def _runs(self) -> Iterator[tuple[str, str]]:
        for said in self._said:
            if not isinstance(said, str):
                for piece in said:
                    yield piece.kind, piece.text
            elif said:
                yield PieceKind.CONTENT.value, said

    def take(self, item: Item) -> StreamEvent:
        """Account for an item that the application reads now. Raises it if it is an exception."""
        if type(item) is TokensEvent:
            self._said.append(item.text if item.pieces is None else item.pieces)
            token_ids = self._token_ids
            token_ids += item.token_ids
            if item.logprobs:
                self._logprobs += item.logprobs
            taken = len(token_ids)
            if taken >= self._report_at:
                self._report_at = taken + self._report_every
                self._post(events.TokensTaken(self._id, taken))
            return item
        match item:
            case End():
                self.end, self.over = item, True
                self.model, self.worker, self.resumed = item.model, item.worker, item.resumed
                self._said.append(item.text if item.pieces is None else item.pieces)
            case Queued():
                self.queued = item
            case Started():
                self.queued = None
                self.model, self.worker, self.resumed = item.model, item.worker, item.resumed
                self._report_every = max(1, item.window_tokens // 4)
                self._report_at = len(self._token_ids) + self._report_every
            case PromptEvent():
                self._prompt = item
            case ToolCall():
                self._calls.append(item)
            case BusError():
                self.error, self.over = item, True
                raise item
            case Answered():
                raise AssertionError("the answer of a query in a stream")
        return item

    def drop(self) -> None:
        """The application reads no more: cancel at the worker unless it is over."""
        if not self.over:
            self.over = True
            self.end = End(
                finish_reason=FinishReason.CANCELLED,
                text="",
                usage=Usage(completion_tokens=len(self._token_ids)),
                timings=Timings(),
                result=None,
                stopped_by=None,
                model=self.model,
                worker=self.worker,
                resumed=self.resumed,
                first_token_s=None,
                total_s=0.0,
            )
            self._post(events.RequestDropped(self._id))

    def completion(self) -> Completion[Any]:
        """The whole answer; for a dropped stream, the part that was read
        (`finish_reason` cancelled)."""
        if self.error is not None:
            raise self.error
        end = self.end
        assert end is not None, "the stream is not over"
        return Completion(
            text=self.text,
            token_ids=list(self._token_ids),
            logprobs=self._logprobs or None,
            finish_reason=end.finish_reason,
            stopped_by=end.stopped_by,
            usage=end.usage,
            timings=end.timings,
            prompt=self._prompt,
            model=end.model,
            worker=end.worker,
            resumed=end.resumed,
            seed=self.seed,
            request_id=self.request_id,
            first_token_s=end.first_token_s,
            total_s=end.total_s,
            result=end.result,
            tool_calls=list(self._calls),
            shape=self._shape,
            pieces=self.pieces,
            continued=end.continued,
        )


def text_of(event: StreamEvent) -> str:
    """What an event adds to the text."""
    return event.text if isinstance(event, Tokens | End) else ""


def pieces_of(event: StreamEvent) -> list[Piece]:
    """The text of an event by kind, in order; nothing where it has none."""
    if not isinstance(event, Tokens | End):
        return []
    if event.pieces is not None:
        return event.pieces
    return [Piece(PieceKind.CONTENT.value, event.text)] if event.text else []


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
        """Its place in the queue and its expected start, while it waits for a worker."""
        return self._state.queued

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


class Stream(_Reading, Generic[T]):
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


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


class AsyncStream(_Reading, Generic[T]):
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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
