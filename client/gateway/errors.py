"""Failures as an HTTP client sees them: OpenAI's error shape around the bus's own codes.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ..., "request_id": ...}}

`code` is OpenAI's if OpenAI has one, since agents act on it, and then `details.code` is the bus's;
otherwise it is the bus's code (broker/protocol/SPEC.md section 8), which decides the status. `type`
is what OpenAI's SDKs expect for that status. Must never invent a cause: an unforeseen exception is
reported as `engine_error` of the gateway, and its traceback goes only to the log.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from broker.protocol.errors import HTTP_STATUS, LOAD_FAILED, ErrorCode, ErrorInfo
from client import BusError

if TYPE_CHECKING:
    # Not at run time: `convert` and its errors work without the extra `gateway`.
    from starlette.responses import JSONResponse

__all__ = [
    "ErrorShape",
    "GatewayError",
    "UnknownAnswer",
    "describe",
    "error_body",
    "error_headers",
    "error_response",
    "invalid",
    "too_large",
]

log = logging.getLogger("tokenbus.gateway")

#: OpenAI's codes for the bus's codes.
_OPENAI_CODE: dict[str, str] = {
    ErrorCode.MODEL_UNAVAILABLE: "model_not_found",
    ErrorCode.UNAUTHENTICATED: "invalid_api_key",
    ErrorCode.CONTEXT_OVERFLOW: "context_length_exceeded",
    ErrorCode.QUOTA: "rate_limit_exceeded",
}
#: OpenAI's code for a budget that is used up, where a short wait does not help.
SPENT: Final = "insufficient_quota"
#: Marks the answer of a gateway that does not keep the requested id; its peers look for it.
UNKNOWN_HEADER: Final = "x-tokenbus-unknown"

#: OpenAI's npm SDK ignores a longer wait and retries within a second.
_MAX_WAIT_MS: Final = 60_000

_TYPE_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


#: Limits for a message and for the name of a field: both may contain what the caller sent,
#: of any length.
_MESSAGE_CHARACTERS = 2000
_PARAM_CHARACTERS = 200


def _shortened(text: str, characters: int) -> str:
    """`text`, with its middle left out if it is too long."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]} ... {text[-half:]}"


class GatewayError(Exception):
    """A request that the gateway answers with an error, its own or one from the bus."""

    def __init__(
        self,
        code: ErrorCode | str,
        message: str,
        *,
        param: str | None = None,
        status: int | None = None,
        retryable: bool = False,
        retry_after_ms: int | None = None,
        details: dict[str, Any] | None = None,
        openai_code: str | None = None,
        detail: list[dict[str, Any]] | None = None,
    ) -> None:
        """`openai_code`: OpenAI's code, if it does not follow from `code`. `detail`: what servers
        of other APIs say beside OpenAI's `error`."""
        message = _shortened(message, _MESSAGE_CHARACTERS)
        super().__init__(message)
        self.info = ErrorInfo(
            code=str(code),
            message=message,
            retryable=retryable,
            retry_after_ms=retry_after_ms,
            details=details or {},
        )
        #: The invalid field of the request, as a path: `messages[0].role`.
        self.param = None if param is None else _shortened(param, _PARAM_CHARACTERS)
        self.status = status if status is not None else status_of(self.info)
        self._openai_code = openai_code
        self.detail = detail

    def in_words_of(self, name: str) -> GatewayError:
        """The same error with the field's name in another API's body."""
        return GatewayError(
            self.info.code,
            self.info.message.replace(f"`{self.param}`", f"`{name}`"),
            param=name,
            status=self.status,
            retryable=self.info.retryable,
            retry_after_ms=self.info.retry_after_ms,
            details=self.info.details,
        )

    @property
    def openai_code(self) -> str:
        """The `code` sent to an HTTP client."""
        if self.info.details.get(LOAD_FAILED):
            return self.info.code  # there is such a model
        return self._openai_code or _OPENAI_CODE.get(self.info.code, self.info.code)


