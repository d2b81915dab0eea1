"""What OpenAI's endpoints have in common: usage, log-probabilities, the last events.

Shapes are the types of the `openai` package, so that conformity is theirs.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_usage import PromptTokensDetails

from broker.protocol.messages import TokenLogprob, Usage
from client.gateway.answers import IMPOSSIBLE
from client.gateway.errors import GatewayError, error_body
from client.gateway.sse import Event

__all__ = ["chat_logprobs", "error_event", "usage_of"]


def usage_of(ends: Iterable[Usage], *, prompts: int = 1) -> CompletionUsage:
    """The sum over the choices; the prompt of a choice counts once for each of `prompts`.

    `ends` are in the order of the choices: all choices of the first prompt, then of the second.
    """
    usages = list(ends)
    choices = max(1, len(usages) // prompts)
    counted = usages[::choices]
    prompt = sum(usage.prompt_tokens for usage in counted)
    completion = sum(usage.completion_tokens for usage in usages)
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(usage.cached_tokens for usage in counted),
            image_tokens=sum(usage.image_tokens for usage in counted),
        ),
    )


def _finite(logprob: float | None) -> float:
    return IMPOSSIBLE if logprob is None or logprob < IMPOSSIBLE else logprob


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> list[ChatCompletionTokenLogprob]:
    """Log-probabilities as chat has them; octets that are no whole character show as U+FFFD."""
    return [
        ChatCompletionTokenLogprob(
            token=token.token.decode(errors="replace"),
            bytes=list(token.token),
            logprob=_finite(token.logprob),
            top_logprobs=[
                TopLogprob(
                    token=top.token.decode(errors="replace"),
                    bytes=list(top.token),
                    logprob=_finite(top.logprob),
                )
                for top in token.top
            ],
        )
        for token in tokens
    ]


def error_event(error: GatewayError, request_id: str) -> Event:
    """The last event but one of a stream that failed; OpenAI's SDKs raise it."""
    return Event(msgspec.json.encode(error_body(error, request_id)).decode())
