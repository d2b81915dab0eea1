"""`POST /v1/chat/completions`, streamed or not: bus events in, OpenAI's chat objects out.

**Re-attaching.** Every event of a stream has an id. A reader that lost its connection

* sends the same request again with `Last-Event-ID`, to any gateway of the bus: the answer is
  determined by the seed, which the id contains, so it is generated again and continues after what
  was received, provided that the model is the same;
* or, if the request had the header `x-reattach: SECONDS`, reads `GET /v1/chat/completions/{id}`
  with `Last-Event-ID` at the same gateway within that time: the running answer itself continues,
  and nothing is computed twice. Without that header the answer ends with its reader, at the worker
  too. `POST /v1/chat/completions/{id}/cancel` ends it at once.

With `store: true` the complete answer is kept too; `GET /v1/chat/completions/{id}` is then the
stored chat (see `stored_chats`), unless it has `Last-Event-ID` or `?stream=true`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
from openai.types import CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    chat_completion as whole,
    chat_completion_chunk as piece,
)
from openai.types.chat.chat_completion_message_function_tool_call import (
    ChatCompletionMessageFunctionToolCall,
    Function,
)
from starlette.responses import Response

from broker.protocol import tool_parser as tools
from broker.protocol.messages import TokenLogprob, Usage
from client.gateway import rejoin
from client.gateway.bodies import aside
from client.gateway.context import RequestContext
from client.gateway.convert import chat_call, seeded, wants_usage_so_far
from client.gateway.errors import GatewayError, UnknownAnswer
from client.gateway.openai.answers import (
    ChatChoice,
    Part,
    Thought,
    parser_for,
    pick_seed,
    with_thoughts,
)
from client.gateway.openai.generation import (
    Batches,
    ChoiceEvent,
    Delta,
    Finish,
    Prompted,
    check_token_ids,
)
from client.gateway.openai.logprobs import named_by_id, of_prompt
from client.gateway.openai.position import Position
from client.gateway.openai.shapes import (
    FINGERPRINT,
    JSON,
    Chunks,
    UsageSoFar,
    chat_logprobs,
    continued,
    dumped,
    error_event,
    logprob_bytes,
    usage_of,
)
from client.gateway.openai.stored_chats import check_storable, find_stored, keep_chat
from client.gateway.requests import ChatRequest, TextPart
from client.gateway.sse import DONE, Source, until_disconnect

__all__ = ["Answer", "cancel_chat", "chat_completions", "read_chat"]

_PREFIX = "chatcmpl-"
#: In the store.
_KIND: Final = "chat"

_GREETING: Final = dumped(piece.ChoiceDelta(role="assistant", content=""))
_NO_TEXT: Final = dumped(piece.ChoiceDelta(content=""))
_NOTHING: Final = dumped(piece.ChoiceDelta())
#: Cannot occur inside a string, where the quotes would be escaped.
_NO_LOGPROBS: Final = b'"logprobs":{"content":[]'


async def chat_completions(context: RequestContext) -> Response:
    """Answer a chat; see `requests.ChatRequest` for the body."""
    body = await context.read(ChatRequest)
    check_storable(body)
    resumed = Position.read(_PREFIX, context.last_event_id) if body.stream else None
    if resumed is not None:
        with contextlib.suppress(UnknownAnswer):
            return _read_again(context, resumed)
    call = await chat_call(
        body,
        context.gateway.config.images,
        seed=pick_seed(body.seed) if resumed is None else resumed.seed,
        user=context.share(body.user),
        size_bytes=context.size_bytes,
    )
    if body.splits_reasoning:
        call = with_thoughts(call)
    context.check(body.model, call.request.priority)
    count = body.n or 1
    position = resumed or Position.first(_PREFIX, call.request.params.seed)
    choices = [ChatChoice(parser_for(call)) for _ in range(count)]
    answer = Answer(context, body, choices, position, call.request.params.seed)
    events = context.generate(
        [seeded(call, i) for i in range(count)],
        prompt_field="messages",
        has_enough=lambda choice: choices[choice].has_enough,
    )
    if body.stream:
        return rejoin.begin(context, _KIND, position, answer.stream(events), answer.failed)
    await until_disconnect(answer.taking(events), context.request.receive)
    data = await aside(answer.logprob_bytes, answer.complete)
    await answer.keep(data)
    return Response(data, media_type="application/json")


async def read_chat(context: RequestContext) -> Response:
    """A stored chat; or continue reading an answer that outlived its connection."""
    position = Position.read(_PREFIX, context.last_event_id)
    if position is None and context.request.query_params.get("stream") != "true":
        with contextlib.suppress(UnknownAnswer):
            return find_stored(context)
    return _read_again(context, position or Position(context.request.path_params["id"]))


async def cancel_chat(context: RequestContext) -> Response:
    """Stop an answer that outlives its connection, at the worker too."""
    return rejoin.cancel(context, _KIND)


def _read_again(context: RequestContext, position: Position) -> Response:
    """The rest of a running or kept answer. Raises UnknownAnswer."""

    def failed(error: GatewayError) -> list[bytes]:
        return [error_event(error, context.request_id), DONE]

    return rejoin.read_on(context, _KIND, position, failed)


def _is_empty(part: Part) -> bool:
    return not isinstance(part, tools.CallStart) and not part.text


def _echo_of(body: ChatRequest) -> str:
    """What the answer repeats of the last message, where that is the assistant's, as in vLLM."""
    last = body.messages[-1]
    if not body.echo or last.role != "assistant" or last.content is None:
        return ""
    if isinstance(last.content, str):
        return last.content
    return "".join(part.text for part in last.content if isinstance(part, TextPart))


