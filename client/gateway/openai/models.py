"""`GET /v1/models` and `GET /v1/models/{model}`: the models of the bus as OpenAI lists them."""

from __future__ import annotations

from typing import Any

from openai.types import Model
from starlette.responses import JSONResponse, Response

from broker.protocol.errors import ErrorCode
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
    """Every model of the bus that the key may use."""
    models = [_shown(visit, model) for model in await visible_models(visit)]
    return JSONResponse({"object": "list", "data": models})


async def get_model(visit: RequestContext) -> Response:
    """One model."""
    model = find_model(await visible_models(visit), visit.request.path_params["model"])
    return JSONResponse(_shown(visit, model))
