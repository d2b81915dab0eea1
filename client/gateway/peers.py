"""Answers kept by another gateway of the same bus: requested there and passed on unchanged.

A gateway keeps its answers in its own memory. With `--peers`, a gateway that does not know an id
asks the others, so that re-reading, follow-ups, cancelling and deleting work at any of them. The
caller's own key is sent along, and the peer checks it as usual. A request that came from a peer is
never passed on again. Must never keep anything itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import httpx2 as httpx
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse

from broker.protocol.errors import ErrorCode
from client.gateway.errors import UNKNOWN_HEADER, GatewayError, UnknownAnswer

if TYPE_CHECKING:
    from client.gateway.context import Handler, RequestContext

__all__ = ["Peers", "anywhere", "is_asked"]

log = logging.getLogger("tokenbus.gateway")

#: Marks a request from a peer.
HEADER: Final = "x-tokenbus-peer"
_PASSED_ON: Final = (
    "authorization",
    "x-api-key",
    "content-type",
    "last-event-id",
    "x-reattach",
    "x-request-id",
)
_PASSED_BACK: Final = ("content-type", "cache-control", "retry-after", "retry-after-ms")
#: A peer that does not accept a connection within this time is away.
_CONNECT_S: Final = 3.0


class Peers:
    """The other gateways."""

    def __init__(self, addresses: Sequence[str], silence_s: float) -> None:
        """`silence_s`: a stream that is silent for this long, even without a
        keep-alive, is broken."""
        self._addresses = tuple(address.rstrip("/") for address in addresses)
        timeout = httpx.Timeout(silence_s, connect=_CONNECT_S)
        # Not through this machine's proxy: the operator gave this address.
        self._http = httpx.AsyncClient(timeout=timeout, trust_env=False) if addresses else None

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.aclose()

    async def ask(self, context: RequestContext, body: bytes) -> Response | None:
        """The answer of the first peer that knows the id; None if none does."""
        if self._http is None or is_asked(context.request.headers):
            return None
        for address in self._addresses:
            for url, host in await _places(address):
                found = await self._ask(context, body, url, host)
                if found is not None:
                    return found
        return None

    async def _ask(
        self, context: RequestContext, body: bytes, address: str, host: str
    ) -> Response | None:
        assert self._http is not None
        asked, given = context.request, context.request.headers
        headers = {name: given[name] for name in _PASSED_ON if name in given}
        headers |= {"x-request-id": context.request_id, HEADER: "1", "host": host}
        url = f"{address}{asked.url.path}{'?' + asked.url.query if asked.url.query else ''}"
        request = self._http.build_request(asked.method, url, headers=headers, content=body)
        try:
            answer = await self._http.send(request, stream=True)
        except httpx.TransportError as error:
            log.warning("peer %s is away: %s", address, error)
            return None
        try:
            told = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                return StreamingResponse(_events(answer), answer.status_code, told)
            data = await answer.aread()
        except httpx.TransportError as error:
            log.warning("connection to peer %s broke: %s", address, error)
            return None
        if UNKNOWN_HEADER in answer.headers:
            return None
        return Response(data, answer.status_code, told)


def is_asked(headers: Headers) -> bool:
    """Whether another gateway asks, which has not found an answer itself."""
    return HEADER in headers


def anywhere(handler: Handler) -> Handler:
    """Wrap a handler: if it does not know an id, a peer that does answers instead."""

    async def answer(context: RequestContext) -> Response:
        try:
            return await handler(context)
        except UnknownAnswer:
            found = await context.gateway.peers.ask(context, context.raw_body)
            if found is None:
                raise
            return found

    return answer


async def _events(answer: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The bytes as they arrive; leaving early tells the peer that the reader is gone."""
    async with contextlib.aclosing(answer):
        try:
            async for data in answer.aiter_raw():
                yield data
        except httpx.TransportError as error:
            # If the stream breaks here, it breaks for the reader too, who then comes back.
            raise GatewayError(
                ErrorCode.CONNECTION_LOST,
                "The connection to the gateway that keeps this answer broke: "
                f"{error or type(error).__name__}.",
                retryable=True,
            ) from None


async def _places(address: str) -> list[tuple[str, str]]:
    """The addresses to ask, each with its Host header: one name may stand for several gateways."""
    url = urlsplit(address)
    host = url.hostname or ""
    if url.scheme != "http" or _is_address(host):
        return [(address, url.netloc)]
    port = url.port or 80
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        log.warning("peer %s cannot be resolved: %s", address, error)
        return []
    ips = sorted({str(entry[4][0]) for entry in found})
    plain = [f"[{ip}]" if ":" in ip else ip for ip in ips]
    return [(f"http://{ip}:{port}", url.netloc) for ip in plain]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
