"""SGLang's offline `Engine` as a `Generator`: async_generate, its loop, abort_request.

Written against SGLang 0.5's sources and documentation, but never run: it needs a GPU. Parameters
that could not be verified to mean the same as on the bus are refused by name. SGLang samples in its
own processes; with its deterministic inference a token is a function of (seed, position) there too,
but not the same function as in the other engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.messages import Params
from worker.engines.base import EngineLoadError, EngineOptions, Progress
from worker.engines.common.arguments import boolean, shared_and_others
from worker.engines.common.facts import ModelFacts
from worker.engines.common.failures import error_info
from worker.engines.common.generator import Drawn
from worker.engines.common.library_model import (
    LibraryEngine,
    LibraryModel,
    describe,
    explained,
    named_models,
    refuse_options,
)
from worker.engines.common.sampling import Sampled
from worker.engines.common.sequence import Sequence

__all__ = ["SglangGenerator", "build_engine"]

DEFAULT_SLOTS = 64

WAIT_S = 0.004
"""How long a step waits for SGLang's processes; the engine's loop must stay responsive."""

SEEDS = 1 << 31
"""SGLang's seeds have 32 bits: the bus's seeds are taken modulo this."""

NEVER = -1.0e4
"""Bias of image placeholders."""

PENALTY_BOUND = 2.0
"""SGLang refuses presence and frequency penalties beyond this."""

UNVERIFIED = "is not known to treat it as the bus does; use --engine transformers or vllm"

UNSUPPORTED = dict.fromkeys(
    (
        "min_tokens",
        "repetition_penalty",
        "logprobs",
        "prompt_logprobs",
        "banned_token_ids",
        "forced_token_ids",
        "constraint",
        "thinking_tokens",
    ),
    UNVERIFIED,
)

OWN = frozenset(
    {
        "model_path",
        "tokenizer_path",
        "revision",
        "trust_remote_code",
        "dtype",
        "device",
        "max_running_requests",
        "context_length",
        "enable_deterministic_inference",
    }
)
"""Arguments of SGLang that are set from the worker's options, or must not be changed."""


def build_engine(options: EngineOptions, progress: Progress) -> LibraryEngine:
    """Load the model of `options`. Raises `EngineLoadError`."""
    import sglang

    settings, theirs = shared_and_others("sglang", options.engine_args)
    refuse_options(
        options,
        {
            "model_base": "merge the adapter into its base first",
            "load_8bit": "choose a scheme of SGLang with --engine-arg quantization=NAME",
            "load_4bit": "choose a scheme of SGLang with --engine-arg quantization=NAME",
        },
    )
    ((path, names),) = named_models(options, several=False)
    facts = describe(path, options, settings, images=True, library="sglang")
    slots = options.slots or DEFAULT_SLOTS
    arguments = server_arguments(theirs) | {
        "model_path": path,
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
        "dtype": options.dtype,
        "max_running_requests": slots,
        "enable_deterministic_inference": True,
    }
    if options.device != "auto":
        arguments["device"] = options.device.partition(":")[0]
    if settings.context_tokens:
        arguments["context_length"] = settings.context_tokens
    progress(None, f"loading {path}")
    with explained(path, "sglang"):
        engine = sglang.Engine(**arguments)
    model = LibraryModel(
        facts, names, settings, SglangGenerator(engine, facts, slots), unsupported=UNSUPPORTED
    )
    progress(1.0, "ready")
    return LibraryEngine("sglang", options.device, [model], settings)


def server_arguments(texts: Mapping[str, str]) -> dict[str, Any]:
    """Arguments for SGLang's `ServerArgs`. Raises `EngineLoadError` for a name it does not have."""
    from sglang.srt.server_args import ServerArgs

    known = {field.name for field in dataclasses.fields(ServerArgs)} - OWN
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in known:
            raise EngineLoadError(
                f"unknown --engine-arg {name!r}: it is not one of SGLang's server arguments, or it "
                "is set by the worker's own options"
            )
        values[name] = _value(text)
    return values


def _value(text: str) -> bool | int | float | str:
    """A value guessed from its text; SGLang checks it against the argument."""
    parsers: tuple[Callable[[str], bool | int | float], ...] = (int, float, boolean)
    for parse in parsers:
        with contextlib.suppress(ValueError):
            return parse(text)
    return text


