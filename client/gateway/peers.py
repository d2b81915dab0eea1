"""Answers kept by another gateway of the same bus: requested there and passed on unchanged.

A gateway keeps its answers in its own memory. With `--peers`, a gateway that does not know an id
asks the others, so that re-reading, follow-ups, cancelling and deleting work at any of them. The
caller's own key is sent along, and the peer checks it as usual; towards a key's limits a request
counts where its answer is kept. A request that came from a peer is never passed on again.

A peer that refuses to look, for its load or its keys, may have the answer all the same: if no other
has it, the refusal is the answer.

An answer that is not streamed may take as long as its model does, and its peer is silent meanwhile:
only one that cannot be connected to is away, and one that is waited for must live. Must never keep
anything itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar
from urllib.parse import urlsplit

import httpx2 as httpx
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse

from broker.protocol.errors import ErrorCode
from client.gateway.errors import UNKNOWN_HEADER, GatewayError, UnknownAnswer
from client.gateway.sse import until_disconnect

if TYPE_CHECKING:
    from client.gateway.context import Handler, RequestContext
    from client.gateway.keys import Usage

__all__ = ["PeerLost", "Peers", "anywhere", "is_asked", "is_refusal"]

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
_PASSED_BACK: Final = (
    "content-type",
    "cache-control",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
)
#: A peer that does not accept a connection within this time is away.
_CONNECT_S: Final = 3.0
#: How often the system asks a silent connection's other end whether it is there.
_PROBES: Final = 4

T = TypeVar("T")


class PeerLost(GatewayError):
    """The connection to a peer was lost after it was asked: it may know the id."""

    def __init__(self, why: str) -> None:
        super().__init__(
            ErrorCode.CONNECTION_LOST,
            f"The connection to the gateway that was asked for this answer broke: {why}.",
            retryable=True,
        )


class Peers:
    """The other gateways."""

    def __init__(self, addresses: Sequence[str], silence_s: float) -> None:
        """`silence_s`: a stream that is silent for this long, even without a keep-alive, is broken;
        a peer that has not answered for so long is asked whether it lives."""
        self._addresses = tuple(address.rstrip("/") for address in addresses)
        self._silence_s = silence_s
        self._http = _client(silence_s) if addresses else None

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.aclose()

    async def ask(self, context: RequestContext, body: bytes) -> Response | None:
        """The answer of the first peer that knows the id, else a refusal (see `is_refusal`); None
        if no peer knows it. Raises PeerLost, and GatewayError(cancelled) if the caller leaves,
        which stops the peer's work."""
        if is_asked(context.request.headers):
            _uncount(context)
            return None
        if self._http is None:
            return None

        async def search() -> AsyncGenerator[Sequence[Response | None], None]:
            yield [await self._search(context, body)]

        # Not counted while others are asked: this gateway may be one of them.
        account, found = _uncount(context), None
        try:
            (found,) = await until_disconnect(search(), context.request.receive)
            return found
        finally:
            if account is not None and (found is None or is_refusal(found)):
                account.recount()
                context.account = account

    async def _search(self, context: RequestContext, body: bytes) -> Response | None:
        # A reader who came back to another gateway has left a copy there: all of them delete it.
        everywhere = context.request.method == "DELETE"
        first: Response | None = None
        lost: PeerLost | None = None
        refusals: list[Response] = []
        for address in self._addresses:
            for url, host in await _places(address):
                try:
                    found = await self._ask(context, body, url, host)
                except PeerLost as error:
                    lost = error  # perhaps another knows it
                    continue
                if found is None:
                    continue
                if not is_refusal(found):
                    first = first or found
                    if not everywhere:
                        return first
                    continue
                log.warning("peer %s refuses: status %d", url, found.status_code)
                refusals.append(found)
        if first is not None:
            return first
        if lost is not None:
            raise lost
        # Rather one that passes.
        refusals.sort(key=lambda refusal: refusal.headers.get("x-should-retry") != "true")
        return refusals[0] if refusals else None

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
            answer = await self._while_alive(self._begun(request), address, host)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            log.warning("peer %s is away: %s", address, error)
            return None
        except httpx.TransportError as error:
            log.warning("connection to peer %s broke: %r", address, error)
            raise PeerLost(str(error) or type(error).__name__) from None
        if UNKNOWN_HEADER in answer.headers:
            return None
        told = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
        if not answer.is_closed:
            return StreamingResponse(_events(answer, self._silence_s), answer.status_code, told)
        return Response(answer.content, answer.status_code, told)

    async def _begun(self, request: httpx.Request) -> httpx.Response:
        """The answer: a stream when it begins, any other whole. Raises TransportError."""
        assert self._http is not None
        answer = await self._http.send(request, stream=True)
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            await answer.aread()
        return answer

    async def _while_alive(self, work: Coroutine[Any, Any, T], address: str, host: str) -> T:
        """What `work` at a peer comes to. Raises TransportError, also when the peer does not answer
        anything any more."""
        working = asyncio.create_task(work)
        watching = asyncio.create_task(self._watch(address, host))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            return await (working if working.done() else watching)
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _watch(self, address: str, host: str) -> NoReturn:
        """Raises ReadTimeout once the peer is silent to everything."""
        assert self._http is not None
        timeout = httpx.Timeout(max(self._silence_s, _CONNECT_S), connect=_CONNECT_S)
        while True:
            await asyncio.sleep(self._silence_s)
            try:
                await self._http.get(f"{address}/health", headers={"host": host}, timeout=timeout)
            except httpx.TimeoutException as error:
                raise httpx.ReadTimeout("it does not answer any more") from error
            except httpx.TransportError:
                pass  # one that stops closes its port, and still answers what it has begun


