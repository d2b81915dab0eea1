"""vLLM's `LLMEngine` as a `Generator`: add_request, step, abort_request.

The engine runs in this process and each `next` is one of its steps; vLLM manages tensor and
pipeline parallel workers, including Ray's, itself. Greedy requests use vLLM's own sampling, all
others tokenbus' sampler (`sampling`), so that an answer is a function of (seed, position) here too.
Texts, stop strings and limits are handled by tokenbus.
"""

from __future__ import annotations

import os
from argparse import ArgumentError
from collections.abc import Mapping
from typing import Any, NoReturn

# The engine core steps in this process; read when vLLM is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# On a CPU, binding threads to cores would take over the machine from everything else on it.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine

from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.messages import Params, Request, TokenLogprob
from worker.engines.base import EngineLoadError, EngineOptions, Progress
from worker.engines.common.arguments import shared_and_others
from worker.engines.common.facts import ModelFacts
from worker.engines.common.failures import one_line
from worker.engines.common.generator import Drawn
from worker.engines.common.host_sampling import is_plain_greedy, token_logprob
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
from worker.engines.common.text import token_table
from worker.engines.vllm.sampling import RowFacts, pack

__all__ = ["VllmGenerator", "build_engine"]

OWN = frozenset(
    {
        "model",
        "tokenizer",
        "revision",
        "tokenizer_revision",
        "trust_remote_code",
        "dtype",
        "logits_processors",
        "async_scheduling",
        "max_num_seqs",
        "max_model_len",
        "max_logprobs",
    }
)
"""Arguments of vLLM that are set from the worker's options, or must not be changed."""

LOWEST_BIAS = -100.0
"""The lowest bias that vLLM accepts; it keeps image placeholders out of greedy answers."""

RAW_LOGPROBS = (
    "gives logprobs before penalties, bias, bans, constraint and min_tokens: ask for one or the "
    "other"
)
"""Why a request cannot have both: vLLM's logprobs are those of the bare model."""

ADJUSTING = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "banned_token_ids",
    "constraint",
    "min_tokens",
)
"""Parameters with which the bus's logprobs differ from those of the bare model."""


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]
    """vLLM's own command line, which must not end the process."""

    def error(self, message: str) -> NoReturn:
        raise EngineLoadError(f"--engine-arg: vLLM says: {message}")


def engine_arguments(
    path: str, options: EngineOptions, context_tokens: int, arguments: Mapping[str, str]
) -> EngineArgs:
    """vLLM's arguments for a model. Raises `EngineLoadError`."""
    words: list[str] = []
    for name, text in arguments.items():
        flag = "--" + name.replace("_", "-")
        if name in OWN:
            raise EngineLoadError(f"--engine-arg {name}: it is set by the worker's own options")
        if text.lower() in ("true", "false"):
            words.append(flag if text.lower() == "true" else flag.replace("--", "--no-", 1))
        else:
            words += [flag, text]
    parser = EngineArgs.add_cli_args(_Parser(exit_on_error=False))
    # vLLM's statistics of each step and token would go to a log that nobody reads here.
    parser.set_defaults(disable_log_stats=True)
    try:
        args = parser.parse_args(words)
    except (ArgumentError, ValueError) as error:
        raise EngineLoadError(f"--engine-arg: vLLM says: {error}") from None
    # Set before the arguments are constructed: offline, they look up their model at once, and
    # vLLM's default model is not on this machine.
    args.model = args.tokenizer = path
    args.revision = args.tokenizer_revision = options.revision
    args.trust_remote_code = options.trust_remote_code
    result = EngineArgs.from_cli_args(args)
    result.dtype = options.dtype
    result.logits_processors = ["worker.engines.vllm.sampling:BusSampling"]
    # A row must see its last token before the next is chosen.
    result.async_scheduling = False
    if options.slots:
        result.max_num_seqs = options.slots
    if context_tokens:
        result.max_model_len = context_tokens
    if options.load_4bit:
        result.quantization = "bitsandbytes"
    return result


def build_engine(options: EngineOptions, progress: Progress) -> LibraryEngine:
    """Load the model of `options`. Raises `EngineLoadError`."""
    settings, theirs = shared_and_others("vllm", options.engine_args)
    refuse_options(
        options,
        {
            "model_base": "merge the adapter into its base first",
            "load_8bit": "choose a scheme of vLLM with --engine-arg quantization=NAME",
        },
    )
    if options.device not in ("auto", "cpu", "cuda"):
        raise EngineLoadError(
            f"engine vllm does not take --device {options.device}: its build determines the "
            "device; choose GPUs with CUDA_VISIBLE_DEVICES and --engine-arg tensor_parallel_size=N"
        )
    ((path, names),) = named_models(options, several=False)
    progress(None, f"loading {path}")
    facts = describe(path, options, settings, images=True, library="vllm")
    arguments = engine_arguments(path, options, settings.context_tokens, theirs)
    with explained(path, "vllm"):
        engine = LLMEngine.from_engine_args(arguments)
    config = engine.vllm_config
    facts.context_tokens = int(config.model_config.max_model_len)
    facts.details |= {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "tensor_parallel": config.parallel_config.tensor_parallel_size,
        "pipeline_parallel": config.parallel_config.pipeline_parallel_size,
        "quantised": config.model_config.quantization is not None,
    }
    generator = VllmGenerator(engine, facts)
    own = {"thinking_tokens": "samples in a process of its own; use --engine transformers"}
    model = _VllmModel(facts, names, settings, generator, unsupported=own)
    progress(1.0, "ready")
    return LibraryEngine("vllm", str(config.device_config.device_type), [model], settings)


