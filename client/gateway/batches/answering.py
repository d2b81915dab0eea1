"""Answers one line of a batch through the gateway's own door for it: the same checks, the same
errors, the same answer as to a request over HTTP that is not streamed.

The line becomes the body of a request that no connection brought. Must never answer a line twice:
what says nothing about the line itself, such as a broker that is away, is raised as `Unanswered`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.types import Message

from client import AsyncClient, Retry, Timeout
from client.errors import BrokenProtocol, ConnectionLost, Unauthenticated
from client.gateway.batches.lines import Line
from client.gateway.config import Config
from client.gateway.context import Handler, RequestContext
from client.gateway.errors import GatewayError, describe, error_body, invalid
from client.gateway.keys import Key
from client.gateway.openai.answers import new_id
from client.gateway.openai.chat import chat_completions
from client.gateway.openai.completions import completions
from client.gateway.openai.embeddings import embeddings
from client.gateway.openai.responses import create_response
from client.gateway.peers import Peers
from client.gateway.reattach import Store
from client.gateway.state import Gateway
from client.gateway.traces import HttpSpan

__all__ = [
    "PRIORITY",
    "RETRY",
    "Answered",
    "Doors",
    "Unanswered",
    "gateway_of",
    "refused",
    "unexecuted",
]

PRIORITY: Final = -50
"""The same as OpenAI's `service_tier: flex`."""

RETRY: Final = Retry(attempts=100, backoff_longest=30.0, reconnect=600.0)
"""A batch is not in a hurry: it waits longer than a person would."""

_DOORS: Final[dict[str, Handler]] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/embeddings": embeddings,
    "/v1/responses": create_response,
}
_HEADERS: Final = [(b"content-type", b"application/json")]


class Unanswered(Exception):
    """The line has no answer: the bus is away, or refuses the gateway."""

    def __init__(self, told: GatewayError) -> None:
        super().__init__(told.info.message)
        self.told = told


@dataclass(frozen=True, slots=True)
class Answered:
    """A line of the output."""

    line: dict[str, Any]
    #: None: the line was answered with a 200.
    failure: GatewayError | None = None


class Doors:
    """The doors, for lines."""

    def __init__(self, gateway: Gateway, *, retry: Retry = RETRY, priority: int = PRIORITY) -> None:
        """`priority`: of lines that name none."""
        # Lines have a memory for bodies of their own, and do not push out the answers that
        # `/v1/responses` keeps.
        self._gateway = replace(gateway, store=Store(0, 0), bodies_bytes=0)
        self._retry = retry
        self._priority = priority

    async def answer(
        self, line: Line, key: Key, limits: Timeout, *, default_model: str = ""
    ) -> Answered:
        """The answer, or the line's failure. `limits`: of lines that set none. `default_model`:
        of lines that name none; empty: the only one that is served. Raises Unanswered."""
        request_id = new_id("req-")
        context = RequestContext(
            self._gateway,
            _request(line),
            request_id,
            key,
            retry=self._retry,
            limits=limits,
            default_priority=self._priority,
            default_model=default_model,
            unattended=True,
        )
        if self._gateway.tracer is not None:
            context.span = HttpSpan(self._gateway.tracer, "POST", line.url, {}, request_id)
        status, failure, body = 200, None, b""
        try:
            _refuse_unkept(line)
            response = await _DOORS[line.url](context)
            body = bytes(response.body)
        except (ConnectionLost, Unauthenticated, BrokenProtocol) as error:
            raise Unanswered(describe(error)) from error
        except Exception as error:
            failure = describe(error)
            status, body = failure.status, msgspec.json.encode(error_body(failure, request_id))
        finally:
            context.failure = failure
            context.close()
            if context.span is not None:
                context.span.end(status if body else 499)
        answer = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
        return Answered(_written(line.custom_id, answer, None), failure)


def refused(line: Line, failure: GatewayError) -> Answered:
    """The line's failure, for a cause that no door finds."""
    request_id = new_id("req-")
    body = msgspec.Raw(msgspec.json.encode(error_body(failure, request_id)))
    answer = {"status_code": failure.status, "request_id": request_id, "body": body}
    return Answered(_written(line.custom_id, answer, None), failure)


def unexecuted(custom_id: str, code: str, message: str) -> dict[str, Any]:
    """The output of a line that did not run."""
    return _written(custom_id, None, {"code": code, "message": message})


def _written(custom_id: str, response: Any, error: Any) -> dict[str, Any]:
    return {
        "id": new_id("batch_req_"),
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }


def gateway_of(config: Config, bus: AsyncClient) -> Gateway:
    """The state of a gateway that serves nobody, for a program that answers lines by itself."""
    return Gateway(config, bus, None, Store(0, 0), Peers((), 1.0))


def _refuse_unkept(line: Line) -> None:
    asked = line.asked
    if asked.stream:
        raise invalid("stream", "A batch is not streamed; remove `stream`.")
    if asked.background:
        raise invalid("background", "A batch runs in the background; remove `background`.")


def _request(line: Line) -> Request:
    """A request with the line's body, whose client stays."""
    body: list[Message] = [{"type": "http.request", "body": bytes(line.body), "more_body": False}]

    async def receive() -> Message:
        while not body:
            await asyncio.Event().wait()
        return body.pop()

    scope = {
        "type": "http",
        "method": "POST",
        "path": line.url,
        "query_string": b"",
        "headers": _HEADERS,
        "client": None,
    }
    return Request(scope, receive)
