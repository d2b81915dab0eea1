"""`POST /v1/chat/completions`, streamed and not: bus events in, OpenAI's chat shapes out.

**Re-attaching.** Every event of a stream has an id. A reader that lost its connection

* sends the same request again with `Last-Event-ID`, to any gateway of the bus: the answer follows
  from the seed, which the id carries, so it is made again and goes on behind what was received.
  That holds as long as the model is the same; log-probabilities go on with the next new token;
* or, where the request had the header `x-reattach: SECONDS`, reads `GET
  /v1/chat/completions/{id}` with `Last-Event-ID` at the same gateway within that time: the running
  answer itself goes on, and nothing is computed twice. Without that header the answer ends with
  its reader, at the worker too. `POST /v1/chat/completions/{id}/cancel` ends it at once.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat import chat_completion as whole
from openai.types.chat import chat_completion_chunk as piece
from openai.types.chat.chat_completion_message_function_tool_call import (
    ChatCompletionMessageFunctionToolCall,
    Function,
)
from starlette.responses import JSONResponse, Response

from broker.protocol.messages import TokenLogprob, Usage
from client.gateway import tools
from client.gateway.answers import ChatChoice, ChatReason, parser_for, pick_seed
from client.gateway.convert import chat_call, seeded, wants_usage_so_far
from client.gateway.errors import GatewayError
from client.gateway.generation import ChoiceEvent, Delta, Finish
from client.gateway.openai_shared import UsageSoFar, chat_logprobs, error_event, usage_of
from client.gateway.position import Position
from client.gateway.reattach import Kept, Transcript
from client.gateway.requests import ChatRequest, parse
from client.gateway.sse import DONE, Event, until_disconnect
from client.gateway.visit import Visit

__all__ = ["cancel_chat", "chat_completions", "read_chat"]

_PREFIX = "chatcmpl-"


async def chat_completions(visit: Visit) -> Response:
    """Answer a chat; see `requests.ChatRequest` for the body."""
    body = parse(ChatRequest, await visit.body())
    resumed = Position.read(_PREFIX, visit.last_event_id) if body.stream else None
    if resumed is not None and visit.gateway.store.has(resumed.answer, visit.key.name):
        return _read_again(visit, resumed)
    call = await chat_call(
        body,
        visit.gateway.config.images,
        seed=pick_seed(body.seed) if resumed is None else resumed.seed,
        user=visit.share(body.user),
    )
    visit.check(body.model, call.request.priority)
    names = [tool["function"]["name"] for tool in call.request.tools or []]
    count = body.n or 1
    position = resumed or Position.first(_PREFIX, call.request.params.seed, count)
    choices = [
        ChatChoice(parser_for(names, parallel=body.parallel_tool_calls)) for _ in range(count)
    ]
    answer = _Answer(visit, body, choices, position)
    events = visit.generate([seeded(call, i) for i in range(count)])
    if body.stream:
        source = answer.stream(events)
        if visit.reattach_s is None:
            return visit.stream(source, answer.failed)
        transcript = Transcript(
            source, answer.failed, grace_s=visit.reattach_s, on_end=visit.hand_over()
        )
        visit.gateway.store.put(Kept(position.answer, visit.key.name, transcript, kind="chat"))
        return visit.stream(transcript.read(), answer.failed)
    for event in await until_disconnect(events, visit.request.receive):
        answer.take(event)
    return Response(answer.complete(), media_type="application/json")


async def read_chat(visit: Visit) -> Response:
    """Go on with an answer that outlived its connection."""
    position = Position.read(_PREFIX, visit.last_event_id)
    return _read_again(visit, position or Position(visit.request.path_params["id"], 0, ()))


async def cancel_chat(visit: Visit) -> Response:
    """Stop an answer that outlives its connection, at the worker too."""
    kept = visit.gateway.store.find(visit.request.path_params["id"], visit.key.name, "chat")
    visit.gateway.store.drop(kept)
    return JSONResponse({"id": kept.id, "cancelled": True})


def _read_again(visit: Visit, position: Position) -> Response:
    kept = visit.gateway.store.find(position.answer, visit.key.name, "chat")
    assert kept.transcript is not None

    def failed(error: GatewayError) -> list[Event]:
        return [error_event(error, visit.request_id), DONE]

    return visit.stream(kept.transcript.read(position.events), failed)


class _Answer:
    """One answer in the making."""

    def __init__(
        self, visit: Visit, body: ChatRequest, choices: list[ChatChoice], position: Position
    ) -> None:
        self._visit = visit
        self._body = body
        self._choices = choices
        self._id = position.answer
        #: What the reader has already; nothing of it is sent again.
        self._skip = position.atoms_of(len(choices))
        self._sent = list(self._skip)
        self._events = position.events
        self._created = int(time.time())
        options = body.stream_options
        self._with_usage = options is not None and bool(options.include_usage)
        self._so_far = UsageSoFar(len(choices)) if wants_usage_so_far(body) else None

    def take(self, event: ChoiceEvent) -> list[tools.Piece]:
        """Account for one event of the bus."""
        if self._so_far is not None:
            self._so_far.take(event)
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

    def _whole_choice(self, index: int, choice: ChatChoice) -> whole.Choice:
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
        greeted = {index for index, atoms in enumerate(self._sent) if atoms}
        try:
            async for event in events:
                pieces = self.take(event)
                if not isinstance(event, Delta | Finish):
                    continue
                if event.choice not in greeted:
                    greeted.add(event.choice)
                    yield self._chunk(event.choice, piece.ChoiceDelta(role="assistant", content=""))
                pieces = self._unread(event.choice, pieces)
                deltas = list(self._deltas(self._choices[event.choice], pieces))
                logprobs = event.logprobs if isinstance(event, Delta) else None
                if logprobs and not deltas and not self._skip[event.choice]:
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
            yield self._event(last)
        yield DONE

    def _unread(self, index: int, pieces: list[tools.Piece]) -> list[tools.Piece]:
        """The pieces without what the reader has; counts what goes out."""
        unread: list[tools.Piece] = []
        for part in pieces:
            atoms = 1 if isinstance(part, tools.CallStart) else len(part.text)
            skipped = min(atoms, self._skip[index])
            self._skip[index] -= skipped
            self._sent[index] += atoms - skipped
            if isinstance(part, tools.CallStart):
                unread += [] if skipped else [part]
            elif skipped < atoms:
                unread.append(replace(part, text=part.text[skipped:]))
        return unread

    def _event(self, chunk: ChatCompletionChunk) -> Event:
        self._events += 1
        position = Position(self._id, self._events, tuple(self._sent))
        return Event(chunk.model_dump_json(exclude_unset=True), id=position.event_id)

    @staticmethod
    def _deltas(choice: ChatChoice, pieces: list[tools.Piece]) -> Iterator[piece.ChoiceDelta]:
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
        finish_reason: ChatReason | None = None,
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
            chunk.usage = self._so_far.usage if self._so_far is not None else None
        return self._event(chunk)

    def failed(self, error: GatewayError) -> list[Event]:
        """The end of a stream that fails after its first event."""
        return [error_event(error, self._visit.request_id), DONE]
