"""The objects of llama.cpp's answers, from the bus's events: chunks, whole answers, errors.

Must never talk to the bus.
"""

from __future__ import annotations

import time
from typing import Any, Final

from broker.protocol.errors import ErrorCode
from broker.protocol.messages import FinishReason, TokenLogprob, Usage
from client.core.events import End
from client.gateway.errors import GatewayError
from client.gateway.openai.answers import IMPOSSIBLE, TextChoice
from client.gateway.openai.generation import ChoiceEvent, Finish, Prompted

__all__ = ["Answer", "error_object", "picked"]

#: Of no slot in particular: which one a request has is its worker's own affair.
_SLOT: Final = -1
_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    501: "not_supported_error",
    503: "unavailable_error",
}


def error_object(error: GatewayError, request_id: str | None) -> dict[str, Any]:
    """An error in llama.cpp's shape, and beside it what programs can act on."""
    kind = _TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
    message, details = error.info.message, error.info.details
    told: dict[str, Any] = {"code": error.status}
    if error.info.code == ErrorCode.CONTEXT_OVERFLOW:
        kind = "exceed_context_size_error"
        prompt, context = details.get("prompt_tokens"), details.get("context_tokens")
        if isinstance(prompt, int) and isinstance(context, int):
            # Programs look for these words.
            message = (
                f"the request ({prompt} tokens) exceeds the available context size ({context} "
                "tokens); shorten it"
            )
            told |= {"n_prompt_tokens": prompt, "n_ctx": context}
    told |= {"message": message, "type": kind, "error_code": error.info.code}
    if error.param is not None:
        told["param"] = error.param
    if request_id is not None:
        told["request_id"] = request_id
    return {"error": told}


def picked(answer: dict[str, Any], fields: list[str] | None) -> dict[str, Any]:
    """The fields that `response_fields` names; `a/b` is `b` of `a`. Without any, all."""
    if not fields:
        return answer
    found: dict[str, Any] = {}
    for path in fields:
        value: Any = answer
        for name in path.split("/"):
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            found[path] = value
    return found


