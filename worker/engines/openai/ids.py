"""A server that takes and returns token ids, as a `Generator`.

Prompts, texts, stop strings, pieces and ends are tokenbus' own, as in the engines that use a
library; the server chooses tokens. An answer can therefore be continued after the same tokens at
any such server. If tokens are drawn at random, the rest is a new draw, because the server counts
its draws from where it begins.

There are two dialects: OpenAI's completions with `return_token_ids` (vLLM and similar servers), and
llama.cpp's own `/completion`. Needs the model's tokenizer, which is first compared with the
server's. Must never read text that the server made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.messages import (
    Kind,
    Message,
    Params,
    Request,
    TokenLogprob,
    TopLogprob,
    new_id,
)
from worker.engines.base import EngineLoadError, EngineOptions, Job
from worker.engines.common.arguments import SharedSettings
from worker.engines.common.facts import ModelFacts
from worker.engines.common.generator import Drawn
from worker.engines.common.library_model import LibraryEngine, LibraryModel, describe
from worker.engines.common.sampling import Sampled
from worker.engines.common.sequence import Sequence
from worker.engines.common.text import token_table
from worker.engines.openai.bodies import SEEDS
from worker.engines.openai.discover import Model
from worker.engines.openai.http import Chunk, Done, Fault, Server

__all__ = ["IdsEngine", "build_ids", "takes"]

_NEUTRAL: Final = Params()
_ELSEWHERE: Final = (
    "constraint",
    "banned_token_ids",
    "forced_token_ids",
    "thinking_tokens",
    "prompt_logprobs",
)
"""Parameters that the server honours only for text requests, or not at all."""

_GOLDEN: Final = 0x9E3779B1
_SAMPLES: Final = (
    "Once upon a time, in 1984, there were \t two\n\nlines.",
    "Grüße, 世界! 👋🏽 naïve café — “quoted” …",
    "  def f(x):\n    return x**2  # code",
)


_NOT_NATIVE: Final = ("stop_token_ids", "min_tokens", "ignore_eos", "logprobs")
"""Further parameters that llama.cpp's server does not honour as the bus does with token ids."""


def takes(request: Request, *, attachments: bool, llamacpp: bool = False) -> bool:
    """Whether a request goes by token ids, if it has no answer yet."""
    if attachments or request.kind not in (
        Kind.CHAT,
        Kind.COMPLETE,
        Kind.COUNT,
        Kind.TOKENIZE,
        Kind.DETOKENIZE,
        Kind.TEMPLATE,
    ):
        return False
    params = request.params
    if params.logprobs is not None and _changes_logits(params):
        return False
    elsewhere = (*_ELSEWHERE, *_NOT_NATIVE) if llamacpp else _ELSEWHERE
    return all(getattr(params, name) == getattr(_NEUTRAL, name) for name in elsewhere)


def _changes_logits(params: Params) -> bool:
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
    changed = any(getattr(params, name) != getattr(_NEUTRAL, name) for name in names)
    return changed or bool(params.min_tokens)


class IdsEngine(LibraryEngine):
    """The models of a server whose requests go by token ids."""

    def __init__(
        self,
        device: str,
        models: list[LibraryModel],
        generators: list[IdsGenerator],
        settings: SharedSettings,
    ) -> None:
        super().__init__("openai", device, models, settings)
        self._generators = generators

    def hear(self, came: Chunk | Done | Fault) -> None:
        """Take something from a stream that belongs to none of the text requests."""
        for generator in self._generators:
            if generator.hear(came):
                return


def build_ids(
    server: Server, model: Model, kind: str, path: str, slots: int, options: EngineOptions
) -> tuple[LibraryModel, IdsGenerator]:
    """The model by token ids, with the tokenizer at `path`. Raises `EngineLoadError` if the
    server's tokenizer is another one."""
    settings = SharedSettings(context_tokens=model.context_tokens or 0)
    facts = describe(path, options, settings, images=False, library="openai")
    generator = IdsGenerator(server, model.id, facts, slots, llamacpp=kind == "llamacpp")
    made = LibraryModel(
        facts,
        model.names,
        settings,
        generator,
        unsupported=dict.fromkeys(_ELSEWHERE, "goes to the server by text"),
    )
    made.forces_tokens = False
    _compare(server, model, made, kind, path)
    return made, generator


def _compare(server: Server, model: Model, made: LibraryModel, kind: str, path: str) -> None:
    """Check that tokenizer and chat template are the server's. Raises `EngineLoadError`."""
    for text in _SAMPLES:
        body: dict[str, Any] = (
            {"content": text, "add_special": False}
            if kind == "llamacpp"
            else {"model": model.id, "prompt": text, "add_special_tokens": False}
        )
        theirs = server.ask("/tokenize", body).map.get("tokens")
        ours = made.facts.tokenizer.encode(text, add_special_tokens=False)
        if theirs != ours:
            raise EngineLoadError(
                f"the tokenizer at {path} is not that of {model.id} at {server.where}: they differ "
                f"on {text[:20]!r}; give the right one with --engine-arg tokenizer=PATH, or "
                "tokenizer=none"
            )
    if kind == "llamacpp":
        return
    messages = [("system", "Be brief."), ("user", "What is 2+2?")]
    body = {
        "model": model.id,
        "messages": [{"role": role, "content": content} for role, content in messages],
    }
    theirs = server.ask("/tokenize", body).map.get("tokens")
    request = Request(
        model=model.names[0],
        kind=Kind.TOKENIZE,
        messages=[Message(role=role, content=content) for role, content in messages],
        window=1,
    )
    answer = made.prepare(Job(new_id(), request), 0.0)
    ours = getattr(answer, "result", {}).get("token_ids")
    if theirs is not None and theirs != ours:
        raise EngineLoadError(
            f"the chat template at {path} is not that of {model.id} at {server.where}: give a "
            "folder with the server's, or --engine-arg tokenizer=none"
        )


