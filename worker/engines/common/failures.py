"""Turns exceptions into errors for clients: the cause in one line, and the code.

Shared by all engines. Must never import an engine's package or torch: every engine's process loads
this module, even of engines that need no torch.
"""

from __future__ import annotations

import sys

from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError

__all__ = ["error_info", "is_out_of_memory", "one_line"]


def one_line(error: BaseException, limit: int = 500) -> str:
    """The text of an exception on one line of at most `limit` characters; its class name if it
    has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that memory ran out, on an accelerator or on the host."""
    # Whoever raised torch's own error has loaded torch.
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text or "not enough memory" in text
    )


def error_info(error: BaseException, failed: str) -> ErrorInfo:
    """The error that a client gets for an exception: that of a `RequestError`, otherwise `failed`
    (what could not be done) and the cause."""
    if isinstance(error, RequestError):
        return error.info
    code = ErrorCode.OUT_OF_MEMORY if is_out_of_memory(error) else ErrorCode.ENGINE_ERROR
    return ErrorInfo(code=code.value, message=f"{failed}: {one_line(error)}")
