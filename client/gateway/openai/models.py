"""`GET /v1/models` and `GET /v1/models/{model}`: the models of the bus as OpenAI lists them."""

from __future__ import annotations

from typing import Any

from openai.types import Model
from starlette.responses import JSONResponse, Response

from broker.protocol.errors import ErrorCode
from client.gateway.anthropic.routes import (
    is_anthropics,
    model_info,
    models_page,
    shape_for,
)
from client.gateway.context import RequestContext
from client.gateway.errors import GatewayError

__all__ = ["find_model", "get_model", "list_models", "visible_models"]

#: Fields of the bus that are shown in addition to OpenAI's own.
_BESIDE = ("kinds", "images", "context_tokens", "workers", "ready", "capacity", "running", "queued")


async def visible_models(context: RequestContext) -> list[dict[str, Any]]:
    """The models that the key may use, as described by `bus.models`, sorted by name."""
    models = await context.gateway.bus.models()
    return sorted(
        (model for model in models if context.key.may_use(model["name"])),
        key=lambda model: str(model["name"]),
    )


def find_model(models: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The model with that name. Raises GatewayError(model_unavailable) if there is none."""
    for model in models:
        if model["name"] == name:
            return model
    raise GatewayError(
        ErrorCode.MODEL_UNAVAILABLE,
        f"The model {name!r} does not exist: no worker serves it; `GET /v1/models` lists those "
        "that are served.",
        param="model",
    )


def _shown(context: RequestContext, model: dict[str, Any]) -> dict[str, Any]:
    shown = Model(
        id=model["name"], object="model", created=context.gateway.started_at, owned_by="tokenbus"
    )
    return {
        **shown.model_dump(exclude_unset=True),
        **{name: model[name] for name in _BESIDE if name in model},
    }


async def list_models(context: RequestContext) -> Response:
    """Every model of the bus that the key may use, also under its other names; as Anthropic lists
    them for its clients."""
    context.error_shape = shape_for(context.request)
    models = _with_aliases(context, await visible_models(context))
    if is_anthropics(context.request):
        return JSONResponse(models_page(context, models))
    return JSONResponse({"object": "list", "data": [_shown(context, model) for model in models]})


async def get_model(context: RequestContext) -> Response:
    """One model."""
    context.error_shape = shape_for(context.request)
    name = context.request.path_params["model"]
    served = context.gateway.config.served_name(name)
    model = {**find_model(await visible_models(context), served), "name": name}
    if is_anthropics(context.request):
        return JSONResponse(model_info(context, model))
    return JSONResponse(_shown(context, model))


def _with_aliases(context: RequestContext, models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The models, and behind them those of their other names that are not patterns."""
    served = {model["name"]: model for model in models}
    return models + [
        {**served[name], "name": alias}
        for alias, name in context.gateway.config.alias
        if name in served and alias not in served and "*" not in alias
    ]
