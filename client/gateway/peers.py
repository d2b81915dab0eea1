"""Answers that another gateway of the same bus keeps: asked for there, and passed on as they are.

A gateway keeps what it made in its own memory. With `--peers`, a gateway that does not know an id
asks the others, so that reading on, following up, cancelling and deleting work at any of them. The
caller's own key travels along; a peer decides by it as for anybody. A question that came from a
peer is never passed on again. Must never keep anything itself.
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
from starlette.responses import Response, StreamingResponse

from broker.protocol.errors import ErrorCode
from client.gateway.errors import UNKNOWN_HEADER, GatewayError, UnknownAnswer

if TYPE_CHECKING:
    from client.gateway.context import Handler, Visit

__all__ = ["Peers", "anywhere"]

log = logging.getLogger("tokenbus.gateway")

#: Marks a question of a peer.
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
#: A peer that does not take a connection by then is away.
_CONNECT_S: Final = 3.0


class Peers:
    """The other gateways."""

    def __init__(self, addresses: Sequence[str], silence_s: float) -> None:
        """`silence_s`: a stream without even a keep-alive for so long has broken off."""
        self._addresses = tuple(address.rstrip("/") for address in addresses)
        timeout = httpx.Timeout(silence_s, connect=_CONNECT_S)
        # Not through a proxy of this machine's: the address is one that was given for this.
        self._http = httpx.AsyncClient(timeout=timeout, trust_env=False) if addresses else None

    async def close(self) -> None:
        """Let go of the connections."""
        if self._http is not None:
            await self._http.aclose()

    async def ask(self, visit: Visit, body: bytes) -> Response | None:
        """The answer of the first peer that knows; None where none does."""
        if self._http is None or HEADER in visit.request.headers:
            return None
        for address in self._addresses:
            for url, host in await _places(address):
                found = await self._ask(visit, body, url, host)
                if found is not None:
                    return found
        return None

    async def _ask(self, visit: Visit, body: bytes, address: str, host: str) -> Response | None:
        assert self._http is not None
        asked, given = visit.request, visit.request.headers
        headers = {name: given[name] for name in _PASSED_ON if name in given}
        headers |= {"x-request-id": visit.request_id, HEADER: "1", "host": host}
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
            log.warning("peer %s broke off: %s", address, error)
            return None
        if UNKNOWN_HEADER in answer.headers:
            return None
        return Response(data, answer.status_code, told)


def anywhere(handler: Handler) -> Handler:
    """The handler; where it does not know an id, a peer that does answers instead."""

    async def answer(visit: Visit) -> Response:
        try:
            return await handler(visit)
        except UnknownAnswer:
            found = await visit.gateway.peers.ask(visit, visit.raw_body)
            if found is None:
                raise
            return found

    return answer


async def _events(answer: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The bytes as they come; leaving early tells the peer that the reader is gone."""
    async with contextlib.aclosing(answer):
        try:
            async for data in answer.aiter_raw():
                yield data
        except httpx.TransportError as error:
            # A stream that breaks off here breaks off at the reader too, who then comes back.
            raise GatewayError(
                ErrorCode.CONNECTION_LOST,
                f"The gateway that keeps this answer broke off: {error or type(error).__name__}.",
                retryable=True,
            ) from None


async def _places(address: str) -> list[tuple[str, str]]:
    """Where to ask, and the host to name: a plain name may stand for several gateways."""
    url = urlsplit(address)
    host = url.hostname or ""
    if url.scheme != "http" or _is_address(host):
        return [(address, url.netloc)]
    port = url.port or 80
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        log.warning("peer %s is not known: %s", address, error)
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
