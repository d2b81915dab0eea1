"""Runs the bus requests of one HTTP request and merges their events, in order within each choice.

Events that arrive together stay together, so that work per wake-up is done once.

The generators here own the streams that they open: when a generator ends, by cancellation or
`aclose` too, its running requests are cancelled at the workers. One task must drive a generator
from start to end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Final

from msgspec import Struct

from broker.protocol.errors import ErrorCode
from broker.protocol.messages import TEXT_IDS, Piece, Request, TokenLogprob
from client import AsyncClient, AsyncStream, BusError, Retry, Timeout
from client.core.events import End, Prompt, StreamEvent, Tokens
from client.gateway.convert import Generation
from client.gateway.errors import describe, invalid
from client.gateway.traces import BusSpan, traced

__all__ = [
    "RETRY",
    "Batches",
    "ChoiceEvent",
    "Delta",
    "Finish",
    "Meter",
    "Prompted",
    "check_token_ids",
    "generate",
    "naming",
]


class Delta(Struct, frozen=True, gc=False):
    """New text of a choice, with the `logprobs` of its tokens if the caller asked for them."""

    choice: int
    text: str
    tokens: int
    logprobs: list[TokenLogprob] | None
    #: The text split by kind, if the worker splits it; `text` is then the content alone.
    pieces: list[Piece] | None = None
    token_ids: Sequence[int] = ()


class Prompted(Struct, frozen=True):
    """The prompt's tokens and logprobs, before a choice's first delta, if asked for."""

    choice: int
    prompt: Prompt


class Finish(Struct, frozen=True):
    """A choice is complete; its last text was in an earlier delta."""

    choice: int
    end: End


def check_token_ids(event: ChoiceEvent) -> None:
    """Check that the ids of an event are the model's: a worker whose server tells text alone makes
    ids of its own. Raises GatewayError."""
    ids: Sequence[int] = ()
    match event:
        case Delta():
            ids = event.token_ids
        case Prompted():
            ids = event.prompt.token_ids
    if ids and max(ids) >= TEXT_IDS:
        raise invalid(
            "return_token_ids",
            "`return_token_ids`: the worker of this model gets text from its server and no token "
            "ids; leave it out.",
        )


ChoiceEvent = Delta | Prompted | Finish
Batches = AsyncGenerator[list[ChoiceEvent], None]

#: A full bus or an unknown model is reported to the HTTP client at once, which can retry by itself;
#: a running stream is resumed after every interruption.
RETRY: Final = Retry(
    codes=frozenset(
        code.value
        for code in (
            ErrorCode.WORKER_LOST,
            ErrorCode.DRAINING,
            ErrorCode.CONNECTION_LOST,
            ErrorCode.UNKNOWN_SESSION,
        )
    )
)

#: The client library's default limits.
PATIENCE: Final = Timeout()

#: Batches that may wait unread between the streams of several choices and the HTTP answer.
_MERGED_BATCHES: Final = 16
#: Streams opened before other tasks get their turn.
_OPENED_AT_ONCE: Final = 16


#: Parameters of the bus that the HTTP APIs name alike.
_SAME_NAMES: Final = ("enable_thinking", "reasoning_effort", "thinking_tokens")

Opened = Callable[[AsyncStream], None]


class Meter:
    """Counts the tokens of the answers to one HTTP request, also of those that are left early."""

    def __init__(self, requests: Sequence[Request]) -> None:
        firsts: dict[tuple[int, ...], int] = {}
        #: For each choice, the first that has its prompt, which is counted once.
        self._prompt_of = [
            firsts.setdefault((id(one.messages), id(one.prompt), id(one.token_ids)), index)
            for index, one in enumerate(requests)
        ]
        self._prompts: dict[int, int] = {}
        self._completions: dict[int, int] = {}

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(self._prompts.values())

    @property
    def completion_tokens(self) -> int:
        """Of all answers so far."""
        return sum(self._completions.values())

    async def reading(self, batches: Batches) -> Batches:
        """The same batches, each counted."""
        async with contextlib.aclosing(batches):
            async for batch in batches:
                for event in batch:
                    self._take(event)
                yield batch

    def _take(self, event: ChoiceEvent) -> None:
        choice, usage = event.choice, None
        so_far = self._completions.get(choice, 0)
        match event:
            case Delta():
                self._completions[choice] = so_far + event.tokens
            case Prompted():
                usage = event.prompt.usage
            case Finish():
                usage = event.end.usage
                self._completions[choice] = max(so_far, usage.completion_tokens)
        if usage is not None and usage.prompt_tokens:
            self._prompts[self._prompt_of[choice]] = usage.prompt_tokens


async def generate(
    bus: AsyncClient,
    generations: Sequence[Generation],
    opened: Opened,
    *,
    retry: Retry = RETRY,
    limits: Timeout = PATIENCE,
    spans: Sequence[BusSpan] = (),
    prompt_field: str | None = None,
    has_enough: Callable[[int], bool] = lambda choice: False,
) -> Batches:
    """The merged events of all generations; the i-th is choice i. Raises the first failure of any.

    `opened` is called with every stream before its first event. `limits` apply where a request sets
    none itself. `spans`: none, or one for each.
    `prompt_field`: what the caller's API calls the prompt; errors about the prompt name it.
    `has_enough` is called with a choice after each of its batches: if it returns True, the request
    is cancelled at the worker, and its `Finish` says `cancelled`.
    """

    def start(one: Generation) -> Awaitable[AsyncStream]:
        return bus.start(one.request, one.attachments, timeout=limits, retry=retry)

    with naming(prompt_field):
        if len(generations) == 1:
            joins = not generations[0].request.tools
            with traced(spans[0] if spans else None) as span:
                stream = await start(generations[0])
                opened(stream)
                try:
                    async for arrived in stream.batches:
                        batch = _translated(0, arrived, span, joins=joins)
                        if batch:
                            yield batch
                            if has_enough(0) and not isinstance(batch[-1], Finish):
                                stream.close()
                                yield [Finish(0, stream.end)]
                                return
                finally:
                    await stream.aclose()
            return
        batches: asyncio.Queue[list[ChoiceEvent] | BaseException] = asyncio.Queue(_MERGED_BATCHES)
        streams: dict[int, AsyncStream] = {}

        def opened_as(index: int, stream: AsyncStream) -> None:
            streams[index] = stream
            opened(stream)

        tasks: list[asyncio.Task[None]] = []
        try:
            for index, one in enumerate(generations):
                pump = _pump(
                    partial(start, one),
                    index,
                    partial(opened_as, index),
                    batches,
                    spans,
                    joins=not one.request.tools,
                )
                tasks.append(asyncio.create_task(pump))
                if len(tasks) % _OPENED_AT_ONCE == 0:
                    await asyncio.sleep(0)
            over: set[int] = set()
            while len(over) < len(tasks):
                merged = await batches.get()
                if isinstance(merged, BaseException):
                    raise merged
                choice = merged[0].choice
                if choice in over:
                    continue
                yield merged
                if isinstance(merged[-1], Finish):
                    over.add(choice)
                elif has_enough(choice):
                    over.add(choice)
                    tasks[choice].cancel()
                    streams[choice].close()
                    yield [Finish(choice, streams[choice].end)]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def naming(prompt_field: str | None) -> Iterator[None]:
    """Make an error of the bus name the caller's field that caused it, if there is one."""
    fields = {ErrorCode.CONTEXT_OVERFLOW: prompt_field, ErrorCode.MODEL_UNAVAILABLE: "model"}
    try:
        yield
    except BusError as error:
        param = fields.get(ErrorCode(error.code)) if error.code in fields else None
        if error.details.get("parameter") in _SAME_NAMES:
            param = error.details["parameter"]
            if prompt_field == "input":  # of /v1/responses
                param = param.replace("reasoning_effort", "reasoning.effort")
        if prompt_field is None or param is None:
            raise
        described = describe(error)
        described.param = param
        raise described from error


