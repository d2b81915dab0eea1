"""`POST /v1/messages`, streamed or not, and `/v1/messages/count_tokens`: bus events in, Anthropic's
messages and events out.

A reader that lost its connection comes back as to a chat of OpenAI's (`openai/chat.py`): with the
same request and `Last-Event-ID`, or with `x-reattach` and `GET /v1/messages/{id}`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, Final, Literal

import msgspec
from starlette.responses import Response

from broker.protocol.messages import Kind, Params, Usage
from client import BusError
from client.calls import Call
from client.core.events import End
from client.gateway import rejoin
from client.gateway.anthropic.blocks import Blocks, Closed, Grown, Opened, Step
from client.gateway.anthropic.bodies import (
    CountTokensRequest,
    MessagesRequest,
    ThinkingAdaptive,
    ThinkingBetweenTools,
    ThinkingDisabled,
    ThinkingEnabled,
)
from client.gateway.anthropic.conversion import as_conversation
from client.gateway.anthropic.errors import error_event
from client.gateway.context import RequestContext
from client.gateway.convert import Generation, chat_call
from client.gateway.errors import GatewayError, UnknownAnswer, describe, invalid
from client.gateway.openai.answers import Progress, parser_for, pick_seed, with_thoughts
from client.gateway.openai.generation import (
    PATIENCE,
    RETRY,
    Batches,
    ChoiceEvent,
    Delta,
    Finish,
    naming,
)
from client.gateway.openai.position import Position, Reader
from client.gateway.sse import Source, encode, until_disconnect

__all__ = ["cancel_message", "count_tokens", "create_message", "read_message"]

_PREFIX: Final = "msg_"
#: In the store.
_KIND: Final = "message"
_JSON: Final = msgspec.json.encode

_PING: Final = encode(b'{"type": "ping"}', event="ping")
_FRAMING: Final[dict[str, Any]] = {"keep_alive": lambda: _PING}


async def create_message(context: RequestContext) -> Response:
    """Answer a conversation; see `bodies.MessagesRequest` for the body."""
    body = await context.read(MessagesRequest)
    resumed = Position.read(_PREFIX, context.last_event_id) if body.stream else None
    if resumed is not None:
        with contextlib.suppress(UnknownAnswer):
            return _read_on(context, resumed)
    call = await _call(context, body, None if resumed is None else resumed.seed)
    call = await _with_budget(context, body, with_thoughts(call))
    context.check(body.model, call.request.priority)
    position = resumed or Position.first(_PREFIX, call.request.params.seed)
    answer = _Answer(context, body, call, position)
    events = _generated(context, body, call, answer)
    if body.stream:
        source = answer.stream(events)
        return rejoin.begin(context, _KIND, position, source, answer.failed, **_FRAMING)
    await until_disconnect(answer.taking(events), context.request.receive)
    data = await context.aside(_JSON, answer.complete())
    return Response(data, media_type="application/json")


async def _generated(
    context: RequestContext, body: MessagesRequest, call: Generation, answer: _Answer
) -> Batches:
    """The events of the request. A model that cannot be told whether to think does as it does:
    who names no `thinking`, or leaves it to the model, has asked for neither."""
    calls = [call]
    told = isinstance(body.thinking, ThinkingEnabled | ThinkingDisabled)
    if not told and "enable_thinking" in call.request.template_args:
        args = {k: v for k, v in call.request.template_args.items() if k != "enable_thinking"}
        request = msgspec.structs.replace(call.request, template_args=args)
        calls.append(replace(call, request=request))
    for one in calls:
        begun = False
        events = context.generate(
            [one], prompt_field="messages", has_enough=lambda _: answer.progress.has_enough
        )
        try:
            async with contextlib.aclosing(events):
                async for batch in events:
                    begun = True
                    yield batch
            return
        except (BusError, GatewayError) as error:
            if begun or one is calls[-1]:
                raise
            # Of the template's model, or of a server that takes no such arguments.
            at_fault = describe(error).info.details.get("parameter")
            if at_fault not in ("enable_thinking", "template_args"):
                raise


async def count_tokens(context: RequestContext) -> Response:
    """The length of the prompt that a conversation makes; `bodies.CountTokensRequest`."""
    body = await context.read(CountTokensRequest)
    made = await _call(context, body, 0)
    context.check(body.model, made.request.priority)
    request = msgspec.structs.replace(made.request, kind=Kind.COUNT, params=Params())
    call = Call(request, made.attachments, PATIENCE, RETRY, None)

    async def work() -> AsyncGenerator[list[End], None]:
        with naming("messages"):
            yield [await context.ask(call)]

    [end] = await until_disconnect(work(), context.request.receive)
    count = (end.result or {})["count"]
    return Response(_JSON({"input_tokens": count}), media_type="application/json")


async def read_message(context: RequestContext) -> Response:
    """Continue reading an answer that outlived its connection."""
    position = Position.read(_PREFIX, context.last_event_id)
    return _read_on(context, position or Position(context.request.path_params["id"]))


async def cancel_message(context: RequestContext) -> Response:
    """Stop an answer that outlives its connection, at the worker too."""
    return rejoin.cancel(context, _KIND)


def _read_on(context: RequestContext, position: Position) -> Response:
    def failed(error: GatewayError) -> list[bytes]:
        return [error_event(error, context.request_id)]

    return rejoin.read_on(context, _KIND, position, failed, **_FRAMING)


async def _call(context: RequestContext, body: CountTokensRequest, seed: int | None) -> Generation:
    """The request of the bus. Raises GatewayError naming the field of the body."""
    made = await context.aside(as_conversation, body, context.gateway.signer)
    try:
        return await chat_call(
            made.chat,
            context.gateway.config.images,
            seed=pick_seed(body.seed) if seed is None else seed,
            user=context.share(made.chat.user),
            size_bytes=context.size_bytes,
        )
    except GatewayError as error:
        raise made.named(error) from None


async def _with_budget(
    context: RequestContext, body: MessagesRequest, call: Generation
) -> Generation:
    """The same, with the bound of its thought and the usage of its prompt in front."""
    params = msgspec.structs.replace(call.request.params, prompt_usage=True)
    if isinstance(body.thinking, ThinkingEnabled):
        budget = body.thinking.budget_tokens
        if budget >= body.max_tokens:
            raise invalid(
                "max_tokens", "`max_tokens` must be greater than `thinking.budget_tokens`."
            )
        if await _marks_thoughts(context, body.model):
            params = msgspec.structs.replace(params, thinking_tokens=budget)
    return replace(call, request=msgspec.structs.replace(call.request, params=params))


async def _marks_thoughts(context: RequestContext, model: str) -> bool:
    """Whether the model is known to think. The bound on what another one thinks bounds nothing:
    agents send a budget to every model."""
    models = await context.gateway.bus.models()
    return any(one["name"] == model and "reasoning" in one["details"] for one in models)


class _Answer:
    """One answer in progress."""

    def __init__(
        self, context: RequestContext, body: MessagesRequest, call: Generation, position: Position
    ) -> None:
        self._context = context
        self._body = body
        self._id = position.answer
        self.progress = Progress(parser_for(call))
        thoughts: Literal["shown", "omitted", "none"] = "none"
        match body.thinking:
            case ThinkingEnabled() | ThinkingAdaptive() | ThinkingBetweenTools() as asked:
                thoughts = "omitted" if asked.display == "omitted" else "shown"
        self._blocks = Blocks(context.gateway.signer, thoughts=thoughts)
        self._reader = Reader(position, 1, tokens=False)
        self._begun = False
        #: Index of the open block.
        self._index = -1

    def _take(self, event: ChoiceEvent) -> list[Step]:
        """Account for one event of the bus."""
        parts = self.progress.take(event)
        if isinstance(event, Delta):
            self._context.saw_token()
        if self._body.max_tokens == 0:
            parts = []
        steps = self._blocks.take(parts)
        if isinstance(event, Finish):
            steps += self._blocks.finish()
            usage = self._usage
            self._context.prompt_tokens = usage.prompt_tokens
            self._context.completion_tokens = usage.completion_tokens
        return steps

    @property
    def _usage(self) -> Usage:
        """As far as it is known."""
        usage = self.progress.usage or self.progress.prompt_usage or Usage()
        if self._body.max_tokens == 0:
            return msgspec.structs.replace(usage, completion_tokens=0, reasoning_tokens=0)
        return usage

    # --- not streamed ---

    async def taking(self, batches: Batches) -> Batches:
        """The same batches, each accounted for before the next one is requested."""
        async with contextlib.aclosing(batches):
            async for batch in batches:
                for event in batch:
                    self._take(event)
                yield batch

    def complete(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        return {**self._message(self._blocks.content), **self._stop()}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._body.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
            "usage": {
                **_counts(self._usage),
                "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
                "server_tool_use": None,
                "service_tier": "standard",
            },
        }

    def _stop(self) -> dict[str, Any]:
        """Why the answer is over."""
        progress, sequence = self.progress, None
        match progress.openai_finish_reason:
            case "tool_calls":
                reason = "tool_use"
            case "length":
                # Cut before its limit, so by the context.
                within = self._usage.completion_tokens < self._body.max_tokens
                reason = "model_context_window_exceeded" if within else "max_tokens"
            case _ if isinstance(progress.stopped_by, str):
                reason, sequence = "stop_sequence", progress.stopped_by
            case _:
                reason = "end_turn"
        told = {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None}
        # Not of Anthropic's API.
        return {**told, "continued": progress.continued} if progress.continued else told

    # --- streamed ---

    async def stream(self, batches: Batches) -> Source:
        """The answer as events."""
        async with contextlib.aclosing(batches):
            async for batch in batches:
                out: list[bytes] = []
                for event in batch:
                    self._tell(event, out)
                if out:
                    yield out

    def _tell(self, event: ChoiceEvent, out: list[bytes]) -> None:
        """Account for one bus event, and append the events that the reader gets."""
        steps = self._take(event)
        if not self._begun:
            self._begun = True
            if not self._reader.skipped(0, 1):
                start = {"type": "message_start", "message": self._message([])}
                # A ping belongs to the event before it: it has no id to come back to.
                out.append(self._event("message_start", start) + _PING)
        for step in steps:
            self._tell_step(step, out)
        if isinstance(event, Finish):
            if not self._reader.skipped(0, 1):
                fields = {"delta": self._stop(), "usage": _counts(self._usage)}
                out.append(self._event("message_delta", {"type": "message_delta", **fields}))
            if not self._reader.skipped(0, 1):
                out.append(self._event("message_stop", {"type": "message_stop"}))

    def _tell_step(self, step: Step, out: list[bytes]) -> None:
        match step:
            case Opened(block=block):
                self._index += 1
                if not self._reader.skipped(0, 1):
                    out.append(self._of_block("content_block_start", content_block=block))
            case Grown(kind=kind, text=text):
                unread = text[self._reader.skipped(0, len(text)) :]
                if unread:
                    out.append(self._of_block("content_block_delta", delta=_delta(kind, unread)))
            case Closed(signature=signature):
                if signature and not self._reader.skipped(0, 1):
                    delta = {"type": "signature_delta", "signature": signature}
                    out.append(self._of_block("content_block_delta", delta=delta))
                if not self._reader.skipped(0, 1):
                    out.append(self._of_block("content_block_stop"))

    def _of_block(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, {"type": kind, "index": self._index, **fields})

    def _event(self, kind: str, data: dict[str, Any]) -> bytes:
        id_line = self._reader.id_line % self._reader.next_id()
        return id_line + encode(_JSON(data), event=kind)

    def failed(self, error: GatewayError) -> list[bytes]:
        """The end of a stream that fails after its first event."""
        return [error_event(error, self._context.request_id)]


def _delta(kind: Literal["text", "thinking", "tool_use"], text: str) -> dict[str, str]:
    if kind == "text":
        return {"type": "text_delta", "text": text}
    if kind == "thinking":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "input_json_delta", "partial_json": text}


def _counts(usage: Usage) -> dict[str, Any]:
    """Tokens so far. Anthropic counts what came from the cache apart from the rest."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }
