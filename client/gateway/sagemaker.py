"""The two paths that SageMaker asks of a container: `/ping`, and `/invocations` for every request.

What a request is, its body says: a chat has `messages`, a completion `prompt`, vectors `input`. The
rest is that path's own.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from client.gateway.context import Handler, RequestContext, route
from client.gateway.errors import invalid
from client.gateway.openai.chat import chat_completions
from client.gateway.openai.completions import completions
from client.gateway.openai.embeddings import embeddings

__all__ = ["sagemaker_routes"]

_HANDLERS: Final[dict[str, Handler]] = {
    "messages": chat_completions,
    "prompt": completions,
    "input": embeddings,
}


class _Told(Struct):
    """The fields by which kinds of bodies are told apart, unread."""

    messages: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    input: Raw | UnsetType = UNSET


async def _invocations(context: RequestContext) -> Response:
    context.given_body = data = await context.body()
    field = await context.aside(_field_of, data)
    return await _HANDLERS[field](context)


def _field_of(data: bytes) -> str:
    try:
        told: Any = msgspec.json.decode(data, type=_Told)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(None, f"The body is not a JSON object: {error}.") from None
    for field in _HANDLERS:
        if getattr(told, field) is not UNSET:
            return field
    raise invalid("messages", "Send `messages` for a chat, `prompt` for a completion, or `input`.")


async def _ping(context: RequestContext) -> Response:
    return PlainTextResponse("ok")


def sagemaker_routes() -> list[Route]:
    """Both paths."""
    return [
        route("/ping", _ping, public=True),
        route("/invocations", _invocations, "POST", counted=True),
    ]
