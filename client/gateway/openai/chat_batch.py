"""`POST /v1/chat/completions/batch`: several conversations in one request, as vLLM has it.

The fields are those of a chat, but for `messages`, a list of conversations; the answer is that of a
chat with the choices of all of them, in their order. It is whole: a stream of several conversations
has no form that a client would know.
"""

from __future__ import annotations

import contextlib
import re
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta
from starlette.responses import Response

from client.gateway.context import RequestContext
from client.gateway.convert import Generation, chat_call, seeded
from client.gateway.errors import GatewayError, invalid
from client.gateway.openai.answers import ChatChoice, parser_for, pick_seed, with_thoughts
from client.gateway.openai.chat import Answer
from client.gateway.openai.generation import Batches
from client.gateway.openai.position import Position
from client.gateway.requests import MAX_CHOICES, ChatMessage, ChatRequest
from client.gateway.sse import until_disconnect

__all__ = ["ChatBatchRequest", "chat_batch"]

_PREFIX: Final = "chatcmpl-"
Conversation = Annotated[list[ChatMessage], Meta(min_length=1)]


class ChatBatchRequest(ChatRequest, kw_only=True):
    """Body of `POST /v1/chat/completions/batch`."""

    messages: Annotated[list[Conversation], Meta(min_length=1)]  # type: ignore[assignment]


async def chat_batch(context: RequestContext) -> Response:
    """Answer several chats."""
    body = await context.read(ChatBatchRequest)
    if body.stream:
        raise invalid("stream", "`stream` is not served here: send each chat by itself.")
    if body.store:
        raise invalid("store", "`store` is not served here: send each chat by itself.")
    each = body.n or 1
    if len(body.messages) * each > MAX_CHOICES:
        raise invalid("messages", f"More than {MAX_CHOICES} answers are asked for.")
    seed = pick_seed(body.seed)
    calls: list[Generation] = []
    answers: list[Answer] = []
    choices: list[ChatChoice] = []
    for place in range(len(body.messages)):
        chat = _alone(body, place)
        call = await _call(context, chat, seed, place)
        context.check(body.model, call.request.priority)
        mine = [ChatChoice(parser_for(call)) for _ in range(each)]
        answers.append(Answer(context, chat, mine, Position.first(_PREFIX, seed), seed))
        calls += [seeded(call, copy) for copy in range(each)]
        choices += mine
    events = context.generate(
        calls, prompt_field="messages", has_enough=lambda index: choices[index].has_enough
    )
    await until_disconnect(_taking(events, answers, each), context.request.receive)
    ends = [choice.usage for choice in choices if choice.usage is not None]
    context.prompt_tokens = sum(usage.prompt_tokens for usage in ends[::each])
    raw = await context.aside(_together, answers, each)
    return Response(raw, media_type="application/json")


def _alone(body: ChatBatchRequest, place: int) -> ChatRequest:
    """One of the chats."""
    given = {name: getattr(body, name) for name in ChatRequest.__struct_fields__}
    return ChatRequest(**{**given, "messages": body.messages[place]})


async def _call(context: RequestContext, chat: ChatRequest, seed: int, place: int) -> Generation:
    try:
        call = await chat_call(
            chat,
            context.gateway.config.images,
            seed=seed,
            user=context.share(chat.user),
            size_bytes=context.size_bytes,
        )
    except GatewayError as error:
        raise _of_chat(error, place) from None
    return with_thoughts(call) if chat.splits_reasoning else call


def _of_chat(error: GatewayError, place: int) -> GatewayError:
    """The same error with the place of the chat in the name of its field."""
    if error.param is None or not re.match(r"messages\b", error.param):
        return error
    name = error.param.replace("messages", f"messages[{place}]", 1)
    return GatewayError(
        error.info.code,
        error.info.message.replace(f"`{error.param}`", f"`{name}`"),
        param=name,
        status=error.status,
        details=error.info.details,
    )


async def _taking(batches: Batches, answers: list[Answer], each: int) -> Batches:
    """The same batches, each event taken into the answer of its chat."""
    async with contextlib.aclosing(batches):
        async for batch in batches:
            for event in batch:
                chat, choice = divmod(event.choice, each)
                answers[chat].take(msgspec.structs.replace(event, choice=choice))
            yield batch


def _together(answers: list[Answer], each: int) -> bytes:
    """The answers as one."""
    first, *others = told = [msgspec.json.decode(answer.complete()) for answer in answers]
    choices: list[dict[str, Any]] = []
    for place, one in enumerate(told):
        # What a chat's answer has of its prompt belongs to each choice here.
        of_prompt = {name: one.pop(name) for name in _OF_PROMPT if name in one}
        choices += [
            {**choice, **of_prompt, "index": place * each + choice["index"]}
            for choice in one["choices"]
        ]
    for one in others:
        _add(first["usage"], one["usage"])
    return msgspec.json.encode({**first, "choices": choices})


_OF_PROMPT: Final = ("prompt_token_ids", "prompt_logprobs")


def _add(total: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict):
            _add(total.setdefault(name, {}), value)
        elif isinstance(value, int):
            total[name] = (total.get(name) or 0) + value
