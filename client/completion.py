"""A complete answer, and the state of one that is still being read.

`StreamState` accounts for each item as the application reads it, reports progress to the session,
and assembles the `Completion`. It does no IO.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, cast

from broker.protocol.messages import (
    Continuation,
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
from client.core.events import Answered, End, Item, Prompt, Queued, Started, StreamEvent, Tokens
from client.core.shapes import Shape, T
from client.core.tools import ToolCall
from client.errors import BusError, InvalidAnswer, short_id

__all__ = ["Completion", "StreamState", "pieces_of", "text_of"]


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
        "continued",
        "end",
        "error",
        "model",
        "over",
        "queued",
        "queued_at_s",
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
        self.continued = ""
        self.queued: Queued | None = None
        self.queued_at_s = 0.0
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
                self.queued, self.queued_at_s = item, time.monotonic()
            case Started():
                self.queued = None
                self.model, self.worker, self.resumed = item.model, item.worker, item.resumed
                if self.continued != Continuation.TEXT:
                    self.continued = item.continued or self.continued
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
                continued=self.continued,
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
