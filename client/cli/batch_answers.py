"""Answers one line of a batch in OpenAI's form; the gateway's code reads the OpenAI bodies.

Answers are built here as plain values, since OpenAI's package comes only with the extra `gateway`;
a test checks them against its types. Must never import what only that extra installs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from broker.protocol.messages import TokenLogprob, Usage
from client import AsyncClient, BusError, Retry, Timeout
from client.cli.batch_files import Line
from client.errors import BrokenProtocol, ConnectionLost, Unauthenticated
from client.gateway import convert, requests as http
from client.gateway.errors import GatewayError, describe, error_body, invalid
from client.gateway.images import ImagePolicy
from client.gateway.openai import answers
from client.gateway.openai.answers import ChatChoice, TextChoice
from client.gateway.openai.generation import Batches, generate
from client.gateway.openai.logprobs import text_logprobs

#: After these errors no line can succeed: the batch stops, and they are not recorded as
#: a line's failure.
FATAL: Final = (ConnectionLost, Unauthenticated, BrokenProtocol)


@dataclass(frozen=True, slots=True)
class Asking:
    """Settings for asking the lines."""

    bus: AsyncClient
    retry: Retry
    #: Limits for lines that set none.
    limits: Timeout
    #: Priority of lines that set none.
    priority: int
    images: ImagePolicy


@dataclass(frozen=True, slots=True)
class Answered:
    """A line of the output, and its token counts."""

    line: dict[str, Any]
    failed: bool
    prompt_tokens: int
    completion_tokens: int


async def answer(line: Line, asking: Asking) -> Answered:
    """Ask the bus. A failure of the line is an answer too; raises only errors in `FATAL`."""
    request_id = answers.new_id("req-")
    try:
        body = await _ENDPOINTS[line.url](bytes(line.body), asking)
        status, failed = 200, False
    except FATAL:
        raise
    except (GatewayError, BusError) as error:
        told = describe(error)
        body, status, failed = error_body(told, request_id), told.status, True
    usage = body.get("usage") or {}
    return Answered(
        {
            "id": answers.new_id("batch_req_"),
            "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": body},
            "error": None,
        },
        failed,
        usage.get("prompt_tokens", 0),
        usage.get("completion_tokens", 0),
    )


async def _chat(data: bytes, asking: Asking) -> dict[str, Any]:
    body = http.parse(http.ChatRequest, data)
    _refuse_stream(body)
    seed = answers.pick_seed(body.seed)
    call = await convert.chat_call(body, asking.images, seed=seed, user=body.user or "")
    if body.separate_reasoning is not False:
        call = answers.with_thoughts(call)
    call = _with_priority(call, asking, body.priority is None and body.service_tier is None)
    choices = [ChatChoice(answers.parser_for(call)) for _ in range(body.n or 1)]
    batches = _batches(
        [convert.seeded(call, i) for i in range(len(choices))],
        asking,
        "messages",
        lambda choice: choices[choice].has_enough,
    )
    async for batch in batches:
        for event in batch:
            choices[event.choice].take(event)
    answered: dict[str, Any] = {
        "id": answers.new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.model,
        "choices": [
            {
                "index": index,
                "message": _message(choice, with_reasoning=body.shows_reasoning),
                "finish_reason": choice.openai_finish_reason,
                "logprobs": _chat_logprobs(choice.logprobs) if body.logprobs else None,
                **({"continued": choice.continued} if choice.continued else {}),
            }
            for index, choice in enumerate(choices)
        ],
        "usage": _usage([choice.usage or Usage() for choice in choices]),
    }
    if body.service_tier is not None:
        answered["service_tier"] = body.service_tier
    return answered


async def _completion(data: bytes, asking: Asking) -> dict[str, Any]:
    body = http.parse(http.CompletionRequest, data)
    _refuse_stream(body)
    seed = answers.pick_seed(body.seed)
    prompts = [
        _with_priority(call, asking, body.priority is None)
        for call in convert.completion_calls(body, seed=seed, user=body.user or "")
    ]
    candidates = body.best_of or body.n or 1
    calls = [convert.seeded(call, i) for call in prompts for i in range(candidates)]
    choices = [TextChoice(body.max_tokens == 0) for _ in calls]
    async for batch in _batches(calls, asking, "prompt"):
        for event in batch:
            choices[event.choice].take(event)
    return {
        "id": answers.new_id("cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
        "choices": [
            {
                "index": index,
                "text": choice.text,
                "finish_reason": choice.finish_reason,
                "logprobs": None if body.logprobs is None else text_logprobs(choice.logprobs),
                **({"continued": choice.continued} if choice.continued else {}),
            }
            for index, choice in enumerate(answers.best_of(choices, candidates, body.n or 1))
        ],
        "usage": _usage([choice.usage for choice in choices], prompts=len(prompts)),
    }


async def _embeddings(data: bytes, asking: Asking) -> dict[str, Any]:
    body = http.parse(http.EmbeddingRequest, data)
    options: dict[str, Any] = {}
    if body.dimensions is not None:
        options["dimensions"] = body.dimensions
    made = await asking.bus.embed(
        http.texts_of("input", body.input),
        model=body.model,
        priority=asking.priority if body.priority is None else body.priority,
        user=body.user or "",
        retry=asking.retry,
        timeout=asking.limits,
        **options,
    )
    as_text = body.encoding_format == "base64"
    return {
        "object": "list",
        "model": body.model,
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": answers.packed(vector) if as_text else vector.tolist(),
            }
            for index, vector in enumerate(made.vectors)
        ],
        "usage": {
            "prompt_tokens": made.usage.prompt_tokens,
            "total_tokens": made.usage.prompt_tokens,
        },
    }


_ENDPOINTS: Final = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/embeddings": _embeddings,
}


def _batches(
    generations: Sequence[convert.Generation],
    asking: Asking,
    prompt_field: str,
    has_enough: Callable[[int], bool] = lambda choice: False,
) -> Batches:
    return generate(
        asking.bus,
        generations,
        lambda stream: None,
        retry=asking.retry,
        limits=asking.limits,
        prompt_field=prompt_field,
        has_enough=has_enough,
    )


def _refuse_stream(body: http.Sampling) -> None:
    if body.stream:
        raise invalid("stream", "A batch is not streamed; remove `stream`.")


def _with_priority(one: convert.Generation, asking: Asking, unnamed: bool) -> convert.Generation:
    if not unnamed:
        return one
    request = msgspec.structs.replace(one.request, priority=asking.priority)
    return replace(one, request=request)


def _message(choice: ChatChoice, *, with_reasoning: bool) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": choice.text if choice.text or not choice.calls else None,
        "refusal": None,
    }
    if choice.reasoning and with_reasoning:
        message["reasoning_content"] = message["reasoning"] = choice.reasoning
    if choice.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in choice.calls
        ]
    return message


def _usage(usages: Sequence[Usage], *, prompts: int = 1) -> dict[str, Any]:
    """The sum over the choices; each of the `prompts` is counted once."""
    counted = usages[:: max(1, len(usages) // prompts)]
    prompt = sum(usage.prompt_tokens for usage in counted)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(usage.cached_tokens for usage in counted),
            "image_tokens": sum(usage.image_tokens for usage in counted),
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(usage.reasoning_tokens for usage in usages)
        },
    }


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    def entry(logprob: float | None, token: bytes) -> dict[str, Any]:
        finite = logprob if logprob is not None and logprob >= answers.IMPOSSIBLE else None
        return {
            "token": token.decode(errors="replace"),
            "bytes": list(token),
            "logprob": answers.IMPOSSIBLE if finite is None else finite,
        }

    content = [
        {
            **entry(token.logprob, token.token),
            "top_logprobs": [entry(top.logprob, top.token) for top in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}