class Answer:
    """One answer in progress."""

    def __init__(
        self,
        context: RequestContext,
        body: ChatRequest,
        choices: list[ChatChoice],
        position: Position,
        seed: int,
    ) -> None:
        self._seed = seed
        self._context = context
        self._body = body
        self._choices = choices
        self._id = position.answer
        options = body.stream_options
        self._so_far = UsageSoFar(len(choices)) if wants_usage_so_far(body) else None
        self._chunks = Chunks(
            ChatCompletionChunk,
            "chat.completion.chunk",
            body.model,
            position,
            len(choices),
            logprobs=bool(body.logprobs or body.return_token_ids),
            with_usage=options is not None and bool(options.include_usage),
            so_far=self._so_far,
        )
        #: Not of OpenAI's API: other servers send one name or the other.
        self._reasoning_fields = (
            context.gateway.config.reasoning_fields if body.shows_reasoning else ()
        )
        #: Who uses SGLang's words reads the field where nothing was thought, too.
        self._with_null = (
            body.separate_reasoning is not None or body.stream_reasoning is not None
        ) and "reasoning_content" in self._reasoning_fields
        #: Thoughts that come as one piece when they are over, by choice.
        self._held_thoughts: dict[int, str] = {}
        #: Choices whose role was sent.
        self._greeted: set[int] = set()
        self._prompt_token_ids: Sequence[int] = ()
        self._prompt_logprobs: list[TokenLogprob] = []
        #: What each choice begins with.
        self._echo = _echo_of(body)
        #: The reader has the ids of the prompt, or wants none.
        self._prompt_told = not body.return_token_ids or position.events > 0

    def take(self, event: ChoiceEvent) -> list[Part]:
        """Account for one event of the bus."""
        if self._so_far is not None:
            self._so_far.take(event)
        if self._body.return_token_ids:
            check_token_ids(event)
        if isinstance(event, Prompted):
            self._prompt_token_ids = event.prompt.token_ids
            self._prompt_logprobs = event.prompt.logprobs or []
        elif isinstance(event, Delta) and event.logprobs and self._body.return_tokens_as_token_ids:
            named = named_by_id(event.token_ids, event.logprobs)
            event = msgspec.structs.replace(event, logprobs=named)
        choice = self._choices[event.choice]
        pieces = choice.take(event)
        if isinstance(event, Delta):
            self._context.saw_token()
        elif isinstance(event, Finish) and choice.usage is not None:
            self._context.completion_tokens += choice.usage.completion_tokens
            self._context.prompt_tokens = choice.usage.prompt_tokens
        return pieces

    async def taking(self, batches: Batches) -> Batches:
        """The same batches, each accounted for before the next one is requested."""
        async with contextlib.aclosing(batches):
            async for batch in batches:
                for event in batch:
                    self.take(event)
                yield batch

    @property
    def logprob_bytes(self) -> int:
        """Approximate length of the log probabilities as JSON: the cost of writing them."""
        return logprob_bytes([*(c.logprobs for c in self._choices), self._prompt_logprobs])

    def complete(self) -> bytes:
        """The answer that is not streamed."""
        answer = ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=int(time.time()),
            model=self._body.model,
            choices=[self._whole_choice(i, choice) for i, choice in enumerate(self._choices)],
            usage=self._usage(),
            system_fingerprint=FINGERPRINT,
            service_tier=self._body.service_tier,
        )
        if self._body.return_token_ids:
            # Not of OpenAI's API, as below.
            setattr(answer, "prompt_token_ids", self._prompt_token_ids)  # noqa: B010
        if self._body.prompt_logprobs is not None:
            told = of_prompt(self._prompt_token_ids, self._prompt_logprobs)
            setattr(answer, "prompt_logprobs", told)  # noqa: B010
        # Log probabilities token by token: written at once, they would be a single long step.
        begun, *others = dumped(answer).split(_NO_LOGPROBS)
        parts = [begun]
        for choice, rest in zip(self._choices, others, strict=False):
            written = b",".join(map(dumped, chat_logprobs(choice.logprobs)))
            parts += (_NO_LOGPROBS.removesuffix(b"]"), written, b"]", rest)
        return b"".join(parts)

    async def keep(self, answer: bytes) -> None:
        """Store the complete answer, if that was asked for."""
        await keep_chat(self._context, self._body, self._id, self._seed, answer)

    def _whole_choice(self, index: int, choice: ChatChoice) -> whole.Choice:
        message = ChatCompletionMessage(
            role="assistant",
            content=f"{self._echo}{choice.text}" or (None if choice.calls else ""),
            refusal=None,
        )
        if choice.reasoning:
            for name in self._reasoning_fields:
                setattr(message, name, choice.reasoning)
        elif self._with_null:
            setattr(message, "reasoning_content", None)  # noqa: B010
        if choice.calls:
            message.tool_calls = [
                ChatCompletionMessageFunctionToolCall(
                    id=call.id,
                    type="function",
                    function=Function(name=call.name, arguments=call.arguments),
                )
                for call in choice.calls
            ]
        shown = whole.Choice(
            index=index,
            message=message,
            finish_reason=choice.openai_finish_reason,
            # `complete` fills them in.
            logprobs=whole.ChoiceLogprobs(content=[], refusal=None)
            if self._body.logprobs
            else None,
        )
        if self._body.return_token_ids:
            setattr(shown, "token_ids", choice.token_ids)  # noqa: B010
        if choice.continued:
            setattr(shown, "continued", choice.continued)  # noqa: B010
        return shown

    def _usage(self) -> CompletionUsage:
        return usage_of(choice.usage or Usage() for choice in self._choices)

    async def stream(self, batches: Batches) -> Source:
        """The answer as chunks. Those that end it come with its last text."""
        out: list[bytes] = []
        running = len(self._choices)
        async with contextlib.aclosing(batches):
            async for batch in batches:
                for event in batch:
                    self._tell(event, out)
                    running -= isinstance(event, Finish)
                if out and running:
                    yield out
                    out = []
        if self._body.store:
            if out:
                yield out
                out = []
            await self.keep(await aside(self.logprob_bytes, self.complete))
        yield [*out, *self._chunks.last(self._usage), DONE]

    def _tell(self, event: ChoiceEvent, out: list[bytes]) -> None:
        """Account for one bus event, and append the chunks that the reader gets."""
        pieces = self.take(event)
        if isinstance(event, Prompted):
            return
        index, reader = event.choice, self._chunks.reader
        if index not in self._greeted:
            self._greeted.add(index)
            if not reader.skipped(index, 1):
                out.append(self._chunk(index, _GREETING))
            unread = self._echo[reader.skipped(index, len(self._echo)) :]
            if unread:
                out.append(self._chunk(index, b'{"content":%b}' % JSON.encode(unread)))
        tokens = self._unread_tokens(event) if isinstance(event, Delta) else b""
        for part in self._arranged(index, pieces, over=isinstance(event, Finish)):
            delta = self._delta(index, part)
            if delta is not None:
                out.append(self._chunk(index, delta, tokens))
                tokens = b""
        if tokens:
            out.append(self._chunk(index, _NO_TEXT, tokens))
        if isinstance(event, Finish) and not reader.skipped(index, 1):
            reason = JSON.encode(self._choices[index].openai_finish_reason)
            how = continued(self._choices[index].continued)
            out.append(self._chunk(index, _NOTHING, how, finish_reason=reason))

    def _arranged(self, index: int, pieces: Sequence[Part], *, over: bool) -> Iterator[Part]:
        """The pieces, thoughts as they come or, if `stream_reasoning` is false, whole. `over`: none
        follow."""
        for part in pieces:
            if isinstance(part, Thought) and self._body.stream_reasoning is False:
                self._held_thoughts[index] = self._held_thoughts.get(index, "") + part.text
                continue
            if index in self._held_thoughts and not _is_empty(part):
                yield Thought(self._held_thoughts.pop(index))
            yield part
        if over and index in self._held_thoughts:
            yield Thought(self._held_thoughts.pop(index))

    def _unread_tokens(self, event: Delta) -> bytes:
        """Log probabilities and ids of the tokens that the reader does not have, as fields of a
        choice."""
        ids = event.token_ids if self._body.return_token_ids else ()
        logprobs = event.logprobs or [] if self._body.logprobs else []
        if not ids and not logprobs:
            return b""
        if self._body.return_tokens_as_token_ids and logprobs:
            logprobs = named_by_id(event.token_ids, logprobs)
        read = self._chunks.reader.skipped_tokens(event.choice, len(logprobs) or len(ids))
        fields = b""
        if logprobs[read:]:
            content = chat_logprobs(logprobs[read:])
            shown = piece.ChoiceLogprobs(content=content, refusal=None)
            fields += b',"logprobs":' + dumped(shown)
        if ids[read:]:
            fields += b',"token_ids":' + JSON.encode(ids[read:])
        return fields

    def _delta(self, index: int, part: Part) -> bytes | None:
        """The part of a piece that the reader does not have."""
        if isinstance(part, tools.CallStart):
            if self._chunks.reader.skipped(index, 1):
                return None
            start = piece.ChoiceDeltaToolCall(
                index=part.index,
                id=self._choices[index].calls[part.index].id,
                type="function",
                function=piece.ChoiceDeltaToolCallFunction(name=part.name, arguments=""),
            )
            return dumped(piece.ChoiceDelta(tool_calls=[start]))
        if isinstance(part, Thought) and not self._reasoning_fields:
            return None
        unread = part.text[self._chunks.reader.skipped(index, len(part.text)) :]
        if not unread:
            return None
        text = JSON.encode(unread)
        if isinstance(part, Thought):
            fields = [b'"%b":%b' % (name.encode(), text) for name in self._reasoning_fields]
            return b"{%b}" % b",".join(fields)
        if isinstance(part, tools.Text):
            return b'{"content":%b}' % text
        return b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % (part.index, text)

    def _chunk(
        self,
        index: int,
        delta: bytes,
        tokens: bytes = b"",
        *,
        finish_reason: bytes = b"null",
    ) -> bytes:
        """`tokens`: further fields of the choice, see `_unread_tokens`."""
        if self._body.logprobs and not tokens.startswith(b',"logprobs"'):
            tokens = b',"logprobs":null' + tokens
        if self._with_null and b'"reasoning_content":' not in delta:
            comma = b"," if len(delta) > 2 else b""
            delta = delta[:-1] + comma + b'"reasoning_content":null}'
        beside = b""
        if not self._prompt_told:
            self._prompt_told = True
            beside = b',"prompt_token_ids":' + JSON.encode(self._prompt_token_ids)
        return self._chunks.event(
            b'{"delta":%b,"finish_reason":%b,"index":%d%b}' % (delta, finish_reason, index, tokens),
            beside,
        )

    def failed(self, error: GatewayError) -> list[bytes]:
        """The end of a stream that fails after its first event."""
        return [error_event(error, self._context.request_id), DONE]
