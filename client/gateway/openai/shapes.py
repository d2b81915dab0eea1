"""Objects common to OpenAI's endpoints: usage, log probabilities, the last events.

They are built with the types of the `openai` package, which guarantees conformity. The chunks of
a stream are filled into a template that those types produced once, so that a token does not cost
a pydantic model.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from pydantic import BaseModel

from broker.protocol.messages import TokenLogprob, Usage
from client.gateway.errors import GatewayError, error_body
from client.gateway.openai.answers import IMPOSSIBLE
from client.gateway.openai.generation import ChoiceEvent, Delta, Finish, Prompted
from client.gateway.openai.position import Position, Reader
from client.gateway.sse import encode
from client.version import version

__all__ = [
    "FINGERPRINT",
    "JSON",
    "Chunks",
    "UsageSoFar",
    "chat_logprobs",
    "continued",
    "dumped",
    "error_event",
    "logprob_bytes",
    "usage_of",
]

#: Minimum length of one token with its log probability.
_LOGPROB_BYTES: Final = 64

#: What answers were made by.
FINGERPRINT: Final = f"tokenbus-{version()}"

#: Encodes the text of a chunk.
JSON: Final = msgspec.json.Encoder()


def dumped(shape: BaseModel) -> bytes:
    """An object of the `openai` package as JSON."""
    return shape.model_dump_json(exclude_unset=True, by_alias=True, warnings=False).encode()


def usage_of(ends: Iterable[Usage], *, prompts: int = 1) -> CompletionUsage:
    """The sum over the choices; each of the `prompts` is counted once.

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
        completion_tokens_details=CompletionTokensDetails(
            reasoning_tokens=sum(usage.reasoning_tokens for usage in usages)
        ),
    )


class UsageSoFar:
    """Usage while a stream runs, summed over its choices, which are ordered as in `usage_of`."""

    def __init__(self, choices: int, *, prompts: int = 1) -> None:
        self._each = choices // prompts
        self._prompts = prompts
        #: Prompt tokens by prompt; a worker sends them before the first token, if requested.
        self._prompt_tokens: dict[int, int] = {}
        self._completion_tokens = [0] * choices

    def take(self, event: ChoiceEvent) -> None:
        """Account for an event."""
        prompt = event.choice // self._each
        match event:
            case Prompted():
                if event.prompt.usage is not None:
                    self._prompt_tokens[prompt] = event.prompt.usage.prompt_tokens
            case Delta():
                self._completion_tokens[event.choice] += event.tokens
            case Finish():
                self._prompt_tokens[prompt] = event.end.usage.prompt_tokens
                self._completion_tokens[event.choice] = event.end.usage.completion_tokens

    def usage(self) -> bytes:
        """Usage as JSON; null while a prompt's length is unknown."""
        if len(self._prompt_tokens) < self._prompts:
            return b"null"
        prompt, completion = sum(self._prompt_tokens.values()), sum(self._completion_tokens)
        return b'{"completion_tokens":%d,"prompt_tokens":%d,"total_tokens":%d}' % (
            completion,
            prompt,
            prompt + completion,
        )


@functools.lru_cache(maxsize=64)
def _empty_chunk(shape: type[BaseModel], kind: str, model: str) -> bytes:
    """A chunk without a choice, for `%`; written once for all answers of a model."""
    empty = shape(
        id="@",
        object=kind,
        created=0,
        model=model,
        choices=[],
        system_fingerprint=FINGERPRINT,
    )
    return dumped(empty).replace(b"%", b"%%")


#: What each answer fills in. Neither field can occur inside a string, where its quotes would be
#: escaped.
_ID_FIELD: Final = b'"id":"@"'
_CREATED_FIELD: Final = b'"created":0'


class Chunks:
    """The chunks of one streamed answer, as events. Their common parts are written once."""

    def __init__(
        self,
        shape: type[BaseModel],
        kind: str,
        model: str,
        position: Position,
        choices: int,
        *,
        logprobs: bool,
        with_usage: bool,
        so_far: UsageSoFar | None,
    ) -> None:
        """`shape`: a type of the `openai` package; `kind`: its `object` field. `logprobs`: whether
        log probabilities or ids of tokens are sent."""
        empty = _empty_chunk(shape, kind, model)
        empty = empty.replace(_ID_FIELD, b'"id":"%b"' % position.answer.encode(), 1)
        empty = empty.replace(_CREATED_FIELD, b'"created":%d' % int(time.time()), 1)
        head, before, behind = empty.partition(b'"choices":[')
        self.reader = Reader(position, choices, tokens=logprobs)
        #: Template to be filled with the id, the choice and the usage.
        self._format = (
            self.reader.id_line
            + (b"data: " + head + before + b"%b")
            + (behind.removesuffix(b"}") + b"%b}\n\n")
        )
        self._with_usage = with_usage
        self._so_far = so_far

    def event(self, choice: bytes, beside: bytes = b"") -> bytes:
        """The chunk of one choice. `beside`: more fields of the chunk, each after its comma."""
        if self._with_usage:
            so_far = self._so_far.usage() if self._so_far is not None else b"null"
            beside += b',"usage":' + so_far
        return self._format % (*self.reader.next_id(), choice, beside)

    def last(self, usage: Callable[[], CompletionUsage]) -> list[bytes]:
        """The events after all choices: their usage, if requested and not read yet."""
        if not self._with_usage or self.reader.read_usage:
            return []
        id_ = self.reader.next_id(usage=True)
        return [self._format % (*id_, b"", b',"usage":' + dumped(usage()))]


def _finite(logprob: float | None) -> float:
    return IMPOSSIBLE if logprob is None or logprob < IMPOSSIBLE else logprob


def logprob_bytes(choices: Iterable[Sequence[TokenLogprob]]) -> int:
    """Approximate length of the choices' log probabilities as JSON."""
    counts = (len(tokens) * (1 + len(tokens[0].top)) for tokens in choices if tokens)
    return sum(counts) * _LOGPROB_BYTES


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> list[ChatCompletionTokenLogprob]:
    """Log probabilities in the form of chat; bytes that are not a whole character
    appear as U+FFFD."""
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


def continued(how: str) -> bytes:
    """The further field of a choice that went on inexactly after its worker was lost."""
    return b',"continued":' + JSON.encode(how) if how else b""


def error_event(error: GatewayError, request_id: str) -> bytes:
    """The event before the last of a stream that failed; OpenAI's SDKs raise it."""
    return encode(msgspec.json.encode(error_body(error, request_id)))
