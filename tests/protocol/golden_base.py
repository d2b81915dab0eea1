"""What the examples of messages share."""

from __future__ import annotations

from typing import Any

from broker.protocol.errors import ErrorInfo
from broker.protocol.header import MessageType

SESSION = bytes(range(0x10, 0x20))
REQUEST = bytes(range(0x20, 0x30))
ROUTE = bytes(range(0x30, 0x40))
ERROR = ErrorInfo(
    code="overloaded",
    message="The queue of model demo is full. Try again in 250 ms.",
    retryable=True,
    retry_after_ms=250,
    details={"queued": 1000},
)


Example = tuple[MessageType, bytes, int, int, list[Any], list[bytes]]
"""Type, id, sequence, flags, bodies, attachments."""
