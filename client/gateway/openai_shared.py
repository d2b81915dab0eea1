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
from client.gateway.generation import ChoiceEvent, Delta, Finish, Prompted
from client.gateway.sse import Event

__all__ = ["UsageSoFar", "chat_logprobs", "error_event", "usage_of"]


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


class UsageSoFar:
    """Usage while a stream runs, summed over its choices, which are in the order of `usage_of`."""

    def __init__(self, choices: int, *, prompts: int = 1) -> None:
        self._each = choices // prompts
        self._prompts = prompts
        #: Prompt tokens by prompt; a worker tells them before the first token, where it is asked.
        self._prompt_tokens: dict[int, int] = {}
        self._completion_tokens = [0] * choices

    def take(self, event: ChoiceEvent) -> None:
        """Account for an event."""
        prompt = event.choice // self._each
        match event:
            case Prompted():
                self._prompt_tokens[prompt] = len(event.prompt.token_ids)
            case Delta():
                self._completion_tokens[event.choice] += event.tokens
            case Finish():
                self._prompt_tokens[prompt] = event.end.usage.prompt_tokens
                self._completion_tokens[event.choice] = event.end.usage.completion_tokens

    @property
    def usage(self) -> CompletionUsage | None:
        """None as long as a prompt's length is not known."""
        if len(self._prompt_tokens) < self._prompts:
            return None
        prompt, completion = sum(self._prompt_tokens.values()), sum(self._completion_tokens)
        return CompletionUsage(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
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
