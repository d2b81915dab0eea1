"""How often one request may be resumed without a new token in between (SPEC.md section 6.4).

A RESUME may carry 64 MiB, and a worker that gives a request up at once would otherwise make a loop
with a client that comes back at once. A client that keeps the pace of the page never meets this.
"""

from __future__ import annotations

from typing import Final

from broker.protocol.errors import ErrorCode, RequestError

AT_ONCE: Final = 10
"""As many as a client should try before it gives up."""
ONE_MORE_S: Final = 5.0
"""The random waits of a client are longer than this, on average, after that many."""


class ResumePace:
    """The RESUMEs that one request has left."""

    __slots__ = ("_left", "_since_s", "_tokens")

    def __init__(self, now_s: float) -> None:
        self._left = float(AT_ONCE)
        self._since_s = now_s
        #: The most that a RESUME has brought.
        self._tokens = 0

    def take(self, tokens: int, now_s: float) -> None:
        """A RESUME came with so many tokens. Raises `RequestError` if it is one too many."""
        left = self._left + (now_s - self._since_s) / ONE_MORE_S
        self._since_s = now_s
        if tokens > self._tokens:
            self._tokens, left = tokens, AT_ONCE
        self._left = min(float(AT_ONCE), left)
        if self._left < 1:
            raise RequestError(
                ErrorCode.OVERLOADED,
                f"the request was resumed {AT_ONCE} times without a new token in between; resume "
                "it more slowly, or give it up",
                retryable=True,
                retry_after_ms=round((1 - self._left) * ONE_MORE_S * 1000) + 1,
            )
        self._left -= 1