class Answer:
    """One answer in progress."""

    def __init__(
        self,
        index: int,
        head: dict[str, Any],
        *,
        reads_only: bool,
        limit: int | None,
        cut_after_ms: float | None,
        progress: bool,
        timed: bool,
        with_probabilities: bool,
    ) -> None:
        """`head`: what its last object says of the request: model, prompt, settings. `limit`: the
        longest answer asked for, tokens; None: the context's end. `cut_after_ms`: it ends at a new
        line after so long. `progress`, `timed`: chunks say how far the prompt is read and how long
        it took."""
        self._index = index
        self._head = head
        self._reads_only = reads_only
        self._limit = limit
        self._cut_after_ms = cut_after_ms
        self._progress = progress
        self._timed = timed
        self._with_probabilities = with_probabilities
        self._began_s = time.monotonic()
        self._first_token_s: float | None = None
        self._prompt = Usage()
        self._tokens = 0
        self._end: End | None = None
        self._scores: list[dict[str, Any]] = []
        self.choice = TextChoice(prompt_only=reads_only)

    @property
    def has_enough(self) -> bool:
        """Whether its time is over and a line is complete."""
        if self._cut_after_ms is None or self._first_token_s is None:
            return False
        passed_ms = (time.monotonic() - self._first_token_s) * 1000
        return passed_ms >= self._cut_after_ms and "\n" in self.choice.text

    @property
    def has_begun(self) -> bool:
        """Whether the model has written a token."""
        return self._first_token_s is not None

    @property
    def usage(self) -> Usage | None:
        """Once it is complete."""
        return None if self._end is None else self.choice.usage

    def told(self, event: ChoiceEvent) -> list[dict[str, Any]]:
        """Account for an event; returns the objects of a stream for it."""
        if isinstance(event, Prompted):
            # Only how many tokens it has was asked for.
            self._prompt = event.prompt.usage or Usage()
            return [self._chunk("", [], [])] if self._progress else []
        text, _ = self.choice.take(event)
        if isinstance(event, Finish):
            self._end = event.end
            return [{"index": self._index, "content": "", "tokens": [], **self._last()}]
        ids: list[int] = [] if self._reads_only else list(event.token_ids)
        if event.tokens and self._first_token_s is None:
            self._first_token_s = time.monotonic()
        self._tokens += len(ids)
        scores: list[dict[str, Any]] = []
        if ids and self._with_probabilities:
            scores = _probabilities(ids, event.logprobs or [])
            self._scores += scores
        return [self._chunk(text, ids, scores)] if text or ids else []

    def whole(self, *, with_tokens: bool) -> dict[str, Any]:
        """The answer that is not streamed."""
        found = {
            "index": self._index,
            "content": self.choice.text,
            "tokens": self.choice.token_ids if with_tokens else [],
            **self._last(),
        }
        if self._with_probabilities:
            found["completion_probabilities"] = self._scores
        return found

    def _chunk(self, text: str, ids: list[int], scores: list[dict[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {
            "index": self._index,
            "content": text,
            "tokens": ids,
            "stop": False,
            "id_slot": _SLOT,
            "tokens_predicted": self._tokens,
            "tokens_evaluated": self._prompt.prompt_tokens,
        }
        if scores:
            found["completion_probabilities"] = scores
        now_s = time.monotonic()
        first_s = now_s if self._first_token_s is None else self._first_token_s
        until_first_ms = (first_s - self._began_s) * 1000
        if self._timed:
            # Measured here: the worker tells its own times at the end.
            written_ms = (now_s - first_s) * 1000
            found["timings"] = _timings(self._prompt, self._tokens, until_first_ms, written_ms)
        if self._progress and not ids:
            total = self._prompt.prompt_tokens
            found["prompt_progress"] = {
                "total": total,
                "cache": self._prompt.cached_tokens,
                "processed": total,
                "time_ms": round(until_first_ms),
            }
        return found

    def _last(self) -> dict[str, Any]:
        end = self._end
        assert end is not None
        usage = self.choice.usage
        length = end.finish_reason is FinishReason.LENGTH and not self._reads_only
        if end.finish_reason is not FinishReason.STOP:
            kind = "limit"
        else:
            kind = "word" if isinstance(end.stopped_by, str) else "eos"
        # Cut before its limit, so by the context.
        truncated = length and (self._limit is None or usage.completion_tokens < self._limit)
        found = {
            "id_slot": _SLOT,
            "stop": True,
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            **self._head,
            "has_new_line": "\n" in self.choice.text,
            "truncated": truncated,
            "stop_type": kind,
            "stopping_word": end.stopped_by if isinstance(end.stopped_by, str) else "",
            "tokens_cached": usage.cached_tokens,
            "timings": _timings(
                end.usage, usage.completion_tokens, end.timings.prefill_ms, end.timings.decode_ms
            ),
        }
        # Not of llama.cpp's API.
        return {**found, "continued": end.continued} if end.continued else found


def _timings(usage: Usage, tokens: int, prompt_ms: float, written_ms: float) -> dict[str, Any]:
    read = usage.prompt_tokens - usage.cached_tokens
    # The first token comes of the prompt.
    steps = max(tokens - 1, 0)
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": read,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": _per(prompt_ms, read),
        "prompt_per_second": _per(read * 1000, prompt_ms),
        "predicted_n": tokens,
        "predicted_ms": written_ms,
        "predicted_per_token_ms": _per(written_ms, steps),
        "predicted_per_second": _per(steps * 1000, written_ms),
    }


def _per(value: float, by: float) -> float:
    return value / by if by else 0.0


def _probabilities(ids: list[int], tokens: list[TokenLogprob]) -> list[dict[str, Any]]:
    def one(id_: int, token: bytes, logprob: float | None) -> dict[str, Any]:
        finite = IMPOSSIBLE if logprob is None else max(logprob, IMPOSSIBLE)
        text = token.decode(errors="replace")
        return {"id": id_, "token": text, "bytes": list(token), "logprob": finite}

    return [
        {
            **one(id_, token.token, token.logprob),
            "top_logprobs": [one(top.token_id, top.token, top.logprob) for top in token.top],
        }
        for id_, token in zip(ids, tokens, strict=True)
    ]
