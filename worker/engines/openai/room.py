"""`max_tokens` beyond a server's context: cut to what the server itself says is left.

Many servers refuse an answer that might not fit (agents ask any model for 32,000 tokens). Either
such a refusal names the limit, or the server counts the prompt in a request for one token, and the
rest of its context is asked for. A server that cuts `max_tokens` itself is never asked twice. Must
never guess: without a number from the server, its refusal stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.messages import Kind, Request

__all__ = ["Room"]

_NAMES: Final = re.compile(r"max_(completion_|output_|new_)?tokens")
_TOLD: Final = re.compile(
    r"at most (\d+) (?:completion|output) tokens|less than or equal to `?(\d+)`?"
)
"""A bound on the answer alone, in OpenAI's words and in Groq's."""

_SHORT_BY_DEFAULT: Final = ("vllm", "sglang", "other")
"""Servers whose completions end after 16 tokens if no `max_tokens` is sent."""


class Room:
    """The bound of one answer, from the first refusal to the one that stands."""

    def __init__(
        self, request: Request, body: dict[str, Any], context_tokens: int | None, server: str
    ) -> None:
        self._body = body
        self._context_tokens = context_tokens
        self._may_cut = request.params.cut_max_tokens
        #: Whether the prompt is being counted.
        self.counting = False
        self._tried = False
        self._refusal: ErrorInfo | None = None
        short = request.kind is Kind.COMPLETE and server in _SHORT_BY_DEFAULT
        if request.params.max_tokens is None and short and context_tokens:
            # On the bus, no limit means the rest of the context.
            body["max_tokens"] = context_tokens
            self._may_cut = True

    def refused(self, error: ErrorInfo) -> dict[str, Any] | None:
        """The body to send after the server's refusal; None: the refusal stands."""
        if self.counting or self._tried or not self._may_cut or "max_tokens" not in self._body:
            return None
        told = _TOLD.search(error.message) if _NAMES.search(error.message) else None
        if told is not None:
            limit = int(next(filter(None, told.groups())))
            return self._cut(limit) if 0 < limit < self._body["max_tokens"] else None
        if error.code != ErrorCode.CONTEXT_OVERFLOW or not self._context_tokens:
            return None
        self.counting, self._refusal = True, error
        left_out = ("logprobs", "top_logprobs")
        return {k: v for k, v in self._body.items() if k not in left_out} | {"max_tokens": 1}

    def counted(self, data: Mapping[str, Any]) -> dict[str, Any] | None:
        """The body to send once the server has counted the prompt; None: this chunk has no count.
        Raises RequestError if no room is left."""
        prompt_tokens = (data.get("usage") or {}).get("prompt_tokens")
        assert self._refusal is not None and self._context_tokens is not None
        if not isinstance(prompt_tokens, int) or prompt_tokens < 1:
            return None
        self.counting = False
        left = self._context_tokens - prompt_tokens
        if left < 1:
            raise RequestError(
                ErrorCode.CONTEXT_OVERFLOW,
                f"the prompt has {prompt_tokens} tokens, and the context of "
                f"{self._context_tokens} leaves no room for an answer; {self._refusal.message}",
            )
        return self._cut(left)

    def uncounted(self) -> ErrorInfo:
        """The server's refusal, which stands because it sent no usage."""
        assert self._refusal is not None
        return self._refusal

    def _cut(self, limit: int) -> dict[str, Any]:
        self._tried = True
        self._body["max_tokens"] = min(limit, self._body["max_tokens"])
        return self._body
