"""The contract between the engine process and an engine: `add`, `cancel`, `step`, and a capability
record.

An engine knows nothing of sockets, sessions, credit, epochs or offsets: it is given jobs, it is
stepped, and each step returns what became known. It runs in the engine process, on one thread that
calls it; only its own preprocessing may use further threads. Must never import zmq.

The rules every engine keeps:

* A job ends exactly once: with `Ended` or with `Failed`; after that nothing more is said of it.
* `add` never blocks for long and never raises for a bad job: `step` returns its `Failed`.
* `cancel` takes effect within one step and is answered with `Ended(CANCELLED)`; for an unknown id
  it does nothing.
* A failure of one job (bad picture, raising template, NaN logits, out of memory) is its alone.
* An exception out of `step` means that the engine is broken: the supervisor starts a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from msgspec import Struct

from broker.protocol.errors import ErrorInfo
from broker.protocol.messages import (
    FinishReason,
    ModelInfo,
    Request,
    Timings,
    TokenLogprob,
    Usage,
)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What `python -m worker` was told, as far as an engine may care. Plain data: it crosses a
    process."""

    engine: str = "transformers"
    #: Local folders or hub ids, one for each model served; empty: the bundled demo model.
    model_paths: tuple[str, ...] = ()
    #: Names under which the models are served; parallel to `model_paths`, several to a model.
    model_names: tuple[tuple[str, ...], ...] = ()
    model_base: str | None = None
    #: "auto", "cpu", "cuda", "cuda:1", "mps", "xpu", "npu".
    device: str = "auto"
    #: "auto", "float32", "float16", "bfloat16".
    dtype: str = "auto"
    load_8bit: bool = False
    load_4bit: bool = False
    #: Requests that run at once; 0: the engine's own choice.
    slots: int = 0
    revision: str | None = None
    trust_remote_code: bool = False
    #: Jinja source that replaces the models' own chat templates; empty: each has its own.
    chat_template: str = ""
    #: Of the engine itself, from `--engine-arg KEY=VALUE`; values are still text.
    engine_args: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do, known once it is loaded."""

    engine: str
    device: str
    models: tuple[ModelInfo, ...]
    #: Jobs that it runs at once; the credit that the worker grants.
    capacity: int


@dataclass(frozen=True, slots=True)
class Job:
    """One request, as the engine sees it. The body was checked against the schema, not against the
    model."""

    request_id: bytes
    #: `request.resume` holds the tokens generated so far elsewhere: they are prefilled after the
    #: prompt,
    #: count as output for penalties, positions (seed, position), stop strings and max_tokens, and
    #: are not
    #: sent again; the first new text continues after `resume.text_characters` characters.
    request: Request
    attachments: tuple[bytes, ...] = ()


class Tokens(Struct, frozen=True, array_like=True, tag=0):
    """New tokens of a job and the text that became certain with them (it may be empty)."""

    request_id: bytes
    token_ids: list[int]
    text: str
    #: One for each token, or None when not asked for.
    logprobs: list[TokenLogprob] | None = None


class Ended(Struct, frozen=True, array_like=True, tag=1):
    """The job is over and its slot is free."""

    request_id: bytes
    finish_reason: FinishReason
    #: The rest of the text, held back until now.
    text: str = ""
    usage: Usage = Usage()
    timings: Timings = Timings()
    #: The answer of embed, count, tokenize, detokenize and template.
    result: dict[str, Any] | None = None
    #: The stop string or the token id that ended it.
    stopped_by: str | int | None = None


class Failed(Struct, frozen=True, array_like=True, tag=2):
    """The job failed and its slot is free."""

    request_id: bytes
    error: ErrorInfo
    usage: Usage = Usage()


class PromptFacts(Struct, frozen=True, array_like=True, tag=3):
    """Once, before the first `Tokens` of a job with `echo`, `prompt_logprobs` or `keep_special`."""

    request_id: bytes
    #: Empty where only `keep_special` asked.
    token_ids: list[int]
    #: The prompt's text where `echo` was asked for.
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    #: Those of `keep_special` that are special tokens of the model.
    special: list[str] = []
    #: With `keep_special`, the end of the prompt's text.
    tail: str = ""
    #: Of the prompt.
    usage: Usage | None = None


EngineEvent = Tokens | Ended | Failed | PromptFacts


class Engine(Protocol):
    """One or several loaded models that run a batch of jobs."""

    @property
    def capabilities(self) -> Capabilities: ...

    def add(self, job: Job) -> None:
        """Take a job. It starts in a later step, when memory and a slot allow."""

    def cancel(self, request_id: bytes) -> None:
        """Stop a job; the next step answers with `Ended(CANCELLED)`."""

    def step(self) -> list[EngineEvent]:
        """Do one unit of work (a prefill chunk and one decode for everyone) and return what it
        brought.

        Called only while `busy`. May wait a few milliseconds when the only work is in its own
        preprocessing threads, never longer.
        """

    @property
    def busy(self) -> bool:
        """There is something to step for."""

    def metrics(self) -> dict[str, float]:
        """Figures for the heartbeat: running, waiting, tokens_per_s, ttft_ms, batch,
        kv_used_tokens, kv_total_tokens, memory_used_bytes, ... Cheap: called about once a
        second."""

    def close(self) -> None:
        """Release threads and memory. The engine is not used again."""


#: Told what is being loaded: a fraction 0 to 1 (None: unknown) and words for people.
Progress = Callable[[float | None, str], None]

#: Builds an engine; this is where weights load and a warm-up runs. Raises `EngineLoadError`.
EngineFactory = Callable[[EngineOptions, Progress], Engine]


class EngineLoadError(Exception):
    """The engine cannot be built; the message says why and what to do (one line, for the
    terminal)."""
