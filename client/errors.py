"""Every exception of the client library, one class for each error code (SPEC.md section 8).

    BusError                    anything the bus can say; also codes that this version does not know
    ├── InvalidRequest          a field of the request is wrong; the message names it
    │   └── ContextOverflow     prompt and answer do not fit the model's context
    ├── TooLarge                a body or an image is beyond a limit; checked before it is sent
    ├── DuplicateRequest        another session owns this request id
    ├── Unauthenticated         the broker does not accept this key, or demands one
    ├── Forbidden               this key may not do that
    ├── ModelUnavailable        no worker serves the model
    ├── Overloaded              queues are full; see `retry_after_ms`
    │   └── QuotaExceeded       this client or user has too much in flight
    ├── DeadlineExceeded        a time limit passed
    │   ├── QueueTimeout        Timeout.queue: no worker took the request
    │   ├── FirstTokenTimeout   Timeout.first_token: a worker took it and sent nothing
    │   ├── TokenTimeout        Timeout.between_tokens: the stream stalled
    │   └── TotalTimeout        Timeout.total
    ├── Cancelled               somebody else cancelled the request
    ├── WorkerLost              the worker died and the request could not be resumed
    ├── EngineError             the model raised an exception
    ├── OutOfMemory             the worker's device is full
    ├── Poison                  workers died while they ran this request alone
    ├── SlowConsumer            the application did not read its stream
    ├── Draining                broker or worker is about to stop
    ├── ConnectionLost          no session with a broker
    │   ├── ConnectTimeout      Timeout.connect: no broker answered
    │   ├── UnknownSession      the broker does not know this session
    │   └── ClientClosed        this client was closed
    ├── InvalidAnswer           the model's answer is not what was asked for
    └── BrokenProtocol          the peer violates the specification

`DeadlineExceeded` and `ConnectTimeout` are Python's `TimeoutError` as well, `ConnectionLost` is its
`ConnectionError`, `InvalidAnswer` its `ValueError`: a program that catches those catches these too.

Holds no logic of the bus: `error_from` only picks the class.
"""

from __future__ import annotations

from typing import Any, ClassVar

from broker.protocol.errors import ErrorCode, ErrorInfo

__all__ = [
    "BrokenProtocol",
    "BusError",
    "Cancelled",
    "ClientClosed",
    "ConnectTimeout",
    "ConnectionLost",
    "ContextOverflow",
    "DeadlineExceeded",
    "Draining",
    "DuplicateRequest",
    "EngineError",
    "FirstTokenTimeout",
    "Forbidden",
    "InvalidAnswer",
    "InvalidRequest",
    "ModelUnavailable",
    "OutOfMemory",
    "Overloaded",
    "Poison",
    "QueueTimeout",
    "QuotaExceeded",
    "SlowConsumer",
    "TokenTimeout",
    "TooLarge",
    "TotalTimeout",
    "Unauthenticated",
    "UnknownSession",
    "WorkerLost",
]

SHORT_ID_DIGITS = 8
"""Hex digits of a request id that are shown: enough to find it in a log, too few to attach."""


def short_id(request_id: bytes) -> str:
    """A request id as people see it."""
    return request_id.hex()[:SHORT_ID_DIGITS]


class BusError(Exception):
    """A failure of the bus, or of this library.

    `str(error)` says what happened, to whom, and what to do next; the attributes are for programs.
    """

    #: The class's own code, unless another is given.
    default_code: ClassVar[str] = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retryable: bool = False,
        retry_after_ms: int | None = None,
        details: dict[str, Any] | None = None,
        request_id: str = "",
        worker: str = "",
        partial: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        #: The code on the wire; see `broker.protocol.errors.ErrorCode`.
        self.code = code or self.default_code
        #: Whether the same request may succeed if it is sent again.
        self.retryable = retryable
        #: Retry not before this many milliseconds, if known.
        self.retry_after_ms = retry_after_ms
        self.details = details or {}
        #: First hex digits of the request id, as logs of broker and worker show them; or empty.
        self.request_id = request_id
        #: The worker that ran the request last; empty if none did.
        self.worker = worker
        #: Number of tokens of the answer that had arrived.
        self.partial = partial

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled across process pools; the default would lose the keyword arguments.
        return _rebuild, (type(self), self.message, dict(self.__dict__))


def _rebuild(cls: type[BusError], message: str, state: dict[str, Any]) -> BusError:
    error = cls(message)
    error.__dict__.update(state)
    return error


class InvalidRequest(BusError):
    """A field of the request is wrong; nothing was run."""

    default_code = ErrorCode.INVALID_REQUEST.value


class ContextOverflow(InvalidRequest):
    """Prompt and answer do not fit the context: shorten it, or `overflow="truncate_left"`."""

    default_code = ErrorCode.CONTEXT_OVERFLOW.value


