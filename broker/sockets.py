"""The two ROUTER sockets and every ZeroMQ option, each with its reason.

The numbers refer to issues of libzmq. Nothing else in the broker sets a socket option.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import zmq

from broker.config import StartError
from broker.protocol.limits import (
    MAX_ATTACHMENT_BYTES,
    MAX_HELLO_BYTES,
)


class BindError(StartError):
    """The broker cannot listen on an address; the message says which, why and what to do."""


@dataclass(frozen=True, slots=True)
class SocketSettings:
    """Socket options that differ between deployments."""

    high_water_mark: int
    linger_ms: int
    io_threads: int


def make_context(settings: SocketSettings) -> zmq.Context[zmq.Socket[bytes]]:
    """A new context: must be made after any fork; `term` ends it once its sockets are closed."""
    context = zmq.Context(io_threads=settings.io_threads)
    # There are few sockets (peers are not sockets); the default limit of 1023 is plenty.
    return context


def make_router(
    context: zmq.Context[zmq.Socket[bytes]], settings: SocketSettings, *, front: bool
) -> zmq.Socket[bytes]:
    """One of the two ROUTERs, not bound yet."""
    socket = context.socket(zmq.ROUTER)
    # A peer that is gone or full is an error (EHOSTUNREACH, EAGAIN), not a silent loss.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # A second connection that presents the routing id of another must not get its messages.
    socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
    # ZMTP heartbeats can abort the process (libzmq 3596, 4767); liveness is the protocol's own.
    socket.setsockopt(zmq.HEARTBEAT_IVL, 0)
    # Finite, so that EAGAIN reveals a slow peer. Counts whole messages, for each peer.
    socket.setsockopt(zmq.SNDHWM, settings.high_water_mark)
    # A stalled broker pushes back through TCP instead of eating memory; bursts of tokens fit.
    socket.setsockopt(zmq.RCVHWM, 1000 if front else 10_000)
    # Limits one frame, not a message: the largest is an image at the front, HELLO at the back.
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_ATTACHMENT_BYTES if front else MAX_HELLO_BYTES)
    # The last messages may leave; infinity, the default, would hang the end of the process.
    socket.setsockopt(zmq.LINGER, settings.linger_ms)
    # A stranger that connects and says nothing holds a descriptor; the default is 30 s.
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    # Reaps half-open connections (libzmq 1453) after a minute; ours are ended long before.
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    # Becomes TCP_USER_TIMEOUT: limits how long data may stay unacknowledged.
    socket.setsockopt(zmq.TCP_MAXRT, 30_000)
    # Thousands of peers come back at once after a restart. From a full queue the kernel drops them
    # in silence, to try again after 1, 3 and 7 s. Its own bound is net.core.somaxconn, mostly 4096.
    socket.setsockopt(zmq.BACKLOG, 65_535)
    # With two I/O threads: images come in on one, tokens on the other.
    socket.setsockopt(zmq.AFFINITY, 0 if settings.io_threads < 2 else (1 if front else 2))
    return socket


def bind(socket: zmq.Socket[bytes], addresses: Sequence[str]) -> list[str]:
    """Listen on all addresses and return the real ones. Raises `BindError`."""
    real = []
    for address in addresses:
        # Only for IPv6 addresses: otherwise the reported address of an IPv4 one would
        # be ::ffff:127.0.0.1.
        socket.setsockopt(zmq.IPV6, int("[" in address))
        try:
            socket.bind(_without_port_zero(address))
        except zmq.ZMQError as error:
            raise BindError(f"cannot listen on {address}: {_reason(error)}") from None
        real.append(socket.getsockopt_string(zmq.LAST_ENDPOINT))
    return real


def _without_port_zero(address: str) -> str:
    return (
        address[:-1] + "*" if address.startswith("tcp://") and address.endswith(":0") else address
    )


def _reason(error: zmq.ZMQError) -> str:
    if error.errno == zmq.EADDRINUSE:
        return "the address is in use; is another broker running? Choose another port"
    if error.errno == errno.ENODEV:
        return "this machine has no interface with that address"
    return error.strerror or str(error)


def check_address(address: str) -> None:
    """Raises `BindError` for anything that is not an address to listen on."""
    if address.startswith("ipc://") and len(address) > len("ipc://"):
        return
    if address.startswith("tcp://") and ":" in address[len("tcp://") :]:
        port = address.rpartition(":")[2]
        # libzmq accepts any number and listens on its lowest 16 bits.
        if port == "*" or (port.isascii() and port.isdecimal() and int(port) < 65_536):
            return
        raise BindError(f"{address!r} has no port from 1 to 65535; or use * for any")
    raise BindError(
        f"{address!r} is not an address; write tcp://127.0.0.1:5555, tcp://127.0.0.1:* or ipc://PATH"
    )


def collide(one: str, other: str) -> bool:
    """Whether two valid addresses cannot be bound at the same time."""
    (host, _, port), (other_host, _, other_port) = one.rpartition(":"), other.rpartition(":")
    if port != other_port or port in ("*", "0"):
        return False
    wild = ("tcp://*", "tcp://0.0.0.0", "tcp://[::]")
    return host == other_host or (
        host.startswith("tcp://") and (host in wild or other_host in wild)
    )


def is_local(address: str) -> bool:
    """Whether only this machine can reach the address."""
    if address.startswith("ipc://"):
        return True
    host = urlsplit(address.replace("*:", "0.0.0.0:").replace(":*", ":0")).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
