"""Failures in Anthropic's shape, around the bus's own codes.

    {"type": "error", "error": {"type": ..., "message": ..., "details": ...}, "request_id": ...}

`type` is what Anthropic's SDKs and agents act on; `details.error_code` is the code that OpenAI's
doors send, `details.param` the field at fault.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from broker.protocol.errors import ErrorCode
from client.gateway.errors import GatewayError
from client.gateway.sse import encode

__all__ = ["error_body", "error_event"]

_TYPE_OF_CODE: Final[dict[str, str]] = {
    ErrorCode.OVERLOADED: "overloaded_error",
    ErrorCode.DRAINING: "overloaded_error",
}
_TYPE_OF_STATUS: Final = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}
#: Fields of the bus's requests that have another name here.
_FIELDS: Final = {
    "enable_thinking": "thinking",
    "max_completion_tokens": "max_tokens",
    "reasoning_effort": "output_config.effort",
    "stop": "stop_sequences",
    "template_args": "thinking",
    "thinking_tokens": "thinking.budget_tokens",
}


def error_body(error: GatewayError, request_id: str | None = None) -> dict[str, Any]:
    """The JSON body, also the data of an error event in a stream."""
    kind = _TYPE_OF_CODE.get(error.info.code) or _TYPE_OF_STATUS.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
    details: dict[str, Any] = {**error.info.details, "error_code": error.openai_code}
    if error.param is not None:
        details["param"] = _FIELDS.get(error.param, error.param)
    told = {"type": kind, "message": _message(error), "details": details}
    return {"type": "error", "error": told, "request_id": request_id}


def error_event(error: GatewayError, request_id: str) -> bytes:
    """The last event of a stream that failed; Anthropic's SDKs raise it."""
    return encode(msgspec.json.encode(error_body(error, request_id)), event="error")


def _message(error: GatewayError) -> str:
    """In the words by which agents know that they have to compact a conversation."""
    if error.info.code != ErrorCode.CONTEXT_OVERFLOW:
        return error.info.message
    details = error.info.details
    prompt, answer, context = (
        details.get(f"{name}_tokens") for name in ("prompt", "answer", "context")
    )
    if not (isinstance(prompt, int) and isinstance(answer, int) and isinstance(context, int)):
        return f"prompt is too long: {error.info.message}"
    if prompt + 1 > context:
        return f"prompt is too long: {prompt} tokens > {min(prompt - 1, context)} maximum"
    return (
        f"input length and `max_tokens` exceed context limit: {prompt} + {answer} > {context}, "
        "decrease input length or `max_tokens` and try again"
    )
