"""Settings of a client: time limits, retries, memory limits, the connection. Frozen,
checked when made.

Reads the environment in one place (`Connection.resolve`), and nothing else outside the process.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final

from broker.protocol.errors import ErrorCode
from broker.protocol.structs import check_name
from client.errors import InvalidRequest

__all__ = ["Connection", "Limits", "Retry", "Timeout"]

MOST_IN_FLIGHT: Final = (1 << 31) - 1
"""Of requests, and of tokens in a window."""
DEFAULT_BROKER: Final = "tcp://127.0.0.1:5555"
BROKER_VARIABLE: Final = "TOKENBUS_BROKER"


@dataclass(frozen=True, slots=True)
class Timeout:
    """How long to wait for what, in seconds; `None` waits for ever.

    ```
    Timeout()                            the defaults
    Timeout(total=30)                    at most 30 s for everything
    Timeout(queue=2, first_token=10)     give up early when the bus is busy
    ```

    Each limit has its own exception: `ConnectTimeout`, `QueueTimeout`, `FirstTokenTimeout`,
    `TokenTimeout`, `TotalTimeout`. Whichever passes, the request is cancelled at the worker.
    """

    #: Until a broker answers. Short, since a running broker answers within milliseconds.
    connect: float | None = 10.0
    #: From the broker's queue to a worker; None leaves it to the broker's own limit.
    queue: float | None = None
    #: From the worker to its first token: a long prompt on a CPU takes minutes.
    first_token: float | None = 300.0
    #: Between two tokens, while the application reads.
    between_tokens: float | None = 120.0
    #: From the call to the end of the answer, resumes included.
    total: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not (_is_number(value) and 0 < value <= 1e9):
                raise InvalidRequest(
                    f"Timeout.{item.name} is {value!r}; give seconds above 0, or None for no limit"
                )


#: Errors after which the same request may succeed elsewhere or later.
RETRY_CODES: Final = frozenset(
    code.value
    for code in (
        ErrorCode.OVERLOADED,
        ErrorCode.QUOTA,
        ErrorCode.MODEL_UNAVAILABLE,
        ErrorCode.WORKER_LOST,
        ErrorCode.DRAINING,
        ErrorCode.CONNECTION_LOST,
        ErrorCode.UNKNOWN_SESSION,
    )
)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often to retry before an interruption becomes an exception. `Retry(attempts=0)`:
    not at all.

    A stream is resumed where it stopped, so a retry never repeats or changes what was received.
    """

    #: Recoveries in a row without a new token; any token resets the count.
    attempts: int = 5
    #: First wait between two recoveries, seconds; it doubles, with full jitter. The first recovery
    #: after an interruption does not wait.
    backoff_first: float = 0.2
    backoff_longest: float = 10.0
    #: How long an open stream waits for a broker to come back, seconds. Workers keep running
    #: requests for 30 s without a broker.
    reconnect: float = 30.0
    #: Error codes that are retried if the bus calls the error retryable.
    codes: frozenset[str] = RETRY_CODES

    def __post_init__(self) -> None:
        if not isinstance(self.attempts, int) or self.attempts < 0:
            raise InvalidRequest(f"Retry.attempts is {self.attempts!r}; give an integer, 0 or more")
        for name in ("backoff_first", "backoff_longest", "reconnect"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= 1e9):
                raise InvalidRequest(f"Retry.{name} is {value!r}; give seconds, 0 or more")
        object.__setattr__(self, "codes", frozenset(str(code) for code in self.codes))


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on what this client holds in memory and in flight."""

    #: Requests at the broker at once; more than these wait here. None: the broker's own limit.
    inflight: int | None = None
    #: Tokens of a stream that may wait unread here; the worker coalesces the rest. None: the
    #: broker's default.
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("inflight", "window"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and 1 <= value <= MOST_IN_FLIGHT):
                raise InvalidRequest(
                    f"Limits.{name} is {value!r}; give an integer, 1 or more, or None"
                )


@dataclass(frozen=True, slots=True)
class Connection:
    """Addresses of the brokers, and the keys."""

    #: Front addresses; the first one that answers is used, another when that is gone.
    brokers: tuple[str, ...]
    #: Name of this client in the broker's logs and in `bus.clients`.
    name: str
    #: CURVE: the broker's public key as 40 characters of Z85.
    server_key: str | None = None
    #: CURVE: this client's certificate (`*.key_secret`, as `python -m broker keys` writes it).
    key_file: Path | None = None
    #: The same as Z85 text, public and secret, for callers that have no file.
    key_pair: tuple[str, str] | None = None
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def resolve(
        cls,
        broker: str | Sequence[str] | None = None,
        *,
        name: str | None = None,
        server_key: str | bytes | None = None,
        key_file: str | os.PathLike[str] | None = None,
        join: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
    ) -> Connection:
        """Fill in missing values: `TOKENBUS_BROKER`, else `tcp://127.0.0.1:5555`.

        `broker` is one address, several separated by commas, or a list. `join`: an invitation or a
        file that holds one, which has address and keys. Raises `InvalidRequest`.
        """
        key_pair = None
        if join is not None:
            from broker.protocol.invitation import InvitationError, read  # most have none

            if server_key is not None or key_file is not None:
                raise InvalidRequest("join holds the keys: give no server_key and no key_file")
            try:
                invited = read(os.fspath(join), "client", "operator")
            except InvitationError as error:
                raise InvalidRequest(f"join: {error}") from None
            broker = invited.brokers if broker is None else broker
            server_key, key_pair = invited.server, (invited.public, invited.secret)
        given = broker if broker is not None else os.environ.get(BROKER_VARIABLE) or DEFAULT_BROKER
        brokers = tuple(_addresses([given] if isinstance(given, str) else given))
        if not brokers:
            raise InvalidRequest(
                f"no broker address given; pass one such as {DEFAULT_BROKER}, "
                f"or set {BROKER_VARIABLE}"
            )
        chosen = name or f"{socket.gethostname()}-{os.getpid()}"
        try:
            check_name(chosen)
        except ValueError as error:
            raise InvalidRequest(f"the name of the client: {error}") from None
        if key_file is not None and server_key is None:
            raise InvalidRequest("key_file without server_key: CURVE needs the broker's public key")
        return cls(
            brokers=brokers,
            name=chosen,
            server_key=server_key.decode("ascii") if isinstance(server_key, bytes) else server_key,
            key_file=None if key_file is None else Path(key_file),
            key_pair=key_pair,
            limits=limits or Limits(),
        )


def _addresses(given: Iterable[str]) -> Iterable[str]:
    for item in given:
        for part in item.split(","):
            address = part.strip()
            if not address:
                continue
            scheme, separator, rest = address.partition("://")
            if not separator or scheme not in ("tcp", "ipc") or not rest:
                raise InvalidRequest(
                    f"{address!r} is not a broker address; write tcp://HOST:PORT or ipc://PATH"
                )
            if scheme == "tcp" and not _has_port(rest):
                raise InvalidRequest(
                    f"broker address {address!r} has no port from 1 to 65535; "
                    f"the default is {DEFAULT_BROKER}"
                )
            yield address


def _has_port(host_and_port: str) -> bool:
    port = host_and_port.rpartition(":")[2]
    return port.isdecimal() and 0 < int(port) < 65536


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
