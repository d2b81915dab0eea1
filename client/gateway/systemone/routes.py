"""`POST /v1/systemone`: the body becomes a request of the bus, its answers those of the API.

A body that is wrong in itself is refused with 422 and the `detail` that servers of the API give;
what only the model can refuse is a 400. Both carry the `error` of every path here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.responses import Response

from broker.protocol.errors import ErrorCode
from client import Decisions, InvalidRequest, calls
from client.decisions import decisions_from
from client.gateway.context import RequestContext
from client.gateway.errors import GatewayError, describe
from client.gateway.images import ImagePolicy, load_image
from client.gateway.openai.generation import RETRY, naming
from client.gateway.sse import until_disconnect
from client.gateway.systemone.bodies import Asset, SystemOneRequest

__all__ = ["system_one"]


async def system_one(context: RequestContext) -> Response:
    """Answers to typed questions; see `bodies.SystemOneRequest` for the body."""
    data = await context.body()
    try:
        body = await context.decoded(SystemOneRequest, data)
        context.check(body.model, body.priority or 0)
        call = await _call(context, body)
    except (GatewayError, InvalidRequest) as error:
        raise _unprocessable(describe(error)) from None

    async def work() -> AsyncGenerator[list[Decisions], None]:
        with naming("state"):
            yield [decisions_from(await context.ask(call), body.questions)]

    [decided] = await until_disconnect(work(), context.request.receive)
    answer = {
        "model": body.model,
        "answers": decided.answers,
        "usage": {"input_tokens": decided.usage.prompt_tokens, "output_tokens": 0},
    }
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def _call(context: RequestContext, body: SystemOneRequest) -> calls.Call:
    """The request of the bus. Raises GatewayError, InvalidRequest."""
    images = await _images(body.assets, context.gateway.config.images)
    options: dict[str, Any] = {
        "priority": body.priority or 0,
        "user": context.share(body.user),
        "retry": RETRY,
    }
    defaults = context.gateway.bus.defaults
    return await context.aside(
        calls.decide, defaults, body.model, body.state, body.questions, images, options
    )


async def _images(assets: dict[str, Asset], policy: ImagePolicy) -> dict[str, bytes]:
    """The bytes of each asset. Raises GatewayError that names the one at fault."""

    def address(asset: Asset) -> str:
        if asset.data_base64[:5].lower() == "data:":
            return asset.data_base64
        return f"data:image/{asset.format or 'png'};base64,{asset.data_base64}"

    loading = [
        load_image(address(asset), policy, f"assets.{name}.data_base64")
        for name, asset in assets.items()
    ]
    return dict(zip(assets, await asyncio.gather(*loading), strict=True))


def _unprocessable(error: GatewayError) -> GatewayError:
    """The refusal of a body that is wrong in itself, as the API's servers word it."""
    if error.info.code != ErrorCode.INVALID_REQUEST:
        return error
    param = error.param or error.info.details.get("parameter")
    place = re.split(r"[.\[\]]+", param) if isinstance(param, str) else []
    return GatewayError(
        ErrorCode.INVALID_REQUEST,
        error.info.message,
        param=param,
        status=422,
        detail=[{"loc": ["body", *place], "msg": error.info.message, "type": "value_error"}],
    )
