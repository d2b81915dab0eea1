"""`/v1/responses`: create, stream, run in the background, read again, re-attach, cancel, delete.

A response in the background (`background: true`) outlives its reader. While it runs and as long as
it is kept, `GET /v1/responses/{id}?stream=true&starting_after=N` goes on behind event N, at the
gateway that made it and at those that have it as a peer. Any other response ends with its reader,
at the worker too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Literal, cast

import msgspec
from openai.types import responses as shapes
from openai.types.responses import response_output_text, response_text_delta_event
from openai.types.responses.response_usage import (
    InputTokensDetails,
    OutputTokensDetails,
    ResponseUsage,
)
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from broker.protocol import tool_parser as tools
from broker.protocol.messages import TokenLogprob, Usage
from client.gateway import requests as http
from client.gateway.bodies import aside
from client.gateway.context import RequestContext
from client.gateway.convert import Generation, chat_call
from client.gateway.errors import GatewayError, UnknownAnswer, describe, invalid
from client.gateway.openai.answers import Progress, new_id, parser_for, pick_seed
from client.gateway.openai.generation import Batches, ChoiceEvent, Delta, Finish
from client.gateway.openai.responses_body import (
    FunctionTool,
    ResponseRequest,
    TextConfig,
    as_chat,
    check_include,
    functions_of,
    named_in_input,
    with_references,
)
from client.gateway.openai.shapes import chat_logprobs, dumped
from client.gateway.reattach import Kept
from client.gateway.sse import Source, encode, until_disconnect

__all__ = [
    "cancel_response",
    "create_response",
    "delete_response",
    "get_response",
    "input_items",
]

#: What an entry of log-probabilities takes as the shape that it is kept as, measured.
_LOGPROB_BYTES: Final = 900

#: Events are plain values around the shapes of the `openai` package.
_JSON: Final = msgspec.json.Encoder(enc_hook=lambda shape: msgspec.Raw(dumped(shape)))

OutputItem = shapes.ResponseOutputMessage | shapes.ResponseFunctionToolCall


class _Response(shapes.Response):
    """With times in whole seconds, as OpenAI sends them; its package reads any number."""

    created_at: int
    completed_at: int | None = None


Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


async def create_response(visit: RequestContext) -> Response:
    """Answer an input; see `responses_input.ResponseRequest` for the body."""
    body = await visit.read(ResponseRequest)
    store = visit.gateway.store
    items = _Items(visit)
    if visit.is_large:
        items.find()  # the store is the loop's
    body = await visit.aside(with_references, body, items)
    earlier, earlier_bytes = _conversation(visit, body.previous_response_id)
    size_bytes = visit.size_bytes + earlier_bytes
    chat = await aside(size_bytes, as_chat, body, earlier)
    try:
        call = await chat_call(
            chat,
            visit.gateway.config.images,
            seed=pick_seed(body.seed),
            user=visit.share(body.user),
            size_bytes=size_bytes,
        )
    except GatewayError as error:
        raise named_in_input(error, body, chat) from None
    if body.truncation == "auto":
        params = msgspec.structs.replace(call.request.params, overflow="truncate_left")
        call = replace(call, request=msgspec.structs.replace(call.request, params=params))
    visit.check(body.model, call.request.priority)
    builder = ResponseBuilder(visit, body, chat, call)
    source = builder.events(
        visit.generate(
            [call], prompt_field="input", has_enough=lambda _: builder.progress.has_enough
        )
    )
    kept = Kept(builder.id, visit.key.name, "response", builder, size_bytes)
    builder.grew = kept.grew
    if body.background:
        transcript = store.run(kept, source, builder.failed, grace_s=None, on_end=visit.hand_over())
        if body.stream:
            return visit.stream(transcript.read(asking=True), builder.failed)
        return _json(builder.snapshot())
    if body.store is not False:
        store.put(kept)
    if body.stream:
        return visit.stream(source, builder.failed)
    try:
        await until_disconnect(source, visit.request.receive)
    except BaseException:
        store.drop(kept)
        raise
    return _json(builder.snapshot())


def _conversation(visit: RequestContext, id_: str | None) -> tuple[list[http.ChatMessage], int]:
    """What was said in an earlier response and before, and its bytes; raises GatewayError naming
    the field."""
    if id_ is None:
        return [], 0
    try:
        kept = visit.gateway.store.find(id_, visit.key.name, "response")
    except UnknownAnswer as error:
        raise UnknownAnswer(
            f"{error.info.message} Send the conversation as `input`.",
            param="previous_response_id",
            status=400,
            openai_code="previous_response_not_found",
        ) from None
    if not kept.value.over:
        raise invalid(
            "previous_response_id",
            f"Response {kept.id!r} still runs; wait for its end, or cancel it.",
        )
    return cast(ResponseBuilder, kept.value).conversation(), kept.size_bytes


class _Items:
    """The output items of the responses that the key may see, as JSON, by id."""

    def __init__(self, visit: RequestContext) -> None:
        self._visit = visit
        self._found: dict[str, OutputItem] | None = None

    def find(self) -> dict[str, OutputItem]:
        """Look through the store, unless that was done."""
        if self._found is None:
            visit = self._visit
            kept = visit.gateway.store.of(visit.key.name, "response")
            self._found = {
                item.id: item
                for builder in (one.value for one in kept)
                if builder.over
                for item in builder.output
            }
        return self._found

    def __call__(self, id_: str) -> dict[str, Any]:
        """See `responses_input.Found`."""
        item = self.find().get(id_)
        if item is None:
            raise UnknownAnswer(
                f"Item with id {id_!r} not found: its response is too old, still runs, belongs to "
                "another key, was not to be stored, or was made by a gateway that cannot be asked. "
                "Send the item itself.",
                param="input",
            )
        return dict(msgspec.json.decode(dumped(item)))


async def get_response(visit: RequestContext) -> Response:
    """The response as it is now, or its events behind a number."""
    kept = _find(visit)
    query = visit.request.query_params
    # Log-probabilities are in the answer already, where they were asked for.
    _check_query(visit, "stream", "starting_after", "include", "include[]", "include_obfuscation")
    streamed = query.get("stream", "false").lower()
    if streamed not in ("true", "1", "false", "0"):
        raise invalid("stream", "`stream` is `true` or `false`.")
    if streamed in ("false", "0"):
        if "starting_after" in query:
            raise invalid("starting_after", "`starting_after` needs `stream=true`.")
        return _json(kept.value.snapshot())
    if kept.transcript is None:
        raise invalid("stream", "Only a response made with `background: true` streams again.")
    named = "starting_after" if query.get("starting_after") else "last-event-id"
    after = query.get("starting_after") or visit.last_event_id
    # Sequence numbers count from 0, positions from 1.
    number = -1 if after is None else http.number_of(after)
    if number is None:
        raise invalid(named, f"`{named}` is the sequence number of an event.")
    position = number + 1
    return visit.stream(kept.transcript.read(position), kept.value.failed)


async def delete_response(visit: RequestContext) -> Response:
    """Forget a response; one that runs is cancelled."""
    kept = _find(visit)
    visit.gateway.store.drop(kept)
    return JSONResponse({"id": kept.id, "object": "response", "deleted": True})


async def cancel_response(visit: RequestContext) -> Response:
    """Stop a response that runs in the background, at the worker too."""
    kept = _find(visit)
    if kept.transcript is None:
        raise invalid("id", "Only a response made with `background: true` can be cancelled.")
    kept.transcript.cancel()
    await kept.transcript.finished()
    return _json(kept.value.snapshot())


async def input_items(visit: RequestContext) -> Response:
    """A page of what the response was asked with; the latest item first, as OpenAI has it."""
    kept = _find(visit)
    given = kept.value.body.input
    _check_query(visit, "after", "limit", "order", "include", "include[]")
    query = visit.request.query_params
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}]}]
    items = [{"type": "message", "id": f"item_{i}", **item} for i, item in enumerate(given)]
    order, limit = query.get("order", "desc"), http.number_of(query.get("limit", "20"))
    if order not in ("asc", "desc"):
        raise invalid("order", "`order` is `asc` or `desc`.")
    if limit is None or not 1 <= limit <= 100:
        raise invalid("limit", "`limit` is a number from 1 to 100.")
    if order == "desc":
        items.reverse()
    after = query.get("after")
    if after is not None:
        at = [index for index, item in enumerate(items) if item["id"] == after]
        if not at:
            raise invalid(
                "after", f"`after` names {after!r}, which is not an item of this response."
            )
        items = items[at[0] + 1 :]
    page = items[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    shown = {
        "object": "list",
        "data": page,
        "first_id": first,
        "last_id": last,
        "has_more": len(page) < len(items),
    }
    # A page may hold many megabytes of images.
    data = await aside(kept.size_bytes, msgspec.json.encode, shown)
    return Response(data, media_type="application/json")


def _check_query(visit: RequestContext, *known: str) -> None:
    query = visit.request.query_params
    for name in query:
        if name not in known:
            raise invalid(name, f"`{name}` is not a parameter of this endpoint; remove it.")
    for entry in (*query.getlist("include"), *query.getlist("include[]")):
        check_include(entry)


def _find(visit: RequestContext) -> Kept:
    return visit.gateway.store.find(visit.request.path_params["id"], visit.key.name, "response")


def _json(response: BaseModel) -> Response:
    return Response(dumped(response), media_type="application/json")


class ResponseBuilder:
    """One response in the making, and what is known of it afterwards."""

    def __init__(
        self, visit: RequestContext, body: ResponseRequest, chat: http.ChatRequest, call: Generation
    ) -> None:
        self.id = new_id("resp_")
        self.body = body
        self._visit = visit
        self._chat = chat
        self.progress = Progress(parser_for(call))
        #: Wall clock, whole seconds.
        self._created_s = int(time.time())
        self._completed_s: int | None = None
        self._tools = [_told_tool(tool) for tool in functions_of(body)]
        self._text = _told_text(body.text)
        self._reasoning = {
            "effort": body.reasoning.effort if body.reasoning else None,
            "summary": body.reasoning.summary if body.reasoning else None,
        }
        self._status: Status = "queued"
        self._usage: Usage | None = None
        self._error: GatewayError | None = None
        self.output: list[OutputItem] = []
        #: Told of what the answer takes, as it grows; bytes.
        self.grew: Callable[[int], None] = lambda size_bytes: None
        self._open = False  # the last output item is not complete
        self._sequence = 0

    @property
    def over(self) -> bool:
        """Nothing more will be said."""
        return self._status not in ("queued", "in_progress")

    def conversation(self) -> list[http.ChatMessage]:
        """Everything that was said, this answer included: what a follow-up stands on.

        As OpenAI has it, `instructions` are of their own response alone.
        """
        said = [*self._chat.messages[1:]] if self.body.instructions else [*self._chat.messages]
        for item in self.output:
            if isinstance(item, shapes.ResponseOutputMessage):
                said.append(http.ChatMessage(role="assistant", content=_text_of(item).text))
            else:
                called = http.ToolCall(
                    id=item.call_id,
                    function=http.CalledFunction(name=item.name, arguments=item.arguments),
                )
                if said[-1].role == "assistant" and said[-1] not in self._chat.messages:
                    said[-1].tool_calls = [*(said[-1].tool_calls or []), called]
                else:
                    said.append(http.ChatMessage(role="assistant", tool_calls=[called]))
        return said

    def snapshot(self) -> shapes.Response:
        """The response as far as it is known."""
        body = self.body
        response = _Response.model_construct(
            id=self.id,
            object="response",
            created_at=self._created_s,
            completed_at=self._completed_s,
            status=self._status,
            background=bool(body.background),
            error=None,
            incomplete_details=None,
            frequency_penalty=body.frequency_penalty or 0.0,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            metadata=body.metadata or {},
            model=body.model,
            output=list(self.output),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            presence_penalty=body.presence_penalty or 0.0,
            previous_response_id=body.previous_response_id,
            prompt_cache_key=body.prompt_cache_key,
            reasoning=self._reasoning,
            safety_identifier=body.safety_identifier,
            service_tier=body.service_tier or "default",
            store=body.store is not False,
            temperature=1.0 if body.temperature is None else body.temperature,
            text=self._text,
            tool_choice=msgspec.to_builtins(body.tool_choice) or "auto",
            tools=self._tools,
            top_logprobs=body.top_logprobs or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            truncation=body.truncation or "disabled",
            usage=None,
            user=body.user,
        )
        if self._status == "incomplete":
            response.incomplete_details = shapes.response.IncompleteDetails(
                reason="max_output_tokens"
            )
        if self._error is not None:
            response.error = shapes.ResponseError.model_construct(**_error_of(self._error))
        if self._usage is not None:
            usage = self._usage
            response.usage = ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=InputTokensDetails(
                    cached_tokens=usage.cached_tokens, cache_write_tokens=0
                ),
                output_tokens=usage.completion_tokens,
                output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
                total_tokens=usage.prompt_tokens + usage.completion_tokens,
            )
        return response

    async def events(self, batches: Batches) -> Source:
        """The events of the response as they happen."""
        try:
            async with contextlib.aclosing(batches):
                async for batch in batches:
                    out: list[bytes] = []
                    if self._status == "queued":
                        out.append(self._whole("response.created"))
                        self._status = "in_progress"
                        out.append(self._whole("response.in_progress"))
                    for event in batch:
                        out += self._take(event)
                    if out:
                        yield out
        except Exception as error:
            self._error = describe(error)
            self._status = "failed"
            raise
        finally:
            if self._status in ("queued", "in_progress"):
                self._status = "cancelled"

    def failed(self, error: GatewayError) -> list[bytes]:
        """The last event of a response that failed."""
        self._error, self._status = error, "failed"
        return [self._whole("response.failed")]

    def _take(self, event: ChoiceEvent) -> list[bytes]:
        logprobs: list[TokenLogprob] = []
        if isinstance(event, Delta):
            self._visit.saw_token()
            logprobs = event.logprobs or []
        pieces = self.progress.take(event)
        out: list[bytes] = []
        for part in pieces:
            match part:
                case tools.Text():
                    if part.text or logprobs:
                        out += self._more_text(part.text, logprobs)
                    logprobs = []
                case tools.CallStart():
                    out += self._close()
                    out += self._begin_call(part.name)
                case tools.Arguments():
                    out += self._more_arguments(part.text)
        if isinstance(event, Finish):
            out += self._end()
        return out

    # --- output items ---

    def _begin_message(self) -> list[bytes]:
        message = shapes.ResponseOutputMessage(
            id=new_id("msg_"), type="message", role="assistant", status="in_progress", content=[]
        )
        self.output.append(message)
        self._open = True
        added = self._event("response.output_item.added", item=message.model_copy())
        message.content.append(
            shapes.ResponseOutputText(type="output_text", text="", annotations=[], logprobs=[])
        )
        part = self._event(
            "response.content_part.added",
            item_id=message.id,
            content_index=0,
            part=_text_of(message).model_copy(),
        )
        return [added, part]

    def _more_text(self, text: str, logprobs: list[TokenLogprob]) -> list[bytes]:
        out: list[bytes] = []
        message = self.output[-1] if self._open else None
        if not isinstance(message, shapes.ResponseOutputMessage):
            out = [*self._close(), *self._begin_message()]
            message = self.output[-1]
        assert isinstance(message, shapes.ResponseOutputMessage)
        content = _text_of(message)
        content.text += text
        self.grew(len(text) + _LOGPROB_BYTES * sum(1 + len(entry.top) for entry in logprobs))
        shown = chat_logprobs(logprobs)
        assert content.logprobs is not None
        content.logprobs += [
            response_output_text.Logprob.model_construct(**dict(entry)) for entry in shown
        ]
        delta = self._event(
            "response.output_text.delta",
            item_id=message.id,
            content_index=0,
            delta=text,
            logprobs=[
                response_text_delta_event.Logprob.model_construct(
                    token=entry.token, logprob=entry.logprob, top_logprobs=entry.top_logprobs
                )
                for entry in shown
            ],
        )
        return [*out, delta]

    def _begin_call(self, name: str) -> list[bytes]:
        call = shapes.ResponseFunctionToolCall(
            type="function_call",
            id=new_id("fc_"),
            call_id=new_id("call_"),
            name=name,
            arguments="",
            status="in_progress",
        )
        self.output.append(call)
        self._open = True
        return [self._event("response.output_item.added", item=call.model_copy())]

    def _more_arguments(self, text: str) -> list[bytes]:
        call = self.output[-1]
        assert isinstance(call, shapes.ResponseFunctionToolCall)
        call.arguments += text
        self.grew(len(text))
        return [self._event("response.function_call_arguments.delta", item_id=call.id, delta=text)]

    def _close(self, status: Literal["completed", "incomplete"] = "completed") -> list[bytes]:
        """End the output item in hand."""
        if not self._open:
            return []
        self._open = False
        item = self.output[-1]
        item.status = status
        if isinstance(item, shapes.ResponseFunctionToolCall):
            done = [
                self._event(
                    "response.function_call_arguments.done",
                    item_id=item.id,
                    name=item.name,
                    arguments=item.arguments,
                )
            ]
        else:
            content = _text_of(item)
            done = [
                self._event(
                    "response.output_text.done",
                    item_id=item.id,
                    content_index=0,
                    text=content.text,
                    logprobs=content.logprobs,
                ),
                self._event(
                    "response.content_part.done", item_id=item.id, content_index=0, part=content
                ),
            ]
        return [*done, self._event("response.output_item.done", item=item)]

    def _end(self) -> list[bytes]:
        cut = self.progress.openai_finish_reason == "length"
        out: list[bytes] = []
        if not self.output:
            # An empty answer is a message without text.
            out = self._begin_message()
        out += self._close("incomplete" if cut or self.progress.is_cut else "completed")
        self._usage = self.progress.usage or Usage()
        self._visit.prompt_tokens = self._usage.prompt_tokens
        self._visit.completion_tokens = self._usage.completion_tokens
        self._status = "incomplete" if cut else "completed"
        if not cut:
            self._completed_s = int(time.time())
        return [*out, self._whole(f"response.{self._status}")]

    # --- events ---

    def _event(self, kind: str, **fields: Any) -> bytes:
        """An event about the last output item."""
        return self._made(kind, {"output_index": len(self.output) - 1, **fields})

    def _whole(self, kind: str) -> bytes:
        return self._made(kind, {"response": self.snapshot()})

    def _made(self, kind: str, fields: dict[str, Any]) -> bytes:
        number = self._sequence
        self._sequence += 1
        made = _JSON.encode({"type": kind, "sequence_number": number, **fields})
        return encode(made, event=kind, id_=str(number))


def _told_tool(tool: FunctionTool) -> dict[str, Any]:
    """A tool as the response repeats it: with the fields that OpenAI's always has."""
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }


def _told_text(text: TextConfig | None) -> dict[str, Any]:
    told: dict[str, Any] = {"format": {"type": "text"}, "verbosity": "medium"}
    if text is not None:
        told |= {k: v for k, v in msgspec.to_builtins(text).items() if v is not None}
    return told


def _error_of(error: GatewayError) -> dict[str, Any]:
    """A failure as a response tells it: by OpenAI's words for that place, the bus's beside them."""
    code = error.openai_code
    if code == error.info.code:
        code = "server_error" if error.status >= 500 else "invalid_prompt"
    if error.status == 429:
        code = "rate_limit_exceeded"
    return {"code": code, "message": error.info.message, "details": {"code": error.info.code}}


def _text_of(message: shapes.ResponseOutputMessage) -> shapes.ResponseOutputText:
    [content] = message.content
    assert isinstance(content, shapes.ResponseOutputText)
    return content