class _VllmModel(LibraryModel):
    """A model of vLLM, whose logprobs are its own."""

    def _refuse(self, request: Request) -> None:
        super()._refuse(request)
        params, neutral = request.params, Params()
        if params.logprobs is None:
            return
        for name in ADJUSTING:
            if getattr(params, name) != getattr(neutral, name):
                raise RequestError(
                    ErrorCode.INVALID_REQUEST,
                    f"logprobs with {name}: engine vllm {RAW_LOGPROBS}",
                    details={"parameter": "logprobs"},
                )


class VllmGenerator:
    """vLLM's engine (see `Generator`)."""

    def __init__(self, engine: LLMEngine, facts: ModelFacts) -> None:
        self.slots = int(engine.vllm_config.scheduler_config.max_num_seqs)
        self._engine = engine
        self._facts = facts
        self._bytes_of = token_table(facts.tokenizer).bytes_of
        self._names: dict[int, str] = {}
        self._by_name: dict[str, Sequence] = {}
        self._count = 0

    def insert(self, sequence: Sequence) -> None:
        media = sequence.prompt.media
        ids = media["ids"] if media else sequence.prompt.ids
        prompt: dict[str, Any] = {"prompt_token_ids": [*ids, *sequence.answer]}
        if media:
            prompt["multi_modal_data"] = {"image": media["images"]}
        name = str(self._count)
        try:
            self._engine.add_request(name, prompt, self._sampling(sequence))
        except ValueError as error:
            raise RequestError(
                ErrorCode.INVALID_REQUEST, f"vLLM refuses this request: {one_line(error)}"
            ) from error
        self._count += 1
        self._names[id(sequence)] = name
        self._by_name[name] = sequence

    def _sampling(self, sequence: Sequence) -> SamplingParams:
        params = sequence.params
        placeholders = sorted(self._facts.placeholder_ids)
        extra: dict[str, Any] | None = None
        bias: dict[int, float] | None = dict.fromkeys(placeholders, LOWEST_BIAS) or None
        if not is_plain_greedy(sequence, scored_elsewhere=True):
            bias = None
            extra = pack(
                RowFacts(
                    params=params,
                    prompt_ids=[i for i in sequence.prompt.ids if i not in placeholders],
                    prior_ids=list(sequence.answer),
                    eos_ids=sorted(sequence.eos_ids),
                    placeholder_ids=placeholders,
                )
            )
        return SamplingParams(
            temperature=0.0,
            logit_bias=bias,
            extra_args=extra,
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs if sequence.wants_prompt_logprobs else None,
            # tokenbus finds ends and makes texts, and aborts requests that are over.
            ignore_eos=True,
            detokenize=False,
            max_tokens=sequence.max_tokens - len(sequence.answer),
            output_kind=RequestOutputKind.DELTA,
        )

    def remove(self, sequence: Sequence) -> None:
        name = self._names.pop(id(sequence))
        del self._by_name[name]
        self._engine.abort_request([name])

    def next(self) -> list[Drawn]:
        drawn: list[Drawn] = []
        for output in self._engine.step():
            sequence = self._by_name.get(output.request_id)
            if sequence is None:
                continue
            sequence.cached = max(sequence.cached, output.num_cached_tokens or 0)
            if output.prompt_logprobs and sequence.wants_prompt_logprobs:
                # The tokens of a resumed answer were part of vLLM's prompt, but not of ours.
                scored = output.prompt_logprobs[: len(sequence.prompt.ids)]
                sequence.prompt_logprobs = [
                    self._logprob(token_id, found, sequence.params.prompt_logprobs or 0)
                    for token_id, found in zip(sequence.prompt.ids, scored, strict=False)
                ]
            completion = output.outputs[0]
            for place, token_id in enumerate(completion.token_ids):
                logprob = None
                if completion.logprobs is not None and sequence.params.logprobs is not None:
                    logprob = self._logprob(
                        token_id, completion.logprobs[place], sequence.params.logprobs
                    )
                drawn.append(Drawn(sequence, self._checked(sequence, token_id, logprob)))
        return drawn

    def _checked(
        self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None
    ) -> Sampled | ErrorInfo:
        """The token; an error if it violates the request's own rules, which means that none could
        be chosen."""
        if sequence.row.forced is None and token_id in sequence.row.forbidden:
            return ErrorInfo(
                code=ErrorCode.ENGINE_ERROR.value,
                message="no token can be chosen: bias, bans and min_tokens exclude each other, or "
                "the model's logits are not numbers",
            )
        return Sampled(token_id, logprob, ok=True)

    def _logprob(self, token_id: int, found: Mapping[int, Any] | None, top: int) -> TokenLogprob:
        if not found:
            return TokenLogprob(None, self._bytes_of(token_id))
        ranked = sorted(found.items(), key=lambda item: item[1].rank or 0)
        likeliest = [(other, float(entry.logprob)) for other, entry in ranked][:top]
        return token_logprob(token_id, float(found[token_id].logprob), likeliest, self._bytes_of)

    def kv_total_tokens(self) -> int:
        cache = self._engine.vllm_config.cache_config
        return int((cache.num_gpu_blocks or 0) * (cache.block_size or 0))

    def close(self) -> None:
        self._engine.abort_request(list(self._by_name))
        self._by_name.clear()
        self._names.clear()
        self._engine.engine_core.shutdown()