def is_asked(headers: Headers) -> bool:
    """Whether another gateway asks, which has not found an answer itself."""
    return HEADER in headers


def is_refusal(answer: Response) -> bool:
    """Whether a peer's answer says nothing of the id: its key, its limits, a failure, or something
    that is no gateway's."""
    status, is_json = answer.status_code, "json" in answer.headers.get("content-type", "")
    return status in (401, 403, 408, 429) or status >= 500 or (status >= 400 and not is_json)


def _uncount(context: RequestContext) -> Usage | None:
    """The request counts towards its key's limits where its answer is kept: not here. Returns the
    usage that it was counted in."""
    account, context.account = context.account, None
    if account is not None:
        account.uncount()
    return account


def anywhere(handler: Handler) -> Handler:
    """Wrap a handler: if it does not know an id, a peer that does answers instead."""

    async def answer(context: RequestContext) -> Response:
        peers = context.gateway.peers
        try:
            answered = await handler(context)
        except UnknownAnswer:
            found = await peers.ask(context, context.raw_body)
            if found is None:
                raise
            return found
        if context.request.method == "DELETE":
            with contextlib.suppress(PeerLost):  # here it is deleted
                await peers.ask(context, context.raw_body)
        return answered

    return answer


def _client(silence_s: float) -> httpx.AsyncClient:
    # A connection for each request: one that was open may just be closed by the peer, which would
    # look as if it had been lost. The system notices a host that has forgotten the connection.
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    every_s = max(1, round(silence_s / _PROBES))
    for name, value in (
        ("TCP_KEEPIDLE", every_s),
        ("TCP_KEEPINTVL", every_s),
        ("TCP_KEEPCNT", _PROBES),
    ):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    transport = httpx.AsyncHTTPTransport(
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        socket_options=options,
        # Not through this machine's proxy: the operator gave this address.
        trust_env=False,
    )
    timeout = httpx.Timeout(None, connect=_CONNECT_S)
    return httpx.AsyncClient(timeout=timeout, trust_env=False, transport=transport)


async def _events(answer: httpx.Response, silence_s: float) -> AsyncGenerator[bytes, None]:
    """The bytes as they arrive; leaving early tells the peer that the reader is gone."""
    async with contextlib.aclosing(answer):
        arriving = answer.aiter_raw()
        try:
            while True:
                async with asyncio.timeout(silence_s):
                    data = await anext(arriving, None)
                if data is None:
                    return
                yield data
        # If the stream breaks here, it breaks for the reader too, who then comes back.
        except TimeoutError:
            raise PeerLost(f"nothing came for {silence_s:g} s") from None
        except httpx.TransportError as error:
            raise PeerLost(str(error) or type(error).__name__) from None


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