def sampling_parameters(
    params: Params, sequence: Sequence, placeholders: list[int]
) -> dict[str, Any]:
    """SGLang's parameters for a request. Raises RequestError for what it would not accept."""
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        if abs(value) > PENALTY_BOUND:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                f"{name}: engine sglang takes values between -2 and 2",
                details={"parameter": name},
            )
        if value and sequence.answer:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                f"{name}: engine sglang cannot resume an answer with it, because it would not "
                "count the tokens so far; send the request again",
                details={"parameter": name},
            )
    bias = {str(token_id): value for token_id, value in params.logit_bias}
    # Whatever the caller asks, no placeholder of an image may be in an answer.
    bias |= {str(token_id): NEVER for token_id in placeholders}
    result = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "min_p": params.min_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "sampling_seed": params.seed % SEEDS,
        "max_new_tokens": sequence.max_tokens - len(sequence.answer),
        # tokenbus detects the end of an answer and aborts it.
        "ignore_eos": True,
    }
    return result | ({"logit_bias": bias} if bias else {})


@dataclasses.dataclass(slots=True, eq=False)
class _Running:
    """A sequence that SGLang runs."""

    sequence: Sequence
    #: Number of its tokens that SGLang has drawn.
    drawn: int = 0
    over: bool = False


class SglangGenerator:
    """SGLang's engine (see `Generator`). Its asyncio loop runs inside `next`."""

    def __init__(self, engine: Any, facts: ModelFacts, slots: int) -> None:
        self.slots = slots
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop = engine.loop
        self._placeholders = sorted(facts.placeholder_ids)
        self._arrived = asyncio.Event()
        self._chunks: deque[tuple[_Running, dict[str, Any] | ErrorInfo]] = deque()
        self._names: dict[int, str] = {}
        self._running: dict[str, _Running] = {}
        #: Kept until they end, since a loop has only weak references to its tasks.
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0

    def insert(self, sequence: Sequence) -> None:
        parameters = sampling_parameters(sequence.params, sequence, self._placeholders)
        media = sequence.prompt.media
        ids = media["ids"] if media else sequence.prompt.ids
        # SGLang aborts all requests whose name begins like this.
        name = f"tokenbus-{self._count}."
        self._count += 1
        running = _Running(sequence)
        task = self._loop.create_task(
            self._follow(
                name,
                running,
                {
                    "input_ids": [*ids, *sequence.answer],
                    "image_data": list(media["images"]) if media else None,
                    "sampling_params": parameters,
                },
            )
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._names[id(sequence)] = name
        self._running[name] = running

    def remove(self, sequence: Sequence) -> None:
        name = self._names.pop(id(sequence))
        running = self._running.pop(name)
        if not running.over:
            self._loop.run_until_complete(self._abort(name))

    def next(self) -> list[Drawn]:
        self._loop.run_until_complete(self._wait())
        drawn: list[Drawn] = []
        while self._chunks:
            running, chunk = self._chunks.popleft()
            if isinstance(chunk, ErrorInfo):
                drawn.append(Drawn(running.sequence, chunk))
            else:
                drawn += self._tokens(running, chunk)
        return drawn

    @staticmethod
    def _tokens(running: _Running, chunk: Mapping[str, Any]) -> list[Drawn]:
        """The new tokens of a chunk, which contains either all ids so far or only the new ones."""
        meta = chunk["meta_info"]
        running.sequence.cached = int(meta.get("cached_tokens") or 0)
        total = int(meta["completion_tokens"])
        fresh = total - running.drawn
        running.drawn = total
        token_ids = list(chunk["output_ids"])[-fresh:] if fresh > 0 else []
        drawn = [
            Drawn(running.sequence, Sampled(int(token_id), None, ok=True)) for token_id in token_ids
        ]
        reason = meta.get("finish_reason")
        if isinstance(reason, Mapping) and reason.get("type") == "abort":
            message = f"SGLang gave up the request: {str(reason.get('message') or '')[:500]}"
            error = ErrorInfo(code=ErrorCode.ENGINE_ERROR.value, message=message)
            drawn.append(Drawn(running.sequence, error))
        return drawn

    def kv_total_tokens(self) -> int:
        return 0

    def close(self) -> None:
        self._running.clear()
        self._names.clear()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            gathered = asyncio.gather(*self._tasks, return_exceptions=True)
            self._loop.run_until_complete(gathered)
        self._engine.shutdown()

    # --- on SGLang's loop -------------------------------------------------------------------------

    async def _follow(self, name: str, running: _Running, arguments: dict[str, Any]) -> None:
        try:
            stream = await self._engine.async_generate(rid=name, stream=True, **arguments)
            async for chunk in stream:
                self._hear(name, running, chunk)
        except Exception as error:
            # Whatever it raises concerns this request: SGLang watches its own processes.
            self._hear(name, running, error_info(error, "the model failed on this request"))
        running.over = True

    def _hear(self, name: str, running: _Running, chunk: dict[str, Any] | ErrorInfo) -> None:
        if name in self._running:
            self._chunks.append((running, chunk))
            self._arrived.set()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(WAIT_S):
                await self._arrived.wait()
        except TimeoutError:
            return
        self._arrived.clear()

    async def _abort(self, name: str) -> None:
        self._engine.tokenizer_manager.abort_request(rid=name)
