"""`POST /v1/responses/compact`: a conversation as what its user said and a summary of the rest.

The model that goes on with it writes the summary, which comes back as an item `compaction`; sent as
input it is shown to the model in the user's words. Must never shorten a summary: one that does not
fit is an error.
"""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec
from starlette.responses import Response

from broker.protocol.errors import ErrorCode
from broker.protocol.messages import Usage
from client.gateway import requests as http
from client.gateway.bodies import aside
from client.gateway.context import RequestContext
from client.gateway.errors import GatewayError, invalid
from client.gateway.openai.answers import ChatChoice, new_id, parser_for, with_thoughts
from client.gateway.openai.responses import input_of
from client.gateway.openai.responses_body import ResponseRequest
from client.gateway.openai.responses_output import told_usage
from client.gateway.openai.sealing import SUMMARY, sealed
from client.gateway.openai.shapes import dumped
from client.gateway.sse import until_disconnect

__all__ = ["CompactRequest", "compact_response"]

_ASK: Final = (
    "Write a summary of our conversation so far for someone who continues it without having read "
    "it: what was asked and decided; names, numbers, paths and code that must be kept word for "
    "word; what was done and what came of it; and what remains to be done. Write only the summary."
)


class CompactRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /v1/responses/compact`."""

    model: http.ModelName
    input: str | list[dict[str, Any]] | None = None
    previous_response_id: str | None = None
    instructions: str | None = None
    service_tier: http.ServiceTier | None = None
    # Labels.
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: http.Label = None
    user: str | None = None


async def compact_response(context: RequestContext) -> Response:
    """Compact a conversation."""
    body = await context.read(CompactRequest)
    if not body.input and body.previous_response_id is None:
        raise invalid("input", "`input` is required.")
    given = body.input or []
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": given}]
    asked = ResponseRequest(
        model=body.model,
        input=[*given, {"type": "message", "role": "user", "content": _ASK}],
        previous_response_id=body.previous_response_id,
        instructions=body.instructions,
        service_tier=body.service_tier,
        user=body.user,
    )
    _, chat, call = await input_of(context, asked)
    context.check(body.model, call.request.priority)
    call = with_thoughts(call)
    choice = ChatChoice(parser_for(call))
    batches = context.generate([call], prompt_field="input")
    for event in await until_disconnect(batches, context.request.receive):
        choice.take(event)
    usage = choice.usage or Usage()
    context.prompt_tokens, context.completion_tokens = usage.prompt_tokens, usage.completion_tokens
    if choice.openai_finish_reason == "length":
        raise GatewayError(
            ErrorCode.CONTEXT_OVERFLOW,
            "The summary does not fit into what the conversation leaves of the model's context; "
            "compact earlier, or leave out old items.",
            param="input",
        )
    if not choice.text.strip():
        raise GatewayError(
            ErrorCode.ENGINE_ERROR, "The model wrote no summary; ask again.", retryable=True
        )
    summary = {
        "type": "compaction",
        "id": new_id("cmp_"),
        "encrypted_content": sealed(choice.text),
    }
    told = {
        "id": new_id("resp_"),
        "object": "response.compaction",
        "created_at": int(time.time()),
        "output": [*_said_by_the_user(chat.messages[:-1]), summary],
        "usage": msgspec.Raw(dumped(told_usage(usage))),
        **({"continued": choice.continued} if choice.continued else {}),
    }
    data = await aside(context.size_bytes, msgspec.json.encode, told)
    return Response(data, media_type="application/json")


def _said_by_the_user(messages: list[http.ChatMessage]) -> list[dict[str, Any]]:
    """The user's messages as items, word for word; earlier summaries are part of the new one."""
    items: list[dict[str, Any]] = []
    for message in messages:
        content = message.content
        if message.role != "user" or content is None:
            continue
        if isinstance(content, str):
            if content.startswith(SUMMARY):
                continue
            parts = [{"type": "input_text", "text": content}]
        else:
            parts = [_part(part) for part in content]
        id_ = new_id("msg_")
        said = {"role": "user", "status": "completed", "content": parts}
        items.append({"type": "message", "id": id_, **said})
    return items


def _part(part: http.ContentPart) -> dict[str, Any]:
    if isinstance(part, http.ImagePart):
        url = part.image_url
        shown = {"image_url": url, "detail": "auto"}
        if isinstance(url, http.ImageUrl):
            shown = {"image_url": url.url, "detail": url.detail or "auto"}
        return {"type": "input_image", **shown}
    assert isinstance(part, http.TextPart), "no other part stands in a user's message of this API"
    return {"type": "input_text", "text": part.text}