class TooLarge(BusError):
    """Beyond a limit of the bus; `details` contain `size_bytes` and `limit_bytes` if known."""

    default_code = ErrorCode.TOO_LARGE.value


class DuplicateRequest(BusError):
    """The request id belongs to another session."""

    default_code = ErrorCode.DUPLICATE_REQUEST.value


class Unauthenticated(BusError):
    """The broker does not accept this client's key, or demands one (`server_key`, `key_file`)."""

    default_code = ErrorCode.UNAUTHENTICATED.value


class Forbidden(BusError):
    """This client may not do that."""

    default_code = ErrorCode.FORBIDDEN.value


class ModelUnavailable(BusError):
    """No worker serves the model, or not yet (`retryable`)."""

    default_code = ErrorCode.MODEL_UNAVAILABLE.value


class Overloaded(BusError):
    """The queues are full; retry after `retry_after_ms`."""

    default_code = ErrorCode.OVERLOADED.value


class QuotaExceeded(Overloaded):
    """This client or user has too much in flight."""

    default_code = ErrorCode.QUOTA.value


class DeadlineExceeded(BusError, TimeoutError):
    """A time limit passed; the request was cancelled at the worker."""

    default_code = ErrorCode.DEADLINE_EXCEEDED.value


class QueueTimeout(DeadlineExceeded):
    """`Timeout.queue`: no worker took the request in time."""


class FirstTokenTimeout(DeadlineExceeded):
    """`Timeout.first_token`: a worker took the request and produced nothing in time."""


class TokenTimeout(DeadlineExceeded):
    """`Timeout.between_tokens`: the stream stalled for too long."""


class TotalTimeout(DeadlineExceeded):
    """`Timeout.total`: the request took too long altogether."""


class Cancelled(BusError):
    """The request was cancelled by somebody other than this client."""

    default_code = ErrorCode.CANCELLED.value


class WorkerLost(BusError):
    """The worker died, and the request could not be resumed within the `Retry` policy."""

    default_code = ErrorCode.WORKER_LOST.value


class EngineError(BusError):
    """The model or its engine raised an exception while it ran this request."""

    default_code = ErrorCode.ENGINE_ERROR.value


class OutOfMemory(BusError):
    """The worker's device has no memory left for this request."""

    default_code = ErrorCode.OUT_OF_MEMORY.value


class Poison(BusError):
    """Workers died, again and again, while they ran this request and nothing else; `details` names
    them."""

    default_code = ErrorCode.POISON.value


class SlowConsumer(BusError):
    """The application did not read its stream for too long, so the stream was given up."""

    default_code = ErrorCode.SLOW_CONSUMER.value


class Draining(BusError):
    """Broker or worker is about to stop and accepts nothing new."""

    default_code = ErrorCode.DRAINING.value


class ConnectionLost(BusError, ConnectionError):
    """There is no session with a broker, and none could be made in time."""

    default_code = ErrorCode.CONNECTION_LOST.value


class ConnectTimeout(ConnectionLost, TimeoutError):
    """`Timeout.connect`: no broker answered."""


class UnknownSession(ConnectionLost):
    """The broker does not know this session."""

    default_code = ErrorCode.UNKNOWN_SESSION.value


class ClientClosed(ConnectionLost):
    """This client was closed, by the application or by a failure of its transport."""


class InvalidAnswer(BusError, ValueError):
    """What the model wrote is not the JSON, or does not fit the type or schema, that was asked for.
    Raised where the answer is read as such; its text is there all the same."""

    default_code = "invalid_answer"


class BrokenProtocol(BusError):
    """The peer violates the specification, or is not a tokenbus broker."""

    default_code = ErrorCode.PROTOCOL_ERROR.value


#: One class for each code.
CLASS_OF_CODE: dict[str, type[BusError]] = {
    cls.default_code: cls
    for cls in (
        InvalidRequest,
        ContextOverflow,
        TooLarge,
        DuplicateRequest,
        Unauthenticated,
        Forbidden,
        ModelUnavailable,
        Overloaded,
        QuotaExceeded,
        DeadlineExceeded,
        Cancelled,
        WorkerLost,
        EngineError,
        OutOfMemory,
        Poison,
        SlowConsumer,
        Draining,
        ConnectionLost,
        UnknownSession,
        BrokenProtocol,
    )
}


def error_from(
    info: ErrorInfo,
    *,
    request_id: bytes = b"",
    worker: str = "",
    partial: bool = False,
    cls: type[BusError] | None = None,
) -> BusError:
    """The exception for an error received from the bus. An unknown code (from a newer peer)
    becomes a `BusError`."""
    return (cls or CLASS_OF_CODE.get(info.code, BusError))(
        info.message,
        code=info.code,
        retryable=info.retryable,
        retry_after_ms=info.retry_after_ms,
        details=info.details,
        request_id=short_id(request_id),
        worker=worker,
        partial=partial,
    )
