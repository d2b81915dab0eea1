"""Ids at the gateway: of requests, and of kept answers.

`x-request-id` identifies a request in its answer, in logs and in errors. `RequestIds` is the
outermost layer, so that every answer has one, whoever makes it: a handler, the router for an
unknown path, the check of the host name, the web page.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable
from typing import Final

from starlette.convertors import Convertor
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = [
    "KEPT_ID",
    "POSITION_HEADER",
    "REQUEST_ID_HEADER",
    "START_HEADER",
    "KeptId",
    "RequestIds",
    "new_request_id",
    "request_id_of",
    "with_request_id",
]

REQUEST_ID_HEADER: Final = "x-request-id"
POSITION_HEADER: Final = "x-queue-position"
START_HEADER: Final = "x-expected-start-ms"
#: The same, where Anthropic's SDKs look for it.
_ANTHROPICS: Final = "request-id"
_STATE: Final = "tokenbus.request_id"

#: The id of a kept answer. Anything else in its place is an OpenAI path that this gateway
#: does not have.
KEPT_ID: Final = "(chatcmpl-|conv_|resp_|msg_)[0-9A-Za-z_-]+"


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


def new_request_id() -> str:
    """An id for a request whose caller gave none."""
    return f"req-{secrets.token_hex(12)}"


def with_request_id(scope: Scope, request_id: str) -> Scope:
    """The same request, with an id."""
    return {**scope, _STATE: request_id}


class RequestIds:
    """An ASGI application around the whole gateway."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        # The caller's own id, unless it could forge a log line or a header.
        if not (request_id.isascii() and request_id.isprintable() and 0 < len(request_id) <= 128):
            request_id = new_request_id()
        scope[_STATE] = request_id

        # Not a coroutine: most calls pass on parts of a body unchanged.
        def tell(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = headers[_ANTHROPICS] = request_id
            return send(message)

        await self._app(scope, receive, tell)
