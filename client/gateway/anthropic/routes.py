"""The paths of Anthropic's API, and what they share with OpenAI's: `/v1/models`."""

from __future__ import annotations

import datetime
from typing import Any, Final

from starlette.requests import Request
from starlette.routing import Route

from client.gateway import errors
from client.gateway.anthropic.errors import error_body
from client.gateway.anthropic.messages import (
    cancel_message,
    count_tokens,
    create_message,
    read_message,
)
from client.gateway.context import RequestContext, route
from client.gateway.errors import ErrorShape, invalid
from client.gateway.peers import anywhere
from client.gateway.requests import number_of

__all__ = ["anthropic_routes", "is_anthropics", "model_info", "models_page", "shape_for"]

#: Anthropic's SDKs send it with every request.
_VERSION_HEADER: Final = "anthropic-version"


def anthropic_routes() -> list[Route]:
    """The paths of messages."""
    kept = "/v1/messages/{id:kept}"
    return [
        route("/v1/messages", create_message, "POST", counted=True, error_shape=error_body),
        route(
            "/v1/messages/count_tokens", count_tokens, "POST", counted=True, error_shape=error_body
        ),
        route(kept, anywhere(read_message), error_shape=error_body),
        route(f"{kept}/cancel", anywhere(cancel_message), "POST", error_shape=error_body),
    ]


def is_anthropics(request: Request) -> bool:
    """Whether a client of Anthropic's API asks."""
    return _VERSION_HEADER in request.headers


def shape_for(request: Request) -> ErrorShape:
    """How an error is worded where no handler of one API answers."""
    ours = is_anthropics(request) or request.url.path.startswith("/v1/messages")
    return error_body if ours else errors.error_body


def model_info(context: RequestContext, model: dict[str, Any]) -> dict[str, Any]:
    """A model of the bus as Anthropic describes one."""
    made = datetime.datetime.fromtimestamp(context.gateway.started_at, datetime.UTC)
    room_tokens = model.get("context_tokens") or None
    return {
        "type": "model",
        "id": model["name"],
        "display_name": model["name"],
        "created_at": made.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": room_tokens,
        "max_tokens": room_tokens,
    }


def models_page(context: RequestContext, models: list[dict[str, Any]]) -> dict[str, Any]:
    """A page of them, by the query's `limit`, `after_id` and `before_id`."""
    query = context.request.query_params
    limit = number_of(query.get("limit", "20"))
    if limit is None or not 1 <= limit <= 1000:
        raise invalid("limit", "`limit` is a number from 1 to 1000.")
    names = [model["name"] for model in models]
    start, end = 0, len(models)
    for name in ("after_id", "before_id"):
        given = query.get(name)
        if given is None:
            continue
        if given not in names:
            raise invalid(name, f"`{name}` names {given!r}, which is not a model here.")
        if name == "after_id":
            start = names.index(given) + 1
        else:
            end = names.index(given)
    if "before_id" in query and "after_id" not in query:
        start = max(start, end - limit)
    page = models[start:end][:limit]
    return {
        "data": [model_info(context, model) for model in page],
        "first_id": page[0]["name"] if page else None,
        "last_id": page[-1]["name"] if page else None,
        "has_more": start > 0 if "before_id" in query else len(page) < end - start,
    }
