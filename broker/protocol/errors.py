"""One shape and one table for every failure of the bus (SPEC.md section 8).

    Exception
    ├── ProtocolError       the peer's bytes violate the specification; the session ends
    │   └── VersionError    they are framed as another version: the peer must not come back
    └── RequestError        one request cannot be served; carries what the client receives

`ErrorInfo` is what travels. Client exceptions and HTTP statuses map one to one to `ErrorCode`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec


class ErrorCode(StrEnum):
    """What went wrong. The value is what is sent on the wire."""

    INVALID_REQUEST = "invalid_request"
    TOO_LARGE = "too_large"
    DUPLICATE_REQUEST = "duplicate_request"
    CONTEXT_OVERFLOW = "context_overflow"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    MODEL_UNAVAILABLE = "model_unavailable"
    OVERLOADED = "overloaded"
    QUOTA = "quota"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    WORKER_LOST = "worker_lost"
    ENGINE_ERROR = "engine_error"
    OUT_OF_MEMORY = "out_of_memory"
    POISON = "poison"
    SLOW_CONSUMER = "slow_consumer"
    DRAINING = "draining"
    CONNECTION_LOST = "connection_lost"
    PROTOCOL_ERROR = "protocol_error"
    UNKNOWN_SESSION = "unknown_session"


HTTP_STATUS: dict[ErrorCode, int] = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.DUPLICATE_REQUEST: 409,
    ErrorCode.CONTEXT_OVERFLOW: 400,
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.MODEL_UNAVAILABLE: 404,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.QUOTA: 429,
    ErrorCode.DEADLINE_EXCEEDED: 504,
    ErrorCode.CANCELLED: 499,
    ErrorCode.WORKER_LOST: 502,
    ErrorCode.ENGINE_ERROR: 500,
    ErrorCode.OUT_OF_MEMORY: 507,
    ErrorCode.POISON: 500,
    ErrorCode.SLOW_CONSUMER: 408,
    ErrorCode.DRAINING: 503,
    ErrorCode.CONNECTION_LOST: 502,
    ErrorCode.PROTOCOL_ERROR: 502,
    ErrorCode.UNKNOWN_SESSION: 502,
}


LOAD_FAILED = "load_failed"
"""In the details of model_unavailable: the model is known, and no worker can load it. HTTP 503."""


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A failure as it travels.

    `code` is a plain string so that a code invented by a newer peer is carried on rather than
    refused.
    """

    code: str
    #: What happened, to whom, and what to do next. For people; never parsed.
    message: str
    #: Whether the same request may succeed if it is sent again.
    retryable: bool = False
    #: Retry not before this many milliseconds, if the sender knows.
    retry_after_ms: int | None = None
    details: dict[str, Any] = {}


class ProtocolError(Exception):
    """The bytes received violate the specification. Decoding them raises nothing else."""


class VersionError(ProtocolError):
    """The header is of another version of the protocol: no answer will be understood later either,
    so a peer must not come back unchanged."""


class RequestError(Exception):
    """One request cannot be served. Raised by engines and sessions; becomes a FAIL event."""

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        retryable: bool = False,
        retry_after_ms: int | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.info = ErrorInfo(
            code=code.value,
            message=message,
            retryable=retryable,
            retry_after_ms=retry_after_ms,
            details=details or {},
        )

    @property
    def code(self) -> ErrorCode:
        return ErrorCode(self.info.code)
