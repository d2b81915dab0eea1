"""The contract between the engine process and an engine: `add`, `cancel`, `step`, `capabilities`.

An engine knows nothing of sockets, sessions, credit, epochs or offsets: it is given jobs, it is
stepped, and each step returns new events. It runs in the engine process, called by a single thread;
only its own preprocessing may use further threads. Must never import zmq.

Rules that every engine must keep:

* A job ends exactly once, with `Ended` or `Failed`; there are no events about it after that.
* `add` never blocks for long and never raises for a bad job: `step` returns a `Failed` for it.
* `cancel` takes effect within one step and is answered with `Ended(CANCELLED)`; for an unknown id
  it does nothing.
* A failure of one job (bad image, failing template, NaN logits, out of memory) affects only that
  job.
* An exception raised by `step` means that the engine is broken: the supervisor starts a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from msgspec import Struct

from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.messages import (
    FinishReason,
    ModelInfo,
    Piece,
    Request,
    Timings,
    TokenLogprob,
    Usage,
)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of `python -m worker` that concern an engine. Plain data, since they are sent to
    another process."""

    engine: str = "transformers"
    #: Local folders or hub ids, one for each model served; empty for the bundled demo model.
    model_paths: tuple[str, ...] = ()
    #: Names under which the models are served, parallel to `model_paths`; a model may have several.
    model_names: tuple[tuple[str, ...], ...] = ()
    model_base: str | None = None
    #: "auto", "cpu", "cuda", "cuda:1", "mps", "xpu", "npu".
    device: str = "auto"
    #: "auto", "float32", "float16", "bfloat16".
    dtype: str = "auto"
    load_8bit: bool = False
    load_4bit: bool = False
    #: Bytes that the engine may occupy if several engine processes share a device; 0: whatever is
    #: free there.
    memory_bytes: int = 0
    #: Requests that run at once; 0 for the engine's own choice.
    slots: int = 0
    revision: str | None = None
    trust_remote_code: bool = False
    #: Jinja source that replaces the models' own chat templates; empty to keep those.
    chat_template: str = ""
    #: How the models mark their reasoning: a name of `reasoning.FAMILIES`, "none", or empty to find
    #: it out for each model.
    reasoning_parser: str = ""
    #: Folder or hub id of a small model that drafts the answers of the others; empty for none.
    draft_model: str = ""
    #: The engine's own options, from `--engine-arg KEY=VALUE`; values are still text.
    engine_args: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FailedLoad:
    """A model that was offered and could not be loaded."""

    name: str
    cause: str
    #: When it is offered again, in seconds of the monotonic clock; None: not automatically.
    retry_s: float | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do; known once it is loaded."""

    engine: str
    device: str
    models: tuple[ModelInfo, ...]
    #: Jobs that it can run at once: the credit that the worker grants.
    capacity: int
    #: Models that are missing from `models` because they could not be loaded.
    failed: tuple[FailedLoad, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """One request, as seen by the engine. Its body has been checked against the schema, but not
    against the model."""

    request_id: bytes
    #: `request.resume` contains the tokens generated elsewhere so far: they are prefilled after the
    #: prompt, count as output for penalties, positions (seed, position), stop strings and
    #: max_tokens, and are not sent again; the first new text continues after
    #: `resume.text_characters` characters.
    request: Request
    attachments: tuple[bytes, ...] = ()


_HALF_CHARACTER: Final = 4
"""A character that was cut in the middle is shown as at most one U+FFFD per byte."""


def check_received(received: int, possible: int) -> None:
    """Check how much text a client says it received. Raises RequestError if that is more than the
    tokens before its RESUME have: the text to come would silently lose the difference."""
    if received > possible + _HALF_CHARACTER:
        raise RequestError(
            ErrorCode.INVALID_REQUEST,
            f"resume.text_characters is {received}, but the text of resume.token_ids has {possible}"
            " characters: count the Unicode code points of the text received",
        )


def context_overflow(prompt_tokens: int, answer_tokens: int, context_tokens: int) -> RequestError:
    """The error for a prompt that does not fit together with the answer that was asked for."""
    return RequestError(
        ErrorCode.CONTEXT_OVERFLOW,
        f"the prompt has {prompt_tokens} tokens and the answer asks for {answer_tokens}, but the "
        f"context is {context_tokens}: shorten the prompt, lower max_tokens or ask for truncation",
        details={
            "prompt_tokens": prompt_tokens,
            "answer_tokens": answer_tokens,
            "context_tokens": context_tokens,
        },
    )


class Tokens(Struct, frozen=True, array_like=True, tag=0):
    """New tokens of a job and the text that they completed (possibly empty)."""

    request_id: bytes
    token_ids: list[int]
    text: str
    #: One for each token, or None if not requested.
    logprobs: list[TokenLogprob] | None = None
    #: The whole text by kind, if the answer is split; `text` is then only its content.
    pieces: list[Piece] | None = None


class Ended(Struct, frozen=True, array_like=True, tag=1):
    """The job is over and its slot is free."""

    request_id: bytes
    finish_reason: FinishReason
    #: The rest of the text, which was held back until now.
    text: str = ""
    usage: Usage = Usage()
    timings: Timings = Timings()
    #: The answer of embed, count, tokenize, detokenize and template.
    result: dict[str, Any] | None = None
    #: The stop string or the token id that ended the answer.
    stopped_by: str | int | None = None
    #: As in `Tokens`.
    pieces: list[Piece] | None = None


class Failed(Struct, frozen=True, array_like=True, tag=2):
    """The job failed and its slot is free."""

    request_id: bytes
    error: ErrorInfo
    usage: Usage = Usage()


class PromptFacts(Struct, frozen=True, array_like=True, tag=3):
    """Sent once, before the first `Tokens` of a job with `echo`, `prompt_logprobs`, `keep_special`
    or `prompt_usage`."""

    request_id: bytes
    #: Empty unless `echo` or `prompt_logprobs` was requested.
    token_ids: list[int]
    #: The prompt's text, if `echo` was requested.
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    #: Those of `keep_special` that the model has as special tokens.
    special: list[str] = []
    #: With `keep_special`: the end of the prompt's text.
    tail: str = ""
    #: Number of tokens of the prompt.
    usage: Usage | None = None


EngineEvent = Tokens | Ended | Failed | PromptFacts


class Engine(Protocol):
    """One or several loaded models that run a batch of jobs."""

    @property
    def capabilities(self) -> Capabilities: ...

    def add(self, job: Job) -> None:
        """Take a job. It starts in a later step, once there is memory and a slot."""

    def cancel(self, request_id: bytes) -> None:
        """Stop a job; the next step answers with `Ended(CANCELLED)`."""

    def step(self) -> list[EngineEvent]:
        """Do one unit of work (a prefill chunk and one decode for everyone) and return the new
        events.

        Called only while `busy`. May wait a few milliseconds if the only work is in its own
        preprocessing threads, never longer.
        """

    @property
    def busy(self) -> bool:
        """Whether there is work for `step`."""

    def metrics(self) -> dict[str, float]:
        """Statistics for the heartbeat: running, waiting, tokens_per_s, ttft_ms, batch,
        kv_used_tokens, kv_total_tokens, memory_used_bytes, ... Must be cheap: it is called about
        once a second."""

    def close(self) -> None:
        """Release threads and memory. The engine is not used after this."""


#: Called with loading progress: a fraction 0 to 1 (None if unknown) and a text for people.
Progress = Callable[[float | None, str], None]

#: Builds an engine; this is where weights load and a warm-up runs. Raises `EngineLoadError`.
EngineFactory = Callable[[EngineOptions, Progress], Engine]


class EngineGone(Exception):
    """What the engine drives (a server) is gone, through no fault of the engine; the message says
    why, in one line. Raised by `step` and `metrics`; the engine is then built anew."""


class EngineLoadError(Exception):
    """The engine cannot be built; the message says why and what to do (one line, for a
    terminal)."""


def adapter_paths(text: str) -> dict[str, str]:
    """Parse `--engine-arg adapters=NAME=PATH,NAME=PATH` to paths by name. Raises
    `EngineLoadError`."""
    paths: dict[str, str] = {}
    for item in text.split(",") if text else ():
        name, separator, path = item.strip().partition("=")
        if not separator or not path or not name:
            raise EngineLoadError(f"adapters={text}: expected NAME=PATH, separated by commas")
        if name in paths:
            raise EngineLoadError(f"adapters={text}: two adapters have the name {name}")
        paths[name] = path
    return paths
