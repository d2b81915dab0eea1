"""`POST /v1/chat/completions`, streamed and not: bus events in, OpenAI's chat shapes out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat import chat_completion as whole
from openai.types.chat import chat_completion_chunk as piece
from openai.types.chat.chat_completion_message_function_tool_call import (
    ChatCompletionMessageFunctionToolCall,
    Function,
)
from starlette.responses import Response

from broker.protocol.messages import FinishReason, TokenLogprob, Usage
from client.gateway import tools
from client.gateway.convert import chat_call, seeded
from client.gateway.errors import GatewayError
from client.gateway.generation import ChoiceEvent, Delta, Finish, generate
from client.gateway.openai_shared import chat_logprobs, error_event, new_id, pick_seed, usage_of
from client.gateway.requests import ChatRequest, parse
from client.gateway.sse import DONE, Event, until_disconnect
from client.gateway.visit import Visit

__all__ = ["chat_completions", "parser_for"]


Reason = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class _Choice:
    """One choice as far as it is known."""

    parser: tools.ToolCallParser | None
    text: str = ""
    calls: list[_Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    usage: Usage | None = None
    finish_reason: FinishReason | None = None

    def take(self, event: Delta | Finish) -> list[tools.Piece]:
        """Account for an event; returns what is new."""
        pieces: list[tools.Piece]
        if isinstance(event, Finish):
            self.usage, self.finish_reason = event.end.usage, event.end.finish_reason
            pieces = self.parser.finish() if self.parser is not None else []
        else:
            self.logprobs += event.logprobs or []
            pieces = self.parser.feed(event.text) if self.parser else [tools.Text(event.text)]
        for part in pieces:
            match part:
                case tools.Text():
                    self.text += part.text
                case tools.CallStart():
                    self.calls.append(_Call(new_id("call_"), part.name))
                case tools.Arguments():
                    self.calls[part.index].arguments += part.text
        return pieces

    @property
    def openai_finish_reason(self) -> Reason:
        if self.finish_reason is FinishReason.LENGTH:
            return "length"
        return "tool_calls" if self.calls else "stop"


def parser_for(names: Sequence[str], *, parallel: bool | None) -> tools.ToolCallParser | None:
    """A parser where the request has tools."""
    return tools.ToolCallParser(names, parallel=parallel is not False) if names else None


async def chat_completions(visit: Visit) -> Response:
    """Answer a chat; see `requests.ChatRequest` for the body."""
    body = parse(ChatRequest, await visit.body())
    call = await chat_call(
        body,
        visit.gateway.config.images,
        seed=pick_seed(body.seed),
        user=visit.share(body.user),
    )
    visit.check(body.model, call.request.priority)
    names = [tool["function"]["name"] for tool in call.request.tools or []]
    answer = _Answer(
        visit,
        body,
        [_Choice(parser_for(names, parallel=body.parallel_tool_calls)) for _ in range(body.n or 1)],
    )
    events = generate(visit.gateway.bus, [seeded(call, i) for i in range(body.n or 1)])
    if body.stream:
        return visit.stream(answer.stream(events), answer.failed)
    for event in await until_disconnect(events, visit.request.receive):
        answer.take(event)
    return Response(answer.complete(), media_type="application/json")


class _Answer:
    """One answer in the making."""

    def __init__(self, visit: Visit, body: ChatRequest, choices: list[_Choice]) -> None:
        self._visit = visit
        self._body = body
        self._choices = choices
        self._id = new_id("chatcmpl-")
        self._created = int(time.time())
        options = body.stream_options
        self._with_usage = options is not None and bool(options.include_usage)

    def take(self, event: ChoiceEvent) -> list[tools.Piece]:
        """Account for one event of the bus."""
        if isinstance(event, Delta):
            self._visit.saw_token()
        if not isinstance(event, Delta | Finish):
            return []
        pieces = self._choices[event.choice].take(event)
        if isinstance(event, Finish):
            self._visit.completion_tokens += event.end.usage.completion_tokens
            self._visit.prompt_tokens = event.end.usage.prompt_tokens
        return pieces

    def complete(self) -> str:
        """The answer that is not streamed."""
        answer = ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._body.model,
            choices=[self._whole_choice(i, choice) for i, choice in enumerate(self._choices)],
            usage=usage_of(choice.usage or Usage() for choice in self._choices),
            service_tier=self._body.service_tier,
        )
        return answer.model_dump_json(exclude_unset=True)

    def _whole_choice(self, index: int, choice: _Choice) -> whole.Choice:
        message = ChatCompletionMessage(
            role="assistant",
            content=choice.text if choice.text or not choice.calls else None,
            refusal=None,
        )
        if choice.calls:
            message.tool_calls = [
                ChatCompletionMessageFunctionToolCall(
                    id=call.id,
                    type="function",
                    function=Function(name=call.name, arguments=call.arguments),
                )
                for call in choice.calls
            ]
        return whole.Choice(
            index=index,
            message=message,
            finish_reason=choice.openai_finish_reason,
            logprobs=whole.ChoiceLogprobs(content=chat_logprobs(choice.logprobs), refusal=None)
            if self._body.logprobs
            else None,
        )

    async def stream(
        self, events: AsyncGenerator[ChoiceEvent, None]
    ) -> AsyncGenerator[Event, None]:
        """The answer as chunks."""
        greeted: set[int] = set()
        try:
            async for event in events:
                pieces = self.take(event)
                if not isinstance(event, Delta | Finish):
                    continue
                if event.choice not in greeted:
                    greeted.add(event.choice)
                    yield self._chunk(event.choice, piece.ChoiceDelta(role="assistant", content=""))
                deltas = list(self._deltas(self._choices[event.choice], pieces))
                logprobs = event.logprobs if isinstance(event, Delta) else None
                if logprobs and not deltas:
                    deltas = [piece.ChoiceDelta(content="")]
                for position, delta in enumerate(deltas):
                    yield self._chunk(event.choice, delta, logprobs if position == 0 else None)
                if isinstance(event, Finish):
                    reason = self._choices[event.choice].openai_finish_reason
                    yield self._chunk(event.choice, piece.ChoiceDelta(), finish_reason=reason)
        finally:
            await events.aclose()
        if self._with_usage:
            usage = usage_of(choice.usage or Usage() for choice in self._choices)
            last = ChatCompletionChunk(
                id=self._id,
                object="chat.completion.chunk",
                created=self._created,
                model=self._body.model,
                choices=[],
                usage=usage,
            )
            yield Event(last.model_dump_json(exclude_unset=True))
        yield DONE

    @staticmethod
    def _deltas(choice: _Choice, pieces: list[tools.Piece]) -> Iterator[piece.ChoiceDelta]:
        for part in pieces:
            match part:
                case tools.Text():
                    if part.text:
                        yield piece.ChoiceDelta(content=part.text)
                case tools.CallStart():
                    call = choice.calls[part.index]
                    start = piece.ChoiceDeltaToolCall(
                        index=part.index,
                        id=call.id,
                        type="function",
                        function=piece.ChoiceDeltaToolCallFunction(name=part.name, arguments=""),
                    )
                    yield piece.ChoiceDelta(tool_calls=[start])
                case tools.Arguments():
                    more = piece.ChoiceDeltaToolCall(
                        index=part.index,
                        function=piece.ChoiceDeltaToolCallFunction(arguments=part.text),
                    )
                    yield piece.ChoiceDelta(tool_calls=[more])

    def _chunk(
        self,
        index: int,
        delta: piece.ChoiceDelta,
        logprobs: list[TokenLogprob] | None = None,
        *,
        finish_reason: Reason | None = None,
    ) -> Event:
        choice = piece.Choice(index=index, delta=delta, finish_reason=finish_reason)
        if self._body.logprobs:
            choice.logprobs = (
                piece.ChoiceLogprobs(content=chat_logprobs(logprobs), refusal=None)
                if logprobs
                else None
            )
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._body.model,
            choices=[choice],
        )
        if self._with_usage:
            chunk.usage = None
        return Event(chunk.model_dump_json(exclude_unset=True))

    def failed(self, error: GatewayError) -> list[Event]:
        """The end of a stream that fails after its first event."""
        return [error_event(error, self._visit.request_id), DONE]
