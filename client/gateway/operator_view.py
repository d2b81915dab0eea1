"""`/bus/...`: the data of the web page's second tab, and the operator's drain.

All viewers of a gateway share one query of the broker per second.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct
from starlette.responses import JSONResponse, Response

from broker.protocol.limits import MAX_NAME_BYTES
from client import BusError
from client.gateway.context import RequestContext
from client.gateway.errors import GatewayError, error_body
from client.gateway.openai.models import visible_models
from client.gateway.sse import Source, encode

if TYPE_CHECKING:
    from client.gateway.state import Gateway

__all__ = ["Overview", "drain", "live", "overview", "session"]

INTERVAL_S: Final = 1.0
#: A broker that does not answer for this long is shown as away.
_PATIENCE_S: Final = 3.0
_REQUESTS: Final = 80


class Overview:
    """The latest snapshot of the bus, not older than `INTERVAL_S`."""

    def __init__(self) -> None:
        self._looked_s = float("-inf")
        self._text = ""
        self._lock = asyncio.Lock()

    async def text(self, gateway: Gateway) -> str:
        """The overview as JSON."""
        async with self._lock:
            if time.monotonic() - self._looked_s >= INTERVAL_S * 0.9:
                self._text = msgspec.json.encode(await _look(gateway)).decode()
                self._looked_s = time.monotonic()
            return self._text


async def _look(gateway: Gateway) -> dict[str, Any]:
    bus = gateway.bus
    found: dict[str, Any] = {
        "at_ms": round(time.time() * 1000),
        "gateway": {
            "running": gateway.metrics.running_now,
            "first_token_ms": gateway.metrics.recent_first_token_ms(time.monotonic()),
            "errors": list(gateway.errors),
            "key_file_problem": gateway.key_file_problem(),
            "counts_tokens": gateway.accounts is not None,
        },
    }
    asked: dict[str, dict[str, Any]] = {
        "bus.models": {},
        "bus.workers": {},
        "bus.clients": {},
        "bus.stats": {},
        "bus.requests": {"limit": _REQUESTS},
    }
    try:
        answers = await asyncio.gather(
            *(bus.query(verb, args, timeout=_PATIENCE_S) for verb, args in asked.items())
        )
    except BusError as error:
        return {**found, "problem": error.message}
    for verb, answer in zip(asked, answers, strict=True):
        found[verb.removeprefix("bus.")] = answer
    return found


async def session(context: RequestContext) -> Response:
    """The key that the page uses, and its models."""
    models = await visible_models(context)
    return JSONResponse(
        {
            "key": context.key.name,
            "keys_required": context.gateway.keys is not None,
            "operator": context.key.operator,
            "reattach_s": context.gateway.config.reattach_s,
            "models": models,
        }
    )


async def overview(context: RequestContext) -> Response:
    """One snapshot of the bus."""
    context.check_operator()
    return Response(
        await context.gateway.overview.text(context.gateway), media_type="application/json"
    )


async def live(context: RequestContext) -> Response:
    """A snapshot of the bus every second, as events."""
    context.check_operator()
    gateway = context.gateway

    async def looks() -> Source:
        while True:
            yield [encode(await gateway.overview.text(gateway))]
            await asyncio.sleep(INTERVAL_S)

    def failed(error: GatewayError) -> list[bytes]:
        told = msgspec.json.encode(error_body(error, context.request_id))
        return [encode(told, event="failed")]

    return context.stream(looks(), failed)


class DrainBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /bus/drain`."""

    worker: Annotated[str, Meta(max_length=MAX_NAME_BYTES)]
    deadline_s: Annotated[float, Meta(ge=0, le=1e6)] = 30.0
    reason: Annotated[str, Meta(max_length=1000)] = ""


async def drain(context: RequestContext) -> Response:
    """Let a worker finish its requests and accept nothing new."""
    context.check_operator()
    body = await context.read(DrainBody)
    answer = await context.gateway.bus.drain(
        body.worker, deadline_s=body.deadline_s, reason=body.reason or "requested on the web page"
    )
    return JSONResponse(answer)
