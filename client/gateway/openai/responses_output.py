"""One response of `/v1/responses` in the making: events of the bus in, output items and events out.

Items come in the order in which the model writes: what it thought, its text, its calls. An event's
number, and the ids of items and calls, follow from the response's id and from what was said before:
a gateway that generates the response again goes on behind any event of it (`position`). Must never
touch the store or a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec
from openai.types import responses as shapes
from openai.types.responses import (
    response_output_text,
    response_reasoning_item,
    response_text_delta_event,
)
from openai.types.responses.response_usage import (
    InputTokensDetails,
    OutputTokensDetails,
    ResponseUsage,
)
from pydantic import TypeAdapter

from broker.protocol import tool_parser as tools
from broker.protocol.messages import TokenLogprob, Usage
from client.gateway import requests as http
from client.gateway.context import RequestContext
from client.gateway.convert import Generation
from client.gateway.errors import GatewayError, describe
from client.gateway.openai.answers import Progress, Thought, parser_for
from client.gateway.openai.generation import Batches, ChoiceEvent, Delta, Finish
from client.gateway.openai.position import Position, Reader
from client.gateway.openai.responses_body import (
    ENCRYPTED,
    ResponseRequest,
    TextConfig,
    turns_of,
)
from client.gateway.openai.responses_logprobs import TextTokens
from client.gateway.openai.responses_tools import functions_of, told_tools
from client.gateway.openai.sealing import sealed
from client.gateway.openai.shapes import chat_logprobs, dumped
from client.gateway.sse import Source, encode

__all__ = ["OutputItem", "ResponseBuilder", "told_usage"]

#: What an entry of log-probabilities takes as the shape that it is kept as, measured.
_LOGPROB_BYTES: Final = 900

#: Events are plain values around the shapes of the `openai` package.
_JSON: Final = msgspec.json.Encoder(enc_hook=lambda shape: msgspec.Raw(dumped(shape)))

OutputItem = (
    shapes.ResponseReasoningItem | shapes.ResponseOutputMessage | shapes.ResponseFunctionToolCall
)


class _Response(shapes.Response):
    """With times in whole seconds, as OpenAI sends them; its package reads any number."""

    created_at: int
    completed_at: int | None = None


_OUTPUT: Final = TypeAdapter(list[OutputItem])

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class ResponseBuilder:
    """One response in the making, and what is known of it afterwards."""

    def __init__(
        self,
        context: RequestContext,
        body: ResponseRequest,
        chat: http.ChatRequest,
        call: Generation | None,
        position: Position,
    ) -> None:
        """`call`: None of one that is over, see `restore`. `position`: how much of it the reader
        has, of a response that is made again."""
        self.id = position.answer
        self.body = body
        self._context = context
        self.chat = chat
        self.progress = Progress(None if call is None else parser_for(call))
        #: Wall clock, whole seconds.
        self._created_s = position.created_s
        self._completed_s: int | None = None
        functions = functions_of(body.tools)
        self._tools = told_tools(functions)
        #: By the names that the model knows.
        self._grouped = {one.name: one for one in functions if one.group is not None}
        self._text = _told_text(body.text)
        self._reasoning = {
            "effort": body.reasoning.effort if body.reasoning else None,
            "summary": body.reasoning.summary if body.reasoning else None,
        }
        self._status: Status = "queued"
        self._usage: Usage | None = None
        self._error: GatewayError | None = None
        self.output: list[OutputItem] = []
        #: What it was asked, as items that can be listed; None until somebody wants them.
        self.input_items: list[dict[str, Any]] | None = None
        #: As it ended, of one that another gateway made.
        self._final: shapes.Response | None = None
        #: Other gateways may read and delete it, see `responses_folder`.
        self.in_folder = False
        #: It is not written there any more.
        self.deleted = False
        #: One at a time writes it there, or removes it.
        self.recording = asyncio.Lock()
        #: Told of what the answer takes, as it grows; bytes.
        self.grew: Callable[[int], None] = lambda size_bytes: None
        self._open = False  # the last output item is not complete
        self._text_tokens = TextTokens()
        self._sealed = ENCRYPTED in (body.include or [])
        self._reader = Reader(position, 1, tokens=bool(chat.logprobs))

    @property
    def over(self) -> bool:
        """Nothing more will be said."""
        return self._status not in ("queued", "in_progress")

    @property
    def answered(self) -> bool:
        """It is over, and the model said what it had to say, or as much as it was allowed to."""
        return self._status in ("completed", "incomplete")

    def conversation(self) -> list[http.ChatMessage]:
        """Everything that was said, this answer included: what a follow-up stands on.

        As OpenAI has it, `instructions` are of their own response alone.
        """
        said = [*self.chat.messages[1:]] if self.body.instructions else [*self.chat.messages]
        return said + turns_of([msgspec.json.decode(dumped(item)) for item in self.output])

    def restore(self, final: dict[str, Any]) -> None:
        """It ended like this, at another gateway."""
        self._final = _Response.model_validate(final)
        self.output = _OUTPUT.validate_python(final["output"])
        self._status = final["status"]

    def snapshot(self) -> shapes.Response:
        """The response as far as it is known."""
        if self._final is not None:
            return self._final
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
        if body.conversation is not None:
            id_ = body.conversation if isinstance(body.conversation, str) else body.conversation.id
            response.conversation = shapes.response.Conversation(id=id_)
        if self.progress.continued:
            # Not of OpenAI's API.
            setattr(response, "continued", self.progress.continued)  # noqa: B010
        if self._status == "incomplete":
            response.incomplete_details = shapes.response.IncompleteDetails(
                reason="max_output_tokens"
            )
        if self._error is not None:
            response.error = shapes.ResponseError.model_construct(**_error_of(self._error))
        if self._usage is not None:
            response.usage = told_usage(self._usage)
        return response

    async def events(self, batches: Batches) -> Source:
        """The events of the response as they happen."""
        try:
            async with contextlib.aclosing(batches):
                async for batch in batches:
                    out: list[bytes] = []
                    if self._status == "queued":
                        out += self._whole("response.created")
                        self._status = "in_progress"
                        out += self._whole("response.in_progress")
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
        """The last event of a response that failed. It has no id: who comes back goes on behind the
        event before it."""
        self._error, self._status = error, "failed"
        kind = "response.failed"
        fields = {"sequence_number": self._reader.events, "response": self.snapshot()}
        return [encode(_JSON.encode({"type": kind, **fields}), event=kind)]

    def _take(self, event: ChoiceEvent) -> list[bytes]:
        if isinstance(event, Delta):
            self._context.saw_token()
            if self.chat.logprobs:
                self._text_tokens.add(event.logprobs or ())
        parts = self.progress.take(event)
        out: list[bytes] = []
        late = False
        for part in parts:
            match part:
                case Thought():
                    out += self._more_thought(part.text)
                case tools.Text():
                    if part.text:
                        out += self._more_text(part.text, late=late)
                case tools.CallStart():
                    out += self._close()
                    out += self._begin_call(part.name)
                case tools.Arguments():
                    out += self._more_arguments(part.text)
            late |= not isinstance(part, tools.Text)
        if parts and not isinstance(parts[-1], tools.Text):
            self._text_tokens.drop()
        if isinstance(event, Finish):
            if self._open and self._in_message:
                out += self._grown("", self._text_tokens.rest())
            out += self._end()
        return out

    # --- output items ---

    def _begin_message(self) -> list[bytes]:
        message = shapes.ResponseOutputMessage(
            id=self._new_id("msg_"),
            type="message",
            role="assistant",
            status="in_progress",
            content=[],
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
        return [*added, *part]

    @property
    def _in_message(self) -> bool:
        return bool(self.output) and isinstance(self.output[-1], shapes.ResponseOutputMessage)

    def _more_text(self, text: str, *, late: bool) -> list[bytes]:
        """`late`: the event has something else before it."""
        out: list[bytes] = []
        begins = not (self._open and self._in_message)
        if begins:
            out = [*self._close(), *self._begin_message()]
        return out + self._grown(text, self._text_tokens.of(text, begins=begins, late=late))

    def _grown(self, text: str, logprobs: list[TokenLogprob]) -> list[bytes]:
        """More of the message in hand."""
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
        unread = shown[self._reader.skipped_tokens(0, len(shown)) :] if shown else []
        told = [
            response_text_delta_event.Logprob.model_construct(
                token=entry.token, logprob=entry.logprob, top_logprobs=entry.top_logprobs
            )
            for entry in unread
        ]
        fields = {"item_id": message.id, "content_index": 0, "logprobs": told}
        return self._delta("response.output_text.delta", text, bool(told), **fields)

    def _more_thought(self, text: str) -> list[bytes]:
        out: list[bytes] = []
        item = self.output[-1] if self._open else None
        if not isinstance(item, shapes.ResponseReasoningItem):
            out = self._close()
            item = shapes.ResponseReasoningItem(
                id=self._new_id("rs_"),
                type="reasoning",
                status="in_progress",
                summary=[],
                content=[],
            )
            self.output.append(item)
            self._open = True
            out += self._event("response.output_item.added", item=item.model_copy(deep=True))
            part = response_reasoning_item.Content(type="reasoning_text", text="")
            item.content = [part]
            out += self._event(
                "response.content_part.added",
                item_id=item.id,
                content_index=0,
                part=part.model_copy(),
            )
        _thought_of(item).text += text
        self.grew(len(text))
        told: dict[str, Any] = {"item_id": item.id, "content_index": 0}
        return [*out, *self._delta("response.reasoning_text.delta", text, **told)]

    def _begin_call(self, name: str) -> list[bytes]:
        call = shapes.ResponseFunctionToolCall(
            type="function_call",
            id=self._new_id("fc_"),
            call_id=self._new_id("call_"),
            name=name,
            arguments="",
            status="in_progress",
        )
        grouped = self._grouped.get(name)
        if grouped is not None and grouped.group is not None:
            call.name, call.namespace = grouped.tool.name, grouped.group.name
        self.output.append(call)
        self._open = True
        return self._event("response.output_item.added", item=call.model_copy())

    def _more_arguments(self, text: str) -> list[bytes]:
        call = self.output[-1]
        assert isinstance(call, shapes.ResponseFunctionToolCall)
        call.arguments += text
        self.grew(len(text))
        return self._delta("response.function_call_arguments.delta", text, item_id=call.id)

    def _close(self, status: Literal["completed", "incomplete"] = "completed") -> list[bytes]:
        """End the output item in hand."""
        if not self._open:
            return []
        self._open = False
        item = self.output[-1]
        item.status = status
        told: dict[str, Any] = {"item_id": item.id, "content_index": 0}
        if isinstance(item, shapes.ResponseFunctionToolCall):
            done = self._event(
                "response.function_call_arguments.done",
                item_id=item.id,
                name=item.name,
                arguments=item.arguments,
            )
        elif isinstance(item, shapes.ResponseReasoningItem):
            thought = _thought_of(item)
            if self._sealed:
                item.encrypted_content = sealed(thought.text)
                self.grew(len(item.encrypted_content))
            done = self._event("response.reasoning_text.done", text=thought.text, **told)
            done += self._event("response.content_part.done", part=thought, **told)
        else:
            content = _text_of(item)
            done = self._event(
                "response.output_text.done", text=content.text, logprobs=content.logprobs, **told
            )
            done += self._event("response.content_part.done", part=content, **told)
        return [*done, *self._event("response.output_item.done", item=item)]

    def _end(self) -> list[bytes]:
        cut = self.progress.openai_finish_reason == "length"
        out: list[bytes] = []
        thought = [isinstance(item, shapes.ResponseReasoningItem) for item in self.output]
        if all(thought) and not (thought and cut):
            # An empty answer is a message without text.
            out = [*self._close(), *self._begin_message()]
        out += self._close("incomplete" if cut or self.progress.is_cut else "completed")
        self._usage = self.progress.usage or Usage()
        self._context.prompt_tokens = self._usage.prompt_tokens
        self._context.completion_tokens = self._usage.completion_tokens
        self._status = "incomplete" if cut else "completed"
        if not cut:
            self._completed_s = int(time.time())
        return [*out, *self._whole(f"response.{self._status}")]

    def _new_id(self, prefix: str) -> str:
        """The id of the item that comes next, or of its call: the same whenever it is made, and
        known to those alone who know the response's."""
        place = f"{self.id}:{prefix}{len(self.output)}".encode()
        return prefix + hashlib.blake2b(place, digest_size=16, person=b"item").hexdigest()

    # --- events: each list is empty where the reader has the event ---

    def _event(self, kind: str, **fields: Any) -> list[bytes]:
        """An event about the last output item."""
        if self._reader.skipped(0, 1):
            return []
        return self._made(kind, {"output_index": len(self.output) - 1, **fields})

    def _delta(self, kind: str, text: str, more: bool = False, **fields: Any) -> list[bytes]:
        """What the last output item has grown by. `more`: the fields hold what is not read yet."""
        unread = text[self._reader.skipped(0, len(text)) :]
        if not unread and not more:
            return []
        return self._made(kind, {"output_index": len(self.output) - 1, "delta": unread, **fields})

    def _whole(self, kind: str) -> list[bytes]:
        """An event with the response as it is now."""
        if self._reader.skipped(0, 1):
            return []
        return self._made(kind, {"response": self.snapshot()})

    def _made(self, kind: str, fields: dict[str, Any]) -> list[bytes]:
        # Numbers count from 0.
        told = {"type": kind, "sequence_number": self._reader.events, **fields}
        id_line = self._reader.id_line % self._reader.next_id()
        return [id_line + encode(_JSON.encode(told), event=kind)]


def told_usage(usage: Usage) -> ResponseUsage:
    """The tokens of a response as OpenAI names them there."""
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=usage.cached_tokens, cache_write_tokens=0
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


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


def _thought_of(item: shapes.ResponseReasoningItem) -> response_reasoning_item.Content:
    assert item.content is not None
    [content] = item.content
    return content