async def _pump(
    open_it: Callable[[], Awaitable[AsyncStream]],
    index: int,
    opened: Opened,
    batches: asyncio.Queue[list[ChoiceEvent] | BaseException],
    spans: Sequence[BusSpan],
    *,
    joins: bool,
) -> None:
    try:
        with traced(spans[index] if spans else None) as span:
            stream = await open_it()
            opened(stream)
            try:
                async for arrived in stream.batches:
                    batch = _translated(index, arrived, span, joins=joins)
                    if batch:
                        await batches.put(batch)
            finally:
                await stream.aclose()
    except Exception as error:
        await batches.put(error)


def _translated(
    choice: int, arrived: list[StreamEvent], span: BusSpan | None, *, joins: bool
) -> list[ChoiceEvent]:
    """`joins`: tokens that arrived together may be one event. Who looks for calls in the text may
    stop at one, and counts the tokens until there."""
    batch: list[ChoiceEvent] = []
    if span is not None:
        for event in arrived:
            span.saw(event)
    for event in _joined(arrived) if joins and len(arrived) > 1 else arrived:
        if isinstance(event, Tokens):
            ids = event.token_ids
            batch.append(Delta(choice, event.text, len(ids), event.logprobs, event.pieces, ids))
        elif isinstance(event, End):
            if event.text or event.pieces:
                batch.append(Delta(choice, event.text, 0, None, event.pieces))
            batch.append(Finish(choice, event))
        elif isinstance(event, Prompt):
            batch.append(Prompted(choice, event))
        # An HTTP client has no use for Queued, Started and Recovering.
    return batch


def _joined(arrived: list[StreamEvent]) -> Iterator[StreamEvent]:
    """The same events, with neighbouring tokens in one. They are in the same write, so nobody gets
    them later for it, and a gateway that is behind makes fewer chunks. What has log probabilities
    or pieces stays by itself."""
    run: list[Tokens] = []
    for event in arrived:
        if isinstance(event, Tokens) and event.logprobs is None and event.pieces is None:
            run.append(event)
            continue
        if run:
            yield _as_one(run)
            run = []
        yield event
    if run:
        yield _as_one(run)


def _as_one(run: list[Tokens]) -> Tokens:
    if len(run) == 1:
        return run[0]
    ids = [id_ for event in run for id_ in event.token_ids]
    text = "".join([event.text for event in run])
    return Tokens(run[0].request_id, run[0].epoch, run[0].offset, ids, text)
