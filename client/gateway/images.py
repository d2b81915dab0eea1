"""Pictures of a request as octets: data URLs, and remote addresses where the operator allows them.

A remote picture is fetched by the gateway, never by a worker, and only from addresses that the
whole internet may reach: the name is resolved once, every address it has is checked, the
connection goes to a checked address, and each redirect starts over. Octets are not decoded here;
the worker looks at them under its own bounds.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urljoin, urlsplit

from broker.protocol.limits import MAX_ATTACHMENT_OCTETS
from client.gateway.errors import GatewayError, invalid, too_large

__all__ = ["ImagePolicy", "load_image", "public_address"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAX_REDIRECTS = 5
_CHUNK_BYTES = 64 * 1024
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """What the operator allows. The default fetches nothing."""

    allow_remote: bool = False
    max_bytes: int = MAX_ATTACHMENT_OCTETS
    #: For the whole fetch, redirects included.
    timeout_s: float = 10.0
    #: Private networks that may be fetched from all the same: an operator's own picture store.
    allowed_networks: Sequence[Network] = field(default_factory=tuple)


async def load_image(url: str, policy: ImagePolicy, param: str) -> bytes:
    """The octets behind an `image_url`; raises GatewayError naming `param`."""
    if url[:5].lower() == "data:":
        return _from_data_url(url, policy, param)
    if url[:7].lower() == "http://" or url[:8].lower() == "https://":
        if not policy.allow_remote:
            raise invalid(
                param,
                f"`{param}` is a remote address and this gateway fetches none. Send the picture as "
                "a data URL (data:image/png;base64,...), or start the gateway with "
                "--allow-remote-images.",
            )
        return await asyncio.to_thread(_fetch, url, policy, param)
    raise invalid(param, f"`{param}` must be a data URL (data:image/png;base64,...).")


def _from_data_url(url: str, policy: ImagePolicy, param: str) -> bytes:
    head, comma, payload = url.partition(",")
    media_type, *options = head[5:].split(";")
    if not comma or "base64" not in [option.strip().lower() for option in options]:
        raise invalid(param, f"`{param}` is a data URL without ';base64,'.")
    if not media_type.strip().lower().startswith("image/"):
        raise invalid(param, f"`{param}` has media type {media_type!r}; a picture is image/....")
    # Four characters carry three octets.
    if len(payload) * 3 // 4 > policy.max_bytes + 3:
        raise too_large(param, f"`{param}` is beyond the {policy.max_bytes} bytes of one picture.")
    try:
        octets = base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(param, f"`{param}` is not valid base64: {error}.") from None
    if not octets:
        raise invalid(param, f"`{param}` is an empty picture.")
    if len(octets) > policy.max_bytes:
        raise too_large(param, f"`{param}` is beyond the {policy.max_bytes} bytes of one picture.")
    return octets


def public_address(address: Address) -> bool:
    """True where the address is one of the public internet, the embedded IPv4 one included."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is None and address.teredo is not None:
            inner = address.teredo[1]
        if inner is not None:
            return public_address(inner)
    return address.is_global and not address.is_multicast


def _checked_address(host: str, port: int, policy: ImagePolicy, param: str) -> tuple[str, int]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise invalid(param, f"`{param}`: the host {host!r} is not known.") from None
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    for address in addresses:
        allowed = any(address in network for network in policy.allowed_networks)
        # One private address among several is enough: the next lookup might have picked it.
        if not allowed and not public_address(address):
            raise invalid(param, f"`{param}`: {host!r} is not an address of the public internet.")
    return str(addresses[0]), port


def _connect(
    url: SplitResult, policy: ImagePolicy, param: str, left_s: float
) -> http.client.HTTPConnection:
    host = url.hostname
    if not host or url.username is not None:
        raise invalid(param, f"`{param}` is not a plain http or https address.")
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
    except ValueError:
        raise invalid(param, f"`{param}` has an impossible port.") from None
    address = _checked_address(host, port, policy, param)
    connection = http.client.HTTPConnection(host, port, timeout=left_s)
    # The checked address, not the name: a second lookup could give another one.
    plain = socket.create_connection(address, timeout=left_s)
    try:
        if url.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
        else:
            connection.sock = plain
    except BaseException:
        plain.close()
        raise
    return connection


def _fetch(address: str, policy: ImagePolicy, param: str) -> bytes:
    deadline = time.monotonic() + policy.timeout_s
    try:
        for _ in range(_MAX_REDIRECTS + 1):
            url = urlsplit(address)
            if url.scheme not in ("http", "https"):
                raise invalid(param, f"`{param}` leads to {url.scheme!r}; only http and https do.")
            connection = _connect(url, policy, param, _left(deadline, policy, param))
            try:
                target = f"{url.path or '/'}{'?' + url.query if url.query else ''}"
                connection.request("GET", target, headers={"accept": "image/*"})
                with connection.getresponse() as response:
                    location = response.getheader("location")
                    if response.status in (301, 302, 303, 307, 308) and location:
                        address = urljoin(address, location)
                        continue
                    if response.status != 200:
                        raise invalid(
                            param, f"`{param}`: the host answered with status {response.status}."
                        )
                    return _read(connection, response, deadline, policy, param)
            finally:
                connection.close()
    except TimeoutError:
        raise _late(policy, param) from None
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise invalid(param, f"`{param}` could not be fetched: {error}.") from None
    raise invalid(param, f"`{param}` redirects more than {_MAX_REDIRECTS} times.")


def _read(
    connection: http.client.HTTPConnection,
    response: http.client.HTTPResponse,
    deadline: float,
    policy: ImagePolicy,
    param: str,
) -> bytes:
    octets = bytearray()
    while True:
        if connection.sock is not None:
            connection.sock.settimeout(_left(deadline, policy, param))
        else:
            _left(deadline, policy, param)
        chunk = response.read1(_CHUNK_BYTES)
        if not chunk:
            break
        octets += chunk
        if len(octets) > policy.max_bytes:
            raise too_large(
                param, f"`{param}` is beyond the {policy.max_bytes} bytes of one picture."
            )
    if not octets:
        raise invalid(param, f"`{param}` is an empty picture.")
    return bytes(octets)


def _left(deadline: float, policy: ImagePolicy, param: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise _late(policy, param)
    return left


def _late(policy: ImagePolicy, param: str) -> GatewayError:
    return invalid(param, f"`{param}` did not arrive within {policy.timeout_s:g} s.")
