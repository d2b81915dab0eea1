"""Fetches an image from an http or https address that a caller named.

Only from public internet addresses: the name is looked up once, all its addresses are checked, the
connection goes to a checked address, and each redirect starts over. One deadline covers everything
from the look-up to the last byte, and nothing here blocks threads that others use. Images are not
decoded; the worker does that under its own limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterable
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore2 as httpcore

from broker.protocol.errors import ErrorCode
from client.gateway.addresses import public_address
from client.gateway.errors import GatewayError, invalid, too_large
from client.gateway.images import ImagePolicy

__all__ = ["fetch"]

_MAX_REDIRECTS: Final = 5
_MAX_LOOKUPS: Final = 64
"""Names that may be looked up at once. The system's resolver cannot be interrupted: a look-up that
nobody waits for any more still occupies its thread for up to half a minute."""

_lookups = threading.BoundedSemaphore(_MAX_LOOKUPS)


async def fetch(address: str, policy: ImagePolicy, param: str) -> bytes:
    """The bytes at the address. Raises GatewayError naming `param`."""
    try:
        async with asyncio.timeout(policy.timeout_s):
            return await _follow(address, policy, param)
    except TimeoutError:
        raise invalid(param, f"`{param}` did not arrive within {policy.timeout_s:g} s.") from None
    except (
        OSError,
        UnicodeError,
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.TimeoutException,
    ) as error:
        cause = str(error) or type(error).__name__
        raise invalid(param, f"`{param}` could not be fetched: {cause}.") from None


async def _follow(address: str, policy: ImagePolicy, param: str) -> bytes:
    for _ in range(_MAX_REDIRECTS + 1):
        url = urlsplit(address)
        if url.scheme not in ("http", "https"):
            raise invalid(
                param,
                f"`{param}` leads to a {url.scheme!r} address; only http and https are allowed.",
            )
        pool = httpcore.AsyncConnectionPool(
            ssl_context=_ssl_context() if url.scheme == "https" else None,
            network_backend=_CheckedConnections(policy, param),
        )
        headers = [("accept", "image/*")]
        async with pool, pool.stream("GET", _address_of(url, param), headers=headers) as answer:
            location = _header(answer, b"location")
            if answer.status in (301, 302, 303, 307, 308) and location:
                address = urljoin(address, location)
                continue
            if answer.status != 200:
                raise invalid(param, f"`{param}`: the host answered with status {answer.status}.")
            return await _read(answer, policy, param)
    raise invalid(param, f"`{param}` redirects more than {_MAX_REDIRECTS} times.")


def _address_of(url: SplitResult, param: str) -> httpcore.URL:
    host = url.hostname
    if not host or url.username is not None:
        raise invalid(param, f"`{param}` is not a plain http or https address.")
    try:
        port = url.port
    except ValueError:
        raise invalid(param, f"`{param}` has an invalid port.") from None
    target = f"{url.path or '/'}{'?' + url.query if url.query else ''}"
    named = host if ":" in host else host.encode("idna").decode()
    return httpcore.URL(
        scheme=url.scheme.encode(), host=named.encode(), port=port, target=target.encode("ascii")
    )


def _header(answer: httpcore.Response, name: bytes) -> str:
    found = (value for given, value in answer.headers if given.lower() == name)
    return next(found, b"").decode("latin-1")


async def _read(answer: httpcore.Response, policy: ImagePolicy, param: str) -> bytes:
    data = bytearray()
    async for chunk in answer.aiter_stream():
        data += chunk
        if len(data) > policy.max_bytes:
            raise too_large(
                param, f"`{param}` is beyond the {policy.max_bytes} bytes of one image."
            )
    if not data:
        raise invalid(param, f"`{param}` is an empty image.")
    return bytes(data)


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return ssl.create_default_context()


class _CheckedConnections(httpcore.AsyncNetworkBackend):
    """Connects to an address that was checked, since a second look-up of the name could
    give another one."""

    def __init__(self, policy: ImagePolicy, param: str) -> None:
        self._policy = policy
        self._param = param
        self._connect = httpcore.AnyIOBackend().connect_tcp

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # the interface's own
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._checked(host, port)
        for address in addresses[:-1]:
            # Names resolve to IPv6 addresses even on a machine without IPv6.
            with contextlib.suppress(httpcore.ConnectError):
                return await self._connect(address, port, timeout, local_address, socket_options)
        return await self._connect(addresses[-1], port, timeout, local_address, socket_options)

    async def _checked(self, host: str, port: int) -> list[str]:
        param = self._param
        try:
            found = await _look_up(host, port)
        except OSError:
            raise invalid(param, f"`{param}`: the host {host!r} cannot be resolved.") from None
        addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in found]
        for address in addresses:
            allowed = any(address in network for network in self._policy.allowed_networks)
            # One private address among several is enough to refuse: the next look-up
            # might return it.
            if not allowed and not public_address(address):
                raise invalid(
                    param, f"`{param}`: {host!r} is not an address of the public internet."
                )
        return [str(address) for address in addresses]


async def _look_up(host: str, port: int) -> list[str]:
    """The addresses of a name, looked up in a thread of its own. Raises OSError, GatewayError."""
    if not _lookups.acquire(blocking=False):
        raise GatewayError(
            ErrorCode.OVERLOADED,
            f"{_MAX_LOOKUPS} hosts of images are being looked up already; try again.",
            retryable=True,
        )
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def tell(found: list[str] | OSError) -> None:
        if answer.done():
            return
        if isinstance(found, OSError):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    def ask() -> None:
        found: list[str] | OSError
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found = [str(entry[4][0]) for entry in entries]
        except (OSError, UnicodeError) as error:
            found = error if isinstance(error, OSError) else OSError(str(error))
        finally:
            _lookups.release()
        # The loop may have ended in the meantime.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(tell, found)

    threading.Thread(target=ask, name="image-host", daemon=True).start()
    return await answer