class IdsGenerator:
    """One model of a server (see `Generator`)."""

    def __init__(
        self, server: Server, model: str, facts: ModelFacts, slots: int, *, llamacpp: bool
    ) -> None:
        self.slots = slots
        self._server = server
        self._model = model
        self._facts = facts
        self._llamacpp = llamacpp
        self._bytes_of = token_table(facts.tokenizer).bytes_of
        self._numbers: dict[int, int] = {}
        self._by_number: dict[int, Sequence] = {}
        self._inbox: deque[Chunk | Done | Fault] = deque()

    def hear(self, came: Chunk | Done | Fault) -> bool:
        """Take what has come if it belongs to one of this model's sequences; whether it does."""
        if came.call not in self._by_number:
            return False
        self._inbox.append(came)
        return True

    def insert(self, sequence: Sequence) -> None:
        params = sequence.params
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(params, name) and sequence.answer:
                raise RequestError(
                    ErrorCode.WORKER_LOST,
                    f"the answer cannot be continued: with {name} the server at "
                    f"{self._server.where} would not count the tokens so far; ask again",
                )
        path, body = self._native(sequence) if self._llamacpp else self._completion(sequence)
        number = self._server.open(path, body)
        self._numbers[id(sequence)] = number
        self._by_number[number] = sequence

    def _common(self, sequence: Sequence) -> dict[str, Any]:
        params = sequence.params
        drawn = len(sequence.answer)
        body: dict[str, Any] = {
            "prompt": [*sequence.prompt.ids, *sequence.answer],
            "stream": True,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "seed": (params.seed + drawn * _GOLDEN) % SEEDS,
        }
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(params, name):
                body[name] = getattr(params, name)
        return body

    def _completion(self, sequence: Sequence) -> tuple[str, dict[str, Any]]:
        params = sequence.params
        ends = set(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= sequence.eos_ids
        body = self._common(sequence) | {
            "model": self._model,
            "return_token_ids": True,
            "max_tokens": sequence.max_tokens - len(sequence.answer),
            "top_k": params.top_k or -1,
            # Ends are sent as stop tokens, which the server returns with the answer.
            "ignore_eos": True,
            "stop_token_ids": sorted(ends),
        }
        if params.repetition_penalty != 1:
            body["repetition_penalty"] = params.repetition_penalty
        if params.min_tokens > len(sequence.answer):
            body["min_tokens"] = params.min_tokens - len(sequence.answer)
        if params.logit_bias:
            body["logit_bias"] = {str(id_): bias for id_, bias in params.logit_bias}
        if params.logprobs is not None:
            body |= {"logprobs": params.logprobs, "return_tokens_as_token_ids": True}
        return "completions", body

    def _native(self, sequence: Sequence) -> tuple[str, dict[str, Any]]:
        params = sequence.params
        for name in _NOT_NATIVE:
            if getattr(params, name) != getattr(_NEUTRAL, name):
                raise RequestError(
                    ErrorCode.INVALID_REQUEST,
                    f"{name}: llama.cpp's server does not support it with token ids",
                    details={"parameter": name},
                )
        body = self._common(sequence) | {
            "model": self._model,
            "return_tokens": True,
            "n_predict": sequence.max_tokens - len(sequence.answer),
            "top_k": params.top_k,
            "repeat_penalty": params.repetition_penalty,
            "repeat_last_n": self._facts.context_tokens,
            "typical_p": 1.0,
            # The default list would add samplers that nobody asked for, in another order.
            "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
            "cache_prompt": True,
        }
        if params.logit_bias:
            body["logit_bias"] = [[id_, bias] for id_, bias in params.logit_bias]
        return "/completion", body

    def remove(self, sequence: Sequence) -> None:
        number = self._numbers.pop(id(sequence))
        del self._by_number[number]
        self._server.close_call(number)

    def next(self) -> list[Drawn]:
        drawn: list[Drawn] = []
        while self._inbox:
            came = self._inbox.popleft()
            sequence = self._by_number.get(came.call)
            if sequence is None:
                continue
            if isinstance(came, Fault):
                drawn.append(Drawn(sequence, came.error))
            elif isinstance(came, Done):
                drawn.append(Drawn(sequence, self._cut_short()))
            else:
                told = self._native_tokens if self._llamacpp else self._tokens
                try:
                    drawn += [Drawn(sequence, sampled) for sampled in told(sequence, came.data)]
                except (KeyError, TypeError, ValueError, IndexError) as error:
                    message = f"the server at {self._server.where} sent no token ids: {error!r}"
                    info = ErrorInfo(code=ErrorCode.ENGINE_ERROR.value, message=message)
                    drawn.append(Drawn(sequence, info))
        return drawn

    def _cut_short(self) -> ErrorInfo:
        message = f"the server at {self._server.where} ended the answer early"
        return ErrorInfo(code=ErrorCode.WORKER_LOST.value, message=message, retryable=True)

    def _tokens(self, sequence: Sequence, data: Mapping[str, Any]) -> list[Sampled]:
        choices = data.get("choices")
        if not choices:
            return []
        choice = choices[0]
        ids = choice.get("token_ids")
        if ids is None:
            if choice.get("text"):
                raise KeyError("token_ids")
            ids = []
        logprobs: list[TokenLogprob | None] = [None] * len(ids)
        if sequence.params.logprobs is not None and ids:
            logprobs = list(self._logprobs(ids, choice["logprobs"], sequence.params.logprobs))
        return [
            Sampled(int(id_), logprob, ok=True) for id_, logprob in zip(ids, logprobs, strict=True)
        ]

    def _logprobs(self, ids: list[int], told: Mapping[str, Any], most: int) -> list[TokenLogprob]:
        made: list[TokenLogprob] = []
        for id_, value, top in zip(ids, told["token_logprobs"], told["top_logprobs"], strict=True):
            pairs = [(int(name.removeprefix("token_id:")), lp) for name, lp in (top or {}).items()]
            pairs.sort(key=lambda pair: -pair[1])
            ranked = [TopLogprob(i, float(lp), self._bytes_of(i)) for i, lp in pairs[:most]]
            made.append(TokenLogprob(float(value), self._bytes_of(id_), ranked))
        return made

    def _native_tokens(self, sequence: Sequence, data: Mapping[str, Any]) -> list[Sampled]:
        sampled = [Sampled(int(id_), None, ok=True) for id_ in data.get("tokens") or ()]
        at_end = data.get("stop") and data.get("stop_type") == "eos"
        if at_end and (not sampled or sampled[-1].token_id not in sequence.eos_ids):
            # The token that ended the answer is not among its tokens.
            sampled.append(Sampled(min(sequence.eos_ids), None, ok=True))
        return sampled

    def kv_total_tokens(self) -> int:
        return 0

    def close(self) -> None:
        self._numbers.clear()
        self._by_number.clear()
