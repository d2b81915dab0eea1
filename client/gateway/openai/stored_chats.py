"""Chats that were asked with `store: true`: listed, read, labelled and deleted at
`/v1/chat/completions`, with the messages that they were asked with.

They are kept in the gateway's store like other answers, and make room like them. A chat is kept
once it is complete, streamed or not, before its reader is told the end; what failed is not kept.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from starlette.responses import JSONResponse, Response

from client.gateway.bodies import aside
from client.gateway.context import RequestContext
from client.gateway.errors import UnknownAnswer
from client.gateway.openai.pages import Metadata, Page, page_of
from client.gateway.reattach import Kept
from client.gateway.requests import ChatMessage, ChatRequest, converted

__all__ = [
    "ChatUpdate",
    "check_storable",
    "delete_chat",
    "find_stored",
    "keep_chat",
    "list_chats",
    "stored_messages",
    "update_chat",
]

#: In the store; `chat` are streams that a reader may come back to.
_KIND: Final = "stored chat"

_LABEL: Final = re.compile(r"metadata\[(?P<name>.*)\]")


class ChatUpdate(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /v1/chat/completions/{id}`."""

    metadata: Metadata | None


@dataclass(slots=True)
class _Stored:
    """One chat."""

    id: str
    model: str
    metadata: dict[str, str]
    #: The answer, a JSON object, and beside it what was asked apart from the messages.
    answer: bytes
    asked: bytes
    messages: list[ChatMessage]
    over: bool = True

    def shown(self) -> bytes:
        """As the API has it."""
        labels = msgspec.json.encode(self.metadata)
        return b'%b,"metadata":%b,%b' % (self.answer[:-1], labels, self.asked[1:])


def check_storable(body: ChatRequest) -> None:
    """Raises GatewayError where a chat that is to be kept has labels that cannot be."""
    if body.store and body.metadata is not None:
        converted(body.metadata, Metadata, "metadata")


async def keep_chat(
    context: RequestContext, body: ChatRequest, id_: str, seed: int, answer: bytes
) -> None:
    """Keep an answer, whole as JSON, if it is to be."""
    if not body.store:
        return
    asked = await context.aside(_asked, body, seed, context.request_id)
    labels: dict[str, str] = body.metadata or {}
    stored = _Stored(id_, body.model, labels, answer, asked, body.messages)
    size_bytes = context.size_bytes + len(answer)
    context.gateway.store.put(Kept(id_, context.key.name, _KIND, stored, size_bytes))


def _asked(body: ChatRequest, seed: int, request_id: str) -> bytes:
    """What was asked, under OpenAI's names of it."""
    told = {
        "request_id": request_id,
        "seed": body.seed if body.seed is not None else seed,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "presence_penalty": body.presence_penalty or 0.0,
        "response_format": body.response_format,
        "tools": body.tools or None,
        "tool_choice": body.tool_choice,
        "input_user": body.user,
    }
    return msgspec.json.encode(told)


def find_stored(context: RequestContext) -> Response:
    """The chat that the path names. Raises UnknownAnswer."""
    return _json(_at_path(context).value.shown())


async def list_chats(context: RequestContext) -> Response:
    """The key's chats in pages, the oldest first; of one model, or with some labels."""
    query = context.request.query_params
    labels = {at["name"]: query[key] for key in query if (at := _LABEL.fullmatch(key))}
    named = [f"metadata[{name}]" for name in labels]
    page = Page.asked(context, "model", *named, order="asc")
    model = query.get("model")
    if model is not None:
        model = context.gateway.config.served_name(model)
    of_key: list[Kept] = list(context.gateway.store.of(context.key.name, _KIND))
    found = [
        kept
        for kept in of_key
        if (model is None or kept.value.model == model)
        and labels.items() <= kept.value.metadata.items()
    ]
    shown, around = page_of(found, page, lambda kept: kept.id, "a stored chat of these")
    data = [msgspec.Raw(kept.value.shown()) for kept in shown]
    size_bytes = sum(kept.size_bytes for kept in shown)
    return _json(await aside(size_bytes, msgspec.json.encode, {**around, "data": data}))


async def update_chat(context: RequestContext) -> Response:
    """Give a chat other labels."""
    body = await context.read(ChatUpdate)
    kept = _at_path(context)
    kept.value.metadata = body.metadata or {}
    return _json(kept.value.shown())


async def delete_chat(context: RequestContext) -> Response:
    """Forget a chat."""
    kept, store = _at_path(context), context.gateway.store
    store.delete(kept)
    with contextlib.suppress(UnknownAnswer):
        # Its events, of one whose reader may come back.
        store.drop(store.find(kept.id, context.key.name, "chat"))
    return JSONResponse({"id": kept.id, "object": "chat.completion.deleted", "deleted": True})


async def stored_messages(context: RequestContext) -> Response:
    """The messages that a chat was asked with, in pages, the first one first."""
    kept = _at_path(context)
    page = Page.asked(context, order="asc")
    numbered = list(enumerate(kept.value.messages))
    shown, around = page_of(
        numbered, page, lambda one: f"{kept.id}-{one[0]}", "a message of this chat"
    )
    data = [_message(f"{kept.id}-{number}", message) for number, message in shown]
    # A page may hold many megabytes of images.
    return _json(await aside(kept.size_bytes, msgspec.json.encode, {**around, "data": data}))


def _message(id_: str, message: ChatMessage) -> dict[str, Any]:
    fields = _without_nulls(msgspec.to_builtins(message))
    content = fields.get("content")
    in_parts = isinstance(content, list)
    return {
        **fields,
        "id": id_,
        "content": None if in_parts else content,
        "content_parts": content if in_parts else None,
    }


def _without_nulls(value: Any) -> Any:
    """As it was sent: what was not given is null in the shapes that bodies are decoded to."""
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return value


def _at_path(context: RequestContext) -> Kept:
    id_ = context.request.path_params["id"]
    try:
        return context.gateway.store.find(id_, context.key.name, _KIND)
    except UnknownAnswer:
        raise UnknownAnswer(
            f"No chat {id_!r} here: it was not asked with `store: true`, is too old, was deleted, "
            "belongs to another key, or is kept by a gateway that cannot be asked."
        ) from None


def _json(data: bytes) -> Response:
    return Response(data, media_type="application/json")