class UnknownAnswer(GatewayError):
    """Something that this gateway does not keep; another gateway of the bus may."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 404,
        openai_code: str | None = None,
    ) -> None:
        super().__init__(
            ErrorCode.INVALID_REQUEST,
            message,
            param=param,
            status=status,
            openai_code=openai_code,
        )


def status_of(info: ErrorInfo) -> int:
    """The HTTP status of a bus error; 502 for a code that this version does not know."""
    if info.code == ErrorCode.MODEL_UNAVAILABLE and info.details.get(LOAD_FAILED):
        return 503
    try:
        return HTTP_STATUS[ErrorCode(info.code)]
    except ValueError:
        return 502


def invalid(param: str | None, message: str) -> GatewayError:
    """An error for an invalid `param`; the message says how to fix it."""
    return GatewayError(ErrorCode.INVALID_REQUEST, message, param=param)


def too_large(param: str | None, message: str) -> GatewayError:
    """An error for a `param` beyond a limit of the gateway or of the bus."""
    return GatewayError(ErrorCode.TOO_LARGE, message, param=param)


def describe(error: BaseException) -> GatewayError:
    """The GatewayError to report for any exception."""
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, BusError):
        return GatewayError(
            error.code,
            _of_context(error) or _of_model(error) or error.message,
            retryable=error.retryable,
            retry_after_ms=error.retry_after_ms,
            details=error.details,
        )
    log.error("unforeseen failure", exc_info=error)
    return GatewayError(
        ErrorCode.ENGINE_ERROR,
        "The gateway failed on this request; its log has the cause under this request id.",
    )


_UNKNOWN_MODEL = re.compile(r"no worker serves model (?P<name>'.*?');")


def _of_model(error: BusError) -> str:
    """A model that nobody serves in the words that programs look for; empty for other failures."""
    unknown = _UNKNOWN_MODEL.match(error.message)
    if error.code != ErrorCode.MODEL_UNAVAILABLE or unknown is None:
        return ""
    return f"The model {unknown['name']} does not exist: {error.message}"


def _of_context(error: BusError) -> str:
    """A full context in the words that agents look for, OpenAI's; empty for other failures and
    where the worker did not count."""
    if error.code != ErrorCode.CONTEXT_OVERFLOW:
        return ""
    counted = [error.details.get(f"{name}_tokens") for name in ("prompt", "answer", "context")]
    whole = [number for number in counted if isinstance(number, int)]
    if len(whole) < len(counted):
        return ""
    prompt, answer, context = whole
    told = f"This model's maximum context length is {context} tokens. However, "
    if prompt >= context:
        return f"{told}the prompt has {prompt} tokens. Shorten it."
    return (
        f"{told}you requested {prompt + answer} tokens ({prompt} in the prompt, {answer} in the "
        "completion). Shorten the prompt or the completion."
    )


def error_body(error: GatewayError, request_id: str | None = None) -> dict[str, Any]:
    """The JSON body, also used as the data of an error event in a stream."""
    if error.status < 500 and error.status not in _TYPE_OF_STATUS:
        kind = "invalid_request_error"
    else:
        kind = _TYPE_OF_STATUS.get(error.status, "server_error")
    body: dict[str, Any] = {
        "message": error.info.message,
        "type": kind,
        "param": error.param,
        "code": error.openai_code,
    }
    details = error.info.details
    if error.openai_code != error.info.code:
        details = {**details, "code": error.info.code}
    if details:
        body["details"] = details
    if request_id is not None:
        body["request_id"] = request_id
    return {"error": body} if error.detail is None else {"error": body, "detail": error.detail}


def error_headers(error: GatewayError) -> dict[str, str]:
    """Headers that OpenAI's SDKs check before the status: `x-should-retry` and `retry-after-ms`."""
    headers = {"x-should-retry": "true" if error.info.retryable else "false"}
    if isinstance(error, UnknownAnswer):
        headers[UNKNOWN_HEADER] = "1"
    wait_ms = error.info.retry_after_ms
    if wait_ms is None and error.status in (429, 503) and error.openai_code != SPENT:
        wait_ms = 1000
    if wait_ms is not None:
        wait_ms = min(wait_ms, _MAX_WAIT_MS)
        headers["retry-after"] = str(max(1, math.ceil(wait_ms / 1000)))
        headers["retry-after-ms"] = str(wait_ms)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


ErrorShape = Callable[[GatewayError, str | None], dict[str, Any]]
"""An API's JSON body for an error under a request id; `error_body` is OpenAI's."""


def error_response(
    error: BaseException, request_id: str | None = None, shape: ErrorShape = error_body
) -> JSONResponse:
    """The HTTP answer to a failed request."""
    from starlette.responses import JSONResponse

    told = describe(error)
    return JSONResponse(
        shape(told, request_id), status_code=told.status, headers=error_headers(told)
    )
