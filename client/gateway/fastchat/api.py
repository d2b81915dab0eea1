"""Paths of FastChat's API server other than OpenAI's: its token check, and its older names.

The OpenAI paths themselves are in `client.gateway.openai`.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from client.gateway.context import RequestContext, route
from client.gateway.openai.chat import chat_completions
from client.gateway.openai.embeddings import embed
from client.gateway.openai.generation import RETRY
from client.gateway.openai.models import find_model, visible_models
from client.gateway.requests import EmbeddingRequest

__all__ = ["context_tokens", "legacy_api_routes"]

#: FastChat's assumption for a model that does not say.
ASSUMED_CONTEXT_TOKENS = 2048


class TokenCheckItem(Struct, kw_only=True):
    """A prompt and the length of answer wanted."""

    model: str
    prompt: str
    max_tokens: Annotated[int, Meta(ge=0)]


class TokenCheckBody(Struct, kw_only=True):
    """Body of `/api/v1/token_check`."""

    prompts: Annotated[list[TokenCheckItem], Meta(max_length=1000)]


class _EngineInput(EmbeddingRequest, kw_only=True):
    """Body of `/v1/engines/MODEL/embeddings`, where the path names the model."""

    model: str = "(of the path)"


def context_tokens(model: dict[str, Any]) -> int:
    """The context length of a model described by `bus.models`."""
    return model.get("context_tokens") or ASSUMED_CONTEXT_TOKENS


async def _token_check(context: RequestContext) -> Response:
    body = await context.read(TokenCheckBody)
    models = await visible_models(context)
    told = []
    for item in body.prompts:
        context.check(item.model, 0)
        room_tokens = context_tokens(find_model(models, item.model))
        count = await context.gateway.bus.count(
            item.prompt, model=item.model, user=context.share(None), retry=RETRY
        )
        fits = count + item.max_tokens <= room_tokens
        told.append({"fits": fits, "tokenCount": count, "contextLength": room_tokens})
    return JSONResponse({"prompts": told})


async def _engine_embeddings(context: RequestContext) -> Response:
    """The model is in the path, as in the first version of OpenAI's API."""
    body = await context.read(_EngineInput)
    model = context.request.path_params["model"]
    return await embed(context, msgspec.structs.replace(body, model=model))


def legacy_api_routes() -> list[Route]:
    """The paths that only FastChat's API server has."""
    return [
        route("/api/v1/token_check", _token_check, "POST", counted=True),
        route("/api/v1/chat/completions", chat_completions, "POST", counted=True),
        route("/v1/engines/{model:path}/embeddings", _engine_embeddings, "POST", counted=True),
    ]
