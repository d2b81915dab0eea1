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


async def visible_models(visit: RequestContext) -> list[dict[str, Any]]:
    """The models that the key may use, as described by `bus.models`, sorted by name."""
    models = await visit.gateway.bus.models()
    return sorted(
        (model for model in models if visit.key.may_use(model["name"])),
        key=lambda model: str(model["name"]),
    )


def find_model(models: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The model with that name. Raises GatewayError(model_unavailable) if there is none."""
    for model in models:
        if model["name"] == name:
            return model
    raise GatewayError(
        ErrorCode.MODEL_UNAVAILABLE,
        f"No worker serves model {name!r}; `GET /v1/models` lists the models served.",
        param="model",
    )


def _shown(visit: RequestContext, model: dict[str, Any]) -> dict[str, Any]:
    shown = Model(
        id=model["name"], object="model", created=visit.gateway.started_at, owned_by="tokenbus"
    )
    return {
        **shown.model_dump(exclude_unset=True),
        **{name: model[name] for name in _BESIDE if name in model},
    }


async def list_models(visit: RequestContext) -> Response:
    """Every model of the bus that the key may use, also under its other names; as Anthropic lists
    them for its clients."""
    visit.error_shape = shape_for(visit.request)
    models = _with_aliases(visit, await visible_models(visit))
    if is_anthropics(visit.request):
        return JSONResponse(models_page(visit, models))
    return JSONResponse({"object": "list", "data": [_shown(visit, model) for model in models]})


async def get_model(visit: RequestContext) -> Response:
    """One model."""
    visit.error_shape = shape_for(visit.request)
    name = visit.request.path_params["model"]
    served = visit.gateway.config.served_name(name)
    model = {**find_model(await visible_models(visit), served), "name": name}
    if is_anthropics(visit.request):
        return JSONResponse(model_info(visit, model))
    return JSONResponse(_shown(visit, model))


def _with_aliases(visit: RequestContext, models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The models, and behind them those of their other names that are not patterns."""
    served = {model["name"]: model for model in models}
    return models + [
        {**served[name], "name": alias}
        for alias, name in visit.gateway.config.alias
        if name in served and alias not in served and "*" not in alias
    ]
