"""Ids at the gateway's door: of requests, and of the answers that are kept.

`x-request-id` is the name of a request in its answer, in logs and in errors. `RequestIds` stands
before everything else, so that an answer has one whoever makes it: a handler, the router where
there is nothing, a check of the host's name, the web page.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable
from typing import Final

from starlette.convertors import Convertor
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["KEPT_ID", "REQUEST_ID_HEADER", "KeptId", "RequestIds", "request_id_of"]

REQUEST_ID_HEADER: Final = "x-request-id"
_STATE: Final = "tokenbus.request_id"

#: Of a kept answer. Other words in its place are paths of OpenAI's that this gateway lacks.
KEPT_ID: Final = "(chatcmpl-|resp_)[0-9A-Za-z_-]+"


class KeptId(Convertor[str]):
    """The id of a kept answer in a path."""

    regex = KEPT_ID.replace("(", "(?:")

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


def request_id_of(scope: Scope) -> str:
    """The id that `RequestIds` gave the request."""
    id_: str = scope[_STATE]
    return id_


class RequestIds:
    """An ASGI application around the whole gateway."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        # The caller's own, where it cannot forge a line of the log or a header.
        if not (request_id.isascii() and request_id.isprintable() and 0 < len(request_id) <= 128):
            request_id = f"req-{secrets.token_hex(12)}"
        scope[_STATE] = request_id

        # Not a coroutine of its own: most of its calls are parts of a body, passed on as they are.
        def tell(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            return send(message)

        await self._app(scope, receive, tell)
